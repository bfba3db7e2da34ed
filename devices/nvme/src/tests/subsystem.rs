//! Several controllers of one subsystem, each with a host that does not know of the others.

use std::sync::Arc;
use std::time::Instant;

use nvme_spec::event::Event;
use nvme_spec::identify::{IdentifyController, IdentifyNamespace, cns};
use nvme_spec::log::{AnaGroup, AnaLogHeader, id as log_id};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{Status, SubmissionEntry, feature, regs};

use super::driver::{Guest, PATIENCE, Process, namespace, transfer};
use crate::exclusion::{ByteRange, View};
use crate::{AccessState, ControllerConfig, Host, NamespaceConfig, NvmeState, Subsystem};

const NAMESPACES: [u32; 3] = [1, 2, 17];

fn namespaces() -> Vec<NamespaceConfig> {
    NAMESPACES.map(|nsid| namespace(nsid, 64)).into()
}

fn config(id: u16) -> ControllerConfig {
    ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new(&format!("PORT{id}")) }
}

fn ready(subsystem: &Arc<Subsystem>, id: u16) -> Guest {
    let mut guest = Guest::member(subsystem, id, config(id));
    guest.enable();
    guest.create_pair(1, 16);
    guest
}

fn controller_list(guest: &mut Guest, cns: u8, nsid: u32, from: u16) -> Vec<u16> {
    let entry = SubmissionEntry {
        opcode: admin::IDENTIFY,
        nsid,
        cdw10: u32::from(from) << 16 | u32::from(cns),
        ..SubmissionEntry::default()
    };
    let page = guest.admin_data::<4096>(entry).unwrap();
    let words: Vec<u16> = page.as_chunks::<2>().0.iter().map(|word| u16::from_le_bytes(*word)).collect();
    words[1..=usize::from(words[0])].to_vec()
}

/// Group, state, change count and namespaces.
type Descriptor = (u32, u8, u64, Vec<u32>);
/// A change of a saved state, and the field that refuses it.
type Damage = (&'static str, fn(&mut NvmeState));

/// The access log: its change count, and the groups.
fn access_log(guest: &mut Guest, groups_only: bool) -> (u64, Vec<Descriptor>) {
    let entry = SubmissionEntry {
        opcode: admin::GET_LOG_PAGE,
        cdw10: u32::from(log_id::ANA) | u32::from(groups_only) << 8 | 255 << 16,
        ..SubmissionEntry::default()
    };
    let page = guest.admin_data::<1024>(entry).unwrap();
    let header = AnaLogHeader::from_bytes(page[..16].try_into().unwrap());
    let (mut rest, mut groups) = (&page[16..], Vec::new());
    for _ in 0..header.groups {
        let group = AnaGroup::from_bytes(rest[..32].try_into().unwrap());
        let end = 32 + group.namespaces as usize * 4;
        let namespaces = rest[32..end].as_chunks::<4>().0.iter().map(|nsid| u32::from_le_bytes(*nsid));
        groups.push((group.group, group.state, group.change_count, namespaces.collect()));
        rest = &rest[end..];
    }
    (header.change_count, groups)
}

#[test]
fn controllers_of_a_subsystem_say_so() {
    let subsystem = Subsystem::new("SHARED", &namespaces(), true).unwrap();
    let mut guests = [7, 0, 300].map(|id| ready(&subsystem, id));
    let mut names = Vec::new();
    for (guest, id) in guests.iter_mut().zip([7, 0, 300]) {
        let page = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
        assert_eq!((page.cntlid, page.cmic), (id, 0b1010));
        assert_eq!((page.anacap, page.anagrpmax, page.nanagrpid), (0x5f, 16, 16));
        assert_eq!(page.oaes >> 11 & 1, 1);
        names.push((page.sn, page.subnqn));
        assert_eq!(controller_list(guest, cns::CONTROLLERS, 0, 0), [0, 7, 300]);
        assert_eq!(controller_list(guest, cns::CONTROLLERS, 0, 8), [300]);
        assert_eq!(controller_list(guest, cns::ATTACHED_CONTROLLERS, 17, 1), [7, 300]);
        for (nsid, group) in [(1, 1), (2, 2), (17, 1)] {
            let page = IdentifyNamespace::from_bytes(&guest.identify(cns::NAMESPACE, nsid).unwrap());
            assert_eq!((page.nmic, page.anagrpid), (1, group), "namespace {nsid}");
            let page = guest.identify(cns::INDEPENDENT_NAMESPACE, nsid).unwrap();
            assert_eq!((page[1], page[4]), (1, group as u8), "namespace {nsid}");
        }
    }
    assert!(names.iter().all(|name| *name == names[0]), "one subsystem, one name");
    // One that is alone says nothing of it.
    let mut guest = Guest::ready(config(0), namespaces());
    let page = IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap());
    assert_eq!((page.cmic, page.anacap, page.nanagrpid, page.oaes >> 11 & 1), (0, 0, 0, 0));
    let page = IdentifyNamespace::from_bytes(&guest.identify(cns::NAMESPACE, 1).unwrap());
    assert_eq!((page.nmic, page.anagrpid), (0, 0));
    let log =
        SubmissionEntry { opcode: admin::GET_LOG_PAGE, cdw10: log_id::ANA.into(), ..Default::default() };
    assert_eq!(guest.admin(log), Err(Status::INVALID_LOG_PAGE));
    assert!(guest.controller.subsystem().set_access(0, 1, AccessState::Inaccessible).is_err());
}

#[test]
fn what_one_controller_writes_another_reads() {
    let subsystem = Subsystem::new("SHARED", &namespaces(), true).unwrap();
    let mut guests = [0, 1].map(|id| ready(&subsystem, id));
    for turn in 0..6u64 {
        let [writer, reader] = [usize::from(turn % 2 == 1), usize::from(turn % 2 == 0)];
        let page = guests[writer].pages(1);
        guests[writer].write_bytes(page, &[turn as u8 + 1; 512]);
        guests[writer].io(1, transfer(nvm::WRITE, 17, turn, 1, page)).unwrap();
        let page = guests[reader].pages(1);
        guests[reader].io(1, transfer(nvm::READ, 17, turn, 1, page)).unwrap();
        assert_eq!(guests[reader].read_bytes(page, 512), [turn as u8 + 1; 512]);
    }
}

#[test]
fn a_subsystem_reset_is_one_of_all_controllers_and_a_controller_reset_of_one() {
    let subsystem = Subsystem::new("SHARED", &namespaces(), true).unwrap();
    let mut guests = [0, 1, 2].map(|id| ready(&subsystem, id));
    guests[1].write32(regs::CC, 0);
    guests.iter().for_each(Guest::run);
    assert_eq!(guests.each_ref().map(|guest| guest.read32(regs::CSTS)), [1, 0, 1]);
    guests[2].write32(regs::NSSR, regs::NSSR_MAGIC);
    // Whoever runs first.
    guests.iter().rev().for_each(Guest::run);
    for guest in &mut guests {
        assert_eq!(guest.read32(regs::CSTS), 1 << 4, "not ready, and NSSRO says why");
        guest.write32(regs::CSTS, 1 << 4);
        assert_eq!((guest.read32(regs::CC), guest.read32(regs::AQA)), (0, 0));
        guest.enable();
        guest.create_pair(1, 16);
        let page = guest.pages(1);
        guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    }
    guests.iter().for_each(Guest::run);
    assert!(guests.iter().all(|guest| guest.read32(regs::CSTS) == 1), "each was reset once");
}

#[test]
fn commands_follow_the_access_that_their_controller_gives() {
    let subsystem = Subsystem::new("SHARED", &namespaces(), true).unwrap();
    let mut guests = [0, 1].map(|id| ready(&subsystem, id));
    assert_eq!(access_log(&mut guests[0], false), (0, vec![(1, 1, 0, vec![1, 17]), (2, 1, 0, vec![2])]));
    let states = [
        (AccessState::NonOptimized, Ok(())),
        (AccessState::Inaccessible, Err(Status::ACCESS_INACCESSIBLE)),
        (AccessState::PersistentLoss, Err(Status::ACCESS_PERSISTENT_LOSS)),
        (AccessState::Change, Err(Status::ACCESS_TRANSITION)),
        (AccessState::Optimized, Ok(())),
    ];
    let page = guests[0].pages(1);
    for (count, (state, expected)) in (1..).zip(states) {
        subsystem.set_access(1, 1, state).unwrap();
        for opcode in [nvm::READ, nvm::WRITE, nvm::FLUSH, nvm::RESERVATION_REPORT] {
            for (index, nsid) in [(0, 1), (0, 17), (1, 2)] {
                guests[index].io(1, transfer(opcode, nsid, 0, 1, page)).unwrap();
            }
            for nsid in [1, 17] {
                let outcome = guests[1].io(1, transfer(opcode, nsid, 0, 1, page));
                assert_eq!(outcome, expected, "{state:?}, opcode {opcode:#x}, namespace {nsid}");
            }
        }
        let groups = vec![(1, state as u8, count, vec![1, 17]), (2, 1, 0, vec![2])];
        assert_eq!(access_log(&mut guests[1], false), (count, groups));
        let groups = vec![(1, state as u8, count, vec![]), (2, 1, 0, vec![])];
        assert_eq!(access_log(&mut guests[1], true), (count, groups));
    }
    assert_eq!(access_log(&mut guests[0], false).0, 0, "it is another controller's");
    subsystem.set_access(1, 1, AccessState::Optimized).unwrap();
    assert_eq!(access_log(&mut guests[1], false).0, 5, "nothing has changed");
    for (controller, group) in [(2, 1), (0, 0), (0, 17)] {
        let error = subsystem.set_access(controller, group, AccessState::Change).unwrap_err().to_string();
        assert!(
            error.contains(&format!("no controller {controller} with an access group {group}")),
            "{error}"
        );
    }
}

#[test]
fn a_host_that_wants_to_know_is_told_of_access() {
    let subsystem = Subsystem::new("SHARED", &namespaces(), true).unwrap();
    let mut guests = [0, 1].map(|id| ready(&subsystem, id));
    let set = |guest: &mut Guest, value| {
        let cdw10 = u32::from(feature::ASYNC_EVENT_CONFIGURATION);
        let opcode = admin::SET_FEATURES;
        guest.admin(SubmissionEntry { opcode, cdw10, cdw11: value, ..SubmissionEntry::default() }).unwrap();
    };
    set(&mut guests[0], 1 << 11);
    for guest in &mut guests {
        guest.push(0, SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() });
        guest.ring(0);
        guest.run();
    }
    for controller in [0, 1] {
        subsystem.set_access(controller, 2, AccessState::Inaccessible).unwrap();
    }
    guests.iter().for_each(Guest::run);
    assert_eq!(guests[0].reap(0)[0].dw0, Event::ACCESS_CHANGED.to_dword());
    assert!(guests[1].reap(0).is_empty(), "it has not asked");
}

#[test]
fn access_moves_with_its_controller() {
    let namespaces = namespaces();
    let subsystem = Subsystem::new("SHARED", &namespaces, true).unwrap();
    let mut guests = [0, 1].map(|id| ready(&subsystem, id));
    subsystem.set_access(0, 2, AccessState::Inaccessible).unwrap();
    subsystem.set_access(0, 2, AccessState::NonOptimized).unwrap();
    subsystem.set_access(0, 1, AccessState::Inaccessible).unwrap();
    let states = guests.each_ref().map(|guest| {
        guest.controller.pause(Instant::now() + PATIENCE).unwrap();
        guest.controller.save()
    });
    assert!(states[1].access.is_none(), "as it was made");
    let there = Subsystem::new("SHARED", &namespaces, true).unwrap();
    let successors = [0, 1].map(|index| {
        let successor = guests[index].successor(&there, index as u16);
        successor.controller.load(&states[index]).unwrap();
        assert!(successor.controller.save() == states[index]);
        successor
    });
    for (guest, successor) in guests.iter_mut().zip(successors) {
        successor.controller.resume();
        guest.move_to(successor);
    }
    let page = guests[0].pages(1);
    let read = |nsid| transfer(nvm::READ, nsid, 0, 1, page);
    assert_eq!(guests[0].io(1, read(17)), Err(Status::ACCESS_INACCESSIBLE));
    guests[0].io(1, read(2)).unwrap();
    guests[1].io(1, read(17)).unwrap();
    assert_eq!(access_log(&mut guests[0], true), (3, vec![(1, 3, 1, vec![]), (2, 2, 2, vec![])]));
    let damages: [Damage; 2] = [
        ("access.states", |state| state.access.as_mut().unwrap().states[3] = 5),
        ("access.change_count", |state| {
            let access = state.access.as_mut().unwrap();
            (access.change_count, access.states, access.change_counts) = (0, [1; 16], [0; 16]);
        }),
    ];
    for (field, damage) in damages {
        let mut state = states[0].clone();
        damage(&mut state);
        let there = Subsystem::new("SHARED", &namespaces, true).unwrap();
        let error = guests[0].successor(&there, 0).controller.load(&state).unwrap_err().to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
    let alone = Subsystem::new("SHARED", &namespaces, false).unwrap();
    let error = guests[0].successor(&alone, 0).controller.load(&states[0]).unwrap_err().to_string();
    assert!(error.contains("shared: true there, false here"), "{error}");
}

/// Whether who claims a range waits for `worker`, and for nobody else.
fn is_waited_for(subsystem: &Subsystem, worker: (u16, usize)) -> bool {
    let claimer = (100, 0);
    subsystem.exclusion.claim(claimer, ByteRange { nsid: 1, first: 0, end: 1 });
    let before = subsystem.exclusion.is_granted(claimer);
    subsystem.exclusion.look(worker, &mut View::default(), |_| true);
    let after = subsystem.exclusion.is_granted(claimer);
    subsystem.exclusion.release(claimer);
    !before && after
}

#[test]
fn a_controller_that_goes_takes_nothing_of_its_successor_along() {
    let worker = (0, 0);
    let comes = move |subsystem: &Subsystem| {
        let host: Arc<dyn Host> = Arc::new(Process::default());
        subsystem.join(worker.0, Arc::clone(&host)).unwrap();
        subsystem.exclusion.join(worker, host);
    };
    // It is here already.
    let subsystem = Subsystem::new("SHARED", &namespaces(), true).unwrap();
    let predecessor = Guest::member(&subsystem, 0, config(0)).controller;
    comes(&subsystem);
    subsystem.exclusion.leave((0, 1));
    drop(predecessor);
    assert_eq!(subsystem.controllers(), [0]);
    assert!(is_waited_for(&subsystem, worker));
    // It comes as soon as it can: another controller is told then that the predecessor has gone.
    let other = Arc::new(Process::default());
    subsystem.join(7, Arc::clone(&other) as _).unwrap();
    let predecessor = Guest::member(&subsystem, 0, config(0)).controller;
    let successor = Arc::clone(&subsystem);
    *other.at_wake.lock().unwrap() = Some((0, Box::new(move || comes(&successor))));
    drop(predecessor);
    assert!(other.at_wake.lock().unwrap().is_none());
    assert_eq!(subsystem.controllers(), [0, 7]);
    assert!(is_waited_for(&subsystem, worker));
}
