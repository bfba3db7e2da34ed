//! Random guests: against a reference disk, and hostile ones.

use nvme_spec::opcode::{self, nvm};
use nvme_spec::{SubmissionEntry, regs};
use proptest::prelude::*;

use super::driver::{Guest, MEMORY_BYTES, namespace, transfer};
use crate::ControllerConfig;

const BLOCKS: u64 = 64;
const QUEUES: u16 = 3;

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
    let list: Vec<u8> = pages.iter().skip(1).flat_map(|page| page.to_le_bytes()).collect();
    guest.write_bytes(area, &list);
    let prp2 = if pages.len() == 2 { pages[1] } else { area };
    (SubmissionEntry { prp1: pages[0], prp2, ..entry }, pieces)
}

fn disk(reference: &mut [Vec<u8>; 2], nsid: u32, lba: u64, blocks: u64) -> &mut [u8] {
    &mut reference[usize::from(nsid != 1)][(lba * 512) as usize..((lba + blocks) * 512) as usize]
}

fn play(actions: &[Action], shadow: bool) {
    let config = ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new("RANDOM") };
    let mut guest = Guest::ready(config, vec![namespace(1, BLOCKS as usize), namespace(42, BLOCKS as usize)]);
    if shadow {
        guest.use_shadow_doorbells();
    }
    for queue in 1..=QUEUES {
        guest.create_pair(queue, 5 + u32::from(queue));
    }
    let area = guest.pages(8);
    let mut reference = [vec![0; (BLOCKS * 512) as usize], vec![0; (BLOCKS * 512) as usize]];
    for action in actions {
        match *action {
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
                disk(&mut reference, nsid, lba, blocks).copy_from_slice(&data);
                guest.io(queue, entry).unwrap();
            }
            Action::Read { queue, nsid, lba, blocks, offset } => {
                let entry = transfer(nvm::READ, nsid, lba, blocks as u32, 0);
                let (entry, pieces) = scattered(&guest, area, entry, blocks, offset);
                guest.io(queue, entry).unwrap();
                let data: Vec<u8> =
                    pieces.iter().flat_map(|(address, length)| guest.read_bytes(*address, *length)).collect();
                assert!(data == disk(&mut reference, nsid, lba, blocks), "{action:?}");
            }
            Action::Zeroes { queue, nsid, lba, blocks } => {
                let mut entry = transfer(nvm::WRITE_ZEROES, nsid, lba, blocks as u32, 0);
                entry.cdw12 |= opcode::CDW12_DEALLOCATE;
                guest.io(queue, entry).unwrap();
                disk(&mut reference, nsid, lba, blocks).fill(0);
            }
            Action::Flush { queue, nsid } => {
                guest.io(queue, transfer(nvm::FLUSH, nsid, 0, 1, 0)).unwrap();
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
                assert_eq!(seen, cids);
            }
            Action::Migrate { workers } => drop(guest.migrate(workers)),
        }
    }
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

fn entry() -> impl Strategy<Value = SubmissionEntry> {
    let opcodes = prop_oneof![4 => 0..0x1au8, 1 => any::<u8>()];
    let nsid = prop_oneof![3 => Just(1u32), 1 => any::<u32>(), 1 => 0..3u32];
    let dword = || prop_oneof![2 => 0..64u32, 1 => any::<u32>(), 1 => any::<u8>().prop_map(|low| u32::from(low) << 16 | 3)];
    (opcodes, nsid, address(), address(), [dword(), dword(), dword(), dword()], any::<u8>()).prop_map(
        |(opcode, nsid, prp1, prp2, [cdw10, cdw11, cdw12, cdw13], flags)| SubmissionEntry {
            opcode,
            flags: if flags < 240 { 0 } else { flags },
            nsid,
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
    fn a_disk_holds_what_was_written(actions in prop::collection::vec(action(), 1..40), shadow: bool) {
        play(&actions, shadow);
    }

    /// Entries, doorbells, registers and memory at random: no panic, no hang, and a reset always leads to a working controller.
    #[test]
    fn hostile_guests_hurt_only_themselves(
        entries in prop::collection::vec((any::<bool>(), entry()), 1..60),
        writes in prop::collection::vec((0..0x1040u64, any::<u32>()), 0..12),
        junk in prop::collection::vec(address(), 64),
        shadow: bool,
    ) {
        let config = ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new("HOSTILE") };
        let mut guest = Guest::ready(config, vec![namespace(1, 4096)]);
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
        let page = guest.pages(1);
        guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    }
}
