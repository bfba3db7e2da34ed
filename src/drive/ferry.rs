//! One driven `ferry run`.

use std::ffi::OsString;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::json;

use super::{Exit, Process};
use crate::control::{
    Client, FerryStatus, Finished, MigrateRequest, MigrationInfo, MigrationStatus, RunState,
};

/// How long a process may take until it answers, and to do anything that takes milliseconds on an idle host.
const WATCHDOG: Duration = Duration::from_secs(60);

/// Between two looks at something that no event tells.
const GLANCE: Duration = Duration::from_millis(2);

/// A running `ferry run` with a control connection. It is its [`Process`] too: console, log, end.
#[derive(Debug)]
pub struct Ferry {
    process: Process,
    api: PathBuf,
    /// The connection to its control socket.
    pub control: Client,
    listens_at: Option<String>,
}

impl Ferry {
    /// Starts `program run --name name --api api` with `flags`. Returns when it answers at its control socket.
    ///
    /// # Errors
    /// It cannot be started, or ended before it answered; with its log.
    pub fn start(
        program: &Path,
        name: &str,
        api: &Path,
        flags: impl IntoIterator<Item = OsString>,
    ) -> anyhow::Result<Self> {
        let first = ["run".into(), "--name".into(), name.into(), "--api".into(), api.as_os_str().to_owned()];
        let mut process = Process::spawn(name, program, first.into_iter().chain(flags))?;
        let control = connect(&mut process, api)?;
        Ok(Self { process, api: api.to_owned(), control, listens_at: None })
    }

    /// Another connection to its control socket.
    ///
    /// # Errors
    /// It does not answer.
    pub fn connect(&mut self) -> anyhow::Result<Client> {
        connect(&mut self.process, &self.api)
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&mut self) -> anyhow::Result<FerryStatus> {
        let answer = self.control.query("x-ferry-status");
        answer.map_err(|error| self.process.blame("asked in vain:", &error.into()))
    }

    /// Runs a control command without arguments.
    ///
    /// # Errors
    /// It does not answer, or refuses.
    pub fn command(&mut self, command: &str) -> anyhow::Result<()> {
        let answer = self.control.execute(command, json!({}));
        answer.map_err(|error| self.process.blame("no success with", &error.into()))?;
        Ok(())
    }

    /// Waits until its status is as `select` wants it, and returns what that made of it.
    ///
    /// # Errors
    /// It never was, or the process ended.
    pub fn wait_until<T>(
        &mut self,
        what: &str,
        mut select: impl FnMut(FerryStatus) -> Option<T>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + WATCHDOG;
        while Instant::now() < deadline {
            if let Some(found) = select(self.status()?) {
                return Ok(found);
            }
            self.process.pause(GLANCE)?;
        }
        bail!(self.process.describe(&format!("waited {WATCHDOG:?} in vain for {what} of")))
    }

    /// Waits for a run state.
    ///
    /// # Errors
    /// As [`Self::wait_until`].
    pub fn wait_for_state(&mut self, state: RunState) -> anyhow::Result<()> {
        self.wait_until(&format!("state {state:?}"), |status| (status.status == state).then_some(()))
    }

    pub(super) fn wait_until_it_listens(&mut self) -> anyhow::Result<()> {
        let peer = self.wait_until("readiness", |status| status.migration.map(|migration| migration.peer))?;
        self.listens_at = Some(peer);
        Ok(())
    }

    /// Where it waits, or waited, for its guest, with the port that the system chose.
    ///
    /// # Errors
    /// It was not started to wait for one.
    pub fn listens_at(&self) -> anyhow::Result<&str> {
        self.listens_at.as_deref().with_context(|| format!("{} waits for no guest", self.process.name()))
    }

    /// Migrates its guest to `uri` and returns how that ended, well or not; `progress` sees reports on the way.
    ///
    /// # Errors
    /// It refused to begin, or its process went away.
    pub fn try_migrate(
        &mut self,
        request: &MigrateRequest,
        progress: impl FnMut(&MigrationInfo),
    ) -> anyhow::Result<Finished> {
        let result = self.control.migrate(request, &AtomicBool::new(false), progress);
        result.map_err(|error| self.process.blame("no migration from", &error.into()))
    }

    /// Migrates its guest to `destination` and returns when it is there, with the source's report.
    ///
    /// # Errors
    /// It did not get there; with what both sides say.
    pub fn migrate_to(
        &mut self,
        destination: &mut Self,
        progress: impl FnMut(&MigrationInfo),
    ) -> anyhow::Result<Finished> {
        self.move_to(destination, MigrateRequest::default(), progress)
    }

    /// The same as `request` says, in which the address is the destination's.
    ///
    /// # Errors
    /// As there.
    pub fn migrate_with(
        &mut self,
        request: MigrateRequest,
        destination: &mut Self,
    ) -> anyhow::Result<Finished> {
        self.move_to(destination, request, |_| {})
    }

    /// Hands its guest over to `destination`, with its memory itself; as [`Self::migrate_to`].
    ///
    /// # Errors
    /// As there, or the memory was copied all the same.
    pub fn hand_over_to(&mut self, destination: &mut Self) -> anyhow::Result<Finished> {
        let request = MigrateRequest { local: true, ..MigrateRequest::default() };
        let finished = self.move_to(destination, request, |_| {})?;
        let handed_over = finished.details.as_ref().is_some_and(|details| details.handed_over_bytes > 0);
        ensure!(handed_over, self.process.describe("its memory was copied, not handed over:"));
        Ok(finished)
    }

    fn move_to(
        &mut self,
        destination: &mut Self,
        request: MigrateRequest,
        progress: impl FnMut(&MigrationInfo),
    ) -> anyhow::Result<Finished> {
        let request = MigrateRequest { uri: destination.listens_at()?.to_owned(), ..request };
        let finished = self
            .try_migrate(&request, progress)
            .map_err(|error| destination.blame("the destination was", &error))?;
        ensure!(
            finished.info.status == MigrationStatus::Completed,
            "the guest did not move: {}\n{}\n{}",
            finished.info.error_desc.as_deref().unwrap_or("no reason given"),
            self.process.describe("from"),
            destination.describe("to"),
        );
        Ok(finished)
    }

    /// Ends it by its control socket.
    ///
    /// # Errors
    /// It does not end, or ends badly.
    pub fn quit(mut self) -> anyhow::Result<()> {
        self.command("quit")?;
        let exit = self.process.wait(WATCHDOG)?;
        self.expect_success(exit)
    }

    /// Waits for its end, as its guest or its flags decide.
    ///
    /// # Errors
    /// It does not end, or ends badly.
    pub fn wait_for_end(&mut self) -> anyhow::Result<()> {
        let exit = self.process.wait(WATCHDOG)?;
        self.expect_success(exit)
    }

    fn expect_success(&self, exit: Exit) -> anyhow::Result<()> {
        ensure!(exit.success(), self.process.describe(&format!("{exit} ended")));
        Ok(())
    }
}

impl Deref for Ferry {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Ferry {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// Connects to the control socket of `process`, which may still be on its way there.
fn connect(process: &mut Process, api: &Path) -> anyhow::Result<Client> {
    let deadline = Instant::now() + WATCHDOG;
    loop {
        match Client::connect(api) {
            Ok(client) => return Ok(client),
            Err(error) if Instant::now() > deadline => {
                return Err(process.blame("cannot control", &error.into()));
            }
            Err(_) => process.pause(GLANCE)?,
        }
    }
}
