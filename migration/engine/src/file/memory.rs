//! Memory in a mapped file, or in several that lie over each other: a page is that of the newest one that has it.

use std::fs::File;
use std::path::PathBuf;

use stream::{CHUNK_BYTES, MappedRam};
use vm_memory::VolatileMemory;

use crate::ram::match_blocks;
use crate::{Error, PAGE_BYTES, Parameters, RamBlock, Statistics};

/// Pages of a [chunk](CHUNK_BYTES).
const CHUNK_PAGES: usize = (CHUNK_BYTES / PAGE_BYTES) as usize;

/// One of the files.
pub(super) struct Layer {
    pub ram: MappedRam<File>,
    /// For errors.
    pub path: PathBuf,
}

/// All of them, by the numbers that their blocks have in the machine.
pub(super) struct Memory {
    /// The newest first, each with the numbers that the machine's blocks have there.
    layers: Vec<(Layer, Vec<usize>)>,
    blocks: Vec<RamBlock>,
}

impl Memory {
    /// `layers` are there from the newest on, `blocks` are those of the machine.
    pub fn new(layers: impl Iterator<Item = Layer>, blocks: Vec<RamBlock>) -> Result<Self, Error> {
        let numbered = layers.map(|layer| {
            let theirs: Vec<_> = layer.ram.blocks().map(|place| place.block.clone()).collect();
            let order = match_blocks(&theirs, &blocks).map_err(|reason| Error::Protocol {
                doing: "restore RAM and devices",
                reason: format!("{}: {reason}", layer.path.display()),
            })?;
            let mut numbers = vec![0; blocks.len()];
            for (number, block) in order.into_iter().enumerate() {
                if let Some(place) = numbers.get_mut(block) {
                    *place = number;
                }
            }
            Ok((layer, numbers))
        });
        Ok(Self { layers: numbered.collect::<Result<_, Error>>()?, blocks })
    }

    /// Blocks of the machine.
    pub fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// The layers, each with the number of the block in there.
    fn layers(&self, block: usize) -> impl Iterator<Item = (&Layer, usize)> {
        self.layers
            .iter()
            .map(move |(layer, numbers)| (layer, numbers.get(block).copied().unwrap_or(usize::MAX)))
    }

    /// Whether the page is in any of the files. Others hold zeros.
    pub fn has_page(&self, block: usize, offset: u64) -> bool {
        self.layers(block).any(|(layer, number)| layer.ram.is_present(number, offset))
    }

    /// For each chunk of a block, whether any of its pages is in a file.
    pub fn held_chunks(&self, block: usize) -> Vec<bool> {
        let length_bytes = self.blocks.get(block).map_or(0, RamBlock::length_bytes);
        let mut held = vec![false; length_bytes.div_ceil(CHUNK_BYTES) as usize];
        for extent in self.layers(block).flat_map(|(layer, number)| layer.ram.extents(number)) {
            let chunks = extent.start / CHUNK_BYTES..extent.end.div_ceil(CHUNK_BYTES);
            if let Some(held) = held.get_mut(chunks.start as usize..chunks.end as usize) {
                held.fill(true);
            }
        }
        held
    }

    /// Reads a chunk and has `place` take each run of pages that are in a file, with its offset in the block. What a file has of the
    /// chunk is compared with its digest there before any of it is placed.
    pub fn bring(
        &self,
        block: usize,
        chunk: u64,
        buffer: &mut [u8],
        mut place: impl FnMut(u64, &[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let start = chunk * CHUNK_BYTES;
        let mut found = [false; CHUNK_PAGES];
        for (layer, number) in self.layers(block) {
            let mut here = [false; CHUNK_PAGES];
            for (page, (here, found)) in here.iter_mut().zip(&mut found).enumerate() {
                *here = !*found && layer.ram.is_present(number, start + page as u64 * PAGE_BYTES);
                *found |= *here;
            }
            if !here.contains(&true) {
                continue;
            }
            layer.ram.read_chunk(number, chunk, buffer).map_err(|source| Error::Memory {
                path: layer.path.display().to_string(),
                block: self.blocks.get(block).map(|block| block.name.clone()).unwrap_or_default(),
                offset: start,
                source: Box::new(source),
            })?;
            let mut end = 0;
            for run in here.chunk_by(|one, other| one == other) {
                let bytes = end..end + run.len() * PAGE_BYTES as usize;
                end = bytes.end;
                if run.first() == Some(&true) {
                    let offset = start + bytes.start as u64;
                    place(offset, buffer.get(bytes).unwrap_or_default())?;
                }
            }
        }
        Ok(())
    }

    /// Reads the whole of a block, which nobody uses yet.
    pub fn read(&self, block: usize, parameters: &Parameters, statistics: &Statistics) -> Result<(), Error> {
        let mut buffer = vec![0; CHUNK_BYTES as usize];
        let Some(own) = self.blocks.get(block) else { return Ok(()) };
        for (chunk, _) in (0..).zip(self.held_chunks(block)).filter(|(_, held)| *held) {
            if parameters.cancelled() {
                return Err(Error::Cancelled);
            }
            self.bring(block, chunk, &mut buffer, |offset, bytes| {
                let slice = own.mapping.get_slice(offset as usize, bytes.len());
                let slice = slice.map_err(|source| Error::Machine {
                    doing: "place guest memory",
                    source: source.into(),
                })?;
                slice.copy_from(bytes);
                statistics.update(|s| {
                    s.transferred_bytes += bytes.len() as u64;
                    s.normal_pages += bytes.len() as u64 / PAGE_BYTES;
                });
                Ok(())
            })?;
        }
        Ok(())
    }
}
