//! How a restore hands the watched memory of its tasks to the daemon that serves it: over the socket `lazy-pages.socket` in
//! the work directory.
//!
//! ```text
//! restore                                             daemon
//!    ──── connect ──────────────────────────────────────▶   before anything is made
//!    ──── for each task: header + (uffd, pidfd), ranges ─▶   the tasks are whole but for their memory, and stopped
//!    ──── header of nothing ────────────────────────────▶
//!    ◀─── K ─────────────────────────────────────────────   all are known; nothing is served yet
//!    ──── R ────────────────────────────────────────────▶   they run from now on
//! ```
//!
//! A restore that ends without R has failed: its tasks are gone, and the daemon waits for the next.

use std::io::{Error as IoError, IoSlice, IoSliceMut, Read, Result as IoResult, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use whimbrel_images::store::DirStore;

use super::lazy::{self, LazyTask};
use crate::error::{Context, Error, Result};
use crate::kernel::sys;

/// Name of the socket in the work directory, as CRIU has it.
pub const SOCKET: &str = "lazy-pages.socket";

const MAGIC: [u8; 8] = *b"whimlzy1";
/// Magic, pid, number of the guard, number of ranges, number of missing runs.
const HEADER: usize = 8 + 4 * 4;
/// Ranges or runs that one task may have.
const MOST: u32 = 1 << 24;
const KNOWN: u8 = b'K';
const RUNS: u8 = b'R';

/// A daemon that waits for tasks.
pub struct Daemon(UnixStream);

impl Daemon {
    /// Finds the daemon of a work directory.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(work: &DirStore) -> Result<Daemon> {
        let failed = || {
            Error::new("reach the lazy-pages daemon")
                .object(work.path().join(SOCKET).display().to_string())
                .hint("start `whimbrel lazy-pages -D DIR` first, with the same work directory")
        };
        let stream = UnixStream::connect(path_in(work)).with(failed)?;
        Ok(Daemon(stream))
    }

    /// Hands over tasks that are about to run, and waits until the daemon knows them all.
    ///
    /// # Errors
    /// When the daemon is gone or refuses one.
    pub fn hand(&mut self, tasks: &[LazyTask]) -> Result<()> {
        let failed = || Error::new("hand memory to the lazy-pages daemon");
        for task in tasks {
            self.send(task).with(failed)?;
        }
        self.0.write_all(&header(0, 0, 0, 0)).with(failed)?;
        let mut answer = [0];
        self.0.read_exact(&mut answer).with(failed)?;
        if answer != [KNOWN] {
            return Err(failed().because("it answered something else than expected"));
        }
        Ok(())
    }

    /// Says that the tasks run from now on.
    ///
    /// # Errors
    /// When the daemon is gone: they would wait for ever.
    pub fn run(mut self) -> Result<()> {
        let failed = || Error::new("tell the lazy-pages daemon that the tree runs");
        self.0.write_all(&[RUNS]).with(failed)
    }

    fn send(&mut self, task: &LazyTask) -> IoResult<()> {
        let pidfd = sys::pidfd_open(task.tid)?;
        let descriptors = [task.uffd.as_fd(), pidfd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        let missing = task.missing.ranges();
        let bytes = header(task.pid, task.guard, task.ranges.len() as u32, missing.len() as u32);
        let sent = rustix::net::sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        self.0.write_all(&bytes[sent..])?;
        let body: Vec<u8> = task.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        self.0.write_all(&body)
    }
}

fn header(pid: u32, guard: i32, ranges: u32, missing: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(&MAGIC);
    for (index, word) in [pid, guard as u32, ranges, missing].into_iter().enumerate() {
        bytes[8 + 4 * index..12 + 4 * index].copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Through the descriptor of the directory: a socket's path may have 107 bytes only.
fn path_in(work: &DirStore) -> PathBuf {
    Path::new(&format!("/proc/self/fd/{}", work.as_fd().as_raw_fd())).join(SOCKET)
}

/// The socket of a daemon. It goes away with this.
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Makes the socket. One that a dead daemon has left is replaced.
    ///
    /// # Errors
    /// When another daemon serves this directory already.
    pub fn bind(work: &DirStore) -> Result<Listener> {
        let shown = work.path().join(SOCKET);
        let failed = || Error::new("listen").object(shown.display().to_string());
        let path = path_in(work);
        if UnixStream::connect(&path).is_ok() {
            return Err(failed().because("another lazy-pages daemon serves this directory"));
        }
        // Its name comes last: whoever sees it may connect, which fails between bind(2) and listen(2).
        let new = path.with_extension("new");
        let _ = std::fs::remove_file(&new);
        let listener = UnixListener::bind(&new).with(failed)?;
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600)).with(failed)?;
        std::fs::rename(&new, &path).with(failed)?;
        let path = std::path::absolute(&shown).with(failed)?;
        Ok(Listener { listener, path })
    }

    /// Waits for a restore, takes its tasks, and waits until they run. Connections that end before are forgotten.
    ///
    /// # Errors
    /// When the socket cannot be used any more.
    pub fn take(&self) -> Result<Vec<LazyTask>> {
        loop {
            let (stream, _) = self.listener.accept().context("wait for a restore")?;
            match take_from(stream) {
                Ok(Some(tasks)) => return Ok(tasks),
                // Somebody looked whether we are there.
                Ok(None) => {}
                Err(error) => tracing::warn!("a restore gave up before its tree ran: {error}"),
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn take_from(mut stream: UnixStream) -> IoResult<Option<Vec<LazyTask>>> {
    let peer = rustix::net::sockopt::socket_peercred(&stream)?;
    let allowed = peer.uid.is_root() || peer.uid == rustix::process::geteuid();
    if !allowed {
        return Err(IoError::other(format!("user {} may not", peer.uid.as_raw())));
    }
    let mut tasks = Vec::new();
    loop {
        match take_task(&mut stream) {
            Ok(Some(task)) => tasks.push(task),
            Ok(None) => break,
            Err(error) if tasks.is_empty() && error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    stream.write_all(&[KNOWN])?;
    let mut word = [0];
    stream.read_exact(&mut word)?;
    if word != [RUNS] {
        return Err(wrong("it said something else than that they run"));
    }
    Ok(Some(tasks))
}

fn wrong(what: &str) -> IoError {
    IoError::new(std::io::ErrorKind::InvalidData, what.to_owned())
}

fn take_task(stream: &mut UnixStream) -> IoResult<Option<LazyTask>> {
    let mut bytes = [0; HEADER];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        &*stream,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    stream.read_exact(&mut bytes[received.bytes..])?;
    let word = |index: usize| {
        let at = 8 + 4 * index;
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or_default())
    };
    let (pid, guard, ranges, missing) = (word(0), word(1) as i32, word(2), word(3));
    if bytes[..8] != MAGIC || ranges > MOST || missing > MOST {
        return Err(wrong("this is no restore of this version"));
    }
    if pid == 0 {
        return Ok(None);
    }
    let [uffd, pidfd]: [OwnedFd; 2] = descriptors
        .try_into()
        .map_err(|_| wrong("the descriptors of a task are missing"))?;
    let mut body = vec![0; 8 * (3 * ranges as usize + 2 * missing as usize)];
    stream.read_exact(&mut body)?;
    let words: Vec<u64> = body
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
        .collect();
    let (ranges, missing) = words.split_at(3 * ranges as usize);
    let (ranges, missing) = lazy::of_words(pid, ranges, missing);
    Ok(Some(LazyTask {
        pid,
        tid: pid_of(&pidfd),
        guard,
        uffd: uffd.into(),
        ranges,
        missing,
    }))
}

/// The process of a pidfd in our pid namespace; 0 when it is in none that we see.
fn pid_of(pidfd: &OwnedFd) -> i32 {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}
