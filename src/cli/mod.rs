//! The command line: one file per verb, over the library.
//!
//! A verb is a struct with clap's `Args` and an implementation of [`Run`], and one line in [`Verb`]. What several verbs
//! share lies in [`options`] (groups of options), [`workspace`] (directories), [`scripts`], [`stats`] and [`identity`].
//!
//! Every option of CRIU is either done or refused with the reason: those that are not built are rows in [`unbuilt`].

mod arguments;
mod cancel;
mod check;
mod compare;
mod completions;
mod cpuinfo;
mod dedup;
mod demo;
mod dump;
mod id;
mod identity;
mod image;
mod lazy_pages;
mod lazy_server;
mod log;
mod man;
mod marks;
mod migrate;
mod options;
mod page_server;
mod pre_dump;
mod remote_pages;
mod restore;
mod scripts;
mod serve;
mod staging;
mod stats;
mod trust;
mod unbuilt;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Instant;

use clap::{CommandFactory, Parser, Subcommand};

use whimbrel::error::Result;

/// What a verb is told besides its own options.
pub struct Context {
    /// One JSON object per event on standard output (`--json`).
    pub json: bool,
    /// Where this host's identity and its list of peers are.
    pub identity: identity::Home,
}

impl Context {
    /// Tells a program that reads `--json` what happened; nothing without that option.
    pub fn event(&self, event: &serde_json::Value) {
        if self.json {
            println!("{event}");
        }
    }
}

/// How a verb logs.
#[derive(Clone, Debug, Default)]
pub struct Logging {
    /// Into this file instead of standard error.
    pub file: Option<std::path::PathBuf>,
    /// CRIU's levels, 0 to 4.
    pub verbosity: Option<u8>,
    /// The last line of a log when the verb fails.
    pub on_failure: Option<&'static str>,
}

/// What a verb does.
pub trait Run {
    /// How it logs. By default: warnings and errors to standard error.
    fn logging(&self) -> Logging {
        Logging::default()
    }

    /// Does it.
    ///
    /// # Errors
    /// The reason, which is printed once, and exit status 1.
    fn run(self, context: &Context) -> Result<ExitCode>;
}

/// Defines the verbs: the one list that parsing and dispatch are derived from.
macro_rules! verbs {
    ($($(#[$attribute:meta])* $variant:ident($options:ty),)*) => {
        /// All verbs.
        #[derive(Subcommand)]
        enum Verb {
            $($(#[$attribute])* $variant($options),)*
        }

        impl Run for Verb {
            fn logging(&self) -> Logging {
                match self { $(Verb::$variant(options) => options.logging(),)* }
            }

            fn run(self, context: &Context) -> Result<ExitCode> {
                match self { $(Verb::$variant(options) => options.run(context),)* }
            }
        }
    };
}

verbs! {
    Dump(dump::Dump),
    PreDump(pre_dump::PreDump),
    Restore(restore::Restore),
    Check(check::Check),
    PageServer(page_server::PageServer),
    LazyPages(lazy_pages::LazyPages),
    Dedup(dedup::Dedup),
    Cpuinfo(cpuinfo::CpuInfo),
    Migrate(migrate::Migrate),
    Serve(serve::Serve),
    Demo(demo::Demo),
    Id(id::Id),
    Trust(trust::Trust),
    Image(image::Image),
    Completions(completions::Completions),
    Man(man::Man),
}

/// Moves running Linux processes between hosts, and does what CRIU does with CRIU's verbs, options and images.
///
/// Example: `whimbrel dump -t 1234 -D checkpoint`, then `whimbrel restore -d -D checkpoint`.
/// Each verb has an example: `whimbrel help dump`.
#[derive(Parser)]
#[command(name = "whimbrel", version, args_override_self = true, max_term_width = 120)]
struct Cli {
    /// Print events as JSON on standard output, one per line.
    #[arg(long, global = true)]
    json: bool,
    /// Directory of this host's key and of its list of trusted hosts [default: /etc/whimbrel for root, else
    /// $XDG_CONFIG_HOME/whimbrel].
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "WHIMBREL_IDENTITY",
        hide_env_values = true
    )]
    identity_dir: Option<std::path::PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

/// The whole command line as clap knows it, for completions, man pages and configuration files.
pub fn command() -> clap::Command {
    let mut command = Cli::command();
    let names: Vec<String> = command
        .get_subcommands()
        .map(|verb| verb.get_name().to_owned())
        .collect();
    for name in names {
        command = command.mut_subcommand(name, |verb| verb.args_override_self(true));
    }
    command
}

/// Runs the command line `arguments`; `started` is time zero of the log.
pub fn main(arguments: Vec<OsString>, started: Instant) -> ExitCode {
    let as_criu = arguments::invoked_as_criu(&arguments);
    if as_criu && arguments::asks_for_version(&arguments) {
        println!(
            "Version: {}\nImplementation: whimbrel {}",
            arguments::CRIU_VERSION,
            env!("CARGO_PKG_VERSION")
        );
        return ExitCode::SUCCESS;
    }
    let command = if as_criu {
        command().infer_long_args(true)
    } else {
        command()
    };
    let parsed = arguments::prepare(arguments, as_criu, &command).map(|arguments| {
        let matches = command.try_get_matches_from(arguments);
        matches.and_then(|matches| <Cli as clap::FromArgMatches>::from_arg_matches(&matches))
    });
    let cli = match parsed {
        Ok(Ok(cli)) => cli,
        Ok(Err(error)) => {
            let _ = error.print();
            // CRIU knows no other status than 0 and 1.
            return if error.use_stderr() {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            };
        }
        Err(error) => {
            eprintln!("Error: {}", error.chain());
            return ExitCode::FAILURE;
        }
    };
    let logging = cli.verb.logging();
    if let Err(error) = log::start(&logging, started) {
        eprintln!("Error: {}", error.chain());
        return ExitCode::FAILURE;
    }
    let context = Context {
        json: cli.json,
        identity: identity::Home::new(cli.identity_dir),
    };
    match cli.verb.run(&context) {
        Ok(code) => code,
        Err(error) => {
            let chain = error.chain();
            tracing::error!("{chain}");
            if let Some(line) = logging.on_failure {
                tracing::error!("{line}");
            }
            // Whoever looks at the terminal must not have to know where the log is.
            if logging.file.is_some() && !as_criu {
                eprintln!("Error: {chain}");
            }
            context.event(&serde_json::json!({"event": "failed", "error": chain}));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_consistent() {
        super::command().debug_assert();
    }

    #[test]
    fn every_verb_has_an_example_in_its_long_help() {
        for verb in super::command().get_subcommands() {
            let help = verb.get_long_about().map(|about| about.to_string()).unwrap_or_default();
            assert!(help.contains("Example"), "{}: {help}", verb.get_name());
        }
    }
}
