//! Scheduling: policy, priority, nice value.

use whimbrel_images::proto::CoreEntry;

use crate::error::Result;
use crate::remote::Program;
use crate::resource::{Reader, Stage, TaskKind, ThreadView};

/// Scheduling of a thread.
pub struct Schedule;

const SCHED_RESET_ON_FORK: u32 = 0x4000_0000;

impl TaskKind for Schedule {
    fn name(&self) -> &'static str {
        "scheduling"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        let param = program.reserve(8);
        let policy = program.call("read the scheduling policy", libc::SYS_sched_getscheduler, &[0.into()]);
        program.call(
            "read the scheduling priority",
            libc::SYS_sched_getparam,
            &[0.into(), param.into()],
        );
        let nice = thread.stat.nice;
        Ok(Box::new(move |outcome, core| {
            let core = core.thread_core.get_or_insert_default();
            core.sched_policy = Some(outcome.result(policy) as u32);
            core.sched_prio = Some(outcome.int(param, 0) as u32);
            core.sched_nice = Some(nice);
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &CoreEntry, _leader: bool, program: &mut Program) -> Result<()> {
        let Some(core) = thread.thread_core.as_ref().filter(|_| stage == Stage::Thread) else {
            return Ok(());
        };
        if let Some(nice) = core.sched_nice.filter(|&nice| nice != 0) {
            let args = [libc::PRIO_PROCESS.into(), 0.into(), nice.into()];
            program.call("set the nice value", libc::SYS_setpriority, &args);
        }
        let policy = core.sched_policy.unwrap_or(0);
        if policy & !SCHED_RESET_ON_FORK != libc::SCHED_OTHER as u32 || policy & SCHED_RESET_ON_FORK != 0 {
            let param = program.data(&core.sched_prio.unwrap_or(0).to_le_bytes());
            let args = [0.into(), policy.into(), param.into()];
            program.call("set the scheduling policy", libc::SYS_sched_setscheduler, &args);
        }
        Ok(())
    }
}
