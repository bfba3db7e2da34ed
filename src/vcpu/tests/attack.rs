//! A vCPU's saved state, bit by bit, up to where the host's KVM would judge the rest.

use crate::attack::attack;
use crate::vcpu::VcpuState;
use crate::vcpu::state::*;

/// The state of a vCPU that was made from `state`.
fn through_kvm(state: &VcpuState) -> VcpuState {
    VcpuState {
        registers: Registers::from_kvm(&state.registers.to_kvm()),
        system: SystemRegisters::from_kvm(&state.system.to_kvm()),
        extended_controls: extended_controls(&kvm_extended_controls(&state.extended_controls)),
        lapic: lapic_bytes(&kvm_lapic(&state.lapic)),
        events: EventState::from_kvm(&state.events.to_kvm()),
        debug: DebugRegisters::from_kvm(&state.debug.to_kvm()),
        mp_state: kvm_mp(state.mp_state).mp_state,
        ..state.clone()
    }
}

#[test]
fn a_vcpu_is_what_its_state_says_or_refused() {
    let xsave = vec![0xa5; 8];
    let extended_controls = vec![ExtendedControl { index: 0, value: 7 }];
    let msrs = vec![Msr { index: 0x10, value: 1 }, Msr { index: 0x277, value: 0x0007_0406_0007_0406 }];
    let cpuid = vec![CpuidLeaf { function: 1, ecx: 1 << 21, ..CpuidLeaf::default() }];
    let good = VcpuState {
        index: 1,
        registers: Registers { rip: 0xffff_ffff_8100_0000, rflags: 2, ..Registers::default() },
        system: SystemRegisters { cr0: 0x8005_0033, ..SystemRegisters::default() },
        xsave_bytes: xsave.len() as u32,
        xsave,
        extended_control_count: extended_controls.len() as u32,
        extended_controls,
        msr_count: msrs.len() as u32,
        msrs,
        lapic: [0; LAPIC_BYTES],
        events: EventState { interrupt_shadow: 1, ..EventState::default() },
        debug: DebugRegisters { dr6: 0xffff_0ff0, dr7: 0x400, ..DebugRegisters::default() },
        mp_state: 0,
        tsc_khz: 2_000_000,
        tsc_offset: 1 << 63,
        cpuid_count: cpuid.len() as u32,
        cpuid,
    };
    assert_eq!(through_kvm(&good), good);
    attack(&good, |state| state.check().ok().map(|()| through_kvm(state)));
}
