//! Hosts: namespaces that are joined by a bridge.
//!
//! ```text
//!   client (10.77.0.3, the bridge)
//!      ├── a (10.77.0.1, and 10.77.0.100, which moves)      pids from 2,000
//!      └── b (10.77.0.2)                                    pids from 17,000
//! ```
//!
//! Each has its own pid, network, mount, IPC and uts namespace, its own /proc, /run, /dev/pts and nftables, and shares the files of the
//! machine. Nothing has a name outside of them, so nothing can collide and nothing can be left behind: a namespace goes
//! with its processes, and these go with their first one, which the kernel kills when this test's thread ends.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use super::wait_for;

/// Address of the first host.
pub const A: &str = "10.77.0.1";
/// Address of the second host.
pub const B: &str = "10.77.0.2";
/// Address of the clients.
pub const CLIENT: &str = "10.77.0.3";
/// The address that moves along with a service.
pub const MOVING: &str = "10.77.0.100";
/// Port of the tool.
pub const PORT: u16 = 7800;

/// One host.
pub struct Host {
    /// For messages.
    pub name: String,
    /// Its address.
    pub address: String,
    /// Of this host only: identity, images.
    pub directory: PathBuf,
    init: i32,
    unshare: Child,
}

impl Host {
    /// A host without a network, whose next pid is after `last_pid`.
    pub fn new(name: &str, directory: &Path, last_pid: u32) -> Host {
        let directory = directory.join(name);
        std::fs::create_dir_all(directory.join("identity")).unwrap();
        // The first process ignores SIGCHLD, so that orphans never stay as zombies.
        let script = format!(
            "ip link set lo up && mount -t tmpfs tmpfs /run && mount -t devpts -o ptmxmode=0666,mode=0620,gid=5 devpts /dev/pts \
             && hostname whimbrel-test-{name} \
             && echo {last_pid} > /proc/sys/kernel/ns_last_pid && touch {}/up && exec env --ignore-signal=CHLD sleep 100000",
            directory.display()
        );
        let mut command = Command::new("setpriv");
        command.args([
            "--pdeathsig",
            "KILL",
            "unshare",
            "--net",
            "--pid",
            "--mount",
            "--uts",
            "--ipc",
        ]);
        command.args(["--fork", "--mount-proc", "--kill-child", "sh", "-c", &script]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(directory.join("err")).unwrap());
        let unshare = command.spawn().unwrap();
        let outer = unshare.id() as i32;
        wait_for(&format!("host {name} comes up"), || {
            directory.join("up").exists().then_some(())
        });
        let init = wait_for("the first process of a host", || only_child(outer));
        Host {
            name: name.into(),
            address: String::new(),
            directory,
            init,
            unshare,
        }
    }

    /// Its first process, seen from outside.
    pub fn init(&self) -> i32 {
        self.init
    }

    /// Its /proc, seen from outside: `host.proc(pid, "maps")`.
    pub fn proc(&self, pid: i32, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/proc/{pid}/{file}", self.init))
    }

    /// A file of its /proc; empty when the process is gone.
    pub fn read_proc(&self, pid: i32, file: &str) -> String {
        String::from_utf8_lossy(&std::fs::read(self.proc(pid, file)).unwrap_or_default()).into_owned()
    }

    /// Its processes, as it numbers them.
    pub fn processes(&self) -> Vec<i32> {
        let entries = std::fs::read_dir(format!("/proc/{}/root/proc", self.init))
            .into_iter()
            .flatten()
            .flatten();
        let mut pids: Vec<i32> = entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        pids.sort_unstable();
        pids
    }

    /// Its processes whose command line contains `text`.
    pub fn find(&self, text: &str) -> Vec<i32> {
        self.processes()
            .into_iter()
            .filter(|&pid| self.read_proc(pid, "cmdline").contains(text))
            .collect()
    }

    /// A command that runs inside. It gets `SIGKILL` when this test's thread ends.
    pub fn command<S: AsRef<OsStr>>(&self, words: &[S]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg("-t")
            .arg(self.init.to_string())
            .args(["-n", "-p", "-m", "-u", "-i", "--"]);
        command.args(words).stdin(Stdio::null());
        command
    }

    /// Runs a command inside to its end, for at most a minute.
    pub fn run<S: AsRef<OsStr>>(&self, words: &[S]) -> Output {
        let mut all: Vec<&OsStr> = ["timeout", "-s", "KILL", "90"].iter().map(OsStr::new).collect();
        all.extend(words.iter().map(AsRef::as_ref));
        self.command(&all).output().unwrap()
    }

    /// Runs a shell script inside.
    ///
    /// # Panics
    /// When it fails.
    pub fn shell(&self, script: &str) -> String {
        let output = self.run(&["sh", "-c", script]);
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        assert!(
            output.status.success(),
            "{}: {script}: {} {out} {err}",
            self.name,
            output.status
        );
        out.into_owned()
    }

    /// Sends a signal to a process, as this host numbers it.
    pub fn kill(&self, pid: i32, signal: &str) {
        self.run(&["kill", "-s", signal, &pid.to_string()]);
    }

    /// Where the next pids are taken from.
    pub fn set_last_pid(&self, pid: u32) {
        self.shell(&format!("echo {pid} > /proc/sys/kernel/ns_last_pid"));
    }

    /// Drops packets of the tool that leave this host, or that come in.
    pub fn cut(&self, direction: Direction) {
        let (hook, what) = match direction {
            Direction::Out => ("output", "out"),
            Direction::In => ("input", "in"),
        };
        self.shell(&format!(
            "nft 'add table inet cut-{what}; add chain inet cut-{what} c {{ type filter hook {hook} priority -500; }}; \
             add rule inet cut-{what} c udp dport {PORT} drop; add rule inet cut-{what} c udp sport {PORT} drop'"
        ));
    }

    /// Lets them pass again.
    pub fn mend(&self, direction: Direction) {
        let what = if direction == Direction::Out { "out" } else { "in" };
        self.shell(&format!("nft delete table inet cut-{what}"));
    }
}

/// Which way a link is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What this host sends.
    Out,
    /// What this host would receive.
    In,
}

impl Drop for Host {
    fn drop(&mut self) {
        // The first process takes all others with it.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// The child of a process that has one.
pub fn only_child(pid: i32) -> Option<i32> {
    std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .ok()?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// Two hosts and a client.
pub struct Hosts {
    /// The first host; [`MOVING`] is on it in the beginning.
    pub a: Host,
    /// The second.
    pub b: Host,
    /// Where clients are, and the bridge.
    pub client: Host,
    /// Files of this test.
    pub directory: tempfile::TempDir,
}

impl Hosts {
    /// Two hosts that trust each other.
    pub fn new() -> Hosts {
        let hosts = Hosts::strangers();
        hosts.introduce();
        hosts
    }

    /// Two hosts that do not know each other.
    pub fn strangers() -> Hosts {
        let directory = tempfile::Builder::new()
            .prefix("whimbrel-test-")
            // To look at afterwards.
            .disable_cleanup(std::env::var_os("WHIMBREL_TEST_KEEP").is_some())
            .tempdir()
            .unwrap();
        let mut client = Host::new("client", directory.path(), 300);
        let mut a = Host::new("a", directory.path(), 2000);
        let mut b = Host::new("b", directory.path(), 17000);
        client.shell(&format!(
            "ip link add br0 type bridge && ip addr add {CLIENT}/24 dev br0 && ip link set br0 up"
        ));
        for (host, address) in [(&mut a, A), (&mut b, B)] {
            let name = &host.name;
            // The pair is made inside the client's namespace, so that it never has a name in ours.
            let script = format!(
                "nsenter -t {} -n -- ip link add to-{name} type veth peer name eth0 netns {} \
                 && nsenter -t {} -n -- ip link set to-{name} master br0 up",
                client.init, host.init, client.init
            );
            let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            host.shell(&format!("ip addr add {address}/24 dev eth0 && ip link set eth0 up"));
            host.address = address.into();
        }
        client.address = CLIENT.into();
        a.shell(&format!("ip addr add {MOVING}/24 dev eth0"));
        Hosts {
            a,
            b,
            client,
            directory,
        }
    }

    /// Makes each host trust the other.
    pub fn introduce(&self) {
        for (one, other) in [(&self.a, &self.b), (&self.b, &self.a)] {
            one.trust(other);
        }
    }

    /// A directory for the files of this test.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Takes the cable of a host out, or puts it back.
    pub fn link(&self, host: &Host, up: bool) {
        let state = if up { "up" } else { "down" };
        self.client.shell(&format!("ip link set to-{} {state}", host.name));
    }
}

/// Appends a line to a file.
pub fn append(path: &Path, text: &str) {
    let mut file = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .unwrap();
    file.write_all(text.as_bytes()).unwrap();
}
