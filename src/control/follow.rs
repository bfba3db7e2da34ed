//! A migration from a client's side: begin it, watch it, know how it ended.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use engine::{ImageCopy, SnapshotOptions};
use serde::Deserialize;
use serde_json::json;

use super::{
    Client, Error, FerryMigration, FerryOwnership, FerryStatus, Limits, MigrationInfo, MigrationStatus,
};

/// How often progress is asked for; changes of status are seen at once.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// What to migrate where.
#[derive(Clone, Debug, Default)]
pub struct MigrateRequest {
    /// The destination.
    pub uri: String,
    /// Limits to change before.
    pub limits: Limits,
    /// The folder with the machine's credentials, as it is seen by its process.
    pub tls_dir: Option<PathBuf>,
    /// Whether the link may lead to another host without TLS.
    pub insecure: bool,
    /// A process of the same host is to get the memory itself, instead of its contents.
    pub local: bool,
    /// When memory may follow after the guest, as `migrate` has it; what the machine's capability says, if nothing is said.
    pub postcopy: Option<String>,
    /// Whether the images that the guest may write go along.
    pub storage: bool,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Finished {
    /// QEMU's report; [`MigrationStatus::is_final`] holds of its status, unless [`Client::recover`] or [`Client::decide`] says otherwise.
    #[serde(flatten)]
    pub info: MigrationInfo,
    /// This project's, with rounds and the parts of the downtime.
    #[serde(rename = "x-ferry", skip_serializing_if = "Option::is_none")]
    pub details: Option<FerryMigration>,
}

impl Client {
    /// Migrates and returns when it is over, however it ended; `progress` sees each report on the way.
    ///
    /// Once `cancel` is set the machine is asked, once, to give up; a migration past COMMIT ends as it ends.
    ///
    /// # Errors
    /// The machine refused to begin, or its process went away before the migration ended.
    pub fn migrate(
        &mut self,
        request: &MigrateRequest,
        cancel: &AtomicBool,
        progress: impl FnMut(&MigrationInfo),
    ) -> Result<Finished, Error> {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.execute("migrate-set-capabilities", events)?;
        self.begin_migration(request)?;
        self.follow_unless_cancelled(cancel, progress)
    }

    /// Begins to migrate, which goes on without this client.
    ///
    /// # Errors
    /// The machine refused to begin.
    pub fn begin_migration(&mut self, request: &MigrateRequest) -> Result<(), Error> {
        self.set_limits(&request.limits)?;
        let mut target = serde_json::Map::from_iter([("uri".to_owned(), json!(request.uri))]);
        target.extend(request.tls_dir.as_ref().map(|folder| ("x-ferry-tls-dir".to_owned(), json!(folder))));
        target.extend(request.insecure.then(|| ("x-ferry-insecure".to_owned(), json!(true))));
        target.extend(request.local.then(|| ("x-ferry-local".to_owned(), json!(true))));
        target.extend(request.postcopy.as_ref().map(|start| ("x-ferry-postcopy".to_owned(), json!(start))));
        target.extend(request.storage.then(|| ("x-ferry-with-storage".to_owned(), json!(true))));
        self.execute("migrate", target.into()).map(drop)
    }

    /// Takes a snapshot into the file `path`, and returns when it is there or is not; `progress` sees each report on the way.
    ///
    /// # Errors
    /// As [`Self::migrate`].
    pub fn snapshot(
        &mut self,
        path: &Path,
        options: &SnapshotOptions,
        cancel: &AtomicBool,
        progress: impl FnMut(&MigrationInfo),
    ) -> Result<Finished, Error> {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.execute("migrate-set-capabilities", events)?;
        let copy_disks = options.images == ImageCopy::Bytes;
        let mut arguments = json!({ "path": path, "copy-disks": copy_disks, "track": options.track });
        if let Some(parent) = &options.parent {
            arguments["parent"] = json!(parent);
        }
        self.execute("x-ferry-snapshot", arguments)?;
        self.follow_unless_cancelled(cancel, progress)
    }

    /// Looks until it is over, and asks once for the end when that is wished.
    fn follow_unless_cancelled(
        &mut self,
        cancel: &AtomicBool,
        mut progress: impl FnMut(&MigrationInfo),
    ) -> Result<Finished, Error> {
        let mut asked_to_cancel = false;
        self.follow(MigrationStatus::is_final, |client, seen| {
            progress(seen);
            if cancel.load(Ordering::Relaxed) && !asked_to_cancel && !seen.status.is_final() {
                client.execute("migrate_cancel", json!({}))?;
                asked_to_cancel = true;
            }
            Ok(())
        })
    }

    /// Replaces the links that a guest whose memory follows has lost, and returns when it has all of it, or the new ones are lost too or
    /// never came about ([`MigrationStatus::PostcopyPaused`], whose reason is in the details); at a destination, when that listens.
    ///
    /// # Errors
    /// The machine refused, or its process went away before.
    pub fn recover(
        &mut self,
        uri: Option<&str>,
        mut progress: impl FnMut(&MigrationInfo),
    ) -> Result<Option<Finished>, Error> {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.execute("migrate-set-capabilities", events)?;
        let status: FerryStatus = self.query("x-ferry-status")?;
        self.execute("migrate-recover", uri.map_or_else(|| json!({}), |uri| json!({ "uri": uri })))?;
        match status.ownership {
            FerryOwnership::GivenAway => {
                let is_over =
                    |status: MigrationStatus| status.is_final() || status == MigrationStatus::PostcopyPaused;
                let look = |_: &mut Self, seen: &MigrationInfo| {
                    progress(seen);
                    Ok(())
                };
                self.follow(is_over, look).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Has a migration end as `command` says, and returns when it has ended: so, or otherwise if that was too late or the destination of
    /// an undecided hand-over answered after all. It is decided too once the guest runs at the destination, whose memory then follows
    /// ([`MigrationStatus::is_postcopy`]) for as long as that takes.
    ///
    /// # Errors
    /// The machine refused, or its process went away before.
    pub fn decide(&mut self, command: &str) -> Result<Finished, Error> {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.execute("migrate-set-capabilities", events)?;
        self.execute(command, json!({}))?;
        self.follow(|status| status.is_final() || status.is_postcopy(), |_, _| Ok(()))
    }

    /// Looks at a migration until its status `is_over`; `look` sees each report on the way.
    fn follow(
        &mut self,
        is_over: impl Fn(MigrationStatus) -> bool,
        mut look: impl FnMut(&mut Self, &MigrationInfo) -> Result<(), Error>,
    ) -> Result<Finished, Error> {
        let mut seen = MigrationInfo::new(MigrationStatus::Setup);
        loop {
            match self.query("query-migrate") {
                Ok(info) => seen = info,
                // With --exit-when-migrated the process may be gone before it is asked.
                Err(Error::Closed { .. } | Error::Lost { .. })
                    if seen.status == MigrationStatus::Completed =>
                {
                    return Ok(Finished { info: seen, details: None });
                }
                Err(error) => return Err(error),
            }
            look(self, &seen)?;
            if is_over(seen.status) {
                let details =
                    self.query("x-ferry-status").ok().and_then(|status: FerryStatus| status.migration);
                return Ok(Finished { info: seen, details });
            }
            if let Some(event) = self.event(PROGRESS_INTERVAL)?
                && event["event"] == "MIGRATION"
                && let Ok(status) = MigrationStatus::deserialize(&event["data"]["status"])
            {
                seen.status = status;
            }
        }
    }
}
