//! The I/O priority of a thread, ioprio_set(2).

use crate::error::Result;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// The I/O priority of a thread.
pub struct IoPriority;

const IOPRIO_WHO_PROCESS: u32 = 1;

impl TaskKind for IoPriority {
    fn name(&self) -> &'static str {
        "I/O priority"
    }

    fn dump<'a>(&self, _thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        let args = [IOPRIO_WHO_PROCESS.into(), 0.into()];
        // ENOSYS: a kernel without block devices.
        let priority = program.try_call(libc::SYS_ioprio_get, &args);
        Ok(Box::new(move |outcome, core| {
            // Zero, the class "none", is that of a thread that has never set any: it follows from the nice value.
            let value = outcome.checked(priority).ok().filter(|&value| value != 0);
            core.thread_core.get_or_insert_default().io_priority = value.map(|value| value as u32);
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let core = thread.core.thread_core.as_ref().filter(|_| stage == Stage::Thread);
        if let Some(priority) = core.and_then(|core| core.io_priority) {
            let args = [IOPRIO_WHO_PROCESS.into(), 0.into(), priority.into()];
            program.call_or_warn("set the I/O priority", libc::SYS_ioprio_set, &args);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::task::testing::Subject;

    #[test]
    fn an_io_priority_is_carried_and_none_is_left_alone() {
        let (mut one, mut other) = (Subject::new(), Subject::new());
        assert_eq!(one.dump(&IoPriority).thread_core.unwrap().io_priority, None);
        // Class "best effort", level 6.
        let priority = 2 << 13 | 6;
        one.call(
            libc::SYS_ioprio_set,
            &[IOPRIO_WHO_PROCESS.into(), 0.into(), priority.into()],
        );
        let core = one.dump(&IoPriority);
        other.restore(&IoPriority, &core);
        let args = [IOPRIO_WHO_PROCESS.into(), 0.into()];
        assert_eq!(other.call(libc::SYS_ioprio_get, &args), i64::from(priority));
    }
}
