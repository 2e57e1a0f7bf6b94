//! The server: its tasks, its threads, and what others see of them.

use std::io;
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use whimbrel_images::page::{PAGE_SIZE, PageSource, PageState};

use crate::ioctl::{RegisterMode, Userfault};
use crate::regions::{Claim, LazyRange, PageStatus, RegionError, RegionMap};
use crate::stats::{Stats, StatsSnapshot};
use crate::task::{Known, Task, TaskFailure, TaskStatus};

/// A read that a source failed to do. The pages are asked for again; the task waits.
#[derive(Debug)]
pub struct SourceFailure<'a> {
    /// The task whose pages they are.
    pub pid: u32,
    /// Address of the first page in the task.
    pub address: u64,
    /// How often it failed before.
    pub attempt: u32,
    /// What the source said.
    pub error: &'a io::Error,
}

/// Decides after a failed read how long to wait before the next try. It may also reconnect, or tell somebody.
pub type FailureHook = Arc<dyn Fn(&SourceFailure<'_>) -> Duration + Send + Sync>;

/// Told of a forked child before its pages are served: the task it descends from, the child's own userfaultfd, and the
/// number of its journal if there is one.
pub type ForkHook = Arc<dyn Fn(u32, BorrowedFd<'_>, Option<u64>) + Send + Sync>;

/// The default hook: 10 ms, doubled with each failure up to one second.
pub fn backoff(failure: &SourceFailure<'_>) -> Duration {
    Duration::from_millis((10 << failure.attempt.min(10)).min(1000))
}

/// How a server works.
#[derive(Clone)]
pub struct LazyConfig {
    /// Threads for each task that answer faults; at least one.
    pub fault_threads: usize,
    /// Threads, for all tasks together, that fetch in the background, each with one read under way; 0 for none.
    pub prefetch_threads: usize,
    /// Pages of one background read.
    pub unit_pages: u64,
    /// Without background fetch: pages fetched around a fault once it is answered; 0 for none.
    pub around_pages: u64,
    /// Called after each failed read.
    pub on_source_failure: FailureHook,
    /// Called for each forked child, by the thread that answers faults: it should be quick.
    pub on_fork: Option<ForkHook>,
}

impl Default for LazyConfig {
    fn default() -> Self {
        Self {
            fault_threads: 2,
            prefetch_threads: 3,
            unit_pages: 64,
            around_pages: 16,
            on_source_failure: Arc::new(backoff),
            on_fork: None,
        }
    }
}

impl LazyConfig {
    pub(crate) fn prefetching(&self) -> bool {
        self.prefetch_threads > 0
    }
}

/// Why a call to a server failed.
#[derive(Debug, thiserror::Error)]
pub enum LazyError {
    /// The ranges do not make a map.
    #[error("cannot serve task {pid}")]
    Ranges {
        /// The task.
        pid: u32,
        /// What is wrong with them.
        source: RegionError,
    },
    /// A system call failed.
    #[error("cannot {what} for task {pid}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The task.
        pid: u32,
        /// The error.
        source: io::Error,
    },
    /// A task cannot be completed.
    #[error("cannot complete the memory of task {pid}")]
    Task {
        /// The task.
        pid: u32,
        /// Why.
        source: TaskFailure,
    },
    /// The server was stopped, or the time was over, with pages missing.
    #[error("{missing} pages are still missing")]
    Incomplete {
        /// How many.
        missing: u64,
    },
}

/// How far a server is, over the tasks that are not finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Tasks being served.
    pub active: usize,
    /// Tasks completed.
    pub complete: usize,
    /// Tasks whose address space ended before it was complete.
    pub gone: usize,
    /// Pages in the ranges of the tasks being served.
    pub pages: u64,
    /// Pages of those whose bytes are still to come.
    pub missing: u64,
    /// Counters since the server was made.
    pub stats: StatsSnapshot,
}

/// A task that still needs pages, as [`LazyServer::stop`] hands it back.
///
/// Closing the descriptor makes the kernel fill what is missing with zeros: end the task first, or hand it to another
/// server with [`LazyServer::add_map`].
#[derive(Debug)]
pub struct Unfinished {
    /// The task (for a forked child, the process it descends from).
    pub pid: u32,
    /// Its userfaultfd.
    pub uffd: OwnedFd,
    /// What it has and what it lacks.
    pub map: RegionMap,
}

/// Fills the memory of tasks that already run.
pub struct LazyServer {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) config: LazyConfig,
    pub(crate) fault_source: Arc<dyn PageSource>,
    pub(crate) bulk_source: Arc<dyn PageSource>,
    pub(crate) stats: Stats,
    pub(crate) faults_active: AtomicUsize,
    stopping: AtomicBool,
    ids: AtomicU64,
    board: Mutex<Board>,
    changed: Condvar,
    work: Condvar,
}

#[derive(Default)]
struct Board {
    tasks: Vec<Arc<Task>>,
    threads: Vec<JoinHandle<()>>,
    complete: usize,
    gone: usize,
    /// Counts up when a task is finished or cannot be.
    generation: u64,
    /// Counts up when there may be more to fetch, and how many threads wait for that.
    work: u64,
    idle: usize,
    /// Counts up to end every wait for a failed source.
    kicks: u64,
}

/// Registers ranges for missing pages, from the outside or the inside.
///
/// # Errors
/// When a range is not mapped, of a kind that cannot be registered, or another userfaultfd's; some may be registered.
pub fn register(uffd: &Userfault, ranges: &[LazyRange]) -> io::Result<()> {
    ranges.iter().try_for_each(|range| {
        uffd.register(range.start, range.pages * PAGE_SIZE as u64, RegisterMode::MISSING)
            .map(drop)
    })
}

impl LazyServer {
    /// A server that reads single pages for faults from `fault_source` and the rest from `bulk_source`: the same source, or
    /// two connections to it, so that no fault waits behind bulk data.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn new(
        config: LazyConfig,
        fault_source: Arc<dyn PageSource>,
        bulk_source: Arc<dyn PageSource>,
    ) -> Result<Self, LazyError> {
        let config = LazyConfig {
            fault_threads: config.fault_threads.max(1),
            unit_pages: config.unit_pages.max(1),
            ..config
        };
        let shared = Arc::new(Shared {
            config,
            fault_source,
            bulk_source,
            stats: Stats::default(),
            faults_active: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            ids: AtomicU64::new(1),
            board: Mutex::default(),
            changed: Condvar::new(),
            work: Condvar::new(),
        });
        let server = Self { shared };
        for _ in 0..server.shared.config.prefetch_threads {
            let shared = Arc::clone(&server.shared);
            server
                .shared
                .spawn("lazy-prefetch", move || crate::prefetch::run(&shared))
                .map_err(|source| LazyError::System {
                    what: "start a thread",
                    pid: 0,
                    source,
                })?;
        }
        Ok(server)
    }

    /// Serves a task. Its `ranges` must be registered for missing pages with `uffd` (see [`register`]), with the features
    /// EVENT_FORK, EVENT_REMAP, EVENT_REMOVE and EVENT_UNMAP on: without them a child would read zeros, and the map would
    /// go wrong unnoticed. `pid` is for messages only.
    ///
    /// # Errors
    /// When the ranges are malformed or a thread cannot be started. The descriptor then stays open on purpose, so
    /// that the task waits instead of reading zeros; end the task.
    pub fn add_task(&self, uffd: OwnedFd, pid: u32, ranges: &[LazyRange]) -> Result<(), LazyError> {
        match RegionMap::from_ranges(ranges.iter().copied()) {
            Ok(map) => self.add_map(uffd, pid, map),
            Err(source) => {
                let _ = uffd.into_raw_fd();
                Err(LazyError::Ranges { pid, source })
            }
        }
    }

    /// Serves a task of which part may be there already, and which another server may have served before.
    ///
    /// # Errors
    /// As [`LazyServer::add_task`].
    pub fn add_map(&self, uffd: OwnedFd, pid: u32, known: impl Into<Known>) -> Result<(), LazyError> {
        self.shared.start_task(pid, uffd.into(), known.into())
    }

    /// Waits until every task is complete or gone. With a `timeout`, only so long.
    ///
    /// # Errors
    /// [`LazyError::Task`] as soon as one task cannot be completed (the others are still served), and
    /// [`LazyError::Incomplete`] when the time is over.
    pub fn wait_complete(&self, timeout: Option<Duration>) -> Result<Progress, LazyError> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let generation = self.shared.generation();
            if let Some((pid, source)) = self.failures().into_iter().next() {
                return Err(LazyError::Task { pid, source });
            }
            let progress = self.progress();
            if progress.active == 0 {
                return Ok(progress);
            }
            let left = deadline.map_or(Duration::from_secs(1), |at| {
                at.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return Err(LazyError::Incomplete {
                    missing: progress.missing,
                });
            }
            self.shared
                .wait_for_change(generation, left.min(Duration::from_secs(1)));
        }
    }

    /// The tasks that cannot be completed, and why.
    pub fn failures(&self) -> Vec<(u32, TaskFailure)> {
        let failure = |task: &Arc<Task>| match &task.lock().status {
            TaskStatus::Failed(failure) => Some((task.pid, failure.clone())),
            _ => None,
        };
        self.shared.tasks().iter().filter_map(failure).collect()
    }

    /// How far the server is.
    pub fn progress(&self) -> Progress {
        let (tasks, mut progress) = {
            let board = self.shared.board();
            let progress = Progress {
                complete: board.complete,
                gone: board.gone,
                ..Progress::default()
            };
            (board.tasks.clone(), progress)
        };
        progress.active = tasks.len();
        for task in tasks {
            let state = task.lock();
            progress.pages += state.map.pages();
            progress.missing += state.map.count(PageStatus::Missing) + state.map.count(PageStatus::InFlight);
        }
        progress.stats = self.shared.stats.snapshot();
        progress
    }

    /// Tries failed reads again at once: the link is back.
    pub fn retry_now(&self) {
        self.shared.board().kicks += 1;
        for task in self.shared.tasks() {
            let now = Instant::now();
            task.lock().delayed.iter_mut().for_each(|(when, _)| *when = now);
        }
        self.shared.changed.notify_all();
    }

    /// Ends all threads and hands back the tasks that still need pages. Waits for reads under way, so their sources must
    /// not block for ever.
    pub fn stop(self) -> Vec<Unfinished> {
        self.shared.halt()
    }
}

impl Drop for LazyServer {
    fn drop(&mut self) {
        for left in self.shared.halt() {
            tracing::error!(
                pid = left.pid,
                "lazy server dropped with pages missing; the task waits for ever"
            );
            // Closed, it would let the task read zeros.
            let _ = left.uffd.into_raw_fd();
        }
    }
}

impl Shared {
    pub(crate) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(crate) fn tasks(&self) -> Vec<Arc<Task>> {
        self.board().tasks.clone()
    }

    fn generation(&self) -> u64 {
        self.board().generation
    }

    /// Tells idle prefetch threads to look again. Nobody else is woken for it: this comes with every fault.
    pub(crate) fn wake_prefetch(&self) {
        let mut board = self.board();
        board.work += 1;
        if board.idle > 0 {
            self.work.notify_all();
        }
    }

    pub(crate) fn work(&self) -> u64 {
        self.board().work
    }

    /// Waits until there may be more to fetch than at `work`.
    pub(crate) fn wait_for_work(&self, work: u64, timeout: Duration) {
        let mut board = self.board();
        board.idle += 1;
        let same = |board: &mut Board| board.work == work && !self.stopping();
        let woken = self.work.wait_timeout_while(board, timeout, same);
        woken.unwrap_or_else(PoisonError::into_inner).0.idle -= 1;
    }

    /// Waits until something changes after `generation`.
    fn wait_for_change(&self, generation: u64, timeout: Duration) {
        let board = self.board();
        let same = |board: &mut Board| board.generation == generation && !self.stopping();
        drop(
            self.changed
                .wait_timeout_while(board, timeout, same)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Waits for a failed source; [`LazyServer::retry_now`] and [`LazyServer::stop`] end the wait.
    pub(crate) fn sleep(&self, delay: Duration) {
        let board = self.board();
        let kicks = board.kicks;
        let same = |board: &mut Board| board.kicks == kicks && !self.stopping();
        drop(
            self.changed
                .wait_timeout_while(board, delay, same)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Reads a claim, and holds the source to its contract.
    pub(crate) fn read(&self, source: &dyn PageSource, claim: &Claim, data: &mut [u8]) -> io::Result<Vec<PageState>> {
        let states = source.read_pages(claim.object, claim.run, data)?;
        if states.len() as u64 != claim.run.pages {
            let message = format!(
                "source told of {} pages when asked for {}",
                states.len(),
                claim.run.pages
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(states)
    }

    pub(crate) fn start_task(self: &Arc<Self>, pid: u32, uffd: Userfault, known: Known) -> Result<(), LazyError> {
        let system = |what| move |source| LazyError::System { what, pid, source };
        // If anything fails below, this second descriptor keeps the pages waiting.
        let spare = OwnedFd::from(uffd);
        let uffd = spare.try_clone().map_err(system("duplicate the userfaultfd"));
        let task = uffd.and_then(|uffd| {
            let id = self.ids.fetch_add(1, Ordering::Relaxed);
            Task::new(id, pid, uffd.into(), known).map_err(system("prepare the userfaultfd"))
        });
        let task = match task {
            Ok(task) => Arc::new(task),
            Err(error) => {
                let _ = spare.into_raw_fd();
                return Err(error);
            }
        };
        self.board().tasks.push(Arc::clone(&task));
        for thread in 0..self.config.fault_threads {
            let (shared, serving) = (Arc::clone(self), Arc::clone(&task));
            match self.spawn("lazy-fault", move || crate::fault::run(&shared, &serving)) {
                Err(source) if thread == 0 => {
                    let _ = spare.into_raw_fd();
                    return Err(LazyError::System {
                        what: "start a thread",
                        pid,
                        source,
                    });
                }
                // The first thread can do it alone.
                Err(error) => tracing::warn!(pid, %error, "cannot start another fault thread"),
                Ok(()) => {}
            }
        }
        // Nothing may be missing from the start.
        task.finish_if_done(&mut task.lock());
        self.note_progress(&task);
        self.wake_prefetch();
        Ok(())
    }

    /// Takes a task off the list once it is finished, and tells who waits for that.
    pub(crate) fn note_progress(&self, task: &Arc<Task>) {
        let status = {
            let state = task.lock();
            match state.status {
                TaskStatus::Active => return,
                _ => state.status.clone(),
            }
        };
        let mut board = self.board();
        if let Some(at) = board.tasks.iter().position(|other| other.id == task.id) {
            match status {
                TaskStatus::Complete => board.complete += 1,
                TaskStatus::Gone => board.gone += 1,
                _ => {
                    // Failed: it stays, and who waits shall hear of it.
                    board.generation += 1;
                    self.changed.notify_all();
                    return;
                }
            }
            board.tasks.swap_remove(at);
            board.generation += 1;
            self.changed.notify_all();
        }
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self, name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = std::thread::Builder::new()
            .name(name.into())
            .stack_size(256 << 10)
            .spawn(body)?;
        let mut board = self.board();
        board.threads.retain(|thread| !thread.is_finished());
        board.threads.push(thread);
        Ok(())
    }

    fn halt(&self) -> Vec<Unfinished> {
        self.stopping.store(true, Ordering::Release);
        loop {
            let (tasks, threads) = {
                let mut board = self.board();
                board.generation += 1;
                (board.tasks.clone(), std::mem::take(&mut board.threads))
            };
            self.changed.notify_all();
            self.work.notify_all();
            tasks.iter().for_each(|task| task.stop.raise());
            if threads.is_empty() {
                break;
            }
            for thread in threads {
                if thread.join().is_err() {
                    tracing::error!("a thread of the lazy server panicked");
                }
            }
        }
        let tasks = std::mem::take(&mut self.board().tasks);
        let unfinished = tasks.into_iter().filter_map(|task| {
            let mut state = task.lock();
            state.map.settle();
            let map = state.map.clone();
            match task.duplicate_uffd() {
                Ok(uffd) if state.live() => Some(Unfinished {
                    pid: task.pid,
                    uffd,
                    map,
                }),
                _ => None,
            }
        });
        unfinished.collect()
    }
}
