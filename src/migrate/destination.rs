//! The destination's half of a migration.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink};
use whimbrel_images::proto::{PstreeEntry, VmaEntry};
use whimbrel_images::store::MemStore;
use whimbrel_page_server::transport::Session;

use super::arrivals::{Arrival, Arrivals};
use super::follow::FaultLinks;
use super::standby::{Standby, StandbySink};
use super::wire::{self, Begin, Body, Failed, Final, Packets, Prepared, Ready, RunningThere};
use crate::dump::runs::RunSet;
use crate::error::{Context, Error, Result};
use crate::kernel::address::{self, MovedAddress};
use crate::kernel::capture::{self, Interest};
use crate::kernel::nft::NetworkLock;
use crate::procfs;
use crate::remote::{Program, RemoteAddr, RemoteMemory};
use crate::resource::Endpoints;
use crate::resource::fd::FileRestore;
use crate::resource::mem::{mapping, mapping::status, pages::Pages, sysv};
use crate::restore::build::Skeleton;
use crate::restore::lazy::{LazyTask, Served};
use crate::restore::memory::Plan;
use crate::restore::state::{Ready as ReadyTree, register_all, watch_all};
use crate::restore::unfinished::Notes;
use crate::restore::{self, Build};
use crate::tree::{TaskImage, TreeImage};

/// Room for pages that wait for their mappings, beyond what the source announced, in bytes.
const EXTRA_ROOM: u64 = 64 << 20;

/// What happens at this destination, for whoever shows it.
pub trait Observer: Send + Sync {
    /// One line about a migration.
    fn note(&self, text: &str);
}

/// Settings of a destination.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the files of the tree are found.
    pub root: PathBuf,
    /// The runtime that drives the endpoint.
    pub runtime: tokio::runtime::Handle,
    /// Where arrivals are noted, so that they are known after a restart.
    pub arrivals: Option<Arrivals>,
}

/// What became of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was only a look.
    Looked,
    /// The tree runs here.
    Running {
        /// Its root, in our pid namespace.
        pid: i32,
    },
    /// It will never run here.
    Discarded,
}

/// Told where a migration stands, for sources that come back and ask.
pub trait Registry: Send + Sync {
    /// A source begins to move this tree (see [`Begin::tree`]). Whatever was begun for it before and does not run has no source
    /// any more: it is given up.
    fn begins(&self, tree: &str);
    /// The tree waits for Commit.
    fn waiting(&self);
    /// Commit has come: noted before the tree runs, so that whoever comes after us can tell that it may.
    ///
    /// # Errors
    /// When it cannot be noted; the tree must not run then.
    fn committed(&self, arrival: &Arrival) -> Result<()>;
    /// The tree runs; part of its memory may still be at the source. Its root is given if that is a child of ours.
    fn running(&self, arrival: &Arrival, root: Option<i32>);
    /// All of its memory is here.
    fn completed(&self, arrival: &Arrival);
    /// It failed. Nothing of a tree that does not run as a whole may be left.
    fn failed(&self);
    /// What is known of another session.
    fn answer(&self, session: &str) -> wire::Answer;
}

/// Serves one migration from its first message to its end. Must be called on a thread of its own: it traces.
///
/// # Errors
/// When it fails before Commit (nothing is left then), or when the memory cannot be completed after it.
pub fn run(
    session: &Session,
    faults: FaultLinks,
    options: &Options,
    registry: &dyn Registry,
    observer: &dyn Observer,
) -> Result<Outcome> {
    let result = serve(session, faults, options, registry, observer);
    if let Err(error) = &result {
        // What was let go of the tree, if anything, ends before the source hears that it may go on there.
        registry.failed();
        let _ = session.send_message_blocking(wire::encode(Body::Failed(Failed { reason: error.chain() })));
        // The source gives up when it has heard it; to go before that would tell it nothing but that we are gone.
        while let Ok(Some(_)) = session.recv_message_blocking() {}
    }
    result
}

fn receive(session: &Session) -> Result<Option<Body>> {
    let message = session.recv_message_blocking().context("hear from the source")?;
    message.map(|bytes| wire::decode(&bytes)).transpose()
}

fn send(session: &Session, body: Body) -> Result<()> {
    session
        .send_message_blocking(wire::encode(body))
        .context("answer the source")
}

fn serve(
    session: &Session,
    mut faults: FaultLinks,
    options: &Options,
    registry: &dyn Registry,
    observer: &dyn Observer,
) -> Result<Outcome> {
    let begin = match receive(session)? {
        Some(Body::Begin(begin)) => begin,
        Some(Body::Query(query)) => {
            let answer = registry.answer(&String::from_utf8_lossy(&query.session));
            send(session, Body::Answer(answer))?;
            session.close_blocking().ok();
            return Ok(Outcome::Looked);
        }
        _ => return Err(Error::new("begin a migration").because("the source began with something else")),
    };
    registry.begins(&begin.tree);
    let blockers = preflight(&begin, options);
    if begin.dry_run || !blockers.is_empty() {
        observer.note(&format!("{}: {} reasons against", begin.name, blockers.len()));
        send(session, Body::Ready(Ready { blockers }))?;
        session.close_blocking().ok();
        return Ok(Outcome::Looked);
    }
    let restore_options = restore::Options {
        root: options.root.clone(),
        tcp_established: begin.tcp_established,
        new_session: true,
        // What a program has open it may use, whatever it could open here; and it is too late to refuse.
        skip_file_modes: true,
        ..restore::Options::default()
    };
    // As everything that can fail with a reason that the user can mend, a taken pid is told as a blocker.
    let (build, sink) = match stage(&begin, restore_options.clone()) {
        Ok(staged) => staged,
        Err(error) => {
            send(
                session,
                Body::Ready(Ready {
                    blockers: vec![error.chain()],
                }),
            )?;
            session.close_blocking().ok();
            return Ok(Outcome::Discarded);
        }
    };
    let moved = MovedAddress::parse(&begin.move_address, &begin.move_device)?;
    faults.expect(session, begin.fault_port);
    let pump = session.receive_into(Box::new(sink.clone()));
    send(session, Body::Ready(Ready::default()))?;
    observer.note(&format!("{}: memory arrives", begin.name));

    let last = match receive(session)? {
        Some(Body::Final(last)) => last,
        Some(Body::Abort(_)) | None => {
            observer.note(&format!("{}: given up by the source", begin.name));
            return Ok(Outcome::Discarded);
        }
        Some(_) => return Err(Error::new("receive a tree").because("the source sent something else than its images")),
    };
    let started = Instant::now();
    let store = MemStore::new();
    for (name, bytes) in session.take_blobs() {
        store.insert(&name, bytes.to_vec()).context("take an image")?;
    }
    let image = TreeImage::load(&store)?;
    // A packet that comes before its socket would be answered with a reset.
    let endpoints = endpoints_of(&image)?;
    let mut lock = lock_connections(&endpoints)?;
    // The address must be here before sockets can be bound to it; it is announced when the tree runs.
    let address = moved.as_ref().map(address::Added::add).transpose()?;
    let build = restage(build, &sink, &begin, &image, &store, &restore_options)?;
    let mut put = put_together(build, &sink, &begin, &image, &store, &restore_options, &last)?;
    put.ready.arm()?;
    // First remembered, then said: the source may ask as soon as it has heard it.
    registry.waiting();
    send(
        session,
        Body::Prepared(Prepared {
            microseconds: started.elapsed().as_micros() as u64,
        }),
    )?;
    observer.note(&format!("{}: put together, waits for the decision", begin.name));
    // Written while the source decides.
    let mut unfinished = Unfinished::note(options, session, &put.lazy)?;

    match receive(session) {
        Ok(Some(Body::Commit(_))) => {}
        Ok(_) => {
            observer.note(&format!("{}: given up by the source", begin.name));
            return Ok(Outcome::Discarded);
        }
        Err(error) => return Err(error),
    }
    let committed = Instant::now();
    let pid = put.ready.root_pid().unwrap_or_default();
    let mut arrival = Arrival::of(put.ready.pids());
    registry.committed(&arrival)?;
    unfinished.may_run = true;
    // Taken away, not dropped: closing its socket waits for a grace period of the kernel, and the tree with it.
    if let Some(lock) = &mut lock {
        lock.unlock().context("unlock the network")?;
    }
    let ran = put.ready.go()?;
    arrival.released = true;
    registry.running(&arrival, Some(pid));
    if let Some(address) = address {
        address.keep_and_announce();
    }
    let microseconds = (ran - committed).as_micros() as u64;
    observer.note(&format!("{}: runs as pid {pid}", begin.name));
    // Whether the source hears it or not, the tree runs: it will ask.
    let told = send(
        session,
        Body::Running(RunningThere {
            pid: pid as u32,
            microseconds,
        }),
    );
    std::thread::scope(|scope| {
        let packets = scope.spawn(|| deliver_packets(session, &endpoints, &begin.name, observer));
        if !put.lazy.is_empty() {
            let finished = faults.follow(
                unfinished.served(put.lazy)?,
                unfinished.notes.clone(),
                &options.runtime,
                observer,
            )?;
            observer.note(&format!("{}: all memory is here", begin.name));
            send(session, Body::Finished(finished)).ok();
        }
        arrival.complete = true;
        registry.completed(&arrival);
        unfinished.may_run = false;
        // Whether the source hears it or not, the tree runs: it will ask.
        told.ok();
        let _ = packets.join();
        Ok::<_, Error>(())
    })?;
    session.close_blocking().ok();
    let _ = pump.finished_blocking();
    Ok(Outcome::Running { pid })
}

/// What is noted about missing memory, for a server after us. Forgotten with this, but for a tree that may run.
struct Unfinished {
    notes: Option<Arc<Notes>>,
    may_run: bool,
}

impl Unfinished {
    fn note(options: &Options, session: &Session, lazy: &[LazyTask]) -> Result<Unfinished> {
        let arrivals = options.arrivals.as_ref().filter(|_| !lazy.is_empty());
        let create = |arrivals: &Arrivals| Notes::create(&arrivals.unfinished(session.request().session_id), lazy);
        Ok(Unfinished {
            notes: arrivals.map(create).transpose()?,
            may_run: false,
        })
    }

    fn served(&self, lazy: Vec<LazyTask>) -> Result<Vec<Served>> {
        let numbered = lazy.into_iter().zip(0..);
        numbered
            .map(|(task, number)| task.served(self.notes.as_ref().map(|notes| (notes, number))))
            .collect()
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(notes) = self.notes.as_ref().filter(|_| !self.may_run) {
            notes.remove();
        }
    }
}

/// Where packets will come in to the tree.
fn endpoints_of(image: &TreeImage) -> Result<Endpoints> {
    let mut endpoints = Endpoints::default();
    for entry in image.files.values() {
        endpoints.extend(crate::resource::fd::kind_of(entry)?.endpoint_of(entry)?);
    }
    Ok(endpoints)
}

/// Keeps packets of the tree's connections away until its sockets are there.
fn lock_connections(endpoints: &Endpoints) -> Result<Option<NetworkLock>> {
    // Datagrams are received as soon as their sockets are there, and wait.
    let connections = endpoints.tcp();
    if connections.is_empty() {
        return Ok(None);
    }
    let mut lock = NetworkLock::new_in_current_netns().context("lock the network")?;
    lock.lock(&connections).context("lock the network")?;
    Ok(Some(lock))
}

/// Delivers what came to the source for the tree, until nothing more is to come.
fn deliver_packets(session: &Session, endpoints: &Endpoints, name: &str, observer: &dyn Observer) {
    let interest = Interest::new(&endpoints.connections, &endpoints.listeners).with_datagrams(&endpoints.datagrams);
    let mut all = 0;
    while let Ok(Some(Body::Packets(Packets { packets, last }))) = receive(session) {
        match capture::deliver(&packets, &interest) {
            Ok(delivered) => all += delivered,
            Err(error) => tracing::warn!(%error, "packets that came to the source are lost"),
        }
        if last {
            break;
        }
    }
    if all > 0 {
        observer.note(&format!(
            "{name}: {all} packets that came to the old place were delivered"
        ));
    }
}

/// Every reason why this tree cannot run here, as far as it can be told without making anything.
fn preflight(begin: &Begin, options: &Options) -> Vec<String> {
    let mut blockers = Vec::new();
    for file in &begin.files {
        let path = options.root.join(file.path.trim_start_matches('/'));
        match std::fs::metadata(&path) {
            Err(error) => blockers.push(format!("file {}: {error}; install it on this host", file.path)),
            Ok(found) if found.is_file() && file.size != found.len() && file.size != 0 => {
                let sizes = format!("{} bytes here, {} at the source", found.len(), file.size);
                blockers.push(format!("file {}: {sizes}; install the same version", file.path));
            }
            Ok(found) if found.is_file() && !file.build_id.is_empty() => {
                let id =
                    std::fs::File::open(&path).map(|opened| crate::resource::fd::regular::build_id(&opened.into()));
                if id.is_ok_and(|id| id != file.build_id) {
                    blockers.push(format!(
                        "file {}: another build id than at the source; install the same version",
                        file.path
                    ));
                }
            }
            Ok(_) => {}
        }
    }
    for task in &begin.tasks {
        let pid = task.entry.as_ref().map_or(0, |entry| entry.pid);
        if std::path::Path::new(&format!("/proc/{pid}")).exists() {
            blockers.push(format!(
                "pid {pid} is in use here; end that process, or serve in a new pid namespace"
            ));
        }
    }
    let places = begin.system_v.iter().map(sysv::find_place);
    blockers.extend(places.filter_map(Result::err).map(|error| error.chain()));
    let available = available_memory();
    if begin.memory > available {
        let (needed, here) = (begin.memory >> 20, available >> 20);
        blockers.push(format!(
            "{needed} MiB of memory are needed and {here} MiB are available"
        ));
    }
    for text in begin
        .addresses
        .iter()
        .filter(|text| !begin.move_address.starts_with(&format!("{text}/")))
    {
        let ours = text
            .parse()
            .is_ok_and(|address: std::net::IpAddr| address.is_loopback() || address::is_local(address));
        if !ours {
            blockers.push(format!(
                "address {text} is not on this host; use --move-address {text}/PREFIX, or add it in an action script"
            ));
        }
    }
    let missing = begin.cpu_state & !crate::arch::cpu_state_components();
    if missing != 0 {
        blockers.push(format!(
            "this processor lacks the state components {missing:#x} that the source's has"
        ));
    }
    if let Err(error) = MovedAddress::parse(&begin.move_address, &begin.move_device) {
        blockers.push(error.chain());
    }
    blockers
}

/// MemAvailable of /proc/meminfo, in bytes.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|value| value.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.map_or(u64::MAX, |kilobytes| kilobytes << 10)
}

/// Creates the tasks and maps what is known of their memory.
fn stage(begin: &Begin, options: restore::Options) -> Result<(Build, StandbySink)> {
    let mut skeleton = Skeleton {
        highest_descriptor: begin.highest_descriptor,
        ..Skeleton::default()
    };
    let mut known = HashSet::from([0]);
    for task in &begin.tasks {
        let entry = task
            .entry
            .clone()
            .ok_or_else(|| Error::new("stage a tree").because("a task has no ids"))?;
        if !known.insert(entry.pid) || !known.contains(&entry.ppid) {
            return Err(Error::new("stage a tree")
                .task(entry.pid as i32)
                .because("its pid or parent is wrong"));
        }
        mapping::validate(&task.vmas)?;
        skeleton.ranges.extend(task.vmas.iter().map(|vma| (vma.start, vma.end)));
        skeleton.flags.insert(entry.pid, task.flags);
        skeleton
            .terminals
            .extend(task.terminal.map(|number| (entry.pid, number)));
        skeleton.tasks.push((entry, task.zombie));
    }
    let mut build = Build::tasks(&skeleton, options)?;
    let mut standby = Standby::new(begin.memory.saturating_add(EXTRA_ROOM));
    for task in begin.tasks.iter().filter(|task| !task.zombie) {
        let pid = task.entry.as_ref().map_or(0, |entry| entry.pid);
        let staged: Vec<&VmaEntry> = task
            .staged
            .iter()
            .filter_map(|&index| task.vmas.get(index as usize))
            .collect();
        let staged: Vec<&VmaEntry> = staged.into_iter().filter(|vma| is_anonymous(vma)).collect();
        // This kernel's vdso may be in the way: it goes where it belongs first.
        build.clear_the_way(pid, &task.vmas)?;
        let plans: Vec<Plan<'_>> = staged
            .iter()
            .map(|vma| Plan {
                vma,
                writable: mapping::needs_write(vma, false),
            })
            .collect();
        build.map(pid, &plans, &HashMap::new())?;
        let set = RunSet::from_ranges(staged.iter().map(|vma| (vma.start, vma.end)).collect());
        standby.add(pid, build.tid_of(pid)?, set)?;
    }
    Ok((build, StandbySink::new(standby)))
}

/// A tree that is another than in the beginning is made anew, for a task cannot become another's child. Its memory is kept.
fn restage(
    build: Build,
    sink: &StandbySink,
    begin: &Begin,
    image: &TreeImage,
    store: &MemStore,
    options: &restore::Options,
) -> Result<Build> {
    let skeleton = Skeleton::of(image, store)?;
    let ids =
        |entry: &PstreeEntry, zombie: bool, flags: u64| (entry.pid, entry.ppid, entry.pgid, entry.sid, zombie, flags);
    let staged: HashSet<_> = begin
        .tasks
        .iter()
        .filter_map(|task| task.entry.as_ref().map(|entry| ids(entry, task.zombie, task.flags)))
        .collect();
    let wanted: HashSet<_> = skeleton
        .tasks
        .iter()
        .map(|(entry, zombie)| ids(entry, *zombie, skeleton.flags.get(&entry.pid).copied().unwrap_or(0)))
        .collect();
    let terminals = begin
        .tasks
        .iter()
        .filter_map(|task| Some((task.entry.as_ref()?.pid, task.terminal?)));
    if staged == wanted && skeleton.terminals == terminals.collect() {
        return Ok(build);
    }
    tracing::debug!("the tree has changed since the preflight: its tasks are made anew");
    let living = image.tasks.iter().filter(|task| !task.is_zombie());
    let stays = living.map(|task| (task.entry.pid, anonymous_ranges(task))).collect();
    sink.lock().unstage(&stays)?;
    drop(build);
    Build::tasks(&skeleton, options.clone())
}

/// Private memory that no file is behind: the kind that is staged.
fn is_anonymous(vma: &VmaEntry) -> bool {
    vma.status & status::ANON_PRIVATE != 0 && !mapping::is_kernel_made(vma)
}

fn anonymous_ranges(task: &TaskImage) -> RunSet {
    let all = task.mm.vmas.iter().filter(|vma| is_anonymous(vma));
    RunSet::from_ranges(all.map(|vma| (vma.start, vma.end)).collect())
}

struct PutTogether<'a> {
    ready: ReadyTree<'a>,
    lazy: Vec<LazyTask>,
}

/// Brings the staged memory in line with the images, and restores everything else.
fn put_together<'a>(
    mut build: Build,
    sink: &StandbySink,
    begin: &Begin,
    image: &'a TreeImage,
    store: &'a MemStore,
    options: &'a restore::Options,
    last: &Final,
) -> Result<PutTogether<'a>> {
    let mut files = FileRestore::new(store, options, &image.files);
    let backing = build.open_backing(image, &mut files)?;
    let lazy: HashMap<u32, RunSet> = last
        .lazy
        .iter()
        .map(|pages| {
            (
                pages.pid,
                RunSet::from_ranges(pages.bounds.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()),
            )
        })
        .collect();
    let living = || image.tasks.iter().filter(|task| !task.is_zombie());
    let mut patches = Vec::new();
    for task in living() {
        let pid = task.entry.pid;
        let failed = |error: Error| error.task(pid as i32);
        let shape = begin
            .tasks
            .iter()
            .find(|shape| shape.entry.as_ref().is_some_and(|entry| entry.pid == pid));
        let shape = shape.map_or(&[][..], |shape| &shape.vmas[..]);
        let covered = align_staged(&mut build, sink, shape, task).map_err(failed)?;
        let vdso = vdso_contents(sink, task);
        let waits = |start: u64, end: u64| sink.lock().waits_for(pid, start, end);
        let made = build
            .map_task(task, &backing, vdso.as_deref(), &covered, &waits)
            .map_err(failed)?;
        patches.push((pid, made));
        if let Some(missing) = lazy.get(&pid) {
            forget(&mut build, pid, missing).map_err(failed)?;
        }
    }
    let mut memory = build.memory_sink()?;
    let waiting = sink.lock().take_waiting();
    let kernels_own: HashMap<u32, (u64, u64)> = living()
        .filter(|task| {
            patches
                .iter()
                .any(|(pid, patches)| *pid == task.entry.pid && patches.is_empty())
        })
        .filter_map(|task| {
            let vma = task.mm.vmas.iter().find(|vma| vma.status & status::VDSO != 0)?;
            Some((task.entry.pid, (vma.start, vma.end)))
        })
        .collect();
    // A page that waits and is to follow was written again since: what waits is old, and would be taken for the program's.
    let follows = |object, address| match object {
        MemoryObject::Task(pid) => lazy.get(&pid).is_some_and(|missing| missing.contains(address)),
        MemoryObject::Shmem(_) => false,
    };
    for ((object, address), bytes) in waiting {
        if follows(object, address) {
            continue;
        }
        let vdso = match object {
            MemoryObject::Task(pid) => kernels_own
                .get(&pid)
                .is_some_and(|&(start, end)| (start..end).contains(&address)),
            MemoryObject::Shmem(_) => false,
        };
        if !vdso {
            let failed = || Error::new("fill memory").object(format!("{object:?} {address:#x}"));
            memory
                .write_pages(
                    object,
                    PageRun {
                        start: address,
                        pages: 1,
                    },
                    &bytes,
                )
                .with(failed)?;
        }
    }
    for (pid, patches) in &patches {
        let memory = RemoteMemory::new(build.tid_of(*pid)?);
        patches
            .iter()
            .try_for_each(|(at, bytes)| memory.write_forced(RemoteAddr(*at), bytes))?;
    }
    for task in living() {
        build
            .settle_all(task)
            .map_err(|error| error.task(task.entry.pid as i32))?;
    }
    let watches = watch_all(&mut build, image, &lazy)?;
    let ready = build.complete(image, files, &backing)?;
    let lazy = register_all(watches)?;
    Ok(PutTogether { ready, lazy })
}

/// Makes the staged mappings of a task those of the image, where they are not already; returns the image's mappings that
/// need nothing more.
fn align_staged(
    build: &mut Build,
    sink: &StandbySink,
    staged_shape: &[VmaEntry],
    task: &TaskImage,
) -> Result<HashSet<(u64, u64)>> {
    let pid = task.entry.pid;
    let staged = match sink.lock().tasks.get_mut(&pid) {
        Some(task) => std::mem::take(&mut task.staged),
        None => return Ok(HashSet::new()),
    };
    let stays = anonymous_ranges(task);
    let mut program = Program::new();
    for &(start, end) in staged.subtract(&stays).ranges() {
        program.call(
            "unmap what is gone",
            libc::SYS_munmap,
            &[start.into(), (end - start).into()],
        );
    }
    let (mut covered, mut pieces) = (HashSet::new(), Vec::new());
    for vma in task.mm.vmas.iter().filter(|vma| is_anonymous(vma)) {
        let range = RunSet::from_ranges(vec![(vma.start, vma.end)]);
        let there = staged.intersect(&range);
        if there.is_empty() {
            continue;
        }
        covered.insert((vma.start, vma.end));
        for &(start, end) in there.ranges() {
            program.call(
                "protect",
                libc::SYS_mprotect,
                &[start.into(), (end - start).into(), vma.prot.into()],
            );
        }
        // A heap or stack that has grown: its new part is mapped beside the old one, and the kernel joins them.
        for &(start, end) in range.subtract(&there).ranges() {
            pieces.push(VmaEntry {
                start,
                end,
                ..vma.clone()
            });
        }
    }
    build.run_in(pid, &program)?;
    let plans: Vec<Plan<'_>> = pieces.iter().map(|vma| Plan { vma, writable: false }).collect();
    build.map(pid, &plans, &HashMap::new())?;
    let as_staged: HashSet<(u64, u64)> = staged_shape.iter().map(|vma| (vma.start, vma.end)).collect();
    let changed: HashSet<_> = covered.difference(&as_staged).copied().collect();
    if !changed.is_empty() {
        relay_split(build, task, &changed)?;
    }
    Ok(covered)
}

/// Maps those mappings anew that came to consist of several. The kernel joins a new piece with the neighbour on its left if
/// it can, and never two whose pages have been touched; but what was one mapping at the source must be one here, or its
/// owner's mremap(2) would fail.
fn relay_split(build: &mut Build, task: &TaskImage, changed: &HashSet<(u64, u64)>) -> Result<()> {
    let pid = task.entry.pid;
    let tid = build.tid_of(pid)?;
    let maps = procfs::maps::parse(&procfs::read(tid, "maps")?)?;
    let is_whole = |vma: &VmaEntry| {
        let at = maps.partition_point(|map| map.end <= vma.start);
        maps.get(at)
            .is_some_and(|map| map.start <= vma.start && vma.end <= map.end)
    };
    let split = |vma: &&VmaEntry| changed.contains(&(vma.start, vma.end)) && !is_whole(vma);
    let pages = Pages::open(tid)?;
    let memory = RemoteMemory::new(tid);
    for vma in task.mm.vmas.iter().filter(split) {
        tracing::debug!("mapping {:#x}-{:#x} is laid anew", vma.start, vma.end);
        let (mut runs, mut kept) = (Vec::new(), Vec::new());
        pages.own(vma.start, vma.end, &mut runs)?;
        for run in &runs {
            let mut bytes = vec![0; run.bytes() as usize];
            pages.read(std::slice::from_ref(run), &mut bytes)?;
            kept.push((run.start, bytes));
        }
        let mut program = Program::new();
        let range = [vma.start.into(), (vma.end - vma.start).into()];
        program.call("unmap a mapping in pieces", libc::SYS_munmap, &range);
        build.run_in(pid, &program)?;
        build.map(pid, &[Plan { vma, writable: false }], &HashMap::new())?;
        for (start, bytes) in kept {
            memory.write_forced(RemoteAddr(start), &bytes)?;
        }
    }
    Ok(())
}

/// The code of the vdso that the source had, where it was sent.
fn vdso_contents(sink: &StandbySink, task: &TaskImage) -> Option<Vec<u8>> {
    let vma = task.mm.vmas.iter().find(|vma| vma.status & status::VDSO != 0)?;
    let run = PageRun {
        start: vma.start,
        pages: ((vma.end - vma.start) / PAGE_SIZE as u64).min(64),
    };
    sink.lock().peek(MemoryObject::Task(task.entry.pid), run)
}

/// Drops staged pages that are out of date, so that they fault.
fn forget(build: &mut Build, pid: u32, missing: &RunSet) -> Result<()> {
    let mut program = Program::new();
    for &(start, end) in missing.ranges() {
        let args = [start.into(), (end - start).into(), libc::MADV_DONTNEED.into()];
        program.call("drop a stale page", libc::SYS_madvise, &args);
    }
    build.run_in(pid, &program).map(drop)
}
