//! How fast pages go over the loopback interface, and how long a page fault waits meanwhile. Both ends are in this
//! process, so they share its processors.
//!
//! `cargo run --release -p whimbrel-page-server --example throughput [MEGABYTES [adaptive|off|LEVEL]]`

use std::{
    error::Error,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink, PageSource, PageState};
use whimbrel_page_server::{
    identity::Identity,
    peers::Peers,
    proto::{Role, SessionId},
    transport::{
        Compression, Credentials, Endpoint, FaultClient, FaultServer, Options, Runtime, Session, SessionRequest, Trust,
    },
};

const OBJECT: MemoryObject = MemoryObject::Task(1);

/// Takes pages and forgets them.
struct Null;

impl PageSink for Null {
    fn write_pages(&mut self, _: MemoryObject, _: PageRun, data: &[u8]) -> io::Result<()> {
        std::hint::black_box(data);
        Ok(())
    }

    fn zero_pages(&mut self, _: MemoryObject, _: PageRun) -> io::Result<()> {
        Ok(())
    }

    fn parent_pages(&mut self, _: MemoryObject, _: PageRun) -> io::Result<()> {
        Ok(())
    }
}

/// Gives pages that hold their address.
struct Addresses;

impl PageSource for Addresses {
    fn read_pages(&self, _: MemoryObject, run: PageRun, buffer: &mut [u8]) -> io::Result<Vec<PageState>> {
        for (page, bytes) in (0..).zip(buffer.chunks_mut(PAGE_SIZE)) {
            bytes.fill((run.start / PAGE_SIZE as u64 + page) as u8 | 1);
        }
        Ok(vec![PageState::Data; run.pages as usize])
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let megabytes: u64 = arguments.next().map_or(Ok(2048), |text| text.parse())?;
    let compression = match arguments.next().as_deref() {
        None | Some("adaptive") => Compression::Adaptive,
        Some("off") => Compression::Off,
        Some(level) => Compression::Level(level.parse()?),
    };
    let runtime = Runtime::new(2)?;
    let (sending, receiving, client, endpoints) = runtime.block_on(connect(compression))?;
    let handle = receiving.receive_into(Box::new(Null));

    for (what, data) in [
        ("random", random()),
        ("half zero pages", half_zero()),
        ("text-like", text()),
    ] {
        let elapsed = push(&sending, &data, megabytes, &AtomicBool::new(false))?;
        println!(
            "push, {what:15} {:7.0} MB/s",
            (megabytes << 20) as f64 / 1e6 / elapsed.as_secs_f64()
        );
    }

    report("faults, no bulk", measure_faults(&client, 2000)?);
    let stop = AtomicBool::new(false);
    let data = random();
    let during = thread::scope(|scope| {
        let pushing = scope.spawn(|| push(&sending, &data, u64::MAX >> 20, &stop).map_err(|error| error.to_string()));
        thread::sleep(Duration::from_millis(300));
        let during = measure_faults(&client, 2000);
        stop.store(true, Relaxed);
        pushing.join().expect("does not panic").map(|_| during)
    })?;
    report("faults, bulk on", during?);

    client.close();
    thread::scope(|scope| {
        scope.spawn(|| sending.close_blocking());
        receiving.close_blocking()
    })?;
    handle.finished_blocking().2?;
    drop(endpoints);
    Ok(())
}

type Ends = (Session, Session, FaultClient, (Endpoint, Endpoint));

async fn connect(compression: Compression) -> Result<Ends, Box<dyn Error>> {
    let credentials = Credentials::Pinned {
        identity: Identity::generate()?,
        trust: Trust::List(Peers::default()),
    };
    let options = Options {
        compression,
        ..Options::default()
    };
    let a = Endpoint::bind("127.0.0.1:0".parse()?, &credentials, options.clone())?;
    let b = Endpoint::bind("127.0.0.1:0".parse()?, &credentials, options)?;
    let address = b.local_address()?;
    let session_id = SessionId::random();
    let dial = async {
        a.connect(address)
            .await?
            .open(SessionRequest {
                role: Role::Migrate,
                session_id,
            })
            .await
    };
    let accept = async { b.accept().await.expect("open")?.accept().await };
    let (sending, receiving) = tokio::try_join!(dial, accept)?;
    let role = Role::Faults { initiator_serves: true };
    let dial = async {
        a.connect(address)
            .await?
            .open_faults(SessionRequest { role, session_id })
            .await
    };
    let accept = async { b.accept().await.expect("open")?.accept_faults().await };
    let (serving, asking) = tokio::try_join!(dial, accept)?;
    tokio::spawn(async move { FaultServer::new(Arc::new(Addresses), None).serve(serving).await });
    Ok((sending, receiving, FaultClient::new(asking)?, (a, b)))
}

fn push(session: &Session, data: &[u8], megabytes: u64, stop: &AtomicBool) -> Result<Duration, Box<dyn Error>> {
    let mut sender = session.page_sender();
    let begun = Instant::now();
    for batch in 0..megabytes {
        if stop.load(Relaxed) {
            break;
        }
        sender.write_pages(
            OBJECT,
            PageRun {
                start: batch << 20,
                pages: 256,
            },
            data,
        )?;
    }
    let stats = sender.finish_round()?;
    if let Some(path) = session.path_stats() {
        println!("      {path:?}");
    }
    let ratio = stats.wire_bytes as f64 / stats.raw_bytes.max(1) as f64;
    println!(
        "      {} data pages, {} zero pages, wire/raw {ratio:.2}",
        stats.pages, stats.zero_pages
    );
    Ok(begun.elapsed())
}

fn measure_faults(client: &FaultClient, count: u64) -> Result<Vec<Duration>, Box<dyn Error>> {
    let fault = |index: u64| {
        let begun = Instant::now();
        client
            .request_blocking(
                OBJECT,
                PageRun {
                    start: index << 12,
                    pages: 1,
                },
                true,
            )
            .map(|_| begun.elapsed())
    };
    let mut latencies = (0..count).map(fault).collect::<Result<Vec<_>, _>>()?;
    latencies.sort();
    Ok(latencies)
}

fn report(what: &str, latencies: Vec<Duration>) {
    let at = |percent: usize| latencies[(latencies.len() - 1) * percent / 100];
    println!(
        "{what}: p50 {:?}, p90 {:?}, p99 {:?}, max {:?}",
        at(50),
        at(90),
        at(99),
        at(100)
    );
}

fn random() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..1 << 17).flat_map(|_| next().to_le_bytes()).collect()
}

fn half_zero() -> Vec<u8> {
    let mut data = random();
    data.chunks_mut(2 * PAGE_SIZE)
        .for_each(|pair| pair[..PAGE_SIZE].fill(0));
    data
}

fn text() -> Vec<u8> {
    random()
        .chunks(2)
        .flat_map(|pair| [b'a' + pair[0] % 16, b' '])
        .collect()
}
