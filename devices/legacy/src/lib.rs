//! The few devices of an old PC that a Linux guest still needs: a serial port, a clock, and ways to end.
//!
//! Each is a [`bus::BusDevice`] on the port bus, called on vCPU threads, with its own lock:
//!
//! | device | ports | gives the guest |
//! | --- | --- | --- |
//! | [`Serial`] | 0x3f8, 8 ports | its console: bytes out to a writer, bytes in from [`Serial::enqueue`] |
//! | [`Rtc`] | 0x70, 2 ports | the wall-clock time at boot, 128 bytes of CMOS |
//! | [`I8042`] | 0x60, 5 ports | reset |
//! | [`AcpiPm`] | 0x600, 8 ports | power-off |
//!
//! Ends of the machine arrive at [`PowerEvents`], interrupts leave through a [`bus::InterruptLine`].
//!
//! Invariants:
//! - No access blocks, except that a byte written to the serial port waits for the writer (see [`Serial`]).
//! - A device that was restored answers every register as the saved one did.
//! - States are plain structs; `restore` refuses what no guest could have brought about, and changes nothing then.
//!
//! Absent: keyboard and mouse, RTC alarm and periodic interrupts, the power button and the system control interrupt,
//! the ACPI timer, general purpose events. The interrupt controllers and the timer chip are in the kernel.
#![forbid(unsafe_code)]

mod acpi_pm;
mod error;
mod i8042;
mod power;
mod rtc;
mod serial;
mod state;
#[cfg(test)]
mod tests;

pub use acpi_pm::{AcpiPm, SLEEP_TYPE_SOFT_OFF};
pub use error::Error;
pub use i8042::I8042;
pub use power::PowerEvents;
pub use rtc::{Rtc, WallClock};
pub use serial::{BACKLOG_BYTES, Serial};
pub use state::{AcpiPmState, RtcState, SerialState};
