//! Page batches: many runs of pages of one object, as one checked and maybe compressed byte string.
//!
//! ```text
//!  0 magic "WBAT" │ 4 object kind u8 │ 5 codec u8 │ 6 zero u16 │ 8 object id u32 │ 12 runs u32
//! 16 sequence u64 │ 24 content bytes u32 │ 28 payload bytes u32 │ 32 xxh3-64 of object, sequence, runs and content
//! 40 runs, 16 bytes each:  start u64 with the kind in its low three bits │ pages u64
//!    payload: the content, raw or compressed
//!
//! content: the bytes of the data and delta runs in the order of the runs; the others have none.
//! ```
//!
//! All numbers are little endian. For delta runs the payload holds the difference (XOR) to the version sent before; the
//! checksum is over the pages themselves, so it is checked where the difference is undone: see [`delta`].
//!
//! The decoder takes bytes from outside: every size is bounded before anything is allocated, and it never panics.

mod builder;
pub mod delta;
pub mod policy;

use std::io;

use bytes::Bytes;
use whimbrel_images::page::{MemoryObject, PageRun, PageSink};
use xxhash_rust::xxh3::Xxh3;

pub use builder::{Builder, RawBatch, is_zero_page};

use crate::proto::fault::{is_valid_run, object_from_wire, object_to_wire};

/// Bytes before the runs.
pub const HEADER_BYTES: usize = 40;

/// Most runs in one batch.
pub const MAX_RUNS: usize = 16384;

const RUN_BYTES: usize = 16;
/// Of the start of a run: pages begin at larger powers of two.
const KIND_BITS: u64 = 7;
const MAGIC: [u8; 4] = *b"WBAT";

/// Largest encoded batch whose content is at most `content` bytes.
pub fn max_encoded(content: usize) -> usize {
    HEADER_BYTES + MAX_RUNS * RUN_BYTES + content
}

/// What a run of a batch says of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// Their bytes are in the content.
    Data,
    /// They hold nothing but zeros.
    Zero,
    /// They did not change since the parent dump.
    Parent,
    /// Their difference to the version sent before is in the content.
    Delta,
    /// They are not populated.
    Gone,
}

impl RunKind {
    const ALL: [Self; 5] = [Self::Data, Self::Zero, Self::Parent, Self::Delta, Self::Gone];

    fn from_wire(word: u64) -> Option<Self> {
        Self::ALL.get((word & KIND_BITS) as usize).copied()
    }

    fn has_content(self) -> bool {
        matches!(self, Self::Data | Self::Delta)
    }
}

/// How the content of a batch is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As it is.
    Raw,
    /// Compressed with zstd at this level.
    Zstd(i32),
}

/// An encoded batch is not one, or is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// It ends before its header says so.
    #[error("page batch is truncated")]
    Truncated,
    /// It does not begin like a batch, or uses a codec, or a kind of object or run, that is not known.
    #[error("page batch has an unknown {0}")]
    Unknown(&'static str),
    /// A size is over its limit.
    #[error("page batch has {size} {what}, over the limit of {limit}")]
    OverLimit {
        /// What there is too much of.
        what: &'static str,
        /// How much.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// A run is empty, unaligned or wraps around.
    #[error("page batch has a bad run: {pages} pages at {start:#x}")]
    BadRun {
        /// Its first address.
        start: u64,
        /// Its pages.
        pages: u64,
    },
    /// The runs and the content do not fit together.
    #[error("runs of the page batch need {expected} bytes, its content has {actual}")]
    LengthMismatch {
        /// What the runs need.
        expected: u64,
        /// What there is.
        actual: u64,
    },
    /// The compressed content does not decompress to the length it should have.
    #[error("page batch does not decompress")]
    Decompress,
    /// The checksum is wrong.
    #[error("page batch is damaged: its checksum is wrong")]
    Checksum,
    /// A delta run refers to a page that is not in the cache, so the two ends disagree on what was sent.
    #[error("page batch has a difference to a page that was not sent: {start:#x}")]
    NoBase {
        /// Address of the page.
        start: u64,
    },
}

/// A decoded batch.
#[derive(Clone, PartialEq, Eq)]
pub struct Batch {
    /// Whose pages.
    pub object: MemoryObject,
    /// Its place in the session.
    pub sequence: u64,
    /// The runs in order.
    pub runs: Vec<(PageRun, RunKind)>,
    /// The bytes of the data and delta runs.
    pub content: Bytes,
    checksum: u64,
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            object, sequence, runs, ..
        } = self;
        write!(
            f,
            "Batch({object:?}, sequence {sequence}, {} runs, {} bytes)",
            runs.len(),
            self.content.len()
        )
    }
}

impl Batch {
    /// Parses a batch whose content may be at most `max_content` bytes. The checksum is verified unless the batch has
    /// delta runs: then [`delta::Cache::restore`] verifies it.
    ///
    /// # Errors
    /// When it is not a batch, too large or damaged.
    pub fn decode(bytes: &Bytes, max_content: usize) -> Result<Self, BatchError> {
        let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(BatchError::Truncated)?;
        let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
        if header[..4] != MAGIC {
            return Err(BatchError::Unknown("magic"));
        }
        let object = object_from_wire(header[4], u32_at(8)).ok_or(BatchError::Unknown("object kind"))?;
        let (count, content_bytes, payload_bytes) = (u32_at(12) as usize, u32_at(24) as usize, u32_at(28) as usize);
        check_limit("runs", count, MAX_RUNS)?;
        check_limit("bytes of content", content_bytes, max_content)?;
        let payload_start = HEADER_BYTES + count * RUN_BYTES;
        if bytes.len() != payload_start + payload_bytes {
            return Err(BatchError::Truncated);
        }
        let runs = decode_runs(&bytes[HEADER_BYTES..payload_start], content_bytes as u64)?;
        let payload = bytes.slice(payload_start..);
        let content = match header[5] {
            0 => payload,
            1 => Bytes::from(zstd::bulk::decompress(&payload, content_bytes).map_err(|_| BatchError::Decompress)?),
            _ => return Err(BatchError::Unknown("codec")),
        };
        if content.len() != content_bytes {
            return Err(BatchError::LengthMismatch {
                expected: content_bytes as u64,
                actual: content.len() as u64,
            });
        }
        let batch = Self {
            object,
            sequence: u64_at(16),
            runs,
            content,
            checksum: u64_at(32),
        };
        if !batch.has_deltas() {
            batch.verify(&batch.content)?;
        }
        Ok(batch)
    }

    /// Whether [`delta::Cache::restore`] has to be called before the content can be used.
    pub fn has_deltas(&self) -> bool {
        self.runs.iter().any(|(_, kind)| *kind == RunKind::Delta)
    }

    /// Writes the runs to a sink. Delta runs must have been restored.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn apply(&self, sink: &mut dyn PageSink) -> io::Result<()> {
        let mut content = &self.content[..];
        for &(run, kind) in &self.runs {
            match kind {
                RunKind::Data => {
                    let (data, rest) = content.split_at(run.bytes() as usize);
                    content = rest;
                    sink.write_pages(self.object, run, data)?;
                }
                RunKind::Zero => sink.zeros(self.object, run)?,
                RunKind::Gone => sink.zero_pages(self.object, run)?,
                RunKind::Parent => sink.parent_pages(self.object, run)?,
                RunKind::Delta => return Err(io::Error::other(BatchError::NoBase { start: run.start })),
            }
        }
        Ok(())
    }

    /// Number of pages whose bytes are in the content, and number of the others.
    pub fn page_counts(&self) -> (u64, u64) {
        count_pages(&self.runs)
    }

    fn verify(&self, content: &[u8]) -> Result<(), BatchError> {
        let expected = checksum(self.object, self.sequence, &self.runs, content);
        if expected == self.checksum {
            Ok(())
        } else {
            Err(BatchError::Checksum)
        }
    }
}

/// Sequence number of an encoded batch; for the log and for tests.
pub fn peek_sequence(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(16..24)?.try_into().ok()?))
}

fn count_pages(runs: &[(PageRun, RunKind)]) -> (u64, u64) {
    runs.iter().fold((0, 0), |(data, other), (run, kind)| {
        if kind.has_content() {
            (data + run.pages, other)
        } else {
            (data, other.saturating_add(run.pages))
        }
    })
}

fn decode_runs(bytes: &[u8], content_bytes: u64) -> Result<Vec<(PageRun, RunKind)>, BatchError> {
    let mut runs = Vec::with_capacity(bytes.len() / RUN_BYTES);
    let mut expected = 0_u64;
    for entry in bytes.chunks_exact(RUN_BYTES) {
        let word = u64::from_le_bytes(entry[..8].try_into().expect("8 bytes"));
        let pages = u64::from_le_bytes(entry[8..].try_into().expect("8 bytes"));
        let kind = RunKind::from_wire(word).ok_or(BatchError::Unknown("kind of run"))?;
        let run = PageRun {
            start: word & !KIND_BITS,
            pages,
        };
        if !is_valid_run(run) {
            return Err(BatchError::BadRun {
                start: run.start,
                pages,
            });
        }
        if kind.has_content() {
            expected = expected.saturating_add(run.bytes());
        }
        runs.push((run, kind));
    }
    if expected != content_bytes {
        return Err(BatchError::LengthMismatch {
            expected,
            actual: content_bytes,
        });
    }
    Ok(runs)
}

fn check_limit(what: &'static str, size: usize, limit: usize) -> Result<(), BatchError> {
    if size > limit {
        Err(BatchError::OverLimit { what, size, limit })
    } else {
        Ok(())
    }
}

fn run_to_wire(run: PageRun, kind: RunKind) -> [u8; RUN_BYTES] {
    let mut entry = [0; RUN_BYTES];
    entry[..8].copy_from_slice(&(run.start | kind as u64).to_le_bytes());
    entry[8..].copy_from_slice(&run.pages.to_le_bytes());
    entry
}

/// Not over the sizes and the codec: they are checked by their use, and not known yet where the pages are.
fn checksum(object: MemoryObject, sequence: u64, runs: &[(PageRun, RunKind)], content: &[u8]) -> u64 {
    let (kind, id) = object_to_wire(object);
    let mut hash = Xxh3::with_seed(sequence);
    hash.update(&[kind]);
    hash.update(&id.to_le_bytes());
    for (run, kind) in runs {
        hash.update(&run_to_wire(*run, *kind));
    }
    hash.update(content);
    hash.digest()
}

#[cfg(test)]
mod tests;
