//! What the exerciser needs of the processor and the chipset. The guest implements it with instructions, the
//! tests with a model.

use crate::mmio::Registers;

/// Ports, time stamp counter, interrupts and device registers of the machine under the exerciser.
pub trait Machine {
    /// Reads one byte from an I/O port.
    fn read_port8(&mut self, port: u16) -> u8;
    /// Writes one byte to an I/O port.
    fn write_port8(&mut self, port: u16, value: u8);
    /// Writes two bytes to an I/O port.
    fn write_port16(&mut self, port: u16, value: u16);
    /// Reads four bytes from an I/O port.
    fn read_port32(&mut self, port: u16) -> u32;
    /// Writes four bytes to an I/O port.
    fn write_port32(&mut self, port: u16, value: u32);
    /// Writes the bytes one after the other to an 8-bit port, in one instruction.
    fn write_string(&mut self, port: u16, bytes: &[u8]);
    /// Time stamp counter.
    fn tsc(&self) -> u64;
    /// CPUID as ring 0 sees it: eax, ebx, ecx, edx.
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// CPUID as ring 3 sees it, which some KVM cannot mask.
    fn user_cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// Writes a model-specific register.
    fn write_msr(&mut self, register: u32, value: u64);
    /// How many times the interrupt `vector` has arrived.
    fn interrupts(&self, vector: u8) -> u64;
    /// How many interrupts have arrived in all.
    fn interrupt_total(&self) -> u64;
    /// Halts until an interrupt arrives; returns at once if one came since `interrupt_total` returned `seen`.
    fn halt(&mut self, seen: u64);
    /// Identifier of the processor's local APIC.
    fn apic_id(&mut self) -> u8 {
        (self.cpuid(1, 0)[1] >> 24) as u8
    }
    /// The device registers at a physical address.
    ///
    /// # Errors
    ///
    /// None when the range is outside what the exerciser can reach (4 GiB).
    fn registers(&mut self, address: u64, length_bytes: usize) -> Option<Registers>;
}
