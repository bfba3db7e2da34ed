//! The controller from outside: build, serve, pause, resume.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use block::{Backend, IoContext};
use bus::GuestMemory;
use pci::{Endpoint, MsixSink};

use crate::Error;
use crate::admin::{Admin, Phase, Pool};
use crate::config::{ControllerConfig, NamespaceConfig};
use crate::namespace;
use crate::save::smart_state;
use crate::shared::{Host, Shared, lock};
use crate::store::ControllerPlace;
use crate::subsystem::{FIRST_CONTROLLER_ID, Subsystem};
use crate::window::{self, BUFFER_START, REGION_START};
use crate::worker::Worker;

/// What [`Controller::process`] leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to do now: call again. Nobody will wake the worker for it.
    More,
    /// Nothing can be done until [`Host::wake`], the I/O context's event or a doorbell event: the thread may sleep.
    Idle,
}

/// Counts for tests and status displays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Completion entries posted, admin and I/O, since this value was built.
    pub completed: u64,
    /// Commands that backends are working on.
    pub in_flight: u32,
    /// Doorbell registers that the guest wrote, each one an exit to here; those that are events of the host do not count.
    pub doorbell_writes: u64,
}

/// An NVMe controller. Shared by vCPU threads (as a [`pci::PciFunction`]), by one thread for each worker
/// ([`Controller::process`]) and by the migration thread.
pub struct Controller {
    pub(crate) pool: Pool,
    pub(crate) admin: Mutex<Admin>,
    /// Of its membership in the subsystem.
    ticket: u64,
}

impl Controller {
    /// A controller as after power-on, alone in a subsystem of its own that has `namespaces`.
    ///
    /// There is one worker for each of `contexts`, at least one; worker 0 also serves the admin queue. Interrupts go to `sink`.
    ///
    /// # Errors
    /// [`Error::Serial`], [`Error::Config`], [`Error::Namespace`], [`Error::Pci`].
    pub fn new(
        config: ControllerConfig,
        memory: GuestMemory,
        namespaces: &[NamespaceConfig],
        contexts: Vec<IoContext>,
        sink: Arc<dyn MsixSink>,
        host: Arc<dyn Host>,
    ) -> Result<Self, Error> {
        config.check()?;
        let subsystem = Subsystem::new(&config.serial, namespaces, false)?;
        Self::join(&subsystem, FIRST_CONTROLLER_ID, config, memory, contexts, sink, host)
    }

    /// A controller as after power-on, which is controller `id` of `subsystem`; its namespaces are attached to it.
    ///
    /// # Errors
    /// [`Error::Serial`], [`Error::Config`], [`Error::ControllerId`], [`Error::Pci`]; [`Error::State`]: what it kept is not what a
    /// controller keeps.
    pub fn join(
        subsystem: &Arc<Subsystem>,
        id: u16,
        config: ControllerConfig,
        memory: GuestMemory,
        contexts: Vec<IoContext>,
        sink: Arc<dyn MsixSink>,
        host: Arc<dyn Host>,
    ) -> Result<Self, Error> {
        config.check()?;
        if contexts.is_empty() {
            return Err(Error::Config {
                serial: config.serial,
                what: "the number of workers",
                value: 0,
                allowed: "at least 1",
            });
        }
        for (what, start, value, allowed) in [
            (
                "the size of the controller memory buffer",
                BUFFER_START,
                config.buffer_bytes,
                "that of the buffer in guest memory",
            ),
            (
                "the size of the persistent memory region",
                REGION_START,
                config.region_bytes,
                "that of the region in guest memory",
            ),
        ] {
            if !window::is_in(&memory, start, value) {
                return Err(Error::Config { serial: config.serial, what, value, allowed });
            }
        }
        let endpoint = Endpoint::new(crate::pci::config_space(&config)?, sink).map_err(Error::Pci)?;
        let (ticket, record) = subsystem.join(id, Arc::clone(&host))?;
        for worker in 0..contexts.len() {
            subsystem.exclusion.join((id, worker), Arc::clone(&host));
        }
        let table = subsystem.attached_to(id);
        let membership = (Arc::clone(subsystem), id);
        let shared = Shared::new(membership, config, memory, endpoint, contexts.len(), Arc::clone(&host));
        subsystem.regions.join(id, &shared.region);
        subsystem.access.join(id, Arc::clone(&shared.gate), Arc::clone(&host));
        subsystem.reservations.join(id, Arc::clone(&shared.gate), host, contexts.len());
        let workers = contexts
            .into_iter()
            .enumerate()
            .map(|(index, context)| {
                let mut worker = Worker::new(index, context, namespace::copy_for_worker(&table.1));
                worker.walker.set_windows(&shared.windows);
                if index == 0 {
                    worker.allocated = subsystem.allocated();
                }
                Mutex::new(worker)
            })
            .collect();
        let mut admin = Admin::new(&shared, table, &record.smart);
        admin.walker.set_windows(Arc::clone(&shared.windows));
        let admin = Mutex::new(admin);
        let controller = Self { pool: Pool { shared, workers }, admin, ticket };
        if subsystem.is_managed() {
            let place = Arc::new(ControllerPlace::new(subsystem, id));
            controller.attach_non_volatile(place, record.kept.as_ref().map(|kept| &kept.kept))?;
        }
        Ok(controller)
    }

    /// Does what worker `index` can do now, in bounded batches. Called by that worker's thread after each wake-up, and again
    /// as long as it says [`Progress::More`]. An index without a worker is idle.
    pub fn process(&self, index: usize) -> Progress {
        let Some(worker) = self.pool.workers.get(index) else { return Progress::Idle };
        let (mut more, mut job_waits) = (false, false);
        if index == 0 {
            let mut admin = lock(&self.admin);
            more |= admin.process(&self.pool);
            job_waits = !admin.waiting_jobs.is_empty() || admin.waits_for_slot;
            self.pool.shared.admin_waits.store(job_waits, Ordering::Relaxed);
        }
        let mut worker = lock(worker);
        more |= worker.process(&self.pool.shared);
        // A job that waits for a slot is not called again by the end of the commands that had them all.
        more |= index == 0 && (!worker.admin_ended.is_empty() || job_waits && worker.has_free_slot());
        if more { Progress::More } else { Progress::Idle }
    }

    /// As [`Controller::process`], by a thread that looks again soon whatever this says, and calls [`Controller::process`] before it
    /// sleeps: guests with shadow doorbells need not ring meanwhile. Serves I/O queues alone, so that the thread also calls
    /// [`Controller::process`] after each [`Host::wake`]. `true`: something was done.
    pub fn poll(&self, index: usize) -> bool {
        let shared = &self.pool.shared;
        let Some(worker) = self.pool.workers.get(index) else { return false };
        while shared.lanes[index].callers.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
        let mut worker = lock(worker);
        let busy = worker.poll(shared);
        let admin_waits = index == 0
            && (!worker.admin_ended.is_empty()
                || worker.has_free_slot() && shared.admin_waits.load(Ordering::Relaxed));
        drop(worker);
        if admin_waits {
            self.process(index);
        }
        busy || admin_waits
    }

    /// When [`Controller::process`] of worker 0 must be called even if nothing wakes it (the keep alive timer).
    pub fn deadline(&self) -> Option<Instant> {
        let admin = lock(&self.admin);
        // Elsewhere nobody looks at the timer: once it has run out, its thread would find no rest.
        let runs = admin.phase == Phase::Ready && !self.pool.shared.is_paused();
        admin.keep_alive.filter(|_| runs)
    }

    /// How many workers there are.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.pool.workers.len()
    }

    /// Goes on after a pause, or begins after [`Controller::restore`]: signals every completion queue that holds entries the guest
    /// has not taken, and wakes every worker, so that doorbells rung before the stop are served.
    pub fn resume(&self) {
        self.reopen();
        self.wake_workers();
    }

    /// The first half of [`Controller::resume`]: the guest may run, and is served. What it asked for before the stop waits for the
    /// second half, [`Controller::wake_workers`], which may come when the guest runs already.
    pub fn reopen(&self) {
        let shared = &self.pool.shared;
        let mut admin = lock(&self.admin);
        admin.paused_at = None;
        admin.restart_keep_alive();
        shared.update_pin();
        shared.endpoint.drive_pin();
        if admin.queues.as_ref().is_some_and(|queues| queues.cq.unseen() > 0) {
            shared.endpoint.msix().trigger(0);
        }
        for index in 0..self.pool.workers.len() {
            let mut worker = self.pool.worker(index);
            for cq in worker.cqs.iter().flatten() {
                if cq.interrupts && cq.unseen() > 0 {
                    shared.endpoint.msix().trigger(cq.vector);
                }
            }
            worker.wake_up();
        }
        shared.paused.store(false, Ordering::SeqCst);
    }

    /// Has every worker look at its queues.
    pub fn wake_workers(&self) {
        for index in 0..self.pool.workers.len() {
            self.pool.shared.host.wake(index);
        }
    }

    /// The threads that serve it had to stand still for a while, which is no fault of the host's: its keep alive timer begins anew.
    pub fn restart_timers(&self) {
        lock(&self.admin).restart_keep_alive();
    }

    /// The subsystem.
    #[must_use]
    pub fn subsystem(&self) -> &Arc<Subsystem> {
        &self.pool.shared.subsystem
    }

    /// The images, by namespace identifier, for the handover of their locks.
    #[must_use]
    pub fn namespaces(&self) -> Vec<(u32, Arc<dyn Backend>)> {
        let admin = lock(&self.admin);
        namespace::active(&admin.namespaces).map(|ns| (ns.nsid, Arc::clone(&ns.backend))).collect()
    }

    /// Writes what the subsystem keeps without power, if it has changed: the counters of this controller with it. May wait for the
    /// store: called at reset, at shutdown and from time to time, on a thread that serves no I/O.
    ///
    /// # Errors
    /// [`Error::Store`]: the store has what it had.
    pub fn persist(&self) -> Result<(), Error> {
        let (smart, is_running) = {
            let admin = lock(&self.admin);
            (smart_state(&self.pool, &admin, Instant::now()), admin.is_running)
        };
        self.pool.shared.subsystem.persist(self.pool.shared.controller_id, smart, is_running)
    }

    /// What was done and what is being done.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let lanes = self.pool.shared.lanes.iter();
        Statistics {
            completed: lanes.map(|lane| lane.completed.load(Ordering::Relaxed)).sum(),
            in_flight: self.pool.shared.in_flight(),
            doorbell_writes: self.pool.shared.doorbell_writes.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let shared = &self.pool.shared;
        shared.subsystem.reservations.leave(shared.controller_id, &shared.gate);
        shared.subsystem.access.leave(shared.controller_id, &shared.gate);
        let smart = smart_state(&self.pool, &lock(&self.admin), Instant::now());
        let Self { pool: Pool { workers, .. }, ticket, .. } = self;
        shared.subsystem.leave(shared.controller_id, *ticket, smart, || {
            shared.subsystem.regions.leave(shared.controller_id);
            for worker in 0..workers.len() {
                shared.subsystem.exclusion.leave((shared.controller_id, worker));
            }
        });
    }
}
