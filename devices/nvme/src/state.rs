//! What is saved of a controller: plain and untrusted. Only [`Controller::load`](crate::Controller::load) turns it into a device.
//!
//! ```text
//! nvme: configuration (must agree) | registers | features | events and error log | doorbell buffers | SMART counters
//!       | changed namespaces | sq[id] | cq[id] | namespaces[nsid - 1] | PCI configuration space and MSI-X
//!       | allocations of the subsystem, if they are more than what is attached or can change
//!       | where there is something to say: firmware, format, sanitize, self-tests, persistent events
//! ```
//! Not saved, because it is derived: the phase of the controller (from CC and CSTS), which submission queues use a completion queue,
//! which worker serves what, EventIdx values, the temperature warning, EUI-64.
//!
//! A controller with 64 queue pairs and 256 namespaces, two holes after each, has 17,325 bytes. Medians of one run of
//! `chrt -f 20 cargo bench -p nvme --bench state -- --verbose` on the reference host with its other core in use: 28
//! microseconds from the controller to them, 38 from them to a checked controller with its queues (18 of these to [`NvmeState`]); I/O contexts, images and the unused controller exist before.

mod admin;
mod reservations;

use pci::EndpointState;
use vmstate::{Bitmap, Slots, VmState};

use crate::config::MAX_NAMESPACES;
use crate::inventory::{NamespaceShape, Shape};
use crate::store::AllocationsState;

pub use admin::{
    FirmwareState, FormatSettingsState, FormatState, MoreFeaturesState, PersistentEventsState,
    SanitizeAskedState, SanitizeState, SavedFeaturesState, SelfTestState, SweepState, WarningsState,
    WriteProtectionState,
};
pub use reservations::{
    AccessGroupsState, RegistrantState, ReservationMaskState, ReservationNoticeState,
    ReservationNoticesState, ReservationState, ReservationsState,
};

/// A paused controller.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme", version = 2, oldest = 1)]
pub struct NvmeState {
    /// What both sides must have.
    pub shape: Shape,
    /// Registers.
    pub registers: RegistersState,
    /// Features.
    pub features: FeaturesState,
    /// Asynchronous events and errors.
    pub events: EventsState,
    /// Shadow doorbells.
    pub doorbell_buffers: DoorbellBuffersState,
    /// Counters of the SMART log.
    pub smart: SmartState,
    /// Namespaces in the Changed Namespace List log.
    #[vmstate(max = 1024)]
    pub changed_count: u16,
    /// Their identifiers.
    #[vmstate(len = "changed_count", max = MAX_NAMESPACES as usize)]
    pub changed_namespaces: Vec<u32>,
    /// Queue identifiers, the admin queue included.
    pub sq_count: u32,
    /// Submission queues by identifier.
    #[vmstate(len = "sq_count", max = 65536)]
    pub sq: Slots<SubmissionQueueState>,
    /// Queue identifiers, the admin queue included.
    pub cq_count: u32,
    /// Completion queues by identifier.
    #[vmstate(len = "cq_count", max = 65536)]
    pub cq: Slots<CompletionQueueState>,
    /// Namespace identifiers.
    pub namespace_count: u32,
    /// Namespaces by identifier less one.
    #[vmstate(len = "namespace_count", max = MAX_NAMESPACES as usize)]
    pub namespaces: Slots<NamespaceState>,
    /// Configuration space, BARs and MSI-X.
    pub pci: EndpointState,
    /// Firmware slots, unless they are as they left the factory.
    #[vmstate(subsection)]
    pub firmware: Option<FirmwareState>,
    /// The format that is in progress.
    #[vmstate(subsection)]
    pub format: Option<FormatState>,
    /// Sanitize operations, if there ever was one.
    #[vmstate(subsection)]
    pub sanitize: Option<SanitizeState>,
    /// Self-tests, if there ever was one.
    #[vmstate(subsection)]
    pub self_test: Option<SelfTestState>,
    /// The persistent event log, if there is something in it.
    #[vmstate(subsection)]
    pub persistent_events: Option<PersistentEventsState>,
    /// The controller memory buffer, if the guest has done something with it.
    #[vmstate(subsection)]
    pub buffer: Option<BufferState>,
    /// What the subsystem has allocated; without it, what is attached here, and the guest cannot change that.
    #[vmstate(subsection)]
    pub allocations: Option<AllocationsState>,
    /// Reservations of the subsystem, unless nobody has used any.
    #[vmstate(subsection)]
    pub reservations: Option<ReservationsState>,
    /// What this controller has to do with them, unless it is as at first.
    #[vmstate(subsection)]
    pub reservation_notices: Option<ReservationNoticesState>,
    /// Asymmetric access, unless all of it was always optimized.
    #[vmstate(subsection)]
    pub access: Option<AccessGroupsState>,
    /// The persistent memory region, if the guest has done something with it.
    #[vmstate(subsection)]
    pub region: Option<RegionState>,
}

/// Where the guest has the controller memory buffer (Base 3.1.3.16); its contents travel with RAM.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/buffer", version = 1)]
pub struct BufferState {
    /// CMBMSC.
    pub control: u64,
}

/// Registers of the persistent memory region (Base 3.1.3.23 to 3.1.3.28); its contents travel with RAM.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/region", version = 1)]
pub struct RegionState {
    /// PMRCTL.EN.
    pub enabled: bool,
    /// PMRMSCU and PMRMSCL.
    pub memory_space: u64,
    /// Commands name it where the controller memory buffer is wanted too, since it was there first.
    pub is_first: bool,
    /// PMRSTS.ERR.
    pub error: u8,
}

/// The registers that the guest can change (Base 3.1.3).
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/registers", version = 1)]
pub struct RegistersState {
    /// CC.
    pub cc: u32,
    /// CSTS.
    pub csts: u32,
    /// AQA.
    pub aqa: u32,
    /// ASQ.
    pub asq: u64,
    /// ACQ.
    pub acq: u64,
    /// INTMS and INTMC.
    pub interrupt_mask: u32,
}

/// Values of the features (Base 5.27), the current ones where nothing else is said.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/features", version = 1)]
pub struct FeaturesState {
    /// Arbitration.
    pub arbitration: u32,
    /// Temperature Threshold, over, in kelvins.
    pub over_temperature_kelvin: u16,
    /// Temperature Threshold, under, in kelvins.
    pub under_temperature_kelvin: u16,
    /// Volatile Write Cache.
    pub write_cache: bool,
    /// Interrupt Coalescing.
    pub interrupt_coalescing: u32,
    /// Vectors.
    pub vector_count: u16,
    /// Interrupt Vector Configuration: coalescing disabled.
    #[vmstate(len = "vector_count", max = 2048)]
    pub coalescing_disabled: Bitmap,
    /// Write Atomicity Normal.
    pub write_atomicity: u32,
    /// Asynchronous Event Configuration.
    pub async_events: u32,
    /// Keep Alive Timer in milliseconds.
    pub keep_alive_ms: u32,
    /// Timestamp in milliseconds.
    pub timestamp_ms: u64,
    /// The host has set the timestamp.
    pub timestamp_set: bool,
    /// Advanced Command Retry Enable.
    pub command_retry: u8,
    /// Host Identifier.
    pub host_identifier: [u8; 16],
    /// Saved values, unless they are the defaults.
    #[vmstate(subsection)]
    pub saved: Option<SavedFeaturesState>,
    /// Values of other features, unless they are the defaults.
    #[vmstate(subsection)]
    pub more: Option<MoreFeaturesState>,
}

/// Asynchronous events (Base 5.2) and the error log (Base 5.16.1.2).
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/events", version = 1)]
pub struct EventsState {
    /// Outstanding Asynchronous Event Requests.
    pub parked_count: u8,
    /// Their command identifiers, oldest first.
    #[vmstate(len = "parked_count", max = crate::admin::MAX_PARKED)]
    pub parked: Vec<u16>,
    /// Events not reported yet.
    pub queued_count: u8,
    /// As dword 0 of a completion would have them.
    #[vmstate(len = "queued_count", max = crate::event::MAX_QUEUED_EVENTS)]
    pub queued: Vec<u32>,
    /// Bit n: events of type n are masked until their log page is read.
    pub masked: u8,
    /// Errors ever logged.
    pub error_count: u64,
    /// Entries in the error log.
    pub entry_count: u8,
    /// The entries, newest first, as the log page has them.
    #[vmstate(len = "entry_count", max = crate::event::ERROR_LOG_ENTRIES)]
    pub entries: Vec<[u8; 64]>,
    /// What failures of images have raised, unless there was none.
    #[vmstate(subsection)]
    pub warnings: Option<WarningsState>,
}

/// Doorbell Buffer Config (Base 5.8).
#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme/doorbell-buffers", version = 1)]
pub struct DoorbellBuffersState {
    /// The buffers are in use; otherwise the addresses are 0.
    pub enabled: bool,
    /// Guest physical address of the shadow doorbells.
    pub shadow: u64,
    /// Guest physical address of the event indexes.
    pub event_index: u64,
}

/// Counters of the SMART log (Base 5.16.1.3).
#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme/smart", version = 1)]
pub struct SmartState {
    /// Units of 512 bytes read.
    pub units_read: u64,
    /// Units of 512 bytes written.
    pub units_written: u64,
    /// Read commands.
    pub reads: u64,
    /// Write commands.
    pub writes: u64,
    /// Commands that a backend failed.
    pub media_errors: u64,
    /// Power cycles.
    pub power_cycles: u64,
    /// Time powered on in seconds.
    pub power_on_seconds: u64,
    /// Unsafe shutdowns, if there were any.
    #[vmstate(subsection)]
    pub unsafe_shutdowns: Option<UnsafeShutdownsState>,
}

/// Losses of power without a shutdown before (Base 5.16.1.3).
#[derive(VmState, Clone, Copy, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/smart/unsafe-shutdowns", version = 1)]
pub struct UnsafeShutdownsState {
    /// How many.
    pub count: u64,
}

/// A submission queue.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/sq", version = 1)]
pub struct SubmissionQueueState {
    /// Identifier, equal to the slot.
    pub id: u16,
    /// Its completion queue.
    pub cq_id: u16,
    /// Priority class.
    pub priority: u8,
    /// Entries.
    pub size: u32,
    /// Next entry to fetch.
    pub head: u32,
    /// The tail doorbell as written by MMIO or last seen in the shadow.
    pub tail: u32,
    /// One run of memory at `pages[0]`; otherwise `pages` are all memory pages.
    pub contiguous: bool,
    /// Pages, 1 if contiguous.
    pub page_count: u32,
    /// Guest physical addresses.
    #[vmstate(len = "page_count", max = 1024)]
    pub pages: Vec<u64>,
    /// Commands that were aborted before they were fetched.
    pub aborted_count: u32,
    /// Their ring indexes.
    #[vmstate(len = "aborted_count", max = 65535)]
    pub aborted: Vec<u16>,
}

/// A completion queue.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/cq", version = 1)]
pub struct CompletionQueueState {
    /// Identifier, equal to the slot.
    pub id: u16,
    /// Interrupt vector.
    pub vector: u16,
    /// Interrupts enabled.
    pub interrupts: bool,
    /// Entries.
    pub size: u32,
    /// The head doorbell as written by MMIO or last seen in the shadow.
    pub head: u32,
    /// Next entry to post.
    pub tail: u32,
    /// Phase tag of the next entry.
    pub phase: bool,
    /// One run of memory at `pages[0]`; otherwise `pages` are all memory pages.
    pub contiguous: bool,
    /// Pages, 1 if contiguous.
    pub page_count: u32,
    /// Guest physical addresses.
    #[vmstate(len = "page_count", max = 256)]
    pub pages: Vec<u64>,
    /// Completions not posted because the queue is full.
    pub backlog_count: u32,
    /// They, oldest first.
    #[vmstate(len = "backlog_count", max = crate::queue::MAX_BACKLOG)]
    pub backlog: Vec<EndedState>,
}

/// A completion that waits for room.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/completion", version = 1)]
pub struct EndedState {
    /// Submission queue of the command.
    pub sq_id: u16,
    /// Command identifier.
    pub cid: u16,
    /// Status, without the phase.
    pub status: u16,
    /// Command specific result.
    pub dw0: u32,
    /// Command specific result, upper half.
    pub dw1: u32,
}

/// A namespace.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/namespace", version = 1)]
pub struct NamespaceState {
    /// What both sides must have.
    pub shape: NamespaceShape,
    /// Error Recovery: time limit in units of 100 ms.
    pub error_recovery: u16,
    /// Write protection, unless there is none.
    #[vmstate(subsection)]
    pub write_protection: Option<WriteProtectionState>,
    /// Blocks that cannot be read, if there are any.
    #[vmstate(subsection)]
    pub uncorrectable: Option<UncorrectableState>,
}

/// Blocks that Write Uncorrectable has marked.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/namespace/uncorrectable", version = 1)]
pub struct UncorrectableState {
    /// Runs of blocks, at least one.
    pub run_count: u16,
    /// They, in order, with other blocks between them.
    #[vmstate(len = "run_count", max = crate::uncorrectable::MAX_BLOCKS as usize)]
    pub runs: Vec<UncorrectableRunState>,
}

/// A run of blocks.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/uncorrectable-run", version = 1)]
pub struct UncorrectableRunState {
    /// First block.
    pub first: u64,
    /// Number of blocks.
    pub blocks: u32,
}
