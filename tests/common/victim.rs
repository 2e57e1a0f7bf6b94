//! Programs that are moved. They check themselves: after each round they say in a file how they find themselves.

use std::path::{Path, PathBuf};

use super::host::Host;
use super::wait_for;

/// Debian's Python, which links to nothing unusual.
pub const PYTHON: &str = "/usr/bin/python3";

/// What the programs of tests begin with: `report(words)`, and `check(name, got, wanted)`. A line is one write(2), so lines of
/// two copies would not mix; and each round is numbered, so two copies could not go unseen.
const HEADER: &str = "\
import os, sys, time, traceback\n\
_log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)\n\
_rounds = 0\n\
def report(*words): os.write(_log, (' '.join(map(str, words)) + '\\n').encode())\n\
def check(name, got, wanted=True):\n\
\x20   if got != wanted: report('wrong', name, repr(got)[:500], 'instead of', repr(wanted)[:500])\n\
def ready(): report('ready', os.getpid())\n\
def ok():\n\
\x20   global _rounds\n\
\x20   _rounds += 1\n\
\x20   report('ok', _rounds, os.uname().nodename)\n\
def forever(work, pause=0.01):\n\
\x20   ready()\n\
\x20   while True:\n\
\x20       try: work()\n\
\x20       except BaseException: report('wrong', traceback.format_exc().replace('\\n', ' | '))\n\
\x20       ok()\n\
\x20       time.sleep(pause)\n";

/// A program that is moved.
pub struct Victim {
    /// Its pid, as its host numbers it; the same on each host.
    pub pid: i32,
    log: PathBuf,
    errors: PathBuf,
}

impl Victim {
    /// Starts a program of `tests/programs` in a host, as a daemon: a session of its own, a child of the host's first
    /// process, and nothing of ours open.
    pub fn start(host: &Host, directory: &Path, program: &str, arguments: &[&str]) -> Victim {
        let code = std::fs::read_to_string(super::program(program)).unwrap();
        Victim::start_code(host, directory, program, &code, arguments)
    }

    /// As [`Victim::start`], with the code itself.
    pub fn start_code(host: &Host, directory: &Path, name: &str, code: &str, arguments: &[&str]) -> Victim {
        let log = directory.join(format!("{name}.log"));
        let errors = directory.join(format!("{name}.err"));
        let script = directory.join(name);
        std::fs::write(
            &script,
            format!("LOG = {:?}\n{HEADER}{code}", log.display().to_string()),
        )
        .unwrap();
        let mut words = vec![PYTHON.to_owned(), "-B".into(), script.display().to_string()];
        words.extend(arguments.iter().map(|&argument| argument.to_owned()));
        let pid = start_daemon(host, directory, &words, &errors);
        let victim = Victim { pid, log, errors };
        wait_for(&format!("{name} is ready; it says {}", victim.errors()), || {
            let lines = victim.lines();
            assert!(
                victim.alive(host),
                "{name} died: {} {:?}",
                victim.errors(),
                lines.last()
            );
            lines.iter().any(|line| line.starts_with("ready")).then_some(())
        });
        victim
    }

    /// Starts a shell script of `tests/programs` that reports as the others do.
    pub fn start_shell(host: &Host, directory: &Path, program: &str) -> Victim {
        let (log, errors) = (
            directory.join(format!("{program}.log")),
            directory.join(format!("{program}.err")),
        );
        let words = [
            "sh".to_owned(),
            super::program(program).display().to_string(),
            log.display().to_string(),
        ];
        let victim = Victim {
            pid: start_daemon(host, directory, &words, &errors),
            log,
            errors,
        };
        victim.goes_on(host);
        victim
    }

    fn alive(&self, host: &Host) -> bool {
        host.proc(self.pid, "").exists()
    }

    /// What it wrote to its standard error.
    pub fn errors(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// All that it reported.
    pub fn lines(&self) -> Vec<String> {
        let text = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&text).lines().map(str::to_owned).collect()
    }

    /// How many rounds it has done, after a look at all of them.
    ///
    /// # Panics
    /// When it found something wrong, or when a round was done twice or left out: two copies ran, or an old one.
    pub fn rounds(&self) -> usize {
        let lines = self.lines();
        let wrong: Vec<_> = lines.iter().filter(|line| line.starts_with("wrong")).take(5).collect();
        assert!(wrong.is_empty(), "the program finds itself harmed: {wrong:#?}");
        let mut rounds = 0;
        for line in lines.iter().filter(|line| line.starts_with("ok ")) {
            let number = line.split(' ').nth(1).and_then(|number| number.parse::<usize>().ok());
            assert_eq!(number, Some(rounds + 1), "a round was done twice, or left out");
            rounds += 1;
        }
        rounds
    }

    /// The host on which it did its last round, as the program itself sees it.
    pub fn whereabouts(&self) -> String {
        let lines = self.lines();
        let last = lines.iter().rev().find(|line| line.starts_with("ok "));
        let name = last.and_then(|line| line.split(' ').nth(2)).unwrap_or_default();
        name.trim_start_matches("whimbrel-test-").to_owned()
    }

    /// It must do more rounds and find nothing wrong.
    pub fn goes_on(&self, host: &Host) {
        let before = self.rounds();
        let goes_on = || (self.rounds() >= before + 3).then_some(());
        super::wait_or(goes_on, || {
            let threads = std::fs::read_dir(host.proc(self.pid, "task"))
                .into_iter()
                .flatten()
                .flatten();
            let thread = |entry: std::fs::DirEntry| {
                let read = |name: &str| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
                format!(
                    "{:.40} {} {}",
                    read("stat"),
                    read("syscall").trim(),
                    read("stack").replace('\n', " ")
                )
            };
            let threads: Vec<String> = threads.map(thread).collect();
            format!(
                "the program goes on after {before} rounds; {} {:#?} {threads:#?}",
                self.errors(),
                host.list()
            )
        });
    }

    /// It must go on, on this host.
    pub fn goes_on_at(&self, host: &Host) {
        self.goes_on(host);
        assert_eq!(self.whereabouts(), host.name, "the program runs elsewhere");
    }

    /// Does it do rounds now? Says so only after a while.
    pub fn runs(&self) -> bool {
        let before = self.rounds();
        std::thread::sleep(std::time::Duration::from_millis(300));
        self.rounds() > before
    }

    /// Its state letter in /proc on a host, if it is there.
    pub fn state(&self, host: &Host) -> Option<char> {
        let stat = host.read_proc(self.pid, "stat");
        stat.rsplit_once(") ")?.1.chars().next()
    }
}

/// Starts a daemon in a host; returns its pid there.
pub fn start_daemon(host: &Host, directory: &Path, words: &[String], output: &Path) -> i32 {
    let pid_file = directory.join("pid");
    let _ = std::fs::remove_file(&pid_file);
    // Descriptors that we got from whoever runs the tests are not the program's.
    // The shell ends at once, so the host's first process becomes the parent. In a script without job control the
    // command is not a group leader, so setsid(1) needs no fork, and its pid is the program's.
    let script = r#"for fd in /proc/self/fd/*; do fd=${fd##*/}; [ "$fd" -le 2 ] || eval "exec $fd>&-"; done; cd "$1" && log=$2 && out=$3 && shift 3
        setsid "$@" < /dev/null > "$log" 2>&1 & echo $! > "$out.new" && mv "$out.new" "$out""#;
    let mut all: Vec<String> = ["bash", "-c", script, "bash"].map(str::to_owned).to_vec();
    all.extend([directory, output, &pid_file].map(|path| path.display().to_string()));
    all.extend_from_slice(words);
    let result = host.run(&all);
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap()
}
