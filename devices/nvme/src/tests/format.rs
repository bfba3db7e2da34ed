//! Format NVM: what it erases, what it refuses meanwhile, and that it goes on whatever happens.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Backend, Failure, Fault, FaultControl, FaultImage, Target};
use nvme_spec::event::Event;
use nvme_spec::identify::{IdentifyNamespace, OAES_NAMESPACE_ATTRIBUTE, cns};
use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, feature, regs};

use super::driver::{Guest, PATIENCE, memory_image, namespace, transfer};
use super::protection::protect;
use super::store::{Memory, managed};
use crate::maintenance::CHUNK_BYTES;
use crate::{ControllerConfig, FormatSettingsState, NamespaceConfig, NvmeState, Subsystem};

/// Three requests, the last of them a short one.
const IMAGE_BYTES: usize = 2 * CHUNK_BYTES as usize + 8192;

fn config() -> ControllerConfig {
    ControllerConfig::new("FORMAT")
}

fn format(nsid: u32, cdw10: u32) -> SubmissionEntry {
    SubmissionEntry { opcode: admin::FORMAT_NVM, nsid, cdw10, ..SubmissionEntry::default() }
}

fn held(bytes: usize) -> (Arc<FaultControl>, Arc<dyn Backend>) {
    let control = Arc::new(FaultControl::default());
    (control.clone(), Arc::new(FaultImage::new(memory_image(bytes), control)))
}

fn shape(guest: &mut Guest, nsid: u32) -> (u64, u8, u8) {
    let page = IdentifyNamespace::from_bytes(&guest.identify(cns::NAMESPACE, nsid).unwrap());
    (page.nsze, page.flbas, page.fpi)
}

/// Pushes a command and lets the controller run; what it answered.
fn begin(guest: &mut Guest, entry: SubmissionEntry) -> (u16, usize) {
    let cid = guest.push(0, entry);
    guest.ring(0);
    guest.run();
    (cid, guest.reap(0).len())
}

#[test]
fn a_format_erases_and_changes_the_size_of_blocks() {
    let mut guest = Guest::ready(config(), vec![namespace(1, IMAGE_BYTES / 512), namespace(5, 64)]);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    guest.write_bytes(page, &[0xaa; 4096]);
    let blocks = IMAGE_BYTES as u64 / 512;
    for lba in [0, 8, 8192, 16384, blocks - 8] {
        guest.io(1, transfer(nvm::WRITE, 1, lba, 8, page)).unwrap();
    }
    guest.io(1, transfer(nvm::WRITE, 5, 0, 8, page)).unwrap();
    assert_eq!(shape(&mut guest, 1), (blocks, 0, 0x80));
    guest.admin(format(1, 1)).unwrap();
    assert_eq!(shape(&mut guest, 1), (blocks / 8, 1, 0x80));
    for lba in [0, 1, 1024, 2048, blocks / 8 - 1] {
        guest.write_bytes(page, &[0xbb; 4096]);
        guest.io(1, transfer(nvm::READ, 1, lba, 1, page)).unwrap();
        assert!(guest.read_bytes(page, 4096) == vec![0; 4096], "block {lba}");
    }
    assert_eq!(guest.io(1, transfer(nvm::READ, 1, blocks / 8, 1, page)), Err(Status::LBA_OUT_OF_RANGE));
    guest.io(1, transfer(nvm::READ, 5, 0, 8, page)).unwrap();
    assert!(guest.read_bytes(page, 4096) == vec![0xaa; 4096], "the other namespace is as it was");
    // And back, with an erase of user data. What was uncorrectable is not any more, also where a migration comes between.
    guest.io(1, transfer(nvm::WRITE, 1, 1, 1, page)).unwrap();
    guest.io(1, transfer(nvm::WRITE_UNCORRECTABLE, 1, blocks / 8 - 1, 1, page)).unwrap();
    guest.migrate(1);
    guest.admin(format(1, 1 << 9)).unwrap();
    assert_eq!(shape(&mut guest, 1), (blocks, 0, 0x80));
    guest.io(1, transfer(nvm::READ, 1, blocks - 8, 8, page)).unwrap();
    guest.io(1, transfer(nvm::READ, 1, 8, 8, page)).unwrap();
    assert!(guest.read_bytes(page, 4096) == vec![0; 4096]);
    // All of them.
    guest.admin(format(NSID_BROADCAST, 1)).unwrap();
    assert_eq!((shape(&mut guest, 1).1, shape(&mut guest, 5)), (1, (8, 1, 0x80)));
    guest.io(1, transfer(nvm::READ, 5, 0, 1, page)).unwrap();
    assert!(guest.read_bytes(page, 4096) == vec![0; 4096]);
}

#[test]
fn a_format_that_cannot_be_is_refused() {
    let read_only: Arc<dyn Backend> = Arc::new(block::NullImage::new(65_536).read_only());
    let read_only = NamespaceConfig { nsid: 3, block_bytes: 512, metadata: None, backend: read_only };
    let mut guest = Guest::ready(config(), vec![namespace(1, 64), namespace(2, 9), read_only]);
    for (nsid, cdw10, status) in [
        (1, 5, Status::INVALID_FORMAT),
        (1, 1 | 1 << 12, Status::INVALID_FORMAT),
        (1, 1 << 5, Status::INVALID_FORMAT),
        (1, 2 << 9, Status::INVALID_FIELD),
        (2, 1, Status::INVALID_FORMAT),
        (3, 1, Status::NAMESPACE_WRITE_PROTECTED),
        (NSID_BROADCAST, 0, Status::NAMESPACE_WRITE_PROTECTED),
        (4, 0, Status::INVALID_FIELD),
        (0, 0, Status::INVALID_NAMESPACE),
        (1025, 0, Status::INVALID_NAMESPACE),
    ] {
        assert_eq!(guest.admin(format(nsid, cdw10)), Err(status), "namespace {nsid}, {cdw10:#x}");
    }
    let page = IdentifyNamespace::from_bytes(&guest.identify(cns::NAMESPACE, 2).unwrap());
    assert_eq!((page.lbaf[0].lba_data_size_log2, page.lbaf[1].lba_data_size_log2), (9, 0), "not available");
    guest.admin(format(2, 0)).unwrap();
}

#[test]
fn commands_are_refused_until_the_namespace_has_its_turn_behind_it() {
    let (control, backend) = held(IMAGE_BYTES);
    let namespaces = vec![
        NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend },
        namespace(2, 64),
        namespace(3, 64),
    ];
    let mut guest = Guest::ready(config(), namespaces);
    guest.create_pair(1, 8);
    guest.create_pair(2, 8);
    let set = SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: u32::from(feature::ASYNC_EVENT_CONFIGURATION),
        cdw11: OAES_NAMESPACE_ATTRIBUTE,
        ..SubmissionEntry::default()
    };
    guest.admin(set).unwrap();
    let entry = SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() };
    assert_eq!(begin(&mut guest, entry).1, 0);
    let page = guest.pages(1);
    // A command that came before: the erasure waits for it.
    control.inject(Target::Read, 0, 1, Fault::Hold);
    let read = guest.push(2, transfer(nvm::READ, 1, 0, 1, page));
    guest.ring(2);
    guest.run();
    let seen = control.seen();
    // The second request is held.
    control.inject(Target::Write, 1, 1, Fault::Hold);
    let (cid, answered) = begin(&mut guest, format(1, 1));
    assert_eq!((answered, control.seen()), (0, seen), "not begun");
    assert_eq!(shape(&mut guest, 1).2, 0x80 | 100);
    control.release_held();
    guest.run_until("the read and the first request", |_| control.seen() == seen + 2);
    guest.run();
    assert_eq!(guest.reap(2).iter().map(|entry| entry.cid).collect::<Vec<_>>(), [read]);
    assert_eq!(shape(&mut guest, 1), (IMAGE_BYTES as u64 / 512, 0, 0x80 | 51));
    assert_eq!(guest.identify(cns::INDEPENDENT_NAMESPACE, 1).unwrap()[14], 0, "not ready");
    for opcode in [nvm::READ, nvm::WRITE, nvm::FLUSH, nvm::WRITE_ZEROES] {
        let refused = guest.io(1, transfer(opcode, 1, 0, 1, page));
        assert_eq!(refused, Err(Status::FORMAT_IN_PROGRESS), "{opcode:#x}");
    }
    for nsid in [1, 2, NSID_BROADCAST] {
        assert_eq!(guest.admin(format(nsid, 0)), Err(Status::FORMAT_IN_PROGRESS), "one at a time");
    }
    guest.io(1, transfer(nvm::WRITE, 2, 0, 1, page)).unwrap();
    control.release_held();
    let mut entries = Vec::new();
    guest.run_until("the answer", |guest| {
        entries.extend(guest.reap(0));
        entries.len() == 2
    });
    assert!(entries.iter().any(|entry| entry.cid == cid && entry.status().is_success()));
    assert!(entries.iter().any(|entry| entry.dw0 == Event::NAMESPACE_CHANGED.to_dword()));
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    let log =
        SubmissionEntry { opcode: admin::GET_LOG_PAGE, cdw10: 4 | 1 << 16, ..SubmissionEntry::default() };
    assert_eq!(guest.admin_data::<8>(log).unwrap(), [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_format_survives_a_migration_in_its_midst() {
    let (control, backend) = held(IMAGE_BYTES);
    let namespaces =
        vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }, namespace(9, 64)];
    let mut guest = Guest::ready(config(), namespaces);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    guest.write_bytes(page, &[0xaa; 4096]);
    let last = IMAGE_BYTES as u64 / 512 - 8;
    guest.io(1, transfer(nvm::WRITE, 1, last, 8, page)).unwrap();
    control.inject(Target::Write, 1, 1, Fault::Hold);
    let (cid, _) = begin(&mut guest, format(NSID_BROADCAST, 1));
    control.release_held();
    let old = guest.migrate(1);
    let saved = old.save().format.unwrap();
    assert_eq!((saved.waits, saved.cid, saved.sweep.nsid), (true, cid, 1));
    assert_eq!(saved.sweep.offset_bytes, 2 * CHUNK_BYTES, "what was in flight was done before");
    let mut entries = Vec::new();
    guest.run_until("the answer", |guest| {
        entries.extend(guest.reap(0));
        !entries.is_empty()
    });
    assert_eq!((entries.len(), entries[0].cid, entries[0].status().is_success()), (1, cid, true));
    guest.io(1, transfer(nvm::READ, 1, last / 8, 1, page)).unwrap();
    assert!(guest.read_bytes(page, 4096) == vec![0; 4096]);
    // The format goes along, although the images are opened with blocks of 512 bytes.
    guest.migrate(2);
    assert_eq!((shape(&mut guest, 1).1, shape(&mut guest, 9)), (1, (8, 1, 0x80)));
    guest.io(1, transfer(nvm::READ, 1, last / 8, 1, page)).unwrap();
    assert_eq!(guest.io(1, transfer(nvm::READ, 9, 8, 1, page)), Err(Status::LBA_OUT_OF_RANGE));
}

#[test]
fn a_format_goes_on_after_a_reset_and_answers_nobody() {
    let (control, backend) = held(IMAGE_BYTES);
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    control.inject(Target::Write, 1, 1, Fault::Hold);
    begin(&mut guest, format(1, 1));
    guest.write32(regs::CC, 0);
    control.release_held();
    guest.run_until("the reset", |guest| guest.read32(regs::CSTS) == 0);
    let seen = control.seen();
    guest.run();
    assert_eq!(control.seen(), seen, "nothing is done while the controller is off");
    guest.enable();
    guest.run_until("the end", |guest| shape(guest, 1) == (IMAGE_BYTES as u64 / 4096, 1, 0x80));
    assert!(guest.reap(0).is_empty());
    // Three requests and a flush, and the one that the reset dropped again.
    assert_eq!(control.seen(), 5);
}

#[test]
fn a_format_that_fails_says_so_and_changes_no_format() {
    let (control, backend) = held(IMAGE_BYTES);
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    control.inject(Target::Write, 2, 1, Fault::Fail(Failure::Io(5)));
    assert_eq!(guest.admin(format(1, 1)), Err(Status::WRITE_FAULT));
    assert_eq!(shape(&mut guest, 1), (IMAGE_BYTES as u64 / 512, 0, 0x80));
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    guest.admin(format(1, 1)).unwrap();
}

#[test]
fn a_format_that_cannot_be_kept_is_no_success() {
    let (control, backend) = held(IMAGE_BYTES);
    let store = Memory::new(0);
    let namespaces = [NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }];
    let mut guest = managed(&config(), &namespaces, &store);
    control.inject(Target::Write, 1, 1, Fault::Hold);
    let (cid, answers) = begin(&mut guest, format(1, 1));
    assert_eq!((answers, control.held()), (0, 1));
    let before = store.state();
    store.breaks.store(true, Ordering::SeqCst);
    control.release_held();
    let mut answered = Vec::new();
    guest.run_until("the end of the format", |guest| {
        answered.extend(guest.reap(0));
        !answered.is_empty()
    });
    assert_eq!((answered[0].cid, answered[0].status()), (cid, Status::INTERNAL_ERROR));
    assert!(store.state() == before, "nothing of it was kept");
    store.breaks.store(false, Ordering::SeqCst);
    guest.controller.persist().unwrap();
    assert_eq!(store.state().unwrap().allocations.namespaces[0].shape.block_shift, 12, "all of it was");
    guest.admin(format(1, 0)).unwrap();
    assert_eq!(store.state().unwrap().allocations.namespaces[0].shape.block_shift, 9);
}

#[test]
fn a_format_that_nobody_can_have_begun_is_refused() {
    let (control, backend) = held(IMAGE_BYTES);
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 7, block_bytes: 512, metadata: None, backend }]);
    control.inject(Target::Write, 1, 1, Fault::Hold);
    begin(&mut guest, format(7, 1));
    control.release_held();
    guest.controller.pause(std::time::Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    let load = |state: &NvmeState| guest.loaded_elsewhere(state);
    assert!(load(&state).unwrap().save() == state);
    type Change = fn(&mut crate::FormatState);
    fn settings(extended: bool, protection_type: u8, protection_first: bool) -> Option<FormatSettingsState> {
        Some(FormatSettingsState { extended, protection_type, protection_first })
    }
    let changes: [(&str, Change); 12] = [
        ("format.format", |s| s.format = 5),
        ("format.format", |s| (s.format, s.settings) = (2, Some(FormatSettingsState::default()))),
        ("format.format", |s| (s.format, s.settings) = (2, settings(false, 4, false))),
        ("format.format", |s| (s.format, s.settings) = (2, settings(true, 0, true))),
        ("format.format", |s| s.settings = settings(true, 0, false)),
        ("format.format", |s| s.settings = settings(false, 1, false)),
        ("format.cid", |s| (s.waits, s.cid) = (false, 3)),
        ("format.sweep.scope", |s| s.sweep.scope = 0),
        ("format.sweep.scope", |s| s.sweep.scope = 1025),
        ("format.sweep.nsid", |s| s.sweep.nsid = 9),
        ("format.sweep.offset_bytes", |s| s.sweep.offset_bytes = IMAGE_BYTES as u64),
        ("format.sweep.offset_bytes", |s| s.sweep.offset_bytes = 511),
    ];
    for (expected, change) in changes {
        let mut changed = state.clone();
        change(changed.format.as_mut().unwrap());
        let error = load(&changed).err().unwrap().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let mut changed = state.clone();
    changed.namespaces.get_mut(6).unwrap().shape.block_shift = 10;
    changed.namespaces.get_mut(6).unwrap().shape.blocks /= 2;
    let error = load(&changed).err().unwrap().to_string();
    assert!(error.contains("namespaces[6].block_shift is 10"), "{error}");
}

#[test]
fn a_namespace_is_not_protected_from_the_format_that_has_it() {
    let (control, backend) = held(IMAGE_BYTES);
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    let protect = protect(1, feature::WRITE_PROTECT);
    control.inject(Target::Any, 1, 1, Fault::Hold);
    let (cid, answers) = begin(&mut guest, format(1, 0));
    assert_eq!(answers, 0);
    assert_eq!(guest.admin(protect), Err(Status::FORMAT_IN_PROGRESS));
    control.release_held();
    guest.run_until("the end of the format", |guest| guest.reap(0).iter().any(|entry| entry.cid == cid));
    guest.admin(protect).unwrap();
    assert_eq!(guest.admin(format(1, 0)), Err(Status::NAMESPACE_WRITE_PROTECTED));
}

#[test]
fn a_format_waits_for_the_commands_of_other_controllers_and_has_its_namespace_alone() {
    let (control, backend) = held(64 * 512);
    let namespaces = [NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }];
    let subsystem = Subsystem::new("FORMAT", &namespaces, true).unwrap();
    let [mut one, mut other] = [0, 1].map(|id| {
        let mut guest = Guest::member(&subsystem, id, config());
        guest.enable();
        guest.create_pair(1, 8);
        guest
    });
    let page = other.pages(1);
    other.write_bytes(page, &[0xaa; 512]);
    control.inject(Target::Any, 0, 1, Fault::Hold);
    other.push(1, transfer(nvm::WRITE, 1, 5, 1, page));
    other.ring(1);
    other.run();
    let (cid, _) = begin(&mut one, format(1, 0));
    other.run();
    one.run();
    assert_eq!((control.held(), control.seen()), (1, 1), "nothing is erased while the write is in flight");
    assert_eq!(other.io(1, transfer(nvm::READ, 1, 5, 1, page)).err(), Some(Status::FORMAT_IN_PROGRESS));
    assert_eq!(other.admin(format(1, 0)), Err(Status::FORMAT_IN_PROGRESS));
    let sanitize = SubmissionEntry {
        opcode: admin::SANITIZE,
        cdw10: opcode::SANITIZE_BLOCK_ERASE,
        ..SubmissionEntry::default()
    };
    assert_eq!(other.admin(sanitize), Err(Status::FORMAT_IN_PROGRESS));
    control.release_held();
    one.run_until("the end of the format", |one| {
        other.run();
        one.reap(0).iter().any(|entry| entry.cid == cid)
    });
    other.run();
    other.reap(1);
    other.io(1, transfer(nvm::READ, 1, 5, 1, page)).unwrap();
    assert_eq!(other.read_bytes(page, 512), [0; 512]);
}
