//! Waiting for a peer.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, Weak};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::given::Given;
use crate::{Connection, Endpoint, Error, PrivateSocket, Security, Uri};

/// How long to wait for what the process or the host lacks to let a peer in.
const SHORTAGE: Duration = Duration::from_millis(100);

/// Descriptors that a peer needs until it is heard: that of its socket, and others of the same for TLS, and for whoever may have to cut
/// it off.
const DESCRIPTORS_OF_A_PEER: usize = 4;

/// Fails if there are none left for a peer: one that was let in could only be sent away, and who waits in the queue is let in later.
fn spare_descriptors(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut taken = [const { None::<OwnedFd> }; DESCRIPTORS_OF_A_PEER];
    taken.iter_mut().try_for_each(|slot| {
        *slot = Some(socket.try_clone_to_owned()?);
        Ok(())
    })
}

/// An error of the connection that was to be accepted, which has gone again; the network's own come out of accept(2) too.
fn is_of_the_peer(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::AGAIN
            | Errno::CONNABORTED
            | Errno::CONNRESET
            | Errno::INTR
            | Errno::NETDOWN
            | Errno::PROTO
            | Errno::NOPROTOOPT
            | Errno::HOSTDOWN
            | Errno::NONET
            | Errno::HOSTUNREACH
            | Errno::OPNOTSUPP
            | Errno::NETUNREACH
    )
}

/// A lack of something that others have at present.
fn is_passing(errno: Errno) -> bool {
    matches!(errno, Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
}

#[derive(Debug)]
enum Socket {
    Unix(PrivateSocket),
    Tcp(TcpListener),
    /// One that someone else made, and whose file is theirs.
    GivenUnix(UnixListener),
    /// No listener at all: the one peer that there will be, and whether it is there.
    Connected(Mutex<(Option<Connection>, Weak<()>)>),
}

/// A listening address. Dropping it removes the file of a Unix socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    uri: Uri,
    security: Security,
    /// The last peer could not be let in for a lack of something, which was told.
    is_short: AtomicBool,
}

impl Listener {
    /// Listens at `uri` for peers of this host. A socket file that a dead process left behind is replaced.
    ///
    /// # Errors
    /// A living process listens there, the path is something else than a socket, the address lies beyond this host, or
    /// it is a file.
    pub fn bind(uri: &Uri) -> Result<Self, Error> {
        Self::bind_endpoint(&Endpoint { uri: uri.clone(), security: Security::ThisHost })
    }

    /// Listens at an endpoint, for whom its security lets in.
    ///
    /// # Errors
    /// As [`bind`](Self::bind); an address beyond this host is one only where nothing protects it.
    pub fn bind_endpoint(endpoint: &Endpoint) -> Result<Self, Error> {
        let Endpoint { uri, security } = endpoint;
        let failed = |source| Error::Listen { uri: uri.to_string(), source };
        match uri {
            Uri::Unix(path) => {
                let socket = PrivateSocket::bind(path)?;
                socket.set_nonblocking(true).map_err(failed)?;
                Ok(Self::new(Socket::Unix(socket), uri, security))
            }
            Uri::Tcp { host, .. } => {
                let addresses = uri.addresses(security.goes_beyond())?;
                let listener =
                    TcpListener::bind(addresses.as_slice()).map_err(|source| match source.kind() {
                        io::ErrorKind::AddrInUse => Error::InUse { uri: uri.to_string() },
                        _ => failed(source),
                    })?;
                listener.set_nonblocking(true).map_err(failed)?;
                let port = listener.local_addr().map_err(failed)?.port();
                security.warn(uri);
                let uri = Uri::Tcp { host: host.clone(), port };
                Ok(Self::new(Socket::Tcp(listener), &uri, security))
            }
            Uri::Fd(_) | Uri::File { .. } => Err(uri.not_a_link()),
        }
    }

    /// Listens at a socket that this process was given, or hears the one peer that it is connected with.
    ///
    /// # Errors
    /// It is no such socket, or leads beyond this host where nothing protects it.
    pub fn over(descriptor: OwnedFd, endpoint: &Endpoint) -> Result<Self, Error> {
        let Endpoint { uri, security } = endpoint;
        let failed = |source| Error::Listen { uri: uri.to_string(), source };
        let socket = match Given::new(descriptor, uri, security)? {
            Given::UnixListener(listener) => {
                listener.set_nonblocking(true).map_err(failed)?;
                Socket::GivenUnix(listener)
            }
            Given::TcpListener(listener) => {
                listener.set_nonblocking(true).map_err(failed)?;
                Socket::Tcp(listener)
            }
            connected => {
                let mut connection = connected.connection(uri)?;
                let lives = connection.lives();
                Socket::Connected(Mutex::new((Some(connection), lives)))
            }
        };
        Ok(Self::new(socket, uri, security))
    }

    fn new(socket: Socket, uri: &Uri, security: &Security) -> Self {
        Self { socket, uri: uri.clone(), security: security.clone(), is_short: AtomicBool::new(false) }
    }

    /// Where it listens; a port that the system chose is filled in.
    #[must_use]
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The next peer, or `None` if none came within `timeout`. It is to be [established](Connection::establish).
    ///
    /// # Errors
    /// The listening socket is broken. A peer that went away again is not an error of the listener, nor is a lack of descriptors or memory,
    /// which may pass: the peer waits in the queue.
    pub fn accept(&self, timeout: Duration) -> Result<Option<Connection>, Error> {
        let failed = |source| Error::Listen { uri: self.uri.to_string(), source };
        let time = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: i32::MAX.into(), tv_nsec: 0 });
        let fd = match &self.socket {
            Socket::Unix(listener) => listener.as_fd(),
            Socket::GivenUnix(listener) => listener.as_fd(),
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Connected(peer) => return self.only_peer(peer, &time),
        };
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&time)) {
            Ok(0) | Err(Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        let accepted = spare_descriptors(fd).and_then(|()| match &self.socket {
            Socket::Unix(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                Ok(Connection::from_unix(stream, self.uri.to_string()))
            }),
            Socket::GivenUnix(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                Ok(Connection::from_unix(stream, self.uri.to_string()))
            }),
            Socket::Connected(_) => Err(Errno::AGAIN.into()),
            Socket::Tcp(listener) => listener.accept().and_then(|(stream, peer)| {
                stream.set_nonblocking(false)?;
                Ok(Connection::from_tcp(stream, format!("tcp:{peer}")))
            }),
        });
        match accepted {
            Ok(connection) => {
                self.is_short.store(false, Ordering::Relaxed);
                // One that cannot be set up is the peer's loss, and the next may come.
                let set_up = connection.and_then(|connection| self.secure(connection));
                Ok(set_up.inspect_err(|error| log::warn!("{error}")).ok())
            }
            Err(error) if Errno::from_io_error(&error).is_some_and(is_of_the_peer) => Ok(None),
            Err(error) if Errno::from_io_error(&error).is_some_and(is_passing) => {
                if !self.is_short.swap(true, Ordering::Relaxed) {
                    log::warn!("cannot let in who comes to {}, and tries again: {error}", self.uri);
                }
                // Whoever waits in the queue is there at once when this is asked again.
                std::thread::sleep(timeout.min(SHORTAGE));
                Ok(None)
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn secure(&self, connection: Connection) -> Result<Connection, Error> {
        match &self.security {
            Security::ThisHost | Security::Insecure => Ok(connection),
            Security::Tls(credentials) => connection.with_tls(|peer| credentials.server(peer)),
        }
    }

    /// The one peer of a connected socket; an error once it has been heard and nobody can come any more.
    fn only_peer(
        &self,
        peer: &Mutex<(Option<Connection>, Weak<()>)>,
        time: &Timespec,
    ) -> Result<Option<Connection>, Error> {
        let (waiting, lives) = &mut *peer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = waiting.take() {
            return self.secure(connection).map(Some);
        }
        if lives.strong_count() == 0 {
            let reason = "the one peer of this socket has gone".to_owned();
            return Err(Error::Address { text: self.uri.to_string(), reason });
        }
        // As long as it is heard there is nothing to wait for but the time.
        let _interrupted = poll(&mut [], Some(time));
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn exchange(listener: &Listener) {
        let mut client = listener.uri().connect(SOON).unwrap();
        let mut server = listener.accept(SOON).unwrap().unwrap();
        client.write_all(b"ping").unwrap();
        let mut bytes = [0; 4];
        server.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ping");
        assert!(listener.accept(Duration::ZERO).unwrap().is_none());
    }

    #[test]
    fn unix_socket_is_private_and_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = Listener::bind(&Uri::Unix(path.clone())).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        exchange(&listener);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn tcp_fills_in_the_port() {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        assert!(!matches!(listener.uri(), Uri::Tcp { port: 0, .. }));
        exchange(&listener);
        assert!(matches!(Listener::bind(listener.uri()), Err(Error::InUse { .. })));
        let beyond = "tcp:0.0.0.0:0".parse().unwrap();
        assert!(matches!(Listener::bind(&beyond), Err(Error::BeyondLoopback { .. })));
    }

    /// The address of all interfaces is none of loopback, and yet reaches this host.
    #[test]
    fn other_hosts_are_heard_and_reached_only_where_the_user_says_so() {
        let anywhere = |security| Endpoint { uri: "tcp:0.0.0.0:0".parse().unwrap(), security };
        let refused = Listener::bind_endpoint(&anywhere(Security::ThisHost)).unwrap_err();
        assert!(
            refused.to_string().ends_with("needs TLS (--tls-dir), or --insecure to do without"),
            "{refused}"
        );
        let listener = Listener::bind_endpoint(&anywhere(Security::Insecure)).unwrap();
        let uri = listener.uri().clone();
        assert!(matches!(uri.connect(SOON), Err(Error::BeyondLoopback { .. })));
        let mut client = Endpoint { uri, security: Security::Insecure }.connect(SOON).unwrap();
        client.write_all(b"x").unwrap();
        let mut server = listener.accept(SOON).unwrap().unwrap();
        server.establish(SOON).unwrap();
        server.read_exact(&mut [0; 1]).unwrap();
        assert_eq!((client.identity(), server.identity()), (None, None));
    }

    #[test]
    fn a_dead_socket_is_replaced_a_live_one_and_a_file_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let uri = Uri::Unix(folder.path().join("socket"));
        drop(UnixListener::bind(folder.path().join("socket")).unwrap());
        let listener = Listener::bind(&uri).unwrap();
        assert!(matches!(Listener::bind(&uri), Err(Error::InUse { .. })));
        exchange_after_probe(&listener);
        let file = Uri::Unix(folder.path().join("file"));
        fs::write(folder.path().join("file"), "precious").unwrap();
        assert!(matches!(Listener::bind(&file), Err(Error::NotASocket { .. })));
        assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"precious");
    }

    /// The refused `bind` knocked at the door and left; the next peer is served all the same.
    fn exchange_after_probe(listener: &Listener) {
        let mut probe = listener.accept(SOON).unwrap().unwrap();
        assert_eq!(probe.read(&mut [0; 1]).unwrap(), 0);
        exchange(listener);
    }

    #[test]
    fn a_peer_that_accepts_nobody_holds_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let uri = Uri::Unix(folder.path().join("socket"));
        let listener = Listener::bind(&uri).unwrap();
        let mut waiting = Vec::new();
        let error = loop {
            assert!(waiting.len() < 100, "the backlog has no end");
            match uri.connect(Duration::from_millis(10)) {
                Ok(connection) => waiting.push(connection),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        assert!(matches!(Listener::bind(&uri), Err(Error::InUse { .. })));
        drop(listener);
    }

    #[test]
    fn a_socket_that_was_given_is_heard_if_it_listens_and_once_if_it_is_connected() {
        let endpoint = |security| Endpoint { uri: "fd:given".parse().unwrap(), security };
        let here = endpoint(Security::ThisHost);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let unix = Listener::over(UnixListener::bind(&path).unwrap().into(), &here).unwrap();
        for _ in 0..2 {
            let _client = Uri::Unix(path.clone()).connect(SOON).unwrap();
            assert!(unix.accept(SOON).unwrap().is_some());
        }
        drop(unix);
        assert!(path.exists(), "its file is not ours");

        let (one, other) = UnixStream::pair().unwrap();
        let connected = Listener::over(one.into(), &here).unwrap();
        let mut client = here.connect_over(other.into(), SOON).unwrap();
        client.write_all(b"x").unwrap();
        let mut server = connected.accept(SOON).unwrap().unwrap();
        server.read_exact(&mut [0; 1]).unwrap();
        let handle = server.try_clone().unwrap();
        drop(server);
        assert!(connected.accept(Duration::ZERO).unwrap().is_none(), "it is still there");
        drop(handle);
        let error = connected.accept(SOON).unwrap_err().to_string();
        assert!(error.contains("the one peer of this socket has gone"), "{error}");
        assert!(here.connect(SOON).unwrap_err().to_string().contains("leads to its peer once"));

        let anywhere = || OwnedFd::from(TcpListener::bind("0.0.0.0:0").unwrap());
        assert!(matches!(Listener::over(anywhere(), &here), Err(Error::BeyondLoopback { .. })));
        Listener::over(anywhere(), &endpoint(Security::Insecure)).unwrap();
        let error = here.connect_over(anywhere(), SOON).unwrap_err().to_string();
        assert!(error.contains("needs TLS"), "{error}");
        let listening = OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        let error = here.connect_over(listening, SOON).unwrap_err().to_string();
        assert!(error.contains("a source needs a connected one"), "{error}");
        let file = OwnedFd::from(fs::File::open("/dev/null").unwrap());
        assert!(Listener::over(file, &here).unwrap_err().to_string().contains("it is no socket"));
        let datagrams = OwnedFd::from(UnixDatagram::unbound().unwrap());
        assert!(Listener::over(datagrams, &here).unwrap_err().to_string().contains("not a stream socket"));
    }

    #[test]
    fn drop_leaves_a_socket_that_is_not_ours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = Listener::bind(&Uri::Unix(path.clone())).unwrap();
        fs::rename(&path, folder.path().join("moved")).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
    }
}
