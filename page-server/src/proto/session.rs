//! The bookkeeping of a session: what was sent, what is acknowledged, what arrived, and in which order it counts.
//!
//! ```text
//! sending    reserve ─▶ encoding ─▶ kept (sent, maybe again) ─▶ Applied{sequence} ─▶ forgotten
//!            └───────── at most the peer's batch_window ──────┘
//! receiving  arrived (any order, decoded) ─▶ next in sequence ─▶ being applied ─▶ applied ─▶ Applied{sequence}
//! items      sent ─▶ arrived in order ─▶ consumed by the application ─▶ Consumed{item} ─▶ forgotten by the sender
//! ```

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    Limits, ProtocolError,
    frame::MAX_MESSAGE,
    link::Received,
    wire::{self, control::Kind},
};

/// Messages and blobs that may be unconsumed at once, however small they are.
pub const MAX_ITEMS: usize = 4096;

/// Longest name of a blob in bytes.
pub const MAX_NAME: usize = 4096;

/// A message or blob on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// An opaque message of the application.
    Message(Bytes),
    /// A named byte string.
    Blob {
        /// Its name.
        name: String,
        /// Its bytes.
        bytes: Bytes,
    },
}

impl Item {
    /// Bytes that count against the window.
    pub fn size(&self) -> u64 {
        match self {
            Item::Message(body) => body.len() as u64,
            Item::Blob { name, bytes } => (name.len() + bytes.len()) as u64,
        }
    }

    /// What goes on the control stream for it.
    pub fn control(&self, item: u64) -> Kind {
        match self {
            Item::Message(body) => Kind::Message(wire::Message {
                item,
                body: body.clone(),
            }),
            Item::Blob { name, bytes } => {
                let (length, checksum) = (bytes.len() as u64, xxh3_64(bytes));
                Kind::Blob(wire::Blob {
                    item,
                    name: name.clone(),
                    length,
                    checksum,
                })
            }
        }
    }
}

#[derive(Debug)]
enum Slot {
    Complete(Item),
    Announced { name: String, length: u64, checksum: u64 },
}

impl Slot {
    fn size(&self) -> u64 {
        match self {
            Slot::Complete(item) => item.size(),
            Slot::Announced { name, length, .. } => length.saturating_add(name.len() as u64),
        }
    }
}

/// What has to be sent again on a new connection.
#[derive(Debug, Default)]
pub struct Resend {
    /// Batches with their sequence numbers.
    pub batches: Vec<(u64, Bytes)>,
    /// Items with their numbers.
    pub items: Vec<(u64, Item)>,
    /// The end of the stream of items, if it was reached.
    pub finish: Option<Kind>,
}

/// Both directions of one session. `B` is what an arrived batch is held as.
#[derive(Debug)]
pub struct SessionState<B> {
    local: Limits,
    peer: Limits,
    // Batches to the peer. `None` is reserved and still being encoded.
    reserved: u64,
    acknowledged: u64,
    acknowledged_bytes: u64,
    kept: BTreeMap<u64, Option<Bytes>>,
    // Batches from the peer.
    applied: u64,
    taken: u64,
    arrived: BTreeMap<u64, B>,
    // Items to the peer.
    sent_items: VecDeque<Item>,
    sent_bytes: u64,
    consumed_by_peer: u64,
    finished: bool,
    // Items from the peer.
    slots: VecDeque<Slot>,
    slot_bytes: u64,
    consumed: u64,
    peer_finish: Option<(u64, u64)>,
    peer_failure: Option<String>,
}

impl<B> SessionState<B> {
    /// A new session; `local` is what this side holds at most, `peer` what the other does.
    pub fn new(local: Limits, peer: Limits) -> Self {
        Self {
            local,
            peer,
            reserved: 0,
            acknowledged: 0,
            acknowledged_bytes: 0,
            kept: BTreeMap::new(),
            applied: 0,
            taken: 0,
            arrived: BTreeMap::new(),
            sent_items: VecDeque::new(),
            sent_bytes: 0,
            consumed_by_peer: 0,
            finished: false,
            slots: VecDeque::new(),
            slot_bytes: 0,
            consumed: 0,
            peer_finish: None,
            peer_failure: None,
        }
    }

    /// What the peer is willing to hold.
    pub fn peer_limits(&self) -> Limits {
        self.peer
    }

    /// Whether another batch may be under way.
    pub fn has_batch_room(&self) -> bool {
        self.reserved - self.acknowledged < u64::from(self.peer.batch_window)
    }

    /// Takes the sequence number of the next batch; `None` while the window is full.
    pub fn reserve_batch(&mut self) -> Option<u64> {
        if !self.has_batch_room() {
            return None;
        }
        self.reserved += 1;
        self.kept.insert(self.reserved, None);
        Some(self.reserved)
    }

    /// Keeps an encoded batch until it is acknowledged. The caller sends it.
    pub fn batch_encoded(&mut self, sequence: u64, bytes: Bytes) {
        if let Some(slot) = self.kept.get_mut(&sequence) {
            *slot = Some(bytes);
        }
    }

    /// Number of the last batch reserved and of the last one the peer has applied.
    pub fn batch_progress(&self) -> (u64, u64) {
        (self.reserved, self.acknowledged)
    }

    /// Encoded bytes of all batches that the peer has applied.
    pub fn acknowledged_bytes(&self) -> u64 {
        self.acknowledged_bytes
    }

    /// Whether the peer has applied every batch and consumed every item of this side.
    pub fn nothing_outstanding(&self) -> bool {
        self.reserved == self.acknowledged && self.sent_items.is_empty()
    }

    /// A batch arrived. False if it was here before (sent again after a broken connection).
    ///
    /// # Errors
    /// When it lies outside the window that the peer was granted.
    pub fn batch_arrived(&mut self, sequence: u64, batch: B) -> Result<bool, ProtocolError> {
        let last = self.applied + u64::from(self.local.batch_window);
        if sequence == 0 || sequence > last {
            let expected = format!("1 to {last} were possible");
            return Err(ProtocolError::OutOfOrder {
                what: "batch",
                number: sequence,
                expected,
            });
        }
        if sequence <= self.taken || self.arrived.contains_key(&sequence) {
            return Ok(false);
        }
        self.arrived.insert(sequence, batch);
        Ok(true)
    }

    /// Takes the batch whose turn it is, if it is here and the one before is applied.
    pub fn next_batch(&mut self) -> Option<(u64, B)> {
        if self.taken != self.applied {
            return None;
        }
        let batch = self.arrived.remove(&(self.taken + 1))?;
        self.taken += 1;
        Some((self.taken, batch))
    }

    /// The batch that was taken is applied; returns the acknowledgement.
    pub fn batch_applied(&mut self) -> Kind {
        self.applied = self.taken;
        Kind::Applied(wire::Applied { sequence: self.applied })
    }

    /// Number of the last batch that was applied here.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Whether the peer says that it sends nothing more, and every batch it sent is applied.
    pub fn all_applied(&self) -> bool {
        self.peer_finish.is_some_and(|(_, sequence)| self.applied >= sequence)
    }

    /// Whether an item of `size` bytes may be sent now. An item larger than the window goes alone.
    pub fn has_item_room(&self, size: u64) -> bool {
        self.sent_items.is_empty()
            || (self.sent_bytes.saturating_add(size) <= self.peer.item_window && self.sent_items.len() < MAX_ITEMS)
    }

    /// Checks that the peer would take the item at all.
    ///
    /// # Errors
    /// When it is over the peer's limits, or the stream of items was ended.
    pub fn check_item(&self, item: &Item) -> Result<(), ProtocolError> {
        if self.finished {
            return Err(ProtocolError::Unexpected {
                message: "Message",
                state: "this side has finished sending",
            });
        }
        check_size(
            item.size(),
            item_limit(&self.peer, matches!(item, Item::Message(_))),
            item_name(item),
        )?;
        match item {
            Item::Blob { name, .. } => check_size(name.len() as u64, MAX_NAME as u64, "blob name"),
            Item::Message(_) => Ok(()),
        }
    }

    /// Keeps an item until the peer has consumed it; returns its number. The caller sends it.
    pub fn send_item(&mut self, item: Item) -> u64 {
        self.sent_bytes += item.size();
        self.sent_items.push_back(item);
        self.consumed_by_peer + self.sent_items.len() as u64
    }

    /// Ends the stream of items and batches of this side.
    pub fn finish(&mut self) -> Kind {
        self.finished = true;
        let item = self.consumed_by_peer + self.sent_items.len() as u64;
        Kind::Finish(wire::Finish {
            item,
            sequence: self.reserved,
        })
    }

    /// Length of an announced blob whose bytes have not come yet; `None` if it is not announced or is here already.
    pub fn awaited_blob(&self, item: u64) -> Option<u64> {
        match self.slot_index(item).and_then(|index| self.slots.get(index)) {
            Some(Slot::Announced { length, .. }) => Some(*length),
            _ => None,
        }
    }

    /// Whether item `item` has been announced, and so needs no more waiting for.
    pub fn is_announced(&self, item: u64) -> bool {
        item <= self.consumed + self.slots.len() as u64
    }

    /// The bytes of an announced blob are here.
    ///
    /// # Errors
    /// When they are not what was announced.
    pub fn blob_arrived(&mut self, item: u64, bytes: Bytes) -> Result<(), ProtocolError> {
        let Some(slot) = self.slot_index(item).and_then(|index| self.slots.get_mut(index)) else {
            return Ok(());
        };
        let Slot::Announced { name, length, checksum } = slot else {
            return Ok(());
        };
        if bytes.len() as u64 != *length || xxh3_64(&bytes) != *checksum {
            return Err(ProtocolError::DamagedBlob { name: name.clone() });
        }
        let name = std::mem::take(name);
        *slot = Slot::Complete(Item::Blob { name, bytes });
        Ok(())
    }

    /// Takes the next item if it is complete, with the acknowledgement to be sent for it.
    pub fn next_item(&mut self) -> Option<(Item, Kind)> {
        if !matches!(self.slots.front()?, Slot::Complete(_)) {
            return None;
        }
        let Some(Slot::Complete(item)) = self.slots.pop_front() else {
            return None;
        };
        self.slot_bytes -= item.size();
        self.consumed += 1;
        Some((item, Kind::Consumed(wire::Consumed { item: self.consumed })))
    }

    /// Whether the peer has ended its stream of items and all of them are consumed.
    pub fn is_drained(&self) -> bool {
        self.peer_finish.is_some_and(|(item, _)| self.consumed >= item)
    }

    /// The peer is known to send nothing more than what is here.
    pub fn assume_finished(&mut self) {
        self.peer_finish
            .get_or_insert((self.consumed + self.slots.len() as u64, self.taken));
    }

    /// Whether batches are here that are not applied.
    pub fn has_unapplied(&self) -> bool {
        !self.arrived.is_empty() || self.taken > self.applied
    }

    /// What the peer said when it gave up, if it did.
    pub fn peer_failure(&self) -> Option<&str> {
        self.peer_failure.as_deref()
    }

    /// Takes a control message of the open session.
    ///
    /// # Errors
    /// When the peer breaks the protocol.
    pub fn receive(&mut self, kind: Kind) -> Result<(), ProtocolError> {
        match kind {
            Kind::Message(message) => self.announce(message.item, Slot::Complete(Item::Message(message.body))),
            Kind::Blob(wire::Blob {
                item,
                name,
                length,
                checksum,
            }) => {
                check_size(name.len() as u64, MAX_NAME as u64, "blob name")?;
                let empty = length == 0;
                self.announce(item, Slot::Announced { name, length, checksum })?;
                if empty {
                    self.blob_arrived(item, Bytes::new())
                } else {
                    Ok(())
                }
            }
            Kind::Consumed(consumed) => self.peer_consumed(consumed.item),
            Kind::Applied(applied) => self.peer_applied(applied.sequence),
            Kind::Failed(failed) => {
                self.peer_failure.get_or_insert(failed.reason);
                Ok(())
            }
            Kind::Finish(finish) => {
                self.peer_finish = Some((finish.item, finish.sequence));
                Ok(())
            }
            Kind::Hello(_) | Kind::Open(_) | Kind::Opened(_) | Kind::Refused(_) => Err(ProtocolError::Unexpected {
                message: "handshake",
                state: "the session is open",
            }),
        }
    }

    /// What this side has received. Call [`SessionState::detach`] first.
    pub fn received(&self) -> Received {
        Received {
            applied: self.applied,
            // A batch that is being applied need not be sent again either.
            pending: (self.applied + 1..=self.taken)
                .chain(self.arrived.keys().copied())
                .collect(),
            items: self.consumed + self.slots.len() as u64,
            consumed: self.consumed,
        }
    }

    /// The connection is gone: forgets what was announced and has not arrived; the peer announces it again.
    pub fn detach(&mut self) {
        let complete = self
            .slots
            .iter()
            .take_while(|slot| matches!(slot, Slot::Complete(_)))
            .count();
        self.slots.truncate(complete);
        self.slot_bytes = self.slots.iter().map(Slot::size).sum();
    }

    /// A new connection is there, and the peer says what it has; returns what it lacks.
    ///
    /// # Errors
    /// When the peer claims to have what was never sent.
    pub fn attach(&mut self, peer: &Received) -> Result<Resend, ProtocolError> {
        self.peer_applied(peer.applied)?;
        self.peer_consumed(peer.consumed)?;
        let sent = self.consumed_by_peer + self.sent_items.len() as u64;
        if peer.items > sent || peer.items < self.consumed_by_peer {
            let expected = format!("{} to {sent} were possible", self.consumed_by_peer);
            return Err(ProtocolError::OutOfOrder {
                what: "item",
                number: peer.items,
                expected,
            });
        }
        let has = |sequence: &u64| peer.pending.contains(sequence);
        let batches = self.kept.iter().filter(|(sequence, _)| !has(sequence));
        let batches = batches
            .filter_map(|(sequence, bytes)| Some((*sequence, bytes.clone()?)))
            .collect();
        let skip = (peer.items - self.consumed_by_peer) as usize;
        let items = self.sent_items.iter().enumerate().skip(skip);
        let items = items
            .map(|(index, item)| (self.consumed_by_peer + 1 + index as u64, item.clone()))
            .collect();
        let finish = self.finished.then(|| self.finish());
        Ok(Resend { batches, items, finish })
    }

    fn slot_index(&self, item: u64) -> Option<usize> {
        usize::try_from(item.checked_sub(self.consumed + 1)?).ok()
    }

    fn announce(&mut self, item: u64, slot: Slot) -> Result<(), ProtocolError> {
        let next = self.consumed + self.slots.len() as u64 + 1;
        if item != next {
            return Err(ProtocolError::OutOfOrder {
                what: "item",
                number: item,
                expected: format!("{next} is next"),
            });
        }
        let message = matches!(slot, Slot::Complete(_));
        check_size(
            slot.size(),
            item_limit(&self.local, message),
            if message { "message" } else { "blob" },
        )?;
        let total = self.slot_bytes.saturating_add(slot.size());
        if !self.slots.is_empty() {
            check_size(total, self.local.item_window, "total of unconsumed messages and blobs")?;
            check_size(
                self.slots.len() as u64 + 1,
                MAX_ITEMS as u64,
                "number of unconsumed messages and blobs",
            )?;
        }
        self.slot_bytes = total;
        self.slots.push_back(slot);
        Ok(())
    }

    fn peer_consumed(&mut self, item: u64) -> Result<(), ProtocolError> {
        let sent = self.consumed_by_peer + self.sent_items.len() as u64;
        if item > sent {
            let expected = format!("only {sent} were sent");
            return Err(ProtocolError::OutOfOrder {
                what: "consumed item",
                number: item,
                expected,
            });
        }
        while self.consumed_by_peer < item {
            let gone = self.sent_items.pop_front().expect("counted above");
            self.sent_bytes -= gone.size();
            self.consumed_by_peer += 1;
        }
        Ok(())
    }

    fn peer_applied(&mut self, sequence: u64) -> Result<(), ProtocolError> {
        // A batch that is not encoded yet cannot have been applied.
        let unsent = self.kept.range(..=sequence).find(|(_, bytes)| bytes.is_none());
        if sequence > self.reserved || unsent.is_some() {
            let expected = format!("{} batches were begun, not all of them sent", self.reserved);
            return Err(ProtocolError::OutOfOrder {
                what: "applied batch",
                number: sequence,
                expected,
            });
        }
        if sequence > self.acknowledged {
            self.acknowledged = sequence;
            let rest = self.kept.split_off(&(sequence + 1));
            let done = std::mem::replace(&mut self.kept, rest);
            self.acknowledged_bytes += done.values().flatten().map(|bytes| bytes.len() as u64).sum::<u64>();
        }
        Ok(())
    }
}

fn item_limit(limits: &Limits, message: bool) -> u64 {
    if message {
        MAX_MESSAGE as u64
    } else {
        limits.blob_bytes.saturating_add(MAX_NAME as u64)
    }
}

fn item_name(item: &Item) -> &'static str {
    match item {
        Item::Message(_) => "message",
        Item::Blob { .. } => "blob",
    }
}

fn check_size(size: u64, limit: u64, what: &'static str) -> Result<(), ProtocolError> {
    if size > limit {
        Err(ProtocolError::OverLimit { what, size, limit })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            batch_window: 4,
            batch_bytes: 1 << 20,
            blob_bytes: 1000,
            item_window: 100,
            delta_pages: 0,
        }
    }

    fn state() -> SessionState<u64> {
        SessionState::new(limits(), limits())
    }

    fn message(item: u64, body: &'static [u8]) -> Kind {
        Kind::Message(wire::Message {
            item,
            body: Bytes::from_static(body),
        })
    }

    #[test]
    fn the_window_bounds_what_is_under_way() {
        let mut sender = state();
        let got: Vec<_> = std::iter::from_fn(|| sender.reserve_batch()).collect();
        assert_eq!(got, [1, 2, 3, 4]);
        sender.batch_encoded(1, Bytes::new());
        sender.receive(Kind::Applied(wire::Applied { sequence: 1 })).unwrap();
        assert_eq!(sender.reserve_batch(), Some(5));
        assert_eq!(sender.reserve_batch(), None);
    }

    #[test]
    fn batches_apply_in_sequence_however_they_arrive() {
        let mut receiver = state();
        for sequence in [3, 1, 2] {
            assert!(receiver.batch_arrived(sequence, sequence).unwrap());
        }
        assert!(!receiver.batch_arrived(2, 2).unwrap(), "sent again");
        let mut order = vec![];
        while let Some((sequence, batch)) = receiver.next_batch() {
            assert_eq!(receiver.next_batch(), None, "one at a time");
            order.push(batch);
            assert_eq!(receiver.batch_applied(), Kind::Applied(wire::Applied { sequence }));
        }
        assert_eq!(order, [1, 2, 3]);
        assert!(!receiver.batch_arrived(3, 3).unwrap(), "applied already");
        assert!(receiver.batch_arrived(8, 8).is_err(), "outside the window");
        assert!(receiver.batch_arrived(0, 0).is_err());
    }

    #[test]
    fn acknowledgements_of_what_was_never_sent_are_refused() {
        let mut sender = state();
        assert!(sender.receive(Kind::Applied(wire::Applied { sequence: 1 })).is_err());
        sender.reserve_batch();
        assert!(
            sender.receive(Kind::Applied(wire::Applied { sequence: 1 })).is_err(),
            "still being encoded"
        );
        assert!(sender.receive(Kind::Consumed(wire::Consumed { item: 1 })).is_err());
        assert!(
            sender
                .attach(&Received {
                    applied: u64::MAX,
                    ..Received::default()
                })
                .is_err()
        );
        assert!(
            sender
                .attach(&Received {
                    items: 1,
                    ..Received::default()
                })
                .is_err()
        );
    }

    #[test]
    fn a_message_waits_for_the_blobs_before_it() {
        let mut receiver = state();
        let bytes = Bytes::from_static(b"image");
        let blob = Item::Blob {
            name: "core-1.img".into(),
            bytes: bytes.clone(),
        };
        receiver.receive(blob.control(1)).unwrap();
        receiver.receive(message(2, b"barrier")).unwrap();
        assert_eq!(receiver.next_item(), None);
        assert_eq!(receiver.awaited_blob(1), Some(5));
        assert!(receiver.blob_arrived(1, Bytes::from_static(b"imagE")).is_err());
        receiver.blob_arrived(1, bytes).unwrap();
        assert_eq!(receiver.next_item().unwrap().0, blob);
        let (item, acknowledgement) = receiver.next_item().unwrap();
        assert_eq!(item, Item::Message(Bytes::from_static(b"barrier")));
        assert_eq!(acknowledgement, Kind::Consumed(wire::Consumed { item: 2 }));
    }

    #[test]
    fn hostile_items_are_refused() {
        let mut receiver = state();
        assert!(receiver.receive(message(2, b"")).is_err(), "a gap");
        assert!(receiver.receive(message(0, b"")).is_err());
        let blob = |item, length| {
            Kind::Blob(wire::Blob {
                item,
                name: "x".into(),
                length,
                checksum: 0,
            })
        };
        assert!(receiver.receive(blob(1, u64::MAX)).is_err());
        assert!(receiver.receive(blob(1, 10_000)).is_err());
        receiver.receive(blob(1, 900)).unwrap();
        assert!(receiver.receive(message(2, b"more than the window")).is_err());
        receiver.blob_arrived(77, Bytes::new()).unwrap();
        assert_eq!(receiver.awaited_blob(u64::MAX), None);
    }

    #[test]
    fn resumption_sends_what_is_missing_and_only_that() {
        let (mut a, mut b) = (state(), state());
        for sequence in 1..=4 {
            a.reserve_batch();
            a.batch_encoded(sequence, Bytes::from(vec![sequence as u8]));
        }
        let mut items = vec![Item::Message(Bytes::from_static(b"one"))];
        items.push(Item::Blob {
            name: "two".into(),
            bytes: Bytes::from_static(b"2"),
        });
        items.push(Item::Message(Bytes::from_static(b"three")));
        for item in &items {
            let number = a.send_item(item.clone());
            b.receive(item.control(number)).unwrap();
        }
        // Batches 1 and 3 arrive, 1 is being applied; the blob's bytes never come.
        b.batch_arrived(1, 1).unwrap();
        b.batch_arrived(3, 3).unwrap();
        assert!(b.next_batch().is_some());
        b.next_item().unwrap();
        b.detach();
        a.detach();
        let received = b.received();
        assert_eq!(
            received,
            Received {
                applied: 0,
                pending: vec![1, 3],
                items: 1,
                consumed: 1
            }
        );
        let resend = a.attach(&received).unwrap();
        assert_eq!(
            resend.batches.iter().map(|(sequence, _)| *sequence).collect::<Vec<_>>(),
            [2, 4]
        );
        assert_eq!(resend.items, [(2, items[1].clone()), (3, items[2].clone())]);
        for (number, item) in &resend.items {
            b.receive(item.control(*number)).unwrap();
        }
        b.blob_arrived(2, Bytes::from_static(b"2")).unwrap();
        assert_eq!(b.next_item().unwrap().0, items[1]);
        assert_eq!(b.next_item().unwrap().0, items[2]);
    }

    #[test]
    fn an_item_larger_than_the_window_goes_alone() {
        let mut sender = state();
        assert!(sender.has_item_room(900));
        sender.send_item(Item::Blob {
            name: String::new(),
            bytes: Bytes::from(vec![0; 900]),
        });
        assert!(!sender.has_item_room(1));
        assert!(
            sender
                .check_item(&Item::Blob {
                    name: "x".into(),
                    bytes: Bytes::from(vec![0; 9000])
                })
                .is_err()
        );
    }

    #[test]
    fn a_session_is_drained_when_everything_before_the_end_is_consumed() {
        let mut receiver = state();
        receiver.receive(message(1, b"last")).unwrap();
        receiver
            .receive(Kind::Finish(wire::Finish { item: 1, sequence: 0 }))
            .unwrap();
        assert!(!receiver.is_drained());
        receiver.next_item().unwrap();
        assert!(receiver.is_drained() && receiver.all_applied());
    }
}
