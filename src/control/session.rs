//! One client: its handshake, its requests in order, and its queue of lines to write.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use serde_json::{Value, json};

use super::commands::{self, Context};
use super::event::Subscriber;
use super::framing::Framer;
use super::protocol::{self, Arguments, MAX_REQUEST_BYTES, QmpError};

/// Lines that wait for a client to read. Answers wait for a place in the queue, which stops only this client's own
/// requests; an event that finds it full ends the connection.
pub(super) const QUEUED_LINES: usize = 256;

/// Writes lines until the queue ends or the client goes.
pub(super) fn write_lines(mut stream: &UnixStream, lines: Receiver<String>) -> io::Result<()> {
    for mut line in lines {
        line.push_str("\r\n");
        stream.write_all(line.as_bytes())?;
    }
    Ok(())
}

/// Reads requests and queues answers, until the client goes, sends too long a request, or is cut off.
pub(super) fn serve(
    context: &Context,
    stream: &Arc<UnixStream>,
    lines: SyncSender<String>,
) -> Result<(), super::Error> {
    let mut session = Session { context, stream, lines, negotiated: false };
    session.send(protocol::greeting().to_string())?;
    let mut framer = Framer::default();
    let mut bytes = [0; 4096];
    loop {
        let read = match context.descriptors.read(stream, &mut bytes) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(super::Error::Read(error)),
        };
        for &byte in bytes.iter().take(read) {
            if let Some(request) = framer.push(byte) {
                session.request(&request)?;
            } else if framer.pending_bytes() > MAX_REQUEST_BYTES {
                let error = QmpError::generic(format!("a request is longer than {MAX_REQUEST_BYTES} bytes"));
                return session.send(protocol::answer(None, Err(error)));
            }
        }
    }
}

struct Session<'a> {
    context: &'a Context<'a>,
    stream: &'a Arc<UnixStream>,
    lines: SyncSender<String>,
    negotiated: bool,
}

impl Session<'_> {
    fn send(&self, line: String) -> Result<(), super::Error> {
        self.lines.send(line).map_err(|_| super::Error::Gone)
    }

    fn request(&mut self, text: &[u8]) -> Result<(), super::Error> {
        let (id, request) = protocol::parse(text);
        let was_negotiated = self.negotiated;
        let result = request.and_then(|request| self.execute(&request.command, request.arguments));
        let answer = protocol::answer(id, result);
        if self.negotiated == was_negotiated {
            return self.send(answer);
        }
        let subscriber = Subscriber { lines: self.lines.clone(), stream: self.stream.clone() };
        if self.context.events.subscribe(subscriber, answer) { Ok(()) } else { Err(super::Error::Gone) }
    }

    fn execute(&mut self, name: &str, arguments: Arguments) -> Result<Value, QmpError> {
        match (name, self.negotiated) {
            ("qmp_capabilities", false) => self.negotiate(arguments),
            ("qmp_capabilities", true) => Err(QmpError::command_not_found(
                "Capabilities negotiation is already complete, command ignored",
            )),
            (_, false) => {
                Err(QmpError::command_not_found("Expecting capabilities negotiation with 'qmp_capabilities'"))
            }
            (name, true) => commands::execute(self.context, name, arguments),
        }
    }

    fn negotiate(&mut self, mut arguments: Arguments) -> Result<Value, QmpError> {
        let wanted = arguments.optional_list("enable")?;
        arguments.finish()?;
        if let Some(capability) = wanted.first() {
            let name = capability.as_str().unwrap_or("of another type");
            return Err(QmpError::generic(format!("Capability {name} not available")));
        }
        self.negotiated = true;
        Ok(json!({}))
    }
}
