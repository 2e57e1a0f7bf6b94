//! Notes about tasks whose memory is not all there, for whoever serves it when the one who did has died.
//!
//! The tasks wait then, for their guards keep their userfaultfds open (see [`lazy`]). What else is needed to go
//! on: which pages were missing at first, and what the tasks have done to their memory since. For each task, by
//! number, there are in a directory:
//!
//! * `N.task`: its ids, its guard, its ranges and what was missing in them. Of a child that was forked since, only the first two.
//! * `N.changes`: a word that is not 0 while events are being read, and the [`Change`]s.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use whimbrel_images::page::PAGE_SIZE;
use whimbrel_lazy::ioctl::Userfault;
use whimbrel_lazy::journal::{Change, Journal, apply};
use whimbrel_lazy::regions::PageStatus;
use whimbrel_lazy::{Known, RegionMap};

use super::lazy::{self, LazyTask, Served};
use crate::error::{Context, Error, Result};
use crate::kernel::sys;
use crate::procfs;
use crate::resource::mem::pages::Pages;

/// Length of the word before the changes.
const HEAD: u64 = 8;
/// Changes of one task that are taken into account, to bound what a damaged file can cost.
const MOST_CHANGES: u64 = 1 << 24;

/// The notes of one tree, in a directory of their own.
#[derive(Debug)]
pub struct Notes {
    directory: PathBuf,
    next: AtomicU64,
}

impl Notes {
    /// Notes about tasks that are about to run. The directory is made.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn create(directory: &Path, tasks: &[LazyTask]) -> Result<Arc<Notes>> {
        let failed = || Error::new("note what is missing").object(directory.display().to_string());
        let _ = std::fs::remove_dir_all(directory);
        std::fs::create_dir_all(directory).with(failed)?;
        let notes = Arc::new(Notes {
            directory: directory.to_owned(),
            next: AtomicU64::new(tasks.len() as u64),
        });
        for (number, task) in tasks.iter().enumerate() {
            let mut words = identity(task.pid, task.tid, task.guard);
            words.push(task.ranges.len() as u64);
            words.extend(task.words());
            notes.write_task(number as u64, &words).with(failed)?;
            File::create(notes.path(number as u64, "changes")).with(failed)?;
        }
        Ok(notes)
    }

    /// The notes that are there.
    pub fn open(directory: &Path) -> Option<Arc<Notes>> {
        let names = std::fs::read_dir(directory).ok()?.flatten();
        let numbers =
            names.filter_map(|entry| Path::new(&entry.file_name()).file_stem()?.to_str()?.parse::<u64>().ok());
        let next = numbers.max()?.checked_add(1)?;
        Some(Arc::new(Notes {
            directory: directory.to_owned(),
            next: AtomicU64::new(next),
        }))
    }

    /// Forgets all.
    pub fn remove(&self) {
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            tracing::warn!(%error, "notes in {} were not removed", self.directory.display());
        }
    }

    fn path(&self, number: u64, what: &str) -> PathBuf {
        self.directory.join(format!("{number}.{what}"))
    }

    fn write_task(&self, number: u64, words: &[u64]) -> std::io::Result<()> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        // Whole or not at all.
        let temporary = self.path(number, "new");
        std::fs::write(&temporary, bytes)?;
        std::fs::rename(temporary, self.path(number, "task"))
    }

    fn read_task(&self, number: u64) -> Result<Option<Vec<u64>>> {
        let path = self.path(number, "task");
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(
                bytes
                    .chunks_exact(8)
                    .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
                    .collect(),
            )),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with(|| failed(&path)),
        }
    }

    /// The journal of a task, from where it stands.
    pub fn journal(self: &Arc<Notes>, number: u64) -> Arc<dyn Journal> {
        let options = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.path(number, "changes"));
        let opened = options.and_then(|file| file.metadata().map(|metadata| (file, metadata.len().max(HEAD))));
        let (file, end) = match opened {
            Ok((file, end)) => (Some(file), end),
            Err(error) => {
                tracing::warn!(%error, "changes of memory are not noted: nobody could go on after us");
                // Without the file, nobody will try.
                let _ = std::fs::remove_file(self.path(number, "changes"));
                (None, HEAD)
            }
        };
        Arc::new(Changes {
            notes: self.clone(),
            file,
            end: AtomicU64::new(end),
            broken: AtomicBool::new(false),
        })
    }

    /// A forked child keeps its userfaultfd as its descriptor `guard`; without one it has ended, or executed something else.
    pub fn child(&self, number: u64, pid: u32, guard: Option<(i32, i32)>) {
        let (tid, guard) = guard.unwrap_or((0, 0));
        if let Err(error) = self.write_task(number, &identity(pid, tid, guard)) {
            tracing::warn!(%error, "a forked child is not noted");
        }
    }

    /// Takes the tasks that still live, as far as their memory is.
    ///
    /// # Errors
    /// When the notes do not tell all that happened: what is missing must not be guessed. The tasks wait.
    pub fn take(self: &Arc<Notes>) -> Result<Vec<Served>> {
        let mut todo = Vec::new();
        let mut number = 0;
        // The tasks that the tree began with have the first numbers, and a shape.
        while let Some(words) = self.read_task(number)? {
            let Some((&ranges, shape)) = words.get(IDENTITY..).and_then(<[u64]>::split_first) else {
                break;
            };
            let (ranges, missing) = usize::try_from(ranges)
                .ok()
                .and_then(|ranges| shape.split_at_checked(ranges.checked_mul(3)?))
                .ok_or_else(|| failed(&self.path(number, "task")).because("it is damaged"))?;
            let (ranges, missing) = lazy::of_words(words[0] as u32, ranges, missing);
            todo.push((number, lazy::map_of(words[1] as i32, &ranges, &missing)?, Vec::new()));
            number += 1;
        }
        let mut tasks = Vec::new();
        while let Some((number, mut map, mut doubtful)) = todo.pop() {
            let forked = |child, map| todo.push((child, map, Vec::new()));
            let complete = self.replay(number, &mut map, &mut doubtful, forked)?;
            let Some(words) = self.read_task(number)? else {
                tracing::warn!("a child was being forked when the server died; if it runs, it may lack memory");
                continue;
            };
            let Some((pid, tid, guard)) = living(&words) else {
                continue;
            };
            let served = || Error::new("take over the memory").task(tid);
            let uffd = Userfault::from(sys::take_descriptor(tid, guard).with(served)?);
            if !complete {
                find_present(tid, &mut map)?;
            }
            wake_all(&uffd).with(served)?;
            tasks.push(Served {
                pid,
                tid,
                guard,
                uffd,
                known: Known {
                    map,
                    doubtful,
                    journal: Some(self.journal(number)),
                },
            });
        }
        Ok(tasks)
    }

    /// Does the changes of a task again; tells whether all its pages were there.
    fn replay(
        &self,
        number: u64,
        map: &mut RegionMap,
        doubtful: &mut Vec<(u64, u64)>,
        mut forked: impl FnMut(u64, RegionMap),
    ) -> Result<bool> {
        let path = self.path(number, "changes");
        let bytes = std::fs::read(&path).with(|| failed(&path))?;
        let damaged = || failed(&path).because("it is damaged");
        let (head, changes) = bytes.split_at(bytes.len().min(HEAD as usize));
        if changes.len() as u64 / Change::BYTES as u64 > MOST_CHANGES {
            return Err(damaged());
        }
        let mut complete = false;
        for change in changes.chunks(Change::BYTES) {
            let change = change.try_into().ok().and_then(Change::decode).ok_or_else(damaged)?;
            apply(map, doubtful, change);
            complete |= change == Change::Complete;
            if let Change::Fork { child } = change {
                forked(child, map.fork());
            }
        }
        if !complete && head.iter().any(|&byte| byte != 0) {
            return Err(failed(&path)
                .because("the server died just as it read what the task had done to its memory")
                .hint("the task waits; end it, or leave it"));
        }
        Ok(complete)
    }
}

fn failed(path: &Path) -> Error {
    Error::new("read what was missing").object(path.display().to_string())
}

/// Words of a task's ids.
const IDENTITY: usize = 4;

fn identity(pid: u32, tid: i32, guard: i32) -> Vec<u64> {
    let start = procfs::living_since(tid).unwrap_or_default();
    vec![u64::from(pid), tid as u64, start, guard as u64]
}

/// What images call the task, its id, and the number of its guard.
fn living(words: &[u64]) -> Option<(u32, i32, i32)> {
    let &[pid, tid, start, guard] = words.get(..IDENTITY)? else {
        return None;
    };
    let (tid, guard) = (i32::try_from(tid).ok()?, i32::try_from(guard).ok()?);
    let link = std::fs::read_link(format!("/proc/{tid}/fd/{guard}")).ok()?;
    let same = procfs::living_since(tid) == Some(start) && link.as_os_str() == "anon_inode:[userfaultfd]";
    same.then_some((pid as u32, tid, guard))
}

/// What is there needs not be asked for again. (If it were, the kernel would not take it.)
fn find_present(tid: i32, map: &mut RegionMap) -> Result<()> {
    let pages = Pages::open(tid)?;
    let mut there = Vec::new();
    for (start, end) in map.spans() {
        pages.own(start, end, &mut there)?;
    }
    for run in there {
        map.set(run.start, run.start + run.pages * PAGE_SIZE as u64, PageStatus::Present);
    }
    Ok(())
}

/// Lets every thread look again that waits for a page: what it waits for was told to somebody who is gone.
fn wake_all(uffd: &Userfault) -> std::io::Result<()> {
    let first = 1 << 20;
    uffd.wake(first, crate::arch::TASK_SIZE - first)
}

/// The file of one task's changes.
struct Changes {
    notes: Arc<Notes>,
    /// `None` if it cannot be written at all.
    file: Option<File>,
    end: AtomicU64,
    /// Something was not written. The mark of a read under way stays then, so that nobody relies on the file.
    broken: AtomicBool,
}

impl Changes {
    fn write(&self, changes: &[Change]) -> std::io::Result<()> {
        let Some(file) = self.file.as_ref().filter(|_| !self.broken.load(Ordering::Relaxed)) else {
            return Ok(());
        };
        if !changes.is_empty() {
            let bytes: Vec<u8> = changes.iter().flat_map(|change| change.encode()).collect();
            let at = self.end.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            file.write_all_at(&bytes, at)?;
        }
        file.write_all_at(&[0; HEAD as usize], 0)
    }
}

impl Journal for Changes {
    fn reading(&self) {
        if let Some(file) = &self.file {
            let _ = file.write_all_at(&[1; HEAD as usize], 0);
        }
    }

    fn changed(&self, changes: &[Change]) {
        if let Err(error) = self.write(changes) {
            tracing::warn!(%error, "changes of memory are not noted: nobody could go on after us");
            self.broken.store(true, Ordering::Relaxed);
            self.reading();
        }
    }

    fn child(&self) -> (u64, Arc<dyn Journal>) {
        let number = self.notes.next.fetch_add(1, Ordering::Relaxed);
        (number, self.notes.journal(number))
    }
}
