//! Scatter gather lists (Base 4.1.2): from the descriptor in a command to runs of guest memory.

use std::sync::Arc;

use block::NOWHERE;
use bus::{GuestMemory, GuestRange};
use nvme_spec::Status;
use nvme_spec::identify as spec;
use nvme_spec::sgl::{BIT_BUCKET, DATA_BLOCK, LAST_SEGMENT, SEGMENT, SglDescriptor};
use vm_memory::{Bytes, GuestAddress};

use crate::data::Direction;
use crate::prp;
use crate::window::Windows;

/// Identify Controller SGLS: what is carried out here.
pub(crate) const SUPPORT: u32 = spec::SGLS_BYTES
    | spec::SGLS_BIT_BUCKET
    | spec::SGLS_METADATA_BUFFER
    | spec::SGLS_LONGER
    | spec::SGLS_METADATA_DESCRIPTOR;

/// Descriptors that are read from guest memory at once.
const CHUNK_DESCRIPTORS: usize = 256;

/// Descriptors that are looked at for one command, so that a chain which describes nothing ends. The largest transfer there is, 65,536
/// blocks of 4096 bytes, needs half as many if each page has its own.
const MAX_DESCRIPTORS: u32 = 131_072;

/// Walks SGLs; keeps its buffer between commands.
pub(crate) struct SglWalker {
    chunk: Box<[u8; CHUNK_DESCRIPTORS * SglDescriptor::SIZE_BYTES]>,
    windows: Arc<Windows>,
}

/// A segment in guest memory.
struct Segment {
    address: u64,
    descriptors: u32,
    is_last: bool,
}

/// How far a walk has come.
struct Walk<'a> {
    ranges: &'a mut Vec<GuestRange>,
    direction: Direction,
    rest_bytes: u64,
}

impl SglWalker {
    pub fn new() -> Self {
        Self {
            chunk: Box::new([0; CHUNK_DESCRIPTORS * SglDescriptor::SIZE_BYTES]),
            windows: Windows::new(0, 0),
        }
    }

    /// Where memory of the controller is among the addresses of commands; without this there is none.
    pub fn set_windows(&mut self, windows: Arc<Windows>) {
        self.windows = windows;
    }

    /// Appends to `ranges` the memory of a transfer of `length_bytes` that `first` describes, which may describe more. Data are not
    /// checked to be in guest memory: whoever accesses them does that.
    pub fn walk(
        &mut self,
        memory: &GuestMemory,
        first: SglDescriptor,
        length_bytes: u64,
        direction: Direction,
        ranges: &mut Vec<GuestRange>,
    ) -> Result<(), Status> {
        // As for PRPs.
        if !self.windows.exist() {
            return self.walk_list(memory, first, length_bytes, direction, ranges);
        }
        let windows = Arc::clone(&self.windows);
        windows.gather(ranges, |ranges| self.walk_list(memory, first, length_bytes, direction, ranges))
    }

    /// The same for metadata: `pointer` is the address of the one descriptor, which begins the list (Base 4.1.1, MPTR with PSDT 10b).
    pub fn walk_metadata(
        &mut self,
        memory: &GuestMemory,
        pointer: u64,
        length_bytes: u64,
        direction: Direction,
        ranges: &mut Vec<GuestRange>,
    ) -> Result<(), Status> {
        if !pointer.is_multiple_of(8) {
            return Err(Status::INVALID_SGL_SEGMENT.do_not_retry());
        }
        let mut raw = [0; SglDescriptor::SIZE_BYTES];
        let place = self.windows.translate(pointer, raw.len() as u64)?;
        let unreadable = Status::DATA_TRANSFER_ERROR.do_not_retry();
        memory.read_slice(&mut raw, GuestAddress(place)).map_err(|_| unreadable)?;
        let first = SglDescriptor::from_bytes(&raw);
        self.walk(memory, first, length_bytes, direction, ranges).map_err(|status| match status.code() {
            Status::SGL_DATA_LENGTH_INVALID => Status::SGL_METADATA_LENGTH_INVALID.do_not_retry(),
            _ => status,
        })
    }

    fn walk_list(
        &mut self,
        memory: &GuestMemory,
        first: SglDescriptor,
        length_bytes: u64,
        direction: Direction,
        ranges: &mut Vec<GuestRange>,
    ) -> Result<(), Status> {
        let mut walk = Walk { ranges, direction, rest_bytes: length_bytes };
        // The descriptor in a command is a segment of one.
        let mut next = walk.take(first, true)?;
        let mut descriptors = 0;
        while let Some(segment) = next {
            if walk.rest_bytes == 0 {
                break;
            }
            next = self.walk_segment(memory, &segment, &mut walk, &mut descriptors)?;
            if segment.is_last && next.is_some() {
                return Err(Status::INVALID_SGL_SEGMENT.do_not_retry());
            }
        }
        if walk.rest_bytes > 0 {
            return Err(Status::SGL_DATA_LENGTH_INVALID.do_not_retry());
        }
        Ok(())
    }

    /// Takes the descriptors of one segment until the transfer has all its bytes; the segment that follows, if one does.
    fn walk_segment(
        &mut self,
        memory: &GuestMemory,
        segment: &Segment,
        walk: &mut Walk<'_>,
        looked_at: &mut u32,
    ) -> Result<Option<Segment>, Status> {
        let (mut address, mut left) = (segment.address, segment.descriptors);
        while left > 0 && walk.rest_bytes > 0 {
            let count = left.min(CHUNK_DESCRIPTORS as u32);
            *looked_at += count;
            if *looked_at > MAX_DESCRIPTORS {
                return Err(Status::INVALID_SGL_COUNT.do_not_retry());
            }
            let bytes = &mut self.chunk[..count as usize * SglDescriptor::SIZE_BYTES];
            let unreadable = Status::DATA_TRANSFER_ERROR.do_not_retry();
            let place = self.windows.translate(address, bytes.len() as u64)?;
            memory.read_slice(bytes, GuestAddress(place)).map_err(|_| unreadable)?;
            address = address.checked_add(bytes.len() as u64).ok_or(unreadable)?;
            left -= count;
            let descriptors = bytes.as_chunks::<{ SglDescriptor::SIZE_BYTES }>().0;
            for (index, raw) in descriptors.iter().enumerate() {
                let is_final = left == 0 && index + 1 == descriptors.len();
                let next = walk.take(SglDescriptor::from_bytes(raw), is_final)?;
                if next.is_some() || walk.rest_bytes == 0 {
                    return Ok(next);
                }
            }
        }
        Ok(None)
    }
}

impl Walk<'_> {
    /// Takes one descriptor; the segment that it points to, if it does, which only the final descriptor of a segment may.
    fn take(&mut self, descriptor: SglDescriptor, is_final: bool) -> Result<Option<Segment>, Status> {
        // Offsets (sub type 1h) are for data in a capsule.
        if descriptor.sub_type() != 0 {
            return Err(Status::SGL_TYPE_INVALID.do_not_retry());
        }
        let length_bytes = self.rest_bytes.min(u64::from(descriptor.length_bytes));
        match descriptor.kind() {
            // "A length of 0h is valid and no data shall be transferred."
            DATA_BLOCK if length_bytes == 0 => {}
            DATA_BLOCK => {
                prp::push(self.ranges, descriptor.address, length_bytes)?;
                self.rest_bytes -= length_bytes;
            }
            BIT_BUCKET => self.skip(length_bytes),
            SEGMENT | LAST_SEGMENT => {
                // "... in a location other than the last descriptor of a segment"
                if !is_final {
                    return Err(Status::INVALID_SGL_COUNT.do_not_retry());
                }
                let bytes = descriptor.length_bytes;
                let is_whole = bytes != 0 && bytes.is_multiple_of(SglDescriptor::SIZE_BYTES as u32);
                // "An SGL segment is a Qword aligned data structure."
                if !is_whole || !descriptor.address.is_multiple_of(8) {
                    return Err(Status::INVALID_SGL_SEGMENT.do_not_retry());
                }
                return Ok(Some(Segment {
                    address: descriptor.address,
                    descriptors: bytes / SglDescriptor::SIZE_BYTES as u32,
                    is_last: descriptor.kind() == LAST_SEGMENT,
                }));
            }
            // Keyed data blocks are for fabrics.
            _ => return Err(Status::SGL_TYPE_INVALID.do_not_retry()),
        }
        Ok(None)
    }

    /// A bit bucket. "If the SGL describes a source data buffer ... the Bit Bucket descriptor shall be treated as if the Length field
    /// was cleared to 0h."
    fn skip(&mut self, length_bytes: u64) {
        if self.direction == Direction::FromGuest || length_bytes == 0 {
            return;
        }
        self.rest_bytes -= length_bytes;
        // A descriptor's length has 32 bits.
        let length_bytes = length_bytes as u32;
        if let Some(last) = self.ranges.last_mut()
            && last.address == NOWHERE
            && let Some(sum) = last.length_bytes.checked_add(length_bytes)
        {
            last.length_bytes = sum;
            return;
        }
        self.ranges.push(GuestRange { address: NOWHERE, length_bytes });
    }
}
