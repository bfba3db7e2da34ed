//! The allocated namespaces of a subsystem in a controller's saved state, which is not trusted.

use std::collections::BTreeSet;

use crate::Error;
use crate::allocated::{Allocated, reopen};
use crate::config::MAX_NAMESPACES;
use crate::store::{AllocatedState, AllocationsState};
use crate::subsystem::Subsystem;

fn refuse<T>(nsid: u32, reason: impl Into<String>) -> Result<T, Error> {
    Err(Error::Namespace { nsid, reason: reason.into() })
}

impl Subsystem {
    /// What a saved controller `id` says of its subsystem: nothing if that is what is attached to it, for good.
    pub(crate) fn to_state(&self, id: u16) -> Option<AllocationsState> {
        // Looked at in place: a copy of hundreds of namespaces that is not saved would cost more than all that is.
        let is_own = |namespace: &AllocatedState| namespace.attached == [id];
        let says_nothing =
            !self.is_managed() && !self.is_shared() && self.saved().allocations.namespaces.iter().all(is_own);
        (!says_nothing).then(|| self.allocations())
    }

    /// Takes over what a saved controller says. Images of created namespaces that are not here yet are looked at, and not held.
    ///
    /// # Errors
    /// [`Error::Namespace`], [`Error::NamespaceImage`]: one of them is not here, or is another. [`Error::State`]: the other side had a
    /// store, or none.
    pub(crate) fn load(&self, state: Option<&AllocationsState>) -> Result<(), Error> {
        let mut saved = self.saved();
        let Some(state) = state else {
            if self.is_managed() {
                let reason = "the guest could not manage its namespaces there, but could here";
                return Err(Error::State { field: "allocations".to_owned(), value: 0, reason });
            }
            return Ok(());
        };
        if self.allocations_of(&saved) == *state {
            return Ok(());
        }
        let mut table: Vec<Option<Allocated>> = (0..MAX_NAMESPACES).map(|_| None).collect();
        {
            let contents = self.contents();
            for record in &state.namespaces {
                let nsid = record.shape.nsid;
                check_attached(record)?;
                let place = match table.get_mut((nsid as usize).wrapping_sub(1)) {
                    Some(place @ None) => place,
                    _ => return refuse(nsid, "it is there twice, or no such identifier can be"),
                };
                *place = Some(match contents.find(nsid) {
                    Ok(here) if !record.created || here.namespace.uuid == record.shape.uuid => {
                        matching(here, record)?
                    }
                    _ if record.created => reopen(self.store.as_deref(), record)?,
                    _ => return refuse(nsid, "it is missing here"),
                });
            }
            let only_here = contents.allocated().find(|here| {
                !here.created
                    && !state.namespaces.iter().any(|record| record.shape.nsid == here.namespace.nsid)
            });
            if let Some(here) = only_here {
                return refuse(here.namespace.nsid, "it is here only");
            }
        }
        saved.allocations = state.clone();
        self.replace(table);
        Ok(())
    }
}

fn check_attached(record: &AllocatedState) -> Result<(), Error> {
    if record.attached.is_sorted_by(|id, next| id < next) {
        Ok(())
    } else {
        refuse(record.shape.nsid, "the controllers that it is attached to are not in order")
    }
}

/// The namespace that is here, attached as `record` says, if it is the same.
fn matching(here: &Allocated, record: &AllocatedState) -> Result<Allocated, Error> {
    let own = here.to_state();
    let nsid = record.shape.nsid;
    if own.created != record.created {
        let who = |created| if created { "the guest" } else { "the host" };
        return refuse(nsid, format!("it is of {} there, of {} here", who(record.created), who(own.created)));
    }
    if own.shared != record.shared {
        return refuse(nsid, format!("shared: {} there, {} here", record.shared, own.shared));
    }
    if own.shape != record.shape
        && let Some(difference) = record.shape.differences(&own.shape).into_iter().next()
    {
        return refuse(nsid, difference);
    }
    let attached: BTreeSet<u16> = record.attached.iter().copied().collect();
    let mut allocated = Allocated { namespace: here.namespace.clone(), created: here.created, attached };
    allocated.protect_as(record)?;
    allocated.mark_as(record)?;
    Ok(allocated)
}
