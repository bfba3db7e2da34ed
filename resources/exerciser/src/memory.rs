//! Memory that devices read and write. The guest is mapped one to one, so a pointer is a bus address.

#![allow(unsafe_code)]

use alloc::alloc::{alloc_zeroed, dealloc, handle_alloc_error};
use core::alloc::Layout;
use core::ptr::NonNull;

use crate::mmio::Registers;

/// A page, in bytes: the controller's memory page (CC.MPS = 0) and the unit of the RAM check.
pub const PAGE_BYTES: usize = 4096;

/// Zeroed, page-aligned, physically contiguous memory.
///
/// The slices borrow the buffer, but a device does not know that: it is for the driver to hold none while a
/// command that uses the buffer is with the controller. What a device writes while it is not so held (queue
/// entries, event indexes) is read by [`Dma::load32`] and [`Dma::load64`], which are volatile.
#[derive(Debug)]
pub struct Dma {
    start: NonNull<u64>,
    layout: Layout,
    /// It is memory of a device, and goes back to nobody.
    of_device: bool,
}

// SAFETY: the buffer is owned by the value, like a Box<[u64]>.
unsafe impl Send for Dma {}

impl Dma {
    /// Allocates at least `length_bytes`, rounded up to whole pages. Aborts when memory is exhausted.
    pub fn new(length_bytes: usize) -> Self {
        let length_bytes = length_bytes.max(1).next_multiple_of(PAGE_BYTES);
        let layout =
            Layout::from_size_align(length_bytes, PAGE_BYTES).expect("whole pages are a valid layout");
        // SAFETY: the layout has a size above 0.
        let start = unsafe { alloc_zeroed(layout) };
        match NonNull::new(start.cast()) {
            Some(start) => Self { start, layout, of_device: false },
            None => handle_alloc_error(layout),
        }
    }

    /// Bus address of the first byte.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Length in bytes: whole pages.
    pub fn length_bytes(&self) -> usize {
        self.layout.size()
    }

    /// The memory as 8-byte words.
    pub fn words(&self) -> &[u64] {
        // SAFETY: the allocation, or the piece of a device's memory that nobody else has, is of this length and aligned; any bytes are
        // valid words.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.layout.size() / 8) }
    }

    /// The memory as 8-byte words, to write.
    pub fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as in `words`, and `self` is borrowed for writing.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size() / 8) }
    }

    /// The memory as bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: as in `words`; bytes have no alignment.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr().cast(), self.layout.size()) }
    }

    fn element<T>(&self, index: usize) -> *mut T {
        assert!(index < self.layout.size() / size_of::<T>(), "element {index} is outside the buffer");
        // SAFETY: the element is inside the allocation.
        unsafe { self.start.as_ptr().cast::<T>().add(index) }
    }

    /// Reads the 4-byte word `index`, which a device may be writing.
    pub fn load32(&self, index: usize) -> u32 {
        // SAFETY: `element` checked the bounds, and pages are aligned.
        unsafe { self.element::<u32>(index).read_volatile() }
    }

    /// Writes the 4-byte word `index`, which a device may be reading.
    pub fn store32(&mut self, index: usize, value: u32) {
        // SAFETY: `element` checked the bounds, and pages are aligned.
        unsafe { self.element::<u32>(index).write_volatile(value) }
    }

    /// Reads the 8-byte word `index`, which a device may be writing.
    pub fn load64(&self, index: usize) -> u64 {
        // SAFETY: `element` checked the bounds, and pages are aligned.
        unsafe { self.element::<u64>(index).read_volatile() }
    }

    /// Writes the 8-byte word `index`, which a device may be reading.
    pub fn store64(&mut self, index: usize, value: u64) {
        // SAFETY: `element` checked the bounds, and pages are aligned.
        unsafe { self.element::<u64>(index).write_volatile(value) }
    }
}

/// Memory of a device that is mapped like RAM, to be given out in pieces.
#[derive(Debug)]
pub struct DeviceMemory {
    registers: Registers,
    used_bytes: usize,
}

impl DeviceMemory {
    /// All of `registers`, which nobody else uses.
    pub fn new(registers: Registers) -> Self {
        Self { registers, used_bytes: 0 }
    }

    /// Length in bytes of what was not given out.
    pub fn left_bytes(&self) -> usize {
        self.registers.length_bytes() - self.used_bytes
    }

    /// The next `length_bytes`, rounded up to whole pages, as they are. None when there are fewer.
    pub fn take(&mut self, length_bytes: usize) -> Option<Dma> {
        let length_bytes = length_bytes.max(1).next_multiple_of(PAGE_BYTES);
        let layout = Layout::from_size_align(length_bytes, PAGE_BYTES).ok()?;
        let address = self.registers.base() + self.used_bytes;
        if length_bytes > self.left_bytes() || !address.is_multiple_of(PAGE_BYTES) {
            return None;
        }
        self.used_bytes += length_bytes;
        let start = NonNull::new(core::ptr::with_exposed_provenance_mut(address))?;
        Some(Dma { start, layout, of_device: true })
    }

    /// The same, zeroed.
    pub fn take_zeroed(&mut self, length_bytes: usize) -> Option<Dma> {
        let mut piece = self.take(length_bytes)?;
        piece.words_mut().fill(0);
        Some(piece)
    }
}

impl Drop for Dma {
    fn drop(&mut self) {
        if self.of_device {
            return;
        }
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start.as_ptr().cast(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_device_memory_are_beside_each_other_and_end_with_it() {
        let mut backing = Dma::new(4 * PAGE_BYTES);
        backing.words_mut().fill(7);
        // SAFETY: the buffer lives to the end of this test, which does not look at it by another way meanwhile.
        let registers = unsafe { Registers::new(backing.address() as usize, 4 * PAGE_BYTES) };
        let mut memory = DeviceMemory::new(registers);
        let first = memory.take(1).unwrap();
        let second = memory.take_zeroed(PAGE_BYTES + 1).unwrap();
        assert_eq!((first.address(), first.length_bytes()), (backing.address(), PAGE_BYTES));
        assert_eq!(second.address(), backing.address() + PAGE_BYTES as u64);
        assert_eq!((first.words()[0], second.words()[1023], second.length_bytes()), (7, 0, 2 * PAGE_BYTES));
        assert_eq!(memory.left_bytes(), PAGE_BYTES);
        assert!(memory.take(PAGE_BYTES + 1).is_none());
        assert!(memory.take(PAGE_BYTES).is_some() && memory.take(1).is_none());
    }
}
