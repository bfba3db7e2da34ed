//! Who has the guest in the end: two processes are watched, and what needs an operator is done by one.
//!
//! What is accepted: the guest runs in one of the two processes, and the other says why it does not run there. Or it died with a
//! process that was killed: with the one that had it, or, as long as some of its memory was still at its source, with either; then the
//! one that is left says what it lacks, or keeps. Without a common lease it may be undecided whose the guest is, but only as long as the
//! processes cannot reach each other, or one of them is gone.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::lease::State;
use ferry::control::{FerryOwnership, FerryStatus, MigrationInfo, RunState};
use serde_json::json;
use stream::frame::Kind;
use support::{Proxy, Vm, WATCHDOG};

use super::draw::Side;
use super::images;

/// After how long an operator tries again what has had no success.
const AGAIN: Duration = Duration::from_millis(100);

/// Where the guest is in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    AtSource,
    AtDestination,
    /// With the process that had it, or that had memory of it.
    Dead,
}

/// What tells whose the guest is when its destination does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// A lease that both sides see. Nobody is asked.
    Lease,
    /// An operator knows that it never runs again, and has written nothing that is left.
    Nothing,
    /// An operator reads the record beside the images of the destination.
    Record(PathBuf),
}

/// A migration and its two processes, as far as they were not killed.
pub struct Pair {
    pub source: Option<Vm>,
    pub destination: Option<Vm>,
    pub proxy: Proxy,
    /// Whether the link carries new connections.
    pub is_open: bool,
    /// What decides.
    pub proof: Proof,
    /// The operator said whose the guest is.
    pub has_spoken: bool,
    /// How often the operator replaced lost links.
    pub recoveries: u32,
    /// When the operator has done so last.
    repaired_at: Option<Instant>,
}

fn runs(status: Option<&FerryStatus>) -> bool {
    status
        .is_some_and(|status| status.ownership == FerryOwnership::Owned && status.status == RunState::Running)
}

fn phase(status: &FerryStatus) -> &str {
    status.migration.as_ref().map_or("none", |migration| &migration.phase)
}

/// Whether it waits for a guest, and has said why none came, if one was on its way: that one never runs there.
fn waits(status: &FerryStatus) -> bool {
    let has_said_why = match phase(status) {
        "none" => true,
        "failed" => status.migration.as_ref().is_some_and(|migration| migration.detail.is_some()),
        _ => false,
    };
    status.ownership == FerryOwnership::Incoming && status.status == RunState::Inmigrate && has_said_why
}

/// Whether it has said that it lacks memory, and why none comes.
fn lacks_memory_for_good(status: &FerryStatus) -> bool {
    let postcopy = status.migration.as_ref().and_then(|migration| migration.postcopy.as_ref());
    phase(status) == "postcopy-paused"
        && postcopy.is_some_and(|postcopy| postcopy.paused.is_some() && postcopy.missing_bytes > 0)
}

impl Pair {
    pub fn new(source: Vm, destination: Vm, proxy: Proxy, proof: Proof) -> Self {
        Self {
            source: Some(source),
            destination: Some(destination),
            proxy,
            is_open: true,
            proof,
            has_spoken: false,
            recoveries: 0,
            repaired_at: None,
        }
    }

    /// Whether the link carries new connections from now on.
    pub fn set_open(&mut self, open: bool) {
        self.is_open = open;
        if open { self.proxy.take_more() } else { self.proxy.refuse_more() }
    }

    /// Whether the source says that its migration has ended, or is gone.
    pub fn is_over(&mut self) -> bool {
        let Some(source) = &mut self.source else { return true };
        let info = serde_json::from_value::<MigrationInfo>(source.execute("query-migrate", json!({})));
        info.is_ok_and(|info| info.status.is_final())
    }

    /// One of the processes.
    pub fn side(&mut self, side: Side) -> &mut Option<Vm> {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        }
    }

    /// Replaces the links of a guest that lacks memory, if they are lost.
    pub fn repair(&mut self) {
        let here = self.source.as_mut().map(Vm::status);
        let there = self.destination.as_mut().map(Vm::status);
        self.help(here.as_ref(), there.as_ref());
    }

    /// Waits until it is decided who has the guest. At no time do both.
    pub fn decided(&mut self) -> Outcome {
        let deadline = Instant::now() + WATCHDOG;
        loop {
            // In this order: who gave the guest away can never have it again.
            let there = self.destination.as_mut().map(Vm::status);
            let here = self.source.as_mut().map(Vm::status);
            assert!(
                !(runs(here.as_ref()) && runs(there.as_ref())),
                "the guest runs twice: {here:?} {there:?}"
            );
            if let Some(outcome) = self.outcome(here.as_ref(), there.as_ref()) {
                return outcome;
            }
            self.help(here.as_ref(), there.as_ref());
            assert!(Instant::now() < deadline, "nobody knows whose the guest is: {here:?} and {there:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn outcome(&mut self, here: Option<&FerryStatus>, there: Option<&FerryStatus>) -> Option<Outcome> {
        let is_over = self.is_over();
        let gave_away = here.is_none_or(|status| status.ownership == FerryOwnership::GivenAway);
        let is_left_alone = here.is_some_and(|status| phase(status) == "postcopy-paused");
        let outcome = match (runs(here), there) {
            (true, there) => {
                return (is_over && there.is_none_or(waits)).then_some(Outcome::AtSource);
            }
            (false, None) => (gave_away && (is_over || is_left_alone)).then_some(Outcome::Dead),
            // It stands still while its memory does not come.
            (false, Some(there))
                if there.ownership == FerryOwnership::Owned && phase(there).starts_with("postcopy") =>
            {
                (here.is_none() && lacks_memory_for_good(there)).then_some(Outcome::Dead)
            }
            (false, Some(there)) if runs(Some(there)) => {
                (gave_away && is_over).then_some(Outcome::AtDestination)
            }
            (false, Some(there)) => (here.is_none() && waits(there)).then_some(Outcome::Dead),
        };
        if outcome == Some(Outcome::Dead) && is_left_alone {
            self.keeps_memory();
        }
        outcome
    }

    /// A source whose guest is gone with memory that was still to follow does not know that, and ends only if it is told to.
    fn keeps_memory(&mut self) {
        let source = self.source.as_mut().expect("it is left alone");
        let postcopy = source.status().migration.and_then(|migration| migration.postcopy);
        assert!(postcopy.as_ref().is_some_and(|postcopy| postcopy.paused.is_some()), "{postcopy:?}");
        let reason = source.refused("quit", json!({}));
        assert!(reason.contains("still needs memory"), "{reason}");
    }

    /// Whether the destination, which is gone, had the guest, as far as that matters.
    fn has_been_taken(&self) -> bool {
        match &self.proof {
            Proof::Lease | Proof::Nothing => self.proxy.saw(Kind::Running, Duration::ZERO),
            Proof::Record(path) => is_taken(path),
        }
    }

    /// What an operator does who sees both processes.
    fn help(&mut self, here: Option<&FerryStatus>, there: Option<&FerryStatus>) {
        let (Some(here), Some(source)) = (here, &mut self.source) else { return };
        let is_lost = phase(here) == "postcopy-paused" && there.is_some();
        if is_lost && self.repaired_at.is_none_or(|at| at.elapsed() >= AGAIN) {
            // Refused if an attempt is under way.
            if source.client().execute("migrate-recover", json!({})).is_ok() {
                self.recoveries += 1;
            }
            self.repaired_at = Some(Instant::now());
            self.set_open(true);
        }
        let calls = here.migration.as_ref().and_then(|migration| migration.detail.as_ref());
        let is_undecided = here.ownership == FerryOwnership::HandoverUnknown
            && calls.is_some_and(|detail| detail.contains("ferry reclaim"));
        if !is_undecided || self.has_spoken {
            return;
        }
        assert!(self.proof != Proof::Lease, "the lease decides: {here:?}");
        let word = match there {
            // They will find out: there is a link.
            Some(_) if self.is_open => return,
            Some(there) if there.ownership == FerryOwnership::Owned => "x-ferry-confirm",
            Some(there) if waits(there) => "x-ferry-reclaim",
            Some(_) => return,
            None if self.has_been_taken() => "x-ferry-confirm",
            None => "x-ferry-reclaim",
        };
        let source = self.source.as_mut().expect("it asks");
        source.execute(word, json!({}));
        self.has_spoken = true;
    }
}

/// Whether the record at `path` says that the images beside it are those of a guest that came.
fn is_taken(path: &Path) -> bool {
    images::record(path).is_some_and(|record| matches!(record.state, State::Taken { .. }))
}
