//! The records of the RAM section.
//!
//! START lists the blocks; PARTs and the END hold records, a page each. A record is a be64 of the offset in the block and flags in
//! the low bits; without `CONTINUE` the name of the block follows.

use vmstate::{Reader, Value};

use crate::Error;
use crate::configuration::{check_name, name_from};
use crate::error::Stop;

/// The unit of RAM records, in bytes.
pub const PAGE_BYTES: usize = 4096;

pub(crate) const NAME: &str = "ram";
pub(crate) const VERSION: u32 = 4;
/// Blocks of one machine.
pub(crate) const BLOCKS_MAX: usize = 1024;

/// The low bits of a record.
pub(crate) mod flag {
    pub const ZERO: u64 = 0x02;
    pub const MEMORY_SIZE: u64 = 0x04;
    pub const PAGE: u64 = 0x08;
    pub const END: u64 = 0x10;
    pub const CONTINUE: u64 = 0x20;
    /// XBZRLE: the page as a difference to what was sent of it before.
    pub const DIFFERENCE: u64 = 0x40;
    pub const CHANNEL_FLUSH: u64 = 0x200;
    pub const ALL: u64 = 0xfff;
}

/// One named piece of guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// Under 128 bytes.
    pub name: String,
    /// A multiple of the page size.
    pub length_bytes: u64,
}

impl RamBlock {
    /// A block of `length_bytes`.
    pub fn new(name: impl Into<String>, length_bytes: u64) -> Self {
        RamBlock { name: name.into(), length_bytes }
    }
}

/// The START payload.
pub(crate) fn save_blocks(blocks: &[RamBlock]) -> Result<Vec<u8>, Error> {
    let mut out = Vec::new();
    save_total(blocks, &mut out)?;
    blocks.iter().for_each(|block| save_block(block, &mut out));
    flag::END.save(&mut out);
    Ok(out)
}

/// Appends the word before the list of blocks, which it checks.
pub(crate) fn save_total(blocks: &[RamBlock], out: &mut Vec<u8>) -> Result<(), Error> {
    (total_bytes(blocks)? | flag::MEMORY_SIZE).save(out);
    Ok(())
}

/// Appends an entry of the list.
pub(crate) fn save_block(block: &RamBlock, out: &mut Vec<u8>) {
    save_name(&block.name, out);
    block.length_bytes.save(out);
}

/// The pages of a block of so many bytes.
pub(crate) fn pages(block_bytes: u64) -> u64 {
    block_bytes / PAGE_BYTES as u64
}

/// Whether `length` bytes at `offset` are whole pages of the block.
pub(crate) fn are_pages_of(block: &RamBlock, offset: u64, length: u64) -> bool {
    let page = PAGE_BYTES as u64;
    let inside = offset.checked_add(length).is_some_and(|end| end <= block.length_bytes);
    inside && offset.is_multiple_of(page) && length.is_multiple_of(page)
}

/// Makes sure that `length` bytes at `offset` are whole pages of block number `block`, before they are written.
pub(crate) fn check_pages(blocks: &[RamBlock], block: usize, offset: u64, length: u64) -> Result<(), Error> {
    let Some(block) = blocks.get(block) else {
        return Err(Error::Ram(format!("there is no block number {block}")));
    };
    if !are_pages_of(block, offset, length) {
        let RamBlock { name, length_bytes } = block;
        return Err(Error::Ram(format!(
            "{length:#x} bytes at {offset:#x} are not pages of block {name:?} of {length_bytes:#x} bytes"
        )));
    }
    Ok(())
}

/// Reads the word before the list of blocks: the sum of their lengths, at most `limit_bytes`.
pub(crate) fn load_total(reader: &mut Reader<'_>, limit_bytes: u64) -> Result<u64, Stop> {
    let word = u64::load(reader, 0)?;
    let total = word & !flag::ALL;
    if word & flag::ALL != flag::MEMORY_SIZE {
        return Err(refuse(format!("the list of blocks starts with {word:#x}")));
    }
    if total > limit_bytes {
        return Err(Error::AboveMaximum { what: "RAM in bytes", value: total, maximum: limit_bytes }.into());
    }
    Ok(total)
}

/// Reads an entry of the list, of which `before` have come.
pub(crate) fn load_block(reader: &mut Reader<'_>, before: usize) -> Result<RamBlock, Stop> {
    if before == BLOCKS_MAX {
        let maximum = BLOCKS_MAX as u64;
        return Err(Error::AboveMaximum { what: "number of RAM blocks", value: maximum + 1, maximum }.into());
    }
    let name = load_name(reader)?.to_owned();
    Ok(RamBlock { name, length_bytes: u64::load(reader, 0)? })
}

/// Reads the end of the list and compares the list with its sum.
pub(crate) fn load_end(reader: &mut Reader<'_>, blocks: &[RamBlock], total: u64) -> Result<(), Stop> {
    let end = u64::load(reader, 0)?;
    if end != flag::END {
        return Err(refuse(format!("the list of blocks ends with {end:#x}")));
    }
    match total_bytes(blocks)? {
        sum if sum == total => Ok(()),
        sum => Err(refuse(format!("the blocks have {sum} bytes but the list says {total}"))),
    }
}

/// Reads the START payload: at most `limit_bytes` in all.
pub(crate) fn load_blocks(reader: &mut Reader<'_>, limit_bytes: u64) -> Result<Vec<RamBlock>, Stop> {
    let total = load_total(reader, limit_bytes)?;
    let mut blocks = Vec::new();
    while listed_bytes(&blocks) < total {
        blocks.push(load_block(reader, blocks.len())?);
    }
    load_end(reader, &blocks, total)?;
    Ok(blocks)
}

/// The sum of the lengths of the blocks so far; more than can be is the largest number there is.
pub(crate) fn listed_bytes(blocks: &[RamBlock]) -> u64 {
    blocks.iter().fold(0, |sum, block| sum.saturating_add(block.length_bytes))
}

/// The sum of the blocks' lengths, if the list is one that can be written.
fn total_bytes(blocks: &[RamBlock]) -> Result<u64, Error> {
    if blocks.len() > BLOCKS_MAX {
        let (value, maximum) = (blocks.len() as u64, BLOCKS_MAX as u64);
        return Err(Error::AboveMaximum { what: "number of RAM blocks", value, maximum });
    }
    let mut total = 0_u64;
    for (index, block) in blocks.iter().enumerate() {
        check_name("a RAM block", &block.name)?;
        if blocks[..index].iter().any(|other| other.name == block.name) {
            return Err(Error::Ram(format!("there are two blocks {:?}", block.name)));
        }
        let length = block.length_bytes;
        if length == 0 || length % PAGE_BYTES as u64 != 0 {
            return Err(Error::Ram(format!(
                "block {:?} has {length} bytes, not a number of pages",
                block.name
            )));
        }
        let sum = total.checked_add(length);
        total =
            sum.ok_or_else(|| Error::Ram(format!("block {:?} of {length} bytes does not fit", block.name)))?;
    }
    Ok(total)
}

/// What a record says, its page still to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Record {
    Page { block: usize, offset: u64 },
    Zero { block: usize, offset: u64 },
    ChannelFlush,
    End,
}

/// Reads one record. `current` is the block of the record before.
pub(crate) fn load_record(
    reader: &mut Reader<'_>,
    blocks: &[RamBlock],
    current: Option<usize>,
) -> Result<Record, Stop> {
    let word = u64::load(reader, 0)?;
    let (offset, flags) = (word & !flag::ALL, word & flag::ALL);
    match flags & !flag::CONTINUE {
        flag::ZERO | flag::PAGE => {}
        flag::END if word == flag::END => return Ok(Record::End),
        flag::CHANNEL_FLUSH if word == flag::CHANNEL_FLUSH => return Ok(Record::ChannelFlush),
        flag::DIFFERENCE => {
            return Err(refuse(format!("page {offset:#x} is a difference (XBZRLE), which is not read")));
        }
        _ => return Err(refuse(format!("unknown record {word:#x}"))),
    }
    let block = if flags & flag::CONTINUE != 0 {
        current.ok_or_else(|| refuse("the first record continues no block".into()))?
    } else {
        let name = load_name(reader)?;
        let found = blocks.iter().position(|block| block.name == name);
        found.ok_or_else(|| refuse(format!("there is no block {name:?}")))?
    };
    let RamBlock { name, length_bytes } = &blocks[block]; // both come from `blocks`
    if offset >= *length_bytes {
        return Err(refuse(format!(
            "page {offset:#x} is outside of block {name:?} of {length_bytes:#x} bytes"
        )));
    }
    if flags & flag::PAGE != 0 {
        return Ok(Record::Page { block, offset });
    }
    match reader.byte()? {
        0 => Ok(Record::Zero { block, offset }),
        fill => Err(refuse(format!("page {offset:#x} of block {name:?} is filled with {fill:#04x}"))),
    }
}

fn refuse(why: String) -> Stop {
    Error::Ram(why).into()
}

/// Appends u8 length and name.
pub(crate) fn save_name(name: &str, out: &mut Vec<u8>) {
    out.push(name.len() as u8); // checked by `check_name` before
    out.extend_from_slice(name.as_bytes());
}

/// Reads u8 length and name.
pub(crate) fn load_name<'a>(reader: &mut Reader<'a>) -> Result<&'a str, Stop> {
    let length = usize::from(reader.byte()?);
    Ok(name_from("a section or block", reader.take(length)?)?)
}
