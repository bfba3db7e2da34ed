//! A link between a source and a destination that can be stopped at a chosen place.
//!
//! The place is a byte, or one of a frame or of a batch of a data channel. There the link stands still until the test has done to
//! the processes what it wants to do, and says how the link goes on. So every fault happens at a known point of the protocol.
//! Descriptors go on with the frames that they came with. With TLS frames are known by their lengths, as far as that goes.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use stream::frame::Kind;

use crate::passing::write_all;
use crate::pieces::{Piece, Pieces, What};
use crate::{TestBed, WATCHDOG};

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// What the source says.
    ToDestination,
    /// What it hears.
    ToSource,
}

/// Where the link stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before a byte.
    Byte {
        /// Of which connection, from 0, in the order in which they were made.
        connection: u32,
        /// The direction.
        way: Way,
        /// How many bytes pass.
        at: u64,
    },
    /// At a frame.
    Frame {
        /// The direction.
        way: Way,
        /// Which kind.
        kind: Kind,
        /// Only after one of this kind has come, either way.
        after: Option<Kind>,
        /// The how-manieth of its kind since the place was chosen, from 0.
        nth: u32,
        /// How many of its bytes pass, the header's counted; all of them if it has fewer.
        at: u64,
    },
    /// At a frame of the first connection, of whichever kind.
    Message {
        /// The direction.
        way: Way,
        /// The how-manieth, from 0.
        nth: u32,
        /// As of a [`Place::Frame`].
        at: u64,
    },
    /// At a batch of pages.
    Batch {
        /// On which data channel.
        channel: u16,
        /// The how-manieth, from 0; the last if none is said, which has no pages.
        nth: Option<u32>,
        /// How many of its bytes pass; all of them if it has fewer.
        at: u64,
    },
}

impl From<Kind> for Place {
    /// The first frame of a kind that only one side sends, before it passes.
    fn from(kind: Kind) -> Self {
        let way = match kind {
            Kind::Agree
            | Kind::Refuse
            | Kind::Prepared
            | Kind::Reject
            | Kind::Running
            | Kind::Never
            | Kind::Mapped
            | Kind::Identified
            | Kind::PageRequest
            | Kind::RunRequest
            | Kind::Received => Way::ToSource,
            _ => Way::ToDestination,
        };
        Self::Frame { way, kind, after: None, nth: 0, at: 0 }
    }
}

/// How the link goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As if nothing had happened.
    Pass,
    /// The frame passes, and the link goes on standing still.
    Deliver,
    /// The connection is cut.
    Cut,
    /// Nothing more goes this way, which is closed; the other way goes on.
    HalfClose,
    /// Whatever is said from here on vanishes, for so long; then it is cut.
    Swallow(Duration),
}

/// The link; it carries one connection after the other, or several at a time.
#[derive(Debug)]
pub struct Proxy {
    uri: String,
    path: PathBuf,
    held: Receiver<Held>,
    shared: Arc<Shared>,
}

/// The link stands still at its place. Dropping it cuts the connection.
#[derive(Debug)]
pub struct Held {
    verdict: Sender<Verdict>,
    from: UnixStream,
}

impl Held {
    /// Lets the link go on, as `verdict` says.
    pub fn resolve(self, verdict: Verdict) {
        // The connection may be gone meanwhile.
        let _ = self.verdict.send(verdict);
    }

    /// Sends the frame on. The link stands still until the frame is dropped, which cuts it.
    pub fn deliver(&self) {
        let _ = self.verdict.send(Verdict::Deliver);
    }

    /// Loses the frame and the connection.
    pub fn cut(self) {
        self.resolve(Verdict::Cut);
    }

    /// Cuts off whoever sent the frame. The other side notices nothing until the frame is dropped.
    pub fn cut_sender(&self) {
        // It may be gone already.
        let _ = self.from.shutdown(Shutdown::Both);
    }
}

#[derive(Debug)]
struct Shared {
    target: PathBuf,
    holds: Sender<Held>,
    /// Until it is reached.
    aim: Mutex<Option<Aim>>,
    /// Whether connections are carried.
    open: AtomicBool,
    /// Nobody needs the link any more.
    over: AtomicBool,
    connections: AtomicU32,
    /// Connections on which the source may still say something.
    speaking: AtomicU32,
    /// The frames that came, held or not, in order.
    seen: Mutex<Vec<Kind>>,
    saw: Condvar,
}

#[derive(Debug)]
struct Aim {
    place: Place,
    /// Frames or batches that it might have been.
    passed: u32,
}

impl Proxy {
    /// A link, called `name`, to the Unix socket at `target`, which stands still at `place`.
    #[must_use]
    pub fn new(bed: &TestBed, name: &str, target: &Path, place: impl Into<Place>) -> Self {
        let path = bed.path(name);
        let listener = UnixListener::bind(&path).expect("the proxy listens");
        let (holds, held) = channel();
        let shared = Arc::new(Shared {
            target: target.to_owned(),
            holds,
            aim: Mutex::new(Some(Aim { place: place.into(), passed: 0 })),
            open: AtomicBool::new(true),
            over: AtomicBool::new(false),
            connections: AtomicU32::new(0),
            speaking: AtomicU32::new(0),
            seen: Mutex::default(),
            saw: Condvar::new(),
        });
        let carrier = Arc::clone(&shared);
        std::thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                if carrier.over.load(Ordering::SeqCst) {
                    return;
                }
                if carrier.open.load(Ordering::SeqCst) {
                    carrier.carry(&connection);
                }
            }
        });
        Self { uri: format!("unix:{}", path.display()), path, held, shared }
    }

    /// Where the source is to go.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Waits until the link stands still.
    #[must_use]
    pub fn held(&self) -> Held {
        self.held_within(WATCHDOG)
            .unwrap_or_else(|| panic!("{:?} was not reached within {WATCHDOG:?}", self.shared.aim.lock()))
    }

    /// Waits until the link stands still; nothing if it does not within `time`.
    #[must_use]
    pub fn held_within(&self, time: Duration) -> Option<Held> {
        self.held.recv_timeout(time).ok()
    }

    /// Chooses the next place.
    pub fn aim(&self, place: Place) {
        *self.shared.aim.lock().expect("no thread panics here") = Some(Aim { place, passed: 0 });
    }

    /// Waits until a frame of this kind has come, before or after now, and says whether it has.
    #[must_use]
    pub fn saw(&self, kind: Kind, patience: Duration) -> bool {
        let not_yet = |seen: &mut Vec<Kind>| !seen.contains(&kind);
        let waited = self.shared.saw.wait_timeout_while(self.shared.seen(), patience, not_yet);
        waited.expect("no thread panics here").0.contains(&kind)
    }

    /// Whether the source has said its last on every connection that there was, and no place was met that [`Self::held_within`] does
    /// not tell at once.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.shared.speaking.load(Ordering::SeqCst) == 0
    }

    /// Carries no further connection: whoever tries finds it closed at once.
    pub fn refuse_more(&self) {
        self.shared.open.store(false, Ordering::SeqCst);
    }

    /// Carries connections again.
    pub fn take_more(&self) {
        self.shared.open.store(true, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        // The thread that listens looks then.
        let _ = UnixStream::connect(&self.path);
    }
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Vec<Kind>> {
        self.seen.lock().expect("no thread panics here")
    }

    /// Carries one connection, on two threads.
    fn carry(self: &Arc<Self>, source: &UnixStream) {
        // A destination that is gone: `source` is closed.
        let Ok(destination) = UnixStream::connect(&self.target) else { return };
        let connection = self.connections.fetch_add(1, Ordering::SeqCst);
        self.speaking.fetch_add(1, Ordering::SeqCst);
        for (way, from, to) in
            [(Way::ToDestination, source, &destination), (Way::ToSource, &destination, source)]
        {
            let clone = |stream: &UnixStream| stream.try_clone().expect("a descriptor");
            let (shared, from, to) = (Arc::clone(self), clone(from), clone(to));
            let mut carrier = Carrier { shared, connection, way, from, to, passed_bytes: 0 };
            std::thread::spawn(move || {
                let cut = carrier.run().is_err();
                if way == Way::ToDestination {
                    carrier.shared.speaking.fetch_sub(1, Ordering::SeqCst);
                }
                // They may be gone already.
                let _ = carrier.to.shutdown(Shutdown::Write);
                if cut {
                    let _ = [&carrier.from, &carrier.to].map(|end| end.shutdown(Shutdown::Both));
                }
            });
        }
    }
}

/// One direction of one connection.
struct Carrier {
    shared: Arc<Shared>,
    connection: u32,
    way: Way,
    from: UnixStream,
    to: UnixStream,
    passed_bytes: u64,
}

impl Carrier {
    /// Until this direction is closed; an error if the connection is to be cut.
    fn run(&mut self) -> io::Result<()> {
        let mut pieces = Pieces::default();
        while let Some(piece) = pieces.next(&mut self.from)? {
            if let What::Frame(kind) = piece.what {
                self.shared.seen().push(kind);
                self.shared.saw.notify_all();
            }
            let Some(before) = self.place_within(&piece) else {
                self.write(&piece.bytes, &piece)?;
                continue;
            };
            let (first, mut rest) = piece.bytes.split_at(before);
            self.write(first, &piece)?;
            let (verdict, verdicts) = channel();
            // The test may be over.
            let _ = self.shared.holds.send(Held { verdict, from: self.from.try_clone()? });
            loop {
                let verdict = verdicts.recv().unwrap_or(Verdict::Cut);
                if matches!(verdict, Verdict::Pass | Verdict::Deliver) {
                    self.write(std::mem::take(&mut rest), &piece)?;
                }
                match verdict {
                    Verdict::Pass => break,
                    Verdict::Deliver => {}
                    Verdict::Cut => return Err(io::ErrorKind::ConnectionAborted.into()),
                    Verdict::HalfClose => return Ok(()),
                    Verdict::Swallow(time) => return self.swallow(time),
                }
            }
        }
        Ok(())
    }

    /// Writes a part of `piece`; what came along goes on with its first byte.
    fn write(&mut self, bytes: &[u8], piece: &Piece) -> io::Result<()> {
        let is_first = bytes.as_ptr() == piece.bytes.as_ptr();
        write_all(&mut self.to, bytes, if is_first { &piece.descriptors } else { &[] })?;
        self.passed_bytes += bytes.len() as u64;
        Ok(())
    }

    /// How many bytes of `piece` pass before the place, if it is there.
    fn place_within(&self, piece: &Piece) -> Option<usize> {
        let mut aim = self.shared.aim.lock().expect("no thread panics here");
        let Aim { place, passed } = aim.as_mut()?;
        let length = piece.bytes.len();
        let mut is_turn = |nth: u32| {
            *passed += 1;
            *passed == nth + 1
        };
        let within = match (*place, piece.what) {
            (Place::Byte { connection, way, at }, _) if (connection, way) == (self.connection, self.way) => {
                at.checked_sub(self.passed_bytes).map(|left| left as usize).filter(|left| *left < length)
            }
            (Place::Frame { way, kind, after, nth, at }, What::Frame(this))
                if (way, kind) == (self.way, this)
                    && after.is_none_or(|kind| self.shared.seen().contains(&kind))
                    && is_turn(nth) =>
            {
                Some(length.min(at as usize))
            }
            (Place::Message { way, nth, at }, What::Frame(_))
                if (way, 0) == (self.way, self.connection) && is_turn(nth) =>
            {
                Some(length.min(at as usize))
            }
            (Place::Batch { channel, nth: None, at }, What::Batch { channel: this, is_last: true })
                if channel == this =>
            {
                Some(length.min(at as usize))
            }
            (Place::Batch { channel, nth: Some(nth), at }, What::Batch { channel: this, is_last: false })
                if channel == this && is_turn(nth) =>
            {
                Some(length.min(at as usize))
            }
            _ => None,
        };
        if within.is_some() {
            *aim = None;
        }
        within
    }

    /// Takes what comes and loses it.
    fn swallow(&mut self, time: Duration) -> io::Result<()> {
        let end = Instant::now() + time;
        let mut rest = vec![0; 64 << 10];
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            self.from.set_read_timeout(Some(left))?;
            match io::Read::read(&mut self.from, &mut rest) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::ConnectionAborted.into())
    }
}
