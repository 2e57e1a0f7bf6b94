//! Live migration: two hosts, one copy.
//!
//! ```text
//!  source                                   destination
//!  Begin (shape of the tree) ─────────────▶ preflight; tasks as stopped seeds, their memory mapped
//!                            ◀───────────── Ready (or every reason why not)
//!  round 1..n: pages ═════════════════════▶ straight into the memory of the seeds
//!  freeze, lock the network
//!  last pages, images, Final ─────────────▶ everything else is put together
//!                            ◀───────────── Prepared
//!  decision on disk, Commit ──────────────▶ the tree runs
//!                            ◀───────────── Running
//!  (post-copy: the missing pages are asked for on a second connection)
//!  the frozen tree is killed ◀───────────── Finished
//! ```
//!
//! Before Commit any failure lets the source go on and removes what the destination made. After it the source stays
//! frozen until the destination has said that the tree runs, or that it never will.

pub mod arrivals;
pub mod destination;
pub mod follow;
pub mod journal;
pub mod policy;
pub mod protocol;
pub mod report;
pub mod server;
pub mod source;
mod standby;
pub mod wire;

use std::fmt;

/// The phases of a migration, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Nothing is frozen; both sides look whether it can work.
    Preflight,
    /// A pre-copy round.
    Round(u32),
    /// The tree is stopped.
    Freeze,
    /// The last pages and everything else are sent.
    Final,
    /// The destination has put the tree together.
    Prepared,
    /// The decision is made and told.
    Commit,
    /// The tree runs there; missing pages follow.
    PostCopy,
    /// One copy, there.
    Done,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Phase::Preflight => f.write_str("preflight"),
            Phase::Round(number) => write!(f, "round {number}"),
            Phase::Freeze => f.write_str("freeze"),
            Phase::Final => f.write_str("final"),
            Phase::Prepared => f.write_str("prepared"),
            Phase::Commit => f.write_str("commit"),
            Phase::PostCopy => f.write_str("post-copy"),
            Phase::Done => f.write_str("done"),
        }
    }
}

/// How memory travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// All of it before the tree runs there.
    PreCopy,
    /// All of it afterwards, on demand.
    PostCopy,
    /// Rounds first; what they did not deliver follows on demand if the downtime would otherwise be too long.
    Hybrid,
}
