//! Putting a tree together: the order of things, and no knowledge of any of them.
//!
//! A [`Build`] holds a tree under construction. Its steps are called in this order, each for the whole tree: tasks,
//! memory, contents, everything else, go. (From images, tasks that inherit memory come when it is there: [`inherit`].)
//! Until [`state::Ready::go`] nothing of the tree runs, and dropping the build removes all of it.

pub mod build;
mod contents;
pub mod handover;
pub mod inherit;
pub mod lazy;
pub mod memory;
pub mod state;
mod terminals;
pub mod unfinished;
mod vacant;

use std::path::PathBuf;

pub use build::{Build, Skeleton};
pub use memory::MemorySink;

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the files of the tree are found.
    pub root: PathBuf,
    /// Files may have another build id, if only their size is the same (`--file-validation filesize`).
    pub skip_build_ids: bool,
    /// Files may have other permissions (`--skip-file-rwx-check`).
    pub skip_file_modes: bool,
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
            skip_build_ids: false,
            skip_file_modes: false,
            shell_job: false,
            tcp_established: false,
            tcp_close: false,
            new_session: false,
            sibling: false,
            leave_stopped: false,
        }
    }
}
