//! Taking a tree apart: the order of things, and no knowledge of any of them.
//!
//! Frozen time is what users feel, so what can be known before the freeze is collected there: mappings, the search for
//! borrowed instructions. Inside the freeze it is only compared.

pub mod collect;
pub mod memory;
pub mod runs;
pub mod track;

use std::time::{Duration, Instant};

use crate::error::{Context, Result};
use crate::tree::{Tree, TreeImage};

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

/// What becomes of the tree when it has been dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It is killed: it goes on where it is restored.
    Kill,
    /// It goes on (`--leave-running`).
    Resume,
    /// It stays, stopped by SIGSTOP (`--leave-stopped`).
    Stop,
}

/// What a dump did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// How long its parts took.
    pub times: Times,
    /// How much memory it carried.
    pub amount: memory::Amount,
}

/// Dumps the tree of `root` into an image set.
///
/// # Errors
/// When something cannot be carried or written; the tree goes on, and what was written is of no use.
pub fn to_store(
    root: i32,
    store: std::sync::Arc<dyn whimbrel_images::store::ImageStore>,
    options: &Options,
    afterwards: Afterwards,
) -> Result<Summary> {
    use whimbrel_images::sink::DirPageSink;
    let prepared = Prepared::look(root)?;
    let mut frozen = freeze(root, prepared, options)?;
    frozen.collected.check_files(&*store, options)?;
    let started = Instant::now();
    let files = frozen.collected.dump_files(&*store, options)?;
    frozen.times.files = started.elapsed();

    let started = Instant::now();
    let mut sink = DirPageSink::new(store.clone());
    let mut amount = memory::Amount::default();
    for task in &frozen.collected.memory {
        let (pages, selection) = memory::select_all(task)?;
        sink.begin(task.object).context("store memory")?;
        amount.add(memory::write(task, &pages, &selection, &mut sink)?);
    }
    frozen.collected.segments.dump(&mut sink)?;
    sink.finish().context("store memory")?;
    frozen.times.memory = started.elapsed();

    let tasks = std::mem::take(&mut frozen.collected.tasks);
    let inventory = TreeImage::new_inventory(&tasks.first().map(|task| task.ids.clone()).unwrap_or_default());
    TreeImage {
        inventory,
        tasks,
        files,
    }
    .save(&*store)?;
    let mut times = frozen.times;
    times.frozen = frozen.since.elapsed();
    match afterwards {
        Afterwards::Kill => frozen.tree.kill()?,
        Afterwards::Resume => frozen.tree.resume()?,
        Afterwards::Stop => {
            for task in frozen.tree.living() {
                crate::kernel::sys::kill(task.pid, libc::SIGSTOP).context("stop")?;
            }
            frozen.tree.resume()?;
        }
    }
    Ok(Summary { times, amount })
}
