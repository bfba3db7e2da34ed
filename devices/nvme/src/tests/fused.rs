//! Fused Compare and Write.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Backend, Failure, Fault, FaultControl, FaultImage, Operation, Target};
use nvme_spec::identify::IdentifyController;
use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::{Status, SubmissionEntry, regs};

use super::driver::{
    Guest, Interrupts, PATIENCE, Process, contexts, guest_memory, memory_image, namespace, transfer,
};
use super::io::Witness;
use crate::{Controller, ControllerConfig, NamespaceConfig, Subsystem};

const FIRST: u8 = 1;
const SECOND: u8 = 2;
const OK: Status = Status::SUCCESS;
const MISSING: Status = Status::ABORTED_MISSING_FUSED;
const FAILED: Status = Status::ABORTED_FAILED_FUSED;

fn ready(backend: Arc<dyn Backend>) -> Guest {
    let config = ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new("FUSED") };
    let namespaces =
        vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }, namespace(2, 64)];
    let mut guest = Guest::ready(config, namespaces);
    // Of different workers.
    guest.create_pair(1, 8);
    guest.create_pair(2, 8);
    guest
}

fn fused(fuse: u8, entry: SubmissionEntry) -> SubmissionEntry {
    SubmissionEntry { flags: entry.flags | fuse, ..entry }
}

/// The two halves of a pair on one block.
fn pair(lba: u64, expected: u64, new: u64) -> [SubmissionEntry; 2] {
    [
        fused(FIRST, transfer(nvm::COMPARE, 1, lba, 1, expected)),
        fused(SECOND, transfer(nvm::WRITE, 1, lba, 1, new)),
    ]
}

/// Submits `entries` at once; how each ended, in the order of submission.
fn submit(guest: &mut Guest, queue: u16, entries: &[SubmissionEntry]) -> Vec<Status> {
    let cids: Vec<u16> = entries.iter().map(|entry| guest.push(queue, *entry)).collect();
    guest.ring(queue);
    ends(guest, queue, &cids)
}

fn ends(guest: &mut Guest, queue: u16, cids: &[u16]) -> Vec<Status> {
    let mut ended = Vec::new();
    guest.run_until("the ends of all commands", |guest| {
        ended.extend(guest.reap(queue));
        ended.len() >= cids.len()
    });
    assert_eq!(ended.len(), cids.len(), "{ended:?}");
    let status = |cid: &u16| ended.iter().find(|entry| entry.cid == *cid).unwrap().status().code();
    cids.iter().map(status).collect()
}

fn block(guest: &mut Guest, lba: u64) -> u8 {
    let page = guest.pages(1);
    guest.io(1, transfer(nvm::READ, 1, lba, 1, page)).unwrap();
    let bytes = guest.read_bytes(page, 512);
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

/// A page of zeroes and a page of ones.
fn pages(guest: &mut Guest) -> (u64, u64) {
    let (zeroes, ones) = (guest.pages(1), guest.pages(1));
    guest.write_bytes(ones, &[1; 4096]);
    (zeroes, ones)
}

#[test]
fn the_write_happens_only_if_the_comparison_succeeds() {
    let witness = Witness::new(64 * 512);
    let mut guest = ready(witness.clone());
    let (zeroes, ones) = pages(&mut guest);
    assert_eq!(submit(&mut guest, 1, &pair(5, zeroes, ones)), [OK, OK]);
    assert_eq!(
        witness.take(),
        [(Operation::Compare, 5 * 512, 512), (Operation::Write { fua: false }, 5 * 512, 512)]
    );
    assert_eq!(block(&mut guest, 5), 1);
    witness.take();
    assert_eq!(submit(&mut guest, 1, &pair(5, zeroes, zeroes)), [Status::COMPARE_FAILURE, FAILED]);
    assert_eq!(witness.take(), [(Operation::Compare, 5 * 512, 512)]);
    assert_eq!(block(&mut guest, 5), 1);
    witness.take();
    let [compare, write] = pair(5, ones, zeroes);
    let write = SubmissionEntry { cdw12: write.cdw12 | opcode::CDW12_FUA, ..write };
    assert_eq!(submit(&mut guest, 2, &[compare, write]), [OK, OK]);
    assert_eq!(witness.take()[1].0, Operation::Write { fua: true });
    let page = IdentifyController::from_bytes(&guest.identify(1, 0).unwrap());
    assert_eq!((page.fuses, page.acwu), (1, 127));
}

#[test]
fn a_first_half_waits_at_the_tail_and_goes_along() {
    let mut guest = ready(memory_image(64 * 512));
    let (zeroes, ones) = pages(&mut guest);
    for shadow in [false, true] {
        if shadow {
            guest.use_shadow_doorbells();
        }
        let (expected, new) = if shadow { (ones, zeroes) } else { (zeroes, ones) };
        let [compare, write] = pair(7, expected, new);
        let before = guest.push(1, transfer(nvm::FLUSH, 1, 0, 1, 0));
        let first = guest.push(1, compare);
        guest.ring(1);
        guest.run();
        let entries = guest.reap(1);
        assert_eq!(entries.len(), 1, "only the command before it");
        assert_eq!(entries[0].cid, before);
        assert_eq!(u32::from(entries[0].sq_head) + 1, guest.queues[&1].tail, "the half was not taken");
        guest.migrate(2);
        guest.run();
        assert!(guest.reap(1).is_empty());
        let second = guest.push(1, write);
        guest.ring(1);
        assert_eq!(ends(&mut guest, 1, &[first, second]), [OK, OK], "shadow {shadow}");
    }
    assert_eq!(block(&mut guest, 7), 0);
}

#[test]
fn a_half_that_has_waited_holds_nothing_up_a_lap_later() {
    let mut guest = ready(memory_image(64 * 512));
    let (zeroes, ones) = pages(&mut guest);
    let [compare, write] = pair(7, zeroes, ones);
    let first = guest.push(1, compare);
    guest.ring(1);
    guest.run();
    let tail = guest.queues[&1].tail;
    let second = guest.push(1, write);
    guest.ring(1);
    assert_eq!(ends(&mut guest, 1, &[first, second]), [OK, OK]);
    for _ in 0..20 {
        assert_eq!(submit(&mut guest, 1, &[transfer(nvm::READ, 1, 0, 1, zeroes)]), [OK]);
    }
    assert_eq!((tail, guest.queues[&1].entries), (1, 8), "the tail came by there");
}

#[test]
fn a_half_without_the_other_is_aborted() {
    let mut guest = ready(memory_image(64 * 512));
    let (zeroes, ones) = pages(&mut guest);
    let [compare, write] = pair(3, zeroes, ones);
    let read = transfer(nvm::READ, 1, 0, 1, guest.pages(1));
    assert_eq!(submit(&mut guest, 1, &[write]), [MISSING]);
    assert_eq!(submit(&mut guest, 1, &[compare, read]), [MISSING, OK]);
    assert_eq!(submit(&mut guest, 1, &[compare, compare, write]), [MISSING, OK, OK]);
    assert_eq!(block(&mut guest, 3), 1);
    // A half in another queue is no other half.
    let lonely = guest.push(1, compare);
    guest.ring(1);
    guest.run();
    assert_eq!(submit(&mut guest, 2, &[write]), [MISSING]);
    let read = guest.push(1, read);
    guest.ring(1);
    assert_eq!(ends(&mut guest, 1, &[lonely, read]), [MISSING, OK]);
}

#[test]
fn wrong_pairs_change_nothing() {
    let witness = Witness::new(64 * 512);
    let mut guest = ready(witness.clone());
    let (zeroes, ones) = pages(&mut guest);
    let [compare, write] = pair(3, zeroes, ones);
    let at = |entry: SubmissionEntry, lba: u64, blocks: u32| {
        let mut entry = SubmissionEntry { cdw12: blocks - 1, ..entry };
        entry.set_cdw10_64(lba);
        entry
    };
    let invalid = Status::INVALID_FIELD;
    let cases = [
        ([fused(FIRST, transfer(nvm::READ, 1, 3, 1, ones)), write], [invalid, invalid]),
        ([compare, SubmissionEntry { opcode: nvm::WRITE_ZEROES, ..write }], [invalid, invalid]),
        ([SubmissionEntry { opcode: nvm::WRITE, ..compare }, write], [invalid, invalid]),
        ([compare, at(write, 4, 1)], [invalid, invalid]),
        ([compare, at(write, 3, 2)], [invalid, invalid]),
        ([compare, SubmissionEntry { nsid: 2, ..write }], [invalid, invalid]),
        ([at(compare, 64, 1), at(write, 64, 1)], [Status::LBA_OUT_OF_RANGE, FAILED]),
        ([at(compare, 0, 129), at(write, 0, 129)], [Status::ATOMIC_WRITE_UNIT_EXCEEDED, FAILED]),
        ([at(compare, 0, 2000), at(write, 0, 2000)], [invalid, FAILED]),
        ([compare, write].map(|entry| SubmissionEntry { nsid: 9, ..entry }), [invalid, FAILED]),
        ([SubmissionEntry { prp1: 2, ..compare }, write], [Status::PRP_OFFSET_INVALID, FAILED]),
        ([compare, SubmissionEntry { prp1: 2, ..write }], [FAILED, Status::PRP_OFFSET_INVALID]),
        ([compare, SubmissionEntry { flags: SECOND | 0xc0, ..write }], [FAILED, invalid]),
    ];
    for (entries, expected) in cases {
        assert_eq!(submit(&mut guest, 1, &entries), expected, "{entries:?}");
    }
    assert_eq!(witness.take(), []);
    // Memory that is none is found out by the image; the write is not begun then.
    let outside = SubmissionEntry { prp1: !0xfff, ..compare };
    assert_eq!(submit(&mut guest, 1, &[outside, write]), [Status::DATA_TRANSFER_ERROR, FAILED]);
    assert_eq!(block(&mut guest, 3), 0);
    // What is marked cannot be compared with; and afterwards the queue is as it was.
    guest.io(1, transfer(nvm::WRITE_UNCORRECTABLE, 1, 3, 1, 0)).unwrap();
    assert_eq!(submit(&mut guest, 1, &[compare, write]), [Status::UNRECOVERED_READ_ERROR, FAILED]);
    guest.io(1, transfer(nvm::WRITE, 1, 3, 1, zeroes)).unwrap();
    assert_eq!(submit(&mut guest, 1, &[compare, write]), [OK, OK]);
}

#[test]
fn faults_of_the_image_end_both_halves() {
    let control = Arc::new(FaultControl::default());
    let mut guest = ready(Arc::new(FaultImage::new(memory_image(64 * 512), control.clone())));
    let (zeroes, ones) = pages(&mut guest);
    control.inject(Target::Read, 0, 1, Fault::Fail(Failure::Io(5)));
    assert_eq!(submit(&mut guest, 1, &pair(5, zeroes, ones)), [Status::UNRECOVERED_READ_ERROR, FAILED]);
    control.inject(Target::Write, 0, 1, Fault::Fail(Failure::NoSpace));
    assert_eq!(submit(&mut guest, 1, &pair(5, zeroes, ones)), [OK, Status::CAPACITY_EXCEEDED]);
    assert_eq!(submit(&mut guest, 1, &pair(5, zeroes, ones)), [OK, OK]);
}

#[test]
fn either_half_can_be_aborted_while_it_waits() {
    let mut guest = ready(memory_image(64 * 512));
    let (zeroes, ones) = pages(&mut guest);
    let [compare, write] = pair(3, zeroes, ones);
    let abort = |cid: u16| SubmissionEntry {
        opcode: admin::ABORT,
        cdw10: 1 | u32::from(cid) << 16,
        ..SubmissionEntry::default()
    };
    // The first, waiting at the tail.
    let first = guest.push(1, compare);
    guest.ring(1);
    guest.run();
    assert_eq!(guest.admin(abort(first)), Ok(0));
    let second = guest.push(1, write);
    guest.ring(1);
    assert_eq!(ends(&mut guest, 1, &[first, second]), [Status::ABORT_REQUESTED, MISSING]);
    // The second, of a pair that nobody has come to yet.
    guest.set_bus_master(true);
    let first = guest.push(1, compare);
    let second = guest.push(1, write);
    guest.ring(1);
    // The admin command is executed first: worker 1 has not run.
    let cid = guest.push(0, abort(second));
    guest.ring(0);
    while guest.controller.process(0) == crate::Progress::More {}
    let ended = guest.reap(0);
    assert_eq!((ended[0].cid, ended[0].dw0), (cid, 0));
    assert_eq!(ends(&mut guest, 1, &[first, second]), [MISSING, Status::ABORT_REQUESTED]);
    assert_eq!(block(&mut guest, 3), 0);
}

/// Lets go of what is held and lets everything end.
fn finish(guest: &mut Guest, control: &FaultControl) {
    guest.run_until("everything to end", |guest| {
        control.release_held();
        guest.controller.statistics().in_flight == 0
    });
}

#[test]
fn a_pair_waits_for_what_is_in_flight_in_its_range_and_keeps_others_out() {
    let (control, witness) = (Arc::new(FaultControl::default()), Witness::new(64 * 512));
    let mut guest = ready(Arc::new(FaultImage::new(witness.clone(), control.clone())));
    let (zeroes, ones) = pages(&mut guest);
    let page = guest.pages(1);
    control.inject(Target::Write, 0, 1, Fault::Hold);
    // Another worker's write of blocks 4 and 5 is in flight.
    let before = guest.push(2, transfer(nvm::WRITE, 1, 4, 2, zeroes));
    guest.ring(2);
    guest.run();
    assert_eq!(control.held(), 1);
    let halves = pair(5, zeroes, ones).map(|entry| guest.push(1, entry));
    guest.ring(1);
    guest.run();
    assert_eq!(witness.take(), [], "the pair has not begun");
    // What overlaps is not begun, on either worker; what does not is.
    let reads = [1, 2].map(|queue| guest.push(queue, transfer(nvm::READ, 1, 5, 1, page)));
    let elsewhere = guest.push(2, transfer(nvm::READ, 1, 9, 1, page));
    guest.ring(1);
    guest.ring(2);
    guest.run();
    assert_eq!(witness.take(), [], "they wait in the order of their queue");
    control.release_held();
    assert_eq!(ends(&mut guest, 1, &[halves[0], halves[1], reads[0]]), [OK; 3]);
    assert_eq!(ends(&mut guest, 2, &[before, reads[1], elsewhere]), [OK; 3]);
    let order: Vec<_> =
        witness.take().into_iter().map(|(operation, offset, _)| (operation, offset / 512)).collect();
    let write = |lba| (Operation::Write { fua: false }, lba);
    assert_eq!(order[..3], [write(4), (Operation::Compare, 5), write(5)]);
    assert_eq!(order.len(), 6);
    // Other blocks are nobody's.
    control.inject(Target::Read, 0, 1, Fault::Hold);
    let halves = pair(5, ones, zeroes).map(|entry| guest.push(1, entry));
    guest.ring(1);
    guest.run();
    assert_eq!(control.held(), 1, "the comparison is in flight");
    guest.io(2, transfer(nvm::WRITE, 1, 6, 1, ones)).unwrap();
    guest.io(2, transfer(nvm::WRITE, 2, 5, 1, ones)).unwrap();
    guest.io(2, transfer(nvm::FLUSH, 1, 0, 1, 0)).unwrap();
    // A deallocation may be of anything.
    let list = guest.pages(1);
    guest.write_bytes(list, &[&[0; 4][..], &1u32.to_le_bytes(), &50u64.to_le_bytes()].concat());
    let deallocate = SubmissionEntry {
        opcode: nvm::DATASET_MANAGEMENT,
        nsid: 1,
        prp1: list,
        cdw11: opcode::DSM_DEALLOCATE,
        ..SubmissionEntry::default()
    };
    witness.take();
    let deallocate = guest.push(2, deallocate);
    guest.ring(2);
    guest.run();
    assert_eq!(witness.take(), []);
    finish(&mut guest, &control);
    assert_eq!(ends(&mut guest, 1, &halves), [OK, OK]);
    assert_eq!(ends(&mut guest, 2, &[deallocate]), [OK]);
}

/// A guest of controller `id` of a subsystem.
fn member(subsystem: &Arc<Subsystem>, id: u16, namespaces: &[NamespaceConfig]) -> Guest {
    let config = ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new("FUSED") };
    let memory = guest_memory();
    let (contexts, events) = contexts(&memory, 2, 8);
    let (process, interrupts) = (Arc::new(Process::default()), Arc::new(Interrupts::default()));
    let (sink, host) = (interrupts.clone(), process.clone());
    let controller = Controller::join(subsystem, id, config.clone(), memory.clone(), contexts, sink, host);
    let controller = Arc::new(controller.unwrap());
    let mut guest = Guest::around(config, namespaces.to_vec(), memory, controller);
    (guest.process, guest.interrupts, guest.events) = (process, interrupts, events);
    guest.enable();
    guest.create_pair(1, 8);
    guest
}

#[test]
fn a_pair_waits_for_commands_of_another_controller_and_keeps_them_out() {
    let (control, witness) = (Arc::new(FaultControl::default()), Witness::new(64 * 512));
    let backend = Arc::new(FaultImage::new(witness.clone(), control.clone()));
    let namespaces = [NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }];
    let subsystem = Subsystem::new("FUSED", &namespaces, true).unwrap();
    let [mut one, mut other] = [0, 1].map(|id| member(&subsystem, id, &namespaces));
    let (zeroes, ones) = pages(&mut one);
    let page = other.pages(1);
    other.write_bytes(page, &[0; 512]);
    control.inject(Target::Any, 0, 2, Fault::Hold);
    let write = other.push(1, transfer(nvm::WRITE, 1, 5, 1, page));
    other.ring(1);
    other.run();
    let halves = pair(5, zeroes, ones).map(|entry| one.push(1, entry));
    one.ring(1);
    one.run();
    other.run();
    assert_eq!((control.held(), witness.take().len()), (1, 0), "the pair has not begun");
    let read = other.push(1, transfer(nvm::READ, 1, 5, 1, page));
    other.ring(1);
    control.release_held();
    assert_eq!(ends(&mut other, 1, &[write]), [OK], "and the read is not begun");
    one.run_until("the comparison", |_| control.held() == 1);
    other.run();
    assert_eq!(witness.take().len(), 1);
    control.release_held();
    assert_eq!(ends(&mut one, 1, &halves), [OK, OK]);
    assert_eq!(ends(&mut other, 1, &[read]), [OK]);
    assert_eq!(other.read_bytes(page, 512), [1; 512]);
    // A controller that is gone keeps nobody waiting.
    let halves = pair(5, ones, zeroes).map(|entry| one.push(1, entry));
    one.ring(1);
    one.run();
    drop(other);
    assert_eq!(ends(&mut one, 1, &halves), [OK, OK]);
}

#[test]
fn pairs_of_one_worker_come_one_after_the_other() {
    let control = Arc::new(FaultControl::default());
    let mut guest = ready(Arc::new(FaultImage::new(memory_image(64 * 512), control.clone())));
    let (zeroes, ones) = pages(&mut guest);
    control.inject(Target::Read, 0, 1, Fault::Hold);
    let mut cids = Vec::new();
    for lba in [1, 20, 1] {
        let (expected, new) = if cids.len() < 4 { (zeroes, ones) } else { (ones, zeroes) };
        cids.extend(pair(lba, expected, new).map(|entry| guest.push(1, entry)));
    }
    guest.ring(1);
    guest.run();
    assert_eq!((control.seen(), guest.controller.statistics().in_flight), (1, 1));
    control.release_held();
    assert_eq!(ends(&mut guest, 1, &cids), [OK; 6]);
    assert_eq!((block(&mut guest, 1), block(&mut guest, 20)), (0, 1));
}

#[test]
fn pairs_of_two_workers_on_one_block_do_not_meet() {
    let mut guest = ready(memory_image(64 * 512));
    let counters: Vec<u64> = (0..64).map(|_| guest.pages(1)).collect();
    for (value, &page) in counters.iter().enumerate() {
        guest.write_bytes(page, &[value as u8; 512]);
    }
    // Both queues try to raise the same counter; of two with the same expectation one succeeds.
    for value in 0..40 {
        let entries = pair(8, counters[value], counters[value + 1]);
        let cids = [1, 2].map(|queue| entries.map(|entry| guest.push(queue, entry)));
        guest.ring(1);
        guest.ring(2);
        let ended = [ends(&mut guest, 1, &cids[0]), ends(&mut guest, 2, &cids[1])];
        assert_eq!(ended.iter().filter(|ends| ends[..] == [OK, OK]).count(), 1, "{ended:?}");
        assert!(ended.iter().any(|ends| ends[..] == [Status::COMPARE_FAILURE, FAILED]));
    }
    assert_eq!(block(&mut guest, 8), 40);
}

#[test]
fn a_pair_is_whole_before_a_pause_ends_and_gone_after_a_reset() {
    let control = Arc::new(FaultControl::default());
    let mut guest = ready(Arc::new(FaultImage::new(memory_image(64 * 512), control.clone())));
    let (zeroes, ones) = pages(&mut guest);
    control.inject(Target::Any, 0, 2, Fault::Hold);
    // One waits for a write in flight on the other worker, and then for its own comparison.
    let write = guest.push(2, transfer(nvm::WRITE, 1, 5, 1, zeroes));
    guest.ring(2);
    guest.run();
    let halves = pair(5, zeroes, ones).map(|entry| guest.push(1, entry));
    guest.ring(1);
    guest.run();
    assert!(guest.controller.pause(Instant::now()).is_err());
    control.release_held();
    guest.run_until("the comparison", |_| control.held() == 1);
    assert!(guest.controller.pause(Instant::now()).is_err());
    control.release_held();
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    guest.migrate(2);
    assert_eq!(ends(&mut guest, 1, &halves), [OK, OK]);
    assert_eq!(ends(&mut guest, 2, &[write]), [OK]);
    assert_eq!(block(&mut guest, 5), 1);
    // A reset forgets one that has not begun, and waits for one that has.
    for held in [2, 1] {
        control.inject(Target::Any, 0, held, Fault::Hold);
        if held == 2 {
            guest.push(2, transfer(nvm::WRITE, 1, 5, 1, ones));
            guest.ring(2);
            guest.run();
        }
        for entry in pair(5, ones, zeroes) {
            guest.push(1, entry);
        }
        guest.ring(1);
        guest.run();
        guest.write32(regs::CC, 0x0046_0000);
        guest.run();
        assert_eq!(guest.read32(regs::CSTS), 1);
        control.clear();
        finish(&mut guest, &control);
        assert_eq!(guest.read32(regs::CSTS), 0);
        guest.enable();
        guest.create_pair(1, 8);
        guest.create_pair(2, 8);
        assert_eq!(block(&mut guest, 5), 1, "the second half of a pair that the reset met is not written");
        assert_eq!(submit(&mut guest, 2, &pair(5, ones, ones)), [OK, OK], "nothing is claimed any more");
    }
}

#[test]
fn a_pair_that_a_reset_forgets_is_not_waited_for_by_who_removed_its_namespace() {
    let control = Arc::new(FaultControl::default());
    let mut guest = ready(Arc::new(FaultImage::new(memory_image(64 * 512), control.clone())));
    let (zeroes, ones) = pages(&mut guest);
    control.inject(Target::Any, 0, 1, Fault::Hold);
    guest.push(2, transfer(nvm::WRITE, 1, 5, 1, ones));
    guest.ring(2);
    guest.run();
    for entry in pair(5, zeroes, ones) {
        guest.push(1, entry);
    }
    guest.ring(1);
    guest.run();
    let subsystem = Arc::clone(guest.controller.subsystem());
    assert!(!subsystem.remove(1, Duration::ZERO).unwrap(), "both are in flight there");
    guest.run();
    guest.write32(regs::CC, 0x0046_0000);
    guest.run();
    finish(&mut guest, &control);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 0);
    assert!(guest.controller.is_quiet(), "nothing is in flight anywhere");
    assert_eq!(subsystem.images().len(), 1);
}
