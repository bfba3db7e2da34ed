//! An image that forgets what it was not told to keep, when a test cuts its power.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bus::GuestMapping;
use vm_memory::VolatileMemory;
use vmstate::Migratability;

use crate::memory::MemoryImage;
use crate::{Backend, Error, Failure, Identity, IoContext, Operation, Request};

/// What becomes stable at once.
const BLOCK_BYTES: u64 = 512;

/// A disk with a volatile write cache, in memory: a flush, and a write with forced unit access, reach the medium, and everything else
/// only the cache. [`VolatileImage::lose_power`] is what a power failure does.
#[derive(Debug)]
pub struct VolatileImage {
    /// What is read: the medium, and the cache before it.
    current: Arc<GuestMapping>,
    image: MemoryImage,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What is on the medium.
    medium: Vec<u8>,
    /// Numbers of the blocks whose contents are in the cache.
    cached: BTreeSet<u64>,
}

impl VolatileImage {
    /// A disk of zeroes, as large as `mapping`.
    #[must_use]
    pub fn new(mapping: Arc<GuestMapping>) -> Self {
        let state = State { medium: vec![0; mapping.size()], cached: BTreeSet::new() };
        Self { image: MemoryImage::new(Arc::clone(&mapping)), current: mapping, state: Mutex::new(state) }
    }

    /// The cache is gone, except for those of its blocks that had found their way to the medium: `keeps` says so by their position.
    pub fn lose_power(&self, mut keeps: impl FnMut(u64) -> bool) {
        let mut state = self.state();
        for block in std::mem::take(&mut state.cached) {
            if keeps(block * BLOCK_BYTES) {
                self.write_back(&mut state, block);
            } else if let Some((bytes, slice)) = self.block(&mut state, block) {
                slice.copy_from(bytes);
            }
        }
    }

    /// Blocks that a power failure would lose.
    #[must_use]
    pub fn cached_blocks(&self) -> usize {
        self.state().cached.len()
    }

    fn serve(&self, context: &IoContext, request: &Request<'_>) -> Result<(), Failure> {
        let mut state = self.state();
        self.image.serve(context, request)?;
        if request.operation == Operation::Flush {
            self.flush(&mut state);
        }
        if request.operation.writes() && request.operation != Operation::Discard {
            let end = (request.offset_bytes + request.length_bytes).div_ceil(BLOCK_BYTES);
            for block in request.offset_bytes / BLOCK_BYTES..end {
                if is_forced(request.operation) {
                    state.cached.remove(&block);
                    self.write_back(&mut state, block);
                } else {
                    state.cached.insert(block);
                }
            }
        }
        Ok(())
    }

    /// Makes a block stable.
    fn write_back(&self, state: &mut State, block: u64) {
        if let Some((bytes, slice)) = self.block(state, block) {
            slice.copy_to(bytes);
        }
    }

    /// A block on the medium and as it is read.
    fn block<'a>(
        &'a self,
        state: &'a mut State,
        block: u64,
    ) -> Option<(&'a mut [u8], vm_memory::VolatileSlice<'a, vm_memory::bitmap::BS<'a, bus::GuestBitmap>>)>
    {
        let start = (block * BLOCK_BYTES) as usize;
        let end = state.medium.len().min(start + BLOCK_BYTES as usize);
        let bytes = state.medium.get_mut(start..end)?;
        let slice = self.current.get_slice(start, bytes.len()).ok()?;
        Some((bytes, slice))
    }

    /// Makes all blocks stable.
    fn flush(&self, state: &mut State) {
        for block in std::mem::take(&mut state.cached) {
            self.write_back(state, block);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_forced(operation: Operation) -> bool {
    matches!(
        operation,
        Operation::Write { fua: true }
            | Operation::WriteZeroes { fua: true, .. }
            | Operation::Copy { fua: true, .. }
    )
}

impl Backend for VolatileImage {
    fn identity(&self) -> Identity {
        self.image.identity()
    }

    fn migratability(&self) -> Migratability {
        Migratability::NonMigratable("its cache and its medium stay here")
    }

    fn submit(&self, context: &mut IoContext, request: &Request<'_>) {
        let result = self.serve(context, request);
        context.complete(request.token, result);
    }

    fn sync(&self) -> Result<(), Error> {
        self.flush(&mut self.state());
        Ok(())
    }

    fn release(&self) -> Result<(), Error> {
        self.flush(&mut self.state());
        self.image.release()
    }

    fn acquire(&self) -> Result<(), Error> {
        self.image.acquire()
    }
}
