//! Which submission queue is served next (Base 3.4.4): round robin, or weighted round robin with an urgent class.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nvme_spec::regs::AMS_WEIGHTED;

use crate::doorbell::MemoryGone;
use crate::shared::Shared;
use crate::worker::Worker;

/// Most commands fetched from one queue before the next has its turn, whatever the Arbitration feature allows.
const BURST: u32 = 32;
/// Rounds of bursts over all queues in one call.
const ROUNDS: u32 = 4;
/// The Arbitration feature after a reset: Arbitration Burst 111b (no limit), all weights 1.
pub(crate) const DEFAULT_ARBITRATION: u32 = 0b111;
/// Bits of the Arbitration feature; 7:3 are reserved.
pub(crate) const ARBITRATION_BITS: u32 = 0xffff_ff07;
const NO_LIMIT: u32 = 0b111;

/// Priority classes of submission queues (Base 5.5, QPRIO), which count only with weighted round robin.
const URGENT: u8 = 0;
const WEIGHTED: [u8; 3] = [1, 2, 3];

/// What workers read of CC.AMS and the Arbitration feature.
pub(crate) struct Arbitration {
    weighted: AtomicBool,
    feature: AtomicU32,
}

impl Arbitration {
    pub fn new() -> Self {
        Self { weighted: AtomicBool::new(false), feature: AtomicU32::new(DEFAULT_ARBITRATION) }
    }

    /// Takes over CC.AMS and the feature (Base 5.27.1.1).
    pub fn set(&self, ams: u32, feature: u32) {
        self.feature.store(feature, Ordering::Relaxed);
        self.weighted.store(ams == AMS_WEIGHTED, Ordering::Relaxed);
    }

    /// Commands fetched from a queue in one turn: "the maximum number of commands that the controller may fetch at one time from a
    /// particular Submission Queue".
    fn burst(&self) -> u32 {
        match self.feature.load(Ordering::Relaxed) & NO_LIMIT {
            NO_LIMIT => BURST,
            shift => BURST.min(1 << shift),
        }
    }

    /// Commands of a class in one round: its weight, a 0's based value, low first in the feature.
    fn weight(&self, class: u8) -> u32 {
        let feature = self.feature.load(Ordering::Relaxed);
        let shift = 8 * (4 - u32::from(class.clamp(1, 3)));
        (feature >> shift & 0xff) + 1
    }
}

impl Worker {
    /// Fetches and starts commands, a bounded number. `true`: there are more that could be fetched.
    pub fn fetch(&mut self, shared: &Shared) -> Result<bool, MemoryGone> {
        let arbitration = &shared.arbitration;
        let burst = arbitration.burst();
        let weighted = arbitration.weighted.load(Ordering::Relaxed);
        // Short turns are more turns: a burst of 1 costs no queue that is alone its rate.
        let rounds = if weighted { ROUNDS } else { ROUNDS * BURST / burst };
        let mut more = true;
        for _ in 0..rounds {
            more =
                if weighted { self.weighted_round(shared, burst)? } else { self.fetch_round(shared, burst)? };
            if !more {
                break;
            }
        }
        if !weighted {
            // Where slots ran out another queue begins next time.
            self.turns[0] = (self.turns[0] + 1) % self.sqs.len().max(1);
        }
        Ok(more)
    }

    /// One turn of every submission queue. `true`: some queue has entries left that could be fetched.
    fn fetch_round(&mut self, shared: &Shared, burst: u32) -> Result<bool, MemoryGone> {
        let mut more = false;
        let count = self.sqs.len();
        for turn in 0..count {
            let index = (self.turns[0] + turn) % count;
            more |= self.fetch_burst(shared, index, burst)?;
        }
        Ok(more)
    }

    /// The urgent class as long as it has commands, then each of the others up to its weight. "The highest strict priority class is the
    /// Admin class ... the next highest strict priority class is the Urgent class ... the lowest is the Weighted Round Robin class."
    fn weighted_round(&mut self, shared: &Shared, burst: u32) -> Result<bool, MemoryGone> {
        if self.fetch_class(shared, URGENT, ROUNDS * BURST, burst)? {
            return Ok(true);
        }
        let mut more = false;
        for class in WEIGHTED {
            more |= self.fetch_class(shared, class, shared.arbitration.weight(class), burst)?;
        }
        Ok(more)
    }

    /// Round robin among the queues of `class` until `credit` commands were fetched or none can be. `true`: there may be more.
    fn fetch_class(
        &mut self,
        shared: &Shared,
        class: u8,
        mut credit: u32,
        burst: u32,
    ) -> Result<bool, MemoryGone> {
        let (count, place) = (self.sqs.len(), usize::from(class));
        let mut idle_turns = 0;
        while credit > 0 {
            if idle_turns >= count {
                return Ok(false);
            }
            let index = self.turns[place] % count;
            self.turns[place] = index + 1;
            let of_class = self.sqs[index].as_ref().filter(|queue| queue.priority == class);
            let mut fetched = 0;
            if let Some(before) = of_class.map(|queue| queue.head) {
                self.fetch_burst(shared, index, burst.min(credit))?;
                fetched = self.sqs[index].as_ref().map_or(0, |queue| queue.ring.distance(before, queue.head));
            }
            idle_turns = if fetched == 0 { idle_turns + 1 } else { 0 };
            credit -= fetched.min(credit);
        }
        Ok(true)
    }
}
