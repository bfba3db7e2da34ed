//! What is saved. Plain and untrusted: only the devices' `restore` makes something of it.

use vmstate::VmState;

/// The serial port. Line and modem status follow from the rest.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "serial", version = 1)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Bytes in the receive buffer.
    pub received_count: u8,
    /// The receive buffer, oldest first.
    #[vmstate(len = "received_count", max = 64)]
    pub received: Vec<u8>,
    /// Bytes that wait behind the receive buffer.
    pub backlog_count: u16,
    /// Those bytes, oldest first.
    #[vmstate(len = "backlog_count", max = 4096)]
    pub backlog: Vec<u8>,
}

/// The clock and its memory.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "rtc", version = 1)]
pub struct RtcState {
    /// The selected register.
    pub index: u8,
    /// Registers and CMOS memory; the time registers mean something only while the guest sets the time.
    pub registers: [u8; 128],
    /// Seconds by which the guest's clock is ahead of the host's.
    pub offset_seconds: i64,
}

/// The ACPI power management registers.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "acpi-pm", version = 1)]
pub struct AcpiPmState {
    /// PM1a enable.
    pub enable: u16,
    /// PM1a control.
    pub control: u16,
}
