//! Addresses as the user writes them.

use std::fmt;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::private_socket::connect_unix;
use crate::{Connection, Error, LOCAL_NAME};

/// `sun_path` holds 108 bytes, the last of them NUL.
const UNIX_PATH_MAX_BYTES: usize = 107;

/// How a file holds RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// Pages at fixed places, so that they can be read when they are needed.
    #[default]
    Mapped,
    /// Plain RAM sections in the stream, readable by every version of QEMU's `analyze-migration.py`.
    Stream,
}

/// Where a migration goes to or comes from: `unix:PATH`, `tcp:HOST:PORT`, `fd:N` or `file:PATH[,layout=mapped|stream]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP; an IPv6 address is written in brackets. Another host is reached through an [`Endpoint`](crate::Endpoint) only.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port; 0 lets the system choose when listening.
        port: u16,
    },
    /// A socket that is there already: the number of one that this process inherited, or the name under which a client gave it.
    Fd(String),
    /// A file.
    File {
        /// Its path.
        path: PathBuf,
        /// How RAM lies in it.
        layout: Layout,
    },
}

impl FromStr for Uri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |reason: &str| Error::Address { text: text.to_owned(), reason: reason.to_owned() };
        let (scheme, rest) = text.split_once(':').ok_or_else(|| {
            fail("expected unix:PATH, tcp:HOST:PORT, fd:N or file:PATH[,layout=mapped|stream]")
        })?;
        match scheme {
            "unix" if rest.is_empty() => Err(fail("the path is empty")),
            "unix" if rest.len() > UNIX_PATH_MAX_BYTES => {
                Err(fail("the path of a Unix socket holds at most 107 bytes"))
            }
            "unix" => Ok(Self::Unix(PathBuf::from(rest))),
            "tcp" => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(|| fail("expected tcp:HOST:PORT"))?;
                let host = match host.strip_prefix('[') {
                    Some(inner) => {
                        inner.strip_suffix(']').ok_or_else(|| fail("the bracket is not closed"))?
                    }
                    None if host.contains(':') => {
                        return Err(fail("an IPv6 address is written in brackets, as in tcp:[::1]:4444"));
                    }
                    None => host,
                };
                if host.is_empty() {
                    return Err(fail("the host is empty"));
                }
                let port = port.parse().map_err(|_| fail("the port is not a number from 0 to 65535"))?;
                Ok(Self::Tcp { host: host.to_owned(), port })
            }
            "file" => {
                let (path, layout) = match rest.rsplit_once(',') {
                    Some((path, "layout=mapped")) => (path, Layout::Mapped),
                    Some((path, "layout=stream")) => (path, Layout::Stream),
                    Some((_, option)) if option.starts_with("layout=") => {
                        return Err(fail("the layout is layout=mapped or layout=stream"));
                    }
                    _ => (rest, Layout::default()),
                };
                if path.is_empty() {
                    return Err(fail("the path is empty"));
                }
                Ok(Self::File { path: PathBuf::from(path), layout })
            }
            "fd" if rest.is_empty() => Err(fail("the number or name of a descriptor is missing")),
            "fd" => Ok(Self::Fd(rest.to_owned())),
            _ => Err(fail("the scheme is none of unix, tcp, fd and file")),
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Fd(name) => write!(f, "fd:{name}"),
            Self::File { path, layout: Layout::Mapped } => write!(f, "file:{},layout=mapped", path.display()),
            Self::File { path, layout: Layout::Stream } => write!(f, "file:{},layout=stream", path.display()),
        }
    }
}

impl Uri {
    /// Connects to a listening peer, giving up after `timeout`.
    ///
    /// # Errors
    /// Nobody listens, the address cannot be resolved or lies beyond this host, or it is a file.
    pub fn connect(&self, timeout: Duration) -> Result<Connection, Error> {
        self.connect_beyond(false, timeout)
    }

    /// The same; with `beyond` another host may be meant.
    pub(crate) fn connect_beyond(&self, beyond: bool, timeout: Duration) -> Result<Connection, Error> {
        let failed = |source| Error::Connect { uri: self.to_string(), source };
        match self {
            Self::Unix(path) => {
                let stream = connect_unix(path, timeout).map_err(|source| match source.kind() {
                    std::io::ErrorKind::WouldBlock => Error::TimedOut { uri: self.to_string(), timeout },
                    _ => failed(source),
                })?;
                Connection::from_unix(stream, self.to_string())
            }
            Self::Tcp { .. } => {
                let mut last = None;
                for address in self.addresses(beyond)? {
                    match TcpStream::connect_timeout(&address, timeout) {
                        Ok(stream) => return Connection::from_tcp(stream, self.to_string()),
                        Err(error) => last = Some(error),
                    }
                }
                match last {
                    Some(source) if source.kind() == std::io::ErrorKind::TimedOut => {
                        Err(Error::TimedOut { uri: self.to_string(), timeout })
                    }
                    Some(source) => Err(failed(source)),
                    None => Err(failed(std::io::ErrorKind::AddrNotAvailable.into())),
                }
            }
            // Whoever has it says so; here it has been used.
            Self::Fd(_) => Err(Error::Address {
                text: self.to_string(),
                reason: "a socket that was passed leads to its peer once".to_owned(),
            }),
            Self::File { .. } => Err(self.not_a_link()),
        }
    }

    /// The number of an inherited descriptor, if that is what is meant.
    #[must_use]
    pub fn descriptor_number(&self) -> Option<i32> {
        match self {
            Self::Fd(name) => name.parse().ok(),
            _ => None,
        }
    }

    /// What the host name stands for; every address must be on this host, unless `beyond` says otherwise.
    pub(crate) fn addresses(&self, beyond: bool) -> Result<Vec<SocketAddr>, Error> {
        let Self::Tcp { host, port } = self else { return Err(self.not_a_link()) };
        let addresses: Vec<_> = (host.as_str(), *port)
            .to_socket_addrs()
            .map_err(|source| Error::Connect { uri: self.to_string(), source })?
            .collect();
        match addresses.iter().find(|address| !address.ip().to_canonical().is_loopback()) {
            Some(far) if !beyond => {
                Err(Error::BeyondLoopback { text: self.to_string(), resolved: far.ip().to_string() })
            }
            _ => Ok(addresses),
        }
    }

    /// Whether bytes on the way there leave this host.
    pub(crate) fn leaves_this_host(&self) -> bool {
        matches!(self.addresses(false), Err(Error::BeyondLoopback { .. }))
    }

    /// The name that a certificate of the peer has to be valid for.
    pub(crate) fn host(&self) -> &str {
        match self {
            Self::Tcp { host, .. } => host,
            Self::Unix(_) | Self::Fd(_) | Self::File { .. } => LOCAL_NAME,
        }
    }

    pub(crate) fn not_a_link(&self) -> Error {
        Error::Address { text: self.to_string(), reason: "a file is no link to another process".to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_alike() {
        for text in [
            "unix:/run/a,b:c",
            "tcp:localhost:4444",
            "tcp:[::1]:0",
            "fd:7",
            "fd:name",
            "file:/x:y,layout=stream",
            "file:/x,layout=mapped",
        ] {
            assert_eq!(text.parse::<Uri>().unwrap().to_string(), text);
        }
        let file = |layout| Uri::File { path: "/a,b".into(), layout };
        assert_eq!("file:/a,b".parse::<Uri>().unwrap(), file(Layout::Mapped));
        assert_eq!("file:/a,b,layout=stream".parse::<Uri>().unwrap(), file(Layout::Stream));
    }

    #[test]
    fn bad_addresses_say_what_is_wrong() {
        let long = format!("unix:/{}", "x".repeat(107));
        for (text, reason) in [
            ("", "expected unix:PATH"),
            ("unix:", "the path is empty"),
            (long.as_str(), "at most 107 bytes"),
            ("tcp:4444", "expected tcp:HOST:PORT"),
            ("tcp::4444", "the host is empty"),
            ("tcp:::1:4444", "in brackets"),
            ("tcp:[::1:4444", "not closed"),
            ("tcp:localhost:70000", "not a number from 0 to 65535"),
            ("file:", "the path is empty"),
            ("fd:", "the number or name"),
            ("file:/a,layout=other", "layout=mapped or layout=stream"),
            ("exec:rm", "none of unix, tcp, fd and file"),
        ] {
            let error = text.parse::<Uri>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn tcp_stays_on_this_host() {
        for text in ["tcp:0.0.0.0:1", "tcp:192.0.2.1:1", "tcp:[2001:db8::1]:1", "tcp:[::ffff:192.0.2.1]:1"] {
            let uri: Uri = text.parse().unwrap();
            assert!(
                matches!(uri.connect(Duration::from_secs(1)), Err(Error::BeyondLoopback { .. })),
                "{text}"
            );
        }
        assert!("tcp:127.0.0.1:9".parse::<Uri>().unwrap().addresses(false).is_ok());
        let file: Uri = "file:/tmp/x".parse().unwrap();
        assert!(file.connect(Duration::from_secs(1)).unwrap_err().to_string().contains("no link"));
    }
}
