//! What the controller does to its namespaces in the background: self-tests, formats, sanitize operations.
//!
//! ```text
//! admin command -> Operation with a Sweep -> maintain: one request of at most CHUNK_BYTES on worker 0
//!                                                ^                                   |
//!                                                '-- advance <-- finish_job <--------'
//! ```
//! One request of an operation is in flight at a time, and between two of them worker 0 serves its queues, so that no operation keeps
//! commands waiting. Progress is what has been done, never time. Nothing is begun while the controller is not ready or paused; a
//! request that a reset drops is made again. So an operation goes on over resets, and between two requests all of it is in a few
//! numbers, which are saved.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_spec::{NSID_BROADCAST, Status};

use crate::admin::{Admin, Job, Phase, Pool};
use crate::namespace::{self, Namespace, NamespaceTable};
use crate::worker::{Owner, Step, Worker};

/// Bytes of one request: a memory image is done with it in about a millisecond.
pub(crate) const CHUNK_BYTES: u64 = 4 << 20;

/// A run over the bytes of one namespace, or of all, in the order of their identifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sweep {
    /// The namespace, or all with the broadcast identifier.
    pub scope: u32,
    /// The namespace that has its turn, or the first one after it if it is gone.
    pub nsid: u32,
    /// What is done of it.
    pub offset_bytes: u64,
}

/// The operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Format,
    Sanitize,
    SelfTest,
}

/// The next request of a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub nsid: u32,
    pub offset_bytes: u64,
    pub length_bytes: u64,
    /// Where the one after it begins.
    pub next_bytes: u64,
    /// Nothing of the namespace is left after it.
    pub is_last: bool,
}

impl Sweep {
    pub fn new(scope: u32) -> Self {
        Self { scope, nsid: if scope == NSID_BROADCAST { 1 } else { scope }, offset_bytes: 0 }
    }

    /// Whether the namespace belongs to it.
    pub fn covers(&self, nsid: u32) -> bool {
        self.scope == NSID_BROADCAST || self.scope == nsid
    }

    /// Whether a namespace could belong to both.
    pub fn meets(&self, other: &Self) -> bool {
        self.scope != 0 && other.scope != 0 && (self.covers(other.scope) || other.covers(self.scope))
    }

    /// The namespaces that it is about, in order.
    fn namespaces<'a>(&self, table: &'a NamespaceTable) -> impl Iterator<Item = &'a Arc<Namespace>> {
        let sweep = *self;
        namespace::active(table).filter(move |namespace| sweep.covers(namespace.nsid))
    }

    /// What is to be done next; `None`: it is through. Requests have at most `most_bytes` and are `stride` apart, which is at least as
    /// much and depends on the size of the namespace.
    pub fn next(
        &self,
        table: &NamespaceTable,
        most_bytes: u64,
        stride: impl Fn(u128) -> u64,
    ) -> Option<Chunk> {
        let namespace = self.namespaces(table).find(|namespace| namespace.nsid >= self.nsid)?;
        let offset_bytes = if namespace.nsid == self.nsid { self.offset_bytes } else { 0 };
        let size_bytes = namespace.size_bytes();
        let left_bytes = size_bytes.saturating_sub(offset_bytes.into());
        let length_bytes = left_bytes.min(most_bytes.into()) as u64;
        let next_bytes = offset_bytes.saturating_add(stride(size_bytes));
        let is_last = u128::from(next_bytes) >= size_bytes;
        Some(Chunk { nsid: namespace.nsid, offset_bytes, length_bytes, next_bytes, is_last })
    }

    /// The same without gaps.
    pub fn next_chunk(&self, table: &NamespaceTable) -> Option<Chunk> {
        self.next(table, CHUNK_BYTES, |_| CHUNK_BYTES)
    }

    /// `chunk` has been done.
    pub fn advance(&mut self, chunk: &Chunk) {
        (self.nsid, self.offset_bytes) = match chunk.is_last {
            true => (chunk.nsid + 1, 0),
            false => (chunk.nsid, chunk.next_bytes),
        };
    }

    /// How many parts of `whole` are done, rounded down.
    pub fn progress(&self, table: &NamespaceTable, whole: u64) -> u64 {
        let (mut done_bytes, mut all_bytes) = (0, 0);
        for namespace in self.namespaces(table) {
            let size_bytes = namespace.size_bytes();
            all_bytes += size_bytes;
            done_bytes += match namespace.nsid.cmp(&self.nsid) {
                std::cmp::Ordering::Less => size_bytes,
                std::cmp::Ordering::Equal => u128::from(self.offset_bytes).min(size_bytes),
                std::cmp::Ordering::Greater => 0,
            };
        }
        (done_bytes * u128::from(whole)).checked_div(all_bytes).unwrap_or(0) as u64
    }
}

/// What an operation needs now.
pub(crate) enum Next {
    /// Nothing: there is none.
    Nothing,
    /// That this request, and those after it, are made; last first.
    Request { chunk: Chunk, steps: Vec<Step>, write: bool },
    /// That what is in flight in its namespaces has ended.
    Quiet(Sweep),
    /// It is through: that its end is told.
    End,
}

impl Admin {
    /// Lets every operation make its next request. `true`: another pass is needed now.
    pub fn maintain(&mut self, pool: &Pool) -> bool {
        self.waits_for_slot = false;
        if self.phase != Phase::Ready || pool.shared.is_paused() {
            return false;
        }
        let mut more = false;
        let mut waits_for_quiet = false;
        for kind in [Kind::Format, Kind::Sanitize, Kind::SelfTest] {
            let is_running = |&(_, job): &(u32, Job)| matches!(job, Job::Operation { kind: running, .. } if running == kind);
            if self.jobs.iter().any(is_running) {
                continue;
            }
            let next = match kind {
                Kind::Format => self.next_of_format(),
                Kind::Sanitize => self.next_of_sanitize(pool.shared.controller_id),
                Kind::SelfTest => self.next_of_self_test(),
            };
            match next {
                Next::Nothing => {}
                Next::Request { chunk, steps, write } => {
                    more |= self.start_request(pool, kind, chunk, steps, write);
                }
                Next::Quiet(sweep) => {
                    // Set before the workers are looked at: one that ends a command later sees it.
                    pool.shared.tells_of_ends.store(true, Ordering::SeqCst);
                    // Another controller that has followed refuses commands too, and wakes this one.
                    if is_quiet(pool, &sweep) && self.following.is_followed(&pool.shared.subsystem) {
                        self.found_quiet(pool, kind);
                        more = true;
                    } else {
                        waits_for_quiet = true;
                    }
                }
                Next::End => {
                    self.end_operation(pool, kind, Status::SUCCESS);
                    more = true;
                }
            }
        }
        // Looked at first: workers read the line that it is in.
        if !waits_for_quiet && pool.shared.tells_of_ends.load(Ordering::Relaxed) {
            pool.shared.tells_of_ends.store(false, Ordering::SeqCst);
        }
        more
    }

    /// `true`: it ended at once.
    fn start_request(
        &mut self,
        pool: &Pool,
        kind: Kind,
        chunk: Chunk,
        steps: Vec<Step>,
        write: bool,
    ) -> bool {
        let token = self.take_token();
        let mut worker = pool.worker(0);
        match worker.start_own(token, chunk.nsid, steps, write) {
            Some(true) => {
                self.jobs.push((token, Job::Operation { kind, chunk }));
                false
            }
            Some(false) => {
                drop(worker);
                self.finish_request(pool, kind, &chunk, Status::SUCCESS);
                true
            }
            None => {
                self.waits_for_slot = true;
                false
            }
        }
    }

    /// A request of an operation has ended: on to the next one, or to the end.
    pub fn finish_request(&mut self, pool: &Pool, kind: Kind, chunk: &Chunk, status: Status) {
        match kind {
            Kind::SelfTest => self.advance_self_test(chunk, status),
            _ if !status.is_success() => self.end_operation(pool, kind, status),
            Kind::Format => self.advance_format(pool, chunk),
            Kind::Sanitize => self.advance_sanitize(chunk),
        }
        if kind == Kind::Sanitize {
            // Not before: who went on from what is not noted yet would make the request again, and the last one of a pass would count
            // as two passes.
            self.common.give_up(pool.shared.controller_id);
            if self.phase != Phase::Ready || pool.shared.is_paused() {
                pool.shared.subsystem.wake_all();
            }
        }
    }

    fn end_operation(&mut self, pool: &Pool, kind: Kind, status: Status) {
        match kind {
            Kind::Format => self.end_format(pool, status),
            Kind::Sanitize => self.end_sanitize(pool, status),
            Kind::SelfTest => self.complete_self_test(),
        }
    }

    fn found_quiet(&mut self, pool: &Pool, kind: Kind) {
        match kind {
            Kind::Format => self.format.iter_mut().for_each(|format| format.quiet = true),
            Kind::Sanitize => self.begin_sanitizing(pool),
            // It only reads.
            Kind::SelfTest => {}
        }
    }
}

/// Whether no command to the namespaces of `sweep` is in flight. They refuse new ones.
fn is_quiet(pool: &Pool, sweep: &Sweep) -> bool {
    (0..pool.workers.len()).all(|index| {
        let worker = pool.worker(index);
        let concerned = |nsid| sweep.covers(nsid) || nsid == NSID_BROADCAST;
        !worker.slots.iter().any(|slot| matches!(slot.owner, Owner::Queue(_)) && concerned(slot.nsid))
    })
}

impl Worker {
    /// Makes requests that no queue asked for, last first; their end goes into `admin_ended`. `None`: no slot is free; `false`: there
    /// was nothing to do.
    pub fn start_own(&mut self, token: u32, nsid: u32, steps: Vec<Step>, write: bool) -> Option<bool> {
        let slot = self.take_slot(Owner::Admin(token), 0, nsid)?;
        self.slots[slot as usize].write = write;
        self.slots[slot as usize].steps.extend(steps);
        let started = self.next_step(slot);
        if !started {
            self.give_back(slot);
        }
        Some(started)
    }
}
