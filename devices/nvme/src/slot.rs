//! Commands in flight of a worker: whose they are, and the backend requests that they still need.

use block::Operation;
use nvme_spec::Status;

use crate::exclusion::ByteRange;
use crate::metadata::NO_JOB;
use crate::namespace::NamespaceTable;

/// Whose command a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The slot is free.
    Nobody,
    /// The submission queue with this index.
    Queue(u32),
    /// An admin command or the controller itself, by a token that goes into `Worker::admin_ended`.
    Admin(u32),
    /// The queue is gone (reset); the end is noted and dropped.
    Orphan,
}

impl Owner {
    /// The namespaces that its requests go to: operations of the controller go to those that are not attached, too.
    pub fn reaches<'a>(
        self,
        attached: &'a NamespaceTable,
        allocated: &'a NamespaceTable,
    ) -> &'a NamespaceTable {
        if matches!(self, Self::Admin(_)) { allocated } else { attached }
    }
}

/// A backend request that a command still needs. Commands of several requests have one at a time in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub nsid: u32,
    pub operation: Operation,
    pub offset_bytes: u64,
    pub length_bytes: u64,
}

impl Step {
    /// Whether it reads or writes something of `range`.
    fn touches(&self, range: &ByteRange) -> bool {
        let is_in = |first: u64| {
            ByteRange { nsid: self.nsid, first, end: first.saturating_add(self.length_bytes) }.overlaps(range)
        };
        match self.operation {
            Operation::Flush => false,
            Operation::Copy { source_offset_bytes, .. } => {
                is_in(self.offset_bytes) || is_in(source_offset_bytes)
            }
            _ => is_in(self.offset_bytes),
        }
    }
}

/// A command in flight.
#[derive(Debug)]
pub(crate) struct Slot {
    pub owner: Owner,
    /// Counts uses, so that a token of an earlier use is recognised.
    pub generation: u32,
    pub cid: u16,
    pub nsid: u32,
    /// For the error log.
    pub lba: u64,
    pub write: bool,
    /// The request in flight.
    pub running: Step,
    /// Dword 0 of the completion, if the command fails: ranges that were copied.
    pub copied: u32,
    /// A request that fails does not end the command: the others are made all the same.
    pub goes_on: bool,
    /// Its namespace is gone or smaller by now, and whoever changed it waits for the end.
    pub drains: bool,
    /// A Preempt and Abort waits for its end.
    pub preempted: bool,
    /// The first failure of its requests.
    pub status: Status,
    /// Requests to make after the one in flight, last first.
    pub steps: Vec<Step>,
    /// What it does to blocks with metadata, or [`NO_JOB`].
    pub job: u32,
}

impl Slot {
    /// A slot that holds no command.
    pub fn free() -> Self {
        Self {
            owner: Owner::Nobody,
            generation: 0,
            cid: 0,
            nsid: 0,
            lba: 0,
            write: false,
            running: flush_step(0),
            copied: 0,
            goes_on: false,
            drains: false,
            preempted: false,
            status: Status::SUCCESS,
            steps: Vec::new(),
            job: NO_JOB,
        }
    }

    /// Whether its command reads or writes something of `range`.
    pub fn touches(&self, range: &ByteRange) -> bool {
        self.owner != Owner::Nobody
            && (self.running.touches(range) || self.steps.iter().any(|step| step.touches(range)))
    }
}

/// A request that makes stable what a namespace's cache holds.
pub(crate) fn flush_step(nsid: u32) -> Step {
    Step { nsid, operation: Operation::Flush, offset_bytes: 0, length_bytes: 0 }
}

/// Whether `operation` may end before what it wrote is stable.
pub(crate) fn is_cached(operation: Operation) -> bool {
    matches!(
        operation,
        Operation::Write { fua: false }
            | Operation::WriteZeroes { fua: false, .. }
            | Operation::Fill { .. }
            | Operation::Copy { fua: false, .. }
    )
}
