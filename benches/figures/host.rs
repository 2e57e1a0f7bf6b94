//! Processes of the tool: hosts that take migrations, and verbs with what they cost.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::{Result, Setup};

/// Processor time of a process (threads included), user and system, in seconds.
pub fn cpu_seconds(pid: i32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = text.rsplit(')').next().unwrap_or_default();
    // proc_pid_stat(5): fields 14 and 15; the name, field 2, is cut off.
    let ticks = |field: usize| {
        fields
            .split_whitespace()
            .nth(field - 3)
            .and_then(|text| text.parse::<u64>().ok())
    };
    let ticks = ticks(14).zip(ticks(15)).ok_or("there is no processor time")?;
    Ok((ticks.0 + ticks.1) as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// What a verb took.
pub struct Took {
    pub seconds: f64,
    pub cpu: f64,
    pub output: String,
}

/// Runs a verb to its end, which must be a good one.
pub fn run(command: &mut Command) -> Result<Took> {
    let begun = Instant::now();
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let pid = rustix::process::Pid::from_child(&child);
    let waiting = std::thread::spawn(move || {
        // Left as a zombie, for its processor time is known only then.
        let options = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        let _ = rustix::process::waitid(rustix::process::WaitId::Pid(pid), options);
        (Instant::now(), cpu_seconds(pid.as_raw_nonzero().get()).unwrap_or(0.0))
    });
    let (ended, cpu) = waiting.join().map_err(|_| "a thread panicked")?;
    let Output { status, stdout, stderr } = child.wait_with_output()?;
    if !status.success() {
        return Err(format!("{status}: {}", String::from_utf8_lossy(&stderr).trim()).into());
    }
    Ok(Took {
        seconds: (ended - begun).as_secs_f64(),
        cpu,
        output: String::from_utf8_lossy(&stdout).into_owned(),
    })
}

/// A host that takes migrations: pids and a /proc of its own.
pub struct Host {
    child: Child,
    serve: i32,
    pub address: SocketAddr,
}

impl Host {
    pub fn start(setup: &Setup) -> Result<Host> {
        let identity = setup.path("identity");
        whimbrel_page_server::identity::Identity::load_or_create(&identity)?;
        let address = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
        let child = Command::new("unshare")
            .args(["--pid", "--mount", "--fork", "--mount-proc", "--kill-child"])
            .arg(&setup.program)
            .arg("--identity-dir")
            .arg(&identity)
            .args(["serve", "--listen", &address.to_string(), "--journal"])
            .arg(setup.path("arrivals"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(setup.path("serve.log"))?)
            .spawn()?;
        let mut host = Host {
            child,
            serve: 0,
            address,
        };
        let started = Instant::now();
        // Its port is taken as soon as it listens.
        while UdpSocket::bind(address).is_ok() {
            if host.child.try_wait()?.is_some() || started.elapsed() > Duration::from_secs(10) {
                let log = std::fs::read_to_string(setup.path("serve.log")).unwrap_or_default();
                return Err(format!("no host could be made: {}", log.trim()).into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let children = whimbrel::tree::children_of(host.child.id() as i32)?;
        host.serve = children.first().copied().ok_or("the host has no process")?;
        Ok(host)
    }

    /// Processor time of the host so far, without what runs on it.
    pub fn cpu(&self) -> Result<f64> {
        cpu_seconds(self.serve)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A verb of the tool.
pub fn verb(setup: &Setup, verb: &str) -> Command {
    let mut command = Command::new(&setup.program);
    command
        .arg("--json")
        .arg("--identity-dir")
        .arg(setup.path("identity"))
        .arg(verb);
    command
}

/// An empty directory.
pub fn fresh(path: &Path) -> Result<()> {
    if path.exists() {
        std::fs::remove_dir_all(path)?;
    }
    Ok(std::fs::create_dir_all(path)?)
}
