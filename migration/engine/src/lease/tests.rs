use super::*;

const SESSION: Id = [1; 16];

struct Fixture {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lease");
        Self { _folder: folder, path }
    }

    /// Another process, as far as the lease can tell: locks belong to the open file.
    fn process(&self, name: &str) -> Lease {
        Lease::open(&self.path, Owner::this_process(name).unwrap()).unwrap()
    }
}

fn offered(fixture: &Fixture) -> (Lease, Lease, u64) {
    let (mut source, destination) = (fixture.process("source"), fixture.process("destination"));
    source.claim().unwrap();
    let generation = source.offer(&SESSION, "unix:/d").unwrap();
    (source, destination, generation)
}

#[test]
fn a_living_owner_is_named_and_a_dead_one_replaced() {
    let fixture = Fixture::new();
    let mut first = fixture.process("first");
    assert_eq!(first.claim().unwrap(), (1, None));
    let mut second = fixture.process("second");
    assert!(!second.is_orphaned().unwrap());
    assert!(matches!(second.check_claim(), Err(Error::Held { .. })));
    let error = second.claim().unwrap_err();
    assert!(matches!(error, Error::Held { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("VM \"first\"") && text.contains(&format!("pid {}", std::process::id())), "{text}");
    drop(first);
    assert!(second.is_orphaned().unwrap());
    second.check_claim().unwrap();
    let (generation, previous) = second.claim().unwrap();
    assert_eq!((generation, previous.unwrap().owner.vm.as_str()), (2, "first"));
}

#[test]
fn a_released_lease_is_free() {
    let fixture = Fixture::new();
    let mut first = fixture.process("first");
    first.claim().unwrap();
    first.release().unwrap();
    drop(first);
    let mut first = fixture.process("first");
    assert!(!first.is_orphaned().unwrap());
    assert_eq!(fixture.process("second").claim().unwrap().0, 2);
    assert!(matches!(first.release(), Err(Error::Moved { .. })));
}

#[test]
fn handover_moves_owner_presence_and_generation() {
    let fixture = Fixture::new();
    let (mut source, mut destination, generation) = offered(&fixture);
    let mut locks_taken = false;
    let taken = destination.take(&SESSION, generation, || {
        locks_taken = true;
        Ok(())
    });
    assert_eq!((taken.unwrap(), locks_taken), (generation + 1, true));
    assert!(matches!(source.settle(&SESSION).unwrap(), Settlement::Theirs { record }
        if record.owner.vm == "destination" && record.state == State::Taken { session: SESSION }));
    source.leave().unwrap();
    assert!(matches!(fixture.process("third").claim(), Err(Error::Held { .. })));
    drop(destination);
    assert_eq!(fixture.process("third").claim().unwrap().0, generation + 2);
}

#[test]
fn after_settling_a_late_commit_finds_another_generation() {
    let fixture = Fixture::new();
    let (mut source, mut destination, generation) = offered(&fixture);
    assert_eq!(source.settle(&SESSION).unwrap(), Settlement::Ours { generation: generation + 1 });
    let never = || -> Result<(), String> { panic!("image locks of a guest that is not ours") };
    assert!(is_moved(destination.take(&SESSION, generation, never)));
    assert_eq!(source.settle(&SESSION).unwrap(), Settlement::Ours { generation: generation + 1 });
    // Offered again, in another session: the old COMMIT still finds nothing.
    source.offer(&[2; 16], "unix:/d").unwrap();
    for late in [generation, generation + 1] {
        assert!(is_moved(destination.take(&SESSION, late, never)));
    }
    assert!(is_moved(destination.take(&[2; 16], generation, never)));
}

fn is_moved(taken: Result<u64, NotTaken>) -> bool {
    matches!(taken, Err(NotTaken::Refused(Error::Moved { .. })))
}

#[test]
fn a_failed_condition_leaves_the_offer() {
    let fixture = Fixture::new();
    let (mut source, mut destination, generation) = offered(&fixture);
    let locked = destination.take(&SESSION, generation, || Err("disk.img is locked by pid 7".into()));
    match locked {
        Err(NotTaken::Refused(error)) => assert_eq!(error.to_string(), "disk.img is locked by pid 7"),
        other => panic!("{other:?}"),
    }
    assert_eq!(source.settle(&SESSION).unwrap(), Settlement::Ours { generation: generation + 1 });
}

/// A handle that cannot write stands for a disk that fails.
#[test]
fn a_take_that_could_not_be_written_is_tried_until_it_is_known() {
    let fixture = Fixture::new();
    let (mut source, mut destination, generation) = offered(&fixture);
    let fail = |lease: &mut Lease| {
        let readable = File::open(&fixture.path).unwrap();
        std::mem::replace(&mut lease.file, readable)
    };
    let repair = |lease: &mut Lease, file: File| lease.file = file;

    // A lock needs a handle that can write: not even begun, so the guest is not ours for certain.
    let whole = fail(&mut destination);
    assert!(matches!(destination.take(&SESSION, generation, || Ok(())), Err(NotTaken::Refused(_))));
    repair(&mut destination, whole);

    // Written, and the sync failed: nobody can tell now, and the next try can.
    destination.take(&SESSION, generation, || Ok(())).unwrap();
    destination.unsure = Some(SESSION);
    destination.present = false;
    let whole = fail(&mut destination);
    assert!(matches!(destination.take(&SESSION, generation, || Ok(())), Err(NotTaken::Unknown(_))));
    repair(&mut destination, whole);
    let busy = destination.take(&SESSION, generation, || Err("disk.img is locked by pid 7".into()));
    assert!(matches!(busy, Err(NotTaken::Unknown(_))), "the record says taken: {busy:?}");
    assert_eq!(destination.take(&SESSION, generation, || Ok(())).unwrap(), generation + 1);
    assert!(matches!(source.settle(&SESSION).unwrap(), Settlement::Theirs { .. }));
}

#[test]
fn a_source_that_settles_before_a_doubtful_take_has_its_guest() {
    let fixture = Fixture::new();
    let (mut source, mut destination, generation) = offered(&fixture);
    // The write was lost.
    destination.unsure = Some(SESSION);
    assert_eq!(source.settle(&SESSION).unwrap(), Settlement::Ours { generation: generation + 1 });
    assert!(is_moved(destination.take(&SESSION, generation, || Ok(()))));
    assert_eq!(destination.unsure, None);
}

#[test]
fn what_was_given_back_returns_to_the_source_alone() {
    let fixture = Fixture::new();
    let (mut source, mut destination, generation) = offered(&fixture);
    destination.take(&SESSION, generation, || Ok(())).unwrap();
    destination.give_back(&SESSION).unwrap();
    assert!(matches!(source.settle(&[2; 16]).unwrap(), Settlement::Theirs { .. }), "another session");
    assert!(matches!(fixture.process("stranger").claim(), Err(Error::Held { .. })));
    assert_eq!(source.settle(&SESSION).unwrap(), Settlement::Ours { generation: generation + 2 });
}

#[test]
fn only_the_owner_offers_suspends_and_releases() {
    let fixture = Fixture::new();
    let (mut source, mut other, generation) = offered(&fixture);
    assert!(matches!(other.offer(&SESSION, ""), Err(Error::Moved { .. })));
    assert!(matches!(other.release(), Err(Error::Moved { .. })));
    assert!(matches!(source.release(), Err(Error::Moved { .. })), "an offered guest is not ours to release");
    assert!(matches!(source.suspend(generation, 5), Err(Error::Moved { .. })));
    assert!(matches!(other.settle(&SESSION).unwrap(), Settlement::Theirs { .. }));
}

#[test]
fn a_file_is_restored_once_and_only_onto_what_it_was_taken_from() {
    let fixture = Fixture::new();
    let mut source = fixture.process("source");
    let (generation, _) = source.claim().unwrap();
    let lease = source.read().unwrap().unwrap().lease;
    source.suspend(generation, 77).unwrap();
    let mut restored = fixture.process("restored");
    for (lease, generation, digest) in [([0; 16], generation, 77), (lease, generation, 78), (lease, 9, 77)] {
        assert!(matches!(restored.claim_file(&lease, generation, digest), Err(Error::Moved { .. })));
    }
    assert_eq!(restored.claim_file(&lease, generation, 77).unwrap(), generation + 1);
    drop(restored);
    let error = fixture.process("again").claim_file(&lease, generation, 77).unwrap_err().to_string();
    assert!(error.contains("at generation 1") && error.contains("generation 2, owned"), "{error}");
}

#[test]
fn a_guest_in_a_file_is_given_up_only_on_request() {
    let fixture = Fixture::new();
    let mut source = fixture.process("source");
    let (generation, _) = source.claim().unwrap();
    let lease = source.read().unwrap().unwrap().lease;
    source.suspend(generation, 77).unwrap();
    let before = source.read().unwrap();
    let mut again = fixture.process("again");
    for result in [again.check_claim(), again.claim().map(drop)] {
        assert!(matches!(result, Err(Error::Suspended { record, .. }) if Some(&*record) == before.as_ref()));
    }
    assert_eq!(again.read().unwrap(), before);
    assert_eq!(again.claim_anew().unwrap().0, generation + 1);
    drop(again);
    assert!(fixture.process("restored").claim_file(&lease, generation, 77).is_err());
    assert_eq!(fixture.process("next").claim().unwrap().0, generation + 2);
}

#[test]
fn a_torn_write_never_happened() {
    let fixture = Fixture::new();
    let mut source = fixture.process("source");
    source.claim().unwrap();
    let before = source.read().unwrap();
    let old = std::fs::read(&fixture.path).unwrap();
    source.offer(&SESSION, "unix:/d").unwrap();
    let new = std::fs::read(&fixture.path).unwrap();
    // Sequence 1 lies in the first slot, 2 in the second; a crash leaves a prefix of the second.
    for cut in [1, 8, 100, 500] {
        let mut torn = old.clone();
        let second = SLOT_STRIDE_BYTES..SLOT_STRIDE_BYTES + cut;
        torn[second.clone()].copy_from_slice(&new[second]);
        std::fs::write(&fixture.path, &torn).unwrap();
        assert_eq!(source.read().unwrap(), before, "cut at {cut}");
    }
    std::fs::write(&fixture.path, &new).unwrap();
    assert!(matches!(source.read().unwrap().unwrap().state, State::Offered { .. }));
    let mut damaged = new.clone();
    damaged[20] ^= 1;
    damaged[SLOT_STRIDE_BYTES + 20] ^= 1;
    std::fs::write(&fixture.path, &damaged).unwrap();
    assert!(matches!(source.settle(&SESSION), Err(Error::Damaged { .. })));
}

#[test]
fn a_file_that_is_no_lease_is_left_alone() {
    let fixture = Fixture::new();
    for contents in [vec![b'x'; FILE_BYTES], vec![0; 4096], b"image".to_vec()] {
        std::fs::write(&fixture.path, &contents).unwrap();
        let error = Lease::open(&fixture.path, Owner::this_process("vm").unwrap()).unwrap_err();
        assert!(matches!(error, Error::NotALease { .. }), "{error}");
        assert_eq!(std::fs::read(&fixture.path).unwrap(), contents);
    }
}

#[test]
fn a_destination_makes_no_file() {
    let fixture = Fixture::new();
    let owner = || Owner::this_process("vm").unwrap();
    assert!(matches!(Lease::open_existing(&fixture.path, owner()), Err(Error::Io { .. })));
    assert!(!fixture.path.exists());
    fixture.process("vm").claim().unwrap();
    assert!(Lease::open_existing(&fixture.path, owner()).unwrap().read().unwrap().is_some());
}

#[test]
fn a_crash_before_the_first_record_leaves_a_usable_file() {
    let fixture = Fixture::new();
    std::fs::write(&fixture.path, [0; FILE_BYTES]).unwrap();
    assert_eq!(fixture.process("vm").claim().unwrap(), (1, None));
}

#[test]
fn of_many_claimants_one_wins() {
    let fixture = Fixture::new();
    fixture.process("dead").claim().unwrap();
    let barrier = std::sync::Barrier::new(8);
    let winners = std::thread::scope(|scope| {
        let claim = |index: usize| {
            let mut lease = fixture.process(&format!("claimant {index}"));
            barrier.wait();
            lease.claim().is_ok().then_some(lease)
        };
        let threads: Vec<_> = (0..8).map(|index| scope.spawn(move || claim(index))).collect();
        // All have tried before the first winner lets go.
        let leases: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        leases.iter().flatten().count()
    });
    assert_eq!(winners, 1);
}

#[test]
fn numbers_at_their_end_go_no_further() {
    let fixture = Fixture::new();
    let owner = Owner::this_process("old").unwrap();
    let record =
        |generation| Record { lease: [9; 16], generation, state: State::Owned, owner: owner.clone() };
    for (generation, sequence) in [(u64::MAX, 1), (1, u64::MAX)] {
        let mut file = vec![0; FILE_BYTES];
        file[..SLOT_BYTES].copy_from_slice(&record(generation).to_slot(sequence));
        std::fs::write(&fixture.path, &file).unwrap();
        let error = fixture.process("new").claim().unwrap_err().to_string();
        assert!(error.contains("have come to their end"), "{error}");
        assert_eq!(std::fs::read(&fixture.path).unwrap(), file);
    }
    let state = State::Offered { session: SESSION, peer: String::new() };
    let last = Record { state, ..record(u64::MAX) };
    assert_eq!(rules::take(&last, &owner.id, &SESSION, u64::MAX), None);
    assert_eq!(rules::settle(&last, &owner.id, true, &SESSION), rules::Settle::Gone);
}

#[test]
fn a_destination_that_could_not_take_keeps_nobody_from_the_guest_of_a_source_that_died() {
    let fixture = Fixture::new();
    let (source, mut destination, _) = offered(&fixture);
    // It had shown presence, and then the record could not be written.
    assert!(destination.lock(libc::F_RDLCK, PRESENCE_RANGE).unwrap());
    assert!(matches!(destination.give_back(&SESSION), Err(Error::Moved { .. })), "it was never its own");
    drop(source);
    let mut heir = fixture.process("heir");
    heir.check_claim().unwrap();
    heir.claim().unwrap();
}
