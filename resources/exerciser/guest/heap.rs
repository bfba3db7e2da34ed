//! Memory after the image, handed out upwards and never taken back: the exerciser allocates at its start only.

use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicUsize, Ordering};

/// The allocator. One processor and no allocation in interrupts: the atomics are for `Sync` only.
pub struct Heap {
    next: AtomicUsize,
    end: AtomicUsize,
}

impl Heap {
    pub const fn new() -> Self {
        Self { next: AtomicUsize::new(0), end: AtomicUsize::new(0) }
    }

    /// Gives the heap its memory: RAM that nothing else uses. After a reset it is not zero.
    pub fn give(&self, start: u64, end: u64) {
        self.next.store(start as usize, Ordering::Relaxed);
        self.end.store(end as usize, Ordering::Relaxed);
    }
}

// SAFETY: each allocation is its own piece between `next` and `end`, aligned as asked.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let start = self.next.load(Ordering::Relaxed).checked_next_multiple_of(layout.align());
        let piece = start.and_then(|start| Some((start, start.checked_add(layout.size())?)));
        match piece {
            Some((start, end)) if end <= self.end.load(Ordering::Relaxed) => {
                self.next.store(end, Ordering::Relaxed);
                core::ptr::with_exposed_provenance_mut(start)
            }
            _ => core::ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, _start: *mut u8, _layout: Layout) {}
}
