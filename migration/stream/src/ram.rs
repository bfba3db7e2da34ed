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
    (total_bytes(blocks)? | flag::MEMORY_SIZE).save(&mut out);
    for block in blocks {
        save_name(&block.name, &mut out);
        block.length_bytes.save(&mut out);
    }
    flag::END.save(&mut out);
    Ok(out)
}

/// Reads the START payload: at most `limit_bytes` in all.
pub(crate) fn load_blocks(reader: &mut Reader<'_>, limit_bytes: u64) -> Result<Vec<RamBlock>, Stop> {
    let word = u64::load(reader, 0)?;
    let total = word & !flag::ALL;
    if word & flag::ALL != flag::MEMORY_SIZE {
        return Err(refuse(format!("the list of blocks starts with {word:#x}")));
    }
    if total > limit_bytes {
        return Err(Error::AboveMaximum { what: "RAM in bytes", value: total, maximum: limit_bytes }.into());
    }
    let (mut blocks, mut listed) = (Vec::new(), 0_u64);
    while listed < total {
        if blocks.len() == BLOCKS_MAX {
            let maximum = BLOCKS_MAX as u64;
            return Err(
                Error::AboveMaximum { what: "number of RAM blocks", value: maximum + 1, maximum }.into()
            );
        }
        let name = load_name(reader)?.to_owned();
        let length_bytes = u64::load(reader, 0)?;
        listed = listed.saturating_add(length_bytes);
        blocks.push(RamBlock { name, length_bytes });
    }
    let end = u64::load(reader, 0)?;
    if end != flag::END {
        return Err(refuse(format!("the list of blocks ends with {end:#x}")));
    }
    match total_bytes(&blocks)? {
        sum if sum == total => Ok(blocks),
        sum => Err(refuse(format!("the blocks have {sum} bytes but the list says {total}"))),
    }
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
