//! Everything of a tree but tasks and memory: descriptors, per-process and per-thread state, and the last moment.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};

use whimbrel_images::chain::PageStore;
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun};
use whimbrel_images::proto::{CoreEntry, FileEntry, SeccompEntry, VmaEntry};
use whimbrel_images::store::ImageStore;

use super::Build;
use super::build::{TaskBuild, clone_into};
use super::contents::Contents;
use super::inherit::{Inheritance, Inherited};
use super::lazy::{LazyTask, Watch};
use super::memory::Plan;
use crate::arch;
use crate::dump::runs::RunSet;
use crate::error::{Context, Error, Result};
use crate::kernel::sys;
use crate::procfs::maps;
use crate::remote::{Arg, Newborn, Program, Puppet, RemoteAddr, RemoteMemory};
use crate::resource::fd::{self, FileRestore, locks, memfd, regular};
use crate::resource::mem::{bounds, mapping, mapping::status, sysv};
use crate::resource::task::seccomp;
use crate::resource::{OpenedBy, Restoring, Stage, TASK_KINDS};
use crate::tree::{TaskImage, TreeImage, task_state};

/// Bytes to write over a task's own vdso, by address.
pub(super) type Patches = Vec<(u64, Vec<u8>)>;

/// A tree that is whole and waits for its last step.
pub struct Ready<'a> {
    build: Build,
    image: &'a TreeImage,
    files: FileRestore<'a>,
}

impl Build {
    /// Makes or opens everything that tasks map, execute, or stand in: shared segments, memfds, files by their paths.
    ///
    /// # Errors
    /// When one is missing or another.
    pub fn open_backing(&mut self, image: &TreeImage, restore: &mut FileRestore<'_>) -> Result<HashMap<u64, OwnedFd>> {
        self.lend_masters(restore);
        self.segments.make(&image.tasks)?;
        let root = image.tasks.first();
        if let Some(namespace) = root.and_then(|task| task.ids.ipc_ns_id) {
            let pid = self.root;
            self.system_v = sysv::Segments::make(namespace, restore.store, &mut |program| self.run(pid, program))?;
        }
        for (id, file) in memfd::segments(restore)? {
            self.segments.adopt(u64::from(id), file);
        }
        let mut wanted: BTreeMap<u32, u32> = BTreeMap::new();
        for task in image.tasks.iter().filter(|task| !task.is_zombie()) {
            let backed = |vma: &&VmaEntry| vma.status & (status::FILE_PRIVATE | status::FILE_SHARED) != 0;
            for vma in task.mm.vmas.iter().filter(backed) {
                wanted.insert(vma.shmid as u32, vma.fdflags.unwrap_or(libc::O_RDONLY as u32));
            }
            wanted.insert(task.mm.exe_file_id, libc::O_RDONLY as u32);
            wanted.insert(task.fs.cwd_id, libc::O_PATH as u32);
            wanted.insert(task.fs.root_id, libc::O_PATH as u32);
        }
        let mut files = HashMap::new();
        for (id, flags) in wanted {
            let missing = || Error::new("open a file").because(format!("the image has no file {id}"));
            let entry = image.files.get(&id).ok_or_else(missing)?;
            let file = match &entry.memfd {
                Some(memfd) => {
                    // It is an open file to the last: a mapping alone has size and seals, too.
                    let file = memfd::open_inode(memfd.inode_id, flags, restore)?;
                    let copy = file.try_clone().context("duplicate a descriptor")?;
                    restore.opened.insert(id, copy);
                    file
                }
                None => regular::open_entry(entry.reg.as_ref().ok_or_else(missing)?, flags, restore)?,
            };
            files.insert(u64::from(id), file);
        }
        Ok(files)
    }

    /// Makes all mappings of a task: the vdso in its place, then the rest. `has_pages` tells whether a range has contents.
    ///
    /// # Errors
    /// As [`Build::map`].
    pub fn map_task(
        &mut self,
        task: &TaskImage,
        files: &HashMap<u64, OwnedFd>,
        their_vdso: Option<&[u8]>,
        already: &HashSet<(u64, u64)>,
        has_pages: &dyn Fn(u64, u64) -> bool,
    ) -> Result<Vec<(u64, Vec<u8>)>> {
        let pid = task.entry.pid;
        let vdso = self.place_vdso(pid, &task.mm.vmas, their_vdso)?;
        let make = |vma: &&whimbrel_images::proto::VmaEntry| {
            let code = vdso.keep_image && vma.status & status::VDSO != 0;
            (!mapping::is_kernel_made(vma) || code) && !already.contains(&(vma.start, vma.end))
        };
        let plans: Vec<Plan<'_>> = task
            .mm
            .vmas
            .iter()
            .filter(make)
            .map(|vma| {
                let code = vma.status & status::VDSO != 0;
                Plan {
                    vma,
                    writable: code || mapping::needs_write(vma, has_pages(vma.start, vma.end)),
                }
            })
            .collect();
        self.map(pid, &plans, files)?;
        Ok(vdso.patches)
    }

    /// Sets protections and advice when the contents are there.
    ///
    /// # Errors
    /// When the kernel refuses one.
    pub fn settle_task(&mut self, task: &TaskImage, has_pages: &dyn Fn(u64, u64) -> bool) -> Result<()> {
        let mut program = Program::new();
        for vma in task.mm.vmas.iter().filter(|vma| !mapping::is_kernel_made(vma)) {
            mapping::settle(
                &mut program,
                vma,
                mapping::needs_write(vma, has_pages(vma.start, vma.end)),
            );
        }
        self.run(task.entry.pid, &program).map(drop)
    }

    /// As [`Build::settle_task`], for mappings of which only their accounting tells whether they were writable.
    ///
    /// # Errors
    /// When the kernel refuses one.
    pub fn settle_all(&mut self, task: &TaskImage) -> Result<()> {
        self.settle_task(task, &|_, _| false)
    }

    /// Restores everything else and leaves the tree at its last step.
    ///
    /// # Errors
    /// When any of it cannot be restored; the tree is removed.
    pub fn complete<'a>(
        mut self,
        image: &'a TreeImage,
        mut files: FileRestore<'a>,
        paths: &HashMap<u64, OwnedFd>,
    ) -> Result<Ready<'a>> {
        // Of sessions whose leaders came with the memory that they inherit.
        self.lend_masters(&mut files);
        let on_paths: HashSet<u32> = paths.keys().map(|&id| id as u32).collect();
        let by_descriptor: HashSet<u32> = image.tasks.iter().flat_map(|task| &task.fds).map(|fd| fd.id).collect();
        for entry in image.files.values().filter(|entry| by_descriptor.contains(&entry.id)) {
            self.open_in_task(entry, &mut files)
                .map_err(|error| error.object(fd::describe(entry)))?;
        }
        fd::open_all(&mut files, &|id| by_descriptor.contains(&id) || !on_paths.contains(&id))?;
        self.settle_terminals(&files)?;
        let numbers = image
            .tasks
            .iter()
            .flat_map(|task| task.fds.iter().map(|fd| ((task.entry.pid as i32, fd.fd as i32), fd.id)));
        let numbers: HashMap<(i32, i32), u32> = numbers.collect();
        locks::restore(&files, &|pid, fd| numbers.get(&(pid, fd)).copied())?;
        let (mut installed, mut tables) = (HashSet::new(), HashSet::new());
        for task in image.tasks.iter().filter(|task| !task.is_zombie()) {
            let pid = task.entry.pid as i32;
            self.restore_process(task, &image.seccomp, &files, paths, &mut installed, &mut tables)
                .map_err(|error| error.task(pid))?;
        }
        for task in image.tasks.iter().filter(|task| !task.is_zombie()) {
            self.restore_threads(task, &image.seccomp)
                .map_err(|error| error.task(task.entry.pid as i32))?;
        }
        // Before children ask for a signal when their parent, the thread, ends (PR_SET_PDEATHSIG).
        for task in image.tasks.iter().filter(|task| task.leader_is_dead()) {
            self.end_leader(task)
                .map_err(|error| error.task(task.entry.pid as i32))?;
        }
        for task in image.tasks.iter().rev().filter(|task| task.is_zombie()) {
            self.end_zombie(task)?;
        }
        for task in image.tasks.iter().filter(|task| !task.is_zombie()) {
            self.restore_last(task, &image.seccomp, tables.remove(&task.ids.files_id))
                .map_err(|error| error.task(task.entry.pid as i32))?;
        }
        Ok(Ready {
            build: self,
            image,
            files,
        })
    }

    /// Lets a task open what nobody else can.
    fn open_in_task(&mut self, entry: &FileEntry, files: &mut FileRestore<'_>) -> Result<()> {
        let Some(opened) = fd::kind_of(entry)?.opened_by(entry, files)? else {
            return Ok(());
        };
        let descriptor = self.run(opened.task, &opened.program)?.result(opened.descriptor);
        let taken = sys::take_descriptor(self.tid_of(opened.task)?, descriptor as i32);
        let mut program = Program::new();
        program.call("close a descriptor", libc::SYS_close, &[descriptor.into()]);
        self.run(opened.task, &program)?;
        let (kind, key) = OpenedBy::key(entry);
        files.hold(kind, key, taken.context("take a descriptor")?);
        Ok(())
    }

    fn restore_process(
        &mut self,
        task: &TaskImage,
        filters: &SeccompEntry,
        files: &FileRestore<'_>,
        paths: &HashMap<u64, OwnedFd>,
        installed: &mut HashSet<u32>,
        tables: &mut HashSet<u32>,
    ) -> Result<()> {
        let pid = task.entry.pid;
        let path = |id: u32| {
            let file = paths.get(&u64::from(id)).map(AsFd::as_fd);
            file.ok_or_else(|| Error::new("restore").because(format!("the image has no file {id}")))
        };
        // Executable, working directory and root, at numbers of ours.
        let mut program = Program::new();
        let handed = self.hand(
            &mut program,
            &[
                path(task.mm.exe_file_id)?,
                path(task.fs.cwd_id)?,
                path(task.fs.root_id)?,
            ],
        )?;
        let executable = self.control + 1;
        program.call(
            "place a descriptor",
            libc::SYS_dup3,
            &[handed[0], executable.into(), libc::O_CLOEXEC.into()],
        );
        bounds::restore(&mut program, &task.mm, executable);
        if !is_root(path(task.fs.root_id)?)? {
            program.call("enter the root directory", libc::SYS_fchdir, &[handed[2]]);
            let dot = program.string(b".");
            program.call("change the root directory", libc::SYS_chroot, &[dot.into()]);
        }
        program.call("enter the working directory", libc::SYS_fchdir, &[handed[1]]);
        program.call(
            "set the umask",
            libc::SYS_umask,
            &[task.fs.umask.unwrap_or(0o22).into()],
        );
        for descriptor in handed {
            program.call("close a descriptor", libc::SYS_close, &[descriptor]);
        }
        program.call("close a descriptor", libc::SYS_close, &[executable.into()]);
        self.run(pid, &program)?;

        // A table that several tasks share is filled once.
        if tables.insert(task.ids.files_id) {
            self.install_descriptors(task, files)?;
        }
        let mut program = Program::new();
        let mut seen = HashSet::new();
        for descriptor in task.fds.iter().filter(|descriptor| seen.insert(descriptor.id)) {
            let missing =
                || Error::new("restore a descriptor").because(format!("the image has no file {}", descriptor.id));
            let entry = files.entries.get(&descriptor.id).ok_or_else(missing)?;
            if installed.insert(descriptor.id) {
                fd::kind_of(entry)?.install(entry, descriptor.fd, &mut program)?;
            }
        }
        locks::install(files.store, pid, &mut program)?;
        for kind in TASK_KINDS {
            let thread = Restoring {
                core: &task.cores[0],
                leader: true,
                process: task.living_cores(),
                filters,
            };
            kind.restore(Stage::Process, &thread, &mut program)
                .map_err(|error| error.object(kind.name()))?;
        }
        self.run(pid, &program).map(drop)
    }

    fn install_descriptors(&mut self, task: &TaskImage, files: &FileRestore<'_>) -> Result<()> {
        for chunk in task.fds.chunks(Build::HAND) {
            let handles = chunk
                .iter()
                .map(|descriptor| {
                    let file = files.opened.get(&descriptor.id).map(AsFd::as_fd);
                    file.ok_or_else(|| {
                        Error::new("restore a descriptor")
                            .object(format!("fd {}", descriptor.fd))
                            .because("its file was not made")
                    })
                })
                .collect::<Result<Vec<_>>>()?;
            let mut program = Program::new();
            // They arrive at the lowest free numbers, which may be wanted by others: first out of the way.
            let arrived = self.hand(&mut program, &handles)?;
            let aside = self.control + 1;
            for (index, descriptor) in arrived.iter().enumerate() {
                let to = Arg::from(aside + index as i32);
                program.call(
                    "move a descriptor",
                    libc::SYS_dup3,
                    &[*descriptor, to, libc::O_CLOEXEC.into()],
                );
                program.call("close a descriptor", libc::SYS_close, &[*descriptor]);
            }
            for (index, descriptor) in chunk.iter().enumerate() {
                let flags = if descriptor.flags & libc::FD_CLOEXEC as u32 != 0 {
                    libc::O_CLOEXEC
                } else {
                    0
                };
                let from = Arg::from(aside + index as i32);
                let what = format!("install fd {}", descriptor.fd);
                program.call(what, libc::SYS_dup3, &[from, descriptor.fd.into(), flags.into()]);
            }
            let last = aside + chunk.len() as i32 - 1;
            program.call(
                "close descriptors",
                libc::SYS_close_range,
                &[aside.into(), last.into(), 0.into()],
            );
            self.run(task.entry.pid, &program)?;
        }
        Ok(())
    }

    fn restore_threads(&mut self, task: &TaskImage, filters: &SeccompEntry) -> Result<()> {
        const FLAGS: i32 = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        let (pid, arena) = (task.entry.pid, self.arena);
        for &tid in &task.entry.threads[1..] {
            let (mut program, mut newborn) = (Program::new(), Newborn::new());
            clone_into(&mut program, tid, 0, FLAGS as u64, &format!("create thread {tid}"));
            let build = self.task(pid)?;
            build.leader.run_with_children(arena, &program, &mut newborn)?;
            let (_, thread) = newborn
                .into_iter()
                .next()
                .ok_or_else(|| Error::new("create a thread").because("it did not appear"))?;
            build.threads.insert(tid, thread);
        }
        self.in_each_thread(task, filters, Stage::Thread)
    }

    /// `closes`: is it the first of those that share its descriptors?
    fn restore_last(&mut self, task: &TaskImage, filters: &SeccompEntry, closes: bool) -> Result<()> {
        let pid = task.entry.pid;
        // Signals that are queued from here on stay pending until the tree runs. Not so the trap of the stub: blocked, it
        // would take the program's handler away (force_sig in the kernel), and only ptrace sees it.
        let trap = 1u64 << (libc::SIGTRAP - 1);
        let build = self.task(pid)?;
        for puppet in std::iter::once(&build.leader).chain(build.threads.values()) {
            puppet.stopped()?.set_signal_mask(!trap)?;
        }
        for (tid, core) in task.living_threads() {
            if seccomp::is_under(core) {
                build.thread(tid)?.stopped()?.suspend_seccomp(true)?;
            }
        }
        if closes {
            // Before limits on descriptors are set.
            let mut program = Program::new();
            program.call("close our channel", libc::SYS_close, &[self.control.into()]);
            self.run(pid, &program)?;
        }
        self.in_each_thread(task, filters, Stage::Final)
    }

    fn in_each_thread(&mut self, task: &TaskImage, filters: &SeccompEntry, stage: Stage) -> Result<()> {
        let arena = self.arena;
        for (index, (tid, core)) in task.living_threads().enumerate() {
            let leader = index == 0;
            let thread = Restoring {
                core,
                leader,
                process: task.living_cores(),
                filters,
            };
            let mut program = Program::new();
            for kind in TASK_KINDS {
                kind.restore(stage, &thread, &mut program)
                    .map_err(|error| error.object(kind.name()))?;
            }
            if leader && stage == Stage::Final {
                bounds::restore_dumpable(&mut program, &task.mm);
            }
            self.task(task.entry.pid)?.thread(tid)?.run(arena, &program)?;
        }
        Ok(())
    }

    /// Ends a leader that other threads outlive: the first of them takes its place with us.
    fn end_leader(&mut self, task: &TaskImage) -> Result<()> {
        let arena = self.arena;
        let tc = task.cores[0].tc.clone().unwrap_or_default();
        let mut program = Program::new();
        let name = program.string(tc.comm.as_bytes());
        let args = [libc::PR_SET_NAME.into(), name.into()];
        program.call("set the name", libc::SYS_prctl, &args);
        program.call("end", libc::SYS_exit, &[(tc.exit_code >> 8 & 0xff).into()]);
        let build = self.task(task.entry.pid)?;
        let (id, first) = build
            .threads
            .pop_first()
            .ok_or_else(|| Error::new("end the first thread").because("there is no other"))?;
        build.leader_id = id;
        std::mem::replace(&mut build.leader, first).leave(arena, &program)
    }

    fn end_zombie(&mut self, task: &TaskImage) -> Result<()> {
        let arena = self.arena;
        let tc = task.cores[0].tc.clone().unwrap_or_default();
        let Some(TaskBuild { leader, .. }) = self.ended(task.entry.pid) else {
            return Ok(());
        };
        let (status, mut program) = (tc.exit_code as i32, Program::new());
        let name = program.string(tc.comm.as_bytes());
        program.call(
            "set the name",
            libc::SYS_prctl,
            &[libc::PR_SET_NAME.into(), name.into()],
        );
        // The status of wait(2): a signal in the low seven bits, or an exit code above them.
        let signal = Some(status & 0x7f).filter(|&signal| signal != 0);
        if signal.is_none() {
            program.call("end", libc::SYS_exit_group, &[(status >> 8 & 0xff).into()]);
        } else {
            // No core file: the death is only repeated.
            let args = [libc::PR_SET_DUMPABLE.into(), 0.into(), 0.into(), 0.into(), 0.into()];
            program.call("do not dump core", libc::SYS_prctl, &args);
        }
        leader.end(arena, &program, signal)
    }
}

impl Ready<'_> {
    /// The root's process id in our pid namespace.
    pub fn root_pid(&self) -> Option<i32> {
        self.build.root_pid()
    }

    /// Its processes, in our pid namespace; not its zombies.
    pub fn pids(&self) -> Vec<i32> {
        self.build.pids()
    }

    /// Takes what is ours out of every task and gives the threads their registers. Nothing runs yet.
    ///
    /// # Errors
    /// When a task died or cannot take its registers.
    pub fn arm(&mut self) -> Result<()> {
        let arena = self.build.arena;
        for task in self.image.tasks.iter().filter(|task| !task.is_zombie()) {
            let build = self.build.task(task.entry.pid)?;
            let failed = |error: Error| error.task(task.entry.pid as i32);
            arm_task(task, build, arena.0).map_err(failed)?;
        }
        Ok(())
    }

    /// The last step: files are let go (the network must be open by now), and everything runs. Tells when that was.
    ///
    /// # Errors
    /// When a file cannot be let go, or a task died.
    pub fn go(mut self) -> Result<std::time::Instant> {
        let image = self.image;
        for (id, entry) in &image.files {
            if self.files.opened.contains_key(id) {
                fd::kind_of(entry)?
                    .resume(entry, &mut self.files)
                    .map_err(|error| error.object(fd::describe(entry)))?;
            }
        }
        let stop_all = self.build.options.leave_stopped;
        let stopped =
            |task: &&TaskImage| task.state() == task_state::STOPPED || (stop_all && task.state() == task_state::ALIVE);
        for task in image.tasks.iter().filter(stopped) {
            let leader = self.build.task(task.entry.pid)?.leader.tid();
            let signal = task.cores[0]
                .tc
                .as_ref()
                .and_then(|tc| tc.stop_signo)
                .unwrap_or(libc::SIGSTOP as u32);
            // It is pending when the thread is let go, so that the task stops before it runs.
            crate::kernel::sys::kill(leader, signal as i32).with(|| Error::new("stop").task(leader))?;
        }
        let now = std::time::Instant::now();
        self.build.release().map(|()| now)
    }
}

fn arm_task(task: &TaskImage, build: &mut TaskBuild, arena: RemoteAddr) -> Result<()> {
    // The arena is unmapped by an instruction outside of it: of the vdso, or of any text that the task has.
    let tid = build.leader.tid();
    let mappings = maps::parse(&crate::procfs::read(tid, "maps")?)?;
    let memory = RemoteMemory::new(tid);
    let executable = mappings
        .iter()
        .filter(|m| m.prot & libc::PROT_EXEC != 0 && m.start != arena.0);
    let vdso_first = executable
        .clone()
        .filter(|m| m.is_named("[vdso]"))
        .chain(executable.filter(|m| !m.is_named("[vdso]")));
    let syscall = vdso_first
        .filter_map(|mapping| {
            let text = memory
                .read_vec(RemoteAddr(mapping.start), mapping.len() as usize)
                .ok()?;
            let offset = text.windows(2).position(|window| window == [0x0f, 0x05])?;
            Some(RemoteAddr(mapping.start + offset as u64))
        })
        .next()
        .ok_or_else(|| Error::new("find a system call instruction").because("the task's text has none"))?;
    let unmapped = build.leader.borrowed_call(
        syscall,
        libc::SYS_munmap,
        [arena.0, crate::remote::seed::ARENA_SIZE, 0, 0, 0, 0],
    )?;
    if unmapped != 0 {
        return Err(Error::new("unmap the arena").because(std::io::Error::from_raw_os_error(-unmapped as i32)));
    }
    for (tid, core) in task.living_threads() {
        set_registers(build.thread(tid)?, core)?;
    }
    Ok(())
}

fn set_registers(puppet: &Puppet, core: &CoreEntry) -> Result<()> {
    let info = core
        .thread_info
        .as_ref()
        .ok_or_else(|| Error::new("restore registers").because("the image has none for this architecture"))?;
    let stopped = puppet.stopped()?;
    let (registers, xstate) = arch::from_image(info, &stopped.xstate()?)?;
    let queues = [
        core.thread_core.as_ref().and_then(|thread| thread.signals_p.as_ref()),
        core.tc.as_ref().and_then(|task| task.signals_s.as_ref()),
    ];
    let pending = queues.into_iter().flatten().any(|queue| !queue.signals.is_empty());
    stopped.set_registers(&registers.for_restore(pending))?;
    stopped.set_xstate(&xstate)?;
    let mask = core.thread_core.as_ref().and_then(|thread| thread.blk_sigset);
    stopped.set_signal_mask(mask.or_else(|| core.tc.as_ref().map(|tc| tc.blk_sigset)).unwrap_or(0))
}

fn is_root(directory: std::os::fd::BorrowedFd<'_>) -> Result<bool> {
    let io = |errno: rustix::io::Errno| std::io::Error::from(errno);
    let theirs = rustix::fs::fstat(directory)
        .map_err(io)
        .context("look at the root directory")?;
    let ours = rustix::fs::stat("/")
        .map_err(io)
        .context("look at the root directory")?;
    Ok((theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino))
}

/// Restores a tree from an image set whose memory is in `pages`, up to its last step.
///
/// # Errors
/// When any of it cannot be restored; nothing is left.
pub fn from_directory<'a>(
    image: &'a TreeImage,
    store: &'a dyn ImageStore,
    pages: &PageStore,
    options: &'a super::Options,
) -> Result<Ready<'a>> {
    from_directory_with(image, store, pages, options, &HashMap::new(), &mut |_| Ok(())).map(|(ready, _)| ready)
}

/// As [`from_directory`]; the pages of `lazy` are left missing, and watched. `created` is called with the root's process
/// id as soon as the tasks exist, empty.
///
/// # Errors
/// As [`from_directory`], and those of `created`.
pub fn from_directory_with<'a>(
    image: &'a TreeImage,
    store: &'a dyn ImageStore,
    pages: &PageStore,
    options: &'a super::Options,
    lazy: &HashMap<u32, RunSet>,
    created: &mut dyn FnMut(i32) -> Result<()>,
) -> Result<(Ready<'a>, Vec<LazyTask>)> {
    super::lazy::check_present(pages, lazy)?;
    let inheritance = Inheritance::of(image, pages, lazy)?;
    let skeleton = super::Skeleton::of(image, store)?;
    let later = |pid: u32| inheritance.is_heir(pid);
    let mut build = Build::tasks_but(&skeleton, options.clone(), &later)?;
    created(build.root_pid().unwrap_or_default())?;
    let mut files = FileRestore::new(store, options, &image.files);
    let paths = build.open_backing(image, &mut files)?;
    let has_pages = |pid: u32| {
        let runs = pages.runs(MemoryObject::Task(pid)).unwrap_or(&[]);
        move |start: u64, end: u64| runs.iter().any(|run| run.run.start < end && run.run.end() > start)
    };
    let living = || image.tasks.iter().filter(|task| !task.is_zombie());
    let mut patches = Vec::new();
    let mut filled = HashSet::new();
    // Generation after generation: who inherits memory is forked when it is there.
    loop {
        let generation: Vec<&TaskImage> = living()
            .filter(|task| build.has(task.entry.pid) && filled.insert(task.entry.pid))
            .collect();
        let first = patches.is_empty();
        let shared = |object: &MemoryObject| first && matches!(object, MemoryObject::Shmem(_));
        let mut objects: HashSet<MemoryObject> = pages.objects().filter(shared).collect();
        for task in &generation {
            let pid = task.entry.pid;
            let failed = |error: Error| error.task(pid as i32);
            let kept = match inheritance.of_task(pid) {
                Some(inherited) => build.settle_inheritance(pid, inherited).map_err(failed)?,
                None if first => HashSet::new(),
                None => build.settle_inheritance(pid, &Inherited::default()).map_err(failed)?,
            };
            let vdso = vdso_contents(task, pages)?;
            let made = build
                .map_task(task, &paths, vdso.as_deref(), &kept, &has_pages(pid))
                .map_err(failed)?;
            if let Some(inherited) = inheritance.of_task(pid) {
                build.grow_inheritance(pid, inherited).map_err(failed)?;
            }
            patches.push((pid, made));
            objects.insert(MemoryObject::Task(pid));
        }
        let contents = Contents {
            pages,
            image,
            patches: &patches,
            lazy,
            inheritance: &inheritance,
        };
        let mut sink = build.memory_sink()?;
        for task in generation {
            // What it has inherited is there already.
            if inheritance.of_task(task.entry.pid).is_none()
                && let Some(vacant) = build.vacant(task)
            {
                sink.set_vacant(task.entry.pid, vacant);
            }
        }
        contents.fill(&sink, &objects)?;
        drop(sink);
        let heirs: Vec<u32> = skeleton
            .tasks
            .iter()
            .filter(|(entry, _)| later(entry.pid) && !build.has(entry.pid) && build.has(entry.ppid))
            .map(|(entry, _)| entry.pid)
            .collect();
        if heirs.is_empty() {
            break;
        }
        for pid in heirs {
            build.create_later(&skeleton, pid, &later)?;
        }
    }
    build.form_groups(&skeleton)?;
    for (pid, patches) in patches {
        let tid = build.task(pid)?.leader.tid();
        patches
            .iter()
            .try_for_each(|(at, bytes)| RemoteMemory::new(tid).write_forced(RemoteAddr(*at), bytes))?;
    }
    for task in living() {
        build
            .settle_task(task, &has_pages(task.entry.pid))
            .map_err(|error| error.task(task.entry.pid as i32))?;
    }
    let watches = watch_all(&mut build, image, lazy)?;
    let mut ready = build.complete(image, files, &paths)?;
    let lazy = register_all(watches)?;
    ready.arm()?;
    Ok((ready, lazy))
}

/// A task to be watched, and what it lacks.
pub type Watched<'a> = (Watch, &'a TaskImage, RunSet);

/// Makes a userfaultfd in every task that lacks something; they still have all privileges.
///
/// # Errors
/// When one cannot be made.
pub fn watch_all<'a>(build: &mut Build, image: &'a TreeImage, lazy: &HashMap<u32, RunSet>) -> Result<Vec<Watched<'a>>> {
    let mut watches = Vec::new();
    for task in image.tasks.iter().filter(|task| !task.is_zombie()) {
        if let Some(missing) = lazy.get(&task.entry.pid).filter(|missing| !missing.is_empty()) {
            watches.push((Watch::make(build, task)?, task, missing.clone()));
        }
    }
    Ok(watches)
}

/// Registers what is missing. Last, so that putting the tree together meets no missing page.
///
/// # Errors
/// As [`Watch::register`].
pub fn register_all(watches: Vec<Watched<'_>>) -> Result<Vec<LazyTask>> {
    let register = |(watch, task, missing): Watched<'_>| watch.register(task, missing);
    watches.into_iter().map(register).collect()
}

/// The code of the vdso that a task was dumped with, where its image has it.
fn vdso_contents(task: &TaskImage, pages: &PageStore) -> Result<Option<Vec<u8>>> {
    use whimbrel_images::page::{PageSource, PageState};
    let Some(vma) = task.mm.vmas.iter().find(|vma| vma.status & status::VDSO != 0) else {
        return Ok(None);
    };
    let run = PageRun {
        start: vma.start,
        pages: (vma.end - vma.start) / PAGE_SIZE as u64,
    };
    if run.pages > 64 {
        return Err(Error::new("read the vdso").because("its mapping is too large to be one"));
    }
    let mut code = vec![0u8; run.bytes() as usize];
    let states = pages
        .read_pages(MemoryObject::Task(task.entry.pid), run, &mut code)
        .context("read the vdso")?;
    Ok(states.contains(&PageState::Data).then_some(code))
}
