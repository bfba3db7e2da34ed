//! Where the bytes of the stream go: into frames, at the speed that the user allows.

use std::io::{self, IoSlice, Write};
use std::time::{Duration, Instant};

use stream::frame::{HEADER_BYTES, Kind};

use crate::bandwidth::TokenBucket;
use crate::channels::source::Times;
use crate::link::{Link, Step, Until};
use crate::protocol::{Message, Progress};
use crate::source::Context;
use crate::{Error, Parameters, Statistics};

/// The body of a frame. Small enough that what was just copied out of guest memory is still in the cache when the kernel
/// copies it again.
pub(crate) const BODY_BYTES: usize = 256 << 10;
/// The longest sleep between two looks at the user's wish.
pub(crate) const NAP: Duration = Duration::from_millis(20);

/// Collects bytes into STREAM frames and sends them.
pub(crate) struct Sink<'a> {
    link: &'a mut Link,
    parameters: &'a Parameters,
    statistics: &'a Statistics,
    step: Step<'a>,
    frame: Vec<u8>,
    bucket: Option<TokenBucket>,
    waited: Duration,
    sending: Duration,
    /// What went over data channels.
    beside: Times,
}

impl<'a> Sink<'a> {
    pub fn new(link: &'a mut Link, context: &Context<'a>) -> Self {
        let mut frame = Vec::with_capacity(HEADER_BYTES + BODY_BYTES);
        frame.resize(HEADER_BYTES, 0);
        let step = Step {
            doing: "sending RAM and devices",
            patience: context.patience.silence,
            cancel: Some(context.parameters),
            until: None,
        };
        let (parameters, statistics) = (context.parameters, context.statistics);
        let bucket = Some(TokenBucket::new(Instant::now()));
        Self {
            link,
            parameters,
            statistics,
            step,
            frame,
            bucket,
            waited: Duration::ZERO,
            sending: Duration::ZERO,
            beside: Times::default(),
        }
    }

    /// The guest is stopped: no limit of the bandwidth holds any more, but one of the time.
    pub fn unlimited(&mut self, until: Until) {
        self.bucket = None;
        self.step.until = Some(until);
    }

    /// Until when, if the guest is stopped.
    pub fn until(&self) -> Option<Until> {
        self.step.until
    }

    /// Bytes on the link and on data channels so far.
    pub fn sent_bytes(&self) -> u64 {
        self.link.sent_bytes() + (self.frame.len() - HEADER_BYTES) as u64 + self.beside.sent_bytes
    }

    /// What of them went over data channels.
    pub fn beside_bytes(&self) -> u64 {
        self.beside.sent_bytes
    }

    /// Counts what went over data channels.
    pub fn add_beside(&mut self, times: Times) {
        self.beside.sent_bytes += times.sent_bytes;
        self.beside.waited += times.waited;
        self.beside.sending += times.sending;
    }

    /// How long the limit has held us up.
    pub fn waited(&self) -> Duration {
        self.waited + self.beside.waited
    }

    /// How long the link took for what was sent.
    pub fn sending(&self) -> Duration {
        self.sending + self.beside.sending
    }

    /// Tells the destination's user.
    pub fn report(&mut self, progress: &Progress) -> Result<(), Error> {
        self.tell(&Message::Progress(progress.clone()))
    }

    /// Sends a message after what is there.
    pub fn tell(&mut self, message: &Message) -> Result<(), Error> {
        self.send()?;
        self.link.send(message, self.step)
    }

    /// What the destination says to that.
    pub fn hear(&mut self, doing: &'static str) -> Result<Message, Error> {
        self.link.receive(Step { doing, ..self.step })
    }

    /// Sends what is there, even if it is little.
    pub fn send(&mut self) -> Result<(), Error> {
        let bytes = self.frame.len() - HEADER_BYTES;
        if bytes == 0 {
            return Ok(());
        }
        let begun = Instant::now();
        self.link.send_frame(Kind::Stream, &mut self.frame, self.step)?;
        self.sending += begun.elapsed();
        self.frame.truncate(HEADER_BYTES);
        self.pace(bytes)
    }

    /// Sends a message after what is there, at the same speed. Its body begins behind the room for a header.
    pub fn send_frame(&mut self, kind: Kind, frame: &mut [u8]) -> Result<(), Error> {
        self.send()?;
        let begun = Instant::now();
        self.link.send_frame(kind, frame, self.step)?;
        self.sending += begun.elapsed();
        self.pace(frame.len())
    }

    /// Counts what was sent, and waits as long as the limit says.
    fn pace(&mut self, bytes: usize) -> Result<(), Error> {
        let sent = self.link.sent_bytes() + self.beside.sent_bytes;
        self.statistics.update(|s| s.transferred_bytes = sent);
        let Some(bucket) = &mut self.bucket else { return Ok(()) };
        let start = Instant::now();
        let mut wait = bucket.take(bytes as u64, self.parameters.max_bandwidth(), start);
        while !wait.is_zero() {
            if self.parameters.cancelled() {
                return Err(Error::Cancelled);
            }
            std::thread::sleep(wait.min(NAP));
            // The limit may have been raised meanwhile.
            wait = bucket.take(0, self.parameters.max_bandwidth(), Instant::now());
        }
        self.waited += start.elapsed();
        Ok(())
    }
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.frame.len() == HEADER_BYTES + BODY_BYTES {
            self.send().map_err(io::Error::other)?;
        }
        let room = HEADER_BYTES + BODY_BYTES - self.frame.len();
        let count = room.min(bytes.len());
        self.frame.extend_from_slice(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        slices.iter().try_for_each(|slice| self.write_all(slice))?;
        Ok(slices.iter().map(|slice| slice.len()).sum())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send().map_err(io::Error::other)
    }
}
