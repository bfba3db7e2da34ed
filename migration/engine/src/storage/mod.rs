//! Images that go with their guest, because the other side has none of its own to see them on.
//!
//! ```text
//! source                                             destination
//!   hello: storage.NAME.length_bytes, .format ------>  compares; its record says `incoming`; makes the images, all holes, and a
//!   a mark beside each image names its record          mark beside each, which says the same and names the record
//!   first round: what is no hole, block by block --->  places, and looks at the digest of each run
//!   each round: blocks that the guest changed ------>
//!   stop, last blocks ------------------------------>
//!   PREPARE(digest of memory, devices and blocks) -->  every block came; makes the images stable
//!                            <-----------------------  PREPARED
//!   its record says `moved` (one write), COMMIT ---->  its record says `taken` (one write), starts
//!                            <-----------------------  RUNNING; the marks go
//!   the marks say `moved` by themselves
//! ```
//! What moves is what the guest sees, whatever format holds it: an image of qcow2 arrives as a new image of qcow2, without the
//! clusters that were given up, and nothing of its tables goes over the link or is believed there. Both ends have the same formats.
//!
//! - `wire`: the bytes of a run of blocks, what of them is refused, and the table of digests: one for each [`CHUNK_BYTES`], of
//!   all that was said about the chunk in the order in which it was said. Both ends keep it, PREPARE compares.
//! - `outgoing`, `incoming`: the two ends; [`replay`]: the second without the first.
//! - [`crate::lease`] `moved`: what the records beside the images say, so that no guest starts from images that are not all here, or
//!   that it has left; `mark`: what is said beside each image, so that none does in whatever machine it is put into.
//!
//! Invariants: *first the bitmap is taken, then blocks are read*; whoever writes sets its bit after the image has changed and before
//! the guest hears of it, so a block that was read too early is in the next bitmap. All images that the guest may write go, or none;
//! those that it only reads are the destination's to have. Nothing is written to an image outside of the length that the hello said,
//! and no record of it is longer than [`IMAGES_BYTES_MAX`] allows. An attempt that fails leaves no image that was not there before.
//!
//! Absent: a common lease that decides by itself about images that are not common (who is cut off in the middle of the hand-over needs an
//! operator); data channels, whose connections are memory's; together with memory that is passed, or that follows its guest.

mod incoming;
mod outgoing;
pub mod replay;
mod wire;

use std::ops::Range;

use crate::lease::{Id, NotTaken};
use crate::{Description, MachineResult, PageBitmap};

pub(crate) use incoming::Arriving;
pub(crate) use outgoing::Leaving;
pub(crate) use wire::BLOCKS_BYTES_MAX;

/// The unit of what is known to have changed, and of what is a hole.
pub const BLOCK_BYTES: u64 = 64 << 10;
/// The unit of digests.
pub const CHUNK_BYTES: u64 = 1 << 20;
/// Of all images of a machine: what is remembered of each block and chunk has 12 bytes a MiB.
pub const IMAGES_BYTES_MAX: u64 = 16 << 40;

/// An image that goes with its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The same at both ends; for example `disk0-1`.
    pub name: String,
    /// What the guest can reach of it.
    pub length_bytes: u64,
    /// `raw`, `qcow2`.
    pub format: String,
}

impl Disk {
    /// How many blocks it has; the last may be shorter.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.length_bytes.div_ceil(BLOCK_BYTES)
    }
}

/// The images of a machine that leaves. Dropping this ends what was begun with it.
pub trait OutgoingDisks: Send {
    /// Which, by name: the other side has them in this order too.
    fn disks(&self) -> Vec<Disk>;

    /// From here on every change of an image is seen. What was changed before does not count.
    ///
    /// # Errors
    /// There is no memory for it.
    fn start_tracking(&mut self) -> MachineResult<()>;

    /// Where the image is no hole. Called once for each, tracked.
    ///
    /// # Errors
    /// The file system does not tell.
    fn populated(&mut self, disk: usize) -> MachineResult<Vec<Range<u64>>>;

    /// Takes the blocks that were changed since the last call, for each image. What was changed before it reads as it is by now.
    ///
    /// # Errors
    /// It is not tracked.
    fn collect_dirty(&mut self) -> MachineResult<Vec<PageBitmap>>;

    /// Reads a part of the image, as the guest would.
    ///
    /// # Errors
    /// The image cannot be read there.
    fn read(&mut self, disk: usize, offset_bytes: u64, into: &mut [u8]) -> MachineResult<()>;

    /// Says beside each image, on stable storage, that it will have moved to `peer` when [`mark_moved`](Self::mark_moved) says so. The guest
    /// runs meanwhile, so that there is nothing to be done for each of them when it stands still. Dropping this makes it so, or takes it
    /// back, as was said last.
    ///
    /// # Errors
    /// It cannot be said of all.
    fn prepare_to_leave(&mut self, session: &Id, peer: &str) -> MachineResult<()>;

    /// Says at one place for all images, on stable storage, that they have moved to `peer`: nobody runs their guest here. Called stopped,
    /// with all of them made stable, before the first byte of COMMIT.
    ///
    /// # Errors
    /// It may say so all the same.
    fn mark_moved(&mut self, session: &Id, peer: &str) -> MachineResult<()>;

    /// Takes that back, on stable storage. Harmless if it was never said.
    ///
    /// # Errors
    /// It may still say so.
    fn take_back(&mut self, session: &Id) -> MachineResult<()>;
}

/// The images of a machine that arrives. Dropping this leaves them as they were found, or, where something was given up for them, as
/// images that nobody runs; once they are [owned](Self::own) it only ends what was said beside each of them until then.
pub trait IncomingDisks: Send {
    /// Whether all of it reads as zeroes that nobody has written yet.
    fn is_blank(&self, disk: usize) -> bool;

    /// The machine and the guest fit, and the first of what comes is here: whatever is in the places of the images is given up now, and not
    /// before.
    ///
    /// # Errors
    /// It cannot be.
    fn begin(&mut self) -> MachineResult<()>;

    /// Writes a part of the image, which is inside of what the [`Disk`] says.
    ///
    /// # Errors
    /// It is full, or broken.
    fn write(&mut self, disk: usize, offset_bytes: u64, contents: &[u8]) -> MachineResult<()>;

    /// Makes a part of the image read as zeroes, by a hole where there can be one.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn write_zeroes(&mut self, disk: usize, range: Range<u64>) -> MachineResult<()>;

    /// Makes all that was written stable; costs little if nothing was.
    ///
    /// # Errors
    /// It is not known to be.
    fn sync(&mut self) -> MachineResult<()>;

    /// Says beside the images, on stable storage, that they are the guest's, which is ours; `open` takes what else it needs before.
    /// What is [not known](NotTaken::Unknown) becomes known by calling it again.
    ///
    /// # Errors
    /// `open` failed, or it cannot be said.
    fn own(&mut self, session: &Id, open: &mut dyn FnMut() -> Result<(), String>) -> Result<(), NotTaken>;

    /// Takes that back, if it was said: the guest never ran here and never will.
    ///
    /// # Errors
    /// It may still be said.
    fn disown(&mut self, session: &Id) -> MachineResult<()>;
}

const PREFIX: &str = "storage.";
const LENGTH: &str = ".length_bytes";
const FORMAT: &str = ".format";

/// Adds what goes to what the other side reads of this machine.
pub(crate) fn describe(disks: &[Disk], description: &mut Description) {
    for Disk { name, length_bytes, format } in disks {
        description.set(format!("{PREFIX}{name}{LENGTH}"), length_bytes);
        description.set(format!("{PREFIX}{name}{FORMAT}"), format);
    }
}

/// Takes out of a description what comes.
pub(crate) fn described(description: &mut Description) -> Result<Vec<Disk>, String> {
    let names: Vec<String> = description
        .iter()
        .filter_map(|(name, _)| name.strip_prefix(PREFIX)?.strip_suffix(LENGTH))
        .map(str::to_owned)
        .collect();
    let mut disks: Vec<Disk> = Vec::with_capacity(names.len());
    let mut left_bytes = IMAGES_BYTES_MAX;
    for name in names {
        let length = description.remove(&format!("{PREFIX}{name}{LENGTH}")).unwrap_or_default();
        let format = description.remove(&format!("{PREFIX}{name}{FORMAT}")).unwrap_or_default();
        let length_bytes = length.parse().ok().filter(|length| *length > 0);
        let length_bytes: u64 =
            length_bytes.ok_or_else(|| format!("image {name} of {length:?} bytes cannot be"))?;
        left_bytes = left_bytes.checked_sub(length_bytes).ok_or_else(|| {
            format!("images of more than {IMAGES_BYTES_MAX} bytes are not received, with {name}")
        })?;
        disks.push(Disk { name, length_bytes, format });
    }
    disks.sort_by(|one, other| one.name.cmp(&other.name));
    // As numbers on the link name them.
    if disks.is_empty() || disks.len() > usize::from(u16::MAX) {
        return Err(format!("{} images are said to come", disks.len()));
    }
    Ok(disks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: &str, length_bytes: u64) -> Disk {
        Disk { name: name.to_owned(), length_bytes, format: "raw".to_owned() }
    }

    #[test]
    fn what_is_described_is_read_and_gone() {
        let disks = vec![disk("a-1", 512), disk("a-1-2", 9), disk("a.b-1", 512), disk("c-70", 5 << 30)];
        let mut description = Description::new();
        description.set("cpus", 2);
        describe(&disks, &mut description);
        assert_eq!(described(&mut description).unwrap(), disks);
        assert_eq!(description.iter().collect::<Vec<_>>(), [("cpus", "2")]);
        assert!(described(&mut description).unwrap_err().contains("0 images"));
    }

    #[test]
    fn images_that_cannot_be_are_refused_before_anything_is_kept_for_them() {
        for (length, reason) in [
            ("0", "cannot be"),
            ("-1", "cannot be"),
            ("much", "cannot be"),
            ("18446744073709551616", "cannot be"),
            ("17592186044417", "more than 17592186044416 bytes"),
        ] {
            let mut description = Description::new();
            description.set("storage.a.length_bytes", length);
            let error = described(&mut description).unwrap_err();
            assert!(error.contains(reason), "{length}: {error}");
        }
        let mut description = Description::new();
        describe(&[disk("a", IMAGES_BYTES_MAX), disk("b", 1)], &mut description);
        assert!(described(&mut description).unwrap_err().contains("with b"));
    }
}
