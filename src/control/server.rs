//! The socket: who may connect, and the threads of those who did.

use std::collections::HashMap;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use transport::PrivateSocket;

use super::commands::Context;
use super::descriptors::Descriptors;
use super::event::EventBus;
use super::operations::Operations;
use super::{Error, session};

/// Most clients at a time; a further one is closed at once.
pub const MAX_CLIENTS: usize = 16;

/// How long the last answers and events may take to leave when the server ends.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long to wait when a client cannot be accepted, for example for want of descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A listening control socket.
///
/// Each client has two threads, one that reads and executes and one that writes, so that no client can make another, or
/// the machine, wait. Dropping the server writes what is queued (for at most a second), disconnects every client and
/// removes the socket file. It must not be dropped by a command's own thread.
pub struct Server {
    shared: Arc<Shared>,
    socket: Arc<PrivateSocket>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    operations: Arc<dyn Operations>,
    events: Arc<EventBus>,
    clients: Mutex<Clients>,
    client_left: Condvar,
}

#[derive(Default)]
struct Clients {
    streams: HashMap<u64, Arc<UnixStream>>,
    accepted: u64,
    closing: bool,
}

impl Server {
    /// Listens at `path`, readable and writable for the owner only. A socket file that a dead process left is replaced.
    pub fn start(path: &Path, operations: Arc<dyn Operations>, events: Arc<EventBus>) -> Result<Self, Error> {
        let socket = Arc::new(PrivateSocket::bind(path).map_err(Error::Listen)?);
        let shared =
            Arc::new(Shared { operations, events, clients: Mutex::default(), client_left: Condvar::new() });
        let acceptor = thread::Builder::new().name("control".to_owned()).spawn({
            let (shared, socket) = (shared.clone(), socket.clone());
            move || shared.accept_clients(&socket)
        });
        Ok(Self { shared, socket, acceptor: Some(acceptor.map_err(Error::Thread)?) })
    }

    /// Waits until no client is connected, at most for `limit`: a process that ends by itself when its guest has been
    /// migrated gives those who watch the time to ask how it went.
    pub fn wait_for_clients_to_leave(&self, limit: Duration) {
        drop(self.shared.wait_for_no_client(limit));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        // On a listening Unix socket this ends a waiting accept.
        if let Err(error) = rustix::net::shutdown(&**self.socket, rustix::net::Shutdown::Both) {
            log::warn!("control: the socket cannot be shut down: {error}");
        }
        if let Some(acceptor) = self.acceptor.take() {
            // It ends with an error only if it panicked, which has been printed.
            let _ = acceptor.join();
        }
        self.shared.disconnect_clients();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept_clients(self: &Arc<Self>, listener: &UnixListener) {
        loop {
            match listener.accept() {
                Ok((stream, _)) => self.admit(Arc::new(stream)),
                Err(_) if self.lock().closing => return,
                Err(error) => {
                    log::warn!("control: a client cannot be accepted: {error}");
                    thread::sleep(ACCEPT_RETRY);
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, stream: Arc<UnixStream>) {
        let mut clients = self.lock();
        if clients.closing || clients.streams.len() == MAX_CLIENTS {
            log::warn!("control: a client is turned away: {MAX_CLIENTS} are connected");
            return;
        }
        clients.accepted += 1;
        let number = clients.accepted;
        clients.streams.insert(number, stream.clone());
        drop(clients);
        let spawned = thread::Builder::new().name(format!("control-{number}")).spawn({
            let shared = self.clone();
            move || {
                shared.run_client(&stream);
                shared.forget(number);
            }
        });
        if let Err(error) = spawned {
            log::warn!("control: a client is turned away: {error}");
            self.forget(number);
        }
    }

    fn run_client(&self, stream: &Arc<UnixStream>) {
        let (lines, queue) = sync_channel(session::QUEUED_LINES);
        thread::scope(|scope| {
            let writer = thread::Builder::new().name("control-write".to_owned());
            let writer = writer.spawn_scoped(scope, || {
                if session::write_lines(stream, queue).is_err() {
                    // The client has gone: the reader must know.
                    let _ = stream.shutdown(Shutdown::Both);
                }
            });
            if let Err(error) = writer {
                log::warn!("control: a client is turned away: {error}");
                return;
            }
            let descriptors = Descriptors::default();
            let context = Context { operations: &*self.operations, events: &self.events, descriptors };
            if let Err(error) = session::serve(&context, stream, lines) {
                log::debug!("control: a client left: {error}");
            }
            self.events.unsubscribe(stream);
        });
    }

    fn forget(&self, number: u64) {
        self.lock().streams.remove(&number);
        self.client_left.notify_all();
    }

    fn wait_for_no_client(&self, limit: Duration) -> MutexGuard<'_, Clients> {
        let wait =
            self.client_left.wait_timeout_while(self.lock(), limit, |clients| !clients.streams.is_empty());
        wait.unwrap_or_else(PoisonError::into_inner).0
    }

    fn disconnect_clients(&self) {
        for stream in self.lock().streams.values() {
            // Each reader sees an end; what is queued is still written.
            let _ = stream.shutdown(Shutdown::Read);
        }
        for stream in self.wait_for_no_client(FAREWELL).streams.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
