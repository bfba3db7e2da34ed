//! Guests whose memory follows them, between two real processes.

use exerciser::report::Counters;
use ferry::control::{FerryOwnership, FerryPostcopy, MigrationStatus, RunState};
use serde_json::json;
use stream::frame::Kind;
use support::{Proxy, TestBed, Vm};

use crate::guest::{BUSY, EXERCISER, bed, many_disks};
use crate::load::{arrives, works};

/// So slow that the guest has touched what it works on long before all of its memory has come.
const SLOW: u64 = 2 << 20;

struct Pair {
    source: Vm,
    destination: Vm,
    before: Counters,
}

/// A busy guest and where it will go.
fn pair(bed: &TestBed) -> Pair {
    let machine = many_disks(bed).flag("--io-threads", "2");
    let options = format!("{BUSY} doorbells=shadow completion=msix events=2");
    let mut source = machine.boot(bed, "source", EXERCISER, &options);
    let destination = machine.expect(bed, "destination", &format!("unix:{}", bed.path("to").display()));
    let before = works(&mut source, &Counters::default());
    // No downtime is short enough for the rest of it.
    source.execute("migrate-set-parameters", json!({ "downtime-limit": 0 }));
    Pair { source, destination, before }
}

fn is(status: MigrationStatus, vm: &mut Vm) {
    vm.wait_for_migration(&format!("{status:?}"), |info| info.status == status);
}

fn figures(vm: &mut Vm) -> FerryPostcopy {
    let migration = vm.status().migration.expect("a migration");
    migration.postcopy.expect("memory followed the guest")
}

/// All memory has come, the guest has worked meanwhile and works on, and everything is as it was.
fn ends_well(Pair { mut source, mut destination, before }: Pair) {
    arrives(&mut destination, &before);
    source.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 }));
    source.migrated();
    is(MigrationStatus::Completed, &mut destination);
    let figures = figures(&mut destination);
    assert!(figures.requests > 0 && figures.blocktime > 0 && figures.bytes > 0, "{figures:?}");
    assert_eq!((figures.missing_bytes, &figures.paused), (0, &None), "{figures:?}");
    assert!(figures.latency_max >= figures.latency_median, "{figures:?}");
    println!("measured: {figures:?}");
    source.execute("quit", json!({}));
    assert_eq!(source.exit().code(), Some(0));
    destination.finish();
}

#[test]
fn a_busy_guest_runs_ahead_of_all_its_memory() {
    let bed = bed();
    let mut pair = pair(&bed);
    pair.source.execute("migrate-set-parameters", json!({ "max-bandwidth": SLOW }));
    pair.source.migrate_with(json!({ "uri": pair.destination.uri(), "x-ferry-postcopy": "now" }));
    is(MigrationStatus::PostcopyActive, &mut pair.source);
    is(MigrationStatus::PostcopyActive, &mut pair.destination);
    // It dies with either, so neither lets go of it unasked.
    let reason = pair.source.refused("quit", json!({}));
    assert!(reason.contains("still needs memory"), "{reason}");
    let reason = pair.destination.refused("migrate", json!({ "uri": "unix:/nowhere" }));
    assert!(reason.contains("some memory of the guest is still at"), "{reason}");
    let reason = pair.source.refused("migrate-recover", json!({}));
    assert!(reason.contains("no postcopy migration that has lost its link"), "{reason}");
    assert!(pair.destination.owns_a_running_guest());
    ends_well(pair);
}

#[test]
fn what_a_busy_guest_dirties_follows_it() {
    let bed = bed();
    let mut pair = pair(&bed);
    let capability = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
    pair.source.execute("migrate-set-capabilities", capability);
    pair.source.execute("migrate-set-parameters", json!({ "max-bandwidth": 32 << 20 }));
    let uri = pair.destination.uri().to_owned();
    pair.source.migrate(&uri);
    pair.source
        .wait_for_migration("a round", |info| info.ram.as_ref().is_some_and(|ram| ram.dirty_sync_count >= 2));
    pair.source.execute("migrate-set-parameters", json!({ "max-bandwidth": SLOW }));
    pair.source.execute("migrate-start-postcopy", json!({}));
    is(MigrationStatus::PostcopyActive, &mut pair.destination);
    let channels = pair.source.status().migration.expect("a migration").channel_bytes;
    assert!(channels.len() == 2 && channels.iter().all(|bytes| *bytes > 0), "{channels:?}");
    ends_well(pair);
}

/// The main link is cut while memory follows, and with it the channel for pages.
#[test]
fn a_guest_goes_on_when_its_lost_links_are_replaced() {
    let bed = bed();
    let mut pair = pair(&bed);
    let proxy = Proxy::new(&bed, "by", &bed.path("to"), Kind::Running);
    pair.source.execute("migrate-set-parameters", json!({ "max-bandwidth": SLOW }));
    pair.source.migrate_with(json!({ "uri": proxy.uri(), "x-ferry-postcopy": "now" }));
    let held = proxy.held();
    held.deliver();
    is(MigrationStatus::PostcopyActive, &mut pair.source);
    is(MigrationStatus::PostcopyActive, &mut pair.destination);
    held.cut();
    is(MigrationStatus::PostcopyPaused, &mut pair.source);
    is(MigrationStatus::PostcopyPaused, &mut pair.destination);
    // Whatever waits for memory, those who ask how it goes do not.
    let paused = figures(&mut pair.destination);
    assert!(paused.missing_bytes > 0 && paused.paused.is_some(), "{paused:?}");
    let status = pair.destination.status();
    assert_eq!((status.status, status.ownership), (RunState::Paused, FerryOwnership::Owned));
    // What it is told meanwhile it does when it has its memory.
    for command in ["stop", "cont", "stop"] {
        pair.destination.execute(command, json!({}));
        assert_eq!(pair.destination.status().status, RunState::Paused, "{command}");
    }
    let reason = pair
        .destination
        .refused("x-ferry-ana-set", json!({ "controller": "d0", "group": 1, "state": "optimized" }));
    assert!(reason.contains("memory"), "{reason}");
    // Who cancels hears that it is too late, and who recovers that nobody is there, and neither waits for what does not come.
    let seen = pair.source.client().decide("migrate_cancel").unwrap();
    assert_eq!(seen.info.status, MigrationStatus::PostcopyPaused);
    let nowhere = format!("unix:{}", bed.path("nowhere").display());
    let seen = pair.source.client().recover(Some(&nowhere), |_| {}).unwrap().expect("a source follows");
    assert_eq!(seen.info.status, MigrationStatus::PostcopyPaused);
    let why = seen.details.and_then(|details| details.postcopy?.paused).expect("a reason");
    assert!(why.contains("cannot connect") && why.contains(&nowhere), "{why}");
    let elsewhere = format!("unix:{}", bed.path("elsewhere").display());
    pair.destination.execute("migrate-recover", json!({ "uri": elsewhere }));
    pair.source.execute("migrate", json!({ "uri": elsewhere, "resume": true }));
    is(MigrationStatus::PostcopyActive, &mut pair.destination);
    assert_eq!(figures(&mut pair.destination).recoveries, 1);
    // It was stopped meanwhile, and is a guest that was stopped: memory comes, and it does not go on.
    assert_eq!(pair.destination.status().status, RunState::Paused);
    pair.destination.execute("cont", json!({}));
    assert!(pair.destination.owns_a_running_guest());
    ends_well(pair);
}

/// Nobody who stops a guest, or ends its process, waits for memory that does not come.
#[test]
fn a_guest_that_lacks_memory_is_stopped_and_ended_at_once() {
    let bed = bed();
    let mut pair = pair(&bed);
    let proxy = Proxy::new(&bed, "by", &bed.path("to"), Kind::Running);
    pair.source.execute("migrate-set-parameters", json!({ "max-bandwidth": SLOW }));
    pair.source.migrate_with(json!({ "uri": proxy.uri(), "x-ferry-postcopy": "now" }));
    let held = proxy.held();
    held.deliver();
    is(MigrationStatus::PostcopyActive, &mut pair.destination);
    // A stop while its threads wait for pages, and one of a guest that does.
    for command in ["stop", "cont", "stop", "cont"] {
        pair.destination.execute(command, json!({}));
    }
    held.cut();
    is(MigrationStatus::PostcopyPaused, &mut pair.destination);
    is(MigrationStatus::PostcopyPaused, &mut pair.source);
    pair.destination.execute("quit", json!({}));
    assert_eq!(pair.destination.exit().code(), Some(1));
    pair.source.execute("quit", json!({ "x-ferry-force": true }));
    assert_eq!(pair.source.exit().code(), Some(0));
}
