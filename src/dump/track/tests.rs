//! Both mechanisms are asked the same questions, as far as the kernel has them. What one of them does alone comes last.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::*;
use crate::remote::tracee;
use crate::resource::mem::pages::Pages;
use crate::tree::Tree;

const PAGE: u64 = 4096;

/// A program that does what it is told, line by line.
struct Victim {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pid: i32,
}

const CODE: &str = "\
import ctypes, mmap, os, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_long
def new(pages, at=0):
    got = libc.mmap(ctypes.c_void_p(at), ctypes.c_size_t(pages * 4096), 3, 0x22 | (0x10 if at else 0), -1, ctypes.c_long(0))
    # A huge page is written as a whole, and the kernel makes them when it likes.
    libc.madvise(ctypes.c_void_p(got), ctypes.c_size_t(pages * 4096), 15)
    return got
def fill(at, pages, byte): ctypes.memset(ctypes.c_void_p(at), byte, pages * 4096)
def poke(at, page, byte): ctypes.memset(ctypes.c_void_p(at + page * 4096), byte, 1)
for line in sys.stdin:
    result = None
    exec(line)
    print(result, flush=True)
";

impl Victim {
    fn start() -> Victim {
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", CODE])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (
            child.stdin.take().unwrap(),
            BufReader::new(child.stdout.take().unwrap()),
        );
        let pid = child.id() as i32;
        let mut victim = Victim {
            child,
            input,
            output,
            pid,
        };
        victim.run("pass");
        victim
    }

    fn run(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        assert!(!answer.is_empty(), "the program died of {line:?}");
        answer.trim().to_owned()
    }

    /// Fresh memory, the first `filled` pages of it written.
    fn memory(&mut self, pages: u64, filled: u64) -> u64 {
        let line = format!("result = new({pages}); fill(result, {filled}, 120)");
        self.run(&line).parse().unwrap()
    }

    fn poke(&mut self, base: u64, pages: &[u64]) {
        let pokes = pages
            .iter()
            .map(|page| format!("poke({base}, {page}, 65); "))
            .collect::<String>();
        self.run(&(pokes + "pass"));
    }

    fn maps(&self) -> Vec<Mapping> {
        procfs::maps::parse(&procfs::read(self.pid, "maps").unwrap()).unwrap()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn area(base: u64, pages: u64) -> RunSet {
    RunSet::from_ranges(vec![(base, base + pages * PAGE)])
}

fn pages(base: u64, pages: &[u64]) -> RunSet {
    RunSet::from_ranges(
        pages
            .iter()
            .map(|page| (base + page * PAGE, base + (page + 1) * PAGE))
            .collect(),
    )
}

fn has(feature: Feature) -> bool {
    feature.try_now().is_ok()
}

fn wp_async(pid: i32) -> Box<dyn Tracker> {
    Box::new(WpAsync::attach(pid, &mut GadgetCache::default()).unwrap())
}

fn soft_dirty(pid: i32) -> Box<dyn Tracker> {
    Box::new(SoftDirty::attach(pid).unwrap())
}

/// Asks every mechanism that this kernel has; there must be one.
fn each(question: impl Fn(&mut Victim, &dyn Fn(i32) -> Box<dyn Tracker>)) {
    let mut asked = 0;
    for (feature, start) in [
        (Feature::UffdWpAsync, &wp_async as &dyn Fn(i32) -> Box<dyn Tracker>),
        (Feature::SoftDirty, &soft_dirty),
    ] {
        if has(feature) {
            println!("{}", feature.name());
            question(&mut Victim::start(), start);
            asked += 1;
        }
    }
    assert!(asked > 0, "this kernel can watch no memory");
}

#[test]
fn exactly_the_pages_that_were_written_are_found() {
    each(|victim, start| {
        let base = victim.memory(64, 32);
        let area = area(base, 64);
        let mut tracker = start(victim.pid);
        let first = tracker.look(&victim.maps()).unwrap();
        let found = first.dirty.intersect(&area).pages();
        assert_eq!(found, 32, "the first look finds everything");
        // Populated ones, and ones that were never touched.
        for written in [&[3, 7, 8, 40][..], &[7], &[], &[0, 63]] {
            victim.poke(base, written);
            let look = tracker.look(&victim.maps()).unwrap();
            assert_eq!(look.dirty.intersect(&area), pages(base, written));
            assert_eq!(look.watched.intersect(&area), area);
        }
        drop(tracker);
        victim.poke(base, &[1, 2]);
    });
}

#[test]
fn a_last_look_finds_the_same_again_and_again() {
    each(|victim, start| {
        let base = victim.memory(16, 16);
        let mut tracker = start(victim.pid);
        tracker.look(&victim.maps()).unwrap();
        victim.poke(base, &[2, 9]);
        for _ in 0..3 {
            let look = tracker.last_look(&victim.maps()).unwrap();
            assert_eq!(look.dirty.intersect(&area(base, 16)), pages(base, &[2, 9]));
        }
        // And so does a look that starts anew, once.
        let look = tracker.look(&victim.maps()).unwrap();
        assert_eq!(look.dirty.intersect(&area(base, 16)), pages(base, &[2, 9]));
        let look = tracker.last_look(&victim.maps()).unwrap();
        assert!(look.dirty.intersect(&area(base, 16)).is_empty());
    });
}

#[test]
fn new_and_moved_mappings_count_as_written() {
    each(|victim, start| {
        let base = victim.memory(16, 16);
        let mut tracker = start(victim.pid);
        tracker.look(&victim.maps()).unwrap();
        // New, and moved: to where nothing was, and over memory that was clean.
        let new = victim.memory(8, 4);
        let target = victim.memory(8, 8);
        tracker.look(&victim.maps()).unwrap();
        let moved = victim.run(&format!(
            "result = libc.mremap(ctypes.c_void_p({base}), ctypes.c_size_t(8 * 4096), ctypes.c_size_t(8 * 4096), 3, ctypes.c_void_p({target}))"
        ));
        assert_eq!(moved.parse(), Ok(target));
        let again = victim.run(&format!("result = new(8, {new}); fill(result, 2, 121)"));
        assert_eq!(again.parse(), Ok(new));
        let look = tracker.look(&victim.maps()).unwrap();
        assert_eq!(look.dirty.intersect(&area(target, 8)), area(target, 8), "moved");
        assert_eq!(
            look.dirty.intersect(&area(new, 8)),
            pages(new, &[0, 1]),
            "made again in place"
        );
        assert_eq!(look.gone.intersect(&area(new, 8)), pages(new, &[2, 3, 4, 5, 6, 7]));
        assert!(look.watched.intersect(&area(base, 8)).is_empty(), "moved away");
        assert!(
            look.dirty.intersect(&area(base + 8 * PAGE, 8)).is_empty(),
            "what stayed is clean"
        );
    });
}

#[test]
fn pages_that_were_given_back_are_gone_and_count_as_written_when_they_return() {
    each(|victim, start| {
        let base = victim.memory(16, 16);
        let mut tracker = start(victim.pid);
        tracker.look(&victim.maps()).unwrap();
        victim.run(&format!(
            "libc.madvise(ctypes.c_void_p({base} + 4 * 4096), ctypes.c_size_t(4 * 4096), 4); poke({base}, 5, 66)"
        ));
        let look = tracker.look(&victim.maps()).unwrap();
        assert_eq!(look.gone.intersect(&area(base, 16)), pages(base, &[4, 6, 7]));
        assert_eq!(look.dirty.intersect(&area(base, 16)), pages(base, &[5]));
    });
}

#[test]
fn pages_over_a_file_that_were_given_back_are_gone() {
    each(|victim, start| {
        victim.run("import tempfile; file = tempfile.TemporaryFile(); file.write(b'f' * 16 * 4096); file.flush()");
        let map = "result = libc.mmap(None, ctypes.c_size_t(16 * 4096), 3, 2, file.fileno(), ctypes.c_long(0))";
        let base: u64 = victim.run(map).parse().unwrap();
        victim.poke(base, &[3, 7]);
        let mut tracker = start(victim.pid);
        let look = tracker.look(&victim.maps()).unwrap();
        assert_eq!(look.dirty.intersect(&area(base, 16)), pages(base, &[3, 7]));
        // Twice, so that they are known to be unchanged.
        tracker.look(&victim.maps()).unwrap();
        victim.run(&format!(
            "libc.madvise(ctypes.c_void_p({base} + 7 * 4096), ctypes.c_size_t(4096), 4); result = ctypes.string_at({base} + 7 * 4096, 1)"
        ));
        let look = tracker.look(&victim.maps()).unwrap();
        assert!(
            look.gone.contains(base + 7 * PAGE) && !look.gone.contains(base + 3 * PAGE),
            "{:?}",
            look.gone
        );
        assert!(look.dirty.intersect(&area(base, 16)).is_empty());
        // And back again.
        victim.poke(base, &[7]);
        let look = tracker.look(&victim.maps()).unwrap();
        assert_eq!(look.dirty.intersect(&area(base, 16)), pages(base, &[7]));
        assert!(!look.gone.contains(base + 7 * PAGE));
    });
}

#[test]
fn nothing_that_is_written_while_rounds_go_on_is_missed() {
    each(|victim, start| {
        let base = victim.memory(256, 256);
        victim.run(&format!(
            "go = True; exec('''def work(seed):\\n x = seed\\n while go:\\n  x = (x * 1103515245 + 12345) % 2**31\\n  poke({base}, x // 8 % 256, x % 251)\\n''')"
        ));
        victim.run("threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in (1, 2)]; [t.start() for t in threads]");
        let mut tracker = start(victim.pid);
        let reader = Pages::open(victim.pid).unwrap();
        let mut copy = vec![0u8; 256 * PAGE as usize];
        let fetch = |look: Look, copy: &mut [u8]| {
            let dirty = look.dirty.intersect(&area(base, 256));
            for run in dirty.runs() {
                let at = (run.start - base) as usize;
                reader.read(&[run], &mut copy[at..at + run.bytes() as usize]).unwrap();
            }
            dirty.pages()
        };
        for _ in 0..40 {
            let look = tracker.look(&victim.maps()).unwrap();
            fetch(look, &mut copy);
        }
        let held = Tree::hold(victim.pid).unwrap();
        let look = tracker.last_look(&victim.maps()).unwrap();
        let last = fetch(look, &mut copy);
        let whole = whimbrel_images::page::PageRun {
            start: base,
            pages: 256,
        };
        let mut memory = vec![0u8; 256 * PAGE as usize];
        reader.read(&[whole], &mut memory).unwrap();
        held.resume().unwrap();
        assert!(memory.iter().any(|&byte| byte != 120), "the threads write");
        let wrong = memory
            .chunks(4096)
            .zip(copy.chunks(4096))
            .filter(|(a, b)| a != b)
            .count();
        assert_eq!(wrong, 0, "pages differ after the last look, which found {last}");
        victim.run("go = False");
    });
}

/// Makes the program register a part of its memory with a userfaultfd of its own.
fn register_own(victim: &mut Victim, base: u64, pages: u64) {
    let line = format!(
        "import fcntl, struct; u = libc.syscall(323, 0o2000000 | 1); \
         fcntl.ioctl(u, 0xC018AA3F, struct.pack('QQQ', 0xAA, 0, 0)); \
         fcntl.ioctl(u, 0xC020AA00, struct.pack('QQQQ', {base}, {pages} * 4096, 1, 0)); result = u"
    );
    assert!(victim.run(&line).parse::<i32>().unwrap() > 0);
}

#[test]
fn a_program_with_a_userfaultfd_of_its_own_is_watched_otherwise_or_not_at_all_and_the_reason_is_told() {
    let mut victim = Victim::start();
    let base = victim.memory(8, 8);
    register_own(&mut victim, base, 8);
    match Mechanisms::probe().start(victim.pid, &mut GadgetCache::default()) {
        Ok(tracker) => assert_eq!(tracker.name(), "soft-dirty bits"),
        Err(error) => {
            assert!(!has(Feature::SoftDirty));
            let text = error.chain();
            assert!(text.contains("uses userfaultfd itself"), "{text}");
            assert!(text.contains("no soft-dirty bits"), "{text}");
        }
    }
}

#[test]
fn a_kernel_with_neither_mechanism_gives_both_reasons() {
    let missing = |step: &str| {
        Err(Missing {
            step: step.into(),
            errno: 0,
        })
    };
    let none = Mechanisms {
        wp_async: missing("the one"),
        soft_dirty: missing("the other"),
    };
    let victim = Victim::start();
    let error = none
        .start(victim.pid, &mut GadgetCache::default())
        .map(|_| ())
        .unwrap_err();
    let text = error.chain();
    assert!(
        text.contains("the one") && text.contains("the other") && text.contains("post-copy"),
        "{text}"
    );
}

/// Questions that only make sense with write protection.
#[test]
fn what_cannot_be_registered_counts_as_written_at_every_look() {
    if !has(Feature::UffdWpAsync) {
        println!("skipped: no asynchronous write protection");
        return;
    }
    let mut victim = Victim::start();
    let (base, ours) = (victim.memory(8, 8), victim.memory(8, 8));
    // Its own descriptor has it, and a mapping belongs to one userfaultfd.
    register_own(&mut victim, base, 8);
    let mut tracker = wp_async(victim.pid);
    tracker.look(&victim.maps()).unwrap();
    for _ in 0..2 {
        let look = tracker.look(&victim.maps()).unwrap();
        assert_eq!(look.dirty.intersect(&area(base, 8)), area(base, 8));
        assert!(look.dirty.intersect(&area(ours, 8)).is_empty());
    }
}

#[test]
fn what_a_failed_look_found_is_found_again() {
    if !has(Feature::UffdWpAsync) {
        println!("skipped: no asynchronous write protection");
        return;
    }
    let mut victim = Victim::start();
    let base = victim.memory(16, 16);
    let mut tracker = wp_async(victim.pid);
    tracker.look(&victim.maps()).unwrap();
    victim.poke(base, &[3, 8]);
    // A mapping beyond all addresses comes last, and cannot be read: the others are protected anew by then.
    let mut broken = victim.maps();
    broken.push(Mapping {
        start: u64::MAX - 16 * PAGE + 1,
        end: u64::MAX - 8 * PAGE + 1,
        prot: libc::PROT_READ | libc::PROT_WRITE,
        ..Mapping::default()
    });
    tracker.look(&broken).map(|_| ()).unwrap_err();
    victim.poke(base, &[5]);
    tracker.look(&broken).map(|_| ()).unwrap_err();
    let look = tracker.look(&victim.maps()).unwrap();
    assert_eq!(look.dirty.intersect(&area(base, 16)), pages(base, &[3, 5, 8]));
    let look = tracker.look(&victim.maps()).unwrap();
    assert!(look.dirty.intersect(&area(base, 16)).is_empty());
}

/// Questions that only make sense with soft-dirty bits.
fn with_soft_dirty(question: impl FnOnce(&mut Victim)) {
    match has(Feature::SoftDirty) {
        true => question(&mut Victim::start()),
        false => println!("skipped: no soft-dirty bits"),
    }
}

#[test]
fn soft_dirty_a_look_that_cannot_hold_the_process_loses_nothing() {
    with_soft_dirty(|victim| {
        let base = victim.memory(16, 16);
        let mut tracker = SoftDirty::attach(victim.pid).unwrap();
        tracker.look(&victim.maps()).unwrap();
        victim.poke(base, &[4]);
        let (held, release) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
        let pid = victim.pid;
        let debugger = std::thread::spawn(move || {
            let traced = tracee::seize(pid, false).unwrap();
            held.0.send(()).unwrap();
            release.1.recv().unwrap();
            let (stopped, _) = traced.stop().unwrap().unwrap();
            stopped.detach(0).unwrap();
        });
        held.1.recv().unwrap();
        tracker.look(&victim.maps()).map(|_| ()).unwrap_err();
        release.0.send(()).unwrap();
        debugger.join().unwrap();
        victim.poke(base, &[6]);
        let look = tracker.look(&victim.maps()).unwrap();
        assert_eq!(look.dirty.intersect(&area(base, 16)), pages(base, &[4, 6]));
    });
}

#[test]
fn soft_dirty_bits_that_somebody_else_has_cleared_are_not_trusted() {
    with_soft_dirty(|victim| {
        let base = victim.memory(16, 16);
        let mut tracker = SoftDirty::attach(victim.pid).unwrap();
        let mut other = SoftDirty::attach(victim.pid).unwrap();
        tracker.look(&victim.maps()).unwrap();
        victim.poke(base, &[4]);
        std::fs::write(format!("/proc/{}/clear_refs", victim.pid), "4").unwrap();
        let look = tracker.look(&victim.maps()).unwrap();
        assert_eq!(look.dirty.intersect(&area(base, 16)), area(base, 16));
        // One of our own that watches the same process is somebody else, too.
        other.look(&victim.maps()).unwrap();
        let look = tracker.look(&victim.maps()).unwrap();
        assert_eq!(look.dirty.intersect(&area(base, 16)), area(base, 16));
        let look = tracker.look(&victim.maps()).unwrap();
        assert!(look.dirty.intersect(&area(base, 16)).is_empty());
    });
}

#[test]
fn soft_dirty_bits_of_a_program_with_few_libraries_get_a_tag_that_is_never_the_last_one() {
    with_soft_dirty(|_| {
        let mut child = Command::new("sleep").arg("100").stdin(Stdio::null()).spawn().unwrap();
        let pid = child.id() as i32;
        // Once it sleeps it is loaded.
        while !procfs::read(pid, "wchan").is_ok_and(|text| String::from_utf8_lossy(&text).contains("nanosleep")) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let maps = || procfs::maps::parse(&procfs::read(pid, "maps").unwrap()).unwrap();
        let mut tracker = SoftDirty::attach(pid).unwrap();
        let mut last = None;
        for _ in 0..20 {
            tracker.look(&maps()).unwrap();
            let tag = tracker.tag().expect("a tag").clone();
            assert_ne!(last.as_ref(), Some(&tag));
            assert!(tag.marked.len() + tag.clear.len() <= 16 && !tag.marked.is_empty() && !tag.clear.is_empty());
            last = Some(tag);
        }
        child.kill().unwrap();
        child.wait().unwrap();
    });
}

#[test]
fn soft_dirty_bits_last_from_one_run_to_the_next_by_their_tag() {
    with_soft_dirty(|victim| {
        let base = victim.memory(16, 16);
        let mut tracker = SoftDirty::attach(victim.pid).unwrap();
        tracker.look(&victim.maps()).unwrap();
        let tag = tracker
            .tag()
            .expect("a dynamically linked program has pages for a tag")
            .clone();
        drop(tracker);
        victim.poke(base, &[1, 15]);
        let mut later = SoftDirty::go_on(victim.pid, tag.clone()).unwrap();
        let look = later.last_look(&victim.maps()).unwrap();
        assert_eq!(look.dirty.intersect(&area(base, 16)), pages(base, &[1, 15]));
        later.look(&victim.maps()).unwrap();
        let mut stale = SoftDirty::go_on(victim.pid, tag).unwrap();
        let look = stale.last_look(&victim.maps()).unwrap();
        assert_eq!(look.dirty.intersect(&area(base, 16)), area(base, 16), "an older tag");
    });
}
