//! Wired interrupts.

use std::sync::Arc;

use bus::InterruptLine;

use super::Vm;

/// An input of the interrupt controllers, by its global system interrupt number.
#[derive(Clone, Debug)]
pub struct IrqLine {
    vm: Arc<Vm>,
    gsi: u32,
}

impl IrqLine {
    /// The line of `gsi`, below [`crate::layout::GSI_COUNT`].
    #[must_use]
    pub fn new(vm: Arc<Vm>, gsi: u32) -> Self {
        Self { vm, gsi }
    }
}

impl InterruptLine for IrqLine {
    fn set_level(&self, high: bool) {
        if let Err(error) = self.vm.fd().set_irq_line(self.gsi, high) {
            // Only a number that no controller has can fail, and the machine gives none.
            log::error!("cannot drive interrupt {} to {high}: {error}", self.gsi);
        }
    }
}
