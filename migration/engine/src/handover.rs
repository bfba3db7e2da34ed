//! Giving the guest away: does what [`ownership::source`](crate::ownership::source) says, and tells it what came of it.
//!
//! A lease that cannot be read just now decides nothing, whether a COMMIT was sent or not: a write to it that failed may have
//! reached the disk. So an attempt that failed after the offer waits for the lease as one that failed after COMMIT does.

use std::fmt;
use std::os::fd::OwnedFd;
use std::time::Instant;

use crate::file::Published;
use crate::lease::{Id, Record, Settlement, show_id};
use crate::link::{Dial, Link, Step};
use crate::ownership::Answer;
use crate::ownership::source::{Action, Event, Source};
use crate::postcopy::Remainder;
use crate::protocol::{Commit, Message, Query, Running};
use crate::source::{bring_back, report, unexpected};
use crate::storage::Leaving;
use crate::{Context, Error, Outcome, RunState, SourceMachine, Status};

/// A guest that stands still until it is known whose it is.
#[derive(Debug)]
pub struct Handover {
    ownership: Source,
    session: Id,
    generation: u64,
    way: Way,
    state: RunState,
    since: Instant,
    /// What goes with COMMIT: guest memory, if it is handed over itself.
    memory: Vec<OwnedFd>,
    /// Why the attempt did not simply succeed, if that is known.
    cause: Option<Error>,
    /// What the destination said when it had the guest.
    running: Option<Running>,
    /// What the lease said when it was someone else's.
    record: Option<Box<Record>>,
    /// Memory that the destination has not got with the guest.
    remainder: Option<Box<Remainder>>,
    /// Images that the destination has got with the guest.
    disks: Option<Box<Leaving>>,
}

/// Where the guest goes.
#[derive(Debug)]
enum Way {
    /// To this process.
    Peer { peer: String, instance: Id },
    /// The lease was to say that it is in this file.
    File(Published),
}

impl fmt::Display for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { session, generation, way, .. } = self;
        let session = show_id(session);
        match way {
            Way::Peer { peer, .. } if self.ownership.is_committed() => {
                write!(
                    f,
                    "handed over to {peer} in session {session} at generation {generation}; no answer yet"
                )
            }
            Way::Peer { peer, .. } => {
                write!(
                    f,
                    "not handed over to {peer} in session {session}; the lease does not tell yet whose it is"
                )
            }
            Way::File(file) => {
                write!(f, "written to {file}; the lease does not tell yet whether the guest is there")
            }
        }
    }
}

fn lost(cause: Option<Error>) -> Error {
    cause.unwrap_or_else(|| Error::Peer { reason: "the destination did not take the guest".to_owned() })
}

impl Handover {
    /// The destination `instance` at the other end of `link` has loaded the guest, which did `state` when it was stopped at
    /// `since`.
    pub(crate) fn new(
        ownership: Source,
        session: Id,
        link: &Link,
        instance: Id,
        state: RunState,
        since: Instant,
    ) -> Self {
        let way = Way::Peer { peer: link.peer().to_owned(), instance };
        Self { session, ..Self::of(ownership, way, state, since) }
    }

    /// The guest's memory itself is handed over.
    pub(crate) fn with_memory(self, memory: Vec<OwnedFd>) -> Self {
        Self { memory, ..self }
    }

    /// Guest memory follows after the guest.
    pub(crate) fn with_remainder(self, remainder: Option<Box<Remainder>>) -> Self {
        Self { remainder, ..self }
    }

    /// The guest's images are at the destination, and those here stale once it has the guest.
    pub(crate) fn with_disks(self, disks: Option<Box<Leaving>>) -> Self {
        Self { disks, ..self }
    }

    /// The lease of `generation` was to say that the guest is in `file`, and that failed for `cause`.
    pub(crate) fn suspended(
        file: Published,
        generation: u64,
        state: RunState,
        since: Instant,
        cause: Error,
    ) -> Self {
        let cause = Some(cause);
        Self { generation, cause, ..Self::of(Source::suspended(), Way::File(file), state, since) }
    }

    fn of(ownership: Source, way: Way, state: RunState, since: Instant) -> Self {
        let (session, generation, memory) = (Id::default(), 0, Vec::new());
        let (cause, running, record, remainder, disks) = (None, None, None, None, None);
        Self {
            ownership,
            session,
            generation,
            way,
            state,
            since,
            memory,
            cause,
            running,
            record,
            remainder,
            disks,
        }
    }

    /// Hands over. `link` is where COMMIT goes; it is dropped once it gave no answer that the guest runs, so that the destination
    /// waits no longer for more.
    pub(crate) fn begin(
        mut self,
        machine: &mut dyn SourceMachine,
        link: &mut Option<Link>,
        dial: &mut Dial<'_>,
        context: &mut Context<'_>,
    ) -> Outcome {
        let action = self.ownership.on(Event::Prepared);
        self.run(action, machine, link, dial, context)
    }

    /// Goes on with a hand-over that was [undecided](Outcome::Unknown), at most for
    /// [`Patience::settle`](crate::Patience::settle), and once only when the [end](crate::Parameters::cancel) is asked for. The guest
    /// stays paused meanwhile.
    pub fn resolve(
        mut self,
        machine: &mut dyn SourceMachine,
        dial: &mut Dial<'_>,
        context: &mut Context<'_>,
    ) -> Outcome {
        let action = self.ownership.on(context.parameters.take_word().map_or(Event::Retry, Event::Operator));
        let outcome = self.run(action, machine, &mut None, dial, context);
        report(&outcome, context.statistics);
        outcome
    }

    /// Does `action` and what follows from it.
    fn run(
        mut self,
        mut action: Action,
        machine: &mut dyn SourceMachine,
        link: &mut Option<Link>,
        dial: &mut Dial<'_>,
        context: &mut Context<'_>,
    ) -> Outcome {
        let start = Instant::now();
        loop {
            let event = match action {
                Action::Offer => self.offer(context),
                Action::Release => self.release(machine),
                Action::Commit { generation } => {
                    context.statistics.update(|s| s.downtime.handover = start.elapsed());
                    self.generation = generation;
                    let event = self.commit(link.as_mut(), context);
                    if event != Event::Answered(Answer::Running) {
                        drop(link.take());
                        self.announce(context);
                    }
                    event
                }
                Action::Ask => self.ask(dial, context),
                Action::Settle => self.settle(context),
                Action::Wait => {
                    self.announce(context);
                    match context.parameters.take_word() {
                        Some(word) => Event::Operator(word),
                        // Who wants the end has it given back at once: perhaps it is that of the process, which leaves it undecided.
                        None if start.elapsed() >= context.patience.settle
                            || context.parameters.end_is_wished() =>
                        {
                            return Outcome::Unknown(self);
                        }
                        None => {
                            std::thread::sleep(context.patience.retry);
                            Event::Retry
                        }
                    }
                }
                Action::Resume => return self.ours(machine),
                Action::Finish => return self.completed(machine, link, dial, context),
                Action::StayPaused => return self.theirs(machine),
            };
            action = self.ownership.on(event);
        }
    }

    fn offer(&mut self, context: &mut Context<'_>) -> Event {
        let Way::Peer { peer, .. } = &self.way else { return Event::OfferFailed };
        match context.lease.as_mut().map(|lease| lease.offer(&self.session, peer)) {
            Some(Ok(generation)) => Event::Offered { generation },
            Some(Err(error)) => self.failed(error.into(), Event::OfferFailed),
            None => Event::OfferFailed,
        }
    }

    /// What the guest leaves here is marked first: from the first byte of COMMIT on nobody starts it from these images.
    fn release(&mut self, machine: &mut dyn SourceMachine) -> Event {
        if let (Some(disks), Way::Peer { peer, .. }) = (&mut self.disks, &self.way)
            && let Err(error) = disks.mark_moved(&self.session, peer)
        {
            return self.failed(error, Event::ReleaseFailed);
        }
        match machine.release_image_locks().map_err(Error::machine("release the image locks")) {
            Ok(()) => Event::Released,
            Err(error) => self.failed(error, Event::ReleaseFailed),
        }
    }

    /// From the first byte on the guest may be the destination's.
    fn commit(&mut self, link: Option<&mut Link>, context: &Context<'_>) -> Event {
        let Some(link) = link else { return Event::NoAnswer };
        let commit = Message::Commit(Commit { session: self.session, generation: self.generation });
        let patience = context.patience;
        let step = Step { doing: "handing over", patience: patience.silence, cancel: None, until: None };
        let doing = "waiting for the destination to take over";
        let wait = Step { doing, patience: patience.answer, cancel: None, until: None };
        match link.send_with(&commit, &self.memory, step).and_then(|()| link.receive(wait)) {
            Ok(message) => self.answered(message, doing),
            Err(error) => self.failed(error, Event::NoAnswer),
        }
    }

    /// What became of the COMMIT, asked on a new link.
    fn ask(&mut self, dial: &mut Dial<'_>, context: &Context<'_>) -> Event {
        let doing = "asking what became of the guest";
        let step = Step { doing, patience: context.patience.handshake, cancel: None, until: None };
        let Way::Peer { instance, .. } = self.way else { return Event::NoAnswer };
        let query = Message::Query(Query { session: self.session, instance });
        let asked = dial().and_then(Link::new).and_then(|mut link| {
            link.greet(step)?;
            link.send(&query, step)?;
            let answer = link.receive(step)?;
            Ok((link, answer))
        });
        match asked {
            Ok((mut link, answer)) => {
                let event = self.answered(answer, doing);
                if event == Event::Answered(Answer::Running) {
                    self.note_downtime(context);
                    // It waits for queries until it hears that its answer arrived.
                    let last = Step { patience: context.patience.last_words, ..step };
                    let _it_is_asked_no_more =
                        link.send(&Message::Progress(context.statistics.progress()), last);
                    link.close(context.patience.last_words);
                }
                event
            }
            Err(error) => self.failed(error, Event::NoAnswer),
        }
    }

    fn answered(&mut self, message: Message, doing: &'static str) -> Event {
        match message {
            Message::Running(running) if running.session == self.session => {
                self.running = Some(running);
                Event::Answered(Answer::Running)
            }
            Message::Never(never) if never.session == self.session => {
                // Nothing explains it better.
                self.cause = Some(Error::Never { reason: String::from(&never.reason) });
                Event::Answered(Answer::Never)
            }
            other => self.failed(unexpected(other, doing), Event::NoAnswer),
        }
    }

    fn settle(&mut self, context: &mut Context<'_>) -> Event {
        match context.lease.as_mut().map(|lease| lease.settle(&self.session)) {
            Some(Ok(Settlement::Ours { .. })) => Event::Ours,
            Some(Ok(Settlement::Theirs { record })) => {
                self.record = Some(record);
                Event::Theirs
            }
            Some(Err(error)) => {
                log::warn!("{self}: {}", Error::from(error).chain());
                Event::Unreadable
            }
            None => Event::Unreadable,
        }
    }

    /// Remembers the first failure: what comes after it comes from it.
    fn failed(&mut self, error: Error, event: Event) -> Event {
        log::info!("{self}: {}", error.chain());
        self.cause.get_or_insert(error);
        event
    }

    /// Tells the user what is known.
    fn announce(&self, context: &Context<'_>) {
        let mut text = match &self.cause {
            Some(error) => format!("{self}: {}", error.chain()),
            None => self.to_string(),
        };
        if self.ownership.needs_word() {
            text.push_str(match &self.disks {
                Some(_) => "; of a guest that takes its images along",
                None => "; without a lease",
            });
            text.push_str(
                " only the destination can tell, or an operator who knows (ferry confirm, ferry reclaim)",
            );
        }
        let mut known = None;
        context.statistics.update(|snapshot| known = snapshot.handover_unknown.replace(text.clone()));
        if known.as_ref() != Some(&text) {
            log::warn!("{text}");
        }
        context.statistics.set_status(Status::HandoverUnknown);
    }

    /// Nobody else has it: it goes on here.
    fn ours(mut self, machine: &mut dyn SourceMachine) -> Outcome {
        // Nobody reads its memory any more.
        self.remainder = None;
        let error = lost(self.cause);
        let tracking = match self.way {
            Way::Peer { .. } => true,
            Way::File(file) => {
                // A file that nobody can restore any more.
                file.remove();
                false
            }
        };
        // A guest whose images would be refused the next time does not go on as if nothing were wrong.
        let unmarked = self.disks.as_mut().map_or(Ok(()), |disks| disks.take_back(&self.session));
        let state = if unmarked.is_ok() { self.state } else { RunState::Paused };
        if unmarked.is_err() {
            // From the next step on the user may let it go on, which asks for what they go back to here: the lease, whose word that is.
            self.disks = None;
        }
        let paused = bring_back(machine, tracking, true, Some(state)).err();
        // The guest does not wait for what is said beside each image.
        self.disks = None;
        Outcome::Failed { error, paused: paused.or(unmarked.err().map(|error| error.chain())) }
    }

    /// Someone else has it, though COMMIT was never sent, and it never runs here again.
    fn theirs(self, machine: &mut dyn SourceMachine) -> Outcome {
        let note = self.note();
        match self.way {
            Way::File(file) if self.record.is_some_and(|record| file.is_said_by(&record)) => {
                machine.finish();
                return Outcome::Completed { note };
            }
            Way::File(file) => file.remove(),
            Way::Peer { .. } => {}
        }
        Outcome::Failed { error: lost(self.cause), paused: note }
    }

    /// What decided, where it was not the answer to COMMIT or QUERY.
    fn note(&self) -> Option<String> {
        match (&self.running, &self.record) {
            (Some(_), _) => None,
            (None, Some(record)) => Some(format!("the lease says {record}")),
            (None, None) => Some("an operator confirmed that the destination has the guest".to_owned()),
        }
    }

    fn note_downtime(&self, context: &Context<'_>) {
        // By the word of a destination on this host, which was on its way here; or else until it came.
        let ran = self.running.as_ref().and_then(|running| running.ran);
        let total = ran.and_then(|ran| ran.since(self.since)).unwrap_or_else(|| self.since.elapsed());
        context.statistics.update(|s| {
            s.downtime.total = total;
            if let Some(running) = &self.running {
                s.downtime.resume = std::time::Duration::from_nanos(running.resume_ns);
            }
        });
    }

    /// The guest is theirs.
    fn completed(
        mut self,
        machine: &mut dyn SourceMachine,
        link: &mut Option<Link>,
        dial: &mut Dial<'_>,
        context: &mut Context<'_>,
    ) -> Outcome {
        self.note_downtime(context);
        if let Some(lease) = &mut context.lease
            && let Err(error) = lease.leave()
        {
            // Presence ends with the process at the latest.
            log::warn!("{}", Error::from(error).chain());
        }
        machine.finish();
        if let Some(remainder) = self.remainder.take()
            && let Err(error) = remainder.bring(link.take(), dial, context)
        {
            return Outcome::Failed { error, paused: None };
        }
        context.statistics.set_status(Status::Completed);
        Outcome::Completed { note: self.note() }
    }
}
