//! Digests of everything in a stream, and the section that carries them.
//!
//! RAM has a digest per [`CHUNK_BYTES`] of a block. Each is a chain over the records of that chunk, in the order they were sent, so
//! it is computed while the data moves, by both sides, without another pass over RAM; a page that is sent again simply extends the
//! chain. In the mapped layout, where pages come in any order and once, it is a sum over the pages that are there, so that a reader
//! can look at one chunk alone; its bitmaps and the table of these sums have digests of their own, which can be compared before any
//! page is read. The digests find damage, not forgery.

use std::collections::BTreeMap;
use std::hash::Hasher as _;

use twox_hash::XxHash3_64;
use twox_hash::xxhash3_64::Hasher;
use vmstate::VmState;

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
    /// Chunks there are.
    count: usize,
    /// Those with records; the digest of the others is 0. So memory is taken for what came, not for what was announced.
    chunks: BTreeMap<usize, u64>,
    /// The chunk of the last record, which is not in the map: records of one chunk mostly come together.
    current: (usize, u64),
    /// Whether the digests are sums.
    are_sums: bool,
}

impl RamDigests {
    fn new(blocks: &[RamBlock], are_sums: bool) -> Result<Self, Error> {
        let mut digests = RamDigests { are_sums, ..RamDigests::default() };
        let mut count = 0_u64;
        for block in blocks {
            digests.blocks.push((count as usize, block.clone())); // bounded below before it is used
            count = count.saturating_add(block.length_bytes.div_ceil(CHUNK_BYTES));
        }
        if count > CHUNKS_MAX as u64 {
            return Err(Error::AboveMaximum { what: "RAM in MiB", value: count, maximum: CHUNKS_MAX as u64 });
        }
        digests.count = count as usize;
        Ok(digests)
    }

    fn chunk(&self, index: usize) -> u64 {
        match self.current {
            (current, digest) if current == index => digest,
            _ => self.chunks.get(&index).copied().unwrap_or_default(),
        }
    }

    fn table(&self) -> impl ExactSizeIterator<Item = u64> {
        (0..self.count).map(|index| self.chunk(index))
    }

    /// Takes a page out of the sum of its chunk. The caller has put it in.
    fn forget(&mut self, block: usize, offset: u64, digest_of_page: u64) {
        let index = self.blocks[block].0 + (offset / CHUNK_BYTES) as usize;
        let term = XxHash3_64::oneshot(&link(offset, digest_of_page));
        let digest = match self.current.0 == index {
            true => &mut self.current.1,
            false => self.chunks.entry(index).or_default(),
        };
        *digest = digest.wrapping_sub(term);
    }

    /// Extends the digest of a page's chunk. The caller has checked block and offset.
    fn record(&mut self, block: usize, offset: u64, digest_of_page: u64) {
        let index = self.blocks[block].0 + (offset / CHUNK_BYTES) as usize;
        if self.current.0 != index {
            let next = self.chunks.remove(&index).unwrap_or_default();
            let (before, digest) = std::mem::replace(&mut self.current, (index, next));
            self.chunks.insert(before, digest);
        }
        let link = link(offset, digest_of_page);
        let digest = &mut self.current.1;
        *digest = match self.are_sums {
            true => digest.wrapping_add(XxHash3_64::oneshot(&link)),
            false => XxHash3_64::oneshot_with_seed(*digest, &link),
        };
    }

    fn name_of(&self, chunk: usize) -> String {
        match self.blocks.iter().rev().find(|(first, _)| *first <= chunk) {
            Some((first, block)) => format!("MiB {} of RAM block {:?}", chunk - first, block.name),
            None => format!("RAM chunk {chunk}"),
        }
    }
}

fn link(offset: u64, digest_of_page: u64) -> [u8; 16] {
    let mut link = [0; 16];
    link[..8].copy_from_slice(&digest_of_page.to_le_bytes());
    link[8..].copy_from_slice(&offset.to_le_bytes());
    link
}

/// The digest of a chunk of the mapped layout, by the pages that are there.
pub(crate) fn sum_of_pages<'a>(pages: impl Iterator<Item = (u64, &'a [u8])>) -> u64 {
    pages.fold(0, |sum, (offset, page)| {
        sum.wrapping_add(XxHash3_64::oneshot(&link(offset, XxHash3_64::oneshot(page))))
    })
}

/// The digest of bytes that are compared as a whole.
pub(crate) fn of_bytes(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// One digest over pieces, as if they were one.
#[derive(Clone, Default)]
pub(crate) struct Pieces(Hasher);

impl Pieces {
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    pub(crate) fn digest(&self) -> u64 {
        self.0.finish()
    }
}

fn of_table(chunks: impl Iterator<Item = u64>) -> u64 {
    let mut pieces = Pieces::default();
    chunks.for_each(|chunk| pieces.add(&chunk.to_le_bytes()));
    pieces.digest()
}

/// Says that something is not what was written.
pub(crate) fn same(what: impl FnOnce() -> String, found: u64, expected: u64) -> Result<(), Error> {
    match found == expected {
        true => Ok(()),
        false => Err(Error::Damaged { what: what(), found, expected }),
    }
}

/// In the place of a section's id: what the digest of all commands has, which no section of ours has.
const COMMANDS_ID: u32 = 0;

/// The digests of a stream, as they accumulate.
#[derive(Debug, Default)]
pub(crate) struct Digests {
    configuration: u64,
    /// Id, name for errors, digest.
    sections: Vec<(u32, String, u64)>,
    /// A chain over all commands, if there are any.
    commands: Option<u64>,
    ram: RamDigests,
    zero_page: Option<u64>,
    /// In the mapped layout, once they are known.
    bitmaps: Option<u64>,
}

impl Digests {
    pub(crate) fn configuration(&mut self, bytes: &[u8]) {
        self.configuration = XxHash3_64::oneshot(bytes);
    }

    /// `bytes` is the section from its type to the end of its payload.
    pub(crate) fn section(&mut self, id: u32, name: &str, bytes: &[u8]) {
        self.sections.push((id, name.to_owned(), XxHash3_64::oneshot(bytes)));
    }

    /// `bytes` is a command from its mark to the end of its data.
    pub(crate) fn command(&mut self, bytes: &[u8]) {
        self.commands = Some(XxHash3_64::oneshot_with_seed(self.commands.unwrap_or_default(), bytes));
    }

    /// `are_mapped` if a page comes once at most, in any order.
    pub(crate) fn ram_blocks(&mut self, blocks: &[RamBlock], are_mapped: bool) -> Result<(), Error> {
        self.ram = RamDigests::new(blocks, are_mapped)?;
        Ok(())
    }

    /// Of all bitmaps of the mapped layout, one after the other.
    pub(crate) fn bitmaps(&mut self, digest: u64) {
        self.bitmaps = Some(digest);
    }

    /// Takes the table of a mapped file for granted: its pages are compared with it when they are read.
    pub(crate) fn believe(&mut self, written: &Integrity) {
        self.ram.chunks = written.chunks.iter().copied().enumerate().collect();
        self.ram.current = self.ram.chunks.remove_entry(&0).unwrap_or_default();
    }

    /// The digest of a chunk, and what to call it.
    pub(crate) fn chunk(&self, block: usize, chunk: u64) -> Option<(u64, String)> {
        let index = self.ram.blocks.get(block)?.0.checked_add(usize::try_from(chunk).ok()?)?;
        Some((self.ram.chunk(index), self.ram.name_of(index)))
    }

    /// Id, name for errors and digest of everything that has an entry.
    fn entries(&self) -> impl Iterator<Item = (u32, &str, u64)> {
        let sections = self.sections.iter().map(|(id, name, digest)| (*id, name.as_str(), *digest));
        sections.chain(self.commands.map(|digest| (COMMANDS_ID, "commands", digest)))
    }

    /// Returns the digest of the page alone.
    pub(crate) fn ram_page(&mut self, block: usize, offset: u64, page: &[u8]) -> u64 {
        let digest = XxHash3_64::oneshot(page);
        self.ram.record(block, offset, digest);
        digest
    }

    /// A page of the mapped layout is not what it was when its digest was this.
    pub(crate) fn forget_ram_page(&mut self, block: usize, offset: u64, digest: u64) {
        self.ram.forget(block, offset, digest);
    }

    pub(crate) fn ram_zero(&mut self, block: usize, offset: u64) {
        let zero_page = *self.zero_page.get_or_insert_with(|| XxHash3_64::oneshot(&[0; PAGE_BYTES]));
        self.ram.record(block, offset, zero_page);
    }

    /// One number for all of it.
    pub(crate) fn combined(&self) -> u64 {
        let mut hasher = Hasher::new();
        hasher.write(&self.configuration.to_le_bytes());
        for (id, _, digest) in self.entries() {
            hasher.write(&id.to_le_bytes());
            hasher.write(&digest.to_le_bytes());
        }
        for chunk in self.ram.table() {
            hasher.write(&chunk.to_le_bytes());
        }
        if let Some(bitmaps) = self.bitmaps {
            hasher.write(&bitmaps.to_le_bytes());
        }
        hasher.finish()
    }

    /// The section's state. `trailer` is the digest of the trailer's text, in a file.
    pub(crate) fn to_state(&self, trailer: Option<u64>) -> Integrity {
        let chunks: Vec<u64> = self.ram.table().collect();
        let mapped = self.bitmaps.map(|bitmaps| {
            let chunks = of_table(chunks.iter().copied());
            MappedDigests { bitmaps, chunks }
        });
        Integrity {
            configuration: self.configuration,
            section_count: 0,
            sections: self.entries().map(|(id, _, digest)| SectionDigest { id, digest }).collect(),
            chunk_bytes: CHUNK_BYTES as u32,
            chunk_count: 0,
            chunks,
            trailer: trailer.map(|text| TrailerDigest { text }),
            mapped,
        }
    }

    /// Compares what was read with what the writer computed. In a mapped file, which `is_mapped`, no page has been read: its table
    /// is compared with its own digest.
    pub(crate) fn compare(&self, written: &Integrity, is_mapped: bool) -> Result<(), Error> {
        same(|| "the configuration".into(), self.configuration, written.configuration)?;
        let came = self.entries().count();
        if came != written.sections.len() || self.ram.count != written.chunks.len() {
            return Err(Error::Coverage(format!(
                "{} sections and {} MiB of RAM, but {came} and {} came",
                written.sections.len(),
                written.chunks.len(),
                self.ram.count
            )));
        }
        for ((id, name, digest), expected) in self.entries().zip(&written.sections) {
            if id != expected.id {
                return Err(Error::Coverage(format!("section id {} where {name:?} has {id}", expected.id)));
            }
            same(|| format!("section {name:?}"), digest, expected.digest)?;
        }
        match &written.mapped {
            Some(mapped) if is_mapped => {
                let table = of_table(written.chunks.iter().copied());
                return same(|| "the table of RAM digests".into(), table, mapped.chunks);
            }
            None if is_mapped => return Err(Error::Coverage("no bitmaps".into())),
            Some(_) => return Err(Error::Coverage("bitmaps, which only mapped files have".into())),
            None => {}
        }
        let mut pairs = self.ram.table().zip(&written.chunks).enumerate();
        pairs.try_for_each(|(index, (found, expected))| same(|| self.ram.name_of(index), found, *expected))
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
    #[vmstate(subsection)]
    pub trailer: Option<TrailerDigest>,
    #[vmstate(subsection)]
    pub mapped: Option<MappedDigests>,
}

#[cfg(test)]
impl Integrity {
    /// The same with `digest` in the place of every digest.
    pub(crate) fn with_all(&self, digest: u64) -> Self {
        Self {
            configuration: digest,
            section_count: 0,
            sections: self.sections.iter().map(|one| SectionDigest { id: one.id, digest }).collect(),
            chunk_bytes: self.chunk_bytes,
            chunk_count: 0,
            chunks: vec![digest; self.chunks.len()],
            trailer: self.trailer.iter().map(|_| TrailerDigest { text: digest }).next(),
            mapped: self.mapped.iter().map(|_| MappedDigests { bitmaps: digest, chunks: digest }).next(),
        }
    }
}

#[derive(Debug, VmState)]
#[vmstate(name = "section-digest")]
struct SectionDigest {
    id: u32,
    digest: u64,
}

/// Files have it; the first ones did not.
#[derive(Debug, VmState)]
#[vmstate(name = "integrity/trailer")]
pub(crate) struct TrailerDigest {
    pub text: u64,
}

/// What can be compared before a page is read.
#[derive(Debug, VmState)]
#[vmstate(name = "integrity/mapped")]
pub(crate) struct MappedDigests {
    pub bitmaps: u64,
    chunks: u64,
}
