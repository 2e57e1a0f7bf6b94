//! Whether a thread may read the time-stamp counter, PR_SET_TSC(2const).

use crate::error::Result;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// Whether a thread may read the time-stamp counter.
pub struct TimeStamp;

impl TaskKind for TimeStamp {
    fn name(&self) -> &'static str {
        "time-stamp counter"
    }

    fn dump<'a>(&self, _thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        let mode = program.reserve(8);
        // EINVAL: a processor without.
        let asked = program.try_call(libc::SYS_prctl, &[libc::PR_GET_TSC.into(), mode.into()]);
        Ok(Box::new(move |outcome, core| {
            let mode = outcome.int(mode, 0);
            let set = outcome.result(asked) == 0 && mode != libc::PR_TSC_ENABLE;
            core.thread_core.get_or_insert_default().time_stamp = set.then_some(mode as u32);
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let core = thread.core.thread_core.as_ref().filter(|_| stage == Stage::Thread);
        if let Some(mode) = core.and_then(|core| core.time_stamp) {
            let args = [libc::PR_SET_TSC.into(), mode.into()];
            program.call("forbid the time-stamp counter", libc::SYS_prctl, &args);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::task::testing::Subject;

    #[test]
    fn a_forbidden_time_stamp_counter_stays_forbidden() {
        let (mut one, mut other) = (Subject::new(), Subject::new());
        assert_eq!(one.dump(&TimeStamp).thread_core.unwrap().time_stamp, None);
        let args = [libc::PR_SET_TSC.into(), libc::PR_TSC_SIGSEGV.into()];
        assert_eq!(one.call(libc::SYS_prctl, &args), 0);
        let core = one.dump(&TimeStamp);
        other.restore(&TimeStamp, &core);
        assert_eq!(other.dump(&TimeStamp), core);
        assert_eq!(core.thread_core.unwrap().time_stamp, Some(libc::PR_TSC_SIGSEGV as u32));
    }
}
