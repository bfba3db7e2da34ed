//! Where a program drives a few processes and leaves nothing behind.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use tempfile::TempDir;

use super::{Interruption, Lines, Machine, Process};

/// A temporary folder, this very program to be driven, and an end for everything at Ctrl-C.
#[derive(Debug)]
pub struct Stage {
    folder: TempDir,
    program: PathBuf,
    interruption: Interruption,
    records: Vec<Record>,
}

/// What a process has written, also after its end.
#[derive(Debug)]
struct Record {
    name: String,
    console: Lines,
    log: Lines,
}

impl Stage {
    /// Makes the folder and takes the signals.
    ///
    /// # Errors
    /// One of both cannot be done.
    pub fn open() -> anyhow::Result<Self> {
        let folder =
            tempfile::Builder::new().prefix("ferry-").tempdir().context("cannot make a temporary folder")?;
        let program = std::env::current_exe().context("cannot find this very program")?;
        Ok(Self { folder, program, interruption: Interruption::take()?, records: Vec::new() })
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A machine that runs in processes of this program.
    #[must_use]
    pub fn machine<F: Into<OsString>>(&self, flags: impl IntoIterator<Item = F>) -> Machine {
        let flags = flags.into_iter().map(F::into).collect();
        Machine { program: self.program.clone(), folder: self.folder().to_owned(), flags }
    }

    /// Takes note of a process that has been started: Ctrl-C ends it, and [`Self::close`] can keep what it wrote.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn enter(&mut self, process: &Process) -> anyhow::Result<()> {
        let (console, log) = (process.console.clone(), process.log.clone());
        self.records.push(Record { name: process.name().to_owned(), console, log });
        self.interruption.cover(process)
    }

    /// Removes the folder, or with `keep` leaves it with all consoles and logs in it, and says where it is. Every process
    /// must have ended.
    ///
    /// # Errors
    /// That of `result`; if there was a signal, only that.
    pub fn close<T>(self, keep: bool, result: anyhow::Result<T>) -> anyhow::Result<T> {
        let result = match self.interruption.signal() {
            Some(signal) => Err(anyhow!("ended by signal {signal}")),
            None => result,
        };
        if keep {
            for Record { name, console, log } in &self.records {
                for (kind, lines) in [("console", console), ("log", log)] {
                    let path = self.folder().join(format!("{name}.{kind}"));
                    let text: String = lines.all().iter().flat_map(|line| [line, "\n"]).collect();
                    std::fs::write(&path, text)
                        .with_context(|| format!("cannot write {}", path.display()))?;
                }
            }
            let folder = self.folder.keep();
            let _nobody_reads_it =
                writeln!(std::io::stderr(), "consoles, logs and disks are in {}", folder.display());
        }
        result
    }
}
