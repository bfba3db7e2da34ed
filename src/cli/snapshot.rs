//! `ferry snapshot`: keeps what a guest is in a file, and lets it go on.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, bail};
use clap::Args;
use engine::{ImageCopy, SnapshotOptions};

use super::migrate::Display;
use super::output::say;
use crate::control::{Client, MigrationStatus};

/// Which machine, and where to. Its help stands at [`super::Command::Snapshot`].
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  ferry snapshot --api vm.sock /snapshots/monday.ferry
  # The guest as it was then, once, on the copy of its disk:
  ferry run --memory 512M --nvme path=/snapshots/monday.ferry.disk0-1.raw,serial=disk0 \\
      --incoming file:/snapshots/monday.ferry

  # All of its memory on Monday, then only what it has written since the day before:
  ferry snapshot --api vm.sock --track /snapshots/monday.ferry
  ferry snapshot --api vm.sock --track --parent /snapshots/monday.ferry /snapshots/tuesday.ferry
  ferry snapshot --api vm.sock --parent /snapshots/tuesday.ferry /snapshots/wednesday.ferry")]
pub struct SnapshotArguments {
    /// Control socket of the machine (its --api).
    #[arg(long, value_name = "PATH")]
    pub api: PathBuf,
    /// Copy the images byte by byte where the file system cannot share their blocks. The guest stands still for as long as that takes.
    #[arg(long)]
    pub copy_disks: bool,
    /// Write only the memory that the guest has written since this snapshot, which was taken with --track, is in the same folder, and has
    /// to stay there as it is: a restore needs both. Refused if the guest's writes are not known since then. Images are copied whole.
    #[arg(long, value_name = "SNAPSHOT")]
    pub parent: Option<PathBuf>,
    /// Note what the guest writes from now on, so that this snapshot can be the --parent of the next one. Costs the guest a fault at the
    /// first write to each page, and huge pages, until a snapshot with --parent but without --track is taken, a migration begins, or the
    /// guest is reset.
    #[arg(long)]
    pub track: bool,
    /// Print the report in JSON.
    #[arg(long)]
    pub json: bool,
    /// The new file. The copies of images lie beside it: PATH.SERIAL-NSID.raw or .qcow2.
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
}

impl SnapshotArguments {
    /// Takes the snapshot.
    ///
    /// # Errors
    /// No machine answers, or it refused, or there is no snapshot; the reason is the machine's.
    pub fn execute(&self) -> anyhow::Result<()> {
        // The machine may have another working directory.
        let path = std::path::absolute(&self.path).with_context(|| format!("{}", self.path.display()))?;
        let parent = self.parent.as_ref().map(std::path::absolute).transpose()?;
        let images = if self.copy_disks { ImageCopy::Bytes } else { ImageCopy::Reflink };
        let options = SnapshotOptions { images, parent, track: self.track };
        let mut client = Client::connect(&self.api)?;
        let mut display = Display::new();
        let taken = client.snapshot(&path, &options, &AtomicBool::new(false), |info| display.show(info));
        display.end();
        let finished = taken.with_context(|| format!("the snapshot {}", path.display()))?;
        // What became of it is said in any case.
        let written = if self.json { say!("{}", serde_json::to_string(&finished)?) } else { Ok(()) };
        let reason = finished.info.error_desc.as_deref().unwrap_or("no reason given");
        match finished.info.status {
            MigrationStatus::Completed if self.json => written,
            MigrationStatus::Completed => {
                let stood = finished.details.and_then(|details| details.downtime);
                let stood = stood.map(|downtime| {
                    format!(" (the guest stood still for {:.1} ms)", downtime.total as f64 / 1e3)
                });
                say!("{}{}", path.display(), stood.unwrap_or_default())?;
                Ok(())
            }
            MigrationStatus::Cancelled => bail!("the snapshot {} was cancelled", path.display()),
            _ => bail!("there is no snapshot {}: {reason}", path.display()),
        }
    }
}
