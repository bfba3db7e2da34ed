//! How a worker stops looking at a doorbell without losing what the guest writes to it next.
//!
//! With shadow doorbells (Base 5.8) the guest writes a word in memory and rings by MMIO only where the controller has asked for it in
//! EventIdx. Both sides write their word, pass a full fence and then read the other's word, so that at least one sees the other:
//!
//! ```text
//! guest                                    worker
//!   stores the tail to the shadow            stores the tail that it has seen to EventIdx
//!   fence                                    fence
//!   reads EventIdx                           reads the shadow
//!   passed it: rings by MMIO                 moved on: does not sleep
//! ```
//! A completion queue that is full waits for its head in the same way, by the shadow of its head and, for heads that come by MMIO, by
//! [`HeadDoorbell::ring`] and the flag that it reads.
//!
//! Everything here is generic over the words, so that the tests beside this file drive this code, and not a copy, through all
//! interleavings.

use std::sync::atomic::{AtomicU32, Ordering};

/// A word that vCPU threads and workers share.
pub(crate) trait Word {
    /// What was stored last, and with it everything before that store.
    fn load(&self) -> u32;
    /// Stores `value` after everything before it.
    fn store(&self, value: u32);
    /// No access moves across it.
    fn fence();
}

impl Word for AtomicU32 {
    fn load(&self) -> u32 {
        self.load(Ordering::Acquire)
    }

    fn store(&self, value: u32) {
        self.store(value, Ordering::Release);
    }

    fn fence() {
        std::sync::atomic::fence(Ordering::SeqCst);
    }
}

/// The two words that a doorbell has in guest memory.
pub(crate) trait ShadowWords {
    /// Guest memory could not be accessed.
    type Gone;

    /// The shadow doorbell: what the guest wrote last.
    fn value(&self) -> Result<u32, Self::Gone>;
    /// Stores EventIdx.
    fn set_event_index(&self, index: u32) -> Result<(), Self::Gone>;
    /// No access moves across it.
    fn fence(&self);

    /// Asks to be told by MMIO when the guest moves the doorbell past `index`, and looks once more: the value may have moved before
    /// the guest could know.
    fn ask(&self, index: u32) -> Result<u32, Self::Gone> {
        self.set_event_index(index)?;
        self.fence();
        self.value()
    }
}

/// Before a worker sleeps that has seen the tail `seen`: asks for the next one, unless `asked` says that it has, and returns the tail as it is
/// now. The worker sleeps only if that is still `seen`.
pub(crate) fn ask_for_tail<S: ShadowWords>(
    shadow: &S,
    asked: &mut Option<u32>,
    seen: u32,
) -> Result<u32, S::Gone> {
    if *asked == Some(seen) {
        return shadow.value();
    }
    let tail = shadow.ask(seen)?;
    *asked = Some(seen);
    Ok(tail)
}

/// The head doorbell of a completion queue.
#[derive(Default)]
pub(crate) struct HeadDoorbell<W> {
    head: W,
    /// Not 0: the queue is full and its worker waits for the head to move.
    waiting: W,
}

impl<W: Word> HeadDoorbell<W> {
    /// A write by MMIO. `true`: the worker waits for it and is to be woken.
    pub fn ring(&self, head: u32) -> bool {
        self.head.store(head);
        // Against a worker that sets `waiting` and then reads the head.
        W::fence();
        self.waiting.load() != 0
    }

    /// The last head written by MMIO.
    pub fn head(&self) -> u32 {
        self.head.load()
    }

    /// Takes over a head that did not come by MMIO.
    pub fn note(&self, head: u32) {
        self.head.store(head);
    }

    /// The doorbell of a queue that begins at `head`.
    pub fn open(&self, head: u32) {
        self.head.store(head);
        self.waiting.store(0);
    }

    /// Asks to be told when the head moves on from `seen`, and returns the head as it is now.
    fn ask<S: ShadowWords>(&self, shadow: Option<&S>, seen: u32) -> Result<u32, S::Gone> {
        self.waiting.store(1);
        match shadow {
            Some(shadow) => shadow.ask(seen),
            None => {
                W::fence();
                Ok(self.head.load())
            }
        }
    }
}

/// A completion queue with something to post.
pub(crate) trait Posting {
    /// Guest memory could not be accessed.
    type Gone;

    /// Posts until the queue is full. `true`: everything is posted.
    fn post_what_fits(&mut self) -> Result<bool, Self::Gone>;
    /// The head that was taken over last.
    fn head(&self) -> u32;
    /// Takes over the guest's head.
    fn set_head(&mut self, head: u32);
    /// Nothing can be posted.
    fn is_full(&self) -> bool;
}

/// Posts as far as there is room. `true`: the rest waits, and the guest tells the worker when it has made room.
pub(crate) fn post_or_wait<P: Posting, W: Word, S: ShadowWords<Gone = P::Gone>>(
    queue: &mut P,
    doorbell: &HeadDoorbell<W>,
    shadow: Option<&S>,
    was_waiting: bool,
) -> Result<bool, P::Gone> {
    loop {
        if queue.post_what_fits()? {
            if was_waiting {
                doorbell.waiting.store(0);
            }
            return Ok(false);
        }
        // Room may have been made before the guest could know that we wait for it.
        let head = doorbell.ask(shadow, queue.head())?;
        queue.set_head(head);
        if queue.is_full() {
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests;
