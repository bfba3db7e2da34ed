//! The guest physical address map.
//!
//! ```text
//! 0x0000_0000 .. 0xc000_0000   RAM block "ram-low": up to 3 GiB (0xa_0000..0x10_0000 is RAM too, reserved in the e820 map)
//! 0x000f_f000                  VM generation ID, in what is reserved there
//! 0xc000_0000 .. 0xe000_0000   32-bit PCI memory window: BARs are assigned here by the VMM before boot
//! 0xe000_0000 .. 0xf000_0000   PCI ECAM, 256 buses of 1 MiB
//! 0xfec0_0000                  I/O APIC      0xfee0_0000  local APIC      0xfffb_d000  KVM's TSS pages
//! 0x1_0000_0000 ..             RAM block "ram-high": what is above 3 GiB
//! ```

/// End of the low RAM block and start of the 32-bit hole.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Start of the high RAM block.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// First address of the window in which BARs are assigned.
pub const PCI_WINDOW_START: u64 = LOW_RAM_END;
/// Length of that window in bytes.
pub const PCI_WINDOW_LENGTH_BYTES: u64 = 0x2000_0000;
/// PCI Express enhanced configuration access window.
pub const ECAM_START: u64 = 0xe000_0000;
/// Its length in bytes: 256 buses of 1 MiB.
pub const ECAM_LENGTH_BYTES: u64 = 0x1000_0000;
/// I/O APIC registers.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Local APIC registers.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// Three pages that KVM needs on processors without unrestricted guest.
pub const KVM_TSS_START: u64 = 0xfffb_d000;
/// First serial port, the console.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt.
pub const SERIAL_GSI: u32 = 4;
/// PCI configuration address and data ports.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Keyboard controller data and command ports (reset only).
pub const I8042_PORT: u16 = 0x60;
/// Real-time clock index and data ports.
pub const RTC_PORT: u16 = 0x70;
/// ACPI PM1a event block (4 bytes), control block (2 bytes at +4); 8 bytes reserved.
pub const ACPI_PM_PORT: u16 = 0x600;
/// ACPI system control interrupt.
pub const ACPI_SCI_GSI: u32 = 9;
/// Where the VM generation ID lies: 16 bytes of a reserved page of their own.
pub const GENERATION_ID_START: u64 = 0xf_f000;
/// Interrupt of the ACPI event that it has changed: one of ISA's that no device here has, edge-triggered.
pub const GENERATION_GSI: u32 = 5;
/// Interrupts of the I/O APIC: 24.
pub const GSI_COUNT: u32 = 24;
/// Pins of PCI functions share the inputs of the I/O APIC that no ISA device has.
pub const FIRST_PCI_GSI: u32 = 16;
/// How many these are.
pub const PCI_GSI_COUNT: u32 = GSI_COUNT - FIRST_PCI_GSI;

/// The interrupt that INTA# of `slot` leads to. Functions here have no other pin.
#[must_use]
pub const fn pci_gsi(slot: u8) -> u32 {
    FIRST_PCI_GSI + slot as u32 % PCI_GSI_COUNT
}
