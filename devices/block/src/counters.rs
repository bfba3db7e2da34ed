//! What a context asks of the kernel, counted for whoever watches: a system call counts for more than its counter costs.

use std::sync::atomic::{AtomicU64, Ordering};

/// System calls of one [`crate::IoContext`], readable by other threads.
#[derive(Debug, Default)]
pub struct KernelCounters {
    enters: AtomicU64,
    entries: AtomicU64,
}

impl KernelCounters {
    /// Calls of io_uring_enter.
    #[must_use]
    pub fn enters(&self) -> u64 {
        self.enters.load(Ordering::Relaxed)
    }

    /// Entries that the kernel took, in all of them together.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    pub(crate) fn note_enter(&self) {
        self.enters.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_entries(&self, count: u32) {
        self.entries.fetch_add(count.into(), Ordering::Relaxed);
    }
}
