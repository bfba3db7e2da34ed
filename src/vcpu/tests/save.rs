//! Saving in one VM and restoring into another.

use super::TestGuest;
use super::run::two_processors;
use crate::kvm::{Error, GuestTime, Host, HostTime};
use crate::vcpu::VcpuState;
use crate::vcpu::state::{CpuidLeaf, ExtendedControl, Msr};

/// Counts in EBX and writes each number to port 0x10.
const COUNT: [u8; 7] = [
    0x43, // inc ebx
    0x89, 0xd8, // mov eax, ebx
    0xe7, 0x10, // out 0x10, eax
    0xeb, 0xf9, // jmp back
];

/// Writes the time stamp counter to port 0x10, low half first, for ever.
const READ_TSC: [u8; 10] = [
    0x0f, 0x31, // rdtsc
    0xe7, 0x10, // out 0x10, eax
    0x89, 0xd0, // mov eax, edx
    0xe7, 0x10, // out 0x10, eax
    0xeb, 0xf6, // jmp back
];

#[test]
fn a_guest_continues_in_another_vm_where_it_stopped() {
    let source = TestGuest::new(1, &COUNT);
    source.vcpus.resume().unwrap();
    let mut last = source.next_value();
    while last < 0x1234 + 100 {
        last = source.next_value();
    }
    source.vcpus.pause().unwrap();
    last = source
        .port_backlog()
        .last()
        .map_or(last, |(_, data)| u32::from_le_bytes(data.as_slice().try_into().unwrap()));
    let states = source.vcpus.save_states().unwrap();
    assert_same(&source.vcpus.save_states().unwrap(), &states);

    let destination = TestGuest::new(1, &[]);
    destination.copy_memory(&source);
    destination.vcpus.restore_states(&through_bytes(&states), 0).unwrap();
    assert_same(&destination.vcpus.save_states().unwrap(), &states);
    destination.vcpus.resume().unwrap();
    for expected in last + 1..last + 100 {
        assert_eq!(destination.next_value(), expected);
    }
}

/// Names what differs, instead of printing thousands of bytes.
fn assert_same(found: &[VcpuState], expected: &[VcpuState]) {
    let lines = |states| format!("{states:#x?}").lines().map(str::to_owned).collect::<Vec<_>>();
    let (left, right) = (lines(found), lines(expected));
    let differences: Vec<_> =
        (1..).zip(left.iter().zip(&right)).filter(|(_, (left, right))| left != right).take(20).collect();
    assert!(differences.is_empty(), "line, (found, expected): {differences:#?}");
    assert!(found == expected);
}

fn through_bytes(states: &[VcpuState]) -> Vec<VcpuState> {
    states.iter().map(|state| vmstate::from_bytes(&vmstate::to_bytes(state), 1).unwrap()).collect()
}

/// Every kind of register with a value that power-on does not give.
#[test]
fn every_register_arrives() {
    let guest = TestGuest::new(1, &COUNT);
    let before = guest.vcpus.save_states().unwrap();
    let mut states = before.clone();
    let state = &mut states[0];
    state.registers.r15 = 0xfedc_ba98_7654_3210;
    state.registers.rflags |= 0x400;
    state.system.fs.base = 0x7fff_0000_1000;
    state.system.cr2 = 0xdead_b000;
    state.system.cr8 = 5;
    // XMM7 is at 160 + 7 * 16; bit 1 of the XSAVE header's first word says that SSE state is there.
    state.xsave[160 + 112..160 + 128].copy_from_slice(&[0xa5; 16]);
    state.xsave[512] |= 3;
    state.debug.breakpoints = [0x1000, 0x2000, 0x3000, 0x4000];
    state.debug.dr7 |= 1;
    // Task priority, which CR8 shows as well, and the processor priority that follows; the spurious vector with the APIC
    // enabled; the timer's vector, and its mode in which the deadline below has a meaning.
    state.lapic[0x80] = 0x50;
    state.lapic[0xa0] = 0x50;
    state.lapic[0xf0..0xf2].copy_from_slice(&[0xff, 1]);
    state.lapic[0x320..0x323].copy_from_slice(&[0x31, 0, 0x04]);
    state.events.nmi_masked = 1;
    state.events.interrupt_shadow = 1;
    state.mp_state = kvm_bindings::KVM_MP_STATE_HALTED;
    state.extended_controls[0].value = 3;
    // A guest keeps what it has seen: the first letters of the processor's name.
    let name = state.cpuid.iter_mut().find(|leaf| leaf.function == 0x8000_0002).unwrap();
    name.eax = u32::from_le_bytes(*b"ferr");
    let mut changed = 0;
    for msr in &mut state.msrs {
        match msr.index {
            // SYSENTER_CS, PAT, STAR, LSTAR, FMASK, KERNEL_GS_BASE, first variable and one fixed MTRR, a timer that fires in
            // days.
            0x174 => msr.value = 0x10,
            0x277 => msr.value = 0x0007_0406_0007_0406,
            0xc000_0081 => msr.value = 0x0023_0010_0000_0000,
            0xc000_0082 => msr.value = 0xffff_ffff_8123_4560,
            0xc000_0084 => msr.value = 0x4_7700,
            0xc000_0102 => msr.value = 0xffff_8880_0000_1000,
            0x200 => msr.value = 0xc000_0000,
            0x258 => msr.value = 0x0606_0606_0606_0606,
            0x6e0 => msr.value = 1 << 50,
            _ => continue,
        }
        changed += 1;
    }
    assert_eq!(changed, 9, "{:x?}", before[0].msrs.iter().map(|msr| msr.index).collect::<Vec<_>>());

    let other = TestGuest::new(1, &COUNT);
    other.vcpus.restore_states(&through_bytes(&states), 0).unwrap();
    assert_same(&other.vcpus.save_states().unwrap(), &states);
}

#[test]
fn a_processor_that_waits_for_its_start_message_still_waits_elsewhere() {
    let source = two_processors();
    let states = source.vcpus.save_states().unwrap();
    assert_eq!(states[1].mp_state, kvm_bindings::KVM_MP_STATE_UNINITIALIZED);
    let destination = TestGuest::new(2, &[]);
    destination.copy_memory(&source);
    destination.vcpus.restore_states(&states, 0).unwrap();
    destination.vcpus.resume().unwrap();
    assert_eq!(destination.next_port(), (0, vec![0x42]));
}

#[test]
fn reset_brings_back_power_on() {
    let guest = TestGuest::new(2, &COUNT);
    guest.vcpus.resume().unwrap();
    let first = guest.next_value();
    guest.vcpus.pause().unwrap();
    guest.vcpus.reset().unwrap();
    guest.port_backlog();
    guest.boot();
    guest.vcpus.resume().unwrap();
    assert_eq!(guest.next_value(), first);
}

fn host_tsc() -> u64 {
    HostTime::now().unwrap().tsc
}

fn guest_tsc(guest: &TestGuest) -> u64 {
    let low = u64::from(guest.next_value());
    low | u64::from(guest.next_value()) << 32
}

/// The guest's TSC is the host's plus the offset, before and after: a stop costs it exactly the time that passed.
#[test]
fn a_live_move_on_one_host_keeps_the_time_stamp_counter() {
    let source = TestGuest::new(1, &READ_TSC);
    source.vcpus.resume().unwrap();
    guest_tsc(&source);
    source.vcpus.pause().unwrap();
    let states = source.vcpus.save_states().unwrap();
    let clock = source.vm.save_clock(source.vcpus.tsc_khz()).unwrap();

    let destination = TestGuest::new(1, &READ_TSC);
    let plan = clock.plan(&HostTime::now().unwrap(), GuestTime::Live).unwrap();
    destination.vm.restore_clock(&plan).unwrap();
    destination.vcpus.restore_states(&states, plan.tsc_shift).unwrap();
    destination.boot();
    let earliest = host_tsc();
    destination.vcpus.resume().unwrap();
    let seen = guest_tsc(&destination).wrapping_sub(states[0].tsc_offset);
    assert!((earliest..=host_tsc()).contains(&seen), "{earliest} <= {seen}");
}

/// Restored from a file, the guest's TSC goes on from the moment of the save. Where KVM cannot offset it (no VMX or SVM,
/// `kvm_pvm`), the guest sees the host's, before and after.
#[test]
fn in_a_file_the_time_stamp_counter_stands_still() {
    let guest = TestGuest::new(1, &READ_TSC);
    guest.vcpus.resume().unwrap();
    let before = guest_tsc(&guest);
    guest.vcpus.pause().unwrap();
    let states = guest.vcpus.save_states().unwrap();
    let clock = guest.vm.save_clock(guest.vcpus.tsc_khz()).unwrap();
    let saved = clock.host_tsc.wrapping_add(states[0].tsc_offset);
    assert!(saved > before);

    let restored = TestGuest::new(1, &READ_TSC);
    let now = HostTime::now().unwrap();
    let plan = clock.plan(&now, GuestTime::File).unwrap();
    restored.vcpus.restore_states(&states, plan.tsc_shift).unwrap();
    let offset = restored.vcpus.save_states().unwrap()[0].tsc_offset;
    restored.boot();
    restored.vcpus.resume().unwrap();
    let seen = guest_tsc(&restored);
    let host = host_tsc();
    if Host::open().unwrap().is_paravirtual() {
        println!("kvm_pvm: the guest's TSC is the host's; its offset cannot be tested");
        assert_eq!(offset, 0);
        assert!((now.tsc..=host).contains(&seen), "{} <= {seen} <= {host}", now.tsc);
    } else {
        let passed = host - now.tsc;
        assert_eq!(offset, states[0].tsc_offset.wrapping_add(plan.tsc_shift));
        assert!((saved..=saved + passed).contains(&seen), "{saved} <= {seen} <= {saved} + {passed}");
    }
}

#[test]
fn state_that_does_not_fit_is_refused_by_field() {
    let guest = TestGuest::new(1, &COUNT);
    let good = guest.vcpus.save_states().unwrap();
    type Fault = fn(&mut VcpuState);
    let faults: [(&str, Fault); 43] = [
        ("it is of vCPU 1", |s| s.index = 1),
        ("bytes, this host's", |s| s.xsave.truncate(100)),
        ("xsave has", |s| s.xsave = vec![0; 70_000]),
        ("extended_controls has 17", |s| s.extended_controls = vec![ExtendedControl::default(); 17]),
        ("system.cs.kind is 16", |s| s.system.cs.kind = 16),
        ("system.ds.present is 2", |s| s.system.ds.present = 2),
        ("system.es.dpl is 4", |s| s.system.es.dpl = 4),
        ("system.fs.db is 2", |s| s.system.fs.db = 2),
        ("system.gs.s is 2", |s| s.system.gs.s = 2),
        ("system.ss.l is 2", |s| s.system.ss.l = 2),
        ("system.tr.g is 2", |s| s.system.tr.g = 2),
        ("system.ldt.avl is 2", |s| s.system.ldt.avl = 2),
        ("system.ldt.unusable is 2", |s| s.system.ldt.unusable = 2),
        ("system.interrupt_bitmap has 2", |s| s.system.interrupt_bitmap = [1, 1, 0, 0]),
        ("events.exception_injected is 2", |s| s.events.exception_injected = 2),
        ("events.exception_number is 32", |s| s.events.exception_number = 32),
        ("events.exception_has_error_code is 2", |s| s.events.exception_has_error_code = 2),
        ("events.exception_pending is 2", |s| s.events.exception_pending = 2),
        ("events.exception_has_payload is 2", |s| s.events.exception_has_payload = 2),
        ("events.interrupt_injected is 2", |s| s.events.interrupt_injected = 2),
        ("events.interrupt_soft is 2", |s| s.events.interrupt_soft = 2),
        ("events.interrupt_shadow is 4", |s| s.events.interrupt_shadow = 4),
        ("events.nmi_injected is 2", |s| s.events.nmi_injected = 2),
        ("events.nmi_pending is 2", |s| s.events.nmi_pending = 2),
        ("events.nmi_masked is 2", |s| s.events.nmi_masked = 2),
        ("events.smm is 1", |s| s.events.smm = 1),
        ("events.smi_pending is 1", |s| s.events.smi_pending = 1),
        ("events.smm_inside_nmi is 1", |s| s.events.smm_inside_nmi = 1),
        ("events.latched_init is 2", |s| s.events.latched_init = 2),
        ("events.triple_fault_pending is 2", |s| s.events.triple_fault_pending = 2),
        ("events.flags is", |s| s.events.flags |= 0x8000),
        ("events.sipi_vector is 0x100", |s| s.events.sipi_vector = 0x100),
        ("mp_state is 5", |s| s.mp_state = 5),
        ("its TSC runs at", |s| s.tsc_khz += s.tsc_khz / 1000),
        ("its TSC runs at 0", |s| s.tsc_khz = 0),
        ("it is processor 7", |s| leaf(s).ebx |= 7 << 24),
        ("its CPUID has no leaf 1", |s| leaf(s).function = 0x99),
        ("its CPUID has no leaf 1", |s| s.cpuid.clear()),
        ("its CPUID has a leaf twice", |s| s.cpuid.push(s.cpuid[1].clone())),
        ("in MSR 0x12345678", |s| s.msrs.push(Msr { index: 0x1234_5678, value: 1 })),
        ("in MSR 0xc0000082", |s| s.msrs = vec![Msr { index: 0xc000_0082, value: 1 << 63 }]),
        ("KVM: cannot set", |s| s.system.cr4 = u64::MAX),
        ("KVM: cannot set", |s| s.extended_controls = vec![ExtendedControl { index: 0, value: 0 }]),
    ];
    for (expected, fault) in faults {
        let mut states = good.clone();
        fault(&mut states[0]);
        let error = guest.vcpus.restore_states(&states, 0).expect_err(expected);
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }
    assert!(matches!(guest.vcpus.restore_states(&[], 0), Err(Error::StateCount { saved: 0, here: 1 })));
    guest.vcpus.restore_states(&good, 0).unwrap();
    assert_same(&guest.vcpus.save_states().unwrap(), &good);
    guest.vcpus.resume().unwrap();
    guest.next_value();
}

fn leaf(state: &mut VcpuState) -> &mut CpuidLeaf {
    state.cpuid.iter_mut().find(|leaf| leaf.function == 1).unwrap()
}

/// KVM takes a CPUID only before the vCPU has run, and takes its time for it: a guest that is about to arrive has had it set, and read
/// back, before it was stopped. Where KVM gives more than it was asked for, what comes with the guest is what was asked for.
#[test]
fn a_processor_that_was_adopted_is_not_set_again_when_the_guest_comes() {
    let guest = TestGuest::new(1, &COUNT);
    let mut table = guest.vcpus.cpuid().unwrap().remove(0);
    let leaf = table.iter_mut().find(|leaf| (leaf.function, leaf.index) == (7, 0)).unwrap();
    leaf.ebx = 0;
    guest.vcpus.adopt(std::slice::from_ref(&table)).unwrap();
    guest.vcpus.resume().unwrap();
    guest.next_value();
    guest.vcpus.pause().unwrap();
    let mut states = guest.vcpus.save_states().unwrap();
    states[0].cpuid_count = table.len() as u32;
    states[0].cpuid = table.clone();
    guest.vcpus.restore_states(&states, 0).unwrap();
    // What was not granted is asked for.
    let leaf = states[0].cpuid.iter_mut().find(|leaf| (leaf.function, leaf.index) == (7, 0)).unwrap();
    leaf.ebx = u32::MAX;
    guest.vcpus.restore_states(&states, 0).unwrap_err();
}
