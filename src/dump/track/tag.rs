//! A sign that soft-dirty bits are still those that we left.
//!
//! The bits belong to the whole process, and anybody may clear them: another tool, or another dump of ours. Pages that were
//! written before that would be taken for unchanged. So each clearing leaves a tag: of a few pages that the program itself
//! does not write, some, drawn by lot, are made dirty again by writing a byte that is there already. Whoever clears the
//! bits wipes the tag. What was recorded without its tag being found again is worth nothing: all pages count as written.

use std::io::Read;

use whimbrel_images::page::{PAGE_SIZE, PageRun};

use crate::dump::runs::RunSet;
use crate::error::{Context, Error, Result};
use crate::procfs::maps::Mapping;
use crate::remote::{RemoteAddr, RemoteMemory};
use crate::resource::mem::pages::Pages;

/// Pages that a tag is drawn from, at most.
const PAGES: usize = 16;
/// From so many pages on there are enough different tags (1022 of 10) to trust one from an earlier run.
const ENOUGH: usize = 10;

/// Pages whose soft-dirty bits were set, and those whose were left clear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    /// Addresses of the pages that are dirty.
    pub marked: Vec<u64>,
    /// Addresses of the pages that are not.
    pub clear: Vec<u64>,
}

impl Tag {
    /// Draws a tag for a process, of whose pages `own` are its own; `None` where there are too few to tell anything. Never
    /// the one that is there now.
    ///
    /// # Errors
    /// When there are no random numbers, or the page table cannot be read.
    pub fn draw(maps: &[Mapping], own: &RunSet, pages: &Pages) -> Result<Option<Tag>> {
        let drawn_from = candidates(maps, own);
        if drawn_from.len() < 2 {
            return Ok(None);
        }
        let mut now = 0u64;
        for (index, &page) in drawn_from.iter().enumerate() {
            now |= u64::from(pages.is_soft_dirty(page)? == Some(true)) << index;
        }
        let all = (1u64 << drawn_from.len()) - 1;
        let mut source = std::fs::File::open("/dev/urandom").context("draw random numbers")?;
        let bits = loop {
            let mut random = [0u8; 8];
            source.read_exact(&mut random).context("draw random numbers")?;
            let bits = u64::from_ne_bytes(random) & all;
            // All or none is what the bits are when nobody has left a tag.
            if bits != 0 && bits != all && bits != now {
                break bits;
            }
        };
        let side = |marked: bool| {
            let chosen = |(index, _): &(usize, &u64)| (bits >> index & 1 == 1) == marked;
            let pages = drawn_from.iter().enumerate().filter(chosen);
            pages.map(|(_, &page)| page).collect()
        };
        Ok(Some(Tag {
            marked: side(true),
            clear: side(false),
        }))
    }

    /// Are there so many different tags that this one cannot well be met by chance?
    pub fn is_distinctive(&self) -> bool {
        self.marked.len() + self.clear.len() >= ENOUGH
    }

    /// Leaves the tag, in a process that is held and whose bits have just been cleared.
    ///
    /// # Errors
    /// When its memory cannot be written.
    pub fn leave(&self, pid: i32, pages: &Pages) -> Result<()> {
        let memory = RemoteMemory::new(pid);
        for &page in &self.marked {
            let mut bytes = [0u8; PAGE_SIZE];
            let run = PageRun { start: page, pages: 1 };
            pages.read(&[run], &mut bytes)?;
            memory.write_forced(RemoteAddr(page), &bytes[..1])?;
        }
        match self.is_there(pages)? {
            true => Ok(()),
            false => Err(Error::new("mark pages").task(pid).because("the marks do not stay")),
        }
    }

    /// Is it as it was left?
    ///
    /// # Errors
    /// When the page table cannot be read.
    pub fn is_there(&self, pages: &Pages) -> Result<bool> {
        for (addresses, dirty) in [(&self.marked, true), (&self.clear, false)] {
            for &page in addresses {
                // A page that is still the file's own is clear.
                if pages.is_soft_dirty(page)?.unwrap_or(false) != dirty {
                    return Ok(false);
                }
            }
        }
        Ok(!self.marked.is_empty())
    }
}

/// Pages that the program itself does not write. Constants that were relocated come first, for they are the process's own
/// already. Where there are few, as in a program without libraries, constants of its files are taken, too: those that are
/// marked become copies of its own, a few pages with the same contents.
fn candidates(maps: &[Mapping], own: &RunSet) -> Vec<u64> {
    let constant = |map: &&Mapping| {
        map.prot & (libc::PROT_READ | libc::PROT_WRITE) == libc::PROT_READ
            && map.inode != 0
            && !map.name.ends_with(b" (deleted)")
            && super::is_watched(map)
    };
    let maps: Vec<&Mapping> = maps.iter().filter(constant).collect();
    let mut pages: Vec<u64> = Vec::new();
    for map in &maps {
        let here = own.intersect(&RunSet::from_ranges(vec![(map.start, map.end)]));
        pages.extend(here.runs().iter().flat_map(addresses).take(PAGES - pages.len()));
    }
    for map in maps.iter().filter(|map| map.prot & libc::PROT_EXEC == 0) {
        let whole = PageRun {
            start: map.start,
            pages: map.len() / PAGE_SIZE as u64,
        };
        let theirs = addresses(&whole).filter(|&page| !own.contains(page));
        pages.extend(theirs.take(PAGES - pages.len()));
    }
    pages.sort_unstable();
    pages
}

fn addresses(run: &PageRun) -> impl Iterator<Item = u64> + use<> {
    let start = run.start;
    (0..run.pages).map(move |index| start + index * PAGE_SIZE as u64)
}
