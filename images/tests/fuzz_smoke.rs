//! Damaged images give errors, never panics, for as many seconds as `WHIMBREL_FUZZ_SECONDS` says (2 by default).
//!
//! The damage is the same in each run, so that a failure can be had again: it names the round it happened in.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use whimbrel_images::chain::PageStore;
use whimbrel_images::dedup::dedup;
use whimbrel_images::entry::{ImageReader, ImageWriter, read_all};
use whimbrel_images::magic;
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSource};
use whimbrel_images::pagemap::PagemapWriter;
use whimbrel_images::proto;
use whimbrel_images::store::{DirStore, ImageStore, MemStore};

#[test]
fn damaged_images_never_panic() {
    let seconds = std::env::var("WHIMBREL_FUZZ_SECONDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(2);
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let images = valid_images();
    let directory = tempfile::tempdir().unwrap();
    let mut random = SplitMix(0x77_68_69_6d);
    let mut rounds = 0u64;
    while Instant::now() < deadline {
        let (name, valid) = &images[random.below(images.len())];
        let mut bytes = valid.clone();
        for _ in 0..=random.below(4) {
            damage(&mut bytes, &mut random);
        }
        let result = catch_unwind(AssertUnwindSafe(|| {
            read_everything(name, &bytes);
            if name.starts_with("pagemap") {
                read_pages(directory.path(), name, &bytes, &mut random);
            }
        }));
        assert!(result.is_ok(), "panic in round {rounds}: {name} = {bytes:02x?}");
        rounds += 1;
    }
    println!("{rounds} damaged images in {seconds} s");
    assert!(rounds > 0);
}

fn valid_images() -> Vec<(String, Vec<u8>)> {
    let store = MemStore::new();
    fn add<M: prost::Message>(store: &MemStore, name: &str, messages: &[M], extra: &[u8]) {
        let mut writer = ImageWriter::create(store, name).unwrap();
        for message in messages {
            writer.write(message).unwrap();
            writer.extra(extra).unwrap();
        }
        writer.finish().unwrap();
    }
    let vma = proto::VmaEntry {
        start: 0x400000,
        end: 0x41f000,
        status: 0x201,
        ..Default::default()
    };
    let mm = proto::MmEntry {
        vmas: vec![vma; 5],
        mm_saved_auxv: vec![1, 2, u64::MAX],
        ..Default::default()
    };
    add(&store, "mm-1.img", &[mm], b"");
    let info = proto::ThreadInfoX86 {
        tls: vec![proto::UserDescT::default(); 3],
        ..Default::default()
    };
    let core = proto::CoreEntry {
        mtype: proto::core_entry::March::X8664 as i32,
        thread_info: Some(info),
        tc: Some(proto::TaskCoreEntry {
            comm: "victim".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    add(&store, "core-1.img", &[core.clone(), core], b"");
    let namespace = proto::AaNamespace {
        name: "n".into(),
        ..Default::default()
    };
    let nested = proto::AaNamespace {
        name: "outer".into(),
        namespaces: vec![namespace; 2],
        ..Default::default()
    };
    add(
        &store,
        "apparmor.img",
        &[proto::ApparmorEntry {
            namespaces: vec![nested],
        }],
        b"",
    );
    add(
        &store,
        "pipes-data.img",
        &vec![
            proto::PipeDataEntry {
                pipe_id: 1,
                bytes: 4,
                size: None,
                packets: Vec::new(),
            };
            2
        ],
        b"data",
    );
    add(
        &store,
        "inventory.img",
        &[proto::InventoryEntry {
            img_version: 2,
            ..Default::default()
        }],
        b"",
    );
    for object in [MemoryObject::Task(1), MemoryObject::Shmem(1)] {
        let mut writer = PagemapWriter::create(&store, object, 1).unwrap();
        writer
            .data(
                PageRun {
                    start: 0x1000,
                    pages: 2,
                },
                &[7; 2 * PAGE_SIZE],
                true,
            )
            .unwrap();
        writer
            .parent(PageRun {
                start: 0x3000,
                pages: 5,
            })
            .unwrap();
        writer
            .data(
                PageRun {
                    start: 0x10000,
                    pages: 1,
                },
                &[8; PAGE_SIZE],
                false,
            )
            .unwrap();
        writer
            .lazy(PageRun {
                start: 0x20000,
                pages: 1,
            })
            .unwrap();
        writer.finish().unwrap();
    }
    store.take("pages-1.img");
    store.take_all().into_iter().collect()
}

fn read_everything(name: &str, bytes: &[u8]) {
    let store = MemStore::new();
    store.insert(name, bytes.to_vec()).unwrap();
    let _ = read_all::<proto::MmEntry>(&store, name);
    let _ = read_all::<proto::CoreEntry>(&store, name);
    let _ = read_all::<proto::ApparmorEntry>(&store, name);
    let _ = read_all::<proto::InventoryEntry>(&store, name);
    let _ = read_all::<proto::FileEntry>(&store, name);
    if let Ok(mut reader) = ImageReader::open(&store, name) {
        while let Ok(Some(entry)) = reader.next::<proto::PipeDataEntry>() {
            if reader.padded_extra(entry.bytes.into(), 8).is_err() {
                break;
            }
        }
    }
    let text = String::from_utf8_lossy(bytes);
    let _ = magic::by_name(&text);
    let _ = store.open(&text);
}

/// The image becomes the newest pagemap of a chain of two.
fn read_pages(directory: &std::path::Path, name: &str, bytes: &[u8], random: &mut SplitMix) {
    let parent = DirStore::create(directory.join("parent-dump")).unwrap();
    let child = DirStore::create(directory.join("dump")).unwrap();
    child.set_parent("../parent-dump").unwrap();
    for other in child.list().unwrap() {
        child.remove(&other).unwrap();
    }
    std::fs::write(directory.join("dump").join(name), bytes).unwrap();
    std::fs::write(directory.join("dump/pages-1.img"), [7; 3 * PAGE_SIZE]).unwrap();
    if !parent.exists("pagemap-1.img").unwrap() {
        let mut writer = PagemapWriter::create(&parent, MemoryObject::Task(1), 1).unwrap();
        writer
            .data(
                PageRun {
                    start: 0x2000,
                    pages: 4,
                },
                &[9; 4 * PAGE_SIZE],
                false,
            )
            .unwrap();
        writer.finish().unwrap();
    }
    if let Ok(store) = PageStore::new(DirStore::open(directory.join("dump")).unwrap()) {
        for object in [MemoryObject::Task(1), MemoryObject::Shmem(1)] {
            let run = PageRun {
                start: random.next() & 0x3f000,
                pages: 1 + random.next() % 40,
            };
            let mut buffer = vec![0; run.bytes() as usize];
            let _ = store.read_pages(object, run, &mut buffer);
            let _ = store.extents(object);
        }
        let _ = dedup(child);
    }
}

fn damage(bytes: &mut Vec<u8>, random: &mut SplitMix) {
    if bytes.is_empty() {
        bytes.push(random.next() as u8);
        return;
    }
    let at = random.below(bytes.len());
    match random.below(7) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.next() as u8,
        2 => bytes.truncate(at),
        3 => drop(bytes.remove(at)),
        4 => bytes.insert(at, random.next() as u8),
        5 => {
            let end = (at + random.below(40)).min(bytes.len());
            let piece = bytes[at..end].to_vec();
            bytes.extend(piece);
        }
        _ => {
            // Extremes in the place of a size or a number.
            let extremes = [0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX];
            let extreme = extremes[random.below(extremes.len())].to_le_bytes();
            let end = (at + 4).min(bytes.len());
            bytes[at..end].copy_from_slice(&extreme[..end - at]);
        }
    }
}

/// The SplitMix64 generator: small, and the same on every machine.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
