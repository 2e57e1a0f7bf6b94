//! What driving a process from outside costs, measured through the library on this thread.

use std::time::Instant;

use whimbrel::dump::{self, Prepared, track};
use whimbrel::procfs::{self, maps};
use whimbrel::remote::{Gadgets, Program, StubProcess, tracee};

use crate::table::{Table, median};
use crate::victim::{Victim, WRITES};
use crate::{Result, Setup};

fn microseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}

fn getpids(count: usize) -> Program {
    let mut program = Program::new();
    for _ in 0..count {
        program.call("getpid", libc::SYS_getpid, &[]);
    }
    program
}

/// Injected calls, programs, seizing and curing.
pub fn remote(setup: &Setup, table: &mut Table) -> Result<()> {
    let victim = Victim::start(&setup.path("victim"), 1, 0, 1)?;
    let pid = victim.pid();
    let mappings = maps::parse(&procfs::read(pid, "maps")?)?;
    let gadgets = Gadgets::find(pid, &mappings, &mut Default::default())?;
    let (leader, _) = tracee::seize(pid, false)?.stop()?.map_err(|_| "the victim died")?;
    let (mut stub, mut visitor) = StubProcess::inject(leader, &mappings, gadgets)?;
    let mut measure = |calls: usize| -> Result<Vec<f64>> {
        let program = getpids(calls);
        let mut medians = Vec::new();
        for _ in 0..setup.runs {
            let mut samples = Vec::new();
            for _ in 0..200 {
                let begun = Instant::now();
                stub.run(&mut visitor, &program)?;
                samples.push(microseconds(begun));
            }
            medians.push(median(&samples));
        }
        Ok(medians)
    };
    let (one, thousand) = (measure(1)?, measure(1000)?);
    stub.remove(visitor)?.detach(0)?;
    let one = table.row("one injected call, there and back", "µs", &one, "", "");
    let remark = format!("{:.1} times one call", median(&thousand) / one);
    table.row("a program of 1,000 calls", "µs", &thousand, "", &remark);
    drop(victim);

    let mut base = None;
    for threads in [1, 10, 100] {
        let victim = Victim::start(&setup.path("victim"), 1, 0, threads)?;
        let samples: Vec<f64> = (0..setup.runs.max(5))
            .map(|_| seize_and_cure(victim.pid()))
            .collect::<Result<_>>()?;
        let per = format!("{:.1} µs a thread", median(&samples) * 1e3 / threads as f64);
        let name = format!("seize, visit and cure {threads} threads");
        let middle = table.row(&name, "ms", &samples, "", &per);
        base.get_or_insert(middle);
    }
    Ok(())
}

/// All of a freeze but memory: every thread is stopped, runs a program, and goes on as if nothing had been.
fn seize_and_cure(pid: i32) -> Result<f64> {
    let prepared = Prepared::look(pid)?;
    let begun = Instant::now();
    let frozen = dump::freeze(pid, prepared, &dump::Options::default())?;
    frozen.tree.resume()?;
    Ok(microseconds(begun) / 1e3)
}

/// Arming the tracker, and one scan.
pub fn track(setup: &Setup, table: &mut Table) -> Result<()> {
    let mib = setup.usual_size();
    let victim = Victim::start(&setup.path("victim"), mib, WRITES, 1)?;
    let pid = victim.pid();
    let (mut attach, mut arm, mut scan, mut found) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..setup.runs {
        let mut cache = Default::default();
        let begun = Instant::now();
        let mut tracker = track::start(pid, &mut cache)?;
        attach.push(microseconds(begun) / 1e3);
        let maps = || -> Result<_> { Ok(maps::parse(&procfs::read(pid, "maps")?)?) };
        let now = maps()?;
        let begun = Instant::now();
        tracker.look(&now)?;
        arm.push(microseconds(begun) / 1e3);
        std::thread::sleep(std::time::Duration::from_millis(100));
        let now = maps()?;
        let begun = Instant::now();
        found.push(tracker.look(&now)?.dirty.pages() as f64);
        scan.push(microseconds(begun) / 1e3);
    }
    table.row(
        "enter the process for a userfaultfd",
        "ms",
        &attach,
        "",
        "the victim is stopped for a part of it",
    );
    table.row(&format!("arm {mib} MiB, first look"), "ms", &arm, "", "the victim runs");
    let remark = format!("{:.0} pages were written in 100 ms", median(&found));
    table.row(&format!("scan {mib} MiB and arm again"), "ms", &scan, "", &remark);
    Ok(())
}
