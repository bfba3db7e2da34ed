//! A guest that costs next to nothing: its submission queues hold reads from the start, so that it only moves tails and heads.
//! What the controller asks of the process around it is counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use block::{Backend, IoContext};
use bus::{GuestMemory, in_one_region};
use nvme::{Controller, ControllerConfig, Host, NamespaceConfig, Progress};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{SubmissionEntry, regs};
use pci::{MsiMessage, MsixSink, PciFunction};
use vm_memory::{Bytes, GuestAddress};

const MEMORY_BYTES: u64 = 64 << 20;
/// Entries of an I/O queue: more than any depth, so that a queue is never full.
const ENTRIES: u32 = 256;
const ADMIN_ENTRIES: u32 = 32;
/// Bytes of a read.
const READ_BYTES: u64 = 4096;
/// Of the shadow doorbells and, behind it, the event indexes.
const SHADOW: u64 = 0x10_0000;
/// Of the admin queues and all others, 64 KiB each.
const QUEUES: u64 = 0x20_0000;
/// Of the data.
const DATA: u64 = 0x100_0000;
/// Patience, in passes, for what takes none.
const PASSES: u32 = 1000;

/// What the controller asked for, and what its guest had to do.
#[derive(Debug, Default)]
pub struct Counts {
    /// Calls of a worker.
    pub wakes: AtomicU64,
    /// Doorbells that were made events, or no events any more.
    pub doorbell_events: AtomicU64,
    /// Interrupts.
    pub signals: AtomicU64,
    /// Doorbell registers that the guest wrote: each one is an exit.
    pub exits: AtomicU64,
}

impl Host for Counts {
    fn wake(&self, _worker: usize) {
        self.wakes.fetch_add(1, Ordering::Relaxed);
    }

    fn set_doorbell_event(&self, _bar_offset: u64, _worker: usize, _enabled: bool) {
        self.doorbell_events.fetch_add(1, Ordering::Relaxed);
    }

    fn show_region(&self, _ready: bool) {}

    fn flush_region(&self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MsixSink for Counts {
    fn set_vector(&self, _vector: u16, _message: Option<MsiMessage>) {}

    fn signal(&self, _vector: u16) {
        self.signals.fetch_add(1, Ordering::Relaxed);
    }
}

/// How the guest rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbells {
    /// A register write each.
    Mmio,
    /// In memory, with a register write where the controller asks for one.
    Shadow,
}

#[derive(Clone, Copy, Debug)]
struct Queue {
    id: u16,
    tail: u32,
    head: u32,
    phase: bool,
}

impl Queue {
    fn submissions(&self) -> u64 {
        QUEUES + u64::from(self.id) * 0x1_0000
    }

    fn completions(&self) -> u64 {
        self.submissions() + 0x8000
    }
}

/// The guest, with a controller of one worker.
pub struct Guest {
    /// What it drives.
    pub controller: Controller,
    /// What that cost.
    pub counts: Arc<Counts>,
    memory: GuestMemory,
    doorbells: Doorbells,
    admin: Queue,
    queues: Vec<Queue>,
}

impl Guest {
    /// A controller with one namespace on `image`, enabled, with `queues` queue pairs full of reads of 4 KiB.
    pub fn new(image: Arc<dyn Backend>, queues: u16, doorbells: Doorbells) -> Self {
        let memory =
            GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]).expect("guest memory");
        let blocks = image.identity().capacity_bytes / READ_BYTES;
        let namespace = NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend: image };
        let context = IoContext::new(memory.clone(), ENTRIES * u32::from(queues)).expect("an I/O context");
        let counts = Arc::new(Counts::default());
        let (sink, host) = (Arc::clone(&counts), Arc::clone(&counts));
        let config = ControllerConfig::new("BENCH");
        let controller =
            Controller::new(config, memory.clone(), &[namespace], vec![context], sink as _, host as _)
                .expect("a controller");
        let admin = Queue { id: 0, tail: 0, head: 0, phase: true };
        let mut guest = Self { controller, counts, memory, doorbells, admin, queues: Vec::new() };
        guest.enable();
        if doorbells == Doorbells::Shadow {
            let buffers = SubmissionEntry {
                prp1: SHADOW,
                prp2: SHADOW + 4096,
                ..admin_command(admin::DOORBELL_BUFFER_CONFIG)
            };
            guest.admin(buffers);
        }
        for id in 1..=queues {
            guest.create_queue(id, blocks);
        }
        guest.settle();
        guest
    }

    fn enable(&mut self) {
        // Memory space and bus master; interrupts by message, as every driver has them, although this one polls.
        self.controller.config_write(0x04, &6_u16.to_le_bytes());
        self.controller.config_write(self.msix_capability() + 2, &0x8000_u16.to_le_bytes());
        self.write_register(regs::AQA, (ADMIN_ENTRIES - 1) << 16 | (ADMIN_ENTRIES - 1));
        let (submissions, completions) = (self.admin.submissions(), self.admin.completions());
        self.controller.bar_write(0, regs::ASQ, &submissions.to_le_bytes());
        self.controller.bar_write(0, regs::ACQ, &completions.to_le_bytes());
        self.write_register(regs::CC, 0x0046_0001);
        self.settle();
    }

    fn msix_capability(&self) -> u16 {
        let byte = |offset| {
            let mut byte = [0];
            self.controller.config_read(offset, &mut byte);
            byte[0]
        };
        let mut offset = u16::from(byte(0x34));
        while byte(offset) != 0x11 {
            offset = byte(offset + 1).into();
            assert!(offset != 0, "MSI-X is in the list");
        }
        offset
    }

    fn create_queue(&mut self, id: u16, blocks: u64) {
        let queue = Queue { id, tail: 0, head: 0, phase: true };
        let size = (ENTRIES - 1) << 16 | u32::from(id);
        let completions = SubmissionEntry {
            prp1: queue.completions(),
            cdw10: size,
            cdw11: 1,
            ..admin_command(admin::CREATE_CQ)
        };
        self.admin(completions);
        let submissions = SubmissionEntry {
            prp1: queue.submissions(),
            cdw10: size,
            cdw11: u32::from(id) << 16 | 1,
            ..admin_command(admin::CREATE_SQ)
        };
        self.admin(submissions);
        for index in 0..ENTRIES {
            let number = u64::from(id - 1) * u64::from(ENTRIES) + u64::from(index);
            let mut entry = SubmissionEntry {
                opcode: nvm::READ,
                cid: index as u16,
                nsid: 1,
                prp1: DATA + number * READ_BYTES,
                cdw12: (READ_BYTES / 512) as u32 - 1,
                ..SubmissionEntry::default()
            };
            // Far apart: an odd multiplier visits every block before it comes back.
            entry.set_cdw10_64(number.wrapping_mul(0x9e37_79b1) % blocks * (READ_BYTES / 512));
            self.store(queue.submissions() + u64::from(index) * 64, &entry.to_bytes());
        }
        self.queues.push(queue);
    }

    /// An admin command, which succeeds.
    fn admin(&mut self, entry: SubmissionEntry) {
        self.store(self.admin.submissions() + u64::from(self.admin.tail) * 64, &entry.to_bytes());
        self.admin.tail = (self.admin.tail + 1) % ADMIN_ENTRIES;
        self.write_register(regs::sq_tail_doorbell(0), self.admin.tail);
        self.settle();
        let status = self.status(&self.admin);
        assert_eq!(status >> 1, 0, "{entry:?}");
        assert_eq!(status & 1 == 1, self.admin.phase, "{entry:?} does not end");
        self.admin.head = (self.admin.head + 1) % ADMIN_ENTRIES;
        self.admin.phase ^= self.admin.head == 0;
        self.write_register(regs::cq_head_doorbell(0), self.admin.head);
    }

    /// Lets the worker run until it would sleep.
    pub fn settle(&self) {
        for _ in 0..PASSES {
            if self.controller.process(0) == Progress::Idle {
                return;
            }
        }
        panic!("the worker finds no rest");
    }

    /// Rings for `depth` more reads on every queue.
    pub fn submit(&mut self, depth: u32) {
        for index in 0..self.queues.len() {
            let Queue { id, tail: old, .. } = self.queues[index];
            let new = (old + depth) % ENTRIES;
            self.queues[index].tail = new;
            self.ring(u64::from(id) * 8, old, new);
        }
    }

    /// Takes the completions of `depth` reads on every queue, if all are there; looks only at the last entry of each. Tells the
    /// controller.
    pub fn take(&mut self, depth: u32) -> bool {
        let complete = self.queues.iter().all(|queue| {
            let last = queue.head + depth - 1;
            let phase = queue.phase ^ (last >= ENTRIES);
            let status = self.status(&Queue { head: last % ENTRIES, ..*queue });
            assert_eq!(status >> 1, 0, "a read failed");
            status & 1 == u16::from(phase)
        });
        for index in 0..if complete { self.queues.len() } else { 0 } {
            let Queue { id, head: old, phase, .. } = self.queues[index];
            let new = (old + depth) % ENTRIES;
            self.queues[index].head = new;
            self.queues[index].phase = phase ^ (new < old);
            self.ring(u64::from(id) * 8 + 4, old, new);
        }
        complete
    }

    /// What `nvme_dbbuf_update_and_check_event` of Linux does.
    fn ring(&self, offset: u64, old: u32, new: u32) {
        if self.doorbells == Doorbells::Shadow {
            let word = |address| in_one_region(&self.memory, GuestAddress(address), 4).expect("its page");
            let _ = word(SHADOW + offset).store(new, 0, Ordering::Release);
            fence(Ordering::SeqCst);
            let event: u32 =
                word(SHADOW + 4096 + offset).load(0, Ordering::Acquire).expect("an aligned word");
            let (old, new, event) = (old as u16, new as u16, event as u16);
            if new.wrapping_sub(event).wrapping_sub(1) >= new.wrapping_sub(old) {
                return;
            }
        }
        self.counts.exits.fetch_add(1, Ordering::Relaxed);
        self.write_register(regs::DOORBELLS + offset, new);
    }

    /// Status and phase tag of the entry at the head of `queue`.
    fn status(&self, queue: &Queue) -> u16 {
        let address = GuestAddress(queue.completions() + u64::from(queue.head) * 16 + 14);
        let word = in_one_region(&self.memory, address, 2).expect("a queue in guest memory");
        word.load(0, Ordering::Acquire).expect("an aligned word")
    }

    fn store(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).expect("an address in guest memory");
    }

    fn write_register(&self, offset: u64, value: u32) {
        self.controller.bar_write(0, offset, &value.to_le_bytes());
    }
}

fn admin_command(opcode: u8) -> SubmissionEntry {
    SubmissionEntry { opcode, ..SubmissionEntry::default() }
}
