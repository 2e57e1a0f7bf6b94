//! Migrations between this host and one made out of namespaces, over loopback.

use std::time::Duration;

use serde_json::Value;

use crate::host::{Host, run, verb};
use crate::table::{Table, median};
use crate::victim::{Victim, WRITES, now};
use crate::{Result, Setup};

/// What one migration took.
struct Moved {
    /// The victim's own longest pause, in milliseconds.
    pause: f64,
    /// Processor seconds of both sides.
    cpu: f64,
    /// The tool's report.
    report: Value,
}

impl Moved {
    fn number(&self, path: &str) -> f64 {
        self.report.pointer(path).and_then(Value::as_f64).unwrap_or(f64::NAN)
    }

    fn gigabytes(&self) -> f64 {
        self.number("/pages") * 4096.0 / 1e9
    }
}

fn migrate(setup: &Setup, mib: u64, mode: &str) -> Result<Moved> {
    let host = Host::start(setup)?;
    let mut victim = Victim::start(&setup.path("victim"), mib, WRITES, 1)?;
    let (before, from) = (host.cpu()?, now());
    let mut command = verb(setup, "migrate");
    command.args([
        &victim.pid().to_string(),
        &host.address.to_string(),
        "--mode",
        mode,
        "--journal",
    ]);
    let took = run(command.arg(setup.path("journal")))?;
    let cpu = took.cpu + host.cpu()? - before;
    std::thread::sleep(Duration::from_millis(200));
    let pause = victim.longest_pause(from, now())?;
    victim.reap()?;
    let mut events = took
        .output
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let report = events
        .rfind(|event| event["event"] == "done")
        .ok_or("the migration has no report")?;
    Ok(Moved {
        // It notes the pause when it runs there: no note, no life.
        pause: pause.ok_or("the victim does not run at the destination")?,
        cpu,
        report,
    })
}

/// Where frozen time went, in medians.
fn parts(all: &[Moved]) -> String {
    let part = |name: &str| {
        let samples: Vec<f64> = all
            .iter()
            .map(|moved| moved.number(&format!("/frozen/{name}_ms")))
            .collect();
        format!("{name} {:.1}", median(&samples))
    };
    ["freeze", "collect", "files", "send", "prepare", "commit"]
        .map(part)
        .join(", ")
}

fn times(setup: &Setup, mib: u64, mode: &str) -> Result<Vec<Moved>> {
    (0..setup.runs).map(|_| migrate(setup, mib, mode)).collect()
}

fn collect(all: &[Moved], value: impl Fn(&Moved) -> f64) -> Vec<f64> {
    all.iter().map(value).collect()
}

/// Pre-copy: what the victim feels, by its size, and what it costs.
pub fn pre_copy(setup: &Setup, table: &mut Table) -> Result<()> {
    let mut first = None;
    for &mib in &setup.sizes {
        let all = times(setup, mib, "pre-copy")?;
        let pauses = collect(&all, |moved| moved.pause);
        let (least, base) = *first.get_or_insert((mib, median(&pauses)));
        let ratio = format!("{:.2} times that of {least} MiB", median(&pauses) / base);
        table.row(
            &format!("longest pause in migrate, {mib} MiB"),
            "ms",
            &pauses,
            "< 30 ms",
            &ratio,
        );
        let frozen = collect(&all, |moved| moved.number("/frozen/total_ms"));
        table.row("  frozen, as the tool says", "ms", &frozen, "", &parts(&all));
        let speed = collect(&all, |moved| moved.gigabytes() * 1e6 / moved.number("/total_ms"));
        let rounds = collect(&all, |moved| {
            moved.report["rounds"].as_array().map_or(0, Vec::len) as f64
        });
        let remark = format!("{:.0} rounds, all in all", median(&rounds));
        table.row("  speed", "MB/s", &speed, "", &remark);
        let cpu = collect(&all, |moved| moved.cpu / moved.gigabytes());
        table.row("  processor time of both sides", "s/GB", &cpu, "", "");
    }
    Ok(())
}

/// Post-copy: the pause, and how long page faults wait while the rest is fetched.
pub fn post_copy(setup: &Setup, table: &mut Table) -> Result<()> {
    let mib = setup.usual_size();
    let all = times(setup, mib, "post-copy")?;
    let pauses = collect(&all, |moved| moved.pause);
    table.row(
        &format!("longest pause in post-copy, {mib} MiB"),
        "ms",
        &pauses,
        "",
        "with faults that wait",
    );
    let frozen = collect(&all, |moved| moved.number("/frozen/total_ms"));
    table.row("  frozen, as the tool says", "ms", &frozen, "", &parts(&all));
    let faults = collect(&all, |moved| moved.number("/followed/faults"));
    let p50 = collect(&all, |moved| moved.number("/followed/fault_p50_us"));
    let remark = format!("{:.0} faults, background fetch on", median(&faults));
    table.row("  a page fault, p50", "µs", &p50, "< 150 µs", &remark);
    let p99 = collect(&all, |moved| moved.number("/followed/fault_p99_us"));
    table.row("  a page fault, p99", "µs", &p99, "", "");
    let speed = collect(&all, |moved| {
        moved.number("/followed/pages") * 4.096 / moved.number("/followed/ms")
    });
    table.row("  until all memory is there", "MB/s", &speed, "", "");
    Ok(())
}
