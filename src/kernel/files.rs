//! System calls and ioctls on special files: signalfd, timerfd, epoll, terminals, inotify, locks.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

fn check(result: i64) -> io::Result<i64> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// An ioctl that fills `N` bytes.
#[derive(Clone, Copy, Debug)]
pub struct Get<const N: usize>(libc::c_ulong);

/// An ioctl that reads `N` bytes.
#[derive(Clone, Copy, Debug)]
pub struct Set<const N: usize>(libc::c_ulong);

/// An ioctl whose argument is a plain number.
#[derive(Clone, Copy, Debug)]
pub struct Plain(libc::c_ulong);

impl Plain {
    /// Its number, for a call in a program.
    pub fn number(self) -> u64 {
        self.0
    }
}

impl<const N: usize> Set<N> {
    /// Its number, for a call in a program.
    pub fn number(self) -> u64 {
        self.0
    }
}

/// Size of `struct termios2` (include/uapi/asm-generic/termbits.h): four words, the line, 19 characters, two speeds.
pub const TERMIOS2: usize = 44;
/// Size of the kernel's `struct termios`: without the speeds.
pub const TERMIOS: usize = 36;

/// Terminal settings.
pub const TCGETS2: Get<TERMIOS2> = Get(0x802c_542a);
/// Sets them at once.
pub const TCSETS2: Set<TERMIOS2> = Set(0x402c_542b);
/// Which settings are locked.
pub const TIOCGLCKTRMIOS: Get<TERMIOS> = Get(0x5456);
/// Locks settings.
pub const TIOCSLCKTRMIOS: Set<TERMIOS> = Set(0x5457);
/// Size of a terminal: rows, columns, pixels, a u16 each.
pub const TIOCGWINSZ: Get<8> = Get(0x5413);
/// Sets it.
pub const TIOCSWINSZ: Set<8> = Set(0x5414);
/// Session of a terminal; for masters, the one of the other side.
pub const TIOCGSID: Get<4> = Get(0x5429);
/// Foreground process group.
pub const TIOCGPGRP: Get<4> = Get(0x540f);
/// Sets it.
pub const TIOCSPGRP: Set<4> = Set(0x5410);
/// Takes it as controlling terminal.
pub const TIOCSCTTY: Plain = Plain(0x540e);
/// Exclusive mode on; the argument is ignored.
pub const TIOCEXCL: Plain = Plain(0x540c);
/// Is it in exclusive mode?
pub const TIOCGEXCL: Get<4> = Get(0x8004_5440);
/// Is the master in packet mode?
pub const TIOCGPKT: Get<4> = Get(0x8004_5438);
/// Sets packet mode.
pub const TIOCPKT: Set<4> = Set(0x5420);
/// Is the slave locked?
pub const TIOCGPTLCK: Get<4> = Get(0x8004_5439);
/// Locks the slave.
pub const TIOCSPTLCK: Set<4> = Set(0x4004_5431);
/// Number of a master's slave.
pub const TIOCGPTN: Get<4> = Get(0x8004_5430);
/// The terminal behind `/dev/tty`, as a device number.
pub const TIOCGDEV: Get<4> = Get(0x8004_5432);
/// Opens the slave of a master; the argument is open flags, the result a descriptor.
pub const TIOCGPTPEER: Plain = Plain(0x5441);
/// Types one character into a terminal, at once.
pub const TIOCSTI: Set<1> = Set(0x5412);
/// Stops and starts a terminal's output: tcflow(3).
pub const TCXONC: Plain = Plain(0x540a);
/// Bytes that can be read.
pub const FIONREAD: Get<4> = Get(0x541b);
/// Expirations of a timerfd that nobody read yet.
pub const TFD_IOC_SET_TICKS: Set<8> = Set(0x4008_5400);
/// Number of the next inotify watch; the argument is the number.
pub const INOTIFY_IOC_SETNEXTWD: Plain = Plain(0x4004_4900);

/// Makes an ioctl that fills a buffer.
///
/// # Errors
/// ENOTTY when the file does not know it.
pub fn get<const N: usize>(file: BorrowedFd<'_>, request: Get<N>) -> io::Result<[u8; N]> {
    let mut bytes = [0u8; N];
    // SAFETY: the constants above state how many bytes each request writes; requests cannot be made elsewhere.
    check(i64::from(unsafe {
        libc::ioctl(file.as_raw_fd(), request.0 as _, bytes.as_mut_ptr())
    }))?;
    Ok(bytes)
}

/// [`get`] for an int.
///
/// # Errors
/// As [`get`].
pub fn get_int(file: BorrowedFd<'_>, request: Get<4>) -> io::Result<i32> {
    get(file, request).map(i32::from_ne_bytes)
}

/// Makes an ioctl that reads a buffer.
///
/// # Errors
/// As the request.
pub fn set<const N: usize>(file: BorrowedFd<'_>, request: Set<N>, bytes: &[u8; N]) -> io::Result<()> {
    // SAFETY: the constants above state how many bytes each request reads; requests cannot be made elsewhere.
    check(i64::from(unsafe {
        libc::ioctl(file.as_raw_fd(), request.0 as _, bytes.as_ptr())
    }))
    .map(drop)
}

/// Makes an ioctl whose argument is a number.
///
/// # Errors
/// As the request.
pub fn plain(file: BorrowedFd<'_>, request: Plain, argument: i32) -> io::Result<i32> {
    // SAFETY: the requests of this type take no pointer.
    check(i64::from(unsafe {
        libc::ioctl(file.as_raw_fd(), request.0 as _, libc::c_long::from(argument))
    }))
    .map(|value| value as i32)
}

/// Opens the slave of a pseudo terminal through its master, whatever is mounted where.
///
/// # Errors
/// EIO when the slave is locked.
pub fn open_peer(master: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    // With O_CLOEXEC the kernel keeps that flag with the open file, and fdinfo then shows it of every descriptor.
    let fd = plain(master, TIOCGPTPEER, flags & !libc::O_CLOEXEC)?;
    // SAFETY: the descriptor that comes back is ours alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// A signalfd for the signals of `mask`, bit n-1 for signal n.
///
/// # Errors
/// EMFILE.
pub fn signalfd(mask: u64) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads the eight bytes of the mask; the descriptor that comes back is ours alone.
    unsafe {
        let fd = check(libc::syscall(
            libc::SYS_signalfd4,
            -1,
            &raw const mask,
            size_of::<u64>(),
            libc::SFD_CLOEXEC,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

#[repr(C)]
struct EpollSlot {
    efd: u32,
    tfd: u32,
    toff: u32,
}

/// Is descriptor `fd` of process `pid` the file that an epoll instance watches? The instance is `epoll_fd` of `epoll_pid`;
/// the item is its `index`th of those that were added under the number `tfd` (KCMP_EPOLL_TFD, kcmp(2)).
///
/// # Errors
/// ENOENT when there is no such item, EPERM without ptrace access.
pub fn watches(epoll_pid: i32, epoll_fd: i32, tfd: u32, index: u32, pid: i32, fd: i32) -> io::Result<bool> {
    const KCMP_EPOLL_TFD: i32 = 7;
    let slot = EpollSlot {
        efd: epoll_fd as u32,
        tfd,
        toff: index,
    };
    // SAFETY: the kernel reads one struct kcmp_epoll_slot.
    let order = check(unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            pid,
            epoll_pid,
            KCMP_EPOLL_TFD,
            fd as i64,
            &raw const slot,
        )
    })?;
    Ok(order == 0)
}

/// Adds `target` to an epoll instance as if its descriptor number were `number`.
///
/// The kernel knows items by file and number. A thread with a descriptor table of its own takes the number there, so ours
/// is left alone.
///
/// # Errors
/// As epoll_ctl(2); EBADF when the number is beyond RLIMIT_NOFILE.
pub fn epoll_add_as(
    epoll: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    number: i32,
    events: u32,
    data: u64,
) -> io::Result<()> {
    let (epoll, target) = (epoll.as_raw_fd(), target.as_raw_fd());
    let add = move || -> io::Result<()> {
        let mut event = libc::epoll_event { events, u64: data };
        // SAFETY: the thread's table is a copy once unshare succeeded, so no number that anybody else uses changes its
        // meaning; no owned descriptor exists in it. The kernel reads one epoll_event.
        unsafe {
            check(i64::from(libc::unshare(libc::CLONE_FILES)))?;
            let epoll = if epoll == number {
                check(i64::from(libc::dup(epoll)))? as RawFd
            } else {
                epoll
            };
            check(i64::from(libc::dup2(target, number)))?;
            check(i64::from(libc::epoll_ctl(
                epoll,
                libc::EPOLL_CTL_ADD,
                number,
                &raw mut event,
            )))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| scope.spawn(add).join())
        .unwrap_or_else(|_| Err(io::Error::other("the helper thread panicked")))
}

/// A `struct epoll_event` as bytes: its layout differs between architectures.
pub fn epoll_event_bytes(events: u32, data: u64) -> Vec<u8> {
    let mut bytes = vec![0u8; size_of::<libc::epoll_event>()];
    bytes[..4].copy_from_slice(&events.to_ne_bytes());
    let at = std::mem::offset_of!(libc::epoll_event, u64);
    bytes[at..at + 8].copy_from_slice(&data.to_ne_bytes());
    bytes
}

/// Opens a file by its handle (open_by_handle_at(2)), without access to its contents.
///
/// # Errors
/// ESTALE when there is no such file any more, EPERM without CAP_DAC_READ_SEARCH.
pub fn open_by_handle(mount: BorrowedFd<'_>, kind: i32, handle: &[u8]) -> io::Result<OwnedFd> {
    const MAX_HANDLE_SZ: usize = 128;
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        handle: [u8; MAX_HANDLE_SZ],
    }
    if handle.len() > MAX_HANDLE_SZ {
        return Err(io::Error::from_raw_os_error(libc::EOVERFLOW));
    }
    let mut whole = Handle {
        bytes: handle.len() as u32,
        kind,
        handle: [0; MAX_HANDLE_SZ],
    };
    whole.handle[..handle.len()].copy_from_slice(handle);
    // SAFETY: the kernel reads `bytes` bytes of the handle; the descriptor that comes back is ours alone.
    unsafe {
        let fd = check(libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw mut whole,
            libc::O_PATH | libc::O_CLOEXEC,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Adds an inotify watch.
///
/// # Errors
/// As inotify_add_watch(2).
pub fn inotify_add_watch(inotify: BorrowedFd<'_>, path: &CStr, mask: u32) -> io::Result<i32> {
    // SAFETY: `path` ends with a zero.
    check(i64::from(unsafe {
        libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask)
    }))
    .map(|wd| wd as i32)
}

/// A `struct flock` for [`fcntl(2)`](https://man7.org/linux/man-pages/man2/fcntl.2.html), as bytes for a program.
pub fn flock_bytes(kind: i32, start: i64, len: i64) -> Vec<u8> {
    let mut bytes = vec![0u8; size_of::<libc::flock>()];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(std::mem::offset_of!(libc::flock, l_type), &(kind as i16).to_ne_bytes());
    put(
        std::mem::offset_of!(libc::flock, l_whence),
        &(libc::SEEK_SET as i16).to_ne_bytes(),
    );
    put(std::mem::offset_of!(libc::flock, l_start), &start.to_ne_bytes());
    put(std::mem::offset_of!(libc::flock, l_len), &len.to_ne_bytes());
    bytes
}

/// Sets a lock that belongs to an open file description (F_OFD_SETLK); does not wait.
///
/// # Errors
/// EAGAIN when somebody else holds it.
pub fn set_description_lock(file: BorrowedFd<'_>, kind: i32, start: i64, len: i64) -> io::Result<()> {
    let lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: the kernel reads one struct flock.
    check(i64::from(unsafe {
        libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock)
    }))
    .map(drop)
}

/// A pidfd of a process that is dead and gone.
///
/// # Errors
/// EAGAIN when no process can be made.
pub fn pidfd_of_the_dead() -> io::Result<OwnedFd> {
    // SAFETY: the child calls nothing but _exit, which is async-signal-safe.
    unsafe {
        let pid = check(i64::from(libc::fork()))? as i32;
        if pid == 0 {
            libc::_exit(0);
        }
        let pidfd = super::sys::pidfd_open(pid);
        while libc::waitpid(pid, std::ptr::null_mut(), 0) < 0
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
        pidfd
    }
}
