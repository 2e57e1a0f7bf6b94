use std::collections::BTreeMap;

use proptest::prelude::*;
use whimbrel_images::page::PAGE_SIZE;

use super::*;

const OBJECT: MemoryObject = MemoryObject::Task(7);

/// What each page is after everything was applied: its bytes, or `None` for parent.
#[derive(Default)]
struct Pages(BTreeMap<(MemoryObject, u64), Option<Vec<u8>>>);

impl PageSink for Pages {
    fn write_pages(&mut self, object: MemoryObject, run: PageRun, data: &[u8]) -> io::Result<()> {
        assert_eq!(data.len() as u64, run.bytes());
        for (index, page) in data.chunks(PAGE_SIZE).enumerate() {
            self.0
                .insert((object, run.start + (index * PAGE_SIZE) as u64), Some(page.to_vec()));
        }
        Ok(())
    }

    fn zero_pages(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        self.write_pages(object, run, &vec![0; run.bytes() as usize])
    }

    fn parent_pages(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        (0..run.pages).for_each(|page| drop(self.0.insert((object, run.start + page * PAGE_SIZE as u64), None)));
        Ok(())
    }
}

#[derive(Clone, Debug)]
struct Write {
    object: MemoryObject,
    page: u64,
    /// Per page: a byte to fill it with, and whether only its first byte is set. `None`: parent.
    fill: Vec<Option<(u8, bool)>>,
}

fn writes() -> impl Strategy<Value = Vec<Write>> {
    let object = prop_oneof![Just(OBJECT), Just(MemoryObject::Shmem(7)), Just(MemoryObject::Task(8))];
    let fill = prop::collection::vec(prop::option::weighted(0.9, (0..3_u8, any::<bool>())), 1..6);
    prop::collection::vec(
        (object, 0..40_u64, fill).prop_map(|(object, page, fill)| Write { object, page, fill }),
        1..30,
    )
}

fn page_of((byte, sparse): (u8, bool)) -> Vec<u8> {
    let mut page = vec![if sparse { 0 } else { byte }; PAGE_SIZE];
    page[17] = byte;
    page
}

fn build(writes: &[Write], capacity: usize) -> (Vec<RawBatch>, Pages) {
    let (mut builder, mut batches, mut expected) = (Builder::new(capacity), vec![], Pages::default());
    let mut full = |batch| {
        batches.push(batch);
        Ok::<_, io::Error>(())
    };
    for write in writes {
        for (index, fill) in write.fill.iter().enumerate() {
            let run = PageRun {
                start: (write.page + index as u64) * PAGE_SIZE as u64,
                pages: 1,
            };
            match fill {
                Some(fill) => {
                    builder
                        .push_data(write.object, run, &page_of(*fill), &mut full)
                        .unwrap();
                    expected.write_pages(write.object, run, &page_of(*fill)).unwrap();
                }
                None => {
                    builder
                        .push_empty(write.object, run, RunKind::Parent, &mut full)
                        .unwrap();
                    expected.parent_pages(write.object, run).unwrap();
                }
            }
        }
    }
    batches.extend(builder.take());
    (batches, expected)
}

fn sample() -> RawBatch {
    let runs = vec![
        (
            PageRun {
                start: 0x10000,
                pages: 1,
            },
            RunKind::Data,
        ),
        (
            PageRun {
                start: 0x11000,
                pages: 9,
            },
            RunKind::Zero,
        ),
    ];
    RawBatch {
        object: OBJECT,
        runs,
        content: vec![5; PAGE_SIZE],
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn pages_come_out_as_they_went_in(writes in writes(), capacity in 1..8_usize, level in prop::option::of(-5..4)) {
        let (batches, expected) = build(&writes, capacity * PAGE_SIZE);
        let codec = level.map_or(Codec::Raw, Codec::Zstd);
        let mut actual = Pages::default();
        for (sequence, raw) in batches.iter().enumerate() {
            prop_assert!(raw.content.len() <= capacity * PAGE_SIZE);
            let bytes = Bytes::from(raw.encode(sequence as u64, codec));
            prop_assert!(bytes.len() <= max_encoded(raw.content.len()));
            let batch = Batch::decode(&bytes, capacity * PAGE_SIZE).unwrap();
            prop_assert_eq!(batch.sequence, sequence as u64);
            prop_assert_eq!(batch.page_counts(), raw.page_counts());
            batch.apply(&mut actual).unwrap();
        }
        prop_assert_eq!(actual.0, expected.0);
    }

    #[test]
    fn differences_give_the_pages_back(writes in writes(), slots in 1..60_usize) {
        let (batches, expected) = build(&writes, 4 * PAGE_SIZE);
        let (mut sending, mut receiving) = (delta::Cache::new(slots), delta::Cache::new(slots));
        let mut actual = Pages::default();
        for (sequence, mut raw) in batches.into_iter().enumerate() {
            let (checksum, any) = sending.difference(&mut raw, sequence as u64);
            let codec = if any { Codec::Zstd(1) } else { Codec::Raw };
            let bytes = Bytes::from(raw.encode_with_checksum(sequence as u64, codec, checksum));
            let mut batch = Batch::decode(&bytes, 4 * PAGE_SIZE).unwrap();
            receiving.restore(&mut batch).unwrap();
            batch.apply(&mut actual).unwrap();
        }
        prop_assert_eq!(actual.0, expected.0);
    }

    #[test]
    fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Batch::decode(&Bytes::from(bytes), 1 << 20).is_err());
    }

    #[test]
    fn a_changed_byte_never_changes_pages(at in 0..600_usize, change in 1..=255_u8, level in prop::option::of(0..3)) {
        let raw = sample();
        let mut bytes = raw.encode(1, level.map_or(Codec::Raw, Codec::Zstd));
        let at = at % bytes.len();
        bytes[at] ^= change;
        if let Ok(mut batch) = Batch::decode(&Bytes::from(bytes), 1 << 20) {
            // Reserved bytes do not count; a delta run is found out when it is undone.
            let same = (batch.object, batch.sequence, &batch.runs, &batch.content[..])
                == (raw.object, 1, &raw.runs, &raw.content[..]);
            prop_assert!(same || (batch.has_deltas() && delta::Cache::new(9).restore(&mut batch).is_err()));
        }
    }
}

#[test]
fn zero_pages_vanish() {
    let mut builder = Builder::new(1 << 20);
    let run = PageRun { start: 0, pages: 100 };
    builder
        .push_data(OBJECT, run, &vec![0; 100 * PAGE_SIZE], |_| Err("full"))
        .unwrap();
    let batch = builder.take().unwrap();
    assert_eq!(batch.runs, [(run, RunKind::Zero)]);
    assert!(batch.content.is_empty());
    let mut page = vec![0; PAGE_SIZE];
    for at in [0, 1, 255, 256, 2047, PAGE_SIZE - 1] {
        page[at] = 1;
        assert!(!is_zero_page(&page), "byte {at}");
        page[at] = 0;
    }
    assert!(is_zero_page(&page));
}

#[test]
fn hostile_sizes_are_refused_before_they_are_allocated() {
    let good = sample().encode(1, Codec::Zstd(1));
    let with = |at: usize, value: u32| {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        Batch::decode(&Bytes::from(bytes), 1 << 20).unwrap_err()
    };
    assert!(matches!(with(12, u32::MAX), BatchError::OverLimit { what: "runs", .. }));
    assert!(matches!(
        with(24, u32::MAX),
        BatchError::OverLimit {
            what: "bytes of content",
            ..
        }
    ));
    assert!(matches!(with(24, 1 << 19), BatchError::LengthMismatch { .. }));
    assert_eq!(with(28, u32::MAX), BatchError::Truncated);
    // A frame that decompresses to more than it should.
    let bomb = RawBatch {
        content: vec![0; 1 << 20],
        ..sample()
    }
    .encode(1, Codec::Zstd(1));
    let mut bytes = bomb;
    bytes[24..28].copy_from_slice(&4096_u32.to_le_bytes());
    assert_eq!(
        Batch::decode(&Bytes::from(bytes), 1 << 20).unwrap_err(),
        BatchError::Decompress
    );
}

#[test]
fn runs_that_wrap_or_do_not_add_up_are_refused() {
    for (start, pages) in [
        (u64::MAX - 4095, 2),
        (0x1004, 1),
        (0, 0),
        (0x1000, u64::MAX),
        (0x1000, 2),
    ] {
        let mut raw = sample();
        raw.runs[0].0 = PageRun { start, pages };
        assert!(
            Batch::decode(&Bytes::from(raw.encode(1, Codec::Raw)), 1 << 20).is_err(),
            "{pages} at {start:#x}"
        );
    }
}

#[test]
fn a_difference_to_nothing_is_refused() {
    let mut raw = sample();
    raw.runs[0].1 = RunKind::Delta;
    let mut batch = Batch::decode(&Bytes::from(raw.encode(1, Codec::Raw)), 1 << 20).unwrap();
    assert!(batch.apply(&mut Pages::default()).is_err());
    assert_eq!(
        delta::Cache::new(4).restore(&mut batch),
        Err(BatchError::NoBase { start: 0x10000 })
    );
}
