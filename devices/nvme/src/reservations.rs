//! The reservations of a subsystem, and what its controllers have to do with them.
//!
//! ```text
//! command/reservations.rs, on a worker -> Reservations (one lock) -> reservation.rs: the outcome
//!     -> the gates of all controllers (gate.rs) -> notifications, told by worker 0 of each controller that they concern
//!     -> drains: commands of preempted hosts that a Preempt and Abort waits for (preempt.rs)
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use nvme_spec::log::ReservationNotificationLog;
use nvme_spec::{NSID_BROADCAST, Status};

use crate::gate::Gate;
use crate::reservation::{HostIdentity, Notification, Outcome, Reservation};
use crate::shared::{Host, lock};

/// Notifications that a controller keeps until they are read. The oldest goes first when there are more, and Log Page Count tells.
pub(crate) const MAX_NOTICES: usize = 64;
/// Reservation Notification Mask bits 3:1 (Base 5.27.1.26), by the value of [`Notification`].
pub(crate) const NOTIFICATION_MASK: u8 = 0b1110;

/// A worker: its controller's identifier and its index there.
pub(crate) type WorkerId = (u16, usize);

/// See the module's text. Its lock is taken after that of the subsystem, and no other is taken while it is held.
#[derive(Default)]
pub(crate) struct Reservations {
    table: Mutex<Table>,
}

/// What the lock protects.
#[derive(Default)]
pub(crate) struct Table {
    /// By namespace identifier; those that are not there are as nobody has ever used them.
    pub namespaces: BTreeMap<u32, Reservation>,
    /// By controller identifier.
    pub members: BTreeMap<u16, Member>,
    drains: Vec<Drain>,
    next_drain: u64,
    /// What a saved state has already put here.
    pub loaded: bool,
}

/// A controller.
pub(crate) struct Member {
    pub identity: HostIdentity,
    pub notices: Notices,
    gate: Arc<Gate>,
    host: Arc<dyn Host>,
    workers: usize,
}

/// A notification that the host has not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Notice {
    pub count: u64,
    pub what: Notification,
    pub nsid: u32,
}

/// The Reservation Notification log of a controller (Base 5.16.1.24).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Notices {
    /// Log pages ever made.
    pub count: u64,
    /// Oldest first.
    pub waiting: VecDeque<Notice>,
    /// Reservation Notification Mask, by namespace identifier; 0 is not kept.
    pub masks: BTreeMap<u32, u8>,
}

impl Notices {
    fn add(&mut self, nsid: u32, what: Notification) -> bool {
        if self.masks.get(&nsid).is_some_and(|mask| mask & 1 << what as u8 != 0) {
            return false;
        }
        // 0h says that the log is empty, so the counter goes round it.
        self.count = self.count.checked_add(1).unwrap_or(1);
        if self.waiting.len() == MAX_NOTICES {
            self.waiting.pop_front();
        }
        self.waiting.push_back(Notice { count: self.count, what, nsid });
        true
    }

    fn page(&self) -> ReservationNotificationLog {
        let Some(notice) = self.waiting.front() else { return ReservationNotificationLog::default() };
        ReservationNotificationLog {
            log_page_count: notice.count,
            kind: notice.what as u8,
            available: (self.waiting.len() - 1) as u8,
            nsid: notice.nsid,
        }
    }
}

/// A Preempt and Abort that waits.
struct Drain {
    number: u64,
    nsid: u32,
    by: WorkerId,
    /// Workers that may have commands of a preempted host in flight.
    waits_for: BTreeSet<WorkerId>,
}

/// One of the drains.
pub(crate) type DrainNumber = u64;

/// What [`Reservations::change`] leaves to be done.
pub(crate) struct Changed {
    /// To be waited for.
    pub drain: Option<DrainNumber>,
    /// What survives the loss of power is another.
    pub persists: bool,
}

impl Reservations {
    /// The table, while nobody changes it.
    pub fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// A controller that nobody uses yet.
    pub fn join(&self, controller: u16, gate: Arc<Gate>, host: Arc<dyn Host>, workers: usize) {
        // One that was there has been reset by the machine around it.
        self.reset(controller);
        self.forget_worker(|worker| worker.0 == controller);
        let mut table = self.table();
        let identity = HostIdentity::Unnamed { controller };
        let member = Member { identity, notices: Notices::default(), gate, host, workers };
        table.members.insert(controller, member);
        table.open_gates(None);
    }

    /// The controller is gone. A host that has a name may come back by another.
    pub fn leave(&self, controller: u16, gate: &Arc<Gate>) {
        let is_here = |member: &Member| Arc::ptr_eq(&member.gate, gate);
        if !self.table().members.get(&controller).is_some_and(is_here) {
            return;
        }
        self.reset(controller);
        self.table().members.remove(&controller);
        self.forget_worker(|worker| worker.0 == controller);
    }

    /// Nobody waits for these workers any more, nor are they themselves waiting.
    fn forget_worker(&self, is_gone: impl Fn(WorkerId) -> bool) {
        let mut table = self.table();
        table.drains.retain(|drain| !is_gone(drain.by));
        let wakes = table.drained(is_gone);
        drop(table);
        wake(wakes);
    }

    /// A Controller Level Reset: the Host Identifier, the mask and the log are as at first.
    pub fn reset(&self, controller: u16) {
        let mut table = self.table();
        let Some(member) = table.members.get_mut(&controller) else { return };
        let before = std::mem::replace(&mut member.identity, HostIdentity::Unnamed { controller });
        member.notices = Notices::default();
        member.gate.notified.store(false, Ordering::SeqCst);
        let mut wakes = Wakes::new();
        if matches!(before, HostIdentity::Unnamed { .. }) {
            let used: Vec<u32> = table.namespaces.keys().copied().collect();
            for nsid in used {
                let outcome = table.namespaces.get_mut(&nsid).map(|reservation| reservation.forget(before));
                table.tell(nsid, &outcome.unwrap_or_default(), &mut wakes);
            }
        }
        table.open_gates(None);
        drop(table);
        wake(wakes);
    }

    /// The controllers but `controller` are to be reset.
    pub fn reset_others(&self, controller: u16) {
        let mut wakes = Wakes::new();
        for (&id, member) in self.table().members.iter().filter(|(id, _)| **id != controller) {
            member.gate.subsystem_reset.store(true, Ordering::SeqCst);
            wakes.insert((id, 0), Arc::clone(&member.host));
        }
        wake(wakes);
    }

    /// A sanitize operation has ended that `controller` was asked for.
    pub fn tell_of_sanitize(&self, controller: u16) {
        let host = self.table().members.get(&controller).map(|member| {
            member.gate.sanitized.store(true, Ordering::SeqCst);
            Arc::clone(&member.host)
        });
        host.into_iter().for_each(|host| host.wake(0));
    }

    /// Sets the host of a controller (Base 5.27.1.25). A host that is registered stays who it is.
    pub fn set_identity(&self, controller: u16, identity: HostIdentity) -> Result<(), Status> {
        let mut table = self.table();
        let extended = |identity: &HostIdentity| match identity {
            HostIdentity::Unnamed { .. } => None,
            HostIdentity::Short(_) => Some(false),
            HostIdentity::Extended(_) => Some(true),
        };
        let mut others = table.members.iter().filter(|(id, _)| **id != controller);
        if let Some(form) = extended(&identity)
            && others.any(|(_, other)| extended(&other.identity).is_some_and(|other| other != form))
        {
            return Err(Status::HOST_IDENTIFIER_INCONSISTENT.do_not_retry());
        }
        let Some(before) = table.members.get(&controller).map(|member| member.identity) else {
            return Ok(());
        };
        if before != identity && table.namespaces.values().any(|one| one.is_registered(before)) {
            return Err(Status::COMMAND_SEQUENCE_ERROR.do_not_retry());
        }
        if let Some(member) = table.members.get_mut(&controller) {
            member.identity = identity;
        }
        table.open_gates(None);
        Ok(())
    }

    /// Carries out a command of `by`'s host on `nsid`. With `abort` the command is complete when nothing of a preempted host is in
    /// flight at the namespace, which [`Reservations::is_drained`] tells.
    pub fn change(
        &self,
        by: WorkerId,
        nsid: u32,
        abort: bool,
        command: impl FnOnce(&mut Reservation, HostIdentity) -> Result<Outcome, Status>,
    ) -> Result<Changed, Status> {
        let mut table = self.table();
        let identity = table.members.get(&by.0).map(|member| member.identity);
        let identity = identity.unwrap_or(HostIdentity::Unnamed { controller: by.0 });
        let mut reservation = table.namespaces.get(&nsid).cloned().unwrap_or_default();
        let persisted = reservation.persists;
        let outcome = command(&mut reservation, identity)?;
        let persists = persisted || reservation.persists;
        if reservation == Reservation::default() {
            table.namespaces.remove(&nsid);
        } else {
            table.namespaces.insert(nsid, reservation);
        }
        table.open_gates(Some(nsid));
        let mut wakes = Wakes::new();
        table.tell(nsid, &outcome, &mut wakes);
        let drain = abort.then(|| table.drain(by, nsid, &outcome.preempted, &mut wakes)).flatten();
        drop(table);
        wake(wakes);
        Ok(Changed { drain, persists })
    }

    /// The namespace is no more.
    pub fn forget(&self, nsid: u32) {
        let mut table = self.table();
        table.namespaces.remove(&nsid);
        for member in table.members.values_mut() {
            member.notices.masks.remove(&nsid);
        }
        table.open_gates(Some(nsid));
    }

    /// Namespaces where commands of `worker` are waited for.
    pub fn drains_of(&self, worker: WorkerId) -> Vec<u32> {
        let table = self.table();
        let drains = table.drains.iter().filter(|drain| drain.waits_for.contains(&worker));
        drains.map(|drain| drain.nsid).collect()
    }

    /// Nothing that was waited for is in flight at `worker` any more.
    pub fn drained(&self, worker: WorkerId) {
        let wakes = self.table().drained(|waited| waited == worker);
        wake(wakes);
    }

    /// Whether nobody waits for `number` any more.
    pub fn is_drained(&self, number: DrainNumber) -> bool {
        !self.table().drains.iter().any(|drain| drain.number == number)
    }

    /// The page of the Reservation Notification log; `retain` leaves it there. The flag says that there are more.
    pub fn read_notice(&self, controller: u16, retain: bool) -> (ReservationNotificationLog, bool) {
        let mut table = self.table();
        let Some(member) = table.members.get_mut(&controller) else {
            return (ReservationNotificationLog::default(), false);
        };
        let page = member.notices.page();
        if !retain {
            member.notices.waiting.pop_front();
        }
        (page, !member.notices.waiting.is_empty())
    }

    /// Reservation Notification Mask (Base 5.27.1.26) of one namespace.
    pub fn mask(&self, controller: u16, nsid: u32) -> u8 {
        let table = self.table();
        let masks = table.members.get(&controller).map(|member| &member.notices.masks);
        masks.and_then(|masks| masks.get(&nsid)).copied().unwrap_or(0)
    }

    /// Sets it for some.
    pub fn set_mask(&self, controller: u16, nsids: impl Iterator<Item = u32>, mask: u8) {
        let mut table = self.table();
        let Some(member) = table.members.get_mut(&controller) else { return };
        for nsid in nsids {
            match mask & NOTIFICATION_MASK {
                0 => drop(member.notices.masks.remove(&nsid)),
                mask => drop(member.notices.masks.insert(nsid, mask)),
            }
        }
    }

    /// Reservation Persistence (Base 5.27.1.27) of one namespace.
    pub fn persists(&self, nsid: u32) -> bool {
        self.table().namespaces.get(&nsid).is_some_and(|reservation| reservation.persists)
    }
}

type Wakes = BTreeMap<WorkerId, Arc<dyn Host>>;

/// After the lock is given back: a host may do anything then.
fn wake(wakes: Wakes) {
    for ((_, worker), host) in wakes {
        host.wake(worker);
    }
}

impl Table {
    /// Writes what the reservations of one namespace, or of all, keep away.
    pub fn open_gates(&self, nsid: Option<u32>) {
        let nothing = Reservation::default();
        for member in self.members.values() {
            let set =
                |nsid, one: &Reservation| member.gate.set_conflicts(nsid, one.conflicts(member.identity));
            match nsid {
                Some(nsid) => set(nsid, self.namespaces.get(&nsid).unwrap_or(&nothing)),
                None => self.namespaces.iter().for_each(|(&nsid, one)| set(nsid, one)),
            }
        }
    }

    fn tell(&mut self, nsid: u32, outcome: &Outcome, wakes: &mut Wakes) {
        for &(told, what) in &outcome.told {
            for (&id, member) in self.members.iter_mut().filter(|(_, member)| member.identity == told) {
                if member.notices.add(nsid, what) {
                    member.gate.notified.store(true, Ordering::SeqCst);
                    wakes.insert((id, 0), Arc::clone(&member.host));
                }
            }
        }
    }

    fn drain(
        &mut self,
        by: WorkerId,
        nsid: u32,
        preempted: &[HostIdentity],
        wakes: &mut Wakes,
    ) -> Option<DrainNumber> {
        let mut waits_for = BTreeSet::new();
        for (&id, member) in self.members.iter().filter(|(_, member)| preempted.contains(&member.identity)) {
            member.gate.drains.fetch_add(1, Ordering::SeqCst);
            for worker in 0..member.workers {
                waits_for.insert((id, worker));
                wakes.insert((id, worker), Arc::clone(&member.host));
            }
        }
        if waits_for.is_empty() {
            return None;
        }
        let number = self.next_drain;
        self.next_drain += 1;
        self.drains.push(Drain { number, nsid, by, waits_for });
        Some(number)
    }

    fn drained(&mut self, is_done: impl Fn(WorkerId) -> bool) -> Wakes {
        let mut wakes = Wakes::new();
        let members = &self.members;
        self.drains.retain_mut(|drain| {
            drain.waits_for.retain(|&worker| !is_done(worker));
            if drain.waits_for.is_empty()
                && let Some(member) = members.get(&drain.by.0)
            {
                wakes.insert(drain.by, Arc::clone(&member.host));
            }
            !drain.waits_for.is_empty()
        });
        wakes
    }
}

/// Whether a command with this identifier goes to namespace `nsid`.
pub(crate) fn goes_to(command_nsid: u32, nsid: u32) -> bool {
    command_nsid == nsid || command_nsid == NSID_BROADCAST
}
