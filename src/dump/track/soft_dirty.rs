//! Tracking by soft-dirty bits: the kernel sets one at the first write to a page; all of a process are cleared together.
//!
//! proc_pid_clear_refs(5): writing 4 clears the bits of all pages. Between reading them and that, the process must not
//! write: what it wrote there would never be seen. So each look stops it for that time, which is short, and everything
//! else is done before and after.

use std::time::Instant;

use super::{Look, Tag, Tracker, is_watched};
use crate::dump::runs::RunSet;
use crate::error::{Context, Error, Result};
use crate::procfs::{self, maps::Mapping};
use crate::resource::mem::pages::Pages;
use crate::tree::Tree;

/// Mappings from this size on are asked whether they hold anything before their page table is read entry by entry.
const LARGE: u64 = 1 << 30;

/// Watches one process through its soft-dirty bits.
pub struct SoftDirty {
    pid: i32,
    pages: Pages,
    trust: Trust,
}

/// What clear bits are worth.
enum Trust {
    /// Nothing: they have not been cleared by us, or it was not finished.
    Nothing,
    /// They tell the truth if this tag is still there.
    Tagged(Tag),
    /// They tell the truth if nobody else has cleared them: the program has no pages for a tag. Good for as long as we watch.
    Untagged,
}

impl SoftDirty {
    /// Watches `pid` from the first look on.
    ///
    /// # Errors
    /// When its page table cannot be read.
    pub fn attach(pid: i32) -> Result<SoftDirty> {
        Ok(SoftDirty {
            pid,
            pages: Pages::open(pid)?,
            trust: Trust::Nothing,
        })
    }

    /// Goes on from a look of an earlier run, which left this tag.
    ///
    /// # Errors
    /// As [`SoftDirty::attach`].
    pub fn go_on(pid: i32, tag: Tag) -> Result<SoftDirty> {
        let trust = Trust::Tagged(tag);
        Ok(SoftDirty {
            trust,
            ..SoftDirty::attach(pid)?
        })
    }

    /// The tag that the last look left, if a later run can rely on it.
    pub fn tag(&self) -> Option<&Tag> {
        match &self.trust {
            Trust::Tagged(tag) if tag.is_distinctive() => Some(tag),
            _ => None,
        }
    }

    /// Do clear bits tell the truth? Asked of a process that the caller holds.
    ///
    /// # Errors
    /// When its page table cannot be read.
    pub fn is_trusted(&self) -> Result<bool> {
        match &self.trust {
            Trust::Nothing => Ok(false),
            Trust::Untagged => Ok(true),
            Trust::Tagged(tag) => tag.is_there(&self.pages),
        }
    }

    /// Finds what was written in a process that the caller holds; with `start_anew`, clears the bits.
    ///
    /// # Errors
    /// When the process is gone. After a failure everything counts as written.
    pub fn look_at_held(&mut self, start_anew: bool) -> Result<Look> {
        let maps = self.mappings()?;
        let trusted = self.is_trusted()?;
        if let (Trust::Tagged(_), false) = (&self.trust, trusted) {
            tracing::info!("task {}: somebody else has cleared its soft-dirty bits since", self.pid);
        }
        let (mut own, mut dirty, mut watched) = (Vec::new(), Vec::new(), Vec::new());
        for map in maps.iter().filter(|map| is_watched(map)) {
            if !is_empty(map) {
                self.pages.own_and_dirty(map.start, map.end, &mut own, &mut dirty)?;
            }
            watched.push((map.start, map.end));
        }
        let own = RunSet::from_runs(&own);
        if start_anew {
            self.clear(&maps, &own)?;
        }
        let dirty = if trusted {
            RunSet::from_runs(&dirty)
        } else {
            own.clone()
        };
        let watched = RunSet::from_ranges(watched);
        let gone = watched.subtract(&own);
        Ok(Look { dirty, gone, watched })
    }

    fn clear(&mut self, maps: &[Mapping], own: &RunSet) -> Result<()> {
        let tag = Tag::draw(maps, own, &self.pages)?;
        self.trust = Trust::Nothing;
        std::fs::write(format!("/proc/{}/clear_refs", self.pid), "4")
            .with(|| Error::new("clear soft-dirty bits").task(self.pid))?;
        self.trust = Trust::Untagged;
        if let Some(tag) = tag {
            match tag.leave(self.pid, &self.pages) {
                Ok(()) => self.trust = Trust::Tagged(tag),
                Err(error) => tracing::info!("no tag for soft-dirty bits: {}", error.chain()),
            }
        }
        Ok(())
    }

    fn mappings(&self) -> Result<Vec<Mapping>> {
        let maps = procfs::maps::parse(&procfs::read(self.pid, "maps")?)?;
        if self.pages.is_sparse_fast() || maps.iter().all(|map| map.len() < LARGE) {
            return Ok(maps);
        }
        procfs::maps::parse(&procfs::read(self.pid, "smaps")?)
    }
}

/// Is it reserved address space and nothing else? Eight bytes would be read for each page of it, though there is none.
fn is_empty(map: &Mapping) -> bool {
    let counted = !map.flags.is_empty();
    counted && map.len() >= LARGE && map.rss + map.swap == 0
}

impl Tracker for SoftDirty {
    fn look(&mut self, maps: &[Mapping]) -> Result<Look> {
        if maps.is_empty() {
            // A zombie has no memory, and cannot be held.
            return Ok(Look::default());
        }
        let since = Instant::now();
        let held = Tree::hold(self.pid)?;
        let look = self.look_at_held(true);
        if let Err(error) = held.resume() {
            // What was found is not told, and the bits are gone.
            self.trust = Trust::Nothing;
            return Err(error);
        }
        tracing::debug!(task = self.pid, held_us = since.elapsed().as_micros() as u64, "looked");
        look
    }

    fn last_look(&mut self, _: &[Mapping]) -> Result<Look> {
        self.look_at_held(false)
    }

    fn name(&self) -> &'static str {
        "soft-dirty bits"
    }
}
