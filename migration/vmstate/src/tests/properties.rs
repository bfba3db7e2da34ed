use proptest::prelude::*;

use super::description::described_bytes;
use super::{All, Number, Other, Part, Sparse, all, sparse};
use crate::{Bitmap, describe, from_bytes, to_bytes};

prop_compose! {
    fn any_state()(
        flag: bool, byte in 0..=0xfe_u8, signed: i64, raw: [u8; 5], words: [[u16; 2]; 3], level in 1..=100_u32, value: i32,
        bytes in prop::collection::vec(any::<u8>(), 0..=64),
        slots in prop::collection::vec(prop::option::of(any::<i32>()), 0..=8),
        names in prop::collection::vec(any::<u64>(), 0..=4),
        queue in prop::collection::vec(any::<i32>(), 0..=3),
        set in prop::collection::vec(any::<bool>(), 0..=200),
        new: u16, half in 0..128_u8, part in prop::option::of((any::<u8>(), any::<u8>())), other in prop::option::of(any::<u16>()),
    ) -> All {
        let mut map = Bitmap::new(set.len());
        set.iter().enumerate().for_each(|(index, bit)| map.set(index, *bit));
        All {
            flag, byte, signed, raw, words, level,
            inner: Number { value }, pair: [Number { value: !value }, Number { value }],
            bytes_len: bytes.len() as u32, bytes,
            count: names.len() as u8, numbers: vec![sparse(&slots); names.len()], names,
            queue: queue.into_iter().map(|value| Number { value }).collect(),
            bits: set.len() as u16, map, old: 9, new, between: 0, even: half * 2,
            part: part.map(|(value, more)| Part { value, more }),
            other: other.filter(|_| byte != 0).map(|value| Other { value }),
        }
    }
}

proptest! {
    #[test]
    fn save_load_save_gives_the_same_bytes(state in any_state()) {
        let bytes = to_bytes(&state);
        let loaded = from_bytes::<All>(&bytes, 3).unwrap();
        prop_assert_eq!(to_bytes(&loaded), bytes);
        prop_assert_eq!(loaded, state);
    }

    #[test]
    fn description_always_accounts_for_every_byte(state in any_state()) {
        prop_assert_eq!(described_bytes(&describe(&state)), to_bytes(&state).len() as u64);
    }

    #[test]
    fn changed_bytes_are_refused_or_load_as_what_they_say(at: prop::sample::Index, flip in 1..=255_u8, version in 1..=3_u32) {
        let mut bytes = to_bytes(&all());
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        if let Ok(state) = from_bytes::<All>(&bytes, version) && version == 3 {
            prop_assert_eq!(to_bytes(&state).len(), bytes.len());
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), version in 0..5_u32) {
        let _ = from_bytes::<All>(&bytes, version);
        let _ = from_bytes::<Sparse>(&bytes, version);
    }
}
