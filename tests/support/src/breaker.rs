//! A link between a source and a destination that breaks at a chosen byte.
//!
//! The place is a byte of one direction, counted from the first connection on, or a byte of the n-th frame of a kind. There the
//! link stands still until the test has done to the processes what it wants to do, and says how the link goes on.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use stream::frame::{HEADER_BYTES, Header, Kind};

use crate::TestBed;

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// What the source says.
    ToDestination,
    /// What it hears.
    ToSource,
}

/// Where the link breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before a byte of a direction, the preamble counted.
    Byte {
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
        /// The how-manieth of its kind, from 0.
        nth: u32,
        /// How many of its bytes pass, the header's counted; all of them if it has fewer.
        at: u64,
    },
}

impl Place {
    fn way(self) -> Way {
        match self {
            Self::Byte { way, .. } | Self::Frame { way, .. } => way,
        }
    }
}

/// How the link goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As if nothing had happened.
    Pass,
    /// It is cut.
    Cut,
    /// Nothing more goes this way, which is closed; the other way goes on.
    HalfClose,
    /// Whatever is said from here on vanishes, for so long; then it is cut.
    Swallow(Duration),
}

/// A link; it carries one connection after the other, or several at a time.
#[derive(Debug)]
pub struct Breaker {
    uri: String,
    struck: Receiver<Struck>,
    shared: Arc<Shared>,
}

/// The link stands still at its place. Dropping it lets the link go on.
#[derive(Debug)]
pub struct Struck(Sender<Verdict>);

impl Struck {
    /// Lets the link go on, as `verdict` says.
    pub fn resolve(self, verdict: Verdict) {
        // The connection may be gone meanwhile.
        let _ = self.0.send(verdict);
    }
}

#[derive(Debug)]
struct Shared {
    target: PathBuf,
    place: Place,
    /// Taken when the place is reached.
    strikes: Mutex<Option<Sender<Struck>>>,
    open: AtomicBool,
    /// Frames of the kind so far.
    frames: AtomicU64,
    /// Bytes of either direction so far.
    bytes: [AtomicU64; 2],
}

impl Breaker {
    /// A link, called `name`, to the Unix socket at `target`, that breaks at `place`.
    #[must_use]
    pub fn new(bed: &TestBed, name: &str, target: &Path, place: Place) -> Self {
        let path = bed.path(name);
        let listener = UnixListener::bind(&path).expect("the breaker listens");
        let (sender, struck) = channel();
        let shared = Arc::new(Shared {
            target: target.to_owned(),
            place,
            strikes: Mutex::new(Some(sender)),
            open: AtomicBool::new(true),
            frames: AtomicU64::new(0),
            bytes: Default::default(),
        });
        let carrier = Arc::clone(&shared);
        std::thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                if carrier.open.load(Ordering::SeqCst) {
                    carrier.carry(&connection);
                }
            }
        });
        Self { uri: format!("unix:{}", path.display()), struck, shared }
    }

    /// Where the source is to go.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Waits until the place is reached; nothing if it is not within `time`.
    #[must_use]
    pub fn struck(&self, time: Duration) -> Option<Struck> {
        self.struck.recv_timeout(time).ok()
    }

    /// Whether it carries further connections; whoever tries otherwise finds it closed at once.
    pub fn take_more(&self, more: bool) {
        self.shared.open.store(more, Ordering::SeqCst);
    }

    /// Bytes that went a way so far.
    #[must_use]
    pub fn bytes(&self, way: Way) -> u64 {
        self.shared.bytes[way as usize].load(Ordering::SeqCst)
    }
}

impl Shared {
    /// Carries one connection, on two threads.
    fn carry(self: &Arc<Self>, source: &UnixStream) {
        // A destination that is gone: `source` is closed.
        let Ok(destination) = UnixStream::connect(&self.target) else { return };
        for (way, from, to) in
            [(Way::ToDestination, source, &destination), (Way::ToSource, &destination, source)]
        {
            let clone = |stream: &UnixStream| stream.try_clone().expect("a descriptor");
            let (shared, from, to) = (Arc::clone(self), clone(from), clone(to));
            std::thread::spawn(move || {
                let cut = Carrier { shared: &shared, way, from: &from, to: &to }.run().is_err();
                // It may be gone already.
                let _ = to.shutdown(Shutdown::Write);
                if cut {
                    let _ = [&from, &to].map(|end| end.shutdown(Shutdown::Both));
                }
            });
        }
    }

    /// The chosen place is reached: at most once.
    fn strike(&self) -> Option<Verdict> {
        let strikes = self.strikes.lock().expect("no thread panics here").take()?;
        let (verdict, resolved) = channel();
        strikes.send(Struck(verdict)).ok()?;
        Some(resolved.recv().unwrap_or(Verdict::Pass))
    }
}

/// One direction of one connection.
struct Carrier<'a> {
    shared: &'a Shared,
    way: Way,
    from: &'a UnixStream,
    to: &'a UnixStream,
}

impl Carrier<'_> {
    /// Until this direction is closed; an error if the connection is to be cut.
    fn run(&self) -> io::Result<()> {
        let mut buffer = vec![0; 256 << 10];
        let mut frames = Frames::default();
        loop {
            let count = match (&mut &*self.from).read(&mut buffer)? {
                0 => return Ok(()),
                count => count,
            };
            let mut bytes = &buffer[..count];
            if self.shared.place.way() == self.way
                && let Some(before) = self.place_within(bytes, &mut frames)
            {
                let (first, rest) = bytes.split_at(before);
                self.write(first)?;
                bytes = rest;
                match self.shared.strike() {
                    None | Some(Verdict::Pass) => {}
                    Some(Verdict::Cut) => return Err(io::ErrorKind::ConnectionAborted.into()),
                    Some(Verdict::HalfClose) => return Ok(()),
                    Some(Verdict::Swallow(time)) => return self.swallow(time),
                }
            }
            self.write(bytes)?;
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        (&mut &*self.to).write_all(bytes)?;
        self.shared.bytes[self.way as usize].fetch_add(bytes.len() as u64, Ordering::SeqCst);
        Ok(())
    }

    /// How many of the next bytes pass before the place, if it is among them.
    fn place_within(&self, bytes: &[u8], frames: &mut Frames) -> Option<usize> {
        match self.shared.place {
            Place::Byte { at, .. } => {
                let passed = self.shared.bytes[self.way as usize].load(Ordering::SeqCst);
                at.checked_sub(passed).map(|left| left as usize).filter(|left| *left < bytes.len())
            }
            Place::Frame { kind, nth, at, .. } => frames.find(bytes, |header| {
                let is_it = header.kind == kind
                    && self.shared.frames.fetch_add(1, Ordering::SeqCst) == u64::from(nth);
                is_it.then(|| at.min(HEADER_BYTES as u64 + u64::from(header.length_bytes)))
            }),
        }
    }

    /// Takes what comes and loses it.
    fn swallow(&self, time: Duration) -> io::Result<()> {
        let end = Instant::now() + time;
        let mut rest = vec![0; 64 << 10];
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            self.from.set_read_timeout(Some(left))?;
            match (&mut &*self.from).read(&mut rest) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::ConnectionAborted.into())
    }
}

/// Finds the frames of one direction of one connection.
#[derive(Default)]
struct Frames {
    /// Bytes of the preamble and of headers, as far as they have come.
    header: Vec<u8>,
    preamble_is_over: bool,
    /// Of the body that is under way.
    body_left: u64,
    /// Until the place, once it is known.
    place_in: Option<u64>,
    /// What comes is no frame any more.
    is_raw: bool,
}

impl Frames {
    /// Looks through the next bytes. `chosen` is asked for each frame how many of its bytes pass before the place.
    fn find(&mut self, bytes: &[u8], mut chosen: impl FnMut(Header) -> Option<u64>) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            if let Some(left) = self.place_in {
                let rest = (bytes.len() - at) as u64;
                if left <= rest {
                    self.place_in = None;
                    self.is_raw = true;
                    return Some(at + left as usize);
                }
                self.place_in = Some(left - rest);
                return None;
            }
            if self.is_raw {
                return None;
            }
            if self.body_left > 0 {
                let step = self.body_left.min((bytes.len() - at) as u64);
                self.body_left -= step;
                at += step as usize;
                continue;
            }
            self.header.push(bytes[at]);
            at += 1;
            let Ok(header) = <[u8; HEADER_BYTES]>::try_from(self.header.as_slice()) else { continue };
            self.header.clear();
            if !std::mem::replace(&mut self.preamble_is_over, true) {
                continue;
            }
            let Ok(header) = Header::decode(header) else {
                self.is_raw = true;
                return None;
            };
            self.is_raw = header.kind == Kind::ChannelHello;
            self.body_left = u64::from(header.length_bytes);
            let Some(pass) = chosen(header) else { continue };
            match pass.checked_sub(HEADER_BYTES as u64) {
                Some(left) if left > 0 => self.place_in = Some(left),
                // Within the header, as far as it has not gone yet.
                _ => {
                    self.is_raw = true;
                    return Some((at + pass as usize).saturating_sub(HEADER_BYTES));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Vec<u8> {
        let mut bytes = stream::frame::encode_preamble().to_vec();
        for (kind, body) in [(Kind::Hello, 10), (Kind::Stream, 100), (Kind::Stream, 0), (Kind::Stream, 30)] {
            stream::frame::write(&mut bytes, kind, 0, &vec![7; body]).unwrap();
        }
        bytes
    }

    /// Where the place is, if the bytes come in pieces of a length.
    fn found(piece: usize, nth: u32, pass: u64) -> Option<usize> {
        let (mut frames, mut number, mut before) = (Frames::default(), 0, 0);
        for bytes in stream().chunks(piece) {
            let place = frames.find(bytes, |header| {
                let is_it = header.kind == Kind::Stream && number == nth;
                number += u32::from(header.kind == Kind::Stream);
                is_it.then(|| pass.min(HEADER_BYTES as u64 + u64::from(header.length_bytes)))
            });
            if let Some(place) = place {
                return Some(before + place);
            }
            before += bytes.len();
        }
        None
    }

    #[test]
    fn a_place_is_found_in_pieces_of_any_length() {
        let first = 8 + 18;
        for (nth, start, length) in [(0, first, 108), (1, first + 108, 8), (2, first + 116, 38)] {
            for pass in [0, 3, 8, 9, 38, 1000] {
                let wanted = start + pass.min(length);
                assert_eq!(found(1 << 20, nth, pass as u64), Some(wanted), "{nth} {pass}");
                for piece in [1, 3, 7, 8, 100] {
                    let place = found(piece, nth, pass as u64);
                    // A header that came in pieces is gone up to the last of them.
                    let earliest = wanted..=wanted.max(start + HEADER_BYTES - 1);
                    assert!(
                        place.is_some_and(|place| earliest.contains(&place)),
                        "{nth} {pass} {piece}: {place:?}"
                    );
                }
            }
        }
        assert_eq!(found(50, 3, 0), None);
    }
}
