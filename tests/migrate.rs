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
            victim.goes_on_at(from);
            moves(from, to, victim.pid, &["--mode", mode]);
            victim.goes_on_at(to);
        }
    }
    nothing_is_left(&hosts.a, name);
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
