//! A copy of the guest of a snapshot: its images, and what the lease of the snapshot says.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use block::Base;
use engine::lease::{Lease, Owner, Record};
use engine::{ImageCopy, Taking};
use tempfile::NamedTempFile;

use crate::config::MachineSpec;
use crate::migrate::images::{self, Writable};

/// Files that were made for a clone. Dropped before they are [kept](Self::keep), they are removed: its guest has not run. A process that
/// is killed leaves them, under the names that its flags say.
#[derive(Debug, Default)]
pub struct Made(Vec<PathBuf>);

impl Made {
    /// One more.
    pub fn add(&mut self, path: &Path) {
        self.0.push(path.to_owned());
    }

    /// They are the guest's.
    pub fn keep(&mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = fs::remove_file(path) {
                log::warn!(
                    "{} was made for a clone that does not run, and cannot be removed: {error}",
                    path.display()
                );
            }
        }
    }
}

/// Makes the images of `spec`, of which none is there, from those beside `snapshot`: an overlay where its base is the one there, a copy
/// otherwise. The lease is looked at afterwards: a guest that took the images meanwhile has changed it.
///
/// # Errors
/// An image is there already, or cannot be made; none is left then.
pub fn prepare(spec: &MachineSpec, snapshot: &Path, copy_disks: bool) -> anyhow::Result<(Taking, Made)> {
    let how = if copy_disks { ImageCopy::Bytes } else { ImageCopy::Reflink };
    let wanted = images::writable(spec);
    let mut made = Made::default();
    let mut first = None;
    for image in &wanted {
        let kept = Kept::of(snapshot, image);
        make(&kept, image.path, how)
            .with_context(|| format!("cannot make the image {} of a clone", image.path.display()))?;
        made.add(image.path);
        first.get_or_insert(kept.path);
    }
    let lease = beside(&first.unwrap_or_else(|| snapshot.to_owned()), "ferry-lease");
    Ok((Taking::Clone { images: record(&lease, spec)? }, made))
}

/// The image of a snapshot that one of a clone is made from.
struct Kept<'a> {
    path: PathBuf,
    /// It is the base of an overlay.
    base: Option<&'a Base>,
}

impl<'a> Kept<'a> {
    fn of(snapshot: &Path, image: &Writable<'a>) -> Self {
        let base =
            image.base.map(|base| (beside(snapshot, &format!("{}.{}", image.stem, base.format)), base));
        match base.filter(|(path, base)| is_one_file(path, &base.path)) {
            Some((path, base)) => Self { path, base: Some(base) },
            // An image over another base was over that when the snapshot was taken.
            None => Self { path: beside(snapshot, &image.name()), base: None },
        }
    }
}

fn is_one_file(one: &Path, other: &Path) -> bool {
    let identity = |path| fs::metadata(path).ok().map(|about| (about.dev(), about.ino()));
    identity(one).is_some_and(|one| Some(one) == identity(other))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".");
    name.push(suffix);
    name.into()
}

/// Under its name only when it is whole.
fn make(from: &Kept<'_>, path: &Path, how: ImageCopy) -> anyhow::Result<()> {
    ensure!(fs::symlink_metadata(path).is_err(), "there is something already");
    let draft = NamedTempFile::new_in(engine::folder_of(path))?;
    match from.base {
        Some(base) => block::create_overlay(draft.as_file(), path, base)?,
        None => images::copy(&from.path, draft.as_file(), how)?,
    }
    draft.as_file().sync_all()?;
    draft.persist_noclobber(path)?;
    // The name too, before a guest is told that anything in there is stable.
    Ok(engine::sync_folder_of(path)?)
}

/// What the lease at `path` says, if there is one.
fn record(path: &Path, spec: &MachineSpec) -> anyhow::Result<Option<Record>> {
    if !path.try_exists()? {
        return Ok(None);
    }
    let reader = Owner::this_process(&spec.name).context("cannot name this process")?;
    Ok(Lease::open_existing(path, reader)?.read()?)
}
