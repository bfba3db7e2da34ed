//! An NVM subsystem (Base 1.5): the namespaces that are allocated, and the controllers that they are attached to.
//!
//! ```text
//! Subsystem: allocated namespaces by NSID (holes are normal) -> attached to controllers
//!     | generation                                            ^ join
//! Controller (worker 0): sees a new generation -> replaces its own table and those of its workers, under their locks
//! ```
//!
//! What commands address is a copy: every worker has the attached namespaces of its controller, so that no I/O command takes a lock or
//! touches a reference count that is shared with another worker. A change is made here first and followed by each controller on
//! its own worker 0, where nothing of the controller is in the midst of an admin command.
//!
//! A controller that is alone in its subsystem says nothing of sharing: CMIC and NMIC are 0.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use nvme_spec::NSID_BROADCAST;

use crate::Error;
use crate::config::{MAX_NAMESPACES, NamespaceConfig};
use crate::exclusion::Exclusion;
use crate::namespace::{self, Namespace, NamespaceTable};
use crate::shared::{Host, lock};

/// Controller identifier of the only controller of a subsystem that is not shared.
pub(crate) const FIRST_CONTROLLER_ID: u16 = 0;

/// See the module's text. Its lock is taken after those of admin and workers, and no other is taken while it is held.
pub struct Subsystem {
    /// Serial number that identifiers are made from.
    serial: String,
    /// Several controllers may attach a namespace (Identify Namespace NMIC bit 0).
    shared: bool,
    /// Counts changes of what is attached, so that a controller that has seen the last one takes no lock.
    generation: AtomicU64,
    contents: Mutex<Contents>,
    /// Ranges that fused operations have for themselves.
    pub(crate) exclusion: Exclusion,
}

/// What the lock protects.
pub(crate) struct Contents {
    /// By NSID less one.
    pub namespaces: Box<[Option<Allocated>]>,
    /// By controller identifier.
    controllers: BTreeMap<u16, Arc<dyn Host>>,
}

/// A namespace that exists (Base 3.2.1, "allocated"), attached or not.
pub(crate) struct Allocated {
    pub namespace: Namespace,
    /// Identifiers of the controllers that it is attached to.
    pub attached: BTreeSet<u16>,
}

impl Subsystem {
    /// A subsystem with `namespaces`, which are attached to every controller that joins. `serial` is what their identifiers are made
    /// from; `shared` says that more than one controller may join.
    ///
    /// # Errors
    /// [`Error::Namespace`] for the first that cannot be.
    pub fn new(serial: &str, namespaces: &[NamespaceConfig], shared: bool) -> Result<Arc<Self>, Error> {
        let mut table: Vec<Option<Allocated>> = (0..MAX_NAMESPACES).map(|_| None).collect();
        for config in namespaces {
            let namespace = Namespace::new(config, serial)?;
            let place = &mut table[namespace.nsid as usize - 1];
            if place.is_some() {
                return Err(Error::Namespace {
                    nsid: config.nsid,
                    reason: "the identifier is used twice".to_owned(),
                });
            }
            *place = Some(Allocated { namespace, attached: BTreeSet::new() });
        }
        Ok(Arc::new(Self {
            serial: serial.to_owned(),
            shared,
            generation: AtomicU64::new(0),
            contents: Mutex::new(Contents { namespaces: table.into(), controllers: BTreeMap::new() }),
            exclusion: Exclusion::default(),
        }))
    }

    /// Adds controller `id`, whose worker 0 `host` wakes when something changes, and attaches every namespace to it.
    ///
    /// # Errors
    /// [`Error::ControllerId`]: the identifier is taken, or another controller is there and nothing is shared.
    pub(crate) fn join(&self, id: u16, host: Arc<dyn Host>) -> Result<(), Error> {
        let mut contents = self.contents();
        let alone = contents.controllers.is_empty();
        if contents.controllers.contains_key(&id) || !alone && !self.shared {
            return Err(Error::ControllerId { serial: self.serial.clone(), id });
        }
        contents.controllers.insert(id, host);
        for allocated in contents.namespaces.iter_mut().flatten() {
            allocated.attached.insert(id);
        }
        Ok(())
    }

    /// Removes controller `id`, which is dropped.
    pub(crate) fn leave(&self, id: u16) {
        let mut contents = self.contents();
        contents.controllers.remove(&id);
        for allocated in contents.namespaces.iter_mut().flatten() {
            allocated.attached.remove(&id);
        }
    }

    /// Whether more than one controller may be here.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Identifiers of the controllers, in order.
    #[must_use]
    pub fn controllers(&self) -> Vec<u16> {
        self.contents().controllers.keys().copied().collect()
    }

    /// Changes the namespace `scope`, or with the broadcast identifier all that are allocated. The controllers follow.
    pub(crate) fn change(&self, scope: u32, change: impl Fn(&mut Namespace)) {
        let mut contents = self.contents();
        for allocated in contents.namespaces.iter_mut().flatten() {
            if scope == NSID_BROADCAST || scope == allocated.namespace.nsid {
                change(&mut allocated.namespace);
            }
        }
        self.generation.fetch_add(1, Ordering::SeqCst);
        contents.controllers.values().for_each(|host| host.wake(0));
    }

    /// Counts what changes in [`Subsystem::attached_to`].
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The namespaces that are attached to controller `id`, and the generation that they are of.
    pub(crate) fn attached_to(&self, id: u16) -> (u64, NamespaceTable) {
        let contents = self.contents();
        let attached = |place: &Option<Allocated>| {
            let allocated = place.as_ref().filter(|allocated| allocated.attached.contains(&id))?;
            Some(Arc::new(allocated.namespace.clone()))
        };
        let table = contents.namespaces.iter().map(attached).collect();
        (self.generation.load(Ordering::SeqCst), table)
    }

    /// What is allocated, while nobody changes it.
    pub(crate) fn contents(&self) -> MutexGuard<'_, Contents> {
        lock(&self.contents)
    }
}

impl Contents {
    /// The allocated namespaces in the order of their identifiers.
    pub fn allocated(&self) -> impl Iterator<Item = &Allocated> {
        self.namespaces.iter().flatten()
    }

    /// The namespace of a command that needs an allocated one: the same answers as [`namespace::find`].
    pub fn find(&self, nsid: u32) -> Result<&Allocated, nvme_spec::Status> {
        namespace::slot(&self.namespaces, nsid)
    }
}
