//! A link that misbehaves at a chosen message, for tests of what is built on it.
//!
//! Whoever writes one message by one `write_all` can damage exactly the n-th: one `write` call here is one message,
//! taken whole, whatever the size of the buffers below.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{Connection, Error, Identity, Link, Received};

/// What happens to the chosen message. Messages before it pass unharmed.
#[derive(Debug)]
pub enum Fault {
    /// The link is cut before its first byte.
    CutBefore,
    /// The link is cut after half of it.
    CutMiddle,
    /// It arrives, then the link is cut.
    CutAfter,
    /// It and all later messages vanish, and nothing is cut: the peer sees silence.
    Swallow,
    /// It arrives, and this end hears nothing any more: the answers vanish.
    Deafen,
    /// It waits until the [`Gate`] is opened.
    Hold(Held),
    /// One bit of it is another: of its first byte, its last, or the one between them.
    Damage(Part),
    /// The writing thread unwinds before its first byte, without a message: as far as locks and descriptors go, its process
    /// is killed.
    KillBefore,
    /// The same after its last byte.
    KillAfter,
}

/// A byte of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The first.
    First,
    /// In the middle.
    Middle,
    /// The last.
    Last,
}

/// Opens a [`Fault::Hold`], and learns when the message arrived at it.
#[derive(Debug)]
pub struct Gate {
    arrived: Receiver<()>,
    open: Sender<()>,
}

/// The other half of a [`Gate`].
#[derive(Debug)]
pub struct Held {
    arrived: Sender<()>,
    open: Mutex<Receiver<()>>,
}

impl Gate {
    /// A gate and what it holds.
    #[must_use]
    pub fn new() -> (Self, Fault) {
        let (arrived_sender, arrived) = channel();
        let (open, open_receiver) = channel();
        (
            Self { arrived, open },
            Fault::Hold(Held { arrived: arrived_sender, open: Mutex::new(open_receiver) }),
        )
    }

    /// Waits until the message came to the gate; false if it never did within `timeout`.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> bool {
        self.arrived.recv_timeout(timeout).is_ok()
    }

    /// Lets the message pass. Dropping the gate does the same.
    pub fn open(&self) {
        let _nobody_waits = self.open.send(());
    }
}

/// How long a reader may leave a full socket alone.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Plan {
    at: u32,
    fault: Fault,
    written: AtomicU32,
    /// Set when the fault has struck.
    struck: AtomicBool,
}

struct Faulty {
    inner: Connection,
    plan: Arc<Plan>,
}

/// Knows whether a fault has struck: an index beyond the last message never does.
#[derive(Clone, Debug)]
pub struct Witness(Arc<Plan>);

impl Witness {
    /// Whether it has.
    #[must_use]
    pub fn struck(&self) -> bool {
        self.0.struck.load(Ordering::SeqCst)
    }
}

/// Wraps `connection` so that its `at`-th written message (from 0) meets `fault`.
#[must_use]
pub fn wrap(connection: Connection, at: u32, fault: Fault) -> (Connection, Witness) {
    let peer = connection.peer().to_owned();
    let plan = Arc::new(Plan { at, fault, written: AtomicU32::new(0), struck: AtomicBool::new(false) });
    let witness = Witness(Arc::clone(&plan));
    (Connection::new(Box::new(Faulty { inner: connection, plan }), peer), witness)
}

impl Faulty {
    fn struck(&self) -> bool {
        self.plan.struck.load(Ordering::SeqCst)
    }

    /// All of it, whatever the timeouts: half a message would be another fault.
    fn write_whole(&mut self, mut bytes: &[u8], mut descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let patience = Instant::now() + PATIENCE;
        while !bytes.is_empty() {
            match self.inner.write_with(bytes, descriptors) {
                Ok(count) => {
                    bytes = bytes.get(count..).unwrap_or_default();
                    descriptors = &[];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < patience => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn cut(&self) {
        let _cut_already = self.inner.shutdown(Shutdown::Both);
    }

    /// Reads, unless this end hears nothing any more.
    fn hear(&mut self, mut read: impl FnMut(&mut Connection) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            let length = read(&mut self.inner)?;
            if length > 0 && self.struck() && matches!(self.plan.fault, Fault::Deafen) {
                continue;
            }
            return Ok(length);
        }
    }

    /// A message, with what goes along.
    fn message(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let index = self.plan.written.fetch_add(1, Ordering::SeqCst);
        let struck = index == self.plan.at;
        if struck {
            self.plan.struck.store(true, Ordering::SeqCst);
        }
        let plan = Arc::clone(&self.plan);
        match &plan.fault {
            Fault::CutBefore if struck => {
                self.cut();
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Fault::CutMiddle if struck => {
                self.write_whole(bytes.get(..bytes.len() / 2).unwrap_or_default(), descriptors)?;
                self.cut();
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Fault::CutAfter if struck => {
                self.write_whole(bytes, descriptors)?;
                self.cut();
                return Ok(bytes.len());
            }
            Fault::KillBefore if struck => std::panic::resume_unwind(Box::new("killed")),
            Fault::KillAfter if struck => {
                self.write_whole(bytes, descriptors)?;
                std::panic::resume_unwind(Box::new("killed"));
            }
            Fault::Damage(part) if struck => {
                let mut bytes = bytes.to_vec();
                let place = match part {
                    Part::First => 0,
                    Part::Middle => bytes.len() / 2,
                    Part::Last => bytes.len().saturating_sub(1),
                };
                bytes.get_mut(place).into_iter().for_each(|byte| *byte ^= 1);
                self.write_whole(&bytes, descriptors)?;
                return Ok(bytes.len());
            }
            Fault::Swallow if index >= self.plan.at => return Ok(bytes.len()),
            Fault::Hold(held) if struck => {
                let _nobody_waits = held.arrived.send(());
                let open = held.open.lock().unwrap_or_else(PoisonError::into_inner);
                let _gate_dropped = open.recv();
            }
            _ => {}
        }
        self.write_whole(bytes, descriptors)?;
        Ok(bytes.len())
    }
}

impl Read for Faulty {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.hear(|inner| inner.read(buffer))
    }
}

impl Write for Faulty {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_with(bytes, &[])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl Link for Faulty {
    fn try_clone(&self) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(Self { inner: self.inner.try_clone()?, plan: Arc::clone(&self.plan) }))
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
    fn passes_descriptors(&self) -> bool {
        self.inner.passes_descriptors()
    }
    fn write_with(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        self.message(bytes, descriptors)
    }
    fn read_with(&mut self, buffer: &mut [u8], received: &mut Received) -> io::Result<usize> {
        self.hear(|inner| inner.read_with(buffer, received))
    }
    fn establish(&mut self, timeout: Duration) -> Result<(), Error> {
        self.inner.establish(timeout)
    }
    fn identity(&self) -> Option<Identity> {
        self.inner.identity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends three messages through a link with a fault at the second; gives what arrived until the end or silence.
    fn arrived(fault: Fault) -> (Vec<u8>, bool) {
        let (one, mut other) = Connection::pair().unwrap();
        let (mut one, witness) = wrap(one, 1, fault);
        for message in [b"aaaa", b"bbbb", b"cccc"] {
            if one.write_all(message).is_err() {
                break;
            }
        }
        assert!(witness.struck());
        other.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let (mut all, mut bytes) = (Vec::new(), [0; 64]);
        loop {
            match other.read(&mut bytes) {
                Ok(0) => return (all, true),
                Ok(length) => all.extend_from_slice(&bytes[..length]),
                Err(_) => return (all, false),
            }
        }
    }

    #[test]
    fn each_fault_does_what_it_says() {
        assert_eq!(arrived(Fault::CutBefore), (b"aaaa".to_vec(), true));
        assert_eq!(arrived(Fault::CutMiddle), (b"aaaabb".to_vec(), true));
        assert_eq!(arrived(Fault::CutAfter), (b"aaaabbbb".to_vec(), true));
        assert_eq!(arrived(Fault::Swallow), (b"aaaa".to_vec(), false));
        assert_eq!(arrived(Fault::Damage(Part::First)), (b"aaaacbbbcccc".to_vec(), false));
        assert_eq!(arrived(Fault::Damage(Part::Middle)), (b"aaaabbcbcccc".to_vec(), false));
        assert_eq!(arrived(Fault::Damage(Part::Last)), (b"aaaabbbccccc".to_vec(), false));
        assert_eq!(arrived(Fault::Deafen), (b"aaaabbbbcccc".to_vec(), false));
    }

    #[test]
    fn a_killed_writer_leaves_nothing_or_everything() {
        for (fault, expected) in [(Fault::KillBefore, b"".as_slice()), (Fault::KillAfter, b"last")] {
            let (one, mut other) = Connection::pair().unwrap();
            let (mut one, _) = wrap(one, 0, fault);
            assert!(std::thread::spawn(move || one.write_all(b"last")).join().is_err());
            let mut bytes = Vec::new();
            other.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes, expected);
        }
    }

    #[test]
    fn a_gate_holds_its_message() {
        let (one, mut other) = Connection::pair().unwrap();
        let (gate, fault) = Gate::new();
        let (mut one, _) = wrap(one, 0, fault);
        let writer = std::thread::spawn(move || one.write_all(b"held"));
        assert!(gate.wait(Duration::from_secs(10)));
        other.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        assert!(other.read(&mut [0; 4]).is_err());
        gate.open();
        writer.join().unwrap().unwrap();
        let mut bytes = [0; 4];
        other.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"held");
    }

    #[test]
    fn a_deaf_end_hears_only_the_end() {
        let (one, mut other) = Connection::pair().unwrap();
        let (mut one, _) = wrap(one, 0, Fault::Deafen);
        one.write_all(b"q").unwrap();
        other.read_exact(&mut [0; 1]).unwrap();
        other.write_all(b"answer").unwrap();
        drop(other);
        let mut bytes = Vec::new();
        one.read_to_end(&mut bytes).unwrap();
        assert!(bytes.is_empty());
    }
}
