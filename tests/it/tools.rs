//! nvme-cli and fio in the Linux guest. Its scripts (`resources/guest/scripts`) check each command; here is what is done to the machine
//! meanwhile.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use support::{Machine, TestBed, Vm};

use crate::guest::bed;
use crate::linux::{CMDLINE, Guest, ext4_image, guest_folder};

/// A script starts nvme-cli up to a hundred times, each time for seconds where ring 0 is interpreted.
const WATCHDOG: Duration = Duration::from_secs(1200);

/// Waits until the guest begins a step of its script.
fn runs(guest: &mut Guest, vm: &Vm, step: &str) {
    let line = format!("command {step}");
    guest.wait_up_to(WATCHDOG, vm, &line, |said| (said == line).then_some(()));
}

/// Boots the tools guest on `machine`; it will run `script`.
fn boot(bed: &TestBed, machine: &Machine, script: &str) -> (Vm, Guest) {
    let folder = guest_folder("tools");
    let file = |name: &str| folder.join(name).display().to_string();
    let booted = machine.clone().flag("--initrd", file("initramfs.cpio"));
    let cmdline = format!("{CMDLINE} ferry.loop={script} ferry.end=poweroff");
    (booted.boot(bed, script, &file("vmlinux"), &cmdline), Guest { next: 0 })
}

/// Waits until the script has found everything as it must be, and the guest has powered its machine off.
fn passes(guest: &mut Guest, mut vm: Vm) {
    guest.wait_up_to(WATCHDOG, &vm, "the end of the script", |said| (said == "script passed").then_some(()));
    assert_eq!(vm.exit().code(), Some(0), "the guest powers its machine off");
}

/// What the log about its health counts.
#[derive(Debug)]
struct Health {
    power_cycles: u64,
    unsafe_shutdowns: u64,
    host_write_commands: u64,
}

impl Health {
    /// Waits until the guest tells it.
    fn told_by(guest: &mut Guest, vm: &Vm) -> Self {
        let mut counter = |name: &str| {
            let named = |said: &str| {
                said.strip_prefix("counter ")?.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()
            };
            guest.wait_up_to(WATCHDOG, vm, name, named)
        };
        Self {
            power_cycles: counter("power_cycles"),
            unsafe_shutdowns: counter("unsafe_shutdowns"),
            host_write_commands: counter("host_write_commands"),
        }
    }

    /// It was `before`, and `power_cycles` later, in which nothing went wrong, nothing was forgotten.
    fn continues(&self, before: &Self, power_cycles: u64) {
        let what = format!("{before:?}, then {self:?}");
        assert_eq!(self.power_cycles, before.power_cycles + power_cycles, "{what}");
        assert_eq!(self.unsafe_shutdowns, before.unsafe_shutdowns, "{what}");
        assert!(self.host_write_commands >= before.host_write_commands, "{what}");
    }
}

/// ACPI tables, ECAM, virtio-rng, nvme-cli's view of the controller, and power-off: the guest's own script checks each. It lies in
/// a file between its first steps and its last, and both have virtio-rng give it random bytes.
#[test]
fn the_tools_guest_agrees_with_its_devices_before_and_after_it_lay_in_a_file() {
    let bed = bed();
    let image = ext4_image(&bed);
    let store = bed.path("kept");
    let machine = Machine::new("192M")
        .controller(&format!("serial=d0,queues=4,subsystem={},capacity=64M", store.display()))
        .image("d0", 1, &image)
        .namespace("controller=d0,nsid=2,backend=memory,size=16M");
    let (mut vm, mut guest) = boot(&bed, &machine, "commands");
    let random = "dd if=/dev/hwrng of=/tmp/random bs=64 count=4";
    for step in [random, "nvme list", "nvme id-ctrl /dev/nvme0"] {
        runs(&mut guest, &vm, step);
    }
    let file = bed.path("suspended.ferry");
    vm.migrate(&format!("file:{}", file.display()));
    vm.migrated();
    vm.execute("quit", json!({}));
    assert_eq!(vm.exit().code(), Some(0));

    let incoming = machine.flag("--incoming", format!("file:{}", file.display()));
    let vm = Vm::start(&bed, "restored", incoming.flags().to_vec());
    let mut guest = Guest { next: 0 };
    for step in [
        "nvme format /dev/nvme0n2 --lbaf=1 --force",
        "nvme create-ns /dev/nvme0 --nsze=2048 --ncap=2048 --flbas=0",
        "nvme sanitize /dev/nvme0 --sanact=2",
        "test -f /sys/firmware/acpi/tables/MCFG",
        random,
    ] {
        runs(&mut guest, &vm, step);
    }
    passes(&mut guest, vm);
}

/// Saved features, the firmware, counters, a reservation, namespaces of its own with their contents, what a sanitize operation and the
/// log of persistent events say: all of it is where the guest goes, and where it starts again.
#[test]
fn what_a_subsystem_keeps_moves_with_its_guest_and_survives_the_power() {
    let bed = bed();
    let image = bed.image("disk.img", 16 << 20);
    let store = bed.path("kept");
    let machine = Machine::new("192M")
        .controller(&format!("serial=d0,queues=4,subsystem={},capacity=64M", store.display()))
        .image("d0", 1, &image);
    let (mut here, mut guest) = boot(&bed, &machine, "keep");
    let before = Health::told_by(&mut guest, &here);
    assert!(before.power_cycles > 0 && before.host_write_commands > 16, "{before:?}");
    guest.says(&here, "waits");

    let uri = format!("unix:{}", bed.path("move").display());
    let mut there = machine.expect(&bed, "there", &uri);
    here.migrate(&uri);
    here.migrated();
    here.execute("quit", json!({}));
    assert_eq!(here.exit().code(), Some(0));
    let mut guest = Guest { next: 0 };
    there.process.type_in("\n").expect("the console takes input");
    let moved = Health::told_by(&mut guest, &there);
    moved.continues(&before, 0);
    passes(&mut guest, there);

    let (again, mut guest) = boot(&bed, &machine, "kept");
    Health::told_by(&mut guest, &again).continues(&moved, 1);
    passes(&mut guest, again);
}

#[test]
fn fio_finds_in_the_guest_what_it_wrote_and_nothing_else() {
    let bed = bed();
    let tools = guest_folder("tools").join("fio.img");
    let machine = Machine::new("192M")
        .controller("serial=d0,queues=4")
        .image("d0", 1, &bed.image("disk.img", 16 << 20))
        .namespace(&format!("controller=d0,nsid=2,backend=file,path={},ro", tools.display()));
    let (vm, mut guest) = boot(&bed, &machine, "fio");
    passes(&mut guest, vm);
}

/// Two guests that run on from one snapshot would draw the same random numbers. The one that is not a copy hears nothing.
#[test]
fn the_kernel_of_a_clone_seeds_its_random_numbers_anew() {
    let bed = bed();
    let machine = |image: &Path| Machine::new("192M").controller("serial=d0,queues=4").image("d0", 1, image);
    let (mut vm, mut guest) = boot(&bed, &machine(&bed.image("disk.img", 16 << 20)), "clone");
    guest.wait_up_to(WATCHDOG, &vm, "waits", |said| (said == "waits").then_some(()));
    let file = bed.path("kept.ferry");
    vm.execute("x-ferry-snapshot", json!({ "path": file, "copy-disks": true }));
    vm.migrated();
    vm.process.type_in("the one that it was\n").expect("the console takes input");
    passes(&mut guest, vm);

    let copy = machine(&bed.path("copy.img"))
        .flag("--incoming", format!("file:{}", file.display()))
        .switch("--clone")
        .switch("--copy-disks");
    let mut clone = Vm::start(&bed, "clone", copy.flags().to_vec());
    clone.migrated();
    clone.process.type_in("copy\n").expect("the console takes input");
    passes(&mut Guest { next: 0 }, clone);
}
