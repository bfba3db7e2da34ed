//! The Linux test guest: two processors, ext4 on one namespace, blocks on two more, checked by its own init.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use support::{Machine, TestBed, Vm};

use crate::guest::bed;
use crate::load::two_rounds;

/// Linux is slow where ring 0 is interpreted: it boots in 10 s there, and checks some ten blocks a second.
const WATCHDOG: Duration = Duration::from_secs(180);
/// Blocks that it must have verified between two moves.
const ENOUGH: u64 = 64;
/// Takes nothing that a host without VMX and SVM lacks; harmless elsewhere.
pub const CMDLINE: &str = "console=ttyS0 panic=-1 tsc=reliable no_timer_check mitigations=off random.trust_cpu=1 reboot=k \
    noxsave clearcpuid=smap,smep,popcnt,rdtscp,erms,fsrm,rdpid rodata=off quiet noreplace-smp percpu_alloc=page";

/// The folder with kernel and initial RAM disk; `tests/run` has built it, so that this only finds it.
pub fn guest_folder(flavour: &str) -> PathBuf {
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/guest/build");
    let output = Command::new(build).arg(flavour).output().expect("the guest's build script starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end())
}

pub fn ext4_image(bed: &TestBed) -> PathBuf {
    let image = bed.image("ext4.img", 64 << 20);
    // It is where only root's PATH leads.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let made = Command::new("mke2fs").env("PATH", path).args(["-q", "-t", "ext4"]).arg(&image).status();
    assert!(made.expect("mke2fs starts").success());
    image
}

fn machine(bed: &TestBed) -> Machine {
    Machine::new("128M")
        .flag("--cpus", "2")
        .flag("--tables", "mp")
        .controller("serial=d0,queues=8")
        .image("d0", 1, &ext4_image(bed))
        .namespace("controller=d0,nsid=3,backend=memory,size=16M,lba=4096")
        .namespace("controller=d0,nsid=7,backend=memory,size=16M")
}

/// What the init says on one console.
pub struct Guest {
    pub next: usize,
}

impl Guest {
    pub fn wait<T>(&mut self, vm: &Vm, what: &str, select: impl FnMut(&str) -> Option<T>) -> T {
        self.wait_up_to(WATCHDOG, vm, what, select)
    }

    pub fn wait_up_to<T>(
        &mut self,
        watchdog: Duration,
        vm: &Vm,
        what: &str,
        mut select: impl FnMut(&str) -> Option<T>,
    ) -> T {
        let line = |line: &str| {
            let said = line.strip_prefix("guest: ")?;
            assert!(!said.starts_with("ERROR"), "{}", vm.process.describe(said));
            select(said)
        };
        let found = vm.process.wait_for_line(what, self.next, watchdog, line);
        let (value, next) = found.unwrap_or_else(|error| panic!("{error}"));
        self.next = next;
        value
    }

    pub fn says(&mut self, vm: &Vm, expected: &str) {
        self.wait(vm, expected, |said| (said == expected).then_some(()));
    }

    fn verifies(&mut self, vm: &Vm, least: u64) -> u64 {
        self.wait(vm, &format!("{least} verified blocks"), |said| {
            said.strip_prefix("verified ")?.parse().ok().filter(|&count: &u64| count >= least)
        })
    }
}

#[test]
fn linux_moves_with_its_disks_busy_over_unix_and_tcp() {
    let bed = bed();
    let folder = guest_folder("fast");
    let file = |name: &str| folder.join(name).display().to_string();
    let machine = machine(&bed);
    let booted = machine.clone().flag("--initrd", file("initramfs.cpio"));
    let mut here = booted.boot(&bed, "boots", &file("vmlinux"), &format!("{CMDLINE} ferry.namespaces=3"));
    let mut guest = Guest { next: 0 };
    guest.says(&here, "mounted");
    guest.says(&here, "namespaces 2");
    let mut verified = guest.verifies(&here, ENOUGH);
    let unix = format!("unix:{}", bed.path("move").display());
    for (name, uri) in [("over-unix", unix.as_str()), ("over-tcp", "tcp:127.0.0.1:0")] {
        let there = machine.expect(&bed, name, uri);
        // It dirties memory slowly: at this pace a round takes long enough for the next to have something to send.
        two_rounds(&mut here, there.uri(), 16 << 20);
        here.migrated();
        here.execute("quit", json!({}));
        assert_eq!(here.exit().code(), Some(0));
        guest = Guest { next: 0 };
        let arrived = guest.verifies(&there, verified);
        verified = guest.verifies(&there, arrived + ENOUGH);
        here = there;
    }
    here.execute("quit", json!({}));
    assert_eq!(here.exit().code(), Some(0));
}

#[test]
fn linux_starts_by_its_own_64_bit_protocol_too() {
    let bed = bed();
    let folder = guest_folder("fast");
    let file = |name: &str| folder.join(name).display().to_string();
    let machine = machine(&bed).flag("--boot-protocol", "linux64").flag("--initrd", file("initramfs.cpio"));
    let vm = machine.boot(&bed, "linux64", &file("vmlinux"), &format!("{CMDLINE} ferry.loop=files"));
    Guest { next: 0 }.says(&vm, "mounted");
}
