//! Controller registers (Base 3.1.3): what the guest reads and writes below the doorbells.
//!
//! Register writes come from vCPU threads and only note what is wanted; worker 0 does it (see `control`) and shows
//! the result in CSTS.

use std::sync::Arc;

use nvme_spec::regs::{self, Aqa, Cap, Cc, Csts};

use crate::cmb::Window;
use crate::config::ControllerConfig;
use crate::pci::BUFFER_BAR;

/// CAP.TO and both halves of CRTO (CRWMT, CRIMT): how long an enable or disable may take, in units of 500 ms.
const TIMEOUT_500_MS: u64 = 60;
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
/// Bits of CMBMSC that are not reserved: CRE, CMSE and CBA.
pub(crate) const CMBMSC_BITS: u64 = !0xffc;
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
    /// CMBMSC.
    buffer_control: u64,
    window: Arc<Window>,
    pub wanted: Wanted,
}

impl Registers {
    pub fn new(config: &ControllerConfig, window: Arc<Window>) -> Self {
        let cap = Cap::default()
            .with_mqes(u64::from(config.mqes()))
            .with_cqr(u64::from(config.contiguous_queues))
            .with_ams(AMS_OFFERED)
            .with_to(TIMEOUT_500_MS)
            .with_nssrs(1)
            .with_css(COMMAND_SETS)
            .with_mpsmax(MPSMAX)
            .with_cmbs(u64::from(window.exists()))
            .with_crms(CRMS);
        Self {
            cap,
            cc: Cc::default(),
            csts: Csts::default(),
            aqa: Aqa::default(),
            asq: 0,
            acq: 0,
            interrupt_mask: 0,
            buffer_control: 0,
            window,
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
            regs::CMBLOC if self.buffer_control & regs::CMBMSC_CRE != 0 => self.window.location(BUFFER_BAR),
            regs::CMBSZ if self.buffer_control & regs::CMBMSC_CRE != 0 => self.window.size(),
            regs::CMBMSC => self.buffer_control as u32,
            0x54 => (self.buffer_control >> 32) as u32,
            regs::CMBSTS => self.window.status(self.buffer_control),
            regs::CRTO => (TIMEOUT_500_MS << 16 | TIMEOUT_500_MS) as u32,
            // No boot partition or persistent memory region; NSSR reads 0; nothing is known of how fast the buffer can be written.
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
        if data.len() == 8 {
            let low = self.write(offset, &data[..4]);
            return self.write(offset + 4, &data[4..]) | low;
        }
        let base = offset & !3;
        // What a narrow access does not cover keeps its value; in registers where writing 1 acts, it is 0.
        let keeps =
            matches!(base, regs::CC | regs::AQA | regs::ASQ | 0x2c | regs::ACQ | 0x34 | regs::CMBMSC | 0x54);
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
            regs::CMBMSC => {
                self.set_buffer_control(self.buffer_control & !0xffff_ffff | u64::from(value));
            }
            0x54 => self.set_buffer_control(self.buffer_control & 0xffff_ffff | u64::from(value) << 32),
            0x34 if disabled => self.acq = self.acq & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
        false
    }

    /// CMBMSC.
    pub fn buffer_control(&self) -> u64 {
        self.buffer_control
    }

    /// Changes CMBMSC, which a controller without a buffer does not have.
    pub fn set_buffer_control(&mut self, value: u64) {
        if self.window.exists() {
            self.buffer_control = value & CMBMSC_BITS;
            self.window.set(self.buffer_control);
        }
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
