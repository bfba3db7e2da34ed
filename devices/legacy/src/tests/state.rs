//! Bytes of saved devices: truncated, and with every bit flipped.

use std::sync::Arc;

use bus::{BusDevice, InterruptLine};
use vmstate::VmState;

use crate::*;

struct Nothing;

impl InterruptLine for Nothing {
    fn set_level(&self, _high: bool) {}
}

impl PowerEvents for Nothing {
    fn reset(&self) {}
    fn power_off(&self) {}
}

impl WallClock for Nothing {
    fn unix_seconds(&self) -> u64 {
        1_700_000_000
    }
}

/// `restore` makes a device of a state and saves it again.
fn attack<T: VmState>(good: &T, restore: impl Fn(&T) -> Result<T, Error>) {
    let good = vmstate::to_bytes(good);
    for length in 0..good.len() {
        assert!(vmstate::from_bytes::<T>(&good[..length], 1).is_err(), "{length} bytes");
    }
    let mut taken = 0;
    for position in 0..good.len() {
        for bit in 0..8 {
            let mut bytes = good.clone();
            bytes[position] ^= 1 << bit;
            let Ok(state) = vmstate::from_bytes::<T>(&bytes, 1) else { continue };
            if let Ok(saved) = restore(&state) {
                taken += 1;
                assert_eq!(vmstate::to_bytes(&saved), bytes, "byte {position} bit {bit}");
            }
        }
    }
    assert!((1..8 * good.len()).contains(&taken), "some of it is the guest's choice, not all: {taken}");
}

#[test]
fn serial() {
    let port = || Serial::new(Arc::new(Nothing), Box::new(std::io::sink()));
    let source = port();
    source.write(1, &[1]);
    source.enqueue(&[b'x'; 70]);
    attack(&source.save(), |state| {
        let target = port();
        target.restore(state).map(|()| target.save())
    });
}

#[test]
fn rtc() {
    attack(&Rtc::new(Box::new(Nothing)).save(), |state| {
        let target = Rtc::new(Box::new(Nothing));
        let restored = target.restore(state);
        let saved = target.save();
        target.read(1, &mut [0]);
        target.write(1, &[0]);
        restored.map(|()| saved)
    });
}

#[test]
fn acpi_pm() {
    attack(&AcpiPm::new(Arc::new(Nothing)).save(), |state| {
        let target = AcpiPm::new(Arc::new(Nothing));
        target.restore(state).map(|()| target.save())
    });
}
