//! What a process holds, one file per kind of kernel object, with its dump and its restore side by side.
//!
//! | folder | kinds |
//! |---|---|
//! | `task/` | what belongs to a task or thread itself: credentials, signals, timers, limits, scheduling |
//! | `mem/` | mappings, the address space's bounds, shared memory, the vdso |
//! | `fd/` | open file descriptions that are not sockets |
//! | `sock/` | sockets |
//! | `ns/` | namespaces |
//!
//! A kind is one file and one row in the tables at the end of this page. It never touches ptrace: what has to happen
//! inside a task it writes into a [`Program`], what can be done from outside it does in the controller.

pub mod fd;
pub mod mem;
pub mod sock;
pub mod task;

use std::cell::{OnceCell, RefCell};
use std::net::SocketAddr;

use whimbrel_images::proto::{CoreEntry, FdTypes, FileEntry, SeccompEntry, TaskCoreEntry};

use crate::error::Result;
use crate::kernel::nft::{Connection, Protocol};
use crate::procfs::{stat::Stat, status::Status};
use crate::remote::{CallId, Outcome, Program, Stopped, inject::Home};

pub use fd::{FileDump, FileRestore, OpenFile};

/// A stopped thread, as a kind of the task family sees it when it is dumped.
pub struct ThreadView<'a, 't> {
    /// Process id in our pid namespace.
    pub pid: i32,
    /// Thread id in our pid namespace.
    pub tid: i32,
    /// Is it the thread-group leader? Then per-process state is dumped with it.
    pub leader: bool,
    /// The thread under ptrace, for what only ptrace can tell.
    pub stopped: &'t Stopped,
    /// Registers and mask as they were found.
    pub home: &'a Home,
    /// `/proc/PID/task/TID/stat`.
    pub stat: &'a Stat,
    /// `/proc/PID/task/TID/status`.
    pub status: &'a Status,
    /// What is the same for all threads.
    pub found: &'t Found,
}

/// What was found out while a tree is dumped, and is the same for all of its threads.
#[derive(Default)]
pub struct Found {
    /// Seccomp filters, those of each thread to be added.
    pub filters: RefCell<task::seccomp::Filters>,
    /// The processors that work, as the kernel lists them; read when it is first needed.
    pub processors: OnceCell<String>,
}

/// Reads what a kind's calls brought back, into the thread's image.
pub type Reader<'a> = Box<dyn FnOnce(&Outcome, &mut CoreEntry) -> Result<()> + 'a>;

/// When a kind of the task family is restored. The whole tree passes each stage before the next begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Memory and descriptors are there; per-process state that needs no threads.
    Process,
    /// All threads exist; run in each thread, with full privileges.
    Thread,
    /// Last, in each thread: what takes privileges away or lets time run.
    Final,
}

/// State of a task or a thread.
pub trait TaskKind: Sync {
    /// Name in errors and in lists.
    fn name(&self) -> &'static str;

    /// Adds calls to the thread's program and returns the reader of their results.
    ///
    /// # Errors
    /// When the state cannot be carried: before anything was changed.
    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>>;

    /// Adds the calls of a stage to the program of a thread that is being restored.
    ///
    /// # Errors
    /// When the image is damaged.
    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()>;
}

/// A thread that is being restored, as a kind of the task family sees it.
#[derive(Clone, Copy)]
pub struct Restoring<'a> {
    /// Its image.
    pub core: &'a CoreEntry,
    /// Does it restore the state of the process, too?
    pub leader: bool,
    /// All living threads of its process.
    pub process: &'a [CoreEntry],
    /// Seccomp filters of the tree.
    pub filters: &'a SeccompEntry,
}

impl<'a> Restoring<'a> {
    /// The state of the process, where and when that is restored: by its leader, at [`Stage::Process`].
    pub fn process_at(&self, stage: Stage) -> Option<&'a TaskCoreEntry> {
        (self.core.tc.as_ref()).filter(|_| self.leader && stage == Stage::Process)
    }
}

/// Where packets of the network come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A connection.
    Connection(Connection),
    /// A TCP socket that listens.
    Listener(SocketAddr),
    /// A UDP socket that takes datagrams from anybody.
    Datagrams(SocketAddr),
}

/// The endpoints of a tree.
#[derive(Clone, Debug, Default)]
pub struct Endpoints {
    /// Its connections.
    pub connections: Vec<Connection>,
    /// Addresses that it listens on.
    pub listeners: Vec<SocketAddr>,
    /// Addresses where it takes datagrams from anybody.
    pub datagrams: Vec<SocketAddr>,
}

impl Endpoints {
    /// Its connections of TCP.
    pub fn tcp(&self) -> Vec<Connection> {
        let tcp = |connection: &&Connection| connection.protocol == Protocol::Tcp;
        self.connections.iter().filter(tcp).copied().collect()
    }
}

impl Extend<Endpoint> for Endpoints {
    fn extend<T: IntoIterator<Item = Endpoint>>(&mut self, endpoints: T) {
        for endpoint in endpoints {
            match endpoint {
                Endpoint::Connection(connection) => self.connections.push(connection),
                Endpoint::Listener(address) => self.listeners.push(address),
                Endpoint::Datagrams(address) => self.datagrams.push(address),
            }
        }
    }
}

/// A kind of open file description.
pub trait FileKind: Sync {
    /// Name in errors and in lists.
    fn name(&self) -> &'static str;

    /// The image types that it restores.
    fn types(&self) -> &'static [FdTypes];

    /// Does it restore this entry? To be told where kinds share an image type.
    fn restores(&self, entry: &FileEntry) -> bool {
        self.types().contains(&entry.r#type())
    }

    /// Is this file of its kind?
    fn recognises(&self, file: &OpenFile) -> bool;

    /// Names the memory that the file shows, if it does, so that its contents are stored once however many show it.
    /// Called once per open file description, before any other is described.
    ///
    /// # Errors
    /// When it cannot be looked at.
    fn share(&self, file: &OpenFile, segments: &mut mem::shared::Segments) -> Result<()> {
        let _ = (file, segments);
        Ok(())
    }

    /// Can this file be carried at all? Asked for all files before anything is changed.
    ///
    /// # Errors
    /// The reason why not, and what would help.
    fn check(&self, file: &OpenFile, dump: &FileDump<'_>) -> Result<()> {
        let _ = (file, dump);
        Ok(())
    }

    /// What packets come to the file, and must be kept away while the tree is taken apart.
    ///
    /// # Errors
    /// When it cannot be asked.
    fn endpoint(&self, file: &OpenFile) -> Result<Option<Endpoint>> {
        let _ = file;
        Ok(None)
    }

    /// As [`FileKind::endpoint`], of a file that is about to be restored.
    ///
    /// # Errors
    /// When the image is damaged.
    fn endpoint_of(&self, entry: &FileEntry) -> Result<Option<Endpoint>> {
        let _ = entry;
        Ok(None)
    }

    /// Describes the file. Called once per open file description, with the tree frozen and the network locked.
    ///
    /// # Errors
    /// When it cannot be described.
    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry>;

    /// Called on the source when the tree lives elsewhere and is about to be killed: the file must close without telling
    /// anyone at its other end. There is no way back from here.
    ///
    /// # Errors
    /// When it would make itself heard.
    fn abandon(&self, file: &OpenFile) -> Result<()> {
        let _ = file;
        Ok(())
    }

    /// How a task opens the file, if only that can. It is held for [`FileKind::open`] then, under [`OpenedBy::key`].
    ///
    /// # Errors
    /// When the image is damaged.
    fn opened_by(&self, entry: &FileEntry, restore: &FileRestore<'_>) -> Result<Option<OpenedBy>> {
        let _ = (entry, restore);
        Ok(None)
    }

    /// Makes the file in the controller. Files that are made in pairs leave the other one in `restore.hold`.
    ///
    /// # Errors
    /// When it cannot be made here.
    fn open(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<std::os::fd::OwnedFd>;

    /// Called when all files of the tree exist (queued descriptors, watched files).
    ///
    /// # Errors
    /// When its state cannot be set.
    fn finish(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<()> {
        let _ = (entry, restore);
        Ok(())
    }

    /// Adds calls that the task itself must make when its descriptors are in place (`fd` is one that refers to the file).
    ///
    /// # Errors
    /// When the image is damaged.
    fn install(&self, entry: &FileEntry, fd: u32, program: &mut Program) -> Result<()> {
        let _ = (entry, fd, program);
        Ok(())
    }

    /// Called immediately before the tree runs again: the last moment, after the network is unlocked.
    ///
    /// # Errors
    /// When the file cannot be let go.
    fn resume(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<()> {
        let _ = (entry, restore);
        Ok(())
    }
}

/// How a task of the tree opens a file that nobody else can.
pub struct OpenedBy {
    /// The task, by its id in its own pid namespace.
    pub task: u32,
    /// What it does. It has no descriptors then, and all privileges.
    pub program: Program,
    /// The call whose result is the descriptor.
    pub descriptor: CallId,
}

impl OpenedBy {
    /// Under what the file waits in [`FileRestore::held`] for [`FileKind::open`].
    pub fn key(entry: &FileEntry) -> (FdTypes, u64) {
        (entry.r#type(), 1 << 63 | u64::from(entry.id))
    }
}

/// All kinds of the task family, in the order in which they are restored within a stage.
pub static TASK_KINDS: &[&dyn TaskKind] = &[
    &task::limits::Limits,
    &task::attributes::Attributes,
    &task::core_filter::CoreFilter,
    &task::login::Login,
    &task::membarrier::Membarrier,
    &task::speculation::Speculation,
    &task::machine_check::MachineCheck,
    &task::time_stamp::TimeStamp,
    &task::dispatch::Dispatch,
    &task::signals::Signals,
    &task::timers::Timers,
    &task::affinity::Affinity,
    &task::numa::NumaPolicy,
    // Real-time policies take the slack away: before them.
    &task::timer_slack::TimerSlack,
    &task::schedule::Schedule,
    &task::io_priority::IoPriority,
    // Needs privileges: before they are given up.
    &task::seccomp::Seccomp,
    &task::credentials::Credentials,
];

/// All kinds of files. The first that recognises a file takes it.
pub static FILE_KINDS: &[&dyn FileKind] = &[
    &fd::pipe::Pipe,
    &fd::fifo::Fifo,
    &fd::eventfd::EventFd,
    &fd::signalfd::SignalFd,
    &fd::timerfd::TimerFd,
    &fd::epoll::Epoll,
    &fd::memfd::Memfd,
    &fd::tty::Tty,
    &fd::pidfd::PidFd,
    &fd::inotify::Inotify,
    &sock::tcp::Tcp,
    &sock::udp::Udp,
    &sock::raw::Raw,
    &sock::packet::Packet,
    &sock::netlink::Netlink,
    &sock::unix::Unix,
    // Takes what is left: last.
    &fd::regular::Regular,
];
