//! Every interleaving of a guest and a worker, by the model checker. At the end of each nobody runs any more; what is then neither done
//! nor called for is lost.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

use super::*;

/// How the worker's side is ordered: as it ships, or broken.
trait Order: Send + Sync + 'static {
    const FENCE: bool;
    const LOOKS_AGAIN: bool;
}

struct AsShipped;
impl Order for AsShipped {
    const FENCE: bool = true;
    const LOOKS_AGAIN: bool = true;
}

struct WithoutFence;
impl Order for WithoutFence {
    const FENCE: bool = false;
    const LOOKS_AGAIN: bool = true;
}

struct WithoutSecondLook;
impl Order for WithoutSecondLook {
    const FENCE: bool = true;
    const LOOKS_AGAIN: bool = false;
}

/// A word of this process.
struct Checked<O>(AtomicU32, PhantomData<O>);

impl<O> Checked<O> {
    fn new() -> Self {
        Self(AtomicU32::new(0), PhantomData)
    }
}

impl<O: Order> Word for Checked<O> {
    fn load(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }
    fn store(&self, value: u32) {
        self.0.store(value, Ordering::Release);
    }
    fn fence() {
        if O::FENCE {
            fence(Ordering::SeqCst);
        }
    }
}

/// A doorbell's words in guest memory.
struct Shadow<O> {
    value: AtomicU32,
    event_index: AtomicU32,
    /// What the worker read last; a worker that does not look again takes it for the value.
    last: std::sync::atomic::AtomicU32,
    asked: std::sync::atomic::AtomicBool,
    order: PhantomData<O>,
}

impl<O: Order> Shadow<O> {
    fn new() -> Self {
        Self {
            value: AtomicU32::new(0),
            event_index: AtomicU32::new(0),
            last: 0.into(),
            asked: false.into(),
            order: PhantomData,
        }
    }

    /// What `nvme_dbbuf_update_and_check_event` of Linux does, by the rule of Base 5.8. `true`: the guest rings by MMIO.
    fn write(&self, old: u32, new: u32) -> bool {
        self.value.store(new, Ordering::Release);
        fence(Ordering::SeqCst);
        let event = self.event_index.load(Ordering::Acquire) as u16;
        let (new, old) = (new as u16, old as u16);
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }
}

impl<O: Order> ShadowWords for Shadow<O> {
    type Gone = Infallible;

    fn value(&self) -> Result<u32, Infallible> {
        let relaxed = std::sync::atomic::Ordering::Relaxed;
        if self.asked.swap(false, relaxed) && !O::LOOKS_AGAIN {
            return Ok(self.last.load(relaxed));
        }
        let value = self.value.load(Ordering::Acquire);
        self.last.store(value, relaxed);
        Ok(value)
    }
    fn set_event_index(&self, index: u32) -> Result<(), Infallible> {
        self.asked.store(true, std::sync::atomic::Ordering::Relaxed);
        self.event_index.store(index, Ordering::Release);
        Ok(())
    }
    fn fence(&self) {
        Checked::<O>::fence();
    }
}

/// What calls the worker to its thread: an eventfd, which it drains before its turn.
struct Bell(AtomicBool);

impl Bell {
    fn ring(&self) {
        self.0.swap(true, Ordering::AcqRel);
    }
    fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}

/// Runs `model` in all interleavings.
fn explore(model: impl Fn() + Send + Sync + 'static) {
    loom::model(model);
}

/// Runs `model` in all interleavings in which a thread is stopped in its way at most three times: the whole of larger ones takes hours.
fn explore_bounded(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// Whether some interleaving of `model` loses something.
fn loses(model: impl Fn() + Send + Sync + 'static) -> bool {
    catch_unwind(AssertUnwindSafe(|| explore(model))).is_err()
}

/// A worker that sleeps on the tail of a submission queue.
#[derive(Default)]
struct Fetcher {
    seen: u32,
    asked: Option<u32>,
    /// It polls before it sleeps.
    polls: bool,
}

impl Fetcher {
    /// One turn: fetches what is there and goes to sleep.
    fn turn<O: Order>(&mut self, shadow: &Shadow<O>) {
        self.seen = shadow.value().unwrap();
        if self.polls {
            // Out of the way of the tail, while it looks again by itself: behind it, in a queue of four entries.
            let quiet = (self.seen + 3) % 4;
            shadow.set_event_index(quiet).unwrap();
            shadow.fence();
            self.asked = Some(quiet);
            self.seen = shadow.value().unwrap();
        }
        loop {
            let tail = ask_for_tail(shadow, &mut self.asked, self.seen).unwrap();
            if tail == self.seen {
                return;
            }
            self.seen = tail;
        }
    }
}

/// A guest submits at these tails of a queue of four entries while the worker is awake, asleep or on its way there.
fn submissions<O: Order>(tails: &'static [u32], polls: bool) {
    let shared = Arc::new((Shadow::<O>::new(), Bell(AtomicBool::new(false))));
    let guest = {
        let shared = Arc::clone(&shared);
        loom::thread::spawn(move || {
            let (shadow, bell) = &*shared;
            let mut old = 0;
            for &tail in tails {
                if shadow.write(old, tail) {
                    bell.ring();
                }
                old = tail;
            }
        })
    };
    let (shadow, bell) = &*shared;
    let mut worker = Fetcher { polls, ..Fetcher::default() };
    worker.turn(shadow);
    while bell.take() {
        worker.turn(shadow);
    }
    guest.join().unwrap();
    while bell.take() {
        worker.turn(shadow);
    }
    let last = *tails.last().unwrap();
    assert_eq!(worker.seen, last, "the worker sleeps and has not seen the last command");
}

#[test]
fn no_interleaving_loses_a_command() {
    explore(|| submissions::<AsShipped>(&[1, 2], false));
    // Several at once, and around the end of the queue.
    explore(|| submissions::<AsShipped>(&[3, 1], false));
    explore_bounded(|| submissions::<AsShipped>(&[2, 3, 1], false));
    explore_bounded(|| submissions::<AsShipped>(&[1, 2], true));
}

#[test]
fn commands_are_lost_without_the_fence_or_the_second_look() {
    assert!(loses(|| submissions::<WithoutFence>(&[1, 2], false)));
    assert!(loses(|| submissions::<WithoutSecondLook>(&[1, 2], false)));
}

/// Entries of the completion queue, which holds one less.
const ENTRIES: u32 = 2;

/// The worker's side of a completion queue: counts instead of entries.
struct Poster<'a> {
    left: u32,
    head: u32,
    tail: u32,
    /// What the guest sees of the tail: the phase tags.
    posted: &'a AtomicU32,
}

impl Posting for Poster<'_> {
    type Gone = Infallible;

    fn post_what_fits(&mut self) -> Result<bool, Infallible> {
        while self.left > 0 && !self.is_full() {
            self.tail = (self.tail + 1) % ENTRIES;
            self.left -= 1;
            self.posted.store(self.tail, Ordering::Release);
        }
        Ok(self.left == 0)
    }
    fn head(&self) -> u32 {
        self.head
    }
    fn set_head(&mut self, head: u32) {
        self.head = head;
    }
    fn is_full(&self) -> bool {
        (self.tail + 1) % ENTRIES == self.head
    }
}

/// What both sides of a completion queue share.
struct Completions<O> {
    posted: AtomicU32,
    doorbell: HeadDoorbell<Checked<O>>,
    shadow: Option<Shadow<O>>,
    bell: Bell,
}

impl<O: Order> Completions<O> {
    /// The guest takes what is posted after `head` and says so. Its new head.
    fn take(&self, head: u32) -> u32 {
        let tail = self.posted.load(Ordering::Acquire);
        if tail != head {
            let rings = self.shadow.as_ref().is_none_or(|shadow| shadow.write(head, tail));
            if rings && self.doorbell.ring(tail) {
                self.bell.ring();
            }
        }
        tail
    }

    fn turn(&self, poster: &mut Poster<'_>, waiting: &mut bool) {
        poster.head = match &self.shadow {
            Some(shadow) => shadow.value().unwrap(),
            None => self.doorbell.head(),
        };
        *waiting = post_or_wait(poster, &self.doorbell, self.shadow.as_ref(), *waiting).unwrap();
    }
}

/// A worker has more completions than its queue holds; a guest looks for them `takes` times while the worker runs, and then whenever it is
/// interrupted.
fn completions<O: Order>(count: u32, takes: u32, with_shadow: bool) {
    let shared = Arc::new(Completions::<O> {
        posted: AtomicU32::new(0),
        doorbell: HeadDoorbell { head: Checked::new(), waiting: Checked::new() },
        shadow: with_shadow.then(Shadow::new),
        bell: Bell(AtomicBool::new(false)),
    });
    let guest = {
        let shared = Arc::clone(&shared);
        loom::thread::spawn(move || (0..takes).fold(0, |head, _| shared.take(head)))
    };
    let mut poster = Poster { left: count, head: 0, tail: 0, posted: &shared.posted };
    let mut waiting = false;
    shared.turn(&mut poster, &mut waiting);
    if shared.bell.take() {
        shared.turn(&mut poster, &mut waiting);
    }
    let mut head = guest.join().unwrap();
    // From here on each runs when it is called: the worker by the bell, the guest by the interrupt for what was posted.
    loop {
        let before = head;
        head = shared.take(head);
        let called = shared.bell.take();
        if called {
            shared.turn(&mut poster, &mut waiting);
        }
        if !called && head == before {
            break;
        }
    }
    assert_eq!(poster.left, 0, "the worker waits for room that there is");
}

#[test]
fn no_interleaving_loses_a_completion_of_a_full_queue() {
    for with_shadow in [false, true] {
        explore(move || completions::<AsShipped>(2, 1, with_shadow));
        explore_bounded(move || completions::<AsShipped>(3, 2, with_shadow));
    }
}

#[test]
fn completions_are_lost_without_the_fence_or_the_second_look() {
    assert!(loses(|| completions::<WithoutFence>(2, 1, false)));
    assert!(loses(|| completions::<WithoutFence>(2, 1, true)));
    assert!(loses(|| completions::<WithoutSecondLook>(2, 1, true)));
}
