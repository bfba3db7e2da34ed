//! Which pages of guest memory changed: what KVM says that vCPUs wrote, in its log or in their rings, united with the bitmap of what this process wrote
//! (device models, io_uring, preadv).
//!
//! **Take the bitmap first, then read pages.** A page that is written again after its bit was taken is in the next
//! bitmap; a page that was read before its bit was taken may be sent stale and never again.

use std::sync::{Arc, Mutex, PoisonError};

use engine::{PageBitmap, Since};

use crate::kvm::{Error, Vm};
use crate::memory::{GuestRam, RamBlock};

/// Follows writes to every block of a guest's memory. Dropping it ends the tracking.
#[derive(Debug)]
pub struct DirtyTracker {
    vm: Arc<Vm>,
    blocks: Vec<RamBlock>,
    /// A bitmap for each block that was written to before, so that the kernel need not look for memory while the guest stands still.
    spare: Vec<PageBitmap>,
}

impl DirtyTracker {
    /// Begins: from here on every write is seen. What was written before does not count.
    ///
    /// # Errors
    /// [`Error::Call`]; nothing is tracked then.
    pub fn start(vm: &Arc<Vm>, ram: &GuestRam) -> Result<Self, Error> {
        let blocks = ram.blocks().to_vec();
        let tracker = Self { vm: Arc::clone(vm), spare: blocks.iter().map(ready).collect(), blocks };
        let slots = tracker.blocks.iter().filter_map(|block| Some((block.kvm_slot?, block.pages())));
        vm.follow_dirty_rings(slots)?;
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
        self.take(true)?;
        let spare = self.fresh();
        Ok(std::mem::replace(&mut self.spare, spare))
    }

    /// As [`Self::collect`], with every vCPU stopped: since nobody writes, no page need be protected again, which would be most of the
    /// cost. Whoever goes on with it has to take these pages for written until the next [`Self::collect`].
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn collect_stopped(&mut self) -> Result<Vec<PageBitmap>, Error> {
        self.take(false)?;
        Ok(std::mem::take(&mut self.spare))
    }

    fn fresh(&self) -> Vec<PageBitmap> {
        self.blocks.iter().map(ready).collect()
    }

    /// Into what is spare.
    fn take(&mut self, clear: bool) -> Result<(), Error> {
        if self.spare.is_empty() {
            self.spare = self.fresh();
        }
        if clear {
            self.vm.empty_dirty_rings()?;
        } else {
            self.vm.take_dirty_rings()?;
        }
        for (block, bitmap) in self.blocks.iter().zip(&mut self.spare) {
            if let Some(slot) = block.kvm_slot {
                if self.vm.has_dirty_rings() {
                    *bitmap = PageBitmap::from_words(self.vm.dirty_ring_pages(slot), block.pages());
                } else {
                    let length_bytes = block.length_bytes();
                    self.vm.dirty_log(slot, length_bytes, bitmap.words_mut())?;
                    if clear {
                        self.vm.clear_dirty_log(slot, length_bytes, bitmap.words())?;
                    }
                }
            }
            block.mapping.bitmap().take_into(bitmap.words_mut());
        }
        Ok(())
    }
}

/// No page, in memory that is there.
fn ready(block: &RamBlock) -> PageBitmap {
    let mut bitmap = PageBitmap::new(block.pages());
    // Memory that was never written to is the zero page.
    std::hint::black_box(bitmap.words_mut()).fill(0);
    bitmap
}

/// A tracker that goes on between two snapshots, and what is known already. It ends with the machine.
#[derive(Debug, Default)]
pub struct Noted(Mutex<Option<(DirtyTracker, Since)>>);

impl Noted {
    /// Keeps `tracker` and `since`, in the place of others.
    pub fn keep(&self, tracker: DirtyTracker, since: Since) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((tracker, since));
    }

    /// What was kept. Dropping it ends the tracking.
    #[must_use]
    pub fn take(&self) -> Option<(DirtyTracker, Since)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for DirtyTracker {
    fn drop(&mut self) {
        // In this order: what is left in the rings would fill them for good.
        if let Err(error) = self.vm.log_dirty_pages(false).and_then(|()| self.vm.forget_dirty_rings()) {
            log::error!("{error}: {:?}", std::error::Error::source(&error));
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::kvm::{DirtyTracking, Host};
    use crate::vcpu::tests::TestGuest;

    /// Writes to pages 0x10 and 0x12, tells port 0x10, and does so for ever. Its own page is 1.
    const WRITE_TWO_PAGES: [u8; 16] = [
        0xff, 0x05, 0x00, 0x00, 0x01, 0x00, // inc dword [0x10000]
        0xff, 0x05, 0xfc, 0x2f, 0x01, 0x00, // inc dword [0x12ffc]
        0xe7, 0x10, // out 0x10, eax
        0xeb, 0xf0, // jmp back
    ];

    /// Writes to each of 4096 pages from 1 MiB on, tells port 0x10 which, and does so for ever.
    const WRITE_MANY_PAGES: [u8; 27] = [
        0xbf, 0x00, 0x00, 0x10, 0x00, // mov edi, 0x100000
        0xff, 0x07, // inc dword [edi]
        0x89, 0xf8, // mov eax, edi
        0xe7, 0x10, // out 0x10, eax
        0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
        0x81, 0xff, 0x00, 0x00, 0x10, 0x01, // cmp edi, 0x1100000
        0x75, 0xec, // jne inc
        0xeb, 0xe5, // jmp back
    ];
    const FIRST_OF_MANY: u64 = 0x100;
    const MANY: u64 = 4096;

    /// Of both blocks.
    const NOTHING: [[u64; 0]; 2] = [[], []];

    /// A guest for each way to find dirty pages.
    fn for_each_way(test: impl Fn(TestGuest)) {
        for tracking in [DirtyTracking::Log, DirtyTracking::Ring] {
            println!("by {tracking}");
            test(TestGuest::tracked(tracking, 1 << 20, 1024, &WRITE_TWO_PAGES));
        }
    }

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
        for_each_way(|guest| {
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
        });
    }

    /// As from a snapshot to its child: what was found in the stop counts as written, and all else is seen.
    #[test]
    fn tracking_goes_on_after_the_guest_was_stopped() {
        for_each_way(|guest| {
            let mut tracker = DirtyTracker::start(&guest.vm, &guest.ram).unwrap();
            let_it_write(&guest);
            assert_eq!(pages(&tracker.collect().unwrap()), [vec![0x10, 0x12], vec![]]);
            guest.low().write(0x30_000, &[1]).unwrap();
            let known = tracker.collect_stopped().unwrap();
            assert_eq!(pages(&known), [vec![0x30], vec![]]);

            let_it_write(&guest);
            guest.low().write(0x40_000, &[1]).unwrap();
            let mut found = tracker.collect().unwrap();
            found.iter_mut().zip(&known).for_each(|(found, known)| found.union(known));
            assert_eq!(pages(&found), [vec![0x10, 0x12, 0x30, 0x40], vec![]]);

            let_it_write(&guest);
            tracker.collect_stopped().unwrap();
            tracker.collect().unwrap();
            let_it_write(&guest);
            assert_eq!(
                pages(&tracker.collect().unwrap()),
                [vec![0x10, 0x12], vec![]],
                "they are protected again"
            );
        });
    }

    #[test]
    fn tracking_ends_and_begins_again() {
        for_each_way(|guest| {
            drop(DirtyTracker::start(&guest.vm, &guest.ram).unwrap());
            assert!(
                guest.vm.dirty_log(0, 1 << 20, &mut [0; 4]).is_err(),
                "there is no log when nothing is tracked"
            );
            let_it_write(&guest);
            let mut tracker = DirtyTracker::start(&guest.vm, &guest.ram).unwrap();
            assert_eq!(pages(&tracker.collect().unwrap()), NOTHING);
            let_it_write(&guest);
            assert_eq!(pages(&tracker.collect().unwrap()), [vec![0x10, 0x12], vec![]]);
            // What was taken for the last time and never protected again is no matter for the next tracker.
            let_it_write(&guest);
            tracker.collect_stopped().unwrap();
            drop(tracker);
            let_it_write(&guest);
            let mut tracker = DirtyTracker::start(&guest.vm, &guest.ram).unwrap();
            assert_eq!(pages(&tracker.collect().unwrap()), NOTHING);
            let_it_write(&guest);
            assert_eq!(pages(&tracker.collect().unwrap()), [vec![0x10, 0x12], vec![]]);
        });
    }

    /// While the guest runs, every page that it writes is in some bitmap: after the last, all contents are known.
    #[test]
    fn nothing_is_lost_while_the_guest_runs() {
        for_each_way(|guest| {
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
        });
    }

    /// Until it has written all of its 4096 pages.
    fn let_it_write_many(guest: &TestGuest) {
        guest.vcpus.resume().unwrap();
        for page in [FIRST_OF_MANY, FIRST_OF_MANY + MANY - 1] {
            while u64::from(guest.next_value()) != page * 4096 {}
        }
        guest.vcpus.pause().unwrap();
        guest.port_backlog();
    }

    /// More pages than its ring has entries, several times over, with nobody who looks: the vCPU makes room itself. The log finds the
    /// same.
    #[test]
    fn a_ring_that_is_full_loses_nothing() {
        for tracking in [DirtyTracking::Log, DirtyTracking::Ring] {
            let guest = TestGuest::tracked(tracking, 32 << 20, 1024, &WRITE_MANY_PAGES);
            let mut tracker = DirtyTracker::start(&guest.vm, &guest.ram).unwrap();
            let many: Vec<u64> = (FIRST_OF_MANY..FIRST_OF_MANY + MANY).collect();
            for _ in 0..3 {
                let_it_write_many(&guest);
                assert_eq!(pages(&tracker.collect().unwrap()), [many.clone(), vec![]], "by {tracking}");
            }
            let_it_write_many(&guest);
            assert_eq!(pages(&tracker.collect_stopped().unwrap()), [many, vec![]], "by {tracking}");
            drop(tracker);
            let_it_write_many(&guest);
        }
    }

    /// The guest writes without ever leaving to this process. Where KVM interprets it, the ring is overrun; elsewhere nothing is lost.
    #[test]
    fn a_ring_that_is_overrun_says_so_and_the_guest_goes_on_untracked() {
        let mut code = WRITE_MANY_PAGES;
        code[9..11].fill(0x90);
        let guest = TestGuest::tracked(DirtyTracking::Ring, 32 << 20, 1024, &code);
        let mut tracker = DirtyTracker::start(&guest.vm, &guest.ram).unwrap();
        let last = (FIRST_OF_MANY + MANY - 1) * 4096;
        // KVM interprets some ten thousand writes between two looks, beside whatever else the host does.
        let deadline = std::time::Instant::now() + 4 * crate::vcpu::tests::WATCHDOG;
        let not_yet = |what: &str| {
            assert!(
                std::time::Instant::now() < deadline,
                "the guest stands still {what}, after {} exits",
                guest.vcpus.exits()
            );
            std::thread::yield_now();
        };
        guest.vcpus.resume().unwrap();
        // Nobody looks until the vCPU could not go on at least once.
        while guest.vcpus.exits() < 2 && guest.word(last) < 2 {
            not_yet("unobserved");
        }
        let mut all = PageBitmap::for_bytes(32 << 20);
        let outcome = loop {
            match tracker.collect() {
                Ok(bitmaps) => all.union(&bitmaps[0]),
                Err(error) => break Err(error),
            }
            if guest.word(last) >= 2 {
                break Ok(());
            }
            not_yet("tracked");
        };
        match outcome {
            Ok(()) => assert_eq!(all.count(), MANY),
            Err(error) => {
                let overrun = |error| matches!(error, Error::DirtyRingOverrun);
                assert!(Host::open().unwrap().is_paravirtual() && overrun(error));
                assert!(overrun(tracker.collect().unwrap_err()), "it is no better later");
                assert!(overrun(tracker.collect_stopped().unwrap_err()));
                drop(tracker);
                let goes_on = |when: &str| {
                    let before = guest.word(last);
                    while guest.word(last) < before + 2 {
                        not_yet(when);
                    }
                };
                goes_on("untracked");
                assert!(overrun(DirtyTracker::start(&guest.vm, &guest.ram).unwrap_err()), "nor anew");
                goes_on("after the second attempt");
            }
        }
        guest.vcpus.pause().unwrap();
    }

    /// A vCPU whose ring is full hears that another has overrun its own, or that this one was, while others emptied it.
    #[test]
    fn a_ring_that_is_not_full_any_more_is_not_relieved() {
        let guest = TestGuest::tracked(DirtyTracking::Ring, 1 << 20, 1024, &WRITE_TWO_PAGES);
        let mut tracker = DirtyTracker::start(&guest.vm, &guest.ram).unwrap();
        let_it_write(&guest);
        tracker.collect().unwrap();
        let_it_write(&guest);
        tracker.collect_stopped().unwrap();
        guest.vm.overrun_dirty_rings();
        guest.vm.relieve_dirty_ring(0).unwrap();
        let_it_write(&guest);
    }

    #[test]
    fn a_way_that_this_host_has_is_found() {
        let host = Host::open().expect("these tests need /dev/kvm");
        assert!(!Vm::new(&host).unwrap().has_dirty_rings(), "the log is there, and is what is chosen");
        assert!(Vm::with_tracking(&host, DirtyTracking::Ring, None).unwrap().has_dirty_rings());
    }

    /// Writes to the second chunk's first and last page, and to pages of the first and the third, and so on as above.
    const WRITE_FAR_PAGES: [u8; 28] = [
        0xff, 0x05, 0x00, 0x00, 0x01, 0x00, // inc dword [0x10000]
        0xff, 0x05, 0x00, 0x00, 0x00, 0x10, // inc dword [0x10000000]
        0xff, 0x05, 0x00, 0xf0, 0xff, 0x1f, // inc dword [0x1ffff000]
        0xff, 0x05, 0x00, 0x40, 0x80, 0x25, // inc dword [0x25804000]
        0xe7, 0x10, // out 0x10, eax
        0xeb, 0xe4, // jmp back
    ];

    /// A log of more pages than one call clears, and not a multiple of 64: every chunk is cleared, and what is written there afterwards
    /// is seen again. What one call clears is tested where that is done.
    #[test]
    fn large_blocks_are_cleared_in_chunks() {
        let memory_bytes = (600 << 20) + 5 * 4096;
        let guest = TestGuest::tracked(DirtyTracking::Log, memory_bytes, 1024, &WRITE_FAR_PAGES);
        let far = [vec![0x10, 0x1_0000, 0x1_ffff, memory_bytes / 4096 - 1], vec![]];
        let mut tracker = DirtyTracker::start(&guest.vm, &guest.ram).unwrap();
        assert_eq!(pages(&tracker.collect().unwrap()), NOTHING);
        for _ in 0..2 {
            let_it_write(&guest);
            assert_eq!(pages(&tracker.collect().unwrap()), far);
            assert_eq!(pages(&tracker.collect().unwrap()), NOTHING);
        }
    }
}
