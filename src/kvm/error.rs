//! What can go wrong between this process and KVM.

use std::path::PathBuf;

use vmm_sys_util::errno;

/// Why KVM, a VM or a vCPU did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such device.
    #[error("{0} does not exist: this machine offers no KVM (module not loaded, or virtualisation is off)")]
    NoKvm(PathBuf),
    /// The device is there, but not for us.
    #[error("no permission to open {0}: add this user to the group that owns it")]
    NoPermission(PathBuf),
    /// Any other failure to open it.
    #[error("cannot open {path}")]
    Open {
        /// The device.
        path: PathBuf,
        /// Why.
        source: errno::Error,
    },
    /// Something is there that is not KVM, or not this KVM.
    #[error("{path} speaks KVM API version {found}, not 12: it is not a usable KVM")]
    ApiVersion {
        /// The device.
        path: PathBuf,
        /// What it answered.
        found: i32,
    },
    /// The kernel is too old or built without something that this VMM needs.
    #[error("{path} lacks what this program needs: {missing}")]
    MissingCapabilities {
        /// The device.
        path: PathBuf,
        /// Names of the capabilities.
        missing: String,
    },
    /// A call failed.
    #[error("KVM: cannot {what}")]
    Call {
        /// What was tried, with its values.
        what: String,
        /// Why.
        source: errno::Error,
    },
    /// KVM did not stop a vCPU whose dirty ring was full.
    #[error(
        "KVM has overrun a dirty ring, so that dirty pages are lost: this machine cannot move any more, and must be started with --dirty-tracking log to"
    )]
    DirtyRingOverrun,
    /// More vCPUs than KVM takes.
    #[error("{asked} vCPUs asked for; KVM on this host takes 1 to {limit}")]
    VcpuCount {
        /// How many.
        asked: u32,
        /// How many are possible.
        limit: u32,
    },
    /// A model of processor that this host cannot be.
    #[error("--cpu {model}: this host's KVM lacks {lacking}")]
    CpuModel {
        /// The model.
        model: String,
        /// All that it lacks.
        lacking: String,
    },
    /// All interrupt numbers are in use.
    #[error("{asked} more MSI vectors asked for; KVM's interrupt table of {limit} entries has {free} left")]
    OutOfRoutes {
        /// How many.
        asked: usize,
        /// Free ones.
        free: usize,
        /// Size of the table.
        limit: usize,
    },
    /// Saved state that this machine cannot take.
    #[error("vCPU {vcpu}: saved state does not fit: {why}")]
    VcpuState {
        /// Which vCPU.
        vcpu: u32,
        /// The field, its value, and what is possible.
        why: String,
    },
    /// Saved state of the interrupt controllers or the timer that no such device can have.
    #[error("{device}: saved state is impossible: {why}")]
    DeviceState {
        /// The device.
        device: &'static str,
        /// The field, its value, and what is possible.
        why: String,
    },
    /// A vCPU thread cannot be started.
    #[error("cannot start the thread of vCPU {vcpu}")]
    Spawn {
        /// Which vCPU.
        vcpu: u32,
        /// Why.
        source: std::io::Error,
    },
    /// The thread that slows vCPUs down cannot be started.
    #[error("cannot start the thread that slows vCPUs down")]
    Throttle(#[source] std::io::Error),
    /// A vCPU thread is gone (it panicked or was shut down).
    #[error("the thread of vCPU {0} is gone")]
    ThreadGone(u32),
    /// A vCPU does not come out of the guest or of a device model.
    #[error("vCPU {vcpu} did not answer within {after:?}")]
    Unresponsive {
        /// Which vCPU.
        vcpu: u32,
        /// How long it was waited for.
        after: std::time::Duration,
    },
    /// Saved states for another number of vCPUs.
    #[error("{saved} vCPUs were saved; this machine has {here}")]
    StateCount {
        /// In the saved state.
        saved: u32,
        /// Here.
        here: u32,
    },
    /// Asked of a vCPU that runs.
    #[error("vCPU {vcpu} must be paused to {what}")]
    NotPaused {
        /// Which vCPU.
        vcpu: u32,
        /// What was asked.
        what: &'static str,
    },
    /// KVM gave up on the guest.
    #[error("vCPU {vcpu} cannot go on at {rip:#x}: {why}")]
    Stuck {
        /// Which vCPU.
        vcpu: u32,
        /// Its instruction pointer.
        rip: u64,
        /// The exit and its details.
        why: String,
    },
}

impl Error {
    /// For `map_err`: a failed call, described.
    pub(crate) fn call(what: impl Into<String>) -> impl FnOnce(errno::Error) -> Self {
        move |source| Self::Call { what: what.into(), source }
    }
}
