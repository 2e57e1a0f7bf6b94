//! A tree under construction: its tasks, and handing them descriptors.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use whimbrel_images::proto::PstreeEntry;
use whimbrel_images::store::ImageStore;

use super::Options;
use crate::error::{Context, Error, Result};
use crate::procfs::maps;
use crate::remote::seed::{self, ARENA_SIZE};
use crate::remote::{Arena, Arg, Newborn, Program, Puppet, RemoteAddr};
use crate::resource::fd::tty;
use crate::resource::mem::{mapping, sysv};
use crate::resource::task::tables;
use crate::tree::{TaskImage, TreeImage};

/// Room behind the arena for moving the vdso about.
pub(super) const SPARE: u64 = 4 << 20;
/// Descriptors in one message: the kernel's SCM_MAX_FD.
const MAX_DESCRIPTORS: usize = 253;

/// The shape of a tree: what must be known to create its tasks.
#[derive(Clone, Debug, Default)]
pub struct Skeleton {
    /// Ids of all tasks, parents first, with whether each is a zombie.
    pub tasks: Vec<(PstreeEntry, bool)>,
    /// Flags of clone(2) for tables that a task shares with its parent, by task; none where there is no entry.
    pub flags: BTreeMap<u32, u64>,
    /// Numbers of the pseudo terminals that control sessions, by session.
    pub terminals: BTreeMap<u32, u32>,
    /// Address ranges that any of them uses.
    pub ranges: Vec<(u64, u64)>,
    /// The highest descriptor that any of them uses.
    pub highest_descriptor: u32,
}

impl Skeleton {
    /// Of a whole image.
    ///
    /// # Errors
    /// When the image is damaged.
    pub fn of(image: &TreeImage, store: &dyn ImageStore) -> Result<Skeleton> {
        let ranges = |task: &TaskImage| task.mm.vmas.iter().map(|vma| (vma.start, vma.end)).collect::<Vec<_>>();
        let terminals = tty::controlling(store)?;
        Ok(Skeleton {
            terminals: (terminals.iter())
                .map(|terminal| (terminal.session, terminal.index))
                .collect(),
            tasks: image
                .tasks
                .iter()
                .map(|task| (task.entry.clone(), task.is_zombie()))
                .collect(),
            flags: image
                .tasks
                .iter()
                .filter_map(|task| {
                    let parent = image.tasks.iter().find(|other| other.entry.pid == task.entry.ppid)?;
                    Some((task.entry.pid, tables::flags_of(&task.ids, &parent.ids)))
                })
                .filter(|&(_, flags)| flags != 0)
                .collect(),
            ranges: image.tasks.iter().flat_map(ranges).collect(),
            highest_descriptor: image
                .tasks
                .iter()
                .flat_map(|task| &task.fds)
                .map(|fd| fd.fd)
                .max()
                .unwrap_or(0),
        })
    }
}

/// A task under construction.
///
/// Fields are dropped in this order: the kernel does not tell of a leader's death before its tracer has taken note of the
/// deaths of all other threads (ptrace(2), "Death under ptrace").
pub(super) struct TaskBuild {
    /// Its other threads, by id in its pid namespace.
    pub threads: BTreeMap<u32, Puppet>,
    /// Its leader; if that is to be dead, the first of the other threads once they are there.
    pub leader: Puppet,
    /// The id of that thread in its pid namespace.
    pub leader_id: u32,
    /// The process's id in our pid namespace.
    pub pid: i32,
}

impl TaskBuild {
    fn new(id: u32, leader: Puppet) -> TaskBuild {
        TaskBuild {
            pid: leader.tid(),
            leader,
            leader_id: id,
            threads: BTreeMap::new(),
        }
    }

    /// One of its threads, by id in its pid namespace.
    pub fn thread(&mut self, id: u32) -> Result<&mut Puppet> {
        let puppet = if id == self.leader_id {
            Some(&mut self.leader)
        } else {
            self.threads.get_mut(&id)
        };
        puppet.ok_or_else(|| Error::new("restore a thread").because(format!("there is no thread {id}")))
    }
}

/// A tree under construction. Dropping it removes everything that was made.
pub struct Build {
    pub(super) options: Options,
    pub(super) arena: Arena,
    pub(super) tasks: BTreeMap<u32, TaskBuild>,
    pub(super) root: u32,
    /// Our end of the channel on which tasks get descriptors.
    channel: OwnedFd,
    /// Its number in every task, above all of the tree's own; numbers after it are ours, too.
    pub(super) control: i32,
    pub(super) segments: super::memory::Segments,
    pub(super) system_v: sysv::Segments,
    pub(super) masters: super::terminals::Masters,
    /// Tasks whose children have been created, but for those that come later.
    parents: BTreeSet<u32>,
    /// Guards of missing memory in each table of descriptors.
    pub(super) guards: BTreeMap<u32, i32>,
    /// Process ids in our namespace, for removal; empty once the tree runs.
    pids: Vec<i32>,
}

impl Build {
    /// Creates the tasks of a tree, stopped and empty, with their ids, parents, sessions and groups.
    ///
    /// # Errors
    /// When a pid is taken or a task cannot be made; what was made is removed.
    pub fn tasks(skeleton: &Skeleton, options: Options) -> Result<Build> {
        let mut build = Build::tasks_but(skeleton, options, &|_| false)?;
        build.form_groups(skeleton)?;
        Ok(build)
    }

    /// As [`Build::tasks`], without those that are to come `later`, nor what is below them, and without groups.
    ///
    /// # Errors
    /// As [`Build::tasks`].
    pub fn tasks_but(skeleton: &Skeleton, options: Options, later: &dyn Fn(u32) -> bool) -> Result<Build> {
        let (entry, _) = skeleton
            .tasks
            .first()
            .ok_or_else(|| Error::new("restore").because("the tree has no task"))?;
        let root = entry.pid;
        raise_descriptor_limit();
        let control = (skeleton.highest_descriptor as i32 + 1).max(512);
        let (channel, remote) = seed::descriptor_channel()?;
        let mut leader = Puppet::spawn_as(Some(root as i32), &[(remote.as_fd(), control)], options.sibling)?;
        let mut pids = vec![leader.tid()];

        let mut ranges = skeleton.ranges.clone();
        let seed_maps = maps::parse(&crate::procfs::read(leader.tid(), "maps")?)?;
        ranges.extend(seed_maps.iter().map(|m| (m.start, m.end)));
        let arena = maps::largest_gap(&mut ranges, ARENA_SIZE + SPARE)
            .map(|at| Arena(RemoteAddr(at)))
            .ok_or_else(|| Error::new("find room for the arena").because("the tree's address spaces are full"))?;
        leader.clear(arena)?;
        // Descriptors of ours that came along, stdio included.
        let mut program = Program::new();
        program.call(
            "close descriptors",
            libc::SYS_close_range,
            &[0.into(), (control - 1).into(), 0.into()],
        );
        program.call(
            "close descriptors",
            libc::SYS_close_range,
            &[(control + 1).into(), u32::MAX.into(), 0.into()],
        );
        leader.run(arena, &program)?;

        let mut build = Build {
            options,
            arena,
            tasks: BTreeMap::from([(root, TaskBuild::new(root, leader))]),
            root,
            channel,
            control,
            segments: Default::default(),
            system_v: Default::default(),
            masters: Default::default(),
            parents: BTreeSet::new(),
            guards: BTreeMap::new(),
            pids: Vec::new(),
        };
        build.pids.append(&mut pids);
        build.create_descendants(skeleton, later)?;
        Ok(build)
    }

    /// The root's process id in our pid namespace.
    pub fn root_pid(&self) -> Option<i32> {
        self.tasks.get(&self.root).map(|task| task.pid)
    }

    /// A living thread of each of its processes, in our pid namespace: the leader, if that is not dead.
    pub fn pids(&self) -> Vec<i32> {
        self.tasks.values().map(|task| task.leader.tid()).collect()
    }

    /// Creates a task that was to come later, with what is below it but for those that are to come later still.
    ///
    /// # Errors
    /// As [`Build::tasks`].
    pub fn create_later(&mut self, skeleton: &Skeleton, child: u32, later: &dyn Fn(u32) -> bool) -> Result<()> {
        let entry = skeleton
            .tasks
            .iter()
            .map(|(entry, _)| entry)
            .find(|entry| entry.pid == child);
        let entry = entry.ok_or_else(|| Error::new("restore").because("a task has no ids"))?;
        let flags = skeleton.flags.get(&child).copied().unwrap_or(0);
        self.fork(entry.ppid, entry, flags)?;
        self.create_descendants(skeleton, later)
    }

    /// Creates what is below the tasks that are there and have not been looked at. A session leader makes its session
    /// after the children that are not in it.
    fn create_descendants(&mut self, skeleton: &Skeleton, later: &dyn Fn(u32) -> bool) -> Result<()> {
        for (entry, zombie) in &skeleton.tasks {
            if !self.tasks.contains_key(&entry.pid) || !self.parents.insert(entry.pid) {
                continue;
            }
            let outside = !skeleton.tasks.iter().any(|(other, _)| other.pid == entry.sid);
            if entry.ppid == 0 && entry.sid != entry.pid && outside && self.options.new_session {
                self.new_session(entry.pid)?;
            }
            if *zombie && entry.ppid == 0 {
                return Err(Error::new("restore")
                    .task(entry.pid as i32)
                    .because("the root of the tree is a zombie"));
            }
            let leads = entry.sid == entry.pid && !zombie;
            let children = || {
                skeleton
                    .tasks
                    .iter()
                    .map(|(child, _)| child)
                    .filter(|child| child.ppid == entry.pid && !later(child.pid))
            };
            let inside = |child: &&PstreeEntry| child.sid == entry.sid || child.sid == child.pid || !leads;
            let flags = |child: u32| skeleton.flags.get(&child).copied().unwrap_or(0);
            for child in children().filter(|child| !inside(child)) {
                self.fork(entry.pid, child, flags(child.pid))?;
            }
            if leads {
                self.new_session(entry.pid)?;
                self.take_terminal(skeleton, entry.pid)?;
            }
            for child in children().filter(inside) {
                self.fork(entry.pid, child, flags(child.pid))?;
            }
        }
        Ok(())
    }

    fn new_session(&mut self, pid: u32) -> Result<()> {
        let mut program = Program::new();
        program.call("make a session", libc::SYS_setsid, &[]);
        self.run(pid, &program).map(drop)
    }

    fn fork(&mut self, parent: u32, child: &PstreeEntry, flags: u64) -> Result<()> {
        let exit_signal = u64::from(child.exit_signal.unwrap_or(libc::SIGCHLD as u32));
        let child = child.pid;
        let (mut program, mut newborn) = (Program::new(), Newborn::new());
        clone_into(&mut program, child, exit_signal, flags, &format!("create task {child}"));
        let arena = self.arena;
        self.task(parent)?
            .leader
            .run_with_children(arena, &program, &mut newborn)
            .map_err(|error| explain_pid(error, child))?;
        let (_, leader) = newborn
            .into_iter()
            .next()
            .ok_or_else(|| Error::new("create a task").because("it did not appear"))?;
        self.pids.push(leader.tid());
        self.tasks.insert(child, TaskBuild::new(child, leader));
        Ok(())
    }

    /// Puts tasks into their process groups. A group whose leader is gone is led by a helper for that moment.
    ///
    /// # Errors
    /// When a group cannot be joined.
    pub fn form_groups(&mut self, skeleton: &Skeleton) -> Result<()> {
        let exists = |pid: u32| skeleton.tasks.iter().any(|(entry, _)| entry.pid == pid);
        let groups = skeleton
            .tasks
            .iter()
            .map(|(entry, _)| (entry.pid, entry.pgid, entry.sid));
        let (leaders, members): (Vec<_>, Vec<_>) = groups.partition(|&(pid, group, _)| pid == group);
        for (pid, group, session) in leaders {
            // A session leader leads its group already.
            if pid != session {
                self.join_group(pid, group)?;
            }
        }
        let mut helpers: BTreeMap<u32, (u32, Puppet)> = BTreeMap::new();
        for (pid, group, session) in members {
            let known = exists(group) || helpers.contains_key(&group);
            if !known && !exists(session) {
                // A group of the session outside, as of a shell job: the restorer's own group takes its place.
                continue;
            }
            if !known {
                helpers.insert(group, (pid, self.group_helper(pid, group)?));
            }
            self.join_group(pid, group)?;
        }
        for (group, (parent, helper)) in helpers {
            let (tid, mut program) = (helper.tid(), Program::new());
            program.call("end", libc::SYS_exit_group, &[0.into()]);
            helper.end(self.arena, &program, None)?;
            self.pids.retain(|&pid| pid != tid);
            let mut program = Program::new();
            program.call(
                "wait for a stand-in",
                libc::SYS_wait4,
                &[group.into(), 0.into(), libc::__WALL.into(), 0.into()],
            );
            self.run(parent, &program)?;
        }
        Ok(())
    }

    fn join_group(&mut self, pid: u32, group: u32) -> Result<()> {
        let mut program = Program::new();
        program.call(
            format!("join process group {group}"),
            libc::SYS_setpgid,
            &[0.into(), group.into()],
        );
        self.run(pid, &program).map(drop)
    }

    /// A child of `member`, in its session, that leads `group`. Its end is not signalled, but must be waited for.
    fn group_helper(&mut self, member: u32, group: u32) -> Result<Puppet> {
        let (mut program, mut newborn, arena) = (Program::new(), Newborn::new(), self.arena);
        clone_into(
            &mut program,
            group,
            0,
            0,
            &format!("create a stand-in for the leader of process group {group}"),
        );
        self.task(member)?
            .leader
            .run_with_children(arena, &program, &mut newborn)
            .map_err(|error| explain_pid(error, group))?;
        let (_, mut helper) = newborn
            .into_iter()
            .next()
            .ok_or_else(|| Error::new("create a task").because("it did not appear"))?;
        self.pids.push(helper.tid());
        let mut program = Program::new();
        program.call("lead a process group", libc::SYS_setpgid, &[0.into(), 0.into()]);
        helper.run(arena, &program)?;
        Ok(helper)
    }

    /// What is ours in the address space of every task.
    pub(super) fn arena_range(&self) -> (u64, u64) {
        (self.arena.0.0, self.arena.0.0 + ARENA_SIZE + SPARE)
    }

    /// The living tasks that are there.
    pub(super) fn has(&self, pid: u32) -> bool {
        self.tasks.contains_key(&pid)
    }

    /// Process id of a task in our pid namespace.
    ///
    /// # Errors
    /// When there is no such task.
    pub fn tid_of(&mut self, pid: u32) -> Result<i32> {
        self.task(pid).map(|task| task.leader.tid())
    }

    /// Runs a program in the leader of a task.
    ///
    /// # Errors
    /// When a call has an unexpected result.
    pub fn run_in(&mut self, pid: u32, program: &Program) -> Result<crate::remote::Outcome> {
        self.run(pid, program)
    }

    pub(super) fn task(&mut self, pid: u32) -> Result<&mut TaskBuild> {
        self.tasks.get_mut(&pid).ok_or_else(|| {
            Error::new("restore")
                .task(pid as i32)
                .because("there is no such task in the tree")
        })
    }

    /// Runs a program in the leader of a task.
    pub(super) fn run(&mut self, pid: u32, program: &Program) -> Result<crate::remote::Outcome> {
        let arena = self.arena;
        self.task(pid)?
            .leader
            .run(arena, program)
            .map_err(|error| error.task(pid as i32))
    }

    /// Hands descriptors to a task: sends them, and adds the call that receives them to `program`. The arguments that
    /// come back are their numbers there: the lowest that are free.
    ///
    /// # Errors
    /// For more than 253 at once, or when they cannot be sent.
    pub(super) fn hand(&self, program: &mut Program, files: &[BorrowedFd<'_>]) -> Result<Vec<Arg>> {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
        if files.len() > MAX_DESCRIPTORS {
            return Err(Error::new("hand over descriptors").because("too many at once"));
        }
        let mut space = vec![std::mem::MaybeUninit::uninit(); 64 + 4 * MAX_DESCRIPTORS];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(files));
        let iov = [std::io::IoSlice::new(b"d")];
        rustix::net::sendmsg(&self.channel, &iov, &mut control, SendFlags::empty())
            .map_err(std::io::Error::from)
            .context("hand over descriptors")?;

        // struct msghdr with one iovec and room for the control message: a 16-byte header, then the numbers.
        let length = 16 + 4 * files.len();
        let room = program.reserve(length.next_multiple_of(8));
        let byte = program.reserve(8);
        let mut vector = vec![0u8; 16];
        vector[8..16].copy_from_slice(&1u64.to_le_bytes());
        let vector = program.data(&vector);
        program.store_address(vector, 0, byte);
        let mut header = vec![0u8; 56];
        header[24..32].copy_from_slice(&1u64.to_le_bytes());
        header[40..48].copy_from_slice(&(length.next_multiple_of(8) as u64).to_le_bytes());
        let header = program.data(&header);
        program.store_address(header, 16, vector);
        program.store_address(header, 32, room);
        let args = [self.control.into(), header.into(), libc::MSG_CMSG_CLOEXEC.into()];
        program.call_expecting(
            "receive descriptors",
            crate::remote::Expect::Exactly(1),
            libc::SYS_recvmsg,
            &args,
        );
        Ok((0..files.len()).map(|index| Arg::Int(room, 16 + 4 * index)).collect())
    }

    /// Largest number of descriptors for one [`Build::hand`].
    pub(super) const HAND: usize = MAX_DESCRIPTORS;

    /// Lets everything run. From here on the tree is on its own.
    ///
    /// # Errors
    /// When a task died before.
    pub(super) fn release(mut self) -> Result<()> {
        self.system_v.keep()?;
        self.pids.clear();
        let mut first = Ok(());
        for (_, task) in std::mem::take(&mut self.tasks) {
            for (_, thread) in task.threads {
                let result = thread.release();
                first = first.and(result);
            }
            let result = task.leader.release();
            first = first.and(result);
        }
        first
    }

    /// Remembers that a process of the tree has ended as it should (a zombie).
    pub(super) fn ended(&mut self, pid: u32) -> Option<TaskBuild> {
        let task = self.tasks.remove(&pid)?;
        self.pids.retain(|&other| other != task.pid);
        Some(task)
    }
}

impl Drop for Build {
    fn drop(&mut self) {
        for &pid in &self.pids {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        // The puppets wait for their deaths.
    }
}

/// Adds a clone3(2) that makes a task or thread with a chosen id.
pub(super) fn clone_into(program: &mut Program, id: u32, exit_signal: u64, flags: u64, what: &str) {
    let tid = program.data(&id.to_le_bytes());
    let mut args = vec![0u8; 88];
    args[0..8].copy_from_slice(&flags.to_le_bytes());
    args[32..40].copy_from_slice(&exit_signal.to_le_bytes());
    args[72..80].copy_from_slice(&1u64.to_le_bytes());
    let args = program.data(&args);
    program.store_address(args, 64, tid);
    program.call(what, libc::SYS_clone3, &[args.into(), 88.into()]);
}

fn explain_pid(error: Error, pid: u32) -> Error {
    match error.errno() {
        Some(libc::EEXIST) => Error::new("create a task")
            .object(format!("pid {pid}"))
            .hint(format!(
                "pid {pid} is in use here: end that process, or restore in a new pid namespace"
            ))
            .because(error),
        Some(libc::EPERM) => error.hint("choosing a pid needs root, or CAP_CHECKPOINT_RESTORE"),
        _ => error,
    }
}

/// Our channel lies above the tree's descriptors: the soft limit must not be in the way.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    );
}

/// Checks an image before anything is made from it.
///
/// # Errors
/// When its mappings are not what mappings can be.
pub fn validate(image: &TreeImage) -> Result<()> {
    image.tasks.iter().try_for_each(|task| mapping::validate(&task.mm.vmas))
}
