//! Model-specific registers: which ones are state, reading and writing them.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::state::Msr;
use crate::kvm::{Error, Host};

/// The time stamp counter. Not in the list: its offset is set instead, so that all vCPUs stay in step.
const TSC: u32 = 0x10;
/// Arms the local APIC's timer at a TSC value: set last, after the TSC and the APIC.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;
/// `IA32_ARCH_CAPABILITIES`: what the processor says of itself that CPUID does not.
pub(super) const ARCH_CAPABILITIES: u32 = 0x10a;
/// `MTRRcap`: tells how many variable MTRRs there are; read-only.
const MTRR_CAP: u32 = 0xfe;
const MTRR_VARIABLE_FIRST: u32 = 0x200;
const MTRR_VARIABLE_MAX: u64 = 8;
/// Fixed ranges, and the default type, which also switches MTRRs on.
const MTRR_FIXED: [u32; 12] =
    [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x2ff];

/// Registers that a kernel may refuse to set although it lists them, with the reason why that is no loss. A refusal of
/// any other is an error.
const MAY_BE_REFUSED: [(u32, &str); 4] = [
    (ARCH_CAPABILITIES, "IA32_ARCH_CAPABILITIES describes the processor; what a guest has read is compared"),
    (0x345, "IA32_PERF_CAPABILITIES describes the processor; CPUID is compared"),
    (0xce, "MSR_PLATFORM_INFO describes the processor"),
    (0x140, "MSR_MISC_FEATURES_ENABLES may only repeat what the platform offers"),
];

/// The registers that are state on this host: KVM's list and the MTRRs, which it leaves out.
pub(super) fn list(host: &Host, vcpu: &VcpuFd) -> Result<Vec<u32>, Error> {
    let kvm = host.fd().get_msr_index_list().map_err(Error::call("ask which MSRs are state"))?;
    let mut indices: Vec<u32> = kvm.as_slice().iter().copied().filter(|&index| index != TSC).collect();
    if let [Msr { value: capabilities, .. }] = read(vcpu, &[MTRR_CAP])?.as_slice() {
        let pairs = (capabilities & 0xff).min(MTRR_VARIABLE_MAX) as u32;
        indices.extend(MTRR_VARIABLE_FIRST..MTRR_VARIABLE_FIRST + 2 * pairs);
        indices.extend(MTRR_FIXED);
    }
    indices.sort_unstable();
    indices.dedup();
    Ok(indices)
}

/// What a guest on this host may read in `IA32_ARCH_CAPABILITIES`; 0 where KVM knows no such register.
pub(super) fn host_capabilities(host: &Host) -> Result<u64, Error> {
    let mut msrs = as_kvm([Msr { index: ARCH_CAPABILITIES, value: 0 }].into_iter());
    // KVM tells how many it could read, and fails where that is none.
    Ok(match host.fd().get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice().first().map_or(0, |msr| msr.data),
        _ => 0,
    })
}

/// Reads those of `indices` that this vCPU has (its CPUID decides), in order.
pub(super) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let mut msrs = as_kvm(batch.iter().map(|&index| Msr { index, value: 0 }));
        let count = vcpu.get_msrs(&mut msrs).map_err(Error::call(format!("read {} MSRs", batch.len())))?;
        let count = count.min(batch.len());
        found.extend(msrs.as_slice()[..count].iter().map(|msr| Msr { index: msr.index, value: msr.data }));
        // KVM stops at the first that it cannot read.
        let skipped = usize::from(count < batch.len());
        rest = &rest[count + skipped..];
    }
    Ok(found)
}

/// Writes all of `wanted`, in order.
pub(super) fn write(vcpu: &VcpuFd, index: u32, wanted: &[Msr]) -> Result<(), Error> {
    let mut rest = wanted;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let msrs = as_kvm(batch.iter().cloned());
        let count = vcpu.set_msrs(&msrs).map_err(Error::call(format!("set {} MSRs", batch.len())))?;
        rest = &rest[count.min(rest.len())..];
        if count < batch.len()
            && let Some((refused, after)) = rest.split_first()
        {
            let Msr { index: msr, value } = refused;
            let Some((_, reason)) = MAY_BE_REFUSED.iter().find(|(may, _)| may == msr) else {
                let why = format!("KVM on this host refuses {value:#x} in MSR {msr:#x}");
                return Err(Error::VcpuState { vcpu: index, why });
            };
            log::warn!("vCPU {index}: MSR {msr:#x} stays as it is, not {value:#x}: {reason}");
            rest = after;
        }
    }
    Ok(())
}

fn as_kvm(msrs: impl Iterator<Item = Msr>) -> Msrs {
    let entries: Vec<_> =
        msrs.map(|Msr { index, value }| kvm_msr_entry { index, data: value, ..Default::default() }).collect();
    Msrs::from_entries(&entries).expect("a batch is at most KVM_MAX_MSR_ENTRIES long")
}
