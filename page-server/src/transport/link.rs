//! The tasks that carry a session over one connection.

use std::sync::{Arc, Weak};

use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use tokio::sync::{Semaphore, mpsc};

use super::{
    Error, PathStats,
    connection::{CLOSE_BROKEN, CLOSE_PROTOCOL, Wire},
    session::Shared,
};
use crate::{
    batch::{self, Batch},
    proto::{
        ProtocolError, STREAM_BATCH, STREAM_BLOB,
        frame::encode,
        link::{Link, LinkEvent},
        session::Item,
        wire::{Control, control::Kind},
    },
};

/// What goes on a unidirectional stream.
enum Bulk {
    Batch(Bytes),
    Blob(u64, Bytes),
}

/// The connection as the session sees it. The queues are bounded by the session's windows.
pub(super) struct LinkHandle {
    quinn: quinn::Connection,
    control: mpsc::UnboundedSender<(Kind, Option<Bulk>)>,
    bulk: mpsc::UnboundedSender<Bulk>,
}

impl LinkHandle {
    /// Sends a control message, and `then` what has been announced by it.
    fn send(&self, kind: Kind, then: Option<Bulk>) {
        // Fails only when the connection is lost, which its tasks report.
        let _ = self.control.send((kind, then));
    }

    pub(super) fn control(&self, kind: Kind, blob: Option<(u64, Bytes)>) {
        self.send(kind, blob.map(|(item, bytes)| Bulk::Blob(item, bytes)));
    }

    /// Sends a message, or announces a blob and then sends it. Not the other way round: bytes that are not announced are
    /// not read, and could fill the connection's window until the announcement does not fit.
    pub(super) fn item(&self, number: u64, item: &Item) {
        let blob = match item {
            Item::Blob { bytes, .. } if !bytes.is_empty() => Some((number, bytes.clone())),
            _ => None,
        };
        self.control(item.control(number), blob);
    }

    pub(super) fn batch(&self, bytes: Bytes) {
        let _ = self.bulk.send(Bulk::Batch(bytes));
    }

    pub(super) fn path(&self) -> PathStats {
        let stats = self.quinn.stats();
        PathStats {
            rtt: stats.path.rtt,
            congestion_window: stats.path.cwnd,
            mtu: stats.path.current_mtu,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
        }
    }

    pub(super) fn close(&self, code: u32, reason: &str) {
        let end = (0..=reason.len().min(500))
            .rev()
            .find(|end| reason.is_char_boundary(*end))
            .unwrap_or(0);
        self.quinn.close(code.into(), &reason.as_bytes()[..end]);
    }

    /// Waits until the connection has ended.
    pub(super) async fn closed(&self) {
        self.quinn.closed().await;
    }

    /// Ends the connection but not the session.
    pub(super) fn drop_connection(&self, reason: &str) {
        self.close(CLOSE_BROKEN, reason);
    }
}

/// Starts the tasks. They end with the connection, and tell the session how it ended.
pub(super) fn start(shared: &Arc<Shared>, wire: Wire, generation: u64, opening: Vec<Vec<u8>>) -> LinkHandle {
    let Wire {
        quinn,
        send,
        receive,
        link,
        ..
    } = wire;
    let (control, control_queue) = mpsc::unbounded_channel();
    let (bulk, bulk_queue) = mpsc::unbounded_channel();
    let weak = Arc::downgrade(shared);
    let handle = &shared.handle;
    handle.spawn(write_control(send, opening, control_queue, bulk.clone()));
    handle.spawn(write_bulk(quinn.clone(), bulk_queue));
    handle.spawn(read_control(weak.clone(), generation, quinn.clone(), receive, link));
    handle.spawn(read_bulk(
        weak.clone(),
        generation,
        quinn.clone(),
        shared.options.workers,
    ));
    let connection = quinn.clone();
    handle.spawn(async move {
        let error = connection.closed().await;
        if let Some(shared) = weak.upgrade() {
            shared.link_lost(generation, error);
        }
    });
    LinkHandle { quinn, control, bulk }
}

async fn write_control(
    mut stream: SendStream,
    opening: Vec<Vec<u8>>,
    mut queue: mpsc::UnboundedReceiver<(Kind, Option<Bulk>)>,
    bulk: mpsc::UnboundedSender<Bulk>,
) {
    for bytes in opening {
        if stream.write_all(&bytes).await.is_err() {
            return;
        }
    }
    while let Some((kind, then)) = queue.recv().await {
        let frame = encode(&Control { kind: Some(kind) });
        if stream.write_chunk(frame.into()).await.is_err() {
            return;
        }
        if let Some(then) = then {
            let _ = bulk.send(then);
        }
    }
}

async fn write_bulk(quinn: quinn::Connection, mut queue: mpsc::UnboundedReceiver<Bulk>) {
    while let Some(bulk) = queue.recv().await {
        // Waits while the peer allows no more streams.
        let Ok(stream) = quinn.open_uni().await else { return };
        tokio::spawn(async move {
            // A failure is the connection's, or the peer does not want it: it has it already.
            if let Err(error) = write_one(stream, bulk).await {
                tracing::debug!("bulk stream ended early: {error}");
            }
        });
    }
}

async fn write_one(mut stream: SendStream, bulk: Bulk) -> Result<(), quinn::WriteError> {
    let (head, body) = match bulk {
        Bulk::Batch(bytes) => (Bytes::from_static(&[STREAM_BATCH]), bytes),
        Bulk::Blob(item, bytes) => {
            let _ = stream.set_priority(1);
            let head = [&[STREAM_BLOB], &item.to_le_bytes()[..]].concat();
            (head.into(), bytes)
        }
    };
    stream.write_all_chunks(&mut [head, body]).await?;
    let _ = stream.finish();
    // Dropping a finished stream does not reset it.
    Ok(())
}

async fn read_control(
    shared: Weak<Shared>,
    generation: u64,
    quinn: quinn::Connection,
    mut stream: RecvStream,
    mut link: Link,
) {
    let deliver = |link: &mut Link| -> Result<(), ProtocolError> {
        while let Some(event) = link.poll() {
            let (LinkEvent::Session(kind), Some(shared)) = (event, shared.upgrade()) else {
                continue;
            };
            shared.on_control(generation, kind)?;
        }
        Ok(())
    };
    loop {
        let result = deliver(&mut link);
        let result = match result {
            Ok(()) => match stream.read_chunk(256 << 10, true).await {
                Ok(Some(chunk)) => link.receive(&chunk.bytes),
                // The task that waits for the end reports it. Closing once more would hide the peer's reason.
                Err(quinn::ReadError::ConnectionLost(_)) => return,
                Ok(None) | Err(_) => {
                    // Without its control stream the connection is of no use.
                    quinn.close(CLOSE_BROKEN.into(), b"control stream ended");
                    return;
                }
            },
            error => error,
        };
        if let Err(error) = result {
            report(&shared, &quinn, error);
            return;
        }
    }
}

/// The peer broke the protocol: that ends the session, not only the connection.
fn report(shared: &Weak<Shared>, quinn: &quinn::Connection, error: ProtocolError) {
    match shared.upgrade() {
        Some(shared) => shared.protocol_error(error),
        None => quinn.close(CLOSE_PROTOCOL.into(), error.to_string().as_bytes()),
    }
}

async fn read_bulk(shared: Weak<Shared>, generation: u64, quinn: quinn::Connection, workers: usize) {
    let decoders = Arc::new(Semaphore::new(workers.max(1)));
    // The number of tasks is bounded by the streams that the peer may open.
    while let Ok(stream) = quinn.accept_uni().await {
        super::endpoint::fit_window(&quinn);
        let (shared, quinn, decoders) = (shared.clone(), quinn.clone(), decoders.clone());
        tokio::spawn(async move {
            if let Err(error) = read_one(&shared, generation, stream, &decoders).await {
                report(&shared, &quinn, error);
            }
        });
    }
}

async fn read_one(
    shared: &Weak<Shared>,
    generation: u64,
    mut stream: RecvStream,
    decoders: &Semaphore,
) -> Result<(), ProtocolError> {
    let mut kind = [0];
    if stream.read_exact(&mut kind).await.is_err() {
        return Ok(());
    }
    match kind[0] {
        STREAM_BATCH => read_batch(shared, stream, decoders).await,
        STREAM_BLOB => read_blob(shared, generation, stream).await,
        // A kind from the future. Dropping the stream tells the peer to stop.
        _ => Ok(()),
    }
}

async fn read_batch(shared: &Weak<Shared>, mut stream: RecvStream, decoders: &Semaphore) -> Result<(), ProtocolError> {
    let Some(limit) = shared
        .upgrade()
        .map(|shared| shared.options.limits.batch_bytes as usize)
    else {
        return Ok(());
    };
    let bytes = match stream.read_to_end(batch::max_encoded(limit)).await {
        Ok(bytes) => Bytes::from(bytes),
        Err(quinn::ReadToEndError::TooLong) => {
            let (size, limit) = (batch::max_encoded(limit) as u64 + 1, batch::max_encoded(limit) as u64);
            return Err(ProtocolError::OverLimit {
                what: "encoded batch",
                size,
                limit,
            });
        }
        // The connection is lost; the batch comes again on the next one.
        Err(quinn::ReadToEndError::Read(_)) => return Ok(()),
    };
    let _permit = decoders.acquire().await.expect("never closed");
    metrics::counter!("whimbrel_batch_bytes_received_total").increment(bytes.len() as u64);
    let decoded = tokio::task::spawn_blocking(move || Batch::decode(&bytes, limit))
        .await
        .expect("does not panic");
    let Some(shared) = shared.upgrade() else { return Ok(()) };
    match decoded {
        Ok(batch) => {
            let arrived = shared.lock().state.batch_arrived(batch.sequence, batch)?;
            if arrived {
                shared.wake();
            }
        }
        Err(source) => {
            let tell = (CLOSE_PROTOCOL, source.to_string());
            shared.fail(
                Error::Batch {
                    address: shared.peer().address,
                    source,
                },
                Some(tell),
            );
        }
    }
    Ok(())
}

async fn read_blob(shared: &Weak<Shared>, generation: u64, mut stream: RecvStream) -> Result<(), ProtocolError> {
    let mut number = [0; 8];
    if stream.read_exact(&mut number).await.is_err() {
        return Ok(());
    }
    let item = u64::from_le_bytes(number);
    let Some(strong) = shared.upgrade() else { return Ok(()) };
    // Nothing is read before it is known how much there will be.
    let wait = strong.wait(|inner| {
        let gone = !inner.is_current(generation);
        (gone || inner.state.is_announced(item)).then(|| inner.state.awaited_blob(item))
    });
    let Some(length) = wait.await else { return Ok(()) };
    drop(strong);
    match stream.read_to_end(usize::try_from(length).unwrap_or(usize::MAX)).await {
        Ok(bytes) => {
            let Some(shared) = shared.upgrade() else { return Ok(()) };
            shared.lock().state.blob_arrived(item, bytes.into())?;
            shared.wake();
            Ok(())
        }
        Err(quinn::ReadToEndError::TooLong) => Err(ProtocolError::OverLimit {
            what: "blob",
            size: length.saturating_add(1),
            limit: length,
        }),
        Err(quinn::ReadToEndError::Read(_)) => Ok(()),
    }
}
