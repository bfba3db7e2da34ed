//! Live migration of a busy exerciser.

use ferry::control::{FerryOwnership, MigrationStatus, RunState};
use serde_json::json;
use support::{TestBed, Vm, WATCHDOG};

use crate::guest::{BUSY, EXERCISER, bed, lease, many_disks};

/// Verified reads that a migration test needs on either side.
const ENOUGH: u64 = 1000;

/// Moves a guest that has verified [`ENOUGH`] reads from `source` to `destination`, which verifies as many again. Returns how many
/// commands were in flight when the stop began.
fn migrate_under_load(source: &mut Vm, destination: &mut Vm) -> u32 {
    let before = source
        .progress("I/O and memory checks at the source", |now| now.verified >= ENOUGH && now.ram_checked > 0);
    // No downtime is short enough until two rounds have had pages to send that the guest dirtied during the round before; the
    // limit gives it time to. A third round begins only if the second left it something.
    source.execute("migrate-set-parameters", json!({ "downtime-limit": 0, "max-bandwidth": 48 << 20 }));
    source.migrate(destination.uri());
    source.wait_for_migration("two rounds of dirty pages", |info| {
        info.status.is_final() || info.ram.as_ref().is_some_and(|ram| ram.dirty_sync_count >= 3)
    });
    source.execute("migrate-set-parameters", json!({ "downtime-limit": 60_000, "max-bandwidth": 0 }));
    let info = source.migrated();
    let ram = info.ram.expect("figures");
    assert!(ram.dirty_sync_count >= 3, "two rounds of dirty pages: {ram:?}");
    let status = source.status();
    assert_eq!(status.ownership, FerryOwnership::GivenAway);
    assert!(destination.owns_a_running_guest());

    // The first whole line that the destination prints belongs to it or was begun by the source.
    let arrived = destination.progress("the guest at the destination", |_| true);
    let after = destination.progress("I/O and memory checks at the destination", |now| {
        now.verified >= arrived.verified + ENOUGH && now.ram_checked > arrived.ram_checked
    });
    assert!(arrived.verified >= before.verified && arrived.ram_checked >= before.ram_checked);
    assert_eq!(after.errors, 0);
    status.migration.expect("figures").in_flight_at_stop
}

/// Boots an exerciser with `options`, moves it to a destination at `uri`, and lets it look at everything once more there.
fn one_migration(bed: &TestBed, options: &str, uri: &str) -> u32 {
    let machine = many_disks(bed);
    let mut source = machine.boot(bed, "source", EXERCISER, &format!("{BUSY} {options}"));
    let mut destination = machine.expect(bed, "destination", uri);
    let in_flight = migrate_under_load(&mut source, &mut destination);
    source.execute("quit", json!({}));
    assert_eq!(source.exit().code(), Some(0));
    destination.finish();
    in_flight
}

#[test]
fn over_a_unix_socket_and_over_tcp_with_commands_in_flight() {
    let cases = [
        ("unix", "doorbells=mmio completion=poll"),
        ("tcp", "doorbells=mmio completion=msix events=1"),
        ("unix", "doorbells=shadow completion=msix events=2"),
        ("tcp", "doorbells=shadow completion=poll"),
    ];
    let in_flight = cases.map(|(transport, options)| {
        let bed = bed();
        let uri = match transport {
            "unix" => format!("unix:{}", bed.path("move.sock").display()),
            _ => "tcp:127.0.0.1:0".to_owned(),
        };
        one_migration(&bed, options, &uri)
    });
    let busy = in_flight.iter().filter(|&&count| count > 0).count();
    assert!(busy * 2 >= cases.len(), "commands in flight at the stops: {in_flight:?}");
}

#[test]
fn a_migration_that_was_cancelled_can_be_made_again() {
    let bed = bed();
    let machine = many_disks(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let before = source.verifies(0, ENOUGH);
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", bed.path("m").display()));
    source.execute("migrate-set-parameters", json!({ "downtime-limit": 0 }));
    for _ in 0..2 {
        source.migrate(destination.uri());
        source.execute("migrate_cancel", json!({}));
        assert_eq!(source.end_of_migration().status, MigrationStatus::Cancelled);
        assert!(source.owns_a_running_guest());
    }
    source.verifies(before.verified, ENOUGH);
    source.execute("migrate-set-parameters", json!({ "downtime-limit": 300 }));
    source.migrate(destination.uri());
    source.migrated();
    let arrived = destination.progress("the guest at the destination", |_| true);
    destination.verifies(arrived.verified, ENOUGH);
    destination.finish();
}

#[test]
fn a_paused_guest_arrives_paused() {
    let bed = bed();
    let machine = many_disks(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    source.verifies(0, ENOUGH);
    source.execute("stop", json!({}));
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", bed.path("m").display()));
    source.migrate(destination.uri());
    source.migrated();
    let status = destination.status();
    assert_eq!((status.ownership, status.status), (FerryOwnership::Owned, RunState::Paused));
    assert!(destination.process.console.all().is_empty(), "a paused guest says nothing");
    destination.execute("cont", json!({}));
    let arrived = destination.progress("the guest at the destination", |_| true);
    destination.verifies(arrived.verified, ENOUGH);
    destination.finish();
}

#[test]
fn twenty_times_from_process_to_process() {
    let bed = bed();
    let machine = many_disks(&bed).flag("--io-threads", "2");
    let options = format!("{BUSY} doorbells=shadow completion=msix events=2");
    let leaving = |mut vm: Vm| {
        assert_eq!(vm.process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}")).code(), Some(0));
    };
    let mut here =
        machine.clone().switch("--exit-when-migrated").boot(&bed, "process-0", EXERCISER, &options);
    let mut verified = here.verifies(0, 200).verified;
    for hop in 1..=20 {
        let uri = format!("unix:{}", bed.path(&format!("move-{hop}")).display());
        let name = format!("process-{hop}");
        let mut there = machine.clone().switch("--exit-when-migrated").expect(&bed, &name, &uri);
        here.migrate(there.uri());
        leaving(here);
        let now = there.verifies(verified, 200);
        let record = lease(&bed);
        assert_eq!(record.generation, 1 + hop, "{record}");
        verified = now.verified;
        here = there;
    }
    here.finish();
}
