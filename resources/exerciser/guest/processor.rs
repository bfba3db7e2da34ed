//! Instructions: ports, the time stamp counter, and the gate to ring 0.

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, _rdtsc, CpuidResult};
use core::sync::atomic::{AtomicU64, Ordering};

use exerciser::machine::Machine;
use exerciser::mmio::Registers;

/// What the page tables map, in bytes.
pub const REACH: u64 = 4 << 30;

unsafe extern "C" {
    /// Arrivals of each vector, counted by ring 0 (entry.s).
    static interrupt_counts: [AtomicU64; 256];
    static interrupt_total: AtomicU64;
    /// Asks ring 0: 0 cpuid, 1 rdmsr, 2 wrmsr, 3 halt. Registers: rax, rbx, rcx, rdx.
    fn gate(what: u64, registers: *mut [u64; 4]);
}

const GATE_CPUID: u64 = 0;
const GATE_WRITE_MSR: u64 = 2;
const GATE_HALT: u64 = 3;

fn ask(what: u64, mut registers: [u64; 4]) -> [u64; 4] {
    // SAFETY: entry.s keeps every register and reads and writes the four values only.
    unsafe { gate(what, &raw mut registers) };
    registers
}

/// Reads a byte of physical memory.
pub fn read_byte(address: u64) -> Option<u8> {
    let byte = core::ptr::with_exposed_provenance::<u8>(address as usize);
    // SAFETY: all below REACH is mapped; any byte is valid, and the loader's tables are not in Rust's memory.
    (address < REACH).then(|| unsafe { byte.read_volatile() })
}

/// The one virtual processor.
pub struct Processor;

impl Processor {
    /// Begins to count interrupts: a reset leaves memory as it was.
    pub fn clear_interrupts(&mut self) {
        // SAFETY: entry.s defines both; they are atomics.
        let (counts, total) = unsafe { (&interrupt_counts, &interrupt_total) };
        counts.iter().chain([total]).for_each(|count| count.store(0, Ordering::Relaxed));
    }
}

impl Machine for Processor {
    fn read_port8(&mut self, port: u16) -> u8 {
        let value;
        // SAFETY: port I/O touches no memory; the I/O bitmap allows it.
        unsafe {
            asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
        };
        value
    }

    fn write_port8(&mut self, port: u16, value: u8) {
        // SAFETY: as in `read_port8`.
        unsafe {
            asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
        };
    }

    fn write_port16(&mut self, port: u16, value: u16) {
        // SAFETY: as in `read_port8`.
        unsafe {
            asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags))
        };
    }

    fn read_port32(&mut self, port: u16) -> u32 {
        let value;
        // SAFETY: as in `read_port8`.
        unsafe {
            asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags))
        };
        value
    }

    fn write_port32(&mut self, port: u16, value: u32) {
        // SAFETY: as in `read_port8`.
        unsafe {
            asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags))
        };
    }

    fn write_string(&mut self, port: u16, bytes: &[u8]) {
        // SAFETY: reads the slice only; the direction flag is clear by the ABI.
        unsafe {
            asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _,
                options(readonly, nostack, preserves_flags));
        }
    }

    fn tsc(&self) -> u64 {
        // SAFETY: CR4.TSD is 0.
        unsafe { _rdtsc() }
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        ask(GATE_CPUID, [leaf.into(), 0, subleaf.into(), 0]).map(|register| register as u32)
    }

    fn user_cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let CpuidResult { eax, ebx, ecx, edx } = __cpuid_count(leaf, subleaf);
        [eax, ebx, ecx, edx]
    }

    fn write_msr(&mut self, register: u32, value: u64) {
        ask(GATE_WRITE_MSR, [value & 0xffff_ffff, 0, register.into(), value >> 32]);
    }

    fn interrupts(&self, vector: u8) -> u64 {
        // SAFETY: entry.s defines the table; it is only counted up.
        let counts = unsafe { &interrupt_counts };
        counts[usize::from(vector)].load(Ordering::Acquire)
    }

    fn interrupt_total(&self) -> u64 {
        // SAFETY: as in `interrupts`.
        let total = unsafe { &interrupt_total };
        total.load(Ordering::Acquire)
    }

    fn halt(&mut self, seen: u64) {
        ask(GATE_HALT, [seen, 0, 0, 0]);
    }

    fn registers(&mut self, address: u64, length_bytes: usize) -> Option<Registers> {
        let end = address.checked_add(length_bytes as u64)?;
        let is_reached = end <= REACH && address.is_multiple_of(8);
        // SAFETY: all below REACH is mapped for ever; callers name device registers, which Rust does not own.
        is_reached.then(|| unsafe { Registers::new(address as usize, length_bytes) })
    }
}
