//! What may happen to the namespaces of a subsystem while it is in use.
//!
//! Each change is all or nothing: it is checked, then on stable storage, then seen by commands.

use std::collections::BTreeSet;

use nvme_spec::{NSID_BROADCAST, Status};

use crate::allocated::Allocated;
use crate::metadata::BlockFormat;
use crate::namespace::{self, Namespace};
use crate::subsystem::Subsystem;
use crate::{Error, store::AllocatedState};

/// What the host asks for with Namespace Management (create).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Creation {
    /// NSZE, which is NCAP too.
    pub blocks: u64,
    /// The LBA format, with what FLBAS and DPS say of metadata.
    pub format: BlockFormat,
    /// NMIC bit 0.
    pub shared: bool,
}

/// Why a namespace is not created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotCreated {
    /// As the status says.
    Status(Status),
    /// So many bytes are not there.
    InsufficientCapacity { needed_bytes: u64 },
}

impl From<Status> for NotCreated {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl Subsystem {
    /// Creates a namespace that is attached to no controller (Base 5.23); returns its identifier.
    pub(crate) fn create(&self, creation: &Creation) -> Result<u32, NotCreated> {
        let Some(store) = &self.store else { return Err(Status::INVALID_OPCODE.do_not_retry().into()) };
        let size_bytes = creation.format.image_bytes(creation.blocks);
        let size_bytes = size_bytes.ok_or(NotCreated::InsufficientCapacity { needed_bytes: u64::MAX })?;
        let mut saved = self.saved();
        self.can_grow()?;
        if u128::from(size_bytes) > self.capacity_bytes().1 {
            return Err(NotCreated::InsufficientCapacity { needed_bytes: size_bytes });
        }
        let nsid = self.contents().free_nsid();
        let nsid = nsid.ok_or(NotCreated::Status(Status::NAMESPACE_IDENTIFIER_UNAVAILABLE.do_not_retry()))?;
        let mut next = saved.clone();
        next.allocations.created_ever += 1;
        let uuid = namespace::uuid_of_created(&self.serial, nsid, next.allocations.created_ever);
        let backend = store.create(&uuid, size_bytes, 1 << creation.format.shift).map_err(|source| {
            let what = "make an image for a namespace";
            self.report(&Error::Store { serial: self.serial.clone(), what, source });
            Status::INTERNAL_ERROR
        })?;
        let namespace =
            Namespace::over(nsid, &creation.format, creation.blocks, creation.shared, uuid, backend);
        let allocated = Allocated { namespace, created: true, attached: BTreeSet::new() };
        next.allocations.put(allocated.to_state());
        let changed = self.commit(&mut saved, next, |contents, _| {
            contents.namespaces[nsid as usize - 1] = Some(allocated);
        });
        if let Err(error) = changed {
            self.report(&error);
            store.remove(&uuid);
            return Err(Status::INTERNAL_ERROR.into());
        }
        Ok(nsid)
    }

    /// Deletes the created namespace `nsid`, or all with the broadcast identifier (Base 5.23). Returns the generation with which it is
    /// complete. A namespace of the host's is not the guest's to delete; then nothing is.
    pub(crate) fn delete(&self, nsid: u32) -> Result<u64, Status> {
        let mut saved = self.saved();
        let doomed: Vec<u32> = {
            let contents = self.contents();
            let doomed: Vec<&Allocated> = match nsid {
                NSID_BROADCAST => contents.allocated().collect(),
                nsid => vec![contents.find(nsid)?],
            };
            if doomed.iter().any(|allocated| !allocated.created) {
                return Err(Status::OPERATION_DENIED.do_not_retry());
            }
            doomed.iter().try_for_each(|allocated| allocated.is_at_rest())?;
            doomed.iter().map(|allocated| allocated.namespace.nsid).collect()
        };
        let mut next = saved.clone();
        next.allocations.retain(|record| !doomed.contains(&record.shape.nsid));
        next.forget_reservations_of_what_is_gone();
        let changed = self.commit(&mut saved, next, |contents, generation| {
            doomed.iter().for_each(|&nsid| contents.remove(nsid, generation));
        });
        changed.map_err(|error| self.report(&error))
    }

    /// Attaches namespace `nsid` to `controllers` (Base 5.22).
    pub(crate) fn attach(&self, nsid: u32, controllers: &[u16]) -> Result<u64, Status> {
        self.change_attachment(nsid, controllers, |record, controllers| {
            if controllers.iter().any(|id| record.attached.contains(id)) {
                return Err(Status::NAMESPACE_ALREADY_ATTACHED.do_not_retry());
            }
            if !record.shared && record.attached.len() + controllers.len() > 1 {
                return Err(Status::NAMESPACE_IS_PRIVATE.do_not_retry());
            }
            record.attached.extend(controllers);
            record.attached.sort_unstable();
            Ok(())
        })
    }

    /// Detaches namespace `nsid` from `controllers` (Base 5.22). Returns the generation with which it is complete.
    pub(crate) fn detach(&self, nsid: u32, controllers: &[u16]) -> Result<u64, Status> {
        self.change_attachment(nsid, controllers, |record, controllers| {
            if !controllers.iter().all(|id| record.attached.contains(id)) {
                return Err(Status::NAMESPACE_NOT_ATTACHED.do_not_retry());
            }
            record.attached.retain(|id| !controllers.contains(id));
            Ok(())
        })
    }

    fn change_attachment(
        &self,
        nsid: u32,
        controllers: &[u16],
        change: impl FnOnce(&mut AllocatedState, &[u16]) -> Result<(), Status>,
    ) -> Result<u64, Status> {
        let mut saved = self.saved();
        {
            let contents = self.contents();
            contents.find(nsid)?.is_at_rest()?;
            let ascending = controllers.is_sorted_by(|id, next| id < next);
            if controllers.is_empty()
                || !ascending
                || !controllers.iter().all(|&id| contents.has_controller(id))
            {
                return Err(Status::CONTROLLER_LIST_INVALID.do_not_retry());
            }
        }
        let mut next = saved.clone();
        let record = next.allocations.get_mut(nsid).ok_or(Status::INTERNAL_ERROR)?;
        change(record, controllers)?;
        record.attached_count = record.attached.len() as u32;
        let attached: BTreeSet<u16> = record.attached.iter().copied().collect();
        let changed = self.commit(&mut saved, next, |contents, _| {
            if let Some(allocated) = contents.namespaces[nsid as usize - 1].as_mut() {
                allocated.attached = attached;
            }
        });
        changed.map_err(|error| self.report(&error))
    }

    /// The host of this process is at fault: the guest learns only that it did not work.
    fn report(&self, error: &Error) -> Status {
        let source = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
        log::error!("{error}{source}");
        Status::INTERNAL_ERROR
    }
}
