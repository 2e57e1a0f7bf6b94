//! The page server's transport on loopback, both ends in this process.

use std::io;
use std::time::Instant;

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink};
use whimbrel_page_server::identity::Identity;
use whimbrel_page_server::peers::Peers;
use whimbrel_page_server::proto::{Role, SessionId};
use whimbrel_page_server::transport::{Credentials, Endpoint, Options, Runtime, Session, SessionRequest, Trust};

use crate::table::Table;
use crate::{Result, Setup};

/// Bytes that one sample sends.
const BYTES: u64 = 512 << 20;
const BATCH: u64 = 1 << 20;

/// Takes pages and forgets them.
struct Nowhere;

impl PageSink for Nowhere {
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

/// Megabytes a second of memory, random and with every second page zero.
pub fn throughput(setup: &Setup, table: &mut Table) -> Result<()> {
    let runtime = Runtime::new(2)?;
    let (sending, receiving, ends) = runtime.block_on(connect())?;
    let handle = receiving.receive_into(Box::new(Nowhere));
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as u32
    };
    let random: Vec<u8> = (0..BATCH / 4).flat_map(|_| next().to_le_bytes()).collect();
    let mut half = random.clone();
    half.chunks_mut(2 * PAGE_SIZE)
        .for_each(|pair| pair[..PAGE_SIZE].fill(0));
    // Once to warm up: windows grow, and the path's MTU is found.
    push(&sending, &random)?;
    for (name, data) in [("pages of random bytes", &random), ("every second page zero", &half)] {
        let samples = (0..setup.runs)
            .map(|_| push(&sending, data))
            .collect::<Result<Vec<f64>>>()?;
        table.row(&format!("page server, {name}"), "MB/s", &samples, "", "of memory");
    }
    std::thread::scope(|scope| {
        scope.spawn(|| sending.close_blocking());
        receiving.close_blocking()
    })?;
    handle.finished_blocking().2?;
    drop(ends);
    Ok(())
}

async fn connect() -> Result<(Session, Session, (Endpoint, Endpoint))> {
    let credentials = Credentials::Pinned {
        identity: Identity::generate()?,
        trust: Trust::List(Peers::default()),
    };
    let bind = || Endpoint::bind(([127, 0, 0, 1], 0).into(), &credentials, Options::default());
    let (from, to) = (bind()?, bind()?);
    let address = to.local_address()?;
    let request = SessionRequest {
        role: Role::Migrate,
        session_id: SessionId::random(),
    };
    let dial = async { from.connect(address).await?.open(request).await };
    let accept = async { to.accept().await.expect("it is open")?.accept().await };
    let (sending, receiving) = tokio::try_join!(dial, accept)?;
    Ok((sending, receiving, (from, to)))
}

fn push(session: &Session, data: &[u8]) -> Result<f64> {
    let mut sender = session.page_sender();
    let begun = Instant::now();
    for number in 0..BYTES / BATCH {
        let run = PageRun {
            start: number * BATCH,
            pages: BATCH / PAGE_SIZE as u64,
        };
        sender.write_pages(MemoryObject::Task(1), run, data)?;
    }
    sender.finish_round()?;
    Ok(BYTES as f64 / 1e6 / begun.elapsed().as_secs_f64())
}
