//! A host that takes migrations: accepts sessions, gives each an engine thread, and remembers what became of them.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use whimbrel_page_server::identity::Fingerprint;
use whimbrel_page_server::proto::{Role, SessionId};
use whimbrel_page_server::transport::{Endpoint, FaultLink, Incoming, RefusalCode, Session};

use super::arrivals::{Arrival, Arrivals};
use super::destination::{self, Observer, Options, Registry};
use super::follow::FaultLinks;
use super::wire::Answer;
use crate::error::{Error, Result};
use crate::kernel::sys;
use crate::restore::unfinished::Notes;

/// How many ended migrations are remembered, for sources that come back and ask.
const REMEMBERED: usize = 1024;
/// How long it may take to give up what was begun.
const GIVING_UP: Duration = Duration::from_secs(5);

#[derive(Default)]
struct State {
    waiting: bool,
    running: bool,
    complete: bool,
    faults: Option<Sender<FaultLink>>,
    /// Until it has ended.
    session: Option<Session>,
    /// Which tree it is, of whom.
    tree: Option<(Fingerprint, String)>,
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
        let noted = || self.arrivals.as_ref().map(|arrivals| arrivals.answer(session));
        known.or_else(noted).unwrap_or_default()
    }

    fn begin(&self, session: &str) -> (Sender<FaultLink>, Receiver<FaultLink>) {
        let (sender, receiver) = channel();
        self.lock().insert(
            session.to_owned(),
            State {
                faults: Some(sender.clone()),
                ..State::default()
            },
        );
        let mut order = self.order.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        order.push(session.to_owned());
        if order.len() > REMEMBERED {
            self.lock().remove(&order.remove(0));
        }
        (sender, receiver)
    }

    fn end(&self, session: &str) {
        if let Some(state) = self.lock().get_mut(session) {
            (state.waiting, state.faults, state.session) = (false, None, None);
        }
    }

    /// Gives up what this peer has begun for this tree in sessions before this one, and waits until nothing is left of it.
    fn begins(&self, session: &str, tree: &str) {
        let mut states = self.lock();
        let peer = states.get(session).and_then(|state| state.session.as_ref());
        let Some(tree) = peer.map(|session| (session.peer().fingerprint, tree.to_owned())) else {
            return;
        };
        let stale = |(id, state): (&String, &State)| {
            let same = id != session && state.tree.as_ref() == Some(&tree) && !state.running;
            same.then(|| Some((id.clone(), state.session.clone()?))).flatten()
        };
        let stale: Vec<_> = states.iter().filter_map(stale).collect();
        if let Some(state) = states.get_mut(session) {
            state.tree = Some(tree);
        }
        drop(states);
        for (_, session) in &stale {
            session.abort("its source began again");
        }
        let deadline = Instant::now() + GIVING_UP;
        let left = |all: &Migrations, id: &String| all.lock().get(id).is_some_and(|state| state.session.is_some());
        while stale.iter().any(|(id, _)| left(self, id)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
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
    fn note(&self, arrival: &Arrival) {
        if let Some(arrivals) = &self.all.arrivals
            && let Err(error) = arrivals.note(&self.session, arrival)
        {
            tracing::warn!(error = error.chain(), "an arrival was not noted");
        }
    }
}

impl Registry for One {
    fn begins(&self, tree: &str) {
        if !tree.is_empty() {
            self.all.begins(&self.session, tree);
        }
    }

    fn waiting(&self) {
        if let Some(state) = self.all.lock().get_mut(&self.session) {
            state.waiting = true;
        }
    }

    fn committed(&self, arrival: &Arrival) -> Result<()> {
        let note = |arrivals: &Arrivals| arrivals.note(&self.session, arrival);
        self.all.arrivals.as_ref().map_or(Ok(()), note)
    }

    fn running(&self, arrival: &Arrival, root: Option<i32>) {
        if let Some(state) = self.all.lock().get_mut(&self.session) {
            (state.running, state.waiting) = (true, false);
        }
        self.note(arrival);
        if let Some(root) = root {
            reap(root);
        }
    }

    fn completed(&self, arrival: &Arrival) {
        if let Some(state) = self.all.lock().get_mut(&self.session) {
            state.complete = true;
        }
        self.note(arrival);
    }

    fn failed(&self) {
        let runs = self.all.lock().get(&self.session).is_some_and(|state| state.running);
        if !runs {
            if let Some(arrivals) = &self.all.arrivals {
                arrivals.discard(&self.session);
            }
            self.all.end(&self.session);
        }
    }

    fn answer(&self, session: &str) -> Answer {
        self.all.answer(session)
    }
}

/// Takes migrations until the endpoint is closed. Each runs on a thread of its own. Trees that a server before us has left
/// without all of their memory get the rest.
pub async fn serve(endpoint: &Endpoint, options: &Options, observer: Arc<dyn Observer>) {
    let all = Arc::new(Migrations {
        arrivals: options.arrivals.clone(),
        ..Migrations::default()
    });
    // Before anybody can ask.
    for (session, arrival) in options.arrivals.iter().flat_map(Arrivals::incomplete) {
        take_over(session, arrival, endpoint, &all, options, &observer);
    }
    while let Some(incoming) = endpoint.accept().await {
        match incoming {
            Ok(incoming) => take(incoming, endpoint, &all, options, &observer).await,
            Err(error) => observer.note(&format!("a connection failed: {}", chain(&error))),
        }
    }
}

async fn take(
    incoming: Incoming,
    endpoint: &Endpoint,
    all: &Arc<Migrations>,
    options: &Options,
    observer: &Arc<dyn Observer>,
) {
    let number = incoming.session_id();
    let id = number.to_string();
    match incoming.role() {
        Role::Migrate => {
            let session = match incoming.accept().await {
                Ok(session) => session,
                Err(error) => return observer.note(&format!("a session failed: {}", chain(&error))),
            };
            let (tell, links) = all.begin(&id);
            if let Some(state) = all.lock().get_mut(&id) {
                state.session = Some(session.clone());
            }
            let (one, options, observer) = (
                One {
                    all: all.clone(),
                    session: id.clone(),
                },
                options.clone(),
                observer.clone(),
            );
            let endpoint = endpoint.clone();
            let body = move || {
                let faults = FaultLinks::new(endpoint, number, tell, links);
                let result = destination::run(&session, faults, &options, &one, &*observer);
                one.all.end(&id);
                if let Err(error) = result {
                    observer.note(&format!("failed: {}", error.chain()));
                }
            };
            spawn_engine(body);
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

/// Goes on with a tree of which a server before us did not get all memory here. Its source asks for us until we answer.
fn take_over(
    session: SessionId,
    mut arrival: Arrival,
    endpoint: &Endpoint,
    all: &Arc<Migrations>,
    options: &Options,
    observer: &Arc<dyn Observer>,
) {
    let (Some(arrivals), id) = (&options.arrivals, session.to_string()) else {
        return;
    };
    let (tell, links) = all.begin(&id);
    let one = One {
        all: all.clone(),
        session: id.clone(),
    };
    // Its root is not our child.
    one.running(&arrival, None);
    let directory = arrivals.unfinished(session);
    let (endpoint, runtime, observer) = (endpoint.clone(), options.runtime.clone(), observer.clone());
    spawn_engine(move || {
        let faults = FaultLinks::new(endpoint, session, tell, links);
        match complete(&directory, &faults, &runtime, &*observer) {
            Ok(notes) => {
                arrival.complete = true;
                one.completed(&arrival);
                // After that is noted: without them nobody could complete it.
                notes.remove();
                observer.note("all memory is here");
            }
            Err(error) => observer.note(&format!("a tree waits for its memory: {}", error.chain())),
        }
        one.all.end(&id);
    });
}

/// Gets what the notes in `directory` say is missing. The notes are of no use any more then.
fn complete(
    directory: &Path,
    faults: &FaultLinks,
    runtime: &tokio::runtime::Handle,
    observer: &dyn Observer,
) -> Result<Arc<Notes>> {
    let missing = || Error::new("take over a tree").because("there are no notes of what it lacks");
    let notes = Notes::open(directory).ok_or_else(missing)?;
    let tasks = notes.take()?;
    let count = tasks.len();
    observer.note(&format!("the memory of {count} tasks that came before is completed"));
    if count > 0 {
        faults.follow(tasks, Some(notes.clone()), runtime, observer)?;
    }
    Ok(notes)
}

fn spawn_engine(body: impl FnOnce() + Send + 'static) {
    if let Err(error) = std::thread::Builder::new().name("whimbrel-engine".into()).spawn(body) {
        tracing::error!(%error, "a migration's thread cannot be started");
    }
}

/// Waits for the end of a tree's root, on a thread of its own. It is our child, and nobody else would free its pid, which the
/// tree may need again: it may move away and come back.
fn reap(pid: i32) {
    let Ok(pidfd) = sys::pidfd_open(pid) else { return };
    let wait = move || {
        // Not by waitpid(2): that would also take stops that are for the thread that traces it.
        let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        while matches!(rustix::event::poll(&mut fds, None), Err(rustix::io::Errno::INTR)) {}
        let options = rustix::process::WaitIdOptions::EXITED;
        let ended = || rustix::process::waitid(rustix::process::WaitId::PidFd(pidfd.as_fd()), options);
        while matches!(ended(), Err(rustix::io::Errno::INTR)) {}
    };
    if let Err(error) = std::thread::Builder::new().name("whimbrel-reap".into()).spawn(wait) {
        tracing::warn!(%error, "process {pid} will not be reaped");
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
