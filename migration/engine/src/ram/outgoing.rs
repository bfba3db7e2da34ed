//! Guest memory and devices on their way out: the stream, and the data channels beside it if there are any.

use std::time::{Duration, Instant};

use stream::DeviceSection;

use super::Sender;
use crate::channels::combined;
use crate::channels::source::{Channels, Work};
use crate::protocol::{Message, Settle};
use crate::sink::Sink;
use crate::source::unexpected;
use crate::{Context, Error, PageBitmap, RamBlock, Statistics};

/// How often the destination hears of a round that takes long: its link is silent meanwhile.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// What a live migration sends.
pub(crate) struct Outgoing<'a> {
    stream: Sender<'a, Sink<'a>>,
    channels: Option<Channels<'a>>,
    /// Of the channels, after the last round.
    digests: Vec<u64>,
    round: u32,
    statistics: &'a Statistics,
    report_interval: Duration,
    reported: Instant,
    settles: bool,
}

impl<'a> Outgoing<'a> {
    /// Starts the stream. Guest memory goes over `channels` if there are any.
    pub fn start(
        sink: Sink<'a>,
        machine: &str,
        blocks: &'a [RamBlock],
        channels: Option<Channels<'a>>,
        context: &Context<'a>,
    ) -> Result<Self, Error> {
        let statistics = context.statistics;
        Ok(Self {
            stream: Sender::start(sink, machine, blocks, statistics, "send RAM and devices")?,
            channels,
            digests: Vec::new(),
            round: 0,
            statistics,
            report_interval: REPORT_INTERVAL.min(context.patience.silence / 4),
            reported: Instant::now(),
            settles: false,
        })
    }

    /// Whether the destination says when all that was sent is in its place.
    pub fn settling(self, settles: bool) -> Self {
        Self { settles, ..self }
    }

    /// Does `meanwhile` while the destination places what is on its way: what it still has to place when the guest stands still, the
    /// guest waits for.
    pub fn settle(&mut self, meanwhile: impl FnOnce(&mut Self)) -> Result<(), Error> {
        if self.settles {
            let channel_bytes = self.out().beside_bytes();
            self.out().tell(&Message::Settle(Settle { channel_bytes }))?;
        }
        meanwhile(self);
        if !self.settles {
            return Ok(());
        }
        let doing = "waiting until the destination has placed what was sent";
        match self.out().hear(doing)? {
            Message::Settled => Ok(()),
            other => Err(unexpected(other, doing)),
        }
    }

    /// Waits until all that was sent beside the link is in its place.
    pub fn settle_channels(&mut self) -> Result<(), Error> {
        if self.channels.is_some() { self.settle(|_| ()) } else { Ok(()) }
    }

    /// The link.
    pub fn out(&mut self) -> &mut Sink<'a> {
        self.stream.out()
    }

    /// Sends the pages of each bitmap (one for each block) while the guest may run.
    pub fn round(&mut self, pages: &[PageBitmap]) -> Result<(), Error> {
        if self.channels.is_none() { self.stream.round(pages) } else { self.send(pages, false) }
    }

    /// Sends the last pages.
    pub fn last_round(&mut self, pages: &[PageBitmap]) -> Result<(), Error> {
        if self.channels.is_none() {
            return self.stream.last_round(pages);
        }
        self.send(pages, true)?;
        // The stream says that its part of RAM, which is nothing, is complete.
        self.stream.last_round(&[])
    }

    fn send(&mut self, pages: &[PageBitmap], last: bool) -> Result<(), Error> {
        let Self { stream, channels: Some(channels), .. } = self else { return Ok(()) };
        self.round += 1;
        let until = stream.out().until();
        let work = Work { round: self.round, until, limited: until.is_none(), last };
        let (times, digests) = channels.send(pages, work, &mut || {
            if self.reported.elapsed() < self.report_interval {
                return Ok(());
            }
            self.reported = Instant::now();
            stream.out().report(&self.statistics.progress())
        })?;
        self.digests = digests;
        stream.out().add_beside(times);
        Ok(())
    }

    /// Adds a section.
    pub fn device(&mut self, section: &DeviceSection) -> Result<(), Error> {
        self.stream.device(section)
    }

    /// Ends the stream. Returns the digest of all that was sent.
    pub fn finish_live(self) -> Result<u64, Error> {
        Ok(combined(self.stream.finish_live()?, self.digests))
    }
}
