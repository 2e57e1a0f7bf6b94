//! Open file descriptions: what all kinds share when they are dumped and restored.

#[cfg(test)]
pub(crate) mod fixture;

pub mod epoll;
pub mod eventfd;
pub mod fifo;
pub mod inotify;
pub mod locks;
pub mod memfd;
pub mod pidfd;
pub mod pipe;
pub mod regular;
pub mod signalfd;
pub mod timerfd;
pub mod tty;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use whimbrel_images::entry::{ImageReader, ImageWriter};
use whimbrel_images::proto::{FdTypes, FileEntry, FownEntry};
use whimbrel_images::store::ImageStore;

use crate::error::{Context, Error, Result};
use crate::kernel::sys;
use crate::procfs::fdinfo::FdInfo;
use crate::resource::FileKind;

/// An open file description of the tree, seen through one of its descriptors.
pub struct OpenFile {
    /// A process that has it, in our pid namespace.
    pub pid: i32,
    /// Its descriptor there.
    pub fd: i32,
    /// What `/proc/PID/fd/N` leads to.
    pub link: Vec<u8>,
    /// `fstat(2)` of it.
    pub stat: rustix::fs::Stat,
    /// `/proc/PID/fdinfo/N`.
    pub info: FdInfo,
    /// A duplicate in the controller: the same open file description, so its position and flags are the task's.
    pub handle: OwnedFd,
}

impl OpenFile {
    /// Looks at descriptor `fd` of process `pid`.
    ///
    /// # Errors
    /// EBADF when it was closed meanwhile, EPERM without ptrace access.
    pub fn look(pid: i32, fd: i32, pidfd: BorrowedFd<'_>) -> Result<OpenFile> {
        let failed = || Error::new("look at a descriptor").task(pid).object(format!("fd {fd}"));
        let path = format!("/proc/{pid}/fd/{fd}");
        let link = std::fs::read_link(&path).with(failed)?.into_os_string();
        let info = crate::procfs::fdinfo::parse(&crate::procfs::read(pid, &format!("fdinfo/{fd}"))?);
        let handle = sys::pidfd_getfd(pidfd, fd).with(failed)?;
        let stat = rustix::fs::fstat(&handle).map_err(std::io::Error::from).with(failed)?;
        Ok(OpenFile {
            pid,
            fd,
            link: std::os::unix::ffi::OsStringExt::into_vec(link),
            stat,
            info,
            handle,
        })
    }

    /// `fd 7 → /run/x.sock`, for messages.
    pub fn describe(&self) -> String {
        format!("fd {} → {}", self.fd, String::from_utf8_lossy(&self.link))
    }

    /// The type bits of its mode.
    pub fn file_type(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }

    /// Open flags without O_CLOEXEC, which belongs to the descriptor.
    pub fn flags(&self) -> u32 {
        self.info.flags & !(libc::O_CLOEXEC as u32)
    }

    /// Who gets its signals, and which.
    pub fn owner(&self) -> FownEntry {
        // fcntl fails on O_PATH descriptors, which have no owner.
        let int = |command| sys::fcntl_int(self.handle.as_fd(), command, 0).unwrap_or(0);
        let mut owner = FownEntry {
            signum: int(sys::F_GETSIG) as u32,
            ..FownEntry::default()
        };
        if let Some((kind, pid)) = sys::owner_ex(self.handle.as_fd()).filter(|&(_, pid)| pid != 0) {
            // enum pid_type of the kernel: 0 thread, 1 process, 2 process group, plus one in images' use of F_OWNER_*.
            (owner.pid_type, owner.pid) = (kind as u32, pid as u32);
        }
        owner
    }
}

/// What dumping files needs besides the file, and where their images go.
pub struct FileDump<'a> {
    /// The image set that is being written.
    pub store: &'a dyn ImageStore,
    /// What the user asked for.
    pub options: &'a crate::dump::Options,
    /// Image ids of the tree's open file descriptions that are known so far, by process and descriptor.
    pub ids: &'a HashMap<(i32, i32), u32>,
    /// All open files of the tree, by image id.
    pub files: &'a BTreeMap<u32, OpenFile>,
    /// Facts that kinds collect once and share (socket diagnostics), by kind.
    pub shared: &'a mut Shared,
    writers: BTreeMap<String, ImageWriter>,
}

/// Facts that are collected once per dump.
#[derive(Default)]
pub struct Shared {
    /// Ids that were already described (one pipe has two ends, one memfd many files).
    pub seen: std::collections::HashSet<(i32, u64)>,
    /// Numbers of the ghost files, by device and inode of the deleted file.
    pub ghosts: HashMap<(u64, u64), u32>,
    /// Image ids of shared memory segments, by device and inode.
    pub segments: HashMap<(u64, u64), u32>,
    /// Processes of the tree: id in our pid namespace to id in its own.
    pub pids: HashMap<i32, i32>,
    /// Entries that other entries refer to (the path of a FIFO), by id.
    pub extra: BTreeMap<u32, FileEntry>,
    /// First image id that no file has yet.
    pub next_id: u32,
    /// The unix sockets of the network namespace.
    pub unix: std::cell::OnceCell<crate::resource::sock::unix::Facts>,
    /// What options of sockets are when nobody sets them.
    pub socket_defaults: crate::resource::sock::options::Defaults,
    next_ghost: u32,
}

impl Shared {
    /// Is this the first time that `id` of this type is described?
    pub fn first(&mut self, kind: FdTypes, id: u64) -> bool {
        self.seen.insert((kind as i32, id))
    }

    /// An image id for an entry that no descriptor of the tree refers to.
    pub fn new_id(&mut self) -> u32 {
        self.next_id = self.next_id.max(1) + 1;
        self.next_id - 1
    }

    /// A number for a new ghost file.
    pub fn ghost_id(&mut self) -> u32 {
        self.next_ghost += 1;
        self.next_ghost
    }
}

impl<'a> FileDump<'a> {
    /// A dump of files into `store`.
    pub fn new(
        store: &'a dyn ImageStore,
        options: &'a crate::dump::Options,
        ids: &'a HashMap<(i32, i32), u32>,
        files: &'a BTreeMap<u32, OpenFile>,
        shared: &'a mut Shared,
    ) -> Self {
        FileDump {
            store,
            options,
            ids,
            files,
            shared,
            writers: BTreeMap::new(),
        }
    }

    /// Adds an entry, and bytes behind it, to an image that all files of a kind share (`pipes-data.img`).
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn append<M: prost::Message>(&mut self, image: &str, entry: &M, bytes: &[u8]) -> Result<()> {
        let writer = match self.writers.entry(image.to_owned()) {
            std::collections::btree_map::Entry::Occupied(writer) => writer.into_mut(),
            std::collections::btree_map::Entry::Vacant(empty) => {
                empty.insert(ImageWriter::create(self.store, image).context("create an image")?)
            }
        };
        writer
            .write(entry)
            .and_then(|()| writer.extra(bytes))
            .context("write an image")
    }

    /// Closes the shared images.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn close(self) -> Result<()> {
        self.writers
            .into_values()
            .try_for_each(|writer| writer.finish().context("write an image"))
    }
}

/// What restoring files needs besides the entry.
pub struct FileRestore<'a> {
    /// The image set.
    pub store: &'a dyn ImageStore,
    /// What the user asked for.
    pub options: &'a crate::restore::Options,
    /// All entries of `files.img` by id.
    pub entries: &'a BTreeMap<u32, FileEntry>,
    /// Files that exist by now, by id. They stay open in the controller until the tree runs.
    pub opened: BTreeMap<u32, OwnedFd>,
    /// Files that came into being with another and wait to be asked for, by type and the kind's own key.
    pub held: HashMap<(FdTypes, u64), OwnedFd>,
    /// Queues of UDP sockets, read when the first is restored.
    pub datagrams: Option<crate::resource::sock::datagrams::Queues>,
}

impl<'a> FileRestore<'a> {
    /// Nothing restored yet.
    pub fn new(
        store: &'a dyn ImageStore,
        options: &'a crate::restore::Options,
        entries: &'a BTreeMap<u32, FileEntry>,
    ) -> Self {
        FileRestore {
            store,
            options,
            entries,
            opened: BTreeMap::new(),
            held: HashMap::new(),
            datagrams: None,
        }
    }

    /// Leaves a file for the entry that will ask for it.
    pub fn hold(&mut self, kind: FdTypes, key: u64, file: OwnedFd) {
        self.held.insert((kind, key), file);
    }

    /// Opens an image of the set; `None` when there is none of that name.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn image(&self, name: &str) -> Result<Option<ImageReader>> {
        match ImageReader::open(self.store, name) {
            Ok(reader) => Ok(Some(reader)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error).context("open an image"),
        }
    }
}

/// Opens the files of the tree that are `wanted` (by a descriptor) in the controller.
///
/// # Errors
/// When one cannot be made, named by its entry.
pub fn open_all(restore: &mut FileRestore<'_>, wanted: &dyn Fn(u32) -> bool) -> Result<()> {
    let entries = restore.entries;
    let parts = parts_of(entries);
    let wanted = |id: u32| wanted(id) && !parts.contains(&id);
    for (&id, entry) in entries.iter().filter(|(id, _)| wanted(**id)) {
        let kind = kind_of(entry)?;
        let file = kind
            .open(entry, restore)
            .map_err(|error| error.object(describe(entry)))?;
        restore.opened.insert(id, file);
    }
    let opened: Vec<u32> = restore.opened.keys().copied().collect();
    for entry in opened.iter().filter_map(|id| entries.get(id)) {
        kind_of(entry)?
            .finish(entry, restore)
            .map_err(|error| error.object(describe(entry)))?;
    }
    Ok(())
}

/// Entries that are no files of their own but the path of another one (`regf_id`). Opening a FIFO's would block.
fn parts_of(entries: &BTreeMap<u32, FileEntry>) -> std::collections::HashSet<u32> {
    let of = |entry: &FileEntry| {
        let fifo = entry.fifo.as_ref().and_then(|fifo| fifo.regf_id);
        fifo.or(entry.tty.as_ref().and_then(|tty| tty.regf_id))
            .filter(|&id| id != entry.id)
    };
    entries.values().filter_map(of).collect()
}

/// The kind that restores an entry.
///
/// # Errors
/// When no kind of ours does.
pub fn kind_of(entry: &FileEntry) -> Result<&'static dyn FileKind> {
    let kinds = crate::resource::FILE_KINDS.iter();
    kinds.copied().find(|kind| kind.restores(entry)).ok_or_else(|| {
        Error::new("restore a file").object(describe(entry)).because(format!(
            "files of type {} are not supported yet",
            entry.r#type().as_str_name()
        ))
    })
}

/// Names an entry in messages.
pub fn describe(entry: &FileEntry) -> String {
    let name = entry.reg.as_ref().map_or("", |file| &file.name);
    format!("file {} ({}) {name}", entry.id, entry.r#type().as_str_name())
}

/// Sets the owner of a file's signals, if it has one.
///
/// # Errors
/// When the owner does not exist here.
pub fn restore_owner(file: BorrowedFd<'_>, owner: &FownEntry) -> Result<()> {
    if owner.signum != 0 {
        sys::fcntl_int(file, sys::F_SETSIG, owner.signum as i32).context("set the signal of a file")?;
    }
    if owner.pid != 0 {
        sys::set_owner_ex(file, owner.pid_type as i32, owner.pid as i32).context("set the owner of a file")?;
    }
    Ok(())
}

/// Sets the status flags that a file was not made with (O_NONBLOCK, O_APPEND, O_ASYNC …), and its owner.
///
/// # Errors
/// When the file does not take them.
pub fn restore_flags(file: BorrowedFd<'_>, flags: u32, owner: &FownEntry) -> Result<()> {
    let settable = (libc::O_APPEND | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME | libc::O_NONBLOCK) as u32;
    restore_owner(file, owner)?;
    sys::fcntl_int(file, libc::F_SETFL, (flags & settable) as i32)
        .context("set the flags of a file")
        .map(drop)
}

/// A new open file description for the same file with other flags, by way of `/proc/self/fd`.
///
/// # Errors
/// When the file cannot be opened like this.
pub fn reopen(file: BorrowedFd<'_>, flags: u32) -> std::io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = rustix::fs::OFlags::from_bits_retain(flags & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC) as u32);
    Ok(rustix::fs::open(
        path,
        flags | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?)
}
