//! The persistent memory region: its registers, what they are over resets and moves, and that nothing that was written is lost.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bus::GuestMapping;
use nvme_spec::event::Event;
use nvme_spec::log::SmartLog;
use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::{Status, SubmissionEntry, feature, regs};
use pci::{BarKind, PciFunction};
use vm_memory::bitmap::Bitmap;

use super::driver::{Guest, PATIENCE, guest_memory, namespace, transfer};
use crate::{ControllerConfig, Error, NvmeState, Subsystem, memory_with_region};

const REGION_BYTES: u64 = 64 << 10;
/// Where the guest has it: beyond its RAM.
const BASE: u64 = 0xd800_0000;

fn config() -> ControllerConfig {
    ControllerConfig { region_bytes: REGION_BYTES, ..ControllerConfig::new("REGION") }
}

/// A guest that has enabled the region, and may name it.
fn guest() -> Guest {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    open(&mut guest);
    guest
}

fn open(guest: &mut Guest) {
    guest.write32(regs::PMRCTL, regs::PMRCTL_EN);
    guest.write32(regs::PMRMSCU, (BASE >> 32) as u32);
    guest.write32(regs::PMRMSCL, (BASE | regs::PMRMSC_CMSE) as u32);
    guest.region = Some(BASE);
}

fn flushes(guest: &Guest) -> u64 {
    guest.process.region_flushes.load(Ordering::SeqCst)
}

fn is_shown(guest: &Guest) -> bool {
    guest.process.region_is_shown.load(Ordering::SeqCst)
}

fn controller_reset(guest: &mut Guest) {
    guest.write32(regs::CC, 0);
    guest.run();
    guest.enable();
    guest.create_pair(1, 8);
}

fn subsystem_reset(guest: &mut Guest) {
    guest.write32(regs::NSSR, regs::NSSR_MAGIC);
    guest.run();
    guest.write32(regs::CSTS, 1 << 4);
    guest.enable();
    guest.create_pair(1, 8);
}

#[test]
fn the_registers_say_where_the_region_is_and_what_it_is_for() {
    let guest = Guest::power_on(config(), vec![]);
    assert_eq!(guest.read64(regs::CAP) >> 56 & 1, 1, "CAP.PMRS");
    // CMSS, PMRTO of 60 times 500 ms, a barrier by reading PMRSTS, in BAR 4, WDS and RDS.
    assert_eq!(guest.read32(regs::PMRCAP), 1 << 24 | 60 << 16 | 0b10 << 10 | 4 << 5 | 0b11 << 3);
    assert_eq!((guest.read32(regs::PMREBS), guest.read32(regs::PMRSWTP)), (0, 0));
    assert_eq!((guest.read32(regs::PMRCTL), guest.read32(regs::PMRSTS)), (0, 1 << 8), "not ready");
    let bars = guest.controller.bars();
    assert_eq!(bars.len(), 2);
    let (bar, kind, length_bytes) = (bars[1].bar, bars[1].kind, bars[1].length_bytes);
    assert_eq!((bar, kind, length_bytes), (4, BarKind::Memory64Prefetchable, REGION_BYTES));
    // "It is not necessary to enable the controller to enable the PMR."
    guest.write32(regs::PMRCTL, u32::MAX);
    assert_eq!((guest.read32(regs::PMRCTL), guest.read32(regs::PMRSTS)), (1, 0));
    assert!(is_shown(&guest));
    for register in [regs::PMRCAP, regs::PMRSTS, regs::PMREBS, regs::PMRSWTP] {
        let before = guest.read32(register);
        guest.write32(register, !before);
        assert_eq!(guest.read32(register), before, "{register:#x} is read-only");
    }
    // Reserved bits are not kept, and all ones are no base.
    guest.write32(regs::PMRMSCL, u32::MAX);
    guest.write32(regs::PMRMSCU, u32::MAX);
    assert_eq!((guest.read32(regs::PMRMSCL), guest.read32(regs::PMRMSCU)), (0xffff_f002, u32::MAX));
    assert_eq!(guest.read32(regs::PMRSTS), 1 << 12, "CBAI");
    // By bytes, too.
    guest.controller.bar_write(0, regs::PMRMSCU + 3, &[0]);
    assert_eq!((guest.read32(regs::PMRMSCU), guest.read32(regs::PMRSTS)), (0x00ff_ffff, 0));
    guest.controller.bar_write(0, regs::PMRCTL, &[0]);
    assert_eq!((guest.read32(regs::PMRCTL), guest.read32(regs::PMRSTS)), (0, 1 << 8));
    assert!(!is_shown(&guest));
}

#[test]
fn data_of_commands_may_be_in_the_region_and_nothing_else() {
    let mut guest = guest();
    let ram = guest.pages(1);
    guest.write_bytes(BASE + 0x1000, &[0x5a; 8192]);
    let two_pages = |opcode, at| transfer(opcode, 1, 0, 16, at);
    guest.io(1, two_pages(nvm::WRITE, BASE + 0x1000)).unwrap();
    for workers in [1, 2] {
        guest.io(1, two_pages(nvm::READ, BASE + 0x8000)).unwrap();
        assert_eq!(guest.read_bytes(BASE + 0x8000, 8192), vec![0x5a; 8192]);
        guest.clear(BASE + 0x8000, 8192);
        guest.migrate(workers);
        assert!(is_shown(&guest), "the guest sees it there too");
    }
    // Of admin commands, too.
    let identify =
        SubmissionEntry { opcode: admin::IDENTIFY, prp1: BASE, cdw10: 1, ..SubmissionEntry::default() };
    guest.admin(identify).unwrap();
    assert_eq!(guest.read_bytes(BASE + 4, 6), b"REGION");
    // Partly in RAM, in this order and in the other.
    for (prp1, prp2) in [(BASE, ram), (ram, BASE)] {
        let mixed = SubmissionEntry { prp1, prp2, ..two_pages(nvm::READ, 0) };
        assert_eq!(guest.io(1, mixed), Err(Status::INVALID_FIELD));
    }
    let queue = SubmissionEntry {
        opcode: admin::CREATE_CQ,
        prp1: BASE,
        cdw10: 2 | 7 << 16,
        cdw11: 1,
        ..SubmissionEntry::default()
    };
    assert_eq!(guest.admin(queue), Err(Status::INVALID_FIELD));
    let buffers = SubmissionEntry {
        opcode: admin::DOORBELL_BUFFER_CONFIG,
        prp1: 1 << 61,
        prp2: ram,
        ..SubmissionEntry::default()
    };
    assert_eq!(guest.admin(buffers), Err(Status::INVALID_FIELD));
    // Disabled it is named all the same, and cannot be reached; not named it is not memory at all.
    guest.write32(regs::PMRCTL, 0);
    assert_eq!(guest.io(1, two_pages(nvm::READ, BASE)), Err(Status::DATA_TRANSFER_ERROR));
    guest.write32(regs::PMRCTL, 1);
    guest.io(1, two_pages(nvm::READ, BASE)).unwrap();
    guest.write32(regs::PMRMSCL, BASE as u32);
    assert_eq!(guest.io(1, two_pages(nvm::READ, BASE)), Err(Status::DATA_TRANSFER_ERROR));
    // The admin queues cannot be there.
    guest.write32(regs::CC, 0);
    guest.run();
    guest.write32(regs::PMRMSCL, (BASE | regs::PMRMSC_CMSE) as u32);
    guest.write64(regs::ASQ, BASE);
    guest.write32(regs::CC, 0x0046_0001);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 2, "CSTS.CFS");
}

#[test]
fn a_read_of_the_status_is_the_barrier() {
    let guest = guest();
    guest.write_bytes(BASE, &[1; 8]);
    let before = flushes(&guest);
    for offset in [regs::PMRCAP, regs::PMRCTL, regs::PMREBS, regs::CSTS] {
        guest.read32(offset);
    }
    assert_eq!(flushes(&guest), before, "reads of other registers are none");
    for (count, (offset, bytes)) in [(0, 4), (3, 1), (2, 2), (0, 8)].into_iter().enumerate() {
        guest.controller.bar_read(0, regs::PMRSTS + offset, &mut vec![0; bytes]);
        assert_eq!(flushes(&guest), before + 1 + count as u64, "{bytes} bytes at {offset}");
    }
    // Its contents are saved when it is disabled, and then there is nothing to save.
    let before = flushes(&guest);
    guest.write32(regs::PMRCTL, 0);
    assert_eq!(flushes(&guest), before + 1);
    guest.write32(regs::PMRCTL, 0);
    guest.read32(regs::PMRSTS);
    assert_eq!(flushes(&guest), before + 1);
}

#[test]
fn a_shutdown_makes_the_region_durable() {
    let guest = guest();
    let before = flushes(&guest);
    guest.write32(regs::CC, 0x0046_4001);
    guest.run();
    assert_eq!((guest.read32(regs::CSTS) >> 2 & 3, flushes(&guest)), (2, before + 1));
}

#[test]
fn contents_outlive_resets_and_registers_those_of_the_controller() {
    let mut guest = guest();
    guest.write_bytes(BASE + 0x3000, &[7; 16]);
    controller_reset(&mut guest);
    assert_eq!((guest.read32(regs::PMRCTL), guest.read32(regs::PMRMSCL)), (1, BASE as u32 | 2));
    assert_eq!(guest.read_bytes(BASE + 0x3000, 16), [7; 16]);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, BASE)).unwrap();
    subsystem_reset(&mut guest);
    assert_eq!((guest.read32(regs::PMRCTL), guest.read32(regs::PMRMSCL)), (0, 0));
    assert!(!is_shown(&guest));
    assert_eq!(guest.read_bytes(BASE + 0x3000, 16), [0; 16], "it is not ready");
    guest.write_bytes(BASE + 0x3000, &[8; 16]);
    open(&mut guest);
    assert_eq!(guest.read_bytes(BASE + 0x3000, 16), [7; 16], "what was written meanwhile is lost");
}

#[test]
fn what_cannot_be_made_durable_is_said_until_the_function_is_reset() {
    let mut guest = guest();
    let set = SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: u32::from(feature::ASYNC_EVENT_CONFIGURATION),
        cdw11: 1 << 5,
        ..SubmissionEntry::default()
    };
    guest.admin(set).unwrap();
    guest.push(0, SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() });
    guest.ring(0);
    guest.run();
    guest.process.region_fails.store(true, Ordering::SeqCst);
    // ERR, and HSTS: unreliable.
    assert_eq!(guest.read32(regs::PMRSTS), 0b011 << 9 | 1);
    guest.run();
    let events = guest.reap(0);
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].dw0, Event::RELIABILITY_DEGRADED.to_dword());
    let log =
        SubmissionEntry { opcode: admin::GET_LOG_PAGE, cdw10: 2 | 127 << 16, ..SubmissionEntry::default() };
    assert_eq!(SmartLog::from_bytes(&guest.admin_data(log).unwrap()).critical_warning, 1 << 5);
    // What is flushed later says nothing of what was lost.
    guest.process.region_fails.store(false, Ordering::SeqCst);
    assert_eq!(guest.read32(regs::PMRSTS), 0b011 << 9 | 1);
    guest.migrate(1);
    assert_eq!(guest.read32(regs::PMRSTS), 0b011 << 9 | 1);
    guest.write32(regs::PMRCTL, 0);
    assert_eq!(guest.read32(regs::PMRSTS), 1 << 8 | 1, "the health of what is not ready is not told");
    guest.write32(regs::PMRCTL, 1);
    controller_reset(&mut guest);
    assert_eq!(guest.read32(regs::PMRSTS), 0b011 << 9 | 1);
    subsystem_reset(&mut guest);
    open(&mut guest);
    assert_eq!(guest.read32(regs::PMRSTS), 0);
}

#[test]
fn a_sanitize_operation_erases_the_region_and_keeps_it_from_being_enabled() {
    let sanitize = SubmissionEntry {
        opcode: admin::SANITIZE,
        cdw10: opcode::SANITIZE_BLOCK_ERASE,
        ..SubmissionEntry::default()
    };
    let mut guest = guest();
    guest.write_bytes(BASE + REGION_BYTES - 8, &[9; 8]);
    assert_eq!(guest.admin(sanitize), Err(Status::SANITIZE_PROHIBITED_BY_REGION));
    guest.write32(regs::PMRCTL, 0);
    guest.push(0, sanitize);
    guest.ring(0);
    // The operation is looked at in every state that it has, and the guest wants the region back meanwhile.
    assert_eq!(guest.controller.process(0), crate::Progress::More, "it takes more than one pass");
    guest.write32(regs::PMRCTL, 1);
    assert_eq!(
        (guest.read32(regs::PMRCTL), guest.read32(regs::PMRSTS), is_shown(&guest)),
        (1, 1 << 8, false)
    );
    guest.migrate(1);
    assert_eq!(
        (guest.read32(regs::PMRCTL), guest.read32(regs::PMRSTS), is_shown(&guest)),
        (1, 1 << 8, false)
    );
    guest.run_until("the end", |guest| guest.read32(regs::PMRSTS) == 0);
    assert!(is_shown(&guest));
    assert!(flushes(&guest) > 0, "durably");
    assert_eq!(guest.reap(0).len(), 1);
    assert_eq!(guest.read_bytes(BASE, REGION_BYTES as usize), vec![0; REGION_BYTES as usize]);
    guest.write_bytes(BASE, &[1]);
    assert_eq!(guest.read_bytes(BASE, 1), [1]);
}

#[test]
fn an_erase_that_fails_fails_the_operation_and_the_region_stays_disabled() {
    let mut guest = guest();
    guest.write32(regs::PMRCTL, 0);
    guest.process.region_fails.store(true, Ordering::SeqCst);
    let sanitize = |cdw10| SubmissionEntry { opcode: admin::SANITIZE, cdw10, ..SubmissionEntry::default() };
    guest.admin(sanitize(opcode::SANITIZE_BLOCK_ERASE | opcode::SANITIZE_UNRESTRICTED_EXIT)).unwrap();
    guest.run();
    guest.write32(regs::PMRCTL, 1);
    assert_eq!(guest.io(1, transfer(nvm::READ, 1, 0, 1, 0)), Err(Status::SANITIZE_FAILED));
    assert_eq!(guest.read32(regs::PMRSTS), 1 << 8);
    guest.process.region_fails.store(false, Ordering::SeqCst);
    guest.admin(sanitize(opcode::SANITIZE_EXIT_FAILURE_MODE)).unwrap();
    assert_eq!(guest.read32(regs::PMRSTS), 0);
}

#[test]
fn the_regions_of_all_controllers_of_a_subsystem_are_sanitized() {
    let subsystem = Subsystem::new("SHARED", &[namespace(1, 64)], true).unwrap();
    let member = |id| {
        let region = Arc::new(GuestMapping::new(REGION_BYTES as usize).unwrap());
        let memory = memory_with_region(&guest_memory(), region).unwrap();
        let mut guest = Guest::member_with(&subsystem, id, config(), memory);
        guest.region = Some(BASE);
        guest.enable();
        guest
    };
    let (mut first, second) = (member(1), member(2));
    second.write32(regs::PMRCTL, 1);
    second.write_bytes(BASE, &[5; 8]);
    let sanitize = SubmissionEntry {
        opcode: admin::SANITIZE,
        cdw10: opcode::SANITIZE_BLOCK_ERASE,
        ..SubmissionEntry::default()
    };
    assert_eq!(first.admin(sanitize), Err(Status::SANITIZE_PROHIBITED_BY_REGION), "it is another's");
    assert_eq!(first.read32(regs::PMRSTS), 1 << 8);
    first.write32(regs::PMRCTL, 1);
    assert_eq!(first.read32(regs::PMRSTS), 0, "what was refused holds nothing");
    first.write32(regs::PMRCTL, 0);
    second.write32(regs::PMRCTL, 0);
    first.admin(sanitize).unwrap();
    second.write32(regs::PMRCTL, 1);
    assert_eq!(second.read32(regs::PMRSTS), 1 << 8);
    first.run_until("the end", |first| {
        second.run();
        first.run();
        second.read32(regs::PMRSTS) == 0
    });
    assert_eq!(second.read_bytes(BASE, 8), [0; 8]);
}

#[test]
fn what_is_written_to_the_region_is_marked_like_ram() {
    let region = Arc::new(GuestMapping::new(REGION_BYTES as usize).unwrap());
    let memory = memory_with_region(&guest_memory(), Arc::clone(&region)).unwrap();
    let subsystem = Subsystem::new("MARKED", &[], false).unwrap();
    let mut guest = Guest::member_with(&subsystem, 0, config(), memory);
    guest.enable();
    open(&mut guest);
    guest.write_bytes(BASE + 0x3004, &[1, 2, 3, 4]);
    let prp1 = BASE + 0x5000;
    guest
        .admin(SubmissionEntry { opcode: admin::IDENTIFY, prp1, cdw10: 1, ..SubmissionEntry::default() })
        .unwrap();
    let marked: Vec<_> = (0..16).filter(|page| region.bitmap().dirty_at(page * 4096)).collect();
    assert_eq!(marked, [3, 5]);
}

#[test]
fn regions_that_cannot_be_are_refused() {
    let memory = guest_memory();
    for bytes in [2048, 12 << 10] {
        let region = Arc::new(GuestMapping::new(bytes).unwrap());
        assert!(
            matches!(memory_with_region(&memory, region), Err(Error::Region { length_bytes }) if length_bytes == bytes as u64)
        );
    }
    let region = Arc::new(GuestMapping::new(4096).unwrap());
    let with = memory_with_region(&memory, region.clone()).unwrap();
    assert!(memory_with_region(&with, region).is_err(), "there is one");
    for region_bytes in [1, 2048, 3 << 12, 1 << 32] {
        assert!(ControllerConfig { region_bytes, ..config() }.check().is_err());
    }
    let build = |memory: &bus::GuestMemory, region_bytes| {
        let (contexts, _) = super::driver::contexts(memory, 1, 8);
        let config = ControllerConfig { region_bytes, ..config() };
        let (sink, host) = (Arc::default(), Arc::default());
        let (sink, host): (Arc<super::driver::Interrupts>, Arc<super::driver::Process>) = (sink, host);
        crate::Controller::new(config, memory.clone(), &[], contexts, sink, host).map(drop)
    };
    build(&with, 4096).unwrap();
    for (memory, bytes) in [(&with, 0), (&with, 8192), (&memory, 4096)] {
        assert!(matches!(build(memory, bytes), Err(Error::Config { .. })), "{bytes}");
    }
}

#[test]
fn a_state_that_no_guest_can_bring_about_is_refused() {
    let mut guest = guest();
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    assert!(state.region.is_some());
    type Change = fn(&mut NvmeState);
    let changes: [(&str, Change); 6] = [
        ("region.memory_space", |s| s.region.as_mut().unwrap().memory_space |= 1),
        ("region.error", |s| s.region.as_mut().unwrap().error = 2),
        ("region.is_first", |s| s.region.as_mut().unwrap().is_first = true),
        ("region.enabled", |s| {
            let region = s.region.as_mut().unwrap();
            (region.enabled, region.memory_space) = (false, 0);
        }),
        ("sq[1].pages", |s| s.sq.get_mut(1).unwrap().pages[0] = 1 << 61),
        ("PCI part", |s| s.pci.config.bar_length_bytes[4] /= 2),
    ];
    for (field, change) in changes {
        let mut changed = state.clone();
        change(&mut changed);
        let error = guest.loaded_elsewhere(&changed).map(drop).unwrap_err().to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
    // A controller without a region.
    guest.config.region_bytes = 0;
    let mut changed = state.clone();
    changed.pci.config.bar_length_bytes[4] = 0;
    assert!(guest.loaded_elsewhere(&changed).is_err());
    guest.config.region_bytes = REGION_BYTES;
    // One that nobody has used says nothing.
    let fresh = Guest::power_on(config(), vec![]);
    fresh.controller.pause(Instant::now() + PATIENCE).unwrap();
    assert_eq!(fresh.controller.save().region, None);
}

#[test]
fn which_of_two_came_first_is_saved() {
    let config = ControllerConfig { buffer_bytes: REGION_BYTES, ..config() };
    let mut guest = Guest::ready(config, vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    open(&mut guest);
    guest.write64(regs::CMBMSC, (BASE + 0x8000) | regs::CMBMSC_CRE | regs::CMBMSC_CMSE);
    for workers in [1, 2] {
        assert_eq!((guest.read32(regs::CMBSTS), guest.read32(regs::PMRSTS)), (1, 0));
        guest.io(1, transfer(nvm::READ, 1, 0, 8, BASE + 0xf000)).unwrap();
        guest.migrate(workers);
    }
    // The other way round.
    guest.write32(regs::PMRMSCL, 0);
    guest.write32(regs::PMRMSCL, (BASE | regs::PMRMSC_CMSE) as u32);
    for workers in [1, 2] {
        assert_eq!((guest.read32(regs::CMBSTS), guest.read32(regs::PMRSTS)), (0, 1 << 12));
        guest.migrate(workers);
    }
}
