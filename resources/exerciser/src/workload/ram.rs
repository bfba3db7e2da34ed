//! RAM that is written and checked at a chosen rate.

use alloc::vec::Vec;

use crate::error::Error;
use crate::memory::{Dma, PAGE_BYTES};
use crate::pattern::Pattern;

const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// Pages at one step, so that a step does not look like a gap in time.
const STEP_PAGES: u64 = 16;
/// What is not done in time, beyond this, is not made up for.
const BACKLOG_PAGES: u64 = 64;

/// A number of pages each second.
#[derive(Debug)]
struct Pace {
    bytes_per_second: u64,
    tsc_khz: u64,
    last: u64,
    /// In bytes times kilohertz, to divide nowhere.
    credit: u64,
}

impl Pace {
    fn new(bytes_per_second: u64, tsc_khz: u64, now: u64) -> Self {
        Self { bytes_per_second, tsc_khz, last: now, credit: 0 }
    }

    /// Pages that are due.
    fn due(&mut self, now: u64) -> u64 {
        let counts = now.saturating_sub(self.last);
        self.last = now;
        let page = self.tsc_khz.saturating_mul(PAGE_BYTES as u64).max(1);
        let earned = counts.saturating_mul(self.bytes_per_second / 1000);
        self.credit = self.credit.saturating_add(earned).min(page.saturating_mul(BACKLOG_PAGES));
        let due = (self.credit / page).min(STEP_PAGES);
        self.credit -= due * page;
        due
    }
}

/// The region, and where its two walkers are.
#[derive(Debug)]
pub struct Ram {
    pages: Dma,
    generations: Vec<u32>,
    checker: usize,
    writer: usize,
    check_pace: Pace,
    write_pace: Pace,
    /// Pages compared.
    pub checked: u64,
    /// Pages rewritten.
    pub dirtied: u64,
}

impl Ram {
    /// Allocates and fills the region.
    pub fn new(length_bytes: u64, check: u64, dirty: u64, tsc_khz: u64, now: u64) -> Self {
        let mut ram = Self::within(Dma::new(length_bytes as usize), check, dirty, tsc_khz, now);
        ram.refill();
        ram
    }

    /// Takes `pages` as they are: filled, by this run or one before.
    pub fn within(pages: Dma, check: u64, dirty: u64, tsc_khz: u64, now: u64) -> Self {
        let count = pages.length_bytes() / PAGE_BYTES;
        Self {
            pages,
            generations: alloc::vec![0; count],
            checker: 0,
            writer: 0,
            check_pace: Pace::new(check, tsc_khz, now),
            write_pace: Pace::new(dirty, tsc_khz, now),
            checked: 0,
            dirtied: 0,
        }
    }

    /// Fills the region as at first.
    pub fn refill(&mut self) {
        for (page, words) in self.pages.words_mut().chunks_exact_mut(PAGE_WORDS).enumerate() {
            Pattern::page(page as u64, 0).fill(words);
        }
        self.generations.fill(0);
    }

    /// Length in bytes.
    pub fn length_bytes(&self) -> usize {
        self.pages.length_bytes()
    }

    /// Checks and rewrites what is due at the counter `now`.
    ///
    /// # Errors
    ///
    /// The first page that is wrong.
    pub fn step(&mut self, now: u64) -> Result<(), Error> {
        for _ in 0..self.check_pace.due(now) {
            self.check(self.checker)?;
            self.checker = (self.checker + 1) % self.generations.len();
        }
        for _ in 0..self.write_pace.due(now) {
            self.check(self.writer)?;
            self.rewrite(self.writer);
            self.writer = (self.writer + 1) % self.generations.len();
        }
        Ok(())
    }

    /// Checks every page.
    ///
    /// # Errors
    ///
    /// The first page that is wrong.
    pub fn check_all(&mut self) -> Result<(), Error> {
        (0..self.generations.len()).try_for_each(|page| self.check(page))
    }

    fn check(&mut self, page: usize) -> Result<(), Error> {
        let generation = self.generations[page];
        let words = &self.pages.words()[page * PAGE_WORDS..][..PAGE_WORDS];
        match Pattern::page(page as u64, generation).mismatch(words) {
            None => {
                self.checked += 1;
                Ok(())
            }
            Some(wrong) => Err(Error::Page {
                address: self.pages.address() + (page * PAGE_BYTES) as u64,
                generation,
                word: wrong.word,
                expected: wrong.expected,
                found: wrong.found,
            }),
        }
    }

    fn rewrite(&mut self, page: usize) {
        self.generations[page] = self.generations[page].wrapping_add(1);
        let words = &mut self.pages.words_mut()[page * PAGE_WORDS..][..PAGE_WORDS];
        Pattern::page(page as u64, self.generations[page]).fill(words);
        self.dirtied += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u64 = 1000;

    /// 1 MHz: a million counts a second.
    fn ram(pages: u64, check: u64, dirty: u64) -> Ram {
        Ram::new(pages * 4096, check * 4096, dirty * 4096, KHZ, 0)
    }

    #[test]
    fn the_pace_is_kept_over_many_steps() {
        let mut ram = ram(10, 1000, 250);
        for now in (0..=1_000_000).step_by(2_500) {
            ram.step(now).unwrap();
        }
        // The rate in whole bytes a millisecond loses up to one page in a thousand.
        assert!((249..=250).contains(&ram.dirtied), "{}", ram.dirtied);
        assert!((1248..=1250).contains(&ram.checked), "{}", ram.checked);
        ram.check_all().unwrap();
    }

    #[test]
    fn what_was_missed_in_a_pause_is_not_made_up_for() {
        let mut ram = ram(10, 0, 1000);
        ram.step(1_000_000_000).unwrap();
        assert_eq!(ram.dirtied, STEP_PAGES);
        for _ in 0..100 {
            ram.step(1_000_000_000).unwrap();
        }
        assert_eq!(ram.dirtied, BACKLOG_PAGES);
    }

    #[test]
    fn a_changed_page_is_found_by_both_walkers() {
        for (check, dirty) in [(1000, 0), (0, 1000)] {
            let mut ram = ram(4, check, dirty);
            ram.pages.words_mut()[3 * PAGE_WORDS + 100] ^= 1;
            let wrong = (1..100).find_map(|step| ram.step(step * 1000).err());
            let Some(Error::Page { address, word, .. }) = wrong else { panic!("{wrong:?}") };
            assert_eq!((address, word), (ram.pages.address() + 3 * 4096, 100));
            assert!(ram.check_all().is_err());
        }
    }
}
