//! Dumps that follow one another, and what comes back from them. Where the kernel has soft-dirty bits they tell what changed;
//! elsewhere contents are compared. The images must be right either way, and whatever happened in between.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use whimbrel::kernel::features::Feature;

const WHIMBREL: &str = env!("CARGO_BIN_EXE_whimbrel");

/// A program that does what it finds in a file, and answers in another. It remembers what its memory must hold.
const CODE: &str = "\
import ctypes, hashlib, mmap, os, sys, time
home = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_long
def new(pages, at=0):
    got = libc.mmap(ctypes.c_void_p(at), ctypes.c_size_t(pages * 4096), 3, 0x22 | (0x10 if at else 0), -1, ctypes.c_long(0))
    # A huge page is written as a whole, and the kernel makes them when it likes.
    libc.madvise(ctypes.c_void_p(got), ctypes.c_size_t(pages * 4096), 15)
    return got
def sum(a): return hashlib.sha256((ctypes.c_char * (a[1] * 4096)).from_address(a[0])).digest()
def put(at, page, data): ctypes.memmove(at + page * 4096, data, len(data))
areas = {}
def area(name, pages, at=0):
    where = new(pages, at)
    put(where, 0, os.urandom(pages * 4096))
    areas[name] = [where, pages, None]
def from_file(name, pages):
    path = f'{home}/{name}'
    open(path, 'wb').write(os.urandom(pages * 4096))
    fd = os.open(path, os.O_RDONLY)
    where = libc.mmap(ctypes.c_void_p(0), ctypes.c_size_t(pages * 4096), 3, 2, fd, ctypes.c_long(0))
    os.close(fd)
    areas[name] = [where, pages, None]
def zero(name, *pages):
    for page in pages: put(areas[name][0], page, bytes(4096))
def drop(name, first, pages): libc.madvise(ctypes.c_void_p(areas[name][0] + first * 4096), ctypes.c_size_t(pages * 4096), 4)
def poke(name, *pages):
    for page in pages: put(areas[name][0], page, os.urandom(64))
def note():
    for a in areas.values(): a[2] = sum(a)
def wrong(): return [n for n, a in areas.items() if sum(a) != a[2]]
area('big', 1024)
note()
done = 0
while True:
    try: text = open(f'{home}/command.{done + 1}').read()
    except OSError:
        time.sleep(0.01)
        continue
    try: answer = repr(eval(text)) if text.startswith('wrong') else repr(exec(text))
    except BaseException as error: answer = 'failed: ' + repr(error)
    done += 1
    open(f'{home}/answer.new', 'w').write(answer)
    os.rename(f'{home}/answer.new', f'{home}/answer.{done}')
";

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn whimbrel(words: &[&str]) -> Output {
    Command::new(WHIMBREL)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Runs it, and gives its closing event.
fn good(words: &[&str]) -> Value {
    let output = whimbrel(&[words, &["--json"]].concat());
    assert!(
        output.status.success(),
        "{words:?}: {}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    let out = text(&output.stdout);
    out.lines()
        .last()
        .map_or(Value::Null, |line| serde_json::from_str(line).unwrap())
}

fn number(event: &Value, name: &str) -> u64 {
    event[name].as_u64().unwrap_or_else(|| panic!("no {name} in {event}"))
}

struct Victim {
    pid: String,
    home: tempfile::TempDir,
    commands: u32,
    /// While it is our child.
    child: Option<Child>,
}

impl Victim {
    /// `None` where nobody may do this, which is said.
    fn start() -> Option<Victim> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        let home = tempfile::tempdir().unwrap();
        let null = || {
            Stdio::from(
                std::fs::File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/null")
                    .unwrap(),
            )
        };
        let child = Command::new("setsid")
            .args(["/usr/bin/python3", "-c", CODE, home.path().to_str().unwrap()])
            .stdin(null())
            .stdout(null())
            .stderr(null())
            .spawn()
            .unwrap();
        let mut victim = Victim {
            pid: child.id().to_string(),
            home,
            commands: 0,
            child: Some(child),
        };
        victim.run("area('small', 16)");
        Some(victim)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn run(&mut self, command: &str) -> String {
        self.commands += 1;
        let file = self.path("command.new");
        std::fs::write(&file, command).unwrap();
        std::fs::rename(file, self.path(&format!("command.{}", self.commands))).unwrap();
        let (answer, deadline) = (
            self.path(&format!("answer.{}", self.commands)),
            Instant::now() + Duration::from_secs(60),
        );
        loop {
            match std::fs::read_to_string(&answer) {
                Ok(text) => break assert!(!text.starts_with("failed"), "{command}: {text}"),
                Err(_) => assert!(Instant::now() < deadline, "no answer to {command:?}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        std::fs::read_to_string(answer).unwrap()
    }

    fn directory(&self, name: &str) -> String {
        let path = self.path(name);
        std::fs::create_dir_all(&path).unwrap();
        path.display().to_string()
    }

    fn pre_dump(&self, name: &str, more: &[&str]) -> Value {
        let directory = self.directory(name);
        good(&[&["pre-dump", "-t", &self.pid, "-D", &directory], more].concat())
    }

    fn dump(&self, name: &str, more: &[&str]) -> Value {
        let directory = self.directory(name);
        good(&[&["dump", "-t", &self.pid, "-D", &directory], more].concat())
    }

    fn restore(&mut self, name: &str) {
        let directory = self.directory(name);
        if let Some(mut child) = self.child.take() {
            child.wait().unwrap();
        }
        good(&["restore", "-d", "-D", &directory]);
    }

    /// The program itself must find every byte as it left it.
    fn is_whole(&mut self) {
        assert_eq!(self.run("wrong()"), "[]");
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        } else if let Some(pid) = self.pid.parse().ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// Did the kernel tell what changed, as it can where it has soft-dirty bits?
fn told(event: &Value, wanted: bool) {
    let tasks = number(event, "tasks_tracked");
    let can = Feature::SoftDirty.try_now().is_ok();
    assert_eq!(tasks, u64::from(wanted && can), "{event}");
}

#[test]
fn a_chain_restores_with_every_change_in_its_place() {
    let Some(mut victim) = Victim::start() else { return };
    victim.run("area('gone', 64); area('again', 64); area('holes', 64)");
    // Zeros in a copy of a file's page are not what the file has there.
    victim.run("from_file('file', 32); zero('file', 3, 4); poke('file', 7, 8)");
    let first = victim.pre_dump("one", &[]);
    assert!(number(&first, "pages_written") > 1024, "{first}");
    victim.run("poke('big', 0, 7, 8, 9, 1000, 1023); area('new', 64); drop('holes', 3, 5); drop('holes', 20, 2); poke('holes', 21)");
    victim.run("libc.munmap(ctypes.c_void_p(areas['gone'][0]), ctypes.c_size_t(64 * 4096)); del areas['gone']");
    victim.run("area('again', 32, areas['again'][0])");
    let second = victim.pre_dump("two", &["--prev-images-dir", "../one"]);
    told(&second, true);
    assert!(number(&second, "pages_written") < 700, "{second}");
    assert!(number(&second, "pages_in_parent") > 1000, "{second}");
    victim.run("poke('big', 7, 500); poke('new', 1); drop('new', 8, 8); zero('file', 7, 9); drop('file', 8, 1)");
    // Changes nobody: the last one is a dump of everything.
    let third = victim.pre_dump("three", &["--prev-images-dir", "../two"]);
    told(&third, true);
    victim.run("poke('big', 501, 7); note()");
    let last = victim.dump("four", &["--prev-images-dir", "../three", "--track-mem"]);
    told(&last, true);
    assert!(number(&last, "pages_written") < 700, "{last}");
    victim.restore("four");
    victim.is_whole();
}

#[test]
fn a_tree_that_is_left_running_can_be_dumped_again_and_again() {
    let Some(mut victim) = Victim::start() else { return };
    victim.dump("one", &["-R", "--track-mem"]);
    victim.run("poke('big', 3, 4)");
    told(
        &victim.dump("two", &["-R", "--track-mem", "--prev-images-dir", "../one"]),
        true,
    );
    victim.run("poke('big', 4, 5); note()");
    told(&victim.dump("three", &["--prev-images-dir", "../two"]), true);
    victim.restore("three");
    victim.is_whole();
}

#[test]
fn what_changed_before_somebody_else_cleared_the_bits_is_not_lost() {
    let Some(mut victim) = Victim::start() else { return };
    victim.pre_dump("one", &[]);
    victim.run("poke('big', 10, 11, 12)");
    std::fs::write(format!("/proc/{}/clear_refs", victim.pid), "4").unwrap();
    victim.run("poke('small', 1); note()");
    told(&victim.dump("two", &["--prev-images-dir", "../one"]), false);
    victim.restore("two");
    victim.is_whole();
}

#[test]
fn two_chains_of_one_tree_do_not_disturb_each_other() {
    let Some(mut victim) = Victim::start() else { return };
    victim.pre_dump("one", &[]);
    victim.run("poke('big', 10, 11, 12)");
    victim.pre_dump("other", &[]);
    victim.run("poke('big', 20)");
    // The bits are those of the other chain by now, and this one has to compare.
    let second = victim.pre_dump("two", &["--prev-images-dir", "../one"]);
    told(&second, false);
    assert!(number(&second, "pages_in_parent") > 1000, "{second}");
    victim.run("poke('big', 30); note()");
    told(&victim.dump("three", &["--prev-images-dir", "../two"]), true);
    victim.restore("three");
    victim.is_whole();
}

#[test]
fn a_pre_dump_that_fails_half_way_leaves_the_chain_right() {
    let Some(mut victim) = Victim::start() else { return };
    victim.pre_dump("one", &[]);
    victim.run("poke('big', *range(100, 900))");
    // No room for the changes: it fails when the bits are cleared already.
    let small = victim.directory("two");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "none", &small])
        .status();
    assert!(mounted.unwrap().success());
    let output = whimbrel(&[
        "pre-dump",
        "-t",
        &victim.pid,
        "-D",
        &small,
        "--prev-images-dir",
        "../one",
    ]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(Command::new("umount").arg(&small).status().unwrap().success());
    victim.run("poke('big', 5); note()");
    told(&victim.dump("three", &["--prev-images-dir", "../one"]), false);
    victim.restore("three");
    victim.is_whole();
}

/// A page server for one dump.
struct Server {
    child: Child,
    place: Vec<String>,
}

impl Server {
    fn start(victim: &Victim, name: &str, more: &[&str]) -> Server {
        let directory = victim.directory(name);
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port().to_string();
        drop(socket);
        let identity = victim.path("identity").display().to_string();
        let place = ["--address", "127.0.0.1", "--port", &port, "--identity-dir", &identity].map(str::to_owned);
        let mut child = Command::new(WHIMBREL)
            .args(["page-server", "--json", "-D", &directory])
            .args(&place)
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(line.contains("listening"), "{line}");
        Server {
            child,
            place: place.to_vec(),
        }
    }

    /// Options of the dump that sends to it.
    fn options(&self) -> Vec<&str> {
        let mut words = vec!["--page-server"];
        words.extend(self.place.iter().map(String::as_str));
        words
    }

    fn ends(&mut self, well: bool) {
        assert_eq!(self.child.wait().unwrap().success(), well);
    }
}

#[test]
fn a_chain_on_a_page_server_restores_and_only_changes_travel() {
    let Some(mut victim) = Victim::start() else { return };
    victim.run("from_file('file', 32); zero('file', 3, 4); poke('file', 7, 8)");
    let mut server = Server::start(&victim, "there-one", &[]);
    victim.pre_dump("one", &server.options());
    server.ends(true);
    victim.run("poke('big', 1, 2, 300); area('new', 16); drop('big', 40, 4); zero('file', 7, 9); drop('file', 8, 1)");
    let mut server = Server::start(&victim, "there-two", &["--prev-images-dir", "../there-one"]);
    let second = victim.pre_dump("two", &server.options());
    server.ends(true);
    told(&second, true);
    if Feature::SoftDirty.try_now().is_ok() {
        assert!(number(&second, "pages_in_parent") > 1000, "{second}");
    }
    victim.run("poke('big', 2, 4, 600); note()");
    let mut server = Server::start(&victim, "there-three", &["--prev-images-dir", "../there-two"]);
    told(&victim.dump("three", &server.options()), true);
    server.ends(true);
    // Where the pages are, the other images come to.
    for entry in std::fs::read_dir(victim.path("three")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), victim.path("there-three").join(entry.file_name())).unwrap();
    }
    victim.restore("there-three");
    victim.is_whole();
}

#[test]
fn crit_reads_the_images_of_a_chain() {
    let Some(mut victim) = Victim::start() else { return };
    if Command::new("crit").arg("--help").output().is_err() {
        println!("skipped: crit is not installed");
        return;
    }
    victim.pre_dump("one", &[]);
    victim.run("poke('big', 1)");
    victim.dump("two", &["-R", "--track-mem", "--prev-images-dir", "../one"]);
    for (directory, places) in [("one", &["PE_PRESENT"][..]), ("two", &["PE_PRESENT", "PE_PARENT"])] {
        let name = victim.path(&format!("{directory}/pagemap-{}.img", victim.pid));
        let output = Command::new("crit")
            .args(["decode", "--pretty", "-i", name.to_str().unwrap()])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let decoded: Value = serde_json::from_slice(&output.stdout).unwrap();
        let entries = decoded["entries"].as_array().unwrap();
        assert_eq!(entries[0]["pages_id"], 1, "{}", entries[0]);
        for place in places {
            let has = |entry: &Value| entry["flags"].as_str().is_some_and(|flags| flags.contains(place));
            assert!(entries.iter().any(has), "no {place} in {directory}");
        }
    }
    assert!(Path::new(&victim.path("two/parent")).is_symlink());
}
