//! A listening Unix socket that only its owner can reach, and whose file goes away with it.

use std::fs;
use std::io;
use std::ops::Deref;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::{Error, Uri};

const BACKLOG: i32 = 8;
/// How long an answer may take at a socket that someone else may be listening on.
const KNOCK: Duration = Duration::from_millis(100);

/// How long another process may take to make its socket in the same folder.
const FOLDER_PATIENCE: Duration = Duration::from_secs(2);
const FOLDER_RETRY: Duration = Duration::from_millis(1);

/// The socket; dropping it removes its file.
#[derive(Debug)]
pub struct PrivateSocket {
    listener: UnixListener,
    _file: SocketFile,
}

impl PrivateSocket {
    /// Listens at `path`, mode 0600. A socket file that a dead process left behind is replaced.
    ///
    /// # Errors
    /// A living process listens there, or the path is something else than a socket or cannot be made one.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let uri = Uri::Unix(path.to_owned());
        let failed = |source: io::Error| Error::Listen { uri: uri.to_string(), source };
        let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
        // Until it listens it looks like one that a dead process left: others wait so long before they look.
        let _folder = lock_folder(path).map_err(failed)?;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(|errno| failed(errno.into()))?;
        if let Err(errno) = rustix::net::bind(&socket, &address) {
            if errno != Errno::ADDRINUSE {
                return Err(failed(errno.into()));
            }
            remove_stale(&uri, path)?;
            rustix::net::bind(&socket, &address).map_err(|errno| failed(errno.into()))?;
        }
        let found = fs::symlink_metadata(path).map_err(failed)?;
        let file = SocketFile { path: path.to_owned(), device: found.dev(), inode: found.ino() };
        // Nobody can connect before `listen`, so there is no moment at which others could.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        rustix::net::listen(&socket, BACKLOG).map_err(|errno| failed(errno.into()))?;
        Ok(Self { listener: UnixListener::from(socket), _file: file })
    }
}

impl Deref for PrivateSocket {
    type Target = UnixListener;

    fn deref(&self) -> &UnixListener {
        &self.listener
    }
}

/// The socket's entry in the file system, by what it was when we made it.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Someone may have put another socket there since: only our own is removed.
        if let Ok(found) = fs::symlink_metadata(&self.path)
            && (found.dev(), found.ino()) == (self.device, self.inode)
        {
            let _gone_already = fs::remove_file(&self.path);
        }
    }
}

/// Locks the folder of `path` against other processes that make a socket there.
fn lock_folder(path: &Path) -> io::Result<fs::File> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder = fs::File::open(folder)?;
    let deadline = Instant::now() + FOLDER_PATIENCE;
    loop {
        match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(folder),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(FOLDER_RETRY),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn remove_stale(uri: &Uri, path: &Path) -> Result<(), Error> {
    let failed = |source| Error::Listen { uri: uri.to_string(), source };
    if !fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
        return Err(Error::NotASocket { uri: uri.to_string() });
    }
    match connect_unix(path, KNOCK) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        // It answered, or it may be alive.
        Ok(_) | Err(_) => Err(Error::InUse { uri: uri.to_string() }),
    }
}

/// Connects to the socket at `path`. A peer that accepts nobody fills its backlog, and the next one would wait for ever:
/// after `timeout` this fails with [`io::ErrorKind::WouldBlock`].
pub(crate) fn connect_unix(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // unix(7) does not say it, but connecting counts as sending (unix_stream_connect asks for the send timeout).
    set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    rustix::net::connect(&socket, &address)?;
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    /// Of two that start at one moment one listens, and can be reached for as long as it is there.
    #[test]
    fn of_many_that_start_at_once_one_listens() {
        let folder = tempfile::tempdir().unwrap();
        for round in 0..200 {
            let path = folder.path().join(format!("{round}"));
            if round % 2 == 1 {
                drop(UnixListener::bind(&path).unwrap());
            }
            let barrier = Barrier::new(3);
            let bind = || {
                barrier.wait();
                PrivateSocket::bind(&path)
            };
            let sockets: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..3).map(|_| scope.spawn(bind)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(sockets.iter().flatten().count(), 1, "round {round}: {sockets:?}");
            connect_unix(&path, KNOCK).unwrap();
        }
    }
}
