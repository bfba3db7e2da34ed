//! Critical warnings: what the failures of an image say of the media, and who is told.

use std::sync::Arc;

use block::{Failure, Fault, FaultControl, FaultImage, Target};
use nvme_spec::event::Event;
use nvme_spec::log::SmartLog;
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{SubmissionEntry, feature, regs};

use super::driver::{Guest, PATIENCE, memory_image, transfer};
use crate::{ControllerConfig, NamespaceConfig};

fn request() -> SubmissionEntry {
    SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() }
}

fn ready() -> (Arc<FaultControl>, Guest) {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(65_536), control.clone()));
    let namespaces = vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }];
    let mut guest = Guest::ready(ControllerConfig::new("WARNINGS"), namespaces);
    guest.create_pair(1, 8);
    (control, guest)
}

fn configure(guest: &mut Guest, mask: u32) {
    let set = SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: u32::from(feature::ASYNC_EVENT_CONFIGURATION),
        cdw11: mask,
        ..SubmissionEntry::default()
    };
    guest.admin(set).unwrap();
}

fn read_smart(retain: bool) -> SubmissionEntry {
    let cdw10 = 2 | 127 << 16 | u32::from(retain) << 15;
    SubmissionEntry { opcode: admin::GET_LOG_PAGE, cdw10, ..SubmissionEntry::default() }
}

fn smart(guest: &mut Guest, retain: bool) -> SmartLog {
    SmartLog::from_bytes(&guest.admin_data(read_smart(retain)).unwrap())
}

fn fail(control: &FaultControl, guest: &mut Guest, failure: Failure) {
    let page = guest.pages(1);
    control.inject(Target::Write, 0, 1, Fault::Fail(failure));
    guest.io(1, transfer(nvm::WRITE, 1, 0, 1, page)).unwrap_err();
    guest.run();
}

#[test]
fn a_failure_raises_its_warning_once_and_tells_who_asked_for_it() {
    for (failure, bit, spare, event) in [
        (Failure::NoSpace, 0, 0, Event::SPARE_BELOW_THRESHOLD),
        (Failure::Io(5), 2, 100, Event::RELIABILITY_DEGRADED),
        (Failure::Io(30), 3, 100, Event::RELIABILITY_DEGRADED),
    ] {
        for asked in [false, true] {
            let (control, mut guest) = ready();
            configure(&mut guest, if asked { 1 << bit } else { 0xff & !(1 << bit) });
            guest.push(0, request());
            guest.push(0, request());
            guest.ring(0);
            assert_eq!(smart(&mut guest, true).critical_warning, 0);
            fail(&control, &mut guest, failure);
            let told: Vec<_> = guest.reap(0).iter().map(|entry| Event::from_dword(entry.dw0)).collect();
            assert_eq!(told, if asked { vec![event] } else { vec![] }, "{failure}");
            let log = smart(&mut guest, false);
            assert_eq!((log.critical_warning, log.available_spare_percent), (1 << bit, spare), "{failure}");
            // It is there already.
            fail(&control, &mut guest, failure);
            assert!(guest.reap(0).is_empty());
        }
    }
}

#[test]
fn warnings_survive_resets_and_migrations_and_events_of_them_wait() {
    let (control, mut guest) = ready();
    configure(&mut guest, 0xff);
    fail(&control, &mut guest, Failure::NoSpace);
    fail(&control, &mut guest, Failure::Io(5));
    guest.migrate(1);
    // Both events were held; the second one is masked until the log has been read.
    let requests = [guest.push(0, request()), guest.push(0, request())];
    guest.ring(0);
    guest.run();
    let told: Vec<_> = guest.reap(0).iter().map(|entry| (entry.cid, Event::from_dword(entry.dw0))).collect();
    assert_eq!(told, [(requests[0], Event::SPARE_BELOW_THRESHOLD)]);
    guest.migrate(2);
    let page = guest.pages(1);
    let cid = guest.push(0, SubmissionEntry { prp1: page, ..read_smart(false) });
    guest.ring(0);
    guest.run();
    let told: Vec<_> = guest.reap(0).iter().map(|entry| (entry.cid, entry.dw0)).collect();
    assert_eq!(told, [(cid, 0), (requests[1], Event::RELIABILITY_DEGRADED.to_dword())]);
    guest.write32(regs::CC, 0);
    guest.run();
    guest.enable();
    assert_eq!(smart(&mut guest, false).critical_warning, 0b101);
    guest.migrate(1);
    assert_eq!(smart(&mut guest, false).critical_warning, 0b101);
    guest.controller.pause(std::time::Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    for bits in [0, 2] {
        let mut changed = state.clone();
        changed.events.warnings.as_mut().unwrap().bits = bits;
        let other = Guest::power_on(guest.config.clone(), guest.namespaces.clone());
        let error = other.controller.load(&changed).unwrap_err().to_string();
        assert!(error.contains("events.warnings.bits"), "{error}");
    }
}
