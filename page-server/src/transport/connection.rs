//! A connection until its session is open, on both sides.

use std::{net::SocketAddr, sync::Arc};

use quinn::{RecvStream, SendStream};

use super::{
    Endpoint, Error, FaultLink, PeerInfo, RefusalCode, Session, endpoint::Common, session::Shared, tls::Outcome,
};
use crate::proto::{
    ProtocolError, Role, SessionId,
    link::{Link, LinkEvent, Negotiated, OpenRequest, Received},
};

/// Close code: the session is complete.
pub(super) const CLOSE_DONE: u32 = 0;
/// Close code: the session cannot go on; the reason says why.
pub(super) const CLOSE_FAILED: u32 = 1;
/// Close code: the peer broke the protocol.
pub(super) const CLOSE_PROTOCOL: u32 = 2;
/// Close code: this connection ends, the session may be resumed.
pub(super) const CLOSE_BROKEN: u32 = 3;
/// Close code: the session is refused; the control stream says why.
pub(super) const CLOSE_REFUSED: u32 = 4;

/// What a connection is to be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionRequest {
    /// The role.
    pub role: Role,
    /// Names the session for both ends.
    pub session_id: SessionId,
}

/// How to dial again.
#[derive(Clone, Debug)]
pub(super) struct Dialer {
    pub(super) endpoint: Endpoint,
    pub(super) address: SocketAddr,
    pub(super) name: String,
}

impl Dialer {
    pub(super) async fn dial(&self) -> Result<Connection, Error> {
        self.endpoint.connect_named(self.address, Some(&self.name)).await
    }
}

/// The control stream and the connection around it.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) quinn: quinn::Connection,
    pub(super) send: SendStream,
    pub(super) receive: RecvStream,
    pub(super) link: Link,
    pub(super) negotiated: Negotiated,
    pub(super) peer: PeerInfo,
}

impl Wire {
    /// Writes what the link has to say.
    async fn flush(&mut self) -> Result<(), Error> {
        flush(&mut self.link, &mut self.send)
            .await
            .map_err(|error| self.lost(error))
    }

    /// Waits for the next event of the link.
    async fn event(&mut self) -> Result<LinkEvent, Error> {
        loop {
            if let Some(event) = self.link.poll() {
                return Ok(event);
            }
            let chunk = self
                .receive
                .read_chunk(64 << 10, true)
                .await
                .map_err(|error| self.lost(error))?;
            let Some(chunk) = chunk else {
                return Err(self.lost(quinn::ConnectionError::Reset));
            };
            if let Err(source) = self.link.receive(&chunk.bytes) {
                let _ = self.flush().await;
                linger(&mut self.send, &self.quinn, CLOSE_PROTOCOL, &source.to_string()).await;
                return Err(self.protocol(source));
            }
        }
    }

    pub(super) fn protocol(&self, source: ProtocolError) -> Error {
        Error::Protocol {
            address: self.peer.address,
            source,
        }
    }

    fn lost(&self, source: impl Into<Lost>) -> Error {
        let Lost(source) = source.into();
        Error::Connection {
            address: self.peer.address,
            source: source.unwrap_or(quinn::ConnectionError::Reset),
        }
    }
}

/// Why a stream ended; `None` when only the stream did.
struct Lost(Option<quinn::ConnectionError>);

impl From<quinn::ConnectionError> for Lost {
    fn from(error: quinn::ConnectionError) -> Self {
        Self(Some(error))
    }
}

impl From<quinn::WriteError> for Lost {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::ConnectionLost(error) => Self(Some(error)),
            _ => Self(None),
        }
    }
}

impl From<quinn::ReadError> for Lost {
    fn from(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::ConnectionLost(error) => Self(Some(error)),
            _ => Self(None),
        }
    }
}

async fn flush(link: &mut Link, send: &mut SendStream) -> Result<(), Lost> {
    while let Some(bytes) = link.transmit() {
        send.write_all(&bytes).await?;
    }
    Ok(())
}

/// Ends a connection so that what was written last still arrives: a close at once would overtake it.
async fn linger(send: &mut SendStream, quinn: &quinn::Connection, code: u32, reason: &str) {
    let _ = send.finish();
    let _ = tokio::time::timeout(std::time::Duration::from_secs(1), send.stopped()).await;
    quinn.close(code.into(), reason.as_bytes());
}

/// A connection that was dialled: authenticated, with a common version, not yet used for anything.
#[derive(Debug)]
pub struct Connection {
    wire: Wire,
    common: Arc<Common>,
    dialer: Dialer,
}

impl Connection {
    /// Who is at the other end.
    pub fn peer(&self) -> &PeerInfo {
        &self.wire.peer
    }

    /// What both sides agreed on.
    pub fn negotiated(&self) -> &Negotiated {
        &self.wire.negotiated
    }

    /// Opens a session for pages, blobs and messages ([`Role::Push`] or [`Role::Migrate`]).
    ///
    /// # Errors
    /// When the peer refuses it, the connection breaks, or the role is one for page requests.
    pub async fn open(self, request: SessionRequest) -> Result<Session, Error> {
        if !request.role.is_session() {
            return Err(Error::WrongRole {
                role: request.role,
                used_as: "a session",
            });
        }
        let Self {
            mut wire,
            common,
            dialer,
        } = self;
        let received = ask(&mut wire, request, None).await?;
        let shared = Shared::new(request, &wire, &common, Some(dialer));
        shared.attach(wire, &received, vec![])?;
        Ok(Session::new(shared))
    }

    /// Opens a connection for page requests ([`Role::Pull`] or [`Role::Faults`]).
    ///
    /// # Errors
    /// When the peer refuses it, the connection breaks, or the role is one for sessions.
    pub async fn open_faults(self, request: SessionRequest) -> Result<FaultLink, Error> {
        if request.role.is_session() {
            return Err(Error::WrongRole {
                role: request.role,
                used_as: "a connection for page requests",
            });
        }
        let Self { mut wire, .. } = self;
        ask(&mut wire, request, None).await?;
        Ok(FaultLink::new(wire, request, true))
    }

    /// Goes on with a session whose connection broke.
    pub(super) async fn resume(self, shared: &Arc<Shared>) -> Result<(), Error> {
        let Self { mut wire, .. } = self;
        let had = shared.detach();
        let received = ask(&mut wire, shared.request(), Some(had)).await?;
        shared.attach(wire, &received, vec![])
    }
}

async fn ask(wire: &mut Wire, request: SessionRequest, resume: Option<Received>) -> Result<Received, Error> {
    let open = OpenRequest {
        role: request.role,
        session_id: request.session_id,
        resume,
    };
    wire.link.open(&open).map_err(|source| wire.protocol(source))?;
    wire.flush().await?;
    match wire.event().await? {
        LinkEvent::Opened(received) => Ok(received),
        LinkEvent::Refused { code, reason } => {
            wire.quinn.close(CLOSE_DONE.into(), b"");
            Err(Error::Refused {
                address: wire.peer.address,
                role: request.role,
                code,
                reason,
            })
        }
        _ => Err(wire.protocol(ProtocolError::Unexpected {
            message: "session",
            state: "waiting for Opened",
        })),
    }
}

/// A session that a peer asks for.
#[derive(Debug)]
pub struct Incoming {
    wire: Wire,
    common: Arc<Common>,
    request: SessionRequest,
}

impl Incoming {
    /// What the peer wants.
    pub fn role(&self) -> Role {
        self.request.role
    }

    /// The session: a new one, or for [`Role::Faults`] one that exists.
    pub fn session_id(&self) -> SessionId {
        self.request.session_id
    }

    /// Who asks.
    pub fn peer(&self) -> &PeerInfo {
        &self.wire.peer
    }

    /// Grants a session for pages, blobs and messages.
    ///
    /// # Errors
    /// When the connection breaks or was not dialled for a session.
    pub async fn accept(self) -> Result<Session, Error> {
        let Self {
            mut wire,
            common,
            request,
        } = self;
        if !request.role.is_session() {
            return Err(Error::WrongRole {
                role: request.role,
                used_as: "a session",
            });
        }
        wire.link
            .accept(&Received::default())
            .map_err(|source| wire.protocol(source))?;
        let opening = std::iter::from_fn(|| wire.link.transmit()).collect();
        let shared = Shared::new(request, &wire, &common, None);
        common.register(&shared);
        shared.attach(wire, &Received::default(), opening)?;
        Ok(Session::new(shared))
    }

    /// Grants a connection for page requests.
    ///
    /// # Errors
    /// When the connection breaks or was dialled for a session.
    pub async fn accept_faults(self) -> Result<FaultLink, Error> {
        let Self { mut wire, request, .. } = self;
        if request.role.is_session() {
            return Err(Error::WrongRole {
                role: request.role,
                used_as: "a connection for page requests",
            });
        }
        wire.link
            .accept(&Received::default())
            .map_err(|source| wire.protocol(source))?;
        wire.flush().await?;
        Ok(FaultLink::new(wire, request, false))
    }

    /// Refuses, and says why.
    pub async fn refuse(self, code: RefusalCode, reason: &str) {
        let Self { mut wire, .. } = self;
        refuse(&mut wire, code, reason).await;
    }
}

async fn refuse(wire: &mut Wire, code: RefusalCode, reason: &str) {
    if wire.link.refuse(code, reason).is_ok() && wire.flush().await.is_ok() {
        linger(&mut wire.send, &wire.quinn, CLOSE_REFUSED, reason).await;
    }
}

/// The dialling side up to the peer's Hello.
pub(super) async fn dial(
    connecting: quinn::Connecting,
    common: Arc<Common>,
    outcome: &Outcome,
    dialer: Dialer,
) -> Result<Connection, Error> {
    let address = dialer.address;
    let explain = |source| common.authenticator.explain(address, outcome, source);
    let quinn = connecting.await.map_err(explain)?;
    let streams = quinn.open_bi().await.map_err(explain)?;
    let link = Link::initiator(common.local());
    let wire = greet(quinn, streams, link, &common, outcome).await?;
    Ok(Connection { wire, common, dialer })
}

/// The accepting side up to the peer's Open. `None`: a session was resumed.
pub(super) async fn answer(
    connecting: quinn::Connecting,
    common: Arc<Common>,
    outcome: &Outcome,
) -> Result<Option<Incoming>, Error> {
    let address = connecting.remote_address();
    let explain = |source| common.authenticator.explain(address, outcome, source);
    let quinn = connecting.await.map_err(explain)?;
    let streams = quinn.accept_bi().await.map_err(explain)?;
    let link = Link::acceptor(common.local());
    let mut wire = greet(quinn, streams, link, &common, outcome).await?;
    let LinkEvent::Open(open) = wire.event().await? else {
        return Err(wire.protocol(ProtocolError::Unexpected {
            message: "session",
            state: "waiting for Open",
        }));
    };
    let request = SessionRequest {
        role: open.role,
        session_id: open.session_id,
    };
    let known = common.find(open.session_id).filter(|_| open.role.is_session());
    match (open.resume, known) {
        (None, None) => Ok(Some(Incoming { wire, common, request })),
        (None, Some(_)) => {
            refuse(
                &mut wire,
                RefusalCode::Application,
                "a session with this id is open already",
            )
            .await;
            Ok(None)
        }
        (Some(received), Some(shared)) if shared.peer().fingerprint == wire.peer.fingerprint => {
            let had = shared.detach();
            wire.link.accept(&had).map_err(|source| wire.protocol(source))?;
            let opening = std::iter::from_fn(|| wire.link.transmit()).collect();
            shared
                .attach(wire, &received, opening)
                .inspect_err(|error| shared.fail(error.clone(), None))?;
            Ok(None)
        }
        (Some(_), _) => {
            refuse(
                &mut wire,
                RefusalCode::UnknownSession,
                "the session to be resumed is not open here",
            )
            .await;
            Ok(None)
        }
    }
}

async fn greet(
    quinn: quinn::Connection,
    (send, receive): (SendStream, RecvStream),
    link: Link,
    common: &Common,
    outcome: &Outcome,
) -> Result<Wire, Error> {
    let (fingerprint, name) = common.authenticator.peer(&quinn)?;
    let peer = PeerInfo {
        fingerprint,
        name,
        address: quinn.remote_address(),
    };
    // Acknowledgements and messages must not wait behind bulk data.
    let _ = send.set_priority(100);
    let placeholder = Negotiated {
        version: 0,
        capabilities: Default::default(),
        peer_limits: common.options.limits,
        peer_software: String::new(),
    };
    let mut wire = Wire {
        quinn,
        send,
        receive,
        link,
        negotiated: placeholder,
        peer,
    };
    let greeting = async {
        wire.flush().await?;
        wire.event().await
    };
    match greeting.await {
        Ok(LinkEvent::Hello(negotiated)) => {
            tracing::debug!(
                "{} speaks version {} ({})",
                wire.peer,
                negotiated.version,
                negotiated.peer_software
            );
            wire.negotiated = negotiated;
            Ok(wire)
        }
        Ok(_) => Err(wire.protocol(ProtocolError::Unexpected {
            message: "session",
            state: "waiting for Hello",
        })),
        // In TLS 1.3 the client's certificate is verified after the client is done: its refusal shows here.
        Err(Error::Connection { address, source }) => Err(common.authenticator.explain(address, outcome, source)),
        Err(error) => Err(error),
    }
}
