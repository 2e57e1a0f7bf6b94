//! What happened to the lazy pages of a task, noted so that it outlives whoever serves them.
//!
//! The kernel tells of a fork, mremap, madvise or munmap once, to whoever reads the userfaultfd. A server that takes over
//! from one that died starts from the ranges as they were first and has the changes done to them again; which pages
//! are there by now, the page table tells.

use std::sync::Arc;

use crate::regions::{PageStatus, RegionMap};

/// One change of a map. Done again in order to the same map, they give the same ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// See [`RegionMap::remap`].
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Bytes.
        len: u64,
    },
    /// See [`RegionMap::remove`].
    Remove {
        /// First byte.
        start: u64,
        /// The byte after the last.
        end: u64,
    },
    /// See [`RegionMap::unmapped`].
    Unmapped {
        /// First byte.
        start: u64,
        /// The byte after the last.
        end: u64,
    },
    /// It is known that this part is gone; see [`RegionMap::unmap`].
    Unmap {
        /// First byte.
        start: u64,
        /// The byte after the last.
        end: u64,
    },
    /// It is known that this part, which was in doubt, is there.
    Kept {
        /// First byte.
        start: u64,
        /// The byte after the last.
        end: u64,
    },
    /// See [`RegionMap::promote`].
    Promoted,
    /// See [`RegionMap::grow`].
    Grow {
        /// First byte.
        start: u64,
        /// The byte after the last.
        end: u64,
        /// An address in the part that was known before.
        like: u64,
    },
    /// See [`RegionMap::fork`].
    Fork {
        /// The journal of the child.
        child: u64,
    },
    /// Every page is there: what is dropped from now on is not told of any more.
    Complete,
}

impl Change {
    /// Length of a change as bytes.
    pub const BYTES: usize = 32;

    /// The change as bytes.
    pub fn encode(self) -> [u8; Change::BYTES] {
        let words = match self {
            Change::Remap { from, to, len } => [1, from, to, len],
            Change::Remove { start, end } => [2, start, end, 0],
            Change::Unmapped { start, end } => [3, start, end, 0],
            Change::Unmap { start, end } => [4, start, end, 0],
            Change::Promoted => [5, 0, 0, 0],
            Change::Grow { start, end, like } => [6, start, end, like],
            Change::Fork { child } => [7, child, 0, 0],
            Change::Complete => [8, 0, 0, 0],
            Change::Kept { start, end } => [9, start, end, 0],
        };
        let mut bytes = [0; Change::BYTES];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&u64::to_le_bytes(word));
        }
        bytes
    }

    /// The change of these bytes, if they are one.
    pub fn decode(bytes: &[u8; Change::BYTES]) -> Option<Change> {
        let word = |index: usize| {
            let bytes = bytes[8 * index..8 * index + 8].try_into();
            u64::from_le_bytes(bytes.unwrap_or_default())
        };
        let (start, end) = (word(1), word(2));
        let ordered = start < end && (start | end).is_multiple_of(4096);
        match word(0) {
            1 => (word(1) | word(2) | word(3))
                .is_multiple_of(4096)
                .then_some(Change::Remap {
                    from: word(1),
                    to: word(2),
                    len: word(3),
                }),
            2 => ordered.then_some(Change::Remove { start, end }),
            3 => ordered.then_some(Change::Unmapped { start, end }),
            4 => ordered.then_some(Change::Unmap { start, end }),
            5 => Some(Change::Promoted),
            6 => ordered.then_some(Change::Grow {
                start,
                end,
                like: word(3),
            }),
            7 => Some(Change::Fork { child: word(1) }),
            8 => Some(Change::Complete),
            9 => ordered.then_some(Change::Kept { start, end }),
            _ => None,
        }
    }
}

/// Where the changes of one task are noted. Calls come one after the other, in the order of the changes.
pub trait Journal: Send + Sync {
    /// Events are about to be read. What is read and not noted by [`Journal::changed`] is lost if we die in between.
    fn reading(&self);

    /// What was read, or found out, changed this.
    fn changed(&self, changes: &[Change]);

    /// A journal for a child that is being forked, and its number for [`Change::Fork`].
    fn child(&self) -> (u64, Arc<dyn Journal>);
}

/// Does a change. `doubtful` are parts of the map that may or may not be unmapped, see [`RegionMap::unmapped`]. What a
/// child begins with is [`RegionMap::fork`] of the map at its [`Change::Fork`].
pub fn apply(map: &mut RegionMap, doubtful: &mut Vec<(u64, u64)>, change: Change) {
    match change {
        Change::Remap { from, to, len } => map.remap(from, to, len),
        Change::Remove { start, end } => map.remove(start, end),
        Change::Unmapped { start, end } => doubtful.extend(map.unmapped(start, end)),
        Change::Unmap { start, end } => {
            map.unmap(start, end);
            doubtful.retain(|part| *part != (start, end));
        }
        Change::Kept { start, end } => doubtful.retain(|part| *part != (start, end)),
        Change::Promoted => map.promote(),
        Change::Grow { start, end, like } => map.grow(start, end, like),
        Change::Fork { .. } => {}
        Change::Complete => {
            for (start, end) in map.spans() {
                map.set(start, end, PageStatus::Zero);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_is_read_as_it_was_written() {
        let changes = [
            Change::Remap {
                from: 0x1000,
                to: 0x9000,
                len: 0x2000,
            },
            Change::Remove {
                start: 0x1000,
                end: 0x2000,
            },
            Change::Unmapped {
                start: 0x1000,
                end: 0x3000,
            },
            Change::Unmap {
                start: 0x1000,
                end: 0x4000,
            },
            Change::Promoted,
            Change::Kept {
                start: 0x2000,
                end: 0x3000,
            },
            Change::Grow {
                start: 0x1000,
                end: 0x5000,
                like: 0,
            },
            Change::Fork { child: 7 },
            Change::Complete,
        ];
        for change in changes {
            assert_eq!(Change::decode(&change.encode()), Some(change));
        }
        assert_eq!(Change::decode(&[0; Change::BYTES]), None);
        let empty = Change::Remove { start: 4096, end: 4096 };
        assert_eq!(Change::decode(&empty.encode()), None);
    }

    #[test]
    fn the_same_changes_give_the_same_ranges_whatever_was_filled_meanwhile() {
        use crate::regions::LazyRange;
        use whimbrel_images::page::{MemoryObject, PAGE_SIZE};
        const PAGE: u64 = PAGE_SIZE as u64;
        let mut seed = 7_u64;
        let mut random = move |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for _ in 0..300 {
            let ranges = [0, 40, 90].map(|page| LazyRange::anonymous(MemoryObject::Task(1), (100 + page) * PAGE, 20));
            let mut live = RegionMap::from_ranges(ranges).unwrap();
            let mut again = live.clone();
            let (mut doubts, mut doubts_again) = (Vec::new(), Vec::new());
            for _ in 0..40 {
                let (from, to, pages) = (100 + random(150), 100 + random(150), 1 + random(24));
                let (start, end, len) = (from * PAGE, (from + pages) * PAGE, pages * PAGE);
                let change = match random(8) {
                    0 | 1 => Change::Remap {
                        from: start,
                        to: to * PAGE,
                        len,
                    },
                    2 => Change::Remove { start, end },
                    3 => Change::Unmapped { start, end },
                    4 => Change::Promoted,
                    5 if !doubts.is_empty() => {
                        let (start, end) = doubts[0];
                        Change::Unmap { start, end }
                    }
                    _ => {
                        live.set(start, end, PageStatus::Present);
                        continue;
                    }
                };
                apply(&mut live, &mut doubts, change);
                apply(&mut again, &mut doubts_again, Change::decode(&change.encode()).unwrap());
            }
            assert_eq!((live.spans(), doubts), (again.spans(), doubts_again));
            for page in 100..300 {
                match (live.page(page * PAGE), again.page(page * PAGE)) {
                    (None, None) => {}
                    (Some(live), Some(again)) => {
                        assert_eq!(live.source, again.source);
                        // What was filled is missing as far as the changes tell; nothing is the other way round.
                        assert!(live.status == again.status || live.status == PageStatus::Present);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}
