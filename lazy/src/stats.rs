//! Counters, and a histogram of fault latencies. All of them may be read while the server works.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Eight buckets for each power of two: at most 12 % off, over the whole range of 64 bits.
const BUCKETS: usize = 62 * 8;

/// A histogram of durations, in nanoseconds, with logarithmic buckets.
#[derive(Debug)]
pub struct Histogram([AtomicU64; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.0[bucket(nanos)].fetch_add(1, Ordering::Relaxed);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// The duration that the share `quantile` (0 to 1) of those counted do not exceed; zero when there are none.
    pub fn quantile(&self, quantile: f64) -> Duration {
        let counts: Vec<u64> = self.0.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        let wanted = ((total as f64 * quantile).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Duration::from_nanos(upper(index));
            }
        }
        Duration::ZERO
    }
}

fn bucket(nanos: u64) -> usize {
    if nanos < 8 {
        return nanos as usize;
    }
    let exponent = 63 - nanos.leading_zeros() as usize;
    (exponent - 2) * 8 + (nanos >> (exponent - 3) & 7) as usize
}

fn upper(index: usize) -> u64 {
    if index < 8 {
        return index as u64;
    }
    let (exponent, step) = (index / 8 + 2, index as u64 % 8);
    (1u64 << exponent).saturating_add(((step + 1) << (exponent - 3)) - 1)
}

/// What a server counts.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) faults: AtomicU64,
    pub(crate) fault_pages: AtomicU64,
    pub(crate) prefetched: AtomicU64,
    pub(crate) zeros: AtomicU64,
    pub(crate) forks: AtomicU64,
    pub(crate) source_failures: AtomicU64,
    pub(crate) latency: Histogram,
}

/// A reading of a server's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatsSnapshot {
    /// Page faults reported by the kernel.
    pub faults: u64,
    /// Pages filled to answer a fault.
    pub fault_pages: u64,
    /// Pages filled in the background.
    pub prefetched: u64,
    /// Pages found to be zeros.
    pub zeros: u64,
    /// Forks of lazy tasks.
    pub forks: u64,
    /// Reads of a source that failed, each try counted.
    pub source_failures: u64,
    /// Half of the faults were answered within this time after they were read.
    pub fault_p50: Duration,
    /// 99 % of the faults were answered within this time after they were read.
    pub fault_p99: Duration,
}

impl Stats {
    pub(crate) fn snapshot(&self) -> StatsSnapshot {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        StatsSnapshot {
            faults: load(&self.faults),
            fault_pages: load(&self.fault_pages),
            prefetched: load(&self.prefetched),
            zeros: load(&self.zeros),
            forks: load(&self.forks),
            source_failures: load(&self.source_failures),
            fault_p50: self.latency.quantile(0.5),
            fault_p99: self.latency.quantile(0.99),
        }
    }
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_falls_into_a_bucket_that_bounds_it_closely() {
        for nanos in (0..64).flat_map(|bit| [1u64 << bit, (1u64 << bit) - 1, (1u64 << bit) + (1u64 << bit) / 3]) {
            let bound = upper(bucket(nanos));
            assert!(bound >= nanos && bound - nanos <= nanos / 8, "{nanos} {bound}");
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn quantiles_are_those_of_the_recorded_durations() {
        let histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), Duration::ZERO);
        (1..=1000).for_each(|micros| histogram.record(Duration::from_micros(micros)));
        let (half, most) = (
            histogram.quantile(0.5).as_micros(),
            histogram.quantile(0.99).as_micros(),
        );
        assert!(
            (500..570).contains(&half) && (990..1120).contains(&most),
            "{half} {most}"
        );
    }
}
