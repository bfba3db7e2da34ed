//! Ranges that a fused operation has for itself while it is carried out (Base 3.4.2: "... are executed in sequence as an atomic unit").
//!
//! ```text
//! claim -> every worker: has nothing in flight there, begins nothing more there -> granted -> Compare, Write -> release
//! ```
//! Workers of all controllers of a subsystem take part. None looks further than one counter as long as no range is claimed. Whoever
//! finds that the counter has moved learns the claims, keeps new commands away from their ranges, and says for each when the last of
//! its own commands there has ended. Of claims that overlap the older one goes first.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::shared::{Host, lock};

/// Bytes of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ByteRange {
    pub nsid: u32,
    pub first: u64,
    /// Behind the last.
    pub end: u64,
}

impl ByteRange {
    pub fn overlaps(&self, other: &Self) -> bool {
        self.nsid == other.nsid && self.first < other.end && other.first < self.end
    }
}

/// A worker: its controller's identifier and its index there.
pub(crate) type Participant = (u16, usize);

/// See the module's text. Its lock is the last one that is taken.
#[derive(Default)]
pub(crate) struct Exclusion {
    /// Counts claims and releases.
    changes: AtomicU64,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    participants: BTreeMap<Participant, Arc<dyn Host>>,
    /// The oldest first.
    claims: Vec<Claim>,
}

struct Claim {
    by: Participant,
    range: ByteRange,
    /// Who has nothing in flight there any more.
    clear: BTreeSet<Participant>,
}

/// What a worker knows of the claims.
#[derive(Default)]
pub(crate) struct View {
    /// The count of changes that it knows.
    seen: u64,
    /// Some claim waits for this worker's commands.
    owes: bool,
    /// Claimed ranges, its own included.
    ranges: Vec<ByteRange>,
}

impl View {
    /// Whether nothing is claimed, as far as the worker knows.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether a command on `range` has to wait.
    pub fn excludes(&self, range: &ByteRange) -> bool {
        self.ranges.iter().any(|claimed| claimed.overlaps(range))
    }
}

impl Exclusion {
    /// From now on claims wait for this worker too. One that was there has been reset by the machine around it, and claims nothing.
    pub fn join(&self, worker: Participant, host: Arc<dyn Host>) {
        let mut table = lock(&self.table);
        table.participants.insert(worker, host);
        if table.claims.iter().any(|claim| claim.by == worker) {
            table.claims.retain(|claim| claim.by != worker);
            self.changed(&table, worker);
        }
    }

    /// The worker is gone.
    pub fn leave(&self, worker: Participant) {
        let mut table = lock(&self.table);
        table.participants.remove(&worker);
        table.claims.retain(|claim| claim.by != worker);
        self.changed(&table, worker);
    }

    /// Claims a range for a worker, which has no other claim.
    pub fn claim(&self, by: Participant, range: ByteRange) {
        let mut table = lock(&self.table);
        table.claims.push(Claim { by, range, clear: BTreeSet::new() });
        self.changed(&table, by);
    }

    /// Gives the worker's range free.
    pub fn release(&self, by: Participant) {
        let mut table = lock(&self.table);
        table.claims.retain(|claim| claim.by != by);
        self.changed(&table, by);
    }

    /// Tells everyone but `by`, who knows.
    fn changed(&self, table: &Table, by: Participant) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        for (worker, host) in table.participants.iter().filter(|(worker, _)| **worker != by) {
            host.wake(worker.1);
        }
    }

    /// Whether [`Exclusion::look`] has something to tell or to ask.
    pub fn concerns(&self, view: &View) -> bool {
        view.owes || self.changes.load(Ordering::SeqCst) != view.seen
    }

    /// Brings what a worker knows up to date. `is_clear` says whether it has nothing in flight in a range, but for what its own claim is
    /// for. `true`: the claims are other than before.
    pub fn look(&self, worker: Participant, view: &mut View, is_clear: impl Fn(&ByteRange) -> bool) -> bool {
        let mut table = lock(&self.table);
        let table = &mut *table;
        let changes = self.changes.load(Ordering::SeqCst);
        let changed = changes != view.seen;
        view.seen = changes;
        view.owes = false;
        view.ranges.clear();
        for claim in &mut table.claims {
            view.ranges.push(claim.range);
            if claim.clear.contains(&worker) {
                continue;
            }
            if !is_clear(&claim.range) {
                view.owes = true;
                continue;
            }
            claim.clear.insert(worker);
            if claim.by != worker
                && let Some(host) = table.participants.get(&claim.by)
            {
                host.wake(claim.by.1);
            }
        }
        changed
    }

    /// Whether the worker's claim is granted: everyone is clear of it, and no older one overlaps it.
    pub fn is_granted(&self, by: Participant) -> bool {
        let table = lock(&self.table);
        let Some(position) = table.claims.iter().position(|claim| claim.by == by) else { return false };
        let claim = &table.claims[position];
        table.participants.keys().all(|worker| claim.clear.contains(worker))
            && !table.claims[..position].iter().any(|older| older.range.overlaps(&claim.range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::bells::Bells;

    fn range(first: u64, end: u64) -> ByteRange {
        ByteRange { nsid: 1, first, end }
    }

    fn three() -> (Exclusion, Arc<Bells>, [Participant; 3]) {
        let (exclusion, bells) = (Exclusion::default(), Arc::new(Bells::default()));
        let workers = [(0, 0), (0, 1), (7, 2)];
        for worker in workers {
            exclusion.join(worker, bells.clone());
        }
        (exclusion, bells, workers)
    }

    #[test]
    fn a_claim_is_granted_when_everyone_is_clear_of_it() {
        let (exclusion, bells, [a, b, c]) = three();
        let mut views = [(); 3].map(|()| View::default());
        assert!(views.iter().all(|view| !exclusion.concerns(view)));
        exclusion.claim(a, range(10, 20));
        assert_eq!(bells.take(), [1, 2]);
        assert!(views.iter().all(|view| exclusion.concerns(view)));
        assert!(exclusion.look(a, &mut views[0], |_| true) && exclusion.look(b, &mut views[1], |_| true));
        assert!(exclusion.look(c, &mut views[2], |claimed| *claimed != range(10, 20)));
        assert!(!exclusion.is_granted(a) && exclusion.concerns(&views[2]), "one has still something there");
        assert!(views[2].excludes(&range(19, 30)) && !views[2].excludes(&range(20, 30)));
        assert!(!views[2].excludes(&ByteRange { nsid: 2, ..range(10, 20) }));
        bells.take();
        assert!(!exclusion.look(c, &mut views[2], |_| true), "nothing new");
        assert_eq!(bells.take(), [0], "whoever waits is told");
        assert!(exclusion.is_granted(a) && !exclusion.concerns(&views[2]));
        exclusion.release(a);
        assert!(!exclusion.is_granted(a) && exclusion.concerns(&views[0]));
        assert!(exclusion.look(b, &mut views[1], |_| true) && views[1].is_empty());
    }

    #[test]
    fn of_claims_that_overlap_the_older_goes_first() {
        let (exclusion, _, workers @ [a, b, c]) = three();
        exclusion.claim(a, range(10, 20));
        exclusion.claim(b, range(15, 25));
        exclusion.claim(c, range(20, 30));
        for worker in workers {
            exclusion.look(worker, &mut View::default(), |_| true);
        }
        assert_eq!(workers.map(|worker| exclusion.is_granted(worker)), [true, false, false]);
        exclusion.release(a);
        assert_eq!(workers.map(|worker| exclusion.is_granted(worker)), [false, true, false]);
        exclusion.leave(b);
        assert_eq!(workers.map(|worker| exclusion.is_granted(worker)), [false, false, true]);
    }

    #[test]
    fn a_worker_that_comes_again_claims_nothing() {
        let (exclusion, bells, [a, b, _]) = three();
        exclusion.claim(a, range(0, 10));
        let mut view = View::default();
        exclusion.look(b, &mut view, |_| true);
        assert!(view.excludes(&range(5, 6)));
        bells.take();
        exclusion.join(a, bells.clone());
        assert_eq!(bells.take(), [1, 2], "who has waited is told");
        assert!(exclusion.look(b, &mut view, |_| true) && view.is_empty());
    }

    #[test]
    fn nobody_waits_for_a_worker_that_is_gone() {
        let (exclusion, _, [a, b, c]) = three();
        exclusion.claim(a, range(0, 1));
        exclusion.look(a, &mut View::default(), |_| true);
        exclusion.look(b, &mut View::default(), |_| true);
        assert!(!exclusion.is_granted(a));
        exclusion.leave(c);
        assert!(exclusion.is_granted(a));
    }
}
