//! What the guest's CPUID instruction says: what KVM supports, each vCPU's place, and the masks that `kvm_pvm` needs.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Cap;

use super::state::CpuidLeaf;
use crate::kvm::{Error, Host};

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const CX16: u32 = 1 << 13;
const HTT: u32 = 1 << 28;
const RDTSCP: u32 = 1 << 27;
const XSAVEERPTR: u32 = 1 << 2;
/// Paravirtual features that work where hypercalls hang: clock sources (old and new), delay-free I/O, asynchronous
/// end-of-interrupt, stable clock.
const PARAVIRTUAL_KVM_FEATURES: u32 = 0x0100_006b;
const LEVEL_SMT: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// CPUID of every vCPU: `count` processors of one package, one thread each.
pub(super) fn of_all(host: &Host, count: u32) -> Result<Vec<CpuId>, Error> {
    let supported = host
        .fd()
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::call("ask which CPUID features are supported"))?;
    let tsc_deadline = host.fd().check_extension(Cap::TscDeadlineTimer);
    let of_one = |index| {
        let leaves = of_one(supported.as_slice(), index, count, tsc_deadline, host.is_paravirtual());
        CpuId::from_entries(&leaves).map_err(|e| Error::VcpuState {
            vcpu: index,
            why: format!("{} CPUID leaves are too many: {e:?}", leaves.len()),
        })
    };
    (0..count).map(of_one).collect()
}

fn of_one(
    supported: &[kvm_cpuid_entry2],
    index: u32,
    count: u32,
    tsc_deadline: bool,
    paravirtual: bool,
) -> Vec<kvm_cpuid_entry2> {
    // Leaf 0x1f would say again, for this host's packages, what 0xb says.
    let mut leaves: Vec<_> =
        supported.iter().filter(|leaf| !matches!(leaf.function, 0xb | 0x1f)).copied().collect();
    for leaf in &mut leaves {
        match leaf.function {
            0x1 => {
                leaf.ebx = leaf.ebx & 0xffff | index << 24 | count.min(255) << 16;
                leaf.ecx |= HYPERVISOR;
                set(&mut leaf.ecx, TSC_DEADLINE, tsc_deadline);
                set(&mut leaf.edx, HTT, count > 1);
                if paravirtual {
                    leaf.ecx &= !CX16;
                }
            }
            // Caches, on Intel and AMD: the last level is everybody's, the others each vCPU's own.
            0x4 | 0x8000_001d if leaf.eax & 0x1f != 0 => {
                let sharing = if leaf.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | (sharing & 0xfff) << 14;
                if leaf.function == 0x4 {
                    leaf.eax |= ((count - 1) & 0x3f) << 26;
                }
            }
            0x4000_0001 if paravirtual => leaf.eax &= PARAVIRTUAL_KVM_FEATURES,
            0x8000_0001 if paravirtual => leaf.edx &= !RDTSCP,
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
    }
    if supported.iter().any(|leaf| leaf.function == 0 && leaf.eax >= 0xb) {
        let levels = [(0, 1, LEVEL_SMT), (apic_id_bits(count), count, LEVEL_CORE), (0, 0, 0)];
        leaves.extend((0..).zip(levels).map(|(level, (shift, processors, kind))| kvm_cpuid_entry2 {
            function: 0xb,
            index: level,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: level | kind,
            edx: index,
            ..Default::default()
        }));
    }
    leaves.sort_by_key(|leaf| (leaf.function, leaf.index));
    leaves
}

/// How many bits of an APIC identity tell `count` processors apart.
fn apic_id_bits(count: u32) -> u32 {
    count.next_power_of_two().ilog2()
}

fn set(register: &mut u32, bits: u32, on: bool) {
    if on {
        *register |= bits;
    } else {
        *register &= !bits;
    }
}

/// As plain data, for the state.
pub(super) fn leaves(cpuid: &CpuId) -> Vec<CpuidLeaf> {
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

/// Every difference between the CPUID that a guest has seen and the one that it would see here, one sentence each.
pub(super) fn differences(seen: &[CpuidLeaf], here: &[CpuidLeaf]) -> Vec<String> {
    let find = |leaves: &[CpuidLeaf], leaf: &CpuidLeaf| {
        leaves.iter().find(|other| (other.function, other.index) == (leaf.function, leaf.index)).cloned()
    };
    let name = |leaf: &CpuidLeaf| format!("CPUID leaf {:#x}.{:#x}", leaf.function, leaf.index);
    let mut found = Vec::new();
    for leaf in seen {
        let Some(ours) = find(here, leaf) else {
            found.push(format!("{} does not exist here", name(leaf)));
            continue;
        };
        let registers = [
            ("EAX", leaf.eax, ours.eax),
            ("EBX", leaf.ebx, ours.ebx),
            ("ECX", leaf.ecx, ours.ecx),
            ("EDX", leaf.edx, ours.edx),
        ];
        for (register, theirs, ours) in registers {
            if theirs != ours {
                found.push(format!("{} {register} was {theirs:#010x} and is {ours:#010x} here", name(leaf)));
            }
        }
    }
    let extra = here.iter().filter(|leaf| find(seen, leaf).is_none());
    found.extend(extra.map(|leaf| format!("{} exists only here", name(leaf))));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn supported() -> Vec<kvm_cpuid_entry2> {
        vec![
            leaf(0, 0, [0x1f, 0, 0, 0]),
            leaf(1, 0, [0x806f8, 0x0310_0800, CX16, 0x1783_fbff]),
            leaf(4, 0, [0xfc00_4121, 1, 2, 3]),
            leaf(4, 3, [0xfc03_c163, 1, 2, 3]),
            leaf(4, 4, [0, 0, 0, 0]),
            leaf(0xb, 0, [1, 2, 3, 77]),
            leaf(0x1f, 0, [1, 2, 3, 77]),
            leaf(0x4000_0001, 0, [u32::MAX, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, 0x121, RDTSCP | 1]),
            leaf(0x8000_0008, 0, [0x302e, 0, 0x70ff, 0]),
            leaf(0x8000_001e, 0, [9, 9, 9, 9]),
        ]
    }

    fn get(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).unwrap()
    }

    #[test]
    fn each_vcpu_has_its_place() {
        let leaves = of_one(&supported(), 2, 3, true, false);
        let one = get(&leaves, 1, 0);
        assert_eq!((one.ebx, one.ecx), (0x0203_0800, CX16 | HYPERVISOR | TSC_DEADLINE));
        assert_ne!(one.edx & HTT, 0);
        assert_eq!(get(&leaves, 4, 0).eax, 0x0800_0121, "own first-level cache, 3 cores");
        assert_eq!(get(&leaves, 4, 3).eax, 0x0800_8163, "last level shared by 3");
        assert_eq!(get(&leaves, 4, 4).eax, 0, "the end of the list stays");
        let smt = get(&leaves, 0xb, 0);
        assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (0, 1, 0x100, 2));
        let core = get(&leaves, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        assert_eq!(get(&leaves, 0x8000_0008, 0).ecx, 0x2002);
        assert_eq!((get(&leaves, 0x8000_001e, 0).eax, get(&leaves, 0x8000_001e, 0).edx), (2, 9));
        assert!(leaves.iter().all(|leaf| leaf.function != 0x1f));
        let single = of_one(&supported(), 0, 1, false, false);
        assert_eq!(get(&single, 1, 0).edx & HTT, 0);
        assert_eq!(get(&single, 0xb, 1).eax, 0);
    }

    #[test]
    fn paravirtual_hosts_get_their_masks_and_others_do_not() {
        let masked = of_one(&supported(), 0, 1, true, true);
        assert_eq!(get(&masked, 1, 0).ecx & CX16, 0);
        assert_eq!(get(&masked, 0x4000_0001, 0).eax, 0x0100_006b);
        assert_eq!(get(&masked, 0x8000_0001, 0).edx, 1);
        assert_eq!(get(&masked, 0x8000_0008, 0).ebx, XSAVEERPTR);
        let plain = of_one(&supported(), 0, 1, true, false);
        assert_ne!(get(&plain, 1, 0).ecx & CX16, 0);
        assert_eq!(get(&plain, 0x4000_0001, 0).eax, u32::MAX);
        assert_eq!(get(&plain, 0x8000_0001, 0).edx, RDTSCP | 1);
    }

    #[test]
    fn differences_are_named() {
        let here = leaves(&CpuId::from_entries(&of_one(&supported(), 0, 1, true, false)).unwrap());
        assert_eq!(differences(&here, &here), Vec::<String>::new());
        let mut seen = here.clone();
        seen[1].ecx ^= CX16;
        let gone = seen.remove(2);
        seen.push(CpuidLeaf { function: 0x99, ..gone });
        assert_eq!(
            differences(&seen, &here),
            [
                "CPUID leaf 0x1.0x0 ECX was 0x81000000 and is 0x81002000 here",
                "CPUID leaf 0x99.0x0 does not exist here",
                "CPUID leaf 0x4.0x0 exists only here",
            ]
        );
    }
}
