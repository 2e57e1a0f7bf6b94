//! The tasks of a tree: found, frozen until the tree is stable, and as they are in images.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::time::Duration;

use whimbrel_images::entry;
use whimbrel_images::proto::{
    CoreEntry, FdinfoEntry, FileEntry, FsEntry, InventoryEntry, MmEntry, PstreeEntry, SeccompEntry, TaskKobjIdsEntry,
};
use whimbrel_images::store::ImageStore;

use crate::error::{Context, Error, Result};
use crate::procfs::{self, stat, stat::Stat, status, status::Status};
use crate::remote::{Stopped, tracee};

/// How a task was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskState {
    /// Running or sleeping.
    Alive,
    /// Stopped by this signal.
    Stopped(i32),
    /// Dead and not yet waited for, with this wait(2) status.
    Zombie(i32),
}

/// `task_core_entry.task_state` in images.
pub mod task_state {
    /// Running or sleeping.
    pub const ALIVE: u32 = 1;
    /// A zombie.
    pub const DEAD: u32 = 2;
    /// Stopped by a signal.
    pub const STOPPED: u32 = 3;
}

/// A thread of a frozen task.
pub struct Thread {
    /// Its id in our pid namespace.
    pub tid: i32,
    /// Its id in its own pid namespace.
    pub inner_tid: i32,
    /// Held by ptrace. `None` while it visits the stub.
    pub stopped: Option<Stopped>,
}

/// A thread-group leader that has ended before other threads of its process: what stays of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLeader {
    /// The process's id in our pid namespace.
    pub pid: i32,
    /// Its name.
    pub comm: Vec<u8>,
    /// Its status. That of the process will be the last thread's.
    pub status: i32,
}

/// A frozen task.
pub struct Task {
    /// Its id in our pid namespace; that of its first living thread when the leader is dead, for a dead thread has neither
    /// memory nor descriptors to show.
    pub pid: i32,
    /// Its id in its own pid namespace.
    pub inner_pid: i32,
    /// Parent, process group and session, in its own pid namespace; the parent of the root is 0.
    pub parent: i32,
    /// Process group.
    pub group: i32,
    /// Session.
    pub session: i32,
    /// How it was found.
    pub state: TaskState,
    /// `/proc/PID/stat`.
    pub stat: Stat,
    /// `/proc/PID/status`.
    pub status: Status,
    /// Its threads, leader first; none for a zombie, and without the leader if that is dead.
    pub threads: Vec<Thread>,
    /// Its leader, if that is dead and others live.
    pub dead_leader: Option<DeadLeader>,
}

/// A frozen tree. Dropping it lets all threads go on.
pub struct Tree {
    /// All tasks, parents before their children.
    pub tasks: Vec<Task>,
}

impl Tree {
    /// Seizes and stops `root` and everything below it, until a whole pass finds nothing new.
    ///
    /// # Errors
    /// When a task cannot be traced; everything that was stopped goes on.
    pub fn freeze(root: i32) -> Result<Tree> {
        let mut tree = Tree { tasks: Vec::new() };
        let mut queue = VecDeque::from([(root, 0)]);
        let mut known = HashSet::new();
        loop {
            let mut news = false;
            while let Some((pid, parent)) = queue.pop_front() {
                if known.insert(pid)
                    && let Some(task) = freeze_task(pid, parent).map_err(|error| explain_root(error, pid == root))?
                {
                    tree.tasks.push(task);
                    news = true;
                }
            }
            // A task may have forked before it was stopped, or gained children from a dying relative.
            for task in tree.tasks.iter().filter(|task| !task.threads.is_empty()) {
                let children = children_of(task.pid)?.into_iter().filter(|pid| !known.contains(pid));
                queue.extend(children.map(|pid| (pid, task.inner_pid)));
            }
            if queue.is_empty() && !news {
                return Ok(tree);
            }
        }
    }

    /// Stops one task, and none of its children.
    ///
    /// # Errors
    /// When it cannot be traced or is gone; it goes on.
    pub fn hold(pid: i32) -> Result<Tree> {
        match freeze_task(pid, 0)? {
            Some(task) if !task.threads.is_empty() => Ok(Tree { tasks: vec![task] }),
            _ => Err(Error::new("stop").task(pid).because("it has ended")),
        }
    }

    /// All tasks that are not zombies.
    pub fn living(&self) -> impl Iterator<Item = &Task> {
        self.tasks
            .iter()
            .filter(|task| !matches!(task.state, TaskState::Zombie(_)))
    }

    /// Lets all threads go on as they were found.
    ///
    /// # Errors
    /// The first failure; the others are tried all the same.
    pub fn resume(self) -> Result<()> {
        let mut first = Ok(());
        for thread in self.tasks.into_iter().flat_map(|task| task.threads) {
            if let Some(stopped) = thread.stopped {
                let result = stopped.detach(0);
                first = first.and(result);
            }
        }
        first
    }

    /// Kills all tasks and waits until they are gone.
    ///
    /// # Errors
    /// When one cannot be killed.
    pub fn kill(self) -> Result<()> {
        self.doom();
        self.await_death();
        Ok(())
    }

    /// As [`Tree::kill`], for somebody who waits for it: most of a death is memory being taken apart, and two processors do
    /// that faster than one. Where nobody waits, the other one is better left to others.
    ///
    /// # Errors
    /// As [`Tree::kill`].
    pub fn kill_swiftly(self) -> Result<()> {
        self.doom();
        for task in &self.tasks {
            // Whoever is done with it already, or shares it, says so, and that is all right.
            let _ = crate::kernel::sys::process_mrelease(task.pid);
        }
        self.await_death();
        Ok(())
    }

    fn doom(&self) {
        // Children first: a parent that is woken by a child's death would be dying already.
        for task in self.tasks.iter().rev().filter(|task| !task.threads.is_empty()) {
            let pid = rustix::process::Pid::from_raw(task.pid);
            if let Some(pid) = pid {
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
            }
        }
    }

    fn await_death(self) {
        for task in self.tasks {
            // The leader's death is told only when those of the other threads have been taken note of.
            for thread in task.threads.into_iter().rev() {
                let Some(stopped) = thread.stopped else { continue };
                let tid = stopped.tid();
                std::mem::forget(stopped);
                let mut running = tracee::Running::attached_by_creation(tid);
                // A killed thread may still show a stop that was on its way.
                while let Ok(tracee::Waited::Stopped(stopped, _)) = running.wait() {
                    match stopped.resume() {
                        Ok(next) => running = next,
                        Err(_) => running = tracee::Running::attached_by_creation(tid),
                    }
                }
            }
        }
    }
}

fn explain_root(error: Error, root: bool) -> Error {
    if root && error.errno() == Some(libc::ENOENT) {
        error.hint("there is no such process: check the pid")
    } else {
        error
    }
}

/// How long a task that sleeps in the kernel may take to wake, while the tasks before it stand still already.
const PATIENCE: Duration = Duration::from_secs(3);

/// Stops one task; `None` when it was gone before it could be stopped.
fn freeze_task(pid: i32, parent: i32) -> Result<Option<Task>> {
    let read = || -> Result<(Stat, Status)> {
        Ok((
            stat::parse(&procfs::read(pid, "stat")?)?,
            status::parse(&procfs::read(pid, "status")?)?,
        ))
    };
    let gone = |error: &Error| matches!(error.errno(), Some(libc::ENOENT | libc::ESRCH));
    let asleep = match read() {
        Ok((stat, status)) if is_dead(&stat) && speaker(pid) == pid => {
            return Ok(Some(zombie(pid, parent, stat, status)));
        }
        Ok((stat, _)) => stat.state == b'D',
        // A child that nobody needs to wait for leaves no zombie.
        Err(error) if parent != 0 && gone(&error) => return Ok(None),
        Err(error) => return Err(error.task(pid)),
    };
    let mut threads: Vec<Thread> = Vec::new();
    let mut group_stop = None;
    loop {
        let mut news = false;
        for tid in threads_of(pid)? {
            if threads.iter().any(|thread| thread.tid == tid) {
                continue;
            }
            let running = match tracee::seize(tid, false) {
                Ok(running) => running,
                // It ended, or is about to, while we looked.
                Err(error) if error.errno() == Some(libc::ESRCH) => continue,
                Err(error) if error.errno() == Some(libc::EPERM) && is_dead_thread(pid, tid) => continue,
                Err(error) => return Err(error),
            };
            let stopped = match asleep && tid == pid {
                true => running.stop_within(PATIENCE)?,
                false => running.stop()?,
            };
            match stopped {
                Ok((stopped, stop)) => {
                    group_stop = group_stop.or(stop);
                    threads.push(Thread {
                        tid,
                        inner_tid: tid,
                        stopped: Some(stopped),
                    });
                    news = true;
                }
                Err(_) => continue,
            }
        }
        if !news {
            break;
        }
    }
    if threads.is_empty() {
        // It is ending, and its parent, stopped in wait(2) or before it, will ask for it: it is a zombie to come.
        loop {
            match read() {
                Ok((stat, status)) if is_dead(&stat) => return Ok(Some(zombie(pid, parent, stat, status))),
                Ok(_) => std::thread::sleep(std::time::Duration::from_micros(100)),
                Err(error) if gone(&error) => return Ok(None),
                Err(error) => return Err(error.task(pid)),
            }
        }
    }
    threads.sort_by_key(|thread| (thread.tid != pid, thread.tid));
    for thread in &mut threads {
        let status = status::parse(&procfs::read(pid, &format!("task/{}/status", thread.tid))?)?;
        thread.inner_tid = status.ns_pid.last().copied().unwrap_or(thread.tid);
    }
    let (stat, status) = read()?;
    let state = group_stop.map_or(TaskState::Alive, TaskState::Stopped);
    let first = threads[0].tid;
    if first == pid {
        return Ok(Some(describe(pid, parent, stat, status, state, threads)));
    }
    // The file of the process has no status while threads live, that of the thread has.
    let leader = stat::parse(&procfs::read(pid, &format!("task/{pid}/stat"))?)?;
    let dead_leader = Some(DeadLeader {
        pid,
        comm: leader.comm,
        status: leader.exit_code,
    });
    let inner_pid = status.ns_pid.last().copied().unwrap_or(pid);
    let stat = stat::parse(&procfs::read(first, "stat")?)?;
    let status = status::parse(&procfs::read(first, "status")?)?;
    Ok(Some(Task {
        inner_pid,
        dead_leader,
        ..describe(first, parent, stat, status, state, threads)
    }))
}

/// The thread of a process that /proc is to be asked by: its leader, or, if that is dead, the first that lives.
pub fn speaker(pid: i32) -> i32 {
    if !is_dead_thread(pid, pid) {
        return pid;
    }
    let others = threads_of(pid).unwrap_or_default().into_iter();
    let living = others.filter(|&tid| tid != pid && !is_dead_thread(pid, tid));
    living.min().unwrap_or(pid)
}

/// The signal that tells a parent of a task's end, for images: none for SIGCHLD.
pub fn exit_signal(stat: &Stat) -> Option<u32> {
    // Until it is told, an orphan's is SIGCHLD whatever it was; a thread's is -1.
    u32::try_from(stat.exit_signal)
        .ok()
        .filter(|&signal| signal != libc::SIGCHLD as u32)
}

fn is_dead(stat: &Stat) -> bool {
    matches!(stat.state, b'Z' | b'X')
}

fn zombie(pid: i32, parent: i32, stat: Stat, status: Status) -> Task {
    let state = TaskState::Zombie(stat.exit_code);
    describe(pid, parent, stat, status, state, Vec::new())
}

fn describe(pid: i32, parent: i32, stat: Stat, status: Status, state: TaskState, threads: Vec<Thread>) -> Task {
    let inner = |ids: &[i32], outer: i32| ids.last().copied().unwrap_or(outer);
    Task {
        pid,
        inner_pid: inner(&status.ns_pid, pid),
        parent,
        group: inner(&status.ns_pgid, stat.pgrp),
        session: inner(&status.ns_sid, stat.session),
        state,
        stat,
        status,
        threads,
        dead_leader: None,
    }
}

fn is_dead_thread(pid: i32, tid: i32) -> bool {
    let state = procfs::read(pid, &format!("task/{tid}/stat"))
        .and_then(|text| stat::parse(&text))
        .map(|stat| stat.state);
    !matches!(state, Ok(state) if !matches!(state, b'Z' | b'X'))
}

/// Thread ids of a process, in our pid namespace.
///
/// # Errors
/// When it is gone.
pub fn threads_of(pid: i32) -> Result<Vec<i32>> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task")).with(|| Error::new("list threads").task(pid))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect())
}

/// Children of a process, in our pid namespace.
///
/// # Errors
/// When it is gone.
pub fn children_of(pid: i32) -> Result<Vec<i32>> {
    let mut children = Vec::new();
    for tid in threads_of(pid)? {
        let text = procfs::read(pid, &format!("task/{tid}/children")).unwrap_or_default();
        children.extend(
            String::from_utf8_lossy(&text)
                .split_whitespace()
                .filter_map(|word| word.parse::<i32>().ok()),
        );
    }
    Ok(children)
}

/// One task in images.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TaskImage {
    /// Ids and threads.
    pub entry: PstreeEntry,
    /// One per thread, leader first; a single one for a zombie.
    pub cores: Vec<CoreEntry>,
    /// Which kernel objects it shares with others.
    pub ids: TaskKobjIdsEntry,
    /// Bounds and mappings.
    pub mm: MmEntry,
    /// Root, working directory, umask.
    pub fs: FsEntry,
    /// Descriptors.
    pub fds: Vec<FdinfoEntry>,
}

impl TaskImage {
    /// Is it a zombie?
    pub fn is_zombie(&self) -> bool {
        self.state() == task_state::DEAD || self.state() == 6
    }

    /// Did its leader end before other threads? Then the first of those has the state of the process.
    pub fn leader_is_dead(&self) -> bool {
        let leader = self.cores.first().and_then(|core| core.thread_core.as_ref());
        self.entry.threads.len() > 1 && leader.and_then(|thread| thread.dead) == Some(true)
    }

    /// The living threads with their images; the first has the state of the process.
    pub fn living_threads(&self) -> impl Iterator<Item = (u32, &CoreEntry)> {
        let all = self.entry.threads.iter().copied().zip(&self.cores);
        all.skip(usize::from(self.leader_is_dead()))
    }

    /// The images of the living threads.
    pub fn living_cores(&self) -> &[CoreEntry] {
        &self.cores[usize::from(self.leader_is_dead()).min(self.cores.len())..]
    }

    /// Its state, as in [`task_state`].
    pub fn state(&self) -> u32 {
        self.cores
            .first()
            .and_then(|core| core.tc.as_ref())
            .map_or(task_state::ALIVE, |tc| tc.task_state)
    }

    /// Pages that the kernel writes to while the task is put together: restartable-sequence areas.
    pub fn touched_by_kernel(&self) -> Vec<(u64, u64)> {
        let areas = self
            .cores
            .iter()
            .filter_map(|core| core.thread_core.as_ref()?.rseq_entry.as_ref());
        let page = crate::arch::PAGE_SIZE;
        let pages = |start: u64, size: u32| {
            let end = start.saturating_add(u64::from(size));
            (start / page * page, end.checked_next_multiple_of(page).unwrap_or(end))
        };
        areas
            .map(|area| pages(area.rseq_abi_pointer, area.rseq_abi_size))
            .collect()
    }
}

/// A tree in images, without the contents of its memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TreeImage {
    /// Facts about the whole.
    pub inventory: InventoryEntry,
    /// All tasks, parents before their children.
    pub tasks: Vec<TaskImage>,
    /// All open file descriptions.
    pub files: BTreeMap<u32, FileEntry>,
    /// All seccomp filters.
    pub seccomp: SeccompEntry,
}

/// Version of the image format that CRIU has had since 2.0.
const IMAGE_VERSION: u32 = 2;

/// The number of the tool's own tables in images; those of the tree come after it.
pub const TABLES_OF_TOOL: u32 = 1;

impl TreeImage {
    /// Writes everything that this struct holds.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub fn save(&self, store: &dyn ImageStore) -> Result<()> {
        let failed = "write images";
        let one = |name: String, write: &dyn Fn(&str) -> Result<(), whimbrel_images::ImageError>| {
            write(&name).context(failed)
        };
        let mut writer = entry::ImageWriter::create(store, "pstree.img").context(failed)?;
        self.tasks
            .iter()
            .try_for_each(|task| writer.write(&task.entry))
            .context(failed)?;
        writer.finish().context(failed)?;
        for task in &self.tasks {
            let pid = task.entry.pid;
            for (index, core) in task.cores.iter().enumerate() {
                let tid = task
                    .entry
                    .threads
                    .get(index)
                    .copied()
                    .filter(|_| !task.is_zombie())
                    .unwrap_or(pid);
                one(format!("core-{tid}.img"), &|name| entry::write_one(store, name, core))?;
            }
            if task.is_zombie() {
                continue;
            }
            one(format!("ids-{pid}.img"), &|name| {
                entry::write_one(store, name, &task.ids)
            })?;
            one(format!("mm-{pid}.img"), &|name| entry::write_one(store, name, &task.mm))?;
            one(format!("fs-{pid}.img"), &|name| entry::write_one(store, name, &task.fs))?;
            let name = format!("fdinfo-{}.img", task.ids.files_id);
            let mut writer = entry::ImageWriter::create(store, &name).context(failed)?;
            task.fds.iter().try_for_each(|fd| writer.write(fd)).context(failed)?;
            writer.finish().context(failed)?;
        }
        let mut writer = entry::ImageWriter::create(store, "files.img").context(failed)?;
        self.files
            .values()
            .try_for_each(|file| writer.write(file))
            .context(failed)?;
        writer.finish().context(failed)?;
        if !self.seccomp.seccomp_filters.is_empty() {
            one("seccomp.img".into(), &|name| {
                entry::write_one(store, name, &self.seccomp)
            })?;
        }
        // Last: a directory with an inventory is a whole dump.
        one("inventory.img".into(), &|name| {
            entry::write_one(store, name, &self.inventory)
        })
    }

    /// Reads a tree, and checks what others will rely on.
    ///
    /// # Errors
    /// When an image is missing, damaged, or of another version.
    pub fn load(store: &dyn ImageStore) -> Result<TreeImage> {
        let failed = "read images";
        let inventory: InventoryEntry = entry::read_one(store, "inventory.img").context(failed)?;
        if inventory.img_version != IMAGE_VERSION {
            return Err(
                Error::new("read images").because(format!("image version {} is not supported", inventory.img_version))
            );
        }
        let mut tree = TreeImage {
            inventory,
            ..TreeImage::default()
        };
        let pstree: Vec<PstreeEntry> = entry::read_all(store, "pstree.img").context(failed)?;
        let mut pids = HashSet::from([0]);
        for item in pstree {
            let bad = |why: &str| {
                Error::new("read images")
                    .object(format!("pstree.img, pid {}", item.pid))
                    .because(why.to_owned())
            };
            if item.pid == 0 || !pids.insert(item.pid) {
                return Err(bad("the pid is zero or appears twice"));
            }
            if !pids.contains(&item.ppid) || (item.ppid == 0) != tree.tasks.is_empty() {
                return Err(bad("its parent does not come before it"));
            }
            tree.tasks.push(load_task(store, item)?);
        }
        if tree.tasks.is_empty() {
            return Err(Error::new("read images")
                .object("pstree.img")
                .because("there is no task"));
        }
        for file in entry::read_all::<FileEntry>(store, "files.img").context(failed)? {
            tree.files.insert(file.id, file);
        }
        tree.seccomp = match entry::read_one(store, "seccomp.img") {
            Err(error) if error.is_not_found() => SeccompEntry::default(),
            read => read.context(failed)?,
        };
        Ok(tree)
    }

    /// Facts about a new dump.
    pub fn new_inventory(root: &TaskKobjIdsEntry) -> InventoryEntry {
        // Those of the tool, which shares namespaces with the tree, and no table: CRIU does not restore a root that has the same.
        let own = TaskKobjIdsEntry {
            vm_id: TABLES_OF_TOOL,
            files_id: TABLES_OF_TOOL,
            fs_id: TABLES_OF_TOOL,
            sighand_id: TABLES_OF_TOOL,
            ..*root
        };
        InventoryEntry {
            img_version: IMAGE_VERSION,
            fdinfo_per_id: Some(true),
            root_ids: Some(own),
            ns_per_id: Some(true),
            lsmtype: Some(0),
            ..InventoryEntry::default()
        }
    }
}

fn load_task(store: &dyn ImageStore, item: PstreeEntry) -> Result<TaskImage> {
    let failed = "read images";
    let pid = item.pid;
    let mut task = TaskImage {
        entry: item,
        ..TaskImage::default()
    };
    let leader: CoreEntry = entry::read_one(store, &format!("core-{pid}.img")).context(failed)?;
    task.cores.push(leader);
    if task.is_zombie() {
        return Ok(task);
    }
    let others: Vec<u32> = task.entry.threads.iter().copied().filter(|&tid| tid != pid).collect();
    for tid in &others {
        task.cores
            .push(entry::read_one(store, &format!("core-{tid}.img")).context(failed)?);
    }
    task.entry.threads = std::iter::once(pid).chain(others).collect();
    let embedded = task.cores[0].ids;
    task.ids = match entry::read_one(store, &format!("ids-{pid}.img")) {
        Ok(ids) => ids,
        Err(error) if error.is_not_found() => embedded.ok_or(error).context(failed)?,
        Err(error) => return Err(error).context(failed),
    };
    task.mm = entry::read_one(store, &format!("mm-{pid}.img")).context(failed)?;
    // Before CRIU 2 the mappings had a file of their own; what we read has them in the mm image.
    crate::resource::mem::mapping::validate(&task.mm.vmas).map_err(|error| error.task(pid as i32))?;
    task.fs = entry::read_one(store, &format!("fs-{pid}.img")).context(failed)?;
    task.fds = entry::read_all(store, &format!("fdinfo-{}.img", task.ids.files_id)).context(failed)?;
    Ok(task)
}
