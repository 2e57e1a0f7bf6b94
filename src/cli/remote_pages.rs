//! Sending pages to a page server: `--page-server --address HOST --port PORT`.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use clap::Args;

use prost::Message as _;
use whimbrel::error::{Context, Error, Result};
use whimbrel_images::page::{MemoryObject, PageSink};
use whimbrel_images::proto::TrackEntry;
use whimbrel_page_server::proto::{Role, SessionId};
use whimbrel_page_server::transport::{
    Credentials, Endpoint, Options, PageSender, Runtime, Session, SessionRequest, TlsFiles,
};

use super::identity::Home;
use super::marks::Marks;

/// The port of a page server when none is given.
pub const DEFAULT_PORT: u16 = 8417;

/// Where a page server is.
#[derive(Args, Clone, Debug)]
pub struct ServerAddress {
    /// Send pages to a page server instead of storing them here.
    #[arg(long)]
    pub page_server: bool,
    /// Host of the page server. It must trust this host: see `whimbrel trust`.
    #[arg(long, value_name = "HOST")]
    pub address: Option<String>,
    /// Port of the page server.
    #[arg(long, value_name = "PORT", default_value_t = DEFAULT_PORT)]
    pub port: u16,
    #[command(flatten)]
    pub tls: TlsOptions,
}

/// Authentication through an authority instead of fingerprints.
#[derive(Args, Clone, Debug)]
pub struct TlsOptions {
    /// Encrypt. It always is.
    #[arg(long)]
    tls: bool,
    /// Trust peers that this authority signed, instead of fingerprints.
    #[arg(long, value_name = "FILE", requires_all = ["tls_cert", "tls_key"])]
    tls_cacert: Option<PathBuf>,
    /// Revoked certificates of the authority.
    #[arg(long, value_name = "FILE", requires = "tls_cacert")]
    tls_cacrl: Option<PathBuf>,
    /// This host's certificate.
    #[arg(long, value_name = "FILE", requires = "tls_cacert")]
    tls_cert: Option<PathBuf>,
    /// This host's key.
    #[arg(long, value_name = "FILE", requires = "tls_cacert")]
    tls_key: Option<PathBuf>,
    /// Do not compare the server's name with its certificate.
    #[arg(long, requires = "tls_cacert")]
    tls_no_cn_verify: bool,
}

impl TlsOptions {
    /// What this host authenticates with: an authority's certificates if they were given, else its own identity.
    ///
    /// # Errors
    /// When the identity cannot be loaded.
    pub fn credentials(&self, home: &Home) -> Result<Credentials> {
        let (Some(cacert), Some(cert), Some(key)) = (&self.tls_cacert, &self.tls_cert, &self.tls_key) else {
            return home.credentials();
        };
        Ok(Credentials::Authority(TlsFiles {
            cacert: cacert.clone(),
            cacrl: self.tls_cacrl.clone(),
            cert: cert.clone(),
            key: key.clone(),
            verify_name: !self.tls_no_cn_verify,
        }))
    }
}

impl ServerAddress {
    /// Refuses half an address.
    ///
    /// # Errors
    /// When there is no host for --page-server, or a host without it.
    pub fn check(&self) -> Result<()> {
        let wrong = |why: &str| Err(Error::new("use the options given").because(why.to_owned()));
        match (self.page_server, &self.address) {
            (true, None) => wrong("--page-server needs a host: use --address HOST"),
            (false, Some(_)) => wrong("--address is of no use without --page-server"),
            _ => Ok(()),
        }
    }

    /// Where the server is.
    ///
    /// # Errors
    /// When the host has no address.
    pub fn resolve(&self) -> Result<SocketAddr> {
        let host = self.address.as_deref().unwrap_or("localhost");
        let failed = || {
            Error::new("find the page server")
                .object(host.to_owned())
                .hint("see --address")
        };
        let mut addresses = (host, self.port).to_socket_addrs().with(failed)?;
        addresses.next().ok_or_else(|| failed().because("it has no address"))
    }

    /// Any address of this host that reaches `peer`.
    pub fn any_address(&self, peer: SocketAddr) -> SocketAddr {
        if peer.is_ipv4() {
            (std::net::Ipv4Addr::UNSPECIFIED, 0).into()
        } else {
            (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
        }
    }
}

/// A session with a page server.
pub struct RemotePages {
    sender: PageSender,
    session: Session,
    endpoint: Endpoint,
    runtime: Runtime,
}

impl RemotePages {
    /// Dials the server.
    ///
    /// # Errors
    /// When it cannot be reached or does not take pages from this host.
    pub fn connect(server: &ServerAddress, home: &Home) -> Result<RemotePages> {
        let address = server.resolve()?;
        let failed = || {
            Error::new("connect to the page server")
                .object(address.to_string())
                .hint("is `whimbrel page-server` running there, and do both hosts trust each other (`whimbrel trust`)?")
        };
        let runtime = Runtime::new(2).with(failed)?;
        let credentials = server.tls.credentials(home)?;
        let name = server.address.as_deref();
        let (endpoint, session) = runtime
            .block_on(async {
                let endpoint = Endpoint::bind(server.any_address(address), &credentials, Options::default())?;
                let request = SessionRequest {
                    role: Role::Push,
                    session_id: SessionId::random(),
                };
                let session = endpoint.connect_named(address, name).await?.open(request).await?;
                Ok::<_, whimbrel_page_server::transport::Error>((endpoint, session))
            })
            .with(failed)?;
        tracing::info!("Connected to the page server {}", session.peer());
        Ok(RemotePages {
            sender: session.page_sender(),
            session,
            endpoint,
            runtime,
        })
    }

    /// What the dump before has left in its tasks, as the server's images say.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn marks(&self) -> Result<Marks> {
        let failed = || Error::new("ask the page server for the previous images");
        self.session
            .send_message_blocking(Marks::question().encode_to_vec())
            .with(failed)?;
        let answer = self.session.recv_message_blocking().with(failed)?;
        let answer = answer.ok_or_else(|| failed().because("it has ended the session"))?;
        Marks::read(&answer).with(failed)
    }

    /// Tells the server what this dump has left in its tasks.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn leave_marks(&self, left: &[(MemoryObject, TrackEntry)]) -> Result<()> {
        let marks = Marks::tell(left.iter().map(|(object, track)| (*object, track)));
        self.session
            .send_message_blocking(marks.encode_to_vec())
            .context("tell the page server about the next dump")
    }

    /// Where pages go.
    pub fn sink(&mut self) -> &mut dyn PageSink {
        &mut self.sender
    }

    /// Waits until the server has stored all.
    ///
    /// # Errors
    /// When it has not.
    pub fn finish(self) -> Result<()> {
        let failed = || Error::new("send pages to the page server");
        let stats = self.sender.finish_round().with(failed)?;
        drop(self.sender);
        self.session.close_blocking().with(failed)?;
        tracing::info!("Sent {} pages, {} bytes", stats.pages, stats.wire_bytes);
        self.runtime.block_on(self.endpoint.close());
        Ok(())
    }
}
