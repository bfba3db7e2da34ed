//! Every register, by every width of access.

use nvme_spec::regs;
use pci::PciFunction;

use super::driver::Guest;
use crate::ControllerConfig;

/// How a register takes a write of the value that follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Write {
    /// Nothing happens.
    Ignored,
    /// These bits are kept while the controller is disabled.
    Kept(u64),
    /// Set bits are set, or cleared, in the interrupt mask, which is what it reads as.
    MaskSet,
    MaskClear,
}

/// Name, offset, length in bytes, and what a write does.
type Row = (&'static str, u64, u64, Write);

/// Registers by offset, length in bytes, and what a write does (Base 3.1.3). What is not listed up to the doorbells is reserved.
const ROWS: &[Row] = &[
    ("CAP", regs::CAP, 8, Write::Ignored),
    ("VS", regs::VS, 4, Write::Ignored),
    ("INTMS", regs::INTMS, 4, Write::MaskSet),
    ("INTMC", regs::INTMC, 4, Write::MaskClear),
    // EN and SHN are left out: they begin something.
    ("CC", regs::CC, 4, Write::Kept(0x01ff_3ff0)),
    ("CSTS", regs::CSTS, 4, Write::Ignored),
    ("NSSR", regs::NSSR, 4, Write::Ignored),
    ("AQA", regs::AQA, 4, Write::Kept(0x0fff_0fff)),
    ("ASQ", regs::ASQ, 8, Write::Kept(!0xfff)),
    ("ACQ", regs::ACQ, 8, Write::Kept(!0xfff)),
    ("CMBLOC", regs::CMBLOC, 4, Write::Ignored),
    ("CMBSZ", regs::CMBSZ, 4, Write::Ignored),
    ("BPINFO", regs::BPINFO, 4, Write::Ignored),
    ("BPRSEL", regs::BPRSEL, 4, Write::Ignored),
    ("BPMBL", regs::BPMBL, 8, Write::Ignored),
    ("CMBMSC", regs::CMBMSC, 8, Write::Ignored),
    ("CMBSTS", regs::CMBSTS, 4, Write::Ignored),
    ("CMBEBS", regs::CMBEBS, 4, Write::Ignored),
    ("CMBSWTP", regs::CMBSWTP, 4, Write::Ignored),
    ("NSSD", regs::NSSD, 4, Write::Ignored),
    ("CRTO", regs::CRTO, 4, Write::Ignored),
    ("reserved", 0x6c, 4, Write::Ignored),
    ("PMRCAP", regs::PMRCAP, 4, Write::Ignored),
    ("PMRCTL", regs::PMRCTL, 4, Write::Ignored),
    ("PMRSTS", regs::PMRSTS, 4, Write::Ignored),
    ("PMREBS", regs::PMREBS, 4, Write::Ignored),
    ("PMRSWTP", regs::PMRSWTP, 4, Write::Ignored),
    ("PMRMSCL", regs::PMRMSCL, 4, Write::Ignored),
    ("PMRMSCU", regs::PMRMSCU, 4, Write::Ignored),
];

fn guest() -> Guest {
    Guest::power_on(ControllerConfig::new("REGISTERS"), vec![])
}

/// All bytes below the doorbells.
fn all(guest: &Guest) -> Vec<u8> {
    (0..regs::DOORBELLS).step_by(8).flat_map(|offset| guest.read64(offset).to_le_bytes()).collect()
}

fn write(guest: &Guest, offset: u64, data: &[u8]) {
    guest.controller.bar_write(0, offset, data);
}

/// Byte `byte` of ones for the register of `row`; CC gets all but EN and SHN, which begin something.
fn ones((name, ..): Row, byte: u64) -> u8 {
    let bits = if name == "CC" { 0xffff_3ffe } else { u64::MAX };
    (bits >> (8 * byte)) as u8
}

/// What the register file is after ones were written to `[offset, offset + bytes)` of `row`.
fn expected(before: &[u8], (_, base, length, effect): Row, at: u64, bytes: u64) -> Vec<u8> {
    let mut after = before.to_vec();
    for byte in at..(at + bytes).min(base + length) {
        let mask = |bits: u64| (bits >> (8 * (byte - base))) as u8;
        match effect {
            Write::Ignored => {}
            Write::Kept(bits) => after[byte as usize] |= mask(bits),
            Write::MaskSet | Write::MaskClear => {
                let value = if effect == Write::MaskSet { 0xff } else { 0 };
                let within = byte - base;
                after[(regs::INTMS + within) as usize] = value;
                after[(regs::INTMC + within) as usize] = value;
            }
        }
    }
    after
}

#[test]
fn aligned_writes_of_each_width_change_what_they_cover_of_one_register() {
    for &row in ROWS {
        let (name, base, length, _) = row;
        for bytes in [1, 2, 4, 8].into_iter().filter(|bytes| *bytes as u64 <= length) {
            for offset in (base..base + length).step_by(bytes) {
                let guest = guest();
                if row.3 == Write::MaskClear {
                    guest.write32(regs::INTMS, u32::MAX);
                }
                let before = all(&guest);
                let data: Vec<u8> = (offset - base..).take(bytes).map(|byte| ones(row, byte)).collect();
                write(&guest, offset, &data);
                guest.run();
                assert!(
                    all(&guest) == expected(&before, row, offset, bytes as u64),
                    "{name}, {bytes} bytes at {offset:#x}"
                );
            }
        }
    }
}

#[test]
fn other_writes_change_nothing() {
    let guest = guest();
    let before = all(&guest);
    for &(name, base, length, _) in ROWS {
        for (offset, bytes) in (0..length).flat_map(|byte| (1..=9).map(move |bytes| (base + byte, bytes))) {
            let aligned = matches!(bytes, 1 | 2 | 4 | 8) && offset % bytes as u64 == 0;
            if !aligned {
                write(&guest, offset, &vec![0xff; bytes]);
                guest.run();
                assert!(all(&guest) == before, "{name}, {bytes} bytes at {offset:#x}");
            }
        }
    }
    // Beyond the BAR, and other BARs.
    for offset in [1 << 32, u64::MAX - 7, u64::MAX] {
        write(&guest, offset, &[0xff; 4]);
        let mut data = [0xaa; 4];
        guest.controller.bar_read(0, offset, &mut data);
        assert_eq!(data, [0; 4]);
    }
    guest.controller.bar_write(3, regs::ASQ, &[0xff; 4]);
    guest.run();
    assert!(all(&guest) == before);
}

#[test]
fn reads_of_any_width_and_alignment_give_the_bytes() {
    let guest = guest();
    guest.write64(regs::ASQ, 0x0123_4567_89ab_c000);
    let bytes = all(&guest);
    for offset in 0..0x78 {
        for length in 1..=8 {
            let mut data = vec![0xaa; length];
            guest.controller.bar_read(0, offset as u64, &mut data);
            assert_eq!(data, bytes[offset..offset + length], "{length} bytes at {offset:#x}");
        }
    }
}

#[test]
fn a_controller_may_be_enabled_ready_independent_of_media() {
    let mut guest = guest();
    guest.start_enable();
    guest.write32(regs::CC, 0);
    guest.run();
    guest.write32(regs::CC, 0x0146_0001);
    guest.run();
    assert_eq!((guest.read32(regs::CC), guest.read32(regs::CSTS)), (0x0146_0001, 1));
    // CRIME cannot be changed while enabled.
    guest.write32(regs::CC, 0x0046_0001);
    assert_eq!(guest.read32(regs::CC), 0x0146_0001);
    guest.migrate(1);
    assert_eq!(guest.read32(regs::CC), 0x0146_0001);
}
