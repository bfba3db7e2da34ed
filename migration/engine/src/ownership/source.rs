//! The side that gives the guest away.
//!
//! ```text
//! Preparing --prepared--> Offering --written--> Releasing --released--> Committing --RUNNING--> Finish
//!     |                      |                      |                   |      |
//!   failed                 failed                 failed              NEVER  no answer
//!     v                      v                      v                   v      v
//!   Resume                Settling <---------------------------------------- Asking --RUNNING--> Finish
//!                            |  ours: Resume   theirs: Finish, or StayPaused if COMMIT was never sent
//!                            |  cannot be read: Waiting, then Asking or Settling again
//! ```
//!
//! Without a lease there is nothing to offer and nothing to settle: before COMMIT the guest is ours, after NEVER too, and
//! everything else waits for the destination or for the operator.

use super::Answer;

/// Where a hand-over stands at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Source {
    leased: bool,
    /// The first byte of COMMIT may be out.
    committed: bool,
    /// The destination has said that it never will run the guest.
    never: bool,
    word: Option<Word>,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Preparing,
    Offering,
    Releasing { generation: u64 },
    Committing,
    Asking,
    Settling,
    Waiting,
    Ended,
}

/// What an operator knows that no process can find out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Word {
    /// The destination has the guest, or had it.
    Confirm,
    /// The destination never ran the guest and never will.
    Reclaim,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// The destination has loaded everything, and it is too late to cancel.
    Prepared,
    /// The attempt failed before.
    Failed,
    /// The lease offers the guest, on stable storage.
    Offered {
        /// What COMMIT is to carry.
        generation: u64,
    },
    /// Writing the offer failed; it may be there all the same.
    OfferFailed,
    /// The image locks are free.
    Released,
    /// They could not be released.
    ReleaseFailed,
    /// The destination answered COMMIT or QUERY.
    Answered(Answer),
    /// It did not: the link is lost, the time is over, or what came is no answer.
    NoAnswer,
    /// The lease says that the guest is ours, on stable storage.
    Ours,
    /// The lease says that it is someone else's.
    Theirs,
    /// The lease could not be read or written.
    Unreadable,
    /// It is time to try again.
    Retry,
    /// The operator decides, as far as there is something to decide.
    Operator(Word),
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Write `offered` to the lease.
    Offer,
    /// Release the image locks.
    Release,
    /// Send COMMIT and hear the answer.
    Commit {
        /// What the lease says; 0 without one.
        generation: u64,
    },
    /// Reach the destination anew, send QUERY and hear the answer.
    Ask,
    /// Let the lease decide.
    Settle,
    /// Wait a moment, or for the operator.
    Wait,
    /// The guest is ours: let it run.
    Resume,
    /// The guest is the destination's: let go of it.
    Finish,
    /// The guest is someone else's, though it was not handed over: it stays paused.
    StayPaused,
}

impl Source {
    /// An attempt begins. `leased`: the guest has a lease.
    pub fn new(leased: bool) -> Self {
        Self { leased, committed: false, never: false, word: None, phase: Phase::Preparing }
    }

    /// The lease was to say that the guest is in a file now, and it is not known whether it does: only the lease can tell.
    pub fn suspended() -> Self {
        Self { phase: Phase::Waiting, ..Self::new(true) }
    }

    /// Whether the destination may have the guest.
    pub fn is_committed(&self) -> bool {
        self.committed
    }

    /// Whether nobody but the destination or an operator can tell where the guest is.
    pub fn needs_word(&self) -> bool {
        self.committed && !self.leased && self.phase == Phase::Waiting
    }

    /// What to do after `event`. An event that has no meaning now, such as an answer to what was not asked, changes nothing.
    pub fn on(&mut self, event: Event) -> Action {
        match (self.phase, event) {
            (Phase::Preparing, Event::Prepared) if self.leased => self.go(Phase::Offering, Action::Offer),
            (Phase::Preparing, Event::Prepared) => {
                self.go(Phase::Releasing { generation: 0 }, Action::Release)
            }
            (Phase::Preparing, Event::Failed) => self.end(Action::Resume),

            (Phase::Offering, Event::Offered { generation }) => {
                self.go(Phase::Releasing { generation }, Action::Release)
            }
            (Phase::Offering, Event::OfferFailed) => self.settle_or(Action::Resume),
            (Phase::Releasing { generation }, Event::Released) => {
                self.committed = true;
                self.go(Phase::Committing, Action::Commit { generation })
            }
            (Phase::Releasing { .. }, Event::ReleaseFailed) => self.settle_or(Action::Resume),

            (Phase::Committing | Phase::Asking, Event::Answered(Answer::Running)) => self.end(Action::Finish),
            (Phase::Committing | Phase::Asking, Event::Answered(Answer::Never)) => {
                // Without a lease it is the destination's word, and it has fenced itself before it gave it.
                self.never = true;
                self.settle_or(Action::Resume)
            }
            (Phase::Committing, Event::NoAnswer) => self.go(Phase::Asking, Action::Ask),
            (Phase::Asking, Event::NoAnswer) if self.leased => self.go(Phase::Settling, Action::Settle),
            (Phase::Asking, Event::NoAnswer) => match self.word {
                Some(Word::Confirm) => self.end(Action::Finish),
                Some(Word::Reclaim) => self.end(Action::Resume),
                None => self.go(Phase::Waiting, Action::Wait),
            },

            (Phase::Settling, Event::Ours) => self.end(Action::Resume),
            (Phase::Settling, Event::Theirs) if self.committed => self.end(Action::Finish),
            (Phase::Settling, Event::Theirs) => self.end(Action::StayPaused),
            (Phase::Settling, Event::Unreadable) => self.go(Phase::Waiting, Action::Wait),

            (Phase::Waiting, Event::Operator(word)) if !self.leased => {
                // The destination is asked once more: what it says counts for more.
                self.word = Some(word);
                self.go(Phase::Asking, Action::Ask)
            }
            (Phase::Waiting, Event::Retry | Event::Operator(_)) => {
                if self.committed && !self.never {
                    self.go(Phase::Asking, Action::Ask)
                } else {
                    self.go(Phase::Settling, Action::Settle)
                }
            }
            _ => Action::Wait,
        }
    }

    fn go(&mut self, phase: Phase, action: Action) -> Action {
        self.phase = phase;
        action
    }

    fn end(&mut self, action: Action) -> Action {
        self.go(Phase::Ended, action)
    }

    fn settle_or(&mut self, unleased: Action) -> Action {
        if self.leased { self.go(Phase::Settling, Action::Settle) } else { self.end(unleased) }
    }
}
