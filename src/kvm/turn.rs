//! Unit tests that open /dev/kvm wait for their turn, as `tests/support` has it for integration tests: guests that compete for
//! processors make watchdogs bark.

use std::fs::{File, OpenOptions};
use std::sync::OnceLock;

use rustix::fs::{FlockOperation, flock};

/// Waits until no other test program of this host uses KVM. It is this one's turn until it ends: its own tests run side by side.
pub(super) fn take() {
    static TURN: OnceLock<File> = OnceLock::new();
    TURN.get_or_init(|| {
        // The lock of `support::TestBed`.
        let path = std::env::temp_dir().join("ferry-tests-kvm.lock");
        let file =
            OpenOptions::new().create(true).append(true).open(path).expect("the lock file can be made");
        flock(&file, FlockOperation::LockExclusive).expect("the lock file can be locked");
        file
    });
}

#[test]
fn whoever_opens_kvm_keeps_other_programs_waiting() {
    super::Host::open().expect("these tests need /dev/kvm");
    let other = File::open(std::env::temp_dir().join("ferry-tests-kvm.lock")).expect("there is a lock");
    assert!(flock(&other, FlockOperation::NonBlockingLockExclusive).is_err());
}
