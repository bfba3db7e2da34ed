//! Memory that comes out of a mapped file while its guest runs.
//!
//! Two threads bring it, a [chunk](CHUNK_BYTES) at a time, each chunk by one of them: the *server* those that somebody waits for, and
//! [`Fill::run`] all others in order. A chunk is compared with its digest before any of it is placed. Pages that are not in the file
//! are zeros, which cost nothing until they are touched.
//!
//! A chunk that cannot be had is the end: before the guest has run, of the restore; afterwards of the guest
//! ([`MissingPages::lost`]), which would otherwise go on with a memory that never was.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use stream::CHUNK_BYTES;

use super::memory::Memory;
use crate::machine::MissingPages;
use crate::{Error, PAGE_BYTES, Parameters, Statistics};

/// Nobody has brought it.
const MISSING: u8 = 0;
/// Somebody is about to.
const TAKEN: u8 = 1;
/// All of its pages are there.
const PLACED: u8 = 2;

/// The memory of a guest that runs before all of it is there.
///
/// Dropped before the guest [runs](Self::guest_runs) it ends, and memory that is missing is zeros. Dropped afterwards and before all
/// is there, it goes on to bring what is touched for as long as the process lives: a guest must not see zeros in the place of its memory.
#[derive(Debug)]
pub struct Fill {
    shared: Arc<Shared>,
    server: Option<JoinHandle<()>>,
}

struct Shared {
    memory: Memory,
    pages: Arc<dyn MissingPages>,
    /// For each block, and each of its chunks.
    chunks: Vec<Vec<AtomicU8>>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Debug)]
struct Progress {
    /// Chunks that are not placed.
    missing: u64,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// Devices may look at memory.
    Loading,
    /// So may the guest.
    Running,
    /// A chunk could not be had; why, until somebody was told.
    Failed(Option<Error>),
    /// Nothing is missing, or nobody wants it any more.
    Over,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("progress", &self.progress).finish_non_exhaustive()
    }
}

impl Fill {
    /// Brings pages of the blocks that `pages` [has](MissingPages::has) from now on, when they are touched.
    pub(super) fn begin(memory: Memory, pages: Arc<dyn MissingPages>) -> Result<Self, Error> {
        let (mut chunks, mut missing) = (Vec::new(), 0);
        for block in 0..memory.block_count() {
            let state = |held: bool| match held && pages.has(block) {
                true => {
                    missing += 1;
                    AtomicU8::new(MISSING)
                }
                false => AtomicU8::new(PLACED),
            };
            chunks.push(memory.held_chunks(block).into_iter().map(state).collect::<Vec<_>>());
        }
        let progress = Mutex::new(Progress { missing, phase: Phase::Loading });
        let shared = Arc::new(Shared { memory, pages, chunks, progress, changed: Condvar::new() });
        let server = thread::Builder::new().name("fill".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.serve()
        });
        let server = server.map_err(|source| Error::Machine {
            doing: "start the thread that brings guest memory",
            source: source.into(),
        })?;
        Ok(Self { shared, server: Some(server) })
    }

    /// The guest is about to run: from here on memory that cannot be had is its end.
    ///
    /// # Errors
    /// Some could not be had already.
    pub(super) fn guest_runs(&self) -> Result<(), Error> {
        let mut progress = self.shared.progress();
        match &mut progress.phase {
            Phase::Failed(error) => Err(error.take().unwrap_or(Error::Cancelled)),
            phase => {
                *phase = Phase::Running;
                Ok(())
            }
        }
    }

    /// The guest will not run after all.
    pub(super) fn give_up(&self) {
        self.shared.finish();
    }

    /// Bytes that are not there yet, in whole chunks.
    #[must_use]
    pub fn missing_bytes(&self) -> u64 {
        self.shared.progress().missing * CHUNK_BYTES
    }

    /// Brings all that is missing, and ends when all is there, or some cannot be had, or the end is wished. Returns whether all is
    /// there.
    pub fn run(&self, parameters: &Parameters, statistics: &Statistics) -> bool {
        let shared = &self.shared;
        let mut buffer = vec![0; CHUNK_BYTES as usize];
        for (block, states) in shared.chunks.iter().enumerate() {
            for chunk in 0..states.len() as u64 {
                if parameters.end_is_wished() || shared.has_failed() {
                    return false;
                }
                if shared.claim(block, chunk)
                    && let Err(error) = shared.place(block, chunk, &mut buffer)
                {
                    shared.fail(error);
                    return false;
                }
                let missing = self.missing_bytes();
                statistics.update(|s| s.remaining_bytes = missing);
            }
        }
        let goes_on =
            |progress: &mut Progress| progress.missing > 0 && matches!(progress.phase, Phase::Running);
        let progress = shared.changed.wait_while(shared.progress(), goes_on);
        let progress = progress.unwrap_or_else(PoisonError::into_inner);
        if progress.missing > 0 {
            return false;
        }
        drop(progress);
        shared.finish();
        true
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        let runs = matches!(self.shared.progress().phase, Phase::Running | Phase::Failed(None));
        if runs {
            return;
        }
        self.shared.finish();
        if let Some(server) = self.server.take() {
            // It ends with an error only if it panicked, which has been printed.
            let _ = server.join();
        }
    }
}

impl Shared {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_failed(&self) -> bool {
        matches!(self.progress().phase, Phase::Failed(_))
    }

    /// Until nothing is missing.
    fn serve(&self) {
        let mut buffer = vec![0; CHUNK_BYTES as usize];
        let mut faults = Vec::new();
        loop {
            faults.clear();
            let served = self.pages.faults(&mut faults).map_err(Error::machine("hear who waits for memory"));
            let served = served.and_then(|()| {
                faults.iter().try_for_each(|fault| self.answer(fault.block, fault.offset, &mut buffer))
            });
            if let Err(error) = served {
                return self.fail(error);
            }
            if faults.is_empty() {
                return;
            }
        }
    }

    /// Brings the page that somebody waits for.
    fn answer(&self, block: usize, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let failed = Error::machine("place guest memory");
        if self.pages.page_bytes(block) > PAGE_BYTES {
            let whole = self.pages.whole_page(block, offset);
            for chunk in chunks_of(&whole) {
                if self.claim(block, chunk) {
                    self.place(block, chunk, buffer)?;
                }
            }
            // Nothing of it may be in the file; or all came already, and it is looked at once more.
            return self.show(block, whole);
        }
        if !self.memory.has_page(block, offset) {
            return self.pages.place_zeros(block, offset, PAGE_BYTES).map_err(failed);
        }
        let chunk = offset / CHUNK_BYTES;
        if self.claim(block, chunk) {
            return self.place(block, chunk, buffer);
        }
        match self.has_placed(block, chunk) {
            // What is there stays, and who waits looks again; a page that was taken away since is one of zeros.
            true => self.pages.place_zeros(block, offset, PAGE_BYTES).map_err(failed),
            // Whoever has taken it places the page, and lets go on who waits.
            false => Ok(()),
        }
    }

    /// Lets go on who waits for a larger page, if all of it is there. Otherwise whoever brings the last of its chunks does so.
    fn show(&self, block: usize, whole: Range<u64>) -> Result<(), Error> {
        if !chunks_of(&whole).all(|chunk| self.has_placed(block, chunk)) {
            return Ok(());
        }
        let shown = self.pages.complete(block, whole.start, whole.end - whole.start);
        shown.map_err(Error::machine("place guest memory"))
    }

    /// How far a chunk is.
    fn state_of(&self, block: usize, chunk: u64) -> Option<&AtomicU8> {
        self.chunks.get(block)?.get(usize::try_from(chunk).ok()?)
    }

    /// Whether the chunk is ours to bring.
    fn claim(&self, block: usize, chunk: u64) -> bool {
        let taken = |state: &AtomicU8| {
            state.compare_exchange(MISSING, TAKEN, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        self.state_of(block, chunk).is_some_and(taken)
    }

    fn has_placed(&self, block: usize, chunk: u64) -> bool {
        self.state_of(block, chunk).is_some_and(|state| state.load(Ordering::SeqCst) == PLACED)
    }

    /// Brings a chunk that is ours.
    fn place(&self, block: usize, chunk: u64, buffer: &mut [u8]) -> Result<(), Error> {
        self.memory.bring(block, chunk, buffer, |offset, bytes| {
            self.pages.place(block, offset, bytes).map_err(Error::machine("place guest memory"))
        })?;
        if let Some(state) = self.state_of(block, chunk) {
            // Of two who bring the chunks of a larger page, at least one finds both placed.
            state.store(PLACED, Ordering::SeqCst);
        }
        if self.pages.page_bytes(block) > PAGE_BYTES {
            let mut offset = chunk * CHUNK_BYTES;
            while offset < (chunk + 1) * CHUNK_BYTES {
                let whole = self.pages.whole_page(block, offset);
                offset = whole.end;
                self.show(block, whole)?;
            }
        }
        let mut progress = self.progress();
        progress.missing -= 1;
        if progress.missing == 0 {
            self.changed.notify_all();
        }
        Ok(())
    }

    /// Some memory cannot be had. Whoever waits for it goes on only where nothing comes of it.
    fn fail(&self, error: Error) {
        let mut progress = self.progress();
        match progress.phase {
            Phase::Loading => {
                progress.phase = Phase::Failed(Some(error));
                drop(progress);
                self.release();
            }
            Phase::Running => {
                progress.phase = Phase::Failed(None);
                drop(progress);
                self.changed.notify_all();
                self.pages.lost(&error);
            }
            Phase::Failed(_) | Phase::Over => {}
        }
    }

    /// Nothing is missing, or nobody wants it.
    fn finish(&self) {
        let phase = std::mem::replace(&mut self.progress().phase, Phase::Over);
        if !matches!(phase, Phase::Over) {
            self.release();
        }
    }

    fn release(&self) {
        if let Err(error) = self.pages.release() {
            log::error!("guest memory cannot be let alone: {error}");
        }
    }
}

/// The chunks that bytes are in.
fn chunks_of(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / CHUNK_BYTES..bytes.end.div_ceil(CHUNK_BYTES)
}
