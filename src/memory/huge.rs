//! RAM in huge pages of 2 MiB: fewer faults, and shorter walks of page tables.
//!
//! The host reserves huge pages beforehand (`/proc/sys/vm/nr_hugepages`). All that a block can need are taken from the reserve when it is
//! mapped, so that a guest never meets a page that is not there; they are filled one by one as RAM is touched, and what was never touched
//! is a hole, as in other memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use bus::{GuestBitmap, GuestMapping};
use rustix::fs::MemfdFlags;
use vm_memory::FileOffset;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;

/// Bytes of a huge page.
pub(super) const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// What the kernel is asked about at a time.
const PIECE_BYTES: u64 = 64 << 20;
/// Where the kernel tells of its huge pages.
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// The file system of such files, as fstatfs(2) has it.
const HUGETLBFS_MAGIC: i64 = libc::HUGETLBFS_MAGIC;

/// What makes a memfd one of huge pages.
pub(super) const FLAGS: MemfdFlags = MemfdFlags::HUGETLB.union(MemfdFlags::HUGE_2MB);

/// Maps `memfd`, and takes all of its pages from the reserve.
pub(super) fn map(memfd: &Arc<File>, size: usize) -> io::Result<GuestMapping> {
    MmapRegionBuilder::new_with_bitmap(size, GuestBitmap::with_len(size))
        .with_file_offset(FileOffset::from_arc(Arc::clone(memfd), 0))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        // Not MAP_NORESERVE, as for other memory: a page that is missing later is SIGBUS.
        .with_mmap_flags(libc::MAP_SHARED)
        .build()
        .map_err(io::Error::other)
}

/// Whether the pages of `memfd` are huge.
pub(super) fn is_huge(memfd: &File) -> bool {
    rustix::fs::fstatfs(memfd).is_ok_and(|found| found.f_type == HUGETLBFS_MAGIC)
}

/// Bytes of the pages of a memfd. Not what fstat(2) says, which for memory is what the kernel would like to have there.
pub(super) fn page_bytes(memfd: &File) -> io::Result<u64> {
    let found = rustix::fs::fstatfs(memfd)?;
    Ok(if found.f_type == HUGETLBFS_MAGIC { found.f_bsize.unsigned_abs() } else { super::PAGE_SIZE_BYTES })
}

/// Has the next who touches `mapping`, whatever of it, look at the file again.
pub(super) fn forget_mapped(mapping: &GuestMapping) -> io::Result<()> {
    // SAFETY: the range is the mapping, of a file whose contents stay, and which is only reached by volatile accesses.
    match unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the page at `offset` is one that can be touched through `mapping` without looking at the file.
pub(super) fn is_mapped(mapping: &GuestMapping, offset: u64) -> io::Result<bool> {
    let start = offset - offset % super::PAGE_SIZE_BYTES;
    let Some(start) = usize::try_from(start).ok().filter(|start| *start < mapping.size()) else {
        return Ok(false);
    };
    let mut state = 0_u8;
    // SAFETY: the page is within the mapping, and there is a byte for it.
    let result = unsafe {
        libc::mincore(mapping.as_ptr().add(start).cast(), super::PAGE_SIZE_BYTES as usize, &raw mut state)
    };
    if result == 0 { Ok(state & 1 == 1) } else { Err(io::Error::last_os_error()) }
}

/// How many huge pages nobody uses, if the kernel tells.
pub(super) fn free_pages() -> Option<u64> {
    std::fs::read_to_string(FREE).ok()?.trim().parse().ok()
}

/// The byte ranges that hold memory. Seeking finds no holes in such a file, but whoever touches it does so through this mapping. Should
/// someone have filled pages otherwise, all of the block counts.
pub(super) fn populated_ranges(memfd: &File, mapping: &GuestMapping) -> io::Result<Vec<Range<u64>>> {
    let length_bytes = mapping.size() as u64;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut state = vec![0_u8; (PIECE_BYTES / super::PAGE_SIZE_BYTES) as usize];
    for piece in (0..length_bytes).step_by(PIECE_BYTES as usize) {
        let bytes = (length_bytes - piece).min(PIECE_BYTES);
        // SAFETY: the range is within the mapping, and the vector has a byte for each of its pages.
        let result = unsafe {
            libc::mincore(mapping.as_ptr().add(piece as usize).cast(), bytes as usize, state.as_mut_ptr())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let steps = state.iter().step_by((HUGE_PAGE_BYTES / super::PAGE_SIZE_BYTES) as usize);
        for (start, _) in (piece..piece + bytes)
            .step_by(HUGE_PAGE_BYTES as usize)
            .zip(steps)
            .filter(|(_, state)| **state & 1 == 1)
        {
            match ranges.last_mut().filter(|range| range.end == start) {
                Some(range) => range.end += HUGE_PAGE_BYTES,
                None => ranges.push(start..start + HUGE_PAGE_BYTES),
            }
        }
    }
    // After that: what came meanwhile makes the two differ too, which is harmless.
    let filled_bytes = memfd.metadata()?.blocks() * 512;
    let found_bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    if found_bytes != filled_bytes {
        return Ok(std::iter::once(0..length_bytes).collect());
    }
    Ok(ranges)
}

/// On a host that has reserved none a test says so, and tests that. Where `tests/run` has lent some, it fails.
#[cfg(test)]
pub(crate) fn say_that_there_are_none(error: &super::Error) {
    let is_lent = std::env::var("FERRY_HUGE_PAGES").is_ok_and(|value| value == "lent");
    assert!(!is_lent, "huge pages were lent for this test, and there are none: {error}");
    println!("this host has no huge pages: {error}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Error, GuestRam, HugePages, PassedKind, RAM_LOW};

    /// On a host that has reserved some; elsewhere it says so, and checks that the refusal does as well.
    #[test]
    fn ram_in_huge_pages_has_holes_of_their_size_or_is_refused_with_the_reason() {
        let bytes = 8 * HUGE_PAGE_BYTES;
        let ram = match GuestRam::with_pages(bytes, HugePages::Reserved, &[], &[]) {
            Ok(ram) => ram,
            Err(error) => {
                say_that_there_are_none(&error);
                assert!(matches!(error, Error::HugePages { pages: 8, .. }), "{error}");
                assert!(error.to_string().contains("/proc/sys/vm/nr_hugepages"), "{error}");
                return;
            }
        };
        let block = ram.block(RAM_LOW).unwrap();
        assert_eq!(block.populated_ranges().unwrap(), []);
        block.write(HUGE_PAGE_BYTES + 5, &[1]).unwrap();
        block.write(2 * HUGE_PAGE_BYTES, &[1]).unwrap();
        block.write(bytes - 1, &[1]).unwrap();
        let filled = [HUGE_PAGE_BYTES..3 * HUGE_PAGE_BYTES, bytes - HUGE_PAGE_BYTES..bytes];
        assert_eq!(block.populated_ranges().unwrap(), filled);
        // A page stays when a part of it is cleared.
        block.clear(HUGE_PAGE_BYTES, 4096).unwrap();
        let mut cleared = [1; 4096];
        block.read(HUGE_PAGE_BYTES, &mut cleared).unwrap();
        assert_eq!(cleared, [0; 4096]);
        assert_eq!(block.populated_ranges().unwrap(), filled);
        // Someone else's page, which this mapping has not seen.
        let other = map(&block.memfd, bytes as usize).unwrap();
        vm_memory::Bytes::write_obj(&vm_memory::VolatileMemory::as_volatile_slice(&other), 1_u8, 0).unwrap();
        assert!(block.populated_ranges().unwrap().into_iter().eq(std::iter::once(0..bytes)));

        // Memory of another process: this mapping has touched nothing of it.
        let there = GuestRam::with_pages(bytes, HugePages::Reserved, &[], &[]).unwrap();
        let there = there.block(RAM_LOW).unwrap();
        there.write(0x3000, &[7]).unwrap();
        let here = GuestRam::with_pages(bytes, HugePages::Reserved, &[], &[]).unwrap();
        let here = here.block(RAM_LOW).unwrap();
        let (readable, writable) = there.descriptors().unwrap();
        here.map_passed(readable, PassedKind::Memory).unwrap();
        here.adopt(writable).unwrap();
        here.make_writable().unwrap();
        assert!(here.is_huge());
        assert!(here.populated_ranges().unwrap().into_iter().eq(std::iter::once(0..bytes)));
        let mut byte = [0];
        here.read(0x3000, &mut byte).unwrap();
        assert_eq!(byte, [7]);

        let small = GuestRam::with_pages(bytes, HugePages::Transparent, &[], &[]).unwrap();
        let small = small.block(RAM_LOW).unwrap();
        for (block, passed) in [(small, there), (there, small)] {
            let error = block.map_passed(passed.descriptors().unwrap().0, PassedKind::Memory).unwrap_err();
            assert!(error.to_string().contains("its pages have"), "{error}");
        }
    }

    #[test]
    fn more_than_the_host_has_is_refused_with_the_reason() {
        let error = GuestRam::with_pages(1 << 40, HugePages::Reserved, &[], &[]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("524288 huge pages of 2 MiB") || text.contains("ram-low"), "{text}");
        assert!(text.contains("/proc/sys/vm/nr_hugepages"), "{text}");
    }
}
