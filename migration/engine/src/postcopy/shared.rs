//! What the threads share that bring the memory which a guest lacks.
//!
//! Pages have [`PAGE_BYTES`] wherever they are named, on the wire and here. A block may lie in larger pages at the destination
//! ([`MissingPages::page_bytes`]): who touches one of those waits until the last of its parts is there, so all parts that are missing are
//! asked for at once, and each is put into its place unseen.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Blocktime;
use super::message::{PageRequest, Pages, RUN_PAGES_MAX, RunRequest};
use super::sets::PageSets;
use crate::link::{Link, Step};
use crate::protocol::{Message, Progress};
use crate::{Error, Fault, MachineResult, MissingPages, PAGE_BYTES, Patience};

/// Between two attempts to get memory that there is not.
const PAUSE: Duration = Duration::from_millis(50);

pub(super) struct Shared {
    pub memory: Arc<dyn MissingPages>,
    /// The machine's number of each block in the order of their names.
    pub order: Vec<usize>,
    pub state: Mutex<State>,
    pub changed: Condvar,
    /// Where pages are asked for, and since which time that links came about.
    pub requests: Mutex<Option<(u32, Link)>>,
    /// The source answers requests for several pages.
    pub asks_for_runs: bool,
    /// Held by who puts parts into a larger page: the same part can come by both links, and the guest may have written to it since it
    /// could see the page.
    pub parts: Mutex<()>,
    pub patience: Patience,
}

pub(super) struct State {
    /// By the machine's numbers.
    pub missing: PageSets,
    /// By block and first page of what is waited for.
    pub waiting: BTreeMap<(usize, u64), Vec<Waiter>>,
    pub blocktime: Blocktime,
    pub placed_bytes: u64,
    /// Why nothing comes any more.
    pub lost: Option<Error>,
    /// Why nobody who waits can be served any more, whatever comes.
    pub broken: Option<Error>,
    /// How often links were let go of: what fails on one of those means nothing.
    pub epoch: u32,
    /// The guest is ours.
    pub owned: bool,
    /// It will never be.
    pub released: bool,
    /// The source knows that we have everything, and said how it went.
    pub farewell: Option<Progress>,
    pub recoveries: u32,
}

pub(super) struct Waiter {
    pub thread: u32,
    pub since: Instant,
}

impl Shared {
    /// Serves who touches missing pages.
    pub fn watch(&self) {
        let mut faults = Vec::new();
        loop {
            faults.clear();
            if let Err(source) = self.memory.faults(&mut faults) {
                return self.fail(Error::Machine { doing: "hear who waits for guest memory", source });
            }
            if faults.is_empty() {
                return;
            }
            for fault in &faults {
                let mut told = false;
                while let Err(error) = self.serve(*fault) {
                    if self.state().released {
                        break;
                    }
                    // There may be memory again in a moment, and nobody is to find what is not there.
                    if !std::mem::replace(&mut told, true) {
                        log::error!("cannot clear a page of guest memory: {error}");
                    }
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    fn serve(&self, Fault { block, offset, thread }: Fault) -> MachineResult<()> {
        let whole = self.whole_page(block, offset / PAGE_BYTES);
        let now = Instant::now();
        let mut state = self.state();
        let missing = state.missing.within(block, whole.clone());
        if missing.is_empty() {
            state.blocktime.zero_faults += 1;
            drop(state);
            // The source never had anything there, or it came just now.
            return self.show(block, &whole);
        }
        let State { waiting, blocktime, .. } = &mut *state;
        let waiters = waiting.entry((block, whole.start)).or_default();
        if thread != 0 && waiters.iter().any(|waiter| waiter.thread == thread) {
            // A signal has woken it, and it looks again, as often as it is woken.
            return Ok(());
        }
        blocktime.begins(now);
        waiters.push(Waiter { thread, since: now });
        let is_first = waiters.len() == 1;
        drop(state);
        if is_first {
            self.ask(block, missing);
        }
        Ok(())
    }

    /// The page of the machine's that a page is part of, which may be one of the same size.
    fn whole_page(&self, block: usize, page: u64) -> Range<u64> {
        let bytes = self.memory.whole_page(block, page.saturating_mul(PAGE_BYTES));
        bytes.start / PAGE_BYTES..bytes.end / PAGE_BYTES
    }

    /// Lets go on who waits for a page that lacks nothing: it is as it is, or of zeros.
    fn show(&self, block: usize, whole: &Range<u64>) -> MachineResult<()> {
        let (offset, length_bytes) = (whole.start * PAGE_BYTES, (whole.end - whole.start) * PAGE_BYTES);
        match length_bytes > PAGE_BYTES {
            true => self.memory.complete(block, offset, length_bytes),
            false => self.memory.place_zeros(block, offset, length_bytes),
        }
    }

    /// Asks again for all that is waited for: on a new link.
    pub fn ask_again(&self) {
        let waited_for = |state: &State| {
            let missing = |(block, page): &(usize, u64)| {
                (*block, state.missing.within(*block, self.whole_page(*block, *page)))
            };
            state.waiting.keys().map(missing).collect::<Vec<_>>()
        };
        let waited_for = waited_for(&self.state());
        waited_for.into_iter().for_each(|(block, missing)| self.ask(block, missing));
    }

    /// Asks the source for pages. If the link is lost, they are asked for again on the next.
    fn ask(&self, block: usize, runs: Vec<Range<u64>>) {
        let Some(theirs) = self.order.iter().position(|ours| *ours == block) else { return };
        let block = theirs as u16;
        let patience = self.patience.silence;
        let step = Step { doing: "asking for a page", patience, cancel: None, until: None };
        let send = |link: &mut Link| {
            let mut runs = runs.into_iter().flat_map(|run| self.requests_of(block, run));
            runs.try_for_each(|request| link.send(&request, step))
        };
        let sent = self.requests().as_mut().map(|(epoch, link)| (*epoch, send(link)));
        if let Some((epoch, Err(error))) = sent {
            self.lose(epoch, error);
        }
    }

    /// A run as the source understands it.
    fn requests_of(&self, block: u16, run: Range<u64>) -> impl Iterator<Item = Message> {
        let pages = if self.asks_for_runs { RUN_PAGES_MAX } else { 1 };
        run.clone().step_by(pages as usize).map(move |first_page| match (run.end - first_page).min(pages) {
            1 => Message::PageRequest(PageRequest { block, page: first_page }),
            count => Message::RunRequest(RunRequest { block, first_page, count: count as u16 }),
        })
    }

    /// Places what comes on a link until it ends.
    pub fn receive(&self, link: &mut Link, is_main: bool) -> Result<(), Error> {
        let doing = if is_main { "receiving the rest of guest memory" } else { "waiting for a page" };
        let silence = self.patience.silence;
        let step = Step { doing, patience: silence, cancel: None, until: None };
        let mut heard = Instant::now();
        loop {
            if !link.is_spoken_to(step)? {
                let since = if is_main { Some(heard) } else { self.waiting_since() };
                if since.is_some_and(|since| since.elapsed() >= silence) && !self.is_complete() {
                    return Err(Error::TimedOut { doing, waited: silence });
                }
                continue;
            }
            heard = Instant::now();
            match link.receive(step)? {
                Message::Pages => self.place(link.body(), doing)?,
                Message::Progress(progress) if is_main && self.is_complete() => {
                    self.state().farewell = Some(progress);
                    self.changed.notify_all();
                    return Ok(());
                }
                other => {
                    let reason = format!("the source sent {}", other.name());
                    return Err(Error::Protocol { doing, reason });
                }
            }
        }
    }

    fn place(&self, body: &[u8], doing: &'static str) -> Result<(), Error> {
        let wrong = |reason| Error::Protocol { doing, reason };
        let (pages, contents) = Pages::decode(body).map_err(wrong)?;
        let range = pages.range();
        let block = self.order.get(usize::from(pages.block)).copied();
        let block = block.ok_or_else(|| wrong(format!("pages of block number {}", pages.block)))?;
        let is_in_parts = self.memory.page_bytes(block) > PAGE_BYTES;
        let _one_at_a_time = is_in_parts.then(|| self.parts.lock().unwrap_or_else(PoisonError::into_inner));
        // What is there already came by the other link, and the guest may have written to it since.
        let missing = self.state().missing.within(block, range.clone());
        let placed = missing.iter().try_for_each(|run| {
            if pages.zeros {
                let length_bytes = (run.end - run.start) * PAGE_BYTES;
                return self.memory.place_zeros(block, run.start * PAGE_BYTES, length_bytes);
            }
            let bytes = |page: u64| ((page - range.start) * PAGE_BYTES) as usize;
            let contents = contents.get(bytes(run.start)..bytes(run.end)).unwrap_or_default();
            self.memory.place(block, run.start * PAGE_BYTES, contents)
        });
        let shown = placed.and_then(|()| {
            let wholes = if is_in_parts { self.wholes_of(block, &missing) } else { Vec::new() };
            wholes.into_iter().try_for_each(|whole| {
                self.show(block, &whole)?;
                // Before the next, which may fail: the guest writes to this one from now on, and it must never come again.
                self.note_placed(block, std::slice::from_ref(&whole), true);
                Ok(())
            })
        });
        match shown {
            // It came by the other link just now, and was the last.
            Err(_) if self.state().released => return Ok(()),
            shown => shown.map_err(Error::machine("place guest memory"))?,
        }
        self.note_placed(block, &missing, !is_in_parts);
        Ok(())
    }

    /// `runs` came, and whoever waits for any of their pages goes on if they are `seen`.
    fn note_placed(&self, block: usize, runs: &[Range<u64>], seen: bool) {
        let now = Instant::now();
        let mut state = self.state();
        let State { missing, waiting, blocktime, placed_bytes, .. } = &mut *state;
        for run in runs {
            *placed_bytes += missing.remove(block, run.clone()) * PAGE_BYTES;
        }
        for run in runs.iter().filter(|_| seen) {
            let mut served = waiting.split_off(&(block, run.start));
            waiting.append(&mut served.split_off(&(block, run.end)));
            for Waiter { thread, since } in served.into_values().flatten() {
                blocktime.ends(thread, since, now);
            }
        }
        if missing.count() == 0 {
            self.changed.notify_all();
        }
    }

    /// Larger pages that lack nothing but parts of `placed`, which is there.
    fn wholes_of(&self, block: usize, placed: &[Range<u64>]) -> Vec<Range<u64>> {
        let mut wholes: Vec<Range<u64>> = Vec::new();
        for run in placed {
            let mut page = run.start;
            while page < run.end {
                let whole = self.whole_page(block, page);
                page = whole.end;
                if wholes.last() != Some(&whole) {
                    wholes.push(whole);
                }
            }
        }
        let state = self.state();
        let is_placed = |missing: &Range<u64>| {
            placed.iter().any(|run| run.start <= missing.start && missing.end <= run.end)
        };
        wholes.retain(|whole| state.missing.within(block, whole.clone()).iter().all(is_placed));
        wholes
    }

    /// Nothing comes any more on the links of `epoch`, because of `error`.
    pub fn lose(&self, epoch: u32, error: Error) {
        let mut state = self.state();
        if epoch == state.epoch {
            state.lost.get_or_insert(error);
        }
        self.end_attempt(state);
    }

    /// Nobody who waits can be served any more, because of `error`: the end of the attempt, or of the guest.
    fn fail(&self, error: Error) {
        let mut state = self.state();
        log::error!("{}", error.chain());
        match state.owned {
            true => state.broken = Some(error),
            // That it broke is why the links are of no use.
            false => state.lost = Some(error),
        }
        self.end_attempt(state);
    }

    /// Something is lost: unless the guest is ours, nobody is to wait for it here.
    fn end_attempt(&self, mut state: MutexGuard<'_, State>) {
        let release = !state.owned && !state.released;
        if release {
            // The guest is the source's: who waits here is a check that fails next.
            state.released = true;
            if let Err(error) = self.memory.release() {
                log::error!("cannot end the watch over guest memory: {error}");
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    fn waiting_since(&self) -> Option<Instant> {
        self.state().waiting.values().flatten().map(|waiter| waiter.since).min()
    }

    fn is_complete(&self) -> bool {
        self.state().missing.count() == 0
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn requests(&self) -> MutexGuard<'_, Option<(u32, Link)>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
