//! A controller with everything that it can be asked for at once: 64 queue pairs in use, and 256 namespaces with holes between them.

use exerciser::report::Counters;
use ferry::control::FerryDowntime;
use serde_json::json;
use support::{Machine, TestBed, Vm};

use crate::guest::{EXERCISER, bed, one_disk};
use crate::inspect::{arguments, inspected};
use crate::load::{arrives, moves, were_busy, works};

const QUEUES: usize = 64;
const NAMESPACES: u32 = 256;

/// What is done there: every queue has commands in flight, and every namespace that can be written to is verified all the time. The
/// RAM is that of [`crate::guest::BUSY`], so that downtimes can be compared.
const BUSY: &str = "queues=64 depth=32 inflight=256 span=64K ram=16M dirty=20M";

/// Identifiers of the namespaces, from 1 to 1,024: three of four are followed by a hole.
fn identifiers() -> impl Iterator<Item = u32> {
    (0..NAMESPACES).map(|index| 1 + 4 * index + index % 4)
}

/// A fifth of them are files without blocks, a fifth are null, which the exerciser leaves alone, and the others memory.
fn large(bed: &TestBed) -> Machine {
    let machine =
        Machine::new("128M").flag("--io-threads", "2").controller(&format!("serial=d0,queues={QUEUES}"));
    identifiers().fold(machine, |machine, nsid| match nsid % 5 {
        0 => machine.image("d0", nsid, &bed.image(&format!("{nsid}.img"), 1 << 20)),
        1 => machine.namespace(&format!("controller=d0,nsid={nsid},backend=null,size=1G,ro")),
        2 => machine.namespace(&format!("controller=d0,nsid={nsid},backend=memory,size=128K,lba=4096")),
        _ => machine.namespace(&format!("controller=d0,nsid={nsid},backend=memory,size=128K")),
    })
}

fn downtime(source: &mut Vm) -> FerryDowntime {
    source.status().migration.and_then(|migration| migration.downtime).expect("a downtime")
}

/// Moves `machine` to another process, and says how many commands were in flight at its stop.
fn move_once(bed: &TestBed, machine: &Machine, what: &str, options: &str) -> u32 {
    let mut source = machine.boot(bed, &format!("source of {what}"), EXERCISER, options);
    let uri = format!("unix:{}", bed.path(&format!("move of {what}")).display());
    let mut destination = machine.expect(bed, &format!("destination of {what}"), &uri);
    let (_, in_flight) = moves(&mut source, &mut destination, &Counters::default());
    println!("measured: {what}: microseconds of {:?}", downtime(&mut source));
    source.execute("quit", json!({}));
    assert_eq!(source.exit().code(), Some(0));
    destination.finish();
    in_flight
}

#[test]
fn queue_pairs_and_namespaces_in_large_numbers_move_busy() {
    were_busy(|| {
        let bed = bed();
        let (large, small) = (large(&bed), one_disk(&bed).flag("--io-threads", "2"));
        let shadow = |options: &str| format!("{options} doorbells=shadow completion=msix");
        let one_pair = "queues=1 depth=32 inflight=256 span=64K ram=16M dirty=20M";
        move_once(&bed, &small, "1 queue pair with shadow doorbells and 1 namespace", &shadow(one_pair));
        [
            move_once(&bed, &large, "64 queue pairs and 256 namespaces", BUSY),
            move_once(&bed, &large, "64 queue pairs with shadow doorbells and 256 namespaces", &shadow(BUSY)),
        ]
    });
}

#[test]
fn queue_pairs_and_namespaces_in_large_numbers_lie_in_a_file() {
    let bed = bed();
    let machine = large(&bed);
    let options = format!("{BUSY} doorbells=shadow completion=msix");
    let mut vm = machine.boot(&bed, "before", EXERCISER, &options);
    let before = works(&mut vm, &Counters::default());
    let file = bed.path("suspended.ferry");
    vm.migrate(&format!("file:{}", file.display()));
    vm.migrated();
    vm.execute("quit", json!({}));
    assert_eq!(vm.exit().code(), Some(0));

    let document = inspected(arguments(&file, &["--format", "json", "--section", "nvme"])).json();
    let fields = document["sections"][0]["state"]["fields"].as_array().expect("fields");
    let present = |name: &str| -> Vec<u32> {
        let field = fields.iter().find(|field| field["name"] == name).expect("a field");
        let slots = (0..).zip(field["value"].as_array().expect("slots"));
        slots.filter(|(_, slot)| !slot.is_null()).map(|(index, _)| index).collect()
    };
    for queues in ["sq", "cq"] {
        assert_eq!(present(queues).len(), 1 + QUEUES, "{queues}");
    }
    let slots: Vec<u32> = identifiers().map(|nsid| nsid - 1).collect();
    assert_eq!(present("namespaces"), slots);

    let incoming = machine.flag("--incoming", format!("file:{}", file.display()));
    let mut vm = Vm::start(&bed, "after", incoming.flags().to_vec());
    arrives(&mut vm, &before);
    vm.finish();
}
