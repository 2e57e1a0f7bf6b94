//! The stub in a living process: put in, used, taken out, without the process ever being at our mercy.
//!
//! From the moment a thread's registers differ from what they were until they are back, the thread stands so that it
//! would restore itself if the controller died: first through a chain of signal frames below its stack (see
//! `arch::build_heal_chain`), then, while it waits in the stub, because end of file on its descriptor leads there.
//! Descriptors that the process makes for us are noted in the stub's context, by the program that makes them, so that the
//! stub closes them on its way home.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::memory::{RemoteAddr, RemoteMemory};
use super::program::{Arg, Buffer, Expect, Outcome, Program};
use super::tracee::{Running, StopReason, Stopped, Waited};
use crate::arch::{self, Registers, XState};
use crate::error::{Context, Error, Result};
use crate::procfs::maps::{self, Mapping};
use crate::stub::{StubContext, layout};

/// Bytes of arena that a living process gets.
const ARENA_SIZE: u64 = 512 << 10;

/// How often a thread's first report is looked for without a pause, some 20 µs in all, and how long the pauses are then.
const EAGER_LOOKS: u32 = 20;
const BETWEEN_LOOKS: std::time::Duration = std::time::Duration::from_micros(10);

/// Where in the context the second descriptor is.
const DESCRIPTOR_OF_OURS: u64 = std::mem::offset_of!(StubContext, descriptors) as u64 + 4;

/// Code of the program itself that the first injected call borrows.
#[derive(Clone, Copy, Debug)]
pub struct Gadgets {
    /// A `syscall` that is followed by pops and `ret`.
    pub syscall: RemoteAddr,
    /// Number of words popped before the `ret`.
    pub pops: usize,
    /// `rt_sigreturn` of the C library. Without one (a static program that handles no signal) the thread is not
    /// protected during the few microseconds of the first call, and says so in the log.
    pub restorer: Option<RemoteAddr>,
}

/// Remembers where in a file the restorer is, so that a tree of processes with one C library is searched once.
#[derive(Default)]
pub struct GadgetCache {
    restorers: HashMap<((u32, u32), u64), Option<u64>>,
}

impl Gadgets {
    /// Searches the process's text. Needs no stop; the text of a mapped file does not change.
    ///
    /// # Errors
    /// When no `syscall` instruction can be borrowed.
    pub fn find(pid: i32, maps: &[Mapping], cache: &mut GadgetCache) -> Result<Gadgets> {
        let memory = RemoteMemory::new(pid);
        let executable = |m: &&Mapping| m.prot & libc::PROT_EXEC != 0 && m.prot & libc::PROT_READ != 0;
        let vdso = maps.iter().find(|m| m.is_named("[vdso]"));
        let libraries = || {
            maps.iter()
                .filter(executable)
                .filter(|m| m.inode != 0 && !m.shared && m.len() < 64 << 20)
        };

        let mut found = None;
        for mapping in vdso.into_iter().chain(libraries()) {
            let Ok(text) = memory.read_vec(RemoteAddr(mapping.start), mapping.len() as usize) else {
                continue;
            };
            if let Some((offset, pops)) = arch::find_syscall_return(&text) {
                found = Some((RemoteAddr(mapping.start + offset as u64), pops));
                break;
            }
        }
        let (syscall, pops) = found.ok_or_else(|| {
            Error::new("find a system call instruction")
                .task(pid)
                .because("neither the vdso nor a library has one")
        })?;

        // The C library first: that is where it is.
        let mut candidates: Vec<&Mapping> = libraries().collect();
        candidates.sort_by_key(|m| !m.name.windows(3).any(|w| w == b"lib") as u8 * 2 + !name_is_libc(&m.name) as u8);
        let restorer = candidates.into_iter().find_map(|mapping| {
            let key = (mapping.device, mapping.inode);
            let in_file = *cache
                .restorers
                .entry(key)
                .or_insert_with(|| find_restorer(&memory, mapping).map(|offset| mapping.offset + offset));
            in_file
                .filter(|offset| (mapping.offset..mapping.offset + mapping.len()).contains(offset))
                .map(|offset| RemoteAddr(mapping.start + offset - mapping.offset))
        });
        Ok(Gadgets {
            syscall,
            pops,
            restorer,
        })
    }
}

/// Searches a mapping piece by piece: it is large, and what is looked for mostly lies near its start.
fn find_restorer(memory: &RemoteMemory, mapping: &Mapping) -> Option<u64> {
    const PIECE: u64 = 64 << 10;
    /// More than the instructions are long: they may lie across two pieces.
    const OVERLAP: u64 = 64;
    let starts = (0..mapping.len()).step_by(PIECE as usize);
    starts.into_iter().find_map(|start| {
        let length = (PIECE + OVERLAP).min(mapping.len() - start);
        let text = memory
            .read_vec(RemoteAddr(mapping.start + start), length as usize)
            .ok()?;
        arch::find_restorer(&text).map(|offset| start + offset as u64)
    })
}

fn name_is_libc(path: &[u8]) -> bool {
    let file = path.rsplit(|&byte| byte == b'/').next().unwrap_or(path);
    file.starts_with(b"libc.so") || file.starts_with(b"libc-") || file.starts_with(b"ld-musl")
}

/// A thread as it was found.
#[derive(Clone, Debug)]
pub struct Home {
    /// General registers.
    pub registers: Registers,
    /// Floating point and vector state.
    pub xstate: XState,
    /// Blocked signals.
    pub mask: u64,
    /// Bytes below the stack that the heal chain covers.
    stack: Option<(RemoteAddr, Vec<u8>)>,
}

impl Home {
    /// Reads the state of a stopped thread.
    ///
    /// # Errors
    /// ESRCH when it was killed.
    pub fn of(thread: &Stopped) -> Result<Home> {
        Ok(Home {
            registers: thread.registers()?.undisturbed(),
            xstate: thread.xstate()?,
            mask: thread.signal_mask()?,
            stack: None,
        })
    }
}

/// A thread that is in the stub, or on its way there.
pub struct Visitor {
    tid: i32,
    state: State,
    home: Home,
    slot: usize,
}

enum State {
    /// Stopped, not in the stub yet.
    Outside(Stopped),
    /// Waits in the stub for a program.
    Waiting(Running),
    /// It died, or an operation on it failed half-way.
    Lost,
}

impl Visitor {
    /// The thread as it was found.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// Its id in our pid namespace.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    fn lost(&self) -> Error {
        Error::new("run a program")
            .task(self.tid)
            .because("the task died meanwhile")
    }
}

/// The controller's end of the socket on which the stub waits. Its loss sends the stub home.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// A process with an arena and the stub in it.
pub struct StubProcess {
    pid: i32,
    memory: RemoteMemory,
    gadgets: Gadgets,
    arena: RemoteAddr,
    channel: Option<Channel>,
    remote_descriptor: i32,
}

impl StubProcess {
    /// Puts the stub into the process of `leader`, which becomes its first visitor.
    ///
    /// # Errors
    /// When the process cannot map memory or make a socket pair (limits), or dies meanwhile.
    pub fn inject(leader: Stopped, maps: &[Mapping], gadgets: Gadgets) -> Result<(StubProcess, Visitor)> {
        let pid = leader.tid();
        let memory = RemoteMemory::new(pid);
        let mut ranges: Vec<(u64, u64)> = maps.iter().map(|m| (m.start, m.end)).collect();
        let arena = maps::largest_gap(&mut ranges, ARENA_SIZE)
            .map(RemoteAddr)
            .ok_or_else(|| {
                Error::new("find room for the stub")
                    .task(pid)
                    .because("the address space is full")
            })?;

        let mut stub = StubProcess {
            pid,
            memory,
            gadgets,
            arena,
            channel: None,
            remote_descriptor: -1,
        };
        let mut home = Home::of(&leader)?;
        let chain = stub.protect(&leader, &mut home, maps)?;

        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE;
        let args = [arena.0, ARENA_SIZE, prot as u64, flags as u64, u64::MAX, 0];
        let (leader, mapped) = borrowed_call(leader, &home, &gadgets, chain.stack, libc::SYS_mmap, args)?;
        if mapped != arena.0 as i64 {
            restore_home(&leader, &memory, &home)?;
            return Err(Error::new("map the stub's arena").task(pid).because(os_error(mapped)));
        }

        memory.write(arena + layout::TEXT, arch::stub_text())?;
        memory.write(arena + layout::ACTIVE, &0u64.to_le_bytes())?;
        let mut visitor = Visitor {
            tid: pid,
            state: State::Outside(leader),
            home,
            slot: 0,
        };
        stub.enter_context(&visitor, &chain)?;
        if let Err(error) = stub.open_channel(&mut visitor) {
            let cleanup = stub.remove(visitor);
            return Err(match cleanup {
                Ok(_) => error,
                Err(second) => error.object(format!("and the clean-up failed too: {}", second.chain())),
            });
        }
        Ok((stub, visitor))
    }

    /// Stops a visitor where it waits, so that another can be sent commands. Its next run takes it back into the stub.
    ///
    /// # Errors
    /// When it died.
    pub fn park(&mut self, visitor: &mut Visitor) -> Result<()> {
        let state = std::mem::replace(&mut visitor.state, State::Lost);
        visitor.state = State::Outside(stop_visitor(visitor.tid, state)?);
        Ok(())
    }

    /// Takes another stopped thread of the process as a visitor. One at a time, besides the leader.
    ///
    /// # Errors
    /// When it died.
    pub fn visit(&mut self, thread: Stopped, maps: &[Mapping]) -> Result<Visitor> {
        let tid = thread.tid();
        let mut home = Home::of(&thread)?;
        let chain = self.protect(&thread, &mut home, maps)?;
        let visitor = Visitor {
            tid,
            state: State::Outside(thread),
            home,
            slot: 1,
        };
        self.enter_context(&visitor, &chain)?;
        Ok(visitor)
    }

    /// Runs a program in a visitor.
    ///
    /// # Errors
    /// When a call has an unexpected result (named by the program), or the process died.
    pub fn run(&mut self, visitor: &mut Visitor, program: &Program) -> Result<Outcome> {
        let outcome = self.run_any(visitor, program)?;
        check(program, &outcome).map_err(|error| error.task(visitor.tid))?;
        Ok(outcome)
    }

    fn run_any(&mut self, visitor: &mut Visitor, program: &Program) -> Result<Outcome> {
        let base = self.command(visitor, program)?;
        self.outcome(visitor, program, base)
    }

    /// Starts a program; returns where it lies.
    fn command(&mut self, visitor: &mut Visitor, program: &Program) -> Result<RemoteAddr> {
        let base = self.arena + layout::PROGRAM;
        if program.size() as u64 > ARENA_SIZE - layout::PROGRAM {
            return Err(Error::new("run a program")
                .task(self.pid)
                .because("it is larger than the arena"));
        }
        self.memory.write(base, &program.encode(base.0))?;
        let end = base.0 + program.end_offset();
        visitor.state = match std::mem::replace(&mut visitor.state, State::Lost) {
            State::Outside(thread) => State::Waiting(self.start(thread, &visitor.home, visitor.slot, base.0, end)?),
            State::Waiting(running) => {
                let mut command = [0u8; 16];
                command[..8].copy_from_slice(&base.0.to_le_bytes());
                command[8..].copy_from_slice(&end.to_le_bytes());
                self.send(&command)?;
                State::Waiting(running)
            }
            State::Lost => return Err(visitor.lost()),
        };
        Ok(base)
    }

    /// Waits for the end of a program that was started.
    fn outcome(&mut self, visitor: &mut Visitor, program: &Program, base: RemoteAddr) -> Result<Outcome> {
        let position = self.await_report(visitor)?;
        let bytes = self.memory.read_vec(base, program.size())?;
        let stopped_at = position.saturating_sub(base.0) as usize / size_of::<crate::stub::Call>();
        Ok(program.decode(&bytes, stopped_at))
    }

    /// Sends a visitor that is not the leader home; it stays stopped.
    ///
    /// # Errors
    /// When it died.
    pub fn leave(&mut self, visitor: Visitor) -> Result<Stopped> {
        let thread = stop_visitor(visitor.tid, visitor.state)?;
        restore_home(&thread, &self.memory, &visitor.home)?;
        self.memory.write(self.arena + layout::ACTIVE, &1u64.to_le_bytes())?;
        Ok(thread)
    }

    /// Takes everything of ours out of the process and sends its first visitor home; it stays stopped.
    ///
    /// # Errors
    /// When it died.
    pub fn remove(self, visitor: Visitor) -> Result<Stopped> {
        let Visitor { tid, state, home, .. } = visitor;
        let mut thread = stop_visitor(tid, state)?;
        let stack = home.stack.as_ref().map_or(0, |(address, _)| address.0);
        if self.remote_descriptor >= 0 {
            let args = [self.remote_descriptor as u64, 0, 0, 0, 0, 0];
            (thread, _) = borrowed_call(thread, &home, &self.gadgets, stack, libc::SYS_close, args)?;
        }
        let args = [self.arena.0, ARENA_SIZE, 0, 0, 0, 0];
        let (thread, unmapped) = borrowed_call(thread, &home, &self.gadgets, stack, libc::SYS_munmap, args)?;
        restore_home(&thread, &self.memory, &home)?;
        if unmapped != 0 {
            return Err(Error::new("unmap the stub's arena")
                .task(tid)
                .because(os_error(unmapped)));
        }
        Ok(thread)
    }

    /// Prepares the way back: the heal chain in memory that the thread does not use.
    fn protect(&self, thread: &Stopped, home: &mut Home, maps: &[Mapping]) -> Result<arch::HealChain> {
        // Its filters are not made for our calls.
        if let Err(error) = thread.suspend_seccomp(false) {
            let status = crate::procfs::status::parse(&crate::procfs::read(thread.tid(), "status")?)?;
            if status.seccomp != 0 {
                return Err(error);
            }
        }
        let restorer = self.gadgets.restorer.unwrap_or_default();
        let gadget = (self.gadgets.syscall.0, self.gadgets.pops);
        let chain = arch::build_heal_chain(
            home.registers,
            &home.xstate,
            home.mask,
            gadget,
            restorer.0,
            (self.arena.0, ARENA_SIZE),
        );
        let end = chain.address + chain.bytes.len() as u64;
        let fits = maps
            .iter()
            .any(|m| m.start <= chain.address && m.end >= end && m.prot & libc::PROT_WRITE != 0);
        if self.gadgets.restorer.is_none() || !fits {
            tracing::debug!(
                task = thread.tid(),
                "no room below the stack or no signal restorer: unprotected against our death during the first call"
            );
            return Ok(chain);
        }
        let address = RemoteAddr(chain.address);
        home.stack = Some((address, self.memory.read_vec(address, chain.bytes.len())?));
        self.memory.write(address, &chain.bytes)?;
        Ok(chain)
    }

    fn enter_context(&self, visitor: &Visitor, chain: &arch::HealChain) -> Result<()> {
        let context = StubContext {
            descriptors: [self.remote_descriptor, -1],
            heal_stack: chain.stack,
            restore_only_stack: chain.restore_only_stack,
            popped: 8 * self.gadgets.pops as u64,
            guest: u64::from(visitor.slot != 0),
            active: (self.arena + layout::ACTIVE).0,
            patience: [0, 20_000_000],
            ..StubContext::default()
        };
        self.memory
            .write(self.arena + layout::CONTEXT[visitor.slot], &context.to_bytes())?;
        self.memory
            .write(self.arena + layout::ACTIVE, &(visitor.slot as u64 + 1).to_le_bytes())
    }

    /// Makes a socket pair in the process, takes one end, and leaves the other for the stub.
    ///
    /// Until the controller has its end, waiting is bounded: the process holds both ends, so it would see no end of file.
    fn open_channel(&mut self, visitor: &mut Visitor) -> Result<()> {
        let context = self.arena + layout::CONTEXT[0];
        let patience = libc::timeval { tv_sec: 3, tv_usec: 0 };
        let mut program = Program::new();
        let timeout = program.data(&[patience.tv_sec.to_le_bytes(), patience.tv_usec.to_le_bytes()].concat());
        // The stub reads the descriptors from its context: the kernel writes them there.
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        let made = program.call(
            "make the stub's socket pair",
            libc::SYS_socketpair,
            &[libc::AF_UNIX.into(), kind.into(), 0.into(), context.0.into()],
        );
        program.call(
            "bound the stub's wait",
            libc::SYS_setsockopt,
            &[
                Arg::IntAt(context.0),
                libc::SOL_SOCKET.into(),
                libc::SO_RCVTIMEO.into(),
                timeout.into(),
                16.into(),
            ],
        );

        let base = self.arena + layout::PROGRAM;
        self.memory.write(base, &program.encode(base.0))?;
        let State::Outside(thread) = std::mem::replace(&mut visitor.state, State::Lost) else {
            return Err(visitor.lost());
        };
        let running = self.start(thread, &visitor.home, 0, base.0, base.0 + program.end_offset())?;
        visitor.state = State::Waiting(running);

        // No descriptor to be told on yet: look at the report in memory. On a busy machine the thread waits for its turn,
        // and who yields all the time goes to the end of every queue: after a few looks, sleep in between.
        let mut looks = 0u32;
        let report = loop {
            let bytes = self.memory.read_vec(context + 24, 8)?;
            match u64::from_le_bytes(bytes.try_into().unwrap_or_default()) {
                0 if looks < EAGER_LOOKS => std::hint::spin_loop(),
                0 => std::thread::sleep(BETWEEN_LOOKS),
                position => break position,
            }
            looks += 1;
        };
        let bytes = self.memory.read_vec(base, program.size())?;
        let stopped_at = report.saturating_sub(base.0) as usize / size_of::<crate::stub::Call>();
        let outcome = program.decode(&bytes, stopped_at);
        if outcome.checked(made).is_err() {
            // Without a descriptor the stub goes home by itself at once; stop it before it does is not possible, and
            // not needed: it is unharmed. Report the reason.
            visitor.state = State::Lost;
            check(&program, &outcome)?;
        }
        check(&program, &outcome)?;
        let bytes = self.memory.read_vec(context, 8)?;
        let end = |at: usize| i32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or_default());
        let (theirs, ours) = (end(0), end(4));
        let taken = crate::kernel::sys::take_descriptor(self.pid, ours)
            .with(|| Error::new("take the stub's socket").task(self.pid))?;
        self.channel = Some(Channel(taken));
        self.remote_descriptor = theirs;
        // The report of the first program comes over the socket, too, and maybe only now: left there, it would be taken for
        // that of the next.
        self.await_report(visitor)?;

        let mut program = Program::new();
        let forever = program.data(&[0u8; 16]);
        program.call("close the other end", libc::SYS_close, &[ours.into()]);
        let none = program.data(&(-1i32).to_le_bytes());
        let (there, size) = ((context + DESCRIPTOR_OF_OURS).0, 4);
        let to = program.data(&[there.to_le_bytes(), u64::to_le_bytes(size)].concat());
        let from = program.data(&[[0; 8], u64::to_le_bytes(size)].concat());
        program.store_address(from, 0, none);
        note(&mut program, to, from);
        program.call(
            "wait for ever",
            libc::SYS_setsockopt,
            &[
                theirs.into(),
                libc::SOL_SOCKET.into(),
                libc::SO_RCVTIMEO.into(),
                forever.into(),
                16.into(),
            ],
        );
        self.run(visitor, &program).map(drop)
    }

    /// Has a visitor make a descriptor by one system call, and takes it out of the process. Whenever we die, the process
    /// does not keep it.
    ///
    /// # Errors
    /// When the call fails, or the process dies.
    pub fn make_descriptor(&mut self, visitor: &mut Visitor, what: &str, nr: i64, args: &[Arg]) -> Result<OwnedFd> {
        let context = self.arena + layout::CONTEXT[visitor.slot];
        let noted = |address: u64| [address.to_le_bytes(), u64::to_le_bytes(4)].concat();
        let mut program = Program::new();
        let made = program.call(what, nr, args);
        let to = program.data(&noted((context + DESCRIPTOR_OF_OURS).0));
        let from = program.data(&noted((self.arena + layout::PROGRAM).0 + program.result_offset(made)));
        note(&mut program, to, from);
        let remote = self.run(visitor, &program)?.result(made) as i32;
        let taken = crate::kernel::sys::take_descriptor(self.pid, remote).with(|| {
            Error::new(what.to_owned())
                .task(self.pid)
                .because("its descriptor cannot be taken")
        });

        let mut program = Program::new();
        let none = program.data(&(-1i32).to_le_bytes());
        program.call("close a descriptor of ours", libc::SYS_close, &[remote.into()]);
        let to = program.data(&noted((context + DESCRIPTOR_OF_OURS).0));
        let from = program.data(&noted(0));
        program.store_address(from, 0, none);
        note(&mut program, to, from);
        self.run(visitor, &program)?;
        taken
    }

    fn start(&self, thread: Stopped, home: &Home, slot: usize, first: u64, end: u64) -> Result<Running> {
        let entry = self.arena.0 + layout::TEXT + arch::entry_offset();
        let context = self.arena.0 + layout::CONTEXT[slot];
        let stack = home.stack.as_ref().map_or(0, |(address, _)| address.0);
        thread.set_registers(&home.registers.at_stub(entry, stack, first, end, true, context))?;
        // After the registers, so that whoever has it blocked also finds the way to unblock it.
        thread.set_signal_mask(u64::MAX)?;
        thread.resume()
    }

    fn send(&self, command: &[u8]) -> Result<()> {
        let Some(Channel(socket)) = &self.channel else {
            return Err(Error::new("command the stub").task(self.pid).because("no channel"));
        };
        rustix::net::send(socket, command, rustix::net::SendFlags::NOSIGNAL)
            .map(drop)
            .map_err(std::io::Error::from)
            .with(|| Error::new("command the stub").task(self.pid))
    }

    /// Sends a descriptor to a program that waits for it.
    fn send_descriptor(&self, file: BorrowedFd<'_>) -> Result<()> {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
        let Some(Channel(socket)) = &self.channel else {
            return Err(Error::new("hand over a descriptor")
                .task(self.pid)
                .because("no channel"));
        };
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file];
        control.push(SendAncillaryMessage::ScmRights(&files));
        rustix::net::sendmsg(
            socket,
            &[std::io::IoSlice::new(b"d")],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .map(drop)
        .map_err(std::io::Error::from)
        .with(|| Error::new("hand over a descriptor").task(self.pid))
    }

    fn await_report(&self, visitor: &mut Visitor) -> Result<u64> {
        let Some(Channel(socket)) = &self.channel else {
            return Err(Error::new("await the stub").task(self.pid).because("no channel"));
        };
        loop {
            let mut fds = [rustix::event::PollFd::new(socket, rustix::event::PollFlags::IN)];
            let wait = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 50_000_000,
            };
            let ready = rustix::event::poll(&mut fds, Some(&wait)).unwrap_or(0);
            if ready > 0 {
                let mut report = [0u8; 8];
                match rustix::net::recv(socket, &mut report[..], rustix::net::RecvFlags::empty()) {
                    Ok((8, _)) => return Ok(u64::from_le_bytes(report)),
                    Err(rustix::io::Errno::INTR) => continue,
                    _ => return Err(visitor.lost()),
                }
            }
            // Nothing yet: did it stop for something that is not ours (a group stop), or die?
            let State::Waiting(running) = std::mem::replace(&mut visitor.state, State::Lost) else {
                return Err(visitor.lost());
            };
            visitor.state = State::Waiting(match running.try_wait()? {
                Err(running) => running,
                Ok(Waited::Died(_)) => return Err(visitor.lost()),
                Ok(Waited::Stopped(stopped, _)) => stopped.resume()?,
            });
        }
    }
}

/// Copies a word inside the process: the program itself notes what it did, however early the controller dies. Two vectors
/// of struct iovec, one element each. A process may always read itself (ptrace(2), "Ptrace access mode checking").
fn note(program: &mut Program, to: Buffer, from: Buffer) {
    // A dead leader has no memory, so that the id of the process may lead to none.
    let tid = program.call("get its id", libc::SYS_gettid, &[]);
    let args = [tid.into(), to.into(), 1.into(), from.into(), 1.into(), 0.into()];
    program.call_expecting(
        "note a descriptor",
        Expect::Exactly(4),
        libc::SYS_process_vm_readv,
        &args,
    );
}

/// Closes a descriptor of a process, which is stopped for that moment, if it is `still` the one that is meant.
///
/// # Errors
/// When the process cannot be traced or entered, or has no such descriptor.
pub fn close_descriptor(pid: i32, descriptor: i32, still: &dyn Fn() -> bool) -> Result<()> {
    visit_once(pid, still, |stub, visitor| {
        let mut program = Program::new();
        program.call("close a descriptor", libc::SYS_close, &[descriptor.into()]);
        stub.run(visitor, &program).map(drop)
    })
}

/// Puts `file` at a number of a process, close-on-exec, in the place of what is there; as [`close_descriptor`].
///
/// # Errors
/// As [`close_descriptor`].
pub fn place_descriptor(pid: i32, descriptor: i32, file: BorrowedFd<'_>, still: &dyn Fn() -> bool) -> Result<()> {
    visit_once(pid, still, |stub, visitor| {
        let mut program = Program::new();
        // struct msghdr with one byte to receive and room for a control message with one descriptor.
        let (byte, room) = (program.reserve(8), program.reserve(24));
        let vector = program.data(&[0u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
        program.store_address(vector, 0, byte);
        let header = [0u64, 0, 0, 1, 0, 24, 0].map(u64::to_le_bytes).concat();
        let header = program.data(&header);
        program.store_address(header, 16, vector);
        program.store_address(header, 32, room);
        let args = [
            stub.remote_descriptor.into(),
            header.into(),
            libc::MSG_CMSG_CLOEXEC.into(),
        ];
        program.call_expecting("receive a descriptor", Expect::Exactly(1), libc::SYS_recvmsg, &args);
        let received = Arg::Int(room, 16);
        let to = [received, descriptor.into(), libc::O_CLOEXEC.into()];
        program.call("place a descriptor", libc::SYS_dup3, &to);
        program.call("close a descriptor", libc::SYS_close, &[received]);
        let base = stub.command(visitor, &program)?;
        // Only behind the command: the stub takes what comes first for one.
        stub.send_descriptor(file)?;
        let outcome = stub.outcome(visitor, &program, base)?;
        check(&program, &outcome)
    })
}

/// Stops a process, puts the stub in for some `work`, takes it out, and lets the process go on.
fn visit_once(
    pid: i32,
    still: &dyn Fn() -> bool,
    work: impl FnOnce(&mut StubProcess, &mut Visitor) -> Result<()>,
) -> Result<()> {
    let died = || Error::new("enter a task").task(pid).because("the task died meanwhile");
    let read_maps = || maps::parse(&crate::procfs::read(pid, "maps")?);
    let gadgets = Gadgets::find(pid, &read_maps()?, &mut GadgetCache::default())?;
    let (leader, group_stop) = super::tracee::seize(pid, false)?.stop()?.map_err(|_| died())?;
    // A task that was stopped by a signal stays so: detaching with it keeps the group stop.
    let signal = group_stop.unwrap_or(0);
    if !still() {
        return leader.detach(signal);
    }
    // Between the look and the stop mappings may have come.
    let (mut stub, mut visitor) = StubProcess::inject(leader, &read_maps()?, gadgets)?;
    let result = work(&mut stub, &mut visitor).map_err(|error| error.task(pid));
    stub.remove(visitor)?.detach(signal)?;
    result
}

/// Says which call failed, in the words of the program.
pub(super) fn check(program: &Program, outcome: &Outcome) -> Result<()> {
    let index = outcome.stopped_at();
    if index == program.len() {
        return Ok(());
    }
    let result = outcome.result_at(index);
    Err(Error::new(program.describe(index).to_owned()).because(os_error(result)))
}

fn os_error(result: i64) -> std::io::Error {
    match result {
        -4095..0 => std::io::Error::from_raw_os_error(-result as i32),
        other => std::io::Error::other(format!("unexpected result {other:#x}")),
    }
}

fn restore_home(thread: &Stopped, memory: &RemoteMemory, home: &Home) -> Result<()> {
    // Until the registers are set, our death still leads through the chain, which restores all of it; with them in place
    // the thread no longer needs it. Never the other way round: nobody would unblock its signals.
    thread.set_signal_mask(home.mask)?;
    thread.set_xstate(&home.xstate)?;
    thread.set_registers(&home.registers)?;
    match &home.stack {
        Some((address, bytes)) => memory.write(*address, bytes),
        None => Ok(()),
    }
}

fn stop_visitor(tid: i32, state: State) -> Result<Stopped> {
    let died = || Error::new("stop").task(tid).because("the task died meanwhile");
    match state {
        State::Outside(thread) => Ok(thread),
        State::Waiting(running) => running.stop()?.map(|(thread, _)| thread).map_err(|_| died()),
        State::Lost => match super::tracee::Running::attached_by_creation(tid).stop() {
            Ok(Ok((thread, _))) => Ok(thread),
            _ => Err(died()),
        },
    }
}

/// Makes one system call with an instruction of the task's own; the stack leads to the heal chain, should we die.
fn borrowed_call(
    thread: Stopped,
    home: &Home,
    gadgets: &Gadgets,
    stack: u64,
    nr: i64,
    args: [u64; 6],
) -> Result<(Stopped, i64)> {
    let tid = thread.tid();
    thread.set_registers(&home.registers.at_syscall(gadgets.syscall.0, stack, nr as u64, args))?;
    thread.set_signal_mask(u64::MAX)?;
    let mut running = thread.resume_to_syscall()?;
    let mut stops = 0;
    loop {
        match running.wait()? {
            Waited::Died(_) => return Err(Error::new("make a system call").task(tid).because("the task died")),
            Waited::Stopped(stopped, StopReason::Syscall) => {
                stops += 1;
                if stops == 2 {
                    let result = stopped.registers()?.result();
                    return Ok((stopped, result));
                }
                running = stopped.resume_to_syscall()?;
            }
            Waited::Stopped(stopped, _) => running = stopped.resume_to_syscall()?,
        }
    }
}
