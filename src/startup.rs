//! How long this process took until its first guest ran: from `main` to the first `KVM_RUN`, and where that went.
//!
//! KVM's first memory slot is told apart: what it costs is the host's, and does not depend on the guest or its memory.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

static BEGUN: OnceLock<Instant> = OnceLock::new();
static FIRST_MEMORY_SLOT: OnceLock<Duration> = OnceLock::new();
static FIRST_RUN: OnceLock<Instant> = OnceLock::new();
static DONE: [OnceLock<Instant>; STEPS] = [const { OnceLock::new() }; STEPS];

const STEPS: usize = 6;

/// What is done until the guest runs, in this order. A guest that boots has no file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The command line is read, KVM, console and control socket are there.
    Process,
    /// The machine is built: memory, vCPUs, threads, devices.
    Machine,
    /// Everything of the guest's file but its memory is read and verified.
    File,
    /// Its memory can be touched.
    Memory,
    /// Devices and vCPUs are loaded.
    Devices,
    /// The guest is this process's: images are locked, the lease is written.
    Ownership,
}

/// What it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// From the first statement of `main` to the first `KVM_RUN`.
    pub total: Duration,
    /// What of that KVM took for the first memory slot.
    pub first_memory_slot: Duration,
    /// Until the process was ready to begin.
    pub process: Duration,
    /// To build the machine; the first memory slot is a part of it.
    pub machine: Duration,
    /// To compare the guest's file with the machine, and what reading and verifying it without its memory took longer than the machine: the
    /// one is done beside the other.
    pub file: Duration,
    /// To make its memory such that it can be touched.
    pub memory: Duration,
    /// To load devices and vCPUs.
    pub devices: Duration,
    /// To lock the images and to write the lease; a guest that boots is put into memory then.
    pub ownership: Duration,
    /// To let it run.
    pub resume: Duration,
}

/// The first statement of `main`.
pub fn begin() {
    BEGUN.get_or_init(Instant::now);
}

/// `step` is done; the first time counts.
pub(crate) fn done(step: Step) {
    DONE[step as usize].get_or_init(Instant::now);
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
    let done = DONE.each_ref().map(|done| done.get().copied());
    let first_memory_slot = FIRST_MEMORY_SLOT.get().copied().unwrap_or_default();
    Some(Report { first_memory_slot, ..split(*BEGUN.get()?, done, *FIRST_RUN.get()?) })
}

/// Each step from the end of the one before; one that was left out took no time.
fn split(begun: Instant, done: [Option<Instant>; STEPS], first_run: Instant) -> Report {
    let mut last = begun;
    let mut since = |end: Option<Instant>| {
        let end = end.unwrap_or(last);
        end.saturating_duration_since(std::mem::replace(&mut last, end))
    };
    let [process, machine, file, memory, devices, ownership] = done.map(&mut since);
    Report {
        total: first_run.saturating_duration_since(begun),
        first_memory_slot: Duration::ZERO,
        process,
        machine,
        file,
        memory,
        devices,
        ownership,
        resume: since(Some(first_run)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_on_each_other_and_sum_up_to_all() {
        let begun = Instant::now();
        let at = |milliseconds| Some(begun + Duration::from_millis(milliseconds));
        let time = Duration::from_millis;
        let all = split(begun, [at(1), at(3), at(6), at(10), at(15), at(21)], begun + time(28));
        let Report {
            total,
            first_memory_slot: _,
            process,
            machine,
            file,
            memory,
            devices,
            ownership,
            resume,
        } = all;
        let parts = [process, machine, file, memory, devices, ownership, resume];
        assert_eq!(parts, [1, 2, 3, 4, 5, 6, 7].map(time));
        assert_eq!((total, parts.iter().sum()), (time(28), time(28)));
    }

    #[test]
    fn a_guest_that_boots_has_no_file() {
        let begun = Instant::now();
        let at = |milliseconds| Some(begun + Duration::from_millis(milliseconds));
        let time = Duration::from_millis;
        let booted = split(begun, [at(1), at(3), None, None, None, at(9)], begun + time(10));
        assert_eq!((booted.file, booted.memory, booted.devices), Default::default());
        assert_eq!((booted.machine, booted.ownership, booted.resume), (time(2), time(6), time(1)));
        assert_eq!(Step::Ownership as usize, STEPS - 1);
    }
}
