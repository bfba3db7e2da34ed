//! The persistent event log: what is in it, how it is read, and how little room it takes.

use nvme_spec::identify::{IdentifyController, cns};
use nvme_spec::log::SmartLog;
use nvme_spec::opcode::{self, admin};
use nvme_spec::persistent::{
    ACTION_ESTABLISH, ACTION_READ, ACTION_RELEASE, EventHeader, FirmwareCommitEvent, FormatCompletionEvent,
    FormatStartEvent, PersistentEventHeader, PowerOnOrResetEvent, SanitizeCompletionEvent,
    SanitizeStartEvent, TimestampChangeEvent, kind,
};
use nvme_spec::{Status, SubmissionEntry, feature, regs};

use super::driver::{Guest, PATIENCE, namespace};
use crate::persistent::LOG_BYTES;
use crate::{ControllerConfig, NvmeState};

fn ready() -> Guest {
    Guest::ready(ControllerConfig::new("PERSISTENT"), vec![namespace(1, 64)])
}

/// Reads `bytes` at `offset` of the log, after `action`.
fn read(guest: &mut Guest, action: u32, offset: u32, bytes: u32) -> Result<Vec<u8>, Status> {
    let base = guest.pages(2);
    assert!(bytes <= 8192, "two PRPs describe no more");
    guest.admin(SubmissionEntry {
        opcode: admin::GET_LOG_PAGE,
        prp1: base,
        prp2: base + 4096,
        cdw10: 0x0d | action << 8 | (bytes / 4 - 1) << 16,
        cdw12: offset,
        ..SubmissionEntry::default()
    })?;
    Ok(guest.read_bytes(base, bytes as usize))
}

/// All of it, through a context of its own.
fn whole(guest: &mut Guest) -> (PersistentEventHeader, Vec<(u8, Vec<u8>)>) {
    let header = read(guest, ACTION_ESTABLISH, 0, 512).unwrap();
    let header = PersistentEventHeader::from_bytes(header.first_chunk().unwrap());
    let mut bytes = Vec::new();
    while bytes.len() < header.length_bytes as usize {
        bytes.extend(read(guest, ACTION_READ, bytes.len() as u32, 4096).unwrap());
    }
    read(guest, ACTION_RELEASE, 0, 4).unwrap();
    let mut rest = &bytes[512..header.length_bytes as usize];
    let mut events = Vec::new();
    while let Some(event) = rest.first_chunk() {
        let event = EventHeader::from_bytes(event);
        assert_eq!((event.header_length, event.vendor_length), (21, 0));
        let end = 24 + usize::from(event.length);
        events.push((event.kind, rest[24..end].to_vec()));
        rest = &rest[end..];
    }
    assert_eq!(events.len(), header.events as usize);
    (header, events)
}

fn reset(guest: &mut Guest) {
    guest.write32(regs::CC, 0);
    guest.run();
    guest.enable();
}

#[test]
fn what_befalls_the_controller_is_in_the_log_newest_first() {
    let mut guest = ready();
    let page = guest.pages(1);
    guest.write_bytes(page, &1_700_000_000_000u64.to_le_bytes());
    let set = SubmissionEntry {
        opcode: admin::SET_FEATURES,
        prp1: page,
        cdw10: feature::TIMESTAMP.into(),
        ..SubmissionEntry::default()
    };
    guest.admin(set).unwrap();
    let commit = SubmissionEntry { opcode: admin::FIRMWARE_COMMIT, cdw10: 2, ..SubmissionEntry::default() };
    guest.admin(commit).unwrap_err();
    guest.admin(SubmissionEntry { opcode: admin::FORMAT_NVM, nsid: 1, cdw10: 1, ..set }).unwrap();
    let erase = opcode::SANITIZE_BLOCK_ERASE;
    guest.admin(SubmissionEntry { opcode: admin::SANITIZE, cdw10: erase, cdw11: 7, ..set }).unwrap();
    guest.run();
    reset(&mut guest);
    let identity = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
    assert_eq!((identity.lpa & 1 << 4, identity.pels), (1 << 4, 1));
    let (header, events) = whole(&mut guest);
    assert_eq!((header.log_page, header.revision, header.header_length), (0x0d, 2, 492));
    assert_eq!((header.sn, header.mn, header.subnqn), (identity.sn, identity.mn, identity.subnqn));
    assert_eq!((header.vid, header.ssvid, header.power_cycles), (identity.vid, identity.ssvid, 1));
    let kinds: Vec<u8> = events.iter().map(|(kind, _)| *kind).collect();
    let expected = [
        kind::SMART_SNAPSHOT,
        kind::POWER_ON_OR_RESET,
        kind::SANITIZE_COMPLETION,
        kind::SANITIZE_START,
        kind::FORMAT_COMPLETION,
        kind::FORMAT_START,
        kind::FIRMWARE_COMMIT,
        kind::TIMESTAMP_CHANGE,
        kind::SMART_SNAPSHOT,
        kind::POWER_ON_OR_RESET,
    ];
    assert_eq!(kinds, expected);
    assert_eq!(u32::from(header.generation), header.events);
    for kind in 0..=255u8 {
        let claimed = header.supported[usize::from(kind / 8)] >> (kind % 8) & 1 == 1;
        assert_eq!(claimed, expected.contains(&kind), "event type {kind:#x}");
    }
    fn data<const N: usize>(events: &[(u8, Vec<u8>)], at: usize) -> [u8; N] {
        events[at].1.clone().try_into().unwrap()
    }
    assert_eq!(SmartLog::from_bytes(&data(&events, 0)).power_cycles, 1);
    let reset = PowerOnOrResetEvent::from_bytes(&data(&events, 1));
    assert_eq!((reset.revision, reset.activation, reset.operation), (identity.fr, 0, 0));
    let end = SanitizeCompletionEvent::from_bytes(&data(&events, 2));
    assert_eq!((end.progress, end.status), (0xffff, 1));
    let start = SanitizeStartEvent::from_bytes(&data(&events, 3));
    assert_eq!((start.sanicap, start.command, start.pattern), (identity.sanicap, erase, 7));
    let end = FormatCompletionEvent::from_bytes(&data(&events, 4));
    assert_eq!((end.nsid, end.smallest_fpi, end.outcome, end.status), (1, 0, 0, 0));
    let start = FormatStartEvent::from_bytes(&data(&events, 5));
    assert_eq!((start.nsid, start.fna, start.command), (1, 0, 1));
    let failed = FirmwareCommitEvent::from_bytes(&data(&events, 6));
    assert_eq!((failed.slot, failed.action, failed.status_code_type, failed.status_code), (2, 0, 1, 7));
    let change = TimestampChangeEvent::from_bytes(&data(&events, 7));
    assert!(change.previous < 1 << 40 && change.since_reset_ms < 1 << 40);
}

#[test]
fn a_host_reads_the_copy_of_its_context_until_it_releases_it() {
    let mut guest = ready();
    let sequence = Err(Status::COMMAND_SEQUENCE_ERROR);
    assert_eq!(read(&mut guest, ACTION_READ, 0, 512), sequence, "no context");
    read(&mut guest, ACTION_RELEASE, 0, 4).unwrap();
    let before = read(&mut guest, ACTION_ESTABLISH, 0, 2048).unwrap();
    assert_eq!(read(&mut guest, ACTION_ESTABLISH, 0, 512), sequence, "there is one");
    assert_eq!(read(&mut guest, 3, 0, 512), Err(Status::INVALID_FIELD));
    let commit = SubmissionEntry { opcode: admin::FIRMWARE_COMMIT, cdw10: 2, ..SubmissionEntry::default() };
    guest.admin(commit).unwrap_err();
    assert!(read(&mut guest, ACTION_READ, 0, 2048).unwrap() == before, "what happens does not move it");
    // It goes along in a migration.
    let old = guest.migrate(1);
    assert!(old.save().persistent_events.unwrap().context_bytes > 512);
    assert!(read(&mut guest, ACTION_READ, 0, 2048).unwrap() == before);
    assert_eq!(read(&mut guest, ACTION_READ, 64 << 10, 512), Err(Status::INVALID_FIELD), "beyond the end");
    read(&mut guest, ACTION_RELEASE, 0, 4).unwrap();
    assert_eq!(read(&mut guest, ACTION_READ, 0, 512), sequence, "released");
    let after = read(&mut guest, ACTION_ESTABLISH, 0, 2048).unwrap();
    assert_eq!(after[512], kind::FIRMWARE_COMMIT);
    reset(&mut guest);
    assert_eq!(read(&mut guest, ACTION_READ, 0, 512), sequence, "a reset ends it");
}

#[test]
fn old_events_make_room_for_new_ones() {
    let mut guest = ready();
    let commit = SubmissionEntry { opcode: admin::FIRMWARE_COMMIT, cdw10: 2, ..SubmissionEntry::default() };
    for _ in 0..1500 {
        guest.admin(commit).unwrap_err();
    }
    let (header, events) = whole(&mut guest);
    assert!(events.iter().all(|(kind, _)| *kind == kind::FIRMWARE_COMMIT), "the oldest went first");
    assert_eq!(header.generation, 1502);
    let room = LOG_BYTES as u64 - header.length_bytes;
    assert!(room < 46, "{room} bytes are left");
    guest.migrate(1);
    assert_eq!(whole(&mut guest).1, events);
}

#[test]
fn logs_that_nobody_can_have_written_are_refused() {
    let mut guest = ready();
    read(&mut guest, ACTION_ESTABLISH, 0, 512).unwrap();
    guest.controller.pause(std::time::Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    let load = |state: &NvmeState| guest.loaded_elsewhere(state);
    assert!(load(&state).unwrap().save() == state);
    type Change = fn(&mut crate::PersistentEventsState);
    let changes: [(&str, Change); 7] = [
        ("persistent_events.event_bytes", |s| _ = s.events.pop()),
        ("persistent_events.event_bytes", |s| s.events.truncate(20)),
        ("persistent_events.event_bytes", |s| s.events[0] = 0x0b),
        ("persistent_events.event_bytes", |s| s.events[2] = 20),
        ("persistent_events.context_bytes", |s| _ = s.context.pop()),
        ("persistent_events.context_bytes", |s| s.context[0] = 2),
        ("persistent_events.context_bytes", |s| s.context[512] = 0xff),
    ];
    for (expected, change) in changes {
        let mut changed = state.clone();
        change(changed.persistent_events.as_mut().unwrap());
        let error = load(&changed).err().unwrap().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
