//! A stream into guest memory.

use stream::{Decoder, DeviceSection, Event, Expected, SectionSet};
use vm_memory::VolatileMemory;

use crate::headway::Brought;
use crate::{Error, PAGE_BYTES, PageBitmap, RamBlock};

/// Looks at each section as soon as it is there, before what follows it is read.
type Inspect<'a> = Box<dyn FnMut(&DeviceSection) -> Result<(), Error> + 'a>;

/// Places pages as they come, and collects the devices.
pub(crate) struct Receiver<'a> {
    decoder: Decoder,
    blocks: Vec<RamBlock>,
    /// What the stream calls block n, by its place in `blocks`.
    order: Vec<usize>,
    /// Pages that hold something: the others are still the holes of fresh memory, and zeroes need not be written there.
    placed: Vec<PageBitmap>,
    brought: Brought,
    sections: SectionSet,
    complete: bool,
    /// Pages come in channels, and here none: others have the memory that they are for.
    comes_beside: bool,
    inspect: Inspect<'a>,
    doing: &'static str,
}

/// What came, whole and with the right digests.
pub(crate) struct Received {
    pub sections: SectionSet,
    pub digest: u64,
}

impl<'a> Receiver<'a> {
    /// For a stream on a connection.
    pub fn live(expected: Expected, blocks: Vec<RamBlock>) -> Self {
        Self::new(Decoder::live(expected), blocks, Box::new(|_| Ok(())), "receive RAM and devices")
    }

    /// For a stream on a connection beside which the memory was handed over, which is not ours to write: it has devices only.
    pub fn local(expected: Expected) -> Self {
        Self::live(expected.without_ram(), Vec::new())
    }

    /// For a file.
    pub fn file(expected: Expected, blocks: Vec<RamBlock>, inspect: Inspect<'a>) -> Self {
        Self::new(Decoder::file(expected), blocks, inspect, "restore RAM and devices")
    }

    fn new(decoder: Decoder, blocks: Vec<RamBlock>, inspect: Inspect<'a>, doing: &'static str) -> Self {
        let placed = blocks.iter().map(|block| PageBitmap::for_bytes(block.length_bytes())).collect();
        let sections = SectionSet::default();
        let (order, complete, brought) = (Vec::new(), false, Brought::default());
        let comes_beside = false;
        Self { decoder, blocks, order, placed, brought, sections, complete, comes_beside, inspect, doing }
    }

    /// From here on a page in the stream is an error: all come in channels, which have the memory to themselves.
    pub fn refuse_pages(&mut self) {
        self.comes_beside = true;
    }

    /// The next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.complete {
            return Err(self.wrong("there is more after the end of the stream".to_owned()));
        }
        self.decoder.feed(bytes);
        self.drain()?;
        // The rest of a frame is not another stream.
        if self.complete && !self.decoder.unused().is_empty() {
            return Err(self.wrong("there is more after the end of the stream".to_owned()));
        }
        Ok(())
    }

    /// What has come of memory.
    pub fn brought(&self) -> Brought {
        self.brought
    }

    /// There are no more bytes. Nothing may be missing.
    pub fn finish(mut self) -> Result<Received, Error> {
        if !self.complete {
            self.decoder.end_of_input();
            self.drain()?;
        }
        if !self.complete {
            return Err(self.wrong("the stream is not complete".to_owned()));
        }
        Ok(Received { digest: self.decoder.digest(), sections: self.sections })
    }

    fn drain(&mut self) -> Result<(), Error> {
        let failed = Error::stream(self.doing);
        let doing = self.doing;
        let wrong = |reason| Error::Protocol { doing, reason };
        while let Some(event) = self.decoder.next_event().map_err(&failed)? {
            match event {
                Event::RamPage { .. } | Event::RamZero { .. } if self.comes_beside => {
                    return Err(wrong(
                        "a page came on the link, and the channels have all of memory".to_owned(),
                    ));
                }
                Event::RamBlocks(theirs) => {
                    self.order = match_blocks(theirs, &self.blocks).map_err(wrong)?;
                }
                Event::RamPage { block, offset, bytes } => {
                    let (block, placed) = place(&self.order, &self.blocks, &mut self.placed, block)
                        .ok_or_else(|| wrong("a page of an unknown block".to_owned()))?;
                    let slice = block.mapping.get_slice(offset as usize, bytes.len());
                    let slice = slice.map_err(|error| wrong(format!("block {}: {error}", block.name)))?;
                    slice.copy_from(bytes);
                    self.brought.bytes += PAGE_BYTES;
                    self.brought.new_bytes += if placed.insert(offset / PAGE_BYTES) { PAGE_BYTES } else { 0 };
                }
                Event::RamZero { block, offset } => {
                    let (block, placed) = place(&self.order, &self.blocks, &mut self.placed, block)
                        .ok_or_else(|| wrong("a page of an unknown block".to_owned()))?;
                    if placed.contains(offset / PAGE_BYTES) {
                        let slice = block.mapping.get_slice(offset as usize, PAGE_BYTES as usize);
                        let slice = slice.map_err(|error| wrong(format!("block {}: {error}", block.name)))?;
                        slice.copy_from(&[0_u8; PAGE_BYTES as usize]);
                    }
                }
                Event::Device(section) => {
                    (self.inspect)(&section)?;
                    self.sections.insert(section).map_err(&failed)?;
                }
                Event::Command(command) => {
                    return Err(wrong(format!("the command {:?} is not ours", command.name())));
                }
                // The decoder repeats it as long as it is asked.
                Event::End => {
                    self.complete = true;
                    break;
                }
                Event::Configuration(_) | Event::RamRound { .. } | Event::Trailer(_) => {}
            }
        }
        Ok(())
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Protocol { doing: self.doing, reason }
    }
}

fn place<'a>(
    order: &[usize],
    blocks: &'a [RamBlock],
    placed: &'a mut [PageBitmap],
    theirs: usize,
) -> Option<(&'a RamBlock, &'a mut PageBitmap)> {
    let ours = *order.get(theirs)?;
    Some((blocks.get(ours)?, placed.get_mut(ours)?))
}

/// Finds each of the stream's blocks among ours: all of them, by name and length.
pub(crate) fn match_blocks(theirs: &[stream::RamBlock], ours: &[RamBlock]) -> Result<Vec<usize>, String> {
    if theirs.len() != ours.len() {
        return Err(format!("{} blocks of RAM came, this machine has {}", theirs.len(), ours.len()));
    }
    theirs
        .iter()
        .map(|block| {
            let found = ours.iter().position(|own| own.name == block.name);
            let index = found.ok_or_else(|| format!("this machine has no RAM block {:?}", block.name))?;
            match ours.get(index) {
                Some(own) if own.length_bytes() == block.length_bytes => Ok(index),
                _ => Err(format!(
                    "RAM block {:?} of {} bytes has another length here",
                    block.name, block.length_bytes
                )),
            }
        })
        .collect()
}
