//! Pages go into image sets in any order and come out of chains of them unchanged.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use whimbrel_images::chain::{Location, PageStore};
use whimbrel_images::dedup::dedup;
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink, PageSource, PageState};
use whimbrel_images::pagemap::PagemapWriter;
use whimbrel_images::proto::TrackEntry;
use whimbrel_images::sink::DirPageSink;
use whimbrel_images::store::{DirStore, ImageStore, MemStore};

const TASK: MemoryObject = MemoryObject::Task(30495);
const SHMEM: MemoryObject = MemoryObject::Shmem(29151);
const PAGE: u64 = PAGE_SIZE as u64;

/// Pages `first..first + pages`, counted from 0x10000.
fn run(first: u64, pages: u64) -> PageRun {
    PageRun {
        start: 0x10000 + first * PAGE,
        pages,
    }
}

fn filled(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|&byte| [byte; PAGE_SIZE]).collect()
}

/// One character a page: its first byte, `.` for zero, `?` for unknown.
fn shown(store: &PageStore, object: MemoryObject, pages: u64) -> String {
    let mut buffer = vec![0xee; (pages * PAGE) as usize];
    let states = store.read_pages(object, run(0, pages), &mut buffer).unwrap();
    let show = |(page, state): (&[u8], PageState)| match state {
        PageState::Data => {
            assert!(page.iter().all(|&byte| byte == page[0]));
            char::from(page[0])
        }
        PageState::Zero => {
            assert!(page.iter().all(|&byte| byte == 0));
            '.'
        }
        PageState::Unknown => '?',
    };
    buffer.chunks(PAGE_SIZE).zip(states).map(show).collect()
}

fn sink(path: &Path) -> DirPageSink {
    DirPageSink::new(Arc::new(DirStore::create(path).unwrap()))
}

/// A dump in `path`: a letter is a page with data, `^` one in the parent, `.` a zero one.
fn dump(path: &Path, pages: &str, parent: Option<&str>) {
    let mut sink = sink(path);
    sink.begin(TASK).unwrap();
    for (i, page) in pages.bytes().enumerate() {
        match page {
            b'^' => sink.parent_pages(TASK, run(i as u64, 1)).unwrap(),
            b'.' => sink.zero_pages(TASK, run(i as u64, 1)).unwrap(),
            byte => sink.write_pages(TASK, run(i as u64, 1), &filled(&[byte])).unwrap(),
        }
    }
    sink.finish().unwrap();
    if let Some(parent) = parent {
        DirStore::open(path).unwrap().set_parent(parent).unwrap();
    }
}

#[test]
fn pages_of_many_objects_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let mut sink = sink(directory.path());
    sink.write_pages(TASK, run(5, 2), &filled(b"fg")).unwrap();
    sink.write_pages(SHMEM, run(0, 1), &filled(b"s")).unwrap();
    sink.write_pages(TASK, run(0, 2), &filled(b"ab")).unwrap();
    sink.write_pages(TASK, run(1, 3), &filled(b"BCD")).unwrap();
    sink.zero_pages(TASK, run(6, 4)).unwrap();
    sink.lazy_pages(TASK, run(8, 1)).unwrap();
    sink.mark_lazy(TASK, run(2, 1)).unwrap();
    sink.begin(MemoryObject::Task(1)).unwrap();
    let summary = sink.finish().unwrap();
    assert_eq!((summary.objects, summary.pages_written, summary.pages_lazy), (3, 6, 1));

    let store = PageStore::open(directory.path()).unwrap();
    assert_eq!(
        store.objects().collect::<Vec<_>>(),
        [MemoryObject::Task(1), TASK, SHMEM]
    );
    assert_eq!(shown(&store, TASK, 10), "aBCD.f..?.");
    assert_eq!(shown(&store, SHMEM, 2), "s.");
    assert_eq!(shown(&store, MemoryObject::Task(1), 2), "..");
    assert_eq!(shown(&store, MemoryObject::Task(2), 2), "??");
    assert!(store.extents(MemoryObject::Task(2)).unwrap().is_empty());

    // CRIU wants the pages file in the order of the pagemap, with nothing between.
    let pages = std::fs::read(directory.path().join("pages-1.img")).unwrap();
    assert_eq!(pages, filled(b"aBCDf"));
    let extents = store.extents(TASK).unwrap();
    let places: Vec<_> = extents
        .iter()
        .map(|extent| (extent.run, extent.offset, extent.lazy))
        .collect();
    let expected = [
        (run(0, 2), 0, false),
        (run(2, 1), 2 * PAGE, true),
        (run(3, 1), 3 * PAGE, false),
        (run(5, 1), 4 * PAGE, false),
    ];
    assert_eq!(places, expected);
    let mut page = [0; PAGE_SIZE];
    extents[3].file.read_exact_at(&mut page, extents[3].offset).unwrap();
    assert_eq!(page, [b'f'; PAGE_SIZE]);
    assert!(
        std::fs::read_dir(directory.path()).unwrap().count() == 6,
        "nothing temporary is left"
    );
}

#[test]
fn both_stores_get_the_same_files() {
    let directory = tempfile::tempdir().unwrap();
    let in_memory = MemStore::new();
    let stores: [Arc<dyn ImageStore>; 2] = [
        Arc::new(DirStore::open(directory.path()).unwrap()),
        Arc::new(in_memory.clone()),
    ];
    for store in stores {
        let mut sink = DirPageSink::new(store).with_first_pages_id(9);
        sink.write_pages(TASK, run(3, 2), &filled(b"de")).unwrap();
        sink.write_pages(TASK, run(0, 1), &filled(b"a")).unwrap();
        sink.finish().unwrap();
    }
    for (name, bytes) in in_memory.take_all() {
        assert_eq!(std::fs::read(directory.path().join(name)).unwrap(), bytes);
    }
}

#[test]
fn invalid_runs_are_refused() {
    let mut sink = DirPageSink::new(Arc::new(MemStore::new()));
    for start_pages in [(0x1001, 1), (0x1000, 0), (u64::MAX - 0xfff, 1), (0x1000, 1 << 52)] {
        let run = PageRun {
            start: start_pages.0,
            pages: start_pages.1,
        };
        assert!(sink.write_pages(TASK, run, &[0; 4096]).is_err());
        assert!(sink.zero_pages(TASK, run).is_err());
        assert!(sink.parent_pages(TASK, run).is_err());
        assert!(sink.lazy_pages(TASK, run).is_err());
        assert!(sink.mark_lazy(TASK, run).is_err());
    }
    assert!(sink.write_pages(TASK, run(0, 2), &[0; 4096]).is_err());
    assert_eq!(sink.finish().unwrap().objects, 0);
}

#[test]
fn a_chain_of_three_parents_is_followed() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    dump(&at("1"), "abcdefgh", None);
    dump(&at("2"), "^B^^.^^H", Some("../1"));
    dump(&at("3"), "^^C^.f^^.^", Some("../2"));
    dump(&at("4"), "^^^D^^.^", Some("../3"));
    let store = PageStore::open(at("4")).unwrap();
    assert_eq!(store.depth(), 4);
    // Page 4 is zero in its parent: a parent that lacks a page must not pass for one that has zeros.
    assert_eq!(shown(&store, TASK, 8), "aBCD?f.H");
    assert_eq!(shown(&PageStore::open(at("3")).unwrap(), TASK, 10), "aBCd.fgH.?");
    let runs = store.runs(TASK).unwrap();
    assert_eq!(
        runs[0].location,
        Location::File {
            level: 3,
            pages_id: 1,
            offset: 0
        }
    );
    assert_eq!(
        runs[1].location,
        Location::File {
            level: 2,
            pages_id: 1,
            offset: 0
        }
    );
    assert_eq!(runs[4].location, Location::Missing);
}

#[test]
fn what_a_dump_left_in_a_task_is_found_by_the_next_one_and_only_that_of_the_newest() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let track = |start_time| TrackEntry {
        start_time,
        marked: vec![0x7000, 0x9000],
        clear: vec![0x8000],
    };
    let mut first = sink(&at("1"));
    first.write_pages(TASK, run(0, 1), &filled(b"a")).unwrap();
    first.set_track(TASK, track(1)).unwrap();
    first.finish().unwrap();
    let store = PageStore::open(at("1")).unwrap();
    assert_eq!(store.tracks().collect::<Vec<_>>(), [(TASK, &track(1))]);
    dump(&at("2"), "^", Some("../1"));
    assert_eq!(PageStore::open(at("2")).unwrap().tracks().count(), 0);
}

#[test]
fn runs_that_continue_each_other_in_the_parent_become_one() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    dump(&at("1"), "abcd", None);
    dump(&at("2"), "^^^^", Some("../1"));
    let store = PageStore::open(at("2")).unwrap();
    assert_eq!(store.runs(TASK).unwrap().len(), 1);
}

#[test]
fn a_sink_that_knows_its_parent_claims_only_what_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    dump(&at("1"), "a.c.", None);
    let parent = Arc::new(PageStore::open(at("1")).unwrap());
    let mut sink = sink(&at("2")).with_parent(parent);
    sink.write_pages(TASK, run(1, 1), &filled(b"x")).unwrap();
    sink.parent_pages(TASK, run(0, 4)).unwrap();
    assert!(sink.parent_pages(SHMEM, run(0, 1)).is_err());
    assert_eq!(sink.finish().unwrap().pages_in_parent, 2);
    DirStore::open(at("2")).unwrap().set_parent("../1").unwrap();
    assert_eq!(shown(&PageStore::open(at("2")).unwrap(), TASK, 5), "a.c..");
}

#[test]
fn loops_and_dangling_parents_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    dump(&at("1"), "a", Some("../2"));
    dump(&at("2"), "^", Some("../1"));
    let error = PageStore::open(at("2")).err().unwrap();
    assert_eq!(
        error.to_string(),
        "parent/parent at byte 0: the chain of parents leads back to itself"
    );
    dump(&at("self"), "^", Some("."));
    assert!(PageStore::open(at("self")).is_err());
    dump(&at("3"), "^", Some("../gone"));
    assert!(PageStore::open(at("3")).err().unwrap().is_not_found());
}

#[test]
fn pages_files_that_cannot_be_right_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    dump(directory.path(), "abc", None);
    let pages = directory.path().join("pages-1.img");
    let store = PageStore::open(directory.path()).unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open(&pages)
        .unwrap()
        .set_len(2 * PAGE)
        .unwrap();
    assert!(
        store.read_pages(TASK, run(0, 3), &mut [0; 3 * PAGE_SIZE]).is_err(),
        "shrunk after opening"
    );
    let error = PageStore::open(directory.path()).err().unwrap();
    assert_eq!(
        error.to_string(),
        "pages-1.img at byte 0: the file ends after 8192 of 12288 bytes"
    );
    std::fs::remove_file(&pages).unwrap();
    assert!(PageStore::open(directory.path()).err().unwrap().is_not_found());

    let store = DirStore::open(directory.path()).unwrap();
    for object in [TASK, SHMEM] {
        PagemapWriter::create(&store, object, 1).unwrap().finish().unwrap();
    }
    let error = PageStore::open(directory.path()).err().unwrap();
    assert!(error.to_string().contains("claimed by"), "{error}");
}

#[test]
fn bad_requests_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    dump(directory.path(), "abc", None);
    let store = PageStore::open(directory.path()).unwrap();
    assert!(store.read_pages(TASK, run(0, 2), &mut [0; PAGE_SIZE]).is_err());
    assert!(
        store
            .read_pages(TASK, PageRun { start: 1, pages: 1 }, &mut [0; PAGE_SIZE])
            .is_err()
    );
    assert!(
        store
            .read_pages(
                TASK,
                PageRun {
                    start: u64::MAX - 0xfff,
                    pages: 1
                },
                &mut [0; PAGE_SIZE]
            )
            .is_err()
    );
    assert!(store.read_pages(TASK, run(0, 0), &mut []).is_err());
}

#[test]
fn dedup_frees_what_later_dumps_override_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    dump(&at("1"), "abcdefgh", None);
    dump(&at("2"), "^BC^^^GH", Some("../1"));
    dump(&at("3"), "A^^^E^g^", Some("../2"));
    let before = shown(&PageStore::open(at("3")).unwrap(), TASK, 8);
    let blocks = || std::fs::metadata(at("1").join("pages-1.img")).unwrap().blocks();
    let blocks_before = blocks();
    let freed = dedup(DirStore::open(at("3")).unwrap()).unwrap();
    assert_eq!(freed.pages, 1 + 6);
    assert_eq!(freed.freed_bytes, 7 * PAGE);
    assert!(blocks() < blocks_before);
    assert_eq!(shown(&PageStore::open(at("3")).unwrap(), TASK, 8), before);
    assert_eq!(
        std::fs::read(at("1").join("pages-1.img")).unwrap(),
        filled(b"\0\0\0d\0f\0\0")
    );
    assert_eq!(std::fs::read(at("2").join("pages-1.img")).unwrap(), filled(b"BC\0H"));
    assert_eq!(dedup(DirStore::open(at("3")).unwrap()).unwrap().freed_bytes, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_newest_bytes_win_in_any_order(
        steps in prop::collection::vec((0u64..30, 1u64..8, prop::option::of(1u8..=255)), 0..40),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let mut sink = sink(directory.path());
        sink.begin(TASK).unwrap();
        let mut model = BTreeMap::new();
        for (first, pages, value) in steps {
            let run = run(first, pages);
            match value {
                Some(value) => {
                    let bytes: Vec<u8> = (0..pages).map(|i| value.wrapping_add(i as u8) | 1).collect();
                    sink.write_pages(TASK, run, &filled(&bytes)).unwrap();
                    model.extend((first..).zip(bytes));
                }
                None => {
                    sink.zero_pages(TASK, run).unwrap();
                    model.retain(|page, _| !(first..first + pages).contains(page));
                }
            }
        }
        let summary = sink.finish().unwrap();
        prop_assert_eq!(summary.pages_written, model.len() as u64);
        let stored = std::fs::read(directory.path().join("pages-1.img")).unwrap();
        prop_assert_eq!(stored, filled(&model.values().copied().collect::<Vec<_>>()));
        let store = PageStore::open(directory.path()).unwrap();
        let mut buffer = vec![0xee; 40 * PAGE_SIZE];
        let states = store.read_pages(TASK, run(0, 40), &mut buffer).unwrap();
        for (page, state) in states.into_iter().enumerate() {
            let expected = model.get(&(page as u64)).copied();
            prop_assert_eq!(state == PageState::Data, expected.is_some());
            prop_assert_eq!(buffer[page * PAGE_SIZE + 5], expected.unwrap_or(0));
        }
    }
}
