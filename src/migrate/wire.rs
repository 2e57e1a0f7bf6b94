//! The messages of a migration, inside the application messages of a page-protocol session.
//!
//! Unknown fields are skipped by prost, so that a newer peer may say more. Everything is checked where it is used.

use prost::Message as _;
use whimbrel_images::proto::{IpcShmEntry, PstreeEntry, VmaEntry};

use crate::error::{Context, Error, Result};

/// One task of the tree in [`Begin`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskShape {
    /// Ids.
    #[prost(message, optional, tag = "1")]
    pub entry: Option<PstreeEntry>,
    /// Is it a zombie?
    #[prost(bool, tag = "2")]
    pub zombie: bool,
    /// All of its mappings.
    #[prost(message, repeated, tag = "3")]
    pub vmas: Vec<VmaEntry>,
    /// Which of them get their contents before the freeze: indices.
    #[prost(uint32, repeated, tag = "4")]
    pub staged: Vec<u32>,
    /// Flags of clone(2) for tables that it shares with its parent.
    #[prost(uint64, tag = "5")]
    pub flags: u64,
    /// Number of the pseudo terminal of the tree that controls the session that it leads.
    #[prost(uint32, optional, tag = "6")]
    pub terminal: Option<u32>,
}

/// A file that must be the same on both hosts.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NeededFile {
    /// Its path.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Its size in bytes; 0 for a directory.
    #[prost(uint64, tag = "2")]
    pub size: u64,
    /// Its GNU build id.
    #[prost(uint32, repeated, tag = "3")]
    pub build_id: Vec<u32>,
}

/// The source asks for a migration.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Begin {
    /// The tree.
    #[prost(message, repeated, tag = "1")]
    pub tasks: Vec<TaskShape>,
    /// The highest descriptor number.
    #[prost(uint32, tag = "2")]
    pub highest_descriptor: u32,
    /// Memory that will be needed, in bytes.
    #[prost(uint64, tag = "3")]
    pub memory: u64,
    /// Files that will be needed.
    #[prost(message, repeated, tag = "4")]
    pub files: Vec<NeededFile>,
    /// Local addresses of the tree's connections, as text.
    #[prost(string, repeated, tag = "5")]
    pub addresses: Vec<String>,
    /// An address that moves along: `10.0.0.2/24`, and the device it goes to.
    #[prost(string, tag = "6")]
    pub move_address: String,
    /// That device; empty to find it by the network.
    #[prost(string, tag = "7")]
    pub move_device: String,
    /// State components of the processor that the tree may use (XCR0).
    #[prost(uint64, tag = "8")]
    pub cpu_state: u64,
    /// Only look whether it would work.
    #[prost(bool, tag = "9")]
    pub dry_run: bool,
    /// Established TCP connections come along.
    #[prost(bool, tag = "10")]
    pub tcp_established: bool,
    /// The root, in the source's words, for messages.
    #[prost(string, tag = "11")]
    pub name: String,
    /// The port of the source's socket that page requests will be answered from; 0 when there will be none.
    #[prost(uint32, tag = "12")]
    pub fault_port: u32,
    /// What tells the tree's root from every other process of every host. Only one tool at a time moves it, so an earlier
    /// session for it has no tool any more. Empty: not known.
    #[prost(string, tag = "13")]
    pub tree: String,
    /// System V segments that it has attached.
    #[prost(message, repeated, tag = "14")]
    pub system_v: Vec<IpcShmEntry>,
}

/// The destination is ready, or not.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Ready {
    /// Every reason why not.
    #[prost(string, repeated, tag = "1")]
    pub blockers: Vec<String>,
}

/// Pages that did not come and are to be asked for.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LazyPages {
    /// The task.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    /// Start and end of each range, alternating.
    #[prost(uint64, repeated, tag = "2")]
    pub bounds: Vec<u64>,
}

/// Everything is there: the images came as blobs before.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Final {
    /// What is to be asked for.
    #[prost(message, repeated, tag = "1")]
    pub lazy: Vec<LazyPages>,
}

/// The tree is put together.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Prepared {
    /// How long it took, in microseconds.
    #[prost(uint64, tag = "1")]
    pub microseconds: u64,
}

/// The tree runs.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RunningThere {
    /// The root's pid in the destination's pid namespace.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    /// From Commit until it ran, in microseconds.
    #[prost(uint64, tag = "2")]
    pub microseconds: u64,
}

/// It cannot be done.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Failed {
    /// Why.
    #[prost(string, tag = "1")]
    pub reason: String,
}

/// Post-copy is over.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Finished {
    /// Faults that were served.
    #[prost(uint64, tag = "1")]
    pub faults: u64,
    /// Pages that came on demand or in the background.
    #[prost(uint64, tag = "2")]
    pub pages: u64,
    /// Median and 99th percentile of the time a fault waited, in microseconds.
    #[prost(uint64, tag = "3")]
    pub fault_p50: u64,
    /// See `fault_p50`.
    #[prost(uint64, tag = "4")]
    pub fault_p99: u64,
}

/// Packets that came to the source while the network was locked, or later.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Packets {
    /// Whole IP packets.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub packets: Vec<Vec<u8>>,
    /// No more are to come.
    #[prost(bool, tag = "2")]
    pub last: bool,
}

/// What became of a migration?
#[derive(Clone, PartialEq, prost::Message)]
pub struct Query {
    /// Its session id.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
}

/// The answer to [`Query`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Answer {
    /// The tree runs here.
    #[prost(bool, tag = "1")]
    pub running: bool,
    /// It waits for Commit here.
    #[prost(bool, tag = "2")]
    pub waiting: bool,
    /// All of its memory is here.
    #[prost(bool, tag = "3")]
    pub complete: bool,
}

/// Any message.
#[derive(Clone, PartialEq, prost::Oneof)]
#[allow(missing_docs)]
pub enum Body {
    #[prost(message, tag = "1")]
    Begin(Begin),
    #[prost(message, tag = "2")]
    Ready(Ready),
    #[prost(message, tag = "3")]
    Final(Final),
    #[prost(message, tag = "4")]
    Prepared(Prepared),
    #[prost(bool, tag = "5")]
    Commit(bool),
    #[prost(message, tag = "6")]
    Running(RunningThere),
    #[prost(message, tag = "7")]
    Failed(Failed),
    #[prost(message, tag = "8")]
    Finished(Finished),
    #[prost(message, tag = "9")]
    Query(Query),
    #[prost(message, tag = "10")]
    Answer(Answer),
    #[prost(bool, tag = "11")]
    Abort(bool),
    #[prost(message, tag = "12")]
    Packets(Packets),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Envelope {
    #[prost(oneof = "Body", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12")]
    body: Option<Body>,
}

/// The bytes of a message.
pub fn encode(body: Body) -> Vec<u8> {
    Envelope { body: Some(body) }.encode_to_vec()
}

/// Reads a message.
///
/// # Errors
/// When the bytes are no message that this version knows.
pub fn decode(bytes: &[u8]) -> Result<Body> {
    let envelope = Envelope::decode(bytes).context("read a message of the peer")?;
    let unknown = "it is of a kind that this version does not know";
    envelope
        .body
        .ok_or_else(|| Error::new("read a message of the peer").because(unknown))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire_and_damage_is_an_error() {
        let body = Body::Final(Final {
            lazy: vec![LazyPages {
                pid: 7,
                bounds: vec![0x1000, 0x3000],
            }],
        });
        let bytes = encode(body.clone());
        assert_eq!(decode(&bytes).unwrap(), body);
        for end in 0..bytes.len() {
            let _ = decode(&bytes[..end]);
        }
        assert!(decode(&[0xfa, 0x01, 0x00]).is_err(), "an unknown kind");
    }
}
