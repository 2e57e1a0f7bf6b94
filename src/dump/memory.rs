//! Reading the memory of a tree into a sink: a bounded pipeline, whose size does not depend on the tree's.

use std::sync::Mutex;

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink};

use super::collect::TaskMemory;
use super::runs::RunSet;
use crate::error::{Context, Error, Result};
use crate::resource::mem::pages::{self, Pages};

/// Bytes that are read at once.
const BATCH: usize = 1 << 20;
/// Batches that are read ahead of the sink.
const AHEAD: usize = 8;

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

/// Selects all pages of a task.
///
/// # Errors
/// When its page table cannot be read.
pub fn select_all(memory: &TaskMemory) -> Result<(Pages, Selection)> {
    let pages = Pages::open(memory.pid)?;
    let mut store = Vec::new();
    for &(start, end) in &memory.ranges {
        pages.own(start, end, &mut store)?;
    }
    Ok((
        pages,
        Selection {
            store,
            parent: Vec::new(),
        },
    ))
}

/// Writes the selected pages of a task to `sink`.
///
/// # Errors
/// When the memory cannot be read or the sink does not take it.
pub fn write(memory: &TaskMemory, pages: &Pages, selection: &Selection, sink: &mut dyn PageSink) -> Result<Amount> {
    let failed = || Error::new("store memory").task(memory.pid);
    for &run in &selection.parent {
        sink.parent_pages(memory.object, run).with(failed)?;
    }
    let batches = pages::batches(&selection.store, BATCH);
    let (full, filled) = crossbeam::channel::bounded::<(Vec<PageRun>, Vec<u8>)>(AHEAD);
    let (empty, spare) = crossbeam::channel::bounded::<Vec<u8>>(AHEAD + 2);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            let full = full;
            for batch in batches {
                let bytes: u64 = batch.iter().map(PageRun::bytes).sum();
                let mut buffer = spare.try_recv().unwrap_or_else(|_| vec![0; BATCH]);
                if let Err(error) = pages.read(&batch, &mut buffer[..bytes as usize]) {
                    *failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(error);
                    return;
                }
                if full.send((batch, buffer)).is_err() {
                    return;
                }
            }
        });
        for (batch, buffer) in filled {
            let mut at = 0;
            for run in batch {
                let end = at + run.pages as usize * PAGE_SIZE;
                sink.write_pages(memory.object, run, &buffer[at..end]).with(failed)?;
                at = end;
            }
            let _ = empty.try_send(buffer);
        }
        Ok(())
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        return Err(error);
    }
    result?;
    let count = |runs: &[PageRun]| runs.iter().map(|run| run.pages).sum::<u64>();
    let (written, parent) = (count(&selection.store), count(&selection.parent));
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
    let mut buffer = vec![0u8; BATCH];
    for batch in pages::batches(&set.runs(), BATCH) {
        go_on()?;
        let bytes: u64 = batch.iter().map(PageRun::bytes).sum();
        if reader.read(&batch, &mut buffer[..bytes as usize]).is_err() {
            // Part of it was unmapped meanwhile: page by page, what is gone is left out. The next look finds it gone.
            send_single_pages(&reader, object, &batch, sink)?;
            continue;
        }
        let mut at = 0;
        for run in batch {
            let end = at + run.bytes() as usize;
            sink.write_pages(object, run, &buffer[at..end])
                .context("store memory")?;
            at = end;
        }
    }
    Ok(())
}

fn send_single_pages(reader: &Pages, object: MemoryObject, batch: &[PageRun], sink: &mut dyn PageSink) -> Result<()> {
    let mut page = [0u8; PAGE_SIZE];
    for run in batch {
        for index in 0..run.pages {
            let one = PageRun {
                start: run.start + index * PAGE_SIZE as u64,
                pages: 1,
            };
            if reader.read(&[one], &mut page).is_ok() {
                sink.write_pages(object, one, &page).context("store memory")?;
            }
        }
    }
    Ok(())
}
