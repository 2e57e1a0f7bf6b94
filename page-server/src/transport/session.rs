//! A session: its state outlives the connections that carry it.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::watch;
use whimbrel_images::page::PageSink;

use super::{
    Connection, Error, Options, PageSender, PathStats, PeerInfo, ReceiveHandle, SessionRequest,
    connection::{CLOSE_DONE, CLOSE_FAILED, CLOSE_PROTOCOL, Dialer, Wire},
    endpoint::Common,
    link::{self, LinkHandle},
    lock, receiver,
};
use crate::{
    batch::{Batch, policy::Adaptive},
    proto::{
        Capabilities, ProtocolError, SessionId,
        link::Received as Resumption,
        session::{Item, SessionState},
        wire::{self, control::Kind},
    },
};

/// How long the side that was called waits for the other to close the connection of a complete session.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);

/// What the peer sent, in the order in which it sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// An opaque message of the application.
    Message(Bytes),
    /// A named byte string.
    Blob {
        /// Its name. It comes from the peer: it is not to be used as a path without being checked.
        name: String,
        /// Its bytes.
        bytes: Bytes,
    },
}

/// What all parts of a session share.
pub(super) struct Shared {
    request: SessionRequest,
    peer: PeerInfo,
    capabilities: Capabilities,
    /// Pages both sides remember for differences; 0 is none.
    pub(super) delta_pages: usize,
    pub(super) options: Options,
    pub(super) handle: tokio::runtime::Handle,
    /// Whether this side called the other.
    dialed: bool,
    dialer: Option<Dialer>,
    inner: Mutex<Inner>,
    /// Wakes blocking threads after every change of `inner`.
    condvar: Condvar,
    /// Wakes tasks after every change of `inner`.
    changed: watch::Sender<()>,
    pub(super) meter: Mutex<Adaptive>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Session({} {} with {})",
            self.request.role, self.request.session_id, self.peer
        )
    }
}

pub(super) struct Inner {
    pub(super) state: SessionState<Batch>,
    link: Option<LinkHandle>,
    /// Counts connections, so that what is left of an old one does no harm.
    generation: u64,
    /// Counts losses of the connection.
    losses: u64,
    failure: Option<Error>,
    /// This side wants no more than to see everything acknowledged.
    closing: bool,
    closed: bool,
    /// Whether pages are being applied here.
    pub(super) receiving: bool,
    /// Blobs that came before a message somebody asked for.
    stashed: Vec<Received>,
    /// Since when a sender waits for room in the window.
    full_since: Option<Instant>,
    acknowledged_bytes: u64,
}

impl Inner {
    /// Why nothing more can be done, if so.
    pub(super) fn check(&self) -> Result<(), Error> {
        match &self.failure {
            Some(error) => Err(error.clone()),
            None if self.closed => Err(Error::Closed),
            None => Ok(()),
        }
    }

    /// Whether the connection with this number is the one in use.
    pub(super) fn is_current(&self, generation: u64) -> bool {
        self.generation == generation && self.failure.is_none() && !self.closed
    }

    /// Sends a control message, if there is a connection; what counts is sent again on the next one.
    pub(super) fn control(&self, kind: Kind) {
        if let Some(link) = &self.link {
            link.control(kind, None);
        }
    }
}

impl Shared {
    pub(super) fn new(request: SessionRequest, wire: &Wire, common: &Arc<Common>, dialer: Option<Dialer>) -> Arc<Self> {
        let options = common.options.clone();
        let peer_limits = wire.negotiated.peer_limits;
        let inner = Inner {
            state: SessionState::new(options.limits, peer_limits),
            link: None,
            generation: 0,
            losses: 0,
            failure: None,
            closing: false,
            closed: false,
            receiving: false,
            stashed: Vec::new(),
            full_since: None,
            acknowledged_bytes: 0,
        };
        let capabilities = wire.negotiated.capabilities;
        let delta = capabilities.has(crate::proto::Capability::Delta);
        let delta_pages = if delta {
            options.limits.delta_pages.min(peer_limits.delta_pages) as usize
        } else {
            0
        };
        Arc::new(Self {
            request,
            peer: wire.peer.clone(),
            capabilities,
            delta_pages,
            handle: tokio::runtime::Handle::current(),
            dialed: dialer.is_some(),
            dialer: dialer.filter(|_| options.redial),
            inner: Mutex::new(inner),
            condvar: Condvar::new(),
            changed: watch::Sender::new(()),
            meter: Mutex::new(Adaptive::new(options.workers)),
            options,
        })
    }

    pub(super) fn id(&self) -> SessionId {
        self.request.session_id
    }

    pub(super) fn request(&self) -> SessionRequest {
        self.request
    }

    pub(super) fn peer(&self) -> &PeerInfo {
        &self.peer
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Gives up the connection there is, if any, and says what has arrived in this session. If no other connection
    /// follows, the session fails in time.
    pub(super) fn detach(self: &Arc<Self>) -> Resumption {
        let mut inner = lock(&self.inner);
        if let Some(link) = inner.link.take() {
            link.drop_connection("replaced by a new connection");
            inner.losses += 1;
            let address = self.peer.address;
            let lost = Error::Connection {
                address,
                source: quinn::ConnectionError::LocallyClosed,
            };
            self.handle
                .spawn(wait_for_resumption(Arc::downgrade(self), inner.losses, lost, false));
        }
        inner.generation += 1;
        inner.state.detach();
        inner.state.received()
    }

    /// Whether there is a connection.
    pub(super) fn is_connected(&self) -> bool {
        lock(&self.inner).link.is_some()
    }

    /// Puts the session on a new connection, and sends what the peer lacks. `opening` goes before everything else.
    pub(super) fn attach(
        self: &Arc<Self>,
        wire: Wire,
        peer_has: &Resumption,
        opening: Vec<Vec<u8>>,
    ) -> Result<(), Error> {
        if wire.peer.fingerprint != self.peer.fingerprint {
            let reason = format!(
                "{} has another key than the host this session was opened with",
                wire.peer
            );
            return Err(Error::GivenUp { reason });
        }
        let mut inner = lock(&self.inner);
        inner.check()?;
        if let Some(link) = inner.link.take() {
            link.drop_connection("replaced by a new connection");
            inner.state.detach();
        }
        inner.generation += 1;
        let address = wire.peer.address;
        let resend = inner
            .state
            .attach(peer_has)
            .map_err(|source| Error::Protocol { address, source })?;
        let link = link::start(self, wire, inner.generation, opening);
        // What was acknowledged while there was no connection.
        let received = inner.state.received();
        if received.applied > 0 {
            link.control(
                Kind::Applied(wire::Applied {
                    sequence: received.applied,
                }),
                None,
            );
        }
        if received.consumed > 0 {
            link.control(
                Kind::Consumed(wire::Consumed {
                    item: received.consumed,
                }),
                None,
            );
        }
        for (number, item) in resend.items {
            link.item(number, &item);
        }
        for (_, bytes) in resend.batches {
            link.batch(bytes);
        }
        if let Some(finish) = resend.finish {
            link.control(finish, None);
        }
        inner.link = Some(link);
        if inner.generation > 1 {
            tracing::info!("{self:?} goes on with a new connection");
        }
        self.wake();
        Ok(())
    }

    /// A connection ended. Unless that was the plan, the session waits for the next one.
    pub(super) fn link_lost(self: &Arc<Self>, generation: u64, error: quinn::ConnectionError) {
        let mut inner = lock(&self.inner);
        if inner.generation != generation || inner.link.is_none() || inner.closed || inner.failure.is_some() {
            return;
        }
        inner.link = None;
        inner.state.detach();
        let address = self.peer.address;
        if let quinn::ConnectionError::ApplicationClosed(close) = &error
            && let Some(failure) = self.closed_by_peer(&mut inner, close)
        {
            match failure {
                Ok(()) => self.wake(),
                Err(failure) => self.fail_locked(&mut inner, failure, None),
            }
            return;
        }
        let lost = Error::Connection { address, source: error };
        let timeout = self.options.resume_timeout;
        if timeout.is_zero() {
            self.fail_locked(&mut inner, lost, None);
            return;
        }
        tracing::warn!("{self:?} lost its connection, waiting {timeout:?} for another: {lost:?}");
        inner.losses += 1;
        self.handle
            .spawn(wait_for_resumption(Arc::downgrade(self), inner.losses, lost, true));
        self.wake();
    }

    /// What it means that the peer closed the connection; `None`: only that it is broken.
    fn closed_by_peer(&self, inner: &mut Inner, close: &quinn::ApplicationClose) -> Option<Result<(), Error>> {
        let reason = || String::from_utf8_lossy(&close.reason).into_owned();
        match u32::try_from(u64::from(close.error_code)).ok()? {
            // The peer closes like this only when it has taken everything, this side's end included, and knows that
            // everything of its own was taken. Its own end may have been overtaken by the close.
            CLOSE_DONE if inner.closing => {
                inner.closed = true;
                inner.state.assume_finished();
                Some(Ok(()))
            }
            CLOSE_DONE => Some(Err(Error::ClosedByPeer { session: self.id() })),
            CLOSE_FAILED | CLOSE_PROTOCOL => Some(Err(Error::PeerFailed { reason: reason() })),
            _ => None,
        }
    }

    /// The session cannot go on. `tell` is what the peer hears.
    pub(super) fn fail(&self, error: Error, tell: Option<(u32, String)>) {
        self.fail_locked(&mut lock(&self.inner), error, tell);
    }

    fn fail_locked(&self, inner: &mut Inner, error: Error, tell: Option<(u32, String)>) {
        if inner.failure.is_none() && !inner.closed {
            tracing::debug!("{self:?} failed: {error}");
            inner.failure = Some(error);
        }
        if let Some(link) = inner.link.take() {
            match tell {
                Some((CLOSE_FAILED, reason)) if !self.dialed => self.tell_failure(link, reason),
                Some((code, reason)) => link.close(code, &reason),
                None => link.close(CLOSE_FAILED, "the other side failed"),
            }
        }
        self.wake();
    }

    /// Says why the session failed, and leaves the closing to the side that called, for a while: a close of ours is not
    /// repeated, and if it is lost, all that the other side learns is that the session is not here any more.
    fn tell_failure(&self, link: LinkHandle, reason: String) {
        link.control(Kind::Failed(wire::Failed { reason: reason.clone() }), None);
        self.handle.spawn(async move {
            let _ = tokio::time::timeout(CLOSE_PATIENCE, link.closed()).await;
            link.close(CLOSE_FAILED, &reason);
        });
    }

    pub(super) fn protocol_error(&self, source: ProtocolError) {
        let tell = (CLOSE_PROTOCOL, source.to_string());
        self.fail(
            Error::Protocol {
                address: self.peer.address,
                source,
            },
            Some(tell),
        );
    }

    /// A control message arrived on the connection with this number.
    pub(super) fn on_control(&self, generation: u64, kind: Kind) -> Result<(), ProtocolError> {
        let mut guard = lock(&self.inner);
        let inner = &mut *guard;
        if inner.generation != generation {
            return Ok(());
        }
        let acknowledges = matches!(kind, Kind::Applied(_));
        inner.state.receive(kind)?;
        if acknowledges {
            let bytes = inner.state.acknowledged_bytes();
            let new = bytes - std::mem::replace(&mut inner.acknowledged_bytes, bytes);
            if let Some(since) = inner.full_since.replace(Instant::now()) {
                lock(&self.meter).link_was_bottleneck(new, since.elapsed());
            } else {
                inner.full_since = None;
            }
        }
        if let Some(reason) = inner.state.peer_failure() {
            let error = Error::PeerFailed {
                reason: reason.to_owned(),
            };
            self.fail_locked(inner, error, None);
        }
        self.wake();
        Ok(())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    pub(super) fn wake(&self) {
        self.condvar.notify_all();
        self.changed.send_replace(());
    }

    /// Blocks this thread until `step` gives something.
    pub(super) fn wait_blocking<T>(&self, mut step: impl FnMut(&mut Inner) -> Option<T>) -> T {
        let mut inner = lock(&self.inner);
        loop {
            if let Some(value) = step(&mut inner) {
                return value;
            }
            inner = self
                .condvar
                .wait(inner)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// Waits until `step` gives something.
    pub(super) async fn wait<T>(&self, mut step: impl FnMut(&mut Inner) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(value) = step(&mut lock(&self.inner)) {
                return value;
            }
            changed.changed().await.expect("the sender is in self");
        }
    }

    /// Takes the number of the next batch; blocks while the window is full.
    pub(super) fn reserve_batch_blocking(&self) -> Result<u64, Error> {
        self.wait_blocking(|inner| {
            if let Err(error) = inner.check() {
                return Some(Err(error));
            }
            let sequence = inner.state.reserve_batch();
            inner.full_since = match sequence {
                Some(_) if inner.state.has_batch_room() => None,
                _ => inner.full_since.or_else(|| Some(Instant::now())),
            };
            sequence.map(Ok)
        })
    }

    /// An encoded batch is ready to be sent.
    pub(super) fn send_batch(&self, sequence: u64, bytes: Bytes) {
        let mut inner = lock(&self.inner);
        inner.state.batch_encoded(sequence, bytes.clone());
        if let Some(link) = &inner.link {
            link.batch(bytes);
        }
    }

    fn try_send_item(&self, inner: &mut Inner, item: &Item, size: u64) -> Option<Result<(), Error>> {
        if let Err(error) = inner.check() {
            return Some(Err(error));
        }
        if let Err(error) = inner.state.check_item(item) {
            return Some(Err(Error::Unsendable(error)));
        }
        if !inner.state.has_item_room(size) {
            return None;
        }
        let number = inner.state.send_item(item.clone());
        if let Some(link) = &inner.link {
            link.item(number, item);
        }
        Some(Ok(()))
    }

    fn next_item(&self, inner: &mut Inner) -> Option<Result<Option<Received>, Error>> {
        if let Some((item, acknowledgement)) = inner.state.next_item() {
            inner.control(acknowledgement);
            let received = match item {
                Item::Message(body) => Received::Message(body),
                Item::Blob { name, bytes } => Received::Blob { name, bytes },
            };
            return Some(Ok(Some(received)));
        }
        if inner.state.is_drained() {
            return Some(Ok(None));
        }
        inner.check().err().map(Err)
    }

    /// The last handle is gone.
    fn abandon(&self) {
        let mut inner = lock(&self.inner);
        let complete = inner.state.is_drained() && inner.state.all_applied() && inner.state.nothing_outstanding();
        if complete && !inner.closed {
            inner.closed = true;
            if let Some(link) = inner.link.take() {
                link.close(CLOSE_DONE, "");
            }
        }
        self.fail_locked(
            &mut inner,
            Error::Closed,
            Some((CLOSE_FAILED, "the session was dropped".to_owned())),
        );
    }
}

/// Waits until the session has a connection again, and dials for one if this side did before. `loss` counts the losses of
/// the session: each has a waiter of its own.
async fn wait_for_resumption(shared: std::sync::Weak<Shared>, loss: u64, lost: Error, redial: bool) {
    let deadline = {
        let Some(shared) = shared.upgrade() else { return };
        tokio::time::Instant::now() + shared.options.resume_timeout
    };
    let mut pause = std::time::Duration::from_millis(20);
    loop {
        let Some(shared) = shared.upgrade() else { return };
        {
            let inner = lock(&shared.inner);
            if inner.link.is_some() || inner.failure.is_some() || inner.closed || inner.losses != loss {
                return;
            }
        }
        if tokio::time::Instant::now() >= deadline {
            let error = Error::SessionLost {
                session: shared.id(),
                source: Box::new(lost),
            };
            shared.fail(error, None);
            return;
        }
        if let Some(dialer) = shared.dialer.clone().filter(|_| redial) {
            let attempt = async {
                let connection = dialer.dial().await?;
                // Somebody else may have been faster.
                if shared.is_connected() {
                    Ok(())
                } else {
                    connection.resume(&shared).await
                }
            };
            match tokio::time::timeout_at(deadline, attempt).await {
                Ok(Ok(())) => return,
                Ok(Err(error @ (Error::Refused { .. } | Error::UnknownPeer { .. } | Error::RefusedByPeer { .. }))) => {
                    shared.fail(error, None);
                    return;
                }
                Ok(Err(error)) => tracing::debug!("{shared:?} cannot be resumed yet: {error}"),
                Err(_) => continue,
            }
        }
        drop(shared);
        tokio::time::sleep_until(deadline.min(tokio::time::Instant::now() + pause)).await;
        pause = (pause * 2).min(std::time::Duration::from_secs(1));
    }
}

/// A session with a peer. Clones are the same session; when the last one and everything made from it are dropped, it ends.
#[derive(Clone, Debug)]
pub struct Session(Arc<Handle>);

#[derive(Debug)]
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

impl Session {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(Arc::new(Handle(shared)))
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }

    /// What it was opened for.
    pub fn request(&self) -> SessionRequest {
        self.shared().request
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &PeerInfo {
        self.shared().peer()
    }

    /// Sends an application message of up to 16 MiB. Waits while too much is unconsumed at the peer.
    ///
    /// # Errors
    /// When the session failed, was closed, or the message is too large.
    pub async fn send_message(&self, body: Vec<u8>) -> Result<(), Error> {
        self.send_item(Item::Message(body.into())).await
    }

    /// As [`Session::send_message`], for plain threads.
    ///
    /// # Errors
    /// As [`Session::send_message`].
    pub fn send_message_blocking(&self, body: Vec<u8>) -> Result<(), Error> {
        self.send_item_blocking(&Item::Message(body.into()))
    }

    /// Sends a named byte string. It arrives before every message that is sent after it.
    ///
    /// # Errors
    /// When the session failed, was closed, or the blob is larger than the peer takes.
    pub async fn send_blob(&self, name: &str, bytes: impl Into<Bytes>) -> Result<(), Error> {
        self.send_item(Item::Blob {
            name: name.to_owned(),
            bytes: bytes.into(),
        })
        .await
    }

    /// As [`Session::send_blob`], for plain threads.
    ///
    /// # Errors
    /// As [`Session::send_blob`].
    pub fn send_blob_blocking(&self, name: &str, bytes: impl Into<Bytes>) -> Result<(), Error> {
        self.send_item_blocking(&Item::Blob {
            name: name.to_owned(),
            bytes: bytes.into(),
        })
    }

    async fn send_item(&self, item: Item) -> Result<(), Error> {
        let size = item.size();
        self.shared()
            .wait(|inner| self.shared().try_send_item(inner, &item, size))
            .await
    }

    fn send_item_blocking(&self, item: &Item) -> Result<(), Error> {
        let size = item.size();
        self.shared()
            .wait_blocking(|inner| self.shared().try_send_item(inner, item, size))
    }

    /// The next message or blob, in the order in which the peer sent them. `None` when the peer is done.
    ///
    /// # Errors
    /// When the session failed before the peer was done.
    pub async fn recv(&self) -> Result<Option<Received>, Error> {
        self.shared().wait(|inner| self.shared().next_item(inner)).await
    }

    /// As [`Session::recv`], for plain threads.
    ///
    /// # Errors
    /// As [`Session::recv`].
    pub fn recv_blocking(&self) -> Result<Option<Received>, Error> {
        self.shared().wait_blocking(|inner| self.shared().next_item(inner))
    }

    /// The next message; blobs that come before it are kept for [`Session::take_blobs`]. `None` when the peer is done.
    ///
    /// # Errors
    /// As [`Session::recv`].
    pub async fn recv_message(&self) -> Result<Option<Bytes>, Error> {
        loop {
            match self.recv().await? {
                Some(Received::Message(body)) => return Ok(Some(body)),
                Some(blob) => lock(&self.shared().inner).stashed.push(blob),
                None => return Ok(None),
            }
        }
    }

    /// As [`Session::recv_message`], for plain threads.
    ///
    /// # Errors
    /// As [`Session::recv`].
    pub fn recv_message_blocking(&self) -> Result<Option<Bytes>, Error> {
        loop {
            match self.recv_blocking()? {
                Some(Received::Message(body)) => return Ok(Some(body)),
                Some(blob) => lock(&self.shared().inner).stashed.push(blob),
                None => return Ok(None),
            }
        }
    }

    /// The blobs that [`Session::recv_message`] came across, as name and bytes.
    pub fn take_blobs(&self) -> Vec<(String, Bytes)> {
        let stashed = std::mem::take(&mut lock(&self.shared().inner).stashed);
        let blob = |received| match received {
            Received::Blob { name, bytes } => Some((name, bytes)),
            Received::Message(_) => None,
        };
        stashed.into_iter().filter_map(blob).collect()
    }

    /// A sender of pages, with encoder threads of its own. One a session is enough: its clones work together.
    pub fn page_sender(&self) -> PageSender {
        PageSender::new(self.clone())
    }

    /// Writes the pages that the peer sends into `sink`, in the order in which it sent them, on a thread of its own.
    pub fn receive_into(&self, sink: Box<dyn PageSink>) -> ReceiveHandle {
        receiver::start(self.clone(), sink)
    }

    /// Ends the session: waits until the peer has taken everything and has ended it too, then closes the connection.
    /// Blobs and messages of the peer that were not taken before are thrown away; pages are applied.
    ///
    /// # Errors
    /// When the session fails before that.
    pub async fn close(&self) -> Result<(), Error> {
        self.begin_close();
        let link = self.shared().wait(|inner| self.step_close(inner)).await?;
        self.end_link(link).await;
        Ok(())
    }

    /// As [`Session::close`], for plain threads.
    ///
    /// # Errors
    /// As [`Session::close`].
    pub fn close_blocking(&self) -> Result<(), Error> {
        self.begin_close();
        let link = self.shared().wait_blocking(|inner| self.step_close(inner))?;
        self.shared().handle.block_on(self.end_link(link));
        Ok(())
    }

    fn begin_close(&self) {
        let mut inner = lock(&self.shared().inner);
        if !std::mem::replace(&mut inner.closing, true) {
            let finish = inner.state.finish();
            inner.control(finish);
        }
    }

    /// Gives the connection, if there still is one, once all is done on both sides.
    fn step_close(&self, inner: &mut Inner) -> Option<Result<Option<LinkHandle>, Error>> {
        if let Some(error) = &inner.failure {
            return Some(Err(error.clone()));
        }
        if inner.closed {
            return Some(Ok(None));
        }
        while let Some((_, acknowledgement)) = inner.state.next_item() {
            inner.control(acknowledgement);
        }
        if inner.state.has_unapplied() && !inner.receiving {
            let reason = "pages were sent that nobody takes".to_owned();
            let error = Error::GivenUp { reason: reason.clone() };
            self.shared()
                .fail_locked(inner, error.clone(), Some((CLOSE_FAILED, reason)));
            return Some(Err(error));
        }
        if !(inner.state.nothing_outstanding() && inner.state.is_drained() && inner.state.all_applied()) {
            return None;
        }
        inner.closed = true;
        self.shared().wake();
        Some(Ok(inner.link.take()))
    }

    /// Ends the connection of a complete session. A close overtakes what was written before it, and is not repeated once
    /// its process is gone. So the side that was called leaves the closing to the side that called, for a while: that one
    /// may still wait for the end that was written last.
    async fn end_link(&self, link: Option<LinkHandle>) {
        let Some(link) = link else { return };
        if !self.shared().dialed {
            let _ = tokio::time::timeout(CLOSE_PATIENCE, link.closed()).await;
        }
        link.close(CLOSE_DONE, "");
    }

    /// Gives the session up at once; the peer hears why.
    pub fn abort(&self, reason: &str) {
        let error = Error::GivenUp {
            reason: reason.to_owned(),
        };
        self.shared().fail(error, Some((CLOSE_FAILED, reason.to_owned())));
    }

    /// Why the session failed, if it did.
    pub fn failure(&self) -> Option<Error> {
        lock(&self.shared().inner).failure.clone()
    }

    /// Waits until the session has failed or is closed on both sides.
    pub async fn ended(&self) -> Option<Error> {
        let ended = |inner: &mut Inner| (inner.closed || inner.failure.is_some()).then(|| inner.failure.clone());
        self.shared().wait(ended).await
    }

    /// Whether there is a connection at the moment. Without one, the session waits to be resumed.
    pub fn is_connected(&self) -> bool {
        self.shared().is_connected()
    }

    /// How the path to the peer does; `None` while there is no connection.
    pub fn path_stats(&self) -> Option<PathStats> {
        lock(&self.shared().inner).link.as_ref().map(LinkHandle::path)
    }

    /// Goes on with this connection, after the one before broke. Needed only where [`Options::redial`] is off or the
    /// endpoint that dialled is gone.
    ///
    /// # Errors
    /// When the peer does not know the session any more, or the connection breaks.
    pub async fn resume(&self, connection: Connection) -> Result<(), Error> {
        connection.resume(self.shared()).await
    }

    /// Drops the connection as if the network had: a fault point for tests.
    pub fn break_connection(&self) {
        if let Some(link) = &lock(&self.shared().inner).link {
            link.drop_connection("broken on purpose");
        }
    }
}
