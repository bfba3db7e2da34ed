//! Guests whose memory itself goes to another process, with the files of their images: nothing is copied, and what one process writes
//! the other never sees too early.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Instant;

use exerciser::report::Counters;
use ferry::control::{FerryOwnership, MigrationStatus, RunState};
use serde_json::json;
use stream::frame::Kind;
use support::{Proxy, TestBed, Verdict, Vm, WATCHDOG};

use crate::guest::{BUSY, EXERCISER, MEMORY, bed, guest_memory, lease, many_disks, one_disk};
use crate::handover::{undecided, without_lease};
use crate::load::{arrives, works};

fn maps_memory(vm: &Vm) -> bool {
    let maps = fs::read_to_string(format!("/proc/{}/maps", vm.process.id())).expect("the process is there");
    maps.contains(MEMORY)
}

/// A digest of guest RAM.
fn digest(vm: &Vm) -> u64 {
    let mut memory = guest_memory(vm);
    let (mut hasher, mut piece) = (DefaultHasher::new(), vec![0; 1 << 20]);
    loop {
        match memory.read(&mut piece).expect("it can be read") {
            0 => return hasher.finish(),
            count => hasher.write(&piece[..count]),
        }
    }
}

/// Hands the guest of `source`, which has worked since `since`, over to `destination`.
fn hands_over(source: &mut Vm, destination: &mut Vm, since: &Counters) -> Counters {
    let before = works(source, since);
    source.hand_over(destination.uri());
    let info = source.migrated();
    let ram = info.ram.expect("figures");
    let report = source.status().migration.expect("a migration");
    assert_eq!((report.handed_over_bytes, report.rounds, ram.normal), (ram.total, 0, 0));
    assert!(ram.total >= 128 << 20 && ram.transferred < 1 << 20, "{ram:?}");
    assert_eq!(source.status().ownership, FerryOwnership::GivenAway);
    assert!(destination.owns_a_running_guest());
    arrives(destination, &before)
}

#[test]
fn the_memory_itself_goes_there_and_back_and_the_source_keeps_none_of_it() {
    let bed = bed();
    let machine = many_disks(&bed);
    let mut here = machine.boot(&bed, "process-0", EXERCISER, BUSY);
    let mut done = Counters::default();
    for hop in 1..=3 {
        let uri = format!("unix:{}", bed.path(&format!("move-{hop}")).display());
        let mut there = machine.expect(&bed, &format!("process-{hop}"), &uri);
        assert!(maps_memory(&here));
        done = hands_over(&mut here, &mut there, &done);
        // Its machine ends when the migration has ended for everybody who asks.
        let deadline = Instant::now() + WATCHDOG;
        while maps_memory(&here) {
            assert!(Instant::now() < deadline, "the source keeps the memory");
            here.status();
        }
        assert!(maps_memory(&there));
        assert_eq!(lease(&bed).generation, 1 + hop);
        here.execute("quit", json!({}));
        assert_eq!(here.exit().code(), Some(0));
        here = there;
    }
    // As to another host, from memory that came itself.
    let mut there = machine.expect(&bed, "last", &format!("unix:{}", bed.path("last").display()));
    crate::load::moves(&mut here, &mut there, &done);
    there.finish();
}

/// The guest is paused, so that nobody writes: whatever becomes of the destination, its memory is as it was.
#[test]
fn a_guest_that_was_not_taken_goes_on_in_memory_that_is_as_it_was() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let done = works(&mut source, &Counters::default());
    source.execute("stop", json!({}));
    let before = digest(&source);
    for kind in [Kind::Memory, Kind::Mapped, Kind::Prepare, Kind::Prepared, Kind::Commit] {
        let path = bed.path(&format!("to-{kind:?}"));
        let name = format!("killed-at-{kind:?}");
        let destination = machine.expect(&bed, &name, &format!("unix:{}", path.display()));
        let proxy = Proxy::new(&bed, &format!("by-{kind:?}"), &path, kind);
        source.hand_over(proxy.uri());
        let held = proxy.held();
        assert_eq!(digest(&source), before, "{kind:?}: while the destination has it mapped");
        destination.kill();
        held.cut();
        let reason = source.not_migrated();
        let status = source.status();
        assert_eq!((status.ownership, status.status), (FerryOwnership::Owned, RunState::Paused), "{reason}");
        assert_eq!(digest(&source), before, "{kind:?}: {reason}");
    }
    source.execute("cont", json!({}));
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", bed.path("to").display()));
    hands_over(&mut source, &mut destination, &done);
    destination.finish();
}

/// Nobody but the operator can say that the destination never took it.
#[test]
fn a_guest_that_the_operator_takes_back_goes_on_in_memory_that_is_as_it_was() {
    let bed = bed();
    let machine = without_lease();
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let done = works(&mut source, &Counters::default());
    source.execute("stop", json!({}));
    let before = digest(&source);
    let path = bed.path("to");
    let destination = machine.expect(&bed, "killed", &format!("unix:{}", path.display()));
    let proxy = Proxy::new(&bed, "by", &path, Kind::Commit);
    source.hand_over(proxy.uri());
    let held = proxy.held();
    assert!(maps_memory(&destination), "it has the memory itself");
    destination.kill();
    held.cut();
    undecided(&mut source);
    assert_eq!(source.status().ownership, FerryOwnership::HandoverUnknown);
    assert_eq!(digest(&source), before, "while nobody knows whose it is");
    source.execute("x-ferry-reclaim", json!({}));
    let reason = source.not_migrated();
    let status = source.status();
    assert_eq!((status.ownership, status.status), (FerryOwnership::Owned, RunState::Paused), "{reason}");
    assert_eq!(digest(&source), before, "{reason}");
    source.execute("cont", json!({}));
    let done = works(&mut source, &done);
    let mut other = machine.expect(&bed, "other", &format!("unix:{}", bed.path("other").display()));
    hands_over(&mut source, &mut other, &done);
    other.finish();
}

/// A destination that took the guest runs it, although the source never hears of it; and the source does not go on in its memory.
#[test]
fn a_source_that_hears_nothing_lets_go_of_memory_that_is_another_guests() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let done = works(&mut source, &Counters::default());
    let path = bed.path("to");
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", path.display()));
    let proxy = Proxy::new(&bed, "by", &path, Kind::Running);
    source.hand_over(proxy.uri());
    let held = proxy.held();
    assert!(maps_memory(&source) && maps_memory(&destination));
    let info = source.wait_for_migration("the hand-over", |info| info.status == MigrationStatus::Device);
    assert_eq!(info.downtime, None);
    proxy.refuse_more();
    held.cut();
    source.migrated();
    assert_eq!(source.status().ownership, FerryOwnership::GivenAway);
    arrives(&mut destination, &done);
    destination.finish();
}

/// Moves the images of [`many_disks`] away, and puts empty ones in their places. Those.
fn replace_images(bed: &TestBed) -> Vec<PathBuf> {
    let replace = |name: &str| {
        let path = bed.path(name);
        let length_bytes = fs::metadata(&path).expect("an image").len();
        fs::rename(&path, path.with_extension("moved")).expect("it can be moved");
        File::create_new(&path).expect("its name is free").set_len(length_bytes).expect("a file of holes");
        path
    };
    ["a.img", "b.img"].map(replace).into()
}

/// How often the process has an image open under a name that ends so.
fn opened(vm: &Vm, suffix: &str) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", vm.process.id())).expect("the process is there");
    let targets = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    targets.filter(|target| target.to_string_lossy().ends_with(suffix)).count()
}

/// Somebody moves the images between the destination's look at them and the hand-over.
#[test]
fn the_images_themselves_go_whatever_their_names_lead_to_by_then() {
    let bed = bed();
    let machine = many_disks(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let before = works(&mut source, &Counters::default());
    let path = bed.path("to");
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", path.display()));
    let proxy = Proxy::new(&bed, "by", &path, Kind::Memory);
    source.hand_over(proxy.uri());
    let held = proxy.held();
    let empty = replace_images(&bed);
    held.resolve(Verdict::Pass);
    source.migrated();
    assert_eq!(source.status().ownership, FerryOwnership::GivenAway);
    assert!(destination.owns_a_running_guest());
    assert_eq!((opened(&destination, ".img"), opened(&destination, ".moved") >= 2), (0, true));
    arrives(&mut destination, &before);
    destination.finish();
    for path in empty {
        assert_eq!(fs::metadata(&path).expect("it is there").blocks(), 0, "{}", path.display());
    }
}

#[test]
fn a_guest_that_was_not_taken_goes_on_with_its_images_whatever_their_names_lead_to_by_then() {
    let bed = bed();
    let machine = many_disks(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let before = works(&mut source, &Counters::default());
    let path = bed.path("to");
    let destination = machine.expect(&bed, "destination", &format!("unix:{}", path.display()));
    let proxy = Proxy::new(&bed, "by", &path, Kind::Identified);
    source.hand_over(proxy.uri());
    let held = proxy.held();
    let empty = replace_images(&bed);
    proxy.aim(Kind::Commit.into());
    held.resolve(Verdict::Pass);
    let held = proxy.held();
    destination.kill();
    held.cut();
    let reason = source.not_migrated();
    let status = source.status();
    assert_eq!((status.ownership, status.status), (FerryOwnership::Owned, RunState::Running), "{reason}");
    works(&mut source, &before);
    source.finish();
    for path in empty {
        assert_eq!(fs::metadata(&path).expect("it is there").blocks(), 0, "{}", path.display());
    }
}
