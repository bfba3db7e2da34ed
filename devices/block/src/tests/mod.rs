//! Tests of all backends on both engines.

mod dirty;
mod durability;
mod faults;
mod files;
mod hostile;
mod images;
mod locks;
mod nodes;
mod operations;
mod overlays;
mod qcow2;
mod refused;
mod steps;

use std::sync::Arc;
use std::time::Duration;

use bus::{GuestMapping, GuestMemory, GuestRange};
use tempfile::NamedTempFile;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::poll::PollContext;

use crate::{
    Backend, Buffers, Completion, Failure, FileImage, FileOptions, IoContext, MemoryImage, Operation,
    Qcow2Image, Request,
};

const MIB: u64 = 1 << 20;
/// Two mappings that touch, then a hole, then a third.
const SEAM: u64 = 4 * MIB;
const HOLE: u64 = 8 * MIB;
const FAR: u64 = 64 * MIB;
const CAPACITY: u64 = 8 * MIB;

fn guest() -> GuestMemory {
    let regions = [(0, SEAM), (SEAM, HOLE - SEAM), (FAR, 4 * MIB)];
    GuestMemory::from_ranges(&regions.map(|(start, length)| (GuestAddress(start), length as usize))).unwrap()
}

fn range(address: u64, length_bytes: u64) -> GuestRange {
    GuestRange { address: GuestAddress(address), length_bytes: length_bytes as u32 }
}

/// Runs `test` with io_uring (which the reference host has) and with threads.
fn on_both_engines(depth: u32, test: impl Fn(&mut IoContext)) {
    println!("io_uring");
    test(&mut IoContext::new(guest(), depth).unwrap());
    println!("threads");
    test(&mut IoContext::with_threads(guest(), depth).unwrap());
}

fn temporary_file(capacity: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(capacity).unwrap();
    file
}

/// All images that keep what is written, each with a name.
fn writable_images(capacity: u64) -> Vec<(&'static str, Arc<dyn Backend>, Option<NamedTempFile>)> {
    let buffered = FileOptions { direct: false, ..FileOptions::default() };
    let (one, two) = (temporary_file(capacity), temporary_file(capacity));
    let three = qcow2::temporary_qcow2(capacity);
    vec![
        ("direct", Arc::new(FileImage::open(one.path(), FileOptions::default()).unwrap()), Some(one)),
        ("buffered", Arc::new(FileImage::open(two.path(), buffered).unwrap()), Some(two)),
        ("memory", Arc::new(MemoryImage::new(mapping(capacity))), None),
        ("qcow2", Arc::new(Qcow2Image::open(three.path(), false).unwrap()), Some(three)),
    ]
}

fn mapping(capacity: u64) -> Arc<GuestMapping> {
    Arc::new(GuestMapping::new(capacity as usize).unwrap())
}

fn queue(
    context: &mut IoContext,
    image: &dyn Backend,
    token: u64,
    operation: Operation,
    offset_bytes: u64,
    length_bytes: u64,
    ranges: &[GuestRange],
) {
    let buffers = if ranges.is_empty() { Buffers::None } else { Buffers::Guest(ranges) };
    image.submit(context, &Request { token, operation, offset_bytes, length_bytes, buffers });
}

/// Submits and waits for `count` completions.
fn collect(context: &mut IoContext, count: usize) -> Vec<Completion> {
    let mut completions = Vec::new();
    context.submit().unwrap();
    context.completions(&mut completions);
    while completions.len() < count {
        assert!(wait_for_event(context, 30), "{} of {count} requests ended", completions.len());
        context.completions(&mut completions);
    }
    assert_eq!(completions.len(), count, "more completions than requests");
    completions
}

/// Waits for the event; `false` after `seconds`.
fn wait_for_event(context: &IoContext, seconds: u64) -> bool {
    let poll = PollContext::new().unwrap();
    poll.add(context.event_fd(), 0_u64).unwrap();
    let ready = poll.wait_timeout(Duration::from_secs(seconds)).unwrap().iter().count() == 1;
    if ready {
        context.event_fd().read().unwrap();
    }
    ready
}

fn run(
    context: &mut IoContext,
    image: &dyn Backend,
    operation: Operation,
    offset_bytes: u64,
    length_bytes: u64,
    ranges: &[GuestRange],
) -> Result<(), Failure> {
    queue(context, image, 77, operation, offset_bytes, length_bytes, ranges);
    let completion = collect(context, 1)[0];
    assert_eq!(completion.token, 77);
    assert_eq!(context.in_flight(), 0);
    completion.result
}

/// Reads guest memory over `ranges`.
fn peek(memory: &GuestMemory, ranges: &[GuestRange]) -> Vec<u8> {
    let mut all = Vec::new();
    for range in ranges {
        let mut bytes = vec![0; range.length_bytes as usize];
        memory.read_slice(&mut bytes, range.address).unwrap();
        all.extend(bytes);
    }
    all
}

/// Writes guest memory over `ranges`.
fn poke(memory: &GuestMemory, ranges: &[GuestRange], mut bytes: &[u8]) {
    for range in ranges {
        let (part, rest) = bytes.split_at(range.length_bytes as usize);
        memory.write_slice(part, range.address).unwrap();
        bytes = rest;
    }
}

fn is_dirty(memory: &GuestMemory, address: u64) -> bool {
    let (region, offset) = memory.to_region_addr(GuestAddress(address)).unwrap();
    region.bitmap().dirty_at(offset.raw_value() as usize)
}

fn clear_dirty(memory: &GuestMemory) {
    memory.iter().for_each(|region| region.get_mmap().bitmap().reset());
}

/// A generator of the same numbers every time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    fn bytes(&mut self, count: u64) -> Vec<u8> {
        (0..count).map(|_| self.next(256) as u8).collect()
    }

    /// Ranges that do not overlap, of `total` bytes, at any alignment, in the first and second mapping.
    fn ranges(&mut self, mut total: u64) -> Vec<GuestRange> {
        let mut ranges = Vec::new();
        let mut address = SEAM - total - self.next(8192);
        while total > 0 {
            let length = 1 + self.next(total.min(20_000));
            ranges.push(range(address, length));
            address += length + self.next(3) * self.next(600);
            total -= length;
        }
        ranges
    }
}
