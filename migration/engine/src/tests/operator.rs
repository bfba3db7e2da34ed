//! A hand-over that only an operator can decide, and those where he cannot.

use transport::Connection;

use super::mock::{Source, Trouble, World};
use super::{Play, impatience, patience};
use crate::handover::Handover;
use crate::lease::{Lease, State};
use crate::link::{Link, Step};
use crate::protocol::{Message, Never, Running};
use crate::{Context, Error, Outcome, Parameters, Patience, Statistics, Word};

/// A hand-over that stays undecided: without a lease, and the destination died before it took the guest.
fn undecided(world: &World) -> (Handover, Source) {
    let mut play = Play::new(world);
    play.with_lease = false;
    play.patience.settle = std::time::Duration::ZERO;
    play.factory.trouble = Some(Trouble::Kill("take image"));
    let ending = play.run();
    let Some((Outcome::Unknown(handover), source)) = ending.source else {
        panic!("{:?}", ending.source.map(|(outcome, _)| outcome));
    };
    let known = ending.source_statistics.handover_unknown.unwrap();
    assert!(known.contains("no answer yet") && known.contains("ferry reclaim"), "{known}");
    assert_eq!(world.running(), [""; 0]);
    (handover, source)
}

/// Goes on with it once.
fn resolve(
    handover: Handover,
    source: &mut Source,
    lease: Option<&mut Lease>,
    word: Option<Word>,
    dial: &mut dyn FnMut() -> Result<Connection, Error>,
) -> (Outcome, Statistics) {
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    if let Some(word) = word {
        parameters.say(word);
    }
    let patience = Patience { settle: std::time::Duration::ZERO, ..patience() };
    let mut context = Context { lease, parameters: &parameters, statistics: &statistics, patience };
    let outcome = handover.resolve(source, dial, &mut context);
    (outcome, statistics)
}

fn nobody() -> Result<Connection, Error> {
    Err(Error::Closed { doing: "connecting" })
}

/// Reaches somebody who gives one answer to every query.
fn somebody(answer: fn([u8; 16]) -> Message) -> Result<Connection, Error> {
    let (near, far) = Connection::pair()?;
    std::thread::spawn(move || {
        let step = Step { doing: "answering", patience: patience().handshake, cancel: None, until: None };
        let mut link = Link::new(far).unwrap();
        link.greet(step).unwrap();
        let Message::Query(query) = link.receive(step).unwrap() else { panic!("not a query") };
        link.send(&answer(query.session), step).unwrap();
        link.close(patience().last_words);
    });
    Ok(near)
}

#[test]
fn a_guest_that_the_operator_reclaims_runs_on() {
    let world = World::new();
    let (handover, mut source) = undecided(&world);
    let (outcome, _) = resolve(handover, &mut source, None, None, &mut nobody);
    let Outcome::Unknown(handover) = outcome else { panic!("{outcome:?}") };
    let (outcome, statistics) = resolve(handover, &mut source, None, Some(Word::Reclaim), &mut nobody);
    assert!(matches!(outcome, Outcome::Failed { paused: None, .. }), "{outcome:?}");
    assert_eq!((world.running(), world.image_holder().as_deref()), (vec!["source".into()], Some("source")));
    assert_eq!(statistics.snapshot().status.name(), "failed");
    world.assert_sound("reclaimed");
}

#[test]
fn a_guest_that_the_operator_confirms_never_runs_again() {
    let world = World::new();
    let (handover, mut source) = undecided(&world);
    let (outcome, statistics) = resolve(handover, &mut source, None, Some(Word::Confirm), &mut nobody);
    let Outcome::Completed { note: Some(note) } = outcome else { panic!("{outcome:?}") };
    assert!(note.contains("an operator confirmed"), "{note}");
    assert_eq!((world.running(), source.finished), (vec![], true));
    assert_eq!(statistics.snapshot().status.name(), "completed");
}

#[test]
fn a_destination_that_answers_counts_for_more_than_the_operator() {
    let world = World::new();
    let (handover, mut source) = undecided(&world);
    let mut running =
        || somebody(|session| Message::Running(Running { session, running: true, resume_ns: 1, ran: None }));
    let (outcome, _) = resolve(handover, &mut source, None, Some(Word::Reclaim), &mut running);
    assert!(matches!(outcome, Outcome::Completed { note: None }), "{outcome:?}");
    assert_eq!(world.running(), [""; 0]);

    let world = World::new();
    let (handover, mut source) = undecided(&world);
    let mut never = || somebody(|session| Message::Never(Never { session, reason: "not here".into() }));
    let (outcome, _) = resolve(handover, &mut source, None, Some(Word::Confirm), &mut never);
    assert!(matches!(outcome, Outcome::Failed { error: Error::Never { .. }, paused: None }), "{outcome:?}");
    assert_eq!(world.running(), ["source"]);
}

/// With a lease the operator waits as everybody does: what he says is no reason to run a guest whose record says otherwise.
#[test]
fn a_lease_that_cannot_be_read_is_waited_for_whatever_the_operator_says() {
    let world = World::new();
    let mut play = Play::new(&world);
    play.patience.settle = std::time::Duration::ZERO;
    play.destination_patience = Some(impatience());
    play.source.guest.lease_lost_at = Some("release image");
    let lease = play.with_claimed_lease();
    let ending = play.run();
    let Some((Outcome::Unknown(handover), mut source)) = ending.source else {
        panic!("{:?}", ending.source.map(|(outcome, _)| outcome));
    };
    assert!(ending.arrived.is_none(), "it could not take the guest");
    let mut lease = lease.lock().unwrap().take().unwrap();
    let mut handover = Some(handover);
    for word in [Word::Confirm, Word::Reclaim] {
        let before = handover.take().unwrap();
        let (outcome, _) = resolve(before, &mut source, Some(&mut lease), Some(word), &mut nobody);
        let Outcome::Unknown(undecided) = outcome else { panic!("{word:?}: {outcome:?}") };
        assert_eq!((world.running(), source.finished), (vec![], false), "{word:?}");
        handover = Some(undecided);
    }
    world.find_lease();
    let (outcome, _) = resolve(handover.unwrap(), &mut source, Some(&mut lease), None, &mut nobody);
    assert!(matches!(outcome, Outcome::Failed { error: Error::Never { .. }, paused: None }), "{outcome:?}");
    assert_eq!(world.running(), ["source"]);
    assert_eq!(lease.read().unwrap().unwrap().state, State::Owned);
}

/// Whoever ends the process, or cancels though it is too late, need not wait for a peer that is gone and a lease that nobody can read.
#[test]
fn a_wish_for_the_end_gives_an_undecided_hand_over_back_at_once() {
    let world = World::new();
    let (handover, mut source) = undecided(&world);
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    assert!(parameters.commit() && !parameters.cancel(), "too late");
    let patience = Patience { settle: std::time::Duration::MAX, ..patience() };
    let mut context = Context { lease: None, parameters: &parameters, statistics: &statistics, patience };
    let outcome = handover.resolve(&mut source, &mut nobody, &mut context);
    let Outcome::Unknown(handover) = outcome else { panic!("{outcome:?}") };
    assert_eq!((world.running(), source.finished), (vec![], false), "it is still undecided");
    // What the operator says counts all the same.
    parameters.say(Word::Reclaim);
    let outcome = handover.resolve(&mut source, &mut nobody, &mut context);
    assert!(matches!(outcome, Outcome::Failed { paused: None, .. }), "{outcome:?}");
    assert_eq!(world.running(), ["source"]);
}
