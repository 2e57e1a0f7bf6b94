//! Tracking by asynchronous write protection: a userfaultfd made inside the process, used from outside.
//!
//! The process is stopped once, for the moment in which it makes the descriptor. It is closed there at once; the
//! kernel forgets all registrations when ours is closed, however that comes about.

use std::os::fd::AsFd;

use whimbrel_lazy::ioctl::{self, Categories, Features, RegisterMode, ScanFlags, ScanRequest, Userfault};

use super::{Look, Tracker, is_watched};
use crate::dump::runs::RunSet;
use crate::error::{Context, Error, Result};
use crate::procfs::{self, maps::Mapping};
use crate::remote::inject::GadgetCache;
use crate::remote::{Gadgets, StubProcess, tracee};
use crate::resource::mem::pages::Pages;

/// userfaultfd(2): only faults from user mode. Enough for write protection that the kernel resolves by itself, and
/// allowed to everybody.
const UFFD_USER_MODE_ONLY: i32 = 1;
/// Mappings larger than this are watched only if a fair part of them is populated: watching costs page tables.
const LARGE: u64 = 1 << 30;

/// Watches one process through userfaultfd.
pub struct WpAsync {
    pid: i32,
    uffd: Userfault,
    pages: Pages,
    registered: RunSet,
    /// Pages whose protection a failed look has renewed, so that no later one finds them written.
    lost: RunSet,
    /// Pages over files that were the process's own at the last look. When it gives one back the kernel keeps the protection
    /// (mm/memory.c, zap_install_uffd_wp_if_needed), so that it does not count as written: it must be looked for.
    over_files: RunSet,
}

impl WpAsync {
    /// Starts to watch `pid`.
    ///
    /// # Errors
    /// When it cannot be stopped for a moment, or the kernel lacks WP_ASYNC (before 6.7). Memory that the program has
    /// registered with a userfaultfd of its own is not watched.
    pub fn attach(pid: i32, cache: &mut GadgetCache) -> Result<WpAsync> {
        let maps = procfs::maps::parse(&procfs::read(pid, "maps")?)?;
        let gadgets = Gadgets::find(pid, &maps, cache)?;
        let uffd = make_userfaultfd(pid, &maps, gadgets)?;
        let features = Features::WP_ASYNC | Features::PAGEFAULT_FLAG_WP | Features::WP_UNPOPULATED;
        uffd.api(features).with(|| Error::new("watch memory").task(pid))?;
        Ok(WpAsync {
            pid,
            uffd,
            pages: Pages::open(pid)?,
            registered: RunSet::default(),
            lost: RunSet::default(),
            over_files: RunSet::default(),
        })
    }

    /// Populated pages in and between `ranges`, which are joined where they are near each other: one call for many.
    fn populated_near(&self, ranges: &RunSet) -> Result<RunSet> {
        const NEAR: u64 = 64 * crate::arch::PAGE_SIZE;
        let (mut runs, mut pending) = (Vec::new(), None::<(u64, u64)>);
        for &(start, end) in ranges.ranges() {
            match &mut pending {
                Some((_, last)) if start - *last <= NEAR => *last = end,
                _ => {
                    if let Some((from, to)) = pending.replace((start, end)) {
                        self.pages.own(from, to, &mut runs)?;
                    }
                }
            }
        }
        if let Some((from, to)) = pending {
            self.pages.own(from, to, &mut runs)?;
        }
        Ok(RunSet::from_runs(&runs))
    }

    /// Registers the stretches of memory that contain something new.
    ///
    /// Whole stretches, and what is between their mappings too: a mapping may have grown since `maps` were read, and to
    /// register part of it would split it, which its owner would notice (mremap(2) fails on a range of two mappings).
    fn register(&self, maps: &[Mapping]) {
        for (start, end) in stretches(maps) {
            let inside: Vec<&Mapping> = maps.iter().filter(|map| start <= map.start && map.end <= end).collect();
            let known = |map: &&Mapping| self.registered.covers(map.start, map.end);
            if inside.iter().all(known) {
                continue;
            }
            let error = match self.uffd.register(start, end - start, RegisterMode::WP) {
                Ok(_) => continue,
                Err(error) => error.raw_os_error(),
            };
            // Something in there is of a kind that refuses, or has somebody else's userfaultfd: the others one by one.
            if matches!(error, Some(libc::EINVAL | libc::EPERM | libc::EBUSY)) {
                for map in inside {
                    let _ = self.uffd.register(map.start, map.len(), RegisterMode::WP);
                }
            }
        }
    }
}

/// Is it worth to watch this mapping? What can be neither written nor read for its contents is not.
fn is_worth(map: &Mapping, populated: u64) -> bool {
    let sparse = map.len() > LARGE && populated.saturating_mul(16) < map.len();
    (map.prot & libc::PROT_WRITE != 0 || populated > 0) && !sparse
}

/// Where only mappings are that can be watched, with the gaps around them, up to those that cannot.
fn stretches(maps: &[Mapping]) -> Vec<(u64, u64)> {
    let mut stretches = Vec::new();
    let (mut open, mut last) = (None, maps.first().map_or(0, |map| map.start));
    for map in maps {
        match (open, is_watched(map)) {
            (None, true) => open = Some(last),
            (Some(start), false) => {
                stretches.push((start, map.start));
                open = None;
            }
            _ => {}
        }
        last = map.end;
    }
    stretches.extend(open.map(|start| (start, last)));
    // Beyond this are pages of the kernel.
    for (_, end) in &mut stretches {
        *end = (*end).min(crate::arch::TASK_SIZE);
    }
    stretches
}

fn make_userfaultfd(pid: i32, maps: &[Mapping], gadgets: Gadgets) -> Result<Userfault> {
    let died = || Error::new("watch memory").task(pid).because("the task died meanwhile");
    let (leader, group_stop) = tracee::seize(pid, false)?.stop()?.map_err(|_| died())?;
    let (mut stub, mut visitor) = StubProcess::inject(leader, maps, gadgets)?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    let made = stub.make_descriptor(
        &mut visitor,
        "make a userfaultfd",
        libc::SYS_userfaultfd,
        &[flags.into()],
    );
    let leader = stub.remove(visitor)?;
    // A task that was stopped by a signal stays so: detaching with it keeps the group stop.
    leader.detach(group_stop.unwrap_or(0))?;
    made.map(Userfault::from)
}

/// What a look has come to so far.
#[derive(Default)]
struct Found {
    dirty: Vec<(u64, u64)>,
    gone: Vec<(u64, u64)>,
    registered: Vec<(u64, u64)>,
    watched: Vec<(u64, u64)>,
    /// What is protected anew: only this look knows that it was written.
    written: Vec<(u64, u64)>,
    over_files: Vec<(u64, u64)>,
}

impl WpAsync {
    fn look_with(&mut self, maps: &[Mapping], start_anew: bool) -> Result<Look> {
        let mut found = Found::default();
        if let Err(error) = self.scan(maps, start_anew, &mut found) {
            self.lost = self.lost.union(&RunSet::from_ranges(found.written));
            return Err(error);
        }
        self.registered = RunSet::from_ranges(found.registered);
        self.lost = RunSet::default();
        self.over_files = RunSet::from_ranges(found.over_files);
        let [dirty, gone, watched] = [found.dirty, found.gone, found.watched].map(RunSet::from_ranges);
        Ok(Look { dirty, gone, watched })
    }

    fn scan(&self, maps: &[Mapping], start_anew: bool, all: &mut Found) -> Result<()> {
        let protect = if start_anew { ScanFlags::WP_MATCHING.0 } else { 0 };
        // Written alone: with other categories the kernel counts unpopulated pages as clean.
        let request = ScanRequest {
            flags: ScanFlags(protect | ScanFlags::CHECK_WPASYNC.0),
            mask: Categories::WRITTEN,
            returned: Categories::WRITTEN,
            ..ScanRequest::default()
        };
        if start_anew {
            self.register(maps);
        }
        for map in maps.iter().filter(|map| is_watched(map)) {
            let range = RunSet::from_ranges(vec![(map.start, map.end)]);
            let scan = |found: &mut Vec<_>| {
                ioctl::pagemap_scan_all(self.pages.pagemap().as_fd(), map.start, map.end, &request, found).is_ok()
            };
            let mut found = Vec::new();
            // A mapping that was made since the last look, or made again at the same place, is not ours yet.
            let known = self.registered.covers(map.start, map.end) && scan(&mut found);
            let written = if known {
                all.registered.push((map.start, map.end));
                let found = RunSet::from_ranges(found.iter().map(|region| (region.start, region.end)).collect());
                found.union(&self.lost.intersect(&range))
            } else {
                range.clone()
            };
            all.written.extend_from_slice(written.ranges());
            if !known && start_anew {
                let mut own = Vec::new();
                self.pages.own(map.start, map.end, &mut own)?;
                if is_worth(map, own.iter().map(|run| run.bytes()).sum()) && scan(&mut Vec::new()) {
                    all.registered.push((map.start, map.end));
                }
            }
            // Asked only where something was written: the time does not grow with the memory that was not. After the
            // protection is on, so that what is written in between is found again next time.
            let own = self.populated_near(&written)?;
            all.watched.push((map.start, map.end));
            let dirty = written.intersect(&own);
            all.gone.extend_from_slice(written.subtract(&own).ranges());
            if map.inode != 0 {
                let before = self.over_files.intersect(&range).subtract(&written);
                let still = before.intersect(&self.populated_near(&before)?);
                all.gone.extend_from_slice(before.subtract(&still).ranges());
                all.over_files.extend_from_slice(still.union(&dirty).ranges());
            }
            all.dirty.extend_from_slice(dirty.ranges());
        }
        Ok(())
    }
}

impl Tracker for WpAsync {
    fn look(&mut self, maps: &[Mapping]) -> Result<Look> {
        self.look_with(maps, true)
    }

    fn last_look(&mut self, maps: &[Mapping]) -> Result<Look> {
        self.look_with(maps, false)
    }

    fn name(&self) -> &'static str {
        "userfaultfd asynchronous write protection"
    }
}

impl Drop for WpAsync {
    fn drop(&mut self) {
        tracing::debug!(task = self.pid, "memory is no longer watched");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_that_has_grown_since_it_was_seen_is_not_split() {
        let map = |start: u64, end: u64, name: &[u8]| Mapping {
            start,
            end,
            name: name.to_vec(),
            ..Mapping::default()
        };
        let maps = [
            map(0x1000, 0x2000, b""),
            map(0x3000, 0x4000, b""),
            map(0x6000, 0x7000, b"[vvar]"),
            map(0x9000, 0xa000, b"[stack]"),
            map(u64::MAX - 0xfff, u64::MAX, b"[vsyscall]"),
        ];
        let wanted = vec![(0x1000, 0x6000), (0x7000, crate::arch::TASK_SIZE)];
        assert_eq!(stretches(&maps), wanted);
    }
}
