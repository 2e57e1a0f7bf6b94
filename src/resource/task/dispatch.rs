//! System calls that a thread has delivered to itself as signals, PR_SET_SYSCALL_USER_DISPATCH(2const): not carried yet,
//! and refused rather than lost, for an emulator would have its guest's calls go to the kernel.

use crate::error::{Error, Result};
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// System calls that are delivered to user space.
pub struct Dispatch;

impl TaskKind for Dispatch {
    fn name(&self) -> &'static str {
        "system call user dispatch"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, _program: &mut Program) -> Result<Reader<'a>> {
        if thread.stopped.dispatches_system_calls() {
            return Err(Error::new("carry a thread")
                .because("it has its system calls dispatched to itself (PR_SET_SYSCALL_USER_DISPATCH), which is not supported yet"));
        }
        Ok(Box::new(|_, _| Ok(())))
    }

    fn restore(&self, _stage: Stage, _thread: &Restoring<'_>, _program: &mut Program) -> Result<()> {
        Ok(())
    }
}
