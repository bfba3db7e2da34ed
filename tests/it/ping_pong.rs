//! Guests that move to and fro, again and again: nothing is lost, and nothing is left behind.
//!
//! A process that gave its guest away is of no use for another, since it is to tell what became of it; so the guest goes to a
//! process that is new. What it brings along must not grow from move to move. What attempts that fail leave behind would pile up in
//! processes that stay, on both sides; so that is looked at too. `FERRY_PING_PONG=500` moves more often than the ordinary run.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use certificates::{Authority, Validity};
use exerciser::report::Counters;
use ferry::control::{FerryOwnership, MigrationStatus};
use serde_json::{Value, json};
use stream::frame::Kind;
use support::{Machine, Proxy, TestBed, Vm};

use crate::guest::{BUSY, EXERCISER, bed, many_disks, one_disk};
use crate::load::ENOUGH;

/// It reports often, and does not call a disk of a busy host that is slow a mistake.
const PATIENT: &str = "report=25 stall=100000";
/// How often the guest moves in the ordinary run.
const MOVES: u32 = 18;
/// Attempts that fail.
const ATTEMPTS: usize = 40;
/// Of them, until everything has happened once that is kept for the next time.
const WARM_UP: usize = 10;

/// How far memory that is a process's own may differ: allocators keep what threads have given back, more or less of it.
const ANONYMOUS_SLACK_KIB: u64 = 8 << 10;
/// How far what is mapped of guest memory may differ: half of what the exerciser uses, which it has touched again more or less of when
/// it is looked at.
const SHARED_SLACK_KIB: u64 = 16 << 10;
/// How far the number of mappings may differ: stacks and arenas of threads that come and go.
const MAPPINGS_SLACK: u64 = 12;

/// What a process holds.
#[derive(Clone, Copy, Debug)]
struct Holdings {
    anonymous_kib: u64,
    shared_kib: u64,
    mappings: u64,
    threads: u64,
    descriptors: u64,
}

impl Holdings {
    fn of(vm: &Vm) -> Self {
        let path = |name: &str| PathBuf::from(format!("/proc/{}/{name}", vm.process.id()));
        let text = |name: &str| fs::read_to_string(path(name)).expect("the process is there");
        let count = |name: &str| fs::read_dir(path(name)).expect("the process is there").count() as u64;
        let status = text("status");
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel tells");
            line.trim().trim_end_matches(" kB").parse().expect("a number")
        };
        Self {
            anonymous_kib: kib("RssAnon:"),
            shared_kib: kib("RssShmem:"),
            mappings: text("maps").lines().count() as u64,
            threads: count("task"),
            descriptors: count("fd"),
        }
    }

    /// It holds no more than it held `before`.
    fn has_not_grown(&self, before: &Self, what: &str) {
        let facts = format!("{what}: {before:?}, then {self:?}");
        assert!(self.anonymous_kib <= before.anonymous_kib + ANONYMOUS_SLACK_KIB, "{facts}");
        assert!(self.shared_kib <= before.shared_kib + SHARED_SLACK_KIB, "{facts}");
        assert!(self.mappings <= before.mappings + MAPPINGS_SLACK, "{facts}");
        assert!(self.threads <= before.threads, "{facts}");
        assert!(self.descriptors <= before.descriptors, "{facts}");
    }
}

/// Waits until `vm` has done with what follows a migration, and looks at it.
fn settled(vm: &mut Vm, holdings: impl Fn(&Holdings) -> bool) -> Holdings {
    let deadline = std::time::Instant::now() + support::WATCHDOG;
    loop {
        let now = Holdings::of(vm);
        // Threads of the migration may still be on their way out when its end is told.
        if holdings(&now) || std::time::Instant::now() > deadline {
            return now;
        }
        vm.status();
    }
}

/// A way for a guest to move.
struct Way {
    name: &'static str,
    channels: u16,
    compression: &'static str,
    target: Value,
    is_secure: bool,
}

fn ways(credentials: &std::path::Path) -> [Way; 6] {
    let way = |name, channels, target| Way { name, channels, compression: "none", target, is_secure: false };
    [
        way("over the link", 0, json!({})),
        way("over a channel", 1, json!({})),
        Way { compression: "zstd", ..way("over four channels that compress", 4, json!({})) },
        way("with its memory itself", 1, json!({ "x-ferry-local": true })),
        way("ahead of its memory", 1, json!({ "x-ferry-postcopy": "now" })),
        Way { is_secure: true, ..way("with TLS", 1, json!({ "x-ferry-tls-dir": credentials })) },
    ]
}

/// The guest that had done `before` is in `vm`, has verified as much again, and found no mistake.
fn works(vm: &mut Vm, before: &Counters) -> Counters {
    let arrived = vm.progress("the guest where it arrived", |_| true);
    assert!(arrived.verified >= before.verified && arrived.ram_checked >= before.ram_checked);
    let now = vm.progress("verified reads and memory checks", |now| {
        now.verified >= arrived.verified + ENOUGH && now.ram_checked > arrived.ram_checked
    });
    assert_eq!(now.errors, 0);
    now
}

#[test]
fn a_guest_that_moves_to_and_fro_holds_no_more_from_move_to_move() {
    let moves = std::env::var("FERRY_PING_PONG").ok().map_or(MOVES, |moves| moves.parse().expect("a number"));
    let bed = bed();
    let authority = Authority::new("one for both");
    let [here_tls, there_tls] = ["here", "there"].map(|name| bed.path(name));
    for folder in [&here_tls, &there_tls] {
        authority.fill(folder, &["localhost"], Validity::Valid);
    }
    let machine = many_disks(&bed);
    let options = format!("{BUSY} {PATIENT} doorbells=shadow completion=msix events=2");
    let mut here = machine.boot(&bed, "process-0", EXERCISER, &options);
    let mut done = works(&mut here, &Counters::default());
    // By the way that it came, of the process that gives the guest away and of the one that gets it.
    let mut first: BTreeMap<&str, [Holdings; 2]> = BTreeMap::new();
    let mut last = first.clone();
    let ways = ways(&here_tls);
    for hop in 0..moves {
        let way = &ways[hop as usize % ways.len()];
        let uri = format!("unix:{}", bed.path(&format!("move-{hop}")).display());
        let machine = match way.is_secure {
            true => machine.clone().flag("--tls-dir", there_tls.display().to_string()),
            false => machine.clone(),
        };
        let mut there = machine.expect(&bed, &format!("process-{}", hop + 1), &uri);
        here.execute(
            "migrate-set-parameters",
            json!({ "multifd-channels": way.channels, "multifd-compression": way.compression }),
        );
        let mut target = way.target.clone();
        target["uri"] = json!(uri);
        here.migrate_with(target);
        here.migrated();
        assert_eq!(here.status().ownership, FerryOwnership::GivenAway);
        done = works(&mut there, &done);
        there.wait_for_migration("the end", |info| info.status == MigrationStatus::Completed);
        let mut both = [&mut here, &mut there];
        let bounds = first.get(way.name).copied();
        let mut index = 0;
        let holdings = both.each_mut().map(|vm| {
            let bound = bounds.map(|bounds| bounds[index]);
            index += 1;
            settled(vm, |now| {
                bound.is_none_or(|bound| now.threads <= bound.threads && now.descriptors <= bound.descriptors)
            })
        });
        // The first time everything that is touched once in a while is touched.
        if hop as usize >= ways.len() {
            first.entry(way.name).or_insert(holdings);
            last.insert(way.name, holdings);
        }
        here.execute("quit", json!({}));
        assert_eq!(here.exit().code(), Some(0));
        here = there;
    }
    here.finish();
    println!("measured: {moves} moves, {} verified I/Os, 0 mismatches", done.verified);
    for (way, before) in &first {
        for ((side, before), after) in ["from", "to"].into_iter().zip(before).zip(&last[way]) {
            println!("measured: {way}, {side}: {before:?}, then {after:?}");
            after.has_not_grown(before, &format!("{way}, {side}"));
        }
    }
}

/// Begins a migration through a link that is cut at `kind`.
fn fails_at(bed: &TestBed, source: &mut Vm, target: &std::path::Path, number: usize, kind: Kind) {
    let proxy = Proxy::new(bed, &format!("by-{number}"), target, kind);
    source.migrate(proxy.uri());
    proxy.held().cut();
    source.not_migrated();
}

#[test]
fn attempts_that_fail_leave_nothing_behind_on_either_side() {
    let bed = bed();
    let machine: Machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, &format!("{BUSY} {PATIENT}"));
    let mut done = works(&mut source, &Counters::default());
    let path = bed.path("to");
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", path.display()));
    let kinds = [Kind::Hello, Kind::Agree, Kind::ChannelHello, Kind::Stream, Kind::Prepare, Kind::Prepared];
    let mut first = None;
    for attempt in 0..ATTEMPTS {
        let channels = [0, 1, 3][attempt % 3];
        // Where there are no channels there is no hello of one.
        let kind = kinds[attempt % kinds.len()];
        let kind = if channels == 0 && kind == Kind::ChannelHello { Kind::Commit } else { kind };
        source.execute("migrate-set-parameters", json!({ "multifd-channels": channels }));
        fails_at(&bed, &mut source, &path, attempt, kind);
        if kind != Kind::Hello {
            destination.wait_for_migration("the failure", |info| info.status == MigrationStatus::Failed);
        }
        assert!(source.owns_a_running_guest());
        if attempt + 1 == WARM_UP {
            done = works(&mut source, &done);
            first = Some([&mut source, &mut destination].map(|vm| settled(vm, |_| true)));
        }
    }
    done = works(&mut source, &done);
    let first = first.expect("there were more attempts");
    for (vm, before) in [&mut source, &mut destination].into_iter().zip(first) {
        let after = settled(vm, |now| now.threads <= before.threads && now.descriptors <= before.descriptors);
        println!("measured: {} after {ATTEMPTS} attempts: {before:?}, then {after:?}", vm.process.name());
        after.has_not_grown(&before, vm.process.name());
    }
    source.migrate(destination.uri());
    source.migrated();
    works(&mut destination, &done);
    destination.finish();
}
