//! Whom a host trusts: a file like authorized_keys, one `FINGERPRINT NAME` a line.

use std::{
    fs, io,
    io::{Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use crate::identity::Fingerprint;

/// Largest peers file in bytes.
pub const MAX_FILE: u64 = 1 << 20;

/// Most peers in a file.
pub const MAX_PEERS: usize = 8192;

/// Longest name of a peer in bytes.
pub const MAX_NAME: usize = 255;

/// A host that is trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its key.
    pub fingerprint: Fingerprint,
    /// What it is called here.
    pub name: String,
}

/// The peers file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PeersError {
    /// It cannot be read or written.
    #[error("cannot {action} the list of peers {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A line is not a comment and not `FINGERPRINT NAME`.
    #[error(
        "line {line} of the list of peers{} is not `FINGERPRINT NAME`; correct or remove it",
        in_file(path)
    )]
    BadLine {
        /// The file, if the list came from one.
        path: Option<PathBuf>,
        /// Number of the line, from 1.
        line: usize,
    },
    /// A name is empty, too long, or has white space or control characters in it.
    #[error("{name:?} cannot be the name of a peer: up to {MAX_NAME} characters without spaces are needed")]
    BadName {
        /// The name.
        name: String,
    },
    /// There are too many peers, or the file is too large.
    #[error(
        "the list of peers{} is too long: {MAX_PEERS} peers and {MAX_FILE} bytes are the most",
        in_file(path)
    )]
    TooLong {
        /// The file, if the list came from one.
        path: Option<PathBuf>,
    },
}

fn in_file(path: &Option<PathBuf>) -> String {
    path.as_ref()
        .map(|path| format!(" {}", path.display()))
        .unwrap_or_default()
}

/// The list of trusted hosts.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    path: Option<PathBuf>,
    lines: Vec<Line>,
}

#[derive(Clone, Debug)]
enum Line {
    Peer(Peer),
    Other(String),
}

impl Peers {
    /// A list that is in no file.
    pub fn in_memory(peers: impl IntoIterator<Item = Peer>) -> Self {
        Self {
            path: None,
            lines: peers.into_iter().map(Line::Peer).collect(),
        }
    }

    /// Loads a file; one that does not exist is an empty list.
    ///
    /// # Errors
    /// When it cannot be read, is too large or has a bad line. A list that is half understood is not used.
    pub fn load(path: &Path) -> Result<Self, PeersError> {
        let mut text = String::new();
        match fs::File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut text)) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(PeersError::Io {
                    action: "read",
                    path: path.to_owned(),
                    source,
                });
            }
            Ok(_) => {}
        }
        let lines = parse(&text, Some(path))?;
        Ok(Self {
            path: Some(path.to_owned()),
            lines,
        })
    }

    /// Parses the text of a list.
    ///
    /// # Errors
    /// When it is too long or has a bad line.
    pub fn parse(text: &str) -> Result<Self, PeersError> {
        Ok(Self {
            path: None,
            lines: parse(text, None)?,
        })
    }

    /// The peers in the order of the file.
    pub fn list(&self) -> impl Iterator<Item = &Peer> {
        self.lines.iter().filter_map(|line| match line {
            Line::Peer(peer) => Some(peer),
            Line::Other(_) => None,
        })
    }

    /// The peer with this key.
    pub fn find(&self, fingerprint: Fingerprint) -> Option<&Peer> {
        self.list().find(|peer| peer.fingerprint == fingerprint)
    }

    /// Adds a peer, or renames it. Call [`Peers::save`] to keep it.
    ///
    /// # Errors
    /// When the name cannot be used or the list is full.
    pub fn add(&mut self, fingerprint: Fingerprint, name: &str) -> Result<(), PeersError> {
        let blank = |c: char| c.is_whitespace() || c.is_control();
        if name.is_empty() || name.len() > MAX_NAME || name.contains(blank) {
            return Err(PeersError::BadName { name: name.to_owned() });
        }
        self.remove_where(|peer| peer.fingerprint == fingerprint);
        if self.list().count() >= MAX_PEERS {
            return Err(PeersError::TooLong {
                path: self.path.clone(),
            });
        }
        self.lines.push(Line::Peer(Peer {
            fingerprint,
            name: name.to_owned(),
        }));
        Ok(())
    }

    /// Removes the peers that have this name or this fingerprint; returns how many there were.
    pub fn remove(&mut self, name_or_fingerprint: &str) -> usize {
        let fingerprint = name_or_fingerprint.parse().ok();
        self.remove_where(|peer| peer.name == name_or_fingerprint || Some(peer.fingerprint) == fingerprint)
    }

    /// Writes the list to its file, whole or not at all. Comments stay.
    ///
    /// # Errors
    /// When the file cannot be written. A list that is in no file is not saved.
    pub fn save(&self) -> Result<(), PeersError> {
        let Some(path) = &self.path else { return Ok(()) };
        let mut temporary = path.clone().into_os_string();
        temporary.push(format!(".{}", std::process::id()));
        let write = || -> io::Result<()> {
            if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
                fs::create_dir_all(directory)?;
            }
            let mut options = fs::OpenOptions::new();
            let mut file = options
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(self.to_string().as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        };
        write().map_err(|source| PeersError::Io {
            action: "write",
            path: path.clone(),
            source,
        })
    }

    fn remove_where(&mut self, matches: impl Fn(&Peer) -> bool) -> usize {
        let before = self.lines.len();
        self.lines
            .retain(|line| !matches!(line, Line::Peer(peer) if matches(peer)));
        before - self.lines.len()
    }
}

impl std::fmt::Display for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.lines.iter().try_for_each(|line| match line {
            Line::Peer(peer) => writeln!(f, "{} {}", peer.fingerprint, peer.name),
            Line::Other(text) => writeln!(f, "{text}"),
        })
    }
}

fn parse(text: &str, path: Option<&Path>) -> Result<Vec<Line>, PeersError> {
    let path = || path.map(Path::to_owned);
    if text.len() as u64 > MAX_FILE {
        return Err(PeersError::TooLong { path: path() });
    }
    let mut lines = Vec::new();
    let mut peers = 0;
    for (index, text) in text.lines().enumerate() {
        let trimmed = text.trim();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            lines.push(Line::Other(text.to_owned()));
            continue;
        }
        let bad = || PeersError::BadLine {
            path: path(),
            line: index + 1,
        };
        let mut words = trimmed.split_whitespace();
        let (Some(fingerprint), Some(name), None) = (words.next(), words.next(), words.next()) else {
            return Err(bad());
        };
        let fingerprint = fingerprint.parse().map_err(|_| bad())?;
        if name.len() > MAX_NAME {
            return Err(bad());
        }
        peers += 1;
        if peers > MAX_PEERS {
            return Err(PeersError::TooLong { path: path() });
        }
        lines.push(Line::Peer(Peer {
            fingerprint,
            name: name.to_owned(),
        }));
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    #[test]
    fn peers_are_kept_with_the_comments_around_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("conf/peers");
        let (a, b) = (
            Identity::generate().unwrap().fingerprint(),
            Identity::generate().unwrap().fingerprint(),
        );
        let mut peers = Peers::load(&path).unwrap();
        peers.add(a, "alpha").unwrap();
        peers.save().unwrap();
        fs::write(&path, format!("# rack 4\n{}", fs::read_to_string(&path).unwrap())).unwrap();
        let mut peers = Peers::load(&path).unwrap();
        peers.add(b, "beta").unwrap();
        peers.add(a, "gamma").unwrap();
        peers.save().unwrap();
        let peers = Peers::load(&path).unwrap();
        assert_eq!(
            peers.list().map(|peer| &peer.name[..]).collect::<Vec<_>>(),
            ["beta", "gamma"]
        );
        assert!(peers.to_string().starts_with("# rack 4\n"));
        let mut peers = peers;
        assert_eq!(peers.remove("beta") + peers.remove(&a.to_string()), 2);
        assert!(peers.find(a).is_none());
    }

    #[test]
    fn a_bad_line_is_named_and_nothing_is_trusted() {
        let error = Peers::parse("# fine\n\nwhb1-short host\n").unwrap_err();
        assert!(matches!(error, PeersError::BadLine { line: 3, .. }));
        let fingerprint = Identity::generate().unwrap().fingerprint();
        assert!(Peers::parse(&format!("{fingerprint}\n")).is_err());
        assert!(Peers::parse(&format!("{fingerprint} a b\n")).is_err());
        assert!(Peers::parse(&"#\n".repeat(1 << 20)).is_err());
        assert!(Peers::default().add(fingerprint, "two words").is_err());
    }
}
