//! What a process has registered for with membarrier(2): without it, its expedited barriers would be refused.

use crate::error::Result;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// Registrations of a process for memory barriers.
pub struct Membarrier;

/// Linux 6.3.
const GET_REGISTRATIONS: i32 = 1 << 9;

impl TaskKind for Membarrier {
    fn name(&self) -> &'static str {
        "membarrier registrations"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        if !thread.leader {
            return Ok(Box::new(|_, _| Ok(())));
        }
        let args = [GET_REGISTRATIONS.into(), 0.into(), 0.into()];
        let mask = program.try_call(libc::SYS_membarrier, &args);
        Ok(Box::new(move |outcome, core| {
            let mask = outcome.checked(mask).ok().filter(|&mask| mask != 0);
            core.tc.get_or_insert_default().membarrier_registration_mask = mask.map(|mask| mask as u32);
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let task = thread.process_at(stage);
        // Each bit is the command that registers.
        let mask = task.and_then(|task| task.membarrier_registration_mask).unwrap_or(0);
        for bit in (0..32).filter(|bit| mask & 1 << bit != 0) {
            let args = [(1u32 << bit).into(), 0.into(), 0.into()];
            program.call("register for memory barriers", libc::SYS_membarrier, &args);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::task::testing::Subject;

    #[test]
    fn registrations_for_memory_barriers_are_carried() {
        const PRIVATE_EXPEDITED: i32 = 1 << 3;
        const REGISTER_PRIVATE_EXPEDITED: i32 = 1 << 4;
        let (mut one, mut other) = (Subject::new(), Subject::new());
        let barrier = |command: i32| [command.into(), 0.into(), 0.into()];
        assert!(other.call(libc::SYS_membarrier, &barrier(PRIVATE_EXPEDITED)) < 0);
        one.call(libc::SYS_membarrier, &barrier(REGISTER_PRIVATE_EXPEDITED));
        let core = one.dump(&Membarrier);
        other.restore(&Membarrier, &core);
        assert_eq!(other.call(libc::SYS_membarrier, &barrier(PRIVATE_EXPEDITED)), 0);
        assert_eq!(other.dump(&Membarrier), core);
    }
}
