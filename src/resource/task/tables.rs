//! Tables that clone(2) lets two processes share: descriptors (CLONE_FILES); root, working directory and umask (CLONE_FS);
//! memory (CLONE_VM), and then signal actions, too (CLONE_SIGHAND).
//!
//! A child that shares a table with its parent is made again with the same flag, so that they go on to share it. Of memory
//! this is not possible yet: the tree is refused. So is one in which tasks share a table that neither has from the other.

use std::cmp::Ordering;

use whimbrel_images::proto::TaskKobjIdsEntry;

use crate::error::{Error, Result};
use crate::kernel::sys::{self, Kcmp};

/// The tables of a tree, each with the number of the first task that was found to have it.
#[derive(Debug, Default)]
pub struct Tables {
    /// Sorted by the order that kcmp(2) gives.
    known: [Vec<(i32, u32)>; 3],
}

const KINDS: [(Kcmp, &str); 3] = [
    (Kcmp::Vm, "memory"),
    (Kcmp::Files, "descriptor table"),
    (Kcmp::Fs, "root and working directory"),
];

impl Tables {
    /// Numbers of the tables of process `pid`, which is the task `number`: those of the first task that has them.
    ///
    /// # Errors
    /// When they cannot be compared.
    pub fn numbers(&mut self, pid: i32, number: u32) -> Result<[u32; 3]> {
        let mut numbers = [number; 3];
        for (index, (what, name)) in KINDS.into_iter().enumerate() {
            let known = &mut self.known[index];
            let mut failed = None;
            let place = known.binary_search_by(|&(other, _)| {
                sys::kcmp(other, pid, what, 0, 0).unwrap_or_else(|error| {
                    failed = Some(error);
                    Ordering::Equal
                })
            });
            if let Some(error) = failed {
                return Err(Error::new("compare tables").task(pid).object(name).because(error));
            }
            match place {
                Ok(found) => numbers[index] = known[found].1,
                Err(at) => known.insert(at, (pid, number)),
            }
        }
        Ok(numbers)
    }
}

/// The flags of clone(2) with which a task is made by its parent, by their tables: `None` for the parent of the root.
///
/// # Errors
/// When it shares what cannot be shared again. `number` is that of the task itself, which has whatever nobody had before.
pub fn clone_flags(pid: i32, number: u32, tables: &[u32; 3], parent: Option<&[u32; 3]>) -> Result<u64> {
    let mut flags = 0;
    for (index, (what, name)) in KINDS.into_iter().enumerate() {
        if tables[index] == number {
            continue;
        }
        let refused = |why: &str| {
            Err(Error::new("carry a task")
                .task(pid)
                .object(name)
                .because(why.to_owned()))
        };
        if parent.is_none_or(|parent| parent[index] != tables[index]) {
            return refused("it is shared with a task that is not its parent, which is not supported yet");
        }
        flags |= match what {
            Kcmp::Files => libc::CLONE_FILES as u64,
            Kcmp::Fs => libc::CLONE_FS as u64,
            _ => return refused("it is shared with its parent (vfork, CLONE_VM), which is not supported yet"),
        };
    }
    Ok(flags)
}

/// As [`clone_flags`], of a task in images. CRIU, too, gives the same id to what tasks share.
pub fn flags_of(task: &TaskKobjIdsEntry, parent: &TaskKobjIdsEntry) -> u64 {
    let mut flags = 0;
    // Without ids (CRIU before 1.0) nothing is shared.
    if task.files_id != 0 && task.files_id == parent.files_id {
        flags |= libc::CLONE_FILES as u64;
    }
    if task.fs_id != 0 && task.fs_id == parent.fs_id {
        flags |= libc::CLONE_FS as u64;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::task::testing::Subject;

    #[test]
    fn tasks_that_share_a_table_are_found_whatever_the_order() {
        let subjects = [Subject::new(), Subject::new(), Subject::new(), Subject::new()];
        let mut tables = Tables::default();
        for (number, subject) in (1..).zip(&subjects) {
            assert_eq!(tables.numbers(subject.pid(), number).unwrap(), [number; 3]);
        }
        for (number, subject) in (1..5).zip(&subjects).rev() {
            let found = tables.numbers(subject.pid(), 9).unwrap();
            assert_eq!(found, [number; 3]);
        }
    }

    #[test]
    fn what_cannot_be_shared_again_is_refused_by_name() {
        let parent = [1; 3];
        assert_eq!(clone_flags(7, 2, &[2; 3], Some(&parent)).unwrap(), 0);
        let both = (libc::CLONE_FILES | libc::CLONE_FS) as u64;
        assert_eq!(clone_flags(7, 2, &[2, 1, 1], Some(&parent)).unwrap(), both);
        let error = clone_flags(7, 2, &[1, 2, 2], Some(&parent)).unwrap_err();
        assert!(error.chain().contains("memory"), "{}", error.chain());
        let error = clone_flags(7, 3, &[3, 1, 3], Some(&[2; 3])).unwrap_err();
        assert!(error.chain().contains("not its parent"), "{}", error.chain());
    }
}
