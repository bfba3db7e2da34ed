//! The local APIC: switched on, with a periodic timer where asked. The two 8259 controllers are masked.

use crate::clock::Deadline;
use crate::machine::Machine;

const LOCAL_APIC: u64 = 0xfee0_0000;
const SPURIOUS: usize = 0xf0;
const SPURIOUS_ENABLE: u32 = 1 << 8 | 0xff;
const TIMER: usize = 0x320;
const TIMER_MASKED: u32 = 1 << 16;
const TIMER_PERIODIC: u32 = 1 << 17;
const TIMER_INITIAL: usize = 0x380;
const TIMER_CURRENT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;
const TIMER_DIVIDE_BY_1: u32 = 0b1011;
const PIC_MASK_PORTS: [u16; 2] = [0x21, 0xa1];

/// Vector of the timer.
pub const TIMER_VECTOR: u8 = 0x20;

/// Switches interrupts on, and the timer when `timer_hz` is not 0. False without a local APIC in reach.
pub fn start(machine: &mut dyn Machine, tsc_khz: u64, timer_hz: u32) -> bool {
    PIC_MASK_PORTS.into_iter().for_each(|port| machine.write_port8(port, 0xff));
    let Some(apic) = machine.registers(LOCAL_APIC, 0x1000) else { return false };
    apic.write32(SPURIOUS, SPURIOUS_ENABLE);
    if timer_hz > 0 {
        // How fast it counts is not said anywhere: let it count for a millisecond, or longer where the machine
        // is interrupted in between.
        apic.write32(TIMER_DIVIDE, TIMER_DIVIDE_BY_1);
        apic.write32(TIMER, TIMER_MASKED | u32::from(TIMER_VECTOR));
        apic.write32(TIMER_INITIAL, u32::MAX);
        let start = machine.tsc();
        let deadline = Deadline::new(machine, tsc_khz, 1);
        while !deadline.is_over(machine) {}
        let counted = u64::from(u32::MAX - apic.read32(TIMER_CURRENT));
        let passed = machine.tsc().saturating_sub(start).max(1);
        let initial = counted.saturating_mul(tsc_khz) / passed * 1000 / u64::from(timer_hz);
        apic.write32(TIMER, TIMER_PERIODIC | u32::from(TIMER_VECTOR));
        apic.write32(TIMER_INITIAL, initial.clamp(1, u32::MAX.into()) as u32);
    }
    true
}
