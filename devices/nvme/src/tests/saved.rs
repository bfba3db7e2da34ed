//! A controller that has a place for what outlives its power.

use std::io;
use std::sync::{Arc, Mutex};

use nvme_spec::identify::{IdentifyController, cns};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{Status, SubmissionEntry, feature, regs};

use super::driver::{Guest, namespace, transfer};
use crate::{ControllerConfig, Error, KeptState, NamespaceConfig, NonVolatile};

/// A place in memory.
#[derive(Debug, Default)]
struct Place {
    kept: Mutex<Option<KeptState>>,
    fails: bool,
}

impl NonVolatile for Place {
    fn keep(&self, kept: &KeptState) -> io::Result<()> {
        if self.fails {
            return Err(io::Error::other("the place is full"));
        }
        *self.kept.lock().unwrap() = Some(kept.clone());
        Ok(())
    }
}

fn power_on(place: &Arc<Place>, namespaces: Vec<NamespaceConfig>) -> Guest {
    let guest = Guest::power_on(ControllerConfig::new("SAVED"), namespaces);
    let kept = place.kept.lock().unwrap().clone();
    guest.controller.attach_non_volatile(place.clone(), kept.as_ref()).unwrap();
    guest
}

fn set(id: u8, value: u32, save: bool) -> SubmissionEntry {
    SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: u32::from(id) | if save { feature::SAVE } else { 0 },
        cdw11: value,
        ..SubmissionEntry::default()
    }
}

fn get(id: u8, select: u8) -> SubmissionEntry {
    SubmissionEntry {
        opcode: admin::GET_FEATURES,
        cdw10: u32::from(id) | u32::from(select) << 8,
        ..SubmissionEntry::default()
    }
}

/// Savable features, a value and the default.
const SAVABLE: [(u8, u32, u32); 8] = [
    (feature::ARBITRATION, 0x0203_0402, 7),
    (feature::POWER_MANAGEMENT, 2 << 5, 0),
    (feature::TEMPERATURE_THRESHOLD, 350, 343),
    (feature::VOLATILE_WRITE_CACHE, 0, 1),
    (feature::INTERRUPT_COALESCING, 0x1234, 0),
    (feature::WRITE_ATOMICITY, 1, 0),
    (feature::ASYNC_EVENT_CONFIGURATION, 0x3ff, 0),
    (feature::SANITIZE_CONFIG, 1, 0),
];

#[test]
fn saved_values_come_back_with_a_reset_and_with_the_power() {
    let place = Arc::new(Place::default());
    let namespaces = vec![namespace(1, 64)];
    let mut guest = power_on(&place, namespaces.clone());
    guest.enable();
    for (id, value, default) in SAVABLE {
        assert_eq!(guest.admin(get(id, feature::SELECT_CAPABILITIES)), Ok(5), "feature {id:#x}");
        guest.admin(set(id, value, true)).unwrap();
        for (select, expected) in [(0, value), (1, default), (2, value)] {
            assert_eq!(guest.admin(get(id, select)), Ok(expected), "feature {id:#x}, {select}");
        }
        // What is set without saving ends with the reset.
        guest.admin(set(id, default, false)).unwrap();
        assert_eq!(guest.admin(get(id, feature::SELECT_SAVED)), Ok(value));
    }
    for id in [feature::TIMESTAMP, feature::KEEP_ALIVE_TIMER, feature::ERROR_RECOVERY] {
        let save = SubmissionEntry { nsid: 1, ..set(id, 0, true) };
        assert_eq!(guest.admin(save), Err(Status::FEATURE_NOT_SAVEABLE), "{id:#x}");
    }
    guest.write32(regs::CC, 0);
    guest.run();
    guest.enable();
    let check = |guest: &mut Guest| {
        for (id, value, _) in SAVABLE {
            assert_eq!(guest.admin(get(id, feature::SELECT_CURRENT)), Ok(value), "feature {id:#x}");
            assert_eq!(guest.admin(get(id, feature::SELECT_SAVED)), Ok(value), "feature {id:#x}");
        }
    };
    check(&mut guest);
    guest.migrate(1);
    check(&mut guest);
    let mut guest = power_on(&place, namespaces);
    guest.enable();
    check(&mut guest);
}

#[test]
fn write_protection_outlives_the_power_unless_it_is_until_then() {
    let place = Arc::new(Place::default());
    let namespaces: Vec<_> = (1..4).map(|nsid| namespace(nsid, 64)).collect();
    let mut guest = power_on(&place, namespaces.clone());
    guest.enable();
    let nwpc = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap()).nwpc;
    assert_eq!(nwpc, 7);
    for value in 1..4 {
        let protect = set(feature::NAMESPACE_WRITE_PROTECTION, value, false);
        guest.admin(SubmissionEntry { nsid: value, ..protect }).unwrap();
    }
    let mut guest = power_on(&place, namespaces);
    guest.enable();
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    for (nsid, protection) in [(1, 1), (2, 0), (3, 3)] {
        let value = get(feature::NAMESPACE_WRITE_PROTECTION, 0);
        assert_eq!(guest.admin(SubmissionEntry { nsid, ..value }), Ok(protection));
        let written = guest.io(1, transfer(nvm::WRITE, nsid, 0, 1, page));
        assert_eq!(written.is_ok(), protection == 0, "namespace {nsid}");
    }
    let lift = set(feature::NAMESPACE_WRITE_PROTECTION, 0, false);
    assert_eq!(guest.admin(SubmissionEntry { nsid: 3, ..lift }), Err(Status::FEATURE_NOT_CHANGEABLE));
    guest.admin(SubmissionEntry { nsid: 1, ..lift }).unwrap();
}

#[test]
fn what_was_committed_for_a_reset_is_activated_by_a_power_cycle() {
    let place = Arc::new(Place::default());
    let mut guest = power_on(&place, vec![namespace(1, 8)]);
    guest.enable();
    let page = guest.pages(1);
    guest.write_bytes(page, &crate::firmware::image(b"9       ", b""));
    let download = SubmissionEntry {
        opcode: admin::FIRMWARE_DOWNLOAD,
        prp1: page,
        cdw10: 1023,
        ..SubmissionEntry::default()
    };
    guest.admin(download).unwrap();
    let commit =
        SubmissionEntry { opcode: admin::FIRMWARE_COMMIT, cdw10: 2 | 1 << 3, ..SubmissionEntry::default() };
    guest.admin(commit).unwrap();
    let mut guest = power_on(&place, vec![namespace(1, 8)]);
    guest.enable();
    let controller = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
    assert_eq!(controller.fr, *b"9       ");
}

#[test]
fn what_nobody_can_have_kept_is_refused() {
    let place = Arc::new(Place::default());
    let mut guest = power_on(&place, vec![namespace(1, 8)]);
    guest.enable();
    guest.admin(set(feature::ARBITRATION, 1, true)).unwrap();
    let kept = place.kept.lock().unwrap().clone().unwrap();
    assert_eq!(vmstate::from_bytes::<KeptState>(&vmstate::to_bytes(&kept), 1), Ok(kept.clone()));
    assert!(matches!(guest.controller.attach_non_volatile(place.clone(), None), Err(Error::NotPristine)));
    type Change = fn(&mut KeptState);
    let changes: [(&str, Change); 8] = [
        ("features.saved.workload_hint", |k| k.features.workload_hint = 1),
        ("features.saved.sanitize_config", |k| k.features.sanitize_config = 2),
        ("features.saved.interrupt_coalescing", |k| k.features.interrupt_coalescing = 0x1_0000),
        ("features.saved.write_atomicity", |k| k.features.write_atomicity = 2),
        ("features.saved.async_events", |k| k.features.async_events = 1 << 31),
        ("firmware.active", |k| k.firmware.active = 9),
        ("protected", |k| k.protected = vec![0]),
        ("protected", |k| k.permanent = vec![1025]),
    ];
    for (expected, change) in changes {
        let mut changed = kept.clone();
        change(&mut changed);
        let guest = Guest::power_on(ControllerConfig::new("SAVED"), vec![namespace(1, 8)]);
        let error = guest.controller.attach_non_volatile(place.clone(), Some(&changed)).unwrap_err();
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }
}

#[test]
fn a_place_that_fails_does_not_fail_the_guest() {
    let place = Arc::new(Place { fails: true, ..Place::default() });
    let mut guest = power_on(&place, vec![namespace(1, 8)]);
    guest.enable();
    guest.admin(set(feature::ARBITRATION, 1, true)).unwrap();
    assert_eq!(guest.admin(get(feature::ARBITRATION, feature::SELECT_SAVED)), Ok(1));
}
