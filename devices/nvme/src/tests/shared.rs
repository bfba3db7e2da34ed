//! What the controllers of a subsystem have in common: sanitize operations, firmware, the persistent event log, formats; and what
//! reservations and asymmetric access make of admin commands.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use block::{Fault, FaultControl, FaultImage, Target};
use nvme_spec::event::Event;
use nvme_spec::identify::{IdentifyController, IdentifyNamespace, cns};
use nvme_spec::log::{ErrorEntry, FirmwareSlotLog, SanitizeStatusLog, id as log_id};
use nvme_spec::opcode::{self, admin, attachment, management, nvm};
use nvme_spec::persistent::{EventHeader, PersistentEventHeader, kind};
use nvme_spec::reservation as spec;
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, feature, regs};

use super::driver::{Guest, PATIENCE, memory_image, namespace, transfer};
use super::store::Memory;
use crate::maintenance::CHUNK_BYTES;
use crate::{AccessState, Controller, ControllerConfig, Error, NamespaceConfig, NvmeState, Subsystem};

fn config(id: u16) -> ControllerConfig {
    ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new(&format!("PORT{id}")) }
}

fn member(subsystem: &Arc<Subsystem>, id: u16) -> Guest {
    let mut guest = Guest::member(subsystem, id, config(id));
    guest.enable();
    guest.create_pair(1, 16);
    guest
}

fn pair(subsystem: &Arc<Subsystem>) -> [Guest; 2] {
    [0, 1].map(|id| member(subsystem, id))
}

/// Two controllers of a subsystem whose namespace 1 takes two requests of an operation, and 2 one.
fn two(control: &Arc<FaultControl>) -> ([Guest; 2], Vec<NamespaceConfig>) {
    let image = FaultImage::new(memory_image(CHUNK_BYTES as usize + 4096), control.clone());
    let namespaces = vec![
        NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend: Arc::new(image) },
        namespace(2, 64),
    ];
    (pair(&Subsystem::new("SHARED", &namespaces, true).unwrap()), namespaces)
}

fn run(guests: &[Guest]) {
    // What one leaves for the other, and that for the first again.
    for _ in 0..8 {
        guests.iter().for_each(Guest::run);
    }
}

/// An admin command of one guest, while all run.
pub fn admin_of(guests: &mut [Guest], index: usize, entry: SubmissionEntry) -> Result<u32, Status> {
    command_of(guests, index, 0, entry)
}

/// A command of one guest, while all run; it must be the only one that ends.
pub fn command_of(
    guests: &mut [Guest],
    index: usize,
    queue: u16,
    entry: SubmissionEntry,
) -> Result<u32, Status> {
    let cid = guests[index].push(queue, entry);
    guests[index].ring(queue);
    end_of(guests, index, queue, cid)
}

/// The end of a command that has been rung for.
pub fn end_of(guests: &mut [Guest], index: usize, queue: u16, cid: u16) -> Result<u32, Status> {
    let start = Instant::now();
    loop {
        guests.iter().for_each(Guest::run);
        let ended = guests[index].reap(queue);
        if let [ended] = ended[..] {
            assert_eq!(ended.cid, cid);
            return if ended.status().is_success() { Ok(ended.dw0) } else { Err(ended.status().code()) };
        }
        assert!(ended.is_empty(), "{ended:?}");
        assert!(start.elapsed() < PATIENCE, "the command never ends");
        std::thread::yield_now();
    }
}

fn log_page<const N: usize>(guest: &mut Guest, page: u8) -> Result<[u8; N], Status> {
    let cdw10 = u32::from(page) | (N as u32 / 4 - 1) << 16;
    guest.admin_data(SubmissionEntry { opcode: admin::GET_LOG_PAGE, cdw10, ..SubmissionEntry::default() })
}

fn sanitize_log(guest: &mut Guest) -> SanitizeStatusLog {
    SanitizeStatusLog::from_bytes(&log_page(guest, log_id::SANITIZE_STATUS).unwrap())
}

fn sanitize() -> SubmissionEntry {
    let cdw10 = opcode::SANITIZE_BLOCK_ERASE;
    SubmissionEntry { opcode: admin::SANITIZE, cdw10, ..SubmissionEntry::default() }
}

fn format(nsid: u32) -> SubmissionEntry {
    SubmissionEntry { opcode: admin::FORMAT_NVM, nsid, ..SubmissionEntry::default() }
}

fn listen(guest: &mut Guest) -> u16 {
    let request = SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() };
    let cid = guest.push(0, request);
    guest.ring(0);
    guest.run();
    cid
}

fn until(guests: &mut [Guest], what: &str, mut done: impl FnMut(&mut [Guest]) -> bool) {
    let start = Instant::now();
    while !done(guests) {
        guests.iter().for_each(Guest::run);
        assert!(start.elapsed() < PATIENCE, "never happened: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_sanitize_operation_is_that_of_all_controllers() {
    let control = Arc::new(FaultControl::default());
    let (mut guests, _) = two(&control);
    let page = guests[1].pages(1);
    // An entry of the error log that names a block, and a self-test.
    guests[1].io(1, transfer(nvm::WRITE_UNCORRECTABLE, 2, 7, 1, 0)).unwrap();
    guests[1].io(1, transfer(nvm::READ, 2, 7, 1, page)).unwrap_err();
    let errors = |guest: &mut Guest| ErrorEntry::from_bytes(&log_page(guest, 1).unwrap()).lba;
    assert_eq!(errors(&mut guests[1]), 7);
    control.inject(Target::Any, 0, 1, Fault::Hold);
    let test = SubmissionEntry {
        opcode: admin::DEVICE_SELF_TEST,
        nsid: NSID_BROADCAST,
        cdw10: 2,
        ..SubmissionEntry::default()
    };
    guests[1].admin(test).unwrap();
    guests[1].run();
    let requests = [0, 1].map(|index| listen(&mut guests[index]));
    assert_eq!(control.held(), 1, "the test has begun");
    control.inject(Target::Write, 1, 1, Fault::Hold);
    guests[0].admin(sanitize()).unwrap();
    run(&guests);
    assert_eq!(sanitize_log(&mut guests[0]).progress, 0, "it waits for what the test still reads");
    control.release_held();
    until(&mut guests, "the second request", |_| control.held() == 1);
    let logs = [0, 1].map(|index| sanitize_log(&mut guests[index]));
    assert_eq!((logs[0].status & 7, logs[0].progress > 0), (2, true));
    assert_eq!(logs[0], logs[1]);
    let refused = Err(Status::SANITIZE_IN_PROGRESS);
    for nsid in [1, 2] {
        assert_eq!(guests[1].io(1, transfer(nvm::READ, nsid, 0, 1, page)), refused.map(drop));
    }
    let buffers = SubmissionEntry {
        opcode: admin::DOORBELL_BUFFER_CONFIG,
        prp1: page,
        prp2: page + 4096,
        ..SubmissionEntry::default()
    };
    for entry in [format(1), sanitize(), test, buffers] {
        assert_eq!(guests[1].admin(entry), refused, "{:#x}", entry.opcode);
    }
    assert_eq!(errors(&mut guests[1]), 0, "it names no block meanwhile");
    control.release_held();
    until(&mut guests, "the end of the operation", |guests| sanitize_log(&mut guests[1]).status == 1);
    run(&guests);
    let told = guests[0].reap(0);
    assert_eq!(
        (told.len(), told[0].cid, told[0].dw0),
        (1, requests[0], Event::SANITIZE_COMPLETED.to_dword())
    );
    assert!(guests[1].reap(0).is_empty(), "it was not asked for it");
    assert_eq!(sanitize_log(&mut guests[0]).status, 1);
    let ended = log_page::<564>(&mut guests[1], log_id::DEVICE_SELF_TEST).unwrap();
    assert_eq!((ended[0], ended[4] & 0xf), (0, 9), "aborted due to a sanitize operation");
    assert_eq!(errors(&mut guests[1]), 7);
    guests[1].io(1, transfer(nvm::READ, 2, 7, 1, page)).unwrap();
}

#[test]
fn another_controller_goes_on_with_a_sanitize_operation_and_keeps_its_place_over_a_move() {
    let control = Arc::new(FaultControl::default());
    let (mut guests, namespaces) = two(&control);
    let page = guests[1].pages(1);
    guests[1].write_bytes(page, &[7; 512]);
    guests[1].io(1, transfer(nvm::WRITE, 1, CHUNK_BYTES / 512, 1, page)).unwrap();
    control.inject(Target::Write, 0, 1, Fault::Hold);
    guests[0].admin(sanitize()).unwrap();
    until(&mut guests, "the first request", |_| control.held() == 1);
    assert_eq!(sanitize_log(&mut guests[1]).status & 7, 2);
    // Whoever makes it, the other does not make it too.
    run(&guests);
    assert_eq!(control.held(), 1);
    let maker = guests[0].controller.subsystem().common.lock().sanitizer.unwrap();
    let (maker, other) = (usize::from(maker), usize::from(1 - maker));
    guests[maker].write32(regs::CC, 0);
    run(&guests);
    assert_eq!(control.held(), 1, "the reset waits for it");
    control.inject(Target::Write, 1, 1, Fault::Hold);
    control.release_held();
    until(&mut guests, "the reset", |guests| guests[maker].read32(regs::CSTS) == 0);
    until(&mut guests, "the second request", |_| control.held() == 1);
    guests.iter().for_each(|guest| guest.controller.begin_pause());
    control.release_held();
    let controllers = guests.each_ref().map(|guest| &*guest.controller);
    Controller::pause_all(&controllers, Instant::now() + PATIENCE).unwrap();
    let states = guests.each_ref().map(|guest| guest.controller.save());
    let asked = |state: &NvmeState| state.sanitize.unwrap().asked.map(|asked| asked.controller);
    assert_eq!(states.each_ref().map(asked), [None, Some(0)]);
    // They must say the same.
    let there = Subsystem::new("SHARED", &namespaces, true).unwrap();
    let successors = [0, 1].map(|id| guests[usize::from(id)].successor(&there, id));
    successors[0].controller.load(&states[0]).unwrap();
    let mut different = states[1].clone();
    different.sanitize.as_mut().unwrap().pattern = 1;
    let error = successors[1].controller.load(&different).unwrap_err().to_string();
    assert!(error.contains("sanitize.command") && error.contains("says otherwise"), "{error}");
    drop(successors);
    let there = Subsystem::new("SHARED", &namespaces, true).unwrap();
    for index in [1, 0] {
        let successor = guests[index].successor(&there, index as u16);
        successor.controller.load(&states[index]).unwrap();
        guests[index].move_to(successor);
    }
    for (guest, state) in guests.iter().zip(&states) {
        assert!(guest.controller.save() == *state, "what was restored saves the same");
        guest.controller.resume();
    }
    // The one that was reset is still off.
    until(&mut guests, "the end of the operation", |guests| sanitize_log(&mut guests[other]).status == 1);
    let page = guests[other].pages(1);
    guests[other].io(1, transfer(nvm::READ, 1, CHUNK_BYTES / 512, 1, page)).unwrap();
    assert_eq!(guests[other].read_bytes(page, 512), [0; 512]);
}

#[test]
fn all_controllers_run_the_same_firmware_and_write_one_persistent_log() {
    let (mut guests, namespaces) = two(&Arc::default());
    let image = crate::firmware::image(b"2.0.0   ", b"");
    let page = guests[0].pages(1);
    guests[0].write_bytes(page, &image);
    let download = SubmissionEntry {
        opcode: admin::FIRMWARE_DOWNLOAD,
        prp1: page,
        cdw10: image.len() as u32 / 4 - 1,
        ..SubmissionEntry::default()
    };
    guests[0].admin(download).unwrap();
    let commit = |action: u32| SubmissionEntry {
        opcode: admin::FIRMWARE_COMMIT,
        cdw10: 2 | action << 3,
        ..SubmissionEntry::default()
    };
    // What one downloads the other has not.
    assert_eq!(guests[1].admin(commit(1)), Err(Status::INVALID_FIRMWARE_IMAGE));
    guests[0].admin(commit(1)).unwrap();
    let slots =
        |guest: &mut Guest| FirmwareSlotLog::from_bytes(&log_page(guest, log_id::FIRMWARE_SLOT).unwrap());
    for guest in &mut guests {
        let log = slots(guest);
        assert_eq!((log.active, log.revisions[1]), (0x21, *b"2.0.0   "), "at the next reset");
    }
    guests[1].write32(regs::CC, 0);
    guests[1].run();
    guests[1].enable();
    for guest in &mut guests {
        let page = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
        assert_eq!((page.fr, page.dsto), (*b"2.0.0   ", 0), "each has a self-test of its own");
    }
    let kinds = |guest: &mut Guest| {
        let page = guest.pages(2);
        let entry = |action: u32| SubmissionEntry {
            opcode: admin::GET_LOG_PAGE,
            prp1: page,
            prp2: page + 4096,
            cdw10: u32::from(log_id::PERSISTENT_EVENT) | action << 8 | 2047 << 16,
            ..SubmissionEntry::default()
        };
        guest.admin(entry(1)).unwrap();
        let bytes = guest.read_bytes(page, 8192);
        guest.admin(entry(2)).unwrap();
        let header = PersistentEventHeader::from_bytes(bytes.first_chunk().unwrap());
        let mut rest = &bytes[512..header.length_bytes as usize];
        let mut events = Vec::new();
        while let Some(event) = rest.first_chunk().map(EventHeader::from_bytes) {
            events.push((event.kind, event.controller));
            rest = &rest[24 + usize::from(event.length)..];
        }
        (header.generation, events)
    };
    let logs = [0, 1].map(|index| kinds(&mut guests[index]));
    assert_eq!(logs[0], logs[1]);
    for (kind, by) in [(kind::FIRMWARE_COMMIT, 0), (kind::FIRMWARE_COMMIT, 1), (kind::POWER_ON_OR_RESET, 1)] {
        assert!(logs[0].1.contains(&(kind, by)), "{kind} by {by}: {:?}", logs[0].1);
    }
    // Both move, and a section that says otherwise of them is refused.
    let controllers = guests.each_ref().map(|guest| &*guest.controller);
    Controller::pause_all(&controllers, Instant::now() + PATIENCE).unwrap();
    let states = guests.each_ref().map(|guest| guest.controller.save());
    type Change = fn(&mut NvmeState);
    let changes: [(&str, Change); 3] = [
        ("firmware", |state| state.firmware.as_mut().unwrap().active = 1),
        ("persistent_events.generation", |state| state.persistent_events.as_mut().unwrap().generation += 1),
        ("persistent_events.generation", |state| state.persistent_events = None),
    ];
    for (field, change) in changes {
        let there = Subsystem::new("SHARED", &namespaces, true).unwrap();
        guests[0].successor(&there, 0).controller.load(&states[0]).unwrap();
        let mut state = states[1].clone();
        change(&mut state);
        let error = guests[1].successor(&there, 1).controller.load(&state).unwrap_err().to_string();
        assert!(error.contains(field) && error.contains("says otherwise"), "{field}: {error}");
    }
}

#[test]
fn without_power_the_operation_of_one_is_that_of_whoever_comes_first() {
    let store = Memory::new(1 << 20);
    let namespaces = [namespace(1, 64)];
    let powered = |ids: &[u16]| -> Vec<Guest> {
        let state = store.state();
        let subsystem =
            Subsystem::with_store("SHARED", &namespaces, true, store.clone() as _, state).unwrap();
        ids.iter().map(|&id| member(&subsystem, id)).collect()
    };
    let mut guests = powered(&[0, 1]);
    let save = SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: u32::from(feature::TEMPERATURE_THRESHOLD) | feature::SAVE,
        cdw11: 350,
        ..SubmissionEntry::default()
    };
    guests[0].admin(save).unwrap();
    // The first has kept that there was none, and is gone.
    drop(guests.remove(0));
    guests[0].admin(sanitize()).unwrap();
    until(&mut guests, "the end of the operation", |guests| sanitize_log(&mut guests[0]).status == 1);
    drop(guests);
    let mut guests = powered(&[0, 1]);
    let logs = [0, 1].map(|index| sanitize_log(&mut guests[index]));
    assert_eq!((logs[0].status, logs[1].status), (1, 1));
}

#[test]
fn how_far_a_format_is_shows_everywhere_and_it_goes_on_in_a_controller_that_is_built_anew() {
    let control = Arc::new(FaultControl::default());
    let (mut guests, _) = two(&control);
    let subsystem = Arc::clone(guests[0].controller.subsystem());
    control.inject(Target::Write, 1, 1, Fault::Hold);
    guests[0].push(0, format(1));
    guests[0].ring(0);
    until(&mut guests, "the second request", |_| control.held() == 1);
    let remaining = |guest: &mut Guest, nsid| {
        IdentifyNamespace::from_bytes(&guest.identify(cns::NAMESPACE, nsid).unwrap()).fpi & 0x7f
    };
    for guest in &mut guests {
        assert_eq!((remaining(guest, 1), remaining(guest, 2)), (1, 0), "percents");
    }
    control.release_held();
    // The machine around it is reset.
    guests[0] = member(&subsystem, 0);
    until(&mut guests, "the end of the format", |guests| remaining(&mut guests[1], 1) == 0);
    for guest in &mut guests {
        let page = guest.pages(1);
        guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    }
}

#[test]
fn all_controllers_come_to_a_standstill_together() {
    let store = Memory::new(1 << 20);
    let namespaces = [namespace(1, 64)];
    let subsystem = Subsystem::with_store("SHARED", &namespaces, true, store as _, None).unwrap();
    let mut guests = pair(&subsystem);
    let entry = attachment_entry(&mut guests[0], attachment::DETACH, 1, &[0, 1]);
    let cid = guests[0].push(0, entry);
    guests[0].ring(0);
    guests[0].run();
    assert!(guests[0].reap(0).is_empty(), "the other has to follow");
    let alone = guests[0].controller.pause(Instant::now() + Duration::from_millis(20));
    assert!(matches!(alone, Err(Error::PauseTimeout { in_flight: 0 })));
    let controllers = guests.each_ref().map(|guest| &*guest.controller);
    Controller::pause_all(&controllers, Instant::now() + PATIENCE).unwrap();
    assert!(guests.iter().all(|guest| guest.controller.is_quiet()));
    assert_eq!(guests[0].reap(0).iter().map(|entry| entry.cid).collect::<Vec<_>>(), [cid]);
}

#[test]
fn a_namespace_of_the_hosts_is_attached_to_those_that_it_is_for() {
    let namespaces = [1, 2, 3].map(|nsid| namespace(nsid, 8));
    let attached = |guest: &mut Guest| super::namespaces::list(guest, cns::ACTIVE_NAMESPACES);
    let subsystem = Subsystem::new("SHARED", &namespaces, true).unwrap();
    subsystem.attach_at_first(2, [1]);
    subsystem.attach_at_first(3, []);
    let mut guests = pair(&subsystem);
    assert_eq!([attached(&mut guests[0]), attached(&mut guests[1])], [vec![1], vec![1, 2]]);
    subsystem.add_for(&namespace(9, 8), &[0]).unwrap();
    run(&guests);
    assert_eq!([attached(&mut guests[0]), attached(&mut guests[1])], [vec![1, 9], vec![1, 2]]);
    let error = subsystem.add_for(&namespace(10, 8), &[0, 2]).unwrap_err().to_string();
    assert!(error.contains("controller 2, which is not there"), "{error}");
    // Where there is a store, the guest's attachments hold for those that it has had, and a new one is for whom it is for.
    let store = Memory::new(1 << 20);
    let powered = |namespaces: &[NamespaceConfig], state| {
        let subsystem = Subsystem::with_store("SHARED", namespaces, true, store.clone() as _, state).unwrap();
        subsystem.attach_at_first(2, [1]);
        subsystem.attach_at_first(3, [0]);
        pair(&subsystem)
    };
    let mut guests = powered(&namespaces[..2], None);
    assert_eq!([attached(&mut guests[0]), attached(&mut guests[1])], [vec![1], vec![1, 2]]);
    for (select, nsid, id) in [(attachment::ATTACH, 2, 0), (attachment::DETACH, 1, 1)] {
        let entry = attachment_entry(&mut guests[0], select, nsid, &[id]);
        admin_of(&mut guests, 0, entry).unwrap();
    }
    drop(guests);
    let mut guests = powered(&namespaces, store.state());
    assert_eq!([attached(&mut guests[0]), attached(&mut guests[1])], [vec![1, 2, 3], vec![2]]);
    // Built anew on the same subsystem they have what they had.
    let subsystem = Arc::clone(guests[0].controller.subsystem());
    let entry = attachment_entry(&mut guests[0], attachment::DETACH, 3, &[0]);
    admin_of(&mut guests, 0, entry).unwrap();
    drop(guests);
    let mut guests = pair(&subsystem);
    assert_eq!([attached(&mut guests[0]), attached(&mut guests[1])], [vec![1, 2], vec![2]]);
}

pub fn attachment_entry(guest: &mut Guest, select: u32, nsid: u32, ids: &[u16]) -> SubmissionEntry {
    let words: Vec<u8> = [ids.len() as u16].iter().chain(ids).flat_map(|word| word.to_le_bytes()).collect();
    let prp1 = guest.pages(1);
    guest.write_bytes(prp1, &words);
    SubmissionEntry {
        opcode: admin::NAMESPACE_ATTACHMENT,
        nsid,
        prp1,
        cdw10: select,
        ..SubmissionEntry::default()
    }
}

fn reserve(guest: &mut Guest, nsid: u32, opcode: u8, cdw10: u32, keys: [u64; 2]) -> Result<(), Status> {
    let prp1 = guest.pages(1);
    guest.write_bytes(prp1, &keys.map(u64::to_le_bytes).concat());
    guest.io(1, SubmissionEntry { opcode, nsid, prp1, cdw10, ..SubmissionEntry::default() })
}

#[test]
fn reservations_keep_admin_commands_from_a_namespace_as_they_do_writes() {
    let store = Memory::new(1 << 20);
    let subsystem = Subsystem::with_store("SHARED", &[namespace(9, 64)], true, store as _, None).unwrap();
    let mut guests = pair(&subsystem);
    // Two of the guest's, shared; the first is reserved.
    let mut data = [0; 4096];
    (data[0], data[8], data[30]) = (16, 16, 1);
    let page = guests[0].pages(1);
    guests[0].write_bytes(page, &data);
    let create = SubmissionEntry {
        opcode: admin::NAMESPACE_MANAGEMENT,
        prp1: page,
        cdw10: management::CREATE,
        ..SubmissionEntry::default()
    };
    for nsid in [1, 2] {
        assert_eq!(admin_of(&mut guests, 0, create), Ok(nsid));
        let entry = attachment_entry(&mut guests[0], attachment::ATTACH, nsid, &[0, 1]);
        admin_of(&mut guests, 0, entry).unwrap();
    }
    let delete = |nsid| SubmissionEntry { nsid, cdw10: management::DELETE, ..create };
    for kind in 1..=6 {
        for registered in [false, true] {
            reserve(&mut guests[0], 1, nvm::RESERVATION_REGISTER, spec::REGISTER, [0, 1]).unwrap();
            if registered {
                reserve(&mut guests[1], 1, nvm::RESERVATION_REGISTER, spec::REGISTER, [0, 2]).unwrap();
            }
            reserve(&mut guests[0], 1, nvm::RESERVATION_ACQUIRE, spec::ACQUIRE | kind << 8, [1, 0]).unwrap();
            // The figure: C for everybody but the holder, and of the last four types but registrants.
            let expected = if registered && kind > 2 { Ok(0) } else { Err(Status::RESERVATION_CONFLICT) };
            let case = format!("type {kind}, registered: {registered}");
            assert_eq!(admin_of(&mut guests, 1, format(1)), expected, "{case}");
            assert_eq!(admin_of(&mut guests, 1, format(NSID_BROADCAST)), expected, "{case}");
            let detach = attachment_entry(&mut guests[1], attachment::DETACH, 1, &[1]);
            assert_eq!(admin_of(&mut guests, 1, detach), expected, "{case}");
            if expected.is_ok() {
                let attach = attachment_entry(&mut guests[1], attachment::ATTACH, 1, &[1]);
                admin_of(&mut guests, 1, attach).unwrap();
            }
            assert_eq!(admin_of(&mut guests, 1, sanitize()), expected, "{case}");
            until(&mut guests, "the end of the operation", |guests| {
                sanitize_log(&mut guests[0]).status & 7 != 2
            });
            if expected.is_err() {
                for nsid in [1, NSID_BROADCAST] {
                    assert_eq!(admin_of(&mut guests, 1, delete(nsid)), expected, "{case}");
                }
            }
            // What is about another namespace is not concerned, nor is the holder.
            assert_eq!(admin_of(&mut guests, 1, format(2)), Ok(0), "{case}");
            assert_eq!(admin_of(&mut guests, 0, format(1)), Ok(0), "{case}");
            reserve(&mut guests[0], 1, nvm::RESERVATION_RELEASE, spec::CLEAR, [1, 0]).unwrap();
        }
    }
    reserve(&mut guests[0], 1, nvm::RESERVATION_REGISTER, spec::REGISTER, [0, 1]).unwrap();
    reserve(&mut guests[0], 1, nvm::RESERVATION_ACQUIRE, spec::ACQUIRE | 1 << 8, [1, 0]).unwrap();
    assert_eq!(admin_of(&mut guests, 0, delete(1)), Ok(0));
    assert_eq!(guests[0].controller.pool.shared.gate.drains.load(Ordering::SeqCst), 0);
}

#[test]
fn where_there_is_no_access_what_goes_to_the_namespace_is_refused() {
    let (mut guests, _) = two(&Arc::default());
    let subsystem = Arc::clone(guests[0].controller.subsystem());
    let states = [
        (AccessState::NonOptimized, None),
        (AccessState::Inaccessible, Some(Status::ACCESS_INACCESSIBLE)),
        (AccessState::PersistentLoss, Some(Status::ACCESS_PERSISTENT_LOSS)),
        (AccessState::Change, Some(Status::ACCESS_TRANSITION)),
    ];
    for (state, status) in states {
        subsystem.set_access(1, 1, state).unwrap();
        let expected = status.map_or(Ok(()), Err);
        let features = [
            feature::ERROR_RECOVERY,
            feature::RESERVATION_NOTIFICATION_MASK,
            feature::RESERVATION_PERSISTENCE,
        ];
        for id in features {
            let entry = |opcode, nsid| SubmissionEntry {
                opcode,
                nsid,
                cdw10: id.into(),
                ..SubmissionEntry::default()
            };
            for opcode in [admin::GET_FEATURES, admin::SET_FEATURES] {
                let outcome = guests[1].admin(entry(opcode, 1)).map(drop);
                assert_eq!(outcome, expected, "{state:?}, opcode {opcode:#x}, feature {id:#x}");
                guests[1].admin(entry(opcode, 2)).unwrap();
                guests[0].admin(entry(opcode, 1)).unwrap();
            }
            let all = guests[1].admin(entry(admin::SET_FEATURES, NSID_BROADCAST)).map(drop);
            assert_eq!(all, expected, "{state:?}, feature {id:#x}");
        }
        let test =
            SubmissionEntry { opcode: admin::DEVICE_SELF_TEST, nsid: 1, cdw10: 1, ..Default::default() };
        assert_eq!(admin_of(&mut guests, 1, test).map(drop), expected);
        until(&mut guests, "the end of the test", |guests| {
            log_page::<564>(&mut guests[1], log_id::DEVICE_SELF_TEST).unwrap()[0] == 0
        });
        for nsid in [1, NSID_BROADCAST] {
            assert_eq!(admin_of(&mut guests, 1, format(nsid)).map(drop), expected, "{state:?}");
        }
        admin_of(&mut guests, 1, format(2)).unwrap();
        let used = |guest: &mut Guest, nsid| {
            let page = IdentifyNamespace::from_bytes(&guest.identify(cns::NAMESPACE, nsid).unwrap());
            (page.nuse == 0, page.nsze > 0)
        };
        // A host that finds no capacity at all would take the namespace for removed.
        let is_lost = matches!(state, AccessState::Inaccessible | AccessState::PersistentLoss);
        assert_eq!(used(&mut guests[1], 1), (is_lost, true), "{state:?}");
        assert_eq!([used(&mut guests[1], 2), used(&mut guests[0], 1)], [(false, true); 2]);
    }
    // What was set holds for a controller that is built anew.
    drop(guests);
    let mut guest = member(&subsystem, 1);
    let page = guest.pages(1);
    assert_eq!(guest.io(1, transfer(nvm::READ, 1, 0, 1, page)), Err(Status::ACCESS_TRANSITION));
    assert_eq!(subsystem.access(1)[..2], [AccessState::Change, AccessState::Optimized]);
}
