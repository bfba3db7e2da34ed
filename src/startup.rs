//! How long this process took until its first guest ran: from `main` to the first `KVM_RUN`.
//!
//! KVM's first memory slot is told apart: what it costs is the host's, and does not depend on the guest or its memory.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

static BEGUN: OnceLock<Instant> = OnceLock::new();
static FIRST_MEMORY_SLOT: OnceLock<Duration> = OnceLock::new();
static FIRST_RUN: OnceLock<Instant> = OnceLock::new();

/// What it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// From the first statement of `main` to the first `KVM_RUN`.
    pub total: Duration,
    /// What of that KVM took for the first memory slot.
    pub first_memory_slot: Duration,
}

/// The first statement of `main`.
pub fn begin() {
    BEGUN.get_or_init(Instant::now);
}

/// KVM has taken `time` for a memory slot; the first one counts.
pub(crate) fn memory_slot(time: Duration) {
    FIRST_MEMORY_SLOT.get_or_init(|| time);
}

/// A vCPU is about to run; the first time counts.
pub(crate) fn vcpu_runs() {
    FIRST_RUN.get_or_init(Instant::now);
}

/// What it took; nothing before a guest has run, or in a process that did not say that it began.
#[must_use]
pub fn report() -> Option<Report> {
    let total = FIRST_RUN.get()?.duration_since(*BEGUN.get()?);
    Some(Report { total, first_memory_slot: FIRST_MEMORY_SLOT.get().copied().unwrap_or_default() })
}
