//! Huge pages that the host gives without having reserved any, where RAM asks for them ([`HugePages::Transparent`]).
//!
//! RAM is shared memory, of which the host's user decides apart (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`, `never` unless
//! it was changed): with `advise` such memory has huge pages as asks for it, and RAM does. A page fault then brings 2 MiB at once: memory
//! fills faster, and the guest's accesses walk shorter page tables. Nothing depends on getting any. A huge page counts as populated,
//! whole, from the first byte that is written to it; memory that is not RAM stays sparse.
//!
//! Where memory is to be missing until it comes, a huge page would fill what is missing with zeros: one that comes into being with a
//! page fault ([`SmallPages`]), one of which a part cannot be given back ([`RamBlock::give_back`]), and one that the kernel's khugepaged
//! makes of small pages and holes, which it does not do once userfaultfd(2) watches them ([`RamBlock::keep_missing`]).
//!
//! None of this holds for who writes to the memfd by write(2): with `always` or `within_size` the kernel may take a huge page for
//! that whatever the mapping asks for. Nobody does there (the engine's data channels ask first).

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bus::GuestMapping;
use rustix::fs::SeekFrom;
use rustix::mm::Advice;

use super::{Error, GuestRam, HugePages, PAGE_SIZE_BYTES, RamBlock, huge};

/// How long a part of a huge page is tried to be given back: what holds one does so for a moment.
const PATIENCE: Duration = Duration::from_millis(100);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(1);

/// Places of a block that are touched, or a few more: the host's memory may be so scattered that there is no huge page at the moment.
const PROBES: u64 = 4;

/// Small pages of a huge one.
const HUGE_PAGES: u64 = huge::HUGE_PAGE_BYTES / PAGE_SIZE_BYTES;

fn advise(start: *mut c_void, length: usize, advice: Advice) -> io::Result<()> {
    // SAFETY: this advice changes in which pages the memory lies, and nothing of its contents.
    match unsafe { rustix::mm::madvise(start, length, advice) } {
        // A kernel without huge pages, which is as well.
        Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Asks for the pages that a block is to have, in a range that is mapped.
pub(super) fn ask_for(pages: HugePages, start: *mut c_void, length: usize) {
    let asked = match pages {
        HugePages::Transparent => advise(start, length, Advice::LinuxHugepage),
        // Some hosts give huge pages to who does not ask.
        HugePages::Off => advise(start, length, Advice::LinuxNoHugepage),
        HugePages::Reserved => Ok(()),
    };
    if let Err(error) = asked {
        log::warn!("cannot say which pages {length} bytes of memory are to lie in: {error}");
    }
}

/// From here on no page fault brings a huge page into a block; those that are there stay. Dropping the last of a block ends that.
#[derive(Debug)]
pub struct SmallPages {
    mapping: Arc<GuestMapping>,
    keepers: Arc<Mutex<usize>>,
}

impl Drop for SmallPages {
    fn drop(&mut self) {
        let mut keepers = self.keepers.lock().unwrap_or_else(PoisonError::into_inner);
        *keepers -= 1;
        if *keepers == 0 {
            ask_for(HugePages::Transparent, self.mapping.as_ptr().cast(), self.mapping.size());
        }
    }
}

impl RamBlock {
    /// After something was mapped anew in its place.
    pub(super) fn ask_for_its_pages(&self) {
        ask_for(self.huge_pages, self.mapping.as_ptr().cast(), self.mapping.size());
    }

    /// Whether page faults would bring huge pages into this block, which is all holes: some places are touched, and are holes again.
    ///
    /// # Errors
    /// Those of [`Self::give_back`].
    pub fn would_get_huge_pages(&self) -> Result<bool, Error> {
        if self.huge_pages != HugePages::Transparent {
            return Ok(self.huge_pages == HugePages::Reserved);
        }
        let places = self.pages() / HUGE_PAGES;
        for place in (0..places).step_by((places / PROBES).max(1) as usize) {
            let start = place * huge::HUGE_PAGE_BYTES;
            // To read is to touch.
            self.read(start, &mut [0])?;
            let is_huge = self.is_populated(start + huge::HUGE_PAGE_BYTES - PAGE_SIZE_BYTES)?;
            self.give_back(start, huge::HUGE_PAGE_BYTES)?;
            if is_huge {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// See [`SmallPages`]. `None` for a block that has none in any case, or others that are all there.
    ///
    /// # Errors
    /// [`Error::Access`]: the kernel refuses.
    pub fn keep_small(&self) -> Result<Option<SmallPages>, Error> {
        if self.huge_pages != HugePages::Transparent {
            return Ok(None);
        }
        let mut count = self.keepers.lock().unwrap_or_else(PoisonError::into_inner);
        if *count == 0 {
            // A fault that is being served is over when this returns.
            advise(self.mapping.as_ptr().cast(), self.mapping.size(), Advice::LinuxNoHugepage)
                .map_err(|source| self.access_failed("keep small pages", source))?;
        }
        *count += 1;
        Ok(Some(SmallPages { mapping: Arc::clone(&self.mapping), keepers: Arc::clone(&self.keepers) }))
    }

    /// Makes sure that runs of pages that were [given back](Self::give_back) before userfaultfd(2) watched them are holes, now that it
    /// does: khugepaged may have been at work in between. It fills all holes of a huge page's range, so that one look at each will do.
    ///
    /// # Errors
    /// Those of [`Self::give_back`].
    pub fn keep_missing(&self, runs: impl Iterator<Item = Range<u64>>) -> Result<(), Error> {
        if self.huge_pages != HugePages::Transparent {
            return Ok(());
        }
        // Below this page there is a hole, or a huge page's range that has one: the guest stands still, and each look is a system call.
        let mut looked_until = 0;
        for run in runs {
            let mut start = run.start.max(looked_until);
            while start < run.end {
                let end_of_range = (start / HUGE_PAGES + 1) * HUGE_PAGES;
                let data = self.seek(SeekFrom::Data(start * PAGE_SIZE_BYTES))?;
                let data = data.map_or_else(|| self.pages(), |data| data / PAGE_SIZE_BYTES);
                if data > start {
                    looked_until = end_of_range.max(data);
                    start = looked_until;
                } else {
                    let end = run.end.min(end_of_range);
                    self.give_back(start * PAGE_SIZE_BYTES, (end - start) * PAGE_SIZE_BYTES)?;
                    start = end;
                }
            }
        }
        Ok(())
    }

    /// As [`Self::clear`] for memory that has holes, and makes sure that whole pages are one now: the kernel fills the part of a huge
    /// page that it cannot split at the moment with zeros instead, which whoever is to wait for that part would take for its contents.
    ///
    /// # Errors
    /// Those of [`Self::clear`]; [`Error::Held`]: some are zeros.
    pub fn give_back(&self, offset: u64, length_bytes: u64) -> Result<(), Error> {
        let since = Instant::now();
        loop {
            self.clear(offset, length_bytes)?;
            let end = offset.saturating_add(length_bytes);
            if self.seek(SeekFrom::Data(offset))?.is_none_or(|start| start >= end) {
                return Ok(());
            }
            if since.elapsed() >= PATIENCE {
                return Err(Error::Held { name: self.name.clone(), offset, length_bytes });
            }
            thread::sleep(PAUSE);
        }
    }
}

impl GuestRam {
    /// [`RamBlock::keep_small`] for every block.
    ///
    /// # Errors
    /// As there.
    pub fn keep_small(&self) -> Result<Vec<SmallPages>, Error> {
        self.blocks().iter().filter_map(|block| block.keep_small().transpose()).collect()
    }
}

#[cfg(test)]
mod tests {
    use rustix::pipe::SpliceFlags;

    use super::*;
    use crate::memory::huge::HUGE_PAGE_BYTES;
    use crate::memory::{PAGE_SIZE_BYTES as PAGE, RAM_LOW};

    fn populated(block: &RamBlock) -> Vec<Range<u64>> {
        block.populated_ranges().unwrap()
    }

    /// The size of the pages that RAM gets here: the host decides.
    fn page_bytes() -> u64 {
        let ram = GuestRam::new(2 * HUGE_PAGE_BYTES, &[]).unwrap();
        ram.block(RAM_LOW).unwrap().write(PAGE, &[1]).unwrap();
        let found = populated(ram.block(RAM_LOW).unwrap());
        let is_lent = std::env::var("FERRY_TRANSPARENT_HUGE_PAGES").is_ok_and(|value| value == "lent");
        match found.as_slice() {
            [range] if *range == (0..HUGE_PAGE_BYTES) => HUGE_PAGE_BYTES,
            [range] if *range == (PAGE..2 * PAGE) => {
                assert!(!is_lent, "the host was told to give huge pages for this test, and gives none");
                println!("this host gives no transparent huge pages: testing small ones");
                PAGE
            }
            _ => panic!(
                "this host gives pages of other sizes to shared memory, which these tests do not know: {found:?}"
            ),
        }
    }

    #[test]
    fn ram_fills_by_huge_pages_where_the_host_gives_them_and_nothing_else_does() {
        let page_bytes = page_bytes();
        let bytes = 4 * HUGE_PAGE_BYTES;
        let ram = GuestRam::with_buffers(bytes, &[("namespace".into(), bytes)], &[("buffer".into(), bytes)])
            .unwrap();
        for block in ram.blocks() {
            block.write(HUGE_PAGE_BYTES + PAGE, &[1]).unwrap();
            let filled = match block.guest_base {
                Some(_) if page_bytes > PAGE => HUGE_PAGE_BYTES..2 * HUGE_PAGE_BYTES,
                _ => HUGE_PAGE_BYTES + PAGE..HUGE_PAGE_BYTES + 2 * PAGE,
            };
            assert_eq!(populated(block), std::slice::from_ref(&filled), "{}", block.name);
        }
        // Memory of another process has its pages, and grows by such as we ask for.
        let next = GuestRam::new(bytes, &[]).unwrap();
        let (there, here) = (ram.block(RAM_LOW).unwrap(), next.block(RAM_LOW).unwrap());
        let (readable, writable) = there.descriptors().unwrap();
        here.map_passed(readable, crate::memory::PassedKind::Memory).unwrap();
        here.adopt(writable).unwrap();
        next.make_writable().unwrap();
        here.write(3 * HUGE_PAGE_BYTES + PAGE, &[1]).unwrap();
        let grown = populated(here).last().map(|range| range.end - range.start);
        assert_eq!(grown, Some(page_bytes));
    }

    #[test]
    fn whether_huge_pages_would_come_is_known_and_leaves_nothing() {
        let is_huge = page_bytes() > PAGE;
        for (huge_pages, expected) in [(HugePages::Transparent, is_huge), (HugePages::Off, false)] {
            let other = ("namespace".to_owned(), 4 * HUGE_PAGE_BYTES);
            let ram = GuestRam::with_pages(9 * HUGE_PAGE_BYTES, huge_pages, &[other], &[]).unwrap();
            let [low, other] = ram.blocks() else { panic!("there are two") };
            assert_eq!(low.would_get_huge_pages().unwrap(), expected, "{huge_pages:?}");
            assert!(!other.would_get_huge_pages().unwrap(), "memory that is not RAM stays sparse");
            assert_eq!([low, other].map(populated), [[], []]);
        }
        let small = GuestRam::new(HUGE_PAGE_BYTES / 2, &[]).unwrap();
        assert!(!small.block(RAM_LOW).unwrap().would_get_huge_pages().unwrap());
    }

    #[test]
    fn none_comes_into_being_while_pages_are_kept_small() {
        let page_bytes = page_bytes();
        let ram = GuestRam::new(4 * HUGE_PAGE_BYTES, &[]).unwrap();
        let block = ram.block(RAM_LOW).unwrap();
        let (small, other) = (block.keep_small().unwrap(), ram.keep_small().unwrap());
        block.write(PAGE, &[1]).unwrap();
        drop(small);
        block.write(3 * PAGE, &[1]).unwrap();
        assert_eq!(populated(block), [PAGE..2 * PAGE, 3 * PAGE..4 * PAGE]);
        drop(other);
        block.write(HUGE_PAGE_BYTES, &[1]).unwrap();
        assert_eq!(populated(block).pop(), Some(HUGE_PAGE_BYTES..HUGE_PAGE_BYTES + page_bytes));
    }

    #[test]
    fn what_was_filled_before_it_was_watched_is_given_back_again() {
        let ram = GuestRam::new(8 * HUGE_PAGE_BYTES, &[]).unwrap();
        let block = ram.block(RAM_LOW).unwrap();
        let _small = ram.keep_small().unwrap();
        let is_there = |page: u64| block.is_populated(page * PAGE).unwrap();
        // As khugepaged does it: the holes of a huge page, all or none.
        let filled = HUGE_PAGES..2 * HUGE_PAGES;
        filled.clone().for_each(|page| block.write(page * PAGE, &[0]).unwrap());
        block.write(3 * HUGE_PAGES * PAGE, &[7]).unwrap();
        let missing = [5..6, 500..HUGE_PAGES + 3, HUGE_PAGES + 9..HUGE_PAGES + 10, 1000..1700, 1800..2100];
        block.keep_missing(missing.iter().cloned()).unwrap();
        assert!(!missing.iter().cloned().flatten().any(is_there));
        let others = filled.filter(|page| !missing.iter().any(|run| run.contains(page)));
        assert!(others.clone().count() > 400 && { others }.all(is_there), "what was not named stays");
    }

    #[test]
    fn a_part_of_a_huge_page_is_a_hole_when_it_was_given_back_or_that_is_said() {
        let page_bytes = page_bytes();
        let ram = GuestRam::new(2 * HUGE_PAGE_BYTES, &[]).unwrap();
        let block = ram.block(RAM_LOW).unwrap();
        for page in 0..8 {
            block.write(page * PAGE, &[7; 4]).unwrap();
        }
        block.give_back(3 * PAGE, 2 * PAGE).unwrap();
        assert_eq!(populated(block)[0], 0..3 * PAGE);
        assert_eq!(populated(block)[1].start, 5 * PAGE);

        // A page in a pipe, which holds it.
        let ram = GuestRam::new(2 * HUGE_PAGE_BYTES, &[]).unwrap();
        let block = ram.block(RAM_LOW).unwrap();
        (0..8).for_each(|page| block.write(page * PAGE, &[7; 4]).unwrap());
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        // SAFETY: the bytes are in the mapping, of which nobody else knows.
        let held = unsafe { std::slice::from_raw_parts(block.mapping.as_ptr(), 4) };
        // SAFETY: the pipe takes a reference to the page, and nothing is given to it.
        let taken = unsafe {
            rustix::pipe::vmsplice(
                &writer,
                &[rustix::pipe::IoSliceRaw::from_slice(held)],
                SpliceFlags::empty(),
            )
        };
        assert_eq!(taken, Ok(4));
        let given = block.give_back(3 * PAGE, 2 * PAGE);
        match page_bytes > PAGE {
            true => {
                let error = given.unwrap_err();
                assert!(matches!(error, Error::Held { offset: 0x3000, length_bytes: 0x2000, .. }), "{error}");
                let mut bytes = [1; 4];
                block.read(3 * PAGE, &mut bytes).unwrap();
                assert_eq!(bytes, [0; 4], "zeros, which are no hole");
            }
            false => given.unwrap(),
        }
    }
}
