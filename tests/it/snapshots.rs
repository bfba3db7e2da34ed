//! Snapshots of what has changed since another one, and clones whose disks are overlays.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use exerciser::report::Counters;
use serde_json::json;
use support::{Machine, TestBed, Vm, WATCHDOG};

use crate::guest::{BUSY, EXERCISER, bed, generation_id, one_disk};
use crate::load::{arrives, works};

/// Most of its memory is only looked at; what it writes are the buffers of its commands.
const READER: &str = "queues=4 inflight=128 ram=48M dirty=0 check=40M";

fn snapshot(vm: &mut Vm, file: &Path, parent: Option<&Path>) {
    let mut arguments = json!({ "path": file, "copy-disks": true, "track": true });
    if let Some(parent) = parent {
        arguments["parent"] = json!(parent);
    }
    vm.execute("x-ferry-snapshot", arguments);
    vm.migrated();
}

/// A process that takes the guest out of a file, with more flags.
fn restore(bed: &TestBed, machine: &Machine, name: &str, file: &Path) -> Vm {
    let machine = machine.clone().flag("--incoming", format!("file:{}", file.display()));
    Vm::start(bed, name, machine.flags().to_vec())
}

/// What a process says that must be refused.
fn refused(bed: &TestBed, machine: &Machine, file: &Path) -> String {
    let machine = machine.clone().flag("--incoming", format!("file:{}", file.display()));
    let mut process = bed.ferry("refused", &[&["run".to_owned()], machine.flags()].concat());
    let exit = process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(exit.code(), Some(1), "{}", process.describe("status of"));
    let says = |line: &str| line.starts_with("ferry: ").then(|| line.to_owned());
    process.log.wait_for(0, WATCHDOG, says).expect("a sentence").0
}

/// What the machine says to a snapshot that there is none of.
fn no_snapshot(vm: &mut Vm, file: &Path, parent: &Path) -> String {
    vm.execute("x-ferry-snapshot", json!({ "path": file, "copy-disks": true, "parent": parent }));
    vm.not_migrated()
}

fn allocated_bytes(path: &Path) -> u64 {
    fs::metadata(path).expect("the file is there").blocks() * 512
}

/// On the copies of the images that belong to `file`.
fn on_copies(file: &Path) -> Machine {
    let copy = PathBuf::from(format!("{}.d0-1.raw", file.display()));
    Machine::new("128M").controller("serial=d0,queues=8").image("d0", 1, &copy)
}

fn inspect(file: &Path) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_ferry")).args(["inspect", "--verify"]).arg(file).output();
    let output = output.expect("ferry runs");
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{out}{errors}")
}

#[test]
fn a_child_holds_what_was_written_since_its_parent() {
    let bed = bed();
    let mut vm = one_disk(&bed).boot(&bed, "live", EXERCISER, READER);
    let mut done = works(&mut vm, &Counters::default());
    let files = ["monday", "tuesday", "wednesday"].map(|name| bed.path(&format!("{name}.ferry")));
    let mut before = Vec::new();
    let mut parent = None;
    for file in &files {
        snapshot(&mut vm, file, parent);
        before.push(done);
        parent = Some(file.as_path());
        done = works(&mut vm, &done);
    }
    let sentence = no_snapshot(&mut vm, &bed.path("none.ferry"), &files[0]);
    assert!(sentence.contains("since another one"), "{sentence}");

    let [monday, tuesday, wednesday] = [0, 1, 2].map(|day| allocated_bytes(&files[day]));
    assert!(
        monday > 48 << 20 && tuesday < monday / 2 && wednesday < monday / 2,
        "{monday} {tuesday} {wednesday}"
    );
    let seen = inspect(&files[2]);
    assert!(seen.contains("tuesday.ferry  ") && seen.contains("monday.ferry  "), "{seen}");

    let file =
        json!({ "uri": format!("file:{}", bed.path("none.ferry").display()), "x-ferry-postcopy": "now" });
    let sentence = vm.refused("migrate", file);
    assert!(sentence.contains("postcopy needs a destination that waits"), "{sentence}");
    // A migration that never came to look for pages changes nothing.
    vm.migrate("unix:/nowhere/at/all");
    vm.not_migrated();
    snapshot(&mut vm, &bed.path("thursday.ferry"), Some(&files[2]));
    vm.finish();

    for (file, before) in files.iter().zip(&before).rev() {
        let mut restored = restore(&bed, &on_copies(file), "restored", file);
        arrives(&mut restored, before);
        restored.finish();
    }
    fs::rename(&files[0], bed.path("elsewhere")).expect("a file can be renamed");
    let thursday = bed.path("thursday.ferry");
    let sentence = refused(&bed, &on_copies(&thursday), &thursday);
    assert!(sentence.contains("needs its parent") && sentence.contains("monday.ferry"), "{sentence}");
    assert!(inspect(&thursday).contains("monday.ferry"));
    fs::rename(bed.path("elsewhere"), &files[0]).expect("a file can be renamed");
    // What came out of a file can go on with the chain.
    let machine = on_copies(&thursday).switch("--verify").switch("--track");
    let mut restored = restore(&bed, &machine, "restored", &thursday);
    let after = arrives(&mut restored, &before[2]);
    let friday = bed.path("friday.ferry");
    snapshot(&mut restored, &friday, Some(&thursday));
    restored.finish();
    let mut last = restore(&bed, &on_copies(&friday), "last", &friday);
    arrives(&mut last, &after);
    last.finish();
}

#[test]
fn a_busy_guest_comes_out_of_the_last_of_a_chain() {
    for tracking in ["log", "ring"] {
        let bed = bed();
        let machine = one_disk(&bed).flag("--dirty-tracking", tracking);
        let mut vm = machine.boot(&bed, "live", EXERCISER, BUSY);
        let mut done = works(&mut vm, &Counters::default());
        let files = ["monday", "tuesday", "wednesday"].map(|name| bed.path(&format!("{name}.ferry")));
        let mut parent = None;
        let mut before = done;
        for file in &files {
            before = done;
            snapshot(&mut vm, file, parent);
            parent = Some(file.as_path());
            done = works(&mut vm, &done);
        }
        vm.finish();
        let mut restored = restore(&bed, &on_copies(&files[2]), "restored", &files[2]);
        arrives(&mut restored, &before);
        restored.finish();
    }
}

#[test]
fn clones_run_at_once_on_overlays_over_the_image_of_their_snapshot() {
    let bed = bed();
    let mut vm = one_disk(&bed).boot(&bed, "live", EXERCISER, BUSY);
    let before = works(&mut vm, &Counters::default());
    let file = bed.path("kept.ferry");
    snapshot(&mut vm, &file, None);
    let id = generation_id(&vm);
    vm.finish();
    let base = bed.path("kept.ferry.d0-1.raw");
    let image = fs::read(&base).expect("the image can be read");

    let on_overlay = |name: &str, memory: &str| {
        let overlay = bed.path(&format!("{name}.qcow2"));
        Machine::new(memory).controller("serial=d0,queues=8").namespace(&format!(
            "controller=d0,nsid=1,backend=qcow2,path={},base={}",
            overlay.display(),
            base.display()
        ))
    };
    // One that does not run leaves nothing.
    let sentence = refused(&bed, &on_overlay("other", "256M").switch("--clone"), &file);
    assert!(sentence.contains("ram-low"), "{sentence}");
    let left =
        fs::read_dir(bed.path("")).expect("a folder").map(|entry| entry.expect("an entry").file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with("other")).collect();
    assert!(left.is_empty(), "{left:?}");

    let mut clones =
        ["one", "two"].map(|name| restore(&bed, &on_overlay(name, "128M").switch("--clone"), name, &file));
    for clone in &mut clones {
        arrives(clone, &before);
    }
    // Each knows that it is not the guest that it was.
    let [one, two] = clones.each_ref().map(generation_id);
    assert!(id != one && id != two && one != two, "{id:x?} {one:x?} {two:x?}");
    // Nobody takes the image away under them.
    let sentence = refused(&bed, &on_copies(&file), &file);
    assert!(sentence.contains("locked"), "{sentence}");
    for clone in clones {
        clone.finish();
    }
    assert!(fs::read(&base).expect("the image can be read") == image, "the base is as it was");
    let overlay = fs::metadata(bed.path("one.qcow2")).expect("it is there");
    assert!(overlay.len() < 64 << 20 && overlay.blocks() > 0);

    // It starts anew on its overlay, until its base is another.
    let again = on_overlay("one", "128M");
    again.boot(&bed, "again", EXERCISER, BUSY).finish();
    let mut restored = restore(&bed, &on_copies(&file), "restored", &file);
    arrives(&mut restored, &before);
    restored.finish();
    let flags = [again.flags(), &["--kernel".to_owned(), EXERCISER.to_owned()]].concat();
    let mut process = bed.ferry("refused", &[&["run".to_owned()], &flags[..]].concat());
    let exit = process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(exit.code(), Some(1), "{}", process.describe("status of"));
    let says = |line: &str| line.starts_with("ferry: ").then(|| line.to_owned());
    let sentence = process.log.wait_for(0, WATCHDOG, says).expect("a sentence").0;
    assert!(sentence.contains("not what it was when the overlay was made"), "{sentence}");
}
