//! A guest that stood still for a known time sees just that time pass.
//!
//! The guest cannot tell a longer stop from a processor that it was not given before or after. The host can, and says how long each
//! vCPU was ready to run and did not: what the guest saw must lie between what it certainly stood still and that with the waiting. On a
//! host with nothing else to do the two are one.
//!
//! Without VMX and SVM, user code reads the host's time stamp counter as it is: there this says that the host's figure is right,
//! and `vcpu::tests::save` that the guest's offset is. Elsewhere it says both.

use std::fs;
use std::time::{Duration, Instant};

use ferry::control::FerryDowntime;
use stream::frame::Kind;
use support::{Proxy, Verdict, Vm};

use crate::guest::{EXERCISER, bed, one_disk};

/// For how long COMMIT is held back, while the guest is stopped.
const BLACKOUT: Duration = Duration::from_millis(50);

/// What `/proc/stat` counts in (`getconf CLK_TCK`, the same on every x86 kernel).
const TICK: Duration = Duration::from_millis(10);

/// How long the only vCPU has been ready to run without a processor, since it was made. KVM has the kernel count that, for its guests'
/// steal time (`Documentation/scheduler/sched-stats.rst`, `/proc/<pid>/schedstat`: nanoseconds on the processor, in a queue, times).
fn waited(vm: &Vm) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{}/task", vm.process.id())).expect("the process is there");
    let mut tasks = tasks.map(|task| task.expect("a thread").path());
    let is_vcpu = |name: String| name.trim_end() == "vcpu0";
    let task = tasks.find(|task| fs::read_to_string(task.join("comm")).is_ok_and(is_vcpu)).expect("a vCPU");
    let figures = fs::read_to_string(task.join("schedstat")).expect("KVM needs the kernel to count this");
    let in_a_queue = figures.split_whitespace().nth(1).and_then(|figure| figure.parse().ok());
    Duration::from_nanos(in_a_queue.expect("three figures"))
}

/// What somebody else took of this host's processors, as far as it is a guest itself and is told.
fn stolen() -> Duration {
    let figures = fs::read_to_string("/proc/stat").expect("there is one");
    let ticks = figures.split_whitespace().nth(8).and_then(|figure| figure.parse().ok());
    TICK * ticks.expect("the eighth figure of the line for all processors")
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).expect("a short time")
}

#[test]
fn a_blackout_is_as_long_for_the_guest_as_for_the_host() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut here = machine.boot(&bed, "source", EXERCISER, "queues=1");
    here.progress("a look at the time without a move", |_| true);
    let path = bed.path("move");
    let mut there = machine.expect(&bed, "destination", &format!("unix:{}", path.display()));
    let proxy = Proxy::new(&bed, "by", &path, Kind::Settle);
    here.migrate(proxy.uri());
    // The guest runs still, and stops soon after this.
    let settle = proxy.held();
    let (before, stolen_before) = (waited(&here), stolen());
    proxy.aim(Kind::Commit.into());
    settle.resolve(Verdict::Pass);
    let commit = proxy.held();
    let (waited_here, before) = (waited(&here) - before, waited(&there));
    let since = Instant::now();
    std::thread::sleep(BLACKOUT);
    let blackout = microseconds(since.elapsed());
    commit.resolve(Verdict::Pass);
    here.migrated();
    // The first line may have been begun by the source, before the stop.
    let lines = [(); 3].map(|()| {
        let line = there.progress("the guest after the blackout", |_| true);
        (line.gap_us, waited(&there) - before, stolen() - stolen_before)
    });
    let (seen, waited_there, stolen) = lines.into_iter().max().expect("three lines");
    let waited = microseconds(waited_here + waited_there + stolen);
    let downtime = here.status().migration.and_then(|migration| migration.downtime).expect("a downtime");
    // It certainly stood still from when its vCPU was out of it until it was started: parts that follow each other, and what is between
    // them is messages. The whole goes on until the source has heard of the end.
    let FerryDowntime { total, device_save, last_pass, transfer, load, handover, resume, .. } = downtime;
    let parts = device_save + last_pass + transfer + load + handover + blackout + resume;
    let what = format!(
        "the guest saw {seen} us; COMMIT was held for {blackout} us of {parts} us between two vCPUs and {total} us in all, and the vCPUs \
         waited for {waited} us: {downtime:?}"
    );
    println!("{what}");
    // A thousandth for clocks that are disciplined differently.
    assert!(seen + parts / 1000 + 1 >= parts, "{what}");
    assert!(parts <= total && seen <= (total + waited) * 11 / 10, "{what}");
    there.finish();
}
