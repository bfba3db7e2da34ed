//! The memory that has not come yet with its guest.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use transport::{Connection, Identity};

use super::message::{self, Missing};
use super::sets::PageSets;
use super::shared::{Shared, State};
use super::{Blocktime, order_by_name};
use crate::features;
use crate::lease::Id;
use crate::link::{Link, Step};
use crate::protocol::{Message, Progress, Reasons};
use crate::{Error, MachineResult, MissingPages, PAGE_BYTES, PageBitmap, Patience, Postcopy, RamBlock};

/// What the source has named before it hands the guest over.
pub(crate) struct Announced {
    missing: PageSets,
    order: Vec<usize>,
    lists: u32,
}

impl Announced {
    /// Nothing yet, of `blocks` as the machine has them.
    pub fn new(blocks: &[RamBlock]) -> Self {
        let order = order_by_name(blocks);
        let block_pages = blocks.iter().map(|block| block.length_bytes() / PAGE_BYTES);
        Self { missing: PageSets::none(block_pages), order, lists: 0 }
    }

    /// Adds what a message names; `discard` drops what is there of it, which is old.
    pub fn add(
        &mut self,
        message: &Missing,
        mut discard: impl FnMut(usize, std::ops::Range<u64>) -> MachineResult<()>,
    ) -> Result<(), Error> {
        let doing = "hearing which pages are missing";
        message::add_missing(message, &self.order, &mut self.missing)
            .map_err(|reason| Error::Protocol { doing, reason })?;
        let Some(block) = self.order.get(usize::from(message.block)) else { return Ok(()) };
        message
            .runs()
            .try_for_each(|run| discard(*block, run))
            .map_err(Error::machine("drop the old copies of missing pages"))
    }

    /// Has every block make sure that what was named of it is missing.
    pub fn keep_missing(
        &self,
        mut keep: impl FnMut(usize, &PageBitmap) -> MachineResult<()>,
    ) -> Result<(), Error> {
        let mut blocks = self.missing.bitmaps().iter().enumerate();
        blocks
            .try_for_each(|(block, pages)| keep(block, pages))
            .map_err(Error::machine("make sure that missing pages are missing"))
    }

    /// What was added so far, by block in the order of their names.
    pub fn by_name(&self) -> Vec<&PageBitmap> {
        self.order.iter().filter_map(|block| self.missing.bitmaps().get(*block)).collect()
    }

    /// A list has ended; whether it was the first, which is to be confirmed.
    pub fn listed(&mut self) -> bool {
        self.lists = self.lists.saturating_add(1);
        self.lists == 1
    }

    /// Whether the guest has been stopped since, and nothing will be added any more.
    pub fn is_complete(&self) -> bool {
        self.lists > 1
    }

    /// Whether `memory` lets every page be missing that is.
    fn check(&self, memory: &dyn MissingPages) -> Result<(), Error> {
        let lacks = |pages: &PageBitmap| pages.runs().next().is_some();
        let mut blocks = self.missing.bitmaps().iter().enumerate();
        match blocks.find(|(block, pages)| lacks(pages) && !memory.has(*block)) {
            None => Ok(()),
            Some((block, _)) => Err(Error::Protocol {
                doing: "hearing which pages are missing",
                reason: format!("block number {block} must be here before the guest runs"),
            }),
        }
    }
}

/// Memory that comes after its guest.
pub(crate) struct Late {
    /// What the source shows when it comes again, and who it is.
    key: Id,
    identity: Option<Identity>,
    shared: Arc<Shared>,
    faults: Option<JoinHandle<()>>,
    pages: Option<Channel>,
    main: Option<Channel>,
    /// The guest stands still, since nothing comes.
    is_held: bool,
}

/// A link, and the thread that receives there.
struct Channel {
    link: Connection,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Channel {
    fn drop(&mut self) {
        let _gone_already = self.link.shutdown(Shutdown::Both);
        self.thread.take().map(JoinHandle::join);
    }
}

/// What [`Late::wait`] waited for.
#[derive(Debug)]
pub(crate) enum Now {
    /// Time has passed.
    Coming,
    /// Everything is there.
    Here,
    /// The links are lost.
    Lost(Error),
    /// No link is of use any more: nobody who waits can be served.
    Broken(Error),
}

impl Late {
    /// Begins to bring what is missing of `memory`, over `pages`, of a source that was granted `features`. The guest is the source's
    /// still.
    pub fn new(
        memory: Arc<dyn MissingPages>,
        announced: Announced,
        (pages, key, features): (Link, Id, u64),
        patience: Patience,
    ) -> Result<Self, Error> {
        announced.check(&*memory)?;
        let Announced { missing, order, .. } = announced;
        let state = State {
            missing,
            waiting: BTreeMap::new(),
            blocktime: Blocktime::default(),
            placed_bytes: 0,
            lost: None,
            broken: None,
            epoch: 0,
            owned: false,
            released: false,
            farewell: None,
            recoveries: 0,
        };
        let shared = Arc::new(Shared {
            memory,
            order,
            state: Mutex::new(state),
            changed: Condvar::new(),
            requests: Mutex::default(),
            asks_for_runs: features & features::PAGE_RUNS != 0,
            parts: Mutex::default(),
            patience,
        });
        let identity = pages.identity();
        let (pages_link, main) = (None, None);
        let mut late = Self { key, identity, shared, faults: None, pages: pages_link, main, is_held: false };
        late.faults = Some(late.spawn("page-faults", Shared::watch)?);
        late.pages = Some(late.ask_on(pages)?);
        Ok(late)
    }

    fn spawn(
        &self,
        name: &str,
        work: impl FnOnce(&Shared) + Send + 'static,
    ) -> Result<JoinHandle<()>, Error> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || work(&shared));
        thread.map_err(|source| Error::Machine {
            doing: "start a thread that brings guest memory",
            source: source.into(),
        })
    }

    /// Receives on `link`.
    fn receive_on(&self, name: &str, mut link: Link, is_main: bool) -> Result<Channel, Error> {
        let (handle, epoch) = (link.handle()?, self.shared.state().epoch);
        let thread = self.spawn(name, move |shared| {
            if let Err(error) = shared.receive(&mut link, is_main) {
                shared.lose(epoch, error);
            }
        })?;
        Ok(Channel { link: handle, thread: Some(thread) })
    }

    /// Asks for pages on `link`, first for those that somebody waits for already.
    fn ask_on(&self, link: Link) -> Result<Channel, Error> {
        let requests = (self.shared.state().epoch, Link::new(link.handle()?)?);
        *self.shared.requests() = Some(requests);
        let channel = self.receive_on("pages", link, false)?;
        self.shared.ask_again();
        Ok(channel)
    }

    /// What the source shows when it comes again.
    pub fn key(&self) -> Id {
        self.key
    }

    /// Whether whoever is at the other end of `link` is who the source has proven to be.
    pub fn is_peer(&self, link: &Link) -> bool {
        link.identity() == self.identity
    }

    /// The guest becomes ours: from here on nobody who waits for a page goes on without it.
    ///
    /// # Errors
    /// The links are lost already.
    pub fn own(&self) -> Result<(), Error> {
        let mut state = self.shared.state();
        match state.lost.take() {
            Some(error) => Err(error),
            None if state.released => Err(Error::Closed { doing: "bringing guest memory" }),
            None => {
                state.owned = true;
                Ok(())
            }
        }
    }

    /// It did not become ours after all.
    pub fn disown(&self) {
        self.shared.state().owned = false;
    }

    /// What comes in the background comes on `link` from now on.
    pub fn go_on_with(&mut self, link: Link) -> Result<(), Error> {
        self.main = Some(self.receive_on("memory", link, true)?);
        Ok(())
    }

    /// Waits for `time`, or until it matters what has happened.
    pub fn wait(&mut self, time: Duration) -> Now {
        let state = self.shared.state();
        let nothing =
            |state: &mut State| state.missing.count() > 0 && state.lost.is_none() && state.broken.is_none();
        let (mut state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, time, nothing)
            .unwrap_or_else(PoisonError::into_inner);
        if state.missing.count() == 0 {
            return Now::Here;
        }
        if let Some(error) = state.broken.take() {
            return Now::Broken(error);
        }
        let lost = state.lost.take();
        drop(state);
        match lost {
            None => Now::Coming,
            Some(error) => {
                self.hang_up();
                Now::Lost(error)
            }
        }
    }

    /// Whether there are links, as far as is known.
    pub fn is_connected(&self) -> bool {
        self.main.is_some() && self.pages.is_some()
    }

    /// Nothing comes at present: has the guest stand still.
    pub fn hold(&mut self) {
        if !std::mem::replace(&mut self.is_held, true)
            && let Err(error) = self.shared.memory.hold()
        {
            log::error!("the guest, whose memory does not come, cannot be stopped: {error}");
        }
    }

    /// Memory comes again, or is there.
    pub fn let_go(&mut self) {
        if std::mem::take(&mut self.is_held)
            && let Err(error) = self.shared.memory.go_on()
        {
            log::error!("the guest, whose memory comes again, cannot go on: {error}");
        }
    }

    /// The end of the guest, for `error`, which the source is told.
    pub fn give_up(&self, error: &Error, patience: Duration) {
        let step = Step { doing: "saying that the guest cannot go on", patience, cancel: None, until: None };
        let reject = Message::Reject(Reasons::new(&[error.chain()]));
        if let Some((_, link)) = self.shared.requests().as_mut()
            && link.send(&reject, step).is_ok()
        {
            // Links that are closed with something unread may lose what was sent there: the source hangs up when it has heard.
            let listens = |state: &mut State| state.lost.is_none();
            drop(self.shared.changed.wait_timeout_while(self.shared.state(), patience, listens));
        }
        self.shared.memory.lost(error);
    }

    /// Lets go of the links.
    pub fn hang_up(&mut self) {
        {
            let mut state = self.shared.state();
            (state.lost, state.epoch) = (None, state.epoch.wrapping_add(1));
        }
        (self.main, self.pages) = (None, None);
        *self.shared.requests() = None;
    }

    /// Tells the source on `link` what is missing still, or that nothing is.
    pub fn tell_missing(&self, link: &mut Link, step: Step<'_>) -> Result<bool, Error> {
        let missing: Vec<_> = {
            let state = self.shared.state();
            if state.missing.count() == 0 {
                drop(state);
                link.send(&Message::Received, step)?;
                return Ok(true);
            }
            let bitmaps = state.missing.bitmaps();
            self.shared.order.iter().filter_map(|block| bitmaps.get(*block).cloned()).collect()
        };
        Missing::of(&missing).try_for_each(|message| link.send(&Message::Missing(message), step))?;
        link.send(&Message::Listed, step)?;
        Ok(false)
    }

    /// Goes on with new links.
    pub fn resume(&mut self, main: Link, pages: Link) -> Result<(), Error> {
        self.hang_up();
        self.pages = Some(self.ask_on(pages)?);
        self.go_on_with(main)?;
        self.shared.state().recoveries += 1;
        Ok(())
    }

    /// Everything is there: ends the watching, tells the source, and says whether it knows and what it told.
    pub fn finish(&mut self, patience: Duration) -> Result<Option<Progress>, Error> {
        self.shared.state().released = true;
        self.shared.memory.release().map_err(Error::machine("end the watch over guest memory"))?;
        if !self.dismiss(patience) {
            self.hang_up();
            return Ok(None);
        }
        let state = self.shared.state();
        let silent = |state: &mut State| state.farewell.is_none() && state.lost.is_none();
        let (mut state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, patience, silent)
            .unwrap_or_else(PoisonError::into_inner);
        let farewell = state.farewell.take();
        drop(state);
        if farewell.is_none() {
            self.hang_up();
        }
        Ok(farewell)
    }

    /// Tells the source, where there is one, that nothing is needed of it any more. Whether it was told.
    pub fn dismiss(&self, patience: Duration) -> bool {
        let step = Step { doing: "reporting that all memory is here", patience, cancel: None, until: None };
        match self.shared.requests().as_mut().map(|(_, link)| link.send(&Message::Received, step)) {
            Some(Ok(())) => true,
            Some(Err(error)) => {
                log::info!("{}", error.chain());
                false
            }
            None => false,
        }
    }

    /// How it goes, and how many bytes are missing.
    pub fn figures(&self) -> (Postcopy, u64) {
        let now = Instant::now();
        let state = self.shared.state();
        let State { blocktime, .. } = &*state;
        let named = |(thread, time)| (self.shared.memory.thread_name(thread), time);
        let figures = Postcopy {
            requests: blocktime.faults,
            zero_faults: blocktime.zero_faults,
            bytes: state.placed_bytes,
            blocktime: blocktime.total(now),
            threads: blocktime.threads().map(named).collect(),
            latency_median: blocktime.median(),
            latency_max: blocktime.longest(),
            recoveries: state.recoveries,
            paused: None,
        };
        (figures, state.missing.count() * PAGE_BYTES)
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        self.hang_up();
        let state = self.shared.state();
        let keeps_waiting = state.owned && state.missing.count() > 0;
        drop(state);
        if keeps_waiting {
            // The end of the process ends their waiting, before they could read anything. So does the thread that hears of them.
            std::mem::forget(Arc::clone(&self.shared.memory));
            return;
        }
        if let Err(error) = self.shared.memory.release() {
            log::error!("cannot end the watch over guest memory: {error}");
        }
        self.faults.take().map(JoinHandle::join);
    }
}
