//! Peers that have not said yet what they want.
//!
//! Each is heard by a thread of its own, for as long as a handshake may take, so that a silent or slow one keeps nobody
//! waiting. There are a few at most: whoever comes then takes the place of the one that has been silent for the longest.

use std::net::Shutdown;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use transport::Connection;

use crate::channels::destination::Incoming;
use crate::link::{Link, Step};
use crate::protocol::Message;
use crate::{Error, local};

/// How many peers are heard at a time. Each may send a hello of the greatest length.
const VISITORS_MAX: usize = 8;

/// How often a waiting destination looks whether it is to end.
pub(crate) const GLANCE: Duration = Duration::from_millis(50);
/// How long it listens to those who are there before it looks whether more have come.
const BLINK: Duration = Duration::from_millis(2);

/// A peer that speaks the protocol, and what it said first.
pub(crate) struct Visit {
    pub peer: String,
    pub link: Link,
    pub said: Result<Message, Error>,
    /// Descriptors can be passed from there to here.
    pub passes_descriptors: bool,
}

impl Visit {
    /// Hears the first words of a peer; nothing if it is none of ours, or is not believed to be who it says it is.
    pub fn of(mut connection: Connection, patience: Duration) -> Option<Self> {
        let peer = connection.peer().to_owned();
        if let Err(error) = connection.establish(patience) {
            log::warn!("a peer was turned away: {}", Error::from(error).chain());
            return None;
        }
        let step = Step { doing: "hearing who is there", patience, cancel: None, until: None };
        let greeted = Link::new(connection).and_then(|mut link| link.greet(step).map(|()| link));
        match greeted {
            Ok(mut link) => {
                let said = link.receive_with(1, step);
                let passes_descriptors =
                    matches!(&said, Ok((_, descriptors)) if local::has_token(descriptors));
                Some(Self { peer, link, said: said.map(|(message, _)| message), passes_descriptors })
            }
            Err(error) => {
                log::warn!("{peer}: {}", error.chain());
                None
            }
        }
    }
}

/// Hears several peers at once. Those that are still there when it is dropped are sent away.
pub(crate) struct Reception {
    patience: Duration,
    visitors: Vec<Visitor>,
    next_number: u64,
    said: Sender<(u64, Option<Visit>)>,
    heard: Receiver<(u64, Option<Visit>)>,
}

struct Visitor {
    number: u64,
    /// A second handle on the link.
    handle: Connection,
    thread: JoinHandle<()>,
}

impl Reception {
    /// Nobody is there yet. `patience` is for the first words of each.
    pub fn new(patience: Duration) -> Self {
        let (said, heard) = channel();
        Self { patience, visitors: Vec::new(), next_number: 0, said, heard }
    }

    /// Whether nobody is there.
    pub fn is_empty(&self) -> bool {
        self.visitors.is_empty()
    }

    /// Begins to hear a peer.
    ///
    /// # Errors
    /// No thread or descriptor is left; the peer is sent away.
    pub fn admit(&mut self, connection: Connection) -> Result<(), Error> {
        if self.visitors.len() == VISITORS_MAX {
            send_away(self.visitors.remove(0));
        }
        let handle =
            connection.try_clone().map_err(|source| Error::Lost { doing: "hearing a peer", source })?;
        let (number, patience, said) = (self.next_number, self.patience, self.said.clone());
        let thread = std::thread::Builder::new().name("reception".to_owned()).spawn(move || {
            let _nobody_listens_any_more = said.send((number, Visit::of(connection, patience)));
        });
        let thread = thread.map_err(|source| Error::Lost { doing: "hearing a peer", source })?;
        self.next_number += 1;
        self.visitors.push(Visitor { number, handle, thread });
        Ok(())
    }

    /// The next peer that has said something, if one does within `time`.
    pub fn hear(&mut self, time: Duration) -> Option<Visit> {
        let (number, visit) = match self.heard.recv_timeout(time) {
            Ok(said) => said,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        };
        // What one had said before it was sent away does not count: its link is cut.
        let place = self.visitors.iter().position(|visitor| visitor.number == number)?;
        let _it_has_nothing_left_to_do = self.visitors.remove(place).thread.join();
        visit
    }
}

/// Lets whoever comes within `patience` in, and gives the next one that has said something, if one does soon.
pub(crate) fn next_visit(
    reception: &mut Reception,
    incoming: &dyn Incoming,
    patience: Duration,
) -> Result<Option<Visit>, Error> {
    let (come, say) = if reception.is_empty() { (patience, Duration::ZERO) } else { (Duration::ZERO, BLINK) };
    if let Some(connection) = incoming.accept(come)?
        && let Err(error) = reception.admit(connection)
    {
        log::warn!("{}", error.chain());
    }
    Ok(reception.hear(say))
}

fn send_away(Visitor { handle, thread, .. }: Visitor) {
    let _gone_already = handle.shutdown(Shutdown::Both);
    let _it_ends_now = thread.join();
}

impl Drop for Reception {
    fn drop(&mut self) {
        self.visitors.drain(..).for_each(send_away);
    }
}
