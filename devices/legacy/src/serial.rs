//! The serial port: vm-superio's 16550A with room for more input, and with checked state.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bus::{BusDevice, InterruptLine};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial as Uart, SerialState as UartState, Trigger};

use crate::error::Error;
use crate::state::SerialState;

/// Input bytes that wait until the guest has read its receive buffer of 64.
pub const BACKLOG_BYTES: usize = 4096;
const RECEIVE_BYTES: usize = 64;
const INTERRUPT_ENABLE_BITS: u8 = 0x0f;
const DATA_READY: u8 = 1;
/// Interrupt identification: none; transmitter empty; received data; both.
const IDENTIFICATIONS: [u8; 4] = [0x01, 0x02, 0x04, 0x06];

/// An edge on the interrupt line.
struct Edge(Arc<dyn InterruptLine>);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

type Output = Box<dyn Write + Send>;

/// A 16550A whose output goes to a writer.
///
/// The guest's write of a byte returns when the writer has taken and flushed it: a writer that blocks stops the vCPU, as
/// a real line with flow control would, and stops a migration that waits for it. So give it a writer whose every write ends
/// within a bounded time. Errors of the writer lose the byte and nothing else: a closed console must not disturb the guest.
pub struct Serial {
    inner: Mutex<Inner>,
    interrupt: Arc<dyn InterruptLine>,
}

struct Inner {
    uart: Uart<Edge, NoEvents, Output>,
    backlog: VecDeque<u8>,
}

impl Inner {
    /// Moves waiting bytes into the receive buffer once the guest has emptied it.
    fn refill(&mut self) {
        if self.uart.fifo_capacity() < RECEIVE_BYTES {
            return;
        }
        // Loopback mode takes nothing: the bytes go on waiting.
        let (next, _) = self.backlog.as_slices();
        if let Ok(taken) = self.uart.enqueue_raw_bytes(next) {
            self.backlog.drain(..taken);
        }
    }
}

impl Serial {
    /// Range on the port bus in bytes.
    pub const PORTS: u64 = 8;

    /// A port after reset.
    #[must_use]
    pub fn new(interrupt: Arc<dyn InterruptLine>, output: Box<dyn Write + Send>) -> Arc<Self> {
        let uart = Uart::new(Edge(Arc::clone(&interrupt)), output);
        Arc::new(Self { inner: Mutex::new(Inner { uart, backlog: VecDeque::new() }), interrupt })
    }

    /// Input for the guest. Returns how many bytes were taken: [`BACKLOG_BYTES`] can wait, what is beyond is lost unless the
    /// caller offers it again.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        let mut inner = self.lock();
        let taken = bytes.len().min(BACKLOG_BYTES - inner.backlog.len());
        inner.backlog.extend(&bytes[..taken]);
        inner.refill();
        taken
    }

    /// What a migration carries.
    #[must_use]
    pub fn save(&self) -> SerialState {
        let inner = self.lock();
        let UartState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            modem_control,
            scratch,
            in_buffer: received,
            line_status: _,
            modem_status: _,
        } = inner.uart.state();
        SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            modem_control,
            scratch,
            // Neither exceeds its maximum, which is far below the field's.
            received_count: received.len() as u8,
            received,
            backlog_count: inner.backlog.len() as u16,
            backlog: inner.backlog.iter().copied().collect(),
        }
    }

    /// Takes over a saved state. An interrupt that is identified and enabled is raised again, which a driver tolerates:
    /// restore the interrupt controller first, so that it is not lost.
    ///
    /// # Errors
    /// [`Error::BadRegister`], [`Error::BadInput`].
    pub fn restore(&self, state: &SerialState) -> Result<(), Error> {
        let uart = check(state)?;
        let mut inner = self.lock();
        let output: Output = std::mem::replace(inner.uart.writer_mut(), Box::new(io::sink()));
        // The only error is a receive buffer that is too long, which was checked.
        if let Ok(uart) = Uart::from_state(&uart, Edge(Arc::clone(&self.interrupt)), NoEvents, output) {
            inner.uart = uart;
        }
        inner.backlog = state.backlog.iter().copied().collect();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(state: &SerialState) -> Result<UartState, Error> {
    let bad = |register, value: u8, reason| {
        Err(Error::BadRegister { device: "serial", register, value: value.into(), reason })
    };
    if state.interrupt_enable & !INTERRUPT_ENABLE_BITS != 0 {
        return bad("interrupt enable", state.interrupt_enable, "only the low four bits exist");
    }
    if !IDENTIFICATIONS.contains(&state.interrupt_identification) {
        return bad(
            "interrupt identification",
            state.interrupt_identification,
            "no such combination of interrupts",
        );
    }
    for (buffer, saved, declared, most) in [
        ("receive buffer", state.received.len(), usize::from(state.received_count), RECEIVE_BYTES),
        ("backlog", state.backlog.len(), usize::from(state.backlog_count), BACKLOG_BYTES),
    ] {
        if saved != declared || saved > most {
            return Err(Error::BadInput { buffer, saved, declared, most });
        }
    }
    let reset = UartState::default();
    let data_ready = if state.received.is_empty() { 0 } else { DATA_READY };
    Ok(UartState {
        baud_divisor_low: state.baud_divisor_low,
        baud_divisor_high: state.baud_divisor_high,
        interrupt_enable: state.interrupt_enable,
        interrupt_identification: state.interrupt_identification,
        line_control: state.line_control,
        line_status: reset.line_status | data_ready,
        modem_control: state.modem_control,
        modem_status: reset.modem_status,
        scratch: state.scratch,
        in_buffer: state.received.clone(),
    })
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let mut inner = self.lock();
        // An access of several bytes is one of each port, as the bus of a PC splits it.
        for (port, byte) in (offset..Self::PORTS).zip(data) {
            *byte = inner.uart.read(port as u8);
        }
        inner.refill();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        for (port, &byte) in (offset..Self::PORTS).zip(data) {
            if let Err(error) = inner.uart.write(port as u8, byte) {
                log::debug!("the console lost a byte: {error}");
            }
        }
        inner.refill();
    }
}
