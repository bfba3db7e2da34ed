//! Device Self-test: what it reads, what it finds, and what ends it.

use std::sync::Arc;
use std::time::Duration;

use block::{Failure, Fault, FaultControl, FaultImage, Target};
use nvme_spec::identify::{IdentifyController, cns};
use nvme_spec::log::{self, SelfTestLog};
use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, regs};

use super::driver::{Guest, PATIENCE, memory_image, namespace, transfer};
use crate::{ControllerConfig, NamespaceConfig, NvmeState};

const MIB: usize = 1 << 20;
const SHORT: u32 = 1;
const EXTENDED: u32 = 2;
const ABORT: u32 = 0xf;

fn config() -> ControllerConfig {
    ControllerConfig::new("SELF-TEST")
}

fn test(nsid: u32, code: u32) -> SubmissionEntry {
    SubmissionEntry { opcode: admin::DEVICE_SELF_TEST, nsid, cdw10: code, ..SubmissionEntry::default() }
}

fn log(guest: &mut Guest) -> SelfTestLog {
    let entry =
        SubmissionEntry { opcode: admin::GET_LOG_PAGE, cdw10: 6 | 140 << 16, ..SubmissionEntry::default() };
    SelfTestLog::from_bytes(&guest.admin_data(entry).unwrap())
}

/// The newest result, when nothing runs any more.
fn result(guest: &mut Guest) -> log::SelfTestResult {
    guest.run_until("the end of the test", |guest| log(guest).operation == 0);
    log(guest).results[0]
}

fn on_faulty(mib: usize) -> (Arc<FaultControl>, Guest) {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(mib * MIB), control.clone()));
    let namespaces =
        vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }, namespace(4, 64)];
    (control, Guest::ready(config(), namespaces))
}

#[test]
fn an_extended_test_reads_everything_and_a_short_one_samples() {
    let (control, mut guest) = on_faulty(40);
    let controller = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
    assert_eq!((controller.oacs & 0x10, controller.dsto, controller.edstt), (0x10, 1, 1));
    assert_eq!(log(&mut guest).results[0].status, log::SELF_TEST_UNUSED);
    // Of 40 MiB a short test reads one of every three.
    for (nsid, code, requests) in [
        (1, EXTENDED, 40),
        (NSID_BROADCAST, EXTENDED, 40),
        (4, EXTENDED, 0),
        (0, EXTENDED, 0),
        (1, SHORT, 14),
        (0, SHORT, 0),
    ] {
        let seen = control.seen();
        guest.admin(test(nsid, code)).unwrap();
        let result = result(&mut guest);
        assert_eq!((u32::from(result.status), result.nsid), (code << 4, nsid));
        assert_eq!(control.seen() - seen, requests, "namespace {nsid}, code {code}");
    }
    let results = log(&mut guest).results.map(|result| result.status);
    assert_eq!(results[..7], [0x10, 0x10, 0x20, 0x20, 0x20, 0x20, 0xf], "newest first");
}

#[test]
fn tests_that_cannot_be_are_refused() {
    let (control, mut guest) = on_faulty(4);
    for (nsid, code, status) in [
        (1, 0, Status::INVALID_FIELD),
        (1, 3, Status::INVALID_FIELD),
        (1, 0xe, Status::INVALID_FIELD),
        (2, SHORT, Status::INVALID_FIELD),
        (1025, SHORT, Status::INVALID_NAMESPACE),
    ] {
        assert_eq!(guest.admin(test(nsid, code)), Err(status), "namespace {nsid}, code {code}");
    }
    control.inject(Target::Read, 1, 1, Fault::Hold);
    guest.admin(test(1, EXTENDED)).unwrap();
    assert_eq!(guest.admin(test(4, SHORT)), Err(Status::SELF_TEST_IN_PROGRESS));
    let running = log(&mut guest);
    assert_eq!((running.operation, running.completion_percent), (2, 25));
    // And the disk works.
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    guest.io(1, transfer(nvm::WRITE, 1, 0, 1, page)).unwrap();
    control.release_held();
    assert_eq!(result(&mut guest).status, 0x20);
}

#[test]
fn the_block_that_cannot_be_read_is_named() {
    let (control, mut guest) = on_faulty(4);
    // The third request, and of its blocks the sixth.
    control.inject(Target::Read, 2, 1, Fault::Fail(Failure::Io(5)));
    control.inject(Target::Read, 5, 1, Fault::Fail(Failure::Io(5)));
    guest.admin(test(NSID_BROADCAST, EXTENDED)).unwrap();
    let result = result(&mut guest);
    assert_eq!((result.status, result.segment, result.valid), (0x20 | log::SELF_TEST_FAILED_SEGMENT, 1, 0xf));
    assert_eq!((result.nsid, result.failing_lba), (1, 2 * MIB as u64 / 512 + 5));
    assert_eq!((result.status_code_type, result.status_code), (2, 0x81));
    // So is one that the guest has marked.
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    guest.io(1, transfer(nvm::WRITE_UNCORRECTABLE, 1, 4097, 1, page)).unwrap();
    guest.admin(test(1, EXTENDED)).unwrap();
    let result = self::result(&mut guest);
    assert_eq!((result.status, result.failing_lba, result.status_code), (0x27, 4097, 0x81));
    guest.io(1, transfer(nvm::WRITE, 1, 4097, 1, page)).unwrap();
    // What fails once and never again is no failure.
    let seen = control.seen();
    control.inject(Target::Read, 2, 1, Fault::Fail(Failure::Io(5)));
    guest.admin(test(1, EXTENDED)).unwrap();
    assert_eq!(self::result(&mut guest).status, 0x20);
    assert_eq!(control.seen() - seen, 4 + 2048);
}

#[test]
fn a_test_ends_with_what_comes_between() {
    type Between = fn(&mut Guest);
    let cases: [(Between, u8, bool); 5] = [
        (|guest| _ = guest.admin(test(0, ABORT)).unwrap(), log::SELF_TEST_ABORTED, true),
        (
            |guest| {
                let format = SubmissionEntry { opcode: admin::FORMAT_NVM, nsid: 1, ..test(1, 0) };
                let format = SubmissionEntry { opcode: admin::FORMAT_NVM, ..format };
                guest.push(0, format);
                guest.ring(0);
                guest.run();
            },
            log::SELF_TEST_FORMATTED,
            true,
        ),
        (
            |guest| {
                let erase = SubmissionEntry {
                    opcode: admin::SANITIZE,
                    cdw10: opcode::SANITIZE_BLOCK_ERASE,
                    ..SubmissionEntry::default()
                };
                guest.admin(erase).unwrap();
            },
            log::SELF_TEST_SANITIZED,
            true,
        ),
        (|guest| guest.write32(regs::CC, 0), log::SELF_TEST_RESET, false),
        (|guest| guest.write32(regs::CC, 0), log::SELF_TEST_PASSED, true),
    ];
    for (between, expected, extended) in cases {
        let (control, mut guest) = on_faulty(4);
        control.inject(Target::Read, 1, 1, Fault::Hold);
        let code = if extended { EXTENDED } else { SHORT };
        guest.admin(test(1, code)).unwrap();
        guest.run();
        between(&mut guest);
        guest.run();
        control.release_held();
        guest.run_until("quiet", |guest| guest.controller.statistics().in_flight == 0);
        if guest.read32(regs::CSTS) == 0 {
            guest.enable();
        }
        guest.run();
        let status =
            SubmissionEntry { opcode: admin::GET_LOG_PAGE, cdw10: 0x81, ..SubmissionEntry::default() };
        guest.run_until("the end of what came between", |guest| {
            guest.reap(0);
            let page: [u8; 4] = guest.admin_data(status).unwrap();
            page[2] & 7 != 2
        });
        assert_eq!(u32::from(result(&mut guest).status), code << 4 | u32::from(expected));
        // The next one is not mistaken for it.
        let seen = control.seen();
        guest.admin(test(1, EXTENDED)).unwrap();
        assert_eq!(result(&mut guest).status, 0x20);
        assert_eq!(control.seen() - seen, 4);
    }
}

#[test]
fn the_log_keeps_twenty_results() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    for round in 0..25 {
        guest.admin(test(0, 1 + round % 2)).unwrap();
    }
    let results = log(&mut guest).results.map(|result| result.status);
    assert_eq!(results, std::array::from_fn(|index| if index % 2 == 0 { 0x10 } else { 0x20 }));
    guest.migrate(1);
    assert_eq!(log(&mut guest).results.map(|result| result.status), results);
}

#[test]
fn a_test_survives_a_migration_in_its_midst() {
    let (control, mut guest) = on_faulty(4);
    control.inject(Target::Read, 1, 1, Fault::Hold);
    guest.admin(test(NSID_BROADCAST, EXTENDED)).unwrap();
    guest.run();
    control.release_held();
    control.inject(Target::Read, 0, 1, Fault::Fail(Failure::Io(5)));
    let old = guest.migrate(1);
    assert_eq!(old.save().self_test.unwrap().sweep.offset_bytes, 2 * MIB as u64);
    control.inject(Target::Read, 3, 1, Fault::Hold);
    guest.run();
    control.release_held();
    // In the midst of reading block by block.
    let old = guest.migrate(2);
    let saved = old.save().self_test.unwrap();
    assert_eq!(saved.sweep.offset_bytes, 2 * MIB as u64 + 4 * 512);
    assert_eq!(saved.probe_until_bytes, 3 * MIB as u64);
    assert_eq!(result(&mut guest).status, 0x20);
}

#[test]
fn self_tests_that_nobody_can_have_made_are_refused() {
    let (control, mut guest) = on_faulty(4);
    guest.admin(test(0, SHORT)).unwrap();
    guest.run();
    control.inject(Target::Read, 1, 1, Fault::Hold);
    guest.admin(test(1, EXTENDED)).unwrap();
    guest.run();
    control.release_held();
    guest.controller.pause(std::time::Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    let load = |state: &NvmeState| guest.loaded_elsewhere(state);
    assert!(load(&state).unwrap().save() == state);
    type Change = fn(&mut crate::SelfTestState);
    let changes: [(&str, Change); 7] = [
        ("self_test.code", |s| s.code = 3),
        ("self_test.code", |s| s.code = 0),
        ("self_test.sweep.nsid", |s| s.sweep.nsid = 3),
        ("self_test.sweep.offset_bytes", |s| s.sweep.offset_bytes = 4 * MIB as u64),
        ("self_test.probe_until_bytes", |s| s.probe_until_bytes = 512),
        ("self_test.results", |s| s.results[0][0] = 0x1f),
        ("self_test.results", |s| s.results[0][3] = 1),
    ];
    for (expected, change) in changes {
        let mut changed = state.clone();
        change(changed.self_test.as_mut().unwrap());
        let error = load(&changed).err().unwrap().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn a_namespace_that_goes_amid_its_test_leaves_a_controller_that_can_move() {
    for (nsid, outcome) in [(1, log::SELF_TEST_NAMESPACE_REMOVED), (NSID_BROADCAST, log::SELF_TEST_PASSED)] {
        for in_flight in [false, true] {
            let (control, mut guest) = on_faulty(4);
            control.inject(Target::Read, 1, 1, Fault::Hold);
            guest.admin(test(nsid, EXTENDED)).unwrap();
            guest.run();
            let subsystem = Arc::clone(guest.controller.subsystem());
            if in_flight {
                assert!(!subsystem.remove(1, Duration::ZERO).unwrap());
                guest.run();
            }
            // The test goes on after the reset, and nothing of it before.
            guest.write32(regs::CC, 0x0046_0000);
            guest.run();
            control.release_held();
            guest.run_until("the end of the reset", |guest| guest.read32(regs::CSTS) == 0);
            if !in_flight {
                subsystem.remove(1, Duration::ZERO).unwrap();
                guest.run();
            }
            guest.namespaces.retain(|namespace| namespace.nsid != 1);
            guest.migrate(2);
            guest.enable();
            let result = result(&mut guest);
            assert_eq!((result.status, result.nsid), (outcome | (EXTENDED as u8) << 4, nsid));
        }
    }
}
