//! What the leases say, and what of that is on their disks.

use super::world::{Session, Side, id};
use crate::lease::rules::Change;
use crate::lease::{Id, Owner, Record, State};

/// A record, or that there is none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    pub generation: u64,
    pub state: Entry,
    pub owner: Side,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// There is no record, and no image.
    Nothing,
    Owned,
    Offered(Session),
    Taken(Session),
    Returned(Session),
    Incoming(Session),
    Moved(Session),
}

impl Lease {
    pub fn new(owner: Side) -> Self {
        Self { generation: 1, state: Entry::Owned, owner }
    }

    pub fn nothing(owner: Side) -> Self {
        Self { generation: 0, state: Entry::Nothing, owner }
    }

    /// Whether a guest of `side` may run by it.
    pub fn is_of(&self, side: Side) -> bool {
        matches!(self.state, Entry::Owned | Entry::Taken(_)) && self.owner == side
    }

    /// As the rules see it.
    pub fn record(&self) -> Option<Record> {
        let session = |session: &Session| id(*session);
        let state = match &self.state {
            Entry::Nothing => return None,
            Entry::Owned => State::Owned,
            Entry::Offered(s) => State::Offered { session: session(s), peer: String::new() },
            Entry::Taken(s) => State::Taken { session: session(s) },
            Entry::Returned(s) => State::Returned { session: session(s) },
            Entry::Incoming(s) => State::Incoming { session: session(s) },
            Entry::Moved(s) => State::Moved { session: session(s), peer: String::new() },
        };
        let (host, vm) = (String::new(), String::new());
        let owner = Owner { id: self.owner.id(), host, pid: 0, vm, since_unix_seconds: 0 };
        Some(Record { lease: Id::default(), generation: self.generation, state, owner })
    }

    /// What `owner` writes.
    pub fn after(change: &Change, owner: Side) -> Self {
        let state = match &change.state {
            State::Offered { session, .. } => Entry::Offered(session[0]),
            State::Taken { session } => Entry::Taken(session[0]),
            State::Returned { session } => Entry::Returned(session[0]),
            State::Incoming { session } => Entry::Incoming(session[0]),
            State::Moved { session, .. } => Entry::Moved(session[0]),
            State::Owned => Entry::Owned,
            other => panic!("no rule of a hand-over writes {other}"),
        };
        Self { generation: change.generation, state, owner }
    }

    /// Whether a process that is started on the images beside it is let have them, as anybody is.
    pub fn lets_start(&self) -> bool {
        self.record().is_some_and(|record| !record.is_without_guest())
    }

    /// Whether this may follow on `before`: a generation that came back would make an old COMMIT good again.
    fn follows(&self, before: &Self) -> bool {
        self.state == Entry::Nothing || self.generation >= before.generation
    }
}

/// A lease on its disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Disk {
    /// What a crash leaves.
    pub stable: Lease,
    /// What was written and may still be lost, and who writes it.
    pub written: Option<(Side, Lease)>,
    /// Who holds the record lock.
    pub locked: Option<Side>,
}

impl Disk {
    pub fn new(stable: Lease) -> Self {
        Self { stable, written: None, locked: None }
    }

    /// What whoever reads it finds.
    pub fn read(&self) -> &Lease {
        self.written.as_ref().map_or(&self.stable, |(_, lease)| lease)
    }

    /// What may be found by whoever reads it after a crash.
    pub fn after_a_crash(&self) -> impl Iterator<Item = &Lease> {
        std::iter::once(&self.stable).chain(self.written.iter().map(|(_, lease)| lease))
    }

    /// `side` writes, under the record lock; whether it may.
    pub fn write(&mut self, side: Side, lease: Lease) -> bool {
        let follows = lease.follows(self.read());
        self.locked = Some(side);
        self.written = Some((side, lease));
        follows
    }

    /// A write of `side` is over: it `persists` or is lost. What is stable since, if it is.
    pub fn unlock(&mut self, side: Side, persists: bool) -> Option<&Lease> {
        self.release(side);
        let (_, lease) = self.written.take_if(|(writer, _)| *writer == side)?;
        if !persists {
            return None;
        }
        self.stable = lease;
        Some(&self.stable)
    }

    pub fn release(&mut self, side: Side) {
        self.locked.take_if(|holder| *holder == side);
    }
}
