//! Threads under ptrace, with their state in the type: what needs a stopped thread takes one.

use std::io;
use std::time::{Duration, Instant};

use crate::arch::{Registers, XState};
use crate::error::{Context, Error, Result};

const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_EVENT_STOP: i32 = 128;
const PTRACE_O_SUSPEND_SECCOMP: i32 = 1 << 21;
const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;

/// Why a thread stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// `PTRACE_INTERRUPT`, or the initial stop of an attached child.
    Interrupt,
    /// A group stop by this signal.
    Group(i32),
    /// A signal that is about to be delivered.
    Signal(i32),
    /// Entry to or exit from a system call.
    Syscall,
    /// A `PTRACE_EVENT_…` (fork, clone, exec, exit).
    Event(i32),
}

/// What waiting for a thread gave.
#[derive(Debug)]
pub enum Waited {
    /// It stopped.
    Stopped(Stopped, StopReason),
    /// It is gone: the status of wait(2).
    Died(i32),
}

/// A thread that is traced and runs.
#[derive(Debug)]
pub struct Running {
    tid: i32,
}

/// A thread that is traced and stopped. Dropping it lets it go: detached, with the registers it has.
#[derive(Debug)]
pub struct Stopped {
    tid: i32,
    /// Passed on when the thread is resumed or detached.
    signal: i32,
    armed: bool,
}

/// Attaches to a thread without stopping it.
///
/// With `exit_kill` it dies with the tracer (a half-made tree); otherwise it outlives the tracer.
///
/// # Errors
/// ESRCH when it is gone, EPERM when it is a kernel thread, already traced, or out of our reach.
pub fn seize(tid: i32, exit_kill: bool) -> Result<Running> {
    let options = options(exit_kill);
    // Only with CAP_SYS_ADMIN, and only if we are under no seccomp ourselves; see `Stopped::suspend_seccomp`.
    let suspending = options | PTRACE_O_SUSPEND_SECCOMP;
    let mut result = request(libc::PTRACE_SEIZE, tid, 0, suspending as usize);
    if matches!(&result, Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EINVAL))) {
        result = request(libc::PTRACE_SEIZE, tid, 0, options as usize);
    }
    match result {
        Ok(_) => Ok(Running { tid }),
        Err(error) => {
            let mut failure = Error::new("seize").task(tid);
            if error.raw_os_error() == Some(libc::EPERM) {
                failure = failure.hint(match tracer_of(tid) {
                    Some(tracer) => format!("process {tracer} traces it already: detach that debugger first"),
                    None => "run as root, or as the owner of the process with CAP_SYS_PTRACE".into(),
                });
            }
            Err(failure.because(error))
        }
    }
}

fn options(exit_kill: bool) -> i32 {
    let more = if exit_kill {
        libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEEXEC
    } else {
        0
    };
    libc::PTRACE_O_TRACESYSGOOD | more
}

fn tracer_of(tid: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?;
    line.trim().parse().ok().filter(|&pid| pid != 0)
}

impl Running {
    /// A thread that is attached because its traced creator made it: it stops by itself before it runs.
    pub fn attached_by_creation(tid: i32) -> Self {
        Running { tid }
    }

    /// Its id in our pid namespace.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Asks it to stop; [`Running::wait`] tells when it has.
    ///
    /// # Errors
    /// ESRCH when it is gone.
    pub fn interrupt(&self) -> Result<()> {
        request(libc::PTRACE_INTERRUPT, self.tid, 0, 0)
            .map(drop)
            .with(|| Error::new("interrupt").task(self.tid))
    }

    /// Waits until it stops or dies.
    ///
    /// # Errors
    /// When it is not our tracee.
    pub fn wait(self) -> Result<Waited> {
        loop {
            match self.poll_wait(0)? {
                Some(waited) => return Ok(waited),
                None => continue,
            }
        }
    }

    /// Looks whether it has stopped or died, without waiting.
    ///
    /// # Errors
    /// When it is not our tracee.
    pub fn try_wait(self) -> Result<Result<Waited, Running>> {
        Ok(match self.poll_wait(libc::WNOHANG)? {
            Some(waited) => Ok(waited),
            None => Err(self),
        })
    }

    fn poll_wait(&self, flags: i32) -> Result<Option<Waited>> {
        let mut status = 0;
        // SAFETY: `status` is a live i32.
        let waited = unsafe { libc::waitpid(self.tid, &mut status, libc::__WALL | flags) };
        if waited < 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::EINTR) {
                return Ok(None);
            }
            return Err(Error::new("wait for").task(self.tid).because(error));
        }
        if waited == 0 {
            return Ok(None);
        }
        if !libc::WIFSTOPPED(status) {
            return Ok(Some(Waited::Died(status)));
        }
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        let reason = match event {
            PTRACE_EVENT_STOP if signal == libc::SIGTRAP => StopReason::Interrupt,
            PTRACE_EVENT_STOP => StopReason::Group(signal),
            0 if signal == libc::SIGTRAP | 0x80 => StopReason::Syscall,
            0 => StopReason::Signal(signal),
            event => StopReason::Event(event),
        };
        Ok(Some(Waited::Stopped(
            Stopped {
                tid: self.tid,
                signal: 0,
                armed: true,
            },
            reason,
        )))
    }

    /// Stops it: interrupt, wait; signals that are on their way are delivered first, as if we were not there.
    ///
    /// Returns the signal of the group stop that it is in, if it is in one.
    ///
    /// # Errors
    /// When it is gone or not our tracee.
    pub fn stop(self) -> Result<Result<(Stopped, Option<i32>), i32>> {
        self.stop_by(None)
    }

    /// As [`Running::stop`], of a thread that was seen to sleep where no signal wakes it ("D" in proc_pid_stat(5)): it may
    /// do so for ever. A failure leaves it attached, to be let go when this thread of ours ends.
    ///
    /// # Errors
    /// As [`Running::stop`], and when it does not wake within `limit`.
    pub fn stop_within(self, limit: Duration) -> Result<Result<(Stopped, Option<i32>), i32>> {
        self.stop_by(Some(Instant::now() + limit))
    }

    fn wait_by(mut self, deadline: Option<Instant>) -> Result<Waited> {
        let Some(deadline) = deadline else {
            return self.wait();
        };
        loop {
            let tid = self.tid;
            match self.try_wait()? {
                Ok(waited) => return Ok(waited),
                Err(running) if Instant::now() < deadline => self = running,
                Err(_) => {
                    let why = "it sleeps in the kernel, where nothing can stop it: in vfork(2) until its child has executed \
                               a program, or at a device that does not answer";
                    return Err(Error::new("stop").task(tid).hint("try again").because(why));
                }
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn stop_by(mut self, deadline: Option<Instant>) -> Result<Result<(Stopped, Option<i32>), i32>> {
        self.interrupt()?;
        loop {
            match self.wait_by(deadline)? {
                Waited::Died(status) => return Ok(Err(status)),
                Waited::Stopped(stopped, StopReason::Interrupt) => return Ok(Ok((stopped, None))),
                Waited::Stopped(stopped, StopReason::Group(signal)) => return Ok(Ok((stopped, Some(signal)))),
                Waited::Stopped(stopped, StopReason::Signal(signal)) => self = stopped.resume_with(signal)?,
                Waited::Stopped(stopped, _) => self = stopped.resume()?,
            }
        }
    }
}

impl Stopped {
    /// Its id in our pid namespace.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Lets it run.
    ///
    /// # Errors
    /// ESRCH when it was killed.
    pub fn resume(self) -> Result<Running> {
        self.go(libc::PTRACE_CONT, 0)
    }

    /// Lets it run and delivers `signal` first.
    ///
    /// # Errors
    /// ESRCH when it was killed.
    pub fn resume_with(self, signal: i32) -> Result<Running> {
        self.go(libc::PTRACE_CONT, signal)
    }

    /// Lets it run to the next entry to or exit from a system call.
    ///
    /// # Errors
    /// ESRCH when it was killed.
    pub fn resume_to_syscall(self) -> Result<Running> {
        self.go(libc::PTRACE_SYSCALL, 0)
    }

    fn go(mut self, how: u32, signal: i32) -> Result<Running> {
        self.armed = false;
        request(how, self.tid, 0, signal as usize).with(|| Error::new("resume").task(self.tid))?;
        Ok(Running { tid: self.tid })
    }

    /// Lets it go for good; with `signal`, that signal is delivered (SIGSTOP keeps it stopped).
    ///
    /// # Errors
    /// ESRCH when it was killed.
    pub fn detach(mut self, signal: i32) -> Result<()> {
        self.armed = false;
        request(libc::PTRACE_DETACH, self.tid, 0, signal as usize)
            .map(drop)
            .with(|| Error::new("detach").task(self.tid))
    }

    /// General registers.
    ///
    /// # Errors
    /// ESRCH when it was killed.
    pub fn registers(&self) -> Result<Registers> {
        // SAFETY: all-zero bytes are valid registers.
        let mut registers = Registers(unsafe { std::mem::zeroed() });
        let bytes = std::ptr::from_mut(&mut registers.0).cast();
        let mut iov = libc::iovec {
            iov_base: bytes,
            iov_len: size_of::<libc::user_regs_struct>(),
        };
        self.regset(libc::PTRACE_GETREGSET, NT_PRSTATUS, &mut iov)
            .context("read registers")?;
        Ok(registers)
    }

    /// Sets the general registers.
    ///
    /// # Errors
    /// ESRCH when it was killed; EIO for values that the kernel refuses.
    pub fn set_registers(&self, registers: &Registers) -> Result<()> {
        let bytes = std::ptr::from_ref(&registers.0).cast_mut().cast();
        let mut iov = libc::iovec {
            iov_base: bytes,
            iov_len: size_of::<libc::user_regs_struct>(),
        };
        self.regset(libc::PTRACE_SETREGSET, NT_PRSTATUS, &mut iov)
            .context("set registers")
    }

    /// Floating point and vector state.
    ///
    /// # Errors
    /// ESRCH when it was killed.
    pub fn xstate(&self) -> Result<XState> {
        // AVX-512 needs 2.7 KiB, AMX 11 KiB.
        let mut bytes = vec![0u8; 16384];
        let mut iov = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        self.regset(libc::PTRACE_GETREGSET, NT_X86_XSTATE, &mut iov)
            .context("read floating point state")?;
        bytes.truncate(iov.iov_len);
        Ok(XState(bytes))
    }

    /// Sets floating point and vector state.
    ///
    /// # Errors
    /// EINVAL for a state that this processor cannot hold.
    pub fn set_xstate(&self, xstate: &XState) -> Result<()> {
        let mut iov = libc::iovec {
            iov_base: xstate.0.as_ptr() as *mut _,
            iov_len: xstate.0.len(),
        };
        self.regset(libc::PTRACE_SETREGSET, NT_X86_XSTATE, &mut iov)
            .context("set floating point state")
    }

    fn regset(&self, op: u32, set: usize, iov: &mut libc::iovec) -> Result<()> {
        request(op, self.tid, set, std::ptr::from_mut(iov) as usize)
            .map(drop)
            .with(|| Error::new("ptrace").task(self.tid))
    }

    /// The blocked signals.
    ///
    /// # Errors
    /// ESRCH when it was killed.
    pub fn signal_mask(&self) -> Result<u64> {
        let mut mask = 0u64;
        request(PTRACE_GETSIGMASK, self.tid, 8, std::ptr::from_mut(&mut mask) as usize)
            .with(|| Error::new("read signal mask").task(self.tid))?;
        Ok(mask)
    }

    /// Sets the blocked signals.
    ///
    /// # Errors
    /// ESRCH when it was killed.
    pub fn set_signal_mask(&self, mask: u64) -> Result<()> {
        request(PTRACE_SETSIGMASK, self.tid, 8, std::ptr::from_ref(&mask) as usize)
            .map(drop)
            .with(|| Error::new("set signal mask").task(self.tid))
    }

    /// The message of the event it stopped for (the new task's id, for fork and clone).
    ///
    /// # Errors
    /// ESRCH when it was killed.
    pub fn event_message(&self) -> Result<u64> {
        let mut message = 0u64;
        request(
            libc::PTRACE_GETEVENTMSG,
            self.tid,
            0,
            std::ptr::from_mut(&mut message) as usize,
        )
        .with(|| Error::new("read event").task(self.tid))?;
        Ok(message)
    }

    /// The restartable-sequence area: address, size, signature; `None` when none is registered.
    ///
    /// # Errors
    /// When the kernel cannot tell (before 5.13).
    pub fn rseq(&self) -> Result<Option<(u64, u32, u32)>> {
        // struct ptrace_rseq_configuration: u64 pointer, u32 size, u32 signature, u32 flags, u32 pad.
        let mut config = [0u32; 6];
        request(
            PTRACE_GET_RSEQ_CONFIGURATION,
            self.tid,
            size_of_val(&config),
            config.as_mut_ptr() as usize,
        )
        .with(|| Error::new("read rseq").task(self.tid))?;
        let address = u64::from(config[0]) | u64::from(config[1]) << 32;
        Ok((address != 0).then_some((address, config[2], config[3])))
    }

    /// Does it have its system calls dispatched to itself? Not to be told before Linux 6.4.
    pub fn dispatches_system_calls(&self) -> bool {
        // struct ptrace_sud_config: u64 mode, selector, offset, len.
        let mut config = [0u64; 4];
        let asked = request(
            PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG,
            self.tid,
            size_of_val(&config),
            config.as_mut_ptr() as usize,
        );
        asked.is_ok() && config[0] != 0
    }

    /// Pending signals as raw `siginfo_t`: those of the thread, or with `shared` those of the process.
    ///
    /// # Errors
    /// ESRCH when it was killed.
    pub fn pending_signals(&self, shared: bool) -> Result<Vec<[u8; 128]>> {
        #[repr(C)]
        struct Peek {
            offset: u64,
            flags: u32,
            number: i32,
        }
        let mut signals = Vec::new();
        loop {
            let mut batch = [[0u8; 128]; 32];
            let peek = Peek {
                offset: signals.len() as u64,
                flags: shared as u32,
                number: 32,
            };
            let address = std::ptr::from_ref(&peek) as usize;
            let count = request(PTRACE_PEEKSIGINFO, self.tid, address, batch.as_mut_ptr() as usize)
                .with(|| Error::new("read pending signals").task(self.tid))?;
            signals.extend_from_slice(&batch[..(count as usize).min(32)]);
            if count < 32 {
                return Ok(signals);
            }
        }
    }

    /// Makes sure that its seccomp filters do not apply while we trace it; `exit_kill` as it was attached.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, or when we are under seccomp ourselves.
    pub fn suspend_seccomp(&self, exit_kill: bool) -> Result<()> {
        let options = options(exit_kill) | PTRACE_O_SUSPEND_SECCOMP;
        request(libc::PTRACE_SETOPTIONS, self.tid, 0, options as usize)
            .map(drop)
            .with(|| {
                Error::new("suspend seccomp")
                    .task(self.tid)
                    .hint("run as root (CAP_SYS_ADMIN), and not in a sandbox of seccomp")
            })
    }

    /// Has its seccomp filters apply again while we trace it.
    #[cfg(test)]
    pub fn resume_seccomp(&self) {
        request(libc::PTRACE_SETOPTIONS, self.tid, 0, options(true) as usize).unwrap();
    }

    /// The flags (SECCOMP_FILTER_FLAG_LOG) with which the filter at `index` was installed.
    ///
    /// # Errors
    /// As [`Stopped::seccomp_filter`].
    pub fn seccomp_filter_flags(&self, index: u64) -> Result<u32> {
        // struct seccomp_metadata: offset of the filter, its flags.
        let mut metadata = [index, 0u64];
        let address = metadata.as_mut_ptr() as usize;
        request(PTRACE_SECCOMP_GET_METADATA, self.tid, size_of_val(&metadata), address)
            .with(|| Error::new("read the flags of a seccomp filter").task(self.tid))?;
        Ok(metadata[1] as u32)
    }

    /// The seccomp filter at `index` as raw instructions; `None` past the last one. Contrary to what ptrace(2) says, 0 is the
    /// oldest: the kernel goes back from the newest by all but `index` filters (get_nth_filter in kernel/seccomp.c).
    ///
    /// # Errors
    /// EACCES without CAP_SYS_ADMIN.
    pub fn seccomp_filter(&self, index: u64) -> Result<Option<Vec<u8>>> {
        let failed = || Error::new("read seccomp filter").task(self.tid);
        let length = match request(PTRACE_SECCOMP_GET_FILTER, self.tid, index as usize, 0) {
            Ok(length) => length as usize,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => return Ok(None),
            Err(error) => return Err(failed().because(error)),
        };
        let mut filter = vec![0u8; length * 8];
        request(
            PTRACE_SECCOMP_GET_FILTER,
            self.tid,
            index as usize,
            filter.as_mut_ptr() as usize,
        )
        .with(failed)?;
        Ok(Some(filter))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if self.armed {
            let _ = request(libc::PTRACE_DETACH, self.tid, 0, self.signal as usize);
        }
    }
}

fn request(op: u32, tid: i32, address: usize, data: usize) -> io::Result<i64> {
    // SAFETY: callers pass, for requests that write to our memory, the address of a live object of the size that the
    // request asks for; requests that only touch the tracee are checked by the kernel.
    let result = unsafe { libc::ptrace(op, tid, address, data) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
