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

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::vcpu::tests::TestGuest;

    /// Writes to pages 0x10 and 0x12, tells port 0x10, and does so for ever. Its own page is 1.
    const WRITE_TWO_PAGES: [u8; 16] = [
        0xff, 0x05, 0x00, 0x00, 0x01, 0x00, // inc dword [0x10000]
        0xff, 0x05, 0xfc, 0x2f, 0x01, 0x00, // inc dword [0x12ffc]
        0xe7, 0x10, // out 0x10, eax
        0xeb, 0xf0, // jmp back
    ];

    /// Of both blocks.
    const NOTHING: [[u64; 0]; 2] = [[], []];

    fn pages(bitmaps: &[PageBitmap]) -> Vec<Vec<u64>> {
        bitmaps.iter().map(|bitmap| bitmap.runs().flatten().collect()).collect()
    }

    /// At least one whole round: it may have been stopped in the middle of one, and will be again.
    fn let_it_write(guest: &TestGuest) {
        guest.vcpus.resume().unwrap();
        guest.next_port();
        guest.next_port();
        guest.vcpus.pause().unwrap();
        guest.port_backlog();
    }

    #[test]
    fn writes_of_the_guest_and_of_this_process_are_united() {
        let guest = TestGuest::new(1, &WRITE_TWO_PAGES);
        let_it_write(&guest);
        guest.low().write(0x9000, &[1]).unwrap();
        let mut tracker = DirtyTracker::start(&guest.vm, &guest.ram).unwrap();
        assert_eq!(pages(&tracker.collect().unwrap()), NOTHING, "what was written before does not count");

        let_it_write(&guest);
        guest.ram.memory().write_slice(&[1; 0x1001], GuestAddress(0x20_000)).unwrap();
        guest.ram.block("namespace-A-1").unwrap().write(0xffff, &[1]).unwrap();
        assert_eq!(pages(&tracker.collect().unwrap()), [vec![0x10, 0x12, 0x20, 0x21], vec![0xf]]);
        assert_eq!(pages(&tracker.collect().unwrap()), NOTHING, "each write is reported once");

        // Again, so that clearing has protected the pages again.
        let_it_write(&guest);
        assert_eq!(pages(&tracker.collect().unwrap()), [vec![0x10, 0x12], vec![]]);

        let_it_write(&guest);
        guest.low().write(0x30_000, &[1]).unwrap();
        assert_eq!(pages(&tracker.collect_stopped().unwrap()), [vec![0x10, 0x12, 0x30], vec![]]);
    }

    #[test]
    fn tracking_ends_and_begins_again() {
        let guest = TestGuest::new(1, &WRITE_TWO_PAGES);
        drop(DirtyTracker::start(&guest.vm, &guest.ram).unwrap());
        assert!(guest.vm.dirty_log(0, 1 << 20).is_err(), "there is no log when nothing is tracked");
        let_it_write(&guest);
        let mut tracker = DirtyTracker::start(&guest.vm, &guest.ram).unwrap();
        assert_eq!(pages(&tracker.collect().unwrap()), NOTHING);
        let_it_write(&guest);
        assert_eq!(pages(&tracker.collect().unwrap()), [vec![0x10, 0x12], vec![]]);
    }

    /// While the guest runs, every page that it writes is in some bitmap: after the last, all contents are known.
    #[test]
    fn nothing_is_lost_while_the_guest_runs() {
        let guest = TestGuest::new(1, &WRITE_TWO_PAGES);
        let mut tracker = DirtyTracker::start(&guest.vm, &guest.ram).unwrap();
        guest.vcpus.resume().unwrap();
        let mut copy = vec![0; 1 << 20];
        guest.low().read(0, &mut copy).unwrap();
        let mut update = |bitmap: &PageBitmap| {
            for page in bitmap.runs().flatten() {
                let start = page as usize * 4096;
                guest.low().read(start as u64, &mut copy[start..start + 4096]).unwrap();
            }
        };
        for _ in 0..200 {
            guest.next_port();
            update(&tracker.collect().unwrap()[0]);
        }
        guest.vcpus.pause().unwrap();
        update(&tracker.collect_stopped().unwrap()[0]);
        let mut now = vec![0; 1 << 20];
        guest.low().read(0, &mut now).unwrap();
        assert!(copy == now, "the copy lacks writes");
        assert!(guest.word(0x10_000) >= 200);
    }

    /// A log of more pages than one call clears, and not a multiple of 64.
    #[test]
    fn large_blocks_are_cleared_in_chunks() {
        let host = crate::kvm::Host::open().expect("these tests need /dev/kvm");
        let vm = Vm::new(&host).unwrap();
        let ram = GuestRam::new((600 << 20) + 5 * 4096, &[]).unwrap();
        vm.map_ram(&ram).unwrap();
        let mut tracker = DirtyTracker::start(&vm, &ram).unwrap();
        assert_eq!(pages(&tracker.collect().unwrap()), [[]; 1] as [[u64; 0]; 1]);
    }
}
