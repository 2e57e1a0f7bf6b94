//! Collects what a frozen tree holds: programs in its threads, its descriptors, its mappings.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use whimbrel_images::page::MemoryObject;
use whimbrel_images::proto::{
    CoreEntry, FdTypes, FdinfoEntry, FileEntry, FsEntry, MmEntry, PstreeEntry, SeccompEntry, TaskKobjIdsEntry,
    ThreadCoreEntry, VmaEntry,
};
use whimbrel_images::store::ImageStore;

use super::Options;
use crate::error::{Context, Error, Result};
use crate::kernel::sys::{self, Kcmp};
use crate::procfs::{self, maps::Mapping};
use crate::remote::inject::{GadgetCache, Home};
use crate::remote::{Gadgets, Program, StubProcess};
use crate::resource::fd::{self, FileDump, OpenFile, Shared, memfd, regular};
use crate::resource::mem::{bounds, mapping, mapping::Backing, shared::Segments};
use crate::resource::task::tables::{self, Tables};
use crate::resource::{self, Endpoints, FILE_KINDS, FileKind, Found, TASK_KINDS, ThreadView};
use crate::tree::{DeadLeader, TABLES_OF_TOOL, Task, TaskImage, TaskState, Tree, task_state};

/// What images call the IPC namespace of a tree.
const IPC_NAMESPACE: u32 = 3;

/// What was looked up before the freeze, by process.
#[derive(Default)]
pub struct Prepared {
    tasks: HashMap<i32, (Vec<Mapping>, Gadgets)>,
    tracked: bool,
}

impl Prepared {
    /// Looks at `root` and everything below it while it runs.
    ///
    /// Tasks that come later are looked at inside the freeze, at the price of time.
    ///
    /// # Errors
    /// When the root is gone or cannot be looked at.
    pub fn look(root: i32) -> Result<Prepared> {
        let mut cache = GadgetCache::default();
        let (mut prepared, mut queue) = (Prepared::default(), vec![root]);
        while let Some(pid) = queue.pop() {
            let speaker = crate::tree::speaker(pid);
            match look_at(speaker, &mut cache) {
                Ok(found) => drop(prepared.tasks.insert(speaker, found)),
                Err(error) if pid == root && !is_zombie(root) => return Err(error),
                // Anything below may come and go meanwhile.
                Err(_) => {}
            }
            queue.extend(crate::tree::children_of(pid).unwrap_or_default());
        }
        Ok(prepared)
    }

    /// As [`Prepared::look`], for a tree whose memory we watch ourselves: the marks of that are not the program's.
    ///
    /// # Errors
    /// As [`Prepared::look`].
    pub fn look_tracked(root: i32) -> Result<Prepared> {
        let mut prepared = Prepared::look(root)?;
        prepared.tracked = true;
        for (maps, _) in prepared.tasks.values_mut() {
            forget_marks(maps);
        }
        Ok(prepared)
    }

    /// The tasks that were seen, with their mappings.
    pub fn tasks(&self) -> impl Iterator<Item = (i32, &[Mapping])> {
        self.tasks.iter().map(|(&pid, (maps, _))| (pid, maps.as_slice()))
    }

    /// Mappings and borrowed instructions of a task, read again where the task changed since.
    fn take(&mut self, pid: i32) -> Result<(Vec<Mapping>, Gadgets)> {
        let now = procfs::maps::parse(&procfs::read(pid, "maps")?)?;
        if let Some((before, gadgets)) = self.tasks.remove(&pid)
            && before.len() == now.len()
            && before.iter().zip(&now).all(|(before, now)| before.same_layout(now))
        {
            return Ok((before, gadgets));
        }
        let (mut maps, gadgets) = look_at(pid, &mut GadgetCache::default())?;
        if self.tracked {
            forget_marks(&mut maps);
        }
        Ok((maps, gadgets))
    }
}

fn forget_marks(maps: &mut [Mapping]) {
    maps.iter_mut().for_each(|map| map.flags.retain(|flag| flag != b"uw"));
}

fn is_zombie(pid: i32) -> bool {
    procfs::read(pid, "stat")
        .and_then(|text| procfs::stat::parse(&text))
        .is_ok_and(|stat| stat.state == b'Z')
}

fn look_at(pid: i32, cache: &mut GadgetCache) -> Result<(Vec<Mapping>, Gadgets)> {
    let maps = procfs::maps::parse(&procfs::read(pid, "smaps")?)?;
    if maps.is_empty() {
        return Err(Error::new("read mappings")
            .task(pid)
            .because("it has no memory: a kernel thread, or just ending"));
    }
    let gadgets = Gadgets::find(pid, &maps, cache)?;
    Ok((maps, gadgets))
}

/// A file that a task has without a descriptor: mapped, executed, working directory, root.
pub struct PathFile {
    pid: i32,
    link: Vec<u8>,
    stat: rustix::fs::Stat,
    handle: OwnedFd,
    flags: u32,
}

/// Memory of one task that is to be carried.
pub struct TaskMemory {
    /// Its id in our pid namespace.
    pub pid: i32,
    /// What images call it.
    pub object: MemoryObject,
    /// Ranges that may hold pages of its own.
    pub ranges: Vec<(u64, u64)>,
    /// The vdso among them: its pages are the kernel's, and go along because another kernel has another one.
    pub vdso: Option<(u64, u64)>,
}

/// Everything about a tree but the contents of its memory and the state of its files.
#[derive(Default)]
pub struct Collected {
    /// The tasks as images.
    pub tasks: Vec<TaskImage>,
    /// Memory to carry.
    pub memory: Vec<TaskMemory>,
    /// Shared memory segments.
    pub segments: Segments,
    found: Found,
    open: BTreeMap<u32, OpenFile>,
    paths: BTreeMap<u32, PathFile>,
    descriptors: HashMap<(i32, i32), u32>,
    by_inode: HashMap<(u64, u64), Vec<u32>>,
    by_path: HashMap<(u64, u64, u32), u32>,
    next_id: u32,
    pids: HashMap<i32, i32>,
    /// Connections are not to go on anywhere: their other ends may know that they are over.
    closes: bool,
}

/// Collects a frozen tree.
///
/// # Errors
/// When something cannot be carried.
pub fn collect(tree: &mut Tree, mut prepared: Prepared, options: &Options) -> Result<Collected> {
    let mut all = Collected {
        next_id: 1,
        closes: options.tcp_close,
        pids: tree.tasks.iter().map(|task| (task.pid, task.inner_pid)).collect(),
        ..Collected::default()
    };
    let dead = tree.tasks.iter().filter_map(|task| {
        let leader = task.dead_leader.as_ref()?;
        Some((leader.pid, task.inner_pid))
    });
    all.pids.extend(dead);
    let root_session = tree.tasks.first().map_or(0, |task| task.session);
    check_sessions(tree, options, root_session)?;
    let root_pid = tree.tasks.first().map_or(0, |task| task.pid);
    let mut tables = Tables::default();
    let mut numbers: HashMap<i32, [u32; 3]> = HashMap::new();
    for index in 0..tree.tasks.len() {
        let task = &mut tree.tasks[index];
        let pid = task.pid;
        let image = match task.state {
            TaskState::Zombie(status) => zombie(task, status),
            _ => {
                check_namespaces(task.pid, root_pid)?;
                let number = TABLES_OF_TOOL + 1 + index as u32;
                let own = tables.numbers(pid, number)?;
                tables::clone_flags(pid, number, &own, numbers.get(&task.parent))?;
                numbers.insert(task.inner_pid, own);
                collect_task(task, own, &mut prepared, &mut all).map_err(|error| error.task(pid))?
            }
        };
        all.tasks.push(image);
    }
    Ok(all)
}

/// Sessions and groups must be inside of the tree, or there is nobody to make them again.
fn check_sessions(tree: &Tree, options: &Options, root_session: i32) -> Result<()> {
    let inside = |id: i32| tree.tasks.iter().any(|task| task.inner_pid == id);
    if let Some(task) = tree
        .tasks
        .iter()
        .find(|task| task.session != root_session && !inside(task.session))
    {
        return Err(Error::new("carry a session")
            .task(task.pid)
            .because(format!(
                "the leader of its session, {}, has ended, which is not supported yet",
                task.session
            ))
            .hint("end the task, or let it make a session of its own"));
    }
    if options.shell_job || inside(root_session) {
        return Ok(());
    }
    let root = tree.tasks.first().map_or(0, |task| task.pid);
    Err(Error::new("carry a session")
        .task(root)
        .because(format!("its session leader {root_session} is outside of the tree"))
        .hint("use --shell-job (-j), or start the program with setsid(1)"))
}

/// Namespaces of their own are not carried yet: better refused than lost.
fn check_namespaces(pid: i32, root: i32) -> Result<()> {
    if pid == root {
        return Ok(());
    }
    for namespace in ["pid", "net", "mnt", "uts", "ipc", "user", "cgroup", "time"] {
        let of = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}")).ok();
        if of(pid) != of(root) {
            let why = format!("its {namespace} namespace is not that of the tree's root, which is not supported yet");
            return Err(Error::new("carry a task").task(pid).because(why));
        }
    }
    Ok(())
}

fn zombie(task: &Task, status: i32) -> TaskImage {
    let mut core = CoreEntry {
        mtype: whimbrel_images::proto::core_entry::March::X8664 as i32,
        ..CoreEntry::default()
    };
    let tc = core.tc.get_or_insert_default();
    (tc.task_state, tc.exit_code) = (task_state::DEAD, status as u32);
    tc.comm = String::from_utf8_lossy(&task.stat.comm).into_owned();
    TaskImage {
        entry: pstree_entry(task, vec![task.inner_pid as u32]),
        cores: vec![core],
        ..TaskImage::default()
    }
}

/// A dead leader as images have it: with the state of the process, that `first`, its first living thread, has told.
fn dead_leader(leader: &DeadLeader, first: &CoreEntry) -> CoreEntry {
    let comm = String::from_utf8_lossy(&leader.comm).into_owned();
    let mut tc = first.tc.clone().unwrap_or_default();
    (tc.comm, tc.exit_code) = (comm.clone(), leader.status as u32);
    CoreEntry {
        mtype: first.mtype,
        tc: Some(tc),
        thread_core: Some(ThreadCoreEntry {
            dead: Some(true),
            comm: Some(comm),
            ..ThreadCoreEntry::default()
        }),
        ..CoreEntry::default()
    }
}

fn pstree_entry(task: &Task, threads: Vec<u32>) -> PstreeEntry {
    PstreeEntry {
        pid: task.inner_pid as u32,
        ppid: task.parent as u32,
        pgid: task.group as u32,
        sid: task.session as u32,
        threads,
        exit_signal: crate::tree::exit_signal(&task.stat),
    }
}

fn collect_task(task: &mut Task, tables: [u32; 3], prepared: &mut Prepared, all: &mut Collected) -> Result<TaskImage> {
    let pid = task.pid;
    let (maps, gadgets) = prepared.take(pid)?;
    let [vm_id, files_id, fs_id] = tables;
    let sharer = all.tasks.iter().find(|task| task.ids.files_id == files_id);
    let fds = match sharer.map(|task| (task.entry.pid, task.fds.clone())) {
        Some((other, fds)) => {
            let known = fds.iter().map(|fd| ((pid, fd.fd as i32), fd.id));
            all.descriptors.extend(known);
            tracing::debug!(task = pid, "has the descriptors of task {other}");
            fds
        }
        None => all.collect_descriptors(pid)?,
    };
    let (mut cores, mut mm) = run_programs(task, &maps, gadgets, &all.found)?;
    let brk = (mm.mm_start_brk, mm.mm_brk);
    let mut memory = TaskMemory {
        pid,
        object: MemoryObject::Task(task.inner_pid as u32),
        ranges: Vec::new(),
        vdso: None,
    };
    for map in &maps {
        let (mut vma, backing) = mapping::describe(map, brk)?;
        mapping::find_guards(pid, map, &mut vma)?;
        all.name_backing(pid, map, &mut vma, backing)?;
        let private = vma.flags & libc::MAP_PRIVATE as u32 != 0;
        let contents = private && vma.status & (mapping::status::VVAR | mapping::status::VSYSCALL) == 0;
        if contents {
            memory.ranges.push((map.start, map.end));
        }
        if vma.status & mapping::status::VDSO != 0 {
            memory.vdso = Some((map.start, map.end));
        }
        mm.vmas.push(vma);
    }
    merge_data_pages(&mut mm.vmas);
    mm.exe_file_id = all.path_file(pid, "exe", 0)?;
    all.memory.push(memory);

    let umask = Some(task.status.umask);
    let fs = FsEntry {
        cwd_id: all.path_file(pid, "cwd", 0)?,
        root_id: all.path_file(pid, "root", 0)?,
        umask,
    };
    let ids = TaskKobjIdsEntry {
        vm_id,
        files_id,
        fs_id,
        // Nobody shares actions without memory, and who shares that has been refused.
        sighand_id: vm_id,
        pid_ns_id: Some(1),
        net_ns_id: Some(2),
        ipc_ns_id: Some(IPC_NAMESPACE),
        uts_ns_id: Some(4),
        time_ns_id: Some(5),
        mnt_ns_id: Some(6),
        user_ns_id: Some(7),
        cgroup_ns_id: Some(8),
    };
    let mut threads: Vec<u32> = task.threads.iter().map(|thread| thread.inner_tid as u32).collect();
    if let Some(leader) = &task.dead_leader {
        threads.insert(0, task.inner_pid as u32);
        cores.insert(0, dead_leader(leader, &cores[0]));
    }
    Ok(TaskImage {
        entry: pstree_entry(task, threads),
        cores,
        ids,
        mm,
        fs,
        fds,
    })
}

/// Images have the vdso's data pages as one mapping, whatever the kernel calls their parts.
fn merge_data_pages(vmas: &mut Vec<VmaEntry>) {
    vmas.dedup_by(|next, previous| {
        let both = next.status & previous.status & mapping::status::VVAR != 0 && previous.end == next.start;
        if both {
            previous.end = next.end;
        }
        both
    });
}

/// Runs every kind's calls in every thread, in one visit each, and takes the stub out again.
fn run_programs(
    task: &mut Task,
    maps: &[Mapping],
    gadgets: Gadgets,
    found: &Found,
) -> Result<(Vec<CoreEntry>, MmEntry)> {
    let pid = task.pid;
    let mut views = Vec::new();
    for thread in &task.threads {
        let stopped = thread
            .stopped
            .as_ref()
            .ok_or_else(|| Error::new("dump").task(thread.tid).because("it is not stopped"))?;
        let leader = thread.tid == pid;
        let read = |name: &str| procfs::read(pid, &format!("task/{}/{name}", thread.tid));
        let stat = if leader {
            task.stat.clone()
        } else {
            procfs::stat::parse(&read("stat")?)?
        };
        let status = if leader {
            task.status.clone()
        } else {
            procfs::status::parse(&read("status")?)?
        };
        views.push((thread.tid, Home::of(stopped)?, stat, status));
    }
    let programs = build_programs(pid, &views, &task.threads, found)?;
    let take = |thread: &mut crate::tree::Thread| {
        thread
            .stopped
            .take()
            .ok_or_else(|| Error::new("dump").task(thread.tid).because("it is not stopped"))
    };
    let leader = take(&mut task.threads[0])?;
    let (mut stub, mut leader) = StubProcess::inject(leader, maps, gadgets)?;
    let work = || -> Result<(Vec<CoreEntry>, MmEntry)> {
        let (mut cores, mut mm) = (Vec::new(), MmEntry::default());
        for (index, (mut program, readers)) in programs.into_iter().enumerate() {
            let mut core = CoreEntry::default();
            let outcome = if index == 0 {
                let calls = bounds::ask(&mut program);
                let outcome = stub.run(&mut leader, &program)?;
                mm = bounds::read(pid, &task.stat, &calls, &outcome)?;
                let tc = core.tc.get_or_insert_default();
                (tc.task_state, tc.stop_signo) = match task.state {
                    TaskState::Stopped(signal) => (task_state::STOPPED, Some(signal as u32)),
                    _ => (task_state::ALIVE, None),
                };
                outcome
            } else {
                // The leader waits in the stub; it must not take the other's commands.
                stub.park(&mut leader)?;
                let mut visitor = stub.visit(take(&mut task.threads[index])?, maps)?;
                let outcome = stub.run(&mut visitor, &program);
                task.threads[index].stopped = Some(stub.leave(visitor)?);
                outcome?
            };
            readers.into_iter().try_for_each(|read| read(&outcome, &mut core))?;
            cores.push(core);
        }
        Ok((cores, mm))
    };
    let result = work();
    match stub.remove(leader) {
        Ok(stopped) => task.threads[0].stopped = Some(stopped),
        Err(error) => result.as_ref().map(drop).map_err(|first| {
            Error::new("clean up after a failure").task(pid).because(format!(
                "{}; and then: {}",
                first.chain(),
                error.chain()
            ))
        })?,
    }
    result
}

type View = (i32, Home, procfs::stat::Stat, procfs::status::Status);

/// One program per thread, with the readers of its results.
fn build_programs<'a>(
    pid: i32,
    views: &'a [View],
    threads: &[crate::tree::Thread],
    found: &Found,
) -> Result<Vec<(Program, Vec<resource::Reader<'a>>)>> {
    let mut programs = Vec::new();
    for ((tid, home, stat, status), thread) in views.iter().zip(threads) {
        let Some(stopped) = thread.stopped.as_ref() else {
            continue;
        };
        let view = ThreadView {
            pid,
            tid: *tid,
            leader: *tid == pid,
            stopped,
            home,
            stat,
            status,
            found,
        };
        let mut program = Program::new();
        let readers = TASK_KINDS
            .iter()
            .map(|kind| {
                kind.dump(&view, &mut program)
                    .map_err(|error| error.task(*tid).object(kind.name()))
            })
            .collect::<Result<Vec<_>>>()?;
        programs.push((program, readers));
    }
    Ok(programs)
}

impl Collected {
    /// The seccomp filters of the tree, as images have them. Only once.
    pub fn take_filters(&self) -> SeccompEntry {
        self.found.filters.take().into_entry()
    }

    fn new_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// Looks at all descriptors of a process; open file descriptions that are known already keep their id.
    fn collect_descriptors(&mut self, pid: i32) -> Result<Vec<FdinfoEntry>> {
        let pidfd = sys::pidfd_open(pid).with(|| Error::new("open a pidfd").task(pid))?;
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).with(|| Error::new("list descriptors").task(pid))?;
        let mut numbers: Vec<i32> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        numbers.sort_unstable();
        let mut descriptors = Vec::new();
        for fd in numbers {
            let file = OpenFile::look(pid, fd, pidfd.as_fd())?;
            let flags = if file.info.flags & libc::O_CLOEXEC as u32 != 0 {
                libc::FD_CLOEXEC as u32
            } else {
                0
            };
            let id = match self.same_description(&file) {
                Some(id) => id,
                None => {
                    let id = self.new_id();
                    kind_for(&file)?.share(&file, &mut self.segments)?;
                    self.by_inode
                        .entry((file.stat.st_dev, file.stat.st_ino))
                        .or_default()
                        .push(id);
                    self.open.insert(id, file);
                    id
                }
            };
            self.descriptors.insert((pid, fd), id);
            let kind = kind_for(&self.open[&id])?;
            let r#type = kind.types()[0] as i32;
            descriptors.push(FdinfoEntry {
                id,
                flags,
                r#type,
                fd: fd as u32,
                xattr_security_selinux: None,
            });
        }
        Ok(descriptors)
    }

    fn same_description(&self, file: &OpenFile) -> Option<u32> {
        let candidates = self.by_inode.get(&(file.stat.st_dev, file.stat.st_ino))?;
        candidates.iter().copied().find(|id| {
            let other = &self.open[id];
            let order = sys::kcmp(file.pid, other.pid, Kcmp::File, file.fd as u64, other.fd as u64);
            order.is_ok_and(|order| order.is_eq())
        })
    }

    /// Gives a mapping the id of its file or segment.
    fn name_backing(&mut self, pid: i32, map: &Mapping, vma: &mut VmaEntry, backing: Backing) -> Result<()> {
        let name = format!("map_files/{:x}-{:x}", map.start, map.end);
        let failed = || {
            let text = String::from_utf8_lossy(&map.name).into_owned();
            Error::new("look at a mapped file").task(pid).object(text)
        };
        match backing {
            // The memory of a memfd belongs to its inode: here it is a file like others.
            Backing::File | Backing::Memfd => {
                vma.shmid = u64::from(
                    self.path_file(pid, &name, vma.fdflags.unwrap_or(0))
                        .map_err(|e| failed().because(e))?,
                )
            }
            Backing::SharedAnonymous => {
                let file = File::options()
                    .read(true)
                    .open(format!("/proc/{pid}/{name}"))
                    .with(failed)?;
                vma.shmid = u64::from(self.segments.id_of(file)?);
            }
            Backing::SystemV => {
                let open = || File::options().read(true).open(format!("/proc/{pid}/{name}"));
                vma.shmid = u64::from(self.segments.id_of_system_v(pid, map, open)?);
            }
            Backing::Anonymous | Backing::Kernel => {}
        }
        Ok(())
    }

    /// The id of the file behind a link in `/proc/PID`.
    fn path_file(&mut self, pid: i32, link: &str, flags: u32) -> Result<u32> {
        let path = format!("/proc/{pid}/{link}");
        let failed = || Error::new("look at a file").task(pid).object(path.clone());
        let open_flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let handle = rustix::fs::open(&path, open_flags, rustix::fs::Mode::empty())
            .map_err(std::io::Error::from)
            .with(failed)?;
        let stat = rustix::fs::fstat(&handle).map_err(std::io::Error::from).with(failed)?;
        let key = (stat.st_dev, stat.st_ino, flags);
        if let Some(&id) = self.by_path.get(&key) {
            return Ok(id);
        }
        let target = std::fs::read_link(&path).with(failed)?.into_os_string();
        let link: Vec<u8> = std::os::unix::ffi::OsStringExt::into_vec(target);
        if memfd::is_memfd(&link, &stat) {
            memfd::check_pages(&handle).map_err(|error| error.task(pid).object(path.clone()))?;
            let contents = fd::reopen(handle.as_fd(), libc::O_RDONLY as u32).with(failed)?;
            self.segments.id_of(File::from(contents))?;
        }
        let id = self.new_id();
        self.by_path.insert(key, id);
        self.paths.insert(
            id,
            PathFile {
                pid,
                link,
                stat,
                handle,
                flags,
            },
        );
        Ok(id)
    }

    /// Asks every kind whether its files can be carried: all reasons why not, before anything is changed.
    ///
    /// # Errors
    /// The reasons, one after the other.
    pub fn check_files(&self, store: &dyn ImageStore, options: &Options) -> Result<()> {
        let mut shared = self.shared();
        let dump = FileDump::new(store, options, &self.descriptors, &self.open, &mut shared);
        let reasons: Vec<Error> = self
            .open
            .values()
            .filter_map(|file| {
                kind_for(file)
                    .and_then(|kind| kind.check(file, &dump))
                    .map_err(|error| error.task(file.pid).object(file.describe()))
                    .err()
            })
            .chain(fd::locks::check(&dump).err())
            .chain(self.segments.system_v.describe().err())
            .collect();
        let more = reasons
            .iter()
            .skip(1)
            .map(|error| error.chain())
            .collect::<Vec<_>>()
            .join("; and ");
        match reasons.into_iter().next() {
            None => Ok(()),
            Some(first) if more.is_empty() => Err(first),
            Some(first) => Err(Error::new("dump files").because(format!("{}; and {more}", first.chain()))),
        }
    }

    /// Describes all files.
    ///
    /// # Errors
    /// When one cannot be described.
    pub fn dump_files(&self, store: &dyn ImageStore, options: &Options) -> Result<BTreeMap<u32, FileEntry>> {
        let mut shared = self.shared();
        let mut dump = FileDump::new(store, options, &self.descriptors, &self.open, &mut shared);
        let mut entries = BTreeMap::new();
        for (&id, file) in &self.paths {
            let source = regular::Source {
                pid: file.pid,
                link: &file.link,
                stat: &file.stat,
            };
            if memfd::is_memfd(&file.link, &file.stat) {
                let entry = memfd::describe_inode(&source, &file.handle, id, file.flags, &mut dump)?;
                entries.insert(id, entry);
                continue;
            }
            let reg = regular::describe_path(&source, &file.handle, id, &mut dump)?;
            let entry = FileEntry {
                r#type: FdTypes::Reg as i32,
                id,
                reg: Some(reg),
                ..FileEntry::default()
            };
            entries.insert(id, entry);
        }
        for (&id, file) in &self.open {
            let entry = kind_for(file)?
                .dump(file, id, &mut dump)
                .map_err(|error| error.task(file.pid).object(file.describe()))?;
            entries.insert(id, entry);
        }
        fd::locks::dump(&mut dump)?;
        dump.close()?;
        self.segments.system_v.dump(IPC_NAMESPACE, store)?;
        entries.append(&mut shared.extra);
        Ok(entries)
    }

    /// What kinds are told about the tree.
    fn shared(&self) -> Shared {
        let mut shared = Shared::default();
        shared.segments = self.segments.ids();
        shared.pids.clone_from(&self.pids);
        shared.next_id = self.next_id;
        shared
    }

    /// Tells that a process that runs is of the tree, which itself knows it as `inner`.
    pub fn know(&mut self, pid: i32, inner: u32) {
        self.pids.insert(pid, inner as i32);
    }

    /// Numbers of the pseudo terminals that control sessions of the tree, by session.
    pub fn terminals(&self) -> BTreeMap<u32, u32> {
        fd::tty::terminals(&self.open, &self.pids)
    }

    /// Looks at the descriptors of a process that runs; returns the highest.
    ///
    /// # Errors
    /// When one is of a kind that is not supported.
    pub fn look_at_running(&mut self, pid: i32, pidfd: std::os::fd::BorrowedFd<'_>) -> Result<u32> {
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).with(|| Error::new("list descriptors").task(pid))?;
        let numbers = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let mut highest = 0;
        for fd in numbers {
            // One that is closed meanwhile is none.
            let Ok(file) = OpenFile::look(pid, fd, pidfd) else {
                continue;
            };
            kind_for(&file)?;
            let id = self.next_id;
            self.next_id += 1;
            self.descriptors.insert((pid, fd), id);
            self.open.insert(id, file);
            highest = highest.max(fd as u32);
        }
        Ok(highest)
    }

    /// Where packets come in that must be kept away from the tree while it is taken apart.
    ///
    /// # Errors
    /// When a socket cannot be asked.
    pub fn endpoints(&self) -> Result<Endpoints> {
        let mut all = Endpoints::default();
        for file in self.open.values() {
            all.extend(kind_for(file)?.endpoint(file)?);
        }
        Ok(all)
    }

    /// Makes all files close without a word; see [`FileKind::abandon`].
    ///
    /// # Errors
    /// When one would make itself heard.
    pub fn abandon_files(&self) -> Result<()> {
        if self.closes {
            return Ok(());
        }
        self.open.values().try_for_each(|file| kind_for(file)?.abandon(file))
    }

    /// Removes what the tree has made beside itself (System V segments), when it lives elsewhere.
    pub fn abandon_segments(&self) {
        self.segments.system_v.abandon(&|pid| self.pids.contains_key(&pid));
    }

    /// The image of a task.
    pub fn task_of(&self, object: MemoryObject) -> Option<&TaskImage> {
        self.tasks
            .iter()
            .find(|task| MemoryObject::Task(task.entry.pid) == object)
    }

    /// All open files, by image id.
    pub fn open_files(&self) -> &BTreeMap<u32, OpenFile> {
        &self.open
    }
}

fn kind_for(file: &OpenFile) -> Result<&'static dyn FileKind> {
    FILE_KINDS
        .iter()
        .copied()
        .find(|kind| resource::FileKind::recognises(*kind, file))
        .ok_or_else(|| {
            Error::new("carry a file")
                .task(file.pid)
                .object(file.describe())
                .because("files of this kind are not supported yet")
        })
}
