//! The tool is killed, at any moment: the program that it had in its hands goes on, and nothing of the tool stays.

mod common;

use std::time::{Duration, Instant};

use common::host::Direction;
use common::leftovers::Looks;
use common::tool::Running;
use common::{Host, Hosts, Migration, Serve, Victim};

/// A host without a network, and a directory for its files.
fn lone_host() -> (tempfile::TempDir, Host) {
    let directory = tempfile::Builder::new().prefix("whimbrel-test-").tempdir().unwrap();
    let host = Host::new("lone", directory.path(), 2000);
    (directory, host)
}

/// How often the tool is killed in each test. `WHIMBREL_KILLS` says otherwise.
fn kills() -> usize {
    common::setting("WHIMBREL_KILLS", 40)
}

/// Runs the tool once to its end, to learn how long that takes, then kills it at moments that are spread over that time and
/// a little more. After each the victim must be as before.
fn survives(host: &Host, victim: &Victim, words: &dyn Fn(&str) -> Vec<String>) {
    victim.goes_on(host);
    let looks = Looks::at(host, victim.pid);
    let run = |directory: &str| {
        std::fs::create_dir_all(directory).unwrap();
        let mut command = host.command(&words(directory));
        let errors = std::fs::File::create(host.directory.join("tool.err")).unwrap();
        command.stdout(std::process::Stdio::null()).stderr(errors);
        Running::start(command)
    };
    let images = host.directory.join("images").display().to_string();
    // The machine may be busy just now: the shortest of some runs.
    let timed = |_| {
        let _ = std::fs::remove_dir_all(&images);
        let started = Instant::now();
        let status = run(&images).wait();
        let errors = std::fs::read_to_string(host.directory.join("tool.err")).unwrap_or_default();
        assert!(status.success(), "{errors}");
        started.elapsed()
    };
    let whole = (0..5).map(timed).min().unwrap_or_default();
    looks.must_return(host, victim.pid, "after a whole run");
    println!("a whole run takes {whole:?}");
    let mut killed = 0;
    for round in 0..kills() {
        let _ = std::fs::remove_dir_all(&images);
        let started = Instant::now();
        let mut tool = run(&images);
        let moment = whole.mul_f64(common::spread(round) * 1.1);
        while started.elapsed() < moment {
            std::thread::sleep(Duration::from_micros(50));
        }
        killed += usize::from(!tool.ended());
        tool.kill();
        let when = format!("round {round}, killed after {moment:?} of {whole:?}");
        looks.must_return(host, victim.pid, &when);
        victim.goes_on(host);
    }
    println!("{killed} of {} were killed while at work", kills());
    host.has_no_network_lock("after all kills");
    host.has_only("after all kills", |_, line| {
        line.contains("connected.py") || line.contains("memory.py")
    });
    let _ = std::fs::remove_dir_all(&images);
    let status = run(&images).wait();
    assert!(
        status.success(),
        "the tool works afterwards: {}",
        std::fs::read_to_string(host.directory.join("tool.err")).unwrap()
    );
    looks.must_return(host, victim.pid, "after the last run");
    victim.goes_on(host);
}

fn killed_while(verb: &'static [&'static str]) {
    if !common::can_make_hosts() || !common::has_python() {
        return;
    }
    let (directory, host) = lone_host();
    let victim = Victim::start(&host, directory.path(), "connected.py", &[]);
    let pid = victim.pid.to_string();
    survives(&host, &victim, &|images| {
        host.tool(&[verb, &["-t", &pid, "-D", images]].concat())
    });
}

#[test]
fn a_program_survives_the_death_of_a_tool_that_dumps_it() {
    killed_while(&["dump", "--leave-running", "--tcp-established", "--shell-job"]);
}

#[test]
fn a_program_survives_the_death_of_a_tool_that_predumps_it() {
    killed_while(&["pre-dump", "--tcp-established", "--shell-job"]);
}

/// Hosts with a program that is about to move, and a tool at the other end.
struct Move {
    hosts: Hosts,
    serve: Serve,
    victim: Victim,
}

impl Move {
    fn prepare() -> Move {
        Move::of("memory.py", &["24", "1"])
    }

    fn of(program: &str, arguments: &[&str]) -> Move {
        let hosts = Hosts::new();
        let serve = hosts.b.serve();
        let victim = Victim::start(&hosts.a, hosts.path(), program, arguments);
        Move { hosts, serve, victim }
    }

    fn start(&self, mode: &str) -> Migration {
        // Small enough a downtime that hybrid mode leaves something to follow.
        let options = ["--mode", mode, "--max-downtime", "1"];
        self.hosts.a.migrate(self.victim.pid, &self.hosts.b, &options)
    }

    fn is_at(&self, host: &Host) -> bool {
        !host.find("memory.py").is_empty()
    }

    /// Waits until there is one copy, and says where. The program itself would notice a second one: its rounds are numbered.
    fn only_copy(&self, when: &str) -> &Host {
        let (a, b) = (&self.hosts.a, &self.hosts.b);
        let one = || match (self.is_at(a), self.is_at(b)) {
            (true, false) => Some(a),
            (false, true) => Some(b),
            _ => None,
        };
        let host = common::wait_or(one, || format!("{when}: one copy; {:#?} {:#?}", a.list(), b.list()));
        self.victim.goes_on_at(host);
        host
    }

    /// It goes on at the source as if nothing had been; then a retry succeeds, at once, and nothing else is left anywhere.
    fn recovers(mut self, looks: &Looks, when: &str) {
        let (a, b) = (&self.hosts.a, &self.hosts.b);
        assert_eq!(self.only_copy(when).name, a.name, "{when}");
        looks.must_return(a, self.victim.pid, when);
        a.has_no_network_lock(when);
        a.has_only(when, |_, line| line.contains("memory.py"));
        if self.serve.running.ended() {
            self.serve = b.serve();
        }
        self.retry(when);
        self.hosts.b.has_no_network_lock(when);
        self.hosts
            .b
            .has_only(when, |_, line| line.contains(" serve") || line.contains("memory.py"));
        // Half-made trees are called as the tool's seeds are, not as the program.
        assert_eq!(self.hosts.b.find("memory.py").len(), 1, "{when}");
    }

    /// The same migration again, which must succeed.
    fn retry(&self, when: &str) {
        if let Err(error) = self.start("hybrid").finish() {
            panic!("{when}, the retry: {error}");
        }
        assert_eq!(self.only_copy(when).name, self.hosts.b.name, "{when}");
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    SourceDies,
    DestinationDies,
    /// What the source sends is lost.
    Mute,
    /// What the source would hear is lost.
    Deaf,
    Unplugged,
    Cancelled,
}

/// Phases before Commit, with the mode in which they occur.
const BEFORE_COMMIT: [(&str, &str); 5] = [
    ("preflight", "hybrid"),
    ("round 1", "pre-copy"),
    ("freeze", "hybrid"),
    ("final", "post-copy"),
    ("prepared", "hybrid"),
];

fn ready() -> bool {
    common::can_make_hosts() && common::has_python()
}

/// Lets something go wrong in a phase; the migration fails or not, as it happens to be in time.
fn goes_wrong(fault: Fault, phase: &str, mode: &str) {
    goes_wrong_after(fault, phase, mode, Duration::ZERO);
}

/// As [`goes_wrong`], so long after the phase has begun.
fn goes_wrong_after(fault: Fault, phase: &str, mode: &str, pause: Duration) {
    let when = format!("{fault:?} in phase {phase} + {pause:?}, {mode}");
    println!("{when}");
    let mut this = Move::prepare();
    this.victim.goes_on_at(&this.hosts.a);
    let looks = Looks::at(&this.hosts.a, this.victim.pid);
    let mut migration = this.start(mode);
    assert!(
        migration.wait_for_phase(phase),
        "{when}: {:?} {}",
        migration.seen,
        migration.errors()
    );
    std::thread::sleep(pause);
    let (a, b) = (&this.hosts.a, &this.hosts.b);
    match fault {
        Fault::SourceDies => migration.running.kill(),
        Fault::DestinationDies => this.serve.running.kill(),
        Fault::Mute => a.cut(Direction::Out),
        Fault::Deaf => a.cut(Direction::In),
        Fault::Unplugged => this.hosts.link(b, false),
        Fault::Cancelled => migration.running.signal(libc::SIGTERM),
    }
    let committed = |migration: &Migration| {
        let commit = |event: &serde_json::Value| event["event"] == "phase" && event["phase"] == "commit";
        migration.seen.iter().any(commit)
    };
    match fault {
        Fault::DestinationDies | Fault::Mute | Fault::Deaf | Fault::Unplugged => {
            // Before Commit the source gives up by itself; after it, it asks until it gets an answer.
            let over = migration.wait_until(|migration| migration.running.ended() || committed(migration));
            assert!(over, "{when}: it neither fails nor goes on: {:?}", migration.seen);
            match fault {
                Fault::Mute => a.mend(Direction::Out),
                Fault::Deaf => a.mend(Direction::In),
                Fault::DestinationDies => this.serve = b.serve(),
                _ => this.hosts.link(b, true),
            }
        }
        _ => {}
    }
    let moved = migration.finish();
    match moved {
        // The fault came too late: it is there, and nothing else is.
        Ok(_) => assert_eq!(this.only_copy(&when).name, this.hosts.b.name, "{when}"),
        Err(_) if this.is_stopped_at_source() => {
            // Commit was reached before the tool died. The tool, started again, asks what became of it.
            let again = this.start("hybrid").finish();
            let host = this.only_copy(&when);
            assert!(again.is_ok() || host.name == this.hosts.b.name, "{when}: {again:?}");
        }
        // The tool died when all was done but its own end.
        Err(_) if this.victim.state(&this.hosts.a).is_none() => {
            assert_eq!(this.only_copy(&when).name, this.hosts.b.name, "{when}")
        }
        Err(_) => this.recovers(&looks, &when),
    }
}

impl Move {
    /// Did the source's tool end after Commit? Then the old copy waits, stopped by a signal.
    fn is_stopped_at_source(&self) -> bool {
        let state = || match self.victim.state(&self.hosts.a) {
            Some('t') => None,
            other => Some(other),
        };
        common::wait_for("the tree is let go", state) == Some('T')
    }
}

fn each_phase(fault: Fault) {
    if !ready() {
        return;
    }
    for (phase, mode) in BEFORE_COMMIT {
        goes_wrong(fault, phase, mode);
    }
}

#[test]
fn the_program_goes_on_when_the_source_tool_dies_before_commit() {
    each_phase(Fault::SourceDies);
}

#[test]
fn the_program_goes_on_when_the_destination_tool_dies_before_commit() {
    each_phase(Fault::DestinationDies);
}

#[test]
fn the_program_goes_on_when_the_source_is_not_heard_any_more_before_commit() {
    each_phase(Fault::Mute);
}

#[test]
fn the_program_goes_on_when_the_source_hears_nothing_any_more_before_commit() {
    each_phase(Fault::Deaf);
}

#[test]
fn the_program_goes_on_when_the_link_goes_down_before_commit() {
    each_phase(Fault::Unplugged);
}

#[test]
fn the_program_goes_on_when_the_migration_is_cancelled_before_commit() {
    each_phase(Fault::Cancelled);
}

#[test]
fn one_copy_runs_when_the_source_tool_dies_around_commit() {
    if ready() {
        goes_wrong(Fault::SourceDies, "commit", "pre-copy");
    }
}

#[test]
fn one_copy_runs_when_the_destination_tool_dies_around_commit() {
    if !ready() {
        return;
    }
    for (round, mode) in ["pre-copy", "post-copy", "hybrid"]
        .iter()
        .cycle()
        .take(kills().div_ceil(7))
        .enumerate()
    {
        // Commit follows some milliseconds after the tree is put together.
        let pause = Duration::from_millis(12).mul_f64(common::spread(round));
        goes_wrong_after(Fault::DestinationDies, "prepared", mode, pause);
    }
}

#[test]
fn one_copy_runs_when_the_link_goes_down_around_commit() {
    if ready() {
        for fault in [Fault::Mute, Fault::Deaf, Fault::Unplugged] {
            goes_wrong(fault, "commit", "pre-copy");
        }
    }
}

#[test]
fn postcopy_goes_on_when_the_link_comes_back() {
    if !ready() {
        return;
    }
    for fault in [Fault::Mute, Fault::Unplugged] {
        let this = Move::prepare();
        let mut migration = this.start("post-copy");
        assert!(migration.wait_for_phase("post-copy"), "{}", migration.errors());
        match fault {
            Fault::Mute => this.hosts.a.cut(Direction::Out),
            _ => this.hosts.link(&this.hosts.b, false),
        }
        // Long enough for both ends to notice.
        std::thread::sleep(Duration::from_secs(12));
        this.victim.rounds();
        match fault {
            Fault::Mute => this.hosts.a.mend(Direction::Out),
            _ => this.hosts.link(&this.hosts.b, true),
        }
        migration.finish().unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        assert_eq!(this.only_copy("after post-copy").name, this.hosts.b.name);
    }
}

#[test]
fn a_program_whose_server_dies_in_postcopy_waits_and_goes_on_with_the_next_server() {
    if !ready() {
        return;
    }
    // Large enough not to be there at once.
    let mut this = Move::of("memory.py", &["250", "1"]);
    let mut migration = this.start("post-copy");
    assert!(migration.wait_for_phase("post-copy"), "{}", migration.errors());
    this.serve.running.kill();
    // It checks every page that it touches: zeros instead would end it.
    std::thread::sleep(Duration::from_secs(3));
    this.victim.rounds();
    let there = this.victim.state(&this.hosts.b);
    assert!(there.is_some_and(|state| state != 'Z'), "it is there: {there:?}");
    // The old copy has the pages that are missing: it must not go, and must not run.
    assert!(!migration.running.ended(), "the source still has what is missing");
    this.serve = this.hosts.b.serve();
    if let Err(error) = migration.finish() {
        panic!("with the next server: {error}; {}", this.serve.log());
    }
    assert_eq!(this.only_copy("after post-copy").name, this.hosts.b.name);
    let looks = Looks::at(&this.hosts.b, this.victim.pid);
    let guards = looks.descriptors.iter().filter(|shown| shown.contains("userfaultfd"));
    assert_eq!(guards.count(), 0, "{:?}", looks.descriptors);
    assert!(
        looks.status.iter().any(|line| line == "TracerPid:\t0"),
        "{:?}",
        looks.status
    );
}

#[test]
fn what_a_program_does_to_its_memory_in_postcopy_is_known_to_every_server_after_the_first() {
    if !ready() {
        return;
    }
    // It maps, moves, drops and protects memory all the time.
    let mut this = Move::of("churn.py", &["3000", "no"]);
    let mut migration = this.start("post-copy");
    assert!(migration.wait_for_phase("post-copy"), "{}", migration.errors());
    let mut took_over = 0;
    for round in 0..4 {
        std::thread::sleep(Duration::from_millis(200).mul_f64(common::spread(round)));
        this.serve.running.kill();
        this.victim.rounds();
        this.serve = this.hosts.b.serve();
        // It goes on for a while, with this one.
        let more = this.victim.rounds() + 2;
        let goes_on = || (this.victim.rounds() >= more).then_some(());
        common::wait_or(goes_on, || {
            format!("it goes on with server {round}: {}", this.serve.log())
        });
        took_over += usize::from(this.serve.log().contains("that came before"));
    }
    println!("{took_over} servers took over");
    assert!(took_over > 0);
    if let Err(error) = migration.finish() {
        panic!("with the last server: {error}; {}", this.serve.log());
    }
    assert!(!this.hosts.b.find("churn.py").is_empty() && this.hosts.a.find("churn.py").is_empty());
    this.victim.goes_on_at(&this.hosts.b);
}

#[test]
fn a_program_survives_the_death_of_a_source_tool_at_random_moments() {
    if !ready() {
        return;
    }
    let this = Move::prepare();
    let pid = this.victim.pid;
    let looks = Looks::at(&this.hosts.a, pid);
    let mut frozen = 0;
    for round in 0..kills() {
        let started = Instant::now();
        let mut migration = this.start(["pre-copy", "post-copy", "hybrid"][round % 3]);
        // From the start, and from the freeze: the time between the two is not always the same.
        let (from, span) = [("start", 250), ("freeze", 60)][round / 3 % 2];
        let started = match from {
            "freeze" if migration.wait_for_phase("freeze") => Instant::now(),
            _ => started,
        };
        let moment = Duration::from_millis(span).mul_f64(common::spread(round));
        while started.elapsed() < moment && !migration.running.ended() {
            std::thread::sleep(Duration::from_micros(100));
        }
        migration.running.kill();
        let phases = migration.phases();
        frozen += usize::from(phases.iter().any(|phase| phase == "freeze"));
        let when = format!("round {round}, killed {moment:?} after {from} in {phases:?}");
        println!("{when}");
        if this.is_at(&this.hosts.b) || this.is_stopped_at_source() {
            // It was committed: there it is, or will be known to be. Back to the source for the next round.
            let _ = this.start("hybrid").finish();
        }
        let host = this.only_copy(&when);
        if host.name == this.hosts.b.name {
            let _serve = this.hosts.a.serve();
            let back = this.hosts.b.migrate(pid, &this.hosts.a, &[]).finish();
            back.unwrap_or_else(|error| panic!("{when}, on the way back: {error}"));
            this.victim.goes_on_at(&this.hosts.a);
            continue;
        }
        looks.must_return(&this.hosts.a, pid, &when);
        this.hosts.a.has_no_network_lock(&when);
    }
    println!("{frozen} of {} were killed after the freeze", kills());
    this.retry("after all kills");
}
