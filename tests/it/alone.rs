//! The exerciser on one process: every way that it can drive the disks, and the ends of a machine.

use exerciser::report::Line;
use serde_json::json;
use support::Vm;

use crate::guest::{EXERCISER, bed, begins, many_disks, one_disk};

/// The fields of all lines of a kind so far.
fn fields(vm: &Vm, kind: &str, names: [&str; 3]) -> Vec<String> {
    let lines = vm.process.console.all();
    let lines = lines.iter().map(|line| Line::parse(line)).filter(|line| line.kind == kind);
    lines.map(|line| names.map(|name| line.get(name).unwrap_or("?")).join(" ")).collect()
}

#[test]
fn one_queue_and_one_namespace() {
    let bed = bed();
    let mut vm = one_disk(&bed).boot(&bed, "vm", EXERCISER, "ios=2000");
    let counters = vm.done();
    assert!(counters.verified >= 2000 && counters.errors == 0, "{counters}");
    assert!(counters.writes > 0 && counters.flushes > 0, "{counters}");
    assert_eq!(vm.exit().code(), Some(0), "a guest that powers off ends its machine well");
    assert_eq!(bed.files(), ["a.img", "a.img.ferry-lease"], "the control socket is gone");
}

#[test]
fn many_queues_and_namespaces_with_holes() {
    let bed = bed();
    let mut vm = many_disks(&bed).boot(&bed, "vm", EXERCISER, "ios=4000 queues=8 inflight=32");
    let counters = vm.done();
    assert!(counters.verified >= 4000 && counters.errors == 0, "{counters}");
    let controllers = fields(&vm, "controller", ["index", "serial", "queues"]);
    assert_eq!(controllers, ["0 d0 8/8", "1 d1 8/8"]);
    let namespaces = fields(&vm, "namespace", ["controller", "nsid", "read_only"]);
    assert_eq!(namespaces, ["0 1 0", "0 4 0", "0 9 1", "1 3 0", "1 77 0"]);
    assert_eq!(vm.exit().code(), Some(0));
}

#[test]
fn shadow_doorbells_interrupts_and_events() {
    let bed = bed();
    let options = "ios=4000 queues=4 inflight=16 doorbells=shadow completion=msix events=2";
    let mut vm = many_disks(&bed).boot(&bed, "vm", EXERCISER, options);
    let counters = vm.done();
    assert!(counters.verified >= 4000 && counters.errors == 0, "{counters}");
    assert!(counters.interrupts > 0, "{counters}");
    assert_eq!(
        fields(&vm, "controller", ["serial", "doorbells", "completion"]),
        ["d0 Shadow Msix", "d1 Shadow Msix"]
    );
    assert_eq!(vm.exit().code(), Some(0));
}

#[test]
fn a_reset_starts_the_guest_again() {
    let bed = bed();
    let mut vm = one_disk(&bed).boot(&bed, "vm", EXERCISER, "ios=500 exit=reset");
    for life in 1..=3 {
        begins(&vm, life);
        let counters = vm.done();
        assert!(counters.verified >= 500 && counters.errors == 0, "{counters}");
    }
    vm.execute("quit", json!({}));
    assert_eq!(vm.exit().code(), Some(0));
    assert_eq!(bed.files(), ["a.img", "a.img.ferry-lease"]);
}
