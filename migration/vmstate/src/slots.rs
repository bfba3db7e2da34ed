//! Sparse arrays of owned elements, and bitmaps.

/// A sparse array: a fixed number of slots, each empty or owning one element.
///
/// Queues and namespaces of a controller live in such arrays: the slot is the identity (queue 3, namespace 7), and holes are
/// meaningful.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots<T>(Box<[Option<Box<T>>]>);

impl<T> Slots<T> {
    /// `count` empty slots.
    pub fn empty(count: usize) -> Self {
        (0..count).map(|_| None).collect()
    }

    /// The slots as they have been loaded.
    pub(crate) fn from_boxes(slots: Vec<Option<Box<T>>>) -> Self {
        Slots(slots.into_boxed_slice())
    }

    /// The number of slots, empty ones included.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is not even an empty slot.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The element in a slot; `None` if the slot is empty or does not exist.
    pub fn get(&self, index: usize) -> Option<&T> {
        self.0.get(index)?.as_deref()
    }

    /// The element in a slot, to change it.
    pub fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        self.0.get_mut(index)?.as_deref_mut()
    }

    /// Fills or empties a slot and returns what it held.
    ///
    /// # Panics
    ///
    /// If there is no slot `index`, like indexing a slice.
    pub fn put(&mut self, index: usize, element: impl Into<Option<T>>) -> Option<T> {
        let element = element.into().map(Box::new);
        std::mem::replace(&mut self.0[index], element).map(|element| *element)
    }

    /// Every slot in order, the empty ones too.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Option<&T>> + DoubleEndedIterator {
        self.0.iter().map(Option::as_deref)
    }

    /// The elements that are present, with the index of their slot.
    pub fn present(&self) -> impl Iterator<Item = (usize, &T)> {
        self.iter().enumerate().filter_map(|(index, slot)| Some((index, slot?)))
    }
}

impl<T> Default for Slots<T> {
    /// No slots.
    fn default() -> Self {
        Slots(Box::default())
    }
}

impl<T> FromIterator<Option<T>> for Slots<T> {
    fn from_iter<I: IntoIterator<Item = Option<T>>>(slots: I) -> Self {
        Slots(slots.into_iter().map(|slot| slot.map(Box::new)).collect())
    }
}

impl<T> IntoIterator for Slots<T> {
    type Item = Option<T>;
    type IntoIter = std::iter::Map<std::vec::IntoIter<Option<Box<T>>>, fn(Option<Box<T>>) -> Option<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_vec().into_iter().map(|slot| slot.map(|element| *element))
    }
}

/// A run of bits with a length that need not be a multiple of anything. Bits beyond the length are 0.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bitmap {
    bits: usize,
    words: Vec<u64>,
}

impl Bitmap {
    /// `bits` bits, all 0.
    pub fn new(bits: usize) -> Self {
        Bitmap { bits, words: vec![0; bits.div_ceil(64)] }
    }

    /// The bits of `words`, bit 0 of word 0 first. `None` unless there are as many words as `bits` need and no bit is set beyond.
    pub fn from_words(bits: usize, words: Vec<u64>) -> Option<Self> {
        let spare = words.len().checked_mul(64)?.checked_sub(bits).filter(|spare| *spare < 64)?;
        let beyond = words.last().is_some_and(|last| spare > 0 && last >> (64 - spare) != 0);
        (!beyond).then_some(Bitmap { bits, words })
    }

    /// The number of bits.
    pub fn len(&self) -> usize {
        self.bits
    }

    /// Whether there are no bits at all.
    pub fn is_empty(&self) -> bool {
        self.bits == 0
    }

    /// The words, bit 0 of word 0 first.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether bit `index` is set; bits beyond the end are not.
    pub fn get(&self, index: usize) -> bool {
        index < self.bits && self.words[index / 64] >> (index % 64) & 1 == 1
    }

    /// Sets or clears bit `index`.
    ///
    /// # Panics
    ///
    /// If there is no such bit.
    pub fn set(&mut self, index: usize, value: bool) {
        assert!(index < self.bits, "bit {index} of a map of {} bits", self.bits);
        let mask = 1 << (index % 64);
        if value { self.words[index / 64] |= mask } else { self.words[index / 64] &= !mask }
    }
}
