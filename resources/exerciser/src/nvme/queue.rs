//! A submission queue with a completion queue of its own (Base 3.3).

use core::sync::atomic::{Ordering, fence};

use nvme_spec::{CompletionEntry, SubmissionEntry};

use super::doorbell::Doorbells;
use crate::error::{Error, Place};
use crate::memory::Dma;

const SUBMISSION_WORDS: usize = SubmissionEntry::SIZE_BYTES / 8;
const COMPLETION_WORDS: usize = CompletionEntry::SIZE_BYTES / 8;

/// Both queues and where the driver is in them.
#[derive(Debug)]
pub struct QueuePair {
    place: Place,
    entries: u32,
    submissions: Dma,
    completions: Dma,
    tail: u32,
    rung_tail: u32,
    sq_head: u32,
    head: u32,
    rung_head: u32,
    phase: bool,
    outstanding: u32,
}

impl QueuePair {
    /// Empty queues of `entries` entries (2 to 65,536) each.
    pub fn new(place: Place, entries: u32) -> Self {
        let [submissions, completions] = Self::sizes_bytes(entries).map(Dma::new);
        Self::within(place, entries, submissions, completions)
    }

    /// Bytes of a submission and a completion queue.
    pub fn sizes_bytes(entries: u32) -> [usize; 2] {
        [SubmissionEntry::SIZE_BYTES, CompletionEntry::SIZE_BYTES].map(|bytes| entries as usize * bytes)
    }

    /// The same in memory that is zeroed and large enough.
    pub fn within(place: Place, entries: u32, submissions: Dma, completions: Dma) -> Self {
        Self {
            place,
            entries,
            submissions,
            completions,
            tail: 0,
            rung_tail: 0,
            sq_head: 0,
            head: 0,
            rung_head: 0,
            phase: true,
            outstanding: 0,
        }
    }

    /// Controller and queue identifier.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Entries of each queue.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Bus addresses of the submission and the completion queue.
    pub fn addresses(&self) -> (u64, u64) {
        (self.submissions.address(), self.completions.address())
    }

    /// Commands that have not completed.
    pub fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// Whether another command fits. A full queue has one entry free, to tell it from an empty one.
    pub fn has_room(&self) -> bool {
        self.outstanding + 1 < self.entries
    }

    /// Adds a command, without telling the controller.
    ///
    /// # Panics
    ///
    /// When the queue is full.
    pub fn push(&mut self, entry: &SubmissionEntry) {
        assert!(self.has_room(), "queue {} is full", self.place.queue);
        let bytes = entry.to_bytes();
        for (index, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
            self.submissions
                .store64(self.tail as usize * SUBMISSION_WORDS + index, u64::from_le_bytes(*word));
        }
        self.tail = (self.tail + 1) % self.entries;
        self.outstanding += 1;
    }

    /// Takes the next completion, if there is one.
    ///
    /// # Errors
    ///
    /// A completion entry for another queue, with a head that the submission queue cannot have, or for a
    /// queue without commands.
    pub fn pop(&mut self) -> Result<Option<CompletionEntry>, Error> {
        if !self.completion_waits() {
            return Ok(None);
        }
        // The entry, and the data of its command, were written before the phase.
        fence(Ordering::Acquire);
        let first = self.head as usize * COMPLETION_WORDS;
        let mut bytes = [0; CompletionEntry::SIZE_BYTES];
        for (index, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = self.completions.load64(first + index).to_le_bytes();
        }
        let entry = CompletionEntry::from_bytes(&bytes);
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase = !self.phase;
        }
        let wrong =
            |reason| Error::Completion { place: self.place, reason, cid: entry.cid, sq_head: entry.sq_head };
        if entry.sq_id != self.place.queue {
            return Err(wrong("entry of another queue"));
        }
        // The head only moves on, and not past the last doorbell.
        let moved = (u32::from(entry.sq_head) + self.entries - self.sq_head) % self.entries;
        let possible = (self.rung_tail + self.entries - self.sq_head) % self.entries;
        if u32::from(entry.sq_head) >= self.entries || moved > possible {
            return Err(wrong("impossible submission queue head"));
        }
        self.sq_head = entry.sq_head.into();
        self.outstanding = self.outstanding.checked_sub(1).ok_or(wrong("completion without a command"))?;
        Ok(Some(entry))
    }

    /// Whether a completion is there.
    pub fn completion_waits(&self) -> bool {
        let last = self.completions.load64(self.head as usize * COMPLETION_WORDS + 1);
        (last >> 48 & 1 != 0) == self.phase
    }

    /// Tells the controller what was added and taken since the last call.
    pub fn ring(&mut self, doorbells: &mut Doorbells) {
        if self.head != self.rung_head {
            doorbells.ring_completion(self.place.queue, self.rung_head, self.head);
            self.rung_head = self.head;
        }
        if self.tail != self.rung_tail {
            doorbells.ring_submission(self.place.queue, self.rung_tail, self.tail);
            self.rung_tail = self.tail;
        }
    }

    /// The description of a queue in which nothing moves.
    pub fn stalled(&self, interrupts: u64) -> Error {
        Error::Stall {
            place: self.place,
            outstanding: self.outstanding,
            completion_waits: self.completion_waits(),
            tail: self.rung_tail,
            head: self.head,
            interrupts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmio::Registers;
    use nvme_spec::Status;
    use std::vec::Vec;

    /// Queue 3 with 4 entries, the doorbell registers, and a controller's side of the queues.
    struct Rig {
        queue: QueuePair,
        doorbells: Doorbells,
        registers: Registers,
        fetched: u32,
        posted: u32,
        _page: Vec<u64>,
    }

    impl Rig {
        fn new() -> Self {
            let mut page = std::vec![0u64; 1024];
            #[allow(unsafe_code)]
            // SAFETY: the vector lives in the rig beside the registers, and only they write to it.
            let registers = unsafe { Registers::new(page.as_mut_ptr() as usize, 8192) };
            let queue = QueuePair::new(Place { controller: 0, queue: 3 }, 4);
            let doorbells = Doorbells::new(registers, 0);
            Self { queue, doorbells, registers, fetched: 0, posted: 0, _page: page }
        }

        fn submit(&mut self, cid: u16) {
            self.queue.push(&SubmissionEntry { cid, ..SubmissionEntry::default() });
            self.queue.ring(&mut self.doorbells);
        }

        /// Posts a completion as a controller that fetched one more command.
        fn complete(&mut self, cid: u16) {
            self.fetched += 1;
            let head = (self.fetched % 4) as u16;
            self.post(CompletionEntry { cid, sq_id: 3, sq_head: head, ..CompletionEntry::default() });
        }

        fn post(&mut self, mut entry: CompletionEntry) {
            entry.set_status(Status::SUCCESS, (self.posted / 4).is_multiple_of(2));
            let at = (self.posted % 4) as usize * COMPLETION_WORDS;
            for (index, word) in entry.to_bytes().as_chunks::<8>().0.iter().enumerate() {
                self.queue.completions.store64(at + index, u64::from_le_bytes(*word));
            }
            self.posted += 1;
        }

        fn refused(&mut self, entry: CompletionEntry) -> &'static str {
            self.post(entry);
            match self.queue.pop() {
                Err(Error::Completion { reason, .. }) => reason,
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn commands_go_round_the_queues() {
        let mut rig = Rig::new();
        for cid in 0..11 {
            rig.submit(cid);
            assert_eq!(rig.registers.read32(0x1018), u32::from(cid + 1) % 4);
            assert_eq!(rig.queue.pop(), Ok(None));
            rig.complete(cid);
            assert_eq!(rig.queue.pop().unwrap().unwrap().cid, cid);
            assert_eq!(rig.queue.pop(), Ok(None));
            rig.queue.ring(&mut rig.doorbells);
            assert_eq!(rig.registers.read32(0x101c), u32::from(cid + 1) % 4);
        }
    }

    #[test]
    fn a_full_queue_leaves_one_entry_free() {
        let mut rig = Rig::new();
        for cid in 0..3 {
            assert!(rig.queue.has_room());
            rig.submit(cid);
        }
        assert!(!rig.queue.has_room());
        rig.complete(0);
        rig.queue.pop().unwrap();
        assert!(rig.queue.has_room());
    }

    #[test]
    fn completions_that_cannot_be_are_refused() {
        let entry = CompletionEntry { sq_id: 3, ..CompletionEntry::default() };
        let mut rig = Rig::new();
        assert_eq!(rig.refused(CompletionEntry { sq_id: 2, ..entry }), "entry of another queue");
        let mut rig = Rig::new();
        assert_eq!(rig.refused(entry), "completion without a command");
        let mut rig = Rig::new();
        rig.submit(0);
        assert_eq!(rig.refused(CompletionEntry { sq_head: 4, ..entry }), "impossible submission queue head");
        let mut rig = Rig::new();
        rig.submit(0);
        assert_eq!(rig.refused(CompletionEntry { sq_head: 2, ..entry }), "impossible submission queue head");
        let mut rig = Rig::new();
        rig.submit(0);
        rig.submit(1);
        rig.complete(0);
        rig.complete(1);
        rig.queue.pop().unwrap();
        rig.queue.pop().unwrap();
        rig.submit(2);
        assert_eq!(rig.refused(CompletionEntry { sq_head: 1, ..entry }), "impossible submission queue head");
    }
}
