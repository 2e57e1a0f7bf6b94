//! The processors that a thread may run on, sched_setaffinity(2).
//!
//! Only a choice is carried: a thread that may run on all processors here may run on all processors elsewhere, however
//! many those are. A choice that another machine cannot follow is a hint lost, and told, not a failure: "the affinity mask
//! […] contains no processors that are currently physically on the system and permitted to the thread" is EINVAL, and of
//! a mask that has some of them the kernel takes those (sched_setaffinity(2)).

use crate::error::Result;
use crate::procfs;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// The processors that a thread may run on.
pub struct Affinity;

impl TaskKind for Affinity {
    fn name(&self) -> &'static str {
        "processor affinity"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, _program: &mut Program) -> Result<Reader<'a>> {
        let mask = &thread.status.cpus_allowed;
        let read = || std::fs::read_to_string(ONLINE).unwrap_or_default();
        let online = thread.found.processors.get_or_init(read);
        let chosen = !mask.is_empty() && !covers(mask, online) && !is_that_of_cpuset(thread.pid, mask);
        Ok(Box::new(move |_, core| {
            core.thread_core.get_or_insert_default().affinity = chosen.then(|| mask.clone());
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let mask = thread
            .core
            .thread_core
            .as_ref()
            .and_then(|core| core.affinity.as_deref());
        let Some(mask) = mask.filter(|_| stage == Stage::Thread) else {
            return Ok(());
        };
        let what = format!(
            "keep the thread on processors {}, which are not here: it may run on all",
            list(mask)
        );
        // The kernel reads whole words (compat and not), and ignores what lies beyond its own mask.
        let mut words = mask.to_vec();
        words.resize(mask.len().next_multiple_of(8), 0);
        let data = program.data(&words);
        let args = [0.into(), words.len().into(), data.into()];
        program.call_or_warn(what, libc::SYS_sched_setaffinity, &args);
        Ok(())
    }
}

/// All processors that work now.
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// Does the mask hold all processors of the list in a file?
fn covers_list(mask: &[u8], path: &str) -> bool {
    std::fs::read_to_string(path).is_ok_and(|text| covers(mask, &text))
}

/// A mask that a cpuset imposes is not the thread's choice (cpuset(7)).
fn is_that_of_cpuset(pid: i32, mask: &[u8]) -> bool {
    let group = procfs::read(pid, "cpuset").unwrap_or_default();
    let group = String::from_utf8_lossy(&group);
    let group = group.trim_end();
    [
        format!("/sys/fs/cgroup{group}/cpuset.cpus.effective"),
        format!("/sys/fs/cgroup/cpuset{group}/cpuset.effective_cpus"),
    ]
    .iter()
    .any(|path| covers_list(mask, path))
}

/// Does the mask hold all processors of a list as the kernel writes them (`0-3,8`)? An empty list says nothing.
fn covers(mask: &[u8], list: &str) -> bool {
    let has = |cpu: usize| mask.get(cpu / 8).is_some_and(|byte| byte & 1 << (cpu % 8) != 0);
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?)
    };
    let ranges: Option<Vec<_>> = list.trim().split(',').map(range).collect();
    ranges.is_some_and(|ranges| ranges.into_iter().flatten().all(has))
}

/// The mask as a list, in the kernel's form.
fn list(mask: &[u8]) -> String {
    let has = |cpu: usize| mask.get(cpu / 8).is_some_and(|byte| byte & 1 << (cpu % 8) != 0);
    let mut parts = Vec::new();
    let mut cpu = 0;
    while cpu < 8 * mask.len() {
        let start = cpu;
        while has(cpu) {
            cpu += 1;
        }
        match cpu - start {
            0 => {}
            1 => parts.push(start.to_string()),
            _ => parts.push(format!("{start}-{}", cpu - 1)),
        }
        cpu += 1;
    }
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use whimbrel_images::proto::{CoreEntry, ThreadCoreEntry};

    use super::*;
    use crate::resource::task::testing::Subject;

    fn allowed(subject: &Subject) -> Vec<u8> {
        subject.status().cpus_allowed
    }

    fn pinned(mask: &[u8]) -> CoreEntry {
        CoreEntry {
            thread_core: Some(ThreadCoreEntry {
                affinity: Some(mask.to_vec()),
                ..Default::default()
            }),
            ..CoreEntry::default()
        }
    }

    #[test]
    fn a_choice_of_processors_is_carried_and_no_choice_leaves_all() {
        let (mut chooser, mut heir) = (Subject::new(), Subject::new());
        assert_eq!(chooser.dump(&Affinity).thread_core.unwrap().affinity, None);
        let all = allowed(&chooser);
        chooser.restore(&Affinity, &pinned(&[1]));
        assert_eq!(allowed(&chooser)[0], 1);
        let alone = !covers(&[1], &std::fs::read_to_string(ONLINE).unwrap());
        let core = chooser.dump(&Affinity);
        assert_eq!(core.thread_core.as_ref().unwrap().affinity.is_some(), alone);
        heir.restore(&Affinity, &core);
        assert_eq!(allowed(&heir) == all, !alone);
    }

    #[test]
    fn a_machine_with_fewer_processors_takes_those_that_it_has_and_all_when_it_has_none() {
        let mut subject = Subject::new();
        let all = allowed(&subject);
        let mut mask = vec![0u8; 256];
        mask[255] = 0x80;
        subject.restore(&Affinity, &pinned(&mask));
        assert_eq!(allowed(&subject), all);
        mask[0] = 1;
        subject.restore(&Affinity, &pinned(&mask));
        assert_eq!(allowed(&subject)[0], 1);
    }

    #[test]
    fn lists_of_processors_are_read_and_written() {
        assert!(covers(&[0xff, 1], "0-3,8\n"));
        assert!(!covers(&[0xff, 1], "0-3,9\n"));
        assert!(!covers(&[0xff], "\n"));
        assert_eq!(list(&[0b1001_0111, 0x80]), "0-2,4,7,15");
        assert_eq!(list(&[0xff, 0xff]), "0-15");
        assert_eq!(list(&[]), "");
    }
}
