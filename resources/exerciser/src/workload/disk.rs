//! What a namespace must hold: the generation of each block, and which blocks a command is using.

use alloc::vec::Vec;

use nvme_spec::opcode::{CDW12_PRACT, CDW12_PRCHK_GUARD, CDW12_PRCHK_REFERENCE_TAG};

use crate::error::{Error, Place};
use crate::nvme::Namespace;
use crate::pattern::Pattern;
use crate::random::Random;

/// A generation with this bit was made by Write Zeroes.
const ZEROED: u32 = 1 << 31;
/// Attempts to find blocks that no command is using.
const ATTEMPTS: usize = 8;

/// Consecutive blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First block.
    pub block: u64,
    /// Number of blocks; 0 only for commands without data.
    pub blocks: u32,
}

impl Extent {
    fn range(self) -> core::ops::Range<usize> {
        self.block as usize..(self.block + u64::from(self.blocks)) as usize
    }
}

/// The first blocks of a namespace. A block is used by one command at a time, so that the driver always knows
/// what it must hold.
#[derive(Debug)]
pub struct Disk {
    /// Namespace identifier.
    pub nsid: u32,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Type of the blocks' protection information, 0 without.
    protection: u8,
    /// Most blocks in one command.
    most_blocks: u32,
    generations: Vec<u32>,
    busy: Vec<bool>,
    /// Next block of the pass, and its end.
    cursor: u64,
    limit: u64,
}

impl Disk {
    /// The first `span_bytes` of the namespace, with transfers of at most `transfer_bytes`. At least one block.
    pub fn new(namespace: &Namespace, span_bytes: u64, transfer_bytes: u64) -> Self {
        let block_bytes = u64::from(namespace.block_bytes);
        let blocks = (span_bytes / block_bytes).clamp(1, namespace.blocks);
        let most_blocks = (transfer_bytes / block_bytes).clamp(1, blocks.min(1 << 16)) as u32;
        Self {
            nsid: namespace.nsid,
            block_bytes: namespace.block_bytes,
            protection: namespace.protection,
            most_blocks,
            generations: alloc::vec![0; blocks as usize],
            busy: alloc::vec![false; blocks as usize],
            cursor: 0,
            limit: blocks,
        }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.generations.len() as u64
    }

    /// The bytes of an extent.
    pub fn bytes(&self, extent: Extent) -> u32 {
        extent.blocks * self.block_bytes
    }

    /// CDW12 and CDW14 of a command for an extent: the controller makes the protection information of what is written, and takes it from
    /// what is read, which it checks. The reference tag of the first block is its number (NVM 5.2.1.4); no other is allowed with type 1.
    pub fn protection(&self, extent: Extent, is_read: bool) -> (u32, u32) {
        let checks = match self.protection {
            0 => return (0, 0),
            1 | 2 if is_read => CDW12_PRCHK_GUARD | CDW12_PRCHK_REFERENCE_TAG,
            // No reference tag is checked with type 3.
            _ if is_read => CDW12_PRCHK_GUARD,
            _ => 0,
        };
        (CDW12_PRACT | checks, extent.block as u32)
    }

    /// Lets the next pass begin, over the blocks that this one has handed out.
    pub fn rewind(&mut self) {
        self.limit = self.cursor;
        self.cursor = 0;
    }

    /// Whether the pass has handed out its last block.
    pub fn is_through(&self) -> bool {
        self.cursor == self.limit
    }

    /// The next extent of a pass, for one command; None at the end, or while its blocks are in use.
    pub fn advance(&mut self) -> Option<Extent> {
        let blocks = (self.limit - self.cursor).min(self.most_blocks.into()) as u32;
        let extent = Extent { block: self.cursor, blocks };
        (blocks > 0 && self.take(extent)).then(|| self.cursor += u64::from(blocks)).map(|()| extent)
    }

    /// A random extent, for one command; None when only blocks in use were hit.
    pub fn random(&mut self, random: &mut Random) -> Option<Extent> {
        (0..ATTEMPTS).find_map(|_| {
            let blocks = 1 + random.below(self.most_blocks.into());
            let block = random.below(self.blocks() - blocks + 1);
            let extent = Extent { block, blocks: blocks as u32 };
            self.take(extent).then_some(extent)
        })
    }

    /// A random extent of exactly `bytes`, aligned to that, without reserving it.
    pub fn random_aligned(&self, random: &mut Random, bytes: u32) -> Extent {
        let blocks = (bytes / self.block_bytes).clamp(1, self.most_blocks);
        let places = (self.blocks() / u64::from(blocks)).max(1);
        Extent { block: random.below(places) * u64::from(blocks), blocks }
    }

    /// Reserves an extent for one command, if none uses any of it.
    pub fn take(&mut self, extent: Extent) -> bool {
        let busy = &mut self.busy[extent.range()];
        let free = !busy.contains(&true);
        if free {
            busy.fill(true);
        }
        free
    }

    /// The command is done.
    pub fn release(&mut self, extent: Extent) {
        self.busy[extent.range()].fill(false);
    }

    /// Counts a write about to be sent, and puts what it writes into `words`.
    pub fn prepare_write(&mut self, extent: Extent, words: &mut [u64]) {
        for (block, words) in extent.range().zip(words.chunks_exact_mut(self.block_bytes as usize / 8)) {
            self.generations[block] = self.next_generation(block);
            self.pattern(block).fill(words);
        }
    }

    /// Counts a Write Zeroes about to be sent.
    pub fn prepare_zeroes(&mut self, extent: Extent) {
        for block in extent.range() {
            self.generations[block] = self.next_generation(block) | ZEROED;
        }
    }

    fn next_generation(&self, block: usize) -> u32 {
        (self.generations[block] & !ZEROED) + 1
    }

    fn pattern(&self, block: usize) -> Pattern {
        let generation = self.generations[block];
        if generation & ZEROED != 0 {
            Pattern::ZERO
        } else {
            Pattern::block(self.nsid, block as u64, generation)
        }
    }

    /// Compares what was read.
    ///
    /// # Errors
    ///
    /// The first block that is wrong.
    pub fn verify(&self, place: Place, extent: Extent, words: &[u64]) -> Result<(), Error> {
        for (block, words) in extent.range().zip(words.chunks_exact(self.block_bytes as usize / 8)) {
            if let Some(wrong) = self.pattern(block).mismatch(words) {
                return Err(Error::Block {
                    place,
                    nsid: self.nsid,
                    block: block as u64,
                    generation: self.generations[block],
                    word: wrong.word,
                    expected: wrong.expected,
                    found: wrong.found,
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place { controller: 0, queue: 1 };

    fn disk(blocks: u64) -> Disk {
        let namespace = Namespace { nsid: 7, blocks, block_bytes: 512, read_only: false, protection: 0 };
        Disk::new(&namespace, 1 << 40, 4096)
    }

    #[test]
    fn span_and_transfers_fit_the_namespace() {
        let namespace =
            Namespace { nsid: 7, blocks: 100, block_bytes: 4096, read_only: false, protection: 0 };
        assert_eq!(Disk::new(&namespace, 8192, 1 << 20).blocks(), 2);
        assert_eq!(Disk::new(&namespace, 8192, 1 << 20).most_blocks, 2);
        assert_eq!(Disk::new(&namespace, 1, 512).blocks(), 1);
        assert_eq!(Disk::new(&namespace, 1 << 40, 512).blocks(), 100);
    }

    #[test]
    fn a_pass_hands_out_every_block_once() {
        let mut disk = disk(21);
        let mut next = 0;
        while let Some(extent) = disk.advance() {
            assert_eq!(extent.block, next);
            next += u64::from(extent.blocks);
        }
        assert_eq!(next, 21);
        assert!(disk.is_through());
        disk.rewind();
        assert_eq!(disk.advance(), None, "all blocks are in use");
    }

    #[test]
    fn the_next_pass_ends_where_the_one_before_was_left() {
        let mut disk = disk(64);
        let first = disk.advance().unwrap();
        disk.release(first);
        disk.rewind();
        assert_eq!(disk.advance(), Some(first));
        assert!(disk.is_through());
        assert_eq!(disk.advance(), None);
    }

    #[test]
    fn a_block_is_used_by_one_command_at_a_time() {
        let mut disk = disk(64);
        let mut random = Random::new(1);
        let mut used = [false; 64];
        let mut extents = Vec::new();
        while let Some(extent) = disk.random(&mut random) {
            for block in extent.range() {
                assert!(!core::mem::replace(&mut used[block], true));
            }
            extents.push(extent);
        }
        assert!(extents.len() > 4);
        extents.into_iter().for_each(|extent| disk.release(extent));
        assert!(disk.random(&mut random).is_some());
    }

    #[test]
    fn what_was_written_last_is_expected() {
        let mut disk = disk(8);
        let extent = Extent { block: 2, blocks: 2 };
        let mut old = [0; 128];
        let mut new = [0; 128];
        disk.prepare_write(extent, &mut old);
        assert_eq!(disk.verify(PLACE, extent, &old), Ok(()));
        disk.prepare_write(extent, &mut new);
        assert_eq!(disk.verify(PLACE, extent, &new), Ok(()));
        let wrong = disk.verify(PLACE, extent, &old);
        assert!(
            matches!(wrong, Err(Error::Block { nsid: 7, block: 2, generation: 2, word: 1, .. })),
            "{wrong:?}"
        );

        let second = Extent { block: 3, blocks: 1 };
        disk.prepare_zeroes(second);
        assert!(matches!(disk.verify(PLACE, extent, &new), Err(Error::Block { block: 3, .. })));
        new[64..].fill(0);
        assert_eq!(disk.verify(PLACE, extent, &new), Ok(()));
        disk.prepare_write(second, &mut new[64..]);
        assert_eq!(disk.generations[3], 4, "generations never repeat");
        assert_eq!(disk.verify(PLACE, extent, &new), Ok(()));
    }

    #[test]
    fn aligned_extents_are_inside() {
        let disk = disk(21);
        let mut random = Random::new(2);
        for _ in 0..100 {
            let extent = disk.random_aligned(&mut random, 4096);
            assert!(extent.block.is_multiple_of(8) && extent.blocks == 8 && extent.block + 8 <= 21);
        }
    }
}
