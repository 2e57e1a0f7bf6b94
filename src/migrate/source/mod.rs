//! The source's half of a migration.
//!
//! `Stage` says where it stands and owns everything that is held there: the trackers, the frozen tree, the network lock,
//! the connections for pages. `Migration::step` takes a stage to the next. An error drops the stage, and every part of it
//! undoes what it stands for: that is the rollback, the same one for every phase.

mod cut_over;
mod look;
mod network;
mod pages;
mod recover;
mod rounds;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use whimbrel_page_server::proto::{Role, SessionId};
use whimbrel_page_server::transport::{Endpoint, PageSender, Runtime, Session, SessionRequest};

use self::cut_over::{Committed, Frozen, Put};
use self::look::Looked;
use self::pages::PageService;
use self::rounds::Rounds;
use super::journal::Journal;
use super::policy::Limits;
use super::report::{Report, Round, ms};
use super::wire::{self, Body};
use super::{Mode, Phase};
use crate::dump;
use crate::error::{Context, Error, Result};

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The root of the tree.
    pub pid: i32,
    /// Where it goes.
    pub destination: SocketAddr,
    /// How memory travels, and when rounds end.
    pub limits: Limits,
    /// What of the tree is carried.
    pub dump: dump::Options,
    /// An address that moves along: `10.0.0.2/24`; empty for none.
    pub move_address: String,
    /// The device that it is on, here and there; empty to find it.
    pub move_device: String,
    /// Only look whether it would work.
    pub dry_run: bool,
    /// Where the decision is written.
    pub journal: Journal,
    /// A scripted action at CRIU's named moments, if any.
    pub hooks: Hooks,
}

/// What is called at named moments: `network-lock`, `pre-resume` and so on.
#[derive(Clone, Default)]
pub struct Hooks(pub Option<Hook>);

/// A function of the moment's name.
pub type Hook = Arc<dyn Fn(&str) -> Result<()> + Send + Sync>;

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hooks({})", self.0.is_some())
    }
}

impl Hooks {
    fn call(&self, moment: &str) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |hook| hook(moment))
    }
}

/// Shows progress, and asks for an end.
pub trait Observer: Send + Sync {
    /// A phase begins.
    fn phase(&self, phase: Phase);
    /// A round ended.
    fn round(&self, number: u32, round: &Round);
    /// Has the user cancelled? Asked between steps until Commit.
    fn cancelled(&self) -> bool;
}

/// What became of it.
#[derive(Debug)]
pub enum Outcome {
    /// A dry run: every reason why it would not work.
    Looked(Vec<String>),
    /// The tree runs there.
    Moved(Box<Report>),
}

/// Moves a tree. Must be called on a thread of its own: it traces.
///
/// # Errors
/// Before Commit: the tree goes on here, and nothing is left there. After it: only when the destination says that the
/// tree never ran (it goes on here then), or when the outcome cannot be learned (it stays stopped, and the error says so).
pub fn run(runtime: &Runtime, endpoint: &Endpoint, options: &Options, observer: &dyn Observer) -> Result<Outcome> {
    let started = Instant::now();
    let _claim = options.journal.claim(options.pid)?;
    recover::recover(runtime, endpoint, options)?;
    observer.phase(Phase::Preflight);
    let looked = Looked::look(options)?;
    let request = SessionRequest {
        role: Role::Migrate,
        session_id: SessionId::random(),
    };
    let session = runtime
        .block_on(async { endpoint.connect(options.destination).await?.open(request).await })
        .with(|| Error::new("connect to the destination").object(options.destination.to_string()))?;
    let sender = session.page_sender();
    let mut migration = Migration {
        runtime,
        endpoint,
        options,
        observer,
        session,
        request,
        sender,
        report: Report::default(),
        pages: None,
    };
    let mut result = migration.run(looked);
    match &mut result {
        Ok(Outcome::Moved(report)) => report.total_ms = ms(started.elapsed()),
        Ok(Outcome::Looked(_)) => {}
        Err(error) => {
            // Whoever fails last speaks last: a destination that failed has said so, and knows.
            let _ = migration.session.send_message_blocking(wire::encode(Body::Abort(true)));
            migration.session.abort(&error.chain());
        }
    }
    result
}

/// Where a migration stands, and what it holds there.
enum Stage {
    /// The destination is asked whether it can take the tree.
    Preflight(Looked),
    /// The next round is to be sent.
    Round(Rounds),
    /// The tree is to be stopped.
    Freeze(Rounds),
    /// It is stopped; its last pages and everything else are to be sent.
    Final(Frozen),
    /// The destination has put it together; nothing is decided.
    Prepared(Put),
    /// The decision is on disk; it is to be told, and nothing goes back by itself any more.
    Commit(Committed),
    /// It runs there; pages follow.
    PostCopy(Put),
    /// It runs there, with all of its memory; what is left here is to go.
    Done(Put),
    /// There is nothing more to do.
    End(Outcome),
}

impl Stage {
    /// The phase that this step begins with; `None` where a step says it itself, at the right moment.
    fn phase(&self) -> Option<Phase> {
        match self {
            Stage::Preflight(_) | Stage::Freeze(_) | Stage::Done(_) | Stage::End(_) => None,
            Stage::Round(rounds) => Some(Phase::Round(rounds.number)),
            Stage::Final(_) => Some(Phase::Final),
            Stage::Prepared(_) => Some(Phase::Prepared),
            Stage::Commit(_) => Some(Phase::Commit),
            Stage::PostCopy(_) => Some(Phase::PostCopy),
        }
    }

    /// Can it still be given up?
    fn can_go_back(&self) -> bool {
        !matches!(
            self,
            Stage::Commit(_) | Stage::PostCopy(_) | Stage::Done(_) | Stage::End(_)
        )
    }
}

struct Migration<'a> {
    runtime: &'a Runtime,
    endpoint: &'a Endpoint,
    options: &'a Options,
    observer: &'a dyn Observer,
    session: Session,
    request: SessionRequest,
    sender: PageSender,
    report: Report,
    /// Where page requests will be answered, until it is known whether there will be any.
    pages: Option<PageService>,
}

impl Migration<'_> {
    fn run(&mut self, looked: Looked) -> Result<Outcome> {
        let mut stage = Stage::Preflight(looked);
        loop {
            if let Stage::End(outcome) = stage {
                return Ok(outcome);
            }
            if let Some(phase) = stage.phase() {
                self.observer.phase(phase);
            }
            if stage.can_go_back() {
                self.check_cancelled()?;
            }
            stage = self.step(stage)?;
        }
    }

    /// One phase.
    fn step(&mut self, stage: Stage) -> Result<Stage> {
        match stage {
            Stage::Preflight(looked) => self.preflight(looked),
            Stage::Round(rounds) => self.round(rounds),
            Stage::Freeze(rounds) => self.freeze(rounds),
            Stage::Final(frozen) => self.send_rest(frozen),
            Stage::Prepared(put) => self.decide(put),
            Stage::Commit(committed) => self.commit(committed),
            Stage::PostCopy(put) => self.follow(put),
            Stage::Done(put) => self.finish(put),
            Stage::End(outcome) => Ok(Stage::End(outcome)),
        }
    }

    fn preflight(&mut self, mut looked: Looked) -> Result<Stage> {
        if self.options.limits.mode != Mode::PreCopy && !self.options.dry_run {
            let pages = PageService::open(self.endpoint, self.options.destination, self.request.session_id)?;
            looked.begin.fault_port = pages.port();
            self.pages = Some(pages);
        }
        self.send(Body::Begin(looked.begin.clone()))?;
        let blockers = match self.receive("await the destination's preflight")? {
            Body::Ready(ready) => ready.blockers,
            other => return Err(unexpected(&other)),
        };
        if self.options.dry_run {
            return Ok(Stage::End(Outcome::Looked(blockers)));
        }
        if blockers.is_empty() {
            return self.begin_rounds(looked);
        }
        Err(Error::new("migrate")
            .task(self.options.pid)
            .because(format!("the destination cannot take it: {}", blockers.join("; and "))))
    }

    fn send(&self, body: Body) -> Result<()> {
        self.session
            .send_message_blocking(wire::encode(body))
            .context("tell the destination")
    }

    fn receive(&self, what: &str) -> Result<Body> {
        let message = self.session.recv_message_blocking().context(what)?;
        let message = message.ok_or_else(|| Error::new(what).because("the destination ended the session"))?;
        match wire::decode(&message)? {
            Body::Failed(failed) => {
                Err(Error::new("migrate").because(format!("the destination failed: {}", failed.reason)))
            }
            body => Ok(body),
        }
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.observer.cancelled() {
            Err(Error::new("migrate").because("cancelled"))
        } else {
            Ok(())
        }
    }
}

fn unexpected(body: &Body) -> Error {
    let text = format!("{body:?}");
    Error::new("migrate").because(format!(
        "the destination answered something else than expected: {:.80}",
        text
    ))
}
