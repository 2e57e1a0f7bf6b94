//! `demo`: two hosts made out of namespaces, a real workload with a live client, and a migration between them.

mod client;
mod store;

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use whimbrel::error::{Context as _, Error, Result};
use whimbrel::kernel::link;

use super::migrate::ModeArgument;
use super::{Context, Run};
use client::Client;

/// The network of the demo: the two hosts, the client, and the address that moves.
const NETWORK: [u8; 3] = [10, 187, 42];
const PREFIX: u8 = 24;
/// Hardware address of the switch, locally administered.
const SWITCH: [u8; 6] = [0x02, 0, 0, 0x2a, 0, 3];
const SOURCE: u8 = 1;
const DESTINATION: u8 = 2;
const CLIENT: u8 = 3;
const SERVICE: u8 = 100;
const PORT: u16 = 6379;

/// Show a live migration on this machine: two hosts made out of namespaces, a server with data in one of them, and a client
/// that talks to it all the while from outside. As root; nothing of this machine is changed.
///
/// Example: `whimbrel demo`, or `whimbrel demo --size 1024 --mode post-copy`.
#[derive(Args)]
pub struct Demo {
    /// How memory travels.
    #[arg(long, value_enum, default_value_t = ModeArgument::Hybrid)]
    mode: ModeArgument,
    /// Data in the server, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    size: u64,
    /// Use the embedded server even where redis-server is installed.
    #[arg(long)]
    embedded: bool,
    /// The embedded server itself.
    #[arg(long, hide = true, value_name = "PORT")]
    run_store: Option<u16>,
}

/// What is removed when the demo ends, however it ends: the hosts die with their first process.
struct Stage {
    hosts: Vec<Child>,
    directory: PathBuf,
}

impl Drop for Stage {
    fn drop(&mut self) {
        for host in &mut self.hosts {
            let _ = host.kill();
            let _ = host.wait();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl Stage {
    /// Starts a host: a shell with its own network, pids, mounts and name, which reads commands.
    fn host(&mut self, name: &str, number: u8) -> Result<usize> {
        let failed = || Error::new("make a host out of namespaces").object(name.to_owned());
        let setup = format!(
            "hostname {name} 2>/dev/null; echo {number}000 > /proc/sys/kernel/ns_last_pid; exec 2>>{0}/{name}.log; . /dev/stdin",
            self.directory.display()
        );
        let child = Command::new("unshare")
            .args([
                "--net",
                "--mount",
                "--uts",
                "--pid",
                "--fork",
                "--mount-proc",
                "--kill-child",
                "sh",
                "-c",
                &setup,
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with(|| failed().hint("unshare(1) of util-linux is needed"))?;
        let pid = child.id() as i32;
        self.hosts.push(child);
        let network = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let started = Instant::now();
        while network(pid) == network(std::process::id() as i32) {
            if started.elapsed() > Duration::from_secs(5) {
                return Err(failed().because("it did not get a network of its own"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        link::add_veth(&format!("to-{name}"), "switch", "eth0", pid).with(failed)?;
        link::in_network_of(pid, move || {
            link::set_up("lo")?;
            link::set_up("eth0")?;
            link::add_address("eth0", address(number), PREFIX)
        })
        .with(failed)?;
        Ok(self.hosts.len() - 1)
    }

    fn tell(&mut self, host: usize, script: &str) -> Result<()> {
        let input = self.hosts[host]
            .stdin
            .take()
            .ok_or_else(|| Error::new("talk to a host"))?;
        let mut input = std::io::BufWriter::new(input);
        input.write_all(script.as_bytes()).context("talk to a host")
    }
}

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(NETWORK[0], NETWORK[1], NETWORK[2], number)
}

impl Run for Demo {
    fn run(self, context: &Context) -> Result<ExitCode> {
        if let Some(port) = self.run_store {
            store::serve(port).context("serve keys")?;
            return Ok(ExitCode::SUCCESS);
        }
        if !rustix::process::geteuid().is_root() {
            return Err(Error::new("demo")
                .because("namespaces and chosen pids need root")
                .hint("run it with sudo"));
        }
        let report = self.play(context)?;
        context.event(&report);
        let right = report["right"].as_bool() == Some(true);
        if !context.json {
            println!("{}", summary(&report));
        }
        Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Demo {
    fn say(&self, context: &Context, text: &str) {
        context.event(&json!({"event": "stage", "text": text}));
        if !context.json {
            println!("• {text}");
        }
    }

    fn play(&self, context: &Context) -> Result<Value> {
        let directory = std::env::temp_dir().join(format!("whimbrel-demo-{}", std::process::id()));
        std::fs::create_dir_all(&directory)
            .with(|| Error::new("make a directory").object(directory.display().to_string()))?;
        let mut stage = Stage {
            hosts: Vec::new(),
            directory: directory.clone(),
        };
        let program = std::env::current_exe().context("find this program")?;
        let program = program.display();

        self.say(context, "making two hosts out of namespaces, joined by a switch");
        link::unshare_network().context("make a network")?;
        link::set_up("lo").context("make a network")?;
        link::add_bridge("switch", SWITCH).context("make a switch")?;
        link::add_address("switch", address(CLIENT), PREFIX).context("make a switch")?;
        let (source, destination) = (stage.host("alpha", SOURCE)?, stage.host("beta", DESTINATION)?);
        let source_pid = stage.hosts[source].id() as i32;
        link::in_network_of(source_pid, || link::add_address("eth0", address(SERVICE), PREFIX))
            .context("add an address")?;

        let identity = directory.join("identity");
        let serve = format!(
            "exec {program} --identity-dir {} serve --listen {}:7800\n",
            identity.display(),
            address(DESTINATION)
        );
        // Made first, so that both hosts find the same key.
        whimbrel_page_server::identity::Identity::load_or_create(&identity).context("make a key")?;
        stage.tell(destination, &serve)?;

        let redis = find_program("redis-server").filter(|_| !self.embedded);
        let work = directory.join("work");
        std::fs::create_dir_all(&work).context("make a directory")?;
        let server = match &redis {
            Some(path) => format!(
                "{} --port {PORT} --bind 0.0.0.0 --protected-mode no --save '' --appendonly no",
                path.display()
            ),
            None => format!("{program} demo --run-store {PORT}"),
        };
        let name = if redis.is_some() {
            "redis-server"
        } else {
            "the embedded key-value server"
        };
        self.say(
            context,
            &format!("starting {name} on alpha, with {} MiB of data", self.size),
        );
        let mode = match self.mode {
            ModeArgument::PreCopy => "pre-copy",
            ModeArgument::PostCopy => "post-copy",
            ModeArgument::Hybrid => "hybrid",
        };
        let go = directory.join("go");
        let script = format!(
            "cd {work}\nsetsid {server} >server.log 2>&1 </dev/null &\nPID=$!\nwhile [ ! -e {go} ]; do sleep 0.05; done\n\
             exec {program} --json --identity-dir {identity} migrate $PID {to}:7800 --mode {mode} \
             --move-address {service}/{PREFIX} --journal {journal}\n",
            work = work.display(),
            go = go.display(),
            identity = identity.display(),
            to = address(DESTINATION),
            service = address(SERVICE),
            journal = directory.join("journal").display(),
        );
        stage.tell(source, &script)?;

        let mut client =
            Client::connect(SocketAddr::from((address(SERVICE), PORT))).context("connect to the server")?;
        let keys = client.fill(self.size << 20).context("fill the server")?;
        self.say(
            context,
            &format!("{keys} keys are set; the client counts over the same connection"),
        );
        let stop = AtomicBool::new(false);
        let (seen, done) = std::thread::scope(|scope| {
            let counting = scope.spawn(|| client.count(&stop));
            std::thread::sleep(Duration::from_millis(500));
            self.say(context, &format!("migrating to beta ({mode})"));
            let migrated = std::fs::write(&go, b"")
                .context("begin")
                .and_then(|()| self.watch(context, &mut stage, source));
            std::thread::sleep(Duration::from_millis(500));
            stop.store(true, Ordering::Relaxed);
            let seen = counting.join().unwrap_or_default();
            migrated.map(|done| (seen, done))
        })?;
        self.say(context, "checking every key over the same connection, on beta");
        let wrong_keys = client.check(keys).unwrap_or(keys);
        let log = std::fs::read_to_string(work.join("server.log")).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(3).collect();
        let right = seen.survived && seen.lost == 0 && seen.wrong == 0 && wrong_keys == 0;
        Ok(json!({
            "event": "result",
            "right": right,
            "server": if redis.is_some() { "redis-server" } else { "embedded" },
            "mode": mode,
            "downtime_ms": {"client": rounded(seen.longest_gap_ms), "victim": done["frozen"]["total_ms"]},
            "frozen_ms": done["frozen"]["total_ms"],
            "frozen": done["frozen"],
            "followed": done["followed"],
            "total_ms": done["total_ms"],
            "rounds": done["rounds"].as_array().map_or(0, Vec::len),
            "pages": done["pages"],
            "raw_bytes": done["raw_bytes"],
            "wire_bytes": done["wire_bytes"],
            "replies": seen.replies,
            "lost_replies": seen.lost,
            "wrong_replies": seen.wrong,
            "keys": keys,
            "wrong_keys": wrong_keys,
            "connection_survived": seen.survived,
            "server_log": last,
        }))
    }

    /// Shows the migration's own events; returns its last.
    fn watch(&self, context: &Context, stage: &mut Stage, source: usize) -> Result<Value> {
        let output = stage.hosts[source]
            .stdout
            .take()
            .ok_or_else(|| Error::new("watch the migration"))?;
        for line in BufReader::new(output).lines() {
            let line = line.context("watch the migration")?;
            let Ok(event) = serde_json::from_str::<Value>(&line) else {
                continue;
            };
            context.event(&event);
            match event["event"].as_str() {
                Some("done") => return Ok(event),
                Some("failed") => {
                    let reason = event["error"].as_str().unwrap_or("no reason was given").to_owned();
                    return Err(Error::new("migrate").because(reason));
                }
                Some("phase") if !context.json => println!("  {}", event["phase"].as_str().unwrap_or_default()),
                Some("round") if !context.json => {
                    let round = &event["round"];
                    println!("    {} pages in {} ms", round["pages"], round["ms"]);
                }
                _ => {}
            }
        }
        let log = std::fs::read_to_string(stage.directory.join("alpha.log")).unwrap_or_default();
        Err(Error::new("migrate").because(format!("it ended without a result: {}", log.trim())))
    }
}

fn rounded(ms: f64) -> f64 {
    (ms * 10.0).round() / 10.0
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|file| Path::is_file(file))
}

fn summary(report: &Value) -> String {
    let mib = |value: &Value| value.as_f64().unwrap_or(0.0) / f64::from(1 << 20);
    format!(
        "\n{}: {} moved with {:.0} MiB of memory ({:.0} MiB on the wire, {} rounds) in {:.0} ms\n\
         \x20 frozen for {} ms; the client's longest wait for a reply was {} ms\n\
         \x20 {} replies, {} lost, {} wrong; {} keys, {} wrong; the connection {}",
        if report["right"] == true {
            "All is right"
        } else {
            "SOMETHING IS WRONG"
        },
        report["server"].as_str().unwrap_or_default(),
        mib(&report["raw_bytes"]),
        mib(&report["wire_bytes"]),
        report["rounds"],
        report["total_ms"].as_f64().unwrap_or(0.0),
        report["frozen_ms"],
        report["downtime_ms"]["client"],
        report["replies"],
        report["lost_replies"],
        report["wrong_replies"],
        report["keys"],
        report["wrong_keys"],
        if report["connection_survived"] == true {
            "survived"
        } else {
            "broke"
        },
    )
}
