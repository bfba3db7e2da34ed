//! A copy of the guest of a snapshot: its images, and what the lease of the snapshot says.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use engine::lease::{Lease, Owner, Record};
use engine::{Image, ImageCopy, Taking};
use tempfile::NamedTempFile;

use crate::config::MachineSpec;
use crate::migrate::images;

/// Makes the images of `spec`, of which none is there, from those beside `snapshot`. The lease is looked at afterwards: a guest that took the
/// images meanwhile has changed it.
///
/// # Errors
/// An image is there already, or cannot be made; none is left then.
pub fn prepare(spec: &MachineSpec, snapshot: &Path, copy_disks: bool) -> anyhow::Result<Taking> {
    let how = if copy_disks { ImageCopy::Bytes } else { ImageCopy::Reflink };
    let wanted = images::writable(spec);
    let mut made: Vec<&Path> = Vec::new();
    for Image { name, path } in &wanted {
        if let Err(error) = make(&beside(snapshot, name), path, how) {
            for path in made {
                // It was ours a moment ago.
                let _ = fs::remove_file(path);
            }
            return Err(error.context(format!("cannot make the image {} of a clone", path.display())));
        }
        made.push(path);
    }
    let lease = match wanted.first() {
        Some(image) => beside(&beside(snapshot, &image.name), "ferry-lease"),
        None => beside(snapshot, "ferry-lease"),
    };
    Ok(Taking::Clone { images: record(&lease, spec)? })
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".");
    name.push(suffix);
    name.into()
}

/// Under its name only when it is whole.
fn make(from: &Path, path: &Path, how: ImageCopy) -> anyhow::Result<()> {
    ensure!(fs::symlink_metadata(path).is_err(), "there is something already");
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let draft = NamedTempFile::new_in(folder)?;
    images::copy(from, draft.as_file(), how)?;
    draft.as_file().sync_all()?;
    draft.persist_noclobber(path)?;
    // The name too, before a guest is told that anything in there is stable.
    fs::File::open(folder)?.sync_all()?;
    Ok(())
}

/// What the lease at `path` says, if there is one.
fn record(path: &Path, spec: &MachineSpec) -> anyhow::Result<Option<Record>> {
    if !path.try_exists()? {
        return Ok(None);
    }
    let reader = Owner::this_process(&spec.name).context("cannot name this process")?;
    Ok(Lease::open_existing(path, reader)?.read()?)
}
