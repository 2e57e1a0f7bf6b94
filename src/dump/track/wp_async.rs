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
}

impl WpAsync {
    /// Starts to watch `pid`.
    ///
    /// # Errors
    /// When it cannot be stopped for a moment, uses userfaultfd itself, or the kernel lacks WP_ASYNC (before 6.7).
    pub fn attach(pid: i32, cache: &mut GadgetCache) -> Result<WpAsync> {
        let maps = procfs::maps::parse(&procfs::read(pid, "smaps")?)?;
        if maps
            .iter()
            .any(|map| map.has(b"um") || map.has(b"uw") || map.has(b"ui"))
        {
            return Err(Error::new("watch memory")
                .task(pid)
                .because("the program uses userfaultfd itself"));
        }
        let gadgets = Gadgets::find(pid, &maps, cache)?;
        let uffd = make_userfaultfd(pid, &maps, gadgets)?;
        let features = Features::WP_ASYNC | Features::PAGEFAULT_FLAG_WP | Features::WP_UNPOPULATED;
        uffd.api(features).with(|| {
            Error::new("watch memory")
                .task(pid)
                .hint("asynchronous write protection needs Linux 6.7; use --mode post-copy without it")
        })?;
        Ok(WpAsync {
            pid,
            uffd,
            pages: Pages::open(pid)?,
            registered: RunSet::default(),
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

    /// Registers a mapping where that is possible and worth it.
    fn register(&self, map: &Mapping, populated: u64) -> bool {
        let sparse = map.len() > LARGE && populated.saturating_mul(16) < map.len();
        let watchable = (map.prot & libc::PROT_WRITE != 0 || populated > 0) && !sparse;
        watchable && self.uffd.register(map.start, map.len(), RegisterMode::WP).is_ok()
    }
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

impl Tracker for WpAsync {
    fn look(&mut self, maps: &[Mapping]) -> Result<Look> {
        // Written alone: with other categories the kernel counts unpopulated pages as clean.
        let request = ScanRequest {
            flags: ScanFlags(ScanFlags::WP_MATCHING.0 | ScanFlags::CHECK_WPASYNC.0),
            mask: Categories::WRITTEN,
            returned: Categories::WRITTEN,
            ..ScanRequest::default()
        };
        let (mut dirty, mut gone, mut registered, mut watched) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for map in maps.iter().filter(|map| is_watched(map)) {
            let range = RunSet::from_ranges(vec![(map.start, map.end)]);
            let scan = |found: &mut Vec<_>| {
                ioctl::pagemap_scan_all(self.pages.pagemap().as_fd(), map.start, map.end, &request, found).is_ok()
            };
            let mut found = Vec::new();
            // A mapping that was made since the last look, or made again at the same place, is not ours yet.
            let known = self.registered.intersect(&range) == range && scan(&mut found);
            let written = if known {
                RunSet::from_ranges(found.iter().map(|region| (region.start, region.end)).collect())
            } else {
                let mut own = Vec::new();
                self.pages.own(map.start, map.end, &mut own)?;
                if self.register(map, own.iter().map(|run| run.bytes()).sum()) && scan(&mut Vec::new()) {
                    registered.push((map.start, map.end));
                }
                range
            };
            if known {
                registered.push((map.start, map.end));
            }
            // Asked only where something was written: the time does not grow with the memory that was not. After the
            // protection is on, so that what is written in between is found again next time.
            let own = self.populated_near(&written)?;
            watched.push((map.start, map.end));
            dirty.extend_from_slice(written.intersect(&own).ranges());
            gone.extend_from_slice(written.subtract(&own).ranges());
        }
        self.registered = RunSet::from_ranges(registered);
        let [dirty, gone, watched] = [dirty, gone, watched].map(RunSet::from_ranges);
        Ok(Look { dirty, gone, watched })
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
    use std::process::{Command, Stdio};

    /// A program that rewrites chosen pages of its memory when told so.
    #[test]
    fn exactly_the_pages_that_were_written_are_found() {
        use std::io::{BufRead, BufReader, Write};
        let code = "import mmap, sys\n\
                    m = mmap.mmap(-1, 4096 * 64, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n\
                    import ctypes\n\
                    a = ctypes.addressof(ctypes.c_char.from_buffer(m))\n\
                    m[0:4096 * 32] = b'x' * 4096 * 32\n\
                    print(a, flush=True)\n\
                    for line in sys.stdin:\n\
                    \x20   for p in line.split(): m[int(p) * 4096] = 65\n\
                    \x20   print('done', flush=True)\n";
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", code])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut input, mut output) = (
            child.stdin.take().unwrap(),
            BufReader::new(child.stdout.take().unwrap()),
        );
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let base: u64 = line.trim().parse().unwrap();
        let pid = child.id() as i32;
        let maps = || procfs::maps::parse(&procfs::read(pid, "maps").unwrap()).unwrap();
        let mut tracker = WpAsync::attach(pid, &mut GadgetCache::default()).unwrap();
        let area = RunSet::from_ranges(vec![(base, base + 64 * 4096)]);
        let first = tracker.look(&maps()).unwrap();
        assert_eq!(
            first.dirty.intersect(&area).pages(),
            32,
            "the first look finds everything"
        );
        let mut write = |pages: &[u64]| {
            let words: Vec<String> = pages.iter().map(u64::to_string).collect();
            input.write_all(format!("{}\n", words.join(" ")).as_bytes()).unwrap();
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
        };
        // Populated ones, and ones that were never touched.
        for pages in [vec![3, 7, 8, 40], vec![7], vec![], vec![63, 0]] {
            write(&pages);
            let look = tracker.look(&maps()).unwrap();
            let mut want: Vec<_> = pages
                .iter()
                .map(|page| (base + page * 4096, base + page * 4096 + 4096))
                .collect();
            want.sort();
            assert_eq!(look.dirty.intersect(&area), RunSet::from_ranges(want));
        }
        drop(tracker);
        write(&[1, 2]);
        let _ = child.kill();
        let _ = child.wait();
    }
}
