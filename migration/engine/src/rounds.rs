//! Rounds of guest memory while the guest runs, until the rest is small enough for a stop.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Instant;

use crate::ram::Sender;
use crate::sink::Sink;
use crate::speed::{Sample, Speed};
use crate::{Context, Decision, Error, PageBitmap, Situation, SourceMachine, converge};

/// How often the stop is prepared: a guest that always dirties much meanwhile is stopped in the end without.
const PREPARATIONS_MAX: u32 = 3;
/// What the stop costs beside RAM: it was measured at a few milliseconds.
const FIXED_COST: std::time::Duration = std::time::Duration::from_millis(5);

/// Sends what is dirty until the rest is small. Leaves in `pages` what the stop must send.
pub(crate) fn rounds(
    machine: &mut dyn SourceMachine,
    context: &Context<'_>,
    ram: &mut Sender<'_, Sink<'_>>,
    pages: &mut Vec<PageBitmap>,
) -> Result<(), Error> {
    let statistics = context.statistics;
    let mut speed = Speed::default();
    let mut round = 0_u32;
    let mut preparations = 0;
    loop {
        round = round.saturating_add(1);
        let planned_pages: u64 = pages.iter().map(PageBitmap::count).sum();
        let planned = planned_pages * crate::PAGE_BYTES;
        statistics.update(|s| {
            s.rounds = round;
            s.remaining_bytes = planned;
        });
        let start = Instant::now();
        let (before, waited, sending) = (ram.out().sent_bytes(), ram.out().waited(), ram.out().sending());
        ram.round(pages)?;
        ram.out().send()?;
        let sent = ram.out().sent_bytes() - before;
        let sending = ram.out().sending() - sending;
        let working = start.elapsed().saturating_sub(ram.out().waited() - waited + sending);
        speed.add(&Sample { pages: planned_pages, working, sent_bytes: sent, sending });

        *pages = machine.collect_dirty().map_err(Error::machine("read the dirty pages"))?;
        let dirty_pages: u64 = pages.iter().map(PageBitmap::count).sum();
        let parameters = context.parameters;
        let mut situation = Situation {
            rounds: round,
            remaining_bytes: dirty_pages * crate::PAGE_BYTES,
            previous_remaining_bytes: planned,
            bytes_per_second: speed.bytes_per_second(),
            downtime_limit: parameters.downtime_limit(),
            fixed_cost: FIXED_COST,
            rounds_limit: parameters.rounds_limit(),
        };
        let seconds = start.elapsed().as_secs_f64().max(1e-6);
        statistics.update(|s| {
            s.remaining_bytes = situation.remaining_bytes;
            s.dirty_pages_per_second = (dirty_pages as f64 / seconds) as u64;
            s.bytes_per_second = (sent as f64 / seconds) as u64;
            s.expected_downtime = situation.expected_downtime();
        });
        ram.out().report(&statistics.progress())?;
        let mut decision = converge(&situation);
        if decision == Decision::Stop && preparations < PREPARATIONS_MAX {
            preparations += 1;
            prepare_stop(machine, context, ram);
            // That may have taken long, and the guest went on.
            let more = machine.collect_dirty().map_err(Error::machine("read the dirty pages"))?;
            pages.iter_mut().zip(&more).for_each(|(bitmap, more)| bitmap.union(more));
            let dirty_pages: u64 = pages.iter().map(PageBitmap::count).sum();
            situation.remaining_bytes = dirty_pages * crate::PAGE_BYTES;
            // Whether rounds pay is not known of this: one shows it.
            situation.previous_remaining_bytes = u64::MAX;
            decision = converge(&situation);
        }
        match decision {
            Decision::AnotherRound => {}
            Decision::Stop => return Ok(()),
            Decision::GiveUp => {
                return Err(Error::NoConvergence {
                    rounds: round,
                    remaining_bytes: situation.remaining_bytes,
                    expected: situation.expected_downtime(),
                    limit: situation.downtime_limit,
                });
            }
        }
    }
}

/// Lets the machine do what would lengthen the stop. That may take long (images are written back), and the destination waits
/// for no silent source: a thread tells it meanwhile that this one lives.
pub(crate) fn prepare_stop(
    machine: &mut dyn SourceMachine,
    context: &Context<'_>,
    ram: &mut Sender<'_, Sink<'_>>,
) {
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
