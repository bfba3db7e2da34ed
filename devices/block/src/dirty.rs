//! Which blocks of an image have changed, for whoever copies it while a guest writes.
//!
//! Who copies takes the bits first and reads blocks afterwards. Who changes an image does it the other way round: *first the image is
//! as it will be, then the bit is set*, and only then the guest hears of it. So for a block that is changed and read at the same time:
//!
//! - The bit is taken before it is set: what was read may be old or torn, and the bit is set for the next look.
//! - The bit is set before it is taken: the change was there before, so what is read afterwards is what it is.
//!
//! A request that is under way when tracking begins sets its bit at its end, which is after the beginning; one that has ended before was
//! complete before the first read. A bit that is set too often costs a block that is sent twice, and nothing is ever lost. The last
//! look comes when no request is in flight any more: then every bit is set that ever will be.
//!
//! All of what a request was for counts, whatever came of it: a write that failed may have arrived in part. Reads set nothing.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use arc_swap::ArcSwapOption;

/// What one bit stands for.
pub const DIRTY_BLOCK_BYTES: u64 = 64 << 10;

/// The bits of one image. While nobody tracks, they cost a change one load of a flag that nobody writes.
#[derive(Debug, Default)]
pub struct DirtyBlocks {
    is_armed: AtomicBool,
    words: ArcSwapOption<Vec<AtomicU64>>,
}

impl DirtyBlocks {
    /// From here on changes set bits; none is set.
    pub fn arm(&self, capacity_bytes: u64) {
        let words = capacity_bytes.div_ceil(DIRTY_BLOCK_BYTES).div_ceil(64);
        let words = (0..words).map(|_| AtomicU64::new(0)).collect();
        self.words.store(Some(Arc::new(words)));
        self.is_armed.store(true, Ordering::SeqCst);
        // Before the first read of whoever armed it: a request whose end does not see the flag has changed the image before.
        fence(Ordering::SeqCst);
    }

    /// Nobody tracks any more.
    pub fn disarm(&self) {
        self.is_armed.store(false, Ordering::SeqCst);
        self.words.store(None);
    }

    /// Takes all bits: block n is bit n % 64 of word n / 64. `None`: nobody has [armed](Self::arm) it.
    #[must_use]
    pub fn take(&self) -> Option<Vec<u64>> {
        let words = self.words.load_full()?;
        // Acquire: what was changed before a bit was set is seen by whoever reads next.
        let take = |word: &AtomicU64| match word.load(Ordering::Relaxed) {
            0 => 0,
            _ => word.swap(0, Ordering::AcqRel),
        };
        Some(words.iter().map(take).collect())
    }

    /// This range of the image has changed, or may have.
    #[inline]
    pub(crate) fn note(&self, range: Range<u64>) {
        if self.is_armed.load(Ordering::Relaxed) {
            self.set(range);
        }
    }

    #[cold]
    fn set(&self, range: Range<u64>) {
        // With the store of the flag: the words are there.
        fence(Ordering::Acquire);
        let words = self.words.load();
        let Some(words) = words.as_deref().filter(|_| range.start < range.end) else { return };
        let (first, last) = (range.start / DIRTY_BLOCK_BYTES, (range.end - 1) / DIRTY_BLOCK_BYTES);
        // What lies beyond cannot be: requests are inside of the capacity.
        let words = words.get((first / 64) as usize..).unwrap_or_default();
        for (word, bits) in (first / 64..=last / 64).zip(words) {
            let (from, to) = (first.max(word * 64) % 64, last.min(word * 64 + 63) % 64);
            bits.fetch_or((u64::MAX >> (63 - (to - from))) << from, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = DIRTY_BLOCK_BYTES;

    #[test]
    fn the_blocks_of_a_range_are_set_and_taken_once() {
        let dirty = DirtyBlocks::default();
        dirty.note(0..BLOCK);
        assert_eq!(dirty.take(), None, "nobody tracks");
        dirty.arm(200 * BLOCK + 1);
        assert_eq!(dirty.take(), Some(vec![0; 4]));
        dirty.note(5..6);
        dirty.note(63 * BLOCK + 7..64 * BLOCK + 1);
        dirty.note(130 * BLOCK..131 * BLOCK);
        dirty.note(200 * BLOCK..200 * BLOCK + 1);
        dirty.note(BLOCK..BLOCK);
        assert_eq!(dirty.take(), Some(vec![1 | 1 << 63, 1, 1 << 2, 1 << 8]));
        dirty.note(0..192 * BLOCK);
        assert_eq!(dirty.take(), Some(vec![u64::MAX, u64::MAX, u64::MAX, 0]));
        dirty.note(0..u64::MAX);
        dirty.disarm();
        dirty.note(0..BLOCK);
        assert_eq!(dirty.take(), None);
        dirty.arm(BLOCK);
        assert_eq!(dirty.take(), Some(vec![0]), "begins anew");
    }
}
