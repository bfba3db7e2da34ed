//! What the SMART log says of how a controller lost its power.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_spec::log::SmartLog;
use nvme_spec::opcode::admin;
use nvme_spec::{SubmissionEntry, feature, regs};

use super::driver::{Guest, namespace};
use super::store::{Memory, managed, migrate_managed};
use crate::ControllerConfig;

fn power_on(store: &Arc<Memory>) -> Guest {
    managed(&ControllerConfig::new("SHUTDOWNS"), &[namespace(1, 8)], store)
}

/// Power cycles, and losses of power without a shutdown before.
fn counted(guest: &mut Guest) -> (u128, u128) {
    let entry =
        SubmissionEntry { opcode: admin::GET_LOG_PAGE, cdw10: 2 | 127 << 16, ..SubmissionEntry::default() };
    let log = SmartLog::from_bytes(&guest.admin_data(entry).unwrap());
    (log.power_cycles, log.unsafe_shutdowns)
}

fn shut_down(guest: &Guest) {
    guest.write32(regs::CC, 0x0046_0001 | regs::SHN_NORMAL << 14);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS) >> 2 & 3, regs::SHST_COMPLETE);
}

/// What has the store written.
fn save_threshold() -> SubmissionEntry {
    SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: u32::from(feature::TEMPERATURE_THRESHOLD) | feature::SAVE,
        cdw11: 350,
        ..SubmissionEntry::default()
    }
}

#[test]
fn a_loss_of_power_without_a_shutdown_is_unsafe() {
    let store = Memory::new(1 << 20);
    let mut guest = power_on(&store);
    assert_eq!(counted(&mut guest), (1, 0));
    drop(guest);
    let mut guest = power_on(&store);
    assert_eq!(counted(&mut guest), (2, 1));
    shut_down(&guest);
    drop(guest);
    let mut guest = power_on(&store);
    assert_eq!(counted(&mut guest), (3, 1), "the host had shut it down");
    // A reset is no shutdown, and enabling after a shutdown needs another one.
    shut_down(&guest);
    guest.write32(regs::CC, 0);
    guest.run();
    guest.enable();
    guest.write32(regs::CC, 0);
    guest.run();
    drop(guest);
    let mut guest = power_on(&store);
    assert_eq!(counted(&mut guest), (4, 2));
    // It moves along, and where it has gone to it has to be shut down too.
    migrate_managed(&mut guest, &store).unwrap();
    guest.controller.persist().unwrap();
    assert_eq!(counted(&mut guest), (4, 2));
    drop(guest);
    assert_eq!(counted(&mut power_on(&store)), (5, 3));
}

#[test]
fn where_a_guest_has_arrived_a_write_of_something_else_counts_no_loss_of_power() {
    let store = Memory::new(1 << 20);
    let mut guest = power_on(&store);
    migrate_managed(&mut guest, &store).unwrap();
    // What the folder said last was that the source's controller runs.
    guest.admin(save_threshold()).unwrap();
    drop(guest);
    assert_eq!(counted(&mut power_on(&store)), (2, 1));
}

#[test]
fn a_shutdown_is_no_loss_of_power_from_the_moment_that_it_is_complete() {
    let store = Memory::new(1 << 20);
    let guest = power_on(&store);
    shut_down(&guest);
    let at_once = store.state();
    drop(guest);
    // The power goes before anything else is written.
    store.put(at_once);
    assert_eq!(counted(&mut power_on(&store)), (2, 0));
}

#[test]
fn that_a_controller_runs_is_written_with_the_first_write_that_succeeds() {
    let store = Memory::new(1 << 20);
    store.breaks.store(true, Ordering::SeqCst);
    let mut guest = power_on(&store);
    assert_eq!(store.state(), None);
    store.breaks.store(false, Ordering::SeqCst);
    guest.admin(save_threshold()).unwrap();
    drop(guest);
    assert_eq!(counted(&mut power_on(&store)), (2, 1));
}
