//! Groups of options that several verbs have.

use std::path::PathBuf;

use clap::Args;

use super::{Logging, workspace::Workspace};

/// Directories and the log: every verb of CRIU has them.
#[derive(Args, Clone, Debug, Default)]
pub struct Common {
    /// Directory of the image files [default: the current directory].
    #[arg(short = 'D', long, value_name = "DIR")]
    pub images_dir: Option<PathBuf>,
    /// Directory for logs, pid files and statistics [default: the images directory].
    #[arg(short = 'W', long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// Write the log to FILE, relative to the work directory [default: standard error].
    #[arg(short = 'o', long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// What is logged: -v0 nothing, -v1 errors, -v2 warnings too (the default), -v3 information and times, -v4 all.
    #[arg(short = 'v', long, value_name = "N")]
    pub verbosity: Option<u8>,
    /// Write the pid of the root task or server to FILE, relative to the work directory.
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Close descriptor FD first.
    #[arg(long, value_name = "FD")]
    pub close: Vec<i32>,
    /// Read options from FILE too: one a line, without the leading dashes.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Do not read /etc/criu/default.conf and $HOME/.criu/default.conf (they are read under the name criu only).
    #[arg(long)]
    no_default_config: bool,
}

impl Common {
    /// The directories.
    pub fn workspace(&self) -> Workspace {
        Workspace::new(self.images_dir.as_deref(), self.work_dir.as_deref())
    }

    /// How a verb with these options logs.
    pub fn logging(&self, on_failure: Option<&'static str>) -> Logging {
        Logging {
            file: self.log_file.as_ref().map(|file| self.workspace().in_work(file)),
            verbosity: self.verbosity,
            on_failure,
        }
    }
}

/// Scripts, statistics and signs of life: dump, pre-dump and restore have them.
#[derive(Args, Clone, Debug, Default)]
pub struct Hooks {
    /// Run FILE at every stage; $CRTOOLS_SCRIPT_ACTION says which (pre-dump, post-dump, pre-restore, post-restore,
    /// pre-resume, post-resume, setup-namespaces, post-setup-namespaces, network-lock, network-unlock).
    #[arg(long, value_name = "FILE")]
    pub action_script: Vec<PathBuf>,
    /// Print statistics at the end; they are always in stats-dump and stats-restore.
    #[arg(long)]
    pub display_stats: bool,
    /// Write a zero byte to descriptor FD, and close it, when the work is done or the server is ready.
    #[arg(long, value_name = "FD")]
    pub status_fd: Option<i32>,
}

/// What to do with kinds of resources that need the user's word: dump and restore have them.
#[derive(Args, Clone, Debug, Default)]
pub struct Resources {
    /// Carry established TCP connections.
    #[arg(long)]
    pub tcp_established: bool,
    /// Established TCP connections end: at `dump`, they are stored as closed; at `restore`, they come back closed.
    #[arg(long)]
    pub tcp_close: bool,
    /// Connections that a listening socket has not accepted yet are lost: their clients must connect again. (A word for
    /// `dump`, which refuses them without it.)
    #[arg(long)]
    pub skip_in_flight: bool,
    /// The program belongs to a shell: its session and terminal are those of whoever restores it.
    #[arg(short = 'j', long)]
    pub shell_job: bool,
    /// Carry file locks. Safe only where no process outside of the tree uses them. (A word for `dump`: what the images
    /// hold is restored.)
    #[arg(short = 'l', long)]
    pub file_locks: bool,
    /// Unix sockets may have peers outside of the tree. (A word for `dump`.)
    #[arg(short = 'x', long)]
    pub ext_unix_sk: bool,
}

/// Parses a size with K, M or G behind it.
///
/// # Errors
/// When it is none.
pub fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1 << 10),
        Some((at, 'm' | 'M')) => (&text[..at], 1 << 20),
        Some((at, 'g' | 'G')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "a number of bytes, with K, M or G behind it if you like, is needed")?;
    number.checked_mul(unit).ok_or_else(|| "that is too much".to_owned())
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_have_units() {
        assert_eq!(super::size("12"), Ok(12));
        assert_eq!(super::size("4K"), Ok(4096));
        assert_eq!(super::size("2g"), Ok(2 << 30));
        for bad in ["", "K", "-1", "1T", "99999999999G"] {
            assert!(super::size(bad).is_err(), "{bad}");
        }
    }
}
