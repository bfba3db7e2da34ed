//! The admin queue, what it owns, and the passage of a controller through enable, reset and shutdown.
//!
//! Only worker 0's thread (and whoever pauses or saves) enters here; vCPU threads leave their wishes in `Registers::wanted`.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use nvme_spec::log::{self as logs, ErrorEntry};
use nvme_spec::regs::{self, Aqa, Cc, Csts};
use nvme_spec::{Status, SubmissionEntry};

use crate::command::features::Features;
use crate::command::format::Format;
use crate::command::self_test::{self, SelfTest};
use crate::common::CommonPlace;
use crate::doorbell::{Buffers, MemoryGone};
use crate::firmware::Staging;
use crate::follow::Following;
use crate::maintenance::{Chunk, Kind};
use crate::namespace::NamespaceTable;
use crate::non_volatile::NonVolatile;
use crate::persistent::PersistentEvents;
use crate::prp::PrpWalker;
use crate::queue::{CONGESTED_BACKLOG, CompletionQueue, Ended, Location, QueuePlace, SubmissionQueue};
use crate::regs::{IOCQES, IOSQES, MPSMAX, Wanted};
use crate::save::smart_state;
use crate::shared::{Shared, lock};
use crate::smart::{self, Counters, Health, MEDIA_WARNINGS};
use crate::state::SmartState;
use crate::window::Windows;
use crate::worker::{Owner, Worker, post_queue, refresh_head};

/// Asynchronous Event Requests that can be outstanding (Identify Controller AERL + 1).
pub(crate) const MAX_PARKED: usize = 8;
/// Admin commands executed in one call.
const BURST: u32 = 64;

/// The workers and what they share.
pub(crate) struct Pool {
    pub shared: Shared,
    pub workers: Box<[Mutex<Worker>]>,
}

impl Pool {
    pub fn worker(&self, index: usize) -> MutexGuard<'_, Worker> {
        // A worker that is polled gives its lock back for a moment only, in which nobody could take it without this.
        let callers = &self.shared.lanes[index].callers;
        callers.fetch_add(1, Ordering::SeqCst);
        let worker = lock(&self.workers[index]);
        callers.fetch_sub(1, Ordering::SeqCst);
        worker
    }
}

/// Where the controller is between power-on and shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// CC.EN is 0 and everything is forgotten.
    Disabled,
    /// CSTS.RDY.
    Ready,
    /// A reset waits for what is in flight.
    Resetting {
        /// By NSSR.
        subsystem: bool,
        /// A shutdown follows: CC.EN and CC.SHN were written together.
        shutdown: bool,
    },
    /// A shutdown waits for what is in flight.
    Stopping,
    /// A shutdown waits for the flush of all namespaces.
    Flushing,
    /// CSTS.SHST says complete; only a reset leads on.
    Stopped,
    /// CSTS.CFS; only a reset leads on.
    Failed,
}

/// What happens when a backend request that the controller made for itself has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// Shutdown is complete.
    Shutdown,
    /// Set Features (volatile write cache off) is answered.
    WriteCacheOff { cid: u16 },
    /// Set Features (namespace write protection) is answered.
    WriteProtect { cid: u16 },
    /// An operation goes on, or ends.
    Operation { kind: Kind, chunk: Chunk },
    /// Nothing: nobody waits for it any more.
    Nothing,
}

/// The admin queue pair. It lives here and not in a worker, so that its commands can reach into every worker.
pub(crate) struct Queues {
    pub sq: SubmissionQueue,
    pub cq: CompletionQueue,
}

/// A Delete I/O Submission Queue command that waits for the commands of its queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PendingDelete {
    pub cid: u16,
    pub sq_id: u16,
}

/// The answer to an admin command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Completed, with this dword 0.
    Now(u32),
    /// Completed later.
    Later,
}

/// See the module's text.
pub(crate) struct Admin {
    pub phase: Phase,
    /// The host has enabled the controller and not shut it down since.
    pub is_running: bool,
    pub queues: Option<Queues>,
    pub features: Features,
    /// What the features are after a reset.
    pub saved_features: Features,
    /// What the other controllers of the subsystem have too.
    pub common: CommonPlace,
    /// Firmware that is downloaded and not committed.
    pub staging: Staging,
    /// [`Admin::tell_of_format`] goes with every change.
    pub format: Option<Format>,
    pub self_test: SelfTest,
    pub persistent: PersistentEvents,
    /// The last reset activated other firmware.
    activated: bool,
    /// An operation found no free slot in worker 0.
    pub waits_for_slot: bool,
    pub non_volatile: Option<Arc<dyn NonVolatile>>,
    /// The log has spoken of a failure to keep something.
    pub keep_failure_reported: bool,
    /// Command identifiers of Asynchronous Event Requests, oldest first.
    pub parked: Vec<u16>,
    pub deletes: Vec<PendingDelete>,
    pub jobs: Vec<(u32, Job)>,
    next_job: u32,
    /// Jobs that found no free slot in worker 0. They are admin commands, and bounded as these are.
    pub waiting_jobs: VecDeque<Job>,
    /// The log has spoken of a failing flush at shutdown.
    flush_failure_reported: bool,
    /// When a pause began that lasts; time is saved as it was then.
    pub paused_at: Option<Instant>,
    /// When the host must have sent Keep Alive.
    pub keep_alive: Option<Instant>,
    pub buffers: Option<Buffers>,
    /// Those that are attached to this controller.
    pub namespaces: NamespaceTable,
    /// All of the subsystem, for what is done to them whether they are attached or not.
    pub allocated: NamespaceTable,
    pub following: Following,
    /// Namespaces that changed since the host read the log, for log page 04h.
    pub changed_namespaces: Vec<u32>,
    pub health: Health,
    /// What was counted before this process had the controller.
    pub counters_before: Counters,
    /// log2 of the memory page size that CC.MPS chose.
    pub page_shift: u32,
    pub walker: PrpWalker,
}

impl Admin {
    pub fn new(shared: &Shared, (generation, namespaces): (u64, NamespaceTable), smart: &SmartState) -> Self {
        Self {
            phase: Phase::Disabled,
            is_running: false,
            queues: None,
            features: Features::new(shared.config.vectors),
            saved_features: Features::new(shared.config.vectors),
            common: shared.subsystem.common.clone(),
            staging: Staging::default(),
            format: shared.subsystem.format_of(shared.controller_id),
            self_test: SelfTest::default(),
            persistent: PersistentEvents::new(),
            activated: false,
            waits_for_slot: false,
            non_volatile: None,
            keep_failure_reported: false,
            parked: Vec::new(),
            deletes: Vec::new(),
            jobs: Vec::new(),
            next_job: 0,
            waiting_jobs: VecDeque::new(),
            flush_failure_reported: false,
            paused_at: None,
            keep_alive: None,
            buffers: None,
            namespaces,
            allocated: shared.subsystem.allocated(),
            following: Following::new(generation),
            changed_namespaces: Vec::new(),
            health: Health::after(smart),
            counters_before: Counters::from_state(smart),
            page_shift: 12,
            walker: PrpWalker::new(u64::from(crate::config::MIN_PAGE_BYTES)),
        }
    }

    /// One pass. `true`: there is more to do now.
    pub fn process(&mut self, pool: &Pool) -> bool {
        self.follow_subsystem(pool);
        self.tell_of_reservations(pool);
        self.tell_of_access(pool);
        self.tell_of_sanitize(pool);
        self.control(pool);
        self.finish_jobs(pool);
        self.finish_deletes(pool);
        match self.serve(pool) {
            Ok(more) => self.maintain(pool) || more || self.control_is_due(pool),
            Err(gone) => {
                pool.shared.fail("the admin queue", &gone);
                self.phase = Phase::Failed;
                false
            }
        }
    }

    /// Nothing that this controller has begun is unfinished.
    pub fn is_quiet(&self, pool: &Pool) -> bool {
        let stable = matches!(self.phase, Phase::Disabled | Phase::Ready | Phase::Stopped | Phase::Failed);
        stable
            && self.deletes.is_empty()
            && self.jobs.is_empty()
            && self.waiting_jobs.is_empty()
            && self.has_followed(pool)
            && !pool.shared.gate.sanitized.load(Ordering::SeqCst)
            && !self.control_is_due(pool)
    }

    fn control_is_due(&self, pool: &Pool) -> bool {
        let registers = pool.shared.registers();
        registers.wanted.any()
            || pool.shared.gate.subsystem_reset.load(Ordering::SeqCst)
            || (self.phase == Phase::Disabled && registers.cc.en() == 1)
    }

    /// Does what the registers ask for, as far as it can be done now.
    fn control(&mut self, pool: &Pool) {
        let mut wanted = std::mem::take(&mut pool.shared.registers().wanted);
        if wanted.subsystem_reset {
            pool.shared.subsystem.reset_others(pool.shared.controller_id);
        }
        if pool.shared.gate.subsystem_reset.load(Ordering::SeqCst)
            && pool.shared.gate.subsystem_reset.swap(false, Ordering::SeqCst)
        {
            // As if it had been written here.
            wanted = Wanted { subsystem_reset: true, ..Wanted::default() };
        }
        if wanted.reset || wanted.subsystem_reset {
            self.begin_reset(pool, wanted);
        } else if wanted.shutdown {
            match &mut self.phase {
                Phase::Resetting { shutdown, .. } => *shutdown = true,
                phase => *phase = Phase::Stopping,
            }
            pool.shared.active.store(false, Ordering::SeqCst);
        }
        if let Phase::Resetting { subsystem, shutdown } = self.phase
            && pool.shared.in_flight() == 0
        {
            self.finish_reset(pool, subsystem, shutdown);
        }
        if self.phase == Phase::Disabled {
            self.enable_if_wanted(pool);
        }
        if self.phase == Phase::Ready && !pool.shared.is_paused() {
            self.check_keep_alive(&pool.shared);
        }
        if self.phase == Phase::Stopping && self.workers_are_idle(pool) {
            self.phase = Phase::Flushing;
            self.start_job(pool, Job::Shutdown);
        } else if let Some(job) = self.waiting_jobs.pop_front() {
            self.start_job(pool, job);
        }
    }

    /// "If the Keep Alive Timer expires ... the controller shall: record an Error Information Log Entry with the status code Keep Alive
    /// Timer Expired; stop processing commands; set the Controller Fatal Status" (Base 3.9).
    fn check_keep_alive(&mut self, shared: &Shared) {
        if self.keep_alive.is_none_or(|deadline| Instant::now() < deadline) {
            return;
        }
        self.keep_alive = None;
        shared.events().log_error(ErrorEntry {
            sq_id: 0xffff,
            cid: 0xffff,
            status: Status::KEEP_ALIVE_EXPIRED.0 << 1,
            parameter_location: 0xffff,
            ..ErrorEntry::default()
        });
        self.phase = Phase::Failed;
        shared.stop();
    }

    /// Takes every worker's lock once, so that none is in the middle of fetching when nothing is in flight.
    fn workers_are_idle(&self, pool: &Pool) -> bool {
        (0..pool.workers.len()).all(|index| pool.worker(index).in_flight() == 0)
    }

    /// Forgets all queues and waits for the backends (Base 3.7.2, Controller Level Reset). The guest's memory is not touched after
    /// CSTS.RDY is 0.
    fn begin_reset(&mut self, pool: &Pool, wanted: Wanted) {
        let shared = &pool.shared;
        shared.active.store(false, Ordering::SeqCst);
        for index in 0..pool.workers.len() {
            let mut worker = pool.worker(index);
            worker.drop_queues(shared);
            shared.lanes[index].in_flight.store(worker.in_flight(), Ordering::SeqCst);
        }
        if self.queues.take().is_some() {
            shared.doorbells.close_sq(0);
            shared.doorbells.close_cq(0);
        }
        self.features = self.saved_features.clone();
        shared.write_cache.store(self.features.write_cache, Ordering::Release);
        self.apply_features(shared);
        shared.pin_queues.clear();
        shared.update_pin();
        self.activated = self.common.lock().firmware.reset();
        // "A Controller Level Reset ... firmware image that was downloaded and not committed is discarded" (Base 5.12).
        self.staging = Staging::default();
        self.persistent.context = None;
        self.persistent.knows_begin = false;
        if self.self_test.running.is_some_and(|test| test.code == self_test::SHORT) {
            self.end_self_test(logs::SELF_TEST_RESET, None);
        }
        self.parked.clear();
        self.deletes.clear();
        self.following.forget();
        self.jobs.clear();
        self.waiting_jobs.clear();
        self.keep_alive = None;
        self.buffers = None;
        // Nobody waits for its answer any more.
        self.format.iter_mut().for_each(|format| format.cid = None);
        self.tell_of_format(pool);
        self.changed_namespaces.clear();
        self.health.critical_warning &= MEDIA_WARNINGS;
        shared.events().reset();
        shared.subsystem.reservations.reset(shared.controller_id);
        let before = matches!(self.phase, Phase::Resetting { subsystem: true, .. });
        let subsystem = wanted.subsystem_reset || before;
        self.phase = Phase::Resetting { subsystem, shutdown: wanted.shutdown };
    }

    fn finish_reset(&mut self, pool: &Pool, subsystem: bool, shutdown: bool) {
        // Another controller goes on with what this one did.
        self.common.give_up(pool.shared.controller_id);
        pool.shared.subsystem.wake_all();
        let mut registers = pool.shared.registers();
        registers.interrupt_mask = 0;
        registers.csts = Csts::default().with_nssro(registers.csts.nssro() | u32::from(subsystem));
        if shutdown {
            registers.csts = registers.csts.with_shst(regs::SHST_IN_PROGRESS);
        }
        if subsystem {
            // Every other reset keeps AQA, ASQ and ACQ (Base 3.7.2).
            registers.cc = Cc::default();
            registers.aqa = Aqa::default();
            (registers.asq, registers.acq) = (0, 0);
            registers.spaces.set_buffer(0);
            registers.spaces.set_region(0);
            pool.shared.region.reset();
        }
        self.persistent.set_since_reset(0, Instant::now());
        self.phase = if shutdown { Phase::Stopping } else { Phase::Disabled };
    }

    fn enable_if_wanted(&mut self, pool: &Pool) {
        let (cc, aqa, asq, acq) = {
            let registers = pool.shared.registers();
            (registers.cc, registers.aqa, registers.asq, registers.acq)
        };
        if cc.en() == 0 {
            return;
        }
        // CC.AMS counts from here on.
        self.apply_features(&pool.shared);
        let outcome = check_configuration(cc).and_then(|()| {
            let (asq, acq) = place_admin_queues(&pool.shared.windows, cc, aqa, asq, acq)?;
            self.open_admin_queues(pool, cc, aqa, asq, acq).map_err(|(_, what)| what)
        });
        let mut registers = pool.shared.registers();
        if let Err(what) = outcome {
            // The guest can do this for ever, and is told in CSTS.CFS.
            log::debug!("NVMe controller {:?} cannot be enabled: {what}", pool.shared.config.serial);
            registers.csts = registers.csts.with_cfs(1).with_shst(0);
            self.phase = Phase::Failed;
            return;
        }
        // A shutdown may have failed while CC.EN was 0: that is the end of a life, not of this one.
        registers.csts = registers.csts.with_rdy(1).with_cfs(0).with_shst(0);
        drop(registers);
        self.phase = Phase::Ready;
        // From here on a loss of power is an unsafe shutdown.
        self.set_running(pool, true);
        if !self.persistent.knows_begin {
            let activated = std::mem::take(&mut self.activated);
            self.log_power_on_or_reset(pool, activated);
            self.keep();
        }
        pool.shared.active.store(true, Ordering::SeqCst);
    }

    /// Has the store know whether the controller is to be shut down. What cannot be written now goes with whatever is written next.
    fn set_running(&mut self, pool: &Pool, is_running: bool) {
        if std::mem::replace(&mut self.is_running, is_running) != is_running
            && pool.shared.subsystem.is_managed()
        {
            let smart = smart_state(pool, self, Instant::now());
            let _unwritten = pool.shared.subsystem.persist(pool.shared.controller_id, smart, is_running);
        }
    }

    /// Makes the admin queues that AQA describes where ASQ and ACQ were translated to, and sets the memory page size. The error names
    /// the register.
    pub fn open_admin_queues(
        &mut self,
        pool: &Pool,
        cc: Cc,
        aqa: Aqa,
        asq: u64,
        acq: u64,
    ) -> Result<(), (&'static str, &'static str)> {
        let shared = &pool.shared;
        let page_shift = 12 + cc.mps();
        let place = |base, size: u32| QueuePlace {
            id: 0,
            entries: size + 1,
            location: Location::Contiguous(base),
            page_shift,
        };
        if aqa.asqs() == 0 || aqa.acqs() == 0 {
            return Err(("aqa", "an admin queue has fewer than 2 entries"));
        }
        let sq = SubmissionQueue::new(&shared.memory, place(asq, aqa.asqs()), 0, 0)
            .map_err(|_| ("asq", "ASQ is not page aligned or not in guest memory"))?;
        let cq = CompletionQueue::new(&shared.memory, place(acq, aqa.acqs()), 0, true)
            .map_err(|_| ("acq", "ACQ is not page aligned or not in guest memory"))?;
        shared.doorbells.open_sq(0, sq.ring.entries, 0, 0);
        shared.doorbells.open_cq(0, cq.ring.entries, 0, 0);
        shared.pin_queues.add(&cq);
        self.queues = Some(Queues { sq, cq });
        self.page_shift = page_shift;
        self.walker.set_page_bytes(1 << page_shift);
        for index in 0..pool.workers.len() {
            pool.worker(index).walker.set_page_bytes(1 << page_shift);
        }
        Ok(())
    }

    /// Flushes all namespaces on worker 0; [`Admin::finish_jobs`] does what follows.
    pub fn start_job(&mut self, pool: &Pool, job: Job) {
        let token = self.take_token();
        let mut worker = pool.worker(0);
        match worker.flush_all(Owner::Admin(token), 0) {
            Ok(true) => self.jobs.push((token, job)),
            Ok(false) => {
                drop(worker);
                self.finish_job(pool, job, Status::SUCCESS);
            }
            // No slot is free: again when the worker has finished something.
            Err(_) => self.waiting_jobs.push_back(job),
        }
    }

    /// A name for the next job.
    pub fn take_token(&mut self) -> u32 {
        let token = self.next_job;
        self.next_job = token.wrapping_add(1);
        token
    }

    fn finish_jobs(&mut self, pool: &Pool) {
        if self.jobs.is_empty() {
            return;
        }
        let ended = std::mem::take(&mut pool.worker(0).admin_ended);
        for (token, status) in ended {
            if let Some(position) = self.jobs.iter().position(|(job, _)| *job == token) {
                let (_, job) = self.jobs.swap_remove(position);
                self.finish_job(pool, job, status);
            }
        }
    }

    fn finish_job(&mut self, pool: &Pool, job: Job, status: Status) {
        match job {
            Job::Shutdown => {
                pool.shared.flush_region();
                // "Shutdown processing complete": power may go now, and that is no unsafe shutdown.
                self.set_running(pool, false);
                let mut registers = pool.shared.registers();
                if !status.is_success() {
                    // Said once: a guest can shut down as often as it likes.
                    if !std::mem::replace(&mut self.flush_failure_reported, true) {
                        let serial = &pool.shared.config.serial;
                        log::error!("NVMe controller {serial:?}: the flush at shutdown failed");
                    }
                    registers.csts = registers.csts.with_cfs(1);
                }
                registers.csts = registers.csts.with_shst(regs::SHST_COMPLETE);
                // A shutdown is possible while CC.EN is 0, and then an enable may follow.
                self.phase = if registers.cc.en() == 1 { Phase::Stopped } else { Phase::Disabled };
            }
            Job::WriteCacheOff { cid } | Job::WriteProtect { cid } => self.end(cid, 0, status),
            Job::Nothing => {}
            Job::Operation { kind, chunk } => self.finish_request(pool, kind, &chunk, status),
        }
    }

    /// Answers Delete I/O Submission Queue commands whose queues have nothing in flight any more.
    fn finish_deletes(&mut self, pool: &Pool) {
        let mut position = 0;
        while let Some(&PendingDelete { cid, sq_id }) = self.deletes.get(position) {
            if crate::command::queues::remove_idle_sq(pool, sq_id) {
                self.deletes.remove(position);
                self.end(cid, 0, Status::SUCCESS);
            } else {
                position += 1;
            }
        }
    }

    /// An admin command has its result.
    pub fn end(&mut self, cid: u16, dw0: u32, status: Status) {
        if let Some(queues) = self.queues.as_mut() {
            queues.cq.backlog.push_back(Ended { sq_id: 0, sq_index: 0, cid, dw0, dw1: 0, status });
        }
    }

    /// Fetches, executes and answers admin commands. `true`: there are more.
    fn serve(&mut self, pool: &Pool) -> Result<bool, MemoryGone> {
        let shared = &pool.shared;
        if !shared.is_bus_master() {
            return Ok(false);
        }
        for _ in 0..BURST {
            let Some(entry) = self.fetch(shared)? else { break };
            let Some(entry) = entry else { continue };
            match self.execute(pool, &entry) {
                Ok(Answer::Now(dw0)) => self.end(entry.cid, dw0, Status::SUCCESS),
                Ok(Answer::Later) => {}
                Err(status) => self.end(entry.cid, 0, status),
            }
        }
        self.follow_warnings(shared);
        self.report_events(shared);
        let Some(queues) = self.queues.as_mut() else { return Ok(false) };
        if !queues.cq.backlog.is_empty() {
            let head = queues.sq.head;
            let posted = post_queue(shared, &mut queues.cq, |_| head)?;
            shared.lanes[0].completed.fetch_add(u64::from(posted), Ordering::Relaxed);
        }
        queues.sq.set_tail(shared.doorbells.tail(0));
        Ok(self.may_fetch(shared))
    }

    /// Whether the next admin command, if there is one, is to be fetched. Each is answered once, so that what has been fetched bounds
    /// the completions that can come to wait for their place.
    fn may_fetch(&self, shared: &Shared) -> bool {
        let Some(queues) = &self.queues else { return false };
        let unanswered = queues.cq.backlog.len()
            + self.parked.len()
            + self.deletes.len()
            + self.following.pending()
            + self.jobs.len()
            + usize::from(self.format.is_some())
            + self.waiting_jobs.len();
        self.phase == Phase::Ready
            && !shared.is_paused()
            && shared.is_bus_master()
            && !queues.sq.is_empty()
            && !queues.cq.waiting
            && unanswered < CONGESTED_BACKLOG
    }

    /// The next entry of the admin queue, if there is one and its completion has room; the inner `None` was aborted.
    fn fetch(&mut self, shared: &Shared) -> Result<Option<Option<SubmissionEntry>>, MemoryGone> {
        let Some(queues) = self.queues.as_mut() else { return Ok(None) };
        queues.sq.set_tail(shared.doorbells.tail(0));
        if let Some(buffers) = self.buffers {
            // Drivers ring the admin queue by MMIO only; its shadow follows, and EventIdx asks for every ring.
            if queues.sq.published != Some(queues.sq.tail)
                && let Some(shadow) = buffers.sq(0)
            {
                shadow.store(&shared.memory, queues.sq.tail)?;
                shadow.publish(&shared.memory, queues.sq.tail)?;
                queues.sq.published = Some(queues.sq.tail);
            }
            if let Some(shadow) = buffers.cq(0) {
                let before = queues.cq.head;
                refresh_head(shared, &mut queues.cq)?;
                if queues.cq.head != before {
                    shadow.store(&shared.memory, queues.cq.head)?;
                }
            }
        }
        if !self.may_fetch(shared) {
            return Ok(None);
        }
        let Some(queues) = self.queues.as_mut() else { return Ok(None) };
        queues.sq.fetch(&shared.memory).map(Some)
    }

    /// Takes over what workers have to warn of, and tells of what is new if the host wants to be told.
    fn follow_warnings(&mut self, shared: &Shared) {
        let new = shared.warnings.load(Ordering::SeqCst) & !self.health.critical_warning;
        if new == 0 {
            return;
        }
        self.health.critical_warning |= new;
        for warning in (0..8).map(|bit| 1u8 << bit).filter(|bit| new & bit != 0) {
            if self.features.async_events & u32::from(warning) != 0 {
                shared.events().queue(smart::event_of(warning));
            }
        }
    }

    /// Answers parked Asynchronous Event Requests as far as there are events.
    fn report_events(&mut self, shared: &Shared) {
        if self.parked.is_empty() || self.queues.is_none() || shared.is_paused() {
            return;
        }
        while !self.parked.is_empty() {
            let Some(event) = shared.events().take() else { return };
            let cid = self.parked.remove(0);
            self.end(cid, event.to_dword(), Status::SUCCESS);
        }
    }
}

/// Where in guest memory the queues are that ASQ and ACQ name.
fn place_admin_queues(
    windows: &Windows,
    cc: Cc,
    aqa: Aqa,
    asq: u64,
    acq: u64,
) -> Result<(u64, u64), &'static str> {
    let page_bytes = 1 << (12 + cc.mps());
    let place = |address: u64, length_bytes: u32| {
        let aligned = address.is_multiple_of(page_bytes);
        aligned.then(|| windows.translate(address, length_bytes.into()).ok()).flatten()
    };
    let asq = place(asq, (aqa.asqs() + 1) << 6).ok_or("ASQ is not page aligned or not in guest memory")?;
    let acq = place(acq, (aqa.acqs() + 1) << 4).ok_or("ACQ is not page aligned or not in guest memory")?;
    Ok((asq, acq))
}

/// The values of CC that this controller can be enabled with.
pub(crate) fn check_configuration(cc: Cc) -> Result<(), &'static str> {
    if u64::from(cc.mps()) > MPSMAX {
        return Err("CC.MPS is above CAP.MPSMAX");
    }
    if !matches!(cc.css(), regs::CSS_NVM | regs::CSS_ALL) {
        return Err("CC.CSS is not a command set that CAP.CSS offers");
    }
    if !matches!(cc.ams(), regs::AMS_ROUND_ROBIN | regs::AMS_WEIGHTED) {
        return Err("CC.AMS is neither round robin nor weighted round robin with urgent");
    }
    // Both may be 0 until I/O queues are created.
    if !matches!(cc.iosqes(), 0 | IOSQES) || !matches!(cc.iocqes(), 0 | IOCQES) {
        return Err("CC.IOSQES or CC.IOCQES is not the size of an entry");
    }
    Ok(())
}
