//! How fast guest memory goes, measured round by round.
//!
//! Two things take time, and a page costs both: the work on each page, whatever it holds, and the link for each byte. They
//! are measured apart, since rounds differ in what a page becomes: a page of zeroes is nine bytes on the link, so a round of
//! them says how fast memory is read and nearly nothing about the link. What the stop must send is taken for pages with contents, which
//! are as many bytes on the link as those were that were sent lately: fewer than in memory, where they are compressed.

use std::time::Duration;

use crate::PAGE_BYTES;

/// What one round took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// Pages that were looked at.
    pub pages: u64,
    /// Reading them, making records of them.
    pub working: Duration,
    /// Bytes of the records.
    pub sent_bytes: u64,
    /// The link took them; what a limit held up does not count.
    pub sending: Duration,
    /// What of it is not zero.
    pub contents: Contents,
}

/// Pages with contents, as channels have them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    pub pages: u64,
    /// What became of them, compressed or not.
    pub bytes: u64,
}

impl Contents {
    /// What came after `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            pages: self.pages.saturating_sub(before.pages),
            bytes: self.bytes.saturating_sub(before.bytes),
        }
    }
}

/// How many pages, and how many bytes of the link, decide: the last ones. A large round outweighs all before it, small ones
/// replace it little by little; alone, each would look too fast, since the sockets buffer it.
const WINDOW_BYTES: f64 = (8 << 20) as f64;
const WINDOW_PAGES: f64 = WINDOW_BYTES / PAGE_BYTES as f64;

/// The average over the last rounds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Speed {
    work: Average,
    link: Average,
    contents: Average,
}

impl Speed {
    /// After a round.
    pub fn add(&mut self, sample: &Sample) {
        self.work.add(sample.pages as f64, sample.working.as_secs_f64(), WINDOW_PAGES);
        self.link.add(sample.sent_bytes as f64, sample.sending.as_secs_f64(), WINDOW_BYTES);
        self.contents.add(sample.contents.pages as f64, sample.contents.bytes as f64, WINDOW_PAGES);
    }

    /// Bytes of guest memory a second, if no page is zero and nothing limits the link. 0 before anything was sent.
    #[must_use]
    pub fn bytes_per_second(&self) -> u64 {
        match self.of_contents() {
            0.0 => 0,
            seconds => (PAGE_BYTES as f64 / seconds) as u64,
        }
    }

    /// How many bytes of guest memory take as long as `bytes` that nothing compresses: those of images.
    #[must_use]
    pub fn as_memory(&self, bytes: u64) -> u64 {
        match self.seconds(PAGE_BYTES as f64) / self.of_contents() {
            factor if factor.is_finite() => (bytes as f64 * factor) as u64,
            _ => bytes,
        }
    }

    /// Seconds that a page takes which has contents, as those that were sent lately.
    fn of_contents(&self) -> f64 {
        self.seconds(self.contents.each().unwrap_or(PAGE_BYTES as f64))
    }

    /// Seconds that a page takes which is so many bytes on the link.
    fn seconds(&self, link_bytes: f64) -> f64 {
        self.work.each().unwrap_or(0.0) + self.link.each().unwrap_or(0.0) * link_bytes
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Average {
    amount: f64,
    cost: f64,
}

impl Average {
    fn add(&mut self, amount: f64, cost: f64, window: f64) {
        let keep = if self.amount > window { window / self.amount } else { 1.0 };
        self.amount = self.amount * keep + amount;
        self.cost = self.cost * keep + cost;
    }

    fn each(&self) -> Option<f64> {
        (self.amount > 0.0).then(|| self.cost / self.amount)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Convergence, Decision, Following, Situation, converge};

    const MIB: u64 = 1 << 20;
    const PAGES_PER_MIB: u64 = MIB / PAGE_BYTES;

    /// A round at 2700 MiB a second of work, with `zeroes` of its pages zero, over a link of `link_mib` MiB a second.
    fn round(pages: u64, zeroes: u64, link_mib: u64) -> Sample {
        let sent_bytes = zeroes * 9 + (pages - zeroes) * (PAGE_BYTES + 8);
        let seconds = |amount: u64, rate: u64| Duration::from_secs_f64(amount as f64 / rate as f64);
        Sample {
            pages,
            working: seconds(pages * PAGE_BYTES, 2700 * MIB),
            sent_bytes,
            sending: seconds(sent_bytes, link_mib * MIB),
            contents: Contents { pages: pages - zeroes, bytes: (pages - zeroes) * PAGE_BYTES },
        }
    }

    fn mib_per_second(speed: &Speed) -> u64 {
        speed.bytes_per_second() / MIB
    }

    #[test]
    fn memory_full_of_zeroes_does_not_make_the_link_look_slow() {
        let mut speed = Speed::default();
        assert_eq!(speed.bytes_per_second(), 0);
        speed.add(&round(512 * PAGES_PER_MIB, 511 * PAGES_PER_MIB, 10_000));
        let situation = Situation {
            rounds: 1,
            elapsed: Duration::from_secs(1),
            remaining_bytes: 7_400_000,
            previous_remaining_bytes: 7_400_000,
            bytes_per_second: speed.bytes_per_second(),
            downtime_limit: Duration::from_millis(300),
            fixed_cost: Duration::from_millis(5),
            throttle_percent: 0,
            trend: None,
            convergence: Convergence::default(),
            following: Following::Unasked,
        };
        assert_eq!(converge(&situation), Decision::Stop, "{speed:?}");
        assert!(situation.expected_downtime() < Duration::from_millis(10), "{situation:?}");
    }

    #[test]
    fn memory_full_of_zeroes_does_not_make_a_slow_link_look_fast() {
        let mut speed = Speed::default();
        speed.add(&round(4096 * PAGES_PER_MIB, 4000 * PAGES_PER_MIB, 100));
        assert!((90..100).contains(&mib_per_second(&speed)), "{speed:?}");
    }

    /// A slow link takes four times as many pages that are a quarter, and the stop is expected to be as short.
    #[test]
    fn what_is_compressed_is_as_much_as_it_becomes() {
        let (sent_bytes, pages) = (100 * MIB, 400 * PAGES_PER_MIB);
        let contents = Contents { pages, bytes: sent_bytes };
        let sending = Duration::from_secs(1);
        let compressed = Sample { sent_bytes, sending, contents, ..round(pages, 0, 100) };
        let mut speed = Speed::default();
        assert_eq!(speed.as_memory(MIB), MIB, "nothing is known");
        speed.add(&compressed);
        assert!((340..350).contains(&mib_per_second(&speed)), "{speed:?}");
        // A MiB of an image takes the link 10 ms, and the work on it 0.37.
        let image = speed.as_memory(100 * MIB) as f64 / (speed.bytes_per_second() as f64);
        assert!((1.03..1.04).contains(&image), "{image}");
        for _ in 0..10 {
            speed.add(&round(100 * PAGES_PER_MIB, 0, 100));
        }
        assert!((95..100).contains(&mib_per_second(&speed)), "as it was lately: {speed:?}");
    }

    #[test]
    fn a_large_round_outweighs_all_before_it() {
        let mut speed = Speed::default();
        speed.add(&round(4096 * PAGES_PER_MIB, 0, 1000));
        assert!((720..735).contains(&mib_per_second(&speed)), "{speed:?}");
        speed.add(&round(2000 * PAGES_PER_MIB, 0, 10));
        assert!((9..11).contains(&mib_per_second(&speed)), "{speed:?}");
    }

    /// The sockets buffer a short round, which seems to cost nothing; and a link that was once slow becomes fast again.
    #[test]
    fn small_rounds_change_it_little_by_little() {
        let mut speed = Speed::default();
        speed.add(&round(100 * PAGES_PER_MIB, 0, 10));
        for _ in 0..3 {
            speed.add(&round(PAGES_PER_MIB / 4, 0, 100_000));
        }
        assert!((9..12).contains(&mib_per_second(&speed)), "{speed:?}");
        for _ in 0..400 {
            speed.add(&round(PAGES_PER_MIB / 4, 0, 1000));
        }
        assert!((700..735).contains(&mib_per_second(&speed)), "{speed:?}");
    }
}
