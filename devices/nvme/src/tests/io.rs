//! I/O commands: data, ranges, PRPs, caches, failures.

use std::sync::{Arc, Mutex};

use block::{
    Backend, Failure, Fault, FaultControl, FaultImage, Identity, IoContext, Operation, Request, Target,
};
use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, feature, log, regs};
use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

use super::driver::{Guest, MEMORY_BYTES, memory_image, namespace, transfer};
use super::messages::messages_of;
use crate::{ControllerConfig, NamespaceConfig};

/// Remembers what it was asked to do.
#[derive(Debug)]
pub struct Witness {
    inner: Arc<dyn Backend>,
    log: Mutex<Vec<(Operation, u64, u64)>>,
}

impl Witness {
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self { inner: memory_image(bytes), log: Mutex::default() })
    }

    pub fn take(&self) -> Vec<(Operation, u64, u64)> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl Backend for Witness {
    fn identity(&self) -> Identity {
        self.inner.identity()
    }
    fn migratability(&self) -> vmstate::Migratability {
        self.inner.migratability()
    }
    fn submit(&self, context: &mut IoContext, request: &Request<'_>) {
        self.log.lock().unwrap().push((request.operation, request.offset_bytes, request.length_bytes));
        self.inner.submit(context, request);
    }
    fn sync(&self) -> Result<(), block::Error> {
        self.inner.sync()
    }
    fn release(&self) -> Result<(), block::Error> {
        self.inner.release()
    }
    fn acquire(&self) -> Result<(), block::Error> {
        self.inner.acquire()
    }
}

fn ready(namespaces: Vec<NamespaceConfig>) -> Guest {
    let mut guest = Guest::ready(ControllerConfig::new("IO"), namespaces);
    guest.create_pair(1, 16);
    guest
}

fn zeroes(nsid: u32, lba: u64, blocks: u32, flags: u32) -> SubmissionEntry {
    let mut entry = transfer(nvm::WRITE_ZEROES, nsid, lba, blocks, 0);
    entry.cdw12 |= flags;
    entry
}

fn dsm_ranges(guest: &Guest, page: u64, ranges: &[(u32, u64)]) {
    let bytes: Vec<u8> = ranges
        .iter()
        .flat_map(|(blocks, lba)| {
            [&0u32.to_le_bytes()[..], &blocks.to_le_bytes()[..], &lba.to_le_bytes()[..]].concat()
        })
        .collect();
    guest.write_bytes(page, &bytes);
}

#[test]
fn unknown_and_unoffered_commands_are_refused() {
    let mut guest = ready(vec![namespace(1, 64)]);
    let page = guest.pages(1);
    for opcode in [0x03, 0x7f, 0xff] {
        assert_eq!(guest.io(1, transfer(opcode, 1, 0, 1, page)), Err(Status::INVALID_OPCODE), "{opcode:#x}");
    }
    for flags in [3, 0xc0] {
        for opcode in [nvm::READ, nvm::FLUSH, nvm::WRITE_ZEROES, nvm::VERIFY] {
            let entry = SubmissionEntry { flags, ..transfer(opcode, 1, 0, 1, page) };
            assert_eq!(guest.io(1, entry), Err(Status::INVALID_FIELD), "{opcode:#x}, flags {flags:#x}");
        }
    }
    for nsid in [0, 1025, 0xffff_fffe, NSID_BROADCAST] {
        assert_eq!(
            guest.io(1, transfer(nvm::READ, nsid, 0, 1, page)),
            Err(Status::INVALID_NAMESPACE),
            "{nsid}"
        );
    }
    assert_eq!(guest.io(1, transfer(nvm::READ, 2, 0, 1, page)), Err(Status::INVALID_FIELD), "a hole");
}

#[test]
fn ranges_beyond_the_namespace_are_refused() {
    let mut guest = ready(vec![namespace(1, 64)]);
    let page = guest.pages(1);
    let opcodes =
        [nvm::READ, nvm::WRITE, nvm::WRITE_ZEROES, nvm::COMPARE, nvm::VERIFY, nvm::WRITE_UNCORRECTABLE];
    for opcode in opcodes {
        for (lba, blocks) in [(64, 1), (63, 2), (0, 65), (u64::MAX, 1), (u64::MAX - 1, 2)] {
            let result = guest.io(1, transfer(opcode, 1, lba, blocks, page));
            assert_eq!(result, Err(Status::LBA_OUT_OF_RANGE), "{opcode} {lba} {blocks}");
        }
        guest.io(1, transfer(opcode, 1, 63, 1, page)).unwrap();
    }
}

#[test]
fn blocks_of_4096_bytes_are_addressed_as_such() {
    let namespaces =
        vec![NamespaceConfig { nsid: 3, block_bytes: 4096, metadata: None, backend: memory_image(8 * 4096) }];
    let mut guest = ready(namespaces);
    let page = guest.pages(3);
    let data: Vec<u8> = (0..8192u32).map(|byte| (byte / 7) as u8).collect();
    guest.write_bytes(page + 8, &data);
    // The middle of a page on: three pages by a list.
    let list = guest.pages(1);
    guest.write_bytes(list, &[(page + 4096).to_le_bytes(), (page + 8192).to_le_bytes()].concat());
    guest.io(1, SubmissionEntry { prp1: page + 8, prp2: list, ..transfer(nvm::WRITE, 3, 6, 2, 0) }).unwrap();
    guest.clear(page, 3 * 4096);
    guest.io(1, transfer(nvm::READ, 3, 6, 2, page)).unwrap();
    assert_eq!(guest.read_bytes(page, 8192), data);
    let identified = nvme_spec::identify::IdentifyNamespace::from_bytes(&guest.identify(0, 3).unwrap());
    assert_eq!((identified.nsze, identified.flbas), (8, 1));
    assert_eq!(identified.lbaf[1].lba_data_size_log2, 12);
    assert_eq!(guest.io(1, transfer(nvm::READ, 3, 8, 1, page)), Err(Status::LBA_OUT_OF_RANGE));
}

#[test]
fn a_transfer_of_65536_blocks_is_whole() {
    const BLOCKS: u32 = 65_536;
    let config = ControllerConfig { mdts: 0, ..ControllerConfig::new("LARGE") };
    let mut guest = Guest::ready(config, vec![namespace(1, BLOCKS as usize)]);
    guest.create_pair(1, 16);
    let page = guest.pages(1);
    guest.write_bytes(page, &[0x5a; 4096]);
    // 8,192 pages, all the same one: the first by PRP1, the others by a chain of 17 list pages.
    let lists = guest.pages(17);
    let mut position = 0;
    for _ in 0..8191 {
        if position % 512 == 511 {
            let next = lists + (position / 512 + 1) * 4096;
            guest.write_bytes(lists + position * 8, &next.to_le_bytes());
            position += 1;
        }
        guest.write_bytes(lists + position * 8, &page.to_le_bytes());
        position += 1;
    }
    let entry = SubmissionEntry { prp1: page, prp2: lists, ..transfer(nvm::WRITE, 1, 0, BLOCKS, 0) };
    guest.io(1, entry).unwrap();
    let other = guest.pages(1);
    for lba in [0, 32_767, 65_535] {
        guest.clear(other, 512);
        guest.io(1, transfer(nvm::READ, 1, lba, 1, other)).unwrap();
        assert_eq!(guest.read_bytes(other, 512), vec![0x5a; 512], "block {lba}");
    }
    guest.io(1, zeroes(1, 0, BLOCKS, 0)).unwrap();
    for lba in [0, 32_767, 65_535] {
        guest.io(1, transfer(nvm::READ, 1, lba, 1, other)).unwrap();
        assert_eq!(guest.read_bytes(other, 512), vec![0; 512], "block {lba} after Write Zeroes");
    }
}

#[test]
fn transfers_above_mdts_are_refused() {
    let config = ControllerConfig { mdts: 1, ..ControllerConfig::new("MDTS") };
    let mut guest = Guest::ready(config, vec![namespace(1, 64)]);
    guest.create_pair(1, 16);
    let page = guest.pages(3);
    guest.io(1, transfer(nvm::READ, 1, 0, 16, page)).unwrap();
    assert_eq!(guest.io(1, transfer(nvm::READ, 1, 0, 17, page)), Err(Status::INVALID_FIELD));
    let log = SubmissionEntry {
        opcode: admin::GET_LOG_PAGE,
        cdw10: 0xffff << 16 | 2,
        prp1: page,
        ..SubmissionEntry::default()
    };
    assert_eq!(guest.admin(log), Err(Status::INVALID_FIELD));
}

#[test]
fn bad_prps_are_refused_and_chains_end() {
    let mut guest = ready(vec![namespace(1, 4096)]);
    let page = guest.pages(4);
    let list = guest.pages(2);
    let io = |guest: &mut Guest, prp1, prp2, blocks| {
        guest.io(1, SubmissionEntry { prp1, prp2, ..transfer(nvm::READ, 1, 0, blocks, 0) })
    };
    let offset = Err(Status::PRP_OFFSET_INVALID);
    let outside = Err(Status::DATA_TRANSFER_ERROR);
    let end = MEMORY_BYTES as u64;
    assert_eq!(io(&mut guest, page + 2, 0, 1), offset, "PRP1 not a multiple of 4");
    assert_eq!(io(&mut guest, page, page + 4, 16), offset, "PRP2 is a page and has an offset");
    assert_eq!(io(&mut guest, page, list + 4, 32), offset, "PRP2 is a list and not a multiple of 8");
    assert_eq!(io(&mut guest, end, 0, 1), outside, "PRP1 beyond memory");
    assert_eq!(io(&mut guest, end - 512, end, 2), outside, "PRP2 beyond memory");
    assert_eq!(io(&mut guest, page, end, 32), outside, "a list beyond memory");
    assert_eq!(io(&mut guest, !0xfff, 0, 1), outside, "the end of the address space");
    assert_eq!(io(&mut guest, page, !0xfff, 32), outside);
    guest.write_bytes(list, &[page.to_le_bytes(), (page + 8).to_le_bytes()].concat());
    assert_eq!(io(&mut guest, page, list, 24), offset, "a list entry with an offset");
    // A list at the very end of a page holds only the pointer to the next; pointing at itself it would never end.
    let last = list + 4096 - 8;
    guest.write_bytes(last, &last.to_le_bytes());
    assert_eq!(io(&mut guest, page, last, 32), offset);
    guest.write_bytes(last, &(list + 4096).to_le_bytes());
    guest.write_bytes(list + 4096, &[page; 3].map(u64::to_le_bytes).concat());
    io(&mut guest, page, last, 32).unwrap();
    // A whole list page whose pointer leads to itself ends with the length: 1,024 blocks are 128 pages, well in one list.
    guest.write_bytes(list, &[page.to_le_bytes(); 511].concat());
    guest.write_bytes(last, &list.to_le_bytes());
    io(&mut guest, page, list, 1024).unwrap();
    io(&mut guest, page, list + 8 * 500, 1024).unwrap();
    // PRP2 is not looked at when PRP1 is enough.
    io(&mut guest, page, u64::MAX, 8).unwrap();
}

#[test]
fn force_unit_access_reaches_the_backend() {
    let witness = Witness::new(64 * 512);
    let backend: Arc<dyn Backend> = witness.clone();
    let mut guest = ready(vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    let page = guest.pages(1);
    let fua = |entry: SubmissionEntry| SubmissionEntry { cdw12: entry.cdw12 | opcode::CDW12_FUA, ..entry };
    let write = transfer(nvm::WRITE, 1, 2, 1, page);
    guest.io(1, write).unwrap();
    guest.io(1, fua(write)).unwrap();
    guest.io(1, fua(transfer(nvm::READ, 1, 2, 1, page))).unwrap();
    guest.io(1, zeroes(1, 0, 4, 0)).unwrap();
    guest.io(1, fua(zeroes(1, 0, 4, opcode::CDW12_DEALLOCATE))).unwrap();
    let expected = [
        (Operation::Write { fua: false }, 1024, 512),
        (Operation::Write { fua: true }, 1024, 512),
        (Operation::Read, 1024, 512),
        (Operation::Flush, 0, 0),
        (Operation::WriteZeroes { deallocate: false, fua: false }, 0, 2048),
        (Operation::WriteZeroes { deallocate: true, fua: true }, 0, 2048),
    ];
    assert_eq!(witness.take(), expected);
    // With the write cache off everything is as with FUA, and what was cached is flushed first.
    let set = |value| SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: u32::from(feature::VOLATILE_WRITE_CACHE),
        cdw11: value,
        ..SubmissionEntry::default()
    };
    guest.admin(set(0)).unwrap();
    assert_eq!(witness.take(), [(Operation::Flush, 0, 0)]);
    guest.io(1, write).unwrap();
    guest.io(1, zeroes(1, 0, 1, 0)).unwrap();
    let expected = [
        (Operation::Write { fua: true }, 1024, 512),
        (Operation::WriteZeroes { deallocate: false, fua: true }, 0, 512),
    ];
    assert_eq!(witness.take(), expected);
    guest.admin(set(1)).unwrap();
    guest.io(1, write).unwrap();
    assert_eq!(witness.take(), [(Operation::Write { fua: false }, 1024, 512)]);
}

#[test]
fn the_write_cache_is_off_only_after_its_flush() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(64 * 512), control.clone()));
    let mut guest = ready(vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    control.inject(Target::Flush, 0, 1, Fault::Hold);
    let set =
        SubmissionEntry { opcode: admin::SET_FEATURES, cdw10: 6, cdw11: 0, ..SubmissionEntry::default() };
    let cid = guest.push(0, set);
    guest.ring(0);
    guest.run();
    assert!(guest.reap(0).is_empty());
    control.release_held();
    let mut entries = Vec::new();
    guest.run_until("Set Features", |guest| {
        entries.extend(guest.reap(0));
        !entries.is_empty()
    });
    assert_eq!((entries[0].cid, entries[0].status()), (cid, Status::SUCCESS));
}

#[test]
fn a_write_that_was_in_flight_when_the_write_cache_went_off_is_stable_before_it_completes() {
    let (control, witness) = (Arc::new(FaultControl::default()), Witness::new(64 * 512));
    let backend = Arc::new(FaultImage::new(witness.clone(), control.clone()));
    let mut guest = ready(vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    let page = guest.pages(1);
    let set =
        SubmissionEntry { opcode: admin::SET_FEATURES, cdw10: 6, cdw11: 0, ..SubmissionEntry::default() };
    control.inject(Target::Any, 0, 3, Fault::Hold);
    guest.push(1, transfer(nvm::WRITE, 1, 2, 1, page));
    guest.push(1, zeroes(1, 0, 1, 0));
    guest.push(1, transfer(nvm::READ, 1, 2, 1, page));
    guest.ring(1);
    guest.run();
    assert_eq!(control.held(), 3);
    guest.admin(set).unwrap();
    assert_eq!(witness.take(), [(Operation::Flush, 0, 0)]);
    // The flush that came before them has not made them stable: each has its own.
    control.inject(Target::Flush, 0, 2, Fault::Hold);
    control.release_held();
    guest.run_until("the flushes to begin", |_| control.held() == 2);
    assert_eq!(guest.reap(1).len(), 1, "only the read has ended");
    let expected = [
        (Operation::Write { fua: false }, 1024, 512),
        (Operation::WriteZeroes { deallocate: false, fua: false }, 0, 512),
        (Operation::Read, 1024, 512),
    ];
    assert_eq!(witness.take(), expected);
    control.release_held();
    let mut ended = Vec::new();
    guest.run_until("the writes", |guest| {
        ended.extend(guest.reap(1));
        ended.len() == 2
    });
    assert!(ended.iter().all(|entry| entry.status().is_success()));
    assert_eq!(witness.take(), [(Operation::Flush, 0, 0); 2]);
}

#[test]
fn write_zeroes_writes_zeroes_and_deallocate_discards() {
    let witness = Witness::new(64 * 512);
    let backend: Arc<dyn Backend> = witness.clone();
    let mut guest = ready(vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    let page = guest.pages(2);
    guest.write_bytes(page, &[0xee; 4096]);
    guest.io(1, transfer(nvm::WRITE, 1, 0, 8, page)).unwrap();
    guest.io(1, zeroes(1, 2, 3, 0)).unwrap();
    guest.io(1, transfer(nvm::READ, 1, 0, 8, page)).unwrap();
    let mut expected = vec![0xee; 4096];
    expected[1024..2560].fill(0);
    assert_eq!(guest.read_bytes(page, 4096), expected);
    witness.take();
    let dsm = |ranges: u32, cdw11| SubmissionEntry {
        opcode: nvm::DATASET_MANAGEMENT,
        nsid: 1,
        prp1: page,
        prp2: page + 4096,
        cdw10: ranges - 1,
        cdw11,
        ..SubmissionEntry::default()
    };
    dsm_ranges(&guest, page, &[(2, 4), (0, 9), (1, 63)]);
    guest.io(1, dsm(3, opcode::DSM_DEALLOCATE)).unwrap();
    assert_eq!(witness.take(), [(Operation::Discard, 2048, 1024), (Operation::Discard, 63 * 512, 512)]);
    guest.io(1, dsm(3, 3)).unwrap();
    assert_eq!(witness.take(), [], "hints only");
    // One bad range, and nothing is deallocated.
    dsm_ranges(&guest, page, &[(2, 4), (2, 63)]);
    assert_eq!(guest.io(1, dsm(2, opcode::DSM_DEALLOCATE)), Err(Status::LBA_OUT_OF_RANGE));
    dsm_ranges(&guest, page, &[(0, 64), (u32::MAX, u64::MAX)]);
    assert_eq!(guest.io(1, dsm(2, opcode::DSM_DEALLOCATE)), Err(Status::LBA_OUT_OF_RANGE));
    assert_eq!(witness.take(), []);
    dsm_ranges(&guest, page, &[(1, 5); 256]);
    guest.io(1, dsm(256, opcode::DSM_DEALLOCATE)).unwrap();
    assert_eq!(witness.take().len(), 256);
}

#[test]
fn a_broadcast_flush_reaches_every_namespace() {
    let witnesses = [Witness::new(4096), Witness::new(4096), Witness::new(4096)];
    let namespaces = witnesses.iter().zip([1, 77, 1024]).map(|(witness, nsid)| {
        let backend: Arc<dyn Backend> = witness.clone();
        NamespaceConfig { nsid, block_bytes: 512, metadata: None, backend }
    });
    let mut guest = ready(namespaces.collect());
    guest
        .io(1, SubmissionEntry { opcode: nvm::FLUSH, nsid: NSID_BROADCAST, ..SubmissionEntry::default() })
        .unwrap();
    for witness in &witnesses {
        assert_eq!(witness.take(), [(Operation::Flush, 0, 0)]);
    }
    guest.io(1, SubmissionEntry { opcode: nvm::FLUSH, nsid: 77, ..SubmissionEntry::default() }).unwrap();
    assert_eq!(witnesses.each_ref().map(|witness| witness.take().len()), [0, 1, 0]);
    let mut empty = ready(vec![]);
    empty
        .io(1, SubmissionEntry { opcode: nvm::FLUSH, nsid: NSID_BROADCAST, ..SubmissionEntry::default() })
        .unwrap();
}

#[test]
fn a_namespace_that_fails_its_flush_keeps_no_other_from_being_flushed() {
    let (control, witnesses) = (Arc::new(FaultControl::default()), [Witness::new(4096), Witness::new(4096)]);
    let failing = || FaultImage::new(memory_image(4096), control.clone());
    let backends: [(u32, Arc<dyn Backend>); 4] = [
        (1, Arc::new(failing())),
        (2, witnesses[0].clone()),
        (3, Arc::new(failing())),
        (4, witnesses[1].clone()),
    ];
    let namespaces = backends.into_iter().map(|(nsid, backend)| NamespaceConfig {
        nsid,
        block_bytes: 512,
        metadata: None,
        backend,
    });
    let mut guest = ready(namespaces.collect());
    control.inject(Target::Flush, 0, 1, Fault::Fail(Failure::NoSpace));
    control.inject(Target::Flush, 0, 1, Fault::Fail(Failure::Io(5)));
    let flush = SubmissionEntry { opcode: nvm::FLUSH, nsid: NSID_BROADCAST, ..SubmissionEntry::default() };
    assert_eq!(guest.io(1, flush), Err(Status::CAPACITY_EXCEEDED), "the first failure is told");
    for witness in &witnesses {
        assert_eq!(witness.take(), [(Operation::Flush, 0, 0)]);
    }
    assert_eq!(control.seen(), 2);
    guest.io(1, flush).unwrap();
    witnesses.iter().for_each(|witness| drop(witness.take()));
    control.inject(Target::Flush, 0, 2, Fault::Fail(Failure::Io(5)));
    guest.write32(regs::CC, 0x0046_4001);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 1 | 1 << 1 | 2 << 2, "complete, and fatal");
    for witness in &witnesses {
        assert_eq!(witness.take(), [(Operation::Flush, 0, 0)]);
    }
}

#[test]
fn a_read_only_namespace_is_not_written() {
    let mapping = Arc::new(bus::GuestMapping::new(64 * 512).unwrap());
    let backend = Arc::new(block::MemoryImage::new(mapping).read_only());
    let mut guest = ready(vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    let page = guest.pages(1);
    let protected = Err(Status::NAMESPACE_WRITE_PROTECTED);
    assert_eq!(guest.io(1, transfer(nvm::WRITE, 1, 0, 1, page)), protected);
    assert_eq!(guest.io(1, zeroes(1, 0, 1, 0)), protected);
    dsm_ranges(&guest, page, &[(1, 0)]);
    let dsm = SubmissionEntry {
        opcode: nvm::DATASET_MANAGEMENT,
        nsid: 1,
        prp1: page,
        cdw11: 4,
        ..SubmissionEntry::default()
    };
    assert_eq!(guest.io(1, dsm), protected);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    let read = transfer(nvm::READ, 1, 0, 1, page);
    guest.io(1, SubmissionEntry { cdw12: opcode::CDW12_FUA, ..read }).unwrap();
    guest.io(1, SubmissionEntry { opcode: nvm::FLUSH, nsid: 1, ..SubmissionEntry::default() }).unwrap();
    assert_eq!(guest.identify(0, 1).unwrap()[99], 1, "NSATTR says so");
}

#[test]
fn an_image_that_fails_is_told_of_once() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(64 * 512), control.clone()));
    let mut guest = ready(vec![NamespaceConfig { nsid: 5, block_bytes: 512, metadata: None, backend }]);
    let page = guest.pages(1);
    let messages = messages_of(|| {
        for failure in [Failure::Released, Failure::NoSpace, Failure::Io(5), Failure::NoSpace] {
            control.inject(Target::Any, 0, 1, Fault::Fail(failure));
            guest.io(1, transfer(nvm::WRITE, 5, 9, 1, page)).unwrap_err();
        }
    });
    let [message] = messages.as_slice() else { panic!("{messages:?}") };
    assert!(message.contains("namespace 5") && message.contains("no space"), "{message}");
}

#[test]
fn failures_have_their_status_and_are_logged() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(64 * 512), control.clone()));
    let mut guest = ready(vec![NamespaceConfig { nsid: 5, block_bytes: 512, metadata: None, backend }]);
    let page = guest.pages(1);
    let cases = [
        (Failure::Io(5), nvm::READ, Status::UNRECOVERED_READ_ERROR),
        (Failure::Io(5), nvm::WRITE, Status::WRITE_FAULT),
        (Failure::NoSpace, nvm::WRITE, Status::CAPACITY_EXCEEDED),
        (Failure::Released, nvm::READ, Status::NAMESPACE_NOT_READY),
        (Failure::Io(5), nvm::FLUSH, Status::WRITE_FAULT),
        (Failure::Io(5), nvm::WRITE_ZEROES, Status::WRITE_FAULT),
    ];
    for (count, (failure, opcode, status)) in cases.into_iter().enumerate() {
        control.inject(Target::Any, 0, 1, Fault::Fail(failure));
        assert_eq!(guest.io(1, transfer(opcode, 5, 9, 1, page)), Err(status), "{failure:?} {opcode}");
        let request = SubmissionEntry {
            opcode: admin::GET_LOG_PAGE,
            cdw10: 15 << 16 | 1,
            ..SubmissionEntry::default()
        };
        let entry = log::ErrorEntry::from_bytes(&guest.admin_data(request).unwrap());
        assert_eq!((entry.error_count, entry.sq_id, entry.nsid), (count as u64 + 1, 1, 5));
        assert_eq!(Status(entry.status >> 1).code(), status);
    }
    guest.io(1, transfer(nvm::READ, 5, 9, 1, page)).unwrap();
}

#[test]
fn counters_count_units_and_commands() {
    let mut guest = ready(vec![namespace(1, 4096)]);
    let page = guest.pages(2);
    for lba in 0..3 {
        guest.io(1, transfer(nvm::WRITE, 1, lba, 16, page)).unwrap();
    }
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    let smart = |guest: &mut Guest| {
        let request = SubmissionEntry {
            opcode: admin::GET_LOG_PAGE,
            nsid: NSID_BROADCAST,
            cdw10: 127 << 16 | 2,
            ..SubmissionEntry::default()
        };
        log::SmartLog::from_bytes(&guest.admin_data(request).unwrap())
    };
    let log = smart(&mut guest);
    assert_eq!((log.host_write_commands, log.host_read_commands), (3, 1));
    assert_eq!((log.data_units_written, log.data_units_read), (1, 1), "thousands of 512 bytes, rounded up");
    assert_eq!(log.power_cycles, 1);
    guest.migrate(2);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    assert_eq!(smart(&mut guest).host_read_commands, 2, "counters travel");
}

#[test]
fn every_page_that_the_controller_changes_is_marked_dirty() {
    let mut guest = ready(vec![namespace(1, 4096)]);
    guest.use_shadow_doorbells();
    guest.create_pair(2, 16);
    let pages = guest.pages(5);
    guest.write_bytes(pages, &[7; 8192]);
    guest.io(2, transfer(nvm::WRITE, 1, 0, 16, pages)).unwrap();
    let log = SubmissionEntry {
        opcode: admin::GET_LOG_PAGE,
        prp1: pages + 8192,
        cdw10: 127 << 16 | 2,
        ..SubmissionEntry::default()
    };
    guest.push(0, log);
    guest.push(2, transfer(nvm::READ, 1, 0, 16, pages + 3 * 4096));
    guest.ring(0);
    guest.ring(2);
    let before = guest.read_bytes(0, MEMORY_BYTES);
    let region = guest.memory.iter().next().unwrap();
    region.bitmap().reset();
    guest.run();
    let after = guest.read_bytes(0, MEMORY_BYTES);
    let changed = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    let changed: Vec<usize> = changed.filter(|(_, (b, a))| b != a).map(|(page, _)| page).collect();
    // Log, two pages of data, admin and I/O completion queue, shadow of the admin queue, event indexes.
    assert_eq!(changed.len(), 7);
    for page in changed {
        assert!(region.bitmap().dirty_at(page * 4096), "page {page} was changed and is not marked");
    }
}
