//! The end of the machine.

use crate::machine::Machine;
use crate::options::Exit;

/// PM1a control register of ferry's ACPI power device, and of QEMU's q35 under qboot.
const PM1A_CONTROL_PORT: u16 = 0x604;
/// ACPI 6.5, 4.8.3.2.1: SLP_EN is bit 13, SLP_TYP bits 12:10.
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u16 = 10;
/// SLP_TYP of S5: ferry's tables say 5, QEMU's say 0. A machine ignores the one it does not know.
const SOFT_OFF_TYPES: [u16; 2] = [5, 0];
const I8042_COMMAND_PORT: u16 = 0x64;
const I8042_PULSE_RESET: u8 = 0xfe;

/// Ends the machine as asked. Does not return where the machine obeys.
pub fn end(machine: &mut dyn Machine, exit: Exit) {
    match exit {
        Exit::Off => {
            for kind in SOFT_OFF_TYPES {
                machine.write_port16(PM1A_CONTROL_PORT, SLEEP_ENABLE | kind << SLEEP_TYPE_SHIFT);
            }
        }
        Exit::Reset => machine.write_port8(I8042_COMMAND_PORT, I8042_PULSE_RESET),
        Exit::Halt => {}
    }
}
