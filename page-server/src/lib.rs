//! Page protocol over QUIC: moves pages, blobs and messages between two hosts, and answers requests for pages.
//!
//! - [`proto`] is the protocol without I/O; [`batch`] is how pages are packed.
//! - [`identity`] and [`peers`] say who a host is and whom it trusts.
//! - [`transport`] drives the protocol with QUIC: [`transport::Endpoint`] is where everything starts.
//! - [`server`] is a page server that is ready to run.
//!
//! Nothing here knows where pages come from or go to: that is said through
//! [`PageSource`](whimbrel_images::page::PageSource) and [`PageSink`](whimbrel_images::page::PageSink).

pub mod batch;
pub mod identity;
pub mod peers;
pub mod proto;
pub mod server;
pub mod transport;
