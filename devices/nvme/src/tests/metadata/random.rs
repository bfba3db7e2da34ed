//! Random guests of disks with metadata, against a reference.

use nvme_spec::Status;
use nvme_spec::opcode::{self, nvm};
use proptest::prelude::*;

use super::{ACTION, APPLICATION, Blocks, Disk, Fields, GUARD, REFERENCE, formats};

/// Blocks that are used: metadata of some share a page, of others not.
const BLOCKS: u64 = 70;

#[derive(Clone, Debug)]
enum Action {
    /// Writes; the controller makes the protection information, or the guest does, and spoils it if there is a `spoilt` byte.
    Write {
        lba: u64,
        count: usize,
        seed: u8,
        made: bool,
        spoilt: Option<usize>,
        prinfo: u32,
    },
    Read {
        lba: u64,
        count: usize,
        prinfo: u32,
    },
    Verify {
        lba: u64,
        count: usize,
        prinfo: u32,
    },
    Compare {
        lba: u64,
        count: usize,
        differs: bool,
    },
    Copy {
        lba: u64,
        count: usize,
        to: u64,
        made: bool,
    },
    Zeroes {
        lba: u64,
        count: usize,
        made: bool,
    },
    Deallocate {
        lba: u64,
        count: usize,
    },
    Uncorrectable {
        lba: u64,
        count: usize,
    },
    Migrate {
        workers: usize,
    },
}

fn action() -> impl Strategy<Value = Action> {
    let range = || (0..BLOCKS).prop_flat_map(|lba| (Just(lba), 1..=(BLOCKS - lba).min(40) as usize));
    let prinfo = 0..8u32;
    prop_oneof![
        4 => (range(), any::<u8>(), any::<bool>(), prop::option::weighted(0.3, 0..64usize), prinfo.clone())
            .prop_map(|((lba, count), seed, made, spoilt, prinfo)| {
                Action::Write { lba, count, seed, made, spoilt, prinfo }
            }),
        4 => (range(), 0..16u32).prop_map(|((lba, count), prinfo)| Action::Read { lba, count, prinfo }),
        1 => (range(), prinfo).prop_map(|((lba, count), prinfo)| Action::Verify { lba, count, prinfo }),
        1 => (range(), any::<bool>()).prop_map(|((lba, count), differs)| Action::Compare { lba, count, differs }),
        2 => (range(), 0..BLOCKS - 40, any::<bool>())
            .prop_map(|((lba, count), to, made)| Action::Copy { lba, count, to, made }),
        1 => (range(), any::<bool>()).prop_map(|((lba, count), made)| Action::Zeroes { lba, count, made }),
        1 => range().prop_map(|(lba, count)| Action::Deallocate { lba, count }),
        1 => range().prop_map(|(lba, count)| Action::Uncorrectable { lba, count }),
        1 => (1..4usize).prop_map(|workers| Action::Migrate { workers }),
    ]
}

/// What the disk has to hold.
struct Reference {
    blocks: Blocks,
    marked: Vec<bool>,
}

impl Reference {
    fn new(disk: &Disk) -> Self {
        let mut blocks = Blocks {
            data: vec![vec![0; disk.block_bytes]; BLOCKS as usize],
            metadata: vec![vec![0; disk.metadata_bytes()]; BLOCKS as usize],
        };
        if disk.format.protection_type != 0 {
            blocks.metadata.iter_mut().for_each(|metadata| metadata[disk.tuple()].fill(0xff));
        }
        Self { blocks, marked: vec![false; BLOCKS as usize] }
    }

    fn part(&self, lba: u64, count: usize) -> Blocks {
        let range = lba as usize..lba as usize + count;
        Blocks {
            data: self.blocks.data[range.clone()].to_vec(),
            metadata: self.blocks.metadata[range].to_vec(),
        }
    }

    fn put(&mut self, lba: u64, part: &Blocks) {
        let range = lba as usize..lba as usize + part.data.len();
        self.blocks.data[range.clone()].clone_from_slice(&part.data);
        self.blocks.metadata[range.clone()].clone_from_slice(&part.metadata);
        self.marked[range].fill(false);
    }

    fn is_marked(&self, lba: u64, count: usize) -> bool {
        self.marked[lba as usize..lba as usize + count].contains(&true)
    }
}

/// The first check that fails of blocks, as the specification says.
fn check(disk: &Disk, blocks: &Blocks, fields: Fields) -> Result<(), Status> {
    let kind = disk.format.protection_type;
    if kind == 0 {
        return Ok(());
    }
    for (index, (data, metadata)) in blocks.data.iter().zip(&blocks.metadata).enumerate() {
        let tuple = &metadata[disk.tuple()];
        let expected = disk.expected_tuple(data, metadata, fields, index);
        if tuple[2..4] == [0xff; 2] && (kind != 3 || tuple[4..] == [0xff; 4]) {
            continue;
        }
        let differs = |range: std::ops::Range<usize>| tuple[range.clone()] != expected[range];
        if fields.prinfo & GUARD != 0 && differs(0..2) {
            return Err(Status::GUARD_CHECK_ERROR);
        }
        if fields.prinfo & APPLICATION != 0 && differs(2..4) {
            return Err(Status::APPLICATION_TAG_CHECK_ERROR);
        }
        if fields.prinfo & REFERENCE != 0 && differs(4..8) {
            return Err(Status::REFERENCE_TAG_CHECK_ERROR);
        }
    }
    Ok(())
}

fn play(format: usize, actions: &[Action]) {
    let (block_bytes, format) = formats()[format % formats().len()];
    let mut disk = Disk::new(block_bytes, format);
    let mut reference = Reference::new(&disk);
    let kind = format.protection_type;
    // With type 3 the reference tag is not checked.
    let usable = |prinfo: u32| if kind == 3 { prinfo & !REFERENCE } else { prinfo };
    let unreadable = Err(Status::UNRECOVERED_READ_ERROR);
    for action in actions {
        match *action {
            Action::Write { lba, count, seed, made, spoilt, prinfo } => {
                let prinfo = if made { ACTION } else { usable(prinfo) };
                let fields = Fields { prinfo, application: 9, ..Fields::new(0, lba) };
                let mut blocks = disk.patterned(count, seed);
                if kind != 0 {
                    disk.protect(&mut blocks, fields);
                }
                if let Some(byte) = spoilt {
                    let bytes = disk.metadata_bytes();
                    blocks.metadata[count / 2][byte % bytes] ^= 0x10;
                }
                let expected = if made { Ok(()) } else { check(&disk, &blocks, fields) };
                assert_eq!(disk.write(lba, &blocks, fields), expected, "{action:?}");
                if expected.is_ok() {
                    if made && kind != 0 {
                        if !disk.transfers(fields) {
                            blocks.metadata.iter_mut().for_each(|metadata| metadata.fill(0));
                        }
                        disk.protect(&mut blocks, fields);
                    }
                    reference.put(lba, &blocks);
                }
            }
            Action::Read { lba, count, prinfo } => {
                let fields = Fields { prinfo: usable(prinfo), application: 9, ..Fields::new(0, lba) };
                let part = reference.part(lba, count);
                let expected = match reference.is_marked(lba, count) {
                    true => unreadable,
                    false => check(&disk, &part, fields),
                };
                let read = disk.read(lba, count, fields);
                assert_eq!(read.as_ref().map(|_| ()).map_err(|status| *status), expected, "{action:?}");
                if let Ok(read) = read {
                    assert!(read.data == part.data, "{action:?}");
                    assert!(!disk.transfers(fields) || read.metadata == part.metadata, "{action:?}");
                }
            }
            Action::Verify { lba, count, prinfo } => {
                let fields = Fields { prinfo: usable(prinfo), application: 9, ..Fields::new(0, lba) };
                let checked = check(&disk, &reference.part(lba, count), fields);
                let expected = if reference.is_marked(lba, count) { unreadable } else { checked };
                assert_eq!(disk.io(nvm::VERIFY, lba, count, fields), expected, "{action:?}");
            }
            Action::Compare { lba, count, differs } => {
                let mut part = reference.part(lba, count);
                part.data[count - 1][300] ^= u8::from(differs);
                disk.put(&part, Fields::default());
                let expected = match (reference.is_marked(lba, count), differs) {
                    (true, _) => unreadable,
                    (_, true) => Err(Status::COMPARE_FAILURE),
                    _ => Ok(()),
                };
                assert_eq!(disk.io(nvm::COMPARE, lba, count, Fields::default()), expected, "{action:?}");
            }
            Action::Copy { lba, count, to, made } => {
                let prinfo = if made { ACTION } else { 0 };
                let fields = Fields { prinfo, application: 4, ..Fields::new(0, to) };
                let mut range = [0; 32];
                range[8..16].copy_from_slice(&lba.to_le_bytes());
                range[16..18].copy_from_slice(&(count as u16 - 1).to_le_bytes());
                disk.guest.write_bytes(disk.area, &range);
                let mut entry = disk.entry(nvm::COPY, to, 1, fields);
                entry.cdw12 |= prinfo << 12;
                // One range whose parts overlap is any of both.
                if lba.abs_diff(to) < count as u64 && lba != to {
                    continue;
                }
                let expected = if reference.is_marked(lba, count) { unreadable } else { Ok(()) };
                assert_eq!(disk.guest.io(1, entry), expected, "{action:?}");
                if expected.is_ok() {
                    let mut part = reference.part(lba, count);
                    if made && kind != 0 {
                        disk.protect(&mut part, fields);
                    }
                    reference.put(to, &part);
                }
            }
            Action::Zeroes { lba, count, made } => {
                let fields = Fields { application: 6, ..Fields::new(if made { ACTION } else { 0 }, lba) };
                disk.io(nvm::WRITE_ZEROES, lba, count, fields).unwrap();
                let mut part = Blocks {
                    data: vec![vec![0; disk.block_bytes]; count],
                    metadata: vec![vec![0; disk.metadata_bytes()]; count],
                };
                if made && kind != 0 {
                    disk.protect(&mut part, fields);
                }
                reference.put(lba, &part);
            }
            Action::Deallocate { lba, count } => {
                let range = [&[0; 4][..], &(count as u32).to_le_bytes(), &lba.to_le_bytes()].concat();
                disk.guest.write_bytes(disk.area, &range);
                let mut entry = disk.entry(nvm::DATASET_MANAGEMENT, 0, 1, Fields::default());
                (entry.cdw10, entry.cdw11) = (0, opcode::DSM_DEALLOCATE);
                disk.guest.io(1, entry).unwrap();
                // An image in memory leaves data as they are.
                let mut part = reference.part(lba, count);
                for metadata in &mut part.metadata {
                    metadata.fill(0);
                    if kind != 0 {
                        metadata[disk.tuple()].fill(0xff);
                    }
                }
                reference.put(lba, &part);
            }
            Action::Uncorrectable { lba, count } => {
                disk.io(nvm::WRITE_UNCORRECTABLE, lba, count, Fields::default()).unwrap();
                reference.marked[lba as usize..lba as usize + count].fill(true);
            }
            Action::Migrate { workers } => drop(disk.guest.migrate(workers)),
        }
    }
    for lba in 0..BLOCKS {
        if !reference.is_marked(lba, 1) {
            assert!(disk.raw(lba, 1) == reference.part(lba, 1), "block {lba}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_with_metadata_holds_what_was_written(
        format in 0..64usize,
        actions in prop::collection::vec(action(), 1..40),
    ) {
        play(format, &actions);
    }
}
