//! What a ring asks of the kernel and hears from it, noted for tests in the order in which it happens.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Segment;
use crate::transfer::Step;

/// An entry of the submission queue, with its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Read,
    Write { offset_bytes: u64, data: Vec<u8>, stable: bool },
    Allocate { offset_bytes: u64, length_bytes: u64 },
    Synchronize,
}

/// One moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// The entry of slot `slot` was queued.
    Queued { slot: u32, call: Call },
    /// Its completion was reaped.
    Ended { slot: u32, result: i32 },
    /// A request was reported as ended.
    Told { token: u64, success: bool },
}

/// All moments of a ring.
#[derive(Clone, Debug, Default)]
pub(crate) struct Journal(Arc<Mutex<Vec<Moment>>>);

impl Journal {
    pub(crate) fn moments(&self) -> MutexGuard<'_, Vec<Moment>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn note(&self, moment: Moment) {
        self.moments().push(moment);
    }

    pub(super) fn note_step(&self, slot: u32, step: &Step<'_>) {
        let call = match *step {
            Step::Read { .. } => Call::Read,
            Step::Write { segments, offset_bytes, stable } => {
                Call::Write { offset_bytes, data: bytes_of(segments), stable }
            }
            Step::Allocate { offset_bytes, length_bytes, .. } => {
                Call::Allocate { offset_bytes, length_bytes }
            }
            Step::Synchronize => Call::Synchronize,
        };
        self.note(Moment::Queued { slot, call });
    }
}

fn bytes_of(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments {
        let start = std::ptr::with_exposed_provenance::<u8>(segment.address);
        // SAFETY: the segment lies in guest memory or in a bounce buffer, which live as long as the ring; the test's guest does not
        // write there while its command is in flight.
        bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(start, segment.length) });
    }
    bytes
}
