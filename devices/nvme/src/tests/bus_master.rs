//! A controller that the guest does not let access memory stands still, and loses nothing.

use std::sync::Arc;
use std::time::Instant;

use block::{Fault, FaultControl, FaultImage, Target};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{SubmissionEntry, regs};

use super::driver::{Guest, MEMORY_BYTES, PATIENCE, memory_image, transfer};
use crate::{ControllerConfig, NamespaceConfig};

/// A guest with queue pairs 1 and 2 (one for each worker), with or without shadow doorbells, and its image's faults.
fn guest(shadow: bool) -> (Guest, Arc<FaultControl>) {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(32768), control.clone()));
    let namespaces = vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }];
    let mut guest = Guest::ready(ControllerConfig::new("MASTER"), namespaces);
    if shadow {
        guest.use_shadow_doorbells();
    }
    guest.create_pair(1, 8);
    guest.create_pair(2, 8);
    (guest, control)
}

fn get_features() -> SubmissionEntry {
    SubmissionEntry { opcode: admin::GET_FEATURES, cdw10: 1, ..SubmissionEntry::default() }
}

#[test]
fn commands_are_fetched_only_by_a_bus_master() {
    for shadow in [false, true] {
        let (mut guest, control) = guest(shadow);
        let page = guest.pages(1);
        guest.set_bus_master(false);
        for queue in [1, 2] {
            guest.push(queue, transfer(nvm::READ, 1, 0, 1, page));
            guest.ring(queue);
        }
        guest.push(0, get_features());
        guest.ring(0);
        // An event that could be reported, were there a request.
        guest.write32(regs::sq_tail_doorbell(9), 1);
        let before = guest.read_bytes(0, MEMORY_BYTES);
        guest.run();
        assert!(guest.read_bytes(0, MEMORY_BYTES) == before, "shadow {shadow}: guest memory was written");
        assert_eq!(control.seen(), 0);
        guest.set_bus_master(true);
        guest.run();
        assert_eq!([0, 1, 2].map(|queue| guest.reap(queue).len()), [1, 1, 1], "shadow {shadow}");
        for queue in [1, 2] {
            guest.io(queue, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
        }
    }
}

#[test]
fn a_controller_in_d3hot_stands_still_and_goes_on_in_d0() {
    for moves in [false, true] {
        let (mut guest, control) = guest(true);
        let page = guest.pages(1);
        control.inject(Target::Any, 0, 1, Fault::Hold);
        guest.push(1, transfer(nvm::WRITE, 1, 0, 1, page));
        guest.ring(1);
        guest.run();
        guest.interrupts.take(1);
        guest.set_power_state(3);
        guest.push(2, transfer(nvm::READ, 1, 0, 1, page));
        guest.ring(2);
        let before = guest.read_bytes(0, MEMORY_BYTES);
        control.release_held();
        guest.run_until("the write", |guest| guest.controller.statistics().in_flight == 0);
        guest.run();
        assert!(guest.read_bytes(0, MEMORY_BYTES) == before, "guest memory was written in D3hot");
        assert_eq!([1, 2].map(|vector| guest.interrupts.take(vector)), [0; 2]);
        if moves {
            guest.migrate(2);
            guest.run();
            assert!(guest.read_bytes(0, MEMORY_BYTES) == before, "guest memory was written in D3hot");
        }
        guest.set_power_state(0);
        guest.run();
        assert_eq!([1, 2].map(|queue| guest.reap(queue).len()), [1, 1], "migrated {moves}");
        assert_eq!([1, 2].map(|vector| guest.interrupts.take(vector) >= 1), [true; 2]);
    }
}

#[test]
fn completions_and_interrupts_wait_for_a_bus_master() {
    for (shadow, moves) in [(false, false), (true, false), (false, true), (true, true)] {
        let (mut guest, control) = guest(shadow);
        let page = guest.pages(1);
        control.inject(Target::Any, 0, 4, Fault::Hold);
        for queue in [1, 2] {
            guest.push(queue, transfer(nvm::WRITE, 1, 0, 1, page));
            guest.push(queue, transfer(nvm::WRITE, 1, 1, 1, page));
            guest.ring(queue);
        }
        guest.run();
        assert_eq!(control.held(), 4);
        // Its answer waits for commands in flight.
        guest.push(0, SubmissionEntry { opcode: admin::DELETE_SQ, cdw10: 2, ..SubmissionEntry::default() });
        guest.ring(0);
        guest.run();
        for vector in 0..3 {
            guest.interrupts.take(vector);
        }
        guest.set_bus_master(false);
        let before = guest.read_bytes(0, MEMORY_BYTES);
        control.release_held();
        guest.run_until("the writes", |guest| guest.controller.statistics().in_flight == 0);
        guest.run();
        assert!(guest.read_bytes(0, MEMORY_BYTES) == before, "shadow {shadow}: guest memory was written");
        assert_eq!([0, 1, 2].map(|vector| guest.interrupts.take(vector)), [0; 3]);
        if moves {
            guest.migrate(3);
            guest.run();
            assert_eq!([0, 1, 2].map(|vector| guest.interrupts.take(vector)), [0; 3]);
        }
        guest.set_bus_master(true);
        guest.run();
        // The completions of queue 2 went with it.
        let ended = [0, 1, 2].map(|queue| guest.reap(queue).len());
        assert_eq!(ended, [1, 2, 0], "shadow {shadow}, migrated {moves}");
        assert_eq!([0, 1].map(|vector| guest.interrupts.take(vector) >= 1), [true; 2]);
        guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    }
}

#[test]
fn what_is_no_bus_master_can_be_paused_reset_and_shut_down() {
    let (mut guest, control) = guest(true);
    let page = guest.pages(1);
    control.inject(Target::Any, 0, 1, Fault::Hold);
    guest.push(1, transfer(nvm::WRITE, 1, 0, 1, page));
    guest.ring(1);
    guest.run();
    guest.set_bus_master(false);
    assert!(guest.controller.pause(Instant::now()).is_err(), "it waits for the write");
    control.release_held();
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    assert_eq!(guest.controller.save().cq.get(1).unwrap().backlog.len(), 1);
    guest.controller.resume();
    guest.write32(regs::CC, 0x0046_4001);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 1 | 2 << 2);
    guest.write32(regs::CC, 0x0046_0000);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 0);
    guest.shadow = None;
    guest.enable();
    guest.create_pair(1, 8);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
}
