//! Memory of tasks under construction that holds no page yet, and is filled without being touched.
//!
//! process_vm_writev(2) first lets every page be faulted in, which clears it, and then copies over it. UFFDIO_COPY
//! (ioctl_userfaultfd(2)) copies into a new page and puts that in place. Nobody but us touches the memory meanwhile: whoever
//! did would wait, for ever.

use whimbrel_images::page::PAGE_SIZE;
use whimbrel_lazy::ioctl::{CopyMode, Features, RegisterMode, Stop, Userfault};

use super::Build;
use crate::error::{Context, Error, Result};
use crate::kernel::sys;
use crate::remote::Program;
use crate::resource::mem::{mapping, mapping::status};
use crate::tree::TaskImage;

/// Smaller mappings are written to as any memory is.
const LEAST: u64 = 1 << 20;

/// Mappings without a page, watched by a userfaultfd until this is dropped.
pub struct Vacant {
    uffd: Userfault,
    /// Sorted.
    mappings: Vec<(u64, u64)>,
}

impl Build {
    /// Watches the large private mappings of a task, which were just made. `None` where it does not pay or cannot be done.
    pub fn vacant(&mut self, task: &TaskImage) -> Option<Vacant> {
        let large = |vma: &&whimbrel_images::proto::VmaEntry| {
            vma.status & status::ANON_PRIVATE != 0 && !mapping::is_kernel_made(vma) && vma.end - vma.start >= LEAST
        };
        let vmas = task.mm.vmas.iter().filter(large);
        let mut mappings: Vec<_> = vmas.map(|vma| (vma.start, vma.end)).collect();
        mappings.sort_unstable();
        // A fault that brings a huge page is worth more.
        if mappings.is_empty() || are_pages_huge() {
            return None;
        }
        match self.watch_vacant(task.entry.pid, mappings) {
            Ok(vacant) => Some(vacant),
            Err(error) => {
                tracing::debug!("memory is filled in the ordinary way: {}", error.chain());
                None
            }
        }
    }

    fn watch_vacant(&mut self, pid: u32, mappings: Vec<(u64, u64)>) -> Result<Vacant> {
        let failed = || Error::new("watch memory that is to be filled").task(pid as i32);
        let mut program = Program::new();
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let made = program.call("make a userfaultfd", libc::SYS_userfaultfd, &[flags.into()]);
        let descriptor = self.run(pid, &program)?.result(made);
        let taken = sys::take_descriptor(self.tid_of(pid)?, descriptor as i32).with(failed);
        let mut program = Program::new();
        program.call("close a descriptor", libc::SYS_close, &[descriptor.into()]);
        self.run(pid, &program)?;
        let uffd = Userfault::from(taken?);
        uffd.api(Features::NONE).with(failed)?;
        for &(start, end) in &mappings {
            uffd.register(start, end - start, RegisterMode::MISSING).with(failed)?;
        }
        Ok(Vacant { uffd, mappings })
    }
}

/// Does the kernel give huge pages to whoever touches memory?
fn are_pages_huge() -> bool {
    let mode = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    mode.is_ok_and(|mode| mode.contains("[always]"))
}

impl Vacant {
    /// How many of `length` bytes at `at` lie alike, and whether that is in one of the mappings.
    pub fn part(&self, at: u64, length: usize) -> (usize, bool) {
        let index = self.mappings.partition_point(|&(_, end)| end <= at);
        let (until, inside) = match self.mappings.get(index) {
            Some(&(start, end)) if start <= at => (end, true),
            Some(&(start, _)) => (start, false),
            None => (u64::MAX, false),
        };
        (((until - at) as usize).min(length), inside)
    }

    /// Puts whole pages into one of the mappings. Returns how many bytes of them, for it ends before a page that is there.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn put(&self, at: u64, pages: &[u8]) -> std::io::Result<usize> {
        debug_assert!(pages.len().is_multiple_of(PAGE_SIZE));
        let mut done = 0;
        while done < pages.len() {
            let fill = self.uffd.copy(at + done as u64, &pages[done..], CopyMode::DONTWAKE);
            done += fill.bytes as usize;
            match fill.stop {
                // The next call tells why.
                None | Some(Stop::Partial | Stop::Again) => {}
                Some(Stop::Exists) => break,
                Some(stop) => return Err(std::io::Error::from_raw_os_error(stop.errno())),
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_there_is_neither_overwritten_nor_waited_for() {
        const PAGES: usize = 64;
        // Larger than what malloc(3) ever takes from memory that was used before (mallopt(3), M_MMAP_THRESHOLD).
        let mut memory = vec![0u8; 64 << 20];
        let skip = memory.as_ptr().align_offset(PAGE_SIZE);
        let start = memory.as_ptr() as u64 + skip as u64;
        memory[skip + 5 * PAGE_SIZE] = 7;
        let uffd = Userfault::new(false).unwrap();
        uffd.api(Features::NONE).unwrap();
        let end = start + (PAGES * PAGE_SIZE) as u64;
        uffd.register(start, end - start, RegisterMode::MISSING).unwrap();
        let vacant = Vacant {
            uffd,
            mappings: vec![(start, end)],
        };
        let pages = vec![9u8; PAGES * PAGE_SIZE];
        assert_eq!(vacant.put(start, &pages).unwrap(), 5 * PAGE_SIZE);
        let behind = start + 6 * PAGE_SIZE as u64;
        assert_eq!(
            vacant.put(behind, &pages[6 * PAGE_SIZE..]).unwrap(),
            (PAGES - 6) * PAGE_SIZE
        );
        drop(vacant);
        for (index, page) in memory[skip..skip + PAGES * PAGE_SIZE].chunks(PAGE_SIZE).enumerate() {
            let wanted = if index == 5 { 7 } else { 9 };
            assert_eq!(page[0], wanted, "page {index}");
        }
    }

    #[test]
    fn parts_end_where_mappings_do() {
        let vacant = Vacant {
            uffd: Userfault::new(false).unwrap(),
            mappings: vec![(0x1000, 0x3000), (0x3000, 0x4000), (0x8000, 0x9000)],
        };
        assert_eq!(vacant.part(0, 0x9000), (0x1000, false));
        assert_eq!(vacant.part(0x2000, 0x9000), (0x1000, true));
        assert_eq!(vacant.part(0x3000, 0x800), (0x800, true));
        assert_eq!(vacant.part(0x4000, 0x9000), (0x4000, false));
        assert_eq!(vacant.part(0x9000, 0x9000), (0x9000, false));
    }
}
