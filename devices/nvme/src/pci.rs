//! The controller as a PCI function: configuration space, BAR 0, and the way of register and doorbell writes.
//!
//! BAR 0 holds the registers, from 0x1000 the doorbells (stride 4 bytes), and on pages of their own the MSI-X table and its
//! pending bits. BAR 2 is the controller memory buffer and BAR 4 the persistent memory region, where there are such.

use std::sync::atomic::Ordering;

use nvme_spec::event::Event;
use nvme_spec::regs;
use pci::{BarKind, BarWindow, ConfigSpace, Identity, MsixLayout, PciFunction};

use crate::Error;
use crate::config::ControllerConfig;
use crate::controller::Controller;
use crate::doorbell::Rung;
use crate::window::{self, BUFFER_START};

/// Vendor id: that of Red Hat, whose 1b36 range holds device numbers for virtual hardware without a vendor.
pub(crate) const VENDOR_ID: u16 = 0x1b36;
/// Device id: generic emulated NVMe controller.
const DEVICE_ID: u16 = 0x0010;
/// Mass storage, non-volatile memory, NVMe I/O controller: drivers bind by this.
const CLASS: [u8; 3] = [0x01, 0x08, 0x02];
/// The BAR.
const BAR: u8 = 0;
/// That of the controller memory buffer.
pub(crate) const BUFFER_BAR: u8 = 2;
/// That of the persistent memory region.
pub(crate) const REGION_BAR: u8 = 4;
const POWER_MANAGEMENT_OFFSET: u8 = 0x60;
const EXPRESS_OFFSET: u8 = 0x80;
const PAGE_BYTES: u64 = 4096;

/// Configuration space of a controller.
pub(crate) fn config_space(config: &ControllerConfig) -> Result<ConfigSpace, Error> {
    let doorbells_end = regs::sq_tail_doorbell(config.queue_pairs) + 8;
    let table_offset = doorbells_end.next_multiple_of(PAGE_BYTES);
    let pending_offset = (table_offset + u64::from(config.vectors) * 16).next_multiple_of(PAGE_BYTES);
    let length_bytes = (pending_offset + PAGE_BYTES).next_power_of_two();
    let identity = Identity {
        vendor: VENDOR_ID,
        device: DEVICE_ID,
        revision: 1,
        class: CLASS,
        subsystem_vendor: VENDOR_ID,
        subsystem: DEVICE_ID,
    };
    // All offsets are below 1 MiB: 65,536 doorbell pairs take 512 KiB, 2,048 vectors 32 KiB.
    let layout = MsixLayout {
        vectors: config.vectors,
        bar: BAR,
        table_offset: table_offset as u32,
        pending_offset: pending_offset as u32,
    };
    let build = || {
        let mut space = ConfigSpace::new(&identity);
        space.add_interrupt_pin();
        space.add_bar(BAR, BarKind::Memory64, length_bytes)?;
        if config.buffer_bytes > 0 {
            space.add_bar(BUFFER_BAR, BarKind::Memory64Prefetchable, config.buffer_bytes)?;
        }
        if config.region_bytes > 0 {
            space.add_bar(REGION_BAR, BarKind::Memory64Prefetchable, config.region_bytes)?;
        }
        // Where QEMU's controller has them, MSI-X table and all: a driver that comes from there keeps the offsets.
        space.add_msix(layout)?;
        space.begin_next_capability_at(POWER_MANAGEMENT_OFFSET);
        space.add_power_management()?;
        space.begin_next_capability_at(EXPRESS_OFFSET);
        space.add_express()?;
        Ok(space)
    };
    build().map_err(Error::Pci)
}

impl PciFunction for Controller {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.pool.shared.endpoint.config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let shared = &self.pool.shared;
        let used_pin = shared.endpoint.uses_pin();
        let is_due = shared.endpoint.config_write(offset, data);
        shared.update_pin();
        if is_due || shared.endpoint.uses_pin() && !used_pin {
            // What came while guest memory was out of reach is served now; and heads in shadow doorbells are told to a pin.
            (0..self.pool.workers.len()).for_each(|index| shared.host.wake(index));
        }
    }

    fn bars(&self) -> Vec<BarWindow> {
        self.pool.shared.endpoint.bars()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let shared = &self.pool.shared;
        if shared.endpoint.bar_read(bar, offset, data) {
            return;
        }
        if bar == BUFFER_BAR {
            let length_bytes = shared.windows.buffer_bytes();
            return window::read(&shared.memory, BUFFER_START, length_bytes, offset, data);
        }
        if bar == REGION_BAR {
            return shared.region.read(offset, data);
        }
        data.fill(0);
        if bar == BAR && offset < regs::DOORBELLS {
            // "The completion of a read to the PMRSTS property shall ensure that all prior writes to the Persistent Memory Region have
            // completed and are persistent." Without the registers' lock: it may take long.
            let end = offset.saturating_add(data.len() as u64);
            if offset < regs::PMRSTS + 4 && end > regs::PMRSTS && shared.region.is_ready() {
                shared.flush_region();
            }
            shared.registers().read(offset, data);
        }
        // "The host should not read the doorbell registers": 0.
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        let shared = &self.pool.shared;
        if shared.endpoint.bar_write(bar, offset, data) {
            return;
        }
        if bar == BUFFER_BAR {
            let length_bytes = shared.windows.buffer_bytes();
            return window::write(&shared.memory, BUFFER_START, length_bytes, offset, data);
        }
        if bar == REGION_BAR {
            return shared.region.write(offset, data);
        }
        if bar != BAR {
            return;
        }
        if offset < regs::DOORBELLS {
            let was_ready = shared.region.is_ready();
            let is_due = shared.registers().write(offset, data);
            if was_ready && !shared.region.is_ready() {
                // Its contents are saved before the host can see that it is disabled.
                shared.flush_region();
            }
            if matches!(offset & !3, regs::INTMS | regs::INTMC) || data.len() == 8 {
                shared.update_pin();
            }
            if is_due {
                shared.host.wake(0);
            }
            return;
        }
        self.ring(offset - regs::DOORBELLS, data);
    }
}

impl Controller {
    /// A write to the doorbells, which are 4 bytes wide.
    ///
    /// "The host shall access registers in their native width or aligned 32-bit accesses. Violation of either of these host requirements
    /// results in undefined behavior" (PCIe Transport 1.0, 3.1.2), and accesses to parts of two registers "are not supported". What is not
    /// whole may mean anything, so it changes nothing; and no event tells of it: Write to Invalid Doorbell Register is about a queue that
    /// does not exist, and Invalid Doorbell Write Value about a value that was written (Base 5.2), neither of which is known here.
    fn ring(&self, offset: u64, data: &[u8]) {
        let shared = &self.pool.shared;
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        if !offset.is_multiple_of(4) {
            return;
        }
        // Values are 16 bits; the upper half is reserved.
        let value = u32::from_le_bytes(data) & 0xffff;
        let index = offset / 4;
        shared.doorbell_writes.fetch_add(1, Ordering::Relaxed);
        let event = match shared.doorbells.ring(index, value) {
            Rung::Wake(worker) => {
                if shared.endpoint.uses_pin() {
                    shared.update_pin();
                }
                return shared.host.wake(worker);
            }
            Rung::Noted(follower) => {
                if shared.endpoint.uses_pin() {
                    shared.update_pin();
                    // The next write to the shadow is to be told too.
                    follower.into_iter().for_each(|worker| shared.host.wake(worker));
                }
                return;
            }
            Rung::NoQueue => Event::INVALID_DOORBELL_REGISTER,
            Rung::BadValue => Event::INVALID_DOORBELL_VALUE,
        };
        // Before the controller is enabled nobody could be told.
        let queue = u16::try_from(index / 2).unwrap_or(0xffff);
        if shared.registers().csts.rdy() == 1 && shared.events().bad_doorbell(event, queue) {
            shared.host.wake(0);
        }
    }
}
