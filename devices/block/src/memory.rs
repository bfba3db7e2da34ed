//! An image in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bus::GuestMapping;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{VolatileMemory, VolatileSlice};

use crate::guest::{check_ranges, for_each_slice};
use crate::{Backend, Error, Failure, Identity, IoContext, Operation, Request};

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

    fn serve(&self, context: &IoContext, request: &Request<'_>) -> Result<(), Failure> {
        if self.released.load(Ordering::Acquire) {
            return Err(Failure::Released);
        }
        request.check(&self.identity())?;
        let ranges = request.buffers.ranges();
        check_ranges(context.memory(), ranges)?;
        let image = self
            .mapping
            .get_slice(request.offset_bytes as usize, request.length_bytes as usize)
            .map_err(|_| Failure::OutOfRange)?;
        let mut position = 0;
        match request.operation {
            Operation::Read => for_each_slice(context.memory(), ranges, |guest| {
                if let Ok(bytes) = image.subslice(position, guest.len()) {
                    bytes.copy_to_volatile_slice(guest);
                }
                position += guest.len();
            })?,
            Operation::Write { .. } => for_each_slice(context.memory(), ranges, |guest| {
                if let Ok(bytes) = image.subslice(position, guest.len()) {
                    guest.copy_to_volatile_slice(bytes);
                }
                position += guest.len();
            })?,
            Operation::WriteZeroes { .. } => fill_with_zeroes(&image),
            // As before is a legal content; zeroes would cost time and dirty pages, without a bound if ranges overlap.
            Operation::Discard | Operation::Flush => {}
        }
        Ok(())
    }
}

impl Backend for MemoryImage {
    fn identity(&self) -> Identity {
        Identity { kind: "memory", capacity_bytes: self.mapping.size() as u64, read_only: self.read_only }
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
    let mut rest = slice.clone();
    while !rest.is_empty() {
        rest.copy_from(&ZEROES[..]);
        let Ok(next) = rest.offset(rest.len().min(ZEROES.len())) else { return };
        rest = next;
    }
}
