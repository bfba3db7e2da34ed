//! vCPUs that are slowed down.

use std::time::{Duration, Instant};

use super::{TestGuest, WATCHDOG};

/// Counts at 0x5000.
const COUNT: [u8; 8] = [
    0xff, 0x05, 0x00, 0x50, 0x00, 0x00, // inc dword [0x5000]
    0xeb, 0xf8, // jmp back
];

const FOR_EVER: Duration = Duration::from_secs(3600);

fn moves_on(guest: &TestGuest) {
    let old = guest.word(0x5000);
    let deadline = Instant::now() + WATCHDOG;
    while guest.word(0x5000) == old {
        assert!(Instant::now() < deadline, "the guest stands still");
        std::thread::yield_now();
    }
}

#[test]
fn a_vcpu_that_rests_stands_still_and_hears_what_it_is_asked() {
    let guest = TestGuest::new(2, &COUNT);
    guest.vcpus.resume().unwrap();
    moves_on(&guest);
    let rest = |until| guest.vcpus.rest(until).unwrap();
    rest(Some(Instant::now() + FOR_EVER));
    // It has heard that, and hears more without a turn in the guest between.
    let (count, exits) = (guest.word(0x5000), guest.vcpus.exits());
    guest.vcpus.cpuid().unwrap();
    rest(Some(Instant::now() + FOR_EVER));
    assert_eq!((guest.word(0x5000), guest.vcpus.exits()), (count, exits));
    rest(None);
    moves_on(&guest);

    rest(Some(Instant::now() + FOR_EVER));
    guest.vcpus.pause().unwrap();
    guest.vcpus.save_states().unwrap();
    guest.vcpus.resume().unwrap();
    moves_on(&guest);

    rest(Some(Instant::now()));
    moves_on(&guest);
}

/// At its most a guest still runs; after the end nobody makes it leave any more.
#[test]
fn throttling_is_changed_and_ends_at_once() {
    let guest = TestGuest::new(2, &COUNT);
    guest.vcpus.stop_throttling();
    guest.vcpus.resume().unwrap();
    for _ in 0..2 {
        for percent in [1, 99, 50, 99] {
            guest.vcpus.throttle(percent).unwrap();
            let exits = guest.vcpus.exits();
            moves_on(&guest);
            let deadline = Instant::now() + WATCHDOG;
            while guest.vcpus.exits() < exits + 4 {
                assert!(Instant::now() < deadline, "nobody makes it leave the guest");
                std::thread::yield_now();
            }
        }
        guest.vcpus.pause().unwrap();
        guest.vcpus.resume().unwrap();
        moves_on(&guest);
        guest.vcpus.stop_throttling();
        guest.vcpus.stop_throttling();
        // What was asked before the end has been done when this is answered.
        guest.vcpus.cpuid().unwrap();
        moves_on(&guest);
    }
    guest.vcpus.throttle(99).unwrap();
    drop(guest);
}
