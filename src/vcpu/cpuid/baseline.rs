//! Named processors that all hosts of a fleet can be: the levels of the x86-64 psABI.
//!
//! [`table`] is a pure function of what a host offers. Its result depends on nothing else than the level, the vendor and the
//! vendor's layout of extended state: two hosts of one vendor that have a level give the same table, whatever else they have.
//! The vendor stays because too much that no bit tells depends on it (how SYSCALL faults, which hypercall instruction, which
//! speculation controls), so that no guest moves between vendors.
//!
//! A level is about programs; what kernels need besides is in [`NEEDED_ANYWAY`]. All else is hidden, the speculation controls
//! of the host's vendor and the performance counters included.

use std::fmt;

use super::super::state::CpuidLeaf;
use super::feature::{self, find};

/// Which processor a guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum CpuModel {
    /// All that this host's KVM offers: the guest moves only to hosts that offer all of it too.
    #[default]
    Host,
    /// The x86-64 baseline: SSE2.
    #[value(name = "x86-64-v1")]
    V1,
    /// Adds CMPXCHG16B, LAHF, POPCNT, SSE3, SSSE3, SSE4.1 and SSE4.2.
    #[value(name = "x86-64-v2")]
    V2,
    /// Adds AVX, AVX2, BMI1, BMI2, F16C, FMA, LZCNT, MOVBE and XSAVE.
    #[value(name = "x86-64-v3")]
    V3,
    /// Adds AVX512F, BW, CD, DQ and VL.
    #[value(name = "x86-64-v4")]
    V4,
}

impl CpuModel {
    /// All that there are.
    pub const ALL: [Self; 5] = [Self::Host, Self::V1, Self::V2, Self::V3, Self::V4];
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::V1 => "x86-64-v1",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        })
    }
}

/// System V Application Binary Interface, AMD64 supplement, 3.1.1, table 3.1: the bits of each level. OSFXSR and OSXSAVE are the
/// operating system's answer to `fxsr` and `xsave`; what AVX needs of XSAVE goes with it.
const LEVELS: [(CpuModel, &[&str]); 4] = [
    (CpuModel::V1, &["cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"]),
    (CpuModel::V2, &["cx16", "lahf_lm", "popcnt", "sse3", "sse4_1", "sse4_2", "ssse3"]),
    (
        CpuModel::V3,
        &[
            "avx",
            "avx2",
            "bmi1",
            "bmi2",
            "f16c",
            "fma",
            "abm",
            "movbe",
            "xsave",
            "xsave:x87",
            "xsave:sse",
            "xsave:avx",
        ],
    ),
    (
        CpuModel::V4,
        &[
            "avx512f",
            "avx512bw",
            "avx512cd",
            "avx512dq",
            "avx512vl",
            "xsave:opmask",
            "xsave:zmm_hi256",
            "xsave:hi16_zmm",
        ],
    ),
];

/// What 64-bit kernels take for granted, and what time and interrupts in a virtual machine rest on. Every processor and every KVM
/// of the last ten years has it.
const NEEDED_ANYWAY: [&str; 26] = [
    "de",
    "pse",
    "tsc",
    "msr",
    "pae",
    "mce",
    "apic",
    "sep",
    "mtrr",
    "pge",
    "mca",
    "pat",
    "pse36",
    "clflush",
    "nx",
    "lm",
    "arat",
    "nonstop_tsc",
    "hypervisor",
    "x2apic",
    "tsc_deadline_timer",
    "kvm_clocksource",
    "kvm_nop_io_delay",
    "kvm_clocksource2",
    "kvm_pv_eoi",
    "kvm_clocksource_stable",
];

/// Vendors as leaf 0 spells them: EBX, ECX, EDX.
const AMD: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];
const HYGON: [u32; 3] = [0x6f67_7948, 0x656e_6975, 0x6e65_476e];
/// "KVMKVMKVM": EBX, ECX, EDX, as of vendors above.
const KVM: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];
/// Family 0x17, model 1, stepping 2, and family 6, model 0x1a, stepping 3: old enough that kernels make no exception for it,
/// which they do by model; features they take from their bits.
const SIGNATURE_AMD: u32 = 0x0080_0f12;
const SIGNATURE_OTHER: u32 = 0x0001_06a3;
/// CLFLUSH flushes 8 times 8 bytes; the APIC identity and the number of processors are each vCPU's.
const CACHE_LINE: u32 = 8 << 8;
/// 40 bits of a physical address, 48 of a linear one.
const PHYSICAL_ADDRESS_BITS: u32 = 40;
const ADDRESS_BITS: u32 = 48 << 8 | PHYSICAL_ADDRESS_BITS;
/// Cache information is in leaf 4 (descriptor 0xff), and this leaf is complete (1).
const CACHES_ARE_ELSEWHERE: u32 = 0xff01;
/// XSAVE components begin with number 2: the first two are in the fixed part of the area, with the header 576 bytes.
const XSAVE_COMPONENTS: std::ops::Range<u32> = 2..32;
const XSAVE_FIXED_BYTES: u32 = 576;

/// Names of a level's features, those of the levels below included; all that there are for [`CpuModel::Host`].
fn level(model: CpuModel) -> Vec<&'static str> {
    LEVELS.iter().filter(|(level, _)| *level <= model).flat_map(|(_, names)| names.iter().copied()).collect()
}

/// What CPUID says in a guest of `model` on a host that offers `offered`, apart from what tells each vCPU its place.
///
/// # Errors
/// What the host lacks: all of it.
pub fn table(model: CpuModel, offered: &[CpuidLeaf]) -> Result<Vec<CpuidLeaf>, Vec<String>> {
    if model == CpuModel::Host {
        return Ok(offered.to_vec());
    }
    let mut wanted = level(model);
    wanted.extend(NEEDED_ANYWAY);
    let features = feature::filter(offered, &wanted);
    let found = feature::names(&features);
    let missing = wanted.iter().filter(|name| !found.iter().any(|found| found == *name));
    let mut lacking: Vec<String> = missing.map(|&name| name.to_owned()).collect();
    let physical = find(offered, 0x8000_0008, 0).map_or(0, |leaf| leaf.eax & 0xff);
    if physical < PHYSICAL_ADDRESS_BITS {
        lacking.push(format!("{PHYSICAL_ADDRESS_BITS} bits of physical addresses (it has {physical})"));
    }
    if !lacking.is_empty() {
        return Err(lacking);
    }

    let mut table = fixed(model, find(offered, 0, 0).map_or([0; 3], |leaf| [leaf.ebx, leaf.ecx, leaf.edx]));
    if find(&features, 0xd, 0).is_some_and(|leaf| leaf.eax != 0) {
        table.extend(extended_state(&features, offered));
    }
    feature::add(&mut table, &features);
    table.sort_by_key(|leaf| (leaf.function, leaf.index));
    Ok(table)
}

/// What is the same everywhere but for the vendor, without features.
fn fixed(model: CpuModel, vendor: [u32; 3]) -> Vec<CpuidLeaf> {
    let leaf =
        |function, index, [eax, ebx, ecx, edx]: [u32; 4]| CpuidLeaf { function, index, eax, ebx, ecx, edx };
    let [ebx, ecx, edx] = vendor;
    let last = if model >= CpuModel::V3 { 0xd } else { 0xb };
    let is_amd = vendor == AMD || vendor == HYGON;
    let signature = if is_amd { SIGNATURE_AMD } else { SIGNATURE_OTHER };
    let [kvm_ebx, kvm_ecx, kvm_edx] = KVM;
    let mut leaves = vec![
        leaf(0, 0, [last, ebx, ecx, edx]),
        leaf(0x1, 0, [signature, CACHE_LINE, 0, 0]),
        leaf(0x7, 0, [0; 4]),
        leaf(0x4000_0000, 0, [0x4000_0001, kvm_ebx, kvm_ecx, kvm_edx]),
        leaf(0x8000_0008, 0, [ADDRESS_BITS, 0, 0, 0]),
    ];
    if is_amd {
        leaves.extend([
            leaf(0x8000_0000, 0, [0x8000_0008, ebx, ecx, edx]),
            leaf(0x8000_0001, 0, [signature, 0, 0, 0]),
            // 64 entries of TLBs; 32 KiB for data and for instructions, 512 KiB, 16 MiB for all.
            leaf(0x8000_0005, 0, [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140]),
            leaf(0x8000_0006, 0, [0x4200_4200, 0x4200_4200, 0x0200_6140, 0x0080_8140]),
        ]);
    } else {
        leaves.extend([
            leaf(0x2, 0, [CACHES_ARE_ELSEWHERE, 0, 0, 0]),
            // The same caches.
            leaf(0x4, 0, [0x121, 0x01c0_003f, 0x3f, 0]),
            leaf(0x4, 1, [0x122, 0x01c0_003f, 0x3f, 0]),
            leaf(0x4, 2, [0x143, 0x01c0_003f, 0x3ff, 0]),
            leaf(0x4, 3, [0x163, 0x03c0_003f, 0x3fff, 0]),
            leaf(0x4, 4, [0; 4]),
            leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0; 4]),
        ]);
    }
    let mut brand = [0; 48];
    let name = format!("ferry {model}");
    brand.iter_mut().zip(name.bytes()).for_each(|(into, byte)| *into = byte);
    let mut words =
        brand.chunks_exact(4).map(|word| word.iter().rev().fold(0, |all, &b| all << 8 | u32::from(b)));
    for function in 0x8000_0002..=0x8000_0004 {
        leaves.push(leaf(function, 0, [(); 4].map(|()| words.next().unwrap_or(0))));
    }
    leaves
}

/// Leaf 0xd without its features: each component's place as the host's processor has it, which software cannot change.
fn extended_state(features: &[CpuidLeaf], offered: &[CpuidLeaf]) -> Vec<CpuidLeaf> {
    let components = find(features, 0xd, 0).map_or(0, |leaf| leaf.eax);
    let places: Vec<CpuidLeaf> = XSAVE_COMPONENTS
        .filter(|component| components >> component & 1 == 1)
        .filter_map(|component| find(offered, 0xd, component))
        .map(|place| CpuidLeaf { ecx: 0, edx: 0, ..place.clone() })
        .collect();
    let end = places.iter().map(|place| place.ebx.saturating_add(place.eax)).max();
    let whole = CpuidLeaf {
        function: 0xd,
        // What XCR0 enables at first, and all that it can.
        ebx: XSAVE_FIXED_BYTES,
        ecx: end.unwrap_or(XSAVE_FIXED_BYTES),
        ..Default::default()
    };
    let none = CpuidLeaf { function: 0xd, index: 1, ..Default::default() };
    [whole, none].into_iter().chain(places).collect()
}
