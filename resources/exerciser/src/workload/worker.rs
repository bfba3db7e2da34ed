//! Keeps commands in flight on one controller.
//!
//! A pass writes every block; then come random writes, Write Zeroes, flushes and reads, spread over queues and
//! namespaces, each read compared; at the end a pass reads every block once more.

use alloc::vec::Vec;

use nvme_spec::opcode::{CDW12_FUA, nvm};
use nvme_spec::{CompletionEntry, SubmissionEntry};

use super::disk::{Disk, Extent};
use super::latency::{Histogram, Stopwatch};
use super::ram::Ram;
use crate::error::{Error, Place};
use crate::machine::Machine;
use crate::memory::{Dma, PAGE_BYTES};
use crate::nvme::Controller;
use crate::options::{Home, Mode, Options, Region};
use crate::random::Random;
use crate::report::Counters;

/// Of so many random commands, one is a Flush.
const FLUSH_EVERY: u64 = 64;
/// Of so many writes, one is a Write Zeroes, and one forces unit access.
const WRITE_ZEROES_EVERY: u64 = 16;
const FUA_EVERY: u64 = 8;
/// Bytes of the reads whose rate is measured.
const RATE_BYTES: u32 = 4096;
/// A turn that took longer is a pause of the machine, in which the controller need not have worked either.
const LONGEST_TURN_MILLISECONDS: u64 = 20;
const PAGE_WORDS: usize = PAGE_BYTES / 8;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The first write of every block.
    Fill,
    /// Random commands.
    Random,
    /// Random reads for a rate.
    Rate,
    /// No more commands until those in flight are done, then a flush of each namespace.
    Settle,
    /// The last read of every block.
    Final,
    /// Nothing.
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Write,
    WriteZeroes,
    Read,
    /// Read without comparing: blocks were not written by us.
    RateRead,
    Flush,
}

/// What a command in flight is for.
#[derive(Clone, Copy, Debug)]
struct Task {
    operation: Operation,
    disk: usize,
    extent: Extent,
}

/// A task under way, and where in the slot's first page its data begins, in 8-byte words.
#[derive(Clone, Copy, Debug)]
struct Sent {
    task: Task,
    offset: usize,
}

/// A command identifier, with memory for its data.
#[derive(Debug)]
struct Slot {
    data: Dma,
    /// PRP list: the pages of `data` after the first.
    list: Dma,
    sent: Option<Sent>,
}

impl Slot {
    /// In the memory of `controller` that `home` names.
    fn new(controller: &mut Controller, home: Home, transfer_bytes: u64) -> Result<Self, Error> {
        // One page more, for data that does not begin at the start of a page.
        let data_bytes = transfer_bytes as usize + PAGE_BYTES;
        let list_bytes = data_bytes.div_ceil(PAGE_BYTES) * 8;
        let pieces = match (home, &mut controller.buffer, &mut controller.region) {
            (Home::Buffer, Some(buffer), _) => {
                buffer.take_zeroed(data_bytes).zip(buffer.take_zeroed(list_bytes))
            }
            // There may be no lists in the region.
            (Home::Region, _, Some(region)) => region.take_zeroed(data_bytes).zip(Some(Dma::new(list_bytes))),
            _ => Some((Dma::new(data_bytes), Dma::new(list_bytes))),
        };
        let wrong = controller.wrong("its memory has no room for that much data", data_bytes as u64);
        let (data, mut list) = pieces.ok_or(wrong)?;
        let pages = data.length_bytes() / PAGE_BYTES;
        for page in 1..pages {
            list.store64(page - 1, data.address() + (page * PAGE_BYTES) as u64);
        }
        Ok(Self { data, list, sent: None })
    }

    /// PRP entries for `words` words of data that begin `offset` words into the first page (Base 4.1.1).
    fn data_pointer(&self, offset: usize, words: usize) -> (u64, u64) {
        let start = self.data.address();
        let first = start + 8 * offset as u64;
        match (offset + words).div_ceil(PAGE_WORDS) {
            0 | 1 => (first, 0),
            2 => (first, start + PAGE_BYTES as u64),
            _ => (first, self.list.address()),
        }
    }
}

/// The first half of the region, if it is to be checked; the rest is for data.
fn region_to_check(
    controller: &mut Controller,
    options: &Options,
    tsc_khz: u64,
    now: u64,
) -> Result<Option<Ram>, Error> {
    let Some(memory) = controller.region.as_mut().filter(|_| options.region != Region::Off) else {
        return Ok(None);
    };
    let half_bytes = memory.left_bytes() / 2;
    let (check, dirty) = (options.check_bytes_per_second, options.dirty_bytes_per_second);
    let pages = memory.take(half_bytes);
    let pages = pages.ok_or(controller.wrong("its memory region is too small", half_bytes as u64))?;
    let mut region = Ram::within(pages, check, dirty, tsc_khz, now);
    if options.region == Region::Kept {
        region.check_all()?;
    } else {
        region.refill();
    }
    Ok(Some(region))
}

/// The work on one controller.
#[derive(Debug)]
pub struct Worker {
    /// The controller.
    pub controller: Controller,
    /// The part of its persistent memory region that is checked.
    region: Option<Ram>,
    disks: Vec<Disk>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Extents that were just written and are read back next.
    read_back: Vec<(usize, Extent)>,
    random: Random,
    stopwatch: Stopwatch,
    phase: Phase,
    unflushed: usize,
    next_queue: usize,
    last_turn: u64,
    longest_turn: u64,
    waited: u64,
}

impl Worker {
    /// Prepares the work; the controller has its queues.
    ///
    /// # Errors
    ///
    /// Its memory has too little room, or its persistent memory region is not as a run before has left it.
    pub fn new(mut controller: Controller, options: &Options, tsc_khz: u64, now: u64) -> Result<Self, Error> {
        let region = region_to_check(&mut controller, options, tsc_khz, now)?;
        let limit = controller.identity.transfer_limit_bytes().unwrap_or(u64::MAX);
        // One page of PRP list reaches for 512 pages beyond the first.
        let transfer_bytes = u64::from(options.transfer_bytes).min(limit).min(2 << 20);
        let writable = controller.namespaces.iter().filter(|namespace| !namespace.read_only);
        let disks: Vec<Disk> =
            writable.map(|namespace| Disk::new(namespace, options.span_bytes, transfer_bytes)).collect();
        let largest_block = disks.iter().map(|disk| disk.block_bytes).max().unwrap_or(0);
        let slot_bytes = transfer_bytes.max(largest_block.into()).max(RATE_BYTES.into());
        let slots: Vec<Slot> = (0..options.inflight)
            .map(|_| Slot::new(&mut controller, options.data_in, slot_bytes))
            .collect::<Result<_, _>>()?;
        let phase = match options.mode {
            _ if disks.is_empty() => Phase::Done,
            Mode::Verify => Phase::Fill,
            Mode::Iops => Phase::Rate,
            Mode::Idle | Mode::Help => Phase::Done,
        };
        Ok(Self {
            region,
            random: Random::new(options.seed.wrapping_add(controller.index as u64)),
            read_back: Vec::with_capacity(slots.len()),
            free: (0..slots.len() as u16).rev().collect(),
            controller,
            disks,
            slots,
            stopwatch: Stopwatch::default(),
            phase,
            unflushed: 0,
            next_queue: 0,
            last_turn: now,
            longest_turn: tsc_khz * LONGEST_TURN_MILLISECONDS,
            waited: 0,
        })
    }

    /// Checks and rewrites what is due of the region.
    ///
    /// # Errors
    ///
    /// The first page that is wrong.
    pub fn look_after_region(&mut self, now: u64) -> Result<(), Error> {
        self.region.as_mut().map_or(Ok(()), |region| region.step(now))
    }

    /// Pages of the region that were compared, and rewritten.
    pub fn region_pages(&self) -> (u64, u64) {
        self.region.as_ref().map_or((0, 0), |region| (region.checked, region.dirtied))
    }

    /// Checks all of the region, and leaves it filled as at first, durably.
    ///
    /// # Errors
    ///
    /// The first page that is wrong; the controller says that something was lost.
    pub fn leave_region(&mut self) -> Result<(), Error> {
        let Some(region) = &mut self.region else { return Ok(()) };
        region.check_all()?;
        region.refill();
        self.controller.make_durable()
    }

    /// Commands with the controller.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// What commands took in mode `iops` since this was asked last, in counts.
    pub fn take_latencies(&mut self, all: &mut Histogram) {
        all.take(&mut self.stopwatch.histogram);
    }

    /// Begins the end, if it has not begun: commands in flight finish, then every block is read once more.
    pub fn finish(&mut self) {
        match self.phase {
            Phase::Fill | Phase::Random => {
                self.phase = Phase::Settle;
                self.read_back.clear();
                self.unflushed = self.disks.len();
            }
            Phase::Rate => self.phase = Phase::Done,
            Phase::Settle | Phase::Final | Phase::Done => {}
        }
    }

    /// Whether all is done and nothing is in flight.
    pub fn is_done(&self) -> bool {
        self.phase == Phase::Done && self.in_flight() == 0
    }

    /// Takes completions, and sends commands in their place. True when something completed.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn turn(
        &mut self,
        machine: &mut dyn Machine,
        now: u64,
        counters: &mut Counters,
    ) -> Result<bool, Error> {
        let mut any = false;
        for queue in 0..self.controller.queues.len() {
            if !self.controller.queues[queue].is_due(machine) {
                continue;
            }
            while let Some(completion) = self.controller.queues[queue].pair.pop()? {
                any = true;
                let place = self.controller.queues[queue].pair.place();
                if self.stopwatch.watches(completion.cid) {
                    self.stopwatch.ended(machine.tsc(), self.random.below(self.slots.len() as u64));
                }
                self.complete(place, &completion, counters)?;
            }
        }
        let passed = now.saturating_sub(self.last_turn).min(self.longest_turn);
        self.last_turn = now;
        self.waited = if any || self.in_flight() == 0 { 0 } else { self.waited + passed };
        while self.submit(machine) {}
        let doorbells = &mut self.controller.doorbells;
        self.controller.queues.iter_mut().for_each(|queue| queue.pair.ring(doorbells));
        Ok(any)
    }

    /// Whether nothing has completed for `counts` of time in which the machine ran, although something should.
    ///
    /// # Errors
    ///
    /// The first queue with commands, when so.
    pub fn look_for_stall(&self, machine: &dyn Machine, counts: u64) -> Result<(), Error> {
        if self.waited < counts {
            return Ok(());
        }
        match self.controller.queues.iter().find(|queue| queue.pair.outstanding() > 0) {
            Some(queue) => Err(queue.pair.stalled(queue.interrupts(machine))),
            None => Ok(()),
        }
    }

    fn complete(
        &mut self,
        place: Place,
        completion: &CompletionEntry,
        counters: &mut Counters,
    ) -> Result<(), Error> {
        let unknown = Error::Completion {
            place,
            reason: "no command has this identifier",
            cid: completion.cid,
            sq_head: completion.sq_head,
        };
        let slot = self.slots.get_mut(usize::from(completion.cid)).ok_or(unknown)?;
        let Sent { task, offset } = slot.sent.take().ok_or(unknown)?;
        let disk = &mut self.disks[task.disk];
        if !completion.status().is_success() {
            return Err(Error::Status {
                place,
                opcode: task.operation.opcode(),
                nsid: disk.nsid,
                block: task.extent.block,
                status: completion.status(),
            });
        }
        match task.operation {
            Operation::Flush => counters.flushes += 1,
            Operation::Write | Operation::WriteZeroes => {
                counters.writes += 1;
                disk.release(task.extent);
                if self.phase == Phase::Random && self.random.draw() & 1 == 0 {
                    self.read_back.push((task.disk, task.extent));
                }
            }
            Operation::Read => {
                let words = disk.bytes(task.extent) as usize / 8;
                disk.verify(place, task.extent, &slot.data.words()[offset..offset + words])?;
                disk.release(task.extent);
                counters.reads += 1;
                counters.verified += 1;
            }
            Operation::RateRead => counters.reads += 1,
        }
        self.free.push(completion.cid);
        Ok(())
    }

    /// Sends one command. False when there is none to send, or no room.
    fn submit(&mut self, machine: &dyn Machine) -> bool {
        let queues = self.controller.queues.len();
        let with_room = |queue: &usize| self.controller.queues[*queue].pair.has_room();
        let Some(queue) = (0..queues).map(|step| (self.next_queue + step) % queues).find(with_room) else {
            return false;
        };
        let Some(&cid) = self.free.last() else { return false };
        let Some(task) = self.choose() else { return false };
        self.free.pop();
        self.next_queue = (queue + 1) % queues;
        // Half of all data begins somewhere in a page; where a rate is measured all of it at its start, as other programs have it.
        let choice = self.random.draw();
        let aligned = choice & 1 == 0 || task.operation == Operation::RateRead;
        let offset = if aligned { 0 } else { (choice >> 32) as usize % PAGE_WORDS };
        let entry = self.entry(cid, Sent { task, offset });
        if task.operation == Operation::RateRead {
            self.stopwatch.sent(cid, || machine.tsc());
        }
        self.controller.queues[queue].pair.push(&entry);
        true
    }

    fn choose(&mut self) -> Option<Task> {
        if self.phase == Phase::Fill && self.disks.iter().all(Disk::is_through) {
            self.phase = Phase::Random;
        }
        if self.phase == Phase::Settle && self.unflushed == 0 && self.in_flight() == 0 {
            self.disks.iter_mut().for_each(Disk::rewind);
            self.phase = Phase::Final;
        }
        if self.phase == Phase::Final && self.disks.iter().all(Disk::is_through) {
            self.phase = Phase::Done;
        }
        match self.phase {
            Phase::Fill => self.pass(Operation::Write),
            Phase::Random => self.choose_random(),
            Phase::Rate => {
                let disk = self.random.below(self.disks.len() as u64) as usize;
                let extent = self.disks[disk].random_aligned(&mut self.random, RATE_BYTES);
                Some(Task { operation: Operation::RateRead, disk, extent })
            }
            Phase::Settle => {
                let left = self.unflushed.checked_sub(1).filter(|_| self.in_flight() == 0)?;
                self.unflushed = left;
                Some(Task { operation: Operation::Flush, disk: left, extent: NOTHING })
            }
            Phase::Final => self.pass(Operation::Read),
            Phase::Done => None,
        }
    }

    /// The next extent of the pass over all disks.
    fn pass(&mut self, operation: Operation) -> Option<Task> {
        let (disk, extent) =
            self.disks.iter_mut().enumerate().find_map(|(index, disk)| Some((index, disk.advance()?)))?;
        Some(Task { operation, disk, extent })
    }

    fn choose_random(&mut self) -> Option<Task> {
        while let Some((disk, extent)) = self.read_back.pop() {
            // Another command may have taken the blocks since.
            if self.disks[disk].take(extent) {
                return Some(Task { operation: Operation::Read, disk, extent });
            }
        }
        let disk = self.random.below(self.disks.len() as u64) as usize;
        if self.random.below(FLUSH_EVERY) == 0 {
            return Some(Task { operation: Operation::Flush, disk, extent: NOTHING });
        }
        let extent = self.disks[disk].random(&mut self.random)?;
        let operation = if self.random.draw() & 1 == 0 {
            Operation::Read
        } else if self.controller.identity.has_write_zeroes() && self.random.below(WRITE_ZEROES_EVERY) == 0 {
            Operation::WriteZeroes
        } else {
            Operation::Write
        };
        Some(Task { operation, disk, extent })
    }

    /// The submission entry, with the data in place.
    fn entry(&mut self, cid: u16, sent: Sent) -> SubmissionEntry {
        let Sent { task, offset } = sent;
        let disk = &mut self.disks[task.disk];
        let slot = &mut self.slots[usize::from(cid)];
        slot.sent = Some(sent);
        let words = disk.bytes(task.extent) as usize / 8;
        let data = &mut slot.data.words_mut()[offset..offset + words];
        let mut entry = SubmissionEntry {
            opcode: task.operation.opcode(),
            cid,
            nsid: disk.nsid,
            ..SubmissionEntry::default()
        };
        if task.operation == Operation::Flush {
            return entry;
        }
        entry.set_cdw10_64(task.extent.block);
        let is_read = matches!(task.operation, Operation::Read | Operation::RateRead);
        let (checks, reference_tag) = disk.protection(task.extent, is_read);
        entry.cdw12 = (task.extent.blocks - 1) | checks;
        entry.cdw14 = reference_tag;
        match task.operation {
            Operation::WriteZeroes => disk.prepare_zeroes(task.extent),
            Operation::Write => {
                disk.prepare_write(task.extent, data);
                if self.random.below(FUA_EVERY) == 0 {
                    entry.cdw12 |= CDW12_FUA;
                }
            }
            // What was there before could be what is expected.
            Operation::Read => data.fill(POISON),
            Operation::RateRead | Operation::Flush => {}
        }
        if task.operation != Operation::WriteZeroes {
            (entry.prp1, entry.prp2) = slot.data_pointer(offset, words);
        }
        entry
    }
}

/// In the memory of a read until the controller writes to it.
const POISON: u64 = 0xdead_dead_dead_dead;
const NOTHING: Extent = Extent { block: 0, blocks: 0 };

impl Operation {
    fn opcode(self) -> u8 {
        match self {
            Self::Write => nvm::WRITE,
            Self::WriteZeroes => nvm::WRITE_ZEROES,
            Self::Read | Self::RateRead => nvm::READ,
            Self::Flush => nvm::FLUSH,
        }
    }
}
