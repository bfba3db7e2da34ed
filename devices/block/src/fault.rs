//! An image that misbehaves when a test tells it to.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bus::{GuestMemory, GuestRange};
use vmm_sys_util::eventfd::EventFd;
use vmstate::Migratability;

use crate::transfer::Distortion;
use crate::{Backend, Buffers, DirtyBlocks, Error, Failure, Identity, IoContext, Operation, Request};

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails; nothing is read or written.
    Fail(Failure),
    /// It waits until [`FaultControl::release_held`], and is carried out then.
    Hold,
    /// It is carried out, but its completion never comes.
    Lose,
    /// The first system call moves about this many bytes only. No effect on images without system calls.
    Short {
        /// How many.
        bytes: u64,
    },
}

/// Which requests a fault is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// All.
    Any,
    /// Reads, compares, verifies.
    Read,
    /// Writes, zeroes, discards, copies.
    Write,
    /// Flushes.
    Flush,
}

impl Target {
    fn matches(self, operation: Operation) -> bool {
        match self {
            Self::Any => true,
            Self::Read => !operation.writes() && operation != Operation::Flush,
            Self::Flush => operation == Operation::Flush,
            Self::Write => operation.writes(),
        }
    }
}

#[derive(Debug)]
struct Rule {
    target: Target,
    skip: u64,
    count: u64,
    fault: Fault,
}

/// Opens once; whoever waits behind it is woken.
#[derive(Debug, Default)]
struct Gate {
    open: AtomicBool,
    waiting: AtomicU64,
    events: Mutex<Vec<EventFd>>,
}

#[derive(Debug, Default)]
struct Plan {
    rules: VecDeque<Rule>,
    gate: Arc<Gate>,
}

/// The test's side of a [`FaultImage`]. Faults are counted in requests, never in time.
#[derive(Debug, Default)]
pub struct FaultControl {
    plan: Mutex<Plan>,
    seen: AtomicU64,
}

impl FaultControl {
    /// After `skip` more requests that match `target`, the next `count` meet `fault`. When several rules match a request
    /// the oldest one counts it.
    pub fn inject(&self, target: Target, skip: u64, count: u64, fault: Fault) {
        self.plan().rules.push_back(Rule { target, skip, count, fault });
    }

    /// Forgets all rules; what is held stays held.
    pub fn clear(&self) {
        self.plan().rules.clear();
    }

    /// Requests that the image was given so far.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Acquire)
    }

    /// Requests that are held.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.plan().gate.waiting.load(Ordering::Acquire)
    }

    /// Lets everything go that is held now, and wakes the contexts that hold it.
    pub fn release_held(&self) {
        let gate = std::mem::take(&mut self.plan().gate);
        gate.open.store(true, Ordering::Release);
        for event in gate.events.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = event.write(1);
        }
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fault that the next request meets, and the gate it would wait at.
    fn next(&self, operation: Operation) -> (Option<Fault>, Arc<Gate>) {
        let mut plan = self.plan();
        let mut fault = None;
        if let Some(index) = plan.rules.iter().position(|rule| rule.target.matches(operation)) {
            let rule = &mut plan.rules[index];
            if rule.skip > 0 {
                rule.skip -= 1;
            } else {
                fault = (rule.count > 0).then_some(rule.fault);
                rule.count = rule.count.saturating_sub(1);
                if rule.count == 0 {
                    plan.rules.remove(index);
                }
            }
        }
        if fault == Some(Fault::Hold) {
            plan.gate.waiting.fetch_add(1, Ordering::AcqRel);
        }
        self.seen.fetch_add(1, Ordering::AcqRel);
        (fault, Arc::clone(&plan.gate))
    }
}

/// Passes requests to another image, except for those that its [`FaultControl`] names.
#[derive(Debug)]
pub struct FaultImage {
    inner: Arc<dyn Backend>,
    control: Arc<FaultControl>,
}

impl FaultImage {
    /// Puts `control` before `inner`.
    #[must_use]
    pub fn new(inner: Arc<dyn Backend>, control: Arc<FaultControl>) -> Self {
        Self { inner, control }
    }

    fn submit_distorted(&self, context: &mut IoContext, request: &Request<'_>, distortion: Distortion) {
        context.distort(distortion);
        self.inner.submit(context, request);
        context.distort(Distortion::default());
    }
}

impl Backend for FaultImage {
    fn identity(&self) -> Identity {
        self.inner.identity()
    }

    fn migratability(&self) -> Migratability {
        Migratability::NonMigratable("its faults come from a test in this process")
    }

    fn submit(&self, context: &mut IoContext, request: &Request<'_>) {
        let (fault, gate) = self.control.next(request.operation);
        match fault {
            None => self.inner.submit(context, request),
            Some(Fault::Fail(failure)) => context.complete(request.token, Err(failure)),
            Some(Fault::Hold) => {
                if let Ok(event) = context.event_fd().try_clone() {
                    gate.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
                }
                let parked = Parked::new(Arc::clone(&self.inner), request, gate);
                context.park(parked);
            }
            Some(Fault::Lose) => {
                self.submit_distorted(context, request, Distortion { lost: true, ..Distortion::default() });
            }
            Some(Fault::Short { bytes }) => {
                let distortion = Distortion { first_bytes: Some(bytes), ..Distortion::default() };
                self.submit_distorted(context, request, distortion);
            }
        }
    }

    fn sync(&self) -> Result<(), Error> {
        self.inner.sync()
    }

    fn release(&self) -> Result<(), Error> {
        self.inner.release()
    }

    fn acquire(&self) -> Result<(), Error> {
        self.inner.acquire()
    }

    fn dirty_blocks(&self) -> Option<&DirtyBlocks> {
        self.inner.dirty_blocks()
    }

    fn next_data(&self, offset_bytes: u64) -> Result<Option<Range<u64>>, Error> {
        self.inner.next_data(offset_bytes)
    }

    fn grow(&self, capacity_bytes: Option<u64>) -> Result<u64, Error> {
        self.inner.grow(capacity_bytes)
    }
}

/// A request that waits at a gate.
#[derive(Debug)]
pub(crate) struct Parked {
    image: Arc<dyn Backend>,
    gate: Arc<Gate>,
    token: u64,
    operation: Operation,
    offset_bytes: u64,
    length_bytes: u64,
    ranges: Vec<GuestRange>,
    private: Option<Arc<GuestMemory>>,
}

impl Parked {
    fn new(image: Arc<dyn Backend>, request: &Request<'_>, gate: Arc<Gate>) -> Self {
        Self {
            image,
            gate,
            token: request.token,
            operation: request.operation,
            offset_bytes: request.offset_bytes,
            length_bytes: request.length_bytes,
            ranges: request.buffers.ranges().to_vec(),
            private: request.buffers.private().cloned(),
        }
    }

    /// Whether it may go.
    pub(crate) fn is_open(&self) -> bool {
        self.gate.open.load(Ordering::Acquire)
    }

    /// Carries the request out.
    pub(crate) fn submit(self, context: &mut IoContext) {
        let request = Request {
            token: self.token,
            operation: self.operation,
            offset_bytes: self.offset_bytes,
            length_bytes: self.length_bytes,
            buffers: match &self.private {
                Some(memory) => Buffers::Private(memory, &self.ranges),
                None => Buffers::Guest(&self.ranges),
            },
        };
        self.image.submit(context, &request);
    }
}
