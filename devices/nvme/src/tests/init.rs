//! Registers, enable, disable, shutdown, subsystem reset.

use std::sync::Arc;

use block::{Fault, FaultControl, FaultImage, Target};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::regs::{self, Cap};
use nvme_spec::{Status, SubmissionEntry};

use super::driver::{Guest, memory_image, namespace, transfer};
use super::messages::messages_of;
use crate::{ControllerConfig, NamespaceConfig};

fn config() -> ControllerConfig {
    ControllerConfig::new("INIT")
}

/// A guest whose namespace 1 misbehaves on demand.
fn faulty() -> (Guest, Arc<FaultControl>) {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(64 * 512), control.clone()));
    let namespaces = vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }];
    (Guest::ready(config(), namespaces), control)
}

#[test]
fn a_driver_initialises_and_does_io() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    let controller = nvme_spec::identify::IdentifyController::from_bytes(&guest.identify(1, 0).unwrap());
    assert_eq!(&controller.sn, b"INIT                ");
    assert_eq!(controller.nn, 1024);
    guest.create_pair(1, 16);
    let page = guest.pages(1);
    guest.write_bytes(page, &[0xa5; 512]);
    guest.io(1, transfer(nvm::WRITE, 1, 7, 1, page)).unwrap();
    let other = guest.pages(1);
    guest.clear(other, 4096);
    guest.io(1, transfer(nvm::READ, 1, 7, 1, other)).unwrap();
    assert_eq!(guest.read_bytes(other, 512), vec![0xa5; 512]);
    assert_eq!(guest.interrupts.take(1), 2, "one interrupt a completion, on the queue's vector");
    assert_eq!(guest.controller.statistics().in_flight, 0);
}

/// Reads every register by 4 and by 8 bytes and compares; what is not listed reads 0.
fn check_registers(guest: &Guest, expected: &[(u64, u32)], when: &str) {
    let value = |offset| expected.iter().find(|(at, _)| *at == offset).map_or(0, |(_, value)| *value);
    for offset in (0..0x1000).step_by(4) {
        assert_eq!(guest.read32(offset), value(offset), "{when}, {offset:#x}");
    }
    for offset in (0..0x1000).step_by(8) {
        let both = u64::from(value(offset)) | u64::from(value(offset + 4)) << 32;
        assert_eq!(guest.read64(offset), both, "{when}, {offset:#x}, 8 bytes");
    }
    for offset in 0..0x70 {
        let mut byte = [0xff];
        pci::PciFunction::bar_read(&*guest.controller, 0, offset, &mut byte);
        assert_eq!(
            byte[0],
            value(offset & !3).to_le_bytes()[(offset & 3) as usize],
            "{when}, {offset:#x}, 1 byte"
        );
    }
}

#[test]
fn every_register_reads_before_during_and_after_enable() {
    let mut guest = Guest::power_on(config(), vec![]);
    let cap = Cap::default().with_mqes(0xffff).with_ams(1).with_to(60).with_nssrs(1).with_css(0x41);
    let cap = cap.with_mpsmax(4).with_crms(3);
    let crto = 60 << 16 | 60;
    let mut table =
        vec![(0x00, cap.0 as u32), (0x04, (cap.0 >> 32) as u32), (regs::VS, 0x2_0000), (regs::CRTO, crto)];
    check_registers(&guest, &table, "after power-on");
    let (sq_base, cq_base) = (guest.pages(1), guest.pages(1));
    guest.write32(regs::AQA, 31 << 16 | 31);
    guest.write64(regs::ASQ, sq_base);
    guest.write32(regs::ACQ, cq_base as u32);
    table.extend([(regs::AQA, 0x1f_001f), (regs::ASQ, sq_base as u32), (regs::ACQ, cq_base as u32)]);
    check_registers(&guest, &table, "configured");
    guest.write32(regs::CC, 0x0046_0001);
    table.push((regs::CC, 0x0046_0001));
    check_registers(&guest, &table, "enabling");
    guest.run();
    table.push((regs::CSTS, 1));
    check_registers(&guest, &table, "enabled");
    guest.write32(regs::INTMS, 5);
    guest.write32(regs::INTMC, 4);
    table.extend([(regs::INTMS, 1), (regs::INTMC, 1)]);
    check_registers(&guest, &table, "interrupts masked");
    guest.write32(regs::CC, 0x0046_0000);
    guest.run();
    table.retain(|(offset, _)| ![regs::CC, regs::CSTS, regs::INTMS, regs::INTMC].contains(offset));
    table.push((regs::CC, 0x0046_0000));
    check_registers(&guest, &table, "disabled");
}

#[test]
fn narrow_writes_merge_and_bad_accesses_change_nothing() {
    let guest = Guest::power_on(config(), vec![]);
    let write = |offset: u64, data: &[u8]| pci::PciFunction::bar_write(&*guest.controller, 0, offset, data);
    write(regs::AQA, &[0x1f]);
    write(regs::AQA + 2, &[0x0f, 0]);
    assert_eq!(guest.read32(regs::AQA), 0x0f_001f);
    for (offset, data) in [
        (regs::AQA + 1, &[9u8, 9][..]),
        (regs::ASQ + 4, &[9; 8]),
        (regs::AQA + 2, &[9; 4]),
        (regs::AQA, &[9; 3]),
    ] {
        write(offset, data);
    }
    // Read-only registers.
    for offset in [regs::CAP, regs::VS, regs::CRTO, regs::CMBSZ, 0xff8] {
        write(offset, &[0xff; 4]);
    }
    assert_eq!((guest.read32(regs::AQA), guest.read64(regs::ASQ)), (0x0f_001f, 0));
    assert_eq!(guest.read32(regs::VS), 0x2_0000);
    // All BAR 0 offsets beyond, doorbells and MSI-X included, take any access.
    let length = pci::PciFunction::bars(&*guest.controller)[0].length_bytes;
    for offset in (0..length).step_by(4) {
        for bytes in [1, 2, 4, 8] {
            let mut data = vec![0; bytes];
            pci::PciFunction::bar_read(&*guest.controller, 0, offset, &mut data);
            write(offset, &data);
        }
    }
    guest.run();
}

#[test]
fn an_enable_that_cannot_be_is_fatal_and_a_reset_leads_on() {
    let aqa = 31 << 16 | 31;
    let (sq, cq) = (0x10_0000, 0x10_1000);
    let bad: [(&str, u32, u64, u64, u32); 10] = [
        ("page size above MPSMAX", aqa, sq, cq, 0x0046_0281),
        ("command set", aqa, sq, cq, 0x0046_0011),
        ("arbitration reserved", aqa, sq, cq, 0x0046_1001),
        ("arbitration of a vendor", aqa, sq, cq, 0x0046_3801),
        ("SQ entry size", aqa, sq, cq, 0x0045_0001),
        ("CQ entry size", aqa, sq, cq, 0x0056_0001),
        ("admin SQ of one entry", 31 << 16, sq, cq, 0x0046_0001),
        ("admin CQ of one entry", 31, sq, cq, 0x0046_0001),
        ("ASQ outside memory", aqa, 0xffff_ffff_ffff_f000, cq, 0x0046_0001),
        ("ACQ not aligned to the 64 KiB page", aqa, sq, cq, 0x0046_0201),
    ];
    let guest = Guest::power_on(config(), vec![]);
    for (what, aqa, asq, acq, cc) in bad {
        guest.write32(regs::AQA, aqa);
        guest.write64(regs::ASQ, asq);
        guest.write64(regs::ACQ, acq);
        guest.write32(regs::CC, cc);
        guest.run();
        assert_eq!(guest.read32(regs::CSTS), 2, "{what}: CFS and not RDY");
        guest.write32(regs::CC, 0);
        guest.run();
        assert_eq!(guest.read32(regs::CSTS), 0, "{what}: after reset");
    }
    guest.write64(regs::ASQ, sq);
    guest.write64(regs::ACQ, cq);
    guest.write32(regs::AQA, aqa);
    guest.write32(regs::CC, 0x0046_0001);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 1);
}

#[test]
fn a_reset_waits_for_what_is_in_flight_and_forgets_everything() {
    let (mut guest, control) = faulty();
    guest.use_shadow_doorbells();
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    guest.clear(page, 4096);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    assert_eq!(guest.doorbell_events().len(), 1);
    control.inject(Target::Read, 0, 1, Fault::Hold);
    guest.push(1, transfer(nvm::READ, 1, 1, 1, page));
    guest.ring(1);
    guest.run();
    guest.write32(regs::CC, 0x0046_0000);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS) & 1, 1, "RDY stays while the backend may write to the guest");
    assert!(guest.doorbell_events().is_empty(), "no doorbell goes past the controller any more");
    control.release_held();
    guest.run_until("RDY to go", |guest| guest.read32(regs::CSTS) == 0);
    assert!(guest.reap_silently(1).is_empty(), "a command that a reset ended completes nowhere");
    // The old doorbell buffers are guest memory like any other now.
    let (shadow, _) = guest.shadow.take().unwrap();
    guest.write_bytes(shadow, &[0xff; 8192]);
    guest.enable();
    guest.create_pair(1, 8);
    guest.io(1, transfer(nvm::READ, 1, 1, 1, page)).unwrap();
    assert_eq!(guest.read_bytes(shadow, 8192), vec![0xff; 8192], "stale buffers are not written");
}

#[test]
fn disabling_and_enabling_before_the_worker_looks_is_still_a_reset() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    guest.write32(regs::CC, 0x0046_0000);
    guest.write32(regs::CC, 0x0046_0001);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 1);
    let admin_queue = guest.queues.get_mut(&0).unwrap();
    (admin_queue.tail, admin_queue.head, admin_queue.phase) = (0, 0, true);
    let base = admin_queue.cq_base;
    guest.clear(base, 4096);
    assert_eq!(guest.create_sq(2, 8, 0x20_0000, 1), Err(Status::COMPLETION_QUEUE_INVALID), "queue 1 is gone");
}

#[test]
fn shutdown_is_complete_after_the_flush_and_not_before() {
    for notification in [regs::SHN_NORMAL, regs::SHN_ABRUPT] {
        let (mut guest, control) = faulty();
        guest.create_pair(1, 8);
        let page = guest.pages(1);
        control.inject(Target::Write, 0, 1, Fault::Hold);
        guest.push(1, transfer(nvm::WRITE, 1, 0, 1, page));
        guest.ring(1);
        guest.run();
        guest.write32(regs::CC, 0x0046_0001 | notification << 14);
        assert_eq!(guest.read32(regs::CSTS), 1 | 1 << 2, "in progress at once");
        guest.run();
        let seen = control.seen();
        assert_eq!(guest.read32(regs::CSTS), 1 | 1 << 2, "waits for the write");
        control.inject(Target::Flush, 0, 1, Fault::Hold);
        control.release_held();
        guest.run_until("the flush to begin", |_| control.held() == 1);
        assert_eq!(control.seen(), seen + 1);
        assert_eq!(guest.read32(regs::CSTS), 1 | 1 << 2, "waits for the flush");
        control.release_held();
        guest.run_until("shutdown", |guest| guest.read32(regs::CSTS) == 1 | 2 << 2);
        // Only a reset leads on.
        guest.write32(regs::CC, 0x0046_0000);
        guest.run();
        assert_eq!(guest.read32(regs::CSTS), 0);
        guest.enable();
    }
}

#[test]
fn a_shutdown_is_possible_while_disabled_and_together_with_the_disable() {
    let (guest, control) = faulty();
    guest.write32(regs::CC, 0x0046_4000);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 2 << 2);
    assert_eq!(control.seen(), 1, "one flush");
    let mut guest = Guest::power_on(config(), vec![namespace(1, 8)]);
    guest.write32(regs::CC, 0x0046_4000);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 2 << 2);
    guest.enable();
}

#[test]
fn a_failed_flush_at_shutdown_is_fatal() {
    let (guest, control) = faulty();
    control.inject(Target::Flush, 0, 1, Fault::Fail(block::Failure::Io(5)));
    guest.write32(regs::CC, 0x0046_4001);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 1 | 1 << 1 | 2 << 2);
}

#[test]
fn a_shutdown_that_failed_while_disabled_is_no_failure_of_the_next_life() {
    let (mut guest, control) = faulty();
    guest.write32(regs::CC, 0x0046_0000);
    guest.run();
    control.inject(Target::Flush, 0, 1, Fault::Fail(block::Failure::Io(5)));
    guest.write32(regs::CC, 0x0046_4000);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 1 << 1 | 2 << 2);
    guest.enable();
    assert_eq!(guest.read32(regs::CSTS), 1);
}

#[test]
fn the_log_is_told_once_of_failing_flushes_at_shutdown() {
    let (mut guest, control) = faulty();
    control.inject(Target::Flush, 0, 5, Fault::Fail(block::Failure::Io(5)));
    let messages = messages_of(|| {
        for _ in 0..5 {
            guest.write32(regs::CC, 0x0046_4001);
            guest.run();
            assert_eq!(guest.read32(regs::CSTS) >> 1 & 7, 0b101);
            guest.write32(regs::CC, 0x0046_0000);
            guest.run();
            guest.enable();
        }
    });
    let of_shutdown = messages.iter().filter(|message| message.contains("the flush at shutdown failed"));
    assert_eq!(of_shutdown.count(), 1, "{messages:?}");
    assert_eq!(messages.len(), 2, "and one of the image: {messages:?}");
}

#[test]
fn a_subsystem_reset_forgets_the_admin_queue_too() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.write32(regs::NSSR, 0x1234_5678);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 1, "another value does nothing");
    guest.write32(regs::NSSR, regs::NSSR_MAGIC);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 1 << 4, "NSSRO");
    assert_eq!((guest.read32(regs::CC), guest.read32(regs::AQA), guest.read64(regs::ASQ)), (0, 0, 0));
    guest.write32(regs::CSTS, 1 << 4);
    assert_eq!(guest.read32(regs::CSTS), 0);
    guest.enable();
}

#[test]
fn a_silent_host_with_a_keep_alive_timer_stops_the_controller() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    let set =
        SubmissionEntry { opcode: admin::SET_FEATURES, cdw10: 0x0f, cdw11: 1, ..SubmissionEntry::default() };
    assert!(guest.controller.deadline().is_none());
    guest.admin(set).unwrap();
    let deadline = guest.controller.deadline().unwrap();
    guest.admin(SubmissionEntry { opcode: admin::KEEP_ALIVE, ..SubmissionEntry::default() }).unwrap();
    assert!(guest.controller.deadline().unwrap() > deadline, "Keep Alive starts the timer again");
    let get = SubmissionEntry { opcode: admin::GET_FEATURES, cdw10: 0x0f, ..SubmissionEntry::default() };
    assert_eq!(guest.admin(get), Ok(1000), "rounded up to a second");
    crate::shared::lock(&guest.controller.admin).keep_alive =
        Some(deadline - std::time::Duration::from_secs(3600));
    guest.controller.process(0);
    assert_eq!(guest.read32(regs::CSTS), 1 | 1 << 1, "CFS");
    guest.write32(regs::CC, 0x0046_0000);
    guest.run();
    assert!(guest.controller.deadline().is_none());
    guest.enable();
    let log =
        SubmissionEntry { opcode: admin::GET_LOG_PAGE, cdw10: 15 << 16 | 1, ..SubmissionEntry::default() };
    let entry = nvme_spec::log::ErrorEntry::from_bytes(&guest.admin_data(log).unwrap());
    assert_eq!((entry.error_count, entry.status >> 1), (1, Status::KEEP_ALIVE_EXPIRED.0));
}
