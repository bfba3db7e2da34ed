//! A driver that plays by the rules.

use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

use super::*;

#[test]
fn a_request_gets_bytes_and_an_interrupt() {
    let mut guest = Guest::ready(64);
    guest.ask(BUFFER, 100);
    assert_eq!(guest.take_wakes(), [0]);
    assert_eq!(guest.used(0).0, 0, "nothing happens on the vCPU thread");
    assert!(!guest.device.process(0));
    assert_eq!(guest.used(0), (1, 0, 100));
    assert_eq!(guest.bytes(BUFFER, 101), [expected(100), vec![0]].concat());
    assert_eq!(guest.take_signals(), [0]);
    assert_eq!(guest.read(regs::ISR as usize, 1), 1);
    assert_eq!(guest.read(regs::ISR as usize, 1), 0, "reading clears it");
    assert!(!guest.device.process(0));
    assert!(guest.take_signals().is_empty(), "nothing new, no interrupt");
}

#[test]
fn a_chain_is_filled_buffer_by_buffer_and_read_only_ones_are_left_alone() {
    let mut guest = Guest::ready(64);
    guest.descriptor(3, BUFFER, 8, NEXT, 5);
    guest.descriptor(5, BUFFER + 0x100, 10, WRITE | NEXT, 1);
    guest.descriptor(1, BUFFER + 0x200, 6000, WRITE, 0);
    guest.offer(3, 64);
    guest.device.process(0);
    assert_eq!(guest.used(0), (1, 3, 6010));
    assert_eq!(guest.bytes(BUFFER, 8), [0; 8]);
    let filled = [guest.bytes(BUFFER + 0x100, 10), guest.bytes(BUFFER + 0x200, 6000)].concat();
    assert_eq!(filled, expected(6010));
}

#[test]
fn the_rings_wrap_around() {
    let mut guest = Guest::ready(4);
    guest.descriptor(0, BUFFER, 1, WRITE, 0);
    for round in 1..=70_000_u32 {
        guest.offer(0, 4);
        assert!(!guest.device.process(0));
        assert_eq!(guest.used((round - 1) as u16 % 4), (round as u16, 0, 1));
    }
    assert_eq!(guest.take_signals().len(), 70_000);
}

#[test]
fn pages_that_the_device_writes_are_marked_dirty() {
    let mut guest = Guest::ready(64);
    guest.ask(BUFFER + 0x800, 0x1000);
    let region = guest.memory.find_region(GuestAddress(0)).unwrap();
    (**region).bitmap().reset();
    guest.device.process(0);
    let dirty: Vec<_> =
        (0..MEMORY_BYTES / 4096).filter(|page| (**region).bitmap().dirty_at(page * 4096)).collect();
    assert_eq!(dirty, [(USED >> 12) as usize, (BUFFER >> 12) as usize, (BUFFER >> 12) as usize + 1]);
}

#[test]
fn work_comes_in_batches() {
    let mut guest = Guest::ready(64);
    guest.descriptor(0, BUFFER, 0x1_0000, WRITE, 0);
    for _ in 0..10 {
        guest.offer(0, 64);
    }
    let mut done = 0;
    while guest.device.process(0) {
        let (used, ..) = guest.used(0);
        assert!(used > done && used - done <= 4, "{done} then {used}");
        done = used;
    }
    assert_eq!(guest.used(9), (10, 0, 0x1_0000));
}

#[test]
fn a_paused_device_stands_still_and_loses_nothing() {
    let mut guest = Guest::ready(64);
    guest.device.pause();
    guest.ask(BUFFER, 10);
    let saved = guest.device.save();
    assert!(!guest.device.process(0));
    assert_eq!((guest.used(0).0, guest.take_signals()), (0, vec![]));
    assert_eq!(guest.device.save(), saved);
    guest.take_wakes();
    guest.device.resume();
    assert_eq!(guest.take_wakes(), [0]);
    guest.device.process(0);
    assert_eq!(guest.used(0), (1, 0, 10));
}

#[test]
fn what_is_no_bus_master_stands_still_and_loses_nothing() {
    let mut guest = Guest::ready(64);
    guest.set_bus_master(false);
    guest.ask(BUFFER, 10);
    let saved = guest.device.save();
    assert!(!guest.device.process(0));
    assert_eq!((guest.used(0).0, guest.take_signals()), (0, vec![]));
    assert_eq!(guest.device.save(), saved);
    let restored = Guest::with_memory(guest.memory.clone());
    restored.device.restore(&saved).unwrap();
    restored.device.resume();
    assert!(!restored.device.process(0));
    assert_eq!(restored.used(0).0, 0);
    for guest in [restored, guest] {
        guest.take_wakes();
        guest.set_bus_master(true);
        assert_eq!(guest.take_wakes(), [0]);
        guest.device.process(0);
        assert_eq!((guest.used(0), guest.take_signals()), ((1, 0, 10), vec![0]));
        guest.set_bus_master(true);
        assert!(guest.take_wakes().is_empty(), "it was one before");
        guest.memory.write_obj(0_u16, GuestAddress(USED + 2)).unwrap();
    }
}

#[test]
fn reset_forgets_the_queue_until_it_is_set_up_again() {
    let mut guest = Guest::ready(64);
    guest.ask(BUFFER, 10);
    guest.set_status(0);
    assert_eq!((guest.status(), guest.read(common::QUEUE_ENABLE, 2)), (0, 0));
    assert_eq!(guest.read(common::QUEUE_VECTOR, 2), 0xffff);
    assert!(!guest.device.process(0));
    assert_eq!(guest.used(0).0, 0);
    guest.available = 0;
    guest.negotiate();
    guest.set_up_queue(64);
    guest.take_wakes();
    guest.ask(BUFFER, 10);
    guest.take_wakes();
    guest.device.process(0);
    assert_eq!(guest.used(0).0, 0, "not before DRIVER_OK");
    guest.set_status(0xf);
    assert_eq!(guest.take_wakes(), [0], "doorbells that rang too early are heard");
    guest.device.process(0);
    assert_eq!(guest.used(0), (1, 0, 10));
}
