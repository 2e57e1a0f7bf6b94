//! The tool is killed, at any moment: the program that it had in its hands goes on, and nothing of the tool stays.

mod common;

use std::time::{Duration, Instant};

use common::leftovers::Looks;
use common::tool::Running;
use common::{Host, Victim};

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
    victim.goes_on();
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
        victim.goes_on();
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
    victim.goes_on();
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
