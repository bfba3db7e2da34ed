//! ACPI fixed hardware: the PM1a registers, as far as they switch the machine off (ACPI 6.5, 4.8.3).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bus::BusDevice;

use crate::error::Error;
use crate::power::PowerEvents;
use crate::state::AcpiPmState;

/// SLP_TYP of the soft-off state S5: what the DSDT's `\_S5` package must say.
pub const SLEEP_TYPE_SOFT_OFF: u16 = 5;

const ENABLE: usize = 2;
const CONTROL: usize = 4;
/// TMR_EN, GBL_EN, PWRBTN_EN, SLPBTN_EN, RTC_EN.
const ENABLE_WRITABLE: u16 = 0x0721;
/// The machine is in ACPI mode from the start: there is no SMI command port to switch with.
const SCI_ENABLED: u16 = 1;
/// BM_RLD and SLP_TYP stay; SLP_EN and GBL_RLS are write-only.
const SLEEP_TYPE_SHIFT: u32 = 10;
const CONTROL_WRITABLE: u16 = 0b111 << SLEEP_TYPE_SHIFT | 1 << 1;
const SLEEP_ENABLE: u16 = 1 << 13;

/// The PM1a event block (status, enable) at offset 0 and the PM1a control block at offset 4; the two ports above read 0.
/// No event ever occurs, so the status reads 0.
pub struct AcpiPm {
    events: Arc<dyn PowerEvents>,
    registers: Mutex<AcpiPmState>,
}

impl AcpiPm {
    /// Range on the port bus in bytes.
    pub const PORTS: u64 = 8;

    /// The registers after power-on.
    #[must_use]
    pub fn new(events: Arc<dyn PowerEvents>) -> Arc<Self> {
        Arc::new(Self { events, registers: Mutex::new(AcpiPmState { enable: 0, control: SCI_ENABLED }) })
    }

    /// What a migration carries.
    #[must_use]
    pub fn save(&self) -> AcpiPmState {
        self.lock().clone()
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// [`Error::BadRegister`] for bits that do not exist.
    pub fn restore(&self, state: &AcpiPmState) -> Result<(), Error> {
        let bad = |register, value: u16, reason| {
            Err(Error::BadRegister { device: "ACPI", register, value: value.into(), reason })
        };
        if state.enable & !ENABLE_WRITABLE != 0 {
            return bad("PM1a enable", state.enable, "bits are set that do not exist");
        }
        if state.control & !CONTROL_WRITABLE != SCI_ENABLED {
            return bad("PM1a control", state.control, "SCI_EN is always set, and other bits do not exist");
        }
        *self.lock() = state.clone();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, AcpiPmState> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bytes(registers: &AcpiPmState) -> [u8; AcpiPm::PORTS as usize] {
    let ([enable_low, enable_high], [control_low, control_high]) =
        (registers.enable.to_le_bytes(), registers.control.to_le_bytes());
    [0, 0, enable_low, enable_high, control_low, control_high, 0, 0]
}

impl BusDevice for AcpiPm {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = bytes(&self.lock());
        data.fill(0);
        for (byte, register) in data.iter_mut().zip(registers.iter().skip(offset as usize)) {
            *byte = *register;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.lock();
        let mut merged = bytes(&registers);
        for (register, byte) in merged.iter_mut().skip(offset as usize).zip(data) {
            *register = *byte;
        }
        let word = |at: usize| u16::from_le_bytes([merged[at], merged[at + 1]]);
        registers.enable = word(ENABLE) & ENABLE_WRITABLE;
        let control = word(CONTROL);
        registers.control = control & CONTROL_WRITABLE | SCI_ENABLED;
        drop(registers);
        // SLP_EN reads 0, so it is set only if this write has set it.
        if control & SLEEP_ENABLE != 0 && control >> SLEEP_TYPE_SHIFT & 0b111 == SLEEP_TYPE_SOFT_OFF {
            self.events.power_off();
        }
    }
}
