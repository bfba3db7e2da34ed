//! Pause, save, restore, resume, between and during commands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Fault, FaultControl, FaultImage, Target};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{Status, SubmissionEntry, feature, regs};

use super::driver::{Guest, memory_image, namespace, transfer};
use crate::{ControllerConfig, Error, NamespaceConfig};

fn config() -> ControllerConfig {
    ControllerConfig::new("MIGRATE")
}

fn park_event_request(guest: &mut Guest) -> u16 {
    let cid =
        guest.push(0, SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() });
    guest.ring(0);
    guest.run();
    cid
}

#[test]
fn queues_and_parked_requests_survive() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64), namespace(900, 64)]);
    guest.create_pair(1, 8);
    guest.create_pair(2, 8);
    let first = park_event_request(&mut guest);
    let second = park_event_request(&mut guest);
    let page = guest.pages(1);
    guest.write_bytes(page, &[0x11; 512]);
    // An odd number of commands, so that heads, tails and phases are in the middle of a lap.
    for lba in 0..11 {
        guest.io(1, transfer(nvm::WRITE, 900, lba, 1, page)).unwrap();
    }
    let old = guest.migrate(3);
    guest.clear(page, 512);
    guest.io(1, transfer(nvm::READ, 900, 10, 1, page)).unwrap();
    assert_eq!(guest.read_bytes(page, 512), vec![0x11; 512]);
    guest.io(2, transfer(nvm::FLUSH, 1, 0, 1, page)).unwrap();
    // A bad doorbell is reported to the oldest of the parked requests, by the new controller only.
    guest.write32(regs::sq_tail_doorbell(9), 1);
    guest.run();
    let entries = guest.reap(0);
    assert_eq!(entries.len(), 1);
    assert_eq!((entries[0].cid, entries[0].dw0), (first, 0x01_0000));
    let (before, after) =
        (old.save(), guest.controller.pause(Instant::now()).map(|_| guest.controller.save()));
    assert_eq!(before.events.parked, vec![first, second]);
    assert_eq!(after.unwrap().events.parked, vec![second]);
}

#[test]
fn doorbells_rung_before_the_stop_are_served_without_a_new_one() {
    for shadow in [false, true] {
        let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
        if shadow {
            guest.use_shadow_doorbells();
        }
        guest.create_pair(1, 8);
        let page = guest.pages(1);
        // Rung, but the worker never ran.
        let cid = guest.push(1, transfer(nvm::READ, 1, 0, 1, page));
        guest.ring(1);
        guest.migrate(2);
        guest.run();
        let entries = guest.reap(1);
        assert_eq!(entries.len(), 1, "shadow {shadow}");
        assert_eq!((entries[0].cid, entries[0].sq_head), (cid, 1));
        assert_eq!(guest.doorbell_events().len(), usize::from(shadow));
        guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    }
}

#[test]
fn completions_that_found_no_room_survive() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 4);
    let (sq2, page) = (guest.pages(1), guest.pages(1));
    guest.create_sq(2, 16, sq2, 1).unwrap();
    guest
        .queues
        .insert(2, super::driver::Pair { sq_base: sq2, entries: 16, tail: 0, ..guest.queues[&1].clone() });
    let cids: Vec<_> = (0..10).map(|lba| guest.push(2, transfer(nvm::READ, 1, lba, 1, page))).collect();
    guest.ring(2);
    guest.run();
    guest.migrate(2);
    assert!(guest.interrupts.take(1) >= 1, "unseen entries are signalled again");
    let mut seen = Vec::new();
    guest.run_until("all completions", |guest| {
        seen.extend(guest.reap(1).iter().map(|entry| entry.cid));
        seen.len() == cids.len()
    });
    assert_eq!(seen, cids);
}

#[test]
fn a_stuck_backend_fails_the_pause_and_not_the_guest() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(32768), control.clone()));
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    control.inject(Target::Read, 0, 2, Fault::Hold);
    for lba in 0..2 {
        guest.push(1, transfer(nvm::READ, 1, lba, 1, page));
    }
    guest.ring(1);
    guest.run();
    assert_eq!(guest.controller.statistics().in_flight, 2);
    let error = guest.controller.pause(Instant::now() + Duration::from_millis(5)).unwrap_err();
    assert!(matches!(error, Error::PauseTimeout { in_flight: 2 }), "{error}");
    guest.controller.resume();
    control.release_held();
    guest.run_until("the held commands", |guest| guest.controller.statistics().in_flight == 0);
    assert_eq!(guest.reap(1).len(), 2);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    // And with nothing held the pause counts what was in flight, and ends when it is done.
    control.inject(Target::Read, 0, 1, Fault::Hold);
    guest.push(1, transfer(nvm::READ, 1, 5, 1, page));
    guest.ring(1);
    guest.run();
    control.release_held();
    let report = guest.controller.pause(Instant::now() + super::driver::PATIENCE).unwrap();
    assert_eq!(report.in_flight_at_start, 1);
    assert_eq!(guest.reap_silently(1).len(), 1, "posted although paused");
}

#[test]
fn what_was_half_done_is_done_before_the_save() {
    for what in ["deletion", "reset", "shutdown"] {
        let control = Arc::new(FaultControl::default());
        let backend = Arc::new(FaultImage::new(memory_image(32768), control.clone()));
        let mut guest = Guest::ready(
            config(),
            vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }],
        );
        guest.create_pair(1, 8);
        let page = guest.pages(1);
        control.inject(Target::Any, 0, 1, Fault::Hold);
        guest.push(1, transfer(nvm::WRITE, 1, 0, 1, page));
        guest.ring(1);
        guest.run();
        match what {
            "deletion" => {
                guest.push(
                    0,
                    SubmissionEntry { opcode: admin::DELETE_SQ, cdw10: 1, ..SubmissionEntry::default() },
                );
                guest.ring(0);
            }
            "reset" => guest.write32(regs::CC, 0x0046_0000),
            _ => guest.write32(regs::CC, 0x0046_4001),
        }
        guest.run();
        assert!(guest.controller.pause(Instant::now()).is_err(), "{what}");
        control.release_held();
        guest.migrate(1);
        guest.run();
        let csts = guest.read32(regs::CSTS);
        match what {
            "deletion" => {
                assert_eq!((guest.reap(1).len(), guest.reap(0).len()), (1, 1));
                let delete =
                    SubmissionEntry { opcode: admin::DELETE_CQ, cdw10: 1, ..SubmissionEntry::default() };
                guest.admin(delete).unwrap();
            }
            "reset" => {
                assert_eq!(csts, 0);
                guest.enable();
            }
            _ => assert_eq!(csts, 1 | 2 << 2),
        }
    }
}

#[test]
fn features_and_counters_survive() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    let set = |id: u8, cdw11| SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: u32::from(id),
        cdw11,
        ..SubmissionEntry::default()
    };
    guest.admin(set(feature::VOLATILE_WRITE_CACHE, 0)).unwrap();
    guest.admin(set(feature::ASYNC_EVENT_CONFIGURATION, 0x102)).unwrap();
    guest.admin(set(feature::INTERRUPT_VECTOR_CONFIGURATION, 1 << 16 | 5)).unwrap();
    guest.admin(SubmissionEntry { nsid: 1, ..set(feature::ERROR_RECOVERY, 7) }).unwrap();
    guest.migrate(1);
    let get = |id: u8, cdw11| SubmissionEntry {
        opcode: admin::GET_FEATURES,
        cdw10: u32::from(id),
        cdw11,
        ..SubmissionEntry::default()
    };
    assert_eq!(guest.admin(get(feature::VOLATILE_WRITE_CACHE, 0)), Ok(0));
    assert_eq!(guest.admin(get(feature::ASYNC_EVENT_CONFIGURATION, 0)), Ok(0x102));
    assert_eq!(guest.admin(get(feature::INTERRUPT_VECTOR_CONFIGURATION, 5)), Ok(1 << 16 | 5));
    assert_eq!(guest.admin(get(feature::INTERRUPT_VECTOR_CONFIGURATION, 4)), Ok(4));
    assert_eq!(guest.admin(SubmissionEntry { nsid: 1, ..get(feature::ERROR_RECOVERY, 0) }), Ok(7));
    assert_eq!(guest.admin(get(0x7f, 0)), Err(Status::INVALID_FIELD));
}

#[test]
fn a_state_is_loaded_into_a_new_controller_only() {
    let guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.controller.pause(Instant::now()).unwrap();
    let state = guest.controller.save();
    assert!(matches!(guest.controller.load(&state), Err(Error::NotPristine)));
}
