//! Digests of everything in a stream, and the section that carries them.
//!
//! RAM has a digest per [`CHUNK_BYTES`] of a block. Each is a chain over the records of that chunk, in the order they were sent, so
//! it is computed while the data moves, by both sides, without another pass over RAM; a page that is sent again simply extends the
//! chain. The digests find damage, not forgery.

use vmstate::VmState;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64, xxh3_64_with_seed};

use crate::Error;
use crate::ram::{PAGE_BYTES, RamBlock};

/// The piece of RAM that has a digest of its own.
pub const CHUNK_BYTES: u64 = 1 << 20;

pub(crate) const NAME: &str = "integrity";
/// Chunks of 4 TiB.
const CHUNKS_MAX: usize = 1 << 22;

/// The digests of all RAM blocks.
#[derive(Debug, Default)]
struct RamDigests {
    /// For each block, where its chunks begin in the table, its length and its name.
    blocks: Vec<(usize, RamBlock)>,
    chunks: Vec<u64>,
}

impl RamDigests {
    fn new(blocks: &[RamBlock]) -> Result<Self, Error> {
        let mut digests = RamDigests::default();
        let mut count = 0_u64;
        for block in blocks {
            digests.blocks.push((count as usize, block.clone())); // bounded below before it is used
            count = count.saturating_add(block.length_bytes.div_ceil(CHUNK_BYTES));
        }
        if count > CHUNKS_MAX as u64 {
            return Err(Error::AboveMaximum { what: "RAM in MiB", value: count, maximum: CHUNKS_MAX as u64 });
        }
        digests.chunks = vec![0; count as usize];
        Ok(digests)
    }

    /// Extends the chain of a page's chunk. The caller has checked block and offset.
    fn record(&mut self, block: usize, offset: u64, digest_of_page: u64) {
        let first = self.blocks[block].0;
        let chunk = &mut self.chunks[first + (offset / CHUNK_BYTES) as usize];
        let mut link = [0; 16];
        link[..8].copy_from_slice(&digest_of_page.to_le_bytes());
        link[8..].copy_from_slice(&offset.to_le_bytes());
        *chunk = xxh3_64_with_seed(&link, *chunk);
    }

    fn name_of(&self, chunk: usize) -> String {
        match self.blocks.iter().rev().find(|(first, _)| *first <= chunk) {
            Some((first, block)) => format!("MiB {} of RAM block {:?}", chunk - first, block.name),
            None => format!("RAM chunk {chunk}"),
        }
    }
}

/// The digests of a stream, as they accumulate.
#[derive(Debug, Default)]
pub(crate) struct Digests {
    configuration: u64,
    /// Id, name for errors, digest.
    sections: Vec<(u32, String, u64)>,
    ram: RamDigests,
    zero_page: Option<u64>,
}

impl Digests {
    pub(crate) fn configuration(&mut self, bytes: &[u8]) {
        self.configuration = xxh3_64(bytes);
    }

    /// `bytes` is the section from its type to the end of its payload.
    pub(crate) fn section(&mut self, id: u32, name: &str, bytes: &[u8]) {
        self.sections.push((id, name.to_owned(), xxh3_64(bytes)));
    }

    pub(crate) fn ram_blocks(&mut self, blocks: &[RamBlock]) -> Result<(), Error> {
        self.ram = RamDigests::new(blocks)?;
        Ok(())
    }

    pub(crate) fn ram_page(&mut self, block: usize, offset: u64, page: &[u8]) {
        self.ram.record(block, offset, xxh3_64(page));
    }

    pub(crate) fn ram_zero(&mut self, block: usize, offset: u64) {
        let zero_page = *self.zero_page.get_or_insert_with(|| xxh3_64(&[0; PAGE_BYTES]));
        self.ram.record(block, offset, zero_page);
    }

    /// One number for all of it.
    pub(crate) fn combined(&self) -> u64 {
        let mut hasher = Xxh3Default::new();
        hasher.update(&self.configuration.to_le_bytes());
        for (id, _, digest) in &self.sections {
            hasher.update(&id.to_le_bytes());
            hasher.update(&digest.to_le_bytes());
        }
        for chunk in &self.ram.chunks {
            hasher.update(&chunk.to_le_bytes());
        }
        hasher.digest()
    }

    pub(crate) fn to_state(&self) -> Integrity {
        let sections = self.sections.iter().map(|(id, _, digest)| SectionDigest { id: *id, digest: *digest });
        Integrity {
            configuration: self.configuration,
            section_count: self.sections.len() as u32,
            sections: sections.collect(),
            chunk_bytes: CHUNK_BYTES as u32,
            chunk_count: self.ram.chunks.len() as u32,
            chunks: self.ram.chunks.clone(),
        }
    }

    /// Compares what was read with what the writer computed.
    pub(crate) fn compare(&self, written: &Integrity) -> Result<(), Error> {
        let damaged = |what: String, found: u64, expected: u64| match found == expected {
            true => Ok(()),
            false => Err(Error::Damaged { what, found, expected }),
        };
        damaged("the configuration".into(), self.configuration, written.configuration)?;
        if self.sections.len() != written.sections.len() || self.ram.chunks.len() != written.chunks.len() {
            return Err(Error::Coverage(format!(
                "{} sections and {} MiB of RAM, but {} and {} came",
                written.sections.len(),
                written.chunks.len(),
                self.sections.len(),
                self.ram.chunks.len()
            )));
        }
        for ((id, name, digest), expected) in self.sections.iter().zip(&written.sections) {
            if *id != expected.id {
                return Err(Error::Coverage(format!("section id {} where {name:?} has {id}", expected.id)));
            }
            damaged(format!("section {name:?}"), *digest, expected.digest)?;
        }
        let pairs = self.ram.chunks.iter().zip(&written.chunks).enumerate();
        let mut wrong = pairs.filter(|(_, (found, expected))| found != expected);
        match wrong.next() {
            None => Ok(()),
            Some((chunk, (found, expected))) => damaged(self.ram.name_of(chunk), *found, *expected),
        }
    }
}

/// The last section of a stream.
#[derive(Debug, VmState)]
#[vmstate(name = "integrity")]
pub(crate) struct Integrity {
    configuration: u64,
    section_count: u32,
    #[vmstate(len = "section_count", max = crate::wire::SECTIONS_MAX)]
    sections: Vec<SectionDigest>,
    #[vmstate(min = CHUNK_BYTES as u32, max = CHUNK_BYTES as u32)]
    chunk_bytes: u32,
    chunk_count: u32,
    #[vmstate(len = "chunk_count", max = CHUNKS_MAX)]
    chunks: Vec<u64>,
}

#[derive(Debug, VmState)]
#[vmstate(name = "section-digest")]
struct SectionDigest {
    id: u32,
    digest: u64,
}
