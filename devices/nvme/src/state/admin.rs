//! Saved state of what admin commands do beyond queues: written only where it differs from what a new controller has.

use vmstate::{Bitmap, VmState};

use crate::firmware::{MAX_GRANULES, MAX_IMAGE_BYTES, SLOTS};
use crate::persistent::{EVENTS_BYTES, LOG_BYTES};

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

/// How far a background operation has come.
#[derive(VmState, Clone, Copy, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/sweep", version = 1)]
pub struct SweepState {
    /// The namespace that it is about, or the broadcast identifier.
    pub scope: u32,
    /// The namespace that has its turn.
    pub nsid: u32,
    /// Bytes of it that are done.
    pub offset_bytes: u64,
}

/// A format that is not finished (Base 5.14).
#[derive(VmState, Clone, Copy, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/format", version = 1)]
pub struct FormatState {
    /// The command is still to be answered.
    pub waits: bool,
    /// Its identifier; 0 if nobody waits.
    pub cid: u16,
    /// Index of the LBA format.
    pub format: u8,
    /// What is done.
    pub sweep: SweepState,
    /// What is asked for of metadata, unless there are none or nothing is.
    #[vmstate(subsection)]
    pub settings: Option<FormatSettingsState>,
}

/// MSET, PI and PIL of a Format NVM command, or of the format of a namespace.
#[derive(VmState, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme/format/settings", version = 1)]
pub struct FormatSettingsState {
    /// Metadata are transferred at the end of each block.
    pub extended: bool,
    /// Type of protection information, 0 for none.
    pub protection_type: u8,
    /// It is the first eight bytes of the metadata.
    pub protection_first: bool,
}

impl FormatSettingsState {
    /// Whether it says anything.
    pub(crate) fn is_needed(&self) -> bool {
        self.extended || self.protection_type != 0
    }
}

/// Sanitize operations (Base 5.24).
#[derive(VmState, Clone, Copy, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/sanitize", version = 1)]
pub struct SanitizeState {
    /// CDW10 of the most recent command that began one.
    pub command: u32,
    /// How the most recent one that ended did: 0 there was none, 1 successfully, 2 it failed, 3 and the host has left the failure mode.
    pub outcome: u8,
    /// Overwrites that the most recent one completed.
    pub overwrites: u8,
    /// One is in progress; otherwise what follows is 0.
    pub running: bool,
    /// Overwrite Pattern.
    pub pattern: u32,
    /// Passes over all namespaces that are complete.
    pub pass: u8,
    /// What is done of the next one.
    pub sweep: SweepState,
    /// The controller that was asked for what is in progress, if it is another one.
    #[vmstate(subsection)]
    pub asked: Option<SanitizeAskedState>,
}

/// Who was asked for a sanitize operation.
#[derive(VmState, Clone, Copy, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/sanitize/asked", version = 1)]
pub struct SanitizeAskedState {
    /// Controller identifier.
    pub controller: u16,
}

/// Self-tests (Base 5.9).
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/self-test", version = 1)]
pub struct SelfTestState {
    /// Self-test Code of the one that is in progress; 0 if none is, and then what follows is 0.
    pub code: u8,
    /// What is done of it.
    pub sweep: SweepState,
    /// Up to here in the namespace, blocks are read one by one, because a request failed; 0 if none did.
    pub probe_until_bytes: u64,
    /// Results.
    pub result_count: u8,
    /// They, newest first, as the log page has them.
    #[vmstate(len = "result_count", max = crate::command::self_test::RESULTS)]
    pub results: Vec<[u8; 28]>,
}

/// The persistent event log (Base 5.16.1.14).
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/persistent-events", version = 1)]
pub struct PersistentEventsState {
    /// Events ever logged; wraps.
    pub generation: u16,
    /// Milliseconds since the last reset.
    pub since_reset_ms: u64,
    /// Bytes of all events.
    pub event_bytes: u32,
    /// Header and data of each, newest first.
    #[vmstate(len = "event_bytes", max = EVENTS_BYTES)]
    pub events: Vec<u8>,
    /// Bytes of the copy that the host reads; 0 if it has no context.
    pub context_bytes: u32,
    /// The copy, its header included.
    #[vmstate(len = "context_bytes", max = LOG_BYTES)]
    pub context: Vec<u8>,
}

/// Critical warnings that stay (Base figure 207).
#[derive(VmState, Clone, Copy, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/events/warnings", version = 1)]
pub struct WarningsState {
    /// Bits of Critical Warning: 0 spare, 2 reliability, 3 read-only.
    pub bits: u8,
}
