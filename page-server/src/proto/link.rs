//! The state machine of one connection until its session is open, and the framing after that.

use std::collections::VecDeque;

use super::{
    Capabilities, Limits, ProtocolError, Role, SessionId, VERSION,
    frame::{FrameReader, encode},
    wire::{self, Control, RefusalCode, control::Kind},
};

/// What this side says of itself in its Hello.
#[derive(Clone, Debug)]
pub struct Local {
    /// Oldest version of the protocol to accept.
    pub min_version: u32,
    /// Newest version of the protocol to accept.
    pub max_version: u32,
    /// Optional features to offer.
    pub capabilities: Capabilities,
    /// What this side is willing to hold.
    pub limits: Limits,
    /// Name and version of the software.
    pub software: String,
}

impl Default for Local {
    fn default() -> Self {
        Self {
            min_version: VERSION,
            max_version: VERSION,
            capabilities: Capabilities::all(),
            limits: Limits::default(),
            software: concat!("whimbrel ", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// What came out of the exchange of Hellos.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The version both speak from here on.
    pub version: u32,
    /// The features both have.
    pub capabilities: Capabilities,
    /// What the peer is willing to hold.
    pub peer_limits: Limits,
    /// Name and version of the peer's software.
    pub peer_software: String,
}

/// What a session has received so far; what its resumption starts from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Every batch up to this one is applied.
    pub applied: u64,
    /// Batches past it that are here and wait for their turn.
    pub pending: Vec<u64>,
    /// Every item up to this one is here.
    pub items: u64,
    /// Every item up to this one was taken by the application.
    pub consumed: u64,
}

impl Received {
    fn to_wire(&self) -> wire::Received {
        wire::Received {
            applied: self.applied,
            pending: self.pending.clone(),
            items: self.items,
            consumed: self.consumed,
        }
    }

    fn from_wire(wire: wire::Received) -> Self {
        Self {
            applied: wire.applied,
            pending: wire.pending,
            items: wire.items,
            consumed: wire.consumed,
        }
    }
}

/// A request to open a session on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenRequest {
    /// What for.
    pub role: Role,
    /// The session.
    pub session_id: SessionId,
    /// Present when a session is resumed: what the initiator has received in it.
    pub resume: Option<Received>,
}

/// What a [`Link`] reports.
#[derive(Clone, Debug, PartialEq)]
pub enum LinkEvent {
    /// The peer said Hello, and there is a common version.
    Hello(Negotiated),
    /// Acceptor: the initiator wants a session. Answer with [`Link::accept`] or [`Link::refuse`].
    Open(OpenRequest),
    /// Initiator: the session is open; what the acceptor has received in it.
    Opened(Received),
    /// Initiator: the session is refused.
    Refused {
        /// Why, for programs.
        code: RefusalCode,
        /// Why, for people.
        reason: String,
    },
    /// A message of the open session.
    Session(Kind),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    AwaitHello,
    Ready,
    AwaitAnswer,
    AwaitDecision,
    Open,
    Closed,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::AwaitHello => "waiting for Hello",
            State::Ready => "no session was asked for",
            State::AwaitAnswer => "waiting for the answer to Open",
            State::AwaitDecision => "the answer to Open is being decided",
            State::Open => "the session is open",
            State::Closed => "the connection is closed",
        }
    }
}

/// One end of a connection's control stream. See the diagram in [`super`].
#[derive(Debug)]
pub struct Link {
    initiator: bool,
    local: Local,
    state: State,
    reader: FrameReader,
    outgoing: VecDeque<Vec<u8>>,
    events: VecDeque<LinkEvent>,
}

impl Link {
    /// The end that dialled.
    pub fn initiator(local: Local) -> Self {
        Self::new(true, local)
    }

    /// The end that was dialled.
    pub fn acceptor(local: Local) -> Self {
        Self::new(false, local)
    }

    fn new(initiator: bool, local: Local) -> Self {
        let hello = wire::Hello {
            min_version: local.min_version,
            max_version: local.max_version,
            capabilities: local.capabilities.to_wire(),
            limits: Some(local.limits.to_wire()),
            software: local.software.clone(),
        };
        let mut link = Self {
            initiator,
            local,
            state: State::AwaitHello,
            reader: FrameReader::default(),
            outgoing: VecDeque::new(),
            events: VecDeque::new(),
        };
        link.send(Kind::Hello(hello));
        link
    }

    /// The next bytes to be written to the control stream.
    pub fn transmit(&mut self) -> Option<Vec<u8>> {
        self.outgoing.pop_front()
    }

    /// The next thing that happened.
    pub fn poll(&mut self) -> Option<LinkEvent> {
        self.events.pop_front()
    }

    /// Whether the session is open.
    pub fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// Takes bytes of the control stream. What follows from them is told by [`Link::poll`] and [`Link::transmit`].
    ///
    /// # Errors
    /// When the peer breaks the protocol. Whatever [`Link::transmit`] still has should be sent before the end.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        self.reader.push(bytes);
        while let Some(control) = self.reader.next_frame()? {
            // A kind from the future has no meaning here; versions say when it must have one.
            if let Some(kind) = control.kind
                && let Err(error) = self.handle(kind)
            {
                self.state = State::Closed;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Initiator: asks for a session.
    ///
    /// # Errors
    /// When the link is not in the state for it.
    pub fn open(&mut self, request: &OpenRequest) -> Result<(), ProtocolError> {
        self.expect(State::Ready, "Open")?;
        let (role, initiator_serves) = match request.role {
            Role::Push => (wire::Role::Push, false),
            Role::Pull => (wire::Role::Pull, false),
            Role::Migrate => (wire::Role::Migrate, false),
            Role::Faults { initiator_serves } => (wire::Role::Faults, initiator_serves),
        };
        self.state = State::AwaitAnswer;
        self.send(Kind::Open(wire::Open {
            role: role as i32,
            session_id: request.session_id.0.to_vec().into(),
            initiator_serves,
            received: request.resume.as_ref().map(Received::to_wire),
        }));
        Ok(())
    }

    /// Acceptor: grants the session; `received` is what this side has received in it so far.
    ///
    /// # Errors
    /// When the link is not in the state for it.
    pub fn accept(&mut self, received: &Received) -> Result<(), ProtocolError> {
        self.expect(State::AwaitDecision, "Opened")?;
        self.state = State::Open;
        self.send(Kind::Opened(wire::Opened {
            received: Some(received.to_wire()),
        }));
        Ok(())
    }

    /// Acceptor: refuses the session. The link is closed.
    ///
    /// # Errors
    /// When the link is not in the state for it.
    pub fn refuse(&mut self, code: RefusalCode, reason: &str) -> Result<(), ProtocolError> {
        self.expect(State::AwaitDecision, "Refused")?;
        self.state = State::Closed;
        self.send(Kind::Refused(wire::Refused {
            code: code as i32,
            reason: reason.to_owned(),
        }));
        Ok(())
    }

    fn handle(&mut self, kind: Kind) -> Result<(), ProtocolError> {
        match (self.state, kind) {
            (State::AwaitHello, Kind::Hello(hello)) => self.handle_hello(hello),
            (State::Ready, Kind::Open(open)) if !self.initiator => {
                self.events.push_back(LinkEvent::Open(parse_open(open)?));
                self.state = State::AwaitDecision;
                Ok(())
            }
            (State::AwaitAnswer, Kind::Opened(opened)) => {
                self.state = State::Open;
                self.events.push_back(LinkEvent::Opened(
                    opened.received.map(Received::from_wire).unwrap_or_default(),
                ));
                Ok(())
            }
            // Before Open, a refusal can only mean the version or that the acceptor is overloaded.
            (State::AwaitAnswer | State::Ready | State::AwaitHello, Kind::Refused(refused)) if self.initiator => {
                self.state = State::Closed;
                self.events.push_back(LinkEvent::Refused {
                    code: refused.code(),
                    reason: refused.reason,
                });
                Ok(())
            }
            (State::Open, kind) if is_session_kind(&kind) => {
                self.events.push_back(LinkEvent::Session(kind));
                Ok(())
            }
            (state, kind) => Err(ProtocolError::Unexpected {
                message: kind_name(&kind),
                state: state.name(),
            }),
        }
    }

    fn handle_hello(&mut self, hello: wire::Hello) -> Result<(), ProtocolError> {
        let version = hello.max_version.min(self.local.max_version);
        if version < hello.min_version.max(self.local.min_version) {
            let error = ProtocolError::Version {
                peer_min: hello.min_version,
                peer_max: hello.max_version,
            };
            if !self.initiator {
                let reason = format!(
                    "this host speaks versions {} to {} of the page protocol, not {} to {}",
                    self.local.min_version, self.local.max_version, hello.min_version, hello.max_version
                );
                self.send(Kind::Refused(wire::Refused {
                    code: RefusalCode::Version as i32,
                    reason,
                }));
            }
            return Err(error);
        }
        self.state = State::Ready;
        self.events.push_back(LinkEvent::Hello(Negotiated {
            version,
            capabilities: Capabilities::from_wire(&hello.capabilities).and(self.local.capabilities),
            peer_limits: Limits::from_wire(hello.limits)?,
            peer_software: hello.software,
        }));
        Ok(())
    }

    fn expect(&self, state: State, message: &'static str) -> Result<(), ProtocolError> {
        if self.state == state {
            Ok(())
        } else {
            Err(ProtocolError::Unexpected {
                message,
                state: self.state.name(),
            })
        }
    }

    fn send(&mut self, kind: Kind) {
        self.outgoing.push_back(encode(&Control { kind: Some(kind) }));
    }
}

fn parse_open(open: wire::Open) -> Result<OpenRequest, ProtocolError> {
    let role = match open.role() {
        wire::Role::Push => Role::Push,
        wire::Role::Pull => Role::Pull,
        wire::Role::Migrate => Role::Migrate,
        wire::Role::Faults => Role::Faults {
            initiator_serves: open.initiator_serves,
        },
        wire::Role::Unspecified => {
            return Err(ProtocolError::Missing {
                message: "Open",
                field: "a known role",
            });
        }
    };
    let session_id = <[u8; 16]>::try_from(&open.session_id[..]).map_err(|_| ProtocolError::Missing {
        message: "Open",
        field: "a session id of 16 bytes",
    })?;
    Ok(OpenRequest {
        role,
        session_id: SessionId(session_id),
        resume: open.received.map(Received::from_wire),
    })
}

fn is_session_kind(kind: &Kind) -> bool {
    !matches!(
        kind,
        Kind::Hello(_) | Kind::Open(_) | Kind::Opened(_) | Kind::Refused(_)
    )
}

fn kind_name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Hello(_) => "Hello",
        Kind::Open(_) => "Open",
        Kind::Opened(_) => "Opened",
        Kind::Refused(_) => "Refused",
        Kind::Message(_) => "Message",
        Kind::Blob(_) => "Blob",
        Kind::Consumed(_) => "Consumed",
        Kind::Applied(_) => "Applied",
        Kind::Failed(_) => "Failed",
        Kind::Finish(_) => "Finish",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carry(from: &mut Link, to: &mut Link) -> Result<(), ProtocolError> {
        while let Some(bytes) = from.transmit() {
            to.receive(&bytes)?;
        }
        Ok(())
    }

    fn greeted() -> (Link, Link) {
        let (mut a, mut b) = (Link::initiator(Local::default()), Link::acceptor(Local::default()));
        carry(&mut a, &mut b).unwrap();
        carry(&mut b, &mut a).unwrap();
        assert!(matches!(a.poll(), Some(LinkEvent::Hello(_))));
        assert!(matches!(b.poll(), Some(LinkEvent::Hello(_))));
        (a, b)
    }

    fn request(role: Role) -> OpenRequest {
        OpenRequest {
            role,
            session_id: SessionId([9; 16]),
            resume: None,
        }
    }

    #[test]
    fn a_session_opens_with_what_both_sides_said() {
        let (mut a, mut b) = greeted();
        let role = Role::Migrate;
        let mut request = request(role);
        request.resume = Some(Received {
            applied: 3,
            pending: vec![5, 6],
            items: 2,
            consumed: 1,
        });
        a.open(&request).unwrap();
        carry(&mut a, &mut b).unwrap();
        assert_eq!(b.poll(), Some(LinkEvent::Open(request)));
        let received = Received {
            applied: 8,
            pending: vec![],
            items: 0,
            consumed: 0,
        };
        b.accept(&received).unwrap();
        carry(&mut b, &mut a).unwrap();
        assert_eq!(a.poll(), Some(LinkEvent::Opened(received)));
        assert!(a.is_open() && b.is_open());
    }

    #[test]
    fn a_refusal_reaches_the_initiator_with_its_reason() {
        let (mut a, mut b) = greeted();
        a.open(&request(Role::Faults { initiator_serves: true })).unwrap();
        carry(&mut a, &mut b).unwrap();
        assert!(matches!(b.poll(), Some(LinkEvent::Open(r)) if r.role == Role::Faults { initiator_serves: true }));
        b.refuse(RefusalCode::UnknownSession, "no such session").unwrap();
        carry(&mut b, &mut a).unwrap();
        let reason = "no such session".to_owned();
        assert_eq!(
            a.poll(),
            Some(LinkEvent::Refused {
                code: RefusalCode::UnknownSession,
                reason
            })
        );
    }

    #[test]
    fn both_sides_learn_of_a_version_mismatch() {
        let newer = Local {
            min_version: 7,
            max_version: 9,
            ..Local::default()
        };
        let (mut a, mut b) = (Link::initiator(newer), Link::acceptor(Local::default()));
        let error = carry(&mut a, &mut b).unwrap_err();
        assert_eq!(
            error,
            ProtocolError::Version {
                peer_min: 7,
                peer_max: 9
            }
        );
        let error = carry(&mut b, &mut a).unwrap_err();
        assert_eq!(
            error,
            ProtocolError::Version {
                peer_min: VERSION,
                peer_max: VERSION
            }
        );
    }

    #[test]
    fn the_newest_common_version_and_common_capabilities_count() {
        let newer = Local {
            min_version: 1,
            max_version: 9,
            capabilities: Capabilities(u64::MAX),
            ..Local::default()
        };
        let older = Local {
            capabilities: Capabilities::default().with(Capability::Zstd),
            ..Local::default()
        };
        let (mut a, mut b) = (Link::initiator(newer), Link::acceptor(older));
        carry(&mut a, &mut b).unwrap();
        let Some(LinkEvent::Hello(negotiated)) = b.poll() else {
            panic!()
        };
        assert_eq!(negotiated.version, VERSION);
        assert_eq!(negotiated.capabilities, Capabilities::default().with(Capability::Zstd));
    }

    #[test]
    fn messages_out_of_place_end_the_link() {
        use super::super::wire::{Applied, Message};
        let frames = [
            Kind::Applied(Applied { sequence: 1 }),
            Kind::Opened(wire::Opened::default()),
            Kind::Message(Message::default()),
        ];
        for kind in frames {
            let mut acceptor = Link::acceptor(Local::default());
            let bytes = encode(&Control { kind: Some(kind) });
            assert!(matches!(
                acceptor.receive(&bytes),
                Err(ProtocolError::Unexpected { .. })
            ));
        }
        let (mut a, _) = greeted();
        // An acceptor does not open sessions.
        let open = Kind::Open(wire::Open {
            role: 1,
            session_id: vec![0; 16].into(),
            ..Default::default()
        });
        assert!(a.receive(&encode(&Control { kind: Some(open) })).is_err());
    }

    #[test]
    fn hostile_opens_are_refused() {
        for (role, id) in [(0, 16), (99, 16), (1, 15), (1, 0)] {
            let (_, mut b) = greeted();
            let open = wire::Open {
                role,
                session_id: vec![0; id].into(),
                ..Default::default()
            };
            let bytes = encode(&Control {
                kind: Some(Kind::Open(open)),
            });
            assert!(matches!(b.receive(&bytes), Err(ProtocolError::Missing { .. })));
        }
    }

    use super::super::Capability;
}
