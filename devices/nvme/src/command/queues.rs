//! Creating, deleting and finding I/O queues (Base 5.4 to 5.7). A restored controller makes its queues here too.

use nvme_spec::opcode;
use nvme_spec::regs::Cc;
use nvme_spec::{Status, SubmissionEntry};

use crate::admin::{Admin, Answer, PendingDelete, Pool};
use crate::doorbell::{Buffers, MemoryGone};
use crate::queue::{CompletionQueue, Ended, QueuePlace, SubmissionQueue};
use crate::regs::{IOCQES, IOSQES};
use crate::shared::Shared;
use crate::worker::{Worker, close_cq, close_sq, refresh_head};

impl Admin {
    /// Create I/O Completion Queue.
    pub fn create_cq(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let id = entry.cdw10 as u16;
        let vector = (entry.cdw11 >> 16) as u16;
        let interrupts = entry.cdw11 & opcode::CQ_INTERRUPTS_ENABLED != 0;
        if id == 0 || id > pool.shared.config.queue_pairs || pool.shared.doorbells.cq_exists(id) {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.do_not_retry());
        }
        let place = self.place(pool, entry, id, 16)?;
        self.add_cq(pool, place, vector, interrupts)?;
        Ok(Answer::Now(0))
    }

    /// Puts a completion queue into its worker, after the checks that the guest's own command gets.
    pub fn add_cq(
        &mut self,
        pool: &Pool,
        place: QueuePlace,
        vector: u16,
        interrupts: bool,
    ) -> Result<(), Status> {
        let shared = &pool.shared;
        self.check_entry_sizes(shared)?;
        check_size(shared, &place)?;
        if interrupts && vector >= shared.config.vectors {
            return Err(Status::INVALID_INTERRUPT_VECTOR.do_not_retry());
        }
        let mut cq = CompletionQueue::new(&shared.memory, place, vector, interrupts)?;
        let (id, entries) = (cq.id, cq.ring.entries);
        cq.shadow = self.shadow_of(|buffers| buffers.cq(id), shared)?;
        let index = shared.worker_of(id);
        let mut worker = pool.worker(index);
        let place = usize::from(id) / pool.workers.len();
        if worker.cqs.len() <= place {
            worker.cqs.resize_with(place + 1, || None);
        }
        shared.doorbells.open_cq(id, entries, index, 0);
        shared.pin_queues.add(&cq);
        worker.cqs[place] = Some(cq);
        Ok(())
    }

    /// Create I/O Submission Queue.
    pub fn create_sq(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let id = entry.cdw10 as u16;
        let cq_id = (entry.cdw11 >> 16) as u16;
        let priority = (entry.cdw11 >> 1 & 3) as u8;
        if id == 0 || id > pool.shared.config.queue_pairs || pool.shared.doorbells.sq_worker(id).is_some() {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.do_not_retry());
        }
        if cq_id == 0 || cq_id > pool.shared.config.queue_pairs {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.do_not_retry());
        }
        let place = self.place(pool, entry, id, 64)?;
        self.add_sq(pool, place, cq_id, priority)?;
        Ok(Answer::Now(0))
    }

    /// Puts a submission queue into the worker of its completion queue.
    pub fn add_sq(&mut self, pool: &Pool, place: QueuePlace, cq_id: u16, priority: u8) -> Result<(), Status> {
        let shared = &pool.shared;
        self.check_entry_sizes(shared)?;
        check_size(shared, &place)?;
        let mut sq = SubmissionQueue::new(&shared.memory, place, cq_id, priority)?;
        let (id, entries) = (sq.id, sq.ring.entries);
        sq.shadow = self.shadow_of(|buffers| buffers.sq(id), shared)?;
        let index = shared.worker_of(cq_id);
        let mut worker = pool.worker(index);
        let Some(cq) = worker.cq_mut(shared, cq_id) else {
            return Err(Status::COMPLETION_QUEUE_INVALID.do_not_retry());
        };
        cq.users += 1;
        worker.insert_sq(sq);
        shared.doorbells.open_sq(id, entries, index, 0);
        Ok(())
    }

    /// Delete I/O Completion Queue.
    pub fn delete_cq(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let id = entry.cdw10 as u16;
        let shared = &pool.shared;
        if id == 0 || !shared.doorbells.cq_exists(id) {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.do_not_retry());
        }
        let mut worker = pool.worker(shared.worker_of(id));
        if worker.cq_mut(shared, id).is_none_or(|cq| cq.users > 0) {
            return Err(Status::INVALID_QUEUE_DELETION.do_not_retry());
        }
        let place = usize::from(id) / pool.workers.len();
        if let Some(cq) = worker.cqs[place].take() {
            close_cq(shared, worker.index, &cq);
            worker.delayed.retain(|&index| index as usize != place);
        }
        shared.pin_queues.remove(id);
        shared.update_pin();
        Ok(Answer::Now(0))
    }

    /// Delete I/O Submission Queue: answered when nothing of the queue is in flight any more.
    pub fn delete_sq(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let id = entry.cdw10 as u16;
        let worker = (id != 0).then(|| pool.shared.doorbells.sq_worker(id)).flatten();
        let Some(worker) = worker else {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.do_not_retry());
        };
        if self.deletes.iter().any(|delete| delete.sq_id == id) {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.do_not_retry());
        }
        if let Some(queue) = pool.worker(worker).sq_mut(id) {
            queue.deleting = true;
        }
        if remove_idle_sq(pool, id) {
            return Ok(Answer::Now(0));
        }
        self.deletes.push(PendingDelete { cid: entry.cid, sq_id: id });
        Ok(Answer::Later)
    }

    /// Remembers the doorbell buffers and gives every queue its shadow, which starts at the queue's doorbell. That is what the guest
    /// wrote by MMIO, or to the shadow that the queue had before: what was written by MMIO has long been passed then.
    pub fn set_buffers(&mut self, pool: &Pool, buffers: Buffers) -> Result<(), MemoryGone> {
        let shared = &pool.shared;
        let memory = &shared.memory;
        self.buffers = Some(buffers);
        if let Some(queues) = self.queues.as_mut() {
            queues.sq.published = None;
            if let Some(shadow) = buffers.cq(0) {
                shadow.store(memory, queues.cq.head)?;
            }
        }
        for index in 0..pool.workers.len() {
            let mut worker = pool.worker(index);
            // A worker that got its shadows before they hold the doorbells would take what else is in the guest's page for them.
            for position in 0..worker.sqs.len() {
                worker.refresh_tail(shared, position)?;
                let Some(queue) = worker.sqs[position].as_mut() else { continue };
                let shadow = buffers.sq(queue.id);
                if let Some(shadow) = shadow {
                    // The worker may be asleep: from now on the guest tells it of the very next entry.
                    shadow.store(memory, queue.tail)?;
                    shadow.publish(memory, queue.tail)?;
                }
                queue.shadow = shadow;
                queue.published = None;
            }
            for queue in worker.cqs.iter_mut().flatten() {
                refresh_head(shared, queue)?;
                let shadow = buffers.cq(queue.id);
                if let Some(shadow) = shadow {
                    shadow.store(memory, queue.head)?;
                    shadow.publish(memory, queue.head)?;
                }
                queue.shadow = shadow;
                queue.published = None;
            }
            shared.host.wake(index);
        }
        Ok(())
    }

    /// Remembers the doorbell buffers without writing to them, as a restored controller does.
    pub fn attach_buffers(&mut self, pool: &Pool, buffers: Buffers) {
        self.buffers = Some(buffers);
        if let Some(queues) = self.queues.as_mut() {
            queues.sq.published = None;
        }
        for index in 0..pool.workers.len() {
            let mut worker = pool.worker(index);
            for queue in worker.sqs.iter_mut().flatten() {
                queue.shadow = buffers.sq(queue.id);
                queue.published = None;
            }
            for queue in worker.cqs.iter_mut().flatten() {
                queue.shadow = buffers.cq(queue.id);
                queue.published = None;
            }
        }
    }

    /// The shadow of a new queue, which starts at 0 whatever an earlier queue of the same identifier left there.
    fn shadow_of(
        &self,
        which: impl FnOnce(&Buffers) -> Option<crate::doorbell::Shadow>,
        shared: &Shared,
    ) -> Result<Option<crate::doorbell::Shadow>, Status> {
        let Some(shadow) = self.buffers.as_ref().and_then(which) else { return Ok(None) };
        shadow
            .store(&shared.memory, 0)
            .and_then(|()| shadow.publish(&shared.memory, 0))
            .map_err(|_| Status::INTERNAL_ERROR)?;
        Ok(Some(shadow))
    }

    fn place(
        &mut self,
        pool: &Pool,
        entry: &SubmissionEntry,
        id: u16,
        entry_bytes: u64,
    ) -> Result<QueuePlace, Status> {
        let contiguous = entry.cdw11 & opcode::QUEUE_PHYSICALLY_CONTIGUOUS != 0;
        if !contiguous && pool.shared.config.contiguous_queues {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        let entries = (entry.cdw10 >> 16) + 1;
        if !(2..=pool.shared.config.queue_entries).contains(&entries) {
            return Err(Status::INVALID_QUEUE_SIZE.do_not_retry());
        }
        QueuePlace::from_command(
            &mut self.walker,
            &pool.shared.memory,
            &pool.shared.windows,
            (id, entries),
            (entry.prp1, contiguous),
            (entry_bytes, self.page_shift),
        )
    }

    /// "The host shall set CC.IOSQES and CC.IOCQES before it creates I/O queues" (Base 3.1.3.5).
    fn check_entry_sizes(&self, shared: &Shared) -> Result<(), Status> {
        if entry_sizes_are_set(shared.registers().cc) {
            Ok(())
        } else {
            Err(Status::INVALID_FIELD.do_not_retry())
        }
    }
}

/// Whether CC has the only sizes of entries that there are.
pub(crate) fn entry_sizes_are_set(cc: Cc) -> bool {
    (cc.iosqes(), cc.iocqes()) == (IOSQES, IOCQES)
}

fn check_size(shared: &Shared, place: &QueuePlace) -> Result<(), Status> {
    if (2..=shared.config.queue_entries).contains(&place.entries) {
        Ok(())
    } else {
        Err(Status::INVALID_QUEUE_SIZE.do_not_retry())
    }
}

/// Removes submission queue `id`, which is being deleted, if nothing of it is in flight.
pub(crate) fn remove_idle_sq(pool: &Pool, id: u16) -> bool {
    let shared = &pool.shared;
    let Some(index) = shared.doorbells.sq_worker(id) else { return true };
    let mut worker = pool.worker(index);
    if worker.sq_mut(id).is_some_and(|queue| queue.in_flight > 0) {
        return false;
    }
    if let Some(queue) = worker.remove_sq(id) {
        close_sq(shared, index, &queue);
        if let Some(cq) = worker.cq_mut(shared, queue.cq_id) {
            cq.users -= 1;
            // What could not be posted because the queue is full counts as aborted with the queue.
            cq.backlog.retain(|ended| ended.sq_id != id);
        }
    }
    true
}

impl Worker {
    /// Completion queue `id` if it is here.
    pub fn cq_mut(&mut self, shared: &Shared, id: u16) -> Option<&mut CompletionQueue> {
        self.cqs.get_mut(usize::from(id) / shared.lanes.len())?.as_mut()
    }

    /// Takes in a submission queue, whose identifier is new.
    fn insert_sq(&mut self, queue: SubmissionQueue) {
        let id = queue.id;
        let place = match self.free_sqs.pop() {
            Some(free) => {
                self.sqs[free as usize] = Some(queue);
                free
            }
            None => {
                self.sqs.push(Some(queue));
                self.sqs.len() as u32 - 1
            }
        };
        self.sq_places.insert(id, place);
    }

    fn remove_sq(&mut self, id: u16) -> Option<SubmissionQueue> {
        let place = self.sq_places.remove(&id)?;
        self.free_sqs.push(place);
        self.sqs.get_mut(place as usize)?.take()
    }

    /// Where submission queue `id` is in `sqs`, if it is here.
    pub fn sq_index(&self, id: u16) -> Option<u32> {
        self.sq_places.get(&id).copied()
    }

    /// Submission queue `id` if it is here.
    pub fn sq_mut(&mut self, id: u16) -> Option<&mut SubmissionQueue> {
        let place = self.sq_index(id)?;
        self.sqs.get_mut(place as usize)?.as_mut()
    }

    /// Aborts command `cid` of submission queue `sq_id` if it has not been fetched, and unless too many completions wait already.
    pub fn abort(&mut self, shared: &Shared, sq_id: u16, cid: u16) -> bool {
        let Some(sq_index) = self.sq_index(sq_id) else { return false };
        let position = sq_index as usize;
        if self.refresh_tail(shared, position).is_err() {
            return false;
        }
        let cq_id = self.sqs[position].as_ref().map(|queue| queue.cq_id);
        let cq = cq_id.and_then(|id| self.cq_mut(shared, id));
        if cq.is_none_or(|cq| cq.has_long_backlog()) {
            return false;
        }
        let Some(queue) = self.sqs[position].as_mut() else { return false };
        if !queue.abort(&shared.memory, cid) {
            return false;
        }
        let cq_id = queue.cq_id;
        let ended = Ended { sq_id, sq_index, cid, dw0: 0, dw1: 0, status: Status::ABORT_REQUESTED };
        self.enqueue(shared, cq_id, ended);
        if let Err(gone) = self.post(shared) {
            shared.fail("an I/O completion queue", &gone);
        }
        true
    }
}
