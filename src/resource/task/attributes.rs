//! Small attributes of tasks and threads: names, parent-death signal, subreaper, personality, restartable sequences,
//! robust lists, the address cleared at exit, OOM score, login uid.

use whimbrel_images::proto::RseqEntry;

use crate::error::Result;
use crate::kernel::sys;
use crate::procfs;
use crate::remote::{Arg, Program, RemoteAddr, RemoteMemory};
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// Small attributes.
pub struct Attributes;

const PR_GET_TID_ADDRESS: i32 = 40;

impl TaskKind for Attributes {
    fn name(&self) -> &'static str {
        "attributes"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        let tid_address = program.reserve(8);
        let args = [PR_GET_TID_ADDRESS.into(), tid_address.into()];
        program.call("read the address cleared at exit", libc::SYS_prctl, &args);
        let death = program.reserve(8);
        program.call(
            "read the parent-death signal",
            libc::SYS_prctl,
            &[libc::PR_GET_PDEATHSIG.into(), death.into()],
        );
        let subreaper = program.reserve(8);
        let args = [libc::PR_GET_CHILD_SUBREAPER.into(), subreaper.into()];
        program.call("read the subreaper flag", libc::SYS_prctl, &args);
        let personality = program.call("read the personality", libc::SYS_personality, &[0xffff_ffffu32.into()]);

        let (robust, robust_length) = sys::robust_list(thread.tid).unwrap_or((0, 0));
        let rseq = thread.stopped.rseq().unwrap_or(None);
        let comm = String::from_utf8_lossy(&thread.stat.comm).into_owned();
        let oom = procfs::read(thread.pid, "oom_score_adj")
            .ok()
            .and_then(|text| number(&text));
        let (registers, xstate) = (
            thread.home.registers.with_known_syscall(thread.pid),
            thread.home.xstate.clone(),
        );
        let registers = match rseq {
            Some((area, ..)) => registers.outside_critical_section(thread.pid, area),
            None => registers,
        };
        let (leader, flags) = (thread.leader, thread.stat.flags);
        Ok(Box::new(move |outcome, core| {
            core.mtype = whimbrel_images::proto::core_entry::March::X8664 as i32;
            core.thread_info = Some(crate::arch::to_image(
                &registers,
                &xstate,
                outcome.word(tid_address, 0),
            )?);
            let per_thread = core.thread_core.get_or_insert_default();
            (per_thread.futex_rla, per_thread.futex_rla_len) = (robust, robust_length as u32);
            per_thread.pdeath_sig = Some(outcome.int(death, 0) as u32).filter(|&signal| signal != 0);
            per_thread.comm = Some(comm.clone());
            per_thread.rseq_entry = rseq.map(|(address, size, signature)| RseqEntry {
                rseq_abi_pointer: address,
                rseq_abi_size: size,
                signature,
                rseq_cs_pointer: None,
            });
            if leader {
                let task = core.tc.get_or_insert_default();
                (task.comm, task.flags) = (comm, flags);
                task.personality = outcome.result(personality) as u32;
                task.child_subreaper = Some(outcome.int(subreaper, 0) != 0);
                task.oom_score_adj = oom;
            }
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let (thread, leader) = (thread.core, thread.leader);
        let per_thread = thread.thread_core.clone().unwrap_or_default();
        match stage {
            Stage::Process if leader => {
                let Some(task) = &thread.tc else { return Ok(()) };
                if task.child_subreaper == Some(true) {
                    let args = [libc::PR_SET_CHILD_SUBREAPER.into(), 1.into()];
                    program.call("become a subreaper", libc::SYS_prctl, &args);
                }
                program.call("set the personality", libc::SYS_personality, &[task.personality.into()]);
                if let Some(score) = task.oom_score_adj {
                    super::write_file(program, "/proc/self/oom_score_adj", score.to_string().as_bytes());
                }
            }
            Stage::Thread => {
                let name = per_thread
                    .comm
                    .or_else(|| thread.tc.as_ref().map(|task| task.comm.clone()));
                let name = program.string(name.unwrap_or_default().as_bytes());
                program.call(
                    "set the name",
                    libc::SYS_prctl,
                    &[libc::PR_SET_NAME.into(), name.into()],
                );
                if let Some(info) = &thread.thread_info {
                    let args = [info.clear_tid_addr.into()];
                    program.call("set the address cleared at exit", libc::SYS_set_tid_address, &args);
                }
                if per_thread.futex_rla_len != 0 {
                    let args: [Arg; 2] = [per_thread.futex_rla.into(), per_thread.futex_rla_len.into()];
                    program.call("set the robust list", libc::SYS_set_robust_list, &args);
                }
                if let Some(rseq) = per_thread.rseq_entry.filter(|rseq| rseq.rseq_abi_pointer != 0) {
                    let args = [
                        rseq.rseq_abi_pointer.into(),
                        rseq.rseq_abi_size.into(),
                        0.into(),
                        rseq.signature.into(),
                    ];
                    program.call("register restartable sequences", libc::SYS_rseq, &args);
                }
            }
            Stage::Process | Stage::Final => {}
        }
        Ok(())
    }
}

fn number(text: &[u8]) -> Option<i32> {
    std::str::from_utf8(text).ok()?.trim().parse().ok()
}

impl crate::arch::Registers {
    /// A thread that stands inside a restartable sequence continues at its abort address, as the kernel does when it
    /// moves a thread to another processor (struct rseq_cs in include/uapi/linux/rseq.h).
    fn outside_critical_section(mut self, pid: i32, area: u64) -> Self {
        let memory = RemoteMemory::new(pid);
        let word = |address: u64| -> Option<u64> {
            let bytes = memory.read_vec(RemoteAddr(address), 8).ok()?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        let section = word(area + 8).filter(|&section| section != 0);
        let described = section.and_then(|at| Some((word(at + 8)?, word(at + 16)?, word(at + 24)?)));
        if let Some((start, length, abort)) = described
            && self.ip().wrapping_sub(start) < length
        {
            self.set_ip(abort);
        }
        self
    }

    /// A call that the kernel shows as `restart_syscall(2)` gets its own number back, which stands in the instruction
    /// before the `syscall`; otherwise it could not be started again elsewhere.
    fn with_known_syscall(self, pid: i32) -> Self {
        match self.interrupted_syscall() {
            Some(nr) if nr == libc::SYS_restart_syscall as u64 => {
                let before = self.ip().saturating_sub(7);
                match RemoteMemory::new(pid).read_vec(RemoteAddr(before), 7) {
                    Ok(code) => self.with_syscall_from(&code),
                    Err(_) => self,
                }
            }
            _ => self,
        }
    }
}
