//! CRIU's image format: protobuf messages, magics, readers, writers, pagemaps, chains of parents and the page store.

pub mod page;
