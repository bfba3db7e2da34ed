//! What the driver finds, and the registers' rules.

use super::*;

fn config32(guest: &Guest, offset: u16) -> u32 {
    let mut data = [0; 4];
    guest.device.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

/// Offset, BAR, offset in the BAR and length of every virtio capability, by type.
fn capabilities(guest: &Guest) -> Vec<(u8, u16, u8, u32, u32)> {
    let mut found = Vec::new();
    let mut next = config32(guest, 0x34) as u8;
    while next != 0 {
        let at = u16::from(next);
        let [id, following, length, kind] = config32(guest, at).to_le_bytes();
        if id == 9 {
            assert!(length >= 16);
            let bar = config32(guest, at + 4) as u8;
            found.push((kind, at, bar, config32(guest, at + 8), config32(guest, at + 12)));
        }
        next = following;
    }
    found
}

#[test]
fn a_driver_finds_a_modern_entropy_device() {
    let guest = Guest::new();
    assert_eq!(config32(&guest, 0), 0x1044_1af4);
    assert_eq!(config32(&guest, 8) & 0xff, 1);
    let found: Vec<_> = capabilities(&guest)
        .into_iter()
        .map(|(kind, _, bar, offset, length)| (kind, bar, offset, length))
        .collect();
    assert_eq!(found, [(1, 0, 0, 0x38), (3, 0, 0x800, 1), (2, 0, 0x1000, 4), (5, 0, 0, 0)]);
    let notify = capabilities(&guest)[2].1;
    assert_eq!(config32(&guest, notify + 16), 4, "doorbell stride");
    assert_eq!(guest.read(common::QUEUE_COUNT, 2), 1);
    assert_eq!(guest.read(common::QUEUE_SIZE, 2), 64);
    guest.write(common::QUEUE_SELECT, 2, 1);
    assert_eq!(guest.read(common::QUEUE_SIZE, 2), 0, "there is no second queue");
    assert_eq!(guest.read(common::QUEUE_SELECT, 2), 1);
}

#[test]
fn features_are_version_1_and_nothing_else() {
    let guest = Guest::new();
    for (select, features) in [(0, 0), (1, 1), (2, 0), (u64::from(u32::MAX), 0)] {
        guest.write(common::DEVICE_FEATURE_SELECT, 4, select);
        assert_eq!(guest.read(common::DEVICE_FEATURE, 4), features);
    }
    guest.set_status(3);
    for select in [0, 1, 2] {
        guest.write(common::DRIVER_FEATURE_SELECT, 4, select);
        guest.write(common::DRIVER_FEATURE, 4, u64::from(u32::MAX));
    }
    guest.set_status(0xb);
    assert_eq!(guest.status(), 0xb);
    guest.write(common::DRIVER_FEATURE_SELECT, 4, 1);
    guest.write(common::DRIVER_FEATURE, 4, 0);
    assert_eq!(guest.read(common::DRIVER_FEATURE, 4), 1, "fixed after FEATURES_OK");
}

#[test]
fn features_ok_needs_version_1_and_driver_ok_needs_features_ok() {
    let guest = Guest::new();
    guest.set_status(0xb);
    assert_eq!(guest.status(), 3, "a legacy driver is refused");
    guest.set_status(0xf);
    assert_eq!(guest.status(), 3);
    guest.negotiate();
    assert_eq!(guest.status(), 0xb);
    guest.set_status(0x4f);
    assert_eq!(guest.status(), 0xf, "DEVICE_NEEDS_RESET is not the driver's");
    guest.set_status(1);
    assert_eq!(guest.status(), 0xf, "bits are only cleared by reset");
}

#[test]
fn an_enabled_queue_cannot_be_changed_and_a_bad_one_not_enabled() {
    let guest = Guest::new();
    guest.negotiate();
    for (register, length, bad) in [
        (common::QUEUE_DESCRIPTORS, 8, DESCRIPTORS + 8),
        (common::QUEUE_DESCRIPTORS, 8, MEMORY_BYTES as u64 - 64),
        (common::QUEUE_DRIVER, 8, AVAILABLE + 1),
        (common::QUEUE_DRIVER, 8, u64::MAX - 1),
        (common::QUEUE_DEVICE, 8, USED + 2),
        (common::QUEUE_DEVICE, 8, MEMORY_BYTES as u64),
    ] {
        guest.set_status(0);
        guest.negotiate();
        guest.set_up_queue(3);
        assert_eq!(guest.read(common::QUEUE_SIZE, 2), 64, "3 is not a power of two");
        assert_eq!(guest.read(common::QUEUE_ENABLE, 2), 1);
        guest.set_status(0);
        guest.write(common::QUEUE_DESCRIPTORS, 8, DESCRIPTORS);
        guest.write(common::QUEUE_DRIVER, 8, AVAILABLE);
        guest.write(common::QUEUE_DEVICE, 8, USED);
        guest.write(register, length, bad);
        guest.write(common::QUEUE_ENABLE, 2, 1);
        assert_eq!(guest.read(common::QUEUE_ENABLE, 2), 0, "{register:#x} {bad:#x}");
    }
    let guest = Guest::ready(16);
    let before = guest.device.save();
    for (register, length) in [
        (common::QUEUE_SIZE, 2),
        (common::QUEUE_ENABLE, 2),
        (common::QUEUE_DESCRIPTORS, 8),
        (common::QUEUE_DRIVER, 4),
        (common::QUEUE_DEVICE, 8),
        (common::QUEUE_COUNT, 2),
        (common::DEVICE_FEATURE, 4),
        (common::QUEUE_NOTIFY_OFFSET, 2),
    ] {
        guest.write(register, length, 0);
    }
    assert_eq!(guest.device.save(), before);
    guest.write(common::QUEUE_VECTOR, 2, 2);
    assert_eq!(guest.read(common::QUEUE_VECTOR, 2), 0xffff, "there are two vectors");
}

#[test]
fn configuration_space_reaches_the_bar() {
    let guest = Guest::new();
    let at = capabilities(&guest)[3].1;
    let select = |offset: usize, length: u32| {
        guest.device.config_write(at + 8, &(offset as u32).to_le_bytes());
        guest.device.config_write(at + 12, &length.to_le_bytes());
    };
    select(common::QUEUE_SIZE, 2);
    let mut size = [0; 2];
    guest.device.config_read(at + 16, &mut size);
    assert_eq!(size, [64, 0]);
    select(common::STATUS, 1);
    guest.device.config_write(at + 16, &[1]);
    assert_eq!(guest.status(), 1);
    for (offset, length, data) in [(common::STATUS, 1, 2), (common::STATUS + 1, 2, 2), (common::STATUS, 0, 1)]
    {
        select(offset, length);
        guest.device.config_write(at + 16, &[0; 4][..data]);
        assert_eq!(guest.status(), 1, "{length} bytes at {offset:#x} by an access of {data}");
    }
    select(common::STATUS, 1);
    guest.device.config_write(at + 4, &[5]);
    guest.device.config_write(at + 16, &[0]);
    assert_eq!(guest.status(), 1, "there is no BAR 5");
}

#[test]
fn impossible_devices_are_refused() {
    struct Odd(Vec<u16>);
    impl VirtioDevice for Odd {
        fn device_type(&self) -> u16 {
            99
        }
        fn class(&self) -> [u8; 3] {
            [0; 3]
        }
        fn queue_sizes(&self) -> &[u16] {
            &self.0
        }
        fn process(&mut self, _: u16, _: &mut virtio_queue::Queue, _: &GuestMemory) -> Result<Work, Error> {
            Ok(Work::default())
        }
    }
    for sizes in [vec![], vec![3], vec![0], vec![16; 65]] {
        let recorder = Arc::new(Recorder::default());
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let made = VirtioPci::new(Box::new(Odd(sizes)), memory, Box::new(recorder.clone()), recorder);
        assert!(matches!(made.err(), Some(Error::BadDevice { device_type: 99, .. })));
    }
}
