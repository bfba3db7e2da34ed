//! Rounds of guest memory while the guest runs, until the rest is small enough for a stop.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::features::POSTCOPY;
use crate::ram::Outgoing;
use crate::speed::{Sample, Speed};
use crate::storage::Leaving;
use crate::{
    Context, Decision, Error, Following, OnTimeout, PAGE_BYTES, PageBitmap, Parameters, PostcopyStart,
    Situation, SourceMachine, Trend, converge,
};

/// How often the stop is prepared: a guest that always dirties much meanwhile is stopped in the end without.
const PREPARATIONS_MAX: u32 = 3;
/// What the stop costs beside RAM: it was measured at a few milliseconds.
const FIXED_COST: Duration = Duration::from_millis(5);
/// Pages of the first portion of a round. The time of a migration may end within a round, which is looked at between portions.
const PORTION_PAGES: u64 = 256;
/// A portion grows while it takes less, and shrinks when it takes four times as long.
const PORTION_TIME: Duration = Duration::from_millis(100);

/// Refuses a user who wants postcopy in the end, where source and destination have not agreed on that.
pub(crate) fn check_way_out(parameters: &Parameters, granted: u64) -> Result<(), Error> {
    match parameters.convergence().on_timeout {
        OnTimeout::Postcopy if granted & POSTCOPY == 0 => Err(Error::PostcopyNotAgreed),
        OnTimeout::Cancel | OnTimeout::Force | OnTimeout::Postcopy => Ok(()),
    }
}

/// What becomes of the pages that are left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rest {
    /// They are sent while the guest is stopped.
    Stops,
    /// They follow after the guest.
    Follows,
}

/// Sends what is dirty until the rest is small, or is to follow after the guest, where that `may_follow`. Leaves it in `pages`.
pub(crate) fn rounds(
    machine: &mut dyn SourceMachine,
    context: &Context<'_>,
    ram: &mut Outgoing<'_>,
    pages: &mut [PageBitmap],
    (may_follow, mut disks): (bool, Option<&mut Leaving>),
) -> Result<Rest, Error> {
    let (statistics, parameters) = (context.statistics, context.parameters);
    let postcopy = parameters.postcopy();
    if may_follow && postcopy == PostcopyStart::AtOnce {
        return lets_follow(machine, context, ram, pages);
    }
    let mut speed = Speed::default();
    let mut throttle = Throttle::new(context);
    let mut portion_pages = PORTION_PAGES;
    let mut round = 0_u32;
    let mut preparations = 0;
    loop {
        round = round.saturating_add(1);
        let start = Instant::now();
        let (before, waited, sending) = (ram.out().sent_bytes(), ram.out().waited(), ram.out().sending());
        let contents = statistics.contents();
        let planned_blocks = remaining_bytes(disks.as_deref());
        statistics.update(|s| s.rounds = round);
        // Images before memory, which changes faster: what is sent last is least out of date.
        let (mut sent_blocks, mut early_pages) = (0, 0);
        if let Some(disks) = &mut disks {
            sent_blocks = disks.round(context, ram.out())?;
            // That may have taken long, and what the guest wrote meanwhile is sent with the rest.
            let more = machine.collect_dirty().map_err(Error::machine("read the dirty pages"))?;
            early_pages = count(&more);
            unite(pages, &more);
        }
        let planned_pages = count(pages);
        statistics.update(|s| s.remaining_bytes = planned_pages * PAGE_BYTES);
        send(context, ram, pages, &mut portion_pages)?;
        let sent = ram.out().sent_bytes() - before;
        let sending = ram.out().sending() - sending;
        let working = start.elapsed().saturating_sub(ram.out().waited() - waited + sending);
        // All, unless the time ended.
        let sent_pages = planned_pages - count(pages);
        // A page of an image costs what one of memory does: both are read, looked at and sent.
        let looked_at = sent_pages + sent_blocks / PAGE_BYTES;
        let contents = statistics.contents().since(contents);
        speed.add(&Sample { pages: looked_at, working, sent_bytes: sent, sending, contents });

        let dirty = machine.collect_dirty().map_err(Error::machine("read the dirty pages"))?;
        let dirty_pages = count(&dirty);
        unite(pages, &dirty);
        let dirty_blocks = match &mut disks {
            Some(disks) => disks.look(statistics)?,
            None => 0,
        };
        let elapsed = start.elapsed();
        throttle.saw(Trend {
            sent_bytes: looked_at * PAGE_BYTES,
            dirtied_bytes: (early_pages + dirty_pages) * PAGE_BYTES + dirty_blocks,
        });
        let mut situation = Situation {
            rounds: round,
            elapsed: statistics.elapsed(),
            remaining_bytes: rest(pages, disks.as_deref(), &speed),
            previous_remaining_bytes: (planned_pages * PAGE_BYTES)
                .saturating_add(speed.as_memory(planned_blocks)),
            bytes_per_second: speed.bytes_per_second(),
            downtime_limit: parameters.downtime_limit(),
            fixed_cost: FIXED_COST,
            throttle_percent: throttle.percent,
            trend: throttle.trend(),
            convergence: parameters.convergence(),
            following: match postcopy {
                _ if !may_follow => Following::Unasked,
                _ if parameters.postcopy_is_wished() => Following::Now,
                PostcopyStart::AfterFirstRound => Following::WhereTheRestIsLong,
                _ => Following::Unasked,
            },
        };
        let seconds = elapsed.as_secs_f64().max(1e-6);
        statistics.update(|s| {
            s.remaining_bytes = count(pages) * PAGE_BYTES;
            s.dirty_pages_per_second = ((early_pages + dirty_pages) as f64 / seconds) as u64;
            s.bytes_per_second = (sent as f64 / seconds) as u64;
            s.expected_downtime = situation.expected_downtime();
        });
        ram.out().report(&statistics.progress())?;
        let mut decision = converge(&situation);
        if decision == Decision::Stop && preparations < PREPARATIONS_MAX {
            preparations += 1;
            ram.settle(|ram| prepare_stop(machine, context, ram))?;
            // That may have taken long, and the guest went on.
            let more = machine.collect_dirty().map_err(Error::machine("read the dirty pages"))?;
            unite(pages, &more);
            if let Some(disks) = &mut disks {
                disks.look(statistics)?;
            }
            situation.elapsed = statistics.elapsed();
            situation.remaining_bytes = rest(pages, disks.as_deref(), &speed);
            // Whether rounds pay is not known of this: one shows it.
            situation.previous_remaining_bytes = u64::MAX;
            decision = converge(&situation);
        }
        throttle.heed(&situation, decision, machine)?;
        match decision {
            Decision::AnotherRound | Decision::Throttle { .. } => {}
            Decision::Stop => return Ok(Rest::Stops),
            Decision::Postcopy if may_follow => return lets_follow(machine, context, ram, pages),
            Decision::Postcopy => return Err(Error::PostcopyNotAgreed),
            Decision::GiveUp => return Err(given_up(&situation)),
        }
    }
}

/// Does what would lengthen the stop, before the rest of memory is named.
fn lets_follow(
    machine: &mut dyn SourceMachine,
    context: &Context<'_>,
    ram: &mut Outgoing<'_>,
    pages: &mut [PageBitmap],
) -> Result<Rest, Error> {
    prepare_stop(machine, context, ram);
    // The guest went on meanwhile.
    let more = machine.collect_dirty().map_err(Error::machine("read the dirty pages"))?;
    unite(pages, &more);
    Ok(Rest::Follows)
}

/// Sends `pages` in portions. Those that are not sent when the time is over stay.
fn send(
    context: &Context<'_>,
    ram: &mut Outgoing<'_>,
    pages: &mut [PageBitmap],
    portion_pages: &mut u64,
) -> Result<(), Error> {
    loop {
        let mut room = *portion_pages;
        let mut take = |bitmap: &mut PageBitmap| {
            let taken = bitmap.take_first(room);
            room -= taken.count();
            taken
        };
        let portion: Vec<_> = pages.iter_mut().map(&mut take).collect();
        let start = Instant::now();
        ram.round(&portion)?;
        let is_last = room > 0 || count(pages) == 0;
        let parameters = context.parameters;
        let is_out_of_time = parameters.convergence().is_out_of_time(context.statistics.elapsed());
        if is_last || is_out_of_time || parameters.postcopy_is_wished() {
            return ram.out().send();
        }
        let took = start.elapsed();
        if took < PORTION_TIME {
            *portion_pages = portion_pages.saturating_mul(2);
        } else if took > PORTION_TIME * 4 {
            *portion_pages = (*portion_pages / 2).max(PORTION_PAGES);
        }
    }
}

/// What another round or the stop must send, in bytes of guest memory.
fn rest(pages: &[PageBitmap], disks: Option<&Leaving>, speed: &Speed) -> u64 {
    (count(pages) * PAGE_BYTES).saturating_add(speed.as_memory(remaining_bytes(disks)))
}

fn remaining_bytes(disks: Option<&Leaving>) -> u64 {
    disks.map_or(0, Leaving::remaining_bytes)
}

fn count(pages: &[PageBitmap]) -> u64 {
    pages.iter().map(PageBitmap::count).sum()
}

fn unite(pages: &mut [PageBitmap], more: &[PageBitmap]) {
    pages.iter_mut().zip(more).for_each(|(bitmap, more)| bitmap.union(more));
}

fn given_up(situation: &Situation) -> Error {
    let Situation { rounds, remaining_bytes, downtime_limit: limit, convergence, .. } = *situation;
    let expected = situation.expected_downtime();
    match convergence.timeout {
        Some(allowed) if convergence.is_out_of_time(situation.elapsed) => {
            Error::OutOfTime { allowed, rounds, remaining_bytes, expected, limit }
        }
        _ => Error::NoConvergence { rounds, remaining_bytes, expected, limit },
    }
}

/// How much the vCPUs are slowed down, and what rounds have shown since that was last judged.
struct Throttle<'a> {
    context: &'a Context<'a>,
    percent: u8,
    seen: Trend,
    since: Instant,
}

impl<'a> Throttle<'a> {
    fn new(context: &'a Context<'a>) -> Self {
        Self { context, percent: 0, seen: Trend::default(), since: Instant::now() }
    }

    /// After a round.
    fn saw(&mut self, round: Trend) {
        self.seen.sent_bytes = self.seen.sent_bytes.saturating_add(round.sent_bytes);
        self.seen.dirtied_bytes = self.seen.dirtied_bytes.saturating_add(round.dirtied_bytes);
    }

    /// Once it can be believed.
    fn trend(&self) -> Option<Trend> {
        (self.since.elapsed() >= self.context.patience.throttle).then_some(self.seen)
    }

    /// Does what was decided and begins to look anew.
    fn heed(
        &mut self,
        situation: &Situation,
        decision: Decision,
        machine: &mut dyn SourceMachine,
    ) -> Result<(), Error> {
        if situation.trend.is_some() {
            (self.seen, self.since) = (Trend::default(), Instant::now());
        }
        match decision {
            Decision::Throttle { percent } => {
                machine.throttle(percent).map_err(Error::machine("slow the vCPUs down"))?;
                self.percent = percent;
            }
            _ if self.percent > 0 && !situation.convergence.auto_converge => {
                machine.stop_throttling();
                self.percent = 0;
            }
            _ => return Ok(()),
        }
        let percent = self.percent;
        log::info!("the vCPUs are slowed down by {percent} % of their time");
        self.context.statistics.update(|s| s.throttle_percent = percent);
        Ok(())
    }
}

/// Lets the machine do what would lengthen the stop. That may take long (images are written back), and the destination waits
/// for no silent source: a thread tells it meanwhile that this one lives.
pub(crate) fn prepare_stop(machine: &mut dyn SourceMachine, context: &Context<'_>, ram: &mut Outgoing<'_>) {
    let (statistics, interval) = (context.statistics, context.patience.silence / 4);
    std::thread::scope(|scope| {
        let (prepared, preparing) = channel::<()>();
        scope.spawn(move || {
            while preparing.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                // A link that is broken shows when the next page is sent.
                if ram.out().report(&statistics.progress()).is_err() {
                    return;
                }
            }
        });
        machine.prepare_stop();
        drop(prepared);
    });
}
