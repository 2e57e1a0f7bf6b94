//! The whimbrel binary: parse, set up logging, dispatch, print the error chain once.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main(std::env::args_os().collect(), std::time::Instant::now())
}
