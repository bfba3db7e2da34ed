//! Namespace Management and Namespace Attachment, by one controller and by two.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Fault, Target};
use nvme_spec::event::Event;
use nvme_spec::identify::{
    IdentifyController, IdentifyNamespace, OACS_NAMESPACE_MANAGEMENT, OAES_NAMESPACE_ATTRIBUTE, cns,
};
use nvme_spec::opcode::{admin, attachment, management, nvm};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, feature, log, regs};

use super::driver::{Guest, namespace, transfer};
use super::store::{Memory, controller_in, guest_in, managed, migrate_managed};
use crate::{ControllerConfig, Error, Subsystem};

mod kept;

const QUOTA_BYTES: u64 = 1 << 20;
/// CDW11 of a deallocating Dataset Management.
const DEALLOCATE: u32 = 1 << 2;

fn config() -> ControllerConfig {
    ControllerConfig::new("NS")
}

/// A guest that may manage 1 MiB beside namespace 2 of the host, with an I/O queue pair.
fn ready(store: &Arc<Memory>) -> Guest {
    let mut guest = managed(&config(), &[namespace(2, 64)], store);
    guest.create_pair(1, 16);
    guest
}

/// The data of a create: so many blocks, in a format.
fn creation(blocks: u64, format: u8) -> Vec<u8> {
    let mut data = vec![0; 4096];
    data[..8].copy_from_slice(&blocks.to_le_bytes());
    data[8..16].copy_from_slice(&blocks.to_le_bytes());
    data[26] = format;
    data
}

fn create_from(guest: &mut Guest, data: &[u8]) -> Result<u32, Status> {
    let page = guest.pages(1);
    guest.write_bytes(page, data);
    guest.admin(SubmissionEntry {
        opcode: admin::NAMESPACE_MANAGEMENT,
        prp1: page,
        cdw10: management::CREATE,
        ..SubmissionEntry::default()
    })
}

fn create(guest: &mut Guest, blocks: u64, format: u8) -> Result<u32, Status> {
    create_from(guest, &creation(blocks, format))
}

fn deletion(nsid: u32) -> SubmissionEntry {
    SubmissionEntry {
        opcode: admin::NAMESPACE_MANAGEMENT,
        nsid,
        cdw10: management::DELETE,
        ..SubmissionEntry::default()
    }
}

fn attachment_of(guest: &mut Guest, select: u32, nsid: u32, controllers: &[u16]) -> SubmissionEntry {
    let mut data = vec![0; 4096];
    data[..2].copy_from_slice(&(controllers.len() as u16).to_le_bytes());
    for (place, id) in data[2..].as_chunks_mut::<2>().0.iter_mut().zip(controllers) {
        *place = id.to_le_bytes();
    }
    let page = guest.pages(1);
    guest.write_bytes(page, &data);
    SubmissionEntry {
        opcode: admin::NAMESPACE_ATTACHMENT,
        nsid,
        prp1: page,
        cdw10: select,
        ..SubmissionEntry::default()
    }
}

fn attach(guest: &mut Guest, nsid: u32, controllers: &[u16]) -> Result<u32, Status> {
    let entry = attachment_of(guest, attachment::ATTACH, nsid, controllers);
    guest.admin(entry)
}

fn detach(guest: &mut Guest, nsid: u32, controllers: &[u16]) -> Result<u32, Status> {
    let entry = attachment_of(guest, attachment::DETACH, nsid, controllers);
    guest.admin(entry)
}

pub fn list(guest: &mut Guest, cns: u8) -> Vec<u32> {
    let page = guest.identify(cns, 0).unwrap();
    let all = page.as_chunks::<4>().0.iter().map(|id| u32::from_le_bytes(*id));
    all.take_while(|id| *id != 0).collect()
}

fn controllers_of(guest: &mut Guest, nsid: u32) -> Vec<u16> {
    let page = guest.identify(cns::ATTACHED_CONTROLLERS, nsid).unwrap();
    let words: Vec<u16> = page.as_chunks::<2>().0.iter().map(|id| u16::from_le_bytes(*id)).collect();
    words[1..=usize::from(words[0])].to_vec()
}

fn about(guest: &mut Guest, cns: u8, nsid: u32) -> IdentifyNamespace {
    IdentifyNamespace::from_bytes(&guest.identify(cns, nsid).unwrap())
}

pub fn changed(guest: &mut Guest) -> Vec<u32> {
    let get = SubmissionEntry {
        opcode: admin::GET_LOG_PAGE,
        cdw10: u32::from(log::id::CHANGED_NAMESPACES) | 1023 << 16,
        ..SubmissionEntry::default()
    };
    let page: [u8; 4096] = guest.admin_data(get).unwrap();
    page.as_chunks::<4>().0.iter().map(|id| u32::from_le_bytes(*id)).take_while(|id| *id != 0).collect()
}

/// Asks for events of namespaces, and parks a request for them.
pub fn listen(guest: &mut Guest) -> u16 {
    guest
        .admin(SubmissionEntry {
            opcode: admin::SET_FEATURES,
            cdw10: feature::ASYNC_EVENT_CONFIGURATION.into(),
            cdw11: OAES_NAMESPACE_ATTRIBUTE,
            ..SubmissionEntry::default()
        })
        .unwrap();
    let cid =
        guest.push(0, SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() });
    guest.ring(0);
    guest.run();
    cid
}

fn read(guest: &mut Guest, nsid: u32, lba: u64) -> Result<u8, Status> {
    let page = guest.pages(1);
    guest.write_bytes(page, &[0xee; 4096]);
    guest.io(1, transfer(nvm::READ, nsid, lba, 1, page))?;
    Ok(guest.read_bytes(page, 1)[0])
}

fn write(guest: &mut Guest, nsid: u32, lba: u64, value: u8) -> Result<(), Status> {
    let page = guest.pages(1);
    guest.write_bytes(page, &[value; 4096]);
    guest.io(1, transfer(nvm::WRITE, nsid, lba, 1, page))
}

#[test]
fn a_namespace_is_created_attached_used_and_deleted() {
    let store = Memory::new(QUOTA_BYTES);
    let mut guest = ready(&store);
    let controller = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
    assert_eq!(controller.oacs & OACS_NAMESPACE_MANAGEMENT, OACS_NAMESPACE_MANAGEMENT);
    assert_eq!(controller.tnvmcap, u128::from(QUOTA_BYTES) + 64 * 512);
    assert_eq!(controller.unvmcap, u128::from(QUOTA_BYTES));
    // What is common to all namespaces.
    assert_eq!(about(&mut guest, cns::NAMESPACE, NSID_BROADCAST).nlbaf, 4);

    assert_eq!(create(&mut guest, 16, 1), Ok(1), "the lowest that is free");
    assert_eq!(create(&mut guest, 100, 0), Ok(3));
    assert_eq!(list(&mut guest, cns::ALLOCATED_NAMESPACES), [1, 2, 3]);
    assert_eq!(list(&mut guest, cns::ACTIVE_NAMESPACES), [2]);
    assert_eq!(about(&mut guest, cns::NAMESPACE, 1), IdentifyNamespace::default(), "inactive");
    let allocated = about(&mut guest, cns::ALLOCATED_NAMESPACE, 1);
    assert_eq!((allocated.nsze, allocated.ncap, allocated.flbas), (16, 16, 1));
    assert_eq!(allocated.nvmcap, 16 * 4096);
    assert!(controllers_of(&mut guest, 1).is_empty());
    assert_eq!(read(&mut guest, 1, 0), Err(Status::INVALID_FIELD), "it is not attached");
    let controller = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
    assert_eq!(controller.unvmcap, u128::from(QUOTA_BYTES) - 16 * 4096 - 100 * 512);

    attach(&mut guest, 1, &[0]).unwrap();
    assert_eq!(controllers_of(&mut guest, 1), [0]);
    assert_eq!(list(&mut guest, cns::ACTIVE_NAMESPACES), [1, 2]);
    assert_eq!(about(&mut guest, cns::NAMESPACE, 1), allocated);
    assert_eq!(read(&mut guest, 1, 15), Ok(0), "it begins with zeroes");
    write(&mut guest, 1, 15, 7).unwrap();
    assert_eq!(read(&mut guest, 1, 15), Ok(7));
    assert_eq!(read(&mut guest, 1, 16), Err(Status::LBA_OUT_OF_RANGE));

    guest.admin(deletion(1)).unwrap();
    assert_eq!(read(&mut guest, 1, 0), Err(Status::INVALID_FIELD));
    assert_eq!(list(&mut guest, cns::ALLOCATED_NAMESPACES), [2, 3]);
    assert_eq!(store.images(), 1, "the image went with the namespace");
    assert_eq!(create(&mut guest, 16, 1), Ok(1));
    attach(&mut guest, 1, &[0]).unwrap();
    let again = about(&mut guest, cns::NAMESPACE, 1);
    assert_ne!((again.nguid, again.eui64), (allocated.nguid, allocated.eui64), "it is another namespace");
    assert_eq!(read(&mut guest, 1, 15), Ok(0), "and has nothing of the first");
}

#[test]
fn what_cannot_be_created_is_refused_and_why() {
    let store = Memory::new(QUOTA_BYTES);
    let mut guest = ready(&store);
    let writes = store.writes.load(Ordering::SeqCst);
    type Change = fn(&mut Vec<u8>);
    let cases: [(&str, Change, Status); 11] = [
        ("no size", |data| data[..16].fill(0), Status::INVALID_FIELD),
        ("more capacity than size", |data| data[8] = 17, Status::INVALID_FIELD),
        ("thin provisioning", |data| data[8] = 15, Status::THIN_PROVISIONING_NOT_SUPPORTED),
        ("no such format", |data| data[26] = 5, Status::INVALID_FORMAT),
        ("a format beyond the first sixteen", |data| data[26] = 1 << 5, Status::INVALID_FORMAT),
        ("metadata that are not there in the data", |data| data[26] = 1 << 4, Status::INVALID_FIELD),
        ("protection information without room", |data| data[29] = 1, Status::INVALID_FORMAT),
        ("shared, with nobody", |data| data[30] = 1, Status::INVALID_FIELD),
        ("an NVM set", |data| data[100] = 1, Status::INVALID_FIELD),
        ("an endurance group", |data| data[102] = 1, Status::INVALID_FIELD),
        ("a mask of storage tags", |data| data[384] = 1, Status::INVALID_FIELD),
    ];
    for (what, change, status) in cases {
        let mut data = creation(16, 0);
        change(&mut data);
        assert_eq!(create_from(&mut guest, &data), Err(status), "{what}");
    }
    let entry = SubmissionEntry { opcode: admin::NAMESPACE_MANAGEMENT, ..SubmissionEntry::default() };
    assert_eq!(
        guest.admin(SubmissionEntry { cdw10: 2, ..entry }),
        Err(Status::INVALID_FIELD),
        "no such selection"
    );
    let other_set = SubmissionEntry { cdw11: 2 << 24, ..entry };
    assert_eq!(guest.admin(other_set), Err(Status::IO_COMMAND_SET_NOT_SUPPORTED));
    for blocks in [QUOTA_BYTES / 512 + 1, u64::MAX, u64::MAX / 512 + 1] {
        assert_eq!(create(&mut guest, blocks, 0), Err(Status::NAMESPACE_INSUFFICIENT_CAPACITY), "{blocks}");
    }
    let get = SubmissionEntry {
        opcode: admin::GET_LOG_PAGE,
        cdw10: u32::from(log::id::ERROR_INFORMATION) | 47 << 16,
        ..SubmissionEntry::default()
    };
    let log_page: [u8; 192] = guest.admin_data(get).unwrap();
    let oldest = log::ErrorEntry::from_bytes(log_page[128..].try_into().unwrap());
    assert_eq!(oldest.command_specific, QUOTA_BYTES + 512, "how much it would need");
    assert_eq!((store.images(), store.writes.load(Ordering::SeqCst)), (0, writes), "nothing has changed");
    // A thousand and twenty-three beside that of the host, and no more.
    let store = Memory::new(1 << 30);
    let mut guest = ready(&store);
    let page = guest.pages(1);
    guest.write_bytes(page, &creation(1, 0));
    let entry = SubmissionEntry { prp1: page, ..entry };
    let created: Vec<_> = (0..1024).map(|_| guest.admin(entry)).collect();
    assert_eq!(created.iter().filter(|created| created.is_ok()).count(), 1023);
    assert_eq!(created[1023], Err(Status::NAMESPACE_IDENTIFIER_UNAVAILABLE));
}

#[test]
fn what_cannot_be_attached_or_deleted_is_refused_and_why() {
    let store = Memory::new(QUOTA_BYTES);
    let mut guest = ready(&store);
    assert_eq!(create(&mut guest, 16, 0), Ok(1));
    for (nsid, controllers, status) in [
        (1, &[][..], Status::CONTROLLER_LIST_INVALID),
        (1, &[1], Status::CONTROLLER_LIST_INVALID),
        (1, &[0, 0], Status::CONTROLLER_LIST_INVALID),
        (1, &[0, 7], Status::CONTROLLER_LIST_INVALID),
        (9, &[0], Status::INVALID_FIELD),
        (0, &[0], Status::INVALID_NAMESPACE),
        (1025, &[0], Status::INVALID_NAMESPACE),
        (NSID_BROADCAST, &[0], Status::INVALID_NAMESPACE),
        (2, &[0], Status::NAMESPACE_ALREADY_ATTACHED),
    ] {
        assert_eq!(attach(&mut guest, nsid, controllers), Err(status), "{nsid} {controllers:?}");
    }
    assert_eq!(detach(&mut guest, 1, &[0]), Err(Status::NAMESPACE_NOT_ATTACHED));
    let long = attachment_of(&mut guest, attachment::ATTACH, 1, &[0; 2047]);
    guest.write_bytes(long.prp1, &2048u16.to_le_bytes());
    assert_eq!(guest.admin(long), Err(Status::CONTROLLER_LIST_INVALID));
    assert_eq!(guest.admin(SubmissionEntry { cdw10: 2, ..long }), Err(Status::CONTROLLER_LIST_INVALID));
    let selection = attachment_of(&mut guest, 2, 1, &[0]);
    assert_eq!(guest.admin(selection), Err(Status::INVALID_FIELD));

    assert_eq!(guest.admin(deletion(9)), Err(Status::INVALID_FIELD));
    assert_eq!(guest.admin(deletion(0)), Err(Status::INVALID_NAMESPACE));
    assert_eq!(guest.admin(deletion(2)), Err(Status::OPERATION_DENIED), "it is the host's");
    assert_eq!(guest.admin(deletion(NSID_BROADCAST)), Err(Status::OPERATION_DENIED), "all or none");
    assert_eq!(list(&mut guest, cns::ALLOCATED_NAMESPACES), [1, 2]);
    // The host's can be detached, and with nothing of the host's all can be deleted at once.
    detach(&mut guest, 2, &[0]).unwrap();
    assert_eq!(list(&mut guest, cns::ACTIVE_NAMESPACES), [0u32; 0]);
    let mut guest = managed(&config(), &[], &Memory::new(QUOTA_BYTES));
    for _ in 0..3 {
        create(&mut guest, 16, 0).unwrap();
    }
    guest.admin(deletion(NSID_BROADCAST)).unwrap();
    assert_eq!(list(&mut guest, cns::ALLOCATED_NAMESPACES), [0u32; 0]);
    guest.admin(deletion(NSID_BROADCAST)).unwrap();
}

#[test]
fn the_host_hears_of_changes_once_until_it_reads_what_changed() {
    let mut guest = ready(&Memory::new(QUOTA_BYTES));
    let request = listen(&mut guest);
    assert_eq!(create(&mut guest, 16, 0), Ok(1));
    assert!(changed(&mut guest).is_empty(), "nothing that is attached has changed");
    let attach = attachment_of(&mut guest, attachment::ATTACH, 1, &[0]);
    guest.push(0, attach);
    guest.ring(0);
    guest.run();
    let completions = guest.reap(0);
    assert_eq!(completions.len(), 2, "{completions:?}");
    let event = completions.iter().find(|completion| completion.cid == request).unwrap();
    assert_eq!(event.dw0, Event::NAMESPACE_CHANGED.to_dword());
    // A second request gets nothing before the log is read.
    listen(&mut guest);
    detach(&mut guest, 2, &[0]).unwrap();
    let get = SubmissionEntry {
        opcode: admin::GET_LOG_PAGE,
        cdw10: u32::from(log::id::CHANGED_NAMESPACES) | 1 << 16,
        ..SubmissionEntry::default()
    };
    guest.push(0, get);
    guest.ring(0);
    guest.run();
    assert_eq!(guest.reap(0).len(), 2, "the log page and the event that waited for its reading");
}

#[test]
fn commands_in_flight_at_a_namespace_that_goes_end_before_it_is_gone() {
    for what in ["detach", "delete"] {
        let store = Memory::new(QUOTA_BYTES);
        let mut guest = ready(&store);
        assert_eq!(create(&mut guest, 64, 0), Ok(1));
        attach(&mut guest, 1, &[0]).unwrap();
        let page = guest.pages(2);
        store.faults.inject(Target::Any, 0, 2, Fault::Hold);
        guest.write_bytes(page, &[5; 4096]);
        // A write, and a deallocation whose second range comes too late.
        let single = guest.push(1, transfer(nvm::WRITE, 1, 3, 1, page));
        let ranges: Vec<u8> = [(8u32, 0u64), (8, 16)]
            .iter()
            .flat_map(|(blocks, lba)| [&[0; 4][..], &blocks.to_le_bytes(), &lba.to_le_bytes()].concat())
            .collect();
        guest.write_bytes(page + 4096, &ranges);
        let several = guest.push(
            1,
            SubmissionEntry {
                opcode: nvm::DATASET_MANAGEMENT,
                nsid: 1,
                prp1: page + 4096,
                cdw10: 1,
                cdw11: DEALLOCATE,
                ..SubmissionEntry::default()
            },
        );
        guest.ring(1);
        guest.run();
        assert_eq!(store.faults.held(), 2);
        let entry = match what {
            "detach" => attachment_of(&mut guest, attachment::DETACH, 1, &[0]),
            _ => deletion(1),
        };
        let cid = guest.push(0, entry);
        guest.ring(0);
        guest.run();
        assert!(guest.reap(0).is_empty(), "{what}: it waits");
        assert_eq!(store.images(), 1);
        assert_eq!(read(&mut guest, 1, 0), Err(Status::INVALID_FIELD), "{what}: but takes no more");
        assert_eq!(read(&mut guest, 2, 0), Ok(0), "{what}: others do not wait");
        if what == "delete" {
            assert_eq!(create(&mut guest, 16, 0), Ok(3), "its identifier is not free yet");
        }
        store.faults.release_held();
        let mut ended = Vec::new();
        guest.run_until("the ends", |guest| {
            ended.extend(guest.reap(1));
            ended.len() == 2
        });
        let status = |cid| ended.iter().find(|entry| entry.cid == cid).unwrap().status();
        assert!(status(single).is_success(), "{what}: it had been begun");
        assert_eq!(status(several).code(), Status::INVALID_FIELD, "{what}: it was not done as a whole");
        guest.run();
        let answers = guest.reap(0);
        assert_eq!(answers.iter().map(|answer| answer.cid).collect::<Vec<_>>(), [cid], "{what}");
        if what == "detach" {
            attach(&mut guest, 1, &[0]).unwrap();
            assert_eq!(read(&mut guest, 1, 3), Ok(5));
        } else {
            assert_eq!(create(&mut guest, 16, 0), Ok(1), "now it is");
        }
    }
}

#[test]
fn a_reset_forgets_who_waits_for_a_deletion_but_not_the_deletion() {
    let store = Memory::new(QUOTA_BYTES);
    let mut guest = ready(&store);
    assert_eq!(create(&mut guest, 64, 0), Ok(1));
    attach(&mut guest, 1, &[0]).unwrap();
    let page = guest.pages(1);
    store.faults.inject(Target::Any, 0, 1, Fault::Hold);
    guest.push(1, transfer(nvm::WRITE, 1, 3, 1, page));
    guest.ring(1);
    guest.run();
    guest.push(0, deletion(1));
    guest.ring(0);
    guest.run();
    guest.write32(regs::CC, 0x0046_0000);
    guest.run();
    assert_eq!(store.images(), 1);
    assert_eq!(store.state().unwrap().allocations.namespaces.len(), 1, "the host's");
    store.faults.release_held();
    guest.run();
    assert_eq!((store.images(), guest.read32(regs::CSTS)), (0, 0));
    guest.enable();
    assert_eq!(list(&mut guest, cns::ALLOCATED_NAMESPACES), [2]);
}

#[test]
fn what_the_store_does_not_take_has_not_happened() {
    let store = Memory::new(QUOTA_BYTES);
    let mut guest = ready(&store);
    assert_eq!(create(&mut guest, 16, 0), Ok(1));
    store.breaks.store(true, Ordering::SeqCst);
    assert_eq!(create(&mut guest, 16, 0), Err(Status::INTERNAL_ERROR));
    assert_eq!(store.images(), 1);
    assert_eq!(attach(&mut guest, 1, &[0]), Err(Status::INTERNAL_ERROR));
    assert_eq!(guest.admin(deletion(1)), Err(Status::INTERNAL_ERROR));
    assert_eq!(list(&mut guest, cns::ALLOCATED_NAMESPACES), [1, 2]);
    assert_eq!(list(&mut guest, cns::ACTIVE_NAMESPACES), [2]);
    store.breaks.store(false, Ordering::SeqCst);
    attach(&mut guest, 1, &[0]).unwrap();
    assert_eq!(read(&mut guest, 1, 0), Ok(0));
}

#[test]
fn without_power_namespaces_attachments_and_counters_are_kept() {
    let store = Memory::new(QUOTA_BYTES);
    let mut guest = ready(&store);
    assert_eq!(create(&mut guest, 16, 0), Ok(1));
    assert_eq!(create(&mut guest, 16, 1), Ok(3));
    attach(&mut guest, 3, &[0]).unwrap();
    detach(&mut guest, 2, &[0]).unwrap();
    write(&mut guest, 3, 9, 0x5a).unwrap();
    let before = about(&mut guest, cns::ALLOCATED_NAMESPACE, 3);
    let set = |id: u8, nsid, value| SubmissionEntry {
        opcode: admin::SET_FEATURES,
        nsid,
        cdw10: u32::from(id),
        cdw11: value,
        ..SubmissionEntry::default()
    };
    let save = SubmissionEntry { cdw10: 4 | feature::SAVE, ..set(feature::TEMPERATURE_THRESHOLD, 0, 350) };
    guest.admin(save).unwrap();
    guest.admin(set(feature::NAMESPACE_WRITE_PROTECTION, 3, feature::WRITE_PROTECT)).unwrap();
    detach(&mut guest, 3, &[0]).unwrap();
    attach(&mut guest, 3, &[0]).unwrap();
    guest.controller.persist().unwrap();
    drop(guest);
    let mut guest = ready(&store);
    let get = SubmissionEntry { opcode: admin::GET_FEATURES, cdw10: 4, ..SubmissionEntry::default() };
    assert_eq!(guest.admin(get), Ok(350));
    assert_eq!(write(&mut guest, 3, 9, 1), Err(Status::NAMESPACE_WRITE_PROTECTED));
    assert_eq!(list(&mut guest, cns::ALLOCATED_NAMESPACES), [1, 2, 3]);
    assert_eq!(list(&mut guest, cns::ACTIVE_NAMESPACES), [3]);
    assert_eq!(about(&mut guest, cns::NAMESPACE, 3), IdentifyNamespace { nsattr: 1, ..before });
    assert_eq!(read(&mut guest, 3, 9), Ok(0x5a));
    let get = SubmissionEntry {
        opcode: admin::GET_LOG_PAGE,
        nsid: NSID_BROADCAST,
        cdw10: u32::from(log::id::SMART) | 127 << 16,
        ..SubmissionEntry::default()
    };
    let smart = log::SmartLog::from_bytes(&guest.admin_data(get).unwrap());
    assert_eq!((smart.host_write_commands, smart.power_cycles), (1, 2));
    // What the host gives no more is gone, and what it gives anew is attached.
    drop(guest);
    let mut guest = managed(&config(), &[namespace(7, 8)], &store);
    assert_eq!(list(&mut guest, cns::ALLOCATED_NAMESPACES), [1, 3, 7]);
    assert_eq!(list(&mut guest, cns::ACTIVE_NAMESPACES), [3, 7]);
    drop(guest);
    let refused = |namespaces: &[_]| {
        Subsystem::with_store("NS", namespaces, false, Arc::clone(&store) as _, store.state()).err().unwrap()
    };
    let error = refused(&[namespace(3, 8)]).to_string();
    assert!(error.contains("namespace 3") && error.contains("the guest has created one"), "{error}");
    store.lose_images();
    assert!(matches!(refused(&[]), Error::NamespaceImage { nsid: 1, .. }));
}

/// What a guest sees of its namespaces.
fn sight(guest: &mut Guest) -> Vec<String> {
    let mut seen = vec![
        format!("{:?}", list(guest, cns::ALLOCATED_NAMESPACES)),
        format!("{:?}", list(guest, cns::ACTIVE_NAMESPACES)),
        format!("{:?}", IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap()).unvmcap),
    ];
    for nsid in list(guest, cns::ALLOCATED_NAMESPACES) {
        seen.push(format!(
            "{:?} {:?}",
            about(guest, cns::ALLOCATED_NAMESPACE, nsid),
            controllers_of(guest, nsid)
        ));
        seen.push(format!("{:?}", read(guest, nsid, 1)));
    }
    seen
}

#[test]
fn a_move_between_any_two_commands_is_not_noticed() {
    type Step = fn(&mut Guest);
    let steps: [Step; 9] = [
        |guest| assert_eq!(create(guest, 16, 0), Ok(1)),
        |guest| assert_eq!(create(guest, 32, 1), Ok(3)),
        |guest| assert_eq!(attach(guest, 1, &[0]), Ok(0)),
        |guest| assert_eq!(write(guest, 1, 1, 9), Ok(())),
        |guest| assert_eq!(detach(guest, 2, &[0]), Ok(0)),
        |guest| assert_eq!(guest.admin(deletion(3)), Ok(0)),
        |guest| assert_eq!(create(guest, 8, 0), Ok(3)),
        |guest| assert_eq!(attach(guest, 2, &[0]), Ok(0)),
        |guest| assert_eq!(detach(guest, 1, &[0]), Ok(0)),
    ];
    let run = |moves: &dyn Fn(usize) -> bool| {
        let store = Memory::new(QUOTA_BYTES);
        let mut guest = ready(&store);
        let mut seen = Vec::new();
        for (index, step) in steps.iter().enumerate() {
            step(&mut guest);
            if moves(index) {
                migrate_managed(&mut guest, &store).unwrap();
            }
            seen.push((sight(&mut guest), changed(&mut guest)));
        }
        seen
    };
    let unmoved = run(&|_| false);
    assert_eq!(run(&|_| true), unmoved);
    for at in 0..steps.len() {
        assert_eq!(run(&|index| index == at), unmoved, "moved after command {at}");
    }
}

#[test]
fn who_has_not_the_images_takes_nothing_over() {
    let store = Memory::new(QUOTA_BYTES);
    let mut guest = ready(&store);
    assert_eq!(create(&mut guest, 16, 0), Ok(1));
    let error = migrate_managed(&mut guest, &Memory::new(QUOTA_BYTES)).unwrap_err();
    let Error::NamespaceImage { nsid: 1, source } = &error else { panic!("{error}") };
    assert_eq!(source.to_string(), "there is no such image");
    // Without any store, and the other way round.
    let state = guest.controller.save();
    let plain = Guest::power_on(config(), vec![namespace(2, 64)]);
    let error = plain.controller.load(&state).unwrap_err();
    assert!(matches!(error, Error::Namespace { nsid: 1, .. }), "{error}");
    let plain = Guest::ready(config(), vec![namespace(2, 64)]);
    plain.controller.pause(std::time::Instant::now()).unwrap();
    let subsystem =
        Subsystem::with_store("NS", &[namespace(2, 64)], false, Memory::new(QUOTA_BYTES), None).unwrap();
    let managing = guest_in(&subsystem, &config(), &[]);
    let error = managing.controller.load(&plain.controller.save()).unwrap_err();
    assert!(matches!(&error, Error::State { field, .. } if field == "allocations"), "{error}");
}

#[test]
fn states_that_cannot_be_are_refused() {
    let store = Memory::new(QUOTA_BYTES);
    let mut guest = ready(&store);
    assert_eq!(create(&mut guest, 16, 0), Ok(1));
    guest.controller.pause(std::time::Instant::now()).unwrap();
    let good = guest.controller.save();
    type Change = fn(&mut crate::AllocationsState);
    let changes: [(&str, Change); 8] = [
        ("twice", |a| a.namespaces[1].shape.nsid = 1),
        ("no such identifier", |a| a.namespaces[0].shape.nsid = 0),
        ("no such identifier", |a| a.namespaces[0].shape.nsid = 1025),
        ("of the guest there, of the host here", |a| a.namespaces[1].created = true),
        ("no format", |a| (a.namespaces[0].shape.block_shift, a.namespaces[0].shape.uuid) = (10, [1; 16])),
        ("no size", |a| (a.namespaces[0].shape.blocks, a.namespaces[0].shape.uuid) = (u64::MAX, [1; 16])),
        ("size in blocks", |a| a.namespaces[1].shape.blocks = 63),
        ("not in order", |a| (a.namespaces[0].attached, a.namespaces[0].attached_count) = (vec![1, 0], 2)),
    ];
    for (reason, change) in changes {
        let mut state = good.clone();
        change(state.allocations.as_mut().unwrap());
        let subsystem =
            Subsystem::with_store("NS", &[namespace(2, 64)], false, Arc::clone(&store) as _, store.state());
        let other = guest_in(&subsystem.unwrap(), &config(), &[]);
        let error = other.controller.load(&state).unwrap_err().to_string();
        assert!(error.contains(reason), "{reason}: {error}");
    }
}

#[test]
fn two_controllers_share_a_namespace_and_hear_of_each_other() {
    let store = Memory::new(QUOTA_BYTES);
    let namespaces = [namespace(2, 64)];
    let subsystem = Subsystem::with_store("NS", &namespaces, true, Arc::clone(&store) as _, None).unwrap();
    let mut first = guest_in(&subsystem, &config(), &namespaces);
    first.enable();
    let mut second = controller_in(&subsystem, 5, &config());
    second.enable();
    second.create_pair(1, 16);
    assert_eq!(subsystem.controllers(), [0, 5]);
    assert_eq!(controllers_of(&mut second, 2), [0, 5], "the host's is with both");
    let mut data = creation(16, 0);
    assert_eq!(create_from(&mut first, &data), Ok(1));
    data[30] = 1;
    assert_eq!(create_from(&mut first, &data), Ok(3));
    assert_eq!(attach(&mut first, 1, &[0, 5]), Err(Status::NAMESPACE_IS_PRIVATE));
    let to_second = attachment_of(&mut first, attachment::ATTACH, 1, &[5]);
    first.push(0, to_second);
    first.ring(0);
    first.run();
    second.run();
    first.run();
    assert!(first.reap(0)[0].status().is_success());
    assert_eq!(attach(&mut first, 1, &[0]), Err(Status::NAMESPACE_IS_PRIVATE));

    let request = listen(&mut second);
    let entry = attachment_of(&mut first, attachment::ATTACH, 3, &[0, 5]);
    let cid = first.push(0, entry);
    first.ring(0);
    first.run();
    assert!(first.reap(0).is_empty(), "it is attached when the other has it");
    second.run();
    first.run();
    assert_eq!(first.reap(0).iter().map(|entry| entry.cid).collect::<Vec<_>>(), [cid]);
    let event = second.reap(0);
    assert_eq!((event[0].cid, event[0].dw0), (request, Event::NAMESPACE_CHANGED.to_dword()));
    assert_eq!(changed(&mut second), [1, 3], "of the one before it was not told, but it is in the list");
    write(&mut second, 3, 1, 0x77).unwrap();

    // A deletion waits for the other's commands.
    let page = second.pages(1);
    store.faults.inject(Target::Any, 0, 1, Fault::Hold);
    second.push(1, transfer(nvm::READ, 3, 1, 1, page));
    second.ring(1);
    second.run();
    first.push(0, deletion(3));
    first.ring(0);
    for _ in 0..3 {
        first.run();
        second.run();
    }
    assert!(first.reap(0).is_empty());
    assert_eq!(store.images(), 2);
    store.faults.release_held();
    second.run_until("its end", |second| second.reap(1).len() == 1);
    second.run();
    first.run();
    assert_eq!((first.reap(0).len(), store.images()), (1, 1));
    // One that succeeds another of its identifier is not put out by the end of that.
    let successor = controller_in(&subsystem, 5, &config());
    drop(second);
    assert_eq!(subsystem.controllers(), [0, 5]);
    let second = successor;
    // A controller that goes takes nobody's time.
    drop(second);
    first.admin(deletion(1)).unwrap();
}
