//! `dedup`: frees room in the earlier images of a chain.

use std::process::ExitCode;

use clap::Args;

use whimbrel::error::{Context as _, Result};

use super::options::Common;
use super::unbuilt::Unbuilt;
use super::{Context, Logging, Run};

/// Free the room of pages in previous images that a later dump has too.
///
/// The images in -D stay whole; those before them can no longer be restored on their own.
///
/// Example: whimbrel dedup -D checkpoint
#[derive(Args)]
pub struct Dedup {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    unbuilt: Unbuilt,
}

impl Run for Dedup {
    fn logging(&self) -> Logging {
        self.common.logging(Some("Deduplication FAILED."))
    }

    fn run(self, context: &Context) -> Result<ExitCode> {
        self.unbuilt.refuse()?;
        let directory = self.common.workspace().open_images()?;
        let freed = whimbrel_images::dedup::dedup(directory).context("free room in previous images")?;
        tracing::info!("{} pages of previous images are holes now", freed.pages);
        tracing::info!("Deduplicated {} bytes", freed.freed_bytes);
        context.event(&serde_json::json!({
            "event": "deduplicated",
            "pages": freed.pages,
            "freed_bytes": freed.freed_bytes,
        }));
        Ok(ExitCode::SUCCESS)
    }
}
