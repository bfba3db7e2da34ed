//! Bytes of a saved function: whole, truncated, and with every bit flipped.

use super::*;

#[test]
fn truncated_states_are_refused_and_flipped_ones_refused_or_taken_as_they_are() {
    let (source, _) = Function::new(3);
    source.config_write(MSIX_CAPABILITY + 2, &0xc000_u16.to_le_bytes());
    source.bar_write(0, u64::from(TABLE), &0xfee0_1000_u64.to_le_bytes());
    source.endpoint.msix().trigger(0);
    let good = vmstate::to_bytes(&source.endpoint.save());
    for length in 0..good.len() {
        assert!(vmstate::from_bytes::<EndpointState>(&good[..length], 1).is_err(), "{length} bytes");
    }
    let mut taken = 0;
    for position in 0..good.len() {
        for bit in 0..8 {
            let mut bytes = good.clone();
            bytes[position] ^= 1 << bit;
            let (target, _) = Function::new(3);
            if let Ok(state) = vmstate::from_bytes::<EndpointState>(&bytes, 1)
                && target.endpoint.restore(&state).is_ok()
            {
                taken += 1;
                assert_eq!(vmstate::to_bytes(&target.endpoint.save()), bytes, "byte {position} bit {bit}");
            }
        }
    }
    assert!(
        (1..8 * good.len()).contains(&taken),
        "addresses and data are the guest's choice, ids are not: {taken}"
    );
}
