//! Reading a stream from a [`Read`].

use std::io::{self, Read};

use crate::decoder::{Decoder, Event};
use crate::{Error, Expected};

/// Bytes asked for at a time.
const READ_BYTES: usize = 256 << 10;

/// A [`Decoder`] with its source of bytes.
#[derive(Debug)]
pub struct StreamReader<R> {
    input: R,
    decoder: Decoder,
}

impl<R: Read> StreamReader<R> {
    /// Reads a file: after the end mark comes the trailer, and nothing else.
    pub fn file(input: R, expected: Expected) -> Self {
        StreamReader { input, decoder: Decoder::file(expected) }
    }

    /// Reads from a live connection: `input` gives the bodies of stream frames, and is not asked for more once the stream is at its
    /// end.
    pub fn live(input: R, expected: Expected) -> Self {
        StreamReader { input, decoder: Decoder::live(expected) }
    }

    /// The next event; [`Event::End`] is the last.
    ///
    /// # Errors
    ///
    /// If the input fails or the stream is refused.
    pub fn next_event(&mut self) -> Result<Event<'_>, Error> {
        let parsed = loop {
            match self.decoder.parse()? {
                Some(parsed) => break parsed,
                None => self.fill()?,
            }
        };
        Ok(self.decoder.event(parsed))
    }

    fn fill(&mut self) -> Result<(), Error> {
        let input = &mut self.input;
        loop {
            match self.decoder.feed_with(READ_BYTES, |space| input.read(space)) {
                Ok(0) => self.decoder.end_of_input(),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(Error::Read { offset: self.decoder.offset(), source }),
            }
            return Ok(());
        }
    }

    /// One number for everything that came; the same as the writer's if nothing was damaged.
    pub fn digest(&self) -> u64 {
        self.decoder.digest()
    }

    /// The source of bytes, and those that were read and not used.
    pub fn into_parts(self) -> (R, Vec<u8>) {
        let unused = self.decoder.unused().to_vec();
        (self.input, unused)
    }
}
