//! Interval timers and POSIX timers.

use whimbrel_images::proto::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};

use crate::error::{Error, Result};
use crate::procfs;
use crate::remote::{Buffer, Outcome, Program};
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// Timers of a process.
pub struct Timers;

/// Makes timer_create(2) take the id that it finds in its result argument (Linux 6.15, include/uapi/linux/prctl.h).
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
const SIGEV_THREAD_ID: u32 = 4;

impl TaskKind for Timers {
    fn name(&self) -> &'static str {
        "timers"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        if !thread.leader {
            return Ok(Box::new(|_, _| Ok(())));
        }
        let intervals: Vec<Buffer> = [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF]
            .into_iter()
            .map(|which| {
                let value = program.reserve(32);
                program.call(
                    "read an interval timer",
                    libc::SYS_getitimer,
                    &[which.into(), value.into()],
                );
                value
            })
            .collect();
        let listed = parse_list(&procfs::read(thread.pid, "timers").unwrap_or_default())?;
        let timers: Vec<_> = listed
            .into_iter()
            .map(|timer| {
                let value = program.reserve(32);
                let args = [timer.it_id.into(), value.into()];
                program.call("read a POSIX timer", libc::SYS_timer_gettime, &args);
                let overrun = program.try_call(libc::SYS_timer_getoverrun, &[timer.it_id.into()]);
                (timer, value, overrun)
            })
            .collect();
        Ok(Box::new(move |outcome, core| {
            let posix = timers.into_iter().map(|(timer, value, overrun)| PosixTimerEntry {
                isec: outcome.word(value, 0),
                insec: outcome.word(value, 8),
                vsec: outcome.word(value, 16),
                vnsec: outcome.word(value, 24),
                overrun: outcome.result(overrun).max(0) as u32,
                ..timer
            });
            core.tc.get_or_insert_default().timers = Some(TaskTimersEntry {
                real: interval(outcome, intervals[0]),
                virt: interval(outcome, intervals[1]),
                prof: interval(outcome, intervals[2]),
                posix: posix.collect(),
            });
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let (thread, leader) = (thread.core, thread.leader);
        let Some(timers) = thread.tc.as_ref().filter(|_| leader).and_then(|tc| tc.timers.as_ref()) else {
            return Ok(());
        };
        match stage {
            // Made before credentials change, armed last. Threads exist: timers may signal one of them.
            Stage::Thread if !timers.posix.is_empty() => {
                let by_id = |on: i32| {
                    [
                        PR_TIMER_CREATE_RESTORE_IDS.into(),
                        on.into(),
                        0.into(),
                        0.into(),
                        0.into(),
                    ]
                };
                program.call("restore timer ids (needs Linux 6.15)", libc::SYS_prctl, &by_id(1));
                for timer in &timers.posix {
                    let mut event = timer.sival_ptr.to_le_bytes().to_vec();
                    event.extend(timer.si_signo.to_le_bytes());
                    event.extend(timer.it_sigev_notify.to_le_bytes());
                    event.extend(timer.notify_thread_id.unwrap_or(0).to_le_bytes());
                    event.resize(64, 0);
                    let (event, id) = (program.data(&event), program.data(&timer.it_id.to_le_bytes()));
                    let args = [timer.clock_id.into(), event.into(), id.into()];
                    program.call("create a POSIX timer", libc::SYS_timer_create, &args);
                }
                program.call("restore timer ids", libc::SYS_prctl, &by_id(0));
            }
            Stage::Final => {
                for timer in &timers.posix {
                    let words = [timer.isec, timer.insec, timer.vsec, timer.vnsec];
                    let value = program.data(&words.map(u64::to_le_bytes).concat());
                    let args = [timer.it_id.into(), 0.into(), value.into(), 0.into()];
                    program.call("arm a POSIX timer", libc::SYS_timer_settime, &args);
                }
                let all = [
                    (libc::ITIMER_REAL, &timers.real),
                    (libc::ITIMER_VIRTUAL, &timers.virt),
                    (libc::ITIMER_PROF, &timers.prof),
                ];
                for (which, timer) in all {
                    // The kernel arms an expired ITIMER_REAL again only when its SIGALRM is delivered (dequeue_signal in
                    // kernel/signal.c). One that is pending looks as if it were off, but for its interval.
                    let expired = timer.vsec == 0 && timer.vusec == 0;
                    let value = if expired {
                        [timer.isec, timer.iusec]
                    } else {
                        [timer.vsec, timer.vusec]
                    };
                    if value != [0, 0] {
                        let words = [timer.isec, timer.iusec, value[0], value[1]];
                        let value = program.data(&words.map(u64::to_le_bytes).concat());
                        let args = [which.into(), value.into(), 0.into()];
                        program.call("arm an interval timer", libc::SYS_setitimer, &args);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}

fn interval(outcome: &Outcome, value: Buffer) -> ItimerEntry {
    let word = |at| outcome.word(value, at);
    ItimerEntry {
        isec: word(0),
        iusec: word(8),
        vsec: word(16),
        vusec: word(24),
    }
}

/// `/proc/PID/timers` (proc(5)): `ID: 1`, `signal: 10/0x…`, `notify: signal/pid.12`, `ClockID: 0`.
fn parse_list(text: &[u8]) -> Result<Vec<PosixTimerEntry>> {
    let text = String::from_utf8_lossy(text);
    let mut timers: Vec<PosixTimerEntry> = Vec::new();
    for line in text.lines() {
        let bad = || Error::new("parse timers").because(format!("unexpected line {line:?}"));
        let Some((name, value)) = line.split_once(": ") else {
            continue;
        };
        if name == "ID" {
            timers.push(PosixTimerEntry {
                it_id: value.trim().parse().map_err(|_| bad())?,
                ..Default::default()
            });
            continue;
        }
        let Some(timer) = timers.last_mut() else { continue };
        match name {
            "signal" => {
                let (signal, pointer) = value.split_once('/').ok_or_else(bad)?;
                timer.si_signo = signal.parse().map_err(|_| bad())?;
                let digits = pointer.trim_start_matches("0x");
                // %px of a null pointer prints zeros.
                timer.sival_ptr = u64::from_str_radix(digits, 16).map_err(|_| bad())?;
            }
            "notify" => {
                let (how, whom) = value.split_once('/').ok_or_else(bad)?;
                timer.it_sigev_notify = match how {
                    "signal" => libc::SIGEV_SIGNAL as u32,
                    "none" => libc::SIGEV_NONE as u32,
                    "thread" => libc::SIGEV_THREAD as u32,
                    _ => return Err(bad()),
                };
                if let Some(tid) = whom.strip_prefix("tid.") {
                    timer.it_sigev_notify |= SIGEV_THREAD_ID;
                    timer.notify_thread_id = Some(tid.parse().map_err(|_| bad())?);
                }
            }
            "ClockID" => timer.clock_id = value.parse::<i32>().map_err(|_| bad())? as u32,
            _ => {}
        }
    }
    Ok(timers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_the_kernel_is_understood() {
        let text = b"ID: 3\nsignal: 34/0000000000001234\nnotify: signal/tid.77\nClockID: 1\nID: 5\nsignal: 0/0000000000000000\nnotify: none/pid.7\nClockID: -6\n";
        let timers = parse_list(text).unwrap();
        assert_eq!(
            (timers[0].it_id, timers[0].si_signo, timers[0].sival_ptr),
            (3, 34, 0x1234)
        );
        assert_eq!((timers[0].it_sigev_notify, timers[0].notify_thread_id), (4, Some(77)));
        assert_eq!((timers[1].it_sigev_notify, timers[1].clock_id as i32), (1, -6));
    }
}
