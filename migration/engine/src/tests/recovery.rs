//! Who may go on with a guest that lacks memory: the source itself, and nobody else who knows a part of what it does.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use certificates::Authority;
use stream::frame::{Header, Kind};
use transport::{Connection, Endpoint, Listener, Security};

use super::migrate::step;
use super::mock::{Factory, Source, World};
use super::overheard::Overheard;
use super::secure::trusting;
use super::{Ending, patience, postcopy};
use crate::link::Link;
use crate::postcopy::Recover;
use crate::protocol::{ChannelHello, Message};
use crate::{Context, Destination, Error, Parameters, Patience, PostcopyStart, Statistics, Status, migrate};

/// Only ends a hang.
const WATCHDOG: Duration = Duration::from_secs(120);

/// A link on which no memory comes until it is cut.
struct Held {
    inner: Connection,
    gate: Arc<Gate>,
}

struct Gate {
    begun: Sender<()>,
    cut: Mutex<Receiver<()>>,
}

impl Read for Held {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer)
    }
}

impl Write for Held {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let header = bytes.first_chunk().and_then(|header| Header::decode(*header).ok());
        if header.is_some_and(|header| header.kind == Kind::Pages) {
            let _nobody_waits = self.gate.begun.send(());
            let _cut = self.gate.cut.lock().unwrap().recv();
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl transport::Link for Held {
    fn try_clone(&self) -> io::Result<Box<dyn transport::Link>> {
        Ok(Box::new(Self { inner: self.inner.try_clone()?, gate: Arc::clone(&self.gate) }))
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

/// Statistics, and every status that they had since it was last asked for.
fn told() -> (Statistics, Receiver<Status>) {
    let (tell, told) = channel();
    (
        Statistics::with_listener(move |status| {
            let _nobody_listens = tell.send(status);
        }),
        told,
    )
}

/// Whether it comes.
fn comes(told: &Receiver<Status>, status: Status) -> bool {
    std::iter::from_fn(|| told.recv_timeout(WATCHDOG).ok()).any(|next| next == status)
}

/// What they were answered who came with another session, with another key, with another certificate, and with a channel for pages that
/// nobody expects.
fn turned_away(endpoints: [&Endpoint; 2], genuine: &ChannelHello) -> Vec<Result<Message, Error>> {
    let [ours, others] = endpoints;
    let ChannelHello { session, key, .. } = *genuine;
    let recover = |session, key| Message::Recover(Recover { session, key });
    let cases = [
        (ours, recover([0xee; 16], key)),
        (ours, recover(session, [0xee; 16])),
        (others, recover(session, key)),
        (ours, Message::Channel(genuine.clone())),
    ];
    let says = |(endpoint, message): (&Endpoint, Message)| {
        let mut link = Link::new(endpoint.connect(WATCHDOG)?)?;
        link.greet(step())?;
        link.send(&message, step())?;
        link.receive(step())
    };
    cases.map(says).into()
}

#[test]
fn nobody_but_its_source_goes_on_with_a_guest_that_lacks_memory() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new("one for all");
    let [source, destination, other] =
        ["source", "destination", "other"].map(|name| trusting(&authority, &folder.path().join(name)));
    let uri = "tcp:127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind_endpoint(&Endpoint { uri, security: destination }).unwrap();
    let endpoint = |security: Security| Endpoint { uri: listener.uri().clone(), security };
    let (ours, others) = (endpoint(source), endpoint(other));

    let world = World::new();
    // It asks for nothing before it is woken.
    world.lock().sleeps = true;
    let patience = Patience { silence: WATCHDOG, ..patience() };
    let (parameters, waiting, stop) = (Parameters::new(), Parameters::new(), AtomicBool::new(false));
    parameters.set_postcopy(PostcopyStart::AtOnce);
    let ((source_statistics, here), (destination_statistics, there)) = (told(), told());
    let overheard = Arc::new(Overheard::default());
    let (begun, begins) = channel();
    let (cut, cuts) = channel();
    let mut gate = Some(Arc::new(Gate { begun, cut: Mutex::new(cuts) }));

    let (moved, mut ending, _leases, seen) = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let mut lease = world.lease("destination");
            let mut factory = Factory::new(&world, "destination");
            let mut destination =
                Destination::new(Some(&mut lease), &destination_statistics, patience, &waiting).unwrap();
            let mut arrived = destination.receive(&mut factory, &listener).unwrap();
            if let Some(arrived) = &mut arrived {
                destination.answer(arrived, &listener, &stop).unwrap();
            }
            (arrived, lease)
        });
        let sending = scope.spawn(|| {
            let mut lease = world.lease("source");
            lease.claim().unwrap();
            let mut source = Source::new(&world, "source");
            let mut dial = || -> Result<Connection, Error> {
                let connection = ours.connect(WATCHDOG)?;
                Ok(match gate.take() {
                    Some(gate) => {
                        let peer = connection.peer().to_owned();
                        Connection::new(Box::new(Held { inner: connection, gate }), peer)
                    }
                    None => overheard.hear(connection),
                })
            };
            let (parameters, statistics) = (&parameters, &source_statistics);
            let mut context = Context { lease: Some(&mut lease), parameters, statistics, patience };
            (migrate(&mut source, &mut dial, &mut context), source, lease)
        });
        // Nothing fails in here, where others wait.
        let moved = begins.recv_timeout(WATCHDOG).is_ok() && comes(&there, Status::PostcopyActive);
        let genuine =
            overheard.messages().into_iter().find_map(|(kind, body)| match Message::decode(kind, &body) {
                Ok(Message::Channel(hello)) => Some(hello),
                _ => None,
            });
        let is_held = || world.missing().is_some_and(|memory| memory.is_held());
        let look = || {
            let answers = genuine.iter().flat_map(|genuine| turned_away([&ours, &others], genuine));
            (answers.collect::<Vec<_>>(), is_held(), there.try_iter().collect::<Vec<_>>())
        };
        there.try_iter().for_each(drop);
        let before = look();
        drop(cut);
        comes(&there, Status::PostcopyPaused);
        let seen = [before, look()];
        comes(&here, Status::PostcopyPaused);
        world.missing().iter().for_each(|memory| memory.wake());
        parameters.recover();
        let (outcome, source, source_lease) = sending.join().unwrap();
        waiting.cancel();
        stop.store(true, Ordering::SeqCst);
        let (arrived, lease) = receiving.join().unwrap();
        let ending = Ending {
            source: Some((outcome, source)),
            arrived,
            destination_killed: false,
            source_statistics: source_statistics.snapshot(),
            destination_statistics: destination_statistics.snapshot(),
            struck: true,
        };
        (moved, ending, (source_lease, lease), seen)
    });
    assert!(moved);
    for ((answers, is_held, statuses), (when, holds)) in
        seen.iter().zip([("its links are there", false), ("it waits for its source", true)])
    {
        let refused = |answer: &Result<Message, Error>| matches!(answer, Ok(Message::Refuse(_)));
        assert!(answers.len() == 4 && answers.iter().all(refused), "while {when}: {answers:?}");
        assert_eq!((*is_held, statuses.as_slice()), (holds, [].as_slice()), "while {when}");
    }
    postcopy::assert_moved(&world, &mut ending, "the source itself");
    for statistics in [&ending.source_statistics, &ending.destination_statistics] {
        assert_eq!(statistics.postcopy.as_ref().map(|postcopy| postcopy.recoveries), Some(1));
    }
}
