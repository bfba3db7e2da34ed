//! Wired interrupts.

use std::sync::{Arc, Mutex, PoisonError};

use bus::InterruptLine;

use super::Vm;
use crate::layout::{FIRST_PCI_GSI, GSI_COUNT};

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

/// One input that several pins drive: it is high as long as one of them is.
struct SharedInput {
    line: Arc<dyn InterruptLine>,
    /// Bit n: pin n is high.
    high: Mutex<u32>,
}

struct SharedPin {
    input: Arc<SharedInput>,
    bit: u32,
}

impl InterruptLine for SharedPin {
    fn set_level(&self, high: bool) {
        let mut pins = self.input.high.lock().unwrap_or_else(PoisonError::into_inner);
        if high {
            *pins |= self.bit;
        } else {
            *pins &= !self.bit;
        }
        // Also when it has not changed: whoever drives it again knows why.
        self.input.line.set_level(*pins != 0);
    }
}

/// Lines of pins number 0 up to `count` (at most 32), which share the inputs that `lines` are in turn.
fn share(lines: Vec<Arc<dyn InterruptLine>>, count: u8) -> Vec<Arc<dyn InterruptLine>> {
    let inputs: Vec<_> =
        lines.into_iter().map(|line| Arc::new(SharedInput { line, high: Mutex::new(0) })).collect();
    let pins = (0..count).zip(inputs.iter().cycle());
    pins.map(|(pin, input)| {
        Arc::new(SharedPin { input: Arc::clone(input), bit: 1_u32 << pin }) as Arc<dyn InterruptLine>
    })
    .collect()
}

/// The lines of INTA# of every PCI slot.
#[must_use]
pub fn pci_pins(vm: &Arc<Vm>) -> Vec<Arc<dyn InterruptLine>> {
    let gsis = FIRST_PCI_GSI..GSI_COUNT;
    share(gsis.map(|gsi| Arc::new(IrqLine::new(Arc::clone(vm), gsi)) as _).collect(), pci::SLOTS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Host;
    use crate::layout::pci_gsi;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<bool>>);

    impl InterruptLine for Recorder {
        fn set_level(&self, high: bool) {
            self.0.lock().unwrap().push(high);
        }
    }

    #[test]
    fn an_input_is_high_as_long_as_one_of_its_pins_is() {
        let recorders = [Arc::new(Recorder::default()), Arc::new(Recorder::default())];
        let pins = share(recorders.iter().map(|line| Arc::clone(line) as _).collect(), 5);
        for (pin, high) in [(0, true), (2, true), (0, false), (0, false), (4, true), (2, false), (4, false)] {
            pins[pin].set_level(high);
        }
        assert_eq!(*recorders[0].0.lock().unwrap(), [true, true, true, true, true, true, false]);
        assert!(recorders[1].0.lock().unwrap().is_empty());
        pins[3].set_level(true);
        assert_eq!(*recorders[1].0.lock().unwrap(), [true]);
    }

    #[test]
    fn a_pin_reaches_the_input_that_the_guest_is_told_of() {
        let vm = Vm::new(&Host::open().expect("these tests need /dev/kvm")).unwrap();
        let mut state = vm.save_irqchip().unwrap();
        // Level-triggered, masked: requests stay.
        for gsi in FIRST_PCI_GSI..GSI_COUNT {
            state.ioapic.redirection[gsi as usize] = 1 << 16 | 1 << 15 | 0x40;
        }
        vm.restore_irqchip(&state).unwrap();
        let pins = pci_pins(&vm);
        assert_eq!(pins.len(), usize::from(pci::SLOTS));
        for slot in 0..pci::SLOTS {
            pins[usize::from(slot)].set_level(true);
            assert_eq!(vm.save_irqchip().unwrap().ioapic.irr, 1 << pci_gsi(slot), "slot {slot}");
            pins[usize::from(slot)].set_level(false);
            assert_eq!(vm.save_irqchip().unwrap().ioapic.irr, 0, "slot {slot}");
        }
    }
}
