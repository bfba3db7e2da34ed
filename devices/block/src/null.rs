//! An image that keeps nothing.

use std::sync::atomic::{AtomicBool, Ordering};

use vmstate::Migratability;

use crate::guest::{check_ranges, for_each_slice};
use crate::memory::{fill_with_zeroes, is_zeroes};
use crate::{Backend, Error, Failure, Identity, IoContext, Operation, Request};

/// Reads zeroes and forgets writes: what is left when the cost of a disk is taken away, for measurement.
#[derive(Debug)]
pub struct NullImage {
    capacity_bytes: u64,
    read_only: bool,
    released: AtomicBool,
}

impl NullImage {
    /// An image that says it has `capacity_bytes`.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        Self { capacity_bytes, read_only: false, released: AtomicBool::new(false) }
    }

    /// Refuses writes.
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
        let memory = request.buffers.memory(context.memory());
        match request.operation {
            Operation::Read => {
                for_each_slice(memory, ranges, |_, guest| fill_with_zeroes(&guest))?;
            }
            Operation::Compare => {
                let mut equal = true;
                for_each_slice(memory, ranges, |_, guest| equal &= is_zeroes(&guest))?;
                if !equal {
                    return Err(Failure::Miscompare);
                }
            }
            _ => check_ranges(memory, ranges)?,
        }
        Ok(())
    }
}

impl Backend for NullImage {
    fn identity(&self) -> Identity {
        Identity { kind: "null", capacity_bytes: self.capacity_bytes, read_only: self.read_only }
    }

    fn migratability(&self) -> Migratability {
        Migratability::Stateless
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
