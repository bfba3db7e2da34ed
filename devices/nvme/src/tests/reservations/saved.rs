//! Reservations that move with their controllers, outlive the power, or go with their namespaces.

use super::super::store::Memory;
use super::*;
use crate::{Controller, Progress};

#[test]
fn reservations_move_with_their_controllers_in_any_order() {
    let namespaces = [namespace(1, 64), namespace(9, 64)];
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let mut guests = hosts(&namespaces, 3);
        name(&mut guests[0], b"sixteen letters.").unwrap();
        name(&mut guests[1], &[7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        for (guest, key) in guests.iter_mut().zip(KEYS) {
            register(guest, key).unwrap();
        }
        acquire(&mut guests[0], KEYS[0], 3).unwrap();
        mask(&mut guests[1], admin::SET_FEATURES, 9, 0b0100).unwrap();
        migrate(&mut guests, &namespaces, &order);
        let page = guests[0].pages(1);
        let mut late = host(guests[0].controller.subsystem(), 3);
        assert_eq!(late.io(1, transfer(nvm::WRITE, 1, 0, 1, page)), Err(Status::RESERVATION_CONFLICT));
        for guest in &mut guests {
            guest.io(1, transfer(nvm::WRITE, 1, 0, 1, page)).unwrap();
        }
        assert_eq!(mask(&mut guests[1], admin::GET_FEATURES, 9, 0), Ok(0b0100));
        release(&mut guests[0], KEYS[0], 3).unwrap();
        // Told before the stop, read after it.
        migrate(&mut guests, &namespaces, &order);
        assert_eq!(notification(&mut guests[1]).kind, 2);
        assert_eq!(notification(&mut guests[2]).kind, 2);
    }
}

fn persistence(guest: &mut Guest, opcode: u8, value: u32) -> Result<u32, Status> {
    let cdw10 = u32::from(feature::RESERVATION_PERSISTENCE);
    guest.admin(SubmissionEntry { opcode, nsid: 1, cdw10, cdw11: value, ..SubmissionEntry::default() })
}

#[test]
fn what_is_to_persist_survives_the_loss_of_power() {
    let store = Memory::new(0);
    let namespaces = [namespace(1, 64)];
    let power_on = || {
        let kept = store.state();
        let subsystem =
            Subsystem::with_store("RESERVE", &namespaces, true, store.clone() as _, kept).unwrap();
        [host(&subsystem, 0), host(&subsystem, 1)]
    };
    let mut guests = power_on();
    let page = IdentifyNamespace::from_bytes(&guests[0].identify(cns::NAMESPACE, 1).unwrap());
    assert_eq!(page.rescap, 0xff);
    name(&mut guests[0], b"the host").unwrap();
    register(&mut guests[1], KEYS[1]).unwrap();
    assert_eq!(store.state().unwrap().reservations, None, "nobody has asked for it");
    reserve(&mut guests[0], nvm::RESERVATION_REGISTER, spec::PERSISTENCE_ON << 30, [0, KEYS[0]]).unwrap();
    acquire(&mut guests[0], KEYS[0], 3).unwrap();
    assert_eq!(persistence(&mut guests[1], admin::GET_FEATURES, 0), Ok(1));
    let mut after = power_on();
    drop(guests);
    let [a, b] = &mut after;
    name(a, b"the host").unwrap();
    assert_eq!(report(a).1, [(0, 1, KEYS[0])], "a host without a name is gone with the power");
    assert_eq!((report(a).0.kind, report(a).0.persists), (3, 1));
    let page = b.pages(1);
    a.io(1, transfer(nvm::WRITE, 1, 0, 1, page)).unwrap();
    assert_eq!(b.io(1, transfer(nvm::WRITE, 1, 0, 1, page)), Err(Status::RESERVATION_CONFLICT));
    // What cannot be kept is no success.
    store.breaks.store(true, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(release(a, KEYS[0], 3), Err(Status::INTERNAL_ERROR));
    store.breaks.store(false, std::sync::atomic::Ordering::SeqCst);
    acquire(a, KEYS[0], 1).unwrap();
    persistence(b, admin::SET_FEATURES, 0).unwrap();
    assert_eq!(store.state().unwrap().reservations, None);
    let mut after = power_on();
    assert_eq!((report(&mut after[1]).0, report(&mut after[1]).1), (ReportHeader::default(), vec![]));
}

#[test]
fn a_namespace_takes_its_reservation_along() {
    let mut guests = hosts(&[namespace(1, 64)], 2);
    register(&mut guests[0], KEYS[0]).unwrap();
    acquire(&mut guests[0], KEYS[0], 2).unwrap();
    mask(&mut guests[1], admin::SET_FEATURES, 1, 2).unwrap();
    let subsystem = Arc::clone(guests[0].controller.subsystem());
    subsystem.remove(1, std::time::Duration::ZERO).unwrap();
    guests.iter().for_each(Guest::run);
    subsystem.add(&namespace(1, 64)).unwrap();
    guests.iter().for_each(Guest::run);
    let page = guests[1].pages(1);
    guests[1].io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    assert_eq!(report(&mut guests[1]).0, ReportHeader::default());
    assert_eq!(mask(&mut guests[1], admin::GET_FEATURES, 1, 0), Ok(0));
}

#[test]
fn a_reservation_that_is_made_while_its_namespace_goes_goes_with_it() {
    let mut guests = hosts(&[namespace(1, 64)], 2);
    let subsystem = Arc::clone(guests[0].controller.subsystem());
    let late = &mut guests[1];
    // Of a worker that does not serve the admin queue as well: it hears of the removal from the one that does.
    let doorbells = |guest: &Guest, queue| guest.controller.pool.shared.doorbells.sq_worker(queue);
    late.create_pair(2, 8);
    let queue = [1, 2].into_iter().find(|&queue| doorbells(late, queue) == Some(1)).unwrap();
    assert!(!subsystem.remove(1, std::time::Duration::ZERO).unwrap(), "nobody has heard of it");
    let registration = command(late, nvm::RESERVATION_REGISTER, spec::REGISTER, [0, KEYS[1]]);
    late.push(queue, registration);
    late.ring(queue);
    while late.controller.process(1) == Progress::More {}
    let registered = late.reap(queue);
    assert!(registered.len() == 1 && registered[0].status().is_success(), "{registered:?}");
    guests.iter().for_each(Guest::run);
    subsystem.add(&namespace(1, 64)).unwrap();
    guests.iter().for_each(Guest::run);
    assert_eq!(report(&mut guests[0]), (ReportHeader::default(), vec![]));
}

/// A change of a saved state, and the field that refuses it.
type Damage = (&'static str, fn(&mut NvmeState));

#[test]
fn reservations_that_cannot_be_are_refused_in_a_saved_state() {
    let namespaces = [namespace(1, 64)];
    let mut guests = hosts(&namespaces, 2);
    name(&mut guests[0], b"the host").unwrap();
    for (guest, key) in guests.iter_mut().zip(KEYS) {
        register(guest, key).unwrap();
    }
    acquire(&mut guests[0], KEYS[0], 3).unwrap();
    release(&mut guests[0], KEYS[0], 3).unwrap();
    acquire(&mut guests[0], KEYS[0], 4).unwrap();
    mask(&mut guests[1], admin::SET_FEATURES, 1, 2).unwrap();
    let states: Vec<NvmeState> = guests.iter().map(saved).collect();
    fn one(state: &mut NvmeState) -> &mut crate::ReservationState {
        &mut state.reservations.as_mut().unwrap().namespaces[0]
    }
    fn notices(state: &mut NvmeState) -> &mut crate::ReservationNoticesState {
        state.reservation_notices.as_mut().unwrap()
    }
    let damages: [Damage; 18] = [
        ("namespaces[0].nsid", |state| one(state).nsid = 0),
        ("namespaces[0].nsid", |state| one(state).nsid = 1025),
        ("namespaces[0].kind", |state| one(state).kind = 7),
        ("namespaces[0].holder", |state| one(state).holder = 2),
        ("namespaces[0].holder", |state| one(state).kind = 0),
        ("registrants.form", |state| one(state).registrants[1].form = 3),
        ("registrants.host", |state| one(state).registrants[1].host[8] = 1),
        ("registrants.host", |state| one(state).registrants[1].host = [0; 16]),
        ("registrants.host", |state| one(state).registrants[0].form = 2),
        ("registrants.host", |state| one(state).registrants.reverse()),
        ("notices.kind", |state| notices(state).notices[0].kind = 4),
        ("notices.count", |state| notices(state).notices[0].count = 2),
        ("notices.nsid", |state| notices(state).notices[0].nsid = 0),
        ("masks.nsid", |state| notices(state).masks[0].nsid = 2000),
        ("masks.mask", |state| notices(state).masks[0].mask = 1),
        ("extended_host_identifier", |state| notices(state).extended_host_identifier = true),
        ("features.host_identifier", |state| state.features.host_identifier[0] = 1),
        ("reservation_notices.untold", |state| {
            notices(state).notices.clear();
            notices(state).untold = true;
        }),
    ];
    for (field, damage) in damages {
        let mut state = states[1].clone();
        damage(&mut state);
        let subsystem = Subsystem::new("RESERVE", &namespaces, true).unwrap();
        let error = guests[1].successor(&subsystem, 1).controller.load(&state).unwrap_err().to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
    // Two controllers that remember different reservations.
    let changes: [fn(&mut NvmeState); 2] =
        [|state| one(state).generation += 1, |state| state.reservations = None];
    for change in changes {
        for (first, second) in [(0, 1), (1, 0)] {
            let subsystem = Subsystem::new("RESERVE", &namespaces, true).unwrap();
            let mut other = states[second].clone();
            change(&mut other);
            let load = |index: usize, state| -> (Guest, Result<(), crate::Error>) {
                let guest = guests[index].successor(&subsystem, index as u16);
                let controller: &Controller = &guest.controller;
                let loaded = controller.load(state);
                (guest, loaded)
            };
            let (_kept, loaded) = load(first, &states[first]);
            loaded.unwrap();
            let error = load(second, &other).1.unwrap_err().to_string();
            assert!(error.contains("another controller of the subsystem has others"), "{error}");
        }
    }
}

#[test]
fn a_namespace_has_no_reservation_of_one_that_had_its_identifier_before_the_power_was_off() {
    let store = Memory::new(0);
    let power_on = |namespaces: &[NamespaceConfig]| {
        let kept = store.state();
        let subsystem = Subsystem::with_store("RESERVE", namespaces, true, store.clone() as _, kept).unwrap();
        host(&subsystem, 0)
    };
    let reserved = |guest: &mut Guest| {
        name(guest, b"the host").unwrap();
        reserve(guest, nvm::RESERVATION_REGISTER, spec::PERSISTENCE_ON << 30, [0, KEYS[0]]).unwrap();
        acquire(guest, KEYS[0], 2).unwrap();
    };
    let both = [namespace(1, 64), namespace(2, 64)];
    // While the guest runs it is removed, and another one added in its place.
    let mut guest = power_on(&both);
    reserved(&mut guest);
    let subsystem = Arc::clone(guest.controller.subsystem());
    subsystem.remove(1, std::time::Duration::ZERO).unwrap();
    guest.run();
    subsystem.add(&namespace(1, 64)).unwrap();
    guest.run();
    drop((guest, subsystem));
    let mut guest = power_on(&both);
    assert_eq!(report(&mut guest), (ReportHeader::default(), vec![]));
    // It is not there for a while.
    reserved(&mut guest);
    drop(guest);
    power_on(&both[1..]).controller.persist().unwrap();
    let mut guest = power_on(&both);
    assert_eq!(report(&mut guest), (ReportHeader::default(), vec![]));
}
