//! What became of a tree that was committed: asks the destination, and finishes what an earlier run of ours decided and did
//! not see through.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use whimbrel_page_server::proto::{Role, SessionId};
use whimbrel_page_server::transport::{Endpoint, Runtime, SessionRequest};

use super::Options;
use super::look::read_ids;
use super::pages::PageService;
use crate::dump::collect::Collected;
use crate::dump::lazy::FrozenPages;
use crate::error::{Context, Error, Result};
use crate::kernel::nft::NetworkLock;
use crate::kernel::sys;
use crate::migrate::protocol::{Fate, fate};
use crate::migrate::wire::{self, Body};

/// How often a destination that did not answer is asked what became of the tree.
pub const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Finishes what an earlier run of ours decided and did not see through.
pub fn recover(runtime: &Runtime, endpoint: &Endpoint, options: &Options) -> Result<()> {
    let Some(decision) = options.journal.read(options.pid)? else {
        return Ok(());
    };
    let alive = |&(pid, start): &(i32, u64)| read_ids(pid).is_ok_and(|(stat, _)| stat.starttime == start);
    if !decision.tasks.iter().any(alive) {
        return options.journal.clear(options.pid);
    }
    let destination = decision
        .destination
        .parse()
        .with(|| Error::new("read the decision").object(decision.destination.clone()))?;
    let failed = || {
        Error::new("learn what became of an earlier migration")
            .task(options.pid)
            .object(decision.destination.clone())
            .hint("the tree stays stopped until that host answers: start `whimbrel serve` there again")
    };
    let pids: Vec<i32> = decision
        .tasks
        .iter()
        .filter(|task| alive(task))
        .map(|&(pid, _)| pid)
        .collect();
    match ask_patiently(runtime, endpoint, destination, &decision.session) {
        Fate::Unknown => Err(failed().because("it does not answer, or has not decided")),
        Fate::Runs { complete } => {
            if !complete {
                serve_again(runtime, endpoint, destination, &decision.session, &pids)?;
            }
            end_old_copy(&pids)?;
            options.journal.clear(options.pid)?;
            let why = "it runs at the destination already, since an earlier migration; the old copy was ended";
            Err(Error::new("migrate").task(options.pid).because(why))
        }
        Fate::NeverRan => {
            // One whose tool died just before it was to be stopped runs.
            let ours = |pid: &i32| !decision.were_stopped.contains(pid) && is_stopped(*pid);
            for pid in pids.into_iter().filter(ours) {
                sys::kill(pid, libc::SIGCONT).context("let the tree go on")?;
            }
            options.journal.clear(options.pid)
        }
    }
}

fn is_stopped(pid: i32) -> bool {
    read_ids(pid).is_ok_and(|(stat, _)| stat.state == b'T')
}

/// Asks for as long as a destination that answers has not decided: it waits a while for a source that it has lost.
fn ask_patiently(runtime: &Runtime, endpoint: &Endpoint, destination: SocketAddr, session: &str) -> Fate {
    for _ in 0..60 {
        let answer = ask_state(runtime, endpoint, destination, session);
        match fate(answer.as_ref()) {
            Fate::Unknown if answer.is_some() => std::thread::sleep(ASK_AGAIN),
            fate => return fate,
        }
    }
    Fate::Unknown
}

/// Goes on serving the pages of a stopped tree whose server died, until the destination has them all.
fn serve_again(
    runtime: &Runtime,
    endpoint: &Endpoint,
    destination: SocketAddr,
    session: &str,
    pids: &[i32],
) -> Result<()> {
    let mut tasks = Vec::new();
    for &pid in pids {
        let (_, status) = read_ids(pid)?;
        tasks.push((pid, status.ns_pid.last().copied().unwrap_or(pid) as u32));
    }
    let session_id = session.parse().context("read the decision")?;
    let mut serving = PageService::open(endpoint, destination, session_id)?;
    serving.serve(runtime, endpoint, Arc::new(FrozenPages::of_stopped(&tasks)?));
    while !ask_state(runtime, endpoint, destination, session).is_some_and(|answer| answer.complete) {
        std::thread::sleep(ASK_AGAIN);
    }
    drop(serving);
    Ok(())
}

/// Ends a stopped tree that lives elsewhere, without a word to its peers.
fn end_old_copy(pids: &[i32]) -> Result<()> {
    use std::os::fd::AsFd as _;
    let mut held = Vec::new();
    let mut lock = NetworkLock::new_in_current_netns().context("lock the network")?;
    for &pid in pids {
        let mut collected = Collected::default();
        let pidfd = sys::pidfd_open(pid).with(|| Error::new("open a pidfd").task(pid))?;
        collected.look_at_running(pid, pidfd.as_fd())?;
        let connections = collected.endpoints()?.tcp();
        if !connections.is_empty() {
            lock.lock(&connections).context("lock the network")?;
        }
        collected.abandon_files()?;
        held.push((collected, pidfd));
    }
    for &pid in pids {
        sys::kill(pid, libc::SIGKILL).context("end the old copy")?;
    }
    for (_, pidfd) in &held {
        // Readable when the process is gone, and with it its descriptors; ours are closed after that.
        let mut fds = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
        let wait = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        let _ = rustix::event::poll(&mut fds, Some(&wait));
    }
    Ok(())
}

/// What a destination knows of a session; `None` when it does not answer.
pub fn ask_state(
    runtime: &Runtime,
    endpoint: &Endpoint,
    destination: SocketAddr,
    session: &str,
) -> Option<wire::Answer> {
    let request = SessionRequest {
        role: Role::Migrate,
        session_id: SessionId::random(),
    };
    let asked = runtime.block_on(async {
        let session_there = endpoint.connect(destination).await?.open(request).await?;
        session_there
            .send_message(wire::encode(Body::Query(wire::Query {
                session: session.as_bytes().to_vec(),
            })))
            .await?;
        let answer = session_there.recv_message().await?;
        session_there.close().await.ok();
        Ok::<_, whimbrel_page_server::transport::Error>(answer)
    });
    match wire::decode(&asked.ok()??) {
        Ok(Body::Answer(answer)) => Some(answer),
        _ => None,
    }
}
