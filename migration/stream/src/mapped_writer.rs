//! Writing RAM in the mapped layout.

use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;

use vmstate::{Bitmap, Value};

use crate::digest::{Digests, Pieces};
use crate::mapped::MappedBlock;
use crate::ram::{self, PAGE_BYTES, RamBlock, flag};
use crate::wire::mark;
use crate::writer::{StreamWriter, save_footer};
use crate::{Error, page_map};

/// RAM in the mapped layout, which must be finished before a device is written.
///
/// Pages are written to their places in any order. Those that hold nothing but zeros are not written: they stay holes of the file.
/// In a [`layer`](Self::layer) over another file they are there all the same, as holes that the bitmap has.
#[derive(Debug)]
#[must_use = "RAM that is not finished breaks the file"]
pub struct MappedRamWriter {
    id: u32,
    blocks: Vec<RamBlock>,
    places: Vec<MappedBlock>,
    /// The pages that were written.
    present: Vec<Bitmap>,
    /// Of pages that may be written again, the digest of each that was written. Empty if they may not.
    digests: Vec<Vec<u64>>,
    /// Pages of zeros are in the file too.
    keeps_zeros: bool,
}

impl<W: Write + Seek> StreamWriter<W> {
    /// Starts the RAM section of a file with the mapped layout: the list of blocks and where they are.
    ///
    /// # Errors
    ///
    /// If the configuration is not [`mapped`](crate::Configuration::mapped), the blocks cannot be written, or the file fails.
    pub fn start_mapped_ram(&mut self, blocks: &[RamBlock]) -> Result<MappedRamWriter, Error> {
        self.check_layout(true)?;
        let mut offset = self.out.stream_position().map_err(Error::write("RAM"))?;
        let id = self.next_id();
        let mut total = Vec::new();
        ram::save_total(blocks, &mut total)?;
        let mut piece = self.section(mark::SECTION_START, ram::NAME, 0, ram::VERSION, &total)?;
        let (mut section, mut places) = (Vec::new(), Vec::new());
        for block in blocks {
            ram::save_block(block, &mut piece);
            let place = MappedBlock::place(block, offset + piece.len() as u64)?;
            place.save(&mut piece);
            self.write_at(offset, &piece)?;
            section.append(&mut piece);
            offset = place.end();
            places.push(place);
        }
        flag::END.save(&mut piece);
        section.extend_from_slice(&piece);
        self.digests.section(id, ram::NAME, &section);
        self.digests.ram_blocks(blocks, true)?;
        save_footer(id, &mut piece);
        self.write_at(offset, &piece)?;
        let present = blocks.iter().map(|block| Bitmap::new(ram::pages(block.length_bytes) as usize));
        Ok(MappedRamWriter {
            id,
            blocks: blocks.to_vec(),
            places,
            present: present.collect(),
            digests: Vec::new(),
            keeps_zeros: false,
        })
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let sought = self.out.seek(SeekFrom::Start(offset));
        sought.and_then(|_| self.out.write_all(bytes)).map_err(Error::write("RAM"))
    }
}

impl MappedRamWriter {
    /// Lets pages be written more than once, as one must who follows a guest that runs: the last time counts. Costs 8 bytes a page.
    pub fn following(mut self) -> Self {
        let pages = |place: &MappedBlock| vec![0; ram::pages(place.block.length_bytes) as usize];
        self.digests = self.places.iter().map(pages).collect();
        self
    }

    /// What is not written is not zero, but what another file has in its place. Costs as much as [`following`](Self::following), which it
    /// includes.
    pub fn layer(self) -> Self {
        MappedRamWriter { keeps_zeros: true, ..self.following() }
    }

    /// Where the blocks are in the file.
    pub fn blocks(&self) -> &[MappedBlock] {
        &self.places
    }

    /// Writes whole pages that follow each other, from `offset` of block number `block` on, each page once unless this is
    /// [`following`](Self::following) a guest.
    ///
    /// # Errors
    ///
    /// If the pages are not whole, not inside the block or were written before, or the file fails.
    pub fn pages<W: Write + Seek>(
        &mut self,
        stream: &mut StreamWriter<W>,
        block: usize,
        offset: u64,
        pages: &[u8],
    ) -> Result<(), Error> {
        ram::check_pages(&self.blocks, block, offset, pages.len() as u64)?;
        let (place, present) = (&self.places[block], &mut self.present[block]); // one for each block
        let first = ram::pages(offset) as usize;
        let count = pages.len() / PAGE_BYTES;
        let written: Vec<_> = (first..first + count).filter(|page| present.get(*page)).collect();
        if let Some(digests) = self.digests.get(block) {
            for &page in &written {
                stream.digests.forget_ram_page(block, (page * PAGE_BYTES) as u64, digests[page]);
                present.set(page, false);
            }
        } else if let Some(page) = written.first() {
            let name = &place.block.name;
            return Err(Error::Ram(format!("page {page:#x} of block {name:?} is written a second time")));
        }
        let mut note = |digests: &mut Digests, at: u64, page: &[u8]| {
            let digest = digests.ram_page(block, at, page);
            present.set(ram::pages(at) as usize, true);
            if let Some(digests) = self.digests.get_mut(block) {
                digests[ram::pages(at) as usize] = digest; // one for each page
            }
        };
        let resume = stream.out.stream_position().map_err(Error::write("RAM"))?;
        for run in runs_of_data(pages) {
            let bytes = &pages[run.clone()];
            stream.write_at(place.pages_offset + offset + run.start as u64, bytes)?;
            for (index, page) in bytes.chunks(PAGE_BYTES).enumerate() {
                note(&mut stream.digests, offset + (run.start + index * PAGE_BYTES) as u64, page);
            }
        }
        if self.keeps_zeros {
            let zeros = pages.chunks(PAGE_BYTES).zip(first..).filter(|(page, _)| holds_only_zeros(page));
            for (page, number) in zeros {
                let at = (number * PAGE_BYTES) as u64;
                // A hole reads as zeros; what was written there before does not.
                if written.binary_search(&number).is_ok() {
                    stream.write_at(place.pages_offset + at, page)?;
                }
                note(&mut stream.digests, at, page);
            }
        }
        stream.out.seek(SeekFrom::Start(resume)).map_err(Error::write("RAM"))?;
        Ok(())
    }

    /// Ends RAM: the bitmaps, and what the sections say of it.
    ///
    /// # Errors
    ///
    /// If the file fails.
    pub fn finish<W: Write + Seek>(self, stream: &mut StreamWriter<W>) -> Result<(), Error> {
        let resume = stream.out.stream_position().map_err(Error::write("RAM"))?;
        let mut digest = Pieces::default();
        for (place, present) in self.places.iter().zip(&self.present) {
            let mut bytes = Vec::new();
            page_map::save(present, &mut bytes);
            digest.add(&bytes);
            stream.write_at(place.bitmap_offset, &bytes)?;
        }
        stream.digests.bitmaps(digest.digest());
        let mut end = vec![mark::SECTION_END];
        self.id.save(&mut end);
        flag::END.save(&mut end);
        save_footer(self.id, &mut end);
        stream.write_at(resume, &end)
    }
}

/// The runs of pages that hold something else than zeros.
fn runs_of_data(pages: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut next = 0;
    let is_zero = |at: usize| pages.get(at..at + PAGE_BYTES).is_some_and(holds_only_zeros);
    std::iter::from_fn(move || {
        while is_zero(next) {
            next += PAGE_BYTES;
        }
        let start = next;
        while next < pages.len() && !is_zero(next) {
            next += PAGE_BYTES;
        }
        (start < next).then_some(start..next)
    })
}

fn holds_only_zeros(page: &[u8]) -> bool {
    let (pieces, _none_left) = page.as_chunks::<128>();
    // In pieces, so that a page with data is seen at its beginning; of bytes, which the compiler folds in vectors.
    pieces.iter().all(|piece| piece.iter().fold(0, |any, byte| any | byte) == 0)
}
