//! `migrate`: move a running tree to another host.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Args, ValueEnum};

use whimbrel::error::{Context as _, Error, Result};
use whimbrel::migrate::policy::Limits;
use whimbrel::migrate::report::{Report, Round};
use whimbrel::migrate::source::{self, Hooks, Observer, Outcome};
use whimbrel::migrate::{Mode, Phase, journal::Journal};
use whimbrel_page_server::transport::{Endpoint, Options, Runtime};

use super::{Context, Run};

/// Port of `whimbrel serve`.
const PORT: u16 = 7800;

/// Move a running process, with its children and connections, to a host that runs `whimbrel serve`.
///
/// Nothing is lost: until the other host has everything, any failure lets the program go on here. Example:
/// `whimbrel migrate 1234 otherhost --move-address 10.0.0.2/24`; see first what it would need with `--dry-run`.
#[derive(Args)]
pub struct Migrate {
    /// The process; its children come along.
    pid: i32,
    /// The other host: HOST or HOST:PORT.
    host: String,
    /// How memory travels.
    #[arg(long, value_enum, default_value_t = ModeArgument::Hybrid)]
    mode: ModeArgument,
    /// Downtime that is allowed for memory, in milliseconds. What does not fit follows on demand (hybrid), or is sent all
    /// the same (pre-copy).
    #[arg(long, value_name = "MS", default_value_t = 100)]
    max_downtime: u64,
    /// Most pre-copy rounds.
    #[arg(long, value_name = "N", default_value_t = 20)]
    max_rounds: u32,
    /// In pre-copy mode, give up rather than exceed the downtime.
    #[arg(long)]
    strict: bool,
    /// An address of this host that moves along, removed here and added and announced there.
    #[arg(long, value_name = "ADDR/PREFIX", default_value = "")]
    move_address: String,
    /// The device that the address is on, where it cannot be found by its network.
    #[arg(long, value_name = "DEVICE", default_value = "", requires = "move_address")]
    move_device: String,
    /// Look at both hosts and print every reason against it; nothing is frozen.
    #[arg(long)]
    dry_run: bool,
    /// Carry file locks.
    #[arg(long)]
    file_locks: bool,
    /// A program that is run at the moments `network-lock` and `pre-resume`, with CRIU's environment.
    #[arg(long, value_name = "PROGRAM")]
    action_script: Option<PathBuf>,
    /// Where decisions are noted until their outcome is known.
    #[arg(long, value_name = "DIR", default_value = "/run/whimbrel")]
    journal: PathBuf,
    /// Refused: there would be two copies.
    #[arg(long, hide = true)]
    leave_running: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeArgument {
    /// All of it before the tree runs there.
    PreCopy,
    /// All of it afterwards, on demand.
    PostCopy,
    /// Rounds first; what does not fit into the downtime follows on demand.
    Hybrid,
}

impl From<ModeArgument> for Mode {
    fn from(mode: ModeArgument) -> Mode {
        match mode {
            ModeArgument::PreCopy => Mode::PreCopy,
            ModeArgument::PostCopy => Mode::PostCopy,
            ModeArgument::Hybrid => Mode::Hybrid,
        }
    }
}

struct Progress {
    json: bool,
    cancelled: Arc<AtomicBool>,
}

impl Observer for Progress {
    fn phase(&self, phase: Phase) {
        if self.json {
            println!("{}", serde_json::json!({"event": "phase", "phase": phase.to_string()}));
        } else {
            eprintln!("{phase}");
        }
    }

    fn round(&self, number: u32, round: &Round) {
        if self.json {
            println!(
                "{}",
                serde_json::json!({"event": "round", "number": number, "round": round})
            );
        } else {
            let mib = round.raw_bytes as f64 / f64::from(1 << 20);
            eprintln!(
                "round {number}: {} pages, {mib:.1} MiB, {:.0} ms",
                round.pages, round.ms
            );
        }
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// Finds the other host's address.
fn resolve(host: &str) -> Result<SocketAddr> {
    let failed = || {
        Error::new("find the other host")
            .object(host.to_owned())
            .hint("write HOST or HOST:PORT")
    };
    let mut found = host
        .to_socket_addrs()
        .or_else(|_| (host, PORT).to_socket_addrs())
        .with(failed)?;
    found.next().ok_or_else(|| failed().because("it has no address"))
}

/// The last event of a migration.
pub fn done(report: &Report) -> serde_json::Value {
    let mut event = serde_json::to_value(report).unwrap_or_default();
    event["event"] = "done".into();
    event["pages"] = report.pages().into();
    event["raw_bytes"] = report.raw_bytes().into();
    event["wire_bytes"] = report.wire_bytes().into();
    event
}

impl Migrate {
    fn hooks(&self) -> Hooks {
        let (Some(program), pid) = (self.action_script.clone(), self.pid) else {
            return Hooks::default();
        };
        Hooks(Some(Arc::new(move |moment: &str| {
            let failed = || Error::new("run the action script").object(format!("{} at {moment}", program.display()));
            let mut command = std::process::Command::new(&program);
            command
                .env("CRTOOLS_SCRIPT_ACTION", moment)
                .env("CRTOOLS_INIT_PID", pid.to_string());
            let status = command.status().with(failed)?;
            if status.success() {
                Ok(())
            } else {
                Err(failed().because(status.to_string()))
            }
        })))
    }
}

impl Run for Migrate {
    fn run(self, context: &Context) -> Result<ExitCode> {
        if self.leave_running {
            return Err(Error::new("migrate")
                .because("--leave-running would leave two running copies")
                .hint("use `dump --leave-running` for a checkpoint"));
        }
        let destination = resolve(&self.host)?;
        let credentials = context.identity.credentials()?;
        let runtime = Runtime::new(2).context("start threads")?;
        let any: SocketAddr = if destination.is_ipv4() {
            ([0, 0, 0, 0], 0).into()
        } else {
            ([0u16; 8], 0).into()
        };
        let endpoint = runtime
            .block_on(async { Endpoint::bind(any, &credentials, Options::default()) })
            .context("open a socket")?;
        let cancelled = Arc::new(AtomicBool::new(false));
        let told = cancelled.clone();
        runtime.handle().spawn(async move {
            let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).ok()?;
            loop {
                tokio::select! {
                    result = tokio::signal::ctrl_c() => result.ok()?,
                    received = terminate.recv() => received?,
                }
                told.store(true, Ordering::Relaxed);
            }
            #[allow(unreachable_code)]
            Some(())
        });
        let options = source::Options {
            pid: self.pid,
            destination,
            limits: Limits {
                mode: self.mode.into(),
                max_downtime: Duration::from_millis(self.max_downtime),
                max_rounds: self.max_rounds,
                strict: self.strict,
            },
            dump: whimbrel::dump::Options {
                shell_job: true,
                tcp_established: true,
                // They have a moment before the freeze; see the source's network.
                skip_in_flight: true,
                file_locks: self.file_locks,
                ..whimbrel::dump::Options::default()
            },
            move_address: self.move_address.clone(),
            move_device: self.move_device.clone(),
            dry_run: self.dry_run,
            journal: Journal::open(&self.journal)?,
            hooks: self.hooks(),
        };
        let progress = Progress {
            json: context.json,
            cancelled,
        };
        let outcome = source::run(&runtime, &endpoint, &options, &progress);
        // What we say last must be out before we end: a destination that only misses us waits for half a minute.
        runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(1), endpoint.close())
                .await
                .ok()
        });
        match outcome? {
            Outcome::Moved(report) => {
                context.event(&done(&report));
                if !context.json {
                    eprintln!("{}", report.summary());
                }
                Ok(ExitCode::SUCCESS)
            }
            Outcome::Looked(blockers) => {
                context.event(&serde_json::json!({"event": "looked", "blockers": blockers}));
                if !context.json {
                    blockers.iter().for_each(|blocker| println!("{blocker}"));
                    if blockers.is_empty() {
                        println!("nothing is in the way");
                    }
                }
                Ok(if blockers.is_empty() {
                    ExitCode::SUCCESS
                } else {
                    ExitCode::FAILURE
                })
            }
        }
    }
}
