//! whimbrel moves running Linux processes between hosts.

pub mod arch;
pub mod error;
pub mod kernel;
pub mod procfs;
pub mod remote;
pub mod stub;
