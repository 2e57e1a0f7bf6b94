//! `id`: who this host is.

use std::process::ExitCode;

use clap::Args;

use whimbrel::error::Result;

use super::{Context, Run};

/// Print the fingerprint of this host, making a key on first use.
///
/// Example: `whimbrel id` here, then `whimbrel trust FINGERPRINT NAME` on the other host.
#[derive(Args)]
pub struct Id {}

impl Run for Id {
    fn run(self, context: &Context) -> Result<ExitCode> {
        let fingerprint = context.identity.identity()?.fingerprint().to_string();
        let event = serde_json::json!({
            "event": "identity",
            "fingerprint": fingerprint,
            "directory": context.identity.directory()?,
        });
        context.event(&event);
        if !context.json {
            println!("{fingerprint}");
        }
        Ok(ExitCode::SUCCESS)
    }
}
