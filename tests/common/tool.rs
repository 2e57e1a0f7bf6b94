//! The tool, running in hosts.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use serde_json::Value;

use super::host::{Host, PORT, only_child};
use super::{PATIENCE, wait_for};

/// The tool: the built binary, or the one that `WHIMBREL_BINARY` names.
pub fn binary() -> String {
    std::env::var("WHIMBREL_BINARY").unwrap_or_else(|_| env!("CARGO_BIN_EXE_whimbrel").to_owned())
}

impl Host {
    /// Words that run the tool with this host's identity.
    pub fn tool(&self, words: &[&str]) -> Vec<String> {
        let identity = self.directory.join("identity").display().to_string();
        let mut all = vec![binary(), "--identity-dir".into(), identity];
        all.extend(words.iter().map(|&word| word.to_owned()));
        all
    }

    /// Runs the tool to its end.
    pub fn whimbrel(&self, words: &[&str]) -> Output {
        self.run(&self.tool(words))
    }

    /// The fingerprint of this host.
    pub fn fingerprint(&self) -> String {
        let output = self.whimbrel(&["id"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_owned()
    }

    /// Makes this host trust another.
    pub fn trust(&self, other: &Host) {
        let output = self.whimbrel(&["trust", &other.fingerprint(), &other.name]);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }

    /// Starts to take migrations.
    pub fn serve(&self) -> Serve {
        self.serve_with(&[])
    }

    /// Starts to take migrations, with more options.
    pub fn serve_with(&self, options: &[&str]) -> Serve {
        let log = self.directory.join("serve.log");
        let words = self.tool(&[&["serve"], options].concat());
        let mut command = self.command(&words);
        let file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(&log)
            .unwrap();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let mut running = Running::start(command);
        let bound = || {
            if let Some(status) = running.nsenter.try_wait().unwrap() {
                panic!(
                    "serve ended with {status}: {}",
                    std::fs::read_to_string(&log).unwrap_or_default()
                );
            }
            // /proc/net/udp: sl, local_address (hexadecimal address:port), …
            let table =
                ["udp", "udp6"].map(|name| std::fs::read_to_string(format!("/proc/{}/net/{name}", self.init())));
            let port = format!(":{PORT:04X}");
            let local = |line: &str| {
                line.split_whitespace()
                    .nth(1)
                    .is_some_and(|address| address.ends_with(&port))
            };
            table
                .iter()
                .flatten()
                .any(|table| table.lines().any(local))
                .then_some(())
        };
        wait_for("serve listens", bound);
        Serve { running, log }
    }

    /// Starts to migrate a process from here.
    pub fn migrate(&self, pid: i32, to: &Host, options: &[&str]) -> Migration {
        let mut migration = self.migrate_to(pid, &to.address, options);
        migration.destination_log = to.directory.join("serve.log");
        migration
    }

    /// Starts to migrate a process from here to an address.
    pub fn migrate_to(&self, pid: i32, to: &str, options: &[&str]) -> Migration {
        let pid = pid.to_string();
        let words = self.tool(&[&["migrate", &pid, to, "--json"], options].concat());
        let mut command = self.command(&words);
        let errors = self.directory.join("migrate.err");
        command
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&errors).unwrap());
        let mut running = Running::start(command);
        let stdout = BufReader::new(running.nsenter.stdout.take().unwrap());
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if sender.send(event).is_err() {
                    break;
                }
            }
        });
        Migration {
            running,
            events,
            seen: Vec::new(),
            errors,
            destination_log: PathBuf::new(),
        }
    }
}

/// Bytes of a program's output as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A tool that runs in a host. Dropping it kills it.
pub struct Running {
    nsenter: Child,
    tool: Option<i32>,
}

impl Running {
    /// Starts a command made by [`Host::command`].
    pub fn start(mut command: Command) -> Running {
        let nsenter = command.spawn().unwrap();
        Running { nsenter, tool: None }
    }

    /// The tool's pid, seen from outside. `nsenter` forks it.
    pub fn pid(&mut self) -> Option<i32> {
        let outer = self.nsenter.id() as i32;
        while self.tool.is_none() && self.nsenter.try_wait().ok().flatten().is_none() {
            self.tool = only_child(outer);
        }
        self.tool
    }

    /// Kills the tool, not what started it, and waits for both.
    pub fn kill(&mut self) {
        if self.nsenter.try_wait().ok().flatten().is_none()
            && let Some(pid) = self.pid()
        {
            let _ = whimbrel::kernel::sys::kill(pid, libc::SIGKILL);
        }
        let _ = self.wait();
    }

    /// Sends a signal to the tool.
    pub fn signal(&mut self, signal: i32) {
        if let Some(pid) = self.pid() {
            let _ = whimbrel::kernel::sys::kill(pid, signal);
        }
    }

    /// Has it ended?
    pub fn ended(&mut self) -> bool {
        self.nsenter.try_wait().unwrap().is_some()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.nsenter.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > deadline {
                if let Some(pid) = self.tool {
                    let _ = whimbrel::kernel::sys::kill(pid, libc::SIGKILL);
                }
                panic!("the tool does not end");
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.nsenter.try_wait().ok().flatten().is_none() {
            if let Some(pid) = self.pid() {
                let _ = whimbrel::kernel::sys::kill(pid, libc::SIGKILL);
            }
            let _ = self.nsenter.kill();
            let _ = self.nsenter.wait();
        }
    }
}

/// A host that takes migrations.
pub struct Serve {
    /// The tool.
    pub running: Running,
    log: PathBuf,
}

impl Serve {
    /// What it has said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// A migration on its way.
pub struct Migration {
    /// The tool at the source.
    pub running: Running,
    events: Receiver<Value>,
    /// Events so far.
    pub seen: Vec<Value>,
    errors: PathBuf,
    destination_log: PathBuf,
}

impl Migration {
    /// Waits for a phase to begin; false when the tool ends without it.
    pub fn wait_for_phase(&mut self, phase: &str) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self
                .events
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(event) => {
                    let found = event["event"] == "phase" && event["phase"] == phase;
                    self.seen.push(event);
                    if found {
                        return true;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return false,
                Err(RecvTimeoutError::Timeout) => panic!("phase {phase} does not begin: {:?}", self.seen),
            }
        }
    }

    /// Waits until something holds, and takes note of events meanwhile; false when it never does.
    pub fn wait_until(&mut self, mut condition: impl FnMut(&mut Migration) -> bool) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Ok(event) = self.events.recv_timeout(std::time::Duration::from_millis(5)) {
                self.seen.push(event);
            }
            if condition(self) {
                return true;
            }
        }
        false
    }

    /// Phases so far.
    pub fn phases(&mut self) -> Vec<String> {
        self.seen.extend(self.events.try_iter());
        let phases = self.seen.iter().filter(|event| event["event"] == "phase");
        phases
            .filter_map(|event| event["phase"].as_str().map(str::to_owned))
            .collect()
    }

    /// What it said about errors, and what the destination says.
    pub fn errors(&self) -> String {
        let [ours, theirs] =
            [&self.errors, &self.destination_log].map(|path| std::fs::read_to_string(path).unwrap_or_default());
        format!("{ours}\nthe destination says:\n{theirs}")
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// With all that the tool said, when it failed.
    pub fn finish(mut self) -> Result<Value, String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self
                .events
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(event) => self.seen.push(event),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("the migration does not end: {:?} {}", self.seen, self.errors())
                }
            }
        }
        let status = self.running.wait();
        if !status.success() {
            let said = self.seen.iter().map(|event| format!("{event}\n")).collect::<String>();
            return Err(format!("{status}\n{said}{}", self.errors()));
        }
        let last = self.seen.pop().unwrap_or_default();
        assert!(last["event"] == "done" || last["event"] == "looked", "{last}");
        Ok(last)
    }
}
