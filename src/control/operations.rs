//! What the control socket may ask of a machine, and the reports that come back.
//!
//! The names and units in JSON are those of QEMU's QAPI schema (`run-state.json`, `migration.json`); types whose names
//! start with `Ferry`, and what they hold, are this project's own and only seen through `x-ferry-status`, and in `query-migrate` under
//! names that begin with `x-ferry-`.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use engine::{Compression, SnapshotOptions};
use serde::{Deserialize, Serialize};

use super::{ConvergenceParameters, FerryChannel, FerryCpu};
use crate::config::NamespaceOption;

/// A machine as its operator sees it. Every method may be called from any thread at any time, and none waits for a
/// client. What a machine may not do now it refuses with a [`Refusal`]; which commands are legal in which run state is
/// decided behind this trait, not by the protocol.
pub trait Operations: Send + Sync {
    /// The run state.
    fn run_state(&self) -> RunState;

    /// Stops the vCPUs and pauses the devices; nothing happens when they are stopped already.
    fn stop(&self) -> Result<(), Refusal>;

    /// Lets the guest run. Refused from the first byte of COMMIT on the source and before ownership on the destination.
    fn cont(&self) -> Result<(), Refusal>;

    /// Begins to boot the guest anew, as if it had asked for that; returns at once. Refused where [`Operations::cont`] is.
    fn system_reset(&self) -> Result<(), Refusal>;

    /// Begins to end the process; returns at once, so that the answer still leaves.
    ///
    /// Refused, unless it is forced, while a guest that has left needs memory of this process.
    fn quit(&self, force: bool) -> Result<(), Refusal>;

    /// Begins a migration; returns once it has begun. Its progress is seen through [`Operations::migration`] and events.
    fn migrate(&self, target: MigrationTarget) -> Result<(), Refusal>;

    /// Begins to write what the guest is, or what has changed of it, into the file `path`, with copies of its images; it goes on. Seen as
    /// a migration is.
    fn snapshot(&self, path: &Path, options: SnapshotOptions) -> Result<(), Refusal>;

    /// Asks a migration to end with the guest running here. Nothing happens without a migration, or after COMMIT.
    fn migrate_cancel(&self) -> Result<(), Refusal>;

    /// Lets guest memory follow after the guest from now on, in a migration that began with [`Operations::postcopy_ram`] or so.
    fn migrate_start_postcopy(&self) -> Result<(), Refusal>;

    /// Replaces the links of a migration whose guest runs ahead of its memory and that has lost them: a source connects again, a
    /// destination listens, at `uri` if it is another. Returns at once. Refused without such a migration.
    fn migrate_recover(&self, uri: Option<&str>) -> Result<(), Refusal>;

    /// Whether guest memory may follow after the guest in later migrations.
    fn postcopy_ram(&self) -> bool;

    /// See [`Operations::postcopy_ram`].
    fn set_postcopy_ram(&self, on: bool);

    /// Says what an operator knows of a hand-over that is undecided; returns at once, and the outcome is seen as that of the
    /// migration. Refused when there is no such hand-over, and with a lease, which alone decides.
    fn decide_handover(&self, word: engine::Word) -> Result<(), Refusal>;

    /// The latest migration, if there was one. Its `blocked_reasons` are filled in from [`Operations::migration_blockers`].
    fn migration(&self) -> Option<MigrationInfo>;

    /// Why the machine cannot migrate: all the reasons, none if it can.
    fn migration_blockers(&self) -> Vec<String>;

    /// The limits of migrations.
    fn migration_parameters(&self) -> MigrationParameters;

    /// Changes the limits, of a migration that runs too. The protocol has checked their ranges. Refused, and none is changed, where the
    /// migration that runs cannot take one.
    fn set_migration_parameters(&self, parameters: MigrationParameters) -> Result<(), Refusal>;

    /// All that this project knows and QEMU has no word for.
    fn ferry_status(&self) -> FerryStatus;

    /// Adds a namespace of the host's. Refused, as are the two below, while a guest comes or leaves.
    fn add_namespace(&self, namespace: &NamespaceOption) -> Result<(), Refusal>;

    /// Takes a namespace of the host's away; says whether its image was let go already, or commands are still in flight there.
    fn remove_namespace(&self, controller: &str, nsid: u32) -> Result<bool, Refusal>;

    /// Lets a namespace of the host's grow: to `size_bytes`, or to what its image has by now. Returns its size in bytes.
    fn resize_namespace(&self, controller: &str, nsid: u32, size_bytes: Option<u64>) -> Result<u64, Refusal>;

    /// Sets how a controller gives access to a group of namespaces, which its guest is told; returns the group.
    fn set_access(&self, controller: &str, scope: AccessScope, state: AccessState) -> Result<u32, Refusal>;
}

/// Where a guest is to go, as a client says it.
#[derive(Debug, Default)]
pub struct MigrationTarget {
    /// The address.
    pub uri: String,
    /// The folder with this end's credentials, for TLS.
    pub tls_dir: Option<PathBuf>,
    /// The link may lead to another host without TLS.
    pub insecure: bool,
    /// The socket that the address names, with `fd:`.
    pub descriptor: Option<OwnedFd>,
    /// A process of this host is to get the memory itself, instead of its contents, and the files of the images.
    pub local: bool,
    /// When guest memory may follow after the guest; what the capability says, if nothing is said.
    pub postcopy: Option<engine::PostcopyStart>,
    /// The images that the guest may write go along.
    pub storage: bool,
}

impl From<&str> for MigrationTarget {
    fn from(uri: &str) -> Self {
        Self { uri: uri.to_owned(), ..Self::default() }
    }
}

/// Which namespaces a change of access is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessScope {
    /// Those of an ANA group.
    Group(u32),
    /// Those of the group of a namespace.
    Namespace(u32),
}

/// How a controller gives access to a group of namespaces ("NVM Express Base 2.0, 8.1").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum AccessState {
    /// The best way to them.
    Optimized,
    /// A way that works, and may be slower.
    NonOptimized,
    /// No way at present.
    Inaccessible,
    /// No way any more.
    PersistentLoss,
    /// On the way from one state to another.
    Change,
}

/// Why an operation was not done: a sentence for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// QEMU's `RunState`, as far as this machine knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Waits for an incoming migration.
    Inmigrate,
    /// Built and not started.
    Prelaunch,
    /// The guest runs.
    Running,
    /// Stopped by the operator.
    Paused,
    /// Stopped by a migration that is about to end.
    FinishMigrate,
    /// Lives elsewhere, or may (`handover-unknown`).
    Postmigrate,
    /// The guest powered off.
    Shutdown,
    /// The guest reported a panic.
    GuestPanicked,
    /// A vCPU or device could not go on.
    InternalError,
}

/// QEMU's `MigrationStatus`, as far as this machine knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// Connects, says hello.
    Setup,
    /// RAM moves.
    Active,
    /// The guest is stopped and devices move; also for as long as the outcome of a COMMIT is unknown.
    Device,
    /// The guest runs at the destination, and memory follows.
    PostcopyActive,
    /// The same, and the link is lost: `migrate-recover`.
    PostcopyPaused,
    /// The link comes about again.
    PostcopyRecover,
    /// The guest lives elsewhere.
    Completed,
    /// The guest lives here; [`MigrationInfo::error_desc`] says why.
    Failed,
    /// On the way to `cancelled`.
    Cancelling,
    /// The guest lives here because the operator said so.
    Cancelled,
}

impl MigrationStatus {
    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// Whether the guest is at its destination, and some of its memory is not.
    pub fn is_postcopy(self) -> bool {
        matches!(self, Self::PostcopyActive | Self::PostcopyPaused | Self::PostcopyRecover)
    }
}

/// QEMU's `MigrationInfo`: times in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// Where it stands.
    pub status: MigrationStatus,
    /// RAM, once it moves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<RamStats>,
    /// Images that go with the guest, by QEMU's name for what it had of the kind.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub disk: Option<DiskStats>,
    /// Milliseconds since it began, or that it took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// Milliseconds from the command to the first page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    /// Milliseconds that the guest would be stopped if it were stopped now; while RAM moves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// Milliseconds that the guest was stopped; when completed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// What the vCPUs are slowed down by, in percent of their time; once they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_percentage: Option<u8>,
    /// Milliseconds that any thread waited for memory that followed; on a destination.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub postcopy_blocktime: Option<u64>,
    /// Nanoseconds that half of the waits did not exceed; on a destination.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub postcopy_latency: Option<u64>,
    /// Bytes of the state of vCPUs and devices, which are none of RAM; once they have gone, or come.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub x_ferry_device_bytes: Option<u64>,
    /// The data channels, if there are any.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub x_ferry_channels: Vec<FerryChannel>,
    /// Why it failed: the same cause that the other side reports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
    /// Why a migration cannot begin.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub blocked_reasons: Vec<String>,
}

impl MigrationInfo {
    /// A migration of which only the status is known.
    pub fn new(status: MigrationStatus) -> Self {
        Self {
            status,
            ram: None,
            disk: None,
            total_time: None,
            setup_time: None,
            expected_downtime: None,
            downtime: None,
            cpu_throttle_percentage: None,
            postcopy_blocktime: None,
            postcopy_latency: None,
            x_ferry_device_bytes: None,
            x_ferry_channels: Vec::new(),
            error_desc: None,
            blocked_reasons: Vec::new(),
        }
    }
}

/// QEMU's `MigrationStats`. Zero-copy counters are zero: nothing of the kind exists here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamStats {
    /// Bytes sent.
    pub transferred: u64,
    /// Bytes still to send, as of the last look at the dirty pages.
    pub remaining: u64,
    /// Bytes of guest RAM.
    pub total: u64,
    /// Pages that were all zero and sent as such.
    pub duplicate: u64,
    /// Pages sent with contents.
    pub normal: u64,
    /// Bytes of those.
    pub normal_bytes: u64,
    /// Pages dirtied a second.
    pub dirty_pages_rate: u64,
    /// Throughput in megabits a second.
    pub mbps: f64,
    /// Times that the dirty pages were collected.
    pub dirty_sync_count: u64,
    /// Pages that a destination asked for.
    pub postcopy_requests: u64,
    /// Bytes in a page of these counts.
    pub page_size: u64,
    /// Bytes over data channels.
    pub multifd_bytes: u64,
    /// Pages sent a second.
    pub pages_per_second: u64,
    /// Bytes sent while the guest ran here.
    pub precopy_bytes: u64,
    /// Bytes sent while the guest was stopped.
    pub downtime_bytes: u64,
    /// Bytes sent while the guest ran there.
    pub postcopy_bytes: u64,
    /// Failures of zero-copy.
    pub dirty_sync_missed_zero_copy: u64,
}

/// What QEMU's `MigrationStats` says of images that go with the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct DiskStats {
    /// Bytes sent, or received.
    pub transferred: u64,
    /// Bytes still to send, as of the last look at the dirty blocks; 0 at a destination.
    pub remaining: u64,
    /// Bytes of the images, holes included.
    pub total: u64,
    /// Times that the dirty blocks were collected.
    pub dirty_sync_count: u64,
    /// Bytes of the images that were sent while the guest was stopped.
    pub downtime_bytes: u64,
}

/// QEMU's `MigrationParameters`, as far as they are known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// Milliseconds that the guest may be stopped.
    pub downtime_limit: u64,
    /// Bytes a second; 0: no limit.
    pub max_bandwidth: u64,
    /// What is done about a guest that does not fit.
    #[serde(flatten)]
    pub convergence: ConvergenceParameters,
    /// Data channels that a migration begins with; 0: guest memory goes over the connection of everything else.
    pub multifd_channels: u16,
    /// How they compress.
    pub multifd_compression: MultifdCompression,
}

/// QEMU's `MultiFDCompression`, as far as it is known here, and LZ4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum MultifdCompression {
    /// Pages go as they are.
    #[default]
    None,
    /// Fast.
    Lz4,
    /// Small.
    Zstd,
}

impl From<Compression> for MultifdCompression {
    fn from(compression: Compression) -> Self {
        match compression {
            Compression::None => Self::None,
            Compression::Lz4 => Self::Lz4,
            Compression::Zstd => Self::Zstd,
        }
    }
}

impl From<MultifdCompression> for Compression {
    fn from(compression: MultifdCompression) -> Self {
        match compression {
            MultifdCompression::None => Self::None,
            MultifdCompression::Lz4 => Self::Lz4,
            MultifdCompression::Zstd => Self::Zstd,
        }
    }
}

impl Default for MigrationParameters {
    fn default() -> Self {
        Self {
            downtime_limit: 300,
            max_bandwidth: 0,
            convergence: ConvergenceParameters::default(),
            multifd_channels: engine::CHANNELS_DEFAULT,
            multifd_compression: MultifdCompression::None,
        }
    }
}

/// The answer to `x-ferry-status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FerryStatus {
    /// The machine's name.
    pub name: String,
    /// The process that answers.
    pub process_id: u32,
    /// Run state, as in `query-status`.
    pub status: RunState,
    /// Whether this process owns the guest, or who else may.
    pub ownership: FerryOwnership,
    /// The lease, if the machine has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease: Option<FerryLease>,
    /// Why the machine cannot migrate; none if it can.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub blocked_reasons: Vec<String>,
    /// Which processor the guest sees, where there is a machine.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cpu: Option<FerryCpu>,
    /// Times that a vCPU came back from KVM to this process.
    #[serde(default)]
    pub vcpu_exits: u64,
    /// What the controllers have done in this process, in the order of their slots.
    #[serde(default)]
    pub disks: Vec<FerryDisk>,
    /// The latest migration, outgoing or incoming, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<FerryMigration>,
    /// How long this process took until its guest ran, if it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<FerryStart>,
}

/// How long a process took until its guest ran for the first time, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FerryStart {
    /// From `main` to the first `KVM_RUN`.
    pub total: u64,
    /// What of that KVM took for the first memory slot, whatever its size.
    pub first_memory_slot: u64,
    /// Its parts: until the process was ready to begin,
    #[serde(default)]
    pub process: u64,
    /// to build the machine, the first memory slot included,
    #[serde(default)]
    pub machine: u64,
    /// to compare the guest's file with it, and what reading that without its memory, which is done beside, took longer,
    #[serde(default)]
    pub file: u64,
    /// to make its memory such that it can be touched,
    #[serde(default)]
    pub memory: u64,
    /// to load devices and vCPUs,
    #[serde(default)]
    pub devices: u64,
    /// to lock the images and to write the lease (a guest that boots is put into memory then),
    #[serde(default)]
    pub ownership: u64,
    /// and to let the guest run.
    #[serde(default)]
    pub resume: u64,
}

/// Counters of one controller and of the threads that serve it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FerryDisk {
    /// The controller's serial number.
    pub serial: String,
    /// What it is in a subsystem of several controllers.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub member: Option<FerryMember>,
    /// Commands completed.
    pub completed: u64,
    /// Commands that are being worked on.
    pub in_flight: u32,
    /// Doorbell registers whose writes the controller served on a vCPU's thread.
    pub doorbell_exits: u64,
    /// Doorbell registers whose writes KVM turned into calls of a thread: the guest left the virtual machine, but not the kernel.
    #[serde(default)]
    pub doorbell_events: u64,
    /// Calls of a thread by this process, with a system call.
    #[serde(default)]
    pub wake_ups: u64,
    /// Calls of io_uring_enter.
    #[serde(default)]
    pub io_uring_enters: u64,
    /// Entries that io_uring took in them.
    #[serde(default)]
    pub io_uring_entries: u64,
    /// Interrupts that were sent.
    #[serde(default)]
    pub interrupts: u64,
    /// Turns of the threads: each time one was called, or had been at work for long.
    pub turns: u64,
    /// Times that work ran out and a thread looked for more before it slept.
    pub polls: u64,
    /// Times that more came while it looked.
    pub poll_hits: u64,
}

/// A controller of a subsystem that has several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FerryMember {
    /// Serial number of the subsystem: that of its first controller.
    pub subsystem: String,
    /// Controller identifier in it.
    pub controller_id: u16,
    /// ANA groups that it does not give optimized access to.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub access: Vec<FerryAccess>,
}

/// How a controller gives access to a group of namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FerryAccess {
    /// The ANA group.
    pub group: u32,
    /// How.
    pub state: AccessState,
}

/// Who may run the guest, as far as this process knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FerryOwnership {
    /// This process.
    Owned,
    /// Not this process yet: it waits for a guest.
    Incoming,
    /// COMMIT was sent and not answered: settled by the peer's answer or by the lease.
    HandoverUnknown,
    /// Another process or a file; never again this one.
    GivenAway,
}

/// A lease record as last read or written by this process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FerryLease {
    /// Where it is.
    pub path: String,
    /// `owned`, `offered`, `taken` or `in-file`.
    pub state: String,
    /// Grows with every change of owner.
    pub generation: u64,
    /// Host, process, machine and time of the owner.
    pub owner: String,
}

/// A migration in detail: times in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FerryMigration {
    /// The step that it is in, in words.
    pub phase: String,
    /// The other side: the URI for a source, the peer's name for a destination.
    pub peer: String,
    /// Passes over RAM that have begun; the last is that with the guest stopped.
    pub rounds: u32,
    /// Bytes of RAM that were not sent, since the process there, of this host, has got the memory itself.
    #[serde(default)]
    pub handed_over_bytes: u64,
    /// Disk commands in flight when the stop began.
    pub in_flight_at_stop: u32,
    /// What the vCPUs are slowed down by, or were when they were stopped, in percent of their time.
    #[serde(default)]
    pub throttle_percentage: u8,
    /// Bytes sent over each data channel, if there are any.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub channel_bytes: Vec<u64>,
    /// The same with pages and speed of each; at a destination what it has received.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub channels: Vec<FerryChannel>,
    /// Bytes of the state of vCPUs and devices, which are none of RAM.
    #[serde(default)]
    pub device_bytes: u64,
    /// Pages that were compressed.
    #[serde(default)]
    pub compressed_pages: u64,
    /// What became of them.
    #[serde(default)]
    pub compressed_bytes: u64,
    /// How long the guest was stopped, once it runs again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<FerryDowntime>,
    /// Why it failed, or what it waits for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Memory that follows after the guest.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub postcopy: Option<FerryPostcopy>,
}

/// Memory that follows after its guest: times in microseconds. What a side does not see is zero there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FerryPostcopy {
    /// Bytes that have not come yet.
    pub missing_bytes: u64,
    /// Bytes that came, or were sent, since the guest ran at the destination.
    pub bytes: u64,
    /// Pages that somebody waited for.
    pub requests: u64,
    /// Pages that the source never had, touched meanwhile.
    pub zero_faults: u64,
    /// Time in which anybody waited.
    pub blocktime: u64,
    /// By thread.
    pub thread_blocktime: BTreeMap<String, u64>,
    /// Half of the waits were shorter.
    pub latency_median: u64,
    /// The longest wait.
    pub latency_max: u64,
    /// Times that lost links were replaced.
    pub recoveries: u32,
    /// Why nothing comes at present.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub paused: Option<String>,
}

/// Where the downtime went, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FerryDowntime {
    /// First vCPU kick here to first KVM_RUN there.
    pub total: u64,
    /// Stopping vCPUs and devices.
    pub stop: u64,
    /// The last pass over RAM.
    pub last_pass: u64,
    /// Reading the state of vCPUs and devices.
    pub device_save: u64,
    /// Sending it.
    pub transfer: u64,
    /// Checking and building it there.
    pub load: u64,
    /// The lease here, once the destination had loaded.
    pub handover: u64,
    /// Lease, images and start there.
    pub resume: u64,
}
