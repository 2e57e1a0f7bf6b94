//! The figures that this project promises, measured on this machine. As root:
//!
//! ```text
//! cargo bench --bench figures                          every group
//! cargo bench --bench figures -- dump migrate          these groups only
//! WHIMBREL_BENCH_SIZES=256,1024,4096                   sizes of the victim, in MiB (the default)
//! WHIMBREL_BENCH_RUNS=5                                runs of each row
//! WHIMBREL_BENCH_PROGRAM=/path/to/another/whimbrel     that binary, for before and after on one machine
//! ```
//!
//! Groups: `remote` (driving a process from outside), `track` (watching its memory), `small` (dump and restore of a small
//! process), `dump` (dump, restore, the pause of `dump --leave-running`), `migrate` (pre-copy), `post-copy`, `throughput`
//! (the page server on loopback), `criu` (the same with CRIU, where one is installed that starts on this kernel).
//!
//! Everything runs on this machine: both hosts of a migration share its processors, with the victim besides. Images go
//! to a tmpfs where there is one. The table has medians; a goal is only shown, nothing fails when it is missed.

mod engine;
mod host;
mod migration;
mod table;
mod transport;
mod verbs;
mod victim;

use std::path::PathBuf;
use std::process::ExitCode;

use table::Table;

/// Whatever goes wrong is told in the row, and the others go on.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What all groups need to know.
struct Setup {
    /// Sizes of victims, in MiB.
    sizes: Vec<u64>,
    /// How often each row is measured.
    runs: usize,
    /// The binary under test.
    program: PathBuf,
    /// A directory of ours, in memory where possible.
    directory: tempfile::TempDir,
}

impl Setup {
    fn new() -> Result<Setup> {
        let number = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
        let sizes = number("WHIMBREL_BENCH_SIZES").unwrap_or_else(|| "256,1024,4096".to_owned());
        let sizes = sizes
            .split(',')
            .map(|size| size.trim().parse())
            .collect::<std::result::Result<_, _>>()?;
        let runs = number("WHIMBREL_BENCH_RUNS").map_or(Ok(5), |text| text.parse())?;
        let memory = PathBuf::from("/dev/shm");
        let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
        Ok(Setup {
            sizes,
            runs: std::cmp::max(runs, 1),
            program: std::env::var_os("WHIMBREL_BENCH_PROGRAM")
                .map_or_else(|| env!("CARGO_BIN_EXE_whimbrel").into(), PathBuf::from),
            directory: tempfile::Builder::new()
                .prefix("whimbrel-figures-")
                .tempdir_in(parent)?,
        })
    }

    /// The size that single rows use: 1 GiB if it is among those that were asked for.
    fn usual_size(&self) -> u64 {
        let usual = self.sizes.iter().copied().find(|&size| size == 1024);
        usual.or(self.sizes.first().copied()).unwrap_or(1024)
    }

    /// A directory that does not exist yet; its parent does.
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

type Group = fn(&Setup, &mut Table) -> Result<()>;

const GROUPS: [(&str, Group); 8] = [
    ("remote", engine::remote),
    ("track", engine::track),
    ("small", verbs::small),
    ("dump", verbs::dump),
    ("migrate", migration::pre_copy),
    ("post-copy", migration::post_copy),
    ("throughput", transport::throughput),
    ("criu", verbs::criu),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "--run-victim") {
        victim::run(&arguments[1..]);
    }
    // `cargo test --all-targets` starts benches, too.
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("figures: run with `cargo bench --bench figures`");
        return ExitCode::SUCCESS;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("figures: tracing, namespaces and chosen pids need root");
        return ExitCode::FAILURE;
    }
    let wanted: Vec<&String> = arguments
        .iter()
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let known = |name: &&String| GROUPS.iter().any(|(group, _)| group == name);
    if let Some(unknown) = wanted.iter().find(|name| !known(name)) {
        let names: Vec<&str> = GROUPS.iter().map(|(name, _)| *name).collect();
        eprintln!("figures: there is no group {unknown:?}: {}", names.join(", "));
        return ExitCode::FAILURE;
    }
    let setup = match Setup::new() {
        Ok(setup) => setup,
        Err(error) => {
            eprintln!("figures: {error}");
            return ExitCode::FAILURE;
        }
    };
    // What is restored has no parent: it comes to us, so that its pid is free again when it ends.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let mut table = Table::new();
    for (name, group) in GROUPS {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| *wanted == name) {
            continue;
        }
        table.begin(name);
        if let Err(error) = group(&setup, &mut table) {
            table.failed(&*error);
        }
    }
    ExitCode::SUCCESS
}
