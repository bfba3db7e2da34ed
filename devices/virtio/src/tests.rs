//! The device against a driver-side model in memory.

mod driver;
mod hostile;
mod negotiation;
mod state;

use std::sync::{Arc, Mutex};

use bus::GuestMemory;
use pci::{MsiMessage, MsixSink, PciFunction};
use vm_memory::{Bytes, GuestAddress};

use crate::regs::{self, common, status};
use crate::*;

pub(crate) const MEMORY_BYTES: usize = 1 << 20;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
pub(crate) const BUFFER: u64 = 0x1_0000;
const MSIX_CONTROL: u16 = 0x42;
const MSIX_TABLE: u64 = 0x2000;
pub(crate) const WRITE: u16 = 2;
pub(crate) const NEXT: u16 = 1;
pub(crate) const INDIRECT: u16 = 4;

/// Counts up, so that a test knows the bytes.
#[derive(Default)]
pub(crate) struct Counter(u8);

impl Entropy for Counter {
    fn fill(&mut self, buffer: &mut [u8]) {
        for byte in buffer {
            self.0 = self.0 % 251 + 1;
            *byte = self.0;
        }
    }
}

pub(crate) fn expected(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Counter::default().fill(&mut bytes);
    bytes
}

/// What left the device: wakes of queues and messages of vectors.
#[derive(Default)]
pub(crate) struct Recorder {
    wakes: Mutex<Vec<u16>>,
    signals: Mutex<Vec<u16>>,
}

impl QueueNotify for Arc<Recorder> {
    fn wake(&self, queue: u16) {
        self.wakes.lock().unwrap().push(queue);
    }
}

impl MsixSink for Recorder {
    fn set_vector(&self, _vector: u16, _message: Option<MsiMessage>) {}

    fn signal(&self, vector: u16) {
        self.signals.lock().unwrap().push(vector);
    }
}

/// A guest with an entropy device and its driver.
pub(crate) struct Guest {
    pub memory: GuestMemory,
    pub recorder: Arc<Recorder>,
    pub device: Arc<VirtioPci>,
    /// The driver's index of the available ring.
    pub available: u16,
}

impl Guest {
    pub fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        Self::with_memory(memory)
    }

    pub fn with_memory(memory: GuestMemory) -> Self {
        let recorder = Arc::new(Recorder::default());
        let rng = Box::new(Rng::new(Counter::default()));
        let device =
            VirtioPci::new(rng, memory.clone(), Box::new(recorder.clone()), recorder.clone()).unwrap();
        Self { memory, recorder, device, available: 0 }
    }

    pub fn read(&self, offset: usize, length: usize) -> u64 {
        let mut data = [0; 8];
        self.device.bar_read(0, offset as u64, &mut data[..length]);
        u64::from_le_bytes(data)
    }

    pub fn write(&self, offset: usize, length: usize, value: u64) {
        self.device.bar_write(0, offset as u64, &value.to_le_bytes()[..length]);
    }

    pub fn status(&self) -> u8 {
        self.read(common::STATUS, 1) as u8
    }

    pub fn set_status(&self, bits: u8) {
        self.write(common::STATUS, 1, bits.into());
    }

    /// The command register: memory decoding, and whether the device is a bus master.
    pub fn set_bus_master(&self, on: bool) {
        self.device.config_write(0x04, &(0b010 | u16::from(on) << 2).to_le_bytes());
    }

    /// The device is a bus master, MSI-X on, both vectors unmasked.
    pub fn enable_interrupts(&self) {
        self.set_bus_master(true);
        self.device.config_write(MSIX_CONTROL, &0x8000_u16.to_le_bytes());
        for vector in 0..2 {
            self.device.bar_write(0, MSIX_TABLE + 16 * vector, &0xfee0_0000_u64.to_le_bytes());
            self.device.bar_write(0, MSIX_TABLE + 16 * vector + 12, &0_u32.to_le_bytes());
        }
    }

    /// Up to FEATURES_OK.
    pub fn negotiate(&self) {
        self.set_status(0);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.write(common::DRIVER_FEATURE_SELECT, 4, 1);
        self.write(common::DRIVER_FEATURE, 4, 1);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
    }

    pub fn set_up_queue(&self, size: u16) {
        self.write(common::CONFIG_VECTOR, 2, 1);
        self.write(common::QUEUE_SELECT, 2, 0);
        self.write(common::QUEUE_SIZE, 2, size.into());
        self.write(common::QUEUE_VECTOR, 2, 0);
        self.write(common::QUEUE_DESCRIPTORS, 8, DESCRIPTORS);
        self.write(common::QUEUE_DRIVER, 4, AVAILABLE);
        self.write(common::QUEUE_DRIVER + 4, 4, 0);
        self.write(common::QUEUE_DEVICE, 8, USED);
        self.write(common::QUEUE_ENABLE, 2, 1);
    }

    /// A driver that is ready to ask.
    pub fn ready(size: u16) -> Self {
        let guest = Self::new();
        guest.enable_interrupts();
        guest.negotiate();
        guest.set_up_queue(size);
        guest.set_status(0xf);
        guest.take_wakes();
        guest
    }

    pub fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.descriptor_at(DESCRIPTORS + 16 * u64::from(index), address, length, flags, next);
    }

    pub fn descriptor_at(&self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes the chain at `head` available and rings the doorbell.
    pub fn offer(&mut self, head: u16, size: u16) {
        let entry = AVAILABLE + 4 + 2 * u64::from(self.available % size);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
        self.write(regs::NOTIFY as usize, 2, 0);
    }

    /// Asks for `length` bytes at `address` with descriptor 0 alone.
    pub fn ask(&mut self, address: u64, length: u32) {
        self.descriptor(0, address, length, WRITE, 0);
        self.offer(0, 64);
    }

    /// Index of the used ring, and the head and length of its entry `entry`.
    pub fn used(&self, entry: u16) -> (u16, u32, u32) {
        let read = |at| self.memory.read_obj::<u32>(GuestAddress(USED + at)).unwrap();
        let entry = 4 + 8 * u64::from(entry);
        (self.memory.read_obj(GuestAddress(USED + 2)).unwrap(), read(entry), read(entry + 4))
    }

    pub fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub fn take_wakes(&self) -> Vec<u16> {
        std::mem::take(&mut self.recorder.wakes.lock().unwrap())
    }

    pub fn take_signals(&self) -> Vec<u16> {
        std::mem::take(&mut self.recorder.signals.lock().unwrap())
    }
}
