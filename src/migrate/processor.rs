//! vCPUs in a [`Description`]: what a guest needs of its host, as properties that a destination reads back.
//!
//! `cpu.N.cpuid.LEAF.SUBLEAF` is what CPUID says on vCPU N, `cpu.user.LEAF.SUBLEAF` what programs see beyond it, `cpu.msrs`,
//! `cpu.arch_capabilities` and `cpu.xsave_bytes` what their state is made of, `kvm.capabilities` how it is read. These are not
//! compared as they stand: see [`Requirements::unmet`]. What an older source does not tell it does not need.

use engine::Description;

use crate::vcpu::{CpuidLeaf, Offer, Requirements};

const MSRS: &str = "cpu.msrs";
const ARCH_CAPABILITIES: &str = "cpu.arch_capabilities";
const XSAVE_BYTES: &str = "cpu.xsave_bytes";
const CAPABILITIES: &str = "kvm.capabilities";
const USER: &str = "user";
/// Most vCPUs that are read from a description: more than any machine has.
const VCPUS_MAX: usize = 256;

/// Adds what `requirements` says.
pub(super) fn describe(description: &mut Description, requirements: &Requirements) {
    let Requirements { cpuid, user, msrs, arch_capabilities, xsave_bytes, capabilities } = requirements;
    for (vcpu, table) in cpuid.iter().enumerate() {
        for leaf in table {
            let CpuidLeaf { function, index, .. } = leaf;
            description.set(format!("cpu.{vcpu}.cpuid.{function:08x}.{index:x}"), leaf.registers());
        }
    }
    for leaf in user {
        let CpuidLeaf { function, index, .. } = leaf;
        description.set(format!("cpu.{USER}.{function:08x}.{index:x}"), leaf.registers());
    }
    let msrs: Vec<String> = msrs.iter().map(|msr| format!("{msr:x}")).collect();
    description.set(MSRS, msrs.join(","));
    description.set(ARCH_CAPABILITIES, format!("{arch_capabilities:x}"));
    description.set(XSAVE_BYTES, xsave_bytes);
    description.set(CAPABILITIES, capabilities.join(","));
}

/// Takes out of `description` what [`describe`] has put there.
///
/// # Errors
/// The properties that make no sense, one sentence each.
pub(super) fn take(description: &mut Description) -> Result<Requirements, Vec<String>> {
    let names = description.iter().map(|(name, _)| name);
    let names = names.filter(|name| name.starts_with("cpu.") || *name == CAPABILITIES);
    let names: Vec<String> = names.map(str::to_owned).collect();
    let mut requirements = Requirements::default();
    let mut wrong = Vec::new();
    for name in names {
        let value = description.remove(&name).unwrap_or_default();
        if read(&mut requirements, &name, &value).is_none() {
            wrong.push(format!("{name}: the source says {value:?}, which makes no sense"));
        }
    }
    if wrong.is_empty() { Ok(requirements) } else { Err(wrong) }
}

fn read(requirements: &mut Requirements, name: &str, value: &str) -> Option<()> {
    let list = || value.split(',').filter(|word| !word.is_empty());
    match name {
        MSRS => {
            requirements.msrs = list().map(|msr| u32::from_str_radix(msr, 16).ok()).collect::<Option<_>>()?
        }
        ARCH_CAPABILITIES => requirements.arch_capabilities = u64::from_str_radix(value, 16).ok()?,
        XSAVE_BYTES => requirements.xsave_bytes = value.parse().ok()?,
        CAPABILITIES => requirements.capabilities = list().map(str::to_owned).collect(),
        _ => {
            let (whose, number) = name.strip_prefix("cpu.")?.split_once('.')?;
            if whose == USER {
                requirements.user.push(CpuidLeaf::from_text(&format!("{number} {value}"))?);
                return Some(());
            }
            let vcpu: usize = whose.parse().ok().filter(|vcpu| *vcpu < VCPUS_MAX)?;
            let leaf = CpuidLeaf::from_text(&format!("{} {value}", number.strip_prefix("cpuid.")?))?;
            if requirements.cpuid.len() <= vcpu {
                requirements.cpuid.resize(vcpu + 1, Vec::new());
            }
            requirements.cpuid.get_mut(vcpu)?.push(leaf);
        }
    }
    Some(())
}

/// Every reason why the vCPUs of `source` cannot run where `own` was described and `offer` is there; takes them out of both.
pub(super) fn differences(source: &mut Description, own: &mut Description, offer: &Offer) -> Vec<String> {
    // What this machine would give a guest that starts here is nothing to one that has its own.
    let _own = take(own);
    match take(source) {
        Ok(requirements) => requirements.unmet(offer),
        Err(wrong) => wrong,
    }
}

/// What CPUID says on each vCPU of `source`; `None` if it does not say.
pub(super) fn tables(source: &Description) -> Option<Vec<Vec<CpuidLeaf>>> {
    let requirements = take(&mut source.clone()).ok()?;
    Some(requirements.cpuid).filter(|tables| !tables.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, ecx: u32) -> CpuidLeaf {
        CpuidLeaf { function, index, ecx, ..Default::default() }
    }

    fn requirements() -> Requirements {
        let table = |place: u32| vec![leaf(1, 0, place << 24), leaf(7, 0, 2), leaf(0x8000_0001, 0x1f, 3)];
        Requirements {
            cpuid: (0..12).map(table).collect(),
            user: vec![leaf(7, 0, 4)],
            msrs: vec![0x10a, 0xc000_0103],
            arch_capabilities: 0x4000_0000_0000_0001,
            xsave_bytes: 4096,
            capabilities: vec!["KVM_CAP_A".to_owned(), "KVM_CAP_B".to_owned()],
        }
    }

    #[test]
    fn what_is_described_is_read_again() {
        let mut description = Description::new();
        description.set("cpus", 12);
        describe(&mut description, &requirements());
        assert_eq!(tables(&description), Some(requirements().cpuid));
        assert_eq!(take(&mut description), Ok(requirements()));
        assert_eq!(description.iter().collect::<Vec<_>>(), [("cpus", "12")]);
        describe(&mut description, &Requirements::default());
        assert_eq!(take(&mut description), Ok(Requirements::default()));
        assert_eq!(tables(&description), None);
    }

    #[test]
    fn what_makes_no_sense_is_told_and_asks_for_no_memory() {
        let nonsense = [
            ("cpu.0.cpuid.00000001.0", "eax=1"),
            ("cpu.0.cpuid.00000002", "eax=1 ebx=1 ecx=1 edx=1"),
            ("cpu.18446744073709551615.cpuid.1.0", "eax=1 ebx=1 ecx=1 edx=1"),
            ("cpu.256.cpuid.1.0", "eax=1 ebx=1 ecx=1 edx=1"),
            ("cpu.arch_capabilities", "no"),
            ("cpu.colour", "green"),
            ("cpu.msrs", "10,x"),
            ("cpu.user.7.0", ""),
            ("cpu.xsave_bytes", "-1"),
        ];
        let mut description = Description::new();
        nonsense.iter().for_each(|(name, value)| description.set(*name, value));
        let wrong = differences(&mut description, &mut Description::new(), &Offer::default());
        assert_eq!(wrong.len(), nonsense.len(), "{wrong:?}");
        assert!(wrong.iter().zip(&nonsense).all(|(told, (name, _))| told.starts_with(name)), "{wrong:?}");
    }
}
