//! Taking a tree apart: the order of things, and no knowledge of any of them.
//!
//! Frozen time is what users feel, so what can be known before the freeze is collected there: mappings, the search for
//! borrowed instructions. Inside the freeze it is only compared.

pub mod collect;
pub mod memory;

use std::time::{Duration, Instant};

use crate::error::Result;
use crate::tree::Tree;

pub use collect::{Collected, Prepared};

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Sessions and process groups may lie outside of the tree (`--shell-job`).
    pub shell_job: bool,
    /// Established TCP connections are carried (`--tcp-established`).
    pub tcp_established: bool,
    /// File locks are carried (`--file-locks`).
    pub file_locks: bool,
    /// Unix sockets may have peers outside of the tree (`--ext-unix-sk`).
    pub ext_unix_sk: bool,
    /// Largest deleted file that is carried along, in bytes (`--ghost-limit`).
    pub ghost_limit: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            shell_job: false,
            tcp_established: false,
            file_locks: false,
            ext_unix_sk: false,
            ghost_limit: 1 << 20,
        }
    }
}

/// How long the parts of a dump took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// From the first seize to a stable tree.
    pub freezing: Duration,
    /// Programs and descriptors of all tasks.
    pub collecting: Duration,
    /// Files and sockets.
    pub files: Duration,
    /// Reading and writing memory.
    pub memory: Duration,
    /// From the first stop until the tree went on or was killed.
    pub frozen: Duration,
}

/// A frozen tree of which everything but the memory is known.
pub struct FrozenTree {
    /// The tree, held.
    pub tree: Tree,
    /// What was collected.
    pub collected: Collected,
    /// Times so far.
    pub times: Times,
    /// When the freeze began.
    pub since: Instant,
}

/// Freezes the tree of `root` and collects everything but files and memory.
///
/// # Errors
/// When something cannot be carried, named; the tree goes on as if nothing had been.
pub fn freeze(root: i32, prepared: Prepared, options: &Options) -> Result<FrozenTree> {
    let since = Instant::now();
    let mut tree = Tree::freeze(root)?;
    let freezing = since.elapsed();
    let collected = collect::collect(&mut tree, prepared, options)?;
    let times = Times {
        freezing,
        collecting: since.elapsed() - freezing,
        ..Times::default()
    };
    Ok(FrozenTree {
        tree,
        collected,
        times,
        since,
    })
}
