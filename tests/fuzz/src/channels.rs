//! Data channels: what they do to guest memory.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dirty_bitmap::DirtyBitmap;
use engine::replay::{place, record};
use engine::{Compression, FreshMemory, MachineResult, PAGE_BYTES, PageBitmap, RamBlock};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::streams;

/// The model machine's memory.
fn memory() -> Vec<RamBlock> {
    let block = |block: stream::RamBlock| {
        let region = MmapRegion::<DirtyBitmap>::new(block.length_bytes as usize);
        let region = region.expect("so little can be mapped");
        RamBlock { name: block.name, mapping: Arc::new(region) }
    };
    streams::blocks().into_iter().map(block).collect()
}

/// Memory that is filled before anybody touches it, until so many pages are.
struct Filled {
    blocks: Vec<RamBlock>,
    left: AtomicU64,
}

impl Filled {
    fn new(pages: u64) -> Self {
        let block = |block: stream::RamBlock| {
            let file = tempfile::tempfile().expect("a file");
            file.set_len(block.length_bytes).expect("it is sparse");
            let region = MmapRegion::from_file(FileOffset::new(file, 0), block.length_bytes as usize);
            RamBlock { name: block.name, mapping: Arc::new(region.expect("so little can be mapped")) }
        };
        let blocks = streams::blocks().into_iter().map(block).collect();
        Self { blocks, left: AtomicU64::new(pages) }
    }
}

impl FreshMemory for Filled {
    fn has(&self, block: usize) -> bool {
        block < self.blocks.len()
    }

    /// A page that holds something is touched as one that is filled is not: there the two must not be confused.
    fn fill(&self, block: usize, offset: u64, pages: &[u8]) -> MachineResult<()> {
        let block = &self.blocks[block].mapping;
        for (offset, page) in (offset..).step_by(PAGE_BYTES as usize).zip(pages.chunks(PAGE_BYTES as usize)) {
            if self
                .left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
                .is_err()
            {
                return Err("there is no memory".into());
            }
            let slice = block.get_slice(offset as usize, page.len()).expect("the engine has looked");
            let mut before = vec![0; page.len()];
            slice.copy_to(&mut before);
            assert!(before.iter().all(|byte| *byte == 0), "a page that holds something is filled");
            block.file_offset().expect("it has one").file().write_all_at(page, offset)?;
        }
        Ok(())
    }

    fn release(&self) -> MachineResult<()> {
        self.left.store(0, Ordering::Relaxed);
        Ok(())
    }
}

/// The first byte says which channel of how many, and whether memory is filled and how far; the rest is what comes on it.
pub fn channel(bytes: &[u8]) {
    let [which, bytes @ ..] = bytes else { return };
    let (index, count) = (u16::from(which & 3), u16::from(which >> 2 & 3) + 1);
    let index = index % count;
    let _refused = match which >> 4 {
        0 => place(bytes, &memory(), None, index, count),
        pages => {
            let filled = Filled::new(u64::from(pages) - 1);
            let blocks = filled.blocks.clone();
            place(bytes, &blocks, Some(&(Arc::new(filled) as Arc<dyn FreshMemory>)), index, count)
        }
    };
}

/// Channels of the model machine, in every way of compression.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    let blocks = memory();
    let low = blocks.iter().find(|block| block.name == "low").expect("the model machine has it");
    for page in [0, 1, 2, 5, 9] {
        let value = page + 1;
        low.mapping.as_volatile_slice().write_obj(value, (page * PAGE_BYTES) as usize).expect("inside");
    }
    let all: Vec<_> = blocks.iter().map(|block| PageBitmap::for_bytes(block.length_bytes())).collect();
    let mut some = all.clone();
    some.iter_mut().for_each(|bitmap| bitmap.set_range(1..3));
    let mut all = all;
    all.iter_mut().for_each(|bitmap| bitmap.set_range(0..bitmap.pages()));
    for compression in Compression::ALL {
        let bytes = record(&blocks, &[&all, &some], compression, 0, 1).expect("memory can be recorded");
        out.push([&[0], bytes.as_slice()].concat());
    }
    for index in 0..2 {
        let bytes = record(&blocks, &[&some], Compression::None, index, 2).expect("memory can be recorded");
        out.push([&[4 | index as u8], bytes.as_slice()].concat());
    }
    // Filled memory: some pages of the second round's runs hold something, and others nothing.
    for compression in Compression::ALL {
        let bytes = record(&blocks, &[&some, &all], compression, 0, 1).expect("memory can be recorded");
        out.extend([0x10, 0x30, 0xf0].map(|which| [&[which], bytes.as_slice()].concat()));
    }
    out
}
