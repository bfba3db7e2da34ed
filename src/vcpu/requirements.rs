//! What the vCPUs of a guest need of the host that they run on, and what a host offers: compared before any RAM moves.

use super::cpuid;
use super::state::CpuidLeaf;

/// What the state of a guest's vCPUs is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requirements {
    /// What CPUID says, on each vCPU. It goes with the guest.
    pub cpuid: Vec<Vec<CpuidLeaf>>,
    /// Features that programs of the guest see beside that, where KVM cannot hide them.
    pub user: Vec<CpuidLeaf>,
    /// Model-specific registers that are saved.
    pub msrs: Vec<u32>,
    /// What the guest reads in `IA32_ARCH_CAPABILITIES`, if it may.
    pub arch_capabilities: u64,
    /// Bytes of a vCPU's extended state.
    pub xsave_bytes: u32,
    /// Capabilities of KVM, by name, through which the state is read and set.
    pub capabilities: Vec<String>,
}

/// What a host can give a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// What CPUID can say.
    pub cpuid: Vec<CpuidLeaf>,
    /// Features that programs can use, whether CPUID says so or not.
    pub user: Vec<CpuidLeaf>,
    /// Model-specific registers that KVM takes.
    pub msrs: Vec<u32>,
    /// What a guest may read in `IA32_ARCH_CAPABILITIES`.
    pub arch_capabilities: u64,
    /// Bytes of a vCPU's extended state.
    pub xsave_bytes: u32,
    /// Capabilities of KVM that a state may depend on, by name.
    pub capabilities: Vec<String>,
}

/// Model-specific registers by the names of the manuals, of those that not every host has.
const MSR_NAMES: [(u32, &str); 22] = [
    (0x34, "MSR_SMI_COUNT"),
    (0x3b, "IA32_TSC_ADJUST"),
    (0x48, "IA32_SPEC_CTRL"),
    (0x8b, "IA32_BIOS_SIGN_ID"),
    (0xce, "MSR_PLATFORM_INFO"),
    (0xe1, "IA32_UMWAIT_CONTROL"),
    (0x10a, "IA32_ARCH_CAPABILITIES"),
    (0x122, "IA32_TSX_CTRL"),
    (0x140, "MSR_MISC_FEATURES_ENABLES"),
    (0x1a0, "IA32_MISC_ENABLE"),
    (0x1c4, "IA32_XFD"),
    (0x1c5, "IA32_XFD_ERR"),
    (0x345, "IA32_PERF_CAPABILITIES"),
    (0x38d, "IA32_FIXED_CTR_CTRL"),
    (0x38f, "IA32_PERF_GLOBAL_CTRL"),
    (0x6e0, "IA32_TSC_DEADLINE"),
    (0xda0, "IA32_XSS"),
    (0xd90, "IA32_BNDCFGS"),
    (0xc000_0103, "IA32_TSC_AUX"),
    (0xc000_0104, "MSR_AMD64_TSC_RATIO"),
    (0xc001_0015, "MSR_K7_HWCR"),
    (0xc001_011f, "MSR_AMD64_VIRT_SPEC_CTRL"),
];

impl Requirements {
    /// Every reason why these vCPUs cannot run on a host that offers `offer`, one sentence each.
    #[must_use]
    pub fn unmet(&self, offer: &Offer) -> Vec<String> {
        let mut reasons: Vec<String> = Vec::new();
        for table in &self.cpuid {
            // All vCPUs are alike but for their places, so that each reason comes as often as there are vCPUs.
            for reason in cpuid::reasons(table, &offer.cpuid) {
                if !reasons.contains(&reason) {
                    reasons.push(reason);
                }
            }
        }
        let user = cpuid::lacking(&self.user, &offer.user);
        if !user.is_empty() {
            reasons.push(format!(
                "CPU: programs of the source's guest see {}, which its host does not hide and the destination's lacks",
                cpuid::listed(&user)
            ));
        }
        let lacking = cpuid::lacking_capabilities(self.arch_capabilities, offer.arch_capabilities);
        if !lacking.is_empty() {
            reasons.push(format!(
                "CPU: the source's guest has read {} in IA32_ARCH_CAPABILITIES, which the destination's host does not say",
                cpuid::listed(&lacking)
            ));
        }
        let msrs: Vec<String> =
            self.msrs.iter().filter(|msr| !offer.msrs.contains(msr)).map(|&msr| msr_name(msr)).collect();
        if !msrs.is_empty() {
            reasons.push(format!(
                "CPU: the source's guest has the MSRs {}, which KVM at the destination has not",
                cpuid::listed(&msrs)
            ));
        }
        if self.xsave_bytes > offer.xsave_bytes {
            reasons.push(format!(
                "CPU: extended state has {} bytes at the source, {} at the destination",
                self.xsave_bytes, offer.xsave_bytes
            ));
        }
        let missing = self.capabilities.iter().filter(|name| !offer.capabilities.contains(name));
        let missing: Vec<String> = missing.cloned().collect();
        if !missing.is_empty() {
            reasons.push(format!(
                "KVM: the source's state is read by way of {}, which the destination's KVM lacks",
                cpuid::listed(&missing)
            ));
        }
        reasons
    }
}

fn msr_name(msr: u32) -> String {
    match MSR_NAMES.iter().find(|(index, _)| *index == msr) {
        Some((_, name)) => format!("{name} ({msr:#x})"),
        None => format!("{msr:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf { function, index, eax, ebx, ecx, edx }
    }

    #[test]
    fn every_reason_comes_at_once_and_each_once() {
        let intel = leaf(0, 0, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]);
        let amd = leaf(0, 0, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]);
        let guest = vec![
            intel,
            leaf(1, 0, [0x806f8, 0, 1 << 23 | 1, 0]),
            leaf(7, 0, [0, 1 << 31 | 1 << 16, 0, 0]),
            leaf(0xa, 0, [0x0030_0805, 0, 0, 0]),
            leaf(0xd, 0, [7, 0, 0, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0x1d, 0, [1, 0, 0, 0]),
            leaf(0x8000_0008, 0, [52 | 57 << 8, 0, 0, 0]),
        ];
        let source = Requirements {
            cpuid: vec![guest.clone(), guest],
            user: vec![leaf(7, 1, [1 << 4, 0, 0, 0])],
            msrs: vec![0x10, 0x1c4, 0x4b56_4d00],
            arch_capabilities: 0b11,
            xsave_bytes: 11_008,
            capabilities: vec!["KVM_CAP_A".to_owned(), "KVM_CAP_B".to_owned()],
        };
        let offer = Offer {
            cpuid: vec![
                amd,
                leaf(1, 0, [0, 0, 1, 0]),
                leaf(0xd, 0, [7, 0, 0, 0]),
                leaf(0xd, 2, [256, 640, 0, 0]),
                leaf(0x8000_0008, 0, [48 | 48 << 8, 0, 0, 0]),
            ],
            user: Vec::new(),
            msrs: vec![0x10],
            arch_capabilities: 1,
            xsave_bytes: 4096,
            capabilities: vec!["KVM_CAP_A".to_owned()],
        };
        assert_eq!(
            source.unmet(&offer),
            [
                "CPU: the guest's vendor is GenuineIntel, the destination's AuthenticAMD",
                "CPU: the source's guest has popcnt, avx512f and avx512vl, which the destination's host lacks",
                "CPU: physical addresses have 52 bits at the guest, 48 at the destination",
                "CPU: linear addresses have 57 bits at the guest, 48 at the destination",
                "CPU: XSAVE component 2 has 256 bytes at 576 at the guest, 256 at 640 at the destination",
                "CPU: the guest has 8 performance counters of version 5 and 48 bits, the destination 0 of version 0 and 0 bits",
                "CPU: the guest's leaf 0x1d.0x0 is [1, 0, 0, 0], the destination's [0, 0, 0, 0]",
                "CPU: programs of the source's guest see avx_vnni, which its host does not hide and the destination's lacks",
                "CPU: the source's guest has read ibrs_all in IA32_ARCH_CAPABILITIES, which the destination's host does not say",
                "CPU: the source's guest has the MSRs IA32_XFD (0x1c4) and 0x4b564d00, which KVM at the destination has not",
                "CPU: extended state has 11008 bytes at the source, 4096 at the destination",
                "KVM: the source's state is read by way of KVM_CAP_B, which the destination's KVM lacks",
            ]
        );
    }

    /// What only describes the processor goes with the guest.
    #[test]
    fn a_host_that_has_more_is_good_enough() {
        let vendor = leaf(0, 0, [0xd, 1, 2, 3]);
        let guest = vec![
            vendor.clone(),
            leaf(1, 0, [0x106a3, 0x0102_0800, 1, 1]),
            leaf(4, 0, [0x121, 1, 2, 3]),
            leaf(0x8000_0002, 0, [1, 2, 3, 4]),
            leaf(0x8000_0008, 0, [40 | 48 << 8, 0, 0, 0]),
        ];
        let host = vec![
            CpuidLeaf { eax: 0x20, ..vendor },
            leaf(1, 0, [0x806f8, 0, 0x8000_0003, 3]),
            leaf(7, 0, [2, u32::MAX, 0, 0]),
            leaf(0x8000_0008, 0, [52 | 57 << 8, 0, 0, 0]),
        ];
        let source =
            Requirements { cpuid: vec![guest], msrs: vec![1], xsave_bytes: 4096, ..Default::default() };
        let offer = Offer {
            cpuid: host,
            msrs: vec![1, 2],
            xsave_bytes: 11_008,
            arch_capabilities: 9,
            ..Default::default()
        };
        assert_eq!(source.unmet(&offer), Vec::<String>::new());
    }
}
