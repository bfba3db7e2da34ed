//! Sockets that this process was given: by whoever started it, or by a client that passed one.
//!
//! A connected one leads to its peer once. A listening one is as good as one of our own, but for its file, which is not ours to
//! remove.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};

use crate::{Connection, Error, Security, Uri};

/// Standard input, output and error: they have owners.
const STANDARD: std::ops::RangeInclusive<RawFd> = 0..=2;

/// A socket by what can be done with it.
pub(crate) enum Given {
    UnixStream(UnixStream),
    TcpStream(TcpStream),
    UnixListener(UnixListener),
    TcpListener(TcpListener),
}

/// Takes over the descriptor `number`, which whoever started this process left open for it.
///
/// # Errors
/// It is one of the first three, is not open, is ours already, or was taken before.
pub fn inherit(number: RawFd) -> Result<OwnedFd, Error> {
    let wrong = |reason: &str| Error::Address { text: format!("fd:{number}"), reason: reason.to_owned() };
    if STANDARD.contains(&number) || number < 0 {
        return Err(wrong("descriptors from 3 on can be passed"));
    }
    // SAFETY: the number may belong to nobody or to someone else, which the borrow must not outlive; both calls only look at flags,
    // and are there to find out.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(borrowed).map_err(|_| wrong("it is not open"))?;
    // What came through execve(2) lacks the flag, and all that this process opens has it, as has what was taken here before.
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(wrong("it was not passed to this process, or is in use already"));
    }
    fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(|errno| wrong(&errno.to_string()))?;
    // SAFETY: it is open, and nobody owns it: it came from the parent process, and the flag set above keeps others from taking it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

impl Given {
    /// What `descriptor` is, if it may be used under `security`.
    pub fn new(descriptor: OwnedFd, uri: &Uri, security: &Security) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Address { text: uri.to_string(), reason };
        let failed = |errno: rustix::io::Errno| wrong(format!("it is no socket ({errno})"));
        let listens = socket_acceptconn(&descriptor).map_err(failed)?;
        let kind = socket_type(&descriptor).map_err(failed)?;
        let domain = socket_domain(&descriptor).map_err(failed)?;
        if kind != SocketType::STREAM {
            return Err(wrong("it is not a stream socket".to_owned()));
        }
        let unconnected = |_| wrong("it is neither connected nor listening".to_owned());
        let given = match (domain, listens) {
            (AddressFamily::UNIX, true) => Self::UnixListener(descriptor.into()),
            (AddressFamily::UNIX, false) => {
                let stream = UnixStream::from(descriptor);
                stream.peer_addr().map_err(unconnected)?;
                Self::UnixStream(stream)
            }
            (AddressFamily::INET | AddressFamily::INET6, true) => {
                let listener = TcpListener::from(descriptor);
                stays_here(listener.local_addr().map_err(unconnected)?, uri, security)?;
                Self::TcpListener(listener)
            }
            (AddressFamily::INET | AddressFamily::INET6, false) => {
                let stream = TcpStream::from(descriptor);
                stays_here(stream.peer_addr().map_err(unconnected)?, uri, security)?;
                Self::TcpStream(stream)
            }
            _ => return Err(wrong("it is neither a Unix nor a TCP socket".to_owned())),
        };
        Ok(given)
    }

    /// The connection that it is.
    pub fn connection(self, uri: &Uri) -> Result<Connection, Error> {
        let peer = uri.to_string();
        let setup = |source| Error::Setup { peer: uri.to_string(), source };
        match self {
            Self::UnixStream(stream) => {
                stream.set_nonblocking(false).map_err(setup)?;
                Connection::from_unix(stream, peer)
            }
            Self::TcpStream(stream) => {
                stream.set_nonblocking(false).map_err(setup)?;
                Connection::from_tcp(stream, peer)
            }
            Self::UnixListener(_) | Self::TcpListener(_) => Err(Error::Address {
                text: peer,
                reason: "it is a listening socket; a source needs a connected one".to_owned(),
            }),
        }
    }
}

/// The rule of [`Security`] for an address that someone else chose.
fn stays_here(address: SocketAddr, uri: &Uri, security: &Security) -> Result<(), Error> {
    if address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    if security.goes_beyond() {
        security.warn_beyond(uri);
        return Ok(());
    }
    Err(Error::BeyondLoopback { text: uri.to_string(), resolved: address.ip().to_string() })
}
