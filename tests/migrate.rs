//! Programs move between hosts while they work, and they themselves say that nothing was lost.

mod common;

use common::host::{MOVING, PORT};
use common::leftovers::Looks;
use common::redis::{Clients, Redis};
use common::{Host, Hosts, Victim};

/// The ways memory can travel.
const MODES: [&str; 3] = ["pre-copy", "post-copy", "hybrid"];

fn ready(needs_redis: bool) -> bool {
    if needs_redis && !(common::installed("redis-server") && common::installed("redis-cli")) {
        common::skip("redis-server is not installed");
        return false;
    }
    common::can_make_hosts() && common::has_python()
}

/// Moves a process; the tool must succeed and leave nothing at the source.
fn moves(from: &Host, to: &Host, pid: i32, options: &[&str]) -> serde_json::Value {
    let done = match from.migrate(pid, to, options).finish() {
        Ok(done) => done,
        Err(error) => panic!(
            "{error}\nthe destination says {}\n{:#?}\n{:#?}",
            std::fs::read_to_string(to.directory.join("serve.log")).unwrap_or_default(),
            from.list(),
            to.list()
        ),
    };
    from.has_no_network_lock("after a migration");
    to.has_no_network_lock("after a migration");
    common::wait_for("the old copy goes", || (!from.proc(pid, "").exists()).then_some(()));
    done
}

/// After a move, a host has its tool and what was moved, or nothing.
fn nothing_is_left(host: &Host, name: &str) {
    host.has_only("in the end", |_, line| line.contains(name) || line.contains(" serve"));
}

fn redis_moves(mode: &str) {
    if !ready(true) {
        return;
    }
    let _alone = common::alone();
    let hosts = Hosts::new();
    let _serve = hosts.b.serve();
    let redis = Redis::start(&hosts.a, hosts.path(), 200);
    let clients = Clients::start(&hosts.client, hosts.path(), 3);
    let address = format!("{MOVING}/24");
    let done = moves(
        &hosts.a,
        &hosts.b,
        redis.pid,
        &["--mode", mode, "--move-address", &address],
    );
    clients.work();
    let (replies, messages) = clients.stop();
    println!("{replies} replies and {messages} messages, all right; {done}");
    assert!(hosts.b.read_proc(redis.pid, "status").contains("TracerPid:\t0"));
    nothing_is_left(&hosts.a, "nothing");
    nothing_is_left(&hosts.b, "redis-server");
}

#[test]
fn redis_moves_with_its_connections_in_precopy_mode() {
    redis_moves("pre-copy");
}

#[test]
fn redis_moves_with_its_connections_in_postcopy_mode() {
    redis_moves("post-copy");
}

#[test]
fn redis_moves_with_its_connections_in_hybrid_mode() {
    redis_moves("hybrid");
}

#[test]
fn redis_moves_there_and_back_ten_times_without_losing_anything() {
    if !ready(true) {
        return;
    }
    let _alone = common::alone();
    let hosts = Hosts::new();
    let _serves = [hosts.a.serve(), hosts.b.serve()];
    let redis = Redis::start(&hosts.a, hosts.path(), 50);
    let clients = Clients::start(&hosts.client, hosts.path(), 2);
    let address = format!("{MOVING}/24");
    for round in 0..10 {
        let mode = MODES[round % MODES.len()];
        for (from, to) in [(&hosts.a, &hosts.b), (&hosts.b, &hosts.a)] {
            moves(from, to, redis.pid, &["--mode", mode, "--move-address", &address]);
            clients.work();
        }
    }
    clients.stop();
    nothing_is_left(&hosts.a, "redis-server");
    nothing_is_left(&hosts.b, "nothing");
}

/// A program of `tests/programs` moves in each mode, there and back.
fn program_moves(name: &str, arguments: &[&str]) {
    if !ready(false) {
        return;
    }
    let _alone = common::alone();
    let hosts = Hosts::new();
    let _serves = [hosts.a.serve(), hosts.b.serve()];
    let victim = Victim::start(&hosts.a, hosts.path(), name, arguments);
    for mode in MODES {
        for (from, to) in [(&hosts.a, &hosts.b), (&hosts.b, &hosts.a)] {
            println!("{mode} from {} to {}", from.name, to.name);
            victim.goes_on_at(from);
            moves(from, to, victim.pid, &["--mode", mode]);
            victim.goes_on_at(to);
        }
    }
    // A process whose first thread has ended shows no command line.
    let known = |pid: i32, line: &str| pid == victim.pid || line.contains(name) || line.contains(" serve");
    hosts.a.has_only("in the end", known);
    nothing_is_left(&hosts.b, "nothing");
}

#[test]
fn a_family_of_programs_with_threads_pipes_sockets_and_timers_moves_in_each_mode() {
    program_moves("workload.py", &[]);
}

#[test]
fn a_program_that_writes_its_memory_moves_in_each_mode() {
    program_moves("memory.py", &["64", "1"]);
}

#[test]
fn a_program_that_forks_maps_and_unmaps_all_the_time_moves_in_each_mode() {
    program_moves("churn.py", &[]);
}

#[test]
fn a_program_whose_first_thread_has_ended_moves_in_each_mode() {
    program_moves("headless.py", &[]);
}

#[test]
fn a_program_under_seccomp_moves_in_each_mode() {
    program_moves("filtered.py", &[]);
}

#[test]
fn tasks_that_share_their_descriptors_move_in_each_mode() {
    program_moves("sharing.py", &[]);
}

#[test]
fn a_shell_pipeline_with_a_zombie_moves() {
    if !ready(false) {
        return;
    }
    let _alone = common::alone();
    let hosts = Hosts::new();
    let _serves = [hosts.a.serve(), hosts.b.serve()];
    let victim = Victim::start_shell(&hosts.a, hosts.path(), "pipeline.sh");
    let zombies = |host: &Host| {
        let state = |&pid: &i32| host.read_proc(pid, "stat").contains(") Z ");
        host.processes().into_iter().filter(state).count()
    };
    for (from, to) in [(&hosts.a, &hosts.b), (&hosts.b, &hosts.a)] {
        victim.goes_on_at(from);
        moves(from, to, victim.pid, &[]);
        victim.goes_on_at(to);
        common::wait_for("only the zombie is there", || (zombies(to) == 1).then_some(()));
    }
}

/// The tool waits in the freeze, behind the network lock, until a client has sent what it sends then.
fn moves_when_sent(hosts: &Hosts, victim: &Victim) {
    let script = hosts.path().join("action");
    let directory = hosts.path().display();
    let text = format!(
        "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = pre-resume ] || exit 0\ncd {directory} && touch frozen\n\
         while [ ! -e sent ]; do sleep 0.01; done\n"
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let (script, address) = (script.display().to_string(), format!("{MOVING}/24"));
    let options = ["--move-address", &address, "--action-script", &script];
    moves(&hosts.a, &hosts.b, victim.pid, &options);
}

#[test]
fn what_a_client_sends_in_the_freeze_is_delivered_and_who_connects_then_is_served() {
    if !ready(false) {
        return;
    }
    let hosts = Hosts::new();
    let serve = hosts.b.serve();
    let victim = Victim::start(&hosts.a, hosts.path(), "echo.py", &[]);
    let client = common::program("late_client.py").display().to_string();
    let directory = hosts.path().display().to_string();
    let words = [common::victim::PYTHON, &client, MOVING, &directory];
    let mut client = hosts.client.command(&words).spawn().unwrap();
    let there = |name: &str| hosts.path().join(name).exists().then_some(());
    common::wait_for("the client is connected", || there("connected"));
    moves_when_sent(&hosts, &victim);
    assert!(client.wait().unwrap().success());
    println!("{}", std::fs::read_to_string(hosts.path().join("done")).unwrap());
    // At least the line and the new connection's first packet: that they were sent then, the client knows.
    let log = serve.log();
    let delivered = log
        .lines()
        .find_map(|line| line.split_once(" packets that came to the old place"));
    let delivered = delivered.and_then(|(before, _)| before.rsplit(' ').next()?.parse::<u32>().ok());
    assert!(delivered >= Some(2), "{log}");
    victim.goes_on_at(&hosts.b);
}

#[test]
fn datagrams_that_wait_and_those_that_come_in_the_freeze_are_received_once_and_in_order() {
    if !ready(false) {
        return;
    }
    let hosts = Hosts::new();
    let serve = hosts.b.serve();
    let directory = hosts.path().display().to_string();
    let victim = Victim::start(&hosts.a, hosts.path(), "mailbox.py", &[&directory, "200"]);
    let client = common::program("late_sender.py").display().to_string();
    let words = [common::victim::PYTHON, &client, MOVING, &directory, "200"];
    let mut client = hosts.client.command(&words).spawn().unwrap();
    let there = |name: &str| hosts.path().join(name).exists().then_some(());
    common::wait_for("half of them are sent", || there("half"));
    moves_when_sent(&hosts, &victim);
    std::fs::write(hosts.path().join("read"), "").unwrap();
    assert!(client.wait().unwrap().success(), "{}", serve.log());
    assert!(
        serve.log().contains(" 100 packets that came to the old place"),
        "{}",
        serve.log()
    );
    victim.goes_on_at(&hosts.b);
}

/// A migration that must fail with all of these words, after which the program goes on as before.
fn fails(from: &Host, to: &str, victim: &Victim, words: &[&str]) {
    let looks = Looks::at(from, victim.pid);
    let error = from
        .migrate_to(victim.pid, to, &[])
        .finish()
        .expect_err("the migration must fail");
    for word in words {
        assert!(error.contains(word), "{word:?} is not in {error}");
    }
    assert!(!error.contains("\"freeze\""), "it failed after the freeze: {error}");
    looks.must_return(from, victim.pid, "after a migration that failed");
    victim.goes_on_at(from);
    from.has_no_network_lock("after a migration that failed");
}

/// After a failure and its cure the same migration succeeds.
fn retry_succeeds(hosts: &Hosts, victim: &Victim) {
    moves(&hosts.a, &hosts.b, victim.pid, &[]);
    victim.goes_on_at(&hosts.b);
    nothing_is_left(&hosts.a, "nothing");
}

#[test]
fn a_pid_that_is_taken_is_named_before_anything_is_frozen() {
    if !ready(false) {
        return;
    }
    let hosts = Hosts::new();
    let _serve = hosts.b.serve();
    let victim = Victim::start(&hosts.a, hosts.path(), "connected.py", &[]);
    hosts.b.set_last_pid(victim.pid as u32 - 1);
    let sleeper = common::victim::start_daemon(
        &hosts.b,
        hosts.path(),
        &["sleep".into(), "1000".into()],
        &hosts.path().join("sleep"),
    );
    // The shells that start it take pids of their own before it.
    let taken = hosts.b.processes().contains(&victim.pid);
    if !taken {
        hosts.b.kill(sleeper, "KILL");
        hosts.b.shell(&format!(
            "(echo {} > /proc/sys/kernel/ns_last_pid; sleep 1000 > /dev/null 2>&1 &)",
            victim.pid - 1
        ));
    }
    fails(
        &hosts.a,
        &hosts.b.address,
        &victim,
        &[&format!("pid {}", victim.pid), "in use"],
    );
    hosts.b.kill(victim.pid, "KILL");
    common::wait_for("the pid is free", || {
        (!hosts.b.proc(victim.pid, "").exists()).then_some(())
    });
    retry_succeeds(&hosts, &victim);
}

#[test]
fn a_file_that_the_destination_lacks_is_named_before_anything_is_frozen() {
    if !ready(false) {
        return;
    }
    let hosts = Hosts::new();
    let code = "import mmap\nfile = open(os.path.dirname(LOG) + '/needed/file', 'rb')\n\
                area = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n\
                def work(): check('file', area[:6], b'needed')\n\
                forever(work)\n";
    let needed = hosts.path().join("needed");
    std::fs::create_dir(&needed).unwrap();
    std::fs::write(needed.join("file"), "needed".repeat(1000)).unwrap();
    let victim = Victim::start_code(&hosts.a, hosts.path(), "needs.py", code, &[]);
    hosts.b.shell(&format!("mount -t tmpfs tmpfs {}", needed.display()));
    let _serve = hosts.b.serve();
    fails(
        &hosts.a,
        &hosts.b.address,
        &victim,
        &[&needed.join("file").display().to_string(), "No such file"],
    );
    // Another version of it is not good enough.
    hosts.b.shell(&format!("echo other > {}/file", needed.display()));
    fails(
        &hosts.a,
        &hosts.b.address,
        &victim,
        &[&needed.join("file").display().to_string(), "same version"],
    );
    hosts.b.shell(&format!("umount {}", needed.display()));
    retry_succeeds(&hosts, &victim);
}

#[test]
fn a_peer_that_is_not_known_is_refused_and_both_sides_are_told() {
    if !ready(false) {
        return;
    }
    let hosts = Hosts::strangers();
    let serve = hosts.b.serve();
    let victim = Victim::start(&hosts.a, hosts.path(), "connected.py", &[]);
    // The source does not know the destination …
    let fingerprint = hosts.b.fingerprint();
    fails(&hosts.a, &hosts.b.address, &victim, &[&fingerprint, "trust"]);
    // … and then not the other way round.
    hosts.a.trust(&hosts.b);
    fails(&hosts.a, &hosts.b.address, &victim, &["trust"]);
    common::wait_for("the destination names the stranger", || {
        serve.log().contains(&hosts.a.fingerprint()).then_some(())
    });
    hosts.b.trust(&hosts.a);
    drop(serve);
    let _serve = hosts.b.serve();
    retry_succeeds(&hosts, &victim);
}

#[test]
fn a_destination_that_is_not_there_is_named() {
    if !ready(false) {
        return;
    }
    let hosts = Hosts::new();
    let victim = Victim::start(&hosts.a, hosts.path(), "connected.py", &[]);
    fails(
        &hosts.a,
        &hosts.b.address,
        &victim,
        &[&format!("{}:{PORT}", hosts.b.address)],
    );
    fails(&hosts.a, "10.77.0.77", &victim, &["10.77.0.77"]);
    let _serve = hosts.b.serve();
    retry_succeeds(&hosts, &victim);
}

#[test]
fn a_destination_without_memory_is_named_before_anything_is_frozen() {
    if !ready(false) {
        return;
    }
    let hosts = Hosts::new();
    let _serve = hosts.b.serve();
    let victim = Victim::start(&hosts.a, hosts.path(), "memory.py", &["64", "1"]);
    let little = hosts.path().join("meminfo");
    std::fs::write(&little, "MemTotal: 65536 kB\nMemAvailable: 1024 kB\n").unwrap();
    hosts
        .b
        .shell(&format!("mount --bind {} /proc/meminfo", little.display()));
    fails(&hosts.a, &hosts.b.address, &victim, &["1 MiB are available"]);
    hosts.b.shell("umount /proc/meminfo");
    retry_succeeds(&hosts, &victim);
}

/// A directory of a host on which nothing can be written.
fn full_directory(hosts: &Hosts, host: &Host) -> String {
    let directory = hosts.path().join("full").display().to_string();
    std::fs::create_dir_all(&directory).unwrap();
    host.shell(&format!(
        "mount -t tmpfs -o size=4096 tmpfs {directory} && dd if=/dev/zero of={directory}/filler bs=4096 count=1 status=none"
    ));
    directory
}

/// A migration that fails in the freeze, after which the program goes on as before, and there is nothing at the destination.
fn fails_in_the_freeze(hosts: &Hosts, victim: &Victim, options: &[&str], words: &[&str]) {
    let looks = Looks::at(&hosts.a, victim.pid);
    let error = hosts
        .a
        .migrate(victim.pid, &hosts.b, options)
        .finish()
        .expect_err("the migration must fail");
    for word in words {
        assert!(error.contains(word), "{word:?} is not in {error}");
    }
    looks.must_return(&hosts.a, victim.pid, "after a migration that failed");
    victim.goes_on_at(&hosts.a);
    hosts.a.has_no_network_lock("after a migration that failed");
    nothing_is_left(&hosts.b, "nothing");
}

#[test]
fn a_source_that_cannot_note_its_decision_lets_the_program_go_on() {
    if !ready(false) {
        return;
    }
    let hosts = Hosts::new();
    let _serve = hosts.b.serve();
    let victim = Victim::start(&hosts.a, hosts.path(), "connected.py", &[]);
    let full = full_directory(&hosts, &hosts.a);
    let words = ["write the decision", "No space left"];
    fails_in_the_freeze(&hosts, &victim, &["--journal", &full], &words);
    retry_succeeds(&hosts, &victim);
}

#[test]
fn a_destination_that_cannot_note_an_arrival_gives_the_program_back() {
    if !ready(false) {
        return;
    }
    let hosts = Hosts::new();
    let full = full_directory(&hosts, &hosts.b);
    let serve = hosts.b.serve_with(&["--journal", &full]);
    let victim = Victim::start(&hosts.a, hosts.path(), "connected.py", &[]);
    fails_in_the_freeze(&hosts, &victim, &[], &["gave the tree up before it ran"]);
    assert!(serve.log().contains("No space left"), "{}", serve.log());
    drop(serve);
    let _serve = hosts.b.serve();
    retry_succeeds(&hosts, &victim);
}

#[test]
fn a_dry_run_tells_and_touches_nothing() {
    if !ready(false) {
        return;
    }
    let hosts = Hosts::new();
    let _serve = hosts.b.serve();
    let victim = Victim::start(&hosts.a, hosts.path(), "connected.py", &[]);
    let looks = Looks::at(&hosts.a, victim.pid);
    hosts.a.migrate(victim.pid, &hosts.b, &["--dry-run"]).finish().unwrap();
    looks.must_return(&hosts.a, victim.pid, "after a dry run");
    victim.goes_on_at(&hosts.a);
    nothing_is_left(&hosts.b, "nothing");
    retry_succeeds(&hosts, &victim);
}
