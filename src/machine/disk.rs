//! A controller with its images, its threads and its doorbells.
//!
//! A disk is made in two steps, since a guest that arrives brings its controller's state late and its blackout must be
//! short: [`Disk::prepare`] makes everything that takes time (io_urings, irqfds); the controller itself is built by
//! [`Disk::create`] or [`Disk::restore`] and costs microseconds.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use anyhow::{Context, anyhow};
use block::{Identity, IoContext};
use bus::GuestMemory;
use engine::Description;
use nvme::{Controller, ControllerConfig, Host, NamespaceConfig, NvmeState, Progress};
use pci::{BarWindow, PciFunction};
use vmm_sys_util::eventfd::EventFd;

use crate::config::ControllerSpec;
use crate::io_thread::{IoThread, WakeUp, Worker};
use crate::kvm::{MsiRouter, MsixFunction, Vm};

/// Requests that each worker may have at the disk at once.
const REQUESTS_PER_WORKER: u32 = 256;

/// A controller of the machine.
pub struct Disk {
    config: ControllerConfig,
    namespaces: Vec<NamespaceConfig>,
    memory: GuestMemory,
    /// One for each worker, until the controller takes them.
    contexts: Mutex<Vec<IoContext>>,
    completions: Vec<EventFd>,
    interrupts: Arc<MsixFunction>,
    doorbells: Arc<Doorbells>,
    controller: OnceLock<Arc<Controller>>,
}

impl Disk {
    /// Makes what the controller needs.
    ///
    /// # Errors
    /// The process lacks descriptors, or KVM interrupt routes.
    pub fn prepare(
        spec: &ControllerSpec,
        namespaces: &[NamespaceConfig],
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
            ..ControllerConfig::new(serial)
        };
        let contexts = (0..workers)
            .map(|_| IoContext::new(memory.clone(), REQUESTS_PER_WORKER))
            .collect::<Result<Vec<_>, _>>()
            .with_context(|| format!("cannot make the I/O queues of controller {serial}"))?;
        let completions =
            contexts.iter().map(|context| context.event_fd().try_clone()).collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            config,
            namespaces: namespaces.to_vec(),
            memory: memory.clone(),
            contexts: Mutex::new(contexts),
            completions,
            interrupts: MsixFunction::new(router, spec.vectors)?,
            doorbells: Doorbells::new(Arc::clone(vm), workers)?,
            controller: OnceLock::new(),
        })
    }

    /// The controller's serial number.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.config.serial
    }

    /// Builds the controller as a reset leaves it.
    ///
    /// # Errors
    /// The configuration does not make a controller.
    pub fn create(&self) -> anyhow::Result<()> {
        let controller = Controller::new(
            self.config.clone(),
            self.memory.clone(),
            &self.namespaces,
            self.take_contexts(),
            Arc::clone(&self.interrupts) as _,
            Arc::clone(&self.doorbells) as _,
        )?;
        self.install(controller)
    }

    /// Builds the controller that was saved.
    ///
    /// # Errors
    /// The state is not one of this controller; nothing runs then.
    pub fn restore(&self, state: &NvmeState) -> anyhow::Result<()> {
        let controller = Controller::restore(
            state,
            self.config.clone(),
            self.memory.clone(),
            &self.namespaces,
            self.take_contexts(),
            Arc::clone(&self.interrupts) as _,
            Arc::clone(&self.doorbells) as _,
        )?;
        self.install(controller)
    }

    fn install(&self, controller: Controller) -> anyhow::Result<()> {
        let controller = Arc::new(controller);
        self.doorbells.place(&controller.bars());
        self.controller.set(controller).map_err(|_| anyhow!("controller {} exists already", self.serial()))
    }

    fn take_contexts(&self) -> Vec<IoContext> {
        std::mem::take(&mut *self.contexts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The controller, once it was built.
    ///
    /// # Errors
    /// It was not.
    pub fn controller(&self) -> anyhow::Result<&Arc<Controller>> {
        self.controller.get().ok_or_else(|| anyhow!("controller {} has not been built yet", self.serial()))
    }

    /// The controller as the PCI bus sees it.
    ///
    /// # Errors
    /// It has not been built.
    pub fn function(&self) -> anyhow::Result<Arc<dyn PciFunction>> {
        let controller = Arc::clone(self.controller()?);
        Ok(Arc::new(Function { controller, doorbells: Arc::clone(&self.doorbells) }))
    }

    /// Gives worker `n` to thread `n`; there are as many threads as workers.
    ///
    /// # Errors
    /// The controller has not been built, or a thread has ended.
    pub fn serve(&self, threads: &[IoThread]) -> anyhow::Result<()> {
        for (worker, ((thread, wake_up), completion)) in
            threads.iter().zip(&self.doorbells.wake_ups).zip(&self.completions).enumerate()
        {
            let controller = Arc::clone(self.controller()?);
            let share = Share { controller, worker, completion: completion.try_clone()? };
            thread.add(Box::new(share), wake_up.clone())?;
        }
        Ok(())
    }

    /// What a destination must have too.
    pub fn describe(&self, description: &mut Description) {
        let ControllerConfig { serial, queue_pairs, vectors, mdts, .. } = &self.config;
        let controller = format!("nvme.{serial}");
        description.set(format!("{controller}.queues"), queue_pairs);
        description.set(format!("{controller}.msix"), vectors);
        description.set(format!("{controller}.mdts"), mdts);
        for NamespaceConfig { nsid, block_bytes, backend } in &self.namespaces {
            let Identity { kind, capacity_bytes, read_only } = backend.identity();
            let namespace = format!("{controller}.ns.{nsid}");
            description.set(format!("{namespace}.backend"), kind);
            description.set(format!("{namespace}.capacity_bytes"), capacity_bytes);
            description.set(format!("{namespace}.lba"), block_bytes);
            description.set(format!("{namespace}.ro"), read_only);
        }
    }

    /// Makes sure that every interrupt that was raised is in a local APIC. The controller is paused.
    ///
    /// # Errors
    /// KVM refused a message.
    pub fn flush_interrupts(&self) -> Result<(), crate::kvm::Error> {
        self.interrupts.flush()
    }
}

/// Calls workers, and lets KVM call them: doorbells that need no value become ioeventfds.
struct Doorbells {
    vm: Arc<Vm>,
    wake_ups: Vec<WakeUp>,
    state: Mutex<DoorbellState>,
}

#[derive(Default)]
struct DoorbellState {
    /// Where BAR 0 is, while the controller decodes it.
    base: Option<u64>,
    /// Workers by the offset of the doorbell that calls them.
    wanted: BTreeMap<u64, usize>,
}

impl Doorbells {
    fn new(vm: Arc<Vm>, workers: u8) -> io::Result<Arc<Self>> {
        let wake_ups = (0..workers).map(|_| WakeUp::new()).collect::<io::Result<_>>()?;
        Ok(Arc::new(Self { vm, wake_ups, state: Mutex::default() }))
    }

    /// BAR 0 may have moved: so do the ioeventfds.
    fn place(&self, bars: &[BarWindow]) {
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
            // The doorbell works all the same: its writes then leave the guest and arrive on a vCPU thread.
            log::warn!("{error}");
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
}

/// The controller on the PCI bus; follows its BAR.
struct Function {
    controller: Arc<Controller>,
    doorbells: Arc<Doorbells>,
}

impl PciFunction for Function {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.controller.config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.controller.config_write(offset, data);
        self.doorbells.place(&self.controller.bars());
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
}

impl Worker for Share {
    fn turn(&mut self) -> bool {
        self.controller.process(self.worker) == Progress::More
    }

    fn completion_events(&self) -> io::Result<Vec<EventFd>> {
        Ok(vec![self.completion.try_clone()?])
    }

    fn deadline(&self) -> Option<Instant> {
        if self.worker == 0 { self.controller.deadline() } else { None }
    }
}
