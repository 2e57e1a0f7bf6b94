//! Reading the memory of a tree into a sink: a bounded pipeline, whose size does not depend on the tree's.

use std::sync::Mutex;

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageBuffer, PageRun, PageSink};

use super::collect::TaskMemory;
use super::runs::RunSet;
use crate::error::{Context, Error, Result};
use crate::resource::mem::pages::{self, Pages};

/// Bytes that are read at once. All batches under way fit into a processor's cache, so that memory is read once and
/// written once.
const BATCH: usize = 256 << 10;
/// Batches that are read ahead of the sink.
const AHEAD: usize = 4;

/// What was read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Amount {
    /// Pages of the tree that hold something.
    pub pages_scanned: u64,
    /// Pages that went to the sink.
    pub pages_written: u64,
    /// Pages that the parent has already.
    pub pages_in_parent: u64,
    /// Pages that stay in the tree until they are asked for.
    pub pages_lazy: u64,
}

impl Amount {
    /// Adds another task's.
    pub fn add(&mut self, other: Amount) {
        self.pages_scanned += other.pages_scanned;
        self.pages_written += other.pages_written;
        self.pages_in_parent += other.pages_in_parent;
        self.pages_lazy += other.pages_lazy;
    }
}

/// Which pages of a task go to the sink, and which the parent dump has.
pub struct Selection {
    /// Runs to store.
    pub store: Vec<PageRun>,
    /// Runs that did not change since the parent.
    pub parent: Vec<PageRun>,
}

impl Selection {
    /// These pages, to be stored.
    pub fn of(set: &RunSet) -> Selection {
        Selection {
            store: set.runs(),
            parent: Vec::new(),
        }
    }
}

/// Selects all pages of a task.
///
/// # Errors
/// When its page table cannot be read.
pub fn select_all(memory: &TaskMemory) -> Result<Selection> {
    let pages = Pages::open(memory.pid)?;
    Ok(Selection::of(&own_pages(memory, &pages, &memory.ranges)?))
}

/// The pages in some of a task's ranges that images need: those of its own, and its vdso.
///
/// # Errors
/// When its page table cannot be read.
pub fn own_pages(memory: &TaskMemory, pages: &Pages, ranges: &[(u64, u64)]) -> Result<RunSet> {
    let mut own = Vec::new();
    for &(start, end) in ranges {
        pages.own(start, end, &mut own)?;
    }
    let vdso = RunSet::from_ranges(memory.vdso.into_iter().collect());
    let vdso = vdso.intersect(&RunSet::from_ranges(ranges.to_vec()));
    Ok(RunSet::from_runs(&own).union(&vdso))
}

/// Says which pages of a task the parent has; returns how many.
///
/// # Errors
/// When the sink does not take them: the parent has not got them.
pub fn say_parent(memory: &TaskMemory, selection: &Selection, sink: &mut dyn PageSink) -> Result<u64> {
    for &run in &selection.parent {
        sink.parent_pages(memory.object, run)
            .with(|| Error::new("store memory").task(memory.pid))?;
    }
    Ok(selection.parent.iter().map(|run| run.pages).sum())
}

/// Writes the selected pages of a task to `sink`.
///
/// # Errors
/// When the memory cannot be read or the sink does not take it.
pub fn write(memory: &TaskMemory, selection: &Selection, sink: &mut dyn PageSink) -> Result<Amount> {
    let failed = || Error::new("store memory").task(memory.pid);
    let parent = say_parent(memory, selection, sink)?;
    let pages = Pages::open(memory.pid)?;
    let read = |batch: Vec<PageRun>, buffer: &mut [u8]| pages.read(&batch, buffer).map(|()| batch);
    pump(&selection.store, &read, &mut |batch, bytes| {
        give(memory.object, batch, bytes, sink).with(failed)
    })?;
    let written = selection.store.iter().map(|run| run.pages).sum::<u64>();
    Ok(Amount {
        pages_scanned: written + parent,
        pages_written: written,
        pages_in_parent: parent,
        pages_lazy: 0,
    })
}

/// Writes pages of a process that may be running. What was unmapped meanwhile is left out.
///
/// # Errors
/// When the sink does not take them, or `go_on` says so.
pub fn write_running(
    pid: i32,
    object: MemoryObject,
    set: &RunSet,
    sink: &mut dyn PageSink,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let reader = Pages::open(pid)?;
    let read = |batch: Vec<PageRun>, buffer: &mut [u8]| match reader.read(&batch, buffer) {
        Ok(()) => Ok(batch),
        // Part of it was unmapped meanwhile: page by page, what is gone is left out. The next look finds it gone.
        Err(_) => Ok(read_single_pages(&reader, &batch, buffer)),
    };
    pump(&set.runs(), &read, &mut |batch, bytes| {
        go_on()?;
        give(object, batch, bytes, sink).context("store memory")
    })
}

fn give(object: MemoryObject, batch: &[PageRun], bytes: &[u8], sink: &mut dyn PageSink) -> std::io::Result<()> {
    let mut at = 0;
    for &run in batch {
        let end = at + run.bytes() as usize;
        sink.write_pages(object, run, &bytes[at..end])?;
        at = end;
    }
    Ok(())
}

/// Reads the pages of a batch that can be read, one after the other, and says which.
fn read_single_pages(reader: &Pages, batch: &[PageRun], buffer: &mut [u8]) -> Vec<PageRun> {
    let mut found = Vec::new();
    let pages = batch.iter().flat_map(|run| (run.start..run.end()).step_by(PAGE_SIZE));
    let mut at = 0;
    for start in pages {
        if reader
            .read(&[PageRun { start, pages: 1 }], &mut buffer[at..at + PAGE_SIZE])
            .is_ok()
        {
            pages::push_page(&mut found, start);
            at += PAGE_SIZE;
        }
    }
    found
}

/// Fills a buffer with a batch, and says what is in it.
type Read<'a> = dyn Fn(Vec<PageRun>, &mut [u8]) -> Result<Vec<PageRun>> + Sync + 'a;

/// Takes a batch and its bytes.
type Write<'a> = dyn FnMut(&[PageRun], &[u8]) -> Result<()> + 'a;

/// Moves pages from `read` to `write`, batch by batch. What does not fit into one is read by another thread, ahead of
/// what is written.
fn pump(runs: &[PageRun], read: &Read<'_>, write: &mut Write<'_>) -> Result<()> {
    let bytes_of = |batch: &[PageRun]| batch.iter().map(PageRun::bytes).sum::<u64>() as usize;
    let mut batches = pages::batches(runs, BATCH);
    if batches.len() <= 1 {
        let Some(batch) = batches.pop() else { return Ok(()) };
        let bytes = bytes_of(&batch);
        let mut buffer = PageBuffer::new(bytes);
        let batch = read(batch, buffer.first_mut(bytes))?;
        return write(&batch, buffer.first(bytes_of(&batch)));
    }
    let (full, filled) = crossbeam::channel::bounded::<(Vec<PageRun>, PageBuffer)>(AHEAD);
    let (empty, spare) = crossbeam::channel::bounded::<PageBuffer>(AHEAD + 2);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            let full = full;
            for batch in batches {
                let mut buffer = spare.try_recv().unwrap_or_else(|_| PageBuffer::new(BATCH));
                let bytes = bytes_of(&batch);
                match read(batch, buffer.first_mut(bytes)) {
                    Ok(batch) => {
                        if full.send((batch, buffer)).is_err() {
                            return;
                        }
                    }
                    Err(error) => {
                        *failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(error);
                        return;
                    }
                }
            }
        });
        for (batch, buffer) in filled {
            write(&batch, buffer.first(bytes_of(&batch)))?;
            let _ = empty.try_send(buffer);
        }
        Ok(())
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        return Err(error);
    }
    result
}
