//! Guest memory into one channel.

use std::ops::Range;
use std::time::{Duration, Instant};

use stream::PAGE_BYTES as PAGE_LENGTH;
use twox_hash::XxHash3_64;
use vm_memory::VolatileMemory;

use super::compress::{Compression, Compressor};
use super::lane::{Lane, Watch};
use super::wire::{CHUNK_PAGES, Chain, Head, RUNS_MAX, Run, RunKind, Shape};
use crate::link::Step;
use crate::ram::is_zero;
use crate::{Error, PAGE_BYTES, PageBitmap, RamBlock};

/// Pages with contents that make a batch: few enough that what was looked at is still in the second cache when the kernel
/// copies it, enough that its system call costs nothing beside.
const BATCH_PAGES: usize = 64;
/// Pages that are compressed together: what LZ4 looks back on.
const UNIT_PAGES: u64 = 16;

/// What a batch was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    /// On the channel.
    pub bytes: u64,
    /// With contents.
    pub normal_pages: u64,
    /// Of these, those that were compressed.
    pub compressed_pages: u64,
    /// What became of them.
    pub compressed_bytes: u64,
    pub zero_pages: u64,
}

/// Sees each batch when it was sent, and how long the channel took for it.
type After<'a> = dyn FnMut(Sent, Duration) -> Result<(), Error> + 'a;

/// The sending end of a channel.
pub(crate) struct Outlet {
    shape: Shape,
    lane: Lane,
    /// In the order of their names, each with its place in the lists of bitmaps.
    blocks: Vec<(usize, RamBlock)>,
    compressor: Option<Compressor>,
    chain: Chain,
    batch: Batch,
    /// The page that is looked at.
    page: Box<[u8; PAGE_LENGTH]>,
}

/// What is collected for the next system call.
#[derive(Default)]
struct Batch {
    runs: Vec<Run>,
    digests: Vec<u8>,
    /// Contents that are not sent from where they are: compressed, or what could not be.
    packed: Vec<u8>,
    /// Pages of the last run that are to be compressed.
    unit: Vec<u8>,
    sent: Sent,
}

impl Outlet {
    /// Channel `index` of `count`, over a connection whose other end expects it.
    pub fn new(
        lane: Lane,
        blocks: &[RamBlock],
        index: usize,
        count: usize,
        compression: Compression,
    ) -> Result<Self, Error> {
        let mut blocks: Vec<_> = blocks.iter().cloned().enumerate().collect();
        blocks.sort_by(|(_, one), (_, other)| one.name.cmp(&other.name));
        let block_pages = blocks.iter().map(|(_, block)| block.length_bytes() / PAGE_BYTES).collect();
        Ok(Self {
            shape: Shape { block_pages, index, count },
            lane,
            blocks,
            compressor: Compressor::new(compression)?,
            chain: Chain::default(),
            batch: Batch::default(),
            page: Box::new([0; PAGE_LENGTH]),
        })
    }

    /// Sends this channel's pages of each bitmap; `after` sees each batch when it was sent.
    pub fn round(
        &mut self,
        round: u32,
        bitmaps: &[PageBitmap],
        step: Step<'_>,
        watch: &Watch,
        after: &mut After<'_>,
    ) -> Result<(), Error> {
        for block in 0..self.blocks.len() {
            let bitmap = self.blocks.get(block).and_then(|(place, _)| bitmaps.get(*place));
            for run in bitmap.into_iter().flat_map(PageBitmap::runs) {
                for piece in chunks(run) {
                    if self.shape.channel_of(block, piece.start) != self.shape.index {
                        continue;
                    }
                    for page in piece {
                        if self.batch.is_full() {
                            self.flush(round, step, watch, after)?;
                        }
                        self.add(block, page)?;
                    }
                }
            }
        }
        self.flush(round, step, watch, after)
    }

    /// Says that nothing follows. Returns the digest of all that was said.
    pub fn end(&mut self, step: Step<'_>, watch: &Watch) -> Result<u64, Error> {
        let head = Head::End.encode();
        self.chain.add(&head);
        let digest = self.chain.digest();
        let last = [head.as_slice(), &digest.to_be_bytes()].concat();
        self.lane.send::<()>(&last, &[], step, watch)?;
        Ok(digest)
    }

    /// Looks at a page, in a copy that stays in the first cache and is a moment's: it may differ from what is sent, if the guest
    /// writes meanwhile; then the page is dirty and comes again.
    fn add(&mut self, block: usize, page: u64) -> Result<(), Error> {
        let failed = |source: vm_memory::VolatileMemoryError| Error::Machine {
            doing: "read guest memory",
            source: source.into(),
        };
        let Self { blocks, compressor, batch, page: copy, .. } = self;
        let Some((_, memory)) = blocks.get(block) else { return Ok(()) };
        let slice = memory.mapping.get_slice((page * PAGE_BYTES) as usize, PAGE_LENGTH).map_err(failed)?;
        slice.copy_to(copy.as_mut_slice());
        if is_zero(copy) {
            batch.extend(block, page, RunKind::Zero, compressor.as_mut());
            batch.sent.zero_pages += 1;
            return Ok(());
        }
        batch.digests.extend(XxHash3_64::oneshot(copy.as_slice()).to_be_bytes());
        batch.sent.normal_pages += 1;
        batch.extend(block, page, RunKind::Data, compressor.as_mut());
        if compressor.is_some() {
            batch.unit.extend_from_slice(copy.as_slice());
        }
        Ok(())
    }

    fn flush(
        &mut self,
        round: u32,
        step: Step<'_>,
        watch: &Watch,
        after: &mut After<'_>,
    ) -> Result<(), Error> {
        let Self { batch, blocks, lane, .. } = self;
        batch.pack(self.compressor.as_mut());
        if batch.runs.is_empty() {
            return Ok(());
        }
        let contents_bytes = batch.runs.iter().map(|run| run.contents_bytes).sum();
        let digests = batch.digests.len() / super::wire::DIGEST_BYTES;
        let head = Head::Pages { round, runs: batch.runs.len(), digests, contents_bytes };
        let mut bytes = head.encode().to_vec();
        batch.runs.iter().for_each(|run| bytes.extend(run.encode()));
        bytes.extend_from_slice(&batch.digests);
        self.chain.add(&bytes);
        batch.sent.bytes = (bytes.len() + contents_bytes) as u64;
        let start = Instant::now();
        if self.compressor.is_some() {
            bytes.extend_from_slice(&batch.packed);
            lane.send::<()>(&bytes, &[], step, watch)?;
        } else {
            let contents = batch.runs.iter().filter(|run| run.kind == RunKind::Data);
            let memory = contents.filter_map(|run| {
                let (_, block) = blocks.get(run.block)?;
                Some(block.mapping.get_slice(run.offset_bytes(), run.length_bytes()))
            });
            let memory = memory.collect::<Result<Vec<_>, _>>();
            let memory = memory
                .map_err(|source| Error::Machine { doing: "read guest memory", source: source.into() })?;
            lane.send(&bytes, &memory, step, watch)?;
        }
        let sending = start.elapsed();
        let sent = std::mem::take(&mut batch.sent);
        batch.runs.clear();
        batch.digests.clear();
        batch.packed.clear();
        after(sent, sending)
    }
}

impl Batch {
    /// Whether another page could be too much.
    fn is_full(&self) -> bool {
        self.runs.len() == RUNS_MAX || self.digests.len() >= BATCH_PAGES * super::wire::DIGEST_BYTES
    }

    /// Adds a page to the last run, or begins one.
    fn extend(&mut self, block: usize, page: u64, kind: RunKind, compressor: Option<&mut Compressor>) {
        let unit_pages = if compressor.is_some() && kind == RunKind::Data { UNIT_PAGES } else { CHUNK_PAGES };
        if let Some(last) = self.runs.last_mut()
            && (last.block, last.kind, last.range().end) == (block, kind, page)
            && last.first_page / CHUNK_PAGES == page / CHUNK_PAGES
            && last.pages < unit_pages
        {
            last.pages += 1;
            if kind == RunKind::Data {
                last.contents_bytes += PAGE_LENGTH;
            }
            return;
        }
        self.pack(compressor);
        let contents_bytes = if kind == RunKind::Zero { 0 } else { PAGE_LENGTH };
        self.runs.push(Run { block, kind, first_page: page, pages: 1, contents_bytes });
    }

    /// The last run is complete: compresses it, if that makes it smaller.
    fn pack(&mut self, compressor: Option<&mut Compressor>) {
        let (Some(compressor), Some(run)) = (compressor, self.runs.last_mut()) else { return };
        if self.unit.is_empty() {
            return;
        }
        let kind = compressor.kind();
        match compressor.compress(&self.unit) {
            Some(smaller) => {
                run.kind = kind;
                run.contents_bytes = smaller.len();
                self.packed.extend_from_slice(smaller);
                self.sent.compressed_pages += run.pages;
                self.sent.compressed_bytes += smaller.len() as u64;
            }
            None => self.packed.extend_from_slice(&self.unit),
        }
        self.unit.clear();
    }
}

/// The parts of a run of pages, each in one chunk.
fn chunks(run: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut start = run.start;
    std::iter::from_fn(move || {
        let end = ((start / CHUNK_PAGES + 1) * CHUNK_PAGES).min(run.end);
        let part = start..end;
        start = end;
        (!part.is_empty()).then_some(part)
    })
}
