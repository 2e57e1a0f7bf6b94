//! Whatever bytes come from outside (/proc of a hostile task, a peer, an image directory), they give an error or something
//! sensible, never a panic, and a restore that fails leaves nothing behind. Each test runs for `WHIMBREL_FUZZ_SECONDS` (2 by
//! default). The damage is the same in each run: a failure names its round.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Host, Victim};
use whimbrel::migrate::wire::{self, Begin, Body, Final, LazyPages, NeededFile, Packets, TaskShape};
use whimbrel::{procfs, tree::TreeImage};
use whimbrel_images::store::{ImageStore, MemStore};

/// A small random generator (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    /// Changes, cuts, repeats or inserts.
    fn damage(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            match self.below(6) {
                _ if bytes.is_empty() => bytes.push(self.next() as u8),
                0 => bytes[at] = self.next() as u8,
                1 => bytes[at] ^= 1 << self.below(8),
                2 => bytes.truncate(at),
                3 => {
                    let piece: Vec<u8> = bytes[at..].iter().take(self.below(40)).copied().collect();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, piece);
                }
                4 => drop(bytes.splice(at..at, *b"18446744073709551616")),
                _ => drop(bytes.splice(at..at, [0xff; 9])),
            }
        }
    }
}

/// How long each test goes on.
fn seconds() -> Duration {
    Duration::from_secs(common::setting("WHIMBREL_FUZZ_SECONDS", 2) as u64)
}

/// Damages one of `inputs` after the other and gives it to `read`, for the set time.
fn fuzz(inputs: &[(String, Vec<u8>)], read: impl Fn(&str, &[u8])) {
    let deadline = Instant::now() + seconds();
    let mut random = Random(0x7768_696d);
    let mut rounds = 0u64;
    while Instant::now() < deadline {
        let (name, good) = &inputs[random.below(inputs.len())];
        let mut bytes = good.clone();
        random.damage(&mut bytes);
        let result = catch_unwind(AssertUnwindSafe(|| read(name, &bytes)));
        assert!(
            result.is_ok(),
            "panic in round {rounds}: {name} = {}",
            bytes.escape_ascii()
        );
        rounds += 1;
    }
    println!("{rounds} inputs");
    assert!(rounds > 0);
}

#[test]
fn files_of_proc_of_any_bytes_are_read_without_a_panic() {
    let read = |path: &str| (path.to_owned(), std::fs::read(path).unwrap_or_default());
    let mut inputs: Vec<_> = ["maps", "smaps", "stat", "status", "mountinfo"]
        .iter()
        .map(|name| read(&format!("/proc/self/{name}")))
        .collect();
    inputs.push(read("/proc/net/igmp"));
    inputs.push(read("/proc/net/igmp6"));
    let fdinfo = "pos:\t0\nflags:\t02004002\nmnt_id:\t15\nino:\t1\neventfd-count: 3\ntfd: 5 events: 19 data: 5 pos:0 ino:1 sdev:f\n\
                  inotify wd:1 ino:2 sdev:800001 mask:3 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:0102030405060708\n\
                  lock:\t1: POSIX  ADVISORY  WRITE 1234 00:01:2 0 EOF\nclockid: 0\nticks: 0\nsettime flags: 01\n\
                  it_value: (0, 49406829)\nit_interval: (1, 0)\nsigmask:\t0000000000000200\nPid:\t7\nNSpid:\t7\n";
    inputs.push(("fdinfo".into(), fdinfo.into()));
    fuzz(&inputs, |name, bytes| {
        let text = String::from_utf8_lossy(bytes);
        match name.rsplit('/').next().unwrap_or_default() {
            "maps" | "smaps" => drop(procfs::maps::parse(bytes)),
            "stat" => drop(procfs::stat::parse(bytes)),
            "status" => drop(procfs::status::parse(bytes)),
            "mountinfo" => drop(procfs::mountinfo::parse(bytes)),
            "igmp" => drop(procfs::multicast::parse_v4(&text)),
            "igmp6" => drop(procfs::multicast::parse_v6(&text)),
            _ => drop(procfs::fdinfo::parse(bytes)),
        }
    });
}

#[test]
fn messages_of_a_migration_of_any_bytes_are_read_without_a_panic() {
    let begin = Begin {
        tasks: vec![TaskShape {
            entry: Some(Default::default()),
            vmas: vec![Default::default(); 3],
            staged: vec![0, 7],
            ..TaskShape::default()
        }],
        files: vec![NeededFile {
            path: "/bin/sh".into(),
            size: 7,
            build_id: vec![1, 2],
        }],
        addresses: vec!["10.0.0.1".into()],
        ..Begin::default()
    };
    let last = Final {
        lazy: vec![LazyPages {
            pid: 1,
            bounds: vec![4096, 8192],
        }],
    };
    let packets = Packets {
        packets: vec![vec![0x45; 40]],
        last: true,
    };
    let bodies = [Body::Begin(begin), Body::Final(last), Body::Packets(packets)];
    let inputs: Vec<_> = bodies.map(|body| (String::new(), wire::encode(body))).into();
    fuzz(&inputs, |_, bytes| drop(wire::decode(bytes)));
}

/// A program, dumped and left running; the bytes of its images.
fn images_of(host: &Host, victim: &Victim, directory: &Path) -> Vec<(String, Vec<u8>)> {
    let (pid, images) = (victim.pid.to_string(), directory.display().to_string());
    std::fs::create_dir_all(directory).unwrap();
    let words = [
        "dump",
        "-t",
        &pid,
        "-D",
        &images,
        "--leave-running",
        "--tcp-established",
        "--shell-job",
    ];
    let output = host.whimbrel(&words);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    let images = entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".img"));
    let mut images: Vec<_> = images
        .map(|entry| {
            (
                entry.file_name().to_string_lossy().into_owned(),
                std::fs::read(entry.path()).unwrap(),
            )
        })
        .collect();
    images.sort();
    images
}

#[test]
fn images_of_any_bytes_are_restored_or_refused_and_leave_nothing_behind() {
    if !common::can_make_hosts() || !common::has_python() {
        return;
    }
    let directory = tempfile::Builder::new().prefix("whimbrel-test-").tempdir().unwrap();
    let host = Host::new("lone", directory.path(), 2000);
    let victim = Victim::start(&host, directory.path(), "connected.py", &[]);
    let good = images_of(&host, &victim, &directory.path().join("good"));
    host.kill(victim.pid, "KILL");
    common::wait_for("only the first process is there", || {
        (host.processes().len() == 1).then_some(())
    });
    // Bytes of pages are not looked at: there is nothing to be found.
    let small: Vec<_> = good
        .iter()
        .filter(|(name, _)| !name.starts_with("pages-"))
        .cloned()
        .collect();
    fuzz(&small, |name, bytes| {
        let store = MemStore::new();
        for (other, content) in good.iter().filter(|(other, _)| other != name) {
            store.insert(other, content.clone()).unwrap();
        }
        store.insert(name, bytes.to_vec()).unwrap();
        assert_eq!(store.list().unwrap().len(), good.len());
        drop(TreeImage::load(&store));
    });

    let deadline = Instant::now() + seconds();
    let mut random = Random(7);
    let (mut rounds, mut restored) = (0, 0);
    while Instant::now() < deadline {
        let images = directory.path().join("bad");
        let _ = std::fs::remove_dir_all(&images);
        std::fs::create_dir_all(&images).unwrap();
        let chosen = random.below(small.len());
        for (name, content) in &good {
            let mut bytes = content.clone();
            if *name == small[chosen].0 {
                random.damage(&mut bytes);
            }
            std::fs::write(images.join(name), bytes).unwrap();
        }
        let images = images.display().to_string();
        let words = ["restore", "-D", &images, "-d", "--tcp-established", "--shell-job"];
        let output = host.run(&[&["timeout".to_owned(), "20".into()][..], &host.tool(&words)].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        let when = format!("round {rounds}, {} damaged: {} {said}", small[chosen].0, output.status);
        // 1: refused, with a reason; anything else is a panic, a signal or a hang.
        match output.status.code() {
            Some(0) => restored += 1,
            Some(1) => assert!(said.contains("Error"), "{when}"),
            _ => panic!("{when}"),
        }
        assert!(!said.contains("panicked"), "{when}");
        for pid in host
            .processes()
            .into_iter()
            .filter(|&pid| pid != 1 && output.status.success())
        {
            host.kill(pid, "KILL");
        }
        common::wait_or(
            || (host.processes().len() == 1).then_some(()),
            || format!("{when}: something is left: {:?}", host.list()),
        );
        rounds += 1;
    }
    println!("{rounds} damaged dumps, {restored} of them restored all the same");
    assert!(rounds > 0);
}
