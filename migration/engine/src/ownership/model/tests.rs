//! The machines that ship are sound in every order, and broken ones are found out.

use super::explorer::explore;
use super::world::{Mutation, World};

/// Two processes, one lease, two attempts.
const LEASED: World = World {
    leased: true,
    lease_fails: false,
    operator: true,
    shares_ram: false,
    attempts: 2,
    mutation: None,
};
/// The lease cannot be read or written for a while, at any time.
const FAILING: World = World { lease_fails: true, ..LEASED };
/// Two processes that have nothing in common but their link.
const UNLEASED: World = World { leased: false, ..LEASED };

fn is_sound(name: &str, world: &World) {
    match explore(world) {
        Ok(explored) => println!("hand-over {name}: {explored}"),
        Err(counterexample) => panic!("{name}: {counterexample}"),
    }
}

#[test]
fn with_a_lease_exactly_one_runs_in_the_end_whatever_the_operator_says() {
    is_sound("with a lease", &LEASED);
}

#[test]
fn with_a_lease_that_fails_at_any_write_exactly_one_runs_once_it_works_again() {
    is_sound("with a lease that fails", &FAILING);
}

#[test]
fn without_a_lease_only_a_dead_destination_leaves_it_open() {
    is_sound("without a lease or an operator", &World { operator: false, ..UNLEASED });
}

#[test]
fn without_a_lease_the_operator_decides_what_nobody_else_can() {
    is_sound("without a lease", &UNLEASED);
}

#[test]
fn ram_that_both_have_is_written_by_whose_guest_it_is() {
    is_sound("of RAM itself, with a lease", &World { shares_ram: true, ..LEASED });
    is_sound("of RAM itself, without a lease", &World { shares_ram: true, ..UNLEASED });
}

#[test]
fn ram_of_a_lease_that_fails_at_any_write_is_written_by_whose_guest_it_is() {
    let world = World { shares_ram: true, attempts: 1, ..FAILING };
    is_sound("of RAM itself, with a lease that fails", &world);
}

/// The exploration finds `mutation` in `world`; says how.
fn finds(mutation: Mutation, world: World) -> String {
    let world = World { mutation: Some(mutation), attempts: 1, ..world };
    match explore(&world) {
        Ok(explored) => panic!("{mutation:?} is not found in {explored}"),
        Err(counterexample) => {
            println!("{mutation:?}: {}, after {} steps", counterexample.reason, counterexample.steps.len());
            assert!(!counterexample.steps.is_empty(), "{counterexample}");
            counterexample.reason
        }
    }
}

#[test]
fn a_source_that_resumes_after_commit_is_found() {
    for world in [LEASED, UNLEASED] {
        let reason = finds(Mutation::ResumeAfterCommit, world);
        assert!(reason.starts_with("the guest runs"), "{reason}");
    }
}

#[test]
fn a_source_that_leaves_its_offer_in_the_lease_is_found() {
    let reason = finds(Mutation::NeverBeforeLease, LEASED);
    assert_eq!(reason, "the guest runs at the source and the lease does not say so");
}

#[test]
fn a_destination_that_does_not_look_at_the_lease_is_found() {
    let reason = finds(Mutation::RunUnoffered, LEASED);
    assert!(reason.starts_with("the guest runs"), "{reason}");
}

#[test]
fn a_destination_that_forgets_its_never_is_found() {
    for world in [LEASED, UNLEASED] {
        assert_eq!(finds(Mutation::NoFence, world), "a session runs of which NEVER was said");
    }
}

#[test]
fn a_guest_that_runs_before_its_lease_is_stable_is_found() {
    for mutation in [Mutation::RunBeforeSync, Mutation::RunBeforeTaking] {
        let reason = finds(mutation, LEASED);
        assert!(reason.starts_with("the guest runs"), "{reason}");
    }
}

#[test]
fn a_source_that_settles_without_writing_is_found() {
    let reason = finds(Mutation::SettleWithoutWriting, LEASED);
    assert!(reason.starts_with("the guest runs"), "{reason}");
}

#[test]
fn a_destination_that_finds_a_reason_after_it_took_the_guest_is_found() {
    let reason = finds(Mutation::OpenAfterTaking, LEASED);
    assert_eq!(reason, "NEVER is said of a guest that is the destination's");
}

#[test]
fn a_destination_that_says_never_without_knowing_is_found() {
    let reason = finds(Mutation::NeverWhenUnsure, FAILING);
    assert_eq!(reason, "NEVER is said of a guest that is the destination's");
}

#[test]
fn a_source_that_does_not_ask_again_is_found() {
    assert_eq!(finds(Mutation::NoQuery, World { operator: false, ..UNLEASED }), "it never settles");
}

#[test]
fn a_side_that_writes_ram_that_is_not_its_own_is_found() {
    let shared = |world| World { shares_ram: true, ..world };
    let early = "the guest goes on at the source in RAM that the destination has written";
    for world in [LEASED, UNLEASED] {
        assert_eq!(finds(Mutation::WriteBeforeTaking, shared(world)), early);
        let late = finds(Mutation::WriteAfterOffer, shared(world));
        assert_eq!(late, "the source writes RAM of a guest that is the destination's");
    }
    assert_eq!(finds(Mutation::WriteBeforeSync, shared(LEASED)), early);
}

#[test]
fn an_operator_whose_word_beats_the_lease_is_found() {
    let reason = finds(Mutation::WordBeforeLease, LEASED);
    assert!(reason.starts_with("the guest runs"), "{reason}");
}
