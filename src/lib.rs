//! whimbrel moves running Linux processes between hosts.
