//! An NVM subsystem (Base 1.5): the namespaces that are allocated, and the controllers that they are attached to.
//!
//! ```text
//! management.rs: create, delete, attach, detach -> Subsystem: allocated namespaces by NSID (holes are normal) -> store.rs
//!     | generation + 1, wake                                       ^ join                  ^ followed(generation)
//! follow.rs, on worker 0 of every controller: replaces its table and those of its workers, under their locks; waits for the commands
//!     that went to a namespace which is gone or smaller now
//! ```
//!
//! What commands address is a copy: every worker has the attached namespaces of its controller, so that no I/O command takes a lock or
//! touches a reference count that is shared with another worker. A change is made here first and followed by each controller on
//! its own worker 0, where nothing of the controller is in the midst of an admin command. It is complete when all have followed:
//! then no command is at the image of a namespace that was deleted, and the image can go.
//!
//! What hosts do to each other by way of the namespaces they share is here too: reservations ([`crate::reservations`]), the access that
//! each controller gives ([`crate::ana`]), and the reset of all controllers by one. The reservations are in the section of every
//! controller: the first that is loaded brings them, the others are checked against it.
//!
//! A controller that is alone in its subsystem says nothing of sharing: CMIC and NMIC are 0.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use block::Backend;
use nvme_spec::{NSID_BROADCAST, Status};

use crate::Error;
use crate::allocated::{Allocated, reopen};
use crate::ana::{ACCESS_GROUPS, AccessState, AccessTable};
use crate::command::format::Format;
use crate::common::CommonPlace;
use crate::config::{MAX_NAMESPACES, NamespaceConfig};
use crate::exclusion::Exclusion;
use crate::inventory::NamespaceShape;
use crate::namespace::{self, Namespace, NamespaceTable, WriteProtection};
use crate::pmr::Regions;
use crate::reservations::Reservations;
use crate::restore::reservations::loaded_reservations;
use crate::save::reservations::kept_reservations;
use crate::shared::{Host, lock};
use crate::state::SmartState;
use crate::store::{AllocationsState, ControllerRecord, KeptReservationsState, Store, SubsystemState};

/// Controller identifier of the only controller of a subsystem that is not shared.
pub(crate) const FIRST_CONTROLLER_ID: u16 = 0;

/// See the module's text. `saved` is locked before `contents`; both after admin and workers, and while they are held only the locks of
/// reservations, of regions, of claims, of what the controllers have in common, and of the store.
pub struct Subsystem {
    /// Serial number that identifiers are made from.
    pub(crate) serial: String,
    /// Several controllers may be here.
    shared: bool,
    /// Where its state and created namespaces are kept; without one the guest cannot manage namespaces.
    pub(crate) store: Option<Arc<dyn Store>>,
    /// Counts changes of what is attached, so that a controller that has seen the last one takes no lock.
    generation: AtomicU64,
    /// What the store has, or would have. Held while a change is made, so that they come one after another; a controller that only
    /// looks does not wait for the store.
    saved: Mutex<SubsystemState>,
    /// The store has an older one.
    unwritten: AtomicBool,
    contents: Mutex<Contents>,
    /// Ranges that fused operations have for themselves.
    pub(crate) exclusion: Exclusion,
    /// Tells threads of the host that a controller has.
    has_followed: Condvar,
    pub(crate) reservations: Reservations,
    pub(crate) access: AccessTable,
    pub(crate) common: CommonPlace,
    /// Persistent memory regions of its controllers.
    pub(crate) regions: Regions,
}

/// What serves commands.
pub(crate) struct Contents {
    /// By NSID less one.
    pub namespaces: Box<[Option<Allocated>]>,
    /// By controller identifier.
    controllers: BTreeMap<u16, Member>,
    /// Controllers that ever joined.
    joined: u64,
    /// Their identifiers.
    known: BTreeSet<u16>,
    /// Namespaces of the host's that the guest has not had before.
    fresh: BTreeSet<u32>,
    /// Controllers that a namespace of the host's is for; all where there is no entry.
    meant: BTreeMap<u32, BTreeSet<u16>>,
    /// Deleted, but a controller may still have commands at the image.
    removed: Vec<Removed>,
}

struct Member {
    host: Arc<dyn Host>,
    /// The last generation whose tables its workers have, with nothing in flight at a namespace that it took away.
    followed: u64,
    ticket: u64,
}

struct Removed {
    namespace: Namespace,
    /// Its image is the store's.
    created: bool,
    generation: u64,
}

impl Subsystem {
    /// A subsystem with `namespaces`, which are attached to every controller that joins. `serial` is what their identifiers are made
    /// from; `shared` says that more than one controller may join.
    ///
    /// # Errors
    /// [`Error::Namespace`] for the first that cannot be.
    pub fn new(serial: &str, namespaces: &[NamespaceConfig], shared: bool) -> Result<Arc<Self>, Error> {
        Self::build(serial, namespaces, shared, None, SubsystemState::default())
    }

    /// A subsystem that is powered on with what `store` has kept of it: `saved` is the state that was written last, if any was. What
    /// the guest created is there again; `namespaces` are the host's, and attached as the guest left them.
    ///
    /// # Errors
    /// [`Error::Namespace`] for the first that cannot be: a created one has lost its image, or has the identifier of another.
    pub fn with_store(
        serial: &str,
        namespaces: &[NamespaceConfig],
        shared: bool,
        store: Arc<dyn Store>,
        saved: Option<SubsystemState>,
    ) -> Result<Arc<Self>, Error> {
        let mut saved = saved.unwrap_or_default();
        for record in &mut saved.controllers {
            record.smart.power_cycles = record.smart.power_cycles.saturating_add(1);
            if record.running.take().is_some() {
                record.smart.count_unsafe_shutdown();
            }
        }
        for record in &mut saved.allocations.namespaces {
            let until_power_cycle = WriteProtection::UntilPowerCycle.to_value();
            record.protection.take_if(|protection| u32::from(protection.value) == until_power_cycle);
        }
        Self::build(serial, namespaces, shared, Some(store), saved)
    }

    fn build(
        serial: &str,
        namespaces: &[NamespaceConfig],
        shared: bool,
        store: Option<Arc<dyn Store>>,
        mut saved: SubsystemState,
    ) -> Result<Arc<Self>, Error> {
        let refuse = |nsid, reason: &str| Err(Error::Namespace { nsid, reason: reason.to_owned() });
        let mut table: Vec<Option<Allocated>> = (0..MAX_NAMESPACES).map(|_| None).collect();
        let mut fresh = BTreeSet::new();
        for config in namespaces {
            let nsid = config.nsid;
            let namespace = Namespace::new(config, serial, shared)?;
            let place = &mut table[nsid as usize - 1];
            if place.is_some() {
                return refuse(nsid, "the identifier is used twice");
            }
            let record = saved.allocations.get_mut(nsid);
            if record.as_ref().is_some_and(|record| record.created) {
                return refuse(
                    nsid,
                    "the guest has created one with this identifier: give the host's another",
                );
            }
            if record.is_none() {
                fresh.insert(nsid);
            }
            let attached = record.iter().flat_map(|record| record.attached.iter().copied()).collect();
            let mut allocated = Allocated { namespace, created: false, attached };
            if let Some(record) = record {
                // The guest's format counts for more than how it is configured.
                if let Some(format) = record.shape.format() {
                    allocated.namespace.set_format(&format);
                }
                allocated.protect_as(record)?;
                // What is there now may be another image, which has none.
                if record.shape == NamespaceShape::of(&allocated.namespace) {
                    allocated.mark_as(record)?;
                }
            }
            *place = Some(allocated);
        }
        // A namespace that the host gives no more is forgotten.
        saved.allocations.retain(|record| record.created);
        for record in &saved.allocations.namespaces {
            let allocated = reopen(store.as_deref(), record)?;
            match table.get_mut((record.shape.nsid as usize).wrapping_sub(1)) {
                Some(place @ None) => *place = Some(allocated),
                _ => {
                    return refuse(
                        record.shape.nsid,
                        "the saved state has it twice, or no such identifier can be",
                    );
                }
            }
        }
        for allocated in table.iter().flatten() {
            saved.allocations.put(allocated.to_state());
        }
        saved.forget_reservations_of_what_is_gone();
        let reservations = Reservations::default();
        if let Some(kept) = &saved.reservations {
            reservations.table().namespaces = loaded_reservations(&kept.reservations)?;
        }
        Ok(Arc::new(Self {
            serial: serial.to_owned(),
            shared,
            store,
            generation: AtomicU64::new(0),
            saved: Mutex::new(saved),
            unwritten: AtomicBool::new(true),
            contents: Mutex::new(Contents {
                namespaces: table.into(),
                controllers: BTreeMap::new(),
                joined: 0,
                known: BTreeSet::new(),
                fresh,
                meant: BTreeMap::new(),
                removed: Vec::new(),
            }),
            exclusion: Exclusion::default(),
            has_followed: Condvar::new(),
            reservations,
            access: AccessTable::default(),
            common: CommonPlace::new(),
            regions: Regions::default(),
        }))
    }

    /// Says which controllers a namespace of the host's is for: it is attached to these only when they join for the first time.
    pub fn attach_at_first(&self, nsid: u32, controllers: impl IntoIterator<Item = u16>) {
        self.contents().meant.insert(nsid, controllers.into_iter().collect());
    }

    /// Adds controller `id`, whose worker 0 `host` wakes when something changes. If it was never here, or a namespace of the host's was
    /// not, the namespaces that are for it are attached to it. A controller of that identifier that is here
    /// has been reset by the machine around it, and is succeeded. Returns a ticket for [`Subsystem::leave`], and what it goes on with.
    ///
    /// # Errors
    /// [`Error::ControllerId`]: another controller is there and nothing is shared; or there were too many.
    pub(crate) fn join(&self, id: u16, host: Arc<dyn Host>) -> Result<(u64, ControllerRecord), Error> {
        let mut saved = lock(&self.saved);
        let mut contents = self.contents();
        let refused = Error::ControllerId { serial: self.serial.clone(), id };
        let alone = contents.controllers.keys().all(|&other| other == id);
        let known = saved.controllers.iter().any(|record| record.id == id);
        if !alone && !self.shared {
            return Err(refused);
        }
        let record = saved.controller(id).ok_or(refused)?.clone();
        let is_first = contents.known.insert(id);
        let Contents { namespaces, fresh, meant, .. } = &mut *contents;
        let is_new = |nsid| !known || is_first && fresh.contains(&nsid);
        let is_for_it = |nsid| meant.get(&nsid).is_none_or(|meant| meant.contains(&id));
        for allocated in namespaces.iter_mut().flatten().filter(|allocated| !allocated.created) {
            let nsid = allocated.namespace.nsid;
            if is_new(nsid) && is_for_it(nsid) && allocated.attached.insert(id) {
                saved.allocations.put(allocated.to_state());
                self.unwritten.store(true, Ordering::Release);
            }
        }
        self.unwritten.fetch_or(!known, Ordering::AcqRel);
        self.common.give_up(id);
        if !is_first {
            // The machine around it was reset, and it with that.
            self.common.lock().firmware.reset();
        }
        let followed = self.generation();
        contents.joined += 1;
        let ticket = contents.joined;
        contents.controllers.insert(id, Member { host, followed, ticket });
        Ok((ticket, record))
    }

    /// Removes controller `id`, which is dropped; `smart` is what it has counted, and `forget` takes away what else is here of it. Its
    /// namespaces stay attached to its identifier. Nothing is done for one that has been succeeded, and no successor comes meanwhile.
    pub(crate) fn leave(&self, id: u16, ticket: u64, smart: SmartState, forget: impl FnOnce()) {
        {
            let mut saved = self.saved();
            let mut contents = self.contents();
            if contents.controllers.get(&id).is_none_or(|member| member.ticket != ticket) {
                return;
            }
            contents.controllers.remove(&id);
            drop(contents);
            if let Some(record) = saved.controller(id) {
                record.smart = smart;
                self.unwritten.store(true, Ordering::Release);
            }
            forget();
            self.common.give_up(id);
        }
        self.complete();
    }

    /// The format that controller `id` has to go on with: nobody waits for its answer any more.
    pub(crate) fn format_of(&self, id: u16) -> Option<Format> {
        let format = self.common.lock().formats.get(&id).copied()?;
        Some(Format { cid: None, quiet: false, ..format })
    }

    /// Has every controller look at what there is to do.
    pub(crate) fn wake_all(&self) {
        let hosts = self.contents().hosts();
        hosts.iter().for_each(|host| host.wake(0));
    }

    /// Whether more than one controller may be here.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Sets how controller `controller` gives access to the namespaces of ANA group `group`, which its guest is told (Base 8.1): that of
    /// namespace n is (n - 1) mod [`ACCESS_GROUPS`] + 1.
    ///
    /// # Errors
    /// [`Error::Access`]: there is no such controller or group, or nothing is shared and so no other way.
    pub fn set_access(&self, controller: u16, group: u32, state: AccessState) -> Result<(), Error> {
        if self.shared && self.access.set(controller, group, state) {
            return Ok(());
        }
        Err(Error::Access { serial: self.serial.clone(), controller, group })
    }

    /// How controller `controller` gives access to each ANA group, from the first on.
    #[must_use]
    pub fn access(&self, controller: u16) -> [AccessState; ACCESS_GROUPS as usize] {
        self.access.of(controller).groups.map(|(state, _)| state)
    }

    /// An NVM subsystem reset by controller `id` is one of them all (Base 3.7.1).
    pub(crate) fn reset_others(&self, id: u16) {
        self.reservations.reset_others(id);
    }

    /// What controllers say that the serial number of the subsystem is (Identify Controller SN), and what its name is made from.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// Whether reservations can survive the loss of power.
    pub(crate) fn keeps_reservations(&self) -> bool {
        self.store.is_some()
    }

    /// Writes the reservations that survive the loss of power: one of them has changed.
    ///
    /// # Errors
    /// [`Error::Store`]: the store has what it had.
    pub(crate) fn keep_reservations(&self) -> Result<(), Error> {
        // Taken while nobody else writes, so that the newest is written last.
        self.update(|state| {
            let kept = kept_reservations(&self.reservations.table());
            state.reservations = kept.map(|reservations| KeptReservationsState { reservations });
            state.forget_reservations_of_what_is_gone();
        })
    }

    /// Whether the guest may create, delete, attach and detach namespaces.
    #[must_use]
    pub fn is_managed(&self) -> bool {
        self.store.is_some()
    }

    /// Identifiers of the controllers, in order.
    #[must_use]
    pub fn controllers(&self) -> Vec<u16> {
        self.contents().controllers.keys().copied().collect()
    }

    /// Total and unallocated NVM capacity in bytes (Identify Controller TNVMCAP, UNVMCAP).
    pub(crate) fn capacity_bytes(&self) -> (u128, u128) {
        let contents = self.contents();
        let size = |created: bool| -> u128 {
            let namespaces = contents.allocated().filter(|allocated| allocated.created == created);
            namespaces.map(|allocated| allocated.namespace.size_bytes()).sum()
        };
        // A deleted namespace has its place until its image is gone.
        let removed = contents.removed.iter().filter(|removed| removed.created);
        let removed: u128 = removed.map(|removed| removed.namespace.size_bytes()).sum();
        let used = size(true) + removed;
        let quota = self.store.as_ref().map_or(0, |store| u128::from(store.capacity_bytes()));
        // A quota that was made smaller than what is used takes nothing away.
        (size(false) + quota.max(used), quota.saturating_sub(used))
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
        (self.generation(), table)
    }

    /// All namespaces, attached or not.
    pub(crate) fn allocated(&self) -> NamespaceTable {
        let place = |place: &Option<Allocated>| Some(Arc::new(place.as_ref()?.namespace.clone()));
        self.contents().namespaces.iter().map(place).collect()
    }

    /// Controller `id` works with the namespaces of `generation`, and nothing of it is where they are not any more.
    pub(crate) fn followed(&self, id: u16, generation: u64) {
        if let Some(member) = self.contents().controllers.get_mut(&id) {
            member.followed = generation;
        }
        self.complete();
    }

    /// Whether every controller has followed `generation`.
    pub(crate) fn is_followed(&self, generation: u64) -> bool {
        self.contents().followed() >= generation
    }

    /// Writes the state with the counters of controller `id`, and whether it has to be shut down, unless the store has it.
    ///
    /// # Errors
    /// [`Error::Store`]: it goes with whatever is written next.
    pub(crate) fn persist(&self, id: u16, smart: SmartState, is_running: bool) -> Result<(), Error> {
        self.note(id, smart, is_running);
        self.update(|_| ())
    }

    /// Whatever is written next has these counters of controller `id`, and whether it has to be shut down.
    pub(crate) fn note(&self, id: u16, smart: SmartState, is_running: bool) {
        let mut saved = self.saved();
        let before = saved.clone();
        saved.note(id, smart, is_running);
        self.unwritten.fetch_or(*saved != before, Ordering::AcqRel);
    }

    /// Changes what is kept without power, and nothing that serves commands: the store has it when this returns.
    ///
    /// # Errors
    /// [`Error::Store`]: nothing has changed.
    pub(crate) fn update(&self, change: impl FnOnce(&mut SubsystemState)) -> Result<(), Error> {
        let mut saved = self.saved();
        let mut next = saved.clone();
        change(&mut next);
        if next != *saved || self.unwritten.load(Ordering::Acquire) {
            self.write(&next)?;
            *saved = next;
        }
        Ok(())
    }

    /// For who holds `saved`, which becomes `state` if this succeeds.
    fn write(&self, state: &SubsystemState) -> Result<(), Error> {
        if let Some(store) = &self.store {
            let failed =
                |source| Error::Store { serial: self.serial.clone(), what: "write the state", source };
            store.write(state).map_err(failed)?;
        }
        self.unwritten.store(false, Ordering::Release);
        Ok(())
    }

    /// Waits until every controller has followed `generation`; `false` at `deadline`.
    pub(crate) fn wait_until_followed(&self, generation: u64, deadline: Instant) -> bool {
        let patience = deadline.saturating_duration_since(Instant::now());
        let (contents, _) = self
            .has_followed
            .wait_timeout_while(self.contents(), patience, |contents| contents.followed() < generation)
            .unwrap_or_else(PoisonError::into_inner);
        contents.followed() >= generation
    }

    /// Lets go of deleted namespaces that no controller uses any more, and tells all controllers that something may be complete.
    fn complete(&self) {
        let (gone, hosts) = {
            let mut contents = self.contents();
            let followed = contents.followed();
            let (gone, removed): (Vec<_>, _) = std::mem::take(&mut contents.removed)
                .into_iter()
                .partition(|removed| removed.generation <= followed);
            contents.removed = removed;
            // No controller has commands there any more that could reserve it again; nor has another namespace its identifier yet.
            gone.iter().for_each(|removed| self.reservations.forget(removed.namespace.nsid));
            (gone, contents.hosts())
        };
        for Removed { namespace, created, .. } in gone {
            let uuid = namespace.uuid;
            drop(namespace);
            if let Some(store) = self.store.as_ref().filter(|_| created) {
                store.remove(&uuid);
            }
        }
        hosts.iter().for_each(|host| host.wake(0));
        self.has_followed.notify_all();
    }

    /// Makes a change of what the store has, and then, with `apply`, of what serves commands: both or neither. Returns the generation
    /// that controllers have to follow.
    pub(crate) fn commit(
        &self,
        saved: &mut SubsystemState,
        next: SubsystemState,
        apply: impl FnOnce(&mut Contents, u64),
    ) -> Result<u64, Error> {
        self.write(&next)?;
        *saved = next;
        let (generation, hosts) = {
            let mut contents = self.contents();
            let generation = self.generation() + 1;
            apply(&mut contents, generation);
            self.generation.store(generation, Ordering::SeqCst);
            (generation, contents.hosts())
        };
        hosts.iter().for_each(|host| host.wake(0));
        // Without controllers nobody else does.
        self.complete_alone();
        Ok(generation)
    }

    /// Puts other namespaces in the place of all, for a subsystem that is not in use yet.
    pub(crate) fn replace(&self, table: Vec<Option<Allocated>>) {
        let mut contents = self.contents();
        contents.namespaces = table.into();
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Changes the namespace `scope`, or with the broadcast identifier all that are allocated, for who tells the store of it. The
    /// controllers follow.
    pub(crate) fn change(&self, scope: u32, change: impl Fn(&mut Namespace)) {
        let Ok(()) = self.change_if(scope, |_| Ok::<_, Infallible>(()), change);
    }

    /// As [`Subsystem::change`], if `allows` has nothing against it. What a controller knows of the namespaces is a copy, and of two that
    /// want the same by what they know one comes too late: what must not happen twice, or not be undone, is asked here, and who gets
    /// his way notes that before anyone else can ask.
    pub(crate) fn change_if<E>(
        &self,
        scope: u32,
        allows: impl FnOnce(&Contents) -> Result<(), E>,
        change: impl Fn(&mut Namespace),
    ) -> Result<(), E> {
        let mut saved = self.saved();
        let hosts = {
            let mut contents = self.contents();
            allows(&contents)?;
            for allocated in contents.namespaces.iter_mut().flatten() {
                if scope == NSID_BROADCAST || scope == allocated.namespace.nsid {
                    change(&mut allocated.namespace);
                    saved.allocations.put(allocated.to_state());
                }
            }
            self.unwritten.store(true, Ordering::Release);
            self.generation.fetch_add(1, Ordering::SeqCst);
            contents.hosts()
        };
        hosts.iter().for_each(|host| host.wake(0));
        Ok(())
    }

    /// Whether no operation has all namespaces, and none of that kind has failed: what came to them meanwhile would be erased along, while
    /// commands reach it. For who holds `saved`, without which none begins.
    pub(crate) fn can_grow(&self) -> Result<(), Status> {
        let common = self.common.lock();
        let formats_all = common.formats.values().any(|format| format.sweep.scope == NSID_BROADCAST);
        let refusal = common.sanitize.refusal();
        refusal.or(formats_all.then_some(Status::FORMAT_IN_PROGRESS)).map_or(Ok(()), Err)
    }

    fn complete_alone(&self) {
        if self.contents().controllers.is_empty() {
            self.complete();
        }
    }

    /// What the store has, while nobody changes it.
    pub(crate) fn saved(&self) -> MutexGuard<'_, SubsystemState> {
        lock(&self.saved)
    }

    /// What is allocated, while nobody changes it.
    pub(crate) fn contents(&self) -> MutexGuard<'_, Contents> {
        lock(&self.contents)
    }

    /// The images of the allocated namespaces, in the order of their identifiers, for the handover of their locks.
    #[must_use]
    pub fn images(&self) -> Vec<(u32, Arc<dyn Backend>)> {
        let contents = self.contents();
        let namespaces = contents.allocated().map(|allocated| &allocated.namespace);
        namespaces.map(|namespace| (namespace.nsid, Arc::clone(&namespace.backend))).collect()
    }

    /// The allocated namespaces as they are saved.
    #[must_use]
    pub fn allocations(&self) -> AllocationsState {
        self.allocations_of(&self.saved())
    }

    /// What is saved, with the blocks that are marked by now: I/O commands mark and write them.
    pub(crate) fn allocations_of(&self, saved: &SubsystemState) -> AllocationsState {
        let mut allocations = saved.allocations.clone();
        let contents = self.contents();
        // Both are in the order of their identifiers.
        let mut allocated = contents.allocated();
        for record in &mut allocations.namespaces {
            if let Some(here) = allocated.find(|here| here.namespace.nsid >= record.shape.nsid) {
                record.uncorrectable = here.marks();
            }
        }
        allocations
    }

    /// Writes the marked blocks of a namespace: they have changed.
    ///
    /// # Errors
    /// [`Error::Store`]: the store has what it had.
    pub(crate) fn keep_marks(&self, nsid: u32) -> Result<(), Error> {
        self.update(|state| {
            let contents = self.contents();
            if let (Ok(here), Some(record)) = (contents.find(nsid), state.allocations.get_mut(nsid)) {
                record.uncorrectable = here.marks();
            }
        })
    }
}

impl Contents {
    /// The allocated namespaces in the order of their identifiers.
    pub fn allocated(&self) -> impl Iterator<Item = &Allocated> {
        self.namespaces.iter().flatten()
    }

    /// The namespace of a command that needs an allocated one: the same answers as [`namespace::find`].
    pub fn find(&self, nsid: u32) -> Result<&Allocated, Status> {
        namespace::slot(&self.namespaces, nsid)
    }

    /// Whether controller `id` is here.
    pub fn has_controller(&self, id: u16) -> bool {
        self.controllers.contains_key(&id)
    }

    /// Whether nothing has the identifier, and no command in flight can mean what had it.
    pub fn is_free(&self, nsid: u32) -> bool {
        let place = self.namespaces.get((nsid as usize).wrapping_sub(1));
        place.is_some_and(Option::is_none)
            && !self.removed.iter().any(|removed| removed.namespace.nsid == nsid)
    }

    /// The lowest identifier that is free.
    pub fn free_nsid(&self) -> Option<u32> {
        (1..=self.namespaces.len() as u32).find(|&nsid| self.is_free(nsid))
    }

    /// Takes a namespace away; its image is used until all controllers have followed `generation`.
    pub fn remove(&mut self, nsid: u32, generation: u64) {
        let place = self.namespaces.get_mut((nsid as usize).wrapping_sub(1)).and_then(Option::take);
        let removed =
            place.map(|Allocated { namespace, created, .. }| Removed { namespace, created, generation });
        self.removed.extend(removed);
    }

    /// The generation that the slowest controller has followed.
    fn followed(&self) -> u64 {
        self.controllers.values().map(|member| member.followed).min().unwrap_or(u64::MAX)
    }

    fn hosts(&self) -> Vec<Arc<dyn Host>> {
        self.controllers.values().map(|member| Arc::clone(&member.host)).collect()
    }
}
