//! What vCPU threads, workers and the migration thread share.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bus::GuestMemory;
use pci::Endpoint;

use crate::arbitration::Arbitration;
use crate::config::ControllerConfig;
use crate::doorbell::{Doorbells, MemoryGone};
use crate::event::Events;
use crate::gate::Gate;
use crate::interrupt::{Coalescing, PinQueues};
use crate::pmr::Region;
use crate::regs::Registers;
use crate::smart::WARNING_REGION;
use crate::subsystem::Subsystem;
use crate::window::Windows;

/// What a controller asks of the process around it.
pub trait Host: Send + Sync {
    /// Worker `worker` has something to do: its thread calls [`Controller::process`](crate::Controller::process) soon. Called on
    /// vCPU threads and on other workers' threads; must be quick and must not call back.
    fn wake(&self, worker: usize);

    /// While enabled, a guest write of any value to `bar_offset` of BAR 0 need only wake `worker`, and need not reach
    /// [`PciFunction::bar_write`](pci::PciFunction::bar_write) (an ioeventfd). It is an optimisation that may be ignored, but
    /// once disabled the writes must arrive again before this returns. Called on worker threads.
    fn set_doorbell_event(&self, bar_offset: u64, worker: usize, enabled: bool);

    /// The guest sees the persistent memory region in its BAR from now on, or no longer. It is not seen at first. Its accesses may also
    /// come to [`PciFunction::bar_read`](pci::PciFunction::bar_read) and `bar_write`. Called on vCPU threads and on that of worker 0,
    /// with locks held; must not call back. Only controllers with a region call it.
    fn show_region(&self, ready: bool);

    /// Makes what was written to the persistent memory region durable, before it returns. Called on vCPU threads and on that of worker 0,
    /// by controllers with a region.
    ///
    /// # Errors
    /// Something may be lost.
    fn flush_region(&self) -> std::io::Result<()>;
}

/// What one worker shows without its lock. As large as a cache line, so that workers do not share one.
#[derive(Default)]
#[repr(align(64))]
pub(crate) struct Lane {
    pub completed: AtomicU64,
    pub in_flight: AtomicU32,
    /// Those of other threads who wait for the worker's lock.
    pub callers: AtomicU32,
}

/// Shared by all threads that enter the controller.
///
/// Locks are taken in this order: admin, workers by index, those of the subsystem (its contents, its reservations, what is common),
/// `pin_queues`, `events`, `registers`; then those of the endpoint. Nobody who holds a lock of one controller takes one of another: what concerns the
/// others of a subsystem is left with the subsystem, and their worker 0 is woken to take it.
pub(crate) struct Shared {
    pub subsystem: Arc<Subsystem>,
    /// Identify Controller CNTLID.
    pub controller_id: u16,
    /// What keeps I/O commands from namespaces.
    pub gate: Arc<Gate>,
    pub config: ControllerConfig,
    pub memory: GuestMemory,
    /// Where memory of the controller is among the addresses of commands.
    pub windows: Arc<Windows>,
    /// The persistent memory region, of no bytes if there is none.
    pub region: Arc<Region>,
    pub host: Arc<dyn Host>,
    pub endpoint: Endpoint,
    pub doorbells: Doorbells,
    /// Doorbell registers written.
    pub doorbell_writes: AtomicU64,
    pub lanes: Box<[Lane]>,
    /// The controller is ready and not shutting down: I/O commands are fetched.
    pub active: AtomicBool,
    /// A migration (or another stop) holds the controller: nothing is fetched.
    pub paused: AtomicBool,
    /// An admin command waits for a slot of worker 0.
    pub admin_waits: AtomicBool,
    /// The volatile write cache is on; off means that every write is as with FUA.
    pub write_cache: AtomicBool,
    /// A worker that ends commands wakes worker 0: an operation waits for it.
    pub tells_of_ends: AtomicBool,
    pub arbitration: Arbitration,
    pub coalescing: Coalescing,
    pub pin_queues: PinQueues,
    /// Critical warnings that failures of images have raised ([`crate::smart::MEDIA_WARNINGS`]).
    pub warnings: AtomicU8,
    pub events: Mutex<Events>,
    registers: Mutex<Registers>,
}

impl Shared {
    pub fn new(
        (subsystem, controller_id): (Arc<Subsystem>, u16),
        config: ControllerConfig,
        memory: GuestMemory,
        endpoint: Endpoint,
        workers: usize,
        host: Arc<dyn Host>,
    ) -> Self {
        let windows = Windows::new(config.buffer_bytes, config.region_bytes);
        let region = Region::new(Arc::clone(&windows), memory.clone(), Arc::clone(&host));
        Self {
            doorbells: Doorbells::new(config.queue_pairs),
            doorbell_writes: AtomicU64::new(0),
            registers: Mutex::new(Registers::new(&config, Arc::clone(&windows), Arc::clone(&region))),
            lanes: (0..workers).map(|_| Lane::default()).collect(),
            active: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            admin_waits: AtomicBool::new(false),
            write_cache: AtomicBool::new(true),
            tells_of_ends: AtomicBool::new(false),
            arbitration: Arbitration::new(),
            coalescing: Coalescing::new(config.vectors),
            pin_queues: PinQueues::default(),
            warnings: AtomicU8::new(0),
            events: Mutex::new(Events::default()),
            subsystem,
            controller_id,
            gate: Arc::default(),
            config,
            windows,
            region,
            memory,
            host,
            endpoint,
        }
    }

    pub fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }

    pub fn events(&self) -> MutexGuard<'_, Events> {
        lock(&self.events)
    }

    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// Whether guest memory may be touched and queues may move. Otherwise nothing is fetched and completions wait, as with queues that
    /// are full; transfers that backends have begun are beyond recall and end.
    pub fn is_bus_master(&self) -> bool {
        self.endpoint.is_bus_master()
    }

    /// Makes the persistent memory region durable, and warns if that fails.
    pub fn flush_region(&self) {
        if self.region.exists() && self.region.flush() {
            self.warnings.fetch_or(WARNING_REGION, Ordering::SeqCst);
            self.host.wake(0);
        }
    }

    /// Whether I/O commands are fetched.
    pub fn may_fetch(&self) -> bool {
        self.active.load(Ordering::SeqCst) && !self.is_paused() && self.is_bus_master()
    }

    /// Backend requests of I/O commands in flight over all workers.
    pub fn in_flight(&self) -> u32 {
        self.lanes.iter().map(|lane| lane.in_flight.load(Ordering::SeqCst)).sum()
    }

    /// The worker of completion queue `cq_id` and of all submission queues that use it.
    pub fn worker_of(&self, cq_id: u16) -> usize {
        usize::from(cq_id) % self.lanes.len()
    }

    /// Guest memory that a queue was checked to be in cannot be accessed: the controller stops (Base 9.5, CSTS.CFS).
    pub fn fail(&self, what: &'static str, MemoryGone: &MemoryGone) {
        log::error!(
            "NVMe controller {:?}: {what} is not in guest memory; the controller stops",
            self.config.serial
        );
        self.stop();
    }

    /// Stops serving commands and says so in CSTS.CFS. A reset leads on.
    pub fn stop(&self) {
        self.active.store(false, Ordering::SeqCst);
        let mut registers = self.registers();
        registers.csts = registers.csts.with_cfs(1);
    }
}

/// A mutex whose data stay valid when a thread died holding it: every update is complete before the next can panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
