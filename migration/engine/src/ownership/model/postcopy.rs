//! Memory that follows after its guest, in every order: two processes that the hand-over is behind of, links between them that are cut
//! at any moment with all that is on its way there, and an operator who replaces them.
//!
//! The sets of pages are those that ship. Absent: which of the two links something goes by; an old copy that comes late is one that the other
//! link brought twice.

use std::collections::BTreeSet;

use super::explorer::{Explored, Model, Step, explore};
use crate::postcopy::PageSets;

/// Pages of the only block.
const PAGES: u64 = 3;

/// A mistake that the exploration must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutation {
    /// What was sent has arrived: after a lost link the source goes on with what it has not sent.
    SentIsReceived,
    /// The source lets go of its memory when it has sent all of it.
    ReleaseWhenSent,
    /// A page is placed whether it is there or not.
    PlaceTwice,
    /// A destination that has everything answers no source that comes back.
    NoAnswerAfterwards,
}

struct World {
    mutation: Option<Mutation>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Page(u64),
    Request(u64),
    Received,
    Recover,
    /// What the destination lacks, a bit for each page.
    Missing(u64),
    Farewell,
}

impl Message {
    fn is_for_source(self) -> bool {
        matches!(self, Self::Request(_) | Self::Received | Self::Missing(_))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Source {
    alive: bool,
    /// It has a link, as far as it knows.
    linked: bool,
    /// It has said RECOVER, and waits to hear what is missing.
    asks: bool,
    left: PageSets,
    released: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Destination {
    alive: bool,
    linked: bool,
    missing: PageSets,
    /// Pages that the guest waits for.
    waiting: BTreeSet<u64>,
    /// Pages that it has written to.
    written: BTreeSet<u64>,
    /// It has said RECEIVED on this link.
    told: bool,
    /// The source knows.
    known: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    source: Source,
    destination: Destination,
    link: BTreeSet<Message>,
    /// How often a link may still be lost.
    cuts_left: u8,
    violation: Option<&'static str>,
}

fn all_pages() -> PageSets {
    let mut pages = PageSets::none(std::iter::once(PAGES));
    pages.add(0, 0..PAGES);
    pages
}

impl State {
    /// `message` goes where the link leads, if it leads anywhere.
    fn send(&mut self, message: Message) {
        if self.source.linked && self.destination.linked {
            self.link.insert(message);
        }
    }

    fn arrives(&mut self, page: u64, twice: bool) {
        if self.destination.missing.contains(0, page) {
            self.destination.missing.remove(0, page..page + 1);
            self.destination.waiting.remove(&page);
        } else if twice && self.destination.written.contains(&page) {
            self.violation = Some("a page that the guest has written to is replaced");
        }
    }
}

impl Model for World {
    type State = State;

    fn initial(&self) -> State {
        let source = Source { alive: true, linked: true, asks: false, left: all_pages(), released: false };
        let destination = Destination {
            alive: true,
            linked: true,
            missing: all_pages(),
            waiting: BTreeSet::new(),
            written: BTreeSet::new(),
            told: false,
            known: false,
        };
        State { source, destination, link: BTreeSet::new(), cuts_left: 2, violation: None }
    }

    fn steps(&self, state: &State) -> Vec<Step<State>> {
        let mut steps = Vec::new();
        let mut add = |what: String, is_fault: bool, change: &dyn Fn(&mut State)| {
            let mut to = state.clone();
            change(&mut to);
            if !to.source.alive || !to.destination.alive {
                to.link.clear();
            }
            steps.push(Step { what, is_fault, to });
        };
        if state.source.alive && !state.source.released {
            self.source(state, &mut add);
        }
        if state.destination.alive {
            self.destination(state, &mut add);
        }
        if state.cuts_left > 0 && state.source.linked && state.destination.linked {
            for (source, destination) in [(false, true), (true, false)] {
                add("the link is cut".to_owned(), true, &|s| {
                    s.cuts_left -= 1;
                    s.link.clear();
                    // One side knows first; the other finds it out when it next looks.
                    (s.source.linked, s.destination.linked) = (source, destination);
                    s.source.asks &= source;
                });
            }
        }
        if state.source.alive {
            add("the source is killed".to_owned(), true, &|s| s.source.alive = false);
        }
        if state.destination.alive {
            add("the destination is killed".to_owned(), true, &|s| s.destination.alive = false);
        }
        steps
    }

    fn violation(&self, state: &State) -> Option<String> {
        let State { source, destination, violation, .. } = state;
        let lacks = destination.alive && destination.missing.count() > 0;
        let reason = match violation {
            Some(violation) => violation,
            None if source.released && lacks => "the source has let go of memory that the guest lacks",
            None => return None,
        };
        Some(reason.to_owned())
    }

    fn is_settled(&self, state: &State) -> bool {
        let State { source, destination, .. } = state;
        match (source.alive, destination.alive) {
            (true, true) => {
                source.released && destination.missing.count() == 0 && destination.waiting.is_empty()
            }
            // The guest has died, or it waits for ever, or has everything.
            _ => true,
        }
    }
}

type Add<'a> = dyn FnMut(String, bool, &dyn Fn(&mut State)) + 'a;

impl World {
    fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    fn source(&self, state: &State, add: &mut Add<'_>) {
        let source = &state.source;
        if source.linked && !state.destination.linked {
            add("the source finds the link lost".to_owned(), false, &|s| {
                (s.source.linked, s.source.asks) = (false, false);
            });
            return;
        }
        if !source.linked {
            if state.destination.alive {
                add("an operator has the source dial".to_owned(), false, &|s| {
                    // The destination gives its old links up when it hears of it.
                    (s.source.linked, s.source.asks) = (true, true);
                    (s.destination.linked, s.destination.told) = (true, false);
                    s.link.clear();
                    s.send(Message::Recover);
                });
            }
            return;
        }
        if !source.asks && source.left.count() > 0 {
            add("the source sends in the background".to_owned(), false, &|s| {
                if let Some((_, run)) = s.source.left.take_next(1) {
                    s.send(Message::Page(run.start));
                }
            });
        }
        if self.is(Mutation::ReleaseWhenSent) && source.left.count() == 0 {
            add("the source has sent everything".to_owned(), false, &|s| s.source.released = true);
        }
        for message in state.link.iter().copied().filter(|message| message.is_for_source()) {
            add(format!("the source hears {message:?}"), false, &|s| {
                s.link.remove(&message);
                match message {
                    Message::Request(page) if !s.source.asks => {
                        s.source.left.remove(0, page..page + 1);
                        s.source.left.go_on_from(0, page + 1);
                        s.send(Message::Page(page));
                    }
                    Message::Received => {
                        s.source.released = true;
                        s.send(Message::Farewell);
                    }
                    Message::Missing(pages) if s.source.asks => {
                        s.source.asks = false;
                        if !self.is(Mutation::SentIsReceived) {
                            s.source.left = PageSets::none(std::iter::once(PAGES));
                            let lacks = (0..PAGES).filter(|page| pages >> page & 1 == 1);
                            lacks.for_each(|page| s.source.left.add(0, page..page + 1));
                        }
                        // Who waits is asked for anew.
                        for page in s.destination.waiting.clone() {
                            s.send(Message::Request(page));
                        }
                    }
                    _ => {}
                }
            });
        }
    }

    fn destination(&self, state: &State, add: &mut Add<'_>) {
        let destination = &state.destination;
        if destination.linked && !state.source.linked && state.source.alive {
            add("the destination finds the link lost".to_owned(), false, &|s| s.destination.linked = false);
        }
        for page in 0..PAGES {
            if destination.missing.contains(0, page) {
                if !destination.waiting.contains(&page) {
                    // It need not, and all pages come all the same.
                    add(format!("the guest touches page {page}"), true, &|s| {
                        s.destination.waiting.insert(page);
                        s.send(Message::Request(page));
                    });
                }
            } else if !destination.written.contains(&page) {
                add(format!("the guest writes to page {page}"), false, &|s| {
                    s.destination.written.insert(page);
                });
            }
        }
        let has_all = destination.missing.count() == 0;
        if has_all && destination.linked && state.source.linked && !state.source.asks && !destination.told {
            add("the destination has everything".to_owned(), false, &|s| {
                s.destination.told = true;
                s.send(Message::Received);
            });
        }
        for message in state.link.iter().copied().filter(|message| !message.is_for_source()) {
            add(format!("the destination hears {message:?}"), false, &|s| {
                s.link.remove(&message);
                match message {
                    Message::Page(page) => s.arrives(page, self.is(Mutation::PlaceTwice)),
                    Message::Recover if s.destination.missing.count() == 0 => {
                        let answers = !self.is(Mutation::NoAnswerAfterwards);
                        answers.then(|| s.send(Message::Received));
                    }
                    Message::Recover => {
                        let lacks =
                            (0..PAGES).filter(|page| s.destination.missing.bitmaps()[0].contains(*page));
                        let pages = lacks.fold(0, |pages, page| pages | 1 << page);
                        s.send(Message::Missing(pages));
                    }
                    Message::Farewell => s.destination.known = true,
                    _ => {}
                }
            });
        }
    }
}

fn explored(mutation: Option<Mutation>) -> Result<Explored, String> {
    explore(&World { mutation }).map_err(|found| {
        println!("{mutation:?}: {}, after {} steps", found.reason, found.steps.len());
        found.to_string()
    })
}

#[test]
fn no_page_is_lost_whatever_link_breaks() {
    match explored(None) {
        Ok(explored) => println!("memory that follows: {explored}"),
        Err(counterexample) => panic!("{counterexample}"),
    }
}

#[test]
fn those_who_lose_a_page_are_found() {
    for (mutation, reason) in [
        (Mutation::SentIsReceived, "it never settles"),
        (Mutation::ReleaseWhenSent, "the source has let go of memory that the guest lacks"),
        (Mutation::PlaceTwice, "a page that the guest has written to is replaced"),
        (Mutation::NoAnswerAfterwards, "it never settles"),
    ] {
        let found = explored(Some(mutation)).expect_err(&format!("{mutation:?}"));
        assert!(found.starts_with(reason), "{mutation:?}: {found}");
    }
}
