//! Every decoder of bytes from outside, fed with mutated good input and with garbage, for `WHIMBREL_FUZZ_SECONDS`
//! seconds (default 2) from the seed in `WHIMBREL_FUZZ_SEED` (default 1). None may panic.
#![allow(missing_docs)]

use std::time::{Duration, Instant};

use bytes::Bytes;
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageState};
use whimbrel_page_server::{
    batch::{Batch, Codec, RawBatch, RunKind, delta::Cache},
    identity::{Fingerprint, Identity},
    peers::Peers,
    proto::{
        Limits, Role, SessionId,
        fault::{PageReply, PageRequest},
        frame::{FrameReader, encode},
        link::{Link, LinkEvent, Local, OpenRequest, Received},
        session::{Item, SessionState},
        wire::{self, Control, control::Kind},
    },
};

/// xorshift64: the same bytes for the same seed everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        const EDGES: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff_ffff, u64::MAX, u64::MAX - 4095, 1 << 63];
        for _ in 0..=self.below(4) {
            if bytes.is_empty() {
                bytes.push(self.next() as u8);
            }
            let at = self.below(bytes.len());
            match self.below(6) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = self.next() as u8,
                2 => bytes.truncate(at),
                3 => bytes.insert(at, self.next() as u8),
                4 => {
                    let edge = EDGES[self.below(EDGES.len())].to_le_bytes();
                    let width = [1, 2, 4, 8][self.below(4)].min(bytes.len() - at);
                    bytes[at..at + width].copy_from_slice(&edge[..width]);
                }
                _ => {
                    let end = at + self.below((bytes.len() - at).min(64));
                    let copy = bytes[at..end].to_vec();
                    bytes.extend(copy);
                }
            }
        }
    }
}

fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

fn frames() -> Vec<Vec<u8>> {
    let kinds = [
        Kind::Hello(wire::Hello {
            min_version: 1,
            max_version: 1,
            capabilities: vec![1, 2],
            limits: Some(wire::Limits {
                batch_window: 4,
                batch_bytes: 1 << 20,
                ..Default::default()
            }),
            software: "fuzz".into(),
        }),
        Kind::Open(wire::Open {
            role: 3,
            session_id: vec![7; 16].into(),
            ..Default::default()
        }),
        Kind::Opened(wire::Opened {
            received: Some(wire::Received {
                applied: 1,
                pending: vec![2, 3],
                items: 1,
                consumed: 1,
            }),
        }),
        Kind::Refused(wire::Refused {
            code: 2,
            reason: "no".into(),
        }),
        Kind::Message(wire::Message {
            item: 1,
            body: Bytes::from_static(b"hello"),
        }),
        Kind::Blob(wire::Blob {
            item: 2,
            name: "a.img".into(),
            length: 5,
            checksum: 6,
        }),
        Kind::Consumed(wire::Consumed { item: 1 }),
        Kind::Applied(wire::Applied { sequence: 1 }),
        Kind::Failed(wire::Failed { reason: "why".into() }),
        Kind::Finish(wire::Finish { item: 2, sequence: 3 }),
    ];
    kinds
        .into_iter()
        .map(|kind| encode(&Control { kind: Some(kind) }))
        .collect()
}

fn batches() -> Vec<Vec<u8>> {
    let runs = vec![
        (
            PageRun {
                start: 0x1000,
                pages: 2,
            },
            RunKind::Data,
        ),
        (
            PageRun {
                start: 0x3000,
                pages: 7,
            },
            RunKind::Zero,
        ),
        (
            PageRun {
                start: 0xa000,
                pages: 1,
            },
            RunKind::Parent,
        ),
    ];
    let raw = RawBatch {
        object: MemoryObject::Task(1),
        runs,
        content: vec![3; 2 * PAGE_SIZE],
    };
    let mut delta = raw.clone();
    delta.runs[0].1 = RunKind::Delta;
    vec![
        raw.encode(1, Codec::Raw),
        raw.encode(1, Codec::Zstd(1)),
        delta.encode(2, Codec::Zstd(1)),
    ]
}

fn try_link(random: &mut Random, bytes: &[u8]) {
    let mut link = if random.below(2) == 0 {
        Link::initiator(Local::default())
    } else {
        Link::acceptor(Local::default())
    };
    let mut state = SessionState::<Batch>::new(Limits::default(), Limits::default());
    state.reserve_batch();
    state.batch_encoded(1, Bytes::new());
    state.send_item(Item::Message(Bytes::new()));
    let mut at = 0;
    while at < bytes.len() {
        let end = bytes.len().min(at + 1 + random.below(60));
        if link.receive(&bytes[at..end]).is_err() {
            break;
        }
        at = end;
        while let Some(event) = link.poll() {
            match event {
                LinkEvent::Hello(_) => {
                    let open = OpenRequest {
                        role: Role::Migrate,
                        session_id: SessionId([7; 16]),
                        resume: None,
                    };
                    let _ = link.open(&open);
                }
                LinkEvent::Open(open) => {
                    let _ = link.accept(&Received::default());
                    open.resume.map(|received| state.attach(&received).is_ok());
                }
                LinkEvent::Opened(received) => drop(state.attach(&received)),
                LinkEvent::Session(kind) => drop(state.receive(kind)),
                LinkEvent::Refused { .. } => {}
            }
        }
        while link.transmit().is_some() {}
    }
    let item = random.next();
    let _ = (
        state.awaited_blob(item),
        state.is_announced(item),
        state.blob_arrived(item, Bytes::from_static(b"12345")),
    );
    while state.next_item().is_some() {}
    state.detach();
    let _ = (state.received(), state.is_drained(), state.all_applied());
}

fn try_batch(bytes: Vec<u8>) {
    let mut cache = Cache::new(3);
    if let Ok(mut batch) = Batch::decode(&Bytes::from(bytes), 1 << 20) {
        let needed: u64 = batch
            .runs
            .iter()
            .filter(|(_, kind)| *kind != RunKind::Zero)
            .map(|(run, _)| run.pages)
            .sum();
        assert!(batch.content.len() as u64 <= needed * PAGE_SIZE as u64);
        assert!(
            batch
                .runs
                .iter()
                .all(|(run, _)| run.start.checked_add(run.bytes()).is_some())
        );
        let _ = cache.restore(&mut batch);
        let _ = cache.restore(&mut batch);
    }
}

#[test]
fn no_decoder_panics() {
    let mut random = Random(environment("WHIMBREL_FUZZ_SEED", 1).max(1));
    let deadline = Instant::now() + Duration::from_secs(environment("WHIMBREL_FUZZ_SECONDS", 2));
    let (frames, batches) = (frames(), batches());
    let run = PageRun {
        start: 0x1000,
        pages: 2,
    };
    let request = PageRequest {
        object: MemoryObject::Task(1),
        run,
        urgent: true,
    }
    .encode()
    .to_vec();
    let states = vec![PageState::Data, PageState::Zero];
    let reply = PageReply {
        states,
        data: vec![1; 2 * PAGE_SIZE],
    };
    let replies = [
        reply.encode(None),
        reply.encode(Some(1)),
        PageReply::encode_refusal("why"),
    ];
    let fingerprint = Identity::generate().unwrap().fingerprint().to_string();
    let peers = format!("# hosts\n{fingerprint} one\n\n{fingerprint} two\n").into_bytes();
    let mut rounds = 0_u64;
    while Instant::now() < deadline {
        let mut stream: Vec<u8> = frames[..2].concat();
        for _ in 0..random.below(8) {
            stream.extend(&frames[random.below(frames.len())]);
        }
        random.mutate(&mut stream);
        try_link(&mut random, &stream);
        let mut reader = FrameReader::default();
        reader.push(&stream);
        while let Ok(Some(_)) = reader.next_frame() {}

        let mut batch = batches[random.below(batches.len())].clone();
        random.mutate(&mut batch);
        try_batch(batch);

        let mut bytes = request.clone();
        random.mutate(&mut bytes);
        if let Ok(request) = PageRequest::decode(&bytes) {
            assert!(request.run.pages <= 1024 && request.run.start.checked_add(request.run.bytes()).is_some());
        }
        let mut bytes = replies[random.below(replies.len())].clone();
        random.mutate(&mut bytes);
        if let Ok(Ok(reply)) = PageReply::decode(&bytes, 2) {
            assert_eq!((reply.states.len(), reply.data.len()), (2, 2 * PAGE_SIZE));
        }
        let mut text = peers.clone();
        random.mutate(&mut text);
        let _ = Peers::parse(&String::from_utf8_lossy(&text));
        let mut text = fingerprint.clone().into_bytes();
        random.mutate(&mut text);
        let _ = String::from_utf8_lossy(&text).parse::<Fingerprint>();
        rounds += 1;
    }
    assert!(rounds > 0);
}
