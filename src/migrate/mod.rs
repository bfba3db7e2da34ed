//! Migrations of this process's guest: the threads that run the engine, and what is told about them.
//!
//! The engine (crate `engine`) decides what happens when; [`source`] and [`destination`] say how it happens to this
//! process's machine; [`report`] puts its figures into QMP's words. One migration at a time: a guest that has not arrived
//! cannot leave.
//!
//! The migration thread has the lease while it works and puts it back at its end.

mod description;
mod destination;
mod following;
mod fresh;
pub mod images;
mod job;
mod paging;
mod processor;
mod report;
mod source;
#[cfg(test)]
pub mod staged;
mod storage;

use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use engine::{
    Context, Destination, Outcome, Parameters, Patience, PostcopyStart, RamBlock, Statistics, Status, Word,
};
use transport::{Endpoint, Listener, Security, Uri};

use crate::control::{Event, MigrationParameters, MigrationStatus, MigrationTarget};
use crate::kvm::GuestTime;
use crate::machine::Action;
use crate::memory::GuestRam;
use crate::vmm::{Request, Vmm};
use destination::Factory;
use following::{ProcessDoor, Ways};
pub use job::Job;
use source::Source;
pub use storage::ImagesCome;

/// Between two rounds of attempts to settle a hand-over whose outcome is unknown.
const SETTLE_INTERVAL: Duration = Duration::from_secs(1);

/// Between two looks whether a migration thread has ended; it says so itself, unless it panicked.
const END_INTERVAL: Duration = Duration::from_millis(100);

/// The process's migrations: the one that runs, or the last one.
#[derive(Default)]
pub struct Migrations {
    parameters: Arc<Parameters>,
    current: Mutex<Option<Current>>,
    waiting: Waiting,
    ways: Ways,
    /// The capability `postcopy-ram`.
    may_follow: AtomicBool,
    /// The process ends: no migration begins any more. Written with `current` locked.
    closed: AtomicBool,
}

/// One migration, in one direction.
struct Current {
    statistics: Arc<Statistics>,
    peer: String,
    outgoing: bool,
    in_flight_at_stop: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
    /// The thread has given lease and machine back, and only has to say so.
    ended: Arc<Waiting>,
}

impl Current {
    fn is_active(&self) -> bool {
        let ended = self.ended.has_ended();
        self.thread.as_ref().is_some_and(|thread| !ended && !thread.is_finished())
    }
}

/// Ends a wait that only the end of the process, or a new migration, cuts short: for the settlement of a hand-over, or for a
/// source that does not know yet that its guest has arrived.
#[derive(Default)]
struct Waiting {
    ended: AtomicBool,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Waiting {
    fn end(&self) {
        let _guard = lock(&self.lock);
        self.ended.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Waits for `time`, or less if the wait is ended; says whether it was.
    fn pause(&self, time: Duration) -> bool {
        let guard = lock(&self.lock);
        let goes_on = |(): &mut ()| !self.ended.load(Ordering::SeqCst);
        drop(self.changed.wait_timeout_while(guard, time, goes_on));
        self.ended.load(Ordering::SeqCst)
    }
}

/// Guest memory as the engine names it.
fn ram_blocks(ram: &GuestRam) -> Vec<RamBlock> {
    let block = |block: &crate::memory::RamBlock| RamBlock {
        name: block.name.clone(),
        mapping: Arc::clone(&block.mapping),
    };
    ram.blocks().iter().map(block).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Migrations {
    /// Begins to move the guest to `target`; returns when the migration thread runs.
    ///
    /// # Errors
    /// The address is none, its credentials cannot be used, the guest is not here, or a migration runs already.
    pub fn start(&self, vmm: &Arc<Vmm>, target: MigrationTarget) -> anyhow::Result<()> {
        let uri = Uri::from_str(&target.uri)?;
        let security = Security::chosen(target.tls_dir.as_deref(), target.insecure)?;
        ensure_link(&uri, &security)?;
        let (endpoint, descriptor) = (Endpoint { uri, security }, target.descriptor);
        let (local, storage) = (target.local, target.storage);
        let is_file = matches!(endpoint.uri, Uri::File { .. });
        ensure!(
            !is_file || target.postcopy.is_none(),
            "nobody runs what is in a file before all of it is there: postcopy needs a destination that waits"
        );
        if storage {
            ensure!(!is_file, "a file takes no images along: ferry snapshot copies them");
            ensure!(
                !local,
                "a process of this host can have the images themselves, and not only what is in them"
            );
            ensure!(
                target.postcopy.is_none(),
                "a guest that brings its images waits until all of it has gone"
            );
        }
        let postcopy = target.postcopy.unwrap_or(match self.may_follow() && !storage && !is_file {
            true => PostcopyStart::WhenAsked,
            false => PostcopyStart::Never,
        });
        self.begin(vmm, Job::Move { endpoint, descriptor, local, postcopy, storage })
    }

    /// Begins to move the guest, or to write it into a file; returns when the migration thread runs.
    ///
    /// # Errors
    /// The guest is not here, or a migration runs already.
    pub fn begin(&self, vmm: &Arc<Vmm>, job: Job) -> anyhow::Result<()> {
        // Until it has begun: what a command changes that looks whether there is one, as the namespaces, is what the destination is told of.
        let mut state = vmm.keep_state();
        let mut current = lock(&self.current);
        loop {
            ensure!(!self.closed.load(Ordering::SeqCst), "cannot migrate: the process is ending");
            vmm.run_state().next(Action::BeginMigration)?;
            let blockers = vmm.migration_blockers();
            ensure!(blockers.is_empty(), "this machine cannot move: {}", blockers.join("; "));
            let Some(before) = current.as_mut() else { break };
            let ended = report::qmp_status(before.statistics.snapshot().status)
                .is_some_and(MigrationStatus::is_final);
            if !before.outgoing && before.is_active() && before.statistics.snapshot().status.is_postcopy() {
                bail!("some memory of the guest is still at {}", before.peer);
            }
            if before.outgoing && before.is_active() && !ended {
                bail!("a migration to {} runs already", before.peer);
            }
            // A guest that is ours and goes on: whoever sent it and does not know learns it from the lease.
            self.waiting.end();
            if !before.is_active() {
                before.thread.take().map(JoinHandle::join);
                break;
            }
            // Whoever asks how it goes, resets the guest or ends the process need not wait for a peer that is slow to hear; and the thread
            // that is to end may have a state to change.
            let ended = Arc::clone(&before.ended);
            drop(current);
            drop(state);
            ended.pause(END_INTERVAL);
            state = vmm.keep_state();
            current = lock(&self.current);
        }
        self.waiting.ended.store(false, Ordering::SeqCst);
        // First this, then the machine: what is noted is cleared only after the machine was replaced.
        if let Some(wish) = vmm.guest_waits_for() {
            bail!("cannot migrate: {wish}");
        }
        let machine = vmm.machine().context("there is no machine to migrate")?;
        vmm.take_images_back().context("cannot migrate")?;
        // Here and not on its thread: a cancel that follows on the command must not be lost.
        self.parameters.begin();
        self.parameters.set_local(matches!(job, Job::Move { local: true, .. }));
        self.parameters.set_storage(matches!(job, Job::Move { storage: true, .. }));
        self.parameters.set_postcopy(PostcopyStart::Never);
        if let Job::Move { endpoint, postcopy, .. } = &job {
            self.parameters.set_postcopy(*postcopy);
            self.ways.begin(Some(endpoint));
        }
        let in_flight_at_stop = Arc::new(AtomicU32::new(0));
        let mut source = Source::new(vmm, machine, Arc::clone(&in_flight_at_stop));
        let statistics = statistics(vmm);
        let peer = job.to_string();
        let ended = Arc::new(Waiting::default());
        let thread = std::thread::Builder::new().name("migration".to_owned()).spawn({
            let (vmm, statistics, ended) = (Arc::clone(vmm), Arc::clone(&statistics), Arc::clone(&ended));
            move || {
                vmm.migrations.send(&vmm, &mut source, job, &statistics);
                drop(source);
                ended.end();
                vmm.request(Request::MigrationEnded);
            }
        })?;
        let thread = Some(thread);
        *current = Some(Current { statistics, peer, outgoing: true, in_flight_at_stop, thread, ended });
        drop(state);
        Ok(())
    }

    /// The migration thread of a source.
    fn send(&self, vmm: &Vmm, source: &mut Source, job: Job, statistics: &Statistics) {
        // Of images that go along each end has a lease of its own: it says where they are, and decides nothing.
        let with_storage = matches!(job, Job::Move { storage: true, .. });
        let mut lease = if with_storage { None } else { vmm.take_lease() };
        let patience = Patience::default();
        let mut context =
            Context { lease: lease.as_mut(), parameters: &self.parameters, statistics, patience };
        let (endpoint, mut descriptor) = match job {
            Job::Move { endpoint, descriptor, .. } => (endpoint, descriptor),
            Job::Snapshot { path, options } => {
                if let Err(failed) = engine::snapshot_to_file(source, &path, &options, &mut context) {
                    log::warn!("there is no snapshot {}: {}", path.display(), failed.error.chain());
                }
                vmm.return_lease(lease);
                return;
            }
        };
        let mut dial = || {
            // It may be another since a recovery.
            let endpoint = self.ways.endpoint().unwrap_or_else(|| endpoint.clone());
            Ok(match descriptor.take() {
                Some(descriptor) => endpoint.connect_over(descriptor, patience.connect)?,
                None => endpoint.connect(patience.connect)?,
            })
        };
        let mut outcome = match &endpoint.uri {
            Uri::File { path, layout } => engine::suspend_to_file(source, path, *layout, &mut context),
            Uri::Unix(_) | Uri::Tcp { .. } | Uri::Fd(_) => engine::migrate(source, &mut dial, &mut context),
        };
        while let Outcome::Unknown(handover) = outcome {
            if self.waiting.pause(SETTLE_INTERVAL) {
                break;
            }
            outcome = handover.resolve(source, &mut dial, &mut context);
        }
        if !with_storage {
            vmm.return_lease(lease);
        }
    }

    /// Begins to wait for a guest from `endpoint`, which may be the socket `descriptor`.
    ///
    /// # Errors
    /// Nobody can listen there.
    pub fn expect(
        &self,
        vmm: &Arc<Vmm>,
        endpoint: &Endpoint,
        descriptor: Option<OwnedFd>,
    ) -> anyhow::Result<()> {
        let uri = &endpoint.uri;
        ensure_link(uri, &endpoint.security)?;
        let listener = match (uri, descriptor) {
            (Uri::File { .. }, _) => None,
            (_, Some(descriptor)) => Some(Listener::over(descriptor, endpoint)?),
            (_, None) => Some(Listener::bind_endpoint(endpoint)?),
        };
        self.ways.begin(Some(endpoint));
        let statistics = statistics(vmm);
        let peer = listener.as_ref().map_or(uri, Listener::uri).to_string();
        log::info!("waiting for a guest from {peer}");
        let ended = Arc::new(Waiting::default());
        let thread = std::thread::Builder::new().name("migration".to_owned()).spawn({
            let (vmm, uri, statistics) = (Arc::clone(vmm), uri.clone(), Arc::clone(&statistics));
            let ended = Arc::clone(&ended);
            move || {
                let mut lease = vmm.take_lease();
                let result =
                    vmm.migrations.receive(&vmm, lease.as_mut(), &uri, listener.as_ref(), &statistics);
                if vmm.images_come.is_none() {
                    vmm.return_lease(lease);
                }
                ended.end();
                if let Err(error) = result {
                    vmm.request(Request::IncomingFailed(error));
                }
            }
        })?;
        let (in_flight_at_stop, thread) = (Arc::default(), Some(thread));
        *lock(&self.current) =
            Some(Current { statistics, peer, outgoing: false, in_flight_at_stop, thread, ended });
        Ok(())
    }

    /// The migration thread of a destination.
    fn receive(
        &self,
        vmm: &Arc<Vmm>,
        lease: Option<&mut engine::lease::Lease>,
        uri: &Uri,
        listener: Option<&Listener>,
        statistics: &Statistics,
    ) -> anyhow::Result<()> {
        if let Uri::File { path, .. } = uri {
            let mut factory = Factory::new(vmm, GuestTime::File);
            let how = vmm.restoring();
            let restored = engine::restore_from_file(
                &mut factory,
                path,
                (how.0, &how.1),
                lease,
                &self.parameters,
                statistics,
            )?;
            vmm.keep_made();
            if let Some(error) = restored.error {
                log::error!(
                    "the guest is restored but could not be started, and is paused: {}",
                    error.chain()
                );
            }
            settle_interrupts(vmm);
            // The guest runs; a migration of it waits for the end of this thread.
            if let Some(fill) = &restored.fill
                && fill.run(&self.parameters, statistics)
            {
                log::info!("all memory of the guest is here");
            }
            return Ok(());
        }
        let listener = listener.context("a link has a listener")?;
        let mut destination = Destination::new(lease, statistics, Patience::default(), &self.parameters)?;
        let Some(mut arrived) = destination.receive(&mut Factory::new(vmm, GuestTime::Live), listener)?
        else {
            return Ok(());
        };
        if let Some(error) = arrived.error.take() {
            log::error!("the guest has arrived but could not be started, and is paused: {}", error.chain());
        }
        settle_interrupts(vmm);
        let lacked_memory = arrived.lacks_memory();
        let door = ProcessDoor { first: listener, ways: &self.ways };
        if let Err(error) = destination.answer(&mut arrived, &door, &self.waiting.ended) {
            // The guest is here, and goes on; or its memory cannot be brought, which ends the process.
            match lacked_memory {
                true => log::error!("{}", error.chain()),
                false => {
                    log::warn!("the source may not know that its guest has arrived: {}", error.chain());
                }
            }
        }
        if lacked_memory {
            // What the guest asked for meanwhile is served now.
            vmm.request(Request::MemoryArrived);
        }
        Ok(())
    }

    /// Asks an outgoing migration to end with the guest here. Says whether there is one.
    pub fn cancel(&self) -> bool {
        let current = lock(&self.current);
        let active = current.as_ref().is_some_and(|current| current.outgoing && current.is_active());
        if active {
            self.parameters.cancel();
        }
        active
    }

    /// Takes the word of an operator on a hand-over that is undecided; the migration thread acts on it, unless the destination
    /// answers after all.
    ///
    /// # Errors
    /// There is no such hand-over, or there is a lease, which alone decides.
    pub fn decide(&self, vmm: &Vmm, word: Word) -> anyhow::Result<()> {
        vmm.run_state().next(Action::Decide(word))?;
        if let Some(reason) = vmm.lease_decides() {
            bail!("cannot decide where the guest is: {reason}");
        }
        self.parameters.say(word);
        Ok(())
    }

    /// The capability `postcopy-ram`: whether memory may follow after the guest in migrations that do not say themselves.
    #[must_use]
    pub fn may_follow(&self) -> bool {
        self.may_follow.load(Ordering::Relaxed)
    }

    /// See [`may_follow`](Self::may_follow).
    pub fn set_may_follow(&self, on: bool) {
        self.may_follow.store(on, Ordering::Relaxed);
    }

    /// Whether the guest is on its way to somewhere else.
    pub fn is_leaving(&self) -> bool {
        lock(&self.current).as_ref().is_some_and(|current| current.outgoing && current.is_active())
    }

    /// Ends whatever goes on, in order: the process is to end. An undecided hand-over stays undecided.
    pub fn stop(&self) {
        let thread = {
            let mut current = lock(&self.current);
            self.closed.store(true, Ordering::SeqCst);
            self.parameters.cancel();
            self.parameters.abandon();
            self.waiting.end();
            current.as_mut().and_then(|current| current.thread.take())
        };
        thread.map(JoinHandle::join);
    }

    /// The limits of migrations.
    #[must_use]
    pub fn limits(&self) -> MigrationParameters {
        let downtime_limit = self.parameters.downtime_limit().as_millis();
        MigrationParameters {
            downtime_limit: u64::try_from(downtime_limit).unwrap_or(u64::MAX),
            max_bandwidth: self.parameters.max_bandwidth(),
            convergence: self.parameters.convergence().into(),
            multifd_channels: self.parameters.channels(),
            multifd_compression: self.parameters.compression().into(),
        }
    }

    /// Changes the limits, of a migration that runs too.
    ///
    /// # Errors
    /// Memory is to follow when time is used up, of a migration that runs and has not been begun so that it can. Nothing is changed.
    pub fn set_limits(&self, limits: MigrationParameters) -> anyhow::Result<()> {
        let follows =
            |convergence: engine::Convergence| convergence.on_timeout == engine::OnTimeout::Postcopy;
        let is_new = follows(limits.convergence.into()) && !follows(self.parameters.convergence());
        let is_too_late = self.is_leaving() && self.parameters.postcopy_is_left_out();
        ensure!(
            !is_new || !is_too_late,
            "x-ferry-on-timeout cannot become postcopy for the migration that runs: its two sides have agreed that the guest brings all \
             of its memory (begin it with the capability postcopy-ram, or with that way out)"
        );
        self.parameters.set_downtime_limit(Duration::from_millis(limits.downtime_limit));
        self.parameters.set_max_bandwidth(limits.max_bandwidth);
        self.parameters.set_convergence(limits.convergence.into());
        self.parameters.set_channels(limits.multifd_channels);
        self.parameters.set_compression(limits.multifd_compression.into());
        Ok(())
    }
}

/// What a guest that has arrived was not to wait for.
fn settle_interrupts(vmm: &Vmm) {
    if let Some(machine) = vmm.machine()
        && let Err(error) = machine.settle_interrupts()
    {
        log::warn!("the guest's interrupts arrive, but not as fast as they could: {error:#}");
    }
}

/// What is said about a link is not said about a file.
fn ensure_link(uri: &Uri, security: &Security) -> anyhow::Result<()> {
    let is_file = matches!(uri, Uri::File { .. });
    ensure!(
        !is_file || matches!(security, Security::ThisHost),
        "{uri} is a file, and no link that could be secure or insecure"
    );
    Ok(())
}

fn statistics(vmm: &Vmm) -> Arc<Statistics> {
    let events = Arc::clone(&vmm.events);
    Arc::new(Statistics::with_listener(move |status: Status| {
        match report::qmp_status(status) {
            // To QMP it is what it was before.
            _ if status == Status::HandoverUnknown => events.emit(Event::HandoverUnknown),
            Some(status) => events.emit(Event::Migration { status }),
            None => {}
        }
    }))
}
