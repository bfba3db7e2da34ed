//! The DSDT: the devices that a guest cannot find by itself.
//!
//! Kept short: some hosts interpret every instruction that the guest's kernel spends on it.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name,
    Notify, PackageBuilder, Path, ResourceTemplate, Return, Scope,
};
use acpi_tables::sdt::Sdt;
use pci::SLOTS;

use super::acpi::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::{
    ECAM_LENGTH_BYTES, ECAM_START, GENERATION_GSI, GENERATION_ID_START, PCI_CONFIG_PORT,
    PCI_WINDOW_LENGTH_BYTES, PCI_WINDOW_START, SERIAL_GSI, SERIAL_PORT, pci_gsi,
};

/// The device of the VM generation ID, and the value of its notification.
const GENERATION_DEVICE: &str = "VGEN";
const CHANGED: u8 = 0x80;
/// INTA# in `_PRT`.
const PIN_A: u8 = 0;

/// The table.
pub(super) fn build() -> Vec<u8> {
    let mut body = Vec::new();
    let (mainboard, bridge, serial) = (mainboard(), pci_bridge(), serial());
    let (generation, events) = (generation_id(), events());
    Scope::new(Path::new("\\_SB_"), vec![&mainboard, &bridge, &serial, &generation, &events])
        .to_aml_bytes(&mut body);
    // SLP_TYP of PM1a and PM1b for soft off, and two reserved elements.
    let mut soft_off = PackageBuilder::new();
    for value in [legacy::SLEEP_TYPE_SOFT_OFF as u8, 0, 0, 0] {
        soft_off.add_element(&value);
    }
    Name::new(Path::new("\\_S5_"), &soft_off).to_aml_bytes(&mut body);

    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// Objects in the order of a device's body, already encoded.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn device(path: &str, objects: Vec<&dyn Aml>) -> Encoded {
    let mut bytes = Vec::new();
    Device::new(Path::new(path), objects).to_aml_bytes(&mut bytes);
    Encoded(bytes)
}

/// The PCI Express root bridge with its windows and interrupts.
fn pci_bridge() -> Encoded {
    let after_config = PCI_CONFIG_PORT + 8;
    let window_last = (PCI_WINDOW_START + PCI_WINDOW_LENGTH_BYTES - 1) as u32;
    let memory = AddressSpaceCacheable::NotCacheable;
    device(
        "PCI0",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &0_u8),
            &Name::new("_BBN".into(), &0_u8),
            &Name::new("_UID".into(), &0_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0_u16, 0xff),
                    &IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8),
                    &AddressSpace::new_io(0_u16, PCI_CONFIG_PORT - 1, None),
                    &AddressSpace::new_io(after_config, u16::MAX, None),
                    &AddressSpace::new_memory(memory, true, PCI_WINDOW_START as u32, window_last, None),
                ]),
            ),
            // A method, so that nobody reads the list who needs no pin.
            &Method::new("_PRT".into(), 0, false, vec![&Return::new(&interrupt_routing())]),
        ],
    )
}

/// `_PRT` (ACPI 6.5, 6.2.13): for the pin of every slot the number of its interrupt.
fn interrupt_routing() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for slot in 0..SLOTS {
        let mut entry = PackageBuilder::new();
        // All functions of the slot.
        entry.add_element(&(u32::from(slot) << 16 | 0xffff));
        entry.add_element(&PIN_A);
        // No link device: the next element is the number itself.
        entry.add_element(&0_u8);
        entry.add_element(&pci_gsi(slot));
        table.add_element(&entry);
    }
    table
}

/// What is reserved for the mainboard: systems trust MCFG only if ECAM is claimed here.
fn mainboard() -> Encoded {
    device(
        "MB00",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &0_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    true,
                    ECAM_START as u32,
                    ECAM_LENGTH_BYTES as u32,
                )]),
            ),
        ],
    )
}

/// The console.
fn serial() -> Encoded {
    device(
        "COM1",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(SERIAL_PORT, SERIAL_PORT, 0, 8),
                    &Interrupt::new(true, true, false, false, SERIAL_GSI),
                ]),
            ),
        ],
    )
}

/// Where the VM generation ID is (Microsoft, "Virtual Machine Generation ID", 2012): systems know the device by _CID, and are told
/// by a notification that the ID has changed.
fn generation_id() -> Encoded {
    let mut address = PackageBuilder::new();
    for half in [GENERATION_ID_START as u32, (GENERATION_ID_START >> 32) as u32] {
        address.add_element(&half);
    }
    device(
        GENERATION_DEVICE,
        vec![
            &Name::new("_HID".into(), &"FERR0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &address),
        ],
    )
}

/// The generic event device (ACPI 6.5, 5.6.9), with an interrupt for the one event that there is.
fn events() -> Encoded {
    let generation = Path::new(GENERATION_DEVICE);
    let changed = Notify::new(&generation, &CHANGED);
    device(
        "EVNT",
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, GENERATION_GSI)]),
            ),
            &Method::new("_EVT".into(), 1, true, vec![&changed]),
        ],
    )
}
