//! Signals end a process as a command does: the guest's disks are stable and free, and nothing is left behind.

use engine::lease::State;
use ferry::control::MigrationStatus;
use rustix::process::Signal;
use serde_json::json;
use support::WATCHDOG;

use crate::guest::{EXERCISER, bed, lease, one_disk};

#[test]
fn a_machine_that_runs_ends_in_order_and_can_be_started_again() {
    let bed = bed();
    let machine = one_disk(&bed);
    for (generation, signal) in (1..).zip([Signal::INT, Signal::TERM, Signal::HUP]) {
        let mut vm = machine.boot(&bed, "vm", EXERCISER, "queues=1");
        vm.verifies(0, 100);
        let record = lease(&bed);
        assert_eq!((record.generation, &record.state), (generation, &State::Owned), "{record}");
        vm.process.signal(signal).expect("it runs");
        assert_eq!(vm.event("SHUTDOWN")["data"], json!({ "guest": false, "reason": "host-signal" }));
        assert_eq!(vm.exit().code(), Some(0), "{signal:?}");
        assert_eq!(bed.files(), ["a.img", "a.img.ferry-lease"], "the control socket is gone");
    }
    machine.boot(&bed, "again", EXERCISER, "queues=1").finish();
}

#[test]
fn a_process_that_waits_for_a_guest_ends_in_order() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, "queues=1");
    for signal in [Signal::INT, Signal::TERM] {
        let uri = format!("unix:{}", bed.path("move").display());
        let mut waiting = machine.expect(&bed, "waiting", &uri);
        waiting.process.signal(signal).expect("it runs");
        assert_eq!(waiting.exit().code(), Some(0), "{signal:?}");
        assert_eq!(bed.files(), ["a.img", "a.img.ferry-lease", "source.api"], "both sockets are gone");
    }
    source.verifies(0, 100);
    source.finish();
}

#[test]
fn a_migration_goes_on_without_its_client_and_is_called_off_by_another() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, "queues=1 ram=64M");
    source.verifies(0, 100);
    let uri = format!("unix:{}", bed.path("move").display());
    let destination = machine.expect(&bed, "destination", &uri);
    let api = bed.path("source.api").display().to_string();
    let client = |words: &[&str]| {
        let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
        let mut process = bed.ferry("client", &words);
        process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}")).code()
    };
    let begun = client(&["migrate", "--api", &api, "--detach", "--max-bandwidth", "64K", &uri]);
    assert_eq!(begun, Some(0));
    source.wait_for_migration("the first pass", |info| info.status == MigrationStatus::Active);
    assert_eq!(client(&["cancel", "--api", &api]), Some(0));
    let info = source.end_of_migration();
    assert_eq!(info.status, MigrationStatus::Cancelled);
    assert!(source.owns_a_running_guest());
    assert_eq!(client(&["cancel", "--api", &api]), Some(1), "there is none any more");
    drop(destination);
    source.finish();
}
