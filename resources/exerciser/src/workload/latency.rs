//! How long commands take, by the time stamp counter: from their entry in the queue to their completion's being seen.
//!
//! One command at a time is watched, and the next one is drawn among those that follow its end. So the counter is read twice for about
//! one of `depth` commands, which costs the rate that is measured beside it next to nothing.

use alloc::vec;
use alloc::vec::Vec;

/// Buckets of each power of two: a value is known to a 32nd part of it.
const PARTS_SHIFT: u32 = 5;
const PARTS: usize = 1 << PARTS_SHIFT;
/// Those of values below [`PARTS`], which are exact, and of each power of two from there.
const BUCKETS: usize = PARTS * (64 - PARTS_SHIFT as usize + 1);

/// Values, counted by size.
#[derive(Debug)]
pub struct Histogram {
    buckets: Vec<u32>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS], total: 0 }
    }
}

impl Histogram {
    /// Counts `value`.
    pub fn add(&mut self, value: u64) {
        let bucket = &mut self.buckets[bucket_of(value)];
        *bucket = bucket.saturating_add(1);
        self.total += 1;
    }

    /// How many values were counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Adds what `other` has, and empties that.
    pub fn take(&mut self, other: &mut Self) {
        for (here, there) in self.buckets.iter_mut().zip(&mut other.buckets) {
            *here = here.saturating_add(core::mem::take(there));
        }
        self.total += core::mem::take(&mut other.total);
    }

    /// The least value that `percent` of all do not exceed, up to the width of its bucket; 0 without any.
    pub fn percentile(&self, percent: u64) -> u64 {
        let rank = (self.total.saturating_mul(percent)).div_ceil(100).max(1);
        let mut seen = 0;
        let found = self.buckets.iter().position(|&count| {
            seen += u64::from(count);
            seen >= rank
        });
        found.map_or(0, value_of)
    }
}

fn bucket_of(value: u64) -> usize {
    let shift = value.checked_ilog2().unwrap_or(0).saturating_sub(PARTS_SHIFT);
    shift as usize * PARTS + (value >> shift) as usize
}

/// The least value of a bucket.
fn value_of(bucket: usize) -> u64 {
    let shift = (bucket / PARTS).saturating_sub(1);
    ((bucket - shift * PARTS) as u64) << shift
}

/// The command that is watched.
#[derive(Clone, Copy, Debug)]
enum Watched {
    /// None yet: so many more are let pass.
    After(u64),
    /// This one, sent at this time.
    Sent { cid: u16, tsc: u64 },
}

/// Watches one command after the other.
#[derive(Debug)]
pub struct Stopwatch {
    watched: Watched,
    /// What they took, in counts.
    pub histogram: Histogram,
}

impl Default for Stopwatch {
    fn default() -> Self {
        Self { watched: Watched::After(0), histogram: Histogram::default() }
    }
}

impl Stopwatch {
    /// A command is sent; `tsc` tells the time if that is asked.
    pub fn sent(&mut self, cid: u16, tsc: impl FnOnce() -> u64) {
        match self.watched {
            Watched::After(0) => self.watched = Watched::Sent { cid, tsc: tsc() },
            Watched::After(commands) => self.watched = Watched::After(commands - 1),
            Watched::Sent { .. } => {}
        }
    }

    /// Whether this is the command that is watched.
    pub fn watches(&self, cid: u16) -> bool {
        matches!(self.watched, Watched::Sent { cid: watched, .. } if watched == cid)
    }

    /// The command that is watched has ended. `pass` commands are let pass before the next.
    pub fn ended(&mut self, now: u64, pass: u64) {
        if let Watched::Sent { tsc, .. } = self.watched {
            self.histogram.add(now.saturating_sub(tsc));
        }
        self.watched = Watched::After(pass);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_at_most_a_32nd_part_above_its_bucket() {
        for value in (0..200).chain([1 << 20, (1 << 20) + 12_345, u64::MAX / 3, u64::MAX]) {
            let least = value_of(bucket_of(value));
            assert!(least <= value && value - least <= value / 32, "{value} is in the bucket of {least}");
            assert!(bucket_of(value) < BUCKETS, "{value}");
        }
    }

    #[test]
    fn percentiles_are_those_of_all_values() {
        let (mut one, mut other) = (Histogram::default(), Histogram::default());
        assert_eq!(one.percentile(50), 0);
        (1..=16).for_each(|value| one.add(value));
        (17..=20).for_each(|value| other.add(value));
        one.take(&mut other);
        assert_eq!((one.total(), other.total(), other.percentile(99)), (20, 0, 0));
        assert_eq!([1, 50, 99, 100].map(|percent| one.percentile(percent)), [1, 10, 20, 20]);
    }

    #[test]
    fn one_command_is_watched_at_a_time() {
        let mut watch = Stopwatch::default();
        watch.sent(7, || 100);
        watch.sent(8, || unreachable!("another one is watched"));
        assert!(watch.watches(7) && !watch.watches(8));
        watch.ended(125, 1);
        watch.sent(9, || unreachable!("this one is let pass"));
        watch.sent(7, || 200);
        assert!(watch.watches(7) && !watch.watches(9));
        assert_eq!((watch.histogram.total(), watch.histogram.percentile(50)), (1, 25));
    }
}
