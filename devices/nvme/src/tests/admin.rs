//! Admin commands: Identify, features, log pages, events, Abort.

use std::sync::Arc;

use block::{Fault, FaultControl, FaultImage, Target};
use nvme_spec::event::Event;
use nvme_spec::identify::{IdentifyController, IdentifyNamespace, cns, descriptor};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, feature, log, regs};

use super::driver::{Guest, memory_image, namespace, transfer};
use crate::{ControllerConfig, NamespaceConfig};

fn ready(namespaces: Vec<NamespaceConfig>) -> Guest {
    Guest::ready(ControllerConfig::new("ADMIN"), namespaces)
}

fn get_log(page: u8, bytes: u32) -> SubmissionEntry {
    let dwords = bytes / 4 - 1;
    SubmissionEntry {
        opcode: admin::GET_LOG_PAGE,
        cdw10: u32::from(page) | dwords << 16,
        cdw11: dwords >> 16,
        ..SubmissionEntry::default()
    }
}

fn features(opcode: u8, id: u8, cdw11: u32) -> SubmissionEntry {
    SubmissionEntry { opcode, cdw10: u32::from(id), cdw11, ..SubmissionEntry::default() }
}

fn ids(page: &[u8]) -> Vec<u32> {
    let all = page.as_chunks::<4>().0.iter().map(|id| u32::from_le_bytes(*id));
    all.take_while(|id| *id != 0).collect()
}

fn park(guest: &mut Guest) -> u16 {
    let request = SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() };
    let cid = guest.push(0, request);
    guest.ring(0);
    guest.run();
    cid
}

#[test]
fn unknown_commands_and_flags_are_refused() {
    let mut guest = ready(vec![namespace(1, 8)]);
    for opcode in [0x03, 0x07, 0x0d, 0x15, 0x7d, 0xc0, 0xff] {
        let entry = SubmissionEntry { opcode, ..SubmissionEntry::default() };
        assert_eq!(guest.admin(entry), Err(Status::INVALID_OPCODE), "{opcode:#x}");
    }
    for flags in [1, 0x40] {
        let entry = SubmissionEntry { flags, ..features(admin::GET_FEATURES, 1, 0) };
        assert_eq!(guest.admin(entry), Err(Status::INVALID_FIELD));
    }
}

#[test]
fn identify_lists_sparse_namespaces() {
    let mut guest = ready(vec![namespace(3, 8), namespace(1024, 16), namespace(500, 8)]);
    for list in [
        cns::ACTIVE_NAMESPACES,
        cns::ALLOCATED_NAMESPACES,
        cns::CSI_ACTIVE_NAMESPACES,
        cns::CSI_ALLOCATED_NAMESPACES,
    ] {
        assert_eq!(ids(&guest.identify(list, 0).unwrap()), [3, 500, 1024], "{list:#x}");
        assert_eq!(ids(&guest.identify(list, 3).unwrap()), [500, 1024]);
        assert!(ids(&guest.identify(list, 1024).unwrap()).is_empty());
        assert_eq!(guest.identify(list, 0xffff_fffe), Err(Status::INVALID_NAMESPACE));
    }
    let namespace = IdentifyNamespace::from_bytes(&guest.identify(cns::NAMESPACE, 1024).unwrap());
    assert_eq!((namespace.nsze, namespace.ncap, namespace.nlbaf), (16, 16, 4));
    assert_eq!(namespace.lbaf[0].lba_data_size_log2, 9);
    assert_eq!(guest.identify(cns::ALLOCATED_NAMESPACE, 1024).unwrap(), namespace.to_bytes());
    for structure in [cns::NAMESPACE, cns::CSI_NAMESPACE, cns::INDEPENDENT_NAMESPACE] {
        assert_eq!(guest.identify(structure, 4), Ok([0; 4096]), "inactive: zeroes");
        for nsid in [0, 1025, NSID_BROADCAST] {
            assert_eq!(guest.identify(structure, nsid), Err(Status::INVALID_NAMESPACE), "{nsid}");
        }
    }
    assert_eq!(guest.identify(cns::INDEPENDENT_NAMESPACE, 3).unwrap()[14], 1, "ready");
    assert_eq!(guest.identify(cns::NAMESPACE_DESCRIPTORS, 4), Err(Status::INVALID_FIELD));
    let page = guest.identify(cns::NAMESPACE_DESCRIPTORS, 1024).unwrap();
    assert_eq!((page[0], page[1]), (descriptor::EUI64, 8));
    assert_eq!((page[12], page[13]), (descriptor::NGUID, 16));
    assert_eq!(page[16..32], namespace.nguid);
    assert_eq!((page[32], page[33]), (descriptor::UUID, 16));
    assert_eq!((page[52], page[53], page[56], page[57]), (descriptor::CSI, 1, 0, 0));
    let other = IdentifyNamespace::from_bytes(&guest.identify(cns::NAMESPACE, 3).unwrap());
    assert_ne!(other.nguid, namespace.nguid);
    assert_ne!(other.eui64, namespace.eui64);
    assert_eq!(guest.identify(cns::COMMAND_SETS, 0).unwrap()[..9], [1, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.identify(cns::CONTROLLERS, 0).unwrap()[..4], [1, 0, 0, 0]);
    assert_eq!(guest.identify(cns::ATTACHED_CONTROLLERS, 3).unwrap()[..4], [1, 0, 0, 0]);
    assert_eq!(guest.identify(cns::FORMAT_NAMESPACE, 0).unwrap()[130], 9);
    for structure in [cns::NVM_SETS, cns::PRIMARY_CONTROLLER, cns::SECONDARY_CONTROLLERS, 0x0b, 0xff] {
        assert_eq!(guest.identify(structure, 0), Err(Status::INVALID_FIELD), "{structure:#x}");
    }
}

#[test]
fn a_thousand_namespaces_are_listed_in_order() {
    let mut guest = ready((1..=1024).rev().map(|nsid| namespace(nsid, 8)).collect());
    let all: Vec<u32> = (1..=1024).collect();
    assert_eq!(
        guest.identify(cns::ACTIVE_NAMESPACES, 0).unwrap(),
        all.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>()[..]
    );
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    guest.write_bytes(page, &[9; 512]);
    guest.io(1, transfer(nvm::WRITE, 1024, 7, 1, page)).unwrap();
    guest.io(1, transfer(nvm::READ, 1023, 7, 1, page)).unwrap();
    assert_eq!(guest.read_bytes(page, 512), vec![0; 512]);
}

#[test]
fn identify_controller_says_what_there_is() {
    let mut guest = ready(vec![namespace(1, 8)]);
    let page = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
    assert_eq!((page.mdts, page.sqes, page.cqes, page.ver), (7, 0x66, 0x44, 0x2_0000));
    assert_eq!((page.oacs, page.vwc), (0x116, 7));
    // An I/O controller of identifier 0 with four aborts at a time, eight event requests and 64 errors to tell of.
    assert_eq!((page.cntrltype, page.cntlid, page.acl, page.aerl, page.elpe), (1, 0, 3, 7, 63));
    // 70 and 90 degrees Celsius; the keep alive timer in units of 100 ms.
    assert_eq!((page.wctemp, page.cctemp, page.kas), (343, 363, 10));
    assert_eq!((page.nn, page.mnan), (1024, 1024));
    assert_eq!((page.oncs, page.lpa, page.oaes), (0x1ff, 0x36, 0x300));
    assert_eq!((page.fuses, page.cdfs, page.nwpc, page.fna), (1, 3, 3, 0));
    // Seven slots, the first read-only, activation without a reset; Block Erase and Overwrite.
    assert_eq!((page.frmw, page.sanicap & 7), (0x1f, 6));
    // Dword granularity is not asked for: bytes, bit buckets, and more than the transfer needs.
    assert_eq!(page.sgls & 3, 1);
    assert_ne!(page.sgls & 1 << 16, 0);
    assert_eq!(page.tnvmcap, 4096);
    assert!(page.subnqn.starts_with(b"nqn.2014-08.org.nvmexpress:ferry:ADMIN\0"));
    // What the effects log says of commands is what they do.
    let effects: [u8; 4096] = guest.admin_data(get_log(log::id::COMMANDS_SUPPORTED, 4096)).unwrap();
    guest.create_pair(1, 8);
    for opcode in 0..=255u8 {
        let supported = effects[1024 + usize::from(opcode) * 4] & 1 == 1;
        let page = guest.pages(0);
        let result = guest.io(1, transfer(opcode, 1, 0, 1, page));
        assert_eq!(result != Err(Status::INVALID_OPCODE), supported, "I/O opcode {opcode:#x}");
    }
    for opcode in (0..=255u8).filter(|opcode| *opcode != admin::ASYNC_EVENT_REQUEST) {
        let supported = effects[usize::from(opcode) * 4] & 1 == 1;
        // All dwords 0, PRP1 misaligned: nothing is changed by it.
        let result = guest.admin(SubmissionEntry { opcode, prp1: 3, ..SubmissionEntry::default() });
        assert_eq!(result != Err(Status::INVALID_OPCODE), supported, "admin opcode {opcode:#x}");
    }
}

#[test]
fn features_have_current_default_saved_values_and_capabilities() {
    let mut guest = ready(vec![namespace(1, 8)]);
    let cases = [
        (feature::ARBITRATION, 0x0203_0402, 0x0203_0402, 7),
        (feature::POWER_MANAGEMENT, 0, 0, 0),
        (feature::TEMPERATURE_THRESHOLD, 350, 350, 343),
        (feature::VOLATILE_WRITE_CACHE, 0, 0, 1),
        (feature::INTERRUPT_COALESCING, 0x1234, 0x1234, 0),
        (feature::INTERRUPT_VECTOR_CONFIGURATION, 3 | 1 << 16, 3 | 1 << 16, 3),
        (feature::WRITE_ATOMICITY, 1, 1, 0),
        (feature::ASYNC_EVENT_CONFIGURATION, 0x1ff, 0x1ff, 0),
        (feature::COMMAND_SET_PROFILE, 0, 0, 0),
    ];
    for (id, set, current, default) in cases {
        guest.admin(features(admin::SET_FEATURES, id, set)).unwrap();
        let selector = if id == feature::INTERRUPT_VECTOR_CONFIGURATION { 3 } else { 0 };
        let get = |select: u32| {
            let entry = features(admin::GET_FEATURES, id, selector);
            SubmissionEntry { cdw10: entry.cdw10 | select << 8, ..entry }
        };
        assert_eq!(guest.admin(get(0)), Ok(current), "feature {id:#x}");
        assert_eq!(guest.admin(get(1)), Ok(default), "feature {id:#x}");
        assert_eq!(guest.admin(get(2)), Ok(default), "feature {id:#x}");
        assert_eq!(guest.admin(get(3)), Ok(4), "feature {id:#x}: changeable, not savable");
        assert_eq!(guest.admin(get(4)), Err(Status::INVALID_FIELD));
        let save = features(admin::SET_FEATURES, id, set);
        let save = SubmissionEntry { cdw10: save.cdw10 | feature::SAVE, ..save };
        assert_eq!(guest.admin(save), Err(Status::FEATURE_NOT_SAVEABLE), "feature {id:#x}");
        let other = SubmissionEntry { nsid: 1, ..features(admin::SET_FEATURES, id, set) };
        assert_eq!(guest.admin(other), Err(Status::FEATURE_NOT_NAMESPACE_SPECIFIC));
    }
    let refused = [
        (feature::POWER_MANAGEMENT, 1),
        (feature::TEMPERATURE_THRESHOLD, 1 << 16),
        (feature::TEMPERATURE_THRESHOLD, 2 << 20),
        (feature::NUMBER_OF_QUEUES, 0xffff),
        (feature::INTERRUPT_VECTOR_CONFIGURATION, 65),
        (feature::COMMAND_SET_PROFILE, 1),
        (0x00, 0),
        (0x7f, 0),
    ];
    for (id, value) in refused {
        assert_eq!(
            guest.admin(features(admin::SET_FEATURES, id, value)),
            Err(Status::INVALID_FIELD),
            "{id:#x}"
        );
    }
    // A reset brings the defaults back.
    guest.write32(regs::CC, 0);
    guest.run();
    guest.enable();
    assert_eq!(guest.admin(features(admin::GET_FEATURES, feature::TEMPERATURE_THRESHOLD, 0)), Ok(343));
    assert_eq!(guest.admin(features(admin::GET_FEATURES, feature::VOLATILE_WRITE_CACHE, 0)), Ok(1));
}

#[test]
fn features_with_data_and_of_namespaces() {
    let mut guest = ready(vec![namespace(2, 8)]);
    let page = guest.pages(1);
    let data = |opcode, id, cdw11| SubmissionEntry { prp1: page, ..features(opcode, id, cdw11) };
    guest.write_bytes(page, &(1_700_000_000_000u64).to_le_bytes());
    guest.admin(data(admin::SET_FEATURES, feature::TIMESTAMP, 0)).unwrap();
    guest.clear(page, 8);
    guest.admin(data(admin::GET_FEATURES, feature::TIMESTAMP, 0)).unwrap();
    let timestamp = u64::from_le_bytes(guest.read_bytes(page, 8).try_into().unwrap());
    assert_eq!(timestamp >> 48, 2, "origin: set by the host");
    let milliseconds = timestamp & ((1 << 48) - 1);
    assert!((1_700_000_000_000..1_700_000_000_000 + 3_600_000).contains(&milliseconds));
    guest.write_bytes(page, b"0123456789abcdef");
    guest.admin(data(admin::SET_FEATURES, feature::HOST_IDENTIFIER, 1)).unwrap();
    guest.clear(page, 16);
    guest.admin(data(admin::GET_FEATURES, feature::HOST_IDENTIFIER, 1)).unwrap();
    assert_eq!(guest.read_bytes(page, 16), b"0123456789abcdef");
    guest.clear(page, 512);
    guest.write_bytes(page, &[2]);
    assert_eq!(
        guest.admin(data(admin::SET_FEATURES, feature::HOST_BEHAVIOR_SUPPORT, 0)),
        Err(Status::INVALID_FIELD)
    );
    guest.write_bytes(page, &[1]);
    guest.admin(data(admin::SET_FEATURES, feature::HOST_BEHAVIOR_SUPPORT, 0)).unwrap();
    // Error recovery has a value for each namespace, and for all with the broadcast identifier.
    let recovery =
        |opcode, nsid, value| SubmissionEntry { nsid, ..features(opcode, feature::ERROR_RECOVERY, value) };
    guest.admin(recovery(admin::SET_FEATURES, NSID_BROADCAST, 5)).unwrap();
    assert_eq!(guest.admin(recovery(admin::GET_FEATURES, 2, 0)), Ok(5));
    assert_eq!(
        guest.admin(recovery(admin::SET_FEATURES, 2, 1 << 16)),
        Err(Status::INVALID_FIELD),
        "DULBE is not offered"
    );
    assert_eq!(guest.admin(recovery(admin::GET_FEATURES, 3, 0)), Err(Status::INVALID_FIELD), "a hole");
    assert_eq!(guest.admin(recovery(admin::GET_FEATURES, 0, 0)), Err(Status::INVALID_NAMESPACE));
}

#[test]
fn the_number_of_queues_is_told_before_there_are_any() {
    let mut guest = ready(vec![namespace(1, 8)]);
    let set = features(admin::SET_FEATURES, feature::NUMBER_OF_QUEUES, 7 << 16 | 7);
    assert_eq!(guest.admin(set), Ok(63 << 16 | 63));
    guest.create_pair(1, 8);
    assert_eq!(guest.admin(set), Err(Status::COMMAND_SEQUENCE_ERROR));
    assert_eq!(guest.admin(features(admin::GET_FEATURES, feature::NUMBER_OF_QUEUES, 0)), Ok(63 << 16 | 63));
}

#[test]
fn log_pages_are_read_from_any_offset() {
    let mut guest = ready(vec![namespace(1, 8)]);
    let supported: [u8; 1024] = guest.admin_data(get_log(log::id::SUPPORTED_PAGES, 1024)).unwrap();
    for page in 0..=255u8 {
        let result = guest.admin(SubmissionEntry { prp1: 0x20_0000, ..get_log(page, 64) });
        let there = supported[usize::from(page) * 4] == 1;
        if page == log::id::PERSISTENT_EVENT {
            assert!(there && result == Err(Status::COMMAND_SEQUENCE_ERROR), "it is read through a context");
            continue;
        }
        assert_eq!(result, if there { Ok(0) } else { Err(Status::INVALID_LOG_PAGE) }, "page {page:#x}");
    }
    let whole: [u8; 512] = guest.admin_data(get_log(log::id::SMART, 512)).unwrap();
    let part: [u8; 64] =
        guest.admin_data(SubmissionEntry { cdw12: 112, ..get_log(log::id::SMART, 64) }).unwrap();
    assert_eq!(part, whole[112..176]);
    let tail: [u8; 64] =
        guest.admin_data(SubmissionEntry { cdw12: 508, ..get_log(log::id::SMART, 64) }).unwrap();
    assert_eq!(tail, [0; 64], "zeroes beyond the end");
    let invalid = Err(Status::INVALID_FIELD);
    for (cdw12, cdw13, cdw14) in
        [(2, 0, 0), (516, 0, 0), (0, 1, 0), (0, u32::MAX, 0), (0, 0, 1 << 23), (0, 0, 2)]
    {
        let entry = SubmissionEntry { cdw12, cdw13, cdw14, prp1: 0x20_0000, ..get_log(log::id::SMART, 64) };
        assert_eq!(guest.admin(entry), invalid, "{cdw12} {cdw13} {cdw14:#x}");
    }
    assert_eq!(
        guest.admin(SubmissionEntry { nsid: 1, prp1: 0x20_0000, ..get_log(log::id::SMART, 512) }),
        invalid
    );
    let firmware =
        log::FirmwareSlotLog::from_bytes(&guest.admin_data(get_log(log::id::FIRMWARE_SLOT, 512)).unwrap());
    let controller = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
    assert_eq!((firmware.active, firmware.revisions[0]), (1, controller.fr));
    // The feature log names exactly those that Get Features knows.
    let effects: [u8; 1024] = guest.admin_data(get_log(log::id::FEATURES_SUPPORTED, 1024)).unwrap();
    for id in 0..=255u8 {
        let capabilities = SubmissionEntry {
            nsid: 1,
            cdw10: u32::from(id) | 3 << 8,
            ..features(admin::GET_FEATURES, id, 0)
        };
        assert_eq!(
            guest.admin(capabilities).is_ok(),
            effects[usize::from(id) * 4] & 1 == 1,
            "feature {id:#x}"
        );
    }
}

#[test]
fn events_wait_for_requests_and_are_masked_until_their_log_is_read() {
    let mut guest = ready(vec![namespace(1, 8)]);
    // Before anyone asks: kept.
    guest.write32(regs::sq_tail_doorbell(9), 1);
    guest.run();
    assert!(guest.reap(0).is_empty());
    let (first, second) = (park(&mut guest), park(&mut guest));
    let entries = guest.reap(0);
    assert_eq!(entries.len(), 1);
    assert_eq!(
        (entries[0].cid, Event::from_dword(entries[0].dw0)),
        (first, Event::INVALID_DOORBELL_REGISTER)
    );
    // Another error event is masked until the error log has been read without RAE.
    guest.write32(regs::sq_tail_doorbell(0), 999);
    guest.run();
    assert!(guest.reap(0).is_empty());
    let retain = SubmissionEntry { cdw10: get_log(1, 64).cdw10 | 1 << 15, ..get_log(1, 64) };
    guest.admin_data::<64>(retain).unwrap();
    guest.run();
    assert!(guest.reap(0).is_empty(), "retained");
    let page = guest.pages(1);
    let cid = guest.push(0, SubmissionEntry { prp1: page, ..get_log(1, 64) });
    guest.ring(0);
    guest.run();
    let entries = guest.reap(0);
    assert_eq!(entries.iter().map(|entry| entry.cid).collect::<Vec<_>>(), [cid, second]);
    assert_eq!(Event::from_dword(entries[1].dw0), Event::INVALID_DOORBELL_VALUE);
    let log = log::ErrorEntry::from_bytes(&guest.read_bytes(page, 64).try_into().unwrap());
    assert_eq!(log.error_count, 2);
}

#[test]
fn the_temperature_threshold_raises_a_smart_event_when_asked_for() {
    let mut guest = ready(vec![namespace(1, 8)]);
    park(&mut guest);
    let set = |value| features(admin::SET_FEATURES, feature::TEMPERATURE_THRESHOLD, value);
    guest.admin(set(300)).unwrap();
    let log: [u8; 512] = guest.admin_data(get_log(log::id::SMART, 512)).unwrap();
    assert_eq!(log[0], 2, "critical warning: temperature");
    assert!(guest.reap(0).is_empty(), "no event without configuration");
    guest.admin(set(343)).unwrap();
    guest.admin(features(admin::SET_FEATURES, feature::ASYNC_EVENT_CONFIGURATION, 2)).unwrap();
    let cid = guest.push(0, set(308));
    guest.ring(0);
    guest.run();
    let entries = guest.reap(0);
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[0].cid, cid);
    assert_eq!(Event::from_dword(entries[1].dw0), Event::TEMPERATURE_THRESHOLD);
}

#[test]
fn requests_beyond_the_limit_are_refused_and_abort_takes_them_back() {
    let mut guest = ready(vec![namespace(1, 8)]);
    let parked: Vec<u16> = (0..8).map(|_| park(&mut guest)).collect();
    let request = SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() };
    assert_eq!(guest.admin(request), Err(Status::ASYNC_EVENT_LIMIT_EXCEEDED));
    let abort = SubmissionEntry {
        opcode: admin::ABORT,
        cdw10: u32::from(parked[3]) << 16,
        ..SubmissionEntry::default()
    };
    let cid = guest.push(0, abort);
    guest.ring(0);
    guest.run();
    let entries = guest.reap(0);
    assert_eq!(entries.iter().map(|entry| entry.cid).collect::<Vec<_>>(), [parked[3], cid]);
    assert_eq!(entries[0].status().code(), Status::ABORT_REQUESTED);
    assert_eq!(entries[1].dw0, 0);
    assert_eq!(guest.admin(abort), Ok(1), "it is gone");
    park(&mut guest);
}

#[test]
fn abort_cancels_admin_commands_behind_it() {
    let mut guest = ready(vec![namespace(1, 8)]);
    let set = |value| features(admin::SET_FEATURES, feature::TEMPERATURE_THRESHOLD, value);
    let next = guest.queues[&0].next_cid;
    let abort = |cid: u16| SubmissionEntry { opcode: admin::ABORT, cdw10: u32::from(cid) << 16, ..set(0) };
    guest.push(0, abort(next + 2));
    guest.push(0, set(350));
    guest.push(0, set(360));
    guest.push(0, abort(next + 1));
    guest.ring(0);
    guest.run();
    let entries = guest.reap(0);
    let ended: Vec<_> = entries.iter().map(|entry| (entry.cid, entry.dw0, entry.status().code())).collect();
    let expected = [
        (next + 2, 0, Status::ABORT_REQUESTED),
        (next, 0, Status::SUCCESS),
        (next + 1, 0, Status::SUCCESS),
        (next + 3, 1, Status::SUCCESS),
    ];
    assert_eq!(ended, expected, "what has been carried out cannot be aborted");
    assert_eq!(guest.admin(features(admin::GET_FEATURES, feature::TEMPERATURE_THRESHOLD, 0)), Ok(350));
}

#[test]
fn abort_cancels_what_has_not_reached_the_backend() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(64 * 512), control.clone()));
    let namespaces = vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }];
    // Two commands at a time: the third waits in its queue.
    let mut guest = Guest::with_workers(ControllerConfig::new("ABORT"), namespaces, 1, 2);
    guest.enable();
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    control.inject(Target::Any, 0, 2, Fault::Hold);
    let cids: Vec<u16> = (0..5).map(|lba| guest.push(1, transfer(nvm::WRITE, 1, lba, 1, page))).collect();
    guest.ring(1);
    guest.run();
    assert_eq!(control.seen(), 2);
    let abort = |cid: u16| SubmissionEntry {
        opcode: admin::ABORT,
        cdw10: u32::from(cid) << 16 | 1,
        ..SubmissionEntry::default()
    };
    assert_eq!(guest.admin(abort(cids[0])), Ok(1), "the backend has it");
    assert_eq!(guest.admin(abort(cids[3])), Ok(0));
    assert_eq!(guest.admin(abort(cids[3])), Ok(1), "once");
    assert_eq!(guest.admin(abort(77)), Ok(1), "no such command");
    let entry = SubmissionEntry { cdw10: 9, ..abort(0) };
    assert_eq!(guest.admin(entry), Err(Status::INVALID_FIELD), "no such queue");
    let entries = guest.reap(1);
    assert_eq!(entries.len(), 1);
    assert_eq!((entries[0].cid, entries[0].status().code()), (cids[3], Status::ABORT_REQUESTED));
    control.release_held();
    let mut ended = Vec::new();
    guest.run_until("the others", |guest| {
        ended.extend(guest.reap(1).iter().map(|entry| entry.cid));
        ended.len() == 4
    });
    ended.sort_unstable();
    assert_eq!(ended, [cids[0], cids[1], cids[2], cids[4]]);
    assert_eq!(control.seen(), 4, "the aborted one never reached the backend");
}
