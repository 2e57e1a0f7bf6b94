//! Forks while memory is lazy. Every fork is seen by every userfaultfd of the process, so these tests take turns.

mod common;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::*;
use whimbrel_lazy::{LazyConfig, LazyRange, RangeFlags};

const SOON: Option<Duration> = Some(Duration::from_secs(30));

fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn a_child_forked_while_lazy_sees_the_right_content() {
    let _alone = alone();
    let memory = Memory::new(2048);
    let source = Arc::new(Pattern {
        delay: Duration::from_millis(1),
        ..Pattern::default()
    });
    let server = server(
        LazyConfig {
            prefetch_threads: 1,
            unit_pages: 8,
            ..LazyConfig::default()
        },
        &source,
    );
    serve(&server, &[memory.range()]);
    let changed = 3;
    write(memory.address(changed), 77);
    let children: Vec<_> = (0..4)
        .map(|_| {
            fork(|| {
                read(memory.address(changed)) == 77
                    && (0..memory.pages)
                        .step_by(5)
                        .all(|page| page == changed || read(memory.address(page) + 8) == word(memory.address(page) + 8))
            })
        })
        .collect();
    std::thread::scope(|scope| {
        for part in 0..2 {
            scope.spawn(move || {
                (part..memory.pages)
                    .step_by(2)
                    .filter(|&p| p != changed)
                    .for_each(|page| {
                        memory.check(page, memory.address(page));
                    })
            });
        }
    });
    for child in children {
        assert_eq!(wait(child), 0);
    }
    let progress = server.wait_complete(SOON).unwrap();
    assert_eq!(progress.stats.forks, 4);
    assert_eq!(progress.complete + progress.gone, 5);
}

#[test]
fn a_task_that_ends_is_noticed() {
    let _alone = alone();
    let memory = Memory::new(64);
    let source = Arc::new(Pattern::default());
    source.broken.store(true, Ordering::Relaxed);
    let server = server(
        LazyConfig {
            prefetch_threads: 0,
            ..LazyConfig::default()
        },
        &source,
    );
    serve(&server, &[memory.range()]);
    // The child has a userfaultfd of its own from the fork event; nobody ever fills a page of it.
    assert_eq!(wait(fork(|| true)), 0);
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.progress().gone == 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let progress = server.progress();
    assert_eq!((progress.gone, progress.active), (1, 1));
    unmap(memory.start, memory.bytes());
    server.wait_complete(SOON).unwrap();
}

#[test]
fn a_child_sees_wiped_memory_as_zeros_and_lacks_what_it_does_not_inherit() {
    let _alone = alone();
    let memory = Memory::new(96);
    // SAFETY: advice on this test's own memory.
    unsafe {
        assert_eq!(
            libc::madvise(memory.address(32) as *mut _, 32 * PAGE, libc::MADV_WIPEONFORK),
            0
        );
        assert_eq!(
            libc::madvise(memory.address(64) as *mut _, 32 * PAGE, libc::MADV_DONTFORK),
            0
        );
    }
    let part = |page: usize, flags: RangeFlags| LazyRange {
        flags,
        ..LazyRange::anonymous(OBJECT, memory.address(page), 32)
    };
    let ranges = [
        part(0, RangeFlags::default()),
        part(
            32,
            RangeFlags {
                wipe_on_fork: true,
                ..RangeFlags::default()
            },
        ),
        part(
            64,
            RangeFlags {
                dont_fork: true,
                ..RangeFlags::default()
            },
        ),
    ];
    let source = Arc::new(Pattern::default());
    let server = server(
        LazyConfig {
            prefetch_threads: 0,
            ..LazyConfig::default()
        },
        &source,
    );
    serve(&server, &ranges);
    memory.check(40, memory.address(40));
    let child = fork(|| {
        (0..32).all(|page| read(memory.address(page)) == word(memory.address(page)))
            && (32..64).all(|page| read(memory.address(page)) == 0)
    });
    assert_eq!(wait(child), 0);
    (0..96).for_each(|page| memory.check(page, memory.address(page)));
    server.wait_complete(SOON).unwrap();
}

/// What a page of the stress test must hold.
#[derive(Clone, Copy)]
enum Expected {
    Saved(u64),
    Written(u64),
}

fn stress(mut memory: Memory, seed: u64, until: Instant) {
    let mut state = seed * 0x1234_5678_9ABC_DEF1;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % below
    };
    let mut expected: Vec<Expected> = (0..memory.pages)
        .map(|page| Expected::Saved(memory.address(page)))
        .collect();
    let verify = |memory: Memory, page: usize, expected: Expected| match expected {
        Expected::Saved(source) => memory.check(page, source),
        Expected::Written(value) => assert_eq!(memory.read(page, 0), value, "page {page}"),
    };
    while Instant::now() < until {
        let page = random(memory.pages);
        match random(20) {
            0..=9 => verify(memory, page, expected[page]),
            10..=14 => {
                let value = random(1 << 40) as u64;
                write(memory.address(page), value);
                expected[page] = Expected::Written(value);
            }
            15..=17 => {
                let count = (1 + random(8)).min(memory.pages - page);
                advise(memory.address(page), count * PAGE, libc::MADV_DONTNEED);
                expected[page..page + count].fill(Expected::Written(0));
            }
            18 => {
                let room = Memory::new(memory.pages);
                let (old, len) = (memory.start as *mut libc::c_void, memory.bytes());
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                // SAFETY: both ranges are this test's own; the second is replaced by the first.
                let moved = unsafe { libc::mremap(old, len, len, flags, room.start as *mut libc::c_void) };
                assert_eq!(moved as u64, room.start);
                memory = room;
            }
            _ => {
                let child = fork(|| match expected[page] {
                    Expected::Saved(source) => read(memory.address(page)) == word(source),
                    Expected::Written(value) => read(memory.address(page)) == value,
                });
                assert_eq!(wait(child), 0, "page {page} in a child");
            }
        }
    }
    (0..memory.pages).for_each(|page| verify(memory, page, expected[page]));
}

#[test]
fn content_stays_right_while_threads_move_drop_write_and_fork_at_once() {
    let _alone = alone();
    let memories: Vec<Memory> = (0..3).map(|_| Memory::new(3000)).collect();
    let ranges: Vec<LazyRange> = memories.iter().map(Memory::range).collect();
    let source = Arc::new(Pattern {
        delay: Duration::from_micros(700),
        ..Pattern::default()
    });
    let config = LazyConfig {
        prefetch_threads: 2,
        unit_pages: 4,
        ..LazyConfig::default()
    };
    let server = server(config, &source);
    serve(&server, &ranges);
    let until = Instant::now() + Duration::from_secs(2);
    std::thread::scope(|scope| {
        for (seed, memory) in (1..).zip(memories) {
            scope.spawn(move || stress(memory, seed, until));
        }
    });
    let progress = server.wait_complete(SOON).unwrap();
    println!("{progress:?}");
    assert!(server.failures().is_empty());
}
