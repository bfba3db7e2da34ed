//! Threads of this process that wait for memory which is not here yet.
//!
//! Whoever touches missing memory waits in the kernel, which on some hosts does not let a signal through meanwhile. Such a thread does
//! nothing until its page comes, and one that was told to stop does nothing then either: it counts as one that has stopped.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// By thread: the block and the first byte of the page.
type Pages = BTreeMap<u32, (usize, u64)>;

/// Who waits for what. Told by whoever brings pages.
#[derive(Debug, Default)]
pub struct Waiters {
    pages: Mutex<Pages>,
    changed: Condvar,
}

impl Waiters {
    /// `thread` waits for the page at `offset` of a block. One that cannot be named (0) is not noted.
    pub fn add(&self, thread: u32, block: usize, offset: u64) {
        if thread != 0 {
            self.pages().insert(thread, (block, offset));
        }
    }

    /// These bytes of a block are there: whoever waited for them goes on.
    pub fn serve(&self, block: usize, bytes: &Range<u64>) {
        self.pages().retain(|_, (waited_for, offset)| *waited_for != block || !bytes.contains(offset));
        self.changed.notify_all();
    }

    /// Nothing is missing any more.
    pub fn serve_all(&self) {
        self.pages().clear();
        self.changed.notify_all();
    }

    /// Whether `thread` waits.
    #[must_use]
    pub fn has(&self, thread: u32) -> bool {
        self.pages().contains_key(&thread)
    }

    /// Whether nobody waits, within `time`.
    #[must_use]
    pub fn end_within(&self, time: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.pages(), time, |pages| !pages.is_empty());
        waited.unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_waits_until_its_page_is_there() {
        let waiters = Waiters::default();
        waiters.add(7, 1, 0x3000);
        waiters.add(7, 1, 0x3000);
        waiters.add(8, 0, 0x3000);
        waiters.add(0, 0, 0);
        waiters.serve(1, &(0..0x3000));
        assert_eq!([7, 8, 0].map(|thread| waiters.has(thread)), [true, true, false]);
        waiters.serve(1, &(0x1000..0x9000));
        assert_eq!([7, 8].map(|thread| waiters.has(thread)), [false, true]);
        assert!(!waiters.end_within(Duration::ZERO));
        waiters.serve_all();
        assert!(waiters.end_within(Duration::ZERO));
    }
}
