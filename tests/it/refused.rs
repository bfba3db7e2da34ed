//! A destination that is not like the source: told before any memory moves, all at once, to both sides.

use serde_json::json;
use support::Machine;

use crate::guest::{BUSY, EXERCISER, bed, many_disks};

#[test]
fn every_difference_is_told_on_both_sides_before_memory_moves() {
    let bed = bed();
    let mut source = many_disks(&bed).boot(&bed, "source", EXERCISER, BUSY);
    let verified = source.verifies(0, 1000).verified;
    let larger = bed.image("larger.img", 128 << 20);
    let other = Machine::new("96M")
        .flag("--lease", bed.path("a.img.ferry-lease").display().to_string())
        .controller("serial=d0,queues=4")
        .image("d0", 1, &larger)
        .namespace("controller=d0,nsid=9,backend=null,size=1G,ro")
        .controller("serial=d1,queues=8,mdts=5")
        .image("d1", 3, &bed.path("b.img"))
        .namespace("controller=d1,nsid=77,backend=memory,size=8M");
    let mut destination = other.expect(&bed, "destination", &format!("unix:{}", bed.path("to").display()));
    source.migrate(destination.uri());
    let info = source.end_of_migration();
    let at_the_source = info.error_desc.expect("a refusal says why");
    for reason in [
        "nvme.d0.queues: the source has 8, the destination 4",
        "nvme.d0.ns.1.capacity_bytes: the source has 67108864, the destination 134217728",
        "nvme.d0.ns.4: the source has backend=memory, capacity_bytes=16777216, lba=4096, ro=false, the destination has no such \
         thing",
        "length_bytes: the source has 134217728, the destination 100663296",
    ] {
        assert!(at_the_source.contains(reason), "{reason} is not in: {at_the_source}");
    }
    assert!(info.ram.is_none_or(|ram| ram.normal == 0), "no page was sent");
    let there = destination.end_of_migration();
    assert_eq!(there.error_desc, Some(at_the_source));
    assert!(there.ram.is_none_or(|ram| ram.transferred == 0), "no page came");
    assert!(source.owns_a_running_guest());
    source.verifies(verified, 1000);

    destination.execute("quit", json!({}));
    assert_eq!(destination.exit().code(), Some(0));
    source.finish();
}

#[test]
fn controllers_in_another_order_are_another_machine() {
    let bed = bed();
    let namespace = |machine: Machine, serial: &str| {
        machine
            .controller(&format!("serial={serial},queues=2"))
            .namespace(&format!("controller={serial},nsid=1,backend=memory,size=2M"))
    };
    let machine = |first: &str, second: &str| namespace(namespace(Machine::new("96M"), first), second);
    let mut source = machine("a", "b").boot(&bed, "source", EXERCISER, "queues=1");
    let mut destination =
        machine("b", "a").expect(&bed, "destination", &format!("unix:{}", bed.path("to").display()));
    source.migrate(destination.uri());
    let info = source.end_of_migration();
    let reason = info.error_desc.expect("a refusal says why");
    assert!(reason.contains("nvme.a.slot: the source has 2, the destination 3"), "{reason}");
    assert!(info.ram.is_none_or(|ram| ram.normal == 0), "no page was sent");
    let says = |line: &str| line.contains("there is no lease record").then_some(());
    for vm in [&source, &destination] {
        vm.process.log.wait_for(0, support::WATCHDOG, says).expect("a machine without a lease says so");
    }
    destination.execute("quit", json!({}));
    assert_eq!(destination.exit().code(), Some(0));
    source.finish();
}
