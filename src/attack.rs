//! Saved state that nobody wrote: truncated, and with every bit flipped.

use vmstate::VmState;

/// Each truncation of `good` is refused, and each flipped bit too, unless `restore`, which checks a state and saves what became of
/// it, gives back just that.
pub(crate) fn attack<T: VmState>(good: &T, restore: impl Fn(&T) -> Option<T>) {
    let good = vmstate::to_bytes(good);
    for length in 0..good.len() {
        assert!(vmstate::from_bytes::<T>(&good[..length], T::VERSION).is_err(), "{length} bytes");
    }
    let mut taken = 0;
    for position in 0..good.len() {
        for bit in 0..8 {
            let mut bytes = good.clone();
            bytes[position] ^= 1 << bit;
            let Ok(state) = vmstate::from_bytes::<T>(&bytes, T::VERSION) else { continue };
            if let Some(saved) = restore(&state) {
                taken += 1;
                assert_eq!(vmstate::to_bytes(&saved), bytes, "byte {position} bit {bit}");
            }
        }
    }
    assert!((1..8 * good.len()).contains(&taken), "some of it is the guest's choice, not all: {taken}");
}
