//! A destination whose guest runs and lacks memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Late;
use super::destination::Now;
use super::message::Recover;
use crate::channels::destination::{Incoming, answer};
use crate::destination::{Arrived, Destination};
use crate::lease::Id;
use crate::link::{Link, Step};
use crate::protocol::{ChannelHello, Message};
use crate::reception::{Visit, next_visit};
use crate::{Error, Postcopy, Status};

/// How often it looks who has come.
const GLANCE: Duration = Duration::from_millis(20);

/// A source that is back, and is to open its channel for pages until then.
struct Returning {
    main: Link,
    until: Instant,
}

impl Destination<'_> {
    /// Brings the memory that the guest lacks, over lost links and new ones, until it has everything and the source knows, or
    /// `stop` is set.
    pub(crate) fn bring<M>(
        &mut self,
        arrived: &mut Arrived<M>,
        late: &mut Late,
        incoming: &dyn Incoming,
        stop: &AtomicBool,
    ) -> Result<(), Error> {
        let (session, key) = (arrived.running.session, late.key());
        let mut returning: Option<Returning> = None;
        let (mut is_here, mut is_known, mut is_deaf) = (false, false, false);
        while !(stop.load(Ordering::SeqCst) || is_here && is_known) {
            if !is_here {
                let time = if late.is_connected() { GLANCE } else { Duration::ZERO };
                match late.wait(time) {
                    Now::Coming => {}
                    Now::Lost(error) => self.pause(late, &error),
                    Now::Broken(error) => {
                        late.hold();
                        self.statistics.fail(&error.chain());
                        late.give_up(&error, self.patience.last_words);
                        return Err(error);
                    }
                    Now::Here => {
                        is_here = true;
                        late.let_go();
                        let farewell = late.finish(self.patience.last_words)?;
                        self.publish(late);
                        if let Some(progress) = farewell {
                            self.statistics.told(&progress);
                            is_known = true;
                        }
                        self.statistics.update(|s| s.remaining_bytes = 0);
                        self.statistics.set_status(Status::Completed);
                        continue;
                    }
                }
                self.publish(late);
            }
            if returning.take_if(|returning| Instant::now() >= returning.until).is_some() {
                let doing = "opening the channel for pages again";
                self.pause(late, &Error::TimedOut { doing, waited: self.patience.handshake });
            }
            let patience = if is_here || !late.is_connected() { GLANCE } else { Duration::ZERO };
            let mut visit = match next_visit(&mut self.reception, incoming, patience) {
                Ok(Some(visit)) => visit,
                Ok(None) => continue,
                Err(error) => {
                    // The guest needs whoever comes: perhaps there are descriptors again in a moment.
                    if !std::mem::replace(&mut is_deaf, true) {
                        log::error!("nobody can be heard while memory is missing: {}", error.chain());
                    }
                    std::thread::sleep(GLANCE);
                    continue;
                }
            };
            is_deaf = false;
            match &visit.said {
                Ok(Message::Recover(recover))
                    if *recover == (Recover { session, key }) && late.is_peer(&visit.link) =>
                {
                    log::info!("{} is back with memory that the guest lacks", visit.peer);
                    match self.welcome(late, &mut visit) {
                        Ok(Welcome::Known) => is_known = true,
                        Ok(Welcome::Lacks) => {
                            let until = Instant::now() + self.patience.handshake;
                            returning = Some(Returning { main: visit.link, until });
                        }
                        Ok(Welcome::Silent) => {}
                        Err(error) => self.pause(late, &error),
                    }
                }
                Ok(Message::Channel(hello))
                    if is_for_pages(hello, session, key)
                        && late.is_peer(&visit.link)
                        && let Some(Returning { main, .. }) = returning.take() =>
                {
                    let step = Step {
                        doing: "opening the channel for pages",
                        patience: self.patience.handshake,
                        cancel: None,
                        until: None,
                    };
                    let pages = answer(visit.link, hello.clone(), step);
                    match pages.and_then(|pages| late.resume(main, pages)) {
                        Ok(()) => {
                            self.publish(late);
                            self.go_on(late);
                        }
                        Err(error) => self.pause(late, &error),
                    }
                }
                _ => self.answer_visit(arrived, visit),
            }
        }
        if !is_here {
            // Whoever stops this has ended the guest.
            late.dismiss(self.patience.last_words);
        }
        Ok(())
    }

    /// Says what is missing still, on a link on which the source has asked to go on.
    fn welcome(&mut self, late: &mut Late, visit: &mut Visit) -> Result<Welcome, Error> {
        // The source has given the old links up.
        late.hang_up();
        let patience = self.patience.handshake;
        let step =
            Step { doing: "going on with a guest that lacks memory", patience, cancel: None, until: None };
        if !late.tell_missing(&mut visit.link, step)? {
            late.hold();
            self.statistics.set_status(Status::PostcopyRecover);
            return Ok(Welcome::Lacks);
        }
        match visit.link.receive(step) {
            Ok(Message::Progress(progress)) => {
                self.statistics.told(&progress);
                Ok(Welcome::Known)
            }
            // It asks again.
            _ => Ok(Welcome::Silent),
        }
    }

    /// The guest runs here, and the source knows: what it lacks comes on `link`.
    pub(crate) fn begin_postcopy(&mut self, late: &mut Late, link: Option<Link>) {
        self.go_on(late);
        let begun = match link {
            Some(link) => late.go_on_with(link),
            None => Err(Error::Closed { doing: "telling the source that the guest runs" }),
        };
        if let Err(error) = begun {
            late.hang_up();
            self.pause(late, &error);
        }
    }

    fn go_on(&self, late: &mut Late) {
        late.let_go();
        self.statistics.update(|s| s.postcopy.get_or_insert_default().paused = None);
        self.statistics.set_status(Status::PostcopyActive);
    }

    /// The guest stands still before anybody is told that it does.
    fn pause(&self, late: &mut Late, error: &Error) {
        late.hold();
        log::warn!("memory that the guest lacks does not come any more: {}", error.chain());
        self.statistics.update(|s| s.postcopy.get_or_insert_default().paused = Some(error.chain()));
        self.statistics.set_status(Status::PostcopyPaused);
    }

    fn publish(&self, late: &Late) {
        let (figures, missing_bytes) = late.figures();
        self.statistics.update(|s| {
            s.remaining_bytes = missing_bytes;
            let paused = s.postcopy.take().and_then(|before| before.paused);
            s.postcopy = Some(Postcopy { paused, ..figures });
        });
    }
}

/// How a source that came back was received.
enum Welcome {
    /// It is told what is missing.
    Lacks,
    /// It knows that nothing is.
    Known,
    /// It was told so, and has not said that it knows.
    Silent,
}

fn is_for_pages(hello: &ChannelHello, session: Id, key: Id) -> bool {
    *hello == ChannelHello { session, key, index: 0, purpose: ChannelHello::PAGES }
}
