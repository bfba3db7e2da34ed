//! How long a worker looks for work itself before its thread sleeps.
//!
//! A guest that has shadow doorbells need not leave the virtual machine as long as somebody looks at them, and a thread that does not
//! sleep need not be woken. But a processor that looks for work does nothing else. So a worker looks only within a [`Window`]
//! after its work ran out. The window follows the guest: it grows while work comes soon after a window that was too short, and
//! shrinks down to nothing while a longer one would not have helped either.

use std::hint::spin_loop;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Least window that is not none: about what it costs to sleep and be woken.
const SHORTEST: Duration = Duration::from_micros(4);
/// What `--io-poll` may ask for at most. More would only burn.
const LONGEST: Duration = Duration::from_millis(10);
/// The default where there is one.
const DEFAULT: Duration = Duration::from_micros(50);
/// A turn is over after this long even if there is always more to do: others have their turns on the same thread.
const LONGEST_TURN: Duration = Duration::from_millis(1);
/// Looks between two at the clock, while there is work.
const LOOKS: u32 = 16;

/// The longest window; zero: no looking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoPoll(pub Duration);

impl IoPoll {
    /// The default on a host of `cores` for a machine that keeps `threads` busy, vCPUs and I/O threads: a host without a core to
    /// spare does not look, since what looked would take the time of what is looked for.
    #[must_use]
    pub fn for_host(cores: usize, threads: usize) -> Self {
        Self(if cores > threads { DEFAULT } else { Duration::ZERO })
    }
}

impl FromStr for IoPoll {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(Duration::ZERO));
        }
        let most = LONGEST.as_micros();
        match text.parse() {
            Ok(microseconds) if (1..=most).contains(&u128::from(microseconds)) => {
                Ok(Self(Duration::from_micros(microseconds)))
            }
            _ => Err(format!("it is neither off nor a number of microseconds from 1 to {most}")),
        }
    }
}

/// How long to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    length: Duration,
    most: Duration,
}

impl Window {
    /// Begins with no window, which grows up to `most`.
    #[must_use]
    pub fn new(most: Duration) -> Self {
        Self { length: Duration::ZERO, most }
    }

    /// Its length now.
    #[must_use]
    pub fn length(self) -> Duration {
        self.length
    }

    /// The window for next time, after work came `idle` after the last had run out.
    #[must_use]
    pub fn after(self, idle: Duration) -> Self {
        let length = if idle <= self.length {
            self.length
        } else if idle <= self.most {
            (self.length * 2).clamp(SHORTEST, self.most.max(SHORTEST)).min(self.most)
        } else {
            Some(self.length / 2).filter(|length| *length >= SHORTEST).unwrap_or_default()
        };
        Self { length, ..self }
    }
}

/// What looking brought, for status displays.
#[derive(Debug, Default)]
pub struct PollCounters {
    /// Turns: each time the thread was called.
    turns: AtomicU64,
    /// Times that work ran out and a window began.
    polls: AtomicU64,
    /// Windows within which work came.
    hits: AtomicU64,
}

/// [`PollCounters`] at some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PollStatistics {
    /// Turns: each time the thread was called.
    pub turns: u64,
    /// Times that work ran out and a window began.
    pub polls: u64,
    /// Windows within which work came.
    pub hits: u64,
}

impl PollCounters {
    /// The numbers now.
    #[must_use]
    pub fn read(&self) -> PollStatistics {
        let [turns, polls, hits] =
            [&self.turns, &self.polls, &self.hits].map(|counter| counter.load(Ordering::Relaxed));
        PollStatistics { turns, polls, hits }
    }
}

/// Why a turn is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TurnEnd {
    /// There may be more to do; it has been long enough.
    Long,
    /// Nothing has come for a window.
    Idle,
}

/// The looking of one worker.
#[derive(Debug)]
pub struct Poller {
    window: Window,
    /// When the work ran out, if no more has come since.
    idle_since: Option<Instant>,
    counters: Arc<PollCounters>,
}

impl Poller {
    /// One that looks for `most` at a time.
    #[must_use]
    pub fn new(most: IoPoll, counters: Arc<PollCounters>) -> Self {
        Self { window: Window::new(most.0), idle_since: None, counters }
    }

    /// Calls `look`, which says whether it found work, until a window has passed without any, or the turn gets long.
    pub fn turn(&mut self, mut look: impl FnMut() -> bool) -> TurnEnd {
        let begun = Instant::now();
        let (mut now, mut looks) = (begun, 0_u32);
        // Of a window that begins in this turn; the worker was asleep before it.
        let mut window_from = begun;
        let mut polls = false;
        self.counters.turns.fetch_add(1, Ordering::Relaxed);
        loop {
            if look() {
                if let Some(since) = self.idle_since.take() {
                    self.window = self.window.after(now.saturating_duration_since(since));
                    if std::mem::take(&mut polls) {
                        self.counters.hits.fetch_add(1, Ordering::Relaxed);
                    }
                }
                looks = looks.wrapping_add(1);
                if looks.is_multiple_of(LOOKS) {
                    now = Instant::now();
                    if now.saturating_duration_since(begun) >= LONGEST_TURN {
                        return TurnEnd::Long;
                    }
                }
                continue;
            }
            now = Instant::now();
            if self.idle_since.is_none() {
                self.idle_since = Some(now);
                window_from = now;
            }
            if now.saturating_duration_since(window_from) >= self.window.length() {
                return TurnEnd::Idle;
            }
            if !std::mem::replace(&mut polls, true) {
                self.counters.polls.fetch_add(1, Ordering::Relaxed);
            }
            spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    /// Lengths after each of `idle`, in microseconds.
    fn lengths(most: u64, idle: &[u64]) -> Vec<u64> {
        let steps = idle.iter().scan(Window::new(micros(most)), |window, &idle| {
            *window = window.after(micros(idle));
            Some(window.length().as_micros() as u64)
        });
        steps.collect()
    }

    #[test]
    fn a_window_grows_until_work_comes_within_it() {
        assert_eq!(lengths(50, &[20, 20, 20, 20, 20]), [4, 8, 16, 32, 32]);
        assert_eq!(lengths(50, &[45; 7]), [4, 8, 16, 32, 50, 50, 50], "up to the longest, and no further");
        assert_eq!(lengths(3, &[2, 2]), [3, 3], "a longest below the shortest holds");
    }

    #[test]
    fn a_window_shrinks_to_nothing_while_work_comes_too_late_for_any() {
        assert_eq!(lengths(50, &[40, 40, 40, 40, 51, 51, 51, 51, 51]), [4, 8, 16, 32, 16, 8, 4, 0, 0]);
        assert_eq!(lengths(50, &[1_000_000]), [0]);
    }

    #[test]
    fn a_worker_without_a_window_never_looks_twice() {
        assert_eq!(lengths(0, &[0, 1, 1000]), [0, 0, 0]);
        let counters = Arc::new(PollCounters::default());
        let mut poller = Poller::new(IoPoll(Duration::ZERO), Arc::clone(&counters));
        let mut looks = 0;
        let end = poller.turn(|| {
            looks += 1;
            looks <= 3
        });
        assert_eq!((end, looks), (TurnEnd::Idle, 4));
        assert_eq!(counters.read(), PollStatistics { turns: 1, polls: 0, hits: 0 });
    }

    #[test]
    fn work_that_comes_within_the_window_is_a_hit() {
        let counters = Arc::new(PollCounters::default());
        let mut poller = Poller::new(IoPoll(LONGEST), Arc::clone(&counters));
        // A window so long that no pause of the test can end it.
        poller.window = Window { length: Duration::from_secs(3600), most: Duration::from_secs(3600) };
        let mut looks = 0;
        let end = poller.turn(|| {
            looks += 1;
            // Ten times nothing, then work for good.
            looks > 10
        });
        assert_eq!(end, TurnEnd::Long, "work without end ends a turn");
        assert_eq!(counters.read(), PollStatistics { turns: 1, polls: 1, hits: 1 });
    }

    #[test]
    fn hosts_with_a_core_to_spare_look() {
        assert_eq!(IoPoll::for_host(4, 3), IoPoll(DEFAULT));
        assert_eq!(IoPoll::for_host(2, 2), IoPoll(Duration::ZERO));
        assert_eq!(IoPoll::for_host(1, 2), IoPoll(Duration::ZERO));
    }

    #[test]
    fn the_flag_is_off_or_a_time() {
        assert_eq!("off".parse(), Ok(IoPoll(Duration::ZERO)));
        assert_eq!("32".parse(), Ok(IoPoll(micros(32))));
        assert_eq!("10000".parse(), Ok(IoPoll(LONGEST)));
        for text in ["", "0", "10001", "-1", "on", "5us"] {
            assert!(text.parse::<IoPoll>().is_err(), "{text}");
        }
    }
}
