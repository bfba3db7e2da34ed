//! The guest memory of one request, resolved.

use std::sync::Arc;

use bus::{GuestMemory, GuestRange, in_one_region};
use vm_memory::bitmap::{Bitmap, MS};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::{Buffers, Failure, NOWHERE};

/// Host view of guest memory that carries the dirty bitmap.
type Slice<'a> = VolatileSlice<'a, MS<'a, GuestMemory>>;

impl<'a> Buffers<'a> {
    /// The ranges, in order.
    #[must_use]
    pub fn ranges(&self) -> &'a [GuestRange] {
        match self {
            Self::None => &[],
            Self::Guest(ranges) | Self::Private(_, ranges) => ranges,
        }
    }

    /// The memory that the ranges are in, unless that is the guest's.
    pub(crate) fn private(&self) -> Option<&'a Arc<GuestMemory>> {
        match self {
            Self::Private(memory, _) => Some(memory),
            _ => None,
        }
    }

    /// The memory that the ranges are in.
    pub(crate) fn memory<'m>(&self, guest: &'m GuestMemory) -> &'m GuestMemory
    where
        'a: 'm,
    {
        self.private().map_or(guest, |memory| memory)
    }

    /// Length of all ranges together, in bytes. Cannot overflow: a slice cannot hold 2^32 ranges of 4 GiB.
    #[must_use]
    pub fn length_bytes(&self) -> u64 {
        self.ranges().iter().map(|range| u64::from(range.length_bytes)).sum()
    }

    /// Whether some of the ranges are at [`NOWHERE`].
    pub(crate) fn have_gaps(&self) -> bool {
        self.ranges().iter().any(|range| range.address == NOWHERE)
    }
}

/// Calls `visit` for every contiguous piece of `ranges`, in order, with its position in the whole. There are none at [`NOWHERE`].
///
/// # Errors
/// [`Failure::GuestMemory`] if a byte lies outside `memory`; pieces before it were visited.
pub(crate) fn for_each_slice<'a>(
    memory: &'a GuestMemory,
    ranges: &[GuestRange],
    mut visit: impl FnMut(usize, Slice<'a>),
) -> Result<(), Failure> {
    let mut position = 0;
    for range in ranges {
        let length = range.length_bytes as usize;
        if range.address != NOWHERE {
            // One region holds what most commands are for.
            if let Some(slice) = in_one_region(memory, range.address, length) {
                visit(position, slice);
                position += length;
                continue;
            }
            let mut within = position;
            for slice in memory.get_slices(range.address, length) {
                let slice = slice.map_err(|_| Failure::GuestMemory)?;
                let slice_length = slice.len();
                visit(within, slice);
                within += slice_length;
            }
        }
        position += length;
    }
    Ok(())
}

/// Checks that every byte of `ranges` lies inside `memory`.
pub(crate) fn check_ranges(memory: &GuestMemory, ranges: &[GuestRange]) -> Result<(), Failure> {
    for_each_slice(memory, ranges, |_, _| ())
}

/// Marks all pages of `ranges` in the bitmap: whoever let the kernel write there calls this.
pub(crate) fn mark_dirty(memory: &GuestMemory, ranges: &[GuestRange]) {
    // The ranges were resolved when the request began and guest memory does not change under a context.
    let _ = for_each_slice(memory, ranges, |_, slice| slice.bitmap().mark_dirty(0, slice.len()));
}
