//! Putting a tree together: the order of things, and no knowledge of any of them.
//!
//! A [`Build`] holds a tree under construction. Its steps are called in this order, each for the whole tree: tasks,
//! memory, contents, everything else, go. Until [`state::Ready::go`] nothing of the tree runs, and dropping the build removes
//! all of it.

pub mod build;
pub mod handover;
pub mod lazy;
pub mod memory;
pub mod state;

use std::path::PathBuf;

pub use build::{Build, Skeleton};
pub use memory::MemorySink;

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the files of the tree are found.
    pub root: PathBuf,
    /// Files may have another size or build id (`--file-validation`).
    pub skip_file_validation: bool,
    /// The tree takes this process's session and terminal (`--shell-job`).
    pub shell_job: bool,
    /// Established TCP connections are restored (`--tcp-established`).
    pub tcp_established: bool,
    /// Established TCP connections come back closed (`--tcp-close`).
    pub tcp_close: bool,
    /// Sessions from outside of the tree become a new session of the root, as in a migration.
    pub new_session: bool,
    /// The root becomes a child of this process's parent (`--restore-sibling`).
    pub sibling: bool,
    /// All tasks are stopped by SIGSTOP before they run (`--leave-stopped`).
    pub leave_stopped: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            root: PathBuf::from("/"),
            skip_file_validation: false,
            shell_job: false,
            tcp_established: false,
            tcp_close: false,
            new_session: false,
            sibling: false,
            leave_stopped: false,
        }
    }
}
