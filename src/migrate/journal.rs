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
}
