//! The hand-over, broken: who runs the guest is what the lease says, and it is one at most.

use engine::lease::{Record, State};
use exerciser::report::Counters;
use ferry::control::{FerryOwnership, FerryStatus, MigrationStatus, RunState};
use serde_json::json;
use stream::frame::Kind;
use support::{Held, Machine, Proxy, TestBed, Vm, WATCHDOG};

use crate::guest::{BUSY, EXERCISER, bed, lease, one_disk};
use crate::load::{arrives, moves, sends, works};

/// A guest on its way, stopped at one frame of the hand-over.
struct Handover {
    bed: TestBed,
    machine: Machine,
    source: Vm,
    destination: Vm,
    proxy: Proxy,
    held: Held,
    /// What the guest had done before.
    before: Counters,
}

impl Handover {
    fn stopped_at(kind: Kind) -> Self {
        let bed = bed();
        let machine = one_disk(&bed);
        Self::of(machine, bed, kind)
    }

    fn of(machine: Machine, bed: TestBed, kind: Kind) -> Self {
        let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
        let path = bed.path("to");
        let destination = machine.expect(&bed, "destination", &format!("unix:{}", path.display()));
        let proxy = Proxy::new(&bed, "by", &path, kind);
        let before = sends(&mut source, proxy.uri(), &Counters::default());
        let held = proxy.held();
        Self { bed, machine, source, destination, proxy, held, before }
    }
}

fn is_waiting(vm: &mut Vm) -> bool {
    let status = vm.status();
    (status.ownership, status.status) == (FerryOwnership::Incoming, RunState::Inmigrate)
}

/// The guest of `vm` runs elsewhere, and no command changes that.
fn has_given_away(vm: &mut Vm) {
    let status = vm.status();
    assert_eq!((status.ownership, status.status), (FerryOwnership::GivenAway, RunState::Postmigrate));
    for command in ["cont", "system_reset", "x-ferry-confirm", "x-ferry-reclaim"] {
        assert!(vm.refused(command, json!({})).contains("lives elsewhere"), "{command}");
    }
    assert!(vm.refused("migrate", json!({ "uri": "unix:/nowhere" })).contains("lives elsewhere"));
}

fn was_taken(record: &Record) -> bool {
    record.generation == 2 && matches!(record.state, State::Taken { .. })
}

fn was_settled(record: &Record) -> bool {
    (record.generation, &record.state) == (2, &State::Owned)
}

/// The guest of `source`, whose hand-over failed when it had done `before`, works there and moves to `destination` after all.
fn second_attempt(source: &mut Vm, mut destination: Vm, before: &Counters) {
    moves(source, &mut destination, before);
    has_given_away(source);
    destination.finish();
}

#[test]
fn a_commit_that_is_lost_gives_the_guest_back_and_comes_too_late() {
    let Handover { bed, mut source, mut destination, proxy, held, before, .. } =
        Handover::stopped_at(Kind::Commit);
    let status = source.status();
    assert_eq!((status.ownership, status.status), (FerryOwnership::HandoverUnknown, RunState::Postmigrate));
    for command in ["cont", "system_reset"] {
        assert!(source.refused(command, json!({})).contains("must not run twice"), "{command}");
    }
    for command in ["x-ferry-confirm", "x-ferry-reclaim"] {
        assert!(source.refused(command, json!({})).contains("decides alone, and says generation 1, offered"));
    }
    source.wait_for_migration("the hand-over", |info| info.status == MigrationStatus::Device);
    assert!(matches!(lease(&bed).state, State::Offered { .. }));

    proxy.refuse_more();
    held.cut_sender();
    source.not_migrated();
    assert!(source.owns_a_running_guest());
    assert!(was_settled(&lease(&bed)), "{}", lease(&bed));

    held.deliver();
    assert!(proxy.saw(Kind::Never, WATCHDOG), "a COMMIT that is too late is answered with NEVER");
    drop(held);
    assert!(is_waiting(&mut destination));
    second_attempt(&mut source, destination, &before);
}

/// A machine that writes no image, and so has no lease.
pub fn without_lease() -> Machine {
    let memory = "controller=d0,nsid=1,backend=memory,size=16M";
    Machine::new("128M").controller("serial=d0,queues=8").namespace(memory)
}

/// What its source says of a hand-over that nobody can decide.
pub fn undecided(source: &mut Vm) -> String {
    let reason = |status: FerryStatus| {
        status
            .migration
            .and_then(|migration| migration.detail)
            .filter(|detail| detail.contains("ferry reclaim"))
    };
    source.process.wait_until("a call for the operator", reason).unwrap_or_else(|error| panic!("{error:#}"))
}

#[test]
fn a_guest_whose_destination_died_without_a_lease_is_reclaimed_by_the_operator() {
    let Handover { bed, machine, mut source, destination, proxy, held, before } =
        Handover::of(without_lease(), bed(), Kind::Commit);
    destination.kill();
    held.cut();
    source.event("X_FERRY_HANDOVER_UNKNOWN");
    let detail = undecided(&mut source);
    assert!(detail.contains(proxy.uri()), "{detail}");
    assert_eq!(source.status().ownership, FerryOwnership::HandoverUnknown);
    source.execute("x-ferry-reclaim", json!({}));
    source.not_migrated();
    assert!(source.owns_a_running_guest());
    assert!(source.refused("x-ferry-reclaim", json!({})).contains("running"));
    let other = machine.expect(&bed, "other", &format!("unix:{}", bed.path("other").display()));
    second_attempt(&mut source, other, &before);
}

#[test]
fn a_guest_that_died_with_its_destination_without_a_lease_is_confirmed_by_the_operator() {
    let Handover { bed: _bed, mut source, destination, held, .. } =
        Handover::of(without_lease(), bed(), Kind::Running);
    destination.kill();
    held.cut();
    undecided(&mut source);
    source.execute("x-ferry-confirm", json!({}));
    source.migrated();
    has_given_away(&mut source);
}

/// Nothing but its destination can say where the guest is.
#[test]
fn without_a_lease_the_word_of_the_destination_is_waited_for() {
    let machine = without_lease();
    let Handover { bed: _bed, mut source, mut destination, proxy, held, before, .. } =
        Handover::of(machine, bed(), Kind::Commit);
    proxy.refuse_more();
    held.cut_sender();
    let reason = |status: FerryStatus| status.migration.and_then(|migration| migration.detail);
    let detail = source.process.wait_until("a reason", reason).unwrap_or_else(|error| panic!("{error:#}"));
    assert!(detail.contains(proxy.uri()) && detail.contains("no answer yet"), "{detail}");
    let status = source.status();
    assert_eq!((status.ownership, status.status), (FerryOwnership::HandoverUnknown, RunState::Postmigrate));
    source.wait_for_migration("the hand-over", |info| info.status == MigrationStatus::Device);
    assert!(source.refused("cont", json!({})).contains("must not run twice"));

    held.deliver();
    arrives(&mut destination, &before);
    drop(held);
    let status = source.status();
    assert_eq!((status.ownership, status.status), (FerryOwnership::HandoverUnknown, RunState::Postmigrate));
    proxy.take_more();
    source.migrated();
    has_given_away(&mut source);
    assert_eq!(reason(source.status()), None);
    destination.finish();
}

#[test]
fn a_destination_that_stood_still_finds_that_the_guest_was_taken_back() {
    let Handover { bed, mut source, mut destination, proxy, held, before, .. } =
        Handover::stopped_at(Kind::Commit);
    destination.freeze();
    held.deliver();
    proxy.refuse_more();
    held.cut_sender();
    source.not_migrated();
    assert!(source.owns_a_running_guest());
    assert!(was_settled(&lease(&bed)), "{}", lease(&bed));
    destination.thaw();
    assert!(proxy.saw(Kind::Never, WATCHDOG));
    drop(held);
    assert!(is_waiting(&mut destination));
    second_attempt(&mut source, destination, &before);
}

#[test]
fn a_destination_killed_before_it_took_the_guest_leaves_it_at_the_source() {
    let Handover { bed, machine, mut source, destination, held, before, .. } =
        Handover::stopped_at(Kind::Commit);
    destination.kill();
    held.cut();
    source.not_migrated();
    assert!(source.owns_a_running_guest());
    assert!(was_settled(&lease(&bed)), "{}", lease(&bed));
    let other = machine.expect(&bed, "other", &format!("unix:{}", bed.path("other").display()));
    second_attempt(&mut source, other, &before);
}

#[test]
fn an_answer_that_is_lost_is_asked_for_again() {
    let Handover { bed, mut source, mut destination, proxy, held, before, .. } =
        Handover::stopped_at(Kind::Running);
    assert!(!proxy.saw(Kind::Query, std::time::Duration::ZERO));
    held.cut();
    source.migrated();
    assert!(proxy.saw(Kind::Query, std::time::Duration::ZERO));
    has_given_away(&mut source);
    assert!(was_taken(&lease(&bed)), "{}", lease(&bed));
    arrives(&mut destination, &before);
    destination.finish();
}

#[test]
fn a_destination_killed_after_it_took_the_guest_keeps_it() {
    let Handover { bed, machine, mut source, destination, held, .. } = Handover::stopped_at(Kind::Running);
    destination.kill();
    held.cut();
    source.migrated();
    has_given_away(&mut source);
    assert!(was_taken(&lease(&bed)), "{}", lease(&bed));
    // It died with the guest; a new start is a new generation.
    let mut again = machine.boot(&bed, "again", EXERCISER, BUSY);
    works(&mut again, &Counters::default());
    assert_eq!(lease(&bed).generation, 3);
    has_given_away(&mut source);
    again.finish();
}

#[test]
fn a_source_killed_after_the_destination_took_the_guest_is_not_missed() {
    let Handover { bed, source, mut destination, held, before, .. } = Handover::stopped_at(Kind::Running);
    source.kill();
    held.cut();
    arrives(&mut destination, &before);
    assert!(destination.owns_a_running_guest());
    assert!(was_taken(&lease(&bed)), "{}", lease(&bed));
    destination.finish();
}

#[test]
fn a_source_killed_before_its_commit_arrived_leaves_a_guest_that_runs_nowhere() {
    let Handover { bed, machine, source, mut destination, held, .. } = Handover::stopped_at(Kind::Commit);
    source.kill();
    held.cut();
    destination.wait_for_migration("the failure", |info| info.status == MigrationStatus::Failed);
    assert!(is_waiting(&mut destination));
    let record = lease(&bed);
    assert!(record.generation == 1 && matches!(record.state, State::Offered { .. }), "{record}");
    let mut again = machine.boot(&bed, "again", EXERCISER, BUSY);
    assert!(was_settled(&lease(&bed)), "{}", lease(&bed));
    second_attempt(&mut again, destination, &Counters::default());
}
