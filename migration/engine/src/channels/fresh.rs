//! How pages that hold nothing yet are filled.

use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::SeekFrom;
use vm_memory::{FileOffset, VolatileMemory};

use super::wire::Run;
use crate::{Error, FreshMemory, PAGE_BYTES, RamBlock};

/// Where touching memory brought no huge page, it is tried again so much further on.
const ASK_AGAIN_PAGES: u64 = (64 << 20) / PAGE_BYTES;

/// Fresh memory of one block, a memfd. There are three ways to fill it. Which is the fastest depends on the host: a page fault that
/// brings a huge page costs less than anything else, and one that brings a small one twice what it costs to write into the file. Where
/// the machine says so, which it does where there are small pages, it is filled without either: channels that write into one file wait for
/// each other, and the guest's first access to each page would be a fault still.
pub(super) struct Fresh {
    /// Whose pages are filled, and its number there: nobody may touch those that hold nothing.
    filled: Option<(Arc<dyn FreshMemory>, usize)>,
    /// `None` for memory that is only ever touched.
    file: Option<FileOffset>,
    /// From this page on it is asked whether there are huge pages.
    ask_from: u64,
    /// Bytes of the file of which all are there: the last that were found.
    there: Range<u64>,
}

impl Fresh {
    /// Block `number`.
    pub fn of(block: &RamBlock, number: usize, memory: Option<&Arc<dyn FreshMemory>>) -> Self {
        let filled = memory.filter(|memory| memory.has(number));
        let file = block.mapping.file_offset().filter(|memory| {
            // Huge pages that were set aside have a file that is mapped and nothing else. And where the host gives huge pages to shared memory
            // that does not ask, which it says in the same way, write(2) may take one whatever the mapping asks for, in the middle of pages
            // that are to be missing.
            memory.file().metadata().is_ok_and(|found| found.blksize() <= PAGE_BYTES)
        });
        Self {
            filled: filled.map(|memory| (Arc::clone(memory), number)),
            file: file.cloned(),
            ask_from: 0,
            there: 0..0,
        }
    }

    /// The file to write into.
    pub fn file(&self) -> Option<&FileOffset> {
        self.file.as_ref()
    }

    /// Whether pages that hold nothing are [filled](Self::fill), and nobody may touch them.
    pub fn is_filled(&self) -> bool {
        self.filled.is_some()
    }

    /// Fills pages that hold nothing. `false`: not any more, and these may be filled in part.
    pub fn fill(&mut self, offset: u64, pages: &[u8]) -> Result<bool, Error> {
        let Some((memory, block)) = &self.filled else { return Ok(false) };
        if let Err(error) = memory.fill(*block, offset, pages) {
            let error = Error::machine("fill pages of guest memory")(error);
            log::info!("memory comes in another way from here on: {}", error.chain());
            memory.release().map_err(Error::machine("fill guest memory in another way"))?;
            self.filled = None;
        }
        Ok(self.is_filled())
    }

    /// Whether pages of `block`, of which some hold nothing, are better touched than filled or written to the file.
    pub fn is_better_touched(&mut self, block: &RamBlock, run: &Run) -> bool {
        if self.is_filled() {
            return false;
        }
        if self.file.is_none() {
            return true;
        }
        if run.first_page < self.ask_from {
            return false;
        }
        if self.has_all(run) {
            return true;
        }
        // To read is to touch. A run is less than a huge page, and lies in one.
        let touched = block.mapping.get_slice(run.offset_bytes(), 1);
        touched.into_iter().for_each(|byte| {
            byte.copy_to(&mut [0_u8]);
        });
        let has_huge_pages = self.has_all(run);
        if !has_huge_pages {
            self.ask_from = run.first_page.saturating_add(ASK_AGAIN_PAGES);
        }
        has_huge_pages
    }

    /// Whether all of its pages are there. What was found once is remembered: the kernel looks for the next hole page by page.
    fn has_all(&mut self, run: &Run) -> bool {
        let Some(memory) = &self.file else { return false };
        let bounds = || {
            let start = memory.start().checked_add(run.offset_bytes() as u64)?;
            Some(start..start.checked_add(run.length_bytes() as u64)?)
        };
        let Some(bytes) = bounds() else { return false };
        let is_there = |there: &Range<u64>| there.start <= bytes.start && bytes.end <= there.end;
        if !is_there(&self.there) {
            let hole = rustix::fs::seek(memory.file().as_fd(), SeekFrom::Hole(bytes.start));
            self.there = bytes.start..hole.unwrap_or(bytes.start);
        }
        is_there(&self.there)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use dirty_bitmap::DirtyBitmap;
    use vm_memory::bitmap::NewBitmap;
    use vm_memory::mmap::MmapRegionBuilder;

    use super::super::wire::RunKind;
    use super::*;

    /// Fresh memory of 256 MiB, and its file.
    fn memory() -> (RamBlock, Arc<File>) {
        let memfd = rustix::fs::memfd_create("fresh", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = Arc::new(File::from(memfd));
        file.set_len(256 << 20).unwrap();
        let region = MmapRegionBuilder::new_with_bitmap(256 << 20, DirtyBitmap::with_len(256 << 20))
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), 0))
            .with_mmap_prot(nix::libc::PROT_READ | nix::libc::PROT_WRITE)
            .with_mmap_flags(nix::libc::MAP_SHARED);
        (RamBlock { name: "ram".to_owned(), mapping: Arc::new(region.build().unwrap()) }, file)
    }

    fn run(first_page: u64, pages: u64) -> Run {
        Run {
            block: 0,
            kind: RunKind::Data,
            first_page,
            pages,
            contents_bytes: (pages * PAGE_BYTES) as usize,
        }
    }

    fn populated_bytes(file: &File) -> u64 {
        file.metadata().unwrap().blocks() * 512
    }

    #[test]
    fn memory_of_small_pages_is_written_and_asked_once_for_each_64_mebibytes() {
        let (block, file) = memory();
        let mut fresh = Fresh::of(&block, 0, None);
        if fresh.file().is_none() {
            println!("this host gives huge pages to whoever does not ask: memory is touched");
            return;
        }
        assert!(!fresh.is_better_touched(&block, &run(0, 256)));
        if populated_bytes(&file) > PAGE_BYTES {
            println!("this host has pages of other sizes for shared memory");
            return;
        }
        for (first_page, touched) in
            [(0, 1), (256, 1), (16_383, 1), (16_384, 2), (1000, 2), (32_767, 2), (40_000, 3)]
        {
            assert!(!fresh.is_better_touched(&block, &run(first_page, 256)), "{first_page}");
            assert_eq!(populated_bytes(&file), touched * PAGE_BYTES, "{first_page}");
        }
    }

    #[test]
    fn memory_that_came_whole_with_one_of_its_parts_is_touched() {
        let (block, file) = memory();
        let mut fresh = Fresh::of(&block, 0, None);
        // As a huge page would.
        file.write_all_at(&vec![0; 2 << 20], 4 << 20).unwrap();
        for (first_page, pages) in [(1280, 256), (1024, 256), (1535, 1), (1100, 3)] {
            assert!(fresh.is_better_touched(&block, &run(first_page, pages)), "{first_page}");
        }
        assert_eq!(populated_bytes(&file), 2 << 20, "nothing is touched that is there");
        if fresh.file().is_some() {
            file.write_all_at(&[1], 10 << 20).unwrap();
            assert!(!fresh.is_better_touched(&block, &run(2560, 2)), "one of two is there");
        }
    }
}
