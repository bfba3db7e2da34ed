//! The controller memory buffer (Base 8.5): memory of the controller that the guest sees in a BAR, and that queues, PRP lists, SGL segments
//! and data may lie in. How commands name it stands in [`crate::window`].
//!
//! The contents are memory like RAM: the process around the controller tracks and moves them with it.

use std::sync::Arc;

use bus::{GuestMapping, GuestMemory};

use crate::Error;
use crate::window::{self, BUFFER_START, UNIT_BYTES};

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
    window::memory_with(memory, buffer, BUFFER_START).ok_or(Error::Buffer { length_bytes })
}

/// CMBLOC of a buffer in BAR `bar` at offset 0.
pub(crate) fn location(bar: u8) -> u32 {
    LOCATION_FLAGS | u32::from(bar)
}

/// CMBSZ in units of 4 KiB (SZU 0).
pub(crate) fn size(length_bytes: u64) -> u32 {
    // At most 2^19 units.
    SIZE_FLAGS | ((length_bytes / UNIT_BYTES) as u32) << 12
}
