//! `dump`: takes a tree apart into an image set.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};

use whimbrel::dump::track::chain::{Before, Chain};
use whimbrel::dump::{self, Afterwards, Prepared, ahead::Ahead, memory::Amount, runs::RunSet};
use whimbrel::error::{Context as _, Error, Result};
use whimbrel::kernel::nft::NetworkLock;
use whimbrel_images::chain::{Location, PageStore, ResolvedRun};
use whimbrel_images::page::{MemoryObject, PageSink};
use whimbrel_images::proto::TrackEntry;
use whimbrel_images::sink::DirPageSink;
use whimbrel_images::store::{DirStore, ImageStore};

use super::cancel::Cancel;
use super::compare::ComparingSink;
use super::options::{Common, Hooks, Resources, size};
use super::remote_pages::{RemotePages, ServerAddress};
use super::scripts::{Scripts, Stage};
use super::staging::Staging;
use super::unbuilt::Unbuilt;
use super::workspace::{Workspace, close_descriptors, signal_ready, write_pidfile};
use super::{Context, Logging, Run, cpuinfo, lazy_server, stats};

/// Checkpoint a process tree into image files.
///
/// The tree is killed afterwards, unless -R or -s is given: it goes on where it is restored. When anything cannot be
/// carried, the tree goes on as if nothing had been, and the images directory is as it was.
///
/// Examples:
///   whimbrel dump -t 1234 -D checkpoint             a daemon, or anything started with setsid
///   whimbrel dump -t 1234 -D checkpoint --shell-job a program started from a shell
///   whimbrel dump -t 1234 -D checkpoint -R          leave it running
///   whimbrel dump -t 1234 -D two --prev-images-dir ../one --track-mem
///   whimbrel dump -t 1234 -D checkpoint --lazy-pages --port 8417   memory follows when it runs elsewhere
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct Dump {
    #[command(flatten)]
    common: Common,
    /// The root of the tree.
    #[arg(short = 't', long = "tree", value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    tree: i32,
    /// Leave the tree running. What it does from then on to files and connections the images do not know. Much memory is
    /// stored before the tree is frozen, and in the freeze only what it wrote meanwhile (Linux 6.7).
    #[arg(short = 'R', long)]
    leave_running: bool,
    /// Leave the tree stopped, as by SIGSTOP.
    #[arg(short = 's', long, conflicts_with = "leave_running")]
    leave_stopped: bool,
    /// Largest deleted file that is carried in the images; K, M or G may follow.
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "1M")]
    ghost_limit: u64,
    /// Seconds that freezing the tree may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
    /// CPU features to save for the check at restore: none, fpu, ins, cpu, all (a list; ^ takes one back).
    #[arg(long, value_name = "CAP", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    cpu_cap: Vec<String>,
    /// How packets are kept away while connections are taken apart: nftables, or skip (not at all).
    #[arg(long, value_name = "METHOD", value_parser = ["nftables", "iptables", "skip"], default_value = "nftables")]
    network_lock: String,
    /// Leave memory where it is until it is asked for: `whimbrel lazy-pages --page-server` on another host fetches it from
    /// this command (see --address and --port), which ends when all of it is there.
    #[arg(long, conflicts_with_all = ["leave_running", "leave_stopped"])]
    lazy_pages: bool,
    /// How files are recognised at restore: buildid (and size), or filesize. Images always hold what both need.
    #[arg(long, value_name = "METHOD", value_parser = ["filesize", "buildid"], default_value = "buildid")]
    file_validation: String,
    #[command(flatten)]
    resources: Resources,
    #[command(flatten)]
    memory: MemoryOptions,
    #[command(flatten)]
    hooks: Hooks,
    #[command(flatten)]
    unbuilt: Unbuilt,
}

/// Where memory goes: dump and pre-dump have these.
#[derive(Args, Clone, Debug)]
pub struct MemoryOptions {
    /// Prepare for a later incremental dump of the same tree: where the kernel has soft-dirty bits, they are cleared, so
    /// that it stores only what was written since. Without them pages are compared with those of --prev-images-dir. A
    /// pre-dump always does this.
    #[arg(long)]
    pub track_mem: bool,
    /// Store only pages that differ from those of the previous dump in DIR (relative to the images directory).
    #[arg(long, value_name = "DIR")]
    pub prev_images_dir: Option<PathBuf>,
    /// After the dump, free the room of pages in previous images that this dump has too.
    #[arg(long)]
    pub auto_dedup: bool,
    #[command(flatten)]
    pub server: ServerAddress,
}

/// How memory is read by a pre-dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PreDumpMode {
    /// The tree is frozen until it is known which pages there are.
    Splice,
    /// The same here.
    Read,
}

impl MemoryOptions {
    /// Refuses what cannot be done together.
    ///
    /// # Errors
    /// With the reason.
    pub fn check(&self) -> Result<()> {
        self.check_with(false)
    }

    /// As [`MemoryOptions::check`]; with `lazy`, the address is one to listen on.
    ///
    /// # Errors
    /// As [`MemoryOptions::check`].
    pub fn check_with(&self, lazy: bool) -> Result<()> {
        let wrong = |why: &str| Err(Error::new("use the options given").because(why.to_owned()));
        if !lazy {
            self.server.check()?;
        } else if self.server.page_server {
            return wrong("--lazy-pages leaves memory here and --page-server sends it away: use one of them");
        }
        if self.server.page_server && self.prev_images_dir.is_some() {
            return wrong("with --page-server, --prev-images-dir is to be given to the page server: it has the images");
        }
        if self.auto_dedup && self.prev_images_dir.is_none() {
            return wrong("--auto-dedup needs previous images: use --prev-images-dir DIR");
        }
        Ok(())
    }
}

/// Where the pages of a dump go.
pub enum Target {
    /// Into the image set.
    Images(DirPageSink),
    /// Into the image set, what its parent does not have.
    Changes(Box<ComparingSink>, Arc<PageStore>),
    /// To a page server.
    Server(Box<RemotePages>),
}

impl Target {
    /// From the options.
    ///
    /// # Errors
    /// When there are no previous images, or the page server cannot be reached.
    pub fn new(options: &MemoryOptions, staging: &Staging, context: &Context) -> Result<Target> {
        if options.server.page_server {
            return Ok(Target::Server(Box::new(RemotePages::connect(
                &options.server,
                &context.identity,
            )?)));
        }
        let sink = DirPageSink::new(staging.store());
        let Some(previous) = &options.prev_images_dir else {
            return Ok(Target::Images(sink));
        };
        let parent = PageStore::new(staging.set_parent(previous)?).context("read the previous images")?;
        let parent = Arc::new(parent);
        let sink = Box::new(ComparingSink::new(sink, parent.clone()));
        Ok(Target::Changes(sink, parent))
    }

    /// The dump's place in a chain: what the dump before has left, and whether to leave something for the next (`track`).
    ///
    /// # Errors
    /// When the page server does not answer.
    pub fn chain(&self, track: bool) -> Result<Chain> {
        let before = match self {
            Target::Images(_) => HashMap::new(),
            Target::Changes(_, parent) => {
                let stored = |run: &&ResolvedRun| run.location != Location::Missing;
                let before = |(object, track): (MemoryObject, &TrackEntry)| {
                    let runs = parent.runs(object).unwrap_or_default();
                    let runs: Vec<_> = runs.iter().filter(stored).map(|run| run.run).collect();
                    let known = Some(RunSet::from_runs(&runs));
                    let track = track.clone();
                    (object, Before { track, known })
                };
                parent.tracks().map(before).collect()
            }
            Target::Server(remote) => {
                let tracks = remote.marks()?.into_tracks();
                let before = |(object, track)| (object, Before { track, known: None });
                tracks.map(before).collect()
            }
        };
        Ok(Chain::new(before, track))
    }

    /// Notes what was left for the next dump.
    ///
    /// # Errors
    /// When it cannot be noted.
    pub fn note(&mut self, chain: &Chain) -> Result<()> {
        chain.report();
        let sink = match self {
            Target::Images(sink) => sink,
            Target::Changes(sink, _) => sink.inner(),
            Target::Server(_) if chain.left.is_empty() => return Ok(()),
            Target::Server(remote) => return remote.leave_marks(&chain.left),
        };
        let mut left = chain.left.iter();
        left.try_for_each(|(object, track)| sink.set_track(*object, track.clone()))
            .context("store memory")
    }

    /// Sees to it that an object has a pagemap even if it has no pages.
    ///
    /// # Errors
    /// When its file cannot be made.
    pub fn begin(&mut self, object: MemoryObject) -> Result<()> {
        match self {
            Target::Images(sink) => sink.begin(object).context("store memory"),
            Target::Changes(sink, _) => sink.inner().begin(object).context("store memory"),
            Target::Server(_) => Ok(()),
        }
    }

    /// Says which pages can be asked for, by task. Returns those that are left out in any case; of the others those
    /// that the previous images do not have are.
    ///
    /// # Errors
    /// When a pagemap cannot be made.
    pub fn leave(&mut self, later: &[(u32, RunSet)]) -> Result<Vec<(u32, RunSet)>> {
        match self {
            Target::Images(sink) => {
                for (pid, set) in later {
                    let object = MemoryObject::Task(*pid);
                    let mut runs = set.runs().into_iter();
                    runs.try_for_each(|run| sink.lazy_pages(object, run))
                        .context("store memory")?;
                }
                Ok(later.to_vec())
            }
            Target::Changes(sink, _) => {
                for (pid, set) in later {
                    sink.leave(MemoryObject::Task(*pid), set.clone());
                }
                Ok(Vec::new())
            }
            Target::Server(_) => Ok(Vec::new()),
        }
    }

    /// Of the pages that can be asked for, those that no image has.
    pub fn left(&self, later: Vec<(u32, RunSet)>) -> Vec<(u32, RunSet)> {
        let Target::Changes(sink, _) = self else { return later };
        let left = |(pid, _): (u32, RunSet)| {
            let runs = sink.left.get(&MemoryObject::Task(pid));
            (pid, RunSet::from_runs(runs.map_or(&[], Vec::as_slice)))
        };
        later.into_iter().map(left).filter(|(_, set)| !set.is_empty()).collect()
    }

    /// The sink.
    pub fn sink(&mut self) -> &mut dyn PageSink {
        match self {
            Target::Images(sink) => sink,
            Target::Changes(sink, _) => sink.as_mut(),
            Target::Server(remote) => remote.sink(),
        }
    }

    /// Makes all of it last; corrects the count of pages for those that the parent has.
    ///
    /// # Errors
    /// When it cannot be written, or the page server has not stored it.
    pub fn finish(self, amount: &mut Amount) -> Result<()> {
        match self {
            Target::Images(sink) => sink.finish().map(drop).context("store memory"),
            Target::Changes(sink, _) => {
                amount.pages_in_parent += sink.in_parent;
                let left: u64 = sink.left.values().flatten().map(|run| run.pages).sum();
                amount.pages_written = amount.pages_written.saturating_sub(sink.in_parent + left);
                sink.into_inner().finish().map(drop).context("store memory")
            }
            Target::Server(remote) => remote.finish(),
        }
    }
}

const FAILED: &str = "Dumping FAILED.";

impl Run for Dump {
    fn logging(&self) -> Logging {
        self.common.logging(Some(FAILED))
    }

    fn run(self, context: &Context) -> Result<ExitCode> {
        let iptables = self.network_lock == "iptables";
        self.unbuilt.and(&[(
            iptables,
            "network-lock iptables",
            "is not built: use --network-lock nftables",
        )])?;
        self.memory.check_with(self.lazy_pages)?;
        let capabilities = cpuinfo::Capabilities::parse(&self.cpu_cap)?;
        close_descriptors(&self.common)?;
        let workspace = self.common.workspace();
        let scripts = Scripts::new(&self.hooks, &workspace)?;
        let mut staging = Staging::new(workspace.open_images()?)?;
        workspace.open_work()?;
        dump::check_root(self.tree)?;
        let mut target = Target::new(&self.memory, &staging, context)?;
        // Nothing follows a tree that is killed.
        let mut chain = target.chain(self.memory.track_mem && self.afterwards() != Afterwards::Kill)?;
        if capabilities.any() {
            cpuinfo::write(&*staging.store())?;
        }
        let cancel = Cancel::arm(FAILED, staging.clean_up())?;
        scripts.run(Stage::PreDump, Some(self.tree))?;

        tracing::info!("Dumping the tree of {}", self.tree);
        let options = self.options();
        let store = staging.store();
        let mut prepared = Prepared::look(self.tree)?;
        let limit = Duration::from_secs(self.timeout);
        let mut ahead = match self.stores_ahead(&target) {
            true => within(limit, &cancel, || Ahead::watch(&prepared)),
            false => None,
        };
        if let Some(ahead) = &mut ahead {
            ahead.store(target.sink(), &|| Ok(()))?;
            prepared = Prepared::look_tracked(self.tree)?;
        }
        let mut frozen = within(limit, &cancel, || dump::freeze(self.tree, prepared, &options))?;
        tracing::info!("{} tasks are frozen", frozen.tree.tasks.len());
        frozen.check(&*store, &options)?;
        let mut lock = self.lock_network(&frozen, &scripts)?;
        let files = frozen.files(&*store, &options)?;
        for task in &frozen.collected.memory {
            target.begin(task.object)?;
        }
        let later = match self.lazy_pages {
            true => dump::lazy::select(&frozen)?,
            false => Vec::new(),
        };
        let stored = target.leave(&later)?;
        let mut amount = match &mut ahead {
            Some(ahead) => frozen.memory_after(ahead, target.sink())?,
            None => {
                let selections = frozen.select(&mut chain)?;
                frozen.memory_but(selections, &stored, target.sink())?
            }
        };
        target.note(&chain)?;
        if ahead.is_some() && scripts.is_empty() {
            frozen.describe(&*store, files, lock.run_id.take())?;
            drop(store);
            let times = frozen.end(Afterwards::Resume)?;
            drop(lock);
            // Only now: to end the watch takes as long as the memory is large.
            drop(ahead);
            return self.finish_running(context, &workspace, &cancel, (staging, target), (times, amount), &chain);
        }
        let later = target.left(later);
        target.finish(&mut amount)?;
        amount.pages_lazy = later.iter().map(|(_, set)| set.pages()).sum();
        frozen.describe(&*store, files, lock.run_id.clone())?;
        drop(store);
        cancel.disarm();
        staging.commit()?;
        write_pidfile(&self.common, self.tree)?;
        let mut times = frozen.times;
        times.frozen = frozen.since.elapsed();
        stats::save(&stats::of_dump(&times, &amount), &workspace, false)?;
        let server = match later.is_empty() {
            false => Some(lazy_server::Server::listen(&self.memory.server, context)?),
            true => None,
        };
        let followed = server.is_some();
        scripts.run(Stage::PostDump, Some(self.tree))?;
        if let Some(server) = server {
            signal_ready(self.hooks.status_fd)?;
            // Nothing is lost yet: until the first page is asked for, the tree can go on here.
            cancel.arm_again(FAILED, staging.take_back());
            server.serve(&frozen, &later, &mut || {
                cancel.disarm();
                if let Err(error) = lock.hold(&frozen, Afterwards::Kill) {
                    // The tree is about to run elsewhere: too late to fail.
                    tracing::error!("{}", error.chain());
                }
            })?;
        }
        // From here on the images may be the only copy.
        staging.keep();
        if !followed {
            lock.hold(&frozen, self.afterwards())?;
        }
        let times = frozen.end(self.afterwards())?;
        let mut after = || -> Result<()> {
            stats::save(&stats::of_dump(&times, &amount), &workspace, self.hooks.display_stats)?;
            if self.memory.auto_dedup {
                free_previous(&workspace)?;
            }
            if !followed {
                signal_ready(self.hooks.status_fd)?;
            }
            if lock.lock.take().is_some() && self.afterwards() != Afterwards::Kill {
                scripts.run(Stage::NetworkUnlock, Some(self.tree))?;
            }
            Ok(())
        };
        // The dump is whole: what fails now must not look like a failed dump.
        if let Err(error) = after() {
            tracing::warn!("{}", error.chain());
        }
        self.tell(context, &workspace, &times, &amount, &chain);
        Ok(ExitCode::SUCCESS)
    }
}

impl Dump {
    /// Whether memory goes into the images while the tree still runs: it must be the images that a round can correct, and
    /// nobody else who watches the memory.
    fn stores_ahead(&self, target: &Target) -> bool {
        self.leave_running && !self.lazy_pages && !self.memory.track_mem && matches!(target, Target::Images(_))
    }

    /// Ends a dump whose tree runs again already. Its images are put in order meanwhile.
    fn finish_running(
        &self,
        context: &Context,
        workspace: &Workspace,
        cancel: &Cancel,
        (mut staging, target): (Staging, Target),
        (times, mut amount): (dump::Times, Amount),
        chain: &Chain,
    ) -> Result<ExitCode> {
        target.finish(&mut amount)?;
        cancel.disarm();
        staging.commit()?;
        staging.keep();
        let after = || -> Result<()> {
            write_pidfile(&self.common, self.tree)?;
            stats::save(&stats::of_dump(&times, &amount), workspace, self.hooks.display_stats)?;
            signal_ready(self.hooks.status_fd)
        };
        // The dump is whole: what fails now must not look like a failed dump.
        if let Err(error) = after() {
            tracing::warn!("{}", error.chain());
        }
        self.tell(context, workspace, &times, &amount, chain);
        Ok(ExitCode::SUCCESS)
    }

    fn tell(&self, context: &Context, workspace: &Workspace, times: &dump::Times, amount: &Amount, chain: &Chain) {
        tracing::info!("Dumping finished successfully");
        context.event(&serde_json::json!({
            "event": "dumped",
            "pid": self.tree,
            "images": workspace.absolute_images(),
            "pages_written": amount.pages_written,
            "pages_in_parent": amount.pages_in_parent,
            "tasks_tracked": chain.told.0,
            "pages_lazy": amount.pages_lazy,
            "frozen_us": times.frozen.as_micros() as u64,
        }));
    }

    fn options(&self) -> dump::Options {
        dump::Options {
            shell_job: self.resources.shell_job,
            tcp_established: self.resources.tcp_established,
            file_locks: self.resources.file_locks,
            ext_unix_sk: self.resources.ext_unix_sk,
            skip_in_flight: self.resources.skip_in_flight,
            tcp_close: self.resources.tcp_close,
            ghost_limit: self.ghost_limit,
        }
    }

    fn afterwards(&self) -> Afterwards {
        match (self.leave_running, self.leave_stopped) {
            (true, _) => Afterwards::Resume,
            (_, true) => Afterwards::Stop,
            _ => Afterwards::Kill,
        }
    }
}

/// Packets of the tree's connections are dropped while it is taken apart, and if it is killed until it is restored.
#[derive(Default)]
struct Locked {
    /// Drops packets until this process ends.
    lock: Option<NetworkLock>,
    /// Names the dump, and with it the lock that stays.
    run_id: Option<String>,
}

/// Name of the nftables table that a dump leaves for its restore.
pub fn table_of(run_id: &str) -> String {
    format!("whimbrel-dump-{run_id}")
}

impl Locked {
    /// Lets the lock outlive this process, if the tree does not live here any more.
    fn hold(&mut self, frozen: &dump::FrozenTree, afterwards: Afterwards) -> Result<()> {
        let (Some(run_id), Afterwards::Kill) = (&self.run_id, afterwards) else {
            return Ok(());
        };
        let table = table_of(run_id);
        let mut lasting = NetworkLock::lasting_in_current_netns(table.clone()).context("keep the network locked")?;
        lasting
            .lock(&frozen.collected.endpoints()?.tcp())
            .context("keep the network locked")?;
        tracing::info!("Connections stay locked by nftables table inet {table} until they are restored");
        Ok(())
    }
}

impl Dump {
    fn lock_network(&self, frozen: &dump::FrozenTree, scripts: &Scripts) -> Result<Locked> {
        let connections = frozen.collected.endpoints()?.tcp();
        if connections.is_empty() || !self.resources.tcp_established || self.resources.tcp_close {
            return Ok(Locked::default());
        }
        scripts.run(Stage::NetworkLock, Some(self.tree))?;
        if self.network_lock == "skip" {
            return Ok(Locked::default());
        }
        let namespace = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/net")).ok();
        if namespace("self") != namespace(&self.tree.to_string()) {
            return Err(Error::new("lock the network")
                .task(self.tree)
                .because("its connections are in another network namespace")
                .hint("run this command there: nsenter -t PID -n, or use --network-lock skip"));
        }
        let mut lock = NetworkLock::new_in_current_netns().context("lock the network")?;
        lock.lock(&connections).context("lock the network")?;
        let run_id = std::fs::read_to_string("/proc/sys/kernel/random/uuid").context("make an id for the dump")?;
        Ok(Locked {
            lock: Some(lock),
            run_id: Some(run_id.trim().to_owned()),
        })
    }
}

/// Gives room back that previous images take for pages that the new ones have.
///
/// # Errors
/// When the chain is damaged or the file system cannot punch holes.
pub fn free_previous(workspace: &Workspace) -> Result<()> {
    let freed = whimbrel_images::dedup::dedup(workspace.open_images()?).context("free room in previous images")?;
    tracing::info!("Freed {} bytes in previous images", freed.freed_bytes);
    Ok(())
}

/// Does work on this thread. When it takes longer than `limit`, this process ends, and with it its hold on the tree, which
/// goes on: a task that the kernel cannot stop (in uninterruptible sleep) cannot be waited for any other way.
pub fn within<T>(limit: Duration, cancel: &Cancel, work: impl FnOnce() -> T) -> T {
    use std::sync::mpsc::RecvTimeoutError;
    let (done, waiting) = std::sync::mpsc::channel::<()>();
    let cancel = cancel.clone();
    // Nobody waits for its end: that would be a turn of the processor more, which on a busy machine takes long.
    std::thread::spawn(move || {
        if !limit.is_zero() && waiting.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            cancel.fail(&format!(
                "the tree could not be frozen within {} s; use --timeout",
                limit.as_secs()
            ));
        }
    });
    let result = work();
    drop(done);
    result
}

/// Whether a directory holds a whole image set.
pub fn is_whole(store: &DirStore) -> bool {
    store.exists("inventory.img").unwrap_or(false)
}
