//! Which pages of a mapping hold something of their own, and reading them.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use whimbrel_images::page::{PAGE_SIZE, PageRun};

use whimbrel_lazy::ioctl::{self, Categories, ScanRequest};

use crate::error::{Context, Error, Result};
use crate::procfs;
use crate::remote::{RemoteAddr, RemoteMemory};

/// Bits of an entry of `/proc/PID/pagemap`.
mod entry {
    pub const PRESENT: u64 = 1 << 63;
    pub const SWAPPED: u64 = 1 << 62;
    pub const FILE_OR_SHARED: u64 = 1 << 61;
    pub const SOFT_DIRTY: u64 = 1 << 55;
}

/// The page table of a process as the kernel shows it, and its memory.
pub struct Pages {
    pid: i32,
    pagemap: File,
    memory: RemoteMemory,
    /// For mappings without read permission, which process_vm_readv(2) refuses, and for pages that others share.
    forced: File,
    /// May it share pages copy-on-write?
    related: bool,
    scan: AtomicBool,
    /// Is there anywhere to swap to? Without, the kernel's marks on write-protected pages that were never touched, which it
    /// shows as swapped, can be told from contents.
    swap: bool,
}

impl Pages {
    /// Opens the page table of `pid`.
    ///
    /// # Errors
    /// EACCES without ptrace access.
    pub fn open(pid: i32) -> Result<Pages> {
        let open =
            |name: &str| File::open(format!("/proc/{pid}/{name}")).with(|| Error::new("open the page table").task(pid));
        Ok(Pages {
            pid,
            pagemap: open("pagemap")?,
            memory: RemoteMemory::new(pid),
            forced: open("mem")?,
            related: is_related(pid),
            scan: AtomicBool::new(true),
            swap: std::fs::read_to_string("/proc/swaps").map_or(true, |text| text.lines().count() > 1),
        })
    }

    /// The open `/proc/PID/pagemap`.
    pub fn pagemap(&self) -> &File {
        &self.pagemap
    }

    /// Appends the runs of pages in `start..end` that belong to the process alone: neither never touched, nor the zero
    /// page, nor a file's own pages.
    ///
    /// # Errors
    /// When the page table cannot be read.
    pub fn own(&self, start: u64, end: u64, runs: &mut Vec<PageRun>) -> Result<()> {
        if self.scan.load(Ordering::Relaxed) {
            let not = Categories::PFNZERO | Categories::FILE;
            let request = ScanRequest {
                mask: not,
                inverted: not,
                any_of: if self.swap {
                    Categories::PRESENT | Categories::SWAPPED
                } else {
                    Categories::PRESENT
                },
                returned: Categories::NONE,
                ..ScanRequest::default()
            };
            let mut found = Vec::new();
            match ioctl::pagemap_scan_all(self.pagemap.as_fd(), start, end, &request, &mut found) {
                Ok(()) => {
                    runs.extend(found.iter().map(|region| PageRun {
                        start: region.start,
                        pages: (region.end - region.start) / PAGE_SIZE as u64,
                    }));
                    return Ok(());
                }
                // Before Linux 6.7: read the entries themselves.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                    self.scan.store(false, Ordering::Relaxed)
                }
                Err(error) => return Err(Error::new("scan the page table").task(self.pid).because(error)),
            }
        }
        self.own_by_entries(start, end, runs)
    }

    /// As [`Pages::own`]; appends to `dirty` those that are soft-dirty, too.
    ///
    /// # Errors
    /// As [`Pages::own`].
    pub fn own_and_dirty(&self, start: u64, end: u64, own: &mut Vec<PageRun>, dirty: &mut Vec<PageRun>) -> Result<()> {
        if self.scan.load(Ordering::Relaxed) {
            let not = Categories::PFNZERO | Categories::FILE;
            let request = ScanRequest {
                mask: not,
                inverted: not,
                any_of: Categories::PRESENT | Categories::SWAPPED,
                returned: Categories::SOFT_DIRTY,
                ..ScanRequest::default()
            };
            let mut found = Vec::new();
            match ioctl::pagemap_scan_all(self.pagemap.as_fd(), start, end, &request, &mut found) {
                Ok(()) => {
                    for region in found {
                        let run = PageRun {
                            start: region.start,
                            pages: (region.end - region.start) / PAGE_SIZE as u64,
                        };
                        own.push(run);
                        if region.categories & Categories::SOFT_DIRTY.0 != 0 {
                            dirty.push(run);
                        }
                    }
                    return Ok(());
                }
                // Before Linux 6.7: read the entries themselves.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                    self.scan.store(false, Ordering::Relaxed)
                }
                Err(error) => return Err(Error::new("scan the page table").task(self.pid).because(error)),
            }
        }
        self.each_own_entry(start, end, |address, entry| {
            push_page(own, address);
            if entry & entry::SOFT_DIRTY != 0 {
                push_page(dirty, address);
            }
        })
    }

    /// Is this page the process's own and soft-dirty? `None` when there is no page.
    ///
    /// # Errors
    /// When the page table cannot be read.
    pub fn is_soft_dirty(&self, address: u64) -> Result<Option<bool>> {
        let mut dirty = None;
        self.each_own_entry(address, address + PAGE_SIZE as u64, |_, entry| {
            dirty = Some(entry & entry::SOFT_DIRTY != 0);
        })?;
        Ok(dirty)
    }

    /// Can mappings of any size be looked at in a time that follows what they hold?
    pub fn is_sparse_fast(&self) -> bool {
        let request = ScanRequest {
            mask: Categories::PRESENT,
            ..ScanRequest::default()
        };
        self.scan.load(Ordering::Relaxed)
            && ioctl::pagemap_scan(self.pagemap.as_fd(), 0, PAGE_SIZE as u64, &request, &mut []).is_ok()
    }

    fn own_by_entries(&self, start: u64, end: u64, runs: &mut Vec<PageRun>) -> Result<()> {
        self.each_own_entry(start, end, |address, _| push_page(runs, address))
    }

    fn each_own_entry(&self, start: u64, end: u64, mut found: impl FnMut(u64, u64)) -> Result<()> {
        use entry::{FILE_OR_SHARED, PRESENT, SWAPPED};
        let mut at = start;
        let mut entries = vec![0u8; 8 * ((end - start) / PAGE_SIZE as u64).min(65536) as usize];
        while at < end {
            let count = ((end - at) / PAGE_SIZE as u64).min(65536) as usize;
            let bytes = &mut entries[..8 * count];
            self.pagemap
                .read_exact_at(bytes, at / PAGE_SIZE as u64 * 8)
                .with(|| Error::new("read the page table").task(self.pid))?;
            for (index, entry) in bytes.chunks_exact(8).enumerate() {
                let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
                if entry & (PRESENT | SWAPPED) != 0 && entry & FILE_OR_SHARED == 0 {
                    found(at + (index * PAGE_SIZE) as u64, entry);
                }
            }
            at += (count * PAGE_SIZE) as u64;
        }
        Ok(())
    }

    /// Reads the pages of `runs` one after the other into `buffer`, whatever their protection.
    ///
    /// # Errors
    /// When the process is gone, or a page was unmapped.
    pub fn read(&self, runs: &[PageRun], buffer: &mut [u8]) -> Result<()> {
        let pieces: Vec<_> = runs
            .iter()
            .map(|run| (RemoteAddr(run.start), run.bytes() as usize))
            .collect();
        let total: usize = pieces.iter().map(|&(_, length)| length).sum();
        // process_vm_readv(2) pins pages, and before it pins one that is shared copy-on-write the kernel gives the process a
        // copy of its own (gup_must_unshare in mm/internal.h, since Linux 5.19): a server with ten workers would have ten
        // times the memory for having been looked at. Reading /proc/PID/mem pins nothing, and is slower for other pages.
        let done = match self.related {
            true => 0,
            false => self.memory.read_pieces(&pieces, &mut buffer[..total]).unwrap_or(0),
        };
        if done == total {
            return Ok(());
        }
        let mut at = 0;
        for (address, length) in pieces {
            if at + length > done {
                let (skip, part) = (done.saturating_sub(at), &mut buffer[at..at + length]);
                self.forced
                    .read_exact_at(&mut part[skip..], address.0 + skip as u64)
                    .with(|| Error::new("read memory").task(self.pid).object(address.to_string()))?;
            }
            at += length;
        }
        Ok(())
    }
}

/// Has a process forked children, or is it a forked child that has executed nothing since (PF_FORKNOEXEC)?
fn is_related(pid: i32) -> bool {
    const PF_FORKNOEXEC: u32 = 0x40;
    let children = procfs::read(pid, &format!("task/{pid}/children"));
    let stat = procfs::read(pid, "stat").and_then(|text| procfs::stat::parse(&text));
    children.is_ok_and(|children| !children.is_empty()) || stat.is_ok_and(|stat| stat.flags & PF_FORKNOEXEC != 0)
}

/// Appends one page to a list of runs, extending the last run where it can.
pub fn push_page(runs: &mut Vec<PageRun>, address: u64) {
    match runs.last_mut() {
        Some(last) if last.end() == address => last.pages += 1,
        _ => runs.push(PageRun {
            start: address,
            pages: 1,
        }),
    }
}

/// Splits runs into batches of at most `bytes` bytes (a multiple of the page size).
pub fn batches(runs: &[PageRun], bytes: usize) -> Vec<Vec<PageRun>> {
    let room = (bytes / PAGE_SIZE) as u64;
    let mut all = Vec::new();
    let (mut batch, mut used) = (Vec::new(), 0);
    for &run in runs {
        let mut rest = run;
        while rest.pages > 0 {
            let take = rest.pages.min(room - used);
            batch.push(PageRun {
                start: rest.start,
                pages: take,
            });
            rest = PageRun {
                start: rest.start + take * PAGE_SIZE as u64,
                pages: rest.pages - take,
            };
            used += take;
            if used == room {
                all.push(std::mem::take(&mut batch));
                used = 0;
            }
        }
    }
    if !batch.is_empty() {
        all.push(batch);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_all_pages_in_order_and_no_more_than_their_size() {
        let runs = [
            PageRun {
                start: 0x1000,
                pages: 3,
            },
            PageRun {
                start: 0x10000,
                pages: 5,
            },
        ];
        let split = batches(&runs, 4 * PAGE_SIZE);
        assert_eq!(split.len(), 2);
        let flat: Vec<u64> = split
            .iter()
            .flatten()
            .flat_map(|r| (0..r.pages).map(|p| r.start + p * PAGE_SIZE as u64))
            .collect();
        assert_eq!(
            flat,
            [0x1000, 0x2000, 0x3000, 0x10000, 0x11000, 0x12000, 0x13000, 0x14000]
        );
    }

    #[test]
    fn touched_pages_are_found_both_ways_and_read_back() {
        let mut memory = vec![0u8; 64 * PAGE_SIZE];
        let base = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE as u64);
        let offset = (base - memory.as_ptr() as u64) as usize;
        memory[offset + 3 * PAGE_SIZE] = 7;
        memory[offset + 9 * PAGE_SIZE] = 9;
        let pages = Pages::open(std::process::id() as i32).unwrap();
        let (mut scanned, mut by_entries) = (Vec::new(), Vec::new());
        pages.own(base, base + 32 * PAGE_SIZE as u64, &mut scanned).unwrap();
        pages
            .own_by_entries(base, base + 32 * PAGE_SIZE as u64, &mut by_entries)
            .unwrap();
        assert_eq!(scanned, by_entries);
        assert!(
            scanned
                .iter()
                .any(|run| run.start <= base + 0x3000 && run.end() > base + 0x3000)
        );
        let mut bytes = vec![0u8; PAGE_SIZE];
        pages
            .read(
                &[PageRun {
                    start: base + 9 * 4096,
                    pages: 1,
                }],
                &mut bytes,
            )
            .unwrap();
        assert_eq!(bytes[0], 9);
        drop(memory);
    }
}
