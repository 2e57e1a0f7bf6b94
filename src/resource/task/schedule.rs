//! Scheduling: policy, priority, nice value; of SCHED_DEADLINE its three times.

use crate::error::Result;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// Scheduling of a thread.
pub struct Schedule;

const SCHED_DEADLINE: u32 = 6;
/// Size of struct sched_attr, as of Linux 5.3 (SCHED_ATTR_SIZE_VER1).
const ATTRIBUTES: u32 = 56;

/// Where in struct sched_attr things are.
mod at {
    pub const POLICY: usize = 4;
    pub const FLAGS: usize = 8;
    pub const PRIORITY: usize = 20;
    pub const RUNTIME: usize = 24;
    pub const DEADLINE: usize = 32;
    pub const PERIOD: usize = 40;
}

impl TaskKind for Schedule {
    fn name(&self) -> &'static str {
        "scheduling"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        let attributes = program.reserve(ATTRIBUTES as usize);
        let policy = program.call("read the scheduling policy", libc::SYS_sched_getscheduler, &[0.into()]);
        program.call(
            "read the scheduling attributes",
            libc::SYS_sched_getattr,
            &[0.into(), attributes.into(), ATTRIBUTES.into(), 0.into()],
        );
        let nice = thread.stat.nice;
        Ok(Box::new(move |outcome, core| {
            let core = core.thread_core.get_or_insert_default();
            core.sched_policy = Some(outcome.result(policy) as u32);
            core.sched_prio = Some(outcome.int(attributes, at::PRIORITY) as u32);
            core.sched_nice = Some(nice);
            if outcome.int(attributes, at::POLICY) == SCHED_DEADLINE as i32 {
                let words = [at::FLAGS, at::RUNTIME, at::DEADLINE, at::PERIOD];
                core.sched_deadline = words.map(|word| outcome.word(attributes, word)).to_vec();
            }
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let thread = thread.core;
        let Some(core) = thread.thread_core.as_ref().filter(|_| stage == Stage::Thread) else {
            return Ok(());
        };
        // Set even where it is usual: whoever restores may have others himself, and they are inherited.
        if let Some(nice) = core.sched_nice {
            let args = [libc::PRIO_PROCESS.into(), 0.into(), nice.into()];
            program.call("set the nice value", libc::SYS_setpriority, &args);
        }
        if let [flags, runtime, deadline, period] = core.sched_deadline[..] {
            let mut bytes = [0u8; ATTRIBUTES as usize];
            bytes[..4].copy_from_slice(&ATTRIBUTES.to_le_bytes());
            bytes[at::POLICY..][..4].copy_from_slice(&SCHED_DEADLINE.to_le_bytes());
            let words = [
                (at::FLAGS, flags),
                (at::RUNTIME, runtime),
                (at::DEADLINE, deadline),
                (at::PERIOD, period),
            ];
            for (at, word) in words {
                bytes[at..][..8].copy_from_slice(&word.to_le_bytes());
            }
            let attributes = program.data(&bytes);
            let args = [0.into(), attributes.into(), 0.into()];
            program.call("schedule by deadlines", libc::SYS_sched_setattr, &args);
            return Ok(());
        }
        if let Some(policy) = core.sched_policy {
            let param = program.data(&core.sched_prio.unwrap_or(0).to_le_bytes());
            let args = [0.into(), policy.into(), param.into()];
            program.call("set the scheduling policy", libc::SYS_sched_setscheduler, &args);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::task::testing::Subject;

    const SCHED_RESET_ON_FORK: u32 = 0x4000_0000;

    fn attributes(subject: &mut Subject) -> (u32, i32, Vec<u64>) {
        let core = subject.dump(&Schedule).thread_core.unwrap();
        (core.sched_policy(), core.sched_nice(), core.sched_deadline)
    }

    #[test]
    fn deadlines_are_carried() {
        let (mut one, mut other) = (Subject::new(), Subject::new());
        one.call(libc::SYS_setpriority, &[libc::PRIO_PROCESS.into(), 0.into(), 0.into()]);
        let mut core = one.dump(&Schedule);
        assert!(core.thread_core.as_ref().unwrap().sched_deadline.is_empty());
        // Not inherited by children, and times in nanoseconds.
        let times = vec![1, 1_000_000, 20_000_000, 50_000_000];
        core.thread_core.as_mut().unwrap().sched_deadline = times.clone();
        one.restore(&Schedule, &core);
        let core = one.dump(&Schedule);
        let wanted = (SCHED_DEADLINE | SCHED_RESET_ON_FORK, 0, times);
        assert_eq!(attributes(&mut one), wanted);
        other.restore(&Schedule, &core);
        assert_eq!(attributes(&mut other), wanted);
    }

    #[test]
    fn nice_values_and_priorities_are_carried() {
        let (mut one, mut other) = (Subject::new(), Subject::new());
        one.call(libc::SYS_setpriority, &[libc::PRIO_PROCESS.into(), 0.into(), 7.into()]);
        let core = one.dump(&Schedule);
        other.restore(&Schedule, &core);
        assert_eq!(attributes(&mut other), (libc::SCHED_OTHER as u32, 7, Vec::new()));
        let mut core = one.dump(&Schedule);
        let thread = core.thread_core.as_mut().unwrap();
        (thread.sched_policy, thread.sched_prio) = (Some(libc::SCHED_BATCH as u32), Some(0));
        other.restore(&Schedule, &core);
        assert_eq!(attributes(&mut other), (libc::SCHED_BATCH as u32, 7, Vec::new()));
    }
}
