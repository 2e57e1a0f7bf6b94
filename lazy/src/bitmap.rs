//! Two bits for each page of a range.

use crate::regions::PageStatus;

/// The states of consecutive pages, in two planes of one bit each, so that runs are found a word at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StateMap {
    pages: u64,
    low: Vec<u64>,
    high: Vec<u64>,
}

fn code(status: PageStatus) -> (bool, bool) {
    match status {
        PageStatus::Missing => (false, false),
        PageStatus::InFlight => (true, false),
        PageStatus::Present => (false, true),
        PageStatus::Zero => (true, true),
    }
}

impl StateMap {
    pub(crate) fn new(pages: u64, status: PageStatus) -> Self {
        let words = pages.div_ceil(64) as usize;
        let (low, high) = code(status);
        let plane = |set: bool| vec![if set { !0 } else { 0 }; words];
        Self {
            pages,
            low: plane(low),
            high: plane(high),
        }
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    pub(crate) fn get(&self, page: u64) -> PageStatus {
        let (word, bit) = ((page / 64) as usize, page % 64);
        match (self.low[word] >> bit & 1, self.high[word] >> bit & 1) {
            (0, 0) => PageStatus::Missing,
            (1, 0) => PageStatus::InFlight,
            (0, _) => PageStatus::Present,
            _ => PageStatus::Zero,
        }
    }

    pub(crate) fn set(&mut self, from: u64, to: u64, status: PageStatus) {
        let (low, high) = code(status);
        for_words(from, to, |word, mask| {
            let put = |plane: &mut u64, set: bool| if set { *plane |= mask } else { *plane &= !mask };
            put(&mut self.low[word], low);
            put(&mut self.high[word], high);
        });
    }

    pub(crate) fn count(&self, from: u64, to: u64, status: PageStatus) -> u64 {
        let mut count = 0;
        for_words(from, to, |word, mask| {
            count += u64::from((self.matches(word, status) & mask).count_ones())
        });
        count
    }

    /// The first run of pages in one of the states `wanted`, within `from..to`.
    pub(crate) fn find(&self, from: u64, to: u64, wanted: &[PageStatus]) -> Option<(u64, u64)> {
        let any = |word: usize| wanted.iter().fold(0, |bits, &status| bits | self.matches(word, status));
        let start = scan(from, to, any)?;
        Some((start, scan(start, to, |word| !any(word)).unwrap_or(to)))
    }

    /// Makes every page that is in flight missing: of all states, only that one has the low bit alone.
    pub(crate) fn settle(&mut self) {
        self.low.iter_mut().zip(&self.high).for_each(|(low, high)| *low &= high);
    }

    /// A copy of the states of `from..to`.
    pub(crate) fn slice(&self, from: u64, to: u64) -> Self {
        let pages = to - from;
        let (first, shift) = ((from / 64) as usize, from % 64);
        let plane = |plane: &[u64]| {
            let word = |at: usize| plane.get(at).copied().unwrap_or(0);
            (0..pages.div_ceil(64) as usize)
                .map(|at| {
                    let next = if shift == 0 {
                        0
                    } else {
                        word(first + at + 1) << (64 - shift)
                    };
                    word(first + at) >> shift | next
                })
                .collect()
        };
        Self {
            pages,
            low: plane(&self.low),
            high: plane(&self.high),
        }
    }

    fn matches(&self, word: usize, status: PageStatus) -> u64 {
        let (low, high) = code(status);
        let plane = |plane: u64, set: bool| if set { plane } else { !plane };
        plane(self.low[word], low) & plane(self.high[word], high)
    }
}

/// Calls `each` with every word that `from..to` touches and the mask of the bits that it touches there.
fn for_words(from: u64, to: u64, mut each: impl FnMut(usize, u64)) {
    let mut at = from;
    while at < to {
        let (word, bit) = (at / 64, at % 64);
        let count = (64 - bit).min(to - at);
        let mask = if count == 64 { !0 } else { ((1 << count) - 1) << bit };
        each(word as usize, mask);
        at += count;
    }
}

/// The first set bit of `bits` within `from..to`.
fn scan(from: u64, to: u64, bits: impl Fn(usize) -> u64) -> Option<u64> {
    let mut at = from;
    while at < to {
        let rest = bits((at / 64) as usize) >> (at % 64);
        if rest != 0 {
            let found = at + u64::from(rest.trailing_zeros());
            return (found < to).then_some(found);
        }
        at = (at / 64 + 1) * 64;
    }
    None
}
