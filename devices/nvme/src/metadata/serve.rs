//! Jobs of a worker: from a slot to requests of the backend, and to the end of the command.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Buffers, Operation, Request};
use bus::GuestRange;
use nvme_spec::Status;
use vm_memory::GuestAddress;

use super::job::{BUFFERS, Fault, Job, Jobs, Kind, NO_JOB, Next};
use super::occupied::Place;
use crate::shared::Shared;
use crate::uncorrectable::keep_healed;
use crate::worker::{Owner, Step, Worker, flush_step};

impl Worker {
    /// The worker's jobs, made when they are needed first.
    pub fn jobs(&mut self) -> Result<&mut Jobs, Status> {
        if self.jobs.is_none() {
            self.jobs = Jobs::new();
        }
        self.jobs.as_deref_mut().ok_or(Status::INTERNAL_ERROR)
    }

    /// Has a slot carry out `job`, in the next [`Worker::look_at_jobs`] at the earliest.
    pub fn put_job(&mut self, slot_index: u32, mut job: Box<Job>) -> Result<(), Status> {
        self.jobs()?;
        let (first, end) = job.occupies();
        let last = end.min(job.namespace.blocks);
        let slot = &mut self.slots[slot_index as usize];
        slot.write = job.kind.writes();
        // Not what is in flight, but all that is touched until it ends.
        let shift = job.namespace.block_shift;
        let (operation, nsid) = (Operation::Verify, job.namespace.nsid);
        let (offset_bytes, length_bytes) = (first << shift, last.saturating_sub(first) << shift);
        slot.running = Step { nsid, operation, offset_bytes, length_bytes };
        job.slot = slot_index;
        job.place = Some(Place::enter(&job.namespace.occupied, first, end, job.kind.writes()));
        let index = self.jobs()?.put(job);
        self.slots[slot_index as usize].job = index;
        Ok(())
    }

    /// Begins those jobs that wait and can begin. `true`: some did.
    pub fn look_at_jobs(&mut self, shared: &Shared) -> bool {
        let (mut position, mut begun) = (0, false);
        let worker = self.index;
        while let Some(jobs) = &mut self.jobs
            && let Some(&index) = jobs.waiting.get(position)
            && let Some(&buffer) = jobs.free_buffers.last()
        {
            let Some(job) = jobs.jobs[index as usize].as_mut() else {
                jobs.waiting.remove(position);
                continue;
            };
            let host = || (Arc::clone(&shared.host), worker);
            if !job.place.as_ref().is_some_and(|place| place.is_granted(host)) {
                position += 1;
                continue;
            }
            job.buffer = Some(buffer);
            let slot = job.slot;
            jobs.free_buffers.pop();
            jobs.waiting.remove(position);
            begun = true;
            if !self.go_on(shared, slot) {
                self.finish(shared, slot, self.slots[slot as usize].status);
            }
        }
        begun
    }

    /// The next request of a slot's command. `false`: there is none, and the slot's status says how the command ends.
    pub fn go_on(&mut self, shared: &Shared, slot_index: u32) -> bool {
        if self.slots[slot_index as usize].job != NO_JOB {
            match self.advance_job(shared, slot_index) {
                Ok(true) => return true,
                Ok(false) => {
                    self.end_job(slot_index);
                    if self.slots[slot_index as usize].owner == Owner::Orphan {
                        return false;
                    }
                }
                Err(fault) => {
                    let slot = &mut self.slots[slot_index as usize];
                    slot.status = fault.status;
                    if let Some(block) = fault.block {
                        slot.lba = block;
                        self.log_failure(shared, slot_index, fault.status);
                    }
                    return false;
                }
            }
        }
        self.next_step(slot_index)
    }

    /// `false`: it is done.
    fn advance_job(&mut self, shared: &Shared, slot_index: u32) -> Result<bool, Fault> {
        let token = self.token(slot_index);
        let slot = &mut self.slots[slot_index as usize];
        let jobs = self.jobs.as_deref_mut().ok_or(Status::INTERNAL_ERROR)?;
        let mut job =
            jobs.jobs.get_mut(slot.job as usize).and_then(Option::take).ok_or(Status::INTERNAL_ERROR)?;
        // Nobody wants its end any more, or the controller may not access memory: it has nothing to go on with, but blocks that it has
        // begun to write get their metadata.
        let stop = match slot.owner {
            Owner::Orphan => Some(Status::ABORT_REQUESTED),
            _ => (!shared.is_bus_master()).then_some(Status::DATA_TRANSFER_ERROR),
        };
        let namespace = Arc::clone(&job.namespace);
        let advanced =
            jobs.advance(&mut job, &shared.memory, stop, |healed| keep_healed(shared, &namespace, healed));
        if job.kind == Kind::Copy {
            slot.copied = job.segment as u32;
        }
        if let Ok(Some(next)) = &advanced {
            slot.write = next.operation.writes();
            let memory = Arc::clone(&jobs.memory);
            let range = next.buffer.map(|buffer| GuestRange {
                address: GuestAddress(buffer),
                length_bytes: next.length_bytes as u32,
            });
            let buffers = match &range {
                Some(range) => Buffers::Private(&memory, std::slice::from_ref(range)),
                None => Buffers::None,
            };
            let &Next { operation, offset_bytes, length_bytes, .. } = next;
            let request = Request { token, operation, offset_bytes, length_bytes, buffers };
            job.namespace.backend.submit(&mut self.context, &request);
        } else if advanced.is_ok()
            && job.kind.writes()
            && !job.fua
            && !shared.write_cache.load(Ordering::SeqCst)
        {
            // It began before the cache was switched off, and the flush of Set Features may have come before it.
            slot.steps.push(flush_step(job.namespace.nsid));
        }
        let place = slot.job as usize;
        jobs.jobs[place] = Some(job);
        advanced.map(|next| next.is_some())
    }

    /// The job of a slot, if it has one, is no more, and leaves its blocks.
    pub fn end_job(&mut self, slot_index: u32) {
        let index = std::mem::replace(&mut self.slots[slot_index as usize].job, NO_JOB);
        let Some(jobs) = self.jobs.as_deref_mut() else { return };
        let Some(job) = jobs.jobs.get_mut(index as usize).and_then(Option::take) else { return };
        jobs.free.push(index);
        jobs.waiting.retain(|&waiting| waiting != index);
        jobs.free_buffers.extend(job.buffer);
        if jobs.spare.len() < BUFFERS as usize {
            jobs.spare.extend(job.into_room());
        }
    }

    /// The queues are gone: jobs that have not begun never will.
    pub fn drop_waiting_jobs(&mut self, shared: &Shared) {
        let Some(jobs) = self.jobs.as_deref() else { return };
        let waiting = jobs.waiting.iter().filter_map(|&index| jobs.jobs[index as usize].as_ref());
        let slots: Vec<u32> = waiting.map(|job| job.slot).collect();
        for slot in slots {
            if self.slots[slot as usize].owner == Owner::Orphan {
                self.finish(shared, slot, Status::ABORT_REQUESTED);
            }
        }
    }
}
