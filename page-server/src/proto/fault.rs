//! Page requests and their replies, one of each on a stream of its own.
//!
//! ```text
//! request   0 object kind u8 │ 1 flags u8 (1: urgent) │ 2 zero u16 │ 4 object id u32 │ 8 start u64 │ 16 pages u32
//! reply     0 status u8      │ 1 codec u8 (0 raw, 1 zstd) │ 2 zero u16 │ 4 pages u32 │ 8 data bytes u32
//!           12 xxh3-64 of states and data │ 20 states, one u8 a page │ data of the pages whose state is Data
//!           status 1: refused; from 4 on the reason as UTF-8
//! ```

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageState};
use xxhash_rust::xxh3::Xxh3;

use super::ProtocolError;

/// Most pages that one request may ask for.
pub const MAX_PAGES: u64 = 1024;

/// Bytes of an encoded request.
pub const REQUEST_BYTES: usize = 20;

/// Largest encoded reply: incompressible data of [`MAX_PAGES`] pages, their states, the header.
pub const MAX_REPLY: usize = REPLY_HEADER + MAX_PAGES as usize * (PAGE_SIZE + 1);

const REPLY_HEADER: usize = 20;
const MAX_REASON: usize = 1024;

/// Asks for the pages of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// Whose pages.
    pub object: MemoryObject,
    /// Which pages; at most [`MAX_PAGES`].
    pub run: PageRun,
    /// A task waits for it: served before background requests, and not compressed.
    pub urgent: bool,
}

/// The pages of one run, in the order of their addresses.
#[derive(Clone, PartialEq, Eq)]
pub struct PageReply {
    /// What each page is.
    pub states: Vec<PageState>,
    /// The bytes of all pages; zeros where the state is `Zero`, and also where it is `Unknown`, which must not be used.
    pub data: Vec<u8>,
}

impl std::fmt::Debug for PageReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageReply")
            .field("states", &self.states)
            .finish_non_exhaustive()
    }
}

impl PageRequest {
    /// The request as bytes.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let (kind, id) = object_to_wire(self.object);
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0] = kind;
        bytes[1] = u8::from(self.urgent);
        bytes[4..8].copy_from_slice(&id.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.run.start.to_le_bytes());
        bytes[16..20].copy_from_slice(&(self.run.pages as u32).to_le_bytes());
        bytes
    }

    /// Parses a request.
    ///
    /// # Errors
    /// When it is not one, or its run is empty, unaligned, wraps or is over [`MAX_PAGES`].
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let bad = |why| ProtocolError::Fault { what: "request", why };
        let bytes: &[u8; REQUEST_BYTES] = bytes.try_into().map_err(|_| bad("its length is wrong"))?;
        let id = u32::from_le_bytes(bytes[4..8].try_into().expect("4 bytes"));
        let object = object_from_wire(bytes[0], id).ok_or(bad("its kind of object is not known"))?;
        let start = u64::from_le_bytes(bytes[8..16].try_into().expect("8 bytes"));
        let pages = u64::from(u32::from_le_bytes(bytes[16..20].try_into().expect("4 bytes")));
        let run = PageRun { start, pages };
        if pages == 0 || pages > MAX_PAGES {
            return Err(bad("its number of pages is out of bounds"));
        }
        if !is_valid_run(run) {
            return Err(bad("its run is unaligned or wraps around"));
        }
        Ok(Self {
            object,
            run,
            urgent: bytes[1] & 1 != 0,
        })
    }
}

impl PageReply {
    /// The reply as bytes; compressed with zstd at `level` if that is given and it helps.
    pub fn encode(&self, level: Option<i32>) -> Vec<u8> {
        Self::encode_pages(&self.states, &self.data, level)
    }

    /// As [`PageReply::encode`], of these states and bytes.
    pub fn encode_pages(states: &[PageState], bytes: &[u8], level: Option<i32>) -> Vec<u8> {
        let pages = states.len();
        let mut data = Vec::with_capacity(bytes.len());
        for (state, page) in states.iter().zip(bytes.chunks_exact(PAGE_SIZE)) {
            if *state == PageState::Data {
                data.extend_from_slice(page);
            }
        }
        let states: Vec<u8> = states.iter().map(|state| state_to_wire(*state)).collect();
        let checksum = reply_checksum(&states, &data);
        let data_bytes = data.len() as u32;
        let mut codec = 0;
        if let Some(level) = level
            && let Ok(packed) = zstd::bulk::compress(&data, level)
            && packed.len() < data.len()
        {
            (codec, data) = (1, packed);
        }
        let mut bytes = Vec::with_capacity(REPLY_HEADER + pages + data.len());
        bytes.extend_from_slice(&[0, codec, 0, 0]);
        bytes.extend_from_slice(&(pages as u32).to_le_bytes());
        bytes.extend_from_slice(&data_bytes.to_le_bytes());
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes.extend_from_slice(&states);
        bytes.extend_from_slice(&data);
        bytes
    }

    /// A reply that says why there are no pages.
    pub fn encode_refusal(reason: &str) -> Vec<u8> {
        let mut end = reason.len().min(MAX_REASON);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        [&[1, 0, 0, 0], &reason.as_bytes()[..end]].concat()
    }

    /// Parses the reply to a request for `pages` pages. `Ok(Err(reason))` is a refusal of the peer.
    ///
    /// # Errors
    /// When it is damaged or not the answer to the request.
    pub fn decode(bytes: &[u8], pages: u64) -> Result<Result<Self, String>, ProtocolError> {
        let bad = |why| ProtocolError::Fault { what: "reply", why };
        let (&[status, codec, _, _], rest) = bytes.split_first_chunk::<4>().ok_or(bad("it is too short"))?;
        match status {
            0 => {}
            1 if rest.len() <= MAX_REASON => return Ok(Err(String::from_utf8_lossy(rest).into_owned())),
            _ => return Err(bad("its status is not known")),
        }
        let (head, rest) = rest.split_first_chunk::<16>().ok_or(bad("it is too short"))?;
        let count = u64::from(u32::from_le_bytes(head[0..4].try_into().expect("4 bytes")));
        let data_bytes = u32::from_le_bytes(head[4..8].try_into().expect("4 bytes")) as usize;
        let checksum = u64::from_le_bytes(head[8..16].try_into().expect("8 bytes"));
        if count != pages || pages > MAX_PAGES {
            return Err(bad("it is for another number of pages"));
        }
        let (states_wire, payload) = rest.split_at_checked(pages as usize).ok_or(bad("it is too short"))?;
        let states: Option<Vec<_>> = states_wire.iter().map(|byte| state_from_wire(*byte)).collect();
        let states = states.ok_or(bad("a state is not known"))?;
        let filled = states.iter().filter(|state| **state == PageState::Data).count();
        if data_bytes != filled * PAGE_SIZE {
            return Err(bad("its length does not fit its states"));
        }
        let unpacked;
        let data = match codec {
            0 => payload,
            1 => {
                unpacked = zstd::bulk::decompress(payload, data_bytes).map_err(|_| bad("it does not decompress"))?;
                &unpacked
            }
            _ => return Err(bad("its codec is not known")),
        };
        if data.len() != data_bytes || reply_checksum(states_wire, data) != checksum {
            return Err(bad("it is damaged"));
        }
        let mut full = vec![0; pages as usize * PAGE_SIZE];
        let slots = full
            .chunks_exact_mut(PAGE_SIZE)
            .zip(&states)
            .filter(|(_, state)| **state == PageState::Data);
        for ((slot, _), page) in slots.zip(data.chunks_exact(PAGE_SIZE)) {
            slot.copy_from_slice(page);
        }
        Ok(Ok(Self { states, data: full }))
    }
}

/// Whether a run is not empty, aligned, and ends within the address space.
pub fn is_valid_run(run: PageRun) -> bool {
    let bytes = run.pages.checked_mul(PAGE_SIZE as u64);
    run.pages > 0
        && run.start.is_multiple_of(PAGE_SIZE as u64)
        && bytes.is_some_and(|bytes| run.start.checked_add(bytes).is_some())
}

/// Kind and number of an object, as all wire formats have it.
pub fn object_to_wire(object: MemoryObject) -> (u8, u32) {
    match object {
        MemoryObject::Task(pid) => (0, pid),
        MemoryObject::Shmem(id) => (1, id),
    }
}

/// The reverse of [`object_to_wire`].
pub fn object_from_wire(kind: u8, id: u32) -> Option<MemoryObject> {
    match kind {
        0 => Some(MemoryObject::Task(id)),
        1 => Some(MemoryObject::Shmem(id)),
        _ => None,
    }
}

fn state_to_wire(state: PageState) -> u8 {
    match state {
        PageState::Unknown => 0,
        PageState::Data => 1,
        PageState::Zero => 2,
    }
}

fn state_from_wire(byte: u8) -> Option<PageState> {
    [PageState::Unknown, PageState::Data, PageState::Zero]
        .get(usize::from(byte))
        .copied()
}

fn reply_checksum(states: &[u8], data: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(states);
    hash.update(data);
    hash.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_come_back_as_they_were_and_bad_runs_do_not() {
        let run = PageRun {
            start: 0x7fff_0000,
            pages: 3,
        };
        let request = PageRequest {
            object: MemoryObject::Shmem(7),
            run,
            urgent: true,
        };
        assert_eq!(PageRequest::decode(&request.encode()).unwrap(), request);
        for run in [
            PageRun { start: 1, pages: 1 },
            PageRun { start: 0, pages: 0 },
            PageRun {
                start: 0,
                pages: MAX_PAGES + 1,
            },
            PageRun {
                start: u64::MAX - 4095,
                pages: 2,
            },
        ] {
            assert!(
                PageRequest::decode(&PageRequest { run, ..request }.encode()).is_err(),
                "{run:?}"
            );
        }
    }

    #[test]
    fn replies_come_back_as_they_were() {
        use PageState::{Data, Unknown, Zero};
        let states = vec![Data, Zero, Unknown, Data];
        let mut data = vec![0; 4 * PAGE_SIZE];
        data[..PAGE_SIZE].fill(7);
        data[3 * PAGE_SIZE..].fill(9);
        let reply = PageReply { states, data };
        for level in [None, Some(1)] {
            let bytes = reply.encode(level);
            assert_eq!(PageReply::decode(&bytes, 4).unwrap().unwrap(), reply);
            assert!(PageReply::decode(&bytes, 3).is_err());
            let mut damaged = bytes.clone();
            *damaged.last_mut().unwrap() ^= 1;
            assert!(PageReply::decode(&damaged, 4).is_err());
        }
        let refusal = PageReply::encode_refusal(&"é".repeat(2000));
        assert!(PageReply::decode(&refusal, 4).unwrap().unwrap_err().starts_with('é'));
    }
}
