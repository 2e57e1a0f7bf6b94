//! timerfds: what remains is carried, so time does not pass between dump and restore.

use std::os::fd::{AsFd, OwnedFd};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use whimbrel_images::proto::{FdTypes, FileEntry, TimerfdEntry};

use crate::error::{Context, Error, Result};
use crate::kernel::files;
use crate::procfs::{self, fdinfo::FdInfo};
use crate::resource::FileKind;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile};

/// Timers that are read.
pub struct TimerFd;

const CLOCKS: &[(u32, TimerfdClockId)] = &[
    (libc::CLOCK_REALTIME as u32, TimerfdClockId::Realtime),
    (libc::CLOCK_MONOTONIC as u32, TimerfdClockId::Monotonic),
    (libc::CLOCK_BOOTTIME as u32, TimerfdClockId::Boottime),
    (libc::CLOCK_REALTIME_ALARM as u32, TimerfdClockId::RealtimeAlarm),
    (libc::CLOCK_BOOTTIME_ALARM as u32, TimerfdClockId::BoottimeAlarm),
];

impl FileKind for TimerFd {
    fn name(&self) -> &'static str {
        "timerfd"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Timerfd]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.link == b"anon_inode:[timerfd]"
    }

    fn dump(&self, file: &OpenFile, id: u32, _: &mut FileDump<'_>) -> Result<FileEntry> {
        // An interval timer that went off stands still until it is read or asked: fdinfo then shows no time left, as if
        // it were disarmed. Asking starts the next interval and counts the ones that passed, as reading would.
        rustix::time::timerfd_gettime(&file.handle)
            .map_err(std::io::Error::from)
            .context("ask a timer")?;
        let info = procfs::fdinfo::parse(&procfs::read(file.pid, &format!("fdinfo/{}", file.fd))?);
        let mut tfd = parse(&info)
            .ok_or_else(|| Error::new("dump a timerfd").because("fdinfo does not tell the state of the timer"))?;
        if tfd.ticks != 0 && (tfd.vsec, tfd.vnsec) == (0, 0) {
            // It went off again just now: the next time is one interval away.
            (tfd.vsec, tfd.vnsec) = (tfd.isec, tfd.insec);
        }
        (tfd.id, tfd.flags, tfd.fown) = (id, file.flags(), file.owner());
        Ok(FileEntry {
            r#type: FdTypes::Timerfd as i32,
            id,
            tfd: Some(tfd),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, _: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let entry = timer_of(entry)?;
        let clock = clock_of(entry)?;
        let file = rustix::time::timerfd_create(clock, TimerfdFlags::CLOEXEC)
            .map_err(std::io::Error::from)
            .context("make a timerfd")?;
        fd::restore_flags(file.as_fd(), entry.flags, &entry.fown)?;
        Ok(file)
    }

    /// Timers are started as late as possible: the time that a restore takes is none of the program's.
    fn resume(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<()> {
        let timer = timer_of(entry)?;
        let Some(file) = restore.opened.get(&entry.id) else {
            return Ok(());
        };
        start(timer, file)?;
        if timer.ticks != 0 {
            files::set(file.as_fd(), files::TFD_IOC_SET_TICKS, &timer.ticks.to_ne_bytes())
                .context("set the ticks of a timer")?;
        }
        Ok(())
    }
}

fn start(timer: &TimerfdEntry, file: &OwnedFd) -> Result<()> {
    let time = |sec: u64, nsec: u64| Timespec {
        tv_sec: sec as i64,
        tv_nsec: nsec as i64,
    };
    let mut setting = Itimerspec {
        it_interval: time(timer.isec, timer.insec),
        it_value: time(timer.vsec, timer.vnsec),
    };
    let flags = TimerfdTimerFlags::from_bits_truncate(timer.settime_flags);
    if flags.contains(TimerfdTimerFlags::ABSTIME) && setting.it_value != time(0, 0) {
        // What remains, from now on: the moment itself is not in images.
        let clock = match clock_of(timer)? {
            TimerfdClockId::Realtime | TimerfdClockId::RealtimeAlarm => rustix::time::ClockId::Realtime,
            TimerfdClockId::Boottime | TimerfdClockId::BoottimeAlarm => rustix::time::ClockId::Boottime,
            _ => rustix::time::ClockId::Monotonic,
        };
        let now = rustix::time::clock_gettime(clock);
        setting.it_value = now
            .checked_add(setting.it_value)
            .ok_or_else(|| Error::new("set a timer").because("its time is out of range"))?;
    }
    rustix::time::timerfd_settime(file, flags, &setting)
        .map_err(std::io::Error::from)
        .context("set a timer")
        .map(drop)
}

fn timer_of(entry: &FileEntry) -> Result<&TimerfdEntry> {
    let entry = entry.tfd.as_ref();
    entry.ok_or_else(|| Error::new("restore a timerfd").because("the image has no timerfd entry"))
}

fn clock_of(entry: &TimerfdEntry) -> Result<TimerfdClockId> {
    let found = CLOCKS.iter().find(|(number, _)| *number == entry.clockid);
    found
        .map(|&(_, clock)| clock)
        .ok_or_else(|| Error::new("restore a timerfd").because(format!("there is no clock {}", entry.clockid)))
}

fn parse(info: &FdInfo) -> Option<TimerfdEntry> {
    let pair = |name: &str| {
        let (sec, nsec) = info
            .field(name)?
            .strip_prefix('(')?
            .strip_suffix(')')?
            .split_once(", ")?;
        Some((sec.parse().ok()?, nsec.parse().ok()?))
    };
    let ((vsec, vnsec), (isec, insec)) = (pair("it_value")?, pair("it_interval")?);
    Some(TimerfdEntry {
        clockid: info.field("clockid")?.parse().ok()?,
        ticks: info.field("ticks")?.parse().ok()?,
        settime_flags: u32::from_str_radix(info.field("settime flags")?, 8).ok()?,
        vsec,
        vnsec,
        isec,
        insec,
        ..TimerfdEntry::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fd::fixture;
    use std::time::{Duration, Instant};

    fn timer(clock: TimerfdClockId, flags: TimerfdTimerFlags, value: Timespec, interval: Timespec) -> OwnedFd {
        let file = rustix::time::timerfd_create(clock, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC).unwrap();
        let setting = Itimerspec {
            it_interval: interval,
            it_value: value,
        };
        rustix::time::timerfd_settime(&file, flags, &setting).unwrap();
        file
    }

    fn time(sec: i64, nsec: i64) -> Timespec {
        Timespec {
            tv_sec: sec,
            tv_nsec: nsec,
        }
    }

    fn fires_within(file: &OwnedFd, wait: Duration) -> Option<u64> {
        let end = Instant::now() + wait;
        loop {
            let mut ticks = [0; 8];
            if rustix::io::read(file, &mut ticks).is_ok() {
                return Some(u64::from_ne_bytes(ticks));
            }
            if Instant::now() > end {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_timer_goes_off_after_what_remained_when_it_was_dumped() {
        for &(_, clock) in CLOCKS {
            let file = timer(clock, TimerfdTimerFlags::empty(), time(0, 300_000_000), time(0, 0));
            let dumped = fixture::dump(&[&file]);
            let left = dumped.entries[&1].tfd.as_ref().map_or(0, |timer| timer.vnsec);
            assert_ne!(fires_within(&file, Duration::from_secs(5)), None);
            let restored = Instant::now();
            let copy = dumped.restore().remove(0);
            assert_eq!(fires_within(&copy, Duration::from_secs(5)), Some(1), "{clock:?}");
            assert!(
                left > 0 && restored.elapsed() >= Duration::from_nanos(left),
                "{clock:?}"
            );
        }
    }

    #[test]
    fn ticks_that_nobody_read_are_kept_and_the_interval_goes_on() {
        let file = timer(
            TimerfdClockId::Monotonic,
            TimerfdTimerFlags::empty(),
            time(0, 1),
            time(0, 60_000_000),
        );
        std::thread::sleep(Duration::from_millis(140));
        let copy = fixture::carry(&file);
        assert!(fires_within(&copy, Duration::ZERO) >= Some(3));
        assert!(fires_within(&copy, Duration::from_secs(5)).is_some());
        assert!(fires_within(&copy, Duration::from_secs(5)).is_some());
    }

    #[test]
    fn a_timer_that_went_off_once_does_not_go_off_again() {
        let file = timer(
            TimerfdClockId::Boottime,
            TimerfdTimerFlags::empty(),
            time(0, 1),
            time(0, 0),
        );
        std::thread::sleep(Duration::from_millis(5));
        let copy = fixture::carry(&file);
        assert_eq!(fires_within(&copy, Duration::ZERO), Some(1));
        assert_eq!(fires_within(&copy, Duration::from_millis(20)), None);
    }

    #[test]
    fn absolute_and_cancellable_timers_stay_so() {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        let file = timer(
            TimerfdClockId::Realtime,
            flags,
            time(now.tv_sec + 100, 0),
            time(0, 70_000),
        );
        let copy = fixture::carry(&file);
        let settings = |file: &OwnedFd| {
            let lines = fixture::info(file).1;
            lines
                .into_iter()
                .filter(|line| !line.starts_with("it_value"))
                .collect::<Vec<_>>()
        };
        assert_eq!(settings(&copy), settings(&file));
        let left = rustix::time::timerfd_gettime(&copy).unwrap().it_value;
        assert!((98..=100).contains(&left.tv_sec), "{left:?}");
    }

    #[test]
    fn a_disarmed_timer_stays_disarmed() {
        let file = rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC).unwrap();
        let copy = fixture::carry(&file);
        assert_eq!(fixture::info(&copy), fixture::info(&file));
    }
}
