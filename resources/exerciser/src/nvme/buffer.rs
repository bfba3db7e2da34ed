//! Memory of the controller: its memory buffer (Base 8.5) and its persistent memory region (Base 8.14), at the addresses of their BARs.

use nvme_spec::regs::{self, CMBMSC_CMSE, CMBMSC_CRE, PMRCTL_EN, PMRMSC_CMSE};

use super::controller::{ADMIN_TIMEOUT_MILLISECONDS, Controller};
use crate::clock::Deadline;
use crate::error::Error;
use crate::machine::Machine;
use crate::memory::DeviceMemory;
use crate::pci::Window;

/// CMBSZ: queues, lists and data of both directions.
const CMBSZ_ALL: u32 = 0b1_1111;

impl Controller {
    /// Lets commands name the controller memory buffer.
    ///
    /// # Errors
    ///
    /// There is none, it is out of reach, or it is not for everything.
    pub(super) fn open_buffer(
        &self,
        machine: &mut dyn Machine,
        window: &mut Window,
    ) -> Result<DeviceMemory, Error> {
        if self.identity.capabilities.cmbs() == 0 {
            return Err(self.wrong("has no controller memory buffer", self.identity.capabilities.0));
        }
        let register = |offset: u64| self.registers.read32(offset as usize);
        self.registers.write64(regs::CMBMSC as usize, CMBMSC_CRE);
        let (location, size) = (register(regs::CMBLOC), register(regs::CMBSZ));
        if size & CMBSZ_ALL != CMBSZ_ALL {
            return Err(self.wrong("the memory buffer is not for everything", size.into()));
        }
        let unit_shift = 12 + 4 * (size >> 8 & 0xf);
        let (bar, _) = self
            .function
            .place_bar(machine, (location & 7) as u8, window)
            .ok_or(self.wrong("the memory buffer cannot be placed", location.into()))?;
        let base = bar + (u64::from(location >> 12) << unit_shift);
        self.registers.write64(regs::CMBMSC as usize, base | CMBMSC_CRE | CMBMSC_CMSE);
        let length_bytes = (size as usize >> 12) << unit_shift;
        self.memory_at(machine, base, length_bytes, register(regs::CMBSTS))
    }

    /// Enables the persistent memory region, and lets commands name it.
    ///
    /// # Errors
    ///
    /// There is none, it is out of reach, not for data of both directions, or not ready in time.
    pub(super) fn open_region(
        &self,
        machine: &mut dyn Machine,
        window: &mut Window,
    ) -> Result<DeviceMemory, Error> {
        if self.identity.capabilities.pmrs() == 0 {
            return Err(self.wrong("has no persistent memory region", self.identity.capabilities.0));
        }
        let capabilities = self.registers.read32(regs::PMRCAP as usize);
        let wanted =
            regs::PMRCAP_CMSS | regs::PMRCAP_RDS | regs::PMRCAP_WDS | regs::PMRCAP_PMRWBM_STATUS_READ;
        if capabilities & wanted != wanted {
            return Err(self.wrong("the memory region is not for everything", capabilities.into()));
        }
        let bar = (capabilities >> regs::PMRCAP_BIR_SHIFT & 7) as u8;
        let (base, size_bytes) = self
            .function
            .place_bar(machine, bar, window)
            .ok_or(self.wrong("the memory region cannot be placed", bar.into()))?;
        self.registers.write32(regs::PMRMSCU as usize, (base >> 32) as u32);
        self.registers.write32(regs::PMRMSCL as usize, (base | PMRMSC_CMSE) as u32);
        self.registers.write32(regs::PMRCTL as usize, PMRCTL_EN);
        let deadline = Deadline::new(machine, self.tsc_khz, ADMIN_TIMEOUT_MILLISECONDS);
        while self.registers.read32(regs::PMRSTS as usize) & regs::PMRSTS_NRDY != 0 {
            if deadline.is_over(machine) {
                return Err(self.wrong("the memory region is not ready in time", 0));
            }
        }
        self.memory_at(machine, base, size_bytes as usize, self.registers.read32(regs::PMRSTS as usize))
    }

    fn memory_at(
        &self,
        machine: &mut dyn Machine,
        base: u64,
        length_bytes: usize,
        status: u32,
    ) -> Result<DeviceMemory, Error> {
        if status != 0 {
            return Err(self.wrong("memory of the controller is not well", status.into()));
        }
        let registers = machine.registers(base, length_bytes);
        registers.map(DeviceMemory::new).ok_or(self.wrong("memory of the controller is out of reach", base))
    }

    /// Makes what was written to the persistent memory region durable.
    ///
    /// # Errors
    ///
    /// The controller says that something was lost.
    pub fn make_durable(&self) -> Result<(), Error> {
        match self.registers.read32(regs::PMRSTS as usize) {
            0 => Ok(()),
            status => Err(self.wrong("the memory region is not well", status.into())),
        }
    }
}
