//! Sets of pages that are on their way, without any I/O.

use std::ops::Range;

use crate::PageBitmap;

/// Pages of each block: what one side still has to send, or what the other has not got yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PageSets {
    blocks: Vec<PageBitmap>,
    count: u64,
    /// Where [`Self::take_next`] goes on: block and page.
    cursor: (usize, u64),
}

impl PageSets {
    /// The pages of `blocks`.
    pub fn new(blocks: Vec<PageBitmap>) -> Self {
        let count = blocks.iter().map(PageBitmap::count).sum();
        Self { blocks, count, cursor: (0, 0) }
    }

    /// No pages, of blocks with so many.
    pub fn none(pages: impl Iterator<Item = u64>) -> Self {
        Self::new(pages.map(PageBitmap::new).collect())
    }

    /// How many pages there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// By block.
    pub fn bitmaps(&self) -> &[PageBitmap] {
        &self.blocks
    }

    /// How many pages the block has, in the set or not.
    pub fn pages_of(&self, block: usize) -> Option<u64> {
        self.blocks.get(block).map(PageBitmap::pages)
    }

    /// Whether a page is in it.
    #[cfg(test)]
    pub fn contains(&self, block: usize, page: u64) -> bool {
        self.blocks.get(block).is_some_and(|pages| pages.contains(page))
    }

    /// The runs of `range` that are in it.
    pub fn within(&self, block: usize, range: Range<u64>) -> Vec<Range<u64>> {
        let (mut runs, mut from) = (Vec::new(), range.start);
        while let Some(run) = self.blocks.get(block).and_then(|pages| pages.run_from(from, u64::MAX))
            && run.start < range.end
        {
            from = run.end;
            runs.push(run.start..run.end.min(range.end));
        }
        runs
    }

    fn count_within(&self, block: usize, range: Range<u64>) -> u64 {
        self.within(block, range).into_iter().map(|run| run.end - run.start).sum()
    }

    /// Adds pages, as far as the block has them.
    pub fn add(&mut self, block: usize, range: Range<u64>) {
        let Some(pages) = self.pages_of(block) else { return };
        let range = range.start.min(pages)..range.end.min(pages);
        let there = self.count_within(block, range.clone());
        self.count += range.end - range.start - there;
        if let Some(pages) = self.blocks.get_mut(block) {
            pages.set_range(range);
        }
    }

    /// Takes pages out; how many there were.
    pub fn remove(&mut self, block: usize, range: Range<u64>) -> u64 {
        let removed = self.count_within(block, range.clone());
        if let Some(pages) = self.blocks.get_mut(block) {
            pages.clear_range(range);
        }
        self.count -= removed;
        removed
    }

    /// Takes out the next run, of `pages_max` pages at most: after the last one, or where [`Self::go_on_from`] said.
    pub fn take_next(&mut self, pages_max: u64) -> Option<(usize, Range<u64>)> {
        let (first, page) = self.cursor;
        // The block of the cursor comes twice: from there on, and as far as there in the end.
        let blocks = self.blocks.len();
        let found = (first..=first + blocks).find_map(|index| {
            let block = index % blocks.max(1);
            let from = if index == first { page } else { 0 };
            self.blocks.get(block)?.run_from(from, pages_max).map(|run| (block, run))
        });
        let (block, run) = found?;
        self.cursor = (block, run.end);
        self.remove(block, run.clone());
        Some((block, run))
    }

    /// What is next to a page that somebody has touched will be touched soon.
    pub fn go_on_from(&mut self, block: usize, page: u64) {
        self.cursor = (block, page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_taken_once_and_those_near_a_touched_one_first() {
        let mut sets = PageSets::none([0, 200, 70].into_iter());
        sets.add(1, 10..100);
        sets.add(1, 50..120);
        sets.add(2, 0..70);
        assert_eq!(sets.count(), 180);
        assert_eq!(sets.take_next(64), Some((1, 10..74)));
        sets.go_on_from(2, 60);
        assert_eq!(sets.remove(1, 80..90), 10);
        assert_eq!(sets.remove(1, 85..95), 5);
        let rest: Vec<_> = std::iter::from_fn(|| sets.take_next(64)).collect();
        assert_eq!(rest, [(2, 60..70), (1, 74..80), (1, 95..120), (2, 0..60)]);
        assert_eq!((sets.count(), sets.take_next(64)), (0, None));
        assert_eq!(PageSets::none(std::iter::empty()).take_next(64), None);
    }

    #[test]
    fn runs_within_a_range_are_cut_at_its_ends() {
        let mut sets = PageSets::none([300].into_iter());
        sets.add(0, 10..20);
        sets.add(0, 64..200);
        assert_eq!(sets.within(0, 15..100), [15..20, 64..100]);
        assert_eq!(sets.within(0, 20..64), []);
        assert_eq!(sets.within(1, 0..1), []);
    }
}
