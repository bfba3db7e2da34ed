//! A link between a source and a destination that can be stopped at a frame.
//!
//! It understands no more of the traffic than where a frame ends and of which kind it is. The first frame of the chosen kind
//! is held until the test says what becomes of it, so that every fault happens at a known point of the protocol. Descriptors go on
//! with the frames that they came with.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use stream::frame::{HEADER_BYTES, Header, Kind};

use crate::{TestBed, WATCHDOG, passing};

/// The link; it carries one connection after the other.
#[derive(Debug)]
pub struct Proxy {
    uri: String,
    held: Receiver<Held>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    target: PathBuf,
    kind: Kind,
    /// Taken by the first frame of the kind.
    holds: Mutex<Option<Sender<Held>>>,
    /// Whether connections are carried.
    open: AtomicBool,
    /// The frames that came, held or not, in order.
    seen: Mutex<Vec<Kind>>,
    saw: Condvar,
}

/// A frame that waits. Dropping it cuts its connection.
#[derive(Debug)]
pub struct Held {
    header: Header,
    body: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    from: UnixStream,
    to: UnixStream,
    /// Its end ends the thread that found the frame.
    _until: Sender<()>,
}

impl Proxy {
    /// A link, called `name`, to the Unix socket at `target`, which holds the first frame of `kind`.
    #[must_use]
    pub fn new(bed: &TestBed, name: &str, target: &Path, kind: Kind) -> Self {
        let path = bed.path(name);
        let listener = UnixListener::bind(&path).expect("the proxy listens");
        let (sender, held) = channel();
        let shared = Arc::new(Shared {
            target: target.to_owned(),
            kind,
            holds: Mutex::new(Some(sender)),
            open: AtomicBool::new(true),
            seen: Mutex::default(),
            saw: Condvar::new(),
        });
        let carrier = Arc::clone(&shared);
        std::thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                if carrier.open.load(Ordering::SeqCst) {
                    carrier.carry(connection);
                }
            }
        });
        Self { uri: format!("unix:{}", path.display()), held, shared }
    }

    /// Where the source is to go.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Waits until the frame has come.
    #[must_use]
    pub fn held(&self) -> Held {
        let kind = self.shared.kind;
        self.held.recv_timeout(WATCHDOG).unwrap_or_else(|_| panic!("no {kind:?} came within {WATCHDOG:?}"))
    }

    /// Waits until a frame of this kind has come, before or after now, and says whether it has.
    #[must_use]
    pub fn saw(&self, kind: Kind, patience: Duration) -> bool {
        let seen = self.shared.seen.lock().expect("no thread panics here");
        let not_yet = |seen: &mut Vec<Kind>| !seen.contains(&kind);
        let (seen, _) =
            self.shared.saw.wait_timeout_while(seen, patience, not_yet).expect("no thread panics here");
        seen.contains(&kind)
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

impl Held {
    /// Sends the frame on. The link stays as it is until the frame is dropped, which cuts it.
    pub fn deliver(&self) {
        let Self { header, body, descriptors, to, .. } = self;
        passing::write(to, *header, body, descriptors).expect("the receiver takes it");
    }

    /// Loses the frame and the connection.
    pub fn cut(self) {
        for end in [&self.from, &self.to] {
            // It may be gone already.
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Cuts off whoever sent the frame. The other side notices nothing until the frame is dropped.
    pub fn cut_sender(&self) {
        let _ = self.from.shutdown(Shutdown::Both);
    }
}

impl Shared {
    /// Carries one connection, on two threads.
    fn carry(self: &Arc<Self>, source: UnixStream) {
        // A destination that is gone: `source` is closed.
        let Ok(destination) = UnixStream::connect(&self.target) else { return };
        let clone = |stream: &UnixStream| stream.try_clone().expect("a descriptor");
        let ways = [(clone(&source), clone(&destination)), (destination, source)];
        for (from, to) in ways {
            let shared = Arc::clone(self);
            std::thread::spawn(move || {
                shared.forward(&from, &to);
                for end in [&from, &to] {
                    // It may be gone already.
                    let _ = end.shutdown(Shutdown::Both);
                }
            });
        }
    }

    /// Carries one direction, until `None`: it ends, or was cut.
    fn forward(&self, mut from: &UnixStream, mut to: &UnixStream) -> Option<Infallible> {
        let mut preamble = [0; HEADER_BYTES];
        from.read_exact(&mut preamble).ok()?;
        to.write_all(&preamble).ok()?;
        let mut body = Vec::new();
        loop {
            let (header, descriptors) = passing::read(from, &mut body)?;
            self.seen.lock().ok()?.push(header.kind);
            self.saw.notify_all();
            let hold = if header.kind == self.kind { self.holds.lock().ok()?.take() } else { None };
            let Some(hold) = hold else {
                passing::write(to, header, &body, &descriptors).ok()?;
                if header.kind == Kind::ChannelHello {
                    // No frames follow.
                    let (mut from, mut to) = (from, to);
                    std::io::copy(&mut from, &mut to).ok()?;
                    return None;
                }
                continue;
            };
            let (until, dropped) = channel::<()>();
            let held = Held {
                header,
                body: std::mem::take(&mut body),
                descriptors,
                from: from.try_clone().ok()?,
                to: to.try_clone().ok()?,
                _until: until,
            };
            hold.send(held).ok()?;
            // Nothing is ever sent.
            let _ = dropped.recv();
            return None;
        }
    }
}
