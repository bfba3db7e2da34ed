//! Commands to blocks with metadata (NVM 3.2, 5.2): from an entry to a job.

use std::sync::Arc;

use block::Operation;
use nvme_spec::opcode::{self, nvm};
use nvme_spec::{Status, SubmissionEntry};

use super::format::Metadata;
use super::job::{Job, Kind, Segment};
use super::protection::{PROTECTION_BYTES, Wanted};
use crate::command::copy::{CopyRange, ranges_of};
use crate::command::io::{blocks, force_unit_access};
use crate::command::limits::{VERIFY_BYTES, WRITE_ZEROES_BYTES};
use crate::data::Direction;
use crate::namespace::Namespace;
use crate::shared::Shared;
use crate::worker::{Owner, Worker, flush_step};

const INVALID_PROTECTION: Status = Status::INVALID_PROTECTION_INFORMATION.do_not_retry();

/// Whether a command reads or writes blocks, and with them their metadata.
pub(crate) fn is_about_blocks(opcode: u8) -> bool {
    matches!(
        opcode,
        nvm::READ
            | nvm::WRITE
            | nvm::COMPARE
            | nvm::VERIFY
            | nvm::WRITE_ZEROES
            | nvm::COPY
            | nvm::DATASET_MANAGEMENT
    )
}

impl Metadata {
    /// Whether metadata go with a command. With PRACT, where they are protection information and nothing else, the controller makes them
    /// of what is written, and keeps them from who reads (NVM 5.2.2).
    fn are_transferred(&self, wanted: &Wanted) -> bool {
        self.protection.is_none() || !wanted.action || usize::from(self.bytes) > PROTECTION_BYTES
    }
}

impl Namespace {
    /// Bytes that a transfer of `blocks` blocks has by its data pointer, and how many of a buffer for metadata.
    pub fn transfer_bytes(&self, blocks: u64, are_transferred: bool) -> (u64, u64) {
        let data_bytes = blocks << self.block_shift;
        match self.metadata.filter(|_| are_transferred) {
            None => (data_bytes, 0),
            Some(Metadata { bytes, extended: true, .. }) => (data_bytes + blocks * u64::from(bytes), 0),
            Some(Metadata { bytes, .. }) => (data_bytes, blocks * u64::from(bytes)),
        }
    }
}

impl Worker {
    /// A command to a namespace with metadata for which [`is_about_blocks`] holds. It is in flight afterwards, unless it has nothing to do.
    pub fn start_job(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        entry: &SubmissionEntry,
        namespace: &Arc<Namespace>,
    ) -> Result<bool, Status> {
        let job = match entry.opcode {
            nvm::READ => self.transfer_job(shared, sq_index, entry, namespace, Kind::Read)?,
            nvm::COMPARE => self.transfer_job(shared, sq_index, entry, namespace, Kind::Compare)?,
            nvm::WRITE => self.transfer_job(shared, sq_index, entry, namespace, Kind::Write)?,
            nvm::VERIFY => self.verify_job(shared, sq_index, entry, namespace)?,
            nvm::WRITE_ZEROES => self.write_zeroes_job(shared, entry, namespace)?,
            nvm::COPY => self.copy_job(shared, sq_index, entry, namespace)?,
            _ => match self.deallocate_job(shared, entry, namespace)? {
                Some(job) => job,
                None => return Ok(false),
            },
        };
        let slot = self.take_slot(Owner::Queue(sq_index), entry.cid, entry.nsid);
        let slot = slot.ok_or(Status::INTERNAL_ERROR)?;
        self.slots[slot as usize].lba = entry.cdw10_64();
        // With a read, "FUA" makes stable what it returned.
        if !job.kind.writes() && entry.cdw12 & opcode::CDW12_FUA != 0 && !namespace.read_only {
            self.slots[slot as usize].steps.push(flush_step(namespace.nsid));
        }
        if let Err(status) = self.put_job(slot, job) {
            self.give_back(slot);
            return Err(status);
        }
        self.look_at_jobs(shared);
        Ok(true)
    }

    /// Read, Write or Compare, or one half of both fused.
    pub fn transfer_job(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        entry: &SubmissionEntry,
        namespace: &Arc<Namespace>,
        kind: Kind,
    ) -> Result<Box<Job>, Status> {
        let (metadata, wanted) = (metadata_of(namespace)?, Wanted::of(entry));
        let (first, count) = (entry.cdw10_64(), blocks(entry));
        let transferred = metadata.are_transferred(&wanted);
        let (data_bytes, separate_bytes) = namespace.transfer_bytes(count, transferred);
        // MDTS includes metadata that are interleaved with the data, and no others.
        if data_bytes > shared.config.max_transfer_bytes() {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        let range = namespace.byte_range(first, count)?;
        if let Some(protection) = &metadata.protection {
            // What is compared is what the host has: there is nothing to make or to keep back.
            if kind == Kind::Compare && wanted.action {
                return Err(INVALID_PROTECTION);
            }
            protection.allows(&wanted, first)?;
        }
        if kind.writes() {
            namespace.check_writable()?;
        } else {
            self.check_readable(shared, sq_index, entry, namespace, range)?;
        }
        let mut job = self.jobs()?.fresh(kind, namespace, metadata);
        job.wanted = wanted;
        job.transferred = transferred;
        job.fua = kind.writes() && force_unit_access(shared, entry);
        job.segments.push(whole(first, count));
        let direction = if kind == Kind::Read { Direction::ToGuest } else { Direction::FromGuest };
        self.walker.walk(&shared.memory, entry, data_bytes, direction, &mut job.data.ranges)?;
        if separate_bytes > 0 {
            let ranges = &mut job.separate.ranges;
            self.walker.walk_metadata(&shared.memory, entry, separate_bytes, direction, ranges)?;
            shared.windows.check_together(&job.data.ranges, &job.separate.ranges)?;
        }
        let units = (count << namespace.block_shift) / 512;
        if kind.writes() {
            self.counters.writes += 1;
            self.counters.units_written += units;
        } else {
            self.counters.reads += 1;
            self.counters.units_read += units;
        }
        Ok(job)
    }

    fn verify_job(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        entry: &SubmissionEntry,
        namespace: &Arc<Namespace>,
    ) -> Result<Box<Job>, Status> {
        let (metadata, wanted, first) = (metadata_of(namespace)?, Wanted::of(entry), entry.cdw10_64());
        let range = limited(namespace, first, blocks(entry), VERIFY_BYTES)?;
        if let Some(protection) = &metadata.protection {
            if wanted.action {
                return Err(INVALID_PROTECTION);
            }
            protection.allows(&wanted, first)?;
        }
        self.check_readable(shared, sq_index, entry, namespace, range)?;
        self.counters.units_read += range.1 / 512;
        let mut job = self.jobs()?.fresh(Kind::Verify, namespace, metadata);
        job.wanted = wanted;
        job.segments.push(whole(first, blocks(entry)));
        Ok(job)
    }

    /// Without PRACT protection information becomes all zeroes, with it it is made of the tags (NVM 3.2.8), deallocated or not. There is
    /// nothing that could be checked.
    fn write_zeroes_job(
        &mut self,
        shared: &Shared,
        entry: &SubmissionEntry,
        namespace: &Arc<Namespace>,
    ) -> Result<Box<Job>, Status> {
        let (metadata, wanted, first) = (metadata_of(namespace)?, Wanted::of(entry), entry.cdw10_64());
        limited(namespace, first, blocks(entry), WRITE_ZEROES_BYTES)?;
        if metadata.protection.is_some() && wanted.checks() {
            return Err(INVALID_PROTECTION);
        }
        namespace.check_writable()?;
        let fua = force_unit_access(shared, entry);
        let deallocate = entry.cdw12 & opcode::CDW12_DEALLOCATE != 0;
        let operation = Operation::WriteZeroes { deallocate, fua };
        let kind = Kind::Clear { operation, holes: metadata.protection.is_none() };
        let mut job = self.jobs()?.fresh(kind, namespace, metadata);
        (job.wanted, job.fua) = (wanted, fua);
        job.segments.push(whole(first, blocks(entry)));
        Ok(job)
    }

    /// Protection information of deallocated blocks has an application tag of FFFFh and a reference tag of FFFFFFFFh (NVM 3.2.3.2.1).
    fn deallocate_job(
        &mut self,
        shared: &Shared,
        entry: &SubmissionEntry,
        namespace: &Arc<Namespace>,
    ) -> Result<Option<Box<Job>>, Status> {
        let metadata = metadata_of(namespace)?;
        let kind = Kind::Clear { operation: Operation::Discard, holes: true };
        let mut job = self.jobs()?.fresh(kind, namespace, metadata);
        let mut ranges = vec![0; ((entry.cdw10 as usize & 0xff) + 1) * opcode::DSM_RANGE_SIZE_BYTES];
        self.read_data(shared, entry, &mut ranges)?;
        if entry.cdw11 & opcode::DSM_DEALLOCATE == 0 {
            return Ok(None);
        }
        namespace.check_writable()?;
        for range in ranges.as_chunks::<{ opcode::DSM_RANGE_SIZE_BYTES }>().0 {
            let [_, _, _, _, l0, l1, l2, l3, first @ ..] = *range;
            let (first, count) = (u64::from_le_bytes(first), u32::from_le_bytes([l0, l1, l2, l3]).into());
            namespace.byte_range(first, count)?;
            if count > 0 {
                job.segments.push(whole(first, count));
            }
        }
        job.fua = !shared.write_cache.load(std::sync::atomic::Ordering::Acquire);
        Ok((!job.segments.is_empty()).then_some(job))
    }

    fn copy_job(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        entry: &SubmissionEntry,
        namespace: &Arc<Namespace>,
    ) -> Result<Box<Job>, Status> {
        let metadata = metadata_of(namespace)?;
        let (read_prinfo, wanted) = (entry.cdw12 >> 12, Wanted::of(entry));
        let mut scratch = std::mem::take(&mut self.scratch);
        let ranges = self.read_copy_ranges(shared, entry, namespace, &mut scratch);
        let ranges = ranges.and_then(|format| ranges_of(namespace, entry, &scratch, format));
        self.scratch = scratch;
        let ranges = ranges?;
        let mut job = self.jobs()?.fresh(Kind::Copy, namespace, metadata);
        (job.wanted, job.fua) = (wanted, force_unit_access(shared, entry));
        if let Some(protection) = &metadata.protection {
            // What is made anew is not passed on, and the other way round.
            if wanted.action != (read_prinfo & 8 != 0) {
                return Err(Status::INVALID_FIELD.do_not_retry());
            }
            protection.allows(&wanted, entry.cdw10_64())?;
        }
        let mut index = 0;
        for CopyRange { source, count, reference_tag, application } in ranges {
            let source_wanted = Wanted::new(read_prinfo, reference_tag, application);
            if let Some(protection) = &metadata.protection {
                protection.allows(&source_wanted, source)?;
            }
            let range = namespace.byte_range(source, count)?;
            self.check_readable(shared, sq_index, entry, namespace, range)?;
            let first = entry.cdw10_64() + index;
            job.segments.push(Segment { first, blocks: count, source, source_wanted, index });
            index += count;
        }
        Ok(job)
    }
}

fn metadata_of(namespace: &Namespace) -> Result<Metadata, Status> {
    namespace.metadata.ok_or(Status::INTERNAL_ERROR)
}

/// All blocks of a command that has one run of them.
fn whole(first: u64, blocks: u64) -> Segment {
    Segment { first, blocks, source: first, source_wanted: Wanted::default(), index: 0 }
}

/// The byte range of a command without a transfer that has a limit, which like MDTS includes interleaved metadata.
pub(crate) fn limited(
    namespace: &Namespace,
    first: u64,
    count: u64,
    limit_bytes: u64,
) -> Result<(u64, u64), Status> {
    if namespace.transfer_bytes(count, true).0 > limit_bytes {
        return Err(Status::INVALID_FIELD.do_not_retry());
    }
    namespace.byte_range(first, count)
}
