//! What the tests share: sources whose pages tell where they belong, and memory to be filled from them.
#![allow(dead_code)] // Each test file uses its part.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSource, PageState};
use whimbrel_lazy::ioctl::{Features, Userfault};
use whimbrel_lazy::server::register;
use whimbrel_lazy::{LazyRange, LazyServer};

pub const PAGE: usize = PAGE_SIZE;
pub const OBJECT: MemoryObject = MemoryObject::Task(1);

/// A source that makes up each page from its address: every word of page `a` is `a + its offset`, times a constant.
/// Every eighth page is zeros.
#[derive(Default)]
pub struct Pattern {
    pub delay: Duration,
    pub broken: AtomicBool,
    pub reads: AtomicU64,
    /// Pages at and above this source address are unknown; 0 for none.
    pub unknown_from: AtomicU64,
}

pub fn is_zero(source: u64) -> bool {
    source / PAGE as u64 % 8 == 7
}

pub fn word(source: u64) -> u64 {
    if is_zero(source & !(PAGE as u64 - 1)) {
        0
    } else {
        source.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1
    }
}

impl PageSource for Pattern {
    fn read_pages(&self, object: MemoryObject, run: PageRun, buffer: &mut [u8]) -> io::Result<Vec<PageState>> {
        assert_eq!((object, buffer.len() as u64), (OBJECT, run.bytes()));
        self.reads.fetch_add(1, Ordering::Relaxed);
        if !self.delay.is_zero() {
            std::thread::sleep(self.delay);
        }
        if self.broken.load(Ordering::Relaxed) {
            buffer.fill(0xEE);
            return Err(io::Error::from_raw_os_error(libc::ECONNRESET));
        }
        let unknown = self.unknown_from.load(Ordering::Relaxed);
        let mut states = Vec::new();
        for (page, bytes) in (0..run.pages).zip(buffer.chunks_exact_mut(PAGE)) {
            let source = run.start + page * PAGE as u64;
            if unknown != 0 && source >= unknown {
                bytes.fill(0xDD);
                states.push(PageState::Unknown);
                continue;
            }
            for (index, out) in bytes.chunks_exact_mut(8).enumerate() {
                out.copy_from_slice(&word(source + index as u64 * 8).to_ne_bytes());
            }
            states.push(if is_zero(source) {
                PageState::Zero
            } else {
                PageState::Data
            });
        }
        Ok(states)
    }
}

/// Anonymous memory of this process, shared between threads of a test, and left mapped at its end.
#[derive(Clone, Copy)]
pub struct Memory {
    pub start: u64,
    pub pages: usize,
}

impl Memory {
    pub fn new(pages: usize) -> Self {
        Self::with(pages, libc::MAP_PRIVATE)
    }

    pub fn with(pages: usize, kind: libc::c_int) -> Self {
        let (len, protection) = (pages * PAGE, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a fresh anonymous mapping at an address that the kernel chooses.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, kind | libc::MAP_ANONYMOUS, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        // No huge pages: one would make 512 pages present at once.
        // SAFETY: the range was just mapped, and advice changes no contents.
        unsafe { libc::madvise(start, len, libc::MADV_NOHUGEPAGE) };
        Self {
            start: start as u64,
            pages,
        }
    }

    pub fn range(&self) -> LazyRange {
        LazyRange::anonymous(OBJECT, self.start, self.pages as u64)
    }

    pub fn bytes(&self) -> usize {
        self.pages * PAGE
    }

    pub fn address(&self, page: usize) -> u64 {
        self.start + (page * PAGE) as u64
    }

    /// Reads a word of a page; waits for the page as any program would.
    pub fn read(&self, page: usize, index: usize) -> u64 {
        read(self.address(page) + index as u64 * 8)
    }

    /// Checks some words of a page against the source address it was saved from.
    pub fn check(&self, page: usize, source: u64) {
        for index in [0, 1, 255, 511] {
            assert_eq!(
                self.read(page, index),
                word(source + index as u64 * 8),
                "page {page} word {index}"
            );
        }
    }
}

pub fn read(address: u64) -> u64 {
    // SAFETY: tests pass addresses of words in mappings that they made and that are mapped readable.
    unsafe { std::ptr::read_volatile(address as *const u64) }
}

pub fn write(address: u64, value: u64) {
    // SAFETY: as for `read`, and the mappings are writable and hold no Rust object.
    unsafe { std::ptr::write_volatile(address as *mut u64, value) }
}

pub fn advise(start: u64, bytes: usize, advice: libc::c_int) {
    // SAFETY: tests give advice on mappings of their own, which hold no Rust object.
    assert_eq!(unsafe { libc::madvise(start as *mut libc::c_void, bytes, advice) }, 0);
}

pub fn unmap(start: u64, bytes: usize) {
    // SAFETY: tests unmap mappings of their own, which hold no Rust object.
    assert_eq!(unsafe { libc::munmap(start as *mut libc::c_void, bytes) }, 0);
}

pub fn uffd() -> Userfault {
    let uffd = Userfault::new(false).expect("userfaultfd");
    let events = Features::EVENT_FORK | Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
    uffd.api(events).expect("events");
    uffd
}

/// Registers the memory and gives it to the server.
pub fn serve(server: &LazyServer, ranges: &[LazyRange]) {
    let uffd = uffd();
    register(&uffd, ranges).expect("register");
    server.add_task(uffd.into(), std::process::id(), ranges).expect("add");
}

pub fn server(config: whimbrel_lazy::LazyConfig, source: &Arc<Pattern>) -> LazyServer {
    let (fault, bulk) = (Arc::clone(source), Arc::clone(source));
    LazyServer::new(config, fault, bulk).expect("server")
}

/// Forks without the C library's hooks: they would hold locks that the threads of the server need. The child runs
/// `body`, which must not allocate, and exits with its result.
pub fn fork(body: impl FnOnce() -> bool) -> libc::pid_t {
    // SAFETY: the child calls `body`, which only touches memory, and leaves through _exit.
    let pid = unsafe { libc::syscall(libc::SYS_fork) };
    if pid == 0 {
        let status = i32::from(!body());
        // SAFETY: ends the child at once, without running anything of the test process.
        unsafe { libc::_exit(status) };
    }
    assert!(pid > 0);
    pid as libc::pid_t
}

pub fn wait(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    status
}
