//! `completions`: for shells.

use std::process::ExitCode;

use clap::Args;
use clap_complete::Shell;

use whimbrel::error::{Context as _, Result};

use super::{Context, Run};

/// Print completions for a shell.
///
/// Example: whimbrel completions bash > /etc/bash_completion.d/whimbrel
#[derive(Args)]
pub struct Completions {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

impl Run for Completions {
    fn run(self, _: &Context) -> Result<ExitCode> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::command(), "whimbrel", &mut script);
        std::io::Write::write_all(&mut std::io::stdout(), &script).context("print completions")?;
        Ok(ExitCode::SUCCESS)
    }
}
