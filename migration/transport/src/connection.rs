//! One link.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::net::sockopt;

use crate::descriptors::{self, Received};
use crate::{Error, Identity};

/// Bytes that the kernel may hold in each direction: enough that a sender and a receiver on two CPUs do not wait for
/// each other at every message. The kernel may grant less.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;

/// A full-duplex byte stream, as a [`Connection`] drives it.
pub trait Link: Read + Write + Send {
    /// A second handle on the same stream.
    ///
    /// # Errors
    /// No descriptor is left.
    fn try_clone(&self) -> io::Result<Box<dyn Link>>;

    /// How long a read may wait (`None`: for ever) before it fails with `WouldBlock` or `TimedOut`.
    ///
    /// # Errors
    /// The duration is zero, or the stream is gone.
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;

    /// The same for writes; what was written before the time was up counts.
    ///
    /// # Errors
    /// The duration is zero, or the stream is gone.
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;

    /// Ends one or both directions. Reads and writes of other threads return.
    ///
    /// # Errors
    /// The stream is gone already.
    fn shutdown(&self, how: Shutdown) -> io::Result<()>;

    /// Whether descriptors can go along with what is written. Whether they arrive is another matter: someone may stand between the
    /// two ends.
    fn passes_descriptors(&self) -> bool {
        false
    }

    /// Writes as [`Write::write`] does, and `descriptors` go along with the first byte.
    ///
    /// # Errors
    /// As there, or the link passes none.
    fn write_with(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        match descriptors {
            [] => self.write(bytes),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Reads as [`Read::read`] does, and takes the descriptors that come along; over a link that passes none, none come.
    ///
    /// # Errors
    /// As there, or more came than may.
    fn read_with(&mut self, buffer: &mut [u8], received: &mut Received) -> io::Result<usize> {
        let _none_come = received;
        self.read(buffer)
    }

    /// Does what comes before the first byte, and gives up after `timeout`. Where there is nothing to prove it is done.
    ///
    /// # Errors
    /// The peer cannot or does not prove who it is, or is not believed.
    fn establish(&mut self, timeout: Duration) -> Result<(), Error> {
        let _nothing_waits = timeout;
        Ok(())
    }

    /// Who the peer has proven to be, if this kind of stream asks for that.
    fn identity(&self) -> Option<Identity> {
        None
    }
}

macro_rules! impl_link {
    ($stream:ty { $($more:item)* }) => {
        impl Link for $stream {
            fn try_clone(&self) -> io::Result<Box<dyn Link>> {
                Ok(Box::new(self.try_clone()?))
            }
            fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
                self.set_read_timeout(timeout)
            }
            fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
                self.set_write_timeout(timeout)
            }
            fn shutdown(&self, how: Shutdown) -> io::Result<()> {
                self.shutdown(how)
            }
            $($more)*
        }
    };
}

impl_link!(TcpStream {});
impl_link!(UnixStream {
    fn passes_descriptors(&self) -> bool {
        true
    }
    fn write_with(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        descriptors::write_with(self, bytes, descriptors)
    }
    fn read_with(&mut self, buffer: &mut [u8], received: &mut Received) -> io::Result<usize> {
        descriptors::read_with(self, buffer, received)
    }
});

/// A [`Link`] that knows the name of its peer.
pub struct Connection {
    link: Box<dyn Link>,
    peer: String,
    /// Shared by all handles on a link that nobody can make again.
    only: Option<Arc<()>>,
}

impl Connection {
    /// A connection over any link.
    #[must_use]
    pub fn new(link: Box<dyn Link>, peer: impl Into<String>) -> Self {
        Self { link, peer: peer.into(), only: None }
    }

    pub(crate) fn from_unix(stream: UnixStream, peer: String) -> Result<Self, Error> {
        Self::size_buffers(&stream).map_err(|source| Error::Setup { peer: peer.clone(), source })?;
        Ok(Self::new(Box::new(stream), peer))
    }

    pub(crate) fn from_tcp(stream: TcpStream, peer: String) -> Result<Self, Error> {
        // Messages are written whole; waiting for more data would only add to the downtime.
        stream.set_nodelay(true).map_err(|source| Error::Setup { peer: peer.clone(), source })?;
        // The kernel tunes TCP buffers by itself, and a fixed size would switch that off.
        Ok(Self::new(Box::new(stream), peer))
    }

    /// Both ends of a link within this process.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn pair() -> Result<(Self, Self), Error> {
        let setup = |source| Error::Setup { peer: "this process".to_owned(), source };
        let (one, other) = UnixStream::pair().map_err(setup)?;
        Ok((Self::from_unix(one, "pair:0".to_owned())?, Self::from_unix(other, "pair:1".to_owned())?))
    }

    fn size_buffers(stream: &UnixStream) -> io::Result<()> {
        sockopt::set_socket_send_buffer_size(stream, SOCKET_BUFFER_BYTES)?;
        sockopt::set_socket_recv_buffer_size(stream, SOCKET_BUFFER_BYTES)?;
        Ok(())
    }

    /// The same with another link on top.
    pub(crate) fn try_map(
        self,
        change: impl FnOnce(Box<dyn Link>, &str) -> Result<Box<dyn Link>, Error>,
    ) -> Result<Self, Error> {
        let Self { link, peer, only } = self;
        Ok(Self { link: change(link, &peer)?, peer, only })
    }

    /// Something that lives as long as a handle on this link does.
    pub(crate) fn lives(&mut self) -> Weak<()> {
        Arc::downgrade(self.only.get_or_insert_default())
    }

    /// Lets both ends prove who they are, where the listener or the endpoint asks for that, and gives up after `timeout`.
    /// Whoever accepts a connection calls this before the first byte, on a thread that may wait for the peer; one that was
    /// [connected](crate::Endpoint::connect) is established.
    ///
    /// # Errors
    /// The peer is not believed or does not believe us, or the time is up. It has been told why, and the link is shut down.
    pub fn establish(&mut self, timeout: Duration) -> Result<(), Error> {
        self.link.establish(timeout)
    }

    /// Who the peer has proven to be; nothing without TLS. All connections of one session must come from the same peer: what is
    /// bound to a session by a secret is compared by this too.
    #[must_use]
    pub fn identity(&self) -> Option<Identity> {
        self.link.identity()
    }

    /// The other end, for messages.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// A second handle on the same link, for a thread that reads while this one writes, or that shuts it down.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { link: self.link.try_clone()?, peer: self.peer.clone(), only: self.only.clone() })
    }

    /// See [`Link::set_read_timeout`].
    ///
    /// # Errors
    /// As there.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.link.set_read_timeout(timeout)
    }

    /// See [`Link::set_write_timeout`].
    ///
    /// # Errors
    /// As there.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.link.set_write_timeout(timeout)
    }

    /// See [`Link::shutdown`].
    ///
    /// # Errors
    /// As there.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.link.shutdown(how)
    }

    /// See [`Link::passes_descriptors`].
    #[must_use]
    pub fn passes_descriptors(&self) -> bool {
        self.link.passes_descriptors()
    }

    /// See [`Link::write_with`].
    ///
    /// # Errors
    /// As there.
    pub fn write_with(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        self.link.write_with(bytes, descriptors)
    }

    /// See [`Link::read_with`].
    ///
    /// # Errors
    /// As there.
    pub fn read_with(&mut self, buffer: &mut [u8], received: &mut Received) -> io::Result<usize> {
        self.link.read_with(buffer, received)
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.link.read(buffer)
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.link.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.link.flush()
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("peer", &self.peer).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_peer_does_not_hold_a_reader_or_a_writer() {
        let (mut one, _other) = Connection::pair().unwrap();
        one.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        one.set_write_timeout(Some(Duration::from_millis(1))).unwrap();
        let kind = one.read(&mut [0; 8]).unwrap_err().kind();
        assert!(matches!(kind, io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{kind}");
        let block = vec![0; SOCKET_BUFFER_BYTES];
        let kind = loop {
            if let Err(error) = one.write(&block) {
                break error.kind();
            }
        };
        assert!(matches!(kind, io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{kind}");
    }

    #[test]
    fn another_handle_ends_a_blocked_read() {
        let (mut one, mut other) = Connection::pair().unwrap();
        other.write_all(b"x").unwrap();
        let handle = one.try_clone().unwrap();
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            one.read_to_end(&mut bytes).map(|_| bytes)
        });
        handle.shutdown(Shutdown::Both).unwrap();
        let bytes = reader.join().unwrap().unwrap();
        assert!(bytes.len() <= 1);
        assert_eq!(other.write(b"y").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
