//! What the kernel offers that the crates of this field do not wrap: typed, each with its errors.
//!
//! * [`sys`]: single system calls; [`socket`]: those on sockets.
//! * [`files`]: system calls on files.
//! * [`mm`]: files that can only be made by mapping memory.
//! * [`address`]: addresses that move with a tree.
//! * [`datagram`]: queues of UDP sockets, read and filled.
//! * [`message`]: looking at queued messages.
//! * [`link`]: network devices for hosts made out of namespaces.
//! * [`nft`]: the network lock: packets of chosen connections are dropped while they are taken apart.
//! * [`sock_diag`]: the sockets of a network namespace, as the kernel lists them.
//! * [`shm`]: System V shared memory.
//! * [`section`]: work that no SIGKILL to this process stops half-way.
//! * [`features`]: what this kernel can do, found out by trying.

pub mod address;
pub mod capture;
pub mod datagram;
pub mod features;
pub mod files;
pub mod link;
pub mod message;
pub mod mm;
mod netlink;
pub mod nft;
pub mod section;
pub mod shm;
pub mod sock_diag;
pub mod socket;
pub mod sys;
