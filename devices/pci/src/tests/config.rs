//! Configuration space: sizing, capabilities, what the guest can and cannot change, restoring.

use super::*;

fn read32(config: &ConfigSpace, offset: u16) -> u32 {
    let mut data = [0; 4];
    config.read(offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn header_and_capability_list_are_what_a_driver_expects() {
    let config = config(9);
    assert_eq!(read32(&config, 0x00), 0x0010_1b36);
    assert_eq!(read32(&config, 0x08), 0x0108_0202);
    assert_eq!(read32(&config, 0x2c), 0x1100_1af4);
    assert_eq!(read32(&config, 0x10), 0b100, "64-bit memory BAR");
    assert_ne!(read32(&config, 0x04) & 1 << 20, 0, "status says that there is a capability list");
    let mut ids = Vec::new();
    let mut next = read32(&config, 0x34) as u16;
    while next != 0 {
        let header = read32(&config, next);
        ids.push(header as u8);
        next = (header >> 8) as u8 as u16;
    }
    assert_eq!(ids, [0x11, 0x01, 0x10]);
    assert_eq!(read32(&config, MSIX_CAPABILITY) >> 16, 8, "table size is one less");
    assert_eq!(read32(&config, MSIX_CAPABILITY + 4), TABLE);
    assert_eq!(read32(&config, MSIX_CAPABILITY + 8), PENDING);
    assert_eq!(read32(&config, 0x100), 0, "no extended capability");
    let mut across = [0xaa; 8];
    config.read(0xffe, &mut across);
    assert_eq!(across, [0; 8]);
}

#[test]
fn capabilities_begin_where_there_is_room_and_not_before() {
    let mut config = config(9);
    // What is there ends at 0x90: room is only ever left, and offsets are multiples of 4.
    config.begin_next_capability_at(0x40);
    let behind = config.add_vendor_capability(&[3], &[]).unwrap();
    assert_eq!(behind, 0x90);
    config.begin_next_capability_at(0xe1);
    assert_eq!(config.add_vendor_capability(&[3], &[]), Ok(0xe4));
    assert_eq!(read32(&config, behind) as u16, 0xe409, "the list leads there");
    config.begin_next_capability_at(0xff);
    assert!(matches!(config.add_vendor_capability(&[3], &[]), Err(Error::NoRoomForCapability { .. })));
}

#[test]
fn sizing_a_64_bit_bar_gives_its_size() {
    let mut config = config(1);
    config.write(0x10, &[0xff; 4]);
    config.write(0x14, &[0xff; 4]);
    assert_eq!(read32(&config, 0x10), !0x3fff | 0b100);
    assert_eq!(read32(&config, 0x14), u32::MAX);
    config.write(0x10, &0x1_c000_4000_u64.to_le_bytes());
    let bar = config.bars()[0];
    assert_eq!((bar.address, bar.length_bytes, bar.decoded), (0x1_c000_4000, 0x4000, false));
    config.write(0x04, &[2]);
    assert!(config.bars()[0].decoded);
}

#[test]
fn a_32_bit_bar_takes_one_register() {
    let mut config = ConfigSpace::new(&Identity::default());
    config.add_bar(5, BarKind::Memory32, 0x1000).unwrap();
    config.write(0x24, &[0xff; 8]);
    assert_eq!(read32(&config, 0x24), 0xffff_f000);
    assert_eq!(read32(&config, 0x28), 0);
    assert_eq!(config.bars()[0].address, 0xffff_f000);
}

#[test]
fn read_only_bits_stay() {
    let mut config = config(4);
    let before = config.clone();
    let all: Vec<u8> = vec![0xff; 4096];
    config.write(0, &all);
    config.write(0xffff, &all);
    assert_eq!(read32(&config, 0x00), read32(&before, 0x00));
    assert_eq!(read32(&config, 0x04), 0x0010_0546, "no I/O decoding, status unchanged");
    assert_eq!(read32(&config, 0x08), read32(&before, 0x08));
    assert_eq!(read32(&config, 0x34), 0x40);
    assert_eq!(read32(&config, MSIX_CAPABILITY), read32(&before, MSIX_CAPABILITY) | 0xc000_0000);
    assert_eq!(config.msix_control(), (true, true));
}

#[test]
fn power_states_that_do_not_exist_are_discarded_and_d3_stops_decoding() {
    let mut config = config(1);
    let control = 0x4c + 4;
    config.write(0x04, &[6, 0]);
    config.write(control, &[1]);
    assert_eq!(read32(&config, control) & 3, 0);
    config.write(control, &[3]);
    assert_eq!(read32(&config, control), 0b1011);
    assert!(!config.bars()[0].decoded);
    assert!(!config.bus_master());
    config.write(control, &[2]);
    assert_eq!(read32(&config, control) & 3, 3);
    config.write(control, &[0]);
    assert!(config.bars()[0].decoded && config.bus_master());
}

#[test]
fn shapes_that_pci_cannot_express_are_refused() {
    let mut config = ConfigSpace::new(&Identity::default());
    for (bar, kind, length_bytes) in [
        (6, BarKind::Memory32, 0x1000),
        (255, BarKind::Memory32, 0x1000),
        (5, BarKind::Memory64, 0x1000),
        (0, BarKind::Memory32, 0),
        (0, BarKind::Memory32, 8),
        (0, BarKind::Memory32, 0x1001),
        (0, BarKind::Memory32, 1 << 32),
        (0, BarKind::Memory64, 1 << 63),
    ] {
        let error = config.add_bar(bar, kind, length_bytes).unwrap_err();
        assert!(matches!(error, Error::BadBar { .. }), "{bar} {length_bytes:#x}: {error}");
    }
    config.add_bar(2, BarKind::Memory64, 0x1000).unwrap();
    for bar in [1, 2, 3] {
        assert!(config.add_bar(bar, BarKind::Memory64, 0x1000).is_err(), "{bar} overlaps");
    }
    for (vectors, bar, table_offset, pending_offset) in [
        (0, 2, 0, 0x800),
        (2049, 2, 0, 0x800),
        (1, 3, 0, 0x800),
        (1, 9, 0, 0x800),
        (1, 2, 4, 0x800),
        (1, 2, 0, 0x804),
        (1, 2, 0xff8, 0),
        (1, 2, 0, 0x1000),
        (1, 2, u32::MAX - 7, 0),
        (2, 2, 0, 0x18),
        (65, 2, 0x810, 0x808),
    ] {
        let layout = MsixLayout { vectors, bar, table_offset, pending_offset };
        let error = config.add_msix(layout).unwrap_err();
        assert!(matches!(error, Error::BadMsix { .. }), "{layout:?}: {error}");
    }
    let layout = MsixLayout { vectors: 1, bar: 2, table_offset: 0, pending_offset: 0x10 };
    config.add_msix(layout).unwrap();
    assert!(config.add_msix(layout).is_err());
    assert!(config.add_vendor_capability(&[0; 200], &[]).is_err());
    config.add_vendor_capability(&[0; 176], &[]).unwrap();
    assert!(matches!(config.add_vendor_capability(&[0], &[]), Err(Error::NoRoomForCapability { .. })));
}

#[test]
fn a_restored_space_is_the_saved_one() {
    let mut source = config(4);
    source.write(0x10, &0xc000_4000_u32.to_le_bytes());
    source.write(0x04, &[6, 4]);
    source.write(0x3c, &[11]);
    let state = source.save();
    let bytes = vmstate::to_bytes(&state);
    let state = vmstate::from_bytes::<PciState>(&bytes, 1).unwrap();
    let mut target = config(4);
    target.restore(&state).unwrap();
    assert_eq!(target.save(), source.save());
    assert_eq!(target.bars(), source.bars());
    assert!(target.bus_master());
}

#[test]
fn a_state_of_another_device_is_refused() {
    let good = config(4).save();
    let mut target = config(4);
    for offset in [0x00, 0x02, 0x04, 0x06, 0x08, 0x0b, 0x10, 0x2c, 0x34, 0x40, 0x41, 0x42, 0x44, 0x48, 0xff] {
        let mut state = good.clone();
        state.bytes[offset] ^= 1;
        let refused = target.restore(&state).unwrap_err();
        assert!(matches!(refused, Error::ConfigMismatch { offset: at, .. } if at == offset), "{refused}");
    }
    let mut state = good.clone();
    state.bar_length_bytes[0] = 0x2000;
    assert_eq!(target.restore(&state), Err(Error::BarSizeMismatch { bar: 0, saved: 0x2000, here: 0x4000 }));
    let mut state = good.clone();
    state.bar_length_bytes[1] = 0x2000;
    assert!(matches!(target.restore(&state), Err(Error::BarSizeMismatch { bar: 1, .. })));
    let mut state = good.clone();
    state.bytes[0x50] |= 2;
    assert_eq!(target.restore(&state), Err(Error::BadPowerState { state: 2 }));
    assert_eq!(target.save(), good, "refusals change nothing");
    assert!(matches!(target.restore(&config(5).save()), Err(Error::ConfigMismatch { offset: 0x42, .. })));
}
