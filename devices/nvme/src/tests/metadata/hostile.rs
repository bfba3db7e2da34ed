//! Metadata pointers that are wrong, and guests that change what they point to.

use nvme_spec::opcode::nvm;
use nvme_spec::sgl::{DATA_BLOCK, LAST_SEGMENT, SEGMENT};
use nvme_spec::{SglDescriptor, Status, SubmissionEntry};

use super::{ACTION, Disk, Fields, GUARD, formats, protected};
use crate::tests::driver::MEMORY_BYTES;

const END: u64 = MEMORY_BYTES as u64;

#[test]
fn a_metadata_pointer_is_looked_at_like_any_other() {
    let mut disk = Disk::new(512, protected(1, false));
    let blocks = disk.patterned(16, 1);
    disk.write(0, &blocks, Fields::new(ACTION, 0)).unwrap();
    let at = |disk: &Disk, opcode, flags, mptr| {
        let entry = disk.entry(opcode, 0, 16, Fields::default());
        let mut entry = SubmissionEntry { flags, mptr, ..entry };
        if flags != 0 {
            entry.set_data_sgl(SglDescriptor::new(DATA_BLOCK, disk.area, 16 * 512));
        }
        entry
    };
    let list = disk.area + 100 * 4096;
    let descriptor = |kind, address, length| SglDescriptor::new(kind, address, length).to_bytes();
    let transfer_error = Err(Status::DATA_TRANSFER_ERROR);
    for opcode in [nvm::READ, nvm::WRITE, nvm::COMPARE] {
        let mut ends = |flags, mptr| {
            let entry = at(&disk, opcode, flags, mptr);
            disk.guest.io(1, entry)
        };
        assert_eq!(ends(0, disk_separate() + 2), Err(Status::INVALID_FIELD), "not at a dword");
        // Outside, half outside, and around the end of all addresses.
        for mptr in [END, END - 124, !3, 1 << 52] {
            assert_eq!(ends(0, mptr), transfer_error, "{mptr:#x}");
            assert_eq!(ends(0x40, mptr), transfer_error, "{mptr:#x}");
            assert!(ends(0x80, mptr & !7).is_err(), "{mptr:#x}");
        }
        assert_eq!(ends(0x80, list + 4), Err(Status::INVALID_SGL_SEGMENT), "not at a qword");
        assert_eq!(ends(0xc0, list), Err(Status::INVALID_FIELD), "reserved");
        for (bytes, status) in [
            (descriptor(DATA_BLOCK, list + 64, 127), Status::SGL_METADATA_LENGTH_INVALID),
            (descriptor(DATA_BLOCK, END, 128), Status::DATA_TRANSFER_ERROR),
            (descriptor(LAST_SEGMENT, list + 16, 17), Status::INVALID_SGL_SEGMENT),
            (descriptor(SEGMENT, list, 16), Status::INVALID_SGL_COUNT),
            (descriptor(7, list, 16), Status::SGL_TYPE_INVALID),
        ] {
            disk.guest.write_bytes(list, &bytes);
            let entry = at(&disk, opcode, 0x80, list);
            assert_eq!(disk.guest.io(1, entry), Err(status), "{bytes:?}");
        }
    }
    // Metadata over the data: what is written last is there, and nothing else happens.
    let area = disk.area;
    let entry = at(&disk, nvm::READ, 0, area + 512);
    disk.guest.io(1, entry).unwrap();
    disk.read(0, 16, Fields::new(GUARD, 0)).unwrap();
}

/// Some dword; the page is not used.
fn disk_separate() -> u64 {
    0x20_0000
}

#[test]
fn limits_count_metadata_that_are_with_the_data() {
    // MDTS of 8 KiB: 16 blocks without, 15 with metadata.
    for (extended, most) in [(false, 16), (true, 15)] {
        let mut disk = Disk::new(512, protected(1, extended));
        let config = crate::ControllerConfig { mdts: 1, ..super::config() };
        let backend = disk.guest.namespaces[0].backend.clone();
        let namespace = super::namespace_on(backend, 512, disk.format);
        disk.guest = crate::tests::driver::Guest::ready(config, vec![namespace]);
        disk.guest.create_pair(1, 8);
        (disk.area, disk.separate) = (disk.guest.pages(180), disk.guest.pages(4));
        for (count, fields, fits) in [
            (most, Fields::default(), true),
            (most + 1, Fields::default(), false),
            // What the controller makes does not go over.
            (16, Fields::new(ACTION, 0), true),
            (17, Fields::new(ACTION, 0), false),
        ] {
            let ended = disk.io(nvm::READ, 0, count, fields);
            assert_eq!(ended, if fits { Ok(()) } else { Err(Status::INVALID_FIELD) }, "{extended} {count}");
        }
    }
}

#[test]
fn no_range_goes_beyond_the_last_block() {
    for (block_bytes, format) in formats() {
        let mut disk = Disk::new(block_bytes, format);
        let blocks = disk.guest.controller.inventory().namespaces[0].blocks;
        for opcode in
            [nvm::READ, nvm::WRITE, nvm::COMPARE, nvm::VERIFY, nvm::WRITE_ZEROES, nvm::WRITE_UNCORRECTABLE]
        {
            for lba in [blocks - 1, blocks, u64::MAX - 1] {
                assert_eq!(disk.io(opcode, lba, 2, Fields::default()), Err(Status::LBA_OUT_OF_RANGE));
            }
        }
        for fields in [Fields::default(), Fields::new(ACTION, blocks - 1)] {
            let last = disk.patterned(1, 1);
            disk.write(blocks - 1, &last, fields).unwrap();
            assert!(disk.read(blocks - 1, 1, fields).unwrap().data == last.data);
        }
    }
}
