//! One function for each feature. They run in a forked child, so they leave everything lying about.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use libc::{c_int, c_long, c_void};
use whimbrel_lazy::ioctl::{
    Categories, CopyMode, Features, MoveMode, PageRegion, RegisterMode, ScanFlags, ScanRequest, Userfault,
    pagemap_scan as scan,
};

use crate::kernel::nft::{Connection, NetworkLock, NftError, Protocol, table_exists};

/// A probe.
pub(super) type Probe = fn() -> Result<(), Why>;

/// The step that failed, and why (0 when it did not do what it should).
#[derive(Debug)]
pub(super) struct Why {
    pub(super) errno: i32,
    pub(super) step: &'static str,
}

const PAGE: usize = 4096;

fn os(step: &'static str) -> impl Fn(io::Error) -> Why {
    move |error| Why {
        errno: error.raw_os_error().unwrap_or(libc::EIO),
        step,
    }
}

/// The result of a system call that returns -1 on failure.
fn check(result: impl Into<i64>, step: &'static str) -> Result<i64, Why> {
    let result = result.into();
    if result == -1 {
        Err(os(step)(io::Error::last_os_error()))
    } else {
        Ok(result)
    }
}

fn ensure(holds: bool, step: &'static str) -> Result<(), Why> {
    if holds { Ok(()) } else { Err(Why { errno: 0, step }) }
}

/// Fresh anonymous memory of so many pages.
fn map(pages: usize) -> Result<*mut u8, Why> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, protection, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(os("map memory")(io::Error::last_os_error()));
    }
    Ok(address.cast())
}

fn poke(address: *mut u8, value: u8) {
    // SAFETY: probes pass addresses within mappings of their own that are writable.
    unsafe { address.write_volatile(value) }
}

fn peek(address: *mut u8) -> u8 {
    // SAFETY: probes pass addresses within mappings of their own that are readable.
    unsafe { address.read_volatile() }
}

/// A grandchild that does `first`, says so, and waits to be killed; killed when dropped.
struct Sleeper(libc::pid_t);

impl Sleeper {
    fn new(first: impl FnOnce() -> bool) -> Result<Self, Why> {
        let (mut ready, mut tell) = std::os::unix::net::UnixStream::pair().map_err(os("make a socket pair"))?;
        // SAFETY: this child has one thread; its own child does `first` and then only sleeps.
        let pid = check(unsafe { libc::fork() }, "fork")? as libc::pid_t;
        if pid == 0 {
            // SAFETY: two integers. The grandchild ends with its parent, should that crash.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let done = first();
            let _ = io::Write::write_all(&mut tell, &[u8::from(done)]);
            loop {
                // SAFETY: takes nothing.
                unsafe { libc::pause() };
            }
        }
        drop(tell);
        let sleeper = Self(pid);
        let mut done = [0];
        io::Read::read_exact(&mut ready, &mut done).map_err(os("prepare a process"))?;
        ensure(done[0] == 1, "prepare a process")?;
        Ok(sleeper)
    }

    fn seize(&self, options: c_long, step: &'static str) -> Result<(), Why> {
        self.ptrace(libc::PTRACE_SEIZE, 0, options as usize, step)?;
        self.ptrace(libc::PTRACE_INTERRUPT, 0, 0, "PTRACE_INTERRUPT")?;
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result.
        let waited = unsafe { libc::waitpid(self.0, &mut status, libc::__WALL) };
        check(waited, "wait for the tracee")?;
        ensure(
            libc::WIFSTOPPED(status) && status >> 16 == libc::PTRACE_EVENT_STOP,
            "tracee does not stop",
        )
    }

    fn ptrace(&self, request: u32, address: usize, data: usize, step: &'static str) -> Result<i64, Why> {
        // SAFETY: the requests used here read or write no more of our memory than `data` points at, which callers size as
        // each request wants it.
        let result = unsafe { libc::ptrace(request as _, self.0, address as *mut c_void, data as *mut c_void) };
        check(result, step)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // SAFETY: our own child, not reaped yet.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

pub(super) fn ptrace_seize() -> Result<(), Why> {
    Sleeper::new(|| true)?.seize(0, "PTRACE_SEIZE")
}

pub(super) fn ptrace_rseq() -> Result<(), Why> {
    const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
    let sleeper = Sleeper::new(|| true)?;
    sleeper.seize(0, "PTRACE_SEIZE")?;
    let mut configuration = [0u64; 3];
    let place = configuration.as_mut_ptr() as usize;
    let size = size_of_val(&configuration);
    let got = sleeper.ptrace(
        PTRACE_GET_RSEQ_CONFIGURATION,
        size,
        place,
        "PTRACE_GET_RSEQ_CONFIGURATION",
    )?;
    ensure(got as usize >= 20, "rseq configuration is too short")
}

fn allow_everything() -> bool {
    let allow = libc::sock_filter {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: 0x7fff_0000,
    };
    let mut filter = [allow];
    let program = libc::sock_fprog {
        len: 1,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: `program` and the filter it points at live through the calls, which copy them.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &program) == 0
    }
}

pub(super) fn seccomp_get_filter() -> Result<(), Why> {
    const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
    let sleeper = Sleeper::new(allow_everything)?;
    sleeper.seize(0, "PTRACE_SEIZE")?;
    // Number 0 is the oldest, so in a sandbox it is not ours; a filter it is all the same. The result is its length.
    let count = sleeper.ptrace(PTRACE_SECCOMP_GET_FILTER, 0, 0, "PTRACE_SECCOMP_GET_FILTER")?;
    ensure(count >= 1, "the filter is empty")
}

pub(super) fn seccomp_suspend() -> Result<(), Why> {
    const PTRACE_O_SUSPEND_SECCOMP: c_long = 1 << 21;
    Sleeper::new(allow_everything)?.seize(PTRACE_O_SUSPEND_SECCOMP, "PTRACE_O_SUSPEND_SECCOMP")
}

pub(super) fn process_vm() -> Result<(), Why> {
    let page = map(1)?;
    poke(page, 1);
    let sleeper = Sleeper::new(|| true)?;
    let mut byte = [7u8];
    let local = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    let remote = libc::iovec {
        iov_base: page.cast(),
        iov_len: 1,
    };
    // SAFETY: both calls move one byte between `byte` and the grandchild's copy of the page.
    unsafe {
        check(
            libc::process_vm_writev(sleeper.0, &local, 1, &remote, 1, 0) as i64,
            "process_vm_writev",
        )?;
        byte[0] = 0;
        check(
            libc::process_vm_readv(sleeper.0, &local, 1, &remote, 1, 0) as i64,
            "process_vm_readv",
        )?;
    }
    // Looked at through a fence: the kernel wrote it behind the compiler's back.
    ensure(
        peek(byte.as_mut_ptr()) == 7 && peek(page) == 1,
        "another byte was read than was written",
    )
}

pub(super) fn kcmp() -> Result<(), Why> {
    const KCMP_FILE: c_int = 0;
    let one = File::open("/dev/null").map_err(os("open /dev/null"))?;
    let same = one.try_clone().map_err(os("dup"))?;
    let other = File::open("/dev/null").map_err(os("open /dev/null"))?;
    let compare = |a: &File, b: &File| {
        // SAFETY: kcmp takes integers only.
        let result = unsafe {
            let me = libc::getpid();
            libc::syscall(libc::SYS_kcmp, me, me, KCMP_FILE, a.as_raw_fd(), b.as_raw_fd())
        };
        check(result, "kcmp")
    };
    ensure(
        compare(&one, &same)? == 0 && compare(&one, &other)? != 0,
        "kcmp tells files apart wrongly",
    )
}

fn pidfd_of(pid: libc::pid_t) -> Result<OwnedFd, Why> {
    // SAFETY: pidfd_open takes integers only.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }, "pidfd_open")?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as c_int) })
}

pub(super) fn pidfd_open() -> Result<(), Why> {
    let sleeper = Sleeper::new(|| true)?;
    let pidfd = pidfd_of(sleeper.0)?;
    // SAFETY: no siginfo is given; signal 0 only checks.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), 0, 0usize, 0) };
    check(sent, "pidfd_send_signal").map(drop)
}

pub(super) fn pidfd_getfd() -> Result<(), Why> {
    let file = memory_file()?;
    let sleeper = Sleeper::new(|| true)?;
    let pidfd = pidfd_of(sleeper.0)?;
    // SAFETY: pidfd_getfd takes integers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), file.as_raw_fd(), 0) };
    let fd = check(fd, "pidfd_getfd")?;
    // SAFETY: a new descriptor that nobody else owns.
    let fetched = unsafe { File::from_raw_fd(fd as c_int) };
    file.write_all_at(b"same", 0).map_err(os("write a memfd"))?;
    let mut bytes = [0; 4];
    fetched
        .read_exact_at(&mut bytes, 0)
        .map_err(os("read the fetched memfd"))?;
    ensure(&bytes == b"same", "another file was fetched")
}

pub(super) fn clone3_set_tid() -> Result<(), Why> {
    for attempt in 0.. {
        // A pid that was just in use is free, and is not given out again before the others.
        let pid = Sleeper::new(|| true)?.0;
        // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
        // set_tid_size, cgroup.
        let mut arguments = [0u64; 11];
        arguments[4] = libc::SIGCHLD as u64;
        arguments[8] = &raw const pid as u64;
        arguments[9] = 1;
        // SAFETY: without CLONE_VM the child is a fork with a memory of its own; it leaves at once. `arguments` and `pid`
        // live through the call.
        let child = unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)) };
        if child == 0 {
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        match check(child, "clone3 with set_tid") {
            Err(why) if why.errno == libc::EEXIST && attempt < 10 => {}
            result => {
                let child = result? as libc::pid_t;
                // SAFETY: waits for our own child.
                unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
                return ensure(child == pid, "clone3 gave another pid");
            }
        }
    }
    unreachable!("the loop ends by returning")
}

pub(super) fn set_mm_map() -> Result<(), Why> {
    const PR_SET_MM_MAP: c_int = 14;
    let stat = std::fs::read_to_string("/proc/self/stat").map_err(os("read /proc/self/stat"))?;
    // Fields are counted from 1, and the name in the second may hold blanks.
    let fields: Vec<u64> = stat.rsplit(')').next().map_or_else(Vec::new, |rest| {
        rest.split_whitespace()
            .map(|field| field.parse().unwrap_or(0))
            .collect()
    });
    ensure(fields.len() >= 49, "read the fields of /proc/self/stat")?;
    let field = |number: usize| fields[number - 3];
    // SAFETY: sbrk(0) only reads the break.
    let heap_end = unsafe { libc::sbrk(0) } as u64;
    // struct prctl_mm_map: start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start, arg_end,
    // env_start, env_end, auxv, then auxv_size and exe_fd in one word: no vector, no file.
    let layout = [
        field(26),
        field(27),
        field(45),
        field(46),
        field(47),
        heap_end,
        field(28),
        field(48),
        field(49),
        field(50),
        field(51),
        0,
        0xFFFF_FFFF << 32,
    ];
    let size = size_of_val(&layout);
    // SAFETY: the kernel reads `size` bytes from `layout`; the values are those in force.
    let result = unsafe { libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP, layout.as_ptr(), size, 0) };
    check(result, "PR_SET_MM_MAP").map(drop)
}

pub(super) fn fixed_noreplace() -> Result<(), Why> {
    let page = map(1)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: either fails or, where the flag is unknown, maps elsewhere: it never replaces the page.
    let again = unsafe { libc::mmap(page.cast(), PAGE, libc::PROT_READ, flags, -1, 0) };
    let errno = io::Error::last_os_error().raw_os_error();
    ensure(
        again == libc::MAP_FAILED && errno == Some(libc::EEXIST),
        "MAP_FIXED_NOREPLACE is not known",
    )
}

fn memory_file() -> Result<File, Why> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string with its zero.
    let fd = check(unsafe { libc::memfd_create(c"probe".as_ptr(), flags) }, "memfd_create")?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd as c_int) })
}

pub(super) fn memfd() -> Result<(), Why> {
    let file = memory_file()?;
    file.set_len(PAGE as u64).map_err(os("size a memfd"))?;
    // SAFETY: fcntl with an integer.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
    check(sealed, "seal a memfd")?;
    ensure(file.set_len(0).is_err(), "a sealed memfd can be cut")
}

pub(super) fn soft_dirty() -> Result<(), Why> {
    let page = map(1)?;
    poke(page, 1);
    std::fs::write("/proc/self/clear_refs", "4").map_err(os("clear soft-dirty bits"))?;
    let pagemap = File::open("/proc/self/pagemap").map_err(os("open pagemap"))?;
    let dirty = || {
        let mut entry = [0; 8];
        pagemap
            .read_exact_at(&mut entry, page as u64 / PAGE as u64 * 8)
            .map_err(os("read pagemap"))?;
        Ok(u64::from_ne_bytes(entry) >> 55 & 1 == 1)
    };
    ensure(!dirty()?, "soft-dirty bits do not go away")?;
    poke(page, 2);
    ensure(dirty()?, "soft-dirty bits are not set by writes")
}

fn regions(page: *mut u8, pages: usize, request: &ScanRequest) -> Result<Vec<PageRegion>, Why> {
    let pagemap = File::open("/proc/self/pagemap").map_err(os("open pagemap"))?;
    let mut regions = [PageRegion::default(); 8];
    let (start, end) = (page as u64, page as u64 + (pages * PAGE) as u64);
    let (count, _) = scan(pagemap.as_fd(), start, end, request, &mut regions).map_err(os("PAGEMAP_SCAN"))?;
    Ok(regions[..count].to_vec())
}

pub(super) fn pagemap_scan() -> Result<(), Why> {
    let memory = map(3)?;
    let second = memory.wrapping_add(PAGE);
    poke(second, 1);
    let request = ScanRequest {
        mask: Categories::PRESENT,
        returned: Categories::PRESENT,
        ..ScanRequest::default()
    };
    let found = regions(memory, 3, &request)?;
    let expected = (second as u64, second as u64 + PAGE as u64);
    ensure(
        found.len() == 1 && (found[0].start, found[0].end) == expected,
        "PAGEMAP_SCAN finds other pages",
    )
}

fn uffd(features: Features) -> Result<Userfault, Why> {
    let uffd = Userfault::new(false).map_err(os("userfaultfd"))?;
    uffd.api(features).map_err(os("UFFDIO_API with these features"))?;
    Ok(uffd)
}

pub(super) fn uffd_wp_async() -> Result<(), Why> {
    let memory = map(4)?;
    poke(memory, 1);
    let uffd = uffd(Features::WP_ASYNC | Features::WP_UNPOPULATED)?;
    uffd.register(memory as u64, 4 * PAGE as u64, RegisterMode::WP)
        .map_err(os("register for write protection"))?;
    let request = ScanRequest {
        flags: ScanFlags::WP_MATCHING | ScanFlags::CHECK_WPASYNC,
        mask: Categories::WRITTEN,
        returned: Categories::WRITTEN,
        ..ScanRequest::default()
    };
    regions(memory, 4, &request)?;
    // One page that was there and one that was not.
    poke(memory, 2);
    poke(memory.wrapping_add(2 * PAGE), 2);
    let found: Vec<u64> = regions(memory, 4, &request)?
        .iter()
        .map(|region| region.start)
        .collect();
    ensure(
        found == [memory as u64, memory as u64 + 2 * PAGE as u64],
        "writes are not found exactly",
    )
}

pub(super) fn uffd_missing() -> Result<(), Why> {
    let memory = map(1)?;
    let uffd = uffd(Features::NONE)?;
    uffd.register(memory as u64, PAGE as u64, RegisterMode::MISSING)
        .map_err(os("register for missing pages"))?;
    let fill = uffd.copy(memory as u64, &[9; PAGE], CopyMode::NONE);
    if let Some(stop) = fill.stop {
        return Err(Why {
            errno: stop.errno(),
            step: "UFFDIO_COPY",
        });
    }
    ensure(peek(memory) == 9, "UFFDIO_COPY fills with other bytes")
}

pub(super) fn uffd_events() -> Result<(), Why> {
    let events = Features::EVENT_FORK | Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
    uffd(events).map(drop)
}

pub(super) fn uffd_move() -> Result<(), Why> {
    let (to, from) = (map(1)?, map(1)?);
    poke(from, 9);
    let uffd = uffd(Features::MOVE)?;
    uffd.register(to as u64, PAGE as u64, RegisterMode::MISSING)
        .map_err(os("register for missing pages"))?;
    let fill = uffd.move_(to as u64, from as u64, PAGE as u64, MoveMode::NONE);
    if let Some(stop) = fill.stop {
        return Err(Why {
            errno: stop.errno(),
            step: "UFFDIO_MOVE",
        });
    }
    ensure(peek(to) == 9 && peek(from) == 0, "UFFDIO_MOVE moves other bytes")
}

fn set_option<T>(fd: &impl AsRawFd, level: c_int, option: c_int, value: T, step: &'static str) -> Result<(), Why> {
    let place = std::ptr::from_ref(&value).cast();
    // SAFETY: the kernel reads the size of `value` from it.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, place, size_of::<T>() as u32) };
    check(result, step).map(drop)
}

fn option<T: Copy>(
    fd: &impl AsRawFd,
    level: c_int,
    option: c_int,
    value: &mut T,
    step: &'static str,
) -> Result<(), Why> {
    let mut len = size_of::<T>() as libc::socklen_t;
    let place = std::ptr::from_mut(value).cast();
    // SAFETY: the kernel writes no more than `len` bytes to `value`; callers pass integers, valid with any bits.
    let result = unsafe { libc::getsockopt(fd.as_raw_fd(), level, option, place, &mut len) };
    check(result, step).map(drop)
}

fn socket(kind: c_int) -> Result<OwnedFd, Why> {
    // SAFETY: socket takes integers only.
    let fd = check(
        unsafe { libc::socket(libc::AF_INET, kind | libc::SOCK_CLOEXEC, 0) },
        "make a socket",
    )?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as c_int) })
}

fn in_repair() -> Result<OwnedFd, Why> {
    let socket = socket(libc::SOCK_STREAM)?;
    set_option(&socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1, "TCP_REPAIR")?;
    Ok(socket)
}

pub(super) fn tcp_repair() -> Result<(), Why> {
    const SEND_QUEUE: c_int = 2;
    let socket = in_repair()?;
    set_option(
        &socket,
        libc::IPPROTO_TCP,
        libc::TCP_REPAIR_QUEUE,
        SEND_QUEUE,
        "TCP_REPAIR_QUEUE",
    )?;
    set_option(
        &socket,
        libc::IPPROTO_TCP,
        libc::TCP_QUEUE_SEQ,
        0x1234_5678u32,
        "TCP_QUEUE_SEQ",
    )?;
    let mut sequence = 0u32;
    option(
        &socket,
        libc::IPPROTO_TCP,
        libc::TCP_QUEUE_SEQ,
        &mut sequence,
        "TCP_QUEUE_SEQ",
    )?;
    ensure(sequence == 0x1234_5678, "TCP_QUEUE_SEQ does not keep its value")
}

pub(super) fn tcp_repair_window() -> Result<(), Why> {
    const TCP_REPAIR_WINDOW: c_int = 29;
    let socket = in_repair()?;
    option(
        &socket,
        libc::IPPROTO_TCP,
        TCP_REPAIR_WINDOW,
        &mut [0u32; 5],
        "TCP_REPAIR_WINDOW",
    )
}

pub(super) fn nft_owner() -> Result<(), Why> {
    let why = |error: NftError| match error {
        NftError::Socket(source) => os("open a netlink socket")(source),
        NftError::Change { source, .. } => os("make an nftables table with an owner")(source),
        NftError::MixedFamilies(_) => Why {
            errno: 0,
            step: "make an nftables table with an owner",
        },
    };
    // SAFETY: moves this short-lived child to a network namespace of its own.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }, "make a network namespace")?;
    let mut lock = NetworkLock::new_in_current_netns().map_err(why)?;
    let (local, remote) = (([127, 0, 0, 1], 1).into(), ([127, 0, 0, 1], 2).into());
    lock.lock(&[Connection {
        protocol: Protocol::Tcp,
        local,
        remote,
    }])
    .map_err(why)?;
    let table = lock.table().to_owned();
    ensure(
        table_exists(&table).map_err(os("look for the table"))?,
        "the table is not there",
    )?;
    drop(lock);
    ensure(
        !table_exists(&table).map_err(os("look for the table"))?,
        "the table outlives its owner",
    )
}

pub(super) fn peek_off() -> Result<(), Why> {
    let (one, two) = std::os::unix::net::UnixStream::pair().map_err(os("make a socket pair"))?;
    set_option(&two, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0, "SO_PEEK_OFF")?;
    io::Write::write_all(&mut &one, b"abcd").map_err(os("write to a socket"))?;
    let mut bytes = [0u8; 4];
    for part in bytes.chunks_mut(2) {
        // SAFETY: the kernel writes at most two bytes to `part`.
        let count = unsafe { libc::recv(two.as_raw_fd(), part.as_mut_ptr().cast(), 2, libc::MSG_PEEK) };
        check(count as i64, "peek")?;
    }
    ensure(&bytes == b"abcd", "SO_PEEK_OFF does not go on")
}

pub(super) fn buf_lock() -> Result<(), Why> {
    const SO_BUF_LOCK: c_int = 72;
    let socket = socket(libc::SOCK_DGRAM)?;
    let mut locks = -1;
    set_option(&socket, libc::SOL_SOCKET, SO_BUF_LOCK, 1, "SO_BUF_LOCK")?;
    option(&socket, libc::SOL_SOCKET, SO_BUF_LOCK, &mut locks, "SO_BUF_LOCK")?;
    ensure(locks == 1, "SO_BUF_LOCK does not keep its value")
}

pub(super) fn timer_ids() -> Result<(), Why> {
    const PR_TIMER_CREATE_RESTORE_IDS: c_int = 77;
    // SAFETY: integers only.
    let set = unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0) };
    check(set, "PR_TIMER_CREATE_RESTORE_IDS")?;
    let mut id: c_int = 12_345;
    // SAFETY: no sigevent is given; the kernel reads and writes `id`, one integer. The C library's timer_create is not
    // used because it hides the id.
    let made = unsafe { libc::syscall(libc::SYS_timer_create, libc::CLOCK_MONOTONIC, 0usize, &mut id) };
    check(made, "timer_create")?;
    ensure(id == 12_345, "timer_create gave another id")
}

pub(super) fn membarrier() -> Result<(), Why> {
    const REGISTER_PRIVATE_EXPEDITED: c_int = 1 << 4;
    const GET_REGISTRATIONS: c_int = 1 << 9;
    let call = |command: c_int, step| {
        // SAFETY: integers only.
        check(unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }, step)
    };
    call(REGISTER_PRIVATE_EXPEDITED, "register for membarrier")?;
    let registered = call(GET_REGISTRATIONS, "MEMBARRIER_CMD_GET_REGISTRATIONS")?;
    ensure(
        registered & i64::from(REGISTER_PRIVATE_EXPEDITED) != 0,
        "the registration is not told",
    )
}

fn monotonic_seconds() -> i64 {
    // SAFETY: all bytes of a timespec may be zero, and the call fills it.
    unsafe {
        let mut now: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now);
        now.tv_sec
    }
}

pub(super) fn time_namespace() -> Result<(), Why> {
    const CLONE_NEWTIME: c_int = 0x80;
    // SAFETY: prepares a time namespace for the children of this short-lived child.
    check(unsafe { libc::unshare(CLONE_NEWTIME) }, "make a time namespace")?;
    std::fs::write("/proc/self/timens_offsets", "monotonic 5000 0").map_err(os("write timens_offsets"))?;
    let before = monotonic_seconds();
    // A process that is only forked keeps a vdso mapping; the kernel exchanges its data page, so it sees the new time.
    Sleeper::new(|| monotonic_seconds() >= before + 4000)
        .map(drop)
        .map_err(|why| Why {
            step: "the clock of a child is not shifted",
            ..why
        })
}

pub(super) fn apparmor() -> Result<(), Why> {
    let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    ensure(enabled.is_ok_and(|text| text.starts_with('Y')), "not enabled")
}

pub(super) fn selinux() -> Result<(), Why> {
    let filesystems = std::fs::read_to_string("/proc/filesystems").map_err(os("read /proc/filesystems"))?;
    ensure(
        filesystems.lines().any(|line| line.ends_with("selinuxfs")),
        "not enabled",
    )
}

fn mounted(kind: &str) -> Result<(), Why> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").map_err(os("read /proc/self/mountinfo"))?;
    // Optional fields end with a lone dash; the type follows.
    let is_kind = |line: &str| {
        line.split_once(" - ")
            .is_some_and(|(_, rest)| rest.split(' ').next() == Some(kind))
    };
    ensure(mounts.lines().any(is_kind), "not mounted")
}

pub(super) fn cgroup_v1() -> Result<(), Why> {
    mounted("cgroup")
}

pub(super) fn cgroup_v2() -> Result<(), Why> {
    mounted("cgroup2")
}
