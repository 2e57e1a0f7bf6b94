//! Sending pages: collected into batches by the caller's threads, encoded by threads of the sender, sent by the runtime.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use crossbeam::channel;
use whimbrel_images::page::{MemoryObject, PageRun, PageSink};

use super::{Compression, Error, Session, lock, session::Shared};
use crate::{
    batch::{Builder, Codec, RawBatch, RunKind, delta::Cache},
    proto::Capability,
};

/// What was sent since the sender was made or the last round was finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundStats {
    /// Pages whose bytes were sent.
    pub pages: u64,
    /// Pages that were found or said to be zeros.
    pub zero_pages: u64,
    /// Pages that were said not to have changed since the parent.
    pub parent_pages: u64,
    /// Batches.
    pub batches: u64,
    /// Bytes of the pages in `pages`.
    pub raw_bytes: u64,
    /// Bytes of the encoded batches.
    pub wire_bytes: u64,
}

#[derive(Debug, Default)]
struct Counters {
    pages: AtomicU64,
    zero_pages: AtomicU64,
    parent_pages: AtomicU64,
    batches: AtomicU64,
    raw_bytes: AtomicU64,
    wire_bytes: AtomicU64,
}

impl Counters {
    fn take(&self) -> RoundStats {
        RoundStats {
            pages: self.pages.swap(0, Relaxed),
            zero_pages: self.zero_pages.swap(0, Relaxed),
            parent_pages: self.parent_pages.swap(0, Relaxed),
            batches: self.batches.swap(0, Relaxed),
            raw_bytes: self.raw_bytes.swap(0, Relaxed),
            wire_bytes: self.wire_bytes.swap(0, Relaxed),
        }
    }

    fn count(&self, batch: &RawBatch) {
        for (run, kind) in &batch.runs {
            let counter = match kind {
                RunKind::Data | RunKind::Delta => &self.pages,
                RunKind::Zero | RunKind::Gone => &self.zero_pages,
                RunKind::Parent => &self.parent_pages,
            };
            counter.fetch_add(run.pages, Relaxed);
        }
        self.batches.fetch_add(1, Relaxed);
        self.raw_bytes.fetch_add(batch.content.len() as u64, Relaxed);
    }
}

struct Job {
    sequence: u64,
    batch: RawBatch,
    checksum: u64,
    has_deltas: bool,
}

struct Core {
    session: Session,
    jobs: channel::Sender<Job>,
    builders: Mutex<Vec<Arc<Mutex<Builder>>>>,
    /// Guards the order of numbers and of what the cache has seen.
    delta: Option<Mutex<Cache>>,
    counters: Arc<Counters>,
    batch_bytes: usize,
}

/// Sends pages to the peer of a session. All calls block while the peer has as much unapplied as it is willing to hold.
///
/// Each thread uses a clone of its own: what goes through one clone arrives in its order; between clones there is no order
/// until [`PageSender::finish_round`].
pub struct PageSender {
    core: Arc<Core>,
    builder: Arc<Mutex<Builder>>,
}

impl std::fmt::Debug for PageSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageSender({:?})", self.core.session.shared())
    }
}

impl Clone for PageSender {
    fn clone(&self) -> Self {
        Self::with_core(self.core.clone())
    }
}

impl PageSender {
    pub(super) fn new(session: Session) -> Self {
        let shared = session.shared().clone();
        let workers = shared.options.workers.max(1);
        let (jobs, queue) = channel::bounded(workers * 2);
        let counters = Arc::new(Counters::default());
        for index in 0..workers {
            let (queue, shared, counters) = (queue.clone(), shared.clone(), counters.clone());
            let thread = std::thread::Builder::new().name(format!("whimbrel-enc{index}"));
            thread
                .spawn(move || encode_all(&queue, &shared, &counters))
                .expect("a thread can be started");
        }
        let peer_limit = shared.lock().state.peer_limits().batch_bytes as usize;
        let batch_bytes = shared.options.batch_bytes.min(peer_limit);
        let delta = (shared.delta_pages > 0).then(|| Mutex::new(Cache::new(shared.delta_pages)));
        Self::with_core(Arc::new(Core {
            session,
            jobs,
            builders: Mutex::default(),
            delta,
            counters,
            batch_bytes,
        }))
    }

    fn with_core(core: Arc<Core>) -> Self {
        let builder = Arc::new(Mutex::new(Builder::new(core.batch_bytes)));
        lock(&core.builders).push(builder.clone());
        Self { core, builder }
    }

    /// Sends everything that was written through any clone, and waits until the peer has applied it.
    ///
    /// # Errors
    /// When the session failed. The error is the same for every later call.
    pub fn finish_round(&self) -> Result<RoundStats, Error> {
        let builders: Vec<_> = lock(&self.core.builders).clone();
        for builder in &builders {
            self.core.flush(builder)?;
        }
        drop(builders);
        // Only the list knows the others: their clones are gone.
        lock(&self.core.builders).retain(|builder| Arc::strong_count(builder) > 1);
        let shared = self.core.session.shared();
        let (last, _) = shared.lock().state.batch_progress();
        shared.wait_blocking(|inner| {
            if inner.state.batch_progress().1 >= last {
                Some(Ok(()))
            } else {
                inner.check().err().map(Err)
            }
        })?;
        Ok(self.core.counters.take())
    }

    /// Sends what this clone has collected, without waiting for anything but room.
    ///
    /// # Errors
    /// As [`PageSender::finish_round`].
    pub fn flush(&self) -> Result<(), Error> {
        self.core.flush(&self.builder)
    }

    /// The session that the pages go to.
    pub fn session(&self) -> &Session {
        &self.core.session
    }
}

impl Core {
    fn flush(&self, builder: &Mutex<Builder>) -> Result<(), Error> {
        // The lock is held until the batch has its number: it says what comes first.
        let mut builder = lock(builder);
        builder.take().map_or(Ok(()), |batch| self.submit(batch))
    }

    fn submit(&self, mut batch: RawBatch) -> Result<(), Error> {
        let shared = self.session.shared();
        self.counters.count(&batch);
        let job = match &self.delta {
            None => {
                let sequence = shared.reserve_batch_blocking()?;
                // The checksum is left to the encoder.
                Job {
                    sequence,
                    batch,
                    checksum: 0,
                    has_deltas: false,
                }
            }
            Some(cache) => {
                let mut cache = lock(cache);
                let sequence = shared.reserve_batch_blocking()?;
                let (checksum, has_deltas) = cache.difference(&mut batch, sequence);
                Job {
                    sequence,
                    batch,
                    checksum,
                    has_deltas,
                }
            }
        };
        self.jobs.send(job).map_err(|_| Error::Closed)
    }
}

impl PageSink for PageSender {
    fn write_pages(&mut self, object: MemoryObject, run: PageRun, data: &[u8]) -> io::Result<()> {
        check(run, Some(data))?;
        let core = &self.core;
        Ok(lock(&self.builder).push_data(object, run, data, |batch| core.submit(batch))?)
    }

    fn zeros(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        self.send_empty(object, run, RunKind::Zero)
    }

    fn zero_pages(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        self.send_empty(object, run, RunKind::Gone)
    }

    fn parent_pages(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        self.send_empty(object, run, RunKind::Parent)
    }
}

impl PageSender {
    fn send_empty(&mut self, object: MemoryObject, run: PageRun, kind: RunKind) -> io::Result<()> {
        check(run, None)?;
        let core = &self.core;
        Ok(lock(&self.builder).push_empty(object, run, kind, |batch| core.submit(batch))?)
    }
}

fn check(run: PageRun, data: Option<&[u8]>) -> io::Result<()> {
    let fits = data.is_none_or(|data| data.len() as u64 == run.bytes());
    if crate::proto::fault::is_valid_run(run) && fits {
        return Ok(());
    }
    let text = format!(
        "{} pages at {:#x} are unaligned, empty, or not as long as their data",
        run.pages, run.start
    );
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

fn encode_all(queue: &channel::Receiver<Job>, shared: &Shared, counters: &Counters) {
    let may_compress = shared.capabilities().has(Capability::Zstd);
    for Job {
        sequence,
        batch,
        checksum,
        has_deltas,
    } in queue
    {
        let codec = match shared.options.compression {
            _ if !may_compress => Codec::Raw,
            // A difference is mostly zeros: without compression it would have been for nothing.
            Compression::Off | Compression::Adaptive if has_deltas => Codec::Zstd(1),
            Compression::Off => Codec::Raw,
            Compression::Level(level) => Codec::Zstd(level),
            Compression::Adaptive => lock(&shared.meter).next_codec(),
        };
        let checksum = if shared.delta_pages > 0 {
            checksum
        } else {
            batch.checksum(sequence)
        };
        let begun = Instant::now();
        let encoded = batch.encode_with_checksum(sequence, codec, checksum);
        if let Codec::Zstd(level) = codec {
            lock(&shared.meter).compressed(level, batch.content.len(), encoded.len(), begun.elapsed());
        }
        let (pages, others) = batch.page_counts();
        drop(batch);
        counters.wire_bytes.fetch_add(encoded.len() as u64, Relaxed);
        metrics::counter!("whimbrel_batches_sent_total").increment(1);
        metrics::counter!("whimbrel_pages_sent_total", "kind" => "data").increment(pages);
        metrics::counter!("whimbrel_pages_sent_total", "kind" => "empty").increment(others);
        metrics::counter!("whimbrel_batch_bytes_sent_total").increment(encoded.len() as u64);
        shared.send_batch(sequence, encoded.into());
    }
}
