//! Firmware slots, images and their activation.

use nvme_spec::event::Event;
use nvme_spec::identify::{IdentifyController, OAES_FIRMWARE_ACTIVATION, cns};
use nvme_spec::log::FirmwareSlotLog;
use nvme_spec::opcode::{self, admin};
use nvme_spec::{Status, SubmissionEntry, feature, regs};

use super::driver::{Guest, namespace};
use crate::firmware::{MAX_IMAGE_BYTES, Revision, Staging, image};
use crate::{ControllerConfig, NvmeState};

const NEW: Revision = *b"2.0.0   ";

fn ready() -> Guest {
    Guest::ready(ControllerConfig::new("FIRMWARE"), vec![namespace(1, 8)])
}

fn download(guest: &mut Guest, offset_bytes: u32, data: &[u8]) -> Result<u32, Status> {
    let pages = (data.len() as u64).div_ceil(4096).max(1);
    let base = guest.pages(pages);
    guest.write_bytes(base, data);
    assert!(data.len() <= 8192, "two PRPs describe no more");
    guest.admin(SubmissionEntry {
        opcode: admin::FIRMWARE_DOWNLOAD,
        prp1: base,
        prp2: base + 4096,
        cdw10: data.len() as u32 / 4 - 1,
        cdw11: offset_bytes / 4,
        ..SubmissionEntry::default()
    })
}

fn commit(guest: &mut Guest, slot: u8, action: u8) -> Result<u32, Status> {
    guest.admin(SubmissionEntry {
        opcode: admin::FIRMWARE_COMMIT,
        cdw10: u32::from(slot) | u32::from(action) << 3,
        ..SubmissionEntry::default()
    })
}

fn log(guest: &mut Guest) -> FirmwareSlotLog {
    let entry =
        SubmissionEntry { opcode: admin::GET_LOG_PAGE, cdw10: 3 | 127 << 16, ..SubmissionEntry::default() };
    FirmwareSlotLog::from_bytes(&guest.admin_data(entry).unwrap())
}

fn running(guest: &mut Guest) -> Revision {
    IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap()).fr
}

fn reset(guest: &mut Guest) {
    guest.write32(regs::CC, 0);
    guest.run();
    guest.enable();
}

#[test]
fn an_image_is_activated_by_the_reset_that_it_was_committed_for() {
    let mut guest = ready();
    let factory = running(&mut guest);
    let bytes = image(&NEW, &[7; 10_000]);
    assert_eq!(bytes.len(), 3 * 4096);
    // In pieces, in any order.
    download(&mut guest, 8192, &bytes[8192..]).unwrap();
    download(&mut guest, 0, &bytes[..8192]).unwrap();
    commit(&mut guest, 3, opcode::COMMIT_REPLACE).unwrap();
    let slots = log(&mut guest);
    assert_eq!((slots.active, slots.revisions[2]), (1, NEW));
    reset(&mut guest);
    assert_eq!((running(&mut guest), log(&mut guest).active), (factory, 1), "it was not to be activated");
    commit(&mut guest, 3, opcode::COMMIT_ACTIVATE).unwrap();
    assert_eq!((running(&mut guest), log(&mut guest).active), (factory, 1 | 3 << 4));
    reset(&mut guest);
    assert_eq!((running(&mut guest), log(&mut guest).active), (NEW, 3));
    // And back to the slot that nobody can overwrite.
    commit(&mut guest, 1, opcode::COMMIT_ACTIVATE).unwrap();
    reset(&mut guest);
    assert_eq!((running(&mut guest), log(&mut guest).active), (factory, 1));
}

#[test]
fn activation_without_reset_is_told_to_who_asked_for_it() {
    for asked in [false, true] {
        let mut guest = ready();
        let configuration = if asked { OAES_FIRMWARE_ACTIVATION } else { 0 };
        let set = SubmissionEntry {
            opcode: admin::SET_FEATURES,
            cdw10: u32::from(feature::ASYNC_EVENT_CONFIGURATION),
            cdw11: configuration,
            ..SubmissionEntry::default()
        };
        guest.admin(set).unwrap();
        let entry = SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() };
        let request = guest.push(0, entry);
        guest.ring(0);
        guest.run();
        download(&mut guest, 0, &image(&NEW, b"")).unwrap();
        let entry = SubmissionEntry {
            opcode: admin::FIRMWARE_COMMIT,
            cdw10: u32::from(opcode::COMMIT_ACTIVATE_NOW) << 3,
            ..SubmissionEntry::default()
        };
        let cid = guest.push(0, entry);
        guest.ring(0);
        guest.run();
        let entries = guest.reap(0);
        assert!(entries[0].status().is_success() && entries[0].cid == cid);
        let told: Vec<_> = entries[1..].iter().map(|entry| (entry.cid, entry.dw0)).collect();
        let expected = (request, Event::FIRMWARE_ACTIVATION.to_dword());
        assert_eq!(told, if asked { vec![expected] } else { vec![] });
        assert_eq!((running(&mut guest), log(&mut guest).active), (NEW, 2), "the first empty slot");
    }
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let mut guest = ready();
    let invalid = Err(Status::INVALID_FIELD);
    assert_eq!(download(&mut guest, 512, &[0; 4096]), invalid, "offset beside the granularity");
    assert_eq!(download(&mut guest, 0, &[0; 512]), invalid, "length beside the granularity");
    assert_eq!(download(&mut guest, MAX_IMAGE_BYTES as u32, &[0; 4096]), invalid, "beyond the buffer");
    let huge =
        SubmissionEntry { opcode: admin::FIRMWARE_DOWNLOAD, cdw10: u32::MAX, ..SubmissionEntry::default() };
    assert_eq!(guest.admin(huge), invalid, "beyond MDTS");
    download(&mut guest, 4096, &[0; 8192]).unwrap();
    for (offset, length) in [(0, 8192), (4096, 4096), (8192, 8192)] {
        let data = vec![1; length];
        assert_eq!(download(&mut guest, offset, &data), Err(Status::OVERLAPPING_RANGE), "{offset}");
    }
    download(&mut guest, 0, &[0; 4096]).unwrap();
    // Nothing takes more memory than the largest image.
    let mut staging = Staging::default();
    staging.put(MAX_IMAGE_BYTES as u64 - 4096, &[1; 4096]).unwrap();
    assert_eq!(staging.bytes.len(), MAX_IMAGE_BYTES);
    assert_eq!(staging.put(u64::MAX - 4095, &[1; 4096]), Err(Status::INVALID_FIELD.do_not_retry()));
}

#[test]
fn what_is_no_image_is_not_committed() {
    let mut guest = ready();
    let good = image(&NEW, &[9; 5000]);
    let damages: [(&str, usize, u8); 5] = [
        ("signature", 0, 1),
        ("revision", 9, 0x80),
        ("length", 18, 1),
        ("checksum", 21, 1),
        ("payload", 5000, 1),
    ];
    for (what, at, bits) in damages {
        let mut bad = good.clone();
        bad[at] ^= bits;
        download(&mut guest, 0, &bad).unwrap();
        let result = commit(&mut guest, 2, opcode::COMMIT_REPLACE);
        assert_eq!(result, Err(Status::INVALID_FIRMWARE_IMAGE), "{what}");
        // It is used up.
        assert_eq!(download(&mut guest, 0, &good), Ok(0));
        assert_eq!(commit(&mut guest, 2, opcode::COMMIT_REPLACE), Ok(0), "{what}");
    }
    let nothing = commit(&mut guest, 2, opcode::COMMIT_REPLACE_AND_ACTIVATE);
    assert_eq!(nothing, Err(Status::INVALID_FIRMWARE_IMAGE));
    download(&mut guest, 4096, &good[4096..]).unwrap();
    assert_eq!(commit(&mut guest, 2, opcode::COMMIT_REPLACE), Err(Status::INVALID_FIRMWARE_IMAGE), "a hole");
    // A reset forgets what was downloaded.
    download(&mut guest, 0, &good).unwrap();
    reset(&mut guest);
    assert_eq!(commit(&mut guest, 2, opcode::COMMIT_REPLACE), Err(Status::INVALID_FIRMWARE_IMAGE));
    assert_eq!(commit(&mut guest, 5, opcode::COMMIT_ACTIVATE), Err(Status::INVALID_FIRMWARE_IMAGE), "empty");
    assert_eq!(commit(&mut guest, 0, opcode::COMMIT_ACTIVATE), Err(Status::INVALID_FIRMWARE_SLOT));
    download(&mut guest, 0, &good).unwrap();
    assert_eq!(
        commit(&mut guest, 1, opcode::COMMIT_REPLACE),
        Err(Status::INVALID_FIRMWARE_SLOT),
        "read-only"
    );
    for action in 4..8 {
        assert_eq!(commit(&mut guest, 2, action), Err(Status::INVALID_FIELD), "action {action}");
    }
}

#[test]
fn slots_and_a_staged_image_survive() {
    let mut guest = ready();
    download(&mut guest, 0, &image(b"1.5     ", b"x")).unwrap();
    commit(&mut guest, 4, opcode::COMMIT_REPLACE_AND_ACTIVATE).unwrap();
    let bytes = image(&NEW, &[7; 10_000]);
    download(&mut guest, 4096, &bytes[4096..]).unwrap();
    guest.migrate(2);
    assert_eq!(log(&mut guest).active, 1 | 4 << 4);
    download(&mut guest, 0, &bytes[..4096]).unwrap();
    guest.migrate(1);
    assert_eq!(commit(&mut guest, 5, opcode::COMMIT_REPLACE), Ok(0));
    guest.migrate(1);
    reset(&mut guest);
    let slots = log(&mut guest);
    assert_eq!((slots.active, slots.revisions[3], slots.revisions[4]), (4, *b"1.5     ", NEW));
    assert_eq!(running(&mut guest), *b"1.5     ");
}

#[test]
fn firmware_that_no_controller_has_is_refused() {
    let mut guest = ready();
    download(&mut guest, 4096, &[1; 4096]).unwrap();
    guest.controller.pause(std::time::Instant::now() + super::driver::PATIENCE).unwrap();
    let state = guest.controller.save();
    type Change = fn(&mut crate::FirmwareState);
    let changes: [(&str, Change); 11] = [
        ("firmware.present", |s| s.present = 0x81),
        ("firmware.active", |s| s.active = 0),
        ("firmware.active", |s| s.active = 8),
        ("firmware.active", |s| s.active = 2),
        ("firmware.next", |s| s.next = 7),
        ("firmware.running", |s| s.running[7] = 0),
        ("firmware.revisions", |s| s.revisions[0] = [0; 8]),
        ("firmware.revisions", |s| s.revisions[6][0] = b'x'),
        ("firmware.staged_bytes", |s| s.staged.truncate(4096)),
        ("firmware.staged_bytes", |s| s.granules.set(1, false)),
        ("firmware.staged is", |s| s.staged[17] = 1),
    ];
    let load = |state: &NvmeState| guest.loaded_elsewhere(state);
    assert!(load(&state).unwrap().save() == state);
    for (expected, change) in changes {
        let mut changed = state.clone();
        change(changed.firmware.as_mut().unwrap());
        let error = load(&changed).err().unwrap().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
