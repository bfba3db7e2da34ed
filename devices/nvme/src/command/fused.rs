//! Fused Compare and Write (Base 3.4.2, NVM 2.1.5): two commands that are next to each other in a submission queue, one atomic unit.
//!
//! A first half at the tail stays in its queue until there is an entry behind it, so that nothing of it needs to be remembered. A pair
//! that is whole takes one slot, claims its range ([`crate::exclusion`]) and is carried out when that is granted; a worker carries out
//! one pair at a time.

use std::sync::Arc;

use block::{Buffers, Operation, Request};
use bus::GuestRange;
use nvme_spec::entry::{FUSE_FIRST, FUSE_SECOND};
use nvme_spec::opcode::nvm;
use nvme_spec::{Status, SubmissionEntry};

use super::io::{blocks, force_unit_access};
use crate::config::ControllerConfig;
use crate::data::Direction;
use crate::doorbell::MemoryGone;
use crate::exclusion::{ByteRange, Participant};
use crate::metadata::{FORMATS, Job, Kind};
use crate::namespace::{self, Namespace};
use crate::queue::Hold;
use crate::shared::Shared;
use crate::worker::{Owner, Step, Worker};

/// How far a pair has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its range is claimed.
    Claimed,
    Comparing,
    Writing,
}

/// A Compare and the Write that it is fused with.
#[derive(Debug)]
pub(crate) struct Pair {
    /// Of both; its command identifier is that of the Compare.
    pub slot: u32,
    write_cid: u16,
    stage: Stage,
    namespace: Arc<Namespace>,
    range: ByteRange,
    fua: bool,
    compare_ranges: Vec<GuestRange>,
    write_ranges: Vec<GuestRange>,
    /// How Compare and Write are carried out instead if their blocks have metadata.
    jobs: [Option<Box<Job>>; 2],
}

/// What is to happen with a command that was fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It is a command of its own, and nothing is in its way.
    Start,
    /// It is back in its queue, which waits.
    Hold,
    /// It was begun or ended here, perhaps with the one behind it.
    Done,
}

/// Identify Controller ACWU, 0's based: blocks of the largest format in the largest transfer, where metadata are not in it.
pub(crate) fn atomic_compare_and_write_unit(config: &ControllerConfig) -> u16 {
    let largest = FORMATS.iter().map(|format| format.shift).max().unwrap_or(0);
    let blocks = config.max_transfer_bytes() >> largest;
    (blocks.clamp(1, 65_536) - 1) as u16
}

impl Worker {
    fn participant(&self, shared: &Shared) -> Participant {
        (shared.controller_id, self.index)
    }

    /// Looks at the claims of all workers, and begins the pair that waits here if its range is granted, which is what `true` says. Costs
    /// one load if nothing is claimed.
    pub fn look_at_claims(&mut self, shared: &Shared) -> bool {
        let exclusion = &shared.subsystem.exclusion;
        let waits = self.pair.as_ref().is_some_and(|pair| pair.stage == Stage::Claimed);
        if !waits && !exclusion.concerns(&self.claims) {
            return false;
        }
        let by = self.participant(shared);
        let (slots, pair) = (&self.slots, self.pair.as_ref().map(|pair| pair.slot));
        let is_clear = |range: &ByteRange| {
            let mut others = slots.iter().zip(0..).filter(|&(_, index)| Some(index) != pair);
            !others.any(|(slot, _)| slot.touches(range))
        };
        if exclusion.look(by, &mut self.claims, is_clear) {
            for queue in self.sqs.iter_mut().flatten().filter(|queue| queue.hold == Hold::Claims) {
                queue.hold = Hold::No;
            }
        }
        let begins = waits && exclusion.is_granted(by);
        if begins {
            self.begin_pair(shared);
        }
        begins
    }

    /// For a command that is fused, or while ranges are claimed.
    pub fn admit(
        &mut self,
        shared: &Shared,
        sq_index: usize,
        entry: &SubmissionEntry,
    ) -> Result<Admission, MemoryGone> {
        let touched = self.touched(entry);
        let Some(queue) = self.sqs[sq_index].as_mut() else { return Ok(Admission::Done) };
        match entry.fuse() {
            0 => {
                if touched.is_none_or(|range| !self.claims.excludes(&range)) {
                    return Ok(Admission::Start);
                }
                queue.give_back(Hold::Claims);
                Ok(Admission::Hold)
            }
            FUSE_FIRST if self.pair.is_some() => {
                queue.give_back(Hold::Claims);
                Ok(Admission::Hold)
            }
            FUSE_FIRST if queue.is_empty() => {
                queue.give_back(Hold::Half { tail: queue.tail });
                Ok(Admission::Hold)
            }
            FUSE_FIRST => {
                queue.in_flight += 1;
                let ended = match queue.fetch(&shared.memory)? {
                    Some(second) if second.fuse() == FUSE_SECOND => {
                        queue.in_flight += 1;
                        let started = self.start_pair(shared, sq_index as u32, entry, &second);
                        started.map_err(|(first, second_status)| (first, Some((second.cid, second_status))))
                    }
                    Some(_) => {
                        queue.give_back(Hold::No);
                        Err((Status::ABORTED_MISSING_FUSED, None))
                    }
                    None => Err((Status::ABORTED_MISSING_FUSED, None)),
                };
                if let Err((status, second)) = ended {
                    self.end(shared, sq_index as u32, entry.cid, 0, status);
                    if let Some((cid, status)) = second {
                        self.end(shared, sq_index as u32, cid, 0, status);
                    }
                }
                Ok(Admission::Done)
            }
            FUSE_SECOND => {
                queue.in_flight += 1;
                self.end(shared, sq_index as u32, entry.cid, 0, Status::ABORTED_MISSING_FUSED);
                Ok(Admission::Done)
            }
            // Reserved: refused like any command with an invalid field.
            _ => Ok(Admission::Start),
        }
    }

    /// The bytes that a command could touch; nothing if it will be refused.
    fn touched(&self, entry: &SubmissionEntry) -> Option<ByteRange> {
        let namespace = namespace::find(&self.namespaces, entry.nsid).ok()?;
        let (first, length) = match entry.opcode {
            nvm::FLUSH => return None,
            // Their ranges are in guest memory, which may change before they are read again.
            nvm::DATASET_MANAGEMENT | nvm::COPY => (0, namespace.blocks << namespace.block_shift),
            _ => namespace.byte_range(entry.cdw10_64(), blocks(entry)).ok()?,
        };
        Some(ByteRange { nsid: namespace.nsid, first, end: first + length })
    }

    /// Checks a pair and claims its range. The error is how the two commands end: nothing of either is carried out, and of the one
    /// without a fault that is what its status says.
    fn start_pair(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        compare: &SubmissionEntry,
        write: &SubmissionEntry,
    ) -> Result<(), (Status, Status)> {
        let invalid = Status::INVALID_FIELD.do_not_retry();
        let first = |status| (status, Status::ABORTED_FAILED_FUSED);
        let second = |status| (Status::ABORTED_FAILED_FUSED, status);
        // There is no other fused operation.
        if (compare.opcode, write.opcode) != (nvm::COMPARE, nvm::WRITE) {
            return Err((invalid, invalid));
        }
        let namespace = namespace::ready(&self.namespaces, compare.nsid).map_err(first).cloned()?;
        shared.gate.check(compare.opcode, compare.nsid).map_err(first)?;
        shared.gate.check(write.opcode, write.nsid).map_err(second)?;
        let place = |entry: &SubmissionEntry| (entry.nsid, entry.cdw10_64(), blocks(entry));
        // "If the LBA ranges of the Compare and Write commands differ ... Invalid Field in Command"
        if place(compare) != place(write) {
            return Err((invalid, invalid));
        }
        let count = blocks(compare);
        if namespace.metadata.is_none() && count << namespace.block_shift > shared.config.max_transfer_bytes()
        {
            return Err(first(invalid));
        }
        if count > u64::from(atomic_compare_and_write_unit(&shared.config)) + 1 {
            return Err(first(Status::ATOMIC_WRITE_UNIT_EXCEEDED.do_not_retry()));
        }
        let (offset, length) = namespace.byte_range(compare.cdw10_64(), count).map_err(first)?;
        namespace.check_writable().map_err(second)?;
        self.check_readable(shared, sq_index, compare, &namespace, (offset, length)).map_err(first)?;
        let (mut compare_ranges, mut write_ranges, mut jobs) = (Vec::new(), Vec::new(), [None, None]);
        let halves = [
            (compare, &mut compare_ranges, Kind::Compare, first as fn(Status) -> (Status, Status)),
            (write, &mut write_ranges, Kind::Write, second),
        ];
        for ((entry, ranges, kind, fault), job) in halves.into_iter().zip(&mut jobs) {
            if namespace.metadata.is_some() {
                let half = self.transfer_job(shared, sq_index, entry, &namespace, kind);
                *job = Some(half.map_err(fault)?);
                continue;
            }
            let walked = self.walker.walk(&shared.memory, entry, length, Direction::FromGuest, ranges);
            walked.map_err(fault)?;
        }
        let slot = self.take_slot(Owner::Queue(sq_index), compare.cid, compare.nsid);
        let slot = slot.ok_or(first(Status::INTERNAL_ERROR))?;
        self.slots[slot as usize].lba = compare.cdw10_64();
        let range = ByteRange { nsid: namespace.nsid, first: offset, end: offset + length };
        let fua = force_unit_access(shared, write);
        let (write_cid, stage) = (write.cid, Stage::Claimed);
        self.pair =
            Some(Pair { slot, write_cid, stage, namespace, range, fua, compare_ranges, write_ranges, jobs });
        shared.subsystem.exclusion.claim(self.participant(shared), range);
        self.look_at_claims(shared);
        Ok(())
    }

    /// The range is granted.
    fn begin_pair(&mut self, shared: &Shared) {
        let Some(pair) = &self.pair else { return };
        let slot = pair.slot;
        if shared.is_bus_master() {
            self.next_of_pair(slot);
        } else {
            // A controller that may not access memory any more cannot compare with it.
            self.finish(shared, slot, Status::DATA_TRANSFER_ERROR);
        }
    }

    /// Begins the next request of a pair. `false`: there is none, or the slot is no pair's.
    pub fn next_of_pair(&mut self, slot_index: u32) -> bool {
        let token = self.token(slot_index);
        let Some(pair) = self.pair.as_mut().filter(|pair| pair.slot == slot_index) else { return false };
        let (stage, operation, ranges) = match pair.stage {
            Stage::Claimed => (Stage::Comparing, Operation::Compare, &pair.compare_ranges),
            Stage::Comparing => (Stage::Writing, Operation::Write { fua: pair.fua }, &pair.write_ranges),
            Stage::Writing => return false,
        };
        pair.stage = stage;
        if let Some(job) = pair.jobs[usize::from(stage == Stage::Writing)].take() {
            return self.put_job(slot_index, job).is_ok();
        }
        let (offset_bytes, length_bytes) = (pair.range.first, pair.range.end - pair.range.first);
        let slot = &mut self.slots[slot_index as usize];
        slot.write = operation.writes();
        slot.running = Step { nsid: pair.range.nsid, operation, offset_bytes, length_bytes };
        let (units, counters) = (length_bytes / 512, &mut self.counters);
        if slot.write {
            counters.writes += 1;
            counters.units_written += units;
        } else {
            counters.reads += 1;
            counters.units_read += units;
        }
        let buffers = Buffers::Guest(ranges);
        let request = Request { token, operation, offset_bytes, length_bytes, buffers };
        pair.namespace.backend.submit(&mut self.context, &request);
        true
    }

    /// The slot of a pair is free again: its range is too. The command identifier of the Write, and how the two end if the slot ended
    /// with `status`; `None` if the slot is no pair's.
    pub fn end_pair(&mut self, shared: &Shared, slot: u32, status: Status) -> Option<(u16, Status, Status)> {
        let pair = self.pair.take_if(|pair| pair.slot == slot)?;
        shared.subsystem.exclusion.release(self.participant(shared));
        let (first, second) = match pair.stage {
            _ if status.is_success() => (status, status),
            // What was compared was the same.
            Stage::Writing => (Status::SUCCESS, status),
            Stage::Claimed | Stage::Comparing => (status, Status::ABORTED_FAILED_FUSED),
        };
        Some((pair.write_cid, first, second))
    }

    /// The queues are gone: a pair that has not begun never will.
    pub fn drop_waiting_pair(&mut self, shared: &Shared) {
        if let Some(pair) = self.pair.as_ref().filter(|pair| pair.stage == Stage::Claimed) {
            let slot = pair.slot;
            let _ = self.end_pair(shared, slot, Status::ABORT_REQUESTED);
            self.give_back(slot);
        }
    }
}
