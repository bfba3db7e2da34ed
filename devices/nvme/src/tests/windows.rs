//! Where commands find memory of the controller: both windows, also side by side, and guests that misuse them.

use std::sync::Arc;

use block::{Fault, FaultControl, FaultImage, NOWHERE, Target};
use bus::GuestRange;
use nvme_spec::opcode::nvm;
use nvme_spec::sgl::{BIT_BUCKET, DATA_BLOCK, LAST_SEGMENT, SEGMENT, SglDescriptor};
use nvme_spec::{Status, SubmissionEntry, regs};
use vm_memory::GuestAddress;

use super::driver::{Guest, memory_image, namespace, transfer};
use crate::window::{BUFFER_START, REGION_START, Spaces, Windows};
use crate::{ControllerConfig, MetadataConfig, NamespaceConfig};

const BYTES: u64 = 64 << 10;
/// Where the guest has the buffer and the region: beyond its RAM.
const BUFFER: u64 = 0xd000_0000;
const REGION: u64 = 0xd800_0000;
const ENABLED: u64 = regs::CMBMSC_CRE | regs::CMBMSC_CMSE;

fn config() -> ControllerConfig {
    ControllerConfig { buffer_bytes: BYTES, region_bytes: BYTES, ..ControllerConfig::new("WINDOWS") }
}

/// A guest that has both switched on, and a queue pair in RAM.
fn guest(namespaces: Vec<NamespaceConfig>) -> Guest {
    let mut guest = Guest::ready(config(), namespaces);
    guest.create_pair(1, 16);
    guest.write64(regs::CMBMSC, BUFFER | ENABLED);
    guest.write32(regs::PMRCTL, regs::PMRCTL_EN);
    guest.write32(regs::PMRMSCL, (REGION | regs::PMRMSC_CMSE) as u32);
    (guest.buffer, guest.region) = (Some(BUFFER), Some(REGION));
    guest
}

fn range(address: u64, length_bytes: u32) -> GuestRange {
    GuestRange { address: GuestAddress(address), length_bytes }
}

fn by_sgl(opcode: u8, blocks: u32, kind: u8, address: u64, length_bytes: u32) -> SubmissionEntry {
    let mut entry = SubmissionEntry { flags: 0x40, ..transfer(opcode, 1, 0, blocks, 0) };
    entry.set_data_sgl(SglDescriptor::new(kind, address, length_bytes));
    entry
}

fn write_segment(guest: &Guest, address: u64, descriptors: &[(u8, u64, u32)]) {
    let descriptors = descriptors.iter().map(|&(kind, at, length)| SglDescriptor::new(kind, at, length));
    let bytes: Vec<u8> = descriptors.flat_map(|descriptor| descriptor.to_bytes()).collect();
    guest.write_bytes(address, &bytes);
}

#[test]
fn ranges_of_several_kinds_of_memory_are_taken_apart() {
    let windows = Windows::new(0x4000, 0x4000);
    windows.set_region_ready(true);
    let mut spaces = Spaces::new(Arc::clone(&windows));
    let gathered = |ranges: &[GuestRange]| {
        let mut all = vec![range(1 << 60, 1)];
        let found = windows.gather(&mut all, |into| {
            into.extend(ranges);
            Ok(())
        });
        found.map(|()| all.split_off(1))
    };
    let whole = [range(0xf000, 0x8000), range(0, 4)];
    assert_eq!(gathered(&whole), Ok(whole.to_vec()), "closed");
    spaces.set_buffer(0x1_0000 | ENABLED);
    let apart =
        vec![range(0xf000, 0x1000), range(BUFFER_START, 0x4000), range(0x1_4000, 0x3000), range(0, 4)];
    assert_eq!(gathered(&whole), Ok(apart));
    assert_eq!(gathered(&[range(0x1_3ffc, 4)]), Ok(vec![range(BUFFER_START + 0x3ffc, 4)]));
    let nowhere = [range(NOWHERE.0, 512)];
    assert_eq!(gathered(&nowhere), Ok(nowhere.to_vec()), "a bit bucket");
    for beyond in [range(BUFFER_START - 1, 2), range(BUFFER_START, 2), range(REGION_START, 2)] {
        assert_eq!(gathered(&[beyond]), Err(Status::DATA_TRANSFER_ERROR.do_not_retry()));
    }
    // The region right behind it: one run of the guest's pages is in both, which no command may be.
    spaces.set_region(0x1_4000 | regs::PMRMSC_CMSE);
    let invalid = Err(Status::INVALID_FIELD.do_not_retry());
    for mixed in [range(0x1_3ffc, 8), range(0x1_7ffc, 8), range(0xf000, 0x1_0000)] {
        assert_eq!(gathered(&[mixed]), invalid, "{mixed:?}");
    }
    assert_eq!(gathered(&[range(0x1_4000, 4), range(0, 4)]), invalid);
    let inside = vec![range(REGION_START, 0x4000), nowhere[0], range(REGION_START, 4)];
    assert_eq!(gathered(&[range(0x1_4000, 0x4000), nowhere[0], range(0x1_4000, 4)]), Ok(inside));
    // Lists and queues are not data.
    assert_eq!(windows.translate(0x1_4000, 8), invalid.map(|_: Vec<_>| 0));
    assert_eq!(windows.translate(0x1_0000, 8), Ok(BUFFER_START));
    windows.set_region_ready(false);
    assert_eq!(gathered(&[range(0x1_4000, 4)]), Err(Status::DATA_TRANSFER_ERROR.do_not_retry()));
}

#[test]
fn of_two_that_overlap_the_first_stays() {
    let windows = Windows::new(0x4000, 0x4000);
    windows.set_region_ready(true);
    let mut spaces = Spaces::new(Arc::clone(&windows));
    let data = |address| {
        let mut ranges = Vec::new();
        windows.gather(&mut ranges, |into| {
            into.push(range(address, 4));
            Ok(())
        })?;
        Ok::<_, Status>(ranges[0].address.0)
    };
    let state =
        |spaces: &Spaces| (spaces.buffer_status(), spaces.region_is_invalid(), spaces.region_is_first());
    spaces.set_buffer(0x1_0000 | ENABLED);
    spaces.set_region(0x1_3000 | regs::PMRMSC_CMSE);
    assert_eq!(state(&spaces), (0, true, false));
    assert_eq!((data(0x1_3000), data(0x1_4000)), (Ok(BUFFER_START + 0x3000), Ok(0x1_4000)));
    // It moves out of the way: then the other is where it is wanted; and comes back too late.
    spaces.set_buffer(0x2_0000 | ENABLED);
    assert_eq!(state(&spaces), (0, false, false));
    spaces.set_buffer(0x1_0000 | ENABLED);
    assert_eq!(state(&spaces), (1, false, true));
    assert_eq!((data(0x1_3000), data(0x1_0000)), (Ok(REGION_START), Ok(0x1_0000)));
    // Not wanted, it is in nobody's way.
    spaces.set_region(0x1_3000);
    assert_eq!(state(&spaces), (0, false, false));
    // CMSE means nothing without CRE.
    spaces.set_buffer(0x1_0000 | regs::CMBMSC_CMSE);
    assert_eq!((state(&spaces), data(0x1_0000)), ((0, false, false), Ok(0x1_0000)));
    for end in [u64::MAX << 12, BUFFER_START - 0x3000] {
        spaces.set_buffer(end | ENABLED);
        spaces.set_region(end | regs::PMRMSC_CMSE);
        assert_eq!(state(&spaces), (1, true, false), "{end:#x}");
    }
    spaces.set_buffer((BUFFER_START - 0x4000) | ENABLED);
    assert_eq!(state(&spaces), (0, true, false));
    assert_eq!(data(BUFFER_START - 4), Ok(BUFFER_START + 0x3ffc));
}

#[test]
fn segments_in_the_buffer_lead_to_all_kinds_of_memory() {
    let mut guest = guest(vec![namespace(1, 64)]);
    let ram = guest.pages(2);
    let bytes: Vec<u8> = (0..4096).map(|byte: u32| ((byte * 31) >> 3) as u8).collect();
    // A segment in the buffer, one in RAM, and the last one at the very end of the buffer.
    let end = BUFFER + BYTES - 32;
    write_segment(&guest, BUFFER + 8, &[(DATA_BLOCK, ram + 1, 1000), (SEGMENT, ram + 4096, 48)]);
    write_segment(
        &guest,
        ram + 4096,
        &[(DATA_BLOCK, BUFFER + 0x2003, 3000), (DATA_BLOCK, ram + 1001, 90), (LAST_SEGMENT, end, 32)],
    );
    write_segment(&guest, end, &[(DATA_BLOCK, BUFFER + 0x4000, 3), (DATA_BLOCK, BUFFER + 0x4003, 3)]);
    let pieces = [(ram + 1, 1000), (BUFFER + 0x2003, 3000), (ram + 1001, 90), (BUFFER + 0x4000, 6)];
    let mut position = 0;
    for (address, length) in pieces {
        guest.write_bytes(address, &bytes[position..position + length]);
        position += length;
    }
    let list = |opcode| by_sgl(opcode, 8, SEGMENT, BUFFER + 8, 32);
    guest.io(1, list(nvm::WRITE)).unwrap();
    for workers in [1, 2] {
        pieces.iter().for_each(|&(address, length)| guest.clear(address, length));
        guest.io(1, list(nvm::READ)).unwrap();
        let read: Vec<u8> =
            pieces.iter().flat_map(|&(address, length)| guest.read_bytes(address, length)).collect();
        assert!(read == bytes);
        guest.migrate(workers);
    }
    // Data in the region, by a list in the buffer, with a bit bucket in between.
    write_segment(
        &guest,
        BUFFER,
        &[(DATA_BLOCK, REGION + 7, 2048), (BIT_BUCKET, 0, 1024), (DATA_BLOCK, REGION + BYTES - 1024, 1024)],
    );
    guest.io(1, by_sgl(nvm::READ, 8, LAST_SEGMENT, BUFFER, 48)).unwrap();
    assert!(guest.read_bytes(REGION + 7, 2048) == bytes[..2048]);
    assert!(guest.read_bytes(REGION + BYTES - 1024, 1024) == bytes[3072..]);
}

#[test]
fn lists_that_cross_an_end_or_are_in_the_region_are_refused() {
    let mut guest = guest(vec![namespace(1, 64)]);
    let ram = guest.pages(1);
    let end = BUFFER + BYTES;
    write_segment(&guest, end - 16, &[(DATA_BLOCK, ram, 512)]);
    guest.io(1, by_sgl(nvm::READ, 1, LAST_SEGMENT, end - 16, 16)).unwrap();
    let list = |prp2| SubmissionEntry { prp2, ..transfer(nvm::READ, 1, 0, 24, ram) };
    for (entry, status) in [
        (by_sgl(nvm::READ, 1, LAST_SEGMENT, end - 16, 32), Status::INVALID_USE_OF_CMB),
        (by_sgl(nvm::READ, 1, LAST_SEGMENT, BUFFER - 16, 32), Status::INVALID_USE_OF_CMB),
        (by_sgl(nvm::READ, 1, LAST_SEGMENT, end, 16), Status::DATA_TRANSFER_ERROR),
        // What it holds describes nothing up to the end.
        (by_sgl(nvm::READ, 2, LAST_SEGMENT, BUFFER, !15), Status::DATA_TRANSFER_ERROR),
        (by_sgl(nvm::READ, 1, LAST_SEGMENT, !15, 16), Status::DATA_TRANSFER_ERROR),
        (by_sgl(nvm::READ, 1, LAST_SEGMENT, REGION, 16), Status::INVALID_FIELD),
        (by_sgl(nvm::READ, 1, LAST_SEGMENT, REGION - 16, 32), Status::INVALID_FIELD),
        (by_sgl(nvm::READ, 1, DATA_BLOCK, REGION + BYTES - 256, 512), Status::INVALID_FIELD),
        // Two entries of a PRP list, one of them beyond the end; and one list in the region.
        (list(end - 8), Status::PRP_OFFSET_INVALID),
        (list(REGION), Status::INVALID_FIELD),
    ] {
        assert_eq!(guest.io(1, entry), Err(status), "{entry:?}");
    }
    // Chained beyond the end, by the last entry of a page.
    guest.write_bytes(end - 8, &end.to_le_bytes());
    assert_eq!(guest.io(1, list(end - 8)), Err(Status::DATA_TRANSFER_ERROR));
    assert!(guest.create_cq(2, 8, ram, 1).is_ok());
    assert_eq!(guest.create_sq(2, 64, REGION, 2), Err(Status::INVALID_FIELD));
    assert_eq!(guest.create_sq(2, 128, REGION - 4096, 2), Err(Status::INVALID_FIELD));
}

#[test]
fn metadata_are_in_the_region_if_the_data_are() {
    let metadata = MetadataConfig { bytes: 8, extended: false, protection_type: 0, protection_first: false };
    let mut guest = guest(vec![NamespaceConfig { metadata: Some(metadata), ..namespace(1, 64) }]);
    let ram = guest.pages(2);
    let refused = Err(Status::INVALID_FIELD);
    for opcode in [nvm::WRITE, nvm::READ] {
        for (data, mptr, ended) in [
            (ram, ram + 4096, Ok(())),
            (ram, BUFFER, Ok(())),
            (BUFFER, ram, Ok(())),
            (REGION, REGION + 4096, Ok(())),
            (ram, REGION, refused),
            (BUFFER, REGION, refused),
            (REGION, ram, refused),
            (REGION, BUFFER, refused),
        ] {
            let entry = SubmissionEntry { mptr, ..transfer(opcode, 1, 0, 4, data) };
            assert_eq!(guest.io(1, entry), ended, "{opcode:#x} {data:#x} {mptr:#x}");
        }
        // Nor with a descriptor of the metadata; of data that nobody takes all the same.
        for (kind, ended) in
            [(DATA_BLOCK, refused), (BIT_BUCKET, if opcode == nvm::READ { Ok(()) } else { refused })]
        {
            write_segment(&guest, ram + 4096, &[(DATA_BLOCK, REGION, 32)]);
            write_segment(&guest, ram + 4160, &[(kind, ram, 2048), (DATA_BLOCK, ram, 2048)]);
            let mut entry = by_sgl(opcode, 4, LAST_SEGMENT, ram + 4160, 32);
            (entry.flags, entry.mptr) = (0x80, ram + 4096);
            assert_eq!(guest.io(1, entry), ended, "{opcode:#x} {kind}");
        }
    }
}

#[test]
fn as_many_ranges_are_cut_as_a_list_can_have() {
    let windows = Windows::new(0x4000, 0);
    Spaces::new(Arc::clone(&windows)).set_buffer(0x1_0000 | ENABLED);
    let count = 131_072;
    let mut ranges = Vec::new();
    let walked = windows.gather(&mut ranges, |into| {
        into.extend(std::iter::repeat_n(range(0xffff, 2), count));
        Ok(())
    });
    walked.unwrap();
    assert_eq!(ranges.len(), 2 * count);
    let halves = [range(0xffff, 1), range(BUFFER_START, 1)];
    assert!(ranges.chunks(2).all(|pair| pair == halves));
}

#[test]
fn a_buffer_over_ram_hides_it_from_commands_and_from_nobody_else() {
    let mut guest = guest(vec![namespace(1, 64)]);
    // Not where the queues are, as far as a buffer reaches.
    let ram = guest.pages(32) + BYTES;
    guest.write_bytes(ram, &[0x11; 4096]);
    guest.io(1, transfer(nvm::WRITE, 1, 0, 8, ram)).unwrap();
    guest.clear(ram, 4096);
    // Queue pair 1 is in RAM below, and stays there.
    guest.write64(regs::CMBMSC, ram | ENABLED);
    guest.buffer = None;
    guest.io(1, transfer(nvm::READ, 1, 0, 8, ram)).unwrap();
    assert_eq!(guest.read_bytes(ram, 4096), vec![0; 4096], "what was read went to the buffer");
    let in_buffer = |guest: &Guest| {
        let mut data = [0; 8];
        pci::PciFunction::bar_read(&*guest.controller, 2, 0, &mut data);
        data
    };
    assert_eq!(in_buffer(&guest), [0x11; 8]);
    guest.migrate(1);
    guest.io(1, transfer(nvm::READ, 1, 8, 8, ram)).unwrap();
    assert_eq!(in_buffer(&guest), [0; 8]);
    // Over its queues, it changes nothing of theirs.
    let queues = guest.queues[&1].sq_base & !(BYTES - 1);
    guest.write64(regs::CMBMSC, queues | ENABLED);
    guest.io(1, transfer(nvm::READ, 1, 0, 8, ram)).unwrap();
    assert_eq!(guest.read_bytes(ram, 4096), vec![0x11; 4096]);
}

#[test]
fn what_is_in_flight_ends_where_it_was_sent_although_everything_moves() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(64 * 512), control.clone()));
    let mut guest = guest(vec![NamespaceConfig { nsid: 1, block_bytes: 512, backend, metadata: None }]);
    let page = guest.pages(1);
    for (lba, fill) in [(0, 0x11), (8, 0x22)] {
        guest.write_bytes(page, &[fill; 4096]);
        guest.io(1, transfer(nvm::WRITE, 1, lba, 8, page)).unwrap();
    }
    control.inject(Target::Read, 0, 2, Fault::Hold);
    guest.push(1, transfer(nvm::READ, 1, 0, 8, BUFFER + 0x1000));
    guest.push(1, transfer(nvm::READ, 1, 8, 8, REGION + 0x1000));
    guest.ring(1);
    guest.run_until("both are held", |_| control.held() == 2);
    // Both bases move, over RAM and over each other's place; the region is disabled, and reset, too.
    for (buffer, region) in [(REGION, BUFFER), (0, 0), (page & !0xffff, page & !0xffff)] {
        guest.write64(regs::CMBMSC, buffer | ENABLED);
        guest.write32(regs::PMRMSCL, (region | regs::PMRMSC_CMSE) as u32);
    }
    guest.clear(page, 4096);
    control.release_held();
    let mut ended = Vec::new();
    guest.run_until("both end", |guest| {
        ended.extend(guest.reap(1));
        ended.len() == 2
    });
    assert!(ended.iter().all(|entry| entry.status().is_success()), "{ended:?}");
    guest.buffer = None;
    assert_eq!(guest.read_bytes(page, 4096), vec![0; 4096], "no RAM was written to");
    let of_bar = |bar, fill: u8| {
        let mut data = [0; 4096];
        pci::PciFunction::bar_read(&*guest.controller, bar, 0x1000, &mut data);
        assert_eq!(data, [fill; 4096]);
    };
    of_bar(2, 0x11);
    of_bar(4, 0x22);
}
