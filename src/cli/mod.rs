//! The command line: what can be typed, and which part of ferry answers.

mod run;

use clap::{Parser, Subcommand};

pub use run::RunArguments;

/// ferry: a minimal KVM virtual machine monitor whose NVMe disks migrate.
#[derive(Debug, Parser)]
#[command(version, about, propagate_version = true)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine, or wait for one to arrive.
    Run(Box<RunArguments>),
}

impl Command {
    /// Does it.
    ///
    /// # Errors
    /// Everything that the user must know, as a chain from what was tried to why it failed.
    pub fn execute(self) -> anyhow::Result<()> {
        match self {
            Self::Run(arguments) => arguments.execute(),
        }
    }
}
