//! `man`: writes the manual pages.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use whimbrel::error::{Context as _, Error, Result};

use super::{Context, Run};

/// Write manual pages, one per verb, into a directory.
///
/// Example: whimbrel man /usr/local/share/man/man1
#[derive(Args)]
pub struct Man {
    /// The directory; it must exist.
    directory: PathBuf,
}

impl Run for Man {
    fn run(self, _: &Context) -> Result<ExitCode> {
        let failed = || Error::new("write manual pages").object(self.directory.display().to_string());
        clap_mangen::generate_to(super::command(), &self.directory).with(failed)?;
        Ok(ExitCode::SUCCESS)
    }
}
