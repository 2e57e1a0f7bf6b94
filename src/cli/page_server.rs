//! `page-server`: takes pages from dumps on other hosts.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;

use prost::Message as _;
use whimbrel::error::{Context as _, Error, Result};
use whimbrel_images::chain::PageStore;
use whimbrel_images::page::{MemoryObject, PageRun, PageSink};
use whimbrel_images::sink::DirPageSink;
use whimbrel_images::store::DirStore;
use whimbrel_page_server::server::{self, PushFactory, PushHandler, PushInfo};
use whimbrel_page_server::transport::{self, Endpoint, Options, ReceiveStats, Runtime};

use super::compare::ComparingSink;
use super::dump::is_whole;
use super::marks::Marks;
use super::options::Common;
use super::remote_pages::{DEFAULT_PORT, TlsOptions};
use super::staging::Staging;
use super::unbuilt::Unbuilt;
use super::workspace::{close_descriptors, signal_ready, write_pidfile};
use super::{Context, Logging, Run};

/// Take pages from a dump on another host, and store them as images.
///
/// It serves one dump, as CRIU's does, and ends. Both hosts must trust each other (`whimbrel id`, `whimbrel trust`), or
/// have certificates of one authority (the --tls options). Pages travel encrypted, over QUIC.
///
/// Example:
///   there: whimbrel page-server -D checkpoint --port 8417
///   here:  whimbrel dump -t 1234 -D checkpoint --page-server --address there --port 8417
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct PageServer {
    #[command(flatten)]
    common: Common,
    /// Address to listen on.
    #[arg(long, value_name = "ADDRESS", default_value = "::")]
    address: std::net::IpAddr,
    /// Port to listen on (UDP).
    #[arg(long, value_name = "PORT", default_value_t = DEFAULT_PORT)]
    port: u16,
    /// Store only pages that differ from those of the previous dump in DIR (relative to the images directory). A dump
    /// that can tell which were written since sends only those.
    #[arg(long, value_name = "DIR")]
    prev_images_dir: Option<PathBuf>,
    /// Write a zero byte to descriptor FD, and close it, when the server is ready.
    #[arg(long, value_name = "FD", conflicts_with = "daemon")]
    status_fd: Option<i32>,
    /// Run in the background once the socket is open.
    #[arg(short = 'd', long)]
    daemon: bool,
    #[command(flatten)]
    tls: TlsOptions,
    #[command(flatten)]
    unbuilt: Unbuilt,
}

impl Run for PageServer {
    fn logging(&self) -> Logging {
        self.common.logging(Some("Page server FAILED."))
    }

    fn run(self, context: &Context) -> Result<ExitCode> {
        self.unbuilt.refuse()?;
        if self.daemon {
            return in_background(&self.common);
        }
        let background = join_background()?;
        close_descriptors(&self.common)?;
        let workspace = self.common.workspace();
        let images = workspace.open_images()?;
        if is_whole(&images) {
            return Err(Error::new("store pages")
                .object(workspace.images.display().to_string())
                .because("it holds a dump already, and two must not mix")
                .hint("use -D DIR with an empty directory"));
        }
        let mut staging = Staging::new(images)?;
        let parent = match &self.prev_images_dir {
            None => None,
            Some(previous) => {
                let store = PageStore::new(staging.set_parent(previous)?).context("read the previous images")?;
                Some(Arc::new(store))
            }
        };
        let credentials = self.tls.credentials(&context.identity)?;
        let place = SocketAddr::new(self.address, self.port);
        let failed = || {
            Error::new("listen")
                .object(place.to_string())
                .hint("see --address and --port")
        };
        let runtime = Runtime::new(2).context("start threads")?;
        let endpoint = runtime
            .block_on(async { Endpoint::bind(place, &credentials, Options::default()) })
            .with(failed)?;
        let address = endpoint.local_address().with(failed)?;
        let factory = Arc::new(Factory {
            store: staging.store(),
            parent,
            received: Arc::new(Mutex::new(None)),
        });
        let config = server::Config {
            sinks: Some(factory.clone()),
            max_sessions: 1,
            once: true,
            ..server::Config::default()
        };
        let server = server::PageServer::new(endpoint, config);
        tracing::info!("The page server listens on {address}");
        context.event(&serde_json::json!({"event": "listening", "address": address.to_string()}));
        write_pidfile(&self.common, std::process::id() as i32)?;
        signal_ready(self.status_fd)?;
        if background {
            ready_in_background();
        }
        runtime.block_on(server.run(interrupted())).context("take pages")?;
        let received = factory.received.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(stats) = received else {
            return Err(Error::new("take pages").because("it was interrupted"));
        };
        staging.commit_memory()?;
        staging.keep();
        tracing::info!("Page server finished successfully: {} pages", stats.pages);
        context.event(&serde_json::json!({"event": "received", "pages": stats.pages}));
        Ok(ExitCode::SUCCESS)
    }
}

/// Ends at Ctrl-C or SIGTERM.
async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

/// Set for the process in the background.
const BACKGROUND: &str = "WHIMBREL_BACKGROUND";
const READY: &str = "ready";

/// Leaves the terminal, if this process is the one in the background; tells whether it is.
///
/// # Errors
/// When it leads a session already.
pub fn join_background() -> Result<bool> {
    let background = std::env::var_os(BACKGROUND).is_some();
    if background {
        rustix::process::setsid()
            .map_err(io::Error::from)
            .context("leave the terminal")?;
    }
    Ok(background)
}

/// Lets the foreground end: it waits for this line.
pub fn ready_in_background() {
    println!("{READY}");
}

/// Starts this command again without a terminal, and waits until it listens.
///
/// # Errors
/// When it ends before.
pub fn in_background(common: &Common) -> Result<ExitCode> {
    use std::io::BufRead;
    use std::process::{Command, Stdio};
    let failed = || Error::new("start in the background");
    let words: Vec<_> = std::env::args_os()
        .skip(1)
        .filter(|word| word != "-d" && word != "--daemon")
        .collect();
    let program = std::env::current_exe().with(failed)?;
    let mut child = Command::new(program)
        .args(words)
        .env(BACKGROUND, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(if common.log_file.is_some() {
            Stdio::null()
        } else {
            Stdio::inherit()
        })
        .spawn()
        .with(failed)?;
    let mut line = String::new();
    if let Some(output) = child.stdout.take() {
        io::BufReader::new(output).read_line(&mut line).with(failed)?;
    }
    if line.trim_end() == READY {
        return Ok(ExitCode::SUCCESS);
    }
    Err(failed().because("it ended before it was ready; the log says why"))
}

/// Makes the one sink of the one dump.
struct Factory {
    store: Arc<DirStore>,
    parent: Option<Arc<PageStore>>,
    received: Arc<Mutex<Option<ReceiveStats>>>,
}

impl PushFactory for Factory {
    fn open(&self, info: &PushInfo) -> io::Result<(Box<dyn PageSink>, Box<dyn PushHandler>)> {
        tracing::info!("{} sends pages", info.peer);
        let inner = DirPageSink::new(self.store.clone());
        let stored = match &self.parent {
            None => Stored::Plain(inner),
            Some(parent) => Stored::Changes(Box::new(ComparingSink::new(inner, parent.clone()))),
        };
        let sink = SharedSink(Arc::new(Mutex::new(Some(stored))));
        let handler = Handler {
            sink: sink.clone(),
            parent: self.parent.clone(),
            marks: Marks::default(),
            received: self.received.clone(),
        };
        Ok((Box::new(sink), Box::new(handler)))
    }
}

/// Where pages are stored.
enum Stored {
    Plain(DirPageSink),
    Changes(Box<ComparingSink>),
}

/// The sink, which the handler finishes when all has arrived.
#[derive(Clone)]
struct SharedSink(Arc<Mutex<Option<Stored>>>);

impl SharedSink {
    fn with(&self, work: impl FnOnce(&mut dyn PageSink) -> io::Result<()>) -> io::Result<()> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(Stored::Plain(sink)) => work(sink),
            Some(Stored::Changes(sink)) => work(sink.as_mut()),
            None => Err(io::Error::other("the dump has ended")),
        }
    }
}

impl PageSink for SharedSink {
    fn write_pages(&mut self, object: MemoryObject, run: PageRun, data: &[u8]) -> io::Result<()> {
        self.with(|sink| sink.write_pages(object, run, data))
    }

    fn zero_pages(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        self.with(|sink| sink.zero_pages(object, run))
    }

    fn parent_pages(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(Stored::Changes(sink)) => sink.parent_pages(object, run),
            Some(Stored::Plain(_)) => Err(io::Error::other(
                "this page server has no previous images that the dump could leave pages out for: use --prev-images-dir",
            )),
            None => Err(io::Error::other("the dump has ended")),
        }
    }
}

struct Handler {
    sink: SharedSink,
    parent: Option<Arc<PageStore>>,
    marks: Marks,
    received: Arc<Mutex<Option<ReceiveStats>>>,
}

impl PushHandler for Handler {
    fn blob(&mut self, name: &str, _: bytes::Bytes) -> io::Result<()> {
        Err(io::Error::other(format!(
            "a page server takes pages only, not {name:?}"
        )))
    }

    fn message(&mut self, body: bytes::Bytes) -> io::Result<Option<Vec<u8>>> {
        let message = Marks::read(&body)?;
        if !message.ask {
            self.marks = message;
            return Ok(None);
        }
        let known = self.parent.iter().flat_map(|parent| parent.tracks());
        Ok(Some(Marks::tell(known).encode_to_vec()))
    }

    fn finished(
        self: Box<Self>,
        _: Box<dyn PageSink>,
        stats: ReceiveStats,
        result: Result<(), transport::Error>,
    ) -> io::Result<()> {
        let stored = self.sink.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if result.is_err() {
            return Ok(());
        }
        let mut sink = match stored {
            Some(Stored::Plain(sink)) => sink,
            Some(Stored::Changes(sink)) => sink.into_inner(),
            None => return Err(io::Error::other("the dump has ended")),
        };
        for (object, track) in self.marks.into_tracks() {
            sink.set_track(object, track)?;
        }
        sink.finish()?;
        *self.received.lock().unwrap_or_else(PoisonError::into_inner) = Some(stats);
        Ok(())
    }
}
