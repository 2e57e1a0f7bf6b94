//! Statistics: `stats-dump` and `stats-restore`, and printing them.

use std::time::Duration;

use whimbrel::dump::Times;
use whimbrel::dump::memory::Amount;
use whimbrel::error::{Context, Result};
use whimbrel_images::entry;
use whimbrel_images::proto::{DumpStatsEntry, RestoreStatsEntry, StatsEntry};

use super::workspace::Workspace;

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

/// The statistics of a dump.
pub fn of_dump(times: &Times, amount: &Amount) -> StatsEntry {
    let dump = DumpStatsEntry {
        freezing_time: micros(times.freezing),
        frozen_time: micros(times.frozen),
        memdump_time: micros(times.memory),
        // Reading and writing overlap: the time is that of both.
        memwrite_time: micros(times.memory),
        pages_scanned: amount.pages_scanned,
        pages_skipped_parent: amount.pages_in_parent,
        pages_written: amount.pages_written,
        pages_lazy: 0,
        ..DumpStatsEntry::default()
    };
    StatsEntry {
        dump: Some(dump),
        restore: None,
    }
}

/// The statistics of a restore.
pub fn of_restore(forking: Duration, whole: Duration, pages: u64) -> StatsEntry {
    let restore = RestoreStatsEntry {
        pages_compared: 0,
        pages_skipped_cow: 0,
        forking_time: micros(forking),
        restore_time: micros(whole),
        pages_restored: Some(pages),
    };
    StatsEntry {
        dump: None,
        restore: Some(restore),
    }
}

/// Saves statistics in the work directory, and prints them if `print`.
///
/// # Errors
/// When they cannot be written.
pub fn save(stats: &StatsEntry, workspace: &Workspace, print: bool) -> Result<()> {
    let name = if stats.dump.is_some() {
        "stats-dump"
    } else {
        "stats-restore"
    };
    entry::write_one(&workspace.open_work()?, name, stats).context("write statistics")?;
    if print {
        print_out(stats);
    }
    Ok(())
}

fn print_out(stats: &StatsEntry) {
    if let Some(dump) = &stats.dump {
        println!("Displaying dump stats:");
        println!("Freezing time: {} us", dump.freezing_time);
        println!("Frozen time: {} us", dump.frozen_time);
        println!("Memory dump time: {} us", dump.memdump_time);
        println!("Memory write time: {} us", dump.memwrite_time);
        println!(
            "Memory pages scanned: {} (0x{:x})",
            dump.pages_scanned, dump.pages_scanned
        );
        let skipped = dump.pages_skipped_parent;
        println!("Memory pages skipped from parent: {skipped} (0x{skipped:x})");
        println!(
            "Memory pages written: {} (0x{:x})",
            dump.pages_written, dump.pages_written
        );
        println!("Lazy memory pages: {} (0x{:x})", dump.pages_lazy, dump.pages_lazy);
    }
    if let Some(restore) = &stats.restore {
        println!("Displaying restore stats:");
        let pages = restore.pages_restored.unwrap_or(0);
        println!("Pages restored: {pages} (0x{pages:x})");
        println!("Restore time: {} us", restore.restore_time);
        println!("Forking time: {} us", restore.forking_time);
    }
}
