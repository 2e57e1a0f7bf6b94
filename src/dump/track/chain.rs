//! Dumps that follow one another: what the next one needs to know, and what it needs not read again.
//!
//! A dump that another is to follow clears the soft-dirty bits of each task and leaves a [`Tag`], which is kept with the
//! pagemap. The next one stores what was written since, if the tag is still there: then the bits are those of that very
//! dump. In every other case (no soft-dirty bits in this kernel, another tool or another chain in between, a dump that
//! failed half-way, a pid that is another task's now) it is up to the sink to compare contents.

use std::collections::HashMap;

use whimbrel_images::page::MemoryObject;
use whimbrel_images::proto::TrackEntry;

use super::{SoftDirty, Tag};
use crate::dump::collect::TaskMemory;
use crate::dump::memory::{self, Selection};
use crate::dump::runs::RunSet;
use crate::error::{Context, Error, Result};
use crate::kernel::features::Feature;
use crate::procfs;
use crate::resource::mem::pages::Pages;

/// A dump's place between the one before it and the one after it.
#[derive(Default)]
pub struct Chain {
    /// What the dump before has left, by object.
    pub before: HashMap<MemoryObject, Before>,
    /// Whether another dump is to follow.
    pub track: bool,
    /// What this dump leaves for it.
    pub left: Vec<(MemoryObject, TrackEntry)>,
    /// Tasks whose changes the kernel told, and those that have to be compared.
    pub told: (usize, usize),
}

/// What a dump has left of one task.
#[derive(Clone, Debug)]
pub struct Before {
    /// Its mark.
    pub track: TrackEntry,
    /// The pages that it has; `None` when only the other end knows, and will refuse what it has not.
    pub known: Option<RunSet>,
}

impl Chain {
    /// A chain that can use the kernel's bits, as far as there are any.
    pub fn new(before: HashMap<MemoryObject, Before>, track: bool) -> Chain {
        let mut chain = Chain {
            before,
            track,
            ..Chain::default()
        };
        if (chain.track || !chain.before.is_empty())
            && let Err(missing) = Feature::SoftDirty.try_now()
        {
            tracing::info!("No soft-dirty bits ({missing}): changed memory is found by comparing contents");
            (chain.before, chain.track) = (HashMap::new(), false);
        }
        chain
    }

    /// Selects what is stored of each task, all of which are held.
    ///
    /// # Errors
    /// When a page table cannot be read.
    pub fn select(&mut self, tasks: &[TaskMemory]) -> Result<Vec<Selection>> {
        tasks.iter().map(|task| self.select_task(task)).collect()
    }

    fn select_task(&mut self, task: &TaskMemory) -> Result<Selection> {
        let before = self.before.get(&task.object);
        if before.is_none() && !self.track {
            return memory::select_all(task);
        }
        let start_time = start_time(task.pid)?;
        let before = before.filter(|before| before.track.start_time == start_time);
        let mut tracker = match before {
            Some(before) => SoftDirty::go_on(task.pid, to_tag(&before.track))?,
            None => SoftDirty::attach(task.pid)?,
        };
        let trusted = before.is_some() && tracker.is_trusted()?;
        let look = tracker.look_at_held(self.track)?;
        // What was looked at is known; only the rest is asked for.
        let ranges = RunSet::from_ranges(task.ranges.clone());
        let pages = Pages::open(task.pid)?;
        let rest = memory::own_pages(task, &pages, ranges.subtract(&look.watched).ranges())?;
        let own = ranges.intersect(&look.watched).subtract(&look.gone);
        let own = own.union(&rest);
        if before.is_some() {
            match trusted {
                true => self.told.0 += 1,
                false => self.told.1 += 1,
            }
        }
        let mut same = RunSet::default();
        if let (Some(before), true) = (before, trusted) {
            same = own.intersect(&look.watched).subtract(&look.dirty);
            if let Some(known) = &before.known {
                same = same.intersect(known);
            }
        }
        if let Some(tag) = tracker.tag().filter(|_| self.track) {
            let entry = TrackEntry {
                start_time,
                marked: tag.marked.clone(),
                clear: tag.clear.clone(),
            };
            self.left.push((task.object, entry));
        }
        Ok(Selection {
            store: own.subtract(&same).runs(),
            parent: same.runs(),
        })
    }

    /// Says in the log how changes were found.
    pub fn report(&self) {
        let (told, compared) = self.told;
        if told + compared > 0 {
            tracing::info!("Changed memory: soft-dirty bits told it for {told} tasks, {compared} are compared");
        }
    }
}

fn to_tag(track: &TrackEntry) -> Tag {
    Tag {
        marked: track.marked.clone(),
        clear: track.clear.clone(),
    }
}

fn start_time(pid: i32) -> Result<u64> {
    let stat = procfs::stat::parse(&procfs::read(pid, "stat")?);
    stat.map(|stat| stat.starttime)
        .with(|| Error::new("read the start time").task(pid))
}
