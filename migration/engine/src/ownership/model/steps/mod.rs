//! Everything that may happen in the world.

mod destination;
mod source;

use super::explorer::{Model, Step};
use super::properties;
use super::record::{Entry, Lease};
use super::world::{Giving, Message, Mutation, Side, State, Taking, World, id};
use crate::lease::Record;
use crate::lease::rules::Ruling;
use crate::ownership::{destination as taking, source as giving};

/// What came of working with the lease.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Done {
    Yes,
    Refused,
    Failed,
}

/// What is to become of a lease.
enum Wish {
    Write(Lease),
    Stays,
    Refused,
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
        if state.restarts_left > 0 {
            steps.starts_anew();
        }
        steps.steps
    }

    fn violation(&self, state: &State) -> Option<String> {
        properties::violation(state).map(str::to_owned)
    }

    fn is_settled(&self, state: &State) -> bool {
        properties::is_settled(self, state)
    }

    fn may_succeed(&self, state: &State) -> bool {
        properties::may_leave(self, state)
    }

    fn has_succeeded(&self, state: &State) -> bool {
        state.destination.runs
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
        if self.is(Mutation::NoFence) {
            to.destination.machine.forget_fences();
        }
        to.forget_what_nobody_hears();
        self.steps.push(Step { what: what.into(), is_fault, to });
    }

    fn is_killed(&mut self, side: Side) {
        let is_written = self.from.disk(side).and_then(|disk| disk.written.as_ref());
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
        use giving::Action;
        let State { source, destination, .. } = self.from;
        let offers =
            matches!(source.action, Giving::Does(Action::Release | Action::Commit { .. } | Action::Ask));
        let stops = source.action == Giving::AwaitsPrepared;
        if source.alive && (source.runs || stops || (offers && self.is(Mutation::WriteAfterOffer))) {
            self.step("the source writes RAM", |s| s.writes_ram(Side::Source));
        }
        let takes = matches!(destination.action, Taking::Does(taking::Action::Take { .. }));
        let has_mapped = takes || self.from.placed;
        let early = (has_mapped && self.is(Mutation::WriteBeforeTaking))
            || (takes && destination.begun && self.is(Mutation::WriteBeforeSync));
        if destination.alive && (destination.runs || early) {
            self.step("the destination writes RAM", |s| s.writes_ram(Side::Destination));
        }
    }

    /// Whoever starts a guest is refused images that say so; an operator who knows that it runs nowhere else is not.
    fn starts_anew(&mut self) {
        for side in [Side::Source, Side::Destination] {
            let alive = match side {
                Side::Source => self.from.source.alive,
                Side::Destination => self.from.destination.alive,
            };
            let Some(lease) = self.from.lease(side).filter(|_| !alive) else { continue };
            let is_forced = side == Side::Source
                && matches!(lease.state, Entry::Moved(session) if self.never_runs_there(session));
            if lease.lets_start() || (is_forced && self.world.operator) {
                self.fault(format!("{side:?} is started anew, forced: {is_forced}"), |s| {
                    s.is_started_anew(side);
                });
            }
        }
    }

    /// What an operator sees who looks at the destination: it has not taken the guest, and never will.
    fn never_runs_there(&self, session: u8) -> bool {
        let State { destination, taken, .. } = self.from;
        let has_fenced = self.from.is_listening() && destination.machine.has_fenced(&id(session));
        !taken && (!destination.alive || has_fenced || self.is(Mutation::ReclaimByRecord))
    }

    /// Sends `message`, and then does what `change` says.
    fn sends(&mut self, side: Side, message: Message, change: impl Fn(&mut State)) {
        self.step(format!("{side:?} sends {message:?}"), |s| {
            s.link.insert(message);
            change(s);
        });
        self.fault(format!("the link is cut within {message:?}"), |s| change(s));
    }

    /// Works with the lease, under its lock, as `rule` has it. Without a lease there is nothing to be done.
    fn lease(
        &mut self,
        side: Side,
        rule: impl Fn(&Record) -> Ruling,
        over: impl Fn(&mut State, Done) + Copy,
    ) {
        let ruling = |lease: &Lease| lease.record().map_or(Ruling::Refused, |record| rule(&record));
        self.wishes(
            side,
            |lease| match ruling(lease) {
                Ruling::Write(change) => Wish::Write(Lease::after(&change, side)),
                Ruling::Stays => Wish::Stays,
                Ruling::Refused => Wish::Refused,
            },
            over,
        );
    }

    /// The same with any wish. What is written counts only when it is on stable storage.
    fn wishes(&mut self, side: Side, wish: impl Fn(&Lease) -> Wish, over: impl Fn(&mut State, Done) + Copy) {
        let begun = match side {
            Side::Source => self.from.source.begun,
            Side::Destination => self.from.destination.begun,
        };
        let Some(lease) = self.from.lease(side) else {
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
        match wish(lease) {
            Wish::Write(lease) => {
                self.step(format!("{side:?} writes {lease:?}"), |s| s.write(side, lease));
            }
            Wish::Stays => {
                self.step(format!("{side:?} finds that the lease says so"), |s| over(s, Done::Yes));
            }
            Wish::Refused => {
                self.step(format!("{side:?} finds {lease:?}"), |s| over(s, Done::Refused));
            }
        }
    }
}
