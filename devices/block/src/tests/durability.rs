//! What is on stable storage after power went at any moment, by what the kernel was asked for and what it had answered until then.
//!
//! The model of a disk: a write is stable once it ended with RWF_DSYNC, or once an fdatasync has ended that was queued after the write
//! had ended. Of everything else that was queued, anything may be there: none, all, or some.

use std::collections::BTreeMap;

use super::*;
use crate::uring::journal::{Call, Moment};

const BLOCK: u64 = 512;
const BLOCKS: u64 = 64;
const IMAGE_BYTES: u64 = BLOCK * BLOCKS;

/// A request as the test made it.
#[derive(Clone, Copy, Debug)]
struct Made {
    operation: Operation,
    offset_bytes: u64,
    length_bytes: u64,
    /// What a write fills its blocks with.
    fill: u8,
    /// The journal's length when it was made.
    at: usize,
}

/// The disk after a loss of power, or of what is not stable.
struct Survivor {
    bytes: Vec<u8>,
}

impl Survivor {
    /// Replays `moments` on an image of zeroes. `keeps` says of each change that is not stable whether it is there all the same.
    fn replay(moments: &[Moment], mut keeps: impl FnMut() -> bool) -> Self {
        let mut bytes = vec![0; IMAGE_BYTES as usize];
        // The change of each slot under way, and the moment it was queued.
        let mut under_way: BTreeMap<u32, (usize, Call)> = BTreeMap::new();
        // Changes that ended and are in a cache: the moments of their end and of their beginning.
        let mut cached: Vec<(usize, usize, Call)> = Vec::new();
        // Changes that are on the disk, with the moment of their beginning.
        let mut there: Vec<(usize, Call)> = Vec::new();
        for (now, moment) in moments.iter().enumerate() {
            match moment {
                Moment::Queued { slot, call } => {
                    under_way.insert(*slot, (now, call.clone()));
                }
                Moment::Ended { slot, result } => {
                    let (queued, mut call) = under_way.remove(slot).expect("queued before it ends");
                    match (&mut call, *result) {
                        (_, error @ ..0) => assert!(error == -libc::EOPNOTSUPP, "{call:?}: {error}"),
                        (Call::Read, _) => {}
                        (Call::Synchronize, _) => {
                            // What ended later than the call began may have come too late for it.
                            let (before, after): (Vec<_>, _) =
                                cached.into_iter().partition(|(ended, ..)| *ended < queued);
                            cached = after;
                            there.extend(before.into_iter().map(|(_, queued, call)| (queued, call)));
                        }
                        (Call::Write { data, stable, .. }, count) => {
                            data.truncate(count as usize);
                            if *stable {
                                there.push((queued, call))
                            } else {
                                cached.push((now, queued, call))
                            }
                        }
                        (Call::Allocate { .. }, _) => cached.push((now, queued, call)),
                    }
                }
                Moment::Told { .. } => {}
            }
        }
        let at_risk =
            cached.into_iter().map(|(_, queued, call)| (queued, call)).chain(under_way.into_values());
        there.extend(at_risk.filter(|_| keeps()));
        // Of two changes of the same bytes the later one wins; of those that were under way together any may have.
        there.sort_by_key(|(queued, _)| *queued);
        for (_, call) in &there {
            match call {
                Call::Write { offset_bytes, data, .. } => {
                    bytes[*offset_bytes as usize..][..data.len()].copy_from_slice(data);
                }
                Call::Allocate { offset_bytes, length_bytes } => {
                    bytes[*offset_bytes as usize..][..*length_bytes as usize].fill(0);
                }
                Call::Read | Call::Synchronize => {}
            }
        }
        Self { bytes }
    }

    /// Checks every block: it holds what the last change left that was promised to be stable, or what any change made that was not
    /// told of before that promise was asked for.
    fn check(&self, made: &[Made], moments: &[Moment]) -> u32 {
        let told: BTreeMap<u64, usize> = moments
            .iter()
            .enumerate()
            .filter_map(|(at, moment)| match moment {
                Moment::Told { token, success } => {
                    assert!(success, "request {token} failed");
                    Some((*token, at))
                }
                _ => None,
            })
            .collect();
        let token_of = |index: usize| index as u64;
        let mut promises = 0;
        for block in 0..BLOCKS {
            let offset = block * BLOCK;
            let covers = |made: &Made| {
                made.operation.writes()
                    && (made.offset_bytes..made.offset_bytes + made.length_bytes).contains(&offset)
            };
            let changes: Vec<usize> = (0..made.len()).filter(|&index| covers(&made[index])).collect();
            // When a change is known to be stable: its own end with FUA, else the end of a flush that was made after its end.
            let stable_since = |index: usize| {
                let ended = *told.get(&token_of(index))?;
                let forced = matches!(
                    made[index].operation,
                    Operation::Write { fua: true } | Operation::WriteZeroes { fua: true, .. }
                );
                if forced {
                    return Some(ended);
                }
                let flushes = (0..made.len())
                    .filter(|&flush| made[flush].operation == Operation::Flush && made[flush].at > ended);
                flushes.filter_map(|flush| told.get(&token_of(flush)).copied()).min()
            };
            let promised: Vec<usize> =
                changes.iter().copied().filter(|&index| stable_since(index).is_some()).collect();
            promises += promised.len() as u32;
            // A change is overwritten for good by a promised one that was made after it had ended.
            let overwritten = |index: usize| {
                promised.iter().any(|&later| {
                    later != index && told.get(&token_of(index)).is_some_and(|&ended| made[later].at > ended)
                })
            };
            let mut allowed: Vec<u8> = changes
                .iter()
                .copied()
                .filter(|&index| !overwritten(index))
                .map(|index| made[index].fill)
                .collect();
            if promised.is_empty() {
                allowed.push(0);
            }
            let found = &self.bytes[offset as usize..][..BLOCK as usize];
            assert!(
                allowed.iter().any(|&value| found.iter().all(|&byte| byte == value)),
                "block {block} holds {} after {} moments; allowed: {allowed:?}",
                found[0],
                moments.len()
            );
        }
        promises
    }
}

/// Makes random requests, several at a time, and gives what was made with what the kernel saw of it.
fn play(seed: u64, direct: bool, requests: u64) -> (Vec<Made>, Vec<Moment>) {
    let file = temporary_file(IMAGE_BYTES);
    let image = FileImage::open(file.path(), FileOptions { direct, ..FileOptions::default() }).unwrap();
    let mut context = IoContext::new(guest(), 16).unwrap();
    let journal = context.record();
    let mut numbers = Numbers(seed);
    let (mut made, mut completions): (Vec<Made>, Vec<Completion>) = (Vec::new(), Vec::new());
    while (made.len() as u64) < requests {
        for _ in 0..=numbers.next(6) {
            let block = numbers.next(BLOCKS);
            let blocks = 1 + numbers.next((BLOCKS - block).min(8));
            let fua = numbers.next(4) == 0;
            let operation = match numbers.next(10) {
                0..=6 => Operation::Write { fua },
                7 => Operation::WriteZeroes { deallocate: numbers.next(2) == 0, fua },
                _ => Operation::Flush,
            };
            let fill =
                if matches!(operation, Operation::Write { .. }) { 1 + (made.len() % 255) as u8 } else { 0 };
            let length_bytes = if operation == Operation::Flush { 0 } else { blocks * BLOCK };
            let offset_bytes = if operation == Operation::Flush { 0 } else { block * BLOCK };
            let token = made.len() as u64;
            // Memory of its own, at times such that has to be copied.
            let address = (token % 16) * 65_536 + numbers.next(2) * 4;
            let ranges = [range(address, length_bytes)];
            if fill != 0 {
                poke(context.memory(), &ranges, &vec![fill; length_bytes as usize]);
            }
            let ranges: &[_] = if fill == 0 { &[] } else { &ranges };
            made.push(Made { operation, offset_bytes, length_bytes, fill, at: journal.moments().len() });
            queue(&mut context, &image, token, operation, offset_bytes, length_bytes, ranges);
        }
        context.submit().unwrap();
        // Leaves some under way, but never more than there is memory for.
        while context.in_flight() as u64 > numbers.next(8) {
            context.completions(&mut completions);
            std::thread::yield_now();
        }
    }
    while context.in_flight() > 0 {
        context.completions(&mut completions);
        std::thread::yield_now();
    }
    let moments = journal.moments().clone();
    (made, moments)
}

#[test]
fn what_was_promised_is_there_wherever_power_goes() {
    let mut promises = 0;
    for (seed, direct) in [(1, false), (2, true), (3, false), (4, true)] {
        let (made, moments) = play(seed, direct, 120);
        let mut numbers = Numbers(seed + 77);
        for cut in 0..=moments.len() {
            let (made, moments) = (&made[..], &moments[..cut]);
            let made = &made[..made.iter().take_while(|made| made.at <= cut).count()];
            promises += Survivor::replay(moments, || false).check(made, moments);
            Survivor::replay(moments, || true).check(made, moments);
            Survivor::replay(moments, || numbers.next(2) == 0).check(made, moments);
        }
    }
    assert!(promises > 1000, "only {promises} promises were looked at");
}
