//! Which pages a running process has written since the last look.
//!
//! A tracker is chosen by trying, not by version. Whatever it cannot watch counts as written at every look.

mod wp_async;

pub use wp_async::WpAsync;

use super::runs::RunSet;
use crate::error::Result;
use crate::procfs::maps::Mapping;
use crate::remote::inject::GadgetCache;

/// What one look at a process found.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// Pages that hold something and were written, or could not be watched.
    pub dirty: RunSet,
    /// Pages that were given back to the kernel since (or never held anything): they read as zeros.
    pub gone: RunSet,
    /// What was looked at. Pages outside of it belong to mappings that are gone or cannot be watched.
    pub watched: RunSet,
}

/// Watches one process.
pub trait Tracker: Send {
    /// Finds what was written since the last look, and starts anew in the same step. `maps` are the mappings of now.
    /// The first look finds everything.
    ///
    /// # Errors
    /// When the process is gone. What was found and lost in a failed look must be counted as written.
    fn look(&mut self, maps: &[Mapping]) -> Result<Look>;

    /// Name of the mechanism, for reports.
    fn name(&self) -> &'static str;
}

/// Starts to watch a process.
///
/// # Errors
/// When this kernel has no mechanism, or the process cannot be entered.
pub fn start(pid: i32, cache: &mut GadgetCache) -> Result<Box<dyn Tracker>> {
    Ok(Box::new(WpAsync::attach(pid, cache)?))
}

/// Can contents of this mapping be carried before the freeze? All private memory can.
pub fn is_watched(map: &Mapping) -> bool {
    let kernel = map.name.starts_with(b"[v");
    !map.shared && !kernel && !map.has(b"ht") && !map.has(b"io") && !map.has(b"pf")
}

/// Can this mapping exist at the destination before the freeze? Memory without a file: all that is large in practice, and
/// the same at both ends whatever files there are.
pub fn is_staged(map: &Mapping) -> bool {
    map.inode == 0 && is_watched(map)
}
