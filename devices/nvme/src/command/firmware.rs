//! Firmware Image Download and Firmware Commit (Base 5.12, 5.11).

use nvme_spec::event::Event;
use nvme_spec::persistent::{FirmwareCommitEvent, kind};
use nvme_spec::{Status, SubmissionEntry, identify};

use crate::admin::{Admin, Answer, Pool};
use crate::firmware::MAX_IMAGE_BYTES;

impl Admin {
    /// Firmware Image Download: CDW10 is the number of dwords, 0's based, CDW11 where they go in the image, in dwords.
    pub fn firmware_download(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let length_bytes = (u64::from(entry.cdw10) + 1) * 4;
        let most = pool.shared.config.max_transfer_bytes().min(MAX_IMAGE_BYTES as u64);
        if length_bytes > most {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        let mut data = vec![0; length_bytes as usize];
        self.read_bytes(pool, entry, &mut data)?;
        self.staging.put(u64::from(entry.cdw11) * 4, &data)?;
        Ok(Answer::Now(0))
    }

    /// Firmware Commit: CDW10 bits 2:0 are the slot, 5:3 the action.
    pub fn firmware_commit(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let (slot, action) = ((entry.cdw10 & 7) as u8, (entry.cdw10 >> 3 & 7) as u8);
        let (old, committed, new) = {
            let mut common = self.common.lock();
            let firmware = &mut common.firmware;
            let old = firmware.running;
            let committed = firmware.commit(&mut self.staging, slot, action);
            (old, committed, firmware.in_slot(slot).unwrap_or(old))
        };
        let status = committed.err().unwrap_or_default().code();
        let event = FirmwareCommitEvent {
            old,
            new,
            action,
            slot,
            status_code_type: (status.0 >> 8) as u8,
            status_code: status.0 as u8,
            vendor: 0,
        };
        self.log_event(pool, kind::FIRMWARE_COMMIT, &event.to_bytes());
        self.keep();
        let activated = committed?;
        if activated && self.features.async_events & identify::OAES_FIRMWARE_ACTIVATION != 0 {
            // It has been activated when the host learns of it: CSTS.PP never is 1.
            pool.shared.events().queue(Event::FIRMWARE_ACTIVATION);
        }
        Ok(Answer::Now(0))
    }
}
