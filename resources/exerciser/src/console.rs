//! Lines on their way to the serial port.
//!
//! An access to the port leaves the virtual machine, which costs about 25 microseconds a byte from ring 3. Lines
//! are therefore queued whole and sent a few bytes at a time between the other work, so that output neither stops
//! the I/O nor hides a gap in time.

use alloc::collections::VecDeque;
use core::fmt::{self, Display, Write};

use crate::machine::Machine;

/// Data port of the first serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
const LINE_STATUS_PORT: u16 = SERIAL_PORT + 5;
const LINE_STATUS_DATA_READY: u8 = 1;

/// Bytes sent at each step.
const STEP_BYTES: usize = 4;
/// Lines that would make the queue longer are refused.
const QUEUE_BYTES: usize = 16 << 10;

/// The queue of output.
#[derive(Debug)]
pub struct Console {
    pending: VecDeque<u8>,
}

impl Default for Console {
    fn default() -> Self {
        Self { pending: VecDeque::with_capacity(QUEUE_BYTES) }
    }
}

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = QUEUE_BYTES - self.pending.len();
        if text.len() > room {
            return Err(fmt::Error);
        }
        self.pending.extend(text.as_bytes());
        Ok(())
    }
}

impl Console {
    /// Queues a line, without its end. A line that does not fit sends the queue first.
    pub fn line(&mut self, machine: &mut dyn Machine, line: impl Display) {
        let before = self.pending.len();
        if write!(self, "{line}\r\n").is_err() {
            self.pending.truncate(before);
            self.flush(machine);
            // A line longer than the whole queue is cut; none is.
            let _ = write!(self, "{line}\r\n");
        }
    }

    /// Sends a few bytes. True when nothing is left.
    pub fn step(&mut self, machine: &mut dyn Machine) -> bool {
        let length = self.pending.len().min(STEP_BYTES);
        if length > 0 {
            let mut bytes = [0; STEP_BYTES];
            for (byte, sent) in bytes.iter_mut().zip(self.pending.drain(..length)) {
                *byte = sent;
            }
            machine.write_string(SERIAL_PORT, &bytes[..length]);
        }
        self.pending.is_empty()
    }

    /// Whether a line is still being sent.
    pub fn is_busy(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Sends all.
    pub fn flush(&mut self, machine: &mut dyn Machine) {
        while !self.step(machine) {}
    }

    /// A byte that was typed, if any. Costs an exit from the virtual machine.
    pub fn read(&mut self, machine: &mut dyn Machine) -> Option<u8> {
        let ready = machine.read_port8(LINE_STATUS_PORT) & LINE_STATUS_DATA_READY != 0;
        ready.then(|| machine.read_port8(SERIAL_PORT))
    }
}
