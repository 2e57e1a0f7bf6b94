//! A host that takes migrations: accepts sessions, gives each an engine thread, and remembers what became of them.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};

use whimbrel_page_server::proto::Role;
use whimbrel_page_server::transport::{Endpoint, FaultLink, Incoming, RefusalCode};

use super::destination::{self, Observer, Options, Registry};
use super::journal::Arrivals;
use super::wire::Answer;
use crate::error::Result;

/// How many ended migrations are remembered, for sources that come back and ask.
const REMEMBERED: usize = 1024;

#[derive(Default)]
struct State {
    waiting: bool,
    running: bool,
    complete: bool,
    faults: Option<Sender<FaultLink>>,
}

/// All migrations of a host.
#[derive(Default)]
pub struct Migrations {
    arrivals: Option<Arrivals>,
    states: Mutex<HashMap<String, State>>,
    order: Mutex<Vec<String>>,
}

impl Migrations {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, State>> {
        self.states.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What is known of a session: from memory, or from the note of a server before us. One that is unknown never ran here.
    pub fn answer(&self, session: &str) -> Answer {
        let known = self.lock().get(session).map(|state| Answer {
            running: state.running,
            waiting: state.waiting,
            complete: state.complete,
        });
        known.unwrap_or_else(|| {
            let running = self.arrivals.as_ref().is_some_and(|arrivals| arrivals.has(session));
            // Nobody fetches for it any more; if something is missing, it waits for ever, and the source must not end.
            Answer {
                running,
                waiting: false,
                complete: running && self.arrivals.as_ref().is_some_and(|a| a.is_complete(session)),
            }
        })
    }

    fn begin(&self, session: &str) -> Receiver<FaultLink> {
        let (sender, receiver) = channel();
        self.lock().insert(
            session.to_owned(),
            State {
                faults: Some(sender),
                ..State::default()
            },
        );
        let mut order = self.order.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        order.push(session.to_owned());
        if order.len() > REMEMBERED {
            self.lock().remove(&order.remove(0));
        }
        receiver
    }

    fn end(&self, session: &str) {
        if let Some(state) = self.lock().get_mut(session) {
            (state.waiting, state.faults) = (false, None);
        }
    }

    fn link(&self, session: &str, link: FaultLink) {
        if let Some(faults) = self.lock().get(session).and_then(|state| state.faults.clone()) {
            let _ = faults.send(link);
        }
    }
}

struct One {
    all: Arc<Migrations>,
    session: String,
}

impl One {
    fn note(&self, root: i32, complete: bool) {
        if let Some(arrivals) = &self.all.arrivals
            && let Err(error) = arrivals.note(&self.session, root, true, complete)
        {
            tracing::warn!(error = error.chain(), "an arrival was not noted");
        }
    }
}

impl Registry for One {
    fn waiting(&self) {
        if let Some(state) = self.all.lock().get_mut(&self.session) {
            state.waiting = true;
        }
    }

    fn committed(&self, root: i32) -> Result<()> {
        self.all
            .arrivals
            .as_ref()
            .map_or(Ok(()), |arrivals| arrivals.note(&self.session, root, false, false))
    }

    fn running(&self, root: i32) {
        if let Some(state) = self.all.lock().get_mut(&self.session) {
            (state.running, state.waiting) = (true, false);
        }
        self.note(root, false);
    }

    fn completed(&self, root: i32) {
        if let Some(state) = self.all.lock().get_mut(&self.session) {
            state.complete = true;
        }
        self.note(root, true);
    }

    fn answer(&self, session: &str) -> Answer {
        self.all.answer(session)
    }
}

/// Takes migrations until the endpoint is closed. Each runs on a thread of its own.
pub async fn serve(endpoint: &Endpoint, options: &Options, observer: Arc<dyn Observer>) {
    let all = Arc::new(Migrations {
        arrivals: options.arrivals.clone(),
        ..Migrations::default()
    });
    while let Some(incoming) = endpoint.accept().await {
        match incoming {
            Ok(incoming) => take(incoming, &all, options, &observer).await,
            Err(error) => observer.note(&format!("a connection failed: {}", chain(&error))),
        }
    }
}

async fn take(incoming: Incoming, all: &Arc<Migrations>, options: &Options, observer: &Arc<dyn Observer>) {
    let id = incoming.session_id().to_string();
    match incoming.role() {
        Role::Migrate => {
            let session = match incoming.accept().await {
                Ok(session) => session,
                Err(error) => return observer.note(&format!("a session failed: {}", chain(&error))),
            };
            let faults = all.begin(&id);
            let (one, options, observer) = (
                One {
                    all: all.clone(),
                    session: id.clone(),
                },
                options.clone(),
                observer.clone(),
            );
            let body = move || {
                let result = destination::run(&session, &faults, &options, &one, &*observer);
                one.all.end(&id);
                match result {
                    Ok(destination::Outcome::Running { pid }) => reap(pid),
                    Ok(_) => {}
                    Err(error) => observer.note(&format!("failed: {}", error.chain())),
                }
            };
            if let Err(error) = std::thread::Builder::new().name("whimbrel-engine".into()).spawn(body) {
                tracing::error!(%error, "a migration's thread cannot be started");
            }
        }
        Role::Faults { initiator_serves: true } => match incoming.accept_faults().await {
            Ok(link) => all.link(&id, link),
            Err(error) => observer.note(&format!("a connection failed: {}", chain(&error))),
        },
        _ => {
            incoming
                .refuse(
                    RefusalCode::Role,
                    "this host takes migrations; for pages use `whimbrel page-server`",
                )
                .await
        }
    }
}

/// Waits for the end of a tree's root. It is our child, and nobody else would free its pid, which the tree may need again:
/// it may move away and come back.
fn reap(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let wait = || rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        while matches!(wait(), Err(rustix::io::Errno::INTR)) {}
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}
