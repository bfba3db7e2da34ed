//! A run of blocks as bytes.
//!
//! ```text
//! be16 image, kind, 0, be32 0, be64 first byte, be64 bytes, be64 digest of the contents, contents (or none: zeroes)
//! ```

use std::ops::Range;

use twox_hash::XxHash3_64;

use super::{BLOCK_BYTES, CHUNK_BYTES, Disk};

/// Before the contents.
pub(super) const HEAD_BYTES: usize = 32;
/// The longest contents.
pub(super) const CONTENTS_BYTES_MAX: usize = 512 << 10;
/// The longest run of zeroes: each chunk of it costs the receiver a moment.
pub(super) const ZEROES_BYTES_MAX: u64 = 1 << 30;
/// Of a frame.
pub(crate) const BLOCKS_BYTES_MAX: usize = HEAD_BYTES + CONTENTS_BYTES_MAX;

const DATA: u8 = 0;
const ZEROES: u8 = 1;

/// What a run is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Its contents follow, all in one chunk.
    Data,
    /// Nothing follows.
    Zeroes,
}

/// Blocks that follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub disk: u16,
    pub kind: Kind,
    pub range: Range<u64>,
    /// Of the contents; 0 without.
    pub digest: u64,
}

impl Run {
    /// Zeroes.
    pub fn zeroes(disk: u16, range: Range<u64>) -> Self {
        Self { disk, kind: Kind::Zeroes, range, digest: 0 }
    }

    /// These contents, at this place.
    pub fn data(disk: u16, offset_bytes: u64, contents: &[u8]) -> Self {
        let range = offset_bytes..offset_bytes + contents.len() as u64;
        Self { disk, kind: Kind::Data, range, digest: XxHash3_64::oneshot(contents) }
    }

    /// The blocks that it is of.
    pub fn blocks(&self) -> Range<u64> {
        self.range.start / BLOCK_BYTES..self.range.end.div_ceil(BLOCK_BYTES)
    }

    pub fn length_bytes(&self) -> u64 {
        self.range.end - self.range.start
    }

    pub fn encode(&self) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        bytes[..2].copy_from_slice(&self.disk.to_be_bytes());
        bytes[2] = if self.kind == Kind::Data { DATA } else { ZEROES };
        bytes[8..16].copy_from_slice(&self.range.start.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.length_bytes().to_be_bytes());
        bytes[24..].copy_from_slice(&self.digest.to_be_bytes());
        bytes
    }

    /// A run that can be of one of `disks`, and its contents, which are what the sender saw.
    pub fn decode<'a>(body: &'a [u8], disks: &[Disk]) -> Result<(Self, &'a [u8]), String> {
        let (head, contents) = body
            .split_first_chunk::<HEAD_BYTES>()
            .ok_or_else(|| format!("{} bytes are no run of blocks", body.len()))?;
        let [d0, d1, kind, zero, z0, z1, z2, z3, numbers @ ..] = *head;
        let (numbers, _none_left) = numbers.as_chunks::<8>();
        let [offset, length, digest] = *numbers else { return Err("a head is cut".to_owned()) };
        let [offset, length_bytes, digest] = [offset, length, digest].map(u64::from_be_bytes);
        let disk = u16::from_be_bytes([d0, d1]);
        let Disk { name, length_bytes: image_bytes, .. } = disks
            .get(usize::from(disk))
            .ok_or_else(|| format!("blocks of image {disk}, where {} come", disks.len()))?;
        if [zero, z0, z1, z2, z3] != [0; 5] {
            return Err(format!("blocks of image {name} with an unknown head"));
        }
        let end = offset.checked_add(length_bytes).filter(|end| end <= image_bytes && offset < *end);
        let end = end.ok_or_else(|| {
            format!("{length_bytes} bytes at {offset:#x} are not inside image {name} of {image_bytes} bytes")
        })?;
        if !offset.is_multiple_of(BLOCK_BYTES) || (!end.is_multiple_of(BLOCK_BYTES) && end != *image_bytes) {
            return Err(format!("bytes {offset:#x}..{end:#x} of image {name} are no whole blocks"));
        }
        let kind = match kind {
            DATA if contents.len() as u64 != length_bytes => {
                return Err(format!("{} bytes came for {length_bytes} of image {name}", contents.len()));
            }
            DATA if offset / CHUNK_BYTES != (end - 1) / CHUNK_BYTES => {
                return Err(format!("bytes {offset:#x}..{end:#x} of image {name} are not in one chunk"));
            }
            DATA if digest != XxHash3_64::oneshot(contents) => {
                return Err(format!("bytes {offset:#x}..{end:#x} of image {name} are not what was sent"));
            }
            DATA => Kind::Data,
            ZEROES if !contents.is_empty() || digest != 0 => {
                return Err(format!("zeroes of image {name} with contents"));
            }
            ZEROES if length_bytes > ZEROES_BYTES_MAX => {
                return Err(format!("{length_bytes} bytes of zeroes of image {name} in one run"));
            }
            ZEROES => Kind::Zeroes,
            kind => return Err(format!("blocks of kind {kind} of image {name}")),
        };
        Ok((Self { disk, kind, range: offset..end, digest }, contents))
    }
}

/// What was said about each chunk of each image, in the order in which it was said.
pub(super) struct DigestTable {
    chunks: Vec<Vec<u64>>,
    /// Of all entries, kept as they change: at the end nothing is left to do.
    digest: u64,
}

impl DigestTable {
    pub fn new(disks: &[Disk]) -> Self {
        let chunks = |disk: &Disk| vec![0; disk.length_bytes.div_ceil(CHUNK_BYTES) as usize];
        Self { chunks: disks.iter().map(chunks).collect(), digest: 0 }
    }

    /// Adds a run that was sent, or placed.
    pub fn add(&mut self, run: &Run) {
        let Some(chunks) = self.chunks.get_mut(usize::from(run.disk)) else { return };
        let head = run.encode();
        for chunk in run.range.start / CHUNK_BYTES..run.range.end.div_ceil(CHUNK_BYTES) {
            let Some(entry) = chunks.get_mut(chunk as usize) else { return };
            // Of entries in any order, each known by its place.
            let place = u64::from(run.disk) << 48 | chunk;
            let weight = |entry: u64| XxHash3_64::oneshot_with_seed(place, &entry.to_le_bytes());
            self.digest ^= weight(*entry);
            *entry = XxHash3_64::oneshot_with_seed(*entry, &head);
            self.digest ^= weight(*entry);
        }
    }

    /// Of all of it.
    pub fn digest(&self) -> u64 {
        self.digest
    }
}

#[cfg(test)]
mod tests {
    use proptest::strategy::Strategy as _;

    use super::*;

    fn disks() -> Vec<Disk> {
        let disk =
            |name: &str, length_bytes| Disk { name: name.to_owned(), length_bytes, format: "raw".to_owned() };
        vec![disk("a", 3 * CHUNK_BYTES), disk("b", BLOCK_BYTES + 512), disk("c", 2 * ZEROES_BYTES_MAX)]
    }

    fn message(run: &Run, contents: &[u8]) -> Vec<u8> {
        [run.encode().as_slice(), contents].concat()
    }

    #[test]
    fn runs_that_can_be_survive() {
        let contents = vec![7; 2 * BLOCK_BYTES as usize];
        let last = [9; 512];
        for (run, contents) in [
            (Run::data(0, CHUNK_BYTES, &contents), contents.as_slice()),
            (Run::data(1, BLOCK_BYTES, &last), &last),
            (Run::zeroes(0, 0..3 * CHUNK_BYTES), &[]),
            (Run::zeroes(1, 0..BLOCK_BYTES), &[]),
            (Run::zeroes(1, BLOCK_BYTES..BLOCK_BYTES + 512), &[]),
        ] {
            let bytes = message(&run, contents);
            assert_eq!(Run::decode(&bytes, &disks()), Ok((run, contents)));
        }
    }

    #[test]
    fn runs_that_cannot_be_are_refused() {
        let block = vec![7; BLOCK_BYTES as usize];
        let good = Run::data(0, 0, &block);
        let with = |change: &dyn Fn(&mut Run)| {
            let mut run = good.clone();
            change(&mut run);
            run
        };
        let two = vec![7; 2 * BLOCK_BYTES as usize];
        for (run, contents, reason) in [
            (with(&|run| run.disk = 3), block.as_slice(), "image 3, where 3 come"),
            (with(&|run| run.range = 512..BLOCK_BYTES + 512), &block, "no whole blocks"),
            (with(&|run| run.range.end = 512), &block[..512], "no whole blocks"),
            (with(&|run| run.range.end = 0), &[], "not inside"),
            (with(&|run| run.range = u64::MAX - 5..u64::MAX), &block[..5], "not inside"),
            (with(&|run| run.range.end = 4 * CHUNK_BYTES), &block, "not inside"),
            (Run::data(1, BLOCK_BYTES, &block), &block, "not inside"),
            (with(&|run| run.range.end = 2 * BLOCK_BYTES), &block, "65536 bytes came for 131072"),
            (Run::data(0, CHUNK_BYTES - BLOCK_BYTES, &two), &two, "not in one chunk"),
            (with(&|run| run.digest ^= 1), &block, "not what was sent"),
            (with(&|run| run.kind = Kind::Zeroes), &block, "with contents"),
            (with(&|run| run.kind = Kind::Zeroes), &[], "with contents"),
            (Run::zeroes(2, 0..2 * ZEROES_BYTES_MAX), &[], "bytes of zeroes"),
        ] {
            let error = Run::decode(&message(&run, contents), &disks()).unwrap_err();
            assert!(error.contains(reason), "{run:?}: {error}");
        }
        let whole = message(&good, &block);
        for cut in (0..HEAD_BYTES).chain([HEAD_BYTES, whole.len() - 1]) {
            assert!(Run::decode(&whole[..cut], &disks()).is_err(), "cut at {cut}");
        }
        for byte in 2..8 {
            let mut other = whole.clone();
            other[byte] = 9;
            assert!(Run::decode(&other, &disks()).is_err(), "byte {byte}");
        }
    }

    #[test]
    fn the_table_knows_what_was_said_where_and_in_which_order() {
        let digest = |runs: &[Run]| {
            let mut table = DigestTable::new(&disks());
            runs.iter().for_each(|run| table.add(run));
            table.digest()
        };
        let zeroes = Run::zeroes(0, 0..3 * CHUNK_BYTES);
        let [one, other] = [1, 2].map(|byte| Run::data(0, CHUNK_BYTES, &[byte; 65_536]));
        let elsewhere = Run::data(0, 0, &[1; 65_536]);
        let all = [
            digest(&[]),
            digest(std::slice::from_ref(&zeroes)),
            digest(&[zeroes.clone(), one.clone()]),
            digest(&[zeroes.clone(), other.clone()]),
            digest(&[zeroes.clone(), elsewhere.clone()]),
            digest(&[zeroes.clone(), one.clone(), other.clone()]),
            digest(&[zeroes.clone(), other.clone(), one.clone()]),
        ];
        for (index, digest) in all.iter().enumerate() {
            assert!(!all[..index].contains(digest), "{index}");
        }
        // Chunks are apart: their order is nobody's.
        assert_eq!(digest(&[one.clone(), elsewhere.clone()]), digest(&[elsewhere, one]));
    }

    proptest::proptest! {
        /// Whatever a head says, what is accepted lies inside of its image, and costs the table a bounded while.
        #[test]
        fn what_is_accepted_is_inside_of_the_image(
            disk in 0..5_u16,
            kind in 0..3_u8,
            offset in proptest::prop_oneof![(0..70_000_u64).prop_map(|block| block * BLOCK_BYTES), proptest::num::u64::ANY],
            length in proptest::prop_oneof![(0..20_u64).prop_map(|block| block * BLOCK_BYTES), proptest::num::u64::ANY],
            contents in proptest::collection::vec(proptest::num::u8::ANY, 0..1024),
        ) {
            let end = offset.saturating_add(length);
            let digest = if kind == DATA { XxHash3_64::oneshot(&contents) } else { 0 };
            let run = Run { disk, kind: Kind::Data, range: offset..end, digest };
            let mut head = run.encode();
            head[2] = kind;
            let disks = disks();
            for body in [head.to_vec(), [head.as_slice(), &contents].concat()] {
                if let Ok((run, contents)) = Run::decode(&body, &disks) {
                    let image_bytes = disks[usize::from(run.disk)].length_bytes;
                    proptest::prop_assert!(run.range.start < run.range.end && run.range.end <= image_bytes);
                    proptest::prop_assert!(run.blocks().end <= disks[usize::from(run.disk)].blocks());
                    proptest::prop_assert!(run.kind == Kind::Zeroes || contents.len() as u64 == run.length_bytes());
                    proptest::prop_assert!(run.length_bytes() <= ZEROES_BYTES_MAX);
                    DigestTable::new(&disks).add(&run);
                }
            }
        }
    }
}
