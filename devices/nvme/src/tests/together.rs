//! What two controllers of a subsystem do at the same moment: each decides by what it knows, and what the other has just done counts.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Fault, FaultControl, FaultImage, Target};
use bus::GuestMapping;
use nvme_spec::opcode::{self, admin, management, nvm};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, regs};

use super::driver::{Guest, guest_memory, memory_image, namespace, transfer};
use super::protection::protect;
use super::shared::{admin_of, end_of};
use super::store::Memory;
use crate::admin::{Admin, Answer, Pool};
use crate::maintenance::{CHUNK_BYTES, Next};
use crate::save::admin::kept_state;
use crate::shared::lock;
use crate::store::ControllerPlace;
use crate::{ControllerConfig, NamespaceConfig, NonVolatile, Subsystem, memory_with_region};

const REGION_BYTES: u64 = 64 << 10;

fn config(id: u16) -> ControllerConfig {
    ControllerConfig {
        queue_pairs: 4,
        vectors: 5,
        region_bytes: REGION_BYTES,
        ..ControllerConfig::new(&format!("PORT{id}"))
    }
}

/// Two controllers with a persistent memory region each.
fn pair(subsystem: &Arc<Subsystem>) -> [Guest; 2] {
    [0, 1].map(|id| {
        let region = Arc::new(GuestMapping::new(REGION_BYTES as usize).unwrap());
        let memory = memory_with_region(&guest_memory(), region).unwrap();
        let mut guest = Guest::member_with(subsystem, id, config(id), memory);
        guest.enable();
        guest.create_pair(1, 16);
        guest
    })
}

/// Namespace 1 takes two requests of an operation, which meet the faults of `control`.
fn two(control: &Arc<FaultControl>) -> [Guest; 2] {
    let image = FaultImage::new(memory_image(CHUNK_BYTES as usize + 4096), control.clone());
    let namespaces = [
        NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend: Arc::new(image) },
        namespace(2, 64),
    ];
    pair(&Subsystem::new("SHARED", &namespaces, true).unwrap())
}

fn format(nsid: u32) -> SubmissionEntry {
    SubmissionEntry { opcode: admin::FORMAT_NVM, nsid, ..SubmissionEntry::default() }
}

fn sanitize(command: u32) -> SubmissionEntry {
    SubmissionEntry {
        opcode: admin::SANITIZE,
        cdw10: command,
        cdw11: 0x1122_3344,
        ..SubmissionEntry::default()
    }
}

/// What a controller does with a command that it has begun to execute when the other one acts: its thread has not looked since.
fn at_the_same_moment(
    guest: &Guest,
    execute: impl FnOnce(&mut Admin, &Pool) -> Result<Answer, Status>,
) -> Result<Answer, Status> {
    let controller = &guest.controller;
    execute(&mut lock(&controller.admin), &controller.pool).map_err(Status::code)
}

fn until(guests: &[Guest], what: &str, mut done: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        guests.iter().for_each(Guest::run);
        assert!(start.elapsed() < super::driver::PATIENCE, "never happened: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn of_two_operations_on_a_namespace_one_is_begun() {
    let control = Arc::new(FaultControl::default());
    for (of_all, refused) in [(false, Status::FORMAT_IN_PROGRESS), (true, Status::SANITIZE_IN_PROGRESS)] {
        let mut guests = two(&control);
        control.inject(Target::Write, 0, 1, Fault::Hold);
        let first = if of_all { sanitize(opcode::SANITIZE_BLOCK_ERASE) } else { format(1) };
        let cid = guests[0].push(0, first);
        guests[0].ring(0);
        guests[0].controller.process(0);
        for scope in [1, NSID_BROADCAST] {
            let second = at_the_same_moment(&guests[1], |admin, pool| admin.format_nvm(pool, &format(scope)));
            assert_eq!(second, Err(refused), "{scope:#x}");
        }
        let second = at_the_same_moment(&guests[1], |admin, pool| {
            admin.start_sanitize(pool, &sanitize(opcode::SANITIZE_BLOCK_ERASE))
        });
        assert_eq!(second, Err(refused));
        let second = at_the_same_moment(&guests[1], |admin, pool| admin.set_features(pool, &protect(1, 1)));
        assert_eq!(second, Err(refused));
        // What was refused has taken nothing: the first one ends, and the namespace is there again.
        let subsystem = Arc::clone(guests[0].controller.subsystem());
        until(&guests, "the first request", || control.held() == 1);
        control.release_held();
        until(&guests, "the end", || {
            let common = subsystem.common.lock();
            common.formats.is_empty() && common.sanitize.running.is_none()
        });
        end_of(&mut guests, 0, 0, cid).unwrap();
        let page = guests[1].pages(1);
        guests[1].io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
        guests[1].write32(regs::PMRCTL, 1);
        assert_eq!(guests[1].read32(regs::PMRSTS), 0, "no region is held for what was refused");
    }
}

#[test]
fn no_operation_is_begun_on_a_namespace_that_was_just_protected_and_no_protection_is_lifted_that_was_just_made()
 {
    let control = Arc::new(FaultControl::default());
    let mut guests = two(&control);
    let until_power_cycle = 2;
    guests[0].admin(protect(1, until_power_cycle)).unwrap();
    let written = control.seen();
    let refused = Err(Status::NAMESPACE_WRITE_PROTECTED);
    let second = at_the_same_moment(&guests[1], |admin, pool| admin.format_nvm(pool, &format(1)));
    assert_eq!(second, refused);
    let second = at_the_same_moment(&guests[1], |admin, pool| {
        admin.start_sanitize(pool, &sanitize(opcode::SANITIZE_BLOCK_ERASE))
    });
    assert_eq!(second, refused);
    let second = at_the_same_moment(&guests[1], |admin, pool| admin.set_features(pool, &protect(1, 1)));
    assert_eq!(second, Err(Status::FEATURE_NOT_CHANGEABLE));
    guests.iter().for_each(Guest::run);
    assert_eq!(control.seen(), written, "nothing was begun");
    assert_eq!(guests[1].controller.subsystem().common.lock().sanitize.running, None);
    guests[1].write32(regs::PMRCTL, 1);
    assert_eq!(guests[1].read32(regs::PMRSTS), 0, "no region is held for what was refused");
}

#[test]
fn what_comes_while_an_operation_has_all_namespaces_is_not_erased_with_them() {
    let control = Arc::new(FaultControl::default());
    for operation in [format(NSID_BROADCAST), sanitize(opcode::SANITIZE_BLOCK_ERASE)] {
        let store = Memory::new(1 << 20);
        let image = FaultImage::new(memory_image(CHUNK_BYTES as usize + 4096), control.clone());
        let namespaces =
            [NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend: Arc::new(image) }];
        let subsystem = Subsystem::with_store("SHARED", &namespaces, true, store.clone() as _, None).unwrap();
        let mut guests = pair(&subsystem);
        control.inject(Target::Write, 0, 1, Fault::Hold);
        let cid = guests[0].push(0, operation);
        guests[0].ring(0);
        until(&guests, "the first request", || control.held() == 1);
        let error = subsystem.add(&namespace(7, 32)).unwrap_err().to_string();
        assert!(error.contains("namespace 7") && error.contains("has all namespaces"), "{error}");
        let page = guests[1].pages(1);
        let mut data = vec![0; 4096];
        (data[0], data[8]) = (64, 64);
        guests[1].write_bytes(page, &data);
        let create = SubmissionEntry {
            opcode: admin::NAMESPACE_MANAGEMENT,
            prp1: page,
            cdw10: management::CREATE,
            ..SubmissionEntry::default()
        };
        let created = at_the_same_moment(&guests[1], |admin, pool| admin.namespace_management(pool, &create));
        let status = if operation.opcode == admin::SANITIZE {
            Status::SANITIZE_IN_PROGRESS
        } else {
            Status::FORMAT_IN_PROGRESS
        };
        assert_eq!(created, Err(status));
        control.release_held();
        until(&guests, "the end", || {
            let common = subsystem.common.lock();
            common.formats.is_empty() && common.sanitize.running.is_none()
        });
        end_of(&mut guests, 0, 0, cid).unwrap();
        subsystem.add(&namespace(7, 32)).unwrap();
        guests.iter().for_each(Guest::run);
        assert_eq!(admin_of(&mut guests, 1, create), Ok(2));
    }
}

#[test]
fn the_last_request_of_a_pass_counts_once_whoever_looks_when_it_has_ended() {
    let control = Arc::new(FaultControl::default());
    let image = FaultImage::new(memory_image(CHUNK_BYTES as usize + 4096), control.clone());
    let namespaces =
        [NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend: Arc::new(image) }];
    let subsystem = Subsystem::new("SHARED", &namespaces, true).unwrap();
    let mut guests = pair(&subsystem);
    control.inject(Target::Write, 1, 1, Fault::Hold);
    let twice = opcode::SANITIZE_OVERWRITE
        | opcode::SANITIZE_INVERT_PATTERN
        | opcode::SANITIZE_NO_DEALLOCATE
        | 2 << 4;
    guests[0].admin(sanitize(twice)).unwrap();
    until(&guests, "the second request", || control.held() == 1);
    let maker = usize::from(subsystem.common.lock().sanitizer.unwrap());
    let other = 1 - maker;
    // The one that made it is on its way to a shutdown, so that the other one is told when it has ended.
    guests[maker].write32(regs::CC, 0x0046_0001 | regs::SHN_NORMAL << 14);
    guests[maker].run();
    control.release_held();
    let controller = Arc::clone(&guests[other].controller);
    let looks = Box::new(move || {
        controller.process(0);
    });
    *guests[other].process.at_wake.lock().unwrap() = Some((0, looks));
    guests[maker].run();
    assert!(guests[other].process.at_wake.lock().unwrap().is_none(), "it was told");
    until(&guests, "the end", || subsystem.common.lock().sanitize.running.is_none());
    assert_eq!(subsystem.common.lock().sanitize.passes, 2);
    let page = guests[other].pages(1);
    for lba in [0, CHUNK_BYTES / 512] {
        guests[other].io(1, transfer(nvm::READ, 1, lba, 1, page)).unwrap();
        let block = guests[other].read_bytes(page, 512);
        assert_eq!(block[..4], (!0x1122_3344u32).to_le_bytes(), "block {lba} has the second pattern");
    }
}

#[test]
fn an_operation_is_begun_and_ended_once_whoever_was_about_to_do_it_too() {
    let control = Arc::new(FaultControl::default());
    let mut guests = two(&control);
    let subsystem = Arc::clone(guests[0].controller.subsystem());
    guests[0].admin(sanitize(opcode::SANITIZE_BLOCK_ERASE)).unwrap();
    until(&guests, "the end", || subsystem.common.lock().sanitize.running.is_none());
    guests[0].write32(regs::PMRCTL, 1);
    let erased = guests[0].process.region_flushes.load(Ordering::SeqCst);
    // It had found that nothing was in flight any more, and goes on only now.
    let late = &guests[1].controller;
    lock(&late.admin).begin_sanitizing(&late.pool);
    assert_eq!(
        guests[0].process.region_flushes.load(Ordering::SeqCst),
        erased,
        "what the guest has now stays"
    );
    // Whoever sees that all is done has the end for itself.
    control.inject(Target::Write, 1, 1, Fault::Hold);
    guests[0].admin(sanitize(opcode::SANITIZE_BLOCK_ERASE)).unwrap_err();
    guests[0].write32(regs::PMRCTL, 0);
    guests[0].admin(sanitize(opcode::SANITIZE_BLOCK_ERASE)).unwrap();
    until(&guests, "the second request", || control.held() == 1);
    let before = subsystem.common.lock().sanitize;
    {
        let common = &mut *subsystem.common.lock();
        common.sanitizer = None;
        common.sanitize.running.as_mut().unwrap().sweep.nsid = 3;
    }
    let ends = |guest: &Guest, id| matches!(lock(&guest.controller.admin).next_of_sanitize(id), Next::End);
    assert_eq!([ends(&guests[0], 0), ends(&guests[1], 1)], [true, false]);
    let common = &mut *subsystem.common.lock();
    (common.sanitize, common.sanitizer) = (before, None);
}

#[test]
fn what_is_kept_for_one_is_not_older_than_what_another_has_done() {
    let control = Arc::new(FaultControl::default());
    let store = Memory::new(1 << 20);
    let image = FaultImage::new(memory_image(CHUNK_BYTES as usize + 4096), control.clone());
    let namespaces =
        [NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend: Arc::new(image) }];
    let subsystem = Subsystem::with_store("SHARED", &namespaces, true, store.clone() as _, None).unwrap();
    let mut guests = pair(&subsystem);
    // The first one is about to keep what it knows when the second begins.
    let kept = kept_state(&lock(&guests[0].controller.admin));
    control.inject(Target::Write, 0, 1, Fault::Hold);
    guests[1].admin(sanitize(opcode::SANITIZE_BLOCK_ERASE)).unwrap();
    until(&guests, "the first request", || control.held() == 1);
    ControllerPlace::new(&subsystem, 0).keep(&kept).unwrap();
    let state = store.state().unwrap();
    let running: Vec<bool> =
        state.controllers.iter().map(|record| record.kept.as_ref().unwrap().kept.sanitize.running).collect();
    assert_eq!(running, [true, true], "without power it would be forgotten");
    control.release_held();
}
