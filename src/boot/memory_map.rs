//! Which guest physical memory is RAM, as kernels are told.

use bus::GuestMemory;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::{CONVENTIONAL_END, HIGH_MEMORY};
use crate::layout::{ECAM_LENGTH_BYTES, ECAM_START, KVM_TSS_START};

/// Usable memory, in e820 as in PVH maps.
pub(super) const RAM: u32 = 1;
/// Not to be used, nor to be given to devices.
pub(super) const RESERVED: u32 = 2;

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// First address.
    pub(super) start: u64,
    /// Length in bytes.
    pub(super) length_bytes: u64,
    /// [`RAM`] or [`RESERVED`].
    pub(super) kind: u32,
}

/// The map of `memory`, by address.
pub(super) fn of(memory: &GuestMemory) -> Vec<Entry> {
    let entry = |start: u64, end: u64, kind| Entry { start, length_bytes: end.saturating_sub(start), kind };
    let mut map = vec![
        // The BIOS area of a PC: here it holds the tables. There is RAM behind it.
        entry(CONVENTIONAL_END, HIGH_MEMORY, RESERVED),
        // Linux uses ECAM only where the memory map reserves it.
        entry(ECAM_START, ECAM_START + ECAM_LENGTH_BYTES, RESERVED),
        entry(KVM_TSS_START, KVM_TSS_START + 3 * 4096, RESERVED),
    ];
    for region in memory.iter() {
        let (start, end) =
            (region.start_addr().raw_value(), region.last_addr().raw_value().saturating_add(1));
        map.push(entry(start, end.min(CONVENTIONAL_END), RAM));
        map.push(entry(start.max(HIGH_MEMORY), end, RAM));
    }
    map.retain(|entry| entry.length_bytes > 0);
    map.sort_by_key(|entry| entry.start);
    map
}
