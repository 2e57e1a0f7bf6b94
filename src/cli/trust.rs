//! `trust`: the hosts that may push to this one or pull from it.

use std::process::ExitCode;

use clap::Args;

use whimbrel::error::{Context as _, Error, Result};
use whimbrel_page_server::identity::Fingerprint;

use super::{Context, Run};

/// Trust another host, list trusted hosts, or trust one no longer.
///
/// Examples:
///   whimbrel trust whb1-… db2        let the host with this fingerprint in; `whimbrel id` prints it there
///   whimbrel trust --list
///   whimbrel trust --remove db2
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct Trust {
    /// The other host's fingerprint, as `whimbrel id` prints it there.
    #[arg(required_unless_present_any = ["list", "remove"], requires = "name")]
    fingerprint: Option<Fingerprint>,
    /// What it is called here.
    name: Option<String>,
    /// List the trusted hosts.
    #[arg(long, conflicts_with_all = ["fingerprint", "remove"])]
    list: bool,
    /// Trust a host no longer, by its name or fingerprint.
    #[arg(long, value_name = "NAME", conflicts_with = "fingerprint")]
    remove: Option<String>,
}

impl Run for Trust {
    fn run(self, context: &Context) -> Result<ExitCode> {
        let mut peers = context.identity.peers()?;
        if self.list {
            for peer in peers.list() {
                let fingerprint = peer.fingerprint.to_string();
                context.event(&serde_json::json!({"event": "peer", "fingerprint": fingerprint, "name": peer.name}));
                if !context.json {
                    println!("{fingerprint} {}", peer.name);
                }
            }
            return Ok(ExitCode::SUCCESS);
        }
        if let Some(name) = &self.remove {
            if peers.remove(name) == 0 {
                let error = Error::new("remove a trusted host").object(name.clone());
                return Err(error
                    .because("it is not in the list")
                    .hint("see `whimbrel trust --list`"));
            }
            peers.save().context("save the list of trusted hosts")?;
            context.event(&serde_json::json!({"event": "removed", "name": name}));
            return Ok(ExitCode::SUCCESS);
        }
        if let (Some(fingerprint), Some(name)) = (self.fingerprint, &self.name) {
            peers.add(fingerprint, name).context("trust a host")?;
            peers.save().context("save the list of trusted hosts")?;
            let fingerprint = fingerprint.to_string();
            context.event(&serde_json::json!({"event": "trusted", "fingerprint": fingerprint, "name": name}));
        }
        Ok(ExitCode::SUCCESS)
    }
}
