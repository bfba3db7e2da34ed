//! Reading a file of either layout with positioned reads.
//!
//! The sections of a mapped file are read and verified first, then its bitmaps; its pages are read when they are asked for, a
//! [chunk](crate::CHUNK_BYTES) at a time, and each chunk is compared with its digest. So what must be done before a guest can run does
//! not depend on the size of its memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vmstate::Bitmap;

use crate::decoder::{Decoder, Event};
use crate::digest::{self, CHUNK_BYTES, Digests, Pieces};
use crate::mapped::MappedBlock;
use crate::parser::{Due, Source};
use crate::ram::PAGE_BYTES;
use crate::{Error, Expected, page_map};

/// Bytes asked for at a time: the sections of a mapped file are apart from each other.
const READ_BYTES: usize = 64 << 10;

/// Bytes that can be read at any place.
pub trait ReadAt {
    /// Reads into `buffer` from `offset` on, and returns how much; 0 at the end.
    ///
    /// # Errors
    ///
    /// If they cannot be read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// How many bytes there are.
    ///
    /// # Errors
    ///
    /// If that cannot be found out.
    fn length_bytes(&self) -> io::Result<u64>;
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }

    fn length_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl ReadAt for [u8] {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.get(offset..)).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn length_bytes(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        (**self).read_at(buffer, offset)
    }

    fn length_bytes(&self) -> io::Result<u64> {
        (**self).length_bytes()
    }
}

/// The sections of a file of either layout.
///
/// Of a mapped file there are no RAM events but the list of blocks and the rounds: its pages are in [`MappedRam`]. Otherwise it is
/// as with a [`StreamReader`](crate::StreamReader).
#[derive(Debug)]
pub struct MappedReader<F> {
    file: F,
    decoder: Decoder,
}

impl<F: ReadAt> MappedReader<F> {
    /// Starts at the beginning of the file.
    ///
    /// # Errors
    ///
    /// If the length of the file cannot be found out.
    pub fn open(file: F, expected: Expected) -> Result<Self, Error> {
        let file_bytes = file.length_bytes().map_err(|source| Error::Read { offset: 0, source })?;
        let decoder = Decoder::new(expected, Source::MappedFile { file_bytes });
        Ok(MappedReader { file, decoder })
    }

    /// The next event; [`Event::End`] is the last.
    ///
    /// # Errors
    ///
    /// If the file fails or is refused.
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
        let (file, offset) = (&self.file, self.decoder.end_of_buffer());
        match self.decoder.feed_with(READ_BYTES, |space| read_some(file, space, offset)) {
            Ok(0) => self.decoder.end_of_input(),
            Ok(_) => {}
            Err(source) => return Err(Error::Read { offset, source }),
        }
        Ok(())
    }

    /// One number for everything in the file; the same as the writer's. It is complete at [`Event::End`].
    pub fn digest(&self) -> u64 {
        self.decoder.digest()
    }

    /// Bytes of the file up to the end of what has been turned into events.
    pub fn offset(&self) -> u64 {
        self.decoder.offset()
    }

    /// Whether the digests have come, and agree with everything that was read.
    pub fn is_verified(&self) -> bool {
        self.decoder.is_verified()
    }

    /// The memory, once [`Event::End`] has come. It has no blocks if the file is not mapped.
    ///
    /// # Errors
    ///
    /// If the file was not read to its end, or the bitmaps cannot be read or are not what was written.
    pub fn into_ram(mut self) -> Result<MappedRam<F>, Error> {
        if *self.decoder.parser().due() != Due::Nothing {
            let offset = self.decoder.offset();
            return Err(Error::OutOfOrder { what: "memory before the end of the sections", offset });
        }
        let (mut blocks, mut pieces) = (Vec::new(), Pieces::default());
        for place in self.decoder.parser().mapped() {
            let mut bytes = vec![0; page_map::bytes(place.block.length_bytes) as usize]; // inside of the file
            read_exact(&self.file, &mut bytes, place.bitmap_offset)?;
            pieces.add(&bytes);
            let present = page_map::load(place.block.length_bytes, &bytes).ok_or_else(|| {
                Error::Ram(format!("the bitmap of block {:?} has pages beyond its end", place.block.name))
            })?;
            blocks.push(Mapped { place: place.clone(), present });
        }
        let (digests, integrity) = self.decoder.parser_mut().digests();
        let expected = integrity.and_then(|written| written.mapped.as_ref());
        if let Some(expected) = expected {
            digest::same(|| "the bitmap of RAM".into(), pieces.digest(), expected.bitmaps)?;
        }
        let digests = expected.is_some().then(|| std::mem::take(digests));
        Ok(MappedRam { file: self.file, blocks, digests })
    }
}

/// A block, and which of its pages are there.
#[derive(Debug)]
struct Mapped {
    place: MappedBlock,
    present: Bitmap,
}

/// The memory in a mapped file, whose bitmaps have been verified and whose pages have not.
#[derive(Debug)]
pub struct MappedRam<F> {
    file: F,
    blocks: Vec<Mapped>,
    /// None in a file without digests.
    digests: Option<Digests>,
}

impl<F: ReadAt> MappedRam<F> {
    /// The blocks, and where they are in the file.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = &MappedBlock> {
        self.blocks.iter().map(|mapped| &mapped.place)
    }

    /// Whether the page at `offset` of block number `block` is in the file. The others hold zeros.
    pub fn is_present(&self, block: usize, offset: u64) -> bool {
        let page = usize::try_from(offset / PAGE_BYTES as u64).unwrap_or(usize::MAX);
        self.blocks.get(block).is_some_and(|mapped| mapped.present.get(page))
    }

    /// The pages of block number `block` that are in the file, in bytes from the start of the block.
    pub fn extents(&self, block: usize) -> impl Iterator<Item = Range<u64>> {
        self.blocks.get(block).into_iter().flat_map(|mapped| page_map::runs(&mapped.present))
    }

    /// Reads chunk number `chunk` of block number `block` and compares it with its digest, if the file has digests. `buffer` is
    /// filled from its start, with zeros for pages that are not in the file. Returns the length of the chunk: the last one of a
    /// block may be short.
    ///
    /// # Errors
    ///
    /// If there is no such chunk or the buffer is too short for it, the file fails, or the pages are not what was written.
    pub fn read_chunk(&self, block: usize, chunk: u64, buffer: &mut [u8]) -> Result<usize, Error> {
        let missing = || Error::Ram(format!("there is no chunk {chunk} of block number {block}"));
        let Mapped { place, present } = self.blocks.get(block).ok_or_else(missing)?;
        let start = chunk.checked_mul(CHUNK_BYTES).filter(|start| *start < place.block.length_bytes);
        let start = start.ok_or_else(missing)?;
        let length = (place.block.length_bytes - start).min(CHUNK_BYTES) as usize;
        let buffer = buffer.get_mut(..length).ok_or_else(|| {
            Error::Ram(format!("chunk {chunk} of block {:?} needs {length} bytes", place.block.name))
        })?;
        let first = (start / PAGE_BYTES as u64) as usize;
        let is_present = |index: usize| present.get(first + index);
        let pages = length / PAGE_BYTES;
        let mut next = 0;
        while next < pages {
            let present = is_present(next);
            let end = (next..pages).find(|index| is_present(*index) != present).unwrap_or(pages);
            let run = next * PAGE_BYTES..end * PAGE_BYTES;
            match present {
                true => read_exact(
                    &self.file,
                    &mut buffer[run.clone()],
                    place.pages_offset + start + run.start as u64,
                )?,
                false => buffer[run].fill(0),
            }
            next = end;
        }
        if let Some((expected, name)) = self.digests.as_ref().and_then(|digests| digests.chunk(block, chunk))
        {
            let pages = buffer.chunks(PAGE_BYTES).enumerate().filter(|(index, _)| is_present(*index));
            let pages = pages.map(|(index, page)| (start + (index * PAGE_BYTES) as u64, page));
            digest::same(|| name, digest::sum_of_pages(pages), expected)?;
        }
        Ok(length)
    }

    /// Reads every chunk and compares it with its digest.
    ///
    /// # Errors
    ///
    /// As [`read_chunk`](Self::read_chunk).
    pub fn verify(&self) -> Result<(), Error> {
        let mut buffer = vec![0; CHUNK_BYTES as usize];
        for (index, mapped) in self.blocks.iter().enumerate() {
            for chunk in 0..mapped.place.block.length_bytes.div_ceil(CHUNK_BYTES) {
                self.read_chunk(index, chunk, &mut buffer)?;
            }
        }
        Ok(())
    }
}

fn read_some(file: &impl ReadAt, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    loop {
        match file.read_at(buffer, offset) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn read_exact(file: &impl ReadAt, mut buffer: &mut [u8], mut offset: u64) -> Result<(), Error> {
    while !buffer.is_empty() {
        match read_some(file, buffer, offset).map_err(|source| Error::Read { offset, source })? {
            0 => return Err(Error::Truncated { offset, what: "RAM" }),
            count => {
                buffer = buffer.get_mut(count..).unwrap_or_default();
                offset += count as u64;
            }
        }
    }
    Ok(())
}
