//! Links on which all that is said is heard.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stream::frame::{HEADER_BYTES, Header, Kind};
use transport::{Connection, Link, Received};

use crate::protocol::{ChannelHello, Message};

/// All bytes of one end of a link.
type Words = Arc<Mutex<Vec<u8>>>;

/// Hears every message on some links, and tells of it before it is sent.
#[derive(Default)]
pub struct Overheard {
    ends: Mutex<Vec<Words>>,
    on_message: Option<Box<dyn Fn(Kind) + Send + Sync>>,
}

impl Overheard {
    /// With someone who is told of every message before it goes.
    pub fn with_listener(on_message: impl Fn(Kind) + Send + Sync + 'static) -> Self {
        Self { ends: Mutex::default(), on_message: Some(Box::new(on_message)) }
    }

    /// The same connection, on which all that this end says is heard.
    pub fn hear(self: &Arc<Self>, inner: Connection) -> Connection {
        let words = Words::default();
        self.ends.lock().unwrap().push(Arc::clone(&words));
        let peer = inner.peer().to_owned();
        Connection::new(Box::new(Ear { inner, words, overheard: Arc::clone(self) }), peer)
    }

    /// Every message so far, end by end; of a channel for guest memory only the first, since what follows is none.
    pub fn messages(&self) -> Vec<(Kind, Vec<u8>)> {
        let ends = self.ends.lock().unwrap();
        ends.iter()
            .flat_map(|words| messages(&words.lock().unwrap_or_else(PoisonError::into_inner)))
            .collect()
    }

    /// Whether there was one of this kind.
    pub fn has(&self, kind: Kind) -> bool {
        self.messages().iter().any(|(other, _)| *other == kind)
    }
}

fn messages(words: &[u8]) -> Vec<(Kind, Vec<u8>)> {
    let mut found = Vec::new();
    // After the preamble.
    let mut rest = words.get(HEADER_BYTES..).unwrap_or_default();
    while let Some((header, after)) = rest.split_first_chunk() {
        let header = Header::decode(*header).unwrap();
        let Some((body, after)) = after.split_at_checked(header.length_bytes as usize) else { break };
        found.push((header.kind, body.to_vec()));
        rest = after;
        if header.kind == Kind::ChannelHello
            && let Ok(Message::Channel(ChannelHello { purpose: ChannelHello::MEMORY, .. })) =
                Message::decode(header.kind, body)
        {
            break;
        }
    }
    found
}

struct Ear {
    inner: Connection,
    words: Words,
    overheard: Arc<Overheard>,
}

impl Ear {
    fn tell(&self, bytes: &[u8]) {
        if let Some(on_message) = &self.overheard.on_message
            && let Some(header) = bytes.first_chunk()
            && let Ok(header) = Header::decode(*header)
        {
            on_message(header.kind);
        }
    }
}

impl Read for Ear {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer)
    }
}

impl Write for Ear {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_with(bytes, &[])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl Link for Ear {
    fn try_clone(&self) -> io::Result<Box<dyn Link>> {
        let (inner, words) = (self.inner.try_clone()?, Arc::clone(&self.words));
        Ok(Box::new(Self { inner, words, overheard: Arc::clone(&self.overheard) }))
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
        self.tell(bytes);
        // Those who share a link take turns: nobody else writes in between.
        let count = self.inner.write_with(bytes, descriptors)?;
        self.words.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes.iter().take(count));
        Ok(count)
    }
    fn read_with(&mut self, buffer: &mut [u8], received: &mut Received) -> io::Result<usize> {
        self.inner.read_with(buffer, received)
    }
}
