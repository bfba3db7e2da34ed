//! Compare, Verify, Copy, Write Uncorrectable, write protection, and the limits of commands.

use std::sync::Arc;

use block::{Backend, Failure, Fault, FaultControl, FaultImage, Operation, Target};
use nvme_spec::identify::{IdentifyController, IdentifyNamespace, IdentifyNvmController, cns};
use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::{CompletionEntry, NSID_BROADCAST, Status, SubmissionEntry, log};

use super::driver::{Guest, memory_image, namespace, transfer};
use super::io::Witness;
use super::protection::protect;
use crate::{ControllerConfig, NamespaceConfig};

fn ready(namespaces: Vec<NamespaceConfig>) -> Guest {
    let mut guest = Guest::ready(ControllerConfig::new("COMMANDS"), namespaces);
    guest.create_pair(1, 16);
    guest
}

fn on(backend: Arc<dyn Backend>) -> Vec<NamespaceConfig> {
    vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]
}

fn smart(guest: &mut Guest) -> log::SmartLog {
    let request = SubmissionEntry {
        opcode: admin::GET_LOG_PAGE,
        nsid: NSID_BROADCAST,
        cdw10: 127 << 16 | 2,
        ..SubmissionEntry::default()
    };
    log::SmartLog::from_bytes(&guest.admin_data(request).unwrap())
}

fn fua(entry: SubmissionEntry) -> SubmissionEntry {
    SubmissionEntry { cdw12: entry.cdw12 | opcode::CDW12_FUA, ..entry }
}

/// Fills blocks 0 to 7 with their number plus one; the page that holds them.
fn fill(guest: &mut Guest) -> u64 {
    let page = guest.pages(1);
    for block in 0..8u8 {
        guest.write_bytes(page + u64::from(block) * 512, &[block + 1; 512]);
    }
    guest.io(1, transfer(nvm::WRITE, 1, 0, 8, page)).unwrap();
    page
}

fn blocks(guest: &mut Guest, lba: u64, count: u32) -> Vec<u8> {
    let pages = guest.pages(2);
    guest.io(1, transfer(nvm::READ, 1, lba, count, pages)).unwrap();
    guest.read_bytes(pages, count as usize * 512)
}

#[test]
fn compare_succeeds_only_if_all_bytes_are_the_same() {
    let mut guest = ready(vec![namespace(1, 64)]);
    let page = fill(&mut guest);
    guest.io(1, transfer(nvm::COMPARE, 1, 0, 8, page)).unwrap();
    for byte in [0, 511, 512, 4095] {
        let old = guest.read_bytes(page + byte, 1);
        guest.write_bytes(page + byte, &[0x77]);
        assert_eq!(
            guest.io(1, transfer(nvm::COMPARE, 1, 0, 8, page)),
            Err(Status::COMPARE_FAILURE),
            "{byte}"
        );
        guest.write_bytes(page + byte, &old);
    }
    let log = smart(&mut guest);
    assert_eq!((log.host_read_commands, log.media_errors, log.error_log_entries), (5, 0, 0));
    assert_eq!(guest.io(1, transfer(nvm::COMPARE, 1, 60, 8, page)), Err(Status::LBA_OUT_OF_RANGE));
    assert_eq!(guest.io(1, transfer(nvm::COMPARE, 1, 0, 2000, page)), Err(Status::INVALID_FIELD), "MDTS");
}

#[test]
fn verify_reads_and_transfers_nothing() {
    let (control, witness) = (Arc::new(FaultControl::default()), Witness::new(64 * 512));
    let mut guest = ready(on(Arc::new(FaultImage::new(witness.clone(), control.clone()))));
    guest.io(1, transfer(nvm::VERIFY, 1, 3, 60, 0)).unwrap();
    assert_eq!(witness.take(), [(Operation::Verify, 3 * 512, 60 * 512)]);
    guest.io(1, fua(transfer(nvm::VERIFY, 1, 0, 1, 0))).unwrap();
    assert_eq!(witness.take(), [(Operation::Flush, 0, 0), (Operation::Verify, 0, 512)]);
    control.inject(Target::Read, 0, 1, Fault::Fail(Failure::Io(5)));
    assert_eq!(guest.io(1, transfer(nvm::VERIFY, 1, 0, 1, 0)), Err(Status::UNRECOVERED_READ_ERROR));
    let log = smart(&mut guest);
    assert_eq!((log.media_errors, log.data_units_read), (1, 1));
}

/// Source ranges of Copy at `page`, of a format.
fn copy(guest: &Guest, page: u64, format: u32, ranges: &[(u64, u16)], destination: u64) -> SubmissionEntry {
    let size = if format == 0 { 32 } else { 40 };
    for (index, (first, count)) in ranges.iter().enumerate() {
        let mut entry = vec![0; size];
        entry[8..16].copy_from_slice(&first.to_le_bytes());
        entry[16..18].copy_from_slice(&(count.wrapping_sub(1)).to_le_bytes());
        guest.write_bytes(page + (index * size) as u64, &entry);
    }
    let mut entry = SubmissionEntry {
        opcode: nvm::COPY,
        nsid: 1,
        prp1: page,
        prp2: page + 4096,
        cdw12: format << 8 | (ranges.len() as u32 - 1),
        ..SubmissionEntry::default()
    };
    entry.set_cdw10_64(destination);
    entry
}

fn ended(entry: CompletionEntry) -> (Status, u32) {
    (entry.status().code(), entry.dw0)
}

#[test]
fn copy_puts_its_sources_one_behind_the_other() {
    for format in [0, 1] {
        let mut guest = ready(vec![namespace(1, 64)]);
        fill(&mut guest);
        let page = guest.pages(2);
        let entry = copy(&guest, page, format, &[(6, 2), (0, 1), (3, 3)], 20);
        assert_eq!(ended(guest.submit(1, entry)), (Status::SUCCESS, 0));
        let expected: Vec<u8> = [7, 8, 1, 4, 5, 6].iter().flat_map(|&block| [block; 512]).collect();
        assert!(blocks(&mut guest, 20, 6) == expected, "format {format}");
        assert_eq!(blocks(&mut guest, 26, 1), [0; 512]);
        assert_eq!(blocks(&mut guest, 19, 1), [0; 512]);
    }
}

#[test]
fn copies_beyond_their_limits_copy_nothing() {
    let witness = Witness::new(40_000 * 512);
    let mut guest = ready(on(witness.clone()));
    let page = guest.pages(2);
    let identified = IdentifyNamespace::from_bytes(&guest.identify(cns::NAMESPACE, 1).unwrap());
    assert_eq!((identified.mssrl, identified.mcl, identified.msrc), (4096, 32_768, 127));
    let too_large = Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
    let out = Err(Status::LBA_OUT_OF_RANGE);
    let one_too_many = [(0, 1); 129];
    let cases: [(&[(u64, u16)], u64, _); 8] = [
        (&[(0, 4097)], 20_000, too_large),
        (
            &[(0, 4096), (0, 4096), (0, 4096), (0, 4096), (0, 4096), (0, 4096), (0, 4096), (0, 4096), (0, 1)],
            0,
            too_large,
        ),
        (&one_too_many, 0, too_large),
        (&[(0, 1), (39_999, 2)], 10, out),
        (&[(u64::MAX, 1)], 10, out),
        (&[(0, 1), (0, 2)], 39_998, out),
        (&[(0, 1)], u64::MAX, out),
        (&[(0, 2)], u64::MAX - 1, out),
    ];
    for (ranges, destination, expected) in cases {
        let entry = copy(&guest, page, 0, ranges, destination);
        assert_eq!(guest.io(1, entry), expected, "{ranges:?}");
    }
    for format in 2..16 {
        let entry = copy(&guest, page, format, &[(0, 1)], 10);
        assert_eq!(guest.io(1, entry), Err(Status::INVALID_FIELD), "format {format}");
    }
    assert_eq!(witness.take(), []);
    let most: Vec<(u64, u16)> = (0..128).map(|range| (range * 7, 256)).collect();
    let entry = copy(&guest, page, 1, &most, 4000);
    guest.io(1, entry).unwrap();
    let copies = witness.take();
    assert_eq!(copies.len(), 128);
    let last = Operation::Copy { source_offset_bytes: 127 * 7 * 512, fua: false };
    assert_eq!(copies[127], (last, (4000 + 127 * 256) * 512, 256 * 512));
}

#[test]
fn a_copy_that_fails_says_how_far_it_came() {
    let (control, witness) = (Arc::new(FaultControl::default()), Witness::new(64 * 512));
    let mut guest = ready(on(Arc::new(FaultImage::new(witness.clone(), control.clone()))));
    fill(&mut guest);
    let page = guest.pages(1);
    let entry = fua(copy(&guest, page, 0, &[(0, 1), (1, 1), (2, 1), (3, 1)], 30));
    for failing in 0..4 {
        witness.take();
        control.inject(Target::Write, failing, 1, Fault::Fail(Failure::Io(5)));
        assert_eq!(ended(guest.submit(1, entry)), (Status::WRITE_FAULT, failing as u32));
        let done: Vec<_> = (0..failing)
            .map(|range| {
                (Operation::Copy { source_offset_bytes: range * 512, fua: true }, (30 + range) * 512, 512)
            })
            .collect();
        assert_eq!(witness.take(), done);
    }
    control.clear();
    assert_eq!(ended(guest.submit(1, entry)), (Status::SUCCESS, 0));
}

#[test]
fn blocks_written_uncorrectable_are_not_read_until_they_are_written() {
    let mut guest = ready(vec![namespace(1, 64)]);
    let page = fill(&mut guest);
    guest.io(1, transfer(nvm::WRITE_UNCORRECTABLE, 1, 2, 4, 0)).unwrap();
    let unreadable = Err(Status::UNRECOVERED_READ_ERROR);
    for opcode in [nvm::READ, nvm::COMPARE, nvm::VERIFY] {
        assert_eq!(guest.io(1, transfer(opcode, 1, 0, 8, page)), unreadable, "{opcode:#x}");
        assert_eq!(guest.io(1, transfer(opcode, 1, 5, 1, page)), unreadable, "{opcode:#x}");
        guest.io(1, transfer(opcode, 1, 0, 2, page)).unwrap();
    }
    assert_eq!(guest.read_bytes(page + 1024, 512), [3; 512], "nothing was transferred");
    let list = guest.pages(1);
    let entry = copy(&guest, list, 0, &[(0, 1), (5, 1)], 30);
    assert_eq!(ended(guest.submit(1, entry)), (Status::UNRECOVERED_READ_ERROR, 0));
    assert_eq!(smart(&mut guest).media_errors, 7);
    let request =
        SubmissionEntry { opcode: admin::GET_LOG_PAGE, cdw10: 15 << 16 | 1, ..SubmissionEntry::default() };
    let logged = log::ErrorEntry::from_bytes(&guest.admin_data(request).unwrap());
    assert_eq!(
        (logged.lba, logged.nsid, Status(logged.status >> 1).code()),
        (5, 1, Status::UNRECOVERED_READ_ERROR)
    );
    // The marks go along, to other workers too; each kind of write takes away those of its blocks.
    guest.migrate(1);
    assert_eq!(guest.io(1, transfer(nvm::READ, 1, 2, 1, page)), unreadable);
    guest.io(1, transfer(nvm::WRITE, 1, 2, 1, page + 1024)).unwrap();
    guest.io(1, transfer(nvm::WRITE_ZEROES, 1, 3, 1, 0)).unwrap();
    let entry = copy(&guest, list, 0, &[(0, 1)], 4);
    guest.io(1, entry).unwrap();
    assert_eq!(guest.io(1, transfer(nvm::READ, 1, 0, 8, page)), unreadable);
    guest.write_bytes(list, &[&[0; 4][..], &1u32.to_le_bytes(), &5u64.to_le_bytes()].concat());
    let deallocate = SubmissionEntry {
        opcode: nvm::DATASET_MANAGEMENT,
        nsid: 1,
        prp1: list,
        cdw11: opcode::DSM_DEALLOCATE,
        ..SubmissionEntry::default()
    };
    guest.io(1, deallocate).unwrap();
    let read = blocks(&mut guest, 0, 8);
    assert_eq!([0, 1024, 1536, 2048].map(|byte| read[byte]), [1, 3, 0, 1]);
    guest.migrate(2);
    guest.io(1, transfer(nvm::READ, 1, 0, 8, page)).unwrap();
}

#[test]
fn a_write_that_fails_heals_nothing() {
    let control = Arc::new(FaultControl::default());
    let mut guest = ready(on(Arc::new(FaultImage::new(memory_image(64 * 512), control.clone()))));
    let page = guest.pages(1);
    guest.io(1, transfer(nvm::WRITE_UNCORRECTABLE, 1, 7, 1, 0)).unwrap();
    control.inject(Target::Write, 0, 1, Fault::Fail(Failure::Io(5)));
    assert_eq!(guest.io(1, transfer(nvm::WRITE, 1, 7, 1, page)), Err(Status::WRITE_FAULT));
    assert_eq!(guest.io(1, transfer(nvm::READ, 1, 7, 1, page)), Err(Status::UNRECOVERED_READ_ERROR));
    guest.io(1, transfer(nvm::WRITE, 1, 7, 1, page)).unwrap();
    guest.io(1, transfer(nvm::READ, 1, 7, 1, page)).unwrap();
}

#[test]
fn commands_without_data_have_the_limits_of_identify() {
    let backend = memory_image(9000 * 4096);
    let namespaces =
        vec![namespace(1, 70_000), NamespaceConfig { nsid: 2, block_bytes: 4096, metadata: None, backend }];
    let mut guest = ready(namespaces);
    let csi = guest.identify(cns::CSI_CONTROLLER, 0).unwrap();
    let limits = IdentifyNvmController::from_bytes(&csi);
    assert_eq!((limits.vsl, limits.wzsl, limits.wusl), (13, 13, 9));
    assert_eq!((limits.dmrl, limits.dmrsl, limits.dmsl), (0, 0, 0));
    let cases = [
        (nvm::VERIFY, limits.vsl),
        (nvm::WRITE_ZEROES, limits.wzsl),
        (nvm::WRITE_UNCORRECTABLE, limits.wusl),
    ];
    for (opcode, shift) in cases {
        let most = 1u32 << shift;
        guest.io(1, transfer(opcode, 2, 0, most, 0)).unwrap();
        assert_eq!(guest.io(1, transfer(opcode, 2, 0, most + 1, 0)), Err(Status::INVALID_FIELD), "{opcode}");
        guest.io(1, transfer(opcode, 1, 0, most * 8, 0)).unwrap();
        if most * 8 < 65_536 {
            assert_eq!(guest.io(1, transfer(opcode, 1, 0, most * 8 + 1, 0)), Err(Status::INVALID_FIELD));
        }
    }
    // All the blocks that can be are marked now, until one of them is written.
    assert_eq!(
        guest.io(1, transfer(nvm::WRITE_UNCORRECTABLE, 1, 5000, 1, 0)),
        Err(Status::CAPACITY_EXCEEDED)
    );
    guest.io(1, transfer(nvm::WRITE_ZEROES, 1, 100, 1, 0)).unwrap();
    guest.io(1, transfer(nvm::WRITE_UNCORRECTABLE, 1, 5000, 1, 0)).unwrap();
    let page = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
    assert_eq!((page.oncs, page.cdfs), (0x1ff, 3));
}

#[test]
fn a_protected_namespace_is_read_and_not_changed() {
    let witness = Witness::new(64 * 512);
    let mut guest = ready(on(witness.clone()));
    let page = fill(&mut guest);
    let list = guest.pages(1);
    witness.take();
    let set = |guest: &mut Guest, value| {
        guest.admin(protect(1, value)).unwrap();
        witness.take();
    };
    let copy = copy(&guest, list, 0, &[(0, 1)], 9);
    let dsm = SubmissionEntry { opcode: nvm::DATASET_MANAGEMENT, cdw11: 4, ..copy };
    let writes = [
        transfer(nvm::WRITE, 1, 0, 1, page),
        transfer(nvm::WRITE_ZEROES, 1, 0, 1, 0),
        transfer(nvm::WRITE_UNCORRECTABLE, 1, 0, 1, 0),
        copy,
        SubmissionEntry { cdw10: 0, ..dsm },
    ];
    set(&mut guest, 1);
    for write in writes {
        assert_eq!(guest.io(1, write), Err(Status::NAMESPACE_WRITE_PROTECTED), "{:#x}", write.opcode);
    }
    assert_eq!(witness.take(), []);
    for opcode in [nvm::READ, nvm::COMPARE, nvm::VERIFY, nvm::FLUSH] {
        guest.io(1, transfer(opcode, 1, 0, 1, page)).unwrap();
    }
    assert_eq!(guest.identify(cns::NAMESPACE, 1).unwrap()[99], 1);
    set(&mut guest, 0);
    guest.io(1, writes[0]).unwrap();
    assert_eq!(guest.identify(cns::NAMESPACE, 1).unwrap()[99], 0);
}

#[test]
fn limited_retry_is_taken() {
    let mut guest = ready(vec![namespace(1, 64)]);
    let page = fill(&mut guest);
    for opcode in [nvm::READ, nvm::WRITE, nvm::COMPARE, nvm::VERIFY] {
        let entry = transfer(opcode, 1, 0, 8, page);
        guest.io(1, SubmissionEntry { cdw12: entry.cdw12 | opcode::CDW12_LIMITED_RETRY, ..entry }).unwrap();
    }
}
