//! `pre-dump`: memory only, for the dump that follows.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use whimbrel::dump::{self, Prepared};
use whimbrel::error::Result;

use super::cancel::Cancel;
use super::dump::{MemoryOptions, PreDumpMode, Target, free_previous, within};
use super::options::{Common, Hooks, Resources};
use super::scripts::{Scripts, Stage};
use super::staging::Staging;
use super::unbuilt::Unbuilt;
use super::workspace::{close_descriptors, signal_ready, write_pidfile};
use super::{Context, Logging, Run, stats};

/// Save the memory of a tree while it goes on, so that the dump that follows has less to do.
///
/// The dump that follows stores only what differs: give it this directory as --prev-images-dir. Where the kernel has
/// soft-dirty bits it reads only what was written since; otherwise it compares. Nothing is restored from a pre-dump alone.
///
/// Example:
///   whimbrel pre-dump -t 1234 -D one
///   whimbrel dump -t 1234 -D two --prev-images-dir ../one
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct PreDump {
    #[command(flatten)]
    common: Common,
    /// The root of the tree.
    #[arg(short = 't', long = "tree", value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    tree: i32,
    /// How memory is read.
    #[arg(long, value_enum, default_value = "splice")]
    pre_dump_mode: PreDumpMode,
    /// Seconds that freezing the tree may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
    #[command(flatten)]
    resources: Resources,
    #[command(flatten)]
    memory: MemoryOptions,
    #[command(flatten)]
    hooks: Hooks,
    #[command(flatten)]
    unbuilt: Unbuilt,
}

const FAILED: &str = "Pre-dumping FAILED.";

impl Run for PreDump {
    fn logging(&self) -> Logging {
        self.common.logging(Some(FAILED))
    }

    fn run(self, context: &Context) -> Result<ExitCode> {
        self.unbuilt.refuse()?;
        // Both are one here: the tree is frozen only until it is known which pages there are.
        tracing::debug!("Pre-dump mode {:?}", self.pre_dump_mode);
        self.memory.check()?;
        close_descriptors(&self.common)?;
        let workspace = self.common.workspace();
        let scripts = Scripts::new(&self.hooks, &workspace)?;
        let mut staging = Staging::new(workspace.open_images()?)?;
        workspace.open_work()?;
        dump::check_root(self.tree)?;
        let mut target = Target::new(&self.memory, &staging, context)?;
        let mut chain = target.chain(true)?;
        let cancel = Cancel::arm(FAILED, staging.clean_up())?;
        scripts.run(Stage::PreDump, Some(self.tree))?;

        tracing::info!("Pre-dumping the tree of {}", self.tree);
        let options = dump::Options {
            // Whether sessions can be restored is asked by the dump that follows.
            shell_job: true,
            ..dump::Options::default()
        };
        let prepared = Prepared::look(self.tree)?;
        let started = Instant::now();
        let frozen = within(Duration::from_secs(self.timeout), &cancel, || {
            dump::freeze(self.tree, prepared, &options)
        })?;
        for task in &frozen.collected.memory {
            target.begin(task.object)?;
        }
        let selections = frozen.select(&mut chain)?;
        let (mut amount, times) = frozen.memory_running(selections, target.sink())?;
        target.note(&chain)?;
        target.finish(&mut amount)?;
        cancel.disarm();
        staging.commit()?;
        write_pidfile(&self.common, self.tree)?;
        scripts.run(Stage::PostDump, Some(self.tree))?;
        staging.keep();
        stats::save(&stats::of_dump(&times, &amount), &workspace, self.hooks.display_stats)?;
        if self.memory.auto_dedup {
            free_previous(&workspace)?;
        }
        signal_ready(self.hooks.status_fd)?;
        tracing::info!("Pre-dumping finished successfully");
        context.event(&serde_json::json!({
            "event": "pre-dumped",
            "pid": self.tree,
            "images": workspace.absolute_images(),
            "pages_written": amount.pages_written,
            "pages_in_parent": amount.pages_in_parent,
            "tasks_tracked": chain.told.0,
            "frozen_us": times.frozen.as_micros() as u64,
            "took_us": started.elapsed().as_micros() as u64,
        }));
        Ok(ExitCode::SUCCESS)
    }
}
