//! Reservations (Base 8.19) of hosts that share a subsystem.

mod model;
mod saved;

use std::sync::Arc;
use std::time::Instant;

use block::{Fault, FaultControl, FaultImage, Target};
use nvme_spec::event::Event;
use nvme_spec::identify::{IdentifyController, IdentifyNamespace, cns};
use nvme_spec::log::{ReservationNotificationLog, id as log_id};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::reservation::{
    self as spec, RegisteredController, RegisteredControllerExtended, ReportHeader,
};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, feature, regs};

use super::driver::{Guest, PATIENCE, memory_image, namespace, transfer};

use crate::{ControllerConfig, NamespaceConfig, NvmeState, Subsystem};

const KEYS: [u64; 3] = [0xa1, 0xb2, 0xc3];

fn config(id: u16) -> ControllerConfig {
    ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new(&format!("RESERVE{id}")) }
}

/// `count` controllers of one subsystem, each with an I/O queue pair, and hosts that have not said who they are.
fn hosts(namespaces: &[NamespaceConfig], count: u16) -> Vec<Guest> {
    let subsystem = Subsystem::new("RESERVE", namespaces, true).unwrap();
    (0..count).map(|id| host(&subsystem, id)).collect()
}

fn host(subsystem: &Arc<Subsystem>, id: u16) -> Guest {
    let mut guest = Guest::member(subsystem, id, config(id));
    guest.enable();
    guest.create_pair(1, 16);
    guest
}

/// Sets a Host Identifier of 64 or 128 bits.
fn name(guest: &mut Guest, identifier: &[u8]) -> Result<u32, Status> {
    let page = guest.pages(1);
    guest.write_bytes(page, identifier);
    guest.admin(SubmissionEntry {
        opcode: admin::SET_FEATURES,
        prp1: page,
        cdw10: u32::from(feature::HOST_IDENTIFIER),
        cdw11: u32::from(identifier.len() == 16),
        ..SubmissionEntry::default()
    })
}

fn command(guest: &mut Guest, opcode: u8, cdw10: u32, keys: [u64; 2]) -> SubmissionEntry {
    let page = guest.pages(1);
    guest.write_bytes(page, &keys.map(u64::to_le_bytes).concat());
    SubmissionEntry { opcode, nsid: 1, prp1: page, cdw10, ..SubmissionEntry::default() }
}

fn reserve(guest: &mut Guest, opcode: u8, cdw10: u32, keys: [u64; 2]) -> Result<(), Status> {
    let entry = command(guest, opcode, cdw10, keys);
    guest.io(1, entry)
}

fn register(guest: &mut Guest, key: u64) -> Result<(), Status> {
    reserve(guest, nvm::RESERVATION_REGISTER, spec::REGISTER, [0, key])
}

fn acquire(guest: &mut Guest, key: u64, kind: u32) -> Result<(), Status> {
    reserve(guest, nvm::RESERVATION_ACQUIRE, spec::ACQUIRE | kind << 8, [key, 0])
}

fn preempt(guest: &mut Guest, key: u64, victim: u64, kind: u32) -> Result<(), Status> {
    reserve(guest, nvm::RESERVATION_ACQUIRE, spec::PREEMPT | kind << 8, [key, victim])
}

fn release(guest: &mut Guest, key: u64, kind: u32) -> Result<(), Status> {
    reserve(guest, nvm::RESERVATION_RELEASE, spec::RELEASE | kind << 8, [key, 0])
}

/// The report: header, and controller, status and key of each entry.
fn report(guest: &mut Guest) -> (ReportHeader, Vec<(u16, u8, u64)>) {
    let page = guest.pages(1);
    let entry = SubmissionEntry {
        opcode: nvm::RESERVATION_REPORT,
        nsid: 1,
        prp1: page,
        cdw10: 1023,
        ..SubmissionEntry::default()
    };
    guest.io(1, entry).unwrap();
    let bytes = guest.read_bytes(page, 4096);
    let header = ReportHeader::from_bytes(bytes[..24].try_into().unwrap());
    let entries = bytes[24..].as_chunks::<24>().0.iter().take(header.registered_controllers.into());
    let entry = |bytes| {
        let RegisteredController { controller, status, key, .. } = RegisteredController::from_bytes(bytes);
        (controller, status, key)
    };
    (header, entries.map(entry).collect())
}

fn notification(guest: &mut Guest) -> ReservationNotificationLog {
    let entry = SubmissionEntry {
        opcode: admin::GET_LOG_PAGE,
        cdw10: u32::from(log_id::RESERVATION_NOTIFICATION) | 15 << 16,
        ..SubmissionEntry::default()
    };
    ReservationNotificationLog::from_bytes(&guest.admin_data::<64>(entry).unwrap())
}

fn mask(guest: &mut Guest, opcode: u8, nsid: u32, value: u32) -> Result<u32, Status> {
    let cdw10 = u32::from(feature::RESERVATION_NOTIFICATION_MASK);
    guest.admin(SubmissionEntry { opcode, nsid, cdw10, cdw11: value, ..SubmissionEntry::default() })
}

/// Pauses all controllers, and goes on in others of another subsystem that have loaded what these saved, in the order of `order`.
fn migrate(guests: &mut [Guest], namespaces: &[NamespaceConfig], order: &[usize]) {
    let states: Vec<NvmeState> = guests.iter().map(saved).collect();
    let subsystem = Subsystem::new("RESERVE", namespaces, true).unwrap();
    let successors: Vec<Guest> =
        guests.iter().zip(0..).map(|(guest, id)| guest.successor(&subsystem, id)).collect();
    for &index in order {
        successors[index].controller.load(&states[index]).unwrap();
    }
    for (successor, state) in successors.iter().zip(&states) {
        assert!(successor.controller.save() == *state, "what was restored saves the same");
    }
    for (guest, successor) in guests.iter_mut().zip(successors) {
        successor.controller.resume();
        guest.move_to(successor);
        guest.run();
    }
}

fn saved(guest: &Guest) -> NvmeState {
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    let bytes = vmstate::to_bytes(&state);
    assert_eq!(vmstate::from_bytes::<NvmeState>(&bytes, 1).unwrap(), state);
    state
}

#[test]
fn reservations_are_claimed_where_they_are_served() {
    let mut guests = hosts(&[namespace(1, 64)], 1);
    let guest = &mut guests[0];
    let controller = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
    assert_eq!(controller.oncs >> 5 & 1, 1);
    let namespace = IdentifyNamespace::from_bytes(&guest.identify(cns::NAMESPACE, 1).unwrap());
    assert_eq!(namespace.rescap, 0xfe, "all six types, and no persistence without a place for it");
    assert_eq!(guest.identify(cns::INDEPENDENT_NAMESPACE, 1).unwrap()[2], 0xfe);
}

#[test]
fn keys_are_registered_replaced_and_unregistered() {
    let mut guests = hosts(&[namespace(1, 64)], 2);
    let [a, b] = &mut guests[..] else { unreachable!() };
    let replace = |guest: &mut Guest, ignore, current, key| {
        reserve(guest, nvm::RESERVATION_REGISTER, spec::REPLACE | ignore, [current, key])
    };
    let unregister = |guest: &mut Guest, ignore, key| {
        reserve(guest, nvm::RESERVATION_REGISTER, spec::UNREGISTER | ignore, [key, 0])
    };
    assert_eq!(unregister(a, 0, 0), Err(Status::RESERVATION_CONFLICT), "nobody is registered");
    assert_eq!(replace(a, 0, 0, 1), Err(Status::RESERVATION_CONFLICT));
    register(a, KEYS[0]).unwrap();
    register(a, KEYS[0]).unwrap();
    assert_eq!(register(a, KEYS[1]), Err(Status::RESERVATION_CONFLICT), "another key");
    assert_eq!(replace(a, 0, KEYS[2], 1), Err(Status::RESERVATION_CONFLICT), "not the key that it has");
    replace(a, 0, KEYS[0], KEYS[2]).unwrap();
    let ignore = spec::IGNORE_EXISTING_KEY;
    replace(b, ignore, 77, KEYS[1]).unwrap();
    let (header, entries) = report(b);
    assert_eq!((header.generation, header.kind, header.persists), (4, 0, 0));
    assert_eq!(entries, [(0, 0, KEYS[2]), (1, 0, KEYS[1])]);
    assert_eq!(unregister(a, 0, KEYS[0]), Err(Status::RESERVATION_CONFLICT));
    unregister(a, ignore, KEYS[0]).unwrap();
    unregister(b, 0, KEYS[1]).unwrap();
    assert_eq!(report(a).0.generation, 6);
    assert_eq!(report(a).1, []);
    for cdw10 in [3, 7, 1 << 30, 3 << 30] {
        let refused = reserve(a, nvm::RESERVATION_REGISTER, cdw10, [0, 5]);
        assert_eq!(refused, Err(Status::INVALID_FIELD), "{cdw10:#x}: no such action, or nothing can persist");
    }
    reserve(a, nvm::RESERVATION_REGISTER, 2 << 30, [0, 5]).unwrap();
}

#[test]
fn a_reservation_is_acquired_by_registrants_and_released_by_its_holder() {
    let mut guests = hosts(&[namespace(1, 64)], 2);
    let [a, b] = &mut guests[..] else { unreachable!() };
    assert_eq!(acquire(a, 0, 1), Err(Status::RESERVATION_CONFLICT), "not a registrant");
    register(a, KEYS[0]).unwrap();
    register(b, KEYS[1]).unwrap();
    assert_eq!(acquire(a, KEYS[1], 1), Err(Status::RESERVATION_CONFLICT), "not its key");
    for kind in [0, 7, 0xff] {
        assert_eq!(acquire(a, KEYS[0], kind), Err(Status::INVALID_FIELD), "type {kind}");
    }
    acquire(a, KEYS[0], 2).unwrap();
    acquire(a, KEYS[0], 2).unwrap();
    assert_eq!(acquire(a, KEYS[0], 1), Err(Status::RESERVATION_CONFLICT), "another type");
    assert_eq!(acquire(b, KEYS[1], 2), Err(Status::RESERVATION_CONFLICT), "another holder");
    assert_eq!(report(b).1, [(0, 1, KEYS[0]), (1, 0, KEYS[1])]);
    release(b, KEYS[1], 2).unwrap();
    assert_eq!(report(b).0.kind, 2, "who holds nothing releases nothing");
    assert_eq!(release(a, KEYS[0], 1), Err(Status::INVALID_FIELD), "not the type that is held");
    let ignore = spec::IGNORE_EXISTING_KEY;
    for opcode in [nvm::RESERVATION_ACQUIRE, nvm::RESERVATION_RELEASE] {
        assert_eq!(reserve(a, opcode, ignore | 2 << 8, [KEYS[0], 0]), Err(Status::INVALID_FIELD));
    }
    release(a, KEYS[0], 2).unwrap();
    assert_eq!(report(b).0.kind, 0);
    // Of the types that all registrants hold every one of them is a holder, until the last is gone.
    acquire(b, KEYS[1], 6).unwrap();
    acquire(a, KEYS[0], 6).unwrap();
    assert_eq!(report(b).1, [(0, 1, KEYS[0]), (1, 1, KEYS[1])]);
    reserve(b, nvm::RESERVATION_REGISTER, spec::UNREGISTER, [KEYS[1], 0]).unwrap();
    assert_eq!((report(a).0.kind, report(a).1), (6, vec![(0, 1, KEYS[0])]));
    reserve(a, nvm::RESERVATION_REGISTER, spec::UNREGISTER, [KEYS[0], 0]).unwrap();
    assert_eq!((report(a).0.kind, report(a).1), (0, vec![]));
}

#[test]
fn a_reservation_keeps_every_command_away_that_its_type_says() {
    // Non-registrant reads, writes; registrant reads, writes: which of them conflict (Base 8.19, the figure of commands).
    let table = [
        (1, [false, true, false, true]),
        (2, [true, true, true, true]),
        (3, [false, true, false, false]),
        (4, [true, true, false, false]),
        (5, [false, true, false, false]),
        (6, [true, true, false, false]),
    ];
    let reads = [nvm::READ, nvm::COMPARE, nvm::VERIFY];
    let writes = [
        nvm::WRITE,
        nvm::WRITE_ZEROES,
        nvm::WRITE_UNCORRECTABLE,
        nvm::DATASET_MANAGEMENT,
        nvm::FLUSH,
        nvm::COPY,
    ];
    for (kind, [other_reads, other_writes, registrant_reads, registrant_writes]) in table {
        let mut guests = hosts(&[namespace(1, 64), namespace(2, 64)], 3);
        for (guest, key) in guests.iter_mut().zip(KEYS).take(2) {
            register(guest, key).unwrap();
        }
        acquire(&mut guests[0], KEYS[0], kind).unwrap();
        let expected = [(false, false), (registrant_reads, registrant_writes), (other_reads, other_writes)];
        for (guest, (reading, writing)) in guests.iter_mut().zip(expected) {
            let page = guest.pages(1);
            for (opcodes, conflict) in [(&reads[..], reading), (&writes[..], writing)] {
                for &opcode in opcodes {
                    for nsid in [1, 2] {
                        let entry = transfer(opcode, nsid, 0, 1, page);
                        let outcome = guest.io(1, entry);
                        let conflicts = outcome == Err(Status::RESERVATION_CONFLICT);
                        let says = format!("type {kind}, opcode {opcode:#x}, namespace {nsid}: {outcome:?}");
                        assert_eq!(conflicts, conflict && nsid == 1, "{says}");
                    }
                }
            }
            let all = guest.io(1, transfer(nvm::FLUSH, NSID_BROADCAST, 0, 1, page));
            assert_eq!(all.is_err(), writing, "type {kind}: a flush of all");
            reserve(guest, nvm::RESERVATION_REPORT, 5, [0, 0]).unwrap();
        }
    }
}

#[test]
fn of_a_fused_pair_the_half_that_conflicts_is_named() {
    let expected = [
        (1, [Status::ABORTED_FAILED_FUSED, Status::RESERVATION_CONFLICT]),
        (2, [Status::RESERVATION_CONFLICT, Status::ABORTED_FAILED_FUSED]),
    ];
    for (kind, expected) in expected {
        let mut guests = hosts(&[namespace(1, 64)], 2);
        let [a, b] = &mut guests[..] else { unreachable!() };
        register(a, KEYS[0]).unwrap();
        acquire(a, KEYS[0], kind).unwrap();
        let page = b.pages(1);
        for (opcode, flags) in [(nvm::COMPARE, 1), (nvm::WRITE, 2)] {
            b.push(1, SubmissionEntry { flags, ..transfer(opcode, 1, 0, 1, page) });
        }
        b.ring(1);
        b.run();
        let ended: Vec<Status> = b.reap(1).iter().map(|entry| entry.status().code()).collect();
        assert_eq!(ended, expected, "type {kind}");
    }
}

#[test]
fn preemption_takes_registrations_and_reservations() {
    let mut guests = hosts(&[namespace(1, 64)], 3);
    for (guest, key) in guests.iter_mut().zip(KEYS) {
        register(guest, key).unwrap();
    }
    let [a, b, c] = &mut guests[..] else { unreachable!() };
    acquire(a, KEYS[0], 1).unwrap();
    assert_eq!(preempt(b, KEYS[1], 0x77, 2), Err(Status::RESERVATION_CONFLICT), "nobody has that key");
    assert_eq!(preempt(b, KEYS[1], 0, 2), Err(Status::INVALID_FIELD), "not held by all registrants");
    assert_eq!(preempt(b, 0x77, KEYS[0], 2), Err(Status::RESERVATION_CONFLICT), "not its key");
    // Of another registrant only the registration goes.
    preempt(b, KEYS[1], KEYS[2], 2).unwrap();
    assert_eq!((report(c).0.kind, report(c).1), (1, vec![(0, 1, KEYS[0]), (1, 0, KEYS[1])]));
    assert_eq!(notification(c).kind, 1);
    assert_eq!(preempt(c, KEYS[2], KEYS[0], 2), Err(Status::RESERVATION_CONFLICT), "not registered any more");
    // Of the holder the reservation comes along.
    preempt(b, KEYS[1], KEYS[0], 4).unwrap();
    assert_eq!((report(c).0.kind, report(c).1), (4, vec![(1, 1, KEYS[1])]));
    assert_eq!(report(c).0.generation, 5);
    assert_eq!(notification(a).kind, 1);
    // A holder may preempt itself, to change the type.
    preempt(b, KEYS[1], KEYS[1], 6).unwrap();
    assert_eq!((report(c).0.kind, report(c).1), (6, vec![(1, 1, KEYS[1])]));
    // Of a reservation of all registrants a key of 0 means all the others.
    register(a, KEYS[0]).unwrap();
    register(c, KEYS[2]).unwrap();
    preempt(c, KEYS[2], KEYS[0], 1).unwrap();
    assert_eq!((report(c).0.kind, report(c).1), (6, vec![(1, 1, KEYS[1]), (2, 1, KEYS[2])]));
    preempt(c, KEYS[2], 0, 3).unwrap();
    assert_eq!((report(a).0.kind, report(a).1), (3, vec![(2, 1, KEYS[2])]));
}

#[test]
fn preempt_and_abort_completes_when_nothing_of_the_preempted_is_in_flight() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(32768), control.clone()));
    let mut guests = hosts(&[NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }], 2);
    let [a, b] = &mut guests[..] else { unreachable!() };
    register(a, KEYS[0]).unwrap();
    register(b, KEYS[1]).unwrap();
    acquire(a, KEYS[0], 2).unwrap();
    control.inject(Target::Write, 0, 1, Fault::Hold);
    let page = a.pages(1);
    a.push(1, transfer(nvm::WRITE, 1, 0, 1, page));
    a.ring(1);
    a.run();
    assert_eq!(control.held(), 1);
    let abort = spec::PREEMPT_AND_ABORT | 1 << 8;
    let entry = command(b, nvm::RESERVATION_ACQUIRE, abort, [KEYS[1], KEYS[0]]);
    b.push(1, entry);
    b.ring(1);
    for _ in 0..2 {
        b.run();
        a.run();
    }
    assert!(b.reap(1).is_empty(), "the write of the preempted host is under way");
    // It is preempted all the same.
    a.push(1, transfer(nvm::WRITE, 1, 0, 1, page));
    a.ring(1);
    a.run();
    let refused = a.reap(1);
    assert_eq!(refused[0].status().code(), Status::RESERVATION_CONFLICT);
    control.release_held();
    let mut written = Vec::new();
    a.run_until("the end of the write", |guest| {
        written.extend(guest.reap(1));
        !written.is_empty()
    });
    assert!(written[0].status().is_success(), "{written:?}");
    b.run();
    let done = b.reap(1);
    assert!(done.len() == 1 && done[0].status().is_success(), "{done:?}");
    // With nothing in flight it completes at once.
    register(a, KEYS[0]).unwrap();
    let entry = command(b, nvm::RESERVATION_ACQUIRE, abort, [KEYS[1], KEYS[0]]);
    b.push(1, entry);
    b.ring(1);
    b.run();
    a.run();
    b.run();
    assert!(b.reap(1)[0].status().is_success());
}

#[test]
fn a_preempt_and_abort_does_not_outlive_who_is_waited_for() {
    let mut guests = hosts(&[namespace(1, 64)], 2);
    for (guest, key) in guests.iter_mut().zip(KEYS) {
        register(guest, key).unwrap();
    }
    let mut b = guests.pop().unwrap();
    let entry =
        command(&mut b, nvm::RESERVATION_ACQUIRE, spec::PREEMPT_AND_ABORT | 1 << 8, [KEYS[1], KEYS[0]]);
    b.push(1, entry);
    b.ring(1);
    b.run();
    assert!(b.reap(1).is_empty(), "the other controller has not looked yet");
    drop(guests);
    b.run();
    assert!(b.reap(1)[0].status().is_success());
}

#[test]
fn notifications_are_told_and_read_one_by_one_unless_they_are_masked() {
    let mut guests = hosts(&[namespace(1, 64)], 2);
    let [a, b] = &mut guests[..] else { unreachable!() };
    register(a, KEYS[0]).unwrap();
    register(b, KEYS[1]).unwrap();
    assert_eq!(notification(b), ReservationNotificationLog::default(), "an empty log");
    b.push(0, SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() });
    b.ring(0);
    b.run();
    for _ in 0..2 {
        acquire(a, KEYS[0], 3).unwrap();
        release(a, KEYS[0], 3).unwrap();
    }
    b.run();
    let event = b.reap(0);
    assert_eq!(event[0].dw0, Event::RESERVATION_LOG_AVAILABLE.to_dword());
    let page = |count, kind, available| ReservationNotificationLog {
        log_page_count: count,
        kind,
        available,
        nsid: 1,
    };
    assert_eq!(notification(b), page(1, 2, 1));
    // There is another page: another event.
    b.push(0, SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() });
    b.ring(0);
    b.run();
    assert_eq!(b.reap(0)[0].dw0, Event::RESERVATION_LOG_AVAILABLE.to_dword());
    assert_eq!(notification(b), page(2, 2, 0));
    assert_eq!(notification(b).log_page_count, 0);
    assert_eq!(notification(a).log_page_count, 0, "who released it knows");
    // Masked ones are not even counted.
    assert_eq!(mask(b, admin::SET_FEATURES, NSID_BROADCAST, 0xffff_ffff), Ok(0));
    assert_eq!(mask(b, admin::GET_FEATURES, 1, 0), Ok(0b1110));
    acquire(a, KEYS[0], 3).unwrap();
    release(a, KEYS[0], 3).unwrap();
    assert_eq!(mask(b, admin::SET_FEATURES, 1, 0b1010), Ok(0));
    assert_eq!(notification(b).log_page_count, 0);
    // The mask has the bit of reservations that are preempted, which a clear does.
    reserve(a, nvm::RESERVATION_RELEASE, spec::CLEAR, [KEYS[0], 0]).unwrap();
    assert_eq!(notification(b).log_page_count, 0);
    assert_eq!(mask(b, admin::SET_FEATURES, 1, 0), Ok(0));
    register(a, KEYS[0]).unwrap();
    register(b, KEYS[1]).unwrap();
    reserve(a, nvm::RESERVATION_RELEASE, spec::CLEAR, [KEYS[0], 0]).unwrap();
    assert_eq!(notification(b), page(3, 3, 0));
    for nsid in [2, 0] {
        assert!(mask(b, admin::SET_FEATURES, nsid, 2).is_err());
        assert!(mask(b, admin::GET_FEATURES, nsid, 2).is_err());
    }
    assert!(mask(b, admin::GET_FEATURES, NSID_BROADCAST, 2).is_err());
}

#[test]
fn more_notifications_than_are_kept_push_out_the_oldest() {
    let mut guests = hosts(&[namespace(1, 64)], 2);
    let [a, b] = &mut guests[..] else { unreachable!() };
    register(a, KEYS[0]).unwrap();
    register(b, KEYS[1]).unwrap();
    let page = a.pages(1);
    a.write_bytes(page, &KEYS[0].to_le_bytes());
    for _ in 0..70 {
        for (opcode, cdw10) in [(nvm::RESERVATION_ACQUIRE, 3 << 8), (nvm::RESERVATION_RELEASE, 3 << 8)] {
            let entry = SubmissionEntry { opcode, nsid: 1, prp1: page, cdw10, ..SubmissionEntry::default() };
            a.io(1, entry).unwrap();
        }
    }
    let first = notification(b);
    assert_eq!((first.log_page_count, first.available), (7, 63));
}

#[test]
fn a_named_host_is_the_same_on_all_its_controllers_and_after_a_reset() {
    let mut guests = hosts(&[namespace(1, 64)], 3);
    for guest in &mut guests[..2] {
        name(guest, b"the host").unwrap();
    }
    let [a, b, c] = &mut guests[..] else { unreachable!() };
    register(a, KEYS[0]).unwrap();
    register(b, KEYS[0]).unwrap();
    acquire(b, KEYS[0], 2).unwrap();
    assert_eq!(report(c).1, [(0, 1, KEYS[0]), (1, 1, KEYS[0])]);
    let page = c.pages(1);
    assert_eq!(c.io(1, transfer(nvm::READ, 1, 0, 1, page)), Err(Status::RESERVATION_CONFLICT));
    assert_eq!(name(a, b"somebody"), Err(Status::COMMAND_SEQUENCE_ERROR), "it is registered as it is");
    assert_eq!(name(a, &[0; 8]), Err(Status::COMMAND_SEQUENCE_ERROR));
    name(a, b"the host").unwrap();
    assert_eq!(name(c, b"sixteen letters."), Err(Status::HOST_IDENTIFIER_INCONSISTENT));
    // A reset takes the name, not the registration.
    a.write32(regs::CC, 0);
    a.run();
    a.enable();
    a.create_pair(1, 16);
    let page = a.pages(1);
    assert_eq!(a.io(1, transfer(nvm::READ, 1, 0, 1, page)), Err(Status::RESERVATION_CONFLICT));
    assert_eq!(report(c).1, [(1, 1, KEYS[0])]);
    name(a, b"the host").unwrap();
    a.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    drop(guests.drain(..2));
    assert_eq!(report(&mut guests[0]).1, [(0xffff, 1, KEYS[0])], "no controller is of that host now");
}

#[test]
fn a_host_without_a_name_is_another_after_a_reset() {
    let mut guests = hosts(&[namespace(1, 64)], 2);
    let [a, b] = &mut guests[..] else { unreachable!() };
    register(a, KEYS[0]).unwrap();
    register(b, KEYS[1]).unwrap();
    acquire(a, KEYS[0], 3).unwrap();
    a.write32(regs::CC, 0);
    a.run();
    assert_eq!((report(b).0.kind, report(b).1), (0, vec![(1, 0, KEYS[1])]));
    assert_eq!(notification(b).kind, 2, "its reservation was released");
    a.enable();
    a.create_pair(1, 16);
    assert_eq!(acquire(a, KEYS[0], 3), Err(Status::RESERVATION_CONFLICT));
}

#[test]
fn hosts_of_128_bits_are_reported_in_the_extended_structure() {
    let mut guests = hosts(&[namespace(1, 64)], 2);
    let identifier = *b"a host by itself";
    name(&mut guests[0], &identifier).unwrap();
    register(&mut guests[0], KEYS[0]).unwrap();
    acquire(&mut guests[0], KEYS[0], 1).unwrap();
    let page = guests[0].pages(1);
    let short = SubmissionEntry {
        opcode: nvm::RESERVATION_REPORT,
        nsid: 1,
        prp1: page,
        cdw10: 31,
        ..SubmissionEntry::default()
    };
    assert_eq!(guests[0].io(1, short), Err(Status::HOST_IDENTIFIER_INCONSISTENT));
    let extended = SubmissionEntry { cdw11: spec::EXTENDED_DATA_STRUCTURE, ..short };
    guests[0].io(1, extended).unwrap();
    let bytes = guests[0].read_bytes(page, 128);
    let header = ReportHeader::from_bytes(bytes[..24].try_into().unwrap());
    assert_eq!((header.registered_controllers, header.kind), (1, 1));
    let entry = RegisteredControllerExtended::from_bytes(bytes[64..].try_into().unwrap());
    assert_eq!((entry.controller, entry.status, entry.key, entry.host), (0, 1, KEYS[0], identifier));
    // Who asks for less gets less, and nothing beyond.
    guests[0].write_bytes(page, &[0xee; 128]);
    guests[0].io(1, SubmissionEntry { cdw10: 3, ..extended }).unwrap();
    let bytes = guests[0].read_bytes(page, 128);
    assert_eq!((bytes[4], bytes[16]), (1, 0xee));
    let long = SubmissionEntry { cdw10: u32::MAX, ..extended };
    assert_eq!(guests[0].io(1, long), Err(Status::INVALID_FIELD));
}

#[test]
fn only_so_many_hosts_are_registered_with_a_namespace() {
    let mut guests = hosts(&[namespace(1, 64)], 1);
    let guest = &mut guests[0];
    for number in 1..=65u64 {
        name(guest, &number.to_le_bytes()).unwrap();
        let outcome = register(guest, number);
        assert_eq!(outcome, if number <= 64 { Ok(()) } else { Err(Status::INTERNAL_ERROR) }, "{number}");
        guest.write32(regs::CC, 0);
        guest.run();
        guest.enable();
        guest.create_pair(1, 16);
    }
}
