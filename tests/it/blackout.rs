//! A guest that stood still for a known time sees just that time pass.
//!
//! Without VMX and SVM, user code reads the host's time stamp counter as it is: there this says that the host's figure is right,
//! and `vcpu::tests::save` that the guest's offset is. Elsewhere it says both.

use std::time::{Duration, Instant};

use ferry::drive::exerciser::{Gap, history};
use stream::frame::Kind;
use support::Proxy;

use crate::guest::{EXERCISER, bed, one_disk};

/// For how long COMMIT is held back, while the guest is stopped.
const BLACKOUT: Duration = Duration::from_millis(50);
/// The host may keep a processor from the guest that runs again, which the guest cannot tell from a longer stop. One of so many
/// stops must be seen as long as it was; each must be seen at least as long as COMMIT was held.
const TRIES: usize = 10;

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).expect("a short time")
}

#[test]
fn a_blackout_is_as_long_for_the_guest_as_for_the_host() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut here = machine.boot(&bed, "process-0", EXERCISER, "queues=1");
    let mut told = Vec::new();
    loop {
        let hop = told.len() + 1;
        here.progress("a look at the time without a move", |_| true);
        let path = bed.path(&format!("to-{hop}"));
        let mut there = machine.expect(&bed, &format!("process-{hop}"), &format!("unix:{}", path.display()));
        let proxy = Proxy::new(&bed, &format!("by-{hop}"), &path, Kind::Commit);
        here.migrate(proxy.uri());
        let held = proxy.held();
        let since = Instant::now();
        std::thread::sleep(BLACKOUT);
        let blackout = microseconds(since.elapsed());
        held.deliver();
        here.migrated();
        let stop =
            here.status().migration.and_then(|migration| migration.downtime).expect("a downtime").total;

        // The first line may have been begun by the source, before the stop.
        let lines = [(); 3].map(|()| there.progress("the guest after the blackout", |_| true));
        let after = lines.iter().max_by_key(|line| line.gap_us).expect("three lines");
        let gap = Gap::new(&history(&here.process), after);
        let what = format!("COMMIT held for {blackout} us, stopped for {stop} us, {gap:?}");
        // A thousandth for clocks that are disciplined differently.
        assert!(stop >= blackout && gap.largest + blackout / 1000 >= blackout, "{what}");
        here = there;
        if gap.largest.abs_diff(stop) <= stop / 10 + gap.before {
            break;
        }
        told.push(what);
        assert!(told.len() < TRIES, "the guest saw no stop as long as it was: {told:#?}");
    }
    here.finish();
}
