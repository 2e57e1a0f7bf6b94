//! `dump --lazy-pages`: the frozen tree is its own page server until all of its memory was fetched.
//!
//! The first page that somebody asks for is the point of no return: pages are asked for when the tree runs there. Until
//! then the dump can be taken back, and the tree goes on. From then on the tree here must not run again by itself,
//! whatever becomes of this process: it is stopped by SIGSTOP, and waits for whoever asks to come back.

use std::io::{Error as IoError, Result as IoResult};
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use whimbrel::dump::FrozenTree;
use whimbrel::dump::lazy::{FrozenPages, StoppedTree};
use whimbrel::dump::runs::RunSet;
use whimbrel::error::{Context as _, Error, Result};
use whimbrel_images::page::{MemoryObject, PageRun, PageSource, PageState};
use whimbrel_page_server::proto::{Role, SessionId};
use whimbrel_page_server::transport::{Endpoint, FaultServer, Incoming, Options, RefusalCode, Runtime};

use super::Context;
use super::remote_pages::ServerAddress;

/// A server on its socket.
pub struct Server {
    endpoint: Endpoint,
    runtime: Runtime,
}

/// What the threads of the server tell the thread that holds the tree.
enum Told {
    /// This session asks for its first page; it gets an answer when the decision has been made.
    Asks(SessionId, Sender<bool>),
    /// All was fetched.
    Complete(SessionId),
    /// The connection is lost.
    Lost(String),
}

impl Server {
    /// Opens the socket.
    ///
    /// # Errors
    /// When the address cannot be used.
    pub fn listen(options: &ServerAddress, context: &Context) -> Result<Server> {
        let address = match options.address {
            Some(_) => options.resolve()?,
            None => SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), options.port),
        };
        let failed = || {
            Error::new("listen")
                .object(address.to_string())
                .hint("see --address and --port: with --lazy-pages, they say where to listen")
        };
        let credentials = options.tls.credentials(&context.identity)?;
        let runtime = Runtime::new(2).context("start threads")?;
        let endpoint = runtime
            .block_on(async { Endpoint::bind(address, &credentials, Options::default()) })
            .with(failed)?;
        let address = endpoint.local_address().with(failed)?;
        tracing::info!("The lazy page server listens on {address}");
        context.event(&serde_json::json!({"event": "listening", "address": address.to_string()}));
        Ok(Server { endpoint, runtime })
    }

    /// Gives pages until whoever asks for them has all. `decided` is called before the first.
    ///
    /// # Errors
    /// Before the first page was given: the tree goes on here.
    pub fn serve(self, frozen: &FrozenTree, later: &[(u32, RunSet)], decided: &mut dyn FnMut()) -> Result<()> {
        let (tell, told) = channel();
        let pages = Arc::new(FrozenPages::open(frozen, later)?);
        let endpoint = self.endpoint.clone();
        let accepting = self.runtime.handle().spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                match incoming {
                    Ok(incoming) => drop(tokio::spawn(take(incoming, pages.clone(), tell.clone()))),
                    Err(error) => tracing::warn!("refused a connection: {error}"),
                }
            }
        });
        let result = wait(&told, frozen, decided);
        accepting.abort();
        self.runtime.block_on(self.endpoint.close());
        result
    }
}

async fn take(incoming: Incoming, pages: Arc<FrozenPages>, tell: Sender<Told>) {
    let asks = matches!(
        incoming.role(),
        Role::Pull
            | Role::Faults {
                initiator_serves: false
            }
    );
    if !asks {
        let why = "this is a dump that waits for its memory to be fetched: use `whimbrel lazy-pages --page-server`";
        return incoming.refuse(RefusalCode::Role, why).await;
    }
    let (session, peer) = (incoming.session_id(), incoming.peer().clone());
    tracing::info!("{peer} asks for memory");
    let source = Arc::new(Asked {
        pages,
        session,
        granted: Mutex::new(None),
        tell: tell.clone(),
    });
    let served = match incoming.accept_faults().await {
        Ok(link) => FaultServer::new(source, None).serve(link).await,
        Err(error) => Err(error),
    };
    let _ = tell.send(match served {
        Ok(()) => Told::Complete(session),
        Err(error) => Told::Lost(error.to_string()),
    });
}

/// The thread that holds the tree: it decides, and waits.
fn wait(told: &Receiver<Told>, frozen: &FrozenTree, decided: &mut dyn FnMut()) -> Result<()> {
    let mut runs_at = None;
    loop {
        let message = match told.recv_timeout(Duration::from_secs(1)) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::new("give pages").because("the endpoint is closed"));
            }
        };
        match message {
            Told::Asks(session, answer) => {
                if runs_at.is_none() {
                    let stopped = StoppedTree::stop(&frozen.tree)?;
                    decided();
                    drop(stopped);
                    tracing::info!("The tree runs elsewhere: here it stays stopped until its memory was fetched");
                    runs_at = Some(session);
                }
                let _ = answer.send(runs_at == Some(session));
            }
            Told::Complete(session) if runs_at.is_none_or(|at| at == session) => {
                if runs_at.is_some() {
                    return Ok(());
                }
                // Nothing was wanted yet: a daemon that was ended before a restore came.
                tracing::info!("whoever was to fetch the memory has ended; waiting for another");
            }
            Told::Complete(_) => {}
            Told::Lost(why) => tracing::warn!("the connection for page requests is lost ({why}); waiting for it"),
        }
    }
}

/// The pages, given to one session only: there can be one tree that needs them.
struct Asked {
    pages: Arc<FrozenPages>,
    session: SessionId,
    granted: Mutex<Option<bool>>,
    tell: Sender<Told>,
}

impl PageSource for Asked {
    fn read_pages(&self, object: MemoryObject, run: PageRun, buffer: &mut [u8]) -> IoResult<Vec<PageState>> {
        if !self.may()? {
            return Err(IoError::other("another restore has these pages already"));
        }
        self.pages.read_pages(object, run, buffer)
    }
}

impl Asked {
    fn may(&self) -> IoResult<bool> {
        let mut granted = self.granted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(granted) = *granted {
            return Ok(granted);
        }
        let (answer, answered) = channel();
        let gone = || IoError::other("the dump has ended");
        self.tell.send(Told::Asks(self.session, answer)).map_err(|_| gone())?;
        let may = answered.recv().map_err(|_| gone())?;
        *granted = Some(may);
        Ok(may)
    }
}
