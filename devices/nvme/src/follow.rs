//! How a controller takes over what changes in its subsystem (Base 5.2, 5.16.1.5: the host is told).

use nvme_spec::event::Event;
use nvme_spec::identify::OAES_NAMESPACE_ATTRIBUTE;
use nvme_spec::{NSID_BROADCAST, Status};

use crate::admin::{Admin, Phase, Pool};
use crate::namespace::{self, Namespace, NamespaceTable};
use crate::subsystem::{Contents, Subsystem};
use crate::worker::{Owner, Worker};

/// A command that changed the subsystem, and is answered when every controller has followed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PendingChange {
    pub cid: u16,
    pub generation: u64,
}

/// Where a controller is in following its subsystem.
#[derive(Debug, Default)]
pub(crate) struct Following {
    /// The generation of the tables.
    taken: u64,
    /// The generation of which the subsystem was told that nothing is in flight where the tables have nothing any more.
    told: u64,
    pending: Vec<PendingChange>,
}

impl Following {
    pub fn new(generation: u64) -> Self {
        Self { taken: generation, told: generation, pending: Vec::new() }
    }

    /// Commands that wait for the end of their change.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Whether every controller works with the tables of this one, and has nothing in flight that they took away.
    pub fn is_followed(&self, subsystem: &Subsystem) -> bool {
        subsystem.is_followed(self.taken)
    }

    /// Whether nothing has changed since the tables were taken.
    pub fn is_newest(&self, subsystem: &Subsystem) -> bool {
        self.taken == subsystem.generation()
    }

    /// Answers to commands that nobody waits for any more.
    pub fn forget(&mut self) {
        self.pending.clear();
    }
}

impl Admin {
    /// Takes over what is attached now. The workers' tables are replaced under their locks: a command that was fetched before went to
    /// the old namespace and is waited for, one that is fetched after finds the new one.
    pub fn follow_subsystem(&mut self, pool: &Pool) {
        let shared = &pool.shared;
        let generation = shared.subsystem.generation();
        if generation != self.following.taken {
            let (generation, table) = shared.subsystem.attached_to(shared.controller_id);
            let changes = changes(&self.namespaces, &table);
            for index in 0..pool.workers.len() {
                pool.worker(index).take_namespaces(namespace::copy_for_worker(&table), &changes);
            }
            self.namespaces = table;
            self.allocated = shared.subsystem.allocated();
            pool.worker(0).allocated = namespace::copy_for_worker(&self.allocated);
            self.following.taken = generation;
            self.tell_of(pool, &changes);
            self.follow_sanitize(pool);
        }
        if self.following.told != self.following.taken
            && (0..pool.workers.len()).all(|index| !pool.worker(index).drains())
        {
            self.following.told = self.following.taken;
            shared.subsystem.followed(shared.controller_id, self.following.told);
        }
        let mut position = 0;
        while let Some(&PendingChange { cid, generation }) = self.following.pending.get(position) {
            if shared.subsystem.is_followed(generation) {
                self.following.pending.remove(position);
                self.end(cid, 0, Status::SUCCESS);
            } else {
                position += 1;
            }
        }
    }

    /// Changes the namespace `scope`, or all with the broadcast identifier: commands that begin from now on find it as `change` leaves
    /// it, here and, when it has followed, at every other controller of the subsystem.
    pub fn change_namespaces(&mut self, pool: &Pool, scope: u32, change: impl Fn(&mut Namespace)) {
        pool.shared.subsystem.change(scope, change);
        self.follow_subsystem(pool);
    }

    /// As [`Admin::change_namespaces`], if `allows` has nothing against it ([`Subsystem::change_if`]).
    pub fn change_namespaces_if(
        &mut self,
        pool: &Pool,
        scope: u32,
        allows: impl FnOnce(&Contents) -> Result<(), Status>,
        change: impl Fn(&mut Namespace),
    ) -> Result<(), Status> {
        pool.shared.subsystem.change_if(scope, allows, change)?;
        self.follow_subsystem(pool);
        Ok(())
    }

    /// Notes that the host has to look at a namespace again (Base 5.16.1.5), and tells it if it wants to be told.
    pub fn tell_namespace_changed(&mut self, pool: &Pool, nsid: u32) {
        if !self.changed_namespaces.contains(&nsid) {
            self.changed_namespaces.push(nsid);
        }
        if self.features.async_events & OAES_NAMESPACE_ATTRIBUTE != 0 {
            pool.shared.events().queue(Event::NAMESPACE_CHANGED);
        }
    }

    /// Whether the tables are those of the subsystem and nothing waits for that.
    pub fn has_followed(&self, pool: &Pool) -> bool {
        self.following.told == pool.shared.subsystem.generation() && self.following.pending.is_empty()
    }

    /// Answers command `cid` when every controller has followed `generation`.
    pub fn end_when_followed(&mut self, pool: &Pool, cid: u16, generation: u64) {
        self.following.pending.push(PendingChange { cid, generation });
        self.follow_subsystem(pool);
    }

    /// "Namespace Attribute Changed: the Identify Namespace data structure for one or more namespaces, as well as the namespace list
    /// returned when the Identify command is issued with the CNS field set to 02h, have changed" (Base figure 152).
    fn tell_of(&mut self, pool: &Pool, changes: &[Change]) {
        for change in changes {
            if change.is_another {
                self.restart_self_test(change.nsid);
            }
            if change.is_another
                && let Some(place) = self.features.error_recovery.get_mut(change.nsid as usize - 1)
            {
                *place = 0;
            }
            // A reset clears the log and the events.
            if self.phase == Phase::Ready && change.is_seen {
                self.tell_namespace_changed(pool, change.nsid);
            }
        }
    }
}

/// What is different for one identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub nsid: u32,
    /// It is another namespace, or none, or one where there was none.
    pub is_another: bool,
    /// Commands in flight may be where nothing is any more, or where an operation is about to write.
    pub drains: bool,
    /// The host can tell.
    pub is_seen: bool,
}

fn changes(before: &NamespaceTable, after: &NamespaceTable) -> Vec<Change> {
    let change = |index: usize| {
        let (before, after) = (before[index].as_deref(), after[index].as_deref());
        let mut is_seen = true;
        let (is_another, drains) = match (before, after) {
            (None, None) => return None,
            (None, Some(_)) => (true, false),
            (Some(_), None) => (true, true),
            (Some(before), Some(after)) if before.uuid != after.uuid => (true, true),
            (Some(before), Some(after)) => {
                let is_taken = before.refusal.is_none() && after.refusal.is_some();
                is_seen = !looks_the_same(before, after);
                if !is_seen && !is_taken {
                    return None;
                }
                (false, is_taken || after.size_bytes() < before.size_bytes())
            }
        };
        Some(Change { nsid: index as u32 + 1, is_another, drains, is_seen })
    };
    (0..before.len().min(after.len())).filter_map(change).collect()
}

fn looks_the_same(before: &Namespace, after: &Namespace) -> bool {
    let look = |namespace: &Namespace| {
        (namespace.format(), namespace.blocks, namespace.read_only, namespace.protection, namespace.shared)
    };
    look(before) == look(after)
}

impl Worker {
    /// Replaces the table. Commands at a namespace that is gone or smaller now are to be waited for.
    fn take_namespaces(&mut self, table: NamespaceTable, changes: &[Change]) {
        for slot in self.slots.iter_mut().filter(|slot| slot.owner != Owner::Nobody) {
            let drains = |change: &Change| {
                change.drains && matches!(slot.nsid, NSID_BROADCAST) | (slot.nsid == change.nsid)
            };
            slot.drains |= changes.iter().any(drains);
        }
        self.failures_told
            .retain(|&nsid| !changes.iter().any(|change| change.nsid == nsid && change.is_another));
        self.namespaces = table;
    }

    /// Whether a command that [`Worker::take_namespaces`] found is in flight.
    fn drains(&self) -> bool {
        self.slots.iter().any(|slot| slot.drains)
    }
}
