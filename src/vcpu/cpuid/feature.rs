//! Names of the features that CPUID tells one bit each, so that people can read what a host lacks.
//!
//! The names are those of Linux' `/proc/cpuinfo`, where it has one; the places are from the Intel 64 manual (volume 2, CPUID), the
//! AMD64 manual (volume 3, appendix E) and, from 0x40000000, the kernel's `Documentation/virt/kvm/x86/cpuid.rst`.

use std::fmt::Write as _;

use super::super::state::CpuidLeaf;

/// A register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A register whose bits are features.
pub(super) struct FeatureRegister {
    function: u32,
    index: u32,
    register: Register,
    /// From bit 0, separated by blanks; `-` has no name.
    names: &'static str,
}

/// Bits that follow the guest's CR4 instead of the processor.
pub(super) const OSXSAVE: u32 = 1 << 27;
pub(super) const OSPKE: u32 = 1 << 4;

/// Bits of leaf 1 EDX that mean the same in leaf 0x80000001 EDX (AMD64 manual, volume 3, appendix E.4.2).
const REPEATED: u32 = 0x0183_f3ff;

const fn of(function: u32, index: u32, register: Register, names: &'static str) -> FeatureRegister {
    FeatureRegister { function, index, register, names }
}

/// All of them, in the order in which features are told.
static REGISTERS: [FeatureRegister; 18] = [
    of(
        0x1,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss \
         ht tm ia64 pbe",
    ),
    of(
        0x1,
        0,
        Register::Ecx,
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic \
         movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    of(0x6, 0, Register::Eax, "- - arat"),
    of(
        0x7,
        0,
        Register::Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a avx512f \
         avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    of(
        0x7,
        0,
        Register::Ecx,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme \
         avx512_vpopcntdq - la57 - - - - - rdpid kl bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    of(
        0x7,
        0,
        Register::Edx,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - \
         tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 \
         spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities ssbd",
    ),
    of(
        0x7,
        1,
        Register::Eax,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred lkgs wrmsrns \
         nmi_source amx_fp16 hreset avx_ifma - - lam msrlist - - - movrs",
    ),
    of(
        0x7,
        1,
        Register::Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchi - - - - avx10",
    ),
    of(0x7, 2, Register::Edx, "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    of(
        0xd,
        0,
        Register::Eax,
        "xsave:x87 xsave:sse xsave:avx xsave:bndregs xsave:bndcsr xsave:opmask xsave:zmm_hi256 xsave:hi16_zmm - xsave:pkru - - - \
         - - - - xsave:tilecfg xsave:tiledata",
    ),
    of(0xd, 1, Register::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    of(
        0x8000_0001,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr fxsr_opt \
         pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    of(
        0x8000_0001,
        0,
        Register::Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - \
         nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    of(0x8000_0007, 0, Register::Edx, "- - - - - - - - nonstop_tsc"),
    of(
        0x8000_0008,
        0,
        Register::Ebx,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - amd_stibp_always_on - \
         ibrs_same_mode - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret",
    ),
    of(
        0x8000_0021,
        0,
        Register::Eax,
        "no_nested_data_bp - lfence_rdtsc - - verw_clear null_sel_clr_base - autoibrs no_smm_ctl_msr - - - - - - - - - - \
         prefetchi - - - - - - sbpb ibpb_brtype srso_no srso_user_kernel_no",
    ),
    of(0x8000_0021, 0, Register::Ecx, "- tsa_sq_no tsa_l1_no"),
    of(
        0x4000_0001,
        0,
        Register::Eax,
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - \
         kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_async_pf_int \
         kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvm_clocksource_stable",
    ),
];

/// What `IA32_ARCH_CAPABILITIES` (0x10a) says, bit by bit (Intel 64 manual, volume 4, and the kernel's names).
const ARCH_CAPABILITIES: &str = "rdcl_no ibrs_all rsba skip_l1dfl_vmentry ssb_no mds_no pschange_mc_no tsx_ctrl taa_no - \
     misc_package_ctls energy_filtering_ctl doitm sbdr_ssdp_no fbsdp_no psdp_no - fb_clear fb_clear_ctrl rrsba bhi_no \
     xapic_disable_status - overclocking_status pbrsb_no gds_ctrl gds_no rfds_no rfds_clear ignore_umonitor_support \
     monitor_umonitor_mitigation";

impl FeatureRegister {
    fn read(&self, leaves: &[CpuidLeaf]) -> u32 {
        find(leaves, self.function, self.index).map_or(0, |leaf| match self.register {
            Register::Eax => leaf.eax,
            Register::Ebx => leaf.ebx,
            Register::Ecx => leaf.ecx,
            Register::Edx => leaf.edx,
        }) & !self.follows_the_guest()
    }

    fn write<'a>(&self, leaf: &'a mut CpuidLeaf) -> &'a mut u32 {
        match self.register {
            Register::Eax => &mut leaf.eax,
            Register::Ebx => &mut leaf.ebx,
            Register::Ecx => &mut leaf.ecx,
            Register::Edx => &mut leaf.edx,
        }
    }

    /// Adds `bits` to this register of `table`, which gets the leaf if it has none and there are any.
    fn add(&self, table: &mut Vec<CpuidLeaf>, bits: u32) {
        if bits == 0 {
            return;
        }
        let (function, index) = (self.function, self.index);
        match table.iter_mut().find(|leaf| (leaf.function, leaf.index) == (function, index)) {
            Some(leaf) => *self.write(leaf) |= bits,
            None => {
                let mut leaf = CpuidLeaf { function, index, ..Default::default() };
                *self.write(&mut leaf) = bits;
                table.push(leaf);
            }
        }
    }

    /// What says the same in another place: AMD repeats most of leaf 1 EDX, Intel does not.
    fn repeated(&self, leaves: &[CpuidLeaf]) -> u32 {
        match (self.function, self.register) {
            (0x8000_0001, Register::Edx) => find(leaves, 0x1, 0).map_or(0, |leaf| leaf.edx & REPEATED),
            _ => 0,
        }
    }

    fn follows_the_guest(&self) -> u32 {
        match (self.function, self.register) {
            (0x1, Register::Ecx) => OSXSAVE,
            (0x7, Register::Ecx) => OSPKE,
            _ => 0,
        }
    }

    fn name(&self, bit: u32) -> String {
        named(self.names, bit).map_or_else(
            || format!("CPUID.{:#x}.{:#x}.{:?}[{bit}]", self.function, self.index, self.register),
            str::to_owned,
        )
    }
}

fn named(names: &'static str, bit: u32) -> Option<&'static str> {
    names.split_ascii_whitespace().nth(bit as usize).filter(|name| *name != "-")
}

fn bits(register: u32) -> impl Iterator<Item = u32> {
    (0..u32::BITS).filter(move |bit| register >> bit & 1 == 1)
}

/// The leaf of that number.
pub(super) fn find(leaves: &[CpuidLeaf], function: u32, index: u32) -> Option<&CpuidLeaf> {
    leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index))
}

/// Features of `wanted` that `offered` has not. Each is named once.
pub(in crate::vcpu) fn lacking(wanted: &[CpuidLeaf], offered: &[CpuidLeaf]) -> Vec<String> {
    let mut names = Vec::new();
    for register in &REGISTERS {
        let offered = register.read(offered) | register.repeated(offered);
        for bit in bits(register.read(wanted) & !offered) {
            let name = register.name(bit);
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names
}

/// All features of a table, by name.
#[must_use]
pub fn names(table: &[CpuidLeaf]) -> Vec<String> {
    lacking(table, &[])
}

/// The features of a table and nothing else of it.
pub(in crate::vcpu) fn only_features(table: &[CpuidLeaf]) -> Vec<CpuidLeaf> {
    only_lacking(table, &[])
}

/// The features of `wanted` that `offered` has not.
pub(in crate::vcpu) fn only_lacking(wanted: &[CpuidLeaf], offered: &[CpuidLeaf]) -> Vec<CpuidLeaf> {
    let mut features = Vec::new();
    for register in &REGISTERS {
        register.add(&mut features, register.read(wanted) & !register.read(offered));
    }
    features
}

/// Adds the features of `more`; all else stays.
pub(in crate::vcpu) fn add(table: &mut Vec<CpuidLeaf>, more: &[CpuidLeaf]) {
    for register in &REGISTERS {
        register.add(table, register.read(more));
    }
}

/// The features of `table` that `names` has; a feature that is told in two places stays in both.
pub(super) fn filter(table: &[CpuidLeaf], names: &[&str]) -> Vec<CpuidLeaf> {
    let mut kept = Vec::new();
    for register in &REGISTERS {
        let allowed = register.names.split_ascii_whitespace().zip(0..u32::BITS);
        let allowed =
            allowed.filter(|(name, _)| names.contains(name)).fold(0, |mask, (_, bit)| mask | 1u32 << bit);
        register.add(&mut kept, register.read(table) & allowed);
    }
    kept
}

/// What `wanted` of `IA32_ARCH_CAPABILITIES` says and `offered` does not, by name.
pub(in crate::vcpu) fn lacking_capabilities(wanted: u64, offered: u64) -> Vec<String> {
    let lacking = wanted & !offered;
    let bits = (0..u64::BITS).filter(|bit| lacking >> bit & 1 == 1);
    let name = |bit| named(ARCH_CAPABILITIES, bit).map_or_else(|| format!("bit {bit}"), str::to_owned);
    bits.map(name).collect()
}

/// For people: `a, b and c`.
pub(in crate::vcpu) fn listed(names: &[String]) -> String {
    let mut text = String::new();
    for (position, name) in names.iter().enumerate() {
        let separator = match position {
            0 => "",
            _ if position + 1 == names.len() => " and ",
            _ => ", ",
        };
        // Writing to a String cannot fail.
        let _ = write!(text, "{separator}{name}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf { function, index, eax, ebx, ecx, edx }
    }

    /// One place of each register that is easy to count wrong.
    #[test]
    fn bits_have_their_names() {
        let places = [
            (0x1, 0, Register::Edx, 26, "sse2"),
            (0x1, 0, Register::Edx, 28, "ht"),
            (0x1, 0, Register::Ecx, 13, "cx16"),
            (0x1, 0, Register::Ecx, 31, "hypervisor"),
            (0x6, 0, Register::Eax, 2, "arat"),
            (0x7, 0, Register::Ebx, 16, "avx512f"),
            (0x7, 0, Register::Ebx, 31, "avx512vl"),
            (0x7, 0, Register::Ecx, 16, "la57"),
            (0x7, 0, Register::Ecx, 22, "rdpid"),
            (0x7, 0, Register::Ecx, 31, "pks"),
            (0x7, 0, Register::Edx, 26, "spec_ctrl"),
            (0x7, 0, Register::Edx, 31, "ssbd"),
            (0x7, 1, Register::Eax, 5, "avx512_bf16"),
            (0x7, 1, Register::Eax, 26, "lam"),
            (0x7, 1, Register::Edx, 19, "avx10"),
            (0x7, 2, Register::Edx, 4, "bhi_ctrl"),
            (0xd, 0, Register::Eax, 7, "xsave:hi16_zmm"),
            (0xd, 0, Register::Eax, 18, "xsave:tiledata"),
            (0xd, 1, Register::Eax, 3, "xsaves"),
            (0x8000_0001, 0, Register::Edx, 11, "syscall"),
            (0x8000_0001, 0, Register::Edx, 29, "lm"),
            (0x8000_0001, 0, Register::Ecx, 5, "abm"),
            (0x8000_0001, 0, Register::Ecx, 22, "topoext"),
            (0x8000_0001, 0, Register::Ecx, 29, "mwaitx"),
            (0x8000_0007, 0, Register::Edx, 8, "nonstop_tsc"),
            (0x8000_0008, 0, Register::Ebx, 12, "amd_ibpb"),
            (0x8000_0008, 0, Register::Ebx, 24, "amd_ssbd"),
            (0x8000_0021, 0, Register::Eax, 8, "autoibrs"),
            (0x8000_0021, 0, Register::Eax, 29, "srso_no"),
            (0x4000_0001, 0, Register::Eax, 24, "kvm_clocksource_stable"),
            (0x7, 0, Register::Ebx, 22, "CPUID.0x7.0x0.Ebx[22]"),
        ];
        for (function, index, register, bit, name) in places {
            let mut at = CpuidLeaf { function, index, ..Default::default() };
            *of(function, index, register, "").write(&mut at) = 1 << bit;
            assert_eq!(names(&[at]), [name]);
        }
        assert_eq!(named(ARCH_CAPABILITIES, 17), Some("fb_clear"));
        assert_eq!(named(ARCH_CAPABILITIES, 26), Some("gds_no"));
        let all = REGISTERS.iter().map(|register| register.names.split_ascii_whitespace().count());
        assert!(all.into_iter().all(|count| count <= 32));
    }

    #[test]
    fn what_follows_the_guest_is_no_feature() {
        let running = [leaf(1, 0, [0, 0, OSXSAVE | 1, 0]), leaf(7, 0, [0, 0, OSPKE | 4, 0])];
        assert_eq!(names(&running), ["sse3", "umip"]);
    }

    #[test]
    fn what_is_told_twice_is_lacked_once_and_kept_twice() {
        let twice = [leaf(1, 0, [9, 9, 0, 1]), leaf(0x8000_0001, 0, [9, 9, 0, 1 << 11 | 1])];
        assert_eq!(lacking(&twice, &[]), ["fpu", "syscall"]);
        let kept = filter(&twice, &["fpu"]);
        assert_eq!(kept, [leaf(1, 0, [0, 0, 0, 1]), leaf(0x8000_0001, 0, [0, 0, 0, 1])]);
        assert_eq!(only_features(&twice)[1], leaf(0x8000_0001, 0, [0, 0, 0, 1 << 11 | 1]));
    }

    #[test]
    fn lists_read_as_people_speak() {
        let names = ["a", "b", "c"].map(str::to_owned);
        assert_eq!(listed(&names), "a, b and c");
        assert_eq!(listed(&names[..1]), "a");
        assert_eq!(lacking_capabilities(1 | 1 << 9 | 1 << 20, 1), ["bit 9", "bhi_no"]);
    }
}
