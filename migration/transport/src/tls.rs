//! TLS over any link.
//!
//! ```text
//! write --> session (encrypts) --> outgoing.bytes --> link        read <-- session (decrypts) <-- incoming.bytes <-- link
//! ```
//!
//! All handles on a link share it. Three locks are taken in the order `incoming` or `outgoing`, then `session`; only the first
//! two are held while the link blocks, one by the thread that reads and one by the thread that writes, so that neither waits
//! for the other, and a third thread can shut the link down at any time.
//!
//! Timeouts are those of the link below. What had come of a record when the time was up is kept. A write that ran into its
//! timeout has taken nothing, as far as its caller knows, and is made again with the same bytes: what has been encrypted of
//! them goes out first, and counts when it has gone. So bytes that were taken are in the hands of the kernel, as with a plain
//! socket, and nobody needs to flush.
//!
//! The end of a link is said (`close_notify`) where that is possible without waiting. A link that ends without fails to be read
//! with `UnexpectedEof`. Nothing is lost by that: whoever cuts a link can do no more than cut it, because no message of the
//! engine's protocol means that something is complete merely because nothing follows.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::{Connection, Error, Link, tls_cause};

/// What is encrypted, and sent, at a time: several records (of 16 KiB), so that there are few system calls.
const BATCH_BYTES: usize = 128 << 10;
/// What is received at a time.
const INCOMING_BYTES: usize = 128 << 10;
/// How long a peer that is turned away may take to hear why.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long the end of a link may take to be said.
const FAREWELL: Duration = Duration::from_millis(20);

/// Who a peer has proven to be: its certificate. Equal ones are the same peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity(Arc<[u8]>);

/// A handle on a link with TLS.
pub(crate) struct Tls(Arc<Shared>);

struct Shared {
    peer: String,
    session: Mutex<rustls::Connection>,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
    /// For timeouts and shutdowns, which never block.
    control: Mutex<Box<dyn Link>>,
    /// Set when the handshake is over.
    identity: OnceLock<Identity>,
}

/// From the link to the session.
struct Incoming {
    link: Box<dyn Link>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Nothing was received yet.
    first: bool,
}

/// From the session to the link.
struct Outgoing {
    link: Box<dyn Link>,
    bytes: Vec<u8>,
    sent: usize,
    /// What is in `bytes` and whoever wrote it takes for not written.
    untold: Vec<u8>,
}

impl Tls {
    /// TLS over `link`, to be [established](Link::establish).
    pub fn new(session: rustls::Connection, link: Box<dyn Link>, peer: &str) -> io::Result<Self> {
        let (reading, writing) = (link.try_clone()?, link.try_clone()?);
        let buffer = vec![0; INCOMING_BYTES].into_boxed_slice();
        Ok(Self(Arc::new(Shared {
            peer: peer.to_owned(),
            session: Mutex::new(session),
            incoming: Mutex::new(Incoming { link: reading, buffer, start: 0, end: 0, first: true }),
            outgoing: Mutex::new(Outgoing { link: writing, bytes: Vec::new(), sent: 0, untold: Vec::new() }),
            control: Mutex::new(link),
            identity: OnceLock::new(),
        })))
    }
}

impl Shared {
    fn session(&self) -> MutexGuard<'_, rustls::Connection> {
        lock(&self.session)
    }

    fn error(&self, reason: impl Into<String>) -> Error {
        Error::Tls { peer: self.peer.clone(), reason: reason.into() }
    }

    /// Both ends prove who they are, before `deadline`.
    fn handshake(&self, deadline: Instant) -> Result<(), Error> {
        let left = || match deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(self.error("the handshake took too long")),
            left => Ok(left),
        };
        let cut = |error: &io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.error("it closed the connection in the handshake"),
            _ => self.error(format!("the connection broke in the handshake: {error}")),
        };
        let (mut incoming, mut outgoing) = (lock(&self.incoming), lock(&self.outgoing));
        loop {
            outgoing.take_from(&mut self.session()).map_err(|error| cut(&error))?;
            self.set_timeouts(Some(left()?)).map_err(|error| cut(&error))?;
            match outgoing.push() {
                Ok(()) => {}
                Err(error) if is_pause(&error) => continue,
                // It may have said why before it went.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
                {
                    outgoing.clear();
                }
                Err(error) => return Err(cut(&error)),
            }
            {
                let session = self.session();
                if !session.is_handshaking() && !session.wants_write() {
                    let certificates = session.peer_certificates().and_then(<[_]>::first);
                    let certificate = certificates.ok_or_else(|| self.error("it has no certificate"))?;
                    self.identity.get_or_init(|| Identity(certificate.as_ref().into()));
                    return Ok(());
                }
            }
            let first = incoming.first;
            match incoming.fill() {
                Ok(0) => return Err(cut(&io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(error) if is_pause(&error) => continue,
                Err(error) => return Err(cut(&error)),
            }
            // The session sees them all the same: it has an alert for them.
            let plain = if first { tls_cause::of_first_bytes(incoming.rest()) } else { None };
            let mut session = self.session();
            while !incoming.rest().is_empty() {
                incoming.feed(&mut session).map_err(|error| cut(&error))?;
                let cause = |error| plain.map_or_else(|| tls_cause::of(&error), str::to_owned);
                session.process_new_packets().map_err(|error| self.error(cause(error)))?;
                // What follows the handshake is for whoever reads.
                if !session.is_handshaking() {
                    break;
                }
            }
        }
    }

    /// Lets the peer hear why there is no link: what is unread when a socket is closed would take it back.
    fn turn_away(&self) {
        let deadline = Instant::now() + LAST_WORDS;
        let (mut incoming, mut outgoing) = (lock(&self.incoming), lock(&self.outgoing));
        let _it_finds_out = self.set_timeouts(Some(LAST_WORDS));
        if outgoing.take_from(&mut self.session()).is_ok() {
            let _it_finds_out = outgoing.push();
        }
        let _gone_already = lock(&self.control).shutdown(Shutdown::Write);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.set_timeouts(Some(left)).is_err() {
                break;
            }
            (incoming.start, incoming.end) = (0, 0);
            match incoming.fill() {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if is_pause(&error) => {}
                Err(_) => break,
            }
        }
        let _gone_already = lock(&self.control).shutdown(Shutdown::Both);
    }

    fn set_timeouts(&self, timeout: Option<Duration>) -> io::Result<()> {
        let control = lock(&self.control);
        control.set_read_timeout(timeout)?;
        control.set_write_timeout(timeout)
    }

    fn must_be_established(&self) -> io::Result<()> {
        match self.identity.get() {
            Some(_) => Ok(()),
            None => Err(io::Error::new(io::ErrorKind::NotConnected, "the handshake comes first")),
        }
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.must_be_established()?;
        if buffer.is_empty() {
            return Ok(0);
        }
        let mut incoming = lock(&self.incoming);
        let mut received = false;
        loop {
            if let Some(count) = self.decrypt(&mut incoming, buffer)? {
                return Ok(count);
            }
            if received {
                // A part of a record, or a message of TLS itself. A peer that sends nothing else does not hold us: whoever reads
                // looks at its deadline in between.
                return Err(io::ErrorKind::Interrupted.into());
            }
            if incoming.fill()? == 0 {
                // It learns that nothing follows; reading then tells an end from a cut.
                self.session().read_tls(&mut io::empty())?;
            }
            received = true;
        }
    }

    /// Puts what has come into `buffer`, as far as it fits; nothing if more is needed for a single byte.
    fn decrypt(&self, incoming: &mut Incoming, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut session = self.session();
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..)
            && !rest.is_empty()
        {
            match session.reader().read(rest) {
                Ok(0) => return Ok(Some(filled)),
                Ok(count) => {
                    filled += count;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // What came before the cut comes first.
                Err(_) if filled > 0 => break,
                Err(error) => return Err(error),
            }
            if incoming.rest().is_empty() {
                break;
            }
            incoming.feed(&mut session)?;
            if let Err(error) = session.process_new_packets() {
                drop(session);
                self.send_alert();
                return Err(io::Error::other(self.error(tls_cause::of(&error))));
            }
        }
        Ok((filled > 0).then_some(filled))
    }

    /// Tells the peer what was wrong with what it sent, if that is possible now.
    fn send_alert(&self) {
        if let Ok(mut outgoing) = self.outgoing.try_lock()
            && outgoing.take_from(&mut self.session()).is_ok()
        {
            let _it_finds_out = outgoing.push();
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.must_be_established()?;
        let mut outgoing = lock(&self.outgoing);
        if !outgoing.is_empty() {
            outgoing.push()?;
            let told = std::mem::take(&mut outgoing.untold);
            if !told.is_empty() && bytes.starts_with(&told) {
                return Ok(told.len());
            }
        }
        let piece = bytes.get(..bytes.len().min(BATCH_BYTES)).unwrap_or_default();
        let count = {
            let mut session = self.session();
            let count = session.writer().write(piece)?;
            outgoing.take_from(&mut session)?;
            count
        };
        match outgoing.push() {
            Ok(()) => Ok(count),
            Err(error) => {
                outgoing.untold = piece.get(..count).unwrap_or_default().to_vec();
                Err(error)
            }
        }
    }

    /// Says that this end sends no more, if that is possible at once.
    fn say_farewell(&self) {
        // Whoever holds it waits for the peer to take what came before.
        let Ok(mut outgoing) = self.outgoing.try_lock() else { return };
        if self.identity.get().is_none() || !outgoing.is_empty() {
            return;
        }
        {
            let mut session = self.session();
            session.send_close_notify();
            if outgoing.take_from(&mut session).is_err() {
                return;
            }
        }
        if lock(&self.control).set_write_timeout(Some(FAREWELL)).is_ok() {
            let _it_sees_a_cut = outgoing.push();
        }
    }
}

impl Incoming {
    fn rest(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Receives more; everything before must have been fed.
    fn fill(&mut self) -> io::Result<usize> {
        debug_assert!(self.rest().is_empty(), "nothing is overwritten");
        let count = self.link.read(&mut self.buffer)?;
        (self.start, self.end) = (0, count);
        self.first &= count == 0;
        Ok(count)
    }

    /// Gives the session as much as it takes at a time.
    fn feed(&mut self, session: &mut rustls::Connection) -> io::Result<()> {
        let mut rest = self.rest();
        let count = session.read_tls(&mut rest)?;
        self.start += count;
        Ok(())
    }
}

impl Outgoing {
    fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.sent = 0;
    }

    fn take_from(&mut self, session: &mut rustls::Connection) -> io::Result<()> {
        while session.wants_write() {
            session.write_tls(&mut self.bytes)?;
        }
        Ok(())
    }

    /// Sends all of it.
    fn push(&mut self) -> io::Result<()> {
        while let Some(rest) = self.bytes.get(self.sent..)
            && !rest.is_empty()
        {
            match self.link.write(rest)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => self.sent += count,
            }
        }
        self.clear();
        Ok(())
    }
}

impl Read for Tls {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Tls {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() { Ok(0) } else { self.0.write(bytes) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Link for Tls {
    fn try_clone(&self) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(Self(Arc::clone(&self.0))))
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        lock(&self.0.control).set_read_timeout(timeout)
    }

    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        lock(&self.0.control).set_write_timeout(timeout)
    }

    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        if how != Shutdown::Read {
            self.0.say_farewell();
        }
        lock(&self.0.control).shutdown(how)
    }

    fn establish(&mut self, timeout: Duration) -> Result<(), Error> {
        if self.0.identity.get().is_some() {
            return Ok(());
        }
        let result = self.0.handshake(Instant::now() + timeout);
        match &result {
            Ok(()) => {
                self.0.set_timeouts(None).map_err(|source| Error::Setup { peer: self.0.peer.clone(), source })
            }
            Err(_) => {
                self.0.turn_away();
                result
            }
        }
    }

    fn identity(&self) -> Option<Identity> {
        self.0.identity.get().cloned()
    }
}

impl Connection {
    /// The same link with TLS, not yet [established](Connection::establish).
    pub(crate) fn with_tls(
        self,
        session: impl FnOnce(&str) -> Result<rustls::Connection, Error>,
    ) -> Result<Self, Error> {
        self.try_map(|link, peer| {
            let setup = |source| Error::Setup { peer: peer.to_owned(), source };
            Ok(Box::new(Tls::new(session(peer)?, link, peer).map_err(setup)?))
        })
    }
}

fn is_pause(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// A thread that panicked between two calls leaves whole values.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
