//! One request on a file, as a state machine: which system call comes next, and what its result means.
//!
//! ```text
//! Read, Write           Data -> ... -> Data -> done      more turns after short results and for bounced buffers
//! Compare, Verify       Data -> ... -> Data -> done      reads, always into the bounce buffer
//! Fill                  Data -> ... -> Data -> done      writes, always from the bounce buffer
//! Copy                  Data (read) -> Data (write) -> Data (read) -> ... -> done      what was read, however short, is written
//! Flush                 Synchronize -> done
//! WriteZeroes, Discard  Allocate [-> Data of zeroes, where the file cannot] [-> Synchronize with FUA] -> done
//! ```
//! The machine makes no system call: `uring` and `pool` do, so that both behave alike.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use bus::{GuestMemory, GuestRange};
use rustix::fs::FallocateFlags;

use crate::bounce::Bounce;
use crate::error::failure_of;
use crate::file::OpenFile;
use crate::guest::{check_ranges, for_each_slice, mark_dirty};
use crate::{Buffers, Failure, Operation, Request};

/// The most segments that one system call takes (UIO_MAXIOV).
const MAXIMUM_SEGMENTS: usize = 1024;

/// Host memory, laid out as the kernel's `struct iovec`. An address and not a pointer: nothing here follows it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Segment {
    /// Host virtual address.
    pub(crate) address: usize,
    /// Length in bytes.
    pub(crate) length: usize,
}

const _: () = assert!(size_of::<Segment>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<Segment>() == align_of::<libc::iovec>());
const _: () = assert!(std::mem::offset_of!(Segment, address) == std::mem::offset_of!(libc::iovec, iov_base));
const _: () = assert!(std::mem::offset_of!(Segment, length) == std::mem::offset_of!(libc::iovec, iov_len));

/// The next system call of a request.
#[derive(Debug)]
pub(crate) enum Step<'a> {
    /// preadv at `offset_bytes`.
    Read { segments: &'a [Segment], offset_bytes: u64 },
    /// pwritev2 at `offset_bytes`, with RWF_DSYNC if `stable`.
    Write { segments: &'a [Segment], offset_bytes: u64, stable: bool },
    /// fallocate.
    Allocate { mode: FallocateFlags, offset_bytes: u64, length_bytes: u64 },
    /// fdatasync.
    Synchronize,
}

/// What follows the result of a step.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Ask for the next step.
    Again,
    /// The request ended.
    Done(Result<(), Failure>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Data,
    Allocate,
    Synchronize,
}

/// Where the bytes of the data phase are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Guest memory itself.
    Guest,
    /// The bounce buffer, copied to or from the guest each turn.
    Bounced,
    /// The bounce buffer, full of zeroes.
    Zeroes,
    /// The bounce buffer, filled from the image itself: the next step reads.
    ImageRead,
    /// The same: the next step writes.
    ImageWrite,
}

/// What a test bends in one request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Distortion {
    /// The first system call moves no more than about this many bytes.
    pub(crate) first_bytes: Option<u64>,
    /// The completion is swallowed.
    pub(crate) lost: bool,
}

/// A slot for one request at a time; its vectors are kept from one request to the next.
#[derive(Debug)]
pub(crate) struct Transfer {
    token: u64,
    operation: Operation,
    file: Option<Arc<OpenFile>>,
    phase: Phase,
    source: Source,
    /// Position in the image of the next byte, and how many are left.
    offset_bytes: u64,
    remaining_bytes: u64,
    done_bytes: u64,
    ranges: Vec<GuestRange>,
    /// The memory that they are in, if it is not the guest's.
    private: Option<Arc<GuestMemory>>,
    segments: Vec<Segment>,
    /// First segment that is not done.
    cursor: usize,
    bounce: Bounce,
    always_bounce: bool,
    distortion: Distortion,
}

impl Transfer {
    /// An empty slot. With `always_bounce` the kernel never sees guest memory.
    pub(crate) fn new(always_bounce: bool) -> Self {
        Self {
            token: 0,
            operation: Operation::Flush,
            file: None,
            phase: Phase::Synchronize,
            source: Source::Guest,
            offset_bytes: 0,
            remaining_bytes: 0,
            done_bytes: 0,
            ranges: Vec::with_capacity(16),
            private: None,
            segments: Vec::with_capacity(16),
            cursor: 0,
            bounce: Bounce::default(),
            always_bounce,
            distortion: Distortion::default(),
        }
    }

    /// Takes a request that passed `Request::check`.
    pub(crate) fn begin(
        &mut self,
        memory: &GuestMemory,
        file: Arc<OpenFile>,
        request: &Request<'_>,
        distortion: Distortion,
    ) -> Result<(), Failure> {
        self.token = request.token;
        self.operation = request.operation;
        self.offset_bytes = request.offset_bytes;
        self.remaining_bytes = request.length_bytes;
        self.done_bytes = 0;
        self.cursor = 0;
        self.segments.clear();
        self.ranges.clear();
        self.ranges.extend_from_slice(request.buffers.ranges());
        self.private = request.buffers.private().cloned();
        let memory = request.buffers.memory(memory);
        self.distortion = distortion;
        self.source = match request.operation {
            Operation::Compare | Operation::Verify | Operation::Fill { .. } => Source::Bounced,
            Operation::Copy { .. } => Source::ImageRead,
            _ => Source::Guest,
        };
        self.phase = match request.operation {
            Operation::WriteZeroes { .. } | Operation::Discard => Phase::Allocate,
            Operation::Flush => Phase::Synchronize,
            _ => Phase::Data,
        };
        match request.operation {
            Operation::Read | Operation::Write { .. } => self.resolve(memory, &file)?,
            Operation::Compare => check_ranges(memory, &self.ranges)?,
            _ => {}
        }
        self.file = Some(file);
        Ok(())
    }

    /// Finds the host memory of the request, and whether the device takes it as it is.
    fn resolve(&mut self, memory: &GuestMemory, file: &OpenFile) -> Result<(), Failure> {
        let segments = &mut self.segments;
        let mut bits = 0;
        for_each_slice(memory, &self.ranges, |_, slice| {
            let (address, length) = (slice.ptr_guard_mut().as_ptr().expose_provenance(), slice.len());
            bits |= address;
            match segments.last_mut() {
                Some(last) if last.address + last.length == address => last.length += length,
                _ => segments.push(Segment { address, length }),
            }
        })?;
        let lengths = segments.iter().fold(0, |bits, segment| bits | segment.length);
        let gaps = Buffers::Guest(&self.ranges).have_gaps();
        if self.always_bounce || gaps || !file.takes_buffers(bits, lengths) {
            self.source = Source::Bounced;
            self.segments.clear();
        }
        Ok(())
    }

    /// The token of the request, and whether its completion is to be swallowed.
    pub(crate) fn token(&self) -> (u64, bool) {
        (self.token, self.distortion.lost)
    }

    /// The descriptor that the steps are for; -1 in an empty slot.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.file.as_ref().map_or(-1, |file| file.file().as_raw_fd())
    }

    /// The file that the steps are for.
    pub(crate) fn file(&self) -> Option<Arc<OpenFile>> {
        self.file.clone()
    }

    /// The bounce buffer, for whoever may not follow the segments.
    pub(crate) fn bounce_bytes(&mut self) -> &mut [u8] {
        self.bounce.bytes()
    }

    /// The next system call.
    pub(crate) fn step(&mut self, memory: &GuestMemory) -> Result<Step<'_>, Failure> {
        let private = self.private.clone();
        let memory = private.as_deref().unwrap_or(memory);
        let (offset_bytes, length_bytes) = (self.offset_bytes, self.remaining_bytes);
        match (self.phase, self.operation) {
            (Phase::Synchronize, _) => Ok(Step::Synchronize),
            (Phase::Allocate, operation) => {
                let hole = !matches!(operation, Operation::WriteZeroes { deallocate: false, .. });
                let mode = if hole { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
                Ok(Step::Allocate { mode: mode | FallocateFlags::KEEP_SIZE, offset_bytes, length_bytes })
            }
            (Phase::Data, operation) => {
                if self.cursor == self.segments.len() {
                    self.refill(memory)?;
                }
                let mut end = self.segments.len().min(self.cursor + MAXIMUM_SEGMENTS);
                if let Some(bytes) = self.distortion.first_bytes.take() {
                    end = end.min(self.cut(bytes));
                }
                let segments = &self.segments[self.cursor..end];
                Ok(match operation {
                    Operation::Read | Operation::Compare | Operation::Verify => {
                        Step::Read { segments, offset_bytes }
                    }
                    Operation::Copy { source_offset_bytes, .. } if self.source == Source::ImageRead => {
                        Step::Read { segments, offset_bytes: source_offset_bytes + self.done_bytes }
                    }
                    Operation::Write { fua: stable }
                    | Operation::WriteZeroes { fua: stable, .. }
                    | Operation::Copy { fua: stable, .. } => Step::Write { segments, offset_bytes, stable },
                    Operation::Fill { .. } => Step::Write { segments, offset_bytes, stable: false },
                    Operation::Flush | Operation::Discard => Step::Synchronize,
                })
            }
        }
    }

    /// Prepares the next turn through the bounce buffer.
    fn refill(&mut self, memory: &GuestMemory) -> Result<(), Failure> {
        // What was just read for a copy is not prepared anew but written.
        if self.source != Source::ImageWrite {
            self.bounce.prepare(self.remaining_bytes);
        }
        match (self.source, self.operation) {
            (Source::Zeroes, _) => self.bounce.bytes().fill(0),
            (_, Operation::Fill { pattern }) => {
                // A turn that came back short can begin between two patterns.
                let start = (self.done_bytes % 4) as usize;
                let bytes = pattern.to_le_bytes();
                for (at, byte) in self.bounce.bytes().iter_mut().enumerate() {
                    *byte = bytes[(start + at) % 4];
                }
            }
            (_, Operation::Write { .. }) => self.bounce.fill_from(memory, &self.ranges, self.done_bytes)?,
            _ => {}
        }
        let bytes = self.bounce.bytes();
        let segment = Segment { address: bytes.as_mut_ptr().expose_provenance(), length: bytes.len() };
        self.segments.clear();
        self.segments.push(segment);
        self.cursor = 0;
        Ok(())
    }

    /// Splits the segments after `bytes` (rounded up to what the device takes); returns the index behind the cut.
    fn cut(&mut self, bytes: u64) -> usize {
        let granule = self.file.as_ref().map_or(1, |file| file.granule_bytes());
        let mut left = bytes.max(1).next_multiple_of(granule) as usize;
        for index in self.cursor..self.segments.len() {
            let segment = self.segments[index];
            if segment.length > left {
                self.segments[index].length = left;
                let rest = Segment { address: segment.address + left, length: segment.length - left };
                self.segments.insert(index + 1, rest);
                return index + 1;
            }
            left -= segment.length;
            if left == 0 {
                return index + 1;
            }
        }
        self.segments.len()
    }

    /// Takes the result of the step: a count or a negated error number.
    pub(crate) fn advance(&mut self, memory: &GuestMemory, result: i32) -> Progress {
        let private = self.private.clone();
        let memory = private.as_deref().unwrap_or(memory);
        if result == -libc::EINTR || result == -libc::EAGAIN {
            return Progress::Again;
        }
        match (self.phase, self.operation) {
            (Phase::Data, _) => match usize::try_from(result) {
                // The image ends before its capacity: someone cut it.
                Ok(0) => self.finish(memory, Err(Failure::Io(libc::EIO))),
                Ok(count) => self.moved(memory, count),
                Err(_) => self.finish(memory, Err(failure_of(-result))),
            },
            (_, _) if result >= 0 => match (self.phase, self.operation) {
                (Phase::Allocate, Operation::WriteZeroes { fua: true, .. }) => {
                    self.phase = Phase::Synchronize;
                    Progress::Again
                }
                _ => self.finish(memory, Ok(())),
            },
            // Not every file system and device can (EOPNOTSUPP), nor at every alignment (EINVAL).
            (Phase::Allocate, operation)
                if [libc::EOPNOTSUPP, libc::EINVAL, libc::ENOSYS].contains(&-result) =>
            {
                if operation == Operation::Discard {
                    return self.finish(memory, Ok(()));
                }
                self.phase = Phase::Data;
                self.source = Source::Zeroes;
                Progress::Again
            }
            (_, _) => self.finish(memory, Err(failure_of(-result))),
        }
    }

    /// `count` bytes were moved by the last step.
    fn moved(&mut self, memory: &GuestMemory, count: usize) -> Progress {
        // A direct transfer goes on only from a boundary: what lies behind it is done again.
        let granule = self.file.as_ref().map_or(1, |file| file.granule_bytes()) as usize;
        let whole = count as u64 == self.remaining_bytes;
        let count = if whole { count } else { count - count % granule };
        if count == 0 || count as u64 > self.remaining_bytes {
            return self.finish(memory, Err(Failure::Io(libc::EIO)));
        }
        if self.source == Source::Guest {
            self.consume(count);
        } else {
            if let Err(failure) = self.bounced(memory, count) {
                return self.finish(memory, Err(failure));
            }
            // The next turn starts with a fresh buffer.
            self.cursor = self.segments.len();
        }
        match self.source {
            Source::ImageRead => {
                self.bounce.shorten(count);
                self.source = Source::ImageWrite;
                return Progress::Again;
            }
            Source::ImageWrite => self.source = Source::ImageRead,
            _ => {}
        }
        self.offset_bytes += count as u64;
        self.done_bytes += count as u64;
        self.remaining_bytes -= count as u64;
        if self.remaining_bytes > 0 { Progress::Again } else { self.finish(memory, Ok(())) }
    }

    /// Takes the first `count` bytes out of the bounce buffer, if they are for the guest.
    fn bounced(&mut self, memory: &GuestMemory, count: usize) -> Result<(), Failure> {
        match self.operation {
            Operation::Read => self.bounce.empty_into(memory, &self.ranges, self.done_bytes, count),
            Operation::Compare => match self.bounce.equals(memory, &self.ranges, self.done_bytes, count)? {
                true => Ok(()),
                false => Err(Failure::Miscompare),
            },
            _ => Ok(()),
        }
    }

    /// Moves the cursor `count` bytes on.
    fn consume(&mut self, mut count: usize) {
        while let Some(segment) = self.segments.get_mut(self.cursor) {
            if count < segment.length {
                segment.address += count;
                segment.length -= count;
                return;
            }
            count -= segment.length;
            self.cursor += 1;
        }
    }

    /// Ends the request, part of which may have been carried out, before its next step.
    pub(crate) fn give_up(&mut self, memory: &GuestMemory, failure: Failure) -> Progress {
        let private = self.private.clone();
        self.finish(private.as_deref().unwrap_or(memory), Err(failure))
    }

    /// Ends the request. What the kernel wrote is noted before anyone hears of it, after a failure too: part may have
    /// arrived.
    fn finish(&mut self, memory: &GuestMemory, result: Result<(), Failure>) -> Progress {
        if self.operation == Operation::Read && self.source == Source::Guest {
            mark_dirty(memory, &self.ranges);
        }
        if let Some(file) = self.file.take()
            && self.operation.writes()
        {
            let start = self.offset_bytes - self.done_bytes;
            file.note_write(start..self.offset_bytes + self.remaining_bytes);
        }
        self.private = None;
        Progress::Done(result)
    }
}
