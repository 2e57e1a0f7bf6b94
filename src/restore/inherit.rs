//! Memory that tasks share copy-on-write: a child gets it from its parent again.
//!
//! The worker processes of a server are forks of a parent that has loaded everything; what neither wrote since is there
//! once. So a task is forked when its parent's memory is in place, keeps the mappings that both have, and of their pages
//! only those are written that differ from what it has inherited.
//!
//! A child that executed a program of its own has nothing in common with its parent: it is forked before its parent has any
//! memory, for then there is nothing to copy and to take away.

use std::collections::{BTreeMap, BTreeSet};

use whimbrel_images::chain::PageStore;
use whimbrel_images::page::MemoryObject;
use whimbrel_images::proto::VmaEntry;

use super::Build;
use crate::dump::runs::RunSet;
use crate::error::{Context, Result};
use crate::procfs::maps;
use crate::remote::Program;
use crate::resource::mem::{mapping, mapping::status};
use crate::tree::{TaskImage, TreeImage};

/// Calls in one program: each takes some hundred bytes of the arena.
const CALLS: usize = 10_000;

/// What a task has from its parent.
#[derive(Clone, Debug, Default)]
pub struct Inherited {
    /// Mappings that both have, with how much of them, and how the parent had them mapped.
    kept: Vec<Kept>,
    /// Pages of those that both have, to be written only where they differ.
    pub common: RunSet,
    /// Pages of those that only the parent has, to be taken away.
    stale: RunSet,
}

#[derive(Clone, Debug)]
struct Kept {
    vma: VmaEntry,
    /// Where what the parent has of it ends.
    end: u64,
    /// Protection that it has so far, and that it is to have while it is filled.
    prot: (u32, u32),
}

/// What each task has from its parent; tasks that have nothing are not in it.
#[derive(Debug, Default)]
pub struct Inheritance(BTreeMap<u32, Inherited>);

impl Inheritance {
    /// Compares all tasks with their parents. `lazy` are pages that are not there yet, by task.
    ///
    /// # Errors
    /// When pages cannot be looked up.
    pub fn of(
        image: &TreeImage,
        pages: &PageStore,
        lazy: &std::collections::HashMap<u32, RunSet>,
    ) -> Result<Inheritance> {
        let mut all = Inheritance::default();
        if image.tasks.len() == 1 {
            return Ok(all);
        }
        let present = |task: &TaskImage| -> Result<RunSet> {
            let extents = pages.extents(MemoryObject::Task(task.entry.pid));
            let runs: Vec<_> = extents
                .context("read pagemaps")?
                .iter()
                .map(|extent| extent.run)
                .collect();
            let set = RunSet::from_runs(&runs);
            Ok(match lazy.get(&task.entry.pid) {
                Some(missing) => set.subtract(missing),
                None => set,
            })
        };
        let parents: BTreeSet<u32> = image.tasks.iter().map(|task| task.entry.ppid).collect();
        let mut pages_of = BTreeMap::new();
        for task in image.tasks.iter().filter(|task| !task.is_zombie()) {
            let parent = image.tasks.iter().find(|other| other.entry.pid == task.entry.ppid);
            if parent.is_some() || parents.contains(&task.entry.pid) {
                pages_of.insert(task.entry.pid, present(task)?);
            }
            let Some((parent, theirs)) = parent.and_then(|parent| Some((parent, pages_of.get(&parent.entry.pid)?)))
            else {
                continue;
            };
            // A child that stayed in the session that its parent left must be forked before.
            let left_behind = parent.entry.sid == parent.entry.pid
                && task.entry.sid != parent.entry.sid
                && task.entry.sid != task.entry.pid;
            if left_behind {
                continue;
            }
            let own = &pages_of[&task.entry.pid];
            let inherited = compare(task, own, parent, theirs);
            tracing::debug!(
                task = task.entry.pid,
                "has {} pages in common with its parent",
                inherited.common.pages()
            );
            if !inherited.common.is_empty() {
                all.0.insert(task.entry.pid, inherited);
            }
        }
        Ok(all)
    }

    /// What a task has from its parent.
    pub fn of_task(&self, pid: u32) -> Option<&Inherited> {
        self.0.get(&pid)
    }

    /// Does a task have something from its parent, so that it must be forked later?
    pub fn is_heir(&self, pid: u32) -> bool {
        self.0.contains_key(&pid)
    }
}

/// What `task` can keep of `parent`, whose pages are `theirs`.
fn compare(task: &TaskImage, own: &RunSet, parent: &TaskImage, theirs: &RunSet) -> Inherited {
    let mut inherited = Inherited::default();
    let mut ranges = Vec::new();
    for vma in &task.mm.vmas {
        let Some(other) = parent.mm.vmas.iter().find(|other| is_kin(vma, other)) else {
            continue;
        };
        // As the mappings are made, with what contents they have.
        let has = |set: &RunSet, vma: &VmaEntry| {
            let range = RunSet::from_ranges(vec![(vma.start, vma.end)]);
            !set.intersect(&range).is_empty()
        };
        let prot = |vma: &VmaEntry, set: &RunSet| {
            let writable = mapping::needs_write(vma, has(set, vma));
            vma.prot
                | if writable {
                    (libc::PROT_READ | libc::PROT_WRITE) as u32
                } else {
                    0
                }
        };
        let end = vma.end.min(other.end);
        ranges.push((vma.start, end));
        inherited.kept.push(Kept {
            vma: vma.clone(),
            end,
            prot: (prot(other, theirs), prot(vma, own)),
        });
    }
    let kept = RunSet::from_ranges(ranges);
    let theirs = theirs.intersect(&kept);
    inherited.common = theirs.intersect(own);
    inherited.stale = theirs.subtract(own);
    inherited
}

/// Can a child's mapping be what it inherits with `other`? It lies in it, or begins with it and has grown since.
fn is_kin(vma: &VmaEntry, other: &VmaEntry) -> bool {
    let private = vma.flags & libc::MAP_PRIVATE as u32 != 0 && !mapping::is_kernel_made(vma);
    let anonymous = vma.status & status::ANON_PRIVATE != 0;
    let made = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN | libc::MAP_NORESERVE) as u32;
    let kind = status::ANON_PRIVATE | status::FILE_PRIVATE;
    let same_kind = vma.flags & made == other.flags & made
        && vma.status & kind == other.status & kind
        && vma.accounted == other.accounted
        && !mapping::is_kernel_made(other);
    let same_place = if anonymous {
        let inside = other.start <= vma.start && vma.end <= other.end;
        let grown = other.start == vma.start && other.end < vma.end && vma.flags & libc::MAP_GROWSDOWN as u32 == 0;
        inside || grown
    } else {
        let offset = |vma: &VmaEntry| vma.pgoff.wrapping_sub(vma.start);
        let inside = other.start <= vma.start && vma.end <= other.end;
        inside && vma.shmid == other.shmid && offset(vma) == offset(other)
    };
    private && same_kind && same_place
}

impl Build {
    /// Leaves of the memory that a task was forked with what it inherits. Returns the mappings that need not be made.
    ///
    /// # Errors
    /// When the kernel refuses to change a mapping.
    pub fn settle_inheritance(
        &mut self,
        pid: u32,
        inherited: &Inherited,
    ) -> Result<std::collections::HashSet<(u64, u64)>> {
        let tid = self.tid_of(pid)?;
        let maps = maps::parse(&crate::procfs::read(tid, "maps")?)?;
        let arena = self.arena_range();
        let mut stays: Vec<(u64, u64)> = inherited.kept.iter().map(|kept| (kept.vma.start, kept.end)).collect();
        stays.push(arena);
        let kernels_own = maps.iter().filter(|map| map.name.starts_with(b"[v"));
        stays.extend(kernels_own.map(|map| (map.start, map.end)));
        let there = RunSet::from_ranges(maps.iter().map(|map| (map.start, map.end)).collect());
        let goes = there.subtract(&RunSet::from_ranges(stays));

        let mut programs = vec![Program::new()];
        let next = |programs: &mut Vec<Program>| {
            if programs.last().is_none_or(|program| program.len() >= CALLS) {
                programs.push(Program::new());
            }
            programs.len() - 1
        };
        for &(start, end) in goes.ranges() {
            let at = next(&mut programs);
            let args = [start.into(), (end - start).into()];
            programs[at].call("unmap what is not inherited", libc::SYS_munmap, &args);
        }
        for kept in &inherited.kept {
            let (at, vma) = (next(&mut programs), &kept.vma);
            let what = format!("keep {:#x}-{:#x}", vma.start, vma.end);
            let program = &mut programs[at];
            if kept.prot.0 != kept.prot.1 {
                let args = [vma.start.into(), (kept.end - vma.start).into(), kept.prot.1.into()];
                program.call(what, libc::SYS_mprotect, &args);
            }
        }
        for &(start, end) in inherited.stale.ranges() {
            let at = next(&mut programs);
            let args = [start.into(), (end - start).into(), libc::MADV_DONTNEED.into()];
            programs[at].call("drop pages that are not inherited", libc::SYS_madvise, &args);
        }
        for program in programs.iter().filter(|program| !program.is_empty()) {
            self.run_in(pid, program)?;
        }
        Ok(inherited
            .kept
            .iter()
            .map(|kept| (kept.vma.start, kept.vma.end))
            .collect())
    }
}

impl Build {
    /// Grows the mappings that have grown since they were inherited; everything else must be in its place.
    ///
    /// # Errors
    /// When the kernel refuses to change a mapping.
    pub fn grow_inheritance(&mut self, pid: u32, inherited: &Inherited) -> Result<()> {
        let mut program = Program::new();
        for Kept { vma, end, .. } in inherited.kept.iter().filter(|kept| kept.end < kept.vma.end) {
            let (old, new) = (end - vma.start, vma.end - vma.start);
            let args = [vma.start.into(), old.into(), new.into(), 0.into()];
            let (what, grown) = (format!("grow {:#x}-{:#x}", vma.start, vma.end), vma.start as i64);
            program.call_expecting(what, crate::remote::Expect::Exactly(grown), libc::SYS_mremap, &args);
        }
        if program.is_empty() {
            return Ok(());
        }
        self.run_in(pid, &program).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use whimbrel_images::proto::{MmEntry, PstreeEntry};

    use super::*;

    fn vma(start: u64, end: u64) -> VmaEntry {
        VmaEntry {
            start,
            end,
            prot: (libc::PROT_READ | libc::PROT_WRITE) as u32,
            flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32,
            status: status::REGULAR | status::ANON_PRIVATE,
            accounted: Some(true),
            ..VmaEntry::default()
        }
    }

    fn task(pid: u32, vmas: Vec<VmaEntry>) -> TaskImage {
        TaskImage {
            entry: PstreeEntry {
                pid,
                ..PstreeEntry::default()
            },
            mm: MmEntry {
                vmas,
                ..MmEntry::default()
            },
            ..TaskImage::default()
        }
    }

    #[test]
    fn only_private_mappings_of_one_kind_and_place_are_kept() {
        let parent = vma(0x10000, 0x20000);
        assert!(is_kin(&vma(0x10000, 0x20000), &parent));
        assert!(is_kin(&vma(0x11000, 0x12000), &parent));
        assert!(is_kin(&vma(0x10000, 0x30000), &parent), "it has grown");
        assert!(!is_kin(&vma(0x11000, 0x30000), &parent));
        assert!(!is_kin(&vma(0xf000, 0x20000), &parent));
        let shared = VmaEntry {
            flags: (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u32,
            ..parent.clone()
        };
        assert!(!is_kin(&shared, &shared));
        let file = |pgoff: u64, shmid: u64| VmaEntry {
            flags: libc::MAP_PRIVATE as u32,
            status: status::REGULAR | status::FILE_PRIVATE,
            pgoff,
            shmid,
            ..parent.clone()
        };
        assert!(is_kin(&file(0x1000, 1), &file(0x1000, 1)));
        assert!(!is_kin(&file(0x1000, 1), &file(0x2000, 1)));
        assert!(!is_kin(&file(0x1000, 1), &file(0x1000, 2)));
        assert!(!is_kin(&file(0x1000, 1), &parent));
    }

    #[test]
    fn pages_are_common_stale_or_the_childs_own() {
        let (parent, child) = (
            task(1, vec![vma(0x10000, 0x20000)]),
            task(2, vec![vma(0x10000, 0x18000)]),
        );
        let theirs = RunSet::from_ranges(vec![(0x10000, 0x14000), (0x1f000, 0x20000)]);
        let own = RunSet::from_ranges(vec![(0x12000, 0x16000)]);
        let inherited = compare(&child, &own, &parent, &theirs);
        assert_eq!(inherited.common.ranges(), [(0x12000, 0x14000)]);
        assert_eq!(inherited.stale.ranges(), [(0x10000, 0x12000)]);
    }
}
