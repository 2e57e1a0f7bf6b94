//! Background fetch: a few threads for all tasks, each with one small read on its way, so that together they keep the link
//! busy without a fault ever queueing behind much.
//!
//! What was touched last comes first, with what lies behind it; then an ascending sweep. Tasks take turns.

use std::sync::Arc;
use std::time::{Duration, Instant};

use whimbrel_images::page::{PAGE_SIZE, PageRun, PageState};

use crate::fault::clear_the_way;
use crate::regions::Claim;
use crate::server::{Shared, SourceFailure};
use crate::stats::add;
use crate::task::{Placed, State, Task};

const PAGE: u64 = PAGE_SIZE as u64;
/// Pages put in place with the lock held once; a fault waits no longer than that for the lock.
const PLACE_PAGES: u64 = 16;
/// How far behind a fault its neighbourhood reaches, in units.
const AHEAD: u64 = 4;
/// How long a thread holds back in favour of faults before its next read.
const YIELD: Duration = Duration::from_micros(300);
/// An idle thread looks for work this often even if nobody tells it of any.
const IDLE: Duration = Duration::from_millis(100);

/// Runs until the server stops.
pub(crate) fn run(shared: &Arc<Shared>) {
    let mut buffer = vec![0; (shared.config.unit_pages * PAGE) as usize];
    let (mut turn, mut failures) = (0usize, 0u32);
    while !shared.stopping() {
        let work = shared.work();
        let tasks = shared.tasks();
        let picked = (0..tasks.len()).find_map(|offset| {
            let task = &tasks[(turn + offset) % tasks.len()];
            pick(&mut task.lock(), shared.config.unit_pages).map(|claim| (task, claim))
        });
        turn = turn.wrapping_add(1);
        let Some((task, claim)) = picked else {
            drop(tasks);
            shared.wait_for_work(work, IDLE);
            continue;
        };
        yield_to_faults(shared);
        match fetch(shared, task, &claim, &mut buffer) {
            Ok(()) => failures = 0,
            Err(error) => {
                add(&shared.stats.source_failures, 1);
                let failure = SourceFailure {
                    pid: task.pid,
                    address: claim.address,
                    attempt: failures,
                    error: &error,
                };
                let delay = (shared.config.on_source_failure)(&failure);
                failures = failures.saturating_add(1);
                drop(tasks);
                shared.sleep(delay);
            }
        }
    }
}

/// Fetches what lies around a fault, once; for servers that fetch nothing in the background.
pub(crate) fn around(shared: &Arc<Shared>, task: &Arc<Task>, address: u64) {
    let bytes = shared.config.around_pages * PAGE;
    if bytes == 0 {
        return;
    }
    let start = address / bytes * bytes;
    // Behind the fault first: programs mostly go upwards.
    for (from, to) in [(address, start.saturating_add(bytes)), (start, address)] {
        let claim = {
            let mut state = task.lock();
            if !state.live() || !state.ready.is_empty() {
                return;
            }
            state.map.claim(from, to, shared.config.around_pages)
        };
        let Some(claim) = claim else { continue };
        let mut buffer = vec![0; claim.run.bytes() as usize];
        if fetch(shared, task, &claim, &mut buffer).is_err() {
            // Nobody waits for these pages; a fault will try again.
            add(&shared.stats.source_failures, 1);
            return;
        }
    }
}

/// Takes the next unit of a task.
fn pick(state: &mut State, unit_pages: u64) -> Option<Claim> {
    if !state.live() {
        return None;
    }
    let unit = unit_pages * PAGE;
    while let Some(&hint) = state.hints.front() {
        let start = hint / unit * unit;
        if let Some(claim) = state.map.claim(start, start.saturating_add(AHEAD * unit), unit_pages) {
            return Some(claim);
        }
        state.hints.pop_front();
    }
    let cursor = state.cursor;
    let claim = state
        .map
        .claim(cursor, u64::MAX, unit_pages)
        .or_else(|| state.map.claim(0, cursor, unit_pages))?;
    state.cursor = claim.address + claim.run.bytes();
    Some(claim)
}

/// Reads a claim and puts it in place. On an error the claim is given back.
fn fetch(shared: &Arc<Shared>, task: &Arc<Task>, claim: &Claim, buffer: &mut [u8]) -> std::io::Result<()> {
    let data = &mut buffer[..claim.run.bytes() as usize];
    let result = shared.read(&*shared.bulk_source, claim, data);
    let result = result.and_then(|states| place(shared, task, claim, data, &states));
    if result.is_err() {
        task.lock().map.release(claim);
    }
    shared.note_progress(task);
    result
}

fn place(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    claim: &Claim,
    data: &[u8],
    states: &[PageState],
) -> std::io::Result<()> {
    let mut from = 0;
    while from < claim.run.pages {
        let pages = PLACE_PAGES.min(claim.run.pages - from);
        let offset = from * PAGE;
        let run = PageRun {
            start: claim.run.start + offset,
            pages,
        };
        let part = Claim {
            address: claim.address + offset,
            run,
            ..*claim
        };
        let bytes = &data[offset as usize..(offset + pages * PAGE) as usize];
        let placed = {
            let mut state = task.lock();
            task.place(
                &mut state,
                &part,
                bytes,
                &states[from as usize..(from + pages) as usize],
                true,
            )
        };
        match placed {
            Placed::Done { pages: filled, zeros } => {
                add(&shared.stats.prefetched, filled);
                add(&shared.stats.zeros, zeros);
                from += pages;
            }
            Placed::Again if shared.stopping() => return Ok(()),
            Placed::Again => clear_the_way(shared, task),
            Placed::NoSpace => return Err(std::io::Error::from_raw_os_error(libc::ENOMEM)),
        }
    }
    Ok(())
}

/// Holds back while faults are being answered, but not for ever: a task that faults all the time needs its memory too.
fn yield_to_faults(shared: &Shared) {
    let start = Instant::now();
    while shared.faults_active.load(std::sync::atomic::Ordering::Relaxed) > 0 && start.elapsed() < YIELD {
        std::thread::sleep(Duration::from_micros(100));
    }
}
