//! Two ends of a link in one process.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use certificates::{Authority, Validity};
use tempfile::TempDir;
use vm_memory::VolatileSlice;

use super::*;
use crate::faulty::{self, Fault, Part};
use crate::{Credentials, Endpoint, Listener, Security, Uri};

const SOON: Duration = Duration::from_secs(20);

/// Folders of credentials.
struct Folders(TempDir);

impl Folders {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn of(&self, authority: &Authority, name: &str, names: &[&str], validity: Validity) -> Security {
        authority.fill(&self.path(name), names, validity);
        self.security(name)
    }

    fn security(&self, name: &str) -> Security {
        Security::Tls(Arc::new(Credentials::load(&self.path(name)).unwrap()))
    }

    /// Two processes that trust each other.
    fn friends(&self) -> [Security; 2] {
        let authority = Authority::new("one for both");
        ["source", "destination"]
            .map(|name| self.of(&authority, name, &["localhost", "127.0.0.1"], Validity::Valid))
    }
}

/// What the two ends make of each other.
struct Meeting {
    client: Result<Connection, Error>,
    server: Result<Connection, Error>,
}

/// Lets a client of `uri` meet a server.
fn meet(uri: &str, client: Security, server: Security) -> Meeting {
    let uri: Uri = uri.parse().unwrap();
    let listener = Listener::bind_endpoint(&Endpoint { uri, security: server }).unwrap();
    let endpoint = Endpoint { uri: listener.uri().clone(), security: client };
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            let mut connection = listener.accept(SOON).unwrap().unwrap();
            connection.establish(SOON).map(|()| connection)
        });
        let client = endpoint.connect(SOON);
        // What the server thinks of the client's certificate the client hears with the first byte.
        let client = client.and_then(|mut connection| match connection.read(&mut [0; 1]) {
            Ok(_) => Ok(connection),
            Err(error) => Err(error.downcast().expect("an error of this crate")),
        });
        let server = server.join().unwrap();
        Meeting { client, server }
    })
}

/// Two ends that trust each other, over a socket pair.
fn pair() -> (Connection, Connection) {
    let (one, other) = Connection::pair().unwrap();
    over(one, other)
}

fn over(one: Connection, other: Connection) -> (Connection, Connection) {
    let folders = Folders::new();
    let [source, destination] = folders.friends();
    let (Security::Tls(source), Security::Tls(destination)) = (source, destination) else { unreachable!() };
    let mut client = one.with_tls(|peer| source.client("localhost", peer)).unwrap();
    let mut server = other.with_tls(|peer| destination.server(peer)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| server.establish(SOON).unwrap());
        client.establish(SOON).unwrap();
    });
    (client, server)
}

fn reason(result: &Result<Connection, Error>) -> String {
    match result {
        Ok(_) => panic!("they trust each other"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn friends_find_each_other_over_tcp_and_over_a_unix_socket() {
    let folders = Folders::new();
    let [source, destination] = folders.friends();
    let unix = format!("unix:{}", folders.path("socket").display());
    for uri in ["tcp:127.0.0.1:0", "tcp:localhost:0", &unix] {
        let uri: Uri = uri.parse().unwrap();
        let listener = Listener::bind_endpoint(&Endpoint { uri, security: destination.clone() }).unwrap();
        let endpoint = Endpoint { uri: listener.uri().clone(), security: source.clone() };
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut first = endpoint.connect(SOON).unwrap();
                let mut second = endpoint.connect(SOON).unwrap();
                assert_eq!(first.identity(), second.identity());
                first.write_all(b"one").unwrap();
                second.write_all(b"two").unwrap();
                assert_ne!(first.identity(), None);
            });
            let mut connections = [(); 2].map(|()| {
                let mut connection = listener.accept(SOON).unwrap().unwrap();
                assert_eq!(connection.identity(), None);
                connection.establish(SOON).unwrap();
                connection
            });
            for (connection, expected) in connections.iter_mut().zip([b"one", b"two"]) {
                let mut bytes = [0; 3];
                connection.read_exact(&mut bytes).unwrap();
                assert_eq!(&bytes, expected);
            }
            let identities = connections.map(|connection| connection.identity());
            assert!(identities[0].is_some() && identities[0] == identities[1]);
        });
    }
}

#[test]
fn whoever_is_not_believed_hears_why_and_so_does_the_other() {
    let folders = Folders::new();
    let [source, destination] = folders.friends();
    let (stranger, ours) = (Authority::new("a stranger"), Authority::new("ours"));
    let names = &["localhost", "127.0.0.1"];
    let theirs = folders.of(&stranger, "stranger", names, Validity::Valid);
    let old = folders.of(&ours, "old", names, Validity::Expired);
    let young = folders.of(&ours, "young", names, Validity::Valid);
    let elsewhere = folders.of(&ours, "elsewhere", &["elsewhere.example"], Validity::Valid);
    let cases = [
        (
            (source.clone(), theirs.clone()),
            "its certificate was not signed by an authority of our ca.pem",
            "it refused our certificate, which was not signed by an authority of its ca.pem",
        ),
        (
            (young.clone(), old.clone()),
            "its certificate has expired",
            "it refused our certificate, which has expired or is not valid yet",
        ),
        (
            (old, young.clone()),
            "it refused our certificate, which has expired or is not valid yet",
            "its certificate has expired",
        ),
        (
            (young, elsewhere),
            r#"its certificate is not valid for "127.0.0.1", but for"#,
            "it refused our certificate, which is broken or not valid for the name we have for it",
        ),
        ((Security::ThisHost, destination.clone()), "", "it speaks plain text: it was given no --tls-dir"),
        ((source.clone(), Security::ThisHost), "it speaks plain text: it was given no --tls-dir", ""),
    ];
    for ((client, server), client_says, server_says) in cases {
        let plain = [matches!(client, Security::ThisHost), matches!(server, Security::ThisHost)];
        let Meeting { client, server } = match plain {
            [true, _] => with_plain_client(server),
            [_, true] => with_plain_server(client),
            _ => meet("tcp:127.0.0.1:0", client, server),
        };
        if !plain[0] {
            assert!(reason(&client).contains(client_says), "{client:?}");
        }
        if !plain[1] {
            assert!(reason(&server).contains(server_says), "{server:?}");
        }
    }
}

const PREAMBLE: &[u8] = b"FRRY\0\x01\0\0";

fn with_plain_client(server: Security) -> Meeting {
    let uri: Uri = "tcp:127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind_endpoint(&Endpoint { uri, security: server }).unwrap();
    let mut client = listener.uri().connect(SOON).unwrap();
    client.write_all(PREAMBLE).unwrap();
    let mut connection = listener.accept(SOON).unwrap().unwrap();
    // It reads what it is told before it goes, or the server would wait for that.
    let hearing = thread::spawn(move || {
        let mut told = Vec::new();
        client.read_to_end(&mut told).unwrap();
        told
    });
    let server = connection.establish(SOON).map(|()| connection);
    let told = hearing.join().unwrap();
    // An alert of TLS, by which a plain peer sees what it has come to.
    assert_eq!(told.first(), Some(&21), "{told:?}");
    Meeting { client: Err(Error::Tls { peer: String::new(), reason: String::new() }), server }
}

fn with_plain_server(client: Security) -> Meeting {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let endpoint = Endpoint { uri: listener.uri().clone(), security: client };
    let connecting = thread::spawn(move || endpoint.connect(SOON));
    let mut server = listener.accept(SOON).unwrap().unwrap();
    server.write_all(PREAMBLE).unwrap();
    let mut first = [0; 1];
    server.read_exact(&mut first).unwrap();
    assert_eq!(first, [22], "a handshake of TLS");
    let client = connecting.join().unwrap();
    Meeting { client, server: Ok(server) }
}

/// One that knows whom it believes, and does not say who it is.
#[test]
fn a_client_without_a_certificate_is_turned_away() {
    let folders = Folders::new();
    let [_, destination] = folders.friends();
    let listener =
        Listener::bind_endpoint(&Endpoint { uri: "tcp:localhost:0".parse().unwrap(), security: destination })
            .unwrap();
    let text = std::fs::read(folders.path("source").join("ca.pem")).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    let authority: rustls::pki_types::CertificateDer<'static> =
        rustls::pki_types::pem::PemObject::from_pem_slice(&text).unwrap();
    roots.add(authority).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let uri = listener.uri().clone();
    thread::scope(|scope| {
        let client = scope.spawn(move || {
            let connection = uri.connect(SOON).unwrap();
            let name = "localhost".try_into().unwrap();
            let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
            let mut client = connection.with_tls(|_| Ok(session.into())).unwrap();
            client.establish(SOON).unwrap();
            client.read(&mut [0; 1]).unwrap_err().downcast::<Error>().unwrap()
        });
        let mut connection = listener.accept(SOON).unwrap().unwrap();
        let error = connection.establish(SOON).unwrap_err().to_string();
        assert!(error.ends_with("it has no certificate"), "{error}");
        let error = client.join().unwrap().to_string();
        assert!(error.ends_with("it wants a certificate of ours"), "{error}");
        assert_eq!(connection.identity(), None);
        assert_eq!(connection.write(b"x").unwrap_err().kind(), io::ErrorKind::NotConnected);
        assert_eq!(connection.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::NotConnected);
    });
}

/// A silent peer, and one that says a byte of a record now and then.
#[test]
fn a_handshake_ends_in_time_whatever_the_peer_does() {
    let folders = Folders::new();
    let [source, destination] = folders.friends();
    let uri: Uri = "tcp:127.0.0.1:0".parse().unwrap();
    let server = Listener::bind_endpoint(&Endpoint { uri, security: destination }).unwrap();
    let mut silent = server.uri().connect(SOON).unwrap();
    let mut connection = server.accept(SOON).unwrap().unwrap();
    let babbling = thread::spawn(move || {
        // The beginning of a handshake of 16 KiB that never comes to its end.
        let mut bytes = [22, 3, 1, 64, 0, 1, 0, 63, 252].into_iter().chain(std::iter::repeat(0));
        while silent.write_all(&[bytes.next().unwrap()]).is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
    });
    let error = connection.establish(Duration::from_millis(50)).unwrap_err().to_string();
    assert!(error.ends_with("the handshake took too long"), "{error}");
    drop(connection);
    babbling.join().unwrap();

    let silent = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let endpoint = Endpoint { uri: silent.uri().clone(), security: source };
    let error = endpoint.connect(Duration::from_millis(50)).unwrap_err().to_string();
    assert!(error.ends_with("the handshake took too long"), "{error}");
}

/// A link that takes and gives a few bytes at a time, and has pauses in between.
struct Halting {
    inner: Connection,
    calls: Arc<AtomicUsize>,
}

impl Halting {
    fn over(inner: Connection) -> Connection {
        Connection::new(Box::new(Self { inner, calls: Arc::default() }), "halting")
    }

    /// How many bytes may pass, unless this is a pause.
    fn pass(&self) -> io::Result<usize> {
        match self.calls.fetch_add(1, Ordering::SeqCst) {
            call if call % 3 == 1 => Err(io::ErrorKind::WouldBlock.into()),
            call => Ok(1 + call % 1999),
        }
    }
}

impl Read for Halting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = buffer.len().min(self.pass()?);
        self.inner.read(&mut buffer[..length])
    }
}

impl Write for Halting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(self.pass()?);
        self.inner.write(&bytes[..length])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Link for Halting {
    fn try_clone(&self) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(Self { inner: self.inner.try_clone()?, calls: Arc::clone(&self.calls) }))
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
}

/// As the engine writes: what was not taken is offered again.
fn write_on(connection: &mut Connection, mut bytes: &[u8]) -> usize {
    let mut pauses = 0;
    while !bytes.is_empty() {
        match connection.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if is_pause(&error) => pauses += 1,
            Err(error) => panic!("{error}"),
        }
    }
    pauses
}

fn read_on(connection: &mut Connection, buffer: &mut [u8]) -> usize {
    let (mut filled, mut pauses) = (0, 0);
    while filled < buffer.len() {
        match connection.read(&mut buffer[filled..]) {
            Ok(0) => panic!("an end after {filled} bytes"),
            Ok(count) => filled += count,
            Err(error) if is_pause(&error) => pauses += 1,
            Err(error) => panic!("{error}"),
        }
    }
    pauses
}

#[test]
fn pauses_within_records_lose_nothing_in_either_direction() {
    let (one, other) = Connection::pair().unwrap();
    let (mut client, mut server) = over(Halting::over(one), Halting::over(other));
    let message = |seed: usize| (0..700_000).map(|n| ((n * 31 + seed) % 251) as u8).collect::<Vec<_>>();
    let (mut client_reads, mut server_reads) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    let pauses = thread::scope(|scope| {
        let threads = [
            scope.spawn(move || write_on(&mut client, &message(1))),
            scope.spawn(move || write_on(&mut server, &message(2))),
            scope.spawn(move || {
                let mut bytes = vec![0; 700_000];
                let pauses = read_on(&mut server_reads, &mut bytes);
                assert!(bytes == message(1));
                pauses
            }),
            scope.spawn(move || {
                let mut bytes = vec![0; 700_000];
                let pauses = read_on(&mut client_reads, &mut bytes);
                assert!(bytes == message(2));
                pauses
            }),
        ];
        threads.map(|thread| thread.join().unwrap())
    });
    assert!(pauses.iter().all(|&pauses| pauses > 10), "{pauses:?}");
}

/// A guest writes to its memory also while the link makes a pause.
#[test]
fn memory_that_changes_in_a_pause_is_sent_once() {
    let (one, other) = Connection::pair().unwrap();
    let (mut client, mut server) = over(Halting::over(one), Halting::over(other));
    let mut block = vec![0; 700_000];
    let (length, head) = (block.len(), b"head".as_slice());
    let pauses = thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let memory = [VolatileSlice::from(block.as_mut_slice())];
            let (mut sent, mut pauses) = (0, 0_u8);
            while sent < head.len() + length {
                match client.send_memory(head, &memory, sent) {
                    Ok(count) => sent += count,
                    Err(error) if is_pause(&error) => {
                        pauses = pauses.saturating_add(1);
                        memory[0].copy_from(&vec![pauses; length]);
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            write_on(&mut client, b"done");
            pauses
        });
        let mut bytes = vec![0; head.len() + length + 4];
        read_on(&mut server, &mut bytes);
        assert!(bytes.starts_with(head));
        assert_eq!(&bytes[head.len() + length..], b"done", "nothing came twice");
        sender.join().unwrap()
    });
    assert!(pauses > 10, "{pauses}");
}

#[test]
fn a_message_that_was_given_up_halfway_does_not_swallow_the_next() {
    let (mut client, mut server) = pair();
    client.set_write_timeout(Some(Duration::from_millis(1))).unwrap();
    let first = vec![1; 128 << 10];
    let mut taken = 0;
    loop {
        match client.write(&first) {
            Ok(count) => taken += count,
            Err(error) => break assert!(is_pause(&error), "{error}"),
        }
    }
    // Given up: what was not taken may still arrive, as with half a message on a plain socket, and then this.
    let reading = thread::spawn(move || {
        let mut bytes = Vec::new();
        server.read_to_end(&mut bytes).unwrap();
        bytes
    });
    write_on(&mut client, b"second");
    client.shutdown(Shutdown::Both).unwrap();
    let bytes = reading.join().unwrap();
    assert!(bytes.ends_with(b"\x01second"));
    assert!((taken..=taken + first.len()).contains(&(bytes.len() - 6)));
}

#[test]
fn an_end_is_told_from_a_cut() {
    let (mut client, mut server) = pair();
    client.write_all(b"last").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut bytes = Vec::new();
    server.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"last");
    // The other direction goes on.
    server.write_all(b"answer").unwrap();
    let mut bytes = [0; 6];
    client.read_exact(&mut bytes).unwrap();
    drop(server);
    assert_eq!(client.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn a_silent_peer_does_not_hold_a_reader_or_a_writer() {
    let (mut one, _other) = pair();
    one.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    one.set_write_timeout(Some(Duration::from_millis(1))).unwrap();
    assert!(is_pause(&one.read(&mut [0; 8]).unwrap_err()));
    let block = vec![0; 1 << 20];
    let error = loop {
        if let Err(error) = one.write(&block) {
            break error;
        }
    };
    assert!(is_pause(&error), "{error}");
}

#[test]
fn another_handle_ends_a_blocked_read_and_a_blocked_write() {
    let (mut one, other) = pair();
    let (mut writing, handle) = (one.try_clone().unwrap(), one.try_clone().unwrap());
    let reader = thread::spawn(move || one.read(&mut [0; 1]).map_err(|error| error.kind()));
    let writer = thread::spawn(move || {
        let block = vec![0; 1 << 20];
        loop {
            if let Err(error) = writing.write(&block) {
                break error.kind();
            }
        }
    });
    handle.shutdown(Shutdown::Both).unwrap();
    assert!(matches!(reader.join().unwrap(), Ok(0) | Err(io::ErrorKind::UnexpectedEof)));
    assert_eq!(writer.join().unwrap(), io::ErrorKind::BrokenPipe);
    drop(other);
}

/// After the two messages of the client's handshake, and one more.
const FORGED_MESSAGE: u32 = 3;

#[test]
fn what_was_changed_on_its_way_is_noticed_by_both() {
    let (one, other) = Connection::pair().unwrap();
    let (forged, witness) = faulty::wrap(one, FORGED_MESSAGE, Fault::Damage(Part::Last));
    let (mut client, mut server) = over(forged, other);
    client.write_all(b"true").unwrap();
    server.read_exact(&mut [0; 4]).unwrap();
    assert!(!witness.struck());
    client.write_all(b"truth").unwrap();
    assert!(witness.struck());
    let error = server.read(&mut [0; 8]).unwrap_err().downcast::<Error>().unwrap().to_string();
    assert!(error.ends_with("what came was changed on its way"), "{error}");
    let error = client.read(&mut [0; 8]).unwrap_err().downcast::<Error>().unwrap().to_string();
    assert!(error.ends_with("BadRecordMac"), "{error}");
}
