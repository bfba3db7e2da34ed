//! What a command costs besides time: counted over 100,000 of them by the allocator itself, and by the process around the controller,
//! which every system call for a guest goes through (the null image makes none).

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::NullImage;
use driver::{Counts, Doorbells, Guest};
use nvme::Progress;

#[path = "../benches/driver/mod.rs"]
mod driver;

/// The system's allocator, which also counts the calls of each thread.
struct Counting;

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: both calls are passed on as they are; counting touches no memory of the caller's and, since the counter is a plain number
// that needs no initialisation, allocates nothing. Reallocation is the trait's own: it allocates, copies and frees.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller's promises are the same as ours.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: as above; `place` came from `System`.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const QUEUES: u16 = 4;
const COMMANDS: u64 = 100_000;

/// What was asked for while 100,000 commands ran.
#[derive(Debug, PartialEq, Eq)]
struct Cost {
    allocations: u64,
    exits: u64,
    wakes: u64,
    doorbell_events: u64,
    signals: u64,
}

impl Cost {
    fn now(counts: &Counts) -> Self {
        let value = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Self {
            allocations: CALLS.get(),
            exits: value(&counts.exits),
            wakes: value(&counts.wakes),
            doorbell_events: value(&counts.doorbell_events),
            signals: value(&counts.signals),
        }
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            allocations: self.allocations - before.allocations,
            exits: self.exits - before.exits,
            wakes: self.wakes - before.wakes,
            doorbell_events: self.doorbell_events - before.doorbell_events,
            signals: self.signals - before.signals,
        }
    }
}

/// Runs batches of every depth up to 128, and says what they cost and how many they were.
fn run(doorbells: Doorbells, mut pass: impl FnMut(&Guest)) -> (Cost, u64) {
    let mut guest = Guest::new(Arc::new(NullImage::new(1 << 40)), QUEUES, doorbells);
    let mut batch = |guest: &mut Guest, depth| {
        guest.submit(depth);
        while !guest.take(depth) {
            pass(guest);
        }
    };
    // Buffers grow to what the deepest batches need.
    for _ in 0..8 {
        batch(&mut guest, 128);
    }
    let (before, mut commands, mut batches) = (Cost::now(&guest.counts), 0, 0);
    while commands < COMMANDS {
        let depth = batches % 128 + 1;
        batch(&mut guest, depth);
        commands += u64::from(depth) * u64::from(QUEUES);
        batches += 1;
    }
    (Cost::now(&guest.counts).since(&before), u64::from(batches))
}

#[test]
fn a_polled_command_costs_no_allocation_exit_or_call() {
    let (cost, _) = run(Doorbells::Shadow, |guest| {
        guest.controller.poll(0);
    });
    let nothing = Cost { allocations: 0, exits: 0, wakes: 0, doorbell_events: 0, signals: 0 };
    assert_eq!(cost, nothing);
}

#[test]
fn a_worker_that_sleeps_costs_one_exit_a_batch() {
    let (cost, batches) =
        run(Doorbells::Shadow, |guest| while guest.controller.process(0) == Progress::More {});
    let exits = batches * u64::from(QUEUES);
    // The event has the doorbell's register, so that nobody is called for it.
    assert_eq!(cost, Cost { allocations: 0, exits, wakes: exits, doorbell_events: 0, signals: 0 });
}

#[test]
fn register_doorbells_cost_two_exits_a_batch() {
    let (cost, batches) =
        run(Doorbells::Mmio, |guest| while guest.controller.process(0) == Progress::More {});
    let rings = batches * u64::from(QUEUES);
    assert_eq!(cost, Cost { allocations: 0, exits: 2 * rings, wakes: rings, doorbell_events: 0, signals: 0 });
}
