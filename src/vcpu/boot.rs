//! Registers with which the boot processor enters a kernel. The other processors wait for its start-up message.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::kvm::Error;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;
/// Selectors of Linux' boot protocol: `__BOOT_CS`, `__BOOT_DS`, and a task segment after them.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Which convention a kernel is entered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BootProtocol {
    /// Xen's PVH: 32-bit protected mode without paging, EBX = start info.
    Pvh,
    /// Linux' 64-bit entry: long mode, identity-mapped, RSI = zero page.
    Linux64,
}

/// Everything that the boot processor starts with. Addresses are guest physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootRegisters {
    /// The convention.
    pub protocol: BootProtocol,
    /// First instruction.
    pub entry: u64,
    /// PVH: the `hvm_start_info`; Linux: the zero page.
    pub info: u64,
    /// Top of a stack; PVH needs none.
    pub stack: u64,
    /// Linux: the PML4 of identity-mapping page tables; unused by PVH.
    pub page_tables: u64,
    /// Linux: base of a GDT that has the boot segments at 0x10 (code) and 0x18 (data), loaded before the kernel loads
    /// its own; unused by PVH.
    pub gdt_base: u64,
    /// Its limit: bytes - 1.
    pub gdt_limit: u16,
}

impl BootRegisters {
    /// Puts the registers into a vCPU that was just created.
    pub(super) fn apply(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let sregs = vcpu.get_sregs().map_err(Error::call("read the system registers"))?;
        vcpu.set_sregs(&self.system(sregs))
            .map_err(Error::call(format!("set the system registers for {self:x?}")))?;
        vcpu.set_regs(&self.general()).map_err(Error::call(format!("set the registers for {self:x?}")))
    }

    fn general(&self) -> kvm_regs {
        let regs =
            kvm_regs { rip: self.entry, rsp: self.stack, rflags: RFLAGS_RESERVED, ..Default::default() };
        match self.protocol {
            BootProtocol::Pvh => kvm_regs { rbx: self.info, ..regs },
            BootProtocol::Linux64 => kvm_regs { rsi: self.info, ..regs },
        }
    }

    fn system(&self, reset: kvm_sregs) -> kvm_sregs {
        let long = self.protocol == BootProtocol::Linux64;
        let flat = kvm_segment {
            base: 0,
            limit: u32::MAX,
            present: 1,
            s: 1,
            g: 1,
            selector: DATA_SELECTOR,
            // Data, writable, accessed.
            type_: 0x3,
            db: 1,
            ..Default::default()
        };
        // Code, readable, accessed.
        let code = kvm_segment {
            selector: CODE_SELECTOR,
            type_: 0xb,
            db: u8::from(!long),
            l: u8::from(long),
            ..flat
        };
        // A busy 32-bit or 64-bit TSS of the smallest legal size.
        let task =
            kvm_segment { selector: TASK_SELECTOR, type_: 0xb, limit: 0x67, s: 0, g: 0, db: 0, ..flat };
        let mut sregs = kvm_sregs {
            cs: code,
            ds: flat,
            es: flat,
            fs: flat,
            gs: flat,
            ss: flat,
            tr: task,
            idt: kvm_dtable::default(),
            cr0: CR0_PE | CR0_ET,
            cr4: 0,
            ..reset
        };
        if long {
            sregs.gdt = kvm_dtable { base: self.gdt_base, limit: self.gdt_limit, ..Default::default() };
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = self.page_tables;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        } else {
            sregs.gdt = kvm_dtable::default();
        }
        sregs
    }
}
