//! In which pages a guest lies, and that it moves from any into any.

use exerciser::report::Counters;
use ferry::control::MigrationStatus;
use serde_json::json;
use support::{Machine, TestBed, Vm, has_transparent_huge_pages};

use crate::guest::{BUSY, EXERCISER, MEMORY, bed, one_disk};
use crate::load::{arrives, moves, works};

/// What the kernel says of the mapping of guest memory below 3 GiB, of the process of that number: whether it asks for huge pages, and
/// how many KiB are mapped by such.
fn mapped(process: u32) -> (bool, u64) {
    let all = std::fs::read_to_string(format!("/proc/{process}/smaps")).expect("the process is there");
    let after = |name: &str| all.split_once(name).expect("it is said").1;
    let memory = after(MEMORY);
    let of_memory = |name: &str| {
        let line = memory.lines().find_map(|line| line.strip_prefix(name)).expect("it is said");
        line.trim().to_owned()
    };
    let asks = of_memory("VmFlags:").split(' ').any(|flag| flag == "hg");
    let huge = of_memory("ShmemPmdMapped:").trim_end_matches(" kB").parse().expect("a number");
    (asks, huge)
}

/// What was asked for is so.
fn lies(vm: &Vm, is_transparent: bool, gives: bool) {
    let (asks, huge) = mapped(vm.process.id());
    assert_eq!(asks, is_transparent);
    assert_eq!(huge > 0, is_transparent && gives, "{huge} KiB in huge pages");
}

/// On a host that gives huge pages to shared memory; elsewhere the same is done in small ones.
#[test]
fn a_guest_moves_between_transparent_huge_pages_and_small_ones() {
    let gives = has_transparent_huge_pages();
    let bed = bed();
    let transparent = one_disk(&bed);
    let small = transparent.clone().switch("--hugepages=off");
    let mut here = transparent.boot(&bed, "process-0", EXERCISER, BUSY);
    lies(&here, true, gives);
    let mut done = Counters::default();
    let hops: [(&Machine, _); 5] = [
        (&small, json!({})),
        (&transparent, json!({})),
        (&transparent, json!({ "x-ferry-postcopy": "now" })),
        (&transparent, json!({ "x-ferry-postcopy": "after-first-round" })),
        (&transparent, json!({ "x-ferry-local": true })),
    ];
    for (hop, (machine, how)) in hops.into_iter().enumerate() {
        let uri = format!("unix:{}", bed.path(&format!("m{hop}")).display());
        let mut there = machine.expect(&bed, &format!("process-{}", hop + 1), &uri);
        done = goes(&mut here, &mut there, how, &done);
        let process = there.process.id();
        // Not while memory is missing.
        let is_transparent = std::ptr::eq(machine, &transparent);
        done = there.progress("the pages that it asks for", |now| {
            now.verified > done.verified && mapped(process).0 == is_transparent
        });
        // What was written before a move is there in small pages where all of it followed the guest.
        if hop != 2 {
            lies(&there, is_transparent, gives);
        }
        here.execute("quit", json!({}));
        assert_eq!(here.exit().code(), Some(0));
        here = there;
    }
    restored(&bed, here, &transparent, &done);
}

fn goes(here: &mut Vm, there: &mut Vm, how: serde_json::Value, done: &Counters) -> Counters {
    let is_late = how.get("x-ferry-postcopy").is_some();
    if !is_late && how.get("x-ferry-local").is_none() {
        return moves(here, there, done).0;
    }
    let before = works(here, done);
    here.execute("migrate-set-parameters", json!({ "downtime-limit": if is_late { 0 } else { 300 } }));
    let mut target = how;
    target["uri"] = there.uri().into();
    here.migrate_with(target);
    here.migrated();
    there.wait_for_migration("all memory", |info| info.status == MigrationStatus::Completed);
    arrives(there, &before)
}

/// Out of a file memory comes page by page; when all of it is there, huge ones are asked for again.
fn restored(bed: &TestBed, mut here: Vm, machine: &Machine, done: &Counters) {
    let file = format!("file:{}", bed.path("suspended").display());
    let before = works(&mut here, done);
    here.migrate(&file);
    here.migrated();
    here.execute("quit", json!({}));
    assert_eq!(here.exit().code(), Some(0));
    let flags = machine.clone().flag("--incoming", &file);
    let mut here = Vm::start(bed, "restored", flags.flags().to_vec());
    arrives(&mut here, &before);
    let process = here.process.id();
    here.progress("all memory", |_| mapped(process).0);
    here.finish();
}
