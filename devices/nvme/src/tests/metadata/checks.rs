//! Each command with each type: what is made, checked, passed on and stored.

use nvme_spec::log::ErrorEntry;
use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::sgl::{BIT_BUCKET, DATA_BLOCK, LAST_SEGMENT};
use nvme_spec::{SglDescriptor, Status, SubmissionEntry};

use super::{ACTION, APPLICATION, Disk, Fields, GUARD, REFERENCE, formats, protected};

/// A reference tag for commands from `lba` on that every type accepts, and all checks that it can make.
fn all_checks(protection_type: u8) -> u32 {
    if protection_type == 3 { GUARD | APPLICATION } else { GUARD | APPLICATION | REFERENCE }
}

#[test]
fn what_a_guest_writes_it_reads_in_every_format() {
    for (block_bytes, format) in formats() {
        let mut disk = Disk::new(block_bytes, format);
        // Across pages of metadata, and more than a piece.
        for (lba, count) in [(0, 1), (63, 2), (5, 40)] {
            let fields = Fields::new(0, lba);
            let mut blocks = disk.patterned(count, lba as u8);
            disk.protect(&mut blocks, fields);
            let checks = all_checks(format.protection_type);
            disk.write(lba, &blocks, Fields { prinfo: checks, ..fields }).unwrap();
            let read = disk.read(lba, count, Fields { prinfo: checks, ..fields }).unwrap();
            assert!(read == blocks, "{block_bytes} {format:?} {lba}");
        }
        // What is around it was never written.
        let raw = disk.raw(45, 4);
        let unwritten = &raw.metadata[..];
        for metadata in unwritten {
            let expected = if format.protection_type == 0 { 0 } else { 0xff };
            assert!(metadata[disk.tuple()].iter().all(|&byte| byte == expected), "{format:?}");
        }
        assert!(raw.data.concat().iter().all(|&byte| byte == 0));
    }
}

#[test]
fn the_controller_inserts_and_strips() {
    for (block_bytes, format) in formats().into_iter().filter(|(_, format)| format.protection_type != 0) {
        let mut disk = Disk::new(block_bytes, format);
        let (lba, count) = (61, 7);
        let fields = Fields { application: 0xa55a, ..Fields::new(ACTION, lba) };
        let mut blocks = disk.patterned(count, 3);
        disk.write(lba, &blocks, fields).unwrap();
        // With eight bytes nothing of the guest's metadata was taken; with more, all but the protection information.
        disk.protect(&mut blocks, fields);
        let stored = disk.raw(lba, count);
        assert!(stored == blocks, "{block_bytes} {format:?}");
        let checks = Fields { prinfo: ACTION | all_checks(format.protection_type), ..fields };
        let read = disk.read(lba, count, checks).unwrap();
        assert!(read.data == blocks.data, "{format:?}");
        if !disk.transfers(checks) {
            let untouched = disk.guest.read_bytes(disk.separate, count * 8);
            assert!(untouched.iter().all(|&byte| byte == 0xee), "nothing is given to the guest: {format:?}");
        } else {
            assert!(read.metadata == blocks.metadata, "{format:?}");
        }
    }
}

#[test]
fn a_write_that_fails_a_check_stores_nothing() {
    for (block_bytes, format) in formats().into_iter().filter(|(_, format)| format.protection_type != 0) {
        let mut disk = Disk::new(block_bytes, format);
        let fields = Fields { application: 0x1234, ..Fields::new(0, 20) };
        let mut good = disk.patterned(3, 9);
        disk.protect(&mut good, fields);
        let before = disk.raw(20, 3);
        let tuple = disk.tuple().start;
        let with_reference = format.protection_type != 3;
        for (byte, check, status) in [
            (tuple, GUARD, Status::GUARD_CHECK_ERROR),
            (tuple + 3, APPLICATION, Status::APPLICATION_TAG_CHECK_ERROR),
            (tuple + 7, REFERENCE, Status::REFERENCE_TAG_CHECK_ERROR),
        ] {
            if check == REFERENCE && !with_reference {
                continue;
            }
            let mut bad = good.clone();
            bad.metadata[1][byte] ^= 1;
            let checked = disk.write(20, &bad, Fields { prinfo: check, ..fields });
            assert_eq!(checked, Err(status), "{format:?}");
            assert!(disk.raw(20, 3) == before, "{format:?}");
            // The others do not see it.
            let others = all_checks(format.protection_type) & !check;
            disk.write(20, &bad, Fields { prinfo: others, ..fields }).unwrap();
            assert!(disk.raw(20, 3) == bad);
            // Nor does anything come out when it is read, but for what is not checked.
            let read = disk.read(20, 3, Fields { prinfo: check, ..fields });
            assert_eq!(read, Err(status));
            assert!(disk.guest.read_bytes(disk.area, 1536).iter().all(|&byte| byte == 0xee));
            disk.read(20, 3, Fields { prinfo: others, ..fields }).unwrap();
            assert_eq!(disk.io(nvm::VERIFY, 20, 3, Fields { prinfo: check, ..fields }), Err(status));
            disk.io(nvm::VERIFY, 20, 3, Fields { prinfo: others, ..fields }).unwrap();
            let clear = Fields { prinfo: 0, ..fields };
            disk.write(20, &before, clear).unwrap();
        }
    }
}

#[test]
fn the_block_that_failed_is_in_the_error_log() {
    let mut disk = Disk::new(512, protected(1, false));
    let blocks = disk.patterned(5, 1);
    disk.write(30, &blocks, Fields::new(ACTION, 30)).unwrap();
    let mut raw = disk.raw(33, 1);
    raw.metadata[0][0] ^= 0x80;
    disk.write(33, &raw, Fields::default()).unwrap();
    assert_eq!(disk.read(30, 5, Fields::new(GUARD, 30)).unwrap_err(), Status::GUARD_CHECK_ERROR);
    let log: [u8; 64] = disk
        .guest
        .admin_data(SubmissionEntry {
            opcode: admin::GET_LOG_PAGE,
            nsid: 0xffff_ffff,
            cdw10: 1 | 15 << 16,
            ..SubmissionEntry::default()
        })
        .unwrap();
    let entry = ErrorEntry::from_bytes(&log);
    assert_eq!((entry.lba, entry.nsid, entry.sq_id), (33, 1, 1));
    assert_eq!(Status(entry.status >> 1).code(), Status::GUARD_CHECK_ERROR);
}

#[test]
fn escapes_are_not_checked() {
    for kind in 1..=3 {
        let mut disk = Disk::new(512, protected(kind, true));
        let mut blocks = disk.patterned(1, 1);
        let checks = Fields::new(all_checks(kind), 9);
        blocks.metadata[0] = vec![1, 2, 0xff, 0xff, 3, 4, 5, 6];
        let checked = disk.write(9, &blocks, checks);
        let expected = if kind == 3 { Err(Status::GUARD_CHECK_ERROR) } else { Ok(()) };
        assert_eq!(checked, expected, "type {kind}");
        blocks.metadata[0][4..].fill(0xff);
        disk.write(9, &blocks, checks).unwrap();
        assert!(disk.read(9, 1, checks).unwrap() == blocks);
    }
}

#[test]
fn tags_that_cannot_be_are_refused() {
    for (kind, reference, expected) in [
        (1, 8, Err(Status::INVALID_PROTECTION_INFORMATION)),
        (1, 7, Ok(())),
        (2, 8, Ok(())),
        (3, 7, Err(Status::INVALID_PROTECTION_INFORMATION)),
    ] {
        let mut disk = Disk::new(512, protected(kind, false));
        let fields = Fields::new(REFERENCE, reference);
        let mut blocks = disk.patterned(1, 1);
        disk.protect(&mut blocks, fields);
        assert_eq!(disk.write(7, &blocks, fields), expected, "type {kind}");
        let read = disk.read(7, 1, fields).map(|_| ());
        assert_eq!(read, expected);
        disk.put(&blocks, fields);
        for opcode in [nvm::VERIFY, nvm::COMPARE] {
            assert_eq!(disk.io(opcode, 7, 1, fields), expected, "type {kind}");
        }
        // Nothing is made or kept back there.
        for opcode in [nvm::VERIFY, nvm::COMPARE] {
            let made = disk.io(opcode, 7, 1, Fields::new(ACTION, 7));
            assert_eq!(made, Err(Status::INVALID_PROTECTION_INFORMATION));
        }
    }
    // Without protection information none of it means anything.
    let mut disk = Disk::new(512, protected(0, false));
    let blocks = disk.patterned(2, 7);
    disk.write(7, &blocks, Fields::new(15, 99)).unwrap();
    assert!(disk.read(7, 2, Fields::new(15, 3)).unwrap() == blocks);
}

#[test]
fn compare_looks_at_data_and_metadata_but_checks_protection_information() {
    for (block_bytes, format) in formats() {
        let mut disk = Disk::new(block_bytes, format);
        let fields = Fields::new(0, 2);
        let mut blocks = disk.patterned(40, 5);
        disk.protect(&mut blocks, fields);
        disk.write(2, &blocks, fields).unwrap();
        let mut compare = |blocks: &super::Blocks, prinfo| {
            disk.put(blocks, fields);
            disk.io(nvm::COMPARE, 2, 40, Fields { prinfo, ..fields })
        };
        assert_eq!(compare(&blocks, all_checks(format.protection_type)), Ok(()), "{format:?}");
        let mut other = blocks.clone();
        other.data[39][block_bytes as usize - 1] ^= 1;
        assert_eq!(compare(&other, 0), Err(Status::COMPARE_FAILURE));
        let mut other = blocks.clone();
        let last = if format.protection_first { format.bytes - 1 } else { 0 };
        other.metadata[39][usize::from(last)] ^= 1;
        let in_tuple = format.protection_type != 0 && format.bytes == 8;
        let expected = if in_tuple { Ok(()) } else { Err(Status::COMPARE_FAILURE) };
        assert_eq!(compare(&other, 0), expected, "{format:?}");
        if in_tuple && !format.protection_first {
            assert_eq!(compare(&other, GUARD), Err(Status::GUARD_CHECK_ERROR));
        }
    }
}

#[test]
fn copies_pass_on_or_make_anew() {
    for (block_bytes, format) in formats() {
        let mut disk = Disk::new(block_bytes, format);
        let mut blocks = disk.patterned(30, 5);
        disk.protect(&mut blocks, Fields { application: 77, ..Fields::new(0, 10) });
        disk.write(10, &blocks, Fields::default()).unwrap();
        let kind = format.protection_type;
        let mut copy = |read_prinfo: u32, fields: Fields, tags: [u32; 2]| {
            let ranges: Vec<u8> = [(10u64, 10u16, 0), (20, 20, 10)]
                .iter()
                .flat_map(|&(lba, count, index): &(u64, u16, u32)| {
                    let reference = if kind == 3 { tags[0] } else { tags[0] + index };
                    let mut range = [0; 32];
                    range[8..16].copy_from_slice(&lba.to_le_bytes());
                    range[16..18].copy_from_slice(&(count - 1).to_le_bytes());
                    range[24..28].copy_from_slice(&reference.to_le_bytes());
                    range[28..32].copy_from_slice(&tags[1].to_le_bytes());
                    range
                })
                .collect();
            disk.guest.write_bytes(disk.area, &ranges);
            let mut entry = disk.entry(nvm::COPY, 100, 1, fields);
            entry.cdw12 |= 1 | read_prinfo << 12;
            disk.guest.submit(1, entry)
        };
        let checks = all_checks(kind);
        let tags = [10, 0xffff_004d];
        let ended = copy(0, Fields::default(), tags);
        assert_eq!((ended.status(), ended.dw0), (Status::SUCCESS, 0));
        if kind != 0 {
            // The tags of the source are not those that are expected, of the second range.
            let ended = copy(APPLICATION, Fields::default(), [10, 0xffff_004e]);
            assert_eq!((ended.status().code(), ended.dw0), (Status::APPLICATION_TAG_CHECK_ERROR, 0));
            let ended = copy(GUARD | ACTION, Fields::new(0, 100), tags);
            assert_eq!(ended.status().code(), Status::INVALID_FIELD, "made anew on one side only");
            // What is passed on is checked where it goes.
            let foreign = Fields { application: 78, ..Fields::new(APPLICATION, 100) };
            let ended = copy(checks, foreign, tags);
            assert_eq!(ended.status().code(), Status::APPLICATION_TAG_CHECK_ERROR);
            let anew = Fields { application: 5, ..Fields::new(ACTION, 100) };
            let ended = copy(checks | ACTION, anew, tags);
            assert_eq!((ended.status(), ended.dw0), (Status::SUCCESS, 0), "{format:?}");
            disk.protect(&mut blocks, anew);
        }
        assert!(disk.raw(100, 30) == blocks, "{block_bytes} {format:?}");
    }
}

#[test]
fn zeroes_have_the_protection_information_that_is_asked_for() {
    for (block_bytes, format) in formats() {
        let mut disk = Disk::new(block_bytes, format);
        let blocks = disk.patterned(40, 5);
        disk.write(10, &blocks, Fields::default()).unwrap();
        let is_protected = format.protection_type != 0;
        let zeroes = super::Blocks {
            data: vec![vec![0; block_bytes as usize]; 38],
            metadata: vec![vec![0; format.bytes.into()]; 38],
        };
        for deallocate in [0, opcode::CDW12_DEALLOCATE] {
            for prinfo in [0, ACTION] {
                let fields = Fields { application: 3, ..Fields::new(prinfo, 11) };
                let mut entry = disk.entry(nvm::WRITE_ZEROES, 11, 38, fields);
                entry.cdw12 |= deallocate;
                disk.guest.io(1, entry).unwrap();
                let mut expected = zeroes.clone();
                if is_protected && prinfo == ACTION {
                    disk.protect(&mut expected, fields);
                }
                let raw = disk.raw(10, 40);
                assert!(raw.data[1..39] == expected.data, "{format:?}");
                assert!(raw.metadata[1..39] == expected.metadata, "{format:?} {prinfo}");
                let around = (&raw.metadata[0], &raw.metadata[39]);
                assert_eq!(around, (&blocks.metadata[0], &blocks.metadata[39]));
                disk.write(10, &blocks, Fields::default()).unwrap();
            }
        }
        let checked = disk.io(nvm::WRITE_ZEROES, 11, 38, Fields::new(GUARD, 11));
        assert_eq!(checked.is_err(), is_protected, "there is nothing to check");
    }
}

#[test]
fn deallocated_blocks_are_as_if_they_had_never_been_written() {
    for (block_bytes, format) in formats() {
        let mut disk = Disk::new(block_bytes, format);
        // Whole pages of metadata and parts of them.
        let last = disk.guest.controller.inventory().namespaces[0].blocks - 1;
        let count = 40;
        let mut lbas = vec![10, last - count + 1];
        for lba in &mut lbas {
            let mut blocks = disk.patterned(count as usize, 5);
            disk.protect(&mut blocks, Fields::new(0, *lba));
            disk.write(*lba, &blocks, Fields::default()).unwrap();
        }
        let ranges: Vec<u8> = [(11u64, last as u32 - 20), (0, 0)]
            .iter()
            .flat_map(|&(lba, blocks): &(u64, u32)| {
                [&[0; 4][..], &blocks.to_le_bytes(), &lba.to_le_bytes()].concat()
            })
            .collect();
        disk.guest.write_bytes(disk.area, &ranges);
        let mut entry = disk.entry(nvm::DATASET_MANAGEMENT, 0, 1, Fields::default());
        (entry.cdw10, entry.cdw11, entry.cdw12) = (1, 0, 0);
        let kept = disk.raw(10, 2).metadata;
        disk.guest.write_bytes(disk.area, &ranges);
        disk.guest.io(1, entry).unwrap();
        assert!(disk.raw(10, 2).metadata == kept, "hints change nothing");
        disk.guest.write_bytes(disk.area, &ranges);
        disk.guest.io(1, SubmissionEntry { cdw11: opcode::DSM_DEALLOCATE, ..entry }).unwrap();
        let unwritten = if format.protection_type == 0 { 0 } else { 0xff };
        let tuple = disk.tuple();
        let mut is_clear = |lba: u64| {
            let metadata = disk.raw(lba, 1).metadata.concat();
            metadata
                .iter()
                .enumerate()
                .all(|(at, &byte)| byte == if tuple.contains(&at) { unwritten } else { 0 })
        };
        for lba in [11, 30, last / 2, last - 30, last - 10] {
            assert!(is_clear(lba), "{block_bytes} {format:?} {lba} of {last}");
        }
        for lba in [10, last - 9, last] {
            assert!(!is_clear(lba), "{block_bytes} {format:?} {lba} of {last}");
        }
        if format.protection_type != 0 {
            let checks = Fields::new(all_checks(format.protection_type), 11);
            disk.read(11, 29, checks).unwrap();
        }
    }
}

#[test]
fn uncorrectable_blocks_are_not_read_until_they_are_written() {
    let mut disk = Disk::new(512, protected(1, false));
    disk.io(nvm::WRITE_UNCORRECTABLE, 5, 2, Fields::default()).unwrap();
    for opcode in [nvm::READ, nvm::VERIFY, nvm::COMPARE] {
        assert_eq!(disk.io(opcode, 4, 3, Fields::default()), Err(Status::UNRECOVERED_READ_ERROR));
    }
    let blocks = disk.patterned(1, 1);
    disk.write(5, &blocks, Fields::new(ACTION, 5)).unwrap();
    disk.read(5, 1, Fields::new(GUARD, 5)).unwrap();
    assert_eq!(disk.read(5, 2, Fields::default()), Err(Status::UNRECOVERED_READ_ERROR));
    disk.io(nvm::WRITE_ZEROES, 6, 1, Fields::default()).unwrap();
    disk.read(4, 3, Fields::default()).unwrap();
}

#[test]
fn lists_describe_data_and_metadata() {
    for format in [protected(1, false), protected(1, true)] {
        let mut disk = Disk::new(512, format);
        let (lba, count) = (3, 300);
        let fields = Fields::new(ACTION ^ ACTION, lba);
        let mut blocks = disk.patterned(count, 8);
        disk.protect(&mut blocks, fields);
        disk.put(&blocks, fields);
        let checks = Fields { prinfo: GUARD | REFERENCE, ..fields };
        let mut entry = disk.entry(nvm::WRITE, lba, count, checks);
        let list = disk.area + 170 * 4096;
        // Data in three pieces at odd places, metadata by a descriptor of their own in two.
        let bytes = (count * (512 + if format.extended { 8 } else { 0 })) as u32;
        let pieces = [(0, 513), (513, 40_000), (40_513, bytes - 40_513)];
        let metadata = [(0, 1000), (1000, count as u32 * 8 - 1000)];
        let describe = |base: u64, pieces: &[(u32, u32)]| -> Vec<u8> {
            let one = |&(at, length): &(u32, u32)| {
                SglDescriptor::new(DATA_BLOCK, base + u64::from(at), length).to_bytes()
            };
            pieces.iter().flat_map(one).collect()
        };
        disk.guest.write_bytes(list, &describe(disk.area, &pieces));
        disk.guest.write_bytes(list + 256, &describe(disk.separate, &metadata));
        let segment = SglDescriptor::new(LAST_SEGMENT, list + 256, 32);
        disk.guest.write_bytes(list + 512, &segment.to_bytes());
        entry.flags = 0x80;
        entry.mptr = list + 512;
        entry.set_data_sgl(SglDescriptor::new(LAST_SEGMENT, list, 48));
        disk.guest.io(1, entry).unwrap();
        assert!(disk.raw(lba, count) == blocks);
        disk.guest.write_bytes(disk.area, &vec![0; bytes as usize]);
        disk.guest.write_bytes(disk.separate, &vec![0; count * 8]);
        disk.guest.io(1, SubmissionEntry { opcode: nvm::READ, ..entry }).unwrap();
        assert!(disk.take(count, fields) == blocks);
        // Metadata at an odd address by PSDT 01b; a bit bucket takes data, and the check has seen them.
        if !format.extended {
            let buckets = SglDescriptor::new(BIT_BUCKET, 0, bytes).to_bytes();
            disk.guest.write_bytes(list, &buckets);
            entry.set_data_sgl(SglDescriptor::new(LAST_SEGMENT, list, 16));
            (entry.opcode, entry.flags, entry.mptr) = (nvm::READ, 0x40, disk.separate + 1);
            disk.guest.write_bytes(disk.area, &vec![0xcc; 4096]);
            disk.guest.io(1, entry).unwrap();
            let odd = disk.guest.read_bytes(disk.separate + 1, count * 8);
            assert!(odd == blocks.metadata.concat());
            assert!(disk.guest.read_bytes(disk.area, 4096) == vec![0xcc; 4096]);
        }
    }
}
