//! whimbrel moves running Linux processes between hosts.

pub mod kernel;
