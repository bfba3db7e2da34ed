//! All channels of a destination: who may join, and what they receive.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use transport::{Connection, Listener};

use super::CHANNELS_MAX;
use super::differing::Differing;
use super::lane::{Lane, LaneInput, Watch};
use super::receive::{Batch, Came, DOING, Inlet};
use crate::destination::unexpected;
use crate::headway::Brought;
use crate::lease::{Id, random_id};
use crate::link::{Link, SLICE, Step};
use crate::protocol::{Agree, ChannelHello, ChannelKey, Hello, Message};
use crate::reception::{GLANCE, Reception, Visit, next_visit};
use crate::{Error, FreshMemory, PageBitmap, Parameters, Patience, RamBlock, Statistics, features};

/// Between two looks whether the source is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Where peers come from.
pub trait Incoming {
    /// The next peer, or `None` if none came within `timeout`.
    ///
    /// # Errors
    /// None will come any more.
    fn accept(&self, timeout: Duration) -> Result<Option<Connection>, transport::Error>;
}

impl Incoming for Listener {
    fn accept(&self, timeout: Duration) -> Result<Option<Connection>, transport::Error> {
        self.accept(timeout)
    }
}

/// The answer to a source that says `hello` and is granted `granted` as far as this machine goes. Channels, the one for pages among
/// them, need a way in, and memory that goes itself needs no channels.
pub(crate) fn agree(hello: &Hello, mut granted: u64, instance: Id, has_way_in: bool) -> Result<Agree, Error> {
    const MEMORY: u64 = features::CHANNELS | features::LZ4 | features::ZSTD;
    if !has_way_in || granted & features::LOCAL != 0 {
        granted &= !(MEMORY | features::POSTCOPY);
    }
    let mut channels = hello.channels.min(CHANNELS_MAX);
    if channels == 0 || granted & features::CHANNELS == 0 {
        granted &= !MEMORY;
        channels = 1;
    }
    if granted & (features::CHANNELS | features::POSTCOPY) == 0 {
        return Ok(Agree { instance, features: granted, channels, key: None });
    }
    let failed =
        |source: std::io::Error| Error::Machine { doing: "draw a key for channels", source: source.into() };
    let key = Some(ChannelKey { key: random_id().map_err(failed)? });
    Ok(Agree { instance, features: granted, channels, key })
}

/// The links that a source opens right after AGREE.
#[derive(Default)]
pub(crate) struct Gathered {
    /// For guest memory.
    pub channels: Vec<Connection>,
    /// For pages that are asked for.
    pub pages: Option<Link>,
}

/// Lets the channels in that were agreed on, each within the patience of a handshake after the one before. `stranger` sees
/// whoever else comes, now or later; the source is there as long as its `link` is.
pub(crate) fn gather(
    agree: &Agree,
    session: Id,
    link: &mut Link,
    (reception, incoming): (&mut Reception, &dyn Incoming),
    step: Step<'_>,
    stranger: &mut dyn FnMut(Visit),
) -> Result<Gathered, Error> {
    let Some(ChannelKey { key }) = agree.key else { return Ok(Gathered::default()) };
    let count = if agree.features & features::CHANNELS == 0 { 0 } else { agree.channels };
    let mut slots: Vec<Option<Connection>> = (0..count).map(|_| None).collect();
    let (has_pages, mut pages) = (agree.features & features::POSTCOPY != 0, None);
    let (mut since, mut looked) = (Instant::now(), Instant::now());
    while slots.iter().any(Option::is_none) || has_pages && pages.is_none() {
        step.check()?;
        step.patient(since)?;
        let Some(visit) = next_visit(reception, incoming, GLANCE)? else {
            if looked.elapsed() >= LOOK_INTERVAL {
                looked = Instant::now();
                // What it says there can wait, and it may well speak before we have seen its last channel; not before the one for
                // pages is answered.
                if link.is_spoken_to(step)? && has_pages {
                    return Err(unexpected(link.receive(step)?, step.doing));
                }
            }
            continue;
        };
        match &visit.said {
            Ok(Message::Channel(hello))
                if (hello.session, hello.key) == (session, key)
                    && visit.link.identity() == link.identity() =>
            {
                let place = usize::from(hello.index);
                let wrong = |reason| Err(Error::Protocol { doing: step.doing, reason });
                match (hello.purpose, slots.get_mut(place)) {
                    (ChannelHello::PAGES, _) if has_pages && pages.is_none() && place == 0 => {
                        pages = Some((visit.link, hello.clone()));
                    }
                    (ChannelHello::MEMORY, None) => {
                        return wrong(format!("channel {place} came, and {count} were agreed on"));
                    }
                    (ChannelHello::MEMORY, Some(Some(_))) => {
                        return wrong(format!("channel {place} came twice"));
                    }
                    (ChannelHello::MEMORY, Some(slot @ None)) => *slot = Some(visit.link.into_connection()),
                    (purpose, _) => return wrong(format!("channel {place} is for purpose {purpose}")),
                }
                since = Instant::now();
            }
            _ => stranger(visit),
        }
    }
    let pages = pages.map(|(link, hello)| answer(link, hello, step)).transpose()?;
    Ok(Gathered { channels: slots.into_iter().flatten().collect(), pages })
}

/// Tells the source that its channel for pages is open. It says nothing on its link until then.
pub(crate) fn answer(mut link: Link, hello: ChannelHello, step: Step<'_>) -> Result<Link, Error> {
    link.send(&Message::Channel(hello), step)?;
    Ok(link)
}

/// What a channel ends with: its digest, and its pages that are not what the source saw of them.
type Told = (u64, Differing);

/// The receiving threads, one for each channel. They end with it.
pub(crate) struct Intake {
    shared: Arc<Shared>,
    ended: Receiver<(usize, Told)>,
    count: usize,
    patience: Duration,
    /// Memory that is filled until it is released.
    fresh: Option<Arc<dyn FreshMemory>>,
}

#[derive(Default)]
struct Shared {
    watch: Watch,
    /// All batches that are where they belong.
    came: Mutex<Batch>,
    more: Condvar,
}

impl Shared {
    fn came(&self) -> MutexGuard<'_, Batch> {
        self.came.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A batch is where it belongs.
    fn add(&self, batch: Batch) {
        let mut came = self.came();
        came.bytes += batch.bytes;
        came.pages += batch.pages;
        came.brought = came.brought + batch.brought;
        drop(came);
        self.more.notify_all();
    }
}

impl Intake {
    /// Receives into `blocks`, which are fresh, and filled as `fresh` does it where it can.
    pub fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        connections: Vec<Connection>,
        (blocks, fresh): (&[RamBlock], Option<Arc<dyn FreshMemory>>),
        (parameters, statistics): (&'scope Parameters, &'scope Statistics),
        patience: &Patience,
    ) -> Result<Self, Error> {
        statistics.start_channels(connections.len());
        let (count, shared) = (connections.len(), Arc::<Shared>::default());
        let (told, ended) = channel();
        let step = Step { doing: DOING, patience: patience.silence, cancel: Some(parameters), until: None };
        let intake = Self { shared, ended, count, patience: patience.silence, fresh };
        for (index, connection) in connections.into_iter().enumerate() {
            let mut inlet = Inlet::new(blocks, index, count, intake.fresh.as_ref());
            let (shared, told) = (Arc::clone(&intake.shared), told.clone());
            let thread = std::thread::Builder::new().name(format!("channel-{index}"));
            let thread = thread.spawn_scoped(scope, move || {
                let since = Instant::now();
                let mut input = LaneInput { lane: Lane::new(connection), step, watch: &shared.watch, since };
                loop {
                    match inlet.receive(&mut input) {
                        Ok(Came::Batch(batch)) => {
                            statistics.update(|s| s.add_to_channel(index, batch.bytes, batch.pages));
                            shared.add(batch);
                        }
                        Ok(Came::End { digest }) => {
                            let _the_attempt_is_over = told.send((index, (digest, inlet.into_differing())));
                            return;
                        }
                        Err(error) => return shared.watch.fail(error),
                    }
                }
            });
            thread.map_err(|source| Error::Lost { doing: "starting a channel", source })?;
        }
        Ok(intake)
    }

    /// How much has come, on the channels, and of memory.
    pub fn came(&self) -> (u64, Brought) {
        let came = self.shared.came();
        (came.bytes, came.brought)
    }

    /// Waits until as many `bytes` have come and are where they belong.
    pub fn settle(&self, bytes: u64) -> Result<(), Error> {
        let since = Instant::now();
        let mut came = self.shared.came();
        while came.bytes < bytes {
            let waited = self.shared.more.wait_timeout(came, SLICE);
            came = waited.unwrap_or_else(PoisonError::into_inner).0;
            self.check()?;
            if since.elapsed() >= self.patience {
                return Err(Error::TimedOut { doing: DOING, waited: self.patience });
            }
        }
        Ok(())
    }

    /// Whoever touches guest memory from here on waits for nobody; what comes still is placed in another way.
    pub fn release(&self) -> Result<(), Error> {
        let released = self.fresh.as_ref().map_or(Ok(()), |fresh| fresh.release());
        released.map_err(Error::machine("end the filling of guest memory"))
    }

    /// Whether all goes well.
    pub fn check(&self) -> Result<(), Error> {
        match self.shared.watch.is_over() {
            true => Err(self.shared.watch.take_cause().unwrap_or(Error::Cancelled)),
            false => Ok(()),
        }
    }

    /// Waits until every channel has come to its end: the source has said so on its link. The digests of all. Pages in `follow`, by
    /// block in the order of their names, are to come later.
    pub fn finish(&self, follow: &[&PageBitmap]) -> Result<Vec<u64>, Error> {
        let since = Instant::now();
        let mut digests = vec![None; self.count];
        while digests.iter().any(Option::is_none) {
            match self.ended.recv_timeout(SLICE) {
                Ok((index, (digest, mut differing))) => {
                    differing.forget(follow.iter().copied());
                    differing.check()?;
                    if let Some(slot) = digests.get_mut(index) {
                        *slot = Some(digest);
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    self.check()?;
                    if since.elapsed() >= self.patience {
                        return Err(Error::TimedOut { doing: DOING, waited: self.patience });
                    }
                }
            }
        }
        self.release()?;
        Ok(digests.into_iter().flatten().collect())
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.shared.watch.end();
        if let Err(error) = self.release() {
            log::warn!("{}", error.chain());
        }
    }
}
