//! Tables of hosts and what becomes of them. `tests/golden/cpuid` has hosts and the guests that they give.

use std::path::{Path, PathBuf};

use super::*;
use crate::vcpu::CpuidLeaf;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> CpuidLeaf {
    let [eax, ebx, ecx, edx] = registers;
    CpuidLeaf { function, index, eax, ebx, ecx, edx }
}

fn some_table() -> Vec<CpuidLeaf> {
    vec![
        leaf(0, 0, [0x1f, 0, 0, 0]),
        leaf(1, 0, [0x806f8, 0x0310_0800, CX16 | HYPERVISOR, 0x1783_fbff]),
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

fn get(leaves: &[CpuidLeaf], function: u32, index: u32) -> &CpuidLeaf {
    feature::find(leaves, function, index).unwrap()
}

#[test]
fn each_vcpu_has_its_place() {
    let leaves = of_one(&some_table(), 2, 3, false);
    let one = get(&leaves, 1, 0);
    assert_eq!((one.ebx, one.ecx), (0x0203_0800, CX16 | HYPERVISOR));
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
    let single = of_one(&some_table(), 0, 1, false);
    assert_eq!(get(&single, 1, 0).edx & HTT, 0);
    assert_eq!(get(&single, 0xb, 1).eax, 0);
}

#[test]
fn paravirtual_hosts_get_their_masks_and_others_do_not() {
    let masked = of_one(&some_table(), 0, 1, true);
    assert_eq!(get(&masked, 1, 0).ecx & CX16, 0);
    assert_eq!(get(&masked, 0x4000_0001, 0).eax, 0x0100_006b);
    assert_eq!(get(&masked, 0x8000_0001, 0).edx, 1);
    assert_eq!(get(&masked, 0x8000_0008, 0).ebx, XSAVEERPTR);
    let plain = of_one(&some_table(), 0, 1, false);
    assert_ne!(get(&plain, 1, 0).ecx & CX16, 0);
    assert_eq!(get(&plain, 0x4000_0001, 0).eax, u32::MAX);
    assert_eq!(get(&plain, 0x8000_0001, 0).edx, RDTSCP | 1);
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cpuid").join(format!("{name}.txt"))
}

/// A table as it is kept: a leaf a line, what begins with `#` is for people.
fn read(name: &str) -> Vec<CpuidLeaf> {
    let text = std::fs::read_to_string(golden(name)).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| CpuidLeaf::from_text(line).unwrap_or_else(|| panic!("{name}: {line}"))).collect()
}

fn written(table: &[CpuidLeaf]) -> String {
    table.iter().map(|leaf| format!("{}\n", leaf.to_text())).collect()
}

const LEVELS: [CpuModel; 4] = [CpuModel::V1, CpuModel::V2, CpuModel::V3, CpuModel::V4];

/// Every host of a vendor gives the table that is kept for the vendor, or is refused.
#[test]
fn hosts_of_different_models_give_one_table_for_a_level() {
    let fleets = [("amd", ["host-reference", "host-amd"]), ("intel", ["host-intel", "host-intel-tiles"])];
    for (vendor, hosts) in fleets {
        for model in LEVELS {
            let expected = std::fs::read_to_string(golden(&format!("{vendor}-{model}"))).unwrap_or_default();
            for host in hosts {
                // It interprets LZCNT as BSR in kernels, and so does not offer it; what follows needs the same.
                if host == "host-reference" && model >= CpuModel::V3 {
                    assert_eq!(table(model, &read(host)), Err(vec!["abm".to_owned()]));
                    continue;
                }
                let table = written(&table(model, &read(host)).unwrap());
                assert!(table == expected, "{model} on {host} is now:\n{table}");
            }
        }
    }
}

#[test]
fn a_level_has_its_features_and_those_that_every_guest_needs() {
    let host = read("host-intel-tiles");
    let mut below = Vec::new();
    for (model, more) in [
        (CpuModel::V2, "cx16 lahf_lm popcnt sse3 sse4_1 sse4_2 ssse3"),
        (CpuModel::V3, "abm avx avx2 bmi1 bmi2 f16c fma movbe xsave xsave:avx xsave:sse xsave:x87"),
        (
            CpuModel::V4,
            "avx512bw avx512cd avx512dq avx512f avx512vl xsave:hi16_zmm xsave:opmask xsave:zmm_hi256",
        ),
    ] {
        if below.is_empty() {
            below = table(CpuModel::V1, &host).unwrap();
            let names = names(&below).join(" ");
            assert_eq!(
                names,
                "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 x2apic \
                 tsc_deadline_timer hypervisor arat syscall nx lm nonstop_tsc kvm_clocksource kvm_nop_io_delay kvm_clocksource2 \
                 kvm_pv_eoi kvm_clocksource_stable"
            );
        }
        let level = table(model, &host).unwrap();
        let mut added = lacking(&level, &below);
        added.sort_unstable();
        assert_eq!(added.join(" "), more, "{model}");
        assert_eq!(lacking(&below, &level), Vec::<String>::new(), "{model}");
        // Nothing else is left of the host: its name, its model, its performance counters, trace and tiles.
        for (function, index) in [(0xa, 0), (0x14, 0), (0x16, 0), (0x1d, 1), (0x1f, 0), (0xd, 18)] {
            assert_eq!(
                feature::find(&level, function, index),
                None,
                "{model}: leaf {function:#x}.{index:#x}"
            );
        }
        below = level;
    }
    assert_eq!(reasons(&below, &host), Vec::<String>::new(), "what a host gives it can take");
}

#[test]
fn vendors_differ_in_vendor_model_caches_and_the_layout_of_extended_state_only() {
    for model in LEVELS {
        let (amd, intel) =
            (table(model, &read("host-amd")).unwrap(), table(model, &read("host-intel")).unwrap());
        assert_eq!(names(&amd), names(&intel));
        let told = reasons(&amd, &intel);
        assert!(told[0].contains("vendor is AuthenticAMD, the destination's GenuineIntel"), "{told:?}");
        assert!(told[1..].iter().all(|reason| reason.contains("XSAVE component")), "{told:?}");
    }
}

#[test]
fn a_host_is_told_all_that_it_lacks() {
    let mut host = read("host-amd");
    for leaf in &mut host {
        match leaf.function {
            0x1 => leaf.ecx &= !(1 << 20 | 1 << 21),
            0x6 => leaf.eax = 0,
            0x7 => leaf.ebx &= !(1 << 5),
            0x8000_0008 => leaf.eax = 0x3027,
            _ => {}
        }
    }
    let lacking = table(CpuModel::V3, &host).unwrap_err();
    let physical = "40 bits of physical addresses (it has 39)";
    assert_eq!(lacking, ["sse4_2", "avx2", "arat", "x2apic", physical]);
    assert_eq!(table(CpuModel::Host, &host), Ok(host), "what there is will do");
}

#[test]
fn a_level_below_goes_to_every_host_and_a_whole_host_only_to_its_like() {
    let (old, young) = (read("host-intel"), read("host-intel-tiles"));
    for model in LEVELS {
        let guest = of_all(model, &young, &[], 2, false).unwrap();
        assert_eq!(reasons(&guest[1], &offered(&old, &[], false)), Vec::<String>::new(), "{model}");
    }
    let told = reasons(&of_one(&young, 0, 1, false), &offered(&old, &[], false));
    assert!(told[0].starts_with("CPU: the source's guest has "), "{told:?}");
    for name in ["la57", "avx512_bf16", "amx_tile", "xsave:tiledata"] {
        assert!(told[0].contains(name), "{name} is not in {told:?}");
    }
    assert!(told.iter().any(|reason| reason.contains("leaf 0x1d.0x1")), "{told:?}");
}

/// What `kvm_pvm` puts back it has, what it hides from kernels it has not.
#[test]
fn a_paravirtual_host_offers_what_it_can_keep() {
    let supported = [leaf(1, 0, [0, 0, CX16 | HYPERVISOR, 1]), leaf(0x8000_0001, 0, [0, 0, 1, RDTSCP])];
    let put_back = [leaf(1, 0, [0, 0, CX16 | 1, 1]), leaf(7, 0, [0, 32, 0, 0])];
    let told = |paravirtual| names(&offered(&supported, &put_back, paravirtual)).join(" ");
    assert_eq!(told(false), "fpu ht sse3 cx16 hypervisor avx2 rdtscp lahf_lm");
    assert_eq!(told(true), "fpu ht sse3 hypervisor avx2 lahf_lm");
    let mut put_back = put_back.to_vec();
    put_back[0].ecx |= feature::OSXSAVE;
    put_back.push(leaf(0xd, 0, [7, 832, 832, 0]));
    put_back
        .iter_mut()
        .for_each(|leaf| forget_the_moment(leaf, &[super::tests::leaf(0xd, 0, [7, 576, 832, 0])]));
    assert_eq!((put_back[0].ecx, put_back[2].ebx), (CX16 | 1, 576));
}

#[test]
fn tables_from_elsewhere_are_looked_at() {
    let good = of_one(&read("host-amd"), 3, 4, false);
    assert_eq!(check(&good, 3), Ok(()));
    assert_eq!(check(&good, 2), Err("its CPUID says that it is processor 3".to_owned()));
    let twice = [good.clone(), vec![good[1].clone()]].concat();
    assert!(check(&twice, 3).unwrap_err().contains("a leaf twice"));
    assert_eq!(check(&[], 0), Err("its CPUID has no leaf 1".to_owned()));
}

#[test]
fn leaves_are_the_same_through_text() {
    let leaf = leaf(0x8000_001d, 3, [1, 0xfff, 0, u32::MAX]);
    assert_eq!(leaf.to_text(), "8000001d.3 eax=00000001 ebx=00000fff ecx=00000000 edx=ffffffff");
    assert_eq!(CpuidLeaf::from_text(&leaf.to_text()), Some(leaf));
    for text in [
        "",
        "1.0",
        "1.0 eax=1 ebx=1 ecx=1",
        "1.0 eax=1 ebx=1 ecx=1 edx=x",
        "1.0 eax=1 ebx=1 ecx=1 edx=1 more=2",
    ] {
        assert_eq!(CpuidLeaf::from_text(text), None, "{text}");
    }
}

/// On an ordinary host both are the same; where KVM puts features back they are named.
#[test]
fn kvm_says_what_it_was_told_or_what_it_put_back() {
    let host = Host::open().expect("these tests need /dev/kvm");
    let vm = crate::kvm::Vm::new(&host).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let raw = host.fd().get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    for leaf in raw.as_slice() {
        let ours = entry(&CpuidLeaf { function: leaf.function, index: leaf.index, ..Default::default() });
        assert_eq!(ours.flags, leaf.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX, "leaf {:#x}", leaf.function);
    }
    let table = table(CpuModel::V1, &supported(&host).unwrap()).unwrap();
    let real = set(&vcpu, 0, &of_one(&table, 0, 1, host.is_paravirtual())).unwrap();
    let put_back = lacking(&real, &table);
    println!("x86-64-v1 on this host also has: {}", listed(&put_back));
    assert!(host.is_paravirtual() || put_back.is_empty(), "{put_back:?}");
    assert_eq!(set(&vcpu, 0, &real).unwrap(), real, "what was read back is held");
}
