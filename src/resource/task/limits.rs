//! Resource limits.

use whimbrel_images::proto::{RlimitEntry, TaskRlimitsEntry};

use crate::error::Result;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// Number of limits (RLIM_NLIMITS).
const LIMITS: u64 = 16;

/// Resource limits, asked for inside the task: prlimit(2) from outside needs CAP_SYS_RESOURCE for another user's task.
pub struct Limits;

impl TaskKind for Limits {
    fn name(&self) -> &'static str {
        "resource limits"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        if !thread.leader {
            return Ok(Box::new(|_, _| Ok(())));
        }
        let buffers: Vec<_> = (0..LIMITS)
            .map(|limit| {
                let buffer = program.reserve(16);
                program.call(
                    "read a limit",
                    libc::SYS_prlimit64,
                    &[0.into(), limit.into(), 0.into(), buffer.into()],
                );
                buffer
            })
            .collect();
        Ok(Box::new(move |outcome, core| {
            let entry = |buffer| RlimitEntry {
                cur: outcome.word(buffer, 0),
                max: outcome.word(buffer, 8),
            };
            let rlimits = buffers.into_iter().map(entry).collect();
            core.tc.get_or_insert_default().rlimits = Some(TaskRlimitsEntry { rlimits });
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let (thread, leader) = (thread.core, thread.leader);
        // In the last stage: our own descriptors may lie above the task's RLIMIT_NOFILE.
        if stage != Stage::Final || !leader {
            return Ok(());
        }
        let limits = thread.tc.as_ref().and_then(|tc| tc.rlimits.as_ref());
        for (limit, entry) in limits
            .iter()
            .flat_map(|limits| &limits.rlimits)
            .enumerate()
            .take(LIMITS as usize)
        {
            let value = program.data(&[entry.cur.to_le_bytes(), entry.max.to_le_bytes()].concat());
            let what = format!(
                "set resource limit {limit} to {}/{} (a hard limit above ours needs CAP_SYS_RESOURCE)",
                entry.cur, entry.max
            );
            program.call(
                what,
                libc::SYS_prlimit64,
                &[0.into(), limit.into(), value.into(), 0.into()],
            );
        }
        Ok(())
    }
}
