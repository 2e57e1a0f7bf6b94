//! Names of unix sockets: paths, relative paths, abstract names; finding and binding them.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::net::SocketAddrUnix;
use whimbrel_images::proto::{FilePermsEntry, UnixSkEntry};

use crate::error::{Context, Error, Result};
use crate::kernel::socket::{Identity, unshare_directories};

/// A name for messages: `/run/x.sock`, `@x`.
pub fn describe(name: &[u8]) -> String {
    match name.split_first() {
        Some((0, rest)) => format!("@{}", String::from_utf8_lossy(rest)),
        _ => String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(name)).into_owned(),
    }
}

/// The address of a name.
///
/// # Errors
/// When it is empty or too long.
pub fn address(name: &[u8]) -> Result<SocketAddrUnix> {
    let path = name.strip_suffix(b"\0").unwrap_or(name);
    let address = match name.split_first() {
        None => return Err(Error::new("name a socket").because("it has no name")),
        Some((0, rest)) => SocketAddrUnix::new_abstract_name(rest),
        Some(_) => SocketAddrUnix::new(path),
    };
    address
        .map_err(io::Error::from)
        .with(|| Error::new("name a socket").object(describe(name)))
}

/// Who has a socket open: `process 12 (name)`, all of them.
pub fn holders(ino: u32) -> Option<String> {
    let wanted = format!("socket:[{ino}]");
    let has = |pid: &str| {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        fds.flatten()
            .filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .any(|link| link.as_os_str() == wanted.as_str())
            .then_some(())
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name
            .to_str()
            .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        else {
            continue;
        };
        if has(pid).is_some() {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            found.push(format!("process {pid} ({})", comm.trim_end()));
        }
    }
    (!found.is_empty()).then(|| found.join(", "))
}

/// A socket file that was found by its name.
pub struct Found {
    /// Mode and owner.
    pub perms: FilePermsEntry,
    /// The directory that a relative name starts from, in the process's root.
    pub directory: Option<String>,
}

/// Looks where the path `name` leads for a process: `None` when that is not the file, by device and inode, that its socket is
/// bound to.
pub fn find(pid: i32, name: &[u8], bound: Option<(u32, u32)>) -> Option<Found> {
    let path = Path::new(std::ffi::OsStr::from_bytes(name));
    let start = if path.is_absolute() { "root" } else { "cwd" };
    let place = PathBuf::from(format!("/proc/{pid}/{start}"));
    let file = std::fs::symlink_metadata(place.join(path.strip_prefix("/").unwrap_or(path))).ok()?;
    // Device numbers as the kernel has them inside.
    let device = rustix::fs::major(file.dev()) << 20 | rustix::fs::minor(file.dev());
    if !file.file_type().is_socket() || bound? != (device, file.ino() as u32) {
        return None;
    }
    let directory = match path.is_absolute() {
        true => None,
        false => Some(std::fs::read_link(&place).ok()?.to_str()?.to_owned()),
    };
    Some(Found {
        perms: FilePermsEntry {
            mode: file.mode(),
            uid: file.uid(),
            gid: file.gid(),
        },
        directory,
    })
}

/// Binds a socket to the name of its entry, if it has one. `root` is where the tree's files are. Returns the socket file, by
/// which it can be reached even when it has no path any more.
///
/// # Errors
/// When the name is taken: by a living socket, or by a file that is no socket.
pub fn bind(socket: BorrowedFd<'_>, entry: &UnixSkEntry, root: &Path) -> Result<Option<OwnedFd>> {
    let failed = || Error::new("bind a unix socket").object(describe(&entry.name));
    match entry.name.first() {
        None => return Ok(None),
        Some(0) => {
            rustix::net::bind(socket, &address(&entry.name)?)
                .map_err(io::Error::from)
                .with(|| {
                    failed()
                        .hint("another program uses the name; stop it, or restore in a network namespace of its own")
                })?;
            return Ok(None);
        }
        Some(_) => {}
    }
    // The name must be given to the kernel as it was, from where it makes sense: a thread of its own goes there.
    let elsewhere = (entry.deleted == Some(true)).then(Elsewhere::make).transpose()?;
    let bind = || match &elsewhere {
        Some(elsewhere) => bind_elsewhere(socket, entry, &elsewhere.0),
        None => bind_there(socket, entry, root),
    };
    match std::thread::scope(|scope| scope.spawn(bind).join()) {
        Ok(bound) => bound.map(Some).map_err(|error| error.object(describe(&entry.name))),
        Err(_) => Err(failed().because("the thread that binds it panicked")),
    }
}

/// An empty directory that plays the root while a name is bound, and is removed with the socket file in it.
struct Elsewhere(PathBuf);

impl Elsewhere {
    fn make() -> Result<Elsewhere> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("whimbrel-{}-{number}", std::process::id()));
        let made = std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&path);
        made.with(|| Error::new("make a directory").object(path.display().to_string()))?;
        Ok(Elsewhere(path))
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a temporary directory could not be removed");
        }
    }
}

fn path_of(entry: &UnixSkEntry) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(
        entry.name.strip_suffix(b"\0").unwrap_or(&entry.name),
    ))
}

/// In a thread that ends with it.
fn bind_there(socket: BorrowedFd<'_>, entry: &UnixSkEntry, root: &Path) -> Result<OwnedFd> {
    unshare_directories().context("get a root of its own for a thread")?;
    if entry.file_perms.is_some() {
        // The mode is set below; until then, nobody but us may connect.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    }
    if root != Path::new("/") {
        std::os::unix::fs::chroot(root).with(|| Error::new("change root").object(root.display().to_string()))?;
    }
    let directory = entry.name_dir.as_deref().unwrap_or("/");
    std::env::set_current_dir(directory).with(|| {
        Error::new("change directory")
            .object(directory)
            .hint("the directory must exist on this host as it did on the source")
    })?;
    let path = path_of(entry);
    remove_stale(path)?;
    let file = bind_here(socket, entry, path)?;
    if let Some(perms) = &entry.file_perms {
        std::os::unix::fs::chown(path, Some(perms.uid), Some(perms.gid)).context("set the owner of a socket file")?;
        let mode = std::fs::Permissions::from_mode(perms.mode & 0o7777);
        std::fs::set_permissions(path, mode).context("set the mode of a socket file")?;
    }
    Ok(file)
}

/// In a thread that ends with it. The socket keeps the name when its file is removed.
fn bind_elsewhere(socket: BorrowedFd<'_>, entry: &UnixSkEntry, empty: &Path) -> Result<OwnedFd> {
    unshare_directories().context("get a root of its own for a thread")?;
    std::os::unix::fs::chroot(empty).context("change root")?;
    std::env::set_current_dir("/").context("change directory")?;
    let path = path_of(entry);
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).context("make a directory")?;
    }
    bind_here(socket, entry, path)
}

fn bind_here(socket: BorrowedFd<'_>, entry: &UnixSkEntry, path: &Path) -> Result<OwnedFd> {
    rustix::net::bind(socket, &address(&entry.name)?)
        .map_err(io::Error::from)
        .with(|| {
            Error::new("bind a unix socket").hint("its directory must exist on this host as it did on the source")
        })?;
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        .map_err(io::Error::from)
        .context("open a socket file")
}

/// Removes what is left at a socket's path: a socket file that nobody is bound to any more, nothing else.
fn remove_stale(path: &Path) -> Result<()> {
    let Ok(file) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    let taken = |why: &str| Error::new("bind a unix socket").because(why);
    if !file.file_type().is_socket() {
        return Err(taken("there is a file of that name that is no socket").hint("move it away"));
    }
    let probe = Identity {
        family: libc::AF_UNIX,
        kind: libc::SOCK_DGRAM,
        protocol: 0,
    };
    let probe = probe.make().context("make a socket")?;
    let target = SocketAddrUnix::new(path)
        .map_err(io::Error::from)
        .context("name a socket")?;
    // Connecting a datagram socket disturbs nobody: a listener refuses its type, a peer learns nothing.
    match rustix::net::connect(&probe, &target) {
        Err(rustix::io::Errno::CONNREFUSED) => std::fs::remove_file(path).context("remove a stale socket file"),
        _ => Err(taken("another program has a socket of that name").hint("stop it")),
    }
}
