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
