//! The machine that is played on: memory in three parts, one controller, and a driver that keeps two queue pairs for itself.
//!
//! The *arena* is what the input points at and writes. The *private* memory holds the admin queues and one pair of I/O queues; the
//! *sanctuary* holds nothing that anybody may touch. Neither address can be had from an input ([`HIDDEN`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block::IoContext;
use bus::{GuestMapping, GuestMemory};
use nvme::{Controller, ControllerConfig, MetadataConfig, NamespaceConfig, NvmeState, Progress, Subsystem};
use nvme_spec::opcode::admin;
use nvme_spec::{CompletionEntry, SubmissionEntry, regs};
use pci::PciFunction;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;
use vmstate::VmState;

use super::actor::{Actor, Keeper, Process};

/// What the input points at.
pub const ARENA_BYTES: u64 = 256 << 10;
/// Where the controller memory buffer is, while it is where the driver puts it.
pub(super) const BUFFER_BASE: u64 = 0x8000_0000;
const BUFFER_BYTES: u64 = 64 << 10;
/// Where the persistent memory region is, while it is where the driver puts it.
pub(super) const REGION_BASE: u64 = 0x9000_0000;
const REGION_BYTES: u64 = 64 << 10;
const PRIVATE_BASE: u64 = 0x0e5a_91c2_0000_0000;
const SANCTUARY_BASE: u64 = 0x0e5a_91c3_0000_0000;
const SANCTUARY_BYTES: usize = 64 << 10;
/// The upper halves of both.
pub(super) const HIDDEN: [u32; 2] = [(PRIVATE_BASE >> 32) as u32, (SANCTUARY_BASE >> 32) as u32];
/// A memory page of the largest size for each private queue and for the two shadow buffers.
const PRIVATE_PAGE_BYTES: u64 = 64 << 10;
/// Entries of the private queues.
const ENTRIES: u32 = 64;
/// Far above what any input needs, in passes and in time.
const MOST_PASSES: u32 = 100_000;
const PATIENCE: Duration = Duration::from_secs(60);
/// CC with EN, IOSQES and IOCQES.
const CC: u32 = 0x0046_0001;
const COMMAND_OFFSET: u16 = 0x04;
const POWER_STATE_OFFSET: u16 = 0x64;

/// What the first byte of an input chooses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape(pub u8);

impl Shape {
    fn has_buffer(self) -> bool {
        self.0 & 1 != 0
    }

    fn has_region(self) -> bool {
        self.0 >> 1 & 3 == 1
    }

    /// The same without memory of the controller.
    pub fn with_ram_only(self) -> Self {
        Shape(if self.has_region() { self.0 & !3 } else { self.0 & !1 })
    }

    /// CC.MPS. Both kinds of machines with the smallest pages are there: with a region and without.
    pub fn page_shift(self) -> u32 {
        [0, 0, 1, 4][usize::from(self.0 >> 1 & 3)]
    }

    /// Of the blocks of namespace 3.
    fn metadata(self) -> Option<MetadataConfig> {
        let (bytes, extended, protection_type) = match self.0 >> 6 {
            0 => return None,
            1 => (64, false, 1),
            2 => (8, true, 2),
            _ => (64, true, 3),
        };
        Some(MetadataConfig { bytes, extended, protection_type, protection_first: extended })
    }

    fn workers(self) -> usize {
        1 + usize::from(self.0 >> 3 & 1)
    }

    fn config(self) -> ControllerConfig {
        ControllerConfig {
            queue_pairs: 4,
            vectors: 5,
            mdts: if self.0 & 0x10 != 0 { 5 } else { 0 },
            contiguous_queues: self.0 & 0x20 != 0,
            buffer_bytes: if self.has_buffer() { BUFFER_BYTES } else { 0 },
            region_bytes: if self.has_region() { REGION_BYTES } else { 0 },
            ..ControllerConfig::new("FUZZ")
        }
    }
}

/// One of the driver's own queue pairs.
#[derive(Debug)]
struct Pair {
    id: u16,
    tail: u32,
    head: u32,
    phase: bool,
    /// Where the controller has come to in the submission queue, as it said last.
    fetched: u32,
    next_cid: u16,
    /// Commands that have not ended, with their opcodes.
    waiting: BTreeMap<u16, (u8, u8)>,
    /// Nobody else rings, deletes or shadows it: each command ends once.
    is_exact: bool,
}

impl Pair {
    fn new(id: u16) -> Self {
        Pair {
            id,
            tail: 0,
            head: 0,
            phase: true,
            fetched: 0,
            next_cid: 0,
            waiting: BTreeMap::new(),
            is_exact: true,
        }
    }

    fn sq_base(&self) -> u64 {
        PRIVATE_BASE + u64::from(self.id) * 2 * PRIVATE_PAGE_BYTES
    }

    fn cq_base(&self) -> u64 {
        self.sq_base() + PRIVATE_PAGE_BYTES
    }
}

/// See the module's text.
pub struct Machine {
    pub(super) memory: GuestMemory,
    pub(super) actor: Arc<Actor>,
    pub(super) keeper: Arc<Keeper>,
    /// The images of the host's namespaces.
    pub(super) namespaces: BTreeMap<u32, NamespaceConfig>,
    pub(super) controller: Controller,
    shape: Shape,
    process: Arc<Process>,
    events: Vec<EventFd>,
    pairs: [Pair; 2],
    /// The driver has enabled the controller, and nobody has changed that.
    pub(super) is_ready: bool,
    /// The driver's shadow doorbells are on.
    shadows: bool,
    bars: BTreeMap<u8, u64>,
}

/// The memory of a machine, and with it that of its controller.
fn memory(shape: Shape) -> GuestMemory {
    let parts = [
        (GuestAddress(0), ARENA_BYTES as usize),
        (GuestAddress(PRIVATE_BASE), 6 * PRIVATE_PAGE_BYTES as usize),
        (GuestAddress(SANCTUARY_BASE), SANCTUARY_BYTES),
    ];
    let mut memory = GuestMemory::from_ranges(&parts).expect("memory for a machine");
    if shape.has_buffer() {
        let buffer = GuestMapping::new(BUFFER_BYTES as usize).expect("memory for a buffer");
        memory = nvme::memory_with_buffer(&memory, Arc::new(buffer)).expect("a buffer of this size");
    }
    if shape.has_region() {
        let region = GuestMapping::new(REGION_BYTES as usize).expect("memory for a region");
        memory = nvme::memory_with_region(&memory, Arc::new(region)).expect("a region of this size");
    }
    memory
}

impl Machine {
    /// A machine whose controller the driver has enabled.
    pub(super) fn new(shape: Shape) -> Self {
        let memory = memory(shape);
        memory.write_slice(&[0xa5; SANCTUARY_BYTES], GuestAddress(SANCTUARY_BASE)).expect("the sanctuary");
        let actor = Actor::new(memory.clone());
        let keeper = Keeper::new(Arc::clone(&actor));
        let image = |nsid, block_bytes, metadata, bytes| {
            (nsid, NamespaceConfig { nsid, block_bytes, metadata, backend: keeper.image(bytes) })
        };
        let namespaces =
            BTreeMap::from([image(1, 512, None, 128 << 10), image(3, 4096, shape.metadata(), 128 << 10)]);
        let process = Process::new(Arc::clone(&actor));
        let (controller, events) = controller(shape, &memory, &namespaces, &keeper, &process);
        let bars = controller.bars().iter().map(|bar| (bar.bar, bar.length_bytes)).collect();
        let mut machine = Machine {
            memory,
            actor,
            keeper,
            namespaces,
            controller,
            shape,
            process,
            events,
            pairs: [Pair::new(0), Pair::new(1)],
            is_ready: false,
            shadows: false,
            bars,
        };
        machine.enable();
        machine
    }

    /// Size of a BAR, 0 if there is none.
    pub(super) fn bar_bytes(&self, bar: u8) -> u64 {
        self.bars.get(&bar).copied().unwrap_or_default()
    }

    pub(super) fn read32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.controller.bar_read(0, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write32(&self, offset: u64, value: u32) {
        self.controller.bar_write(0, offset, &value.to_le_bytes());
    }

    /// A write to a doorbell: what has an event wakes, as an ioeventfd does, and everything else arrives.
    pub(super) fn ring(&self, offset: u64, value: u32) {
        match self.process.event(offset) {
            Some(worker) => self.process.note(worker),
            None => self.write32(offset, value),
        }
    }

    /// Others have interfered with a pair of the driver's: what it does is no longer known.
    pub(super) fn disturb(&mut self, queue: u16) {
        if let Some(pair) = self.pairs.get_mut(usize::from(queue)) {
            pair.is_exact = false;
        }
    }

    /// Makes the controller what the driver expects: a reset ends all that there is, and then it is enabled. Both must succeed.
    pub(super) fn enable(&mut self) {
        self.keeper.faults.clear();
        self.keeper.faults.release_held();
        self.controller.config_write(COMMAND_OFFSET, &6_u16.to_le_bytes());
        self.controller.config_write(POWER_STATE_OFFSET, &[0]);
        self.controller.config_write(COMMAND_OFFSET, &6_u16.to_le_bytes());
        // What failed in a shutdown while it was disabled is forgotten when it is enabled.
        let ended = if self.read32(regs::CC) & 1 == 0 { 0b01 } else { 0b11 };
        self.write32(regs::CC, 0);
        self.run();
        let status = self.read32(regs::CSTS);
        assert_eq!(status & ended, 0, "a reset ends what there was and leaves no failure: CSTS {status:#x}");
        assert_eq!(self.controller.statistics().in_flight, 0, "after a reset nothing is in flight");
        assert!(self.controller.is_quiet(), "after a reset nothing is half done");
        self.pairs = [Pair::new(0), Pair::new(1)];
        self.shadows = false;
        for pair in &self.pairs {
            let zeroes = [0; ENTRIES as usize * CompletionEntry::SIZE_BYTES];
            self.memory.write_slice(&zeroes, GuestAddress(pair.cq_base())).expect("private memory");
        }
        self.write32(regs::AQA, (ENTRIES - 1) << 16 | (ENTRIES - 1));
        for (offset, base) in [(regs::ASQ, self.pairs[0].sq_base()), (regs::ACQ, self.pairs[0].cq_base())] {
            self.controller.bar_write(0, offset, &base.to_le_bytes());
        }
        if self.shape.has_buffer() {
            self.controller.bar_write(0, regs::CMBMSC, &(BUFFER_BASE | 3).to_le_bytes());
        }
        if self.shape.has_region() {
            self.write32(regs::PMRCTL, regs::PMRCTL_EN);
            self.write32(regs::PMRMSCU, (REGION_BASE >> 32) as u32);
            self.write32(regs::PMRMSCL, (REGION_BASE | regs::PMRMSC_CMSE) as u32);
        }
        self.write32(regs::CC, CC | self.shape.page_shift() << 7);
        self.run();
        let status = self.read32(regs::CSTS) & 0xf;
        assert_eq!(status, 1, "a controller can be enabled after a reset");
        self.is_ready = true;
        let (sq_base, cq_base) = (self.pairs[1].sq_base(), self.pairs[1].cq_base());
        for (opcode, base, flags) in
            [(admin::CREATE_CQ, cq_base, 1 << 16 | 3), (admin::CREATE_SQ, sq_base, 1 << 16 | 1)]
        {
            let entry = SubmissionEntry {
                opcode,
                prp1: base,
                cdw10: 1 | (ENTRIES - 1) << 16,
                cdw11: flags,
                ..SubmissionEntry::default()
            };
            self.expect(entry, "a queue can be made after a reset");
        }
    }

    /// An admin command of the driver's, which must succeed.
    fn expect(&mut self, entry: SubmissionEntry, what: &str) {
        let cid = self.push(0, entry).expect("room in the admin queue");
        self.run();
        let ended = self.reap(0).into_iter().find(|entry| entry.cid == cid);
        let status = ended.expect("an answer").status();
        assert!(status.is_success(), "{what}: {status:?}");
    }

    /// The driver's own shadow doorbells, in private memory.
    pub(super) fn use_shadows(&mut self) {
        let base = PRIVATE_BASE + 4 * PRIVATE_PAGE_BYTES;
        let is_usual = self.is_ready && self.pairs[0].is_exact && self.pairs[1].waiting.is_empty();
        // Two buffers of the largest memory page.
        if self.shadows || !is_usual || self.pairs[0].waiting.len() > 8 {
            return;
        }
        self.run();
        self.reap(1);
        let zeroes = vec![0; 2 * PRIVATE_PAGE_BYTES as usize];
        self.memory.write_slice(&zeroes, GuestAddress(base)).expect("private memory");
        let entry = SubmissionEntry {
            opcode: admin::DOORBELL_BUFFER_CONFIG,
            prp1: base,
            prp2: base + PRIVATE_PAGE_BYTES,
            ..SubmissionEntry::default()
        };
        if self.push(0, entry).is_some() {
            self.shadows = true;
            self.run();
            self.reap(0);
        }
    }

    /// Gives a command to a pair of the driver's, and rings. `None`: there is no room, or it cannot be known.
    pub(super) fn push(&mut self, queue: u16, mut entry: SubmissionEntry) -> Option<u16> {
        let pair = self.pairs.get_mut(usize::from(queue))?;
        let next = (pair.tail + 1) % ENTRIES;
        if !pair.is_exact || next == pair.fetched {
            return None;
        }
        entry.cid = pair.next_cid;
        pair.next_cid = pair.next_cid.wrapping_add(1);
        let address = pair.sq_base() + u64::from(pair.tail) * SubmissionEntry::SIZE_BYTES as u64;
        self.memory.write_slice(&entry.to_bytes(), GuestAddress(address)).expect("private memory");
        pair.tail = next;
        pair.waiting.insert(entry.cid, (entry.opcode, entry.fuse()));
        let tail = pair.tail;
        self.set_doorbell(regs::sq_tail_doorbell(queue), tail);
        Some(entry.cid)
    }

    /// As drivers do it: the shadow first, and the doorbell if the event index says so.
    fn set_doorbell(&self, offset: u64, value: u32) {
        let slot = offset - regs::DOORBELLS;
        if self.shadows && slot >= 8 {
            let shadow = GuestAddress(PRIVATE_BASE + 4 * PRIVATE_PAGE_BYTES + slot);
            let event = GuestAddress(shadow.0 + PRIVATE_PAGE_BYTES);
            let old: u32 = self.memory.load(shadow, Ordering::SeqCst).expect("private memory");
            self.memory.store(value, shadow, Ordering::SeqCst).expect("private memory");
            let event: u32 = self.memory.load(event, Ordering::SeqCst).expect("private memory");
            let (new, old, event) = (value as u16, old as u16, event as u16);
            if new.wrapping_sub(event).wrapping_sub(1) >= new.wrapping_sub(old) {
                return;
            }
        }
        self.ring(offset, value);
    }

    /// Takes what a pair of the driver's has completed. Each command ends once.
    pub(super) fn reap(&mut self, queue: u16) -> Vec<CompletionEntry> {
        let mut entries = Vec::new();
        let Some(pair) = self.pairs.get_mut(usize::from(queue)).filter(|pair| pair.is_exact) else {
            return entries;
        };
        loop {
            let address = pair.cq_base() + u64::from(pair.head) * CompletionEntry::SIZE_BYTES as u64;
            let mut bytes = [0; CompletionEntry::SIZE_BYTES];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).expect("private memory");
            let entry = CompletionEntry::from_bytes(&bytes);
            if entry.phase() != pair.phase {
                break;
            }
            pair.head = (pair.head + 1) % ENTRIES;
            pair.phase ^= pair.head == 0;
            // Queues in the arena may use the driver's completion queue too.
            if entry.sq_id == pair.id {
                assert!(
                    pair.waiting.remove(&entry.cid).is_some(),
                    "queue {queue}: {entry:?} ended twice, or never was"
                );
                pair.fetched = entry.sq_head.into();
                assert!(pair.fetched < ENTRIES, "{entry:?}");
                entries.push(entry);
            }
        }
        let (id, head) = (pair.id, pair.head);
        self.set_doorbell(regs::cq_head_doorbell(id), head);
        entries
    }

    /// Lets the workers run that have a reason to, until none has.
    pub(super) fn run(&mut self) {
        for _ in 0..MOST_PASSES {
            let mut ran = false;
            for (worker, event) in self.events.iter().enumerate() {
                if event.read().is_ok() | self.process.take_woken(worker) {
                    ran = true;
                    let idle = |_: &u32| self.controller.process(worker) == Progress::Idle;
                    assert!((0..MOST_PASSES).any(|pass| idle(&pass)), "worker {worker} comes to rest");
                }
            }
            if !ran {
                return;
            }
        }
        panic!("the controller never comes to rest");
    }

    /// One look by a thread that polls, which goes on with a pass before it sleeps.
    pub(super) fn poll(&self, worker: usize) {
        let worker = worker % self.controller.workers();
        self.controller.poll(worker);
        self.process.note(worker);
    }

    /// Saves the controller, and goes on with another that has loaded what was saved.
    pub(super) fn change_controllers(&mut self) {
        self.keeper.faults.clear();
        self.keeper.faults.release_held();
        self.controller.pause(Instant::now() + PATIENCE).expect("a pause ends");
        let state = self.controller.save();
        let bytes = vmstate::to_bytes(&state);
        let loaded =
            vmstate::from_bytes::<NvmeState>(&bytes, NvmeState::VERSION).expect("what was saved can be read");
        assert!(loaded == state, "what was saved is read as it was");
        let process = Process::new(Arc::clone(&self.actor));
        let (controller, events) =
            controller(self.shape, &self.memory, &self.namespaces, &self.keeper, &process);
        controller.load(&loaded).expect("what a guest has brought about can be loaded");
        assert!(controller.save() == state, "what was loaded is saved as it was");
        (self.process, self.events, self.controller) = (process, events, controller);
        self.controller.resume();
    }

    /// What must hold in the end.
    pub(super) fn finish(&mut self) {
        self.actor.forget();
        self.keeper.faults.clear();
        self.keeper.faults.release_held();
        self.controller.config_write(POWER_STATE_OFFSET, &[0]);
        self.controller.config_write(COMMAND_OFFSET, &6_u16.to_le_bytes());
        if self.is_ready && self.read32(regs::CSTS) & 0xf == 1 {
            self.everything_ends();
        }
        self.change_controllers();
        self.run();
        self.enable();
        let entry =
            SubmissionEntry { opcode: admin::IDENTIFY, cdw10: 1, prp1: 0, ..SubmissionEntry::default() };
        self.expect(entry, "the controller can be identified");
        let mut sanctuary = [0; SANCTUARY_BYTES];
        self.memory.read_slice(&mut sanctuary, GuestAddress(SANCTUARY_BASE)).expect("the sanctuary");
        assert!(sanctuary.iter().all(|byte| *byte == 0xa5), "memory was written that nobody pointed at");
    }

    /// Whatever was begun by the driver's own queues ends, but for requests for events, and a half that waits for its other half.
    fn everything_ends(&mut self) {
        // Each round takes what a full completion queue kept back.
        for _ in 0..8 {
            self.run();
            self.reap(0);
            self.reap(1);
        }
        for pair in self.pairs.iter().filter(|pair| pair.is_exact) {
            let last = pair.next_cid.wrapping_sub(1);
            let left: Vec<_> = pair
                .waiting
                .iter()
                .filter(|(cid, (opcode, fuse))| {
                    let is_event = pair.id == 0 && *opcode == admin::ASYNC_EVENT_REQUEST;
                    let is_half = pair.id == 1 && **cid == last && *fuse == 1;
                    !is_event && !is_half
                })
                .collect();
            assert!(left.is_empty(), "commands of queue {} never ended: {left:?}", pair.id);
        }
    }

    /// Writes the arena at random on another thread until `done`: the words and moments that no input can choose.
    pub(super) fn harass(memory: &GuestMemory, seed: u64, done: &AtomicBool) {
        let mut random = crate::mutate::Random::new(seed);
        while !done.load(Ordering::Relaxed) {
            let address = (random.number() % ARENA_BYTES) & !7;
            let value = match random.below(4) {
                0 => (random.number() % ARENA_BYTES) & !0xfff,
                1 => random.number() & 0xff,
                2 => (random.number() % 8) << 60 | random.number() & 0xffff,
                _ => u64::MAX,
            };
            let _outside = memory.write_slice(&value.to_le_bytes(), GuestAddress(address));
        }
    }
}

/// A controller as after power-on, with the events of its workers.
fn controller(
    shape: Shape,
    memory: &GuestMemory,
    namespaces: &BTreeMap<u32, NamespaceConfig>,
    keeper: &Arc<Keeper>,
    process: &Arc<Process>,
) -> (Controller, Vec<EventFd>) {
    let namespaces: Vec<_> = namespaces.values().cloned().collect();
    let subsystem =
        Subsystem::with_store("FUZZ", &namespaces, false, Arc::clone(keeper) as _, keeper.state());
    let (contexts, events) = (0..shape.workers())
        .map(|_| {
            let context = IoContext::new(memory.clone(), 8).expect("an I/O context");
            let event = context.event_fd().try_clone().expect("a second descriptor");
            (context, event)
        })
        .unzip();
    let controller = Controller::join(
        &subsystem.expect("a subsystem with what it has kept"),
        0,
        shape.config(),
        memory.clone(),
        contexts,
        Arc::clone(process) as _,
        Arc::clone(process) as _,
    );
    (controller.expect("a controller that can be had"), events)
}
