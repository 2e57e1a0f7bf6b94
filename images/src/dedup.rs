//! Freeing the pages of earlier dumps that a later dump of the chain has again.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::FallocateFlags;

use crate::chain::{at_level, open_chain, read_pagemaps};
use crate::error::{ImageError, ImageErrorKind};
use crate::interval::IntervalMap;
use crate::page::{MemoryObject, PAGE_SIZE, PageRun};
use crate::pagemap::{Pagemap, PagemapFlags, pages_name};
use crate::store::DirStore;

/// What [`dedup`] has freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deduplicated {
    /// Pages of the parents that are holes now; those that were before are counted too.
    pub pages: u64,
    /// Bytes that the pages files take less on the disk.
    pub freed_bytes: u64,
}

/// Punches holes into the pages files of all parents of `directory`, where a later dump of the chain has the page.
///
/// The newest dump stays whole. **The parents can no longer be restored on their own**: the pagemaps stay as they are,
/// and a page in a hole reads as zeros.
///
/// # Errors
/// When the chain or a pagemap is damaged (nothing has been changed then), or when the file system cannot punch holes.
pub fn dedup(directory: DirStore) -> Result<Deduplicated, ImageError> {
    let levels = open_chain(directory)?;
    let mut pagemaps = Vec::new();
    for (level, directory) in levels.iter().enumerate() {
        pagemaps.push(read_pagemaps(directory).map_err(|error| at_level(level, error))?);
    }
    let mut total = Deduplicated::default();
    let mut newer: HashMap<MemoryObject, IntervalMap<()>> = HashMap::new();
    for (level, (directory, pagemaps)) in levels.iter().zip(&pagemaps).enumerate() {
        for (&object, pagemap) in pagemaps {
            let newer = newer.entry(object).or_default();
            let holes = holes(pagemap, newer);
            if !holes.is_empty() {
                let punched = punch(directory, pagemap.pages_id, &holes);
                let punched = punched.map_err(|error| {
                    let error = ImageError::new(pages_name(pagemap.pages_id), 0, ImageErrorKind::Io(error));
                    at_level(level, error)
                })?;
                total.pages += punched.pages;
                total.freed_bytes += punched.freed_bytes;
            }
            for run in pagemap
                .runs
                .iter()
                .filter(|run| run.flags.contains(PagemapFlags::PRESENT))
            {
                newer.insert(run.run.start, run.run.end(), ());
            }
        }
    }
    Ok(total)
}

/// Offset and length in bytes of what `newer` has too.
fn holes(pagemap: &Pagemap, newer: &IntervalMap<()>) -> Vec<(u64, u64)> {
    let in_newer = |(run, offset): (PageRun, u64)| {
        newer
            .overlapping(run.start, run.end())
            .map(move |part| (offset + (part.start - run.start), part.end - part.start))
    };
    pagemap.stored().flat_map(in_newer).collect()
}

fn punch(directory: &DirStore, pages_id: u32, holes: &[(u64, u64)]) -> io::Result<Deduplicated> {
    let file = directory.open_file_writable(&pages_name(pages_id))?;
    let before = blocks(&file)?;
    let mut pages = 0;
    for &(offset, length) in holes {
        // fallocate(2): FALLOC_FL_PUNCH_HOLE must be ORed with FALLOC_FL_KEEP_SIZE.
        rustix::fs::fallocate(
            &file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            length,
        )?;
        pages += length / PAGE_SIZE as u64;
    }
    // stat(3type): st_blocks counts units of 512 bytes whatever the block size is.
    let freed_bytes = before.saturating_sub(blocks(&file)?) * 512;
    Ok(Deduplicated { pages, freed_bytes })
}

fn blocks(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks())
}
