//! Guests in files: suspended, restored, and never restored twice.

use std::fs;
use std::path::Path;

use engine::lease::State;
use exerciser::report::Counters;
use serde_json::json;
use support::{Machine, TestBed, Vm, WATCHDOG};

use crate::guest::{BUSY, EXERCISER, bed, lease, many_disks, one_disk};
use crate::load::{arrives, works};

fn restore(bed: &TestBed, machine: &Machine, name: &str, file: &Path) -> Vm {
    Vm::start(
        bed,
        name,
        machine.clone().flag("--incoming", format!("file:{}", file.display())).flags().to_vec(),
    )
}

/// Tries to restore `file`, which must be refused; what is said.
fn refused(bed: &TestBed, machine: &Machine, file: &Path) -> String {
    refusal(bed, machine.clone().flag("--incoming", format!("file:{}", file.display())).flags())
}

/// Tries to run a machine of these flags, which must be refused; what is said.
fn refusal(bed: &TestBed, flags: &[String]) -> String {
    let mut process = bed.ferry("refused", &[&["run".to_owned()], flags].concat());
    let exit = process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(exit.code(), Some(1), "{}", process.describe("status of"));
    let says = |line: &str| line.starts_with("ferry: ").then(|| line.to_owned());
    process.log.wait_for(0, WATCHDOG, says).expect("a sentence").0
}

#[test]
fn a_suspended_guest_goes_on_once() {
    goes_on_once("mapped");
}

#[test]
fn a_guest_that_was_suspended_into_a_stream_goes_on_once() {
    goes_on_once("stream");
}

fn goes_on_once(layout: &str) {
    let bed = bed();
    let machine = many_disks(&bed);
    let options = format!("{BUSY} doorbells=shadow completion=msix events=2");
    let mut vm = machine.boot(&bed, "before", EXERCISER, &options);
    // It is stopped before its memory is written, so there are no rounds.
    let before = works(&mut vm, &Counters::default());
    let file = bed.path("suspended.ferry");
    vm.migrate(&format!("file:{},layout={layout}", file.display()));
    vm.migrated();
    assert!(matches!(lease(&bed).state, State::InFile { .. }), "{}", lease(&bed));
    assert!(vm.refused("cont", json!({})).contains("lives elsewhere"));
    vm.execute("quit", json!({}));
    assert_eq!(vm.exit().code(), Some(0));

    // Files that are not what was written: nothing runs, and the lease still says where the guest is.
    let whole = fs::read(&file).expect("the file can be read");
    let broken = bed.path("broken.ferry");
    for length in [whole.len() - 1, whole.len() / 2, 100, 0] {
        fs::write(&broken, &whole[..length]).expect("a file can be written");
        refused(&bed, &machine, &broken);
    }
    let verified = machine.clone().switch("--verify");
    for offset in [whole.len() / 3, whole.len() - 200_000] {
        // Something that was written: holes are not read.
        let offset = (offset..whole.len()).find(|at| whole[*at] != 0).expect("a byte");
        let mut bytes = whole.clone();
        bytes[offset] ^= 0x10;
        fs::write(&broken, &bytes).expect("a file can be written");
        refused(&bed, &verified, &broken);
    }
    assert!(matches!(lease(&bed).state, State::InFile { .. }), "{}", lease(&bed));

    let mut after = restore(&bed, &machine, "after", &file);
    arrives(&mut after, &before);
    assert_eq!(lease(&bed).generation, 2);
    after.finish();

    // The disks have moved on.
    let sentence = refused(&bed, &machine, &file);
    assert!(sentence.contains("generation 1") && sentence.contains("generation 2"), "{sentence}");
}

#[test]
fn a_suspended_guest_is_given_up_only_on_request() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut vm = machine.boot(&bed, "before", EXERCISER, BUSY);
    vm.verifies(0, 1000);
    let file = bed.path("suspended.ferry");
    vm.migrate(&format!("file:{}", file.display()));
    vm.migrated();
    vm.execute("quit", json!({}));
    assert_eq!(vm.exit().code(), Some(0));
    let suspended = lease(&bed);

    let kernel = machine.clone().flag("--kernel", EXERCISER).flag("--cmdline", BUSY);
    let sentence = refusal(&bed, kernel.flags());
    assert!(sentence.contains("--incoming") && sentence.contains("--discard-suspended"), "{sentence}");
    assert_eq!(lease(&bed), suspended);

    let mut anew = machine.clone().switch("--discard-suspended").boot(&bed, "anew", EXERCISER, BUSY);
    anew.verifies(0, 100);
    anew.finish();
    let sentence = refused(&bed, &machine, &file);
    assert!(sentence.contains("generation 1") && sentence.contains("generation 2"), "{sentence}");
}

/// Damages memory of `file`, a mapped one, that the guest is about to use; says where in its memory that is.
fn damage_memory(file: &Path) -> u64 {
    const PAGES_START: usize = 1 << 20;
    let mut bytes = fs::read(file).expect("the file can be read");
    // The guest looks at all of its memory again and again: the middle of what it has written.
    let in_use = |page: &usize| bytes[*page..page + 4096].iter().any(|byte| *byte != 0);
    let pages: Vec<_> = (PAGES_START..PAGES_START + (64 << 20)).step_by(4096).filter(in_use).collect();
    let page = pages[pages.len() / 2];
    let byte = (page..page + 4096).find(|at| bytes[*at] != 0).expect("a byte");
    bytes[byte] ^= 1;
    fs::write(file, &bytes).expect("the file can be written");
    (page - PAGES_START) as u64
}

#[test]
fn a_guest_whose_memory_is_damaged_ends_with_the_place() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut vm = machine.boot(&bed, "before", EXERCISER, BUSY);
    vm.verifies(0, 1000);
    let file = bed.path("suspended.ferry");
    vm.migrate(&format!("file:{}", file.display()));
    vm.migrated();
    vm.execute("quit", json!({}));
    assert_eq!(vm.exit().code(), Some(0));
    let offset = damage_memory(&file);

    let sentence = refused(&bed, &machine.clone().switch("--verify"), &file);
    let chunk = format!("memory at {:#x} of block \"ram-low\"", offset & !0xf_ffff);
    assert!(sentence.contains(&chunk), "{sentence}: {chunk}");
    assert!(matches!(lease(&bed).state, State::InFile { .. }), "{}", lease(&bed));
    // It runs, and ends when that place is read.
    let sentence = refused(&bed, &machine, &file);
    assert!(sentence.contains("the guest cannot go on") && sentence.contains(&chunk), "{sentence}");
    assert_eq!(lease(&bed).generation, 2, "it was ours");
}

#[test]
fn a_guest_goes_on_while_a_snapshot_keeps_what_it_was() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut vm = machine.boot(&bed, "live", EXERCISER, BUSY);
    let before = works(&mut vm, &Counters::default());
    let file = bed.path("kept.ferry");
    vm.execute("x-ferry-snapshot", json!({ "path": file, "copy-disks": true }));
    vm.migrated();
    let after = works(&mut vm, &before);
    let kept = lease(&bed);
    assert_eq!((kept.state, kept.generation), (State::Owned, 2));

    // Its own disk is another one by now, whether it still runs or not.
    let sentence = refused(&bed, &machine, &file);
    assert!(sentence.contains("locked") || sentence.contains("held"), "{sentence}");
    vm.finish();
    let sentence = refused(&bed, &machine, &file);
    assert!(sentence.contains("generation 1") && sentence.contains("generation 2"), "{sentence}");

    // Copies of it run at the same time, on copies of that disk.
    let clone = |name: &str| {
        let machine = Machine::new("128M").controller("serial=d0,queues=8");
        let machine = machine.image("d0", 1, &bed.path(&format!("{name}.raw")));
        restore(&bed, &machine.switch("--clone").switch("--copy-disks"), name, &file)
    };
    let mut clones = [clone("one"), clone("two")];
    for clone in &mut clones {
        arrives(clone, &before);
    }
    for clone in clones {
        clone.finish();
    }

    // On the copy of its disk it is what it was, once.
    let copy = bed.path("kept.ferry.d0-1.raw");
    let past = Machine::new("128M").controller("serial=d0,queues=8").image("d0", 1, &copy);
    let mut restored = restore(&bed, &past, "past", &file);
    arrives(&mut restored, &before);
    let sentence = refused(&bed, &past, &file);
    assert!(!sentence.is_empty());
    restored.finish();
    let sentence = refused(&bed, &past, &file);
    assert!(sentence.contains("generation 1") && sentence.contains("generation 2"), "{sentence}");
    assert!(after.verified > before.verified);
}

#[test]
fn a_machine_that_is_killed_in_a_snapshot_leaves_nothing_of_it() {
    let bed = bed();
    let mut vm = one_disk(&bed).boot(&bed, "killed", EXERCISER, BUSY);
    vm.verifies(0, 1000);
    let file = bed.path("kept.ferry");
    vm.execute("x-ferry-snapshot", json!({ "path": file, "copy-disks": true }));
    vm.kill();
    let kept = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with("kept.ferry");
    let folder = fs::read_dir(bed.path("")).expect("a folder").map(|entry| entry.expect("an entry"));
    let left: Vec<_> = folder.filter(kept).map(|entry| entry.file_name()).collect();
    // All of it or nothing: the file comes last.
    assert!(left.is_empty() || left.len() == 3, "{left:?}");
}
