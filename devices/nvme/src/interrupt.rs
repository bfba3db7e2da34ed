//! How a completion queue calls the guest (NVMe over PCIe Transport 1.0, 3.5): a message of its vector, at once or coalesced with later
//! ones, or the level of the interrupt pin while MSI-X is off.
//!
//! The pin is asserted while a completion queue of vector 0 holds entries that the guest has not taken and INTMS lets it through. Heads
//! are written by vCPU threads, and the level falls before such a write returns: a guest that has acknowledged everything is not
//! interrupted again. A head that is written to a shadow doorbell must be told by MMIO too, so in this mode EventIdx asks for every one.
//!
//! Coalescing (Base 5.27.1.6) delays messages of I/O completion queues until enough entries are there or the time is over. It counts by
//! completion queue, not by vector: what is recommended of a vector holds of each queue alone. Nothing of it is saved. A pause sends what
//! is delayed, and a resume signals whatever has not been taken.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::controller::Controller;
use crate::doorbell::MemoryGone;
use crate::queue::CompletionQueue;
use crate::shared::{Shared, lock};
use crate::wakeup::ShadowWords;
use crate::worker::{Worker, take_head};

/// The unit of the aggregation time.
const AGGREGATION_TIME_UNIT: Duration = Duration::from_micros(100);
/// The only vector of the pin, and its bit in INTMS.
const PIN_VECTOR: u16 = 0;

/// The features Interrupt Coalescing and Interrupt Vector Configuration as workers read them.
pub(crate) struct Coalescing {
    /// Bits 7:0 the aggregation threshold, 15:8 the aggregation time.
    feature: AtomicU32,
    disabled: Box<[AtomicBool]>,
}

impl Coalescing {
    pub fn new(vectors: u16) -> Self {
        let disabled = (0..vectors).map(|_| AtomicBool::new(false)).collect();
        Self { feature: AtomicU32::new(0), disabled }
    }

    /// Takes over both features.
    pub fn set(&self, feature: u32, disabled: &[bool]) {
        for (place, &disabled) in self.disabled.iter().zip(disabled) {
            place.store(disabled, Ordering::Relaxed);
        }
        self.feature.store(feature, Ordering::Relaxed);
    }

    /// How many entries are waited for, and how long, on `vector`. "If the Aggregation Time or the Aggregation Threshold is 0h, then
    /// interrupt coalescing is implicitly disabled."
    fn rule(&self, vector: u16) -> Option<(u32, Duration)> {
        let feature = self.feature.load(Ordering::Relaxed);
        let (threshold, time) = (feature & 0xff, feature >> 8 & 0xff);
        if threshold == 0 || time == 0 {
            return None;
        }
        let disabled = self.disabled.get(usize::from(vector)).is_none_or(|bit| bit.load(Ordering::Relaxed));
        // The threshold is a 0's based value.
        (!disabled).then(|| (threshold + 1, AGGREGATION_TIME_UNIT * time))
    }
}

/// Completion queues that can assert the pin.
#[derive(Default)]
pub(crate) struct PinQueues(Mutex<Vec<u16>>);

impl PinQueues {
    /// A completion queue has come.
    pub fn add(&self, cq: &CompletionQueue) {
        if cq.interrupts && cq.vector == PIN_VECTOR {
            lock(&self.0).push(cq.id);
        }
    }

    /// Completion queue `id` is gone.
    pub fn remove(&self, id: u16) {
        lock(&self.0).retain(|&other| other != id);
    }

    /// All are gone.
    pub fn clear(&self) {
        lock(&self.0).clear();
    }
}

/// Messages of a completion queue that are delayed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Delayed {
    entries: u32,
    /// When the message goes out at the latest; `None`: none is due.
    pub until: Option<Instant>,
}

impl Shared {
    /// Calls the guest for `posted` new entries of `cq`.
    pub fn signal(&self, cq: &mut CompletionQueue, posted: u32) -> Result<(), MemoryGone> {
        self.doorbells.set_posted(cq.id, cq.tail);
        if posted == 0 || !cq.interrupts {
            return Ok(());
        }
        if self.endpoint.uses_pin() {
            self.follow_head(cq)?;
            self.update_pin();
            return Ok(());
        }
        // "The Admin Completion Queue ... is not affected": nobody waits for its entries to gather.
        let rule = if cq.id == 0 || self.is_paused() { None } else { self.coalescing.rule(cq.vector) };
        let Some((threshold, time)) = rule else {
            self.send(cq);
            return Ok(());
        };
        cq.delayed.entries = cq.delayed.entries.saturating_add(posted);
        if cq.delayed.entries >= threshold {
            self.send(cq);
        } else if cq.delayed.until.is_none() {
            cq.delayed.until = Some(Instant::now() + time);
        }
        Ok(())
    }

    fn send(&self, cq: &mut CompletionQueue) {
        cq.delayed = Delayed::default();
        self.endpoint.msix().trigger(cq.vector);
    }

    /// Whether the pin depends on the head of `cq`.
    pub fn follows_head(&self, cq: &CompletionQueue) -> bool {
        cq.interrupts && cq.vector == PIN_VECTOR && self.endpoint.uses_pin()
    }

    /// Asks for the next write of the head of `cq` if it has a shadow and the pin depends on it.
    fn follow_head(&self, cq: &mut CompletionQueue) -> Result<(), MemoryGone> {
        let Some(shadow) = cq.shadow.filter(|_| self.follows_head(cq)) else { return Ok(()) };
        let _queues = lock(&self.pin_queues.0);
        loop {
            let asked = cq.head;
            let head = shadow.in_memory(&self.memory).ask(asked)?;
            cq.published = Some(asked);
            take_head(self, cq, head);
            if cq.head == asked {
                break;
            }
        }
        // A vCPU thread that brings a later head has written it to the shadow before.
        self.doorbells.note_head(cq.id, cq.head);
        Ok(())
    }

    /// Sets the level of the pin: heads, tails, INTMS or the use of the pin may have changed. Called without the lock of the registers.
    pub fn update_pin(&self) {
        let queues = lock(&self.pin_queues.0);
        let asserted = self.endpoint.uses_pin()
            && self.registers().interrupt_mask & 1 << PIN_VECTOR == 0
            && queues.iter().any(|&id| self.doorbells.has_unseen(id));
        self.endpoint.set_interrupt(asserted);
    }
}

impl Worker {
    /// At the end of a pass: sends messages whose time is over, and all of them while the controller is paused; and looks after heads that
    /// the pin waits for.
    pub fn finish_interrupts(&mut self, shared: &Shared) -> Result<(), MemoryGone> {
        if !self.delayed.is_empty() {
            let now = Instant::now();
            let Self { cqs, delayed, .. } = self;
            delayed.retain(|&index| {
                let Some(cq) = cqs.get_mut(index as usize).and_then(Option::as_mut) else { return false };
                let due = cq.delayed.until.is_some_and(|until| until <= now || shared.is_paused());
                if due {
                    shared.send(cq);
                }
                cq.is_in_delayed = cq.delayed.until.is_some();
                cq.is_in_delayed
            });
        }
        if !shared.endpoint.uses_pin() {
            return Ok(());
        }
        // Guest memory is written by a bus master only, and not while a migration holds it.
        if shared.is_bus_master() && !shared.is_paused() {
            for cq in self.cqs.iter_mut().flatten() {
                shared.follow_head(cq)?;
            }
        }
        // The pin may have come into use when a queue was about to send a message.
        shared.update_pin();
        Ok(())
    }

    /// When the first delayed message is due.
    fn delayed_until(&self) -> Option<Instant> {
        let cq = |&index: &u32| self.cqs.get(index as usize)?.as_ref()?.delayed.until;
        self.delayed.iter().filter_map(cq).min()
    }
}

impl Controller {
    /// When [`Controller::process`] of `worker` must be called even if nothing wakes it, for an interrupt that is coalesced. Asked after each
    /// call.
    pub fn interrupt_deadline(&self, worker: usize) -> Option<Instant> {
        let worker = lock(self.pool.workers.get(worker)?);
        worker.delayed_until()
    }

    /// Wires the interrupt pin of the PCI function, which leads nowhere before.
    pub fn connect_pin(&self, line: std::sync::Arc<dyn bus::InterruptLine>) {
        self.pool.shared.endpoint.connect_pin(line);
    }
}
