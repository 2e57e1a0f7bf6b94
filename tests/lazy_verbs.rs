//! `restore --lazy-pages`, `lazy-pages` and `dump --lazy-pages`: memory that follows is whole in the end, and never zeros.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const WHIMBREL: &str = env!("CARGO_BIN_EXE_whimbrel");
const LIMIT: Duration = Duration::from_secs(40);

/// Needs root: choosing a pid and ptrace of others are not for everybody.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn good(output: &Output) {
    assert!(
        output.status.success(),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A child that is killed when the test ends.
struct Running(Child);

impl Running {
    fn ended(&mut self) -> Option<bool> {
        self.0.try_wait().unwrap().map(|status| status.success())
    }

    fn ends_well(&mut self, what: &str) {
        let mut status = None;
        until(what, || {
            status = self.ended();
            status.is_some()
        });
        assert_eq!(status, Some(true), "{what}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program with 64 MiB of checked memory and two threads. Each command written to `ask` is answered in `answer`.
struct Victim {
    pid: i32,
    directory: tempfile::TempDir,
}

const PROGRAM: &str = r#"
import ctypes, hashlib, mmap, os, sys, threading, time
base = sys.argv[1]
SIZE, PAGE = 64 << 20, 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
seed = os.urandom(32)
version = 0
def page(n): return hashlib.sha256(seed + bytes([version if n < 512 else 0]) + n.to_bytes(4, 'little')).digest() * (PAGE // 32)
area = libc.mmap(None, SIZE, 3, 0x22, -1, 0)
for n in range(SIZE // PAGE):
    if n % 16 != 15: ctypes.memmove(area + n * PAGE, page(n), PAGE)
def check(at, first, last, step=1):
    bad = 0
    for n in range(first, last, step):
        want = bytes(PAGE) if n % 16 == 15 else page(n)
        bad += ctypes.string_at(at + n * PAGE, PAGE) != want
    return bad
ticks = [0, 0]
def thread(which):
    while True:
        time.sleep(0.01); ticks[which] += 1
for which in (0, 1): threading.Thread(target=thread, args=(which,), daemon=True).start()
def whole(): return check(area, 0, SIZE // PAGE)
def fork_and_change():
    child = os.fork()
    if child == 0:
        bad = check(area, 4096, 8192)
        os._exit(1 if bad else 0)
    bad = 0
    # A part moves away, a part goes, a part is dropped: the rest must not notice.
    moved = libc.mremap(area + 8192 * PAGE, 1024 * PAGE, 1024 * PAGE, 1 | 4)
    if moved in (None, 2**64 - 1): moved = libc.mremap(area + 8192 * PAGE, 1024 * PAGE, 2048 * PAGE, 1)
    assert moved not in (None, 2**64 - 1), ctypes.get_errno()
    bad += check(moved - 8192 * PAGE, 8192, 9216)
    assert libc.munmap(area + 10240 * PAGE, 1024 * PAGE) == 0
    assert libc.madvise(area + 12288 * PAGE, 1024 * PAGE, 4) == 0
    bad += ctypes.string_at(area + 12288 * PAGE, 1024 * PAGE) != bytes(1024 * PAGE)
    bad += check(area, 0, 8192) + check(area, 9216, 10240) + check(area, 11264, 12288) + check(area, 13312, 16384)
    _, status = os.waitpid(child, 0)
    return bad + status
def grow():
    # realloc(3) of a large block moves the whole mapping.
    global area
    moved = libc.mremap(area, SIZE, SIZE + (8 << 20), 1)
    assert moved not in (None, 2**64 - 1), ctypes.get_errno()
    area = moved
    return check(area, 0, SIZE // PAGE) + (ctypes.string_at(area + SIZE, 8 << 20) != bytes(8 << 20))
def churn():
    # Something is always just being reported, also in the moment in which all memory is there.
    part, end = area + 12288 * PAGE, time.time() + 3
    while time.time() < end:
        for _ in range(200):
            libc.madvise(part, 64 * PAGE, 4)
            ctypes.memset(part, 1, 1)
        child = os.fork()
        if child == 0: os._exit(0)
        os.waitpid(child, 0)
    return check(area, 0, 12288) + check(area, 12352, 16384)
def fork_and_look():
    child = os.fork()
    if child == 0:
        while not os.path.exists(base + '/look'): time.sleep(0.005)
        bad = check(area, 0, SIZE // PAGE)
        open(base + '/child', 'w').write(str(bad))
        os._exit(0)
    os.waitpid(child, 0)
    return 0
def change():
    global version
    version += 1
    for n in range(0, 512):
        if n % 16 != 15: ctypes.memmove(area + n * PAGE, page(n), PAGE)
    return 0
def alive(): return 0
def threads():
    before = list(ticks); time.sleep(0.3)
    return 0 if all(now > then for now, then in zip(ticks, before)) else 1
open(base + '/pid', 'w').write(str(os.getpid()))
number = 0
while True:
    try: asked = open(base + '/ask').read().split()
    except OSError: asked = []
    if len(asked) == 2 and int(asked[0]) > number:
        number = int(asked[0])
        try: result = str(globals()[asked[1]]())
        except BaseException as error: result = repr(error)
        open(base + '/answer.new', 'w').write('%d %s' % (number, result))
        os.rename(base + '/answer.new', base + '/answer')
    time.sleep(0.005)
"#;

impl Victim {
    fn start() -> Victim {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("images")).unwrap();
        let child = Command::new("setsid")
            .args(["/usr/bin/python3", "-c", PROGRAM])
            .arg(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        drop(child);
        let mut victim = Victim { pid: 0, directory };
        until("the victim starts", || {
            victim.pid = std::fs::read_to_string(victim.path("pid"))
                .ok()
                .and_then(|text| text.parse().ok())
                .unwrap_or(0);
            victim.pid != 0
        });
        victim
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn show(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn reap(&self) {
        let _ = rustix::process::waitpid(
            rustix::process::Pid::from_raw(self.pid),
            rustix::process::WaitOptions::NOHANG,
        );
    }

    fn is_there(&self) -> bool {
        self.reap();
        Path::new(&format!("/proc/{}", self.pid)).exists()
    }

    fn ask(&self, number: u32, what: &str) {
        std::fs::write(self.path("ask.new"), format!("{number} {what}")).unwrap();
        std::fs::rename(self.path("ask.new"), self.path("ask")).unwrap();
    }

    fn answer(&self, number: u32) -> Option<String> {
        let text = std::fs::read_to_string(self.path("answer")).ok()?;
        text.strip_prefix(&format!("{number} ")).map(str::to_owned)
    }

    /// Asks the program, which says how much of its memory is wrong.
    fn is_right(&self, number: u32, what: &str) {
        self.ask(number, what);
        let mut answer = None;
        until(what, || {
            answer = self.answer(number);
            answer.is_some()
        });
        assert_eq!(answer.as_deref(), Some("0"), "{what}");
    }

    fn whimbrel(&self, arguments: &[&str]) -> Output {
        self.reap();
        self.command(arguments).output().unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(WHIMBREL);
        command
            .args(arguments)
            .env("WHIMBREL_IDENTITY", self.path("identity"))
            .stdin(Stdio::null());
        command
    }

    fn start_server(&self, name: &str, arguments: &[&str]) -> Running {
        let log = std::fs::File::create(self.path(name)).unwrap();
        let copy = log.try_clone().unwrap();
        let child = self.command(arguments).stdout(log).stderr(copy).spawn();
        Running(child.unwrap())
    }

    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn dump(&self, more: &[&str]) {
        let (pid, images) = (self.pid.to_string(), self.show("images"));
        good(&self.whimbrel(&[&["dump", "-t", &pid, "-D", &images], more].concat()));
        // Whoever is its parent by now must take note of its end.
        until("the pid is free again", || !self.is_there());
    }

    /// A daemon that serves from the images.
    fn daemon(&self, more: &[&str]) -> Running {
        let images = self.show("images");
        let arguments = [&["lazy-pages", "-v4", "-D", &images], more].concat();
        let daemon = self.start_server("daemon.log", &arguments);
        until("the daemon's socket", || self.path("images/lazy-pages.socket").exists());
        daemon
    }

    fn restore(&self) {
        let images = self.show("images");
        good(&self.whimbrel(&["restore", "-d", "-D", &images, "--lazy-pages"]));
    }

    /// No descriptor of ours is left in it.
    fn is_clean(&self) {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid)).unwrap();
        let links = entries.map(|entry| std::fs::read_link(entry.unwrap().path()).unwrap_or_default());
        let left = links
            .filter(|link| link.to_string_lossy().contains("userfaultfd"))
            .count();
        assert_eq!(left, 0, "a userfaultfd is left in the program");
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = whimbrel::kernel::sys::kill(self.pid, libc::SIGKILL);
        std::thread::sleep(Duration::from_millis(5));
        self.reap();
        if std::thread::panicking() {
            for name in ["daemon.log", "dump.log", "there.log"] {
                eprintln!("--- {name}\n{}", self.log(name));
            }
        }
    }
}

#[test]
fn a_lazy_restore_has_all_memory_in_the_end_and_leaves_nothing_in_the_program() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    victim.dump(&[]);
    let mut daemon = victim.daemon(&[]);
    victim.restore();
    victim.is_right(1, "threads");
    victim.is_right(2, "whole");
    daemon.ends_well("the daemon ends when all is there");
    victim.is_clean();
    assert!(!victim.path("images/lazy-pages.socket").exists());
    let log = victim.log("daemon.log");
    assert!(log.contains("All memory is there"), "{log}");
    // And the program can be dumped again, as any other.
    victim.dump(&[]);
    let images = victim.show("images");
    good(&victim.whimbrel(&["restore", "-d", "-D", &images]));
    victim.is_right(3, "whole");
}

#[test]
fn without_a_daemon_nothing_is_made_and_the_error_says_what_to_start() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    victim.dump(&[]);
    let images = victim.show("images");
    let output = victim.whimbrel(&["restore", "-d", "-D", &images, "--lazy-pages"]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("start `whimbrel lazy-pages"), "{error}");
    assert!(!victim.is_there());
    good(&victim.whimbrel(&["restore", "-d", "-D", &images]));
    victim.is_right(1, "whole");
}

#[test]
fn pages_of_all_parents_are_served() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    std::fs::create_dir(victim.path("one")).unwrap();
    let (pid, one) = (victim.pid.to_string(), victim.show("one"));
    good(&victim.whimbrel(&["pre-dump", "-t", &pid, "-D", &one]));
    victim.is_right(1, "change");
    victim.dump(&["--prev-images-dir", "../one", "--track-mem"]);
    let mut daemon = victim.daemon(&[]);
    victim.restore();
    victim.is_right(2, "whole");
    daemon.ends_well("the daemon ends when all is there");
}

#[test]
fn fork_and_changes_of_the_address_space_while_memory_follows_keep_every_page_right() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    victim.dump(&[]);
    victim.ask(1, "fork_and_change");
    let mut daemon = victim.daemon(&[]);
    victim.restore();
    victim.is_right(1, "fork_and_change");
    daemon.ends_well("the daemon ends when all is there");
    victim.is_clean();
}

#[test]
fn a_program_that_changes_its_address_space_all_the_time_does_not_stall_when_all_is_there() {
    if !is_root() {
        return;
    }
    for _ in 0..3 {
        let victim = Victim::start();
        victim.dump(&[]);
        victim.ask(1, "churn");
        let mut daemon = victim.daemon(&[]);
        victim.restore();
        daemon.ends_well("the daemon ends when all is there");
        victim.is_right(1, "churn");
        victim.is_clean();
    }
}

#[test]
fn a_mapping_can_be_moved_as_a_whole_while_it_lacks_pages() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    victim.dump(&[]);
    victim.ask(1, "grow");
    let mut daemon = victim.daemon(&[]);
    victim.restore();
    victim.is_right(1, "grow");
    daemon.ends_well("the daemon ends when all is there");
}

/// Another "host": a pid namespace of its own, in which the pids of the victim are free.
struct There {
    root: Running,
    inside: String,
}

impl There {
    fn new() -> There {
        let child = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "600"])
            .spawn()
            .unwrap();
        let root = Running(child);
        let children = format!("/proc/{0}/task/{0}/children", root.0.id());
        let mut inside = String::new();
        until("the namespace", || {
            inside = std::fs::read_to_string(&children).unwrap_or_default().trim().to_owned();
            let comm = std::fs::read_to_string(format!("/proc/{inside}/comm")).unwrap_or_default();
            comm.trim() == "sleep"
        });
        There { root, inside }
    }

    fn start(&self, victim: &Victim, name: &str, arguments: &[&str]) -> Running {
        let log = std::fs::File::create(victim.path(name)).unwrap();
        let copy = log.try_clone().unwrap();
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.inside, "-p", "-m", WHIMBREL])
            .args(arguments)
            .env("WHIMBREL_IDENTITY", victim.path("identity"))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(copy);
        Running(command.spawn().unwrap())
    }

    fn daemon(&self, victim: &Victim, port: u16, more: &[&str]) -> Running {
        let (images, port) = (victim.show("images"), port.to_string());
        let arguments = [
            "lazy-pages",
            "-v4",
            "-D",
            &images,
            "--page-server",
            "--address",
            "127.0.0.1",
        ];
        let daemon = self.start(
            victim,
            "daemon.log",
            &[&arguments[..], &["--port", &port], more].concat(),
        );
        until("the daemon's socket", || {
            victim.path("images/lazy-pages.socket").exists()
        });
        daemon
    }

    /// The victim in that namespace, by its pid in ours.
    fn pid_of(&self, victim: &Victim) -> i32 {
        let ours = |pid: &i32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            line.is_some_and(|line| {
                let ids: Vec<&str> = line.split_whitespace().collect();
                ids.len() == 2 && ids[1] == victim.pid.to_string()
            })
        };
        let pids = std::fs::read_dir("/proc").unwrap();
        let mut pids = pids.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<i32>().ok());
        pids.find(ours).expect("it runs there")
    }

    fn restore(&self, victim: &Victim) {
        let images = victim.show("images");
        let arguments = ["restore", "-d", "-v4", "-D", &images, "--lazy-pages"];
        self.start(victim, "there.log", &arguments)
            .ends_well("the restore is done");
    }
}

impl Drop for There {
    fn drop(&mut self) {
        // With its first process the whole namespace ends.
        let _ = whimbrel::kernel::sys::kill(self.inside.parse().unwrap_or(0), libc::SIGKILL);
        let _ = self.root.0.wait();
    }
}

fn free_port() -> u16 {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

impl Victim {
    /// A dump that keeps the memory and waits to be asked for it.
    fn lazy_dump(&self, port: u16, more: &[&str]) -> Running {
        let (pid, images, port) = (self.pid.to_string(), self.show("images"), port.to_string());
        let arguments = [
            "dump",
            "-v4",
            "-t",
            &pid,
            "-D",
            &images,
            "--lazy-pages",
            "--address",
            "127.0.0.1",
        ];
        let dump = self.start_server("dump.log", &[&arguments[..], &["--port", &port], more].concat());
        until("the dump listens", || self.log("dump.log").contains("listens on"));
        dump
    }

    fn state(&self) -> String {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit(')')
            .next()
            .unwrap_or("")
            .trim_start()
            .chars()
            .take(1)
            .collect()
    }
}

#[test]
fn memory_follows_from_the_dump_on_another_host_which_then_ends_the_tree_there() {
    if !is_root() {
        return;
    }
    let (victim, there, port) = (Victim::start(), There::new(), free_port());
    let mut dump = victim.lazy_dump(port, &[]);
    let stored: u64 = std::fs::read_dir(victim.path("images"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"))
        .map(|entry| entry.metadata().unwrap().len())
        .sum();
    assert!(stored < 16 << 20, "{stored} bytes of memory are in the images");
    // Restoring without asking anybody must not make zeros of what is missing.
    let images = victim.show("images");
    let output = victim.whimbrel(&["restore", "-d", "-D", &images]);
    assert!(
        text(&output.stderr).contains("use --lazy-pages"),
        "{}",
        text(&output.stderr)
    );

    let mut daemon = there.daemon(&victim, port, &[]);
    there.restore(&victim);
    victim.is_right(1, "threads");
    victim.is_right(2, "fork_and_change");
    daemon.ends_well("the daemon ends when all is there");
    dump.ends_well("the dump ends when all was fetched");
    assert!(!victim.is_there(), "the old copy must be gone");
    victim.is_right(3, "alive");
}

#[test]
fn what_a_pre_dump_has_does_not_follow() {
    if !is_root() {
        return;
    }
    let (victim, there, port) = (Victim::start(), There::new(), free_port());
    std::fs::create_dir(victim.path("one")).unwrap();
    let (pid, one) = (victim.pid.to_string(), victim.show("one"));
    good(&victim.whimbrel(&["pre-dump", "-t", &pid, "-D", &one]));
    victim.is_right(1, "change");
    let mut dump = victim.lazy_dump(port, &["--json", "--prev-images-dir", "../one"]);
    let mut daemon = there.daemon(&victim, port, &[]);
    there.restore(&victim);
    victim.is_right(2, "whole");
    daemon.ends_well("the daemon ends when all is there");
    dump.ends_well("the dump ends when all was fetched");
    let log = victim.log("dump.log");
    let pages = log.split("\"pages_lazy\":").nth(1).unwrap_or("");
    let pages: u64 = pages
        .split(|c: char| !c.is_ascii_digit())
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!((400..4000).contains(&pages), "{pages} pages followed");
}

#[test]
fn a_lazy_dump_that_nobody_asks_can_be_cancelled_and_the_tree_goes_on() {
    if !is_root() {
        return;
    }
    let (victim, there, port) = (Victim::start(), There::new(), free_port());
    let mut dump = victim.lazy_dump(port, &[]);
    // A daemon that has come and gone has fetched nothing.
    drop(there.daemon(&victim, port, &[]));
    whimbrel::kernel::sys::kill(dump.0.id() as i32, libc::SIGTERM).unwrap();
    until("the dump ends", || dump.ended().is_some());
    assert_eq!(dump.ended(), Some(false));
    victim.is_right(1, "whole");
    let images = std::fs::read_dir(victim.path("images")).unwrap();
    let left = images.filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|e| e == "img"));
    assert_eq!(left.count(), 0, "no images of a tree that goes on");
}

#[test]
fn when_the_dump_dies_the_restored_program_waits_and_the_old_copy_stays_stopped() {
    if !is_root() {
        return;
    }
    let (victim, there, port) = (Victim::start(), There::new(), free_port());
    let mut dump = victim.lazy_dump(port, &[]);
    let mut daemon = there.daemon(&victim, port, &[]);
    let images = victim.show("images");
    let arguments = ["restore", "-d", "-D", &images, "--lazy-pages"];
    let mut restore = there.start(&victim, "there.log", &arguments);
    until("the tree runs there", || {
        victim.log("dump.log").contains("The tree runs elsewhere")
    });
    dump.0.kill().unwrap();
    dump.0.wait().unwrap();
    restore.ends_well("the restore is done");
    until("the old copy is stopped", || victim.state() == "T");
    victim.ask(1, "whole");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(victim.answer(1), None, "it went on without its memory");
    assert_eq!(victim.state(), "T");
    assert_eq!(daemon.ended(), None, "the daemon waits for the dump");
}

#[test]
fn a_lost_link_leaves_the_program_waiting_and_all_goes_on_when_it_is_back() {
    if !is_root() {
        return;
    }
    let (victim, there, port) = (Victim::start(), There::new(), free_port());
    let mut dump = victim.lazy_dump(port, &[]);
    let mut daemon = there.daemon(&victim, port, &[]);
    // From now on nobody answers.
    whimbrel::kernel::sys::kill(dump.0.id() as i32, libc::SIGSTOP).unwrap();
    there.restore(&victim);
    victim.ask(1, "whole");
    until("the loss is noted", || victim.log("daemon.log").contains("is lost"));
    assert_eq!(victim.answer(1), None, "it went on without its memory");
    whimbrel::kernel::sys::kill(dump.0.id() as i32, libc::SIGCONT).unwrap();
    victim.is_right(1, "whole");
    daemon.ends_well("the daemon ends when all is there");
    dump.ends_well("the dump ends when all was fetched");
    assert!(!victim.is_there());
}

#[test]
fn when_the_daemon_dies_the_program_waits_and_reads_no_zeros() {
    if !is_root() {
        return;
    }
    let (victim, there, port) = (Victim::start(), There::new(), free_port());
    let dump = victim.lazy_dump(port, &[]);
    let mut daemon = there.daemon(&victim, port, &[]);
    // Nobody answers, so that nearly all is missing when the daemon dies.
    whimbrel::kernel::sys::kill(dump.0.id() as i32, libc::SIGSTOP).unwrap();
    there.restore(&victim);
    victim.ask(1, "whole");
    daemon.0.kill().unwrap();
    daemon.0.wait().unwrap();
    let restored = there.pid_of(&victim);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(victim.answer(1), None, "it went on without its memory");
    let maps = std::fs::read_to_string(format!("/proc/{restored}/smaps")).unwrap();
    let watched = maps
        .lines()
        .filter(|line| line.starts_with("VmFlags") && line.contains(" um"));
    assert!(watched.count() > 0, "nobody holds its missing pages");
    let stat = std::fs::read_to_string(format!("/proc/{restored}/stat")).unwrap();
    assert!(!stat.contains(") Z"), "it waits, it does not crash");
}

#[test]
fn a_child_that_was_forked_while_memory_follows_waits_too_when_the_daemon_dies() {
    if !is_root() {
        return;
    }
    let (victim, there, port) = (Victim::start(), There::new(), free_port());
    let _dump = victim.lazy_dump(port, &[]);
    victim.ask(1, "fork_and_look");
    // What nobody touches does not come.
    let mut daemon = there.daemon(&victim, port, &["--on-demand"]);
    there.restore(&victim);
    until("the forked child has a guard", || {
        victim.log("daemon.log").contains("keeps its own userfaultfd")
    });
    daemon.0.kill().unwrap();
    daemon.0.wait().unwrap();
    std::fs::write(victim.path("look"), "").unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert!(!victim.path("child").exists(), "the child went on without its memory");
    assert_eq!(victim.answer(1), None);
}

#[test]
fn on_demand_only_what_is_touched_comes_and_the_daemon_ends_with_the_program() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    victim.dump(&[]);
    let mut daemon = victim.daemon(&["--on-demand", "--json"]);
    victim.restore();
    victim.is_right(1, "alive");
    victim.is_right(2, "threads");
    assert_eq!(daemon.ended(), None, "memory is missing, and the daemon is gone");
    victim.is_right(3, "change");
    whimbrel::kernel::sys::kill(victim.pid, libc::SIGKILL).unwrap();
    until("the program is gone", || !victim.is_there());
    daemon.ends_well("the daemon ends with the program");
    let log = victim.log("daemon.log");
    assert!(log.contains("\"prefetched\":0"), "{log}");
    // Of 16,384 pages of memory at least it needed few.
    let pages = log.split("\"fault_pages\":").nth(1).unwrap_or("");
    let pages: u64 = pages.split(',').next().unwrap().parse().unwrap();
    assert!((480..8000).contains(&pages), "{pages} pages came");
}
