//! The directories of a dump or restore, and the small files beside the images.

use std::path::{Path, PathBuf};

use whimbrel::error::{Context, Error, Result};
use whimbrel::kernel::sys;
use whimbrel_images::store::DirStore;

use super::options::Common;

/// Where images are, and where logs, pid files and statistics go.
#[derive(Clone, Debug)]
pub struct Workspace {
    /// The images directory.
    pub images: PathBuf,
    /// The work directory.
    pub work: PathBuf,
}

impl Workspace {
    /// From `-D` and `-W`.
    pub fn new(images: Option<&Path>, work: Option<&Path>) -> Workspace {
        let images = images.unwrap_or(Path::new(".")).to_owned();
        let work = work.map_or_else(|| images.clone(), Path::to_owned);
        Workspace { images, work }
    }

    /// A path relative to the work directory.
    pub fn in_work(&self, path: &Path) -> PathBuf {
        self.work.join(path)
    }

    /// Opens the images directory.
    ///
    /// # Errors
    /// When it is not there.
    pub fn open_images(&self) -> Result<DirStore> {
        open_directory(&self.images, "use -D DIR; it must exist")
    }

    /// Opens the work directory.
    ///
    /// # Errors
    /// When it is not there.
    pub fn open_work(&self) -> Result<DirStore> {
        open_directory(&self.work, "use -W DIR; it must exist")
    }

    /// The images directory as others must call it: absolute.
    pub fn absolute_images(&self) -> PathBuf {
        std::fs::canonicalize(&self.images).unwrap_or_else(|_| self.images.clone())
    }
}

fn open_directory(path: &Path, hint: &str) -> Result<DirStore> {
    let failed = || {
        Error::new("open a directory")
            .object(path.display().to_string())
            .hint(hint)
    };
    DirStore::open(path).with(failed)
}

/// Closes what `--close` asks for.
///
/// # Errors
/// When there is no such descriptor.
pub fn close_descriptors(common: &Common) -> Result<()> {
    common.close.iter().try_for_each(|&fd| {
        let failed = || {
            Error::new("close a descriptor")
                .object(format!("fd {fd}"))
                .hint("see --close")
        };
        sys::close_inherited(fd).with(failed)
    })
}

/// Writes the pid file that `--pidfile` asks for.
///
/// # Errors
/// When it cannot be written.
pub fn write_pidfile(common: &Common, pid: i32) -> Result<()> {
    let Some(file) = &common.pidfile else { return Ok(()) };
    let path = common.workspace().in_work(file);
    let failed = || {
        Error::new("write the pid file")
            .object(path.display().to_string())
            .hint("see --pidfile")
    };
    std::fs::write(&path, pid.to_string()).with(failed)
}

/// Says on the descriptor of `--status-fd` that all is ready, and closes it.
///
/// # Errors
/// When there is no such descriptor.
pub fn signal_ready(status_fd: Option<i32>) -> Result<()> {
    let Some(fd) = status_fd else { return Ok(()) };
    let failed = || {
        Error::new("write a status")
            .object(format!("fd {fd}"))
            .hint("see --status-fd")
    };
    let copy = sys::take_descriptor(std::process::id() as i32, fd).with(failed)?;
    rustix::io::write(&copy, &[0])
        .map_err(std::io::Error::from)
        .with(failed)?;
    sys::close_inherited(fd).with(failed)
}
