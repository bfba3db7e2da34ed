//! The PCI transport: registers, negotiation, doorbells, interrupts, pause and state.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bus::GuestMemory;
use pci::{BarWindow, Endpoint, MsixSink, PciFunction};
use virtio_queue::Queue;

use crate::error::Error;
use crate::queue::QueueSlot;
use crate::regs::{self, access, common, status};
use crate::state::VirtioState;

/// Queues that a device can have.
const MAX_QUEUES: u16 = 64;

/// What a call of [`VirtioDevice::process`] has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Buffers were returned: the driver is to be told.
    pub used: bool,
    /// Buffers are left: call again.
    pub more: bool,
}

/// A kind of virtio device, without its transport.
pub trait VirtioDevice: Send {
    /// Virtio device type (virtio 1.2, 5).
    fn device_type(&self) -> u16;
    /// PCI base class, sub-class and programming interface.
    fn class(&self) -> [u8; 3];
    /// Entries that each queue offers, powers of two; 1 to 64 queues.
    fn queue_sizes(&self) -> &[u16];
    /// Device-specific feature bits that are offered.
    fn features(&self) -> u64 {
        0
    }
    /// Serves buffers of queue `index`, a bounded number of them, and returns them all.
    ///
    /// # Errors
    /// [`Error::Broken`]: the guest broke the rules. The device stands still until it is reset.
    fn process(&mut self, index: u16, queue: &mut Queue, memory: &GuestMemory) -> Result<Work, Error>;
}

/// Has a queue processed, on an I/O thread. Called on vCPU threads: must not block, nor call the device.
pub trait QueueNotify: Send + Sync {
    /// [`VirtioPci::process`] is to be called for `queue`.
    fn wake(&self, queue: u16);
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    endpoint: Endpoint,
    /// Offset of the configuration access capability.
    access: u16,
    memory: GuestMemory,
    notify: Box<dyn QueueNotify>,
    queue_count: u16,
    inner: Mutex<Inner>,
}

struct Inner {
    device: Box<dyn VirtioDevice>,
    registers: Registers,
    paused: bool,
}

struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    status: u8,
    isr: u8,
    queue_select: u16,
    queues: Vec<QueueSlot>,
}

impl Registers {
    fn new(queue_sizes: &[u16]) -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: regs::NO_VECTOR,
            status: 0,
            isr: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|&size| QueueSlot::new(size)).collect(),
        }
    }

    fn is_live(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }
}

impl VirtioPci {
    /// `device` on PCI, with DMA to `memory`, doorbells to `notify` and interrupts to `sink`.
    ///
    /// # Errors
    /// [`Error::BadDevice`] if `device` has no queue, too many, or one of an impossible size; [`Error::Pci`].
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        notify: Box<dyn QueueNotify>,
        sink: Arc<dyn MsixSink>,
    ) -> Result<Arc<Self>, Error> {
        let (device_type, sizes) = (device.device_type(), device.queue_sizes());
        // The largest queue that virtio allows has 32,768 entries, which is the largest power of two here (2.7).
        let is_possible = sizes.iter().all(|size| size.is_power_of_two());
        let queue_count = u16::try_from(sizes.len()).ok().filter(|count| (1..=MAX_QUEUES).contains(count));
        let Some(queue_count) = queue_count.filter(|_| is_possible) else {
            return Err(Error::BadDevice { device_type, sizes: sizes.to_vec() });
        };
        let registers = Registers::new(sizes);
        let (config, access) = regs::config_space(device_type, device.class(), queue_count)?;
        let endpoint = Endpoint::new(config, sink)?;
        let inner = Mutex::new(Inner { device, registers, paused: false });
        Ok(Arc::new(Self { endpoint, access, memory, notify, queue_count, inner }))
    }

    /// Serves `queue` if the driver is running, the device is a bus master and it is not paused. Returns `true` if buffers
    /// are left: call it again, after other work. For an I/O thread.
    pub fn process(&self, queue: u16) -> bool {
        let mut inner = self.lock();
        let Inner { device, registers, paused } = &mut *inner;
        if *paused || !registers.is_live() || !self.endpoint.is_bus_master() {
            return false;
        }
        let Some(slot) = registers.queues.get_mut(usize::from(queue)) else { return false };
        let Some(ring) = &mut slot.queue else { return false };
        match device.process(queue, ring, &self.memory) {
            Ok(work) => {
                if work.used {
                    registers.isr |= regs::ISR_QUEUE;
                    // NO_VECTOR is none that exists.
                    self.endpoint.msix().trigger(slot.vector);
                }
                work.more
            }
            Err(error) => {
                // The guest can do this for ever, and is told by the status.
                log::debug!("virtio device {} needs a reset: {error}", device.device_type());
                registers.status |= status::NEEDS_RESET;
                registers.isr |= regs::ISR_CONFIG;
                self.endpoint.msix().trigger(registers.config_vector);
                false
            }
        }
    }

    /// Stops processing. When it returns, nothing is in progress, guest memory stays as it is and no vector is triggered.
    pub fn pause(&self) {
        self.lock().paused = true;
    }

    /// Goes on, and has every queue looked at: a doorbell may have rung in between.
    pub fn resume(&self) {
        self.lock().paused = false;
        self.wake_all();
    }

    /// What a migration carries. The device must be paused.
    #[must_use]
    pub fn save(&self) -> VirtioState {
        let inner = self.lock();
        let registers = &inner.registers;
        VirtioState {
            endpoint: self.endpoint.save(),
            device_type: inner.device.device_type(),
            device_feature_select: registers.device_feature_select,
            driver_feature_select: registers.driver_feature_select,
            driver_features: registers.driver_features,
            config_vector: registers.config_vector,
            status: registers.status,
            isr: registers.isr,
            queue_select: registers.queue_select,
            queue_count: self.queue_count,
            queues: registers.queues.iter().map(QueueSlot::save).collect(),
        }
    }

    /// Takes over a saved state and leaves the device paused: [`Self::resume`] when the guest may run.
    ///
    /// # Errors
    /// [`Error::Mismatch`], [`Error::BadRegister`], [`Error::BadQueue`], [`Error::Pci`]. The device is unchanged then.
    pub fn restore(&self, state: &VirtioState) -> Result<(), Error> {
        let mut inner = self.lock();
        let registers = self.check(state, inner.device.as_ref())?;
        self.endpoint.restore(&state.endpoint)?;
        inner.registers = registers;
        inner.paused = true;
        Ok(())
    }

    fn check(&self, state: &VirtioState, device: &dyn VirtioDevice) -> Result<Registers, Error> {
        let sizes = device.queue_sizes();
        for (what, saved, here) in [
            ("device type", u64::from(state.device_type), u64::from(device.device_type())),
            ("queue count", u64::from(state.queue_count), sizes.len() as u64),
            ("number of queues", state.queues.len() as u64, sizes.len() as u64),
        ] {
            if saved != here {
                return Err(Error::Mismatch { what, saved, here });
            }
        }
        let bad = |register, value, reason| Err(Error::BadRegister { register, value, reason });
        let features = state.driver_features;
        let features_agreed = features_are_acceptable(features, offered(device));
        if features & !offered(device) != 0 {
            return bad("driver features", features, "some are not offered");
        }
        if state.status & !(status::WRITABLE | status::NEEDS_RESET) != 0 {
            return bad("status", state.status.into(), "bits are set that do not exist");
        }
        if state.status & status::FEATURES_OK != 0 && !features_agreed {
            return bad("status", state.status.into(), "FEATURES_OK without VIRTIO_F_VERSION_1");
        }
        if state.status & status::DRIVER_OK != 0 && state.status & status::FEATURES_OK == 0 {
            return bad("status", state.status.into(), "DRIVER_OK without FEATURES_OK");
        }
        if state.isr & !(regs::ISR_QUEUE | regs::ISR_CONFIG) != 0 {
            return bad("ISR status", state.isr.into(), "bits are set that do not exist");
        }
        let vectors = self.endpoint.msix().vectors();
        if state.config_vector >= vectors && state.config_vector != regs::NO_VECTOR {
            return bad("configuration vector", state.config_vector.into(), "it does not exist");
        }
        let queues = state.queues.iter().zip(sizes).enumerate();
        let queues = queues
            .map(|(index, (queue, &size))| QueueSlot::restore(queue, index, size, vectors, &self.memory))
            .collect::<Result<_, _>>()?;
        Ok(Registers {
            device_feature_select: state.device_feature_select,
            driver_feature_select: state.driver_feature_select,
            driver_features: features,
            config_vector: state.config_vector,
            status: state.status,
            isr: state.isr,
            queue_select: state.queue_select,
            queues,
        })
    }

    fn common_read(&self, offset: usize, data: &mut [u8]) {
        let inner = self.lock();
        let registers = &inner.registers;
        let mut image = [0; regs::COMMON_BYTES];
        let mut put = |at: usize, value: &[u8]| image[at..at + value.len()].copy_from_slice(value);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(common::DEVICE_FEATURE_SELECT, &registers.device_feature_select.to_le_bytes());
        let device_feature = half(offered(inner.device.as_ref()), registers.device_feature_select);
        put(common::DEVICE_FEATURE, &device_feature.to_le_bytes());
        put(common::DRIVER_FEATURE_SELECT, &registers.driver_feature_select.to_le_bytes());
        let driver_feature = half(registers.driver_features, registers.driver_feature_select);
        put(common::DRIVER_FEATURE, &driver_feature.to_le_bytes());
        put(common::CONFIG_VECTOR, &registers.config_vector.to_le_bytes());
        put(common::QUEUE_COUNT, &self.queue_count.to_le_bytes());
        put(common::STATUS, &[registers.status]);
        put(common::QUEUE_SELECT, &registers.queue_select.to_le_bytes());
        // A queue that does not exist reads as size 0 (4.1.4.3.1).
        if let Some(slot) = registers.queues.get(usize::from(registers.queue_select)) {
            put(common::QUEUE_SIZE, &slot.size.to_le_bytes());
            put(common::QUEUE_VECTOR, &slot.vector.to_le_bytes());
            put(common::QUEUE_ENABLE, &u16::from(slot.queue.is_some()).to_le_bytes());
            put(common::QUEUE_NOTIFY_OFFSET, &registers.queue_select.to_le_bytes());
            put(common::QUEUE_DESCRIPTORS, &slot.descriptors.to_le_bytes());
            put(common::QUEUE_DRIVER, &slot.driver.to_le_bytes());
            put(common::QUEUE_DEVICE, &slot.device.to_le_bytes());
        }
        for (byte, register) in data.iter_mut().zip(image.iter().skip(offset)) {
            *byte = *register;
        }
    }

    /// "The driver MUST access each field using the 'natural' access method", 64-bit fields as two of 32 bits
    /// (4.1.3.1). Other writes are ignored.
    fn common_write(&self, offset: usize, data: &[u8]) {
        let mut inner = self.lock();
        match *data {
            [value] if offset == common::STATUS => self.write_status(&mut inner, value),
            [a, b] => self.write16(&mut inner.registers, offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write32(&mut inner, offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset >= common::QUEUE_DESCRIPTORS && offset.is_multiple_of(8) => {
                self.write32(&mut inner, offset, u32::from_le_bytes([a, b, c, d]));
                self.write32(&mut inner, offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn write_status(&self, inner: &mut Inner, value: u8) {
        if value == 0 {
            inner.registers = Registers::new(inner.device.queue_sizes());
            return;
        }
        let registers = &mut inner.registers;
        // "The driver MUST NOT clear a device status bit" (2.1.1): only reset does.
        let mut new = registers.status | value & status::WRITABLE;
        let is_acceptable =
            features_are_acceptable(registers.driver_features, offered(inner.device.as_ref()));
        if registers.status & status::FEATURES_OK == 0 && !is_acceptable {
            new &= !status::FEATURES_OK;
        }
        if new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        let was_live = registers.is_live();
        registers.status = new;
        if !was_live && registers.is_live() {
            // Doorbells that rang too early.
            (0..self.queue_count).for_each(|queue| self.notify.wake(queue));
        }
    }

    fn write16(&self, registers: &mut Registers, offset: usize, value: u16) {
        let vector = if value < self.endpoint.msix().vectors() { value } else { regs::NO_VECTOR };
        match offset {
            common::CONFIG_VECTOR => registers.config_vector = vector,
            common::QUEUE_SELECT => registers.queue_select = value,
            _ => {
                let index = usize::from(registers.queue_select);
                let Some(slot) = registers.queues.get_mut(index) else { return };
                match offset {
                    common::QUEUE_VECTOR => slot.vector = vector,
                    _ if slot.queue.is_some() => {}
                    common::QUEUE_SIZE if value.is_power_of_two() && value <= slot.max_size => {
                        slot.size = value
                    }
                    common::QUEUE_ENABLE if value == 1 => {
                        if let Err(error) = slot.enable(index, &self.memory) {
                            log::debug!("the guest's queue stays disabled: {error}");
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    fn write32(&self, inner: &mut Inner, offset: usize, value: u32) {
        let offered = offered(inner.device.as_ref());
        let registers = &mut inner.registers;
        match offset {
            common::DEVICE_FEATURE_SELECT => registers.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => registers.driver_feature_select = value,
            common::DRIVER_FEATURE if registers.status & status::FEATURES_OK == 0 => {
                let features = match registers.driver_feature_select {
                    0 => replace_low(registers.driver_features, value),
                    1 => replace_high(registers.driver_features, value),
                    _ => return,
                };
                // What was not offered cannot be accepted.
                registers.driver_features = features & offered;
            }
            _ => {
                let Some(slot) = registers.queues.get_mut(usize::from(registers.queue_select)) else {
                    return;
                };
                if slot.queue.is_some() {
                    return;
                }
                let (low, high) = (offset & !4, offset & 4 != 0);
                let address = match low {
                    common::QUEUE_DESCRIPTORS => &mut slot.descriptors,
                    common::QUEUE_DRIVER => &mut slot.driver,
                    common::QUEUE_DEVICE => &mut slot.device,
                    _ => return,
                };
                *address = if high { replace_high(*address, value) } else { replace_low(*address, value) };
            }
        }
    }

    /// The BAR access that the driver has described in the configuration access capability (4.1.4.9).
    fn access_window(&self, offset: u16, length: usize) -> Option<(u8, u64)> {
        if offset != self.access + access::DATA {
            return None;
        }
        let mut bar = [0];
        self.endpoint.config_read(self.access + access::BAR, &mut bar);
        let field = |at| {
            let mut bytes = [0; 4];
            self.endpoint.config_read(self.access + at, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        let (at, described) = (field(access::OFFSET), field(access::LENGTH));
        // "The driver MUST NOT write a cap.offset which is not a multiple of cap.length" (4.1.4.9.2).
        let is_valid =
            matches!(described, 1 | 2 | 4) && described as usize == length && at.is_multiple_of(described);
        is_valid.then_some((bar[0], u64::from(at)))
    }

    /// Has every queue looked at.
    fn wake_all(&self) {
        (0..self.queue_count).for_each(|queue| self.notify.wake(queue));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        match self.access_window(offset, data.len()) {
            Some((bar, at)) => self.bar_read(bar, at, data),
            None => self.endpoint.config_read(offset, data),
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        match self.access_window(offset, data.len()) {
            Some((bar, at)) => self.bar_write(bar, at, data),
            // Doorbells may have rung while guest memory was out of reach.
            None if self.endpoint.config_write(offset, data) => self.wake_all(),
            None => {}
        }
    }

    fn bars(&self) -> Vec<BarWindow> {
        self.endpoint.bars()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != regs::BAR || self.endpoint.bar_read(bar, offset, data) {
            return;
        }
        match offset {
            regs::ISR => {
                if let [byte, ..] = data {
                    *byte = std::mem::take(&mut self.lock().registers.isr);
                }
            }
            _ if offset < regs::COMMON + regs::COMMON_BYTES as u64 => self.common_read(offset as usize, data),
            _ => {}
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar != regs::BAR || self.endpoint.bar_write(bar, offset, data) {
            return;
        }
        if offset < regs::COMMON + regs::COMMON_BYTES as u64 {
            self.common_write(offset as usize, data);
        } else if let Some(at) = offset.checked_sub(regs::NOTIFY)
            && let Ok(queue) = u16::try_from(at / regs::NOTIFY_STRIDE)
            && queue < self.queue_count
        {
            self.notify.wake(queue);
        }
    }
}

fn offered(device: &dyn VirtioDevice) -> u64 {
    device.features() | regs::FEATURE_VERSION_1
}

fn features_are_acceptable(features: u64, offered: u64) -> bool {
    features & !offered == 0 && features & regs::FEATURE_VERSION_1 != 0
}

fn replace_low(value: u64, low: u32) -> u64 {
    value & !0xffff_ffff | u64::from(low)
}

fn replace_high(value: u64, high: u32) -> u64 {
    value & 0xffff_ffff | u64::from(high) << 32
}
