//! Which pages of guest memory changed: KVM's log of what vCPUs wrote, united with the bitmap of what this process wrote
//! (device models, io_uring, preadv).
//!
//! **Take the bitmap first, then read pages.** A page that is written again after its bit was taken is in the next
//! bitmap; a page that was read before its bit was taken may be sent stale and never again.

use std::sync::Arc;

use engine::PageBitmap;

use crate::kvm::{Error, Vm};
use crate::memory::{GuestRam, RamBlock};

/// Follows writes to every block of a guest's memory. Dropping it ends the tracking.
#[derive(Debug)]
pub struct DirtyTracker {
    vm: Arc<Vm>,
    blocks: Vec<RamBlock>,
}

impl DirtyTracker {
    /// Begins: from here on every write is seen. What was written before does not count.
    ///
    /// # Errors
    /// [`Error::Call`]; nothing is tracked then.
    pub fn start(vm: &Arc<Vm>, ram: &GuestRam) -> Result<Self, Error> {
        let tracker = Self { vm: Arc::clone(vm), blocks: ram.blocks().to_vec() };
        vm.log_dirty_pages(true)?;
        for block in &tracker.blocks {
            block.mapping.bitmap().reset();
            if let Some(slot) = block.kvm_slot
                && vm.log_starts_full()
            {
                // KVM protected nothing yet. Clearing everything does it, in chunks between which the guest gets on,
                // instead of at once under one lock.
                let words =
                    usize::try_from(block.pages().div_ceil(64)).expect("a mapped block's bitmap fits usize");
                vm.clear_dirty_log(slot, block.length_bytes(), &vec![u64::MAX; words])?;
            }
        }
        Ok(tracker)
    }

    /// Takes and clears the pages that were written since the last call: one bitmap for each of
    /// [`GuestRam::blocks`], in that order.
    ///
    /// # Errors
    /// [`Error::Call`]. Pages may then be lost: begin anew.
    pub fn collect(&mut self) -> Result<Vec<PageBitmap>, Error> {
        self.take(true)
    }

    /// As [`Self::collect`], for the last time, with every vCPU stopped: since nobody writes, KVM's log need not be
    /// cleared, which would be most of the cost. Afterwards only dropping it makes sense.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn collect_stopped(&mut self) -> Result<Vec<PageBitmap>, Error> {
        self.take(false)
    }

    fn take(&mut self, clear: bool) -> Result<Vec<PageBitmap>, Error> {
        let take_block = |block: &RamBlock| {
            let pages = block.pages();
            let mut bitmap = PageBitmap::from_words(block.mapping.bitmap().get_and_reset(), pages);
            if let Some(slot) = block.kvm_slot {
                let log = self.vm.dirty_log(slot, block.length_bytes())?;
                if clear {
                    self.vm.clear_dirty_log(slot, block.length_bytes(), &log)?;
                }
                bitmap.union(&PageBitmap::from_words(log, pages));
            }
            Ok(bitmap)
        };
        self.blocks.iter().map(take_block).collect()
    }
}

impl Drop for DirtyTracker {
    fn drop(&mut self) {
        if let Err(error) = self.vm.log_dirty_pages(false) {
            log::error!("{error}: {:?}", std::error::Error::source(&error));
        }
    }
}
