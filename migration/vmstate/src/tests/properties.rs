use proptest::prelude::*;

use super::arrays::Grid;
use super::context::{Configured, Local};
use super::description::described_bytes;
use super::recursion::{Bus, Folder, Forest};
use super::{All, Number, Other, Part, Sparse, all, sparse};
use crate::{Bitmap, Slots, VmState, describe, from_bytes, from_bytes_with, measure, to_bytes};

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

prop_compose! {
    fn any_grid()(rows in 0..=3_u16, columns in 0..=4_u32)(
        tables in prop::collection::vec(
            prop::collection::vec(prop::option::of(any::<i32>()), columns as usize), rows as usize,
        ),
        sets in prop::collection::vec(prop::collection::vec(any::<bool>(), columns as usize), rows as usize),
        rows in Just(rows), columns in Just(columns),
    ) -> Grid {
        let tables = tables.iter().map(|table| sparse(table).items).collect();
        let map = |set: &Vec<bool>| {
            let mut map = Bitmap::new(set.len());
            set.iter().enumerate().for_each(|(index, bit)| map.set(index, *bit));
            map
        };
        Grid { rows, columns, tables, maps: sets.iter().map(map).collect() }
    }
}

/// Up to as many levels as there may be.
fn any_bus() -> impl Strategy<Value = Bus> {
    let bus = |number, bridges: Slots<Bus>| Bus { number, slot_count: bridges.len() as u8, bridges };
    let last = any::<u8>().prop_map(move |number| bus(number, Slots::default()));
    last.prop_recursive(3, 64, 8, move |inner| {
        (any::<u8>(), prop::collection::vec(prop::option::of(inner), 0..8))
            .prop_map(move |(number, bridges)| bus(number, bridges.into_iter().collect()))
    })
}

/// What loads is what its bytes say: saved and loaded again it is the same.
fn loads_as_it_is<T: VmState + PartialEq + std::fmt::Debug>(bytes: &[u8], version: u32) {
    let _ = from_bytes::<T>(bytes, version);
    if let Ok(length) = measure::<T>(bytes, version) {
        let state = from_bytes::<T>(&bytes[..length], version).unwrap();
        assert_eq!(from_bytes::<T>(&to_bytes(&state), T::VERSION), Ok(state));
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
    fn rows_and_recursion_survive_too(grid in any_grid(), bus in any_bus()) {
        prop_assert_eq!(from_bytes::<Grid>(&to_bytes(&grid), 1), Ok(grid));
        let bytes = to_bytes(&bus);
        let loaded = from_bytes::<Bus>(&bytes, 1).unwrap();
        prop_assert_eq!(to_bytes(&loaded), bytes);
        prop_assert_eq!(described_bytes(&describe(&bus)), to_bytes(&bus).len() as u64);
        prop_assert_eq!(loaded, bus);
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        // Mostly bytes that mean something somewhere.
        bytes in prop::collection::vec(
            prop_oneof![Just(0), Just(1), Just(2), Just(5), Just(b'0'), Just(b'1'), any::<u8>()], 0..300,
        ),
        version in 0..5_u32, page_bytes: u32, slots in 0..8_usize,
    ) {
        let _ = from_bytes::<All>(&bytes, version);
        loads_as_it_is::<Sparse>(&bytes, version);
        loads_as_it_is::<Grid>(&bytes, version);
        loads_as_it_is::<Bus>(&bytes, version);
        loads_as_it_is::<Folder>(&bytes, version);
        loads_as_it_is::<Forest>(&bytes, version);
        let _ = from_bytes_with::<Configured, _>(&bytes, version, &Local { page_bytes, slots });
    }
}
