//! Sanitize: what reaches the images, what is refused meanwhile, and that it goes on whatever happens.

use std::sync::Arc;

use block::{Backend, Failure, Fault, FaultControl, FaultImage, Target};
use nvme_spec::event::Event;
use nvme_spec::identify::{IdentifyController, cns};
use nvme_spec::log::SanitizeStatusLog;
use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, feature, regs};

use super::driver::{Guest, PATIENCE, memory_image, namespace, transfer};
use super::protection::protect;
use crate::maintenance::CHUNK_BYTES;
use crate::{ControllerConfig, NamespaceConfig, NvmeState};

const ERASE: u32 = opcode::SANITIZE_BLOCK_ERASE;
const OVERWRITE: u32 = opcode::SANITIZE_OVERWRITE | opcode::SANITIZE_NO_DEALLOCATE;

fn config() -> ControllerConfig {
    ControllerConfig::new("SANITIZE")
}

fn sanitize(cdw10: u32, pattern: u32) -> SubmissionEntry {
    SubmissionEntry { opcode: admin::SANITIZE, cdw10, cdw11: pattern, ..SubmissionEntry::default() }
}

fn log_page(retain: bool) -> SubmissionEntry {
    let cdw10 = 0x81 | 127 << 16 | u32::from(retain) << 15;
    SubmissionEntry { opcode: admin::GET_LOG_PAGE, cdw10, ..SubmissionEntry::default() }
}

fn log(guest: &mut Guest) -> SanitizeStatusLog {
    SanitizeStatusLog::from_bytes(&guest.admin_data(log_page(false)).unwrap())
}

fn finish(guest: &mut Guest) -> u16 {
    guest.run_until("the end of the operation", |guest| log(guest).status & 7 != 2);
    let log = log(guest);
    assert_eq!((log.progress, log.estimated_seconds), (0xffff, [u32::MAX; 6]));
    log.status
}

fn image(control: &Arc<FaultControl>, bytes: usize) -> Arc<dyn Backend> {
    Arc::new(FaultImage::new(memory_image(bytes), control.clone()))
}

/// Two requests in namespace 1 and one in namespace 9.
fn two(control: &Arc<FaultControl>) -> Vec<NamespaceConfig> {
    let backend = image(control, CHUNK_BYTES as usize + 4096);
    vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }, namespace(9, 64)]
}

fn fill(guest: &mut Guest, page: u64) {
    guest.create_pair(1, 8);
    guest.write_bytes(page, &[0xaa; 4096]);
    for (nsid, lba) in [(1, 0), (1, CHUNK_BYTES / 512), (9, 56)] {
        guest.io(1, transfer(nvm::WRITE, nsid, lba, 8, page)).unwrap();
    }
}

/// The last blocks of both namespaces.
fn ends(guest: &mut Guest, page: u64) -> [u8; 4] {
    let mut bytes = [None; 2];
    for (at, (nsid, lba)) in [(1, CHUNK_BYTES / 512), (9, 56)].into_iter().enumerate() {
        guest.io(1, transfer(nvm::READ, nsid, lba, 8, page)).unwrap();
        let block = guest.read_bytes(page, 4096);
        let four = *block.first_chunk::<4>().unwrap();
        assert!(block.chunks(4).all(|bytes| bytes == four));
        bytes[at] = Some(four);
    }
    assert_eq!(bytes[0], bytes[1]);
    bytes[0].unwrap()
}

#[test]
fn every_namespace_is_erased_or_overwritten_as_often_as_asked_for() {
    let control = Arc::new(FaultControl::default());
    let mut guest = Guest::ready(config(), two(&control));
    let page = guest.pages(1);
    fill(&mut guest, page);
    let controller = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
    assert_eq!(controller.sanicap, 0x4000_0006, "block erase, overwrite, media is not modified afterwards");
    assert_eq!((log(&mut guest).status, log(&mut guest).progress), (0, 0xffff), "never");
    let pattern: u32 = 0x1122_3344;
    let bytes = pattern.to_le_bytes();
    let inverse = (!pattern).to_le_bytes();
    let invert = opcode::SANITIZE_INVERT_PATTERN;
    // Namespace 1 takes two requests and a flush for a pass.
    for (command, expected, passes, requests) in [
        (ERASE, [0; 4], 0, 3),
        (ERASE | opcode::SANITIZE_NO_DEALLOCATE, [0; 4], 0, 3),
        (OVERWRITE | 1 << 4, bytes, 1, 3),
        (OVERWRITE | 2 << 4 | invert, inverse, 2, 6),
        (OVERWRITE | 3 << 4 | invert, bytes, 3, 9),
        (OVERWRITE, bytes, 16, 48),
    ] {
        guest.io(1, transfer(nvm::WRITE, 1, 0, 8, page)).unwrap();
        let seen = control.seen();
        guest.admin(sanitize(command, pattern)).unwrap();
        assert_eq!(finish(&mut guest), 1 | passes << 3, "{command:#x}");
        assert_eq!(log(&mut guest).command, command);
        assert_eq!(control.seen() - seen, requests, "{command:#x}");
        assert_eq!(ends(&mut guest, page), expected, "{command:#x}");
    }
    // One more pass gives the blocks back.
    let seen = control.seen();
    guest.admin(sanitize(opcode::SANITIZE_OVERWRITE | 1 << 4, 0)).unwrap();
    assert_eq!(finish(&mut guest), 1 | 1 << 3);
    assert_eq!(control.seen() - seen, 6);
}

#[test]
fn meanwhile_only_what_is_allowed_is_processed() {
    let control = Arc::new(FaultControl::default());
    let mut guest = Guest::ready(config(), two(&control));
    let page = guest.pages(1);
    fill(&mut guest, page);
    let request =
        guest.push(0, SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() });
    control.inject(Target::Write, 1, 1, Fault::Hold);
    guest.admin(sanitize(ERASE, 0)).unwrap();
    guest.run();
    let status = log(&mut guest);
    // One of two requests in namespace 1, none in namespace 9.
    let whole = CHUNK_BYTES + 4096 + 64 * 512;
    assert_eq!((status.status, u64::from(status.progress)), (2, CHUNK_BYTES * 0x1_0000 / whole));
    for opcode in [nvm::READ, nvm::WRITE, nvm::FLUSH, nvm::WRITE_ZEROES, nvm::DATASET_MANAGEMENT] {
        for nsid in [1, 9] {
            let refused = guest.io(1, transfer(opcode, nsid, 0, 1, page));
            assert_eq!(refused, Err(Status::SANITIZE_IN_PROGRESS), "{opcode:#x}");
        }
    }
    let refused = Err(Status::SANITIZE_IN_PROGRESS);
    for opcode in [admin::FORMAT_NVM, admin::FIRMWARE_COMMIT, admin::FIRMWARE_DOWNLOAD, admin::SANITIZE] {
        let entry =
            SubmissionEntry { opcode, nsid: 1, cdw10: ERASE, prp1: page, ..SubmissionEntry::default() };
        assert_eq!(guest.admin(entry), refused, "{opcode:#x}");
    }
    for log in [3u8, 5, 6, 0xd] {
        let entry = SubmissionEntry { cdw10: u32::from(log) | 127 << 16, prp1: page, ..log_page(false) };
        assert_eq!(guest.admin(entry), refused, "log page {log:#x}");
    }
    for page in [0u8, 1, 2, 4, 0x12, 0x81] {
        guest
            .admin_data::<8>(SubmissionEntry { cdw10: u32::from(page) | 1 << 16, ..log_page(false) })
            .unwrap();
    }
    guest.identify(cns::CONTROLLER, 0).unwrap();
    guest.admin(SubmissionEntry { opcode: admin::KEEP_ALIVE, ..SubmissionEntry::default() }).unwrap();
    guest.create_pair(2, 8);
    control.release_held();
    let mut told = Vec::new();
    guest.run_until("the event", |guest| {
        told.extend(guest.reap(0));
        !told.is_empty()
    });
    assert_eq!((told.len(), told[0].cid, told[0].dw0), (1, request, Event::SANITIZE_COMPLETED.to_dword()));
    assert_eq!(ends(&mut guest, page), [0; 4]);
}

#[test]
fn commands_that_cannot_be_are_refused() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    for action in [0, 4, 5, 6, 7] {
        assert_eq!(guest.admin(sanitize(action, 0)), Err(Status::INVALID_FIELD), "action {action}");
    }
    guest.admin(sanitize(opcode::SANITIZE_EXIT_FAILURE_MODE, 0)).unwrap();
    assert_eq!(log(&mut guest).status, 0);
    guest.admin(protect(1, feature::WRITE_PROTECT)).unwrap();
    assert_eq!(guest.admin(sanitize(ERASE, 0)), Err(Status::NAMESPACE_WRITE_PROTECTED));
    guest.admin(protect(1, feature::NO_WRITE_PROTECT)).unwrap();
    // Firmware that waits for a reset.
    let commit =
        SubmissionEntry { opcode: admin::FIRMWARE_COMMIT, cdw10: 1 | 2 << 3, ..SubmissionEntry::default() };
    guest.admin(commit).unwrap();
    assert_eq!(guest.admin(sanitize(ERASE, 0)), Err(Status::FIRMWARE_NEEDS_CONTROLLER_RESET));
}

#[test]
fn it_goes_on_over_resets_and_migrations() {
    let control = Arc::new(FaultControl::default());
    let mut guest = Guest::ready(config(), two(&control));
    let page = guest.pages(1);
    fill(&mut guest, page);
    control.inject(Target::Write, 1, 1, Fault::Hold);
    guest.admin(sanitize(OVERWRITE | 2 << 4, 0x0101_0101)).unwrap();
    guest.run();
    guest.write32(regs::CC, 0);
    control.release_held();
    guest.run_until("the reset", |guest| guest.read32(regs::CSTS) == 0);
    control.inject(Target::Write, 1, 1, Fault::Hold);
    // Off, it is saved with the rest.
    guest.migrate(1);
    guest.enable();
    guest.create_pair(1, 8);
    assert_eq!(guest.io(1, transfer(nvm::READ, 1, 0, 1, page)), Err(Status::SANITIZE_IN_PROGRESS));
    control.release_held();
    control.inject(Target::Write, 0, 1, Fault::Hold);
    let old = guest.migrate(2);
    let saved = old.save().sanitize.unwrap();
    assert_eq!((saved.running, saved.pattern, saved.sweep.scope), (true, 0x0101_0101, NSID_BROADCAST));
    assert_eq!(guest.io(1, transfer(nvm::READ, 1, 0, 1, page)), Err(Status::SANITIZE_IN_PROGRESS));
    control.release_held();
    assert_eq!(finish(&mut guest), 1 | 2 << 3);
    assert_eq!(ends(&mut guest, page), [1; 4]);
    guest.migrate(1);
    assert_eq!(log(&mut guest).status, 1 | 2 << 3);
}

#[test]
fn after_a_failure_nothing_reaches_the_namespaces_until_it_is_overcome() {
    for unrestricted in [false, true] {
        let control = Arc::new(FaultControl::default());
        let mut guest = Guest::ready(config(), two(&control));
        let page = guest.pages(1);
        fill(&mut guest, page);
        let exit = if unrestricted { opcode::SANITIZE_UNRESTRICTED_EXIT } else { 0 };
        control.inject(Target::Write, 1, 1, Fault::Fail(Failure::Io(5)));
        guest.admin(sanitize(ERASE | exit, 0)).unwrap();
        assert_eq!(finish(&mut guest), 3);
        guest.migrate(1);
        let refused = Err(Status::SANITIZE_FAILED);
        for nsid in [1, 9] {
            assert_eq!(guest.io(1, transfer(nvm::READ, nsid, 0, 1, page)).map(|()| 0), refused);
        }
        let format = SubmissionEntry { opcode: admin::FORMAT_NVM, nsid: 1, ..SubmissionEntry::default() };
        assert_eq!(guest.admin(format), refused);
        let leave = sanitize(opcode::SANITIZE_EXIT_FAILURE_MODE, 0);
        if unrestricted {
            guest.admin(leave).unwrap();
            guest.migrate(1);
            assert_eq!(log(&mut guest).status, 3, "it has failed all the same");
        } else {
            assert_eq!(guest.admin(leave), refused);
            assert_eq!(guest.admin(sanitize(ERASE | opcode::SANITIZE_UNRESTRICTED_EXIT, 0)), refused);
            guest.admin(sanitize(ERASE, 0)).unwrap();
            assert_eq!(finish(&mut guest), 1);
        }
        guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    }
}

#[test]
fn a_sanitize_operation_that_nobody_can_have_begun_is_refused() {
    let control = Arc::new(FaultControl::default());
    let mut guest = Guest::ready(config(), two(&control));
    let idle = {
        guest.controller.pause(std::time::Instant::now() + PATIENCE).unwrap();
        let state = guest.controller.save();
        guest.controller.resume();
        state
    };
    assert_eq!(idle.sanitize, None);
    control.inject(Target::Write, 1, 1, Fault::Hold);
    guest.admin(sanitize(OVERWRITE | 2 << 4, 7)).unwrap();
    guest.run();
    control.release_held();
    guest.controller.pause(std::time::Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    let load = |state: &NvmeState| guest.loaded_elsewhere(state);
    assert!(load(&state).unwrap().save() == state);
    type Change = fn(&mut crate::SanitizeState);
    let changes: [(&str, Change); 9] = [
        ("sanitize.command", |s| s.command = 0),
        ("sanitize.command", |s| s.command = 1),
        ("sanitize.command", |s| s.command |= 1 << 10),
        ("sanitize.outcome", |s| s.outcome = 4),
        ("sanitize.overwrites", |s| s.overwrites = 3),
        ("sanitize.pass", |s| s.pass = 3),
        ("sanitize.sweep.scope", |s| (s.sweep.scope, s.sweep.nsid) = (1, 1)),
        ("sanitize.sweep.nsid", |s| s.sweep.nsid = 1026),
        ("sanitize.running", |s| s.running = false),
    ];
    for (expected, change) in changes {
        let mut changed = state.clone();
        change(changed.sanitize.as_mut().unwrap());
        let error = load(&changed).err().unwrap().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
