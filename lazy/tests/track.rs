//! Dirty tracking with write protection that the kernel resolves, read with PAGEMAP_SCAN.

mod common;

use std::fs::File;
use std::os::fd::AsFd;

use common::*;
use whimbrel_lazy::ioctl::{
    Categories, Features, PageRegion, RegisterMode, ScanFlags, ScanRequest, Userfault, pagemap_scan, pagemap_scan_all,
};

fn tracked(memory: Memory) -> (Userfault, File, ScanRequest) {
    let uffd = Userfault::new(false).unwrap();
    uffd.api(Features::WP_ASYNC | Features::WP_UNPOPULATED).unwrap();
    uffd.register(memory.start, memory.bytes() as u64, RegisterMode::WP)
        .unwrap();
    let request = ScanRequest {
        flags: ScanFlags::WP_MATCHING | ScanFlags::CHECK_WPASYNC,
        mask: Categories::WRITTEN,
        returned: Categories::WRITTEN,
        ..ScanRequest::default()
    };
    (uffd, File::open("/proc/self/pagemap").unwrap(), request)
}

fn dirty(memory: Memory, pagemap: &File, request: &ScanRequest) -> Vec<usize> {
    let mut found = Vec::new();
    let end = memory.address(memory.pages);
    pagemap_scan_all(pagemap.as_fd(), memory.start, end, request, &mut found).unwrap();
    let page = |address: u64| ((address - memory.start) / PAGE as u64) as usize;
    found
        .iter()
        .flat_map(|region| page(region.start)..page(region.end))
        .collect()
}

#[test]
fn a_scan_finds_exactly_the_pages_written_since_the_last() {
    let memory = Memory::new(4096);
    (0..2000).for_each(|page| write(memory.address(page), 1));
    let (_uffd, pagemap, request) = tracked(memory);
    assert_eq!(
        dirty(memory, &pagemap, &request).len(),
        4096,
        "everything counts as written at first"
    );
    assert_eq!(dirty(memory, &pagemap, &request), [0; 0]);
    for step in [3, 7, 64] {
        let written: Vec<usize> = (step..4096).step_by(step).collect();
        written.iter().for_each(|&page| write(memory.address(page) + 64, 5));
        (0..4096).for_each(|page| _ = memory.read(page, 2));
        assert_eq!(dirty(memory, &pagemap, &request), written);
    }
    advise(memory.address(9), PAGE, libc::MADV_DONTNEED);
    assert_eq!(
        dirty(memory, &pagemap, &request),
        [9],
        "a dropped page counts as written"
    );
}

#[test]
fn a_scan_into_a_small_buffer_goes_on_where_it_stopped() {
    let memory = Memory::new(1024);
    let (_uffd, pagemap, request) = tracked(memory);
    dirty(memory, &pagemap, &request);
    let written: Vec<usize> = (0..1024).step_by(2).collect();
    written.iter().for_each(|&page| write(memory.address(page), 5));
    let (mut at, end, mut found) = (memory.start, memory.address(1024), Vec::new());
    while at < end {
        let mut regions = [PageRegion::default(); 10];
        let (count, walked) = pagemap_scan(pagemap.as_fd(), at, end, &request, &mut regions).unwrap();
        found.extend(
            regions[..count]
                .iter()
                .map(|region| ((region.start - memory.start) / PAGE as u64) as usize),
        );
        at = walked;
    }
    assert_eq!(found, written);
    assert_eq!(dirty(memory, &pagemap, &request), [0; 0]);
}

#[test]
fn memory_that_is_not_tracked_is_refused() {
    let memory = Memory::new(16);
    let (_uffd, pagemap, request) = tracked(memory);
    let other = Memory::new(16);
    write(other.start, 1);
    let mut regions = [PageRegion::default(); 4];
    let error = pagemap_scan(pagemap.as_fd(), other.start, other.address(16), &request, &mut regions).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
}
