//! What a migration did, for people and for machines.

use std::time::Duration;

use serde::Serialize;

/// One round.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Round {
    /// Pages with contents.
    pub pages: u64,
    /// Bytes of these pages.
    pub raw_bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long it took, in milliseconds.
    pub ms: f64,
}

/// Frozen time in named parts, in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Frozen {
    /// Stopping the tree.
    pub freeze_ms: f64,
    /// Programs in its tasks, descriptors, mappings.
    pub collect_ms: f64,
    /// The network lock, files, connections.
    pub files_ms: f64,
    /// The last pages and the images, until they had arrived.
    pub send_ms: f64,
    /// Putting together at the destination.
    pub prepare_ms: f64,
    /// From the decision until the tree ran there.
    pub commit_ms: f64,
    /// All of it.
    pub total_ms: f64,
}

/// What became of the memory that followed on demand.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Followed {
    /// Faults that were served.
    pub faults: u64,
    /// Pages that followed.
    pub pages: u64,
    /// Median time that a fault waited, in microseconds.
    pub fault_p50_us: u64,
    /// 99th percentile of it.
    pub fault_p99_us: u64,
    /// How long it took until all was there, in milliseconds.
    pub ms: f64,
}

/// A whole migration.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Pre-copy rounds.
    pub rounds: Vec<Round>,
    /// The last pages, sent while the tree was frozen.
    pub last: Round,
    /// Frozen time.
    pub frozen: Frozen,
    /// Pages that followed on demand, if any did.
    pub followed: Option<Followed>,
    /// From the first contact to the end, in milliseconds.
    pub total_ms: f64,
    /// The root's pid at the destination.
    pub pid_there: u32,
}

impl Report {
    /// Pages with contents, all rounds together.
    pub fn pages(&self) -> u64 {
        self.rounds.iter().map(|round| round.pages).sum::<u64>()
            + self.last.pages
            + self.followed.map_or(0, |f| f.pages)
    }

    /// Bytes of these pages.
    pub fn raw_bytes(&self) -> u64 {
        self.rounds.iter().map(|round| round.raw_bytes).sum::<u64>() + self.last.raw_bytes
    }

    /// Bytes of pages on the wire.
    pub fn wire_bytes(&self) -> u64 {
        self.rounds.iter().map(|round| round.wire_bytes).sum::<u64>() + self.last.wire_bytes
    }

    /// The closing summary.
    pub fn summary(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
        let f = &self.frozen;
        let mut text = format!(
            "{} rounds, {} pages, {:.1} MiB of memory, {:.1} MiB on the wire\n\
             frozen {:.1} ms: freeze {:.1}, collect {:.1}, files {:.1}, send {:.1}, prepare {:.1}, commit {:.1}\n",
            self.rounds.len(),
            self.pages(),
            mib(self.raw_bytes()),
            mib(self.wire_bytes()),
            f.total_ms,
            f.freeze_ms,
            f.collect_ms,
            f.files_ms,
            f.send_ms,
            f.prepare_ms,
            f.commit_ms,
        );
        if let Some(followed) = &self.followed {
            text.push_str(&format!(
                "{} pages followed on demand in {:.0} ms; {} faults, p50 {} µs, p99 {} µs\n",
                followed.pages, followed.ms, followed.faults, followed.fault_p50_us, followed.fault_p99_us
            ));
        }
        text.push_str(&format!(
            "total {:.0} ms; the root is pid {} there",
            self.total_ms, self.pid_there
        ));
        text
    }
}

/// Milliseconds of a duration, for reports.
pub fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
