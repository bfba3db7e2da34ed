//! Where the requests of one worker are in flight.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use bus::GuestMemory;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::blocking::{Mailbox, Ticket};
use crate::fault::Parked;
use crate::file::OpenFile;
use crate::pool::Pool;
use crate::transfer::Distortion;
use crate::uring::Ring;
use crate::{Completion, Error, Failure, KernelCounters, Request};

/// Requests in flight of one worker, over all images that it serves.
///
/// The worker's loop: clear [`IoContext::event_fd`], take [`IoContext::completions`], queue requests with
/// [`crate::Backend::submit`], call [`IoContext::submit`], and take completions again before it sleeps: what was
/// complete on submission (memory, null, refused requests) does not make the event readable.
///
/// Dropping a context carries out what was queued and waits for it; completions that were not taken are gone.
#[derive(Debug)]
pub struct IoContext {
    engine: Engine,
    memory: GuestMemory,
    depth: u32,
    in_flight: u32,
    event: EventFd,
    /// Completions of the ring make the event readable.
    event_enabled: bool,
    ready: VecDeque<Completion>,
    parked: Vec<Parked>,
    /// For images that have threads of their own; made when one is used.
    mailbox: Option<Arc<Mailbox>>,
    counters: Arc<KernelCounters>,
    distortion: Distortion,
}

#[derive(Debug)]
enum Engine {
    Ring(Box<Ring>),
    Pool(Pool),
}

impl IoContext {
    /// Largest depth: what one io_uring can hold.
    pub const MAXIMUM_DEPTH: u32 = 32_768;

    /// A context for at most `depth` requests at a time, whose buffers lie in `memory`. Where io_uring is not to be
    /// had, it works with threads, and a warning is logged.
    ///
    /// # Errors
    /// A depth of zero or above [`IoContext::MAXIMUM_DEPTH`]; neither a ring nor threads could be had.
    pub fn new(memory: GuestMemory, depth: u32) -> Result<Self, Error> {
        let event = Self::prepare(depth)?;
        let counters = Arc::<KernelCounters>::default();
        match Ring::new(memory.clone(), depth, &event, Arc::clone(&counters)) {
            Ok(ring) => Ok(Self::assemble(Engine::Ring(Box::new(ring)), memory, depth, event, counters)),
            // No such system call, switched off or filtered, or without an operation (kernels before 5.6).
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES)) => {
                log::warn!("io_uring is not available ({error}): block I/O uses threads");
                Self::with_threads(memory, depth)
            }
            Err(source) => Err(Error::System { what: "set up io_uring", source }),
        }
    }

    /// A context that does not use io_uring.
    ///
    /// # Errors
    /// As [`IoContext::new`].
    pub fn with_threads(memory: GuestMemory, depth: u32) -> Result<Self, Error> {
        let event = Self::prepare(depth)?;
        let pool = Pool::new(memory.clone(), depth, &event)
            .map_err(|source| Error::System { what: "start threads for block I/O", source })?;
        Ok(Self::assemble(Engine::Pool(pool), memory, depth, event, Arc::default()))
    }

    fn prepare(depth: u32) -> Result<EventFd, Error> {
        if !(1..=Self::MAXIMUM_DEPTH).contains(&depth) {
            return Err(Error::Depth { depth, maximum: Self::MAXIMUM_DEPTH });
        }
        EventFd::new(EFD_NONBLOCK)
            .map_err(|source| Error::System { what: "make an eventfd for I/O completions", source })
    }

    fn assemble(
        engine: Engine,
        memory: GuestMemory,
        depth: u32,
        event: EventFd,
        counters: Arc<KernelCounters>,
    ) -> Self {
        Self {
            engine,
            memory,
            depth,
            in_flight: 0,
            event,
            event_enabled: true,
            ready: VecDeque::with_capacity(depth as usize),
            parked: Vec::new(),
            mailbox: None,
            counters,
            distortion: Distortion::default(),
        }
    }

    /// The guest memory that buffers refer to.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// How many requests may be in flight. One more fails with EAGAIN.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// Requests submitted whose completions were not taken yet.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Becomes readable when completions arrive after [`IoContext::submit`]; the worker clears it with `read`.
    /// Spurious wake-ups happen.
    #[must_use]
    pub fn event_fd(&self) -> &EventFd {
        &self.event
    }

    /// What it has asked of io_uring so far, for whoever watches; nothing where it works with threads.
    #[must_use]
    pub fn kernel_counters(&self) -> &Arc<KernelCounters> {
        &self.counters
    }

    /// Hands queued work to the kernel and has it tell of ends that wait for that: one system call, none if there is neither. When the
    /// kernel is short of memory the rest stays queued and the event becomes readable, so that the worker comes back.
    ///
    /// # Errors
    /// The kernel refused the queue as a whole; nothing in it will complete.
    pub fn submit(&mut self) -> Result<(), Error> {
        let Engine::Ring(ring) = &mut self.engine else {
            if let Engine::Pool(pool) = &mut self.engine {
                pool.enter();
            }
            return Ok(());
        };
        match ring.enter() {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.wake();
                Ok(())
            }
            Err(source) => Err(Error::System { what: "submit block requests to io_uring", source }),
        }
    }

    /// Appends the requests that ended to `completions`. Makes no system call unless a transfer that came back short
    /// must go on.
    pub fn completions(&mut self, completions: &mut Vec<Completion>) {
        if !self.parked.is_empty() {
            self.resume_parked();
        }
        let before = completions.len();
        completions.extend(self.ready.drain(..));
        if let Some(mailbox) = &self.mailbox {
            mailbox.take(completions);
        }
        match &mut self.engine {
            Engine::Pool(pool) => pool.reap(completions),
            Engine::Ring(ring) => {
                ring.reap(completions);
                // On failure `submit` says why; make sure that it is called.
                if ring.has_queued() && ring.enter().is_err() {
                    self.wake();
                }
            }
        }
        self.in_flight -= (completions.len() - before) as u32;
    }

    /// For a worker that looks at [`IoContext::completions`] all the time: the event need not become readable, which costs the kernel time
    /// for each completion. It still may.
    pub fn disable_event(&mut self) {
        if self.event_enabled
            && let Engine::Ring(ring) = &mut self.engine
        {
            ring.set_event(false);
            self.event_enabled = false;
        }
    }

    /// Undoes [`IoContext::disable_event`]. `true`: there are completions that the event may not tell of; the worker takes them before it
    /// sleeps.
    pub fn enable_event(&mut self) -> bool {
        let Engine::Ring(ring) = &mut self.engine else { return false };
        if std::mem::replace(&mut self.event_enabled, true) {
            return false;
        }
        ring.set_event(true);
        // Against the kernel, which adds a completion and then looks at the flag.
        fence(Ordering::SeqCst);
        ring.has_completions()
    }

    /// Notes from now on what the ring asks the kernel for.
    #[cfg(test)]
    pub(crate) fn record(&mut self) -> crate::uring::journal::Journal {
        let journal = crate::uring::journal::Journal::default();
        if let Engine::Ring(ring) = &mut self.engine {
            ring.record(journal.clone());
        }
        journal
    }

    /// Whether it works with io_uring.
    #[cfg(test)]
    pub(crate) fn has_ring(&self) -> bool {
        matches!(self.engine, Engine::Ring(_))
    }

    /// Files that the ring has registered; none without a ring.
    #[cfg(test)]
    pub(crate) fn registered_files(&self) -> usize {
        match &self.engine {
            Engine::Ring(ring) => ring.registered_files(),
            Engine::Pool(_) => 0,
        }
    }

    /// For backends: the request that is being submitted ends here and now.
    pub fn complete(&mut self, token: u64, result: Result<(), Failure>) {
        self.in_flight += 1;
        if !self.distortion.lost {
            self.ready.push_back(Completion { token, result });
        }
    }

    /// The request that is being submitted ends with the ticket, on another thread.
    pub(crate) fn defer(&mut self, token: u64) -> io::Result<Ticket> {
        let mailbox = match &self.mailbox {
            Some(mailbox) => mailbox,
            None => self.mailbox.insert(Mailbox::new(&self.event)?),
        };
        self.in_flight += 1;
        Ok(mailbox.ticket(token, self.distortion.lost))
    }

    /// Queues a checked request on a file.
    pub(crate) fn start(&mut self, file: Arc<OpenFile>, request: &Request<'_>) -> Result<(), Failure> {
        match &mut self.engine {
            Engine::Ring(ring) => ring.start(file, request, self.distortion)?,
            Engine::Pool(pool) => pool.start(file, request, self.distortion)?,
        }
        self.in_flight += 1;
        Ok(())
    }

    /// Bends every request until this is called again.
    pub(crate) fn distort(&mut self, distortion: Distortion) {
        self.distortion = distortion;
    }

    /// Keeps a request back until its gate opens.
    pub(crate) fn park(&mut self, parked: Parked) {
        self.in_flight += 1;
        self.parked.push(parked);
    }

    fn resume_parked(&mut self) {
        let (open, parked): (Vec<_>, _) =
            std::mem::take(&mut self.parked).into_iter().partition(Parked::is_open);
        self.parked = parked;
        for parked in open {
            self.in_flight -= 1;
            parked.submit(self);
        }
        if self.submit().is_err() {
            self.wake();
        }
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the event is readable anyway.
        let _ = self.event.write(1);
    }
}

impl Drop for IoContext {
    fn drop(&mut self) {
        if let Some(mailbox) = &self.mailbox {
            mailbox.settle();
        }
    }
}
