//! One channel into guest memory.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use stream::PAGE_BYTES as PAGE_LENGTH;
use twox_hash::XxHash3_64;
use vm_memory::VolatileMemory;

use super::compress::Decompressor;
use super::differing::Differing;
use super::fresh::Fresh;
use super::lane::Input;
use super::wire::{
    CONTENTS_BYTES_MAX, Chain, DIGEST_BYTES, HEAD_BYTES, Head, Run, RunKind, Shape, decode_table, table_bytes,
};
use crate::headway::Brought;
use crate::postcopy::order_by_name;
use crate::{Error, FreshMemory, PAGE_BYTES, PageBitmap, RamBlock};

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Came {
    /// A batch.
    Batch(Batch),
    /// The end: everything said has this digest.
    End { digest: u64 },
}

/// What a batch was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Batch {
    /// On the channel.
    pub bytes: u64,
    /// Of them all, those that are zero included.
    pub pages: u64,
    /// Contents of pages.
    pub brought: Brought,
}

/// The receiving end of a channel. Its memory is two bits for each page, and what the largest batch needs.
pub(crate) struct Inlet {
    shape: Shape,
    /// In the order of their names.
    blocks: Vec<RamBlock>,
    /// Of each, how pages are filled that hold nothing.
    fresh: Vec<Fresh>,
    /// Pages of each block that hold something: the others are still the holes of fresh memory.
    placed: Vec<PageBitmap>,
    /// Contents that came in this batch.
    brought: Brought,
    differing: Differing,
    round: u32,
    chain: Chain,
    table: Vec<u8>,
    runs: Vec<Run>,
    contents: Vec<u8>,
    pages: Vec<u8>,
    decompressor: Decompressor,
}

/// The step, in errors.
pub(crate) const DOING: &str = "receiving guest memory";

pub(super) fn wrong(reason: String) -> Error {
    Error::Protocol { doing: DOING, reason }
}

impl Inlet {
    /// Channel `index` of `count` into `blocks`, which are fresh, and filled as `memory` does it where it can.
    pub fn new(
        blocks: &[RamBlock],
        index: usize,
        count: usize,
        memory: Option<&Arc<dyn FreshMemory>>,
    ) -> Self {
        let order = order_by_name(blocks);
        let in_order = order.iter().filter_map(|number| Some((*number, blocks.get(*number)?)));
        let fresh = in_order.clone().map(|(number, block)| Fresh::of(block, number, memory)).collect();
        let blocks: Vec<_> = in_order.map(|(_, block)| block.clone()).collect();
        let block_pages: Vec<_> = blocks.iter().map(|block| block.length_bytes() / PAGE_BYTES).collect();
        let nothing: Vec<_> = block_pages.iter().map(|pages| PageBitmap::new(*pages)).collect();
        Self {
            shape: Shape { block_pages, index, count },
            fresh,
            differing: Differing::none(&blocks),
            blocks,
            placed: nothing,
            brought: Brought::default(),
            round: 0,
            chain: Chain::default(),
            table: Vec::new(),
            runs: Vec::new(),
            contents: Vec::new(),
            pages: Vec::new(),
            decompressor: Decompressor::default(),
        }
    }

    /// Receives one batch, or the end.
    pub fn receive(&mut self, input: &mut impl Input) -> Result<Came, Error> {
        let mut bytes = [0; HEAD_BYTES];
        input.read(&mut bytes, true)?;
        let head = Head::decode(bytes).map_err(wrong)?;
        self.chain.add(&bytes);
        let Head::Pages { round, runs, digests, contents_bytes } = head else { return self.end(input) };
        if round < self.round {
            return Err(wrong(format!("a batch of round {round} in round {}", self.round)));
        }
        self.round = round;
        let mut table = std::mem::take(&mut self.table);
        table.resize(table_bytes(runs, digests), 0);
        input.read(&mut table, false)?;
        self.chain.add(&table);
        let mut runs = std::mem::take(&mut self.runs);
        let digests = decode_table(&table, head, &self.shape, &mut runs).map_err(wrong)?;
        if runs.iter().any(|run| self.goes_through_a_buffer(run)) {
            self.copy(&runs, contents_bytes, digests, input)?;
        } else {
            self.scatter(&runs, digests, input)?;
        }
        let batch = Batch {
            bytes: (HEAD_BYTES + table.len() + contents_bytes) as u64,
            pages: runs.iter().map(|run| run.pages).sum(),
            brought: std::mem::take(&mut self.brought),
        };
        self.runs = runs;
        self.table = table;
        Ok(Came::Batch(batch))
    }

    /// Whether its contents cannot be received where they belong: they are compressed, or the pages are not there yet and come best
    /// from elsewhere.
    fn goes_through_a_buffer(&mut self, run: &Run) -> bool {
        match run.kind {
            RunKind::Zero => false,
            RunKind::Data => self.is_fresh(run) && !self.is_better_touched(run),
            RunKind::Lz4 | RunKind::Zstd => true,
        }
    }

    /// Whether some of its pages hold nothing yet.
    fn is_fresh(&self, run: &Run) -> bool {
        let placed = self.placed.get(run.block);
        placed.is_some_and(|placed| !run.range().all(|page| placed.contains(page)))
    }

    fn is_better_touched(&mut self, run: &Run) -> bool {
        let fresh = self.fresh.get_mut(run.block).zip(self.blocks.get(run.block));
        fresh.is_some_and(|(fresh, block)| fresh.is_better_touched(block, run))
    }

    /// Contents go straight to where they belong.
    fn scatter(
        &mut self,
        runs: &[Run],
        mut digests: impl Iterator<Item = u64>,
        input: &mut impl Input,
    ) -> Result<(), Error> {
        let contents = runs.iter().filter(|run| run.kind == RunKind::Data);
        let memory = contents.map(|run| {
            let block = self.block(run)?;
            block.mapping.get_slice(run.offset_bytes(), run.length_bytes()).map_err(unwritable)
        });
        input.read_memory(&memory.collect::<Result<Vec<_>, _>>()?)?;
        let mut copy = [0; PAGE_LENGTH];
        for run in runs {
            if run.kind == RunKind::Zero {
                self.make_zero(run)?;
                continue;
            }
            for page in run.range() {
                let slice = self.block(run)?.mapping.get_slice((page * PAGE_BYTES) as usize, PAGE_LENGTH);
                slice.map_err(unwritable)?.copy_to(&mut copy);
                self.judge(run, page, digests.next() != Some(XxHash3_64::oneshot(&copy)));
            }
        }
        Ok(())
    }

    /// Contents are looked at first.
    fn copy(
        &mut self,
        runs: &[Run],
        contents_bytes: usize,
        mut digests: impl Iterator<Item = u64>,
        input: &mut impl Input,
    ) -> Result<(), Error> {
        debug_assert!(contents_bytes <= CONTENTS_BYTES_MAX, "the head was checked");
        let mut contents = std::mem::take(&mut self.contents);
        let mut pages = std::mem::take(&mut self.pages);
        contents.resize(contents_bytes, 0);
        input.read(&mut contents, false)?;
        let mut rest = contents.as_slice();
        for run in runs {
            let (bytes, after) = rest.split_at_checked(run.contents_bytes).unwrap_or_default();
            rest = after;
            let bytes = match run.kind {
                RunKind::Zero => {
                    self.make_zero(run)?;
                    continue;
                }
                RunKind::Data => bytes,
                RunKind::Lz4 | RunKind::Zstd => {
                    pages.resize(run.length_bytes(), 0);
                    self.decompressor.decompress(run.kind, bytes, &mut pages).map_err(wrong)?;
                    pages.as_slice()
                }
            };
            self.put(run, bytes)?;
            for (page, bytes) in run.range().zip(bytes.as_chunks::<PAGE_LENGTH>().0) {
                self.judge(run, page, digests.next() != Some(XxHash3_64::oneshot(bytes)));
            }
        }
        self.contents = contents;
        self.pages = pages;
        Ok(())
    }

    /// Pages that hold nothing yet are zero as they are.
    fn make_zero(&mut self, run: &Run) -> Result<(), Error> {
        for page in run.range() {
            if self.placed.get(run.block).is_some_and(|placed| placed.contains(page)) {
                let slice = self.block(run)?.mapping.get_slice((page * PAGE_BYTES) as usize, PAGE_LENGTH);
                slice.map_err(unwritable)?.copy_from(&[0_u8; PAGE_LENGTH]);
                self.differing.note(run.block, page, false);
            }
        }
        Ok(())
    }

    /// Notes a page whose contents were placed, and whether they are what the source saw.
    fn judge(&mut self, run: &Run, page: u64, differs: bool) {
        self.brought.bytes += PAGE_BYTES;
        if self.placed.get_mut(run.block).is_some_and(|placed| placed.insert(page)) {
            self.brought.new_bytes += PAGE_BYTES;
        }
        self.differing.note(run.block, page, differs);
    }

    fn end(&mut self, input: &mut impl Input) -> Result<Came, Error> {
        let mut theirs = [0; DIGEST_BYTES];
        input.read(&mut theirs, false)?;
        let (digest, theirs) = (self.chain.digest(), u64::from_be_bytes(theirs));
        if digest != theirs {
            return Err(wrong(format!(
                "channel {} said something else than it sent: digest {digest:#018x}, the source's {theirs:#018x}",
                self.shape.index
            )));
        }
        Ok(Came::End { digest })
    }

    /// After the end: which pages are not what the source saw of them.
    pub fn into_differing(self) -> Differing {
        self.differing
    }

    /// Puts contents where they belong.
    fn put(&mut self, run: &Run, bytes: &[u8]) -> Result<(), Error> {
        if self.fill(run, bytes)? {
            return Ok(());
        }
        let is_written = !self.is_fresh(run) || !self.is_better_touched(run);
        let mapping = &self.block(run)?.mapping;
        if let Some(memory) = self.fresh.get(run.block).and_then(Fresh::file).filter(|_| is_written) {
            let offset = memory.start() + run.offset_bytes() as u64;
            return memory.file().write_all_at(bytes, offset).map_err(unwritable);
        }
        mapping.get_slice(run.offset_bytes(), run.length_bytes()).map_err(unwritable)?.copy_from(bytes);
        Ok(())
    }

    /// The same for memory that is filled: only the pages that hold something are touched. Says whether it is.
    fn fill(&mut self, run: &Run, bytes: &[u8]) -> Result<bool, Error> {
        let block = self.blocks.get(run.block).zip(self.fresh.get_mut(run.block));
        let (block, placed) = block.zip(self.placed.get(run.block)).ok_or_else(|| no_block(run))?;
        let ((block, fresh), Run { first_page, pages, .. }) = (block, *run);
        if !fresh.is_filled() {
            return Ok(false);
        }
        let (mut rest, mut start, end) = (bytes, first_page, first_page + pages);
        while start < end {
            let is_there = placed.contains(start);
            let next = (start..end).find(|page| placed.contains(*page) != is_there).unwrap_or(end);
            let split = rest.split_at_checked(((next - start) * PAGE_BYTES) as usize);
            let (contents, after) =
                split.ok_or_else(|| wrong(format!("{} bytes for {pages} pages", bytes.len())))?;
            if is_there {
                let memory = block.mapping.get_slice((start * PAGE_BYTES) as usize, contents.len());
                memory.map_err(unwritable)?.copy_from(contents);
            } else if !fresh.fill(start * PAGE_BYTES, contents)? {
                return Ok(false);
            }
            (rest, start) = (after, next);
        }
        Ok(true)
    }

    fn block(&self, run: &Run) -> Result<&RamBlock, Error> {
        self.blocks.get(run.block).ok_or_else(|| no_block(run))
    }
}

fn no_block(run: &Run) -> Error {
    wrong(format!("there is no block {}", run.block))
}

fn unwritable(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Machine { doing: "write guest memory", source: source.into() }
}
