//! Everything that may happen in the world, and what must never and what must in the end.

use super::explorer::{Model, Step};
use super::world::{Lease, Message, Mutation, Session, Side, State, World, id};
use crate::lease::Record;
use crate::lease::rules::{self, Change, Settle};
use crate::ownership::source::{self, Word};
use crate::ownership::{Answer, destination};

/// What the rules say of a record, under its lock.
enum Ruling {
    Write(Change),
    Stays,
    Refused,
}

/// What came of working with the lease.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Done {
    Yes,
    Refused,
    Failed,
}

/// The steps from one state.
struct Steps<'a> {
    world: &'a World,
    from: &'a State,
    steps: Vec<Step<State>>,
}

impl Model for World {
    type State = State;

    fn initial(&self) -> State {
        State::first(self)
    }

    fn steps(&self, state: &State) -> Vec<Step<State>> {
        let mut steps = Steps { world: self, from: state, steps: Vec::new() };
        if state.source.alive {
            steps.source();
            steps.is_killed(Side::Source);
        }
        if state.destination.alive {
            steps.destination();
            steps.is_killed(Side::Destination);
        }
        steps.link();
        if self.shares_ram {
            steps.ram();
        }
        steps.steps
    }

    fn violation(&self, state: &State) -> Option<String> {
        let State { source, destination, .. } = state;
        let reason = if let Some(violation) = state.violation {
            violation
        } else if source.runs && destination.runs {
            "the guest runs twice"
        } else if source.runs && state.ran {
            "the guest runs at the source after it ran at the destination"
        } else if source.runs && state.ram == Side::Destination {
            "the guest goes on at the source in RAM that the destination has written"
        } else if destination.runs && source.alive && !state.released {
            "the guest runs at the destination while the source may write its images"
        } else if source.runs && state.lease().is_some_and(|lease| !lease.is_owned_by_source()) {
            "the guest runs at the source and the lease does not say so"
        } else {
            return None;
        };
        Some(reason.to_owned())
    }

    fn is_settled(&self, state: &State) -> bool {
        let State { source, destination, .. } = state;
        match (source.alive, destination.alive) {
            (true, true) => source.runs != destination.runs && (source.runs || state.gone),
            // The guest may have died with its owner, and the source knows it; or nobody is left to tell, and there is no lease.
            (true, false) => {
                let undecided = !self.leased && !self.operator && source.machine.needs_word();
                source.runs || (state.gone && state.taken) || undecided
            }
            // The guest runs, or died with its owner.
            (false, true) => destination.runs || (state.is_listening() && !state.taken),
            (false, false) => true,
        }
    }
}

impl Steps<'_> {
    fn is(&self, mutation: Mutation) -> bool {
        self.world.mutation == Some(mutation)
    }

    fn step(&mut self, what: impl Into<String>, change: impl FnOnce(&mut State)) {
        self.add(what, false, change);
    }

    fn fault(&mut self, what: impl Into<String>, change: impl FnOnce(&mut State)) {
        self.add(what, true, change);
    }

    fn add(&mut self, what: impl Into<String>, is_fault: bool, change: impl FnOnce(&mut State)) {
        let mut to = self.from.clone();
        change(&mut to);
        to.forget_what_nobody_hears();
        self.steps.push(Step { what: what.into(), is_fault, to });
    }

    fn is_killed(&mut self, side: Side) {
        let is_written = self.from.disk.as_ref().and_then(|disk| disk.written.as_ref());
        if is_written.is_some_and(|(writer, _)| *writer == side) {
            self.fault(format!("{side:?} is killed, what it wrote is lost"), |s| s.is_killed(side, false));
        }
        self.fault(format!("{side:?} is killed"), |s| s.is_killed(side, true));
    }

    /// A message that has not arrived can be lost; one that has can come again.
    fn link(&mut self) {
        for message in &self.from.link {
            self.fault(format!("{message:?} is lost"), |s| {
                s.link.remove(message);
            });
        }
    }

    /// Guests write RAM, and devices do: those of the source also while it stops.
    fn ram(&mut self) {
        let State { source, destination, .. } = self.from;
        let offers = matches!(
            source.action,
            Some(source::Action::Release | source::Action::Commit { .. } | source::Action::Ask)
        );
        let stops = source.action.is_none();
        if source.alive && (source.runs || stops || (offers && self.is(Mutation::WriteAfterOffer))) {
            self.step("the source writes RAM", |s| s.writes_ram(Side::Source));
        }
        let takes = matches!(destination.action, destination::Action::Take { .. });
        let has_mapped = takes || !destination.machine.is_listening();
        let early = (has_mapped && self.is(Mutation::WriteBeforeTaking))
            || (takes && destination.begun && self.is(Mutation::WriteBeforeSync));
        if destination.alive && (destination.runs || early) {
            self.step("the destination writes RAM", |s| s.writes_ram(Side::Destination));
        }
    }

    fn source(&mut self) {
        use source::{Action, Event};
        let State { session, source, .. } = self.from;
        let session = *session;
        let Some(action) = source.action else {
            if self.from.link.contains(&Message::Prepared(session)) {
                self.step("the source hears PREPARED", |s| s.source_hears(Event::Prepared));
            }
            return self.step("the source gives up", |s| s.source_hears(Event::Failed));
        };
        match action {
            Action::Offer => {
                let rule = |record: &Record| match rules::offer(record, &Side::Source.id(), &id(session), "")
                {
                    Some(change) => Ruling::Write(change),
                    None => Ruling::Refused,
                };
                self.lease(Side::Source, rule, |s, done| {
                    let generation = s.lease().map_or(0, |lease| lease.generation);
                    let offered = Event::Offered { generation };
                    s.source_hears(if done == Done::Yes { offered } else { Event::OfferFailed });
                });
            }
            Action::Release => {
                self.step("the source releases the images", |s| {
                    s.released = true;
                    s.source_hears(Event::Released);
                });
                self.fault("the source cannot release the images", |s| s.source_hears(Event::ReleaseFailed));
            }
            Action::Commit { .. } | Action::Ask if source.begun => {
                for answer in [Answer::Running, Answer::Never] {
                    if self.from.link.contains(&Message::Answer(session, answer)) {
                        let what = format!("the source hears {answer:?}");
                        let resumes = self.is(Mutation::NeverBeforeLease) && answer == Answer::Never;
                        self.step(what, |s| {
                            s.source_hears(Event::Answered(answer));
                            if resumes {
                                s.source_does(Action::Resume);
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
            Action::Commit { generation } => self.source_sends(Message::Commit(session, generation)),
            Action::Ask if self.is(Mutation::NoQuery) => {
                self.step("the source does not ask", |s| s.source_hears(Event::NoAnswer));
            }
            Action::Ask => self.source_sends(Message::Query(session)),
            Action::Settle => {
                let writes = !self.is(Mutation::SettleWithoutWriting);
                let me = Side::Source.id();
                let rule = |record: &Record| match rules::settle(record, &me, true, &id(session)) {
                    Settle::Back(change) if writes => Ruling::Write(change),
                    Settle::Back(_) | Settle::Kept => Ruling::Stays,
                    Settle::Gone => Ruling::Refused,
                };
                self.lease(Side::Source, rule, |s, done| {
                    s.source_hears(match done {
                        Done::Yes => Event::Ours,
                        Done::Refused => Event::Theirs,
                        Done::Failed => Event::Unreadable,
                    });
                });
            }
            Action::Wait => {
                self.step("the source tries again", |s| s.source_hears(Event::Retry));
                for word in [Word::Confirm, Word::Reclaim] {
                    if self.world.operator && self.may_say(word) {
                        let at_once = self.is(Mutation::WordBeforeLease) && word == Word::Reclaim;
                        self.step(format!("the operator says {word:?}"), |s| {
                            s.source_hears(Event::Operator(word));
                            if at_once {
                                s.source_does(Action::Resume);
                            }
                        });
                    }
                }
            }
            Action::Resume if session < self.world.attempts => {
                let next = session + 1;
                self.step(format!("the source begins attempt {next}"), |s| s.begin(next));
            }
            Action::Resume | Action::Finish | Action::StayPaused => {}
        }
    }

    /// With a lease whatever the operator says must do no harm. Without, he has looked at the destination.
    fn may_say(&self, word: Word) -> bool {
        let State { session, destination, taken, .. } = self.from;
        let never_runs =
            !destination.alive || (self.from.is_listening() && destination.machine.has_fenced(&id(*session)));
        match word {
            _ if self.world.leased => true,
            Word::Confirm => *taken,
            Word::Reclaim => !taken && never_runs,
        }
    }

    fn source_sends(&mut self, message: Message) {
        self.step(format!("the source sends {message:?}"), |s| {
            s.link.insert(message);
            s.source.begun = true;
        });
        self.fault(format!("the link is cut within {message:?}"), |s| s.source.begun = true);
    }

    fn destination(&mut self) {
        use destination::{Action, Event};
        match self.from.destination.action {
            Action::Go | Action::Refuse => {
                for message in &self.from.link {
                    self.destination_hears(*message);
                }
                if !self.from.destination.machine.is_listening() && !self.from.destination.runs {
                    self.step("the destination gives up", |s| s.destination_hears(Event::Failed));
                }
            }
            Action::Take { session, generation } => self.take(session[0], generation),
            Action::GiveBack { session } => {
                let me = Side::Destination.id();
                let rule = |record: &Record| match rules::give_back(record, &me, &session) {
                    Some(change) => Ruling::Write(change),
                    None => Ruling::Refused,
                };
                self.lease(Side::Destination, rule, |s, done| {
                    if done == Done::Failed {
                        s.destination_hears(Event::NotGivenBack);
                        s.is_killed(Side::Destination, true);
                    } else {
                        s.destination_hears(Event::GivenBack);
                    }
                    if s.gone {
                        // It dies with the process that is told to end, as a guest does that runs.
                        s.is_killed(Side::Destination, true);
                    }
                });
            }
            Action::Start { session } => self.step("the destination runs the guest", |s| {
                s.destination_runs(session[0]);
                s.destination_hears(Event::Started);
            }),
            Action::Answer { session, answer } => {
                let session = session[0];
                let forgets = self.is(Mutation::NoFence);
                let sent = |s: &mut State, arrives| {
                    if answer == Answer::Never && s.taken && session == s.session {
                        s.violation = Some("NEVER is said of a guest that is the destination's");
                    }
                    s.answer(session, answer, arrives);
                    if forgets {
                        s.destination.machine.forget_fences();
                    }
                };
                self.step(format!("the destination answers {answer:?}"), |s| sent(s, true));
                self.fault(format!("the link is cut within {answer:?}"), |s| sent(s, false));
            }
        }
    }

    fn destination_hears(&mut self, message: Message) {
        use destination::Event;
        let what = format!("the destination hears {message:?}");
        match message {
            Message::Load(session) => self.step(what, |s| {
                s.destination_hears(Event::Hello { session: id(session) });
                if s.destination.machine.is_receiving() {
                    s.destination_hears(Event::Loaded);
                    s.link.insert(Message::Prepared(session));
                }
            }),
            Message::Commit(session, generation) => self.step(what, |s| {
                s.destination_hears(Event::Commit { session: id(session), generation });
            }),
            Message::Query(session) => self.step(what, |s| {
                s.destination_hears(Event::Query { session: id(session), to_us: true });
            }),
            Message::Prepared(_) | Message::Answer(..) => {}
        }
    }

    fn take(&mut self, session: Session, generation: u64) {
        use destination::Event;
        if self.is(Mutation::RunBeforeTaking) && self.from.disk.is_some() {
            self.step("the destination does not wait for the lease", |s| s.destination_hears(Event::Taken));
            return;
        }
        let unsynced = self.is(Mutation::RunBeforeSync);
        if unsynced && self.from.destination.begun {
            self.step("the destination does not wait for the disk", |s| {
                s.release_record_lock(Side::Destination);
                s.destination_hears(Event::Taken);
            });
            return;
        }
        let late = self.is(Mutation::OpenAfterTaking);
        if self.from.destination.begun == late {
            let me = Side::Destination.id();
            let is_taken =
                self.from.lease().is_some_and(|lease| rules::is_taken(&lease.record(), &me, &id(session)));
            self.fault("the destination cannot have the images", |s| {
                s.unlock(Side::Destination, true);
                s.destination_hears(if is_taken && !late { Event::NotKnown } else { Event::NotTaken });
            });
        }
        if self.from.unsure {
            self.fault("the destination is told to quit", |s| {
                s.unlock(Side::Destination, true);
                s.destination_hears(Event::Failed);
            });
        }
        let unchecked = self.is(Mutation::RunUnoffered);
        let me = Side::Destination.id();
        let rule = |record: &Record| match rules::take(record, &me, &id(session), generation) {
            Some(change) => Ruling::Write(change),
            None if unchecked => {
                let state = crate::lease::State::Taken { session: id(session) };
                Ruling::Write(Change { generation: record.generation + 1, state })
            }
            None => Ruling::Refused,
        };
        let never_again = self.is(Mutation::NeverWhenUnsure);
        self.lease(Side::Destination, rule, |s, done| {
            s.unsure = done == Done::Failed && (s.destination.begun || s.unsure);
            let unknown = s.unsure && !never_again;
            s.destination_hears(match done {
                Done::Yes => Event::Taken,
                Done::Failed if unknown => Event::NotKnown,
                Done::Failed | Done::Refused => Event::NotTaken,
            });
        });
    }

    /// Works with the lease: under its lock, written and then on stable storage, and only then it counts. Without a lease
    /// there is nothing to be done.
    fn lease(
        &mut self,
        side: Side,
        rule: impl Fn(&Record) -> Ruling,
        over: impl Fn(&mut State, Done) + Copy,
    ) {
        let begun = match side {
            Side::Source => self.from.source.begun,
            Side::Destination => self.from.destination.begun,
        };
        let Some(lease) = self.from.lease() else {
            return self.step(format!("{side:?} has no lease"), |s| over(s, Done::Yes));
        };
        if begun {
            self.step(format!("{side:?} has written the lease"), |s| {
                s.unlock(side, true);
                over(s, Done::Yes);
            });
            if self.world.lease_fails {
                for persists in [true, false] {
                    let what = format!("{side:?} fails to sync the lease, persists: {persists}");
                    self.fault(what, |s| {
                        s.unlock(side, persists);
                        over(s, Done::Failed);
                    });
                }
            }
            return;
        }
        if self.from.is_locked_by_other(side) {
            return self.step(format!("{side:?} finds the lease locked"), |s| over(s, Done::Failed));
        }
        if self.world.lease_fails {
            self.fault(format!("{side:?} cannot read the lease"), |s| over(s, Done::Failed));
        }
        match rule(&lease.record()) {
            Ruling::Write(change) => {
                let what = format!("{side:?} writes {:?}", Lease::after(&change, side));
                self.step(what, |s| s.write(side, &change));
            }
            Ruling::Stays => {
                self.step(format!("{side:?} finds that the lease is its own"), |s| over(s, Done::Yes))
            }
            Ruling::Refused => {
                self.step(format!("{side:?} finds {lease:?}"), |s| over(s, Done::Refused));
            }
        }
    }
}
