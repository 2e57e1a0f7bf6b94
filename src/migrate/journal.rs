//! The source's decision on disk: written before Commit is sent, removed when the outcome is known.
//!
//! A tool that dies in between leaves a stopped tree and this note, which says whom to ask what became of it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

/// A decision that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The session, as hexadecimal digits.
    pub session: String,
    /// Address of the destination.
    pub destination: String,
    /// The processes of the tree, in the source's pid namespace, with their start times.
    pub tasks: Vec<(i32, u64)>,
}

/// Where decisions are kept.
#[derive(Clone, Debug)]
pub struct Journal(PathBuf);

impl Journal {
    /// A journal in `directory`, which is made when it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(directory: &Path) -> Result<Journal> {
        let failed = || Error::new("open the journal").object(directory.display().to_string());
        std::fs::create_dir_all(directory).with(failed)?;
        Ok(Journal(directory.to_owned()))
    }

    fn path(&self, root: i32) -> PathBuf {
        self.0.join(format!("migration-{root}.json"))
    }

    /// Writes a decision so that it survives our death. A crash of the host it need not survive: the stopped tree would not
    /// either.
    ///
    /// # Errors
    /// When it cannot be written: then it must not be acted upon.
    pub fn write(&self, root: i32, decision: &Decision) -> Result<()> {
        use std::io::Write;
        let path = self.path(root);
        let failed = || Error::new("write the decision").object(path.display().to_string());
        let temporary = path.with_extension("tmp");
        let text = serde_json::to_vec(decision).with(failed)?;
        let mut file = std::fs::File::create(&temporary).with(failed)?;
        file.write_all(&text).with(failed)?;
        std::fs::rename(&temporary, &path).with(failed)
    }

    /// A decision about `root` whose outcome is not known.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn read(&self, root: i32) -> Result<Option<Decision>> {
        let path = self.path(root);
        let failed = || Error::new("read the decision").object(path.display().to_string());
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).with(failed).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with(failed),
        }
    }

    /// The outcome is known.
    ///
    /// # Errors
    /// When the note cannot be removed.
    pub fn clear(&self, root: i32) -> Result<()> {
        match std::fs::remove_file(self.path(root)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("remove the decision"),
            _ => Ok(()),
        }
    }
}

/// The destination's notes: which trees have come to run here.
#[derive(Clone, Debug)]
pub struct Arrivals(PathBuf);

#[derive(Debug, Serialize, Deserialize)]
struct Arrival {
    root: i32,
    start: u64,
    released: bool,
    complete: bool,
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
        plain.then(|| self.0.join(format!("arrived-{session}.json")))
    }

    /// Notes that the tree of a session may run (`released`: does run) with this root.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn note(&self, session: &str, root: i32, released: bool, complete: bool) -> Result<()> {
        let failed = || Error::new("note an arrival").object(session.to_owned());
        let path = self.path(session).ok_or_else(failed)?;
        let arrival = Arrival {
            root,
            start: start_time(root).unwrap_or(0),
            released,
            complete,
        };
        let temporary = path.with_extension("tmp");
        std::fs::write(&temporary, serde_json::to_vec(&arrival).with(failed)?).with(failed)?;
        std::fs::rename(&temporary, &path).with(failed)
    }

    fn read(&self, session: &str) -> Option<Arrival> {
        serde_json::from_slice(&std::fs::read(self.path(session)?).ok()?).ok()
    }

    /// Has the tree of a session come to run here? One whose root was not released when its server died, died with it.
    pub fn has(&self, session: &str) -> bool {
        let alive = |arrival: &Arrival| start_time(arrival.root).is_some_and(|start| start == arrival.start);
        self.read(session)
            .is_some_and(|arrival| arrival.released || alive(&arrival))
    }

    /// Is all of its memory here?
    pub fn is_complete(&self, session: &str) -> bool {
        self.read(session).is_some_and(|arrival| arrival.complete)
    }
}

fn start_time(pid: i32) -> Option<u64> {
    let text = crate::procfs::read(pid, "stat").ok()?;
    crate::procfs::stat::parse(&text).ok().map(|stat| stat.starttime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_is_kept_until_its_outcome_is_known() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(&directory.path().join("run")).unwrap();
        let decision = Decision {
            session: "ab".into(),
            destination: "h:1".into(),
            tasks: vec![(7, 9)],
        };
        assert_eq!(journal.read(7).unwrap(), None);
        journal.write(7, &decision).unwrap();
        assert_eq!(journal.read(7).unwrap(), Some(decision));
        journal.clear(7).unwrap();
        assert_eq!(journal.read(7).unwrap(), None);
    }

    #[test]
    fn an_arrival_that_was_never_released_counts_only_while_its_root_lives() {
        let directory = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::open(directory.path()).unwrap();
        assert!(!arrivals.has("aa"));
        arrivals.note("aa", std::process::id() as i32, false, false).unwrap();
        assert!(arrivals.has("aa") && !arrivals.is_complete("aa"));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        arrivals.note("bb", child.id() as i32, false, false).unwrap();
        child.wait().unwrap();
        assert!(!arrivals.has("bb"));
        arrivals.note("bb", child.id() as i32, true, true).unwrap();
        assert!(arrivals.has("bb") && arrivals.is_complete("bb"));
        assert!(arrivals.note("../x", 1, true, true).is_err());
    }
}
