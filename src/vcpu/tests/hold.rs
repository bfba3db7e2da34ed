//! vCPUs that are told to stand still while some of them wait for memory that is not here.

use super::{TestGuest, WATCHDOG};
use crate::machine::Waiters;
use crate::userfault::{Fault, Userfault};

/// Where the guest reads a word.
const WORD: u64 = 0x20_000;
const PAGE: usize = 4096;

/// The word at [`WORD`] to port 0x10, for ever.
const TELL: [u8; 9] = [
    0xa1, 0x00, 0x00, 0x02, 0x00, // mov eax, [0x20000]
    0xe7, 0x10, // out 0x10, eax
    0xeb, 0xf7, // jmp back
];

/// Serves all faults but those of [`WORD`], until somebody waits for that.
fn serve_until_the_word_is_waited_for(userfault: &Userfault, waiters: &Waiters) {
    let mut faults = Vec::new();
    loop {
        faults.clear();
        userfault.faults(&mut faults).unwrap();
        for Fault { block, offset, thread } in faults.iter().copied() {
            if (block, offset) == (0, WORD) {
                return waiters.add(thread, block, offset);
            }
            userfault.place_zeros(block, offset, PAGE as u64).unwrap();
        }
    }
}

#[test]
fn a_vcpu_that_waits_for_memory_does_nothing_more_when_it_comes() {
    let guest = TestGuest::new(1, &TELL);
    let (userfault, waiters) = (Userfault::register(guest.ram.blocks()).unwrap(), Waiters::default());
    guest.vcpus.resume().unwrap();
    serve_until_the_word_is_waited_for(&userfault, &waiters);
    // It does not pause before it has its page.
    guest.vcpus.hold(|thread| waiters.has(thread)).unwrap();
    guest.vcpus.hold(|thread| waiters.has(thread)).unwrap();
    userfault.place(0, WORD, &[3; PAGE]).unwrap();
    waiters.serve(0, &(WORD..WORD + PAGE as u64));
    guest.vcpus.pause().unwrap();
    assert!(guest.port_backlog().is_empty(), "it went on");
    guest.vcpus.resume().unwrap();
    assert_eq!(guest.next_value(), 0x0303_0303);
    guest.vcpus.pause().unwrap();
}

#[test]
fn a_vcpu_that_is_let_go_while_it_waits_goes_on_with_its_memory() {
    let guest = TestGuest::new(1, &TELL);
    let (userfault, waiters) = (Userfault::register(guest.ram.blocks()).unwrap(), Waiters::default());
    guest.vcpus.resume().unwrap();
    serve_until_the_word_is_waited_for(&userfault, &waiters);
    guest.vcpus.hold(|thread| waiters.has(thread)).unwrap();
    guest.vcpus.let_go().unwrap();
    assert!(guest.port_backlog().is_empty());
    userfault.place(0, WORD, &[4; PAGE]).unwrap();
    assert_eq!(guest.next_value(), 0x0404_0404);
    // Nobody waits now: this is a pause.
    guest.vcpus.hold(|_| false).unwrap();
    guest.port_backlog();
    let asked = std::time::Instant::now();
    guest.vcpus.hold(|_| false).unwrap();
    assert!(asked.elapsed() < WATCHDOG && guest.port_backlog().is_empty());
}
