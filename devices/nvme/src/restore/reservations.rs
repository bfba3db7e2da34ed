//! What `restore.rs` gives back of reservations. The sections of all controllers of a subsystem tell of the same reservations: the first
//! that is loaded brings them, the others must agree.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use super::refuse;
use crate::Error;
use crate::ana::{Access, AccessState};
use crate::command::reservation_features::{identity, is_extended_by_itself};
use crate::config::MAX_NAMESPACES;
use crate::reservation::{HostIdentity, Kind, Notification, Registrant, Reservation};
use crate::reservations::{NOTIFICATION_MASK, Notice, Notices, Table};
use crate::shared::Shared;
use crate::state::{
    AccessGroupsState, NvmeState, RegistrantState, ReservationNoticesState, ReservationState,
    ReservationsState,
};

/// Comes after the features, which have the host identifier.
pub(super) fn load(shared: &Shared, state: &NvmeState) -> Result<(), Error> {
    if let Some(saved) = &state.access {
        load_access(shared, saved)?;
    }
    let reservations = &shared.subsystem.reservations;
    let nothing = ReservationsState::default();
    load_table(&mut reservations.table(), state.reservations.as_ref().unwrap_or(&nothing))?;
    let identifier = &state.features.host_identifier;
    let extended = match &state.reservation_notices {
        Some(notices) => notices.extended_host_identifier,
        None => is_extended_by_itself(identifier),
    };
    if !extended && is_extended_by_itself(identifier) || extended && *identifier == [0; 16] {
        let field = "reservation_notices.extended_host_identifier";
        return refuse(field, extended, "it is not the form of the host identifier");
    }
    let identity = identity(shared.controller_id, identifier, extended);
    reservations.set_identity(shared.controller_id, identity).or_else(|_| {
        let reason = "it has another form than those of the other controllers, or the host was registered before it had it";
        refuse("features.host_identifier", identifier[0], reason)
    })?;
    if let Some(saved) = &state.reservation_notices {
        let notices = notices(saved)?;
        if let Some(member) = reservations.table().members.get_mut(&shared.controller_id) {
            member.notices = notices;
        }
        shared.gate.notified.store(saved.untold, Ordering::SeqCst);
    }
    Ok(())
}

/// The reservations that a saved state has.
pub(crate) fn loaded_reservations(state: &ReservationsState) -> Result<BTreeMap<u32, Reservation>, Error> {
    let mut loaded = BTreeMap::new();
    let mut before = 0;
    for (index, saved) in state.namespaces.iter().enumerate() {
        let at = |field: &str| format!("reservations.namespaces[{index}].{field}");
        if saved.nsid <= before || saved.nsid > MAX_NAMESPACES {
            return refuse(at("nsid"), saved.nsid, "it is not an identifier above the one before");
        }
        before = saved.nsid;
        loaded.insert(saved.nsid, reservation(&at, saved)?);
    }
    Ok(loaded)
}

fn load_table(table: &mut Table, state: &ReservationsState) -> Result<(), Error> {
    let loaded = loaded_reservations(state)?;
    if std::mem::replace(&mut table.loaded, true) {
        if table.namespaces != loaded {
            let count = state.namespace_count;
            return refuse("reservations", count, "another controller of the subsystem has others");
        }
    } else {
        table.namespaces = loaded;
        table.open_gates(None);
    }
    Ok(())
}

fn reservation(at: &impl Fn(&str) -> String, saved: &ReservationState) -> Result<Reservation, Error> {
    let mut registrants: Vec<Registrant> = Vec::with_capacity(saved.registrants.len());
    for one in &saved.registrants {
        let host = host(at, one)?;
        if registrants.last().is_some_and(|before| before.host >= host) {
            return refuse(at("registrants.host"), one.host[0], "it is not above the one before");
        }
        registrants.push(Registrant { host, key: one.key });
    }
    let held = match (Kind::from_value(saved.kind), registrants.get(usize::from(saved.holder))) {
        (None, _) if saved.kind != 0 => return refuse(at("kind"), saved.kind, "there are six types"),
        (None, _) if saved.holder != 0 => return refuse(at("holder"), saved.holder, "nobody is the holder"),
        (None, _) => None,
        (Some(kind), Some(holder)) => Some((kind, holder.host)),
        (Some(_), None) => return refuse(at("holder"), saved.holder, "it is not a registrant"),
    };
    let (generation, persists) = (saved.generation, saved.persists);
    let reservation = Reservation { registrants, held, generation, persists };
    if reservation == Reservation::default() {
        return refuse(at("nsid"), saved.nsid, "nobody has used it");
    }
    Ok(reservation)
}

fn host(at: &impl Fn(&str) -> String, saved: &RegistrantState) -> Result<HostIdentity, Error> {
    let [c0, c1, ..] = saved.host;
    let controller = u16::from_le_bytes([c0, c1]);
    let used = match saved.form {
        0 => 2,
        1 => 8,
        2 => 16,
        other => return refuse(at("registrants.form"), other, "identifiers have three forms"),
    };
    if saved.host[used..].iter().any(|&byte| byte != 0) {
        return refuse(at("registrants.host"), saved.host[used], "it is longer than its form");
    }
    match (saved.form, identity(controller, &saved.host, saved.form == 2)) {
        (0, _) => Ok(HostIdentity::Unnamed { controller }),
        (_, HostIdentity::Unnamed { .. }) => refuse(at("registrants.host"), 0u8, "it is no identifier"),
        (_, named) => Ok(named),
    }
}

fn notices(saved: &ReservationNoticesState) -> Result<Notices, Error> {
    let mut notices = Notices { count: saved.page_count, ..Notices::default() };
    let is_namespace = |nsid| (1..=MAX_NAMESPACES).contains(&nsid);
    for one in &saved.notices {
        let what = match one.kind {
            1 => Notification::RegistrationPreempted,
            2 => Notification::ReservationReleased,
            3 => Notification::ReservationPreempted,
            other => return refuse("reservation_notices.notices.kind", other, "there are three"),
        };
        if one.count == 0 || one.count > saved.page_count {
            return refuse("reservation_notices.notices.count", one.count, "not so many were made");
        }
        if !is_namespace(one.nsid) {
            return refuse("reservation_notices.notices.nsid", one.nsid, "it is not a namespace identifier");
        }
        notices.waiting.push_back(Notice { count: one.count, what, nsid: one.nsid });
    }
    if saved.untold && saved.notices.is_empty() {
        return refuse("reservation_notices.untold", 1u8, "there is nothing to tell of");
    }
    let mut before = 0;
    for one in &saved.masks {
        if one.nsid <= before || !is_namespace(one.nsid) {
            let reason = "it is not an identifier above the one before";
            return refuse("reservation_notices.masks.nsid", one.nsid, reason);
        }
        if one.mask == 0 || one.mask & !NOTIFICATION_MASK != 0 {
            return refuse(
                "reservation_notices.masks.mask",
                one.mask,
                "it masks nothing, or has reserved bits",
            );
        }
        before = one.nsid;
        notices.masks.insert(one.nsid, one.mask);
    }
    Ok(notices)
}

fn load_access(shared: &Shared, saved: &AccessGroupsState) -> Result<(), Error> {
    if !shared.subsystem.is_shared() {
        return refuse("access", saved.change_count, "there is no other controller to come by");
    }
    let mut access = Access { changes: saved.change_count, ..Access::default() };
    let groups = saved.states.iter().zip(&saved.change_counts);
    for (place, (&value, &changes)) in access.groups.iter_mut().zip(groups) {
        let Some(state) = AccessState::from_value(value) else {
            return refuse("access.states", value, "it is not an access state");
        };
        *place = (state, changes);
    }
    if access == Access::default() {
        return refuse("access.change_count", saved.change_count, "nothing has changed");
    }
    shared.subsystem.access.load(shared.controller_id, access);
    shared.gate.access_changed.store(saved.untold, Ordering::SeqCst);
    Ok(())
}
