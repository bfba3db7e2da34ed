//! A controller with its images, its threads and its doorbells.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::Context;
use block::{IoContext, KernelCounters};
use bus::GuestMemory;
use engine::Description;
use nvme::{AllocatedState, Controller, ControllerConfig, Host, NvmeState, Progress, Statistics, Store};
use pci::{BarWindow, PciFunction};
use vmm_sys_util::eventfd::EventFd;

use crate::config::ControllerSpec;
use crate::control::{AccessState, FerryAccess, FerryDisk, FerryMember};
use crate::io_poll::{IoPoll, PollCounters, PollStatistics, Poller, TurnEnd};
use crate::io_thread::{IoThread, WakeUp, WakeUpStatistics, Worker};
use crate::kvm::{MsiRouter, MsixFunction, Vm};
use crate::memory::RamBlock;
use crate::subsystem::{Directory, Region};

use super::buffer::{BUFFER_BAR, Buffer, REGION_BAR};

use super::resources::Nvm;

/// Requests that each worker may have at the disk at once.
const REQUESTS_PER_WORKER: u32 = 256;

/// A controller of the machine.
pub struct Disk {
    config: ControllerConfig,
    controller_id: u16,
    directory: Option<Arc<Directory>>,
    completions: Vec<EventFd>,
    interrupts: Arc<MsixFunction>,
    doorbells: Arc<Doorbells>,
    buffer: Option<Arc<Buffer>>,
    controller: Arc<Controller>,
    /// Of each worker.
    polls: Vec<Arc<PollCounters>>,
    kernel: Vec<Arc<KernelCounters>>,
}

impl Disk {
    /// Builds the controller as a reset leaves it, with everything that takes time: io_urings, irqfds.
    ///
    /// # Errors
    /// The configuration does not make a controller; the process lacks descriptors, or KVM interrupt routes.
    pub fn new(
        spec: &ControllerSpec,
        nvm: &Nvm,
        (buffer, region): (Option<&RamBlock>, Option<&Arc<Region>>),
        workers: u8,
        memory: &GuestMemory,
        vm: &Arc<Vm>,
        router: &Arc<MsiRouter>,
    ) -> anyhow::Result<Self> {
        let serial = &spec.serial;
        let config = ControllerConfig {
            queue_pairs: spec.queue_pairs,
            vectors: spec.vectors,
            mdts: spec.mdts,
            contiguous_queues: spec.contiguous_queues,
            buffer_bytes: spec.buffer_bytes,
            region_bytes: spec.region_bytes,
            ..ControllerConfig::new(serial)
        };
        let mut memory = memory.clone();
        if let Some(block) = buffer {
            memory = nvme::memory_with_buffer(&memory, Arc::clone(&block.mapping))?;
        }
        if let Some(region) = region {
            memory = nvme::memory_with_region(&memory, Arc::clone(&region.block().mapping))?;
        }
        let buffer =
            buffer.map(|block| Arc::new(Buffer::new(Arc::clone(vm), block.clone(), BUFFER_BAR, true)));
        let region = region.map(|region| {
            let place = Buffer::new(Arc::clone(vm), region.block().clone(), REGION_BAR, false);
            (place, Arc::clone(region))
        });
        let contexts = (0..workers)
            .map(|_| IoContext::new(memory.clone(), REQUESTS_PER_WORKER))
            .collect::<Result<Vec<_>, _>>()
            .with_context(|| format!("cannot make the I/O queues of controller {serial}"))?;
        let completions =
            contexts.iter().map(|context| context.event_fd().try_clone()).collect::<io::Result<Vec<_>>>()?;
        let kernel = contexts.iter().map(|context| Arc::clone(context.kernel_counters())).collect();
        let interrupts = MsixFunction::new(router, spec.vectors)?;
        let doorbells = Doorbells::new(Arc::clone(vm), workers, region)?;
        let controller = Controller::join(
            &nvm.subsystem,
            nvm.controller_id,
            config.clone(),
            memory,
            contexts,
            Arc::clone(&interrupts) as _,
            Arc::clone(&doorbells) as _,
        )?;
        let controller = Arc::new(controller);
        let polls = (0..workers).map(|_| Arc::default()).collect();
        let (controller_id, directory) = (nvm.controller_id, nvm.directory.clone());
        Ok(Self {
            config,
            controller_id,
            directory,
            completions,
            interrupts,
            doorbells,
            buffer,
            controller,
            polls,
            kernel,
        })
    }

    /// The controller's serial number.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.config.serial
    }

    /// Takes over a saved state. The controller is as it was built, and paused afterwards.
    ///
    /// # Errors
    /// The state is not one of this controller, which is of no use then.
    pub fn load(&self, state: &NvmeState) -> Result<(), nvme::Error> {
        self.controller.load(state)?;
        self.bus_function().place();
        Ok(())
    }

    /// The controller.
    #[must_use]
    pub fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    /// The controller as the PCI bus sees it.
    #[must_use]
    pub fn function(&self) -> Arc<dyn PciFunction> {
        Arc::new(self.bus_function())
    }

    fn bus_function(&self) -> Function {
        Function {
            controller: Arc::clone(&self.controller),
            doorbells: Arc::clone(&self.doorbells),
            buffer: self.buffer.clone(),
        }
    }

    /// Gives worker `n` to thread `n`; there are as many threads as workers. Each looks for work for up to `poll` before it sleeps.
    ///
    /// # Errors
    /// A thread has ended, or the process lacks descriptors.
    pub fn serve(&self, threads: &[IoThread], poll: IoPoll) -> io::Result<()> {
        let parts = threads.iter().zip(&self.doorbells.wake_ups).zip(&self.completions).zip(&self.polls);
        for (worker, (((thread, wake_up), completion), counters)) in parts.enumerate() {
            let share = Share {
                controller: Arc::clone(&self.controller),
                worker,
                completion: completion.try_clone()?,
                wake_up: wake_up.clone(),
                poller: Poller::new(poll, Arc::clone(counters)),
            };
            thread.add(Box::new(share), wake_up.clone())?;
        }
        Ok(())
    }

    /// What was done, by the controller and by its threads together.
    #[must_use]
    pub fn counters(&self) -> FerryDisk {
        let Statistics { completed, in_flight, doorbell_writes } = self.controller.statistics();
        let mut counters = FerryDisk {
            serial: self.config.serial.clone(),
            member: self.membership(),
            completed,
            in_flight,
            doorbell_exits: doorbell_writes,
            interrupts: self.interrupts.sent(),
            io_uring_enters: self.kernel.iter().map(|counters| counters.enters()).sum(),
            io_uring_entries: self.kernel.iter().map(|counters| counters.entries()).sum(),
            ..FerryDisk::default()
        };
        for PollStatistics { turns, polls, hits } in self.polls.iter().map(|counters| counters.read()) {
            counters.turns += turns;
            counters.polls += polls;
            counters.poll_hits += hits;
        }
        for WakeUpStatistics { written, rung } in self.doorbells.wake_ups.iter().map(WakeUp::statistics) {
            counters.wake_ups += written;
            counters.doorbell_events += rung;
        }
        counters
    }

    /// What it is among the controllers of its subsystem, if there can be several.
    fn membership(&self) -> Option<FerryMember> {
        let subsystem = self.controller.subsystem();
        let changed = |(group, state)| match state {
            nvme::AccessState::Optimized => None,
            state => Some(FerryAccess { group, state: told(state) }),
        };
        subsystem.is_shared().then(|| FerryMember {
            subsystem: subsystem.serial().to_owned(),
            controller_id: self.controller_id,
            access: (1..).zip(subsystem.access(self.controller_id)).filter_map(changed).collect(),
        })
    }

    /// Sets how it gives access to an ANA group.
    ///
    /// # Errors
    /// It is alone in its subsystem.
    pub fn set_access(&self, group: u32, state: AccessState) -> Result<(), nvme::Error> {
        let state = match state {
            AccessState::Optimized => nvme::AccessState::Optimized,
            AccessState::NonOptimized => nvme::AccessState::NonOptimized,
            AccessState::Inaccessible => nvme::AccessState::Inaccessible,
            AccessState::PersistentLoss => nvme::AccessState::PersistentLoss,
            AccessState::Change => nvme::AccessState::Change,
        };
        self.controller.subsystem().set_access(self.controller_id, group, state)
    }

    /// Identifier of the controller in its subsystem.
    #[must_use]
    pub fn controller_id(&self) -> u16 {
        self.controller_id
    }

    /// What a destination must have too, in this PCI slot.
    pub fn describe(&self, slot: u8, description: &mut Description) {
        let ControllerConfig { serial, queue_pairs, vectors, mdts, contiguous_queues, .. } = &self.config;
        let controller = format!("nvme.{serial}");
        description.set(format!("{controller}.slot"), slot);
        description.set(format!("{controller}.queues"), queue_pairs);
        description.set(format!("{controller}.msix"), vectors);
        description.set(format!("{controller}.mdts"), mdts);
        if *contiguous_queues {
            description.set(format!("{controller}.cqr"), true);
        }
        for (name, length_bytes) in
            [("cmb_bytes", self.config.buffer_bytes), ("pmr_bytes", self.config.region_bytes)]
        {
            if length_bytes > 0 {
                description.set(format!("{controller}.{name}"), length_bytes);
            }
        }
        let subsystem = self.controller.subsystem();
        if subsystem.is_shared() {
            description.set(format!("{controller}.subsystem_of"), subsystem.serial());
            description.set(format!("{controller}.controller_id"), self.controller_id);
        }
        // What the subsystem has is said with its first controller.
        if self.controller_id > 0 {
            return;
        }
        if let Some(directory) = &self.directory {
            description.set(format!("{controller}.subsystem"), engine::lease::show_id(&directory.id()));
            description.set(format!("{controller}.subsystem.capacity_bytes"), directory.capacity_bytes());
        }
        for AllocatedState { shape, created, .. } in subsystem.allocations().namespaces {
            let block_bytes = 1u64 << shape.block_shift;
            let namespace = format!("{controller}.ns.{}", shape.nsid);
            description
                .set(format!("{namespace}.backend"), String::from_utf8_lossy(&shape.backend).trim_end());
            let capacity_bytes = match &shape.metadata {
                None => shape.blocks * block_bytes,
                Some(metadata) => metadata.image_bytes,
            };
            description.set(format!("{namespace}.capacity_bytes"), capacity_bytes);
            description.set(format!("{namespace}.lba"), block_bytes);
            if let Some(metadata) = &shape.metadata {
                description.set(format!("{namespace}.metadata"), metadata.bytes);
                description.set(format!("{namespace}.extended"), metadata.extended);
                description.set(format!("{namespace}.pi"), metadata.protection_type);
                description.set(format!("{namespace}.pi-first"), metadata.protection_first);
            }
            description.set(format!("{namespace}.ro"), shape.read_only);
            if created {
                description.set(format!("{namespace}.created"), engine::lease::show_id(&shape.uuid));
            }
            // NGUID and EUI64 are made of it.
            description.set(format!("identity.{namespace}.uuid"), engine::lease::show_id(&shape.uuid));
        }
        for (nsid, image) in subsystem.images() {
            if let Some(place) = image.place() {
                description.set(format!("identity.{controller}.ns.{nsid}.image"), place);
            }
        }
    }

    /// Where the controller keeps what outlives its power.
    #[must_use]
    pub fn directory(&self) -> Option<&Arc<Directory>> {
        self.directory.as_ref()
    }

    /// Makes sure that every interrupt that was raised is in a local APIC. The controller is paused.
    ///
    /// # Errors
    /// KVM refused a message.
    pub fn flush_interrupts(&self) -> Result<(), crate::kvm::Error> {
        self.interrupts.flush()
    }
}

/// In the words of the control socket.
fn told(state: nvme::AccessState) -> AccessState {
    match state {
        nvme::AccessState::Optimized => AccessState::Optimized,
        nvme::AccessState::NonOptimized => AccessState::NonOptimized,
        nvme::AccessState::Inaccessible => AccessState::Inaccessible,
        nvme::AccessState::PersistentLoss => AccessState::PersistentLoss,
        nvme::AccessState::Change => AccessState::Change,
    }
}

/// Calls workers, and lets KVM call them: doorbells that need no value become ioeventfds. Shows the guest the persistent
/// memory region.
struct Doorbells {
    vm: Arc<Vm>,
    region: Option<(Buffer, Arc<Region>)>,
    wake_ups: Vec<WakeUp>,
    state: Mutex<DoorbellState>,
    /// The log has spoken of KVM's refusal.
    reported: AtomicBool,
}

#[derive(Default)]
struct DoorbellState {
    /// Where BAR 0 is, while the controller decodes it.
    base: Option<u64>,
    /// Workers by the offset of the doorbell that calls them.
    wanted: BTreeMap<u64, usize>,
}

impl Doorbells {
    fn new(vm: Arc<Vm>, workers: u8, region: Option<(Buffer, Arc<Region>)>) -> io::Result<Arc<Self>> {
        let wake_ups = (0..workers).map(|_| WakeUp::new()).collect::<io::Result<_>>()?;
        Ok(Arc::new(Self { vm, region, wake_ups, state: Mutex::default(), reported: AtomicBool::default() }))
    }

    /// BAR 0 may have moved: so do the ioeventfds; and so may that of the region.
    fn place(&self, bars: &[BarWindow]) {
        if let Some((region, _)) = &self.region {
            region.place(bars);
        }
        let base = bars.iter().find(|bar| bar.bar == 0 && bar.decoded).map(|bar| bar.address);
        let mut state = self.lock();
        if state.base == base {
            return;
        }
        for (&offset, &worker) in &state.wanted {
            self.switch(state.base, offset, worker, false);
            self.switch(base, offset, worker, true);
        }
        state.base = base;
    }

    fn switch(&self, base: Option<u64>, offset: u64, worker: usize, on: bool) {
        let (Some(address), Some(wake_up)) =
            (base.and_then(|base| base.checked_add(offset)), self.wake_ups.get(worker))
        else {
            return;
        };
        let event = wake_up.event_fd();
        let result =
            if on { self.vm.add_doorbell(event, address) } else { self.vm.remove_doorbell(event, address) };
        if let Err(error) = result {
            // The doorbell works all the same: its writes then leave the guest and arrive on a vCPU thread. Said once: a
            // guest that puts two controllers at one address could otherwise fill the log.
            if !self.reported.swap(true, Ordering::Relaxed) {
                log::warn!("{error}");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, DoorbellState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Host for Doorbells {
    fn wake(&self, worker: usize) {
        if let Some(wake_up) = self.wake_ups.get(worker) {
            wake_up.ring();
        }
    }

    fn set_doorbell_event(&self, bar_offset: u64, worker: usize, enabled: bool) {
        let mut state = self.lock();
        let before =
            if enabled { state.wanted.insert(bar_offset, worker) } else { state.wanted.remove(&bar_offset) };
        if enabled && before == Some(worker) {
            return;
        }
        if let Some(before) = before {
            self.switch(state.base, bar_offset, before, false);
        }
        if enabled {
            self.switch(state.base, bar_offset, worker, true);
        }
    }

    fn show_region(&self, ready: bool) {
        if let Some((region, _)) = &self.region {
            region.show(ready);
        }
    }

    fn flush_region(&self) -> io::Result<()> {
        self.region.as_ref().map_or(Ok(()), |(_, region)| region.flush())
    }
}

/// The controller on the PCI bus; follows its BARs.
struct Function {
    controller: Arc<Controller>,
    doorbells: Arc<Doorbells>,
    buffer: Option<Arc<Buffer>>,
}

impl Function {
    /// The BARs may have moved.
    fn place(&self) {
        let bars = self.controller.bars();
        self.doorbells.place(&bars);
        if let Some(buffer) = &self.buffer {
            buffer.place(&bars);
        }
    }
}

impl PciFunction for Function {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.controller.config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.controller.config_write(offset, data);
        self.place();
    }

    fn bars(&self) -> Vec<BarWindow> {
        self.controller.bars()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.controller.bar_read(bar, offset, data);
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.controller.bar_write(bar, offset, data);
    }
}

/// One worker of a controller, on its thread.
struct Share {
    controller: Arc<Controller>,
    worker: usize,
    completion: EventFd,
    wake_up: WakeUp,
    poller: Poller,
}

impl Worker for Share {
    fn turn(&mut self, mut called: bool) -> bool {
        let Self { controller, worker, wake_up, poller, .. } = self;
        let end = poller.turn(|| {
            if called || wake_up.take_call() {
                called = false;
                // Besides the queues, what others ask of the controller.
                controller.process(*worker);
                return true;
            }
            controller.poll(*worker)
        });
        // Only this asks the guest to ring, and looks once more.
        end == TurnEnd::Long || controller.process(*worker) == Progress::More
    }

    fn completion_events(&self) -> io::Result<Vec<EventFd>> {
        Ok(vec![self.completion.try_clone()?])
    }

    fn deadline(&self) -> Option<Instant> {
        let keep_alive = if self.worker == 0 { self.controller.deadline() } else { None };
        keep_alive.into_iter().chain(self.controller.interrupt_deadline(self.worker)).min()
    }

    fn stood_still(&mut self) {
        if self.worker == 0 {
            self.controller.restart_timers();
        }
    }
}
