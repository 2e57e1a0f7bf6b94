//! CRIU's image format: protobuf messages, magics, readers, writers, pagemaps, chains of parents and the page store.
//!
//! An image set is a directory, or anything else that is an [`store::ImageStore`]. Most files are made of entries
//! ([`entry`]); which messages a file holds and with what magic it starts is in [`magic`]. Memory is apart: a pagemap
//! for each address space and a file with the bare pages ([`pagemap`]), written by [`sink::DirPageSink`] and read by
//! [`chain::PageStore`], which also follows a chain of incremental dumps.

pub mod chain;
pub mod dedup;
pub mod entry;
pub mod error;
mod interval;
pub mod magic;
pub mod page;
pub mod pagemap;
mod reorder;
pub mod sink;
pub mod store;

/// The messages of the images, generated from `proto/*.proto`.
#[allow(missing_docs, clippy::all, rustdoc::all)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/images.rs"));
}

pub use error::{ImageError, ImageErrorKind};
