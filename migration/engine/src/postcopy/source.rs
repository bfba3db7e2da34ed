//! The memory that the source keeps for a guest that has left.

use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use stream::frame::{HEADER_BYTES, Kind};
use transport::Connection;
use vm_memory::VolatileMemory;

use super::message::{self, Missing, PageRequest, Pages, RUN_PAGES_MAX, Recover, RunRequest};
use super::order_by_name;
use super::sets::PageSets;
use crate::bandwidth::TokenBucket;
use crate::lease::Id;
use crate::link::{Dial, Link, Step, Until};
use crate::protocol::{Agree, ChannelHello, Message};
use crate::source::{Context, unexpected};
use crate::{
    Error, OnTimeout, PAGE_BYTES, PageBitmap, Parameters, Patience, PostcopyStart, RamBlock, SourceMachine,
    Status, features,
};

/// The longest sleep between two looks at what the user wishes.
const NAP: Duration = Duration::from_millis(20);

/// Guest memory that the destination has not got yet, and all of the rest of it, until it has everything.
#[derive(Debug)]
pub(crate) struct Remainder {
    session: Id,
    key: Id,
    memory: Arc<Memory>,
    server: Option<Server>,
}

/// Read by the thread that answers requests and by the one that sends in the background.
#[derive(Debug)]
struct Memory {
    /// In the order of their names.
    blocks: Vec<RamBlock>,
    /// What the background still has to send.
    left: Mutex<PageSets>,
    requests: AtomicU64,
    requested_bytes: AtomicU64,
    /// The destination needs nothing any more.
    received: AtomicBool,
    /// The guest is the destination's, and the main link is for nothing but its memory.
    has_left: AtomicBool,
    /// Why requests are not answered any more.
    lost: Mutex<Option<Error>>,
}

/// The thread that answers requests.
#[derive(Debug)]
struct Server {
    link: Connection,
    thread: Option<JoinHandle<()>>,
    /// Nobody is to ask any more: that its link ends is no failure.
    is_given_up: Arc<AtomicBool>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_given_up.store(true, Ordering::SeqCst);
        let _gone_already = self.link.shutdown(Shutdown::Both);
        self.thread.take().map(JoinHandle::join);
    }
}

impl Remainder {
    /// Begins to answer requests on `pages`. `missing` is what the destination lacks, one bitmap for each of `blocks`. `main` is cut
    /// when no more requests can be answered and the guest has left.
    pub fn new(
        (session, key): (Id, Id),
        blocks: &[RamBlock],
        missing: &[PageBitmap],
        pages: Link,
        main: &Link,
        patience: Patience,
    ) -> Result<Self, Error> {
        let order = order_by_name(blocks);
        let in_order = |index: &usize| blocks.get(*index).cloned().zip(missing.get(*index).cloned());
        let (blocks, missing): (Vec<_>, Vec<_>) = order.iter().filter_map(in_order).unzip();
        let memory = Memory {
            blocks,
            left: Mutex::new(PageSets::new(missing)),
            requests: AtomicU64::new(0),
            requested_bytes: AtomicU64::new(0),
            received: AtomicBool::new(false),
            has_left: AtomicBool::new(false),
            lost: Mutex::default(),
        };
        let mut remainder = Self { session, key, memory: Arc::new(memory), server: None };
        remainder.serve(pages, main, patience)?;
        Ok(remainder)
    }

    fn serve(&mut self, mut pages: Link, main: &Link, patience: Patience) -> Result<(), Error> {
        let (link, main) = (pages.handle()?, main.handle()?);
        let memory = Arc::clone(&self.memory);
        let is_given_up = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&is_given_up);
        let thread = std::thread::Builder::new().name("page-server".to_owned()).spawn(move || {
            if let Err(error) = memory.answer(&mut pages, patience)
                && !is_over.load(Ordering::SeqCst)
            {
                memory.lost().get_or_insert(error);
                if memory.has_left.load(Ordering::SeqCst) {
                    // Who sends there fails next. What the destination has to say of it is still heard.
                    let _gone_already = main.shutdown(Shutdown::Write);
                }
            }
        });
        let thread = thread.map_err(|source| Error::Machine {
            doing: "start the thread that answers page requests",
            source: source.into(),
        })?;
        self.server = Some(Server { link, thread: Some(thread), is_given_up });
        Ok(())
    }

    /// Why requests can be answered no more, if so: the guest must not leave then.
    pub fn take_loss(&self) -> Option<Error> {
        self.memory.lost().take()
    }

    /// The guest is the destination's: sends all that it lacks, over lost links and new ones, and returns when it has everything.
    /// `link` is the main link, if it is still there.
    ///
    /// # Errors
    /// [`Error::LeftBehind`]: the process is to end all the same.
    pub fn bring(
        mut self,
        link: Option<Link>,
        dial: &mut Dial<'_>,
        context: &Context<'_>,
    ) -> Result<(), Error> {
        // What was lost before is found before anything is sent.
        self.memory.has_left.store(true, Ordering::SeqCst);
        let mut found = match link {
            Some(mut link) => {
                // It learns the figures, and that its answer arrived. If it does not, the link is lost.
                let patience = context.patience.last_words;
                let step = Step { doing: "taking leave of the guest", patience, cancel: None, until: None };
                link.send(&Message::Progress(context.statistics.progress()), step).map(|()| Found::Link(link))
            }
            // It was lost at the hand-over, and the destination has answered since.
            None => self.recover(dial, context),
        };
        loop {
            let error = match found {
                Ok(Found::Everything(main)) => return self.take_leave(main, context),
                Ok(Found::Link(mut main)) => match self.fill(&mut main, context) {
                    Ok(()) => return self.take_leave(main, context),
                    Err(error) => {
                        // If requests could not be answered any more, that broke first; but the destination may have had a word
                        // to say, which is read to the end.
                        let first = self.memory.lost().take();
                        self.server = None;
                        let last = self.memory.lost().take();
                        let told = [last.as_ref(), first.as_ref(), Some(&error)];
                        if let Some(told) = told.into_iter().flatten().find(|error| error.came_from_peer()) {
                            return Err(Error::GuestLost { reason: told.chain() });
                        }
                        if self.memory.received.load(Ordering::SeqCst) {
                            // The destination has let go of both links since.
                            return self.take_leave(main, context);
                        }
                        first.unwrap_or(error)
                    }
                },
                Err(error) => error,
            };
            self.wait_for_operator(&error, context)?;
            found = self.recover(dial, context);
        }
    }

    /// The destination has everything, and waits to hear that it was heard.
    fn take_leave(self, mut main: Link, context: &Context<'_>) -> Result<(), Error> {
        self.publish(0, context);
        context.statistics.update(|s| s.remaining_bytes = 0);
        let patience = context.patience.last_words;
        let step = Step { doing: "taking leave", patience, cancel: None, until: None };
        let _it_has_everything = main.send(&Message::Progress(context.statistics.progress()), step);
        main.close(patience);
        Ok(())
    }

    fn wait_for_operator(&self, error: &Error, context: &Context<'_>) -> Result<(), Error> {
        let parameters = context.parameters;
        let left_bytes = self.memory.left().count() * PAGE_BYTES;
        if !parameters.is_abandoned() {
            log::warn!(
                "the guest still needs memory of this process, and the link is lost: {}",
                error.chain()
            );
        }
        context.statistics.update(|s| s.postcopy.get_or_insert_default().paused = Some(error.chain()));
        context.statistics.set_status(Status::PostcopyPaused);
        while !parameters.take_recovery() {
            if parameters.is_abandoned() {
                return Err(Error::LeftBehind { bytes: left_bytes });
            }
            std::thread::sleep(NAP);
        }
        Ok(())
    }

    /// Sends what is left, as fast as the limit allows, and hears that everything arrived.
    fn fill(&self, link: &mut Link, context: &Context<'_>) -> Result<(), Error> {
        let (parameters, statistics) = (context.parameters, context.statistics);
        statistics.update(|s| s.postcopy.get_or_insert_default().paused = None);
        statistics.set_status(Status::PostcopyActive);
        let step = Step {
            doing: "sending the rest of guest memory",
            patience: context.patience.silence,
            cancel: None,
            until: None,
        };
        let mut frame = Vec::new();
        let mut bucket = TokenBucket::new(Instant::now());
        while !self.memory.received.load(Ordering::SeqCst) {
            self.check(context)?;
            let next = self.memory.left().take_next(RUN_PAGES_MAX);
            let Some((block, run)) = next else { break };
            self.memory.encode(&mut frame, block, run.start, run.end - run.start)?;
            link.send_frame(Kind::Pages, &mut frame, step)?;
            self.publish(frame.len() as u64, context);
            let mut wait = bucket.take(frame.len() as u64, parameters.max_bandwidth(), Instant::now());
            // What is asked for meanwhile goes at once, and may be all.
            while !wait.is_zero()
                && self.memory.left().count() > 0
                && !self.memory.received.load(Ordering::SeqCst)
            {
                self.check(context)?;
                std::thread::sleep(wait.min(NAP));
                // The limit may have been changed meanwhile.
                wait = bucket.take(0, parameters.max_bandwidth(), Instant::now());
            }
        }
        let (doing, since) = ("waiting until the destination has all of guest memory", Instant::now());
        while !self.memory.received.load(Ordering::SeqCst) {
            self.check(context)?;
            self.publish(0, context);
            if since.elapsed() >= step.patience {
                return Err(Error::TimedOut { doing, waited: step.patience });
            }
            std::thread::sleep(NAP);
        }
        Ok(())
    }

    /// Whether there is a reason to stop sending.
    fn check(&self, context: &Context<'_>) -> Result<(), Error> {
        match self.memory.lost().take() {
            Some(error) => Err(error),
            None if context.parameters.is_abandoned() => Err(Error::Cancelled),
            None => Ok(()),
        }
    }

    /// Tells the user how far it is.
    fn publish(&self, sent_bytes: u64, context: &Context<'_>) {
        let left_bytes = self.memory.left().count() * PAGE_BYTES;
        let requests = self.memory.requests.load(Ordering::Relaxed);
        let requested_bytes = self.memory.requested_bytes.swap(0, Ordering::Relaxed);
        context.statistics.update(|s| {
            s.remaining_bytes = left_bytes;
            s.transferred_bytes += sent_bytes + requested_bytes;
            let postcopy = s.postcopy.get_or_insert_default();
            postcopy.requests = requests;
            postcopy.bytes += sent_bytes + requested_bytes;
        });
    }

    /// Goes on with the destination on new links: with what it says that it lacks.
    fn recover(&mut self, dial: &mut Dial<'_>, context: &Context<'_>) -> Result<Found, Error> {
        self.server = None;
        context.statistics.set_status(Status::PostcopyRecover);
        let doing = "going on with a guest that lacks memory";
        let step = Step { doing, patience: context.patience.handshake, cancel: None, until: None };
        let mut main = Link::new(dial()?)?;
        main.greet(step)?;
        main.send(&Message::Recover(Recover { session: self.session, key: self.key }), step)?;
        let allowed = context.patience.prepare;
        let step = Step { until: Some(Until { end: Instant::now() + allowed, allowed }), ..step };
        let Some(missing) = hear_what_is_missing(&mut main, &self.memory.blocks, context.parameters, step)?
        else {
            return Ok(Found::Everything(main));
        };
        let pages = open_channel(self.session, self.key, dial, context.patience)?;
        *self.memory.left() = missing;
        *self.memory.lost() = None;
        self.serve(pages, &main, context.patience)?;
        context.statistics.update(|s| s.postcopy.get_or_insert_default().recoveries += 1);
        Ok(Found::Link(main))
    }
}

/// The pages of `blocks` that a destination says it lacks; `None`: it has everything. It may neither say so for ever, nor keep the process
/// from its end.
fn hear_what_is_missing(
    main: &mut Link,
    blocks: &[RamBlock],
    parameters: &Parameters,
    step: Step<'_>,
) -> Result<Option<PageSets>, Error> {
    let wrong = |reason| Error::Protocol { doing: step.doing, reason };
    let mut missing = PageSets::none(blocks.iter().map(|block| block.length_bytes() / PAGE_BYTES));
    let order: Vec<_> = (0..blocks.len()).collect();
    loop {
        // Messages that come one by one are each in time.
        step.patient(Instant::now())?;
        if parameters.is_abandoned() {
            return Err(Error::Cancelled);
        }
        match main.receive(step)? {
            Message::Missing(more) => {
                let before = missing.count();
                message::add_missing(&more, &order, &mut missing).map_err(wrong)?;
                // Each is heard within its time, so that there may not be any number of them.
                if missing.count() == before {
                    return Err(wrong("missing pages were named before, or none were".to_owned()));
                }
            }
            Message::Listed => return Ok(Some(missing)),
            Message::Received => return Ok(None),
            other => return Err(unexpected(other, step.doing)),
        }
    }
}

/// What a new link led to.
enum Found {
    /// The destination that lacks memory.
    Link(Link),
    /// The destination, which lacks nothing any more.
    Everything(Link),
}

/// What a source offers to a destination.
pub(crate) fn offered(parameters: &Parameters) -> u64 {
    let is_way_out = parameters.convergence().on_timeout == OnTimeout::Postcopy;
    if is_way_out || parameters.postcopy() != PostcopyStart::Never {
        features::POSTCOPY | features::PAGE_RUNS
    } else {
        0
    }
}

/// Opens the link for page requests, if memory may follow: then the destination must have agreed to that.
pub(crate) fn open(
    agree: &Agree,
    session: Id,
    dial: &mut Dial<'_>,
    context: &Context<'_>,
) -> Result<Option<Link>, Error> {
    let offered = offered(context.parameters);
    match &agree.key {
        _ if offered == 0 => Ok(None),
        Some(key) if agree.features & features::POSTCOPY != 0 => {
            let opened = open_channel(session, key.key, dial, context.patience);
            // The main link is as it was, and the destination is to hear of it there.
            let failed =
                |error: Error| Error::Machine { doing: "open the channel for pages", source: error.into() };
            opened.map(Some).map_err(failed)
        }
        _ => Err(Error::Refused {
            reasons: vec![
                "postcopy: the destination needs all of guest memory before the guest runs".to_owned(),
            ],
        }),
    }
}

fn open_channel(session: Id, key: Id, dial: &mut Dial<'_>, patience: Patience) -> Result<Link, Error> {
    let doing = "opening the channel for pages";
    let step = Step { doing, patience: patience.handshake, cancel: None, until: None };
    let mut link = Link::new(dial()?)?;
    link.greet(step)?;
    let hello = Message::Channel(ChannelHello { session, key, index: 0, purpose: ChannelHello::PAGES });
    link.send(&hello, step)?;
    match link.receive(step)? {
        echo if echo == hello => Ok(link),
        other => Err(unexpected(other, doing)),
    }
}

impl Memory {
    /// Answers requests until the link ends.
    fn answer(&self, link: &mut Link, patience: Patience) -> Result<(), Error> {
        let doing = "waiting for page requests";
        let step = Step { doing, patience: patience.silence, cancel: None, until: None };
        let mut frame = Vec::new();
        loop {
            // Nobody may lack a page for long.
            if !link.is_spoken_to(step)? {
                continue;
            }
            let RunRequest { block, first_page, count } = match link.receive(step)? {
                Message::PageRequest(PageRequest { block, page }) => {
                    RunRequest { block, first_page: page, count: 1 }
                }
                Message::RunRequest(request) if (1..=RUN_PAGES_MAX).contains(&request.count.into()) => {
                    request
                }
                Message::Received => {
                    self.received.store(true, Ordering::SeqCst);
                    return Ok(());
                }
                other => return Err(unexpected(other, doing)),
            };
            let (block, end) = (block.into(), first_page.saturating_add(count.into()));
            // First: who reads them in the background has sent them, or finds them taken.
            self.left().remove(block, first_page..end);
            self.encode(&mut frame, block, first_page, count.into())?;
            link.send_frame(
                Kind::Pages,
                &mut frame,
                Step { doing: "sending a page that is waited for", ..step },
            )?;
            self.left().go_on_from(block, end);
            self.requests.fetch_add(1, Ordering::Relaxed);
            self.requested_bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        }
    }

    /// Makes a frame of pages.
    fn encode(&self, frame: &mut Vec<u8>, block: usize, first_page: u64, count: u64) -> Result<(), Error> {
        let doing = "reading guest memory";
        let beyond = || Error::Protocol {
            doing,
            reason: format!("page {first_page} of block number {block}, which there is not"),
        };
        let memory = self.blocks.get(block).ok_or_else(beyond)?;
        let offset = first_page.checked_mul(PAGE_BYTES).and_then(|offset| usize::try_from(offset).ok());
        let length = (count * PAGE_BYTES) as usize;
        let slice =
            offset.and_then(|offset| memory.mapping.get_slice(offset, length).ok()).ok_or_else(beyond)?;
        let mut contents = vec![0; length];
        slice.copy_to(&mut contents);
        frame.clear();
        frame.resize(HEADER_BYTES, 0);
        Pages::encode(frame, block, first_page, &contents);
        Ok(())
    }

    fn left(&self) -> MutexGuard<'_, PageSets> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lost(&self) -> MutexGuard<'_, Option<Error>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which blocks can follow after the guest.
pub(crate) struct Followers(Vec<bool>);

impl Followers {
    /// Of `blocks`, which are those of `machine`.
    pub fn of(machine: &dyn SourceMachine, blocks: &[RamBlock]) -> Self {
        Self(blocks.iter().map(|block| !machine.is_needed_at_once(block)).collect())
    }

    /// The pages that follow.
    pub fn follow(&self, pages: &[PageBitmap]) -> Vec<PageBitmap> {
        self.select(pages, true)
    }

    /// The pages that are needed at once.
    pub fn needed(&self, pages: &[PageBitmap]) -> Vec<PageBitmap> {
        self.select(pages, false)
    }

    fn select(&self, pages: &[PageBitmap], follow: bool) -> Vec<PageBitmap> {
        let select = |(pages, follows): (&PageBitmap, &bool)| match *follows == follow {
            true => pages.clone(),
            false => PageBitmap::new(pages.pages()),
        };
        pages.iter().zip(&self.0).map(select).collect()
    }
}

/// Says on `send` which pages are missing: one bitmap for each of `blocks`.
pub(crate) fn announce(
    blocks: &[RamBlock],
    missing: &[PageBitmap],
    mut send: impl FnMut(&Message) -> Result<(), Error>,
) -> Result<(), Error> {
    let order = order_by_name(blocks);
    let missing: Vec<_> = order.iter().filter_map(|index| missing.get(*index).cloned()).collect();
    Missing::of(&missing).try_for_each(|message| send(&Message::Missing(message)))?;
    send(&Message::Listed)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::mmap::MmapRegion;

    use super::*;

    const STEP: Step<'static> =
        Step { doing: "testing", patience: Duration::from_secs(20), cancel: None, until: None };

    /// What is there of memory, what of it is missing, and both ends of a link.
    fn set_up() -> ([RamBlock; 1], PageBitmap, [Link; 2]) {
        let mapping = Arc::new(MmapRegion::new(64 * PAGE_BYTES as usize).unwrap());
        let blocks = [RamBlock { name: "ram".to_owned(), mapping }];
        let (near, far) = Connection::pair().unwrap();
        (blocks, PageBitmap::new(64), [near, far].map(|end| Link::new(end).unwrap()))
    }

    /// The guest is gone by then, and the process could not even end.
    #[test]
    fn a_destination_that_lacks_the_same_pages_for_ever_is_given_up() {
        let (blocks, mut lacks, [mut near, mut far]) = set_up();
        let (step, parameters) = (STEP, Parameters::new());
        let mut say = |pages: &[u64]| {
            pages.iter().for_each(|page| lacks.set(*page));
            Missing::of(std::slice::from_ref(&lacks))
                .for_each(|missing| far.send(&Message::Missing(missing), step).unwrap());
        };
        say(&[3]);
        say(&[3, 9]);
        say(&[9]);
        far.send(&Message::Listed, step).unwrap();
        let error = hear_what_is_missing(&mut near, &blocks, &parameters, step).unwrap_err().chain();
        assert!(error.contains("named before"), "{error}");
        assert!(matches!(near.receive(step).unwrap(), Message::Listed), "those before were taken");
    }

    /// It names one after the other, each in time: neither does that take as long as there are pages, nor keep the process from its end.
    #[test]
    fn a_destination_that_names_what_it_lacks_page_by_page_is_given_up() {
        let says_all = |parameters: &Parameters, step: Step<'_>| {
            let (blocks, mut lacks, [mut near, mut far]) = set_up();
            for page in 0..64 {
                lacks.set(page);
                for missing in Missing::of(std::slice::from_ref(&lacks)) {
                    far.send(&Message::Missing(missing), STEP).unwrap();
                }
            }
            let error = hear_what_is_missing(&mut near, &blocks, parameters, step).unwrap_err();
            assert!(matches!(near.receive(STEP), Ok(Message::Missing(_))), "the rest was left");
            error
        };
        let parameters = Parameters::new();
        let allowed = Duration::from_secs(7);
        let until = Until { end: Instant::now(), allowed };
        let error = says_all(&parameters, Step { until: Some(until), ..STEP });
        assert!(matches!(error, Error::TimedOut { waited, .. } if waited == allowed), "{error:?}");
        parameters.abandon();
        let error = says_all(&parameters, STEP);
        assert!(matches!(error, Error::Cancelled), "{error:?}");
    }
}
