//! What other controllers got wrong when they moved, were reset, or met a rare command: one test for each, whatever else holds it too.
//!
//! | failure | here | also |
//! | --- | --- | --- |
//! | EventIdx that loses completions | [`shadow_heads_lose_no_completion`] | `wakeup/tests`, every interleaving |
//! | FUA ignored | [`what_was_forced_survives_the_power`] | `durability`, `io` |
//! | the queue counts of source and destination not compared | [`another_number_of_queues_is_named_and_refused`] | `attack` |

use std::sync::Arc;
use std::time::Instant;

use block::{Backend, Fault, FaultControl, FaultImage, Target, VolatileImage};
use bus::GuestMapping;
use nvme_spec::opcode::{CDW12_FUA, admin, nvm};
use nvme_spec::{Status, SubmissionEntry, regs};

use super::driver::{Guest, PATIENCE, memory_image, namespace, transfer};
use crate::{ControllerConfig, Error, NamespaceConfig};

fn config() -> ControllerConfig {
    ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new("KNOWN") }
}

fn ready() -> Guest {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    guest
}

/// A guest whose image holds what a test tells it to.
fn with_faults() -> (Guest, Arc<FaultControl>) {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(64 * 512), control.clone()));
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    guest.create_pair(1, 8);
    (guest, control)
}

#[test]
fn doorbells_are_taken_after_a_restore() {
    let mut guest = ready();
    guest.migrate(2);
    assert_eq!(guest.read32(regs::CSTS), 1, "ready, as before");
    assert_eq!(guest.read32(regs::CC) & 1, 1);
    let page = guest.pages(1);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    guest.identify(1, 0).unwrap();
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    assert_eq!(guest.controller.save().events.error_count, 0, "no doorbell was refused");
}

#[test]
fn completions_name_the_right_head_after_a_restore() {
    let mut guest = ready();
    let page = guest.pages(1);
    for round in 0..13 {
        // Compared with the driver's tail at each command, over the end of the ring.
        guest.io(1, transfer(nvm::READ, 1, round, 1, page)).unwrap();
        if round % 3 == 1 {
            guest.migrate(1 + round as usize % 2);
        }
    }
    // A head that is not the tail: two of three commands are fetched when the controller moves, and the third afterwards.
    let cids: Vec<u16> = (0..3).map(|lba| guest.push(1, transfer(nvm::READ, 1, lba, 1, page))).collect();
    let tail = guest.queues[&1].tail;
    guest.write32(regs::sq_tail_doorbell(1), (tail + 7) % 8);
    guest.run();
    guest.migrate(2);
    guest.ring(1);
    guest.run();
    let heads: Vec<_> = guest.reap(1).iter().map(|entry| (entry.cid, u32::from(entry.sq_head))).collect();
    assert_eq!(heads, [(cids[0], (tail + 7) % 8), (cids[1], (tail + 7) % 8), (cids[2], tail)]);
}

#[test]
fn doorbell_buffers_are_forgotten_by_a_reset() {
    let mut guest = ready();
    guest.use_shadow_doorbells();
    let (shadow, event_index) = guest.shadow.unwrap();
    let page = guest.pages(1);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    guest.write32(regs::CC, 0);
    guest.run();
    assert!(guest.doorbell_events().is_empty(), "writes to doorbells arrive again");
    // The driver that comes next uses the pages for something else.
    guest.write_bytes(shadow, &[0x5a; 4096]);
    guest.write_bytes(event_index, &[0xa5; 4096]);
    guest.shadow = None;
    guest.enable();
    guest.create_pair(1, 8);
    for lba in 0..20 {
        guest.io(1, transfer(nvm::READ, 1, lba, 1, page)).unwrap();
    }
    guest.migrate(2);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    assert_eq!(guest.read_bytes(shadow, 4096), [0x5a; 4096]);
    assert_eq!(guest.read_bytes(event_index, 4096), [0xa5; 4096]);
}

#[test]
fn shadow_heads_lose_no_completion() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.use_shadow_doorbells();
    // Four entries a queue: three commands fill the completion queue, and the driver's head must bring the others.
    guest.create_pair(1, 4);
    let sq_base = guest.pages(1);
    guest.create_sq(2, 16, sq_base, 1).unwrap();
    let pair = super::driver::Pair { sq_base, entries: 16, tail: 0, ..guest.queues[&1].clone() };
    guest.queues.insert(2, pair);
    let page = guest.pages(1);
    for lap in 0..20 {
        let mut left: Vec<u16> =
            (0..11).map(|lba| guest.push(2, transfer(nvm::READ, 1, lba, 1, page))).collect();
        guest.ring(2);
        // Only what woke a worker runs: a wake-up that is lost shows here.
        guest.run_until("all completions", |guest| {
            for entry in guest.reap(1) {
                assert_eq!(entry.cid, left.remove(0));
            }
            left.is_empty()
        });
        if lap % 5 == 4 {
            guest.migrate(1 + lap % 2);
        }
    }
}

#[test]
fn another_number_of_queues_is_named_and_refused() {
    let guest = ready();
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    let other = ControllerConfig { queue_pairs: 3, ..config() };
    let destination = Guest::power_on(other, vec![namespace(1, 64)]);
    let differences = guest.controller.inventory().differences(&destination.controller.inventory());
    assert_eq!(differences, ["NVMe controller \"KNOWN\", queue pairs: 4 here, 3 there"]);
    let error = destination.controller.load(&state).unwrap_err();
    assert!(matches!(&error, Error::State { field, .. } if field == "shape.queue_pairs"), "{error}");
}

#[test]
fn zeroes_are_written_before_write_zeroes_ends() {
    let mut guest = ready();
    let page = guest.pages(1);
    for deallocate in [0, nvme_spec::opcode::CDW12_DEALLOCATE] {
        guest.write_bytes(page, &[7; 2048]);
        guest.io(1, transfer(nvm::WRITE, 1, 8, 4, page)).unwrap();
        let entry = transfer(nvm::WRITE_ZEROES, 1, 9, 2, 0);
        guest.io(1, SubmissionEntry { cdw12: entry.cdw12 | deallocate, ..entry }).unwrap();
        guest.io(1, transfer(nvm::READ, 1, 8, 4, page)).unwrap();
        let expected = [[7; 512], [0; 512], [0; 512], [7; 512]].concat();
        assert_eq!(guest.read_bytes(page, 2048), expected, "deallocate {deallocate:#x}");
    }
}

#[test]
fn what_was_forced_survives_the_power() {
    let image = Arc::new(VolatileImage::new(Arc::new(GuestMapping::new(64 * 512).unwrap())));
    let backend = Arc::clone(&image) as Arc<dyn Backend>;
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    guest.write_bytes(page, &[3; 512]);
    guest.io(1, transfer(nvm::WRITE, 1, 1, 1, page)).unwrap();
    let forced = transfer(nvm::WRITE, 1, 2, 1, page);
    guest.io(1, SubmissionEntry { cdw12: forced.cdw12 | CDW12_FUA, ..forced }).unwrap();
    image.lose_power(|_| false);
    for (lba, byte) in [(1, 0), (2, 3)] {
        guest.io(1, transfer(nvm::READ, 1, lba, 1, page)).unwrap();
        assert_eq!(guest.read_bytes(page, 512), [byte; 512], "block {lba}");
    }
}

#[test]
fn a_shutdown_is_complete_when_the_flush_is() {
    let (guest, control) = with_faults();
    control.inject(Target::Flush, 0, 1, Fault::Hold);
    guest.write32(regs::CC, 0x0046_0001 | regs::SHN_NORMAL << 14);
    guest.run();
    assert_eq!(control.held(), 1, "the flush has begun");
    assert_eq!(guest.read32(regs::CSTS) >> 2 & 3, 1, "and shutdown is in progress");
    control.release_held();
    guest.run();
    assert_eq!(guest.read32(regs::CSTS) >> 2 & 3, 2, "complete");
}

#[test]
fn the_largest_number_of_blocks_is_not_none() {
    const BLOCKS: u32 = 65_536;
    let config = ControllerConfig { mdts: 0, ..config() };
    let mut guest = Guest::ready(config, vec![namespace(1, BLOCKS as usize)]);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    guest.write_bytes(page, &[9; 512]);
    for lba in [0, BLOCKS - 1] {
        guest.io(1, transfer(nvm::WRITE, 1, lba.into(), 1, page)).unwrap();
    }
    // NLB is FFFFh, with nothing to transfer and with 32 MiB.
    guest.io(1, transfer(nvm::VERIFY, 1, 0, BLOCKS, 0)).unwrap();
    guest.io(1, transfer(nvm::WRITE_ZEROES, 1, 0, BLOCKS, 0)).unwrap();
    for lba in [0, BLOCKS - 1] {
        guest.io(1, transfer(nvm::READ, 1, lba.into(), 1, page)).unwrap();
        assert_eq!(guest.read_bytes(page, 512), [0; 512], "block {lba}");
    }
    let entry = transfer(nvm::READ, 1, 1, BLOCKS, page);
    assert_eq!(guest.io(1, entry), Err(Status::LBA_OUT_OF_RANGE), "one too many");
}

#[test]
fn no_alignment_of_a_data_pointer_hurts_the_process() {
    let mut guest = ready();
    let page = guest.pages(4);
    for offset in 0..9 {
        for (prp1, prp2, blocks) in [
            (page + offset, 0, 1),
            (page + 4096 - offset, page, 2),
            (page, page + offset, 16),
            (page, page + 4096 - offset, 32),
            (u64::MAX - offset, u64::MAX - offset, 64),
        ] {
            let entry = SubmissionEntry { prp1, prp2, ..transfer(nvm::READ, 1, 0, blocks, 0) };
            // Whatever it says, it ends.
            let _status = guest.submit(1, entry).status();
        }
    }
    let refused = SubmissionEntry { prp1: page + 1, ..transfer(nvm::READ, 1, 0, 1, 0) };
    assert_eq!(guest.io(1, refused), Err(Status::PRP_OFFSET_INVALID));
    let identify = SubmissionEntry { opcode: admin::IDENTIFY, cdw10: 1, prp1: page + 2, ..refused };
    assert_eq!(guest.admin(identify), Err(Status::PRP_OFFSET_INVALID));
}

#[test]
fn a_deleted_queue_has_nothing_in_flight() {
    let (mut guest, control) = with_faults();
    let page = guest.pages(1);
    control.inject(Target::Read, 0, 1, Fault::Hold);
    let held = guest.push(1, transfer(nvm::READ, 1, 0, 1, page));
    guest.ring(1);
    guest.run();
    let delete = SubmissionEntry { opcode: admin::DELETE_SQ, cdw10: 1, ..SubmissionEntry::default() };
    guest.push(0, delete);
    guest.ring(0);
    guest.run();
    assert!(guest.reap(0).is_empty(), "its command is with the image");
    control.release_held();
    guest.run();
    // The command's end came first.
    assert_eq!(guest.reap(1).iter().map(|entry| entry.cid).collect::<Vec<_>>(), [held]);
    assert_eq!(guest.reap(0).len(), 1);
}

#[test]
fn a_controller_with_parked_requests_is_not_loaded_into() {
    let mut guest = ready();
    for _ in 0..3 {
        guest.push(0, SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() });
    }
    guest.ring(0);
    guest.run();
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    assert_eq!(state.events.parked.len(), 3);
    assert!(matches!(guest.controller.load(&state), Err(Error::NotPristine)));
    // It goes on as if nobody had tried, and a new one takes the requests over once.
    guest.controller.resume();
    guest.migrate(2);
    guest.write32(regs::sq_tail_doorbell(4), 1);
    guest.run();
    assert_eq!(guest.reap(0).len(), 1);
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    assert_eq!(guest.controller.save().events.parked.len(), 2);
}
