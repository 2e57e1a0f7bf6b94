//! The source's half of a migration.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageSink, PageSource};
use whimbrel_images::store::{ImageStore, MemStore};
use whimbrel_page_server::proto::{Role, SessionId};
use whimbrel_page_server::transport::{Endpoint, FaultServer, PageSender, Runtime, Session, SessionRequest};

use super::journal::{Decision as Recorded, Journal};
use super::policy::{self, Decision, Limits, Observation};
use super::report::{Followed, Report, Round, ms};
use super::wire::{self, Begin, Body, Final, LazyPages, NeededFile, TaskShape};
use super::{Mode, Phase};
use crate::dump::collect::{Collected, Prepared, TaskMemory};
use crate::dump::lazy::{FrozenPages, StoppedTree};
use crate::dump::memory::write_running as send_pages;
use crate::dump::runs::RunSet;
use crate::dump::track::{self, Tracker};
use crate::dump::{self, FrozenTree};
use crate::error::{Context, Error, Result};
use crate::kernel::address::{MovedAddress, Removed};
use crate::kernel::nft::NetworkLock;
use crate::kernel::sys;
use crate::procfs::{self, maps::Mapping};
use crate::remote::inject::GadgetCache;
use crate::resource::mem::{mapping, pages::Pages};
use crate::restore;
use crate::tree::TreeImage;

/// How often a running tree is looked at before what seems impossible to carry is taken to be so.
const LOOKS: u32 = 5;
/// How often a destination that did not answer is asked what became of the tree.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The root of the tree.
    pub pid: i32,
    /// Where it goes.
    pub destination: SocketAddr,
    /// How memory travels, and when rounds end.
    pub limits: Limits,
    /// What of the tree is carried.
    pub dump: dump::Options,
    /// An address that moves along: `10.0.0.2/24`; empty for none.
    pub move_address: String,
    /// The device that it is on, here and there; empty to find it.
    pub move_device: String,
    /// Only look whether it would work.
    pub dry_run: bool,
    /// Where the decision is written.
    pub journal: Journal,
    /// A scripted action at CRIU's named moments, if any.
    pub hooks: Hooks,
}

/// What is called at named moments: `network-lock`, `pre-resume` and so on.
#[derive(Clone, Default)]
pub struct Hooks(pub Option<Hook>);

/// A function of the moment's name.
pub type Hook = Arc<dyn Fn(&str) -> Result<()> + Send + Sync>;

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hooks({})", self.0.is_some())
    }
}

impl Hooks {
    fn call(&self, moment: &str) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |hook| hook(moment))
    }
}

/// Shows progress, and asks for an end.
pub trait Observer: Send + Sync {
    /// A phase begins.
    fn phase(&self, phase: Phase);
    /// A round ended.
    fn round(&self, number: u32, round: &Round);
    /// Has the user cancelled? Asked between steps until Commit.
    fn cancelled(&self) -> bool;
}

/// What became of it.
#[derive(Debug)]
pub enum Outcome {
    /// A dry run: every reason why it would not work.
    Looked(Vec<String>),
    /// The tree runs there.
    Moved(Box<Report>),
}

/// Moves a tree. Must be called on a thread of its own: it traces.
///
/// # Errors
/// Before Commit: the tree goes on here, and nothing is left there. After it: only when the destination says that the
/// tree never ran (it goes on here then), or when the outcome cannot be learned (it stays stopped, and the error says so).
pub fn run(runtime: &Runtime, endpoint: &Endpoint, options: &Options, observer: &dyn Observer) -> Result<Outcome> {
    let started = Instant::now();
    recover(runtime, endpoint, options)?;
    observer.phase(Phase::Preflight);
    let looked = Looked::look(options)?;
    let request = SessionRequest {
        role: Role::Migrate,
        session_id: SessionId::random(),
    };
    let session = runtime
        .block_on(async { endpoint.connect(options.destination).await?.open(request).await })
        .with(|| Error::new("connect to the destination").object(options.destination.to_string()))?;
    let mut migration = Migration {
        runtime,
        endpoint,
        options,
        observer,
        session,
        request,
        report: Report::default(),
    };
    let result = migration.run(looked);
    match &result {
        Ok(_) => migration.report.total_ms = ms(started.elapsed()),
        Err(error) => {
            // Whoever fails last speaks last: a destination that failed has said so, and knows.
            let _ = migration.session.send_message_blocking(wire::encode(Body::Abort(true)));
            migration.session.abort(&error.chain());
        }
    }
    result.map(|outcome| match outcome {
        Outcome::Moved(_) => Outcome::Moved(Box::new(std::mem::take(&mut migration.report))),
        looked => looked,
    })
}

/// What is seen of a tree while it runs.
struct Looked {
    tasks: Vec<LookedTask>,
    begin: Begin,
}

struct LookedTask {
    pid: i32,
    inner: u32,
    tracker: Option<Box<dyn Tracker>>,
    /// Pages that the destination holds as they were at the last look.
    sent: RunSet,
    /// Pages whose last known contents the destination does not have.
    owed: RunSet,
}

impl Looked {
    /// Looks at a tree that runs on: what is being made or taken down just then can seem impossible to carry. Only what
    /// stays so is an error.
    fn look(options: &Options) -> Result<Looked> {
        let mut looks = 0;
        let mut looked = loop {
            looks += 1;
            match Looked::once(options) {
                Ok(looked) => break looked,
                Err(error) if looks == LOOKS => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        if options.limits.mode != Mode::PostCopy && !options.dry_run {
            looked.watch();
        }
        Ok(looked)
    }

    fn watch(&mut self) {
        let mut cache = GadgetCache::default();
        for task in &mut self.tasks {
            match track::start(task.pid, &mut cache) {
                Ok(tracker) => task.tracker = Some(tracker),
                // Without a tracker all of it is sent in the freeze: slower, not wrong.
                Err(error) => {
                    tracing::warn!(error = error.chain(), "memory is not watched: no rounds for this task")
                }
            }
        }
    }

    fn once(options: &Options) -> Result<Looked> {
        let mut looked = Looked {
            tasks: Vec::new(),
            begin: Begin::default(),
        };
        let begin = &mut looked.begin;
        begin.dry_run = options.dry_run;
        begin.tcp_established = options.dump.tcp_established;
        (begin.move_address, begin.move_device) = (options.move_address.clone(), String::new());
        begin.cpu_state = crate::arch::cpu_state_components();
        let mut queue = std::collections::VecDeque::from([(options.pid, 0u32)]);
        let mut files: HashMap<String, NeededFile> = HashMap::new();
        let mut collected = Collected::default();
        while let Some((pid, parent)) = queue.pop_front() {
            let (stat, status) = match read_ids(pid) {
                Ok(ids) => ids,
                Err(error) if pid == options.pid => return Err(error.hint("there is no such process: check the pid")),
                Err(_) => continue,
            };
            let inner = |ids: &[i32], outer: i32| ids.last().copied().unwrap_or(outer) as u32;
            let entry = whimbrel_images::proto::PstreeEntry {
                pid: inner(&status.ns_pid, pid),
                ppid: parent,
                pgid: inner(&status.ns_pgid, stat.pgrp),
                sid: inner(&status.ns_sid, stat.session),
                threads: Vec::new(),
            };
            let zombie = matches!(stat.state, b'Z' | b'X');
            let mut shape = TaskShape {
                zombie,
                ..TaskShape::default()
            };
            let number = entry.pid;
            shape.entry = Some(entry);
            if pid == options.pid {
                begin.name = format!("{} (pid {pid})", String::from_utf8_lossy(&stat.comm));
            }
            if !zombie {
                let maps = procfs::maps::parse(&procfs::read(pid, "smaps")?)?;
                describe_memory(pid, &maps, &stat, &mut shape, begin, &mut files)?;
                let pidfd = sys::pidfd_open(pid).with(|| Error::new("open a pidfd").task(pid))?;
                let highest = collected.look_at_running(pid, pidfd.as_fd())?;
                begin.highest_descriptor = begin.highest_descriptor.max(highest);
                looked.tasks.push(LookedTask {
                    pid,
                    inner: number,
                    tracker: None,
                    sent: RunSet::default(),
                    owed: RunSet::default(),
                });
                queue.extend(crate::tree::children_of(pid)?.into_iter().map(|child| (child, number)));
            }
            begin.tasks.push(shape);
        }
        begin.files = files.into_values().collect();
        // All at once: the other end of a socket may be in another task.
        check_files(&collected, options, begin)?;
        Ok(looked)
    }
}

fn read_ids(pid: i32) -> Result<(procfs::stat::Stat, procfs::status::Status)> {
    Ok((
        procfs::stat::parse(&procfs::read(pid, "stat")?)?,
        procfs::status::parse(&procfs::read(pid, "status")?)?,
    ))
}

/// Pages that the destination holds and that read as zeros now, or are mapped no more.
fn vanished(task: &LookedTask, look: &track::Look) -> RunSet {
    task.sent
        .intersect(&look.gone)
        .union(&task.sent.subtract(&look.watched))
}

/// Mappings of a task, what they need of the other host, and whether all of them can be carried.
fn describe_memory(
    pid: i32,
    maps: &[Mapping],
    stat: &procfs::stat::Stat,
    shape: &mut TaskShape,
    begin: &mut Begin,
    files: &mut HashMap<String, NeededFile>,
) -> Result<()> {
    for map in maps {
        let (vma, backing) =
            mapping::describe(map, (stat.start_brk, stat.start_brk)).map_err(|error| error.task(pid))?;
        if track::is_staged(map) {
            shape.staged.push(shape.vmas.len() as u32);
        }
        begin.memory += map.rss + map.swap;
        shape.vmas.push(vma);
        let deleted = map.name.ends_with(b" (deleted)");
        if backing == mapping::Backing::File && !deleted {
            let path = String::from_utf8_lossy(&map.name).into_owned();
            if let std::collections::hash_map::Entry::Vacant(empty) = files.entry(path.clone()) {
                let handle = std::fs::File::open(format!("/proc/{pid}/map_files/{:x}-{:x}", map.start, map.end));
                if let Ok(file) = handle {
                    let size = file.metadata().map_or(0, |meta| meta.len());
                    let build_id = crate::resource::fd::regular::build_id(&file.into());
                    empty.insert(NeededFile { path, size, build_id });
                }
            }
        }
    }
    Ok(())
}

/// Whether all descriptors of a running tree can be carried, and what they need of the other host.
fn check_files(collected: &Collected, options: &Options, begin: &mut Begin) -> Result<()> {
    collected.check_files(&MemStore::new(), &options.dump)?;
    for connection in collected.connections()? {
        let text = connection.local.ip().to_canonical().to_string();
        if !begin.addresses.contains(&text) {
            begin.addresses.push(text);
        }
    }
    Ok(())
}

struct Migration<'a> {
    runtime: &'a Runtime,
    endpoint: &'a Endpoint,
    options: &'a Options,
    observer: &'a dyn Observer,
    session: Session,
    request: SessionRequest,
    report: Report,
}

impl Migration<'_> {
    fn run(&mut self, mut looked: Looked) -> Result<Outcome> {
        self.send(Body::Begin(looked.begin.clone()))?;
        let blockers = match self.receive("await the destination's preflight")? {
            Body::Ready(ready) => ready.blockers,
            other => return Err(unexpected(&other)),
        };
        if self.options.dry_run {
            return Ok(Outcome::Looked(blockers));
        }
        if let Some(first) = blockers.first() {
            let all = if blockers.len() == 1 {
                first.clone()
            } else {
                blockers.join("; and ")
            };
            return Err(Error::new("migrate")
                .task(self.options.pid)
                .because(format!("the destination cannot take it: {all}")));
        }
        let sender = self.session.page_sender();
        let follow = self.rounds(&mut looked, &sender)?;
        self.cut_over(looked, &sender, follow)?;
        Ok(Outcome::Moved(Box::default()))
    }

    fn send(&self, body: Body) -> Result<()> {
        self.session
            .send_message_blocking(wire::encode(body))
            .context("tell the destination")
    }

    fn receive(&self, what: &str) -> Result<Body> {
        let message = self.session.recv_message_blocking().context(what)?;
        let message = message.ok_or_else(|| Error::new(what).because("the destination ended the session"))?;
        match wire::decode(&message)? {
            Body::Failed(failed) => {
                Err(Error::new("migrate").because(format!("the destination failed: {}", failed.reason)))
            }
            body => Ok(body),
        }
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.observer.cancelled() {
            Err(Error::new("migrate").because("cancelled"))
        } else {
            Ok(())
        }
    }

    /// Pre-copy; tells whether the rest is to follow on demand.
    fn rounds(&mut self, looked: &mut Looked, sender: &PageSender) -> Result<bool> {
        let limits = &self.options.limits;
        if limits.mode == Mode::PostCopy {
            return Ok(true);
        }
        if looked.tasks.iter().all(|task| task.tracker.is_none()) {
            return Ok(limits.mode == Mode::Hybrid);
        }
        let mut previous = None;
        for number in 1.. {
            self.observer.phase(Phase::Round(number));
            let started = Instant::now();
            for task in &mut looked.tasks {
                self.check_cancelled()?;
                send_round(task, sender, &|| self.check_cancelled())?;
            }
            let stats = sender.finish_round().context("send a round")?;
            let round = Round {
                pages: stats.pages,
                raw_bytes: stats.pages * PAGE_SIZE as u64,
                wire_bytes: stats.wire_bytes,
                ms: ms(started.elapsed()),
            };
            self.observer.round(number, &round);
            self.report.rounds.push(round);
            let sent_pages = stats.pages + stats.zero_pages;
            let seen = Observation {
                round: number,
                sent_pages,
                took: started.elapsed(),
                previous_pages: previous,
            };
            previous = Some(sent_pages);
            match policy::decide(seen, limits) {
                Decision::Again => {}
                Decision::Freeze => return Ok(false),
                Decision::FreezeAndFollow => return Ok(true),
                Decision::GiveUp => {
                    let cause = format!(
                        "it writes memory faster than it can be sent, and a downtime of {:?} cannot be met",
                        limits.max_downtime
                    );
                    return Err(Error::new("migrate")
                        .task(self.options.pid)
                        .because(cause)
                        .hint("use --mode hybrid, or a larger --max-downtime"));
                }
            }
        }
        Ok(false)
    }

    /// From the freeze to the end. Every early return lets the tree go on here.
    fn cut_over(&mut self, mut looked: Looked, sender: &PageSender, follow: bool) -> Result<()> {
        self.check_cancelled()?;
        let prepared = Prepared::look_tracked(self.options.pid)?;
        self.observer.phase(Phase::Freeze);
        let frozen = dump::freeze(self.options.pid, prepared, &self.options.dump)?;
        let since = frozen.since;
        (self.report.frozen.freeze_ms, self.report.frozen.collect_ms) =
            (ms(frozen.times.freezing), ms(frozen.times.collecting));
        self.check_cancelled()?;

        let started = Instant::now();
        self.options.hooks.call("network-lock")?;
        let mut lock = NetworkLock::new_in_current_netns().context("lock the network")?;
        let connections = frozen.collected.connections()?;
        if !connections.is_empty() {
            lock.lock(&connections).context("lock the network")?;
        }
        let store = MemStore::new();
        frozen.collected.check_files(&store, &self.options.dump)?;
        let files = frozen.collected.dump_files(&store, &self.options.dump)?;
        self.report.frozen.files_ms = ms(started.elapsed());

        self.observer.phase(Phase::Final);
        let started = Instant::now();
        let lazy = send_last(&mut looked, &frozen, sender, follow)?;
        let tasks = frozen.collected.tasks.clone();
        let inventory = TreeImage::new_inventory(&tasks.first().map(|task| task.ids).unwrap_or_default());
        TreeImage {
            inventory,
            tasks,
            files,
        }
        .save(&store)?;
        for name in store.list().context("list images")? {
            let bytes = store.take(&name).unwrap_or_default();
            self.session.send_blob_blocking(&name, bytes).context("send an image")?;
        }
        let stats = sender.finish_round().context("send the last pages")?;
        self.report.last = Round {
            pages: stats.pages,
            raw_bytes: stats.pages * PAGE_SIZE as u64,
            wire_bytes: stats.wire_bytes,
            ms: ms(started.elapsed()),
        };
        let lazy_pages = |(pid, set): &(u32, RunSet)| LazyPages {
            pid: *pid,
            bounds: set.ranges().iter().flat_map(|&(start, end)| [start, end]).collect(),
        };
        self.send(Body::Final(Final {
            lazy: lazy.iter().map(lazy_pages).collect(),
        }))?;
        self.report.frozen.send_ms = ms(started.elapsed());

        let started = Instant::now();
        match self.receive("await the tree's being put together")? {
            Body::Prepared(_) => {}
            other => return Err(unexpected(&other)),
        }
        self.report.frozen.prepare_ms = ms(started.elapsed());
        self.observer.phase(Phase::Prepared);
        self.check_cancelled()?;
        self.commit(frozen, lock, lazy, since)
    }

    /// The decision, and everything after it.
    fn commit(
        &mut self,
        frozen: FrozenTree,
        lock: NetworkLock,
        lazy: Vec<(u32, RunSet)>,
        since: Instant,
    ) -> Result<()> {
        let started = Instant::now();
        let moved = MovedAddress::parse(&self.options.move_address, &self.options.move_device)?;
        let removed = moved.as_ref().map(Removed::remove).transpose()?;
        self.options.hooks.call("pre-resume")?;
        // From here on the tree must not run here by itself, whatever becomes of us: our death ends ptrace stops, but not
        // this one. It does not take effect while we hold the tasks.
        let stopped = StoppedTree::stop(&frozen.tree)?;
        let decision = Recorded {
            session: self.request.session_id.to_string(),
            destination: self.options.destination.to_string(),
            tasks: frozen
                .tree
                .living()
                .map(|task| (task.pid, task.stat.starttime))
                .collect(),
        };
        if let Err(error) = self.options.journal.write(self.options.pid, &decision) {
            stopped.undo();
            return Err(error);
        }
        self.observer.phase(Phase::Commit);
        let before = started.elapsed();
        let mut commit_took = before;
        let told = self
            .send(Body::Commit(true))
            .and_then(|()| self.receive("await that the tree runs"));
        let running = match told {
            Ok(Body::Running(running)) => {
                // Its own time there, and half of what the messages took: not how long we waited for a processor here.
                let there = Duration::from_micros(running.microseconds);
                let path = self.session.path_stats().map_or(Duration::ZERO, |path| path.rtt / 2);
                commit_took = before + there + path;
                Some(running.pid)
            }
            // Nobody knows; never guess.
            _ => self.ask(&decision.session)?,
        };
        let Some(pid) = running else {
            stopped.undo();
            drop((removed, lock, frozen));
            self.options.journal.clear(self.options.pid)?;
            return Err(Error::new("migrate")
                .task(self.options.pid)
                .because("the destination gave the tree up before it ran; it goes on here"));
        };
        self.report.pid_there = pid;
        self.report.frozen.commit_ms = ms(commit_took);
        self.report.frozen.total_ms = ms(started - since + commit_took);
        if let Some(removed) = removed {
            removed.keep();
        }
        if !lazy.is_empty() {
            self.observer.phase(Phase::PostCopy);
            self.follow(&frozen, lazy)?;
        }
        self.finish(frozen, lock)
    }

    /// Asks until the destination says what became of the tree: its pid there, or `None` when it never ran.
    fn ask(&self, session: &str) -> Result<Option<u32>> {
        loop {
            if let Some(running) = ask_once(self.runtime, self.endpoint, self.options.destination, session) {
                return Ok(running.then_some(0));
            }
            std::thread::sleep(ASK_AGAIN);
        }
    }

    /// Serves the missing pages until the destination has them all, over as many connections as it takes.
    fn follow(&mut self, frozen: &FrozenTree, lazy: Vec<(u32, RunSet)>) -> Result<()> {
        let started = Instant::now();
        let source: Arc<dyn PageSource> = Arc::new(FrozenPages::open(frozen, &lazy)?);
        let session_id = self.request.session_id;
        let serving = serve_pages(
            self.runtime,
            self.endpoint,
            self.options.destination,
            session_id,
            source,
        );
        let finished = loop {
            match self.receive("await the end of post-copy") {
                Ok(Body::Finished(finished)) => break Some(finished),
                Ok(_) => continue,
                Err(error) => {
                    // The session may be lost for good while pages still flow; the fault connection tells.
                    tracing::warn!(error = error.chain(), "the session is lost during post-copy");
                    match self.ask_finished() {
                        true => break None,
                        false => std::thread::sleep(ASK_AGAIN),
                    }
                }
            }
        };
        serving.abort();
        let finished = finished.unwrap_or_default();
        self.report.followed = Some(Followed {
            faults: finished.faults,
            pages: finished.pages,
            fault_p50_us: finished.fault_p50,
            fault_p99_us: finished.fault_p99,
            ms: ms(started.elapsed()),
        });
        Ok(())
    }

    fn ask_finished(&self) -> bool {
        let session = self.request.session_id.to_string();
        ask_state(self.runtime, self.endpoint, self.options.destination, &session).is_some_and(|answer| answer.complete)
    }

    /// The tree lives there: what is left of it here goes, without a word to anybody.
    fn finish(&mut self, frozen: FrozenTree, lock: NetworkLock) -> Result<()> {
        frozen.collected.abandon_files()?;
        let FrozenTree { tree, collected, .. } = frozen;
        tree.kill()?;
        // Our duplicates were the last: connections vanish here, still behind the lock.
        drop(collected);
        drop(lock);
        self.options.journal.clear(self.options.pid)?;
        self.observer.phase(Phase::Done);
        self.session.close_blocking().ok();
        Ok(())
    }
}

fn unexpected(body: &Body) -> Error {
    let text = format!("{body:?}");
    Error::new("migrate").because(format!(
        "the destination answered something else than expected: {:.80}",
        text
    ))
}

/// Sends what a task wrote since the last round.
fn send_round(task: &mut LookedTask, sender: &PageSender, go_on: &dyn Fn() -> Result<()>) -> Result<()> {
    let Some(tracker) = &mut task.tracker else {
        return Ok(());
    };
    let maps = match procfs::read(task.pid, "maps").and_then(|text| procfs::maps::parse(&text)) {
        Ok(maps) => maps,
        // It ended; the freeze will see what became of the tree.
        Err(_) => return Ok(()),
    };
    let look = tracker.look(&maps)?;
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
    send_pages(task.pid, object, &dirty, &mut sink, go_on)?;
    task.sent = task.sent.subtract(&gone).union(&dirty);
    task.owed = RunSet::default();
    Ok(())
}

/// Sends what the rounds did not deliver; with `follow`, tells instead which pages are to follow.
fn send_last(
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
        let look = tracker.look(&maps)?;
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

/// Serves pages over as many connections as it takes, until aborted.
fn serve_pages(
    runtime: &Runtime,
    endpoint: &Endpoint,
    destination: SocketAddr,
    session_id: SessionId,
    source: Arc<dyn PageSource>,
) -> tokio::task::JoinHandle<()> {
    let request = SessionRequest {
        role: Role::Faults { initiator_serves: true },
        session_id,
    };
    let endpoint = endpoint.clone();
    runtime.handle().spawn(async move {
        let server = FaultServer::new(source, None);
        loop {
            let link = async { endpoint.connect(destination).await?.open_faults(request).await };
            match link.await {
                Ok(link) => drop(server.serve(link).await),
                Err(error) => tracing::warn!(%error, "the connection for page requests is down; trying again"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
}

/// Finishes what an earlier run of ours decided and did not see through.
fn recover(runtime: &Runtime, endpoint: &Endpoint, options: &Options) -> Result<()> {
    let Some(decision) = options.journal.read(options.pid)? else {
        return Ok(());
    };
    let alive = |&(pid, start): &(i32, u64)| read_ids(pid).is_ok_and(|(stat, _)| stat.starttime == start);
    if !decision.tasks.iter().any(alive) {
        return options.journal.clear(options.pid);
    }
    let destination = decision
        .destination
        .parse()
        .with(|| Error::new("read the decision").object(decision.destination.clone()))?;
    let failed = || {
        Error::new("learn what became of an earlier migration")
            .task(options.pid)
            .object(decision.destination.clone())
            .hint("the tree stays stopped until that host answers: start `whimbrel serve` there again")
    };
    let pids: Vec<i32> = decision
        .tasks
        .iter()
        .filter(|task| alive(task))
        .map(|&(pid, _)| pid)
        .collect();
    match ask_patiently(runtime, endpoint, destination, &decision.session) {
        None => Err(failed().because("it does not answer, or has not decided")),
        Some(answer) if answer.running => {
            if !answer.complete {
                serve_again(runtime, endpoint, destination, &decision.session, &pids)?;
            }
            end_old_copy(&pids)?;
            options.journal.clear(options.pid)?;
            let why = "it runs at the destination already, since an earlier migration; the old copy was ended";
            Err(Error::new("migrate").task(options.pid).because(why))
        }
        Some(_) => {
            for pid in pids {
                sys::kill(pid, libc::SIGCONT).context("let the tree go on")?;
            }
            options.journal.clear(options.pid)
        }
    }
}

/// Asks for as long as a destination keeps a tree whose source it has lost.
fn ask_patiently(
    runtime: &Runtime,
    endpoint: &Endpoint,
    destination: SocketAddr,
    session: &str,
) -> Option<wire::Answer> {
    for _ in 0..60 {
        match ask_state(runtime, endpoint, destination, session) {
            Some(answer) if answer.waiting && !answer.running => std::thread::sleep(ASK_AGAIN),
            answer => return answer,
        }
    }
    None
}

/// Goes on serving the pages of a stopped tree whose server died, until the destination has them all.
fn serve_again(
    runtime: &Runtime,
    endpoint: &Endpoint,
    destination: SocketAddr,
    session: &str,
    pids: &[i32],
) -> Result<()> {
    let mut tasks = Vec::new();
    for &pid in pids {
        let (_, status) = read_ids(pid)?;
        tasks.push((pid, status.ns_pid.last().copied().unwrap_or(pid) as u32));
    }
    let session_id = session.parse().context("read the decision")?;
    let serving = serve_pages(
        runtime,
        endpoint,
        destination,
        session_id,
        Arc::new(FrozenPages::of_stopped(&tasks)?),
    );
    while !ask_state(runtime, endpoint, destination, session).is_some_and(|answer| answer.complete) {
        std::thread::sleep(ASK_AGAIN);
    }
    serving.abort();
    Ok(())
}

/// Ends a stopped tree that lives elsewhere, without a word to its peers.
fn end_old_copy(pids: &[i32]) -> Result<()> {
    use std::os::fd::AsFd;
    let mut held = Vec::new();
    let mut lock = NetworkLock::new_in_current_netns().context("lock the network")?;
    for &pid in pids {
        let mut collected = Collected::default();
        let pidfd = sys::pidfd_open(pid).with(|| Error::new("open a pidfd").task(pid))?;
        collected.look_at_running(pid, pidfd.as_fd())?;
        let connections = collected.connections()?;
        if !connections.is_empty() {
            lock.lock(&connections).context("lock the network")?;
        }
        collected.abandon_files()?;
        held.push((collected, pidfd));
    }
    for &pid in pids {
        sys::kill(pid, libc::SIGKILL).context("end the old copy")?;
    }
    for (_, pidfd) in &held {
        // Readable when the process is gone, and with it its descriptors; ours are closed after that.
        let mut fds = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
        let wait = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        let _ = rustix::event::poll(&mut fds, Some(&wait));
    }
    Ok(())
}

/// Does the tree of a session run there? `None` when nobody answers, or it is still open.
fn ask_once(runtime: &Runtime, endpoint: &Endpoint, destination: SocketAddr, session: &str) -> Option<bool> {
    let answer = ask_state(runtime, endpoint, destination, session)?;
    (!answer.waiting || answer.running).then_some(answer.running)
}

fn ask_state(runtime: &Runtime, endpoint: &Endpoint, destination: SocketAddr, session: &str) -> Option<wire::Answer> {
    let request = SessionRequest {
        role: Role::Migrate,
        session_id: SessionId::random(),
    };
    let asked = runtime.block_on(async {
        let session_there = endpoint.connect(destination).await?.open(request).await?;
        session_there
            .send_message(wire::encode(Body::Query(wire::Query {
                session: session.as_bytes().to_vec(),
            })))
            .await?;
        let answer = session_there.recv_message().await?;
        session_there.close().await.ok();
        Ok::<_, whimbrel_page_server::transport::Error>(answer)
    });
    match wire::decode(&asked.ok()??) {
        Ok(Body::Answer(answer)) => Some(answer),
        _ => None,
    }
}
