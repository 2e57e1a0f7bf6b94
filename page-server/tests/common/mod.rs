//! What the end-to-end tests share: hosts on the loopback interface, pages in a map.
#![allow(dead_code, missing_docs)]

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink, PageSource, PageState};
use whimbrel_page_server::{
    identity::Identity,
    peers::{Peer, Peers},
    proto::{Role, SessionId},
    transport::{Credentials, Endpoint, Options, Session, SessionRequest, Trust},
};

pub const OBJECT: MemoryObject = MemoryObject::Task(42);

type Pages = HashMap<(MemoryObject, u64), Vec<u8>>;

/// Pages in a map; zero and parent pages as empty and one-byte vectors.
#[derive(Clone, Default)]
pub struct Memory {
    pub pages: Arc<Mutex<Pages>>,
    /// While this is locked, nothing can be written.
    pub gate: Arc<Mutex<()>>,
}

impl PageSink for Memory {
    fn write_pages(&mut self, object: MemoryObject, run: PageRun, data: &[u8]) -> io::Result<()> {
        drop(self.gate.lock().unwrap());
        let mut pages = self.pages.lock().unwrap();
        for (index, page) in data.chunks(PAGE_SIZE).enumerate() {
            pages.insert((object, run.start + (index * PAGE_SIZE) as u64), page.to_vec());
        }
        Ok(())
    }

    fn zeros(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        self.zero_pages(object, run)
    }

    fn zero_pages(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        let mut pages = self.pages.lock().unwrap();
        (0..run.pages).for_each(|page| drop(pages.insert((object, run.start + page * PAGE_SIZE as u64), vec![])));
        Ok(())
    }

    fn parent_pages(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        let mut pages = self.pages.lock().unwrap();
        (0..run.pages).for_each(|page| drop(pages.insert((object, run.start + page * PAGE_SIZE as u64), vec![0])));
        Ok(())
    }
}

impl PageSource for Memory {
    fn read_pages(&self, object: MemoryObject, run: PageRun, buffer: &mut [u8]) -> io::Result<Vec<PageState>> {
        if object == MemoryObject::Shmem(0) {
            return Err(io::Error::other("no such segment"));
        }
        let pages = self.pages.lock().unwrap();
        let state = |(index, slot): (u64, &mut [u8])| match pages.get(&(object, run.start + index * 4096)) {
            None => PageState::Unknown,
            Some(page) if page.is_empty() => PageState::Zero,
            Some(page) => {
                slot.copy_from_slice(page);
                PageState::Data
            }
        };
        Ok((0..).zip(buffer.chunks_mut(PAGE_SIZE)).map(state).collect())
    }
}

pub fn options() -> Options {
    Options {
        workers: 2,
        resume_timeout: Duration::from_secs(20),
        ..Options::default()
    }
}

pub fn identity() -> Identity {
    Identity::generate().unwrap()
}

pub fn credentials(identity: &Identity, trusted: &[&Identity]) -> Credentials {
    let peer = |(index, identity): (usize, &&Identity)| Peer {
        fingerprint: identity.fingerprint(),
        name: format!("host{index}"),
    };
    let trust = Trust::List(Peers::in_memory(trusted.iter().enumerate().map(peer)));
    Credentials::Pinned {
        identity: identity.clone(),
        trust,
    }
}

/// Two endpoints that trust each other.
pub fn pair(a: Options, b: Options) -> (Endpoint, Endpoint) {
    let (one, two) = (identity(), identity());
    let bind = |credentials, options| Endpoint::bind("127.0.0.1:0".parse().unwrap(), &credentials, options).unwrap();
    (bind(credentials(&one, &[&two]), a), bind(credentials(&two, &[&one]), b))
}

pub fn request(role: Role) -> SessionRequest {
    SessionRequest {
        role,
        session_id: SessionId::random(),
    }
}

/// A session from `a` to `b`, both ends.
pub async fn session(a: &Endpoint, b: &Endpoint, request: SessionRequest) -> (Session, Session) {
    let address = b.local_address().unwrap();
    let dial = async { a.connect(address).await.unwrap().open(request).await.unwrap() };
    let accept = async { b.accept().await.unwrap().unwrap().accept().await.unwrap() };
    tokio::join!(dial, accept)
}

/// A page that is random, zero, or compressible, by its number.
pub fn page(number: u64, seed: u64) -> Vec<u8> {
    let mut state = ((number << 8) | seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    match number % 3 {
        0 => vec![0; PAGE_SIZE],
        1 => (0..PAGE_SIZE / 8).flat_map(|_| next().to_le_bytes()).collect(),
        _ => (0..PAGE_SIZE / 8)
            .flat_map(|index| ((next() & 3) | ((index as u64 / 8) << 4)).to_le_bytes())
            .collect(),
    }
}
