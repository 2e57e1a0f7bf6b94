//! The protocol over QUIC: endpoints, connections, sessions, pages in both directions, page requests.
//!
//! ```text
//! Endpoint ── connect ──▶ Connection ── open ──▶ Session ──┬─ PageSender      (blocking, many threads)
//!          └─ accept ───▶ Incoming ── accept ──▶           ├─ receive_into    (applies in order, on its own thread)
//!                                                          └─ messages, blobs
//!                         Connection ── open_faults ─▶ FaultLink ──┬─ FaultClient  (asks)
//!                         Incoming ── accept_faults ─▶             └─ FaultServer  (answers)
//! ```
//!
//! Functions are async; those for plain threads say so (`…_blocking`, [`PageSender`]) and need no runtime around them, only
//! the [`Runtime`] that drives the endpoint. They must not be called on a thread that runs async code.

mod connection;
mod endpoint;
mod error;
mod faults;
mod link;
mod receiver;
mod runtime;
mod sender;
mod session;
mod tls;

use std::time::Duration;

pub use connection::{Connection, Incoming, SessionRequest};
pub use endpoint::Endpoint;
pub use error::{Error, RefusalCode};
pub use faults::{FaultClient, FaultLink, FaultServer, UrgentPages};
pub use receiver::{ReceiveHandle, ReceiveStats};
pub use runtime::{DirectRuntime, Runtime};
pub use sender::{PageSender, RoundStats};
pub use session::{Received, Session};
pub use tls::{Credentials, TlsFiles, Trust};

use crate::{
    identity::Fingerprint,
    proto::{Capabilities, Limits, SessionId},
};

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    /// Its key.
    pub fingerprint: Fingerprint,
    /// What it is called in the list of peers.
    pub name: Option<String>,
    /// Its address.
    pub address: std::net::SocketAddr,
}

impl std::fmt::Display for PeerInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name} ({})", self.address),
            None => write!(f, "{}", self.address),
        }
    }
}

/// How the path of a connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Bytes that may be unacknowledged at the moment; over `rtt` it is what the path is thought to carry.
    pub congestion_window: u64,
    /// UDP payload of the packets, in bytes.
    pub mtu: u16,
    /// Packets sent so far.
    pub sent_packets: u64,
    /// Packets of them that were lost.
    pub lost_packets: u64,
}

/// When batches are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Never.
    Off,
    /// Always, at this zstd level.
    Level(i32),
    /// Where it pays: see [`crate::batch::policy`].
    Adaptive,
}

/// Settings of an endpoint and of all its connections.
#[derive(Clone, Debug)]
pub struct Options {
    /// What this side holds at most for each session.
    pub limits: Limits,
    /// Optional features to offer.
    pub capabilities: Capabilities,
    /// Content of the batches this side sends, in bytes (1 to 4 MiB; less if the peer takes less).
    pub batch_bytes: usize,
    /// Threads that encode batches, per [`PageSender`]. Decoding uses as many at once.
    pub workers: usize,
    /// When batches are compressed.
    pub compression: Compression,
    /// How often a connection that is idle says that it lives.
    pub keep_alive: Duration,
    /// After how much silence the peer counts as dead.
    pub idle_timeout: Duration,
    /// How long a connection may take from its first packet until its session is asked for.
    pub handshake_timeout: Duration,
    /// How long a session with a broken connection waits to be resumed before it fails. Zero: not at all.
    pub resume_timeout: Duration,
    /// Whether the side that dialled dials again by itself when a session's connection breaks.
    pub redial: bool,
    /// Connections that may be in their handshake at once; more are refused.
    pub max_handshakes: usize,
    /// Largest UDP payload that path MTU discovery tries; on paths with less a few probes are lost. quinn hands up to ten
    /// packets to the kernel in one call, which refuses more than 64 KiB: above the default all of them would be lost,
    /// and quinn would fall back to 1200 bytes.
    pub max_udp_payload: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            capabilities: Capabilities::all(),
            batch_bytes: 1 << 20,
            workers: std::thread::available_parallelism().map_or(2, |count| count.get().clamp(1, 8)),
            compression: Compression::Adaptive,
            keep_alive: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(10),
            resume_timeout: Duration::from_secs(30),
            redial: true,
            max_handshakes: 64,
            max_udp_payload: 6500,
        }
    }
}

impl SessionId {
    /// A new id that nobody can guess.
    pub fn random() -> Self {
        let mut id = [0; 16];
        tls::provider()
            .secure_random
            .fill(&mut id)
            .expect("the system has random numbers");
        Self(id)
    }
}

/// Locks a mutex whatever happened to a thread that held it: what it guards is replaced in single steps.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
