//! Where this host's identity and its list of peers are: one answer for all verbs.

use std::path::{Path, PathBuf};

use whimbrel::error::{Context, Result};
use whimbrel_page_server::identity::Identity;
use whimbrel_page_server::peers::Peers;
use whimbrel_page_server::transport::{Credentials, Trust};

/// Name of the file with the trusted hosts.
pub const PEERS_FILE: &str = "peers";

/// The identity directory: `--identity-dir`, `WHIMBREL_IDENTITY`, or the default.
#[derive(Clone, Debug)]
pub struct Home(Option<PathBuf>);

impl Home {
    /// The directory that was asked for, or the default: `/etc/whimbrel` for root, else `$XDG_CONFIG_HOME/whimbrel`
    /// (`~/.config/whimbrel` without that variable).
    pub fn new(asked: Option<PathBuf>) -> Home {
        let absolute = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let default = || {
            if rustix::process::geteuid().is_root() {
                return Some(PathBuf::from("/etc/whimbrel"));
            }
            let config = absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config")));
            Some(config?.join("whimbrel"))
        };
        Home(asked.or_else(default))
    }

    /// The directory.
    ///
    /// # Errors
    /// When none was given and there is no home directory.
    pub fn directory(&self) -> Result<&Path> {
        self.0.as_deref().ok_or_else(|| {
            whimbrel::error::Error::new("find this host's identity")
                .because("there is no home directory")
                .hint("use --identity-dir DIR")
        })
    }

    /// This host's identity, made on first use.
    ///
    /// # Errors
    /// When it cannot be read or made.
    pub fn identity(&self) -> Result<Identity> {
        let hint = || whimbrel::error::Error::new("load this host's identity").hint("use --identity-dir DIR");
        Identity::load_or_create(self.directory()?).with(hint)
    }

    /// The trusted hosts.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub fn peers(&self) -> Result<Peers> {
        Peers::load(&self.directory()?.join(PEERS_FILE)).context("load the list of trusted hosts")
    }

    /// What this host authenticates with, and whom it lets in. A host trusts itself.
    ///
    /// # Errors
    /// As [`Home::identity`] and [`Home::peers`].
    pub fn credentials(&self) -> Result<Credentials> {
        Ok(Credentials::Pinned {
            identity: self.identity()?,
            trust: Trust::List(self.peers()?),
        })
    }
}
