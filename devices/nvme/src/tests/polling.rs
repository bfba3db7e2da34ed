//! What the guest is asked to tell: everything to a worker that may sleep, nothing to one that looks itself.

use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{SubmissionEntry, regs};

use super::driver::{Guest, namespace, transfer};
use crate::queue::{Location, QueuePlace, SubmissionQueue};
use crate::{ControllerConfig, NamespaceConfig};

fn config() -> ControllerConfig {
    ControllerConfig { queue_pairs: 4, vectors: 5, ..ControllerConfig::new("POLLING") }
}

/// One worker, so that `poll(0)` serves all queues.
fn ready(namespaces: Vec<NamespaceConfig>) -> Guest {
    let mut guest = Guest::with_workers(config(), namespaces, 1, 64);
    guest.enable();
    guest.use_shadow_doorbells();
    guest
}

/// Whether a guest that moves a doorbell from `old` to `new` rings, as Linux decides it.
fn rings(event: u32, old: u32, new: u32) -> bool {
    let (event, old, new) = (event as u16, old as u16, new as u16);
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[test]
fn a_quiet_event_index_is_never_passed_until_it_moves() {
    let memory = super::driver::guest_memory();
    for entries in [2, 3, 4, 5, 255, 256] {
        let place = QueuePlace { id: 1, entries, location: Location::Contiguous(0), page_shift: 12 };
        let ring = SubmissionQueue::new(&memory, place, 1, 0).unwrap().ring;
        let mut published = None;
        let mut at = 0;
        for step in (1..entries.max(3)).cycle().take(4000) {
            if let Some(index) = ring.quiet_event_index(at, published) {
                published = Some(index);
            }
            let event = published.unwrap();
            assert!(event < entries);
            // As far as a queue of this size lets it be sure of: half way round, and from a fresh index all the way.
            let step = step.min((entries / 2).max(1));
            let next = (at + step) % entries;
            assert!(!rings(event, at, next), "{entries} entries: {at} to {next} with EventIdx {event}");
            at = next;
        }
    }
}

#[test]
fn event_indexes_are_published_twice_a_lap_at_most() {
    let memory = super::driver::guest_memory();
    let place = QueuePlace { id: 1, entries: 256, location: Location::Contiguous(0), page_shift: 12 };
    let ring = SubmissionQueue::new(&memory, place, 1, 0).unwrap().ring;
    let mut published = None;
    let moves = (0..2560).filter(|step| {
        let index = ring.quiet_event_index(step % 256, published);
        published = index.or(published);
        index.is_some()
    });
    assert!((1..=21).contains(&moves.count()), "ten laps");
}

#[test]
fn a_worker_that_was_polled_hears_of_the_next_command_once_it_sleeps() {
    let mut guest = ready(vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    for round in 0..50 {
        guest.push(1, transfer(nvm::READ, 1, round, 1, page));
        guest.ring(1);
        assert!(guest.controller.poll(0), "a command is work");
        assert!(!guest.controller.poll(0), "and nothing is none");
        assert_eq!(guest.reap(1).len(), 1);
        // Rung or not, nobody runs but those who were woken.
        if round % 7 == 3 {
            guest.controller.process(0);
            guest.io(1, transfer(nvm::READ, 1, round, 1, page)).unwrap();
        }
    }
}

#[test]
fn a_full_completion_queue_and_no_other_has_its_doorbell_watched() {
    for end in ["taken", "deleted", "reset"] {
        let mut guest = ready(vec![namespace(1, 64)]);
        guest.create_pair(1, 4);
        let sq_base = guest.pages(1);
        guest.create_sq(2, 64, sq_base, 1).unwrap();
        let pair = super::driver::Pair { sq_base, entries: 64, tail: 0, ..guest.queues[&1].clone() };
        guest.queues.insert(2, pair);
        let page = guest.pages(1);
        let watched = |guest: &Guest| guest.doorbell_events().contains(&regs::cq_head_doorbell(1));
        guest.run();
        assert!(!watched(&guest));
        for lba in 0..10 {
            guest.push(2, transfer(nvm::READ, 1, lba, 1, page));
        }
        guest.ring(2);
        guest.run();
        assert!(watched(&guest), "three completions fit, ten wait");
        match end {
            "taken" => {
                let mut taken = 0;
                while taken < 10 {
                    // Only the event tells the worker of the room.
                    let now = guest.reap(1).len();
                    assert!(now > 0, "lost after {taken}");
                    taken += now;
                    guest.run();
                }
            }
            "deleted" => {
                for (opcode, id) in [(admin::DELETE_SQ, 2), (admin::DELETE_SQ, 1), (admin::DELETE_CQ, 1)] {
                    guest.admin(SubmissionEntry { opcode, cdw10: id, ..SubmissionEntry::default() }).unwrap();
                }
            }
            _ => {
                guest.write32(regs::CC, 0);
                guest.run();
            }
        }
        assert!(!watched(&guest), "{end}");
    }
}
