//! An image in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bus::GuestMapping;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{VolatileMemory, VolatileSlice};
use vmstate::Migratability;

use crate::guest::{check_ranges, for_each_slice};
use crate::{Backend, Error, Failure, Identity, IoContext, Operation, Request};

/// What is looked at at a time of memory that others may change meanwhile.
const PIECE_BYTES: usize = 4096;

/// An image whose bytes are a mapping. The mapping's bitmap notes every write, so the contents can travel like RAM.
/// There is no storage behind it: flush has nothing to do.
#[derive(Debug)]
pub struct MemoryImage {
    mapping: Arc<GuestMapping>,
    read_only: bool,
    released: AtomicBool,
}

impl MemoryImage {
    /// An image over `mapping`, as large as the mapping.
    #[must_use]
    pub fn new(mapping: Arc<GuestMapping>) -> Self {
        Self { mapping, read_only: false, released: AtomicBool::new(false) }
    }

    /// The same image, but writes are refused.
    #[must_use]
    pub fn read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    pub(crate) fn serve(&self, context: &IoContext, request: &Request<'_>) -> Result<(), Failure> {
        if self.released.load(Ordering::Acquire) {
            return Err(Failure::Released);
        }
        request.check(&self.identity())?;
        let ranges = request.buffers.ranges();
        let memory = request.buffers.memory(context.memory());
        check_ranges(memory, ranges)?;
        let image = self
            .mapping
            .get_slice(request.offset_bytes as usize, request.length_bytes as usize)
            .map_err(|_| Failure::OutOfRange)?;
        match request.operation {
            Operation::Read => for_each_slice(memory, ranges, |position, guest| {
                if let Ok(bytes) = image.subslice(position, guest.len()) {
                    bytes.copy_to_volatile_slice(guest);
                }
            })?,
            Operation::Write { .. } => for_each_slice(memory, ranges, |position, guest| {
                if let Ok(bytes) = image.subslice(position, guest.len()) {
                    guest.copy_to_volatile_slice(bytes);
                }
            })?,
            Operation::Compare => {
                let mut equal = true;
                for_each_slice(memory, ranges, |position, guest| {
                    equal = equal
                        && image.subslice(position, guest.len()).is_ok_and(|bytes| is_equal(&bytes, &guest));
                })?;
                if !equal {
                    return Err(Failure::Miscompare);
                }
            }
            Operation::Copy { source_offset_bytes, .. } => self
                .mapping
                .get_slice(source_offset_bytes as usize, request.length_bytes as usize)
                .map_err(|_| Failure::OutOfRange)?
                .copy_to_volatile_slice(image),
            Operation::WriteZeroes { .. } => fill_with_zeroes(&image),
            Operation::Fill { pattern } => fill(&image, &[pattern.to_le_bytes(); PIECE_BYTES / 4].concat()),
            // As before is a legal content; zeroes would cost time and dirty pages, without a bound if ranges overlap.
            Operation::Discard | Operation::Flush | Operation::Verify => {}
        }
        Ok(())
    }
}

impl Backend for MemoryImage {
    fn identity(&self) -> Identity {
        Identity { kind: "memory", capacity_bytes: self.mapping.size() as u64, read_only: self.read_only }
    }

    fn migratability(&self) -> Migratability {
        Migratability::State
    }

    fn submit(&self, context: &mut IoContext, request: &Request<'_>) {
        let result = self.serve(context, request);
        context.complete(request.token, result);
    }

    fn sync(&self) -> Result<(), Error> {
        Ok(())
    }

    fn release(&self) -> Result<(), Error> {
        self.released.store(true, Ordering::Release);
        Ok(())
    }

    fn acquire(&self) -> Result<(), Error> {
        self.released.store(false, Ordering::Release);
        Ok(())
    }
}

/// Writes zeroes over all of `slice` and marks it dirty.
pub(crate) fn fill_with_zeroes<B: BitmapSlice>(slice: &VolatileSlice<'_, B>) {
    static ZEROES: [u8; 65_536] = [0; 65_536];
    fill(slice, &ZEROES);
}

/// Writes `piece` over all of `slice`, again and again, and marks it dirty.
fn fill<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, piece: &[u8]) {
    let mut rest = slice.clone();
    while !rest.is_empty() {
        rest.copy_from(piece);
        let Ok(next) = rest.offset(rest.len().min(piece.len())) else { return };
        rest = next;
    }
}

/// Whether both, which are equally long, hold the same bytes.
fn is_equal<A: BitmapSlice, B: BitmapSlice>(
    one: &VolatileSlice<'_, A>,
    other: &VolatileSlice<'_, B>,
) -> bool {
    in_pieces(other, |position, bytes| {
        let mut same = [0; PIECE_BYTES];
        let same = &mut same[..bytes.len()];
        one.subslice(position, bytes.len()).is_ok_and(|piece| {
            piece.copy_to(&mut *same);
            same == bytes
        })
    })
}

/// Whether there is nothing but zeroes in `slice`.
pub(crate) fn is_zeroes<B: BitmapSlice>(slice: &VolatileSlice<'_, B>) -> bool {
    in_pieces(slice, |_, bytes| bytes.iter().all(|&byte| byte == 0))
}

/// Whether `holds` holds of every piece of `slice`, each copied, with its position.
pub(crate) fn in_pieces<B: BitmapSlice>(
    slice: &VolatileSlice<'_, B>,
    mut holds: impl FnMut(usize, &[u8]) -> bool,
) -> bool {
    let mut copy = [0; PIECE_BYTES];
    (0..slice.len()).step_by(PIECE_BYTES).all(|position| {
        let length = PIECE_BYTES.min(slice.len() - position);
        slice.subslice(position, length).is_ok_and(|piece| {
            piece.copy_to(&mut copy[..length]);
            holds(position, &copy[..length])
        })
    })
}
