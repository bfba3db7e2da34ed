//! What a migration of a busy exerciser must show, or its test fails: on either side a thousand verified reads and RAM that was
//! checked, at least two rounds that sent what the guest had dirtied, and commands in flight when the stop began. On a host that
//! gives the guest no time the disks may have finished all they had when a stop comes, so that the last holds for half of
//! several stops: [`were_busy`].

use exerciser::report::Counters;
use ferry::control::FerryOwnership;
use serde_json::{Value, json};
use support::Vm;

/// Verified reads that a migration test needs on either side.
pub const ENOUGH: u64 = 1000;

/// Waits until the guest of `vm` has verified [`ENOUGH`] reads and checked RAM since it had counted `since`.
pub fn works(vm: &mut Vm, since: &Counters) -> Counters {
    let now = vm.progress("I/O and memory checks", |now| {
        now.verified >= since.verified + ENOUGH && now.ram_checked > since.ram_checked
    });
    assert_eq!(now.errors, 0);
    now
}

/// Sends the guest of `source` to `uri` once it has worked since `since`; returns what it had done by then, when two rounds of
/// dirty pages have been seen and the guest may be stopped.
pub fn sends(source: &mut Vm, uri: &str, since: &Counters) -> Counters {
    let before = works(source, since);
    two_rounds(source, uri, 32 << 20);
    before
}

/// Sends the guest of `source` to `uri` and returns when two rounds have had pages to send that it dirtied during the round before,
/// for which a link of `bytes_per_second` gives it time.
pub fn two_rounds(source: &mut Vm, uri: &str, bytes_per_second: u64) {
    two_rounds_with(source, json!({ "uri": uri }), bytes_per_second);
}

/// The same with the arguments of `migrate`.
pub fn two_rounds_with(source: &mut Vm, target: Value, bytes_per_second: u64) {
    // No downtime is short enough. A third round begins only if the second left it something.
    source
        .execute("migrate-set-parameters", json!({ "downtime-limit": 0, "max-bandwidth": bytes_per_second }));
    source.migrate_with(target);
    let info = source.wait_for_migration("two rounds of dirty pages", |info| {
        info.status.is_final() || info.ram.as_ref().is_some_and(|ram| ram.dirty_sync_count >= 3)
    });
    assert!(
        info.ram.as_ref().is_some_and(|ram| ram.dirty_sync_count >= 3),
        "two rounds of dirty pages: {info:?}"
    );
    source.execute("migrate-set-parameters", json!({ "downtime-limit": 60_000, "max-bandwidth": 0 }));
}

/// Commands in flight when the guest of `source` was stopped.
pub fn in_flight_at_stop(source: &mut Vm) -> u32 {
    source.status().migration.expect("a migration").in_flight_at_stop
}

/// Waits until the guest that had done `before` has arrived at `destination` and has worked there.
pub fn arrives(destination: &mut Vm, before: &Counters) -> Counters {
    // The first whole line that the destination prints belongs to it or was begun by the source.
    let arrived = destination.progress("the guest at the destination", |_| true);
    assert!(arrived.verified >= before.verified && arrived.ram_checked >= before.ram_checked);
    works(destination, &arrived)
}

/// Moves the guest of `source` to `destination`, under load on both sides. Returns what it has done in the end, and how many
/// commands were in flight.
pub fn moves(source: &mut Vm, destination: &mut Vm, since: &Counters) -> (Counters, u32) {
    let before = sends(source, destination.uri(), since);
    source.migrated();
    assert_eq!(source.status().ownership, FerryOwnership::GivenAway);
    let after = arrives(destination, &before);
    assert!(destination.owns_a_running_guest());
    (after, in_flight_at_stop(source))
}

/// Runs `moves`, which says how many commands were in flight at each stop, until at least half of the stops of one run began with
/// some: a host that runs little but the disks at that moment may finish them all, again and again but not always.
pub fn were_busy<const N: usize>(mut moves: impl FnMut() -> [u32; N]) {
    const RUNS: usize = 3;
    let mut seen = Vec::new();
    for _ in 0..RUNS {
        let in_flight = moves();
        println!("measured: commands in flight at the stops: {in_flight:?}");
        if in_flight.iter().filter(|&&count| count > 0).count() * 2 >= N {
            return;
        }
        seen.push(in_flight);
    }
    panic!("commands in flight at the stops of {RUNS} runs: {seen:?}");
}
