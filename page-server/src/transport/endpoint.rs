//! A UDP socket from which connections are dialled and on which they are accepted.

use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, UdpSocket},
    sync::{Arc, Mutex, Weak},
};

use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustls::pki_types::ServerName;
use tokio::sync::{Semaphore, mpsc};

use super::{
    Connection, Credentials, Error, Incoming, Options, connection, lock,
    session::Shared,
    tls::{Authenticator, Outcome},
};
use crate::proto::{SessionId, link::Local};

/// Bytes under way that the windows have room for: 1 GB/s over 50 ms, twice.
const WINDOW: u32 = 100 << 20;

/// The same before the delay is known, and the least. It fits into the receiver's socket buffer with the kernel's own
/// overhead: on a short path all that is under way may end up there while the receiver waits for a processor, and what
/// does not fit is lost.
const LEAST_WINDOW: u32 = 2 << 20;

/// Bytes a second that windows are made for. Delays are measured with the waits for processors in them: room enough.
const WINDOW_PER_SECOND: f64 = 1e9;

/// Socket buffers to ask for. Without CAP_NET_ADMIN the kernel gives what `net.core.rmem_max` and `wmem_max` allow.
const SOCKET_BUFFER: usize = 8 << 20;

/// Gives a connection the window that its delay needs.
pub(super) fn fit_window(connection: &quinn::Connection) {
    let wanted = (connection.rtt().as_secs_f64() * WINDOW_PER_SECOND) as u32;
    connection.set_receive_window(VarInt::from_u32(wanted.clamp(LEAST_WINDOW, WINDOW)));
}

/// What all connections of an endpoint share.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) options: Options,
    pub(super) authenticator: Arc<Authenticator>,
    pub(super) transport: Arc<TransportConfig>,
    /// Sessions that the peer may resume by dialling again.
    pub(super) sessions: Mutex<HashMap<SessionId, Weak<Shared>>>,
}

impl Common {
    pub(super) fn local(&self) -> Local {
        Local {
            limits: self.options.limits,
            capabilities: self.options.capabilities,
            ..Local::default()
        }
    }

    pub(super) fn register(&self, session: &Arc<Shared>) {
        let mut sessions = lock(&self.sessions);
        sessions.retain(|_, session| session.strong_count() > 0);
        sessions.insert(session.id(), Arc::downgrade(session));
    }

    pub(super) fn find(&self, id: SessionId) -> Option<Arc<Shared>> {
        lock(&self.sessions).get(&id)?.upgrade()
    }
}

/// A UDP socket that speaks the page protocol. Clones are the same endpoint.
#[derive(Clone, Debug)]
pub struct Endpoint(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    quinn: quinn::Endpoint,
    /// A duplicate of its socket.
    socket: UdpSocket,
    common: Arc<Common>,
    incoming: tokio::sync::Mutex<mpsc::Receiver<Result<Incoming, Error>>>,
    acceptor: tokio::task::AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

impl Endpoint {
    /// Opens a socket. Must be called inside a tokio runtime, which then drives the endpoint.
    ///
    /// # Errors
    /// When the credentials cannot be used or the socket cannot be opened.
    pub fn bind(address: SocketAddr, credentials: &Credentials, options: Options) -> Result<Self, Error> {
        let socket = UdpSocket::bind(address).map_err(|source| cannot_bind(address, source))?;
        Self::open(socket, Arc::new(Authenticator::new(credentials)?), options)
    }

    /// Another socket of the same host, on any port, with the same identity and options: what it carries waits neither
    /// in the queues of this one nor, in a runtime of its own, behind its work.
    ///
    /// # Errors
    /// As [`Endpoint::bind`].
    pub fn another(&self) -> Result<Self, Error> {
        let any = if self.local_address().is_ok_and(|address| address.is_ipv6()) {
            SocketAddr::from(([0_u16; 8], 0))
        } else {
            SocketAddr::from(([0, 0, 0, 0], 0))
        };
        let common = &self.0.common;
        let socket = UdpSocket::bind(any).map_err(|source| cannot_bind(any, source))?;
        Self::open(socket, common.authenticator.clone(), common.options.clone())
    }

    /// Another socket on the port of this one, for what comes from `peer` alone: no second port needs to be reachable.
    /// What the peer sends by another way (from behind a translated address, to another address of this host) arrives at
    /// this endpoint as before. Must be called inside the runtime that is to drive it.
    ///
    /// # Errors
    /// As [`Endpoint::bind`].
    pub fn for_peer(&self, peer: SocketAddr) -> Result<Self, Error> {
        let common = &self.0.common;
        let address = self.local_address().map_err(|source| cannot_bind(NOWHERE, source))?;
        let socket = connected_beside(&self.0.socket, address, peer).map_err(|source| cannot_bind(address, source))?;
        Self::open(socket, common.authenticator.clone(), common.options.clone())
    }

    fn open(socket: UdpSocket, authenticator: Arc<Authenticator>, options: Options) -> Result<Self, Error> {
        let address = socket.local_addr().unwrap_or(NOWHERE);
        let bind_error = |source| cannot_bind(address, source);
        let transport = Arc::new(transport_config(&options));
        let mut server = server_config(&authenticator, &transport, &Outcome::default())?;
        server.max_incoming(options.max_handshakes * 2);
        let mut config = EndpointConfig::default();
        config
            .max_udp_payload_size(options.max_udp_payload.max(1472))
            .expect("within bounds");
        // Best effort: with the kernel's default the socket only loses packets earlier.
        {
            use rustix::net::sockopt;
            let _ = sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER)
                .or_else(|_| sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER));
            let _ = sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER);
        }
        let beside = socket.try_clone().map_err(bind_error)?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let quinn = quinn::Endpoint::new(config, Some(server), socket, runtime).map_err(bind_error)?;
        let common = Arc::new(Common {
            options,
            authenticator,
            transport,
            sessions: Mutex::default(),
        });
        let (sender, receiver) = mpsc::channel(64);
        let acceptor = tokio::spawn(accept_all(quinn.clone(), common.clone(), sender)).abort_handle();
        Ok(Self(Arc::new(Inner {
            quinn,
            socket: beside,
            common,
            incoming: tokio::sync::Mutex::new(receiver),
            acceptor,
        })))
    }

    /// The address of the socket.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn local_address(&self) -> std::io::Result<SocketAddr> {
        self.0.quinn.local_addr()
    }

    /// Dials a host, authenticates, and agrees on a version of the protocol.
    ///
    /// # Errors
    /// When it cannot be reached, either side does not trust the other, or no version is common.
    pub async fn connect(&self, address: SocketAddr) -> Result<Connection, Error> {
        self.connect_named(address, None).await
    }

    /// As [`Endpoint::connect`]; with a certificate authority, `name` must be in the host's certificate. Without a name
    /// its address must be.
    ///
    /// # Errors
    /// As [`Endpoint::connect`], and when the name is not one.
    pub async fn connect_named(&self, address: SocketAddr, name: Option<&str>) -> Result<Connection, Error> {
        let common = &self.0.common;
        let outcome = Outcome::default();
        let mut config = quinn::ClientConfig::new(Arc::new(common.authenticator.client(&outcome)?));
        config.transport_config(common.transport.clone());
        let name = match name {
            Some(name) => name.to_owned(),
            None => ServerName::from(address.ip()).to_str().into_owned(),
        };
        let connecting = self.0.quinn.connect_with(config, address, &name);
        let connecting = connecting.map_err(|source| Error::Connect { address, source })?;
        let dialed = connection::Dialer {
            endpoint: self.clone(),
            address,
            name,
        };
        let handshake = connection::dial(connecting, common.clone(), &outcome, dialed);
        let timeout = tokio::time::timeout(common.options.handshake_timeout, handshake);
        timeout.await.unwrap_or(Err(Error::HandshakeTimeout { address }))
    }

    /// The next session that a peer asks for, or the next failed attempt (refused peers among them). `None` when the
    /// endpoint is closed. Sessions that are resumed do not show up here.
    pub async fn accept(&self) -> Option<Result<Incoming, Error>> {
        self.0.incoming.lock().await.recv().await
    }

    /// Closes all connections at once and waits until the peers were told. Peers see a broken connection.
    pub async fn close(&self) {
        self.0.acceptor.abort();
        self.0.quinn.close(connection::CLOSE_BROKEN.into(), b"endpoint closed");
        self.0.quinn.wait_idle().await;
    }
}

const NOWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

fn cannot_bind(address: SocketAddr, source: io::Error) -> Error {
    Error::Bind {
        address,
        source: Arc::new(source),
    }
}

/// A socket that shares the port of `first` and is connected. The kernel prefers it for what comes from its peer.
fn connected_beside(first: &UdpSocket, address: SocketAddr, peer: SocketAddr) -> io::Result<UdpSocket> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with, sockopt};
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let second = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseport(&second, true)?;
    // Only for the moment of the bind(2): another server that is started on this port must be told that it is taken.
    sockopt::set_socket_reuseport(first, true)?;
    let bound = bind(&second, &address).and_then(|()| connect(&second, &peer));
    sockopt::set_socket_reuseport(first, false)?;
    bound?;
    // Between the two calls it was open to everybody. What came is sent again, to the other socket.
    let second = UdpSocket::from(second);
    second.set_nonblocking(true)?;
    while second.recv(&mut [0; 1]).is_ok() {}
    Ok(second)
}

fn server_config(
    authenticator: &Arc<Authenticator>,
    transport: &Arc<TransportConfig>,
    outcome: &Outcome,
) -> Result<quinn::ServerConfig, Error> {
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(authenticator.server(outcome)?));
    config.transport_config(transport.clone());
    Ok(config)
}

fn transport_config(options: &Options) -> TransportConfig {
    let mut config = TransportConfig::default();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(options.max_udp_payload.max(1200));
    // One stream per batch and blob under way; requests for pages come in bursts.
    config
        .max_concurrent_uni_streams(VarInt::from_u32(options.limits.batch_window.saturating_add(16)))
        .max_concurrent_bidi_streams(VarInt::from_u32(1024))
        .stream_receive_window(VarInt::from_u32(16 << 20))
        .receive_window(VarInt::from_u32(LEAST_WINDOW))
        .send_window(u64::from(WINDOW))
        // Batches are applied in order, so the oldest is finished first.
        .send_fairness(false)
        .keep_alive_interval(Some(options.keep_alive))
        .max_idle_timeout(IdleTimeout::try_from(options.idle_timeout).ok())
        .mtu_discovery_config(Some(discovery));
    config
}

async fn accept_all(endpoint: quinn::Endpoint, common: Arc<Common>, sender: mpsc::Sender<Result<Incoming, Error>>) {
    let handshakes = Arc::new(Semaphore::new(common.options.max_handshakes.max(1)));
    while let Some(incoming) = endpoint.accept().await {
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            tracing::warn!("refusing {}: too many handshakes under way", incoming.remote_address());
            incoming.refuse();
            continue;
        };
        let (common, sender) = (common.clone(), sender.clone());
        tokio::spawn(async move {
            let address = incoming.remote_address();
            let outcome = Outcome::default();
            let handshake = async {
                let config = server_config(&common.authenticator, &common.transport, &outcome)?;
                let connecting = incoming.accept_with(Arc::new(config));
                let connecting = connecting.map_err(|source| Error::Connection { address, source })?;
                connection::answer(connecting, common.clone(), &outcome).await
            };
            let timeout = tokio::time::timeout(common.options.handshake_timeout, handshake);
            let result = match timeout.await.unwrap_or(Err(Error::HandshakeTimeout { address })) {
                Ok(None) => return,
                Ok(Some(incoming)) => Ok(incoming),
                Err(error) => Err(error),
            };
            drop(permit);
            match result {
                Ok(incoming) => drop(sender.send(Ok(incoming)).await),
                // Failed attempts are for the log; strangers must not be able to fill the queue.
                Err(error) => drop(sender.try_send(Err(error))),
            }
        });
    }
}
