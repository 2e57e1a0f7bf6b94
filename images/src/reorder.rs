//! Puts a pages file that is almost in order in order where it lies: what is missing in the middle makes room for itself.
//!
//! The format wants pages in the order of their addresses, one after the other. A file that is written in order and corrected
//! afterwards has few pages in the wrong place, at its end. To copy all of it would take its size again on the disk.

use std::io::{self, SeekFrom};

use crate::store::{ReadSeek, WriteSeek};

/// Most bytes out of order that are taken into memory.
const MOST: u64 = 64 << 20;
/// Bytes that are moved at once: they fit into a processor's cache.
const STEP: u64 = 256 << 10;

/// Bytes that lie at `from` and belong at `to`.
#[derive(Clone, Copy, Debug)]
struct Part {
    from: u64,
    to: u64,
    length: u64,
}

/// How to put a file in order.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Parts that are in order but for the gaps between them: both `from` and `to` ascend.
    ordered: Vec<Part>,
    /// The others.
    strays: Vec<Part>,
}

impl Plan {
    /// From offset and length of all parts in the order in which they shall lie. What lies before `strays_from` must be in
    /// order already. `None` when that is not so, or when too much is not.
    pub(crate) fn new(parts: impl Iterator<Item = (u64, u64)>, strays_from: u64) -> Option<Plan> {
        let (mut plan, mut to, mut stray_bytes) = (Plan::default(), 0, 0);
        for (from, length) in parts {
            let part = Part { from, to, length };
            to += length;
            if from >= strays_from {
                stray_bytes += length;
                plan.strays.push(part);
                continue;
            }
            match plan.ordered.last_mut() {
                Some(last) if last.from + last.length > from => return None,
                Some(last) if last.from + last.length == from && last.to + last.length == part.to => {
                    last.length += length;
                }
                _ => plan.ordered.push(part),
            }
            if from + length > strays_from {
                return None;
            }
        }
        (stray_bytes <= MOST).then_some(plan)
    }

    /// Does it; `source` and `file` are the same file.
    pub(crate) fn run(&self, source: &mut dyn ReadSeek, file: &mut dyn WriteSeek) -> io::Result<()> {
        let mut kept = Vec::new();
        for stray in &self.strays {
            let mut bytes = vec![0; stray.length as usize];
            source.seek(SeekFrom::Start(stray.from))?;
            source.read_exact(&mut bytes)?;
            kept.push(bytes);
        }
        let mut buffer = vec![0; STEP as usize];
        let mut shift = |from: u64, to: u64, length: u64| -> io::Result<()> {
            let bytes = &mut buffer[..length as usize];
            source.seek(SeekFrom::Start(from))?;
            source.read_exact(bytes)?;
            file.seek(SeekFrom::Start(to))?;
            file.write_all(bytes)
        };
        // Since both offsets ascend, a part that moves down, the first of them first, and one that moves up, the last of them
        // first, meets only room that is free, or its own bytes: those that it has moved already.
        for part in self.ordered.iter().filter(|part| part.to < part.from) {
            for done in (0..part.length).step_by(STEP as usize) {
                shift(part.from + done, part.to + done, STEP.min(part.length - done))?;
            }
        }
        for part in self.ordered.iter().rev().filter(|part| part.to > part.from) {
            let mut left = part.length;
            while left > 0 {
                let step = STEP.min(left);
                left -= step;
                shift(part.from + left, part.to + left, step)?;
            }
        }
        for (stray, bytes) in self.strays.iter().zip(&kept) {
            file.seek(SeekFrom::Start(stray.to))?;
            file.write_all(bytes)?;
        }
        file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{ImageStore, MemStore};
    use proptest::prelude::*;
    use std::io::Read;

    proptest! {
        // Some of them are longer than a step, which takes its time.
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Parts of random lengths with gaps between them, and strays behind, in any place.
        #[test]
        fn all_bytes_end_where_they_belong(
            lengths in prop::collection::vec((1u64..800_000, 0u64..500_000, any::<bool>()), 1..8),
        ) {
            let store = MemStore::new();
            let mut file = store.create("pages").unwrap();
            let byte = |index: usize| index as u8 + 1;
            let (mut at, mut froms) = (0, vec![0; lengths.len()]);
            for stray in [false, true] {
                for (index, &(length, gap, is_stray)) in lengths.iter().enumerate() {
                    if is_stray == stray {
                        froms[index] = at;
                        file.seek(SeekFrom::Start(at)).unwrap();
                        file.write_all(&vec![byte(index); length as usize]).unwrap();
                        at += length + if stray { 0 } else { gap };
                    }
                }
                if !stray {
                    let strays_from = at;
                    froms.push(strays_from);
                }
            }
            let strays_from = froms.pop().unwrap();
            let parts = froms.iter().zip(&lengths).map(|(&from, &(length, _, _))| (from, length));
            let plan = Plan::new(parts, strays_from).expect("it is in order but for the strays");
            plan.run(&mut *store.open("pages").unwrap(), &mut *file).unwrap();
            let mut found = Vec::new();
            store.open("pages").unwrap().read_to_end(&mut found).unwrap();
            let mut at = 0;
            for (index, &(length, _, _)) in lengths.iter().enumerate() {
                let end = at + length as usize;
                prop_assert!(found[at..end].iter().all(|&found| found == byte(index)), "part {}", index);
                at = end;
            }
        }
    }

    #[test]
    fn what_is_not_in_order_or_too_much_is_left_to_others() {
        assert!(Plan::new([(0, 10), (20, 10), (5, 10)].into_iter(), 40).is_none());
        assert!(Plan::new([(0, 10), (10, MOST + 1)].into_iter(), 10).is_none());
        assert!(Plan::new([(0, 10), (5, 20)].into_iter(), 8).is_none());
    }
}
