//! I/O commands (NVM 3): from an entry to backend requests.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Buffers, Operation, Request};
use nvme_spec::entry::PSDT_SGL_DESCRIPTOR;
use nvme_spec::log::ErrorEntry;
use nvme_spec::opcode::{self, nvm};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry};

use super::limits::{VERIFY_BYTES, WRITE_UNCORRECTABLE_BYTES, WRITE_ZEROES_BYTES};
use super::reservations::is_reservation;
use crate::data::Direction;
use crate::metadata::{is_about_blocks, limited};
use crate::namespace::{self, Namespace};
use crate::prp;
use crate::shared::Shared;
use crate::uncorrectable::{TooMany, keep_marks};
use crate::worker::{Owner, Step, Worker, flush_step};

impl Worker {
    /// Starts a command of submission queue `sq_index`; the caller has checked that a slot is free. `true`: a backend
    /// request is in flight; `false`: done, successfully, at once.
    pub fn start(&mut self, shared: &Shared, sq_index: u32, entry: &SubmissionEntry) -> Result<bool, Status> {
        if !is_supported(entry.opcode) {
            return Err(Status::INVALID_OPCODE.do_not_retry());
        }
        // FUSE 11b and PSDT 11b are reserved, whether there are data or not; the halves of fused operations do not come here.
        if entry.fuse() != 0 || entry.psdt() > PSDT_SGL_DESCRIPTOR {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        if entry.opcode == nvm::FLUSH && entry.nsid == NSID_BROADCAST {
            for namespace in namespace::active(&self.namespaces) {
                shared.gate.check(entry.opcode, namespace.nsid)?;
            }
            return self.flush_all(Owner::Queue(sq_index), entry.cid);
        }
        let namespace = Arc::clone(namespace::ready(&self.namespaces, entry.nsid)?);
        if is_reservation(entry.opcode) {
            shared.gate.check_access(namespace.nsid)?;
            return self.reservation(shared, sq_index, entry, &namespace);
        }
        shared.gate.check(entry.opcode, namespace.nsid)?;
        if namespace.metadata.is_some() && is_about_blocks(entry.opcode) {
            return self.start_job(shared, sq_index, entry, &namespace);
        }
        match entry.opcode {
            nvm::FLUSH => {
                let step = flush_step(namespace.nsid);
                self.start_steps(Owner::Queue(sq_index), entry, [step])
            }
            nvm::READ => self.transfer(shared, sq_index, entry, &namespace, Operation::Read),
            nvm::COMPARE => self.transfer(shared, sq_index, entry, &namespace, Operation::Compare),
            nvm::WRITE => {
                let fua = force_unit_access(shared, entry);
                self.transfer(shared, sq_index, entry, &namespace, Operation::Write { fua })
            }
            nvm::WRITE_ZEROES => self.write_zeroes(shared, sq_index, entry, &namespace),
            nvm::VERIFY => self.verify(shared, sq_index, entry, &namespace),
            nvm::WRITE_UNCORRECTABLE => write_uncorrectable(shared, entry, &namespace),
            nvm::COPY => self.copy(shared, sq_index, entry, &namespace),
            _ => self.deallocate(shared, sq_index, entry, &namespace),
        }
    }

    /// Flushes every namespace, for the broadcast NSID, for shutdown, and when the write cache is switched off. One that fails keeps no
    /// other from being flushed.
    pub fn flush_all(&mut self, owner: Owner, cid: u16) -> Result<bool, Status> {
        let slot = self.take_slot(owner, cid, NSID_BROADCAST).ok_or(Status::INTERNAL_ERROR)?;
        let table = Arc::clone(&self.namespaces);
        let command = &mut self.slots[slot as usize];
        command.write = true;
        command.goes_on = true;
        command.steps.extend(namespace::active(&table).map(|namespace| flush_step(namespace.nsid)));
        Ok(self.start_slot(slot))
    }

    /// Starts a command that needs these requests, the last one first. They write, unless their command is a Verify.
    pub fn start_steps(
        &mut self,
        owner: Owner,
        entry: &SubmissionEntry,
        steps: impl IntoIterator<Item = Step>,
    ) -> Result<bool, Status> {
        let slot = self.take_slot(owner, entry.cid, entry.nsid).ok_or(Status::INTERNAL_ERROR)?;
        self.slots[slot as usize].lba = entry.cdw10_64();
        self.slots[slot as usize].write = entry.opcode != nvm::VERIFY;
        self.slots[slot as usize].steps.extend(steps);
        Ok(self.start_slot(slot))
    }

    /// Submits the first step; gives the slot back if there is none.
    fn start_slot(&mut self, slot: u32) -> bool {
        let started = self.next_step(slot);
        if !started {
            self.give_back(slot);
        }
        started
    }

    /// Read, Write and Compare (NVM 3.2.4, 3.2.6, 3.2.1). Limited Retry (CDW12 bit 31) asks for less effort than there could be; there
    /// is one attempt always.
    fn transfer(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        entry: &SubmissionEntry,
        namespace: &Namespace,
        operation: Operation,
    ) -> Result<bool, Status> {
        let write = operation.writes();
        let blocks = blocks(entry);
        let length_bytes = blocks << namespace.block_shift;
        if length_bytes > shared.config.max_transfer_bytes() {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        let (offset_bytes, length_bytes) = namespace.byte_range(entry.cdw10_64(), blocks)?;
        if write {
            namespace.check_writable()?;
        } else {
            self.check_readable(shared, sq_index, entry, namespace, (offset_bytes, length_bytes))?;
        }
        let mut ranges = std::mem::take(&mut self.ranges);
        ranges.clear();
        let direction = if operation == Operation::Read { Direction::ToGuest } else { Direction::FromGuest };
        let walked = self.walker.walk(&shared.memory, entry, length_bytes, direction, &mut ranges);
        let slot = walked.and_then(|()| {
            self.take_slot(Owner::Queue(sq_index), entry.cid, entry.nsid).ok_or(Status::INTERNAL_ERROR)
        });
        let started = slot.map(|index| {
            let slot = &mut self.slots[index as usize];
            slot.lba = entry.cdw10_64();
            slot.write = write;
            // "FUA ... the controller shall ... commit that data and metadata, if any, to non-volatile medium": with a read,
            // what it returned is stable before the command completes.
            if !write && entry.cdw12 & opcode::CDW12_FUA != 0 && !namespace.read_only {
                slot.steps.push(flush_step(namespace.nsid));
            }
            slot.running = Step { nsid: namespace.nsid, operation, offset_bytes, length_bytes };
            let token = self.token(index);
            let buffers = Buffers::Guest(&ranges);
            let request = Request { token, operation, offset_bytes, length_bytes, buffers };
            namespace.backend.submit(&mut self.context, &request);
            let units = length_bytes / 512;
            if write {
                self.counters.writes += 1;
                self.counters.units_written += units;
            } else {
                self.counters.reads += 1;
                self.counters.units_read += units;
            }
            true
        });
        self.ranges = ranges;
        started
    }

    /// Write Zeroes (NVM 3.2.8).
    fn write_zeroes(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        entry: &SubmissionEntry,
        namespace: &Namespace,
    ) -> Result<bool, Status> {
        let (offset_bytes, length_bytes) = limited_range(entry, namespace, WRITE_ZEROES_BYTES)?;
        namespace.check_writable()?;
        let operation = Operation::WriteZeroes {
            deallocate: entry.cdw12 & opcode::CDW12_DEALLOCATE != 0,
            fua: force_unit_access(shared, entry),
        };
        let step = Step { nsid: entry.nsid, operation, offset_bytes, length_bytes };
        self.start_steps(Owner::Queue(sq_index), entry, [step])
    }

    /// Verify (NVM 3.2.5): reads and transfers nothing. With FUA what is read is stable.
    fn verify(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        entry: &SubmissionEntry,
        namespace: &Namespace,
    ) -> Result<bool, Status> {
        let (offset_bytes, length_bytes) = limited_range(entry, namespace, VERIFY_BYTES)?;
        self.check_readable(shared, sq_index, entry, namespace, (offset_bytes, length_bytes))?;
        // "Logical blocks read as part of Compare, Read, and Verify operations shall be included" (Data Units Read).
        self.counters.units_read += length_bytes / 512;
        let step = Step { nsid: entry.nsid, operation: Operation::Verify, offset_bytes, length_bytes };
        let flush = entry.cdw12 & opcode::CDW12_FUA != 0 && !namespace.read_only;
        let flush = flush.then(|| flush_step(namespace.nsid));
        self.start_steps(Owner::Queue(sq_index), entry, [step].into_iter().chain(flush))
    }

    /// Refuses to read blocks that are marked as uncorrectable, and logs that.
    pub fn check_readable(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        entry: &SubmissionEntry,
        namespace: &Namespace,
        (offset_bytes, length_bytes): (u64, u64),
    ) -> Result<(), Status> {
        if !namespace.is_uncorrectable(offset_bytes, length_bytes) {
            return Ok(());
        }
        let status = Status::UNRECOVERED_READ_ERROR.do_not_retry();
        let sq_id = self.sqs[sq_index as usize].as_ref().map_or(0xffff, |queue| queue.id);
        let entry = ErrorEntry {
            sq_id,
            cid: entry.cid,
            status: status.0 << 1,
            parameter_location: 0xffff,
            lba: offset_bytes >> namespace.block_shift,
            nsid: namespace.nsid,
            ..ErrorEntry::default()
        };
        self.log_media_error(shared, entry);
        Err(status)
    }

    /// Dataset Management (NVM 3.2.3). All ranges are checked before any is deallocated.
    fn deallocate(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        entry: &SubmissionEntry,
        namespace: &Namespace,
    ) -> Result<bool, Status> {
        let count = (entry.cdw10 as usize & 0xff) + 1;
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        scratch.resize(count * opcode::DSM_RANGE_SIZE_BYTES, 0);
        let read = self.read_data(shared, entry, &mut scratch);
        let outcome = read.and_then(|()| {
            if entry.cdw11 & opcode::DSM_DEALLOCATE == 0 {
                // The other attributes are hints.
                return Ok(false);
            }
            namespace.check_writable()?;
            for range in scratch.as_chunks::<{ opcode::DSM_RANGE_SIZE_BYTES }>().0 {
                dsm_step(namespace, range)?;
            }
            let ranges = scratch.as_chunks::<{ opcode::DSM_RANGE_SIZE_BYTES }>().0.iter().rev();
            let steps = ranges
                .filter_map(|range| dsm_step(namespace, range).ok())
                .filter(|step| step.length_bytes > 0);
            self.start_steps(Owner::Queue(sq_index), entry, steps)
        });
        self.scratch = scratch;
        outcome
    }

    /// Copies the data that a command's data pointer describes.
    pub fn read_data(
        &mut self,
        shared: &Shared,
        entry: &SubmissionEntry,
        data: &mut [u8],
    ) -> Result<(), Status> {
        let mut ranges = std::mem::take(&mut self.ranges);
        ranges.clear();
        let length_bytes = data.len() as u64;
        let walked = self.walker.walk(&shared.memory, entry, length_bytes, Direction::FromGuest, &mut ranges);
        let read = walked.and_then(|()| prp::read_ranges(&shared.memory, &ranges, data));
        self.ranges = ranges;
        read
    }
}

/// Write Uncorrectable (NVM 3.2.7): nothing is stored, and reads fail until the blocks are written.
fn write_uncorrectable(
    shared: &Shared,
    entry: &SubmissionEntry,
    namespace: &Namespace,
) -> Result<bool, Status> {
    let (offset_bytes, length_bytes) = limited_range(entry, namespace, WRITE_UNCORRECTABLE_BYTES)?;
    namespace.check_writable()?;
    let first = offset_bytes >> namespace.block_shift;
    let marked = namespace.uncorrectable.mark(first, first + (length_bytes >> namespace.block_shift));
    // No more blocks can be marked until some of those that are have been written.
    marked.map_err(|TooMany| Status::CAPACITY_EXCEEDED)?;
    keep_marks(shared, namespace.nsid)?;
    Ok(false)
}

/// The I/O commands that [`Worker::start`] knows.
fn is_supported(opcode: u8) -> bool {
    matches!(
        opcode,
        nvm::FLUSH
            | nvm::WRITE
            | nvm::READ
            | nvm::WRITE_UNCORRECTABLE
            | nvm::COMPARE
            | nvm::WRITE_ZEROES
            | nvm::DATASET_MANAGEMENT
            | nvm::VERIFY
            | nvm::COPY
    ) || is_reservation(opcode)
}

/// The byte range of a command without data: not longer than a limit of Identify (CNS 06h) and inside the namespace.
fn limited_range(
    entry: &SubmissionEntry,
    namespace: &Namespace,
    limit_bytes: u64,
) -> Result<(u64, u64), Status> {
    limited(namespace, entry.cdw10_64(), blocks(entry), limit_bytes)
}

/// Number of logical blocks of a command: CDW12 has one less, so that 65,536 fit.
pub(crate) fn blocks(entry: &SubmissionEntry) -> u64 {
    u64::from(entry.cdw12 & opcode::CDW12_NLB_MASK) + 1
}

pub(crate) fn force_unit_access(shared: &Shared, entry: &SubmissionEntry) -> bool {
    entry.cdw12 & opcode::CDW12_FUA != 0 || !shared.write_cache.load(Ordering::Acquire)
}

/// One Dataset Management range: context attributes, length in blocks, first block (NVM figure 40).
fn dsm_step(namespace: &Namespace, range: &[u8; opcode::DSM_RANGE_SIZE_BYTES]) -> Result<Step, Status> {
    let [_, _, _, _, l0, l1, l2, l3, first @ ..] = *range;
    let length = u32::from_le_bytes([l0, l1, l2, l3]);
    let (offset_bytes, length_bytes) = namespace.byte_range(u64::from_le_bytes(first), u64::from(length))?;
    Ok(Step { nsid: namespace.nsid, operation: Operation::Discard, offset_bytes, length_bytes })
}
