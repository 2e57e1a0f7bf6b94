//! What happens to a thread whose memory is found broken, PR_MCE_KILL(2const).

use crate::error::Result;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// What happens to a thread whose memory is found broken.
pub struct MachineCheck;

const PR_MCE_KILL: i32 = 33;
const PR_MCE_KILL_GET: i32 = 34;
const PR_MCE_KILL_SET: i32 = 1;
const PR_MCE_KILL_DEFAULT: i64 = 2;

impl TaskKind for MachineCheck {
    fn name(&self) -> &'static str {
        "machine-check policy"
    }

    fn dump<'a>(&self, _thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        let args = [PR_MCE_KILL_GET.into(), 0.into(), 0.into(), 0.into(), 0.into()];
        let policy = program.try_call(libc::SYS_prctl, &args);
        Ok(Box::new(move |outcome, core| {
            let policy = outcome
                .checked(policy)
                .ok()
                .filter(|&policy| policy != PR_MCE_KILL_DEFAULT);
            core.thread_core.get_or_insert_default().machine_check = policy.map(|policy| policy as u32);
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let core = thread.core.thread_core.as_ref().filter(|_| stage == Stage::Thread);
        if let Some(policy) = core.and_then(|core| core.machine_check) {
            let args = [
                PR_MCE_KILL.into(),
                PR_MCE_KILL_SET.into(),
                policy.into(),
                0.into(),
                0.into(),
            ];
            program.call_or_warn("set the machine-check policy", libc::SYS_prctl, &args);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::task::testing::Subject;

    #[test]
    fn a_machine_check_policy_is_carried() {
        let (mut one, mut other) = (Subject::new(), Subject::new());
        let zero = || 0.into();
        assert_eq!(one.dump(&MachineCheck).thread_core.unwrap().machine_check, None);
        for early in [1, 0] {
            let args = [PR_MCE_KILL.into(), PR_MCE_KILL_SET.into(), early.into(), zero(), zero()];
            assert_eq!(one.call(libc::SYS_prctl, &args), 0);
            let core = one.dump(&MachineCheck);
            other.restore(&MachineCheck, &core);
            let args = [PR_MCE_KILL_GET.into(), zero(), zero(), zero(), zero()];
            assert_eq!(other.call(libc::SYS_prctl, &args), early);
        }
    }
}
