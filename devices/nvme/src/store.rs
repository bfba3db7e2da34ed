//! What of a subsystem outlives the process, and who keeps it.

use std::fmt::{self, Debug};
use std::io;
use std::sync::Arc;

use block::Backend;
use vmstate::VmState;

use crate::config::MAX_NAMESPACES;
use crate::inventory::NamespaceShape;
use crate::non_volatile::{KeptState, NonVolatile};
use crate::save::admin::kept_in_common;
use crate::state::{ReservationsState, SmartState, UncorrectableState};
use crate::subsystem::Subsystem;

/// Controllers that a subsystem can have.
pub const MAX_CONTROLLERS: usize = 256;

/// Why a [`Store`] could not do something.
pub type StoreError = Box<dyn std::error::Error + Send + Sync>;

/// Non-volatile memory of a subsystem: its state, and images for the namespaces that its guest creates.
///
/// Every call may block. They are made on the thread of a controller's worker 0 while it serves Namespace Management and the like, and
/// on threads that serve no I/O at all; never for an I/O command.
pub trait Store: Send + Sync + Debug {
    /// Bytes that created namespaces may have, all together.
    fn capacity_bytes(&self) -> u64;

    /// Makes the image of a created namespace: `size_bytes` of zeroes, held as [`Backend::acquire`] leaves it. It is on stable storage
    /// before a state is written that names it.
    ///
    /// # Errors
    /// It cannot be made; nothing is left of it.
    fn create(
        &self,
        uuid: &[u8; 16],
        size_bytes: u64,
        block_bytes: u32,
    ) -> Result<Arc<dyn Backend>, StoreError>;

    /// The image of a namespace that was created before. It is looked at and not held.
    ///
    /// # Errors
    /// There is none, or it has another size.
    fn open(
        &self,
        uuid: &[u8; 16],
        size_bytes: u64,
        block_bytes: u32,
    ) -> Result<Arc<dyn Backend>, StoreError>;

    /// Removes the image of a namespace that no written state names any more, and that nobody uses. What cannot be removed now goes at
    /// the next start.
    fn remove(&self, uuid: &[u8; 16]);

    /// Makes `state` what the next start finds. It finds this or the one before, whatever happens meanwhile.
    ///
    /// # Errors
    /// It finds the one before.
    fn write(&self, state: &SubsystemState) -> Result<(), StoreError>;
}

/// A subsystem without power.
#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme/subsystem", version = 1)]
pub struct SubsystemState {
    /// Namespaces.
    pub allocations: AllocationsState,
    /// Controllers that were ever there.
    pub controller_count: u32,
    /// By ascending identifier.
    #[vmstate(len = "controller_count", max = MAX_CONTROLLERS)]
    pub controllers: Vec<ControllerRecord>,
    /// Reservations that survive the loss of power, if there are any.
    #[vmstate(subsection)]
    pub reservations: Option<KeptReservationsState>,
}

/// Reservations without power.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/subsystem/reservations", version = 1)]
pub struct KeptReservationsState {
    /// They.
    pub reservations: ReservationsState,
}

/// The allocated namespaces (Base 3.2.1).
#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme/allocations", version = 1)]
pub struct AllocationsState {
    /// Namespaces ever created; the identifiers of a namespace are made from it, so that none is given twice.
    pub created_ever: u64,
    /// Namespaces.
    pub namespace_count: u32,
    /// By ascending identifier.
    #[vmstate(len = "namespace_count", max = MAX_NAMESPACES as usize)]
    pub namespaces: Vec<AllocatedState>,
}

/// An allocated namespace.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/allocated", version = 1)]
pub struct AllocatedState {
    /// What it is.
    pub shape: NamespaceShape,
    /// The guest created it, and its image is the store's; otherwise it is the host's.
    pub created: bool,
    /// It may be attached to several controllers at a time (Identify Namespace NMIC bit 0).
    pub shared: bool,
    /// Controllers.
    pub attached_count: u32,
    /// Identifiers of the controllers that it is attached to, ascending.
    #[vmstate(len = "attached_count", max = MAX_CONTROLLERS)]
    pub attached: Vec<u16>,
    /// Write protection, unless there is none.
    #[vmstate(subsection)]
    pub protection: Option<AllocatedProtectionState>,
    /// Blocks that cannot be read, if there are any.
    #[vmstate(subsection)]
    pub uncorrectable: Option<AllocatedMarksState>,
}

/// Blocks of an allocated namespace that Write Uncorrectable has marked.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/allocated/uncorrectable", version = 1)]
pub struct AllocatedMarksState {
    /// They.
    pub marks: UncorrectableState,
}

/// The write protection of an allocated namespace.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/allocated/write-protection", version = 1)]
pub struct AllocatedProtectionState {
    /// The value of Namespace Write Protection Config, 1 to 3.
    pub value: u8,
}

/// What a controller keeps without power.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/controller-record", version = 1)]
pub struct ControllerRecord {
    /// Controller identifier.
    pub id: u16,
    /// Counters of the SMART log.
    pub smart: SmartState,
    /// What its admin commands have it keep, if they have.
    #[vmstate(subsection)]
    pub kept: Option<ControllerKeptState>,
    /// There if its host has enabled it and not shut it down since: if power goes now, that is an unsafe shutdown.
    #[vmstate(subsection)]
    pub running: Option<ControllerRunningState>,
}

/// A controller that was not shut down.
#[derive(VmState, Clone, Copy, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/controller-record/running", version = 1)]
pub struct ControllerRunningState {
    /// In this power cycle.
    pub power_cycle: u64,
}

/// What a controller's admin commands have it keep.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/controller-record/kept", version = 1)]
pub struct ControllerKeptState {
    /// It.
    pub kept: KeptState,
}

/// Where a controller keeps things in a subsystem that has a store.
pub(crate) struct ControllerPlace {
    subsystem: Arc<Subsystem>,
    id: u16,
}

impl ControllerPlace {
    /// That of controller `id`.
    pub fn new(subsystem: &Arc<Subsystem>, id: u16) -> Self {
        Self { subsystem: Arc::clone(subsystem), id }
    }
}

impl Debug for ControllerPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControllerPlace").field("id", &self.id).finish_non_exhaustive()
    }
}

impl NonVolatile for ControllerPlace {
    fn keep(&self, kept: &KeptState) -> io::Result<()> {
        let change = |state: &mut SubsystemState| {
            if let Some(record) = state.controller(self.id) {
                record.kept = Some(ControllerKeptState { kept: kept.clone() });
            }
            // What the controllers have in common is the same with all of them, whichever is there first after a power cycle; and it is
            // what it is now, while nobody else writes: another one may have written more than is in `kept`.
            let (firmware, sanitize, persistent_events) = kept_in_common(&self.subsystem.common);
            for other in state.controllers.iter_mut().filter_map(|record| record.kept.as_mut()) {
                let other = &mut other.kept;
                other.firmware.clone_from(&firmware);
                other.sanitize = sanitize;
                other.persistent_events.clone_from(&persistent_events);
            }
        };
        self.subsystem.update(change).map_err(io::Error::other)
    }
}

impl AllocationsState {
    /// The record of `nsid`.
    pub(crate) fn get_mut(&mut self, nsid: u32) -> Option<&mut AllocatedState> {
        self.namespaces.iter_mut().find(|allocated| allocated.shape.nsid == nsid)
    }

    /// Adds or replaces the record of a namespace.
    pub(crate) fn put(&mut self, allocated: AllocatedState) {
        let nsid = allocated.shape.nsid;
        match self.namespaces.binary_search_by_key(&nsid, |other| other.shape.nsid) {
            Ok(place) => self.namespaces[place] = allocated,
            Err(place) => self.namespaces.insert(place, allocated),
        }
        self.namespace_count = self.namespaces.len() as u32;
    }

    /// Removes records.
    pub(crate) fn retain(&mut self, keep: impl FnMut(&AllocatedState) -> bool) {
        self.namespaces.retain(keep);
        self.namespace_count = self.namespaces.len() as u32;
    }
}

impl SubsystemState {
    /// Reservations go with their namespaces, and another one with the same identifier has none.
    pub(crate) fn forget_reservations_of_what_is_gone(&mut self) {
        let allocated = &self.allocations.namespaces;
        let is_there = |nsid| allocated.binary_search_by_key(&nsid, |record| record.shape.nsid).is_ok();
        self.reservations.take_if(|kept| {
            let ReservationsState { namespace_count, namespaces } = &mut kept.reservations;
            namespaces.retain(|reservation| is_there(reservation.nsid));
            *namespace_count = namespaces.len() as u32;
            namespaces.is_empty()
        });
    }

    /// Notes the counters of controller `id`, and whether it has to be shut down.
    pub(crate) fn note(&mut self, id: u16, smart: SmartState, is_running: bool) {
        if let Some(record) = self.controller(id) {
            let power_cycle = smart.power_cycles;
            record.smart = smart;
            record.running = is_running.then_some(ControllerRunningState { power_cycle });
        }
    }

    /// The record of controller `id`, which is made if there is none; the error says that there are too many.
    pub(crate) fn controller(&mut self, id: u16) -> Option<&mut ControllerRecord> {
        let place = match self.controllers.binary_search_by_key(&id, |record| record.id) {
            Ok(place) => place,
            Err(_) if self.controllers.len() == MAX_CONTROLLERS => return None,
            Err(place) => {
                let smart = SmartState { power_cycles: 1, ..SmartState::default() };
                self.controllers.insert(place, ControllerRecord { id, smart, kept: None, running: None });
                self.controller_count = self.controllers.len() as u32;
                place
            }
        };
        self.controllers.get_mut(place)
    }
}
