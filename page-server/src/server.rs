//! A page server that is ready to run: takes pushed pages into sinks, and gives pages to those that ask.

use std::{
    io,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use tokio::{sync::Semaphore, task::JoinSet};
use whimbrel_images::page::{PageSink, PageSource};

use crate::{
    proto::{Role, SessionId},
    transport::{Endpoint, Error, FaultServer, Incoming, PeerInfo, ReceiveStats, Received, RefusalCode, Session},
};

/// A session that a peer pushes into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushInfo {
    /// Its id.
    pub session_id: SessionId,
    /// Who pushes.
    pub peer: PeerInfo,
}

/// Takes what comes with the pages of one push session. Called on threads that may block.
pub trait PushHandler: Send {
    /// A blob arrived. Its name comes from the peer: it is not to be used as a path without being checked.
    ///
    /// # Errors
    /// When it cannot be stored; the session fails then, and the peer hears why.
    fn blob(&mut self, name: &str, bytes: Bytes) -> io::Result<()>;

    /// A message arrived; what is returned is sent back. By default messages are ignored.
    ///
    /// # Errors
    /// As [`PushHandler::blob`].
    fn message(&mut self, body: Bytes) -> io::Result<Option<Vec<u8>>> {
        drop(body);
        Ok(None)
    }

    /// The session ended. When `result` is good, everything has arrived; only when this returns is the peer told that all
    /// is stored, so make it durable here. When it is an error, what came is not complete.
    ///
    /// # Errors
    /// When what came cannot be made durable; the peer hears why.
    fn finished(
        self: Box<Self>,
        sink: Box<dyn PageSink>,
        stats: ReceiveStats,
        result: Result<(), Error>,
    ) -> io::Result<()>;
}

/// Makes the sinks for push sessions.
pub trait PushFactory: Send + Sync {
    /// A peer wants to push. Called on a thread that may block.
    ///
    /// # Errors
    /// When it may not or cannot; the session is refused, and the peer hears why.
    fn open(&self, info: &PushInfo) -> io::Result<(Box<dyn PageSink>, Box<dyn PushHandler>)>;
}

/// What a page server offers.
#[derive(Clone)]
pub struct Config {
    /// Where pushed pages go; without it nobody may push.
    pub sinks: Option<Arc<dyn PushFactory>>,
    /// Where pages that are asked for come from; without it nobody may ask.
    pub source: Option<Arc<dyn PageSource>>,
    /// zstd level for replies that nobody waits for; `None` sends them as they are.
    pub reply_level: Option<i32>,
    /// Sessions at once, of all kinds; more are refused.
    pub max_sessions: usize,
    /// End after the first session, as CRIU's page server does.
    pub once: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            sinks: None,
            source: None,
            reply_level: None,
            max_sessions: 64,
            once: false,
        }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("sinks", &self.sinks.is_some())
            .field("source", &self.source.is_some())
            .field("max_sessions", &self.max_sessions)
            .field("once", &self.once)
            .finish_non_exhaustive()
    }
}

/// A page server on an endpoint.
#[derive(Debug)]
pub struct PageServer {
    endpoint: Endpoint,
    config: Config,
}

impl PageServer {
    /// A server that is not running yet.
    pub fn new(endpoint: Endpoint, config: Config) -> Self {
        Self { endpoint, config }
    }

    /// The endpoint it listens on.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Runs until `shutdown` ends, or after one session with [`Config::once`]. On shutdown no new sessions are taken; those
    /// that are open are waited for. To end them too, drop the future: peers then see a broken connection.
    ///
    /// # Errors
    /// With [`Config::once`], the error of that session.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
        let Self { endpoint, config } = self;
        let slots = Arc::new(Semaphore::new(config.max_sessions.max(1)));
        let mut sessions = JoinSet::new();
        let mut result = Ok(());
        tokio::pin!(shutdown);
        loop {
            let incoming = tokio::select! {
                () = &mut shutdown => break,
                Some(ended) = sessions.join_next(), if !sessions.is_empty() => {
                    if config.once && let Ok(Some(ended)) = ended {
                        result = ended;
                        break;
                    }
                    continue;
                }
                incoming = endpoint.accept() => incoming,
            };
            let incoming = match incoming {
                None => break,
                Some(Err(error)) => {
                    tracing::warn!("refused a connection: {error}");
                    continue;
                }
                Some(Ok(incoming)) => incoming,
            };
            let Ok(slot) = slots.clone().try_acquire_owned() else {
                let refusal = async move { incoming.refuse(RefusalCode::Busy, "too many sessions are open").await };
                tokio::spawn(refusal);
                continue;
            };
            let config = config.clone();
            sessions.spawn(async move {
                let result = serve(incoming, &config).await;
                drop(slot);
                result
            });
        }
        while sessions.join_next().await.is_some() {}
        result
    }
}

/// `None`: the session was refused, and does not count.
async fn serve(incoming: Incoming, config: &Config) -> Option<Result<(), Error>> {
    let (role, peer) = (incoming.role(), incoming.peer().clone());
    let result = match (role, &config.sinks, &config.source) {
        (Role::Push, Some(sinks), _) => push(incoming, sinks.clone()).await?,
        (
            Role::Pull
            | Role::Faults {
                initiator_serves: false,
            },
            _,
            Some(source),
        ) => {
            let server = FaultServer::new(source.clone(), config.reply_level);
            match incoming.accept_faults().await {
                Ok(link) => server.serve(link).await,
                Err(error) => Err(error),
            }
        }
        _ => {
            let reason = format!("this page server does not take {role} sessions");
            incoming.refuse(RefusalCode::Role, &reason).await;
            return None;
        }
    };
    match &result {
        Ok(()) => tracing::info!("{role} session of {peer} is complete"),
        Err(error) => tracing::warn!("{role} session of {peer} failed: {error}"),
    }
    Some(result)
}

async fn push(incoming: Incoming, sinks: Arc<dyn PushFactory>) -> Option<Result<(), Error>> {
    let info = PushInfo {
        session_id: incoming.session_id(),
        peer: incoming.peer().clone(),
    };
    let opened = blocking(move || sinks.open(&info)).await;
    let (sink, handler) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            incoming.refuse(RefusalCode::Application, &error.to_string()).await;
            return None;
        }
    };
    let session = match incoming.accept().await {
        Ok(session) => session,
        Err(error) => return Some(Err(error)),
    };
    let pages = session.receive_into(sink);
    let handler = Arc::new(Mutex::new(handler));
    let items = take_items(&session, &handler).await;
    if let Err(error) = &items {
        session.abort(&error.to_string());
    }
    let (sink, stats, applied) = pages.finished().await;
    let result = items.and(applied);
    let handler = Arc::into_inner(handler).expect("no call is under way");
    let handler = handler.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let given = result.clone();
    let stored = blocking(move || handler.finished(sink, stats, given)).await;
    if let Err(error) = result {
        return Some(Err(error));
    }
    if let Err(error) = stored {
        session.abort(&format!("what was pushed cannot be stored: {error}"));
        return Some(Err(Error::Sink(Arc::new(error))));
    }
    Some(session.close().await)
}

async fn take_items(session: &Session, handler: &Arc<Mutex<Box<dyn PushHandler>>>) -> Result<(), Error> {
    while let Some(received) = session.recv().await? {
        let handler = handler.clone();
        let call = move || {
            let mut handler = handler.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match received {
                Received::Message(body) => handler.message(body),
                Received::Blob { name, bytes } => handler.blob(&name, bytes).map(|()| None),
            }
        };
        let answer = blocking(call).await.map_err(|error| Error::Sink(Arc::new(error)))?;
        if let Some(answer) = answer {
            session.send_message(answer).await?;
        }
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(call: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(call)
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
}
