//! What it cost the guest that its memory came after it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Latencies that are kept for their median: those of the last faults.
const LATENCIES_MAX: usize = 1 << 16;

/// Who waited for how long.
#[derive(Clone, Debug, Default)]
pub struct Blocktime {
    /// Times that somebody waited for a page of the source's.
    pub faults: u64,
    /// Touched pages that only had to be cleared.
    pub zero_faults: u64,
    /// By thread.
    threads: BTreeMap<u32, Duration>,
    /// Time in which anybody waited.
    total: Duration,
    /// How many wait, and since when there is one.
    waiting: usize,
    since: Option<Instant>,
    latencies_us: Vec<u32>,
    next: usize,
    longest: Duration,
}

impl Blocktime {
    /// Somebody waits.
    pub(crate) fn begins(&mut self, now: Instant) {
        self.faults += 1;
        self.waiting += 1;
        self.since.get_or_insert(now);
    }

    /// `thread`, which has waited since `since`, has its page.
    pub(crate) fn ends(&mut self, thread: u32, since: Instant, now: Instant) {
        let waited = now.saturating_duration_since(since);
        *self.threads.entry(thread).or_default() += waited;
        self.longest = self.longest.max(waited);
        let microseconds = u32::try_from(waited.as_micros()).unwrap_or(u32::MAX);
        match self.latencies_us.get_mut(self.next) {
            Some(oldest) => *oldest = microseconds,
            None => self.latencies_us.push(microseconds),
        }
        self.next = (self.next + 1) % LATENCIES_MAX;
        self.waiting = self.waiting.saturating_sub(1);
        if self.waiting == 0
            && let Some(since) = self.since.take()
        {
            self.total += now.saturating_duration_since(since);
        }
    }

    /// Time in which anybody waited.
    #[must_use]
    pub fn total(&self, now: Instant) -> Duration {
        self.total + self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// Half of the waits were shorter, of the last 65,536.
    #[must_use]
    pub fn median(&self) -> Duration {
        let mut sorted = self.latencies_us.clone();
        sorted.sort_unstable();
        Duration::from_micros(sorted.get(sorted.len() / 2).copied().unwrap_or_default().into())
    }

    /// The longest wait that is over.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// How long each thread waited, in all.
    pub fn threads(&self) -> impl Iterator<Item = (u32, Duration)> {
        self.threads.iter().map(|(thread, waited)| (*thread, *waited))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_at_the_same_time_count_once_in_the_total_and_once_for_each_thread() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut blocktime = Blocktime::default();
        blocktime.begins(at(0));
        blocktime.begins(at(10));
        blocktime.ends(1, at(0), at(20));
        assert_eq!(blocktime.total(at(25)), Duration::from_millis(25), "one waits still");
        blocktime.ends(2, at(10), at(40));
        blocktime.begins(at(100));
        blocktime.ends(1, at(100), at(101));
        assert_eq!(blocktime.total(at(1000)), Duration::from_millis(41));
        let threads: Vec<_> = blocktime.threads().map(|(thread, time)| (thread, time.as_millis())).collect();
        assert_eq!(threads, [(1, 21), (2, 30)]);
        assert_eq!((blocktime.median().as_millis(), blocktime.longest().as_millis()), (20, 30));
        assert_eq!(blocktime.faults, 3);
    }

    #[test]
    fn the_median_is_of_the_last_waits() {
        let start = Instant::now();
        let mut blocktime = Blocktime::default();
        for wait in (0..LATENCIES_MAX).map(|_| 1).chain((0..LATENCIES_MAX).map(|_| 5)) {
            blocktime.begins(start);
            blocktime.ends(1, start, start + Duration::from_millis(wait));
        }
        assert_eq!(blocktime.latencies_us.len(), LATENCIES_MAX);
        assert_eq!(blocktime.median(), Duration::from_millis(5));
    }
}
