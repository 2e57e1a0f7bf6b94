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
    /// Those of them that were stopped before, and stay so if the tree goes on here.
    #[serde(default)]
    pub were_stopped: Vec<i32>,
}

/// Where decisions are kept.
#[derive(Clone, Debug)]
pub struct Journal(PathBuf);

/// The right to move a tree, which one tool at a time has. It ends with its process, however that ends.
#[derive(Debug)]
pub struct Claim {
    file: std::fs::File,
    path: PathBuf,
}

impl Claim {
    /// Is this file still the one of its name? Whoever had it before may have removed it meanwhile.
    fn is_current(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let number = |metadata: std::io::Result<std::fs::Metadata>| metadata.ok().map(|metadata| metadata.ino());
        let ours = number(self.file.metadata());
        ours.is_some() && ours == number(std::fs::metadata(&self.path))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // While it is locked: nobody else can have this one.
        let _ = std::fs::remove_file(&self.path);
    }
}

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

    /// Claims a tree.
    ///
    /// # Errors
    /// When another tool moves it.
    pub fn claim(&self, root: i32) -> Result<Claim> {
        use rustix::fs::FlockOperation;
        let path = self.0.join(format!("migration-{root}.lock"));
        let failed = || Error::new("migrate").task(root).object(path.display().to_string());
        loop {
            let file = std::fs::File::create(&path).with(failed)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(failed()
                        .because("another whimbrel is moving it just now")
                        .hint("wait for that one, or cancel it"));
                }
                Err(errno) => return Err(std::io::Error::from(errno)).with(failed),
            }
            let path = path.clone();
            let claim = Claim { file, path };
            if claim.is_current() {
                return Ok(claim);
            }
            // Not ours to remove.
            std::mem::forget(claim);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_claimed_by_one_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let claim = journal.claim(7).unwrap();
        assert!(journal.claim(7).unwrap_err().chain().contains("another whimbrel"));
        drop(journal.claim(8).unwrap());
        drop(claim);
        drop(journal.claim(7).unwrap());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_decision_is_kept_until_its_outcome_is_known() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(&directory.path().join("run")).unwrap();
        let decision = Decision {
            session: "ab".into(),
            destination: "h:1".into(),
            tasks: vec![(7, 9)],
            were_stopped: vec![7],
        };
        assert_eq!(journal.read(7).unwrap(), None);
        journal.write(7, &decision).unwrap();
        assert_eq!(journal.read(7).unwrap(), Some(decision));
        journal.clear(7).unwrap();
        assert_eq!(journal.read(7).unwrap(), None);
    }
}
