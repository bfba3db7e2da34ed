//! `ferry demo`.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::migrate::Display;
use super::output::{say, tell};
use crate::control::MigrationInfo;
use crate::demo::{self, Audience};
use crate::drive::Stage;

/// What to show, and what to leave. Its help stands at [`super::Command::Demo`].
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  ferry demo                    # the built-in guest: seconds
  ferry demo --linux            # Linux 6.1 with ext4; the first time it builds the guest: minutes
  ferry demo --keep             # leaves both consoles, to be read
  ferry demo --export-guest exerciser.elf
  ferry run --kernel exerciser.elf --cmdline help     # what the built-in guest can do")]
pub struct DemoArguments {
    /// Move Linux instead of the built-in guest; installs what its build takes (Debian) and builds it from source.
    #[arg(long)]
    pub linux: bool,
    /// Leave consoles, logs and disks of both processes, and say where.
    #[arg(long)]
    pub keep: bool,
    /// Only write the built-in guest, an ELF file that boots by PVH, to PATH.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["linux", "keep", "json"])]
    pub export_guest: Option<PathBuf>,
    /// Print the report in JSON; times in microseconds.
    #[arg(long)]
    pub json: bool,
}

impl DemoArguments {
    /// Shows it.
    ///
    /// # Errors
    /// Something went wrong; with what both processes wrote last.
    pub fn execute(&self) -> anyhow::Result<()> {
        if let Some(path) = &self.export_guest {
            return std::fs::write(path, demo::IMAGE)
                .with_context(|| format!("cannot write {}", path.display()));
        }
        let mut stage = Stage::open()?;
        let mut watcher = Watcher { display: Display::new() };
        let run = if self.linux { demo::run_linux } else { demo::run_exerciser };
        let result = run(&mut stage, &mut watcher);
        watcher.display.end();
        let report = stage.close(self.keep, result)?;
        if self.json {
            say!("{}", serde_json::to_string(&report)?)?;
        } else {
            say!("\nThe guest moved, and everything that it checked was right:\n\n{report}")?;
        }
        Ok(())
    }
}

/// Tells people on standard error.
struct Watcher {
    display: Display,
}

impl Audience for Watcher {
    fn hear(&mut self, sentence: &str) {
        self.display.end();
        tell!("{sentence}");
    }

    fn see(&mut self, progress: &MigrationInfo) {
        self.display.show(progress);
    }
}
