//! Data channels: what they do to guest memory.

use std::sync::Arc;

use dirty_bitmap::DirtyBitmap;
use engine::replay::{place, record};
use engine::{Compression, PAGE_BYTES, PageBitmap, RamBlock};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

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

/// The first byte says which channel of how many, the rest is what comes on it.
pub fn channel(bytes: &[u8]) {
    let [which, bytes @ ..] = bytes else { return };
    let (index, count) = (u16::from(which & 3), u16::from(which >> 2 & 3) + 1);
    let index = index % count;
    let _refused = place(bytes, memory(), index, count);
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
    out
}
