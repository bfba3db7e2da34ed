//! Submission and completion queues in guest memory (Base 3.3).

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use bus::{GuestMemory, in_one_region};
use nvme_spec::{CompletionEntry, Status, SubmissionEntry};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::config::MIN_PAGE_BYTES;
use crate::doorbell::{MemoryGone, Shadow};
use crate::interrupt::Delayed;
use crate::prp::PrpWalker;
use crate::window::{self, Windows};

/// Bytes of a submission queue entry, a power of two.
const SQ_ENTRY_SHIFT: u32 = 6;
/// Bytes of a completion queue entry, a power of two.
const CQ_ENTRY_SHIFT: u32 = 4;

/// Aborted commands that a submission queue remembers until it comes to them; an abort of more is refused, as any may be.
pub(crate) const MAX_ABORTED: usize = 256;
/// Completions that may wait for their place before no more commands are begun, or aborted, that could add to them.
pub(crate) const CONGESTED_BACKLOG: usize = 256;
/// Completions that can ever wait for their place, which is what a saved queue has room for.
///
/// To an I/O queue a fetched command or an abort adds one, and neither happens while [`CONGESTED_BACKLOG`] wait; so only commands that
/// were in flight at that time add more, and a worker has at most as many as its I/O context is deep. Of the admin queue no command is
/// fetched while [`CONGESTED_BACKLOG`] of them wait for anything, their completions included (`Admin::may_fetch`). A restored queue may
/// begin with more and only gets shorter, except for parked requests, for which the admin queue's has room.
pub(crate) const MAX_BACKLOG: usize = 65_536;
/// A fused pair has one slot and two completions, and a worker one such pair at a time.
const _: () = assert!(CONGESTED_BACKLOG + (block::IoContext::MAXIMUM_DEPTH as usize) < MAX_BACKLOG);

/// Where the entries of a queue are. All of it was inside guest memory when the queue was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    /// One run from this address.
    Contiguous(u64),
    /// Memory pages of the size that CC.MPS says.
    Pages(Box<[u64]>),
}

/// A ring of `entries` entries.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    pub location: Location,
    pub entries: u32,
    entry_shift: u32,
    page_shift: u32,
}

impl Ring {
    /// Checks that the location has the right number of pages, is aligned and lies inside guest memory.
    fn new(
        memory: &GuestMemory,
        location: Location,
        entries: u32,
        entry_shift: u32,
        page_shift: u32,
    ) -> Result<Self, Status> {
        let length_bytes = u64::from(entries) << entry_shift;
        let page_bytes = 1u64 << page_shift;
        let inside = |address: u64, length_bytes: u64| {
            // In the controller memory buffer the guest's address was what is aligned; the buffer may begin at any 4 KiB.
            let alignment = if window::is_in_buffer(address) { MIN_PAGE_BYTES.into() } else { page_bytes };
            if !address.is_multiple_of(alignment) {
                return Err(Status::PRP_OFFSET_INVALID.do_not_retry());
            }
            let inside = address.checked_add(length_bytes).is_some()
                && !window::is_in_region(address)
                && memory.check_range(GuestAddress(address), length_bytes as usize);
            if inside { Ok(()) } else { Err(Status::INVALID_FIELD.do_not_retry()) }
        };
        match &location {
            Location::Contiguous(base) => inside(*base, length_bytes)?,
            Location::Pages(pages) => {
                if pages.len() as u64 != length_bytes.div_ceil(page_bytes) {
                    return Err(Status::INVALID_FIELD.do_not_retry());
                }
                for &page in pages {
                    inside(page, page_bytes)?;
                }
            }
        }
        Ok(Self { location, entries, entry_shift, page_shift })
    }

    /// The address of entry `index`, which is below `entries`.
    fn address(&self, index: u32) -> GuestAddress {
        let offset = u64::from(index) << self.entry_shift;
        GuestAddress(match &self.location {
            Location::Contiguous(base) => base + offset,
            Location::Pages(pages) => {
                pages[(offset >> self.page_shift) as usize] + (offset & ((1 << self.page_shift) - 1))
            }
        })
    }

    fn next(&self, index: u32) -> u32 {
        if index + 1 == self.entries { 0 } else { index + 1 }
    }

    /// The EventIdx to publish so that a guest whose doorbell is at `index` does not ring; `None` while the one that was `published`
    /// will do. An entry behind the doorbell is passed last of all, so it must move only when the doorbell has come half way round.
    pub fn quiet_event_index(&self, index: u32, published: Option<u32>) -> Option<u32> {
        let is_far = published.is_some_and(|published| self.distance(index, published) >= self.entries / 2);
        let behind = if index == 0 { self.entries - 1 } else { index - 1 };
        (!is_far).then_some(behind)
    }

    /// How far `to` is ahead of `from`.
    pub fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { to + self.entries - from }
    }
}

/// What a Create command, the admin queue registers or a saved state say about a queue.
#[derive(Clone, Debug)]
pub(crate) struct QueuePlace {
    pub id: u16,
    pub entries: u32,
    pub location: Location,
    pub page_shift: u32,
}

impl QueuePlace {
    /// Reads where a queue is from PRP1 of a Create command (Base 5.4, 5.5): the first byte if `contiguous`, otherwise a PRP list.
    pub fn from_command(
        walker: &mut PrpWalker,
        memory: &GuestMemory,
        windows: &Windows,
        (id, entries): (u16, u32),
        (prp1, contiguous): (u64, bool),
        (entry_bytes, page_shift): (u64, u32),
    ) -> Result<Self, Status> {
        let page_bytes = 1u64 << page_shift;
        let length_bytes = u64::from(entries) * entry_bytes;
        let location = if contiguous {
            if !prp1.is_multiple_of(page_bytes) {
                return Err(Status::PRP_OFFSET_INVALID.do_not_retry());
            }
            Location::Contiguous(windows.translate(prp1, length_bytes)?)
        } else {
            let count = length_bytes.div_ceil(page_bytes);
            let pages = walker.queue_pages(memory, prp1, count)?.into_iter();
            let pages = pages.map(|page| windows.translate(page, page_bytes)).collect::<Result<_, _>>()?;
            Location::Pages(pages)
        };
        Ok(Self { id, entries, location, page_shift })
    }
}

/// What a submission queue waits for although it has entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Hold {
    #[default]
    No,
    /// Its next command is for a range that is claimed, or begins a pair while another is carried out.
    Claims,
    /// Its last entry is the first half of a fused operation.
    Half {
        /// The tail that it was found with.
        tail: u32,
    },
}

/// A submission queue. The tail is the guest's, the head is ours.
#[derive(Debug)]
pub(crate) struct SubmissionQueue {
    pub id: u16,
    pub cq_id: u16,
    pub priority: u8,
    pub ring: Ring,
    pub head: u32,
    pub tail: u32,
    /// Commands fetched and not completed.
    pub in_flight: u32,
    /// Being deleted: nothing is fetched any more.
    pub deleting: bool,
    /// Ring indexes of commands that were aborted (and completed) before they were fetched.
    pub aborted: Vec<u16>,
    pub hold: Hold,
    pub shadow: Option<Shadow>,
    /// The EventIdx that was published last.
    pub published: Option<u32>,
    /// The host raises an event for the doorbell without calling us.
    pub doorbell_event: bool,
}

impl SubmissionQueue {
    pub fn new(memory: &GuestMemory, place: QueuePlace, cq_id: u16, priority: u8) -> Result<Self, Status> {
        let ring = Ring::new(memory, place.location, place.entries, SQ_ENTRY_SHIFT, place.page_shift)?;
        Ok(Self {
            id: place.id,
            cq_id,
            priority,
            ring,
            head: 0,
            tail: 0,
            in_flight: 0,
            deleting: false,
            aborted: Vec::new(),
            hold: Hold::No,
            shadow: None,
            published: None,
            doorbell_event: false,
        })
    }

    pub fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// Takes over the guest's `tail`. `false`: it is no index of the queue, and is ignored.
    pub fn set_tail(&mut self, tail: u32) -> bool {
        let possible = tail < self.ring.entries;
        if possible {
            self.tail = tail;
        }
        possible
    }

    /// Takes the next entry, which must exist; `None` if it was aborted.
    pub fn fetch(&mut self, memory: &GuestMemory) -> Result<Option<SubmissionEntry>, MemoryGone> {
        let index = self.head;
        let mut bytes = [0; SubmissionEntry::SIZE_BYTES];
        // An entry is aligned to its size, and regions to pages.
        let place = in_one_region(memory, self.ring.address(index), SubmissionEntry::SIZE_BYTES);
        place.ok_or(MemoryGone)?.copy_to(&mut bytes[..]);
        self.head = self.ring.next(index);
        // It waits no longer: the same tail comes again after a lap.
        self.hold = Hold::No;
        if !self.aborted.is_empty()
            && let Some(position) = self.aborted.iter().position(|&aborted| u32::from(aborted) == index)
        {
            self.aborted.swap_remove(position);
            return Ok(None);
        }
        Ok(Some(SubmissionEntry::from_bytes(&bytes)))
    }

    /// Puts the entry that was just fetched back, to wait.
    pub fn give_back(&mut self, hold: Hold) {
        self.head = self.head.checked_sub(1).unwrap_or(self.ring.entries - 1);
        self.hold = hold;
    }

    /// Whether it has to wait although it has entries.
    pub fn is_held(&self) -> bool {
        match self.hold {
            Hold::No => false,
            Hold::Claims => true,
            Hold::Half { tail } => tail == self.tail,
        }
    }

    /// Looks for an unfetched command `cid` and marks it as aborted.
    pub fn abort(&mut self, memory: &GuestMemory, cid: u16) -> bool {
        if self.aborted.len() == MAX_ABORTED {
            return false;
        }
        let mut index = self.head;
        while index != self.tail {
            let mut bytes = [0; SubmissionEntry::SIZE_BYTES];
            if memory.read_slice(&mut bytes, self.ring.address(index)).is_err() {
                return false;
            }
            let position = index as u16;
            if SubmissionEntry::from_bytes(&bytes).cid == cid && !self.aborted.contains(&position) {
                self.aborted.push(position);
                return true;
            }
            index = self.ring.next(index);
        }
        false
    }
}

/// A command's end that waits for its place in the completion queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub sq_id: u16,
    /// Index of the submission queue in its worker; the admin queue has none and 0 here.
    pub sq_index: u32,
    pub cid: u16,
    pub dw0: u32,
    pub dw1: u32,
    pub status: Status,
}

/// A completion queue. The head is the guest's, the tail is ours.
#[derive(Debug)]
pub(crate) struct CompletionQueue {
    pub id: u16,
    pub vector: u16,
    pub interrupts: bool,
    pub ring: Ring,
    pub head: u32,
    pub tail: u32,
    /// Phase tag of the next entry.
    pub phase: bool,
    /// Not posted yet; more than a moment only while the queue is full.
    pub backlog: VecDeque<Ended>,
    /// Submission queues that use it.
    pub users: u32,
    pub shadow: Option<Shadow>,
    /// The EventIdx that was published last.
    pub published: Option<u32>,
    /// The host raises an event for the doorbell without calling us.
    pub doorbell_event: bool,
    /// The worker waits for the guest to take entries.
    pub waiting: bool,
    /// It is in the worker's list of queues to post.
    pub listed: bool,
    /// Interrupt coalescing.
    pub delayed: Delayed,
    /// It is in the worker's list of queues with delayed interrupts, which may be left there while none is.
    pub is_in_delayed: bool,
}

impl CompletionQueue {
    pub fn new(
        memory: &GuestMemory,
        place: QueuePlace,
        vector: u16,
        interrupts: bool,
    ) -> Result<Self, Status> {
        let ring = Ring::new(memory, place.location, place.entries, CQ_ENTRY_SHIFT, place.page_shift)?;
        Ok(Self {
            id: place.id,
            vector,
            interrupts,
            ring,
            head: 0,
            tail: 0,
            phase: true,
            backlog: VecDeque::new(),
            users: 0,
            shadow: None,
            published: None,
            doorbell_event: false,
            waiting: false,
            listed: false,
            delayed: Delayed::default(),
            is_in_delayed: false,
        })
    }

    /// Entries that the guest has not taken.
    pub fn unseen(&self) -> u32 {
        self.ring.distance(self.head, self.tail)
    }

    /// No command is to be fetched that adds to the backlog.
    pub fn is_congested(&self) -> bool {
        self.waiting || self.has_long_backlog()
    }

    /// Nothing is to be added to the backlog but what is in flight.
    pub fn has_long_backlog(&self) -> bool {
        self.backlog.len() >= CONGESTED_BACKLOG
    }

    pub fn is_full(&self) -> bool {
        self.ring.next(self.tail) == self.head
    }

    /// Takes over the guest's `head`. `false`: it would take entries that were never posted, and is ignored.
    pub fn advance_head(&mut self, head: u32) -> bool {
        let taken = self.head_after(head);
        self.head = taken.unwrap_or(self.head);
        taken.is_some()
    }

    /// `head` if it is one that the guest can have come to.
    pub fn head_after(&self, head: u32) -> Option<u32> {
        let possible = head < self.ring.entries && self.ring.distance(self.head, head) <= self.unseen();
        possible.then_some(head)
    }

    /// Writes one entry; the queue is not full.
    pub fn post(&mut self, memory: &GuestMemory, ended: &Ended, sq_head: u32) -> Result<(), MemoryGone> {
        let mut entry = CompletionEntry {
            dw0: ended.dw0,
            dw1: ended.dw1,
            sq_head: sq_head as u16,
            sq_id: ended.sq_id,
            cid: ended.cid,
            ..CompletionEntry::default()
        };
        entry.set_status(ended.status, self.phase);
        let (mut low, mut high) = ([0; 8], [0; 8]);
        let bytes = entry.to_bytes();
        low.copy_from_slice(&bytes[..8]);
        high.copy_from_slice(&bytes[8..]);
        let place = in_one_region(memory, self.ring.address(self.tail), CompletionEntry::SIZE_BYTES);
        let place = place.ok_or(MemoryGone)?;
        // The half with the phase tag goes last and in one piece: whoever sees the tag sees the rest, and the data before it.
        place
            .store(u64::from_ne_bytes(low), 0, Ordering::Relaxed)
            .and_then(|()| place.store(u64::from_ne_bytes(high), 8, Ordering::Release))
            .map_err(|_| MemoryGone)?;
        self.tail = self.ring.next(self.tail);
        if self.tail == 0 {
            self.phase = !self.phase;
        }
        Ok(())
    }
}
