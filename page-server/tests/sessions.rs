//! Sessions end to end over QUIC on the loopback interface.
#![allow(missing_docs)]

mod common;

use std::{sync::Arc, thread, time::Duration};

use common::{Memory, OBJECT, credentials, identity, options, page, pair, request, session};
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink};
use whimbrel_page_server::{
    proto::{Limits, Role},
    transport::{Compression, Endpoint, Error, Options, PageSender, Received, RefusalCode, Session},
};

type Runtime = whimbrel_page_server::transport::Runtime;

/// Writes `pages` pages from `first` on, in runs of uneven length.
fn write(sender: &mut PageSender, first: u64, pages: u64, seed: u64) {
    let mut at = first;
    while at < first + pages {
        let count = (at % 97 + 1).min(first + pages - at);
        let data: Vec<u8> = (at..at + count).flat_map(|number| page(number, seed)).collect();
        let run = PageRun {
            start: at * PAGE_SIZE as u64,
            pages: count,
        };
        sender.write_pages(OBJECT, run, &data).unwrap();
        at += count;
    }
}

fn assert_pages(memory: &Memory, pages: u64, seed: impl Fn(u64) -> u64) {
    let map = memory.pages.lock().unwrap();
    assert_eq!(map.len() as u64, pages);
    for number in 0..pages {
        let expected = page(number, seed(number));
        let actual = &map[&(OBJECT, number * PAGE_SIZE as u64)];
        let same = if number % 3 == 0 {
            actual.is_empty()
        } else {
            *actual == expected
        };
        assert!(same, "page {number}");
    }
}

fn start(a: Options, b: Options, role: Role) -> (Runtime, Endpoint, Endpoint, Session, Session) {
    let runtime = Runtime::new(2).unwrap();
    let (a, b, (one, two)) = runtime.block_on(async {
        let (a, b) = pair(a, b);
        let sessions = session(&a, &b, request(role)).await;
        (a, b, sessions)
    });
    (runtime, a, b, one, two)
}

fn finish(one: &Session, two: &Session) {
    thread::scope(|scope| {
        scope.spawn(|| one.close_blocking().unwrap());
        two.close_blocking().unwrap();
    });
}

#[test]
fn what_two_threads_push_arrives_whole() {
    for compression in [Compression::Off, Compression::Level(1), Compression::Adaptive] {
        let (_runtime, _a, _b, one, two) = start(
            Options {
                compression,
                ..options()
            },
            options(),
            Role::Push,
        );
        let memory = Memory::default();
        let receiving = two.receive_into(Box::new(memory.clone()));
        let pages = (64 << 20) / PAGE_SIZE as u64;
        let sender = one.page_sender();
        thread::scope(|scope| {
            for half in 0..2 {
                let mut sender = sender.clone();
                scope.spawn(move || write(&mut sender, half * pages / 2, pages / 2, 1));
            }
        });
        let stats = sender.finish_round().unwrap();
        assert_eq!(stats.pages + stats.zero_pages, pages);
        assert_eq!(stats.zero_pages, pages.div_ceil(3));
        assert_eq!(stats.raw_bytes, stats.pages * PAGE_SIZE as u64);
        if compression == Compression::Level(1) {
            assert!(stats.wire_bytes < stats.raw_bytes * 3 / 4, "{stats:?}");
        }
        // After the barrier everything is there, before anything is closed.
        assert_pages(&memory, pages, |_| 1);
        finish(&one, &two);
        let (_, received, result) = receiving.finished_blocking();
        result.unwrap();
        assert_eq!(received.pages, stats.pages);
        assert_eq!(one.failure().map(|error| error.to_string()), None);
    }
}

#[test]
fn a_later_round_replaces_pages_also_as_differences() {
    for delta_pages in [0, 1000, 1 << 14] {
        let limits = Limits {
            delta_pages,
            ..Limits::default()
        };
        let options = || Options { limits, ..options() };
        let (_runtime, _a, _b, one, two) = start(options(), options(), Role::Migrate);
        let memory = Memory::default();
        let _receiving = two.receive_into(Box::new(memory.clone()));
        let mut sender = one.page_sender();
        write(&mut sender, 0, 4000, 1);
        let first = sender.finish_round().unwrap();
        write(&mut sender, 1000, 1000, 2);
        // The same again: differences are nothing then.
        write(&mut sender, 2000, 1000, 1);
        let second = sender.finish_round().unwrap();
        assert_pages(
            &memory,
            4000,
            |number| if (1000..2000).contains(&number) { 2 } else { 1 },
        );
        if delta_pages > 4000 {
            assert!(second.wire_bytes < first.wire_bytes / 3, "{first:?} {second:?}");
        }
        finish(&one, &two);
    }
}

#[test]
fn messages_and_blobs_keep_their_order_in_both_directions() {
    let (_runtime, _a, _b, one, two) = start(options(), options(), Role::Migrate);
    let image: Vec<u8> = (0..9 << 20).map(|index| (index / 1000) as u8).collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            one.send_message_blocking(b"begin".to_vec()).unwrap();
            one.send_blob_blocking("pages-1.img", image.clone()).unwrap();
            one.send_blob_blocking("empty.img", vec![]).unwrap();
            one.send_message_blocking(b"all there".to_vec()).unwrap();
            assert_eq!(
                one.recv_blocking().unwrap(),
                Some(Received::Message(b"thanks"[..].into()))
            );
            one.close_blocking().unwrap();
        });
        assert_eq!(
            two.recv_blocking().unwrap(),
            Some(Received::Message(b"begin"[..].into()))
        );
        assert_eq!(two.recv_message_blocking().unwrap().unwrap(), b"all there"[..]);
        let blobs = two.take_blobs();
        assert_eq!(
            blobs
                .iter()
                .map(|(name, bytes)| (&name[..], bytes.len()))
                .collect::<Vec<_>>(),
            [("pages-1.img", image.len()), ("empty.img", 0)]
        );
        assert_eq!(blobs[0].1, image);
        two.send_message_blocking(b"thanks".to_vec()).unwrap();
        assert_eq!(two.recv_blocking().unwrap(), None);
        two.close_blocking().unwrap();
    });
}

#[test]
fn what_is_too_large_is_refused_where_it_is_sent() {
    let limits = Limits {
        blob_bytes: 1 << 20,
        ..Limits::default()
    };
    let (_runtime, _a, _b, one, two) = start(options(), Options { limits, ..options() }, Role::Migrate);
    assert!(matches!(
        one.send_blob_blocking("big", vec![0; 2 << 20]),
        Err(Error::Unsendable(_))
    ));
    assert!(matches!(
        one.send_message_blocking(vec![0; 17 << 20]),
        Err(Error::Unsendable(_))
    ));
    // The session goes on.
    one.send_message_blocking(b"small".to_vec()).unwrap();
    assert!(two.recv_blocking().unwrap().is_some());
}

#[test]
fn a_slow_sink_blocks_the_sender_and_bounds_what_is_held() {
    let limits = Limits {
        batch_window: 4,
        batch_bytes: 1 << 20,
        ..Limits::default()
    };
    let options = || Options {
        limits,
        compression: Compression::Off,
        ..options()
    };
    let (_runtime, _a, _b, one, two) = start(options(), options(), Role::Push);
    let memory = Memory::default();
    let _receiving = two.receive_into(Box::new(memory.clone()));
    let closed = memory.gate.lock().unwrap();
    let (progress, progressed) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        let sender = one.page_sender();
        scope.spawn(move || {
            let mut sender = sender;
            let random: Vec<u8> = (0..256).flat_map(|number| page(number * 3 + 1, 0)).collect();
            for batch in 0..32 {
                let run = PageRun {
                    start: batch << 20,
                    pages: 256,
                };
                sender.write_pages(OBJECT, run, &random).unwrap();
                progress.send(batch).unwrap();
            }
            sender.finish_round().unwrap();
        });
        // 4 in the window, 1 being collected: the write of the sixth batch pushes the fifth out and blocks.
        while progressed
            .recv_timeout(Duration::from_millis(1500))
            .is_ok_and(|batch| batch < 5)
        {}
        assert!(progressed.try_recv().is_err(), "the sender went on without room");
        drop(closed);
    });
    assert_eq!(memory.pages.lock().unwrap().len(), 32 * 256);
}

#[test]
fn a_broken_connection_is_resumed_and_nothing_is_lost() {
    let small = Limits {
        batch_window: 8,
        ..Limits::default()
    };
    let options = || Options {
        limits: small,
        batch_bytes: 64 << 10,
        ..options()
    };
    let (_runtime, _a, _b, one, two) = start(options(), options(), Role::Migrate);
    let memory = Memory::default();
    let _receiving = two.receive_into(Box::new(memory.clone()));
    thread::scope(|scope| {
        let mut sender = one.page_sender();
        let (one, two) = (&one, &two);
        scope.spawn(move || {
            for part in 0..20 {
                write(&mut sender, part * 200, 200, 5);
                one.send_blob_blocking("part", vec![part as u8; 100_000]).unwrap();
                one.send_message_blocking(vec![part as u8]).unwrap();
                if part % 4 == 1 {
                    one.break_connection();
                }
                if part % 4 == 3 {
                    two.break_connection();
                }
            }
            sender.finish_round().unwrap();
            one.close_blocking().unwrap();
        });
        for part in 0..20_u8 {
            let blob = Received::Blob {
                name: "part".into(),
                bytes: vec![part; 100_000].into(),
            };
            assert_eq!(two.recv_blocking().unwrap(), Some(blob));
            assert_eq!(two.recv_blocking().unwrap(), Some(Received::Message(vec![part].into())));
        }
        assert_eq!(two.recv_blocking().unwrap(), None);
        two.close_blocking().unwrap();
    });
    assert_pages(&memory, 4000, |_| 5);
}

#[test]
fn a_session_survives_the_end_of_the_endpoint_that_dialled() {
    let runtime = Runtime::new(2).unwrap();
    let (one, two) = (identity(), identity());
    let bind = |identity, trusted, options| {
        Endpoint::bind(
            "127.0.0.1:0".parse().unwrap(),
            &credentials(identity, &[trusted]),
            options,
        )
        .unwrap()
    };
    let no_redial = || Options {
        redial: false,
        batch_bytes: 64 << 10,
        ..options()
    };
    let (a, b, (sending, receiving)) = runtime.block_on(async {
        let (a, b) = (bind(&one, &two, no_redial()), bind(&two, &one, options()));
        let sessions = session(&a, &b, request(Role::Push)).await;
        (a, b, sessions)
    });
    let memory = Memory::default();
    let _handle = receiving.receive_into(Box::new(memory.clone()));
    let mut sender = sending.page_sender();
    write(&mut sender, 0, 500, 3);
    runtime.block_on(a.close());
    // Goes on collecting and encoding meanwhile.
    write(&mut sender, 500, 500, 3);
    runtime.block_on(async {
        let again = bind(&one, &two, no_redial());
        let connection = again.connect(b.local_address().unwrap()).await.unwrap();
        sending.resume(connection).await.unwrap();
    });
    sender.finish_round().unwrap();
    assert_pages(&memory, 1000, |_| 3);
    finish(&sending, &receiving);
}

#[test]
fn a_session_that_is_not_resumed_fails_for_everybody() {
    let options = || Options {
        resume_timeout: Duration::from_millis(200),
        redial: false,
        ..options()
    };
    let (_runtime, _a, _b, one, two) = start(options(), options(), Role::Push);
    let receiving = two.receive_into(Box::new(Memory::default()));
    let mut sender = one.page_sender();
    one.break_connection();
    let first = sender.finish_round();
    write(&mut sender, 0, 10, 1);
    let second = sender.finish_round().unwrap_err();
    // Nothing was outstanding in the first round.
    assert!(first.is_ok() || matches!(first, Err(Error::SessionLost { .. })));
    assert!(matches!(second, Error::SessionLost { .. }), "{second:?}");
    let run = PageRun { start: 0, pages: 600 };
    let late = sender.write_pages(OBJECT, run, &vec![1; 600 * PAGE_SIZE]).unwrap_err();
    assert_eq!(late.to_string(), second.to_string(), "the error stays");
    assert!(matches!(
        receiving.finished_blocking().2,
        Err(Error::SessionLost { .. })
    ));
}

struct Full;

impl PageSink for Full {
    fn write_pages(&mut self, _: MemoryObject, _: PageRun, _: &[u8]) -> std::io::Result<()> {
        Err(std::io::Error::other("no space left"))
    }
    fn zero_pages(&mut self, _: MemoryObject, _: PageRun) -> std::io::Result<()> {
        Ok(())
    }
    fn parent_pages(&mut self, _: MemoryObject, _: PageRun) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_sink_that_fails_fails_the_sender_with_its_reason() {
    let (_runtime, _a, _b, one, two) = start(options(), options(), Role::Push);
    let receiving = two.receive_into(Box::new(Full));
    let mut sender = one.page_sender();
    write(&mut sender, 0, 10, 1);
    let Err(Error::PeerFailed { reason }) = sender.finish_round() else {
        panic!("the peer failed")
    };
    assert!(
        reason.contains("no space left") && reason.contains("Task(42)"),
        "{reason}"
    );
    assert!(matches!(receiving.finished_blocking().2, Err(Error::Sink(_))));
}

#[test]
fn dropping_a_session_is_heard_by_the_peer() {
    let (_runtime, _a, _b, one, two) = start(options(), options(), Role::Migrate);
    drop(one);
    assert!(matches!(two.recv_blocking(), Err(Error::PeerFailed { .. })));
}

#[test]
fn a_refusal_comes_with_its_reason() {
    let runtime = Runtime::new(2).unwrap();
    runtime.block_on(async {
        let (a, b) = pair(options(), options());
        let address = b.local_address().unwrap();
        let dial = async { a.connect(address).await.unwrap().open(request(Role::Push)).await };
        let answer = async {
            b.accept()
                .await
                .unwrap()
                .unwrap()
                .refuse(RefusalCode::Busy, "no room")
                .await
        };
        let (result, ()) = tokio::join!(dial, answer);
        let error = result.unwrap_err();
        assert!(matches!(&error, Error::Refused { code: RefusalCode::Busy, reason, .. } if reason == "no room"));
    });
}

#[test]
fn hosts_that_do_not_trust_each_other_both_hear_what_would_allow_it() {
    let runtime = Runtime::new(2).unwrap();
    runtime.block_on(async {
        let (one, two) = (identity(), identity());
        let bind = |credentials| Endpoint::bind("127.0.0.1:0".parse().unwrap(), &credentials, options()).unwrap();
        // The server does not know the client.
        let (a, b) = (bind(credentials(&one, &[&two])), bind(credentials(&two, &[])));
        let address = b.local_address().unwrap();
        let (dialled, accepted) = tokio::join!(a.connect(address), b.accept());
        let (dialled, accepted) = (dialled.unwrap_err(), accepted.unwrap().unwrap_err());
        let command = format!("`whimbrel trust {} NAME`", one.fingerprint());
        assert!(matches!(dialled, Error::RefusedByPeer { fingerprint, .. } if fingerprint == one.fingerprint()));
        assert!(matches!(accepted, Error::UnknownPeer { fingerprint, .. } if fingerprint == one.fingerprint()));
        assert!(dialled.to_string().contains(&command) && accepted.to_string().contains(&command));
        // The client does not know the server.
        let (a, b) = (bind(credentials(&one, &[])), bind(credentials(&two, &[&one])));
        let address = b.local_address().unwrap();
        let (dialled, accepted) = tokio::join!(a.connect(address), b.accept());
        let (dialled, accepted) = (dialled.unwrap_err(), accepted.unwrap().unwrap_err());
        assert!(matches!(dialled, Error::UnknownPeer { fingerprint, .. } if fingerprint == two.fingerprint()));
        assert!(matches!(accepted, Error::RefusedByPeer { fingerprint, .. } if fingerprint == two.fingerprint()));
    });
}

#[test]
fn a_host_trusts_itself() {
    let runtime = Runtime::new(2).unwrap();
    runtime.block_on(async {
        let one = identity();
        let bind = || Endpoint::bind("127.0.0.1:0".parse().unwrap(), &credentials(&one, &[]), options()).unwrap();
        let (a, b) = (bind(), bind());
        let (sending, receiving) = session(&a, &b, request(Role::Migrate)).await;
        assert_eq!(sending.peer().fingerprint, receiving.peer().fingerprint);
    });
}

#[test]
fn trust_from_a_file_counts_at_once() {
    use whimbrel_page_server::{
        peers::Peers,
        transport::{Credentials, Trust},
    };
    let runtime = Runtime::new(2).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("peers");
    runtime.block_on(async {
        let (one, two) = (identity(), identity());
        let by_file = Credentials::Pinned {
            identity: two.clone(),
            trust: Trust::File(path.clone()),
        };
        let bind = |credentials| Endpoint::bind("127.0.0.1:0".parse().unwrap(), &credentials, options()).unwrap();
        let (a, b) = (bind(credentials(&one, &[&two])), bind(by_file));
        assert!(a.connect(b.local_address().unwrap()).await.is_err());
        assert!(b.accept().await.unwrap().is_err());
        let mut peers = Peers::load(&path).unwrap();
        peers.add(one.fingerprint(), "one").unwrap();
        peers.save().unwrap();
        let (_sending, receiving) = session(&a, &b, request(Role::Push)).await;
        assert_eq!(receiving.peer().name.as_deref(), Some("one"));
    });
}

#[test]
fn shared_state_is_not_kept_alive_by_a_peer() {
    // A session whose handles are gone ends its threads: the sink comes back.
    let (_runtime, _a, _b, one, two) = start(options(), options(), Role::Push);
    let marker = Arc::new(());
    struct Marked(#[allow(dead_code)] Arc<()>);
    impl PageSink for Marked {
        fn write_pages(&mut self, _: MemoryObject, _: PageRun, _: &[u8]) -> std::io::Result<()> {
            Ok(())
        }
        fn zero_pages(&mut self, _: MemoryObject, _: PageRun) -> std::io::Result<()> {
            Ok(())
        }
        fn parent_pages(&mut self, _: MemoryObject, _: PageRun) -> std::io::Result<()> {
            Ok(())
        }
    }
    let receiving = two.receive_into(Box::new(Marked(marker.clone())));
    drop(two);
    let (sink, _, result) = receiving.finished_blocking();
    assert!(result.is_err());
    drop(sink);
    assert_eq!(Arc::strong_count(&marker), 1);
    drop(one);
}

#[test]
fn certificates_of_an_authority_work_and_others_do_not() {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use whimbrel_page_server::transport::{Credentials, TlsFiles};
    let directory = tempfile::tempdir().unwrap();
    let authority = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(vec![]).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let path = directory.path().join(name);
        std::fs::write(&path, parameters.self_signed(&key).unwrap().pem()).unwrap();
        (path, Issuer::new(parameters, key))
    };
    let ((good_path, good), (_, bad)) = (authority("good"), authority("bad"));
    let host = |name: &str, issuer: &Issuer<'_, KeyPair>, names: &[&str], verify_name| {
        let key = KeyPair::generate().unwrap();
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, issuer).unwrap();
        let (cert, key_path) = (
            directory.path().join(format!("{name}.crt")),
            directory.path().join(format!("{name}.key")),
        );
        std::fs::write(&cert, certificate.pem()).unwrap();
        std::fs::write(&key_path, key.serialize_pem()).unwrap();
        let files = TlsFiles {
            cacert: good_path.clone(),
            cacrl: None,
            cert,
            key: key_path,
            verify_name,
        };
        Endpoint::bind(
            "127.0.0.1:0".parse().unwrap(),
            &Credentials::Authority(files),
            options(),
        )
        .unwrap()
    };
    let runtime = Runtime::new(2).unwrap();
    runtime.block_on(async {
        let server = host("server", &good, &["127.0.0.1", "db.example"], true);
        let address = server.local_address().unwrap();
        let client = host("client", &good, &["client.example"], true);
        session(&client, &server, request(Role::Migrate)).await;
        assert!(client.connect_named(address, Some("db.example")).await.is_ok());
        assert!(
            client.connect_named(address, Some("other.example")).await.is_err(),
            "wrong name"
        );
        let lenient = host("lenient", &good, &["x.example"], false);
        assert!(lenient.connect_named(address, Some("other.example")).await.is_ok());
        let stranger = host("stranger", &bad, &["127.0.0.1"], true);
        assert!(stranger.connect(address).await.is_err(), "client of another authority");
        assert!(
            client.connect(stranger.local_address().unwrap()).await.is_err(),
            "server of another authority"
        );
    });
}
