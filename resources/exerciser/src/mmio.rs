//! Device registers in memory.

#![allow(unsafe_code)]

/// A block of device registers. Accesses are volatile, naturally aligned and inside the block.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    base: usize,
    length_bytes: usize,
}

impl Registers {
    /// Names the block of `length_bytes` at `base`.
    ///
    /// # Safety
    ///
    /// All of the block must be mapped for as long as the value and its copies live, hold nothing that Rust
    /// owns, and `base` must be aligned to 8 bytes.
    pub const unsafe fn new(base: usize, length_bytes: usize) -> Self {
        Self { base, length_bytes }
    }

    /// Address of the block.
    pub const fn base(&self) -> usize {
        self.base
    }

    /// Length of the block in bytes.
    pub const fn length_bytes(&self) -> usize {
        self.length_bytes
    }

    fn address<T>(&self, offset: usize) -> *mut T {
        let size = size_of::<T>();
        assert!(offset.is_multiple_of(size), "register offset {offset:#x} is not aligned to {size}");
        assert!(
            offset.checked_add(size).is_some_and(|end| end <= self.length_bytes),
            "register offset {offset:#x} is outside the {:#x} bytes of the block",
            self.length_bytes
        );
        (self.base + offset) as *mut T
    }

    /// Reads 4 bytes.
    pub fn read32(&self, offset: usize) -> u32 {
        // SAFETY: `address` checked alignment and bounds, `new` promised the mapping.
        unsafe { self.address::<u32>(offset).read_volatile() }
    }

    /// Writes 4 bytes.
    pub fn write32(&self, offset: usize, value: u32) {
        // SAFETY: `address` checked alignment and bounds, `new` promised the mapping.
        unsafe { self.address::<u32>(offset).write_volatile(value) }
    }

    /// Reads 8 bytes.
    pub fn read64(&self, offset: usize) -> u64 {
        // SAFETY: `address` checked alignment and bounds, `new` promised the mapping.
        unsafe { self.address::<u64>(offset).read_volatile() }
    }

    /// Writes 8 bytes.
    pub fn write64(&self, offset: usize, value: u64) {
        // SAFETY: `address` checked alignment and bounds, `new` promised the mapping.
        unsafe { self.address::<u64>(offset).write_volatile(value) }
    }
}
