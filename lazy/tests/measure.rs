//! Measurements, not promises: `cargo test --release -p whimbrel-lazy --test measure -- --ignored --nocapture --test-threads 1`.

mod common;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use common::*;
use whimbrel_images::page::{MemoryObject, PageRun, PageSource, PageState};
use whimbrel_lazy::ioctl::{Categories, Features, RegisterMode, ScanFlags, ScanRequest, Userfault, pagemap_scan_all};
use whimbrel_lazy::{LazyConfig, LazyServer};

/// A source that costs next to nothing.
struct Instantly;

impl PageSource for Instantly {
    fn read_pages(&self, _: MemoryObject, run: PageRun, buffer: &mut [u8]) -> io::Result<Vec<PageState>> {
        buffer.fill(1);
        Ok(vec![PageState::Data; run.pages as usize])
    }
}

fn instantly(config: LazyConfig) -> LazyServer {
    LazyServer::new(config, Arc::new(Instantly), Arc::new(Instantly)).unwrap()
}

#[test]
#[ignore = "a measurement"]
fn faults_one_after_the_other() {
    for around_pages in [0, 16] {
        let memory = Memory::new(1 << 16);
        let server = instantly(LazyConfig {
            prefetch_threads: 0,
            around_pages,
            ..LazyConfig::default()
        });
        serve(&server, &[memory.range()]);
        let start = Instant::now();
        (0..memory.pages).for_each(|page| _ = memory.read(page, 0));
        let time = start.elapsed();
        println!(
            "around {around_pages}: {:?} per page, {:?}",
            time / memory.pages as u32,
            server.progress().stats
        );
        server.wait_complete(None).unwrap();
    }
}

#[test]
#[ignore = "a measurement"]
fn background_fetch_of_one_gibibyte() {
    let memory = Memory::new(1 << 18);
    let server = instantly(LazyConfig::default());
    let start = Instant::now();
    serve(&server, &[memory.range()]);
    let progress = server.wait_complete(None).unwrap();
    println!("1 GiB in {:?}, {:?}", start.elapsed(), progress.stats);
}

#[test]
#[ignore = "a measurement"]
fn arming_and_scanning_one_gibibyte() {
    let memory = Memory::new(1 << 18);
    (0..memory.pages).for_each(|page| write(memory.address(page), 1));
    let uffd = Userfault::new(false).unwrap();
    uffd.api(Features::WP_ASYNC | Features::WP_UNPOPULATED).unwrap();
    uffd.register(memory.start, memory.bytes() as u64, RegisterMode::WP)
        .unwrap();
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let request = ScanRequest {
        flags: ScanFlags::WP_MATCHING | ScanFlags::CHECK_WPASYNC,
        mask: Categories::WRITTEN,
        returned: Categories::WRITTEN,
        ..ScanRequest::default()
    };
    for dirty in [0, 1000, 100_000] {
        (0..dirty).for_each(|index| write(memory.address(index * (memory.pages / dirty)), 2));
        let mut found = Vec::new();
        let start = Instant::now();
        let end = memory.address(memory.pages);
        pagemap_scan_all(pagemap.as_fd(), memory.start, end, &request, &mut found).unwrap();
        println!("{dirty} dirty pages: {:?}, {} regions", start.elapsed(), found.len());
    }
}
