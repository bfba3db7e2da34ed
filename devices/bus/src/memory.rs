//! Guest memory as every device sees it.

use dirty_bitmap::DirtyBitmap;
use vm_memory::bitmap::MS;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion, VolatileSlice,
};

/// Pages that this process wrote: one bit a page of 4096 bytes. `Bytes` writes set it; whoever lets the kernel
/// write (io_uring, preadv) sets it after completion, before the guest is told.
pub type GuestBitmap = DirtyBitmap;

/// One mapping of guest memory, with its bitmap.
pub type GuestMapping = MmapRegion<GuestBitmap>;

/// A mapping at its guest physical address.
pub type GuestRegion = GuestRegionMmap<GuestBitmap>;

/// All RAM of a guest.
pub type GuestMemory = GuestMemoryMmap<GuestBitmap>;

/// A run of guest physical memory: `[address, address + length_bytes)`. Untrusted until it was resolved
/// against a [`GuestMemory`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First byte.
    pub address: GuestAddress,
    /// Length in bytes.
    pub length_bytes: u32,
}

/// The `length_bytes` bytes of `memory` at `address`, if one region holds them all, as it does whatever is aligned to its own size or
/// lies in one page. `None` also where there is no memory. A third of the instructions of the accesses by [`vm_memory::Bytes`], which
/// provide for any number of regions: for the words and entries that every command touches.
#[inline]
#[must_use]
pub fn in_one_region(
    memory: &GuestMemory,
    address: GuestAddress,
    length_bytes: usize,
) -> Option<VolatileSlice<'_, MS<'_, GuestMemory>>> {
    let region = memory.find_region(address)?;
    let offset = address.0.checked_sub(region.start_addr().0)?;
    region.get_slice(MemoryRegionAddress(offset), length_bytes).ok()
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;
    use vm_memory::bitmap::Bitmap;

    use super::*;

    #[test]
    fn a_run_is_found_where_one_region_has_all_of_it() {
        let regions =
            [(GuestAddress(0x1000), 0x2000), (GuestAddress(0x3000), 0x1000), (GuestAddress(0x8000), 0x1000)];
        let memory = GuestMemory::from_ranges(&regions).unwrap();
        memory.write_obj(0x1234_5678_u32, GuestAddress(0x3ffc)).unwrap();
        let found = |address, length| in_one_region(&memory, GuestAddress(address), length);
        assert_eq!(
            found(0x3ffc, 4).unwrap().load::<u32>(0, std::sync::atomic::Ordering::Relaxed).unwrap(),
            0x1234_5678
        );
        assert_eq!(found(0x1000, 0x2000).unwrap().len(), 0x2000);
        for (address, length) in
            [(0xfff, 1), (0x2fff, 2), (0x3ffd, 4), (0x4000, 1), (0x9000, 1), (u64::MAX, 1)]
        {
            assert!(found(address, length).is_none(), "{address:#x} and {length} bytes");
        }
    }

    #[test]
    fn what_is_written_there_is_dirty() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0x1000), 0x3000)]).unwrap();
        let slice = in_one_region(&memory, GuestAddress(0x2ffc), 4).unwrap();
        slice.store(7_u32, 0, std::sync::atomic::Ordering::Release).unwrap();
        let region = memory.find_region(GuestAddress(0x1000)).unwrap();
        assert_eq!([0, 0x1000, 0x2000].map(|offset| region.bitmap().dirty_at(offset)), [false, true, false]);
    }
}
