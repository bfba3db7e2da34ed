//! Asymmetric Namespace Access (Base 8.1): by which controllers of a subsystem a host should come to its namespaces.
//!
//! A namespace is in the group that its identifier says, and the host of the virtual machine sets how each controller gives access to
//! each group, as a storage array does when a path fails or is taken out of service. What a state keeps away is in the gate of the
//! controller ([`crate::gate`]), so that no command takes a lock.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use nvme_spec::log::{AnaGroup, AnaLogHeader};

use crate::config::MAX_NAMESPACES;
use crate::gate::Gate;
use crate::shared::{Host, lock};

/// Groups of a subsystem (Identify Controller NANAGRPID and ANAGRPMAX). Identifiers are 1 to this.
pub const ACCESS_GROUPS: u32 = 16;

/// Asymmetric Namespace Access State (Base figure 220).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessState {
    /// The best way to the namespaces.
    #[default]
    Optimized = 1,
    /// A way that works, and may be slower.
    NonOptimized = 2,
    /// No way at present.
    Inaccessible = 3,
    /// No way any more.
    PersistentLoss = 4,
    /// On the way from one state to another.
    Change = 0xf,
}

impl AccessState {
    pub(crate) fn from_value(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Optimized,
            2 => Self::NonOptimized,
            3 => Self::Inaccessible,
            4 => Self::PersistentLoss,
            0xf => Self::Change,
            _ => return None,
        })
    }
}

/// The ANA group of namespace `nsid`.
#[must_use]
pub const fn group_of(nsid: u32) -> u32 {
    nsid.wrapping_sub(1) % ACCESS_GROUPS + 1
}

/// What one controller says of the groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Access {
    /// By group identifier less one: the state, and how often it has changed.
    pub groups: [(AccessState, u64); ACCESS_GROUPS as usize],
    /// Change Count of the log page.
    pub changes: u64,
}

struct Member {
    access: Access,
    gate: Arc<Gate>,
    host: Arc<dyn Host>,
}

/// See the module's text. Its lock is taken after that of the subsystem, and no other is taken while it is held
/// (that of those who are gone is taken inside).
#[derive(Default)]
pub(crate) struct AccessTable {
    members: Mutex<BTreeMap<u16, Member>>,
    /// What was set for controllers that are gone: the machine around them may build them anew.
    gone: Mutex<BTreeMap<u16, Access>>,
}

impl AccessTable {
    /// A controller. Unless something else was said of it, it gives optimized access to everything.
    pub fn join(&self, controller: u16, gate: Arc<Gate>, host: Arc<dyn Host>) {
        let mut members = self.members();
        // What was set for one that is succeeded still holds.
        let before = members.get(&controller).map(|before| before.access.clone());
        let access = before.or_else(|| lock(&self.gone).remove(&controller)).unwrap_or_default();
        let member = Member { access, gate, host };
        member.close_gate();
        members.insert(controller, member);
    }

    /// The controller is gone.
    pub fn leave(&self, controller: u16, gate: &Arc<Gate>) {
        let mut members = self.members();
        if members.get(&controller).is_some_and(|member| Arc::ptr_eq(&member.gate, gate)) {
            let gone = members.remove(&controller).map(|member| (controller, member.access));
            lock(&self.gone).extend(gone);
        }
    }

    /// Sets the state of a group, and has the controller tell of it. `false`: there is no such controller or group.
    pub fn set(&self, controller: u16, group: u32, state: AccessState) -> bool {
        let host = {
            let mut members = self.members();
            let Some(member) = members.get_mut(&controller) else { return false };
            let place = (group as usize).checked_sub(1).and_then(|index| member.access.groups.get_mut(index));
            let Some((before, changes)) = place else { return false };
            if *before == state {
                return true;
            }
            *before = state;
            *changes = changes.wrapping_add(1);
            member.access.changes = member.access.changes.wrapping_add(1);
            member.close_gate();
            member.gate.access_changed.store(true, Ordering::SeqCst);
            Arc::clone(&member.host)
        };
        host.wake(0);
        true
    }

    /// What a controller says.
    pub fn of(&self, controller: u16) -> Access {
        self.members().get(&controller).map(|member| member.access.clone()).unwrap_or_default()
    }

    /// Takes over what a controller said elsewhere.
    pub fn load(&self, controller: u16, access: Access) {
        if let Some(member) = self.members().get_mut(&controller) {
            member.access = access;
            member.close_gate();
        }
    }

    fn members(&self) -> MutexGuard<'_, BTreeMap<u16, Member>> {
        lock(&self.members)
    }
}

impl Member {
    fn close_gate(&self) {
        for nsid in 1..=MAX_NAMESPACES {
            let (state, _) = self.access.groups[group_of(nsid) as usize - 1];
            self.gate.set_access(nsid, state);
        }
    }
}

impl Access {
    /// The log page (Base 5.16.1.13) about `namespaces`, which are attached and in order; without them it is about the groups only.
    pub fn log(&self, namespaces: &[u32], groups_only: bool) -> Vec<u8> {
        let mut groups: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for &nsid in namespaces {
            groups.entry(group_of(nsid)).or_default().push(nsid);
        }
        let header = AnaLogHeader { change_count: self.changes, groups: groups.len() as u16 };
        let mut log = header.to_bytes().to_vec();
        for (group, members) in groups {
            let (state, change_count) = self.groups[group as usize - 1];
            let count = if groups_only { 0 } else { members.len() as u32 };
            log.extend(AnaGroup { group, namespaces: count, change_count, state: state as u8 }.to_bytes());
            log.extend(members.iter().take(count as usize).flat_map(|nsid| nsid.to_le_bytes()));
        }
        log
    }
}
