//! whimbrel moves running Linux processes between hosts.

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
