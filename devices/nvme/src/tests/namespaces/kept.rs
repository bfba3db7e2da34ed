//! What becomes of formats without power, and of data in namespaces that are not attached.

use std::sync::atomic::Ordering;
use std::time::Instant;

use block::{Fault, Target};
use nvme_spec::identify::cns;
use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::{Status, SubmissionEntry, feature, log};

use super::{
    Memory, QUOTA_BYTES, about, attach, create, deletion, detach, migrate_managed, namespace, read, ready,
    transfer, write,
};
use crate::Subsystem;
use crate::tests::driver::PATIENCE;
use crate::tests::protection::protect;

#[test]
fn without_power_a_namespace_keeps_its_format_and_none_has_that_of_one_before_it() {
    let store = Memory::new(QUOTA_BYTES);
    let mut guest = ready(&store);
    let format =
        |nsid| SubmissionEntry { opcode: admin::FORMAT_NVM, nsid, cdw10: 1, ..SubmissionEntry::default() };
    let protect = protect(1, feature::WRITE_PROTECT);
    assert_eq!(create(&mut guest, 64, 0), Ok(1));
    attach(&mut guest, 1, &[0]).unwrap();
    for nsid in [1, 2] {
        guest.admin(format(nsid)).unwrap();
    }
    guest.admin(protect).unwrap();
    guest.admin(deletion(1)).unwrap();
    assert_eq!(create(&mut guest, 64, 0), Ok(1));
    attach(&mut guest, 1, &[0]).unwrap();
    drop(guest);
    let mut guest = ready(&store);
    assert_eq!([1, 2].map(|nsid| about(&mut guest, cns::NAMESPACE, nsid).flbas), [0, 1]);
    write(&mut guest, 1, 63, 3).unwrap();
    // One that is not attached when something is kept has its format too.
    detach(&mut guest, 2, &[0]).unwrap();
    let save = SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: u32::from(feature::TEMPERATURE_THRESHOLD) | feature::SAVE,
        cdw11: 350,
        ..SubmissionEntry::default()
    };
    guest.admin(save).unwrap();
    drop(guest);
    let mut guest = ready(&store);
    assert_eq!(about(&mut guest, cns::ALLOCATED_NAMESPACE, 2).flbas, 1);
    assert_eq!(read(&mut guest, 1, 63), Ok(3));
}

#[test]
fn a_namespace_that_is_not_attached_is_sanitized_too() {
    let store = Memory::new(16 << 20);
    let mut guest = ready(&store);
    let blocks = 12 << 11;
    assert_eq!(create(&mut guest, blocks, 0), Ok(1));
    attach(&mut guest, 1, &[0]).unwrap();
    let places = [0, blocks / 2, blocks - 1];
    places.iter().for_each(|&lba| write(&mut guest, 1, lba, 7).unwrap());
    detach(&mut guest, 1, &[0]).unwrap();
    // In its midst the guest moves.
    store.faults.inject(Target::Any, 1, 1, Fault::Hold);
    let sanitize = SubmissionEntry {
        opcode: admin::SANITIZE,
        cdw10: opcode::SANITIZE_BLOCK_ERASE,
        ..SubmissionEntry::default()
    };
    guest.admin(sanitize).unwrap();
    guest.run();
    assert_eq!(store.faults.held(), 1);
    guest.controller.begin_pause();
    store.faults.release_held();
    migrate_managed(&mut guest, &store).unwrap();
    let log = SubmissionEntry {
        opcode: admin::GET_LOG_PAGE,
        cdw10: u32::from(log::id::SANITIZE_STATUS) | 127 << 16,
        ..SubmissionEntry::default()
    };
    guest.run_until("the end of the operation", |guest| {
        log::SanitizeStatusLog::from_bytes(&guest.admin_data(log).unwrap()).status & 7 == 1
    });
    attach(&mut guest, 1, &[0]).unwrap();
    places.iter().for_each(|&lba| assert_eq!(read(&mut guest, 1, lba), Ok(0), "block {lba}"));
}

#[test]
fn blocks_that_cannot_be_read_stay_so_while_their_namespace_is_not_attached_and_without_power() {
    let store = Memory::new(QUOTA_BYTES);
    let mut guest = ready(&store);
    assert_eq!(create(&mut guest, 64, 0), Ok(1));
    attach(&mut guest, 1, &[0]).unwrap();
    let unreadable = Err(Status::UNRECOVERED_READ_ERROR);
    for nsid in [1, 2] {
        guest.io(1, transfer(nvm::WRITE_UNCORRECTABLE, nsid, 5, 3, 0)).unwrap();
        detach(&mut guest, nsid, &[0]).unwrap();
    }
    migrate_managed(&mut guest, &store).unwrap();
    for nsid in [1, 2] {
        attach(&mut guest, nsid, &[0]).unwrap();
        assert_eq!(
            [4, 5, 7, 8].map(|lba| read(&mut guest, nsid, lba)),
            [Ok(0), unreadable, unreadable, Ok(0)]
        );
    }
    // What cannot be kept is not acknowledged, however often it is tried.
    store.breaks.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        assert_eq!(write(&mut guest, 1, 6, 8), Err(Status::INTERNAL_ERROR));
        assert_eq!(read(&mut guest, 1, 6), unreadable);
    }
    write(&mut guest, 1, 8, 8).unwrap();
    store.breaks.store(false, Ordering::SeqCst);
    // The power fails without a word, in a moment when one is attached.
    write(&mut guest, 1, 6, 9).unwrap();
    guest.io(1, transfer(nvm::WRITE_UNCORRECTABLE, 1, 20, 1, 0)).unwrap();
    detach(&mut guest, 2, &[0]).unwrap();
    let state = store.state();
    drop(guest);
    store.put(state);
    let mut guest = ready(&store);
    assert_eq!(
        [5, 6, 7, 20].map(|lba| read(&mut guest, 1, lba)),
        [unreadable, Ok(9), unreadable, unreadable]
    );
    attach(&mut guest, 2, &[0]).unwrap();
    assert_eq!(read(&mut guest, 2, 5), unreadable);
    // A state that says what no guest can have done.
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let mut saved = store.state().unwrap();
    let marks = saved.allocations.namespaces[0].uncorrectable.as_mut().unwrap();
    marks.marks.runs[0].first = 64;
    let namespaces = [namespace(2, 64)];
    let subsystem = Subsystem::with_store("NS", &namespaces, false, store.clone() as _, Some(saved.clone()));
    let error = subsystem.err().unwrap().to_string();
    assert!(error.contains("uncorrectable blocks from 64 on"), "{error}");
    // Where the host has put another image, its blocks are its own.
    let marks = saved.allocations.namespaces[0].uncorrectable.as_mut().unwrap();
    marks.marks.runs[0].first = 5;
    let larger = [namespace(2, 128)];
    let subsystem = Subsystem::with_store("NS", &larger, false, store.clone() as _, Some(saved)).unwrap();
    let marked =
        subsystem.allocations().namespaces.iter().map(|one| one.uncorrectable.is_some()).collect::<Vec<_>>();
    assert_eq!(marked, [true, false]);
}
