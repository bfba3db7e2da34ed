//! Controllers of ours that QEMU can go on with, and those that it cannot.

use std::time::Instant;

use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{SubmissionEntry, feature};

use super::super::driver::{Guest, PATIENCE, contexts, memory_image, namespace, transfer};
use super::{CLOCK_MS, Leaf, leaves};
use crate::qemu::{QemuDevice, QemuLimit, QemuResidue, QemuSection};
use crate::{
    Controller, ControllerConfig, EndedState, Error, FormatState, MetadataShape, MoreFeaturesState,
    NamespaceConfig, NvmeState, SweepState, UncorrectableRunState, UncorrectableState, WriteProtectionState,
};

fn config() -> ControllerConfig {
    ControllerConfig {
        queue_pairs: 4,
        vectors: 5,
        queue_entries: 1024,
        contiguous_queues: true,
        ..ControllerConfig::new("REVERSE")
    }
}

fn set_feature(id: u8, cdw11: u32) -> SubmissionEntry {
    SubmissionEntry { opcode: admin::SET_FEATURES, cdw10: id.into(), cdw11, ..SubmissionEntry::default() }
}

/// A controller with something of everything that QEMU has too.
fn rich(block_bytes: u32) -> Guest {
    let backend = memory_image(64 * 4096);
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes, metadata: None, backend }]);
    guest.use_shadow_doorbells();
    guest.create_pair(1, 8);
    guest.create_pair(3, 16);
    guest.admin(set_feature(feature::ASYNC_EVENT_CONFIGURATION, 0x102)).unwrap();
    guest.admin(set_feature(feature::WRITE_ATOMICITY, 1)).unwrap();
    guest.admin(set_feature(feature::VOLATILE_WRITE_CACHE, 0)).unwrap();
    guest.admin(SubmissionEntry { nsid: 1, ..set_feature(feature::ERROR_RECOVERY, 77) }).unwrap();
    let page = guest.pages(1);
    guest.write_bytes(page, &1_700_000_000_000_u64.to_le_bytes());
    guest.admin(SubmissionEntry { prp1: page, ..set_feature(feature::TIMESTAMP, 0) }).unwrap();
    // The temperature is beyond its threshold three times: the first answers a request and masks such events.
    for threshold in [300, 400, 300, 400, 300] {
        if threshold == 300 {
            guest.push(0, SubmissionEntry { opcode: admin::ASYNC_EVENT_REQUEST, ..Default::default() });
        }
        guest.push(0, set_feature(feature::TEMPERATURE_THRESHOLD, threshold));
        guest.ring(0);
        guest.run();
        guest.reap(0);
    }
    for lba in 0..11 {
        guest.io(3, transfer(nvm::FLUSH, 1, lba, 1, page)).unwrap();
    }
    // Two completions that the guest has not seen.
    for _ in 0..2 {
        guest.push(1, transfer(nvm::FLUSH, 1, 0, 1, page));
    }
    guest.ring(1);
    guest.run_until("the flushes", |guest| guest.controller.statistics().in_flight == 0);
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    guest
}

fn device() -> QemuDevice {
    QemuDevice::of(&config())
}

/// A controller like that of `guest`, over the same memory and image, that nobody has used.
fn another(guest: &mut Guest) -> Controller {
    let (contexts, events) = contexts(&guest.memory, 2, 64);
    guest.events = events;
    let (config, memory) = (guest.config.clone(), guest.memory.clone());
    let (interrupts, process) = (guest.interrupts.clone(), guest.process.clone());
    Controller::new(config, memory, &guest.namespaces, contexts, interrupts, process).unwrap()
}

#[test]
fn a_controller_within_the_limits_comes_back_from_qemu_as_it_was() {
    for block_bytes in [512, 4096] {
        let mut guest = rich(block_bytes);
        let state = guest.controller.save();
        assert_eq!((state.events.parked.len(), state.events.queued.len()), (2, 1));
        assert!(state.doorbell_buffers.enabled && state.features.timestamp_set);
        let residue = QemuResidue::new(&state).unwrap();
        let section = guest.controller.save_qemu(&residue, &device(), CLOCK_MS).unwrap();
        let bytes = section.to_bytes();
        let section = QemuSection::from_bytes(&bytes, &device()).unwrap();
        let controller = another(&mut guest);
        let (again, residue) = section.clone().split(controller.save(), CLOCK_MS).unwrap();
        let state = NvmeState { persistent_events: None, ..state };
        assert_eq!(again, state);
        // Also at another time of QEMU's clock, which has gone on.
        let later = QemuSection::join(&again, &residue, &device(), CLOCK_MS + 5000).unwrap();
        assert_eq!(later.split(controller.save(), CLOCK_MS + 5000).unwrap().0, state);
        // And it works.
        controller.load_qemu(section, CLOCK_MS).unwrap();
        assert_eq!(controller.save(), state);
        controller.resume();
        guest.controller = std::sync::Arc::new(controller);
        guest.run();
        assert!(guest.interrupts.take(1) > 0, "unseen entries are signalled again");
        assert_eq!(guest.reap(1).len(), 2);
        let page = guest.pages(1);
        guest.io(3, transfer(nvm::READ, 1, 7, 1, page)).unwrap();
    }
}

#[test]
fn a_controller_that_is_off_comes_back_too() {
    for steps in 0..3 {
        let mut guest = Guest::power_on(config(), vec![namespace(1, 64)]);
        if steps > 0 {
            guest.enable();
        }
        if steps > 1 {
            guest.write32(nvme_spec::regs::CC, 0x0046_0000);
            guest.run();
        }
        guest.controller.pause(Instant::now() + PATIENCE).unwrap();
        let state = guest.controller.save();
        let residue = QemuResidue::new(&state).unwrap();
        let section = guest.controller.save_qemu(&residue, &device(), CLOCK_MS).unwrap();
        let controller = another(&mut guest);
        controller.load_qemu(section, CLOCK_MS).unwrap();
        let state = NvmeState { persistent_events: None, ..state };
        assert_eq!(controller.save(), state, "step {steps}");
    }
}

#[test]
fn qemus_counters_and_history_begin_again_and_nothing_else_is_lost() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    guest.io(1, transfer(nvm::WRITE, 1, 0, 1, page)).unwrap();
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    let section = QemuSection::join(&state, &QemuResidue::new(&state).unwrap(), &device(), CLOCK_MS).unwrap();
    let unused = another(&mut guest).save();
    let (again, _) = section.split(unused, CLOCK_MS).unwrap();
    assert_eq!((state.smart.writes, again.smart.writes), (1, 0));
    assert!(state.persistent_events.is_some());
    assert_eq!(again, NvmeState { smart: again.smart.clone(), persistent_events: None, ..state });
}

/// Which variant a limit is. A new one has to be added here, and then below.
fn variant(limit: &QemuLimit) -> usize {
    match limit {
        QemuLimit::Device { .. } => 0,
        QemuLimit::Namespaces { .. } => 1,
        QemuLimit::ReadOnly => 2,
        QemuLimit::BlockSize { .. } => 3,
        QemuLimit::ChangedNamespaces { .. } => 4,
        QemuLimit::Pieces => 5,
        QemuLimit::QueueInPieces { .. } => 6,
        QemuLimit::Priority { .. } => 7,
        QemuLimit::Aborted { .. } => 8,
        QemuLimit::Backlog { .. } => 9,
        QemuLimit::Feature { .. } => 10,
        QemuLimit::ErrorLog { .. } => 11,
        QemuLimit::ParkedRequests { .. } => 12,
        QemuLimit::SubsystemReset => 13,
        QemuLimit::ZeroTimestamp => 14,
        QemuLimit::Capability { .. } => 15,
        QemuLimit::Part { .. } => 16,
        QemuLimit::Uncorrectable { .. } => 17,
        QemuLimit::Arbitration { .. } => 18,
        QemuLimit::PinInterrupt { .. } => 19,
        QemuLimit::Metadata { .. } => 20,
    }
}

/// A change of a state.
type Exceed = fn(&mut NvmeState);

/// What goes beyond QEMU, and the limit that says so.
const BEYOND: &[(Exceed, QemuLimit)] = &[
    (
        |s| s.shape.queue_pairs = 5,
        QemuLimit::Device { what: "I/O queue pairs (max_ioqpairs)", here: 5, there: 4 },
    ),
    (|s| s.shape.vectors = 6, QemuLimit::Device { what: "MSI-X vectors (msix_qsize)", here: 6, there: 5 }),
    (|s| _ = s.namespaces.put(0, None), QemuLimit::Namespaces { count: 0 }),
    (|s| _ = s.namespaces.put(900, s.namespaces.get(0).cloned()), QemuLimit::Namespaces { count: 2 }),
    (|s| s.namespaces.get_mut(0).unwrap().shape.read_only = true, QemuLimit::ReadOnly),
    (
        |s| {
            let (bytes, extended, protection_type, protection_first) = (8, false, 1, false);
            let metadata =
                MetadataShape { bytes, extended, protection_type, protection_first, image_bytes: 4096 };
            s.namespaces.get_mut(0).unwrap().shape.metadata = Some(metadata);
        },
        QemuLimit::Metadata { bytes: 8 },
    ),
    (|s| s.namespaces.get_mut(0).unwrap().shape.block_shift = 10, QemuLimit::BlockSize { block_shift: 10 }),
    (
        |s| {
            let run = UncorrectableRunState { first: 3, blocks: 2 };
            let state = UncorrectableState { run_count: 1, runs: vec![run] };
            s.namespaces.get_mut(0).unwrap().uncorrectable = Some(state);
        },
        QemuLimit::Uncorrectable { count: 1 },
    ),
    (|s| s.changed_namespaces.push(1), QemuLimit::ChangedNamespaces { count: 1 }),
    (|s| s.shape.contiguous_queues = false, QemuLimit::Pieces),
    (|s| s.sq.get_mut(3).unwrap().contiguous = false, QemuLimit::QueueInPieces { id: 3 }),
    (|s| s.cq.get_mut(1).unwrap().contiguous = false, QemuLimit::QueueInPieces { id: 1 }),
    (|s| s.sq.get_mut(1).unwrap().priority = 2, QemuLimit::Priority { id: 1, priority: 2 }),
    (|s| s.sq.get_mut(1).unwrap().aborted.push(0), QemuLimit::Aborted { id: 1, count: 1 }),
    (
        |s| {
            let ended = EndedState { sq_id: 3, cid: 0, status: 0, dw0: 0, dw1: 0 };
            s.cq.get_mut(3).unwrap().backlog.push(ended);
        },
        QemuLimit::Backlog { id: 3, count: 1 },
    ),
    (|s| s.features.arbitration = 1, QemuLimit::Feature { feature: 1, name: "Arbitration" }),
    (
        |s| s.features.interrupt_coalescing = 1,
        QemuLimit::Feature { feature: 8, name: "Interrupt Coalescing" },
    ),
    (
        |s| s.features.coalescing_disabled.set(4, true),
        QemuLimit::Feature { feature: 9, name: "Interrupt Vector Configuration" },
    ),
    (|s| s.features.keep_alive_ms = 1000, QemuLimit::Feature { feature: 0xf, name: "Keep Alive Timer" }),
    (|s| s.features.host_identifier[0] = 1, QemuLimit::Feature { feature: 0x81, name: "Host Identifier" }),
    (|s| s.events.error_count = 3, QemuLimit::ErrorLog { count: 3 }),
    (|s| s.events.parked = vec![1, 2, 3, 4, 5], QemuLimit::ParkedRequests { count: 5, most: 4 }),
    (|s| s.registers.csts |= 1 << 4, QemuLimit::SubsystemReset),
    (|s| s.registers.cc |= 1 << 11, QemuLimit::Arbitration { ams: 1 }),
    (|s| s.pci.config.bytes[0x43] &= 0x7f, QemuLimit::PinInterrupt { count: 2 }),
    (|s| s.features.timestamp_ms = 0, QemuLimit::ZeroTimestamp),
    (|s| s.pci.config.bytes[0x40] = 5, QemuLimit::Capability { id: 5 }),
    (
        |s| s.features.more = Some(MoreFeaturesState { workload_hint: 32, sanitize_config: 0 }),
        QemuLimit::Part { what: "a workload hint or a sanitize configuration" },
    ),
    (
        |s| {
            let protection = Some(WriteProtectionState { value: 1 });
            s.namespaces.get_mut(0).unwrap().write_protection = protection;
        },
        QemuLimit::Part { what: "a write protected namespace" },
    ),
    (
        |s| {
            let sweep = SweepState { scope: 1, nsid: 1, offset_bytes: 0 };
            s.format = Some(FormatState { waits: false, cid: 0, format: 0, sweep, settings: None });
        },
        QemuLimit::Part { what: "a format in progress" },
    ),
];

#[test]
fn every_limit_of_qemu_is_named() {
    let guest = rich(512);
    let state = guest.controller.save();
    let residue = QemuResidue::new(&state).unwrap();
    QemuSection::join(&state, &residue, &device(), CLOCK_MS).unwrap();
    let mut seen = [false; 21];
    for (exceed, expected) in BEYOND {
        let mut exceeding = state.clone();
        exceed(&mut exceeding);
        match QemuSection::join(&exceeding, &residue, &device(), CLOCK_MS) {
            Err(Error::BeyondQemu(limit)) => assert_eq!(limit, *expected),
            other => panic!("{expected}: {other:?}"),
        }
        seen[variant(expected)] = true;
    }
    assert_eq!(seen, [true; 21]);
    assert_eq!(QemuLimit::SubsystemReset.to_string(), "CSTS.NSSRO is set");
}

#[test]
fn a_new_qemu_device_says_what_qemus_own_said() {
    // All that the two have in common of a machine of the same shape, but what its guest did.
    let config = super::LINUX.config();
    let state = super::machine(&config).controller.save();
    let (_, captured) = super::LINUX.section().split(state.clone(), CLOCK_MS).unwrap();
    let fresh = QemuResidue::new(&state).unwrap();
    let [fresh, captured] = [fresh, captured]
        .map(|residue| QemuSection::join(&state, &residue, &super::LINUX.device(), CLOCK_MS).unwrap());
    let fields = leaves(&vmstate::describe(&fresh));
    assert_eq!(fields, leaves(&vmstate::describe(&captured)));
    let (fresh, captured) = (fresh.to_bytes(), captured.to_bytes());
    let bytes = |leaf: &Leaf| leaf.offset..leaf.offset + leaf.size;
    let different = fields.iter().filter(|leaf| fresh[bytes(leaf)] != captured[bytes(leaf)]);
    // Linux has said that it knows of more formats; the firmware has switched I/O decoding on and Linux left it on.
    let different: Vec<_> = different.map(|leaf| &*leaf.path).collect();
    assert_eq!(different, ["pci_device.config", "features.hbs.lbafee"]);
    let config = fields[1].offset;
    assert_eq!(captured[config + 4] ^ fresh[config + 4], 1);
    assert_eq!(fresh[config + 5..config + 4096], captured[config + 5..config + 4096]);
}
