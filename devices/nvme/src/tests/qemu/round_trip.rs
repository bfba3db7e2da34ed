//! Sections taken over, run, and given back.

use std::collections::BTreeSet;
use std::time::Instant;

use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{SubmissionEntry, feature, regs};
use pci::PciFunction;

use super::super::driver::{Guest, PATIENCE, transfer};
use super::{CLOCK_MS, FIRMWARE, Fixture, LINUX, driver, leaves, load, machine, save};
use crate::qemu::{QemuResidue, QemuSection};
use crate::{Error, NvmeState};

/// Pauses and saves. QEMU's virtual clock has run as long as the controller's.
fn pause_and_save(fixture: &Fixture, guest: &Guest, residue: &QemuResidue, loaded: &NvmeState) -> Vec<u8> {
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let elapsed_ms = guest.controller.save().features.timestamp_ms - loaded.features.timestamp_ms;
    guest.controller.save_qemu(residue, &fixture.device(), CLOCK_MS + elapsed_ms).unwrap().to_bytes()
}

/// A machine that runs with the controller of a section, its state when it was loaded, and the residue.
fn resumed(fixture: &Fixture) -> (Guest, NvmeState, QemuResidue) {
    let (mut guest, residue) = load(fixture, fixture.payload()).unwrap();
    let state = guest.controller.save();
    driver(&mut guest, fixture);
    guest.controller.resume();
    guest.run();
    (guest, state, residue)
}

/// The paths of the fields in which two sections differ.
fn differences(fixture: &Fixture, before: &[u8], after: &[u8]) -> BTreeSet<String> {
    assert_eq!(before.len(), after.len());
    let mut fields = leaves(&fixture.description());
    fields.retain(|leaf| {
        before[leaf.offset..leaf.offset + leaf.size] != after[leaf.offset..leaf.offset + leaf.size]
    });
    fields.into_iter().map(|leaf| leaf.path).collect()
}

fn set(paths: &[&str]) -> BTreeSet<String> {
    paths.iter().map(|path| (*path).to_owned()).collect()
}

#[test]
fn the_layout_is_the_one_that_qemu_describes() {
    for fixture in [FIRMWARE, LINUX] {
        let theirs = leaves(&fixture.description());
        let ours = leaves(&vmstate::describe(&fixture.section()));
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours, theirs);
        }
        assert_eq!(ours.len(), theirs.len());
        let end = theirs.last().map(|leaf| leaf.offset + leaf.size);
        assert_eq!(end, Some(fixture.payload().len()));
    }
}

#[test]
fn what_the_guest_remembers_of_configuration_space_is_where_it_was() {
    for fixture in [FIRMWARE, LINUX] {
        let (guest, _) = load(&fixture, fixture.payload()).unwrap();
        let theirs = &fixture.payload()[4..];
        let read = |offset: usize, length| {
            let mut data = vec![0; length];
            guest.controller.config_read(offset as u16, &mut data);
            data
        };
        // Identity, command, class, BAR, interrupt line; MSI-X control, table and pending bits; power state; device control.
        for (offset, length) in [(0, 4), (9, 3), (0x10, 8), (0x3c, 1), (0x42, 10), (0x62, 6), (0x88, 2)] {
            assert_eq!(read(offset, length), theirs[offset..offset + length], "{offset:#x}");
        }
        // I/O decoding is missing: there are no I/O BARs.
        assert_eq!(read(4, 2), [theirs[4] & !1, theirs[5]]);
        // The capabilities, each where it was.
        for offset in [0x34, 0x40, 0x60, 0x80] {
            assert_eq!(read(offset, 1), theirs[offset..=offset], "{offset:#x}");
        }
    }
}

#[test]
fn a_section_that_ran_and_did_nothing_comes_back_byte_for_byte() {
    for fixture in [FIRMWARE, LINUX] {
        assert_eq!(fixture.section().to_bytes(), fixture.payload());
        let (guest, residue) = load(&fixture, fixture.payload()).unwrap();
        assert!(save(&fixture, &guest, &residue) == fixture.payload(), "paused all the time");
        let (guest, loaded, residue) = resumed(&fixture);
        assert_eq!(guest.read32(regs::CSTS), 1);
        let bytes = pause_and_save(&fixture, &guest, &residue, &loaded);
        assert_eq!(differences(&fixture, fixture.payload(), &bytes), BTreeSet::new());
    }
}

#[test]
fn one_command_changes_its_queue_and_nothing_else() {
    let (mut guest, loaded, residue) = resumed(&LINUX);
    let page = guest.pages(1);
    let cid = guest.push(2, transfer(nvm::READ, 1, 7, 8, page));
    guest.ring(2);
    guest.run_until("the command", |guest| guest.controller.statistics().completed == 1);
    let bytes = pause_and_save(&LINUX, &guest, &residue, &loaded);
    let expected = set(&["cq[2].tail", "cq_pending", "sq[2].head", "sq[2].tail"]);
    assert_eq!(differences(&LINUX, LINUX.payload(), &bytes), expected);
    assert_eq!(guest.interrupts.take(2), 1);
    guest.controller.resume();
    let entries = guest.reap(2);
    assert_eq!(entries.len(), 1);
    assert_eq!((entries[0].cid, entries[0].sq_id, entries[0].sq_head), (cid, 2, 0xd6));
    assert!(entries[0].status().is_success());
    guest.run();
    // With the next command the worker sees that the guest has taken the completion.
    guest.push(2, transfer(nvm::READ, 1, 8, 8, page));
    guest.ring(2);
    guest.run_until("the command", |guest| guest.controller.statistics().completed == 2);
    let bytes = pause_and_save(&LINUX, &guest, &residue, &loaded);
    let expected = set(&["cq[2].head", "cq[2].tail", "cq_pending", "sq[2].head", "sq[2].tail"]);
    assert_eq!(differences(&LINUX, LINUX.payload(), &bytes), expected);
}

#[test]
fn a_queue_that_begins_its_next_lap_changes_its_phase() {
    let (mut guest, loaded, residue) = resumed(&FIRMWARE);
    // Four entries are left in the completion queue's lap.
    for _ in 0..5 {
        let get = SubmissionEntry {
            opcode: admin::GET_FEATURES,
            cdw10: feature::TEMPERATURE_THRESHOLD.into(),
            ..SubmissionEntry::default()
        };
        guest.push(0, get);
        guest.ring(0);
        guest.run();
    }
    // The guest polls; its queues are not of the same size.
    assert_eq!(guest.controller.statistics().completed, 5);
    guest.write32(regs::cq_head_doorbell(0), 1);
    let bytes = pause_and_save(&FIRMWARE, &guest, &residue, &loaded);
    let expected = set(&["cq[0].head", "cq[0].phase", "cq[0].tail", "sq[0].head", "sq[0].tail"]);
    assert_eq!(differences(&FIRMWARE, FIRMWARE.payload(), &bytes), expected);
}

#[test]
fn an_event_answers_the_request_that_was_parked_in_qemu() {
    let (mut guest, loaded, residue) = resumed(&LINUX);
    guest.write32(regs::sq_tail_doorbell(7), 1);
    guest.run();
    // The parked request came before the last of the admin commands, so that its answer goes where the next is expected.
    let entries = guest.reap(0);
    assert_eq!(entries.len(), 1);
    assert_eq!((entries[0].cid, entries[0].dw0, entries[0].sq_head), (0x1f, 0x01_0000, 0x13));
    guest.run();
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    // The error log has an entry now, which QEMU's cannot have.
    let error = guest.controller.save_qemu(&residue, &LINUX.device(), CLOCK_MS).unwrap_err();
    assert!(matches!(error, Error::BeyondQemu(_)), "{error}");
    assert_eq!(loaded.events.parked, [0x1f]);
    assert!(guest.controller.save().events.parked.is_empty());
}

#[test]
fn what_the_guest_sets_here_is_what_qemu_gets() {
    let (mut guest, _, residue) = resumed(&LINUX);
    let before = LINUX.section();
    let set_feature = |id: u8, cdw11| SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: id.into(),
        cdw11,
        ..SubmissionEntry::default()
    };
    let page = guest.pages(1);
    guest.write_bytes(page, &1_700_000_000_000_u64.to_le_bytes());
    let commands = [
        set_feature(feature::VOLATILE_WRITE_CACHE, 0),
        set_feature(feature::TEMPERATURE_THRESHOLD, 350),
        set_feature(feature::ASYNC_EVENT_CONFIGURATION, 0),
        set_feature(feature::WRITE_ATOMICITY, 1),
        SubmissionEntry { nsid: 1, ..set_feature(feature::ERROR_RECOVERY, 9) },
        SubmissionEntry { prp1: page, ..set_feature(feature::TIMESTAMP, 0) },
    ];
    for (index, command) in commands.into_iter().enumerate() {
        guest.push(0, command);
        guest.ring(0);
        guest.run_until("the command", |guest| guest.controller.statistics().completed == index as u64 + 1);
    }
    // Vector 3 in the MSI-X table, which is where QEMU's was.
    guest.write64(0x2000 + 3 * 16, 0xfee0_5004);
    guest.write32(0x2000 + 3 * 16 + 12, 0);
    assert_eq!(guest.reap(0).len(), 6);
    guest.run();
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    let section = guest.controller.save_qemu(&residue, &LINUX.device(), CLOCK_MS).unwrap();
    let changed = differences(&LINUX, &before.to_bytes(), &section.to_bytes());
    let expected = [
        "cq[0].head",
        "cq[0].tail",
        "dn",
        "features.async_config",
        "features.temp_thresh_hi",
        "host_timestamp",
        "msix",
        "namespace.features.err_rec",
        "namespace.tmp",
        "sq[0].head",
        "sq[0].tail",
        "timestamp_set_qemu_clock_ms",
    ];
    assert_eq!(changed, set(&expected));
    // What QEMU would show for it is what is shown here.
    let (again, _) = section.split(machine(&LINUX.config()).controller.save(), CLOCK_MS).unwrap();
    assert_eq!(again, NvmeState { smart: again.smart.clone(), persistent_events: None, ..state });
}

#[test]
fn a_reset_forgets_what_qemu_would_forget() {
    let (guest, _, residue) = resumed(&LINUX);
    guest.write32(regs::CC, 0x0046_0060);
    guest.run();
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let section = guest.controller.save_qemu(&residue, &LINUX.device(), CLOCK_MS).unwrap();
    let again = machine(&LINUX.config());
    let residue = again.controller.load_qemu(section.clone(), CLOCK_MS).unwrap();
    let state = again.controller.save();
    assert_eq!(state, NvmeState { smart: state.smart.clone(), ..guest.controller.save() });
    assert_eq!((state.sq.present().count(), state.cq.present().count()), (0, 0));
    assert!(state.events.parked.is_empty() && !state.doorbell_buffers.enabled);
    assert!(save(&LINUX, &again, &residue) == section.to_bytes());
}

#[test]
fn a_section_is_taken_over_by_a_new_controller_of_its_shape_only() {
    let section = LINUX.section();
    let (guest, _) = load(&LINUX, LINUX.payload()).unwrap();
    assert!(matches!(guest.controller.load_qemu(section.clone(), CLOCK_MS), Err(Error::NotPristine)));
    assert_eq!(section.controller_config("QEMU"), LINUX.config());
    assert_eq!(FIRMWARE.section().controller_config("QEMU"), FIRMWARE.config());
    let error = QemuSection::from_bytes(LINUX.payload(), &FIRMWARE.device()).unwrap_err();
    assert!(matches!(error, Error::QemuBytes(_)));
    for (field, config) in [
        ("conf_ioqpairs", crate::ControllerConfig { queue_pairs: 7, ..LINUX.config() }),
        ("conf_msix_qsize", crate::ControllerConfig { vectors: 8, ..LINUX.config() }),
        ("bar.cap", crate::ControllerConfig { queue_entries: 1024, ..LINUX.config() }),
        ("bar.cap", crate::ControllerConfig { contiguous_queues: false, ..LINUX.config() }),
    ] {
        let error = machine(&config).controller.load_qemu(section.clone(), CLOCK_MS).unwrap_err();
        assert!(matches!(&error, Error::QemuSection { field: named, .. } if named == field), "{error}");
    }
}
