//! Memory of a disk that the guest sees in a BAR, the controller memory buffer and the persistent memory region: a memory slot that follows
//! the BAR.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pci::BarWindow;

use crate::kvm::Vm;
use crate::layout::{PCI_WINDOW_LENGTH_BYTES, PCI_WINDOW_START};
use crate::memory::RamBlock;

/// The BAR of the controller memory buffer.
pub const BUFFER_BAR: u8 = 2;
/// That of the persistent memory region.
pub const REGION_BAR: u8 = 4;

/// Such memory of one controller. Where it has no slot the guest reaches it all the same: its accesses leave the guest.
pub struct Buffer {
    vm: Arc<Vm>,
    block: RamBlock,
    bar: u8,
    state: Mutex<State>,
    /// The log has spoken of KVM's refusal.
    reported: AtomicBool,
}

#[derive(Clone, Copy)]
struct State {
    /// Where the BAR is, if the guest can see it there.
    address: Option<u64>,
    /// The controller shows it.
    shown: bool,
}

impl Buffer {
    /// Memory in BAR `bar`, whose place is not known yet; `shown` says whether the guest is to see it there.
    #[must_use]
    pub fn new(vm: Arc<Vm>, block: RamBlock, bar: u8, shown: bool) -> Self {
        let state = Mutex::new(State { address: None, shown });
        Self { vm, block, bar, state, reported: AtomicBool::new(false) }
    }

    /// The BAR may have moved: so does the slot. Only inside the window for PCI, where nothing else is that the guest relies on.
    pub fn place(&self, bars: &[BarWindow]) {
        let window = PCI_WINDOW_START..=PCI_WINDOW_START + PCI_WINDOW_LENGTH_BYTES;
        let inside = |bar: &BarWindow| {
            let end = bar.address.checked_add(bar.length_bytes);
            window.contains(&bar.address) && end.is_some_and(|end| window.contains(&end))
        };
        let bar = bars.iter().find(|bar| bar.bar == self.bar && bar.decoded && inside(bar));
        let mut state = self.state();
        state.address = bar.map(|bar| bar.address);
        self.settle(*state);
    }

    /// The guest is to see it from now on, or not any more.
    pub fn show(&self, shown: bool) {
        let mut state = self.state();
        state.shown = shown;
        self.settle(*state);
    }

    /// With the lock held, so that the last change counts.
    fn settle(&self, state: State) {
        if let Err(error) = self.vm.place_block(&self.block, state.address.filter(|_| state.shown))
            // Said once: a guest that puts two buffers at one address could otherwise fill the log.
            && !self.reported.swap(true, Ordering::Relaxed)
        {
            log::warn!("{error}");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use bus::GuestMapping;
    use pci::BarKind;

    use super::*;
    use crate::dirty::DirtyTracker;
    use crate::memory::GuestRam;
    use crate::vcpu::tests::TestGuest;

    const BYTES: u64 = 0x1_0000;

    /// Writes to the addresses in a table of two at 0x10000, tells port 0x10, and does so for ever. Its own page is 1.
    const WRITE_BY_TABLE: [u8; 22] = [
        0x8b, 0x1d, 0x00, 0x00, 0x01, 0x00, // mov ebx, [0x10000]
        0xff, 0x03, // inc dword [ebx]
        0x8b, 0x1d, 0x04, 0x00, 0x01, 0x00, // mov ebx, [0x10004]
        0xff, 0x03, // inc dword [ebx]
        0xe7, 0x10, // out 0x10, eax
        0xeb, 0xec, // jmp back
        0x90, 0x90,
    ];

    fn bar(address: u64, decoded: bool) -> [BarWindow; 1] {
        let kind = BarKind::Memory64Prefetchable;
        [BarWindow { bar: BUFFER_BAR, kind, address, length_bytes: BYTES, decoded }]
    }

    fn word(mapping: &GuestMapping, offset: usize) -> u32 {
        use vm_memory::VolatileMemory;
        mapping.get_ref(offset).map(|reference| reference.load()).unwrap()
    }

    #[test]
    fn the_guest_sees_it_where_its_bar_is_and_what_it_writes_is_tracked_wherever_that_is() {
        let guest = TestGuest::with_buffers(1, &WRITE_BY_TABLE, &[("buffer".to_owned(), BYTES)]);
        let block = guest.ram.block("buffer").unwrap().clone();
        let buffer = Buffer::new(Arc::clone(&guest.vm), block.clone(), BUFFER_BAR, true);
        let mapping = Arc::clone(&block.mapping);
        let aim = |first: u64, second: u64| {
            guest.low().write(0x10_000, &(first as u32).to_le_bytes()).unwrap();
            guest.low().write(0x10_004, &(second as u32).to_le_bytes()).unwrap();
        };
        let run = || {
            guest.vcpus.resume().unwrap();
            guest.next_port();
            guest.next_port();
            guest.vcpus.pause().unwrap();
            guest.port_backlog();
        };
        let place = PCI_WINDOW_START + 0x10_0000;
        buffer.place(&bar(place, true));
        aim(place + 0x1000, place + 0x3ffc);
        run();
        assert!(word(&mapping, 0x1000) >= 1 && word(&mapping, 0x3ffc) >= 1);

        let mut tracker = DirtyTracker::start(&guest.vm, &guest.ram).unwrap();
        let pages = |tracker: &mut DirtyTracker| -> Vec<u64> {
            tracker.collect().unwrap()[guest.ram.blocks().len() - 1].runs().flatten().collect()
        };
        assert!(pages(&mut tracker).is_empty());
        run();
        assert_eq!(pages(&mut tracker), [1, 3], "written by the guest");
        assert!(pages(&mut tracker).is_empty());
        // It moves while it is tracked: what was written before, and what is written there, is in some bitmap.
        run();
        let moved = place + 0x20_0000;
        buffer.place(&bar(moved, true));
        let seen = pages(&mut tracker);
        assert!(seen.contains(&1) && seen.contains(&3), "{seen:?}");
        aim(moved + 0x5000, moved + 0x5000);
        pages(&mut tracker);
        let before = word(&mapping, 0x5000);
        run();
        assert!(word(&mapping, 0x5000) > before);
        assert_eq!(pages(&mut tracker), [5]);
        // Taken away, it has no log; and what this process writes counts.
        run();
        buffer.place(&bar(moved, false));
        assert!(pages(&mut tracker).contains(&5));
        block.write(0x7000, &[1]).unwrap();
        assert_eq!(pages(&mut tracker), [7]);
        buffer.place(&bar(place, true));
        aim(place + 0x9000, place + 0x9000);
        pages(&mut tracker);
        run();
        assert_eq!(
            tracker.collect_stopped().unwrap().last().unwrap().runs().flatten().collect::<Vec<_>>(),
            [9]
        );
        drop(tracker);
        buffer.place(&bar(moved, true));
    }

    #[test]
    fn it_takes_no_place_that_is_not_for_pci_or_is_taken() {
        let guest = TestGuest::with_buffers(
            1,
            &WRITE_BY_TABLE,
            &[("first".to_owned(), BYTES), ("second".to_owned(), BYTES)],
        );
        let buffer = |name| {
            Buffer::new(Arc::clone(&guest.vm), guest.ram.block(name).unwrap().clone(), BUFFER_BAR, true)
        };
        let (first, second) = (buffer("first"), buffer("second"));
        let slot_of = |name: &str| guest.ram.block(name).unwrap().kvm_slot.unwrap();
        let is_placed = |name| guest.vm.with_slot(slot_of(name), || ()).is_some();
        for address in
            [0, 0x1_0000, PCI_WINDOW_START - BYTES, PCI_WINDOW_START + PCI_WINDOW_LENGTH_BYTES, 1 << 40]
        {
            first.place(&bar(address, true));
            assert!(!is_placed("first"), "{address:#x}");
        }
        let end = PCI_WINDOW_START + PCI_WINDOW_LENGTH_BYTES - BYTES;
        first.place(&bar(end, true));
        assert!(is_placed("first"));
        second.place(&bar(end, true));
        assert!(!is_placed("second"), "KVM has no two slots at one address");
        first.place(&bar(PCI_WINDOW_START, true));
        second.place(&bar(end, false));
        second.place(&bar(end, true));
        assert!(is_placed("first") && is_placed("second"));
    }

    #[test]
    fn what_is_not_shown_has_no_slot_wherever_its_bar_is() {
        let guest = TestGuest::with_buffers(1, &WRITE_BY_TABLE, &[("region".to_owned(), BYTES)]);
        let block = guest.ram.block("region").unwrap();
        let region = Buffer::new(Arc::clone(&guest.vm), block.clone(), BUFFER_BAR, false);
        let is_placed = || guest.vm.with_slot(block.kvm_slot.unwrap(), || ()).is_some();
        region.show(true);
        assert!(!is_placed(), "nobody knows where");
        region.show(false);
        region.place(&bar(PCI_WINDOW_START, true));
        assert!(!is_placed());
        region.show(true);
        assert!(is_placed());
        region.show(false);
        assert!(!is_placed());
        region.show(true);
        region.place(&bar(PCI_WINDOW_START, false));
        assert!(!is_placed());
    }

    #[test]
    fn buffers_have_slots_after_those_of_ram() {
        let ram = GuestRam::with_buffers(4 << 30, &[("namespace".into(), 4096)], &[("buffer".into(), 4096)])
            .unwrap();
        let slots: Vec<_> =
            ram.blocks().iter().map(|block| (block.guest_base.is_some(), block.kvm_slot)).collect();
        assert_eq!(slots, [(true, Some(0)), (true, Some(1)), (false, None), (false, Some(2))]);
        ram.block("buffer").unwrap().write(0, &[1]).unwrap();
    }
}
