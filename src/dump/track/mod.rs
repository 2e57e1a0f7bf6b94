//! Which pages of a running process have been written since the last look.
//!
//! There are two mechanisms, chosen by trying, not by version:
//!
//! | | [`WpAsync`] | [`SoftDirty`] |
//! |---|---|---|
//! | kernel | PAGEMAP_SCAN and userfaultfd's WP_ASYNC (6.7) | CONFIG_MEM_SOFT_DIRTY |
//! | stops the process | once, for a moment | at every look, for as long as reading its page table takes |
//! | what lasts | nothing: the marks go when our descriptor is closed | the bits, in the page table: from one run to the next |
//!
//! Rounds of a migration use the first where it is to be had. A chain of dumps ([`chain`]) can only use the second: marks
//! of write protection belong to a userfaultfd, and to keep one open between two runs it would have to lie in the program's
//! table of descriptors, where the program can see it, close it and hand it to its children. So without soft-dirty bits
//! a dump that follows another compares contents, which needs nothing that lasts.
//!
//! Whatever a tracker cannot watch counts as written at every look: mappings that are new, moved, or of a kind that
//! the mechanism does not take. Shared memory is not its business; it is carried whole.

pub mod chain;
mod soft_dirty;
mod tag;
#[cfg(test)]
mod tests;
mod wp_async;

pub use soft_dirty::SoftDirty;
pub use tag::Tag;
pub use wp_async::WpAsync;

use super::runs::RunSet;
use crate::error::{Error, Result};
use crate::kernel::features::{Feature, Missing};
use crate::procfs::{self, maps::Mapping};
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
    /// Finds what was written since the last look, and starts anew in the same step. `maps` are the mappings of now; a
    /// tracker that stops the process reads them again while it holds it. The first look finds everything.
    ///
    /// # Errors
    /// When the process is gone. What was found in a failed look is found again by the next.
    fn look(&mut self, maps: &[Mapping]) -> Result<Look>;

    /// As [`Tracker::look`], for a process that the caller holds stopped. Nothing is started anew.
    ///
    /// # Errors
    /// As [`Tracker::look`].
    fn last_look(&mut self, maps: &[Mapping]) -> Result<Look>;

    /// Name of the mechanism, for reports.
    fn name(&self) -> &'static str;
}

/// Which mechanisms this kernel has.
#[derive(Clone, Debug)]
pub struct Mechanisms {
    wp_async: std::result::Result<(), Missing>,
    soft_dirty: std::result::Result<(), Missing>,
}

impl Mechanisms {
    /// Tries both.
    pub fn probe() -> Mechanisms {
        Mechanisms {
            wp_async: Feature::UffdWpAsync.try_now(),
            soft_dirty: Feature::SoftDirty.try_now(),
        }
    }

    /// Starts to watch a process with the better one that works for it.
    ///
    /// # Errors
    /// With the reason why neither does: the kernel has none, the program uses userfaultfd itself, or it cannot be entered.
    pub fn start(&self, pid: i32, cache: &mut GadgetCache) -> Result<Box<dyn Tracker>> {
        let failed = || Error::new("watch memory").task(pid);
        let first = match &self.wp_async {
            Ok(()) if uses_userfaultfd(pid)? => "the program uses userfaultfd itself".to_owned(),
            Ok(()) => match WpAsync::attach(pid, cache) {
                Ok(tracker) => return Ok(Box::new(tracker)),
                Err(error) => error.chain(),
            },
            Err(missing) => format!("no asynchronous write protection ({missing})"),
        };
        match &self.soft_dirty {
            Ok(()) => {
                tracing::info!("task {pid}: memory is watched by soft-dirty bits: {first}");
                Ok(Box::new(SoftDirty::attach(pid)?))
            }
            Err(missing) => Err(failed()
                .because(format!("{first}; and no soft-dirty bits ({missing})"))
                .hint("its memory is sent while it is frozen; to avoid that use --mode post-copy")),
        }
    }
}

/// Starts to watch a process.
///
/// # Errors
/// As [`Mechanisms::start`].
pub fn start(pid: i32, cache: &mut GadgetCache) -> Result<Box<dyn Tracker>> {
    Mechanisms::probe().start(pid, cache)
}

/// Has the program registered memory with a userfaultfd? Then ours cannot.
fn uses_userfaultfd(pid: i32) -> Result<bool> {
    let maps = procfs::maps::parse(&procfs::read(pid, "smaps")?)?;
    let registered = |map: &Mapping| map.has(b"um") || map.has(b"uw") || map.has(b"ui");
    Ok(maps.iter().any(registered))
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
