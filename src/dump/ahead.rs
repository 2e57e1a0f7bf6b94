//! Memory that is stored before the freeze: the tree is held for what it wrote meanwhile, not for all it has.
//!
//! Each task is watched by a tracker. In rounds, what it wrote since the round before is stored again, in place; the
//! freeze stores the rest. What no tracker watches is stored in the freeze. When this is dropped, nobody watches any more.

use whimbrel_images::page::{MemoryObject, PageSink};

use super::collect::{Prepared, TaskMemory};
use super::memory::{self, Amount};
use super::runs::RunSet;
use super::track::{self, Look, Tracker};
use crate::error::{Context, Result};
use crate::procfs::{self, maps};
use crate::remote::inject::GadgetCache;
use crate::resource::mem::pages::Pages;

/// Below so many bytes a tree is stored in the freeze: to be watched, each task is stopped for a moment, too.
const LEAST: u64 = 64 << 20;
/// A round with no more pages than this is the last.
const FEW: u64 = 1024;
/// Most rounds.
const ROUNDS: u32 = 5;

/// What of a tree was stored ahead.
pub struct Ahead(Vec<TaskAhead>);

struct TaskAhead {
    pid: i32,
    object: MemoryObject,
    tracker: Box<dyn Tracker>,
    /// Pages that are stored as they were at the last look.
    stored: RunSet,
}

impl Ahead {
    /// Watches the tree that was looked at; for that each task is stopped for a moment. `None` when it does not pay, or
    /// nothing can be watched here.
    pub fn watch(prepared: &Prepared) -> Option<Ahead> {
        let resident = |maps: &[maps::Mapping]| {
            let watched = maps.iter().filter(|map| track::is_watched(map));
            watched.map(|map| map.rss).sum::<u64>()
        };
        if prepared.tasks().map(|(_, maps)| resident(maps)).sum::<u64>() < LEAST {
            return None;
        }
        let (mut cache, mut tasks) = (GadgetCache::default(), Vec::new());
        for (pid, _) in prepared.tasks() {
            match TaskAhead::start(pid, &mut cache) {
                Ok(task) => tasks.push(task),
                // It is stored in the freeze then: slower, not wrong.
                Err(error) => tracing::info!("memory is not watched: {}", error.chain()),
            }
        }
        (!tasks.is_empty()).then_some(Ahead(tasks))
    }

    /// Stores memory in rounds, while the tree runs.
    ///
    /// # Errors
    /// When the sink does not take it, or `go_on` says so.
    pub fn store(&mut self, sink: &mut dyn PageSink, go_on: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut before = u64::MAX;
        for round in 1..=ROUNDS {
            let mut pages = 0;
            for task in &mut self.0 {
                pages += task.round(sink, go_on)?;
            }
            tracing::info!("round {round}: {pages} pages stored while the tree runs");
            if pages <= FEW || pages > before / 2 {
                break;
            }
            before = pages;
        }
        Ok(())
    }

    /// Stores what a frozen task wrote since the last round, and forgets what it gave back.
    ///
    /// # Errors
    /// When memory cannot be read, or the sink does not take it.
    pub(super) fn finish(&mut self, task: &TaskMemory, sink: &mut dyn PageSink) -> Result<Amount> {
        let mut selection = match self.0.iter_mut().find(|ahead| ahead.pid == task.pid) {
            Some(ahead) => {
                let needed = ahead.last(task, sink)?;
                memory::Selection::of(&needed)
            }
            None => memory::select_all(task)?,
        };
        selection.parent.clear();
        let amount = memory::write(task, &selection, sink)?;
        let stored = self.0.iter().find(|ahead| ahead.pid == task.pid);
        let pages = stored.map_or(amount.pages_written, |ahead| ahead.stored.pages());
        Ok(Amount {
            pages_scanned: pages,
            pages_written: pages,
            ..amount
        })
    }
}

impl TaskAhead {
    fn start(pid: i32, cache: &mut GadgetCache) -> Result<TaskAhead> {
        let status = procfs::status::parse(&procfs::read(pid, "status")?)?;
        let inner = status.ns_pid.last().copied().unwrap_or(pid);
        Ok(TaskAhead {
            pid,
            object: MemoryObject::Task(inner as u32),
            tracker: track::start(pid, cache)?,
            stored: RunSet::default(),
        })
    }

    fn look(&mut self) -> Result<Look> {
        let maps = maps::parse(&procfs::read(self.pid, "maps")?)?;
        self.tracker.look(&maps)
    }

    /// Pages that are stored, and read as zeros now or are mapped no more.
    fn vanished(&self, look: &Look) -> RunSet {
        let unmapped = self.stored.subtract(&look.watched);
        self.stored.intersect(&look.gone).union(&unmapped)
    }

    fn round(&mut self, sink: &mut dyn PageSink, go_on: &dyn Fn() -> Result<()>) -> Result<u64> {
        let Ok(look) = self.look() else {
            // It has ended; the freeze will see what became of the tree.
            return Ok(0);
        };
        let gone = self.vanished(&look);
        forget(self.object, &gone, sink)?;
        memory::write_running(self.pid, self.object, &look.dirty, sink, go_on)?;
        self.stored = self.stored.subtract(&gone).union(&look.dirty);
        Ok(look.dirty.pages())
    }

    /// What is to be stored now that the task stands still.
    fn last(&mut self, task: &TaskMemory, sink: &mut dyn PageSink) -> Result<RunSet> {
        let maps = maps::parse(&procfs::read(self.pid, "maps")?)?;
        let look = self.tracker.last_look(&maps)?;
        let pages = Pages::open(self.pid)?;
        let ranges = RunSet::from_ranges(task.ranges.clone());
        let gone = self.vanished(&look).union(&self.stored.subtract(&ranges));
        forget(self.object, &gone, sink)?;
        let own = memory::own_pages(task, &pages, ranges.subtract(&look.watched).ranges())?;
        let needed = look.dirty.intersect(&ranges).union(&own);
        self.stored = self.stored.subtract(&gone).union(&needed);
        Ok(needed)
    }
}

fn forget(object: MemoryObject, gone: &RunSet, sink: &mut dyn PageSink) -> Result<()> {
    let mut runs = gone.runs().into_iter();
    runs.try_for_each(|run| sink.zero_pages(object, run))
        .context("store memory")
}
