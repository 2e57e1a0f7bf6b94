//! A Redis server and its clients.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::host::{Host, MOVING};
use super::tool::Running;
use super::victim::{PYTHON, start_daemon};
use super::wait_for;

/// A server with data, at the moving address.
pub struct Redis {
    /// Its pid, the same on each host.
    pub pid: i32,
}

impl Redis {
    /// Starts it and fills it with this many MiB.
    pub fn start(host: &Host, directory: &Path, mib: usize) -> Redis {
        let words =
            "redis-server --bind 0.0.0.0 --protected-mode no --save  --appendonly no --enable-debug-command yes";
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        let pid = start_daemon(host, directory, &words, &directory.join("redis.log"));
        let answers = || {
            host.run(&["redis-cli", "ping"])
                .stdout
                .starts_with(b"PONG")
                .then_some(())
        };
        wait_for("redis answers", answers);
        // A key of 1,000 bytes takes some 100 bytes more.
        host.shell(&format!("redis-cli debug populate {} key 1000", mib * 950));
        Redis { pid }
    }
}

/// Clients that talk to the server from before the move until after it, each on one connection.
pub struct Clients {
    running: Running,
    directory: PathBuf,
    wanted: usize,
}

impl Clients {
    /// Starts so many pipelining clients and a subscriber.
    pub fn start(host: &Host, directory: &Path, wanted: usize) -> Clients {
        let script = super::program("redis_clients.py").display().to_string();
        let words = [
            PYTHON.to_owned(),
            "-B".into(),
            script,
            MOVING.into(),
            directory.display().to_string(),
            wanted.to_string(),
        ];
        for name in ["stop", "working", "result"] {
            let _ = std::fs::remove_file(directory.join(name));
        }
        let mut command = host.command(&words);
        command
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(directory.join("clients.err")).unwrap());
        let clients = Clients {
            running: Running::start(command),
            directory: directory.to_owned(),
            wanted,
        };
        clients.work();
        clients
    }

    /// All clients must get answers, from now on.
    pub fn work(&self) {
        let _ = std::fs::remove_file(self.directory.join("working"));
        wait_for("all clients get answers", || {
            let errors = std::fs::read_to_string(self.directory.join("clients.err")).unwrap_or_default();
            assert!(errors.is_empty(), "{errors}");
            self.directory.join("working").exists().then_some(())
        });
    }

    /// Ends them, and says what they found: `(replies, messages)`.
    ///
    /// # Panics
    /// When any of them found anything wrong, or lost its connection.
    pub fn stop(mut self) -> (usize, usize) {
        std::fs::write(self.directory.join("stop"), "").unwrap();
        let status = self.running.wait();
        let errors = std::fs::read_to_string(self.directory.join("clients.err")).unwrap_or_default();
        assert!(status.success(), "{} clients: {status} {errors}", self.wanted);
        let result = std::fs::read_to_string(self.directory.join("result")).unwrap();
        let numbers: Vec<usize> = result.split_whitespace().map(|word| word.parse().unwrap()).collect();
        (numbers[0], numbers[1])
    }
}
