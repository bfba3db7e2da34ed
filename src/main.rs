//! The `ferry` command: parse, run, print the error chain, exit code.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use ferry::cli::Arguments;

fn main() -> ExitCode {
    ferry::startup::begin();
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("FERRY_LOG", "warn")).init();
    match Arguments::parse().command.execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _nobody_reads_it = writeln!(std::io::stderr(), "ferry: {error:#}");
            ExitCode::FAILURE
        }
    }
}
