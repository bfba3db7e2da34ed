//! Exits, kicks, pauses.

use super::{CODE, MMIO, TestGuest, WATCHDOG};
use crate::kvm::Error;
use crate::vcpu::VcpuEvent;

/// `jmp $`
const SPIN: [u8; 2] = [0xeb, 0xfe];

#[test]
fn port_and_memory_accesses_reach_the_buses() {
    let mut code = vec![
        0xb0, 0x41, // mov al, 0x41
        0xe6, 0x12, // out 0x12, al
        0xb8, 0x44, 0x33, 0x22, 0x11, // mov eax, 0x11223344
        0xa3, 0x04, 0x00, 0x00, 0xd0, // mov [MMIO + 4], eax
        0xa3, 0xfd, 0x0f, 0x00, 0xd0, // mov [MMIO + 0xffd], eax: across a page
        0xa1, 0x08, 0x00, 0x00, 0xd0, // mov eax, [MMIO + 8]
        0xe7, 0x10, // out 0x10, eax
        0xe5, 0x17, // in eax, 0x17
        0xe7, 0x10, // out 0x10, eax
        0x66, 0xe7, 0x10, // out 0x10, ax
        0xa1, 0x00, 0x00, 0x00, 0xc0, // mov eax, [0xc0000000]: nobody there
        0xe7, 0x10, // out 0x10, eax
    ];
    code.extend(SPIN);
    let guest = TestGuest::new(1, &code);
    guest.vcpus.resume().unwrap();
    assert_eq!(guest.next_port(), (2, vec![0x41]));
    assert_eq!(guest.next_value(), 0x0808_0808);
    assert_eq!(guest.next_value(), 0x0707_0707);
    assert_eq!(guest.next_port(), (0, vec![7, 7]));
    assert_eq!(guest.next_value(), u32::MAX);
    let writes = guest.mmio_backlog();
    assert_eq!(writes[0], (4, vec![0x44, 0x33, 0x22, 0x11]));
    let across: Vec<u8> = writes[1..].iter().flat_map(|(_, data)| data.clone()).collect();
    assert_eq!((writes[1].0, across), (0xffd, vec![0x44, 0x33, 0x22, 0x11]));
    assert!(writes.iter().all(|(_, data)| data.len().is_power_of_two()), "{writes:?}");
}

#[test]
fn string_instructions_reach_a_port_element_by_element() {
    let mut code = vec![
        0xfc, // cld
        0xba, 0x10, 0x00, 0x00, 0x00, // mov edx, 0x10
        0xbe, 0x00, 0x50, 0x00, 0x00, // mov esi, 0x5000
        0xb9, 0x03, 0x00, 0x00, 0x00, // mov ecx, 3
        0xf3, 0x66, 0x6f, // rep outsw
        0xba, 0x15, 0x00, 0x00, 0x00, // mov edx, 0x15
        0xbf, 0x00, 0x60, 0x00, 0x00, // mov edi, 0x6000
        0xb9, 0x05, 0x00, 0x00, 0x00, // mov ecx, 5
        0xf3, 0x6c, // rep insb
        0xe6, 0x1f, // out 0x1f, al
    ];
    code.extend(SPIN);
    let guest = TestGuest::new(1, &code);
    guest.low().write(0x5000, &[1, 2, 3, 4, 5, 6]).unwrap();
    guest.vcpus.resume().unwrap();
    for expected in [[1, 2], [3, 4], [5, 6]] {
        assert_eq!(guest.next_port(), (0, expected.to_vec()));
    }
    assert_eq!(guest.next_port().0, 0xf);
    let mut data = [0; 6];
    guest.low().read(0x6000, &mut data).unwrap();
    assert_eq!(data, [5, 5, 5, 5, 5, 0]);
}

#[test]
fn a_spinning_guest_is_paused_and_resumed() {
    let code = [
        0xff, 0x05, 0x00, 0x50, 0x00, 0x00, // inc dword [0x5000]
        0xeb, 0xf8, // jmp back
    ];
    let guest = TestGuest::new(2, &code);
    let moves_on_from = |old: u32| {
        let deadline = std::time::Instant::now() + WATCHDOG;
        while guest.word(0x5000) == old {
            assert!(std::time::Instant::now() < deadline, "the guest stands still");
            std::thread::yield_now();
        }
    };
    let mut last = 0;
    for _ in 0..20 {
        guest.vcpus.resume().unwrap();
        guest.vcpus.resume().unwrap();
        moves_on_from(last);
        guest.vcpus.pause().unwrap();
        guest.vcpus.pause().unwrap();
        last = guest.word(0x5000);
        let state = guest.vcpus.save_states().unwrap();
        assert_eq!(guest.word(0x5000), last, "paused");
        assert!([CODE, CODE + 6].map(u64::from).contains(&state[0].registers.rip));
    }
}

#[test]
fn a_running_vcpu_is_neither_saved_nor_restored() {
    let guest = TestGuest::new(1, &SPIN);
    let states = guest.vcpus.save_states().unwrap();
    guest.vcpus.resume().unwrap();
    assert!(matches!(guest.vcpus.save_states(), Err(Error::NotPaused { vcpu: 0, .. })));
    assert!(matches!(guest.vcpus.restore_states(&states, 0), Err(Error::NotPaused { vcpu: 0, .. })));
}

#[test]
fn a_pause_completes_the_access_in_progress() {
    let mut code = vec![
        0x31, 0xc0, // xor eax, eax
        0xa1, 0x08, 0x00, 0x00, 0xd0, // mov eax, [MMIO + 8]
    ];
    code.extend(SPIN);
    let guest = TestGuest::new(1, &code);
    let values = guest.hold_mmio_reads();
    guest.vcpus.resume().unwrap();
    assert_eq!(guest.next_mmio(), (8, vec![]));
    // Asked while the vCPU is in the device; the kick has been sent when this returns.
    let paused = guest.vcpus.begin_pause().unwrap();
    values.send(0x5566_7788).unwrap();
    guest.vcpus.end_pause(&paused).unwrap();
    let registers = &guest.vcpus.save_states().unwrap()[0].registers;
    assert_eq!((registers.rax, registers.rip), (0x5566_7788, u64::from(CODE) + 7));
}

#[test]
fn a_triple_fault_asks_for_a_reset() {
    // ud2, with an empty interrupt table
    let guest = TestGuest::new(1, &[0x0f, 0x01, 0x1d, 0x00, 0x50, 0x00, 0x00, 0x0f, 0x0b]);
    guest.vcpus.resume().unwrap();
    assert!(matches!(guest.next_event(), (0, VcpuEvent::Reset)));
    guest.vcpus.pause().unwrap();
    guest.vcpus.save_states().unwrap();
}

#[test]
fn a_vcpu_that_has_ended_runs_again_only_in_another_state() {
    let guest = TestGuest::new(1, &[0x0f, 0x01, 0x1d, 0x00, 0x50, 0x00, 0x00, 0x0f, 0x0b]);
    guest.vcpus.resume().unwrap();
    assert!(matches!(guest.next_event(), (0, VcpuEvent::Reset)));
    let exits = guest.vcpus.exits();
    guest.vcpus.let_go().unwrap();
    guest.vcpus.resume().unwrap();
    guest.vcpus.pause().unwrap();
    assert_eq!(guest.event_backlog().len(), 0);
    assert_eq!(guest.vcpus.exits(), exits);
    guest.vcpus.reset().unwrap();
    guest.boot();
    guest.vcpus.resume().unwrap();
    assert!(matches!(guest.next_event(), (0, VcpuEvent::Reset)));
}

#[test]
fn what_kvm_cannot_do_stops_the_vcpu_with_its_place() {
    // jmp MMIO: there are no instructions in device memory.
    let mut code = vec![0xb8];
    code.extend(MMIO.to_le_bytes());
    code.extend([0xff, 0xe0]); // jmp eax
    let guest = TestGuest::new(1, &code);
    guest.vcpus.resume().unwrap();
    let (vcpu, event) = guest.next_event();
    let VcpuEvent::Failed(error) = event else { panic!("{event:?}") };
    assert_eq!(vcpu, 0);
    assert!(matches!(error, Error::Stuck { vcpu: 0, rip, .. } if rip == u64::from(MMIO)), "{error}");
    assert!(error.to_string().contains("internal error 1 (KVM cannot emulate the instruction)"), "{error}");
}

#[test]
fn another_processor_waits_for_its_start_message() {
    let guest = two_processors();
    guest.vcpus.resume().unwrap();
    assert_eq!(guest.next_port(), (0, vec![0x42]));
}

/// The first sends INIT and start-up (real mode at 0x2000) to the second, which writes 0x42 to port 0x10.
pub(super) fn two_processors() -> TestGuest {
    let mut code = vec![
        0xc7, 0x05, 0x10, 0x03, 0xe0, 0xfe, 0x00, 0x00, 0x00, 0x01, // mov dword [ICR high], 1 << 24
        0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0x00, 0x00, // mov dword [ICR low], INIT
        0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x02, 0x46, 0x00,
        0x00, // mov dword [ICR low], start-up, page 2
    ];
    code.extend(SPIN);
    let guest = TestGuest::new(2, &code);
    guest.low().write(0x2000, &[0xb0, 0x42, 0xe6, 0x10, 0xf4]).unwrap();
    guest
}

#[test]
fn the_number_of_vcpus_has_limits() {
    let host = crate::kvm::Host::open().expect("these tests need /dev/kvm");
    let vm = crate::kvm::Vm::new(&host).unwrap();
    let buses = crate::vcpu::Buses { ports: Default::default(), mmio: Default::default() };
    for count in [0, host.max_vcpus() + 1] {
        let processors = crate::vcpu::Processors { count, ..Default::default() };
        let error = crate::vcpu::VcpuManager::new(
            &host,
            &vm,
            &processors,
            &buses,
            &(std::sync::Arc::new(|_, _| {}) as _),
        );
        assert!(matches!(error.unwrap_err(), Error::VcpuCount { asked, .. } if asked == count));
    }
}
