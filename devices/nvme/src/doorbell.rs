//! Doorbells: what vCPU threads write, and the shadow doorbells in guest memory (Base 5.8).

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use bus::{GuestMemory, in_one_region};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::wakeup::{HeadDoorbell, ShadowWords};
use crate::window;

/// The doorbells of all queues, by queue identifier.
pub(crate) struct Doorbells {
    pairs: Box<[Pair]>,
}

/// The two doorbells of one identifier. `Pair` is as large as a cache line so that queues of different vCPUs do not share one.
#[derive(Default)]
#[repr(align(64))]
struct Pair {
    tail: AtomicU32,
    head: HeadDoorbell<AtomicU32>,
    /// Entries of the submission queue (bits 31:0, 0 when there is none) and the worker that serves it (63:32).
    sq: AtomicU64,
    /// The same of the completion queue.
    cq: AtomicU64,
    /// The tail of the completion queue.
    posted: AtomicU32,
    /// The head has a shadow, and each of its writes is asked for.
    followed: AtomicBool,
}

/// What a doorbell write means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rung {
    /// This worker has something to do.
    Wake(usize),
    /// Noted; nobody waits for it. A head that this worker follows in its shadow, if one does.
    Noted(Option<usize>),
    /// There is no such queue.
    NoQueue,
    /// The value is not an index of the queue.
    BadValue,
}

fn describe(entries: u32, worker: usize) -> u64 {
    u64::from(entries) | (worker as u64) << 32
}

impl Doorbells {
    /// Doorbells for the admin queue and `queue_pairs` more.
    pub fn new(queue_pairs: u16) -> Self {
        Self { pairs: (0..=queue_pairs).map(|_| Pair::default()).collect() }
    }

    /// A doorbell write from a vCPU. `index` is even for tails, odd for heads.
    pub fn ring(&self, index: u64, value: u32) -> Rung {
        let Some(pair) = usize::try_from(index / 2).ok().and_then(|queue| self.pairs.get(queue)) else {
            return Rung::NoQueue;
        };
        let is_tail = index.is_multiple_of(2);
        let description = if is_tail { &pair.sq } else { &pair.cq }.load(Ordering::Acquire);
        let (entries, worker) = (description as u32, (description >> 32) as usize);
        if entries == 0 {
            return Rung::NoQueue;
        }
        if value >= entries {
            return Rung::BadValue;
        }
        if is_tail {
            pair.tail.store(value, Ordering::Release);
            return Rung::Wake(worker);
        }
        if pair.head.ring(value) {
            return Rung::Wake(worker);
        }
        Rung::Noted(pair.followed.load(Ordering::Acquire).then_some(worker))
    }

    /// Opens the tail doorbell of submission queue `queue` at `tail`.
    pub fn open_sq(&self, queue: u16, entries: u32, worker: usize, tail: u32) {
        let pair = &self.pairs[usize::from(queue)];
        pair.tail.store(tail, Ordering::Relaxed);
        pair.sq.store(describe(entries, worker), Ordering::Release);
    }

    /// Opens the head doorbell of completion queue `queue` at `head`.
    pub fn open_cq(&self, queue: u16, entries: u32, worker: usize, head: u32) {
        let pair = &self.pairs[usize::from(queue)];
        pair.head.open(head);
        pair.posted.store(head, Ordering::Relaxed);
        pair.followed.store(false, Ordering::Relaxed);
        pair.cq.store(describe(entries, worker), Ordering::Release);
    }

    /// Closes the tail doorbell of `queue`.
    pub fn close_sq(&self, queue: u16) {
        self.pairs[usize::from(queue)].sq.store(0, Ordering::Release);
    }

    /// Closes the head doorbell of `queue`.
    pub fn close_cq(&self, queue: u16) {
        self.pairs[usize::from(queue)].cq.store(0, Ordering::Release);
    }

    /// The worker that serves submission queue `queue`, if there is such a queue.
    pub fn sq_worker(&self, queue: u16) -> Option<usize> {
        let description = self.pairs.get(usize::from(queue))?.sq.load(Ordering::Acquire);
        (description as u32 != 0).then_some((description >> 32) as usize)
    }

    /// Whether completion queue `queue` exists.
    pub fn cq_exists(&self, queue: u16) -> bool {
        self.pairs.get(usize::from(queue)).is_some_and(|pair| pair.cq.load(Ordering::Acquire) as u32 != 0)
    }

    /// The last tail written by MMIO. It may be no index of the queue: a write can cross the making of a smaller one.
    pub fn tail(&self, queue: u16) -> u32 {
        self.pairs[usize::from(queue)].tail.load(Ordering::Acquire)
    }

    /// The last head written by MMIO.
    pub fn head(&self, queue: u16) -> u32 {
        self.head_doorbell(queue).head()
    }

    /// Takes over a head of `queue` that was found in its shadow.
    pub fn note_head(&self, queue: u16, head: u32) {
        self.head_doorbell(queue).note(head);
        self.pairs[usize::from(queue)].followed.store(true, Ordering::Release);
    }

    /// Completion queue `queue` holds entries up to `tail`.
    pub fn set_posted(&self, queue: u16, tail: u32) {
        self.pairs[usize::from(queue)].posted.store(tail, Ordering::Release);
    }

    /// Whether completion queue `queue` holds entries that the guest has not taken, by what it wrote to the doorbell last.
    pub fn has_unseen(&self, queue: u16) -> bool {
        self.pairs[usize::from(queue)].posted.load(Ordering::Acquire) != self.head(queue)
    }

    /// The head doorbell of `queue`.
    pub fn head_doorbell(&self, queue: u16) -> &HeadDoorbell<AtomicU32> {
        &self.pairs[usize::from(queue)].head
    }
}

/// The shadow doorbell and EventIdx buffers, one memory page each (Base 5.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buffers {
    pub shadow: u64,
    pub event_index: u64,
    /// Size of each.
    pub page_bytes: u64,
}

/// Where one doorbell has its shadow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shadow {
    value: GuestAddress,
    event_index: GuestAddress,
}

impl Buffers {
    /// Whether both buffers are page aligned and inside guest memory.
    pub fn lie_in(&self, memory: &GuestMemory) -> bool {
        [self.shadow, self.event_index].iter().all(|&address| self.page_lies_in(memory, address))
    }

    /// Whether one of them, at `address`, is.
    pub fn page_lies_in(&self, memory: &GuestMemory, address: u64) -> bool {
        // In RAM: CMBSZ and PMRCAP do not speak of doorbells.
        address.is_multiple_of(self.page_bytes)
            && window::is_in_ram(address)
            && address.checked_add(self.page_bytes).is_some()
            && memory.check_range(GuestAddress(address), self.page_bytes as usize)
    }

    /// The shadow of the tail of submission queue `queue`; `None` if it lies beyond the page and MMIO is used.
    pub fn sq(&self, queue: u16) -> Option<Shadow> {
        self.at(u64::from(queue) * 8)
    }

    /// The shadow of the head of completion queue `queue`.
    pub fn cq(&self, queue: u16) -> Option<Shadow> {
        self.at(u64::from(queue) * 8 + 4)
    }

    fn at(&self, offset: u64) -> Option<Shadow> {
        (offset + 4 <= self.page_bytes).then(|| Shadow {
            value: GuestAddress(self.shadow + offset),
            event_index: GuestAddress(self.event_index + offset),
        })
    }
}

/// Guest memory that was inside RAM when the buffers were configured is gone: impossible, since RAM does not shrink.
#[derive(Debug)]
pub(crate) struct MemoryGone;

impl Shadow {
    /// The value the guest wrote last.
    pub fn load(&self, memory: &GuestMemory) -> Result<u32, MemoryGone> {
        let word = in_one_region(memory, self.value, 4).ok_or(MemoryGone)?;
        word.load::<u32>(0, Ordering::Acquire).map(u32::from_le).map_err(|_| MemoryGone)
    }

    /// Writes the shadow itself: when a queue appears, and for the admin queue, whose doorbells are always MMIO.
    pub fn store(&self, memory: &GuestMemory, value: u32) -> Result<(), MemoryGone> {
        memory.store(value.to_le(), self.value, Ordering::SeqCst).map_err(|_| MemoryGone)
    }

    /// Asks to be told (by MMIO) when the guest moves the doorbell past `index`. Whoever sleeps on it looks again afterwards
    /// ([`ShadowWords::ask`]).
    pub fn publish(&self, memory: &GuestMemory, index: u32) -> Result<(), MemoryGone> {
        self.in_memory(memory).set_event_index(index)?;
        self.in_memory(memory).fence();
        Ok(())
    }

    /// The two words.
    pub fn in_memory<'a>(&self, memory: &'a GuestMemory) -> InMemory<'a> {
        InMemory { shadow: *self, memory }
    }
}

/// A shadow with the memory that it is in.
pub(crate) struct InMemory<'a> {
    shadow: Shadow,
    memory: &'a GuestMemory,
}

impl ShadowWords for InMemory<'_> {
    type Gone = MemoryGone;

    fn value(&self) -> Result<u32, MemoryGone> {
        self.shadow.load(self.memory)
    }

    fn set_event_index(&self, index: u32) -> Result<(), MemoryGone> {
        let word = in_one_region(self.memory, self.shadow.event_index, 4).ok_or(MemoryGone)?;
        word.store(index.to_le(), 0, Ordering::Release).map_err(|_| MemoryGone)
    }

    fn fence(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
    }
}
