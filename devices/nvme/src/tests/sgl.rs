//! Scatter gather lists.

use nvme_spec::identify::IdentifyController;
use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::sgl::{BIT_BUCKET, DATA_BLOCK, KEYED_DATA_BLOCK, LAST_SEGMENT, SEGMENT, SglDescriptor};
use nvme_spec::{Status, SubmissionEntry};

use super::driver::{Guest, MEMORY_BYTES, namespace, transfer};
use crate::ControllerConfig;

const BY_BUFFER: u8 = 0x40;
const BY_DESCRIPTOR: u8 = 0x80;

fn ready() -> Guest {
    let mut guest = Guest::ready(ControllerConfig::new("SGL"), vec![namespace(1, 4096)]);
    guest.create_pair(1, 16);
    guest
}

/// A transfer of `blocks` blocks from block 0 whose data pointer is `descriptor`.
fn by_sgl(opcode: u8, blocks: u32, descriptor: SglDescriptor) -> SubmissionEntry {
    let mut entry = SubmissionEntry { flags: BY_BUFFER, ..transfer(opcode, 1, 0, blocks, 0) };
    entry.set_data_sgl(descriptor);
    entry
}

fn write_segment(guest: &Guest, address: u64, descriptors: &[SglDescriptor]) {
    let bytes: Vec<u8> = descriptors.iter().flat_map(|descriptor| descriptor.to_bytes()).collect();
    guest.write_bytes(address, &bytes);
}

fn block(address: u64, length: u32) -> SglDescriptor {
    SglDescriptor::new(DATA_BLOCK, address, length)
}

fn bucket(length: u32) -> SglDescriptor {
    SglDescriptor::new(BIT_BUCKET, 0, length)
}

fn segment(address: u64, descriptors: u32) -> SglDescriptor {
    SglDescriptor::new(SEGMENT, address, descriptors * 16)
}

fn last(address: u64, descriptors: u32) -> SglDescriptor {
    SglDescriptor::new(LAST_SEGMENT, address, descriptors * 16)
}

fn pattern(bytes: usize, seed: u32) -> Vec<u8> {
    (0..bytes as u32).map(|byte| (byte.wrapping_mul(seed) >> 3) as u8).collect()
}

#[test]
fn data_are_found_at_any_alignment_through_chained_segments() {
    let mut guest = ready();
    let (data, lists) = (guest.pages(8), guest.pages(2));
    let bytes = pattern(8192, 77);
    // 1 + 4094 bytes, an empty block, 3 bytes; in the next segment the rest, and more than is asked for.
    write_segment(
        &guest,
        lists + 8,
        &[block(data + 1, 1), block(data + 101, 4094), block(u64::MAX, 0), segment(lists + 4096, 2)],
    );
    write_segment(&guest, lists + 4096, &[block(data + 5001, 3), last(lists + 2048, 2)]);
    write_segment(&guest, lists + 2048, &[block(data + 8000, 4094), block(data + 20_000, 512)]);
    let pieces = [(data + 1, 1), (data + 101, 4094), (data + 5001, 3), (data + 8000, 4094)];
    let mut position = 0;
    for (address, length) in pieces {
        guest.write_bytes(address, &bytes[position..position + length]);
        position += length;
    }
    for flags in [BY_BUFFER, BY_DESCRIPTOR] {
        guest.io(1, SubmissionEntry { flags, ..by_sgl(nvm::WRITE, 16, segment(lists + 8, 4)) }).unwrap();
    }
    let page = guest.pages(2);
    guest.io(1, transfer(nvm::READ, 1, 0, 16, page)).unwrap();
    assert!(guest.read_bytes(page, 8192) == bytes);
    guest.clear(data, 8 * 4096);
    guest.io(1, by_sgl(nvm::READ, 16, segment(lists + 8, 4))).unwrap();
    let read: Vec<u8> =
        pieces.iter().flat_map(|&(address, length)| guest.read_bytes(address, length)).collect();
    assert!(read == bytes);
    assert_eq!(guest.read_bytes(data + 20_000, 512), vec![0; 512], "what is beyond the data is not touched");
    // One data block in the command itself.
    guest.clear(page, 8192);
    guest.io(1, by_sgl(nvm::READ, 16, block(page, 8192))).unwrap();
    assert!(guest.read_bytes(page, 8192) == bytes);
}

#[test]
fn bit_buckets_swallow_what_is_read_and_add_nothing_to_what_is_written() {
    let mut guest = ready();
    let (data, list) = (guest.pages(4), guest.pages(1));
    let bytes = pattern(4096, 31);
    guest.write_bytes(data, &bytes);
    guest.io(1, transfer(nvm::WRITE, 1, 0, 8, data)).unwrap();
    guest.write_bytes(data, &[0xcc; 8192]);
    let descriptors =
        [bucket(100), bucket(7), block(data + 3, 1000), bucket(2000), block(data + 4099, 900), bucket(9999)];
    write_segment(&guest, list, &descriptors);
    guest.io(1, by_sgl(nvm::READ, 8, last(list, 6))).unwrap();
    let mut expected = vec![0xcc; 8192];
    expected[3..1003].copy_from_slice(&bytes[107..1107]);
    expected[4099..4999].copy_from_slice(&bytes[3107..4007]);
    assert!(guest.read_bytes(data, 8192) == expected);
    // All of it into buckets: nothing is transferred, and nothing fails.
    guest.io(1, by_sgl(nvm::READ, 8, bucket(4096))).unwrap();
    assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, bucket(4095))), Err(Status::SGL_DATA_LENGTH_INVALID));
    assert!(guest.read_bytes(data, 8192) == expected);
    // A write takes its bytes from the blocks around them.
    write_segment(&guest, list, &[block(data, 500), bucket(5000), block(data + 4000, 12), bucket(1)]);
    guest.io(1, by_sgl(nvm::WRITE, 1, last(list, 4))).unwrap();
    guest.io(1, transfer(nvm::READ, 1, 0, 1, data + 8192)).unwrap();
    let written = [&expected[..500], &expected[4000..4012]].concat();
    assert_eq!(guest.read_bytes(data + 8192, 512), written);
    assert_eq!(guest.io(1, by_sgl(nvm::WRITE, 1, bucket(512))), Err(Status::SGL_DATA_LENGTH_INVALID));
}

#[test]
fn lists_that_are_no_lists_are_refused() {
    let mut guest = ready();
    let (data, list) = (guest.pages(2), guest.pages(2));
    let end = MEMORY_BYTES as u64;
    let of = |kind: u8, sub_type: u8| {
        let mut descriptor = block(data, 4096);
        descriptor.identifier = kind << 4 | sub_type;
        descriptor
    };
    for kind in [KEYED_DATA_BLOCK, 5, 6, 0xe, 0xf] {
        assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, of(kind, 0))), Err(Status::SGL_TYPE_INVALID), "{kind}");
    }
    for kind in [DATA_BLOCK, BIT_BUCKET, LAST_SEGMENT] {
        assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, of(kind, 1))), Err(Status::SGL_TYPE_INVALID), "{kind}");
    }
    assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, block(data, 4095))), Err(Status::SGL_DATA_LENGTH_INVALID));
    let segment_invalid = Err(Status::INVALID_SGL_SEGMENT);
    for kind in [SEGMENT, LAST_SEGMENT] {
        for length in [0, 8, 15, 17, 24] {
            let bad = SglDescriptor::new(kind, list, length);
            assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, bad)), segment_invalid, "{length}");
        }
        let bad = SglDescriptor::new(kind, list + 4, 16);
        assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, bad)), segment_invalid, "not on a quadword");
    }
    for next in [segment(list, 1), last(list, 1)] {
        write_segment(&guest, list, &[block(data, 512), next]);
        assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, last(list, 2))), segment_invalid, "after the last");
        write_segment(&guest, list, &[next, block(data, 4096)]);
        let misplaced = Err(Status::INVALID_SGL_COUNT);
        assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, segment(list, 2))), misplaced, "not at the end");
    }
    let outside = Err(Status::DATA_TRANSFER_ERROR);
    assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, block(end - 4095, 4096))), outside);
    assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, block(u64::MAX, 4096))), outside);
    assert_eq!(guest.io(1, by_sgl(nvm::WRITE, 8, block(u64::MAX - 4096, 4096))), outside);
    assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, last(end - 16, 2))), outside, "a list beyond memory");
    assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, last(u64::MAX - 7, 2))), outside);
    let reserved = SubmissionEntry { flags: 0xc0, ..by_sgl(nvm::READ, 8, block(data, 4096)) };
    assert_eq!(guest.io(1, reserved), Err(Status::INVALID_FIELD), "PSDT 11b");
    guest.io(1, by_sgl(nvm::READ, 8, block(data, 4096))).unwrap();
}

#[test]
fn chains_end() {
    let mut guest = ready();
    let (data, list) = (guest.pages(1), guest.pages(1));
    // A segment that leads to itself, with no data in it.
    write_segment(&guest, list, &[block(data, 0), segment(list, 2)]);
    assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, segment(list, 2))), Err(Status::INVALID_SGL_COUNT));
    write_segment(&guest, list, &[bucket(u32::MAX), segment(list, 2)]);
    assert_eq!(guest.io(1, by_sgl(nvm::WRITE, 8, segment(list, 2))), Err(Status::INVALID_SGL_COUNT));
    // With a byte in it, it ends with the data.
    write_segment(&guest, list, &[block(data, 1), segment(list, 2)]);
    guest.io(1, by_sgl(nvm::READ, 8, segment(list, 2))).unwrap();
    // One segment over all memory that describes nothing.
    guest.clear(0x40_0000, 0x60_0000);
    let many = SglDescriptor::new(LAST_SEGMENT, 0x40_0000, 0x60_0000);
    assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, many)), Err(Status::INVALID_SGL_COUNT));
    let few = SglDescriptor::new(LAST_SEGMENT, 0x40_0000, 16 * 1000);
    assert_eq!(guest.io(1, by_sgl(nvm::READ, 8, few)), Err(Status::SGL_DATA_LENGTH_INVALID));
    write_segment(&guest, 0x40_0000 + 16 * 131_071, &[block(data, 4096)]);
    guest.io(1, by_sgl(nvm::READ, 8, many)).unwrap();
}

#[test]
fn ranges_of_dataset_management_come_by_sgl_and_admin_commands_do_not() {
    let mut guest = ready();
    let page = guest.pages(1);
    guest.write_bytes(page + 1, &[&[0; 4][..], &8u32.to_le_bytes(), &0u64.to_le_bytes()].concat());
    let mut entry = SubmissionEntry {
        opcode: nvm::DATASET_MANAGEMENT,
        nsid: 1,
        flags: BY_BUFFER,
        ..SubmissionEntry::default()
    };
    entry.cdw11 = opcode::DSM_DEALLOCATE;
    entry.set_data_sgl(block(page + 1, 16));
    guest.io(1, entry).unwrap();
    entry.set_data_sgl(block(page + 1, 15));
    assert_eq!(guest.io(1, entry), Err(Status::SGL_DATA_LENGTH_INVALID));
    let mut identify =
        SubmissionEntry { opcode: admin::IDENTIFY, flags: BY_BUFFER, cdw10: 1, ..SubmissionEntry::default() };
    identify.set_data_sgl(block(page, 4096));
    assert_eq!(guest.admin(identify), Err(Status::INVALID_FIELD));
    let sgls = IdentifyController::from_bytes(&guest.identify(1, 0).unwrap()).sgls;
    assert_eq!(sgls, 1 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 19);
}
