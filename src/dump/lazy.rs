//! Memory that stays in the frozen tree until it is asked for.

use std::collections::HashMap;

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSource, PageState};

use super::FrozenTree;
use super::runs::RunSet;
use crate::error::{Context, Error, Result};
use crate::kernel::sys;
use crate::resource::mem::pages::Pages;
use crate::tree::{TaskState, Tree};

/// Pages of a frozen tree that may follow when it runs elsewhere, by task as images call it.
///
/// # Errors
/// When a page table cannot be read.
pub fn select(frozen: &FrozenTree) -> Result<Vec<(u32, RunSet)>> {
    let mut all = Vec::new();
    for memory in &frozen.collected.memory {
        let (MemoryObject::Task(pid), Some(task)) = (memory.object, frozen.collected.task_of(memory.object)) else {
            continue;
        };
        let pages = Pages::open(memory.pid)?;
        let mut own = Vec::new();
        for &(start, end) in crate::restore::lazy::candidates(task).ranges() {
            pages.own(start, end, &mut own)?;
        }
        let set = RunSet::from_runs(&own);
        if !set.is_empty() {
            all.push((pid, set));
        }
    }
    Ok(all)
}

/// Pages of a frozen tree, for a destination that asks. Of others it knows nothing.
pub struct FrozenPages {
    tasks: HashMap<u32, (Pages, RunSet)>,
}

impl FrozenPages {
    /// All memory of processes that stay stopped, by their pids in images.
    ///
    /// # Errors
    /// When the memory of one cannot be opened.
    pub fn of_stopped(pids: &[(i32, u32)]) -> Result<FrozenPages> {
        let mut tasks = HashMap::new();
        for &(pid, inner) in pids {
            let everything = RunSet::from_ranges(vec![(0, crate::arch::TASK_SIZE)]);
            tasks.insert(inner, (Pages::open(pid)?, everything));
        }
        Ok(FrozenPages { tasks })
    }

    /// The pages of `lazy`, by task as images call it.
    ///
    /// # Errors
    /// When memory cannot be opened.
    pub fn open(frozen: &FrozenTree, lazy: &[(u32, RunSet)]) -> Result<FrozenPages> {
        let mut tasks = HashMap::new();
        for (pid, set) in lazy {
            let memory = frozen
                .collected
                .memory
                .iter()
                .find(|memory| memory.object == MemoryObject::Task(*pid));
            if let Some(memory) = memory {
                tasks.insert(*pid, (Pages::open(memory.pid)?, set.clone()));
            }
        }
        Ok(FrozenPages { tasks })
    }
}

impl PageSource for FrozenPages {
    fn read_pages(&self, object: MemoryObject, run: PageRun, buffer: &mut [u8]) -> std::io::Result<Vec<PageState>> {
        let MemoryObject::Task(pid) = object else {
            return Ok(vec![PageState::Unknown; run.pages as usize]);
        };
        let Some((pages, set)) = self.tasks.get(&pid) else {
            return Ok(vec![PageState::Unknown; run.pages as usize]);
        };
        let wanted = set.intersect(&RunSet::from_runs(&[run]));
        let mut states = vec![PageState::Unknown; run.pages as usize];
        for part in wanted.runs() {
            let at = (part.start - run.start) as usize;
            let bytes = &mut buffer[at..at + part.bytes() as usize];
            pages
                .read(&[part], bytes)
                .map_err(|error| std::io::Error::other(error.chain()))?;
            let first = at / PAGE_SIZE;
            for index in 0..part.pages as usize {
                let page = &bytes[index * PAGE_SIZE..(index + 1) * PAGE_SIZE];
                states[first + index] = if page.iter().all(|&byte| byte == 0) {
                    PageState::Zero
                } else {
                    PageState::Data
                };
            }
        }
        Ok(states)
    }
}

/// A tree that stays stopped when its tracer is gone.
pub struct StoppedTree(Vec<i32>);

impl StoppedTree {
    /// Stops all tasks. It does not take effect while they are traced.
    ///
    /// # Errors
    /// When one is gone.
    pub fn stop(tree: &Tree) -> Result<StoppedTree> {
        // A task that is stopped already stays so by itself.
        let running = tree.living().filter(|task| matches!(task.state, TaskState::Alive));
        let mut stopped = StoppedTree(Vec::new());
        for task in running {
            if let Err(error) = sys::kill(task.pid, libc::SIGSTOP) {
                stopped.undo();
                return Err(error).with(|| Error::new("hold the tree").task(task.pid));
            }
            stopped.0.push(task.pid);
        }
        Ok(stopped)
    }

    /// Takes the stop back before it has taken effect: SIGCONT discards a pending SIGSTOP (signal(7)).
    pub fn undo(self) {
        for pid in self.0 {
            let _ = sys::kill(pid, libc::SIGCONT);
        }
    }
}
