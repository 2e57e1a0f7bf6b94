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

use whimbrel_images::proto::{CoreEntry, FdTypes, FileEntry};

use crate::error::Result;
use crate::procfs::{stat::Stat, status::Status};
use crate::remote::{Outcome, Program, Stopped, inject::Home};

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

    /// Adds the calls of a stage to the program of a thread that is being restored. `leader` has the process's state.
    ///
    /// # Errors
    /// When the image is damaged.
    fn restore(&self, stage: Stage, thread: &CoreEntry, leader: bool, program: &mut Program) -> Result<()>;
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

    /// The connection behind the file, if it is one whose packets must be kept away while the tree is taken apart.
    ///
    /// # Errors
    /// When it cannot be asked.
    fn connection(&self, file: &OpenFile) -> Result<Option<crate::kernel::nft::Connection>> {
        let _ = file;
        Ok(None)
    }

    /// As [`FileKind::connection`], of a file that is about to be restored.
    ///
    /// # Errors
    /// When the image is damaged.
    fn connection_of(&self, entry: &FileEntry) -> Result<Option<crate::kernel::nft::Connection>> {
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

    /// As [`FileKind::install`], for kinds whose calls depend on the task (controlling terminals). Drivers call this one, in
    /// every task that has the file; `first` is true in the first of them in the order of the tree.
    ///
    /// # Errors
    /// When the image is damaged.
    fn install_in(&self, entry: &FileEntry, fd: u32, task: &Installing<'_>, program: &mut Program) -> Result<()> {
        if task.first {
            self.install(entry, fd, program)?;
        }
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

/// The task whose descriptors are in place, for [`FileKind::install_in`].
pub struct Installing<'a> {
    /// Its id, in its own pid namespace.
    pub pid: u32,
    /// Its session.
    pub session: u32,
    /// Is it the first task of the tree that has the file?
    pub first: bool,
    /// The image set.
    pub store: &'a dyn whimbrel_images::store::ImageStore,
}

/// All kinds of the task family, in the order in which they are restored within a stage.
pub static TASK_KINDS: &[&dyn TaskKind] = &[
    &task::limits::Limits,
    &task::attributes::Attributes,
    &task::signals::Signals,
    &task::timers::Timers,
    &task::schedule::Schedule,
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
    &sock::unix::Unix,
    // Takes what is left: last.
    &fd::regular::Regular,
];
