//! Whole migrations of a mock machine, in one process, on the real protocol, the real lease and real sockets.

mod chain;
mod channels;
mod convergence;
mod disks;
mod faults;
mod file;
mod fill;
pub(crate) mod fresh;
mod headway;
mod image_files;
mod link;
mod local;
mod migrate;
mod missing;
mod mock;
mod operator;
mod overheard;
pub(crate) mod passed;
mod postcopy;
mod recovery;
mod secure;
mod snapshot;
mod storage;
mod versions;
mod world;

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use transport::faulty::{self, Fault, Witness};
use transport::{Connection, Link};

use crate::lease::Lease;
use crate::{
    Arrived, Context, Destination, Error, Incoming, OnTimeout, Outcome, Parameters, Patience, PostcopyStart,
    Statistics, Status, migrate as move_out,
};
use mock::{Arriving, Factory, Source, World};
use overheard::Overheard;

/// Nothing is waited for that does not come, so these only end a hang.
pub fn patience() -> Patience {
    let long = Duration::from_secs(20);
    Patience {
        connect: long,
        handshake: long,
        build: long,
        silence: long,
        prepare: long,
        stall: long,
        repetition: long,
        throttle: Duration::ZERO,
        stopped: long,
        answer: long,
        settle: long,
        retry: Duration::from_millis(5),
        last_words: long,
    }
}

/// For tests in which the end of a wait is what happens. On a host with other work it may end before anything has: see [`patiently`].
pub fn impatience() -> Patience {
    let short = Duration::from_millis(150);
    Patience {
        handshake: short,
        silence: short,
        prepare: short,
        answer: short,
        last_words: short,
        ..patience()
    }
}

/// Tries `play` with ever more patience, until what it gives is not the end of a wait that was too short for this host.
pub fn patiently<T>(mut patience: Patience, mut play: impl FnMut(Patience) -> Option<T>) -> T {
    let longest = self::patience();
    while patience.handshake <= longest.handshake {
        if let Some(ending) = play(patience) {
            return ending;
        }
        patience = Patience {
            handshake: patience.handshake * 2,
            silence: patience.silence * 2,
            prepare: patience.prepare * 2,
            answer: patience.answer * 2,
            last_words: patience.last_words * 2,
            ..patience
        };
    }
    panic!("it takes more than {:?}", longest.handshake);
}

/// Which end a fault sits at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

/// Hears of changes of status.
pub type Listener = Box<dyn Fn(Status) + Send + Sync>;

/// One migration to be played.
pub struct Play {
    pub world: World,
    pub source: Source,
    pub factory: Factory,
    pub with_lease: bool,
    /// At one link only: the first, unless [`fault_link`](Self::fault_link) says otherwise.
    pub fault: Option<(End, u32, Fault)>,
    /// How many links come before the one with the fault.
    pub fault_link: u32,
    /// The first link is cut when the guest has gone.
    pub breaks_after_handover: bool,
    /// Hears of every change of the source's status, and of the destination's.
    pub listeners: (Option<Listener>, Option<Listener>),
    pub parameters: Arc<Parameters>,
    pub patience: Patience,
    /// Where it is not the source's.
    pub destination_patience: Option<Patience>,
    /// Data channels that the source asks for and the destination lets in; 0: it has no way in for any.
    pub channels: u16,
    /// At the link of the n-th dial after the first, which is channel n.
    pub channel_fault: Option<(End, u16, u32, Fault)>,
    /// Hears of every message that the source writes.
    pub tally: Option<Sender<()>>,
    /// Somebody stands between the two, and passes bytes on.
    pub tunnel: bool,
    /// Hears all that both say.
    pub overheard: Option<Arc<Overheard>>,
    /// Features that the source and the destination, of older builds, know nothing of.
    pub lacking: (u64, u64),
    /// What is sent on the links after the first arrives later.
    pub lag: Duration,
    /// Instead of a handle on the world's lease. The source's is here again afterwards.
    pub source_lease: Arc<Mutex<Option<Lease>>>,
    /// Instead of a handle on the world's lease.
    pub destination_lease: Option<Lease>,
}

/// How it went.
pub struct Ending {
    /// What the source returned and its machine; nothing if it was killed.
    pub source: Option<(Outcome, Source)>,
    /// The guest at the destination.
    pub arrived: Option<Arrived<Arriving>>,
    pub destination_killed: bool,
    pub source_statistics: crate::Snapshot,
    pub destination_statistics: crate::Snapshot,
    pub struck: bool,
}

impl Ending {
    /// Unless nothing happened that was to happen: the fault has struck, or the guest has moved.
    pub fn unless_cut_short(self) -> Option<Self> {
        let moved = matches!(self.source, Some((Outcome::Completed { .. }, _)));
        (self.struck || moved).then_some(self)
    }
}

impl Play {
    pub fn new(world: &World) -> Self {
        Self {
            world: world.clone(),
            source: Source::new(world, "source"),
            factory: Factory::new(world, "destination"),
            with_lease: true,
            fault: None,
            fault_link: 0,
            breaks_after_handover: false,
            listeners: (None, None),
            parameters: Arc::new(Parameters::new()),
            patience: patience(),
            destination_patience: None,
            channels: 0,
            channel_fault: None,
            tally: None,
            tunnel: false,
            overheard: None,
            lacking: (0, 0),
            lag: Duration::ZERO,
            source_lease: Arc::default(),
            destination_lease: None,
        }
    }

    /// The source's lease, to be looked at after the end.
    pub fn with_claimed_lease(&mut self) -> Arc<Mutex<Option<Lease>>> {
        let mut lease = self.world.lease("source");
        lease.claim().unwrap();
        *self.source_lease.lock().unwrap() = Some(lease);
        Arc::clone(&self.source_lease)
    }

    /// Lets both sides run until both have ended.
    pub fn run(self) -> Ending {
        let Self {
            world,
            mut source,
            mut factory,
            with_lease,
            mut fault,
            fault_link,
            mut breaks_after_handover,
            listeners,
            parameters,
            patience,
            destination_patience,
            channels,
            mut channel_fault,
            mut tally,
            tunnel,
            overheard,
            lacking,
            lag,
            source_lease: lease_after,
            mut destination_lease,
        } = self;
        let (links, arriving) = channel::<Connection>();
        let may_follow = parameters.postcopy() != PostcopyStart::Never
            || parameters.convergence().on_timeout == OnTimeout::Postcopy;
        let joins = channels > 0 || may_follow;
        parameters.set_channels(if may_follow { channels } else { channels.max(1) });
        let mut source_lease = lease_after.lock().unwrap().take();
        if with_lease {
            source_lease.get_or_insert_with(|| {
                let mut lease = world.lease("source");
                lease.claim().unwrap();
                lease
            });
            destination_lease.get_or_insert_with(|| world.lease("destination"));
        }
        let watched =
            |listener: Option<Listener>| listener.map_or_else(Statistics::new, Statistics::with_listener);
        let (source_statistics, destination_statistics) = (watched(listeners.0), watched(listeners.1));
        let witness: Mutex<Option<Witness>> = Mutex::default();
        let (source_end, received) = std::thread::scope(|scope| {
            let statistics = &destination_statistics;
            let receiving = scope.spawn(move || {
                crate::features::lack(lacking.1);
                let parameters = Parameters::new();
                let lease = destination_lease.as_mut();
                let patience = destination_patience.unwrap_or(patience);
                let mut destination = Destination::new(lease, statistics, patience, &parameters).unwrap();
                let arrived = wait_for_guest(&mut destination, &mut factory, &arriving, joins);
                (arrived, destination_lease)
            });
            let (statistics, parameters, witness) = (&source_statistics, &parameters, &witness);
            let sending = scope.spawn(move || {
                crate::features::lack(lacking.0);
                let mut dials = 0;
                // Owns the way to the destination: when this thread ends, the destination's wait ends.
                let mut dial = || -> Result<Connection, Error> {
                    let (mut near, mut far) = Connection::pair()?;
                    if std::mem::take(&mut breaks_after_handover) {
                        // Preamble, AGREE, LISTED, PREPARED, RUNNING.
                        far = faulty::wrap(far, 4, Fault::CutAfter).0;
                    }
                    dials += 1;
                    let channel_fault = channel_fault.take_if(|(_, dial, ..)| *dial + 1 == dials);
                    let channel_fault = channel_fault.map(|(end, _, at, fault)| (end, at, fault));
                    let fault = fault.take_if(|_| fault_link + 1 == u32::from(dials));
                    if let Some((end, at, fault)) = fault.or(channel_fault) {
                        let side = if end == End::Source { &mut near } else { &mut far };
                        let (spare, _) = Connection::pair()?;
                        let (wrapped, new) = faulty::wrap(std::mem::replace(side, spare), at, fault);
                        *side = wrapped;
                        *witness.lock().unwrap() = Some(new);
                    }
                    if let Some(tally) = tally.take() {
                        let peer = near.peer().to_owned();
                        near = Connection::new(
                            Box::new(Tally { inner: near, tally, lag: Duration::ZERO }),
                            peer,
                        );
                    }
                    let lag = if dials > 1 { lag } else { Duration::ZERO };
                    if tunnel || !lag.is_zero() {
                        // It reads bytes in the plain way.
                        let peer = far.peer().to_owned();
                        far = Connection::new(Box::new(Tally { inner: far, tally: channel().0, lag }), peer);
                    }
                    if let Some(overheard) = &overheard {
                        (near, far) = (overheard.hear(near), overheard.hear(far));
                    }
                    send(&links, far)?;
                    Ok(near)
                };
                let mut context = Context { lease: source_lease.as_mut(), parameters, statistics, patience };
                let outcome = move_out(&mut source, &mut dial, &mut context);
                (outcome, source, source_lease)
            });
            (sending.join(), receiving.join())
        });
        // The leases live until here: a process that ended well still holds its own.
        let source_end = source_end.ok().map(|(outcome, source, lease)| {
            *lease_after.lock().unwrap() = lease;
            (outcome, source)
        });
        let destination_killed = received.is_err();
        let arrived = received.ok().and_then(|(arrived, _lease)| arrived);
        let struck = witness.lock().unwrap().as_ref().is_none_or(Witness::struck);
        Ending {
            source: source_end,
            arrived,
            destination_killed,
            source_statistics: source_statistics.snapshot(),
            destination_statistics: destination_statistics.snapshot(),
            struck,
        }
    }
}

/// A link that tells of every write, and reads late.
struct Tally {
    inner: Connection,
    tally: Sender<()>,
    lag: Duration,
}

impl Read for Tally {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if !self.lag.is_zero() {
            std::thread::sleep(self.lag);
        }
        Ok(count)
    }
}

impl Write for Tally {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        let _nobody_counts = self.tally.send(());
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl Link for Tally {
    fn try_clone(&self) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(Self { inner: self.inner.try_clone()?, tally: self.tally.clone(), lag: self.lag }))
    }
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.set_read_timeout(timeout)
    }
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.set_write_timeout(timeout)
    }
    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.inner.shutdown(how)
    }
}

fn send(links: &Sender<Connection>, far: Connection) -> Result<(), Error> {
    let refused =
        |_| Error::Lost { doing: "connecting", source: std::io::ErrorKind::ConnectionRefused.into() };
    links.send(far).map_err(refused)
}

/// Serves peers until the source is gone, and answers it after the guest has come.
fn wait_for_guest(
    destination: &mut Destination<'_>,
    factory: &mut Factory,
    arriving: &Receiver<Connection>,
    with_channels: bool,
) -> Option<Arrived<Arriving>> {
    let mut arrived = None;
    while let Ok(connection) = arriving.recv() {
        match &mut arrived {
            None if with_channels => {
                arrived = destination.serve_with(factory, connection, &Door(arriving));
            }
            None => arrived = destination.serve(factory, connection),
            Some(arrived) => destination.answer_one(arrived, connection),
        }
        if let Some(arrived) = &mut arrived
            && arrived.lacks_memory()
        {
            let gone = AtomicBool::new(false);
            // The statistics have it too.
            let _error = destination.answer(arrived, &LastDoor { arriving, gone: &gone }, &gone);
        }
    }
    arrived
}

/// The way in for a source that may come back as long as it lives.
struct LastDoor<'a> {
    arriving: &'a Receiver<Connection>,
    gone: &'a AtomicBool,
}

impl Incoming for LastDoor<'_> {
    fn accept(&self, timeout: Duration) -> Result<Option<Connection>, transport::Error> {
        match self.arriving.recv_timeout(timeout) {
            Ok(connection) => Ok(Some(connection)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                self.gone.store(true, std::sync::atomic::Ordering::SeqCst);
                Ok(None)
            }
        }
    }
}

/// A link to whoever accepts at the other end of `links`.
pub fn connected(links: &Sender<Connection>) -> crate::link::Link {
    let (near, far) = Connection::pair().unwrap();
    links.send(far).unwrap();
    let mut link = crate::link::Link::new(near).unwrap();
    link.greet(migrate::step()).unwrap();
    link
}

/// Where channels come in.
pub struct Door<'a>(pub &'a Receiver<Connection>);

impl Incoming for Door<'_> {
    fn accept(&self, timeout: Duration) -> Result<Option<Connection>, transport::Error> {
        match self.0.recv_timeout(timeout) {
            Ok(connection) => Ok(Some(connection)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            // The way in stays open, as a listener does.
            Err(RecvTimeoutError::Disconnected) => {
                std::thread::sleep(timeout);
                Ok(None)
            }
        }
    }
}
