//! whimbrel moves running Linux processes between hosts.
//!
//! Everything is decided in one ordinary process, the controller. Tasks are driven from outside by ptrace; what they must
//! do themselves is a *program*, a list of system calls that a tiny stub inside of them executes. The stub knows system
//! calls and nothing else; each kind of kernel object is one file in [`resource`] that holds its dump and its restore.
//!
//! | module | what it is for |
//! |---|---|
//! | [`migrate`] | two hosts, one copy: phases, rounds, commit, post-copy |
//! | [`dump`] | taking a tree apart: the order, and watching which memory is written |
//! | [`restore`] | putting a tree together: the order |
//! | [`resource`] | all kinds of kernel objects, and the one table of them |
//! | [`tree`] | tasks and threads: frozen, and in images |
//! | [`remote`] | stopped threads, their memory, programs, the stub's life in a process |
//! | [`stub`] | the memory layout that the code inside of a task works on |
//! | [`arch`] | all that depends on the processor |
//! | [`procfs`] | one pure parser per file of /proc |
//! | [`kernel`] | typed system calls, netlink, what the kernel can do |
//! | [`error`] | the error |
//!
//! Image files are the crate `whimbrel-images`, the page protocol over QUIC `whimbrel-page-server`, page faults
//! `whimbrel-lazy`. Neither of them knows this crate.
//!
//! Three promises shape the code:
//!
//! - The victim survives the tool. Whatever is changed in a living process is undone by a guard, and if the tool is killed,
//!   by the process itself (see [`remote::inject`]).
//! - There is exactly one running copy, whatever dies and whenever (see [`migrate`]).
//! - What cannot be carried is refused, by name, before anything is changed.

pub mod arch;
pub mod dump;
pub mod error;
pub mod kernel;
pub mod migrate;
pub mod procfs;
pub mod remote;
pub mod resource;
pub mod restore;
pub mod stub;
pub mod tree;
