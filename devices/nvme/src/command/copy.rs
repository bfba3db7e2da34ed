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

impl Worker {
    /// Copy. All ranges are checked before any is copied.
    pub fn copy(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        entry: &SubmissionEntry,
        namespace: &Namespace,
    ) -> Result<bool, Status> {
        let format = (entry.cdw12 >> 8 & 0xf) as usize;
        let size_bytes = *ENTRY_SIZE_BYTES.get(format).ok_or(Status::INVALID_FIELD.do_not_retry())?;
        let last = entry.cdw12 as u8;
        if last > COPY_RANGES {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED.do_not_retry());
        }
        namespace.check_writable()?;
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        scratch.resize((usize::from(last) + 1) * size_bytes, 0);
        let read = self.read_data(shared, entry, &mut scratch);
        let started = read
            .and_then(|()| steps(namespace, entry, scratch.chunks_exact(size_bytes), shared))
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
}

/// The ranges in order: 8 reserved bytes, first block, number of blocks (0's based), and protection information.
fn steps<'a>(
    namespace: &Namespace,
    entry: &SubmissionEntry,
    ranges: impl Iterator<Item = &'a [u8]>,
    shared: &Shared,
) -> Result<Vec<Step>, Status> {
    let too_large = Status::COMMAND_SIZE_LIMIT_EXCEEDED.do_not_retry();
    let fua = force_unit_access(shared, entry);
    let (mut steps, mut total) = (Vec::new(), 0);
    for range in ranges {
        let (mut first, mut count) = ([0; 8], [0; 2]);
        first.copy_from_slice(&range[8..16]);
        count.copy_from_slice(&range[16..18]);
        let (first, count) = (u64::from_le_bytes(first), u64::from(u16::from_le_bytes(count)) + 1);
        if count > u64::from(COPY_RANGE_BLOCKS) || total + count > u64::from(COPY_BLOCKS) {
            return Err(too_large);
        }
        let (source_offset_bytes, length_bytes) = namespace.byte_range(first, count)?;
        let destination =
            entry.cdw10_64().checked_add(total).ok_or(Status::LBA_OUT_OF_RANGE.do_not_retry())?;
        let (offset_bytes, _) = namespace.byte_range(destination, count)?;
        let operation = Operation::Copy { source_offset_bytes, fua };
        steps.push(Step { nsid: namespace.nsid, operation, offset_bytes, length_bytes });
        total += count;
    }
    Ok(steps)
}
