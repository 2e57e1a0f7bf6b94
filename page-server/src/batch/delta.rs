//! Differences to the page sent before, for pages that are sent again because a little of them changed.
//!
//! Both ends hold a cache of the pages sent last. It is direct-mapped: the place of a page follows from its address
//! alone, and a page that comes replaces the one that is there. So the two caches hold the same, as long as both ends
//! see the data pages of the session in the same order; batches are numbered where the sender's cache is updated and
//! applied in the order of their numbers.

use bytes::{Bytes, BytesMut};
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Batch, BatchError, RawBatch, RunKind};
use crate::proto::fault::object_to_wire;

type Page = [u8; PAGE_SIZE];

/// The last version of recently sent pages; the same at both ends.
pub struct Cache {
    slots: Vec<Option<(MemoryObject, u64, Box<Page>)>>,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cache({} slots)", self.slots.len())
    }
}

impl Cache {
    /// A cache of at most `pages` pages; both ends must agree on the number.
    pub fn new(pages: usize) -> Self {
        Self {
            slots: (0..pages.max(1)).map(|_| None).collect(),
        }
    }

    /// Sender: replaces pages that were sent before by their difference, and remembers all of them. Returns the checksum
    /// of the batch and whether there is any difference in it.
    pub fn difference(&mut self, batch: &mut RawBatch, sequence: u64) -> (u64, bool) {
        let mut runs = Vec::with_capacity(batch.runs.len());
        let known = |cache: &Self, start| matches!(cache.slot(batch.object, start), Some((o, s, _)) if (*o, *s) == (batch.object, start));
        // First the kinds, since the checksum is over the runs as they are sent and the pages as they are.
        for &(run, kind) in &batch.runs {
            if kind != RunKind::Data {
                push_merged(&mut runs, run, kind);
                continue;
            }
            for start in page_starts(run) {
                let kind = if known(self, start) {
                    RunKind::Delta
                } else {
                    RunKind::Data
                };
                push_merged(&mut runs, PageRun { start, pages: 1 }, kind);
            }
        }
        // Splitting made too many runs: send the batch as it was, and still remember it.
        let split = runs.len() <= super::MAX_RUNS;
        if split {
            batch.runs = runs;
        }
        let checksum = batch.checksum(sequence);
        let mut any = false;
        let mut pages = batch.content.as_chunks_mut::<PAGE_SIZE>().0.iter_mut();
        for &(run, kind) in batch.runs.iter().filter(|(_, kind)| kind.has_content()) {
            for (start, page) in page_starts(run).zip(&mut pages) {
                let slot = self.slot_mut(batch.object, start);
                match slot {
                    // A page of this very batch may have taken the slot since; the receiver sees it the same way,
                    // so what counts is the kind that was written down.
                    Some((_, _, old)) if kind == RunKind::Delta => {
                        any = true;
                        xor_swap(old, page);
                        let entry = slot.as_mut().expect("matched above");
                        (entry.0, entry.1) = (batch.object, start);
                    }
                    _ => remember(slot, batch.object, start, page),
                }
            }
        }
        (checksum, any)
    }

    /// Receiver: turns differences back into pages, verifies the checksum, and remembers all pages.
    ///
    /// # Errors
    /// When the batch refers to a page that is not here, or the pages are not what was sent.
    pub fn restore(&mut self, batch: &mut Batch) -> Result<(), BatchError> {
        let deltas = batch.has_deltas();
        let mut content = if deltas {
            BytesMut::from(&batch.content[..])
        } else {
            BytesMut::new()
        };
        let mut offset = 0;
        for &(run, kind) in batch.runs.iter().filter(|(_, kind)| kind.has_content()) {
            for start in page_starts(run) {
                let slot = self.slot_mut(batch.object, start);
                if kind == RunKind::Delta {
                    let page = content[offset..]
                        .first_chunk_mut::<PAGE_SIZE>()
                        .expect("checked by the decoder");
                    let (object, address, old) = slot.as_mut().ok_or(BatchError::NoBase { start })?;
                    old.iter_mut()
                        .zip(page.iter())
                        .for_each(|(old, difference)| *old ^= difference);
                    page.copy_from_slice(&old[..]);
                    (*object, *address) = (batch.object, start);
                } else {
                    let page = batch.content[offset..]
                        .first_chunk::<PAGE_SIZE>()
                        .expect("checked by the decoder");
                    remember(slot, batch.object, start, page);
                }
                offset += PAGE_SIZE;
            }
        }
        if deltas {
            batch.verify(&content)?;
            batch.content = Bytes::from(content);
            batch
                .runs
                .iter_mut()
                .filter(|(_, k)| *k == RunKind::Delta)
                .for_each(|(_, kind)| *kind = RunKind::Data);
        }
        Ok(())
    }

    fn slot(&self, object: MemoryObject, start: u64) -> &Option<(MemoryObject, u64, Box<Page>)> {
        &self.slots[index(object, start, self.slots.len())]
    }

    fn slot_mut(&mut self, object: MemoryObject, start: u64) -> &mut Option<(MemoryObject, u64, Box<Page>)> {
        let at = index(object, start, self.slots.len());
        &mut self.slots[at]
    }
}

/// Neighbouring pages get neighbouring places, so that an object smaller than the cache never evicts itself.
fn index(object: MemoryObject, start: u64, slots: usize) -> usize {
    let (kind, id) = object_to_wire(object);
    let base = xxh3_64_with_seed(&id.to_le_bytes(), u64::from(kind));
    ((base.wrapping_add(start / PAGE_SIZE as u64)) % slots as u64) as usize
}

fn page_starts(run: PageRun) -> impl Iterator<Item = u64> {
    (0..run.pages).map(move |page| run.start + page * PAGE_SIZE as u64)
}

fn push_merged(runs: &mut Vec<(PageRun, RunKind)>, run: PageRun, kind: RunKind) {
    match runs.last_mut() {
        Some((last, last_kind)) if *last_kind == kind && last.end() == run.start => last.pages += run.pages,
        _ => runs.push((run, kind)),
    }
}

/// `old` becomes `page`, `page` becomes the difference.
fn xor_swap(old: &mut Page, page: &mut Page) {
    for (old, new) in old.iter_mut().zip(page.iter_mut()) {
        (*old, *new) = (*new, *old ^ *new);
    }
}

fn remember(slot: &mut Option<(MemoryObject, u64, Box<Page>)>, object: MemoryObject, start: u64, page: &Page) {
    match slot {
        Some((slot_object, slot_start, old)) => {
            (*slot_object, *slot_start) = (object, start);
            **old = *page;
        }
        None => *slot = Some((object, start, Box::new(*page))),
    }
}
