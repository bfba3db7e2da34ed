//! Firmware slots and images (Base 3.11).
//!
//! The firmware of this controller is the program that models it, and no guest replaces that. An image brings its name: after its
//! activation the controller reports the revision that the image says. Images are what this table says; what follows the length is
//! ignored, so that an image can be padded to the granularity of Firmware Image Download.
//!
//! | bytes | content |
//! | --- | --- |
//! | 7:0 | `FERRYFW1` |
//! | 15:8 | firmware revision: printable ASCII, padded with spaces |
//! | 19:16 | length of the image in bytes, this header included, little-endian |
//! | 23:20 | CRC-32 (ISO-HDLC) of bytes 19:0 and of those from 24 to the length, little-endian |
//! | 24: | anything |

use nvme_spec::{Status, opcode};

use crate::config::padded;

/// What an image begins with.
const SIGNATURE: [u8; 8] = *b"FERRYFW1";
const HEADER_BYTES: usize = 24;
/// Slots (Identify Controller FRMW bits 3:1). The first one is read-only.
pub(crate) const SLOTS: usize = 7;
/// Firmware Update Granularity (Identify Controller FWUG), in bytes.
pub(crate) const GRANULARITY_BYTES: usize = 4096;
/// The largest image that is taken.
pub(crate) const MAX_IMAGE_BYTES: usize = 4 << 20;
/// Granules of the largest image.
pub(crate) const MAX_GRANULES: usize = MAX_IMAGE_BYTES / GRANULARITY_BYTES;
/// Firmware revision of slot 1.
const FACTORY_REVISION: &str = env!("CARGO_PKG_VERSION");

pub(crate) type Revision = [u8; 8];

/// Whether `revision` is text as Identify Controller FR has it.
pub(crate) fn is_revision(revision: &Revision) -> bool {
    revision[0] != b' ' && revision.iter().all(|byte| (0x20..0x7f).contains(byte))
}

/// The image that is being downloaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Staging {
    /// Up to the last granule that has come; those that have not are zeroes.
    pub bytes: Vec<u8>,
    /// By granule: it has come.
    pub granules: Vec<bool>,
}

impl Staging {
    /// Takes a part of the image (Base 5.12).
    pub fn put(&mut self, offset_bytes: u64, data: &[u8]) -> Result<(), Status> {
        let invalid = Status::INVALID_FIELD.do_not_retry();
        let start = usize::try_from(offset_bytes).map_err(|_| invalid)?;
        let end = start.checked_add(data.len()).filter(|&end| end <= MAX_IMAGE_BYTES).ok_or(invalid)?;
        if !start.is_multiple_of(GRANULARITY_BYTES) || !end.is_multiple_of(GRANULARITY_BYTES) {
            return Err(invalid);
        }
        let (first, last) = (start / GRANULARITY_BYTES, end / GRANULARITY_BYTES);
        // "The firmware image has overlapping ranges": what came first stays.
        if self.granules.iter().take(last).skip(first).any(|&come| come) {
            return Err(Status::OVERLAPPING_RANGE.do_not_retry());
        }
        if self.granules.len() < last {
            self.granules.resize(last, false);
            self.bytes.resize(end, 0);
        }
        self.granules[first..last].fill(true);
        self.bytes[start..end].copy_from_slice(data);
        Ok(())
    }

    /// The revision of the image, if all of it has come and it is one.
    fn revision(&self) -> Option<Revision> {
        let header = self.bytes.first_chunk::<HEADER_BYTES>()?;
        let revision = *header[8..].first_chunk()?;
        let length = u32::from_le_bytes(*header[16..].first_chunk()?) as usize;
        let crc = u32::from_le_bytes(*header[20..].first_chunk()?);
        let rest = self.bytes.get(HEADER_BYTES..length)?;
        let complete = self.granules.iter().take(length.div_ceil(GRANULARITY_BYTES)).all(|&come| come);
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&header[..20]);
        hasher.update(rest);
        let sound = header.starts_with(&SIGNATURE) && is_revision(&revision) && hasher.finalize() == crc;
        (complete && sound).then_some(revision)
    }
}

/// The slots, and what runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Firmware {
    /// Revisions by slot less one.
    pub revisions: [Option<Revision>; SLOTS],
    /// The slot that the running firmware came from.
    pub active: u8,
    /// The slot that is activated at the next reset, or 0.
    pub next: u8,
    /// The revision that runs. That in the active slot can be another one by now.
    pub running: Revision,
}

impl Firmware {
    /// As it leaves the factory.
    pub fn new() -> Self {
        let factory = padded(FACTORY_REVISION);
        let mut revisions = [None; SLOTS];
        revisions[0] = Some(factory);
        Self { revisions, active: 1, next: 0, running: factory }
    }

    /// The revision in `slot`.
    pub fn in_slot(&self, slot: u8) -> Option<Revision> {
        self.revisions.get(usize::from(slot).checked_sub(1)?).copied().flatten()
    }

    /// Firmware Commit (Base 5.11). Whatever comes of it, what was downloaded is used up. `true`: other firmware runs from now on.
    pub fn commit(&mut self, staging: &mut Staging, slot: u8, action: u8) -> Result<bool, Status> {
        let image = (action != opcode::COMMIT_ACTIVATE).then(|| std::mem::take(staging));
        let slot = if slot == 0 { self.choose(action) } else { slot };
        let replaces = match action {
            opcode::COMMIT_REPLACE | opcode::COMMIT_REPLACE_AND_ACTIVATE => true,
            opcode::COMMIT_ACTIVATE => false,
            opcode::COMMIT_ACTIVATE_NOW => image.as_ref().is_some_and(|image| !image.bytes.is_empty()),
            // Boot partitions are not there.
            _ => return Err(Status::INVALID_FIELD.do_not_retry()),
        };
        let index = usize::from(slot).wrapping_sub(1);
        if index >= SLOTS || replaces && index == 0 {
            return Err(Status::INVALID_FIRMWARE_SLOT.do_not_retry());
        }
        if replaces {
            let revision = image.and_then(|image| image.revision());
            self.revisions[index] = Some(revision.ok_or(Status::INVALID_FIRMWARE_IMAGE.do_not_retry())?);
        }
        if action == opcode::COMMIT_REPLACE {
            return Ok(false);
        }
        if self.revisions[index].is_none() {
            return Err(Status::INVALID_FIRMWARE_IMAGE.do_not_retry());
        }
        self.next = slot;
        Ok(action == opcode::COMMIT_ACTIVATE_NOW && self.activate())
    }

    /// "If the value of this field is 0h, then the controller shall choose the firmware slot": one that is empty, or one that is
    /// not in use, or the last one; only what is activated must be named.
    fn choose(&self, action: u8) -> u8 {
        if action == opcode::COMMIT_ACTIVATE {
            return 0;
        }
        let slots = 2..=SLOTS as u8;
        let empty = slots.clone().find(|&slot| self.in_slot(slot).is_none());
        empty.or_else(|| slots.clone().find(|&slot| slot != self.active)).unwrap_or(SLOTS as u8)
    }

    /// Activates what waits for it. `true`: something did.
    fn activate(&mut self) -> bool {
        let Some(revision) = self.in_slot(self.next) else { return false };
        (self.active, self.running, self.next) = (self.next, revision, 0);
        true
    }

    /// A Controller Level Reset: activates what was committed for it, for all controllers. `true`: other firmware runs.
    pub fn reset(&mut self) -> bool {
        self.activate()
    }
}

/// An image of `revision` with `payload`, padded to the granularity.
#[cfg(test)]
pub(crate) fn image(revision: &Revision, payload: &[u8]) -> Vec<u8> {
    let mut image = [&SIGNATURE[..], revision].concat();
    image.extend(((HEADER_BYTES + payload.len()) as u32).to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&image);
    hasher.update(payload);
    image.extend(hasher.finalize().to_le_bytes());
    image.extend(payload);
    image.resize(image.len().next_multiple_of(GRANULARITY_BYTES), 0);
    image
}
