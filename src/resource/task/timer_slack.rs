//! How late a thread's timers may be, `PR_SET_TIMERSLACK`.

use crate::error::Result;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// How late a thread's timers may be.
pub struct TimerSlack;

impl TaskKind for TimerSlack {
    fn name(&self) -> &'static str {
        "timer slack"
    }

    fn dump<'a>(&self, _thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        let slack = program.call(
            "read the timer slack",
            libc::SYS_prctl,
            &[libc::PR_GET_TIMERSLACK.into()],
        );
        Ok(Box::new(move |outcome, core| {
            core.thread_core.get_or_insert_default().timer_slack = Some(outcome.result(slack) as u64);
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let core = thread.core.thread_core.as_ref().filter(|_| stage == Stage::Thread);
        // "If the calling thread is scheduled under a real-time scheduling policy, the timer slack is 0", which set here
        // would mean the default: the policy, restored later, brings it (PR_SET_TIMERSLACK(2const)).
        if let Some(slack) = core.and_then(|core| core.timer_slack).filter(|&slack| slack != 0) {
            let args = [libc::PR_SET_TIMERSLACK.into(), slack.into()];
            program.call("set the timer slack", libc::SYS_prctl, &args);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::task::testing::Subject;

    #[test]
    fn a_timer_slack_is_carried() {
        let (mut one, mut other) = (Subject::new(), Subject::new());
        one.call(libc::SYS_prctl, &[libc::PR_SET_TIMERSLACK.into(), 123_456.into()]);
        let core = one.dump(&TimerSlack);
        other.restore(&TimerSlack, &core);
        assert_eq!(other.call(libc::SYS_prctl, &[libc::PR_GET_TIMERSLACK.into()]), 123_456);
    }
}
