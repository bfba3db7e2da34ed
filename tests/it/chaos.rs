//! Faults at any place of a migration of two real processes, drawn from seeds: the link is cut, half closed, delayed or loses what is
//! said, and either process is killed or stands still.
//!
//! After each, exactly one guest runs, or it died with the process that had it; its disk and RAM are what they must be; the other
//! process says why it has no guest; and the guest moves to another process after all. `FERRY_CHAOS_SEEDS=5000` draws more,
//! `FERRY_CHAOS_FIRST=SEED` begins elsewhere: what a failing seed did is in the output, and it does it again.

use std::time::{Duration, Instant};

use exerciser::report::Counters;
use ferry::control::{FerryOwnership, FerryStatus, MigrationStatus, RunState};
use stream::frame::Kind;
use support::{Breaker, Machine, Place, TestBed, Verdict, Vm, WATCHDOG, Way};

use crate::guest::{BUSY, EXERCISER, bed, one_disk};

/// How many seeds the ordinary run of the tests draws.
const SEEDS: u64 = 200;
/// Verified reads that show that a guest works.
const SOME: u64 = 30;

/// What happens at the place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Link(Verdict),
    Delay(Duration),
    Kill(Side),
    Freeze(Side, Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

#[derive(Clone, Copy, Debug)]
struct Fault {
    place: Place,
    act: Act,
    /// Whether the link carries new connections after it was cut, before the source is done asking.
    heals: bool,
}

/// Numbers from a seed: SplitMix64.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

impl Fault {
    /// `bytes`: what a migration sends, each way.
    fn drawn(seed: u64, bytes: [u64; 2]) -> Self {
        let mut numbers = Numbers(seed);
        let place = match numbers.below(4) {
            0 => {
                let way = numbers.one_of(&[Way::ToDestination, Way::ToSource]);
                Place::Byte { way, at: numbers.below(bytes[way as usize]) }
            }
            1 => {
                // The rounds and their figures.
                let (kind, most) = numbers.one_of(&[(Kind::Stream, 64), (Kind::Progress, 3)]);
                let nth = numbers.below(most) as u32;
                let at = numbers.below(16 << 10);
                Place::Frame { way: Way::ToDestination, kind, nth, at }
            }
            _ => {
                let (way, kind) = numbers.one_of(&[
                    (Way::ToDestination, Kind::Hello),
                    (Way::ToSource, Kind::Agree),
                    (Way::ToDestination, Kind::Prepare),
                    (Way::ToSource, Kind::Prepared),
                    (Way::ToDestination, Kind::Commit),
                    (Way::ToDestination, Kind::Commit),
                    (Way::ToSource, Kind::Running),
                    (Way::ToSource, Kind::Running),
                ]);
                let at = numbers.one_of(&[0, 8, 17, u64::MAX]);
                Place::Frame { way, kind, nth: 0, at }
            }
        };
        let moment = Duration::from_millis(1 + numbers.below(200));
        let side = numbers.one_of(&[Side::Source, Side::Destination]);
        let act = match numbers.below(8) {
            0 | 1 => Act::Link(Verdict::Cut),
            2 => Act::Link(Verdict::HalfClose),
            3 => Act::Link(Verdict::Swallow(moment)),
            4 => Act::Delay(moment),
            5 => Act::Freeze(side, moment),
            _ => Act::Kill(side),
        };
        Self { place, act, heals: numbers.below(2) == 0 }
    }
}

/// Where the guest is in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    AtSource,
    AtDestination,
    /// With the process that had it.
    Dead,
}

/// What has been seen, for the output.
#[derive(Debug, Default)]
struct Totals {
    struck: u32,
    at_source: u32,
    at_destination: u32,
    died: u32,
}

fn runs(status: &FerryStatus) -> bool {
    status.ownership == FerryOwnership::Owned && status.status == RunState::Running
}

/// Waits until it is decided who has the guest. At no time do both.
fn decided(source: Option<&mut Vm>, destination: Option<&mut Vm>) -> Outcome {
    let (mut source, mut destination) = (source, destination);
    let deadline = Instant::now() + WATCHDOG;
    loop {
        // In this order: who gave the guest away can never have it again.
        let there = destination.as_mut().map(|vm| vm.status());
        let here = source.as_mut().map(|vm| vm.status());
        let (runs_here, runs_there) = (here.as_ref().is_some_and(runs), there.as_ref().is_some_and(runs));
        assert!(!(runs_here && runs_there), "the guest runs twice: {here:?} and {there:?}");
        let leaves = here.as_ref().is_some_and(|status| status.ownership == FerryOwnership::GivenAway);
        let waits = there.as_ref().is_none_or(|status| status.ownership == FerryOwnership::Incoming);
        let is_over = match source.as_mut() {
            Some(vm) => serde_json::from_value(vm.execute("query-migrate", serde_json::json!({})))
                .is_ok_and(|info: ferry::control::MigrationInfo| info.status.is_final()),
            None => true,
        };
        let has_failed = there.as_ref().is_none_or(|status| {
            status
                .migration
                .as_ref()
                .is_none_or(|migration| migration.detail.is_some() || migration.phase == "none")
        });
        match (runs_here, runs_there) {
            (true, false) if is_over && waits => return Outcome::AtSource,
            (false, true) if here.is_none() || (leaves && is_over) => return Outcome::AtDestination,
            (false, false) if there.is_none() && (here.is_none() || (leaves && is_over)) => {
                return Outcome::Dead;
            }
            (false, false) if here.is_none() && waits && has_failed => return Outcome::Dead,
            _ => {}
        }
        assert!(Instant::now() < deadline, "nobody knows whose the guest is: {here:?} and {there:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The processes of one bed, of which one has the guest.
struct Chaos {
    bed: TestBed,
    machine: Machine,
    owner: Option<Vm>,
    done: Counters,
    /// Names must differ.
    number: u32,
}

impl Chaos {
    fn name(&mut self, what: &str) -> String {
        self.number += 1;
        format!("{what}-{}", self.number)
    }

    fn expect(&mut self) -> (Vm, std::path::PathBuf) {
        let name = self.name("vm");
        let path = self.bed.path(&format!("to-{name}"));
        (self.machine.expect(&self.bed, &name, &format!("unix:{}", path.display())), path)
    }

    /// The guest, wherever it is; a new one if it died.
    fn owner(&mut self) -> Vm {
        if let Some(owner) = self.owner.take() {
            return owner;
        }
        let name = self.name("vm");
        let mut owner = self.machine.boot(&self.bed, &name, EXERCISER, BUSY);
        self.done = owner.verifies(0, SOME);
        owner
    }

    /// The guest of `vm` works, since it came there or since it was last looked at.
    fn works(&mut self, mut vm: Vm, arrived: bool) {
        let since = if arrived {
            let counters = vm.progress("the guest where it arrived", |_| true);
            assert!(counters.verified >= self.done.verified, "{counters:?} after {:?}", self.done);
            counters
        } else {
            self.done
        };
        let now = vm.progress("verified reads and memory checks", |now| {
            now.verified >= since.verified + SOME && now.ram_checked > since.ram_checked
        });
        assert_eq!(now.errors, 0);
        self.done = now;
        self.owner = Some(vm);
    }

    /// One fault and what must hold after it.
    fn meets(&mut self, fault: Fault, totals: &mut Totals) {
        let mut source = self.owner();
        let (mut destination, path) = self.expect();
        let link = self.name("link");
        let breaker = Breaker::new(&self.bed, &link, &path, fault.place);
        source.migrate(breaker.uri());
        let struck = loop {
            if let Some(struck) = breaker.struck(Duration::from_millis(20)) {
                break Some(struck);
            }
            let info = source.execute("query-migrate", serde_json::json!({}));
            // What is final has been said by both, or never will be.
            if info["status"] == "completed" || info["status"] == "failed" {
                break breaker.struck(Duration::ZERO);
            }
        };
        totals.struck += u32::from(struck.is_some());
        let (mut source, mut destination) = match struck {
            None => (Some(source), Some(destination)),
            Some(struck) => {
                breaker.take_more(fault.heals);
                match fault.act {
                    Act::Link(verdict) => {
                        struck.resolve(verdict);
                        (Some(source), Some(destination))
                    }
                    Act::Delay(time) => {
                        breaker.take_more(true);
                        std::thread::sleep(time);
                        struck.resolve(Verdict::Pass);
                        (Some(source), Some(destination))
                    }
                    Act::Freeze(side, time) => {
                        let frozen = if side == Side::Source { &mut source } else { &mut destination };
                        frozen.freeze();
                        struck.resolve(Verdict::Pass);
                        std::thread::sleep(time);
                        frozen.thaw();
                        (Some(source), Some(destination))
                    }
                    Act::Kill(Side::Source) => {
                        source.kill();
                        struck.resolve(Verdict::Cut);
                        (None, Some(destination))
                    }
                    Act::Kill(Side::Destination) => {
                        destination.kill();
                        struck.resolve(Verdict::Cut);
                        (Some(source), None)
                    }
                }
            }
        };
        let outcome = decided(source.as_mut(), destination.as_mut());
        match outcome {
            Outcome::AtSource => {
                totals.at_source += 1;
                let mut source = source.expect("it has the guest");
                assert!(!source.not_migrated().is_empty());
                self.works(source, false);
            }
            Outcome::AtDestination => {
                totals.at_destination += 1;
                let info = source.as_mut().map(Vm::end_of_migration);
                assert!(info.is_none_or(|info| info.status == MigrationStatus::Completed));
                self.works(destination.take().expect("it has the guest"), true);
            }
            Outcome::Dead => {
                totals.died += 1;
                let owner = self.owner();
                self.owner = Some(owner);
            }
        }
        // The second attempt: to the destination that still listens, or to another.
        let mut source = self.owner();
        let listening = match destination {
            Some(vm) => vm,
            None => self.expect().0,
        };
        source.migrate(listening.uri());
        source.migrated();
        self.works(listening, true);
    }
}

fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |value| value.parse().expect("a number"))
}

#[test]
fn whatever_happens_on_the_way_one_guest_runs_in_the_end() {
    let (first, seeds) = (variable("FERRY_CHAOS_FIRST", 0), variable("FERRY_CHAOS_SEEDS", SEEDS));
    let bed = bed();
    let machine = one_disk(&bed);
    let mut chaos = Chaos { bed, machine, owner: None, done: Counters::default(), number: 0 };
    let mut totals = Totals::default();
    // A move without a fault says how much there is to be cut.
    let nowhere = Fault {
        place: Place::Byte { way: Way::ToDestination, at: u64::MAX },
        act: Act::Delay(Duration::ZERO),
        heals: true,
    };
    let mut source = chaos.owner();
    let (destination, path) = chaos.expect();
    let breaker = Breaker::new(&chaos.bed, "measure", &path, nowhere.place);
    source.migrate(breaker.uri());
    source.migrated();
    let bytes = [breaker.bytes(Way::ToDestination), breaker.bytes(Way::ToSource)];
    drop(source);
    chaos.works(destination, true);
    for seed in first..first + seeds {
        let fault = Fault::drawn(seed, bytes);
        println!("seed {seed}: {fault:?}");
        chaos.meets(fault, &mut totals);
    }
    println!("measured: {seeds} seeds from {first}: {totals:?}");
    let owner = chaos.owner();
    owner.finish();
    assert!(u64::from(totals.struck) * 2 > seeds, "most faults meet something: {totals:?}");
}
