//! Preempt and Abort (Base 8.19.7): the command completes when the commands that preempted hosts have in flight at the namespace have
//! ended. None of them is cut short: a backend that has a request finishes it.

use std::sync::atomic::Ordering;

use nvme_spec::Status;

use crate::reservations::{DrainNumber, goes_to};
use crate::shared::Shared;
use crate::worker::{Owner, Worker};

/// What a worker knows of Preempt and Abort commands.
#[derive(Debug, Default)]
pub(crate) struct Preemptions {
    /// The count of the controller's gate that it knows.
    seen: u64,
    /// Some of its slots are marked.
    owes: bool,
    /// Its own commands that wait, by slot.
    pub waiting: Vec<(u32, DrainNumber)>,
}

impl Worker {
    /// Marks commands that are waited for, says when the last has ended, and ends commands of its own that have waited long enough, which
    /// is what `true` says. Costs one load if there is nothing of the kind.
    pub fn look_at_preemptions(&mut self, shared: &Shared) -> bool {
        let drains = shared.gate.drains.load(Ordering::SeqCst);
        let me = (shared.controller_id, self.index);
        let reservations = &shared.subsystem.reservations;
        if drains != self.preemptions.seen {
            self.preemptions.seen = drains;
            let namespaces = reservations.drains_of(me);
            for slot in &mut self.slots {
                let runs = matches!(slot.owner, Owner::Queue(_) | Owner::Orphan);
                slot.preempted |= runs && namespaces.iter().any(|&nsid| goes_to(slot.nsid, nsid));
            }
            // A command that itself waits for a drain touches no block, and two that wait for each other would wait for ever.
            for &(slot, _) in &self.preemptions.waiting {
                self.slots[slot as usize].preempted = false;
            }
            self.preemptions.owes = true;
        }
        if self.preemptions.owes && !self.slots.iter().any(|slot| slot.preempted) {
            self.preemptions.owes = false;
            reservations.drained(me);
        }
        let before = self.preemptions.waiting.len();
        let mut position = 0;
        while let Some(&(slot, number)) = self.preemptions.waiting.get(position) {
            if reservations.is_drained(number) {
                self.preemptions.waiting.swap_remove(position);
                self.finish(shared, slot, Status::SUCCESS);
            } else {
                position += 1;
            }
        }
        before != self.preemptions.waiting.len()
    }
}
