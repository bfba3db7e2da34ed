//! A guest that takes its images along: where they are, and what is left where they were.
//!
//! Images that were left are refused with the reason, and so are those that never came whole, unless they are gone. Between the two
//! writes of the hand-over both ends refuse, and the operator, who knows that nothing came, forces the one that was left.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use block::Qcow2Image;
use engine::lease::{Lease, Owner, Record, State, mark_path};
use support::{Machine, TestBed, WATCHDOG};

use super::decision::Outcome;
use crate::guest::EXERCISER;

/// Between two looks at what is left.
const LOOK: Duration = Duration::from_millis(5);
const MIB: u64 = 1 << 20;
const RAW_BYTES: u64 = 48 * MIB;
const QCOW2_BYTES: u64 = 16 * MIB;

/// What the record at `path` says, if there is one.
pub fn record(path: &Path) -> Option<Record> {
    let reader = Owner::this_process("test").expect("randomness");
    // One that was made, and not written any more, says nothing.
    path.exists()
        .then(|| Lease::open_existing(path, reader).expect("it can be opened").read())?
        .expect("a record")
}

/// A machine on images of its own, whether they are there or not.
#[derive(Clone, Debug)]
struct Host {
    raw: PathBuf,
    qcow2: PathBuf,
    /// Beside the first of them.
    lease: PathBuf,
    machine: Machine,
}

impl Host {
    /// With nothing there. What both read and nobody writes is at `shared`.
    fn new(bed: &TestBed, name: &str, shared: &Path) -> Self {
        let [raw, qcow2, lease] =
            ["img", "qcow2", "img.ferry-lease"].map(|kind| bed.path(&format!("{name}.{kind}")));
        let machine = Machine::new("128M")
            .controller("serial=d0,queues=8")
            .image("d0", 1, &raw)
            .namespace(&format!("controller=d0,nsid=4,backend=qcow2,path={}", qcow2.display()))
            .namespace(&format!("controller=d0,nsid=9,backend=file,path={},ro", shared.display()));
        Self { raw, qcow2, lease, machine }
    }

    /// Makes images that are all holes.
    fn make_images(&self) {
        let make = |path| File::options().read(true).write(true).create_new(true).open(path);
        make(&self.raw).and_then(|file| file.set_len(RAW_BYTES)).expect("an image can be made");
        let file = make(&self.qcow2).expect("an image can be made");
        Qcow2Image::create(file, &self.qcow2, QCOW2_BYTES).expect("an image can be made");
    }

    fn has_images(&self) -> bool {
        self.raw.exists() || self.qcow2.exists()
    }

    fn state(&self) -> Option<State> {
        record(&self.lease).map(|record| record.state)
    }

    /// `ferry run` on these images ends with a sentence that has all of `words` in it.
    fn is_refused(&self, bed: &TestBed, words: &[&str]) {
        let flags = self.machine.clone().flag("--kernel", EXERCISER);
        let mut process = bed.ferry("refused", &[&["run".to_owned()], flags.flags()].concat());
        let exit = process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(exit.code(), Some(1), "{}", process.describe("status of"));
        let sentence = |line: &str| line.starts_with("ferry: ").then(|| line.to_owned());
        let (said, _) = process.log.wait_for(0, WATCHDOG, sentence).expect("a sentence");
        assert!(words.iter().all(|word| said.contains(word)), "{words:?} are not all in {said:?}");
    }

    fn marks(&self) -> [PathBuf; 2] {
        [&self.raw, &self.qcow2].map(|image| mark_path(image))
    }

    /// A machine on the second image alone, to which the lease beside the first says nothing, is refused as well.
    fn is_refused_in_part(&self, bed: &TestBed, words: &[&str]) {
        let second = format!("controller=d0,nsid=4,backend=qcow2,path={}", self.qcow2.display());
        let machine = Machine::new("128M").controller("serial=d0,queues=8").namespace(&second);
        Self { machine, ..self.clone() }.is_refused(bed, words);
    }

    /// Nothing is left of an attempt whose destination lives, as soon as that has heard of all: what lay before it when it stood still may be
    /// a whole attempt.
    fn is_empty(&self) {
        let marks = self.marks();
        let all = [&self.raw, &self.qcow2, &self.lease].into_iter().chain(&marks);
        let all: Vec<_> = all.collect();
        let end = Instant::now() + WATCHDOG;
        while all.iter().any(|path| path.exists()) {
            let left = all.iter().filter(|path| path.exists());
            assert!(Instant::now() < end, "{:?}, {:?}", left.collect::<Vec<_>>(), self.state());
            std::thread::sleep(LOOK);
        }
    }

    fn remove(self) {
        let marks = self.marks();
        for path in [self.raw, self.qcow2, self.lease].iter().chain(&marks) {
            fs::remove_file(path).expect("it is there");
        }
    }
}

/// Where the images of the guest are, and where they go.
#[derive(Debug)]
pub struct Travel {
    shared: PathBuf,
    here: Host,
    /// Where it is to go, once that was chosen.
    there: Option<Host>,
    /// They say that they were left, and nothing came of it.
    is_forced: bool,
}

impl Travel {
    /// A guest that has not begun, and its images.
    pub fn new(bed: &TestBed) -> Self {
        let shared = bed.image("shared.img", 8 * MIB);
        let here = Host::new(bed, "images-0", &shared);
        here.make_images();
        Self { shared, here, there: None, is_forced: false }
    }

    /// The machine to start it on from the beginning.
    pub fn boots(&mut self) -> Machine {
        let machine = self.here.machine.clone();
        if std::mem::take(&mut self.is_forced) { machine.switch("--force-stale") } else { machine }
    }

    /// The machine that waits for it and its images: called so if it is another than before. What a process that was killed has left
    /// there is given up.
    pub fn expects(&mut self, bed: &TestBed, name: &str) -> Machine {
        let there =
            self.there.get_or_insert_with(|| Host::new(bed, &format!("images-of-{name}"), &self.shared));
        let machine = there.machine.clone().switch("--with-storage");
        if there.has_images() { machine.switch("--overwrite") } else { machine }
    }

    /// The record beside the images of the destination.
    pub fn record_there(&self) -> PathBuf {
        self.there.as_ref().expect("it goes somewhere").lease.clone()
    }

    /// A migration has ended; `is_heard` if the process at the destination lives. The images are where the guest is, and those at the
    /// other end are refused, or gone.
    pub fn ended(&mut self, bed: &TestBed, outcome: Outcome, is_heard: bool) {
        let there = self.there.take().expect("it went somewhere");
        let (left, came) = (self.here.state().expect("there is a record"), there.state());
        let (has_moved, is_taken) =
            (matches!(left, State::Moved { .. }), matches!(came, Some(State::Taken { .. })));
        match outcome {
            Outcome::AtDestination => assert!(is_taken, "{came:?}"),
            // As it was, or taken back.
            Outcome::AtSource => assert!(!has_moved && !is_taken, "{left:?} and {came:?}"),
            Outcome::Dead => {}
        }
        assert!(has_moved || !is_taken, "both ends let the guest start: {left:?} and {came:?}");
        if has_moved {
            self.here.is_refused(bed, &["moved to", "--force-stale"]);
            self.here.is_refused_in_part(bed, &["moved to", "--force-stale"]);
        }
        if is_taken {
            std::mem::replace(&mut self.here, there).remove();
            return;
        }
        self.is_forced = has_moved;
        if is_heard {
            there.is_empty();
        } else if there.has_images() {
            there.is_refused(bed, &["never came whole", "incoming", "--overwrite"]);
        }
        self.there = Some(there);
    }
}
