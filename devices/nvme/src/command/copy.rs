//! Copy (NVM 3.2.2): source ranges of a namespace, one behind the other, to another place in it. The image copies, one range after the
//! other, so that dword 0 of a failure names the first that was not copied.

use block::Operation;
use nvme_spec::identify as spec;
use nvme_spec::{Status, SubmissionEntry};

use super::io::force_unit_access;
use super::limits::{COPY_BLOCKS, COPY_RANGE_BLOCKS, COPY_RANGES};
use crate::namespace::Namespace;
use crate::shared::Shared;
use crate::worker::{Owner, Step, Worker};

/// Identify Controller CDFS: formats 0h and 1h, whose entries differ in protection information alone.
pub(crate) const DESCRIPTOR_FORMATS: u16 = spec::CDFS_FORMAT_0 | spec::CDFS_FORMAT_1;

/// Size of a source range entry by Copy Descriptor Format.
const ENTRY_SIZE_BYTES: [usize; 2] = [32, 40];

/// A source range entry.
pub(crate) struct CopyRange {
    pub source: u64,
    /// Blocks.
    pub count: u64,
    /// Expected reference tag of its first block.
    pub reference_tag: u32,
    /// Expected application tag, and its mask above it.
    pub application: u32,
}

impl Worker {
    /// Copy. All ranges are checked before any is copied.
    pub fn copy(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        entry: &SubmissionEntry,
        namespace: &Namespace,
    ) -> Result<bool, Status> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let read = self.read_copy_ranges(shared, entry, namespace, &mut scratch);
        let started = read
            .and_then(|format| ranges_of(namespace, entry, &scratch, format))
            .and_then(|ranges| steps(namespace, entry, &ranges, shared))
            .and_then(|mut steps| {
                for step in &steps {
                    if let Operation::Copy { source_offset_bytes, .. } = step.operation {
                        let range = (source_offset_bytes, step.length_bytes);
                        self.check_readable(shared, sq_index, entry, namespace, range)?;
                    }
                }
                steps.reverse();
                self.start_steps(Owner::Queue(sq_index), entry, steps)
            });
        self.scratch = scratch;
        started
    }

    /// Reads the source range entries into `entries`; their format.
    pub fn read_copy_ranges(
        &mut self,
        shared: &Shared,
        entry: &SubmissionEntry,
        namespace: &Namespace,
        entries: &mut Vec<u8>,
    ) -> Result<usize, Status> {
        let format = (entry.cdw12 >> 8 & 0xf) as usize;
        let size_bytes = *ENTRY_SIZE_BYTES.get(format).ok_or(Status::INVALID_FIELD.do_not_retry())?;
        // Format 1h is that of larger guards, which no namespace here has.
        let protected = namespace.metadata.is_some_and(|metadata| metadata.protection.is_some());
        if format != 0 && protected {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        let last = entry.cdw12 as u8;
        if last > COPY_RANGES {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED.do_not_retry());
        }
        namespace.check_writable()?;
        entries.clear();
        entries.resize((usize::from(last) + 1) * size_bytes, 0);
        self.read_data(shared, entry, entries)?;
        Ok(format)
    }
}

/// The ranges in order: 8 reserved bytes, first block, number of blocks (0's based), and what their protection information is expected to
/// be, which with format 1h means nothing here. All are inside the namespace, and so is where they go.
pub(crate) fn ranges_of(
    namespace: &Namespace,
    entry: &SubmissionEntry,
    entries: &[u8],
    format: usize,
) -> Result<Vec<CopyRange>, Status> {
    let size_bytes = *ENTRY_SIZE_BYTES.get(format).ok_or(Status::INVALID_FIELD.do_not_retry())?;
    let (mut ranges, mut total) = (Vec::new(), 0);
    for range in entries.chunks_exact(size_bytes) {
        let (mut source, mut tags) = ([0; 8], [0; 8]);
        source.copy_from_slice(&range[8..16]);
        tags.copy_from_slice(&range[24..32]);
        let source = u64::from_le_bytes(source);
        let count = u64::from(u16::from_le_bytes([range[16], range[17]])) + 1;
        let [r0, r1, r2, r3, application @ ..] = tags;
        if count > u64::from(COPY_RANGE_BLOCKS) || total + count > u64::from(COPY_BLOCKS) {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED.do_not_retry());
        }
        namespace.byte_range(source, count)?;
        let destination =
            entry.cdw10_64().checked_add(total).ok_or(Status::LBA_OUT_OF_RANGE.do_not_retry())?;
        namespace.byte_range(destination, count)?;
        let (reference_tag, application) =
            (u32::from_le_bytes([r0, r1, r2, r3]), u32::from_le_bytes(application));
        ranges.push(CopyRange { source, count, reference_tag, application });
        total += count;
    }
    Ok(ranges)
}

/// A request for each range.
fn steps(
    namespace: &Namespace,
    entry: &SubmissionEntry,
    ranges: &[CopyRange],
    shared: &Shared,
) -> Result<Vec<Step>, Status> {
    let fua = force_unit_access(shared, entry);
    let mut destination = entry.cdw10_64();
    let step = |range: &CopyRange| {
        let (source_offset_bytes, length_bytes) = namespace.byte_range(range.source, range.count)?;
        let (offset_bytes, _) = namespace.byte_range(destination, range.count)?;
        destination += range.count;
        let operation = Operation::Copy { source_offset_bytes, fua };
        Ok(Step { nsid: namespace.nsid, operation, offset_bytes, length_bytes })
    };
    ranges.iter().map(step).collect()
}
