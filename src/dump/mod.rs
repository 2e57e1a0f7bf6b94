//! Taking a tree apart: the order of things, and no knowledge of any of them.
//!
//! Frozen time is what users feel, so what can be known before the freeze is collected there: mappings, the search for
//! borrowed instructions. Inside the freeze it is only compared.

pub mod ahead;
pub mod collect;
pub mod lazy;
pub mod memory;
pub mod runs;
pub mod track;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use whimbrel_images::page::{MemoryObject, PageSink};
use whimbrel_images::proto::FileEntry;
use whimbrel_images::store::ImageStore;

use crate::error::{Context, Error, Result};
use crate::tree::{Tree, TreeImage};

pub use collect::{Collected, Prepared};
pub use track::chain::Chain;

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
    /// Connections that a listener has not accepted yet may be lost (`--skip-in-flight`).
    pub skip_in_flight: bool,
    /// Established TCP connections are dumped as closed ones (`--tcp-close`).
    pub tcp_close: bool,
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
            skip_in_flight: false,
            tcp_close: false,
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

/// Refuses what can never be dumped: the tree that this process is in itself, for it would wait for itself.
///
/// # Errors
/// With the reason.
pub fn check_root(root: i32) -> Result<()> {
    let mut pid = std::process::id() as i32;
    while pid > 0 {
        if pid == root {
            return Err(Error::new("dump")
                .task(root)
                .because("this command runs inside of that tree, and would wait for itself")
                .hint("start it from another session"));
        }
        let stat = crate::procfs::read(pid, "stat").and_then(|text| crate::procfs::stat::parse(&text));
        pid = stat.map_or(0, |stat| stat.ppid);
    }
    Ok(())
}

impl FrozenTree {
    /// Asks for every file whether it can be carried, before anything is changed.
    ///
    /// # Errors
    /// All reasons why not.
    pub fn check(&self, store: &dyn ImageStore, options: &Options) -> Result<()> {
        self.collected.check_files(store, options)
    }

    /// Describes all files. Some write images of their own.
    ///
    /// # Errors
    /// When one cannot be described.
    pub fn files(&mut self, store: &dyn ImageStore, options: &Options) -> Result<BTreeMap<u32, FileEntry>> {
        let started = Instant::now();
        let files = self.collected.dump_files(store, options)?;
        self.times.files = started.elapsed();
        Ok(files)
    }

    /// Selects what is stored of each task's memory.
    ///
    /// # Errors
    /// When a page table cannot be read.
    pub fn select(&self, chain: &mut Chain) -> Result<Vec<memory::Selection>> {
        chain.select(&self.collected.memory)
    }

    /// Gives all memory to `sink`.
    ///
    /// # Errors
    /// When memory cannot be read, or the sink does not take it.
    pub fn memory(&mut self, sink: &mut dyn PageSink) -> Result<memory::Amount> {
        let all = self.select(&mut Chain::default())?;
        self.memory_but(all, &[], sink)
    }

    /// Gives what was selected to `sink` but the pages of `later`, by task as images call it.
    ///
    /// # Errors
    /// As [`FrozenTree::memory`].
    pub fn memory_but(
        &mut self,
        selections: Vec<memory::Selection>,
        later: &[(u32, runs::RunSet)],
        sink: &mut dyn PageSink,
    ) -> Result<memory::Amount> {
        let started = Instant::now();
        let mut amount = memory::Amount::default();
        for (task, mut selection) in self.collected.memory.iter().zip(selections) {
            if let Some((_, later)) = later.iter().find(|(pid, _)| MemoryObject::Task(*pid) == task.object) {
                selection.store = runs::RunSet::from_runs(&selection.store).subtract(later).runs();
            }
            amount.add(memory::write(task, &selection, sink)?);
        }
        self.collected.segments.dump(sink)?;
        self.times.memory = started.elapsed();
        Ok(amount)
    }

    /// Gives that memory to `sink` that was not stored ahead of the freeze, or was written since.
    ///
    /// # Errors
    /// As [`FrozenTree::memory`].
    pub fn memory_after(&mut self, ahead: &mut ahead::Ahead, sink: &mut dyn PageSink) -> Result<memory::Amount> {
        let started = Instant::now();
        let mut amount = memory::Amount::default();
        for task in &self.collected.memory {
            amount.add(ahead.finish(task, sink)?);
        }
        self.collected.segments.dump(sink)?;
        self.times.memory = started.elapsed();
        Ok(amount)
    }

    /// Lets the tree go on, and gives what was selected of its memory to `sink` as it is then: for a dump that another
    /// follows. The tree is held no longer than it takes to learn which pages there are.
    ///
    /// # Errors
    /// As [`FrozenTree::memory`]; the tree goes on in any case.
    pub fn memory_running(
        self,
        selections: Vec<memory::Selection>,
        sink: &mut dyn PageSink,
    ) -> Result<(memory::Amount, Times)> {
        let FrozenTree {
            tree,
            collected,
            mut times,
            since,
        } = self;
        tree.resume()?;
        times.frozen = since.elapsed();
        let started = Instant::now();
        let mut amount = memory::Amount::default();
        for (task, selection) in collected.memory.iter().zip(selections) {
            let set = runs::RunSet::from_runs(&selection.store);
            if !std::path::Path::new(&format!("/proc/{}", task.pid)).exists() {
                // It has ended since; the dump that follows will see that.
                continue;
            }
            let same = memory::say_parent(task, &selection, sink)?;
            memory::write_running(task.pid, task.object, &set, sink, &|| Ok(()))?;
            amount.add(memory::Amount {
                pages_scanned: set.pages() + same,
                pages_written: set.pages(),
                pages_in_parent: same,
                pages_lazy: 0,
            });
        }
        collected.segments.dump(sink)?;
        times.memory = started.elapsed();
        Ok((amount, times))
    }

    /// Writes the images of the tasks, and the inventory last. `run_id` names this dump, where somebody needs that.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub fn describe(
        &mut self,
        store: &dyn ImageStore,
        files: BTreeMap<u32, FileEntry>,
        run_id: Option<String>,
    ) -> Result<()> {
        let tasks = std::mem::take(&mut self.collected.tasks);
        let mut inventory = TreeImage::new_inventory(&tasks.first().map(|task| task.ids).unwrap_or_default());
        inventory.dump_criu_run_id = run_id;
        TreeImage {
            inventory,
            tasks,
            files,
            seccomp: self.collected.take_filters(),
        }
        .save(store)
    }

    /// Ends the freeze, and says how long it was. A tree that is killed closes its connections without a word: they go on
    /// where it is restored.
    ///
    /// # Errors
    /// When a task cannot be killed, stopped or resumed.
    pub fn end(self, afterwards: Afterwards) -> Result<Times> {
        let mut times = self.times;
        times.frozen = self.since.elapsed();
        match afterwards {
            Afterwards::Kill => {
                self.collected.abandon_files()?;
                self.tree.kill_swiftly()?;
            }
            Afterwards::Resume => self.tree.resume()?,
            Afterwards::Stop => {
                for task in self.tree.living() {
                    crate::kernel::sys::kill(task.pid, libc::SIGSTOP).context("stop")?;
                }
                self.tree.resume()?;
            }
        }
        Ok(times)
    }
}

/// Dumps the tree of `root` into an image set.
///
/// # Errors
/// When something cannot be carried or written; the tree goes on, and what was written is of no use.
pub fn to_store(
    root: i32,
    store: std::sync::Arc<dyn ImageStore>,
    options: &Options,
    afterwards: Afterwards,
) -> Result<Summary> {
    use whimbrel_images::sink::DirPageSink;
    let prepared = Prepared::look(root)?;
    let mut frozen = freeze(root, prepared, options)?;
    frozen.check(&*store, options)?;
    let files = frozen.files(&*store, options)?;
    let mut sink = DirPageSink::new(store.clone());
    for task in &frozen.collected.memory {
        sink.begin(task.object).context("store memory")?;
    }
    let amount = frozen.memory(&mut sink)?;
    sink.finish().context("store memory")?;
    frozen.describe(&*store, files, None)?;
    let times = frozen.end(afterwards)?;
    Ok(Summary { times, amount })
}
