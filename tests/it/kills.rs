//! Processes that die before the hand-over: the guest stays where it was, or can be started again, and moves another time.

use block::{Backend, FileImage, FileOptions};
use engine::lease::State;
use exerciser::report::Counters;
use ferry::control::{FerryOwnership, MigrationStatus, RunState};
use stream::frame::Kind;
use support::{Proxy, Vm, WATCHDOG};

use crate::guest::{BUSY, EXERCISER, bed, lease, one_disk};
use crate::load::{moves, works};

#[test]
fn a_destination_killed_before_commit_leaves_the_guest_at_the_source() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let mut done = works(&mut source, &Counters::default());
    for kind in [Kind::Hello, Kind::Agree, Kind::Stream, Kind::Prepare, Kind::Prepared] {
        let path = bed.path(&format!("to-{kind:?}"));
        let name = format!("killed-at-{kind:?}");
        let destination = machine.expect(&bed, &name, &format!("unix:{}", path.display()));
        let proxy = Proxy::new(&bed, &format!("by-{kind:?}"), &path, kind);
        source.migrate(proxy.uri());
        let held = proxy.held();
        destination.kill();
        held.cut();
        let reason = source.not_migrated();
        assert!(source.owns_a_running_guest(), "{kind:?}: {reason}");
        let record = lease(&bed);
        assert_eq!((record.generation, &record.state), (1, &State::Owned), "{kind:?}: {record}");
        done = source.verifies(done.verified, 200);
    }
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", bed.path("to").display()));
    moves(&mut source, &mut destination, &done);
    destination.finish();
}

#[test]
fn a_source_killed_while_memory_moves_leaves_nothing_at_the_destination() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    works(&mut source, &Counters::default());
    let path = bed.path("to");
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", path.display()));
    let proxy = Proxy::new(&bed, "by", &path, Kind::Stream);
    source.migrate(proxy.uri());
    let held = proxy.held();
    source.kill();
    held.cut();
    destination.wait_for_migration("the failure", |info| info.status == MigrationStatus::Failed);
    let status = destination.status();
    assert_eq!((status.ownership, status.status), (FerryOwnership::Incoming, RunState::Inmigrate));

    // Whoever starts the machine again finds that its owner is gone, and the destination still listens.
    let mut again = machine.boot(&bed, "again", EXERCISER, BUSY);
    assert_eq!(lease(&bed).generation, 2);
    moves(&mut again, &mut destination, &Counters::default());
    destination.finish();
}

#[test]
fn the_last_requests_of_an_owner_that_is_gone_are_waited_for() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut first = machine.boot(&bed, "first", EXERCISER, BUSY);
    first.verifies(0, 100);
    first.kill();
    // As the kernel holds the image of a process that was killed, until the process's requests have ended.
    let requests = loop {
        match FileImage::open(bed.path("a.img"), FileOptions::default()) {
            Err(block::Error::Locked { .. }) => std::thread::yield_now(),
            image => break image.expect("nobody has the image"),
        }
    };
    let kernel = machine.flag("--kernel", EXERCISER).flag("--cmdline", BUSY);
    let mut again = Vm::start(&bed, "again", kernel.flags().to_vec());
    let waits = |line: &str| line.contains("its last requests is waited for").then_some(());
    again.process.log.wait_for(0, WATCHDOG, waits).expect("it says that it waits");
    assert_eq!(again.status().status, RunState::Prelaunch);
    requests.release().expect("it can be released");
    again.verifies(0, 100);
    assert_eq!(lease(&bed).generation, 2);
    again.finish();
}
