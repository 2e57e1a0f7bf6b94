//! Incremental dumps by content: a page that the previous images have with the same bytes is not stored again.
//!
//! It needs nothing from the kernel and leaves nothing in the program; the price is reading all memory and its
//! predecessor.

use std::collections::HashMap;
use std::sync::Arc;

use whimbrel::dump::runs::RunSet;
use whimbrel_images::chain::PageStore;
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink, PageSource, PageState};
use whimbrel_images::sink::DirPageSink;

/// A sink that compares with the parent first.
pub struct ComparingSink {
    inner: DirPageSink,
    parent: Arc<PageStore>,
    buffer: Vec<u8>,
    later: HashMap<MemoryObject, RunSet>,
    /// Pages that the parent has.
    pub in_parent: u64,
    /// Pages that differ and are not stored, since they can be asked for.
    pub left: HashMap<MemoryObject, Vec<PageRun>>,
}

impl ComparingSink {
    /// Stores into `inner` what `parent` does not have.
    pub fn new(inner: DirPageSink, parent: Arc<PageStore>) -> ComparingSink {
        ComparingSink {
            inner: inner.with_parent(parent.clone()),
            parent,
            buffer: Vec::new(),
            later: HashMap::new(),
            in_parent: 0,
            left: HashMap::new(),
        }
    }

    /// Of these pages, those that differ are not stored but left to be fetched on demand.
    pub fn leave(&mut self, object: MemoryObject, pages: RunSet) {
        self.later.insert(object, pages);
    }

    fn store(&mut self, object: MemoryObject, run: PageRun, data: &[u8]) -> std::io::Result<()> {
        let whole = RunSet::from_runs(&[run]);
        let later = self
            .later
            .get(&object)
            .map(|later| later.intersect(&whole))
            .unwrap_or_default();
        for part in later.runs() {
            self.inner.lazy_pages(object, part)?;
            self.left.entry(object).or_default().push(part);
        }
        for part in whole.subtract(&later).runs() {
            let at = (part.start - run.start) as usize;
            let bytes = &data[at..at + part.bytes() as usize];
            self.inner.write_pages(object, part, bytes)?;
        }
        Ok(())
    }

    /// The sink behind.
    pub fn into_inner(self) -> DirPageSink {
        self.inner
    }

    /// The sink behind, for what has no bytes.
    pub fn inner(&mut self) -> &mut DirPageSink {
        &mut self.inner
    }
}

impl PageSink for ComparingSink {
    fn write_pages(&mut self, object: MemoryObject, run: PageRun, data: &[u8]) -> std::io::Result<()> {
        self.buffer.resize(data.len(), 0);
        let states = self.parent.read_pages(object, run, &mut self.buffer)?;
        // Over a private file mapping, a page of zeros differs from one that is not there: only bytes count.
        let pages = data.chunks_exact(PAGE_SIZE).zip(self.buffer.chunks_exact(PAGE_SIZE));
        let same: Vec<bool> = pages
            .zip(&states)
            .map(|((new, old), state)| *state == PageState::Data && new == old)
            .collect();
        let mut at = 0;
        for group in same.chunk_by(|a, b| a == b) {
            let part = PageRun {
                start: run.start + (at * PAGE_SIZE) as u64,
                pages: group.len() as u64,
            };
            if group[0] {
                self.inner.parent_pages(object, part)?;
                self.in_parent += part.pages;
            } else {
                let bytes = &data[at * PAGE_SIZE..(at + group.len()) * PAGE_SIZE];
                self.store(object, part, bytes)?;
            }
            at += group.len();
        }
        Ok(())
    }

    fn zero_pages(&mut self, object: MemoryObject, run: PageRun) -> std::io::Result<()> {
        self.inner.zero_pages(object, run)
    }

    fn parent_pages(&mut self, object: MemoryObject, run: PageRun) -> std::io::Result<()> {
        self.inner.parent_pages(object, run)
    }
}
