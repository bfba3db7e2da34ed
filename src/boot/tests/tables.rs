//! The tables that describe the machine, read back as a guest reads them.

use std::process::Command;

use super::*;
use crate::layout::GENERATION_ID_START;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

fn read(memory: &GuestMemory, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn a_guest_finds_the_mp_tables() {
    for cpus in [1, 2, 64, 255] {
        let memory = memory(64 * MIB);
        load(&memory, &BootSpec { cpus, ..spec(&elf(b"code", 0, None)) }).unwrap();
        let pointer = (0..0x400).step_by(16).find(|&at| &bytes_at::<4>(&memory, at) == b"_MP_").unwrap();
        assert_eq!(sum(&bytes_at::<16>(&memory, pointer)), 0);
        let table = u64::from(u32_at(&memory, pointer + 4));
        let length = usize::from(u16::from_le_bytes(bytes_at(&memory, table + 4)));
        let bytes = read(&memory, table, length);
        assert_eq!((&bytes[..4], sum(&bytes)), (&b"PCMP"[..], 0));
        let mut entries = &bytes[44..];
        let (mut kinds, mut slots) = ([0; 5], 0);
        while let Some(&kind) = entries.first() {
            let length = if kind == 0 { 20 } else { 8 };
            match kind {
                0 => assert_eq!((entries[1], entries[3]), (kinds[0], if kinds[0] == 0 { 3 } else { 1 })),
                2 => assert_eq!(entries[4..8], 0xfec0_0000_u32.to_le_bytes()),
                // INTA# of a slot, of the PCI bus.
                3 if entries[4] == 0 => {
                    assert_eq!((entries[5], entries[7]), (slots << 2, 16 + slots % 8), "as KVM routes them");
                    slots += 1;
                }
                3 => {
                    let number = kinds[3] - slots;
                    assert_eq!((entries[5], entries[7]), (number, number), "as KVM routes them");
                }
                _ => {}
            }
            kinds[usize::from(kind)] += 1;
            entries = &entries[length..];
        }
        assert_eq!((kinds, slots), ([cpus, 2, 1, 16 + 32, 2], 32));
        assert_eq!(u16::from_le_bytes([bytes[34], bytes[35]]), u16::from(cpus) + 53);
    }
}

#[test]
fn a_guest_finds_the_acpi_tables() {
    for cpus in [1, 2, 255] {
        let memory = memory(64 * MIB);
        let kernel = elf(b"code", 0, Some(0x20_0000));
        let registers = load(&memory, &BootSpec { cpus, tables: Tables::Acpi, ..spec(&kernel) }).unwrap();
        let rsdp = u64_at(&memory, registers.info + 32);
        assert!((0xe_0000..0x10_0000).contains(&rsdp) && rsdp.is_multiple_of(16));
        let bytes = bytes_at::<36>(&memory, rsdp);
        assert_eq!((&bytes[..8], sum(&bytes[..20]), sum(&bytes)), (&b"RSD PTR "[..], 0, 0));
        let table = |address: u64| {
            let bytes = read(&memory, address, u32_at(&memory, address + 4) as usize);
            assert_eq!(sum(&bytes), 0, "{:?}", &bytes[..4]);
            bytes
        };
        let xsdt = table(u64_at(&memory, rsdp + 24));
        let listed: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|address| table(u64::from_le_bytes(address.try_into().unwrap())))
            .collect();
        let names: Vec<_> = listed.iter().map(|table| &table[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        let (fadt, madt, mcfg) = (&listed[0], &listed[1], &listed[2]);
        let field = |offset: usize| u32::from_le_bytes(fadt[offset..offset + 4].try_into().unwrap());
        assert_eq!((fadt[46], field(56), field(64)), (9, 0x600, 0x604), "SCI, PM1a event and control");
        assert_eq!((fadt[116], fadt[117], fadt[120], fadt[128]), (1, 8, 0x64, 0xfe), "reset");
        assert_eq!(field(112) & (1 << 20), 0, "not hardware-reduced");
        assert_eq!(table(field(40).into())[..4], *b"DSDT");
        assert_eq!(u64_at(&memory, field(36).into()) as u32, u32::from_le_bytes(*b"FACS"));
        let processors = (0..usize::from(cpus)).map(|cpu| &madt[44 + cpu * 8..52 + cpu * 8]);
        for (cpu, entry) in processors.enumerate() {
            assert_eq!(entry, [0, 8, cpu as u8, cpu as u8, 1, 0, 0, 0]);
        }
        let rest = &madt[44 + usize::from(cpus) * 8..];
        assert_eq!(rest[..12], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        assert_eq!(rest[12..22], [2, 10, 0, 9, 9, 0, 0, 0, 13, 0]);
        assert_eq!(rest[22..], [4, 6, 0xff, 0, 0, 1]);
        assert_eq!(mcfg[44..56], [0, 0, 0, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0xff]);
    }
}

#[test]
fn a_guest_has_an_id_of_its_generation_until_it_is_another() {
    let memory = memory(64 * MIB);
    let kernel = elf(b"code", 0, Some(0x20_0000));
    let id = || bytes_at::<16>(&memory, GENERATION_ID_START);
    load(&memory, &BootSpec { tables: Tables::Acpi, ..spec(&kernel) }).unwrap();
    let first = id();
    assert_ne!(first, [0; 16]);
    load(&memory, &BootSpec { tables: Tables::Acpi, ..spec(&kernel) }).unwrap();
    assert_eq!(id(), first, "it is reset");
    renew_generation_id(&memory).unwrap();
    assert!(id() != first && id() != [0; 16]);
    let reserved = memory_map::of(&memory).into_iter().filter(|entry| entry.kind == memory_map::RESERVED);
    let holds = |entry: memory_map::Entry| {
        (entry.start..entry.start + entry.length_bytes).contains(&GENERATION_ID_START)
    };
    assert_eq!(reserved.filter(|entry| holds(*entry)).count(), 1);
    assert!(GENERATION_ID_START.is_multiple_of(8));
}

#[test]
fn tables_stay_in_their_place() {
    let tables = acpi::build(255);
    for pair in tables.windows(2) {
        assert!(pair[0].1 + pair[0].2.len() as u64 <= pair[1].1, "{} and {}", pair[0].0, pair[1].0);
    }
    let (_, start, bytes) = tables.last().unwrap();
    assert!(start + bytes.len() as u64 <= 0xf_0000);
}

/// `iasl` in `directory`; returns what it printed.
fn iasl(directory: &Path, arguments: &[&str]) -> String {
    let run = Command::new("iasl").args(arguments).current_dir(directory).output();
    let output = run.unwrap_or_else(|error| {
        panic!("cannot run iasl ({error}): install acpica-tools, for example by resources/setup")
    });
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "iasl {arguments:?}: {text}");
    text
}

#[test]
fn iasl_understands_every_table() {
    let directory = tempfile::tempdir().unwrap();
    let tables = acpi::build(4);
    // The RSDP is no table with a header, so that iasl does not take it; `a_guest_finds_the_acpi_tables` does.
    assert_eq!(tables[0].0, "RSDP");
    for (name, _, bytes) in &tables[1..] {
        let file = format!("{}.dat", name.to_lowercase());
        std::fs::write(directory.path().join(&file), bytes).unwrap();
        let text = iasl(directory.path(), &["-d", &file]);
        let source = format!("{}.dsl", name.to_lowercase());
        let disassembled = std::fs::read_to_string(directory.path().join(&source)).unwrap();
        for bad in ["rror", "Invalid", "Unknown", "ncorrect"] {
            assert!(!text.contains(bad), "{name}: {text}");
            assert!(!disassembled.contains(&format!("**** {bad}")), "{name}: {disassembled}");
        }
        if *name == "DSDT" {
            // A disassembly with mistakes does not compile.
            let text = iasl(directory.path(), &["-p", "again", &source]);
            assert!(text.contains("0 Errors, 0 Warnings"), "{text}\n{disassembled}");
            for device in ["PNP0A08", "PNP0501", "PNP0C02", "_PRT", "_S5", "VM_Gen_Counter", "ACPI0013"] {
                assert!(disassembled.contains(device), "{device}: {disassembled}");
            }
        }
    }
}
