//! A driver that does not play by the rules: bounded work, no harm, DEVICE_NEEDS_RESET.

use super::*;

fn needs_reset(guest: &Guest) {
    assert!(!guest.device.process(0));
    assert_ne!(guest.status() & status::NEEDS_RESET, 0);
    assert_eq!(guest.take_signals().last(), Some(&1), "the configuration vector tells the driver");
    assert_eq!(guest.read(regs::ISR as usize, 1) & 2, 2);
    assert!(!guest.device.process(0));
    assert!(guest.take_signals().is_empty(), "it stands still");
}

#[test]
fn a_ring_that_claims_too_much_breaks_the_device_until_reset() {
    let mut guest = Guest::ready(64);
    guest.memory.write_obj(65_u16, GuestAddress(AVAILABLE + 2)).unwrap();
    needs_reset(&guest);
    guest.set_status(0);
    guest.negotiate();
    guest.set_up_queue(64);
    guest.set_status(0xf);
    guest.available = 0;
    guest.ask(BUFFER, 5);
    guest.device.process(0);
    assert_eq!(guest.used(0), (1, 0, 5));
}

#[test]
fn buffers_outside_memory_break_the_device() {
    for (address, length) in [
        (MEMORY_BYTES as u64, 1),
        (MEMORY_BYTES as u64 - 16, 17),
        (u64::MAX - 3, 16),
        (u64::MAX, 1),
        (1 << 40, 4096),
    ] {
        let mut guest = Guest::ready(64);
        guest.ask(address, length);
        needs_reset(&guest);
        // The broken state still migrates.
        guest.device.pause();
        let target = Guest::with_memory(guest.memory.clone());
        target.device.restore(&guest.device.save()).unwrap();
        assert_ne!(target.status() & status::NEEDS_RESET, 0);
    }
}

#[test]
fn a_head_beyond_the_table_breaks_the_device() {
    let mut guest = Guest::ready(16);
    guest.offer(16, 16);
    needs_reset(&guest);
}

#[test]
fn chains_that_loop_end() {
    let mut guest = Guest::ready(64);
    guest.descriptor(0, BUFFER, 1, WRITE | NEXT, 1);
    guest.descriptor(1, BUFFER + 1, 1, WRITE | NEXT, 0);
    guest.offer(0, 64);
    assert!(!guest.device.process(0));
    assert_eq!(guest.used(0), (1, 0, 64));
    guest.descriptor(2, BUFFER, 1, WRITE | NEXT, 2);
    guest.offer(2, 64);
    assert!(!guest.device.process(0));
    assert_eq!(guest.used(1), (2, 2, 64));
}

#[test]
fn one_request_gets_a_bounded_number_of_bytes() {
    let mut guest = Guest::ready(64);
    guest.ask(BUFFER, 0x8_0000);
    assert!(!guest.device.process(0));
    assert_eq!(guest.used(0), (1, 0, 0x1_0000));
    guest.descriptor(0, BUFFER, 0xc000, WRITE | NEXT, 1);
    guest.descriptor(1, BUFFER, u32::MAX - 0xc000, WRITE | NEXT, 2);
    guest.descriptor(2, u64::MAX, u32::MAX, WRITE, 0);
    guest.offer(0, 64);
    assert!(!guest.device.process(0));
    assert_eq!(guest.used(1), (2, 0, 0x1_0000));
}

#[test]
fn empty_and_read_only_requests_cost_and_come_back() {
    let mut guest = Guest::ready(64);
    guest.descriptor(0, BUFFER, 0, WRITE, 0);
    guest.descriptor(1, BUFFER, 100, 0, 0);
    guest.descriptor(2, BUFFER, 100, NEXT, 99);
    for head in [0, 1, 2] {
        guest.offer(head, 64);
    }
    assert!(!guest.device.process(0));
    assert_eq!((0..3).map(|entry| guest.used(entry)).collect::<Vec<_>>(), [(3, 0, 0), (3, 1, 0), (3, 2, 0)]);
    assert_eq!(guest.bytes(BUFFER, 100), [0; 100]);
    assert_eq!(guest.status(), 0xf);
    for _ in 0..64 {
        guest.offer(0, 64);
    }
    assert!(guest.device.process(0), "64 empty requests are a batch");
    assert_eq!(guest.used(0).0, 67);
}

#[test]
fn indirect_tables_are_bounded() {
    let mut guest = Guest::ready(64);
    // 65,535 descriptors of one byte each, wherever the guest has memory, then a table in a table.
    guest.descriptor(0, 0x4000, 16 * 4096, INDIRECT, 0);
    for index in 0..4096 {
        guest.descriptor_at(0x4000 + 16 * index, 0x8_0000, 1, WRITE | NEXT, index as u16 + 1);
    }
    guest.offer(0, 64);
    assert!(!guest.device.process(0));
    assert_eq!(guest.used(0), (1, 0, 64));
    guest.descriptor(1, 0x4000, 16, INDIRECT, 0);
    guest.descriptor_at(0x4000, 0x4000, 16, INDIRECT, 0);
    guest.offer(1, 64);
    assert!(!guest.device.process(0));
    assert_eq!(guest.used(1), (2, 1, 0));
    guest.descriptor(2, 0x4000, 15, INDIRECT, 0);
    guest.offer(2, 64);
    assert!(!guest.device.process(0));
    assert_eq!(guest.used(2), (3, 2, 0));
}

#[test]
fn every_access_of_every_size_is_harmless() {
    let mut guest = Guest::ready(64);
    guest.ask(BUFFER, 10);
    for value in [0x00, 0x01, 0x5a, 0xff_u8] {
        for length in [1, 2, 4, 8] {
            for offset in (0..0x4000).filter(|offset| offset % 0x400 < 0x40 || offset % 0x400 > 0x3f8) {
                guest.device.bar_read(0, offset, &mut [0; 8][..length]);
                guest.device.bar_write(0, offset, &[value; 8][..length]);
                guest.device.process(0);
            }
            for offset in 0..0x110 {
                guest.device.config_read(offset, &mut [0; 8][..length]);
                guest.device.config_write(offset, &[value; 8][..length]);
            }
        }
    }
    for bar in [0, 1, 255] {
        guest.device.bar_read(bar, u64::MAX, &mut [0; 8]);
        guest.device.bar_write(bar, u64::MAX, &[0; 8]);
    }
    assert!(!guest.device.process(u16::MAX));
    // Whatever that was, it can be saved and restored.
    guest.device.pause();
    let target = Guest::with_memory(guest.memory.clone());
    target.device.restore(&guest.device.save()).unwrap();
    assert_eq!(target.device.save(), guest.device.save());
}
