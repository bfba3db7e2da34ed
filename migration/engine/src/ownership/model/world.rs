//! A state of the world: the two machines and what surrounds them. [`super::steps`] says what happens in it.

use std::collections::BTreeSet;

use super::record::{Disk, Entry, Lease};
use crate::lease::{Id, rules};
use crate::ownership::Answer;
use crate::ownership::destination::{self, Destination};
use crate::ownership::source::{self, Source};

/// Which leases there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leases {
    /// None.
    None,
    /// Both sides reach the same.
    Common,
    /// Each side has one, beside images of its own, that the other does not see.
    OneEach,
}

/// A world to explore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct World {
    pub leases: Leases,
    /// Writing a lease can fail, and may have reached the disk all the same.
    pub lease_fails: bool,
    /// An operator looks at both processes and says what is true.
    pub operator: bool,
    /// How often a side that was killed may be started anew on its images, if they let it.
    pub restarts: u8,
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
    /// The source stays stopped when an attempt fails before it gave anything away.
    StayStopped,
    /// The source does not stop the guest before it says that all was sent.
    RunOn,
    /// The destination says that it has loaded what has not come.
    LoadWithoutRam,
    /// The destination waits for ever for a source that is silent.
    WaitForEver,
    /// The destination hears nobody after an attempt that failed.
    ListenOnce,
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
    /// The images at the source are marked as moved when COMMIT is out.
    MarkAfterCommit,
    /// The source marks them and does not wait for the disk.
    MarkWithoutSync,
    /// The source runs with images that are marked as moved.
    ResumeFromMoved,
    /// A guest that stood still, since its images could not be taken back, goes on without them being so.
    ContinueFromMoved,
    /// What has not come whole is left there, as if it were something.
    LeaveIncoming,
    /// The operator looks at the record of the destination, and not at whether its process still waits for the guest.
    ReclaimByRecord,
    /// The operator looks at the record of the destination, and not at whether its process knows what that says.
    ConfirmByRecord,
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
    Hello(Session),
    Agree(Session),
    /// Memory and images, while the guest runs.
    Rounds(Session),
    /// The rest of them, and that this was all.
    Prepare(Session),
    Prepared(Session),
    Commit(Session, u64),
    Query(Session),
    Answer(Session, Answer),
}

/// What a source is about to do, or doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Giving {
    Greets,
    AwaitsAgree,
    Copies,
    Stops,
    AwaitsPrepared,
    /// What its machine says.
    Does(source::Action),
    /// The guest is its own and stands still, since its images could not be taken back.
    StandsStill,
}

/// What a destination is about to do, or doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Taking {
    /// Makes room for images, which are nobody's until all of them is there.
    Expects,
    Agrees,
    /// Removes images that did not come whole, and then says so.
    GivesUp(Session),
    /// What its machine says.
    Does(destination::Action),
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
    pub source: Process<Source, Giving>,
    pub destination: Process<Destination, Taking>,
    /// The attempt that is, or was the last.
    pub session: Session,
    /// The source has let go of the guest for good.
    pub gone: bool,
    /// The source has given up its images.
    pub released: bool,
    /// The common lease; or that of the source, and that of the destination.
    pub disks: Vec<Disk>,
    pub link: BTreeSet<Message>,
    /// What goes while the guest runs is at the destination.
    pub placed: bool,
    /// Of the lease beside images that come, as it was written.
    pub expected_generation: u64,
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
    pub restarts_left: u8,
    pub violation: Option<&'static str>,
}

impl State {
    pub fn first(world: &World) -> Self {
        let disks = match world.leases {
            Leases::None => vec![],
            Leases::Common => vec![Disk::new(Lease::new(Side::Source))],
            Leases::OneEach => {
                vec![Disk::new(Lease::new(Side::Source)), Disk::new(Lease::nothing(Side::Destination))]
            }
        };
        Self {
            source: Process {
                alive: true,
                runs: true,
                machine: Source::new(disks.len() == 1),
                action: Giving::Does(source::Action::Resume),
                begun: false,
            },
            destination: Process {
                alive: true,
                runs: false,
                machine: Destination::new(),
                action: Taking::Does(destination::Action::Go),
                begun: false,
            },
            session: 0,
            gone: false,
            released: false,
            disks,
            link: BTreeSet::new(),
            placed: false,
            expected_generation: 0,
            ram: Side::Source,
            taken: false,
            ran: false,
            never: BTreeSet::new(),
            unsure: false,
            restarts_left: world.restarts,
            violation: None,
        }
    }

    /// Whether each side has a lease that the other does not see.
    pub fn has_one_each(&self) -> bool {
        self.disks.len() == 2
    }

    /// Where the lease is that `side` reads and writes.
    pub fn disk(&self, side: Side) -> Option<&Disk> {
        self.disks.get(side as usize).or(self.disks.first())
    }

    fn disk_mut(&mut self, side: Side) -> Option<&mut Disk> {
        let index = if self.has_one_each() { side as usize } else { 0 };
        self.disks.get_mut(index)
    }

    /// What `side` finds in its lease.
    pub fn lease(&self, side: Side) -> Option<&Lease> {
        self.disk(side).map(Disk::read)
    }

    pub fn is_locked_by_other(&self, side: Side) -> bool {
        self.disk(side).is_some_and(|disk| disk.locked.is_some_and(|holder| holder != side))
    }

    pub fn write(&mut self, side: Side, lease: Lease) {
        match side {
            Side::Source => self.source.begun = true,
            Side::Destination => self.destination.begun = true,
        }
        if self.disk_mut(side).is_some_and(|disk| !disk.write(side, lease)) {
            self.violation = Some("a generation goes back");
        }
    }

    /// The write is over. `persists`: it is on stable storage.
    pub fn unlock(&mut self, side: Side, persists: bool) {
        let stable = self.disk_mut(side).and_then(|disk| disk.unlock(side, persists));
        match stable.map(|lease| lease.state) {
            Some(Entry::Taken(_)) => self.taken = true,
            // To a source that has let go it returns no more.
            Some(Entry::Returned(_) | Entry::Incoming(_)) => self.taken = self.gone,
            _ => {}
        }
    }

    pub fn source_does(&mut self, action: source::Action) {
        let gives_away = matches!(self.source.action, Giving::Does(_));
        self.source.action = Giving::Does(action);
        self.source.begun = false;
        match action {
            // It takes back first what it has left here.
            source::Action::Resume if gives_away && self.has_one_each() => {}
            source::Action::Resume => self.source_runs(),
            source::Action::Finish | source::Action::StayPaused => self.gone = true,
            _ => {}
        }
    }

    /// The guest goes on at the source.
    pub fn source_runs(&mut self) {
        self.source.action = Giving::Does(source::Action::Resume);
        self.source.begun = false;
        self.source.runs = true;
        self.released = false;
    }

    pub fn source_hears(&mut self, event: source::Event) {
        let action = self.source.machine.on(event);
        self.source_does(action);
    }

    /// The source is at the next step of an attempt that nothing was given away in.
    pub fn source_goes_on(&mut self, to: Giving) {
        self.source.action = to;
    }

    pub fn destination_hears(&mut self, event: destination::Event) {
        let action = match self.destination.machine.on(event) {
            // The model's source does not wait to be turned away.
            destination::Action::Refuse => Taking::Does(destination::Action::Go),
            destination::Action::Answer { session, answer: Answer::Never } if self.is_expecting(&session) => {
                Taking::GivesUp(session[0])
            }
            action => Taking::Does(action),
        };
        self.destination_does(action);
    }

    /// Whether images are at the destination that are nobody's, because of `session`.
    fn is_expecting(&self, session: &Id) -> bool {
        let record = self.lease(Side::Destination).and_then(Lease::record);
        record.is_some_and(|record| rules::is_incoming(&record, &Side::Destination.id(), session))
    }

    pub fn destination_does(&mut self, action: Taking) {
        self.destination.action = action;
        self.destination.begun = false;
    }

    pub fn destination_runs(&mut self, session: Session) {
        self.destination.runs = true;
        self.ran = true;
        self.taken = true;
        if self.never.contains(&session) {
            self.violation = Some("a session runs of which NEVER was said");
        } else if !self.placed {
            self.violation = Some("the guest runs without its memory");
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
        self.source.machine = Source::new(self.disks.len() == 1);
        self.source_goes_on(Giving::Greets);
    }

    /// The destination says what became of a session; `arrives`, or not.
    pub fn answer(&mut self, session: Session, answer: Answer, arrives: bool) {
        if answer == Answer::Never {
            self.never.insert(session);
        }
        if arrives {
            self.link.insert(Message::Answer(session, answer));
        }
        self.destination_does(Taking::Does(destination::Action::Go));
    }

    /// A mistake, made on purpose: what is written is not on stable storage yet.
    pub fn release_record_lock(&mut self, side: Side) {
        if let Some(disk) = self.disk_mut(side) {
            disk.release(side);
        }
    }

    pub fn is_killed(&mut self, side: Side, persists: bool) {
        match side {
            Side::Source => {
                (self.source.alive, self.source.runs) = (false, false);
                // What is not looked at any more needs no states of its own.
                self.source.machine = Source::new(self.disks.len() == 1);
                self.source.action = Giving::Does(source::Action::Wait);
                (self.source.begun, self.released) = (false, false);
            }
            Side::Destination => {
                (self.destination.alive, self.destination.runs) = (false, false);
                self.destination.machine = Destination::new();
                self.destination_does(Taking::Does(destination::Action::Go));
                (self.placed, self.expected_generation) = (false, 0);
            }
        }
        self.unlock(side, persists);
    }

    /// Another process runs the guest from the images of `side`, from the beginning.
    pub fn is_started_anew(&mut self, side: Side) {
        self.restarts_left -= 1;
        let generation = self.lease(side).map_or(0, |lease| lease.generation) + 1;
        if let Some(disk) = self.disk_mut(side) {
            disk.stable = Lease { generation, ..Lease::new(side) };
        }
        match side {
            Side::Source => {
                self.source.alive = true;
                self.source.machine = Source::new(self.disks.len() == 1);
                self.gone = false;
                self.source_runs();
            }
            Side::Destination => {
                self.destination.alive = true;
                self.destination.machine = Destination::new();
                self.destination.runs = true;
                self.ran = true;
            }
        }
    }

    /// The guest runs in a process at the destination that knows of no migration.
    pub fn is_anew_there(&self) -> bool {
        self.destination.runs && self.destination.machine.is_listening()
    }

    /// No attempt goes on at the destination.
    pub fn is_listening(&self) -> bool {
        self.destination.machine.is_listening()
            && self.destination.action == Taking::Does(destination::Action::Go)
            && !self.destination.runs
    }

    /// What cannot be heard any more, or changes nothing, makes no difference.
    pub fn forget_what_nobody_hears(&mut self) {
        use source::Action;
        let link = std::mem::take(&mut self.link);
        let Self { source, destination, session, gone, .. } = &*self;
        let hears_there = destination.alive && !self.is_anew_there();
        let machine = &destination.machine;
        let is_fenced = |session: Session| machine.has_fenced(&id(session));
        let is_free = |session: Session| hears_there && !destination.runs && !is_fenced(session);
        let hears_here = |of: Session| source.alive && !gone && of == *session;
        let (greets, prepares) = match source.action {
            Giving::Greets | Giving::AwaitsAgree => (true, true),
            Giving::Copies | Giving::Stops | Giving::AwaitsPrepared => (false, true),
            Giving::Does(_) | Giving::StandsStill => (false, false),
        };
        let has_it = matches!(source.action, Giving::Does(Action::Resume) | Giving::StandsStill);
        let matters = |message: &Message| match *message {
            Message::Agree(of) => hears_here(of) && greets,
            Message::Prepared(of) => hears_here(of) && prepares,
            Message::Answer(of, _) => hears_here(of) && !has_it,
            Message::Hello(of) | Message::Rounds(of) | Message::Prepare(of) => is_free(of),
            Message::Query(of) => hears_there && (hears_here(of) || !is_fenced(of)),
            Message::Commit(..) => hears_there,
        };
        self.link = link.into_iter().filter(matters).collect();
    }
}
