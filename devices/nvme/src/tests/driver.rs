//! The guest's side: a driver in memory that rings doorbells and reads completion entries, as real ones do. A worker runs
//! only when it was woken or its I/O context's event is readable, so that a lost wake-up shows as a hanging command.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use block::{Backend, IoContext, MemoryImage};
use bus::{GuestMapping, GuestMemory, InterruptLine};
use nvme_spec::opcode::admin;
use nvme_spec::regs;
use nvme_spec::{CompletionEntry, Status, SubmissionEntry};
use pci::{MsiMessage, MsixSink, PciFunction};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;
use vmstate::VmState;

use crate::{Controller, ControllerConfig, Host, NamespaceConfig, NvmeState, Progress, Subsystem};

/// Guest memory of a test.
pub const MEMORY_BYTES: usize = 16 << 20;
/// A watchdog, far above what any test needs.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What another thread does at a certain moment.
pub type Interlude = Box<dyn FnOnce() + Send>;

/// The process around the controller.
#[derive(Default)]
pub struct Process {
    woken: AtomicU64,
    /// BAR offsets whose writes only wake a worker.
    pub doorbell_events: Mutex<BTreeMap<u64, usize>>,
    /// What happens, once, in the midst of the next call that wakes this worker.
    pub at_wake: Mutex<Option<(usize, Interlude)>>,
    /// Of the persistent memory region.
    pub region_is_shown: AtomicBool,
    pub region_flushes: AtomicU64,
    pub region_fails: AtomicBool,
}

impl Host for Process {
    fn wake(&self, worker: usize) {
        self.woken.fetch_or(1 << worker, Ordering::SeqCst);
        let interlude = self.at_wake.lock().unwrap().take_if(|(at, _)| *at == worker);
        if let Some((_, happens)) = interlude {
            std::thread::spawn(happens).join().unwrap();
        }
    }

    fn set_doorbell_event(&self, bar_offset: u64, worker: usize, enabled: bool) {
        let mut events = self.doorbell_events.lock().unwrap();
        if enabled {
            events.insert(bar_offset, worker);
        } else {
            events.remove(&bar_offset);
        }
    }

    fn show_region(&self, ready: bool) {
        assert_ne!(self.region_is_shown.swap(ready, Ordering::SeqCst), ready, "told of changes only");
    }

    fn flush_region(&self) -> std::io::Result<()> {
        self.region_flushes.fetch_add(1, Ordering::SeqCst);
        match self.region_fails.load(Ordering::SeqCst) {
            true => Err(std::io::Error::other("no memory is for ever")),
            false => Ok(()),
        }
    }
}

impl Process {
    fn take_woken(&self, worker: usize) -> bool {
        self.woken.fetch_and(!(1 << worker), Ordering::SeqCst) & 1 << worker != 0
    }
}

/// Counts interrupts by vector.
#[derive(Default)]
pub struct Interrupts {
    pub signals: Mutex<BTreeMap<u16, u32>>,
}

impl MsixSink for Interrupts {
    fn set_vector(&self, _vector: u16, _message: Option<MsiMessage>) {}
    fn signal(&self, vector: u16) {
        *self.signals.lock().unwrap().entry(vector).or_default() += 1;
    }
}

impl Interrupts {
    pub fn take(&self, vector: u16) -> u32 {
        self.signals.lock().unwrap().remove(&vector).unwrap_or(0)
    }
}

/// The interrupt pin's line.
#[derive(Default)]
pub struct Line {
    high: AtomicBool,
    /// How often it was driven.
    pub driven: AtomicU64,
}

impl InterruptLine for Line {
    fn set_level(&self, high: bool) {
        self.high.store(high, Ordering::SeqCst);
        self.driven.fetch_add(1, Ordering::SeqCst);
    }
}

impl Line {
    pub fn is_high(&self) -> bool {
        self.high.load(Ordering::SeqCst)
    }
}

/// What a driver knows of a queue pair.
#[derive(Clone, Debug)]
pub struct Pair {
    pub cq_id: u16,
    pub sq_base: u64,
    pub cq_base: u64,
    pub entries: u32,
    pub tail: u32,
    pub head: u32,
    pub phase: bool,
    pub next_cid: u16,
}

/// A machine with one controller and its driver.
pub struct Guest {
    pub memory: GuestMemory,
    pub controller: Arc<Controller>,
    pub process: Arc<Process>,
    pub interrupts: Arc<Interrupts>,
    pub line: Arc<Line>,
    pub config: ControllerConfig,
    pub namespaces: Vec<NamespaceConfig>,
    pub events: Vec<EventFd>,
    pub queues: BTreeMap<u16, Pair>,
    /// Shadow doorbells and event indexes.
    pub shadow: Option<(u64, u64)>,
    /// Where the controller memory buffer is, by CMBMSC.
    pub buffer: Option<u64>,
    /// Where the persistent memory region is, by PMRMSCU and PMRMSCL.
    pub region: Option<u64>,
    next_page: u64,
}

/// A memory image of `bytes`.
pub fn memory_image(bytes: usize) -> Arc<dyn Backend> {
    Arc::new(MemoryImage::new(Arc::new(GuestMapping::new(bytes).unwrap())))
}

/// A namespace in memory with blocks of 512 bytes.
pub fn namespace(nsid: u32, blocks: usize) -> NamespaceConfig {
    NamespaceConfig { nsid, block_bytes: 512, metadata: None, backend: memory_image(blocks * 512) }
}

pub fn guest_memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap()
}

/// I/O contexts, and their events for the loop.
pub fn contexts(memory: &GuestMemory, workers: usize, depth: u32) -> (Vec<IoContext>, Vec<EventFd>) {
    (0..workers)
        .map(|_| {
            let context = IoContext::new(memory.clone(), depth).unwrap();
            let event = context.event_fd().try_clone().unwrap();
            (context, event)
        })
        .unzip()
}

impl Guest {
    /// A controller after power-on, two workers.
    pub fn power_on(config: ControllerConfig, namespaces: Vec<NamespaceConfig>) -> Self {
        Self::with_workers(config, namespaces, 2, 64)
    }

    pub fn with_workers(
        config: ControllerConfig,
        namespaces: Vec<NamespaceConfig>,
        workers: usize,
        depth: u32,
    ) -> Self {
        let mut memory = guest_memory();
        if config.buffer_bytes > 0 {
            let buffer = Arc::new(GuestMapping::new(config.buffer_bytes as usize).unwrap());
            memory = crate::memory_with_buffer(&memory, buffer).unwrap();
        }
        if config.region_bytes > 0 {
            let region = Arc::new(GuestMapping::new(config.region_bytes as usize).unwrap());
            memory = crate::memory_with_region(&memory, region).unwrap();
        }
        let (contexts, events) = contexts(&memory, workers, depth);
        let (process, interrupts) = (Arc::new(Process::default()), Arc::new(Interrupts::default()));
        let controller = Controller::new(
            config.clone(),
            memory.clone(),
            &namespaces,
            contexts,
            interrupts.clone(),
            process.clone(),
        )
        .unwrap();
        let line = Arc::new(Line::default());
        controller.connect_pin(line.clone());
        Self {
            memory,
            controller: Arc::new(controller),
            process,
            interrupts,
            line,
            config,
            namespaces,
            events,
            queues: BTreeMap::new(),
            shadow: None,
            buffer: None,
            region: None,
            next_page: 0x10_0000,
        }
    }

    /// Controller `id` of a subsystem, after power-on, with two workers and memory of its own.
    pub fn member(subsystem: &Arc<Subsystem>, id: u16, config: ControllerConfig) -> Self {
        Self::joined(subsystem, id, config, guest_memory())
    }

    /// The same over `memory`, which has what `config` says.
    pub fn member_with(
        subsystem: &Arc<Subsystem>,
        id: u16,
        config: ControllerConfig,
        memory: GuestMemory,
    ) -> Self {
        Self::joined(subsystem, id, config, memory)
    }

    /// Goes on in `successor`, which has nothing but a controller yet, with what the driver knows.
    pub fn move_to(&mut self, successor: Self) {
        self.process = successor.process;
        self.interrupts = successor.interrupts;
        self.events = successor.events;
        self.controller = successor.controller;
    }

    /// Controller `id` of another subsystem over the memory of this guest.
    pub fn successor(&self, subsystem: &Arc<Subsystem>, id: u16) -> Self {
        Self::joined(subsystem, id, self.config.clone(), self.memory.clone())
    }

    fn joined(subsystem: &Arc<Subsystem>, id: u16, config: ControllerConfig, memory: GuestMemory) -> Self {
        let (contexts, events) = contexts(&memory, 2, 64);
        let (process, interrupts) = (Arc::new(Process::default()), Arc::new(Interrupts::default()));
        let controller = Controller::join(
            subsystem,
            id,
            config.clone(),
            memory.clone(),
            contexts,
            interrupts.clone(),
            process.clone(),
        )
        .unwrap();
        let guest = Self::around(config, Vec::new(), memory, Arc::new(controller));
        Self { process, interrupts, events, ..guest }
    }

    /// A driver of a controller that others run.
    pub fn around(
        config: ControllerConfig,
        namespaces: Vec<NamespaceConfig>,
        memory: GuestMemory,
        controller: Arc<Controller>,
    ) -> Self {
        Self {
            memory,
            controller,
            process: Arc::default(),
            interrupts: Arc::default(),
            line: Arc::default(),
            config,
            namespaces,
            events: Vec::new(),
            queues: BTreeMap::new(),
            shadow: None,
            buffer: None,
            region: None,
            next_page: 0x10_0000,
        }
    }

    /// A controller that the driver has enabled, with MSI-X on.
    pub fn ready(config: ControllerConfig, namespaces: Vec<NamespaceConfig>) -> Self {
        let mut guest = Self::power_on(config, namespaces);
        guest.enable();
        guest
    }

    /// `count` fresh pages; their contents are what they are.
    pub fn pages(&mut self, count: u64) -> u64 {
        let base = self.next_page;
        self.next_page += count * 4096;
        assert!(self.next_page <= MEMORY_BYTES as u64, "the test uses too much memory");
        base
    }

    pub fn read32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.controller.bar_read(0, offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn read64(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.controller.bar_read(0, offset, &mut data);
        u64::from_le_bytes(data)
    }

    pub fn write32(&self, offset: u64, value: u32) {
        self.controller.bar_write(0, offset, &value.to_le_bytes());
    }

    pub fn write64(&self, offset: u64, value: u64) {
        self.controller.bar_write(0, offset, &value.to_le_bytes());
    }

    /// Lets the workers run that have a reason to. Ends when none has.
    pub fn run(&self) {
        loop {
            let mut ran = false;
            for (worker, event) in self.events.iter().enumerate() {
                let woken = self.process.take_woken(worker);
                if event.read().is_ok() || woken {
                    ran = true;
                    while self.controller.process(worker) == Progress::More {}
                }
            }
            if !ran {
                return;
            }
        }
    }

    /// Runs until `done`, for backends that take their time.
    pub fn run_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        loop {
            self.run();
            if done(self) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "never happened: {what}");
            std::thread::yield_now();
        }
    }

    /// The command register: memory decoding, and whether the controller is a bus master.
    pub fn set_bus_master(&self, on: bool) {
        self.controller.config_write(0x04, &(0b010 | u16::from(on) << 2).to_le_bytes());
    }

    /// The power state: 0 for D0, 3 for D3hot.
    pub fn set_power_state(&self, state: u8) {
        self.controller.config_write(0x64, &[state]);
    }

    /// Switches MSI-X on or off.
    pub fn set_msix(&self, on: bool) {
        self.controller.config_write(self.msix_capability() + 2, &(u16::from(on) << 15).to_le_bytes());
    }

    /// Makes the controller a bus master, switches MSI-X on and unmasks all vectors.
    pub fn unmask_interrupts(&self) {
        self.set_bus_master(true);
        let offset = self.msix_capability();
        let mut table = [0; 4];
        self.controller.config_read(offset + 4, &mut table);
        let table = u64::from(u32::from_le_bytes(table));
        for vector in 0..u64::from(self.config.vectors) {
            self.write64(table + vector * 16, 0xfee0_0000);
            self.write64(table + vector * 16 + 8, 0x20 + vector);
        }
        self.set_msix(true);
    }

    fn msix_capability(&self) -> u16 {
        let mut pointer = [0];
        self.controller.config_read(0x34, &mut pointer);
        loop {
            let mut header = [0; 2];
            self.controller.config_read(u16::from(pointer[0]), &mut header);
            if header[0] == 0x11 {
                break;
            }
            pointer[0] = header[1];
        }
        u16::from(pointer[0])
    }

    /// The initialisation of Base 3.5.1 with admin queues of 32 entries.
    pub fn enable(&mut self) {
        self.start_enable();
        self.run();
        assert_eq!(self.read32(regs::CSTS), 1, "CSTS.RDY and nothing else");
    }

    /// Sets CC.EN and does not wait.
    pub fn start_enable(&mut self) {
        self.unmask_interrupts();
        let (sq_base, cq_base) = (self.pages(1), self.pages(1));
        self.clear(cq_base, 4096);
        self.write32(regs::AQA, 31 << 16 | 31);
        self.write64(regs::ASQ, sq_base);
        self.write64(regs::ACQ, cq_base);
        self.write32(regs::CC, 0x0046_0001);
        let pair =
            Pair { cq_id: 0, sq_base, cq_base, entries: 32, tail: 0, head: 0, phase: true, next_cid: 0 };
        self.queues.clear();
        self.queues.insert(0, pair);
    }

    pub fn clear(&self, address: u64, bytes: usize) {
        self.write_bytes(address, &vec![0; bytes]);
    }

    /// Reads memory, that of the controller through its BAR.
    pub fn read_bytes(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        match self.in_controller(address) {
            Some((bar, offset)) => {
                for (position, bytes) in (0..).zip(data.chunks_mut(8)) {
                    self.controller.bar_read(bar, offset + position * 8, bytes);
                }
            }
            None => self.memory.read_slice(&mut data, GuestAddress(address)).unwrap(),
        }
        data
    }

    /// Writes memory, that of the controller through its BAR.
    pub fn write_bytes(&self, address: u64, data: &[u8]) {
        match self.in_controller(address) {
            Some((bar, offset)) => {
                for (position, bytes) in (0..).zip(data.chunks(8)) {
                    self.controller.bar_write(bar, offset + position * 8, bytes);
                }
            }
            None => self.memory.write_slice(data, GuestAddress(address)).unwrap(),
        }
    }

    /// The BAR that shows what commands name by `address`, and where in it.
    fn in_controller(&self, address: u64) -> Option<(u8, u64)> {
        let at = |bar, base: Option<u64>, length_bytes| {
            let offset = address.checked_sub(base?)?;
            (offset < length_bytes).then_some((bar, offset))
        };
        let buffer = at(2, self.buffer, self.config.buffer_bytes);
        buffer.or_else(|| at(4, self.region, self.config.region_bytes))
    }

    /// Puts an entry into submission queue `queue` and gives it a CID; does not ring.
    pub fn push(&mut self, queue: u16, mut entry: SubmissionEntry) -> u16 {
        let pair = self.queues.get_mut(&queue).unwrap();
        entry.cid = pair.next_cid;
        pair.next_cid = pair.next_cid.wrapping_add(1);
        let address = pair.sq_base + u64::from(pair.tail) * 64;
        pair.tail = (pair.tail + 1) % pair.entries;
        self.write_bytes(address, &entry.to_bytes());
        entry.cid
    }

    /// Tells the controller the tail of `queue`, by shadow doorbell where there is one.
    pub fn ring(&mut self, queue: u16) {
        let tail = self.queues[&queue].tail;
        self.set_doorbell(regs::sq_tail_doorbell(queue), tail);
    }

    /// What `nvme_dbbuf_update_and_check_event` of Linux does.
    pub fn set_doorbell(&mut self, offset: u64, value: u32) {
        let slot = offset - regs::DOORBELLS;
        if let Some((shadow, event_index)) = self.shadow
            && (8..4096).contains(&slot)
        {
            let address = GuestAddress(shadow + slot);
            let old: u32 = self.memory.load(address, Ordering::SeqCst).unwrap();
            self.memory.store(value, address, Ordering::SeqCst).unwrap();
            fence(Ordering::SeqCst);
            let event: u32 = self.memory.load(GuestAddress(event_index + slot), Ordering::SeqCst).unwrap();
            let (new, old, event) = (value as u16, old as u16, event as u16);
            if new.wrapping_sub(event).wrapping_sub(1) >= new.wrapping_sub(old) {
                return;
            }
        }
        let worker = self.process.doorbell_events.lock().unwrap().get(&offset).copied();
        match worker {
            Some(worker) => self.process.wake(worker),
            None => self.write32(offset, value),
        }
    }

    /// Takes the completion entries that are there, and tells the controller.
    pub fn reap(&mut self, queue: u16) -> Vec<CompletionEntry> {
        let entries = self.reap_silently(queue);
        if !entries.is_empty() {
            self.set_doorbell(regs::cq_head_doorbell(queue), self.queues[&queue].head);
        }
        entries
    }

    /// Takes the completion entries that are there without writing the head doorbell.
    pub fn reap_silently(&mut self, queue: u16) -> Vec<CompletionEntry> {
        let mut entries = Vec::new();
        loop {
            let pair = &self.queues[&queue];
            let bytes = self.read_bytes(pair.cq_base + u64::from(pair.head) * 16, 16);
            let entry = CompletionEntry::from_bytes(&bytes.try_into().unwrap());
            if entry.phase() != pair.phase {
                return entries;
            }
            entries.push(entry);
            let pair = self.queues.get_mut(&queue).unwrap();
            pair.head = (pair.head + 1) % pair.entries;
            pair.phase ^= pair.head == 0;
        }
    }

    /// Submits one command and waits for its completion, which must be the only one.
    pub fn submit(&mut self, queue: u16, entry: SubmissionEntry) -> CompletionEntry {
        let cid = self.push(queue, entry);
        self.ring(queue);
        let cq = self.queues[&queue].cq_id;
        let mut entries = Vec::new();
        self.run_until("a completion", |guest| {
            entries.extend(guest.reap(cq));
            !entries.is_empty()
        });
        assert_eq!(entries.len(), 1, "{entries:?}");
        assert_eq!((entries[0].cid, entries[0].sq_id), (cid, queue));
        assert_eq!(u32::from(entries[0].sq_head), self.queues[&queue].tail);
        entries[0]
    }

    /// An admin command; the result of success.
    pub fn admin(&mut self, entry: SubmissionEntry) -> Result<u32, Status> {
        let completion = self.submit(0, entry);
        if completion.status().is_success() { Ok(completion.dw0) } else { Err(completion.status().code()) }
    }

    /// An I/O command on `queue`.
    pub fn io(&mut self, queue: u16, entry: SubmissionEntry) -> Result<(), Status> {
        let completion = self.submit(queue, entry);
        if completion.status().is_success() { Ok(()) } else { Err(completion.status().code()) }
    }

    /// An admin command that returns `N` bytes.
    pub fn admin_data<const N: usize>(&mut self, entry: SubmissionEntry) -> Result<[u8; N], Status> {
        let page = self.pages(N.div_ceil(4096) as u64);
        assert!(N <= 8192, "two PRPs describe no more");
        self.admin(SubmissionEntry { prp1: page, prp2: page + 4096, ..entry })?;
        Ok(self.read_bytes(page, N).try_into().unwrap())
    }

    pub fn identify(&mut self, cns: u8, nsid: u32) -> Result<[u8; 4096], Status> {
        self.admin_data(SubmissionEntry {
            opcode: admin::IDENTIFY,
            nsid,
            cdw10: u32::from(cns),
            ..SubmissionEntry::default()
        })
    }

    pub fn create_cq(&mut self, id: u16, entries: u32, base: u64, vector: u16) -> Result<u32, Status> {
        self.clear(base, entries as usize * 16);
        self.admin(SubmissionEntry {
            opcode: admin::CREATE_CQ,
            prp1: base,
            cdw10: u32::from(id) | (entries - 1) << 16,
            cdw11: u32::from(vector) << 16 | 3,
            ..SubmissionEntry::default()
        })
    }

    pub fn create_sq(&mut self, id: u16, entries: u32, base: u64, cq: u16) -> Result<u32, Status> {
        self.admin(SubmissionEntry {
            opcode: admin::CREATE_SQ,
            prp1: base,
            cdw10: u32::from(id) | (entries - 1) << 16,
            cdw11: u32::from(cq) << 16 | 1,
            ..SubmissionEntry::default()
        })
    }

    /// A queue pair `id` of `entries` entries with vector `id`.
    pub fn create_pair(&mut self, id: u16, entries: u32) {
        let sq_base = self.pages((u64::from(entries) * 64).div_ceil(4096));
        let cq_base = self.pages((u64::from(entries) * 16).div_ceil(4096));
        self.create_cq(id, entries, cq_base, id).unwrap();
        self.create_sq(id, entries, sq_base, id).unwrap();
        let pair = Pair { cq_id: id, sq_base, cq_base, entries, tail: 0, head: 0, phase: true, next_cid: 0 };
        self.queues.insert(id, pair);
    }

    /// Switches shadow doorbells on.
    pub fn use_shadow_doorbells(&mut self) {
        let (shadow, event_index) = (self.pages(1), self.pages(1));
        self.clear(shadow, 8192);
        self.admin(SubmissionEntry {
            opcode: admin::DOORBELL_BUFFER_CONFIG,
            prp1: shadow,
            prp2: event_index,
            ..SubmissionEntry::default()
        })
        .unwrap();
        self.shadow = Some((shadow, event_index));
    }

    /// Another controller of this configuration that has loaded `state`, if it could.
    pub fn loaded_elsewhere(&self, state: &NvmeState) -> Result<Controller, crate::Error> {
        let other = Self::power_on(self.config.clone(), self.namespaces.clone());
        let controller = Arc::into_inner(other.controller).unwrap();
        controller.load(state).map(|()| controller)
    }

    /// Pauses, saves, sends the bytes, and goes on in another controller with `workers` workers over the same memory
    /// and images. The old controller is returned, paused.
    pub fn migrate(&mut self, workers: usize) -> Arc<Controller> {
        self.controller.pause(Instant::now() + PATIENCE).unwrap();
        let state = self.controller.save();
        let bytes = vmstate::to_bytes(&state);
        let loaded = vmstate::from_bytes::<NvmeState>(&bytes, NvmeState::VERSION).unwrap();
        assert_eq!(loaded, state);
        let (contexts, events) = contexts(&self.memory, workers, 64);
        let (process, interrupts) = (Arc::new(Process::default()), Arc::new(Interrupts::default()));
        let before = self.read_bytes(0, MEMORY_BYTES);
        let restored = Controller::restore(
            &loaded,
            self.config.clone(),
            self.memory.clone(),
            &self.namespaces,
            contexts,
            interrupts.clone(),
            process.clone(),
        )
        .unwrap();
        assert_eq!(restored.inventory().differences(&self.controller.inventory()), Vec::<String>::new());
        assert!(restored.save() == state, "what was restored saves the same");
        assert!(self.read_bytes(0, MEMORY_BYTES) == before, "restoring does not touch guest memory");
        let line = Arc::new(Line::default());
        restored.connect_pin(line.clone());
        restored.resume();
        self.process = process;
        self.interrupts = interrupts;
        self.line = line;
        self.events = events;
        std::mem::replace(&mut self.controller, Arc::new(restored))
    }

    /// The offsets of doorbells that only wake.
    pub fn doorbell_events(&self) -> BTreeSet<u64> {
        self.process.doorbell_events.lock().unwrap().keys().copied().collect()
    }
}

/// A read or write of `blocks` blocks at one page.
pub fn transfer(opcode: u8, nsid: u32, lba: u64, blocks: u32, address: u64) -> SubmissionEntry {
    let mut entry = SubmissionEntry {
        opcode,
        nsid,
        prp1: address,
        prp2: (address & !0xfff) + 4096,
        cdw12: blocks - 1,
        ..SubmissionEntry::default()
    };
    entry.set_cdw10_64(lba);
    entry
}
