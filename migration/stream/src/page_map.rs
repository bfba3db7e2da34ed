//! Bitmaps of the pages of a block: page n is bit n % 8 of byte n / 8, in whole words of eight bytes.

use std::ops::Range;

use vmstate::Bitmap;

use crate::ram::{PAGE_BYTES, pages};

/// Bytes of the bitmap of a block of so many bytes.
pub(crate) fn bytes(block_bytes: u64) -> u64 {
    pages(block_bytes).div_ceil(64) * 8
}

/// Appends the bitmap's bytes.
pub(crate) fn save(map: &Bitmap, out: &mut Vec<u8>) {
    map.words().iter().for_each(|word| out.extend(word.to_le_bytes()));
}

/// The bitmap that the bytes are. `None` if they are too many or too few, or a bit beyond the block is set.
pub(crate) fn load(block_bytes: u64, bytes: &[u8]) -> Option<Bitmap> {
    let (words, rest) = bytes.as_chunks();
    let words = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    Bitmap::from_words(usize::try_from(pages(block_bytes)).ok()?, words).filter(|_| rest.is_empty())
}

/// The bytes of a block that lie in pages whose bit is set, as ranges that do not touch each other.
pub(crate) fn runs(map: &Bitmap) -> impl Iterator<Item = Range<u64>> {
    let words = map.words();
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = find(words, next, true)?;
        let end = find(words, start, false).unwrap_or(words.len() * 64);
        next = end;
        let at = |page: usize| page as u64 * PAGE_BYTES as u64;
        Some(at(start)..at(end))
    })
}

/// The first bit from `from` on that is as `set` says.
fn find(words: &[u64], from: usize, set: bool) -> Option<usize> {
    let mut index = from / 64;
    let mut hidden = u64::MAX << (from % 64);
    while let Some(word) = words.get(index) {
        let wanted = if set { *word } else { !*word } & hidden;
        if wanted != 0 {
            return Some(index * 64 + wanted.trailing_zeros() as usize);
        }
        (index, hidden) = (index + 1, u64::MAX);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pages: usize, set: impl IntoIterator<Item = usize>) -> Bitmap {
        let mut map = Bitmap::new(pages);
        set.into_iter().for_each(|page| map.set(page, true));
        map
    }

    #[test]
    fn page_n_is_bit_n_of_the_bytes() {
        let mut bytes = Vec::new();
        save(&map(70, [0, 9, 69]), &mut bytes);
        assert_eq!(bytes, [1, 2, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(load(70 * 4096, &bytes).unwrap(), map(70, [0, 9, 69]));
        assert_eq!(load(69 * 4096, &bytes), None, "a page beyond the block");
        assert_eq!(load(70 * 4096, &bytes[..9]), None, "half a word");
        assert_eq!(load(64 * 4096, &bytes), None, "a word too many");
    }

    #[test]
    fn runs_are_those_of_the_set_bits() {
        for pages in [1, 63, 64, 65, 130, 192] {
            for set in
                [vec![], vec![0], vec![pages - 1], (0..pages).collect(), (0..pages).step_by(3).collect()]
            {
                let map = map(pages, set.iter().copied());
                let listed: Vec<_> = runs(&map).flat_map(|run| run.step_by(PAGE_BYTES)).collect();
                let wanted: Vec<_> = set.iter().map(|page| *page as u64 * 4096).collect();
                assert_eq!(listed, wanted, "{pages} pages");
                let ends: Vec<_> = runs(&map).map(|run| run.end / 4096).collect();
                assert!(ends.iter().all(|end| !map.get(*end as usize)), "{pages} pages: {ends:?}");
            }
        }
        assert!(runs(&map(130, 60..130)).eq(std::iter::once(60 * 4096..130 * 4096)));
    }
}
