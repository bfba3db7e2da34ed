//! Where the requests of one worker are in flight.

use std::collections::VecDeque;

use bus::GuestMemory;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{Completion, Error, Failure};

/// Requests in flight of one worker, over all images that it serves.
///
/// The worker's loop: clear [`IoContext::event_fd`], take [`IoContext::completions`], queue requests with
/// [`crate::Backend::submit`], call [`IoContext::submit`], and take completions again before it sleeps: what was
/// complete on submission (memory, null, refused requests) does not make the event readable.
#[derive(Debug)]
pub struct IoContext {
    memory: GuestMemory,
    depth: u32,
    in_flight: u32,
    event: EventFd,
    ready: VecDeque<Completion>,
}

impl IoContext {
    /// Largest depth: what one io_uring can hold.
    pub const MAXIMUM_DEPTH: u32 = 32_768;

    /// A context for at most `depth` requests at a time, whose buffers lie in `memory`.
    ///
    /// # Errors
    /// A depth of zero or above [`IoContext::MAXIMUM_DEPTH`]; no eventfd could be made.
    pub fn new(memory: GuestMemory, depth: u32) -> Result<Self, Error> {
        if !(1..=Self::MAXIMUM_DEPTH).contains(&depth) {
            return Err(Error::Depth { depth, maximum: Self::MAXIMUM_DEPTH });
        }
        let event = EventFd::new(EFD_NONBLOCK)
            .map_err(|source| Error::System { what: "make an eventfd for I/O completions", source })?;
        Ok(Self { memory, depth, in_flight: 0, event, ready: VecDeque::with_capacity(depth as usize) })
    }

    /// The guest memory that buffers refer to.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// How many requests may be in flight.
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

    /// Hands queued work to the kernel: one system call, none if nothing is queued.
    ///
    /// # Errors
    /// The kernel refused the queue as a whole. Requests stay queued and in flight.
    pub fn submit(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Appends the requests that ended to `completions`, in the order in which they ended. Makes no system call unless
    /// a transfer that came back short must go on.
    pub fn completions(&mut self, completions: &mut Vec<Completion>) {
        self.in_flight -= self.ready.len() as u32;
        completions.extend(self.ready.drain(..));
    }

    /// For backends: the request that is being submitted ends here and now.
    pub fn complete(&mut self, token: u64, result: Result<(), Failure>) {
        self.in_flight += 1;
        self.ready.push_back(Completion { token, result });
    }
}
