//! The machines that most tests run the exerciser on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use engine::lease::{Lease, Owner, Record};
use exerciser::report::{ERROR, Line};
use ferry::layout::GENERATION_ID_START;
use support::{Machine, TestBed, Vm, WATCHDOG};

/// The image of the exerciser.
pub const EXERCISER: &str = env!("FERRY_EXERCISER");

/// What an exerciser does that is to be migrated: four queues kept full, and memory that changes all the time.
pub const BUSY: &str = "queues=4 inflight=128 ram=16M dirty=20M";

/// What the memfds of guest memory below 3 GiB are called where they are mapped.
pub const MEMORY: &str = "memfd:ram-low";

const MIB: u64 = 1 << 20;

/// A bed for the program under test.
pub fn bed() -> TestBed {
    TestBed::new(env!("CARGO_BIN_EXE_ferry"))
}

/// One controller with one image.
pub fn one_disk(bed: &TestBed) -> Machine {
    Machine::new("128M").controller("serial=d0,queues=8").image("d0", 1, &bed.image("a.img", 64 * MIB))
}

/// Two controllers, and namespaces of every kind with holes between them. What is null keeps nothing, so it is read-only, and
/// the exerciser leaves it alone.
pub fn many_disks(bed: &TestBed) -> Machine {
    one_disk(bed)
        .namespace("controller=d0,nsid=4,backend=memory,size=16M,lba=4096")
        .namespace("controller=d0,nsid=9,backend=null,size=1G,ro")
        .controller("serial=d1,queues=8,mdts=5")
        .image("d1", 3, &bed.image("b.img", 32 * MIB))
        .namespace("controller=d1,nsid=77,backend=memory,size=8M")
}

/// Guest memory below 3 GiB, as the process's own descriptor shows it.
pub fn guest_memory(vm: &Vm) -> File {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", vm.process.id())).expect("the process is there");
    let is_memory =
        |path: &PathBuf| fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains(MEMORY));
    let mut paths = descriptors.filter_map(Result::ok).map(|entry| entry.path());
    File::open(paths.find(is_memory).expect("it has its memory")).expect("it can be read")
}

/// The 16 bytes by which a guest knows whether it is a copy.
pub fn generation_id(vm: &Vm) -> [u8; 16] {
    let mut id = [0; 16];
    guest_memory(vm).read_exact_at(&mut id, GENERATION_ID_START).expect("memory can be read");
    assert_ne!(id, [0; 16]);
    id
}

/// What the lease of these machines says.
pub fn lease(bed: &TestBed) -> Record {
    let reader = Owner::this_process("test").expect("randomness");
    let lease = Lease::open(&bed.path("a.img.ferry-lease"), reader).expect("the lease can be read");
    lease.read().expect("the lease can be read").expect("there is a record")
}

/// What the exerciser finds wrong.
pub fn error(vm: &Vm) -> String {
    let select = |line: &str| (Line::parse(line).kind == ERROR).then(|| line.to_owned());
    let found = vm.process.wait_for_line("an error of the guest", 0, WATCHDOG, select);
    found.unwrap_or_else(|error| panic!("{error}")).0
}

/// Waits until the guest has begun for the `lives`th time.
pub fn begins(vm: &Vm, lives: u32) {
    let mut found = 0;
    let select = |line: &str| {
        // A reset may have cut the line before.
        found += u32::from(line.contains("boot name="));
        (found == lives).then_some(())
    };
    let begun = vm.process.wait_for_line(&format!("life {lives} of the guest"), 0, WATCHDOG, select);
    begun.unwrap_or_else(|error| panic!("{error}"));
}
