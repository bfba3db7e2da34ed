use super::{Sparse, sparse};
use crate::{from_bytes, to_bytes};

#[test]
fn sparse_array_has_a_marker_for_every_slot() {
    let state = sparse(&[Some(0), None, Some(2), Some(3)]);
    let bytes = to_bytes(&state);
    assert_eq!(bytes[2..], [0x31, 0, 0, 0, 0, 0x30, 0x31, 0, 0, 0, 2, 0x31, 0, 0, 0, 3]);
    assert_eq!(from_bytes::<Sparse>(&bytes, 1), Ok(state));
}

#[test]
fn wrong_slot_marker_names_the_slot() {
    let mut bytes = to_bytes(&sparse(&[None, None, Some(2)]));
    bytes[4] = 0x7a;
    let error = from_bytes::<Sparse>(&bytes, 1).unwrap_err();
    assert_eq!(error.to_string(), "items[2]: slot marker 0x7a is neither '0' nor '1'");
}

#[test]
fn count_is_bounded_before_anything_is_read() {
    let error = from_bytes::<Sparse>(&[0, 9], 1).unwrap_err();
    assert_eq!(error.to_string(), "count: 9 is above 8");
    let error = from_bytes::<Sparse>(&[0, 8, b'0'], 1).unwrap_err();
    assert_eq!(error.to_string(), "items: needs 8 bytes but only 1 are left");
}

#[test]
fn written_count_is_the_real_length() {
    let mut state = sparse(&[None, Some(1)]);
    state.count = 77;
    assert_eq!(to_bytes(&state)[..2], [0, 2]);
}
