//! On which nodes a thread's memory is allocated, set_mempolicy(2). Where memory lies already is not carried: that is
//! decided anew as it is restored. A node that another machine does not have is a hint lost, and told.

use crate::error::Result;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// On which nodes a thread's memory is allocated.
pub struct NumaPolicy;

/// Nodes that any kernel may have (MAX_NUMNODES, CONFIG_NODES_SHIFT is at most 10). It ignores the last bit of the count:
/// get_mempolicy(2) and set_mempolicy(2) take the number of bits plus one.
const NODES: usize = 1024;

impl TaskKind for NumaPolicy {
    fn name(&self) -> &'static str {
        "NUMA policy"
    }

    fn dump<'a>(&self, _thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        let (mode, nodes) = (program.reserve(8), program.reserve(NODES / 8));
        let args = [mode.into(), nodes.into(), (NODES + 1).into(), 0.into(), 0.into()];
        // ENOSYS: a kernel without NUMA.
        let asked = program.try_call(libc::SYS_get_mempolicy, &args);
        Ok(Box::new(move |outcome, core| {
            let core = core.thread_core.get_or_insert_default();
            let mode = outcome.int(mode, 0) as u32;
            if outcome.result(asked) == 0 && mode != libc::MPOL_DEFAULT as u32 {
                let mut mask = outcome.bytes(nodes).to_vec();
                mask.truncate(mask.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1));
                (core.numa_mode, core.numa_nodes) = (Some(mode), Some(mask));
            }
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let core = thread.core.thread_core.as_ref().filter(|_| stage == Stage::Thread);
        let Some((core, mode)) = core.and_then(|core| Some((core, core.numa_mode?))) else {
            return Ok(());
        };
        let mut mask = core.numa_nodes.clone().unwrap_or_default();
        mask.resize(NODES / 8, 0);
        let data = program.data(&mask);
        program.call_or_warn(
            "keep the thread's memory on its nodes, which are not here: any node serves",
            libc::SYS_set_mempolicy,
            &[mode.into(), data.into(), (NODES + 1).into()],
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::task::testing::Subject;

    const MPOL_BIND: u32 = 2;

    #[test]
    fn a_numa_policy_is_carried_where_the_kernel_has_any() {
        let (mut one, mut other) = (Subject::new(), Subject::new());
        let mut core = one.dump(&NumaPolicy);
        assert_eq!(core.thread_core.as_ref().unwrap().numa_mode, None);
        let per_thread = core.thread_core.as_mut().unwrap();
        (per_thread.numa_mode, per_thread.numa_nodes) = (Some(MPOL_BIND), Some(vec![1]));
        one.restore(&NumaPolicy, &core);
        let bound = one.dump(&NumaPolicy);
        // ENOSYS is the only reason why a machine cannot bind memory to its first node.
        let known = one.call(libc::SYS_get_mempolicy, &[0.into(); 5]) != -i64::from(libc::ENOSYS);
        assert_eq!(bound == core, known);
        other.restore(&NumaPolicy, &bound);
        assert_eq!(other.dump(&NumaPolicy), bound);
    }

    #[test]
    fn nodes_that_are_not_here_are_no_failure() {
        let mut one = Subject::new();
        let mut core = one.dump(&NumaPolicy);
        let per_thread = core.thread_core.as_mut().unwrap();
        (per_thread.numa_mode, per_thread.numa_nodes) = (Some(MPOL_BIND), Some(vec![0, 0x80]));
        one.restore(&NumaPolicy, &core);
        assert_eq!(one.dump(&NumaPolicy).thread_core.unwrap().numa_mode, None);
    }
}
