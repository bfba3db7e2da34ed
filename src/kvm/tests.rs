//! Interrupts and doorbells with a real guest.

use std::sync::Arc;

use bus::InterruptLine;
use pci::{MsiMessage, MsixSink};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Error, IrqLine, MsiRouter, MsixFunction};
use crate::vcpu::tests::{CODE, MMIO, TestGuest};

/// First of the vectors whose handlers write their vector number to port 0x10.
const FIRST_VECTOR: u8 = 0x50;
const VECTORS: u8 = 8;
const GDT: u64 = 0x3000;
const IDT: u64 = 0x4000;
const HANDLERS: u32 = 0x2000;
/// Where the guest waits with interrupts on.
const WAIT: u32 = CODE + 28;

/// A guest that waits for interrupts.
fn guest() -> TestGuest {
    let code = [
        0x0f, 0x01, 0x15, 0x00, 0x38, 0x00, 0x00, // lgdt [0x3800]
        0x0f, 0x01, 0x1d, 0x08, 0x38, 0x00, 0x00, // lidt [0x3808]
        0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00, // mov dword [spurious], enabled
        0xb0, 0x01, // mov al, 1
        0xe6, 0x11, // out 0x11, al: ready
        0xfb, // sti
        0xf4, // hlt
        0xeb, 0xfd, // jmp to hlt
    ];
    let guest = TestGuest::new(1, &code);
    let low = guest.low();
    let pointer = |limit: u16, base: u64| [&limit.to_le_bytes()[..], &(base as u32).to_le_bytes()].concat();
    low.write(0x3800, &pointer(0x1f, GDT)).unwrap();
    low.write(0x3808, &pointer(0x7ff, IDT)).unwrap();
    low.write(GDT + 0x10, &0x00cf_9b00_0000_ffff_u64.to_le_bytes()).unwrap();
    low.write(GDT + 0x18, &0x00cf_9300_0000_ffff_u64.to_le_bytes()).unwrap();
    for vector in FIRST_VECTOR..FIRST_VECTOR + VECTORS {
        let handler = HANDLERS + u32::from(vector - FIRST_VECTOR) * 32;
        // Leaves by a jump: an IRET outside long mode is not interpreted everywhere.
        let code = [
            &[0xb0, vector, 0xe6, 0x10][..], // mov al, vector; out 0x10, al
            &[0xc7, 0x05, 0xb0, 0x00, 0xe0, 0xfe, 0, 0, 0, 0], // mov dword [end of interrupt], 0
            &[0x83, 0xc4, 0x0c],             // add esp, 12
            &[0xb8],                         // mov eax, WAIT
            &WAIT.to_le_bytes(),
            &[0xff, 0xe0], // jmp eax
        ];
        low.write(handler.into(), &code.concat()).unwrap();
        let gate = u64::from(handler & 0xffff) | 0x10 << 16 | 0x8e00 << 32;
        low.write(IDT + u64::from(vector) * 8, &gate.to_le_bytes()).unwrap();
    }
    guest.vcpus.resume().unwrap();
    assert_eq!(guest.next_port(), (1, vec![1]));
    guest
}

fn message(vector: u8) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000, data: vector.into() }
}

fn expect(guest: &TestGuest, vector: u8) {
    assert_eq!(guest.next_port(), (0, vec![vector]));
}

#[test]
fn vectors_reach_the_guest_through_irqfds_and_follow_their_messages() {
    let guest = guest();
    let router = MsiRouter::new(Arc::clone(&guest.vm));
    let (first, second) = (MsixFunction::new(&router, 2).unwrap(), MsixFunction::new(&router, 1).unwrap());
    first.set_vector(0, Some(message(0x50)));
    first.set_vector(1, Some(message(0x51)));
    second.set_vector(0, Some(message(0x52)));
    for (function, vector, expected) in
        [(&first, 0, 0x50), (&first, 1, 0x51), (&second, 0, 0x52), (&first, 0, 0x50)]
    {
        function.signal(vector);
        expect(&guest, expected);
    }
    first.set_vector(0, Some(message(0x53)));
    first.signal(0);
    expect(&guest, 0x53);
    // What it does not have.
    first.set_vector(2, Some(message(0x54)));
    first.signal(2);
    first.signal_now(2).unwrap();
    second.signal(0);
    expect(&guest, 0x52);
}

#[test]
fn deferred_changes_reach_the_guest_before_they_are_settled_and_after() {
    let guest = guest();
    let router = MsiRouter::new(Arc::clone(&guest.vm));
    let function = MsixFunction::new(&router, 2).unwrap();
    function.set_vector(0, Some(message(0x50)));
    router.defer();
    function.set_vector(0, Some(message(0x51)));
    function.set_vector(1, Some(message(0x52)));
    let each = |vectors: [(u16, u8); 2]| {
        for (vector, expected) in vectors {
            function.signal(vector);
            expect(&guest, expected);
        }
    };
    each([(0, 0x51), (1, 0x52)]);
    assert_eq!(function.sent(), 0, "the table lacks the one and has another message for the other");
    router.settle().unwrap();
    each([(0, 0x51), (1, 0x52)]);
    assert_eq!(function.sent(), 2);
    function.set_vector(0, Some(message(0x53)));
    router.settle().unwrap();
    each([(0, 0x53), (1, 0x52)]);
    // A masked vector sends nothing, either way.
    router.defer();
    function.set_vector(0, None);
    function.signal(0);
    function.signal(1);
    expect(&guest, 0x52);
}

#[test]
fn a_flush_sends_once_more_what_was_signalled_since_the_last() {
    let guest = guest();
    let router = MsiRouter::new(Arc::clone(&guest.vm));
    let function = MsixFunction::new(&router, 3).unwrap();
    for vector in 0..3 {
        function.set_vector(vector.into(), Some(message(0x50 + vector)));
    }
    for vector in 0..2 {
        function.signal(vector.into());
        expect(&guest, 0x50 + vector);
    }
    guest.vcpus.pause().unwrap();
    // The interrupt request register, 32 vectors every 16 bytes.
    let requested = || {
        let lapic = guest.vcpus.save_states().unwrap()[0].lapic;
        [0x50, 0x51, 0x52]
            .map(|vector| lapic[0x200 + vector / 32 * 16 + vector % 32 / 8] >> (vector % 8) & 1 == 1)
    };
    assert_eq!(requested(), [false; 3]);
    function.set_vector(0, None);
    function.flush().unwrap();
    function.signal_now(0).unwrap();
    assert_eq!(requested(), [false, true, false], "a masked vector sends nothing");
    function.signal_now(2).unwrap();
    assert_eq!(requested(), [false, true, true]);

    guest.vcpus.resume().unwrap();
    let mut seen = [guest.next_port(), guest.next_port()];
    seen.sort();
    assert_eq!(seen, [(0, vec![0x51]), (0, vec![0x52])]);
    guest.vcpus.pause().unwrap();
    function.flush().unwrap();
    assert_eq!(requested(), [false; 3], "nothing was signalled since");
}

#[test]
fn a_message_that_no_processor_takes_does_not_fail_the_flush() {
    let guest = guest();
    guest.vcpus.pause().unwrap();
    // Two bits of logical destination: KVM's table of destinations cannot hold that, and it then says when it finds none.
    let mut states = guest.vcpus.save_states().unwrap();
    states[0].lapic[0xd3] = 0x03;
    guest.vcpus.restore_states(&states, 0).unwrap();
    let router = MsiRouter::new(Arc::clone(&guest.vm));
    let function = MsixFunction::new(&router, 1).unwrap();
    // Logical destination 80h.
    function.set_vector(0, Some(MsiMessage { address: 0xfee8_0004, data: 0x50 }));
    function.signal(0);
    function.flush().unwrap();
}

#[test]
fn interrupt_numbers_are_given_back() {
    let vm = guest().vm.clone();
    let router = MsiRouter::new(vm);
    let functions = [MsixFunction::new(&router, 2000).unwrap(), MsixFunction::new(&router, 2000).unwrap()];
    let error = MsixFunction::new(&router, 100).unwrap_err();
    assert!(matches!(error, Error::OutOfRoutes { asked: 100, free: 56, .. }), "{error}");
    router.defer();
    for vector in 0..2000 {
        functions.iter().for_each(|function| function.set_vector(vector, Some(message(0x50))));
    }
    router.settle().unwrap();
    drop(functions);
    MsixFunction::new(&router, 2048).unwrap();
}

#[test]
fn wired_interrupts_keep_their_routes_beside_messages() {
    let guest = guest();
    guest.vcpus.pause().unwrap();
    let router = MsiRouter::new(Arc::clone(&guest.vm));
    let function = MsixFunction::new(&router, 1).unwrap();
    function.set_vector(0, Some(message(0x50)));
    for gsi in [4, 11, 20] {
        let line = IrqLine::new(Arc::clone(&guest.vm), gsi);
        // Level-triggered and masked: the request stays with the line.
        let mut state = guest.vm.save_irqchip().unwrap();
        state.ioapic.redirection[gsi as usize] = 1 << 16 | 1 << 15 | 0x51;
        guest.vm.restore_irqchip(&state).unwrap();
        for high in [true, false, true, true, false, false] {
            line.set_level(high);
            assert_eq!(guest.vm.save_irqchip().unwrap().ioapic.irr >> gsi & 1 == 1, high, "{gsi}");
        }
    }
    IrqLine::new(Arc::clone(&guest.vm), 4).set_level(true);
    IrqLine::new(Arc::clone(&guest.vm), 12).set_level(true);
    let state = guest.vm.save_irqchip().unwrap();
    assert_eq!((state.master.irr & 0x10, state.slave.irr & 0x10), (0x10, 0x10), "the PICs see them too");
}

#[test]
fn a_doorbell_is_rung_without_an_exit() {
    let mut code = vec![
        0xb8, 0x07, 0x00, 0x00, 0x00, // mov eax, 7
        0xa3, 0x08, 0x10, 0x00, 0xd0, // mov [MMIO + 0x1008], eax
        0xe7, 0x10, // out 0x10, eax
        0xeb, 0xf7, // jmp to the doorbell
    ];
    code.extend([0xf4]);
    let guest = TestGuest::new(1, &code);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let address = u64::from(MMIO) + 0x1008;
    guest.vm.add_doorbell(&event, address).unwrap();
    assert!(guest.vm.add_doorbell(&event, address).is_err(), "there is one already");
    guest.vcpus.resume().unwrap();
    guest.next_port();
    guest.next_port();
    guest.vcpus.pause().unwrap();
    assert!(event.read().unwrap() >= 2);
    assert_eq!(guest.mmio_backlog(), []);

    guest.vm.remove_doorbell(&event, address).unwrap();
    assert!(guest.vm.remove_doorbell(&event, address).is_err(), "it is gone");
    guest.vcpus.resume().unwrap();
    assert_eq!(guest.next_mmio(), (0x1008, vec![7, 0, 0, 0]));
    guest.vcpus.pause().unwrap();
    assert!(event.read().is_err(), "not rung any more");
}
