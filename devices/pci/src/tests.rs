//! The crate against a driver-side view: what a guest would do, and what a hostile one could.

mod config;
mod msix;
mod pin;
mod root;
mod state;

use std::sync::{Arc, Mutex};

use crate::*;

/// What an [`MsixSink`] was told, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Set(u16, Option<MsiMessage>),
    Signal(u16),
}

#[derive(Default)]
pub(crate) struct Recorder(Mutex<Vec<Told>>);

impl Recorder {
    pub fn take(&self) -> Vec<Told> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl MsixSink for Recorder {
    fn set_vector(&self, vector: u16, message: Option<MsiMessage>) {
        self.0.lock().unwrap().push(Told::Set(vector, message));
    }

    fn signal(&self, vector: u16) {
        self.0.lock().unwrap().push(Told::Signal(vector));
    }
}

pub(crate) const TABLE: u32 = 0x2000;
pub(crate) const PENDING: u32 = 0x3000;
/// Offset of the MSI-X capability that [`config`] adds first.
pub(crate) const MSIX_CAPABILITY: u16 = 0x40;

/// A function like the NVMe controller: one 64-bit BAR with registers, MSI-X table and pending bits.
pub(crate) fn config(vectors: u16) -> ConfigSpace {
    let mut config = ConfigSpace::new(&Identity {
        vendor: 0x1b36,
        device: 0x0010,
        revision: 2,
        class: [1, 8, 2],
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    });
    config.add_bar(0, BarKind::Memory64, 0x4000).unwrap();
    let layout = MsixLayout { vectors, bar: 0, table_offset: TABLE, pending_offset: PENDING };
    assert_eq!(config.add_msix(layout), Ok(()));
    config.add_power_management().unwrap();
    config.add_express().unwrap();
    config
}

/// A device whose registers are 16 bytes of memory, everything else is its endpoint.
pub(crate) struct Function {
    pub endpoint: Endpoint,
    registers: Mutex<[u8; 16]>,
}

impl Function {
    pub fn new(vectors: u16) -> (Arc<Self>, Arc<Recorder>) {
        let sink = Arc::new(Recorder::default());
        let endpoint = Endpoint::new(config(vectors), sink.clone()).unwrap();
        (Arc::new(Self { endpoint, registers: Mutex::new([0; 16]) }), sink)
    }

    pub fn read32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.endpoint.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }
}

impl PciFunction for Function {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.endpoint.config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.endpoint.config_write(offset, data);
    }

    fn bars(&self) -> Vec<BarWindow> {
        self.endpoint.bars()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if !self.endpoint.bar_read(bar, offset, data) {
            let registers = self.registers.lock().unwrap();
            for (position, byte) in (offset as usize..).zip(data) {
                *byte = registers.get(position).copied().unwrap_or(0);
            }
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if !self.endpoint.bar_write(bar, offset, data) {
            let mut registers = self.registers.lock().unwrap();
            for (position, &byte) in (offset as usize..).zip(data) {
                if let Some(register) = registers.get_mut(position) {
                    *register = byte;
                }
            }
        }
    }
}
