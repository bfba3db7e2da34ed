//! Configuration space, interrupt pin and MSI-X of one function, kept in agreement.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bus::InterruptLine;

use crate::bar::BarWindow;
use crate::config::{ConfigSpace, STATUS, STATUS_INTERRUPT};
use crate::error::Error;
use crate::msix::{Control, Msix, MsixSink};
use crate::pin::{Pin, PinControl};
use crate::state::EndpointState;

/// The part of a [`PciFunction`](crate::PciFunction) that is the same in every device: delegate to it.
pub struct Endpoint {
    config: Mutex<ConfigSpace>,
    /// Bus Master Enable of `config`, for those who take no lock.
    bus_master: AtomicBool,
    pin: Pin,
    msix: Msix,
}

impl Endpoint {
    /// Takes a finished configuration space; messages go to `sink`.
    ///
    /// # Errors
    /// [`Error::NoMsix`] if `config` has no MSI-X capability.
    pub fn new(config: ConfigSpace, sink: Arc<dyn MsixSink>) -> Result<Self, Error> {
        let layout = config.msix_layout().ok_or(Error::NoMsix)?;
        let bus_master = AtomicBool::new(config.bus_master());
        let pin = Pin::new(PinControl::of(&config));
        Ok(Self { config: Mutex::new(config), bus_master, pin, msix: Msix::new(layout, sink) })
    }

    /// Wires the interrupt pin, which leads nowhere before.
    pub fn connect_pin(&self, line: Arc<dyn InterruptLine>) {
        self.pin.connect(line);
    }

    /// A guest read of configuration space.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock_config().read(offset, data);
        let status = STATUS.checked_sub(usize::from(offset)).and_then(|position| data.get_mut(position));
        if let Some(status) = status
            && self.pin.is_asserted()
        {
            *status |= STATUS_INTERRUPT;
        }
    }

    /// A guest write of configuration space. `true`: it has made the function a bus master, and what the device held back is due.
    /// Messages that were held back are sent already.
    pub fn config_write(&self, offset: u16, data: &[u8]) -> bool {
        let mut config = self.lock_config();
        let was_bus_master = config.bus_master();
        config.write(offset, data);
        let is_bus_master = config.bus_master();
        self.bus_master.store(is_bus_master, Ordering::SeqCst);
        self.msix.set_control(Control::of(&config));
        self.pin.set_control(PinControl::of(&config));
        is_bus_master && !was_bus_master
    }

    /// The BARs and where they are.
    #[must_use]
    pub fn bars(&self) -> Vec<BarWindow> {
        self.lock_config().bars()
    }

    /// Whether the guest lets the function access memory and send messages. "Controls a device's ability to act as a master on the PCI
    /// bus. A value of 0 disables the device from generating PCI accesses" (PCI 3.0, 6.2.2). Takes no lock: a device asks before each
    /// access of guest memory that it begins. Messages ask for themselves.
    #[must_use]
    pub fn is_bus_master(&self) -> bool {
        self.bus_master.load(Ordering::SeqCst)
    }

    /// Whether the function interrupts by its pin: it has one, MSI-X is off and it is not in D3hot. Takes no lock.
    #[must_use]
    pub fn uses_pin(&self) -> bool {
        self.pin.is_in_use()
    }

    /// The device asks for service by its pin, or no longer does. What it asks for is not saved: it is derived, and said again after a
    /// restore.
    pub fn set_interrupt(&self, asserted: bool) {
        self.pin.set_asserted(asserted);
    }

    /// Drives the line to the level that it should have, although it has not changed: the interrupt controller's state was restored.
    pub fn drive_pin(&self) {
        self.pin.drive();
    }

    /// The interrupts by message.
    #[must_use]
    pub fn msix(&self) -> &Msix {
        &self.msix
    }

    /// Serves a BAR read that lies in the MSI-X table or the pending bits; `false`: it does not, `data` is untouched.
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> bool {
        self.msix.bar_read(bar, offset, data)
    }

    /// Serves a BAR write that lies in the MSI-X table or the pending bits; `false`: it does not.
    pub fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> bool {
        self.msix.bar_write(bar, offset, data)
    }

    /// What a migration carries. The function must be paused: no vector is triggered meanwhile.
    #[must_use]
    pub fn save(&self) -> EndpointState {
        let config = self.lock_config();
        EndpointState { config: config.save(), msix: self.msix.save() }
    }

    /// Takes over a saved state and announces its vectors to the sink. Map the BARs afterwards with
    /// [`RootBus::map_bars`](crate::RootBus::map_bars).
    ///
    /// # Errors
    /// Those of [`ConfigSpace::restore`] and [`Msix::restore`]. The endpoint is unchanged then.
    pub fn restore(&self, state: &EndpointState) -> Result<(), Error> {
        let mut config = self.lock_config();
        let mut restored = config.clone();
        restored.restore(&state.config)?;
        self.msix.restore(&state.msix, Control::of(&restored))?;
        self.bus_master.store(restored.bus_master(), Ordering::SeqCst);
        self.pin.set_control(PinControl::of(&restored));
        *config = restored;
        Ok(())
    }

    fn lock_config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
