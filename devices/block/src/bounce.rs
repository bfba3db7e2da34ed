//! Host memory that satisfies any direct I/O alignment.

use bus::{GuestMemory, GuestRange};
use vm_memory::Bytes;

use crate::guest::for_each_slice;
use crate::memory::in_pieces;
use crate::{Failure, NOWHERE};

/// What a device may ask of a buffer's address at most; also a page.
const ALIGNMENT: usize = 4096;

/// The most that goes through a bounce buffer at a time; longer transfers take several turns.
const MAXIMUM_BYTES: usize = 256 * 1024;

/// An aligned buffer that stands in for guest memory which the device would refuse. Kept for the next request.
#[derive(Debug, Default)]
pub(crate) struct Bounce {
    storage: Vec<u8>,
    start: usize,
    length: usize,
}

impl Bounce {
    /// Makes room for the next turn of a transfer with `remaining_bytes` left.
    pub(crate) fn prepare(&mut self, remaining_bytes: u64) {
        self.length = usize::try_from(remaining_bytes).unwrap_or(usize::MAX).min(MAXIMUM_BYTES);
        if self.storage.len() < self.length.next_multiple_of(ALIGNMENT) + ALIGNMENT {
            self.storage = vec![0; self.length.next_multiple_of(ALIGNMENT) + ALIGNMENT];
        }
        let address = self.storage.as_ptr().addr();
        self.start = address.next_multiple_of(ALIGNMENT) - address;
    }

    /// Ends the turn at `count` bytes.
    pub(crate) fn shorten(&mut self, count: usize) {
        self.length = self.length.min(count);
    }

    /// The bytes of this turn.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.start + self.length]
    }

    /// Copies guest memory in, from `skip_bytes` into `ranges` on.
    pub(crate) fn fill_from(
        &mut self,
        memory: &GuestMemory,
        ranges: &[GuestRange],
        skip_bytes: u64,
    ) -> Result<(), Failure> {
        walk(self.bytes(), ranges, skip_bytes, |bytes, range| {
            memory.read_slice(bytes, range.address).map_err(|_| Failure::GuestMemory)
        })
    }

    /// Copies the first `count` bytes out to guest memory, which marks it dirty.
    pub(crate) fn empty_into(
        &mut self,
        memory: &GuestMemory,
        ranges: &[GuestRange],
        skip_bytes: u64,
        count: usize,
    ) -> Result<(), Failure> {
        let bytes = self.bytes();
        let count = count.min(bytes.len());
        walk(&mut bytes[..count], ranges, skip_bytes, |bytes, range| {
            memory.write_slice(bytes, range.address).map_err(|_| Failure::GuestMemory)
        })
    }

    /// Whether guest memory, from `skip_bytes` into `ranges` on, holds the first `count` bytes.
    pub(crate) fn equals(
        &mut self,
        memory: &GuestMemory,
        ranges: &[GuestRange],
        skip_bytes: u64,
        count: usize,
    ) -> Result<bool, Failure> {
        let bytes = self.bytes();
        let count = count.min(bytes.len());
        let mut equal = true;
        walk(&mut bytes[..count], ranges, skip_bytes, |bytes, range| {
            for_each_slice(memory, &[range], |position, guest| {
                equal = equal
                    && in_pieces(&guest, |within, piece| {
                        let start = position + within;
                        bytes.get(start..start + piece.len()).is_some_and(|image| image == piece)
                    });
            })
        })?;
        Ok(equal)
    }
}

/// Pairs `bytes` with the guest memory that starts `skip_bytes` into `ranges`, but for what is [`NOWHERE`].
fn walk(
    mut bytes: &mut [u8],
    ranges: &[GuestRange],
    mut skip_bytes: u64,
    mut visit: impl FnMut(&mut [u8], GuestRange) -> Result<(), Failure>,
) -> Result<(), Failure> {
    for range in ranges {
        if bytes.is_empty() {
            break;
        }
        let length = u64::from(range.length_bytes);
        let skipped = skip_bytes.min(length);
        skip_bytes -= skipped;
        let count = bytes.len().min((length - skipped) as usize);
        if count == 0 {
            continue;
        }
        if range.address == NOWHERE {
            bytes = &mut bytes[count..];
            continue;
        }
        let address = vm_memory::Address::checked_add(&range.address, skipped).ok_or(Failure::GuestMemory)?;
        let (part, rest) = bytes.split_at_mut(count);
        visit(part, GuestRange { address, length_bytes: count as u32 })?;
        bytes = rest;
    }
    Ok(())
}
