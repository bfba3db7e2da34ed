//! What a destination says to those who want something else than to move a guest here, and to a source whose guest is here.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use transport::Connection;

use crate::Error;
use crate::channels::destination::Incoming;
use crate::destination::{Arrived, Destination, unexpected};
use crate::lease::Id;
use crate::link::{Link, Step};
use crate::ownership::Answer;
use crate::ownership::destination::{Action, Event};
use crate::protocol::{Commit, Message, Never, Query, Reasons, Running};
use crate::reception::{GLANCE, Visit, next_visit};

/// How many sources wait at most; each has sent a hello, which may be long.
const WAITING_MAX: usize = 2;

impl Destination<'_> {
    /// After a guest arrived: brings what it lacks of its memory, if anything, and answers queries until its source knows, or
    /// until `stop` is set. A guest that lacks memory then waits for it as long as this process lives.
    ///
    /// # Errors
    /// The listener is broken.
    pub fn answer<M>(
        &mut self,
        arrived: &mut Arrived<M>,
        incoming: &dyn Incoming,
        stop: &AtomicBool,
    ) -> Result<(), Error> {
        if let Some(mut late) = arrived.late.take() {
            return self.bring(arrived, &mut late, incoming, stop);
        }
        while !arrived.acknowledged && !stop.load(Ordering::SeqCst) {
            if let Some(visit) = next_visit(&mut self.reception, incoming, GLANCE)? {
                self.answer_visit(arrived, visit);
            }
        }
        Ok(())
    }

    /// Answers one peer while the guest runs here.
    pub fn answer_one<M>(&mut self, arrived: &mut Arrived<M>, connection: Connection) {
        if let Some(visit) = Visit::of(connection, self.patience.handshake) {
            self.answer_visit(arrived, visit);
        }
    }

    pub(crate) fn answer_visit<M>(&mut self, arrived: &mut Arrived<M>, visit: Visit) {
        let Visit { peer, mut link, said, .. } = visit;
        let answer = match said {
            Ok(Message::Query(query)) => self.answer_to(&query),
            Ok(_) => Message::Refuse(Reasons::new(&["this process runs a guest already"])),
            Err(error) => {
                log::info!("{peer}: {}", error.chain());
                return;
            }
        };
        let patience = self.patience.last_words;
        if let Message::Running(running) = &answer {
            // That it was sent says nothing: the link may break before the source has read it.
            arrived.acknowledged |= self.acknowledged(&mut link, running, Instant::now() + patience);
        } else {
            let step = Step { doing: "answering a query", patience, cancel: None, until: None };
            if let Err(error) = link.send(&answer, step) {
                log::info!("{peer}: {}", error.chain());
            }
        }
        link.close(patience);
    }

    /// Hears who wants something else than to move a guest here.
    pub(crate) fn answer_stranger(&mut self, visit: Visit) {
        let Visit { peer, mut link, said, .. } = visit;
        match said {
            Ok(Message::Query(query)) => {
                let answer = self.answer_to(&query);
                let _it_asks_again = link.send(&answer, self.handshake("answering a query"));
                link.close(self.patience.last_words);
            }
            Ok(other) => {
                log::warn!("{peer} began with {}", other.name());
                link.close(Duration::ZERO);
            }
            Err(error) => {
                log::info!("{peer}: {}", error.chain());
                if let Error::Protocol { .. } = error {
                    let refusal = Error::Refused { reasons: vec![error.chain()] };
                    let _said = self.farewell(link, refusal, Id::default());
                }
            }
        }
    }

    /// Who comes while a guest is on its way: a source waits until it is known whether that one arrives. Its own attempt before may
    /// have left that one to us a moment ago.
    pub(crate) fn put_off(&mut self, visit: Visit) {
        match &visit.said {
            Ok(Message::Hello(_)) if self.waiting.len() < WAITING_MAX => self.waiting.push(visit),
            Ok(Message::Hello(_)) => self.send_away(visit, "other guests are waiting here"),
            Ok(Message::Query(query)) => {
                let answer = self.answer_to(query);
                self.say_and_close(visit.link, &answer);
            }
            Ok(other) => log::warn!("{} began with {}", visit.peer, other.name()),
            Err(error) => log::info!("{}: {}", visit.peer, error.chain()),
        }
    }

    /// A guest has arrived, and there is room for one.
    pub(crate) fn send_others_away(&mut self) {
        for visit in std::mem::take(&mut self.waiting) {
            self.send_away(visit, "this process runs a guest already");
        }
    }

    fn send_away(&self, visit: Visit, reason: &str) {
        log::info!("{}: {reason}", visit.peer);
        self.say_and_close(visit.link, &Message::Refuse(Reasons::new(&[reason])));
    }

    /// Nobody waits for whether it is heard: a guest is on its way.
    fn say_and_close(&self, mut link: Link, answer: &Message) {
        let _it_asks_again = link.send(answer, self.handshake("putting off a peer"));
        link.close(Duration::ZERO);
    }

    /// Tells the source, as often as it asks within the patience for an answer; whether it knows.
    pub(crate) fn acknowledged(&mut self, link: &mut Link, running: &Running, end: Instant) -> bool {
        let doing = "telling the source that the guest runs";
        let step = Step { doing, patience: self.patience.last_words, cancel: None, until: None };
        let mut sent = link.send(&Message::Running(running.clone()), step);
        while sent.is_ok() && Instant::now() < end {
            sent = match link.receive(step) {
                Ok(Message::Progress(progress)) => {
                    self.statistics.update(|s| s.unacknowledged = None);
                    self.statistics.told(&progress);
                    return true;
                }
                // Again: the answer is the same.
                Ok(Message::Commit(Commit { session, generation }))
                    if self.ownership.on(Event::Commit { session, generation })
                        == Action::Answer { session, answer: Answer::Running } =>
                {
                    link.send(&Message::Running(running.clone()), step)
                }
                Ok(other) => Err(unexpected(other, doing)),
                Err(error) => Err(error),
            };
        }
        false
    }

    /// What became of a session, as far as this process may say.
    pub(crate) fn answer_to(&mut self, query: &Query) -> Message {
        let Query { session, instance } = *query;
        let action = self.ownership.on(Event::Query { session, to_us: instance == self.instance });
        match (action, &self.running) {
            (Action::Answer { answer: Answer::Running, .. }, Some(running)) => {
                Message::Running(running.clone())
            }
            (Action::Answer { answer: Answer::Never, .. }, _) => {
                let reason = "the guest of this session does not run here".into();
                Message::Never(Never { session, reason })
            }
            _ => Message::Refuse(Reasons::new(&["the session was agreed on with another process"])),
        }
    }
}
