//! Doorbells: registers, or shadows of them in memory (Base 5.8 and B.5).

use core::sync::atomic::{Ordering, fence};

use nvme_spec::regs;

use crate::memory::Dma;
use crate::mmio::Registers;

/// Shadow doorbells and event indexes, a page each.
#[derive(Debug)]
pub struct Shadow {
    values: Dma,
    events: Dma,
}

impl Default for Shadow {
    fn default() -> Self {
        Self { values: Dma::new(1), events: Dma::new(1) }
    }
}

impl Shadow {
    /// Bus addresses of the two pages: PRP entries 1 and 2 of Doorbell Buffer Config.
    pub fn addresses(&self) -> (u64, u64) {
        (self.values.address(), self.events.address())
    }
}

/// The doorbells of one controller.
#[derive(Debug)]
pub struct Doorbells {
    registers: Registers,
    stride_bytes: usize,
    shadow: Option<Shadow>,
}

impl Doorbells {
    /// Doorbells in the registers of BAR 0, `4 << dstrd` bytes apart.
    pub fn new(registers: Registers, dstrd: u64) -> Self {
        Self { registers, stride_bytes: 4 << dstrd, shadow: None }
    }

    /// From now on, in memory. The controller knows the pages already.
    pub fn use_shadow(&mut self, shadow: Shadow) {
        self.shadow = Some(shadow);
    }

    /// Whether the registers of all queues up to `last` are inside BAR 0.
    pub fn reach(&self, last: u16) -> bool {
        regs::DOORBELLS as usize + 2 * (usize::from(last) + 1) * self.stride_bytes
            <= self.registers.length_bytes()
    }

    /// Tells the controller that the tail of submission queue `queue` moved from `old` to `new`.
    pub fn ring_submission(&mut self, queue: u16, old: u32, new: u32) {
        self.ring(queue, 2 * usize::from(queue), old, new);
    }

    /// Tells the controller that the head of completion queue `queue` moved from `old` to `new`.
    pub fn ring_completion(&mut self, queue: u16, old: u32, new: u32) {
        self.ring(queue, 2 * usize::from(queue) + 1, old, new);
    }

    /// Writes the tail doorbell register of submission queue `queue`, whatever its state.
    pub fn ring_register(&self, queue: u16, value: u32) {
        let offset = regs::DOORBELLS as usize + 2 * usize::from(queue) * self.stride_bytes;
        self.registers.write32(offset, value);
    }

    fn ring(&mut self, queue: u16, index: usize, old: u32, new: u32) {
        // The queue entries are in memory before the doorbell says so.
        fence(Ordering::Release);
        let element = index * self.stride_bytes / 4;
        // The pages do not reach for all queues; the admin queue always uses its registers.
        let covered = queue != 0 && index * self.stride_bytes < crate::memory::PAGE_BYTES;
        if let Some(shadow) = self.shadow.as_mut().filter(|_| covered) {
            shadow.values.store32(element, new);
            // The controller writes its event index, then reads the doorbell once more; here the order is the
            // reverse. With a full fence on both sides, one of the two sees the other's write.
            fence(Ordering::SeqCst);
            if !needs_event(shadow.events.load32(element), old, new) {
                return;
            }
        }
        self.registers.write32(regs::DOORBELLS as usize + index * self.stride_bytes, new);
    }
}

/// Whether moving from `old` to `new` passes the value at which the controller asked for a register write.
/// Modulo 2^16, as the specification's values are.
fn needs_event(event: u32, old: u32, new: u32) -> bool {
    let (event, old, new) = (event as u16, old as u16, new as u16);
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_needed_when_its_index_is_passed() {
        assert!(needs_event(4, 4, 5), "the controller stopped at 4");
        assert!(needs_event(4, 3, 6));
        assert!(!needs_event(6, 4, 6), "6 itself is not passed");
        assert!(!needs_event(9, 4, 6), "the controller polls ahead");
        assert!(!needs_event(2, 4, 6), "passed before");
        assert!(needs_event(63, 62, 0), "around the end of the queue");
    }

    #[test]
    fn a_covered_doorbell_touches_the_register_only_when_asked() {
        let mut page = std::vec![0u64; 1024];
        #[allow(unsafe_code)]
        // SAFETY: the vector outlives the registers, and only they write to it.
        let registers = unsafe { Registers::new(page.as_mut_ptr() as usize, 8192) };
        let mut doorbells = Doorbells::new(registers, 0);
        doorbells.ring_submission(1, 0, 3);
        assert_eq!(registers.read32(0x1008), 3);

        doorbells.use_shadow(Shadow::default());
        let events =
            |doorbells: &mut Doorbells, value| doorbells.shadow.as_mut().unwrap().events.store32(3, value);
        events(&mut doorbells, 10);
        doorbells.ring_completion(1, 0, 5);
        assert_eq!(registers.read32(0x100c), 0);
        assert_eq!(doorbells.shadow.as_ref().unwrap().values.load32(3), 5);
        events(&mut doorbells, 5);
        doorbells.ring_completion(1, 5, 6);
        assert_eq!(registers.read32(0x100c), 6);

        doorbells.ring_submission(0, 0, 7);
        assert_eq!(registers.read32(0x1000), 7, "the admin queue has no shadow");
        doorbells.ring_submission(511, 0, 9);
        assert_eq!(doorbells.shadow.as_ref().unwrap().values.load32(1022), 9);
        assert!(doorbells.reach(511) && !doorbells.reach(512));
    }
}
