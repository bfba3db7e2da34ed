//! The ACPI tables (ACPI 6.5, chapter 5), but for the DSDT.

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use bus::GuestMemory;
use vm_memory::GuestAddress;

use super::{Error, dsdt, write as write_memory};
use crate::layout::{ACPI_PM_PORT, ACPI_SCI_GSI, ECAM_START, I8042_PORT, IOAPIC_START, LAPIC_START};

pub(super) const OEM_ID: [u8; 6] = *b"FERRY ";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"FERRYVMM";
pub(super) const OEM_REVISION: u32 = 1;

/// "OSPM finds the RSDP ... in the BIOS read-only memory space between 0E0000h and 0FFFFFh" (5.2.5.1).
const RSDP: u64 = 0xe_0000;
/// Up to the MP tables' place.
const MAXIMUM_BYTES: usize = 0x1_0000;
/// Tables follow each other at this alignment: what the FACS asks for (5.2.10).
const ALIGNMENT: usize = 64;

/// MADT flag PCAT_COMPAT: there is a pair of 8259s to be masked.
const DUAL_8259: u32 = 1;
/// IAPC_BOOT_ARCH (5.2.9.3): devices on the LPC bus; no VGA to be probed.
const LEGACY_DEVICES: u16 = 1;
const NO_VGA: u16 = 1 << 2;
/// Command of the keyboard controller that pulses the reset line.
const I8042_RESET: u8 = 0xfe;
/// Interrupt source override of the MADT (5.2.12.5): level, active high.
const LEVEL_ACTIVE_HIGH: u16 = 0b1101;

/// The tables by name, in the order in which they lie in memory, and their addresses.
pub(super) fn build(cpus: u8) -> Vec<(&'static str, u64, Vec<u8>)> {
    let mut tables: Vec<(&'static str, u64, Vec<u8>)> = Vec::new();
    let mut place = |name, bytes: Vec<u8>| {
        let end =
            tables.last().map_or(RSDP + ALIGNMENT as u64, |(_, start, bytes)| start + bytes.len() as u64);
        let start = end.next_multiple_of(ALIGNMENT as u64);
        tables.push((name, start, bytes));
        start
    };
    let facs = place("FACS", encode(&FACS::new()));
    let dsdt = place("DSDT", dsdt::build());
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, 0xff);
    let listed = [
        place("FACP", encode(&fadt(facs, dsdt).finalize())),
        place("APIC", madt(cpus)),
        place("MCFG", encode(&mcfg)),
    ];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    listed.into_iter().for_each(|address| xsdt.add_entry(address));
    let xsdt = place("XSDT", encode(&xsdt));
    tables.insert(0, ("RSDP", RSDP, encode(&Rsdp::new(OEM_ID, xsdt))));
    tables
}

/// Writes all tables; returns the address of the RSDP.
pub(super) fn write(memory: &GuestMemory, cpus: u8) -> Result<u64, Error> {
    let tables = build(cpus);
    let length = tables.last().map_or(0, |(_, start, bytes)| (start - RSDP) as usize + bytes.len());
    if length > MAXIMUM_BYTES {
        return Err(Error::TablesSize { what: "ACPI", cpus, length, maximum: MAXIMUM_BYTES });
    }
    for (_, address, bytes) in &tables {
        write_memory(memory, "the ACPI tables", GuestAddress(*address), bytes)?;
    }
    Ok(RSDP)
}

fn encode(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Fixed hardware: the PM1a registers and the keyboard controller's reset. There is no power management timer, no
/// general purpose event and, with the machine in ACPI mode from the start, no SMI command port.
fn fadt(facs: u64, dsdt: u64) -> FADTBuilder {
    let io = |bits, size, port: u16| GAS::new(AddressSpace::SystemIo, bits, 0, size, port.into());
    let control = ACPI_PM_PORT + 4;
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .firmware_ctrl_32(facs as u32)
        .dsdt_32(dsdt as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // Neither button is fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = (ACPI_SCI_GSI as u16).into();
    fadt.pm1a_evt_blk = u32::from(ACPI_PM_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(control).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_evt_blk = io(32, AccessSize::WordAccess, ACPI_PM_PORT);
    fadt.x_pm1a_cnt_blk = io(16, AccessSize::WordAccess, control);
    // More than 100 and 1000 microseconds: no C2, no C3.
    fadt.p_lvl2_lat = 0xfff.into();
    fadt.p_lvl3_lat = 0xfff.into();
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    // Four ports above the data port is the command port.
    fadt.reset_reg = io(8, AccessSize::ByteAccess, I8042_PORT + 4);
    fadt.reset_value = I8042_RESET;
    fadt
}

/// Processors, I/O APIC, and where wired interrupts differ from ISA's.
fn madt(cpus: u8) -> Vec<u8> {
    let mut table =
        MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(LAPIC_START as u32));
    for cpu in 0..cpus {
        table.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, IOAPIC_START as u32, 0));
    let built = encode(&table);

    // The builder has neither the flags nor these two structures. KVM routes interrupt n to pin n of the I/O APIC, the
    // timer's too, so that the SCI alone is unlike ISA's edges.
    let sci = ACPI_SCI_GSI;
    let mut rest = vec![2, 10, 0, sci as u8];
    rest.extend(sci.to_le_bytes());
    rest.extend(LEVEL_ACTIVE_HIGH.to_le_bytes());
    // Local APIC NMI (5.2.12.7): all processors, flags as the bus has it, LINT1.
    rest.extend([4, 6, 0xff, 0, 0, 1]);
    let mut table = Sdt::new(*b"APIC", 36, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&built[36..]);
    table.append_slice(&rest);
    table.write_u32(40, DUAL_8259);
    table.as_slice().to_vec()
}
