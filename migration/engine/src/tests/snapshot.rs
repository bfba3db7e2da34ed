//! A guest that goes on, and is in a file as well.

use std::path::Path;

use super::file::{files, suspended};
use super::mock::{Arriving, Factory, Source, Trouble, World};
use super::patience;
use crate::lease::{Lease, State};
use crate::{
    Context, Error, Parameters, Reading, Restored, RunState, Snapshot, SnapshotFailed, SnapshotOptions,
    Statistics, Status, Taking, restore_from_file, snapshot_to_file,
};

fn snapshot(
    source: &mut Source,
    path: &Path,
    lease: Option<&mut Lease>,
) -> (Result<(), SnapshotFailed>, Snapshot) {
    snapshot_of(&SnapshotOptions::default(), source, path, lease)
}

pub(super) fn snapshot_of(
    options: &SnapshotOptions,
    source: &mut Source,
    path: &Path,
    lease: Option<&mut Lease>,
) -> (Result<(), SnapshotFailed>, Snapshot) {
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    let mut context =
        Context { lease, parameters: &parameters, statistics: &statistics, patience: patience() };
    (snapshot_to_file(source, path, options, &mut context), statistics.snapshot())
}

pub(super) fn restore(world: &World, path: &Path, lease: &Path) -> Result<Restored<Arriving>, Error> {
    let owner = world.lease("restored").owner().clone();
    restore_by(&mut Lease::open_existing(lease, owner).unwrap(), world, path)
}

pub(super) fn restore_by(lease: &mut Lease, world: &World, path: &Path) -> Result<Restored<Arriving>, Error> {
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    let mut factory = Factory::new(world, "restored");
    let how = (Reading::First, &Taking::Once);
    restore_from_file(&mut factory, path, how, Some(lease), &parameters, &statistics)
}

/// A clone in a world of its own, with a lease of its own, of images whose lease is that at `lease`.
fn clone(world: &World, path: &Path, lease: &Path) -> (World, Result<Restored<Arriving>, Error>) {
    let owner = world.lease("looks").owner().clone();
    let images = Lease::open_existing(lease, owner).unwrap().read().unwrap();
    let own = World::new();
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    let mut factory = Factory::new(&own, "clone");
    let how = (Reading::First, &Taking::Clone { images });
    let mut lease = own.lease("clone");
    let cloned = restore_from_file(&mut factory, path, how, Some(&mut lease), &parameters, &statistics);
    (own, cloned)
}

#[test]
fn clones_run_at_the_same_time_until_the_images_of_the_snapshot_move_on() {
    let world = World::new();
    let path = world.path("kept");
    let mut source = Source::new(&world, "source");
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    snapshot(&mut source, &path, Some(&mut lease)).0.unwrap();
    let copy = world.path("kept.disk-1.raw.ferry-lease");
    let clones: Vec<_> = (0..3).map(|_| clone(&world, &path, &copy)).collect();
    for (own, cloned) in &clones {
        assert!(cloned.as_ref().unwrap().machine.0.contents() == source.guest.contents());
        assert_eq!(own.running(), ["clone"]);
        let log = own.log();
        let [load, renew, run] = ["load", "renew generation", "runs"]
            .map(|what| log.iter().position(|line| *line == format!("clone: {what}")).unwrap());
        assert!(load < renew && renew < run, "{log:?}");
        own.assert_sound("a clone");
    }
    drop(source);
    drop(lease);
    restore(&world, &path, &copy).unwrap();
    let (own, cloned) = clone(&world, &path, &copy);
    let error = cloned.unwrap_err().chain();
    assert!(error.contains("generation 1") && error.contains("says generation 2"), "{error}");
    assert_eq!(own.running(), [""; 0]);
}

#[test]
fn a_guest_that_was_suspended_has_no_clones() {
    let world = World::new();
    let (_source, path) = suspended(&world);
    let (own, cloned) = clone(&world, &path, &world.lease_path());
    let error = cloned.unwrap_err().chain();
    assert!(error.contains("taken out once"), "{error}");
    assert_eq!(own.running(), [""; 0]);
    assert!(matches!(world.lease("other").read().unwrap().unwrap().state, State::InFile { .. }));
}

#[test]
fn the_guest_goes_on_and_what_it_was_comes_out_once() {
    let world = World::new();
    let path = world.path("kept");
    let mut source = Source::new(&world, "source");
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    let (taken, statistics) = snapshot(&mut source, &path, Some(&mut lease));
    taken.unwrap();
    assert_eq!(world.running(), ["source"]);
    assert_eq!(statistics.status, Status::Completed);
    assert_eq!(statistics.device_bytes, vmstate::to_bytes(&source.guest.device).len() as u64);
    assert!(statistics.rounds > 0 && statistics.downtime.total > std::time::Duration::ZERO);
    assert_eq!(files(&world), ["kept", "kept.disk-1.raw", "kept.disk-1.raw.ferry-lease", "lease"]);
    assert_eq!(std::fs::read(world.path("kept.disk-1.raw")).unwrap(), b"reflink of the image");
    let record = lease.read().unwrap().unwrap();
    assert_eq!((record.state, record.generation), (State::Owned, 2));
    let kept = source.guest.contents();

    // The guest writes on, and its images are not those of the snapshot any more.
    source.guest.write(0, 3, 0xabcd);
    drop(source);
    drop(lease);
    let error = restore(&world, &path, &world.lease_path()).unwrap_err().chain();
    assert!(error.contains("written at generation 1") && error.contains("generation 2"), "{error}");
    assert_eq!(world.running(), [""; 0]);

    let copy = world.path("kept.disk-1.raw.ferry-lease");
    let restored = restore(&world, &path, &copy).unwrap();
    assert_eq!(restored.state, RunState::Running);
    assert!(restored.machine.0.contents() == kept);
    assert_eq!(world.running(), ["restored"]);
    drop(restored);
    let error = restore(&world, &path, &copy).unwrap_err().chain();
    assert!(error.contains("written at generation 1") && error.contains("generation 2"), "{error}");
    world.assert_sound("kept");
}

#[test]
fn a_paused_guest_without_a_lease_has_snapshots_too() {
    let world = World::new();
    let mut source = Source::new(&world, "source");
    source.pause();
    snapshot(&mut source, &world.path("kept"), None).0.unwrap();
    assert_eq!(files(&world), ["kept", "kept.disk-1.raw"]);
    assert_eq!(world.running(), [""; 0]);
    assert_eq!(source.guest.world.log().iter().filter(|entry| entry.ends_with(": stop")).count(), 1);
}

#[test]
fn a_snapshot_that_fails_leaves_the_guest_running_and_no_files() {
    for step in
        ["describe", "images", "try to copy", "start tracking", "collect", "stop", "save", "quiesce", "copy"]
    {
        let world = World::new();
        let mut source = Source::new(&world, "source");
        source.guest.trouble = Some(Trouble::Fail(step));
        let mut lease = world.lease("source");
        lease.claim().unwrap();
        let (taken, statistics) = snapshot(&mut source, &world.path("kept"), Some(&mut lease));
        let failed = taken.unwrap_err();
        assert_eq!(failed.paused, None, "{step}");
        assert!(statistics.error.unwrap().contains(&format!("{step} fails")), "{step}");
        assert_eq!(
            (world.running(), files(&world)),
            (vec!["source".to_owned()], vec!["lease".to_owned()]),
            "{step}"
        );
        assert_eq!(lease.read().unwrap().unwrap().state, State::Owned);
    }
}

#[test]
fn a_name_that_is_taken_leaves_nothing_of_the_snapshot() {
    for taken in ["kept", "kept.disk-1.raw", "kept.disk-1.raw.ferry-lease"] {
        let world = World::new();
        std::fs::write(world.path(taken), "precious").unwrap();
        let mut source = Source::new(&world, "source");
        let mut lease = world.lease("source");
        lease.claim().unwrap();
        let failed = snapshot(&mut source, &world.path("kept"), Some(&mut lease)).0.unwrap_err();
        assert!(failed.error.chain().contains(taken), "{:?}", failed.error);
        assert_eq!(files(&world), [taken, "lease"]);
        assert_eq!(std::fs::read(world.path(taken)).unwrap(), b"precious");
        assert_eq!(world.running(), ["source"]);
    }
}
