//! Dump and restore as users run them: the whole verb, a process of its own.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::host::{fresh, run, verb};
use crate::table::Table;
use crate::victim::{Victim, WRITES, now};
use crate::{Result, Setup};

/// Times of one dump, in milliseconds.
struct Dumped {
    whole: f64,
    frozen: f64,
}

fn dump_once(setup: &Setup, pid: i32, images: &Path, leave_running: bool) -> Result<Dumped> {
    fresh(images)?;
    let mut command = verb(setup, "dump");
    command
        .args(["--display-stats", "-t", &pid.to_string(), "-D"])
        .arg(images);
    if leave_running {
        command.arg("--leave-running");
    }
    let took = run(&mut command)?;
    let frozen = took.output.lines().find_map(|line| line.strip_prefix("Frozen time: "));
    let frozen = frozen.and_then(|text| text.trim_end_matches(" us").parse::<f64>().ok());
    Ok(Dumped {
        whole: took.seconds * 1e3,
        frozen: frozen.ok_or("the dump has no statistics")? / 1e3,
    })
}

fn restore_once(setup: &Setup, images: &Path) -> Result<f64> {
    let mut command = verb(setup, "restore");
    command.arg("-d").arg("-D").arg(images);
    Ok(run(&mut command)?.seconds * 1e3)
}

/// Ends a restored process, which is ours as its subreaper.
fn end(pid: i32) -> Result<()> {
    let pid = Pid::from_raw(pid).ok_or("there is no pid")?;
    kill_process(pid, Signal::KILL)?;
    waitpid(Some(pid), WaitOptions::empty())?;
    Ok(())
}

struct Both {
    dumps: Vec<Dumped>,
    restores: Vec<f64>,
}

impl Both {
    fn whole(&self) -> Vec<f64> {
        self.dumps.iter().map(|dumped| dumped.whole).collect()
    }

    fn frozen(&self) -> Vec<f64> {
        self.dumps.iter().map(|dumped| dumped.frozen).collect()
    }
}

/// Dumps a victim, which is killed for it, and restores it, again and again.
fn dump_and_restore(setup: &Setup, mib: u64, writes: u64) -> Result<Both> {
    let images = setup.path("images");
    let mut victim = Victim::start(&setup.path("victim"), mib, writes, 1)?;
    let pid = victim.pid();
    let (mut dumps, mut restores) = (Vec::new(), Vec::new());
    for number in 0..setup.runs {
        dumps.push(dump_once(setup, pid, &images, false)?);
        match number {
            0 => victim.reap()?,
            _ => drop(waitpid(Pid::from_raw(pid), WaitOptions::empty())?),
        }
        restores.push(restore_once(setup, &images)?);
        std::thread::sleep(Duration::from_millis(50));
    }
    end(pid)?;
    fresh(&images)?;
    Ok(Both { dumps, restores })
}

/// A process of one thread and next to no memory.
pub fn small(setup: &Setup, table: &mut Table) -> Result<()> {
    let both = dump_and_restore(setup, 0, 0)?;
    table.row("dump a small process", "ms", &both.whole(), "< 10 ms", "the whole verb");
    table.row("  frozen part of it", "ms", &both.frozen(), "", "");
    table.row("restore it", "ms", &both.restores, "< 10 ms", "the whole verb");
    Ok(())
}

/// Dump and restore of 1 GiB, and the pause of a dump by size.
pub fn dump(setup: &Setup, table: &mut Table) -> Result<()> {
    let mib = setup.usual_size();
    let both = dump_and_restore(setup, mib, WRITES)?;
    table.row(
        &format!("dump {mib} MiB to memory"),
        "ms",
        &both.whole(),
        "< 500 ms",
        "the whole verb",
    );
    table.row("  frozen part of it", "ms", &both.frozen(), "", "");
    table.row(
        &format!("restore {mib} MiB from memory"),
        "ms",
        &both.restores,
        "< 400 ms",
        "the whole verb",
    );
    for &mib in &setup.sizes {
        let victim = Victim::start(&setup.path("victim"), mib, WRITES, 1)?;
        let quiet = now();
        std::thread::sleep(Duration::from_secs(1));
        let quiet = victim.longest_pause(quiet, now())?.unwrap_or(0.0);
        let (mut pauses, mut whole) = (Vec::new(), Vec::new());
        for _ in 0..setup.runs {
            let from = now();
            whole.push(dump_once(setup, victim.pid(), &setup.path("images"), true)?.whole);
            std::thread::sleep(Duration::from_millis(50));
            pauses.extend(victim.longest_pause(from, now())?);
        }
        let remark = format!("{quiet:.1} ms in a second without a dump");
        table.row(
            &format!("longest pause in dump --leave-running, {mib} MiB"),
            "ms",
            &pauses,
            "",
            &remark,
        );
        table.row("  the whole of it", "ms", &whole, "", "");
    }
    fresh(&setup.path("images"))
}

/// The same with CRIU, if it can be done here.
pub fn criu(setup: &Setup, table: &mut Table) -> Result<()> {
    let name = "dump and restore with CRIU";
    let checked = Command::new("criu").arg("check").stdin(Stdio::null()).output();
    let why = match &checked {
        Err(error) => Some(format!("criu cannot be started: {error}")),
        Ok(output) if !output.status.success() => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
            Some(format!("criu check fails on this kernel: {}", last.trim()))
        }
        Ok(_) => None,
    };
    if let Some(why) = why {
        table.absent(name, &why);
        return Ok(());
    }
    for (mib, what) in [(0, "a small process"), (setup.usual_size(), "a large process")] {
        let ours = dump_and_restore(setup, mib, 0)?;
        let images = setup.path("criu");
        let (mut dumps, mut restores) = (Vec::new(), Vec::new());
        let mut victim = Victim::start(&setup.path("victim"), mib, 0, 1)?;
        let pid = victim.pid();
        for number in 1..=setup.runs {
            fresh(&images)?;
            let mut command = Command::new("criu");
            command.args(["dump", "-t", &pid.to_string(), "-D"]).arg(&images);
            if number < setup.runs {
                command.arg("--leave-running");
            }
            dumps.push(run(&mut command)?.seconds * 1e3);
        }
        victim.reap()?;
        for _ in 0..setup.runs {
            restores.push(run(Command::new("criu").args(["restore", "-d", "-D"]).arg(&images))?.seconds * 1e3);
            std::thread::sleep(Duration::from_millis(50));
            end(pid)?;
        }
        fresh(&images)?;
        let ratio = |theirs: &[f64], ours: &[f64]| {
            let (theirs, ours) = (crate::table::median(theirs), crate::table::median(ours));
            format!("{:.1} times ours", theirs / ours)
        };
        table.row(
            &format!("criu dump, {what}"),
            "ms",
            &dumps,
            "",
            &ratio(&dumps, &ours.whole()),
        );
        table.row(
            &format!("criu restore, {what}"),
            "ms",
            &restores,
            "",
            &ratio(&restores, &ours.restores),
        );
    }
    Ok(())
}
