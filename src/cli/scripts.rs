//! Action scripts: programs of the user that run at fixed stages.

use std::path::PathBuf;
use std::process::Command;

use whimbrel::error::{Context, Error, Result};

use super::{options::Hooks, workspace::Workspace};

/// When scripts run, with CRIU's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before a dump begins.
    PreDump,
    /// The images are written; the tree does not run yet.
    PostDump,
    /// Before a restore begins.
    PreRestore,
    /// Everything is restored; nothing runs yet.
    PostRestore,
    /// The last moment before the tree runs.
    PreResume,
    /// The tree runs.
    PostResume,
    /// The root task exists.
    SetupNamespaces,
    /// Its namespaces are ready.
    PostSetupNamespaces,
    /// Connections are about to be taken apart.
    NetworkLock,
    /// Connections are whole again.
    NetworkUnlock,
}

impl Stage {
    /// CRIU's name.
    pub fn name(self) -> &'static str {
        match self {
            Stage::PreDump => "pre-dump",
            Stage::PostDump => "post-dump",
            Stage::PreRestore => "pre-restore",
            Stage::PostRestore => "post-restore",
            Stage::PreResume => "pre-resume",
            Stage::PostResume => "post-resume",
            Stage::SetupNamespaces => "setup-namespaces",
            Stage::PostSetupNamespaces => "post-setup-namespaces",
            Stage::NetworkLock => "network-lock",
            Stage::NetworkUnlock => "network-unlock",
        }
    }
}

/// The scripts of one dump or restore.
pub struct Scripts {
    files: Vec<PathBuf>,
    images: PathBuf,
}

impl Scripts {
    /// From the options.
    ///
    /// # Errors
    /// When a script is not there: better now than with a frozen tree.
    pub fn new(hooks: &Hooks, workspace: &Workspace) -> Result<Scripts> {
        let find = |file: &PathBuf| {
            let failed = || Error::new("find the action script").object(file.display().to_string());
            std::fs::canonicalize(file).with(|| failed().hint("see --action-script"))
        };
        Ok(Scripts {
            files: hooks.action_script.iter().map(find).collect::<Result<_>>()?,
            images: workspace.absolute_images(),
        })
    }

    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Runs all scripts for a stage; `root` is the pid of the root task where there is one.
    ///
    /// # Errors
    /// When one cannot be run or does not end with status 0.
    pub fn run(&self, stage: Stage, root: Option<i32>) -> Result<()> {
        for file in &self.files {
            tracing::info!("Running {} scripts", stage.name());
            let mut command = Command::new(file);
            command
                .env("CRTOOLS_SCRIPT_ACTION", stage.name())
                .env("CRTOOLS_IMAGE_DIR", &self.images);
            if let Some(pid) = root {
                command.env("CRTOOLS_INIT_PID", pid.to_string());
            }
            let failed = || {
                let object = format!("{} at {}", file.display(), stage.name());
                Error::new("run the action script").object(object)
            };
            let status = command.status().with(failed)?;
            if !status.success() {
                return Err(failed().because(status.to_string()));
            }
        }
        Ok(())
    }
}
