//! Commands: what a source tells its destination beside the state.
//!
//! On the wire: be16 command, be16 length, data. Files hold none, and our own link has frames instead; they are here so that the
//! streams of others can be read and tested against. [`Command::Packaged`] says that so many of the next bytes belong together:
//! they hold sections and commands like the stream itself.

use std::ops::Range;

use vmstate::{Reader, Value};

use crate::configuration::{check_name, name_from};
use crate::ram::{self, PAGE_BYTES, RamBlock, save_name};
use crate::wire::PACKAGE_BYTES_MAX;
use crate::{DeviceSection, Error};

/// Of the data of a discard.
const DISCARD_VERSION: u8 = 0;

/// What a source tells its destination beside the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Open the way back: [`return_path`](crate::return_path) messages are wanted.
    OpenReturnPath,
    /// Answer with a pong.
    Ping {
        /// What the pong shall say.
        value: u32,
    },
    /// Postcopy may follow.
    PostcopyAdvise {
        /// What the source's memory consists of, if it says so.
        pages: Option<PageSizes>,
    },
    /// Be ready to ask for pages.
    PostcopyListen,
    /// Run; what is missing is asked for.
    PostcopyRun,
    /// Forget pages that have been sent: they are dirty again.
    RamDiscard {
        /// The block's name.
        block: String,
        /// Whole pages, in bytes from the start of the block.
        ranges: Vec<Range<u64>>,
    },
    /// The next bytes belong together.
    Packaged {
        /// How many.
        length_bytes: u32,
    },
    /// Go on with a postcopy that was cut off.
    PostcopyResume,
    /// Send the bitmap of what was received of a block.
    ReceivedBitmap {
        /// The block's name.
        block: String,
    },
    /// What follows was sent with the guest stopped.
    SwitchoverStart,
}

/// The page sizes of a source's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageSizes {
    /// The sizes of the host pages behind the blocks, in bytes, united bit by bit.
    pub host_bytes_union: u64,
    /// The guest's page size in bytes.
    pub guest_bytes: u64,
}

/// A part of a package.
#[derive(Debug, Clone, Copy)]
pub enum PackagePart<'a> {
    /// The state of a device.
    Device(&'a DeviceSection),
    /// A command, which must not be a package itself.
    Command(&'a Command),
}

impl Command {
    /// Its number on the wire.
    pub fn number(&self) -> u16 {
        match self {
            Command::OpenReturnPath => 1,
            Command::Ping { .. } => 2,
            Command::PostcopyAdvise { .. } => 3,
            Command::PostcopyListen => 4,
            Command::PostcopyRun => 5,
            Command::RamDiscard { .. } => 6,
            Command::Packaged { .. } => 7,
            Command::PostcopyResume => 9,
            Command::ReceivedBitmap { .. } => 10,
            Command::SwitchoverStart => 11,
        }
    }

    /// What errors call it.
    pub fn name(&self) -> &'static str {
        name(self.number()).unwrap_or_default()
    }

    /// The data.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        match self {
            Command::OpenReturnPath
            | Command::PostcopyListen
            | Command::PostcopyRun
            | Command::PostcopyResume
            | Command::SwitchoverStart
            | Command::PostcopyAdvise { pages: None } => {}
            Command::Ping { value } => value.save(&mut out),
            Command::PostcopyAdvise { pages: Some(pages) } => {
                pages.host_bytes_union.save(&mut out);
                pages.guest_bytes.save(&mut out);
            }
            Command::RamDiscard { block, ranges } => {
                out.push(DISCARD_VERSION);
                save_name(check_name("a RAM block", block)?, &mut out);
                out.push(0);
                for range in ranges {
                    range.start.save(&mut out);
                    range.end.saturating_sub(range.start).save(&mut out);
                }
            }
            Command::Packaged { length_bytes } => length_bytes.save(&mut out),
            Command::ReceivedBitmap { block } => save_name(check_name("a RAM block", block)?, &mut out),
        }
        Ok(out)
    }

    /// The command that number and data are, in a stream whose RAM consists of `blocks`.
    ///
    /// # Errors
    ///
    /// If there is no such command, or its data is not what it must be.
    pub(crate) fn decode(number: u16, data: &[u8], blocks: &[RamBlock]) -> Result<Command, Error> {
        let what = name(number).ok_or(Error::UnknownCommand(number))?;
        let mut data = Data { what, reader: Reader::new(data) };
        let command = match number {
            1 => Command::OpenReturnPath,
            2 => Command::Ping { value: data.number()? },
            3 if data.reader.left() == 0 => Command::PostcopyAdvise { pages: None },
            3 => Command::PostcopyAdvise { pages: Some(data.page_sizes()?) },
            4 => Command::PostcopyListen,
            5 => Command::PostcopyRun,
            6 => data.discard(blocks)?,
            7 => Command::Packaged { length_bytes: data.package_length()? },
            9 => Command::PostcopyResume,
            10 => Command::ReceivedBitmap { block: data.block(blocks)?.name.clone() },
            11 => Command::SwitchoverStart,
            number => return Err(Error::UnknownCommand(number)),
        };
        data.finish()?;
        Ok(command)
    }
}

fn name(number: u16) -> Option<&'static str> {
    Some(match number {
        1 => "open return path",
        2 => "ping",
        3 => "postcopy advise",
        4 => "postcopy listen",
        5 => "postcopy run",
        6 => "RAM discard",
        7 => "packaged",
        9 => "postcopy resume",
        10 => "receive bitmap",
        11 => "switchover start",
        _ => return None,
    })
}

/// The data of a command or a message, and what to call it in errors.
pub(crate) struct Data<'a> {
    pub what: &'static str,
    pub reader: Reader<'a>,
}

impl<'a> Data<'a> {
    pub(crate) fn refuse(&self, why: impl Into<String>) -> Error {
        Error::Data { what: self.what, why: why.into() }
    }

    pub(crate) fn number<T: Value>(&mut self) -> Result<T, Error> {
        T::load(&mut self.reader, 0).map_err(|error| self.refuse(error.to_string()))
    }

    fn block_name(&mut self) -> Result<&'a str, Error> {
        let length: u8 = self.number()?;
        let name = self.reader.take(length.into()).map_err(|error| self.refuse(error.to_string()))?;
        name_from("a RAM block", name)
    }

    /// One of the blocks, by its name.
    pub(crate) fn block<'b>(&mut self, blocks: &'b [RamBlock]) -> Result<&'b RamBlock, Error> {
        let name = self.block_name()?;
        let found = blocks.iter().find(|block| block.name == name);
        found.ok_or_else(|| self.refuse(format!("there is no block {name:?}")))
    }

    /// Whole pages of a block.
    pub(crate) fn pages(&self, block: &RamBlock, start: u64, length: u64) -> Result<Range<u64>, Error> {
        if length == 0 || !ram::are_pages_of(block, start, length) {
            let RamBlock { name, length_bytes } = block;
            return Err(self.refuse(format!(
                "{length:#x} bytes at {start:#x} are not pages of block {name:?} of {length_bytes:#x} bytes"
            )));
        }
        Ok(start..start + length) // inside of the block
    }

    fn page_sizes(&mut self) -> Result<PageSizes, Error> {
        let pages = PageSizes { host_bytes_union: self.number()?, guest_bytes: self.number()? };
        let page = PAGE_BYTES as u64;
        if pages.guest_bytes != page {
            return Err(self.refuse(format!("pages of {} bytes are not {page}", pages.guest_bytes)));
        }
        if pages.host_bytes_union == 0 || !pages.host_bytes_union.is_multiple_of(page) {
            let sizes = pages.host_bytes_union;
            return Err(self.refuse(format!("{sizes:#x} is no union of page sizes")));
        }
        Ok(pages)
    }

    fn package_length(&mut self) -> Result<u32, Error> {
        let length_bytes = self.number()?;
        match length_bytes > PACKAGE_BYTES_MAX {
            false => Ok(length_bytes),
            true => {
                let (value, maximum) = (length_bytes.into(), PACKAGE_BYTES_MAX.into());
                Err(Error::AboveMaximum { what: "length of a package", value, maximum })
            }
        }
    }

    fn discard(&mut self, blocks: &[RamBlock]) -> Result<Command, Error> {
        let version: u8 = self.number()?;
        if version != DISCARD_VERSION {
            return Err(self.refuse(format!("version {version} is not {DISCARD_VERSION}")));
        }
        let block = self.block(blocks)?;
        if self.number::<u8>()? != 0 {
            return Err(self.refuse("the name does not end with 0"));
        }
        let mut ranges = Vec::with_capacity(self.reader.left() / 16);
        while self.reader.left() > 0 {
            let (start, length) = (self.number()?, self.number()?);
            ranges.push(self.pages(block, start, length)?);
        }
        match ranges.is_empty() {
            true => Err(self.refuse("it discards nothing")),
            false => Ok(Command::RamDiscard { block: block.name.clone(), ranges }),
        }
    }

    /// Nothing may be left.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        match self.reader.left() {
            0 => Ok(()),
            bytes => Err(self.refuse(format!("{bytes} bytes are left over"))),
        }
    }
}

/// How far a postcopy has come: its commands have an order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Postcopy {
    #[default]
    Unknown,
    Advised,
    Listening,
    Running,
}

impl Postcopy {
    /// What it is after a command, if the command may come now.
    pub(crate) fn after(self, command: &Command) -> Option<Self> {
        Some(match (self, command) {
            (Postcopy::Unknown, Command::PostcopyAdvise { .. }) => Postcopy::Advised,
            (Postcopy::Advised, Command::RamDiscard { .. }) => Postcopy::Advised,
            (Postcopy::Advised, Command::PostcopyListen) => Postcopy::Listening,
            (Postcopy::Listening, Command::PostcopyRun) => Postcopy::Running,
            (
                _,
                Command::PostcopyAdvise { .. }
                | Command::RamDiscard { .. }
                | Command::PostcopyListen
                | Command::PostcopyRun,
            ) => return None,
            (now, _) => now,
        })
    }
}
