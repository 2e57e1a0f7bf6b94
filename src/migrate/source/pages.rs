//! Serves the pages that follow on demand.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use whimbrel_images::page::PageSource;
use whimbrel_page_server::proto::{Role, SessionId};
use whimbrel_page_server::transport::{Endpoint, FaultLink, FaultServer, Runtime, SessionRequest};

use crate::error::{Context, Result};

/// Serves pages over as many connections as it takes, until dropped: one for faults, with a socket and a thread of its
/// own, and one for all the rest.
pub struct PageService {
    faults: Endpoint,
    runtime: Runtime,
    destination: SocketAddr,
    request: SessionRequest,
    links: [Option<FaultLink>; 2],
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl PageService {
    /// Opens the socket for faults, whose port the destination may be told.
    ///
    /// # Errors
    /// When there is no thread or no socket for it.
    pub fn open(endpoint: &Endpoint, destination: SocketAddr, session_id: SessionId) -> Result<PageService> {
        let request = SessionRequest {
            role: Role::Faults { initiator_serves: true },
            session_id,
        };
        let runtime = Runtime::of_one(whimbrel_lazy::ioctl::run_first).context("start a thread for page requests")?;
        let faults = runtime
            .block_on(async { endpoint.another() })
            .context("open a socket for page requests")?;
        Ok(PageService {
            faults,
            runtime,
            destination,
            request,
            links: [None, None],
            tasks: Vec::new(),
        })
    }

    /// The port of that socket.
    pub fn port(&self) -> u32 {
        let address = self.faults.local_address();
        address.map_or(0, |address| u32::from(address.port()))
    }

    /// Makes the connections ahead, so that the first fault does not wait for handshakes. Those that fail are made later.
    pub fn connect(&mut self, endpoint: &Endpoint) {
        for (link, endpoint) in self.links.iter_mut().zip([&self.faults, endpoint]) {
            let dialing = dial(endpoint, self.destination, self.request);
            *link = self.runtime.block_on(dialing).ok();
        }
    }

    /// Begins to answer, the bulk in `runtime`.
    pub fn serve(&mut self, runtime: &Runtime, endpoint: &Endpoint, source: Arc<dyn PageSource>) {
        let [first, second] = std::mem::take(&mut self.links);
        let places = [
            (self.runtime.handle(), &self.faults, first),
            (runtime.handle(), endpoint, second),
        ];
        for (handle, endpoint, mut link) in places {
            let (endpoint, destination, request) = (endpoint.clone(), self.destination, self.request);
            let server = FaultServer::new(source.clone(), None).reading_at_once();
            self.tasks.push(handle.spawn(async move {
                loop {
                    let next = match link.take() {
                        Some(link) => Ok(link),
                        None => dial(&endpoint, destination, request).await,
                    };
                    match next {
                        Ok(link) => drop(server.serve(link).await),
                        Err(error) => {
                            tracing::warn!(%error, "a connection for page requests is down; trying again")
                        }
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }));
        }
    }
}

impl Drop for PageService {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

async fn dial(
    endpoint: &Endpoint,
    destination: SocketAddr,
    request: SessionRequest,
) -> std::result::Result<FaultLink, whimbrel_page_server::transport::Error> {
    endpoint.connect(destination).await?.open_faults(request).await
}
