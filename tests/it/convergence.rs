//! Guests that dirty their memory faster than it goes, by either way of finding what they dirty, in memory of either kind.

use ferry::control::{Limits, MigrationStatus, OnTimeout};
use serde_json::json;
use support::{Machine, TestBed, Vm, WATCHDOG, has_huge_pages};

use crate::guest::{BUSY, EXERCISER, bed, many_disks, one_disk};
use crate::load::{arrives, moves, works};
use exerciser::report::Counters;

/// Less than the guest dirties.
const SLOW: u64 = 8 << 20;

fn uri(bed: &TestBed, name: &str) -> String {
    format!("unix:{}", bed.path(name).display())
}

/// Allows no downtime, so that no guest that runs converges.
fn allow_nothing(source: &mut Vm, limits: &Limits) {
    let limits = Limits { downtime_limit: Some(0), max_bandwidth: Some(SLOW), ..*limits };
    source.client().set_limits(&limits).expect("limits that make sense");
}

#[test]
fn a_guest_moves_whose_dirty_pages_are_told_by_rings() {
    let bed = bed();
    let machine = many_disks(&bed);
    let rings = machine.clone().flag("--dirty-tracking", "ring");
    let mut here = rings.boot(&bed, "process-0", EXERCISER, BUSY);
    let mut done = Counters::default();
    for (hop, machine) in [&rings, &machine, &rings].into_iter().enumerate() {
        let mut there = machine.expect(&bed, &format!("process-{}", hop + 1), &uri(&bed, &format!("m{hop}")));
        done = moves(&mut here, &mut there, &done).0;
        here.execute("quit", json!({}));
        assert_eq!(here.exit().code(), Some(0));
        here = there;
    }
    here.finish();
}

#[test]
fn a_guest_that_is_faster_than_the_link_is_slowed_down_until_it_is_stopped_or_stays() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let mut done = works(&mut source, &Counters::default());
    let mut destination = machine.expect(&bed, "destination", &uri(&bed, "m"));
    allow_nothing(&mut source, &Limits { auto_converge: Some(true), ..Limits::default() });
    let slowed = |vm: &mut Vm| {
        let uri = destination.uri().to_owned();
        vm.migrate(&uri);
        let info = vm.wait_for_migration("slower vCPUs", |info| {
            info.status.is_final() || info.cpu_throttle_percentage >= Some(30)
        });
        assert_eq!(info.status, MigrationStatus::Active, "{info:?}");
    };

    slowed(&mut source);
    // Source and destination have agreed on a guest that brings its memory.
    let reason = source
        .refused("migrate-set-parameters", json!({ "x-ferry-on-timeout": "postcopy", "max-bandwidth": 0 }));
    assert!(reason.contains("cannot become postcopy for the migration that runs"), "{reason}");
    source.execute("migrate_cancel", json!({}));
    assert_eq!(source.end_of_migration().status, MigrationStatus::Cancelled);
    assert!(source.owns_a_running_guest());
    done = works(&mut source, &done);

    slowed(&mut source);
    let enough = Limits { downtime_limit: Some(60_000), max_bandwidth: Some(0), ..Limits::default() };
    source.client().set_limits(&enough).expect("limits that make sense");
    source.migrated();
    assert!(source.status().migration.expect("a migration").throttle_percentage >= 30);
    arrives(&mut destination, &done);
    destination.finish();
}

#[test]
fn a_guest_whose_time_is_over_stays_or_is_stopped_as_the_user_wants() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let mut done = works(&mut source, &Counters::default());
    let mut destination = machine.expect(&bed, "destination", &uri(&bed, "m"));
    allow_nothing(&mut source, &Limits { timeout: Some(1), ..Limits::default() });
    source.migrate(destination.uri());
    let reason = source.not_migrated();
    assert!(reason.starts_with("not moved within 1s: "), "{reason}");
    assert!(source.owns_a_running_guest());
    done = works(&mut source, &done);

    let force = Limits { on_timeout: Some(OnTimeout::Force), ..Limits::default() };
    source.client().set_limits(&force).expect("limits that make sense");
    source.migrate(destination.uri());
    source.migrated();
    arrives(&mut destination, &done);
    destination.finish();
}

/// On a host that has reserved huge pages for two machines; elsewhere it is told, and that the reason is given. The guest goes whole, ahead
/// of all its memory and ahead of what it has dirtied, and out of a file.
#[test]
fn a_guest_moves_between_huge_pages_and_others() {
    let bed = bed();
    let machine = one_disk(&bed);
    let huge = machine.clone().switch("--hugepages");
    if !has_huge_pages(2 * 64) {
        println!("only a refusal is tested");
        let huge = Machine::new("1T").switch("--hugepages");
        let flags = [&["run".to_owned()], huge.clone().flag("--kernel", EXERCISER).flags()].concat();
        let mut process = bed.ferry("refused", &flags);
        let exit = process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(exit.code(), Some(1), "{}", process.describe("status of"));
        let says = |line: &str| line.contains("huge pages of 2 MiB for memory block").then_some(());
        process.log.wait_for(0, WATCHDOG, says).expect("a sentence");
        return;
    }
    let mut here = huge.boot(&bed, "process-0", EXERCISER, BUSY);
    let mut done = Counters::default();
    let hops = [(&huge, None), (&machine, None), (&huge, Some("now")), (&huge, Some("after-first-round"))];
    for (hop, (machine, postcopy)) in hops.into_iter().enumerate() {
        let mut there = machine.expect(&bed, &format!("process-{}", hop + 1), &uri(&bed, &format!("m{hop}")));
        match postcopy {
            None => done = moves(&mut here, &mut there, &done).0,
            Some(start) => {
                done = works(&mut here, &done);
                here.execute("migrate-set-parameters", json!({ "downtime-limit": 0 }));
                here.migrate_with(json!({ "uri": there.uri(), "x-ferry-postcopy": start }));
                here.migrated();
                there.wait_for_migration("all memory", |info| info.status == MigrationStatus::Completed);
                done = arrives(&mut there, &done);
                let figures =
                    there.status().migration.and_then(|info| info.postcopy).expect("memory followed");
                // A huge page of 512 pages is asked for at once.
                assert!(figures.requests > 0 && figures.missing_bytes == 0, "{figures:?}");
                println!("measured: into huge pages, {start}: {figures:?}");
            }
        }
        here.execute("quit", json!({}));
        assert_eq!(here.exit().code(), Some(0));
        here = there;
    }
    let file = format!("file:{}", bed.path("suspended").display());
    let before = works(&mut here, &done);
    here.migrate(&file);
    here.migrated();
    here.execute("quit", json!({}));
    assert_eq!(here.exit().code(), Some(0));
    let restored = huge.clone().flag("--incoming", &file);
    let mut here = Vm::start(&bed, "restored", restored.flags().to_vec());
    arrives(&mut here, &before);
    here.finish();
}
