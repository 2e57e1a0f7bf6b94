//! Sets of pages as sorted, disjoint runs, and what is done with them. Pure.

use whimbrel_images::page::{PAGE_SIZE, PageRun};

/// A sorted list of disjoint runs that do not touch each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunSet(Vec<(u64, u64)>);

impl RunSet {
    /// From address ranges in any order.
    pub fn from_ranges(mut ranges: Vec<(u64, u64)>) -> RunSet {
        ranges.sort_unstable();
        let mut set: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
        for (start, end) in ranges.into_iter().filter(|(start, end)| start < end) {
            match set.last_mut() {
                Some(last) if last.1 >= start => last.1 = last.1.max(end),
                _ => set.push((start, end)),
            }
        }
        RunSet(set)
    }

    /// From runs in any order.
    pub fn from_runs(runs: &[PageRun]) -> RunSet {
        RunSet::from_ranges(runs.iter().map(|run| (run.start, run.end())).collect())
    }

    /// As runs of pages.
    pub fn runs(&self) -> Vec<PageRun> {
        let run = |&(start, end): &(u64, u64)| PageRun {
            start,
            pages: (end - start) / PAGE_SIZE as u64,
        };
        self.0.iter().map(run).collect()
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.0.iter().map(|(start, end)| (end - start) / PAGE_SIZE as u64).sum()
    }

    /// Is there no page?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pages in either.
    pub fn union(&self, other: &RunSet) -> RunSet {
        RunSet::from_ranges(self.0.iter().chain(&other.0).copied().collect())
    }

    /// The pages in both.
    pub fn intersect(&self, other: &RunSet) -> RunSet {
        // Asked for a few pages of many, it must not walk through all of them.
        let first = |of: &RunSet, from: &RunSet| {
            let start = from.0.first().map_or(u64::MAX, |range| range.0);
            of.0.partition_point(|range| range.1 <= start)
        };
        let (mut out, mut i, mut j) = (Vec::new(), first(self, other), first(other, self));
        while let (Some(&a), Some(&b)) = (self.0.get(i), other.0.get(j)) {
            let (start, end) = (a.0.max(b.0), a.1.min(b.1));
            if start < end {
                out.push((start, end));
            }
            if a.1 < b.1 { i += 1 } else { j += 1 }
        }
        RunSet(out)
    }

    /// The pages of this set that are not in `other`.
    pub fn subtract(&self, other: &RunSet) -> RunSet {
        let (mut out, mut j) = (Vec::new(), 0);
        for &(mut start, end) in &self.0 {
            while other.0.get(j).is_some_and(|b| b.1 <= start) {
                j += 1;
            }
            let mut k = j;
            while let Some(&(from, to)) = other.0.get(k).filter(|b| b.0 < end) {
                if from > start {
                    out.push((start, from));
                }
                start = start.max(to);
                k += 1;
            }
            if start < end {
                out.push((start, end));
            }
        }
        RunSet(out)
    }

    /// The address ranges.
    pub fn ranges(&self) -> &[(u64, u64)] {
        &self.0
    }

    /// Does one range contain all of this?
    pub fn covers(&self, start: u64, end: u64) -> bool {
        let after = self.0.partition_point(|range| range.0 <= start);
        after > 0 && self.0[after - 1].1 >= end
    }

    /// Is this address in the set?
    pub fn contains(&self, address: u64) -> bool {
        let after = self.0.partition_point(|&(start, _)| start <= address);
        after > 0 && self.0[after - 1].1 > address
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(set: &RunSet) -> Vec<bool> {
        (0..64).map(|page| set.contains(page * 4096)).collect()
    }

    #[test]
    fn the_operations_agree_with_sets_of_single_pages() {
        let mut seed = 7u64;
        let mut next = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            (seed >> 33) % 60
        };
        for _ in 0..500 {
            let mut make = || {
                let ranges = (0..6).map(|_| {
                    let start = next();
                    (start * 4096, (start + next() % 5) * 4096)
                });
                RunSet::from_ranges(ranges.collect())
            };
            let (a, b) = (make(), make());
            let (x, y) = (naive(&a), naive(&b));
            let both = |f: fn(bool, bool) -> bool| x.iter().zip(&y).map(|(&x, &y)| f(x, y)).collect::<Vec<_>>();
            assert_eq!(naive(&a.union(&b)), both(|x, y| x | y));
            assert_eq!(naive(&a.intersect(&b)), both(|x, y| x & y));
            assert_eq!(naive(&a.subtract(&b)), both(|x, y| x & !y));
            assert_eq!(RunSet::from_runs(&a.runs()), a);
        }
    }
}
