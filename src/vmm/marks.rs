//! What is said beside the images of a machine, each for itself: one that went with its guest, or is not all here, is refused in
//! whatever machine, place and order it comes. What all of them are is said by the lease ([`ownership`]).
//!
//! Beside a block device nothing can be said: what lies in /dev is gone with the power. Of one only the lease of its machine tells.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use engine::lease::{Error, Mark, Owner, State, mark_path};

use super::{Despite, ownership};
use crate::config::MachineSpec;
use crate::migrate::images;

/// Where the mark of an image is, unless it is a block device, which has none.
#[must_use]
pub fn place(image: &Path) -> Option<PathBuf> {
    let is_block_device =
        std::fs::metadata(image).is_ok_and(|metadata| metadata.file_type().is_block_device());
    (!is_block_device).then(|| mark_path(image))
}

/// Refuses images of `spec` that their guest has left, unless `despite` gives that up, and those that never came whole. What is only
/// read may be either.
///
/// # Errors
/// There is such an image, or it cannot be told.
pub fn check(spec: &MachineSpec, despite: Despite) -> anyhow::Result<()> {
    images::writable(spec).iter().try_for_each(|image| check_image(spec, image.path, despite).map(drop))
}

/// As [`check`], by who holds the images: what is said beside them and does not hold is said no more.
///
/// # Errors
/// As [`check`], or it cannot be removed.
pub fn settle(spec: &MachineSpec, despite: Despite) -> anyhow::Result<()> {
    for image in images::writable(spec) {
        if let Some(Found { path, mark, holds: false }) = check_image(spec, image.path, despite)? {
            mark.remove(&path)?;
        }
    }
    Ok(())
}

/// The images of `spec` are those of a guest that was started from them: whatever is still said beside them was given up for that.
pub fn forget(spec: &MachineSpec) {
    for path in images::writable(spec).iter().filter_map(|image| place(image.path)) {
        let removed = Mark::read(&path).and_then(|mark| mark.map_or(Ok(()), |mark| mark.remove(&path)));
        if let Err(error) = removed {
            log::error!("the image beside it will be refused the next time: {:#}", anyhow::Error::new(error));
        }
    }
}

/// The guest of `spec` is here still, whatever the process `me` has said beside its images of their way out. What others say stays.
///
/// # Errors
/// It may still be said.
pub fn take_back(spec: &MachineSpec, me: &Owner) -> Result<(), Error> {
    for path in images::writable(spec).iter().filter_map(|image| place(image.path)) {
        match Mark::read(&path) {
            Ok(Some(mark))
                if mark.record.owner.id == me.id && matches!(mark.record.state, State::Moved { .. }) =>
            {
                mark.remove(&path)?;
            }
            Ok(_) => {}
            // It is none of ours, which are whole: its guest is not stopped for it.
            Err(error) => log::warn!("{:#}", anyhow::Error::new(error)),
        }
    }
    Ok(())
}

/// A mark of an image that is not refused.
pub struct Found {
    path: PathBuf,
    mark: Mark,
    holds: bool,
}

/// As [`check`], for one image that is to be part of `spec`.
///
/// # Errors
/// As [`check`].
pub fn check_image(spec: &MachineSpec, image: &Path, despite: Despite) -> anyhow::Result<Option<Found>> {
    let Some(path) = place(image) else { return Ok(None) };
    let Some(mark) = Mark::read(&path)? else { return Ok(None) };
    let holds = mark.holds(ownership::owner(spec)?);
    let help = match &mark.record.state {
        _ if !holds => return Ok(Some(Found { path, mark, holds })),
        State::Moved { .. } if despite.force_stale => return Ok(Some(Found { path, mark, holds })),
        State::Moved { peer, .. } => format!(
            "the guest of this image has gone to {peer} with all it had: run it there. Only if it never arrived, and what is there \
             still says incoming, run what is here with --force-stale"
        ),
        _ => "this image never came whole: let its guest come again with --overwrite, or remove the image and its mark (what it was to \
              replace may stand beside as PATH.given-up)"
            .to_owned(),
    };
    let image = image.to_owned();
    Err(anyhow::Error::new(Error::Marked { image, path, mark: Box::new(mark) }).context(help))
}
