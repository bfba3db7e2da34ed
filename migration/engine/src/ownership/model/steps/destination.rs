//! What a destination does, and hears.

use super::super::record::{Entry, Lease};
use super::super::world::{Message, Mutation, Session, Side, State, Taking, id};
use super::{Done, Steps, Wish};
use crate::lease::Record;
use crate::lease::rules::{self, Change, Ruling};
use crate::ownership::Answer;
use crate::ownership::destination::{Action, Event};

const ME: Side = Side::Destination;

impl Steps<'_> {
    pub fn destination(&mut self) {
        // One that was started anew hears nobody.
        if self.from.is_anew_there() {
            return;
        }
        match self.from.destination.action {
            Taking::Expects => self.expects(),
            Taking::Agrees => self.agrees(),
            Taking::Does(Action::Go | Action::Refuse) => {
                for message in &self.from.link {
                    self.hears(*message);
                }
                if !self.from.destination.machine.is_listening() && !self.from.destination.runs {
                    self.gives_up();
                }
            }
            Taking::Does(Action::Take { session, generation }) => self.take(session[0], generation),
            Taking::Does(Action::GiveBack { session }) => self.gives_back(session[0]),
            Taking::Does(Action::Start { session }) => self.step("the destination runs the guest", |s| {
                s.destination_runs(session[0]);
                s.destination_hears(Event::Started);
            }),
            Taking::GivesUp(session) => self.gives_images_up(session),
            Taking::Does(Action::Answer { session, answer }) => self.answers(session[0], answer),
        }
    }

    /// It does not fit, is cancelled or silent, or something fails here.
    fn gives_up(&mut self) {
        if !self.is(Mutation::WaitForEver) {
            self.step("the destination gives up", |s| s.destination_hears(Event::Failed));
        }
    }

    fn hears(&mut self, message: Message) {
        let what = format!("the destination hears {message:?}");
        let is_receiving = |session| self.from.destination.machine.is_receiving(&id(session));
        let unplaced = self.is(Mutation::LoadWithoutRam);
        match message {
            Message::Hello(_) if self.is(Mutation::ListenOnce) && !self.from.never.is_empty() => {}
            Message::Hello(session) => self.step(what, |s| {
                let was_listening = s.destination.machine.is_listening();
                s.destination_hears(Event::Hello { session: id(session) });
                if was_listening && s.destination.machine.is_receiving(&id(session)) {
                    s.placed = false;
                    s.destination_does(if s.has_one_each() { Taking::Expects } else { Taking::Agrees });
                }
            }),
            Message::Rounds(session) if is_receiving(session) => self.step(what, |s| s.placed = true),
            Message::Prepare(session) if is_receiving(session) => self.step(what, |s| {
                if s.placed || unplaced {
                    s.destination_hears(Event::Loaded);
                    s.link.insert(Message::Prepared(session));
                } else {
                    // The digest is another.
                    s.destination_hears(Event::Failed);
                }
            }),
            Message::Commit(session, generation) => self.step(what, |s| {
                s.destination_hears(Event::Commit { session: id(session), generation });
            }),
            Message::Query(session) => self.step(what, |s| {
                s.destination_hears(Event::Query { session: id(session), to_us: true });
            }),
            Message::Rounds(_) | Message::Prepare(_) => {}
            Message::Agree(_) | Message::Prepared(_) | Message::Answer(..) => {}
        }
    }

    /// The session that is on its way.
    fn receiving(&self) -> Option<Session> {
        (1..=self.from.session).find(|session| self.from.destination.machine.is_receiving(&id(*session)))
    }

    /// Says beside the place for images that they are nobody's, and only then makes them.
    fn expects(&mut self) {
        let Some(session) = self.receiving() else { return };
        let wish = |lease: &Lease| match lease.record() {
            record if !rules::may_expect(record.as_ref(), false) => Wish::Refused,
            record => {
                let generation = record.map_or(0, |record| record.generation) + 1;
                Wish::Write(Lease { generation, state: Entry::Incoming(session), owner: ME })
            }
        };
        self.wishes(ME, wish, |s, done| match done {
            Done::Yes => {
                s.expected_generation = s.lease(ME).map_or(0, |lease| lease.generation);
                s.destination_does(Taking::Agrees);
            }
            Done::Refused | Done::Failed => {
                // Nothing was made that could be given up.
                s.destination_hears(Event::Failed);
                let never = Action::Answer { session: id(session), answer: Answer::Never };
                s.destination_does(Taking::Does(never));
            }
        });
    }

    fn agrees(&mut self) {
        let Some(session) = self.receiving() else { return };
        self.sends(ME, Message::Agree(session), |s| s.destination_does(Taking::Does(Action::Go)));
        self.gives_up();
    }

    /// Removes images that did not come whole, and then their record; if that fails it says on what is here.
    fn gives_images_up(&mut self, session: Session) {
        let never = Action::Answer { session: id(session), answer: Answer::Never };
        if self.is(Mutation::LeaveIncoming) {
            return self
                .step("the destination leaves what came", |s| s.destination_does(Taking::Does(never)));
        }
        let remove = |_: &Lease| Wish::Write(Lease::nothing(ME));
        self.wishes(ME, remove, |s, _| s.destination_does(Taking::Does(never)));
    }

    fn answers(&mut self, session: Session, answer: Answer) {
        let sent = |s: &mut State, arrives| {
            if answer == Answer::Never && s.taken && session == s.session {
                s.violation = Some("NEVER is said of a guest that is the destination's");
            }
            s.answer(session, answer, arrives);
        };
        self.step(format!("the destination answers {answer:?}"), |s| sent(s, true));
        self.fault(format!("the link is cut within {answer:?}"), |s| sent(s, false));
    }

    fn take(&mut self, session: Session, generation: u64) {
        // Of its own lease it knows by itself what it says.
        let generation = match self.from.has_one_each() {
            true => self.from.expected_generation,
            false => generation,
        };
        if self.is(Mutation::RunBeforeTaking) && !self.from.disks.is_empty() {
            self.step("the destination does not wait for the lease", |s| s.destination_hears(Event::Taken));
            return;
        }
        let unsynced = self.is(Mutation::RunBeforeSync);
        if unsynced && self.from.destination.begun {
            self.step("the destination does not wait for the disk", |s| {
                s.release_record_lock(ME);
                s.destination_hears(Event::Taken);
            });
            return;
        }
        let late = self.is(Mutation::OpenAfterTaking);
        if self.from.destination.begun == late {
            let record = self.from.lease(ME).and_then(Lease::record);
            let is_taken = record.is_some_and(|record| rules::is_taken(&record, &ME.id(), &id(session)));
            self.fault("the destination cannot have the images", |s| {
                s.unlock(ME, true);
                s.destination_hears(if is_taken && !late { Event::NotKnown } else { Event::NotTaken });
            });
        }
        if self.from.unsure {
            self.fault("the destination is told to quit", |s| {
                s.unlock(ME, true);
                s.destination_hears(Event::Failed);
            });
        }
        let unchecked = self.is(Mutation::RunUnoffered);
        let rule = |record: &Record| match rules::take(record, &ME.id(), &id(session), generation) {
            Some(change) => Ruling::Write(change),
            None if unchecked => {
                let state = crate::lease::State::Taken { session: id(session) };
                Ruling::Write(Change { generation: record.generation + 1, state })
            }
            None => Ruling::Refused,
        };
        let never_again = self.is(Mutation::NeverWhenUnsure);
        self.lease(ME, rule, |s, done| {
            s.unsure = done == Done::Failed && (s.destination.begun || s.unsure);
            let unknown = s.unsure && !never_again;
            s.destination_hears(match done {
                Done::Yes => Event::Taken,
                Done::Failed if unknown => Event::NotKnown,
                Done::Failed | Done::Refused => Event::NotTaken,
            });
        });
    }

    fn gives_back(&mut self, session: Session) {
        let one_each = self.from.has_one_each();
        let rule = |record: &Record| match rules::give_back(record, &ME.id(), &id(session)) {
            _ if one_each => rules::expect_again(record, &ME.id(), &id(session)),
            Some(change) => Ruling::Write(change),
            None => Ruling::Refused,
        };
        self.lease(ME, rule, |s, done| {
            s.unsure = false;
            if done == Done::Failed {
                s.destination_hears(Event::NotGivenBack);
                s.is_killed(ME, true);
            } else {
                s.destination_hears(Event::GivenBack);
            }
            if s.gone {
                // It dies with the process that is told to end, as a guest does that runs.
                s.is_killed(ME, true);
            }
        });
    }
}
