//! The machines that ship are sound in every order, and broken ones are found out.

use super::explorer::explore;
use super::world::{Leases, Mutation, World};

/// Two processes, one lease, three attempts.
const LEASED: World = World {
    leases: Leases::Common,
    lease_fails: false,
    operator: true,
    restarts: 0,
    shares_ram: false,
    attempts: 3,
    mutation: None,
};
/// The lease cannot be read or written for a while, at any time.
const FAILING: World = World { lease_fails: true, attempts: 2, ..LEASED };
/// Two processes that have nothing in common but their link.
const UNLEASED: World = World { leases: Leases::None, ..LEASED };
/// Each has a lease beside images of its own; who was killed may be started anew.
const STORAGE: World = World { leases: Leases::OneEach, restarts: 2, ..LEASED };
/// Neither can be read or written for a while, at any time.
const STORAGE_FAILING: World = World { lease_fails: true, restarts: 1, attempts: 2, ..STORAGE };

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
fn with_a_lease_at_either_end_one_of_them_starts_the_guest() {
    is_sound("with two leases", &STORAGE);
    is_sound("with two leases and no operator", &World { operator: false, ..STORAGE });
}

#[test]
fn with_leases_that_fail_at_either_end_one_of_them_starts_the_guest() {
    is_sound("with two leases that fail", &STORAGE_FAILING);
}

#[test]
fn ram_that_both_have_is_written_by_whose_guest_it_is() {
    is_sound("of RAM itself, with a lease", &World { shares_ram: true, ..LEASED });
    is_sound("of RAM itself, without a lease", &World { shares_ram: true, ..UNLEASED });
}

#[test]
fn ram_of_a_lease_that_fails_at_any_write_is_written_by_whose_guest_it_is() {
    is_sound("of RAM itself, with a lease that fails", &World { shares_ram: true, ..FAILING });
}

/// The exploration finds `mutation` in `world`; says how.
fn finds(mutation: Mutation, world: World) -> String {
    finds_in(&World { mutation: Some(mutation), attempts: 1, ..world })
}

fn finds_in(world: &World) -> String {
    let World { mutation, .. } = world;
    match explore(world) {
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
    assert_eq!(finds(Mutation::ResumeAfterCommit, STORAGE), "both ends let the guest start");
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
    // The source has taken its images back by then.
    assert_eq!(finds(Mutation::NoFence, STORAGE), "both ends let the guest start");
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
    for world in [UNLEASED, STORAGE] {
        assert_eq!(finds(Mutation::NoQuery, World { operator: false, ..world }), "it never settles");
    }
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

#[test]
fn a_source_that_leaves_its_images_as_they_were_is_found() {
    for mutation in [Mutation::MarkAfterCommit, Mutation::MarkWithoutSync] {
        assert_eq!(finds(mutation, STORAGE), "both ends let the guest start");
    }
}

#[test]
fn a_source_that_runs_with_images_that_are_marked_as_moved_is_found() {
    let reason = "the guest runs at the source and the lease does not say so";
    assert_eq!(finds(Mutation::ResumeFromMoved, STORAGE), reason);
    assert_eq!(finds(Mutation::ContinueFromMoved, STORAGE_FAILING), reason);
}

#[test]
fn a_destination_whose_own_lease_does_not_say_that_it_has_the_guest_is_found() {
    for mutation in [Mutation::RunBeforeTaking, Mutation::RunBeforeSync] {
        let reason = finds(mutation, STORAGE);
        assert_eq!(reason, "the guest runs at the destination and the lease does not say so", "{mutation:?}");
    }
}

#[test]
fn a_destination_that_says_never_of_images_that_may_be_its_own_is_found() {
    let reason = finds(Mutation::NeverWhenUnsure, STORAGE_FAILING);
    assert_eq!(reason, "NEVER is said of a guest that is the destination's");
    assert_eq!(finds(Mutation::OpenAfterTaking, STORAGE), reason);
}

#[test]
fn images_that_are_left_where_they_did_not_come_whole_are_found() {
    assert_eq!(finds(Mutation::LeaveIncoming, STORAGE), "it never settles");
}

#[test]
fn an_operator_who_reads_a_record_and_asks_no_process_is_found() {
    let reason = finds(Mutation::ReclaimByRecord, STORAGE);
    assert!(reason.starts_with("the guest runs") || reason.starts_with("both ends"), "{reason}");
    assert_eq!(finds(Mutation::ConfirmByRecord, STORAGE_FAILING), "it never settles");
}

#[test]
fn what_goes_wrong_before_the_guest_is_given_away_is_found() {
    for world in [LEASED, UNLEASED] {
        assert_eq!(finds(Mutation::StayStopped, world), "it never settles");
        assert_eq!(finds(Mutation::WaitForEver, world), "it never settles");
    }
    for world in [LEASED, UNLEASED, STORAGE] {
        let reason = finds(Mutation::RunOn, world);
        assert!(reason.starts_with("the guest runs"), "{reason}");
        assert_eq!(finds(Mutation::LoadWithoutRam, world), "the guest runs without its memory");
        let reason = finds_in(&World { mutation: Some(Mutation::ListenOnce), ..world });
        assert_eq!(reason, "no further attempt can succeed");
    }
}
