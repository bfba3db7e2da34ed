//! All channels of a source.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use transport::Connection;

use super::lane::{Lane, Watch};
use super::send::{Outlet, Sent};
use super::{CHANNELS_MAX, Compression};
use crate::bandwidth::TokenBucket;
use crate::lease::Id;
use crate::link::{Dial, Link, SLICE, Step, Until};
use crate::protocol::{Agree, ChannelHello, Message};
use crate::sink::NAP;
use crate::{Context, Error, PageBitmap, Parameters, RamBlock, Statistics, features};

/// What is sent, and how.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    /// From 1.
    pub round: u32,
    /// The guest stands still.
    pub until: Option<Until>,
    /// Whether the limit of the bandwidth holds.
    pub limited: bool,
    /// Whether nothing follows.
    pub last: bool,
}

/// Where the time of a round went: each part is as large as it was of the time of all channels. One that is done early waits for the
/// others, which is neither.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    /// The limit held it up.
    pub waited: Duration,
    /// The channels took the bytes.
    pub sending: Duration,
    /// How many bytes.
    pub sent_bytes: u64,
}

/// Where the time of one channel went, or of several together.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    /// With the work on its pages.
    all: Duration,
    /// As in [`Times`].
    waited: Duration,
    sending: Duration,
}

impl Spent {
    fn add(&mut self, other: &Self) {
        self.all += other.all;
        self.waited += other.waited;
        self.sending += other.sending;
    }

    /// Of a round that took so long.
    fn times(&self, round: Duration, sent_bytes: u64) -> Times {
        let part = |part: Duration| {
            let all = self.all.max(Duration::from_nanos(1));
            round.mul_f64((part.as_secs_f64() / all.as_secs_f64()).min(1.0))
        };
        Times { waited: part(self.waited), sending: part(self.sending), sent_bytes }
    }
}

/// What the source offers of channels, as bits of [`features`]. Every channel is one more dial.
pub(crate) fn offered(parameters: &Parameters) -> u64 {
    let compression = match parameters.compression() {
        Compression::None => 0,
        Compression::Lz4 => features::LZ4,
        Compression::Zstd => features::ZSTD,
    };
    match parameters.channels() {
        0 => 0,
        _ => features::CHANNELS | compression,
    }
}

/// Connections for guest memory, and what was agreed on.
pub(crate) struct Opened {
    connections: Vec<Connection>,
    compression: Compression,
}

/// Dials the channels that `agree` grants; none where it grants none.
pub(crate) fn open(
    agree: &Agree,
    session: Id,
    dial: &mut Dial<'_>,
    parameters: &Parameters,
    step: Step<'_>,
) -> Result<Option<Opened>, Error> {
    let wrong = |reason| Error::Protocol { doing: step.doing, reason };
    if agree.features & !offered(parameters) & (features::CHANNELS | features::LZ4 | features::ZSTD) != 0 {
        return Err(wrong(format!("features {:#x} were granted and never offered", agree.features)));
    }
    if agree.features & features::CHANNELS == 0 {
        return Ok(None);
    }
    let Some(key) = agree.key.as_ref().map(|key| key.key) else {
        return Err(wrong("channels were granted without a key".to_owned()));
    };
    if agree.channels == 0 || agree.channels > parameters.channels().min(CHANNELS_MAX) {
        return Err(wrong(format!("{} channels were granted", agree.channels)));
    }
    let compression = match () {
        () if agree.features & features::ZSTD != 0 => Compression::Zstd,
        () if agree.features & features::LZ4 != 0 => Compression::Lz4,
        () => Compression::None,
    };
    if compression != parameters.compression() {
        log::warn!("the destination does not know {}: nothing is compressed", parameters.compression());
    }
    let mut connections = Vec::with_capacity(agree.channels.into());
    for index in 0..agree.channels {
        let mut link = Link::new(dial()?)?;
        link.greet(step)?;
        let purpose = ChannelHello::MEMORY;
        link.send(&Message::Channel(ChannelHello { session, key, index, purpose }), step)?;
        connections.push(link.into_connection());
    }
    Ok(Some(Opened { connections, compression }))
}

/// Shared between the threads.
struct Shared<'a> {
    watch: Watch,
    step: Step<'a>,
    parameters: &'a Parameters,
    statistics: &'a Statistics,
    bucket: Mutex<TokenBucket>,
}

/// The channels of a source. The first is the caller's work, so one channel needs no thread; each other has one, which waits
/// for its share of the next round.
pub(crate) struct Channels<'a> {
    shared: Arc<Shared<'a>>,
    first: Outlet,
    others: Vec<Worker>,
}

struct Worker {
    jobs: Sender<(Arc<[PageBitmap]>, Work)>,
    done: Receiver<(Spent, Option<u64>)>,
}

impl<'a> Channels<'a> {
    /// Takes over connections that were [opened](open). The threads end with the channels, or with the attempt.
    pub fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        opened: &Opened,
        blocks: &[RamBlock],
        context: &Context<'a>,
    ) -> Result<Self, Error>
    where
        'a: 'scope,
    {
        let doing = "starting a channel";
        let count = opened.connections.len();
        let (parameters, statistics) = (context.parameters, context.statistics);
        let bucket = Mutex::new(TokenBucket::new(Instant::now()));
        let step = Step {
            doing: "sending guest memory",
            patience: context.patience.silence,
            cancel: Some(parameters),
            until: None,
        };
        let watch = Watch::default();
        let shared = Arc::new(Shared { watch, step, parameters, statistics, bucket });
        let outlets = opened.connections.iter().enumerate().map(|(index, connection)| {
            // The other handle stays open until leave was taken, so that the destination hears the cause first.
            let connection = connection.try_clone().map_err(|source| Error::Lost { doing, source })?;
            Outlet::new(Lane::new(connection), blocks, index, count, opened.compression)
        });
        let mut outlets = outlets.collect::<Result<Vec<_>, _>>()?.into_iter();
        let first =
            outlets.next().ok_or_else(|| Error::Protocol { doing, reason: "none was opened".into() })?;
        statistics.start_channels(count);
        let mut channels = Self { shared, first, others: Vec::with_capacity(count - 1) };
        for (index, mut outlet) in (1..).zip(outlets) {
            let (jobs, waiting) = channel::<(Arc<[PageBitmap]>, Work)>();
            let (told, done) = channel();
            let shared = Arc::clone(&channels.shared);
            let thread = std::thread::Builder::new().name(format!("channel-{index}"));
            let thread = thread.spawn_scoped(scope, move || {
                while let Ok((bitmaps, work)) = waiting.recv() {
                    match shared.send(index, &mut outlet, &bitmaps, work, &mut || Ok(())) {
                        Ok(done) => {
                            let _the_attempt_is_over = told.send(done);
                        }
                        Err(error) => return shared.watch.fail(error),
                    }
                }
            });
            thread.map_err(|source| Error::Lost { doing, source })?;
            channels.others.push(Worker { jobs, done });
        }
        Ok(channels)
    }

    /// Sends the pages of each bitmap (one for each block, in the order of the blocks at the start). `idle` is called now and then.
    /// Returns the digests of all channels with the last work.
    pub fn send(
        &mut self,
        bitmaps: &[PageBitmap],
        work: Work,
        idle: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<(Times, Vec<u64>), Error> {
        let start = Instant::now();
        let before = self.shared.channel_bytes();
        let result = self.send_all(bitmaps, work, idle);
        let (spent, digests) = result.map_err(|error| {
            self.shared.watch.fail(error);
            let none = Error::Cancelled;
            self.shared.watch.take_cause().unwrap_or(none)
        })?;
        Ok((spent.times(start.elapsed(), self.shared.channel_bytes() - before), digests))
    }

    fn send_all(
        &mut self,
        bitmaps: &[PageBitmap],
        work: Work,
        idle: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<(Spent, Vec<u64>), Error> {
        if !self.others.is_empty() {
            let bitmaps: Arc<[PageBitmap]> = bitmaps.into();
            for worker in &self.others {
                // One that has ended has said why.
                let _ended = worker.jobs.send((Arc::clone(&bitmaps), work));
            }
        }
        let mut digests = Vec::with_capacity(self.others.len() + 1);
        let (mut spent, digest) = self.shared.send(0, &mut self.first, bitmaps, work, idle)?;
        digests.extend(digest);
        for worker in &self.others {
            let (its, digest) = loop {
                match worker.done.recv_timeout(SLICE) {
                    Ok(done) => break done,
                    Err(RecvTimeoutError::Timeout) => idle()?,
                    // It has told the watch why.
                    Err(RecvTimeoutError::Disconnected) => return Err(Error::Cancelled),
                }
            };
            spent.add(&its);
            digests.extend(digest);
        }
        Ok((spent, digests))
    }
}

impl Drop for Channels<'_> {
    fn drop(&mut self) {
        self.shared.watch.end();
    }
}

impl Shared<'_> {
    /// A channel's share of a round, and the end after the last.
    fn send(
        &self,
        index: usize,
        outlet: &mut Outlet,
        bitmaps: &[PageBitmap],
        work: Work,
        idle: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<(Spent, Option<u64>), Error> {
        let start = Instant::now();
        let mut spent = Spent::default();
        let Work { round, until, limited, last } = work;
        let step = Step { until, ..self.step };
        outlet.round(round, bitmaps, step, &self.watch, &mut |sent, sending| {
            self.count(index, &sent);
            spent.sending += sending;
            spent.waited += self.hold_back(&sent, limited, idle)?;
            idle()
        })?;
        let digest = if last { Some(outlet.end(step, &self.watch)?) } else { None };
        spent.all = start.elapsed();
        Ok((spent, digest))
    }

    /// Waits as long as the limit wants it; returns how long that was.
    fn hold_back(
        &self,
        sent: &Sent,
        limited: bool,
        idle: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<Duration, Error> {
        if !limited {
            return Ok(Duration::ZERO);
        }
        let start = Instant::now();
        let take = |bytes| {
            let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.take(bytes, self.parameters.max_bandwidth(), Instant::now())
        };
        let mut wait = take(sent.bytes);
        if wait.is_zero() {
            return Ok(Duration::ZERO);
        }
        while !wait.is_zero() {
            if self.parameters.cancelled() || self.watch.is_over() {
                return Err(Error::Cancelled);
            }
            std::thread::sleep(wait.min(NAP));
            idle()?;
            // The limit may have been raised meanwhile.
            wait = take(0);
        }
        Ok(start.elapsed())
    }

    fn count(&self, index: usize, sent: &Sent) {
        self.statistics.update(|s| {
            let pages = sent.normal_pages + sent.zero_pages;
            s.remaining_bytes = s.remaining_bytes.saturating_sub(pages * crate::PAGE_BYTES);
            s.normal_pages += sent.normal_pages;
            s.zero_pages += sent.zero_pages;
            s.compressed_pages += sent.compressed_pages;
            s.compressed_bytes += sent.compressed_bytes;
            s.transferred_bytes += sent.bytes;
            s.add_to_channel(index, sent.bytes, pages);
        });
    }

    fn channel_bytes(&self) -> u64 {
        self.statistics.snapshot().channel_bytes.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first channel is done at once, and waits for the second, which works long and sends little: that is work, whoever waits for it.
    #[test]
    fn waiting_for_another_channel_is_no_sending() {
        let ms = Duration::from_millis;
        let mut spent = Spent { all: ms(10), waited: ms(0), sending: ms(5) };
        spent.add(&Spent { all: ms(90), waited: ms(20), sending: ms(5) });
        let Times { waited, sending, sent_bytes } = spent.times(ms(100), 7);
        assert_eq!((waited, sending, sent_bytes), (ms(20), ms(10), 7));
        let Times { waited, sending, .. } = Spent::default().times(ms(100), 0);
        assert_eq!((waited, sending), (ms(0), ms(0)));
    }
}
