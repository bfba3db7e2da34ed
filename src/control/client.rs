//! The other end of the socket: what `ferry status`, `ferry migrate` and tests speak through.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Error;

/// How long a server may take to greet or to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest line that is read.
const MAX_LINE_BYTES: usize = 4 << 20;

/// A connection that has said hello. Commands are answered in order; events that arrive in between are kept.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
    partial: Vec<u8>,
    events: VecDeque<Value>,
}

impl Client {
    /// Connects to the socket at `path` and negotiates.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let stream =
            UnixStream::connect(path).map_err(|source| Error::Connect { path: path.to_owned(), source })?;
        let mut client = Self {
            path: path.to_owned(),
            stream: BufReader::new(stream),
            partial: Vec::new(),
            events: VecDeque::new(),
        };
        let greeting = client.message(Instant::now() + ANSWER_TIMEOUT)?;
        if greeting.is_none_or(|greeting| greeting.get("QMP").is_none()) {
            return Err(client.nonsense("no greeting"));
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Runs a command; the answer is what QMP calls `return`.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())
            .map_err(|error| self.lost(error))?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            let Some(mut message) = self.message(deadline)? else {
                return Err(self.lost(io::ErrorKind::TimedOut.into()));
            };
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else {
                let description = message["error"]["desc"].as_str().unwrap_or("no reason given").to_owned();
                return Err(Error::Refused { command: command.to_owned(), description });
            }
        }
    }

    /// Gives the machine a descriptor, which it calls `name` for as long as this connection lives.
    pub fn give(&mut self, descriptor: impl AsFd, name: &str) -> Result<(), Error> {
        // It travels with a blank, which means nothing, and belongs to the next request.
        let sent = transport::write_with(self.stream.get_ref(), b" ", &[descriptor.as_fd()]);
        match sent {
            Ok(1) => self.execute("getfd", json!({ "fdname": name })).map(drop),
            Ok(_) => Err(self.lost(io::ErrorKind::WriteZero.into())),
            Err(error) => Err(self.lost(error)),
        }
    }

    /// Runs a command without arguments and reads its answer as `T`.
    pub fn query<T: DeserializeOwned>(&mut self, command: &str) -> Result<T, Error> {
        let value = self.execute(command, json!({}))?;
        serde_json::from_value(value).map_err(|error| self.nonsense(&format!("{command}: {error}")))
    }

    /// The next event, if one comes within `timeout`.
    pub fn event(&mut self, timeout: Duration) -> Result<Option<Value>, Error> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        match self.message(Instant::now() + timeout)? {
            Some(message) if message.get("event").is_some() => Ok(Some(message)),
            Some(_) => Err(self.nonsense("an answer without a question")),
            None => Ok(None),
        }
    }

    /// The next line as JSON; nothing once the deadline has passed.
    fn message(&mut self, deadline: Instant) -> Result<Option<Value>, Error> {
        loop {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            else {
                return Ok(None);
            };
            let stream = self.stream.get_ref();
            stream.set_read_timeout(Some(left)).map_err(|error| self.lost(error))?;
            let (used, complete) = match self.stream.fill_buf() {
                Ok([]) => return Err(Error::Closed { path: self.path.clone() }),
                Ok(bytes) => {
                    let line = bytes.split_inclusive(|byte| *byte == b'\n').next().unwrap_or_default();
                    self.partial.extend_from_slice(line);
                    (line.len(), line.ends_with(b"\n"))
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(Error::Closed { path: self.path.clone() });
                }
                Err(error) => return Err(self.lost(error)),
            };
            self.stream.consume(used);
            if self.partial.len() > MAX_LINE_BYTES {
                return Err(self.nonsense("a line without an end"));
            }
            if complete {
                let line = std::mem::take(&mut self.partial);
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|error| self.nonsense(&error.to_string()));
            }
        }
    }

    fn lost(&self, source: io::Error) -> Error {
        Error::Lost { path: self.path.clone(), source }
    }

    fn nonsense(&self, detail: &str) -> Error {
        Error::NotQmp { path: self.path.clone(), detail: detail.to_owned() }
    }
}
