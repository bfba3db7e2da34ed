//! Arrays of sparse arrays and of other collections, and lengths that the description fixes.

use serde_json::json;

use super::Number;
use crate::{Bitmap, Slots, VmState, describe, from_bytes, from_bytes_with, schema_json, to_bytes};

pub(super) type Table = Slots<Number>;

fn table(values: &[Option<i32>]) -> Table {
    values.iter().map(|value| value.map(|value| Number { value })).collect()
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "fixed")]
struct Fixed {
    width: u8,
    #[vmstate(len = "width", max = 4)]
    tables: [Table; 2],
}

#[test]
fn array_of_sparse_arrays_lies_back_to_back() {
    let state = Fixed { width: 2, tables: [table(&[None, Some(7)]), table(&[Some(8), None])] };
    let bytes = to_bytes(&state);
    assert_eq!(bytes, [2, b'0', b'1', 0, 0, 0, 7, b'1', 0, 0, 0, 8, b'0']);
    assert_eq!(from_bytes::<Fixed>(&bytes, 1), Ok(state));
}

#[test]
fn slot_of_an_array_of_sparse_arrays_has_two_indexes() {
    let error = from_bytes::<Fixed>(&[2, b'0', b'0', b'0', b'2'], 1).unwrap_err();
    assert_eq!(error.to_string(), "tables[1][1]: slot marker 0x32 is neither '0' nor '1'");
    let error = from_bytes::<Fixed>(&[5], 1).unwrap_err();
    assert_eq!(error.to_string(), "width: 5 is above 4");
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "grid")]
pub(super) struct Grid {
    pub(super) rows: u16,
    pub(super) columns: u32,
    #[vmstate(len = "rows", max = 3, each_len = "columns", each_max = 4)]
    pub(super) tables: Vec<Table>,
    #[vmstate(len = "rows", max = 3, each_len = "columns", each_max = 4)]
    pub(super) maps: Vec<Bitmap>,
}

fn grid() -> Grid {
    let mut map = Bitmap::new(2);
    map.set(1, true);
    Grid { rows: 1, columns: 2, tables: vec![table(&[None, Some(7)])], maps: vec![map] }
}

#[test]
fn both_lengths_of_rows_are_earlier_fields() {
    let bytes = to_bytes(&Grid { rows: 99, columns: 99, ..grid() });
    assert_eq!(bytes, [0, 1, 0, 0, 0, 2, b'0', b'1', 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 2]);
    assert_eq!(from_bytes::<Grid>(&bytes, 1), Ok(grid()));
}

#[test]
fn both_lengths_of_rows_have_maxima() {
    let error = from_bytes::<Grid>(&[0, 4, 0, 0, 0, 0], 1).unwrap_err();
    assert_eq!(error.to_string(), "rows: 4 is above 3");
    let error = from_bytes::<Grid>(&[0, 0, 0, 0, 0, 5], 1).unwrap_err();
    assert_eq!(error.to_string(), "columns: 5 is above 4");
    let error = from_bytes::<Grid>(&[0, 3, 0, 0, 0, 1, b'0', b'0'], 1).unwrap_err();
    assert_eq!(error.to_string(), "tables[2]: needs 1 bytes but only 0 are left");
}

#[test]
fn length_of_no_rows_at_all_is_kept() {
    let bytes = [0, 0, 0, 0, 0, 3];
    let state = from_bytes::<Grid>(&bytes, 1).unwrap();
    assert_eq!((state.columns, state.tables.len()), (3, 0));
    assert_eq!(to_bytes(&state), bytes);
}

#[test]
fn rows_are_described_one_after_the_other() {
    let description = describe(&grid());
    let entries = description["fields"].as_array().unwrap();
    let kinds: Vec<_> = entries.iter().map(|entry| entry["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["uint16", "uint32", "ptr-marker", "ptr-marker", "struct", "bitmap"]);
}

#[test]
fn schema_says_both_lengths() {
    let tables = &schema_json::<Grid>()["fields"][2];
    assert_eq!((&tables["count"], &tables["max"]), (&json!("rows"), &json!(3)));
    assert_eq!(tables["each"], json!({ "count": "columns", "max": 4 }));
    assert_eq!((&tables["type"], &tables["struct"]["vmsd_name"]), (&json!("ptr-marker"), &json!("number")));
    let fixed = &schema_json::<Fixed>()["fields"][1];
    assert_eq!((&fixed["array_len"], &fixed["count"]), (&json!(2), &json!("width")));
}

/// Lengths that the stream does not hold.
#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "constant", context = "usize")]
struct Constant {
    #[vmstate(len = 3)]
    slots: Table,
    #[vmstate(len = 2 * 35)]
    map: Bitmap,
    #[vmstate(len = 2, each_len_from = "Clone::clone", each_max = 2)]
    words: Vec<Vec<u16>>,
}

#[test]
fn lengths_of_the_description_and_of_the_context_are_not_in_the_stream() {
    let mut map = Bitmap::new(70);
    map.set(69, true);
    let state = Constant { slots: table(&[None, Some(1), None]), map, words: vec![vec![0x102], vec![0x304]] };
    let mut expected = vec![b'0', b'1', 0, 0, 0, 1, b'0'];
    expected.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20]);
    expected.extend([1, 2, 3, 4]);
    assert_eq!(to_bytes(&state), expected);
    assert_eq!(from_bytes_with::<Constant, usize>(&expected, 1, &1), Ok(state));
    let error = from_bytes_with::<Constant, usize>(&expected, 1, &3).unwrap_err();
    assert_eq!(error.to_string(), "words: 3 is above 2");

    let fields = &schema_json::<Constant>()["fields"];
    assert_eq!((&fields[0]["array_len"], &fields[1]["array_len"]), (&json!(3), &json!(70)));
    assert_eq!(
        (&fields[2]["array_len"], &fields[2]["each"]),
        (&json!(2), &json!({ "count_from_context": true, "max": 2 }))
    );
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "switches")]
struct Switches {
    flags: [[bool; 3]; 2],
    count: u8,
    #[vmstate(len = "count", max = 4)]
    more: Vec<[i16; 2]>,
}

#[test]
fn bulk_values_are_strict_too() {
    let state = Switches {
        flags: [[true, false, true], [false; 3]],
        count: 2,
        more: vec![[-1, 1], [i16::MIN, i16::MAX]],
    };
    let bytes = [1, 0, 1, 0, 0, 0, 2, 0xff, 0xff, 0, 1, 0x80, 0, 0x7f, 0xff];
    assert_eq!(to_bytes(&state), bytes);
    assert_eq!(from_bytes::<Switches>(&bytes, 1), Ok(state));
    let error = from_bytes::<Switches>(&[1, 0, 1, 0, 2, 0, 0], 1).unwrap_err();
    assert_eq!(error.to_string(), "flags[1][1]: 0x02 is not a bool");
    let error = from_bytes::<Switches>(&[1, 0, 1, 0, 0, 0, 3, 0, 0], 1).unwrap_err();
    assert_eq!(error.to_string(), "more: needs 12 bytes but only 2 are left");
}

/// Takes three bytes on the wire and 32 in memory.
#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "thin")]
struct Thin {
    count: u8,
    #[vmstate(len = "count", max = 4)]
    bytes: Vec<u8>,
    word: u16,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "many")]
struct Many {
    count: u32,
    #[vmstate(len = "count", max = 100_000)]
    arrays: Vec<[Thin; 4]>,
}

#[test]
fn memory_that_is_free_again_does_not_count() {
    // On their way into an array its elements lie in memory twice: 64 bytes for three of the stream would be too many.
    let thin = Thin { count: 0, bytes: vec![], word: 1 };
    let state = Many { count: 50_000, arrays: vec![[(); 4].map(|()| thin.clone()); 50_000] };
    assert_eq!(from_bytes::<Many>(&to_bytes(&state), 1), Ok(state));
}
