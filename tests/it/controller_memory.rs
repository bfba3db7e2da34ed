//! Guests whose queues, data and pages are in memory of their controllers: what is in there arrives with them, and what is persistent is
//! there again when they start anew.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use exerciser::report::Counters;
use serde_json::json;
use stream::frame::Kind;
use support::{Machine, Proxy, TestBed, Vm, WATCHDOG};

use crate::guest::{EXERCISER, bed, error};
use crate::load::{arrives, moves, sends, works};

/// Everything of the driver's that can be is in memory of the controller, and changes all the time.
const IN_CONTROLLER: &str = "queues=4 depth=128 inflight=64 queues_in=cmb pmr=fill dirty=20M";

/// One controller with both kinds of memory, and an image.
fn machine(bed: &TestBed, more: &str) -> Machine {
    let controller = format!("serial=d0,queues=8,cmb=4M,pmr=4M{more}");
    Machine::new("128M").controller(&controller).image("d0", 1, &bed.image("a.img", 64 << 20))
}

/// The same with a folder, in which the contents of the region are a file.
fn machine_with_folder(bed: &TestBed) -> (Machine, std::path::PathBuf) {
    let folder = bed.path("subsystem");
    (machine(bed, &format!(",subsystem={}", folder.display())), folder.join("pmr-0"))
}

fn uri(bed: &TestBed, name: &str) -> String {
    format!("unix:{}", bed.path(name).display())
}

fn quits(mut vm: Vm) {
    vm.execute("quit", json!({}));
    assert_eq!(vm.exit().code(), Some(0));
}

#[test]
fn queues_data_and_pages_in_controller_memory_move_with_their_guest() {
    for options in ["data_in=cmb doorbells=mmio", "data_in=pmr doorbells=shadow completion=msix"] {
        let bed = bed();
        let machine = machine(&bed, "");
        let mut here = machine.boot(&bed, "process-0", EXERCISER, &format!("{IN_CONTROLLER} {options}"));
        let mut done = Counters::default();
        for hop in 1..=2 {
            let mut there = machine.expect(&bed, &format!("process-{hop}"), &uri(&bed, &format!("m{hop}")));
            done = moves(&mut here, &mut there, &done).0;
            quits(std::mem::replace(&mut here, there));
        }
        here.finish();
    }
}

#[test]
fn controller_memory_lies_in_the_file_of_a_suspended_guest() {
    let bed = bed();
    let (machine, region) = machine_with_folder(&bed);
    let mut vm = machine.boot(&bed, "before", EXERCISER, &format!("{IN_CONTROLLER} data_in=cmb"));
    let before = works(&mut vm, &Counters::default());
    let file = bed.path("suspended.ferry");
    vm.migrate(&format!("file:{}", file.display()));
    vm.migrated();
    quits(vm);
    // What is in the file of the guest counts, and not what has become of the region meanwhile.
    fs::write(&region, vec![0xee; 4 << 20]).expect("the region can be written");
    let restored = machine.clone().flag("--incoming", format!("file:{}", file.display()));
    let mut after = Vm::start(&bed, "after", restored.flags().to_vec());
    arrives(&mut after, &before);
    after.finish();
    assert_ne!(fs::read(&region).expect("the region can be read")[..8], [0xee; 8]);
}

#[test]
fn what_is_in_the_persistent_memory_region_is_there_after_a_power_cycle_wherever_the_guest_has_been() {
    let bed = bed();
    let (machine, region) = machine_with_folder(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, &format!("{IN_CONTROLLER} data_in=pmr"));
    let mut destination = machine.expect(&bed, "destination", &uri(&bed, "m"));
    let mapped = fs::metadata(&region).expect("there is a file").ino();
    moves(&mut source, &mut destination, &Counters::default());
    // The folder is shared: what arrived was there already.
    assert_eq!(fs::metadata(&region).expect("there is a file").ino(), mapped);
    destination.finish();
    quits(source);
    let mut again = machine.boot(&bed, "again", EXERCISER, "pmr=kept ios=100");
    assert_eq!(again.done().errors, 0);
    assert_eq!(again.exit().code(), Some(0));
    // A reset keeps it too.
    let mut reset = machine.boot(&bed, "reset", EXERCISER, "pmr=kept exit=reset");
    works(&mut reset, &Counters::default());
    reset.process.type_in("q").expect("the console takes input");
    assert_eq!(reset.done().errors, 0);
    works(&mut reset, &Counters::default());
    quits(reset);
    // Without what the runs have left, the guest finds it wrong.
    let mut contents = fs::read(&region).expect("the region can be read");
    contents[12_345] ^= 1;
    fs::write(&region, contents).expect("the region can be written");
    let wrong = machine.boot(&bed, "wrong", EXERCISER, "pmr=kept ios=100");
    let error = error(&wrong);
    assert!(error.contains("page"), "{error}");
}

/// Bytes and identity of the file, by which a write or a replacement would show.
fn seen(region: &Path) -> (Vec<u8>, u64) {
    let contents = fs::read(region).expect("the region can be read");
    (contents, fs::metadata(region).expect("the region is there").ino())
}

#[test]
fn a_destination_writes_nothing_to_the_folder_before_the_guest_is_its_own() {
    let bed = bed();
    let (machine, region) = machine_with_folder(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, &format!("{IN_CONTROLLER} data_in=cmb"));
    let path = bed.path("to");
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", path.display()));
    let proxy = Proxy::new(&bed, "by", &path, Kind::Commit);
    let before = sends(&mut source, proxy.uri(), &Counters::default());
    let held = proxy.held();
    // All of the guest is there, and the source has given up the folder. It is the source's all the same.
    let at_commit = seen(&region);
    proxy.refuse_more();
    held.cut_sender();
    source.not_migrated();
    assert!(source.owns_a_running_guest());
    let mut now = works(&mut source, &before);
    // What it has told of first may be from before the attempt.
    for _ in 0..20 {
        if seen(&region).0 != at_commit.0 {
            break;
        }
        now = works(&mut source, &now);
    }
    assert_ne!(seen(&region).0, at_commit.0, "the source's guest goes on in it");
    held.deliver();
    assert!(proxy.saw(Kind::Never, WATCHDOG));
    drop(held);
    assert_eq!(seen(&region).1, at_commit.1, "it was not replaced");
    moves(&mut source, &mut destination, &now);
    destination.finish();
    let mut again = machine.boot(&bed, "again", EXERCISER, "pmr=kept ios=100");
    assert_eq!(again.done().errors, 0);
    assert_eq!(again.exit().code(), Some(0));
}

#[test]
fn a_destination_with_other_memory_is_refused() {
    let bed = bed();
    let machine = machine(&bed, "");
    let mut source = machine.boot(&bed, "source", EXERCISER, IN_CONTROLLER);
    let other = Machine::new("128M").controller("serial=d0,queues=8,cmb=4M,pmr=2M");
    let other = other.image("d0", 1, &bed.path("a.img"));
    let destination = other.expect(&bed, "destination", &uri(&bed, "m"));
    source.migrate(destination.uri());
    let reason = source.not_migrated();
    assert!(reason.contains("nvme.d0.pmr_bytes"), "{reason}");
    assert!(source.owns_a_running_guest());
    works(&mut source, &Counters::default());
    source.finish();
}

#[test]
fn contents_of_another_size_are_named() {
    let bed = bed();
    let (machine, region) = machine_with_folder(&bed);
    fs::create_dir(region.parent().expect("a folder")).expect("a folder can be made");
    fs::write(&region, [0; 4096]).expect("a file can be written");
    let flags = machine.clone().flag("--kernel", EXERCISER);
    let mut process = bed.ferry("refused", &[&["run".to_owned()], flags.flags()].concat());
    let exit = process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(exit.code(), Some(1), "{}", process.describe("status of"));
    let says = |line: &str| line.starts_with("ferry: ").then(|| line.to_owned());
    let sentence = process.log.wait_for(0, WATCHDOG, says).expect("a sentence").0;
    assert!(sentence.contains("pmr-0 has 4096 bytes") && sentence.contains("4194304"), "{sentence}");
    assert_eq!(fs::read(&region).expect("the file is there"), [0; 4096]);
}
