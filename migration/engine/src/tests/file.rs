//! Into a file and out of it, and what must keep a guest in its file.

use std::path::Path;

use super::mock::{Arriving, Factory, Source, Trouble, World};
use super::patience;
use crate::lease::{Lease, State};
use crate::{
    Context, Error, Outcome, Parameters, Reading, Restored, RunState, Snapshot, Statistics, Taking,
    restore_from_file, suspend_to_file,
};
use transport::Layout;

/// Both, for what holds of each.
const LAYOUTS: [Layout; 2] = [Layout::Mapped, Layout::Stream];

fn suspend(source: &mut Source, path: &Path, lease: Option<&mut Lease>) -> (Outcome, Snapshot) {
    suspend_in(Layout::default(), source, path, lease)
}

fn suspend_in(
    layout: Layout,
    source: &mut Source,
    path: &Path,
    lease: Option<&mut Lease>,
) -> (Outcome, Snapshot) {
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    let mut context =
        Context { lease, parameters: &parameters, statistics: &statistics, patience: patience() };
    (suspend_to_file(source, path, layout, &mut context), statistics.snapshot())
}

fn restore(world: &World, path: &Path, lease: Option<&mut Lease>) -> Result<Restored<Arriving>, Error> {
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    let mut factory = Factory::new(world, "restored");
    restore_from_file(&mut factory, path, (Reading::OnDemand, &Taking::Once), lease, &parameters, &statistics)
}

/// A guest in a file, and the machine that put it there.
pub(super) fn suspended(world: &World) -> (Source, std::path::PathBuf) {
    suspended_in(Layout::default(), world)
}

fn suspended_in(layout: Layout, world: &World) -> (Source, std::path::PathBuf) {
    let path = world.path("guest");
    let mut source = Source::new(world, "source");
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    let (outcome, statistics) = suspend_in(layout, &mut source, &path, Some(&mut lease));
    assert!(matches!(outcome, Outcome::Completed { .. }), "{outcome:?}");
    assert_eq!(statistics.device_bytes, vmstate::to_bytes(&source.guest.device).len() as u64);
    (source, path)
}

pub(super) fn files(world: &World) -> Vec<String> {
    let folder = std::fs::read_dir(world.path("")).unwrap();
    let mut names: Vec<_> = folder.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn nothing_is_written_over() {
    let world = World::new();
    let path = world.path("image");
    std::fs::write(&path, "precious").unwrap();
    let mut source = Source::new(&world, "source");
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    let (outcome, _) = suspend(&mut source, &path, Some(&mut lease));
    assert!(matches!(outcome, Outcome::Failed { paused: None, .. }), "{outcome:?}");
    assert_eq!(world.running(), ["source"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    assert_eq!(files(&world), ["image", "lease"]);
}

#[test]
fn a_guest_comes_out_as_it_went_in_once() {
    LAYOUTS.into_iter().for_each(comes_out_as_it_went_in_once);
}

fn comes_out_as_it_went_in_once(layout: Layout) {
    let world = World::new();
    let (source, path) = suspended_in(layout, &world);
    assert!(source.finished);
    assert_eq!((world.running(), world.image_holder()), (vec![], None));
    assert_eq!(files(&world), ["guest", "lease"]);
    let mut lease = world.lease("restored");
    assert!(matches!(lease.read().unwrap().unwrap().state, State::InFile { .. }));

    let restored = restore(&world, &path, Some(&mut lease)).unwrap();
    assert!(restored.error.is_none());
    assert_eq!(restored.state, RunState::Running);
    assert!(restored.machine.0.contents() == source.guest.contents());
    assert_eq!(restored.machine.0.device, source.guest.device);
    assert_eq!(world.running(), ["restored"]);
    assert!(!world.log().contains(&"restored: renew generation".to_owned()), "it is the only one");
    assert_eq!(lease.read().unwrap().unwrap().generation, 2);

    // The guest goes on and ends; its file is of the past.
    drop(restored);
    drop(lease);
    let error = restore(&world, &path, Some(&mut world.lease("again"))).unwrap_err().chain();
    assert!(error.contains("written at generation 1") && error.contains("says generation 2"), "{error}");
    world.assert_sound("restored once");
    assert_eq!(world.running(), [""; 0]);
}

#[test]
fn a_large_machine_comes_out_of_its_file() {
    let world = World::new();
    world.enlarge_machines(30_000);
    let (_source, path) = suspended(&world);
    let mut lease = world.lease("restored");
    let restored = restore(&world, &path, Some(&mut lease)).unwrap();
    assert_eq!(world.running(), ["restored"]);
    drop(restored);
}

#[test]
fn a_state_that_could_not_be_restored_is_not_written() {
    let world = World::new();
    let mut source = Source::new(&world, "source");
    // Its description allows 1000.
    source.guest.device.level = 1001;
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    let (outcome, statistics) = suspend(&mut source, &world.path("guest"), Some(&mut lease));
    assert!(matches!(outcome, Outcome::Failed { paused: None, .. }), "{outcome:?}");
    let cause = statistics.error.unwrap();
    assert!(cause.contains("save a state that can be restored") && cause.contains("level"), "{cause}");
    assert_eq!((world.running(), files(&world)), (vec!["source".to_owned()], vec!["lease".to_owned()]));
    assert_eq!(lease.read().unwrap().unwrap().state, State::Owned);
}

#[test]
fn a_file_is_refused_where_the_disks_have_moved_on() {
    let world = World::new();
    let (_source, path) = suspended(&world);
    let mut other = world.lease("other");
    other.claim_anew().unwrap();
    let error = restore(&world, &path, Some(&mut world.lease("restored"))).unwrap_err().chain();
    assert!(error.contains("held") && error.contains("VM \"other\""), "{error}");
    other.release().unwrap();
    let error = restore(&world, &path, Some(&mut world.lease("restored"))).unwrap_err().chain();
    assert!(error.contains("generation 1") && error.contains("generation 2, released"), "{error}");
    assert_eq!(world.running(), [""; 0]);
}

#[test]
fn a_paused_guest_stays_paused_and_a_leaseless_one_needs_none() {
    let world = World::new();
    let path = world.path("guest");
    let mut source = Source::new(&world, "source");
    source.pause();
    assert!(matches!(suspend(&mut source, &path, None).0, Outcome::Completed { .. }));
    let error = restore(&world, &path, Some(&mut world.lease("x"))).unwrap_err().chain();
    assert!(error.contains("written without one"), "{error}");
    let restored = restore(&world, &path, None).unwrap();
    assert_eq!(restored.state, RunState::Paused);
    assert_eq!(world.running(), [""; 0]);
}

#[test]
fn a_damaged_file_never_runs_and_costs_nothing() {
    LAYOUTS.into_iter().for_each(damaged_never_runs_and_costs_nothing);
}

fn damaged_never_runs_and_costs_nothing(layout: Layout) {
    let world = World::new();
    let (_source, path) = suspended_in(layout, &world);
    let whole = std::fs::read(&path).unwrap();
    let damaged = world.path("damaged");
    let refused = |bytes: &[u8], what: &str| {
        std::fs::write(&damaged, bytes).unwrap();
        let mut lease = world.lease("restored");
        let error = restore(&world, &damaged, Some(&mut lease)).expect_err(what);
        assert!(!error.chain().is_empty());
        assert!(matches!(lease.read().unwrap().unwrap().state, State::InFile { .. }), "{what}");
        assert_eq!((world.running(), world.image_holder()), (vec![], None), "{what}");
    };
    for cut in (0..whole.len()).step_by(whole.len() / 20).chain([1, 8, 40]) {
        refused(&whole[..cut], &format!("cut at {cut}"));
    }
    // The trailer is for people and foreign tools; everything before it is covered by a digest.
    let trailer = whole.iter().rposition(|byte| *byte == 0).unwrap() - 8;
    // The holes of a mapped file are not read, so only what was written counts.
    let written: Vec<_> = (0..trailer).filter(|at| whole[*at] != 0).collect();
    for at in written.iter().copied().step_by(written.len() / 30) {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        refused(&flipped, &format!("flipped at {at}"));
    }
    refused(&[whole.as_slice(), b"more"].concat(), "longer");
    restore(&world, &path, Some(&mut world.lease("restored"))).unwrap();
}

#[test]
fn another_machine_is_told_every_reason() {
    let world = World::new();
    let (_source, path) = suspended(&world);
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    let mut factory = Factory::new(&world, "restored");
    factory.cpus = 4;
    factory.less_ram = true;
    let mut lease = world.lease("restored");
    let error = restore_from_file(
        &mut factory,
        &path,
        (Reading::First, &Taking::Once),
        Some(&mut lease),
        &parameters,
        &statistics,
    )
    .unwrap_err();
    let Error::Refused { reasons } = &error else { panic!("{error:?}") };
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert_eq!(statistics.snapshot().error, Some(error.chain()));
}

/// Its file is read while the machine is built: what is found then is not what counts first.
#[test]
fn another_machine_is_told_so_though_its_file_is_damaged_too() {
    for layout in LAYOUTS {
        let world = World::new();
        let (_source, path) = suspended_in(layout, &world);
        let mut bytes = std::fs::read(&path).unwrap();
        let trailer = bytes.iter().rposition(|byte| *byte == 0).unwrap() - 8;
        let last = (0..trailer).rfind(|at| bytes[*at] != 0).unwrap();
        bytes[last] ^= 0x10;
        std::fs::write(&path, bytes).unwrap();
        let restore = |cpus| {
            let mut factory = Factory::new(&world, "restored");
            factory.cpus = cpus;
            let (how, mut lease) = ((Reading::First, &Taking::Once), world.lease("restored"));
            let (parameters, statistics) = (Parameters::new(), Statistics::new());
            restore_from_file(&mut factory, &path, how, Some(&mut lease), &parameters, &statistics)
                .unwrap_err()
        };
        let cpus = Factory::new(&world, "restored").cpus;
        assert!(matches!(restore(cpus), Error::Stream { .. }), "{layout:?}: {:?}", restore(cpus));
        assert!(matches!(restore(cpus + 1), Error::Refused { .. }), "{layout:?}: {:?}", restore(cpus + 1));
    }
}

#[test]
fn a_suspend_that_fails_leaves_the_guest_running_and_no_file() {
    for step in ["describe", "stop", "save", "populated", "quiesce"] {
        let world = World::new();
        let mut source = Source::new(&world, "source");
        source.guest.trouble = Some(Trouble::Fail(step));
        let mut lease = world.lease("source");
        lease.claim().unwrap();
        let (outcome, statistics) = suspend(&mut source, &world.path("guest"), Some(&mut lease));
        assert!(matches!(outcome, Outcome::Failed { paused: None, .. }), "{step}: {outcome:?}");
        assert!(statistics.error.unwrap().contains(&format!("{step} fails")));
        assert_eq!((world.running(), files(&world)), (vec!["source".to_owned()], vec!["lease".to_owned()]));
        assert_eq!(lease.read().unwrap().unwrap().state, State::Owned);
    }
    let world = World::new();
    let mut source = Source::new(&world, "source");
    let (outcome, _) = suspend(&mut source, &world.path("no/such/folder"), None);
    assert!(matches!(outcome, Outcome::Failed { error: Error::File { .. }, paused: None }), "{outcome:?}");
    assert!(!world.log().iter().any(|entry| entry == "source: stop"), "the guest was not even stopped");
}

#[test]
fn a_suspend_whose_lease_is_not_ours_leaves_no_file_and_no_guest() {
    let world = World::new();
    let mut source = Source::new(&world, "source");
    world.lease("dead").claim().unwrap();
    let mut lease = world.lease("source");
    let (outcome, _) = suspend(&mut source, &world.path("guest"), Some(&mut lease));
    let Outcome::Failed { error: Error::Lease(_), paused: Some(paused) } = &outcome else {
        panic!("{outcome:?}")
    };
    assert!(paused.contains("VM \"dead\""), "{paused}");
    assert_eq!(files(&world), ["lease"]);
}

/// Killed in the middle, a suspend leaves nothing of the guest's memory behind.
#[test]
fn what_is_not_finished_has_no_name() {
    use std::os::unix::fs::OpenOptionsExt;
    let world = World::new();
    let mut source = Source::new(&world, "source");
    let (seen, sight) = std::sync::mpsc::channel();
    let folder = world.clone();
    source.preparation = Some(Box::new(move |_| seen.send(files(&folder)).unwrap()));
    assert!(matches!(suspend(&mut source, &world.path("guest"), None).0, Outcome::Completed { .. }));
    let mut nameless = std::fs::OpenOptions::new();
    nameless.write(true).custom_flags(nix::libc::O_TMPFILE);
    // Without such files it has a name, which goes with the last step.
    let names = usize::from(nameless.open(world.path("")).is_err());
    assert_eq!(sight.recv().unwrap().len(), names);
    assert_eq!(files(&world), ["guest"]);
    let mode = std::fs::metadata(world.path("guest")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777, 0o600);
}

/// The lease may say that the guest is in the file, or may not, and cannot be read: the file stays, and the guest waits.
#[test]
fn a_file_is_not_removed_before_the_lease_says_that_it_is_not_the_guest() {
    for reached_the_disk in [false, true] {
        let world = World::new();
        let path = world.path("guest");
        let mut source = Source::new(&world, "source");
        let mut lease = world.lease("source");
        lease.claim().unwrap();
        source.guest.lease_lost_at = Some("quiesce");
        let (parameters, statistics) = (Parameters::new(), Statistics::new());
        let patience = crate::Patience { settle: std::time::Duration::ZERO, ..patience() };
        let owner = lease.owner().clone();
        let mut context =
            Context { lease: Some(&mut lease), parameters: &parameters, statistics: &statistics, patience };
        let outcome = suspend_to_file(&mut source, &path, Layout::default(), &mut context);
        let Outcome::Unknown(handover) = outcome else { panic!("{outcome:?}") };
        assert_eq!(files(&world), ["guest", "lease"]);
        assert_eq!(world.running(), [""; 0]);
        assert_eq!(statistics.snapshot().status, crate::Status::HandoverUnknown);

        world.find_lease();
        if reached_the_disk {
            Lease::open(&world.lease_path(), owner).unwrap().suspend(1, 0).unwrap();
        }
        let mut nobody = || -> Result<transport::Connection, Error> { panic!("nobody is to be asked") };
        let outcome = handover.resolve(&mut source, &mut nobody, &mut context);
        assert!(matches!(outcome, Outcome::Failed { paused: None, .. }), "{outcome:?}");
        assert_eq!((world.running(), files(&world)), (vec!["source".to_owned()], vec!["lease".to_owned()]));
        let record = lease.read().unwrap().unwrap();
        assert_eq!((record.state, record.generation), (State::Owned, 1 + u64::from(reached_the_disk)));
    }
}

/// The process ends before the lease can be read again.
#[test]
fn an_undecided_file_outlives_the_process() {
    let world = World::new();
    let path = world.path("guest");
    let mut source = Source::new(&world, "source");
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    source.guest.lease_lost_at = Some("quiesce");
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    let patience = crate::Patience { settle: std::time::Duration::ZERO, ..patience() };
    let mut context =
        Context { lease: Some(&mut lease), parameters: &parameters, statistics: &statistics, patience };
    let outcome = suspend_to_file(&mut source, &path, Layout::default(), &mut context);
    assert!(matches!(outcome, Outcome::Unknown(_)), "{outcome:?}");
    drop(outcome);
    drop(source);
    assert_eq!(files(&world), ["guest", "lease"]);
}

#[test]
fn a_cancelled_suspend_leaves_the_guest_running() {
    let world = World::new();
    let mut source = Source::new(&world, "source");
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    assert!(parameters.cancel());
    let mut context =
        Context { lease: None, parameters: &parameters, statistics: &statistics, patience: patience() };
    let outcome = suspend_to_file(&mut source, &world.path("guest"), Layout::default(), &mut context);
    assert!(matches!(outcome, Outcome::Failed { error: Error::Cancelled, paused: None }), "{outcome:?}");
    assert_eq!((world.running(), files(&world)), (vec!["source".to_owned()], vec![]));
}
