//! What becomes of images whose processes are cut off between any two steps: which machines would start from them.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use clap::Parser;
use engine::lease::{Id, Lease, Mark, State, mark_path};
use engine::storage::{Disk, IncomingDisks, OutgoingDisks};

use super::*;
use crate::cli::{Arguments, Command};
use crate::machine::Resources;
use crate::vmm::ownership::tests::block_device;
use crate::vmm::tests::process_with;
use crate::vmm::{Despite, Vmm, marks, ownership};

const SESSION: Id = [3; 16];
const IMAGE_BYTES: u64 = 1 << 20;
/// Machines that the two images are put into: the one that the guest has, one in another order, and one with each alone.
const MACHINES: [&[&str]; 4] = [&["a", "b"], &["b", "a"], &["a"], &["b"]];
const FORCED: Despite = Despite { discard_suspended: false, force_stale: true };

/// A folder of images.
struct Host {
    folder: tempfile::TempDir,
}

fn flags(folder: &Path, images: &[&str]) -> Vec<String> {
    let option = |name: &&str| format!("path={},serial={name}", folder.join(format!("{name}.img")).display());
    images.iter().flat_map(|name| ["--nvme".to_owned(), option(name)]).collect()
}

fn spec(flags: &[String]) -> MachineSpec {
    let line = ["ferry", "run", "--kernel", "vmlinux"].map(str::to_owned).into_iter();
    let Command::Run(arguments) = Arguments::parse_from(line.chain(flags.iter().cloned())).command else {
        panic!("it is run")
    };
    arguments.machine().unwrap()
}

impl Host {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn with_images() -> Self {
        let host = Self::new();
        for name in ["a.img", "b.img"] {
            fs::write(host.path(name), vec![7; IMAGE_BYTES as usize]).unwrap();
        }
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The process that has or gets both images.
    fn process(&self) -> Arc<Vmm> {
        process_with(&flags(self.folder.path(), &["a", "b"]).iter().map(String::as_str).collect::<Vec<_>>()).0
    }

    /// Another, that has its lease elsewhere.
    fn process_beside(&self) -> Arc<Vmm> {
        let lease = self.path("elsewhere").display().to_string();
        let flags = [flags(self.folder.path(), &["a", "b"]), vec!["--lease".to_owned(), lease]].concat();
        process_with(&flags.iter().map(String::as_str).collect::<Vec<_>>()).0
    }

    /// Images of a guest that runs in it, on their way out.
    fn outgoing(&self) -> Outgoing {
        Self::outgoing_of(&self.process())
    }

    fn outgoing_of(vmm: &Arc<Vmm>) -> Outgoing {
        let mut lease = ownership::open_lease(&vmm.spec).unwrap().unwrap();
        lease.claim().unwrap();
        vmm.return_lease(Some(lease));
        let resources = Arc::new(Resources::open(&vmm.spec, false).unwrap());
        let machine = vmm.prepare_machine(resources).unwrap();
        Outgoing::new(vmm, &machine, &Arc::<Mutex<Option<Lease>>>::default()).unwrap()
    }

    /// Which of [`MACHINES`] would start when the power is back, with no process of before there.
    fn starting(&self, despite: Despite) -> Vec<&'static [&'static str]> {
        let after = tempfile::tempdir().unwrap();
        for name in self.names() {
            fs::copy(self.path(&name), after.path().join(name)).unwrap();
        }
        let starts = |images: &&'static [&str]| {
            let spec = spec(&flags(after.path(), images));
            ownership::check(&spec, despite).and_then(|()| marks::check(&spec, despite)).is_ok()
        };
        MACHINES.into_iter().filter(starts).collect()
    }

    fn assert_none_starts(&self, when: &str) {
        assert!(self.starting(Despite::default()).is_empty(), "{when}: {:?}", self.names());
    }

    fn assert_all_start(&self, when: &str) {
        assert_eq!(self.starting(Despite::default()), MACHINES, "{when}");
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<_> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }

    fn mark(&self, name: &str) -> Option<Mark> {
        Mark::read(&mark_path(&self.path(name))).unwrap()
    }
}

#[test]
fn wherever_a_source_is_cut_off_no_image_that_may_have_left_starts_in_any_machine() {
    let host = Host::with_images();
    let mut outgoing = host.outgoing();
    host.assert_all_start("its guest runs");
    outgoing.prepare_to_leave(&SESSION, "unix:/there").unwrap();
    host.assert_all_start("its guest runs still");
    outgoing.mark_moved(&SESSION, "unix:/there").unwrap();
    host.assert_none_starts("it stands still, and COMMIT may be on its way");
    assert_eq!(host.starting(FORCED), MACHINES);
    drop(outgoing);
    host.assert_none_starts("it has gone");
    assert_eq!(host.starting(FORCED), MACHINES);
    // What lies beside the first image may go with it.
    fs::remove_file(host.path("a.img")).unwrap();
    fs::remove_file(host.path("a.img.ferry-lease")).unwrap();
    host.assert_none_starts("one is gone");
    assert_eq!(host.names(), ["a.img.ferry-mark", "b.img", "b.img.ferry-mark"]);
}

#[test]
fn images_that_did_not_leave_start_in_every_machine_and_nothing_is_left_of_it() {
    let names = ["a.img", "a.img.ferry-lease", "b.img"];
    let host = Host::with_images();
    let mut outgoing = host.outgoing();
    outgoing.prepare_to_leave(&SESSION, "unix:/there").unwrap();
    drop(outgoing);
    assert_eq!(host.names(), names);
    host.assert_all_start("it was cancelled");

    let host = Host::with_images();
    let mut outgoing = host.outgoing();
    outgoing.prepare_to_leave(&SESSION, "unix:/there").unwrap();
    outgoing.mark_moved(&SESSION, "unix:/there").unwrap();
    outgoing.take_back(&SESSION).unwrap();
    host.assert_all_start("the guest is ours again, and was not told yet");
    drop(outgoing);
    assert_eq!(host.names(), names);
    host.assert_all_start("it failed");
}

/// The record could not be written when the guest came back, so that it stood still and its images went on to say that they have moved.
#[test]
fn images_of_a_guest_that_goes_on_after_it_stood_still_say_nothing_any_more() {
    let host = Host::with_images();
    let vmm = host.process();
    let mut outgoing = Host::outgoing_of(&vmm);
    outgoing.prepare_to_leave(&SESSION, "unix:/there").unwrap();
    outgoing.mark_moved(&SESSION, "unix:/there").unwrap();
    drop(outgoing);
    host.assert_none_starts("it stands still");
    // Somebody else's, about an image that this process has as well.
    let theirs = host.mark("b.img").unwrap();
    let owner = engine::lease::Owner::this_process("other").unwrap();
    let theirs = Mark { record: engine::lease::Record { owner, ..theirs.record }, unless: None };
    theirs.write(&mark_path(&host.path("b.img"))).unwrap();
    vmm.take_images_back().unwrap();
    assert_eq!((host.mark("a.img"), host.mark("b.img").as_ref()), (None, Some(&theirs)));
    theirs.remove(&mark_path(&host.path("b.img"))).unwrap();
    host.assert_all_start("it goes on");
    assert_eq!(host.names(), ["a.img", "a.img.ferry-lease", "b.img"]);
}

#[test]
fn images_of_which_one_cannot_be_marked_stay_unmarked() {
    let host = Host::with_images();
    let mut outgoing = host.outgoing();
    // No file is written there.
    fs::create_dir(host.path("b.img.ferry-mark.new")).unwrap();
    let error = outgoing.prepare_to_leave(&SESSION, "unix:/there").unwrap_err();
    assert!(error.to_string().contains("b.img.ferry-mark"), "{error}");
    drop(outgoing);
    fs::remove_dir(host.path("b.img.ferry-mark.new")).unwrap();
    assert_eq!(host.names(), ["a.img", "a.img.ferry-lease", "b.img"]);
}

fn come() -> Vec<Disk> {
    let disk =
        |name: &str| Disk { name: format!("{name}-1"), length_bytes: IMAGE_BYTES, format: "raw".to_owned() };
    vec![disk("a"), disk("b")]
}

/// Images that come, from a guest that fits.
fn make(vmm: &Arc<Vmm>, overwrite: bool, session: Id) -> Shared {
    let mut incoming = Incoming::expect(vmm, ImagesCome { overwrite }, &session, &come()).unwrap();
    incoming.make().unwrap();
    Shared::new(incoming).0
}

/// Whatever may be given up is so only for a guest that fits.
#[test]
fn images_are_looked_for_and_compared_without_touching_what_is_there() {
    let host = Host::with_images();
    drop(host.outgoing());
    let contents = || host.names().into_iter().map(|name| (fs::read(host.path(&name)).unwrap(), name));
    let before: Vec<_> = contents().collect();
    let vmm = host.process();
    let incoming = Incoming::expect(&vmm, ImagesCome { overwrite: true }, &SESSION, &come()).unwrap();
    let machine = vmm.prepare_machine(Arc::new(incoming.stand_ins().unwrap())).unwrap();
    let description = crate::migrate::description::describe(&machine).unwrap();
    let length = description.get("nvme.b.ns.1.capacity_bytes");
    assert_eq!(length, Some(&*IMAGE_BYTES.to_string()), "{description:?}");
    drop(machine);
    assert!(contents().eq(before.iter().cloned()), "an attempt begins");
    host.assert_all_start("it was cut off");
    drop(incoming);
    assert!(contents().eq(before), "it was refused");

    let host = Host::new();
    let incoming = Incoming::expect(&host.process(), ImagesCome { overwrite: false }, &SESSION, &come());
    incoming.unwrap().stand_ins().unwrap();
    assert!(host.names().is_empty(), "{:?}", host.names());
}

#[test]
fn wherever_a_destination_is_cut_off_no_image_that_is_not_all_here_starts_in_any_machine() {
    let host = Host::new();
    let vmm = host.process();
    let expect = || make(&vmm, false, SESSION);
    let mut incoming = expect();
    host.assert_none_starts("they are made");
    assert!(host.starting(FORCED).is_empty());
    incoming.begin().unwrap();
    host.assert_none_starts("they come");
    drop(incoming);
    assert!(host.names().is_empty(), "{:?}", host.names());

    let mut incoming = expect();
    incoming.begin().unwrap();
    incoming.own(&SESSION, &mut || Err("a disk is gone".to_owned())).unwrap_err();
    host.assert_none_starts("NEVER may be on its way");
    drop(incoming);
    assert!(host.names().is_empty(), "{:?}", host.names());

    let mut incoming = expect();
    incoming.begin().unwrap();
    incoming.own(&SESSION, &mut || Ok(())).unwrap();
    host.assert_all_start("the guest is here, and does not run yet");
    drop(incoming);
    assert_eq!(host.names(), ["a.img", "a.img.ferry-lease", "b.img"]);
    host.assert_all_start("it runs");
}

#[test]
fn an_image_alone_is_refused_after_its_destination_was_cut_off_whatever_became_of_the_lease() {
    let host = Host::new();
    // As if it were killed: nothing is undone.
    std::mem::forget(make(&host.process(), false, SESSION));
    fs::remove_file(host.path("a.img.ferry-lease")).unwrap();
    host.assert_none_starts("nobody knows more");
    assert!(host.starting(FORCED).is_empty());
}

/// Images that have left may be given up for a guest that comes back. If it does not, they are what they were.
#[test]
fn what_was_said_of_images_that_stay_is_said_again() {
    let host = Host::with_images();
    let mut outgoing = host.outgoing();
    outgoing.prepare_to_leave(&SESSION, "unix:/there").unwrap();
    outgoing.mark_moved(&SESSION, "unix:/there").unwrap();
    drop(outgoing);
    let marks = ["a.img", "b.img"].map(|name| host.mark(name));
    let names = host.names();

    let vmm = host.process();
    let incoming = make(&vmm, true, [4; 16]);
    for name in ["a.img", "b.img"] {
        let state = host.mark(name).unwrap().record.state;
        assert!(matches!(state, State::Incoming { session: [4, ..] }), "{state}");
    }
    drop(incoming);
    assert_eq!(["a.img", "b.img"].map(|name| host.mark(name)), marks);
    assert_eq!(host.names(), names);
    host.assert_none_starts("they have left");

    let mut incoming = make(&vmm, true, [4; 16]);
    incoming.begin().unwrap();
    drop(incoming);
    assert!(host.names().is_empty(), "they were given up: {:?}", host.names());
}

/// Who is cut off between any two steps leaves what was there aside, or with nothing said of it but what was before: nobody is told to
/// remove what is whole.
#[test]
fn what_was_there_comes_back_when_nothing_is_said_beside_it_any_more() {
    let host = Host::with_images();
    drop(host.outgoing());
    let vmm = host.process();
    let incoming = make(&vmm, true, SESSION);
    let mark = host.path("b.img.ferry-mark");
    // It cannot be taken away.
    fs::remove_file(&mark).unwrap();
    fs::create_dir(&mark).unwrap();
    drop(incoming);
    assert_eq!(fs::read(host.path("b.img.given-up")).unwrap(), vec![7; IMAGE_BYTES as usize]);
    assert_eq!(
        host.names().into_iter().filter(|name| name != "b.img.ferry-mark").collect::<Vec<_>>(),
        ["a.img", "a.img.ferry-lease", "b.img.given-up"]
    );
    let record = ownership::record(&vmm.spec).unwrap().1;
    assert!(matches!(record.state, State::Incoming { .. }), "{record}");

    // What is in its place by now is another's, and has no mark.
    let host = Host::new();
    let vmm = host.process();
    let mut incoming = Incoming::expect(&vmm, ImagesCome { overwrite: false }, &SESSION, &come()).unwrap();
    fs::create_dir(host.path("b.img")).unwrap();
    incoming.make().unwrap_err();
    drop(incoming);
    assert_eq!(host.names(), ["b.img"]);
}

/// Two processes whose leases lie apart come to the same images, or a guest is started from one of them.
#[test]
fn nobody_comes_to_what_is_looked_at_until_it_is_given_up() {
    let host = Host::with_images();
    let (first, second) = (host.process(), host.process_beside());
    let come_to = |vmm| Incoming::expect(vmm, ImagesCome { overwrite: true }, &SESSION, &come());
    let is_held = |name| match block::FileImage::open(host.path(name), block::FileOptions::default()) {
        Ok(_) => false,
        Err(block::Error::Locked { .. }) => true,
        Err(error) => panic!("{error}"),
    };
    let mut incoming = come_to(&first).unwrap();
    assert!(is_held("a.img") && is_held("b.img"));
    let refused = format!("{:#}", come_to(&second).map(drop).unwrap_err());
    assert!(refused.contains("a.img is locked"), "{refused}");
    incoming.make().unwrap();
    assert!(is_held("a.img.given-up"), "it may still be put back");
    let refused = format!("{:#}", come_to(&second).map(drop).unwrap_err());
    assert!(refused.contains("a.img.given-up"), "{refused}");
    let before = fs::File::open(host.path("b.img.given-up")).unwrap();
    let mut shared = Shared::new(incoming).0;
    shared.begin().unwrap();
    assert!(host.names().iter().all(|name| !name.ends_with("given-up")), "{:?}", host.names());
    block::FileImage::open(
        format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&before)),
        block::FileOptions::default(),
    )
    .expect("nobody keeps the room of what was given up");
    drop(shared);
    assert!(host.names().iter().all(|name| name.contains("elsewhere")), "{:?}", host.names());

    // In one that is empty a guest may have begun to write.
    for name in ["a.img", "b.img"] {
        fs::File::create(host.path(name)).unwrap().set_len(IMAGE_BYTES).unwrap();
    }
    let incoming = come_to(&first).unwrap();
    assert!(is_held("a.img") && is_held("b.img"));
    drop(incoming);
    assert!(!is_held("a.img") && !is_held("b.img"));
}

/// Somebody who takes no lock has put another file there meanwhile.
#[test]
fn only_what_was_looked_at_is_given_up() {
    for (is_empty, overwrite) in [(false, true), (true, false)] {
        let host = Host::with_images();
        if is_empty {
            for name in ["a.img", "b.img"] {
                fs::File::create(host.path(name)).unwrap().set_len(IMAGE_BYTES).unwrap();
            }
        }
        let vmm = host.process();
        let mut incoming = Incoming::expect(&vmm, ImagesCome { overwrite }, &SESSION, &come()).unwrap();
        fs::remove_file(host.path("b.img")).unwrap();
        fs::write(host.path("b.img"), "another's").unwrap();
        let error = format!("{:#}", incoming.make().unwrap_err());
        assert!(error.contains("b.img") && error.contains("another file"), "{error}");
        drop(incoming);
        assert_eq!(fs::read(host.path("b.img")).unwrap(), b"another's");
        let lengths = ["a.img", "b.img"].map(|name| fs::metadata(host.path(name)).unwrap().len());
        assert_eq!(lengths, [IMAGE_BYTES, 9]);
        assert!(host.names().iter().all(|name| name.ends_with(".img")), "{:?}", host.names());
    }
}

/// The image lies on another file system than the name that leads to it.
#[test]
fn a_link_to_an_image_goes_on_to_lead_to_what_comes_in_its_place() {
    let host = Host::with_images();
    let far = tempfile::tempdir().unwrap();
    let real = far.path().join("real.img");
    fs::rename(host.path("b.img"), &real).unwrap();
    std::os::unix::fs::symlink(&real, host.path("b.img")).unwrap();
    let names = || {
        let names = fs::read_dir(far.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort_unstable();
        names
    };
    let is_link = || fs::symlink_metadata(host.path("b.img")).unwrap().is_symlink();
    let vmm = host.process();
    let incoming = make(&vmm, true, SESSION);
    assert_eq!(names(), ["real.img", "real.img.ferry-mark", "real.img.given-up"]);
    assert!(is_link());
    drop(incoming);
    assert_eq!((names(), is_link()), (vec!["real.img".to_owned()], true));
    assert_eq!(fs::read(&real).unwrap(), vec![7; IMAGE_BYTES as usize]);

    let mut incoming = make(&vmm, true, SESSION);
    incoming.begin().unwrap();
    assert_eq!(names(), ["real.img", "real.img.ferry-mark"], "its room is free");
    incoming.own(&SESSION, &mut || Ok(())).unwrap();
    drop(incoming);
    assert_eq!((names(), is_link()), (vec!["real.img".to_owned()], true));
}

#[test]
fn who_starts_images_settles_what_is_said_beside_them() {
    let host = Host::with_images();
    let mut outgoing = host.outgoing();
    outgoing.prepare_to_leave(&SESSION, "unix:/there").unwrap();
    let all = spec(&flags(host.folder.path(), &["a", "b"]));
    // Its process was killed.
    std::mem::forget(outgoing);
    marks::settle(&all, Despite::default()).unwrap();
    assert_eq!(host.names(), ["a.img", "a.img.ferry-lease", "b.img"]);

    let host = Host::with_images();
    let mut outgoing = host.outgoing();
    outgoing.prepare_to_leave(&SESSION, "unix:/there").unwrap();
    outgoing.mark_moved(&SESSION, "unix:/there").unwrap();
    drop(outgoing);
    let second = spec(&flags(host.folder.path(), &["b"]));
    let error = format!("{:#}", marks::settle(&second, Despite::default()).unwrap_err());
    let image = fs::canonicalize(host.path("b.img")).unwrap();
    let words = [
        image.to_str().unwrap(),
        "moved to unix:/there in session 03030303",
        "--force-stale",
        "run it there",
    ];
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
    marks::settle(&second, FORCED).unwrap();
    assert!(host.mark("b.img").is_some(), "nobody has it yet");
    marks::forget(&second);
    assert!(host.mark("b.img").is_none() && host.mark("a.img").is_some());
    // What is only read may be stale.
    let mut reads = flags(host.folder.path(), &["a"]);
    reads[1].push_str(",ro");
    marks::check(&spec(&reads), Despite::default()).unwrap();
}

#[test]
fn a_block_device_has_no_mark() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(marks::place(&block_device(folder.path())), None);
    let place = marks::place(Path::new("/nowhere/disk")).unwrap();
    assert_eq!(place.file_name(), Some(OsStr::new("disk.ferry-mark")));
    let said = only_the_lease_tells(Path::new("/dev/nvme0n1"));
    assert!(said.contains("/dev/nvme0n1 is a block device"), "{said}");
}
