//! Which mappings a core dump of a process has, `/proc/PID/coredump_filter` (core(5)).

use crate::error::Result;
use crate::procfs;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// Which mappings a core dump has.
pub struct CoreFilter;

impl TaskKind for CoreFilter {
    fn name(&self) -> &'static str {
        "core dump filter"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, _program: &mut Program) -> Result<Reader<'a>> {
        // A kernel without core dumps has no such file.
        let text = if thread.leader {
            procfs::read(thread.pid, "coredump_filter").ok()
        } else {
            None
        };
        let filter = text.and_then(|text| u32::from_str_radix(std::str::from_utf8(&text).ok()?.trim(), 16).ok());
        let leader = thread.leader;
        Ok(Box::new(move |_, core| {
            if leader {
                core.tc.get_or_insert_default().coredump_filter = filter;
            }
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let task = thread.process_at(stage);
        if let Some(filter) = task.and_then(|task| task.coredump_filter) {
            super::write_file(program, "/proc/self/coredump_filter", format!("{filter:#x}").as_bytes());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::task::testing::Subject;

    #[test]
    fn a_core_dump_filter_is_carried() {
        let (mut one, mut other) = (Subject::new(), Subject::new());
        std::fs::write(format!("/proc/{}/coredump_filter", one.pid()), "0x155").unwrap();
        let core = one.dump(&CoreFilter);
        assert_eq!(core.tc.as_ref().unwrap().coredump_filter, Some(0x155));
        other.restore(&CoreFilter, &core);
        let filter = procfs::read(other.pid(), "coredump_filter").unwrap();
        assert_eq!(filter, b"00000155\n");
    }
}
