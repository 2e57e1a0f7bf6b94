//! `serve`: take migrations.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;

use whimbrel::error::{Context as _, Result};
use whimbrel::migrate::{arrivals::Arrivals, destination, server};
use whimbrel_page_server::transport::{Endpoint, Options, Runtime};

use super::{Context, Run};

/// Wait for trees that other hosts move here, and run them.
///
/// Only hosts that were trusted with `whimbrel trust` may. Example: `whimbrel serve` here, then
/// `whimbrel migrate 1234 thishost` there.
#[derive(Args)]
pub struct Serve {
    /// Address and port to listen on.
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:7800")]
    listen: SocketAddr,
    /// Where the files of the trees are found.
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Where arrivals are noted.
    #[arg(long, value_name = "DIR", default_value = "/run/whimbrel")]
    journal: PathBuf,
}

struct Notes {
    json: bool,
}

impl destination::Observer for Notes {
    fn note(&self, text: &str) {
        if self.json {
            println!("{}", serde_json::json!({"event": "note", "text": text}));
        } else {
            eprintln!("{text}");
        }
    }
}

impl Run for Serve {
    fn run(self, context: &Context) -> Result<ExitCode> {
        let credentials = context.identity.credentials()?;
        let runtime = Runtime::new(2).context("start threads")?;
        let bind = async { Endpoint::bind(self.listen, &credentials, Options::default()) };
        let endpoint = runtime.block_on(bind).context("listen")?;
        let options = destination::Options {
            root: self.root,
            runtime: runtime.handle().clone(),
            arrivals: Some(Arrivals::open(&self.journal)?),
        };
        context.event(&serde_json::json!({"event": "listening", "address": self.listen.to_string()}));
        if !context.json {
            eprintln!("listening on {}", self.listen);
        }
        runtime.block_on(async {
            tokio::select! {
                () = server::serve(&endpoint, &options, Arc::new(Notes { json: context.json })) => {}
                _ = tokio::signal::ctrl_c() => {}
            }
        });
        Ok(ExitCode::SUCCESS)
    }
}
