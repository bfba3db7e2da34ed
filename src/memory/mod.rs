//! Guest RAM: one sealed memfd a block, mapped shared, with the bitmap of the pages that this process wrote.
//!
//! A *block* is what migration moves: `ram-low`, `ram-high` (what is above 3 GiB, see [`crate::layout`]), one for
//! each namespace that lives in memory and one for each controller memory buffer and persistent memory region. The first two are in the guest's address space and in
//! a KVM slot; a namespace's block is reached only by the NVMe controller; a buffer has a KVM slot, and is where the guest puts it.
//!
//! Invariants: a block never changes its size (the memfd is sealed, so that no holder of the descriptor can turn an
//! access into SIGBUS), also when its memory came from another process (`passed`); names are unique; nothing outside this module makes a pointer from a mapping. A persistent memory region whose
//! contents are a file (`file`) is as safe as the folder that the file is in: who cuts it short there ends the process.
//!
//! Absent: KVM (slots are numbers here, registered by [`crate::kvm::Vm`]), dirty tracking ([`crate::dirty`]), policy on
//! what to send when.
#![allow(unsafe_code)]

mod file;
mod huge;
mod passed;
mod transparent;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use bus::{GuestBitmap, GuestMapping, GuestMemory, GuestRegion};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, SealFlags, SeekFrom};
use vm_memory::bitmap::RefSlice;
use vm_memory::{FileOffset, GuestAddress, VolatileMemory, VolatileSlice};

use crate::layout;
#[cfg(test)]
pub(crate) use huge::say_that_there_are_none;
pub use passed::Kind as PassedKind;
use passed::Passed;
pub use transparent::SmallPages;

/// Size of a page in bytes: the unit of dirty tracking and of transfer.
pub const PAGE_SIZE_BYTES: u64 = 4096;

/// Name of the block at guest physical address 0.
pub const RAM_LOW: &str = "ram-low";
/// Name of the block at [`layout::HIGH_RAM_START`].
pub const RAM_HIGH: &str = "ram-high";

/// KVM memory slots of device memory begin after those of RAM.
const FIRST_BUFFER_SLOT: u32 = 2;

/// A part of a block, through which the device models' bitmap sees writes.
pub type RamSlice<'a> = VolatileSlice<'a, RefSlice<'a, GuestBitmap>>;

/// Why guest memory could not be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A size that is zero, no multiple of a page, or larger than an address space.
    #[error("memory block \"{name}\" of {length_bytes} bytes: the size must be a positive multiple of 4096")]
    BadSize {
        /// The block.
        name: String,
        /// The size asked for.
        length_bytes: u64,
    },
    /// Two blocks of one name.
    #[error("two memory blocks are named \"{0}\"")]
    DuplicateName(String),
    /// The kernel refused the memory.
    #[error("cannot {what} for memory block \"{name}\" of {length_bytes} bytes")]
    Create {
        /// The step that failed.
        what: &'static str,
        /// The block.
        name: String,
        /// Its size.
        length_bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// The host has not enough huge pages.
    #[error(
        "cannot take {pages} huge pages of 2 MiB for memory block \"{name}\": {}; /proc/sys/vm/nr_hugepages says how many the host reserves \
         (--hugepages=transparent takes such as it gives, and needs none)",
        .free.map_or("the host has none of that size".to_owned(), |free| format!("{free} are free"))
    )]
    HugePages {
        /// The block.
        name: String,
        /// How many it needs.
        pages: u64,
        /// How many nobody uses.
        free: Option<u64>,
        /// Why.
        source: io::Error,
    },
    /// The blocks do not make an address space.
    #[error("the memory blocks do not form a guest address space")]
    AddressSpace(#[source] vm_memory::guest_memory::Error),
    /// The regions overlap or are out of order.
    #[error("the memory blocks overlap in the guest address space")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
    /// Another process passed memory that the block cannot be.
    #[error("cannot take over memory block \"{name}\" of {length_bytes} bytes: {reason}")]
    Passed {
        /// The block.
        name: String,
        /// Its size.
        length_bytes: u64,
        /// What is wrong.
        reason: String,
    },
    /// An access beyond the end of a block.
    #[error(
        "bytes {offset:#x}+{length_bytes:#x} are outside memory block \"{name}\" of {block_bytes:#x} bytes"
    )]
    OutOfBounds {
        /// The block.
        name: String,
        /// First byte.
        offset: u64,
        /// Bytes.
        length_bytes: u64,
        /// Size of the block.
        block_bytes: u64,
    },
    /// Something holds a huge page of which a part was to be given back.
    #[error(
        "cannot give back bytes {offset:#x}+{length_bytes:#x} of memory block \"{name}\": something holds the huge page that they are in"
    )]
    Held {
        /// The block.
        name: String,
        /// First byte.
        offset: u64,
        /// Bytes.
        length_bytes: u64,
    },
    /// The memfd could not be asked or changed.
    #[error("cannot {what} in memory block \"{name}\" at offset {offset:#x}")]
    Access {
        /// The step that failed.
        what: &'static str,
        /// The block.
        name: String,
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
}

/// Which huge pages RAM lies in. Other memory has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum HugePages {
    /// None.
    Off,
    /// Those that the host gives.
    #[default]
    Transparent,
    /// Only such as the host has set aside.
    Reserved,
}

/// One block of memory that travels with the guest.
#[derive(Clone, Debug)]
pub struct RamBlock {
    /// Unique name, also in the migration stream.
    pub name: String,
    /// The mapping and the bitmap of this process's own writes.
    pub mapping: Arc<GuestMapping>,
    /// The memory that it had at first.
    memfd: Arc<File>,
    /// The memory that it is instead, if it came from another process.
    passed: Arc<OnceLock<Passed>>,
    /// The file that it is instead, from some moment on.
    file: Arc<OnceLock<File>>,
    /// Where the guest sees it as RAM; `None` for memory that a device model reaches.
    pub guest_base: Option<u64>,
    /// The KVM memory slot: of RAM, and of device memory that the guest sees where and while it wants to.
    pub kvm_slot: Option<u32>,
    /// What it asks for.
    huge_pages: HugePages,
    /// By how many it is kept in small pages at the moment.
    keepers: Arc<Mutex<usize>>,
}

impl RamBlock {
    fn new(
        name: &str,
        length_bytes: u64,
        guest_base: Option<u64>,
        kvm_slot: Option<u32>,
        huge: HugePages,
    ) -> Result<Self, Error> {
        let is_reserved = huge == HugePages::Reserved;
        let size = usize::try_from(length_bytes)
            .ok()
            .filter(|_| length_bytes > 0 && length_bytes.is_multiple_of(PAGE_SIZE_BYTES))
            .ok_or_else(|| Error::BadSize { name: name.to_owned(), length_bytes })?;
        let create = |what, source| Error::Create { what, name: name.to_owned(), length_bytes, source };
        let refused = |source| Error::HugePages {
            name: name.to_owned(),
            pages: length_bytes.div_ceil(huge::HUGE_PAGE_BYTES),
            free: huge::free_pages(),
            source,
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = if is_reserved {
            rustix::fs::memfd_create(name, flags | huge::FLAGS).map_err(|e| refused(e.into()))?
        } else {
            rustix::fs::memfd_create(name, flags).map_err(|e| create("create a memfd", e.into()))?
        };
        rustix::fs::ftruncate(&memfd, length_bytes).map_err(|e| create("set the size", e.into()))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&memfd, seals).map_err(|e| create("seal the size", e.into()))?;
        // Who is given a descriptor that only reads does not open another one that writes, unless it is our user's.
        rustix::fs::fchmod(&memfd, Mode::RUSR | Mode::WUSR).map_err(|e| create("set the mode", e.into()))?;
        let memfd = Arc::new(File::from(memfd));
        let mapping = if is_reserved {
            huge::map(&memfd, size).map_err(refused)?
        } else {
            GuestMapping::from_file(FileOffset::from_arc(Arc::clone(&memfd), 0), size)
                .map_err(|e| create("map the memfd", io::Error::other(e)))?
        };
        let block = Self {
            name: name.to_owned(),
            mapping: Arc::new(mapping),
            memfd,
            passed: Arc::default(),
            file: Arc::default(),
            guest_base,
            kvm_slot,
            huge_pages: huge,
            keepers: Arc::default(),
        };
        block.ask_for_its_pages();
        Ok(block)
    }

    /// The memory as a descriptor.
    #[must_use]
    pub fn memfd(&self) -> &File {
        self.passed.get().and_then(Passed::memory).unwrap_or(&self.memfd)
    }

    /// Size in bytes, a multiple of [`PAGE_SIZE_BYTES`].
    #[must_use]
    pub fn length_bytes(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// Size in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.length_bytes() / PAGE_SIZE_BYTES
    }

    /// Whether its pages are huge. Those of memory that came from another process are as they were there.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        huge::is_huge(self.memfd())
    }

    /// Bytes of the pages that it lies in.
    ///
    /// # Errors
    /// [`Error::Access`]: the kernel does not say.
    pub fn page_bytes(&self) -> Result<u64, Error> {
        let failed = |source| self.access_failed("ask for the size of the pages", source);
        huge::page_bytes(self.memfd()).map_err(failed)
    }

    /// A second mapping of memory in huge pages, to fill pages that nobody is to see yet. What is written there is not marked in the
    /// block's bitmap.
    ///
    /// # Errors
    /// [`Error::Access`].
    pub fn map_parts(&self) -> Result<GuestMapping, Error> {
        let failed = |source| self.access_failed("map huge pages for their parts", source);
        huge::map(&self.memfd, self.mapping.size()).map_err(failed)
    }

    /// Has whoever touches memory in huge pages from now on look at its file again, which stays as it is.
    ///
    /// # Errors
    /// [`Error::Access`]: the kernel is older than Linux 5.18.
    pub fn forget_mapped(&self) -> Result<(), Error> {
        let failed = |source| self.access_failed("unmap huge pages (Linux 5.18 can)", source);
        huge::forget_mapped(&self.mapping).map_err(failed)
    }

    fn access_failed(&self, what: &'static str, source: io::Error) -> Error {
        Error::Access { what, name: self.name.clone(), offset: 0, source }
    }

    /// The bytes `[offset, offset + length_bytes)`.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`].
    pub fn slice(&self, offset: u64, length_bytes: u64) -> Result<RamSlice<'_>, Error> {
        let range = usize::try_from(offset).ok().zip(usize::try_from(length_bytes).ok());
        range.and_then(|(offset, length)| self.mapping.get_slice(offset, length).ok()).ok_or_else(|| {
            Error::OutOfBounds {
                name: self.name.clone(),
                offset,
                length_bytes,
                block_bytes: self.length_bytes(),
            }
        })
    }

    /// Copies the bytes at `offset` into `data`. A page that was never populated becomes populated: ask
    /// [`Self::populated_ranges`] first.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`].
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.slice(offset, data.len() as u64)?.copy_to(data);
        Ok(())
    }

    /// Copies `data` to `offset` and marks the pages as written by this process.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.slice(offset, data.len() as u64)?.copy_from(data);
        Ok(())
    }

    /// Makes whole pages zero by giving their memory back; costs nothing where nothing was populated.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`], also for a range that does not begin and end on a page; [`Error::Access`] when the
    /// kernel refuses.
    pub fn clear(&self, offset: u64, length_bytes: u64) -> Result<(), Error> {
        if length_bytes == 0 {
            return Ok(());
        }
        let slice = self.slice(offset, length_bytes)?;
        if !offset.is_multiple_of(PAGE_SIZE_BYTES) || !length_bytes.is_multiple_of(PAGE_SIZE_BYTES) {
            let (name, block_bytes) = (self.name.clone(), self.length_bytes());
            return Err(Error::OutOfBounds { name, offset, length_bytes, block_bytes });
        }
        if self.file.get().is_some() || self.is_huge() {
            // It has no holes, or none of this size.
            slice.copy_from(&vec![0u8; slice.len()]);
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(self.memfd(), mode, offset, length_bytes)
            .map_err(|e| self.access("punch a hole", offset, e))?;
        vm_memory::bitmap::Bitmap::mark_dirty(self.mapping.bitmap(), offset as usize, length_bytes as usize);
        Ok(())
    }

    /// The byte ranges that hold memory, in order and disjoint; everything else reads as zero and need not be read.
    /// The answer is a moment's: what the guest touches later is found by dirty tracking.
    ///
    /// # Errors
    /// [`Error::Access`].
    pub fn populated_ranges(&self) -> Result<Vec<Range<u64>>, Error> {
        if self.file.get().is_some() {
            return Ok(std::iter::once(0..self.length_bytes()).collect());
        }
        if self.is_huge() {
            let failed = |source| self.access_failed("look for populated huge pages", source);
            return huge::populated_ranges(self.memfd(), &self.mapping).map_err(failed);
        }
        let mut ranges = Vec::new();
        let mut end = 0;
        while let Some(start) = self.seek(SeekFrom::Data(end))? {
            // A hole follows at the latest at the end of the file.
            end = self.seek(SeekFrom::Hole(start))?.unwrap_or_else(|| self.length_bytes());
            ranges.push(start..end);
        }
        Ok(ranges)
    }

    /// Whether the page at `offset` holds memory, as [`Self::populated_ranges`] has it. Of memory in huge pages, see
    /// [`Self::is_mapped`].
    ///
    /// # Errors
    /// [`Error::Access`].
    pub fn is_populated(&self, offset: u64) -> Result<bool, Error> {
        Ok(self.seek(SeekFrom::Data(offset))?.is_some_and(|start| start < offset + PAGE_SIZE_BYTES))
    }

    /// Whether the huge page at `offset` is one that the guest's mapping knows: nobody waits for it.
    ///
    /// # Errors
    /// [`Error::Access`].
    pub fn is_mapped(&self, offset: u64) -> Result<bool, Error> {
        let what = "look for a huge page";
        let failed = |source| Error::Access { what, name: self.name.clone(), offset, source };
        huge::is_mapped(&self.mapping, offset).map_err(failed)
    }

    /// `None` when there is nothing of that kind up to the end of the file.
    fn seek(&self, to: SeekFrom) -> Result<Option<u64>, Error> {
        match rustix::fs::seek(self.memfd(), to) {
            Ok(offset) => Ok(Some(offset)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(errno) => Err(self.access("look for populated pages", 0, errno)),
        }
    }

    fn access(&self, what: &'static str, offset: u64, errno: rustix::io::Errno) -> Error {
        Error::Access { what, name: self.name.clone(), offset, source: errno.into() }
    }
}

/// All memory of one guest.
#[derive(Clone, Debug)]
pub struct GuestRam {
    blocks: Vec<RamBlock>,
    memory: GuestMemory,
}

impl GuestRam {
    /// Makes `memory_bytes` of RAM, split around the 32-bit hole, and one block for each `(name, bytes)` of
    /// `extra_blocks`, which the guest does not see.
    ///
    /// # Errors
    /// [`Error::BadSize`], [`Error::DuplicateName`], [`Error::Create`].
    pub fn new(memory_bytes: u64, extra_blocks: &[(String, u64)]) -> Result<Self, Error> {
        Self::with_buffers(memory_bytes, extra_blocks, &[])
    }

    /// The same with a block for each `(name, bytes)` of `buffers`: memory of devices that the guest sees where and while it wants to.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_buffers(
        memory_bytes: u64,
        extra_blocks: &[(String, u64)],
        buffers: &[(String, u64)],
    ) -> Result<Self, Error> {
        Self::with_pages(memory_bytes, HugePages::default(), extra_blocks, buffers)
    }

    /// The same with RAM, of a multiple of 2 MiB, in huge pages of that kind.
    ///
    /// # Errors
    /// As [`Self::new`], and [`Error::HugePages`].
    pub fn with_pages(
        memory_bytes: u64,
        huge: HugePages,
        extra_blocks: &[(String, u64)],
        buffers: &[(String, u64)],
    ) -> Result<Self, Error> {
        let low_bytes = memory_bytes.min(layout::LOW_RAM_END);
        let mut blocks = vec![RamBlock::new(RAM_LOW, low_bytes, Some(0), Some(0), huge)?];
        if memory_bytes > low_bytes {
            let (base, slot) = (Some(layout::HIGH_RAM_START), Some(1));
            blocks.push(RamBlock::new(RAM_HIGH, memory_bytes - low_bytes, base, slot, huge)?);
        }
        let regions = blocks
            .iter()
            .filter_map(|block| block.guest_base.map(|base| (block, base)))
            .map(|(block, base)| {
                GuestRegion::with_arc(Arc::clone(&block.mapping), GuestAddress(base))
                    .map(Arc::new)
                    .ok_or_else(|| Error::BadSize { name: block.name.clone(), length_bytes: memory_bytes })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let memory = GuestMemory::from_arc_regions(regions)?;
        let extra = extra_blocks.iter().map(|block| (block, None));
        let buffers = buffers.iter().zip((FIRST_BUFFER_SLOT..).map(Some));
        for ((name, length_bytes), kvm_slot) in extra.chain(buffers) {
            if blocks.iter().any(|block| block.name == *name) {
                return Err(Error::DuplicateName(name.clone()));
            }
            blocks.push(RamBlock::new(name, *length_bytes, None, kvm_slot, HugePages::Off)?);
        }
        Ok(Self { blocks, memory })
    }

    /// The guest's address space. Clones share the mappings.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Every block: RAM first, then the extra ones in the order in which they were given.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// The block of that name.
    #[must_use]
    pub fn block(&self, name: &str) -> Option<&RamBlock> {
        self.blocks.iter().find(|block| block.name == name)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    fn ram() -> GuestRam {
        GuestRam::new(1 << 20, &[("namespace-A-1".into(), 1 << 16)]).unwrap()
    }

    #[test]
    fn memory_above_three_gibibytes_is_a_second_block() {
        let ram = GuestRam::new(layout::LOW_RAM_END + (1 << 21), &[]).unwrap();
        let places: Vec<_> = ram
            .blocks()
            .iter()
            .map(|b| (b.name.as_str(), b.length_bytes(), b.guest_base, b.kvm_slot))
            .collect();
        assert_eq!(
            places,
            [
                (RAM_LOW, layout::LOW_RAM_END, Some(0), Some(0)),
                (RAM_HIGH, 1 << 21, Some(layout::HIGH_RAM_START), Some(1))
            ]
        );
        ram.memory().write_obj(7u32, GuestAddress(layout::HIGH_RAM_START + 8)).unwrap();
        assert!(!ram.memory().address_in_range(GuestAddress(layout::LOW_RAM_END)));
        let mut data = [0; 4];
        ram.block(RAM_HIGH).unwrap().read(8, &mut data).unwrap();
        assert_eq!(u32::from_le_bytes(data), 7);
    }

    #[test]
    fn bad_sizes_and_names_are_refused() {
        for bytes in [0, 1, 4097] {
            assert!(matches!(GuestRam::new(bytes, &[]), Err(Error::BadSize { .. })), "{bytes}");
            assert!(matches!(GuestRam::new(4096, &[("x".into(), bytes)]), Err(Error::BadSize { .. })));
        }
        let twice = [("x".to_owned(), 4096), ("x".to_owned(), 4096)];
        assert!(matches!(GuestRam::new(4096, &twice), Err(Error::DuplicateName(name)) if name == "x"));
        assert!(matches!(GuestRam::new(4096, &[(RAM_LOW.into(), 4096)]), Err(Error::DuplicateName(_))));
    }

    #[test]
    fn the_size_is_sealed() {
        let ram = ram();
        let block = ram.block(RAM_LOW).unwrap();
        assert_eq!(rustix::fs::ftruncate(block.memfd(), 4096), Err(rustix::io::Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(block.memfd(), 1 << 30), Err(rustix::io::Errno::PERM));
    }

    #[test]
    fn populated_ranges_follow_writes_and_clears() {
        let ram = ram();
        let block = ram.block(RAM_LOW).unwrap();
        assert_eq!(block.populated_ranges().unwrap(), []);
        block.write(0x3000, &[1; 0x1800]).unwrap();
        block.write(0xff000, &[1]).unwrap();
        assert_eq!(block.populated_ranges().unwrap(), [0x3000..0x5000, 0xff000..0x10_0000]);
        block.clear(0x3000, 0x1000).unwrap();
        assert_eq!(block.populated_ranges().unwrap(), [0x4000..0x5000, 0xff000..0x10_0000]);
        let mut data = [9; 1];
        block.read(0x3000, &mut data).unwrap();
        assert_eq!(data, [0]);
    }

    #[test]
    fn writes_and_clears_mark_the_pages() {
        let ram = ram();
        let block = ram.block("namespace-A-1").unwrap();
        block.write(0x1fff, &[1, 2]).unwrap();
        block.clear(0x4000, 0x1000).unwrap();
        assert_eq!(block.mapping.bitmap().get_and_reset(), [0b1_0110]);
    }

    #[test]
    fn nothing_reaches_beyond_a_block() {
        let ram = ram();
        let block = ram.block(RAM_LOW).unwrap();
        for (offset, length) in
            [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 1), (0, (1 << 20) + 1), (4096, u64::MAX)]
        {
            assert!(
                matches!(block.slice(offset, length), Err(Error::OutOfBounds { .. })),
                "{offset:#x}+{length:#x}"
            );
            assert!(matches!(block.clear(offset, length), Err(Error::OutOfBounds { .. })));
        }
        assert!(matches!(block.clear(1, 4096), Err(Error::OutOfBounds { .. })));
        assert!(matches!(block.clear(0, 4095), Err(Error::OutOfBounds { .. })));
        assert!(block.write((1 << 20) - 1, &[0, 0]).is_err());
    }
}
