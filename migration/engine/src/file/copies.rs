//! The copies of images that belong to a snapshot, and how all of it appears under its names.
//!
//! None of the files has a name before all of them are whole and stable. No system call gives several files their names at once: a
//! process that is killed between two of these calls leaves copies without a snapshot, which the next attempt of that name says.

use std::fs;
use std::path::{Path, PathBuf};

use super::draft::{Draft, Published};
use crate::lease::{Kept, Lease};
use crate::machine::{Image, ImageCopy};
use crate::{Description, Error, SourceMachine};

/// What the lease beside the first image is called; after the file, if there is no image.
const LEASE_SUFFIX: &str = ".ferry-lease";

/// An image, and the file that becomes its copy.
pub(super) struct Copy {
    pub image: Image,
    pub path: PathBuf,
    pub draft: Draft,
}

/// Makes the files of the copies, and tries one of them the way it will be done in the stop.
pub(super) fn prepare(
    machine: &mut dyn SourceMachine,
    path: &Path,
    how: ImageCopy,
) -> Result<Vec<Copy>, Error> {
    let images = machine.images().map_err(Error::machine("copy the images"))?;
    let mut copies = Vec::with_capacity(images.len());
    for image in images {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}", image.name));
        let path = path.with_file_name(name);
        if fs::symlink_metadata(&path).is_ok() {
            let reason = "it is there, though the snapshot is not: a process may have been killed while it named the files of one";
            let path = path.display().to_string();
            return Err(Error::File { doing: "write over", path, source: reason.into() });
        }
        if how == ImageCopy::Reflink {
            let trial = Draft::create(&path)?;
            machine.copy_image(&image, &trial.file, how).map_err(Error::machine("copy an image"))?;
        }
        let draft = Draft::create(&path)?;
        copies.push(Copy { image, path, draft });
    }
    Ok(copies)
}

/// What is beside the file, for whoever looks into it.
pub(super) fn describe(copies: &[Copy], how: ImageCopy) -> Description {
    let mut description = Description::new();
    for Copy { image, path, .. } in copies {
        description.set(format!("{}.image", image.name), image.path.display());
        description.set(format!("{}.copy", image.name), path.display());
        description.set(format!("{}.how", image.name), how);
        if let Some(base) = &image.base {
            description.set(format!("{}.base", image.name), base.display());
        }
    }
    description
}

/// Gives the files their names, the one that says that there is a snapshot last. Takes them away again if one cannot have its own.
pub(super) fn publish(
    draft: Draft,
    copies: Vec<Copy>,
    digest: u64,
    lease: Option<(&Lease, Kept)>,
) -> Result<(), Error> {
    let beside = copies.first().map_or(draft.path(), |copy| copy.path.as_path()).to_owned();
    let mut published: Vec<Published> = Vec::new();
    let named = || {
        for copy in copies {
            published.push(copy.draft.publish(0)?);
        }
        if let Some((lease, kept)) = &lease {
            let mut path = beside.into_os_string();
            path.push(LEASE_SUFFIX);
            let path = PathBuf::from(path);
            let draft = Draft::create(&path)?;
            lease.write_copy(&draft.file, kept, digest).map_err(draft.failed("write"))?;
            published.push(draft.publish(0)?);
        }
        draft.publish(digest).map(drop)
    };
    let result = named();
    if result.is_err() {
        published.into_iter().for_each(Published::remove);
    }
    result
}
