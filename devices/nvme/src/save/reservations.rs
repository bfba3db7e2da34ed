//! What `save.rs` takes of reservations and of asymmetric access: nothing where nobody has used them.

use std::sync::atomic::Ordering;

use crate::ana::Access;
use crate::command::reservation_features::is_extended_by_itself;
use crate::reservation::{HostIdentity, Registrant, Reservation};
use crate::reservations::{Notices, Table};
use crate::shared::Shared;
use crate::state::{
    AccessGroupsState, RegistrantState, ReservationMaskState, ReservationNoticeState,
    ReservationNoticesState, ReservationState, ReservationsState,
};

/// The reservations of the subsystem.
pub(crate) fn reservations_state(shared: &Shared) -> Option<ReservationsState> {
    let table = shared.subsystem.reservations.table();
    state(table.namespaces.iter().map(|(&nsid, one)| reservation_state(nsid, one)).collect())
}

/// What survives the loss of power: reservations that are to, of hosts that can come back.
pub(crate) fn kept_reservations(table: &Table) -> Option<ReservationsState> {
    let kept = table.namespaces.iter().filter(|(_, one)| one.persists);
    let named = |(&nsid, one): (&u32, &Reservation)| {
        let mut one = one.clone();
        for unnamed in table.members.keys().map(|&controller| HostIdentity::Unnamed { controller }) {
            one.forget(unnamed);
        }
        reservation_state(nsid, &one)
    };
    state(kept.map(named).collect())
}

fn state(namespaces: Vec<ReservationState>) -> Option<ReservationsState> {
    let namespace_count = namespaces.len() as u32;
    (namespace_count > 0).then_some(ReservationsState { namespace_count, namespaces })
}

fn reservation_state(nsid: u32, reservation: &Reservation) -> ReservationState {
    let place = |holder| reservation.registrants.iter().position(|registrant| registrant.host == holder);
    let (kind, holder) = match reservation.held {
        Some((kind, holder)) => (kind as u8, place(holder).unwrap_or(0) as u8),
        None => (0, 0),
    };
    ReservationState {
        nsid,
        generation: reservation.generation,
        persists: reservation.persists,
        kind,
        holder,
        registrant_count: reservation.registrants.len() as u8,
        registrants: reservation.registrants.iter().map(registrant_state).collect(),
    }
}

fn registrant_state(&Registrant { host, key }: &Registrant) -> RegistrantState {
    let mut bytes = [0; 16];
    let form = match host {
        HostIdentity::Unnamed { controller } => {
            bytes[..2].copy_from_slice(&controller.to_le_bytes());
            0
        }
        HostIdentity::Short(short) => {
            bytes[..8].copy_from_slice(&short);
            1
        }
        HostIdentity::Extended(long) => {
            bytes = long;
            2
        }
    };
    RegistrantState { form, host: bytes, key }
}

/// What this controller has to do with them.
pub(crate) fn notices_state(shared: &Shared, identifier: &[u8; 16]) -> Option<ReservationNoticesState> {
    let table = shared.subsystem.reservations.table();
    let member = table.members.get(&shared.controller_id)?;
    let extended = matches!(member.identity, HostIdentity::Extended(_));
    let untold = shared.gate.notified.load(Ordering::SeqCst);
    let as_at_first = member.notices == Notices::default() && !untold;
    if as_at_first && extended == is_extended_by_itself(identifier) {
        return None;
    }
    let notices = &member.notices;
    let waiting = notices.waiting.iter();
    let masks = notices.masks.iter().map(|(&nsid, &mask)| ReservationMaskState { nsid, mask });
    Some(ReservationNoticesState {
        extended_host_identifier: extended,
        page_count: notices.count,
        untold,
        notice_count: notices.waiting.len() as u8,
        notices: waiting
            .map(|notice| ReservationNoticeState {
                count: notice.count,
                kind: notice.what as u8,
                nsid: notice.nsid,
            })
            .collect(),
        mask_count: notices.masks.len() as u32,
        masks: masks.collect(),
    })
}

/// How this controller gives access.
pub(crate) fn access_state(shared: &Shared) -> Option<AccessGroupsState> {
    let access = shared.subsystem.access.of(shared.controller_id);
    (access != Access::default()).then(|| AccessGroupsState {
        change_count: access.changes,
        untold: shared.gate.access_changed.load(Ordering::SeqCst),
        states: access.groups.map(|(state, _)| state as u8),
        change_counts: access.groups.map(|(_, changes)| changes),
    })
}
