//! Snapshots of what has changed since another one: what is in them, what comes out of them, and what must refuse them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use transport::Connection;

use super::file::files;
use super::mock::{Factory, Source, Trouble, World};
use super::patience;
use super::snapshot::{restore, restore_by, snapshot_of};
use crate::lease::Lease;
use crate::{
    Context, Destination, Error, Outcome, PAGE_BYTES, Parameters, SnapshotOptions, Statistics, migrate,
};

/// A guest that writes nothing of itself but when it is stopped, and its lease.
pub(super) struct Chain {
    pub world: World,
    source: Source,
    lease: Lease,
}

/// What the guest was at a snapshot.
pub(super) type Contents = Vec<Vec<u8>>;

impl Chain {
    fn new() -> Self {
        let world = World::new();
        let mut source = Source::new(&world, "source");
        source.writes = vec![0; 1000];
        let mut lease = world.lease("source");
        lease.claim().unwrap();
        Self { world, source, lease }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.world.path(name)
    }

    fn try_snapshot(&mut self, name: &str, parent: Option<&str>, track: bool) -> Result<Contents, Error> {
        let parent = parent.map(|parent| self.path(parent));
        let options = SnapshotOptions { parent, track, ..SnapshotOptions::default() };
        let path = self.path(name);
        let (taken, _) = snapshot_of(&options, &mut self.source, &path, Some(&mut self.lease));
        taken.map_err(|failed| failed.error)?;
        Ok(self.source.guest.contents())
    }

    /// Takes a snapshot that can be a parent; what the guest was.
    fn snapshot(&mut self, name: &str, parent: Option<&str>) -> Contents {
        self.try_snapshot(name, parent, true).unwrap()
    }

    /// Why there is no child of `parent`; nothing is left of it and the guest goes on.
    fn refusal(&mut self, parent: &str) -> String {
        let before = files(&self.world);
        let error = self.try_snapshot("child", Some(parent), true).unwrap_err();
        assert_eq!(files(&self.world), before);
        assert_eq!(self.world.running(), ["source"]);
        error.chain()
    }

    /// The end of the guest: where it was, and the lease that belongs to one of its snapshots.
    pub fn end(self, name: &str) -> (World, PathBuf) {
        let Self { world, source, lease } = self;
        drop((source, lease));
        let lease = world.path(&format!("{name}.disk-1.raw.ferry-lease"));
        (world, lease)
    }

    /// What comes out of a file when it is restored onto its images, and the guest that wrote it is no more.
    fn restored(self, name: &str) -> Result<Contents, String> {
        let (world, lease) = self.end(name);
        let restored = restore(&world, &world.path(name), &lease).map_err(|error| error.chain())?;
        assert_eq!(world.running(), ["restored"]);
        Ok(restored.machine.0.contents())
    }
}

/// Bytes that a file takes on its disk.
fn allocated_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// Snapshots of three days, the later ones of what has changed.
pub(super) fn three_days() -> (Chain, [Contents; 3]) {
    let mut chain = Chain::new();
    let monday = chain.snapshot("monday", None);
    let guest = &chain.source.guest;
    guest.write(0, 3, 0xaaaa);
    guest.write(1, 9, 0xbbbb);
    // Zeros over what Monday has, and what is found in each stop, again.
    guest.zero(0, 7);
    guest.write(0, 599, 0xcccc);
    let tuesday = chain.snapshot("tuesday", Some("monday"));
    chain.source.guest.write(0, 3, 0xdddd);
    chain.source.guest.write(0, 300, 0xeeee);
    let wednesday = chain.snapshot("wednesday", Some("tuesday"));
    (chain, [monday, tuesday, wednesday])
}

#[test]
fn each_snapshot_of_a_chain_comes_out_as_the_guest_was() {
    for (index, name) in ["monday", "tuesday", "wednesday"].into_iter().enumerate() {
        let (chain, days) = three_days();
        assert!(days[0] != days[1] && days[1] != days[2]);
        assert!(chain.restored(name).unwrap() == days[index], "{name}");
    }
}

/// The file that a guest came out of is as good a parent as one that it was written into.
#[test]
fn a_guest_that_was_restored_has_children_of_its_file() {
    let (chain, _) = three_days();
    let (world, lease) = chain.end("wednesday");
    let mut lease = Lease::open_existing(&lease, world.lease("restored").owner().clone()).unwrap();
    let restored = restore_by(&mut lease, &world, &world.path("wednesday")).unwrap();
    let mut source = Source::arrived(restored.machine);
    source.writes = vec![0; 1000];
    source.guest.write(0, 4, 0xffff);
    let mut chain = Chain { world, source, lease };
    let thursday = chain.snapshot("thursday", Some("wednesday"));
    assert!(allocated_bytes(&chain.path("thursday")) < 40 * PAGE_BYTES);
    assert!(chain.restored("thursday").unwrap() == thursday);
}

#[test]
fn a_child_holds_only_what_was_written_since_its_parent() {
    let (chain, _) = three_days();
    let bytes = ["monday", "tuesday", "wednesday"].map(|name| allocated_bytes(&chain.path(name)));
    // Five pages, of which one is of zeros and a hole, and three; the rest is what a file of no pages has.
    assert!(bytes[0] > 200 * PAGE_BYTES, "{bytes:?}");
    assert!(bytes[1] < 40 * PAGE_BYTES && bytes[2] < 40 * PAGE_BYTES, "{bytes:?}");
}

#[test]
fn what_a_busy_guest_writes_in_the_rounds_is_in_the_child() {
    let mut chain = Chain::new();
    chain.source.writes = vec![200, 60, 20, 90, 40, 30, 50];
    chain.snapshot("monday", None);
    let tuesday = chain.snapshot("tuesday", Some("monday"));
    let wednesday = chain.snapshot("wednesday", Some("tuesday"));
    assert!(tuesday != wednesday);
    assert!(chain.restored("wednesday").unwrap() == wednesday);
}

/// Such a page may not be seen a second time before the next look: nobody has protected it again.
#[test]
fn what_was_found_in_the_stop_of_a_parent_is_in_its_child() {
    let mut chain = Chain::new();
    chain.source.preparation = Some(Box::new(|guest| guest.write(0, 450, 0xaaaa)));
    chain.snapshot("monday", None);
    chain.source.preparation = None;
    chain.source.guest.write(0, 450, 0xbbbb);
    let tuesday = chain.snapshot("tuesday", Some("monday"));
    assert!(chain.restored("tuesday").unwrap() == tuesday);
}

/// What it has noted goes on to be known: it is in the child that is taken after all.
#[test]
fn a_child_that_fails_can_be_taken_again() {
    for step in ["collect", "images", "stop", "save", "quiesce", "copy"] {
        let mut chain = Chain::new();
        chain.snapshot("monday", None);
        chain.source.guest.write(0, 3, 0xaaaa);
        chain.source.guest.trouble = Some(Trouble::Fail(step));
        let error = chain.try_snapshot("tuesday", Some("monday"), true).unwrap_err().chain();
        assert!(error.contains(&format!("{step} fails")), "{error}");
        chain.source.guest.trouble = None;
        chain.source.guest.write(1, 9, 0xbbbb);
        chain.source.guest.write(0, 599, 0xcccc);
        let again = chain.try_snapshot("tuesday", Some("monday"), true);
        if step == "collect" {
            let error = again.unwrap_err().chain();
            assert!(error.contains("not noted"), "what was found may be lost: {error}");
            continue;
        }
        assert!(chain.restored("tuesday").unwrap() == again.unwrap(), "{step}");
    }
}

#[test]
fn another_snapshot_in_between_changes_nothing() {
    let mut chain = Chain::new();
    chain.snapshot("monday", None);
    chain.source.guest.write(0, 3, 0xaaaa);
    chain.try_snapshot("aside", None, false).unwrap();
    chain.source.guest.write(1, 9, 0xbbbb);
    let tuesday = chain.snapshot("tuesday", Some("monday"));
    assert!(allocated_bytes(&chain.path("aside")) > allocated_bytes(&chain.path("tuesday")));
    assert!(chain.restored("tuesday").unwrap() == tuesday);
}

#[test]
fn there_is_no_child_where_the_writes_are_not_known() {
    let mut chain = Chain::new();
    chain.try_snapshot("monday", None, false).unwrap();
    let error = chain.refusal("monday");
    assert!(error.contains("monday") && error.contains("not noted"), "{error}");

    chain.snapshot("tuesday", None);
    chain.snapshot("wednesday", None);
    let error = chain.refusal("tuesday");
    assert!(error.contains("since another one"), "{error}");
    // It is as good a parent as before.
    chain.try_snapshot("thursday", Some("wednesday"), false).unwrap();
    let error = chain.refusal("thursday");
    assert!(error.contains("not noted"), "the last of a chain: {error}");
}

#[test]
fn a_migration_in_between_ends_the_chain() {
    let mut chain = Chain::new();
    chain.snapshot("monday", None);
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    let (near, far) = Connection::pair().unwrap();
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let (parameters, statistics, world) = (Parameters::new(), Statistics::new(), World::new());
            let mut destination = Destination::new(None, &statistics, patience(), &parameters).unwrap();
            destination.serve(&mut Factory::new(&world, "destination"), far).is_some()
        });
        // It has begun to look for dirty pages, and fails.
        chain.source.guest.trouble = Some(Trouble::Fail("collect"));
        let mut near = Some(near);
        let mut dial = || near.take().ok_or(Error::Closed { doing: "dialling again" });
        let mut context =
            Context { lease: None, parameters: &parameters, statistics: &statistics, patience: patience() };
        let outcome = migrate(&mut chain.source, &mut dial, &mut context);
        assert!(matches!(outcome, Outcome::Failed { paused: None, .. }), "{outcome:?}");
        assert!(!receiving.join().unwrap());
    });
    chain.source.guest.trouble = None;
    let error = chain.refusal("monday");
    assert!(error.contains("not noted"), "{error}");
}

#[test]
fn a_parent_that_is_not_what_it_was_is_refused_before_the_guest_runs() {
    type Harm = (&'static str, fn(&World), &'static str);
    let harms: [Harm; 6] = [
        ("gone", |world| std::fs::remove_file(world.path("monday")).unwrap(), "cannot open"),
        (
            "torn",
            |world| {
                std::fs::File::options()
                    .write(true)
                    .open(world.path("monday"))
                    .unwrap()
                    .set_len(2 << 20)
                    .unwrap()
            },
            "monday",
        ),
        (
            "another",
            |world| drop(std::fs::rename(world.path("wednesday"), world.path("monday"))),
            "another file",
        ),
        (
            "no file",
            |world| {
                std::fs::remove_file(world.path("monday")).unwrap();
                std::fs::create_dir(world.path("monday")).unwrap();
            },
            "no regular file",
        ),
        ("no snapshot", |world| std::fs::write(world.path("monday"), [7; 10_000]).unwrap(), "monday"),
        (
            "damaged",
            |world| {
                // Somewhere in the sections behind its memory.
                let mut bytes = std::fs::read(world.path("monday")).unwrap();
                let at = bytes.windows(4).rposition(|window| window == b"cpus").unwrap();
                bytes[at] ^= 1;
                std::fs::write(world.path("monday"), bytes).unwrap();
            },
            "monday",
        ),
    ];
    for (what, harm, says) in harms {
        let (chain, _) = three_days();
        let world = chain.world.clone();
        harm(&world);
        let error = chain.restored("tuesday").unwrap_err();
        assert!(error.contains("tuesday needs its parent") && error.contains(says), "{what}: {error}");
        assert_eq!(world.running(), [""; 0], "{what}");
    }
}

/// A page of a parent that is damaged is found when it is read, as one of a file without a parent.
#[test]
fn a_damaged_page_of_a_parent_is_refused_with_its_place() {
    let (chain, _) = three_days();
    let path = chain.path("monday");
    let mut bytes = std::fs::read(&path).unwrap();
    let page = (1 << 20) + 257 * PAGE_BYTES as usize;
    let at = (page..page + PAGE_BYTES as usize).find(|at| bytes[*at] != 0).unwrap();
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = chain.restored("wednesday").unwrap_err();
    assert!(error.contains("memory at 0x100000") && error.contains("monday"), "{error}");
}

#[test]
fn a_parent_lies_beside_its_child() {
    let mut chain = Chain::new();
    chain.snapshot("monday", None);
    std::fs::create_dir(chain.path("other")).unwrap();
    let error = chain.try_snapshot("other/child", Some("monday"), true).unwrap_err().chain();
    assert!(error.contains("in the folder of its child"), "{error}");
    let error = chain.refusal("nothing");
    assert!(error.contains("cannot open"), "{error}");
    std::fs::write(chain.path("text"), "no snapshot").unwrap();
    let error = chain.refusal("text");
    assert!(error.contains("text"), "{error}");
}

#[test]
fn chains_have_an_end() {
    let mut chain = Chain::new();
    let name = |number: u32| format!("day-{number}");
    chain.snapshot(&name(1), None);
    for number in 2..=32 {
        chain.source.guest.write(0, u64::from(number), 0xaaaa);
        chain.snapshot(&name(number), Some(&name(number - 1)));
    }
    let last = chain.source.guest.contents();
    let error = chain.refusal(&name(32));
    assert!(error.contains("the last of 32 files"), "{error}");
    assert!(chain.restored(&name(32)).unwrap() == last);
}
