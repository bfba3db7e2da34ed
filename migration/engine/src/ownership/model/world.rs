//! A state of the world: the two machines and what surrounds them. [`super::steps`] says what happens in it.

use std::collections::BTreeSet;

use crate::lease::rules::Change;
use crate::lease::{Id, Owner, Record, State as LeaseState};
use crate::ownership::Answer;
use crate::ownership::destination::{self, Destination};
use crate::ownership::source::{self, Source};

/// A world to explore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct World {
    /// Both sides reach the same lease.
    pub leased: bool,
    /// Writing the lease can fail, and may have reached the disk all the same.
    pub lease_fails: bool,
    /// An operator looks at both processes and says what is true.
    pub operator: bool,
    /// RAM is handed over itself: both sides have it mapped.
    pub shares_ram: bool,
    /// How often the source may try.
    pub attempts: u8,
    /// What is broken on purpose.
    pub mutation: Option<Mutation>,
}

/// A mistake that the exploration must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// The source takes a COMMIT without an answer for one that did not arrive.
    ResumeAfterCommit,
    /// The destination runs whatever the lease says.
    RunUnoffered,
    /// NEVER is said and forgotten.
    NoFence,
    /// The guest runs before the record is on stable storage.
    RunBeforeSync,
    /// The guest runs before the record is written at all.
    RunBeforeTaking,
    /// The images are opened only when the record says `taken`, and it is given back if that fails.
    OpenAfterTaking,
    /// The source settles without writing: an offer that nobody took is ours.
    SettleWithoutWriting,
    /// The source runs after NEVER and leaves the offer in the lease.
    NeverBeforeLease,
    /// The source never asks again.
    NoQuery,
    /// The operator's word counts, whatever the lease says.
    WordBeforeLease,
    /// NEVER is said although the record may say `taken`.
    NeverWhenUnsure,
    /// The destination writes RAM that was handed over as soon as it has mapped it.
    WriteBeforeTaking,
    /// The destination writes it when the record is written, and not yet on stable storage.
    WriteBeforeSync,
    /// Something at the source still writes RAM when it is offered.
    WriteAfterOffer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    Source,
    Destination,
}

impl Side {
    pub fn id(self) -> Id {
        [self as u8 + 1; 16]
    }
}

/// An attempt's number; its session id repeats it.
pub type Session = u8;

pub fn id(session: Session) -> Id {
    [session; 16]
}

/// A message on its way. It may arrive again after it arrived, and at any time; a link that is cut is one that loses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Message {
    /// Everything up to PREPARE.
    Load(Session),
    Prepared(Session),
    Commit(Session, u64),
    Query(Session),
    Answer(Session, Answer),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    pub generation: u64,
    pub state: Entry,
    pub owner: Side,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    Owned,
    Offered(Session),
    Taken(Session),
    Returned(Session),
}

impl Lease {
    pub fn is_owned_by_source(&self) -> bool {
        (self.state, self.owner) == (Entry::Owned, Side::Source)
    }

    /// As the rules see it.
    pub fn record(&self) -> Record {
        let session = |session: &Session| id(*session);
        let state = match &self.state {
            Entry::Owned => LeaseState::Owned,
            Entry::Offered(s) => LeaseState::Offered { session: session(s), peer: String::new() },
            Entry::Taken(s) => LeaseState::Taken { session: session(s) },
            Entry::Returned(s) => LeaseState::Returned { session: session(s) },
        };
        let (host, vm) = (String::new(), String::new());
        let owner = Owner { id: self.owner.id(), host, pid: 0, vm, since_unix_seconds: 0 };
        Record { lease: Id::default(), generation: self.generation, state, owner }
    }

    pub fn after(change: &Change, owner: Side) -> Self {
        let state = match &change.state {
            LeaseState::Offered { session, .. } => Entry::Offered(session[0]),
            LeaseState::Taken { session } => Entry::Taken(session[0]),
            LeaseState::Returned { session } => Entry::Returned(session[0]),
            LeaseState::Owned => Entry::Owned,
            other => panic!("no rule of a hand-over writes {other}"),
        };
        Self { generation: change.generation, state, owner }
    }
}

/// The lease on its disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Disk {
    /// What a crash leaves.
    pub stable: Lease,
    /// What was written and may still be lost, and who writes it.
    pub written: Option<(Side, Lease)>,
    /// Who holds the record lock.
    pub locked: Option<Side>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Process<M, A> {
    pub alive: bool,
    pub runs: bool,
    pub machine: M,
    /// What it is about to do, or doing.
    pub action: A,
    /// The action is begun: a message is sent, or a record written.
    pub begun: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Without an action it prepares the destination.
    pub source: Process<Source, Option<source::Action>>,
    pub destination: Process<Destination, destination::Action>,
    /// The attempt that is, or was the last.
    pub session: Session,
    /// The source has let go of the guest for good.
    pub gone: bool,
    /// The source has given up its images.
    pub released: bool,
    pub disk: Option<Disk>,
    pub link: BTreeSet<Message>,
    /// Who wrote RAM that both have, last.
    pub ram: Side,
    /// The guest became the destination's.
    pub taken: bool,
    /// It has run there.
    pub ran: bool,
    /// Sessions of which NEVER was said.
    pub never: BTreeSet<Session>,
    /// The destination wrote `taken`, and does not know whether it is there.
    pub unsure: bool,
    pub violation: Option<&'static str>,
}

impl State {
    pub fn first(world: &World) -> Self {
        let stable = Lease { generation: 1, state: Entry::Owned, owner: Side::Source };
        Self {
            source: Process {
                alive: true,
                runs: true,
                machine: Source::new(world.leased),
                action: Some(source::Action::Resume),
                begun: false,
            },
            destination: Process {
                alive: true,
                runs: false,
                machine: Destination::new(),
                action: destination::Action::Go,
                begun: false,
            },
            session: 0,
            gone: false,
            released: false,
            disk: world.leased.then_some(Disk { stable, written: None, locked: None }),
            link: BTreeSet::new(),
            ram: Side::Source,
            taken: false,
            ran: false,
            never: BTreeSet::new(),
            unsure: false,
            violation: None,
        }
    }

    /// What whoever reads the lease finds.
    pub fn lease(&self) -> Option<&Lease> {
        let disk = self.disk.as_ref()?;
        Some(disk.written.as_ref().map_or(&disk.stable, |(_, lease)| lease))
    }

    pub fn is_locked_by_other(&self, side: Side) -> bool {
        self.disk.as_ref().is_some_and(|disk| disk.locked.is_some_and(|holder| holder != side))
    }

    pub fn write(&mut self, side: Side, change: &Change) {
        let before = self.lease().map_or(0, |lease| lease.generation);
        if change.generation < before {
            self.violation = Some("a generation goes back");
        }
        match side {
            Side::Source => self.source.begun = true,
            Side::Destination => self.destination.begun = true,
        }
        if let Some(disk) = &mut self.disk {
            disk.locked = Some(side);
            disk.written = Some((side, Lease::after(change, side)));
        }
    }

    /// The write is over. `persists`: it is on stable storage.
    pub fn unlock(&mut self, side: Side, persists: bool) {
        let Some(disk) = &mut self.disk else { return };
        if let Some((_, lease)) = disk.written.take_if(|(writer, _)| *writer == side)
            && persists
        {
            if lease.generation < disk.stable.generation {
                self.violation = Some("a generation goes back");
            }
            match lease.state {
                Entry::Taken(_) => self.taken = true,
                // To a source that has let go it returns no more.
                Entry::Returned(_) => self.taken = self.gone,
                Entry::Owned | Entry::Offered(_) => {}
            }
            disk.stable = lease;
        }
        disk.locked.take_if(|holder| *holder == side);
    }

    pub fn source_does(&mut self, action: source::Action) {
        self.source.action = Some(action);
        self.source.begun = false;
        match action {
            source::Action::Resume => {
                self.released = false;
                self.source.runs = true;
            }
            source::Action::Finish | source::Action::StayPaused => self.gone = true,
            _ => {}
        }
    }

    pub fn source_hears(&mut self, event: source::Event) {
        let action = self.source.machine.on(event);
        self.source_does(action);
    }

    pub fn destination_hears(&mut self, event: destination::Event) {
        self.destination.action = match self.destination.machine.on(event) {
            // The model's source does not wait to be turned away.
            destination::Action::Refuse => destination::Action::Go,
            action => action,
        };
        self.destination.begun = false;
    }

    pub fn destination_runs(&mut self, session: Session) {
        self.destination.runs = true;
        self.ran = true;
        self.taken = true;
        if self.never.contains(&session) {
            self.violation = Some("a session runs of which NEVER was said");
        }
    }

    pub fn writes_ram(&mut self, side: Side) {
        if side == Side::Source && (self.taken || self.destination.runs) {
            self.violation = Some("the source writes RAM of a guest that is the destination's");
        }
        self.ram = side;
    }

    /// The source tries to give the guest away.
    pub fn begin(&mut self, session: Session) {
        self.session = session;
        self.source.runs = false;
        self.source.machine = Source::new(self.disk.is_some());
        self.source.action = None;
        self.link.insert(Message::Load(session));
    }

    /// The destination says what became of a session; `arrives`, or not.
    pub fn answer(&mut self, session: Session, answer: Answer, arrives: bool) {
        if answer == Answer::Never {
            self.never.insert(session);
        }
        if arrives {
            self.link.insert(Message::Answer(session, answer));
        }
        self.destination.action = destination::Action::Go;
    }

    /// What cannot be heard any more makes no difference.
    pub fn forget_what_nobody_hears(&mut self) {
        let (source, destination) = (self.source.alive && !self.gone, self.destination.alive);
        self.link.retain(|message| match message {
            Message::Prepared(_) | Message::Answer(..) => source,
            Message::Load(_) | Message::Commit(..) | Message::Query(_) => destination,
        });
    }

    /// A mistake, made on purpose: what is written is not on stable storage yet.
    pub fn release_record_lock(&mut self, side: Side) {
        if let Some(disk) = &mut self.disk {
            disk.locked.take_if(|holder| *holder == side);
        }
    }

    pub fn is_killed(&mut self, side: Side, persists: bool) {
        match side {
            Side::Source => {
                (self.source.alive, self.source.runs) = (false, false);
                // What is not looked at any more needs no states of its own.
                self.source_does(source::Action::Wait);
            }
            Side::Destination => {
                (self.destination.alive, self.destination.runs) = (false, false);
                self.destination.action = destination::Action::Go;
            }
        }
        self.unlock(side, persists);
    }

    /// No attempt goes on at the destination.
    pub fn is_listening(&self) -> bool {
        self.destination.machine.is_listening() && self.destination.action == destination::Action::Go
    }
}
