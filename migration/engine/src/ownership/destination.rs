//! The side that takes the guest.
//!
//! ```text
//! Listening --admit--> Receiving --loaded--> Loaded --COMMIT--> Taking --taken--> Starting --started--> Owner
//!     ^                    |                   |                  |   ^ |
//!     |   fenced: failed, cut, told to quit,   |                  |   +-+ not known: again
//!     +------------------- another COMMIT, QUERY <--- NEVER ------+   told to quit --> GivingBack
//! ```
//!
//! A fence is what makes NEVER true: a session that has ended here is never admitted again and never taken. While a record that
//! could not be written may say `taken` all the same, NEVER would be no truth: a source that read `taken` has let go of its guest.
//! So it is tried until the record tells, which it does with the next write or read that succeeds.

use super::Answer;
use crate::lease::Id;

/// How many sessions that must never run here are remembered. A source asks within minutes, and an older one is only
/// refused an answer.
const FENCED_MAX: usize = 1024;

/// Where a process that waits for a guest stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Destination {
    fenced: Vec<Id>,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Listening,
    Receiving { session: Id },
    Loaded { session: Id },
    Taking { session: Id, generation: u64 },
    GivingBack { session: Id },
    Starting { session: Id },
    Owner { session: Id },
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// A source wants to come.
    Hello {
        /// Its attempt.
        session: Id,
    },
    /// RAM and devices are here and checked, and nothing of them runs.
    Loaded,
    /// The attempt failed, the link is lost, the time is over, or the process is to end; of the last alone a guest hears that
    /// is being taken.
    Failed,
    /// COMMIT came.
    Commit {
        /// The attempt that it is for.
        session: Id,
        /// What the lease is to say.
        generation: u64,
    },
    /// Image locks and images are ours, and the lease says `taken` on stable storage.
    Taken,
    /// Something of that failed, and the record does not say `taken`.
    NotTaken,
    /// Something of that failed, and the record may say `taken`.
    NotKnown,
    /// The record does not say `taken` any more.
    GivenBack,
    /// The lease could not be read or written: it may still say that we took the guest.
    NotGivenBack,
    /// The guest runs, or is paused: it is ours.
    Started,
    /// A source asks what became of its guest.
    Query {
        /// The attempt.
        session: Id,
        /// This process had agreed to it.
        to_us: bool,
    },
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Nothing that concerns the guest.
    Go,
    /// Turn the source away.
    Refuse,
    /// Under the record lock: check the offer, take the image locks, open the images, write `taken`.
    Take {
        /// Which offer.
        session: Id,
        /// Which offer.
        generation: u64,
    },
    /// Let go of image locks and images; if the record says that we took the guest, write `returned`.
    GiveBack {
        /// Which.
        session: Id,
    },
    /// Let the guest run.
    Start {
        /// Whose it was.
        session: Id,
    },
    /// Say it. The guest is not ours after [`Answer::Never`]: its machine is dropped first.
    Answer {
        /// The attempt.
        session: Id,
        /// What became of it.
        answer: Answer,
    },
}

impl Destination {
    /// Nobody has come yet.
    pub fn new() -> Self {
        Self { fenced: Vec::new(), phase: Phase::Listening }
    }

    /// What to do after `event`. An event that has no meaning now changes nothing.
    pub fn on(&mut self, event: Event) -> Action {
        match (self.phase, event) {
            (Phase::Listening, Event::Hello { session }) if !self.fenced.contains(&session) => {
                self.go(Phase::Receiving { session }, Action::Go)
            }
            (_, Event::Hello { .. }) => Action::Refuse,
            (Phase::Receiving { session }, Event::Loaded) => self.go(Phase::Loaded { session }, Action::Go),
            (Phase::Receiving { session } | Phase::Loaded { session }, Event::Failed) => self.never(session),

            (Phase::Loaded { session }, Event::Commit { session: of, generation }) => {
                if of == session {
                    self.go(Phase::Taking { session, generation }, Action::Take { session, generation })
                } else {
                    self.never(session)
                }
            }
            (Phase::Taking { session, .. }, Event::Taken) => {
                self.go(Phase::Starting { session }, Action::Start { session })
            }
            (Phase::Taking { session, .. }, Event::NotTaken) => self.never(session),
            (Phase::Taking { session, generation }, Event::NotKnown) => Action::Take { session, generation },
            (Phase::Taking { session, .. }, Event::Failed) => {
                self.go(Phase::GivingBack { session }, Action::GiveBack { session })
            }
            (Phase::GivingBack { session }, Event::GivenBack) => self.never(session),
            // The process ends, and what it knows with it.
            (Phase::GivingBack { .. }, Event::NotGivenBack) => Action::Go,
            (Phase::Starting { session }, Event::Started) => {
                self.go(Phase::Owner { session }, Action::Answer { session, answer: Answer::Running })
            }

            // Again: the answer is the same.
            (
                Phase::Owner { session },
                Event::Commit { session: of, .. } | Event::Query { session: of, .. },
            ) if of == session => Action::Answer { session, answer: Answer::Running },
            (_, Event::Query { to_us: false, .. }) => Action::Refuse,
            // It is not decided, and the source asks again.
            (
                Phase::Taking { session, .. } | Phase::GivingBack { session } | Phase::Starting { session },
                Event::Query { session: of, .. },
            ) if of == session => Action::Go,
            (Phase::Receiving { session } | Phase::Loaded { session }, Event::Query { session: of, .. })
                if of == session =>
            {
                self.never(session)
            }
            (_, Event::Query { session, .. }) => {
                self.fence(session);
                Action::Answer { session, answer: Answer::Never }
            }
            _ => Action::Go,
        }
    }

    /// The attempt is over: first the fence, then the answer.
    fn never(&mut self, session: Id) -> Action {
        self.fence(session);
        self.go(Phase::Listening, Action::Answer { session, answer: Answer::Never })
    }

    fn fence(&mut self, session: Id) {
        if !self.fenced.contains(&session) {
            if self.fenced.len() == FENCED_MAX {
                self.fenced.remove(0);
            }
            self.fenced.push(session);
        }
    }

    fn go(&mut self, phase: Phase, action: Action) -> Action {
        self.phase = phase;
        action
    }
}

/// What only the model looks at.
#[cfg(test)]
impl Destination {
    /// Whether no attempt goes on.
    pub fn is_listening(&self) -> bool {
        self.phase == Phase::Listening
    }

    pub fn is_receiving(&self, session: &Id) -> bool {
        self.phase == Phase::Receiving { session: *session }
    }

    pub fn has_fenced(&self, session: &Id) -> bool {
        self.fenced.contains(session)
    }

    /// A mistake, made on purpose.
    pub fn forget_fences(&mut self) {
        self.fenced.clear();
    }
}
