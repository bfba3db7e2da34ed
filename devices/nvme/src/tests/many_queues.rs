//! As many queues as there are identifiers.

use nvme_spec::opcode::nvm;

use super::driver::{Guest, Pair, namespace, transfer};
use crate::ControllerConfig;

#[test]
fn all_65535_queue_pairs_work_move_and_go() {
    const PAIRS: u16 = u16::MAX;
    const VECTORS: u16 = 2048;
    let config = ControllerConfig { queue_pairs: PAIRS, vectors: VECTORS, ..ControllerConfig::new("MANY") };
    // Worker 0, which serves the admin queue too, has a share of them only.
    let mut guest = Guest::with_workers(config, vec![namespace(1, 64)], 64, 4);
    guest.enable();
    let (sq_base, cq_base, page) = (guest.pages(4), guest.pages(4), guest.pages(1));
    let used = [1, 2, 4095, PAIRS];
    for id in 1..=PAIRS {
        // Those that are not used share a page.
        let place = used.iter().position(|&used| used == id).unwrap_or(0) as u64;
        let (sq_base, cq_base) = (sq_base + place * 4096, cq_base + place * 4096);
        guest.create_cq(id, 4, cq_base, id % VECTORS).unwrap();
        guest.create_sq(id, 4, sq_base, id).unwrap();
        let pair =
            Pair { cq_id: id, sq_base, cq_base, entries: 4, tail: 0, head: 0, phase: true, next_cid: 0 };
        guest.queues.insert(id, pair);
    }
    for queue in used {
        guest.clear(guest.queues[&queue].cq_base, 4096);
        guest.io(queue, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
        assert_eq!(guest.interrupts.take(queue % VECTORS), 1, "queue {queue}");
    }
    guest.migrate(1);
    for queue in used {
        guest.io(queue, transfer(nvm::READ, 1, 1, 1, page)).unwrap();
    }
    let state = {
        guest.controller.begin_pause();
        guest.controller.save()
    };
    assert_eq!((state.sq.present().count(), state.cq.present().count()), (65_536, 65_536));
}

#[test]
fn queues_of_65536_entries_go_round() {
    const ENTRIES: u32 = 65_536;
    for shadow in [false, true] {
        let mut guest = Guest::ready(ControllerConfig::new("LONG"), vec![namespace(1, 64)]);
        if shadow {
            guest.use_shadow_doorbells();
        }
        guest.create_pair(1, ENTRIES);
        let page = guest.pages(1);
        // One more than a lap, and a move at the last entry.
        let (mut left, mut expected) = (ENTRIES + 100, 0_u32);
        while left > 0 {
            let count = left.min(if expected == 0 { ENTRIES - 1 } else { 50 });
            for _ in 0..count {
                guest.push(1, transfer(nvm::FLUSH, 1, 0, 1, page));
            }
            guest.ring(1);
            let mut ended = 0;
            guest.run_until("the commands", |guest| {
                for entry in guest.reap(1) {
                    assert_eq!(u32::from(entry.cid), expected % 65_536);
                    expected += 1;
                    ended += 1;
                }
                ended == count
            });
            left -= count;
            if left == 101 {
                assert_eq!((guest.queues[&1].tail, guest.queues[&1].phase), (ENTRIES - 1, true));
                guest.migrate(2);
            }
        }
        assert_eq!((guest.queues[&1].tail, guest.queues[&1].head), (100, 100));
        assert!(!guest.queues[&1].phase, "the second lap");
    }
}
