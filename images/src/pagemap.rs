//! Pagemaps: which pages of an address space an image set has, and where they are.
//!
//! `pagemap-PID.img` (or `pagemap-shmem-ID.img`) starts with a head that names the pages file, `pages-N.img`. Its
//! entries are runs of pages in ascending order. The pages file has the pages of the runs that are
//! [`PagemapFlags::PRESENT`], one run after the other; runs that are [`PagemapFlags::PARENT`] are to be looked up in
//! the image set that this one is an increment to. A page that no run covers is zero or was never populated.

use std::fmt;
use std::io::{BufWriter, Write};
use std::ops::BitOr;

use crate::entry::{ImageReader, ImageWriter};
use crate::error::{ImageError, ImageErrorKind};
use crate::magic;
use crate::page::{MemoryObject, PAGE_SIZE, PageRun};
use crate::proto;
use crate::store::{ImageStore, WriteSeek};

/// File name of the pagemap of `object`.
pub fn pagemap_name(object: MemoryObject) -> String {
    match object {
        MemoryObject::Task(pid) => format!("pagemap-{pid}.img"),
        MemoryObject::Shmem(id) => format!("pagemap-shmem-{id}.img"),
    }
}

/// File name of the pages file `pages_id`.
pub fn pages_name(pages_id: u32) -> String {
    format!("pages-{pages_id}.img")
}

/// The object whose pagemap is called `name`; `None` when `name` is no pagemap.
///
/// # Errors
/// When it is a pagemap, but its number exceeds 32 bits. Neither pids nor shmem ids do: the kernel numbers the inodes
/// of its internal tmpfs with 32 bits.
pub fn object_of_name(name: &str) -> Result<Option<MemoryObject>, ImageError> {
    let (of_number, number): (fn(u32) -> MemoryObject, _) = match magic::by_name(name) {
        Some((kind, Some(number))) if kind.image == "PAGEMAP" => (MemoryObject::Task, number),
        Some((kind, Some(number))) if kind.image == "SHMEM_PAGEMAP" => (MemoryObject::Shmem, number),
        _ => return Ok(None),
    };
    let number = u32::try_from(number);
    let number =
        number.map_err(|_| ImageError::new(name, 0, pagemap_error("the number in the name exceeds 32 bits")))?;
    Ok(Some(of_number(number)))
}

/// Where the pages of a run are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagemapFlags(u32);

impl PagemapFlags {
    /// In the parent image set.
    pub const PARENT: Self = Self(1);
    /// May be filled in after the restore, on demand. Without [`PagemapFlags::PRESENT`]: not in the image set at all.
    pub const LAZY: Self = Self(2);
    /// In the pages file.
    pub const PRESENT: Self = Self(4);

    /// The bits as they are in the image.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// Whether all of `flags` are set.
    pub fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// `None` for bits that are not known, and for a run that would be in two places.
    fn from_bits(bits: u32) -> Option<Self> {
        let flags = Self(bits);
        let known = bits & !(Self::PARENT | Self::LAZY | Self::PRESENT).0 == 0;
        (known && !flags.contains(Self::PARENT | Self::PRESENT)).then_some(flags)
    }
}

impl BitOr for PagemapFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for PagemapFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::PARENT, "PE_PARENT"),
            (Self::LAZY, "PE_LAZY"),
            (Self::PRESENT, "PE_PRESENT"),
        ];
        let set: Vec<_> = names
            .iter()
            .filter(|(flag, _)| self.contains(*flag))
            .map(|(_, name)| *name)
            .collect();
        f.write_str(if set.is_empty() { "0" } else { "" })?;
        f.write_str(&set.join(" | "))
    }
}

/// A run of pages and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagemapRun {
    /// The pages.
    pub run: PageRun,
    /// Where they are.
    pub flags: PagemapFlags,
}

/// A pagemap that was read and checked: its runs ascend, do not overlap and are not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pagemap {
    /// Number of the pages file.
    pub pages_id: u32,
    /// The runs, in ascending order.
    pub runs: Vec<PagemapRun>,
    /// What the dump left for the next one in the task, if it did.
    pub track: Option<proto::TrackEntry>,
}

impl Pagemap {
    /// Reads the pagemap of `object`.
    ///
    /// # Errors
    /// When it is missing ([`ImageError::is_not_found`]), damaged or contradicts itself.
    pub fn read(store: &dyn ImageStore, object: MemoryObject) -> Result<Self, ImageError> {
        let mut reader = ImageReader::open(store, &pagemap_name(object))?;
        let head: proto::PagemapHead = reader.required()?;
        let mut runs = Vec::new();
        let mut end = 0;
        loop {
            let offset = reader.offset();
            let Some(entry) = reader.next::<proto::PagemapEntry>()? else {
                break;
            };
            let run = parse_entry(&entry, end).map_err(|kind| ImageError::new(pagemap_name(object), offset, kind))?;
            end = run.run.end();
            runs.push(run);
        }
        Ok(Self {
            pages_id: head.pages_id,
            runs,
            track: head.track,
        })
    }

    /// The runs that the pages file has, each with the offset of its first byte there.
    pub fn stored(&self) -> impl Iterator<Item = (PageRun, u64)> + '_ {
        let mut offset = 0;
        self.runs
            .iter()
            .filter(|run| run.flags.contains(PagemapFlags::PRESENT))
            .map(move |run| {
                let start = offset;
                // Disjoint runs of a 64-bit address space cannot add up to more than it.
                offset += run.run.bytes();
                (run.run, start)
            })
    }

    /// Size in bytes that the pages file must have at least.
    pub fn stored_bytes(&self) -> u64 {
        self.stored().last().map_or(0, |(run, offset)| offset + run.bytes())
    }
}

/// `end` is where the run before ends.
fn parse_entry(entry: &proto::PagemapEntry, end: u64) -> Result<PagemapRun, ImageErrorKind> {
    let run = PageRun {
        start: entry.vaddr,
        pages: entry.nr_pages.unwrap_or(u64::from(entry.compat_nr_pages)),
    };
    check_run(run).map_err(|what| pagemap_error(format!("the run at {:#x} {what}", run.start)))?;
    if run.start < end {
        return Err(pagemap_error(format!(
            "the run at {:#x} begins before the end of the run before it",
            run.start
        )));
    }
    let bits = match (entry.flags, entry.in_parent) {
        (Some(bits), _) => bits,
        (None, Some(true)) => PagemapFlags::PARENT.bits(),
        (None, _) => PagemapFlags::PRESENT.bits(),
    };
    match PagemapFlags::from_bits(bits) {
        Some(flags) => Ok(PagemapRun { run, flags }),
        None => Err(pagemap_error(format!(
            "the run at {:#x} has impossible flags {bits:#x}",
            run.start
        ))),
    }
}

/// What is wrong with a run, if anything: bounds that are not pages, no pages, or an end beyond the address space.
pub(crate) fn check_run(run: PageRun) -> Result<(), &'static str> {
    let bytes = run.pages.checked_mul(PAGE_SIZE as u64);
    if !run.start.is_multiple_of(PAGE_SIZE as u64) {
        Err("does not begin at a page boundary")
    } else if run.pages == 0 {
        Err("has no pages")
    } else if bytes.and_then(|bytes| run.start.checked_add(bytes)).is_none() {
        Err("reaches beyond the address space")
    } else {
        Ok(())
    }
}

pub(crate) fn pagemap_error(what: impl Into<String>) -> ImageErrorKind {
    ImageErrorKind::Pagemap(what.into())
}

/// Writes a pagemap and its pages file in ascending order. Adjacent runs in the same place become one.
///
/// For pages that come in any order see [`crate::sink::DirPageSink`].
pub struct PagemapWriter {
    pagemap: ImageWriter,
    pages: BufWriter<Box<dyn WriteSeek + Send>>,
    pages_name: String,
    pages_offset: u64,
    pending: Option<PagemapRun>,
    end: u64,
}

impl PagemapWriter {
    /// Makes the pagemap of `object` and the pages file `pages_id`, which no other pagemap may use.
    ///
    /// # Errors
    /// When the files cannot be made.
    pub fn create(store: &dyn ImageStore, object: MemoryObject, pages_id: u32) -> Result<Self, ImageError> {
        let pages_name = pages_name(pages_id);
        let pages = store.create(&pages_name);
        let pages = pages.map_err(|error| ImageError::new(&pages_name, 0, ImageErrorKind::Io(error)))?;
        Ok(Self {
            pagemap: start_pagemap(store, object, pages_id, None)?,
            pages: BufWriter::new(pages),
            pages_name,
            pages_offset: 0,
            pending: None,
            end: 0,
        })
    }

    /// Adds pages with their bytes; `data.len()` must be `run.bytes()`. `lazy` says that they may be restored on demand.
    ///
    /// # Errors
    /// When the run is invalid, does not fit `data` or is not behind all earlier ones, or when writing fails.
    pub fn data(&mut self, run: PageRun, data: &[u8], lazy: bool) -> Result<(), ImageError> {
        if data.len() as u64 != run.bytes() {
            return Err(self.error(format!("{} bytes given for {} pages", data.len(), run.pages)));
        }
        let lazy = if lazy {
            PagemapFlags::LAZY
        } else {
            PagemapFlags::default()
        };
        self.add(PagemapRun {
            run,
            flags: PagemapFlags::PRESENT | lazy,
        })?;
        let written = self.pages.write_all(data);
        self.pages_offset += run.bytes();
        written.map_err(|error| ImageError::new(&self.pages_name, self.pages_offset, ImageErrorKind::Io(error)))
    }

    /// Adds pages that are in the parent.
    ///
    /// # Errors
    /// When the run is invalid or not behind all earlier ones, or when writing fails.
    pub fn parent(&mut self, run: PageRun) -> Result<(), ImageError> {
        self.add(PagemapRun {
            run,
            flags: PagemapFlags::PARENT,
        })
    }

    /// Adds pages that are to be fetched on demand; their bytes are not in the image set.
    ///
    /// # Errors
    /// As [`PagemapWriter::parent`].
    pub fn lazy(&mut self, run: PageRun) -> Result<(), ImageError> {
        self.add(PagemapRun {
            run,
            flags: PagemapFlags::LAZY,
        })
    }

    /// Writes out what is still buffered.
    ///
    /// # Errors
    /// When writing fails.
    pub fn finish(mut self) -> Result<(), ImageError> {
        if let Some(run) = self.pending {
            write_run(&mut self.pagemap, run)?;
        }
        let flushed = self.pages.flush();
        flushed.map_err(|error| ImageError::new(&self.pages_name, self.pages_offset, ImageErrorKind::Io(error)))?;
        self.pagemap.finish()
    }

    fn add(&mut self, next: PagemapRun) -> Result<(), ImageError> {
        check_run(next.run).map_err(|what| self.error(format!("the run at {:#x} {what}", next.run.start)))?;
        if next.run.start < self.end {
            return Err(self.error(format!(
                "the run at {:#x} is not behind the earlier ones",
                next.run.start
            )));
        }
        self.end = next.run.end();
        match &mut self.pending {
            Some(run) if run.flags == next.flags && run.run.end() == next.run.start => run.run.pages += next.run.pages,
            pending => {
                if let Some(run) = pending.replace(next) {
                    write_run(&mut self.pagemap, run)?;
                }
            }
        }
        Ok(())
    }

    fn error(&self, what: String) -> ImageError {
        ImageError::new(&self.pages_name, self.pages_offset, pagemap_error(what))
    }
}

/// Makes the pagemap of `object` up to its head.
pub(crate) fn start_pagemap(
    store: &dyn ImageStore,
    object: MemoryObject,
    pages_id: u32,
    track: Option<proto::TrackEntry>,
) -> Result<ImageWriter, ImageError> {
    let mut writer = ImageWriter::create(store, &pagemap_name(object))?;
    writer.write(&proto::PagemapHead { pages_id, track })?;
    Ok(writer)
}

/// The count is written twice: releases before 4.2 know `compat_nr_pages` only (there it is called `nr_pages`).
pub(crate) fn write_run(writer: &mut ImageWriter, run: PagemapRun) -> Result<(), ImageError> {
    writer.write(&proto::PagemapEntry {
        vaddr: run.run.start,
        compat_nr_pages: u32::try_from(run.run.pages).unwrap_or(0),
        in_parent: None,
        flags: Some(run.flags.bits()),
        nr_pages: Some(run.run.pages),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemStore;

    const TASK: MemoryObject = MemoryObject::Task(7);

    fn run(start: u64, pages: u64) -> PageRun {
        PageRun { start, pages }
    }

    fn present(start: u64, pages: u64) -> PagemapRun {
        PagemapRun {
            run: run(start, pages),
            flags: PagemapFlags::PRESENT,
        }
    }

    fn entry(vaddr: u64, nr_pages: u64) -> proto::PagemapEntry {
        proto::PagemapEntry {
            vaddr,
            nr_pages: Some(nr_pages),
            ..Default::default()
        }
    }

    fn read(entries: &[proto::PagemapEntry]) -> Result<Pagemap, ImageError> {
        let store = MemStore::new();
        let mut writer = start_pagemap(&store, TASK, 3, None).unwrap();
        for entry in entries {
            writer.write(entry).unwrap();
        }
        writer.finish().unwrap();
        Pagemap::read(&store, TASK)
    }

    #[test]
    fn names_lead_to_objects_and_back() {
        for object in [
            MemoryObject::Task(30495),
            MemoryObject::Shmem(29151),
            MemoryObject::Shmem(u32::MAX),
        ] {
            assert_eq!(object_of_name(&pagemap_name(object)).unwrap(), Some(object));
        }
        assert_eq!(object_of_name("pages-1.img").unwrap(), None);
        assert_eq!(object_of_name("parent").unwrap(), None);
        assert!(object_of_name("pagemap-shmem-4294967296.img").is_err());
    }

    #[test]
    fn adjacent_runs_become_one_and_both_counts_are_written() {
        let store = MemStore::new();
        let mut writer = PagemapWriter::create(&store, TASK, 3).unwrap();
        writer.data(run(0x41f000, 1), &[1; 4096], false).unwrap();
        writer.data(run(0x420000, 2), &[2; 8192], false).unwrap();
        writer.data(run(0x422000, 1), &[3; 4096], true).unwrap();
        writer.parent(run(0x423000, 1)).unwrap();
        writer.parent(run(0x424000, 4)).unwrap();
        writer.parent(run(0x430000, 1)).unwrap();
        writer.lazy(run(0x500000, 9)).unwrap();
        assert!(writer.parent(run(0x500000, 1)).is_err(), "not behind");
        assert!(
            writer.data(run(0x600000, 2), &[0; 4096], false).is_err(),
            "too few bytes"
        );
        writer.finish().unwrap();

        let entries = {
            let mut reader = ImageReader::open(&store, "pagemap-7.img").unwrap();
            assert_eq!(reader.required::<proto::PagemapHead>().unwrap().pages_id, 3);
            std::iter::from_fn(|| reader.next::<proto::PagemapEntry>().unwrap()).collect::<Vec<_>>()
        };
        let written: Vec<_> = entries
            .iter()
            .map(|entry| (entry.vaddr, entry.compat_nr_pages, entry.flags()))
            .collect();
        let flags = [
            (0x41f000, 3, 4),
            (0x422000, 1, 6),
            (0x423000, 5, 1),
            (0x430000, 1, 1),
            (0x500000, 9, 2),
        ];
        assert_eq!(written, flags);
        assert!(
            entries
                .iter()
                .all(|entry| entry.nr_pages() == u64::from(entry.compat_nr_pages))
        );

        let pagemap = Pagemap::read(&store, TASK).unwrap();
        let stored: Vec<_> = pagemap.stored().collect();
        assert_eq!(stored, [(run(0x41f000, 3), 0), (run(0x422000, 1), 3 * 4096)]);
        assert_eq!(pagemap.stored_bytes(), 4 * 4096);
        let pages = store.take("pages-3.img").unwrap();
        assert_eq!(pages, [vec![1; 4096], vec![2; 8192], vec![3; 4096]].concat());
    }

    #[test]
    fn all_generations_of_entries_are_understood() {
        let old = proto::PagemapEntry {
            vaddr: 0x1000,
            compat_nr_pages: 2,
            ..Default::default()
        };
        let old_parent = proto::PagemapEntry {
            vaddr: 0x3000,
            in_parent: Some(true),
            ..old
        };
        let flagged = proto::PagemapEntry {
            vaddr: 0x5000,
            flags: Some(6),
            ..old
        };
        let new = proto::PagemapEntry {
            vaddr: 0x7000,
            compat_nr_pages: 0,
            flags: Some(4),
            nr_pages: Some(98),
            ..old
        };
        let pagemap = read(&[old, old_parent, flagged, new]).unwrap();
        assert_eq!(pagemap.pages_id, 3);
        assert_eq!(
            pagemap.runs,
            [
                present(0x1000, 2),
                PagemapRun {
                    run: run(0x3000, 2),
                    flags: PagemapFlags::PARENT
                },
                PagemapRun {
                    run: run(0x5000, 2),
                    flags: PagemapFlags::PRESENT | PagemapFlags::LAZY
                },
                present(0x7000, 98),
            ]
        );
    }

    #[test]
    fn a_count_beyond_32_bits_is_kept() {
        let store = MemStore::new();
        let mut writer = start_pagemap(&store, TASK, 1, None).unwrap();
        write_run(&mut writer, present(0, 1 << 33)).unwrap();
        writer.finish().unwrap();
        assert_eq!(Pagemap::read(&store, TASK).unwrap().runs, [present(0, 1 << 33)]);
    }

    #[test]
    fn contradictory_pagemaps_are_refused() {
        let flagged = |flags| proto::PagemapEntry {
            flags: Some(flags),
            ..entry(0x1000, 1)
        };
        let cases: &[(&[proto::PagemapEntry], &str)] = &[
            (&[entry(0x1000, 2), entry(0x2000, 1)], "begins before the end"),
            (&[entry(0x2000, 1), entry(0x1000, 1)], "begins before the end"),
            (&[entry(0x1000, 1), entry(0x1000, 1)], "begins before the end"),
            (&[entry(0x1001, 1)], "page boundary"),
            (&[entry(0x1000, 0)], "no pages"),
            (&[entry(0x1000, u64::MAX)], "beyond the address space"),
            (&[entry(u64::MAX - 0xfff, 1)], "beyond the address space"),
            (&[entry(0x1000, 1 << 52)], "beyond the address space"),
            (&[flagged(5)], "impossible flags"),
            (&[flagged(8)], "impossible flags"),
        ];
        for (entries, message) in cases {
            let error = read(entries).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert_eq!(error.image, "pagemap-7.img");
            assert!(error.offset > 8);
        }
        assert_eq!(PagemapFlags::default().to_string(), "0");
        assert_eq!(
            (PagemapFlags::LAZY | PagemapFlags::PRESENT).to_string(),
            "PE_LAZY | PE_PRESENT"
        );
    }
}
