//! The process: one virtual machine, its run state, its owner, and whoever asks something of it.
//!
//! Requests come from the guest (vCPU threads), from signals, from control clients and from migrations, and meet here.
//! What must happen at once (stop, continue) happens on the thread that asks, under the *transition* lock; what ends or
//! rebuilds the machine is sent to the main thread. Locks: migration (`migrate`), then transition, then the others, none
//! of which is held while another is taken.
//!
//! Invariants:
//! - vCPUs run only in [`RunState::Running`], and every change of the run state goes through [`RunState::next`].
//! - A guest event is noted before its vCPU stops, so a migration that has stopped all vCPUs knows whether the guest asked
//!   for its end: it then fails, and the event is served here. No event is lost between two processes.
//! - Images are held and the lease says `owned` for as long as the machine could run here.

mod clone;
mod descriptors;
pub(crate) mod marks;
mod operations;
pub(crate) mod ownership;
pub mod phases;
mod signals;
#[cfg(test)]
pub(crate) mod tests;

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use engine::lease::Lease;
use engine::{Reading, Taking};
use transport::{Endpoint, Security, Uri, inherit};

use crate::cli::RunArguments;
use crate::config::MachineSpec;
use crate::console::Console;
use crate::control::{Event, EventBus, Server, ShutdownCause};
use crate::kvm::Host;
use crate::machine::{Action, EventSink, GuestEvent, Machine, Refused, Resources, RunState};
use crate::migrate::{ImagesCome, Migrations};
use crate::startup::{self, Step};
pub(crate) use descriptors::has_room;

/// How long clients may still ask how the guest has left, before the process ends.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long the requests of a process that was killed may keep its images locked.
pub const LAST_REQUESTS: Duration = Duration::from_secs(10);

/// How long the end of a guest waits for memory that is on its way.
const LAST_PAGES: Duration = Duration::from_secs(1);

/// What keeps a guest from being started, and is given up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Despite {
    /// It lies in a file.
    pub discard_suspended: bool,
    /// It has gone elsewhere with its images.
    pub force_stale: bool,
}

/// What the main thread is asked to do.
#[derive(Debug)]
pub enum Request {
    /// The guest did something that ends or rebuilds its machine. It is in [`Vmm::pending`].
    GuestEvent,
    /// End, because a signal said so.
    Signal(i32),
    /// End, because a client said so.
    Quit,
    /// A migration away has ended, well or not.
    MigrationEnded,
    /// The guest, which ran ahead of its memory, has all of it now, or never will.
    MemoryArrived,
    /// Some memory of the guest that runs cannot be had; why.
    MemoryLost(anyhow::Error),
    /// The wait for an incoming guest has ended without one.
    IncomingFailed(anyhow::Error),
}

/// The process.
pub struct Vmm {
    /// The machine that was asked for.
    pub spec: MachineSpec,
    /// KVM.
    pub host: Host,
    /// The guest's console.
    pub console: Mutex<Console>,
    /// Where events are told.
    pub events: Arc<EventBus>,
    /// Outgoing migrations.
    pub migrations: Migrations,
    /// The lease, while nobody works with it.
    lease: Mutex<Option<Lease>>,
    requests: Sender<Request>,
    pending: Mutex<Option<GuestEvent>>,
    /// Held while something changes the run state together with the vCPUs.
    transition: Mutex<()>,
    run_state: Mutex<RunState>,
    machine: Mutex<Option<Arc<Machine>>>,
    exit_when_migrated: bool,
    /// How a guest comes out of a file.
    restoring: (Reading, Taking),
    /// A guest that comes brings its images.
    pub images_come: Option<ImagesCome>,
    /// What a guest writes that comes out of a file is noted from its start.
    track: bool,
    /// What was made for a clone, until its guest is there.
    made: Mutex<clone::Made>,
}

/// Runs the virtual machine of `arguments` until it ends.
///
/// # Errors
/// It cannot be built, a vCPU cannot go on, or no guest arrives.
pub fn run(arguments: &RunArguments) -> anyhow::Result<()> {
    // First: nothing of ours may have its number.
    let inherited = match &arguments.incoming {
        Some(uri @ Uri::Fd(name)) => {
            let number = uri.descriptor_number();
            Some(inherit(
                number.with_context(|| format!("--incoming fd:{name}: not the number of a descriptor"))?,
            )?)
        }
        _ => None,
    };
    if arguments.exit_with_parent {
        signals::end_with_parent()?;
    }
    let spec = arguments.machine()?;
    descriptors::make_room(&spec);
    let (vmm, requests) = Vmm::new(spec, arguments)?;
    let result = live(&vmm, &requests, arguments, inherited);
    // Here, since threads may hold the process until its end.
    drop(std::mem::take(&mut *lock(&vmm.made)));
    result
}

/// From the first guest, or the wait for one, to the end.
fn live(
    vmm: &Arc<Vmm>,
    requests: &Receiver<Request>,
    arguments: &RunArguments,
    inherited: Option<OwnedFd>,
) -> anyhow::Result<()> {
    let server =
        arguments.api.as_deref().map(|path| Server::start(path, vmm.operations(), Arc::clone(&vmm.events)));
    let server = server.transpose()?;
    signals::forward(vmm.requests.clone())?;
    vmm.start_console()?;
    if !ownership::has_lease(&vmm.spec)? {
        log::warn!(
            "there is no lease record: a migration that breaks at its very end needs an operator who knows where the guest is; \
             name a file with --lease PATH to have that decided"
        );
    }
    startup::done(Step::Process);
    match &arguments.incoming {
        None => vmm.boot_first(Despite {
            discard_suspended: arguments.discard_suspended,
            force_stale: arguments.force_stale,
        })?,
        Some(uri) => {
            if vmm.images_come.is_none() {
                marks::check(&vmm.spec, Despite::default())?;
            }
            let lease = match (arguments.clone, vmm.images_come) {
                (true, _) => vmm.open_lease_of_clone()?,
                // It is made with the images, when they come.
                (false, Some(_)) => None,
                (false, None) => ownership::open_existing_lease(&vmm.spec)?,
            };
            vmm.return_lease(lease);
            let security = Security::chosen(arguments.tls_dir.as_deref(), arguments.insecure)?;
            vmm.migrations.expect(vmm, &Endpoint { uri: uri.clone(), security }, inherited)?;
        }
    }
    let result = vmm.serve(requests);
    let ended = vmm.end();
    if let Some(server) = &server
        && vmm.run_state() == RunState::PostMigrate
    {
        server.wait_for_clients_to_leave(LAST_WORDS);
    }
    result.and(ended)
}

impl Vmm {
    fn new(spec: MachineSpec, arguments: &RunArguments) -> anyhow::Result<(Arc<Self>, Receiver<Request>)> {
        let reading = if arguments.verify { Reading::First } else { Reading::OnDemand };
        let is_file = matches!(arguments.incoming, Some(Uri::File { .. }));
        ensure!(is_file || !arguments.track, "--track is for --incoming file:PATH");
        ensure!(
            !is_file || !arguments.with_storage,
            "--with-storage is for a guest that comes over a link: one in a file goes on with the images that it left"
        );
        let (taking, made) = match (&arguments.incoming, arguments.clone) {
            (Some(Uri::File { path, .. }), true) => clone::prepare(&spec, path, arguments.copy_disks)?,
            (_, true) => bail!("--clone is for --incoming file:PATH"),
            (_, false) => (Taking::Once, clone::Made::default()),
        };
        let host = Host::open()?;
        let console = Console::open(&spec.serial)?;
        let (requests, receiver) = channel();
        let run_state = if arguments.incoming.is_some() { RunState::InMigrate } else { RunState::Prelaunch };
        let vmm = Arc::new(Self {
            spec,
            host,
            console: Mutex::new(console),
            events: Arc::new(EventBus::new()),
            migrations: Migrations::default(),
            lease: Mutex::default(),
            requests,
            pending: Mutex::default(),
            transition: Mutex::default(),
            run_state: Mutex::new(run_state),
            machine: Mutex::default(),
            exit_when_migrated: arguments.exit_when_migrated,
            restoring: (reading, taking),
            images_come: arguments.with_storage.then_some(ImagesCome { overwrite: arguments.overwrite }),
            track: arguments.track,
            made: Mutex::new(made),
        });
        Ok((vmm, receiver))
    }

    fn start_console(self: &Arc<Self>) -> anyhow::Result<()> {
        let vmm = Arc::downgrade(self);
        let type_in = move |bytes: &[u8]| {
            if let Some(machine) = vmm.upgrade().and_then(|vmm| vmm.machine()) {
                machine.type_in(bytes);
            }
        };
        Ok(lock(&self.console).start_input(Arc::new(type_in))?)
    }

    /// The first boot: becomes the owner, builds the machine, starts it.
    fn boot_first(self: &Arc<Self>, despite: Despite) -> anyhow::Result<()> {
        ownership::check(&self.spec, despite)?;
        marks::check(&self.spec, despite)?;
        let resources = Arc::new(Resources::open(&self.spec, false)?);
        self.acquire_images(&resources)?;
        // Again, now that nobody else has them: a guest may have left with one meanwhile.
        marks::settle(&self.spec, despite)?;
        let machine = self.boot(resources)?;
        // Last, so that a machine that cannot be built leaves no trace.
        let mut lease = ownership::open_lease(&self.spec)?;
        if let Some(lease) = &mut lease {
            ownership::claim(lease, despite)?;
        }
        marks::forget(&self.spec);
        self.return_lease(lease);
        startup::done(Step::Ownership);
        // A destination looks for it.
        machine.keep_state();
        self.install(machine, Action::Start, Machine::resume)
    }

    /// Takes the images. Those of an owner that was killed stay locked until the kernel has finished its requests: that is
    /// waited for.
    fn acquire_images(&self, resources: &Resources) -> Result<(), block::Error> {
        let mut told = false;
        resources.acquire_images_within(LAST_REQUESTS, |error| {
            let wait = ownership::is_orphaned(&self.spec);
            if wait && !told {
                log::warn!(
                    "{error}; the guest's owner is gone, so the end of its last requests is waited for"
                );
                told = true;
            }
            wait
        })
    }

    /// A machine whose guest boots from its kernel, on memory and images that are there.
    fn boot(self: &Arc<Self>, resources: Arc<Resources>) -> anyhow::Result<Machine> {
        let machine = self.prepare_machine(resources)?;
        machine.boot(&self.spec)?;
        Ok(machine)
    }

    /// Makes everything that does not depend on the guest.
    ///
    /// # Errors
    /// Those of [`Machine::prepare`].
    pub fn prepare_machine(self: &Arc<Self>, resources: Arc<Resources>) -> anyhow::Result<Machine> {
        let vmm = Arc::downgrade(self);
        let sink: EventSink = Arc::new(move |event| {
            if let Some(vmm) = vmm.upgrade() {
                // The first event counts: what a guest does while it is being reset or switched off does not.
                lock(&vmm.pending).get_or_insert(event);
                // The main thread lives as long as the machine.
                let _ = vmm.requests.send(Request::GuestEvent);
            }
        });
        let console = lock(&self.console);
        let machine = Machine::prepare(&self.spec, &self.host, resources, &console, &sink)?;
        startup::done(Step::Machine);
        Ok(machine)
    }

    /// Makes `machine`, whose guest is ours by now, the one that commands go to, and takes the first `action` with it: no
    /// command comes before.
    ///
    /// # Errors
    /// As [`Self::act`]. The machine is there all the same.
    pub fn install<T>(
        &self,
        machine: Machine,
        action: Action,
        effect: impl FnOnce(&Machine) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let _transition = lock(&self.transition);
        *lock(&self.machine) = Some(Arc::new(machine));
        self.change(action, effect).map(|(_, value)| value)
    }

    /// The machine, if there is one.
    #[must_use]
    pub fn machine(&self) -> Option<Arc<Machine>> {
        lock(&self.machine).clone()
    }

    /// How a guest comes out of a file: when its memory is read, and whose it becomes.
    #[must_use]
    pub fn restoring(&self) -> (Reading, Taking) {
        self.restoring.clone()
    }

    /// The record of a clone, which is made like its images, unless one was named that is there.
    fn open_lease_of_clone(&self) -> anyhow::Result<Option<Lease>> {
        let is_there = matches!(ownership::open_existing_lease(&self.spec), Ok(Some(_)));
        let lease = ownership::open_lease(&self.spec)?;
        if let (false, Some(lease)) = (is_there, &lease) {
            lock(&self.made).add(lease.path());
        }
        Ok(lease)
    }

    /// Whether what a guest writes that comes out of a file is noted from its start, so that the file can be the parent of a snapshot.
    #[must_use]
    pub fn tracks_from_its_file(&self) -> bool {
        self.track
    }

    /// The guest has come out of its file: what was made for it is its own.
    pub fn keep_made(&self) {
        lock(&self.made).keep();
    }

    /// Why the machine cannot migrate: all the reasons, none if it can.
    #[must_use]
    pub fn migration_blockers(&self) -> Vec<String> {
        self.machine().map(|machine| machine.migration_blockers()).unwrap_or_default()
    }

    /// The run state now.
    #[must_use]
    pub fn run_state(&self) -> RunState {
        *lock(&self.run_state)
    }

    /// What the guest, or a client for it, asked for and has not got yet.
    #[must_use]
    pub fn guest_waits_for(&self) -> Option<&'static str> {
        lock(&self.pending).as_ref().map(|event| match event {
            GuestEvent::Reset => "the guest is to be reset",
            GuestEvent::PowerOff => "the guest asked to be powered off",
            GuestEvent::Failed(_) => "a vCPU cannot go on",
        })
    }

    /// Why no operator may decide whose the guest is, if so.
    #[must_use]
    pub fn lease_decides(&self) -> Option<String> {
        ownership::decides_alone(&self.spec)
    }

    /// Notes a reset that a client wants as one that the guest wants, with all that follows: a migration that is under way ends
    /// first, and one that has stopped the guest already has it, and refuses.
    ///
    /// # Errors
    /// There is no guest here that may run.
    pub fn ask_for_reset(&self) -> Result<(), Refused> {
        let _transition = lock(&self.transition);
        self.run_state().next(Action::Reset)?;
        lock(&self.pending).get_or_insert(GuestEvent::Reset);
        self.request(Request::GuestEvent);
        Ok(())
    }

    /// Takes the lease out, to work with it.
    #[must_use]
    pub fn take_lease(&self) -> Option<Lease> {
        lock(&self.lease).take()
    }

    /// Puts the lease back.
    pub fn return_lease(&self, lease: Option<Lease>) {
        *lock(&self.lease) = lease;
    }

    /// Says beside the images of a guest that is here that they are its own, if a failed migration has left there that they have moved.
    ///
    /// # Errors
    /// It cannot be said: whoever starts the guest here the next time would be refused.
    pub fn take_images_back(&self) -> anyhow::Result<()> {
        let mut lease = lock(&self.lease);
        let Some(lease) = lease.as_mut() else { return Ok(()) };
        lease.take_back_what_moved()?;
        // What is said beside each was made to hold whatever the lease says, as long as that could not be taken back.
        Ok(marks::take_back(&self.spec, lease.owner())?)
    }

    /// Asks the main thread for something.
    pub fn request(&self, request: Request) {
        // It lives until the process ends.
        let _ = self.requests.send(request);
    }

    /// Changes the run state by `action`, and the machine by `effect`. If `effect` fails the state stays. What `effect`
    /// does may depend on the run state, which nobody changes meanwhile; what was read before may be over.
    ///
    /// # Errors
    /// The action has no meaning now, there is no machine, or `effect` failed.
    pub fn act<T>(
        &self,
        action: Action,
        effect: impl FnOnce(&Machine) -> anyhow::Result<T>,
    ) -> anyhow::Result<(RunState, T)> {
        let _transition = lock(&self.transition);
        self.change(action, effect)
    }

    /// Keeps the run state, and the machine with it, as they are until this is dropped. Whoever takes the lock of the migrations as well
    /// takes this first.
    pub fn keep_state(&self) -> MutexGuard<'_, ()> {
        lock(&self.transition)
    }

    /// [`Self::act`] for who holds the transition lock.
    fn change<T>(
        &self,
        action: Action,
        effect: impl FnOnce(&Machine) -> anyhow::Result<T>,
    ) -> anyhow::Result<(RunState, T)> {
        let before = self.run_state();
        let after = before.next(action)?;
        let machine = self.machine().with_context(|| Refused { action, state: before }.to_string())?;
        let value = effect(&machine)?;
        *lock(&self.run_state) = after;
        match (before.is_running(), after.is_running()) {
            (true, false) => self.events.emit(Event::Stop),
            (false, true) => self.events.emit(Event::Resume),
            _ => {}
        }
        Ok((after, value))
    }

    /// The main thread, until the process is to end.
    fn serve(self: &Arc<Self>, requests: &Receiver<Request>) -> anyhow::Result<()> {
        for request in requests {
            match request {
                Request::GuestEvent => {
                    if let Some(reason) = self.serve_guest_event()? {
                        return self.shut_down(reason);
                    }
                }
                Request::Signal(_) => match self.migrations.guest_needs_this_process() {
                    // The second one ends the process at once.
                    Some(reason) => log::error!("not ended by a signal: {reason} by another signal"),
                    None => return self.shut_down(ShutdownCause::HostSignal),
                },
                Request::Quit => return self.shut_down(ShutdownCause::HostQmpQuit),
                Request::MigrationEnded => {
                    if self.run_state() == RunState::PostMigrate {
                        *lock(&self.machine) = None;
                        if self.exit_when_migrated {
                            return Ok(());
                        }
                    } else if let Some(reason) = self.serve_guest_event()? {
                        return self.shut_down(reason);
                    }
                }
                Request::MemoryArrived => {
                    self.finish_stop();
                    if let Some(reason) = self.serve_guest_event()? {
                        return self.shut_down(reason);
                    }
                }
                Request::MemoryLost(error) => return self.give_up(error),
                Request::IncomingFailed(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Does what the guest asked for. A migration that is under way is cancelled, and the event is served when it has given the
    /// machine back; a disk that does not finish its commands is waited for, with the guest stopped. Returns why the machine
    /// has ended, if it has.
    fn serve_guest_event(self: &Arc<Self>) -> anyhow::Result<Option<ShutdownCause>> {
        // It stays noted until it is served: no migration begins with a machine that is to go. Without one a migration that has begun
        // since the last ended is nobody's to cancel.
        let asks_for_reset = match &*lock(&self.pending) {
            None => return Ok(None),
            Some(event) => matches!(event, GuestEvent::Reset),
        };
        // A machine that is reset or halted touches memory: it has to be here.
        if self.migrations.cancel() || self.migrations.guest_lacks_memory() {
            return Ok(None);
        }
        if let Some(GuestEvent::Failed(error)) =
            lock(&self.pending).take_if(|event| matches!(event, GuestEvent::Failed(_)))
        {
            self.act(Action::Fail, |_| Ok(()))?;
            self.events.emit(Event::Shutdown { reason: ShutdownCause::HostError });
            return Err(error);
        }
        let served = if asks_for_reset {
            self.reset().context("cannot reset the guest").map(|()| None)
        } else {
            let off = self.act(Action::PowerOff, Machine::halt).context("cannot power the guest off");
            off.map(|_| Some(ShutdownCause::GuestShutdown))
        };
        match served {
            Err(error) if disk_is_busy(&error) => {
                log::warn!("{error:#}; waiting for it");
                self.request(Request::GuestEvent);
                Ok(None)
            }
            served => served,
        }
    }

    /// Drops the machine and boots a new one on the same memory and images, which stay held.
    fn reset(self: &Arc<Self>) -> anyhow::Result<()> {
        // To the end: a command that came between would find a machine that is going or one that is not ready.
        let _transition = lock(&self.transition);
        let (state, resources) = self.change(Action::Reset, |machine| {
            machine.halt()?;
            machine.keep_state();
            Ok(Arc::clone(machine.resources()))
        })?;
        *lock(&self.machine) = None;
        // What the guest did between its request and now belongs to the life before.
        *lock(&self.pending) = None;
        let machine = self.boot(resources)?;
        if state.is_running() {
            machine.resume()?;
        }
        *lock(&self.machine) = Some(Arc::new(machine));
        Ok(())
    }

    /// Some of the guest's memory cannot be had. Threads of its devices may wait for it for ever, so nothing waits for them: the vCPUs
    /// stop, and the process ends as if it were killed, with the sentence that says why. What the guest has written is in its images.
    fn give_up(&self, error: anyhow::Error) -> anyhow::Result<()> {
        let failed = self.act(Action::Fail, Machine::kick_out);
        if let Err(error) = failed {
            log::error!("the guest cannot be stopped: {error:#}");
        }
        self.events.emit(Event::Shutdown { reason: ShutdownCause::HostError });
        // There is nothing more to be done with it, and its threads are not to be joined.
        std::mem::forget(lock(&self.machine).take());
        Err(error.context("the guest cannot go on"))
    }

    fn shut_down(&self, reason: ShutdownCause) -> anyhow::Result<()> {
        self.events.emit(Event::Shutdown { reason });
        Ok(())
    }

    /// The guest's memory does not come at present: it stands still until [`Self::find_memory`].
    ///
    /// # Errors
    /// There is no guest that could.
    pub fn lose_memory(&self) -> anyhow::Result<()> {
        let hold = |machine: &Machine| {
            if self.run_state().is_running()
                && let Err(error) = machine.hold()
            {
                // It was told to, and does so as soon as it can.
                log::error!("the guest's memory does not come, but the guest does not stop: {error:#}");
            }
            Ok(())
        };
        self.act(Action::LoseMemory, hold).map(drop)
    }

    /// It comes again: the guest does what it did, or was told meanwhile.
    ///
    /// # Errors
    /// The guest had not lost any, or cannot go on and stays paused.
    pub fn find_memory(&self) -> anyhow::Result<()> {
        let goes_on = || matches!(self.run_state(), RunState::LacksMemory { was_running: true });
        let let_go = |machine: &Machine| if goes_on() { machine.let_go() } else { Ok(()) };
        let found = self.act(Action::FindMemory, let_go).map(drop);
        if found.is_err() && goes_on() {
            // `cont` tries again.
            self.act(Action::Stop, |_| Ok(()))?;
            self.act(Action::FindMemory, |_| Ok(()))?;
        }
        found
    }

    /// All of the guest's memory is here: one that was stopped before stands still as any that is paused, with nothing in flight.
    fn finish_stop(&self) {
        let _transition = lock(&self.transition);
        if self.run_state() == RunState::Paused
            && let Some(machine) = self.machine()
            && let Err(error) = machine.halt()
        {
            log::warn!("the guest is paused, but: {error:#}");
        }
    }

    /// Stops a guest some of whose memory is not here, if that can be done: what its disks work on waits for pages, which come only as
    /// long as the link is there, and must not find others in their place.
    fn halt_without_memory(&self) -> bool {
        let Some(machine) = self.machine() else { return true };
        !self.migrations.guest_waits_for_memory()
            && machine.hold().is_ok()
            && machine.resources().waiters().end_within(LAST_PAGES)
            && machine.halt().is_ok()
    }

    /// Stops what runs, makes the images stable, and gives up images and lease. A guest that may be elsewhere is left alone.
    fn end(&self) -> anyhow::Result<()> {
        if self.migrations.guest_lacks_memory() && !self.halt_without_memory() {
            return self.give_up(anyhow!("it lacks memory that does not come"));
        }
        self.migrations.stop();
        let _transition = lock(&self.transition);
        let state = self.run_state();
        if matches!(state, RunState::LacksMemory { .. }) {
            drop(_transition);
            return self.give_up(anyhow!("it lacks memory that does not come"));
        }
        let owned = phases::is_released_at_the_end(state);
        let Some(machine) = self.machine() else { return Ok(()) };
        if !owned {
            return Ok(());
        }
        // Clients may still ask: nothing makes the guest run again.
        if let Ok(over) = state.next(Action::PowerOff) {
            *lock(&self.run_state) = over;
        }
        machine.halt().context("cannot stop the guest")?;
        machine.keep_state();
        machine.resources().release_images().context("cannot make the images stable")?;
        self.take_images_back()?;
        if let Some(lease) = lock(&self.lease).as_mut() {
            lease.release()?;
        }
        Ok(())
    }
}

/// Whether a stop failed only because an image takes its time.
fn disk_is_busy(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(nvme::Error::PauseTimeout { .. }))
}

/// A lock whose holder panicked is still good: every value here is replaced as a whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
