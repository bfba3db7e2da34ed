//! The tables of the Intel MultiProcessor Specification 1.4, for guests without ACPI.

use bus::GuestMemory;
use vm_memory::GuestAddress;

use super::Error;
use crate::layout::{IOAPIC_START, LAPIC_START, pci_gsi};

/// In the first KiB, where the specification lets systems look (4).
const FLOATING_POINTER: GuestAddress = GuestAddress(0x200);
const CONFIGURATION: GuestAddress = GuestAddress(0xf_0000);
const MAXIMUM_BYTES: usize = 0x1_0000;
const HEADER_BYTES: usize = 44;
const SPECIFICATION: u8 = 4;
/// Local APICs integrated into the processor.
const LOCAL_APIC_VERSION: u8 = 0x14;
/// Family 6; an FPU and an APIC. Systems ask the processor itself.
const PROCESSOR_SIGNATURE: u32 = 0x600;
const PROCESSOR_FEATURES: u32 = 0x201;
const IOAPIC_VERSION: u8 = 0x11;
/// What the I/O APIC of KVM reads.
const IOAPIC_ID: u8 = 0;
const PCI_BUS: u8 = 0;
const ISA_BUS: u8 = 1;
const ISA_INTERRUPTS: u8 = 16;
/// Interrupt types (table 4-10).
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;
const ALL_LOCAL_APICS: u8 = 0xff;

/// The configuration table for `cpus` processors.
pub(super) fn configuration(cpus: u8) -> Vec<u8> {
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for cpu in 0..cpus {
        // Enabled; the first is the boot processor.
        let flags = if cpu == 0 { 0b11 } else { 0b01 };
        let mut entry = vec![0, cpu, LOCAL_APIC_VERSION, flags];
        entry.extend(PROCESSOR_SIGNATURE.to_le_bytes());
        entry.extend(PROCESSOR_FEATURES.to_le_bytes());
        entry.extend([0; 8]);
        entries.push(entry);
    }
    for (bus, name) in [(PCI_BUS, b"PCI   "), (ISA_BUS, b"ISA   ")] {
        entries.push([&[1, bus], &name[..]].concat());
    }
    entries.push([&[2, IOAPIC_ID, IOAPIC_VERSION, 1], &(IOAPIC_START as u32).to_le_bytes()[..]].concat());
    // KVM routes interrupt n to pin n of the I/O APIC, the timer's too: pin 0, not 2 as on PCs.
    for number in 0..ISA_INTERRUPTS {
        entries.push(vec![3, VECTORED, 0, 0, ISA_BUS, number, IOAPIC_ID, number]);
    }
    // INTA# of each slot: level and active low, as the bus has it. The source holds the slot above two bits for the pin (D.3).
    for slot in 0..pci::SLOTS {
        entries.push(vec![3, VECTORED, 0, 0, PCI_BUS, slot << 2, IOAPIC_ID, pci_gsi(slot) as u8]);
    }
    entries.push(vec![4, EXTERNAL, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.push(vec![4, NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);

    let count = entries.len() as u16;
    let body = entries.concat();
    let mut table = Vec::with_capacity(HEADER_BYTES + body.len());
    table.extend(b"PCMP");
    table.extend(((HEADER_BYTES + body.len()) as u16).to_le_bytes());
    table.extend([SPECIFICATION, 0]);
    table.extend(b"FERRY   ");
    table.extend(b"FERRY       ");
    // No OEM table.
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend((LAPIC_START as u32).to_le_bytes());
    // No extended entries.
    table.extend([0; 4]);
    table.extend(body);
    table[7] = checksum(&table);
    table
}

/// The floating pointer structure to the configuration table.
pub(super) fn floating_pointer() -> [u8; 16] {
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(CONFIGURATION.0 as u32).to_le_bytes());
    // One paragraph long. Feature bytes 0: a table is there; interrupts begin in virtual wire mode.
    (pointer[8], pointer[9]) = (1, SPECIFICATION);
    pointer[10] = checksum(&pointer);
    pointer
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// Writes both.
pub(super) fn write(memory: &GuestMemory, cpus: u8) -> Result<(), Error> {
    let table = configuration(cpus);
    if table.len() > MAXIMUM_BYTES {
        return Err(Error::TablesSize { what: "MP", cpus, length: table.len(), maximum: MAXIMUM_BYTES });
    }
    super::write(memory, "the MP configuration table", CONFIGURATION, &table)?;
    super::write(memory, "the MP floating pointer", FLOATING_POINTER, &floating_pointer())
}
