//! The fault loop: blocking threads that read events and answer faults, with no hand-over in between.
//!
//! A task has a few such threads. One at a time has the turn and waits for events; what it reads goes into the task's
//! queue, it takes the first fault and gives up the turn, and the next thread takes the next fault or waits for
//! events. So a fault that takes long (a slow source) blocks neither the faults behind it nor a fork or munmap,
//! and a fault is answered by the thread that read it.
//!
//! A source that fails never holds a thread: the fault is put aside until its next try.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use whimbrel_images::page::{PAGE_SIZE, PageState};

use crate::ioctl::{Event, Stop, StopSignal, wait_readable};
use crate::journal::Change;
use crate::regions::{Claim, PageStatus};
use crate::server::{Shared, SourceFailure};
use crate::stats::add;
use crate::task::{Fault, Known, Placed, State, Task, TaskFailure, TaskStatus};

const PAGE: u64 = PAGE_SIZE as u64;
/// How often a thread that lingers looks whether the server stops.
const LINGER: Duration = Duration::from_millis(20);
/// How often a thread with nothing to do looks whether the task still exists.
const LIVENESS: Duration = Duration::from_millis(500);

/// Runs until the task is complete, gone or the server stops.
pub(crate) fn run(shared: &Arc<Shared>, task: &Arc<Task>) {
    crate::ioctl::run_first();
    while let Some(fault) = next(shared, task) {
        shared.faults_active.fetch_add(1, Ordering::Relaxed);
        if fault.attempt == 0 {
            add(&shared.stats.faults, 1);
        }
        serve(shared, task, fault);
        shared.faults_active.fetch_sub(1, Ordering::Relaxed);
        if !shared.config.prefetching() {
            crate::prefetch::around(shared, task, fault.address);
        }
        shared.note_progress(task);
    }
    shared.note_progress(task);
    linger(shared, task);
}

/// Answers a complete task until the server ends: see [`TaskStatus::Complete`]. Nothing of it is unknown any more, so what is
/// not there is zeros; and it waits until its forks and munmaps are taken note of.
fn linger(shared: &Shared, task: &Task) {
    if task.lock().status != TaskStatus::Complete {
        return;
    }
    // One thread is enough. Whoever has the turn now does it, or comes here next.
    let Some(_turn) = task.turn.try_take() else { return };
    let Ok(never) = StopSignal::new() else { return };
    let mut events = Vec::new();
    while !shared.stopping() {
        match wait_readable(&task.uffd, &never, Some(LINGER)) {
            Ok((true, _)) => {}
            Ok((false, _)) => continue,
            Err(_) => return,
        }
        match task.uffd.read_events(&mut events) {
            Ok(0) => Task::pause(),
            Ok(_) => {}
            Err(_) => return,
        }
        for event in events.drain(..) {
            match event {
                Event::Fault { address, .. } => {
                    let page = address & !(PAGE - 1);
                    if task.uffd.zeropage(page, PAGE, true).stop.is_some() {
                        // There already, or an event is in the way: the thread shall look again.
                        let _ = task.uffd.wake(page, PAGE);
                    }
                }
                // The child of a complete task is complete: without a descriptor it is let go.
                Event::Fork { child } => drop(child),
                _ => {}
            }
        }
    }
}

/// The next fault to answer; `None` when the task needs no thread any more.
fn next(shared: &Arc<Shared>, task: &Arc<Task>) -> Option<Fault> {
    let turn = task.turn.take();
    loop {
        let mut timeout = LIVENESS;
        {
            let mut state = task.lock();
            if shared.stopping() || !state.live() {
                return None;
            }
            let now = Instant::now();
            let due = state.delayed.iter().position(|(when, _)| *when <= now);
            if let Some(fault) = due
                .map(|at| state.delayed.swap_remove(at).1)
                .or_else(|| state.ready.pop_front())
            {
                let alone = state.ready.is_empty() && state.delayed.is_empty();
                drop(state);
                if alone && fault.attempt == 0 {
                    turn.leave_for_a_moment();
                }
                return Some(fault);
            }
            if let Some(when) = state.delayed.iter().map(|(when, _)| *when).min() {
                timeout = timeout.min(when - now);
            }
        }
        match wait_readable(&task.uffd, &task.stop, Some(timeout)) {
            Ok((_, true)) => return None,
            Ok((true, _)) => {
                drain(shared, task);
            }
            Ok((false, _)) => {
                task.check_alive();
                shared.note_progress(task);
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                task.lock().fail(TaskFailure::Events { errno });
                return None;
            }
        }
    }
}

/// Reads and applies what waits on the userfaultfd. Returns whether anything came.
pub(crate) fn drain(shared: &Arc<Shared>, task: &Arc<Task>) -> bool {
    let (children, any) = task.read_events();
    for child in children {
        add(&shared.stats.forks, 1);
        if let Some(hook) = &shared.config.on_fork {
            hook(
                task.pid,
                child.uffd.as_fd(),
                child.journal.as_ref().map(|&(number, _)| number),
            );
        }
        let known = Known {
            map: child.map,
            journal: child.journal.map(|(_, journal)| journal),
            ..Known::default()
        };
        if let Err(error) = shared.start_task(task.pid, child.uffd, known) {
            // The descriptor was kept open by start_task, so the child waits for its pages instead of reading zeros.
            tracing::error!(pid = task.pid, %error, "cannot serve a forked child");
        }
    }
    any
}

/// After EAGAIN: reads the event that is in the way, or gives the task a moment to go on.
pub(crate) fn clear_the_way(shared: &Arc<Shared>, task: &Arc<Task>) {
    if !drain(shared, task) {
        Task::pause();
    }
}

fn serve(shared: &Arc<Shared>, task: &Arc<Task>, fault: Fault) {
    loop {
        let mut state = task.lock();
        if !state.live() || shared.stopping() {
            // The thread shall look again, and ask anew if it must.
            let _ = task.uffd.wake(fault.address & !(PAGE - 1), PAGE);
            return;
        }
        if !task.settled(&mut state) {
            drop(state);
            clear_the_way(shared, task);
            continue;
        }
        let Some(page) = state.map.page(fault.address) else {
            match outside(task, &mut state, fault.address) {
                Outside::Grown => continue,
                Outside::Settled => return,
                Outside::Again => {
                    drop(state);
                    clear_the_way(shared, task);
                    continue;
                }
            }
        };
        match page.status {
            PageStatus::Present => {
                let _ = task.uffd.wake(fault.address, PAGE);
                return answered(shared, fault);
            }
            PageStatus::Zero => match task.fill(&mut state, fault.address, 1, None) {
                Ok(_) => {
                    add(&shared.stats.zeros, 1);
                    return answered(shared, fault);
                }
                Err(stop) => {
                    drop(state);
                    if stop == Placed::NoSpace {
                        return retry(shared, task, fault, &std::io::Error::from_raw_os_error(libc::ENOMEM));
                    }
                    clear_the_way(shared, task);
                }
            },
            PageStatus::Missing | PageStatus::InFlight => {
                if !state.urgent.insert((page.object, page.source)) {
                    // Another thread fetches this very page for a fault, and its answer wakes this one too.
                    return;
                }
                state.map.set(fault.address, fault.address + PAGE, PageStatus::InFlight);
                let run = whimbrel_images::page::PageRun {
                    start: page.source,
                    pages: 1,
                };
                let claim = Claim {
                    address: fault.address,
                    object: page.object,
                    run,
                    flags: page.flags,
                };
                drop(state);
                return fetch(shared, task, fault, &claim);
            }
        }
    }
}

/// Fetches one page and wakes the thread that waits for it.
fn fetch(shared: &Arc<Shared>, task: &Arc<Task>, fault: Fault, claim: &Claim) {
    let mut data = [0; PAGE_SIZE];
    let result = shared.read(&*shared.fault_source, claim, &mut data);
    let result = match result {
        Ok(states) => fill(shared, task, fault, claim, &data, &states),
        Err(error) => Err(error),
    };
    let mut state = task.lock();
    state.urgent.remove(&(claim.object, claim.run.start));
    match result {
        Ok(()) => {
            state.hint(fault.address);
            drop(state);
            shared.wake_prefetch();
            answered(shared, fault);
        }
        Err(error) => {
            state.map.release(claim);
            drop(state);
            retry(shared, task, fault, &error);
        }
    }
}

fn fill(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    fault: Fault,
    claim: &Claim,
    data: &[u8],
    states: &[PageState],
) -> std::io::Result<()> {
    loop {
        let mut state = task.lock();
        match task.place(&mut state, claim, data, states, false) {
            Placed::Done { pages, zeros } => {
                add(&shared.stats.fault_pages, pages);
                add(&shared.stats.zeros, zeros);
                let settled = || state.map.page(fault.address).is_none_or(|page| page.status.settled());
                if pages == 0 && (!state.live() || settled()) {
                    // The page was moved, dropped or filled meanwhile: the thread shall look again.
                    let _ = task.uffd.wake(fault.address, PAGE);
                }
                return Ok(());
            }
            Placed::Again if shared.stopping() => return Ok(()),
            Placed::Again => {
                drop(state);
                clear_the_way(shared, task);
            }
            Placed::NoSpace => return Err(std::io::Error::from_raw_os_error(libc::ENOMEM)),
        }
    }
}

fn answered(shared: &Shared, fault: Fault) {
    shared.stats.latency.record(fault.since.elapsed());
}

/// Puts a fault aside until its next try. The thread that caused it goes on waiting.
fn retry(shared: &Arc<Shared>, task: &Arc<Task>, fault: Fault, error: &std::io::Error) {
    add(&shared.stats.source_failures, 1);
    let failure = SourceFailure {
        pid: task.pid,
        address: fault.address,
        attempt: fault.attempt,
        error,
    };
    let delay = (shared.config.on_source_failure)(&failure);
    let again = Fault {
        attempt: fault.attempt.saturating_add(1),
        ..fault
    };
    let mut state = task.lock();
    if state.live() {
        state.delayed.push((Instant::now() + delay, again));
    } else {
        let _ = task.uffd.wake(fault.address & !(PAGE - 1), PAGE);
    }
}

enum Outside {
    /// The page is in the map now.
    Grown,
    /// Nothing is to be done, or nothing can be.
    Settled,
    /// Events are to be read first.
    Again,
}

/// A fault outside the map: a registered mapping that grew (mremap in place, a stack), which the kernel does not
/// report. Grown memory is zeros, but only that: the page must lie in one mapping with pages that are known.
fn outside(task: &Task, state: &mut State, address: u64) -> Outside {
    let connected = |start: u64, end: u64| task.uffd.within_one_anonymous_mapping(start, end - start);
    let (before, after) = state.map.neighbours(address);
    let mut answer = Ok(false);
    if let Some(before) = before {
        answer = connected(before - PAGE, address + PAGE);
        if answer == Ok(true) {
            let (start, end, like) = (before, address + PAGE, before - PAGE);
            state.change(Change::Grow { start, end, like });
            return Outside::Grown;
        }
    }
    if let (Ok(false), Some(after)) = (answer, after) {
        answer = connected(address, after + PAGE);
        if answer == Ok(true) {
            let (start, end, like) = (address, after, after);
            state.change(Change::Grow { start, end, like });
            return Outside::Grown;
        }
    }
    if answer == Ok(false) {
        answer = connected(address, address + PAGE);
    }
    match answer {
        // Unmapped after the fault was read: the thread shall see that for itself.
        Ok(false) => {
            let _ = task.uffd.wake(address, PAGE);
        }
        Err(Stop::Again) => return Outside::Again,
        Err(Stop::Gone) => task.end(state, TaskStatus::Gone),
        Ok(true) | Err(_) => {
            let failure = TaskFailure::OutsideFault { address };
            tracing::error!(pid = task.pid, %failure, "cannot answer a page fault");
            state.fail(failure);
        }
    }
    Outside::Settled
}
