//! Random guests: against a reference disk, and hostile ones.

mod pair;

use std::sync::Arc;

use block::{Failure, Fault, FaultControl, FaultImage, Target};
use nvme_spec::event::Event;
use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::sgl::{DATA_BLOCK, LAST_SEGMENT};
use nvme_spec::{SglDescriptor, Status, SubmissionEntry, feature, regs};
use proptest::prelude::*;

use super::cmb::{create_pair_in_buffer, open};
use super::driver::{Guest, MEMORY_BYTES, memory_image, namespace, transfer};
use super::metadata::formats;
use crate::{ControllerConfig, NamespaceConfig};

const BLOCKS: u64 = 64;
const QUEUES: u16 = 3;
/// A controller memory buffer with room for the queues and the area of data.
const BUFFER_BYTES: u64 = 64 << 10;
const BUFFER_BASE: u64 = 0xd000_0000;

/// What a well-behaved driver does next.
#[derive(Clone, Debug)]
enum Action {
    /// Writes blocks filled with a byte, from an offset (in dwords) into its page.
    Write {
        queue: u16,
        nsid: u32,
        lba: u64,
        blocks: u64,
        fill: u8,
        offset: u64,
    },
    /// Reads blocks and compares.
    Read {
        queue: u16,
        nsid: u32,
        lba: u64,
        blocks: u64,
        offset: u64,
    },
    Zeroes {
        queue: u16,
        nsid: u32,
        lba: u64,
        blocks: u64,
    },
    Flush {
        queue: u16,
        nsid: u32,
    },
    /// Several reads at once, of one queue.
    Burst {
        queue: u16,
        count: u64,
    },
    Migrate {
        workers: usize,
    },
    /// Compares with what the disk holds, but for one byte if `differs`.
    Compare {
        queue: u16,
        nsid: u32,
        lba: u64,
        blocks: u64,
        differs: bool,
    },
    Verify {
        queue: u16,
        nsid: u32,
        lba: u64,
        blocks: u64,
    },
    /// Copies blocks, in two ranges if there are two.
    Copy {
        queue: u16,
        nsid: u32,
        lba: u64,
        blocks: u64,
        destination: u64,
    },
    Uncorrectable {
        queue: u16,
        nsid: u32,
        lba: u64,
        blocks: u64,
    },
    /// A fused Compare and Write; the first half alone for a while, perhaps in another controller.
    Pair {
        queue: u16,
        nsid: u32,
        lba: u64,
        fill: u8,
        differs: bool,
        workers: Option<usize>,
    },
    /// The next request to an image fails.
    Fail,
}

fn action() -> impl Strategy<Value = Action> {
    let queue = 1..=QUEUES;
    let nsid = prop_oneof![Just(1u32), Just(42)];
    let range = (0..BLOCKS).prop_flat_map(|lba| (Just(lba), 1..=(BLOCKS - lba).min(40)));
    prop_oneof![
        4 => (queue.clone(), nsid.clone(), range.clone(), any::<u8>(), 0..1024u64)
            .prop_map(|(queue, nsid, (lba, blocks), fill, offset)| Action::Write { queue, nsid, lba, blocks, fill, offset }),
        4 => (queue.clone(), nsid.clone(), range.clone(), 0..1024u64)
            .prop_map(|(queue, nsid, (lba, blocks), offset)| Action::Read { queue, nsid, lba, blocks, offset }),
        1 => (queue.clone(), nsid.clone(), range)
            .prop_map(|(queue, nsid, (lba, blocks))| Action::Zeroes { queue, nsid, lba, blocks }),
        1 => (queue.clone(), nsid).prop_map(|(queue, nsid)| Action::Flush { queue, nsid }),
        1 => (queue, 1..7u64).prop_map(|(queue, count)| Action::Burst { queue, count }),
        1 => (1..4usize).prop_map(|workers| Action::Migrate { workers }),
        4 => more_actions(),
    ]
}

fn more_actions() -> impl Strategy<Value = Action> {
    let at = || {
        let range = (0..BLOCKS).prop_flat_map(|lba| (Just(lba), 1..=(BLOCKS - lba).min(8)));
        (1..=QUEUES, prop_oneof![Just(1u32), Just(42)], range)
    };
    prop_oneof![
        2 => (at(), any::<bool>()).prop_map(|((queue, nsid, (lba, blocks)), differs)| {
            Action::Compare { queue, nsid, lba, blocks, differs }
        }),
        1 => at().prop_map(|(queue, nsid, (lba, blocks))| Action::Verify { queue, nsid, lba, blocks }),
        2 => (at(), 0..BLOCKS - 8).prop_map(|((queue, nsid, (lba, blocks)), destination)| {
            Action::Copy { queue, nsid, lba, blocks, destination }
        }),
        1 => at().prop_map(|(queue, nsid, (lba, blocks))| Action::Uncorrectable { queue, nsid, lba, blocks }),
        2 => (at(), any::<u8>(), any::<bool>(), prop::option::of(1..4usize)).prop_map(
            |((queue, nsid, (lba, _)), fill, differs, workers)| {
                Action::Pair { queue, nsid, lba, fill, differs, workers }
            }
        ),
        1 => Just(Action::Fail),
    ]
}

/// A buffer for `blocks` blocks that begins `offset` dwords into a page, its pages out of order, and the entry that names it.
fn scattered(
    guest: &Guest,
    area: u64,
    entry: SubmissionEntry,
    blocks: u64,
    offset: u64,
) -> (SubmissionEntry, Vec<(u64, usize)>) {
    let offset = offset * 4;
    let (mut rest, mut pieces, mut pages) = ((blocks * 512) as usize, Vec::new(), Vec::new());
    let mut index = 0;
    while rest > 0 {
        let page = area + 4096 * (1 + (index * 5) % 7);
        let start = if index == 0 { page + offset } else { page };
        let length = rest.min(4096 - (start % 4096) as usize);
        pieces.push((start, length));
        pages.push(start);
        rest -= length;
        index += 1;
    }
    // Every other buffer by SGL.
    if offset.is_multiple_of(8) {
        let descriptor =
            |&(address, length): &(u64, usize)| SglDescriptor::new(DATA_BLOCK, address, length as u32);
        let list: Vec<u8> = pieces.iter().flat_map(|piece| descriptor(piece).to_bytes()).collect();
        guest.write_bytes(area, &list);
        let mut entry = SubmissionEntry { flags: 0x40, ..entry };
        entry.set_data_sgl(SglDescriptor::new(LAST_SEGMENT, area, list.len() as u32));
        return (entry, pieces);
    }
    let list: Vec<u8> = pages.iter().skip(1).flat_map(|page| page.to_le_bytes()).collect();
    guest.write_bytes(area, &list);
    let prp2 = if pages.len() == 2 { pages[1] } else { area };
    (SubmissionEntry { prp1: pages[0], prp2, ..entry }, pieces)
}

/// What a disk has to hold.
#[derive(Clone)]
struct Reference {
    bytes: Vec<u8>,
    /// Blocks that cannot be read.
    marked: Vec<bool>,
}

impl Reference {
    fn new() -> Self {
        Self { bytes: vec![0; (BLOCKS * 512) as usize], marked: vec![false; BLOCKS as usize] }
    }

    fn of(both: &mut [Self; 2], nsid: u32) -> &mut Self {
        &mut both[usize::from(nsid != 1)]
    }

    fn blocks(&self, lba: u64, blocks: u64) -> &[u8] {
        &self.bytes[(lba * 512) as usize..((lba + blocks) * 512) as usize]
    }

    fn write(&mut self, lba: u64, data: &[u8]) {
        self.bytes[(lba * 512) as usize..][..data.len()].copy_from_slice(data);
        self.marked[lba as usize..][..data.len() / 512].fill(false);
    }

    fn is_marked(&self, lba: u64, blocks: u64) -> bool {
        self.marked[lba as usize..(lba + blocks) as usize].contains(&true)
    }

    /// How a command ends that reads these blocks, if the image does its part.
    fn reads(&self, lba: u64, blocks: u64) -> Result<(), Status> {
        if self.is_marked(lba, blocks) { Err(Status::UNRECOVERED_READ_ERROR) } else { Ok(()) }
    }
}

fn set_feature(id: u8, value: u32) -> SubmissionEntry {
    SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: id.into(),
        cdw11: value,
        ..SubmissionEntry::default()
    }
}

/// With `in_buffer` queues, lists and data are in the controller memory buffer.
fn play(actions: &[Action], shadow: bool, in_buffer: bool) {
    let buffer_bytes = if in_buffer { BUFFER_BYTES } else { 0 };
    let config =
        ControllerConfig { queue_pairs: 4, vectors: 5, buffer_bytes, ..ControllerConfig::new("RANDOM") };
    let control = Arc::new(FaultControl::default());
    let namespaces = [1, 42].map(|nsid| {
        let backend = Arc::new(FaultImage::new(memory_image(BLOCKS as usize * 512), control.clone()));
        NamespaceConfig { nsid, block_bytes: 512, metadata: None, backend }
    });
    let mut guest = Guest::ready(config, namespaces.into());
    if shadow {
        guest.use_shadow_doorbells();
    }
    if in_buffer {
        open(&mut guest, BUFFER_BASE);
    }
    let in_buffer_at = |queue: u16| BUFFER_BASE + u64::from(queue - 1) * 2 * 4096;
    for queue in 1..=QUEUES {
        let entries = 5 + u32::from(queue);
        match in_buffer {
            true => create_pair_in_buffer(&mut guest, queue, entries, in_buffer_at(queue)),
            false => guest.create_pair(queue, entries),
        }
    }
    let area = if in_buffer { in_buffer_at(QUEUES + 1) } else { guest.pages(8) };
    // Two requests that wait through all of it for an event.
    guest.admin(set_feature(feature::ASYNC_EVENT_CONFIGURATION, 1 << 1)).unwrap();
    let parked = [(); 2].map(|()| {
        guest.push(0, SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() })
    });
    guest.ring(0);
    guest.run();
    let mut reference = [Reference::new(), Reference::new()];
    // The next request fails; a command that never makes one leaves it.
    let mut fails = false;
    for action in actions {
        let seen = control.seen();
        match *action {
            Action::Fail => {
                if !std::mem::replace(&mut fails, true) {
                    control.inject(Target::Any, 0, 1, Fault::Fail(Failure::Io(5)));
                }
            }
            Action::Compare { queue, nsid, lba, blocks, differs } => {
                let disk = Reference::of(&mut reference, nsid);
                let mut data = disk.blocks(lba, blocks).to_vec();
                data[(blocks * 300) as usize] ^= u8::from(differs);
                guest.write_bytes(area, &data);
                let expected = disk.reads(lba, blocks).and(match (fails, differs) {
                    (true, _) => Err(Status::UNRECOVERED_READ_ERROR),
                    (_, true) => Err(Status::COMPARE_FAILURE),
                    _ => Ok(()),
                });
                assert_eq!(guest.io(queue, transfer(nvm::COMPARE, nsid, lba, blocks as u32, area)), expected);
            }
            Action::Verify { queue, nsid, lba, blocks } => {
                let disk = Reference::of(&mut reference, nsid);
                let expected =
                    if fails { Err(Status::UNRECOVERED_READ_ERROR) } else { disk.reads(lba, blocks) };
                assert_eq!(guest.io(queue, transfer(nvm::VERIFY, nsid, lba, blocks as u32, 0)), expected);
            }
            Action::Copy { queue, nsid, lba, blocks, destination } => {
                let disk = Reference::of(&mut reference, nsid);
                let first = (blocks / 2).max(1);
                let ranges: Vec<_> = [(lba, first), (lba + first, blocks - first)]
                    .into_iter()
                    .filter(|range| range.1 > 0)
                    .collect();
                let list: Vec<u8> = ranges.iter().flat_map(|range| copy_range(range.0, range.1)).collect();
                guest.write_bytes(area, &list);
                let mut entry = transfer(nvm::COPY, nsid, 0, 1, area);
                entry.cdw12 = ranges.len() as u32 - 1;
                entry.set_cdw10_64(destination);
                let completion = guest.submit(queue, entry);
                // All sources are looked at first, and then one range is copied after the other.
                if disk.is_marked(lba, blocks) {
                    assert_eq!(
                        (completion.status().code(), completion.dw0),
                        (Status::UNRECOVERED_READ_ERROR, 0)
                    );
                } else if fails {
                    assert_eq!((completion.status().code(), completion.dw0), (Status::WRITE_FAULT, 0));
                } else {
                    assert_eq!((completion.status(), completion.dw0), (Status::SUCCESS, 0));
                    let mut position = destination;
                    for (source, count) in ranges {
                        let data = disk.blocks(source, count).to_vec();
                        disk.write(position, &data);
                        position += count;
                    }
                }
            }
            Action::Uncorrectable { queue, nsid, lba, blocks } => {
                guest.io(queue, transfer(nvm::WRITE_UNCORRECTABLE, nsid, lba, blocks as u32, 0)).unwrap();
                let disk = Reference::of(&mut reference, nsid);
                disk.marked[lba as usize..(lba + blocks) as usize].fill(true);
            }
            Action::Pair { queue, nsid, lba, fill, differs, workers } => {
                let disk = Reference::of(&mut reference, nsid);
                let mut data = disk.blocks(lba, 1).to_vec();
                data[511] ^= u8::from(differs);
                guest.write_bytes(area, &data);
                guest.write_bytes(area + 512, &[fill; 512]);
                let halves = [(1, nvm::COMPARE, area), (2, nvm::WRITE, area + 512)];
                let mut cids = Vec::new();
                for (flags, opcode, address) in halves {
                    let entry = transfer(opcode, nsid, lba, 1, address);
                    cids.push(guest.push(queue, SubmissionEntry { flags, ..entry }));
                    if let Some(workers) = workers.filter(|_| flags == 1) {
                        guest.ring(queue);
                        guest.run();
                        guest.migrate(workers);
                        guest.run();
                        assert!(guest.reap(queue).is_empty(), "a half has ended");
                    }
                }
                guest.ring(queue);
                let mut ended = Vec::new();
                guest.run_until("the pair", |guest| {
                    ended.extend(guest.reap(queue).iter().map(|entry| (entry.cid, entry.status().code())));
                    ended.len() >= 2
                });
                let compared = disk.reads(lba, 1).and(match (fails, differs) {
                    (true, _) => Err(Status::UNRECOVERED_READ_ERROR),
                    (_, true) => Err(Status::COMPARE_FAILURE),
                    _ => Ok(()),
                });
                let expected = match compared {
                    Ok(()) => [Status::SUCCESS; 2],
                    Err(status) => [status, Status::ABORTED_FAILED_FUSED],
                };
                assert_eq!(ended, [(cids[0], expected[0]), (cids[1], expected[1])]);
                if compared.is_ok() {
                    disk.write(lba, &[fill; 512]);
                }
            }
            Action::Write { queue, nsid, lba, blocks, fill, offset } => {
                let entry = transfer(nvm::WRITE, nsid, lba, blocks as u32, 0);
                let (entry, pieces) = scattered(&guest, area, entry, blocks, offset);
                let data: Vec<u8> =
                    (0..blocks * 512).map(|byte| fill.wrapping_add((byte / 3) as u8)).collect();
                let mut position = 0;
                for (address, length) in pieces {
                    guest.write_bytes(address, &data[position..position + length]);
                    position += length;
                }
                let expected = if fails { Err(Status::WRITE_FAULT) } else { Ok(()) };
                assert_eq!(guest.io(queue, entry), expected, "{action:?}");
                if expected.is_ok() {
                    Reference::of(&mut reference, nsid).write(lba, &data);
                }
            }
            Action::Read { queue, nsid, lba, blocks, offset } => {
                let entry = transfer(nvm::READ, nsid, lba, blocks as u32, 0);
                let (entry, pieces) = scattered(&guest, area, entry, blocks, offset);
                let disk = Reference::of(&mut reference, nsid);
                let expected =
                    if fails { Err(Status::UNRECOVERED_READ_ERROR) } else { disk.reads(lba, blocks) };
                assert_eq!(guest.io(queue, entry), expected, "{action:?}");
                let data: Vec<u8> =
                    pieces.iter().flat_map(|(address, length)| guest.read_bytes(*address, *length)).collect();
                assert!(expected.is_err() || data == disk.blocks(lba, blocks), "{action:?}");
            }
            Action::Zeroes { queue, nsid, lba, blocks } => {
                let mut entry = transfer(nvm::WRITE_ZEROES, nsid, lba, blocks as u32, 0);
                entry.cdw12 |= opcode::CDW12_DEALLOCATE;
                let expected = if fails { Err(Status::WRITE_FAULT) } else { Ok(()) };
                assert_eq!(guest.io(queue, entry), expected);
                if expected.is_ok() {
                    Reference::of(&mut reference, nsid).write(lba, &vec![0; (blocks * 512) as usize]);
                }
            }
            Action::Flush { queue, nsid } => {
                let expected = if fails { Err(Status::WRITE_FAULT) } else { Ok(()) };
                assert_eq!(guest.io(queue, transfer(nvm::FLUSH, nsid, 0, 1, 0)), expected);
            }
            Action::Burst { queue, count } => {
                // Never more than the queue takes.
                let count = count.min(u64::from(guest.queues[&queue].entries) - 1);
                let cids: Vec<u16> =
                    (0..count).map(|lba| guest.push(queue, transfer(nvm::READ, 1, lba, 1, area))).collect();
                guest.ring(queue);
                let mut seen = Vec::new();
                guest.run_until("the burst", |guest| {
                    seen.extend(guest.reap(queue).iter().map(|entry| entry.cid));
                    seen.len() == cids.len()
                });
                // One that cannot be read ends before those that were begun before it.
                seen.sort_unstable();
                assert_eq!(seen, cids);
            }
            Action::Migrate { workers } => drop(guest.migrate(workers)),
        }
        fails &= control.seen() == seen;
    }
    assert!(guest.reap(0).is_empty(), "nothing has happened");
    guest.push(0, set_feature(feature::TEMPERATURE_THRESHOLD, 300));
    guest.ring(0);
    guest.run();
    let told: Vec<_> = guest.reap(0).iter().map(|entry| (entry.cid, entry.dw0)).collect();
    assert!(
        told.len() == 2 && told.contains(&(parked[0], Event::TEMPERATURE_THRESHOLD.to_dword())),
        "{told:?}"
    );
}

/// A source range of Copy, format 0h.
fn copy_range(lba: u64, blocks: u64) -> [u8; 32] {
    let mut entry = [0; 32];
    entry[8..16].copy_from_slice(&lba.to_le_bytes());
    entry[16..18].copy_from_slice(&(blocks as u16 - 1).to_le_bytes());
    entry
}

/// Where a hostile guest points.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0..MEMORY_BYTES as u64 / 4096 + 2).prop_map(|page| page * 4096),
        2 => 0..MEMORY_BYTES as u64 + 8192,
        1 => any::<u64>(),
        1 => (0..64u64).prop_map(|back| u64::MAX - back),
    ]
}

/// The second half of a PRP pair or of an SGL descriptor: a length, and what it is, in the upper four bits.
fn address_or_descriptor() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => address(),
        2 => (0..5u64, (0..600u64).prop_map(|units| units * 16)).prop_map(|(kind, length)| kind << 60 | length),
    ]
}

/// FUSE and PSDT.
fn flags() -> impl Strategy<Value = u8> {
    prop_oneof![8 => Just(0u8), 3 => Just(0x40), 1 => Just(0x80), 2 => Just(1), 2 => Just(2), 1 => any::<u8>()]
}

fn entry() -> impl Strategy<Value = SubmissionEntry> {
    let opcodes = prop_oneof![4 => 0..0x1au8, 1 => any::<u8>()];
    let nsid = prop_oneof![3 => Just(1u32), 1 => any::<u32>(), 1 => 0..3u32];
    let dword = || prop_oneof![2 => 0..64u32, 1 => any::<u32>(), 1 => any::<u8>().prop_map(|low| u32::from(low) << 16 | 3)];
    let dwords = [dword(), dword(), dword(), dword()];
    (opcodes, nsid, address(), address_or_descriptor(), address_or_descriptor(), dwords, flags()).prop_map(
        |(opcode, nsid, prp1, prp2, mptr, [cdw10, cdw11, cdw12, cdw13], flags)| SubmissionEntry {
            opcode,
            flags,
            nsid,
            mptr,
            prp1,
            prp2,
            cdw10,
            cdw11,
            cdw12,
            cdw13,
            ..SubmissionEntry::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_holds_what_was_written(actions in prop::collection::vec(action(), 1..40), shadow: bool, in_buffer: bool) {
        play(&actions, shadow, in_buffer);
    }

    /// Entries, doorbells, registers and memory at random: no panic, no hang, and a reset always leads to a working controller.
    #[test]
    fn hostile_guests_hurt_only_themselves(
        entries in prop::collection::vec((any::<bool>(), entry()), 1..60),
        writes in prop::collection::vec((0..0x1040u64, any::<u32>()), 0..12),
        junk in prop::collection::vec(address_or_descriptor(), 64),
        shadow: bool,
        format in prop::option::of(prop::sample::select(formats())),
    ) {
        let config = ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new("HOSTILE") };
        let mut disk = namespace(1, 4096);
        if let Some((block_bytes, metadata)) = format {
            (disk.block_bytes, disk.metadata) = (block_bytes, Some(metadata));
        }
        let mut guest = Guest::ready(config, vec![disk]);
        if shadow {
            guest.use_shadow_doorbells();
        }
        guest.create_pair(1, 64);
        // Pages full of plausible list entries.
        for page in (0x40_0000..0x60_0000).step_by(4096) {
            for (index, value) in junk.iter().enumerate() {
                guest.write_bytes(page + index as u64 * 8, &value.to_le_bytes());
                guest.write_bytes(page + 4088 - index as u64 * 8, &value.to_le_bytes());
            }
        }
        for (index, (to_admin, entry)) in entries.into_iter().enumerate() {
            let queue = u16::from(!to_admin);
            guest.push(queue, entry);
            guest.ring(queue);
            if index % 5 == 0 {
                guest.run();
                guest.reap(queue);
            }
        }
        for (offset, value) in writes {
            guest.write32(offset, value);
            guest.run();
        }
        guest.run();
        guest.write32(regs::CC, 0);
        guest.run();
        guest.shadow = None;
        guest.write32(regs::CSTS, 1 << 4);
        assert_eq!(guest.read32(regs::CSTS) & 3, 0);
        guest.enable();
        guest.create_pair(1, 8);
        let page = guest.pages(2);
        guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    }
}
