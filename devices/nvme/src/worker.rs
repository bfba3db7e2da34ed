//! One worker: some completion queues, the submission queues that use them, and what they have in flight.
//!
//! ```text
//! fetch -> io::start -> Backend::submit ... IoContext::completions -> finish -> CompletionQueue::backlog -> post -> interrupt
//! ```
//!
//! Nothing on this way allocates, locks or makes a system call per command, once the buffers have grown.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use block::{Buffers, Completion, Failure, IoContext, Operation, Request};
use bus::GuestRange;
use nvme_spec::event::Event;
use nvme_spec::log::ErrorEntry;
use nvme_spec::{NSID_BROADCAST, Status};

use crate::command::fused::{Admission, Pair};
use crate::data::DataWalker;
use crate::doorbell::MemoryGone;
use crate::exclusion::View;
use crate::metadata::{Jobs, NO_JOB};
use crate::namespace::{self, NamespaceTable};
use crate::preempt::Preemptions;
use crate::queue::{CompletionQueue, Ended, SubmissionQueue};
use crate::shared::Shared;
use crate::slot::is_cached;
pub(crate) use crate::slot::{Owner, Slot, Step, flush_step};
use crate::smart::{self, Counters};
use crate::uncorrectable::keep_healed;
use crate::wakeup::{self, ask_for_tail};

/// See the module's text.
pub(crate) struct Worker {
    pub index: usize,
    pub context: IoContext,
    /// By identifier divided by the number of workers.
    pub cqs: Vec<Option<CompletionQueue>>,
    /// In any order; an index is reused only after its queue was deleted.
    pub sqs: Vec<Option<SubmissionQueue>>,
    /// Indexes into `sqs` by identifier.
    pub sq_places: BTreeMap<u16, u32>,
    /// Indexes into `sqs` that are free.
    pub free_sqs: Vec<u32>,
    pub namespaces: NamespaceTable,
    /// Those that operations of the controller go to, which may not be attached. Of worker 0 alone.
    pub allocated: NamespaceTable,
    pub walker: DataWalker,
    pub counters: Counters,
    /// Admin tokens of what ended, for worker 0.
    pub admin_ended: Vec<(u32, Status)>,
    pub preemptions: Preemptions,
    /// Commands to blocks with metadata.
    pub jobs: Option<Box<Jobs>>,
    pub slots: Vec<Slot>,
    free: Vec<u32>,
    /// Indexes into `cqs` that have something to post.
    listed: Vec<u32>,
    /// Indexes into `cqs` whose interrupts are delayed.
    pub delayed: Vec<u32>,
    /// Whose turn it is, by priority class; the first without classes.
    pub turns: [usize; 4],
    pub ranges: Vec<GuestRange>,
    pub scratch: Vec<u8>,
    /// The fused pair that is carried out.
    pub pair: Option<Pair>,
    /// What is known of claimed ranges.
    pub claims: View,
    completions: Vec<Completion>,
    /// Something was fetched or reaped in this pass.
    busy: bool,
    /// Namespaces of whose failures the log has spoken.
    pub failures_told: Vec<u32>,
}

impl Worker {
    pub fn new(index: usize, context: IoContext, namespaces: NamespaceTable) -> Self {
        let depth = context.depth();
        Self {
            index,
            context,
            cqs: Vec::new(),
            sqs: Vec::new(),
            sq_places: BTreeMap::new(),
            free_sqs: Vec::new(),
            namespaces,
            allocated: NamespaceTable::default(),
            walker: DataWalker::new(u64::from(crate::config::MIN_PAGE_BYTES)),
            counters: Counters::default(),
            admin_ended: Vec::new(),
            preemptions: Preemptions::default(),
            jobs: None,
            slots: (0..depth).map(|_| Slot::free()).collect(),
            free: (0..depth).rev().collect(),
            listed: Vec::new(),
            delayed: Vec::new(),
            turns: [0; 4],
            ranges: Vec::new(),
            scratch: Vec::new(),
            pair: None,
            claims: View::default(),
            completions: Vec::with_capacity(depth as usize),
            busy: false,
            failures_told: Vec::new(),
        }
    }

    /// One pass: reap, fetch and start, submit, reap, post. `true`: there is more to do now, nobody will wake us for it. Otherwise the
    /// guest has been asked to ring, and the worker may sleep.
    pub fn process(&mut self, shared: &Shared) -> bool {
        let passed = self
            .pass(shared)
            .and_then(|more| if !more && shared.may_fetch() { self.arm(shared) } else { Ok(more) });
        let missed = self.context.enable_event();
        passed.map(|more| more | missed).unwrap_or_else(|gone| {
            shared.fail("an I/O queue or a shadow doorbell", &gone);
            false
        })
    }

    /// The same for a worker that does not sleep and looks again soon: the guest is kept from ringing. `true`: something was done.
    pub fn poll(&mut self, shared: &Shared) -> bool {
        self.busy = false;
        self.context.disable_event();
        let passed = self.pass(shared).and_then(|more| self.quieten(shared).map(|()| more));
        passed.unwrap_or_else(|gone| {
            shared.fail("an I/O queue or a shadow doorbell", &gone);
            false
        }) || self.busy
    }

    fn pass(&mut self, shared: &Shared) -> Result<bool, MemoryGone> {
        self.reap(shared);
        self.post(shared)?;
        self.look_at_claims(shared);
        let mut more = false;
        if shared.may_fetch() {
            more = self.fetch(shared)?;
        }
        if let Err(error) = self.context.submit() {
            log::error!("NVMe controller {:?}, worker {}: {error}", shared.config.serial, self.index);
            shared.stop();
        }
        // Requests that were made meanwhile (the next steps of their commands) are submitted in the next pass.
        more |= self.reap(shared);
        more |= self.look_at_jobs(shared);
        more |= self.look_at_preemptions(shared);
        more |= self.look_at_claims(shared);
        self.post(shared)?;
        self.finish_interrupts(shared)?;
        let lane = &shared.lanes[self.index];
        let in_flight = self.in_flight();
        // Nobody else writes it while this lock is held, and most passes of a busy worker end as they began.
        let before = lane.in_flight.load(Ordering::Relaxed);
        if before != in_flight {
            lane.in_flight.store(in_flight, Ordering::SeqCst);
        }
        // A reset or shutdown waits for the last end, and whoever changes namespaces for every one.
        let is_waited_for = || {
            in_flight == 0 && !shared.active.load(Ordering::SeqCst)
                || shared.tells_of_ends.load(Ordering::SeqCst)
        };
        if before != in_flight && is_waited_for() {
            shared.host.wake(0);
        }
        Ok(more)
    }

    /// Commands in flight.
    pub fn in_flight(&self) -> u32 {
        (self.slots.len() - self.free.len()) as u32
    }

    /// Whether another command could be started.
    pub fn has_free_slot(&self) -> bool {
        !self.free.is_empty()
    }

    /// Fetches and starts up to `burst` commands of one queue. `true`: it has entries left that could be fetched.
    pub fn fetch_burst(&mut self, shared: &Shared, index: usize, burst: u32) -> Result<bool, MemoryGone> {
        self.refresh_tail(shared, index)?;
        for _ in 0..burst {
            // Looked at for each command: a backend that carries it out at once can take its time.
            if !shared.may_fetch() {
                return Ok(false);
            }
            let Some(queue) = self.sqs[index].as_mut() else { return Ok(false) };
            if queue.is_empty() || queue.deleting || self.free.is_empty() || queue.is_held() {
                return Ok(false);
            }
            let cq_index = usize::from(queue.cq_id) / shared.lanes.len();
            let cq = self.cqs.get(cq_index).and_then(Option::as_ref);
            // Of what is fetched, every completion finds its place in the queue or, once it is full, in the backlog: the
            // queue then waits with all the others that use it.
            if cq.is_none_or(CompletionQueue::is_congested) {
                return Ok(false);
            }
            let Some(entry) = queue.fetch(&shared.memory)? else { continue };
            if entry.fuse() != 0 || !self.claims.is_empty() {
                match self.admit(shared, index, &entry)? {
                    Admission::Start => {}
                    Admission::Hold => return Ok(false),
                    Admission::Done => {
                        self.busy = true;
                        continue;
                    }
                }
            }
            let Some(queue) = self.sqs[index].as_mut() else { return Ok(false) };
            queue.in_flight += 1;
            self.busy = true;
            let cid = entry.cid;
            match self.start(shared, index as u32, &entry) {
                Ok(true) => {}
                Ok(false) => self.end(shared, index as u32, cid, 0, Status::SUCCESS),
                Err(status) => self.end(shared, index as u32, cid, 0, status),
            }
        }
        Ok(self.sqs[index].as_ref().is_some_and(|queue| !queue.is_empty()))
    }

    /// Reads the tail doorbell, or its shadow.
    pub fn refresh_tail(&mut self, shared: &Shared, index: usize) -> Result<(), MemoryGone> {
        let Some(queue) = self.sqs[index].as_mut() else { return Ok(()) };
        let tail = match queue.shadow {
            Some(shadow) => shadow.load(&shared.memory)?,
            None => shared.doorbells.tail(queue.id),
        };
        if !queue.set_tail(tail) && shared.events().bad_doorbell(Event::INVALID_DOORBELL_VALUE, queue.id) {
            shared.host.wake(0);
        }
        Ok(())
    }

    /// Takes a slot for a command. The caller knows that one is free or answers the command when none is.
    pub fn take_slot(&mut self, owner: Owner, cid: u16, nsid: u32) -> Option<u32> {
        let index = self.free.pop()?;
        let slot = &mut self.slots[index as usize];
        slot.owner = owner;
        slot.generation = slot.generation.wrapping_add(1);
        slot.cid = cid;
        slot.nsid = nsid;
        slot.lba = 0;
        slot.write = false;
        slot.running = flush_step(nsid);
        slot.copied = 0;
        slot.goes_on = false;
        slot.preempted = false;
        slot.status = Status::SUCCESS;
        slot.steps.clear();
        Some(index)
    }

    /// Frees a slot whose command needed no request, or will never make one.
    pub fn give_back(&mut self, slot: u32) {
        self.slots[slot as usize].owner = Owner::Nobody;
        self.slots[slot as usize].preempted = false;
        // Nobody waits for a slot that is free, or they would wait until it is used again.
        self.slots[slot as usize].drains = false;
        self.free.push(slot);
    }

    /// What the backend gives back for this use of a slot.
    pub fn token(&self, slot: u32) -> u64 {
        u64::from(self.slots[slot as usize].generation) << 32 | u64::from(slot)
    }

    /// Starts the next step of a command. `false`: there is none.
    pub fn next_step(&mut self, slot_index: u32) -> bool {
        while let Some(step) = self.slots[slot_index as usize].steps.pop() {
            let owner = self.slots[slot_index as usize].owner;
            let namespace = match namespace::find(owner.reaches(&self.namespaces, &self.allocated), step.nsid)
            {
                Ok(namespace) => namespace,
                // A namespace that is gone by now has nothing left to flush; of anything else the guest learns that it was not done.
                Err(_) if self.slots[slot_index as usize].goes_on => continue,
                Err(status) => {
                    self.slots[slot_index as usize].status = status;
                    return false;
                }
            };
            self.slots[slot_index as usize].running = step;
            let request = Request {
                token: self.token(slot_index),
                operation: step.operation,
                offset_bytes: step.offset_bytes,
                length_bytes: step.length_bytes,
                buffers: Buffers::None,
            };
            namespace.backend.submit(&mut self.context, &request);
            return true;
        }
        self.next_of_pair(slot_index)
    }

    /// Takes what the backends have finished. `true`: commands went on to their next step.
    fn reap(&mut self, shared: &Shared) -> bool {
        let mut stepped = false;
        let mut completions = std::mem::take(&mut self.completions);
        self.context.completions(&mut completions);
        self.busy |= !completions.is_empty();
        for completion in completions.drain(..) {
            let index = completion.token as u32;
            let generation = (completion.token >> 32) as u32;
            let Some(slot) = self.slots.get(index as usize) else { continue };
            if slot.owner == Owner::Nobody || slot.generation != generation {
                log::error!("NVMe controller {:?}: a request completed twice", shared.config.serial);
                continue;
            }
            let (orphan, write) = (slot.owner == Owner::Orphan, slot.write);
            if let Err(failure) = completion.result {
                let status = namespace::failure_status(failure, write);
                // What differs has been read all the same.
                if failure != Failure::Miscompare {
                    self.log_failure(shared, index, status);
                }
                self.tell_failure(shared, index, failure);
                let slot = &mut self.slots[index as usize];
                if slot.status.is_success() {
                    slot.status = status;
                }
            } else {
                self.wrote(shared, index);
            }
            let slot = &mut self.slots[index as usize];
            // It was submitted before the cache was switched off, and the flush of Set Features may have come before it. A write that
            // still finds the cache on is done before that flush begins.
            if is_cached(slot.running.operation)
                && completion.result.is_ok()
                && !shared.write_cache.load(Ordering::SeqCst)
            {
                slot.steps.push(flush_step(slot.nsid));
            }
            let proceeds = slot.status.is_success() || slot.goes_on;
            // Of what nobody waits for, blocks that are half written are completed.
            let is_wanted = !orphan || slot.job != NO_JOB;
            if proceeds && is_wanted && self.go_on(shared, index) {
                stepped = true;
            } else {
                self.finish(shared, index, self.slots[index as usize].status);
            }
        }
        self.completions = completions;
        stepped
    }

    /// The request in flight of a slot has ended well.
    fn wrote(&mut self, shared: &Shared, slot_index: u32) {
        let slot = &mut self.slots[slot_index as usize];
        let running = slot.running;
        if !running.operation.writes() {
            return;
        }
        slot.copied += u32::from(matches!(running.operation, Operation::Copy { .. }));
        if let Ok(namespace) =
            namespace::find(slot.owner.reaches(&self.namespaces, &self.allocated), running.nsid)
            && let healed = namespace.heal(running.offset_bytes, running.length_bytes)
            && let Err(status) = keep_healed(shared, namespace, &healed)
        {
            self.slots[slot_index as usize].status = status;
        }
    }

    /// Says, once for each namespace, that the host fails the guest: the guest cannot know why.
    fn tell_failure(&mut self, shared: &Shared, slot_index: u32, failure: Failure) {
        let (Failure::NoSpace | Failure::Io(_)) = failure else { return };
        let warning = smart::warning_of(failure);
        if shared.warnings.fetch_or(warning, Ordering::SeqCst) & warning != warning {
            shared.host.wake(0);
        }
        let nsid = self.slots[slot_index as usize].nsid;
        if !self.failures_told.contains(&nsid) {
            self.failures_told.push(nsid);
            let serial = &shared.config.serial;
            let image = match nsid {
                NSID_BROADCAST => "an image".to_owned(),
                nsid => format!("the image of namespace {nsid}"),
            };
            log::warn!("NVMe controller {serial:?}: {image} failed a command: {failure}");
        }
    }

    /// Logs that the medium could not do what a slot's command wanted.
    pub fn log_failure(&mut self, shared: &Shared, slot_index: u32, status: Status) {
        let slot = &self.slots[slot_index as usize];
        let sq_id = match slot.owner {
            Owner::Queue(index) => self.sqs[index as usize].as_ref().map_or(0xffff, |queue| queue.id),
            _ => 0xffff,
        };
        let entry = ErrorEntry {
            sq_id,
            cid: slot.cid,
            status: status.0 << 1,
            parameter_location: 0xffff,
            lba: slot.lba,
            nsid: slot.nsid,
            ..ErrorEntry::default()
        };
        self.log_media_error(shared, entry);
    }

    /// Counts and logs what the medium could not do.
    pub fn log_media_error(&mut self, shared: &Shared, entry: ErrorEntry) {
        self.counters.media_errors += 1;
        shared.events().log_error(entry);
    }

    /// The command in a slot has ended: the slot is free again.
    pub fn finish(&mut self, shared: &Shared, slot_index: u32, status: Status) {
        let pair = self.end_pair(shared, slot_index, status);
        if self.slots[slot_index as usize].job != NO_JOB {
            self.end_job(slot_index);
        }
        let status = pair.map_or(status, |(_, first, _)| first);
        let slot = &mut self.slots[slot_index as usize];
        let (owner, cid) = (slot.owner, slot.cid);
        // "If the command completes with failure, Dword 0 ... contains the number of the lowest numbered Source Range entry that was
        // not successfully copied" (NVM 3.2.2.1).
        let dw0 = if status.is_success() { 0 } else { slot.copied };
        slot.owner = Owner::Nobody;
        slot.preempted = false;
        slot.steps.clear();
        if std::mem::take(&mut slot.drains) {
            shared.host.wake(0);
        }
        self.free.push(slot_index);
        match owner {
            Owner::Queue(index) => {
                self.end(shared, index, cid, dw0, status);
                if let Some((cid, _, status)) = pair {
                    self.end(shared, index, cid, 0, status);
                }
            }
            Owner::Admin(token) => self.admin_ended.push((token, status)),
            Owner::Orphan | Owner::Nobody => {}
        }
    }

    /// A command of submission queue `sq_index` has its result.
    pub fn end(&mut self, shared: &Shared, sq_index: u32, cid: u16, dw0: u32, status: Status) {
        let Some(queue) = self.sqs[sq_index as usize].as_mut() else { return };
        queue.in_flight -= 1;
        let ended = Ended { sq_id: queue.id, sq_index, cid, dw0, dw1: 0, status };
        let cq_id = queue.cq_id;
        if queue.deleting && queue.in_flight == 0 {
            shared.host.wake(0);
        }
        self.enqueue(shared, cq_id, ended);
    }

    /// Puts a result into the backlog of its completion queue, to be posted at the end of the pass.
    pub fn enqueue(&mut self, shared: &Shared, cq_id: u16, ended: Ended) {
        let cq_index = usize::from(cq_id) / shared.lanes.len();
        let Some(cq) = self.cqs.get_mut(cq_index).and_then(Option::as_mut) else { return };
        cq.backlog.push_back(ended);
        if !cq.listed {
            cq.listed = true;
            self.listed.push(cq_index as u32);
        }
    }

    /// Posts what has its place, one interrupt a queue.
    pub fn post(&mut self, shared: &Shared) -> Result<(), MemoryGone> {
        if self.listed.is_empty() || !shared.is_bus_master() {
            return Ok(());
        }
        let Self { cqs, sqs, listed, delayed, .. } = self;
        let mut completed = 0;
        let mut outcome = Ok(());
        listed.retain(|&cq_index| {
            let Some(cq) = cqs[cq_index as usize].as_mut() else { return false };
            let sq_head = |ended: &Ended| sqs[ended.sq_index as usize].as_ref().map_or(0, |queue| queue.head);
            match post_queue(shared, cq, sq_head) {
                Ok(posted) => completed += u64::from(posted),
                Err(gone) => outcome = Err(gone),
            }
            if cq.delayed.until.is_some() && !std::mem::replace(&mut cq.is_in_delayed, true) {
                delayed.push(cq_index);
            }
            cq.listed = !cq.backlog.is_empty();
            cq.listed
        });
        if completed > 0 {
            shared.lanes[self.index].completed.fetch_add(completed, Ordering::Relaxed);
        }
        outcome
    }

    /// Before sleep: asks the guest to tell us about new entries, and looks once more. `true`: something came meanwhile.
    fn arm(&mut self, shared: &Shared) -> Result<bool, MemoryGone> {
        let mut more = false;
        for queue in self.sqs.iter_mut().flatten() {
            if queue.shadow.is_some() && !queue.doorbell_event {
                queue.doorbell_event = true;
                let offset = nvme_spec::regs::sq_tail_doorbell(queue.id);
                shared.host.set_doorbell_event(offset, self.index, true);
            }
            let tail = match queue.shadow {
                Some(shadow) => {
                    let shadow = shadow.in_memory(&shared.memory);
                    ask_for_tail(&shadow, &mut queue.published, queue.tail)?
                }
                None => shared.doorbells.tail(queue.id),
            };
            more |= tail != queue.tail && tail < queue.ring.entries;
            // Left over because there was no slot or no room in the completion queue, and now there is.
            let cq = self.cqs.get(usize::from(queue.cq_id) / shared.lanes.len()).and_then(Option::as_ref);
            let held =
                queue.deleting || queue.is_held() || self.free.is_empty() || cq.is_none_or(|cq| cq.waiting);
            more |= !queue.is_empty() && !held;
        }
        Ok(more)
    }

    /// Between two looks: moves every EventIdx out of the way of the guest's tail.
    fn quieten(&mut self, shared: &Shared) -> Result<(), MemoryGone> {
        if !shared.may_fetch() {
            return Ok(());
        }
        for queue in self.sqs.iter_mut().flatten() {
            let Some(shadow) = queue.shadow else { continue };
            if let Some(index) = queue.ring.quiet_event_index(queue.tail, queue.published) {
                shadow.publish(&shared.memory, index)?;
                queue.published = Some(index);
            }
        }
        Ok(())
    }

    /// After a pause or a restore: every EventIdx is published again before sleep, and what could not be posted is tried again.
    pub fn wake_up(&mut self) {
        for queue in self.sqs.iter_mut().flatten() {
            queue.published = None;
        }
        for (index, cq) in self.cqs.iter_mut().enumerate() {
            if let Some(cq) = cq
                && !cq.backlog.is_empty()
                && !cq.listed
            {
                cq.listed = true;
                self.listed.push(index as u32);
            }
        }
    }

    /// Forgets all queues. What is in flight ends unseen.
    pub fn drop_queues(&mut self, shared: &Shared) {
        for queue in self.sqs.drain(..).flatten() {
            close_sq(shared, self.index, &queue);
        }
        self.sq_places.clear();
        self.free_sqs.clear();
        for queue in self.cqs.drain(..).flatten() {
            close_cq(shared, self.index, &queue);
        }
        self.listed.clear();
        self.delayed.clear();
        self.drop_waiting_pair(shared);
        for slot in self.slots.iter_mut().filter(|slot| slot.owner != Owner::Nobody) {
            slot.owner = Owner::Orphan;
        }
        self.drop_waiting_jobs(shared);
        self.admin_ended.clear();
    }
}

/// Closes the doorbell of a submission queue that goes away.
pub(crate) fn close_sq(shared: &Shared, worker: usize, queue: &SubmissionQueue) {
    shared.doorbells.close_sq(queue.id);
    if queue.doorbell_event {
        let offset = nvme_spec::regs::sq_tail_doorbell(queue.id);
        shared.host.set_doorbell_event(offset, worker, false);
    }
}

/// Closes the doorbell of a completion queue that goes away.
pub(crate) fn close_cq(shared: &Shared, worker: usize, queue: &CompletionQueue) {
    shared.doorbells.close_cq(queue.id);
    if queue.doorbell_event {
        shared.host.set_doorbell_event(nvme_spec::regs::cq_head_doorbell(queue.id), worker, false);
    }
}

/// Reads the guest's head of `cq`.
pub(crate) fn refresh_head(shared: &Shared, cq: &mut CompletionQueue) -> Result<(), MemoryGone> {
    let head = match cq.shadow {
        Some(shadow) => shadow.load(&shared.memory)?,
        None => shared.doorbells.head(cq.id),
    };
    take_head(shared, cq, head);
    Ok(())
}

/// Takes over the guest's head.
pub(crate) fn take_head(shared: &Shared, cq: &mut CompletionQueue, head: u32) {
    if !cq.advance_head(head) && shared.events().bad_doorbell(Event::INVALID_DOORBELL_VALUE, cq.id) {
        shared.host.wake(0);
    }
}

/// Posts the backlog of `cq` as far as it has room, with one interrupt, and says how many entries that were. If some are
/// left the guest is asked to tell when it has made room, and nothing but an event is needed to tell it; otherwise the guest is kept
/// from ringing.
pub(crate) fn post_queue(
    shared: &Shared,
    cq: &mut CompletionQueue,
    sq_head: impl Fn(&Ended) -> u32,
) -> Result<u32, MemoryGone> {
    refresh_head(shared, cq)?;
    let (shadow, was_waiting) = (cq.shadow.map(|shadow| shadow.in_memory(&shared.memory)), cq.waiting);
    let doorbell = shared.doorbells.head_doorbell(cq.id);
    let mut backlog = Backlog { shared, cq, sq_head, posted: 0 };
    let waiting = wakeup::post_or_wait(&mut backlog, doorbell, shadow.as_ref(), was_waiting)?;
    let posted = backlog.posted;
    cq.waiting = waiting;
    // A head that the pin follows is told to a vCPU thread, whatever happens.
    let followed = shared.follows_head(cq);
    if let Some(shadow) = cq.shadow {
        let wants_event = waiting && !followed;
        if wants_event != cq.doorbell_event {
            cq.doorbell_event = wants_event;
            let offset = nvme_spec::regs::cq_head_doorbell(cq.id);
            shared.host.set_doorbell_event(offset, shared.worker_of(cq.id), wants_event);
        }
        if waiting {
            // What it was asked for.
            cq.published = Some(cq.head);
        } else if !followed && let Some(index) = cq.ring.quiet_event_index(cq.head, cq.published) {
            shadow.publish(&shared.memory, index)?;
            cq.published = Some(index);
        }
    }
    shared.signal(cq, posted)?;
    Ok(posted)
}

/// What [`post_queue`] posts.
struct Backlog<'a, H> {
    shared: &'a Shared,
    cq: &'a mut CompletionQueue,
    sq_head: H,
    posted: u32,
}

impl<H: Fn(&Ended) -> u32> wakeup::Posting for Backlog<'_, H> {
    type Gone = MemoryGone;

    fn post_what_fits(&mut self) -> Result<bool, MemoryGone> {
        while !self.cq.is_full()
            && let Some(ended) = self.cq.backlog.pop_front()
        {
            self.cq.post(&self.shared.memory, &ended, (self.sq_head)(&ended))?;
            self.posted += 1;
        }
        Ok(self.cq.backlog.is_empty())
    }

    fn head(&self) -> u32 {
        self.cq.head
    }

    fn set_head(&mut self, head: u32) {
        take_head(self.shared, self.cq, head);
    }

    fn is_full(&self) -> bool {
        self.cq.is_full()
    }
}
