//! `lazy-pages`: not built yet; the verb is known so that it can say so.

use std::process::ExitCode;

use clap::Args;

use whimbrel::error::{Error, Result};

use super::options::Common;
use super::unbuilt::Unbuilt;
use super::{Context, Logging, Run};

/// Fetch the memory of restored processes on demand (not built yet).
///
/// Example: whimbrel lazy-pages -D checkpoint
#[derive(Args)]
pub struct LazyPages {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    _unbuilt: Unbuilt,
}

impl Run for LazyPages {
    fn logging(&self) -> Logging {
        self.common.logging(None)
    }

    fn run(self, _: &Context) -> Result<ExitCode> {
        Err(Error::new("serve pages on demand")
            .because("lazy-pages is not built yet")
            .hint("restore without --lazy-pages"))
    }
}
