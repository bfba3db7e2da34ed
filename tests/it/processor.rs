//! Which processor a guest sees, what it takes along, and who takes it.

use std::collections::BTreeSet;

use exerciser::report::{CPUID, Counters, Line};
use ferry::control::FerryCpu;
use ferry::kvm::Host;
use ferry::vcpu::{CpuidLeaf, feature_names};
use serde_json::json;
use support::{Vm, WATCHDOG};

use crate::guest::{BUSY, EXERCISER, bed, many_disks, one_disk};
use crate::load::moves;

/// Names of what CPUID tells a ring of the guest.
fn seen(vm: &Vm, ring: u64) -> BTreeSet<String> {
    let started = |line: &str| (Line::parse(line).kind == "start").then_some(());
    vm.process
        .wait_for_line("the start of the guest's work", 0, WATCHDOG, started)
        .expect("the guest starts");
    let lines = vm.process.console.all();
    let lines = lines.iter().map(|line| Line::parse(line)).filter(|line| line.kind == CPUID);
    let leaf = |line: Line<'_>| {
        let number = |name| u32::try_from(line.number(name).expect("a number")).expect("32 bits");
        CpuidLeaf {
            function: number("leaf"),
            index: number("subleaf"),
            eax: number("eax"),
            ebx: number("ebx"),
            ecx: number("ecx"),
            edx: number("edx"),
        }
    };
    let leaves: Vec<_> = lines.filter(|line| line.number("ring") == Some(ring)).map(leaf).collect();
    assert!(!leaves.is_empty(), "the guest prints what CPUID says");
    feature_names(&leaves).into_iter().collect()
}

/// What the machine says of its processor.
fn told(vm: &mut Vm) -> FerryCpu {
    vm.status().cpu.expect("there is a machine")
}

/// Of `names`, those that the exerciser reads: the other leaves are not its business.
fn read_by_the_guest(names: &[String]) -> BTreeSet<String> {
    let elsewhere = |name: &str| {
        name.starts_with("kvm_") || matches!(name, "arat" | "nonstop_tsc") || ELSEWHERE.contains(&name)
    };
    names.iter().filter(|name| !elsewhere(name)).cloned().collect()
}

/// Features of leaves 0x7.2, 0x80000008 and 0x80000021.
const ELSEWHERE: [&str; 40] = [
    "intel_psfd",
    "ipred_ctrl",
    "rrsba_ctrl",
    "ddpd_u",
    "bhi_ctrl",
    "mcdt_no",
    "clzero",
    "irperf",
    "xsaveerptr",
    "rdpru",
    "wbnoinvd",
    "amd_ibpb",
    "amd_ibrs",
    "amd_stibp",
    "amd_stibp_always_on",
    "ibrs_same_mode",
    "amd_ppin",
    "amd_ssbd",
    "virt_ssbd",
    "amd_ssb_no",
    "cppc",
    "amd_psfd",
    "btc_no",
    "ibpb_ret",
    "no_nested_data_bp",
    "lfence_rdtsc",
    "verw_clear",
    "null_sel_clr_base",
    "autoibrs",
    "no_smm_ctl_msr",
    "prefetchi",
    "sbpb",
    "ibpb_brtype",
    "srso_no",
    "srso_user_kernel_no",
    "tsa_sq_no",
    "tsa_l1_no",
    "CPUID.0x80000021.0x0.Ecx[7]",
    "CPUID.0x80000008.0x0.Ebx[28]",
    "avx10",
];

#[test]
fn the_machine_says_what_the_guest_sees() {
    for model in ["host", "x86-64-v2"] {
        let bed = bed();
        let machine = one_disk(&bed).flag("--cpu", model);
        let mut vm = machine.boot(&bed, "guest", EXERCISER, "queues=1 cpuid=show");
        let cpu = told(&mut vm);
        assert_eq!(cpu.model.as_deref(), Some(model));
        assert_eq!(read_by_the_guest(&cpu.features), seen(&vm, 0), "what ring 0 sees of {model}");
        let everything = [cpu.features.clone(), cpu.user_features.clone()].concat();
        assert_eq!(read_by_the_guest(&everything), seen(&vm, 3), "what ring 3 sees of {model}");
        if Host::open().expect("these tests need /dev/kvm").is_paravirtual() {
            println!(
                "kvm_pvm: masks do not hold; {model} also has {:?}, programs see {:?}",
                cpu.unmasked, cpu.user_features
            );
            assert!(!cpu.user_features.is_empty(), "programs see what kernels do not");
            let says = |line: &str| line.contains("does not hold CPUID masks").then_some(());
            if !cpu.unmasked.is_empty() {
                vm.process.log.wait_for(0, WATCHDOG, says).expect("the log says so");
            }
        } else {
            assert_eq!((cpu.unmasked, cpu.user_features), (Vec::new(), Vec::new()), "masks hold");
        }
        vm.finish();
    }
}

/// There, on to a host that would give a guest more, and back to one that would give it less: it keeps what it has seen.
#[test]
fn a_guest_keeps_its_processor_wherever_it_goes() {
    for models in [["x86-64-v2", "x86-64-v2", "host"], ["host", "x86-64-v2", "host"]] {
        let bed = bed();
        let machine = many_disks(&bed);
        let [first, others @ ..] = models;
        let mut here = machine.clone().flag("--cpu", first).boot(&bed, "process-0", EXERCISER, BUSY);
        let features = told(&mut here).features;
        let mut done = Counters::default();
        for (hop, model) in (1..).zip(others) {
            let uri = format!("unix:{}", bed.path(&format!("move-{hop}")).display());
            let mut there =
                machine.clone().flag("--cpu", model).expect(&bed, &format!("process-{hop}"), &uri);
            done = moves(&mut here, &mut there, &done).0;
            let cpu = told(&mut there);
            assert_eq!((cpu.model, &cpu.features), (None, &features), "{models:?}");
            here.execute("quit", json!({}));
            assert_eq!(here.exit().code(), Some(0));
            here = there;
        }
        here.finish();
    }
}

/// A level that the host lacks is refused at the start with all that is missing, and any other starts.
#[test]
fn a_level_that_the_host_lacks_is_refused() {
    for model in ["x86-64-v3", "x86-64-v4"] {
        let bed = bed();
        let machine =
            one_disk(&bed).flag("--cpu", model).flag("--kernel", EXERCISER).flag("--cmdline", "ios=10");
        let api = bed.path("vm.api").display().to_string();
        let arguments = [&["run".to_owned(), "--api".to_owned(), api], machine.flags()].concat();
        let mut process = bed.ferry("vm", &arguments);
        let exit = process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}"));
        if exit.code() == Some(0) {
            println!("this host has {model}");
            continue;
        }
        let refusal = format!("--cpu {model}: this host's KVM lacks ");
        let says = |line: &str| line.split_once(&refusal).map(|(_, lacking)| lacking.to_owned());
        let (lacking, _) = process.log.wait_for(0, WATCHDOG, says).expect("the refusal says what is missing");
        println!("this host lacks for {model}: {lacking}");
        assert_eq!(exit.code(), Some(1));
        if Host::open().expect("these tests need /dev/kvm").is_paravirtual() {
            assert!(
                lacking.contains("abm"),
                "kvm_pvm interprets LZCNT as BSR, and does not offer it: {lacking}"
            );
        }
    }
}
