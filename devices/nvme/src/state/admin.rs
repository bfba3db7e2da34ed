//! Saved state of what admin commands do beyond queues: written only where it differs from what a new controller has.

use vmstate::{Bitmap, VmState};

use crate::firmware::{MAX_GRANULES, MAX_IMAGE_BYTES, SLOTS};

/// Values that a reset brings back (Base 5.27, Save).
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/features/saved", version = 1)]
pub struct SavedFeaturesState {
    /// Arbitration.
    pub arbitration: u32,
    /// Power Management: the workload hint.
    pub workload_hint: u8,
    /// Temperature Threshold, over, in kelvins.
    pub over_temperature_kelvin: u16,
    /// Temperature Threshold, under, in kelvins.
    pub under_temperature_kelvin: u16,
    /// Volatile Write Cache.
    pub write_cache: bool,
    /// Interrupt Coalescing.
    pub interrupt_coalescing: u32,
    /// Write Atomicity Normal.
    pub write_atomicity: u32,
    /// Asynchronous Event Configuration.
    pub async_events: u32,
    /// Sanitize Config.
    pub sanitize_config: u8,
}

/// Current values of features that earlier versions did not have.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/features/more", version = 1)]
pub struct MoreFeaturesState {
    /// Power Management: the workload hint.
    pub workload_hint: u8,
    /// Sanitize Config.
    pub sanitize_config: u8,
}

/// Firmware slots (Base 3.11).
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/firmware", version = 1)]
pub struct FirmwareState {
    /// The slot that the running firmware came from.
    pub active: u8,
    /// The slot that is activated at the next reset, or 0.
    pub next: u8,
    /// The revision that runs.
    pub running: [u8; 8],
    /// Bit n: there is an image in slot n + 1.
    pub present: u8,
    /// Revisions by slot less one; zeroes where there is no image.
    pub revisions: [[u8; 8]; SLOTS],
    /// Granules of 4096 bytes up to the last one that was downloaded.
    pub granule_count: u32,
    /// Those that were.
    #[vmstate(len = "granule_count", max = MAX_GRANULES)]
    pub granules: Bitmap,
    /// Bytes of all granules.
    pub staged_bytes: u32,
    /// They; zeroes where none was downloaded.
    #[vmstate(len = "staged_bytes", max = MAX_IMAGE_BYTES)]
    pub staged: Vec<u8>,
}

/// Write protection of a namespace (Base 8.12).
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/namespace/write-protection", version = 1)]
pub struct WriteProtectionState {
    /// The value of the feature: 1 protected, 2 until a power cycle, 3 for ever.
    pub value: u8,
}
