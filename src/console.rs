//! Where the guest's serial console goes, and where its input comes from.
//!
//! The guest writes its console on a vCPU thread, so nothing here may block it for long. Whoever does not read loses output
//! after 100 ms of waiting: a terminal or a pipe gets what comes when it takes bytes again, a client of a Unix socket is
//! disconnected.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::termios::{self, LocalModes, OptionalActions, Termios};
use rustix::time::Timespec;
use transport::PrivateSocket;

use crate::config::SerialOutput;

/// How long a reader may let the guest wait for room in its socket, pipe or terminal.
const READER_PATIENCE: Duration = Duration::from_millis(100);

/// As much as a pipe that can be written to takes at once (`PIPE_BUF`).
const PIECE_BYTES: usize = 4096;

/// What takes bytes that someone typed.
pub type Input = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// An open console. Dropping it restores the terminal and removes the socket file, or a file that was made in vain.
pub struct Console {
    kind: Kind,
}

enum Kind {
    Stdio { terminal: Option<Termios> },
    Null,
    File { file: File, path: PathBuf, is_new: bool },
    Unix { listener: PrivateSocket, client: Arc<Mutex<Option<UnixStream>>> },
}

impl Console {
    /// Opens what `output` names.
    ///
    /// # Errors
    /// The file or socket cannot be made.
    pub fn open(output: &SerialOutput) -> anyhow::Result<Self> {
        let kind = match output {
            SerialOutput::Null => Kind::Null,
            SerialOutput::Stdio => Kind::Stdio { terminal: None },
            SerialOutput::File(path) => {
                let is_new = !path.exists();
                let file = OpenOptions::new().create(true).append(true).open(path);
                let file = file.with_context(|| format!("cannot open {} for the console", path.display()))?;
                Kind::File { file, path: path.clone(), is_new }
            }
            SerialOutput::Unix(path) => {
                let listener = PrivateSocket::bind(path).context("cannot make the console socket")?;
                Kind::Unix { listener, client: Arc::default() }
            }
        };
        Ok(Self { kind })
    }

    /// What the guest's serial port writes to.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn output(&self) -> io::Result<Box<dyn Write + Send>> {
        Ok(match &self.kind {
            Kind::Stdio { .. } => Box::new(PatientWriter::new(rustix::io::dup(io::stdout())?)),
            Kind::Null => Box::new(io::sink()),
            Kind::File { file, .. } => Box::new(PatientWriter::new(file.try_clone()?)),
            Kind::Unix { client, .. } => Box::new(ClientWriter(Arc::clone(client))),
        })
    }

    /// Starts to pass typed bytes to `input`, on a thread of its own. A terminal no longer waits for whole lines nor
    /// echoes; Ctrl-C still ends the process.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start_input(&mut self, input: Input) -> io::Result<()> {
        match &mut self.kind {
            Kind::Null | Kind::File { .. } => {}
            Kind::Stdio { terminal } => {
                if io::stdin().is_terminal() {
                    *terminal = Some(unbuffered_terminal()?);
                }
                spawn("console-input", move || pass_on(io::stdin(), &input))?;
            }
            Kind::Unix { listener, client } => {
                let (listener, client) = (listener.try_clone()?, Arc::clone(client));
                spawn("console-input", move || serve_clients(&listener, &client, &input))?;
            }
        }
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        match &self.kind {
            Kind::Stdio { terminal: Some(before) } => {
                let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, before);
            }
            // A machine that could not be built leaves nothing behind.
            Kind::File { file, path, is_new: true } if file.metadata().is_ok_and(|file| file.len() == 0) => {
                let _gone_already = std::fs::remove_file(path);
            }
            _ => {}
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    // Not joined: it may wait in a read that nothing but the end of the process ends.
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map(drop)
}

fn unbuffered_terminal() -> io::Result<Termios> {
    let before = termios::tcgetattr(io::stdin())?;
    let mut modes = before.clone();
    modes.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
    termios::tcsetattr(io::stdin(), OptionalActions::Now, &modes)?;
    Ok(before)
}

fn pass_on(mut source: impl Read, input: &Input) {
    let mut buffer = [0; 256];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => input(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

fn serve_clients(listener: &UnixListener, client: &Mutex<Option<UnixStream>>, input: &Input) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { return };
        let Ok(writer) = stream.try_clone() else { continue };
        if writer.set_write_timeout(Some(READER_PATIENCE)).is_err() {
            continue;
        }
        *client.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
        pass_on(stream, input);
        *client.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Writes to a file, pipe or terminal as long as it takes bytes; drops them while it does not.
struct PatientWriter {
    file: File,
    /// Nothing was taken for [`READER_PATIENCE`], and nothing since.
    stuck: bool,
}

impl PatientWriter {
    fn new(file: impl Into<File>) -> Self {
        Self { file: file.into(), stuck: false }
    }

    /// Whether a piece can be written without waiting any longer.
    fn has_room(&mut self) -> io::Result<bool> {
        // Who was waited for once is not waited for again: each byte of the guest's would take as long.
        let patience = if self.stuck { Duration::ZERO } else { READER_PATIENCE };
        let deadline = Instant::now() + patience;
        loop {
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()));
            let left = left.map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.file, PollFlags::OUT)], Some(&left)) {
                Err(Errno::INTR) => {}
                ready => {
                    // An error of the other end is ready too, and told by the write.
                    let has_room = ready? > 0;
                    self.stuck = !has_room;
                    return Ok(has_room);
                }
            }
        }
    }
}

impl Write for PatientWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if !self.has_room()? {
            return Ok(data.len());
        }
        self.file.write(&data[..data.len().min(PIECE_BYTES)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes to whoever is connected; to nobody, it drops.
struct ClientWriter(Arc<Mutex<Option<UnixStream>>>);

impl Write for ClientWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut client = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = client.as_mut()
            && stream.write_all(data).is_err()
        {
            let _ = stream.shutdown(std::net::Shutdown::Both);
            *client = None;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_socket_client_reads_output_and_types_input() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let mut console = Console::open(&SerialOutput::Unix(path.clone())).unwrap();
        let (sender, typed) = mpsc::channel();
        let sender = Mutex::new(sender);
        let input: Input = Arc::new(move |bytes: &[u8]| sender.lock().unwrap().send(bytes.to_vec()).unwrap());
        console.start_input(input).unwrap();
        let mut output = console.output().unwrap();
        output.write_all(b"nobody reads this").unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"x").unwrap();
        assert_eq!(typed.recv().unwrap(), b"x", "once input arrived, the client is known");
        output.write_all(b"hello").unwrap();
        let mut data = [0; 5];
        client.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"hello");
        assert!(Console::open(&SerialOutput::Unix(path.clone())).is_err(), "the socket is in use");
        drop(console);
        assert!(!path.exists());
    }

    #[test]
    fn a_pipe_that_nobody_reads_loses_output_and_gets_what_comes_later() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut console = PatientWriter::new(OwnedFd::from(writer));
        // More than any pipe holds; it returns, and never waits a second time.
        for _ in 0..1000 {
            console.write_all(&[b'x'; 10_000]).unwrap();
        }
        assert!(console.stuck);
        let mut held = vec![0; 4 << 20];
        let length = reader.read(&mut held).unwrap();
        assert!(held[..length].iter().all(|byte| *byte == b'x'));
        console.write_all(b"later").unwrap();
        assert!(!console.stuck);
        drop(console);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        assert!(rest.ends_with(b"later"));
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_file_is_appended_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        drop(UnixListener::bind(&path).unwrap());
        drop(Console::open(&SerialOutput::Unix(path)).unwrap());
        let path = folder.path().join("log");
        for text in ["one ", "two"] {
            let console = Console::open(&SerialOutput::File(path.clone())).unwrap();
            console.output().unwrap().write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one two");
        drop(Console::open(&SerialOutput::File(path.clone())).unwrap());
        assert!(path.exists(), "what was there stays");
        let path = folder.path().join("in vain");
        drop(Console::open(&SerialOutput::File(path.clone())).unwrap());
        assert!(!path.exists());
        assert!(Console::open(&SerialOutput::File("/no/such/folder/log".into())).is_err());
    }
}
