//! The features and the event that reservations come with (Base 5.27.1.25 to 5.27.1.27, 5.16.1.24).

use std::sync::atomic::Ordering;

use nvme_spec::event::Event;
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry};

use crate::admin::{Admin, Phase, Pool};
use crate::command::reservations::keep;
use crate::namespace;
use crate::reservation::HostIdentity;
use crate::reservations::NOTIFICATION_MASK;

/// Host Identifier CDW11 bit 0: Enable Extended Host Identifier.
const EXTENDED: u32 = 1 << 0;

/// Who a Host Identifier says that controller `controller` is of.
pub(crate) fn identity(controller: u16, identifier: &[u8; 16], extended: bool) -> HostIdentity {
    let mut short = [0; 8];
    short.copy_from_slice(&identifier[..8]);
    match (*identifier == [0; 16], extended) {
        (true, _) => HostIdentity::Unnamed { controller },
        (false, true) => HostIdentity::Extended(*identifier),
        (false, false) => HostIdentity::Short(short),
    }
}

/// Whether a Host Identifier has more than 64 bits, whatever it was set as.
pub(crate) fn is_extended_by_itself(identifier: &[u8; 16]) -> bool {
    identifier[8..].iter().any(|&byte| byte != 0)
}

impl Admin {
    /// Host Identifier: 8 bytes, or 16 if it is extended. It stays as long as a registration is of it.
    pub fn set_host_identifier(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<(), Status> {
        let extended = entry.cdw11 & EXTENDED != 0;
        let mut identifier = [0; 16];
        if extended {
            identifier = self.read_data(pool, entry)?;
        } else {
            identifier[..8].copy_from_slice(&self.read_data::<8>(pool, entry)?);
        }
        let shared = &pool.shared;
        let identity = identity(shared.controller_id, &identifier, extended);
        shared.subsystem.reservations.set_identity(shared.controller_id, identity)?;
        self.features.host_identifier = identifier;
        Ok(())
    }

    /// Reservation Notification Mask, of one namespace or of all that are attached.
    pub fn set_reservation_mask(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<(), Status> {
        let shared = &pool.shared;
        let mask = entry.cdw11 as u8 & NOTIFICATION_MASK;
        let reservations = &shared.subsystem.reservations;
        reservations.set_mask(shared.controller_id, self.scope(entry.nsid)?.into_iter(), mask);
        Ok(())
    }

    /// Reservation Persistence, of one namespace or of all that are attached. Where nothing outlives the power it cannot be asked for.
    pub fn set_reservation_persistence(
        &mut self,
        pool: &Pool,
        entry: &SubmissionEntry,
    ) -> Result<(), Status> {
        let shared = &pool.shared;
        let persists = entry.cdw11 & 1 == 1;
        let scope = self.scope(entry.nsid)?;
        if persists && !shared.subsystem.keeps_reservations() {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        let mut changed = false;
        for nsid in scope {
            let by = (shared.controller_id, 0);
            let change = shared.subsystem.reservations.change(by, nsid, false, |reservation, _| {
                reservation.persists = persists;
                Ok(Default::default())
            })?;
            changed |= change.persists;
        }
        if changed { keep(shared) } else { Ok(()) }
    }

    fn scope(&self, nsid: u32) -> Result<Vec<u32>, Status> {
        if nsid == NSID_BROADCAST {
            return Ok(namespace::active(&self.namespaces).map(|active| active.nsid).collect());
        }
        namespace::find(&self.namespaces, nsid)?;
        Ok(vec![nsid])
    }

    /// Reports that there is a reservation notification to read.
    pub fn tell_of_reservations(&mut self, pool: &Pool) {
        let shared = &pool.shared;
        if shared.gate.notified.load(Ordering::SeqCst)
            && self.phase == Phase::Ready
            && !shared.is_paused()
            && shared.gate.notified.swap(false, Ordering::SeqCst)
        {
            shared.events().queue(Event::RESERVATION_LOG_AVAILABLE);
        }
    }
}
