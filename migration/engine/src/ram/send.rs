//! Guest memory into a stream.

use std::io::Write;

use stream::{Configuration, DeviceSection, RamWriter, StreamWriter};
use vm_memory::VolatileMemory;

use super::PAGE_LENGTH;
use crate::{Error, PAGE_BYTES, PageBitmap, RamBlock, Statistics};

/// Pages that are copied out of guest memory at a time: they stay in the first or second cache until they are sent.
const PIECE_PAGES: u64 = 32;

/// Writes rounds of RAM, then the devices.
pub(crate) struct Sender<'a, W: Write> {
    writer: StreamWriter<W>,
    ram: RamWriter,
    blocks: &'a [RamBlock],
    piece: Vec<u8>,
    statistics: &'a Statistics,
    doing: &'static str,
}

impl<'a, W: Write> Sender<'a, W> {
    /// Starts a stream of the machine type `machine` with the list of blocks. `doing` says in errors what fails.
    pub fn start(
        out: W,
        machine: &str,
        blocks: &'a [RamBlock],
        statistics: &'a Statistics,
        doing: &'static str,
    ) -> Result<Self, Error> {
        let failed = Error::stream(doing);
        let mut writer = StreamWriter::new(out, &Configuration::new(machine)).map_err(&failed)?;
        let list: Vec<_> =
            blocks.iter().map(|block| stream::RamBlock::new(&block.name, block.length_bytes())).collect();
        let ram = writer.start_ram(&list).map_err(&failed)?;
        let piece = vec![0; (PIECE_PAGES * PAGE_BYTES) as usize];
        Ok(Self { writer, ram, blocks, piece, statistics, doing })
    }

    /// Where the bytes go.
    pub fn out(&mut self) -> &mut W {
        self.writer.get_mut()
    }

    /// Sends the pages of each bitmap (one for each block) while the guest may run.
    pub fn round(&mut self, pages: &[PageBitmap]) -> Result<(), Error> {
        self.send(pages, false)
    }

    /// Sends the last pages.
    pub fn last_round(&mut self, pages: &[PageBitmap]) -> Result<(), Error> {
        self.send(pages, true)
    }

    fn send(&mut self, bitmaps: &[PageBitmap], last: bool) -> Result<(), Error> {
        let failed = Error::stream(self.doing);
        let mut round = match last {
            false => self.ram.round(&mut self.writer),
            true => self.ram.last_round(&mut self.writer),
        }
        .map_err(&failed)?;
        for (index, (block, bitmap)) in self.blocks.iter().zip(bitmaps).enumerate() {
            for run in bitmap.runs() {
                for first in run.clone().step_by(PIECE_PAGES as usize) {
                    let count = (run.end - first).min(PIECE_PAGES);
                    let offset = first * PAGE_BYTES;
                    let length = (count * PAGE_BYTES) as usize;
                    let piece = self.piece.get_mut(..length).unwrap_or_default();
                    let slice = block.mapping.get_slice(offset as usize, length);
                    let slice = slice.map_err(|source| Error::Machine {
                        doing: "read guest memory",
                        source: source.into(),
                    })?;
                    slice.copy_to(piece);

                    let mut offset = offset;
                    let (pages, _) = piece.as_chunks::<PAGE_LENGTH>();
                    let mut zeroes = 0;
                    for alike in pages.chunk_by(|one, other| is_zero(one) == is_zero(other)) {
                        let length = alike.as_flattened().len() as u64;
                        if alike.first().is_some_and(is_zero) {
                            zeroes += alike.len() as u64;
                            round.zeros(index, offset, length).map_err(&failed)?;
                        } else {
                            round.pages(index, offset, alike.as_flattened()).map_err(&failed)?;
                        }
                        offset += length;
                    }
                    self.statistics.update(|s| {
                        s.remaining_bytes = s.remaining_bytes.saturating_sub(length as u64);
                        s.normal_pages += count - zeroes;
                        s.zero_pages += zeroes;
                    });
                }
            }
        }
        round.finish().map_err(&failed)
    }

    /// Adds a section.
    pub fn device(&mut self, section: &DeviceSection) -> Result<(), Error> {
        self.writer.device(section).map_err(Error::stream(self.doing))
    }

    /// Ends the stream of a connection. Returns the digest of all that was sent.
    pub fn finish_live(self) -> Result<u64, Error> {
        let digest = self.writer.digest();
        self.writer.finish_live().map_err(Error::stream(self.doing))?;
        Ok(digest)
    }

    /// Ends a file. Returns where the bytes went, and the digest.
    pub fn finish_file(self) -> Result<(W, u64), Error> {
        let digest = self.writer.digest();
        let out = self.writer.finish_file().map_err(Error::stream(self.doing))?;
        Ok((out, digest))
    }
}

/// Whether a page holds nothing but zeroes.
///
/// The compiler folds the bytes of a step in vectors of SSE2, which every x86-64 has, and would not fold wide integers so.
pub(crate) fn is_zero(page: &[u8; PAGE_LENGTH]) -> bool {
    // Most pages that hold something show it in the first step.
    const STEP: usize = 128;
    let (steps, _none_left) = page.as_chunks::<STEP>();
    steps.iter().all(|step| step.iter().fold(0, |any, byte| any | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_makes_a_page_not_zero() {
        let mut page = [0; PAGE_LENGTH];
        assert!(is_zero(&page));
        for index in 0..PAGE_LENGTH {
            page[index] = 1;
            assert!(!is_zero(&page), "byte {index}");
            page[index] = 0;
        }
    }
}
