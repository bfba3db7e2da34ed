//! Data pointers against a second implementation: where a transfer goes is worked out here from the words of the specification (Base 4.1),
//! one entry at a time, and every byte of the arena and of the image must be what follows from that.

use nvme_spec::opcode::nvm;
use nvme_spec::{Status, SubmissionEntry};
use vm_memory::{Bytes, GuestAddress};

use super::entry::Input;
use super::machine::{ARENA_BYTES, Machine, Shape};

const BLOCK_BYTES: u64 = 512;
/// Blocks of the image.
const BLOCKS: u64 = 256;
/// A walk that has looked at so many descriptors may be given up.
const MANY_DESCRIPTORS: u32 = 50_000;

/// A run of bytes: its address, or nowhere, and its length.
type Run = (Option<u64>, u64);

/// What the guest's memory says about a transfer.
struct Walk<'a> {
    arena: &'a [u8],
    left: u64,
    runs: Vec<Run>,
    descriptors: u32,
}

/// Whatever is wrong with a data pointer.
struct Wrong;

impl Walk<'_> {
    fn number(&self, address: u64) -> Result<u64, Wrong> {
        let start = usize::try_from(address).map_err(|_| Wrong)?;
        let bytes = self.arena.get(start..).and_then(|rest| rest.first_chunk()).ok_or(Wrong)?;
        Ok(u64::from_le_bytes(*bytes))
    }

    /// Takes the next `bytes` of the transfer.
    fn take(&mut self, address: u64, bytes: u64) {
        let bytes = bytes.min(self.left);
        self.runs.push((Some(address), bytes));
        self.left -= bytes;
    }

    fn pages(&mut self, page_bytes: u64, prp1: u64, prp2: u64) -> Result<(), Wrong> {
        if !prp1.is_multiple_of(4) {
            return Err(Wrong);
        }
        self.take(prp1, page_bytes - prp1 % page_bytes);
        if self.left == 0 {
            return Ok(());
        }
        if self.left <= page_bytes {
            return self.page(page_bytes, prp2);
        }
        let mut place = prp2;
        if !place.is_multiple_of(8) {
            return Err(Wrong);
        }
        while self.left > 0 {
            let entry = self.number(place)?;
            place += 8;
            if place.is_multiple_of(page_bytes) && self.left > page_bytes {
                // The last entry of a page of the list, and not of the list.
                if !entry.is_multiple_of(page_bytes) {
                    return Err(Wrong);
                }
                place = entry;
            } else {
                self.page(page_bytes, entry)?;
            }
        }
        Ok(())
    }

    fn page(&mut self, page_bytes: u64, address: u64) -> Result<(), Wrong> {
        if !address.is_multiple_of(page_bytes) {
            return Err(Wrong);
        }
        self.take(address, page_bytes);
        Ok(())
    }

    fn descriptors(&mut self, first: (u64, u64), reads: bool) -> Result<(), Wrong> {
        let (mut segment, mut is_last) = (vec![first], false);
        loop {
            let mut next = None;
            for (index, (address, rest)) in segment.iter().enumerate() {
                if self.left == 0 {
                    return Ok(());
                }
                self.descriptors += 1;
                let (bytes, kind) = (rest & 0xffff_ffff, rest >> 56);
                match kind {
                    0x00 if bytes == 0 => {}
                    0x00 => self.take(*address, bytes),
                    // Of what a write would take from it there is nothing.
                    0x10 if !reads => {}
                    0x10 => {
                        let bytes = bytes.min(self.left);
                        self.runs.push((None, bytes));
                        self.left -= bytes;
                    }
                    0x20 | 0x30 if index + 1 == segment.len() => {
                        if bytes == 0 || !bytes.is_multiple_of(16) || !address.is_multiple_of(8) || is_last {
                            return Err(Wrong);
                        }
                        next = Some((*address, bytes / 16, kind == 0x30));
                    }
                    _ => return Err(Wrong),
                }
            }
            if self.left == 0 {
                return Ok(());
            }
            if self.descriptors > 2 * MANY_DESCRIPTORS {
                return Err(Wrong);
            }
            let Some((address, count, last)) = next else { return Err(Wrong) };
            segment.clear();
            // What lies outside of memory is not looked at if the transfer ends before it, and is wrong otherwise.
            for index in 0..count.min(self.arena.len() as u64 / 16 + 1) {
                match (self.number(address + index * 16), self.number(address + index * 16 + 8)) {
                    (Ok(low), Ok(high)) => segment.push((low, high)),
                    _ => segment.push((0, u64::MAX)),
                }
            }
            is_last = last;
        }
    }
}

/// The runs of a transfer, if there is nothing wrong with it, and how many descriptors were looked at.
fn runs(
    arena: &[u8],
    entry: &SubmissionEntry,
    page_bytes: u64,
    bytes: u64,
) -> (Result<Vec<Run>, Wrong>, u32) {
    let mut walk = Walk { arena, left: bytes, runs: Vec::new(), descriptors: 0 };
    let reads = entry.opcode == nvm::READ;
    let outcome = match entry.psdt() {
        0 => walk.pages(page_bytes, entry.prp1, entry.prp2),
        1 | 2 => walk.descriptors((entry.prp1, entry.prp2), reads),
        _ => Err(Wrong),
    };
    let is_inside = |run: &Run| match run {
        (Some(address), bytes) => address.checked_add(*bytes).is_some_and(|end| end <= arena.len() as u64),
        (None, _) => reads,
    };
    let outcome =
        outcome.and_then(|()| if walk.runs.iter().all(is_inside) { Ok(walk.runs) } else { Err(Wrong) });
    (outcome, walk.descriptors)
}

fn arena(machine: &Machine) -> Vec<u8> {
    let mut bytes = vec![0; ARENA_BYTES as usize];
    machine.memory.read_slice(&mut bytes, GuestAddress(0)).expect("the arena");
    bytes
}

fn set_arena(machine: &Machine, bytes: &[u8]) {
    machine.memory.write_slice(bytes, GuestAddress(0)).expect("the arena");
}

/// A transfer of the whole image and the first half of the arena, by a list that is right.
fn transfer_all(machine: &mut Machine, opcode: u8, page_bytes: u64) {
    let list = ARENA_BYTES / 2;
    for (index, page) in (page_bytes..BLOCKS * BLOCK_BYTES).step_by(page_bytes as usize).enumerate() {
        let place = GuestAddress(list + index as u64 * 8);
        machine.memory.write_slice(&page.to_le_bytes(), place).expect("the arena");
    }
    let prp2 = if BLOCKS * BLOCK_BYTES <= 2 * page_bytes { page_bytes } else { list };
    let entry =
        SubmissionEntry { opcode, nsid: 1, prp2, cdw12: BLOCKS as u32 - 1, ..SubmissionEntry::default() };
    assert!(run(machine, entry).is_success(), "a transfer with nothing wrong");
}

fn run(machine: &mut Machine, entry: SubmissionEntry) -> Status {
    let cid = machine.push(1, entry).expect("room in the queue");
    machine.run();
    let ended = machine.reap(1);
    assert_eq!(ended.len(), 1, "{ended:?}");
    assert_eq!(ended[0].cid, cid);
    ended[0].status()
}

/// One transfer with any data pointer in any memory.
///
/// # Panics
///
/// If anything is other than the data pointer says.
pub fn pointers(bytes: &[u8]) {
    let mut input = Input(bytes);
    // All that is named is RAM, and transfers have no limit.
    let shape = Shape(input.byte() & 0b1110).with_ram_only();
    let mut machine = Machine::new(shape);
    let page_bytes = 4096 << shape.page_shift();
    let image: Vec<u8> =
        (0..BLOCKS * BLOCK_BYTES).map(|place| (place ^ place >> 8 ^ place >> 13) as u8).collect();
    set_arena(&machine, &image);
    transfer_all(&mut machine, nvm::WRITE, page_bytes);
    let kind = input.byte();
    let first_block = u64::from(input.byte());
    let blocks = 1 + u64::from(input.byte()) % (BLOCKS - first_block);
    let mut entry = SubmissionEntry {
        opcode: [nvm::READ, nvm::READ, nvm::WRITE, nvm::COMPARE][usize::from(kind & 3)],
        flags: kind & 0xc0,
        nsid: 1,
        prp1: input.address(),
        prp2: input.second_pointer(),
        cdw12: blocks as u32 - 1,
        ..SubmissionEntry::default()
    };
    entry.set_cdw10_64(first_block);
    // What is compared is there, if the pointer is to the place.
    if kind & 4 != 0 {
        set_arena(&machine, &vec![0; ARENA_BYTES as usize]);
    }
    while !input.is_empty() {
        let (address, value) = (input.address(), input.second_pointer());
        let _outside = machine.memory.write_slice(&value.to_le_bytes(), GuestAddress(address & !7));
    }
    let before = arena(&machine);
    let bytes = blocks * BLOCK_BYTES;
    let start = (first_block * BLOCK_BYTES) as usize;
    let wanted = &image[start..start + bytes as usize];
    let (expected, descriptors) = runs(&before, &entry, page_bytes, bytes);
    let status = run(&mut machine, entry);
    let is_given_up = descriptors > MANY_DESCRIPTORS && !status.is_success();
    let mut after = before.clone();
    let mut disk = image.clone();
    let mut position = 0;
    let mut gathered = Vec::new();
    if let (Ok(runs), false) = (&expected, is_given_up) {
        for (address, bytes) in runs {
            let bytes = *bytes as usize;
            if let Some(address) = address {
                let place = *address as usize..*address as usize + bytes;
                gathered.extend_from_slice(&before[place.clone()]);
                if entry.opcode == nvm::READ {
                    after[place].copy_from_slice(&wanted[position..position + bytes]);
                }
            }
            position += bytes;
        }
        match entry.opcode {
            nvm::WRITE => disk[start..start + gathered.len()].copy_from_slice(&gathered),
            nvm::COMPARE if gathered != wanted => {
                assert_eq!(status.code(), Status::COMPARE_FAILURE);
            }
            _ => assert!(status.is_success(), "{entry:?}: {status:?}"),
        }
    } else {
        assert!(!status.is_success(), "{entry:?} has succeeded");
    }
    assert!(arena(&machine) == after, "{entry:?} has changed memory that it does not point at: {status:?}");
    transfer_all(&mut machine, nvm::READ, page_bytes);
    assert!(arena(&machine)[..disk.len()] == disk, "{entry:?} has left something else on the disk");
    machine.finish();
}
