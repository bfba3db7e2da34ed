//! The i8042 and ACPI: when the machine ends, and when it does not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bus::{Bus, BusDevice};

use crate::*;

#[derive(Default)]
struct Events {
    resets: AtomicU32,
    power_offs: AtomicU32,
}

impl PowerEvents for Events {
    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    fn power_off(&self) {
        self.power_offs.fetch_add(1, Ordering::Relaxed);
    }
}

impl Events {
    fn counts(&self) -> (u32, u32) {
        (self.resets.load(Ordering::Relaxed), self.power_offs.load(Ordering::Relaxed))
    }
}

fn ports() -> (Bus, Arc<Events>, Arc<AcpiPm>) {
    let (bus, events) = (Bus::new(), Arc::new(Events::default()));
    bus.insert(0x60, I8042::PORTS, I8042::new(events.clone())).unwrap();
    let acpi = AcpiPm::new(events.clone());
    bus.insert(0x600, AcpiPm::PORTS, acpi.clone()).unwrap();
    (bus, events, acpi)
}

fn read16(bus: &Bus, port: u64) -> u16 {
    let mut data = [0; 2];
    assert!(bus.read(port, &mut data));
    u16::from_le_bytes(data)
}

#[test]
fn only_the_pulse_command_resets() {
    let (bus, events, _) = ports();
    let mut status = [0xff];
    bus.read(0x64, &mut status);
    assert_eq!(status, [0]);
    for (port, value) in [(0x60, 0xfe), (0x62, 0xfe), (0x64, 0xff), (0x64, 0xd1)] {
        bus.write(port, &[value]);
    }
    assert_eq!(events.counts(), (0, 0));
    bus.write(0x64, &[0xfe]);
    assert_eq!(events.counts(), (1, 0));
}

#[test]
fn only_soft_off_with_sleep_enable_switches_off() {
    let (bus, events, _) = ports();
    for kind in 0..8_u16 {
        bus.write(0x604, &(kind << 10).to_le_bytes());
        if kind != SLEEP_TYPE_SOFT_OFF {
            bus.write(0x604, &(kind << 10 | 1 << 13).to_le_bytes());
        }
    }
    bus.write(0x600, &(5_u16 << 10 | 1 << 13).to_le_bytes());
    assert_eq!(events.counts(), (0, 0));
    bus.write(0x604, &(5_u16 << 10 | 1 << 13).to_le_bytes());
    assert_eq!(events.counts(), (0, 1));
    assert_eq!(read16(&bus, 0x604), 5 << 10 | 1, "SLP_EN reads 0, SCI_EN 1");
    bus.write(0x604, &[0]);
    assert_eq!(events.counts(), (0, 1), "the low byte alone does not enable sleep");
    bus.write(0x605, &[0x34]);
    assert_eq!(events.counts(), (0, 2), "the high byte alone does");
}

#[test]
fn the_registers_keep_what_exists() {
    let (bus, _, _) = ports();
    bus.write(0x600, &[0xff; 4]);
    bus.write(0x604, &[0xff, 0x1f]);
    bus.write(0x606, &[0xff; 2]);
    let mut all = [0xaa; 8];
    bus.read(0x600, &mut all);
    assert_eq!(all, [0, 0, 0x21, 0x07, 0x03, 0x1c, 0, 0]);
    for offset in 0..8 {
        for length in [1, 2, 4, 8] {
            bus.write(0x600 + offset, &[0; 8][..length]);
            bus.read(0x600 + offset, &mut [0; 8][..length]);
        }
    }
    // Beyond what a bus would pass on, but harmless.
    let acpi = ports().2;
    acpi.write(7, &[0; 8]);
    acpi.read(u64::MAX, &mut [0; 8]);
}

#[test]
fn acpi_state_survives_and_is_checked() {
    let (bus, _, acpi) = ports();
    bus.write(0x602, &[0x20, 0x01]);
    bus.write(0x604, &[0x02, 0x14]);
    let saved = acpi.save();
    let bytes = vmstate::to_bytes(&saved);
    let (other, events, target) = ports();
    target.restore(&vmstate::from_bytes(&bytes, 1).unwrap()).unwrap();
    assert_eq!(target.save(), saved);
    assert_eq!((read16(&other, 0x602), read16(&other, 0x604)), (0x0120, 0x1403));
    assert_eq!(events.counts(), (0, 0), "restoring is not sleeping");
    for (enable, control) in [(0x0002, 1), (0x8000, 1), (0, 0), (0, 1 << 13 | 1), (0, 0x8001), (0, 5)] {
        let error = target.restore(&AcpiPmState { enable, control }).unwrap_err();
        assert!(
            matches!(error, Error::BadRegister { device: "ACPI", .. }),
            "{enable:#x} {control:#x}: {error}"
        );
    }
    assert_eq!(target.save(), saved);
}
