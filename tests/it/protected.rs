//! Namespaces whose blocks have protection information: the controller makes it of what the guest writes, and checks it of what it reads.

use std::fs::File;
use std::os::unix::fs::FileExt;

use exerciser::report::{Counters, Line};
use serde_json::json;
use support::{Machine, TestBed, Vm};

use crate::guest::{BUSY, EXERCISER, bed, error};
use crate::load::{moves, works};

const MIB: u64 = 1 << 20;

/// Types 1 to 3, in buffers of their own and at the end of blocks, in front of and behind what a hole makes of them.
fn protected(bed: &TestBed) -> Machine {
    let image = |name: &str| bed.image(name, 32 * MIB).display().to_string();
    Machine::new("128M")
        .controller("serial=d0,queues=8")
        .namespace(&format!("controller=d0,nsid=1,backend=file,path={},metadata=8,pi=1", image("a.img")))
        .namespace(&format!(
            "controller=d0,nsid=4,backend=file,path={},lba=4096,metadata=8,extended,pi=2",
            image("b.img")
        ))
        .namespace("controller=d0,nsid=5,backend=memory,size=32M,lba=4096,metadata=8,pi=3,pi-first")
}

/// Identifier and protection of every namespace that the guest has found.
fn namespaces(vm: &Vm) -> Vec<String> {
    let lines = vm.process.console.all();
    let lines = lines.iter().map(|line| Line::parse(line)).filter(|line| line.kind == "namespace");
    lines.map(|line| ["nsid", "protection"].map(|name| line.get(name).unwrap_or("?")).join(" ")).collect()
}

#[test]
fn blocks_with_protection_information_move_with_their_guest() {
    let bed = bed();
    let machine = protected(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let mut done = works(&mut source, &Counters::default());
    assert_eq!(namespaces(&source), ["1 1", "4 2", "5 3"]);
    for hop in 1..=2 {
        let uri = format!("unix:{}", bed.path(&format!("move-{hop}")).display());
        let mut destination = machine.expect(&bed, &format!("destination-{hop}"), &uri);
        (done, _) = moves(&mut source, &mut destination, &done);
        let disks = destination.status().disks;
        assert!(disks.iter().all(|disk| disk.completed > 0), "it goes on there");
        source.execute("quit", json!({}));
        assert_eq!(source.exit().code(), Some(0));
        source = destination;
    }
    source.finish();
}

/// One bit of one block is enough, and the guest is told which block it is.
#[test]
fn a_block_that_was_damaged_beneath_is_not_read() {
    let bed = bed();
    let machine = protected(&bed);
    let mut vm = machine.boot(&bed, "damaged", EXERCISER, "span=64K ram=4M dirty=1M");
    works(&mut vm, &Counters::default());
    vm.execute("stop", json!({}));
    let image = File::options().read(true).write(true).open(bed.path("a.img")).unwrap();
    let mut data = vec![0; 64 << 10];
    image.read_exact_at(&mut data, 0).unwrap();
    data.iter_mut().for_each(|byte| *byte ^= 1);
    image.write_all_at(&data, 0).unwrap();
    vm.execute("cont", json!({}));
    let error = error(&vm);
    assert!(error.contains("kind=status") && error.contains("status=0x282"), "{error}");
}

#[test]
fn a_destination_with_other_protection_is_refused() {
    let bed = bed();
    let mut source = protected(&bed).boot(&bed, "source", EXERCISER, BUSY);
    let done = works(&mut source, &Counters::default());
    let path = |name: &str| bed.path(name).display().to_string();
    let other = Machine::new("128M")
        .controller("serial=d0,queues=8")
        .namespace(&format!("controller=d0,nsid=1,backend=file,path={},metadata=8,pi=2", path("a.img")))
        .namespace(&format!("controller=d0,nsid=4,backend=file,path={},lba=4096", path("b.img")))
        .namespace("controller=d0,nsid=5,backend=memory,size=32M,lba=4096,metadata=8,pi=3,pi-first");
    let destination = other.expect(&bed, "destination", &format!("unix:{}", bed.path("m").display()));
    source.migrate(destination.uri());
    let reason = source.not_migrated();
    for part in ["nvme.d0.ns.1.pi", "nvme.d0.ns.4.metadata"] {
        assert!(reason.contains(part), "{reason}");
    }
    assert!(!reason.contains("ns.5"), "{reason}");
    works(&mut source, &done);
    source.finish();
}
