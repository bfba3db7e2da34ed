//! Whole migrations of a mock machine, in one process, on the real protocol, the real lease and real sockets.

mod migrate;
mod mock;

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use transport::Connection;
use transport::faulty::{self, Fault, Witness};

use crate::{
    Arrived, Context, Destination, Error, Outcome, Parameters, Patience, Statistics, migrate as move_out,
};
use mock::{Arriving, Factory, Source, World};

/// Short where a test waits for the end of it, long where only a hang would see the end of it.
pub fn patience() -> Patience {
    Patience {
        connect: Duration::from_secs(10),
        handshake: Duration::from_millis(500),
        build: Duration::from_secs(10),
        silence: Duration::from_millis(500),
        prepare: Duration::from_millis(500),
        answer: Duration::from_millis(500),
        settle: Duration::from_millis(200),
        retry: Duration::from_millis(5),
        last_words: Duration::from_millis(200),
    }
}

/// Which end a fault sits at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

/// One migration to be played.
pub struct Play {
    pub world: World,
    pub source: Source,
    pub factory: Factory,
    pub with_lease: bool,
    /// At the first link only.
    pub fault: Option<(End, u32, Fault)>,
    pub parameters: Parameters,
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

impl Play {
    pub fn new(world: &World) -> Self {
        Self {
            world: world.clone(),
            source: Source::new(world, "source"),
            factory: Factory::new(world, "destination"),
            with_lease: true,
            fault: None,
            parameters: Parameters::new(),
        }
    }

    /// Lets both sides run until both have ended.
    pub fn run(self) -> Ending {
        let Self { world, mut source, mut factory, with_lease, mut fault, parameters } = self;
        let (links, arriving) = channel::<Connection>();
        let (mut source_lease, mut destination_lease) = (None, None);
        if with_lease {
            let mut lease = world.lease("source");
            lease.claim().unwrap();
            source_lease = Some(lease);
            destination_lease = Some(world.lease("destination"));
        }
        let (source_statistics, destination_statistics) = (Statistics::new(), Statistics::new());
        let witness: Mutex<Option<Witness>> = Mutex::default();
        let (source_end, received) = std::thread::scope(|scope| {
            let statistics = &destination_statistics;
            let receiving = scope.spawn(move || {
                let parameters = Parameters::new();
                let lease = destination_lease.as_mut();
                let mut destination = Destination::new(lease, statistics, patience(), &parameters).unwrap();
                let arrived = wait_for_guest(&mut destination, &mut factory, &arriving);
                (arrived, destination_lease)
            });
            let (statistics, parameters, witness) = (&source_statistics, &parameters, &witness);
            let sending = scope.spawn(move || {
                // Owns the way to the destination: when this thread ends, the destination's wait ends.
                let mut dial = || -> Result<Connection, Error> {
                    let (mut near, mut far) = Connection::pair()?;
                    if let Some((end, at, fault)) = fault.take() {
                        let side = if end == End::Source { &mut near } else { &mut far };
                        let (spare, _) = Connection::pair()?;
                        let (wrapped, new) = faulty::wrap(std::mem::replace(side, spare), at, fault);
                        *side = wrapped;
                        *witness.lock().unwrap() = Some(new);
                    }
                    send(&links, far)?;
                    Ok(near)
                };
                let mut context =
                    Context { lease: source_lease.as_mut(), parameters, statistics, patience: patience() };
                let outcome = move_out(&mut source, &mut dial, &mut context);
                (outcome, source, source_lease)
            });
            (sending.join(), receiving.join())
        });
        // The leases live until here: a process that ended well still holds its own.
        let source_end = source_end.ok().map(|(outcome, source, _lease)| (outcome, source));
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
) -> Option<Arrived<Arriving>> {
    let mut arrived = None;
    while let Ok(connection) = arriving.recv() {
        match &mut arrived {
            None => arrived = destination.serve(factory, connection),
            Some(arrived) => destination.answer_one(arrived, connection),
        }
    }
    arrived
}
