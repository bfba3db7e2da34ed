//! Guests that go with their images, between machines that have none in common.

use std::path::Path;

use block::Qcow2Image;
use engine::lease::{Lease, Owner, Record, State};
use exerciser::report::Counters;
use ferry::control::{FerryOwnership, MigrationInfo, MigrationStatus};
use serde_json::{Value, json};
use support::{Machine, TestBed, Vm, WATCHDOG};

use crate::guest::{BUSY, EXERCISER, bed, begins};
use crate::load::{arrives, two_rounds_with, works};

const MIB: u64 = 1 << 20;

/// A machine whose images are in files of these names, and others in memory; identifiers have holes.
fn machine(bed: &TestBed, raw: &str, qcow2: &str) -> Machine {
    Machine::new("128M")
        .controller("serial=d0,queues=8")
        .image("d0", 1, &bed.path(raw))
        .namespace("controller=d0,nsid=4,backend=memory,size=16M,lba=4096")
        .namespace(&format!("controller=d0,nsid=10,backend=qcow2,path={}", bed.path(qcow2).display()))
}

/// A host whose guest runs on it.
fn here(bed: &TestBed) -> (Machine, Vm) {
    let raw = bed.image("here.img", 64 * MIB);
    assert!(raw.ends_with("here.img"));
    let path = bed.path("here.qcow2");
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path);
    Qcow2Image::create(file.expect("an image can be made"), &path, 32 * MIB).expect("an image can be made");
    let machine = machine(bed, "here.img", "here.qcow2");
    let vm = machine.boot(bed, "source", EXERCISER, BUSY);
    (machine, vm)
}

/// Another, that has nothing and waits.
fn there(bed: &TestBed, name: &str, more: &[&str]) -> (Machine, Vm) {
    let machine = machine(bed, "there.img", "there.qcow2");
    let waiting = more.iter().fold(machine.clone().switch("--with-storage"), |all, flag| all.switch(flag));
    let vm = waiting.expect(bed, name, &format!("unix:{}", bed.path(name).display()));
    (machine, vm)
}

fn target(vm: &Vm) -> Value {
    json!({ "uri": vm.uri(), "x-ferry-with-storage": true })
}

fn record(path: &Path) -> Record {
    let reader = Owner::this_process("test").expect("randomness");
    let lease = Lease::open_existing(path, reader).expect("there is a lease");
    lease.read().expect("it can be read").expect("it says something")
}

/// Tries to run `machine`, which must be refused; what is said.
fn refusal(bed: &TestBed, machine: &Machine) -> String {
    let flags = machine.clone().flag("--kernel", EXERCISER);
    let mut process = bed.ferry("refused", &[&["run".to_owned()], flags.flags()].concat());
    let exit = process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(exit.code(), Some(1), "{}", process.describe("status of"));
    let says = |line: &str| line.starts_with("ferry: ").then(|| line.to_owned());
    process.log.wait_for(0, WATCHDOG, says).expect("a sentence").0
}

/// Waits until some of the images has gone, with the guest running.
fn some_of_the_images_has_gone(vm: &mut Vm) -> MigrationInfo {
    let info = vm.wait_for_migration("images on their way", |info| {
        info.status.is_final() || info.disk.is_some_and(|disk| disk.transferred > MIB)
    });
    assert_eq!(info.status, MigrationStatus::Active, "{info:?}");
    info
}

#[test]
fn a_busy_guest_takes_its_images_to_a_host_that_has_none() {
    let bed = bed();
    let (stale, mut source) = here(&bed);
    let (fresh, mut destination) = there(&bed, "destination", &[]);
    let before = works(&mut source, &Counters::default());
    assert!(!bed.path("there.img").exists(), "nothing is made before a guest comes");
    two_rounds_with(&mut source, target(&destination), 48 << 20);
    let info = source.migrated();
    let disk = info.disk.expect("figures of the images");
    assert_eq!((disk.total, disk.remaining), (96 * MIB, 0));
    assert!(disk.transferred > 8 * MIB && disk.dirty_sync_count >= 3, "{disk:?}");
    arrives(&mut destination, &before);
    assert!(destination.owns_a_running_guest());

    let moved = record(&bed.path("here.img.ferry-lease"));
    assert!(matches!(moved.state, State::Moved { .. }), "{moved}");
    let taken = record(&bed.path("there.img.ferry-lease"));
    assert!(matches!(taken.state, State::Taken { .. }), "{taken}");
    source.execute("quit", json!({}));
    assert_eq!(source.exit().code(), Some(0));
    let refused = refusal(&bed, &stale);
    assert!(refused.contains("--force-stale") && refused.contains("moved to"), "{refused}");
    // It looks at all of its disks once more.
    destination.finish();
    assert_eq!(record(&bed.path("there.img.ferry-lease")).state, State::Released);
    let again = fresh.boot(&bed, "again", EXERCISER, BUSY);
    begins(&again, 1);
    again.kill();
    let forced = stale.switch("--force-stale").boot(&bed, "forced", EXERCISER, BUSY);
    begins(&forced, 1);
    forced.kill();
}

#[test]
fn images_that_did_not_come_are_gone_or_refused_and_come_again() {
    let bed = bed();
    let (_, mut source) = here(&bed);
    let before = works(&mut source, &Counters::default());
    let files = bed.files();
    source.execute("migrate-set-parameters", json!({ "max-bandwidth": 4 << 20 }));

    let (unfinished, mut destination) = there(&bed, "first", &[]);
    source.migrate_with(target(&destination));
    some_of_the_images_has_gone(&mut source);
    let incoming = record(&bed.path("there.img.ferry-lease"));
    assert!(matches!(incoming.state, State::Incoming { .. }), "{incoming}");
    source.execute("migrate_cancel", json!({}));
    assert_eq!(source.end_of_migration().status, MigrationStatus::Cancelled);
    assert!(source.owns_a_running_guest());
    destination.wait_for_migration("the end there", |info| info.status == MigrationStatus::Failed);
    let left: Vec<_> = bed.files().into_iter().filter(|name| name.starts_with("there")).collect();
    assert!(left.is_empty(), "{left:?}, before {files:?}");

    source.migrate_with(target(&destination));
    some_of_the_images_has_gone(&mut source);
    destination.kill();
    source.not_migrated();
    assert!(source.owns_a_running_guest());
    let refused = refusal(&bed, &unfinished);
    assert!(refused.contains("never came whole") && refused.contains("incoming"), "{refused}");

    let (_, mut destination) = there(&bed, "second", &[]);
    source.migrate_with(target(&destination));
    let refused = source.not_migrated();
    assert!(refused.contains("--overwrite"), "{refused}");
    destination.execute("quit", json!({}));
    destination.exit();
    let refused = refusal(&bed, &unfinished);
    assert!(refused.contains("never came whole") && refused.contains("incoming"), "{refused}");

    let (_, mut destination) = there(&bed, "third", &["--overwrite"]);
    two_rounds_with(&mut source, target(&destination), 48 << 20);
    source.migrated();
    assert_eq!(source.status().ownership, FerryOwnership::GivenAway);
    arrives(&mut destination, &before);
    destination.finish();
}

/// The lease beside the first image says nothing to who puts only the second into a machine: the mark beside that does.
#[test]
fn an_image_that_went_or_did_not_all_come_is_refused_alone_too() {
    let bed = bed();
    let (_, mut source) = here(&bed);
    let before = works(&mut source, &Counters::default());
    let alone = |name: &str| {
        let path = bed.path(name).display().to_string();
        let second = format!("controller=d0,nsid=10,backend=qcow2,path={path}");
        (Machine::new("128M").controller("serial=d0,queues=8").namespace(&second), path)
    };
    source.execute("migrate-set-parameters", json!({ "max-bandwidth": 4 << 20 }));
    let (_, destination) = there(&bed, "first", &[]);
    source.migrate_with(target(&destination));
    some_of_the_images_has_gone(&mut source);
    destination.kill();
    source.not_migrated();
    assert!(source.owns_a_running_guest());
    let (unfinished, path) = alone("there.qcow2");
    let refused = refusal(&bed, &unfinished);
    assert!(refused.contains("never came whole") && refused.contains("incoming in session"), "{refused}");
    assert!(refused.contains(&path), "{refused}");
    let refused = refusal(&bed, &unfinished.switch("--force-stale"));
    assert!(refused.contains("never came whole"), "whoever forces it has less than half of it: {refused}");
    let marks = || bed.files().into_iter().filter(|name| name.ends_with("-mark")).collect::<Vec<_>>();
    assert_eq!(marks(), ["there.img.ferry-mark", "there.qcow2.ferry-mark"], "here nothing has left");

    let (_, mut destination) = there(&bed, "second", &["--overwrite"]);
    two_rounds_with(&mut source, target(&destination), 48 << 20);
    source.migrated();
    arrives(&mut destination, &before);
    source.execute("quit", json!({}));
    source.exit();
    let (stale, path) = alone("here.qcow2");
    let refused = refusal(&bed, &stale);
    let words = [path.as_str(), "moved to unix:", "in session", "--force-stale"];
    assert!(words.iter().all(|word| refused.contains(word)), "{refused}");
    let other = json!({ "controller": "d0", "nsid": 2, "backend": "file", "path": bed.path("here.img") });
    let refused = destination.refused("x-ferry-namespace-add", other);
    assert!(refused.contains("moved to unix:"), "{refused}");
    destination.finish();
    assert_eq!(marks(), ["here.img.ferry-mark", "here.qcow2.ferry-mark"], "there all is here");
    let mut forced = stale.clone().switch("--force-stale").boot(&bed, "forced", EXERCISER, BUSY);
    begins(&forced, 1);
    assert_eq!(marks(), ["here.img.ferry-mark"], "what was forced is a guest's again");
    assert!(forced.owns_a_running_guest());
    forced.kill();
    let again = stale.boot(&bed, "again", EXERCISER, BUSY);
    begins(&again, 1);
    again.kill();
}

/// An operator's mistake costs nothing, though he has said that what is there may be given up.
#[test]
fn what_is_in_the_place_of_images_is_given_up_only_when_they_come() {
    let bed = bed();
    let (old, vm) = here(&bed);
    vm.finish();
    for (from, to) in [("here.img", "there.img"), ("here.qcow2", "there.qcow2")] {
        std::fs::rename(bed.path(from), bed.path(to)).expect("it is there");
    }
    let (from, to) = ("here.img.ferry-lease", "there.img.ferry-lease");
    std::fs::rename(bed.path(from), bed.path(to)).expect("it is there");
    drop(old);
    let names = ["there.img", "there.qcow2"];
    let before = names.map(|name| std::fs::read(bed.path(name)).expect("it is there"));
    let said = || std::fs::read(bed.path(to)).expect("there is a lease");
    let said_before = said();

    let (_, mut source) = here(&bed);
    let done = works(&mut source, &Counters::default());
    let waiting = machine(&bed, "there.img", "there.qcow2").switch("--with-storage").switch("--overwrite");
    let uri = |name: &str| format!("unix:{}", bed.path(name).display());
    let mut other = waiting.clone().flag("--cpus", "2").expect(&bed, "other", &uri("other"));
    for _ in 0..2 {
        source.migrate_with(target(&other));
        let reason = source.not_migrated();
        assert!(reason.contains("cpus: the source has 1, the destination 2"), "{reason}");
        assert!(source.owns_a_running_guest());
        other.wait_for_migration("the end there", |info| info.status == MigrationStatus::Failed);
        let after = names.map(|name| std::fs::read(bed.path(name)).expect("it is there"));
        assert!(after == before, "the images are as they were");
        assert!(said() == said_before, "not even the lease was written");
        assert!(!bed.files().iter().any(|name| name.contains("given-up")), "{:?}", bed.files());
    }
    other.execute("quit", json!({}));
    other.exit();
    let again = machine(&bed, "there.img", "there.qcow2").boot(&bed, "again", EXERCISER, BUSY);
    again.finish();

    let mut destination = waiting.expect(&bed, "destination", &uri("destination"));
    source.migrate_with(target(&destination));
    source.migrated();
    arrives(&mut destination, &done);
    assert!(!bed.files().iter().any(|name| name.contains("given-up")), "{:?}", bed.files());
    destination.finish();
}
