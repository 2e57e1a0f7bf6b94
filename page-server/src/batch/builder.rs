//! The sending side of a batch: pages are collected, zero pages vanish, then the whole is encoded.

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun};

use super::{Codec, HEADER_BYTES, MAGIC, MAX_RUNS, RUN_BYTES, RunKind, checksum, count_pages, run_to_wire};
use crate::proto::fault::object_to_wire;

/// Whether a page holds only zeros. Stops at the first 256 bytes that do not.
pub fn is_zero_page(page: &[u8]) -> bool {
    let (blocks, rest) = page.as_chunks::<256>();
    let block_is_zero = |block: &[u8; 256]| {
        let words = block.as_chunks::<16>().0.iter().map(|word| u128::from_ne_bytes(*word));
        words.fold(0, |all, word| all | word) == 0
    };
    blocks.iter().all(block_is_zero) && rest.iter().all(|byte| *byte == 0)
}

/// Collects pages of one object until there are enough for a batch.
#[derive(Debug)]
pub struct Builder {
    capacity: usize,
    object: MemoryObject,
    runs: Vec<(PageRun, RunKind)>,
    content: Vec<u8>,
}

impl Builder {
    /// A builder of batches with at most `capacity` bytes of content (at least one page).
    pub fn new(capacity: usize) -> Self {
        let capacity = (capacity / PAGE_SIZE).max(1) * PAGE_SIZE;
        Self {
            capacity,
            object: MemoryObject::Task(0),
            runs: Vec::new(),
            content: Vec::new(),
        }
    }

    /// Whether nothing has been collected.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Takes pages with their bytes, and hands full batches to `full`.
    ///
    /// # Errors
    /// Those of `full`; the pages after the failed batch are lost.
    pub fn push_data<E>(
        &mut self,
        object: MemoryObject,
        run: PageRun,
        data: &[u8],
        mut full: impl FnMut(RawBatch) -> Result<(), E>,
    ) -> Result<(), E> {
        for (index, page) in data.chunks_exact(PAGE_SIZE).enumerate() {
            let start = run.start.wrapping_add((index * PAGE_SIZE) as u64);
            if is_zero_page(page) {
                self.push_run(object, PageRun { start, pages: 1 }, RunKind::Zero, &mut full)?;
            } else {
                if self.content.len() + PAGE_SIZE > self.capacity
                    && let Some(batch) = self.take()
                {
                    full(batch)?;
                }
                self.push_run(object, PageRun { start, pages: 1 }, RunKind::Data, &mut full)?;
                if self.content.capacity() == 0 {
                    self.content.reserve_exact(self.capacity);
                }
                self.content.extend_from_slice(page);
            }
        }
        Ok(())
    }

    /// Takes pages without bytes.
    ///
    /// # Errors
    /// Those of `full`.
    pub fn push_empty<E>(
        &mut self,
        object: MemoryObject,
        run: PageRun,
        kind: RunKind,
        mut full: impl FnMut(RawBatch) -> Result<(), E>,
    ) -> Result<(), E> {
        debug_assert!(!kind.has_content());
        self.push_run(object, run, kind, &mut full)
    }

    /// What was collected, if anything was.
    pub fn take(&mut self) -> Option<RawBatch> {
        if self.runs.is_empty() {
            return None;
        }
        let (runs, content) = (std::mem::take(&mut self.runs), std::mem::take(&mut self.content));
        Some(RawBatch {
            object: self.object,
            runs,
            content,
        })
    }

    fn push_run<E>(
        &mut self,
        object: MemoryObject,
        run: PageRun,
        kind: RunKind,
        full: &mut impl FnMut(RawBatch) -> Result<(), E>,
    ) -> Result<(), E> {
        if object != self.object || self.runs.len() == MAX_RUNS {
            if let Some(batch) = self.take() {
                full(batch)?;
            }
            self.object = object;
        }
        match self.runs.last_mut() {
            Some((last, last_kind)) if *last_kind == kind && last.end() == run.start => last.pages += run.pages,
            _ => self.runs.push((run, kind)),
        }
        Ok(())
    }
}

/// What goes into one batch.
#[derive(Clone, PartialEq, Eq)]
pub struct RawBatch {
    /// Whose pages.
    pub object: MemoryObject,
    /// The runs in order.
    pub runs: Vec<(PageRun, RunKind)>,
    /// The bytes of the data runs.
    pub content: Vec<u8>,
}

impl std::fmt::Debug for RawBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "RawBatch({:?}, {} runs, {} bytes)",
            self.object,
            self.runs.len(),
            self.content.len()
        )
    }
}

impl RawBatch {
    /// Number of pages whose bytes are in the content, and number of the others.
    pub fn page_counts(&self) -> (u64, u64) {
        count_pages(&self.runs)
    }

    /// The checksum that goes with the pages. Taken before differences replace them.
    pub fn checksum(&self, sequence: u64) -> u64 {
        checksum(self.object, sequence, &self.runs, &self.content)
    }

    /// Encodes the batch. Falls back to raw where compression does not make it smaller.
    pub fn encode(&self, sequence: u64, codec: Codec) -> Vec<u8> {
        self.encode_with_checksum(sequence, codec, self.checksum(sequence))
    }

    /// Encodes a batch whose content is no longer what the checksum is over.
    pub fn encode_with_checksum(&self, sequence: u64, codec: Codec, checksum: u64) -> Vec<u8> {
        let compressed = match codec {
            Codec::Zstd(level) if !self.content.is_empty() => zstd::bulk::compress(&self.content, level)
                .ok()
                .filter(|packed| packed.len() < self.content.len()),
            _ => None,
        };
        let (codec, payload) = compressed
            .as_deref()
            .map_or((0, &self.content[..]), |packed| (1, packed));
        let (kind, id) = object_to_wire(self.object);
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.runs.len() * RUN_BYTES + payload.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[kind, codec, 0, 0]);
        bytes.extend_from_slice(&id.to_le_bytes());
        bytes.extend_from_slice(&(self.runs.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&sequence.to_le_bytes());
        bytes.extend_from_slice(&(self.content.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&checksum.to_le_bytes());
        for (run, kind) in &self.runs {
            bytes.extend_from_slice(&run_to_wire(*run, *kind));
        }
        bytes.extend_from_slice(payload);
        bytes
    }
}
