//! Namespace write protection.

use std::sync::Arc;

use block::{Fault, FaultControl, FaultImage, Target};
use nvme_spec::identify::{IdentifyController, IdentifyNamespace, cns};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, feature, regs};

use super::driver::{Guest, memory_image, namespace, transfer};
use crate::{ControllerConfig, NamespaceConfig};

fn config() -> ControllerConfig {
    ControllerConfig::new("PROTECT")
}

/// Set Features: the write protection of a namespace.
pub(super) fn protect(nsid: u32, value: u32) -> SubmissionEntry {
    SubmissionEntry {
        opcode: admin::SET_FEATURES,
        nsid,
        cdw10: u32::from(feature::NAMESPACE_WRITE_PROTECTION),
        cdw11: value,
        ..SubmissionEntry::default()
    }
}

fn protection(nsid: u32) -> SubmissionEntry {
    SubmissionEntry { opcode: admin::GET_FEATURES, cdw11: 0, ..protect(nsid, 0) }
}

#[test]
fn a_protected_namespace_refuses_writes_until_it_is_not() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64), namespace(7, 64)]);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    guest.admin(protect(7, feature::WRITE_PROTECT)).unwrap();
    assert_eq!(guest.admin(protection(7)), Ok(1));
    assert_eq!(guest.admin(protection(1)), Ok(0), "the other one is not");
    let attributes = |guest: &mut Guest| {
        let page = guest.identify(cns::NAMESPACE, 7).unwrap();
        (
            IdentifyNamespace::from_bytes(&page).nsattr,
            guest.identify(cns::INDEPENDENT_NAMESPACE, 7).unwrap()[8],
        )
    };
    assert_eq!(attributes(&mut guest), (1, 1));
    let refused = Err(Status::NAMESPACE_WRITE_PROTECTED);
    for round in 0..2 {
        for opcode in [nvm::WRITE, nvm::WRITE_ZEROES] {
            assert_eq!(guest.io(1, transfer(opcode, 7, 0, 1, page)), refused, "{opcode:#x}");
        }
        guest.io(1, transfer(nvm::READ, 7, 0, 1, page)).unwrap();
        guest.io(1, transfer(nvm::WRITE, 1, 0, 1, page)).unwrap();
        // It outlives a reset of the controller, and a migration.
        if round == 0 {
            guest.write32(regs::CC, 0);
            guest.run();
            guest.enable();
            guest.create_pair(1, 8);
            guest.migrate(1);
        }
    }
    guest.admin(protect(7, feature::NO_WRITE_PROTECT)).unwrap();
    guest.io(1, transfer(nvm::WRITE, 7, 0, 1, page)).unwrap();
    assert_eq!(attributes(&mut guest), (0, 0));
}

#[test]
fn protection_until_a_power_cycle_is_not_changed_before() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    let nwpc = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap()).nwpc;
    assert_eq!(nwpc, 3, "not for ever: there is no place to remember it");
    guest.admin(protect(1, feature::WRITE_PROTECT_UNTIL_POWER_CYCLE)).unwrap();
    guest.migrate(1);
    for value in [feature::NO_WRITE_PROTECT, feature::WRITE_PROTECT] {
        assert_eq!(guest.admin(protect(1, value)), Err(Status::FEATURE_NOT_CHANGEABLE));
    }
    guest.admin(protect(1, feature::WRITE_PROTECT_UNTIL_POWER_CYCLE)).unwrap();
    assert_eq!(guest.admin(protection(1)), Ok(2));
    for (nsid, value, status) in [
        (1, feature::PERMANENT_WRITE_PROTECT, Status::INVALID_FIELD),
        (1, 4, Status::INVALID_FIELD),
        (2, 1, Status::INVALID_FIELD),
        (0, 1, Status::INVALID_NAMESPACE),
        (NSID_BROADCAST, 1, Status::INVALID_NAMESPACE),
    ] {
        assert_eq!(guest.admin(protect(nsid, value)), Err(status), "{nsid} {value}");
    }
    let save = SubmissionEntry { cdw10: protect(1, 2).cdw10 | feature::SAVE, ..protect(1, 2) };
    assert_eq!(guest.admin(save), Err(Status::FEATURE_NOT_SAVEABLE));
}

#[test]
fn protection_completes_when_what_was_written_before_is_stable() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(32768), control.clone()));
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    control.inject(Target::Flush, 0, 1, Fault::Hold);
    guest.push(0, protect(1, feature::WRITE_PROTECT));
    guest.ring(0);
    guest.run();
    assert!(guest.reap(0).is_empty(), "the flush is under way");
    assert_eq!(control.held(), 1);
    control.release_held();
    let mut done = Vec::new();
    guest.run_until("the answer", |guest| {
        done.extend(guest.reap(0));
        !done.is_empty()
    });
    assert!(done[0].status().is_success());
}

#[test]
fn a_protection_that_does_not_exist_is_refused_in_a_saved_state() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.admin(protect(1, feature::WRITE_PROTECT)).unwrap();
    guest.controller.pause(std::time::Instant::now() + super::driver::PATIENCE).unwrap();
    let state = guest.controller.save();
    for value in [0, 4] {
        let mut changed = state.clone();
        changed.namespaces.get_mut(0).unwrap().write_protection.as_mut().unwrap().value = value;
        let other = Guest::power_on(guest.config.clone(), guest.namespaces.clone());
        let error = other.controller.load(&changed).unwrap_err().to_string();
        assert!(error.contains("namespaces[0].write_protection.value"), "{error}");
    }
}
