//! Restore.

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the files of the tree are found.
    pub root: std::path::PathBuf,
    /// Files may have another size or build id (`--file-validation`).
    pub skip_file_validation: bool,
    /// The tree takes this process's session and terminal (`--shell-job`).
    pub shell_job: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            root: std::path::PathBuf::from("/"),
            skip_file_validation: false,
            shell_job: false,
        }
    }
}
