//! Saved state of asymmetric access (Base 8.1), and of reservations (Base 8.19): those of the subsystem, which every controller's section has alike, and what one
//! controller has to do with them. Written only where there is something.

use vmstate::VmState;

use crate::ana::ACCESS_GROUPS;
use crate::config::MAX_NAMESPACES;
use crate::reservation::MAX_REGISTRANTS;
use crate::reservations::MAX_NOTICES;

/// The reservations of a subsystem.
#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme/reservations", version = 1)]
pub struct ReservationsState {
    /// Namespaces that somebody registered with.
    pub namespace_count: u32,
    /// By ascending identifier.
    #[vmstate(len = "namespace_count", max = MAX_NAMESPACES as usize)]
    pub namespaces: Vec<ReservationState>,
}

/// The reservation of a namespace.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/reservation", version = 1)]
pub struct ReservationState {
    /// Namespace identifier.
    pub nsid: u32,
    /// Generation.
    pub generation: u32,
    /// It survives the loss of power.
    pub persists: bool,
    /// Reservation Type, 0 if there is no holder.
    pub kind: u8,
    /// Which registrant is the holder, or has acquired what all of them hold; 0 if there is none.
    pub holder: u8,
    /// Registrants.
    pub registrant_count: u8,
    /// In the order of their hosts.
    #[vmstate(len = "registrant_count", max = MAX_REGISTRANTS)]
    pub registrants: Vec<RegistrantState>,
}

/// A registrant.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/registrant", version = 1)]
pub struct RegistrantState {
    /// Form of the host's identifier: 0 none but the controller's, 1 of 64 bits, 2 of 128 bits.
    pub form: u8,
    /// Host Identifier; of a host without one the controller identifier, low byte first.
    pub host: [u8; 16],
    /// Reservation key.
    pub key: u64,
}

/// What a controller has to do with reservations.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/reservation-notices", version = 1)]
pub struct ReservationNoticesState {
    /// The Host Identifier was set as one of 128 bits.
    pub extended_host_identifier: bool,
    /// Reservation Notification log pages ever made.
    pub page_count: u64,
    /// The event that tells of them has not been queued.
    pub untold: bool,
    /// Log pages that wait to be read.
    pub notice_count: u8,
    /// Oldest first.
    #[vmstate(len = "notice_count", max = MAX_NOTICES)]
    pub notices: Vec<ReservationNoticeState>,
    /// Namespaces with a notification mask.
    pub mask_count: u32,
    /// By ascending identifier.
    #[vmstate(len = "mask_count", max = MAX_NAMESPACES as usize)]
    pub masks: Vec<ReservationMaskState>,
}

/// A page of the Reservation Notification log.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/reservation-notice", version = 1)]
pub struct ReservationNoticeState {
    /// Log Page Count.
    pub count: u64,
    /// Type, 1 to 3.
    pub kind: u8,
    /// Namespace identifier.
    pub nsid: u32,
}

/// The Reservation Notification Mask of a namespace.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/reservation-mask", version = 1)]
pub struct ReservationMaskState {
    /// Namespace identifier.
    pub nsid: u32,
    /// Its value, not 0.
    pub mask: u8,
}

/// How a controller gives access to the namespaces of each group.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/access", version = 1)]
pub struct AccessGroupsState {
    /// Change Count of the log page.
    pub change_count: u64,
    /// A change has not been told of.
    pub untold: bool,
    /// Asymmetric Namespace Access State by group identifier less one.
    pub states: [u8; ACCESS_GROUPS as usize],
    /// How often each has changed.
    pub change_counts: [u64; ACCESS_GROUPS as usize],
}
