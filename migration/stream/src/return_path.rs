//! The return path: what a destination tells its source.
//!
//! On the wire: be16 message, be16 length, data. It is QEMU's; our own link has frames instead.
//!
//! A request for pages names its block only if it is another than the last one's, so a connection has a [`ReturnPath`] on each
//! side. A received bitmap does not fit the length of a message; it follows it.
//!
//! ```
//! use stream::RamBlock;
//! use stream::return_path::{Message, ReturnPath};
//!
//! let blocks = vec![RamBlock::new("ram", 1 << 20)];
//! let mut destination = ReturnPath::new(blocks.clone());
//! let mut bytes = Vec::new();
//! destination.encode(&Message::RequestPages { block: 0, offset: 0x3000, length_bytes: 0x1000 }, &mut bytes)?;
//!
//! let mut source = ReturnPath::new(blocks);
//! assert_eq!(source.decode(&bytes[..10])?, None); // the rest has not come yet
//! let (message, length) = source.decode(&bytes)?.expect("the message is whole");
//! assert_eq!(message, Message::RequestPages { block: 0, offset: 0x3000, length_bytes: 0x1000 });
//! assert_eq!(length, bytes.len());
//! # Ok::<(), stream::Error>(())
//! ```

use vmstate::{Bitmap, Problem, Reader, Value};

use crate::Error;
use crate::command::Data;
use crate::page_map;
use crate::ram::{self, RamBlock, save_name};

/// The longest data of a message.
const DATA_BYTES_MAX: u16 = 512;
/// Ends a received bitmap.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;
/// The value of a resume acknowledgement.
const RESUME_VALUE: u32 = 1;

/// What a destination tells its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Nothing will follow.
    Shut {
        /// 0, or the error that ended it.
        error: u32,
    },
    /// The answer to a ping.
    Pong {
        /// What the ping said.
        value: u32,
    },
    /// Pages are needed now.
    RequestPages {
        /// Index into the blocks.
        block: usize,
        /// In the block, in bytes.
        offset: u64,
        /// Whole pages.
        length_bytes: u32,
    },
    /// What has been received of a block.
    ReceivedBitmap {
        /// Index into the blocks.
        block: usize,
        /// A bit for every page.
        pages: Bitmap,
    },
    /// Ready to go on with a postcopy that was cut off.
    ResumeAck,
    /// Ready for the guest to be stopped.
    SwitchoverAck,
}

/// One direction of a return path.
#[derive(Debug, Clone)]
pub struct ReturnPath {
    blocks: Vec<RamBlock>,
    /// The block of the last request.
    last: Option<usize>,
}

impl ReturnPath {
    /// For the migration of this memory.
    pub fn new(blocks: Vec<RamBlock>) -> Self {
        ReturnPath { blocks, last: None }
    }

    /// Appends a message.
    ///
    /// # Errors
    ///
    /// If it speaks of pages that are not there.
    pub fn encode(&mut self, message: &Message, out: &mut Vec<u8>) -> Result<(), Error> {
        let (mut data, mut tail) = (Vec::new(), Vec::new());
        let number: u16 = match message {
            Message::Shut { error: value } => {
                value.save(&mut data);
                1
            }
            Message::Pong { value } => {
                value.save(&mut data);
                2
            }
            Message::RequestPages { block, offset, length_bytes } => {
                let name = &self.pages(*block, *offset, *length_bytes)?.name;
                offset.save(&mut data);
                length_bytes.save(&mut data);
                if self.last == Some(*block) {
                    4
                } else {
                    save_name(name, &mut data);
                    self.last = Some(*block);
                    3
                }
            }
            Message::ReceivedBitmap { block, pages } => {
                let RamBlock { name, length_bytes } = self.block(*block)?;
                if pages.len() as u64 != ram::pages(*length_bytes) {
                    let bits = pages.len();
                    let why = format!("{bits} bits are not the pages of block {name:?}");
                    return Err(Error::Data { what: "received bitmap", why });
                }
                save_name(name, &mut data);
                page_map::bytes(*length_bytes).save(&mut tail);
                page_map::save(pages, &mut tail);
                BITMAP_END.save(&mut tail);
                5
            }
            Message::ResumeAck => {
                RESUME_VALUE.save(&mut data);
                6
            }
            Message::SwitchoverAck => 7,
        };
        number.save(out);
        (data.len() as u16).save(out); // a name and two numbers
        out.extend(data);
        out.extend(tail);
        Ok(())
    }

    /// The message at the start of `bytes` and its length, or `None` if more bytes are needed.
    ///
    /// # Errors
    ///
    /// If it is no message, or one whose data is not what it must be.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<Option<(Message, usize)>, Error> {
        let mut reader = Reader::partial(bytes);
        let (Ok(number), Ok(length)) = (u16::load(&mut reader, 0), u16::load(&mut reader, 0)) else {
            return Ok(None);
        };
        if length > DATA_BYTES_MAX {
            let (value, maximum) = (length.into(), DATA_BYTES_MAX.into());
            return Err(Error::AboveMaximum { what: "length of a message", value, maximum });
        }
        let Ok(data) = reader.take(length.into()) else { return Ok(None) };
        let what = name(number).ok_or(Error::UnknownMessage(number))?;
        let mut data = Data { what, reader: Reader::new(data) };
        let message = match number {
            1 => Message::Shut { error: data.number()? },
            2 => Message::Pong { value: data.number()? },
            3 | 4 => {
                let (offset, length_bytes) = (data.number()?, data.number()?);
                let block = if number == 3 { Some(self.named(&mut data)?) } else { self.last };
                let block = block.ok_or_else(|| data.refuse("the first request names no block"))?;
                data.pages(self.block(block)?, offset, u64::from(length_bytes))?;
                Message::RequestPages { block, offset, length_bytes }
            }
            5 => {
                let block = self.named(&mut data)?;
                match received(&mut reader, self.block(block)?) {
                    Ok(pages) => Message::ReceivedBitmap { block, pages },
                    Err(Incomplete::More) => return Ok(None),
                    Err(Incomplete::Wrong(why)) => return Err(data.refuse(why)),
                }
            }
            6 => match data.number()? {
                RESUME_VALUE => Message::ResumeAck,
                other => return Err(data.refuse(format!("{other} is not {RESUME_VALUE}"))),
            },
            7 => Message::SwitchoverAck,
            number => return Err(Error::UnknownMessage(number)),
        };
        data.finish()?;
        if let Message::RequestPages { block, .. } = message {
            self.last = Some(block);
        }
        Ok(Some((message, bytes.len() - reader.left())))
    }

    fn block(&self, index: usize) -> Result<&RamBlock, Error> {
        self.blocks.get(index).ok_or_else(|| Error::Ram(format!("there is no block number {index}")))
    }

    fn named(&self, data: &mut Data<'_>) -> Result<usize, Error> {
        let name = &data.block(&self.blocks)?.name;
        let index = self.blocks.iter().position(|block| block.name == *name);
        index.ok_or_else(|| data.refuse("there is no such block"))
    }

    fn pages(&self, block: usize, offset: u64, length_bytes: u32) -> Result<&RamBlock, Error> {
        let block = self.block(block)?;
        let data = Data { what: "request pages", reader: Reader::new(&[]) };
        data.pages(block, offset, length_bytes.into())?;
        Ok(block)
    }
}

fn name(number: u16) -> Option<&'static str> {
    Some(match number {
        1 => "shut",
        2 => "pong",
        3 | 4 => "request pages",
        5 => "received bitmap",
        6 => "resume acknowledgement",
        7 => "switchover acknowledgement",
        _ => return None,
    })
}

/// Why there is no bitmap.
enum Incomplete {
    More,
    Wrong(String),
}

impl From<vmstate::Error> for Incomplete {
    fn from(error: vmstate::Error) -> Self {
        match error.problem {
            Problem::Truncated { .. } => Incomplete::More,
            problem => Incomplete::Wrong(problem.to_string()),
        }
    }
}

/// What follows a received bitmap's message: be64 length, a bit for every page, an end mark.
fn received(reader: &mut Reader<'_>, block: &RamBlock) -> Result<Bitmap, Incomplete> {
    let (length, wanted) = (u64::load(reader, 0)?, page_map::bytes(block.length_bytes));
    let name = &block.name;
    if length != wanted {
        let why = format!("{length} bytes for block {name:?}, whose bitmap has {wanted}");
        return Err(Incomplete::Wrong(why));
    }
    let bytes = reader.take(length as usize)?; // of a block that is in memory
    let end = u64::load(reader, 0)?;
    if end != BITMAP_END {
        return Err(Incomplete::Wrong(format!("it ends with {end:#x}, not with {BITMAP_END:#x}")));
    }
    let pages = page_map::load(block.length_bytes, bytes);
    pages.ok_or_else(|| Incomplete::Wrong(format!("bits are set beyond the pages of block {name:?}")))
}
