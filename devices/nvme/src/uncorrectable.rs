//! Blocks that Write Uncorrectable has marked (NVM 3.2.7): until they are written they cannot be read.
//!
//! Kept apart from the image, which has no place for it. All workers share the marks of a namespace; one that has none costs a command
//! one load.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use nvme_spec::Status;

use crate::namespace::Namespace;
use crate::shared::{Shared, lock};
use crate::state::{UncorrectableRunState, UncorrectableState};

/// Blocks of one namespace that can be marked at a time, and so the runs that there can ever be, however they are cut.
pub(crate) const MAX_BLOCKS: u64 = 4096;

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Uncorrectable {
    /// Whether there are any runs.
    any: AtomicBool,
    /// First block and the block behind the last, neither overlapping nor touching.
    runs: Mutex<BTreeMap<u64, u64>>,
}

/// Runs that were marked: first block and the block behind the last.
pub(crate) type Healed = Vec<(u64, u64)>;

/// Too many blocks would be marked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooMany;

impl Uncorrectable {
    /// Whether a block from `first` to before `end` is marked.
    pub fn touches(&self, first: u64, end: u64) -> bool {
        self.any.load(Ordering::Acquire) && touching(&lock(&self.runs), first, end).is_some()
    }

    /// Marks the blocks from `first` to before `end`, or none.
    pub fn mark(&self, first: u64, end: u64) -> Result<(), TooMany> {
        let mut runs = lock(&self.runs);
        let mut merged = runs.clone();
        let (mut from, mut to) = (first, end);
        // Runs that it touches become one with it: also one that ends where it begins or begins where it ends.
        while let Some((run_first, run_end)) = touching(&merged, from.saturating_sub(1), to.saturating_add(1))
        {
            merged.remove(&run_first);
            (from, to) = (from.min(run_first), to.max(run_end));
        }
        merged.insert(from, to);
        if merged.iter().map(|(first, end)| end - first).sum::<u64>() > MAX_BLOCKS {
            return Err(TooMany);
        }
        *runs = merged;
        self.any.store(true, Ordering::Release);
        Ok(())
    }

    /// The blocks from `first` to before `end` were written, or deallocated. Returns those of them that were marked.
    pub fn heal(&self, first: u64, end: u64) -> Healed {
        let mut healed = Healed::new();
        if !self.any.load(Ordering::Acquire) {
            return healed;
        }
        let mut runs = lock(&self.runs);
        while let Some((run_first, run_end)) = touching(&runs, first, end) {
            runs.remove(&run_first);
            healed.push((run_first.max(first), run_end.min(end)));
            if run_first < first {
                runs.insert(run_first, first);
            }
            if end < run_end {
                runs.insert(end, run_end);
            }
        }
        self.any.store(!runs.is_empty(), Ordering::Release);
        healed
    }

    /// What is saved: nothing if nothing is marked.
    pub fn save(&self) -> Option<UncorrectableState> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let run =
            |(&first, &end): (&u64, &u64)| UncorrectableRunState { first, blocks: (end - first) as u32 };
        let runs: Vec<_> = lock(&self.runs).iter().map(run).collect();
        (!runs.is_empty()).then_some(UncorrectableState { run_count: runs.len() as u16, runs })
    }

    /// Marks what was saved of a namespace with `blocks` blocks. The error is the first block of a run that cannot be, and why.
    pub fn load(&self, saved: &UncorrectableState, blocks: u64) -> Result<(), (u64, &'static str)> {
        if saved.runs.is_empty() {
            return Err((0, "there are none, and then nothing is written of them"));
        }
        let mut behind = None;
        for run in &saved.runs {
            let end = run.first.checked_add(u64::from(run.blocks)).filter(|&end| end <= blocks);
            let Some(end) = end.filter(|_| run.blocks > 0) else {
                return Err((run.first, "the run has no blocks or goes beyond the namespace"));
            };
            if behind.is_some_and(|behind| run.first <= behind) {
                return Err((run.first, "the run is not behind the one before it"));
            }
            behind = Some(end);
            self.mark(run.first, end).map_err(|TooMany| (run.first, "more blocks are marked than can be"))?;
        }
        Ok(())
    }
}

/// Has the store keep the marks of a namespace, which have changed. As rare as it is, and durable before the command is answered: a mark
/// that came back after its block was written would take the data away.
pub(crate) fn keep_marks(shared: &Shared, nsid: u32) -> Result<(), Status> {
    if !shared.subsystem.is_managed() {
        return Ok(());
    }
    shared.subsystem.keep_marks(nsid).map_err(|error| {
        log::error!("NVMe controller {:?}: {error}", shared.config.serial);
        Status::INTERNAL_ERROR
    })
}

/// Has the store keep that blocks of a namespace are marked no more. If it cannot they are marked again: were they not, whoever tried once
/// more would be told that all is well.
pub(crate) fn keep_healed(shared: &Shared, namespace: &Namespace, healed: &Healed) -> Result<(), Status> {
    if healed.is_empty() {
        return Ok(());
    }
    keep_marks(shared, namespace.nsid).inspect_err(|_| {
        for &(first, end) in healed {
            // They had their place, which others can have taken since; then these stay marked in the store alone.
            let _ = namespace.uncorrectable.mark(first, end);
        }
    })
}

/// The last run that has a block from `first` to before `end`.
fn touching(runs: &BTreeMap<u64, u64>, first: u64, end: u64) -> Option<(u64, u64)> {
    let (&run_first, &run_end) = runs.range(..end).next_back()?;
    (run_end > first).then_some((run_first, run_end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_agree_with_a_list_of_blocks() {
        let marks = Uncorrectable::default();
        let mut reference = [false; 64];
        let mut number = 7u64;
        for _ in 0..4000 {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let first = (number >> 33) % 64;
            let end = first + 1 + (number >> 50) % (64 - first);
            let blocks = first as usize..end as usize;
            assert_eq!(marks.touches(first, end), reference[blocks.clone()].contains(&true));
            let mark = number >> 60 < 6;
            if mark {
                marks.mark(first, end).unwrap();
            } else {
                let was_marked = reference[blocks.clone()].contains(&true);
                assert_eq!(!marks.heal(first, end).is_empty(), was_marked);
            }
            reference[blocks].fill(mark);
            let saved = marks.save();
            let mut listed = [false; 64];
            for run in saved.iter().flat_map(|saved| &saved.runs) {
                listed[run.first as usize..run.first as usize + run.blocks as usize].fill(true);
            }
            assert_eq!(listed, reference);
            assert_eq!(marks.any.load(Ordering::Relaxed), saved.is_some());
            if let Some(saved) = saved {
                let again = Uncorrectable::default();
                again.load(&saved, 64).unwrap();
                assert_eq!(again.save(), Some(saved));
            }
        }
    }

    #[test]
    fn no_more_blocks_are_marked_than_can_be_kept() {
        let marks = Uncorrectable::default();
        marks.mark(0, MAX_BLOCKS - 1).unwrap();
        marks.mark(10, 20).unwrap();
        assert_eq!(marks.mark(u64::MAX - 2, u64::MAX), Err(TooMany));
        let runs = marks.save().unwrap().runs;
        assert_eq!((runs.len(), runs[0].first, runs[0].blocks), (1, 0, 4095), "none of a refused mark");
        marks.mark(u64::MAX - 1, u64::MAX).unwrap();
        assert!(marks.touches(u64::MAX - 1, u64::MAX) && !marks.touches(MAX_BLOCKS, u64::MAX - 1));
    }
}
