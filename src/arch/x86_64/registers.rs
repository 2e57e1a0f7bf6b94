//! General registers and the extended (floating point and vector) state of a stopped thread.

/// `-ERESTARTSYS` and its kin: results that only the kernel and a tracer see (include/linux/errno.h).
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// The general registers, as `NT_PRSTATUS` shows them.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Registers(pub libc::user_regs_struct);

impl Registers {
    /// A thread with these registers runs at `ip` with `args` in the registers of a system call `nr`.
    /// `orig_rax` is -1, so that the kernel sees no interrupted system call to restart.
    pub fn at_syscall(mut self, ip: u64, sp: u64, nr: u64, args: [u64; 6]) -> Self {
        let r = &mut self.0;
        (r.rip, r.rsp, r.rax, r.orig_rax) = (ip, sp, nr, u64::MAX);
        [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9] = args;
        // Direction and trap flags of the victim must not reach our code.
        r.eflags = 0x202;
        self
    }

    /// A thread with these registers runs the stub: see `stub_text` for the meaning.
    /// The stub needs no stack, but a signal might: between our death and the first instruction, for example.
    pub fn at_stub(mut self, entry: u64, stack: u64, first_call: u64, end: u64, waiting: bool, context: u64) -> Self {
        let r = &mut self.0;
        (r.rip, r.rsp, r.orig_rax, r.eflags) = (entry, stack, u64::MAX, 0x202);
        (r.rbx, r.rbp, r.r14, r.r15) = (first_call, end, waiting as u64, context);
        self
    }

    /// Where a stub that has reported stands: the address of the call it stopped at, or the end.
    pub fn stub_position(&self) -> u64 {
        self.0.rbx
    }

    /// Address of the next instruction.
    pub fn ip(&self) -> u64 {
        self.0.rip
    }

    /// The stack pointer.
    pub fn sp(&self) -> u64 {
        self.0.rsp
    }

    /// Result of a system call that has just ended.
    pub fn result(&self) -> i64 {
        self.0.rax as i64
    }

    /// The system call that was interrupted and is to be restarted by the kernel, if any: its number.
    pub fn interrupted_syscall(&self) -> Option<u64> {
        let restart = matches!(
            self.result(),
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND | ERESTART_RESTARTBLOCK
        );
        ((self.0.orig_rax as i64) >= 0 && restart).then_some(self.0.orig_rax)
    }

    /// The same thread with an interrupted system call turned into one that starts again from its beginning.
    ///
    /// For a thread whose kernel-side restart block is lost (restored elsewhere, or healed through a signal frame),
    /// `restart_syscall(2)` would give EINTR; starting again with the original arguments is what the program expects.
    pub fn restarted(mut self) -> Self {
        if let Some(nr) = self.interrupted_syscall() {
            self.0.rax = nr;
            self.0.rip -= 2;
            self.0.orig_rax = u64::MAX;
        }
        self
    }

    /// Continues at another address.
    pub fn set_ip(&mut self, ip: u64) {
        self.0.rip = ip;
    }

    /// Takes the number of an interrupted system call from the code before it, `mov $nr,%eax; syscall`.
    /// Where the code is something else, the call ends with EINTR.
    pub fn with_syscall_from(mut self, code: &[u8]) -> Self {
        match code {
            [0xb8, a, b, c, d, 0x0f, 0x05] => self.0.orig_rax = u64::from(u32::from_le_bytes([*a, *b, *c, *d])),
            _ => (self.0.rax, self.0.orig_rax) = (-(libc::EINTR as i64) as u64, u64::MAX),
        }
        self
    }

    /// What a thread that was stopped by us and by nothing else goes on with.
    ///
    /// Some waits end with EINTR when a thread is stopped although no signal came (signal(7), "Interruption of system
    /// calls by stop signals"): these are started again, so that the program does not notice.
    pub fn undisturbed(mut self) -> Self {
        let interrupted = self.result() == -i64::from(libc::EINTR);
        let waits = [
            libc::SYS_epoll_wait,
            libc::SYS_epoll_pwait,
            libc::SYS_epoll_pwait2,
            libc::SYS_semop,
            libc::SYS_semtimedop,
        ];
        if interrupted && waits.contains(&(self.0.orig_rax as i64)) {
            self.0.rax = self.0.orig_rax;
            self.0.rip -= 2;
            self.0.orig_rax = u64::MAX;
        }
        self
    }

    /// Registers for a thread in another kernel object. An interrupted system call starts again; with a signal pending that
    /// decision is the kernel's, which knows the handler's flags, as far as it can be (its restart block is not there).
    pub fn for_restore(self, signal_pending: bool) -> Self {
        if signal_pending && self.result() != ERESTART_RESTARTBLOCK {
            self
        } else {
            self.restarted()
        }
    }
}

/// The extended state as `NT_X86_XSTATE` shows it: the uncompacted XSAVE area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XState(pub Vec<u8>);

impl XState {
    /// The state components that the kernel saves (XCR0), stored by the kernel in the software-reserved bytes.
    pub fn features(&self) -> u64 {
        self.0.get(464..472).map_or(3, |bytes| {
            u64::from_le_bytes(bytes.try_into().unwrap_or([3, 0, 0, 0, 0, 0, 0, 0]))
        })
    }
}
