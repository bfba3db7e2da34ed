//! The part of the grammar that is about RAM: the list of blocks, in either layout, and the records.

use vmstate::Reader;

use super::{Due, Outcome, Parsed, Parser, Source};
use crate::Error;
use crate::mapped::MappedBlock;
use crate::ram::{self, PAGE_BYTES, RamBlock, Record};

/// How far the RAM section has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ram {
    Absent,
    Started { id: u32 },
    Ended,
}

/// The START of RAM in a mapped file, of which parts have come.
#[derive(Debug)]
pub(super) struct Start {
    id: u32,
    total: u64,
    /// Its bytes without the jumps.
    bytes: Vec<u8>,
}

impl Parser {
    pub(super) fn ram_start(&mut self, bytes: &[u8], offset: u64) -> Outcome {
        let mut reader = Reader::partial(bytes);
        let head = self.head(&mut reader)?;
        if head.name != ram::NAME || head.instance_id != 0 {
            return Err(Error::Iterable { name: head.name.into(), offset }.into());
        }
        if head.version != ram::VERSION {
            return Err(Error::Ram(format!("version {} is not {}", head.version, ram::VERSION)).into());
        }
        if self.ram != Ram::Absent {
            return Err(Error::OutOfOrder { what: "a second RAM section", offset }.into());
        }
        if self.is_mapped {
            let total = ram::load_total(&mut reader, self.expected.ram_limit_bytes())?;
            let length = bytes.len() - reader.left();
            self.start = Some(Start { id: head.id, total, bytes: bytes[..length].to_vec() });
            self.due = Due::Block;
            return Ok((None, length));
        }
        let blocks = ram::load_blocks(&mut reader, self.expected.ram_limit_bytes())?;
        let length = bytes.len() - reader.left();
        self.ram_started(head.id, blocks, &bytes[..length])?;
        Ok((Some(Parsed::RamBlocks), length))
    }

    /// The list of blocks is complete; `bytes` is the section.
    fn ram_started(&mut self, id: u32, blocks: Vec<RamBlock>, bytes: &[u8]) -> Result<(), Error> {
        self.expected.check_ram(&blocks)?;
        self.digests.ram_blocks(&blocks, self.is_mapped)?;
        self.digests.section(id, ram::NAME, bytes);
        self.blocks = blocks;
        self.ram = Ram::Started { id };
        self.ids.insert(id);
        self.due = Due::Footer { id, name: ram::NAME.into() };
        Ok(())
    }

    /// A block of the list in a mapped file, after which the stream goes on behind the block's pages; or the end of the list.
    pub(super) fn block(&mut self, bytes: &[u8], offset: u64) -> Outcome {
        let (Some(start), Source::MappedFile { file_bytes }) = (&mut self.start, self.source) else {
            unreachable!("blocks come only while a mapped list is read")
        };
        let mut reader = Reader::partial(bytes);
        if ram::listed_bytes(&self.blocks) < start.total {
            let block = ram::load_block(&mut reader, self.blocks.len())?;
            let position = |reader: &Reader<'_>| offset + (bytes.len() - reader.left()) as u64;
            let mapped = MappedBlock::load(&mut reader, block, position, file_bytes)?;
            let length = bytes.len() - reader.left();
            start.bytes.extend_from_slice(&bytes[..length]);
            let to = mapped.end();
            self.blocks.push(mapped.block.clone());
            self.mapped.push(mapped);
            return Ok((Some(Parsed::Jump { to }), length));
        }
        ram::load_end(&mut reader, &self.blocks, start.total)?;
        let length = bytes.len() - reader.left();
        start.bytes.extend_from_slice(&bytes[..length]);
        let (id, bytes) = (start.id, std::mem::take(&mut start.bytes));
        self.start = None;
        let blocks = std::mem::take(&mut self.blocks);
        self.ram_started(id, blocks, &bytes)?;
        Ok((Some(Parsed::RamBlocks), length))
    }

    pub(super) fn record(&mut self, bytes: &[u8], last: bool) -> Outcome {
        let mut reader = Reader::partial(bytes);
        let record = ram::load_record(&mut reader, &self.blocks, self.current_block)?;
        let start = bytes.len() - reader.left();
        match record {
            Record::Page { .. } | Record::Zero { .. } if self.is_mapped => {
                Err(Error::Ram("a page among the sections of a mapped file".into()).into())
            }
            Record::Page { block, offset } => {
                let page = reader.take(PAGE_BYTES)?;
                self.digests.ram_page(block, offset, page);
                self.current_block = Some(block);
                let end = start + PAGE_BYTES;
                Ok((Some(Parsed::RamPage { block, offset, bytes: start..end }), end))
            }
            Record::Zero { block, offset } => {
                self.digests.ram_zero(block, offset);
                self.current_block = Some(block);
                Ok((Some(Parsed::RamZero { block, offset }), start))
            }
            Record::ChannelFlush => Ok((None, start)),
            Record::End => {
                let Ram::Started { id } = self.ram else {
                    unreachable!("records come only while RAM is started")
                };
                if last {
                    self.ram = Ram::Ended;
                }
                self.due = Due::Footer { id, name: ram::NAME.into() };
                Ok((Some(Parsed::RamRound { last }), start))
            }
        }
    }
}
