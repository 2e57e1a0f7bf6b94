//! After a dump and a restore, /proc says of a program what it said before. What is compared, and what is not: see `common/facts.rs`.

mod common;

use common::facts::{differences, facts};
use common::host::Host;
use common::{Victim, wait_for};

fn lone_host() -> (tempfile::TempDir, Host) {
    let directory = tempfile::Builder::new().prefix("whimbrel-test-").tempdir().unwrap();
    let host = Host::new("lone", directory.path(), 2000);
    (directory, host)
}

/// Dumps, restores and compares, twice: what a restore does not set could still be right by chance once.
fn is_the_same_after_dump_and_restore(host: &Host, pid: i32) {
    let before = facts(host, pid);
    for round in 0..2 {
        let images = host.directory.join(format!("images-{round}")).display().to_string();
        std::fs::create_dir_all(&images).unwrap();
        let number = pid.to_string();
        let options = ["--tcp-established", "--file-locks", "--shell-job"];
        let dump = host.whimbrel(&[&["dump", "-t", &number, "-D", &images], &options[..]].concat());
        assert!(dump.status.success(), "{}", common::tool::text(&dump.stderr));
        wait_for("the program is gone", || (!host.proc(pid, "").exists()).then_some(()));
        let restore = host.whimbrel(&[&["restore", "-d", "-D", &images], &options[..]].concat());
        assert!(restore.status.success(), "{}", common::tool::text(&restore.stderr));
        // The restored program becomes a child of the first process when the tool has ended.
        let adopted = || host.read_proc(pid, "status").contains("PPid:\t1\n").then_some(());
        wait_for("the program has its parent", adopted);
        let all = differences(&before, &facts(host, pid));
        assert!(
            all.is_empty(),
            "round {round}: {} differences:\n{}",
            all.len(),
            all.join("\n")
        );
    }
}

#[test]
fn proc_says_the_same_of_sleep() {
    if !common::can_make_hosts() {
        return;
    }
    let (directory, host) = lone_host();
    let output = directory.path().join("output");
    let pid = common::victim::start_daemon(&host, directory.path(), &["sleep".into(), "1000".into()], &output);
    wait_for("sleep sleeps", || {
        host.read_proc(pid, "syscall").starts_with("230").then_some(())
    });
    is_the_same_after_dump_and_restore(&host, pid);
}

#[test]
fn proc_says_the_same_of_a_program_with_threads_timers_signals_memory_and_files_of_all_kinds() {
    if !common::can_make_hosts() || !common::has_python() {
        return;
    }
    let (directory, host) = lone_host();
    let victim = Victim::start(&host, directory.path(), "still.py", &[]);
    // It is ready a moment before it waits.
    wait_for("the program waits", || {
        host.read_proc(victim.pid, "syscall").starts_with("34 ").then_some(())
    });
    is_the_same_after_dump_and_restore(&host, victim.pid);
    host.kill(victim.pid, "USR1");
    wait_for("the program does its round", || (victim.rounds() == 1).then_some(()));
}

#[test]
fn proc_says_the_same_of_redis() {
    if !common::can_make_hosts() {
        return;
    }
    if !common::installed("redis-server") || !common::installed("redis-cli") {
        common::skip("redis-server is not installed");
        return;
    }
    let (directory, host) = lone_host();
    let redis = common::redis::Redis::start(&host, directory.path(), 10);
    wait_for("redis forgets its clients", || {
        host.shell("ss -Htn").is_empty().then_some(())
    });
    is_the_same_after_dump_and_restore(&host, redis.pid);
    assert_eq!(
        host.shell("redis-cli get key:7")
            .trim_matches('\0')
            .trim_end_matches(['\0', '\n']),
        "value:7"
    );
}
