//! LBA formats, and where an image of each has what.

use super::protection::{PROTECTION_BYTES, Protection};

/// Metadata are read and written in pages of so many bytes, and their area begins at one.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// An LBA format that every namespace lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LbaFormat {
    /// log2 of the block size in bytes.
    pub shift: u8,
    /// Bytes of metadata of a block; they divide a page.
    pub metadata_bytes: u16,
}

const fn lba_format(shift: u8, metadata_bytes: u16) -> LbaFormat {
    LbaFormat { shift, metadata_bytes }
}

/// The formats by index. Hosts and saved states know them by it.
pub(crate) const FORMATS: [LbaFormat; 5] =
    [lba_format(9, 0), lba_format(12, 0), lba_format(9, 8), lba_format(12, 8), lba_format(12, 64)];

/// How a namespace is formatted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockFormat {
    /// log2 of the block size in bytes.
    pub shift: u8,
    pub metadata: Option<Metadata>,
}

/// The metadata of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// Bytes of each block.
    pub bytes: u16,
    /// They are transferred at the end of each block (FLBAS bit 4), not in a buffer of their own.
    pub extended: bool,
    pub protection: Option<Protection>,
}

impl BlockFormat {
    /// Format `index` with the settings that Format NVM and Namespace Management give. `None` is Invalid Format: there is no such format
    /// or type, or no room for protection information. How metadata are transferred means nothing if there are none.
    pub fn new(index: usize, extended: bool, protection_type: u8, protection_first: bool) -> Option<Self> {
        let format = FORMATS.get(index)?;
        let protection = match protection_type {
            0 => None,
            1..=3 if usize::from(format.metadata_bytes) >= PROTECTION_BYTES => {
                Some(Protection { kind: protection_type, first: protection_first })
            }
            _ => return None,
        };
        let metadata = Metadata { bytes: format.metadata_bytes, extended, protection };
        Some(Self { shift: format.shift, metadata: (metadata.bytes > 0).then_some(metadata) })
    }

    /// Its index, if it is one of [`FORMATS`].
    pub fn index(&self) -> Option<usize> {
        let metadata_bytes = self.metadata.map_or(0, |metadata| metadata.bytes);
        FORMATS.iter().position(|format| *format == lba_format(self.shift, metadata_bytes))
    }

    /// Identify Namespace FLBAS.
    pub fn flbas(&self) -> u8 {
        let extended = self.metadata.is_some_and(|metadata| metadata.extended);
        self.index().unwrap_or(0) as u8 | u8::from(extended) << 4
    }

    /// Identify Namespace DPS.
    pub fn dps(&self) -> u8 {
        let protection = self.metadata.and_then(|metadata| metadata.protection);
        protection.map_or(0, |protection| protection.kind | u8::from(protection.first) << 3)
    }

    /// Blocks of a namespace on an image of `image_bytes`; `None`: none of that size can have the format.
    pub fn blocks(&self, image_bytes: u64) -> Option<u64> {
        let Some(metadata) = self.metadata else {
            return image_bytes.is_multiple_of(1 << self.shift).then_some(image_bytes >> self.shift);
        };
        let mut blocks = image_bytes / ((1 << self.shift) + u64::from(metadata.bytes));
        // Rounding up to pages takes less than two, a few blocks.
        while self.image_bytes(blocks).is_none_or(|needed| needed > image_bytes) {
            blocks = blocks.checked_sub(1)?;
        }
        Some(blocks).filter(|&blocks| blocks > 0)
    }

    /// Bytes of an image for `blocks` blocks, if there can be so many.
    pub fn image_bytes(&self, blocks: u64) -> Option<u64> {
        let data_bytes = blocks.checked_mul(1 << self.shift)?;
        let Some(metadata) = self.metadata else { return Some(data_bytes) };
        let metadata_bytes =
            blocks.checked_mul(metadata.bytes.into())?.checked_next_multiple_of(PAGE_BYTES)?;
        data_bytes.checked_next_multiple_of(PAGE_BYTES)?.checked_add(metadata_bytes)
    }

    /// Where the metadata of a namespace of `blocks` blocks begin in its image.
    pub fn metadata_start(&self, blocks: u64) -> u64 {
        (blocks << self.shift).next_multiple_of(PAGE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_holds_as_many_blocks_as_fit_with_their_metadata() {
        for (index, format) in FORMATS.iter().enumerate() {
            let format = BlockFormat::new(index, true, 0, false).unwrap_or_else(|| panic!("{format:?}"));
            assert_eq!(format.index(), Some(index));
            for image_bytes in (0..200u64).map(|n| n * 4096) {
                let Some(blocks) = format.blocks(image_bytes).filter(|&blocks| blocks > 0) else {
                    assert!(image_bytes < 3 * 4096, "{format:?} {image_bytes}");
                    continue;
                };
                assert!(format.image_bytes(blocks).unwrap() <= image_bytes);
                assert!(format.image_bytes(blocks + 1).unwrap() > image_bytes, "{format:?} {image_bytes}");
            }
            assert_eq!(format.image_bytes(u64::MAX / 8), None, "no image is so large");
        }
        assert!(BlockFormat::new(0, false, 0, false).unwrap().blocks(1000).is_none());
    }

    #[test]
    fn formats_without_room_for_protection_information_have_none() {
        for (index, kind, exists) in
            [(0, 1, false), (1, 3, false), (2, 1, true), (4, 3, true), (2, 4, false), (5, 0, false)]
        {
            assert_eq!(BlockFormat::new(index, false, kind, false).is_some(), exists, "{index} {kind}");
        }
        let format = BlockFormat::new(4, true, 2, true).unwrap();
        assert_eq!((format.flbas(), format.dps()), (0x14, 0xa));
        let plain = BlockFormat::new(1, true, 0, true).unwrap();
        assert_eq!((plain.flbas(), plain.dps(), plain.metadata), (1, 0, None));
    }
}
