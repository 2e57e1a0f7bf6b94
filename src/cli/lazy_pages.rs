//! `lazy-pages`: serves the memory of a tree that was restored with `--lazy-pages`.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use whimbrel::error::{Context as _, Error, Result};
use whimbrel::restore::handover::Listener;
use whimbrel::restore::lazy::{Layered, Serving, Urgent};
use whimbrel_images::chain::PageStore;
use whimbrel_images::page::PageSource;
use whimbrel_page_server::proto::{Role, SessionId};
use whimbrel_page_server::transport::{self, Endpoint, FaultClient, FaultLink, Runtime, SessionRequest};

use super::options::Common;
use super::page_server::{in_background, join_background, ready_in_background};
use super::remote_pages::ServerAddress;
use super::unbuilt::Unbuilt;
use super::workspace::{close_descriptors, signal_ready, write_pidfile};
use super::{Context, Logging, Run};

/// Fetch the memory of restored processes on demand.
///
/// It waits for `restore --lazy-pages` in the same work directory, serves the pages that its processes touch, fetches the
/// rest in the background, and ends when all memory is there. The pages come from the images, or with --page-server from
/// the host where `dump --lazy-pages` waits. When it dies, the processes wait for their pages: they never read zeros.
///
/// Examples:
///   whimbrel lazy-pages -d -D checkpoint
///   whimbrel restore -d -D checkpoint --lazy-pages
///
///   there: whimbrel dump -t 1234 -D checkpoint --lazy-pages --port 8417
///   here:  whimbrel lazy-pages -d -D checkpoint --page-server --address there --port 8417
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct LazyPages {
    #[command(flatten)]
    common: Common,
    /// Write a zero byte to descriptor FD, and close it, when the daemon is ready.
    #[arg(long, value_name = "FD", conflicts_with = "daemon")]
    status_fd: Option<i32>,
    /// Run in the background once the socket is there.
    #[arg(short = 'd', long)]
    daemon: bool,
    /// Fetch only what is touched, nothing in the background: for programs that need little of their memory. The daemon ends
    /// with them.
    #[arg(long)]
    on_demand: bool,
    /// It is what this verb does.
    #[arg(long, hide = true)]
    lazy_pages: bool,
    #[command(flatten)]
    server: ServerAddress,
    #[command(flatten)]
    unbuilt: Unbuilt,
}

/// How long to wait before a lost server is called again.
const AGAIN: Duration = Duration::from_millis(200);

impl Run for LazyPages {
    fn logging(&self) -> Logging {
        self.common.logging(Some("Lazy pages FAILED."))
    }

    fn run(self, context: &Context) -> Result<ExitCode> {
        self.unbuilt.refuse()?;
        self.server.check()?;
        if self.daemon {
            return in_background(&self.common);
        }
        let background = join_background()?;
        close_descriptors(&self.common)?;
        let workspace = self.common.workspace();
        let images = Arc::new(PageStore::new(workspace.open_images()?).context("read images")?);
        let remote = match self.server.page_server {
            true => Some(Remote::dial(&self.server, context)?),
            false => None,
        };
        let listener = Listener::bind(&workspace.open_work()?)?;
        tracing::info!("Waiting for a restore");
        context.event(&serde_json::json!({"event": "listening"}));
        write_pidfile(&self.common, std::process::id() as i32)?;
        signal_ready(self.status_fd)?;
        if background {
            ready_in_background();
        }
        let tasks = listener.take()?;
        drop(listener);
        let tasks: Vec<_> = tasks.into_iter().map(|task| task.served(None)).collect::<Result<_>>()?;
        tracing::info!("Serving the memory of {} tasks", tasks.len());

        let (urgent, bulk): (Arc<dyn PageSource>, Arc<dyn PageSource>) = match &remote {
            None => (images.clone(), images),
            Some(remote) => {
                let over = |rest: Arc<dyn PageSource>| {
                    Arc::new(Layered {
                        images: images.clone(),
                        rest,
                    })
                };
                let client = remote.client.clone();
                (over(Arc::new(Urgent(client.clone()))), over(Arc::new(client)))
            }
        };
        let mut serving = Serving::start(tasks, urgent, (!self.on_demand).then_some(bulk), None)?;
        let progress = loop {
            match serving.wait(Duration::from_millis(200)) {
                Ok(Some(progress)) => break progress,
                Ok(None) => {}
                Err(error) => {
                    // Requests under way would keep the threads; the server of the pages keeps its tree.
                    if let Some(remote) = &remote {
                        remote.client.close();
                    }
                    return Err(error);
                }
            }
        };
        if let Some(remote) = remote {
            remote.finish();
        }
        serving.finish();
        let stats = progress.stats;
        tracing::info!(
            "All memory is there: {} faults, {} pages fetched for them and {} in the background",
            stats.faults,
            stats.fault_pages,
            stats.prefetched
        );
        context.event(&serde_json::json!({
            "event": "completed",
            "tasks": progress.complete,
            "gone": progress.gone,
            "faults": stats.faults,
            "fault_pages": stats.fault_pages,
            "prefetched": stats.prefetched,
            "fault_p50_us": stats.fault_p50.as_micros() as u64,
            "fault_p99_us": stats.fault_p99.as_micros() as u64,
        }));
        Ok(ExitCode::SUCCESS)
    }
}

/// A frozen tree on another host that gives its pages.
struct Remote {
    client: FaultClient,
    endpoint: Endpoint,
    runtime: Runtime,
    calling: tokio::task::JoinHandle<()>,
}

impl Remote {
    /// Calls the server, and again whenever the connection is lost: the tasks wait meanwhile.
    fn dial(server: &ServerAddress, context: &Context) -> Result<Remote> {
        let address = server.resolve()?;
        let failed = || {
            Error::new("connect to the page server")
                .object(address.to_string())
                .hint(
                    "is `whimbrel dump --lazy-pages` waiting there, and do both hosts trust each other (`whimbrel trust`)?",
                )
        };
        let runtime = Runtime::new(2).with(failed)?;
        let credentials = server.tls.credentials(&context.identity)?;
        let request = SessionRequest {
            role: Role::Pull,
            session_id: SessionId::random(),
        };
        let name = server.address.clone();
        let (endpoint, link) = runtime
            .block_on(async {
                let endpoint =
                    Endpoint::bind(server.any_address(address), &credentials, transport::Options::default())?;
                let link = call(&endpoint, address, name.as_deref(), request).await?;
                Ok::<_, transport::Error>((endpoint, link))
            })
            .with(failed)?;
        tracing::info!("Connected to the page server {}", link.peer());
        let client = {
            let _inside = runtime.handle().enter();
            FaultClient::new(link).with(failed)?
        };
        let (calling, caller) = (client.clone(), endpoint.clone());
        let calling = runtime.handle().spawn(async move {
            while calling.disconnected().await {
                tracing::warn!("the page server is lost: tasks that need its pages wait, and it is called again");
                loop {
                    match call(&caller, address, name.as_deref(), request).await {
                        Ok(link) => {
                            tracing::warn!("the page server is back");
                            drop(calling.replace_connection(link));
                            break;
                        }
                        Err(error) => tracing::info!("it does not answer: {error}"),
                    }
                    tokio::time::sleep(AGAIN).await;
                }
            }
        });
        Ok(Remote {
            client,
            endpoint,
            runtime,
            calling,
        })
    }

    /// Tells the server that all was fetched.
    fn finish(self) {
        self.calling.abort();
        self.client.close();
        self.runtime.block_on(self.endpoint.close());
    }
}

async fn call(
    endpoint: &Endpoint,
    address: SocketAddr,
    name: Option<&str>,
    request: SessionRequest,
) -> Result<FaultLink, transport::Error> {
    endpoint.connect_named(address, name).await?.open_faults(request).await
}
