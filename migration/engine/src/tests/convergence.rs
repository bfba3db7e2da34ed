//! Guests that dirty their memory faster than it goes: slowed down, given up, or stopped all the same.
//!
//! Nothing here depends on how fast it goes: no downtime is allowed, so that only a guest that dirties nothing converges, and the
//! mock guest dirties less the more it is slowed down.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use stream::frame::Kind;

use super::migrate::assert_moved;
use super::mock::{Trouble, World};
use super::overheard::Overheard;
use super::{Ending, Play};
use crate::{Convergence, Error, OnTimeout, Outcome, Status};

/// A guest that dirties `pages` pages in every round, and a user who allows it no downtime.
fn hot(world: &World, pages: u64, convergence: Convergence) -> Play {
    let mut play = Play::new(world);
    play.source.writes = vec![pages; 100];
    play.parameters.set_downtime_limit(Duration::ZERO);
    play.parameters.set_convergence(convergence);
    play
}

fn assert_stayed(world: &World, ending: &Ending) {
    assert_eq!(world.running(), ["source"]);
    assert!(ending.arrived.is_none());
    assert_eq!(ending.source_statistics.status, Status::Failed);
    assert_eq!(ending.source_statistics.error, ending.destination_statistics.error);
    let (_, source) = ending.source.as_ref().expect("it was not killed");
    assert_eq!(source.throttle_percent, 0);
    world.assert_sound("stayed");
}

/// The steps by which the guest was slowed down.
fn steps(world: &World) -> Vec<String> {
    let log = world.log();
    log.iter().filter_map(|entry| entry.strip_prefix("source: throttled by ")).map(str::to_owned).collect()
}

const FIVE_ROUNDS: u32 = 5;

fn five_rounds(on_timeout: OnTimeout) -> Convergence {
    Convergence { max_rounds: Some(FIVE_ROUNDS), on_timeout, ..Convergence::default() }
}

#[test]
fn a_guest_that_never_converges_is_given_up_after_its_rounds() {
    let world = World::new();
    let ending = hot(&world, 500, five_rounds(OnTimeout::Cancel)).run();
    assert!(matches!(
        ending.source,
        Some((Outcome::Failed { error: Error::NoConvergence { rounds: FIVE_ROUNDS, .. }, paused: None }, _))
    ));
    assert_stayed(&world, &ending);
    assert!(steps(&world).is_empty(), "nobody asked for it");
}

#[test]
fn a_guest_that_never_converges_is_stopped_after_its_rounds() {
    let world = World::new();
    let ending = hot(&world, 500, five_rounds(OnTimeout::Force)).run();
    assert_moved(&world, &ending);
    let statistics = &ending.source_statistics;
    assert_eq!(statistics.rounds, FIVE_ROUNDS);
    assert!(statistics.downtime_bytes > 300 * 4096, "{statistics:?}");
}

/// The time is over from the start: a part of the first round goes before the stop, the rest in it.
#[test]
fn what_is_not_sent_when_the_time_is_over_goes_in_the_stop() {
    let world = World::new();
    let over = Convergence { timeout: Some(Duration::ZERO), ..Convergence::default() };
    let ending = hot(&world, 10, Convergence { on_timeout: OnTimeout::Force, ..over }).run();
    assert_moved(&world, &ending);
    let statistics = &ending.source_statistics;
    assert_eq!(statistics.rounds, 1);
    // 400 and 32 pages are populated, a third of them zero, and a portion has 256.
    let (before, after) =
        (statistics.transferred_bytes - statistics.downtime_bytes, statistics.downtime_bytes);
    assert!(before > 150 * 4096 && after > 100 * 4096, "{statistics:?}");

    let world = World::new();
    let ending = hot(&world, 10, over).run();
    let Some((Outcome::Failed { error: Error::OutOfTime { rounds: 1, remaining_bytes, .. }, .. }, _)) =
        ending.source
    else {
        panic!("{:?}", ending.source.map(|(outcome, _)| outcome));
    };
    assert!(remaining_bytes >= (432 - 256) * 4096, "{remaining_bytes}");
    assert_stayed(&world, &ending);
}

#[test]
fn vcpus_are_slowed_down_until_the_guest_converges() {
    // At the last step, 99 percent, nothing is left of 90 pages.
    let thirty_rounds = Convergence { max_rounds: Some(30), ..Convergence::default() };
    let world = World::new();
    let ending = hot(&world, 90, thirty_rounds).run();
    assert_stayed(&world, &ending);

    let world = World::new();
    let ending = hot(&world, 90, Convergence { auto_converge: true, ..thirty_rounds }).run();
    assert_moved(&world, &ending);
    let expected: Vec<String> =
        (20..100).step_by(10).chain([99]).map(|percent: u8| percent.to_string()).collect();
    assert_eq!(steps(&world), expected);
    let statistics = &ending.source_statistics;
    assert_eq!((statistics.throttle_percent, statistics.rounds < 30), (99, true), "{statistics:?}");
}

/// Each time the guest runs on, which the mock machine refuses while it is slowed down.
#[test]
fn vcpus_run_as_before_after_every_failure() {
    let auto = Convergence { auto_converge: true, ..Convergence::default() };
    for trouble in ["throttle", "stop", "save", "quiesce", "release image"] {
        let world = World::new();
        let mut play = hot(&world, 90, auto);
        play.source.guest.trouble = Some(Trouble::Fail(trouble));
        let ending = play.run();
        assert_stayed(&world, &ending);
        assert_eq!(steps(&world).is_empty(), trouble == "throttle", "{trouble}");
    }
    let world = World::new();
    let ending = hot(&world, 500, Convergence { max_rounds: Some(4), ..auto }).run();
    assert_stayed(&world, &ending);
    assert_eq!(steps(&world), ["20", "30"]);
}

/// What the user changes while rounds are made counts from the next decision on.
#[test]
fn the_user_changes_his_mind_while_it_runs() {
    let world = World::new();
    let mut play = hot(&world, 90, Convergence { auto_converge: true, ..Convergence::default() });
    let parameters = std::sync::Arc::clone(&play.parameters);
    let mut looks = 0;
    play.source.on_look = Some(Box::new(move |throttle_percent| {
        looks += 1;
        match looks {
            4 => {
                assert_eq!(throttle_percent, 30);
                parameters.set_convergence(Convergence::default());
            }
            6 => {
                assert_eq!(throttle_percent, 0);
                parameters.set_convergence(Convergence {
                    max_rounds: Some(1),
                    on_timeout: OnTimeout::Force,
                    ..Convergence::default()
                });
            }
            _ => {}
        }
    }));
    let ending = play.run();
    assert_moved(&world, &ending);
    assert_eq!((ending.source_statistics.rounds, ending.source_statistics.throttle_percent), (6, 0));
}

/// Plays a migration without limits, whose user sets others during the second round, and still others during the fourth.
fn changed_twice(first: Convergence, then: Convergence) -> (World, Ending) {
    let world = World::new();
    let mut play = hot(&world, 500, Convergence::default());
    let parameters = Arc::clone(&play.parameters);
    let mut looks = 0;
    play.source.on_look = Some(Box::new(move |_| {
        looks += 1;
        assert!(looks < 50, "the rounds do not end");
        match looks {
            2 => parameters.set_convergence(first),
            4 => parameters.set_convergence(then),
            _ => {}
        }
    }));
    let ending = play.run();
    (world, ending)
}

#[test]
fn rounds_are_limited_while_they_are_made() {
    let at_most = |rounds| Convergence { max_rounds: Some(rounds), ..five_rounds(OnTimeout::Force) };
    for (first, then, made) in [(6, 9, 9), (9, 6, 6), (5, 2, 4)] {
        let (world, ending) = changed_twice(at_most(first), at_most(then));
        assert_moved(&world, &ending);
        assert_eq!(ending.source_statistics.rounds, made, "at most {first}, then {then}");
    }
}

/// The longer time would end no test, and the shorter one is over.
#[test]
fn time_is_limited_while_rounds_are_made() {
    let long = Convergence { timeout: Some(Duration::from_secs(100_000)), ..Convergence::default() };
    let over = Convergence { timeout: Some(Duration::ZERO), ..Convergence::default() };
    for first in [Convergence::default(), long] {
        let (world, ending) = changed_twice(first, Convergence { on_timeout: OnTimeout::Force, ..over });
        assert_moved(&world, &ending);
        assert_eq!(ending.source_statistics.rounds, 4);

        let (world, ending) = changed_twice(first, over);
        let Some((Outcome::Failed { error: Error::OutOfTime { rounds: 4, allowed, .. }, .. }, _)) =
            &ending.source
        else {
            panic!("{:?}", ending.source.map(|(outcome, _)| outcome));
        };
        assert_eq!(*allowed, Duration::ZERO);
        assert_stayed(&world, &ending);
    }
}

/// The rest of it goes in the stop.
#[test]
fn a_round_ends_early_when_the_user_gives_it_no_more_time() {
    let world = World::new();
    let mut play = hot(&world, 10, Convergence::default());
    let (parameters, pieces) = (Arc::clone(&play.parameters), AtomicU32::new(0));
    play.overheard = Some(Arc::new(Overheard::with_listener(move |kind| {
        // The first piece has no page yet.
        if kind == Kind::Stream && pieces.fetch_add(1, Ordering::SeqCst) == 1 {
            parameters.set_convergence(Convergence {
                timeout: Some(Duration::ZERO),
                on_timeout: OnTimeout::Force,
                ..Convergence::default()
            });
        }
    })));
    let ending = play.run();
    assert_moved(&world, &ending);
    let statistics = &ending.source_statistics;
    assert_eq!(statistics.rounds, 1);
    // A portion of 256 pages of 432, a third of them zero.
    assert!(statistics.downtime_bytes > 100 * 4096, "{statistics:?}");
}

#[test]
fn a_guest_whose_rounds_are_used_up_moves_ahead_of_its_memory() {
    let world = World::new();
    let ending = hot(&world, 10, five_rounds(OnTimeout::Postcopy)).run();
    let Some((Outcome::Completed { .. }, _)) = ending.source else {
        panic!("{:?}", ending.source.map(|(outcome, _)| outcome));
    };
    assert_eq!((ending.source_statistics.rounds, world.running()), (5, vec!["destination".to_owned()]));
    assert!(ending.arrived.unwrap().machine.0.missing.is_some(), "memory followed");
}

/// While a migration runs it is known whether memory may still follow in the end.
#[test]
fn whether_memory_may_follow_is_known_while_it_moves() {
    for (way, is_left_out) in [(OnTimeout::Cancel, true), (OnTimeout::Postcopy, false)] {
        let world = World::new();
        let mut play = hot(&world, 10, five_rounds(way));
        let parameters = std::sync::Arc::clone(&play.parameters);
        assert!(!parameters.postcopy_is_left_out(), "nothing is agreed on yet");
        let seen = std::sync::Arc::clone(&parameters);
        play.source.on_look =
            Some(Box::new(move |_| assert_eq!(seen.postcopy_is_left_out(), is_left_out, "{way:?}")));
        play.run();
        parameters.begin();
        assert!(!parameters.postcopy_is_left_out(), "the next one may");
    }
}

#[test]
fn a_way_out_that_nobody_agreed_on_is_none() {
    let world = World::new();
    let mut play = hot(&world, 90, Convergence::default());
    let parameters = std::sync::Arc::clone(&play.parameters);
    play.source.on_look =
        Some(Box::new(move |_| parameters.set_convergence(five_rounds(OnTimeout::Postcopy))));
    let ending = play.run();
    assert!(matches!(
        ending.source,
        Some((Outcome::Failed { error: Error::PostcopyNotAgreed, paused: None }, _))
    ));
    assert_stayed(&world, &ending);
}
