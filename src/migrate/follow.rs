//! Post-copy at the destination: what is missing is asked for until all of it is here.
//!
//! The source dials two connections: one for faults, from a socket of its own, and one for all the rest. Here, too, the
//! first has a socket and a runtime of its own, so that a fault waits for nobody else's packets and no other thread.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use whimbrel_lazy::ioctl::run_first;
use whimbrel_page_server::proto::{Role, SessionId};
use whimbrel_page_server::transport::{DirectRuntime, Endpoint, FaultClient, FaultLink, RefusalCode, Session};

use super::destination::Observer;
use super::wire::Finished;
use crate::error::{Context, Result};
use crate::restore::lazy::{Served, Serving, Urgent};
use crate::restore::unfinished::Notes;

/// How long the background fetch waits for a connection of its own.
const SECOND_LINK: Duration = Duration::from_millis(50);

/// Connections for page requests, as the source makes them.
pub struct FaultLinks {
    endpoint: Endpoint,
    tell: Sender<FaultLink>,
    links: Receiver<FaultLink>,
    own: Option<Own>,
    session: SessionId,
    /// The source's own port for them.
    port: u16,
}

/// What faults have for themselves.
struct Own {
    _endpoint: Endpoint,
    acceptor: tokio::task::AbortHandle,
    runtime: DirectRuntime,
}

impl Drop for Own {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

impl FaultLinks {
    /// Connections of a session that come to `endpoint` are in `links`; `tell` is its other end.
    pub fn new(
        endpoint: Endpoint,
        session: SessionId,
        tell: Sender<FaultLink>,
        links: Receiver<FaultLink>,
    ) -> FaultLinks {
        FaultLinks {
            session,
            endpoint,
            tell,
            links,
            own: None,
            port: 0,
        }
    }

    /// Gets ready for what the peer of a session will send from this port of its (0: nothing).
    pub(super) fn expect(&mut self, session: &Session, port: u32) {
        self.port = u16::try_from(port).unwrap_or(0);
        if self.port == 0 {
            return;
        }
        let peer = SocketAddr::new(session.peer().address.ip(), self.port);
        match Own::new(&self.endpoint, peer, self.session, self.tell.clone()) {
            Ok(own) => self.own = Some(own),
            // It is slower without, and not wrong.
            Err(error) => tracing::warn!(error = error.chain(), "page faults share a socket with the rest"),
        }
    }

    fn is_urgent(&self, link: &FaultLink) -> bool {
        link.peer().address.port() == self.port
    }

    fn ask_urgently(&self, link: FaultLink, runtime: &tokio::runtime::Handle) -> Result<FaultClient> {
        match &self.own {
            Some(own) => FaultClient::direct(link, &own.runtime).context("ask for pages"),
            None => ask(link, runtime),
        }
    }

    /// Serves faults and fetches the rest until all memory is here. Links come and go; the tasks wait.
    pub(super) fn follow(
        &self,
        tasks: Vec<Served>,
        notes: Option<Arc<Notes>>,
        runtime: &tokio::runtime::Handle,
        observer: &dyn Observer,
    ) -> Result<Finished> {
        let mut first = self.links.recv().context("await the connection for page requests")?;
        // What is fetched in the background must not be in a fault's way.
        let mut second = self.links.recv_timeout(SECOND_LINK).ok();
        if let Some(other) = &mut second
            && self.is_urgent(other)
            && !self.is_urgent(&first)
        {
            std::mem::swap(&mut first, other);
        }
        let mut clients = vec![self.ask_urgently(first, runtime)?];
        if let Some(link) = second {
            clients.push(ask(link, runtime)?);
        }
        let urgent = Arc::new(Urgent(clients[0].clone()));
        let bulk = Arc::new(clients[clients.len() - 1].clone());
        let mut serving = Serving::start(tasks, urgent, Some(bulk), notes)?;
        let started = Instant::now();
        let mut spare: Vec<FaultLink> = Vec::new();
        loop {
            match serving.wait(Duration::from_millis(200)) {
                Ok(Some(progress)) => {
                    tracing::debug!("all memory came in {:?}", started.elapsed());
                    clients.iter().for_each(FaultClient::close);
                    serving.finish();
                    return Ok(Finished {
                        faults: progress.stats.faults,
                        pages: progress.stats.fault_pages + progress.stats.prefetched,
                        fault_p50: progress.stats.fault_p50.as_micros() as u64,
                        fault_p99: progress.stats.fault_p99.as_micros() as u64,
                    });
                }
                Ok(None) => {
                    spare.extend(self.links.try_iter());
                    for (number, client) in clients.iter().enumerate() {
                        if client.is_connected() || spare.is_empty() {
                            continue;
                        }
                        let fits = spare.iter().position(|link| self.is_urgent(link) == (number == 0));
                        let link = spare.swap_remove(fits.unwrap_or(spare.len() - 1));
                        observer.note("the source is back");
                        client.replace_connection(link).ok();
                        serving.retry_now();
                    }
                }
                Err(error) => {
                    clients.iter().for_each(FaultClient::close);
                    return Err(error);
                }
            }
        }
    }
}

fn ask(link: FaultLink, runtime: &tokio::runtime::Handle) -> Result<FaultClient> {
    let _inside = runtime.enter();
    FaultClient::new(link).context("ask for pages")
}

impl Own {
    fn new(endpoint: &Endpoint, peer: SocketAddr, session: SessionId, tell: Sender<FaultLink>) -> Result<Own> {
        let runtime = DirectRuntime::new(run_first).context("start a thread for page requests")?;
        let opened = runtime.block_on(async { endpoint.for_peer(peer) });
        let endpoint = opened.context("open a socket for page requests")?;
        let accepting = endpoint.clone();
        let accept = async move {
            while let Some(incoming) = accepting.accept().await {
                let Ok(incoming) = incoming else { continue };
                let ours = incoming.session_id() == session
                    && matches!(incoming.role(), Role::Faults { initiator_serves: true });
                if !ours {
                    incoming
                        .refuse(RefusalCode::Role, "this port of yours is for page requests")
                        .await;
                } else if let Ok(link) = incoming.accept_faults().await {
                    let _ = tell.send(link);
                }
            }
        };
        let acceptor = runtime.handle().spawn(accept).abort_handle();
        Ok(Own {
            _endpoint: endpoint,
            acceptor,
            runtime,
        })
    }
}
