//! Lazy memory in the test process itself.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::*;
use whimbrel_lazy::{LazyConfig, LazyError, LazyRange, LazyServer, RangeFlags, TaskFailure};

const SOON: Option<Duration> = Some(Duration::from_secs(30));

fn on_demand() -> LazyConfig {
    LazyConfig {
        prefetch_threads: 0,
        around_pages: 0,
        ..LazyConfig::default()
    }
}

fn random(seed: &mut u64) -> usize {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed as usize
}

fn touch_from_threads(memory: Memory, threads: u64, touches: usize) {
    std::thread::scope(|scope| {
        for seed in 1..=threads {
            scope.spawn(move || {
                let mut seed = seed * 0x1234_5678_9ABC;
                for _ in 0..touches {
                    let page = random(&mut seed) % memory.pages;
                    memory.check(page, memory.address(page));
                }
            });
        }
    });
}

fn complete(server: &LazyServer) -> whimbrel_lazy::Progress {
    let progress = server.wait_complete(SOON).expect("complete");
    assert_eq!((progress.active, progress.missing), (0, 0));
    progress
}

#[test]
fn content_is_right_under_random_access_with_background_fetch() {
    let memory = Memory::new(8192);
    let source = Arc::new(Pattern {
        delay: Duration::from_micros(300),
        ..Pattern::default()
    });
    let server = server(LazyConfig::default(), &source);
    serve(&server, &[memory.range()]);
    touch_from_threads(memory, 4, 3000);
    let progress = complete(&server);
    (0..memory.pages).for_each(|page| memory.check(page, memory.address(page)));
    println!("{:?}", progress.stats);
    assert!(progress.stats.faults > 0 && progress.stats.prefetched > 4000);
    assert!(server.stop().is_empty());
}

#[test]
fn on_demand_only_touched_pages_are_fetched() {
    let memory = Memory::new(256);
    let source = Arc::new(Pattern::default());
    let server = server(on_demand(), &source);
    serve(&server, &[memory.range()]);
    (0..256)
        .step_by(16)
        .for_each(|page| memory.check(page, memory.address(page)));
    let progress = server.progress();
    assert_eq!((progress.stats.faults, progress.missing), (16, 240));
    assert!(matches!(
        server.wait_complete(Some(Duration::from_millis(50))),
        Err(LazyError::Incomplete { missing: 240 })
    ));
    // What is left goes on in another server.
    let other = common::server(LazyConfig::default(), &source);
    for left in server.stop() {
        other.add_map(left.uffd, left.pid, left.map).unwrap();
    }
    complete(&other);
    (0..256).for_each(|page| memory.check(page, memory.address(page)));
}

#[test]
fn pages_around_a_fault_come_without_faults() {
    let memory = Memory::new(64);
    let source = Arc::new(Pattern::default());
    let server = server(
        LazyConfig {
            prefetch_threads: 0,
            fault_threads: 1,
            ..LazyConfig::default()
        },
        &source,
    );
    serve(&server, &[memory.range()]);
    memory.check(20, memory.address(20));
    let deadline = Instant::now() + Duration::from_secs(5);
    while server.progress().missing > 48 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(server.progress().missing <= 48, "{:?}", server.progress());
    assert_eq!(server.progress().stats.faults, 1);
    (0..64).for_each(|page| memory.check(page, memory.address(page)));
    complete(&server);
}

#[test]
fn a_moved_mapping_keeps_its_content_and_grown_memory_is_zeros() {
    for config in [
        on_demand(),
        LazyConfig {
            unit_pages: 8,
            ..LazyConfig::default()
        },
    ] {
        let memory = Memory::new(512);
        // Room for the mapping to grow in place after the move.
        let room = Memory::new(1024);
        let source = Arc::new(Pattern {
            delay: Duration::from_micros(500),
            ..Pattern::default()
        });
        let server = server(config.clone(), &source);
        serve(&server, &[memory.range()]);
        memory.check(5, memory.address(5));
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (old, len) = (memory.start as *mut _, memory.bytes());
        // SAFETY: both ranges are this test's own; the second is replaced by the first.
        let moved = unsafe { libc::mremap(old, len, len, flags, room.start as *mut libc::c_void) };
        assert_eq!(moved as u64, room.start);
        // SAFETY: frees the rest of the room, then lets the mapping grow over it.
        let grown = unsafe {
            libc::munmap((room.start + len as u64) as *mut _, len);
            libc::mremap(moved, len, 2 * len, 0)
        };
        assert_eq!(grown, moved);
        touch_from_threads_at(room, memory);
        (512..1024)
            .step_by(7)
            .for_each(|page| assert_eq!(room.read(page, 3), 0));
        complete(&server);
        (0..512).for_each(|page| room.check(page, memory.address(page)));
        (512..1024).for_each(|page| assert_eq!(room.read(page, 3), 0));
    }
}

fn touch_from_threads_at(at: Memory, saved: Memory) {
    std::thread::scope(|scope| {
        for part in 0..4 {
            scope.spawn(move || {
                (part..saved.pages)
                    .step_by(4)
                    .for_each(|page| at.check(page, saved.address(page)));
            });
        }
    });
}

#[test]
fn dropped_pages_are_zeros_and_do_not_come_back() {
    let memory = Memory::new(1024);
    let source = Arc::new(Pattern {
        delay: Duration::from_millis(2),
        ..Pattern::default()
    });
    let server = server(
        LazyConfig {
            unit_pages: 16,
            ..LazyConfig::default()
        },
        &source,
    );
    serve(&server, &[memory.range()]);
    let mut dropped = vec![false; 1024];
    let mut seed = 42;
    for _ in 0..60 {
        let (at, count) = (random(&mut seed) % 1000, 1 + random(&mut seed) % 24);
        memory.read(at, 0);
        advise(memory.address(at), count * PAGE, libc::MADV_DONTNEED);
        dropped[at..at + count].fill(true);
        assert_eq!(memory.read(at, 9), 0);
        let page = random(&mut seed) % 1024;
        let expected = if dropped[page] { 0 } else { word(memory.address(page)) };
        assert_eq!(memory.read(page, 0), expected);
    }
    complete(&server);
    for (page, dropped) in dropped.into_iter().enumerate() {
        if dropped {
            assert_eq!(memory.read(page, 1), 0, "page {page}");
        } else {
            memory.check(page, memory.address(page));
        }
    }
}

#[test]
fn unmapped_ranges_are_forgotten_and_mprotect_splits_do_no_harm() {
    let memory = Memory::new(512);
    let source = Arc::new(Pattern {
        delay: Duration::from_millis(2),
        ..Pattern::default()
    });
    let server = server(
        LazyConfig {
            prefetch_threads: 2,
            unit_pages: 64,
            ..LazyConfig::default()
        },
        &source,
    );
    serve(&server, &[memory.range()]);
    for page in (10..500).step_by(50) {
        let at = |page: usize| memory.address(page) as *mut libc::c_void;
        // SAFETY: unmaps and protects pages of this test's own memory.
        unsafe {
            assert_eq!(libc::munmap(at(page), 10 * PAGE), 0);
            assert_eq!(libc::mprotect(at(page + 20), PAGE, libc::PROT_READ), 0);
        }
    }
    complete(&server);
    let gone = |page: usize| page % 50 >= 10 && page % 50 < 20 && page < 500;
    (0..512)
        .filter(|&page| !gone(page))
        .for_each(|page| memory.check(page, memory.address(page)));
    assert!(server.failures().is_empty());
}

#[test]
fn a_task_waits_for_a_failing_source_and_then_gets_its_own_bytes() {
    let memory = Memory::new(128);
    let source = Arc::new(Pattern::default());
    source.broken.store(true, Ordering::Relaxed);
    let server = server(LazyConfig::default(), &source);
    serve(&server, &[memory.range()]);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            memory.check(9, memory.address(9));
            memory.check(7, memory.address(7));
        });
        std::thread::sleep(Duration::from_millis(200));
        assert!(!reader.is_finished());
        // Forks and unmaps go on while the source is away.
        unmap(memory.address(100), PAGE);
        source.broken.store(false, Ordering::Relaxed);
        server.retry_now();
        reader.join().unwrap();
    });
    let progress = complete(&server);
    assert!(progress.stats.source_failures > 0);
    (0..128)
        .filter(|&page| page != 100)
        .for_each(|page| memory.check(page, memory.address(page)));
}

#[test]
fn an_unknown_page_is_an_error_and_never_zeros() {
    let memory = Memory::new(64);
    let source = Arc::new(Pattern::default());
    source.unknown_from.store(memory.address(32), Ordering::Relaxed);
    let server = server(LazyConfig::default(), &source);
    let flags = RangeFlags::default();
    serve(
        &server,
        &[LazyRange {
            flags,
            ..memory.range()
        }],
    );
    let error = server.wait_complete(SOON).unwrap_err();
    let unknown = matches!(error, LazyError::Task { source: TaskFailure::UnknownPage { address, .. }, .. }
        if address >= memory.address(32));
    assert!(unknown, "{error:?}");
    (0..32).for_each(|page| memory.check(page, memory.address(page)));
    // A thread that touches one waits; unmapping the range lets the task complete.
    unmap(memory.address(32), 32 * PAGE);
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.progress().active > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(server.progress().complete, 1);
}

#[test]
fn absent_pages_of_anonymous_memory_are_zeros() {
    let memory = Memory::new(64);
    let source = Arc::new(Pattern::default());
    source.unknown_from.store(memory.address(32), Ordering::Relaxed);
    let server = server(on_demand(), &source);
    serve(&server, &[memory.range()]);
    (0..32).for_each(|page| memory.check(page, memory.address(page)));
    (32..64).for_each(|page| assert_eq!(memory.read(page, 100), 0));
    complete(&server);
}

#[test]
fn shared_memory_is_filled_and_survives_dontneed() {
    let memory = Memory::with(128, libc::MAP_SHARED);
    let source = Arc::new(Pattern {
        delay: Duration::from_millis(5),
        ..Pattern::default()
    });
    let server = server(on_demand(), &source);
    let flags = RangeFlags {
        absent_is_zero: true,
        shared: true,
        ..RangeFlags::default()
    };
    serve(
        &server,
        &[LazyRange {
            flags,
            ..memory.range()
        }],
    );
    memory.check(1, memory.address(1));
    advise(memory.address(0), 64 * PAGE, libc::MADV_DONTNEED);
    (0..128).for_each(|page| memory.check(page, memory.address(page)));
    complete(&server);
}

#[test]
fn stopping_while_the_source_fails_is_quick_and_hands_the_task_back() {
    let memory = Memory::new(64);
    let source = Arc::new(Pattern::default());
    source.broken.store(true, Ordering::Relaxed);
    let server = server(LazyConfig::default(), &source);
    serve(&server, &[memory.range()]);
    std::thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    let left = server.stop();
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].map.count(whimbrel_lazy::regions::PageStatus::Missing), 64);
}
