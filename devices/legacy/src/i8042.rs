//! The keyboard controller, as far as it resets the processor.

use std::sync::Arc;

use bus::BusDevice;

use crate::power::PowerEvents;

/// The command port, 0x64.
const COMMAND: u64 = 4;
/// Pulse output line 0, which is wired to the reset pin.
const PULSE_RESET: u8 = 0xfe;

/// Ports 0x60 to 0x64. Reads give 0: the status says that a command can be written and no data waits, which is what
/// Linux' `reboot=k` waits for. It has no state.
pub struct I8042 {
    events: Arc<dyn PowerEvents>,
}

impl I8042 {
    /// Range on the port bus in bytes.
    pub const PORTS: u64 = 5;

    /// A controller that reports resets to `events`.
    #[must_use]
    pub fn new(events: Arc<dyn PowerEvents>) -> Arc<Self> {
        Arc::new(Self { events })
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [PULSE_RESET] {
            self.events.reset();
        }
    }
}
