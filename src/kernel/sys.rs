//! System calls that the crates lack, each typed and checked.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

fn check(result: i64) -> io::Result<i64> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// `pidfd_open(2)`. The id of a thread that does not lead its process gives a pidfd of that thread (Linux 6.9): all there
/// is to look into a process whose first thread has ended.
///
/// # Errors
/// ESRCH when there is no such process or thread.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    let open = |flags: i32| -> io::Result<OwnedFd> {
        // SAFETY: no pointers; the descriptor that comes back is ours alone.
        unsafe {
            let fd = check(libc::syscall(libc::SYS_pidfd_open, pid, flags))?;
            Ok(OwnedFd::from_raw_fd(fd as i32))
        }
    };
    match open(0) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {
            open(libc::PIDFD_THREAD as i32).map_err(|_| error)
        }
        result => result,
    }
}

/// `pidfd_getfd(2)`: a duplicate of another process's descriptor, sharing its open file description.
///
/// # Errors
/// EBADF when it has no such descriptor, EPERM without ptrace access.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, descriptor: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the descriptor that comes back is ours alone.
    unsafe {
        let fd = check(libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), descriptor, 0))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// A duplicate of `descriptor` of process `pid`.
///
/// # Errors
/// As [`pidfd_open`] and [`pidfd_getfd`].
pub fn take_descriptor(pid: i32, descriptor: i32) -> io::Result<OwnedFd> {
    use std::os::fd::AsFd;
    pidfd_getfd(pidfd_open(pid)?.as_fd(), descriptor)
}

/// What [`kcmp`] compares.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub enum Kcmp {
    /// Open file descriptions behind two descriptors.
    File = 0,
    /// Address spaces.
    Vm = 1,
    /// Descriptor tables.
    Files = 2,
    /// Root, working directory and umask.
    Fs = 3,
    /// Signal handlers.
    Sighand = 4,
}

/// `kcmp(2)`: how two kernel objects are ordered. `Equal` means that they are the same.
///
/// # Errors
/// EPERM without ptrace access to both.
pub fn kcmp(pid1: i32, pid2: i32, what: Kcmp, index1: u64, index2: u64) -> io::Result<std::cmp::Ordering> {
    // SAFETY: no pointers.
    let result = check(unsafe { libc::syscall(libc::SYS_kcmp, pid1, pid2, what as i32, index1, index2) })?;
    Ok(match result {
        0 => std::cmp::Ordering::Equal,
        1 => std::cmp::Ordering::Less,
        _ => std::cmp::Ordering::Greater,
    })
}

/// `get_robust_list(2)` of another thread: address and length of its head.
///
/// # Errors
/// EPERM without ptrace access.
pub fn robust_list(tid: i32) -> io::Result<(u64, u64)> {
    let (mut head, mut length) = (0u64, 0u64);
    // SAFETY: both are live u64, which is what the kernel writes.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut length) })?;
    Ok((head, length))
}

/// A socket option as raw bytes, at most `length` of them.
///
/// # Errors
/// ENOPROTOOPT for an option that the socket does not have.
pub fn socket_option(socket: BorrowedFd<'_>, level: i32, name: i32, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0u8; length];
    let mut size = length as libc::socklen_t;
    // SAFETY: `bytes` has `size` bytes of room.
    check(i64::from(unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, bytes.as_mut_ptr().cast(), &mut size)
    }))?;
    bytes.truncate(size as usize);
    Ok(bytes)
}

/// A socket option that is an int.
///
/// # Errors
/// As [`socket_option`].
pub fn socket_option_int(socket: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let bytes = socket_option(socket, level, name, 4)?;
    let word: [u8; 4] = bytes.try_into().map_err(|_| io::Error::other("the option is no int"))?;
    Ok(i32::from_ne_bytes(word))
}

/// Sets a socket option from raw bytes.
///
/// # Errors
/// EPERM, ENOPROTOOPT, EINVAL as setsockopt(2).
pub fn set_socket_option(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let length = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes of `value`.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    check(i64::from(result)).map(drop)
}

/// Sets a socket option that is an int.
///
/// # Errors
/// As [`set_socket_option`].
pub fn set_socket_option_int(socket: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_socket_option(socket, level, name, &value.to_ne_bytes())
}

/// `fcntl(2)` with an int argument, for the commands that the crates lack (F_GETSIG, F_SETSIG, F_SETOWN …).
///
/// # Errors
/// As fcntl(2).
pub fn fcntl_int(fd: BorrowedFd<'_>, command: i32, argument: i32) -> io::Result<i32> {
    debug_assert!(!matches!(
        command,
        libc::F_GETLK | libc::F_SETLK | libc::F_SETLKW | libc::F_DUPFD
    ));
    // SAFETY: these commands take an int, no pointer.
    check(i64::from(unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) })).map(|value| value as i32)
}

/// Signal that a file sends instead of SIGIO (fcntl(2)).
pub const F_GETSIG: i32 = 11;
/// Sets it.
pub const F_SETSIG: i32 = 10;

#[repr(C)]
struct OwnerEx {
    kind: i32,
    pid: i32,
}

/// `F_GETOWN_EX`: what kind of owner (thread 0, process 1, group 2) and its id; `None` where there can be none.
pub fn owner_ex(fd: BorrowedFd<'_>) -> Option<(i32, i32)> {
    const F_GETOWN_EX: i32 = 16;
    let mut owner = OwnerEx { kind: 0, pid: 0 };
    // SAFETY: the kernel writes one struct f_owner_ex.
    check(i64::from(unsafe {
        libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner)
    }))
    .ok()?;
    Some((owner.kind, owner.pid))
}

/// `F_SETOWN_EX`.
///
/// # Errors
/// ESRCH when there is no such owner.
pub fn set_owner_ex(fd: BorrowedFd<'_>, kind: i32, pid: i32) -> io::Result<()> {
    const F_SETOWN_EX: i32 = 15;
    let owner = OwnerEx { kind, pid };
    // SAFETY: the kernel reads one struct f_owner_ex.
    check(i64::from(unsafe {
        libc::fcntl(fd.as_raw_fd(), F_SETOWN_EX, &raw const owner)
    }))
    .map(drop)
}

/// `kill(2)`.
///
/// # Errors
/// ESRCH when there is no such process.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(i64::from(unsafe { libc::kill(pid, signal) })).map(drop)
}

/// `process_mrelease(2)`: takes the memory of a process apart that was just killed, beside the process itself, on another
/// processor.
///
/// # Errors
/// ESRCH when it has no memory any more, EINVAL when it is not dying or shares its memory, ENOSYS before Linux 5.15.
pub fn process_mrelease(pid: i32) -> io::Result<()> {
    let pidfd = pidfd_open(pid)?;
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_process_mrelease, pidfd.as_raw_fd(), 0) }).map(drop)
}

/// Closes a descriptor that this process was started with. Those that it opened itself have close-on-exec set, and stay.
///
/// # Errors
/// EBADF when there is none.
pub fn close_inherited(fd: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    let flags = check(i64::from(unsafe { libc::fcntl(fd, libc::F_GETFD) }))?;
    if flags as i32 & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: no pointers; the descriptor came through exec, so nothing in this process owns it.
    check(i64::from(unsafe { libc::close(fd) })).map(drop)
}
