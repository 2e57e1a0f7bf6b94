//! Page requests on a connection of their own: who asks, and who answers.

use std::{io, sync::Arc, time::Instant};

use quinn::{RecvStream, SendStream};
use tokio::sync::{Semaphore, watch};
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageBuffer, PageRun, PageSource, PageState};

use super::{
    DirectRuntime, Error, PeerInfo, SessionRequest,
    connection::{CLOSE_BROKEN, CLOSE_DONE, Wire},
    runtime::Direct,
};
use crate::proto::{
    ProtocolError, Role, SessionId,
    fault::{MAX_PAGES, MAX_REPLY, PageReply, PageRequest, REQUEST_BYTES, is_valid_run},
};

/// Background requests of one client under way at once.
const PIPELINE: usize = 64;

/// Background requests that a server reads pages for at once; urgent ones do not wait for them.
const BACKGROUND: usize = 4;

/// Urgent requests that a server reads pages for at once.
const URGENT: usize = 64;
/// Most pages that are read on the runtime's own threads, from a source that allows it.
const FEW: u64 = 16;

/// Pages in the requests that a long [`PageSource::read_pages`] is cut into.
const CHUNK: u64 = 256;

/// A connection for page requests that both sides have agreed on.
#[derive(Debug)]
pub struct FaultLink {
    quinn: quinn::Connection,
    peer: PeerInfo,
    request: SessionRequest,
    initiator: bool,
    // The control stream stays open as long as the connection.
    _control: (SendStream, RecvStream),
}

impl FaultLink {
    pub(super) fn new(wire: Wire, request: SessionRequest, initiator: bool) -> Self {
        let Wire {
            quinn,
            send,
            receive,
            peer,
            ..
        } = wire;
        Self {
            quinn,
            peer,
            request,
            initiator,
            _control: (send, receive),
        }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &PeerInfo {
        &self.peer
    }

    /// The session it belongs to.
    pub fn session_id(&self) -> SessionId {
        self.request.session_id
    }

    /// Whether this side answers the requests.
    pub fn serves(&self) -> bool {
        self.initiator == matches!(self.request.role, Role::Faults { initiator_serves: true })
    }

    fn lost(&self, source: quinn::ConnectionError) -> Error {
        Error::Connection {
            address: self.peer.address,
            source,
        }
    }
}

impl Drop for FaultLink {
    fn drop(&mut self) {
        self.quinn.close(CLOSE_BROKEN.into(), b"dropped");
    }
}

/// Asks for pages. Clones are the same client.
///
/// A request whose connection breaks is asked again on the next one ([`FaultClient::replace_connection`]) and waits until
/// then: it ends with the bytes the source has, with the source's error, or with the caller's cancel
/// ([`FaultClient::close`], or dropping the future). It never makes bytes up.
#[derive(Clone, Debug)]
pub struct FaultClient(Arc<ClientInner>);

#[derive(Debug)]
struct ClientInner {
    driver: Driver,
    link: watch::Sender<Client>,
    pipeline: Semaphore,
}

/// What plain threads wait in.
#[derive(Debug)]
enum Driver {
    /// A runtime with threads of its own.
    Threads(tokio::runtime::Handle),
    /// One that they drive themselves.
    Callers(Arc<Direct>),
}

impl Driver {
    fn block_on<F: Future>(&self, future: F) -> F::Output {
        match self {
            Driver::Threads(handle) => handle.block_on(future),
            Driver::Callers(direct) => direct.block_on(future),
        }
    }

    fn handle(&self) -> &tokio::runtime::Handle {
        match self {
            Driver::Threads(handle) => handle,
            Driver::Callers(direct) => direct.handle(),
        }
    }
}

#[derive(Clone, Debug)]
enum Client {
    Connected(Arc<FaultLink>),
    Disconnected,
    Closed,
}

/// Why one attempt did not give pages.
enum Attempt {
    /// The connection is gone; another one may do better.
    Lost,
    Failed(Error),
}

impl FaultClient {
    /// A client on this connection. Must be called inside the runtime.
    ///
    /// # Errors
    /// When the connection was opened for this side to serve.
    pub fn new(link: FaultLink) -> Result<Self, Error> {
        Self::with_driver(link, Driver::Threads(tokio::runtime::Handle::current()))
    }

    /// A client whose callers drive `runtime`, and with it their own requests, if the connection belongs to an endpoint
    /// of that runtime. To be used from plain threads only.
    ///
    /// # Errors
    /// As [`FaultClient::new`].
    pub fn direct(link: FaultLink, runtime: &DirectRuntime) -> Result<Self, Error> {
        Self::with_driver(link, Driver::Callers(runtime.direct()))
    }

    fn with_driver(link: FaultLink, driver: Driver) -> Result<Self, Error> {
        check_asks(&link)?;
        let link = watch::Sender::new(Client::Connected(Arc::new(link)));
        Ok(Self(Arc::new(ClientInner {
            driver,
            link,
            pipeline: Semaphore::new(PIPELINE),
        })))
    }

    /// Asks for the pages of a run (at most 1024). Urgent requests overtake the others.
    ///
    /// # Errors
    /// When the peer cannot read the pages, its answer is damaged, or the client is closed; not when the connection breaks.
    pub async fn request(&self, object: MemoryObject, run: PageRun, urgent: bool) -> Result<PageReply, Error> {
        if !is_valid_run(run) || run.pages > MAX_PAGES {
            return Err(Error::BadRequest {
                start: run.start,
                pages: run.pages,
            });
        }
        let begun = Instant::now();
        let _permit = if urgent {
            None
        } else {
            self.0.pipeline.acquire().await.ok()
        };
        let request = PageRequest { object, run, urgent };
        let mut links = self.0.link.subscribe();
        loop {
            let client = links.borrow_and_update().clone();
            match client {
                Client::Closed => return Err(Error::Cancelled),
                Client::Disconnected => links.changed().await.map_err(|_| Error::Cancelled)?,
                Client::Connected(link) => {
                    let mut closing = links.clone();
                    let attempt = tokio::select! {
                        attempt = exchange(&link, &request) => attempt,
                        () = is_closed(&mut closing) => return Err(Error::Cancelled),
                    };
                    match attempt {
                        Ok(reply) => {
                            let kind = if urgent { "urgent" } else { "background" };
                            metrics::histogram!("whimbrel_fault_seconds", "kind" => kind).record(begun.elapsed());
                            metrics::counter!("whimbrel_fault_pages_total").increment(run.pages);
                            return Ok(reply);
                        }
                        Err(Attempt::Failed(error)) => return Err(error),
                        Err(Attempt::Lost) => self.lost(&link),
                    }
                }
            }
        }
    }

    /// As [`FaultClient::request`], for plain threads.
    ///
    /// # Errors
    /// As [`FaultClient::request`].
    pub fn request_blocking(&self, object: MemoryObject, run: PageRun, urgent: bool) -> Result<PageReply, Error> {
        self.0.driver.block_on(self.request(object, run, urgent))
    }

    /// Goes on with another connection. Requests that were not answered are asked again there.
    ///
    /// # Errors
    /// When the connection was opened for this side to serve, or for another session, or the client is closed.
    pub fn replace_connection(&self, link: FaultLink) -> Result<(), Error> {
        check_asks(&link)?;
        let link = Arc::new(link);
        let replaced = self.0.link.send_if_modified(|client| {
            if matches!(client, Client::Closed) {
                return false;
            }
            *client = Client::Connected(link.clone());
            true
        });
        if replaced { Ok(()) } else { Err(Error::Cancelled) }
    }

    /// Waits until the connection is lost: time to find another one. Gives false when the client was closed.
    pub async fn disconnected(&self) -> bool {
        let mut links = self.0.link.subscribe();
        loop {
            let client = links.borrow_and_update().clone();
            match client {
                Client::Closed => return false,
                Client::Disconnected => return true,
                Client::Connected(link) => tokio::select! {
                    _ = link.quinn.closed() => self.lost(&link),
                    _ = links.changed() => {}
                },
            }
        }
    }

    /// Whether there is a connection at the moment.
    pub fn is_connected(&self) -> bool {
        matches!(&*self.0.link.borrow(), Client::Connected(link) if link.quinn.close_reason().is_none())
    }

    /// Cancels all requests, now and later, and tells the peer that nothing more will be asked for.
    pub fn close(&self) {
        if let Client::Connected(link) = self.0.link.send_replace(Client::Closed) {
            link.quinn.close(CLOSE_DONE.into(), b"");
        }
    }

    fn lost(&self, link: &Arc<FaultLink>) {
        self.0.link.send_if_modified(|client| {
            let current = matches!(client, Client::Connected(other) if Arc::ptr_eq(other, link));
            if current {
                *client = Client::Disconnected;
            }
            current
        });
    }
}

/// A [`FaultClient`] all of whose requests are urgent: somebody waits for each of these pages.
#[derive(Clone, Debug)]
pub struct UrgentPages(FaultClient);

impl PageSource for UrgentPages {
    /// Blocks. At most 1024 pages.
    fn read_pages(&self, object: MemoryObject, run: PageRun, buffer: &mut [u8]) -> io::Result<Vec<PageState>> {
        self.0.read_at_once(object, run, true, buffer)
    }
}

impl FaultClient {
    /// The same client for pages that somebody waits for.
    pub fn urgent(&self) -> UrgentPages {
        UrgentPages(self.clone())
    }

    fn read_at_once(
        &self,
        object: MemoryObject,
        run: PageRun,
        urgent: bool,
        buffer: &mut [u8],
    ) -> io::Result<Vec<PageState>> {
        let reply = self.request_blocking(object, run, urgent)?;
        if reply.data.len() != buffer.len() {
            return Err(io::Error::other("the reply is not as long as the request"));
        }
        buffer.copy_from_slice(&reply.data);
        Ok(reply.states)
    }
}

impl PageSource for FaultClient {
    /// Blocks; long runs are cut into requests that are under way together.
    fn read_pages(&self, object: MemoryObject, run: PageRun, buffer: &mut [u8]) -> io::Result<Vec<PageState>> {
        if run.pages == 0 || !is_valid_run(run) || buffer.len() as u64 != run.bytes() {
            return Err(Error::BadRequest {
                start: run.start,
                pages: run.pages,
            }
            .into());
        }
        if run.pages <= CHUNK {
            return self.read_at_once(object, run, false, buffer);
        }
        let starts = (0..run.pages).step_by(CHUNK as usize);
        let chunks = starts.map(|first| PageRun {
            start: run.start + first * PAGE_SIZE as u64,
            pages: CHUNK.min(run.pages - first),
        });
        self.0.driver.block_on(async {
            let mut states = Vec::with_capacity(run.pages as usize);
            let mut rest = buffer;
            let mut chunks = chunks.peekable();
            let mut under_way = std::collections::VecDeque::new();
            loop {
                while under_way.len() < PIPELINE
                    && let Some(chunk) = chunks.next()
                {
                    let client = self.clone();
                    under_way.push_back(AbortOnDrop(
                        self.0
                            .driver
                            .handle()
                            .spawn(async move { client.request(object, chunk, false).await }),
                    ));
                }
                let Some(mut next) = under_way.pop_front() else {
                    return Ok(states);
                };
                let reply = (&mut next.0).await.map_err(io::Error::other)??;
                let (now, later) = rest.split_at_mut(reply.data.len());
                now.copy_from_slice(&reply.data);
                rest = later;
                states.extend(reply.states);
            }
        })
    }
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn check_asks(link: &FaultLink) -> Result<(), Error> {
    if link.serves() {
        return Err(Error::WrongRole {
            role: link.request.role,
            used_as: "the side that asks for pages",
        });
    }
    Ok(())
}

async fn is_closed(links: &mut watch::Receiver<Client>) {
    // The sender is gone only with the client itself.
    let _ = links.wait_for(|client| matches!(client, Client::Closed)).await;
}

async fn exchange(link: &FaultLink, request: &PageRequest) -> Result<PageReply, Attempt> {
    let (mut send, mut receive) = link.quinn.open_bi().await.map_err(|_| Attempt::Lost)?;
    if request.urgent {
        let _ = send.set_priority(1);
    }
    send.write_all(&request.encode()).await.map_err(|_| Attempt::Lost)?;
    let _ = send.finish();
    let address = link.peer.address;
    let bytes = match receive.read_to_end(MAX_REPLY).await {
        Ok(bytes) => bytes,
        Err(quinn::ReadToEndError::TooLong) => {
            let source = ProtocolError::Fault {
                what: "reply",
                why: "it is too long",
            };
            return Err(Attempt::Failed(Error::Protocol { address, source }));
        }
        Err(quinn::ReadToEndError::Read(quinn::ReadError::Reset(_))) => {
            let (start, pages) = (request.run.start, request.run.pages);
            let reason = "it dropped the request".to_owned();
            return Err(Attempt::Failed(Error::PagesRefused { start, pages, reason }));
        }
        Err(quinn::ReadToEndError::Read(_)) => return Err(Attempt::Lost),
    };
    match PageReply::decode(&bytes, request.run.pages) {
        Ok(Ok(reply)) => Ok(reply),
        Ok(Err(reason)) => {
            let (start, pages) = (request.run.start, request.run.pages);
            Err(Attempt::Failed(Error::PagesRefused { start, pages, reason }))
        }
        Err(source) => Err(Attempt::Failed(Error::Protocol { address, source })),
    }
}

/// How many requests of one connection are read and answered at once.
struct Slots {
    background: Semaphore,
    urgent: Semaphore,
}

/// Answers page requests from a [`PageSource`].
#[derive(Clone)]
pub struct FaultServer {
    source: Arc<dyn PageSource>,
    level: Option<i32>,
    at_once: bool,
}

impl std::fmt::Debug for FaultServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultServer")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

impl FaultServer {
    /// Serves this source. Background replies are compressed at zstd level `level`, if given; urgent ones never are.
    pub fn new(source: Arc<dyn PageSource>, level: Option<i32>) -> Self {
        Self {
            source,
            level,
            at_once: false,
        }
    }

    /// Says that the source never waits for a disk or a network: urgent requests for few pages are then answered where they
    /// are read, without a thread in between.
    pub fn reading_at_once(self) -> Self {
        Self { at_once: true, ..self }
    }

    /// Answers requests on this connection until the peer says that it is done.
    ///
    /// # Errors
    /// When the connection breaks before, or was opened for this side to ask. The same server can go on with the next one.
    pub async fn serve(&self, link: FaultLink) -> Result<(), Error> {
        if !link.serves() {
            return Err(Error::WrongRole {
                role: link.request.role,
                used_as: "the side that serves pages",
            });
        }
        let slots = Arc::new(Slots {
            background: Semaphore::new(BACKGROUND),
            urgent: Semaphore::new(URGENT),
        });
        loop {
            match link.quinn.accept_bi().await {
                Ok((send, receive)) => {
                    let (server, slots) = (self.clone(), slots.clone());
                    tokio::spawn(async move { server.answer(&slots, send, receive).await });
                }
                Err(quinn::ConnectionError::ApplicationClosed(close))
                    if u64::from(close.error_code) == u64::from(CLOSE_DONE) =>
                {
                    return Ok(());
                }
                Err(source) => return Err(link.lost(source)),
            }
        }
    }

    async fn answer(&self, slots: &Slots, mut send: SendStream, mut receive: RecvStream) {
        let begun = Instant::now();
        let Ok(bytes) = receive.read_to_end(REQUEST_BYTES).await else {
            return;
        };
        let request = PageRequest::decode(&bytes);
        let urgent = request.as_ref().is_ok_and(|request| request.urgent);
        // Held until the reply is on its way: a peer that does not read its replies cannot make them pile up.
        let slot = if urgent { &slots.urgent } else { &slots.background };
        let _permit = slot.acquire().await.expect("never closed");
        if urgent {
            let _ = send.set_priority(1);
        }
        let reply = match request {
            Ok(request) => self.read(request).await,
            Err(error) => PageReply::encode_refusal(&error.to_string()),
        };
        metrics::histogram!("whimbrel_fault_served_seconds").record(begun.elapsed());
        if send.write_chunk(reply.into()).await.is_ok() {
            let _ = send.finish();
        }
    }

    async fn read(&self, request: PageRequest) -> Vec<u8> {
        let source = self.source.clone();
        let level = self.level.filter(|_| !request.urgent);
        let read = move || {
            let length = request.run.bytes() as usize;
            let mut pages = PageBuffer::new(length);
            match source.read_pages(request.object, request.run, pages.first_mut(length)) {
                Ok(states) if states.len() as u64 == request.run.pages => {
                    PageReply::encode_pages(&states, pages.first(length), level)
                }
                Ok(_) => PageReply::encode_refusal("the source did not tell the state of every page"),
                Err(error) => PageReply::encode_refusal(&error.to_string()),
            }
        };
        if self.at_once && request.urgent && request.run.pages <= FEW {
            return read();
        }
        let reply = tokio::task::spawn_blocking(read).await;
        reply.unwrap_or_else(|_| PageReply::encode_refusal("reading the pages failed"))
    }
}
