//! What commands cost besides time, by the counters of the process: counts that hold on a host of any load, since a thread that gets no
//! time makes batches larger and never smaller.

use ferry::control::FerryStatus;
use support::{Machine, Vm};

use crate::guest::{EXERCISER, bed};

/// Commands in flight; a guest whose commands have all ended sends so many before it rings.
const DEPTH: u64 = 128;

/// Lets the exerciser of `vm` read `count` times; returns what the machine has counted before and after.
fn reads(vm: &mut Vm, count: u64) -> (FerryStatus, FerryStatus) {
    let begun = vm.progress("reads", |now| now.reads > 0);
    let before = vm.status();
    vm.progress("more reads", |now| now.reads >= begun.reads + count);
    (before, vm.status())
}

/// A machine whose only namespace is `backend`, with a thread that looks for work for long before it sleeps.
fn looking_at(backend: &str) -> Machine {
    Machine::new("128M")
        .controller("serial=d0")
        .namespace(&format!("controller=d0,nsid=1,{backend}"))
        .flag("--io-poll", "10000")
}

/// Of the first disk: `(commands, doorbells that left the guest, calls of io_uring_enter, wake-ups)`, and exits of vCPUs.
fn costs((before, after): &(FerryStatus, FerryStatus)) -> [u64; 5] {
    let counts = |status: &FerryStatus| {
        let disk = &status.disks[0];
        [disk.completed, disk.doorbell_events, disk.io_uring_enters, disk.wake_ups, status.vcpu_exits]
    };
    let (before, after) = (counts(before), counts(after));
    std::array::from_fn(|index| after[index] - before[index])
}

#[test]
fn commands_under_load_cost_neither_exits_nor_system_calls() {
    let bed = bed();
    let options = format!("mode=iops doorbells=shadow depth=256 inflight={DEPTH} report=1000");
    let mut vm = looking_at("backend=null,size=64M").boot(&bed, "vm", EXERCISER, &options);
    let seen = reads(&mut vm, 400_000);
    let [commands, doorbells, enters, wake_ups, exits] = costs(&seen);
    println!(
        "measured: {commands} commands, {doorbells} doorbells, {enters} enters, {wake_ups} wake-ups, {exits} exits"
    );
    assert!(commands >= 400_000);
    // The guest rings when the thread has slept, which it does when all commands have ended and the guest has had no time to send more:
    // once for as many as are in flight, at worst.
    assert!(doorbells < commands / 10, "{doorbells} doorbells left the guest");
    // Besides doorbells, each byte on the console is an exit: some hundred a second.
    assert!(exits < commands / 10, "{exits} exits to the process");
    assert!(wake_ups < commands / 10, "{wake_ups} wake-ups");
    assert_eq!(enters, 0, "there is no disk");
    assert_eq!(seen.1.disks[0].interrupts, seen.0.disks[0].interrupts, "the guest looks itself");
    vm.finish();
}

#[test]
fn requests_under_load_share_system_calls() {
    let bed = bed();
    let image = bed.image("a.img", 64 << 20);
    let options = format!("mode=iops doorbells=shadow depth=256 inflight={DEPTH} report=1000 span=64M");
    let file = format!("backend=file,buffered,path={}", image.display());
    let mut vm = looking_at(&file).boot(&bed, "vm", EXERCISER, &options);
    let seen = reads(&mut vm, 200_000);
    let [commands, doorbells, enters, _, exits] = costs(&seen);
    println!("measured: {commands} commands, {doorbells} doorbells, {enters} enters, {exits} exits");
    assert!(doorbells < commands / 10 && exits < commands / 10, "{doorbells} doorbells, {exits} exits");
    // Into an idle disk the commands in flight go with a call for four, four, eight, and so on; into a busy one with fewer.
    assert!(enters > 0 && enters < commands / 4, "{enters} calls of io_uring_enter");
    let entries = |status: &FerryStatus| status.disks[0].io_uring_entries;
    assert!(entries(&seen.1) - entries(&seen.0) + DEPTH >= commands, "every read is an entry");
    vm.finish();
}

#[test]
fn a_guest_without_shadow_doorbells_leaves_for_every_command() {
    let bed = bed();
    let options = "mode=iops doorbells=mmio depth=256 inflight=1 report=1000";
    let mut vm = looking_at("backend=null,size=64M").boot(&bed, "vm", EXERCISER, options);
    let [commands, doorbells, .., exits] = costs(&reads(&mut vm, 5_000));
    println!("measured: {commands} commands, {doorbells} doorbells, {exits} exits");
    // What the thread has not seen yet is not counted, which is one at most.
    assert!(
        doorbells + exits + 2 >= commands,
        "{doorbells} doorbells and {exits} exits of {commands} commands"
    );
    vm.finish();
}
