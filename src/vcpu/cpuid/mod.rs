//! What the guest's CPUID instruction says: a model of processor, each vCPU's place, and the masks that `kvm_pvm` needs.
//!
//! A table is plain data ([`CpuidLeaf`]) until KVM is given it, and what KVM then says is read back ([`set`]): KVM without VMX or
//! SVM puts features of the host's processor back that a table hides. What a guest has is what was read back; that goes to a
//! destination, which gives it to its own KVM. See [`baseline`] for models, [`comparison`] for what a destination must have.

mod baseline;
mod comparison;
mod feature;
#[cfg(test)]
mod tests;

use std::arch::x86_64::{__cpuid_count, CpuidResult};

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, VcpuFd};

use super::state::CpuidLeaf;
use crate::kvm::{Error, Host};

pub use baseline::{CpuModel, table};
pub use comparison::reasons;
pub use feature::names;
pub(super) use feature::{add, lacking, lacking_capabilities, listed, only_features, only_lacking};

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const CX16: u32 = 1 << 13;
const HTT: u32 = 1 << 28;
const RDTSCP: u32 = 1 << 27;
const XSAVEERPTR: u32 = 1 << 2;
/// Paravirtual features that work where hypercalls hang: clock sources (old and new), delay-free I/O, asynchronous
/// end-of-interrupt, stable clock.
const PARAVIRTUAL_KVM_FEATURES: u32 = 0x0100_006b;
const ARCH_CAPABILITIES: u32 = 1 << 29;
const LEVEL_SMT: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;
/// Leaves that have subleaves, which KVM wants to be told (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
const INDEXED: [u32; 15] =
    [0x4, 0x7, 0xb, 0xd, 0xf, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1d, 0x1e, 0x1f, 0x24, 0x8000_001d];

/// Leaves in which a processor tells features, with as many subleaves as have any.
const FEATURE_LEAVES: [(u32, u32); 8] = [
    (0x1, 1),
    (0x6, 1),
    (0x7, 3),
    (0xd, 2),
    (0x8000_0001, 1),
    (0x8000_0007, 1),
    (0x8000_0008, 1),
    (0x8000_0021, 1),
];

/// The features that this processor tells programs, which are those of a guest too where KVM runs them as if they were the host's
/// (`kvm_pvm`): no table hides them.
pub(super) fn of_this_processor() -> Vec<CpuidLeaf> {
    let read = |function, index| {
        let CpuidResult { eax, ebx, ecx, edx } = __cpuid_count(function, index);
        CpuidLeaf { function, index, eax, ebx, ecx, edx }
    };
    // Beyond the last leaf of a range there is none, or another one.
    let exists = |function: &u32| *function <= read(function & 0x8000_0000, 0).eax;
    let leaves = FEATURE_LEAVES.iter().filter(|(function, _)| exists(function));
    let leaves = leaves.flat_map(|&(function, count)| (0..count).map(move |index| (function, index)));
    only_features(&leaves.map(|(function, index)| read(function, index)).collect::<Vec<_>>())
}

/// What this host's KVM supports, in its own words; the hypervisor bit and the timer, which it leaves to the VMM, included.
pub(super) fn supported(host: &Host) -> Result<Vec<CpuidLeaf>, Error> {
    let supported = host
        .fd()
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::call("ask which CPUID features are supported"))?;
    let mut leaves = leaves(&supported);
    let tsc_deadline = host.fd().check_extension(Cap::TscDeadlineTimer);
    if let Some(leaf) = leaves.iter_mut().find(|leaf| leaf.function == 0x1) {
        leaf.ecx |= HYPERVISOR;
        set_bits(&mut leaf.ecx, TSC_DEADLINE, tsc_deadline);
    }
    Ok(leaves)
}

/// What a host can be for a guest: what KVM supports, and what it puts back although nobody asked.
pub(super) fn offered(supported: &[CpuidLeaf], read_back: &[CpuidLeaf], paravirtual: bool) -> Vec<CpuidLeaf> {
    let mut offered = supported.to_vec();
    feature::add(&mut offered, read_back);
    if let Some(leaf) = offered.iter_mut().find(|leaf| leaf.function == 0x1) {
        leaf.edx |= HTT;
    }
    if paravirtual {
        offered.iter_mut().for_each(hide_from_kernels);
    }
    offered
}

/// What CPUID is to say on each of `count` vCPUs, processors of one package with one thread each.
///
/// # Errors
/// [`Error::CpuModel`]: the host lacks something of `model`.
pub(super) fn of_all(
    model: CpuModel,
    supported: &[CpuidLeaf],
    read_back: &[CpuidLeaf],
    count: u32,
    paravirtual: bool,
) -> Result<Vec<Vec<CpuidLeaf>>, Error> {
    let mut host = supported.to_vec();
    if model != CpuModel::Host {
        feature::add(&mut host, read_back);
    }
    let table = table(model, &host)
        .map_err(|lacking| Error::CpuModel { model: model.to_string(), lacking: listed(&lacking) })?;
    Ok((0..count).map(|index| of_one(&table, index, count, paravirtual)).collect())
}

fn of_one(table: &[CpuidLeaf], index: u32, count: u32, paravirtual: bool) -> Vec<CpuidLeaf> {
    // Leaf 0x1f would say again, for this host's packages, what 0xb says.
    let mut leaves: Vec<_> =
        table.iter().filter(|leaf| !matches!(leaf.function, 0xb | 0x1f)).cloned().collect();
    for leaf in &mut leaves {
        match leaf.function {
            0x1 => {
                leaf.ebx = leaf.ebx & 0xffff | index << 24 | count.min(255) << 16;
                set_bits(&mut leaf.edx, HTT, count > 1);
            }
            // Caches, on Intel and AMD: the last level is everybody's, the others each vCPU's own.
            0x4 | 0x8000_001d if leaf.eax & 0x1f != 0 => {
                let sharing = if leaf.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | (sharing & 0xfff) << 14;
                if leaf.function == 0x4 {
                    leaf.eax |= ((count - 1) & 0x3f) << 26;
                }
            }
            0x8000_0008 => {
                leaf.ecx = leaf.ecx & !0xf0ff | apic_id_bits(count) << 12 | (count - 1) & 0xff;
                if paravirtual {
                    leaf.ebx |= XSAVEERPTR;
                }
            }
            // AMD: APIC identity; core identity, one thread a core; node 0, one node.
            0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (index, index & 0xff, 0),
            _ => {}
        }
        if paravirtual {
            hide_from_kernels(leaf);
        }
    }
    if table.iter().any(|leaf| leaf.function == 0 && leaf.eax >= 0xb) {
        let levels = [(0, 1, LEVEL_SMT), (apic_id_bits(count), count, LEVEL_CORE), (0, 0, 0)];
        leaves.extend((0..).zip(levels).map(|(level, (shift, processors, kind))| CpuidLeaf {
            function: 0xb,
            index: level,
            eax: shift,
            ebx: processors,
            ecx: level | kind,
            edx: index,
        }));
    }
    leaves.sort_by_key(|leaf| (leaf.function, leaf.index));
    leaves
}

/// Hides what kernels would use although `kvm_pvm` interprets it wrongly or not at all.
fn hide_from_kernels(leaf: &mut CpuidLeaf) {
    match leaf.function {
        0x1 => leaf.ecx &= !CX16,
        0x4000_0001 => leaf.eax &= PARAVIRTUAL_KVM_FEATURES,
        0x8000_0001 => leaf.edx &= !RDTSCP,
        _ => {}
    }
}

/// Whether a guest may read `IA32_ARCH_CAPABILITIES`.
pub(super) fn tells_arch_capabilities(table: &[CpuidLeaf]) -> bool {
    feature::find(table, 0x7, 0).is_some_and(|leaf| leaf.edx & ARCH_CAPABILITIES != 0)
}

/// How many bits of an APIC identity tell `count` processors apart.
fn apic_id_bits(count: u32) -> u32 {
    count.next_power_of_two().ilog2()
}

fn set_bits(register: &mut u32, bits: u32, on: bool) {
    if on {
        *register |= bits;
    } else {
        *register &= !bits;
    }
}

/// Has CPUID say `wanted` on a vCPU that has not run, and reads what it says then.
pub(super) fn set(vcpu: &VcpuFd, index: u32, wanted: &[CpuidLeaf]) -> Result<Vec<CpuidLeaf>, Error> {
    let entries: Vec<_> = wanted.iter().map(entry).collect();
    let cpuid = CpuId::from_entries(&entries).map_err(|e| Error::VcpuState {
        vcpu: index,
        why: format!("{} CPUID leaves are too many: {e:?}", entries.len()),
    })?;
    vcpu.set_cpuid2(&cpuid).map_err(Error::call(format!("set the CPUID of vCPU {index}")))?;
    let real = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::call(format!("read the CPUID of vCPU {index} back")))?;
    let mut real = leaves(&real);
    real.sort_by_key(|leaf| (leaf.function, leaf.index));
    real.iter_mut().for_each(|leaf| forget_the_moment(leaf, wanted));
    Ok(real)
}

/// Whether a table that came from elsewhere can be one of vCPU `index`.
pub(super) fn check(table: &[CpuidLeaf], index: u32) -> Result<(), String> {
    let mut numbers: Vec<_> = table.iter().map(|leaf| (leaf.function, leaf.index)).collect();
    numbers.sort_unstable();
    if let Some(twice) = numbers.windows(2).find(|pair| pair.first() == pair.last()) {
        return Err(format!("its CPUID has a leaf twice: {:#x?}", twice.first().unwrap_or(&(0, 0))));
    }
    let Some(first) = feature::find(table, 0x1, 0) else { return Err("its CPUID has no leaf 1".to_owned()) };
    match first.ebx >> 24 {
        identity if identity == index & 0xff => Ok(()),
        other => Err(format!("its CPUID says that it is processor {other}")),
    }
}

/// Takes out what KVM computes from the guest's control registers at the moment: two answers to what the operating system has
/// enabled, and the size of the extended state that is enabled.
fn forget_the_moment(leaf: &mut CpuidLeaf, wanted: &[CpuidLeaf]) {
    match (leaf.function, leaf.index) {
        (0x1, _) => leaf.ecx &= !feature::OSXSAVE,
        (0x7, 0) => leaf.ecx &= !feature::OSPKE,
        (0xd, 0 | 1) => {
            if let Some(wanted) = feature::find(wanted, 0xd, leaf.index) {
                leaf.ebx = wanted.ebx;
            }
        }
        _ => {}
    }
}

fn entry(leaf: &CpuidLeaf) -> kvm_cpuid_entry2 {
    let CpuidLeaf { function, index, eax, ebx, ecx, edx } = *leaf;
    let flags = if INDEXED.contains(&function) || index > 0 { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
}

fn leaves(cpuid: &CpuId) -> Vec<CpuidLeaf> {
    let plain = |leaf: &kvm_cpuid_entry2| CpuidLeaf {
        function: leaf.function,
        index: leaf.index,
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
    };
    cpuid.as_slice().iter().map(plain).collect()
}
