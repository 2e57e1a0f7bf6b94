//! What is known of each lazy page of one address space. Pure data: no system call, no clock.
//!
//! A map has ranges; a range says where in which [`MemoryObject`] its pages come from, and has two bits for each page.
//! Fork, mremap, madvise and munmap change the map as they change the address space.

use std::collections::BTreeMap;

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun};

use crate::bitmap::StateMap;

const PAGE: u64 = PAGE_SIZE as u64;
/// Ranges are cut to 1 GiB, so that splitting one copies 64 KiB of bits at most.
const MAX_RANGE_PAGES: u64 = 1 << 18;

/// What is known of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageStatus {
    /// Its bytes are at the source.
    Missing,
    /// Its bytes are on their way.
    InFlight,
    /// It was filled, here or by the program. If it is gone again, the program dropped it and was reported doing so.
    Present,
    /// It reads as zeros, whatever the source says, and need not be there.
    Zero,
}

impl PageStatus {
    /// Whether the page needs nothing from the source any more.
    pub fn settled(self) -> bool {
        matches!(self, Self::Present | Self::Zero)
    }
}

const STATES: [PageStatus; 4] = [
    PageStatus::Missing,
    PageStatus::InFlight,
    PageStatus::Present,
    PageStatus::Zero,
];

/// Properties of a mapping that decide what its missing pages hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RangeFlags {
    /// Anonymous memory of which only populated pages were saved: a page that the source does not know is zeros.
    pub absent_is_zero: bool,
    /// Shared memory: MADV_DONTNEED drops pages from the mapping, not from the object, so missing pages stay missing.
    /// (MADV_REMOVE, which the kernel reports with the same event, is not distinguished.)
    pub shared: bool,
    /// MADV_WIPEONFORK: a child sees zeros.
    pub wipe_on_fork: bool,
    /// MADV_DONTFORK: a child does not have the mapping.
    pub dont_fork: bool,
}

/// A range of memory that is registered with a userfaultfd: private anonymous or shared memory in pages of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LazyRange {
    /// Address in the task, page aligned.
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
    /// Where the pages come from.
    pub object: MemoryObject,
    /// Address of the first page in that object.
    pub source: u64,
    /// Properties of the mapping.
    pub flags: RangeFlags,
}

impl LazyRange {
    /// A range of private anonymous memory whose pages lie at their own addresses in `object`.
    pub fn anonymous(object: MemoryObject, start: u64, pages: u64) -> Self {
        let flags = RangeFlags {
            absent_is_zero: true,
            ..RangeFlags::default()
        };
        Self {
            start,
            pages,
            object,
            source: start,
            flags,
        }
    }

    /// Address of the byte after the last.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.pages.saturating_mul(PAGE))
    }

    /// The part of the range from page `from` up to page `to`.
    fn part(&self, from: u64, to: u64) -> Self {
        Self {
            start: self.start + from * PAGE,
            source: self.source + from * PAGE,
            pages: to - from,
            ..*self
        }
    }
}

/// Why a range cannot be in a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// The range is empty, not page aligned, or wraps around.
    #[error("lazy range {start:#x} of {pages} pages is empty, unaligned or wraps around")]
    Malformed {
        /// Its address.
        start: u64,
        /// Its length.
        pages: u64,
    },
    /// The range overlaps one that is there.
    #[error("lazy range {start:#x} of {pages} pages overlaps another")]
    Overlap {
        /// Its address.
        start: u64,
        /// Its length.
        pages: u64,
    },
}

/// One page found in a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Its state.
    pub status: PageStatus,
    /// Where its bytes come from.
    pub object: MemoryObject,
    /// Where in that object.
    pub source: u64,
    /// Properties of its mapping.
    pub flags: RangeFlags,
}

/// Pages taken to be fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Where they lay when they were taken. They may have moved since.
    pub address: u64,
    /// The object to read from.
    pub object: MemoryObject,
    /// What to read.
    pub run: PageRun,
    /// Properties of their mapping.
    pub flags: RangeFlags,
}

/// A run of pages that wait for fetched bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Where in the address space.
    pub address: u64,
    /// Which of the fetched pages is the first.
    pub offset: u64,
    /// How many.
    pub pages: u64,
}

#[derive(Clone, Debug)]
struct Range {
    lazy: LazyRange,
    states: StateMap,
    origin: Origin,
}

/// How a range came to be where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It was there from the start, or grew there.
    Own,
    /// mremap put it there. A report of what was there before may still be under way.
    Moved,
    /// What mremap leaves at the old place: nothing, mostly, as the next event will tell.
    Left,
}

/// The lazy pages of one address space.
#[derive(Clone, Debug, Default)]
pub struct RegionMap {
    ranges: BTreeMap<u64, Range>,
    counts: [u64; 4],
    /// Moved ranges that cannot be put in place yet; see [`RegionMap::remap`].
    arrivals: Vec<(LazyRange, StateMap)>,
}

impl RegionMap {
    /// An empty map.
    pub fn new() -> Self {
        Self::default()
    }

    /// A map of `ranges`, all of whose pages are missing.
    ///
    /// # Errors
    /// When a range is malformed or overlaps another.
    pub fn from_ranges(ranges: impl IntoIterator<Item = LazyRange>) -> Result<Self, RegionError> {
        let mut map = Self::new();
        for range in ranges {
            map.insert(range, PageStatus::Missing)?;
        }
        Ok(map)
    }

    /// Adds a range, all of whose pages are in one state.
    ///
    /// # Errors
    /// When it is malformed or overlaps another; the map is unchanged then.
    pub fn insert(&mut self, range: LazyRange, status: PageStatus) -> Result<(), RegionError> {
        let (start, pages) = (range.start, range.pages);
        let bytes = pages.checked_mul(PAGE).filter(|&bytes| bytes > 0);
        let fits = |from: u64| bytes.and_then(|bytes| from.checked_add(bytes)).is_some();
        if !fits(start) || !fits(range.source) || !(start | range.source).is_multiple_of(PAGE) {
            return Err(RegionError::Malformed { start, pages });
        }
        if self.overlapping(start, range.end()).next().is_some() {
            return Err(RegionError::Overlap { start, pages });
        }
        self.insert_states(range, &StateMap::new(pages, status), Origin::Own);
        Ok(())
    }

    /// The page that holds `address`, if it is in the map.
    pub fn page(&self, address: u64) -> Option<Page> {
        let (_, range) = self
            .ranges
            .range(..=address)
            .next_back()
            .filter(|(_, range)| address < range.lazy.end())?;
        let index = (address - range.lazy.start) / PAGE;
        Some(Page {
            status: range.states.get(index),
            object: range.lazy.object,
            source: range.lazy.source + index * PAGE,
            flags: range.lazy.flags,
        })
    }

    /// Sets the state of every page of `start..end` that is in the map.
    pub fn set(&mut self, start: u64, end: u64, status: PageStatus) {
        for key in self.keys(start, end) {
            let range = self.ranges.get_mut(&key).expect("the key was just found");
            let (from, to) = clip(&range.lazy, start, end);
            for state in STATES {
                self.counts[state as usize] -= range.states.count(from, to, state);
            }
            range.states.set(from, to, status);
            self.counts[status as usize] += to - from;
        }
    }

    /// Takes the first run of missing pages within `start..end`, `max_pages` at most; they are in flight then.
    pub fn claim(&mut self, start: u64, end: u64, max_pages: u64) -> Option<Claim> {
        if self.counts[PageStatus::Missing as usize] == 0 {
            return None;
        }
        let claim = self.overlapping(start, end).find_map(|range| {
            let (from, to) = clip(&range.lazy, start, end);
            let (first, last) = range.states.find(from, to, &[PageStatus::Missing])?;
            let part = range.lazy.part(first, last.min(first + max_pages));
            let run = PageRun {
                start: part.source,
                pages: part.pages,
            };
            Some(Claim {
                address: part.start,
                object: part.object,
                run,
                flags: part.flags,
            })
        })?;
        self.set(claim.address, claim.address + claim.run.bytes(), PageStatus::InFlight);
        Some(claim)
    }

    /// Gives back what was taken: pages still in flight are missing again, wherever they are now.
    pub fn release(&mut self, claim: &Claim) {
        for destination in self.destinations(claim.object, claim.run, &[PageStatus::InFlight]) {
            let end = destination.address + destination.pages * PAGE;
            self.set(destination.address, end, PageStatus::Missing);
        }
        for (lazy, states) in self.arrivals.iter_mut().filter(|(lazy, _)| lazy.object == claim.object) {
            let range = Range {
                lazy: *lazy,
                states: states.clone(),
                origin: Origin::Moved,
            };
            let mut found = Vec::new();
            collect(&range, claim.run, &[PageStatus::InFlight], &mut found);
            for destination in found {
                let first = (destination.address - lazy.start) / PAGE;
                states.set(first, first + destination.pages, PageStatus::Missing);
            }
        }
    }

    /// Where the bytes of a claim are to go *now*: its pages that still wait, wherever they were moved to.
    ///
    /// What the source holds never changes, so the bytes are right for every page with this source that waits, whoever
    /// else may be fetching it too.
    pub fn destinations_of(&self, claim: &Claim) -> Vec<Destination> {
        let waiting = [PageStatus::Missing, PageStatus::InFlight];
        let stayed = self
            .ranges
            .range(..=claim.address)
            .next_back()
            .map(|(_, range)| range)
            .filter(|range| {
                let lazy = &range.lazy;
                claim.address + claim.run.bytes() <= lazy.end()
                    && lazy.object == claim.object
                    && lazy.source + (claim.address - lazy.start) == claim.run.start
            });
        if let Some(range) = stayed {
            let mut found = Vec::new();
            collect(range, claim.run, &waiting, &mut found);
            return found;
        }
        self.destinations(claim.object, claim.run, &waiting)
    }

    /// Makes everything that is in flight missing again, when nobody fetches any more.
    pub fn settle(&mut self) {
        self.promote();
        self.ranges.values_mut().for_each(|range| range.states.settle());
        let in_flight = std::mem::take(&mut self.counts[PageStatus::InFlight as usize]);
        self.counts[PageStatus::Missing as usize] += in_flight;
    }

    /// The child's map after fork(2): a copy, but for mappings that are not inherited or wiped. What was on its way to the
    /// parent is missing in the child.
    pub fn fork(&self) -> Self {
        let mut child = Self::new();
        child.arrivals.clone_from(&self.arrivals);
        for range in self.ranges.values().filter(|range| !range.lazy.flags.dont_fork) {
            if range.lazy.flags.wipe_on_fork {
                child.insert_states(
                    range.lazy,
                    &StateMap::new(range.lazy.pages, PageStatus::Zero),
                    range.origin,
                );
            } else {
                child.insert_states(range.lazy, &range.states, range.origin);
            }
        }
        child.settle();
        child
    }

    /// mremap(2) moved `len` bytes. At the old address there may still be a mapping (MREMAP_DONTUNMAP), of private memory
    /// an empty one; if there is none, [`RegionMap::unmap`] follows.
    ///
    /// When something is known at the new address already, the report of how that went away is still under way: another
    /// thread moved or unmapped it, but was slower to tell. What was moved is kept aside then, and the map is
    /// [unsettled](RegionMap::unsettled) until [`RegionMap::promote`].
    pub fn remap(&mut self, from: u64, to: u64, len: u64) {
        for (lazy, states) in self.extract(from, from.saturating_add(len)) {
            if lazy.flags.shared {
                self.put(lazy, &states, Origin::Left);
            } else {
                self.put(lazy, &StateMap::new(lazy.pages, PageStatus::Zero), Origin::Left);
            }
            let moved = LazyRange {
                start: to.wrapping_add(lazy.start - from),
                ..lazy
            };
            self.arrivals.push((moved, states));
        }
        if self
            .overlapping(to, to.saturating_add(len))
            .all(|range| range.origin == Origin::Left)
        {
            self.promote();
        }
    }

    /// Whether something that was moved waits for what was at its new address to be reported gone. Pages must not be filled
    /// then, and the kernel refuses it anyway until that report was read.
    pub fn unsettled(&self) -> bool {
        !self.arrivals.is_empty()
    }

    /// Puts what was moved over whatever is known at its new address. To be called when no event waits to be read any more.
    pub fn promote(&mut self) {
        for (lazy, states) in std::mem::take(&mut self.arrivals) {
            self.put(lazy, &states, Origin::Moved);
        }
    }

    /// madvise(2) drops the pages of `start..end`: private ones are zeros from now on.
    pub fn remove(&mut self, start: u64, end: u64) {
        for key in self.keys(start, end) {
            let lazy = self.ranges[&key].lazy;
            if !lazy.flags.shared {
                self.set(start.max(lazy.start), end.min(lazy.end()), PageStatus::Zero);
            }
        }
    }

    /// As [`RegionMap::unmap`], but for what mremap(2) put there: those parts are kept and returned.
    ///
    /// A thread reports a change only after it let go of the address space. mremap reports the move, then, when that was
    /// read, the unmapping of the old place, and in between another thread may have moved a mapping to just there and
    /// reported that. Only a look at the address space tells whether such a part is gone.
    #[must_use]
    pub fn unmapped(&mut self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut doubtful = Vec::new();
        for key in self.keys(start, end) {
            let range = &self.ranges[&key];
            let part = (start.max(range.lazy.start), end.min(range.lazy.end()));
            if range.origin == Origin::Moved {
                doubtful.push(part);
            } else {
                self.unmap(part.0, part.1);
            }
        }
        doubtful
    }

    /// munmap(2), or another mapping put over `start..end`.
    pub fn unmap(&mut self, start: u64, end: u64) {
        self.extract(start, end);
    }

    /// A mapping grew over `start..end`, which is not in the map: its new pages are zeros. `like` is an address in the
    /// part that was known before.
    pub fn grow(&mut self, start: u64, end: u64, like: u64) {
        if let Some(page) = self.page(like) {
            let (object, flags) = (page.object, page.flags);
            // Zero pages are never fetched, so where they would come from does not matter.
            let range = LazyRange {
                start,
                pages: (end - start) / PAGE,
                object,
                source: start,
                flags,
            };
            self.put(range, &StateMap::new(range.pages, PageStatus::Zero), Origin::Own);
        }
    }

    /// The end of the nearest range that ends at or before `address`, and the start of the nearest that starts behind it.
    pub fn neighbours(&self, address: u64) -> (Option<u64>, Option<u64>) {
        let before = self
            .ranges
            .range(..=address)
            .next_back()
            .map(|(_, range)| range.lazy.end());
        let after = self
            .ranges
            .range(address.saturating_add(1)..)
            .next()
            .map(|(&start, _)| start);
        (before.filter(|&end| end <= address), after)
    }

    /// How many pages are in this state.
    pub fn count(&self, status: PageStatus) -> u64 {
        self.counts[status as usize]
    }

    /// How many pages the map has.
    pub fn pages(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The ranges, ascending; neighbours in the address space are joined.
    pub fn spans(&self) -> Vec<(u64, u64)> {
        let mut spans: Vec<(u64, u64)> = Vec::new();
        for range in self.ranges.values() {
            match spans.last_mut() {
                Some(last) if last.1 == range.lazy.start => last.1 = range.lazy.end(),
                _ => spans.push((range.lazy.start, range.lazy.end())),
            }
        }
        spans
    }

    fn destinations(&self, object: MemoryObject, run: PageRun, wanted: &[PageStatus]) -> Vec<Destination> {
        let mut found = Vec::new();
        for range in self.ranges.values().filter(|range| range.lazy.object == object) {
            collect(range, run, wanted, &mut found);
        }
        found
    }

    fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = &Range> {
        // Ranges do not overlap, so at most one that starts before `start` reaches into it.
        let first = self.ranges.range(..=start).next_back().map_or(start, |(&key, _)| key);
        let last = end.max(first);
        self.ranges
            .range(first..last)
            .map(|(_, range)| range)
            .filter(move |range| range.lazy.end() > start)
    }

    fn keys(&self, start: u64, end: u64) -> Vec<u64> {
        if start >= end {
            return Vec::new();
        }
        self.overlapping(start, end).map(|range| range.lazy.start).collect()
    }

    /// Takes `start..end` out of the map.
    fn extract(&mut self, start: u64, end: u64) -> Vec<(LazyRange, StateMap)> {
        let mut taken = Vec::new();
        for key in self.keys(start, end) {
            let range = self.ranges.remove(&key).expect("the key was just found");
            self.forget(&range.states);
            let (from, to) = clip(&range.lazy, start, end);
            for (first, last) in [(0, from), (to, range.lazy.pages)]
                .into_iter()
                .filter(|(first, last)| first < last)
            {
                self.insert_states(
                    range.lazy.part(first, last),
                    &range.states.slice(first, last),
                    range.origin,
                );
            }
            taken.push((range.lazy.part(from, to), range.states.slice(from, to)));
        }
        taken
    }

    /// Puts a range over whatever is there.
    fn put(&mut self, lazy: LazyRange, states: &StateMap, origin: Origin) {
        self.unmap(lazy.start, lazy.end());
        self.insert_states(lazy, states, origin);
    }

    fn insert_states(&mut self, lazy: LazyRange, states: &StateMap, origin: Origin) {
        let mut from = 0;
        while from < lazy.pages {
            let to = lazy.pages.min(from + MAX_RANGE_PAGES);
            let part = lazy.part(from, to);
            let states = states.slice(from, to);
            for state in STATES {
                self.counts[state as usize] += states.count(0, states.pages(), state);
            }
            self.ranges.insert(
                part.start,
                Range {
                    lazy: part,
                    states,
                    origin,
                },
            );
            from = to;
        }
    }

    fn forget(&mut self, states: &StateMap) {
        for state in STATES {
            self.counts[state as usize] -= states.count(0, states.pages(), state);
        }
    }
}

/// The pages of a range that `start..end` covers, counted from the start of the range.
fn clip(lazy: &LazyRange, start: u64, end: u64) -> (u64, u64) {
    let from = start.saturating_sub(lazy.start) / PAGE;
    let to = end.min(lazy.end()).saturating_sub(lazy.start).div_ceil(PAGE);
    (from.min(lazy.pages), to.max(from.min(lazy.pages)))
}

/// Appends the pages of `range` that come from `run` and are in one of the states `wanted`.
fn collect(range: &Range, run: PageRun, wanted: &[PageStatus], found: &mut Vec<Destination>) {
    let lazy = &range.lazy;
    let start = run.start.max(lazy.source);
    let end = run.end().min(lazy.source + lazy.pages * PAGE);
    if start >= end {
        return;
    }
    let (mut from, to) = ((start - lazy.source) / PAGE, (end - lazy.source) / PAGE);
    while let Some((first, last)) = range.states.find(from, to, wanted) {
        found.push(Destination {
            address: lazy.start + first * PAGE,
            offset: (lazy.source + first * PAGE - run.start) / PAGE,
            pages: last - first,
        });
        from = last;
    }
}
