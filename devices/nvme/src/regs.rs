//! Controller registers (Base 3.1.3): what the guest reads and writes below the doorbells.
//!
//! Register writes come from vCPU threads and only note what is wanted; worker 0 does it (see `control`) and shows
//! the result in CSTS.

use std::sync::Arc;

use nvme_spec::regs::{self, Aqa, Cap, Cc, Csts};

use crate::cmb;
use crate::config::ControllerConfig;
use crate::pci::{BUFFER_BAR, REGION_BAR};
use crate::pmr::Region;
use crate::window::{Spaces, Windows};

/// CAP.TO, both halves of CRTO (CRWMT, CRIMT) and PMRCAP.PMRTO: how long an enable or disable may take, in units of 500 ms.
pub(crate) const TIMEOUT_500_MS: u64 = 60;
/// CAP.MPSMAX: pages of 64 KiB.
pub(crate) const MPSMAX: u64 = 4;
/// CC.IOSQES and CC.IOCQES as log2 of bytes: the only sizes of entries that there are.
pub(crate) const IOSQES: u32 = 6;
pub(crate) const IOCQES: u32 = 4;
/// CAP.CSS: the NVM command set, also by CC.CSS = 110b.
pub(crate) const COMMAND_SETS: u64 = 1 | 1 << 6;

/// CAP.AMS: weighted round robin with urgent priority class.
const AMS_OFFERED: u64 = 1;
/// CAP.CRMS: ready with media and ready independent of media. The images are open before a guest runs, so that both are the same.
const CRMS: u64 = 0b11;
/// Bits of CC that are not reserved.
const CC_BITS: u32 = 0x01ff_fff1;

/// What the guest asked for by writing registers, until worker 0 has taken it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// CC.EN went from 1 to 0.
    pub reset: bool,
    /// NSSR was written.
    pub subsystem_reset: bool,
    /// CC.SHN became nonzero.
    pub shutdown: bool,
}

impl Wanted {
    pub fn any(self) -> bool {
        self.reset || self.subsystem_reset || self.shutdown
    }
}

/// The registers.
#[derive(Clone, Debug)]
pub(crate) struct Registers {
    pub cap: Cap,
    pub cc: Cc,
    pub csts: Csts,
    pub aqa: Aqa,
    pub asq: u64,
    pub acq: u64,
    /// INTMS and INTMC read as this.
    pub interrupt_mask: u32,
    /// CMBMSC, PMRMSCU and PMRMSCL.
    pub spaces: Spaces,
    windows: Arc<Windows>,
    region: Arc<Region>,
    pub wanted: Wanted,
}

impl Registers {
    pub fn new(config: &ControllerConfig, windows: Arc<Windows>, region: Arc<Region>) -> Self {
        let cap = Cap::default()
            .with_mqes(u64::from(config.mqes()))
            .with_cqr(u64::from(config.contiguous_queues))
            .with_ams(AMS_OFFERED)
            .with_to(TIMEOUT_500_MS)
            .with_nssrs(1)
            .with_css(COMMAND_SETS)
            .with_mpsmax(MPSMAX)
            .with_pmrs(u64::from(windows.region_bytes() > 0))
            .with_cmbs(u64::from(windows.buffer_bytes() > 0))
            .with_crms(CRMS);
        Self {
            cap,
            cc: Cc::default(),
            csts: Csts::default(),
            aqa: Aqa::default(),
            asq: 0,
            acq: 0,
            interrupt_mask: 0,
            spaces: Spaces::new(Arc::clone(&windows)),
            windows,
            region,
            wanted: Wanted::default(),
        }
    }

    /// A guest read of any length at any offset below the doorbells; what is reserved reads 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (position, byte) in (offset..).zip(data) {
            let dword = self.dword(position & !3);
            *byte = dword.to_le_bytes()[(position & 3) as usize];
        }
    }

    fn dword(&self, offset: u64) -> u32 {
        match offset {
            regs::CAP => self.cap.0 as u32,
            0x04 => (self.cap.0 >> 32) as u32,
            regs::VS => regs::VERSION_2_0,
            regs::INTMS | regs::INTMC => self.interrupt_mask,
            regs::CC => self.cc.0,
            regs::CSTS => self.csts.0,
            regs::AQA => self.aqa.0,
            regs::ASQ => self.asq as u32,
            0x2c => (self.asq >> 32) as u32,
            regs::ACQ => self.acq as u32,
            0x34 => (self.acq >> 32) as u32,
            // "If CMBMSC.CRE is 0, then the values of CMBLOC and CMBSZ are cleared to 0h."
            regs::CMBLOC if self.spaces.buffer() & regs::CMBMSC_CRE != 0 => cmb::location(BUFFER_BAR),
            regs::CMBSZ if self.spaces.buffer() & regs::CMBMSC_CRE != 0 => {
                cmb::size(self.windows.buffer_bytes())
            }
            regs::CMBMSC => self.spaces.buffer() as u32,
            0x54 => (self.spaces.buffer() >> 32) as u32,
            regs::CMBSTS => self.spaces.buffer_status(),
            regs::CRTO => (TIMEOUT_500_MS << 16 | TIMEOUT_500_MS) as u32,
            regs::PMRCAP => self.region.capabilities(REGION_BAR),
            regs::PMRCTL => self.region.control(),
            regs::PMRSTS if self.spaces.region_is_invalid() => self.region.status() | regs::PMRSTS_CBAI,
            regs::PMRSTS => self.region.status(),
            regs::PMRMSCL => self.spaces.region() as u32,
            regs::PMRMSCU => (self.spaces.region() >> 32) as u32,
            // No boot partition; NSSR reads 0; nothing is known of how fast the buffer and the region can be written.
            _ => 0,
        }
    }

    /// A guest write. Returns whether worker 0 has something to do.
    ///
    /// Aligned accesses of 1, 2, 4 and 8 bytes count; others change nothing (NVMe over PCIe Transport 3.1.1: the result of
    /// such accesses is undefined).
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        if !matches!(data.len(), 1 | 2 | 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return false;
        }
        if let (regs::CMBMSC, &[a, b, c, d, e, f, g, h]) = (offset, data) {
            // At once: commands in flight see the old address or the new one, and none of halves.
            self.spaces.set_buffer(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
            return false;
        }
        if data.len() == 8 {
            let low = self.write(offset, &data[..4]);
            return self.write(offset + 4, &data[4..]) | low;
        }
        let base = offset & !3;
        // What a narrow access does not cover keeps its value; in registers where writing 1 acts, it is 0.
        let keeps = matches!(
            base,
            regs::CC
                | regs::AQA
                | regs::ASQ
                | 0x2c
                | regs::ACQ
                | 0x34
                | regs::CMBMSC
                | 0x54
                | regs::PMRCTL
                | regs::PMRMSCL
                | regs::PMRMSCU
        );
        let mut bytes = if keeps { self.dword(base).to_le_bytes() } else { [0; 4] };
        let start = (offset & 3) as usize;
        bytes[start..start + data.len()].copy_from_slice(data);
        self.write_dword(base, u32::from_le_bytes(bytes))
    }

    fn write_dword(&mut self, offset: u64, value: u32) -> bool {
        let disabled = self.cc.en() == 0;
        match offset {
            regs::INTMS => self.interrupt_mask |= value,
            regs::INTMC => self.interrupt_mask &= !value,
            regs::CC => return self.write_cc(Cc(value & CC_BITS)),
            // NSSRO is cleared by writing 1; the rest is read-only.
            regs::CSTS => self.csts = self.csts.with_nssro(self.csts.nssro() & !Csts(value).nssro()),
            regs::NSSR if value == regs::NSSR_MAGIC => {
                self.wanted = Wanted { subsystem_reset: true, ..Wanted::default() };
                return true;
            }
            // "The host shall not modify this register when CC.EN is set to 1."
            regs::AQA if disabled => {
                let aqa = Aqa(value);
                self.aqa = Aqa::default().with_asqs(aqa.asqs()).with_acqs(aqa.acqs());
            }
            // Bits 11:0 are reserved.
            regs::ASQ if disabled => self.asq = self.asq & !0xffff_ffff | u64::from(value & !0xfff),
            0x2c if disabled => self.asq = self.asq & 0xffff_ffff | u64::from(value) << 32,
            regs::ACQ if disabled => self.acq = self.acq & !0xffff_ffff | u64::from(value & !0xfff),
            regs::CMBMSC => self.spaces.set_buffer(self.spaces.buffer() & !0xffff_ffff | u64::from(value)),
            0x54 => self.spaces.set_buffer(self.spaces.buffer() & 0xffff_ffff | u64::from(value) << 32),
            regs::PMRCTL => self.region.set_control(value),
            regs::PMRMSCL => self.spaces.set_region(self.spaces.region() & !0xffff_ffff | u64::from(value)),
            regs::PMRMSCU => {
                self.spaces.set_region(self.spaces.region() & 0xffff_ffff | u64::from(value) << 32)
            }
            0x34 if disabled => self.acq = self.acq & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
        false
    }

    fn write_cc(&mut self, value: Cc) -> bool {
        let before = self.cc;
        if before.en() == 1 && value.en() == 1 {
            // Only the entry sizes and the shutdown notification may change while enabled; and the sizes only to those that
            // exist, since there may be queues ("operations that change the value ... produce undefined results").
            let iosqes = if value.iosqes() == IOSQES { IOSQES } else { before.iosqes() };
            let iocqes = if value.iocqes() == IOCQES { IOCQES } else { before.iocqes() };
            self.cc = before.with_iosqes(iosqes).with_iocqes(iocqes).with_shn(value.shn());
        } else {
            self.cc = value;
        }
        if before.en() == 1 && value.en() == 0 {
            // A shutdown that was asked for before ends with the reset; one in the same write follows it.
            self.wanted.reset = true;
            self.wanted.shutdown = false;
        }
        if before.shn() == 0 && value.shn() != 0 {
            self.wanted.shutdown = true;
            self.csts = self.csts.with_shst(regs::SHST_IN_PROGRESS);
        }
        self.wanted.any() || before.en() != value.en()
    }
}
