//! What goes wrong between two hosts.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc};

pub use crate::proto::wire::RefusalCode;
use crate::{
    batch::BatchError,
    identity::Fingerprint,
    proto::{ProtocolError, Role, SessionId},
};

/// A connection, a session or a request failed. Errors of a session are sticky: every later call gives the same one.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The peer is not in this host's list.
    #[error(
        "host at {address} is not trusted here; if {fingerprint} is its fingerprint (`whimbrel id` prints it there), \
         run `whimbrel trust {fingerprint} NAME` on this host"
    )]
    UnknownPeer {
        /// Its address.
        address: SocketAddr,
        /// Its key.
        fingerprint: Fingerprint,
    },
    /// The peer does not have this host in its list.
    #[error("host at {address} does not trust this one; run `whimbrel trust {fingerprint} NAME` there")]
    RefusedByPeer {
        /// Its address.
        address: SocketAddr,
        /// The key of this host.
        fingerprint: Fingerprint,
    },
    /// The list of peers or a file of the TLS options cannot be used.
    #[error("{what} {} cannot be used: {why}", path.display())]
    Credentials {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// TLS cannot be set up.
    #[error("encryption cannot be set up")]
    Tls(#[from] rustls::Error),
    /// The socket cannot be opened.
    #[error("cannot open a UDP socket at {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// No connection can be started.
    #[error("cannot connect to {address}")]
    Connect {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: quinn::ConnectError,
    },
    /// A connection broke or never came to be.
    #[error("connection with {address} is lost")]
    Connection {
        /// Address of the peer.
        address: SocketAddr,
        /// Why.
        source: quinn::ConnectionError,
    },
    /// The peer took too long to say what it wants.
    #[error("host at {address} did not finish its handshake in time")]
    HandshakeTimeout {
        /// Its address.
        address: SocketAddr,
    },
    /// The endpoint was closed.
    #[error("endpoint is closed")]
    EndpointClosed,
    /// The peer refuses the session.
    #[error("host at {address} refuses the {role} session: {reason}")]
    Refused {
        /// Its address.
        address: SocketAddr,
        /// What was asked for.
        role: Role,
        /// Why, for programs.
        code: RefusalCode,
        /// Why, for people.
        reason: String,
    },
    /// A session was accepted or opened as what it is not.
    #[error("{role} connection cannot be used as {used_as}")]
    WrongRole {
        /// What it is.
        role: Role,
        /// What it was to be.
        used_as: &'static str,
    },
    /// The peer broke the protocol.
    #[error("protocol error with {address}")]
    Protocol {
        /// Address of the peer.
        address: SocketAddr,
        /// How.
        source: ProtocolError,
    },
    /// A batch is damaged.
    #[error("pages from {address} are damaged")]
    Batch {
        /// Address of the peer.
        address: SocketAddr,
        /// How.
        source: BatchError,
    },
    /// What is to be sent can never be taken by the peer.
    #[error("cannot be sent")]
    Unsendable(#[source] ProtocolError),
    /// The connection of a session broke and was not resumed in time.
    #[error("session {session} is lost: its connection was not resumed in time")]
    SessionLost {
        /// The session.
        session: SessionId,
        /// What happened to the connection.
        source: Box<Error>,
    },
    /// The peer gave the session up.
    #[error("peer gave up: {reason}")]
    PeerFailed {
        /// What it said.
        reason: String,
    },
    /// This side gave the session up.
    #[error("session was given up here: {reason}")]
    GivenUp {
        /// Why.
        reason: String,
    },
    /// The peer closed the session before everything was done.
    #[error("peer closed session {session} before it was complete")]
    ClosedByPeer {
        /// The session.
        session: SessionId,
    },
    /// The session was closed here.
    #[error("session is closed")]
    Closed,
    /// Pages could not be stored here.
    #[error("received pages cannot be stored")]
    Sink(#[source] Arc<io::Error>),
    /// The peer cannot read the pages that were asked for.
    #[error("peer cannot give {pages} pages at {start:#x}: {reason}")]
    PagesRefused {
        /// First address.
        start: u64,
        /// Number of pages.
        pages: u64,
        /// What the peer said.
        reason: String,
    },
    /// A page request is empty, unaligned or too large.
    #[error("{pages} pages at {start:#x} cannot be asked for: a request is aligned and has 1 to 1024 pages")]
    BadRequest {
        /// First address.
        start: u64,
        /// Number of pages.
        pages: u64,
    },
    /// The caller cancelled.
    #[error("request was cancelled")]
    Cancelled,
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Connection { .. } | Error::SessionLost { .. } | Error::ClosedByPeer { .. } => {
                io::ErrorKind::ConnectionAborted
            }
            Error::UnknownPeer { .. } | Error::RefusedByPeer { .. } => io::ErrorKind::PermissionDenied,
            Error::HandshakeTimeout { .. } => io::ErrorKind::TimedOut,
            Error::Protocol { .. } | Error::Batch { .. } => io::ErrorKind::InvalidData,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}
