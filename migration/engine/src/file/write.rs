//! The contents of a file, in either layout.

use std::io::{self, BufWriter, Seek, SeekFrom, Write};

use stream::{Configuration, DeviceSection, MappedRamWriter, StreamWriter};
use transport::Layout;
use vm_memory::VolatileMemory;

use super::draft::Draft;
use super::{FileState, PIECE_BYTES, SECTION};
use crate::ram::Sender;
use crate::source::MACHINE;
use crate::{Context, Error, PAGE_BYTES, PageBitmap, Parameters, RamBlock, SourceMachine, Statistics};

/// What fails, in errors.
const DOING: &str = "write the file";

/// What is in a file beside memory.
pub(super) struct Sections<'a> {
    pub first: &'a FileState,
    pub devices: &'a [DeviceSection],
}

/// Writes the file, which is on stable storage afterwards. Returns its digest.
pub(super) fn contents(
    machine: &mut dyn SourceMachine,
    draft: &mut Draft,
    layout: Layout,
    sections: &Sections<'_>,
    context: &Context<'_>,
) -> Result<u64, Error> {
    let blocks = machine.ram_blocks();
    let pages = populated(machine, &blocks)?;
    let statistics = context.statistics;
    statistics.update(|s| {
        s.rounds = 1;
        s.total_bytes = blocks.iter().map(|block| block.length_bytes()).sum();
        s.remaining_bytes = pages.iter().map(PageBitmap::count).sum::<u64>() * PAGE_BYTES;
    });
    let out = FileSink { draft, parameters: context.parameters, statistics };
    let digest = match layout {
        Layout::Mapped => mapped(out, &blocks, &pages, sections, statistics),
        Layout::Stream => stream(out, &blocks, &pages, sections, statistics),
    }?;
    draft.file.sync_all().map_err(draft.failed("sync"))?;
    Ok(digest)
}

/// The pages that hold something.
pub(super) fn populated(
    machine: &mut dyn SourceMachine,
    blocks: &[RamBlock],
) -> Result<Vec<PageBitmap>, Error> {
    let mut pages = Vec::with_capacity(blocks.len());
    for block in blocks {
        let ranges = machine.populated(block).map_err(Error::machine("find the holes of guest memory"))?;
        let mut bitmap = PageBitmap::for_bytes(block.length_bytes());
        ranges.into_iter().for_each(|range| bitmap.set_bytes(range));
        pages.push(bitmap);
    }
    Ok(pages)
}

/// Pages at fixed places, then the sections.
fn mapped(
    out: FileSink<'_>,
    blocks: &[RamBlock],
    pages: &[PageBitmap],
    sections: &Sections<'_>,
    statistics: &Statistics,
) -> Result<u64, Error> {
    let failed = Error::stream(DOING);
    let mut writer = StreamWriter::new(out, &Configuration::mapped(MACHINE)).map_err(&failed)?;
    let list: Vec<_> =
        blocks.iter().map(|block| stream::RamBlock::new(&block.name, block.length_bytes())).collect();
    let mut ram = writer.start_mapped_ram(&list).map_err(&failed)?;
    copy_pages(blocks, pages, &mut writer, &mut ram, DOING, statistics)?;
    ram.finish(&mut writer).map_err(&failed)?;
    writer.device(&DeviceSection::save(SECTION, 0, sections.first)).map_err(&failed)?;
    sections.devices.iter().try_for_each(|section| writer.device(section)).map_err(&failed)?;
    let digest = writer.digest();
    writer.finish_file().map_err(&failed)?;
    Ok(digest)
}

/// Writes pages to their places. What is digested is what is written: a copy that stays in the cache.
pub(super) fn copy_pages(
    blocks: &[RamBlock],
    pages: &[PageBitmap],
    writer: &mut StreamWriter<FileSink<'_>>,
    ram: &mut MappedRamWriter,
    doing: &'static str,
    statistics: &Statistics,
) -> Result<(), Error> {
    let failed = Error::stream(doing);
    let mut piece = vec![0; PIECE_BYTES];
    for (index, (block, bitmap)) in blocks.iter().zip(pages).enumerate() {
        for run in bitmap.runs() {
            for first in run.clone().step_by(PIECE_BYTES / PAGE_BYTES as usize) {
                let offset = first * PAGE_BYTES;
                let length = ((run.end - first) * PAGE_BYTES).min(PIECE_BYTES as u64) as usize;
                let piece = piece.get_mut(..length).unwrap_or_default();
                let slice = block.mapping.get_slice(offset as usize, length);
                let slice = slice
                    .map_err(|source| Error::Machine { doing: "read guest memory", source: source.into() })?;
                slice.copy_to(piece);
                ram.pages(writer, index, offset, piece).map_err(&failed)?;
                statistics.update(|s| {
                    s.remaining_bytes = s.remaining_bytes.saturating_sub(length as u64);
                    s.normal_pages += length as u64 / PAGE_BYTES;
                });
            }
        }
    }
    Ok(())
}

/// Pages in records of the stream, between the beginning of the memory and the sections.
fn stream(
    out: FileSink<'_>,
    blocks: &[RamBlock],
    pages: &[PageBitmap],
    sections: &Sections<'_>,
    statistics: &Statistics,
) -> Result<u64, Error> {
    let out = BufWriter::with_capacity(PIECE_BYTES, out);
    let mut writing = Sender::start(out, MACHINE, blocks, statistics, DOING)?;
    writing.device(&DeviceSection::save(SECTION, 0, sections.first))?;
    writing.last_round(pages)?;
    sections.devices.iter().try_for_each(|section| writing.device(section))?;
    // `finish_file` flushes it.
    let (_, digest) = writing.finish_file()?;
    Ok(digest)
}

/// Counts what goes into the file, and hears the user's wish.
pub(super) struct FileSink<'a> {
    pub draft: &'a mut Draft,
    pub parameters: &'a Parameters,
    pub statistics: &'a Statistics,
}

impl Write for FileSink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.parameters.cancelled() {
            return Err(io::Error::other(Error::Cancelled));
        }
        let count = self.draft.file.write(bytes)?;
        self.statistics.update(|s| s.transferred_bytes += count as u64);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for FileSink<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.draft.file.seek(to)
    }
}
