//! The mapped layout of RAM: pages at fixed places of a file.
//!
//! The START of the RAM section lists the blocks as ever, and after each comes a header that says where its bitmap and its pages
//! are. The stream goes on behind the pages:
//!
//! ```text
//! ... | name, length, header | bitmap | (to 1 MiB) | pages, holes where they are zero | next name ... | end of the list | ...
//!                            ^ bitmap_offset       ^ pages_offset
//! ```
//!
//! So the places of all blocks lie one after the other and cannot overlap, if each begins behind its header and ends inside of the
//! file. That is what is checked here.

use vmstate::{Reader, Value};

use crate::error::Stop;
use crate::page_map;
use crate::ram::{PAGE_BYTES, RamBlock};
use crate::{Configuration, Error};

/// The capability in the configuration of a file that has this layout.
pub(crate) const CAPABILITY: &str = "mapped-ram";
/// Pages start at a multiple of this.
pub(crate) const ALIGNMENT_BYTES: u64 = 1 << 20;
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 4 + 3 * 8;

/// A block and where it is in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedBlock {
    /// Its name and length.
    pub block: RamBlock,
    /// Where its bitmap is in the file: page n is bit n % 8 of byte n / 8.
    pub bitmap_offset: u64,
    /// Where its first page is in the file.
    pub pages_offset: u64,
}

impl MappedBlock {
    /// The first place for a block whose header begins at `header_offset`.
    pub(crate) fn place(block: &RamBlock, header_offset: u64) -> Result<Self, Error> {
        let bitmap_offset = header_offset.checked_add(HEADER_BYTES);
        let bitmap_end =
            bitmap_offset.and_then(|start| start.checked_add(page_map::bytes(block.length_bytes)));
        let pages_offset = bitmap_end.and_then(|end| end.checked_next_multiple_of(ALIGNMENT_BYTES));
        let placed = bitmap_offset.zip(pages_offset).map(|(bitmap_offset, pages_offset)| MappedBlock {
            block: block.clone(),
            bitmap_offset,
            pages_offset,
        });
        placed
            .filter(|placed| placed.checked_end().is_some())
            .ok_or_else(|| Error::Ram(format!("block {:?} does not fit into a file", block.name)))
    }

    /// The first byte behind the pages; `None` if that is further than a file can reach.
    fn checked_end(&self) -> Option<u64> {
        self.pages_offset.checked_add(self.block.length_bytes).filter(|end| i64::try_from(*end).is_ok())
    }

    /// The first byte behind the pages.
    pub(crate) fn end(&self) -> u64 {
        self.checked_end().unwrap_or(u64::MAX) // both constructors have checked it
    }

    pub(crate) fn save(&self, out: &mut Vec<u8>) {
        VERSION.save(out);
        (PAGE_BYTES as u64).save(out);
        self.bitmap_offset.save(out);
        self.pages_offset.save(out);
    }

    /// Reads the header of a block, which ends at `header_end` of a file of `file_bytes`.
    pub(crate) fn load(
        reader: &mut Reader<'_>,
        block: RamBlock,
        header_end: impl FnOnce(&Reader<'_>) -> u64,
        file_bytes: u64,
    ) -> Result<Self, Stop> {
        let (version, page_bytes) = (u32::load(reader, 0)?, u64::load(reader, 0)?);
        let (bitmap_offset, pages_offset) = (u64::load(reader, 0)?, u64::load(reader, 0)?);
        let name = block.name.clone();
        let refuse = |why: String| Stop::from(Error::Ram(format!("the place of block {name:?}: {why}")));
        if version != VERSION {
            return Err(refuse(format!("version {version} is not {VERSION}")));
        }
        if page_bytes != PAGE_BYTES as u64 {
            return Err(refuse(format!("pages of {page_bytes} bytes are not {PAGE_BYTES}")));
        }
        if !block.length_bytes.is_multiple_of(page_bytes) {
            return Err(refuse(format!("{} bytes are not a number of pages", block.length_bytes)));
        }
        let header_end = header_end(reader);
        if bitmap_offset < header_end {
            return Err(refuse(format!("the bitmap at {bitmap_offset:#x} overlaps the header")));
        }
        let bitmap_end = bitmap_offset.checked_add(page_map::bytes(block.length_bytes));
        if bitmap_end.is_none_or(|end| end > pages_offset) {
            return Err(refuse(format!(
                "the bitmap at {bitmap_offset:#x} overlaps the pages at {pages_offset:#x}"
            )));
        }
        if !pages_offset.is_multiple_of(ALIGNMENT_BYTES) {
            return Err(refuse(format!("pages at {pages_offset:#x} are not at a whole MiB")));
        }
        let mapped = MappedBlock { block, bitmap_offset, pages_offset };
        match mapped.checked_end() {
            Some(end) if end <= file_bytes => Ok(mapped),
            _ => Err(refuse(format!(
                "{:#x} bytes of pages at {pages_offset:#x} go beyond the {file_bytes:#x} bytes of the file",
                mapped.block.length_bytes
            ))),
        }
    }
}

impl Configuration {
    /// A machine type and the mapped layout, which only a file can have.
    pub fn mapped(machine: impl Into<String>) -> Self {
        Configuration { machine: machine.into(), capabilities: vec![CAPABILITY.into()] }
    }

    /// Whether RAM has the mapped layout.
    pub fn is_mapped(&self) -> bool {
        self.capabilities.iter().any(|capability| capability == CAPABILITY)
    }
}
