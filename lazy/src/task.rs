//! One address space being filled: its map, its userfaultfd, and the rule that keeps both in step.
//!
//! The rule: events are *read and applied* under the lock of [`State`], and pages are filled under it too. While an event
//! waits to be read the kernel refuses to fill pages (EAGAIN), and once it is read the task goes on, for instance to drop
//! the pages that it told of. So whoever finds a page waiting in the map, with the lock held, and fills it, either
//! comes before the change in the kernel too, or is refused. Without the lock a page could be filled with old bytes
//! right after the task dropped it.

use std::collections::{HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageState};

use crate::ioctl::{CopyMode, Event, FaultFlags, Stop, StopSignal, Userfault};
use crate::journal::{Change, Journal, apply};
use crate::regions::{Claim, PageStatus, RegionMap};
use crate::turn::Turn;

const PAGE: u64 = PAGE_SIZE as u64;
/// Faults are remembered this far back to guess what is needed next.
const HINTS: usize = 32;

/// What keeps a task from being filled completely.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TaskFailure {
    /// The source does not know the bytes of a page, and the page is not one that may be zeros for that.
    #[error("the source does not know page {source_address:#x} of {object:?}; whoever touches {address:#x} waits")]
    UnknownPage {
        /// Where the page is in the task.
        address: u64,
        /// The object that the page comes from.
        object: MemoryObject,
        /// Its address there.
        source_address: u64,
    },
    /// A thread waits for a page that nobody told of.
    #[error("fault at {address:#x}, outside every lazy range; the thread waits")]
    OutsideFault {
        /// Address of the access.
        address: u64,
    },
    /// The kernel refused to fill a page for a reason that trying again does not cure.
    #[error("cannot fill page {address:#x}: {}", std::io::Error::from_raw_os_error(*errno))]
    Fill {
        /// Address of the page.
        address: u64,
        /// Error number.
        errno: i32,
    },
    /// The userfaultfd cannot be read, so faults and forks go unseen.
    #[error("cannot read userfaultfd: {}", std::io::Error::from_raw_os_error(*errno))]
    Events {
        /// Error number.
        errno: i32,
    },
}

/// How far a task is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskStatus {
    /// Pages are still missing.
    Active,
    /// Every page is there. Its ranges stay registered, and it is listened to, until the server ends and its descriptor
    /// is closed: to unregister what we know of a mapping could split it, where it has grown meanwhile, and its owner
    /// would notice (mremap(2) fails on a range of two mappings). Closing takes the whole address space in one step.
    Complete,
    /// The address space ended (exit or execve) before it was complete.
    Gone,
    /// Something is wrong; pages that can be filled still are.
    Failed(TaskFailure),
}

/// A fault that waits for its answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) address: u64,
    pub(crate) since: Instant,
    pub(crate) attempt: u32,
}

pub(crate) struct State {
    pub(crate) map: RegionMap,
    pub(crate) status: TaskStatus,
    /// Faults to be answered now, and those whose source failed, with the time of the next try.
    pub(crate) ready: VecDeque<Fault>,
    pub(crate) delayed: Vec<(Instant, Fault)>,
    /// Pages that a fault thread is fetching: a second fault on one needs no fetch of its own.
    pub(crate) urgent: HashSet<(MemoryObject, u64)>,
    /// Where faults happened, the latest first, and where the ascending sweep stands.
    pub(crate) hints: VecDeque<u64>,
    pub(crate) cursor: u64,
    /// Parts of the map that may or may not be unmapped; see [`RegionMap::unmapped`].
    doubtful: Vec<(u64, u64)>,
    events: Vec<Event>,
    journal: Option<Arc<dyn Journal>>,
}

impl State {
    /// Changes the map, and notes it.
    pub(crate) fn change(&mut self, change: Change) {
        apply(&mut self.map, &mut self.doubtful, change);
        if let Some(journal) = &self.journal {
            journal.changed(&[change]);
        }
    }

    /// Whether there is still something to do.
    pub(crate) fn live(&self) -> bool {
        matches!(self.status, TaskStatus::Active | TaskStatus::Failed(_))
    }

    pub(crate) fn hint(&mut self, address: u64) {
        self.hints.push_front(address);
        self.hints.truncate(HINTS);
    }

    /// Records a failure; the first one stays.
    pub(crate) fn fail(&mut self, failure: TaskFailure) {
        if self.status == TaskStatus::Active {
            self.status = TaskStatus::Failed(failure);
        }
    }
}

/// A descriptor that serves a forked child, and the child's map.
pub(crate) struct Child {
    pub(crate) uffd: Userfault,
    pub(crate) map: RegionMap,
    pub(crate) journal: Option<(u64, Arc<dyn Journal>)>,
}

/// What is known of the memory of a task that a server begins with.
#[derive(Default)]
pub struct Known {
    /// Each page.
    pub map: RegionMap,
    /// Parts of the map that may or may not be unmapped; see [`RegionMap::unmapped`].
    pub doubtful: Vec<(u64, u64)>,
    /// Where changes are noted.
    pub journal: Option<Arc<dyn Journal>>,
}

impl From<RegionMap> for Known {
    fn from(map: RegionMap) -> Self {
        Self { map, ..Self::default() }
    }
}

/// What came of filling pages.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Placed {
    /// As many pages were filled, as many of them zeros.
    Done { pages: u64, zeros: u64 },
    /// Events must be read first; then fill the rest.
    Again,
    /// No memory for pages just now.
    NoSpace,
}

pub(crate) struct Task {
    pub(crate) id: u64,
    pub(crate) pid: u32,
    pub(crate) uffd: Userfault,
    pub(crate) stop: StopSignal,
    /// Whoever has it is the one thread that waits for events.
    pub(crate) turn: Turn,
    state: Mutex<State>,
}

impl Task {
    pub(crate) fn new(id: u64, pid: u32, uffd: Userfault, known: Known) -> std::io::Result<Self> {
        uffd.set_nonblocking()?;
        let state = State {
            map: known.map,
            status: TaskStatus::Active,
            ready: VecDeque::new(),
            delayed: Vec::new(),
            urgent: HashSet::new(),
            hints: VecDeque::new(),
            cursor: 0,
            doubtful: known.doubtful,
            events: Vec::new(),
            journal: known.journal,
        };
        let state = Mutex::new(state);
        Ok(Self {
            id,
            pid,
            uffd,
            stop: StopSignal::new()?,
            turn: Turn::default(),
            state,
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn duplicate_uffd(&self) -> std::io::Result<OwnedFd> {
        use std::os::fd::AsFd;
        self.uffd.as_fd().try_clone_to_owned()
    }

    /// Reads what waits on the userfaultfd and applies it. Returns children that were forked, and whether anything came.
    pub(crate) fn read_events(&self) -> (Vec<Child>, bool) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut events = std::mem::take(&mut state.events);
        if let Some(journal) = &state.journal {
            journal.reading();
        }
        if let Err(error) = self.uffd.read_events(&mut events) {
            state.fail(TaskFailure::Events {
                errno: error.raw_os_error().unwrap_or(libc::EIO),
            });
        }
        let any = !events.is_empty();
        let now = Instant::now();
        let mut children = Vec::new();
        let mut changes = Vec::new();
        for event in events.drain(..) {
            let change = match event {
                Event::Fault { address, flags, .. } if flags.0 & (FaultFlags::WP | FaultFlags::MINOR).0 != 0 => {
                    // Nobody asked for these here; let the thread go rather than hang it.
                    tracing::warn!(pid = self.pid, address, ?flags, "unexpected kind of page fault");
                    let page = address & !(PAGE - 1);
                    let _ = self.uffd.write_protect(page, PAGE, false);
                    let _ = self.uffd.wake(page, PAGE);
                    continue;
                }
                Event::Fault { address, .. } => {
                    state.ready.push_back(Fault {
                        address: address & !(PAGE - 1),
                        since: now,
                        attempt: 0,
                    });
                    continue;
                }
                Event::Fork { child } => {
                    let journal = state.journal.as_ref().map(|journal| journal.child());
                    let number = journal.as_ref().map_or(0, |&(number, _)| number);
                    children.push(Child {
                        uffd: child.into(),
                        map: state.map.fork(),
                        journal,
                    });
                    Change::Fork { child: number }
                }
                Event::Remap { from, to, len } => Change::Remap { from, to, len },
                Event::Remove { start, end } => Change::Remove { start, end },
                Event::Unmap { start, end } => Change::Unmapped { start, end },
                Event::Other(kind) => {
                    tracing::warn!(pid = self.pid, kind, "unknown userfaultfd event");
                    continue;
                }
            };
            apply(&mut state.map, &mut state.doubtful, change);
            changes.push(change);
        }
        if let Some(journal) = &state.journal {
            journal.changed(&changes);
        }
        state.events = events;
        self.finish_if_done(state);
        if !state.live() {
            self.let_go(state);
        }
        (children, any)
    }

    /// Brings the map in line with the address space after events that were read in another order than they happened.
    /// Returns whether it is.
    ///
    /// When no event waits to be read, everything that happened was reported. Until then no page may be filled: the map may
    /// be wrong.
    pub(crate) fn settled(&self, state: &mut State) -> bool {
        if !state.map.unsettled() && state.doubtful.is_empty() {
            return true;
        }
        if self.uffd.changing() {
            return false;
        }
        if state.map.unsettled() {
            state.change(Change::Promoted);
        }
        while let Some(&(start, end)) = state.doubtful.last() {
            match self.uffd.is_registered(start, PAGE) {
                Ok(true) => state.change(Change::Kept { start, end }),
                Ok(false) => state.change(Change::Unmap { start, end }),
                Err(Stop::Gone) => {
                    self.end(state, TaskStatus::Gone);
                    return false;
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// Fills the waiting pages of `claim` with what the source said. Pages filled before are left alone, so after
    /// [`Placed::Again`] the same call goes on where it stopped.
    ///
    /// With `lazily`, pages of zeros are only noted, not put in place: they cost nothing until they are touched.
    pub(crate) fn place(
        &self,
        state: &mut State,
        claim: &Claim,
        data: &[u8],
        states: &[PageState],
        lazily: bool,
    ) -> Placed {
        if !self.settled(state) {
            return if state.live() {
                Placed::Again
            } else {
                Placed::Done { pages: 0, zeros: 0 }
            };
        }
        let (mut pages, mut zeros) = (0, 0);
        for destination in state.map.destinations_of(claim) {
            let (mut at, end) = (destination.offset, destination.offset + destination.pages);
            while at < end && state.live() {
                let kind = effective(states[at as usize], claim);
                let same = states[at as usize..end as usize]
                    .iter()
                    .take_while(|&&s| effective(s, claim) == kind);
                let count = same.count() as u64;
                let address = destination.address + (at - destination.offset) * PAGE;
                match kind {
                    PageState::Data => {
                        let bytes = &data[(at * PAGE) as usize..((at + count) * PAGE) as usize];
                        match self.fill(state, address, count, Some(bytes)) {
                            Ok(filled) => pages += filled,
                            Err(stop) => return stop,
                        }
                    }
                    PageState::Zero if lazily => {
                        state.map.set(address, address + count * PAGE, PageStatus::Zero);
                        zeros += count;
                    }
                    PageState::Zero => match self.fill(state, address, count, None) {
                        Ok(filled) => zeros += filled,
                        Err(stop) => return stop,
                    },
                    PageState::Unknown => {
                        // The page stays in flight: it is not fetched again, and not filled.
                        state.map.set(address, address + count * PAGE, PageStatus::InFlight);
                        let source_address = claim.run.start + at * PAGE;
                        let failure = TaskFailure::UnknownPage {
                            address,
                            object: claim.object,
                            source_address,
                        };
                        tracing::error!(pid = self.pid, %failure, "lazy page is unknown");
                        state.fail(failure);
                    }
                }
                at += count;
            }
        }
        self.finish_if_done(state);
        Placed::Done {
            pages: pages + zeros,
            zeros,
        }
    }

    /// Fills pages, with `bytes` or zeros, and wakes who waits for them. They must be in the map.
    pub(crate) fn fill(
        &self,
        state: &mut State,
        address: u64,
        count: u64,
        bytes: Option<&[u8]>,
    ) -> Result<u64, Placed> {
        let (mut done, len) = (0, count * PAGE);
        // Shorter than what remains when the pages turn out to lie in more than one mapping (mprotect splits them).
        let mut step = len;
        let mut filled = 0;
        while done < len {
            let (at, size) = (address + done, step.min(len - done));
            let fill = match bytes {
                Some(bytes) => self
                    .uffd
                    .copy(at, &bytes[done as usize..(done + size) as usize], CopyMode::NONE),
                None => self.uffd.zeropage(at, size, true),
            };
            state.map.set(at, at + fill.bytes, PageStatus::Present);
            done += fill.bytes;
            filled += fill.bytes / PAGE;
            let at = address + done;
            match fill.stop {
                None => step = len,
                Some(Stop::Partial) => {}
                Some(Stop::Exists) => {
                    // Filled through another mapping of the same object, or by the kernel when the page was swapped in.
                    state.map.set(at, at + PAGE, PageStatus::Present);
                    let _ = self.uffd.wake(at, PAGE);
                    done += PAGE;
                }
                Some(Stop::NotRegistered) if size > PAGE => step = (size / PAGE).div_ceil(2) * PAGE,
                Some(Stop::NotRegistered) => {
                    if self.uffd.changing() {
                        return Err(Placed::Again);
                    }
                    // No event tells of it, so this page never was ours: a child did not inherit it.
                    let (start, end) = (at, at + PAGE);
                    state.change(Change::Unmap { start, end });
                    let _ = self.uffd.wake(at, PAGE);
                    done += PAGE;
                }
                Some(Stop::Again) => return Err(Placed::Again),
                Some(Stop::NoSpace) => return Err(Placed::NoSpace),
                Some(Stop::Gone) => {
                    self.end(state, TaskStatus::Gone);
                    return Ok(filled);
                }
                Some(Stop::Other(errno)) => {
                    state.map.set(at, at + PAGE, PageStatus::InFlight);
                    state.fail(TaskFailure::Fill { address: at, errno });
                    return Ok(filled);
                }
            }
        }
        Ok(filled)
    }

    /// Ends the task when nothing is missing any more.
    pub(crate) fn finish_if_done(&self, state: &mut State) {
        if !self.settled(state) {
            return;
        }
        let waiting = state.map.count(PageStatus::Missing) + state.map.count(PageStatus::InFlight);
        // A failed task may get here too: the page that nobody knows was unmapped or overwritten as a whole.
        let stuck = matches!(&state.status, TaskStatus::Failed(failure) if !curable(failure));
        if !state.live() || waiting > 0 || stuck {
            return;
        }
        state.change(Change::Complete);
        self.end(state, TaskStatus::Complete);
        self.let_go(state);
    }

    /// Lets those look again who wait for pages of a task that is not served any more.
    fn let_go(&self, state: &mut State) {
        let delayed = state.delayed.drain(..).map(|(_, fault)| fault);
        for fault in state.ready.drain(..).chain(delayed) {
            let _ = self.uffd.wake(fault.address & !(PAGE - 1), PAGE);
        }
    }

    /// Looks whether the address space still exists; it may end without anybody filling a page.
    pub(crate) fn check_alive(&self) {
        let mut state = self.lock();
        let Some(&(start, _)) = state.map.spans().first() else {
            return;
        };
        // Fills nothing in anonymous memory; in shared memory it maps a page that is there anyway.
        if state.live() && self.uffd.within_one_anonymous_mapping(start, PAGE) == Err(Stop::Gone) {
            self.end(&mut state, TaskStatus::Gone);
        }
    }

    pub(crate) fn end(&self, state: &mut State, status: TaskStatus) {
        state.status = status;
        self.stop.raise();
    }

    /// Waits a moment when the kernel said EAGAIN although no event was to be read: the task is just going on.
    pub(crate) fn pause() {
        std::thread::sleep(Duration::from_micros(20));
    }
}

/// A page that the source does not know is zeros if its mapping says so.
fn effective(state: PageState, claim: &Claim) -> PageState {
    match state {
        PageState::Unknown if claim.flags.absent_is_zero => PageState::Zero,
        state => state,
    }
}

fn curable(failure: &TaskFailure) -> bool {
    matches!(failure, TaskFailure::UnknownPage { .. } | TaskFailure::Fill { .. })
}
