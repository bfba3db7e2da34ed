//! Pages of guest memory that this process wrote: what [`vm_memory`] marks whenever a device model writes, and a migration takes, round
//! after round and once more while the guest stands still.
//!
//! Two levels: a bit for each page, and a bit for each word of those. Whoever takes looks only where something is, so that the last look
//! at a large guest costs the guest no more than at a small one; and whoever marks touches each word once, whatever the number of its pages.
//!
//! Invariants: a page that is marked is in what is taken next, or, if it or another page of its word is marked meanwhile, in what is
//! taken after that has come to its end; this holds for every write that was made before it was marked. When nobody marks any more, one
//! look takes all.
//!
//! Absent: what vCPUs write, which KVM tells; and pages of other sizes.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

/// Of a page.
const PAGE_BYTES: usize = 4096;
/// Bits of a word.
const BITS: usize = u64::BITS as usize;

/// One bit for each page of a region. Page n is bit n % 64 of word n / 64, as in KVM's dirty log.
#[derive(Debug, Default)]
pub struct DirtyBitmap {
    pages: usize,
    words: Box<[AtomicU64]>,
    /// One bit for each word that holds something. It is set after a bit of the word, and cleared before: so a bit of a word never stays
    /// behind without it, once everybody who marks has come to the end.
    filled: Box<[AtomicU64]>,
}

impl DirtyBitmap {
    /// Adds what is marked to `words`, which are as many as the region has, and clears it. Words that are missing lose theirs.
    pub fn take_into(&self, words: &mut [u64]) {
        self.take(|index, taken| {
            if let Some(word) = words.get_mut(index) {
                *word |= taken;
            }
        });
    }

    /// What is marked, which is cleared.
    #[must_use]
    pub fn get_and_reset(&self) -> Vec<u64> {
        let mut words = vec![0; self.words.len()];
        self.take_into(&mut words);
        words
    }

    /// Clears all.
    pub fn reset(&self) {
        self.take(|_, _| ());
    }

    fn take(&self, mut each: impl FnMut(usize, u64)) {
        for (group, filled) in self.filled.iter().enumerate() {
            // A look costs nothing where nobody marks; whoever marks now is found by the next one.
            if filled.load(Ordering::Acquire) == 0 {
                continue;
            }
            let mut rest = filled.swap(0, Ordering::SeqCst);
            while rest != 0 {
                let index = group * BITS + rest.trailing_zeros() as usize;
                rest &= rest - 1;
                if let Some(word) = self.words.get(index) {
                    each(index, word.swap(0, Ordering::SeqCst));
                }
            }
        }
    }
}

impl Bitmap for DirtyBitmap {
    /// Marks every page that the bytes touch; those beyond the end are ignored. It is a full barrier, so that whoever takes the mark also
    /// sees what was written before.
    fn mark_dirty(&self, offset: usize, length: usize) {
        if length == 0 {
            return;
        }
        let end = (offset.saturating_add(length - 1) / PAGE_BYTES).saturating_add(1).min(self.pages);
        let mut page = offset / PAGE_BYTES;
        while page < end {
            let (index, bit) = (page / BITS, page % BITS);
            let count = (BITS - bit).min(end - page);
            let mask = (u64::MAX >> (BITS - count)) << bit;
            page += count;
            let Some(word) = self.words.get(index) else { return };
            let before = word.fetch_or(mask, Ordering::SeqCst);
            // Whoever set the bits that are there says so, or has.
            if mask & !before != 0
                && let Some(filled) = self.filled.get(index / BITS)
            {
                filled.fetch_or(1 << (index % BITS), Ordering::SeqCst);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_BYTES;
        let word = self.words.get(page / BITS).filter(|_| page < self.pages);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (page % BITS) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyBitmap {
    type S = RefSlice<'a, Self>;
}

impl NewBitmap for DirtyBitmap {
    /// For a region of `length` bytes; a last incomplete page counts.
    fn with_len(length: usize) -> Self {
        let pages = length.div_ceil(PAGE_BYTES);
        let words = pages.div_ceil(BITS);
        let clear = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect();
        Self { pages, words: clear(words), filled: clear(words.div_ceil(BITS)) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::atomic::AtomicBool;

    use proptest::prelude::*;

    use super::*;

    const PAGES: usize = 3 * BITS * BITS + 70;

    fn pages(words: &[u64]) -> BTreeSet<usize> {
        (0..words.len() * BITS).filter(|page| words[page / BITS] >> (page % BITS) & 1 == 1).collect()
    }

    #[test]
    fn what_is_beyond_the_end_is_ignored() {
        let bitmap = DirtyBitmap::with_len(PAGES * PAGE_BYTES - 1);
        bitmap.mark_dirty(PAGES * PAGE_BYTES, 1);
        bitmap.mark_dirty(usize::MAX - 1, usize::MAX);
        bitmap.mark_dirty(0, 0);
        assert_eq!(pages(&bitmap.get_and_reset()), BTreeSet::new());
        bitmap.mark_dirty((PAGES - 1) * PAGE_BYTES, usize::MAX);
        assert!(bitmap.dirty_at((PAGES - 1) * PAGE_BYTES) && !bitmap.dirty_at(PAGES * PAGE_BYTES));
        assert_eq!(pages(&bitmap.get_and_reset()), BTreeSet::from([PAGES - 1]));
        DirtyBitmap::default().mark_dirty(0, 1);
    }

    #[test]
    fn a_slice_marks_where_it_begins() {
        let bitmap = DirtyBitmap::with_len(PAGES * PAGE_BYTES);
        bitmap.slice_at(5 * PAGE_BYTES).slice_at(2 * PAGE_BYTES - 1).mark_dirty(0, 2);
        assert_eq!(pages(&bitmap.get_and_reset()), BTreeSet::from([6, 7]));
    }

    #[test]
    fn what_is_taken_is_added_to_what_is_there() {
        let bitmap = DirtyBitmap::with_len(2 * BITS * PAGE_BYTES);
        bitmap.mark_dirty(0, 1);
        bitmap.mark_dirty(BITS * PAGE_BYTES, 1);
        let mut words = [0b10];
        bitmap.take_into(&mut words);
        assert_eq!(words, [0b11]);
        assert_eq!(bitmap.get_and_reset(), [0, 0], "what there was no room for is gone as well");
    }

    proptest! {
        #[test]
        fn every_page_of_every_write_is_taken_once(
            writes in prop::collection::vec((0..PAGES * PAGE_BYTES, 0..200 * PAGE_BYTES), 0..20)
        ) {
            let bitmap = DirtyBitmap::with_len(PAGES * PAGE_BYTES);
            let mut expected = BTreeSet::new();
            for (offset, length) in writes {
                bitmap.mark_dirty(offset, length);
                expected.extend((0..length).step_by(PAGE_BYTES).map(|byte| (offset + byte) / PAGE_BYTES));
                expected.extend(length.checked_sub(1).map(|last| (offset + last) / PAGE_BYTES));
            }
            expected.retain(|page| *page < PAGES);
            prop_assert!((0..PAGES).all(|page| bitmap.dirty_at(page * PAGE_BYTES) == expected.contains(&page)));
            prop_assert_eq!(pages(&bitmap.get_and_reset()), expected);
            prop_assert_eq!(pages(&bitmap.get_and_reset()), BTreeSet::new());
            bitmap.mark_dirty(0, PAGES * PAGE_BYTES);
            bitmap.reset();
            prop_assert_eq!(pages(&bitmap.get_and_reset()), BTreeSet::new());
        }
    }

    /// Each page has a counter that a thread raises before it marks the page; who takes notes what it then reads. In the end it has
    /// read the last value of each.
    #[test]
    fn no_write_is_lost_beside_somebody_who_takes() {
        const ROUNDS: u64 = 3000;
        let bitmap = DirtyBitmap::with_len(PAGES * PAGE_BYTES);
        let counters: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        let mut seen = vec![0; PAGES];
        let ended = AtomicBool::new(false);
        let mut take = |bitmap: &DirtyBitmap| {
            for page in pages(&bitmap.get_and_reset()) {
                seen[page] = counters[page].load(Ordering::Relaxed);
            }
        };
        std::thread::scope(|scope| {
            let write = |thread: usize| {
                for round in 0..ROUNDS {
                    // Pages that both write to, of few words.
                    let page = (round as usize * 7 + thread) % 130;
                    counters[page].fetch_add(1, Ordering::Relaxed);
                    bitmap.mark_dirty(page * PAGE_BYTES, 1);
                }
            };
            let writers = [0, 1].map(|thread| scope.spawn(move || write(thread)));
            scope.spawn(|| {
                writers.into_iter().for_each(|writer| writer.join().unwrap());
                ended.store(true, Ordering::SeqCst);
            });
            while !ended.load(Ordering::SeqCst) {
                take(&bitmap);
            }
        });
        take(&bitmap);
        let written: Vec<_> = counters.iter().map(|counter| counter.load(Ordering::Relaxed)).collect();
        assert_eq!(seen, written);
        assert_eq!(written.iter().sum::<u64>(), 2 * ROUNDS);
    }
}
