//! What a source does, and hears.

use super::super::record::{Entry, Lease};
use super::super::world::{Giving, Message, Mutation, Side, State, id};
use super::{Done, Steps};
use crate::lease::Record;
use crate::lease::rules::{self, Ruling, Settle};
use crate::ownership::Answer;
use crate::ownership::source::{Action, Event, Word};

const ME: Side = Side::Source;

impl Steps<'_> {
    pub fn source(&mut self) {
        let session = self.from.session;
        match self.from.source.action {
            Giving::Does(action) => return self.gives(action),
            Giving::StandsStill => return self.is_told_to_go_on(),
            Giving::Greets => {
                self.sends(ME, Message::Hello(session), |s| s.source_goes_on(Giving::AwaitsAgree));
            }
            Giving::AwaitsAgree => {
                if self.from.link.contains(&Message::Agree(session)) {
                    self.step("the source hears AGREE", |s| s.source_goes_on(Giving::Copies));
                }
            }
            Giving::Copies => {
                self.sends(ME, Message::Rounds(session), |s| s.source_goes_on(Giving::Stops));
            }
            Giving::Stops => {
                let runs_on = self.is(Mutation::RunOn);
                self.sends(ME, Message::Prepare(session), |s| {
                    s.source.runs = runs_on;
                    s.source_goes_on(Giving::AwaitsPrepared);
                });
            }
            Giving::AwaitsPrepared => {
                if self.from.link.contains(&Message::Prepared(session)) {
                    self.step("the source hears PREPARED", |s| s.source_hears(Event::Prepared));
                }
            }
        }
        // It is refused, or cancelled; it hears nothing, or that it is over; or something fails here.
        let stays_stopped = self.is(Mutation::StayStopped);
        self.step("the source gives up", |s| {
            let ran = s.source.runs;
            s.source_hears(Event::Failed);
            s.source.runs &= ran || !stays_stopped;
        });
    }

    fn gives(&mut self, action: Action) {
        let session = self.from.session;
        match action {
            Action::Offer => {
                let rule = |record: &Record| match rules::offer(record, &ME.id(), &id(session), "") {
                    Some(change) => Ruling::Write(change),
                    None => Ruling::Refused,
                };
                self.lease(ME, rule, |s, done| {
                    let generation = s.lease(ME).map_or(0, |lease| lease.generation);
                    let offered = Event::Offered { generation };
                    s.source_hears(if done == Done::Yes { offered } else { Event::OfferFailed });
                });
            }
            Action::Release if self.is_to_be_marked() && !self.is(Mutation::MarkAfterCommit) => {
                self.marks(|s, done| {
                    if done == Done::Yes {
                        s.source.begun = false;
                    } else {
                        s.source_hears(Event::ReleaseFailed);
                    }
                });
            }
            Action::Release => {
                self.step("the source releases the images", |s| {
                    s.released = true;
                    s.source_hears(Event::Released);
                });
                self.fault("the source cannot release the images", |s| s.source_hears(Event::ReleaseFailed));
            }
            Action::Commit { .. } if self.from.source.begun && self.is_to_be_marked() => {
                // A mistake, made on purpose.
                self.marks_late();
            }
            Action::Commit { .. } | Action::Ask if self.from.source.begun => self.awaits_answer(),
            Action::Commit { generation } => {
                self.sends(ME, Message::Commit(session, generation), |s| s.source.begun = true);
            }
            Action::Ask if self.is(Mutation::NoQuery) => {
                self.step("the source does not ask", |s| s.source_hears(Event::NoAnswer));
            }
            Action::Ask => self.sends(ME, Message::Query(session), |s| s.source.begun = true),
            Action::Settle => self.settles(),
            Action::Wait => self.waits(),
            Action::Resume if !self.from.source.runs && self.from.has_one_each() => self.takes_back(),
            Action::Resume if self.from.source.runs && session < self.world.attempts => {
                let next = session + 1;
                self.step(format!("the source begins attempt {next}"), |s| s.begin(next));
            }
            Action::Resume | Action::Finish | Action::StayPaused => {}
        }
    }

    /// Whether images go that their record does not know of yet.
    fn is_to_be_marked(&self) -> bool {
        let session = self.from.session;
        self.from.has_one_each()
            && self.from.disk(ME).is_some_and(|disk| {
                // What is not on stable storage is not said.
                disk.stable.state != Entry::Moved(session)
                    && !(self.is(Mutation::MarkWithoutSync) && disk.written.is_some())
            })
    }

    fn marks(&mut self, over: impl Fn(&mut State, Done) + Copy) {
        let session = id(self.from.session);
        self.lease(ME, |record| rules::mark_moved(record, &ME.id(), &session, ""), over);
    }

    /// COMMIT is out.
    fn marks_late(&mut self) {
        let session = self.from.session;
        self.step("the source marks the images after COMMIT", |s| {
            let generation = s.lease(ME).map_or(0, |lease| lease.generation);
            let state = Entry::Moved(session);
            s.write(ME, Lease { generation, state, owner: ME });
            s.unlock(ME, true);
        });
    }

    fn awaits_answer(&mut self) {
        let session = self.from.session;
        for answer in [Answer::Running, Answer::Never] {
            if self.from.link.contains(&Message::Answer(session, answer)) {
                let resumes = self.is(Mutation::NeverBeforeLease) && answer == Answer::Never;
                self.step(format!("the source hears {answer:?}"), |s| {
                    s.source_hears(Event::Answered(answer));
                    if resumes {
                        s.source_runs();
                    }
                });
            }
        }
        let resumes = self.is(Mutation::ResumeAfterCommit);
        self.step("the source waits for an answer no longer", |s| {
            s.source_hears(Event::NoAnswer);
            if resumes {
                s.source_does(Action::Resume);
            }
        });
    }

    fn settles(&mut self) {
        let writes = !self.is(Mutation::SettleWithoutWriting);
        let session = id(self.from.session);
        let rule = |record: &Record| match rules::settle(record, &ME.id(), true, &session) {
            Settle::Back(change) if writes => Ruling::Write(change),
            Settle::Back(_) | Settle::Kept => Ruling::Stays,
            Settle::Gone => Ruling::Refused,
        };
        self.lease(ME, rule, |s, done| {
            s.source_hears(match done {
                Done::Yes => Event::Ours,
                Done::Refused => Event::Theirs,
                Done::Failed => Event::Unreadable,
            });
        });
    }

    fn waits(&mut self) {
        self.step("the source tries again", |s| s.source_hears(Event::Retry));
        for word in [Word::Confirm, Word::Reclaim] {
            if self.world.operator && self.may_say(word) {
                let at_once = self.is(Mutation::WordBeforeLease) && word == Word::Reclaim;
                self.step(format!("the operator says {word:?}"), |s| {
                    s.source_hears(Event::Operator(word));
                    if at_once {
                        s.source_runs();
                    }
                });
            }
        }
    }

    /// With a lease that both see whatever the operator says must do no harm. Without, he has looked at the destination.
    fn may_say(&self, word: Word) -> bool {
        let State { destination, taken, .. } = self.from;
        let is_known = !destination.alive || destination.runs || self.is(Mutation::ConfirmByRecord);
        match word {
            _ if self.from.disks.len() == 1 => true,
            Word::Confirm => *taken && is_known,
            Word::Reclaim => self.never_runs_there(self.from.session),
        }
    }

    /// Before the guest goes on it is said beside its images that they are its own.
    fn takes_back(&mut self) {
        if self.is(Mutation::ResumeFromMoved) {
            return self.step("the source takes nothing back", State::source_runs);
        }
        let session = id(self.from.session);
        self.lease(
            ME,
            |record| rules::take_back(record, &ME.id(), &session),
            |s, done| {
                if done == Done::Yes {
                    s.source_runs();
                } else {
                    s.source.begun = false;
                    s.source_goes_on(Giving::StandsStill);
                }
            },
        );
    }

    /// It was not said, so the guest stood still.
    fn is_told_to_go_on(&mut self) {
        if self.is(Mutation::ContinueFromMoved) {
            return self.step("the guest goes on", State::source_runs);
        }
        let rule = |record: &Record| match rules::moved_by(record, &ME.id()) {
            Some(session) => rules::take_back(record, &ME.id(), session),
            None => Ruling::Stays,
        };
        self.lease(ME, rule, |s, done| {
            s.source.begun = false;
            if done == Done::Yes {
                s.source_runs();
            }
        });
    }
}
