//! An I/O queue pair with its interrupt.

use super::queue::QueuePair;
use crate::machine::Machine;

/// Interrupt vectors of I/O queues. Queues beyond them share.
const FIRST_VECTOR: u8 = 0x30;
const LAST_VECTOR: u8 = 0xef;

/// Interrupt vectors that are still free.
#[derive(Debug)]
pub struct Vectors {
    next: u8,
}

impl Default for Vectors {
    fn default() -> Self {
        Self { next: FIRST_VECTOR }
    }
}

impl Vectors {
    /// The next one; all are in use after 192, and the first comes again.
    pub(super) fn take(&mut self) -> u8 {
        let vector = self.next;
        self.next = if vector == LAST_VECTOR { FIRST_VECTOR } else { vector + 1 };
        vector
    }
}

/// An I/O queue pair and the interrupt that announces its completions.
#[derive(Debug)]
pub struct IoQueue {
    /// The queues.
    pub pair: QueuePair,
    pub(super) interrupt: Option<Interrupt>,
}

/// An interrupt, and how many of its arrivals were seen.
#[derive(Debug)]
pub(super) struct Interrupt {
    pub(super) vector: u8,
    pub(super) seen: u64,
}

impl IoQueue {
    /// Whether completions may be there: always when polling, else after an interrupt that was not yet seen.
    pub fn is_due(&mut self, machine: &dyn Machine) -> bool {
        let Some(interrupt) = &mut self.interrupt else { return true };
        let arrived = machine.interrupts(interrupt.vector);
        core::mem::replace(&mut interrupt.seen, arrived) != arrived
    }

    /// Arrivals of the queue's interrupt.
    pub fn interrupts(&self, machine: &dyn Machine) -> u64 {
        self.interrupt.as_ref().map_or(0, |interrupt| machine.interrupts(interrupt.vector))
    }
}
