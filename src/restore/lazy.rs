//! Memory of restored tasks that arrives when they run already: which memory that may be, how it is watched, and how it is
//! served until it is whole.
//!
//! A mapping of which something is missing is registered as a whole: registering part of it would split it, and a program
//! that moves its memory (mremap(2) inside of realloc(3)) would then be refused.
//!
//! Each task keeps a duplicate of its own userfaultfd, its *guard*, at a high number with close-on-exec set, until all of
//! its memory is there. The kernel fills missing pages with zeros once the last descriptor is closed; with the guard, the
//! death of whoever serves the pages leaves the task waiting instead.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use whimbrel_images::chain::{Location, PageStore};
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSource, PageState};
use whimbrel_images::proto::VmaEntry;
use whimbrel_lazy::ioctl::{Features, RegisterMode, Userfault};
use whimbrel_lazy::regions::PageStatus;
use whimbrel_lazy::{ForkHook, Known, LazyConfig, LazyError, LazyRange, LazyServer, Progress, RangeFlags, RegionMap};
use whimbrel_page_server::transport::FaultClient;

use super::Build;
use super::unfinished::Notes;
use crate::dump::runs::RunSet;
use crate::error::{Context, Error, Result};
use crate::kernel::sys::{self, Kcmp};
use crate::remote::{Program, inject};
use crate::resource::mem::pages::Pages;
use crate::resource::mem::{mapping, mapping::status};
use crate::tree::{TaskImage, TreeImage};

/// Mappings larger than this are restored at once: what is known of each page takes two bits here.
const LARGEST: u64 = 1 << 40;
/// Descriptors above [`Build`]'s own that it uses for moving the tree's about.
const PASSING: i32 = 512;
/// No guard lies above this number: the kernel's table of descriptors is as large as its highest.
const HIGHEST_GUARD: u64 = 1 << 16;

/// Pages of a task that may follow when it runs: private memory without a file that is neither locked nor executed, nor
/// written by the kernel while the task is put together.
pub fn candidates(task: &TaskImage) -> RunSet {
    let may = |vma: &&VmaEntry| {
        vma.status & status::ANON_PRIVATE != 0
            && !mapping::is_kernel_made(vma)
            && vma.flags & libc::MAP_LOCKED as u32 == 0
            && vma.prot & libc::PROT_EXEC as u32 == 0
            && vma.end - vma.start <= LARGEST
    };
    let ranges = task.mm.vmas.iter().filter(may).map(|vma| (vma.start, vma.end));
    RunSet::from_ranges(ranges.collect()).subtract(&RunSet::from_ranges(task.touched_by_kernel()))
}

/// The pages of an image set that follow when the tree runs, by task.
pub fn select(image: &TreeImage, pages: &PageStore) -> HashMap<u32, RunSet> {
    let living = image.tasks.iter().filter(|task| !task.is_zombie());
    let of = |task: &TaskImage| {
        let runs = pages.runs(MemoryObject::Task(task.entry.pid)).unwrap_or_default();
        let runs: Vec<PageRun> = runs.iter().map(|resolved| resolved.run).collect();
        (task.entry.pid, RunSet::from_runs(&runs).intersect(&candidates(task)))
    };
    living.map(of).filter(|(_, set)| !set.is_empty()).collect()
}

/// Checks that every page is in the images but those of `lazy`: a page that is nowhere must not become zeros.
///
/// # Errors
/// With the first that is not.
pub fn check_present(pages: &PageStore, lazy: &HashMap<u32, RunSet>) -> Result<()> {
    for object in pages.objects() {
        let runs = pages.runs(object).unwrap_or_default();
        let absent = runs.iter().filter(|resolved| resolved.location == Location::Missing);
        let absent: Vec<_> = absent.map(|resolved| (resolved.run, resolved.lazy)).collect();
        let mut set = RunSet::from_runs(&absent.iter().map(|&(run, _)| run).collect::<Vec<_>>());
        if let MemoryObject::Task(pid) = object
            && let Some(follows) = lazy.get(&pid)
        {
            set = set.subtract(follows);
        }
        if let Some(&(start, _)) = set.ranges().first() {
            let on_demand = absent
                .iter()
                .any(|(run, lazy)| *lazy && (run.start..run.end()).contains(&start));
            let failed = Error::new("read images").object(format!("{object:?}, page {start:#x}"));
            return Err(match on_demand {
                true => failed
                    .because("the dump left it to be fetched on demand")
                    .hint("use --lazy-pages, with `whimbrel lazy-pages --page-server` running"),
                false => failed.because("it is in none of the images: the chain of parents is not whole"),
            });
        }
    }
    Ok(())
}

/// A userfaultfd of a task under construction, with a guard in the task itself. Nothing is registered yet.
pub struct Watch {
    pid: u32,
    tid: i32,
    guard: i32,
    uffd: Userfault,
}

/// A task that runs, or is about to, with part of its memory missing.
pub struct LazyTask {
    /// What images call it.
    pub pid: u32,
    /// Its id in our pid namespace.
    pub tid: i32,
    /// Number of its guard.
    pub guard: i32,
    /// Its userfaultfd.
    pub uffd: Userfault,
    /// Mappings that are registered.
    pub ranges: Vec<LazyRange>,
    /// Pages in them that are missing; the others are there, or zeros.
    pub missing: RunSet,
}

impl Watch {
    /// Makes a userfaultfd in a task, which only the task itself can do, while it still has all privileges.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn make(build: &mut Build, task: &TaskImage) -> Result<Watch> {
        let pid = task.entry.pid;
        let failed = || Error::new("make a userfaultfd").task(pid as i32);
        // Tasks that share their descriptors have a guard each.
        let others = build.guards.entry(task.ids.files_id).or_insert(0);
        let guard = guard_number(build.control, task) - *others;
        *others += 1;
        let mut program = Program::new();
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let made = program.call("make a userfaultfd", libc::SYS_userfaultfd, &[flags.into()]);
        let to = [made.into(), guard.into(), libc::O_CLOEXEC.into()];
        program.call("keep the userfaultfd", libc::SYS_dup3, &to);
        program.call("close a descriptor", libc::SYS_close, &[made.into()]);
        build.run_in(pid, &program)?;
        let tid = build.tid_of(pid)?;
        let uffd = Userfault::from(sys::take_descriptor(tid, guard).with(failed)?);
        let events = Features::EVENT_FORK | Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
        uffd.api(events).with(failed)?;
        Ok(Watch { pid, tid, guard, uffd })
    }

    /// Watches the mappings of `task` that lack something. The last step before the task's registers are set: whoever
    /// touches a missing page from here on waits.
    ///
    /// # Errors
    /// When a mapping cannot be watched, or a page that is said to be missing is there.
    pub fn register(mut self, task: &TaskImage, missing: RunSet) -> Result<LazyTask> {
        // By now a leader that is to be dead is.
        self.tid = crate::tree::speaker(self.tid);
        let pages = Pages::open(self.tid)?;
        let mut ranges = Vec::new();
        let mut left = missing.clone();
        for vma in &task.mm.vmas {
            let of_vma = missing.intersect(&RunSet::from_ranges(vec![(vma.start, vma.end)]));
            if of_vma.is_empty() {
                continue;
            }
            let failed = || {
                Error::new("watch missing pages")
                    .task(self.tid)
                    .object(format!("{:#x}-{:#x}", vma.start, vma.end))
            };
            let mut there = Vec::new();
            for &(start, end) in of_vma.ranges() {
                pages.own(start, end, &mut there)?;
            }
            if let Some(run) = there.first() {
                // It would be taken for the program's own, and its bytes would be lost.
                let why = format!("page {:#x} was written while the task was put together", run.start);
                return Err(failed().because(why));
            }
            let watched = if vma.end - vma.start <= LARGEST {
                vec![(vma.start, vma.end)]
            } else {
                of_vma.ranges().to_vec()
            };
            for (start, end) in watched {
                self.uffd
                    .register(start, end - start, RegisterMode::MISSING)
                    .with(failed)?;
                let mut range =
                    LazyRange::anonymous(MemoryObject::Task(self.pid), start, (end - start) / PAGE_SIZE as u64);
                range.flags = flags_of(vma);
                ranges.push(range);
            }
            left = left.subtract(&of_vma);
        }
        if let Some(&(start, _)) = left.ranges().first() {
            return Err(Error::new("watch missing pages")
                .task(self.tid)
                .object(format!("{start:#x}"))
                .because("it lies in no mapping"));
        }
        let Watch { pid, tid, guard, uffd } = self;
        Ok(LazyTask {
            pid,
            tid,
            guard,
            uffd,
            ranges,
            missing,
        })
    }
}

/// What fork(2) does with a mapping. Every missing page held something: there is no excuse for zeros.
fn flags_of(vma: &VmaEntry) -> RangeFlags {
    let advised = |advice: i32| vma.madv.unwrap_or(0) & 1 << advice != 0;
    RangeFlags {
        absent_is_zero: false,
        shared: false,
        wipe_on_fork: advised(libc::MADV_WIPEONFORK),
        dont_fork: advised(libc::MADV_DONTFORK),
    }
}

/// Above what the program can open itself, so that it does not meet the guard by numbers, and above what is used here.
fn guard_number(control: i32, task: &TaskImage) -> i32 {
    let limits = task.cores.first().and_then(|core| core.tc.as_ref()?.rlimits.as_ref());
    let soft = limits
        .and_then(|limits| limits.rlimits.get(libc::RLIMIT_NOFILE as usize))
        .map_or(0, |limit| limit.cur.min(HIGHEST_GUARD));
    let ours = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let highest = ours.current.map_or(i32::MAX as u64, |most| most.saturating_sub(1));
    u64::from((control + PASSING) as u32).max(soft).min(highest) as i32
}

impl LazyTask {
    /// Its ranges, three words each, and what is missing in them, two words each, for [`of_words`].
    pub fn words(&self) -> Vec<u64> {
        let flags = |flags: RangeFlags| u64::from(flags.wipe_on_fork) | u64::from(flags.dont_fork) << 1;
        let ranges = self.ranges.iter();
        let ranges = ranges.flat_map(|range| [range.start, range.end(), flags(range.flags)]);
        let missing = self.missing.ranges().iter().flat_map(|&(start, end)| [start, end]);
        ranges.chain(missing).collect()
    }

    /// The task as it is served. What happens to its memory is noted in `notes`, under this number.
    pub fn served(self, notes: Option<(&Arc<Notes>, u64)>) -> Result<Served> {
        let map = map_of(self.tid, &self.ranges, &self.missing)?;
        let journal = notes.map(|(notes, number)| notes.journal(number));
        Ok(Served {
            pid: self.pid,
            tid: self.tid,
            guard: self.guard,
            uffd: self.uffd,
            known: Known {
                map,
                journal,
                ..Known::default()
            },
        })
    }
}

/// Ranges of a task, and what is missing in them, as [`LazyTask::words`] told.
pub fn of_words(pid: u32, ranges: &[u64], missing: &[u64]) -> (Vec<LazyRange>, RunSet) {
    let range = |range: &[u64]| {
        let pages = range[1].saturating_sub(range[0]) / PAGE_SIZE as u64;
        let mut lazy = LazyRange::anonymous(MemoryObject::Task(pid), range[0], pages);
        lazy.flags = RangeFlags {
            absent_is_zero: false,
            shared: false,
            wipe_on_fork: range[2] & 1 != 0,
            dont_fork: range[2] & 2 != 0,
        };
        lazy
    };
    let missing = missing.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    (
        ranges.chunks_exact(3).map(range).collect(),
        RunSet::from_ranges(missing),
    )
}

/// What is known of each page of a task.
///
/// # Errors
/// When the ranges are malformed.
pub fn map_of(tid: i32, ranges: &[LazyRange], missing: &RunSet) -> Result<RegionMap> {
    let failed = || Error::new("serve page faults").task(tid);
    let mut map = RegionMap::new();
    for &range in ranges {
        // Present, or never touched: it reads as what it is, and as zeros should the program drop it.
        map.insert(range, PageStatus::Zero).with(failed)?;
    }
    for &(start, end) in missing.ranges() {
        map.set(start, end, PageStatus::Missing);
    }
    Ok(map)
}

/// A task that is served.
pub struct Served {
    /// What images call it, or the one it descends from.
    pub pid: u32,
    /// Its id in our pid namespace.
    pub tid: i32,
    /// Number of its guard.
    pub guard: i32,
    /// Its userfaultfd.
    pub uffd: Userfault,
    /// What is known of its memory.
    pub known: Known,
}

/// Asks a peer for single pages that somebody waits for: such requests overtake the others.
pub struct Urgent(pub FaultClient);

impl PageSource for Urgent {
    fn read_pages(&self, object: MemoryObject, run: PageRun, buffer: &mut [u8]) -> std::io::Result<Vec<PageState>> {
        let reply = self.0.request_blocking(object, run, true)?;
        if reply.data.len() != buffer.len() {
            return Err(std::io::Error::other("the reply has another length than the question"));
        }
        buffer.copy_from_slice(&reply.data);
        Ok(reply.states)
    }
}

/// Pages of the images, and for what those leave out, of somebody else.
pub struct Layered {
    /// Asked first.
    pub images: Arc<PageStore>,
    /// Asked for the rest.
    pub rest: Arc<dyn PageSource>,
}

impl PageSource for Layered {
    fn read_pages(&self, object: MemoryObject, run: PageRun, buffer: &mut [u8]) -> std::io::Result<Vec<PageState>> {
        let mut states = self.images.read_pages(object, run, buffer)?;
        let mut at = 0;
        while at < states.len() {
            let same = states[at..].iter().take_while(|&&state| state == states[at]).count();
            if states[at] == PageState::Unknown {
                let part = PageRun {
                    start: run.start + (at * PAGE_SIZE) as u64,
                    pages: same as u64,
                };
                let bytes = &mut buffer[at * PAGE_SIZE..(at + same) * PAGE_SIZE];
                let answered = self.rest.read_pages(object, part, bytes)?;
                if answered.len() != same {
                    return Err(std::io::Error::other("the answer is not about the pages asked for"));
                }
                states[at..at + same].copy_from_slice(&answered);
            }
            at += same;
        }
        Ok(states)
    }
}

/// A descriptor that a task keeps of its own userfaultfd.
struct Guard {
    /// What images call the task, or the one it descends from.
    pid: u32,
    number: i32,
    uffd: OwnedFd,
    /// The process that it is for. Others have inherited it.
    owner: i32,
}

/// Tasks whose memory is being completed.
pub struct Serving {
    server: LazyServer,
    guards: Vec<Guard>,
    forked: Receiver<Forked>,
    without_guard: Vec<i32>,
    notes: Option<Arc<Notes>>,
}

/// A child that was forked.
struct Forked {
    /// What images call the task that it descends from.
    pid: u32,
    uffd: OwnedFd,
    /// Under which it is noted.
    number: Option<u64>,
}

/// How long a look for forked children lasts.
const LOOK: Duration = Duration::from_millis(5);

impl Serving {
    /// Serves tasks, with pages for faults from `urgent` and the rest from `bulk`; without `bulk` only pages that are touched
    /// come.
    ///
    /// # Errors
    /// When a thread cannot be started; the tasks wait then.
    pub fn start(
        tasks: Vec<Served>,
        urgent: Arc<dyn PageSource>,
        bulk: Option<Arc<dyn PageSource>>,
        notes: Option<Arc<Notes>>,
    ) -> Result<Serving> {
        let (tell, forked) = channel();
        let tell = Mutex::new(tell);
        let on_fork: ForkHook = Arc::new(move |pid, uffd, number| {
            let tell = tell.lock().unwrap_or_else(PoisonError::into_inner);
            if let Ok(uffd) = uffd.try_clone_to_owned() {
                let _ = tell.send(Forked { pid, uffd, number });
            }
        });
        let mut config = LazyConfig {
            on_fork: Some(on_fork),
            ..LazyConfig::default()
        };
        let bulk = bulk.unwrap_or_else(|| {
            (config.prefetch_threads, config.around_pages) = (0, 0);
            urgent.clone()
        });
        let server = LazyServer::new(config, urgent, bulk).context("serve page faults")?;
        let mut guards = Vec::new();
        for task in tasks {
            let uffd = task
                .uffd
                .as_fd()
                .try_clone_to_owned()
                .context("duplicate a descriptor")?;
            guards.push(Guard {
                pid: task.pid,
                number: task.guard,
                uffd,
                owner: task.tid,
            });
            server
                .add_map(task.uffd.into(), task.pid, task.known)
                .context("serve page faults")?;
        }
        Ok(Serving {
            server,
            guards,
            forked,
            without_guard: Vec::new(),
            notes,
        })
    }

    /// Waits a while; tells how far it is when all memory is there. To be called on a thread that may trace.
    ///
    /// # Errors
    /// When nothing more can be done and there are tasks that wait for pages that nobody knows.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<Progress>> {
        let until = Instant::now() + limit;
        loop {
            match self.server.wait_complete(Some(Duration::ZERO)) {
                Ok(progress) => return Ok(Some(progress)),
                Err(LazyError::Incomplete { .. }) => {}
                // One task cannot be completed. The others are.
                Err(_) if self.server.progress().active > self.server.failures().len() => {}
                Err(error) => return Err(error).context("complete the memory"),
            }
            // At once: until a child has its guard, its memory hangs on this process.
            if let Ok(forked) = self.forked.recv_timeout(LOOK) {
                self.guard_child(forked);
            }
            if Instant::now() >= until {
                return Ok(None);
            }
        }
    }

    /// Gives a forked child a guard of its own, in the place of its parent's that it has inherited.
    fn guard_child(&mut self, Forked { pid, uffd, number }: Forked) {
        let note = |guard| {
            if let (Some(notes), Some(number)) = (&self.notes, number) {
                notes.child(number, pid, guard);
            }
        };
        // Reported in the order in which they were forked, as their pids are.
        let inherited = self.guards.iter().filter(|guard| guard.pid == pid).find_map(|guard| {
            let new = |holder: &i32| *holder != guard.owner && !self.without_guard.contains(holder);
            let child = guard.holders().into_iter().find(new)?;
            Some((guard, child))
        });
        let Some((guard, child)) = inherited else {
            // It has ended, or executed something else: nothing is missing then.
            return note(None);
        };
        let number = guard.number;
        let placed = inject::place_descriptor(child, number, uffd.as_fd(), &|| guard.is_in(child));
        match placed {
            Ok(()) => {
                note(Some((child, number)));
                tracing::debug!("the forked child {child} keeps its own userfaultfd");
                self.guards.push(Guard {
                    pid,
                    number,
                    uffd,
                    owner: child,
                });
            }
            Err(error) => {
                tracing::debug!("the forked child {child} has no guard: {}", error.chain());
                self.without_guard.push(child);
            }
        }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.server.progress()
    }

    /// Tries failed reads again at once: the link is back.
    pub fn retry_now(&self) {
        self.server.retry_now();
    }

    /// Takes the guards out of the tasks. To be called on a thread that may trace, when all memory is there.
    pub fn finish(self) {
        let Serving { server, guards, .. } = self;
        for guard in &guards {
            guard.remove();
        }
        // Only now: a task that waits for the server to take note of an munmap cannot be stopped.
        drop(server);
    }
}

impl Guard {
    /// Closes it wherever it is: children that were forked meanwhile have inherited it.
    fn remove(&self) {
        for pid in self.holders() {
            if let Err(error) = inject::close_descriptor(pid, self.number, &|| self.is_in(pid)) {
                tracing::warn!("descriptor {} stays open: {}", self.number, error.chain());
            }
        }
    }

    /// Processes that have it, ascending, each by a thread that lives.
    fn holders(&self) -> Vec<i32> {
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let mut holders: Vec<i32> = pids.map(crate::tree::speaker).filter(|&pid| self.is_in(pid)).collect();
        holders.sort_unstable();
        holders
    }

    fn is_in(&self, pid: i32) -> bool {
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{}", self.number));
        let ours = std::process::id() as i32;
        let same = || {
            let (uffd, number) = (self.uffd.as_raw_fd() as u64, self.number as u64);
            sys::kcmp(ours, pid, Kcmp::File, uffd, number).is_ok_and(|order| order.is_eq())
        };
        pid != ours && link.is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]") && same()
    }
}
