//! Restore.

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the files of the tree are found.
    pub root: std::path::PathBuf,
    /// Files may have another size or build id.
    pub skip_file_validation: bool,
}
