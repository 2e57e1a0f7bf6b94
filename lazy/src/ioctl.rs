//! The kernel's side of lazy memory: userfaultfd, its ioctls and events, and PAGEMAP_SCAN.
//!
//! This is the one file of the crate that holds `unsafe`. The descriptor mostly belongs to *another* process's address
//! space (it was made inside that task and fetched with pidfd_getfd), so addresses are `u64` everywhere and are never
//! dereferenced here. Structures and numbers are written out by hand, because the headers and crates of many
//! distributions lack the newer half of them, and are checked when this file is compiled.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

pub use crate::flags::{Categories, CopyMode, FaultFlags, Features, MoveMode, RegisterMode, ScanFlags};

const UFFD_API: u64 = 0xAA;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArg {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArg {
    range: RangeArg,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy` and, with the same shape, `struct uffdio_move`.
#[repr(C)]
struct CopyArg {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// `struct uffdio_zeropage`, `uffdio_continue` and `uffdio_poison`: all of one shape.
#[repr(C)]
struct FillArg {
    range: RangeArg,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct WriteProtectArg {
    range: RangeArg,
    mode: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const IOC_WRITE: u32 = 1;
const IOC_READ: u32 = 2;

const fn ioc(direction: u32, kind: u8, number: u8, size: usize) -> u32 {
    (direction << 30) | ((size as u32) << 16) | ((kind as u32) << 8) | number as u32
}

const UFFDIO_REGISTER: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x00, size_of::<RegisterArg>());
const UFFDIO_UNREGISTER: u32 = ioc(IOC_READ, 0xAA, 0x01, size_of::<RangeArg>());
const UFFDIO_WAKE: u32 = ioc(IOC_READ, 0xAA, 0x02, size_of::<RangeArg>());
const UFFDIO_COPY: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x03, size_of::<CopyArg>());
const UFFDIO_ZEROPAGE: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x04, size_of::<FillArg>());
const UFFDIO_MOVE: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x05, size_of::<CopyArg>());
const UFFDIO_WRITEPROTECT: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x06, size_of::<WriteProtectArg>());
const UFFDIO_CONTINUE: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x07, size_of::<FillArg>());
const UFFDIO_POISON: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x08, size_of::<FillArg>());
const UFFDIO_API_IOCTL: u32 = ioc(IOC_READ | IOC_WRITE, 0xAA, 0x3F, size_of::<ApiArg>());
const PAGEMAP_SCAN: u32 = ioc(IOC_READ | IOC_WRITE, b'f', 16, size_of::<ScanArg>());

// The numbers as the kernel's uapi headers give them for every architecture with the generic _IOC layout.
const _: () = {
    assert!(size_of::<ApiArg>() == 24);
    assert!(size_of::<RangeArg>() == 16);
    assert!(size_of::<RegisterArg>() == 32);
    assert!(size_of::<CopyArg>() == 40);
    assert!(size_of::<FillArg>() == 32);
    assert!(size_of::<WriteProtectArg>() == 24);
    assert!(size_of::<ScanArg>() == 96);
    assert!(size_of::<PageRegion>() == 24);
    assert!(UFFDIO_API_IOCTL == 0xC018_AA3F);
    assert!(UFFDIO_REGISTER == 0xC020_AA00);
    assert!(UFFDIO_UNREGISTER == 0x8010_AA01);
    assert!(UFFDIO_WAKE == 0x8010_AA02);
    assert!(UFFDIO_COPY == 0xC028_AA03);
    assert!(UFFDIO_ZEROPAGE == 0xC020_AA04);
    assert!(UFFDIO_MOVE == 0xC028_AA05);
    assert!(UFFDIO_WRITEPROTECT == 0xC018_AA06);
    assert!(UFFDIO_CONTINUE == 0xC020_AA07);
    assert!(UFFDIO_POISON == 0xC020_AA08);
    assert!(PAGEMAP_SCAN == 0xC060_6610);
};

/// Why a call that fills pages stopped before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Some pages were done, then something came up that the kernel does not name. Go on with the rest to learn it.
    Partial,
    /// EAGAIN: an event (fork, mremap, ...) waits to be read, or the address space is just being changed.
    /// Read the events, then try again.
    Again,
    /// EEXIST: a page is there already.
    Exists,
    /// ENOENT: the range does not lie within one registered mapping.
    NotRegistered,
    /// ESRCH: the address space is gone; its process ended or executed another program.
    Gone,
    /// ENOSPC or ENOMEM: no memory, a cgroup limit or a full tmpfs.
    NoSpace,
    /// Any other error number.
    Other(i32),
}

impl Stop {
    fn from_errno(errno: i32) -> Self {
        match errno {
            libc::EAGAIN => Self::Again,
            libc::EEXIST => Self::Exists,
            libc::ENOENT => Self::NotRegistered,
            libc::ESRCH => Self::Gone,
            libc::ENOSPC | libc::ENOMEM => Self::NoSpace,
            other => Self::Other(other),
        }
    }

    /// The error number that stands for this reason.
    pub fn errno(self) -> i32 {
        match self {
            Self::Partial | Self::Again => libc::EAGAIN,
            Self::Exists => libc::EEXIST,
            Self::NotRegistered => libc::ENOENT,
            Self::Gone => libc::ESRCH,
            Self::NoSpace => libc::ENOSPC,
            Self::Other(errno) => errno,
        }
    }
}

/// How far a call that fills pages came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Bytes done, from the start of the range.
    pub bytes: u64,
    /// Why it stopped; `None` when all is done.
    pub stop: Option<Stop>,
}

/// One message read from a userfaultfd.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a page.
    Fault {
        /// Address of the access; rounded to the page unless [`Features::EXACT_ADDRESS`] is on.
        address: u64,
        /// Why the fault happened.
        flags: FaultFlags,
        /// The thread, in its own pid namespace; 0 unless [`Features::THREAD_ID`] is on.
        thread: u32,
    },
    /// The process forked; the descriptor serves the child's copy of the registered ranges.
    Fork {
        /// Userfaultfd of the child.
        child: OwnedFd,
    },
    /// A mapping was moved.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Length in bytes before the move (a mapping that grows at the same time is longer afterwards).
        len: u64,
    },
    /// Pages are about to be dropped (madvise); they read as zeros from now on.
    Remove {
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
    },
    /// A range was unmapped.
    Unmap {
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
    },
    /// A message of a kind that this version does not know.
    Other(u8),
}

const MESSAGE: usize = 32;
/// The most messages that one read returns.
pub const EVENTS_PER_READ: usize = 32;

/// A userfaultfd.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl From<OwnedFd> for Userfault {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Userfault> for OwnedFd {
    fn from(uffd: Userfault) -> Self {
        uffd.0
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Userfault {
    /// Makes a userfaultfd for the calling process (close-on-exec, non-blocking).
    ///
    /// # Errors
    /// EPERM without CAP_SYS_PTRACE when `vm.unprivileged_userfaultfd` is 0 and `user_mode_only` is false; ENOSYS.
    pub fn new(user_mode_only: bool) -> io::Result<Self> {
        let mode = if user_mode_only { UFFD_USER_MODE_ONLY } else { 0 };
        // SAFETY: userfaultfd(2) takes one flags word and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | mode) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
    }

    /// UFFDIO_API: enables `features` and returns all features that the kernel has. Must come first, and only once.
    ///
    /// # Errors
    /// EINVAL when a feature is unknown or the call was made before; EPERM for EVENT_FORK without CAP_SYS_PTRACE.
    pub fn api(&self, features: Features) -> io::Result<Features> {
        let mut arg = ApiArg {
            api: UFFD_API,
            features: features.0,
            ioctls: 0,
        };
        self.call(UFFDIO_API_IOCTL, &mut arg)?;
        Ok(Features(arg.features))
    }

    /// UFFDIO_REGISTER: starts to report faults in a range; returns the bit set of ioctls usable there.
    ///
    /// # Errors
    /// EINVAL when part of the range is not mapped or of a kind that cannot be registered; EBUSY when another
    /// userfaultfd holds it.
    pub fn register(&self, start: u64, len: u64, mode: RegisterMode) -> io::Result<u64> {
        let mut arg = RegisterArg {
            range: RangeArg { start, len },
            mode: mode.0,
            ioctls: 0,
        };
        self.call(UFFDIO_REGISTER, &mut arg)?;
        Ok(arg.ioctls)
    }

    /// UFFDIO_UNREGISTER: ends reporting and wakes every thread that waits in the range. Pages still missing read as
    /// zeros from then on, so call it only when none is.
    ///
    /// # Errors
    /// EINVAL when nothing is mapped in the range or part of it cannot be registered at all.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.call(UFFDIO_UNREGISTER, &mut RangeArg { start, len })
    }

    /// UFFDIO_WAKE: wakes the threads that wait in the range; they try their access again.
    ///
    /// # Errors
    /// EINVAL for a range that is not page aligned.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        self.call(UFFDIO_WAKE, &mut RangeArg { start, len })
    }

    /// UFFDIO_COPY: puts the bytes of `data` at `dst`, where pages are missing, and wakes the threads that wait for them
    /// unless told otherwise. On a partial result or an error threads that wait for pages behind it are not woken.
    pub fn copy(&self, dst: u64, data: &[u8], mode: CopyMode) -> Fill {
        let mut arg = CopyArg {
            dst,
            src: data.as_ptr() as u64,
            len: data.len() as u64,
            mode: mode.0,
            done: 0,
        };
        let result = self.call(UFFDIO_COPY, &mut arg);
        fill(result, arg.done, arg.len)
    }

    /// UFFDIO_ZEROPAGE: maps the shared zero page where pages are missing.
    pub fn zeropage(&self, start: u64, len: u64, wake: bool) -> Fill {
        self.fill_range(UFFDIO_ZEROPAGE, start, len, wake)
    }

    /// UFFDIO_CONTINUE: maps pages that are in the page cache already.
    pub fn continue_(&self, start: u64, len: u64, wake: bool) -> Fill {
        self.fill_range(UFFDIO_CONTINUE, start, len, wake)
    }

    /// UFFDIO_POISON: makes accesses to the range fail with SIGBUS.
    pub fn poison(&self, start: u64, len: u64, wake: bool) -> Fill {
        self.fill_range(UFFDIO_POISON, start, len, wake)
    }

    /// UFFDIO_MOVE: moves pages within the address space without copying their bytes.
    pub fn move_(&self, dst: u64, src: u64, len: u64, mode: MoveMode) -> Fill {
        let mut arg = CopyArg {
            dst,
            src,
            len,
            mode: mode.0,
            done: 0,
        };
        let result = self.call(UFFDIO_MOVE, &mut arg);
        fill(result, arg.done, len)
    }

    /// UFFDIO_WRITEPROTECT: protects a range, or lifts the protection and wakes the threads that wait for it.
    ///
    /// # Errors
    /// ENOENT when part of the range is not registered with [`RegisterMode::WP`]; EAGAIN while an event waits to be read.
    pub fn write_protect(&self, start: u64, len: u64, protect: bool) -> io::Result<()> {
        let mode = u64::from(protect);
        self.call(
            UFFDIO_WRITEPROTECT,
            &mut WriteProtectArg {
                range: RangeArg { start, len },
                mode,
            },
        )
    }

    /// Whether an event waits to be read, or the thread that caused one has not gone on yet; no page can be filled then.
    ///
    /// [`Stop::NotRegistered`] means what it says only while this is false: the kernel looks for events, then for the
    /// mapping, then for events again, and a mapping that is moved away in between is reported as not registered.
    pub fn changing(&self) -> bool {
        // Address 0 is never valid, but that is checked after the events.
        self.continue_(0, 4096, false).stop == Some(Stop::Again)
    }

    /// Whether the whole range lies within one registered *anonymous* mapping, without touching a page of it.
    ///
    /// The kernel looks the mapping up before it checks whether UFFDIO_CONTINUE suits it, and answers ENOENT when the
    /// range is not inside one mapping of this userfaultfd, EINVAL when it is but the mapping is anonymous.
    ///
    /// # Errors
    /// [`Stop::Again`] while an event waits to be read, [`Stop::Gone`] when the address space is gone, and
    /// [`Stop::Other`] when the mapping is shared memory, for which this does not work.
    pub fn within_one_anonymous_mapping(&self, start: u64, len: u64) -> Result<bool, Stop> {
        match self.continue_(start, len, false).stop {
            Some(Stop::Other(libc::EINVAL)) => Ok(true),
            Some(Stop::NotRegistered) if self.changing() => Err(Stop::Again),
            Some(Stop::NotRegistered) => Ok(false),
            Some(stop) => Err(stop),
            None => Err(Stop::Other(0)),
        }
    }

    /// Whether the page at `address` lies in a mapping that is registered with this userfaultfd. Like
    /// [`Userfault::within_one_anonymous_mapping`], but for shared memory too, where it may map a page that is there anyway.
    ///
    /// # Errors
    /// [`Stop::Again`] while an event waits to be read, and [`Stop::Gone`] when the address space is gone.
    pub fn is_registered(&self, address: u64, page_size: u64) -> Result<bool, Stop> {
        match self.continue_(address, page_size, false).stop {
            Some(Stop::NotRegistered) if self.changing() => Err(Stop::Again),
            Some(Stop::NotRegistered) => Ok(false),
            Some(stop @ (Stop::Again | Stop::Gone)) => Err(stop),
            _ => Ok(true),
        }
    }

    /// Reads what is waiting, up to [`EVENTS_PER_READ`] messages, and appends it to `events`. Returns how many came;
    /// 0 when there is nothing (the descriptor must be non-blocking).
    ///
    /// # Errors
    /// Any error of read(2) but EAGAIN and EINTR.
    pub fn read_events(&self, events: &mut Vec<Event>) -> io::Result<usize> {
        let mut buffer = [0u8; MESSAGE * EVENTS_PER_READ];
        // SAFETY: the kernel writes at most `buffer.len()` bytes into `buffer`, which outlives the call.
        let count = unsafe { libc::read(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        if count < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(error),
            };
        }
        let messages = buffer[..count as usize].chunks_exact(MESSAGE);
        let count = messages.len();
        events.extend(messages.map(|message| decode(message.try_into().expect("chunks are of this size"))));
        Ok(count)
    }

    /// Makes reads return at once when nothing is waiting. The flag belongs to the open file description.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub fn set_nonblocking(&self) -> io::Result<()> {
        // SAFETY: F_GETFL and F_SETFL take and return plain integers.
        let flags = unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        if unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn fill_range(&self, request: u32, start: u64, len: u64, wake: bool) -> Fill {
        let mut arg = FillArg {
            range: RangeArg { start, len },
            mode: u64::from(!wake),
            done: 0,
        };
        let result = self.call(request, &mut arg);
        fill(result, arg.done, len)
    }

    fn call<T>(&self, request: u32, arg: &mut T) -> io::Result<()> {
        ioctl(self.0.as_fd(), request, arg).map(drop)
    }
}

/// Reads the two answers of a filling call together: the result of the ioctl and the count it leaves in its argument.
/// Some kernels leave the count untouched on EAGAIN, so the count starts as 0 and only a positive one is believed.
fn fill(result: io::Result<()>, done: i64, len: u64) -> Fill {
    let bytes = u64::try_from(done).unwrap_or(0).min(len);
    let stop = match result {
        Ok(()) if bytes == len => None,
        Ok(()) => Some(Stop::Partial),
        Err(_) if bytes > 0 => Some(Stop::Partial),
        Err(error) => Some(Stop::from_errno(error.raw_os_error().unwrap_or(libc::EIO))),
    };
    Fill { bytes, stop }
}

fn ioctl<T>(fd: BorrowedFd<'_>, request: u32, arg: &mut T) -> io::Result<i32> {
    // SAFETY: `request` encodes the size of its argument, which the assertions above tie to the type `T` that every
    // caller passes; the kernel reads and writes no more than that. Memory that an argument points at (the source of
    // UFFDIO_COPY, the vector of PAGEMAP_SCAN) is kept alive and correctly sized by the caller in this file.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::Ioctl::from(request), std::ptr::from_mut(arg)) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn decode(message: &[u8; MESSAGE]) -> Event {
    let word = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().expect("eight bytes"));
    let half = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().expect("four bytes"));
    match message[0] {
        0x12 => Event::Fault {
            flags: FaultFlags(word(8)),
            address: word(16),
            thread: half(24),
        },
        0x13 => {
            // SAFETY: the kernel installed this descriptor for us while it answered the read; nobody else owns it.
            let child = unsafe { OwnedFd::from_raw_fd(half(8) as RawFd) };
            Event::Fork { child }
        }
        0x14 => Event::Remap {
            from: word(8),
            to: word(16),
            len: word(24),
        },
        0x15 => Event::Remove {
            start: word(8),
            end: word(16),
        },
        0x16 => Event::Unmap {
            start: word(8),
            end: word(16),
        },
        other => Event::Other(other),
    }
}

/// A run of pages that PAGEMAP_SCAN found, all of the same categories.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageRegion {
    /// First byte.
    pub start: u64,
    /// Byte after the last.
    pub end: u64,
    /// Categories, as far as they were asked for.
    pub categories: u64,
}

/// What to look for with PAGEMAP_SCAN.
///
/// A page matches when every category of `mask` and, unless empty, at least one of `any_of` holds for it, after the
/// categories in `inverted` were flipped.
///
/// Ask for `WRITTEN` *alone* (as `mask` and `returned`) when dirty pages are tracked: up to at least Linux 6.18 a page that
/// is not populated counts as written, and is protected, only in that case; with any further category it counts as
/// clean, so that pages dropped with madvise would be overlooked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanRequest {
    /// Actions besides looking.
    pub flags: ScanFlags,
    /// Categories that must all hold.
    pub mask: Categories,
    /// Categories of which one must hold.
    pub any_of: Categories,
    /// Categories whose meaning is flipped.
    pub inverted: Categories,
    /// Categories to report.
    pub returned: Categories,
    /// Stop after so many pages; 0 for no limit.
    pub max_pages: u64,
}

/// PAGEMAP_SCAN on an open `/proc/PID/pagemap`: fills `regions` with runs found in `start..end`. Returns how many were
/// filled and the address where the walk ended, from where to go on; it equals `end` when all was walked.
///
/// # Errors
/// ENOTTY before Linux 6.7; EPERM for [`ScanFlags::CHECK_WPASYNC`] on a range without asynchronous write protection.
pub fn pagemap_scan(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    request: &ScanRequest,
    regions: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: request.flags.0,
        start,
        end,
        walk_end: 0,
        vec: if regions.is_empty() {
            0
        } else {
            regions.as_mut_ptr() as u64
        },
        vec_len: regions.len() as u64,
        max_pages: request.max_pages,
        category_inverted: request.inverted.0,
        category_mask: request.mask.0,
        category_anyof_mask: request.any_of.0,
        return_mask: request.returned.0,
    };
    let found = ioctl(pagemap, PAGEMAP_SCAN, &mut arg)? as usize;
    Ok((found.min(regions.len()), arg.walk_end))
}

/// As [`pagemap_scan`], over all of `start..end` however many runs there are, appending them to `found`.
/// `max_pages` of the request is ignored.
///
/// # Errors
/// Those of [`pagemap_scan`]. With [`ScanFlags::WP_MATCHING`] the pages already in `found` were protected again all the
/// same: they must be remembered as dirty.
pub fn pagemap_scan_all(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    request: &ScanRequest,
    found: &mut Vec<PageRegion>,
) -> io::Result<()> {
    let request = ScanRequest {
        max_pages: 0,
        ..*request
    };
    let mut regions = [PageRegion::default(); 512];
    let mut at = start;
    while at < end {
        let (count, walked) = pagemap_scan(pagemap, at, end, &request, &mut regions)?;
        found.extend_from_slice(&regions[..count]);
        if walked <= at {
            return Err(io::Error::other("pagemap scan made no progress"));
        }
        at = walked;
    }
    Ok(())
}

/// An eventfd that tells waiting threads to stop.
#[derive(Debug)]
pub(crate) struct StopSignal(OwnedFd);

impl StopSignal {
    /// A signal that is not raised yet.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: eventfd(2) takes two integers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Raises the signal; it stays raised, so every waiter sees it.
    pub(crate) fn raise(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes from a live buffer, as eventfd wants. It cannot fail but by overflow of the counter, and
        // then the signal is raised anyway.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

/// Waits until the userfaultfd has something to read, the signal is raised or the time is over.
/// Returns (readable, stopped).
pub(crate) fn wait_readable(
    uffd: &Userfault,
    stop: &StopSignal,
    timeout: Option<Duration>,
) -> io::Result<(bool, bool)> {
    let entry = |fd: RawFd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut fds = [entry(uffd.0.as_raw_fd()), entry(stop.0.as_raw_fd())];
    // Rounded up, so that a short wait does not turn into a busy loop.
    let millis = timeout.map_or(-1, |t| {
        t.as_micros().div_ceil(1000).min(i32::MAX as u128) as libc::c_int
    });
    // SAFETY: two valid entries, and the count says two.
    let result = unsafe { libc::poll(fds.as_mut_ptr(), 2, millis) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted {
            Ok((false, false))
        } else {
            Err(error)
        };
    }
    Ok((fds[0].revents != 0, fds[1].revents != 0))
}
/// Lets this thread run before all ordinary ones, as far as the caller's privileges go: a task waits for what it does,
/// which is little. Threads and processes that it makes are ordinary ones.
///
/// A nice value would not do: where autogroups are on, sched(7), it only counts among the threads of one session.
pub fn run_first() {
    let lowest = libc::sched_param { sched_priority: 1 };
    // SAFETY: sched_setscheduler(2) reads the parameter, and sets the policy of this thread.
    let set = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &lowest) };
    if set != 0 {
        tracing::debug!(
            "page faults are answered at ordinary priority: {}",
            io::Error::last_os_error()
        );
    }
}
