//! Commands to blocks with metadata, in flight: which request of the backend comes next, and what is done with what it brought.
//!
//! ```text
//! waiting (blocks, buffer) -> Piece -> ReadData -> ReadMetadata -> Piece ...                   Read, Compare, Verify
//!                             Piece -> WriteData -> [ReadPage ->] WriteMetadata -> Piece ...   Write, and Copy after ReadMetadata
//!                             Piece -> Clear -> [ReadPage ->] WriteMetadata -> Clear ...       Write Zeroes, Dataset Management
//! ```
//! A worker has a fixed number of buffers for them. A command waits until its blocks are free and then for a buffer; those that have one
//! wait for nothing but the backend.

use std::sync::Arc;

use block::Operation;
use bus::GuestMemory;
use nvme_spec::Status;
use vm_memory::{Bytes, GuestAddress};

use super::buffers::Run;
use super::format::{Metadata, PAGE_BYTES};
use super::occupied::Place;
use super::protection::{PROTECTION_BYTES, Wanted};
use crate::namespace::Namespace;
use crate::uncorrectable::Healed;

/// Data of one piece: 256 blocks of 512 bytes.
const DATA_BYTES: u64 = 128 << 10;
/// Metadata of one piece: as it begins and ends inside pages, two of them.
const METADATA_BYTES: u64 = 2 * PAGE_BYTES;
/// Buffers of a worker. Their memory is used when they are.
pub(super) const BUFFERS: u64 = 16;
const BUFFER_BYTES: u64 = DATA_BYTES + METADATA_BYTES;

/// Ranges of guest memory whose room is kept for the next command.
const SPARE_RANGES: usize = 1024;

/// What a slot without a job says.
pub(crate) const NO_JOB: u32 = u32::MAX;

/// What is done to the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Compare,
    Verify,
    Write,
    Copy,
    /// All of the data by one request, then metadata: of a deallocation holes, otherwise what a write of zeroes would leave.
    Clear {
        operation: Operation,
        holes: bool,
    },
}

impl Kind {
    pub fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::Compare | Self::Verify)
    }

    /// Whether its blocks are read first.
    fn reads(self) -> bool {
        matches!(self, Self::Read | Self::Compare | Self::Verify | Self::Copy)
    }
}

/// A run of blocks of a command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub first: u64,
    pub blocks: u64,
    /// Where a Copy reads them, and what it wants to be checked there.
    pub source: u64,
    pub source_wanted: Wanted,
    /// Blocks of the command that come before.
    pub index: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Piece,
    ReadData,
    ReadMetadata,
    WriteData,
    Clear,
    ReadPage,
    WriteMetadata,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Job {
    pub kind: Kind,
    pub namespace: Arc<Namespace>,
    pub metadata: Metadata,
    pub fua: bool,
    /// Metadata go between the guest and the controller.
    pub transferred: bool,
    pub wanted: Wanted,
    pub segments: Vec<Segment>,
    pub data: Run,
    /// Metadata that have a buffer of their own.
    pub separate: Run,
    pub slot: u32,
    /// Of its blocks, once a slot has it.
    pub place: Option<Place>,
    /// Address of its buffer in the worker's memory.
    pub buffer: Option<u64>,
    stage: Stage,
    /// Segments that are done.
    pub segment: usize,
    /// Blocks of the segment that are done, and those of the piece.
    done: u64,
    count: u64,
    /// Metadata of the piece, as the guest knows them.
    fresh: Vec<u8>,
    /// It ends so although the image has done all that it was to.
    failed: Option<Status>,
}

/// The memory of a job, for the next one.
#[derive(Debug, Default)]
pub(crate) struct Room {
    segments: Vec<Segment>,
    data: Run,
    separate: Run,
    fresh: Vec<u8>,
}

/// A request of a job.
pub(super) struct Next {
    pub operation: Operation,
    pub offset_bytes: u64,
    pub length_bytes: u64,
    /// Address in the worker's memory.
    pub buffer: Option<u64>,
}

/// Why a job ends: the status, and the block that it is about if there is one.
pub(super) struct Fault {
    pub status: Status,
    pub block: Option<u64>,
}

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        Self { status, block: None }
    }
}

impl Job {
    /// A job without blocks or memory.
    fn new(kind: Kind, namespace: &Arc<Namespace>, metadata: Metadata) -> Self {
        Self {
            kind,
            namespace: Arc::clone(namespace),
            metadata,
            fua: false,
            transferred: false,
            wanted: Wanted::default(),
            segments: Vec::new(),
            data: Run::default(),
            separate: Run::default(),
            slot: 0,
            place: None,
            buffer: None,
            stage: Stage::Piece,
            segment: 0,
            done: 0,
            count: 0,
            fresh: Vec::new(),
            failed: None,
        }
    }

    /// Whether every block that it has written to has data and metadata of one write: here it can end without leaving a torn one.
    fn is_whole(&self) -> bool {
        matches!(self.stage, Stage::Piece | Stage::ReadData | Stage::ReadMetadata)
    }

    /// Its memory, unless it is more than most commands need.
    pub fn into_room(self) -> Option<Room> {
        let Self { mut segments, mut data, mut separate, fresh, .. } = self;
        segments.clear();
        data.clear();
        separate.clear();
        (data.ranges.capacity() <= SPARE_RANGES).then_some(Room { segments, data, separate, fresh })
    }

    fn block_bytes(&self) -> u64 {
        1 << self.namespace.block_shift
    }

    fn metadata_bytes(&self) -> u64 {
        self.metadata.bytes.into()
    }

    fn blocks_of_page(&self) -> u64 {
        PAGE_BYTES / self.metadata_bytes()
    }

    /// The blocks that it is at, from the first to behind the last. What writes has all whose metadata are in the same pages, since it
    /// writes these again; Copy has all that there are.
    pub fn occupies(&self) -> (u64, u64) {
        if self.kind == Kind::Copy {
            return (0, self.namespace.blocks);
        }
        let first = self.segments.iter().map(|segment| segment.first).min().unwrap_or(0);
        let end = self.segments.iter().map(|segment| segment.first + segment.blocks).max().unwrap_or(0);
        match self.kind.writes() {
            true => (first - first % self.blocks_of_page(), end.next_multiple_of(self.blocks_of_page())),
            false => (first, end),
        }
    }

    /// The pages around the metadata of `count` blocks: where they begin in the image, their length, and where the metadata are in them.
    fn pages(&self, first: u64, count: u64) -> (u64, u64, u64) {
        let start = first * self.metadata_bytes();
        let within = start % PAGE_BYTES;
        let length = (within + count * self.metadata_bytes()).next_multiple_of(PAGE_BYTES);
        (self.namespace.metadata_start() + start - within, length, within)
    }
}

/// The jobs of a worker.
#[derive(Debug)]
pub(crate) struct Jobs {
    /// The buffers: no memory of the guest's.
    pub memory: Arc<GuestMemory>,
    pub free_buffers: Vec<u64>,
    pub jobs: Vec<Option<Box<Job>>>,
    pub free: Vec<u32>,
    /// Memory of jobs that have ended. Nothing of their namespaces is kept.
    pub spare: Vec<Room>,
    /// Jobs without a buffer, the oldest first.
    pub waiting: Vec<u32>,
    /// Data of a piece, while it is looked at.
    data: Vec<u8>,
    /// The same as the guest has it, where data and metadata take turns.
    extended: Vec<u8>,
    /// Other metadata than those of the piece.
    other: Vec<u8>,
}

impl Jobs {
    /// `None`: there is no memory for it.
    pub fn new() -> Option<Box<Self>> {
        let length = usize::try_from(BUFFERS * BUFFER_BYTES).ok()?;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), length)]).ok()?;
        Some(Box::new(Self {
            memory: Arc::new(memory),
            free_buffers: (0..BUFFERS).rev().map(|index| index * BUFFER_BYTES).collect(),
            jobs: Vec::new(),
            free: Vec::new(),
            spare: Vec::new(),
            waiting: Vec::new(),
            data: Vec::new(),
            extended: Vec::new(),
            other: Vec::new(),
        }))
    }

    /// A job without blocks or memory.
    pub fn fresh(&mut self, kind: Kind, namespace: &Arc<Namespace>, metadata: Metadata) -> Box<Job> {
        let Room { segments, data, separate, fresh } = self.spare.pop().unwrap_or_default();
        Box::new(Job { segments, data, separate, fresh, ..Job::new(kind, namespace, metadata) })
    }

    pub fn put(&mut self, job: Box<Job>) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() as u32 - 1
        });
        self.jobs[index as usize] = Some(job);
        self.waiting.push(index);
        index
    }

    /// What `job` does after the request that was in flight, if one was. `None`: it is done. With `stop` it ends so as soon as no block
    /// is torn, and does nothing with guest memory. `keep` makes durable which blocks are not marked as uncorrectable any more.
    pub(super) fn advance(
        &mut self,
        job: &mut Job,
        guest: &GuestMemory,
        stop: Option<Status>,
        keep: impl Fn(&Healed) -> Result<(), Status>,
    ) -> Result<Option<Next>, Fault> {
        let buffer = job.buffer.ok_or(Status::INTERNAL_ERROR)?;
        loop {
            let Some(segment) = job.segments.get(job.segment).copied() else {
                return job.failed.map_or(Ok(None), |status| Err(status.into()));
            };
            if let Some(status) = stop.or(job.failed)
                && job.is_whole()
                && job.done < segment.blocks
            {
                return Err(status.into());
            }
            let target = segment.first + job.done;
            match job.stage {
                Stage::Piece if job.done == segment.blocks => {
                    job.segment += 1;
                    job.done = 0;
                }
                Stage::Piece => {
                    if let Kind::Clear { operation, .. } = job.kind {
                        job.stage = Stage::Clear;
                        let (offset_bytes, length_bytes) =
                            job.namespace.byte_range(segment.first, segment.blocks)?;
                        return Ok(Some(Next { operation, offset_bytes, length_bytes, buffer: None }));
                    }
                    job.count = (segment.blocks - job.done).min(DATA_BYTES >> job.namespace.block_shift);
                    let reads = job.kind.reads();
                    if !reads {
                        self.take_in(job, guest, segment.index + job.done, target)?;
                        self.memory
                            .write_slice(&self.data, GuestAddress(buffer))
                            .map_err(|_| Status::INTERNAL_ERROR)?;
                    }
                    job.stage = if reads { Stage::ReadData } else { Stage::WriteData };
                    let first = if job.kind == Kind::Copy { segment.source + job.done } else { target };
                    return self.data_request(job, first, buffer);
                }
                Stage::ReadData => {
                    job.stage = Stage::ReadMetadata;
                    let first = if job.kind == Kind::Copy { segment.source + job.done } else { target };
                    return Ok(Some(self.page_request(job, first, Operation::Read, buffer)));
                }
                Stage::ReadMetadata => {
                    self.look_at(job, &segment, buffer)?;
                    match job.kind {
                        Kind::Read => self.hand_out(job, guest)?,
                        Kind::Compare => self.compare(job, guest, segment.index + job.done, target)?,
                        Kind::Copy => {
                            self.protect(job, segment.index + job.done, target)?;
                            job.stage = Stage::WriteData;
                            return self.data_request(job, target, buffer);
                        }
                        _ => {}
                    }
                    job.done += job.count;
                    job.stage = Stage::Piece;
                }
                Stage::Clear if job.done == segment.blocks => job.stage = Stage::Piece,
                Stage::Clear => {
                    if let Some(next) = self.clear_metadata(job, &segment, target, buffer) {
                        return Ok(Some(next));
                    }
                }
                Stage::WriteData => {
                    if let Some(next) = self.write_metadata(job, target, buffer)? {
                        return Ok(Some(next));
                    }
                }
                Stage::ReadPage => return Ok(Some(self.overlay(job, target, buffer)?)),
                Stage::WriteMetadata => {
                    job.done += job.count;
                    let end = job.namespace.blocks.min(target + job.count);
                    if let Err(status) = keep(&job.namespace.uncorrectable.heal(target, end)) {
                        job.failed = Some(status);
                    }
                    job.stage =
                        if matches!(job.kind, Kind::Clear { .. }) { Stage::Clear } else { Stage::Piece };
                }
            }
        }
    }

    /// The request for the data of the piece, from block `first` on.
    fn data_request(&self, job: &Job, first: u64, buffer: u64) -> Result<Option<Next>, Fault> {
        let (offset_bytes, length_bytes) = job.namespace.byte_range(first, job.count)?;
        let operation = match job.stage {
            Stage::WriteData => Operation::Write { fua: job.fua },
            _ => Operation::Read,
        };
        Ok(Some(Next { operation, offset_bytes, length_bytes, buffer: Some(buffer) }))
    }

    /// The request for the pages with the metadata of the piece, from block `first` on.
    fn page_request(&self, job: &Job, first: u64, operation: Operation, buffer: u64) -> Next {
        let (offset_bytes, length_bytes, _) = job.pages(first, job.count);
        Next { operation, offset_bytes, length_bytes, buffer: Some(buffer + DATA_BYTES) }
    }

    /// The next metadata of blocks that are cleared: `None` if the next step is taken without a request.
    fn clear_metadata(&mut self, job: &mut Job, segment: &Segment, target: u64, buffer: u64) -> Option<Next> {
        let left = segment.blocks - job.done;
        let of_page = job.blocks_of_page();
        let holes = matches!(job.kind, Kind::Clear { holes: true, .. });
        if holes && target.is_multiple_of(of_page) && left >= of_page {
            job.count = left - left % of_page;
            job.stage = Stage::WriteMetadata;
            let operation = Operation::WriteZeroes { deallocate: true, fua: job.fua };
            return Some(Next { buffer: None, ..self.page_request(job, target, operation, buffer) });
        }
        let pages = if holes { 1 } else { METADATA_BYTES / PAGE_BYTES };
        job.count = left.min(pages * of_page - target % of_page);
        job.fresh.clear();
        job.fresh.resize((job.count * job.metadata_bytes()) as usize, 0);
        if let Some(protection) = &job.metadata.protection {
            if holes {
                // What a hole stands for.
                protection.complement(&mut job.fresh, job.metadata.bytes.into());
            } else if job.wanted.action {
                self.data.clear();
                self.data.resize(job.block_bytes() as usize, 0);
                let first = segment.index + job.done;
                for (tuple, index) in job.fresh.chunks_exact_mut(job.metadata.bytes.into()).zip(first..) {
                    protection.insert(&job.wanted, index, &self.data, tuple);
                }
            }
        }
        job.stage = Stage::WriteData;
        None
    }

    /// The write of the metadata of the piece, or the read of the pages that they are in, if these hold those of other blocks too.
    fn write_metadata(&mut self, job: &mut Job, target: u64, buffer: u64) -> Result<Option<Next>, Fault> {
        let (_, length, within) = job.pages(target, job.count);
        if within == 0 && length == job.count * job.metadata_bytes() {
            return self.overlay(job, target, buffer).map(Some);
        }
        job.stage = Stage::ReadPage;
        Ok(Some(self.page_request(job, target, Operation::Read, buffer)))
    }

    /// Puts the metadata of the piece into their pages, and writes these.
    fn overlay(&mut self, job: &mut Job, target: u64, buffer: u64) -> Result<Next, Fault> {
        let (_, _, within) = job.pages(target, job.count);
        self.other.clear();
        self.other.extend_from_slice(&job.fresh);
        if let Some(protection) = &job.metadata.protection {
            protection.complement(&mut self.other, job.metadata.bytes.into());
        }
        let place = GuestAddress(buffer + DATA_BYTES + within);
        self.memory.write_slice(&self.other, place).map_err(|_| Status::INTERNAL_ERROR)?;
        job.stage = Stage::WriteMetadata;
        Ok(self.page_request(job, target, Operation::Write { fua: job.fua }, buffer))
    }

    /// Takes what was read out of the buffer, and checks it.
    fn look_at(&mut self, job: &mut Job, segment: &Segment, buffer: u64) -> Result<(), Fault> {
        let copy = job.kind == Kind::Copy;
        let first = if copy { segment.source } else { segment.first } + job.done;
        let (_, _, within) = job.pages(first, job.count);
        resize(&mut self.data, job.count * job.block_bytes());
        let metadata_bytes = job.count * job.metadata_bytes();
        resize(&mut job.fresh, metadata_bytes);
        let read = self.memory.read_slice(&mut self.data, GuestAddress(buffer)).and_then(|()| {
            self.memory.read_slice(&mut job.fresh, GuestAddress(buffer + DATA_BYTES + within))
        });
        read.map_err(|_| Status::INTERNAL_ERROR)?;
        let Some(protection) = job.metadata.protection else { return Ok(()) };
        protection.complement(&mut job.fresh, job.metadata.bytes.into());
        let (wanted, index) = match copy {
            true => (segment.source_wanted, job.done),
            false => (job.wanted, segment.index + job.done),
        };
        check(job, &wanted, index, first, &self.data, &job.fresh)
    }

    /// Makes or checks the protection information of a piece that is to be written.
    fn protect(&mut self, job: &mut Job, index: u64, target: u64) -> Result<(), Fault> {
        let Some(protection) = job.metadata.protection else { return Ok(()) };
        if !job.wanted.action {
            return check(job, &job.wanted, index, target, &self.data, &job.fresh);
        }
        let data = self.data.chunks_exact(1 << job.namespace.block_shift);
        let blocks = data.zip(job.fresh.chunks_exact_mut(job.metadata.bytes.into()));
        for ((data, metadata), index) in blocks.zip(index..) {
            protection.insert(&job.wanted, index, data, metadata);
        }
        Ok(())
    }

    /// Takes the piece from the guest.
    fn take_in(&mut self, job: &mut Job, guest: &GuestMemory, index: u64, target: u64) -> Result<(), Fault> {
        let (block_bytes, metadata_bytes) = (job.block_bytes(), job.metadata_bytes());
        resize(&mut self.data, job.count * block_bytes);
        job.fresh.clear();
        resize(&mut job.fresh, job.count * metadata_bytes);
        if job.transferred && job.metadata.extended {
            resize(&mut self.extended, job.count * (block_bytes + metadata_bytes));
            job.data.read(guest, &mut self.extended)?;
            let blocks = self.data.chunks_exact_mut(block_bytes as usize);
            let blocks = blocks.zip(job.fresh.chunks_exact_mut(metadata_bytes as usize));
            for ((data, metadata), both) in
                blocks.zip(self.extended.chunks_exact((block_bytes + metadata_bytes) as usize))
            {
                data.copy_from_slice(&both[..data.len()]);
                metadata.copy_from_slice(&both[data.len()..]);
            }
        } else {
            job.data.read(guest, &mut self.data)?;
            if job.transferred {
                job.separate.read(guest, &mut job.fresh)?;
            }
        }
        self.protect(job, index, target)
    }

    /// Gives the piece to the guest.
    fn hand_out(&mut self, job: &mut Job, guest: &GuestMemory) -> Result<(), Fault> {
        if job.transferred && job.metadata.extended {
            self.extended.clear();
            let data = self.data.chunks_exact(1 << job.namespace.block_shift);
            for (data, metadata) in data.zip(job.fresh.chunks_exact(job.metadata.bytes.into())) {
                self.extended.extend_from_slice(data);
                self.extended.extend_from_slice(metadata);
            }
            job.data.write(guest, &self.extended)?;
        } else {
            job.data.write(guest, &self.data)?;
            if job.transferred {
                job.separate.write(guest, &job.fresh)?;
            }
        }
        Ok(())
    }

    /// Compares the piece with what the guest has. Its protection information is checked like that of the image, not compared.
    fn compare(&mut self, job: &mut Job, guest: &GuestMemory, index: u64, target: u64) -> Result<(), Fault> {
        let data = std::mem::take(&mut self.data);
        let mut metadata = std::mem::take(&mut job.fresh);
        self.take_in(job, guest, index, target)?;
        if let Some(protection) = &job.metadata.protection {
            let bytes = usize::from(job.metadata.bytes);
            for metadata in [&mut metadata, &mut job.fresh] {
                for block in metadata.chunks_exact_mut(bytes) {
                    block[protection.place(bytes)].copy_from_slice(&[0; PROTECTION_BYTES]);
                }
            }
        }
        match data == self.data && metadata == job.fresh {
            true => Ok(()),
            false => Err(Status::COMPARE_FAILURE.do_not_retry().into()),
        }
    }
}

/// Makes room for `bytes`, whatever is in it.
fn resize(buffer: &mut Vec<u8>, bytes: u64) {
    buffer.resize(bytes as usize, 0);
}

/// Checks blocks from `index` of a command on, the first of which is block `first`.
fn check(
    job: &Job,
    wanted: &Wanted,
    index: u64,
    first: u64,
    data: &[u8],
    metadata: &[u8],
) -> Result<(), Fault> {
    let Some(protection) = job.metadata.protection.filter(|_| wanted.checks()) else { return Ok(()) };
    let data = data.chunks_exact(1 << job.namespace.block_shift);
    for ((data, metadata), at) in data.zip(metadata.chunks_exact(job.metadata.bytes.into())).zip(0..) {
        let checked = protection.check(wanted, index + at, data, metadata);
        checked.map_err(|status| Fault { status: status.do_not_retry(), block: Some(first + at) })?;
    }
    Ok(())
}
