//! From bytes to events, without any I/O.

use crate::Error;
use crate::command::Command;
use crate::configuration::Configuration;
use crate::error::Stop;
use crate::expected::Expected;
use crate::parser::{Due, Parsed, Parser, Source};
use crate::ram::RamBlock;
use crate::section::DeviceSection;

/// One thing that a stream says.
#[derive(Debug)]
pub enum Event<'a> {
    /// What machine this is for.
    Configuration(Configuration),
    /// The blocks that the RAM records speak of.
    RamBlocks(&'a [RamBlock]),
    /// A page of RAM.
    RamPage {
        /// Index into the blocks.
        block: usize,
        /// In the block, in bytes; a multiple of the page size.
        offset: u64,
        /// [`PAGE_BYTES`](crate::PAGE_BYTES) of them.
        bytes: &'a [u8],
    },
    /// A page of RAM that holds nothing but zeros.
    RamZero {
        /// Index into the blocks.
        block: usize,
        /// In the block, in bytes; a multiple of the page size.
        offset: u64,
    },
    /// A round of RAM is complete.
    RamRound {
        /// Whether it was the last.
        last: bool,
    },
    /// A command to the destination; QEMU's streams have them.
    Command(Command),
    /// The state of a device. Its `description` is `null`.
    Device(DeviceSection),
    /// What the bytes mean, from the end of a file: JSON, which [`find_trailer`](crate::find_trailer) also finds.
    Trailer(&'a str),
    /// All is complete: every expected section came, and the digests agree.
    End,
}

/// Turns a stream's bytes, fed in pieces of any size, into events.
///
/// Feed it with [`feed`](Self::feed) and ask for events with [`next_event`](Self::next_event) until there is none; when there are no
/// more bytes, call [`end_of_input`](Self::end_of_input). After an error it stays where it is and repeats it.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes of the buffer that have been turned into events.
    used: usize,
    /// Bytes before the buffer.
    before: u64,
    /// Bytes that must be in the buffer before another try makes sense.
    wanted: u64,
    input_ended: bool,
    parser: Parser,
}

impl Decoder {
    /// For a file: after the end mark comes the trailer, and nothing else.
    pub fn file(expected: Expected) -> Self {
        Self::new(expected, Source::File)
    }

    /// For a live connection: the stream ends with its end mark.
    pub fn live(expected: Expected) -> Self {
        Self::new(expected, Source::Connection)
    }

    pub(crate) fn new(expected: Expected, source: Source) -> Self {
        let parser = Parser::new(expected, source);
        Decoder { buffer: Vec::new(), used: 0, before: 0, wanted: 1, input_ended: false, parser }
    }

    /// Adds the next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.make_room();
        self.buffer.extend_from_slice(bytes);
    }

    /// Lets `fill` write the next bytes of the stream into a space of `space_bytes`, and returns how many it wrote.
    pub(crate) fn feed_with<E>(
        &mut self,
        space_bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        self.make_room();
        let filled = self.buffer.len();
        self.buffer.resize(filled + space_bytes, 0);
        let result = fill(&mut self.buffer[filled..]);
        self.buffer.truncate(filled + result.as_ref().map_or(0, |count| (*count).min(space_bytes)));
        result
    }

    /// Forgets used bytes, unless moving the others would cost more than it gains.
    fn make_room(&mut self) {
        if self.used * 2 >= self.buffer.len() {
            self.buffer.drain(..self.used);
            self.before += self.used as u64;
            self.used = 0;
        }
    }

    /// Where the next bytes to be fed are, in a file.
    pub(crate) fn end_of_buffer(&self) -> u64 {
        self.before + self.buffer.len() as u64
    }

    /// Forgets what was fed: the stream goes on at `to`.
    fn jump(&mut self, to: u64) {
        self.buffer.clear();
        (self.used, self.before, self.wanted) = (0, to, 1);
    }

    pub(crate) fn parser_mut(&mut self) -> &mut Parser {
        &mut self.parser
    }

    pub(crate) fn parser(&self) -> &Parser {
        &self.parser
    }

    /// Says that no bytes will follow.
    pub fn end_of_input(&mut self) {
        self.input_ended = true;
    }

    /// Bytes of the stream that have been turned into events.
    pub fn offset(&self) -> u64 {
        self.before + self.used as u64
    }

    /// Bytes that were fed and not used. After [`Event::End`] of a live stream these are not part of it.
    pub fn unused(&self) -> &[u8] {
        &self.buffer[self.used..]
    }

    /// One number for everything that came; the same as the writer's if nothing was damaged.
    pub fn digest(&self) -> u64 {
        self.parser.digest()
    }

    /// Whether the digests have come, and agree with everything before them.
    pub fn is_verified(&self) -> bool {
        self.parser.is_verified()
    }

    /// The next event, or `None` if that takes more bytes. After the end it is [`Event::End`] again and again.
    ///
    /// # Errors
    ///
    /// If the stream is refused.
    pub fn next_event(&mut self) -> Result<Option<Event<'_>>, Error> {
        let Some(parsed) = self.parse()? else { return Ok(None) };
        Ok(Some(self.event(parsed)))
    }

    /// Parses until an event is there.
    pub(crate) fn parse(&mut self) -> Result<Option<Parsed>, Error> {
        loop {
            let bytes = &self.buffer[self.used..];
            if (bytes.len() as u64) < self.wanted && !self.input_ended {
                return Ok(None);
            }
            let offset = self.before + self.used as u64;
            match self.parser.parse(bytes, offset, self.input_ended) {
                Ok((parsed, consumed)) => {
                    let start = self.used;
                    self.used += consumed;
                    self.wanted = u64::from(*self.parser.due() != Due::Nothing);
                    match parsed {
                        Some(Parsed::Jump { to }) => self.jump(to),
                        Some(parsed) => return Ok(Some(parsed.moved(start))),
                        None => {}
                    }
                }
                Err(Stop::Needs(_)) if self.input_ended => {
                    return Err(Error::Truncated {
                        offset: offset + bytes.len() as u64,
                        what: self.parser.due().what(),
                    });
                }
                Err(Stop::Needs(more)) => {
                    self.wanted = bytes.len() as u64 + more;
                    return Ok(None);
                }
                Err(Stop::Failed(error)) => return Err(error),
            }
        }
    }

    /// The event with its bytes.
    pub(crate) fn event(&self, parsed: Parsed) -> Event<'_> {
        match parsed {
            Parsed::Configuration(configuration) => Event::Configuration(configuration),
            Parsed::RamBlocks => Event::RamBlocks(self.parser.blocks()),
            Parsed::RamPage { block, offset, bytes } => {
                Event::RamPage { block, offset, bytes: &self.buffer[bytes] }
            }
            Parsed::RamZero { block, offset } => Event::RamZero { block, offset },
            Parsed::RamRound { last } => Event::RamRound { last },
            Parsed::Command(command) => Event::Command(command),
            Parsed::Device(section) => Event::Device(section),
            // It has been read as JSON, so it is text.
            Parsed::Trailer { text } => {
                Event::Trailer(std::str::from_utf8(&self.buffer[text]).unwrap_or_default())
            }
            Parsed::Jump { .. } => unreachable!("jumps are followed where they are parsed"),
            Parsed::End => Event::End,
        }
    }
}
