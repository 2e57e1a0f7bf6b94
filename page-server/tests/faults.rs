//! Page requests and the ready page server, end to end over QUIC on the loopback interface.
#![allow(missing_docs)]

mod common;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
};

use common::{Memory, OBJECT, options, page, pair, request, session};
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink, PageSource, PageState};
use whimbrel_page_server::{
    proto::{Role, SessionId},
    server::{Config, PageServer, PushFactory, PushHandler, PushInfo},
    transport::{
        DirectRuntime, Endpoint, Error, FaultClient, FaultLink, FaultServer, ReceiveStats, Runtime, SessionRequest,
    },
};

const PAGES: u64 = 3000;

fn source() -> Arc<Memory> {
    let mut memory = Memory::default();
    for number in 0..PAGES {
        let run = PageRun {
            start: number * PAGE_SIZE as u64,
            pages: 1,
        };
        match number % 3 {
            0 => memory.zero_pages(OBJECT, run).unwrap(),
            _ => memory.write_pages(OBJECT, run, &page(number, 1)).unwrap(),
        }
    }
    Arc::new(memory)
}

/// A connection on which the side that dialled serves, as in a migration.
async fn link(a: &Endpoint, b: &Endpoint, session_id: SessionId) -> (FaultLink, FaultLink) {
    let request = SessionRequest {
        role: Role::Faults { initiator_serves: true },
        session_id,
    };
    let address = b.local_address().unwrap();
    let dial = async { a.connect(address).await.unwrap().open_faults(request).await.unwrap() };
    let accept = async { b.accept().await.unwrap().unwrap().accept_faults().await.unwrap() };
    tokio::join!(dial, accept)
}

fn run(start: u64, pages: u64) -> PageRun {
    PageRun {
        start: start * PAGE_SIZE as u64,
        pages,
    }
}

fn assert_reply(first: u64, states: &[PageState], data: &[u8]) {
    for ((number, state), bytes) in (first..).zip(states).zip(data.chunks(PAGE_SIZE)) {
        let expected = match number {
            PAGES.. => PageState::Unknown,
            _ if number % 3 == 0 => PageState::Zero,
            _ => PageState::Data,
        };
        assert_eq!(*state, expected, "page {number}");
        assert!(number >= PAGES || bytes == page(number, 1), "page {number}");
    }
}

#[test]
fn faults_are_answered_while_bulk_is_under_way() {
    let runtime = Runtime::new(2).unwrap();
    let (_a, _b, (one, two), client) = runtime.block_on(async {
        let (a, b) = pair(options(), options());
        let sessions = session(&a, &b, request(Role::Migrate)).await;
        let (serving, asking) = link(&a, &b, sessions.0.request().session_id).await;
        assert!(serving.serves() && !asking.serves());
        let server = FaultServer::new(source(), Some(1));
        tokio::spawn(async move { server.serve(serving).await });
        (a, b, sessions, FaultClient::new(asking).unwrap())
    });
    let _receiving = two.receive_into(Box::new(Memory::default()));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let sender = one.page_sender();
        let stop = &stop;
        scope.spawn(move || {
            let mut sender = sender;
            let random: Vec<u8> = (0..256).flat_map(|number| page(number * 3 + 1, 0)).collect();
            while !stop.load(Relaxed) {
                sender.write_pages(OBJECT, run(0, 256), &random).unwrap();
            }
            sender.finish_round().unwrap();
        });
        let threads: Vec<_> = (0..3_u64)
            .map(|thread| {
                let client = client.clone();
                scope.spawn(move || {
                    for round in 0..100 {
                        let first = (thread * 1009 + round * 31) % (PAGES + 20);
                        let reply = client
                            .request_blocking(OBJECT, run(first, round % 7 + 1), round % 2 == 0)
                            .unwrap();
                        assert_reply(first, &reply.states, &reply.data);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        stop.store(true, Relaxed);
    });
    let mut all = vec![0; (PAGES as usize + 10) * PAGE_SIZE];
    let states = client.read_pages(OBJECT, run(0, PAGES + 10), &mut all).unwrap();
    assert_reply(0, &states, &all);
}

#[test]
fn an_error_of_the_source_reaches_the_client_and_bad_requests_are_not_sent() {
    let runtime = Runtime::new(2).unwrap();
    runtime.block_on(async {
        let (a, b) = pair(options(), options());
        let (serving, asking) = link(&a, &b, SessionId::random()).await;
        tokio::spawn(async move { FaultServer::new(source(), None).serve(serving).await });
        let client = FaultClient::new(asking).unwrap();
        let error = client
            .request(MemoryObject::Shmem(0), run(0, 1), true)
            .await
            .unwrap_err();
        assert!(matches!(&error, Error::PagesRefused { reason, .. } if reason.contains("no such segment")));
        for bad in [
            run(0, 0),
            run(0, 1025),
            PageRun { start: 1, pages: 1 },
            PageRun {
                start: u64::MAX - 4095,
                pages: 2,
            },
        ] {
            assert!(matches!(
                client.request(OBJECT, bad, false).await,
                Err(Error::BadRequest { .. })
            ));
        }
        assert_reply(1, &client.request(OBJECT, run(1, 1), true).await.unwrap().states, &[]);
    });
}

#[test]
fn requests_wait_for_the_next_connection_and_are_asked_again() {
    let runtime = Runtime::new(2).unwrap();
    runtime.block_on(async {
        let (a, b) = pair(options(), options());
        let id = SessionId::random();
        let (serving, asking) = link(&a, &b, id).await;
        let client = FaultClient::new(asking).unwrap();
        // The source goes away without having answered.
        let waiting: Vec<_> = (0..5)
            .map(|number| {
                let client = client.clone();
                tokio::spawn(async move { (number, client.request(OBJECT, run(number, 9), number % 2 == 0).await) })
            })
            .collect();
        drop(serving);
        assert!(client.disconnected().await);
        assert!(!client.is_connected());
        assert!(waiting.iter().all(|task| !task.is_finished()));
        let (serving, asking) = link(&a, &b, id).await;
        let server = FaultServer::new(source(), None);
        let served = tokio::spawn(async move { server.serve(serving).await });
        client.replace_connection(asking).unwrap();
        for task in waiting {
            let (first, reply) = task.await.unwrap();
            let reply = reply.unwrap();
            assert_reply(first, &reply.states, &reply.data);
        }
        client.close();
        served.await.unwrap().unwrap();
        assert!(matches!(
            client.request(OBJECT, run(0, 1), true).await,
            Err(Error::Cancelled)
        ));
    });
}

#[test]
fn closing_the_client_cancels_what_waits_for_a_source() {
    let runtime = Runtime::new(2).unwrap();
    let client = runtime.block_on(async {
        let (a, b) = pair(options(), options());
        let (serving, asking) = link(&a, &b, SessionId::random()).await;
        drop(serving);
        FaultClient::new(asking).unwrap()
    });
    thread::scope(|scope| {
        let waiting = scope.spawn(|| client.request_blocking(OBJECT, run(0, 1), true));
        assert!(runtime.block_on(client.disconnected()));
        client.close();
        assert!(matches!(waiting.join().unwrap(), Err(Error::Cancelled)));
    });
}

/// What was pushed: pages, blobs, and whether it was complete.
#[derive(Clone, Default)]
struct Store {
    memory: Memory,
    blobs: Arc<Mutex<Vec<(String, usize)>>>,
    finished: Arc<Mutex<Vec<bool>>>,
}

impl PushFactory for Store {
    fn open(&self, _: &PushInfo) -> io::Result<(Box<dyn PageSink>, Box<dyn PushHandler>)> {
        Ok((Box::new(self.memory.clone()), Box::new(self.clone())))
    }
}

impl PushHandler for Store {
    fn blob(&mut self, name: &str, bytes: bytes::Bytes) -> io::Result<()> {
        if name.contains('/') {
            return Err(io::Error::other("bad name"));
        }
        self.blobs.lock().unwrap().push((name.to_owned(), bytes.len()));
        Ok(())
    }

    fn finished(self: Box<Self>, _: Box<dyn PageSink>, _: ReceiveStats, result: Result<(), Error>) -> io::Result<()> {
        self.finished.lock().unwrap().push(result.is_ok());
        Ok(())
    }
}

#[test]
fn the_page_server_takes_and_gives_pages_and_ends_when_told() {
    let runtime = Runtime::new(2).unwrap();
    let (a, b) = runtime.block_on(async { pair(options(), options()) });
    let address = b.local_address().unwrap();
    let store = Store::default();
    let config = Config {
        sinks: Some(Arc::new(store.clone())),
        source: Some(source()),
        ..Config::default()
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = PageServer::new(b, config);
    let running = runtime.handle().spawn(server.run(async { drop(stopped.await) }));
    let dial = || runtime.block_on(a.connect(address)).unwrap();

    let push = runtime.block_on(dial().open(request(Role::Push))).unwrap();
    push.send_blob_blocking("inventory.img", vec![1; 1000]).unwrap();
    let mut sender = push.page_sender();
    sender.write_pages(OBJECT, run(0, 2), &[1; 2 * PAGE_SIZE]).unwrap();
    sender.parent_pages(OBJECT, run(2, 1)).unwrap();
    assert_eq!(sender.finish_round().unwrap().parent_pages, 1);
    push.close_blocking().unwrap();
    assert_eq!(*store.finished.lock().unwrap(), [true]);
    assert_eq!(*store.blobs.lock().unwrap(), [("inventory.img".to_owned(), 1000)]);
    assert_eq!(store.memory.pages.lock().unwrap().len(), 3);

    let bad = runtime.block_on(dial().open(request(Role::Push))).unwrap();
    bad.send_blob_blocking("../etc/passwd", vec![1]).unwrap();
    let told = bad.close_blocking().unwrap_err().to_string();
    assert!(told.contains("gave up"), "{told}");

    let pull = runtime.block_on(dial().open_faults(request(Role::Pull))).unwrap();
    let client = runtime.block_on(async { FaultClient::new(pull).unwrap() });
    let mut data = vec![0; 700 * PAGE_SIZE];
    let states = client.read_pages(OBJECT, run(5, 700), &mut data).unwrap();
    assert_reply(5, &states, &data);
    client.close();

    let refused = runtime.block_on(dial().open(request(Role::Migrate))).unwrap_err();
    assert!(
        refused.to_string().contains("does not take migrate sessions"),
        "{refused}"
    );
    drop(stop);
    runtime.block_on(running).unwrap().unwrap();
    assert_eq!(*store.finished.lock().unwrap(), [true, false]);
}

#[test]
fn what_one_peer_sends_has_a_socket_and_a_runtime_of_its_own_on_the_same_port() {
    let runtime = Runtime::new(2).unwrap();
    let direct = DirectRuntime::new(|| ()).unwrap();
    let (source_side, first) = runtime.block_on(async { pair(options(), options()) });
    let faults = runtime.block_on(async { source_side.another() }).unwrap();
    let port = faults.local_address().unwrap().port();
    let peer = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let own = direct.block_on(async { first.for_peer(peer) }).unwrap();
    let address = first.local_address().unwrap();
    assert_eq!(own.local_address().unwrap(), address);
    assert!(
        std::net::UdpSocket::bind(address).is_err(),
        "the port is still taken for everybody else"
    );

    // Both at once: each arrives where it belongs.
    let session_id = SessionId::random();
    let request = SessionRequest {
        role: Role::Faults { initiator_serves: true },
        session_id,
    };
    let memory = source();
    for endpoint in [&faults, &source_side] {
        let (endpoint, memory) = (endpoint.clone(), memory.clone());
        runtime.handle().spawn(async move {
            let link = endpoint
                .connect(address)
                .await
                .unwrap()
                .open_faults(request)
                .await
                .unwrap();
            FaultServer::new(memory, None).reading_at_once().serve(link).await
        });
    }
    let accept =
        |endpoint: Endpoint| async move { endpoint.accept().await.unwrap().unwrap().accept_faults().await.unwrap() };
    let urgent = direct.block_on(accept(own.clone()));
    let bulk = runtime.block_on(accept(first.clone()));
    assert_eq!(urgent.peer().address, peer);
    assert_eq!(bulk.peer().address.port(), source_side.local_address().unwrap().port());

    let client = FaultClient::direct(urgent, &direct).unwrap();
    // Several threads at once, each of which may drive for all of them.
    thread::scope(|scope| {
        for part in 0..3 {
            let client = &client;
            scope.spawn(move || {
                for number in 0..200 {
                    let first = part * 200 + number;
                    let reply = client.request_blocking(OBJECT, run(first, 1), true).unwrap();
                    assert_reply(first, &reply.states, &reply.data);
                }
            });
        }
    });
    client.close();
}
