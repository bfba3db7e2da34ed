//! After the first byte of COMMIT: who runs the guest?
//!
//! The source never decides by itself. It asks the destination on a new link, and where there is a lease it settles: under
//! the lock, a record that still is our offer becomes ours with a new generation, which a late COMMIT then does not fit.

use std::fmt;
use std::time::Instant;

use crate::lease::{Id, Settlement, show_id};
use crate::link::{Dial, Link, Step};
use crate::protocol::{Message, Query, Running};
use crate::source::{bring_back, report};
use crate::{Context, Error, Outcome, RunState, SourceMachine, Status};

/// A COMMIT whose answer is not known.
#[derive(Debug)]
pub struct Handover {
    pub(crate) session: Id,
    pub(crate) instance: Id,
    pub(crate) generation: u64,
    pub(crate) peer: String,
    pub(crate) state: RunState,
    pub(crate) since: Instant,
}

impl fmt::Display for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { session, generation, peer, .. } = self;
        let session = show_id(session);
        write!(f, "handed over to {peer} in session {session} at generation {generation}; no answer yet")
    }
}

/// What decided.
enum Verdict {
    Running(Running),
    Theirs(String),
    Ours(Error),
}

impl Handover {
    /// Asks and settles until it is decided, at most for [`Patience::settle`](crate::Patience::settle). The guest stays
    /// paused meanwhile. `cause` is why the answer is missing.
    pub fn resolve(
        self,
        machine: &mut dyn SourceMachine,
        dial: &mut Dial<'_>,
        context: &mut Context<'_>,
        cause: Option<Error>,
    ) -> Outcome {
        let text = match &cause {
            Some(error) => format!("{self}: {}", error.chain()),
            None => self.to_string(),
        };
        log::warn!("{text}");
        context.statistics.update(|snapshot| snapshot.handover_unknown = Some(text));
        context.statistics.set_status(Status::Device);
        let outcome = match self.decide(dial, context, cause) {
            Some(Verdict::Running(running)) => self.completed(machine, context, Some(&running), None),
            Some(Verdict::Theirs(note)) => self.completed(machine, context, None, Some(note)),
            Some(Verdict::Ours(error)) => {
                let paused = bring_back(machine, true, true, Some(self.state)).err();
                Outcome::Failed { error, paused }
            }
            None => Outcome::Unknown(self),
        };
        if !matches!(outcome, Outcome::Unknown(_)) {
            context.statistics.update(|snapshot| snapshot.handover_unknown = None);
        }
        report(&outcome, context.statistics);
        outcome
    }

    fn decide(
        &self,
        dial: &mut Dial<'_>,
        context: &mut Context<'_>,
        cause: Option<Error>,
    ) -> Option<Verdict> {
        let start = Instant::now();
        let mut never = None;
        let mut cause = cause;
        if matches!(cause, Some(Error::Never { .. })) {
            never = cause.take();
        }
        loop {
            if never.is_none() {
                match self.ask(dial, context) {
                    Ok(Ok(running)) => return Some(Verdict::Running(running)),
                    Ok(Err(reason)) => never = Some(Error::Never { reason }),
                    Err(error) => log::info!("{self}: {}", error.chain()),
                }
            }
            match context.lease.as_mut().map(|lease| lease.settle(&self.session)) {
                Some(Ok(Settlement::Ours { .. })) => {
                    let lost = || Error::Peer { reason: "the destination did not take the guest".to_owned() };
                    return Some(Verdict::Ours(never.or(cause).unwrap_or_else(lost)));
                }
                Some(Ok(Settlement::Theirs { record })) => {
                    return Some(Verdict::Theirs(format!("the lease says {record}")));
                }
                // Nothing is decided while the record cannot be read.
                Some(Err(error)) => log::warn!("{self}: {}", Error::from(error).chain()),
                // Without a lease NEVER is the destination's word, and it has fenced itself before it gave it.
                None => {
                    if let Some(error) = never.take() {
                        return Some(Verdict::Ours(error));
                    }
                }
            }
            if start.elapsed() >= context.patience.settle {
                return None;
            }
            std::thread::sleep(context.patience.retry);
        }
    }

    /// RUNNING, or why NEVER.
    fn ask(&self, dial: &mut Dial<'_>, context: &Context<'_>) -> Result<Result<Running, String>, Error> {
        let step = Step {
            doing: "asking what became of the guest",
            patience: context.patience.handshake,
            cancel: None,
        };
        let mut link = Link::new(dial()?)?;
        link.greet(step)?;
        link.send(&Message::Query(Query { session: self.session, instance: self.instance }), step)?;
        match link.receive(step)? {
            Message::Running(running) if running.session == self.session => Ok(Ok(running)),
            Message::Never(never) if never.session == self.session => Ok(Err(String::from(&never.reason))),
            other => Err(Error::Protocol {
                doing: step.doing,
                reason: format!("the other side answered {}", other.name()),
            }),
        }
    }

    /// The guest is theirs.
    pub(crate) fn completed(
        &self,
        machine: &mut dyn SourceMachine,
        context: &mut Context<'_>,
        running: Option<&Running>,
        note: Option<String>,
    ) -> Outcome {
        let total = self.since.elapsed();
        context.statistics.update(|s| {
            s.downtime.total = total;
            if let Some(running) = running {
                s.downtime.resume = std::time::Duration::from_nanos(running.resume_ns);
            }
        });
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
