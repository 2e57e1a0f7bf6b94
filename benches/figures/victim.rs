//! The victim: a process with memory that it keeps writing, which measures from inside how long it did not run.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::Result;

/// Pages that it rewrites in each second.
pub const WRITES: u64 = 10_000;

const WORDS_PER_PAGE: usize = 4096 / 8;
/// How often the measuring thread looks at the clock. It does not spin: it would take a processor from the hosts.
const TICK: Duration = Duration::from_micros(100);
/// Gaps from this length on are noted.
const GAP: u64 = 500_000;
/// Bytes of the file with the notes.
const NOTES: u64 = 4 << 20;

/// Nanoseconds of the monotonic clock, the same in all processes of this machine.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// The victim itself: `DIRECTORY MIB PAGES_PER_SECOND THREADS`.
pub fn run(arguments: &[String]) -> ! {
    let number = |index: usize| {
        arguments
            .get(index)
            .and_then(|text| text.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let directory = PathBuf::from(arguments.first().cloned().unwrap_or_default());
    let (mib, writes, threads) = (number(1), number(2), number(3));
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut memory: Vec<u64> = (0..mib << 17).map(|_| random.next()).collect();
    for _ in 1..threads {
        std::thread::spawn(|| std::thread::sleep(Duration::from_secs(1 << 20)));
    }
    if writes > 0 {
        let gaps = File::create(directory.join("gaps")).expect("the directory can be written to");
        // Its size stays, or a restore would find it another file than at the dump.
        gaps.set_len(NOTES).expect("the file can grow");
        std::thread::spawn(move || note_gaps(&gaps));
    }
    fs::write(directory.join("ready"), "").expect("the directory can be written to");
    if writes == 0 {
        std::thread::sleep(Duration::from_secs(1 << 20));
    }
    let pages = memory.len() / WORDS_PER_PAGE;
    let mut owed = 0.0;
    let mut last = Instant::now();
    loop {
        std::thread::sleep(Duration::from_millis(1));
        // What it did not write while it was stopped it does not make up for.
        owed += (last.elapsed().as_secs_f64() * writes as f64).min(writes as f64 / 100.0);
        last = Instant::now();
        while owed >= 1.0 {
            let page = random.next() as usize % pages.max(1);
            let words = memory[page * WORDS_PER_PAGE..].iter_mut().take(WORDS_PER_PAGE);
            words.for_each(|word| *word = random.next());
            owed -= 1.0;
        }
    }
}

fn note_gaps(gaps: &File) {
    // It must wait for the tool only, not for its turn behind the tool's threads: both hosts share these processors.
    let lowest = libc::sched_param { sched_priority: 1 };
    // SAFETY: sched_setscheduler(2) reads the parameter, and sets the policy of this thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &lowest) };
    let (mut last, mut at) = (now(), 0);
    loop {
        std::thread::sleep(TICK);
        let this = now();
        if this - last > GAP {
            let note = format!("{last} {this}\n");
            if at + (note.len() as u64) < NOTES && gaps.write_all_at(note.as_bytes(), at).is_ok() {
                at += note.len() as u64;
            }
        }
        last = now();
    }
}

/// A running victim. It is killed with this handle.
pub struct Victim {
    child: Child,
    directory: PathBuf,
}

impl Victim {
    /// Starts one, in a session of its own, and waits until its memory is filled.
    pub fn start(directory: &Path, mib: u64, writes: u64, threads: u64) -> Result<Victim> {
        fs::create_dir_all(directory)?;
        for old in ["gaps", "ready"] {
            let _ = fs::remove_file(directory.join(old));
        }
        let child = Command::new("setsid")
            .arg(std::env::current_exe()?)
            .arg("--run-victim")
            .arg(directory)
            .args([mib, writes, threads].map(|number| number.to_string()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let mut victim = Victim {
            child,
            directory: directory.to_owned(),
        };
        let started = Instant::now();
        while !directory.join("ready").exists() {
            if victim.child.try_wait()?.is_some() || started.elapsed() > Duration::from_secs(120) {
                return Err("the victim did not start".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(100));
        Ok(victim)
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Its longest pause between two times of [`now`], in milliseconds; `None` when it noted none.
    pub fn longest_pause(&self, from: u64, to: u64) -> Result<Option<f64>> {
        let text = fs::read_to_string(self.directory.join("gaps"))?;
        let gap = |line: &str| {
            let (start, end) = line.split_once(' ')?;
            Some((start.parse::<u64>().ok()?, end.parse::<u64>().ok()?))
        };
        let inside = text
            .lines()
            .filter_map(gap)
            .filter(|&(start, end)| end > from && start < to);
        let longest = inside.map(|(start, end)| end - start).max();
        Ok(longest.map(|nanoseconds| nanoseconds as f64 / 1e6))
    }

    /// Waits for a victim that was killed by its dump, so that its pid is free.
    pub fn reap(&mut self) -> Result<()> {
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
