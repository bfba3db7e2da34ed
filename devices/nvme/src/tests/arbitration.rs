//! Round robin and weighted round robin: the order in which commands are fetched, seen in one completion queue.

use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{SubmissionEntry, feature, regs};

use super::driver::{Guest, Pair, namespace, transfer};
use crate::ControllerConfig;

const CQ_ENTRIES: u32 = 256;
/// QPRIO of urgent, high, medium and low.
const PRIORITIES: [u32; 4] = [0, 1, 2, 3];

/// A controller enabled with CC.AMS `ams`, and submission queues 1 to 4, one of each priority, that complete to queue 1.
fn guest(ams: u32) -> Guest {
    let mut guest = Guest::power_on(ControllerConfig::new("ARBITRATION"), vec![namespace(1, 64)]);
    guest.start_enable();
    guest.write32(regs::CC, 0);
    guest.run();
    guest.write32(regs::CC, 0x0046_0001 | ams << 11);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 1);
    let cq_base = guest.pages(1);
    guest.create_cq(1, CQ_ENTRIES, cq_base, 1).unwrap();
    for (id, priority) in (1..).zip(PRIORITIES) {
        let sq_base = guest.pages(1);
        guest
            .admin(SubmissionEntry {
                opcode: admin::CREATE_SQ,
                prp1: sq_base,
                cdw10: u32::from(id) | 63 << 16,
                cdw11: 1 << 16 | priority << 1 | 1,
                ..SubmissionEntry::default()
            })
            .unwrap();
        let entries = if id == 1 { CQ_ENTRIES } else { 64 };
        let pair = Pair { cq_id: 1, sq_base, cq_base, entries, tail: 0, head: 0, phase: true, next_cid: 0 };
        guest.queues.insert(id, pair);
    }
    guest
}

fn set_arbitration(guest: &mut Guest, value: u32) {
    guest
        .admin(SubmissionEntry {
            opcode: admin::SET_FEATURES,
            cdw10: u32::from(feature::ARBITRATION),
            cdw11: value,
            ..SubmissionEntry::default()
        })
        .unwrap();
}

/// Submits that many commands to queues 1 to 4 and returns which queue's command ended when.
fn order(guest: &mut Guest, counts: [usize; 4]) -> Vec<u16> {
    let page = guest.pages(1);
    for (queue, count) in (1..).zip(counts) {
        for lba in 0..count as u64 {
            guest.push(queue, transfer(nvm::READ, 1, lba, 1, page));
        }
        guest.ring(queue);
    }
    guest.run();
    guest.reap(1).iter().map(|entry| entry.sq_id).collect()
}

fn runs(pattern: &[(u16, usize)]) -> Vec<u16> {
    pattern.iter().flat_map(|&(queue, count)| std::iter::repeat_n(queue, count)).collect()
}

#[test]
fn urgent_comes_first_and_the_others_share_by_weight() {
    let mut guest = guest(1);
    // HPW 3, MPW 1, LPW 0: 4, 2 and 1 commands a round; no limit to a burst.
    set_arbitration(&mut guest, 3 << 24 | 1 << 16 | 7);
    let expected = [
        &[(1, 10)][..],
        &[(2, 4), (3, 2), (4, 1), (2, 4), (3, 2), (4, 1), (2, 2), (3, 2), (4, 1)],
        &[(3, 2), (4, 1), (3, 2), (4, 6)],
    ];
    assert_eq!(order(&mut guest, [10; 4]), runs(&expected.concat()));
    // CC.AMS and the feature go with the controller.
    guest.migrate(1);
    assert_eq!(order(&mut guest, [2, 5, 1, 2]), runs(&[(1, 2), (2, 4), (3, 1), (4, 1), (2, 1), (4, 1)]));
}

#[test]
fn a_weight_bounds_a_class_and_a_burst_each_of_its_queues() {
    let mut guest = guest(1);
    // A fifth queue, of high priority as queue 2.
    let sq_base = guest.pages(1);
    guest
        .admin(SubmissionEntry {
            opcode: admin::CREATE_SQ,
            prp1: sq_base,
            cdw10: 5 | 63 << 16,
            cdw11: 1 << 16 | 1 << 1 | 1,
            ..SubmissionEntry::default()
        })
        .unwrap();
    let pair = Pair { sq_base, ..guest.queues[&2].clone() };
    guest.queues.insert(5, pair);
    // HPW 4 with bursts of 2 over two queues: 2, 2 and 1.
    set_arbitration(&mut guest, 4 << 24 | 1);
    let page = guest.pages(1);
    for lba in 0..4 {
        guest.push(5, transfer(nvm::READ, 1, lba, 1, page));
    }
    guest.ring(5);
    let order = order(&mut guest, [0, 4, 0, 2]);
    let first = order[0];
    let second = 7 - first;
    assert!([2, 5].contains(&first));
    assert_eq!(order, runs(&[(first, 2), (second, 2), (first, 1), (4, 1), (second, 2), (first, 1), (4, 1)]));
}

#[test]
fn without_weights_priorities_mean_nothing_and_the_burst_is_the_features() {
    let mut guest = guest(0);
    for (burst, length) in [(0, 1), (1, 2), (7, 6)] {
        set_arbitration(&mut guest, 0xffff_ff00 | burst);
        let order = order(&mut guest, [6; 4]);
        let mut turns: Vec<(u16, usize)> = Vec::new();
        for queue in order {
            match turns.last_mut() {
                Some((last, count)) if *last == queue => *count += 1,
                _ => turns.push((queue, 1)),
            }
        }
        assert!(turns.iter().all(|(_, count)| *count == length), "2^{burst}: {turns:?}");
        assert_eq!(turns.len(), 24 / length);
        let round: Vec<u16> = turns.iter().map(|(queue, _)| *queue).collect();
        assert!(round.chunks(4).all(|chunk| chunk == &round[..4]), "each in turn: {turns:?}");
    }
}

#[test]
fn a_reset_forgets_the_weights() {
    let mut guest = guest(1);
    set_arbitration(&mut guest, 0xffff_ffff);
    let get = SubmissionEntry { opcode: admin::GET_FEATURES, cdw10: 1, ..SubmissionEntry::default() };
    assert_eq!(guest.admin(get), Ok(0xffff_ff07), "reserved bits are not kept");
    guest.write32(regs::CC, 0);
    guest.run();
    guest.enable();
    assert_eq!(guest.admin(get), Ok(7));
}
