//! All that a vCPU is, as plain data.

use kvm_bindings as kvm;
use kvm_bindings::{
    kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use vmstate::VmState;

/// Most bytes of extended state that any processor has (AMX, with room).
pub(super) const XSAVE_BYTES_MAX: u32 = 64 * 1024;
/// Most extended control registers that KVM has.
pub(super) const EXTENDED_CONTROLS_MAX: u32 = kvm::KVM_MAX_XCRS;
/// Bytes of a local APIC's register page that are registers.
pub(super) const LAPIC_BYTES: usize = 1024;

/// The saved state of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu", version = 1, oldest = 1)]
pub struct VcpuState {
    /// Number of the vCPU, its APIC identity.
    pub index: u32,
    /// General registers.
    pub registers: Registers,
    /// Segments, tables and control registers.
    pub system: SystemRegisters,
    /// Length of [`Self::xsave`].
    pub xsave_bytes: u32,
    /// FPU, SSE, AVX and so on: the architectural XSAVE area, as this host's processor lays it out.
    #[vmstate(len = "xsave_bytes", max = 65536)]
    pub xsave: Vec<u8>,
    /// Length of [`Self::extended_controls`].
    pub extended_control_count: u32,
    /// XCR0 and its like.
    #[vmstate(len = "extended_control_count", max = 16)]
    pub extended_controls: Vec<ExtendedControl>,
    /// Length of [`Self::msrs`].
    pub msr_count: u32,
    /// Model-specific registers, by ascending index.
    #[vmstate(len = "msr_count", max = 1024)]
    pub msrs: Vec<Msr>,
    /// The local APIC's registers, as the architecture lays out the page.
    pub lapic: [u8; LAPIC_BYTES],
    /// Exceptions and interrupts on their way.
    pub events: EventState,
    /// Debug registers.
    pub debug: DebugRegisters,
    /// Runnable, halted, or which message it waits for (KVM's numbers, 0 to 4).
    pub mp_state: u32,
    /// What its time stamp counter counts in a millisecond.
    pub tsc_khz: u32,
    /// Its time stamp counter minus the host's, modulo 2^64.
    pub tsc_offset: u64,
    /// Length of [`Self::cpuid`].
    pub cpuid_count: u32,
    /// What CPUID told the guest.
    #[vmstate(len = "cpuid_count", max = 256)]
    pub cpuid: Vec<CpuidLeaf>,
}

/// General registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu-registers", version = 1, oldest = 1)]
#[allow(missing_docs)]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// Segments, tables and control registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu-system", version = 1, oldest = 1)]
#[allow(missing_docs)]
pub struct SystemRegisters {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    /// At most one bit: the external interrupt that is being delivered.
    pub interrupt_bitmap: [u64; 4],
}

/// A segment register with its hidden part. One-bit fields are 0 or 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu-segment", version = 1, oldest = 1)]
#[allow(missing_docs)]
pub struct Segment {
    pub base: u64,
    pub limit: u32,
    pub selector: u16,
    pub kind: u8,
    pub present: u8,
    pub dpl: u8,
    pub db: u8,
    pub s: u8,
    pub l: u8,
    pub g: u8,
    pub avl: u8,
    pub unusable: u8,
}

/// GDTR or IDTR.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu-table", version = 1, oldest = 1)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Bytes - 1.
    pub limit: u16,
}

/// An extended control register.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu-xcr", version = 1, oldest = 1)]
pub struct ExtendedControl {
    /// Which.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// A model-specific register.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu-msr", version = 1, oldest = 1)]
pub struct Msr {
    /// Which.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// Exceptions and interrupts on their way, with KVM's meaning (`KVM_GET_VCPU_EVENTS`).
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu-events", version = 1, oldest = 1)]
#[allow(missing_docs)]
pub struct EventState {
    pub exception_injected: u8,
    pub exception_number: u8,
    pub exception_has_error_code: u8,
    pub exception_pending: u8,
    pub exception_error_code: u32,
    pub exception_has_payload: u8,
    pub exception_payload: u64,
    pub interrupt_injected: u8,
    pub interrupt_number: u8,
    pub interrupt_soft: u8,
    pub interrupt_shadow: u8,
    pub nmi_injected: u8,
    pub nmi_pending: u8,
    pub nmi_masked: u8,
    pub sipi_vector: u32,
    pub flags: u32,
    pub smm: u8,
    pub smi_pending: u8,
    pub smm_inside_nmi: u8,
    pub latched_init: u8,
    pub triple_fault_pending: u8,
}

/// Debug registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu-debug", version = 1, oldest = 1)]
#[allow(missing_docs)]
pub struct DebugRegisters {
    pub breakpoints: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
}

/// One leaf of CPUID.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu-cpuid", version = 1, oldest = 1)]
#[allow(missing_docs)]
pub struct CpuidLeaf {
    pub function: u32,
    pub index: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl CpuidLeaf {
    /// In one line: the leaf and its subleaf, then its registers, all in hexadecimal.
    #[must_use]
    pub fn to_text(&self) -> String {
        let Self { function, index, .. } = self;
        format!("{function:08x}.{index:x} {}", self.registers())
    }

    /// Its registers in words.
    #[must_use]
    pub fn registers(&self) -> String {
        let Self { eax, ebx, ecx, edx, .. } = self;
        format!("eax={eax:08x} ebx={ebx:08x} ecx={ecx:08x} edx={edx:08x}")
    }

    /// From [`Self::to_text`].
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        let number = |digits: &str| u32::from_str_radix(digits, 16).ok();
        let mut words = text.split(' ');
        let (function, index) = words.next()?.split_once('.')?;
        let mut register = |name| number(words.next()?.strip_prefix(name)?.strip_prefix('=')?);
        let leaf = Self {
            function: number(function)?,
            index: number(index)?,
            eax: register("eax")?,
            ebx: register("ebx")?,
            ecx: register("ecx")?,
            edx: register("edx")?,
        };
        words.next().is_none().then_some(leaf)
    }
}

/// Copies fields of the same names from one struct into another.
macro_rules! copied {
    ($from:expr => $into:ident { $($field:ident),* $(,)? } $(, $($rest:tt)*)?) => {
        $into { $($field: $from.$field,)* $($($rest)*)? }
    };
}

impl Registers {
    pub(super) fn from_kvm(r: &kvm_regs) -> Self {
        copied!(r => Self { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags })
    }

    pub(super) fn to_kvm(&self) -> kvm_regs {
        copied!(self => kvm_regs {
            rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags
        })
    }
}

impl Segment {
    fn from_kvm(s: &kvm_segment) -> Self {
        copied!(s => Self { base, limit, selector, present, dpl, db, s, l, g, avl, unusable }, kind: s.type_)
    }

    fn to_kvm(&self) -> kvm_segment {
        copied!(
            self => kvm_segment { base, limit, selector, present, dpl, db, s, l, g, avl, unusable },
            type_: self.kind, padding: 0
        )
    }

    /// The names and values of the fields that are one bit or few.
    fn narrow_fields(&self) -> [(&'static str, u8, u8); 9] {
        [
            ("kind", self.kind, 15),
            ("present", self.present, 1),
            ("dpl", self.dpl, 3),
            ("db", self.db, 1),
            ("s", self.s, 1),
            ("l", self.l, 1),
            ("g", self.g, 1),
            ("avl", self.avl, 1),
            ("unusable", self.unusable, 1),
        ]
    }
}

impl DescriptorTable {
    fn from_kvm(t: &kvm_dtable) -> Self {
        copied!(t => Self { base, limit })
    }

    fn to_kvm(&self) -> kvm_dtable {
        copied!(self => kvm_dtable { base, limit }, padding: [0; 3])
    }
}

impl SystemRegisters {
    pub(super) fn from_kvm(s: &kvm_sregs) -> Self {
        let segment = Segment::from_kvm;
        let table = DescriptorTable::from_kvm;
        copied!(
            s => Self { cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupt_bitmap },
            cs: segment(&s.cs), ds: segment(&s.ds), es: segment(&s.es), fs: segment(&s.fs), gs: segment(&s.gs),
            ss: segment(&s.ss), tr: segment(&s.tr), ldt: segment(&s.ldt), gdt: table(&s.gdt), idt: table(&s.idt)
        )
    }

    pub(super) fn to_kvm(&self) -> kvm_sregs {
        copied!(
            self => kvm_sregs { cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupt_bitmap },
            cs: self.cs.to_kvm(), ds: self.ds.to_kvm(), es: self.es.to_kvm(), fs: self.fs.to_kvm(),
            gs: self.gs.to_kvm(), ss: self.ss.to_kvm(), tr: self.tr.to_kvm(), ldt: self.ldt.to_kvm(),
            gdt: self.gdt.to_kvm(), idt: self.idt.to_kvm()
        )
    }

    fn check(&self) -> Result<(), String> {
        let segments = [
            ("cs", &self.cs),
            ("ds", &self.ds),
            ("es", &self.es),
            ("fs", &self.fs),
            ("gs", &self.gs),
            ("ss", &self.ss),
            ("tr", &self.tr),
            ("ldt", &self.ldt),
        ];
        for (name, segment) in segments {
            at_most(segment.narrow_fields(), &format!("system.{name}."))?;
        }
        let pending: u32 = self.interrupt_bitmap.iter().map(|word| word.count_ones()).sum();
        if pending > 1 {
            return Err(format!("system.interrupt_bitmap has {pending} interrupts; one can be in delivery"));
        }
        Ok(())
    }
}

impl EventState {
    pub(super) fn from_kvm(e: &kvm_vcpu_events) -> Self {
        Self {
            exception_injected: e.exception.injected,
            exception_number: e.exception.nr,
            exception_has_error_code: e.exception.has_error_code,
            exception_pending: e.exception.pending,
            exception_error_code: e.exception.error_code,
            exception_has_payload: e.exception_has_payload,
            exception_payload: e.exception_payload,
            interrupt_injected: e.interrupt.injected,
            interrupt_number: e.interrupt.nr,
            interrupt_soft: e.interrupt.soft,
            interrupt_shadow: e.interrupt.shadow,
            nmi_injected: e.nmi.injected,
            nmi_pending: e.nmi.pending,
            nmi_masked: e.nmi.masked,
            sipi_vector: e.sipi_vector,
            flags: e.flags,
            smm: e.smi.smm,
            smi_pending: e.smi.pending,
            smm_inside_nmi: e.smi.smm_inside_nmi,
            latched_init: e.smi.latched_init,
            triple_fault_pending: e.triple_fault.pending,
        }
    }

    pub(super) fn to_kvm(&self) -> kvm_vcpu_events {
        let mut e = kvm_vcpu_events::default();
        e.exception.injected = self.exception_injected;
        e.exception.nr = self.exception_number;
        e.exception.has_error_code = self.exception_has_error_code;
        e.exception.pending = self.exception_pending;
        e.exception.error_code = self.exception_error_code;
        e.exception_has_payload = self.exception_has_payload;
        e.exception_payload = self.exception_payload;
        e.interrupt.injected = self.interrupt_injected;
        e.interrupt.nr = self.interrupt_number;
        e.interrupt.soft = self.interrupt_soft;
        e.interrupt.shadow = self.interrupt_shadow;
        e.nmi.injected = self.nmi_injected;
        e.nmi.pending = self.nmi_pending;
        e.nmi.masked = self.nmi_masked;
        e.sipi_vector = self.sipi_vector;
        e.flags = self.flags;
        e.smi.smm = self.smm;
        e.smi.pending = self.smi_pending;
        e.smi.smm_inside_nmi = self.smm_inside_nmi;
        e.smi.latched_init = self.latched_init;
        e.triple_fault.pending = self.triple_fault_pending;
        e
    }

    fn check(&self) -> Result<(), String> {
        // KVM: "interrupt_shadow" is a pair of flags (MOV SS, STI); the rest are truth values.
        let fields = [
            ("exception_injected", self.exception_injected, 1),
            ("exception_number", self.exception_number, 31),
            ("exception_has_error_code", self.exception_has_error_code, 1),
            ("exception_pending", self.exception_pending, 1),
            ("exception_has_payload", self.exception_has_payload, 1),
            ("interrupt_injected", self.interrupt_injected, 1),
            ("interrupt_soft", self.interrupt_soft, 1),
            ("interrupt_shadow", self.interrupt_shadow, 3),
            ("nmi_injected", self.nmi_injected, 1),
            ("nmi_pending", self.nmi_pending, 1),
            ("nmi_masked", self.nmi_masked, 1),
            ("smm", self.smm, 0),
            ("smi_pending", self.smi_pending, 0),
            ("smm_inside_nmi", self.smm_inside_nmi, 0),
            ("latched_init", self.latched_init, 1),
            ("triple_fault_pending", self.triple_fault_pending, 1),
        ];
        at_most(fields, "events.")?;
        let known = kvm::KVM_VCPUEVENT_VALID_NMI_PENDING
            | kvm::KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | kvm::KVM_VCPUEVENT_VALID_SHADOW
            | kvm::KVM_VCPUEVENT_VALID_SMM
            | kvm::KVM_VCPUEVENT_VALID_PAYLOAD
            | kvm::KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        if self.flags & !known != 0 {
            return Err(format!("events.flags is {:#x}, outside {known:#x}", self.flags));
        }
        if self.sipi_vector > 0xff {
            return Err(format!("events.sipi_vector is {:#x}, above 0xff", self.sipi_vector));
        }
        Ok(())
    }
}

impl DebugRegisters {
    pub(super) fn from_kvm(d: &kvm_debugregs) -> Self {
        copied!(d => Self { dr6, dr7 }, breakpoints: d.db)
    }

    pub(super) fn to_kvm(&self) -> kvm_debugregs {
        copied!(self => kvm_debugregs { dr6, dr7 }, db: self.breakpoints, ..Default::default())
    }
}

/// From KVM's fixed array.
pub(super) fn extended_controls(xcrs: &kvm_xcrs) -> Vec<ExtendedControl> {
    let used = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize);
    used.map(|xcr| ExtendedControl { index: xcr.xcr, value: xcr.value }).collect()
}

/// To KVM's fixed array; more than it holds are dropped, which [`VcpuState::check`] excludes.
pub(super) fn kvm_extended_controls(controls: &[ExtendedControl]) -> kvm_xcrs {
    let mut xcrs =
        kvm_xcrs { nr_xcrs: (controls.len() as u32).min(EXTENDED_CONTROLS_MAX), ..Default::default() };
    for (into, control) in xcrs.xcrs.iter_mut().zip(controls) {
        *into = kvm_xcr { xcr: control.index, reserved: 0, value: control.value };
    }
    xcrs
}

pub(super) fn lapic_bytes(lapic: &kvm_lapic_state) -> [u8; LAPIC_BYTES] {
    lapic.regs.map(|byte| byte as u8)
}

pub(super) fn kvm_lapic(bytes: &[u8; LAPIC_BYTES]) -> kvm_lapic_state {
    kvm_lapic_state { regs: bytes.map(|byte| byte as std::ffi::c_char) }
}

pub(super) fn kvm_mp(state: u32) -> kvm_mp_state {
    kvm_mp_state { mp_state: state }
}

impl VcpuState {
    /// Checks what does not depend on this host: that each field is one that a processor can have.
    pub(super) fn check(&self) -> Result<(), String> {
        self.system.check()?;
        self.events.check()?;
        if self.mp_state > kvm::KVM_MP_STATE_SIPI_RECEIVED {
            return Err(format!("mp_state is {}, above {}", self.mp_state, kvm::KVM_MP_STATE_SIPI_RECEIVED));
        }
        if self.xsave.len() > XSAVE_BYTES_MAX as usize {
            return Err(format!("xsave has {} bytes, above {XSAVE_BYTES_MAX}", self.xsave.len()));
        }
        if self.extended_controls.len() > EXTENDED_CONTROLS_MAX as usize {
            let count = self.extended_controls.len();
            return Err(format!("extended_controls has {count} registers, above {EXTENDED_CONTROLS_MAX}"));
        }
        Ok(())
    }
}

fn at_most<const N: usize>(fields: [(&str, u8, u8); N], path: &str) -> Result<(), String> {
    match fields.iter().find(|(_, value, limit)| value > limit) {
        Some((name, value, limit)) => Err(format!("{path}{name} is {value}, above {limit}")),
        None => Ok(()),
    }
}
