//! What the host may do to its own namespaces while the guest runs. What the guest has created is the guest's.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::Error;
use crate::allocated::Allocated;
use crate::config::NamespaceConfig;
use crate::namespace::Namespace;
use crate::subsystem::Subsystem;

fn refuse<T>(nsid: u32, reason: impl Into<String>) -> Result<T, Error> {
    Err(Error::Namespace { nsid, reason: reason.into() })
}

impl Subsystem {
    /// Adds a namespace of the host's, attached to every controller; their hosts are told by an event. Its image is held.
    ///
    /// # Errors
    /// [`Error::Namespace`]: it cannot be, the identifier is taken, or an operation has all namespaces. [`Error::Store`].
    pub fn add(&self, config: &NamespaceConfig) -> Result<(), Error> {
        self.add_for(config, &self.controllers())
    }

    /// As [`Subsystem::add`], attached to these controllers only.
    ///
    /// # Errors
    /// As [`Subsystem::add`]; [`Error::Namespace`]: one of the controllers is not here.
    pub fn add_for(&self, config: &NamespaceConfig, controllers: &[u16]) -> Result<(), Error> {
        let nsid = config.nsid;
        let namespace = Namespace::new(config, &self.serial, self.is_shared())?;
        let mut saved = self.saved();
        if self.can_grow().is_err() {
            return refuse(
                nsid,
                "a format or sanitize operation has all namespaces, or failed, and would erase it too",
            );
        }
        if !self.contents().is_free(nsid) {
            return refuse(
                nsid,
                "the identifier is taken, or commands are still in flight at its last namespace",
            );
        }
        let attached: BTreeSet<u16> = controllers.iter().copied().collect();
        if let Some(id) = attached.iter().find(|&&id| !self.contents().has_controller(id)) {
            return refuse(nsid, format!("it is to be attached to controller {id}, which is not there"));
        }
        let allocated = Allocated { namespace, created: false, attached };
        let mut next = saved.clone();
        next.allocations.put(allocated.to_state());
        self.commit(&mut saved, next, |contents, _| contents.namespaces[nsid as usize - 1] = Some(allocated))
            .map(drop)
    }

    /// Takes a namespace of the host's away from every controller, and waits up to `patience` until no command is at its image, which
    /// is let go then. `false`: commands are still there; it goes when they end, and is gone for the guest already.
    ///
    /// # Errors
    /// [`Error::Namespace`]: there is none, it is the guest's, or an operation of a controller has it. [`Error::Store`].
    pub fn remove(&self, nsid: u32, patience: Duration) -> Result<bool, Error> {
        let generation = {
            let mut saved = self.saved();
            self.check_is_hosts(nsid)?;
            let mut next = saved.clone();
            next.allocations.retain(|record| record.shape.nsid != nsid);
            next.forget_reservations_of_what_is_gone();
            self.commit(&mut saved, next, |contents, generation| contents.remove(nsid, generation))?
        };
        Ok(self.wait_until_followed(generation, Instant::now() + patience))
    }

    /// Takes over the size of a namespace's image, which was made larger; with `capacity_bytes` it is made so large here. Returns the
    /// size in bytes. Hosts are told by an event.
    ///
    /// # Errors
    /// [`Error::Namespace`]: there is none, it is the guest's, an operation of a controller has it, or the size is not one that it can
    /// grow to. [`Error::Resize`]: the image cannot be grown. [`Error::Store`].
    pub fn resize(&self, nsid: u32, capacity_bytes: Option<u64>) -> Result<u64, Error> {
        let mut saved = self.saved();
        let (backend, block_shift, before_bytes) = {
            self.check_is_hosts(nsid)?;
            let contents = self.contents();
            let Ok(Allocated { namespace, .. }) = contents.find(nsid) else {
                return refuse(nsid, "there is none");
            };
            if namespace.metadata.is_some() {
                return refuse(nsid, "its blocks have metadata, which are behind them and cannot be moved");
            }
            (namespace.backend.clone(), namespace.block_shift, namespace.image_bytes)
        };
        let check = |bytes: u64| {
            if bytes < before_bytes {
                return refuse(nsid, format!("it has {before_bytes} bytes and cannot shrink to {bytes}"));
            }
            if !bytes.is_multiple_of(1 << block_shift) {
                let block_bytes = 1 << block_shift;
                return refuse(
                    nsid,
                    format!("{bytes} bytes are not a whole number of blocks of {block_bytes} bytes"),
                );
            }
            Ok(bytes)
        };
        capacity_bytes.map(check).transpose()?;
        let grown = backend.grow(capacity_bytes).map_err(|source| Error::Resize { nsid, source })?;
        let bytes = check(grown)?;
        if bytes == before_bytes {
            return Ok(bytes);
        }
        let blocks = bytes >> block_shift;
        let mut next = saved.clone();
        if let Some(record) = next.allocations.get_mut(nsid) {
            record.shape.blocks = blocks;
        }
        self.commit(&mut saved, next, |contents, _| {
            if let Some(Some(allocated)) = contents.namespaces.get_mut((nsid as usize).wrapping_sub(1)) {
                (allocated.namespace.blocks, allocated.namespace.image_bytes) = (blocks, bytes);
            }
        })?;
        Ok(bytes)
    }

    fn check_is_hosts(&self, nsid: u32) -> Result<(), Error> {
        let contents = self.contents();
        match contents.find(nsid) {
            Err(_) => refuse(nsid, "there is none"),
            Ok(allocated) if allocated.created => {
                refuse(nsid, "the guest has created it, so it is the guest's")
            }
            Ok(allocated) if allocated.is_at_rest().is_err() => {
                refuse(nsid, "a format or sanitize operation is in progress")
            }
            Ok(_) => Ok(()),
        }
    }
}
