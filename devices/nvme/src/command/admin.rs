//! Admin commands (Base 5): the table of them, and the small ones.

use nvme_spec::opcode::admin;
use nvme_spec::{Status, SubmissionEntry};

use crate::admin::{Admin, Answer, MAX_PARKED, Pool};
use crate::doorbell::Buffers;
use crate::prp;

impl Admin {
    /// Executes one admin command.
    pub fn execute(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        if !is_supported(pool, entry.opcode) {
            return Err(Status::INVALID_OPCODE.do_not_retry());
        }
        // Neither fused admin commands nor SGLs exist here.
        if entry.fuse() != 0 || entry.psdt() != 0 {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        let sanitize = self.common.sanitize();
        if let Some(status) = sanitize.refusal().filter(|_| !sanitize.allows(entry)) {
            return Err(status.do_not_retry());
        }
        match entry.opcode {
            admin::DELETE_SQ => self.delete_sq(pool, entry),
            admin::CREATE_SQ => self.create_sq(pool, entry),
            admin::GET_LOG_PAGE => self.get_log_page(pool, entry),
            admin::DELETE_CQ => self.delete_cq(pool, entry),
            admin::CREATE_CQ => self.create_cq(pool, entry),
            admin::IDENTIFY => self.identify(pool, entry),
            admin::ABORT => self.abort(pool, entry),
            admin::SET_FEATURES => self.set_features(pool, entry),
            admin::GET_FEATURES => self.get_features(pool, entry),
            admin::ASYNC_EVENT_REQUEST => self.async_event_request(entry),
            admin::FIRMWARE_DOWNLOAD => self.firmware_download(pool, entry),
            admin::FORMAT_NVM => self.format_nvm(pool, entry),
            admin::DEVICE_SELF_TEST => self.device_self_test(pool, entry),
            admin::SANITIZE => self.start_sanitize(pool, entry),
            admin::FIRMWARE_COMMIT => self.firmware_commit(pool, entry),
            admin::NAMESPACE_MANAGEMENT => self.namespace_management(pool, entry),
            admin::NAMESPACE_ATTACHMENT => self.namespace_attachment(pool, entry),
            admin::DOORBELL_BUFFER_CONFIG => self.doorbell_buffer_config(pool, entry),
            // Keep Alive.
            _ => {
                self.restart_keep_alive();
                Ok(Answer::Now(0))
            }
        }
    }

    /// Asynchronous Event Request (Base 5.2).
    fn async_event_request(&mut self, entry: &SubmissionEntry) -> Result<Answer, Status> {
        if self.parked.len() == MAX_PARKED {
            return Err(Status::ASYNC_EVENT_LIMIT_EXCEEDED.do_not_retry());
        }
        self.parked.push(entry.cid);
        Ok(Answer::Later)
    }

    /// Abort (Base 5.1): dword 0 bit 0 is 0 when the command was aborted. What the backend has is not.
    fn abort(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        const NOT_ABORTED: Answer = Answer::Now(1);
        let (sq_id, cid) = (entry.cdw10 as u16, (entry.cdw10 >> 16) as u16);
        if sq_id == 0 {
            let parked = self.parked.iter().position(|&parked| parked == cid);
            let waits = parked.is_none() && self.take_back(pool, cid);
            if parked.is_none() && !waits {
                return Ok(NOT_ABORTED);
            }
            parked.into_iter().for_each(|position| _ = self.parked.remove(position));
            self.end(cid, 0, Status::ABORT_REQUESTED);
            return Ok(Answer::Now(0));
        }
        let Some(worker) = pool.shared.doorbells.sq_worker(sq_id) else {
            return Err(Status::INVALID_FIELD.do_not_retry());
        };
        let aborted = pool.worker(worker).abort(&pool.shared, sq_id, cid);
        Ok(if aborted { Answer::Now(0) } else { NOT_ABORTED })
    }

    /// Marks an admin command that has not been fetched as aborted. `false`: there is none, or too many completions wait already.
    fn take_back(&mut self, pool: &Pool, cid: u16) -> bool {
        let Some(queues) = self.queues.as_mut() else { return false };
        queues.sq.set_tail(pool.shared.doorbells.tail(0));
        !queues.cq.has_long_backlog() && queues.sq.abort(&pool.shared.memory, cid)
    }

    /// Doorbell Buffer Config (Base 5.8).
    fn doorbell_buffer_config(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let buffers =
            Buffers { shadow: entry.prp1, event_index: entry.prp2, page_bytes: 1 << self.page_shift };
        if !buffers.lie_in(&pool.shared.memory) {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        self.set_buffers(pool, buffers).map_err(|_| Status::INVALID_FIELD.do_not_retry())?;
        Ok(Answer::Now(0))
    }

    /// Copies `data` to where the PRPs of `entry` say. An empty transfer is done.
    pub fn write_data(&mut self, pool: &Pool, entry: &SubmissionEntry, data: &[u8]) -> Result<(), Status> {
        if data.is_empty() {
            return Ok(());
        }
        let memory = &pool.shared.memory;
        let mut ranges = Vec::new();
        self.walker.walk(memory, entry.prp1, entry.prp2, data.len() as u64, &mut ranges)?;
        prp::write_ranges(memory, &ranges, data)
    }

    /// Copies `N` bytes from where the PRPs of `entry` say.
    pub fn read_data<const N: usize>(
        &mut self,
        pool: &Pool,
        entry: &SubmissionEntry,
    ) -> Result<[u8; N], Status> {
        let mut data = [0; N];
        self.read_bytes(pool, entry, &mut data)?;
        Ok(data)
    }

    /// Fills `data` from where the PRPs of `entry` say.
    pub fn read_bytes(
        &mut self,
        pool: &Pool,
        entry: &SubmissionEntry,
        data: &mut [u8],
    ) -> Result<(), Status> {
        let memory = &pool.shared.memory;
        let mut ranges = Vec::new();
        self.walker.walk(memory, entry.prp1, entry.prp2, data.len() as u64, &mut ranges)?;
        prp::read_ranges(memory, &ranges, data)
    }
}

/// The admin commands that [`Admin::execute`] knows; also what the Commands Supported log says.
pub(crate) fn is_supported(pool: &Pool, opcode: u8) -> bool {
    if matches!(opcode, admin::NAMESPACE_MANAGEMENT | admin::NAMESPACE_ATTACHMENT) {
        return pool.shared.subsystem.is_managed();
    }
    matches!(
        opcode,
        admin::DELETE_SQ
            | admin::CREATE_SQ
            | admin::GET_LOG_PAGE
            | admin::DELETE_CQ
            | admin::CREATE_CQ
            | admin::IDENTIFY
            | admin::ABORT
            | admin::SET_FEATURES
            | admin::GET_FEATURES
            | admin::ASYNC_EVENT_REQUEST
            | admin::FIRMWARE_COMMIT
            | admin::FIRMWARE_DOWNLOAD
            | admin::KEEP_ALIVE
            | admin::DOORBELL_BUFFER_CONFIG
            | admin::DEVICE_SELF_TEST
            | admin::FORMAT_NVM
            | admin::SANITIZE
    )
}
