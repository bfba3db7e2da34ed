//! Live migration of a busy exerciser.

use std::path::Path;

use exerciser::report::Counters;
use ferry::control::{FerryOwnership, MigrationStatus, RunState};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::json;
use support::{TestBed, WATCHDOG};

use crate::guest::{BUSY, EXERCISER, bed, lease, many_disks, one_disk};
use crate::load::{arrives, in_flight_at_stop, moves, sends, were_busy, works};

/// The guest of `source` moves there, back and there again, and looks at everything once more in the end. Returns how many commands
/// were in flight at each stop.
fn three_moves(bed: &TestBed, options: &str, transport: &str) -> [u32; 3] {
    let machine = many_disks(bed);
    let mut here = machine.boot(bed, "process-0", EXERCISER, &format!("{BUSY} {options}"));
    let mut done = Counters::default();
    let in_flight = [1, 2, 3].map(|hop| {
        let uri = match transport {
            "unix" => format!("unix:{}", bed.path(&format!("move-{hop}")).display()),
            _ => "tcp:127.0.0.1:0".to_owned(),
        };
        let mut there = machine.expect(bed, &format!("process-{hop}"), &uri);
        let (after, in_flight) = moves(&mut here, &mut there, &done);
        done = after;
        here.execute("quit", json!({}));
        assert_eq!(here.exit().code(), Some(0));
        here = there;
        in_flight
    });
    here.finish();
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
    were_busy(|| {
        let in_flight = cases.map(|(transport, options)| three_moves(&bed(), options, transport));
        let mut flat = [0; 12];
        flat.copy_from_slice(in_flight.as_flattened());
        flat
    });
}

#[test]
fn a_migration_that_was_cancelled_can_be_made_again() {
    let bed = bed();
    let machine = many_disks(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let done = works(&mut source, &Counters::default());
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", bed.path("m").display()));
    source.execute("migrate-set-parameters", json!({ "downtime-limit": 0 }));
    for _ in 0..2 {
        source.migrate(destination.uri());
        source.execute("migrate_cancel", json!({}));
        assert_eq!(source.end_of_migration().status, MigrationStatus::Cancelled);
        assert!(source.owns_a_running_guest());
    }
    moves(&mut source, &mut destination, &done);
    destination.finish();
}

/// It dirties nothing while it moves, and its controllers have finished what they had: no rounds, nothing in flight.
#[test]
fn a_paused_guest_arrives_paused() {
    let bed = bed();
    let machine = many_disks(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let before = works(&mut source, &Counters::default());
    source.execute("stop", json!({}));
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", bed.path("m").display()));
    source.migrate(destination.uri());
    source.migrated();
    assert_eq!(in_flight_at_stop(&mut source), 0);
    let status = destination.status();
    assert_eq!((status.ownership, status.status), (FerryOwnership::Owned, RunState::Paused));
    assert!(destination.process.console.all().is_empty(), "a paused guest says nothing");
    destination.execute("cont", json!({}));
    arrives(&mut destination, &before);
    destination.finish();
}

#[test]
fn twenty_times_from_process_to_process() {
    were_busy(twenty_moves);
}

/// How many commands were in flight at each of twenty stops.
fn twenty_moves() -> [u32; 20] {
    let bed = bed();
    let machine = many_disks(&bed).flag("--io-threads", "2");
    let small = machine.clone().switch("--hugepages=off");
    let options = format!("{BUSY} doorbells=shadow completion=msix events=2");
    let mut here = machine.boot(&bed, "process-0", EXERCISER, &options);
    let mut done = Counters::default();
    let mut in_flight = [0; 20];
    for (hop, in_flight) in (1..).zip(&mut in_flight) {
        let uri = format!("unix:{}", bed.path(&format!("move-{hop}")).display());
        // From small pages into huge ones, if the host gives some, and back.
        let next = if hop % 2 == 0 { &machine } else { &small };
        let mut there = next.expect(&bed, &format!("process-{hop}"), &uri);
        let (after, count) = moves(&mut here, &mut there, &done);
        done = after;
        *in_flight = count;
        let record = lease(&bed);
        assert_eq!(record.generation, 1 + hop, "{record}");
        here.execute("quit", json!({}));
        assert_eq!(here.exit().code(), Some(0));
        here = there;
    }
    here.finish();
    in_flight
}

#[test]
fn a_process_that_is_to_end_with_its_guest_does() {
    let bed = bed();
    let machine = many_disks(&bed);
    let ending = machine.clone().switch("--exit-when-migrated");
    let mut source = ending.boot(&bed, "source", EXERCISER, BUSY);
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", bed.path("m").display()));
    let before = sends(&mut source, destination.uri(), &Counters::default());
    assert_eq!(source.exit().code(), Some(0));
    arrives(&mut destination, &before);
    destination.finish();
}

/// A destination that was given the kernel too can start the guest anew, and the guest that it started moves on.
#[test]
fn a_guest_that_moved_is_reset_where_it_is() {
    let bed = bed();
    let machine = one_disk(&bed);
    let options = format!("{BUSY} exit=reset");
    let mut source = machine.boot(&bed, "source", EXERCISER, &options);
    let able_to_reset = machine.clone().flag("--kernel", EXERCISER).flag("--cmdline", &options);
    let uri = |name: &str| format!("unix:{}", bed.path(name).display());
    let mut destination = able_to_reset.expect(&bed, "destination", &uri("first"));
    let mut done = moves(&mut source, &mut destination, &Counters::default()).0;
    for boots in 1..=2 {
        destination.process.type_in("q").expect("the console takes input");
        assert_eq!(destination.done().errors, 0);
        done = works(&mut destination, &Counters::default());
        let lines = destination.process.console.all();
        assert_eq!(lines.iter().filter(|line| line.starts_with("boot ")).count(), boots);
    }
    let record = lease(&bed);
    assert!(record.generation == 2 && destination.owns_a_running_guest(), "{record}");
    let mut third = machine.expect(&bed, "third", &uri("second"));
    moves(&mut destination, &mut third, &done);
    third.execute("quit", json!({}));
    assert_eq!(third.exit().code(), Some(0));
}

/// It cannot let anybody in at first, and neither ends nor sends anybody away: not even if there is one for the connection itself.
#[test]
fn a_destination_that_lacks_descriptors_lets_its_source_in_once_it_has_some() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, "queues=1");
    for free in [0, 1] {
        let name = format!("destination-{free}");
        let uri = format!("unix:{}", bed.path(&format!("move-{free}")).display());
        let mut destination = machine.expect(&bed, &name, &uri);
        let id = destination.process.id();
        let process = Pid::from_raw(id.cast_signed());
        let maximum = getrlimit(Resource::Nofile).maximum;
        let is_free = |number: &u64| !Path::new(&format!("/proc/{id}/fd/{number}")).exists();
        // Descriptors are the lowest numbers that are free, below the limit.
        let current = (0..).filter(is_free).nth(free);
        let before = prlimit(process, Resource::Nofile, Rlimit { current, maximum }).expect("it is ours");
        source.migrate(destination.uri());
        let told = |line: &str| line.contains("cannot let in who comes").then_some(());
        assert!(destination.process.log.wait_for(0, WATCHDOG, told).is_some(), "it says what it lacks");
        prlimit(process, Resource::Nofile, before).expect("it is ours");
        source.migrated();
        destination.verifies(0, 100);
        source.execute("quit", json!({}));
        source = destination;
    }
    source.finish();
}
