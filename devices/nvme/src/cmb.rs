//! The controller memory buffer (Base 8.5): memory of the controller that the guest sees in a BAR, and that queues, PRP lists, SGL segments
//! and data may lie in.
//!
//! The guest chooses the addresses by which commands name the buffer (CMBMSC.CBA), and may choose others at any time. Guest memory does not
//! change with them: in the [`GuestMemory`] that a controller is built with, the buffer is a region at [`BUFFER_START`], above all that a
//! guest can address, and the addresses of commands are translated to it when they are read. What was translated stays where it is,
//! queues in a saved state too. The contents are memory like RAM: the process around the controller tracks and moves them with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bus::{GuestMapping, GuestMemory, GuestRange, GuestRegion};
use nvme_spec::{Status, regs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::Error;

/// Where the buffer is in guest memory; physical addresses have at most 52 bits.
const BUFFER_START: u64 = 1 << 60;
/// Granularity of CMBSZ.SZ and of CMBMSC.CBA.
const UNIT_BYTES: u64 = 4096;
/// Largest buffer: what CMBSZ.SZ can say in units of 4 KiB, as a power of two.
pub(crate) const MAX_BUFFER_BYTES: u64 = 1 << 31;
/// The window's base while commands cannot name the buffer.
const CLOSED: u64 = u64::MAX;

/// CMBLOC but for the BAR: queues may lie partly outside the buffer (CQMMS) and in scattered pages (CQPDS), and so may what a data pointer
/// describes (CDPMLS), wherever the command (CDPCILS) and the metadata (CDMMMS) are.
const LOCATION_FLAGS: u32 = 0b1_1111 << 3;
/// CMBSZ: submission queues, completion queues, lists, read and write data.
const SIZE_FLAGS: u32 = 0b1_1111;

/// `memory` with `buffer` as the controller memory buffer of one controller, which is built with the result as its guest memory.
///
/// # Errors
/// [`Error::Buffer`]: the buffer is no power of two of at least 4096 bytes, or there is one in `memory` already.
pub fn memory_with_buffer(memory: &GuestMemory, buffer: Arc<GuestMapping>) -> Result<GuestMemory, Error> {
    let length_bytes = buffer.size() as u64;
    let error = || Error::Buffer { length_bytes };
    if !is_buffer_size(length_bytes) {
        return Err(error());
    }
    let region = GuestRegion::with_arc(buffer, GuestAddress(BUFFER_START)).ok_or_else(error)?;
    memory.insert_region(Arc::new(region)).map_err(|_| error())
}

/// Whether a buffer can have that size.
pub(crate) fn is_buffer_size(length_bytes: u64) -> bool {
    length_bytes.is_power_of_two() && (UNIT_BYTES..=MAX_BUFFER_BYTES).contains(&length_bytes)
}

/// Whether `memory` is what [`memory_with_buffer`] made of a buffer of `length_bytes`, or has none if that is 0.
pub(crate) fn is_in(memory: &GuestMemory, length_bytes: u64) -> bool {
    memory.find_region(GuestAddress(BUFFER_START)).map_or(0, |region| {
        use vm_memory::GuestMemoryRegion;
        region.len()
    }) == length_bytes
}

/// Whether a translated address is in the buffer.
pub(crate) fn is_in_buffer(address: u64) -> bool {
    address >= BUFFER_START
}

/// The addresses by which commands name the buffer, read by workers while vCPU threads move them.
#[derive(Debug)]
pub(crate) struct Window {
    length_bytes: u64,
    base: AtomicU64,
}

impl Window {
    /// The closed window of a buffer of `length_bytes`, 0 for none.
    pub fn new(length_bytes: u64) -> Arc<Self> {
        Arc::new(Self { length_bytes, base: AtomicU64::new(CLOSED) })
    }

    /// Takes over CMBMSC.
    pub fn set(&self, control: u64) {
        let base = control & !(UNIT_BYTES - 1);
        let is_open = control & regs::CMBMSC_CMSE != 0 && self.can_begin_at(base);
        self.base.store(if is_open { base } else { CLOSED }, Ordering::Release);
    }

    fn can_begin_at(&self, base: u64) -> bool {
        self.length_bytes > 0 && base.checked_add(self.length_bytes).is_some_and(|end| end <= BUFFER_START)
    }

    /// CMBLOC with the buffer in BAR `bar` at offset 0.
    pub fn location(&self, bar: u8) -> u32 {
        LOCATION_FLAGS | u32::from(bar)
    }

    /// CMBSZ in units of 4 KiB (SZU 0).
    pub fn size(&self) -> u32 {
        // At most 2^19 units.
        SIZE_FLAGS | ((self.length_bytes / UNIT_BYTES) as u32) << 12
    }

    /// CMBSTS for a value of CMBMSC: bit 0 CBAI, "the controller base address is invalid".
    pub fn status(&self, control: u64) -> u32 {
        let wanted = control & regs::CMBMSC_CMSE != 0;
        u32::from(wanted && !self.can_begin_at(control & !(UNIT_BYTES - 1)))
    }

    /// Whether there is a buffer.
    pub fn exists(&self) -> bool {
        self.length_bytes > 0
    }

    /// Whether a translated address can be in the buffer.
    pub fn holds(&self, address: u64) -> bool {
        self.exists() && is_in_buffer(address)
    }

    /// Where `length_bytes` at the guest's `address` are in guest memory.
    pub fn translate(&self, address: u64, length_bytes: u64) -> Result<u64, Status> {
        let base = self.base.load(Ordering::Acquire);
        let last = address.saturating_add(length_bytes.saturating_sub(1));
        if last >= BUFFER_START && self.length_bytes > 0 {
            return Err(Status::DATA_TRANSFER_ERROR.do_not_retry());
        }
        let window = base..base.saturating_add(self.length_bytes);
        match (window.contains(&address), window.contains(&last)) {
            _ if base == CLOSED => Ok(address),
            (true, true) => Ok(BUFFER_START + (address - base)),
            (false, false) if !(address < base && base <= last) => Ok(address),
            _ => Err(Status::INVALID_USE_OF_CMB.do_not_retry()),
        }
    }

    /// Appends to `ranges` what `walk` finds, translated.
    pub fn gather(
        &self,
        ranges: &mut Vec<GuestRange>,
        walk: impl FnOnce(&mut Vec<GuestRange>) -> Result<(), Status>,
    ) -> Result<(), Status> {
        if !self.exists() {
            return walk(ranges);
        }
        if ranges.is_empty() {
            walk(ranges)?;
            return self.translate_ranges(ranges);
        }
        // What is there is translated already, and nothing may become one range with it.
        let mut more = Vec::new();
        walk(&mut more)?;
        self.translate_ranges(&mut more)?;
        ranges.append(&mut more);
        Ok(())
    }

    /// Translates all ranges. One that the guest's pages make of both kinds of memory becomes several.
    fn translate_ranges(&self, ranges: &mut Vec<GuestRange>) -> Result<(), Status> {
        let mut index = 0;
        while let Some(range) = ranges.get(index).copied() {
            if range.address != block::NOWHERE {
                let base = self.base.load(Ordering::Acquire);
                // The window begins or ends inside the range: two ranges.
                let cuts = [base, base.saturating_add(self.length_bytes)];
                let inside = |cut: &u64| {
                    cut.checked_sub(range.address.0)
                        .is_some_and(|offset| (1..u64::from(range.length_bytes)).contains(&offset))
                };
                if base != CLOSED
                    && let Some(cut) = cuts.into_iter().find(inside)
                {
                    // Less than a range's length.
                    let length_bytes = (cut - range.address.0) as u32;
                    ranges[index].length_bytes = length_bytes;
                    let address = GuestAddress(cut);
                    let rest = GuestRange { address, length_bytes: range.length_bytes - length_bytes };
                    ranges.insert(index + 1, rest);
                    continue;
                }
                let address = self.translate(range.address.0, range.length_bytes.into())?;
                ranges[index].address = GuestAddress(address);
            }
            index += 1;
        }
        Ok(())
    }

    /// A guest read of the BAR.
    pub fn read(&self, memory: &GuestMemory, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(address) = self.place(offset, data.len()) {
            let _ = memory.read_slice(data, address);
        }
    }

    /// A guest write of the BAR.
    pub fn write(&self, memory: &GuestMemory, offset: u64, data: &[u8]) {
        if let Some(address) = self.place(offset, data.len()) {
            let _ = memory.write_slice(data, address);
        }
    }

    fn place(&self, offset: u64, length: usize) -> Option<GuestAddress> {
        let end = offset.checked_add(length as u64)?;
        (end <= self.length_bytes).then_some(GuestAddress(BUFFER_START + offset))
    }
}
