//! File locks: flock(2), open file description locks, POSIX locks and leases, in `filelocks.img`.
//!
//! The first two belong to the open file description: the controller places them. POSIX locks and leases belong to a process:
//! the task places its own, when its descriptors are in place (closing any descriptor of a file drops its POSIX locks).
//! Locks are no kind of file, so drivers call this page by name: [`check`] and [`dump`] after the kinds', [`restore`] after
//! [`open_all`](super::open_all), [`install`] for every task after [`FileKind::install_in`](crate::resource::FileKind).

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::FlockOperation;
use whimbrel_images::entry::ImageReader;
use whimbrel_images::proto::FileLockEntry;
use whimbrel_images::store::ImageStore;

use crate::error::{Context, Error, Result};
use crate::kernel::files;
use crate::procfs;
use crate::remote::Program;
use crate::resource::fd::{FileDump, FileRestore};

/// `file_lock_entry.flag`: the kernel's FL_ flags (include/linux/filelock.h).
mod flag {
    pub const POSIX: u32 = 1;
    pub const FLOCK: u32 = 2;
    pub const LEASE: u32 = 32;
    pub const DESCRIPTION: u32 = 1024;
}

const IMAGE: &str = "filelocks.img";

/// Are there locks, and may they be carried?
///
/// # Errors
/// When there are and `--file-locks` was not given; when a lease is being broken.
pub fn check(dump: &FileDump<'_>) -> Result<()> {
    for (entry, text) in collect(dump)? {
        if !dump.options.file_locks {
            let path = dump
                .ids
                .get(&(entry.outer_pid, entry.lock.fd))
                .and_then(|id| dump.files.get(id));
            return Err(Error::new("carry a file lock")
                .task(entry.outer_pid)
                .object(path.map_or_else(|| format!("fd {}", entry.lock.fd), |file| file.describe()))
                .because(format!("it is locked ({text})"))
                .hint("use --file-locks"));
        }
    }
    Ok(())
}

/// Describes all locks of the tree.
///
/// # Errors
/// When they cannot be written.
pub fn dump(dump: &mut FileDump<'_>) -> Result<()> {
    for (found, _) in collect(dump)? {
        dump.append(IMAGE, &found.lock, &[])?;
    }
    Ok(())
}

struct Found {
    outer_pid: i32,
    lock: FileLockEntry,
}

/// All locks, each once, with the kernel's words for it.
fn collect(dump: &FileDump<'_>) -> Result<Vec<(Found, String)>> {
    let mut all: Vec<(Found, String)> = Vec::new();
    let mut descriptors: Vec<_> = dump.ids.iter().collect();
    descriptors.sort_unstable();
    for (&(pid, fd), id) in descriptors {
        let Some(file) = dump.files.get(id) else { continue };
        let first = (file.pid, file.fd) == (pid, fd);
        // What belongs to the description is told wherever it is open, what belongs to a process only there.
        let lines = if first {
            file.info.lines.clone()
        } else if file.pid != pid {
            procfs::fdinfo::parse(&procfs::read(pid, &format!("fdinfo/{fd}"))?).lines
        } else {
            // Another descriptor of the same file in the same task.
            continue;
        };
        for line in lines.iter().filter(|line| line.starts_with("lock:")) {
            let text = line.split_once(':').map_or("", |(_, text)| text).trim();
            let failed = |why: &str| {
                Error::new("dump a file lock")
                    .task(pid)
                    .object(format!("fd {fd} ({text})"))
                    .because(why.to_owned())
            };
            let lock =
                parse(text).ok_or_else(|| failed("it is of a kind that is not supported, or a lease being broken"))?;
            let of_process = lock.flag & (flag::POSIX | flag::LEASE) != 0;
            if !of_process && !first {
                continue;
            }
            // A lease is told wherever its file is open; it belongs to the one who took it.
            let lock = FileLockEntry {
                pid: dump.shared.pids.get(&pid).copied().unwrap_or(pid),
                fd,
                ..lock
            };
            let known = |(other, text_of_other): &(Found, String)| {
                let same_lease =
                    lock.flag == flag::LEASE && dump.ids.get(&(other.outer_pid, other.lock.fd)) == Some(id);
                words(text_of_other).eq(words(text))
                    && (same_lease || other.outer_pid == pid && lock.flag == flag::POSIX)
            };
            if !all.iter().any(known) {
                all.push((Found { outer_pid: pid, lock }, text.to_owned()));
            }
        }
    }
    Ok(all)
}

/// The words of a line after its number.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split_whitespace().skip(1)
}

/// Parses a line as in `/proc/locks`: `1: POSIX  ADVISORY  WRITE 28189 fe:00:10010723 5 14`.
fn parse(text: &str) -> Option<FileLockEntry> {
    let mut words = words(text);
    let (class, mode, access) = (words.next()?, words.next()?, words.next()?);
    let (_pid, _inode, start, end) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let flag = match (class, mode) {
        ("POSIX", "ADVISORY") => flag::POSIX,
        ("FLOCK", "ADVISORY") => flag::FLOCK,
        ("OFDLCK", "ADVISORY") => flag::DESCRIPTION,
        ("LEASE", "ACTIVE") => flag::LEASE,
        _ => return None,
    };
    let r#type = match access {
        "READ" => libc::F_RDLCK,
        "WRITE" => libc::F_WRLCK,
        _ => return None,
    } as u32;
    let start: i64 = start.parse().ok()?;
    // As l_len: 0 is up to the end, however far that will be.
    let len = match end {
        "EOF" => 0,
        end => end.parse::<i64>().ok()?.checked_sub(start)?.checked_add(1)?,
    };
    Some(FileLockEntry {
        flag,
        r#type,
        start,
        len,
        ..FileLockEntry::default()
    })
}

fn read(store: &dyn ImageStore) -> Result<Vec<FileLockEntry>> {
    let mut image = match ImageReader::open(store, IMAGE) {
        Ok(image) => image,
        Err(error) if error.is_not_found() => return Ok(Vec::new()),
        Err(error) => return Err(error).context("open an image"),
    };
    let mut locks = Vec::new();
    while let Some(lock) = image.next::<FileLockEntry>().context("read file locks")? {
        if !matches!(lock.r#type as i32, libc::F_RDLCK | libc::F_WRLCK) {
            return Err(Error::new("read file locks").because(format!("there is no lock of type {}", lock.r#type)));
        }
        locks.push(lock);
    }
    Ok(locks)
}

/// Places the locks that belong to open file descriptions. `file_of` gives the image id of a descriptor of a task.
///
/// # Errors
/// When somebody else holds one.
pub fn restore(restore: &FileRestore<'_>, file_of: &dyn Fn(i32, i32) -> Option<u32>) -> Result<()> {
    for lock in read(restore.store)? {
        let failed = || {
            Error::new("lock a file again")
                .task(lock.pid)
                .object(format!("fd {}", lock.fd))
                .hint("another process may hold the lock: end it, or let it unlock")
        };
        if !matches!(lock.flag, flag::POSIX | flag::FLOCK | flag::LEASE | flag::DESCRIPTION) {
            return Err(failed().because(format!("locks of class {:#x} are not supported", lock.flag)));
        }
        if matches!(lock.flag, flag::POSIX | flag::LEASE) {
            continue;
        }
        let file: Option<&OwnedFd> = file_of(lock.pid, lock.fd).and_then(|id| restore.opened.get(&id));
        let file = file.ok_or_else(|| failed().because("the task has no such descriptor"))?;
        let shared = lock.r#type as i32 == libc::F_RDLCK;
        if lock.flag == flag::FLOCK {
            let operation = match shared {
                true => FlockOperation::NonBlockingLockShared,
                false => FlockOperation::NonBlockingLockExclusive,
            };
            rustix::fs::flock(file, operation)
                .map_err(std::io::Error::from)
                .with(failed)?;
        } else {
            files::set_description_lock(file.as_fd(), lock.r#type as i32, lock.start, lock.len).with(failed)?;
        }
    }
    Ok(())
}

/// Adds the calls that place a task's own locks. `pid` is its id in its pid namespace.
///
/// # Errors
/// When the image is damaged.
pub fn install(store: &dyn ImageStore, pid: u32, program: &mut Program) -> Result<()> {
    for lock in read(store)?.iter().filter(|lock| lock.pid as u32 == pid) {
        let what = format!("lock fd {} again", lock.fd);
        match lock.flag {
            flag::POSIX => {
                let range = program.data(&files::flock_bytes(lock.r#type as i32, lock.start, lock.len));
                let args = [lock.fd.into(), libc::F_SETLK.into(), range.into()];
                program.call(what, libc::SYS_fcntl, &args);
            }
            flag::LEASE => {
                let args = [lock.fd.into(), libc::F_SETLEASE.into(), lock.r#type.into()];
                program.call(what, libc::SYS_fcntl, &args);
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fd::fixture;
    use rustix::fs::{Mode, OFlags};

    fn make() -> (tempfile::TempDir, impl Fn() -> OwnedFd) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a file");
        std::fs::write(&path, "0123456789").unwrap();
        (directory, move || {
            rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap()
        })
    }

    fn with_locks() -> crate::dump::Options {
        crate::dump::Options {
            file_locks: true,
            ..Default::default()
        }
    }

    fn locks(dumped: &fixture::Dumped) -> Vec<(u32, u32, i64, i64)> {
        let mut all: Vec<_> = read(&dumped.store)
            .unwrap()
            .iter()
            .map(|lock| (lock.flag, lock.r#type, lock.start, lock.len))
            .collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn locks_of_descriptions_are_held_again_and_only_once() {
        let _alone = fixture::alone();
        let (_directory, open) = make();
        let (exclusive, ranges) = (open(), open());
        rustix::fs::flock(&exclusive, FlockOperation::LockExclusive).unwrap();
        files::set_description_lock(ranges.as_fd(), libc::F_WRLCK, 2, 3).unwrap();
        files::set_description_lock(ranges.as_fd(), libc::F_RDLCK, 8, 0).unwrap();
        let duplicate = ranges.try_clone().unwrap();
        let dumped = fixture::dump_with(&[&exclusive, &ranges], &with_locks()).unwrap();
        assert_eq!(locks(&dumped), [(2, 1, 0, 0), (1024, 0, 8, 0), (1024, 1, 2, 3)]);
        drop((exclusive, ranges, duplicate));
        let file_of = |pid: i32, fd: i32| dumped.ids.get(&(pid, fd)).copied();
        let mut context = dumped.context();
        crate::resource::fd::open_all(&mut context, &|_| true).unwrap();
        assert!(fixture::eventually(|| restore(&context, &file_of).is_ok()));
        let other = open();
        let try_flock = |file: &OwnedFd| rustix::fs::flock(file, FlockOperation::NonBlockingLockShared);
        assert_eq!(try_flock(&other), Err(rustix::io::Errno::WOULDBLOCK));
        let try_range = |start, len, kind| files::set_description_lock(other.as_fd(), kind, start, len);
        assert!(try_range(4, 1, libc::F_RDLCK).is_err());
        assert!(try_range(100, 1, libc::F_WRLCK).is_err());
        try_range(100, 1, libc::F_RDLCK).unwrap();
        try_range(5, 3, libc::F_WRLCK).unwrap();
        drop(context);
        assert!(fixture::eventually(|| try_flock(&other).is_ok()));
    }

    #[test]
    fn locks_of_processes_are_placed_by_the_task_that_held_them() {
        let _alone = fixture::alone();
        let (_directory, open) = make();
        let file = open();
        rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        let duplicate = file.try_clone().unwrap();
        let (_directory, open) = make();
        let leased = open();
        crate::kernel::sys::fcntl_int(leased.as_fd(), libc::F_SETLEASE, libc::F_WRLCK).unwrap();
        let dumped = fixture::dump_with(&[&file, &leased], &with_locks()).unwrap();
        assert_eq!(locks(&dumped), [(1, 1, 0, 0), (32, 1, 0, 0)]);
        // Looking at the file did not break the lease.
        let lease = crate::kernel::sys::fcntl_int(leased.as_fd(), libc::F_GETLEASE, 0).unwrap();
        assert_eq!(lease, libc::F_WRLCK);
        drop(duplicate);

        let task = fixture::Task::start(&["sleep", "1000"], &file, &leased);
        let mut own = read(&dumped.store).unwrap();
        own.sort_unstable_by_key(|lock| lock.flag);
        let mut writer = whimbrel_images::entry::ImageWriter::create(&dumped.store, IMAGE).unwrap();
        for (lock, fd) in own.iter().zip([0, 1]) {
            let pid = task.pid();
            let lock = FileLockEntry { pid, fd, ..*lock };
            writer.write(&lock).unwrap();
        }
        writer.finish().unwrap();
        drop((file, leased));
        let calls = |pid: i32| {
            let mut program = Program::new();
            install(&dumped.store, pid as u32, &mut program).unwrap();
            program
        };
        assert!(calls(1).is_empty());
        task.run(&calls(task.pid()));
        let lines = |fd: i32| {
            let info = procfs::read(task.pid(), &format!("fdinfo/{fd}")).unwrap();
            let locks = procfs::fdinfo::parse(&info).lines;
            locks
                .iter()
                .filter_map(|line| parse(line.strip_prefix("lock:")?.trim()))
                .collect::<Vec<_>>()
        };
        assert_eq!((lines(0)[0].flag, lines(0)[0].r#type), (1, 1));
        assert_eq!((lines(1)[0].flag, lines(1)[0].r#type), (32, 1));
    }

    #[test]
    fn without_the_option_a_locked_file_is_refused_with_the_option_that_helps() {
        let _alone = fixture::alone();
        let (directory, open) = make();
        let file = open();
        rustix::fs::flock(&file, FlockOperation::LockShared).unwrap();
        let error = fixture::dump_with(&[&file], &crate::dump::Options::default())
            .err()
            .unwrap()
            .chain();
        assert!(
            error.contains("--file-locks") && error.contains(directory.path().to_str().unwrap()),
            "{error}"
        );
    }

    #[test]
    fn lines_of_the_kernel_are_understood() {
        let range = parse("1: POSIX  ADVISORY  WRITE 28189 fe:00:10010723 5 14").unwrap();
        assert_eq!((range.flag, range.r#type, range.start, range.len), (1, 1, 5, 10));
        assert!(parse("1: LEASE  BREAKING  READ 28189 fe:00:1 0 EOF").is_none());
        assert!(parse("1: POSIX").is_none());
    }
}
