//! One link.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::net::sockopt;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::descriptors::{self, Received};
use crate::{Error, Identity, memory};

/// Bytes that the kernel may hold in each direction: enough that a sender and a receiver on two CPUs do not wait for
/// each other at every message. The kernel may grant less.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;

/// Memory that is copied at a time where a link does not take it as it is.
const COPY_BYTES: usize = 64 << 10;

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

    /// The socket, if the peer receives what is sent there as it is. Links that change or watch the bytes have none: what
    /// they carry is copied through [`Read`] and [`Write`].
    fn socket(&self) -> Option<BorrowedFd<'_>> {
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
            fn socket(&self) -> Option<BorrowedFd<'_>> {
                Some(self.as_fd())
            }
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
    /// A copy of memory that the link did not take, and from which byte of a message on.
    untaken: Option<(usize, Vec<u8>)>,
}

impl Connection {
    /// A connection over any link.
    #[must_use]
    pub fn new(link: Box<dyn Link>, peer: impl Into<String>) -> Self {
        Self { link, peer: peer.into(), only: None, untaken: None }
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
        let Self { link, peer, only, untaken } = self;
        Ok(Self { link: change(link, &peer)?, peer, only, untaken })
    }

    /// Something that lives as long as a handle on this link does.
    pub(crate) fn lives(&mut self) -> Weak<()> {
        Arc::downgrade(self.only.get_or_insert_default())
    }

    /// Whether nobody can make another link with the same peer: it came from a socket that was given.
    #[must_use]
    pub fn is_the_only_one(&self) -> bool {
        self.only.is_some()
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
        let (link, peer, only) = (self.link.try_clone()?, self.peer.clone(), self.only.clone());
        Ok(Self { link, peer, only, untaken: None })
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

    /// Sends `head` and then `memory`, from byte `skip` of both on, and returns how many bytes were taken. A socket takes them
    /// from where they are; for other links they are copied. After an error the same is sent again or nothing any more: a link
    /// may have begun with what it says that it did not take (TLS has), so it is shown the same bytes whatever the memory holds by then.
    ///
    /// # Errors
    /// As [`Write::write`].
    pub fn send_memory<B: BitmapSlice>(
        &mut self,
        head: &[u8],
        memory: &[VolatileSlice<'_, B>],
        skip: usize,
    ) -> io::Result<usize> {
        if let Some(socket) = self.link.socket() {
            return memory::send(socket, head, memory, skip);
        }
        let bytes = match self.untaken.take() {
            Some((start, bytes)) if start == skip => bytes,
            _ => copied(head, memory, skip)?,
        };
        let result = self.link.write(&bytes);
        if result.is_err() {
            self.untaken = Some((skip, bytes));
        }
        result
    }

    /// Receives into `memory` from its byte `skip` on, and returns how many bytes came: all that is missing, unless the time of
    /// [`set_read_timeout`](Self::set_read_timeout) is up before; 0 at the end.
    ///
    /// # Errors
    /// As [`Read::read`].
    pub fn receive_memory<B: BitmapSlice>(
        &mut self,
        memory: &[VolatileSlice<'_, B>],
        skip: usize,
    ) -> io::Result<usize> {
        if let Some(socket) = self.link.socket() {
            return memory::receive(socket, memory, skip);
        }
        let Some((slice, from)) = memory::pieces_after(memory, skip).next() else { return Ok(0) };
        let mut bytes = vec![0; (slice.len() - from).min(COPY_BYTES)];
        let count = self.link.read(&mut bytes)?;
        let slice = slice.subslice(from, count).map_err(io::Error::other)?;
        slice.copy_from(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// What is left of `head` and `memory` after `skip` bytes, as much as is copied at a time.
fn copied<B: BitmapSlice>(head: &[u8], memory: &[VolatileSlice<'_, B>], skip: usize) -> io::Result<Vec<u8>> {
    let mut bytes = head.get(skip..).unwrap_or_default().to_vec();
    for (slice, from) in memory::pieces_after(memory, skip.saturating_sub(head.len())) {
        let start = bytes.len();
        let length = (slice.len() - from).min(COPY_BYTES.saturating_sub(start));
        if length == 0 {
            break;
        }
        let slice = slice.subslice(from, length).map_err(io::Error::other)?;
        bytes.resize(start + length, 0);
        slice.copy_to(bytes.get_mut(start..).unwrap_or_default());
    }
    Ok(bytes)
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
    use std::net::TcpListener;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::{Endpoint, Listener, Security, Uri};

    /// Only ends a hang.
    const SOON: Duration = Duration::from_secs(30);

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

    /// Both ends of a link with `listener`, the one that dials first.
    fn ends_of(listener: &Listener, dial: impl FnOnce() -> Result<Connection, Error>) -> [Connection; 2] {
        let one = dial().unwrap();
        [one, listener.accept(SOON).unwrap().expect("somebody has dialled")]
    }

    fn given(socket: impl Into<OwnedFd>) -> (OwnedFd, Endpoint) {
        (socket.into(), Endpoint { uri: "fd:7".parse().unwrap(), security: Security::ThisHost })
    }

    fn option<T: PartialEq + fmt::Debug>(
        connection: &Connection,
        read: impl Fn(BorrowedFd<'_>) -> rustix::io::Result<T>,
    ) -> T {
        read(connection.link.socket().expect("it is a socket")).unwrap()
    }

    /// Dialled, accepted and given ones.
    #[test]
    fn tcp_sends_every_message_at_once() {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let mut all = Vec::new();
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        all.extend(ends_of(&listener, || listener.uri().connect(SOON)));
        let insecure = Endpoint { uri: listener.uri().clone(), security: Security::Insecure };
        all.extend(ends_of(&listener, || insecure.connect(SOON)));

        let plain = listen();
        let address = plain.local_addr().unwrap();
        let (socket, endpoint) = given(plain);
        let listener = Listener::over(socket, &endpoint).unwrap();
        all.extend(ends_of(&listener, || {
            let (socket, endpoint) = given(TcpStream::connect(address).unwrap());
            endpoint.connect_over(socket, SOON)
        }));
        // The socket of an only peer.
        let plain = listen();
        let other = TcpStream::connect(plain.local_addr().unwrap()).unwrap();
        let (socket, endpoint) = given(plain.accept().unwrap().0);
        all.extend(Listener::over(socket, &endpoint).unwrap().accept(SOON).unwrap());
        assert!(!other.nodelay().unwrap(), "it is not what sockets do by themselves");
        let at_once: Vec<_> =
            all.iter().map(|one| option(one, |socket| sockopt::tcp_nodelay(socket))).collect();
        assert_eq!(at_once, [true; 7]);
    }

    /// As large as the kernel lets them be, up to what is wanted.
    #[test]
    fn unix_sockets_have_room_for_many_messages() {
        let sizes = |socket: BorrowedFd<'_>| {
            Ok([sockopt::socket_send_buffer_size(socket)?, sockopt::socket_recv_buffer_size(socket)?])
        };
        let (plain, wide) = UnixStream::pair().unwrap();
        sockopt::set_socket_send_buffer_size(&wide, 1 << 20).unwrap();
        sockopt::set_socket_recv_buffer_size(&wide, 1 << 20).unwrap();
        let (usual, expected) = (sizes(plain.as_fd()).unwrap(), sizes(wide.as_fd()).unwrap());
        assert!(
            usual.iter().zip(&expected).all(|(usual, expected)| usual < expected),
            "{usual:?} {expected:?}"
        );

        let (one, other) = Connection::pair().unwrap();
        let mut all = vec![one, other];
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let listener = Listener::bind(&Uri::Unix(path("ours"))).unwrap();
        all.extend(ends_of(&listener, || listener.uri().connect(SOON)));
        let (socket, endpoint) = given(UnixListener::bind(path("given")).unwrap());
        let listener = Listener::over(socket, &endpoint).unwrap();
        all.extend(ends_of(&listener, || {
            let (socket, endpoint) = given(UnixStream::connect(path("given")).unwrap());
            endpoint.connect_over(socket, SOON)
        }));
        let (_other, only) = UnixStream::pair().unwrap();
        let (socket, endpoint) = given(only);
        all.extend(Listener::over(socket, &endpoint).unwrap().accept(SOON).unwrap());
        let found: Vec<_> = all.iter().map(|one| option(one, sizes)).collect();
        assert_eq!(found, [expected; 7]);
    }

    /// Passes everything on and has no socket to show.
    struct Veiled(UnixStream);

    impl Read for Veiled {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl Write for Veiled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Link for Veiled {
        fn try_clone(&self) -> io::Result<Box<dyn Link>> {
            Ok(Box::new(Self(self.0.try_clone()?)))
        }
        fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
            self.0.set_read_timeout(timeout)
        }
        fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
            self.0.set_write_timeout(timeout)
        }
        fn shutdown(&self, how: Shutdown) -> io::Result<()> {
            self.0.shutdown(how)
        }
    }

    fn ends(veiled: bool) -> (Connection, Connection) {
        if !veiled {
            return Connection::pair().unwrap();
        }
        let (one, other) = UnixStream::pair().unwrap();
        (Connection::new(Box::new(Veiled(one)), "one"), Connection::new(Box::new(Veiled(other)), "other"))
    }

    /// More pieces than one call takes, of many lengths, some of them empty: all of it arrives, in order, however it is cut.
    #[test]
    fn memory_is_gathered_and_scattered_as_it_is() {
        for veiled in [false, true] {
            let (mut one, mut other) = ends(veiled);
            let lengths = |seed: usize| (0..600).map(move |number| number * seed % 1999);
            let total: usize = lengths(7).sum();
            let mut sent: Vec<u8> = (0..total).map(|byte| (byte % 251) as u8).collect();
            let head = b"a head".as_slice();
            let expected = [head, &sent].concat();
            let mut received = vec![0; expected.len()];
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let (mut rest, mut memory) = (sent.as_mut_slice(), Vec::new());
                    for length in lengths(7) {
                        let (piece, after) = rest.split_at_mut(length);
                        memory.push(VolatileSlice::from(piece));
                        rest = after;
                    }
                    let mut skip = 0;
                    while skip < expected.len() {
                        skip += one.send_memory(head, &memory, skip).unwrap();
                    }
                    one.shutdown(Shutdown::Write).unwrap();
                });
                let (mut rest, mut memory) = (received.as_mut_slice(), Vec::new());
                for length in lengths(11).chain([expected.len()]) {
                    let (piece, after) = rest.split_at_mut(length.min(rest.len()));
                    memory.push(VolatileSlice::from(piece));
                    rest = after;
                }
                let mut skip = 0;
                while skip < expected.len() {
                    let count = other.receive_memory(&memory, skip).unwrap();
                    assert_ne!(count, 0, "the end after {skip} bytes");
                    skip += count;
                }
                assert_eq!(other.receive_memory(&memory[..0], 0).unwrap(), 0);
            });
            assert!(received == expected, "veiled: {veiled}");
            let mut more = [0; 1];
            assert_eq!(other.receive_memory(&[VolatileSlice::from(more.as_mut_slice())], 0).unwrap(), 0);
        }
    }

    #[test]
    fn memory_for_a_peer_that_takes_nothing_is_an_error_in_time() {
        for veiled in [false, true] {
            let (mut one, mut other) = ends(veiled);
            one.set_write_timeout(Some(Duration::from_millis(1))).unwrap();
            other.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
            let mut block = vec![0; COPY_BYTES];
            let memory = [VolatileSlice::from(block.as_mut_slice())];
            assert_eq!(other.receive_memory(&memory, 0).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            let kind = loop {
                if let Err(error) = one.send_memory(b"head", &memory, 0) {
                    break error.kind();
                }
            };
            assert_eq!(kind, io::ErrorKind::WouldBlock);
            drop(other);
            let kind = one.send_memory(b"head", &memory, 0).unwrap_err().kind();
            assert_eq!(kind, io::ErrorKind::BrokenPipe, "and no signal");
        }
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
