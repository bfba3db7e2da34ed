//! The bytes of a data channel, and what of them is refused.

use std::hash::Hasher as _;
use std::ops::Range;

use twox_hash::xxhash3_64::Hasher;

use crate::PAGE_BYTES;
use crate::ram::PAGE_LENGTH;

/// Pages of a chunk. A run lies in one, and each belongs to one channel: so an older copy of a page never comes after a newer
/// one, and no two channels write to the same page.
pub(crate) const CHUNK_PAGES: u64 = 256;
/// Runs of a batch.
pub(crate) const RUNS_MAX: usize = 256;
/// Pages of a batch that have contents.
pub(crate) const BATCH_PAGES_MAX: usize = CHUNK_PAGES as usize;
/// The longest contents of a batch.
pub(crate) const CONTENTS_BYTES_MAX: usize = BATCH_PAGES_MAX * PAGE_LENGTH;
/// Of a batch.
pub(crate) const HEAD_BYTES: usize = 16;
/// Of a run in the table of a batch.
pub(crate) const RUN_BYTES: usize = 16;
/// Of a page's digest, and of that at the end.
pub(crate) const DIGEST_BYTES: usize = 8;

/// The first bytes of every batch.
const MARK: [u8; 2] = *b"RB";
const PAGES: u8 = 1;
const END: u8 = 2;

/// The head of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Head {
    /// A table of runs, digests and contents follow.
    Pages {
        /// The pass over guest memory that it belongs to, from 1.
        round: u32,
        /// Runs in the table.
        runs: usize,
        /// Digests: one for each page that has contents.
        digests: usize,
        /// Bytes of all contents.
        contents_bytes: usize,
    },
    /// The digest of all heads, tables and digests follows, and nothing after it.
    End,
}

impl Head {
    pub fn encode(self) -> [u8; HEAD_BYTES] {
        let (kind, round, runs, digests, contents_bytes) = match self {
            Self::Pages { round, runs, digests, contents_bytes } => {
                (PAGES, round, runs, digests, contents_bytes)
            }
            Self::End => (END, 0, 0, 0, 0),
        };
        let mut bytes = [0; HEAD_BYTES];
        // The limits are far below what the fields hold.
        bytes[..2].copy_from_slice(&MARK);
        bytes[2] = kind;
        bytes[4..8].copy_from_slice(&round.to_be_bytes());
        bytes[8..10].copy_from_slice(&(runs as u16).to_be_bytes());
        bytes[10..12].copy_from_slice(&(digests as u16).to_be_bytes());
        bytes[12..].copy_from_slice(&(contents_bytes as u32).to_be_bytes());
        bytes
    }

    /// Refuses what is above a limit before anything is made room for.
    pub fn decode(bytes: [u8; HEAD_BYTES]) -> Result<Self, String> {
        let [m0, m1, kind, zero, r0, r1, r2, r3, runs0, runs1, digests0, digests1, c0, c1, c2, c3] = bytes;
        if [m0, m1] != MARK || zero != 0 {
            return Err(format!("a batch begins with {m0:#04x} {m1:#04x} {kind:#04x} {zero:#04x}"));
        }
        let round = u32::from_be_bytes([r0, r1, r2, r3]);
        let runs = usize::from(u16::from_be_bytes([runs0, runs1]));
        let digests = usize::from(u16::from_be_bytes([digests0, digests1]));
        let contents_bytes = u32::from_be_bytes([c0, c1, c2, c3]) as usize;
        match kind {
            PAGES if runs == 0 || runs > RUNS_MAX => {
                Err(format!("a batch of {runs} runs, where 1 to {RUNS_MAX} are possible"))
            }
            PAGES if digests > BATCH_PAGES_MAX => {
                Err(format!("a batch of {digests} pages, where {BATCH_PAGES_MAX} are possible"))
            }
            PAGES if contents_bytes > digests * PAGE_LENGTH => {
                Err(format!("{contents_bytes} bytes are more than {digests} pages have"))
            }
            PAGES => Ok(Self::Pages { round, runs, digests, contents_bytes }),
            END if (round, runs, digests, contents_bytes) == (0, 0, 0, 0) => Ok(Self::End),
            END => Err("an end with contents".to_owned()),
            kind => Err(format!("a batch of kind {kind}")),
        }
    }
}

/// How a run's pages come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunKind {
    /// They are zero, and nothing comes.
    Zero,
    /// As they are.
    Data,
    /// As one LZ4 block.
    Lz4,
    /// As one Zstandard frame.
    Zstd,
}

impl RunKind {
    const ALL: [Self; 4] = [Self::Zero, Self::Data, Self::Lz4, Self::Zstd];

    fn number(self) -> u8 {
        match self {
            Self::Zero => 0,
            Self::Data => 1,
            Self::Lz4 => 2,
            Self::Zstd => 3,
        }
    }
}

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Which block, in the order of their names.
    pub block: usize,
    pub kind: RunKind,
    pub first_page: u64,
    pub pages: u64,
    pub contents_bytes: usize,
}

impl Run {
    pub fn range(&self) -> Range<u64> {
        self.first_page..self.first_page + self.pages
    }

    pub fn offset_bytes(&self) -> usize {
        (self.first_page * PAGE_BYTES) as usize
    }

    pub fn length_bytes(&self) -> usize {
        (self.pages * PAGE_BYTES) as usize
    }

    /// How many of its pages have contents.
    pub fn digests(&self) -> usize {
        if self.kind == RunKind::Zero { 0 } else { self.pages as usize }
    }

    pub fn encode(&self) -> [u8; RUN_BYTES] {
        let mut bytes = [0; RUN_BYTES];
        bytes[..2].copy_from_slice(&(self.block as u16).to_be_bytes());
        bytes[2] = self.kind.number();
        bytes[4..8].copy_from_slice(&(self.first_page as u32).to_be_bytes());
        bytes[8..12].copy_from_slice(&(self.pages as u32).to_be_bytes());
        bytes[12..].copy_from_slice(&(self.contents_bytes as u32).to_be_bytes());
        bytes
    }

    /// A run that can be: inside of one chunk of a block, and with as many bytes as its kind has.
    fn decode(bytes: &[u8; RUN_BYTES], shape: &Shape) -> Result<Self, String> {
        let [b0, b1, kind, zero, f0, f1, f2, f3, p0, p1, p2, p3, c0, c1, c2, c3] = *bytes;
        let block = usize::from(u16::from_be_bytes([b0, b1]));
        let first_page = u64::from(u32::from_be_bytes([f0, f1, f2, f3]));
        let pages = u64::from(u32::from_be_bytes([p0, p1, p2, p3]));
        let contents_bytes = u32::from_be_bytes([c0, c1, c2, c3]) as usize;
        let kind = RunKind::ALL.into_iter().find(|known| known.number() == kind && zero == 0);
        let kind = kind.ok_or_else(|| format!("a run of kind {:#04x} {zero:#04x}", bytes[2]))?;
        let block_pages = *shape
            .block_pages
            .get(block)
            .ok_or_else(|| format!("a run of block {block}, which is not there"))?;
        let run = Self { block, kind, first_page, pages, contents_bytes };
        // Both come from 32 bits.
        let Range { start, end } = run.range();
        if pages == 0 || end > block_pages || start / CHUNK_PAGES != (end - 1) / CHUNK_PAGES {
            return Err(format!(
                "pages {start:#x}..{end:#x} are not inside one chunk of block {block} of {block_pages:#x} pages"
            ));
        }
        if shape.channel_of(block, start) != shape.index {
            return Err(format!("pages {start:#x}..{end:#x} of block {block} belong to another channel"));
        }
        let fits = match kind {
            RunKind::Zero => contents_bytes == 0,
            RunKind::Data => contents_bytes == run.length_bytes(),
            RunKind::Lz4 | RunKind::Zstd => (1..run.length_bytes()).contains(&contents_bytes),
        };
        if !fits {
            return Err(format!("{contents_bytes} bytes for {pages} pages as {kind:?}"));
        }
        Ok(run)
    }
}

/// What both ends of a channel know of guest memory before the first byte.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// Pages of each block, in the order of their names.
    pub block_pages: Vec<u64>,
    /// Which channel this is.
    pub index: usize,
    /// Of how many, at least 1.
    pub count: usize,
}

impl Shape {
    /// The channel that a page belongs to. Neighbouring chunks go different ways.
    pub fn channel_of(&self, block: usize, page: u64) -> usize {
        (block + (page / CHUNK_PAGES) as usize) % self.count
    }
}

/// Reads the table of a batch and the digests after it, whose number the head said.
pub(crate) fn decode_table<'a>(
    bytes: &'a [u8],
    head: Head,
    shape: &Shape,
    runs: &mut Vec<Run>,
) -> Result<impl Iterator<Item = u64> + use<'a>, String> {
    let Head::Pages { runs: run_count, digests, contents_bytes, .. } = head else {
        return Err("an end has no table".to_owned());
    };
    let (table, rest) =
        bytes.split_at_checked(run_count * RUN_BYTES).ok_or_else(|| "the table is cut".to_owned())?;
    runs.clear();
    let (mut pages, mut bytes) = (0, 0);
    for entry in table.as_chunks::<RUN_BYTES>().0 {
        let run = Run::decode(entry, shape)?;
        // Of 256 runs in one chunk each: far from the end of the type.
        pages += run.digests();
        bytes += run.contents_bytes;
        runs.push(run);
    }
    if (pages, bytes) != (digests, contents_bytes) {
        return Err(format!(
            "the runs have {pages} pages of {bytes} bytes, the batch {digests} of {contents_bytes}"
        ));
    }
    Ok(rest.as_chunks::<DIGEST_BYTES>().0.iter().map(|digest| u64::from_be_bytes(*digest)))
}

/// Bytes of the table and the digests after it.
pub(crate) fn table_bytes(runs: usize, digests: usize) -> usize {
    runs * RUN_BYTES + digests * DIGEST_BYTES
}

/// A digest of all that a channel says about pages; what they hold, the digests in it vouch for.
#[derive(Default)]
pub(crate) struct Chain(Hasher);

impl Chain {
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    pub fn digest(&self) -> u64 {
        self.0.finish()
    }
}
