//! `restore`: puts a tree together from an image set.

use std::collections::HashMap;
use std::ffi::OsString;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use whimbrel::error::{Context as _, Error, Result};
use whimbrel::kernel::nft;
use whimbrel::procfs;
use whimbrel::restore::handover::Daemon;
use whimbrel::restore::{self, lazy, state};
use whimbrel::tree::TreeImage;
use whimbrel_images::chain::PageStore;
use whimbrel_images::store::{DirStore, ImageStore};

use super::cancel::Cancel;
use super::options::{Common, Hooks, Resources};
use super::scripts::{Scripts, Stage};
use super::unbuilt::Unbuilt;
use super::workspace::{close_descriptors, signal_ready, write_pidfile};
use super::{Context, Logging, Run, cpuinfo, dump, stats};

/// Restore a process tree from image files.
///
/// Without -d the command waits for the root task and ends with its status.
///
/// Examples:
///   whimbrel restore -d -D checkpoint               and leave it to itself
///   whimbrel restore -D checkpoint --shell-job      in this terminal
///   whimbrel restore -D checkpoint --exec-cmd -- supervisor --flag
///   whimbrel restore -d -D checkpoint --lazy-pages  while `whimbrel lazy-pages -D checkpoint` serves its memory
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct Restore {
    #[command(flatten)]
    common: Common,
    /// Return when the tree runs.
    #[arg(short = 'd', long)]
    restore_detached: bool,
    /// The root task becomes a child of the process that started this command.
    #[arg(short = 'S', long, requires = "restore_detached")]
    restore_sibling: bool,
    /// Leave the tree stopped, as by SIGSTOP.
    #[arg(short = 's', long)]
    leave_stopped: bool,
    /// Become the command after `--`: it is the parent of the restored root then.
    #[arg(long, requires = "command", conflicts_with = "restore_detached")]
    exec_cmd: bool,
    /// How files must match: buildid (and size), or filesize.
    #[arg(long, value_name = "METHOD", value_parser = ["filesize", "buildid"], default_value = "buildid")]
    file_validation: String,
    /// Do not compare the permissions of files with those at the dump.
    #[arg(long)]
    skip_file_rwx_check: bool,
    /// CPU features that must be here as at the dump: none, fpu, ins, cpu, all (a list; ^ takes one back).
    #[arg(long, value_name = "CAP", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    cpu_cap: Vec<String>,
    /// Let memory follow when the tree runs: `whimbrel lazy-pages` must wait in the same work directory, and serves it.
    #[arg(long)]
    lazy_pages: bool,
    /// The command of --exec-cmd.
    #[arg(last = true, value_name = "COMMAND", requires = "exec_cmd")]
    command: Vec<OsString>,
    #[command(flatten)]
    resources: Resources,
    #[command(flatten)]
    hooks: Hooks,
    #[command(flatten)]
    unbuilt: Unbuilt,
}

const FAILED: &str = "Restoring FAILED.";

impl Run for Restore {
    fn logging(&self) -> Logging {
        self.common.logging(Some(FAILED))
    }

    fn run(self, context: &Context) -> Result<ExitCode> {
        let started = Instant::now();
        self.unbuilt.and(&[])?;
        let capabilities = cpuinfo::Capabilities::parse(&self.cpu_cap)?;
        close_descriptors(&self.common)?;
        let workspace = self.common.workspace();
        let scripts = Scripts::new(&self.hooks, &workspace)?;
        let work = workspace.open_work()?;
        let store = workspace.open_images()?;
        if !dump::is_whole(&store) {
            return Err(Error::new("read images")
                .object(workspace.images.display().to_string())
                .because("there is no inventory.img: it holds no whole dump")
                .hint("use -D DIR with the directory of a dump that finished"));
        }
        let image = TreeImage::load(&store)?;
        let pages = PageStore::new(workspace.open_images()?).context("read images")?;
        let lazy = match self.lazy_pages {
            true => lazy::select(&image, &pages),
            false => HashMap::new(),
        };
        lazy::check_present(&pages, &lazy)?;
        // Before anything is made: without the daemon the tree would wait for ever.
        let mut daemon = match self.lazy_pages {
            true => Some(Daemon::find(&work)?),
            false => None,
        };
        self.check_session(&image)?;
        let connected = self.check_connections(&store)?;
        if capabilities.any() {
            cpuinfo::check(&store, capabilities)?;
        }
        await_reaping(&image);
        let cancel = Cancel::arm(FAILED, || ())?;
        scripts.run(Stage::PreRestore, None)?;

        tracing::info!("Restoring {} tasks", image.tasks.len());
        let options = self.options();
        let mut forked = None;
        let (ready, lazy) = state::from_directory_with(&image, &store, &pages, &options, &lazy, &mut |pid| {
            forked = Some(started.elapsed());
            tracing::info!("Forked the root task {pid}");
            scripts.run(Stage::SetupNamespaces, Some(pid))?;
            scripts.run(Stage::PostSetupNamespaces, Some(pid))
        })?;
        let root = ready
            .root_pid()
            .ok_or_else(|| Error::new("restore").because("the tree has no root"))?;
        if let Some(daemon) = &mut daemon {
            daemon.hand(&lazy)?;
        }
        write_pidfile(&self.common, root)?;
        scripts.run(Stage::PostRestore, Some(root))?;
        if connected {
            scripts.run(Stage::NetworkUnlock, Some(root))?;
            if let Some(run_id) = &image.inventory.dump_criu_run_id {
                nft::remove_table(&dump::table_of(run_id)).context("unlock the network")?;
            }
        }
        // From here on nothing may fail: criu(8).
        if let Err(error) = scripts.run(Stage::PreResume, Some(root)) {
            tracing::error!("{}", error.chain());
        }
        cancel.disarm();
        if let Some(daemon) = daemon {
            daemon.run()?;
        }
        ready.go()?;
        // The daemon has the descriptors, and each task its own.
        drop(lazy);
        let counted = pages
            .objects()
            .flat_map(|object| pages.runs(object).unwrap_or(&[]))
            .map(|run| run.run.pages);
        let stats = stats::of_restore(forked.unwrap_or_default(), started.elapsed(), counted.sum());
        tracing::info!("Restore finished successfully. Tasks resumed.");
        if let Err(error) = scripts.run(Stage::PostResume, Some(root)) {
            tracing::error!("{}", error.chain());
        }
        // The tree runs: what fails now must not look like a failed restore.
        if let Err(error) = stats::save(&stats, &workspace, self.hooks.display_stats) {
            tracing::warn!("{}", error.chain());
        }
        if let Err(error) = signal_ready(self.hooks.status_fd) {
            tracing::warn!("{}", error.chain());
        }
        context.event(&serde_json::json!({
            "event": "restored",
            "pid": root,
            "images": workspace.absolute_images(),
            "took_us": started.elapsed().as_micros() as u64,
        }));
        cancel.done();
        self.afterwards(root)
    }
}

impl Restore {
    fn options(&self) -> restore::Options {
        restore::Options {
            shell_job: self.resources.shell_job,
            tcp_established: self.resources.tcp_established,
            tcp_close: self.resources.tcp_close,
            sibling: self.restore_sibling,
            leave_stopped: self.leave_stopped,
            skip_build_ids: self.file_validation == "filesize",
            skip_file_modes: self.skip_file_rwx_check,
            ..restore::Options::default()
        }
    }

    /// A program of a shell needs somebody's session, and that must be asked for.
    fn check_session(&self, image: &TreeImage) -> Result<()> {
        let Some(root) = image.tasks.first().map(|task| &task.entry) else {
            return Ok(());
        };
        let inside = image.tasks.iter().any(|task| task.entry.pid == root.sid);
        if inside || self.resources.shell_job {
            return Ok(());
        }
        Err(Error::new("restore a session")
            .task(root.pid as i32)
            .because(format!("its session leader {} is not in the images", root.sid))
            .hint("use --shell-job (-j) to restore it into the session of this command"))
    }

    /// Whether there are connections; they need the user's word, for the other ends must still be there.
    fn check_connections(&self, store: &DirStore) -> Result<bool> {
        let names = store.list().context("list the images")?;
        let connected = names.iter().any(|name| name.starts_with("tcp-stream-"));
        if connected && !self.resources.tcp_established && !self.resources.tcp_close {
            return Err(Error::new("restore TCP connections")
                .because("the images hold connections")
                .hint("use --tcp-established, or --tcp-close to have them end"));
        }
        Ok(connected)
    }

    /// What this command does when the tree runs.
    fn afterwards(&self, root: i32) -> Result<ExitCode> {
        if self.exec_cmd
            && let Some((program, arguments)) = self.command.split_first()
        {
            use std::os::unix::process::CommandExt;
            let error = std::process::Command::new(program).args(arguments).exec();
            let failed = Error::new("execute the command of --exec-cmd").object(program.to_string_lossy());
            return Err(failed.because(error));
        }
        if self.restore_detached {
            return Ok(ExitCode::SUCCESS);
        }
        wait_for(root)
    }
}

/// A tree that was just dumped may still wait as zombies for a parent (often a slow init) to take note: gives it a second.
/// A pid that is taken for longer shows when the task is created.
fn await_reaping(image: &TreeImage) {
    let deadline = Instant::now() + Duration::from_secs(1);
    let dead = |pid: u32| {
        let stat = procfs::read(pid as i32, "stat").and_then(|text| procfs::stat::parse(&text));
        stat.is_ok_and(|stat| stat.state == b'Z')
    };
    while Instant::now() < deadline && image.tasks.iter().any(|task| dead(task.entry.pid)) {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for the root, and ends as it did: with its status, or 128 and the signal that killed it.
fn wait_for(root: i32) -> Result<ExitCode> {
    use rustix::process::{Pid, WaitOptions, waitpid};
    loop {
        match waitpid(Pid::from_raw(root), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(Error::new("wait for the root task")
                    .task(root)
                    .because(std::io::Error::from(error)));
            }
            Ok(None) => {}
            Ok(Some((_, status))) => {
                let signal = status.terminating_signal().map(|signal| 128 + signal);
                let code = status.exit_status().or(signal);
                if let Some(code) = code {
                    tracing::info!("The root task {root} ended with status {code}");
                    return Ok(ExitCode::from(code as u8));
                }
            }
        }
    }
}
