//! Faults at any place of a migration of two real processes, drawn from numbers: a link is cut, half closed, delayed or loses what is
//! said, and either process is killed or stands still, in every phase and whichever way the guest moves.
//!
//! After each, exactly one guest runs, or it died with a process that it needed ([`decision`] says what is accepted); its disk and
//! RAM are what they must be; the other process says why it has no guest, and the same as the first wherever the link could tell it;
//! images that went with it are refused where it is not ([`images`]); and the guest moves to another process after all.
//!
//! A plain migration meets faults at each of its messages, one after the other; the rest is drawn. `FERRY_CHAOS_SEEDS=5000` draws more,
//! `FERRY_CHAOS_FIRST=SEED` begins elsewhere: what a failing seed did is in the output, and it does it again.

mod decision;
mod draw;
mod images;
mod place;
mod tally;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use certificates::{Authority, Validity};
use exerciser::report::Counters;
use ferry::control::{FerryOwnership, MigrationStatus, RunState};
use serde_json::{Value, json};
use support::{Held, Machine, Proxy, TestBed, Verdict, Vm, WATCHDOG, Way};

use crate::guest::{BUSY, EXERCISER, bed, one_disk};
use decision::{Outcome, Pair, Proof};
use draw::{Act, CELLS, Mode, Phase, Run, Side, Which};
use images::Travel;
use tally::Tally;

/// How many seeds the ordinary run of the tests draws.
const SEEDS: u64 = 200;
/// Verified reads that show that a guest works.
const SOME: u64 = 30;
/// It reports often, since every run waits for reports, and leaves it to the watchdogs here to say that a disk of a busy host is slow.
const PATIENT: &str = "report=25 stall=100000";
/// How long to wait for the place before a look whether it will ever be reached.
const GLANCE: Duration = Duration::from_millis(10);

/// A guest, wherever it is.
#[derive(Default)]
struct Guest {
    owner: Option<Vm>,
    done: Counters,
}

impl Guest {
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
}

/// The guests of one bed, of which one moves at a time.
struct Chaos {
    bed: TestBed,
    leased: Machine,
    leaseless: Machine,
    /// Where the images of the guest are that takes them along.
    travel: Travel,
    /// Of each [`Which`].
    guests: [Guest; 3],
    /// Credentials of sources and of destinations.
    credentials: [PathBuf; 2],
    /// Names must differ.
    number: u32,
}

impl Chaos {
    fn new() -> Self {
        let bed = bed();
        let leased = one_disk(&bed);
        // It writes no image, and so has no lease.
        let memory = "controller=d0,nsid=1,backend=memory,size=16M";
        let leaseless = Machine::new("128M").controller("serial=d0,queues=8").namespace(memory);
        let authority = Authority::new("one for all");
        let credentials = ["here", "there"].map(|name| bed.path(name));
        for folder in &credentials {
            authority.fill(folder, &["localhost"], Validity::Valid);
        }
        let travel = Travel::new(&bed);
        Self { bed, leased, leaseless, travel, guests: Default::default(), credentials, number: 0 }
    }

    fn guest(&mut self, which: Which) -> &mut Guest {
        &mut self.guests[which as usize]
    }

    fn name(&mut self, what: &str) -> String {
        self.number += 1;
        format!("{what}-{}", self.number)
    }

    /// For a run of an odd number of channels memory lies in small pages, whatever the host gives: they come in another way than huge ones.
    fn expect(&mut self, run: &Run) -> (Vm, PathBuf) {
        let mode = run.mode;
        let name = self.name("vm");
        let path = self.bed.path(&format!("to-{name}"));
        let mut machine = match mode.which() {
            Which::Leased => self.leased.clone(),
            Which::Leaseless => self.leaseless.clone(),
            Which::WithImages => self.travel.expects(&self.bed, &name),
        };
        if mode.is_secure() {
            machine = machine.flag("--tls-dir", self.credentials[1].display().to_string());
        }
        if run.channels % 2 == 1 {
            machine = machine.switch("--hugepages=off");
        }
        (machine.expect(&self.bed, &name, &format!("unix:{}", path.display())), path)
    }

    /// The process that has the guest; with a new one if it died. The other guests pause.
    fn owner(&mut self, which: Which) -> Vm {
        for (other, guest) in self.guests.iter_mut().enumerate() {
            if let Some(vm) = guest.owner.as_mut().filter(|_| other != which as usize) {
                vm.execute("stop", json!({}));
            }
        }
        if let Some(mut owner) = self.guest(which).owner.take() {
            owner.execute("cont", json!({}));
            return owner;
        }
        let name = self.name("vm");
        let machine = match which {
            Which::Leased => self.leased.clone(),
            Which::Leaseless => self.leaseless.clone(),
            Which::WithImages => self.travel.boots(),
        };
        let mut owner = machine.boot(&self.bed, &name, EXERCISER, &format!("{BUSY} {PATIENT}"));
        self.guest(which).done = owner.verifies(0, SOME);
        owner
    }

    /// Begins to send the guest of `source` to `uri`.
    fn sends(&self, source: &mut Vm, uri: &str, run: &Run) {
        // Of a guest whose memory is to follow something is always left.
        let downtime_limit = if run.mode.is_postcopy() { 0 } else { 300 };
        let parameters = json!({
            "multifd-channels": run.channels,
            "multifd-compression": run.compression,
            "downtime-limit": downtime_limit,
        });
        source.execute("migrate-set-parameters", parameters);
        let mut target = json!({ "uri": uri });
        if run.mode.is_secure() {
            target["x-ferry-tls-dir"] = json!(self.credentials[0]);
        }
        if run.mode.is_postcopy() {
            target["x-ferry-postcopy"] = json!(run.postcopy);
        }
        match run.mode {
            Mode::Local => target["x-ferry-local"] = Value::Bool(true),
            Mode::Storage => target["x-ferry-with-storage"] = Value::Bool(true),
            _ => {}
        }
        source.migrate_with(target);
    }

    /// One fault and what must hold after it.
    fn meets(&mut self, run: &Run, tally: &mut Tally) {
        let which = run.mode.which();
        let mut source = self.owner(which);
        let (destination, path) = self.expect(run);
        let link = self.name("link");
        let proxy = Proxy::new(&self.bed, &link, &path, run.before.unwrap_or(run.place));
        self.sends(&mut source, proxy.uri(), run);
        let proof = match which {
            Which::Leased => Proof::Lease,
            Which::Leaseless => Proof::Nothing,
            Which::WithImages => Proof::Record(self.travel.record_there()),
        };
        let mut pair = Pair::new(source, destination, proxy, proof);
        let held = comes_to_the_place(&mut pair, run);
        let has_met = held.is_some();
        if let Some(held) = held {
            acts(&mut pair, run, held);
        }
        let outcome = pair.decided();
        tally.add(run, has_met, outcome);
        tally.add_help(pair.recoveries, pair.has_spoken);

        let Pair { mut source, mut destination, .. } = pair;
        match outcome {
            Outcome::AtSource => {
                let mut source = source.take().expect("it has the guest");
                let cause = why_it_stayed(&mut source);
                if let Some(theirs) = destination.as_mut().and_then(said_why) {
                    let are_one = cause.contains(&theirs) || theirs.contains(&cause);
                    assert!(
                        are_one || !run.can_be_explained(),
                        "the source says {cause:?}, and the destination {theirs:?}"
                    );
                    tally.add_causes(are_one);
                }
                self.guest(which).works(source, false);
            }
            Outcome::AtDestination => {
                let info = source.as_mut().map(Vm::end_of_migration);
                assert!(info.is_none_or(|info| info.status == MigrationStatus::Completed));
                self.guest(which).works(destination.take().expect("it has the guest"), true);
            }
            Outcome::Dead => {
                // One that lacks memory of its guest can have no other.
                drop(destination.take_if(|vm| vm.status().ownership != FerryOwnership::Incoming));
            }
        }
        drop(source);
        if which == Which::WithImages {
            self.travel.ended(&self.bed, outcome, destination.is_some());
        }
        self.moves_after_all(run, destination);
    }

    /// The second attempt: to the destination that still listens, or to another.
    fn moves_after_all(&mut self, run: &Run, listening: Option<Vm>) {
        let which = run.mode.which();
        let mut source = self.owner(which);
        let destination = match listening {
            Some(vm) => vm,
            None => self.expect(run).0,
        };
        self.sends(&mut source, destination.uri(), run);
        let info = source.migrated();
        assert_eq!(info.disk.is_some_and(|disk| disk.transferred > 0), run.mode == Mode::Storage, "{info:?}");
        let report = source.status().migration.expect("there was one");
        assert_eq!(report.handed_over_bytes > 0, run.mode == Mode::Local, "{report:?}");
        assert_eq!(report.postcopy.is_some(), run.mode.is_postcopy(), "{report:?}");
        if run.mode != Mode::Local && !run.mode.is_postcopy() {
            assert_eq!(report.channel_bytes.len(), usize::from(run.channels), "{report:?}");
        }
        drop(source);
        self.guest(which).works(destination, true);
        if which == Which::WithImages {
            self.travel.ended(&self.bed, Outcome::AtDestination, true);
        }
    }
}

/// What the source says of a migration that has ended with the guest there.
fn why_it_stayed(source: &mut Vm) -> String {
    let info = source.end_of_migration();
    assert!(matches!(info.status, MigrationStatus::Failed | MigrationStatus::Cancelled), "{info:?}");
    info.error_desc.filter(|cause| !cause.is_empty()).expect("a migration that failed says why")
}

/// What a destination says that has no guest, if one was on its way.
fn said_why(destination: &mut Vm) -> Option<String> {
    destination.status().migration?.detail
}

/// Waits until the migration is where the act is to happen; nothing if it ends before it comes there.
fn comes_to_the_place(pair: &mut Pair, run: &Run) -> Option<Held> {
    let mut before = run.before;
    let deadline = Instant::now() + WATCHDOG;
    loop {
        assert!(Instant::now() < deadline, "the migration neither comes to its place nor ends");
        let held = pair.proxy.held_within(GLANCE);
        match held {
            Some(held) => match before {
                None => return Some(held),
                Some(again) if run.phase == Phase::LastBlocks && !stands_still(pair) => {
                    pair.proxy.aim(again);
                    held.resolve(Verdict::Pass);
                }
                Some(_) => {
                    before = None;
                    pair.proxy.aim(run.place);
                    held.resolve(if run.phase == Phase::Recovery { Verdict::Cut } else { Verdict::Pass });
                }
            },
            None if !pair.is_over() => pair.repair(),
            // It is over before the last has been said, which is a place as well.
            None if pair.proxy.is_silent() => return pair.proxy.held_within(Duration::ZERO),
            None => {}
        }
    }
}

/// Whether the guest was stopped for what is sent last.
fn stands_still(pair: &mut Pair) -> bool {
    pair.source.as_mut().is_some_and(|vm| vm.status().status == RunState::FinishMigrate)
}

/// Lets a process stand still.
fn freeze(pair: &mut Pair, mode: Mode, side: Side) -> &Vm {
    let vm = pair.side(side).as_ref().expect("it is there");
    match (mode, side) {
        (mode, Side::Destination) if mode.is_postcopy() => vm.begin_to_freeze(),
        _ => vm.freeze(),
    }
    vm
}

/// Does what is to happen.
fn acts(pair: &mut Pair, run: &Run, held: Held) {
    pair.set_open(run.heals);
    match run.act {
        Act::Cut => held.cut(),
        Act::HalfClose => held.resolve(Verdict::HalfClose),
        Act::Swallow => held.resolve(Verdict::Swallow(run.moment)),
        Act::Delay => {
            pair.set_open(true);
            std::thread::sleep(run.moment);
            held.resolve(Verdict::Pass);
        }
        Act::Cancel => {
            pair.set_open(true);
            let source = pair.source.as_mut().expect("it is there");
            source.execute("migrate_cancel", json!({}));
            held.resolve(Verdict::Pass);
        }
        Act::Kill(side) => {
            pair.side(side).take().expect("it is there").kill();
            held.cut();
        }
        Act::Stop(side) => {
            pair.set_open(true);
            let vm = freeze(pair, run.mode, side);
            held.resolve(Verdict::Pass);
            std::thread::sleep(run.moment);
            vm.thaw();
        }
        Act::StopAndCut(side) => {
            let vm = freeze(pair, run.mode, side);
            held.deliver();
            drop(held);
            std::thread::sleep(run.moment);
            vm.thaw();
        }
    }
}

fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |value| value.parse().expect("a number"))
}

/// One after the other, until a migration has no further message.
#[test]
fn each_message_may_be_cut_off_be_lost_or_come_late() {
    let mut chaos = Chaos::new();
    let mut tally = Tally::default();
    for way in [Way::ToDestination, Way::ToSource] {
        for act in [Act::Cut, Act::Swallow, Act::Delay] {
            let mut nth = 0;
            loop {
                let run = Run::at_message(way, nth, act);
                println!("{way:?} {nth}: {act:?}");
                let met = tally.met();
                chaos.meets(&run, &mut tally);
                if tally.met() == met {
                    break;
                }
                nth += 1;
            }
            println!("measured: {act:?} at each of {nth} messages, {way:?}");
            // Hello, what memory is, PREPARE, COMMIT and PROGRESS; AGREE, SETTLED, PREPARED and RUNNING.
            let least = if way == Way::ToDestination { 5 } else { 4 };
            assert!(nth >= least, "{nth} messages {way:?}");
        }
    }
    chaos.owner(Which::Leased).finish();
}

#[test]
fn whatever_happens_on_the_way_one_guest_runs_in_the_end() {
    let (first, seeds) = (variable("FERRY_CHAOS_FIRST", 0), variable("FERRY_CHAOS_SEEDS", SEEDS));
    let mut chaos = Chaos::new();
    let mut tally = Tally::default();
    for seed in first..first + seeds {
        let run = Run::drawn(seed);
        println!("seed {seed}: {run:?}");
        chaos.meets(&run, &mut tally);
    }
    println!("measured: {seeds} seeds from {first}");
    tally.to_string().lines().for_each(|line| println!("measured: {line}"));
    for which in [Which::Leased, Which::Leaseless, Which::WithImages] {
        chaos.owner(which).finish();
    }
    assert!(u64::from(tally.met()) * 4 > seeds * 3, "most runs come to their place");
    if seeds >= CELLS {
        assert_eq!(tally.missed(), Vec::<String>::new(), "each side is killed and stopped in each phase");
    }
}
