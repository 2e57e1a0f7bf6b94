//! The memory of the process-to-be while the original still runs.
//!
//! Pages of mappings that exist at the destination already go straight to their final address. The others wait here.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink};

use crate::dump::runs::RunSet;
use crate::error::{Context, Error, Result};
use crate::remote::{RemoteAddr, RemoteMemory};
use crate::resource::mem::pages::{Pages, batches};

/// Bytes that are read at once.
const BATCH: usize = 1 << 20;
const PAGE: u64 = PAGE_SIZE as u64;

/// Memory of one task that is mapped at its final address.
pub struct StagedTask {
    memory: RemoteMemory,
    forced: File,
    pages: Pages,
    /// What is mapped.
    pub staged: RunSet,
}

/// All memory that has arrived.
#[derive(Default)]
pub struct Standby {
    /// Tasks by their pid.
    pub tasks: HashMap<u32, StagedTask>,
    waiting: BTreeMap<(MemoryObject, u64), Box<[u8]>>,
    room: u64,
}

/// The part of the standby that the receiving thread writes to.
#[derive(Clone)]
pub struct StandbySink(Arc<Mutex<Standby>>);

impl Standby {
    /// An empty standby that keeps at most `room` bytes waiting.
    pub fn new(room: u64) -> Standby {
        Standby {
            room,
            ..Standby::default()
        }
    }

    /// Says which ranges of a task are mapped.
    ///
    /// # Errors
    /// When its memory cannot be opened.
    pub fn add(&mut self, pid: u32, tid: i32, staged: RunSet) -> Result<()> {
        let failed = || Error::new("open memory").task(tid);
        let forced = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{tid}/mem"))
            .with(failed)?;
        let task = StagedTask {
            memory: RemoteMemory::new(tid),
            forced,
            pages: Pages::open(tid)?,
            staged,
        };
        self.tasks.insert(pid, task);
        Ok(())
    }

    /// Takes the pages of all tasks out of their memory; those in the ranges of `stays` wait from now on.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn unstage(&mut self, stays: &HashMap<u32, RunSet>) -> Result<()> {
        for (pid, task) in std::mem::take(&mut self.tasks) {
            let Some(stays) = stays.get(&pid) else { continue };
            let mut runs = Vec::new();
            for &(start, end) in task.staged.intersect(stays).ranges() {
                task.pages.own(start, end, &mut runs)?;
            }
            let mut buffer = vec![0; BATCH];
            for batch in batches(&runs, BATCH) {
                let bytes = batch.iter().map(PageRun::bytes).sum::<u64>() as usize;
                task.pages.read(&batch, &mut buffer[..bytes])?;
                let addresses = batch.iter().flat_map(|run| (run.start..run.end()).step_by(PAGE_SIZE));
                for (address, page) in addresses.zip(buffer[..bytes].chunks_exact(PAGE_SIZE)) {
                    self.waiting.insert((MemoryObject::Task(pid), address), page.into());
                }
            }
        }
        Ok(())
    }

    /// Takes everything that waits, in order of objects and addresses.
    pub fn take_waiting(&mut self) -> BTreeMap<(MemoryObject, u64), Box<[u8]>> {
        std::mem::take(&mut self.waiting)
    }

    /// Pages that wait for a task.
    pub fn waits_for(&self, pid: u32, start: u64, end: u64) -> bool {
        let object = MemoryObject::Task(pid);
        self.waiting.range((object, start)..(object, end)).next().is_some()
    }

    /// The contents of pages that wait, if all of them do.
    pub fn peek(&self, object: MemoryObject, run: PageRun) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(run.bytes() as usize);
        for page in 0..run.pages {
            bytes.extend_from_slice(self.waiting.get(&(object, run.start + page * PAGE))?);
        }
        Some(bytes)
    }

    fn write(&mut self, object: MemoryObject, run: PageRun, data: &[u8]) -> io::Result<()> {
        let staged = match object {
            MemoryObject::Task(pid) => self.tasks.get(&pid),
            MemoryObject::Shmem(_) => None,
        };
        let whole = RunSet::from_runs(&[run]);
        let part = |from: u64, to: u64| &data[(from - run.start) as usize..(to - run.start) as usize];
        let mut rest = whole.clone();
        if let Some(task) = staged {
            let here = whole.intersect(&task.staged);
            for &(start, end) in here.ranges() {
                if task.memory.write(RemoteAddr(start), part(start, end)).is_err() {
                    task.forced.write_all_at(part(start, end), start)?;
                }
            }
            rest = whole.subtract(&here);
        }
        for &(start, end) in rest.ranges() {
            for address in (start..end).step_by(PAGE_SIZE) {
                if self.waiting.len() as u64 * PAGE > self.room {
                    return Err(io::Error::other(
                        "more memory waits for its mappings than the source had announced",
                    ));
                }
                self.waiting
                    .insert((object, address), part(address, address + PAGE).into());
            }
        }
        Ok(())
    }

    /// Pages of zeros: what is in place is made so, if it is not; what waits for its mapping waits with its bytes, for over
    /// a file zeros are not nothing.
    fn zeros(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        self.zero(object, run)?;
        let MemoryObject::Task(pid) = object else { return Ok(()) };
        let mut rest = RunSet::from_runs(&[run]);
        if let Some(task) = self.tasks.get(&pid) {
            rest = rest.subtract(&task.staged);
        }
        for run in rest.runs() {
            for page in 0..run.pages {
                let address = run.start + page * PAGE;
                self.write(
                    object,
                    PageRun {
                        start: address,
                        pages: 1,
                    },
                    &[0; PAGE_SIZE],
                )?;
            }
        }
        Ok(())
    }

    /// Pages that are not populated.
    fn zero(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        for page in 0..run.pages {
            self.waiting.remove(&(object, run.start + page * PAGE));
        }
        let MemoryObject::Task(pid) = object else { return Ok(()) };
        let Some(task) = self.tasks.get(&pid) else {
            return Ok(());
        };
        // Only what is there must be made zero; what was never written is.
        let here = RunSet::from_runs(&[run]).intersect(&task.staged);
        let mut present = Vec::new();
        for &(start, end) in here.ranges() {
            task.pages.own(start, end, &mut present).map_err(io::Error::other)?;
        }
        for run in present {
            for page in 0..run.pages {
                let address = run.start + page * PAGE;
                if task.memory.write(RemoteAddr(address), &[0; PAGE_SIZE]).is_err() {
                    task.forced.write_all_at(&[0; PAGE_SIZE], address)?;
                }
            }
        }
        Ok(())
    }
}

impl StandbySink {
    /// A sink into `standby`.
    pub fn new(standby: Standby) -> StandbySink {
        StandbySink(Arc::new(Mutex::new(standby)))
    }

    /// The standby.
    pub fn lock(&self) -> MutexGuard<'_, Standby> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl PageSink for StandbySink {
    fn write_pages(&mut self, object: MemoryObject, run: PageRun, data: &[u8]) -> io::Result<()> {
        self.lock().write(object, run, data)
    }

    fn zeros(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        self.lock().zeros(object, run)
    }

    fn zero_pages(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        self.lock().zero(object, run)
    }

    fn parent_pages(&mut self, _object: MemoryObject, _run: PageRun) -> io::Result<()> {
        Err(io::Error::other("a migration has no parent dump"))
    }
}
