//! Saved states that no controller wrote. Each check of `restore` has a case here that turns red without it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{SubmissionEntry, regs};
use pci::PciFunction;
use vm_memory::{Bytes, GuestAddress};
use vmstate::{Bitmap, VmState};

use super::driver::{
    Guest, Interrupts, MEMORY_BYTES, PATIENCE, Pair, Process, contexts, namespace, transfer,
};
use crate::state::{EndedState, UncorrectableState};
use crate::{Controller, ControllerConfig, Error, NvmeState, Progress};

fn config() -> ControllerConfig {
    ControllerConfig { queue_pairs: 4, vectors: 5, queue_entries: 1024, ..ControllerConfig::new("ATTACK") }
}

/// A paused controller with something of everything: shadow doorbells, a queue by PRP list, a full completion queue with held
/// completions, parked requests, events, errors.
fn rich() -> (Guest, NvmeState) {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64), namespace(7, 64)]);
    guest.use_shadow_doorbells();
    guest.create_pair(1, 4);
    let sq_base = guest.pages(1);
    guest.create_sq(2, 16, sq_base, 1).unwrap();
    guest.queues.insert(2, Pair { sq_base, entries: 16, tail: 0, ..guest.queues[&1].clone() });
    let (list, page) = (guest.pages(1), guest.pages(2));
    guest.write_bytes(list, &[page.to_le_bytes(), (page + 4096).to_le_bytes()].concat());
    guest.create_cq(3, 8, page, 3).unwrap();
    let create = SubmissionEntry {
        opcode: admin::CREATE_SQ,
        prp1: list,
        cdw10: 3 | 99 << 16,
        cdw11: 3 << 16,
        ..SubmissionEntry::default()
    };
    guest.admin(create).unwrap();
    for (lba, blocks) in [(3, 2), (10, 7)] {
        guest.io(1, transfer(nvm::WRITE_UNCORRECTABLE, 7, lba, blocks, 0)).unwrap();
    }
    for lba in 0..10 {
        guest.push(2, transfer(nvm::READ, 1, lba, 1, page));
    }
    guest.ring(2);
    guest.run();
    // These wait in their queue, since the completion queue is full; one of them is aborted.
    for lba in 0..3 {
        guest.push(2, transfer(nvm::READ, 1, lba, 1, page));
    }
    guest.ring(2);
    let abort = SubmissionEntry { opcode: admin::ABORT, cdw10: 2 | 11 << 16, ..SubmissionEntry::default() };
    assert_eq!(guest.admin(abort), Ok(0));
    for offset in [regs::sq_tail_doorbell(4), regs::cq_head_doorbell(4)] {
        guest.write32(offset, 1);
    }
    guest.write32(regs::sq_tail_doorbell(0), 900);
    guest.run();
    for _ in 0..3 {
        guest.push(0, SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..SubmissionEntry::default() });
    }
    guest.ring(0);
    guest.run();
    guest.reap(0);
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    assert!(!state.cq.get(1).unwrap().backlog.is_empty());
    assert!(!state.events.parked.is_empty() && !state.events.queued.is_empty());
    assert!(!state.events.entries.is_empty() && state.doorbell_buffers.enabled);
    assert_eq!(state.sq.get(3).unwrap().pages.len(), 2);
    assert_eq!(state.sq.get(2).unwrap().aborted, [11]);
    (guest, state)
}

fn load(guest: &Guest, state: &NvmeState) -> Result<Controller, Error> {
    let (contexts, _) = contexts(&guest.memory, 1, 4);
    Controller::restore(
        state,
        guest.config.clone(),
        guest.memory.clone(),
        &guest.namespaces,
        contexts,
        Arc::new(Interrupts::default()),
        Arc::new(Process::default()),
    )
}

type Change = fn(&mut NvmeState);

fn marks(state: &mut NvmeState) -> &mut UncorrectableState {
    state.namespaces.get_mut(6).unwrap().uncorrectable.as_mut().unwrap()
}

/// What is changed, how, and what the error says.
const CHANGES: &[(&str, Change, &str)] = &[
    ("serial", |s| s.shape.serial[0] = b'X', "shape.serial"),
    ("queue pairs", |s| s.shape.queue_pairs = 3, "shape.queue_pairs"),
    ("vectors", |s| s.shape.vectors = 6, "shape.vectors"),
    ("MDTS", |s| s.shape.mdts = 0, "shape.mdts"),
    ("entries", |s| s.shape.queue_entries = 2048, "shape.queue_entries"),
    ("CQR", |s| s.shape.contiguous_queues = true, "shape.contiguous_queues"),
    ("fewer SQ slots", |s| s.sq = s.sq.iter().take(4).map(|q| q.cloned()).collect(), "sq_count"),
    ("fewer CQ slots", |s| s.cq = s.cq.iter().take(4).map(|q| q.cloned()).collect(), "cq_count"),
    (
        "fewer NS slots",
        |s| s.namespaces = s.namespaces.iter().take(9).map(|n| n.cloned()).collect(),
        "namespace_count",
    ),
    ("missing namespace", |s| _ = s.namespaces.put(6, None), "namespaces[6]"),
    ("extra namespace", |s| _ = s.namespaces.put(7, s.namespaces.get(6).cloned()), "namespaces[7]"),
    (
        "namespace in the wrong slot",
        |s| s.namespaces.get_mut(6).unwrap().shape.nsid = 1,
        "namespaces[6].nsid",
    ),
    (
        "namespace size",
        |s| s.namespaces.get_mut(6).unwrap().shape.blocks = 65,
        "size in blocks: 65 here, 64 there",
    ),
    (
        "namespace block size",
        |s| s.namespaces.get_mut(6).unwrap().shape.block_shift = 200,
        "size in bytes: 64 * 2^200 here",
    ),
    ("namespace read-only", |s| s.namespaces.get_mut(6).unwrap().shape.read_only = true, "read only"),
    ("namespace UUID", |s| s.namespaces.get_mut(6).unwrap().shape.uuid[3] ^= 1, "UUID"),
    ("namespace backend", |s| s.namespaces.get_mut(6).unwrap().shape.backend = *b"null    ", "backend"),
    ("no runs", |s| marks(s).runs.clear(), "[6].uncorrectable.runs"),
    ("run of no blocks", |s| marks(s).runs[1].blocks = 0, "the run has no blocks"),
    ("run beyond the namespace", |s| marks(s).runs[1].blocks = 55, "goes beyond the namespace"),
    ("run beyond all numbers", |s| marks(s).runs[1].first = u64::MAX, "goes beyond the namespace"),
    ("runs that touch", |s| marks(s).runs[1].first = 5, "not behind the one before it"),
    ("changed namespace 0", |s| s.changed_namespaces = vec![0], "changed_namespaces"),
    ("changed namespace 1025", |s| s.changed_namespaces = vec![1025], "changed_namespaces"),
    ("CSTS reserved", |s| s.registers.csts |= 1 << 9, "registers.csts"),
    ("CSTS shutting down", |s| s.registers.csts |= 1 << 2, "registers.csts"),
    ("CSTS SHST 3", |s| s.registers.csts |= 3 << 2, "registers.csts"),
    ("CSTS not ready", |s| s.registers.csts = 0, "registers.csts"),
    ("CSTS failed, not ready, with queues", |s| s.registers.csts = 2, "sq is"),
    ("CC disabled but ready", |s| s.registers.cc &= !1, "registers.csts"),
    ("CC page size", |s| s.registers.cc |= 5 << 7, "registers.cc"),
    ("CC command set", |s| s.registers.cc |= 1 << 4, "registers.cc"),
    ("CC entry sizes not set", |s| s.registers.cc = 1, "registers.cc"),
    ("AQA reserved", |s| s.registers.aqa |= 1 << 12, "registers.aqa"),
    ("AQA other size", |s| s.registers.aqa = 31 << 16 | 30, "sq[0].size"),
    ("AQA of 1", |s| s.registers.aqa = 0, "registers.aqa"),
    ("ASQ reserved", |s| s.registers.asq |= 8, "registers.asq"),
    ("ASQ outside memory", |s| s.registers.asq = !0xfff, "registers.asq"),
    ("ASQ elsewhere", |s| s.registers.asq += 4096, "sq[0].pages"),
    ("ACQ outside memory", |s| s.registers.acq = !0xfff, "registers.acq"),
    ("ACQ reserved", |s| s.registers.acq |= 8, "registers.acq"),
    ("ACQ elsewhere", |s| s.registers.acq += 4096, "cq[0].pages"),
    ("vector count", |s| s.features.vector_count = 4, "features.vector_count"),
    ("vector bits", |s| s.features.coalescing_disabled = Bitmap::new(4), "features.vector_count"),
    ("coalescing", |s| s.features.interrupt_coalescing = 0x1_0000, "features.interrupt_coalescing"),
    ("write atomicity", |s| s.features.write_atomicity = 2, "features.write_atomicity"),
    ("event configuration", |s| s.features.async_events = 1 << 31, "features.async_events"),
    ("keep alive", |s| s.features.keep_alive_ms = 1, "features.keep_alive_ms"),
    ("timestamp", |s| s.features.timestamp_ms = 1 << 48, "features.timestamp_ms"),
    ("command retry", |s| s.features.command_retry = 2, "features.command_retry"),
    ("queued event", |s| s.events.queued[0] = 8, "events.queued"),
    ("error count 0", |s| s.events.entries[0] = [0; 64], "events.entries.error_count"),
    ("error entry reserved", |s| s.events.entries[0][63] = 1, "events.entries is"),
    ("error count", |s| s.events.error_count = 0, "events.entries.error_count"),
    ("errors that were never counted", |s| s.events.error_count = u64::MAX, "events.error_count"),
    ("CQ id", |s| s.cq.get_mut(1).unwrap().id = 2, "cq[1].id"),
    ("CQ admin missing", |s| _ = s.cq.put(0, None), "sq[0]"),
    ("SQ admin missing", |s| _ = s.sq.put(0, None), "sq[0]"),
    ("CQ admin vector", |s| s.cq.get_mut(0).unwrap().vector = 1, "cq[0].vector"),
    ("CQ admin without interrupts", |s| s.cq.get_mut(0).unwrap().interrupts = false, "cq[0].interrupts"),
    ("CQ vector", |s| s.cq.get_mut(1).unwrap().vector = 5, "its vector does not exist"),
    ("CQ size 1", |s| s.cq.get_mut(1).unwrap().size = 1, "cq[1].size"),
    ("CQ size above MQES", |s| s.cq.get_mut(1).unwrap().size = 1025, "its size is above CAP.MQES"),
    ("CQ huge", |s| s.cq.get_mut(1).unwrap().size = u32::MAX, "cq[1].size"),
    ("CQ head", |s| s.cq.get_mut(1).unwrap().head = 4, "cq[1].head"),
    ("CQ tail", |s| s.cq.get_mut(1).unwrap().tail = 4, "cq[1].tail"),
    ("CQ misaligned", |s| s.cq.get_mut(1).unwrap().pages[0] += 8, "its memory is not page aligned"),
    ("CQ outside memory", |s| s.cq.get_mut(1).unwrap().pages[0] = MEMORY_BYTES as u64, "not inside RAM"),
    ("CQ without address", |s| s.cq.get_mut(1).unwrap().pages.clear(), "cq[1].page_count"),
    ("CQ missing", |s| _ = s.cq.put(1, None), "its completion queue does not exist"),
    ("CQ backlog of a stranger", |s| s.cq.get_mut(1).unwrap().backlog[0].sq_id = 3, "cq[1].backlog.sq_id"),
    ("CQ backlog status", |s| s.cq.get_mut(1).unwrap().backlog[0].status = 0x8000, "cq[1].backlog.status"),
    (
        "CQ admin backlog",
        |s| {
            let ended = EndedState { sq_id: 1, cid: 0, status: 0, dw0: 0, dw1: 0 };
            s.cq.get_mut(0).unwrap().backlog.push(ended);
        },
        "cq[0].backlog.sq_id",
    ),
    (
        "CQ admin backlog too long",
        |s| {
            let ended = EndedState { sq_id: 0, cid: 0, status: 0, dw0: 0, dw1: 0 };
            s.cq.get_mut(0).unwrap().backlog = vec![ended; 65_530];
        },
        "cq[0].backlog_count",
    ),
    ("SQ id", |s| s.sq.get_mut(2).unwrap().id = 1, "sq[2].id"),
    ("SQ priority", |s| s.sq.get_mut(2).unwrap().priority = 4, "sq[2].priority"),
    ("SQ admin CQ", |s| s.sq.get_mut(0).unwrap().cq_id = 1, "sq[0].cq_id"),
    ("SQ with CQ 0", |s| s.sq.get_mut(2).unwrap().cq_id = 0, "sq[2].cq_id"),
    ("SQ with CQ 65535", |s| s.sq.get_mut(3).unwrap().cq_id = 0xffff, "its completion queue does not exist"),
    ("SQ size", |s| s.sq.get_mut(2).unwrap().size = 0, "sq[2].size"),
    ("SQ head", |s| s.sq.get_mut(3).unwrap().head = 100, "sq[3].head"),
    ("SQ tail", |s| s.sq.get_mut(3).unwrap().tail = 100, "sq[3].tail"),
    ("SQ pages too few", |s| s.sq.get_mut(3).unwrap().pages.truncate(1), "wrong number of pages"),
    ("SQ pages misaligned", |s| s.sq.get_mut(3).unwrap().pages[1] += 64, "its memory is not page aligned"),
    ("SQ pages outside memory", |s| s.sq.get_mut(3).unwrap().pages[1] = !0xfff, "not inside RAM"),
    ("SQ aborted, not waiting", |s| s.sq.get_mut(2).unwrap().aborted = vec![9], "sq[2].aborted"),
    ("SQ aborted, twice", |s| s.sq.get_mut(2).unwrap().aborted = vec![11, 11], "sq[2].aborted"),
    ("SQ aborted, beyond", |s| s.sq.get_mut(2).unwrap().aborted = vec![16], "sq[2].aborted"),
    ("SQ aborted, too many", |s| s.sq.get_mut(2).unwrap().aborted = vec![11; 257], "sq[2].aborted_count"),
    ("shadow misaligned", |s| s.doorbell_buffers.shadow += 4, "doorbell_buffers.shadow"),
    ("event index outside", |s| s.doorbell_buffers.event_index = !0xfff, "doorbell_buffers.event_index"),
    ("buffers off but there", |s| s.doorbell_buffers.enabled = false, "doorbell_buffers.shadow"),
    ("PCI", |s| s.pci.config.bytes[0] ^= 1, "PCI part"),
    ("MSI-X", |s| s.pci.msix.entries.clear(), "PCI part"),
];

#[test]
fn every_check_refuses_what_it_is_for() {
    let (guest, state) = rich();
    assert_eq!(load(&guest, &state).unwrap().save(), state);
    for (what, change, expected) in CHANGES {
        let mut changed = state.clone();
        change(&mut changed);
        assert_ne!(changed, state, "{what}");
        match load(&guest, &changed) {
            Ok(_) => panic!("{what} was accepted"),
            Err(error) => assert!(error.to_string().contains(expected), "{what}: {error}"),
        }
    }
}

#[test]
fn counters_that_are_full_stay_so() {
    let (guest, mut state) = rich();
    state.events.error_count = u64::MAX / 2;
    state.events.queued.clear();
    state.events.queued_count = 0;
    let smart = &mut state.smart;
    for counter in [
        &mut smart.units_read,
        &mut smart.units_written,
        &mut smart.reads,
        &mut smart.writes,
        &mut smart.media_errors,
        &mut smart.power_cycles,
        &mut smart.power_on_seconds,
    ] {
        *counter = u64::MAX;
    }
    state.features.timestamp_ms = (1 << 48) - 1;
    state.features.keep_alive_ms = u32::MAX / 1000 * 1000;
    let restored = Arc::new(load(&guest, &state).unwrap());
    restored.resume();
    let ring = |offset: u64, value: u32| restored.bar_write(0, offset, &value.to_le_bytes());
    // Room in the completion queue lets commands run, and a bad doorbell is logged.
    let tail = state.cq.get(1).unwrap().tail;
    guest.memory.store(tail, GuestAddress(state.doorbell_buffers.shadow + 12), Ordering::SeqCst).unwrap();
    ring(regs::cq_head_doorbell(1), tail);
    ring(regs::sq_tail_doorbell(2), 900);
    while restored.process(0) == Progress::More {}
    restored.pause(Instant::now() + PATIENCE).unwrap();
    let after = restored.save();
    assert_eq!((after.smart.reads, after.smart.power_cycles), (u64::MAX, u64::MAX));
    assert_eq!(after.smart.power_on_seconds, u64::MAX);
    assert!(after.events.error_count > u64::MAX / 2);
    // However many there are, the counter of errors does not overflow either.
    let mut events = crate::event::Events { error_count: u64::MAX - 1, ..Default::default() };
    (0..3).for_each(|_| events.log_error(Default::default()));
    assert_eq!(events.error_count, u64::MAX);
}

#[test]
fn a_disabled_controller_has_nothing() {
    let guest = Guest::power_on(config(), vec![namespace(1, 64)]);
    guest.controller.pause(Instant::now()).unwrap();
    let state = guest.controller.save();
    assert_eq!(load(&guest, &state).unwrap().save(), state);
    let (_, rich) = rich();
    type Change<'a> = &'a dyn Fn(&mut NvmeState);
    let changes: [(&str, Change<'_>); 4] = [
        ("events.parked_count", &|s| s.events.parked = vec![1]),
        ("sq is", &|s| _ = s.sq.put(1, rich.sq.get(1).cloned())),
        ("cq is", &|s| _ = s.cq.put(1, rich.cq.get(1).cloned())),
        ("doorbell_buffers.enabled", &|s| s.doorbell_buffers = rich.doorbell_buffers.clone()),
    ];
    for (expected, change) in changes {
        let mut changed = state.clone();
        change(&mut changed);
        let error = load(&guest, &changed).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn flipped_bits_are_refused_or_harmless() {
    let (guest, state) = rich();
    let bytes = vmstate::to_bytes(&state);
    let (mut refused, mut accepted) = (0, 0);
    for position in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[position] ^= 1 << (position % 8);
        let Ok(changed) = vmstate::from_bytes::<NvmeState>(&changed, NvmeState::VERSION) else {
            refused += 1;
            continue;
        };
        match load(&guest, &changed) {
            Err(_) => refused += 1,
            Ok(controller) => {
                accepted += 1;
                assert!(controller.save() == changed, "byte {position}: what is accepted saves the same");
                controller.resume();
                // Bounded: rings may now hold anything, at most their size of it.
                (0..5000).find(|_| controller.process(0) == Progress::Idle).expect("it comes to rest");
            }
        }
    }
    assert!(refused > accepted && accepted > 0, "{refused} refused, {accepted} accepted");
    // The log of events is the last part, and one that old states lack.
    let shorter = vmstate::to_bytes(&NvmeState { persistent_events: None, ..state }).len();
    for length in (0..bytes.len()).filter(|&length| length != shorter) {
        assert!(vmstate::from_bytes::<NvmeState>(&bytes[..length], NvmeState::VERSION).is_err());
    }
}

#[test]
fn inventories_name_every_difference() {
    let guest = Guest::power_on(config(), vec![namespace(1, 64), namespace(7, 64)]);
    let other = ControllerConfig { queue_pairs: 2, vectors: 3, mdts: 5, ..config() };
    let other = Guest::power_on(other, vec![namespace(1, 32), namespace(9, 64)]);
    let (here, there) = (guest.controller.inventory(), other.controller.inventory());
    assert_eq!(here.differences(&here), Vec::<String>::new());
    let expected = [
        "NVMe controller \"ATTACK\", queue pairs: 4 here, 2 there",
        "NVMe controller \"ATTACK\", MSI-X vectors: 5 here, 3 there",
        "NVMe controller \"ATTACK\", MDTS: 7 here, 5 there",
        "NVMe namespace 1, size in blocks: 64 here, 32 there",
        "NVMe namespace 7 is missing there",
        "NVMe namespace 9 is missing here",
    ];
    assert_eq!(here.differences(&there), expected);
    let bytes = vmstate::to_bytes(&here);
    assert_eq!(vmstate::from_bytes::<crate::Inventory>(&bytes, 1), Ok(here));
}
