//! A queue as its registers describe it, and the way to a queue that can be processed.

use bus::GuestMemory;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use crate::error::Error;
use crate::regs::NO_VECTOR;
use crate::state::QueueState;

/// Registers of one queue; `queue` is there while it is enabled.
#[derive(Debug)]
pub(crate) struct QueueSlot {
    pub max_size: u16,
    pub size: u16,
    pub vector: u16,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
    pub queue: Option<Queue>,
}

impl QueueSlot {
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            vector: NO_VECTOR,
            descriptors: 0,
            driver: 0,
            device: 0,
            queue: None,
        }
    }

    /// Makes the queue usable: what the driver does by queue_enable, and what restoring does.
    pub fn enable(&mut self, index: usize, memory: &GuestMemory) -> Result<(), Error> {
        let Self { size, descriptors, driver, device, .. } = *self;
        let bad = |reason| Error::BadQueue { queue: index, size, descriptors, driver, device, reason };
        check_size(size, self.max_size).map_err(bad)?;
        // Sizes of the three parts, and their alignment (virtio 1.2, 2.7).
        let entries = usize::from(size);
        for (address, alignment, length, access, reason) in [
            (
                descriptors,
                16,
                16 * entries,
                Permissions::Read,
                "the descriptor table is not aligned or not in memory",
            ),
            (
                driver,
                2,
                6 + 2 * entries,
                Permissions::Read,
                "the available ring is not aligned or not in memory",
            ),
            (device, 4, 6 + 8 * entries, Permissions::Write, "the used ring is not aligned or not in memory"),
        ] {
            if !address.is_multiple_of(alignment)
                || !memory.check_range(GuestAddress(address), length, access)
            {
                return Err(bad(reason));
            }
        }
        let state = virtio_queue::QueueState {
            max_size: self.max_size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: false,
            size,
            ready: true,
            desc_table: descriptors,
            avail_ring: driver,
            used_ring: device,
        };
        self.queue = Some(Queue::try_from(state).map_err(|_| bad("virtio-queue refuses it"))?);
        Ok(())
    }

    pub fn save(&self) -> QueueState {
        let (next_available, next_used) =
            self.queue.as_ref().map_or((0, 0), |queue| (queue.next_avail(), queue.next_used()));
        QueueState {
            size: self.size,
            vector: self.vector,
            enabled: self.queue.is_some(),
            descriptors: self.descriptors,
            driver: self.driver,
            device: self.device,
            next_available,
            next_used,
        }
    }

    /// A checked slot of what was saved.
    pub fn restore(
        state: &QueueState,
        index: usize,
        max_size: u16,
        vectors: u16,
        memory: &GuestMemory,
    ) -> Result<Self, Error> {
        let &QueueState { size, vector, enabled, descriptors, driver, device, next_available, next_used } =
            state;
        let bad = |reason| Error::BadQueue { queue: index, size, descriptors, driver, device, reason };
        check_size(size, max_size).map_err(bad)?;
        if vector >= vectors && vector != NO_VECTOR {
            return Err(bad("its vector does not exist"));
        }
        let mut slot = Self { max_size, size, vector, descriptors, driver, device, queue: None };
        if enabled {
            slot.enable(index, memory)?;
        }
        match &mut slot.queue {
            // A queue that broke may have consumed an entry without returning it.
            Some(queue) if next_available.wrapping_sub(next_used) <= size => {
                queue.set_next_avail(next_available);
                queue.set_next_used(next_used);
            }
            Some(_) => return Err(bad("its rings are further apart than its size")),
            None if (next_available, next_used) != (0, 0) => {
                return Err(bad("it is disabled but has been used"));
            }
            None => {}
        }
        Ok(slot)
    }
}

fn check_size(size: u16, max_size: u16) -> Result<(), &'static str> {
    if size.is_power_of_two() && size <= max_size {
        Ok(())
    } else {
        Err("its size is not a power of two, or larger than offered")
    }
}
