//! Deadlines: what a slow peer can do, and what it cannot.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use stream::frame::{HEADER_BYTES, Header, Kind};
use transport::Connection;

use crate::link::{Link, Step};
use crate::protocol::{Message, Prepare, Reasons};
use crate::{Error, Parameters};

/// Sees what a peer is sent, and says how much of that it takes; with nothing it lets wait.
type Takes = Box<dyn FnMut(&[u8]) -> usize + Send>;

/// A peer that always moves, a little.
struct Slow {
    /// What it sends first; zeroes follow without end.
    first: io::Cursor<Vec<u8>>,
    /// How much it sends or takes at a time.
    bytes: usize,
    /// Instead.
    takes: Option<Takes>,
}

const PATIENCE: Duration = Duration::from_millis(1);

impl Slow {
    fn link(first: &[u8], bytes: usize) -> Link {
        Self::link_that_takes(first, bytes, None)
    }

    fn link_that_takes(first: &[u8], bytes: usize, takes: Option<Takes>) -> Link {
        let slow = Self { first: io::Cursor::new(first.to_vec()), bytes, takes };
        Link::new(Connection::new(Box::new(slow), "slow")).unwrap()
    }
}

impl Read for Slow {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.first.read(buffer)? {
            0 => {
                std::thread::sleep(PATIENCE);
                let count = buffer.len().min(self.bytes);
                buffer[..count].fill(0);
                Ok(count)
            }
            count => Ok(count),
        }
    }
}

impl Write for Slow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(takes) = &mut self.takes {
            return match takes(bytes) {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                count => Ok(count),
            };
        }
        std::thread::sleep(PATIENCE);
        Ok(bytes.len().min(self.bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl transport::Link for Slow {
    fn try_clone(&self) -> io::Result<Box<dyn transport::Link>> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn set_read_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
    fn set_write_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
    fn shutdown(&self, _: Shutdown) -> io::Result<()> {
        Ok(())
    }
}

fn step(patience: Duration) -> Step<'static> {
    Step { doing: "testing", patience, cancel: None, until: None }
}

fn header(kind: Kind, length_bytes: u32) -> [u8; HEADER_BYTES] {
    Header { kind, flags: 0, length_bytes }.encode()
}

#[test]
fn a_body_that_comes_piece_by_piece_must_come_in_time() {
    let error = Slow::link(&header(Kind::Stream, 1 << 20), 4096).receive(step(PATIENCE)).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
}

#[test]
fn a_message_that_is_taken_byte_by_byte_must_be_taken_in_time() {
    let prepare = Message::Prepare(Prepare { digest: 1, running: true });
    let error = Slow::link(&[], 1).send(&prepare, step(PATIENCE)).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
}

/// The user's cancel comes into the first message, of which the peer has taken a part.
#[test]
fn why_a_migration_is_cancelled_is_said_behind_the_message_that_it_came_into() {
    let (taken, parameters) = <(Arc<Mutex<Vec<u8>>>, Arc<Parameters>)>::default();
    let (words, user) = (Arc::clone(&taken), Arc::clone(&parameters));
    let takes = move |bytes: &[u8]| {
        let count = if user.cancelled() { bytes.len() } else { bytes.len().min(1000) };
        words.lock().unwrap().extend_from_slice(&bytes[..count]);
        user.cancel();
        count
    };
    let mut link = Slow::link_that_takes(&[], 0, Some(Box::new(takes)));
    let mut piece = vec![7; HEADER_BYTES + 5000];
    let patience = Duration::from_secs(20);
    let error = link.send_frame(
        Kind::Stream,
        &mut piece,
        Step { doing: "testing", patience, cancel: Some(&parameters), until: None },
    );
    assert!(matches!(error, Err(Error::Cancelled)), "{error:?}");
    let cancel = Message::Cancel(Reasons::new(&["because"]));
    link.send(&cancel, step(patience)).unwrap();
    let mut heard = Slow::link(&taken.lock().unwrap(), 4096);
    assert_eq!(heard.receive(step(patience)).unwrap(), Message::Stream);
    assert!(heard.body() == &piece[HEADER_BYTES..]);
    assert_eq!(heard.receive(step(patience)).unwrap(), cancel);
}

/// As TLS has it, which may have sealed and sent of a message of which it says that nothing was taken yet; and the cancel comes into the
/// message once more, when what is left of it is tried again.
#[test]
fn a_message_that_may_have_begun_comes_to_its_end_before_anything_else() {
    let (taken, parameters) = <(Arc<Mutex<Vec<u8>>>, Arc<Parameters>)>::default();
    let (words, user) = (Arc::clone(&taken), Arc::clone(&parameters));
    let mut calls = 0;
    let takes = move |bytes: &[u8]| {
        calls += 1;
        user.cancel();
        let count = if calls == 1 { 0 } else { bytes.len() };
        words.lock().unwrap().extend_from_slice(&bytes[..count]);
        count
    };
    let mut link = Slow::link_that_takes(&[], 0, Some(Box::new(takes)));
    let mut piece = vec![7; HEADER_BYTES + 5000];
    let patience = Duration::from_secs(20);
    let cancelled = Step { doing: "testing", patience, cancel: Some(&parameters), until: None };
    for _ in 0..2 {
        let error = link.send_frame(Kind::Stream, &mut piece, cancelled);
        assert!(matches!(error, Err(Error::Cancelled)), "{error:?}");
    }
    let cancel = Message::Cancel(Reasons::new(&["because"]));
    link.send(&cancel, step(patience)).unwrap();
    let mut heard = Slow::link(&taken.lock().unwrap(), 4096);
    assert_eq!(heard.receive(step(patience)).unwrap(), Message::Stream);
    assert_eq!(heard.receive(step(patience)).unwrap(), cancel, "the second was never begun");
}

#[test]
fn a_message_longer_than_its_kind_can_be_is_refused_unread() {
    let long = Duration::from_secs(20);
    for (kind, length) in [(Kind::Refuse, 1 << 20), (Kind::Running, 1000), (Kind::Never, 5000)] {
        let error = Slow::link(&header(kind, length), 4096).receive(step(long)).unwrap_err();
        let Error::Protocol { reason, .. } = &error else { panic!("{error:?}") };
        assert!(reason.contains("is longer than"), "{reason}");
    }
}

/// As after a stop of the process that waits for it.
#[test]
fn an_answer_that_is_there_counts_however_late_it_is_read() {
    let (near, far) = Connection::pair().unwrap();
    let prepare = Message::Prepare(Prepare { digest: 1, running: true });
    Link::new(far).unwrap().send(&prepare, step(Duration::from_secs(20))).unwrap();
    assert_eq!(Link::new(near).unwrap().receive(step(Duration::ZERO)).unwrap(), prepare);
}

/// Each of its frames has its own time, and it could have any number that say little or nothing.
#[test]
fn a_hello_that_goes_on_and_on_is_refused() {
    for length in [0, 1] {
        let mut frame = Header { kind: Kind::Hello, flags: 1, length_bytes: length }.encode().to_vec();
        frame.resize(HEADER_BYTES + length as usize, 0);
        let error = Slow::link(&frame.repeat(1000), 4096).receive(step(PATIENCE)).unwrap_err().chain();
        assert!(error.contains(&format!("a hello goes on after a frame of {length} bytes")), "{error}");
    }
}

/// Each of its messages is there as soon as it is looked for.
#[test]
fn whoever_says_a_little_all_the_time_is_not_listened_to_to_its_end() {
    let (near, far) = Connection::pair().unwrap();
    let (mut near, mut far) = (Link::new(near).unwrap(), Link::new(far).unwrap());
    let talker = std::thread::spawn(move || {
        let mut said = 0;
        // Until nobody listens.
        while far.send(&Message::Mapped, step(PATIENCE)).is_ok() && said < 1_000_000 {
            said += 1;
            std::thread::sleep(PATIENCE);
        }
        said
    });
    assert!(near.last_words(Duration::ZERO).is_none());
    drop(near);
    assert!(talker.join().unwrap() < 4096, "it was heard to its end");
}

/// Who breaks one link and talks on another is not listened to for as long as that may be.
#[test]
fn last_words_are_found_behind_others_and_not_behind_any_number() {
    let frame = |message: &Message| {
        let (kind, body) = message.encode();
        [&header(kind, body.len() as u32)[..], &body].concat()
    };
    let after = |count| {
        let cancel = Message::Cancel(Reasons::new(&["because"]));
        let said = [frame(&Message::Mapped).repeat(count), frame(&cancel)].concat();
        Slow::link(&said, 4096).last_words(Duration::ZERO)
    };
    for count in [0, 1000] {
        let words = after(count);
        assert!(matches!(&words, Some(Error::Peer { reason }) if reason == "because"), "{count}: {words:?}");
    }
    assert!(after(100_000).is_none());
}
