//! Signals: actions, alternate stacks, masks, pending ones.

use whimbrel_images::proto::{SaEntry, SiginfoEntry, SignalQueueEntry, TaskCoreEntry, ThreadSasEntry};

use crate::error::Result;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// Signal state of a thread and its process.
pub struct Signals;

const SIGNALS: i32 = 64;
const SS_ONSTACK: i32 = 1;

impl TaskKind for Signals {
    fn name(&self) -> &'static str {
        "signals"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        let stack = program.reserve(24);
        program.call(
            "read the alternate stack",
            libc::SYS_sigaltstack,
            &[0.into(), stack.into()],
        );
        // struct kernel_sigaction: handler, flags, restorer, mask.
        let actions: Vec<_> = (1..=SIGNALS)
            .filter(|&signal| thread.leader && !matches!(signal, libc::SIGKILL | libc::SIGSTOP))
            .map(|signal| {
                let action = program.reserve(32);
                let args = [signal.into(), 0.into(), action.into(), 8.into()];
                program.call("read a signal action", libc::SYS_rt_sigaction, &args);
                action
            })
            .collect();
        let (mask, leader) = (thread.home.mask, thread.leader);
        let own = queue(thread.stopped.pending_signals(false)?);
        let shared = if leader {
            Some(queue(thread.stopped.pending_signals(true)?))
        } else {
            None
        };
        Ok(Box::new(move |outcome, core| {
            let per_thread = core.thread_core.get_or_insert_default();
            per_thread.blk_sigset = Some(mask);
            per_thread.signals_p = Some(own);
            per_thread.sas = Some(ThreadSasEntry {
                ss_sp: outcome.word(stack, 0),
                ss_flags: outcome.int(stack, 8) as u32,
                ss_size: outcome.word(stack, 16),
            });
            if leader {
                let task = core.tc.get_or_insert_default();
                task.blk_sigset = mask;
                task.signals_s = shared;
                task.sigactions = actions
                    .into_iter()
                    .map(|action| SaEntry {
                        sigaction: outcome.word(action, 0),
                        flags: outcome.word(action, 8),
                        restorer: outcome.word(action, 16),
                        mask: outcome.word(action, 24),
                        ..SaEntry::default()
                    })
                    .collect();
            }
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let (thread, leader) = (thread.core, thread.leader);
        let per_thread = thread.thread_core.clone().unwrap_or_default();
        match stage {
            Stage::Process if leader => restore_actions(thread.tc.as_ref(), program),
            Stage::Thread => {
                if let Some(stack) = per_thread.sas {
                    // Being on the stack follows from the stack pointer; it cannot be set.
                    let flags = stack.ss_flags as i32 & !SS_ONSTACK;
                    let words = [stack.ss_sp, u64::from(flags as u32), stack.ss_size];
                    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                    let data = program.data(&bytes);
                    program.call(
                        "set the alternate stack",
                        libc::SYS_sigaltstack,
                        &[data.into(), 0.into()],
                    );
                }
            }
            // All signals are blocked by now, so that they stay pending until the thread runs. SI codes of the kernel
            // and of tgkill are allowed to nobody but the task itself (rt_sigqueueinfo(2)).
            Stage::Final => {
                let pid = program.call("getpid", libc::SYS_getpid, &[]);
                let tid = program.call("gettid", libc::SYS_gettid, &[]);
                for signal in per_thread.signals_p.iter().flat_map(|queue| &queue.signals) {
                    let (number, info) = (signal_number(signal), program.data(&whole_siginfo(signal)));
                    let args = [pid.into(), tid.into(), number.into(), info.into()];
                    program.call("queue a pending signal", libc::SYS_rt_tgsigqueueinfo, &args);
                }
                let shared = thread
                    .tc
                    .as_ref()
                    .filter(|_| leader)
                    .and_then(|tc| tc.signals_s.as_ref());
                for signal in shared.iter().flat_map(|queue| &queue.signals) {
                    let (number, info) = (signal_number(signal), program.data(&whole_siginfo(signal)));
                    let args = [pid.into(), number.into(), info.into()];
                    program.call("queue a pending signal", libc::SYS_rt_sigqueueinfo, &args);
                }
            }
            Stage::Process => {}
        }
        Ok(())
    }
}

fn restore_actions(task: Option<&TaskCoreEntry>, program: &mut Program) {
    let numbers = (1..=SIGNALS).filter(|&signal| !matches!(signal, libc::SIGKILL | libc::SIGSTOP));
    for (signal, action) in numbers.zip(task.iter().flat_map(|task| &task.sigactions)) {
        let words = [action.sigaction, action.flags, action.restorer, action.mask];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let data = program.data(&bytes);
        let args = [signal.into(), data.into(), 0.into(), 8.into()];
        program.call("set a signal action", libc::SYS_rt_sigaction, &args);
    }
}

fn queue(signals: Vec<[u8; 128]>) -> SignalQueueEntry {
    let entry = |siginfo: [u8; 128]| SiginfoEntry {
        siginfo: siginfo.to_vec(),
    };
    SignalQueueEntry {
        signals: signals.into_iter().map(entry).collect(),
    }
}

fn signal_number(entry: &SiginfoEntry) -> i32 {
    entry
        .siginfo
        .get(..4)
        .map_or(0, |bytes| i32::from_le_bytes(bytes.try_into().unwrap_or_default()))
}

fn whole_siginfo(entry: &SiginfoEntry) -> Vec<u8> {
    let mut bytes = entry.siginfo.clone();
    bytes.resize(128, 0);
    bytes
}
