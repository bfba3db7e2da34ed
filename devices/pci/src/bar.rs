//! Base address registers.

/// BARs of a type 0 header.
pub(crate) const BAR_COUNT: usize = 6;
/// Offset of BAR 0 in configuration space.
pub(crate) const BAR_OFFSET: usize = 0x10;

/// What a BAR decodes. All are memory BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// 32-bit, not prefetchable.
    Memory32,
    /// 64-bit, not prefetchable; takes this BAR and the next.
    Memory64,
    /// 64-bit, prefetchable: memory without side effects.
    Memory64Prefetchable,
}

/// A BAR and where the guest has put it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarWindow {
    /// Index, 0 to 5.
    pub bar: u8,
    /// Kind.
    pub kind: BarKind,
    /// Address that the BAR holds now; means something only if `decoded`, since sizing writes all ones.
    pub address: u64,
    /// Size in bytes, a power of two.
    pub length_bytes: u64,
    /// The function answers to this address: memory decoding is on and the function is in D0.
    pub decoded: bool,
}

/// Kind and size of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bar {
    pub kind: BarKind,
    pub length_bytes: u64,
}

impl BarKind {
    /// Whether it takes two registers.
    pub(crate) fn is_64_bit(self) -> bool {
        matches!(self, Self::Memory64 | Self::Memory64Prefetchable)
    }
}

impl Bar {
    /// The read-only low bits (PCI 3.0, 6.2.5.1): bit 0 memory, bits 2:1 type, bit 3 prefetchable.
    pub fn type_bits(self) -> u32 {
        match self.kind {
            BarKind::Memory32 => 0b0000,
            BarKind::Memory64 => 0b0100,
            BarKind::Memory64Prefetchable => 0b1100,
        }
    }

    /// The address bits that the guest can write; the others read 0, which is how the guest learns the size.
    pub fn address_mask(self) -> u64 {
        let mask = !(self.length_bytes - 1);
        match self.kind {
            BarKind::Memory32 => mask & 0xffff_ffff,
            BarKind::Memory64 | BarKind::Memory64Prefetchable => mask,
        }
    }
}
