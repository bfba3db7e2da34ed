//! Guest memory as every device sees it.

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Pages that this process wrote: one bit a page of 4096 bytes. `Bytes` writes set it; whoever lets the kernel
/// write (io_uring, preadv) sets it after completion, before the guest is told.
pub type GuestBitmap = AtomicBitmap;

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
