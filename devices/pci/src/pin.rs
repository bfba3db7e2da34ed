//! The interrupt pin INTA# (PCI 3.0, 2.2.6): the level that a device asks for, and what lets it through.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bus::InterruptLine;

use crate::config::ConfigSpace;

/// What configuration space says about the pin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PinControl {
    /// The function interrupts by its pin: it has one, MSI-X is off ("While enabled for MSI-X, a function is prohibited from using its
    /// INTx# pin", PCI 3.0, 6.8.2), and it is not in D3hot.
    in_use: bool,
    /// Interrupt Disable of the command register.
    disabled: bool,
}

impl PinControl {
    pub fn of(config: &ConfigSpace) -> Self {
        let (msix_enabled, _) = config.msix_control();
        Self {
            in_use: config.has_pin() && !msix_enabled && !config.is_in_d3hot(),
            disabled: config.interrupt_disabled(),
        }
    }
}

#[derive(Default)]
struct State {
    control: PinControl,
    /// The device asks for service.
    asserted: bool,
}

impl State {
    fn level(&self) -> bool {
        self.asserted && self.control.in_use && !self.control.disabled
    }
}

/// The pin of one function. Without a line it leads nowhere.
#[derive(Default)]
pub(crate) struct Pin {
    line: OnceLock<Arc<dyn InterruptLine>>,
    in_use: AtomicBool,
    state: Mutex<State>,
}

impl Pin {
    pub fn new(control: PinControl) -> Self {
        let pin = Self::default();
        pin.set_control(control);
        pin
    }

    /// Wires the pin, once.
    pub fn connect(&self, line: Arc<dyn InterruptLine>) {
        let _ = self.line.set(line);
    }

    /// See [`Endpoint::uses_pin`](crate::Endpoint::uses_pin).
    pub fn is_in_use(&self) -> bool {
        self.in_use.load(Ordering::SeqCst)
    }

    /// Interrupt Status of the status register.
    pub fn is_asserted(&self) -> bool {
        let state = self.lock();
        state.asserted && state.control.in_use
    }

    /// Takes over what the configuration space says.
    pub fn set_control(&self, control: PinControl) {
        self.in_use.store(control.in_use, Ordering::SeqCst);
        self.change(|state| state.control = control);
    }

    /// Takes over what the device asks for.
    pub fn set_asserted(&self, asserted: bool) {
        self.change(|state| state.asserted = asserted);
    }

    /// Drives the line to the level that it has already: an interrupt controller may have forgotten it.
    pub fn drive(&self) {
        let state = self.lock();
        if let Some(line) = self.line.get() {
            line.set_level(state.level());
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        let before = state.level();
        change(&mut state);
        if state.level() != before
            && let Some(line) = self.line.get()
        {
            line.set_level(!before);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
