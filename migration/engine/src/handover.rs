//! After the lease was written, or should have been: who has the guest?
//!
//! The source never decides by itself. Once the first byte of COMMIT is out it asks the destination on a new link, and where
//! there is a lease it settles: under the lock, a record that still is our offer becomes ours with a new generation, which a
//! late COMMIT then does not fit. A lease that cannot be read just now decides nothing, whether a COMMIT was sent or not: a
//! write to it that failed may have reached the disk.

use std::fmt;
use std::time::Instant;

use crate::file::Published;
use crate::lease::{Id, Record, Settlement, show_id};
use crate::link::{Dial, Link, Step};
use crate::protocol::{Message, Query, Running};
use crate::source::{bring_back, report};
use crate::{Context, Error, Outcome, RunState, SourceMachine, Status};

/// A guest that stands still until it is known whose it is.
#[derive(Debug)]
pub struct Handover {
    pub(crate) session: Id,
    pub(crate) generation: u64,
    pub(crate) way: Way,
    pub(crate) state: RunState,
    pub(crate) since: Instant,
    /// Why the attempt did not simply succeed, if that is known.
    pub(crate) cause: Option<Error>,
}

/// How far it has gone.
#[derive(Debug)]
pub(crate) enum Way {
    /// COMMIT was sent to this process.
    Committed { peer: String, instance: Id },
    /// The lease was to offer it, and COMMIT was never sent.
    Offered { peer: String, tracking: bool, disks_touched: bool },
    /// The lease was to say that it is in this file.
    Suspended(Published),
}

impl fmt::Display for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { session, generation, way, .. } = self;
        let session = show_id(session);
        match way {
            Way::Committed { peer, .. } => {
                write!(
                    f,
                    "handed over to {peer} in session {session} at generation {generation}; no answer yet"
                )
            }
            Way::Offered { peer, .. } => {
                write!(
                    f,
                    "not handed over to {peer} in session {session}; the lease does not tell yet whose it is"
                )
            }
            Way::Suspended(file) => {
                write!(f, "written to {file}; the lease does not tell yet whether the guest is there")
            }
        }
    }
}

fn lost(cause: Option<Error>) -> Error {
    cause.unwrap_or_else(|| Error::Peer { reason: "the destination did not take the guest".to_owned() })
}

/// What decided.
enum Verdict {
    Running(Running),
    Theirs(Box<Record>),
    Ours(Error),
}

impl Handover {
    /// Asks and settles until it is decided, at most for [`Patience::settle`](crate::Patience::settle). The guest stays
    /// paused meanwhile.
    pub fn resolve(
        mut self,
        machine: &mut dyn SourceMachine,
        dial: &mut Dial<'_>,
        context: &mut Context<'_>,
    ) -> Outcome {
        if let Way::Committed { .. } = self.way {
            self.announce(context);
        }

        let outcome = match self.decide(dial, context) {
            Some(Verdict::Running(running)) => self.completed(machine, context, Some(&running), None),
            Some(Verdict::Theirs(record)) => self.theirs(machine, context, &record),
            Some(Verdict::Ours(error)) => self.ours(machine, error),
            None => Outcome::Unknown(self),
        };
        report(&outcome, context.statistics);
        outcome
    }

    /// Nobody else has it: it goes on here.
    fn ours(self, machine: &mut dyn SourceMachine, error: Error) -> Outcome {
        let (tracking, disks_touched) = match &self.way {
            Way::Committed { .. } => (true, true),
            Way::Offered { tracking, disks_touched, .. } => (*tracking, *disks_touched),
            Way::Suspended(_) => (false, true),
        };
        // A file that nobody can restore any more.
        if let Way::Suspended(file) = self.way {
            file.remove();
        }
        let paused = bring_back(machine, tracking, disks_touched, Some(self.state)).err();
        Outcome::Failed { error, paused }
    }

    /// Someone else has it, and it never runs here again.
    fn theirs(self, machine: &mut dyn SourceMachine, context: &mut Context<'_>, record: &Record) -> Outcome {
        let note = format!("the lease says {record}");
        let Self { way, cause, .. } = self;
        match way {
            Way::Committed { .. } => {
                let handover = Self { way, cause, ..self };
                handover.completed(machine, context, None, Some(note))
            }
            Way::Suspended(file) if file.is_said_by(record) => {
                machine.finish();
                Outcome::Completed { note: Some(note) }
            }
            Way::Offered { .. } => Outcome::Failed { error: lost(cause), paused: Some(note) },
            Way::Suspended(file) => {
                file.remove();
                Outcome::Failed { error: lost(cause), paused: Some(note) }
            }
        }
    }

    fn decide(&mut self, dial: &mut Dial<'_>, context: &mut Context<'_>) -> Option<Verdict> {
        let start = Instant::now();
        let mut never = None;
        if matches!(self.cause, Some(Error::Never { .. })) {
            never = self.cause.take();
        }
        loop {
            if never.is_none()
                && let Way::Committed { instance, .. } = &self.way
            {
                match self.ask(*instance, dial, context) {
                    Ok(Ok(running)) => return Some(Verdict::Running(running)),
                    Ok(Err(reason)) => never = Some(Error::Never { reason }),
                    Err(error) => log::info!("{self}: {}", error.chain()),
                }
            }
            match context.lease.as_mut().map(|lease| lease.settle(&self.session)) {
                Some(Ok(Settlement::Ours { .. })) => {
                    return Some(Verdict::Ours(never.unwrap_or_else(|| lost(self.cause.take()))));
                }
                Some(Ok(Settlement::Theirs { record })) => return Some(Verdict::Theirs(record)),
                // Nothing is decided while the record cannot be read.
                Some(Err(error)) => {
                    self.announce(context);
                    log::warn!("{self}: {}", Error::from(error).chain());
                }
                // Without a lease NEVER is the destination's word, and it has fenced itself before it gave it.
                None => {
                    if let Some(error) = never.take() {
                        return Some(Verdict::Ours(error));
                    }
                }
            }
            if start.elapsed() >= context.patience.settle {
                self.cause = never.or(self.cause.take());
                return None;
            }
            std::thread::sleep(context.patience.retry);
        }
    }

    /// Tells the user what is known.
    fn announce(&self, context: &Context<'_>) {
        let text = match &self.cause {
            Some(error) => format!("{self}: {}", error.chain()),
            None => self.to_string(),
        };
        log::warn!("{text}");
        context.statistics.update(|snapshot| snapshot.handover_unknown = Some(text));
        context.statistics.set_status(Status::Device);
    }

    /// RUNNING, or why NEVER.
    fn ask(
        &self,
        instance: Id,
        dial: &mut Dial<'_>,
        context: &Context<'_>,
    ) -> Result<Result<Running, String>, Error> {
        let step = Step {
            doing: "asking what became of the guest",
            patience: context.patience.handshake,
            cancel: None,
            until: None,
        };
        let mut link = Link::new(dial()?)?;
        link.greet(step)?;
        link.send(&Message::Query(Query { session: self.session, instance }), step)?;
        match link.receive(step)? {
            Message::Running(running) if running.session == self.session => {
                self.note_downtime(context, Some(&running));
                // It waits for queries until it hears that its answer arrived.
                let _it_is_asked_no_more = link.send(&Message::Progress(context.statistics.progress()), step);
                link.close(context.patience.last_words);
                Ok(Ok(running))
            }
            Message::Never(never) if never.session == self.session => Ok(Err(String::from(&never.reason))),
            other => Err(Error::Protocol {
                doing: step.doing,
                reason: format!("the other side answered {}", other.name()),
            }),
        }
    }

    fn note_downtime(&self, context: &Context<'_>, running: Option<&Running>) {
        let total = self.since.elapsed();
        context.statistics.update(|s| {
            s.downtime.total = total;
            if let Some(running) = running {
                s.downtime.resume = std::time::Duration::from_nanos(running.resume_ns);
            }
        });
    }

    /// The guest is theirs.
    pub(crate) fn completed(
        &self,
        machine: &mut dyn SourceMachine,
        context: &mut Context<'_>,
        running: Option<&Running>,
        note: Option<String>,
    ) -> Outcome {
        self.note_downtime(context, running);
        if let Some(lease) = &mut context.lease
            && let Err(error) = lease.leave()
        {
            // Presence ends with the process at the latest.
            log::warn!("{}", Error::from(error).chain());
        }
        machine.finish();
        context.statistics.set_status(Status::Completed);
        Outcome::Completed { note }
    }
}
