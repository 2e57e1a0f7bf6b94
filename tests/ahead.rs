//! `dump --leave-running` of much memory: it is stored while the program writes to it, and what is restored from it is the
//! program as it was at one moment.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Writes to its memory all the time, gives some back and takes new, and knows what must be in each page.
const PROGRAM: &str = r#"
import array, mmap, os, struct, sys, time
PAGES = 24576
pid_file, count_file = sys.argv[1:]
count = os.open(count_file, os.O_WRONLY | os.O_CREAT, 0o644)
os.pwrite(count, b'0'.ljust(400), 0)
memory = mmap.mmap(-1, PAGES * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
expected = array.array('q', [0]) * PAGES
n = rounds = 0
def put(page, value):
    memory[page * 4096:page * 4096 + 8] = memory[page * 4096 + 4088:page * 4096 + 4096] = struct.pack('q', value)
    expected[page] = value
for page in range(0, PAGES, 2): put(page, page + 1)
guest, number = None, 0
open(pid_file, 'w').write(str(os.getpid()))
while True:
    rounds += 1
    for _ in range(300):
        n += 1
        put(n * 7919 % PAGES, n)
    gone = n * 104729 % (PAGES - 16)
    memory.madvise(mmap.MADV_DONTNEED, gone * 4096, 16 * 4096)
    for page in range(gone, gone + 16): expected[page] = 0
    if guest is None or rounds % 7 == 0:
        guest = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        number = n
        for at in range(0, 1 << 20, 4096): guest[at:at + 8] = struct.pack('q', number)
    wrong = [at for at in range(0, 1 << 20, 4096) if guest[at:at + 8] != struct.pack('q', number)]
    if rounds % 50 == 1:
        for page in range(PAGES):
            value = struct.pack('q', expected[page])
            if memory[page * 4096:page * 4096 + 8] != value or memory[page * 4096 + 4088:page * 4096 + 4096] != value:
                wrong.append(page)
    # One write(2) of always the same length: at whatever moment it is dumped, the file is there and as large.
    os.pwrite(count, ('wrong %r' % wrong[:9] if wrong else str(rounds // 50)).ljust(400)[:400].encode(), 0)
    if wrong: time.sleep(1000)
    time.sleep(0.0005)
"#;

struct Victim {
    pid: i32,
    directory: tempfile::TempDir,
}

impl Victim {
    fn start() -> Victim {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        std::fs::create_dir(path("images")).unwrap();
        let child = Command::new("setsid")
            .args(["/usr/bin/python3", "-c", PROGRAM, &path("pid"), &path("count")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        // Waited for by its number.
        drop(child);
        let victim = Victim { pid, directory };
        victim.goes_on();
        victim
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// How often it has looked at all of its memory.
    fn looks(&self) -> u64 {
        let text = std::fs::read_to_string(self.path("count")).unwrap_or_default();
        let text = text.trim();
        assert!(
            !text.starts_with("wrong"),
            "the program finds other memory than it left: {text}"
        );
        text.parse().unwrap_or(0)
    }

    fn goes_on(&self) {
        let (before, deadline) = (self.looks(), Instant::now() + Duration::from_secs(120));
        while self.looks() < before + 2 {
            assert!(Instant::now() < deadline, "the program {} does not go on", self.pid);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn run(&self, words: &[&str]) -> Output {
        let images = self.path("images").display().to_string();
        let program = env!("CARGO_BIN_EXE_whimbrel");
        let output = Command::new(program)
            .args([words, &["-D", &images, "-v4"]].concat())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
        output
    }

    fn end(&self) {
        let _ = whimbrel::kernel::sys::kill(self.pid, libc::SIGKILL);
        let pid = rustix::process::Pid::from_raw(self.pid);
        let _ = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.end();
    }
}

/// Needs root: choosing a pid and ptrace of others are not for everybody.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

#[test]
fn what_is_stored_while_the_program_writes_is_the_program_at_one_moment() {
    if !is_root() {
        return;
    }
    // What is restored has no parent: its death is for us to note.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    let victim = Victim::start();
    let pid = victim.pid.to_string();
    for script in [None, Some("/bin/true")] {
        let mut words = vec!["dump", "-t", &pid, "--leave-running"];
        words.extend(script.iter().flat_map(|script| ["--action-script", script]));
        let output = victim.run(&words);
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        let ahead = log.contains("pages stored while the tree runs");
        let watched = !log.contains("memory is not watched");
        assert_eq!(ahead, watched, "{log}");
        victim.goes_on();
        // The watch has ended: the marks that it leaves on mappings are gone.
        let marks = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        assert!(!marks.contains(" uw"), "the memory is still watched");
        victim.end();
        victim.run(&["restore", "-d"]);
        victim.goes_on();
    }
}
