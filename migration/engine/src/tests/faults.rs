//! Links that break and processes that die, at every message and at every step: never two guests, and one where the design
//! promises one.

use transport::faulty::Fault;

use super::mock::{Trouble, World};
use super::{End, Ending, Play, impatience, patience, patiently};
use crate::lease::State;
use crate::{Error, Outcome, Patience};

/// More messages than either side ever sends.
const MESSAGES_MAX: u32 = 40;

/// Who runs the guest in the end, once everything was checked that must hold whatever happened.
fn checked(world: &World, ending: &Ending, what: &str) -> Option<&'static str> {
    world.assert_sound(what);
    let running = world.running();
    assert!(running.len() <= 1, "{what}: {running:?}\n{:#?}", world.log());
    if let Some(arrived) = &ending.arrived
        && let Some((_, source)) = &ending.source
    {
        assert!(source.guest.contents() == arrived.machine.0.contents(), "{what}: RAM differs");
    }
    if let Some((Outcome::Failed { paused, .. }, _)) = &ending.source {
        assert_eq!(*paused, None, "{what}\n{:#?}", world.log());
    }
    match running.first().map(String::as_str) {
        Some("source") => {
            assert_eq!(world.image_holder().as_deref(), Some("source"), "{what}");
            assert!(matches!(ending.source, Some((Outcome::Failed { .. }, _))), "{what}");
            Some("source")
        }
        Some("destination") => {
            assert_eq!(world.image_holder().as_deref(), Some("destination"), "{what}");
            assert!(ending.arrived.is_some(), "{what}");
            Some("destination")
        }
        other => {
            assert_eq!(other, None);
            None
        }
    }
}

/// Plays a fault at every message of one end, and gives the number of messages and who ran after each.
fn at_every_message(
    end: End,
    patience: Patience,
    fault: impl Fn() -> Fault,
    judge: impl Fn(u32, &World, &Ending, &str),
) {
    for passes_memory in [false, true] {
        let mut at = 0;
        loop {
            let (world, ending) = patiently(patience, |patience| {
                let world = World::new();
                let mut play = Play::new(&world);
                play.source.passes_memory = passes_memory;
                play.parameters.set_local(true);
                play.fault = Some((end, at, fault()));
                play.patience = patience;
                let ending = play.run().unless_cut_short()?;
                Some((world, ending))
            });
            let way = if passes_memory { "handed over" } else { "copied" };
            let what = format!("{:?} at message {at} of the {end:?}, RAM {way}", fault());
            judge(at, &world, &ending, &what);
            if !ending.struck {
                assert!(at > 3, "{what}: too few messages for a migration");
                let handed_over_bytes = ending.source_statistics.handed_over_bytes;
                assert_eq!(handed_over_bytes > 0, passes_memory, "{what}");
                break;
            }
            at += 1;
            assert!(at < MESSAGES_MAX, "more than {MESSAGES_MAX} messages");
        }
    }
}

/// Both processes live and share a lease: exactly one runs the guest.
fn one_runs(_at: u32, world: &World, ending: &Ending, what: &str) {
    let runner = checked(world, ending, what);
    assert!(runner.is_some(), "{what}: nobody runs the guest\n{:#?}", world.log());
    let record = world.lease("reader").read().unwrap().unwrap();
    assert_eq!(Some(record.owner.vm.as_str()), runner, "{what}: {record}");
    assert!(matches!(record.state, State::Owned | State::Taken { .. }), "{what}: {record}");
}

#[test]
fn a_link_cut_at_any_message_leaves_exactly_one_guest() {
    for end in [End::Source, End::Destination] {
        at_every_message(end, patience(), || Fault::CutBefore, one_runs);
        at_every_message(end, patience(), || Fault::CutMiddle, one_runs);
        at_every_message(end, patience(), || Fault::CutAfter, one_runs);
    }
}

#[test]
fn silence_from_any_message_on_leaves_exactly_one_guest() {
    for end in [End::Source, End::Destination] {
        at_every_message(end, impatience(), || Fault::Swallow, one_runs);
        at_every_message(end, impatience(), || Fault::Deafen, one_runs);
    }
}

#[test]
fn a_destination_killed_at_any_message_leaves_what_the_lease_says() {
    for fault in [|| Fault::KillBefore, || Fault::KillAfter] {
        at_every_message(End::Destination, patience(), fault, |_, world, ending, what| {
            assert_eq!(ending.destination_killed, ending.struck, "{what}");
            let runner = checked(world, ending, what);
            let record = world.lease("reader").read().unwrap().unwrap();
            match record.state {
                State::Owned => assert_eq!(runner, Some("source"), "{what}"),
                // It had the guest, and took it into its grave.
                State::Taken { .. } if ending.struck => assert_eq!(runner, None, "{what}"),
                State::Taken { .. } => assert_eq!(runner, Some("destination"), "{what}"),
                other => panic!("{what}: {other}"),
            }
            after_death(world, runner, what);
        });
    }
}

#[test]
fn a_source_killed_at_any_message_leaves_what_the_lease_says() {
    for fault in [|| Fault::KillBefore, || Fault::KillAfter] {
        at_every_message(End::Source, patience(), fault, |_, world, ending, what| {
            assert_eq!(ending.source.is_none(), ending.struck, "{what}");
            let runner = checked(world, ending, what);
            let record = world.lease("reader").read().unwrap().unwrap();
            match record.state {
                State::Taken { .. } => assert_eq!(runner, Some("destination"), "{what}"),
                _ => assert_eq!(runner, None, "{what}: {record}"),
            }
        });
    }
}

/// A VM that is started after its owner died gets the lease; while the owner lives it does not.
fn after_death(world: &World, runner: Option<&str>, what: &str) {
    let claim = world.lease("next").claim();
    // The source of a play has ended by now, so even a survivor's lease is free in the mock; what counts is that the
    // record never blocks a start for ever.
    assert!(claim.is_ok(), "{what}, {runner:?}: {claim:?}");
}

/// Every step of the machines, and whether the guest is still the source's after it failed.
const SOURCE_STEPS: [&str; 8] =
    ["describe", "start tracking", "populated", "collect", "stop", "save", "quiesce", "release image"];
const DESTINATION_STEPS: [&str; 4] = ["build", "load", "take image", "open image"];

#[test]
fn a_step_that_fails_leaves_the_source_running() {
    for step in SOURCE_STEPS {
        let world = World::new();
        let mut play = Play::new(&world);
        play.source.guest.trouble = Some(Trouble::Fail(step));
        let ending = play.run();
        assert_eq!(checked(&world, &ending, step), Some("source"), "{step}");
        let cause = ending.source_statistics.error.unwrap();
        assert!(cause.contains(&format!("{step} fails")), "{step}: {cause}");
        if step != "describe" {
            assert_eq!(
                ending.destination_statistics.error.as_ref(),
                Some(&cause),
                "{step}: both tell the same"
            );
        }
    }
    for step in DESTINATION_STEPS {
        let world = World::new();
        let mut play = Play::new(&world);
        play.factory.trouble = Some(Trouble::Fail(step));
        let ending = play.run();
        assert_eq!(checked(&world, &ending, step), Some("source"), "{step}");
        let cause = ending.source_statistics.error.unwrap();
        assert!(cause.contains(&format!("{step} fails")), "{step}: {cause}");
        assert_eq!(ending.destination_statistics.error.as_ref(), Some(&cause), "{step}: both tell the same");
        assert!(ending.arrived.is_none());
    }
}

#[test]
fn a_guest_that_cannot_start_after_it_was_taken_stays_at_the_destination() {
    let world = World::new();
    let mut play = Play::new(&world);
    play.factory.trouble = Some(Trouble::Fail("start"));
    let ending = play.run();
    assert_eq!(world.running(), [""; 0]);
    assert!(matches!(ending.source, Some((Outcome::Completed { .. }, _))));
    let arrived = ending.arrived.unwrap();
    assert!(arrived.error.unwrap().chain().contains("start fails"));
}

#[test]
fn a_process_killed_at_any_step_leaves_at_most_one_guest() {
    for step in SOURCE_STEPS {
        let world = World::new();
        let mut play = Play::new(&world);
        play.source.guest.trouble = Some(Trouble::Kill(step));
        let ending = play.run();
        // It never came to COMMIT.
        assert_eq!(checked(&world, &ending, step), None, "{step}");
        assert!(ending.source.is_none() && ending.arrived.is_none());
    }
    for (step, runner) in [
        ("build", Some("source")),
        ("load", Some("source")),
        ("take image", Some("source")),
        ("open image", Some("source")),
        ("start", None),
    ] {
        let world = World::new();
        let mut play = Play::new(&world);
        play.factory.trouble = Some(Trouble::Kill(step));
        let ending = play.run();
        assert!(ending.destination_killed);
        assert_eq!(checked(&world, &ending, step), runner, "{step}");
        if runner.is_none() {
            let Some((Outcome::Completed { note: Some(note) }, _)) = &ending.source else {
                panic!("{step}: the lease says that it was taken")
            };
            assert!(note.contains("taken in session"), "{note}");
        }
    }
}

/// Without a lease the source cannot tell whether a silent destination runs: it stays undecided, and safe.
#[test]
fn without_a_lease_a_dead_destination_stays_undecided() {
    let mut undecided = 0;
    for at in 0..MESSAGES_MAX {
        let world = World::new();
        let mut play = Play::new(&world);
        play.with_lease = false;
        // Only the end of the settling is waited for: the death itself is seen at once.
        play.patience.settle = std::time::Duration::from_millis(50);
        play.fault = Some((End::Destination, at, Fault::KillBefore));
        let ending = play.run();
        let what = format!("killed before message {at}");
        if !ending.struck {
            break;
        }
        let runner = checked(&world, &ending, &what);
        match &ending.source {
            Some((Outcome::Unknown(_), _)) => {
                undecided += 1;
                assert_eq!(runner, None, "{what}");
                assert_eq!(ending.source_statistics.status.name(), "handover-unknown");
                assert!(ending.source_statistics.handover_unknown.is_some());
            }
            Some((Outcome::Failed { .. }, _)) => assert_eq!(runner, Some("source"), "{what}"),
            other => panic!("{what}: {:?}", other.as_ref().map(|(outcome, _)| outcome)),
        }
    }
    assert_eq!(undecided, 1, "only a death between COMMIT and RUNNING leaves it open");
}

/// Without a lease, but with both alive, the answer to a query decides.
#[test]
fn without_a_lease_a_cut_link_is_settled_by_asking() {
    for end in [End::Source, End::Destination] {
        for fault in [|| Fault::CutBefore, || Fault::CutAfter] {
            for at in 0..MESSAGES_MAX {
                let world = World::new();
                let mut play = Play::new(&world);
                play.with_lease = false;
                play.fault = Some((end, at, fault()));
                let ending = play.run();
                let what = format!("{:?} at message {at} of the {end:?}", fault());
                let runner = checked(&world, &ending, &what);
                assert!(runner.is_some(), "{what}: nobody runs\n{:#?}", world.log());
                let knows = matches!(ending.source, Some((Outcome::Completed { .. }, _)));
                let told = ending.arrived.as_ref().is_some_and(|arrived| arrived.acknowledged);
                assert!(knows || !told, "{what}: the destination thinks that the source knows");
                if !ending.struck {
                    break;
                }
            }
        }
    }
}

/// The patience for each answer is long; the guest does not stand still for all of them.
#[test]
fn a_destination_that_takes_too_long_does_not_keep_the_guest_stopped() {
    let world = World::new();
    let mut play = Play::new(&world);
    // Preamble, AGREE, SETTLED, PREPARED.
    play.fault = Some((End::Destination, 3, Fault::Swallow));
    play.patience.stopped = std::time::Duration::ZERO;
    play.patience.last_words = std::time::Duration::from_millis(100);
    let ending = play.run();
    assert_eq!(checked(&world, &ending, "stopped"), Some("source"));
    let cause = ending.source_statistics.error.unwrap();
    assert!(cause.contains("more than 300ms while waiting for the destination to load"), "{cause}");
}

/// What is still on its way when the guest stops, the guest waits for: so it does not stop before the destination has placed it.
#[test]
fn a_guest_stops_only_when_the_destination_has_what_was_sent() {
    let world = World::new();
    let mut play = Play::new(&world);
    // Preamble, AGREE, SETTLED.
    play.fault = Some((End::Destination, 2, Fault::Swallow));
    play.patience.silence = std::time::Duration::from_millis(500);
    let ending = play.run();
    assert_eq!(checked(&world, &ending, "settling"), Some("source"));
    let cause = ending.source_statistics.error.unwrap();
    assert!(cause.contains("waiting until the destination has placed what was sent"), "{cause}");
    assert!(world.log().iter().all(|step| step != "source: stop"), "{:#?}", world.log());
}

/// A lease that cannot be read when an attempt is undone decides nothing yet: the guest waits for it, and goes on with it.
#[test]
fn a_guest_that_was_not_handed_over_waits_for_its_lease() {
    let world = World::new();
    let mut play = Play::new(&world);
    play.patience.settle = std::time::Duration::ZERO;
    play.source.guest.trouble = Some(Trouble::Fail("release image"));
    play.source.guest.lease_lost_at = Some("release image");
    let lease = play.with_claimed_lease();
    let ending = play.run();
    let Some((Outcome::Unknown(handover), mut source)) = ending.source else {
        panic!("{:?}", ending.source.map(|(outcome, _)| outcome));
    };
    assert_eq!((world.running(), ending.source_statistics.status.name()), (vec![], "handover-unknown"));
    let known = ending.source_statistics.handover_unknown.unwrap();
    assert!(known.contains("release image fails"), "{known}");

    let mut lease = lease.lock().unwrap().take().unwrap();
    let (parameters, statistics) = (crate::Parameters::new(), crate::Statistics::new());
    let mut context = crate::Context {
        lease: Some(&mut lease),
        parameters: &parameters,
        statistics: &statistics,
        patience: Patience { settle: std::time::Duration::ZERO, ..patience() },
    };
    let mut nobody = || -> Result<transport::Connection, Error> { panic!("nobody is to be asked") };
    let outcome = handover.resolve(&mut source, &mut nobody, &mut context);
    let Outcome::Unknown(handover) = outcome else { panic!("{outcome:?}") };
    assert_eq!(world.running(), [""; 0]);
    world.find_lease();
    let outcome = handover.resolve(&mut source, &mut nobody, &mut context);
    let Outcome::Failed { error: Error::Machine { .. }, paused: None } = &outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        (world.running(), world.image_holder().as_deref()),
        (vec!["source".to_owned()], Some("source"))
    );
    assert_eq!(lease.read().unwrap().unwrap().state, State::Owned);
    assert_eq!(statistics.snapshot().handover_unknown, None);
    assert!(statistics.snapshot().error.unwrap().contains("release image fails"));
    world.assert_sound("undone");
}

#[test]
fn a_lock_that_a_stranger_took_keeps_the_guest_paused_and_names_him() {
    let world = World::new();
    let mut play = Play::new(&world);
    play.factory.trouble = Some(Trouble::Fail("take image"));
    play.source.guest.trouble = Some(Trouble::Fail("reacquire image"));
    let ending = play.run();
    let Some((Outcome::Failed { error: Error::Never { .. }, paused: Some(paused) }, _)) = &ending.source
    else {
        panic!("{:?}", ending.source.map(|(outcome, _)| outcome));
    };
    assert!(paused.contains("reacquire image fails"), "{paused}");
    assert_eq!(world.running(), [""; 0]);
    assert!(ending.source_statistics.error.unwrap().contains("stays paused"));
}
