//! A map from disjoint ranges of addresses to values, in which a later range cuts what it covers.

use std::collections::BTreeMap;

/// A value of a range. A part of the range has the value that is advanced by the bytes before the part.
pub(crate) trait Value: Copy + PartialEq {
    fn advanced(self, bytes: u64) -> Self;
}

impl Value for () {
    fn advanced(self, _: u64) -> Self {}
}

/// A range `start..end` (bytes, not empty) and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interval<V> {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) value: V,
}

/// Neighbours whose values continue each other are kept as one.
#[derive(Clone, Debug)]
pub(crate) struct IntervalMap<V> {
    /// By start.
    ranges: BTreeMap<u64, (u64, V)>,
}

impl<V> Default for IntervalMap<V> {
    fn default() -> Self {
        Self {
            ranges: BTreeMap::new(),
        }
    }
}

impl<V: Value> IntervalMap<V> {
    pub(crate) fn insert(&mut self, start: u64, end: u64, value: V) {
        debug_assert!(start < end);
        self.remove(start, end);
        let (mut start, mut end, mut value) = (start, end, value);
        if let Some((&before, &(before_end, before_value))) = self.ranges.range(..start).next_back()
            && before_end == start
            && before_value.advanced(start - before) == value
        {
            (start, value) = (before, before_value);
        }
        if let Some(&(after_end, after_value)) = self.ranges.get(&end)
            && value.advanced(end - start) == after_value
        {
            self.ranges.remove(&end);
            end = after_end;
        }
        self.ranges.insert(start, (end, value));
    }

    pub(crate) fn remove(&mut self, start: u64, end: u64) {
        // The range that reaches in from the left may also reach out to the right.
        if let Some((&before, &(before_end, value))) = self.ranges.range(..start).next_back()
            && before_end > start
        {
            self.ranges.insert(before, (start, value));
            if before_end > end {
                self.ranges.insert(end, (before_end, value.advanced(end - before)));
            }
        }
        while let Some((&inner, &(inner_end, value))) = self.ranges.range(start..end).next() {
            self.ranges.remove(&inner);
            if inner_end > end {
                self.ranges.insert(end, (inner_end, value.advanced(end - inner)));
            }
        }
    }

    /// The ranges that overlap `start..end`, cut to it, in order.
    pub(crate) fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = Interval<V>> + '_ {
        let first = match self.ranges.range(..=start).next_back() {
            Some((&before, &(before_end, _))) if before_end > start => before,
            _ => start,
        };
        self.ranges
            .range(first..end.max(first))
            .map(move |(&from, &(to, value))| {
                let cut = from.max(start);
                Interval {
                    start: cut,
                    end: to.min(end),
                    value: value.advanced(cut - from),
                }
            })
    }

    /// All ranges in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Interval<V>> + '_ {
        self.ranges
            .iter()
            .map(|(&start, &(end, value))| Interval { start, end, value })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl Value for u64 {
        fn advanced(self, bytes: u64) -> Self {
            self + bytes
        }
    }

    proptest! {
        #[test]
        fn behaves_as_an_array_of_addresses(
            steps in prop::collection::vec((0u64..40, 1u64..20, prop::option::of(0u64..3)), 0..40),
            window in (0u64..60, 1u64..20),
        ) {
            let mut map = IntervalMap::default();
            let mut model = [None; 64];
            for (start, length, value) in steps {
                match value {
                    Some(value) => map.insert(start, start + length, value * 1000),
                    None => map.remove(start, start + length),
                }
                for i in 0..length {
                    model[(start + i) as usize] = value.map(|value| value * 1000 + i);
                }
            }
            let mut seen = [None; 64];
            let mut previous: Option<Interval<u64>> = None;
            for range in map.iter() {
                prop_assert!(range.start < range.end);
                if let Some(previous) = previous {
                    let continues = previous.value.advanced(previous.end - previous.start) == range.value;
                    prop_assert!(previous.end < range.start || previous.end == range.start && !continues);
                }
                for address in range.start..range.end {
                    seen[address as usize] = Some(range.value + address - range.start);
                }
                previous = Some(range);
            }
            prop_assert_eq!(seen, model);

            let (start, end) = (window.0, (window.0 + window.1).min(64));
            let mut cut = [None; 64];
            for range in map.overlapping(start, end) {
                prop_assert!(start <= range.start && range.start < range.end && range.end <= end);
                for address in range.start..range.end {
                    cut[address as usize] = Some(range.value + address - range.start);
                }
            }
            prop_assert_eq!(&cut[start as usize..end as usize], &model[start as usize..end as usize]);
        }
    }
}
