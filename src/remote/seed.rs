//! Seeds: tasks that are being put together. They die with the controller.
//!
//! The root of a tree is a tiny static program, executed so that its address space is clean; all that remains of it is
//! the arena. The other tasks are its descendants, forked while it is still empty, at the same arena.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::inject::check;
use super::memory::{RemoteAddr, RemoteMemory};
use super::program::{Outcome, Program};
use super::tracee::{self, Running, StopReason, Stopped, Waited};
use crate::arch;
use crate::error::{Context, Error, Result};
use crate::stub::layout;

/// Room for programs in a seed. Only what is used takes memory.
pub const ARENA_SIZE: u64 = 64 << 20;

/// Where the seed's program lies; anything that the tree itself has there comes after it is gone.
const SEED_ADDRESS: u64 = 0x10000;

/// A thread under construction, stopped between programs.
#[derive(Debug)]
pub struct Puppet {
    tid: i32,
    stopped: Option<Stopped>,
}

/// Tasks and threads that came into being while a program ran.
pub type Newborn = HashMap<i32, Puppet>;

/// The arena, and with it everything that is the same for all tasks of a tree.
#[derive(Clone, Copy, Debug)]
pub struct Arena(pub RemoteAddr);

impl Puppet {
    /// Its id in our pid namespace.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// The thread under ptrace.
    ///
    /// # Errors
    /// When it died in an earlier operation.
    pub fn stopped(&self) -> Result<&Stopped> {
        self.stopped.as_ref().ok_or_else(|| self.lost())
    }

    fn lost(&self) -> Error {
        Error::new("restore")
            .task(self.tid)
            .because("the task died while it was put together")
    }

    /// Starts the root: a child of ours with the pid `wanted` (any when `None`), executing the seed.
    ///
    /// `keep` are descriptors that it has, at the numbers given; no others.
    ///
    /// # Errors
    /// EEXIST when the pid is taken, EPERM without CAP_CHECKPOINT_RESTORE in the pid namespace.
    pub fn spawn(wanted: Option<i32>, keep: &[(BorrowedFd<'_>, i32)]) -> Result<Puppet> {
        Puppet::spawn_as(wanted, keep, false)
    }

    /// As [`Puppet::spawn`]; a `sibling` is a child of our parent instead of ours.
    ///
    /// # Errors
    /// As [`Puppet::spawn`].
    pub fn spawn_as(wanted: Option<i32>, keep: &[(BorrowedFd<'_>, i32)], sibling: bool) -> Result<Puppet> {
        let program = seed_memfd()?;
        let (go, told) = pipe()?;
        let tid = fork_seed(wanted, &program, keep, &told, sibling)?;
        // From here on it must not outlive a failure.
        let seized = tracee::seize(tid, true);
        drop(told);
        let started = seized.and_then(|running| {
            rustix::io::write(&go, b"g")
                .map_err(std::io::Error::from)
                .context("start the seed")?;
            await_exec(running)
        });
        started
            .map(|stopped| Puppet {
                tid,
                stopped: Some(stopped),
            })
            .inspect_err(|_| kill_and_reap(tid))
    }

    /// Gives a fresh root its arena at `arena`, and takes everything else but the vdso out of its address space.
    ///
    /// # Errors
    /// When the memory cannot be mapped.
    pub fn clear(&mut self, arena: Arena) -> Result<()> {
        let stopped = self.stopped.take().ok_or_else(|| self.lost())?;
        let maps = crate::procfs::maps::parse(&crate::procfs::read(self.tid, "maps")?)?;
        let home = stopped.registers()?;
        let prot = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE) as u64;
        let args = [arena.0.0, ARENA_SIZE, prot, flags, u64::MAX, 0];
        stopped.set_registers(&home.at_syscall(home.ip(), 0, libc::SYS_mmap as u64, args))?;
        let stopped = self.await_trap(stopped.resume()?, &mut Newborn::new())?;
        let mapped = stopped.registers()?.result();
        if mapped != arena.0.0 as i64 {
            return Err(Error::new("map the arena")
                .task(self.tid)
                .because(std::io::Error::from_raw_os_error(-mapped as i32)));
        }
        RemoteMemory::new(self.tid).write(arena.0 + layout::TEXT, arch::stub_text())?;
        self.stopped = Some(stopped);

        let mut program = Program::new();
        for mapping in maps.iter().filter(|m| !m.name.starts_with(b"[v")) {
            let what = format!("unmap {}", String::from_utf8_lossy(&mapping.name));
            program.call(what, libc::SYS_munmap, &[mapping.start.into(), mapping.len().into()]);
        }
        self.run(arena, &program).map(drop)
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// When a call has an unexpected result (named by the program), or the task died.
    pub fn run(&mut self, arena: Arena, program: &Program) -> Result<Outcome> {
        self.run_with_children(arena, program, &mut Newborn::new())
    }

    /// As [`Puppet::run`]; tasks and threads that the program creates are added to `newborn`, stopped before they run.
    ///
    /// # Errors
    /// As [`Puppet::run`].
    pub fn run_with_children(&mut self, arena: Arena, program: &Program, newborn: &mut Newborn) -> Result<Outcome> {
        let base = arena.0 + layout::PROGRAM;
        if program.size() as u64 > ARENA_SIZE - layout::PROGRAM {
            return Err(Error::new("run a program")
                .task(self.tid)
                .because("it is larger than the arena"));
        }
        let memory = RemoteMemory::new(self.tid);
        let stopped = self.before(arena, program)?;
        let stopped = self.await_trap(stopped.resume()?, newborn)?;
        let position = stopped.registers()?.stub_position();
        self.stopped = Some(stopped);
        let bytes = memory.read_vec(base, program.size())?;
        let stopped_at = position.saturating_sub(base.0) as usize / size_of::<crate::stub::Call>();
        let outcome = program.decode(&bytes, stopped_at);
        for (what, error) in program.told(&outcome) {
            tracing::warn!(task = self.tid, "cannot {what}: {error}");
        }
        check(program, &outcome).map_err(|error| error.task(self.tid))?;
        Ok(outcome)
    }

    fn await_trap(&self, mut running: Running, newborn: &mut Newborn) -> Result<Stopped> {
        loop {
            match running.wait()? {
                Waited::Died(status) => {
                    let how = format!("it ended with status {status:#x}");
                    return Err(Error::new("run a program").task(self.tid).because(how));
                }
                Waited::Stopped(stopped, StopReason::Signal(libc::SIGTRAP)) => return Ok(stopped),
                Waited::Stopped(
                    stopped,
                    StopReason::Event(libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_VFORK),
                ) => {
                    let tid = stopped.event_message()? as i32;
                    let child = await_birth(tid)?;
                    newborn.insert(
                        tid,
                        Puppet {
                            tid,
                            stopped: Some(child),
                        },
                    );
                    running = stopped.resume()?;
                }
                // A fault in our code would be a bug; let it end the task rather than loop.
                Waited::Stopped(
                    stopped,
                    StopReason::Signal(signal @ (libc::SIGSEGV | libc::SIGILL | libc::SIGBUS)),
                ) => {
                    running = stopped.resume_with(signal)?;
                }
                // Signals to a task that is not itself yet (SIGCHLD of a zombie) are not its business.
                Waited::Stopped(stopped, _) => running = stopped.resume()?,
            }
        }
    }

    /// Makes a system call from an instruction outside of the arena, which by then may be the thing that is unmapped.
    ///
    /// # Errors
    /// When the task died.
    pub fn borrowed_call(&mut self, syscall: RemoteAddr, nr: i64, args: [u64; 6]) -> Result<i64> {
        let stopped = self.stopped.take().ok_or_else(|| self.lost())?;
        stopped.set_registers(&stopped.registers()?.at_syscall(syscall.0, 0, nr as u64, args))?;
        let mut running = stopped.resume_to_syscall()?;
        let mut stops = 0;
        loop {
            match running.wait()? {
                Waited::Died(_) => return Err(self.lost()),
                Waited::Stopped(stopped, StopReason::Syscall) => {
                    stops += 1;
                    if stops == 2 {
                        let result = stopped.registers()?.result();
                        self.stopped = Some(stopped);
                        return Ok(result);
                    }
                    running = stopped.resume_to_syscall()?;
                }
                Waited::Stopped(stopped, _) => running = stopped.resume_to_syscall()?,
            }
        }
    }

    /// Lets it run as what it has become.
    ///
    /// # Errors
    /// When it died.
    pub fn release(mut self) -> Result<()> {
        self.stopped.take().ok_or_else(|| self.lost())?.detach(0)
    }

    /// Writes a program into the arena, and stands it right before the first call.
    fn before(&mut self, arena: Arena, program: &Program) -> Result<Stopped> {
        let base = arena.0 + layout::PROGRAM;
        RemoteMemory::new(self.tid).write(base, &program.encode(base.0))?;
        let stopped = self.stopped.take().ok_or_else(|| self.lost())?;
        let entry = arena.0.0 + layout::TEXT + arch::entry_offset();
        let registers = stopped
            .registers()?
            .at_stub(entry, 0, base.0, base.0 + program.end_offset(), false, 0);
        stopped.set_registers(&registers)?;
        Ok(stopped)
    }

    /// Lets it run a last program that ends it, and delivers `signal` if it is to die by one.
    ///
    /// # Errors
    /// When it died before.
    pub fn end(mut self, arena: Arena, program: &Program, signal: Option<i32>) -> Result<()> {
        let stopped = self.before(arena, program)?;
        let mut running = stopped.resume()?;
        loop {
            match running.wait()? {
                Waited::Died(_) => return Ok(()),
                Waited::Stopped(stopped, StopReason::Signal(libc::SIGTRAP)) => {
                    running = stopped.resume_with(signal.unwrap_or(libc::SIGKILL))?;
                }
                Waited::Stopped(stopped, StopReason::Signal(other)) => running = stopped.resume_with(other)?,
                Waited::Stopped(stopped, _) => running = stopped.resume()?,
            }
        }
    }

    /// Lets it run a last program that ends this thread, and waits until it has; other threads of its process go on.
    ///
    /// # Errors
    /// When it died before, or does not end.
    pub fn leave(mut self, arena: Arena, program: &Program) -> Result<()> {
        let stopped = self.before(arena, program)?;
        stopped.set_signal_mask(u64::MAX)?;
        // A leader's end is told to its tracer only with that of the last thread (ptrace(2)): nobody to wait for.
        stopped.detach(0)?;
        for _ in 0..10_000 {
            let stat = crate::procfs::stat::parse(&crate::procfs::read(self.tid, "stat")?)?;
            if matches!(stat.state, b'Z' | b'X') {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
        Err(Error::new("end a thread").task(self.tid).because("it does not end"))
    }

    /// Kills the process that it belongs to.
    pub fn kill(mut self) {
        if let Some(stopped) = self.stopped.take() {
            std::mem::forget(stopped);
        }
        if let Some(pid) = rustix::process::Pid::from_raw(self.tid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let mut running = Running::attached_by_creation(self.tid);
        while let Ok(Waited::Stopped(stopped, _)) = running.wait() {
            match stopped.resume() {
                Ok(next) => running = next,
                Err(_) => running = Running::attached_by_creation(self.tid),
            }
        }
    }
}

fn await_exec(mut running: Running) -> Result<Stopped> {
    loop {
        let tid = running.tid();
        match running.wait()? {
            // Still inside execve(2), whose return would overwrite rax: on to its exit.
            Waited::Stopped(stopped, StopReason::Event(libc::PTRACE_EVENT_EXEC)) => {
                running = stopped.resume_to_syscall()?
            }
            Waited::Stopped(stopped, StopReason::Syscall) => return Ok(stopped),
            Waited::Stopped(stopped, _) => running = stopped.resume()?,
            Waited::Died(status) => {
                let how = format!("it could not execute the seed (status {status:#x})");
                return Err(Error::new("start the seed").task(tid).because(how));
            }
        }
    }
}

fn await_birth(tid: i32) -> Result<Stopped> {
    match Running::attached_by_creation(tid).wait()? {
        Waited::Stopped(stopped, _) => Ok(stopped),
        Waited::Died(_) => Err(Error::new("create a task").task(tid).because("it died at birth")),
    }
}

fn kill_and_reap(pid: i32) {
    // SAFETY: no pointers but to a local.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        let mut status = 0;
        libc::waitpid(pid, &mut status, libc::__WALL);
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(std::io::Error::from)
        .context("make a pipe")?;
    Ok((writer, reader))
}

/// The seed as an executable: a static ELF file of one page, whose code is `syscall; int3`.
fn seed_memfd() -> Result<OwnedFd> {
    let mut elf = vec![0u8; 0x80];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes()); // ET_EXEC
    put(18, &62u16.to_le_bytes()); // EM_X86_64
    put(20, &1u32.to_le_bytes());
    put(24, &(SEED_ADDRESS + 0x78).to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes()); // PT_LOAD, readable and executable
    put(68, &5u32.to_le_bytes());
    put(80, &SEED_ADDRESS.to_le_bytes());
    put(88, &SEED_ADDRESS.to_le_bytes());
    put(96, &0x80u64.to_le_bytes());
    put(104, &0x80u64.to_le_bytes());
    put(112, &0x1000u64.to_le_bytes());
    put(0x78, &[0x0f, 0x05, 0xcc]);
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("whimbrel-seed", flags)
        .map_err(std::io::Error::from)
        .context("make the seed")?;
    rustix::io::write(&file, &elf)
        .map_err(std::io::Error::from)
        .context("write the seed")?;
    Ok(file)
}

/// Forks a child that waits for a byte on `told` and then executes `program`.
fn fork_seed(
    wanted: Option<i32>,
    program: &OwnedFd,
    keep: &[(BorrowedFd<'_>, i32)],
    told: &OwnedFd,
    sibling: bool,
) -> Result<i32> {
    #[repr(C)]
    #[derive(Default)]
    struct CloneArgs {
        words: [u64; 8],
        set_tid: u64,
        set_tid_size: u64,
        cgroup: u64,
    }
    let tid = wanted.unwrap_or(0);
    let mut args = CloneArgs::default();
    if sibling {
        // The exit signal is then that of the caller, and must not be given: clone3(2).
        args.words[0] = libc::CLONE_PARENT as u64;
    } else {
        args.words[4] = libc::SIGCHLD as u64;
    }
    if wanted.is_some() {
        (args.set_tid, args.set_tid_size) = (std::ptr::from_ref(&tid) as u64, 1);
    }
    let descriptors: Vec<(i32, i32)> = keep.iter().map(|(fd, number)| (fd.as_raw_fd(), *number)).collect();
    // SAFETY: `args` is a struct clone_args of the size given. The child has a copy of this address space and one
    // thread: it only makes system calls, takes no lock and allocates nothing, and ends in execveat or _exit.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) } as i32;
    if pid == 0 {
        run_child(program.as_raw_fd(), told.as_raw_fd(), &descriptors);
    }
    if pid < 0 {
        let error = std::io::Error::last_os_error();
        let mut failure = Error::new("create the root task").object(format!("pid {tid}"));
        failure = match error.raw_os_error() {
            Some(libc::EEXIST) => failure.hint(format!(
                "pid {tid} is in use here: end that process, or restore in a new pid namespace"
            )),
            Some(libc::EPERM) => failure.hint("choosing a pid needs root, or CAP_CHECKPOINT_RESTORE"),
            _ => failure,
        };
        return Err(failure.because(error));
    }
    Ok(pid)
}

fn run_child(program: i32, told: i32, keep: &[(i32, i32)]) -> ! {
    const EMPTY: &CStr = c"";
    // SAFETY: plain system calls on descriptors and constants of this process, see `fork_seed`.
    unsafe {
        let mut byte = 0u8;
        while libc::read(told, (&raw mut byte).cast(), 1) < 0 && *libc::__errno_location() == libc::EINTR {}
        if byte != b'g' {
            libc::_exit(1);
        }
        for &(fd, number) in keep {
            if libc::dup2(fd, number) < 0 {
                libc::_exit(2);
            }
        }
        let empty: [*const libc::c_char; 1] = [std::ptr::null()];
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut mask);
        libc::sigprocmask(libc::SIG_SETMASK, &mask, std::ptr::null_mut());
        libc::syscall(
            libc::SYS_execveat,
            program,
            EMPTY.as_ptr(),
            empty.as_ptr(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        libc::_exit(3)
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        if let Some(stopped) = self.stopped.take() {
            std::mem::forget(stopped);
            Puppet {
                tid: self.tid,
                stopped: None,
            }
            .kill();
        }
    }
}

/// A socket pair on which the controller hands descriptors to seeds, with messages kept apart.
///
/// # Errors
/// When there are no descriptors left.
pub fn descriptor_channel() -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0i32; 2];
    // SAFETY: `fds` has room for two descriptors.
    let made = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    };
    if made < 0 {
        return Err(Error::os("make the descriptor channel"));
    }
    // SAFETY: both were just made and belong to nobody else.
    unsafe { Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))) }
}
