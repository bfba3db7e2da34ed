//! Two controllers of one subsystem: each has a namespace of its own to work on, and both have one that they share.

use exerciser::report::{Counters, Line};
use ferry::control::{AccessState, FerryAccess, FerryMember};
use serde_json::json;
use support::{Machine, TestBed, Vm};

use crate::guest::{BUSY, EXERCISER, bed};
use crate::load::{moves, works};

const MIB: u64 = 1 << 20;

/// What both have is read-only, so that the exerciser leaves it alone: it takes every path for a disk of its own.
fn two_paths(bed: &TestBed) -> Machine {
    let image = |name: &str| bed.image(name, 32 * MIB).display().to_string();
    Machine::new("128M")
        .controller("serial=d0,queues=8")
        .controller("serial=d1,queues=8,subsystem-of=d0")
        .namespace(&format!("controller=d0,nsid=1,backend=file,path={},attached=d0", image("a.img")))
        .namespace(&format!("controller=d0,nsid=2,backend=file,path={},attached=d1", image("b.img")))
        .namespace("controller=d1,nsid=9,backend=null,size=1M,ro")
}

/// Controller index and identifier of every namespace that the guest has found.
fn namespaces(vm: &Vm) -> Vec<String> {
    let lines = vm.process.console.all();
    let lines = lines.iter().map(|line| Line::parse(line)).filter(|line| line.kind == "namespace");
    lines.map(|line| ["controller", "nsid"].map(|name| line.get(name).unwrap_or("?")).join(" ")).collect()
}

fn members(vm: &mut Vm) -> Vec<FerryMember> {
    vm.status().disks.into_iter().map(|disk| disk.member.expect("a subsystem with two controllers")).collect()
}

/// Both controllers work before and after; what the operator has set of the second arrives with it, and either names the namespaces.
#[test]
fn two_controllers_of_one_subsystem_move_together() {
    let bed = bed();
    let machine = two_paths(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let mut done = works(&mut source, &Counters::default());
    assert_eq!(namespaces(&source), ["0 1", "0 9", "1 2", "1 9"]);
    let group =
        source.execute("x-ferry-ana-set", json!({ "controller": "d1", "nsid": 9, "state": "inaccessible" }));
    assert_eq!(group, json!({ "group": 9 }));
    let event = source.event("X_FERRY_ANA");
    assert_eq!(event["data"], json!({ "controller": "d1", "group": 9, "state": "inaccessible" }));
    let access = vec![FerryAccess { group: 9, state: AccessState::Inaccessible }];
    let member = |controller_id, access: &[FerryAccess]| FerryMember {
        subsystem: "d0".to_owned(),
        controller_id,
        access: access.to_vec(),
    };
    let expected = [member(0, &[]), member(1, &access)];
    assert_eq!(members(&mut source), expected);
    for hop in 1..=2 {
        let uri = format!("unix:{}", bed.path(&format!("move-{hop}")).display());
        let mut destination = machine.expect(&bed, &format!("destination-{hop}"), &uri);
        let before: Vec<u64> = source.status().disks.iter().map(|disk| disk.completed).collect();
        assert!(before.iter().all(|&completed| completed > 0), "{before:?}");
        (done, _) = moves(&mut source, &mut destination, &done);
        assert_eq!(members(&mut destination), expected);
        let completed: Vec<u64> = destination.status().disks.iter().map(|disk| disk.completed).collect();
        assert!(completed.iter().all(|&completed| completed > 0), "both go on: {completed:?}");
        source.execute("quit", json!({}));
        assert_eq!(source.exit().code(), Some(0));
        source = destination;
    }
    let removed = source.execute("x-ferry-namespace-remove", json!({ "controller": "d1", "nsid": 9 }));
    assert_eq!(removed, json!({ "released": true }));
    let refusal = source.refused("x-ferry-namespace-remove", json!({ "controller": "d0", "nsid": 9 }));
    assert!(refusal.contains("there is none"), "it was that of both: {refusal}");
    source.finish();
}

#[test]
fn a_destination_with_other_paths_is_refused() {
    let bed = bed();
    let mut source = two_paths(&bed).boot(&bed, "source", EXERCISER, BUSY);
    let done = works(&mut source, &Counters::default());
    let image = |name: &str| bed.path(name).display().to_string();
    let apart = Machine::new("128M")
        .controller("serial=d0,queues=8")
        .controller("serial=d1,queues=8")
        .namespace(&format!("controller=d0,nsid=1,backend=file,path={}", image("a.img")))
        .namespace(&format!("controller=d1,nsid=2,backend=file,path={}", image("b.img")))
        .namespace("controller=d0,nsid=9,backend=null,size=1M,ro");
    let destination = apart.expect(&bed, "destination", &format!("unix:{}", bed.path("m").display()));
    source.migrate(destination.uri());
    let reason = source.not_migrated();
    assert!(reason.contains("nvme.d1.subsystem_of"), "{reason}");
    works(&mut source, &done);
    source.finish();
}
