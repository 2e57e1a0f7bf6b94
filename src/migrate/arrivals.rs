//! The destination's notes: which trees have come to run here, so that this is known after the tool has died.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use whimbrel_page_server::proto::SessionId;

use super::protocol::{NotedTask, Settled, settle};
use super::wire::Answer;
use crate::error::{Context, Error, Result};
use crate::kernel::sys;
use crate::procfs;

/// How long tasks may take to die that the kernel kills.
const DYING: Duration = Duration::from_secs(5);

/// Notes are named after their sessions, between these.
const PREFIX: &str = "arrived-";
const SUFFIX: &str = ".json";
/// A source that has not asked for so long will not ask any more what became of a tree that is complete.
const FORGOTTEN: Duration = Duration::from_secs(7 * 24 * 3600);

/// Where notes are kept.
#[derive(Clone, Debug)]
pub struct Arrivals(PathBuf);

/// A tree that has arrived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// Its tasks in our pid namespace, with their start times.
    pub tasks: Vec<(i32, u64)>,
    /// All of them were let go.
    pub released: bool,
    /// All of its memory is here.
    pub complete: bool,
}

impl Arrival {
    /// A tree of these tasks that may run from now on.
    pub fn of(pids: impl IntoIterator<Item = i32>) -> Arrival {
        Arrival {
            tasks: pids
                .into_iter()
                .filter_map(|pid| procfs::living_since(pid).map(|start| (pid, start)))
                .collect(),
            released: false,
            complete: false,
        }
    }

    fn states(&self) -> impl Iterator<Item = NotedTask> {
        self.tasks.iter().map(|&(pid, start)| {
            if procfs::living_since(pid) != Some(start) {
                return NotedTask::Gone;
            }
            let status = procfs::read(pid, "status").and_then(|text| procfs::status::parse(&text));
            match status {
                Ok(status) if status.tracer_pid == 0 => NotedTask::Free,
                Ok(_) => NotedTask::Held,
                Err(_) => NotedTask::Gone,
            }
        })
    }

    /// Ends what is left of it.
    fn end(&self) {
        for &(pid, start) in &self.tasks {
            // By descriptor: the number may be another process's as soon as this one is gone.
            if let Ok(pidfd) = sys::pidfd_open(pid)
                && procfs::living_since(pid) == Some(start)
            {
                let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
                let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
                let wait = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
                let _ = rustix::event::poll(&mut fds, Some(&wait));
            }
        }
    }
}

impl Arrivals {
    /// Notes in `directory`, which is made when it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(directory: &Path) -> Result<Arrivals> {
        let failed = || Error::new("open the notes of arrivals").object(directory.display().to_string());
        std::fs::create_dir_all(directory).with(failed)?;
        Ok(Arrivals(directory.to_owned()))
    }

    fn path(&self, session: &str) -> Option<PathBuf> {
        // The name comes from a peer.
        let plain = !session.is_empty()
            && session.len() <= 64
            && session.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        plain.then(|| self.0.join(format!("{PREFIX}{session}{SUFFIX}")))
    }

    /// Where notes about the memory of a tree are kept whose pages are not all here.
    pub fn unfinished(&self, session: SessionId) -> PathBuf {
        self.0.join(format!("unfinished-{session}"))
    }

    /// The trees that run here by the notes of a server before us, and lack memory. Trees that were not let go as a whole
    /// are ended, and what is known of trees that came long ago is forgotten.
    pub fn incomplete(&self) -> Vec<(SessionId, Arrival)> {
        let names = std::fs::read_dir(&self.0).into_iter().flatten().flatten();
        let mut found = Vec::new();
        for entry in names {
            let name = entry.file_name();
            let session = name
                .to_str()
                .and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX));
            let Some((session, id)) = session.and_then(|session| Some((session, session.parse().ok()?))) else {
                continue;
            };
            match self.answer(session) {
                Answer {
                    running: true,
                    complete: false,
                    ..
                } => found.extend(self.read(session).map(|arrival| (id, arrival))),
                Answer { complete: true, .. } => {
                    let age = entry.metadata().and_then(|metadata| metadata.modified());
                    if age.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age > FORGOTTEN)) {
                        let _ = std::fs::remove_file(entry.path());
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// Notes what became of the tree of a session.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn note(&self, session: &str, arrival: &Arrival) -> Result<()> {
        let failed = || Error::new("note an arrival").object(session.to_owned());
        let path = self.path(session).ok_or_else(failed)?;
        let temporary = path.with_extension("tmp");
        std::fs::write(&temporary, serde_json::to_vec(arrival).with(failed)?).with(failed)?;
        std::fs::rename(&temporary, &path).with(failed)
    }

    /// Ends the tree of a session that was noted and cannot run, and forgets it.
    pub fn discard(&self, session: &str) {
        if let Some(arrival) = self.read(session) {
            arrival.end();
        }
        if let Some(path) = self.path(session) {
            let _ = std::fs::remove_file(path);
        }
        if let Ok(id) = session.parse() {
            let _ = std::fs::remove_dir_all(self.unfinished(id));
        }
    }

    fn read(&self, session: &str) -> Option<Arrival> {
        serde_json::from_slice(&std::fs::read(self.path(session)?).ok()?).ok()
    }

    /// What a server can say of a session that it did not see: one before it may have died at any moment. A tree that
    /// was not let go as a whole is ended before it is denied.
    pub fn answer(&self, session: &str) -> Answer {
        let Some(mut arrival) = self.read(session) else {
            return Answer::default();
        };
        let deadline = Instant::now() + DYING;
        while !arrival.released {
            match settle(arrival.states()) {
                Settled::Runs => {
                    arrival.released = true;
                    if let Err(error) = self.note(session, &arrival) {
                        tracing::warn!(error = error.chain(), "an arrival was not noted");
                    }
                }
                Settled::Broken => {
                    self.discard(session);
                    return Answer::default();
                }
                Settled::NotYet if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                Settled::NotYet => {
                    return Answer {
                        waiting: true,
                        ..Answer::default()
                    };
                }
            }
        }
        Answer {
            running: true,
            waiting: false,
            complete: arrival.complete,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper() -> std::process::Child {
        std::process::Command::new("sleep").arg("100").spawn().unwrap()
    }

    #[test]
    fn an_arrival_that_was_not_let_go_as_a_whole_is_ended_and_denied() {
        let directory = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::open(directory.path()).unwrap();
        assert_eq!(arrivals.answer("aa"), Answer::default());
        let (mut one, mut other) = (sleeper(), sleeper());
        let arrival = Arrival::of([one.id() as i32, other.id() as i32]);
        arrivals.note("aa", &arrival).unwrap();
        one.kill().unwrap();
        one.wait().unwrap();
        assert_eq!(arrivals.answer("aa"), Answer::default());
        assert!(!other.wait().unwrap().success());
        assert_eq!(arrivals.read("aa"), None);
    }

    #[test]
    fn an_arrival_whose_tasks_all_run_counts_and_one_that_ended_later_still_does() {
        let directory = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::open(directory.path()).unwrap();
        let (mut one, mut other) = (sleeper(), sleeper());
        arrivals
            .note("bb", &Arrival::of([one.id() as i32, other.id() as i32]))
            .unwrap();
        let answer = arrivals.answer("bb");
        assert!(answer.running && !answer.complete);
        for child in [&mut one, &mut other] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(arrivals.answer("bb").running);
    }

    #[test]
    fn a_session_that_names_another_file_is_not_noted() {
        let directory = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::open(directory.path()).unwrap();
        assert!(arrivals.note("../x", &Arrival::of([1])).is_err());
    }
}
