//! The interrupt pin and interrupt coalescing.

use std::sync::Arc;
use std::time::Instant;

use block::{Fault, FaultControl, FaultImage, Target};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{SubmissionEntry, feature, regs};
use pci::PciFunction;
use proptest::prelude::*;

use super::driver::{Guest, PATIENCE, memory_image, namespace, transfer};
use crate::{ControllerConfig, NamespaceConfig};

const COMMAND: u16 = 0x04;
const MEMORY_AND_MASTER: u16 = 0b110;
const INTERRUPT_DISABLE: u16 = 1 << 10;

/// A guest that uses the pin, with queue pairs 1 to 3 whose completion queues have vector 0.
fn guest_with_pin(shadow: bool) -> Guest {
    let config = ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new("PIN") };
    let mut guest = Guest::ready(config, vec![namespace(1, 64)]);
    guest.set_msix(false);
    if shadow {
        guest.use_shadow_doorbells();
    }
    for queue in 1..=3 {
        guest.create_pair(queue, 8);
        let base = guest.queues[&queue].cq_base;
        // Again, with vector 0.
        for opcode in [admin::DELETE_SQ, admin::DELETE_CQ] {
            let delete = SubmissionEntry { opcode, cdw10: queue.into(), ..SubmissionEntry::default() };
            guest.admin(delete).unwrap();
        }
        guest.create_cq(queue, 8, base, 0).unwrap();
        let base = guest.queues[&queue].sq_base;
        guest.create_sq(queue, 8, base, queue).unwrap();
    }
    guest
}

fn interrupt_status(guest: &Guest) -> bool {
    let mut status = [0; 2];
    guest.controller.config_read(0x06, &mut status);
    status[0] & 1 << 3 != 0
}

fn read(guest: &mut Guest, queue: u16, count: u64) {
    let page = 0x8_0000;
    for lba in 0..count {
        guest.push(queue, transfer(nvm::READ, 1, lba, 1, page));
    }
    guest.ring(queue);
    guest.run();
}

#[test]
fn the_pin_is_high_while_there_are_entries_that_the_guest_has_not_taken() {
    for shadow in [false, true] {
        let mut guest = guest_with_pin(shadow);
        assert!(!guest.line.is_high());
        read(&mut guest, 1, 3);
        read(&mut guest, 2, 1);
        assert!(guest.line.is_high() && interrupt_status(&guest));
        // Its mask, and Interrupt Disable.
        guest.write32(regs::INTMS, 1);
        assert!(!guest.line.is_high(), "masked when the write returns");
        guest.write32(regs::INTMS, 0);
        guest.write32(regs::INTMC, 2);
        assert!(!guest.line.is_high(), "of other bits nothing happens");
        guest.write32(regs::INTMC, 1);
        assert!(guest.line.is_high());
        guest.controller.config_write(COMMAND, &(MEMORY_AND_MASTER | INTERRUPT_DISABLE).to_le_bytes());
        assert!(!guest.line.is_high() && interrupt_status(&guest));
        guest.controller.config_write(COMMAND, &MEMORY_AND_MASTER.to_le_bytes());
        assert!(guest.line.is_high());
        // Taken one by one; the level falls with the last, before any worker runs.
        let doorbell = regs::cq_head_doorbell(1);
        for head in 1..=2 {
            guest.set_doorbell(doorbell, head);
            guest.run();
            assert!(guest.line.is_high());
        }
        guest.set_doorbell(doorbell, 3);
        guest.run();
        assert!(guest.line.is_high(), "queue 2 has one");
        guest.set_doorbell(regs::cq_head_doorbell(2), 1);
        assert!(!guest.line.is_high(), "shadow {shadow}");
        assert!(!interrupt_status(&guest));
        // No message was sent.
        assert!(guest.interrupts.signals.lock().unwrap().is_empty());
    }
}

#[test]
fn msi_x_and_the_pin_take_turns() {
    for shadow in [false, true] {
        let mut guest = guest_with_pin(shadow);
        guest.interrupts.take(0);
        read(&mut guest, 1, 1);
        assert!(guest.line.is_high());
        guest.set_msix(true);
        assert!(!guest.line.is_high() && !interrupt_status(&guest));
        read(&mut guest, 1, 1);
        assert_eq!(guest.interrupts.take(0), 1);
        guest.set_msix(false);
        assert!(guest.line.is_high(), "two wait");
        // The guest had not been asked for this head while messages were sent.
        guest.run();
        guest.set_doorbell(regs::cq_head_doorbell(1), 2);
        assert!(!guest.line.is_high(), "shadow {shadow}");
    }
}

#[test]
fn a_reset_and_the_deletion_of_a_queue_release_the_pin() {
    let mut guest = guest_with_pin(false);
    read(&mut guest, 1, 1);
    let delete = |opcode| SubmissionEntry { opcode, cdw10: 1, ..SubmissionEntry::default() };
    guest.admin(delete(admin::DELETE_SQ)).unwrap();
    assert!(guest.line.is_high());
    guest.admin(delete(admin::DELETE_CQ)).unwrap();
    assert!(!guest.line.is_high());
    read(&mut guest, 2, 1);
    assert!(guest.line.is_high());
    guest.write32(regs::CC, 0x0046_0000);
    guest.run();
    assert!(!guest.line.is_high());
}

/// What a guest with a pin does next.
#[derive(Clone, Debug)]
enum Step {
    Submit {
        queue: u16,
        count: u64,
    },
    /// Takes up to so many entries of a queue.
    Take {
        queue: u16,
        count: u32,
    },
    Mask(bool),
    Disable(bool),
    Migrate {
        workers: usize,
    },
    /// Pauses and goes on.
    Pause,
}

fn step() -> impl Strategy<Value = Step> {
    let queue = 1..=3u16;
    prop_oneof![
        4 => (queue.clone(), 1..4u64).prop_map(|(queue, count)| Step::Submit { queue, count }),
        6 => (queue, 1..4u32).prop_map(|(queue, count)| Step::Take { queue, count }),
        1 => any::<bool>().prop_map(Step::Mask),
        1 => any::<bool>().prop_map(Step::Disable),
        1 => (1..4usize).prop_map(|workers| Step::Migrate { workers }),
        1 => Just(Step::Pause),
    ]
}

fn play(steps: &[Step], shadow: bool) {
    let mut guest = guest_with_pin(shadow);
    // Commands and completions of each queue that the guest knows of: [submitted, taken].
    let mut counts = [[0u64; 2]; 4];
    let (mut masked, mut disabled) = (false, false);
    for step in steps {
        match *step {
            Step::Submit { queue, count } => {
                let [submitted, taken] = counts[usize::from(queue)];
                // No more than the completion queue holds.
                let count = count.min(7 - (submitted - taken));
                read(&mut guest, queue, count);
                counts[usize::from(queue)][0] += count;
            }
            Step::Take { queue, count } => {
                let [submitted, taken] = &mut counts[usize::from(queue)];
                let count = u64::from(count).min(*submitted - *taken);
                *taken += count;
                if count > 0 {
                    let head = (*taken % 8) as u32;
                    guest.set_doorbell(regs::cq_head_doorbell(queue), head);
                }
            }
            Step::Mask(mask) => {
                masked = mask;
                guest.write32(if mask { regs::INTMS } else { regs::INTMC }, 1);
            }
            Step::Disable(disable) => {
                disabled = disable;
                let command = MEMORY_AND_MASTER | if disable { INTERRUPT_DISABLE } else { 0 };
                guest.controller.config_write(COMMAND, &command.to_le_bytes());
            }
            Step::Migrate { workers } => {
                guest.migrate(workers);
                assert!(guest.line.driven.load(std::sync::atomic::Ordering::SeqCst) > 0);
            }
            Step::Pause => {
                guest.controller.pause(Instant::now() + PATIENCE).unwrap();
                guest.controller.resume();
            }
        }
        let unseen = counts.iter().any(|[submitted, taken]| submitted > taken);
        // Before a worker runs: a guest that has taken everything is not interrupted again.
        assert_eq!(guest.line.is_high(), unseen && !masked && !disabled, "{step:?}");
        guest.run();
        assert_eq!(guest.line.is_high(), unseen && !masked && !disabled, "{step:?}, later");
        assert_eq!(interrupt_status(&guest), unseen && !masked);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_pin_follows_the_queues_through_pauses_and_migrations(
        steps in prop::collection::vec(step(), 1..40),
        shadow: bool,
    ) {
        play(&steps, shadow);
    }
}

fn set_feature(guest: &mut Guest, id: u8, cdw11: u32) {
    let entry = SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: id.into(),
        cdw11,
        ..SubmissionEntry::default()
    };
    guest.admin(entry).unwrap();
}

/// A guest whose interrupts are coalesced: of 4 entries, or after 25.5 ms.
fn coalescing() -> Guest {
    let config = ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new("COALESCE") };
    let mut guest = Guest::ready(config, vec![namespace(1, 64)]);
    set_feature(&mut guest, feature::INTERRUPT_COALESCING, 0xff03);
    for queue in 1..=2 {
        guest.create_pair(queue, 16);
    }
    assert!(guest.interrupts.take(0) > 0, "the admin queue's are not coalesced");
    guest
}

fn deadlines(guest: &Guest) -> Vec<Instant> {
    (0..guest.controller.workers()).filter_map(|worker| guest.controller.interrupt_deadline(worker)).collect()
}

/// Lets the time of every delayed interrupt come, as a worker's thread does by its timer.
fn wait_for_deadlines(guest: &Guest) {
    for worker in 0..guest.controller.workers() {
        while let Some(deadline) = guest.controller.interrupt_deadline(worker) {
            while Instant::now() < deadline {
                std::thread::yield_now();
            }
            guest.controller.process(worker);
        }
    }
}

#[test]
fn an_interrupt_waits_for_the_threshold() {
    let mut guest = coalescing();
    for _ in 0..3 {
        read(&mut guest, 1, 3);
        // The time may have run out on a slow machine; then the three are not a part of the next four.
        assert!(guest.interrupts.take(1) <= 1);
        read(&mut guest, 1, 1);
        read(&mut guest, 1, 3);
        wait_for_deadlines(&guest);
        assert!(guest.interrupts.take(1) >= 1);
        assert_eq!(guest.reap(1).len(), 7);
    }
    // At once, all that is needed: one message.
    read(&mut guest, 1, 4);
    assert_eq!(guest.interrupts.take(1), 1);
    assert!(deadlines(&guest).is_empty());
    assert_eq!(guest.reap(1).len(), 4);
}

#[test]
fn an_interrupt_waits_for_its_time_at_most() {
    let mut guest = coalescing();
    let start = Instant::now();
    read(&mut guest, 1, 1);
    if let [deadline] = deadlines(&guest)[..] {
        assert!(deadline >= start + std::time::Duration::from_micros(25_500));
    }
    wait_for_deadlines(&guest);
    assert_eq!(guest.interrupts.take(1), 1);
    assert!(start.elapsed() >= std::time::Duration::from_micros(25_500));
}

#[test]
fn a_vector_can_be_left_out_and_zero_means_at_once() {
    let mut guest = coalescing();
    set_feature(&mut guest, feature::INTERRUPT_VECTOR_CONFIGURATION, 1 << 16 | 2);
    read(&mut guest, 2, 1);
    assert_eq!(guest.interrupts.take(2), 1);
    guest.migrate(1);
    guest.interrupts.take(2);
    read(&mut guest, 2, 1);
    assert_eq!(guest.interrupts.take(2), 1, "the configuration has moved");
    for value in [0xff00, 0x0003, 0] {
        set_feature(&mut guest, feature::INTERRUPT_COALESCING, value);
        read(&mut guest, 1, 1);
        assert_eq!(guest.interrupts.take(1), 1, "{value:#x}");
    }
}

#[test]
fn a_pause_sends_what_is_delayed() {
    let mut guest = coalescing();
    read(&mut guest, 1, 1);
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    assert_eq!(guest.interrupts.take(1), 1);
    assert!(deadlines(&guest).is_empty());
    guest.controller.resume();
    guest.interrupts.take(1);
    read(&mut guest, 1, 1);
    guest.migrate(3);
    assert_eq!(guest.interrupts.take(1), 1, "what was not taken is signalled again");
    read(&mut guest, 1, 2);
    wait_for_deadlines(&guest);
    assert_eq!(guest.interrupts.take(1), 1, "coalescing goes on");
    assert_eq!(guest.reap(1).len(), 4);
}

#[test]
fn a_deleted_queue_and_a_reset_delay_nothing() {
    let mut guest = coalescing();
    read(&mut guest, 1, 1);
    for opcode in [admin::DELETE_SQ, admin::DELETE_CQ] {
        guest.admin(SubmissionEntry { opcode, cdw10: 1, ..SubmissionEntry::default() }).unwrap();
    }
    assert!(deadlines(&guest).is_empty());
    read(&mut guest, 2, 1);
    guest.write32(regs::CC, 0x0046_0000);
    guest.run();
    assert!(deadlines(&guest).is_empty());
}

/// What a guest whose interrupts are coalesced does next. It takes entries only when it was interrupted.
#[derive(Clone, Debug)]
enum Move {
    Submit { queue: u16, count: u64 },
    Handle,
    Configure { threshold: u32, time: u32 },
    LeaveOut { queue: u16, out: bool },
    Migrate { workers: usize },
    Pause,
}

fn action() -> impl Strategy<Value = Move> {
    let queue = 1..=2u16;
    prop_oneof![
        6 => (queue.clone(), 1..6u64).prop_map(|(queue, count)| Move::Submit { queue, count }),
        3 => Just(Move::Handle),
        1 => (0..6u32, 0..3u32).prop_map(|(threshold, time)| Move::Configure { threshold, time }),
        1 => (queue, any::<bool>()).prop_map(|(queue, out)| Move::LeaveOut { queue, out }),
        1 => (1..4usize).prop_map(|workers| Move::Migrate { workers }),
        1 => Just(Move::Pause),
    ]
}

fn play_coalesced(moves: &[Move]) {
    let mut guest = coalescing();
    // By queue: commands that were not taken, and whether the guest has been interrupted since it took all.
    let (mut waiting, mut called) = ([0u64; 3], [false; 3]);
    for action in moves {
        match *action {
            Move::Submit { queue, count } => {
                let count = count.min(15 - waiting[usize::from(queue)]);
                read(&mut guest, queue, count);
                waiting[usize::from(queue)] += count;
            }
            Move::Handle => {
                for queue in (1..=2u16).filter(|&queue| std::mem::take(&mut called[usize::from(queue)])) {
                    waiting[usize::from(queue)] -= guest.reap(queue).len() as u64;
                }
            }
            Move::Configure { threshold, time } => {
                set_feature(&mut guest, feature::INTERRUPT_COALESCING, time << 8 | threshold);
            }
            Move::LeaveOut { queue, out } => {
                let value = u32::from(out) << 16 | u32::from(queue);
                set_feature(&mut guest, feature::INTERRUPT_VECTOR_CONFIGURATION, value);
            }
            Move::Migrate { workers } => {
                for queue in 1..=2 {
                    called[usize::from(queue)] |= guest.interrupts.take(queue) > 0;
                }
                drop(guest.migrate(workers));
            }
            Move::Pause => {
                guest.controller.pause(Instant::now() + PATIENCE).unwrap();
                assert!(deadlines(&guest).is_empty(), "nothing is delayed over a pause");
                guest.controller.resume();
            }
        }
        guest.run();
        for queue in 1..=2u16 {
            called[usize::from(queue)] |= guest.interrupts.take(queue) > 0;
            let worker = usize::from(queue) % guest.controller.workers();
            let is_due = guest.controller.interrupt_deadline(worker).is_some();
            assert!(
                waiting[usize::from(queue)] == 0 || called[usize::from(queue)] || is_due,
                "nobody tells the guest of queue {queue} after {action:?}"
            );
        }
    }
    wait_for_deadlines(&guest);
    for queue in 1..=2u16 {
        called[usize::from(queue)] |= guest.interrupts.take(queue) > 0;
        assert!(waiting[usize::from(queue)] == 0 || called[usize::from(queue)], "queue {queue} at the end");
        assert_eq!(guest.reap(queue).len() as u64, waiting[usize::from(queue)]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn no_interrupt_is_forgotten_through_pauses_and_migrations(moves in prop::collection::vec(action(), 1..30)) {
        play_coalesced(&moves);
    }
}

#[test]
fn a_queue_is_listed_once_however_often_its_interrupts_are_delayed() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(64 * 512), control.clone()));
    let config = ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new("COALESCED") };
    let mut guest =
        Guest::ready(config, vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    guest.create_pair(1, 16);
    // Two entries, or the longest time there is.
    set_feature(&mut guest, feature::INTERRUPT_COALESCING, 0xff << 8 | 1);
    read(&mut guest, 1, 1);
    for _ in 0..100 {
        control.inject(Target::Read, 0, 1, Fault::Hold);
        read(&mut guest, 1, 1);
        // One that ends at the begin of a pass makes two, and one that ends later in it is delayed again.
        control.release_held();
        read(&mut guest, 1, 1);
        guest.reap(1);
    }
    let worker = guest.controller.pool.worker(1 % guest.controller.workers());
    assert!(worker.delayed.len() <= 1, "{:?}", worker.delayed);
}
