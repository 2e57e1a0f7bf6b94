//! Pre-copy: rounds while the tree runs, and what of its memory is left for the freeze.

use std::time::Instant;

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageSink};
use whimbrel_page_server::transport::PageSender;

use super::look::{Looked, LookedTask, read_ids};
use super::pages::PageService;
use super::{Migration, Stage};
use crate::dump::FrozenTree;
use crate::dump::collect::{Collected, Prepared, TaskMemory};
use crate::dump::memory::write_running as send_pages;
use crate::dump::runs::RunSet;
use crate::dump::track;
use crate::error::{Context, Error, Result};
use crate::migrate::Mode;
use crate::migrate::policy::{self, Decision, Observation};
use crate::migrate::report::{Round, ms};
use crate::procfs;
use crate::resource::mem::pages::Pages;
use crate::restore;

/// Most rounds between the last look at the tree and the freeze.
const LAST_ROUNDS: u32 = 2;

/// A tree whose memory is on its way.
pub struct Rounds {
    /// The tree, as it was seen in the beginning, and what of its memory has been sent.
    pub looked: Looked,
    /// The next round.
    pub number: u32,
    /// Pages that the last round sent.
    previous: Option<u64>,
    /// Looked up before the last rounds, so that nothing is written meanwhile that the freeze has to send.
    pub prepared: Option<Prepared>,
    /// Rounds that are left once `prepared` is there.
    left: u32,
    /// The connections over which the rest is to follow on demand; with `None`, nothing is to follow.
    pub follow: Option<PageService>,
}

impl Migration<'_> {
    /// From the preflight to the first round, or straight to the freeze where rounds are not wanted or not possible.
    pub fn begin_rounds(&mut self, mut looked: Looked) -> Result<Stage> {
        let mode = self.options.limits.mode;
        let tracked = looked.tasks.iter().any(|task| task.tracker.is_some());
        if mode == Mode::PostCopy {
            // What is there is looked up while it runs; the freeze then only asks what changed.
            looked.tasks.iter_mut().try_for_each(look_ahead)?;
        }
        let rounds = Rounds {
            looked,
            number: 1,
            previous: None,
            prepared: None,
            left: LAST_ROUNDS,
            follow: None,
        };
        match mode {
            Mode::PostCopy => self.then_follow(rounds),
            Mode::Hybrid if !tracked => self.then_follow(rounds),
            Mode::PreCopy if !tracked => Ok(Stage::Freeze(rounds)),
            Mode::PreCopy | Mode::Hybrid => Ok(Stage::Round(rounds)),
        }
    }

    /// To the freeze; what is left then follows on demand.
    fn then_follow(&mut self, mut rounds: Rounds) -> Result<Stage> {
        // Made ahead, so that neither the freeze nor the first fault waits for handshakes.
        let mut pages = match self.pages.take() {
            Some(pages) => pages,
            None => PageService::open(self.endpoint, self.options.destination, self.request.session_id)?,
        };
        pages.connect(self.endpoint);
        rounds.follow = Some(pages);
        Ok(Stage::Freeze(rounds))
    }

    /// Sends a round, and decides what comes next.
    pub fn round(&mut self, mut rounds: Rounds) -> Result<Stage> {
        let limits = &self.options.limits;
        let started = Instant::now();
        for task in &mut rounds.looked.tasks {
            self.check_cancelled()?;
            send_round(task, &self.sender, &|| self.check_cancelled())?;
        }
        let stats = self.sender.finish_round().context("send a round")?;
        let round = Round {
            pages: stats.pages,
            raw_bytes: stats.pages * PAGE_SIZE as u64,
            wire_bytes: stats.wire_bytes,
            ms: ms(started.elapsed()),
        };
        self.observer.round(rounds.number, &round);
        self.report.rounds.push(round);
        let sent_pages = stats.pages + stats.zero_pages;
        let seen = Observation {
            round: rounds.number,
            sent_pages,
            took: started.elapsed(),
            previous_pages: rounds.previous.replace(sent_pages),
        };
        rounds.number += 1;
        if rounds.prepared.is_some() {
            rounds.left -= 1;
            return if rounds.left == 0 || sent_pages <= policy::FEW {
                Ok(Stage::Freeze(rounds))
            } else {
                Ok(Stage::Round(rounds))
            };
        }
        match policy::decide(seen, limits) {
            Decision::Again => Ok(Stage::Round(rounds)),
            Decision::Freeze => {
                // The look takes a while: what is written meanwhile goes in a round more, or two.
                rounds.prepared = Some(Prepared::look_tracked(self.options.pid)?);
                Ok(Stage::Round(rounds))
            }
            Decision::FreezeAndFollow => self.then_follow(rounds),
            Decision::GiveUp => Err(Error::new("migrate")
                .task(self.options.pid)
                .because(format!(
                    "it writes memory faster than it can be sent, and a downtime of {:?} cannot be met",
                    limits.max_downtime
                ))
                .hint("use --mode hybrid, or a larger --max-downtime")),
        }
    }
}

/// Finds what a task has, to be carried later.
fn look_ahead(task: &mut LookedTask) -> Result<()> {
    if let Some(look) = look_at(task)? {
        task.owed = look.dirty;
    }
    Ok(())
}

/// What a task wrote since it was last looked at; `None` when it is not watched, or has ended: the freeze will see what became
/// of the tree.
fn look_at(task: &mut LookedTask) -> Result<Option<track::Look>> {
    let Some(tracker) = &mut task.tracker else {
        return Ok(None);
    };
    let maps = procfs::read(task.pid, "maps").and_then(|text| procfs::maps::parse(&text));
    match maps.and_then(|maps| tracker.look(&maps)) {
        Ok(look) => Ok(Some(look)),
        Err(_) if has_ended(task.pid) => Ok(None),
        Err(error) => Err(error),
    }
}

fn has_ended(pid: i32) -> bool {
    read_ids(pid).map_or(true, |(stat, _)| matches!(stat.state, b'Z' | b'X'))
}

/// Sends what a task wrote since the last round.
fn send_round(task: &mut LookedTask, sender: &PageSender, go_on: &dyn Fn() -> Result<()>) -> Result<()> {
    let Some(look) = look_at(task)? else { return Ok(()) };
    // What an earlier attempt found and did not deliver is still owed.
    let dirty = look
        .dirty
        .union(&task.owed.intersect(&look.watched).subtract(&look.gone));
    let gone = vanished(task, &look);
    task.owed = dirty.clone();
    let object = MemoryObject::Task(task.inner);
    let mut sink = sender.clone();
    for run in gone.runs() {
        sink.zero_pages(object, run).context("send zero pages")?;
    }
    match send_pages(task.pid, object, &dirty, &mut sink, go_on) {
        Err(_) if has_ended(task.pid) => go_on()?,
        sent => sent?,
    }
    task.sent = task.sent.subtract(&gone).union(&dirty);
    task.owed = RunSet::default();
    Ok(())
}

/// Pages that the destination holds and that read as zeros now, or are mapped no more.
fn vanished(task: &LookedTask, look: &track::Look) -> RunSet {
    task.sent
        .intersect(&look.gone)
        .union(&task.sent.subtract(&look.watched))
}

/// Sends what the rounds did not deliver; with `follow`, tells instead which pages are to follow.
pub fn send_last(
    looked: &mut Looked,
    frozen: &FrozenTree,
    sender: &PageSender,
    follow: bool,
) -> Result<Vec<(u32, RunSet)>> {
    let mut lazy = Vec::new();
    for memory in &frozen.collected.memory {
        let task = looked.tasks.iter_mut().find(|task| task.pid == memory.pid);
        let (eager, later) = select_last(task, memory, &frozen.collected, follow)?;
        let mut sink = sender.clone();
        let (eager, gone) = eager;
        for run in gone.runs() {
            sink.zero_pages(memory.object, run).context("send zero pages")?;
        }
        send_pages(memory.pid, memory.object, &eager, &mut sink, &|| Ok(()))?;
        if let MemoryObject::Task(pid) = memory.object
            && !later.is_empty()
        {
            lazy.push((pid, later));
        }
    }
    let mut sink = sender.clone();
    frozen.collected.segments.dump(&mut sink)?;
    Ok(lazy)
}

/// Pages of a frozen task that must be sent now (with those that became zero), and those that may follow.
fn select_last(
    task: Option<&mut LookedTask>,
    memory: &TaskMemory,
    collected: &Collected,
    follow: bool,
) -> Result<((RunSet, RunSet), RunSet)> {
    let maps = procfs::maps::parse(&procfs::read(memory.pid, "maps")?)?;
    let reader = Pages::open(memory.pid)?;
    let mut ranges = RunSet::from_ranges(memory.ranges.clone());
    let (mut needed, mut gone) = (RunSet::default(), RunSet::default());
    if let Some(task) = task
        && let Some(tracker) = &mut task.tracker
    {
        let look = tracker.last_look(&maps)?;
        needed = look
            .dirty
            .union(&task.owed.intersect(&look.watched).subtract(&look.gone));
        gone = vanished(task, &look);
        ranges = ranges.subtract(&look.watched);
    }
    // What was not watched goes whole.
    let mut own = Vec::new();
    for &(start, end) in ranges.ranges() {
        reader.own(start, end, &mut own)?;
    }
    needed = needed.union(&RunSet::from_runs(&own));
    if !follow {
        return Ok(((needed, gone), RunSet::default()));
    }
    let candidates = collected
        .task_of(memory.object)
        .map_or_else(RunSet::default, restore::lazy::candidates);
    let later = needed.intersect(&candidates);
    Ok(((needed.subtract(&later), gone), later))
}
