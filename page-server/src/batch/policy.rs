//! When to compress: where the processor is faster than what compression saves on the link.
//!
//! With `W` encoder threads that compress `s` bytes a second each to the fraction `r`, and a link of `l` bytes a second,
//! pages move at `min(W·s, l/r)`; without compression at `l`. The codec with the highest rate wins, and raw wins where
//! compression does not gain a twentieth. A link that was never seen to be the bottleneck counts as infinitely fast.

use std::time::Duration;

use super::Codec;

/// Levels that are considered, from the fastest.
pub const LEVELS: [i32; 3] = [-5, 1, 3];

/// Every so many batches a level that does not look best is measured again.
const PROBE_EVERY: u64 = 64;

/// What is known about one zstd level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LevelSpeed {
    /// Bytes of content a second on one thread.
    pub bytes_per_second: f64,
    /// Compressed size as a fraction of the content.
    pub ratio: f64,
}

/// What the choice is made from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measurements {
    /// Number of encoder threads.
    pub workers: usize,
    /// Bytes a second that the link carried while it was the bottleneck, if it ever was.
    pub link_bytes_per_second: Option<f64>,
    /// Per entry of [`LEVELS`]; `None` before the first measurement.
    pub levels: [Option<LevelSpeed>; LEVELS.len()],
}

/// The best codec for what was measured. Levels that were never measured do not count.
pub fn choose(measured: &Measurements) -> Codec {
    let Some(link) = measured.link_bytes_per_second else {
        return Codec::Raw;
    };
    let mut best = (Codec::Raw, link * 1.05);
    for (level, speed) in LEVELS.iter().zip(measured.levels) {
        let Some(speed) = speed else { continue };
        let rate = (speed.bytes_per_second * measured.workers as f64).min(link / speed.ratio.max(1e-6));
        if rate > best.1 {
            best = (Codec::Zstd(*level), rate);
        }
    }
    best.0
}

/// Collects the measurements and makes the choice, batch by batch. Has no clock: durations are passed in.
#[derive(Clone, Debug)]
pub struct Adaptive {
    measured: Measurements,
    batches: u64,
    busy: Duration,
    busy_bytes: u64,
}

impl Adaptive {
    /// For this many encoder threads.
    pub fn new(workers: usize) -> Self {
        let measured = Measurements {
            workers,
            link_bytes_per_second: None,
            levels: [None; LEVELS.len()],
        };
        Self {
            measured,
            batches: 0,
            busy: Duration::ZERO,
            busy_bytes: 0,
        }
    }

    /// What is known so far.
    pub fn measurements(&self) -> &Measurements {
        &self.measured
    }

    /// The codec for the next batch. While the link is the bottleneck, now and then one that is there to be measured.
    pub fn next_codec(&mut self) -> Codec {
        self.batches += 1;
        if self.measured.link_bytes_per_second.is_none() {
            return Codec::Raw;
        }
        if let Some(index) = self.measured.levels.iter().position(Option::is_none) {
            return Codec::Zstd(LEVELS[index]);
        }
        if self.batches.is_multiple_of(PROBE_EVERY) {
            return Codec::Zstd(LEVELS[(self.batches / PROBE_EVERY) as usize % LEVELS.len()]);
        }
        choose(&self.measured)
    }

    /// A batch of `content` bytes was compressed to `encoded` bytes at `level` in `elapsed`.
    pub fn compressed(&mut self, level: i32, content: usize, encoded: usize, elapsed: Duration) {
        let Some(index) = LEVELS.iter().position(|known| *known == level) else {
            return;
        };
        if content == 0 {
            return;
        }
        let new = LevelSpeed {
            bytes_per_second: content as f64 / elapsed.as_secs_f64().max(1e-9),
            ratio: encoded as f64 / content as f64,
        };
        let slot = &mut self.measured.levels[index];
        *slot = Some(slot.map_or(new, |old| LevelSpeed {
            bytes_per_second: smooth(old.bytes_per_second, new.bytes_per_second),
            ratio: smooth(old.ratio, new.ratio),
        }));
    }

    /// `bytes` were acknowledged over `elapsed`, in which the window was full the whole time.
    pub fn link_was_bottleneck(&mut self, bytes: u64, elapsed: Duration) {
        self.busy += elapsed;
        self.busy_bytes += bytes;
        if self.busy >= Duration::from_millis(50) && self.busy_bytes > 0 {
            let new = self.busy_bytes as f64 / self.busy.as_secs_f64();
            let old = self.measured.link_bytes_per_second;
            self.measured.link_bytes_per_second = Some(old.map_or(new, |old| smooth(old, new)));
            (self.busy, self.busy_bytes) = (Duration::ZERO, 0);
        }
    }
}

fn smooth(old: f64, new: f64) -> f64 {
    old * 0.75 + new * 0.25
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: f64 = 1e6;

    fn measured(link: Option<f64>, speed: f64, ratio: f64) -> Measurements {
        let level = Some(LevelSpeed {
            bytes_per_second: speed,
            ratio,
        });
        Measurements {
            workers: 2,
            link_bytes_per_second: link,
            levels: [level, None, None],
        }
    }

    #[test]
    fn compression_is_used_only_where_it_pays() {
        let zstd = Codec::Zstd(LEVELS[0]);
        assert_eq!(
            choose(&measured(None, 500.0 * MB, 0.3)),
            Codec::Raw,
            "link never was the bottleneck"
        );
        assert_eq!(choose(&measured(Some(100.0 * MB), 500.0 * MB, 0.3)), zstd, "slow link");
        assert_eq!(
            choose(&measured(Some(2000.0 * MB), 500.0 * MB, 0.3)),
            Codec::Raw,
            "link faster than the encoders"
        );
        assert_eq!(
            choose(&measured(Some(100.0 * MB), 500.0 * MB, 0.99)),
            Codec::Raw,
            "incompressible"
        );
    }

    #[test]
    fn a_stronger_level_wins_on_a_slower_link() {
        let fast = LevelSpeed {
            bytes_per_second: 800.0 * MB,
            ratio: 0.6,
        };
        let strong = LevelSpeed {
            bytes_per_second: 200.0 * MB,
            ratio: 0.3,
        };
        let choice = |link| {
            choose(&Measurements {
                workers: 1,
                link_bytes_per_second: Some(link),
                levels: [Some(fast), None, Some(strong)],
            })
        };
        assert_eq!(choice(20.0 * MB), Codec::Zstd(3));
        assert_eq!(choice(300.0 * MB), Codec::Zstd(-5));
    }

    #[test]
    fn a_fast_link_is_left_alone_and_a_slow_one_is_probed() {
        let mut adaptive = Adaptive::new(2);
        assert!((0..1000).all(|_| adaptive.next_codec() == Codec::Raw));
        adaptive.link_was_bottleneck(5 << 20, Duration::from_millis(100));
        for level in LEVELS {
            assert_eq!(adaptive.next_codec(), Codec::Zstd(level));
            adaptive.compressed(level, 1 << 20, 1 << 18, Duration::from_millis(2));
        }
        assert!(matches!(adaptive.next_codec(), Codec::Zstd(_)));
    }
}
