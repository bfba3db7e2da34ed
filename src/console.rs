//! Where the guest's serial console goes, and where its input comes from.
//!
//! The guest writes its console on a vCPU thread, so nothing here may block it for long: a Unix socket whose client does
//! not read loses output after 100 ms of waiting and is disconnected; a file or a pipe is as fast as its other end.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use rustix::termios::{self, LocalModes, OptionalActions, Termios};
use transport::PrivateSocket;

use crate::config::SerialOutput;

/// How long a client may let the guest wait for room in its socket.
const CLIENT_PATIENCE: Duration = Duration::from_millis(100);

/// What takes bytes that someone typed.
pub type Input = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// An open console. Dropping it restores the terminal and removes the socket file.
pub struct Console {
    kind: Kind,
}

enum Kind {
    Stdio { terminal: Option<Termios> },
    Plain(Option<std::fs::File>),
    Unix { listener: PrivateSocket, client: Arc<Mutex<Option<UnixStream>>> },
}

impl Console {
    /// Opens what `output` names.
    ///
    /// # Errors
    /// The file or socket cannot be made.
    pub fn open(output: &SerialOutput) -> anyhow::Result<Self> {
        let kind = match output {
            SerialOutput::Null => Kind::Plain(None),
            SerialOutput::Stdio => Kind::Stdio { terminal: None },
            SerialOutput::File(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                Kind::Plain(Some(
                    file.with_context(|| format!("cannot open {} for the console", path.display()))?,
                ))
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
            Kind::Stdio { .. } => Box::new(io::stdout()),
            Kind::Plain(None) => Box::new(io::sink()),
            Kind::Plain(Some(file)) => Box::new(file.try_clone()?),
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
            Kind::Plain(_) => {}
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
        if let Kind::Stdio { terminal: Some(before) } = &self.kind {
            let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, before);
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
        if writer.set_write_timeout(Some(CLIENT_PATIENCE)).is_err() {
            continue;
        }
        *client.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
        pass_on(stream, input);
        *client.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
        assert_eq!(std::fs::read_to_string(path).unwrap(), "one two");
        assert!(Console::open(&SerialOutput::File("/no/such/folder/log".into())).is_err());
    }
}
