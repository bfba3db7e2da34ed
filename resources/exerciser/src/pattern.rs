//! What blocks and pages hold: words that depend on where they are and how often they were written.
//!
//! Word 0 is the number of the block or page and word 1 its namespace and generation, to be read by a person who
//! looks at a wrong one; the others follow from a key that no other place or generation has.

use crate::random::mix;

/// In the namespace's place for pages of RAM.
const RAM: u32 = 0xffff_ffff;
/// Difference of neighbouring words: odd, so that no two words of a block are the same.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The contents of one block or page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    head: [u64; 2],
    key: u64,
    step: u64,
}

/// The first word that is not as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Its number.
    pub word: usize,
    /// What it should be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
}

impl Pattern {
    /// Zeroes.
    pub const ZERO: Self = Self { head: [0; 2], key: 0, step: 0 };

    /// Block `block` of namespace `nsid`, written for the `generation`-th time.
    pub fn block(nsid: u32, block: u64, generation: u32) -> Self {
        let head = [block, u64::from(nsid) << 32 | u64::from(generation)];
        Self { head, key: mix(head[0] ^ mix(head[1])), step: STEP }
    }

    /// Page `page` of RAM, written for the `generation`-th time.
    pub fn page(page: u64, generation: u32) -> Self {
        Self::block(RAM, page, generation)
    }

    fn word(&self, index: usize) -> u64 {
        match self.head.get(index) {
            Some(word) => *word,
            None => self.key.wrapping_add(self.step.wrapping_mul(index as u64)),
        }
    }

    /// Writes it.
    pub fn fill(&self, words: &mut [u64]) {
        let mut value = self.key;
        for word in words.iter_mut() {
            *word = value;
            value = value.wrapping_add(self.step);
        }
        for (word, head) in words.iter_mut().zip(self.head) {
            *word = head;
        }
    }

    /// Compares.
    pub fn mismatch(&self, words: &[u64]) -> Option<Mismatch> {
        let mut value = self.key;
        let mut difference = 0;
        for word in words.iter().skip(self.head.len()) {
            value = value.wrapping_add(self.step);
            difference |= *word ^ value.wrapping_add(self.step);
        }
        if difference == 0 && words.iter().zip(self.head).all(|(word, head)| *word == head) {
            return None;
        }
        words
            .iter()
            .enumerate()
            .map(|(word, found)| Mismatch { word, expected: self.word(word), found: *found })
            .find(|candidate| candidate.expected != candidate.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_matches_and_nothing_else_does() {
        let mut words = [0; 64];
        let pattern = Pattern::block(1, 7, 3);
        pattern.fill(&mut words);
        assert_eq!(pattern.mismatch(&words), None);
        for other in
            [Pattern::block(2, 7, 3), Pattern::block(1, 8, 3), Pattern::block(1, 7, 4), Pattern::page(7, 3)]
        {
            assert!(other.mismatch(&words).is_some());
        }
        assert_eq!(Pattern::ZERO.mismatch(&words), Some(Mismatch { word: 0, expected: 0, found: 7 }));
        Pattern::ZERO.fill(&mut words);
        assert_eq!(Pattern::ZERO.mismatch(&words), None);
    }

    #[test]
    fn every_changed_word_is_found() {
        let pattern = Pattern::page(5, 1);
        let mut words = [0; 512];
        pattern.fill(&mut words);
        for word in 0..512 {
            let expected = words[word];
            words[word] ^= 1 << (word % 64);
            assert_eq!(pattern.mismatch(&words), Some(Mismatch { word, expected, found: words[word] }));
            words[word] = expected;
        }
    }

    #[test]
    fn a_block_made_of_two_generations_does_not_match() {
        let mut words = [0; 64];
        Pattern::block(1, 7, 3).fill(&mut words);
        Pattern::block(1, 7, 4).fill(&mut words[..32]);
        assert_eq!(Pattern::block(1, 7, 4).mismatch(&words).unwrap().word, 32);
    }
}
