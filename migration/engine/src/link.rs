//! Messages on a connection, each within a deadline.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use stream::frame::{self, HEADER_BYTES, Header, Kind};
use transport::{Connection, Identity, Received};

use crate::postcopy::{MISSING_BYTES_MAX, PAGES_BYTES_MAX};
use crate::protocol::{
    HELLO_BYTES_MAX, IMAGE_FILES_BYTES_MAX, MEMORY_BYTES_MAX, Message, NEVER_BYTES_MAX, REASONS_BYTES_MAX,
};
use crate::storage::BLOCKS_BYTES_MAX;
use crate::{Error, Parameters, local};

/// Of a message that carries numbers only.
const SHORT_BYTES_MAX: u32 = 256;
/// What a peer must at least take within the patience of a step.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// Flag of a hello's frame, which is as long as a frame may be: the hello goes on in the next one. No other message is longer.
const MORE: u16 = 1;

/// How many messages are looked at for a peer's [last words](Link::last_words). Far more fit into no socket that it may have left full.
const WORDS_MAX: usize = 4096;
/// How long they are read beyond the time that they have to come.
const WORDS_GRACE: Duration = Duration::from_secs(1);

/// The minor version of the protocol in which identities came: an older peer takes them for parts of the machine.
const IDENTITIES_MINOR: u16 = 1;

/// What a record of TLS begins with (RFC 8446, 5.1), and no preamble of ours.
const TLS_RECORDS: std::ops::RangeInclusive<u8> = 20..=24;

/// How often a waiting read or write looks at its deadline and at the user's wish.
pub(crate) const SLICE: Duration = Duration::from_millis(20);

/// A step, how long it may take, and who may end it.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    pub doing: &'static str,
    /// For a message as a whole, so that a peer which sends or takes a byte now and then does not hold us. Pieces of the stream
    /// and of a hello have it for each frame, since it is the peer's choice how long these are.
    pub patience: Duration,
    pub cancel: Option<&'a Parameters>,
    /// The guest stands still: however many messages there are.
    pub until: Option<Until>,
}

/// An end of more than one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Until {
    pub end: Instant,
    /// From the beginning to the end.
    pub allowed: Duration,
}

/// Reaches the peer.
pub type Dial<'a> = dyn FnMut() -> Result<Connection, Error> + 'a;

/// Both directions of a connection, as messages.
pub(crate) struct Link {
    connection: Connection,
    sent_bytes: u64,
    /// Header and body of the message being sent.
    out: Vec<u8>,
    /// What is left of one that the user's cancel, or the end of a time, came into: the peer hears nothing else before.
    unfinished: Vec<u8>,
    body: Vec<u8>,
    /// What may come along with the message that is being received, if anything.
    received: Option<Received>,
    /// The first byte of the next message, if it was looked for.
    ahead: Option<u8>,
    /// Minor version of the peer, once it has greeted.
    minor: u16,
}

impl Link {
    pub fn new(connection: Connection) -> Result<Self, Error> {
        let doing = "setting up the connection";
        connection
            .set_read_timeout(Some(SLICE))
            .and_then(|()| connection.set_write_timeout(Some(SLICE)))
            .map_err(|source| Error::Lost { doing, source })?;
        let (out, body, unfinished) = Default::default();
        Ok(Self { connection, sent_bytes: 0, out, unfinished, body, received: None, ahead: None, minor: 0 })
    }

    pub fn peer(&self) -> &str {
        self.connection.peer()
    }

    /// The way to the peer beside the link, for data channels: whether there is any.
    pub fn can_be_joined(&self) -> bool {
        !self.connection.is_the_only_one()
    }

    /// Who the peer has proven to be.
    pub fn identity(&self) -> Option<Identity> {
        self.connection.identity()
    }

    /// Whether the peer, which has greeted, knows [identities](crate::Description::take_identities).
    pub fn knows_identities(&self) -> bool {
        self.minor >= IDENTITIES_MINOR
    }

    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// See [`Connection::passes_descriptors`].
    pub fn passes_descriptors(&self) -> bool {
        self.connection.passes_descriptors()
    }

    /// Says who we are, and hears that the other side speaks our language.
    pub fn greet(&mut self, step: Step<'_>) -> Result<(), Error> {
        self.write(&frame::encode_preamble(), step)?;
        let (mut theirs, since) = ([0; HEADER_BYTES], Instant::now());
        let wrong = |reason| Err(Error::Protocol { doing: step.doing, reason });
        // The first byte alone: who speaks TLS and hears plain words says no more than an alert, which is shorter.
        let (first, rest) = theirs.split_at_mut(1);
        self.read(first, step, since, true)?;
        if first.iter().all(|byte| TLS_RECORDS.contains(byte)) {
            return wrong("the other side speaks TLS, and this one was given no --tls-dir".to_owned());
        }
        self.read(rest, step, since, false)?;
        match frame::decode_preamble(theirs) {
            Ok((frame::MAJOR, minor)) => {
                self.minor = minor;
                Ok(())
            }
            Ok((major, _)) => wrong(format!(
                "the other side speaks version {major} of the protocol, we speak {}",
                frame::MAJOR
            )),
            Err(error) => wrong(error.to_string()),
        }
    }

    pub fn send(&mut self, message: &Message, step: Step<'_>) -> Result<(), Error> {
        self.send_with(message, &[], step)
    }

    /// As [`send`](Self::send); `descriptors` go along with the first byte.
    pub fn send_with(
        &mut self,
        message: &Message,
        descriptors: &[OwnedFd],
        step: Step<'_>,
    ) -> Result<(), Error> {
        let (kind, body) = message.encode();
        let longest = if kind == Kind::Hello { HELLO_BYTES_MAX } else { frame::BODY_BYTES_MAX };
        if body.len() > longest {
            return Err(too_long(kind, body.len(), step));
        }
        let mut frames = std::mem::take(&mut self.out);
        frames.clear();
        let mut rest = body.as_slice();
        loop {
            let (part, more) = rest.split_at(rest.len().min(frame::BODY_BYTES_MAX));
            let flags = if more.is_empty() { 0 } else { MORE };
            frames.extend_from_slice(&Header { kind, flags, length_bytes: part.len() as u32 }.encode());
            frames.extend_from_slice(part);
            rest = more;
            if rest.is_empty() {
                break;
            }
        }
        let result = self.write_with(&frames, &local::borrowed(descriptors), step);
        self.out = frames;
        result
    }

    /// Sends a frame whose body starts at [`HEADER_BYTES`]; the header is filled in here. One `write` call, so that faults
    /// in tests can count messages.
    pub fn send_frame(&mut self, kind: Kind, frame: &mut [u8], step: Step<'_>) -> Result<(), Error> {
        let length = frame.len().saturating_sub(HEADER_BYTES);
        if length > frame::BODY_BYTES_MAX {
            return Err(too_long(kind, length, step));
        }
        let header = Header { kind, flags: 0, length_bytes: length as u32 };
        if let Some(place) = frame.first_chunk_mut() {
            *place = header.encode();
        }
        self.write(frame, step)
    }

    /// Whether a message has begun to come; waits for a moment.
    pub fn is_spoken_to(&mut self, step: Step<'_>) -> Result<bool, Error> {
        step.check()?;
        if self.ahead.is_some() {
            return Ok(true);
        }
        let mut byte = [0];
        match self.connection.read(&mut byte) {
            Ok(0) => Err(step.closed()),
            Ok(_) => {
                self.ahead = Some(byte[0]);
                Ok(true)
            }
            Err(error) if is_pause(&error) => Ok(false),
            Err(source) => Err(Error::lost(step.doing, source)),
        }
    }

    /// The connection, after a message and before the next.
    pub fn into_connection(self) -> Connection {
        self.connection
    }

    /// The next message. The bytes of a [`Message::Stream`] are in [`body`](Self::body).
    pub fn receive(&mut self, step: Step<'_>) -> Result<Message, Error> {
        let mut body = std::mem::take(&mut self.body);
        body.clear();
        let kind = self.receive_frames(&mut body, step);
        self.body = body;
        Message::decode(kind?, &self.body).map_err(|reason| Error::Protocol { doing: step.doing, reason })
    }

    /// As [`receive`](Self::receive), with what came along: at most `room` descriptors.
    pub fn receive_with(&mut self, room: usize, step: Step<'_>) -> Result<(Message, Vec<OwnedFd>), Error> {
        self.received = Some(Received::new(room));
        let message = self.receive(step);
        let received = self.received.take();
        Ok((message?, received.map(Received::into_descriptors).unwrap_or_default()))
    }

    fn receive_frames(&mut self, body: &mut Vec<u8>, step: Step<'_>) -> Result<Kind, Error> {
        let wrong = |reason| Error::Protocol { doing: step.doing, reason };
        let mut begun = false;
        loop {
            let mut since = Instant::now();
            let mut header = [0; HEADER_BYTES];
            self.read(&mut header, step, since, !begun)?;
            let header = Header::decode(header).map_err(|error| wrong(error.to_string()))?;
            let more = match (header.kind, header.flags) {
                (_, 0) => false,
                (Kind::Hello, MORE) => true,
                (_, flags) => return Err(wrong(format!("frame flags {flags:#x} are unknown"))),
            };
            if begun && header.kind != Kind::Hello {
                return Err(wrong(format!("{:?} came within a hello", header.kind)));
            }
            // Each of its frames has its own time, so there can be only as many as it needs.
            if more && header.length_bytes as usize != frame::BODY_BYTES_MAX {
                return Err(wrong(format!("a hello goes on after a frame of {} bytes", header.length_bytes)));
            }
            // `decode` has checked that a frame has at most 1 MiB.
            let longest = body_bytes_max(header.kind);
            if header.length_bytes > longest {
                let (kind, length) = (header.kind, header.length_bytes);
                return Err(wrong(format!("{kind:?} of {length} bytes is longer than {longest}")));
            }
            if matches!(header.kind, Kind::Stream | Kind::Hello | Kind::Blocks) {
                since = Instant::now();
            }
            let start = body.len();
            let end = start + header.length_bytes as usize;
            if header.kind == Kind::Hello && end > HELLO_BYTES_MAX {
                return Err(wrong(format!("a hello of more than {HELLO_BYTES_MAX} bytes")));
            }
            body.resize(end, 0);
            self.read(body.get_mut(start..).unwrap_or_default(), step, since, false)?;
            if !more {
                return Ok(header.kind);
            }
            begun = true;
        }
    }

    /// Another handle on the connection, to send by while a thread receives here, or to cut it.
    pub fn handle(&self) -> Result<Connection, Error> {
        let doing = "sharing the connection";
        self.connection.try_clone().map_err(|source| Error::lost(doing, source))
    }

    /// The body of the last message.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// What the peer said before the link broke, if that explains it: a REJECT or a CANCEL that is still in the socket. A peer that goes on
    /// and on does not explain it: what is there counts, so that it is never too late for the next of its messages.
    pub fn last_words(&mut self, patience: Duration) -> Option<Error> {
        let doing = "reading the other side's last words";
        let until = Some(Until { end: Instant::now() + patience, allowed: patience });
        // What is there is read far faster than that; who says a little all the time would be listened to for minutes.
        let end = Instant::now() + patience + WORDS_GRACE;
        for _ in 0..WORDS_MAX {
            if Instant::now() >= end {
                return None;
            }
            match self.receive(Step { doing, patience, cancel: None, until }) {
                Ok(Message::Reject(reasons) | Message::Cancel(reasons)) => {
                    return Some(Error::Peer { reason: reasons.sentences().join("; ") });
                }
                Ok(Message::Refuse(reasons)) => {
                    return Some(Error::Refused { reasons: reasons.sentences() });
                }
                // It is long, and nobody says it in the end.
                Ok(Message::Hello(_)) | Err(_) => return None,
                Ok(_) => {}
            }
        }
        None
    }

    /// Ends our direction, then hears the peer out for a moment: closing with unread data would make the kernel reset the
    /// connection, and our last message would be lost.
    pub fn close(mut self, patience: Duration) {
        let _gone_already = self.connection.shutdown(Shutdown::Write);
        let end = Instant::now() + patience;
        let mut rest = [0; 65536];
        while Instant::now() < end {
            match self.connection.read(&mut rest) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if is_pause(&error) => {}
                Err(_) => break,
            }
        }
    }

    fn write(&mut self, bytes: &[u8], step: Step<'_>) -> Result<(), Error> {
        self.write_with(bytes, &[], step)
    }

    fn write_with(
        &mut self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        step: Step<'_>,
    ) -> Result<(), Error> {
        if !self.unfinished.is_empty() {
            let rest = std::mem::take(&mut self.unfinished);
            self.write_all(&rest, &[], true, step)?;
        }
        self.write_all(bytes, descriptors, false, step)
    }

    /// Keeps what is left when it is interrupted, if some of it may have gone, or has `begun` before: why is said behind it.
    fn write_all(
        &mut self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        mut begun: bool,
        step: Step<'_>,
    ) -> Result<(), Error> {
        let before = self.sent_bytes;
        let result = self.write_pieces(bytes, descriptors, &mut begun, step);
        if begun && matches!(result, Err(Error::Cancelled | Error::TimedOut { .. })) {
            let written_bytes = (self.sent_bytes - before) as usize;
            self.unfinished = bytes.get(written_bytes..).unwrap_or_default().to_vec();
        }
        result
    }

    fn write_pieces(
        &mut self,
        mut bytes: &[u8],
        mut descriptors: &[BorrowedFd<'_>],
        begun: &mut bool,
        step: Step<'_>,
    ) -> Result<(), Error> {
        let since = Instant::now();
        let pieces = bytes.len().div_ceil(PIECE_BYTES).max(1);
        let step = Step { patience: step.patience * u32::try_from(pieces).unwrap_or(u32::MAX), ..step };
        while !bytes.is_empty() {
            step.check()?;
            match self.connection.write_with(bytes, descriptors) {
                Ok(0) => return Err(step.closed()),
                Ok(count) => {
                    *begun = true;
                    descriptors = &[];
                    self.sent_bytes += count as u64;
                    bytes = bytes.get(count..).unwrap_or_default();
                    if !bytes.is_empty() {
                        step.patient(since)?;
                    }
                }
                Err(error) if is_pause(&error) => {
                    // TLS may have sealed the beginning of it already. What has descriptors goes with them or not at all.
                    *begun |= descriptors.is_empty();
                    step.patient(since)?;
                }
                Err(source) => return Err(Error::lost(step.doing, source)),
            }
        }
        Ok(())
    }

    fn read(
        &mut self,
        buffer: &mut [u8],
        step: Step<'_>,
        since: Instant,
        at_boundary: bool,
    ) -> Result<(), Error> {
        let mut filled = 0;
        if at_boundary && let Some((first, byte)) = buffer.first_mut().zip(self.ahead.take()) {
            *first = byte;
            filled = 1;
        }
        while let Some(rest) = buffer.get_mut(filled..)
            && !rest.is_empty()
        {
            step.check()?;
            let read = match &mut self.received {
                Some(received) => self.connection.read_with(rest, received),
                None => self.connection.read(rest),
            };
            match read {
                Ok(0) if at_boundary && filled == 0 => return Err(step.closed()),
                Ok(0) => {
                    return Err(Error::Lost {
                        doing: step.doing,
                        source: io::Error::new(io::ErrorKind::UnexpectedEof, "cut within a message"),
                    });
                }
                Ok(count) => {
                    filled += count;
                    // What is there counts, however late we come to look: it may be we who stood still.
                    if filled < buffer.len() {
                        step.patient(since)?;
                    }
                }
                Err(error) if is_pause(&error) => step.patient(since)?,
                Err(error) if error.kind() == io::ErrorKind::InvalidData && self.passes_descriptors() => {
                    return Err(Error::Protocol { doing: step.doing, reason: error.to_string() });
                }
                Err(source) => return Err(Error::lost(step.doing, source)),
            }
        }
        Ok(())
    }
}

impl Step<'_> {
    pub(crate) fn check(&self) -> Result<(), Error> {
        match self.cancel {
            Some(parameters) if parameters.cancelled() => Err(Error::Cancelled),
            _ => Ok(()),
        }
    }

    pub(crate) fn patient(&self, since: Instant) -> Result<(), Error> {
        if let Some(Until { end, allowed }) = self.until
            && Instant::now() >= end
        {
            return Err(Error::TimedOut { doing: self.doing, waited: allowed });
        }
        if since.elapsed() < self.patience {
            return Ok(());
        }
        Err(Error::TimedOut { doing: self.doing, waited: self.patience })
    }

    pub(crate) fn closed(&self) -> Error {
        Error::Closed { doing: self.doing }
    }
}

/// The longest body that is read.
fn body_bytes_max(kind: Kind) -> u32 {
    match kind {
        Kind::Stream | Kind::Hello => frame::BODY_BYTES_MAX as u32,
        Kind::Refuse | Kind::Reject | Kind::Cancel => REASONS_BYTES_MAX as u32,
        Kind::Never => NEVER_BYTES_MAX as u32,
        Kind::Memory => MEMORY_BYTES_MAX as u32,
        Kind::ImageFiles => IMAGE_FILES_BYTES_MAX as u32,
        Kind::Missing => MISSING_BYTES_MAX as u32,
        Kind::Pages => PAGES_BYTES_MAX as u32,
        Kind::Blocks => BLOCKS_BYTES_MAX as u32,
        _ => SHORT_BYTES_MAX,
    }
}

fn too_long(kind: Kind, bytes: usize, step: Step<'_>) -> Error {
    let reason = format!("our own {kind:?} of {bytes} bytes is longer than it may be");
    Error::Protocol { doing: step.doing, reason }
}

pub(crate) fn is_pause(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}
