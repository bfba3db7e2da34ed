//! Queues: creation, deletion, full completion queues, doorbells and their shadows.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use block::{Fault, FaultControl, FaultImage, Target};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{Status, SubmissionEntry, regs};
use pci::PciFunction;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Guest, MEMORY_BYTES, PATIENCE, Pair, memory_image, namespace, transfer};
use crate::{ControllerConfig, NamespaceConfig};

fn config() -> ControllerConfig {
    ControllerConfig { queue_entries: 1024, ..ControllerConfig::new("QUEUES") }
}

fn create(opcode: u8, id: u32, entries: u32, prp1: u64, cdw11: u32) -> SubmissionEntry {
    SubmissionEntry { opcode, prp1, cdw10: id | (entries - 1) << 16, cdw11, ..SubmissionEntry::default() }
}

fn delete(opcode: u8, id: u32) -> SubmissionEntry {
    SubmissionEntry { opcode, cdw10: id, ..SubmissionEntry::default() }
}

#[test]
fn create_commands_check_everything() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    let base = guest.pages(4);
    let end = MEMORY_BYTES as u64;
    let cases = [
        ("CQ 0", create(admin::CREATE_CQ, 0, 8, base, 3), Status::INVALID_QUEUE_IDENTIFIER),
        ("CQ too high", create(admin::CREATE_CQ, 65, 8, base, 3), Status::INVALID_QUEUE_IDENTIFIER),
        ("CQ twice", create(admin::CREATE_CQ, 1, 8, base, 3), Status::INVALID_QUEUE_IDENTIFIER),
        ("CQ of 1", create(admin::CREATE_CQ, 2, 1, base, 3), Status::INVALID_QUEUE_SIZE),
        ("CQ above MQES", create(admin::CREATE_CQ, 2, 1025, base, 3), Status::INVALID_QUEUE_SIZE),
        ("CQ vector", create(admin::CREATE_CQ, 2, 8, base, 65 << 16 | 3), Status::INVALID_INTERRUPT_VECTOR),
        ("CQ misaligned", create(admin::CREATE_CQ, 2, 8, base + 16, 3), Status::PRP_OFFSET_INVALID),
        ("CQ outside memory", create(admin::CREATE_CQ, 2, 8, end, 3), Status::INVALID_FIELD),
        ("CQ across the end", create(admin::CREATE_CQ, 2, 1024, end - 4096, 3), Status::INVALID_FIELD),
        ("CQ at the end of addresses", create(admin::CREATE_CQ, 2, 1024, !0xfff, 3), Status::INVALID_FIELD),
        ("CQ list misaligned", create(admin::CREATE_CQ, 2, 8, base + 4, 2), Status::PRP_OFFSET_INVALID),
        ("CQ list outside memory", create(admin::CREATE_CQ, 2, 8, end, 2), Status::DATA_TRANSFER_ERROR),
        ("SQ 0", create(admin::CREATE_SQ, 0, 8, base, 1 << 16 | 1), Status::INVALID_QUEUE_IDENTIFIER),
        ("SQ twice", create(admin::CREATE_SQ, 1, 8, base, 1 << 16 | 1), Status::INVALID_QUEUE_IDENTIFIER),
        ("SQ with CQ 0", create(admin::CREATE_SQ, 2, 8, base, 1), Status::INVALID_QUEUE_IDENTIFIER),
        (
            "SQ with CQ too high",
            create(admin::CREATE_SQ, 2, 8, base, 65 << 16 | 1),
            Status::INVALID_QUEUE_IDENTIFIER,
        ),
        (
            "SQ without CQ",
            create(admin::CREATE_SQ, 2, 8, base, 2 << 16 | 1),
            Status::COMPLETION_QUEUE_INVALID,
        ),
        ("SQ above MQES", create(admin::CREATE_SQ, 2, 1025, base, 1 << 16 | 1), Status::INVALID_QUEUE_SIZE),
        ("SQ outside memory", create(admin::CREATE_SQ, 2, 8, end, 1 << 16 | 1), Status::INVALID_FIELD),
        ("delete CQ 0", delete(admin::DELETE_CQ, 0), Status::INVALID_QUEUE_IDENTIFIER),
        ("delete no CQ", delete(admin::DELETE_CQ, 2), Status::INVALID_QUEUE_IDENTIFIER),
        ("delete a CQ in use", delete(admin::DELETE_CQ, 1), Status::INVALID_QUEUE_DELETION),
        ("delete SQ 0", delete(admin::DELETE_SQ, 0), Status::INVALID_QUEUE_IDENTIFIER),
        ("delete no SQ", delete(admin::DELETE_SQ, 2), Status::INVALID_QUEUE_IDENTIFIER),
        ("delete SQ 65535", delete(admin::DELETE_SQ, 0xffff), Status::INVALID_QUEUE_IDENTIFIER),
    ];
    for (what, entry, status) in cases {
        assert_eq!(guest.admin(entry), Err(status), "{what}");
    }
    // Nothing of it left a trace.
    guest.create_pair(2, 8);
    let page = guest.pages(1);
    for queue in [1, 2] {
        guest.io(queue, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
        guest.admin(delete(admin::DELETE_SQ, queue.into())).unwrap();
        guest.admin(delete(admin::DELETE_CQ, queue.into())).unwrap();
    }
    // Entry sizes are checked when queues are made, since they may be set after the enable.
    guest.write32(regs::CC, 0);
    guest.start_enable();
    guest.write32(regs::CC, 0);
    guest.write32(regs::CC, 0x0040_0001);
    guest.run();
    assert_eq!(guest.admin(create(admin::CREATE_CQ, 1, 8, base, 3)), Err(Status::INVALID_FIELD));
    guest.write32(regs::CC, 0x0046_0001);
    guest.admin(create(admin::CREATE_CQ, 1, 8, base, 3)).unwrap();
    let config = ControllerConfig { contiguous_queues: true, ..config() };
    let mut guest = Guest::ready(config, vec![]);
    assert_eq!(guest.admin(create(admin::CREATE_CQ, 1, 8, base, 2)), Err(Status::INVALID_FIELD), "CAP.CQR");
}

#[test]
fn queues_of_scattered_pages_work_like_contiguous_ones() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    // 100 entries: two pages of submission entries, not adjacent and not in order; one page of completions.
    let pages = guest.pages(4);
    let lists = guest.pages(2);
    guest.write_bytes(lists, &[(pages + 8192).to_le_bytes(), pages.to_le_bytes()].concat());
    guest.write_bytes(lists + 4096 + 64, &(pages + 4096).to_le_bytes());
    guest.clear(pages, 4 * 4096);
    guest.admin(create(admin::CREATE_CQ, 1, 100, lists + 4096 + 64, 1 << 16 | 2)).unwrap();
    guest.admin(create(admin::CREATE_SQ, 1, 100, lists, 1 << 16)).unwrap();
    let data = guest.pages(1);
    let (mut head, mut phase) = (0, true);
    for round in 0..250u64 {
        let index = round % 100;
        let entry = SubmissionEntry { cid: round as u16, ..transfer(nvm::READ, 1, round % 64, 1, data) };
        let page = if index < 64 { pages + 8192 } else { pages };
        guest.write_bytes(page + index % 64 * 64, &entry.to_bytes());
        guest.write32(regs::sq_tail_doorbell(1), ((index + 1) % 100) as u32);
        guest.run();
        let bytes = guest.read_bytes(pages + 4096 + head * 16, 16);
        let entry = nvme_spec::CompletionEntry::from_bytes(&bytes.try_into().unwrap());
        assert_eq!((entry.cid, entry.phase(), entry.status()), (round as u16, phase, Status::SUCCESS));
        head = (head + 1) % 100;
        phase ^= head == 0;
        guest.write32(regs::cq_head_doorbell(1), head as u32);
        if round == 120 {
            guest.queues.remove(&1);
            guest.migrate(1);
        }
    }
}

/// Adds submission queue `id` of `entries` entries that completes to queue 1.
fn share_queue_1(guest: &mut Guest, id: u16, entries: u32) {
    let sq_base = guest.pages((u64::from(entries) * 64).div_ceil(4096));
    guest.create_sq(id, entries, sq_base, 1).unwrap();
    let pair = Pair { sq_base, entries, tail: 0, ..guest.queues[&1].clone() };
    guest.queues.insert(id, pair);
}

#[test]
fn a_full_completion_queue_holds_back_and_loses_nothing() {
    for shadow in [false, true] {
        let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
        if shadow {
            guest.use_shadow_doorbells();
        }
        guest.create_pair(1, 4);
        share_queue_1(&mut guest, 2, 64);
        share_queue_1(&mut guest, 3, 64);
        let page = guest.pages(1);
        let mut expected = Vec::new();
        for lba in 0..40 {
            for queue in [2, 3] {
                expected.push((queue, guest.push(queue, transfer(nvm::READ, 1, lba, 1, page))));
            }
        }
        guest.ring(2);
        guest.ring(3);
        guest.run();
        let mut seen = Vec::new();
        // One at a time, three at a time: whatever room is made is used, and no wake-up is lost.
        while seen.len() < expected.len() {
            let entries = guest.reap_silently(1);
            assert!(
                !entries.is_empty() && entries.len() <= 3,
                "shadow {shadow}: {} of {}",
                seen.len(),
                expected.len()
            );
            seen.extend(entries.iter().map(|entry| (entry.sq_id, entry.cid)));
            let head = guest.queues[&1].head;
            guest.set_doorbell(regs::cq_head_doorbell(1), head);
            guest.run();
        }
        seen.sort_unstable();
        expected.sort_unstable();
        assert_eq!(seen, expected);
        assert_eq!(guest.controller.statistics().in_flight, 0);
    }
}

#[test]
fn a_full_admin_completion_queue_holds_back_too() {
    let mut guest = Guest::power_on(config(), vec![]);
    guest.unmask_interrupts();
    let (sq_base, cq_base) = (guest.pages(1), guest.pages(1));
    guest.write32(regs::AQA, 2 << 16 | 31);
    guest.write64(regs::ASQ, sq_base);
    guest.write64(regs::ACQ, cq_base);
    guest.write32(regs::CC, 0x0046_0001);
    guest.run();
    let pair = Pair { cq_id: 0, sq_base, cq_base, entries: 32, tail: 0, head: 0, phase: true, next_cid: 0 };
    guest.queues.insert(0, pair);
    let get = SubmissionEntry { opcode: admin::GET_FEATURES, cdw10: 1, ..SubmissionEntry::default() };
    let cids: Vec<u16> = (0..9).map(|_| guest.push(0, get)).collect();
    guest.ring(0);
    guest.run();
    let mut seen = Vec::new();
    let mut head = 0;
    let mut phase = true;
    while seen.len() < cids.len() {
        let bytes = guest.read_bytes(cq_base + head * 16, 16);
        let entry = nvme_spec::CompletionEntry::from_bytes(&bytes.try_into().unwrap());
        assert_eq!(entry.phase(), phase, "after {seen:?}");
        seen.push(entry.cid);
        head = (head + 1) % 3;
        phase ^= head == 0;
        guest.write32(regs::cq_head_doorbell(0), head as u32);
        guest.run();
    }
    assert_eq!(seen, cids);
}

#[test]
fn deleting_a_submission_queue_waits_for_its_commands() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(64 * 512), control.clone()));
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    guest.create_pair(1, 8);
    guest.create_pair(2, 8);
    let page = guest.pages(1);
    control.inject(Target::Read, 0, 1, Fault::Hold);
    let held = guest.push(1, transfer(nvm::READ, 1, 0, 1, page));
    guest.ring(1);
    guest.run();
    let cid = guest.push(0, delete(admin::DELETE_SQ, 1));
    guest.push(1, transfer(nvm::READ, 1, 1, 1, page));
    guest.ring(1);
    guest.ring(0);
    guest.run();
    assert!(guest.reap(0).is_empty() && guest.reap(1).is_empty());
    // Everything else goes on.
    guest.io(2, transfer(nvm::READ, 1, 2, 1, page)).unwrap();
    assert_eq!(
        guest.admin(delete(admin::DELETE_SQ, 1)),
        Err(Status::INVALID_QUEUE_IDENTIFIER),
        "it is being deleted"
    );
    assert_eq!(guest.admin(delete(admin::DELETE_CQ, 1)), Err(Status::INVALID_QUEUE_DELETION));
    control.release_held();
    let mut entries = Vec::new();
    guest.run_until("the deletion", |guest| {
        entries.extend(guest.reap(0));
        !entries.is_empty()
    });
    assert_eq!((entries[0].cid, entries[0].status()), (cid, Status::SUCCESS));
    let ended = guest.reap(1);
    assert_eq!(
        ended.iter().map(|entry| entry.cid).collect::<Vec<_>>(),
        [held],
        "and what was not fetched never runs"
    );
    guest.admin(delete(admin::DELETE_CQ, 1)).unwrap();
    guest.create_pair(1, 8);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
}

#[test]
fn doorbells_of_nothing_and_bad_values_change_nothing() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    for (offset, value) in [
        (regs::sq_tail_doorbell(1), 8),
        (regs::cq_head_doorbell(1), 8),
        (regs::cq_head_doorbell(1), 3),
        (regs::sq_tail_doorbell(2), 1),
        (regs::cq_head_doorbell(64), 1),
        (regs::sq_tail_doorbell(65), 1),
    ] {
        guest.write32(offset, value);
        guest.run();
    }
    for round in 0..20 {
        guest.io(1, transfer(nvm::READ, 1, round, 1, page)).unwrap();
    }
}

#[test]
fn parts_of_doorbells_and_several_at_once_change_nothing_and_are_no_error() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    guest.push(1, transfer(nvm::READ, 1, 0, 1, page));
    guest.push(0, SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() });
    guest.ring(0);
    guest.run();
    // As a tail each of these would be a good one of queue 1, or a bad one, or one of no queue.
    for doorbell in [regs::sq_tail_doorbell(1), regs::sq_tail_doorbell(5)] {
        for (offset, value) in [
            (0, &[1_u8][..]),
            (0, &[9]),
            (0, &[1, 0]),
            (2, &[0, 0]),
            (0, &[1, 0, 0, 0, 0, 0, 0, 0]),
            (1, &[1, 0, 0, 0]),
            (2, &[1, 0, 0, 0]),
            (4, &[0]),
        ] {
            guest.controller.bar_write(0, doorbell + offset, value);
        }
    }
    guest.run();
    assert!(guest.reap(1).is_empty(), "the command waits");
    assert!(guest.reap(0).is_empty(), "and no event tells of anything");
    guest.ring(1);
    guest.run();
    assert_eq!(guest.reap(1).len(), 1);
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    assert_eq!(guest.controller.save().events.error_count, 0, "nothing is in the log");
}

#[test]
fn shadow_doorbells_save_exits_and_lose_nothing() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    // Queues that exist already go on where they are.
    guest.use_shadow_doorbells();
    guest.create_pair(2, 8);
    for round in 0..50 {
        for queue in [1, 2] {
            guest.io(queue, transfer(nvm::READ, 1, round % 64, 1, page)).unwrap();
        }
    }
    let both = [regs::sq_tail_doorbell(1), regs::sq_tail_doorbell(2)];
    assert_eq!(guest.doorbell_events().into_iter().collect::<Vec<_>>(), both);
    // While the worker has not slept, the guest need not tell it: EventIdx is behind.
    let (shadow, event_index) = guest.shadow.unwrap();
    let load = |guest: &Guest, address: u64| -> u32 {
        guest.memory.load(GuestAddress(address), Ordering::SeqCst).unwrap()
    };
    assert_eq!(load(&guest, event_index + 8), guest.queues[&1].tail, "asleep: told of the very next entry");
    // The admin queue is rung by MMIO; its shadow follows.
    assert_eq!(load(&guest, shadow), guest.queues[&0].tail);
    // A value that is no index is not taken over, and is reported once.
    let bad = guest.memory.store(99u32, GuestAddress(shadow + 8), Ordering::SeqCst);
    bad.unwrap();
    guest.controller.process(1);
    let good = guest.queues[&1].tail;
    guest.memory.store(good, GuestAddress(shadow + 8), Ordering::SeqCst).unwrap();
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    // A new queue of an old identifier starts at 0, whatever its predecessor left in the buffers.
    guest.admin(delete(admin::DELETE_SQ, 1)).unwrap();
    guest.admin(delete(admin::DELETE_CQ, 1)).unwrap();
    assert_eq!(guest.doorbell_events().len(), 1);
    guest.create_pair(1, 8);
    guest.run();
    assert!(guest.reap_silently(1).is_empty());
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
}

/// A command that moves the shadow doorbells to fresh pages, and these.
fn buffer_config(guest: &mut Guest) -> (SubmissionEntry, (u64, u64)) {
    let (prp1, prp2) = (guest.pages(1), guest.pages(1));
    guest.clear(prp1, 8192);
    let opcode = admin::DOORBELL_BUFFER_CONFIG;
    (SubmissionEntry { opcode, prp1, prp2, ..SubmissionEntry::default() }, (prp1, prp2))
}

#[test]
fn moving_the_shadow_doorbells_runs_no_command_twice() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(32768), control.clone()));
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    guest.use_shadow_doorbells();
    guest.create_pair(1, 8);
    guest.create_pair(2, 8);
    let page = guest.pages(1);
    // More than a lap, so that every entry of the rings holds a command of earlier.
    for round in 0..13 {
        guest.io(1, transfer(nvm::WRITE, 1, round, 1, page)).unwrap();
        guest.io(2, transfer(nvm::WRITE, 1, round, 1, page)).unwrap();
    }
    let (entry, buffers) = buffer_config(&mut guest);
    guest.admin(entry).unwrap();
    guest.shadow = Some(buffers);
    guest.run();
    assert_eq!(control.seen(), 26, "old entries were executed again");
    for round in 0..13 {
        guest.io(1, transfer(nvm::WRITE, 1, round, 1, page)).unwrap();
        guest.io(2, transfer(nvm::WRITE, 1, round, 1, page)).unwrap();
    }
    assert_eq!(control.seen(), 52);
}

#[test]
fn a_worker_that_runs_while_shadow_doorbells_begin_sees_no_page_before_its_doorbells_are_in_it() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(32768), control.clone()));
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    // Queue 1 is worker 1's, and worker 0 is told of its own queues first.
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    for round in 0..13 {
        guest.io(1, transfer(nvm::WRITE, 1, round, 1, page)).unwrap();
    }
    let (entry, buffers) = buffer_config(&mut guest);
    guest.push(0, entry);
    guest.ring(0);
    let controller = Arc::clone(&guest.controller);
    let interlude = Box::new(move || {
        controller.process(1);
    });
    *guest.process.at_wake.lock().unwrap() = Some((0, interlude));
    guest.run();
    assert!(guest.process.at_wake.lock().unwrap().is_none(), "it happened");
    assert_eq!(guest.reap(0).len(), 1);
    assert_eq!(control.seen(), 13, "old entries were executed again");
    guest.shadow = Some(buffers);
    guest.io(1, transfer(nvm::WRITE, 1, 0, 1, page)).unwrap();
}

#[test]
fn doorbell_buffers_must_be_pages_of_memory() {
    let mut guest = Guest::ready(config(), vec![]);
    let page = guest.pages(1);
    let end = MEMORY_BYTES as u64;
    for (prp1, prp2) in [(page + 4, page), (page, page + 8), (end, page), (page, end), (!0xfff, page)] {
        let entry = SubmissionEntry {
            opcode: admin::DOORBELL_BUFFER_CONFIG,
            prp1,
            prp2,
            ..SubmissionEntry::default()
        };
        assert_eq!(guest.admin(entry), Err(Status::INVALID_FIELD), "{prp1:#x} {prp2:#x}");
    }
}

#[test]
fn queues_beyond_the_shadow_page_use_mmio() {
    let config = ControllerConfig { queue_pairs: 600, vectors: 601, ..config() };
    let mut guest = Guest::ready(config, vec![namespace(1, 64)]);
    guest.use_shadow_doorbells();
    let page = guest.pages(1);
    for queue in [511, 512, 600] {
        guest.create_pair(queue, 8);
        for round in 0..10 {
            guest.io(queue, transfer(nvm::READ, 1, round, 1, page)).unwrap();
        }
    }
    assert_eq!(guest.doorbell_events().into_iter().collect::<Vec<_>>(), [regs::sq_tail_doorbell(511)]);
}

#[test]
fn masked_vectors_keep_their_interrupt_until_unmasked() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    // Without interrupts for the queue there are none.
    let cq = guest.pages(1);
    guest.clear(cq, 4096);
    guest.admin(create(admin::CREATE_CQ, 2, 8, cq, 2 << 16 | 1)).unwrap();
    let sq = guest.pages(1);
    guest.create_sq(2, 8, sq, 2).unwrap();
    guest.queues.insert(
        2,
        Pair { cq_id: 2, sq_base: sq, cq_base: cq, entries: 8, tail: 0, head: 0, phase: true, next_cid: 0 },
    );
    guest.io(2, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    assert_eq!(guest.interrupts.take(2), 0);
    // A batch of completions is one interrupt.
    for lba in 0..5 {
        guest.push(1, transfer(nvm::READ, 1, lba, 1, page));
    }
    guest.ring(1);
    guest.run();
    assert_eq!(guest.reap(1).len(), 5);
    assert_eq!(guest.interrupts.take(1), 1);
}
