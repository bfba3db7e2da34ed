//! Which pages of a RAM block.

use std::ops::Range;

use crate::PAGE_BYTES;

/// One bit for each page of a RAM block. Page n is bit n % 64 of word n / 64, as in KVM's dirty log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: u64,
}

impl PageBitmap {
    /// No page of `pages`.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; words_for(pages)], pages }
    }

    /// No page of a block of `length_bytes`; a last incomplete page counts.
    #[must_use]
    pub fn for_bytes(length_bytes: u64) -> Self {
        Self::new(length_bytes.div_ceil(PAGE_BYTES))
    }

    /// From words as KVM writes them. Missing words count as zero; bits beyond the last page are dropped.
    #[must_use]
    pub fn from_words(mut words: Vec<u64>, pages: u64) -> Self {
        words.resize(words_for(pages), 0);
        if let Some(last) = words.last_mut()
            && !pages.is_multiple_of(64)
        {
            *last &= (1 << (pages % 64)) - 1;
        }
        Self { words, pages }
    }

    /// How many pages the block has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The words, for whoever fills them in place. Bits beyond the last page must stay clear.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Adds a page; one that the block does not have is ignored.
    pub fn set(&mut self, page: u64) {
        if page < self.pages
            && let Some(word) = self.words.get_mut((page / 64) as usize)
        {
            *word |= 1 << (page % 64);
        }
    }

    /// As [`set`](Self::set); whether the page was not in it.
    pub fn insert(&mut self, page: u64) -> bool {
        let is_new = page < self.pages && !self.contains(page);
        self.set(page);
        is_new
    }

    /// Takes a page out.
    pub fn clear(&mut self, page: u64) {
        if let Some(word) = self.words.get_mut((page / 64) as usize) {
            *word &= !(1 << (page % 64));
        }
    }

    /// Adds all pages of `range`, as far as the block has them.
    pub fn set_range(&mut self, range: Range<u64>) {
        self.change(range, |word, mask| *word |= mask);
    }

    /// Takes the pages of `range` out.
    pub fn clear_range(&mut self, range: Range<u64>) {
        self.change(range, |word, mask| *word &= !mask);
    }

    /// Changes each word that has pages of `range`, by the mask of them.
    fn change(&mut self, range: Range<u64>, change: impl Fn(&mut u64, u64)) {
        let end = range.end.min(self.pages);
        let mut page = range.start;
        while page < end {
            let bit = page % 64;
            let count = (64 - bit).min(end - page);
            if let Some(word) = self.words.get_mut((page / 64) as usize) {
                change(word, (u64::MAX >> (64 - count)) << bit);
            }
            page += count;
        }
    }

    /// The words, as [`Self::from_words`] takes them.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The first run at or after `from`, of `pages_max` pages at most.
    #[must_use]
    pub fn run_from(&self, from: u64, pages_max: u64) -> Option<Range<u64>> {
        let start = self.next(from, false)?;
        let end = self.next(start, true).unwrap_or(self.pages);
        Some(start..end.min(start.saturating_add(pages_max)))
    }

    /// Adds every page that the byte range touches.
    pub fn set_bytes(&mut self, range: Range<u64>) {
        if range.start < range.end {
            self.set_range(range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES));
        }
    }

    /// Whether the page is in it.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// How many pages are in it.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds the pages of `other`, as far as this block has them.
    pub fn union(&mut self, other: &Self) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
        if other.pages > self.pages {
            *self = Self::from_words(std::mem::take(&mut self.words), self.pages);
        }
    }

    /// Takes the first `count` pages out of it.
    #[must_use]
    pub fn take_first(&mut self, mut count: u64) -> Self {
        let mut taken = Self::new(self.pages);
        for (from, into) in self.words.iter_mut().zip(&mut taken.words) {
            let available = u64::from(from.count_ones());
            if available <= count {
                *into = std::mem::take(from);
                count -= available;
            } else {
                let mut rest = *from;
                // Each step clears the lowest bit; there are more than these.
                (0..count).for_each(|_| rest &= rest.wrapping_sub(1));
                *into = *from & !rest;
                *from = rest;
                break;
            }
        }
        taken
    }

    /// The runs of consecutive pages, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = self.next(from, false)?;
            let end = self.next(start, true).unwrap_or(self.pages);
            from = end;
            Some(start..end)
        })
    }

    /// The first page at or after `from` that is in it (or, `inverted`, is not).
    fn next(&self, from: u64, inverted: bool) -> Option<u64> {
        if from >= self.pages {
            return None;
        }
        let flip = if inverted { u64::MAX } else { 0 };
        let first = (from / 64) as usize;
        let mut mask = u64::MAX << (from % 64);
        for (index, word) in self.words.iter().enumerate().skip(first) {
            let bits = (word ^ flip) & mask;
            if bits != 0 {
                let page = index as u64 * 64 + u64::from(bits.trailing_zeros());
                return (page < self.pages).then_some(page);
            }
            mask = u64::MAX;
        }
        None
    }
}

fn words_for(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(64)).expect("a block's bitmap is smaller than the block, which is mapped")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_give_back_what_was_set() {
        let ranges = [0..1, 3..64, 65..66, 127..130, 192..256, 299..300];
        let mut bitmap = PageBitmap::new(300);
        for range in &ranges {
            bitmap.set_range(range.clone());
        }
        assert_eq!(bitmap.runs().collect::<Vec<_>>(), ranges);
        assert_eq!(bitmap.count(), ranges.iter().map(|r| r.end - r.start).sum::<u64>());
        for page in 0..310 {
            assert_eq!(bitmap.contains(page), ranges.iter().any(|r| r.contains(&page)), "{page}");
        }
        let mut single = PageBitmap::new(300);
        ranges.iter().cloned().flatten().for_each(|page| single.set(page));
        assert_eq!(single, bitmap);
        assert_eq!(PageBitmap::from_words(bitmap.words().to_vec(), 300), bitmap);
        assert_eq!((bitmap.run_from(4, 10), bitmap.run_from(290, 10)), (Some(4..14), Some(299..300)));
        assert_eq!((bitmap.run_from(64, 10), bitmap.run_from(300, 10)), (Some(65..66), None));
        (0..1000).filter(|page| *page != 129).for_each(|page| single.clear(page));
        assert!(single.runs().eq(std::iter::once(129..130)));
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "one run is what is expected")]
    fn pages_that_the_block_does_not_have_never_appear() {
        let mut bitmap = PageBitmap::new(70);
        assert!(!bitmap.insert(70) && bitmap.count() == 0);
        bitmap.set(70);
        bitmap.set_range(60..1000);
        bitmap.set_range(1000..2000);
        assert!(bitmap.runs().eq([60..70]));
        assert_eq!(PageBitmap::from_words(vec![u64::MAX; 9], 70).count(), 70);
        let mut small = PageBitmap::new(65);
        small.union(&PageBitmap::from_words(vec![u64::MAX; 2], 128));
        assert_eq!(small.count(), 65);
        assert_eq!(PageBitmap::new(0).runs().next(), None);
    }

    #[test]
    fn the_first_pages_are_taken_and_the_others_stay() {
        let mut all = PageBitmap::new(300);
        [0..1, 3..64, 65..66, 127..130, 192..256, 299..300]
            .into_iter()
            .for_each(|range| all.set_range(range));
        let pages: Vec<u64> = all.runs().flatten().collect();
        for count in 0..=pages.len() + 1 {
            let mut rest = all.clone();
            let taken = rest.take_first(count as u64);
            let split = count.min(pages.len());
            assert_eq!(taken.runs().flatten().collect::<Vec<_>>(), pages[..split]);
            assert_eq!(rest.runs().flatten().collect::<Vec<_>>(), pages[split..]);
        }
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "one run is what is expected")]
    fn bytes_touch_whole_pages() {
        let mut bitmap = PageBitmap::for_bytes(4 * PAGE_BYTES + 1);
        assert_eq!(bitmap.pages(), 5);
        bitmap.set_bytes(4095..4097);
        bitmap.set_bytes(8192..8192);
        assert!(bitmap.runs().eq([0..2]));
    }
}
