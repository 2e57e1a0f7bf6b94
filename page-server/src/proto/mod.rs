//! The page protocol without sockets, clocks or threads: bytes and messages in, events and messages out.
//!
//! # Streams of a connection
//!
//! ```text
//! connection ─┬─ control      bidirectional, opened first by the initiator; frames of `Control`, both ways
//!             ├─ bulk         unidirectional, one per batch:  'b' batch                     (see `crate::batch`)
//!             ├─ blob         unidirectional, one per blob:   'o' item:u64le bytes…
//!             └─ fault        bidirectional, one per request: request → reply               (see `fault`)
//!
//! frame       ┌────────────┬───────────────────────────┐
//!             │ length u32 │ Control (protobuf)        │   length ≤ MAX_FRAME, little endian
//!             └────────────┴───────────────────────────┘
//! ```
//!
//! # A link: one connection from its first byte until it is open
//!
//! ```text
//!   initiator                                   acceptor
//!   AwaitHello  ── Hello ─────────────────────▶ AwaitHello
//!       │       ◀───────────────────── Hello ──     │            versions: the newest both speak, or the end
//!   Ready                                       Ready
//!       │       ── Open{role, session, have} ─▶     │
//!   AwaitAnswer                                 AwaitDecision
//!       │       ◀──────────── Opened{have} ────     │            or Refused{code, reason} and the end
//!   Open                                        Open             from here on: `session`
//! ```
//!
//! # A session: outlives its connections
//!
//! Batches and items (messages and blobs) are numbered from 1 in each direction. A sender keeps what is not acknowledged,
//! bounded by the receiver's limits, and stops when they are reached. When a connection breaks, the initiator opens the
//! session again with what it *has*, the acceptor answers with what it has, and both send again only what is missing.
//! Nothing is applied or delivered twice.

pub mod fault;
pub mod frame;
pub mod link;
pub mod session;

/// The messages of `wire.proto`.
#[allow(missing_docs)]
pub mod wire {
    include!(concat!(env!("OUT_DIR"), "/whimbrel.wire.rs"));
}

use std::fmt;

/// The version of the protocol that this crate speaks.
pub const VERSION: u32 = 1;

/// Name of the protocol in the TLS handshake.
pub const ALPN: &[u8] = b"whimbrel";

/// First byte of a unidirectional stream that carries a batch.
pub const STREAM_BATCH: u8 = b'b';

/// First byte of a unidirectional stream that carries a blob.
pub const STREAM_BLOB: u8 = b'o';

/// Names a session for both ends, across its connections.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The text is no session id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a session id has 32 hexadecimal digits")]
pub struct ParseSessionIdError;

impl std::str::FromStr for SessionId {
    type Err = ParseSessionIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = (text.len() == 32)
            .then(|| u128::from_str_radix(text, 16).ok())
            .flatten();
        digits
            .map(|number| Self(number.to_be_bytes()))
            .ok_or(ParseSessionIdError)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

/// What a connection is asked for by the side that dialled it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The initiator sends pages and blobs into the acceptor's sink.
    Push,
    /// The initiator asks for pages of the acceptor.
    Pull,
    /// Application messages, blobs and pages, in both directions.
    Migrate,
    /// A connection for the page requests of a session that exists already.
    Faults {
        /// The initiator answers the requests (the source of a migration dials both connections); else it asks.
        initiator_serves: bool,
    },
}

impl Role {
    /// Whether connections of this role carry a session (messages, blobs, batches) and not page requests.
    pub fn is_session(self) -> bool {
        matches!(self, Role::Push | Role::Migrate)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Push => "push",
            Role::Pull => "pull",
            Role::Migrate => "migrate",
            Role::Faults { .. } => "faults",
        })
    }
}

/// Optional features; one counts when both sides have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Capability {
    /// Batches and replies may be compressed with zstd.
    Zstd = 1,
    /// Batches may hold differences to the page sent before (see [`crate::batch::delta`]).
    Delta = 2,
}

impl Capability {
    const ALL: [Capability; 2] = [Capability::Zstd, Capability::Delta];
}

/// A set of [`Capability`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(u64);

impl Capabilities {
    /// Everything this crate can do.
    pub fn all() -> Self {
        Capability::ALL.into_iter().fold(Self::default(), Self::with)
    }

    /// The set with one more.
    #[must_use]
    pub fn with(self, capability: Capability) -> Self {
        Self(self.0 | 1 << capability as u32)
    }

    /// The set with one less.
    #[must_use]
    pub fn without(self, capability: Capability) -> Self {
        Self(self.0 & !(1 << capability as u32))
    }

    /// Whether it is in the set.
    pub fn has(self, capability: Capability) -> bool {
        self.0 & 1 << capability as u32 != 0
    }

    /// What is in both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    fn to_wire(self) -> Vec<u32> {
        (0..u64::BITS).filter(|bit| self.0 & 1 << bit != 0).collect()
    }

    /// Numbers past the known ones are from the future and do not count.
    fn from_wire(numbers: &[u32]) -> Self {
        Self(
            numbers
                .iter()
                .filter(|number| **number < u64::BITS)
                .fold(0, |set, number| set | 1 << number),
        )
    }
}

/// What a receiver is willing to hold for its peer. Memory at the receiver is bounded by
/// `batch_window × batch_bytes + max(item_window, blob_bytes)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Batches sent and not yet applied.
    pub batch_window: u32,
    /// Decoded bytes of one batch.
    pub batch_bytes: u32,
    /// Bytes of one blob.
    pub blob_bytes: u64,
    /// Bytes of messages and blobs sent and not yet consumed; one item may always be under way.
    pub item_window: u64,
    /// Pages (4 KiB each, at both ends) remembered for sending differences; the smaller of both sides counts, 0 is none.
    pub delta_pages: u32,
}

impl Default for Limits {
    /// 64 batches of up to 4 MiB; blobs of up to 256 MiB; 32 MiB of items; no differences.
    fn default() -> Self {
        Self {
            batch_window: 64,
            batch_bytes: 4 << 20,
            blob_bytes: 256 << 20,
            item_window: 32 << 20,
            delta_pages: 0,
        }
    }
}

impl Limits {
    fn to_wire(self) -> wire::Limits {
        wire::Limits {
            batch_window: self.batch_window,
            batch_bytes: self.batch_bytes,
            blob_bytes: self.blob_bytes,
            item_window: self.item_window,
            delta_pages: self.delta_pages,
        }
    }

    fn from_wire(limits: Option<wire::Limits>) -> Result<Self, ProtocolError> {
        let limits = limits.ok_or(ProtocolError::Missing {
            message: "Hello",
            field: "limits",
        })?;
        if limits.batch_window == 0 || (limits.batch_bytes as usize) < whimbrel_images::page::PAGE_SIZE {
            return Err(ProtocolError::Missing {
                message: "Hello",
                field: "room for one batch",
            });
        }
        Ok(Self {
            batch_window: limits.batch_window,
            batch_bytes: limits.batch_bytes,
            blob_bytes: limits.blob_bytes,
            item_window: limits.item_window,
            delta_pages: limits.delta_pages,
        })
    }
}

/// The peer broke the protocol, or speaks another one.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum ProtocolError {
    /// A frame claims to be longer than any frame may be.
    #[error("control frame of {length} bytes is over the limit of {limit}")]
    FrameTooLong {
        /// Its claimed length.
        length: usize,
        /// The largest length.
        limit: usize,
    },
    /// A frame does not parse.
    #[error("control message does not parse: {0}")]
    Malformed(prost::DecodeError),
    /// No version is spoken by both.
    #[error(
        "peer speaks versions {peer_min} to {peer_max} of the page protocol, this side speaks {VERSION}; \
         install the same release of whimbrel on both hosts"
    )]
    Version {
        /// Oldest version of the peer.
        peer_min: u32,
        /// Newest version of the peer.
        peer_max: u32,
    },
    /// A message came that has no place at this point.
    #[error("{message} message came while {state}")]
    Unexpected {
        /// The message.
        message: &'static str,
        /// What was going on.
        state: &'static str,
    },
    /// A message lacks something.
    #[error("{message} message lacks {field}")]
    Missing {
        /// The message.
        message: &'static str,
        /// What it lacks.
        field: &'static str,
    },
    /// A number does not follow from what was sent before.
    #[error("{what} {number} is out of order: {expected}")]
    OutOfOrder {
        /// What is numbered.
        what: &'static str,
        /// The number that came.
        number: u64,
        /// What would have been right.
        expected: String,
    },
    /// The peer sends more than it was told it may.
    #[error("{what} of {size} is over the limit of {limit} that was agreed on")]
    OverLimit {
        /// What is too large.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// The bytes of a blob are not the ones announced.
    #[error("blob {name} arrived damaged")]
    DamagedBlob {
        /// Its name.
        name: String,
    },
    /// A page request or its reply does not parse.
    #[error("page {what} is malformed: {why}")]
    Fault {
        /// Request or reply.
        what: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
}
