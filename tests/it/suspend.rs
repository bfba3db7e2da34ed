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
    let bed = bed();
    let machine = many_disks(&bed);
    let options = format!("{BUSY} doorbells=shadow completion=msix events=2");
    let mut vm = machine.boot(&bed, "before", EXERCISER, &options);
    // It is stopped before its memory is written, so there are no rounds.
    let before = works(&mut vm, &Counters::default());
    let file = bed.path("suspended.ferry");
    vm.migrate(&format!("file:{}", file.display()));
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
    for offset in [whole.len() / 3, whole.len() - 200_000] {
        let mut bytes = whole.clone();
        bytes[offset] ^= 0x10;
        fs::write(&broken, &bytes).expect("a file can be written");
        refused(&bed, &machine, &broken);
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
