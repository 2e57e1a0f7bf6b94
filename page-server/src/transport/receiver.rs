//! Receiving pages: decoded in parallel by the connection's tasks, applied here in the order of their numbers.

use std::{io, sync::Arc, thread};

use tokio::sync::oneshot;
use whimbrel_images::page::PageSink;

use super::{Error, Session, connection::CLOSE_FAILED, session::Shared};
use crate::batch::{Batch, delta::Cache};

/// What was received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReceiveStats {
    /// Pages whose bytes came.
    pub pages: u64,
    /// Zero and parent pages.
    pub empty_pages: u64,
    /// Batches.
    pub batches: u64,
}

type Outcome = (Box<dyn PageSink>, ReceiveStats, Result<(), Error>);

/// Pages are being written into a sink. Dropping the handle does not stop it.
#[derive(Debug)]
pub struct ReceiveHandle(oneshot::Receiver<OutcomeBox>);

struct OutcomeBox(Outcome);

impl std::fmt::Debug for OutcomeBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.0.1)
    }
}

impl ReceiveHandle {
    /// Waits until the peer has finished or the session has failed. Gives the sink back either way.
    pub async fn finished(self) -> (Box<dyn PageSink>, ReceiveStats, Result<(), Error>) {
        self.0.await.expect("the thread answers before it ends").0
    }

    /// As [`ReceiveHandle::finished`], for plain threads.
    pub fn finished_blocking(self) -> (Box<dyn PageSink>, ReceiveStats, Result<(), Error>) {
        self.0.blocking_recv().expect("the thread answers before it ends").0
    }
}

/// The thread holds no [`Session`]: when all handles are dropped, the session ends, and so does the thread.
pub(super) fn start(session: Session, mut sink: Box<dyn PageSink>) -> ReceiveHandle {
    let shared = session.shared().clone();
    shared.lock().receiving = true;
    let (sender, receiver) = oneshot::channel();
    let body = move || {
        let mut stats = ReceiveStats::default();
        let result = receive(&shared, &mut *sink, &mut stats);
        let _ = sender.send(OutcomeBox((sink, stats, result)));
    };
    thread::Builder::new()
        .name("whimbrel-apply".into())
        .spawn(body)
        .expect("a thread can be started");
    ReceiveHandle(receiver)
}

fn receive(shared: &Arc<Shared>, sink: &mut dyn PageSink, stats: &mut ReceiveStats) -> Result<(), Error> {
    let mut cache = (shared.delta_pages > 0).then(|| Cache::new(shared.delta_pages));
    loop {
        let next = shared.wait_blocking(|inner| {
            // What has arrived is applied even if the connection is gone; not if the session failed.
            if let Some((_, batch)) = inner.state.next_batch() {
                return Some(Ok(Some(batch)));
            }
            if inner.state.all_applied() {
                Some(Ok(None))
            } else {
                inner.check().err().map(Err)
            }
        })?;
        let Some(batch) = next else { return Ok(()) };
        let (pages, empty) = batch.page_counts();
        apply(shared, sink, &mut cache, batch)?;
        stats.pages += pages;
        stats.empty_pages += empty;
        stats.batches += 1;
        metrics::counter!("whimbrel_batches_applied_total").increment(1);
        metrics::counter!("whimbrel_pages_received_total", "kind" => "data").increment(pages);
        metrics::counter!("whimbrel_pages_received_total", "kind" => "empty").increment(empty);
        let mut inner = shared.lock();
        let acknowledgement = inner.state.batch_applied();
        inner.control(acknowledgement);
        drop(inner);
        shared.wake();
    }
}

fn apply(
    shared: &Arc<Shared>,
    sink: &mut dyn PageSink,
    cache: &mut Option<Cache>,
    mut batch: Batch,
) -> Result<(), Error> {
    let tell = |text: String| Some((CLOSE_FAILED, text));
    if let Some(cache) = cache
        && let Err(source) = cache.restore(&mut batch)
    {
        let error = Error::Batch {
            address: shared.peer().address,
            source,
        };
        shared.fail(error.clone(), tell(format!("{source}")));
        return Err(error);
    }
    batch.apply(sink).map_err(|source: io::Error| {
        let text = format!("pages of {:?} cannot be stored: {source}", batch.object);
        let error = Error::Sink(Arc::new(source));
        shared.fail(error.clone(), tell(text));
        error
    })
}
