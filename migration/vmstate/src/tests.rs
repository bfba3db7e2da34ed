use proptest::prelude::*;
use serde_json::json;

use crate::{
    Bitmap, Problem, Slots, VmState, describe, from_bytes, from_bytes_with, measure, measure_with, schema,
    schema_json, to_bytes,
};

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "number")]
struct Number {
    value: i32,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "sparse")]
struct Sparse {
    count: u16,
    #[vmstate(len = "count", max = 8)]
    items: Slots<Number>,
}

fn sparse(values: &[Option<i32>]) -> Sparse {
    let items = values.iter().map(|value| value.map(|value| Number { value })).collect();
    Sparse { count: values.len() as u16, items }
}

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

#[test]
fn sparse_array_is_described_slot_by_slot() {
    let fields = json!([
        { "name": "count", "type": "uint16", "size": 2 },
        { "name": "items", "type": "ptr-marker", "size": 1 },
        { "name": "items", "type": "ptr-marker", "size": 1 },
        { "name": "items", "type": "struct", "size": 4, "struct":
            { "vmsd_name": "number", "version": 1, "fields": [{ "name": "value", "type": "int32", "size": 4 }] } },
    ]);
    let expected = json!({ "vmsd_name": "sparse", "version": 1, "fields": fields });
    assert_eq!(describe(&sparse(&[None, Some(7)])), expected);
}

/// One of everything.
#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "all", version = 3, oldest = 1, check = "All::consistent")]
struct All {
    flag: bool,
    byte: u8,
    signed: i64,
    raw: [u8; 5],
    words: [[u16; 2]; 3],
    inner: Number,
    pair: [Number; 2],
    #[vmstate(min = 1, max = 100)]
    level: u32,
    bytes_len: u32,
    #[vmstate(len = "bytes_len", max = 64)]
    bytes: Vec<u8>,
    count: u8,
    #[vmstate(len = "count", max = 4)]
    numbers: Vec<Sparse>,
    #[vmstate(len = "count", max = 4)]
    names: Vec<u64>,
    #[vmstate(list, max = 3)]
    queue: Vec<Number>,
    bits: u16,
    #[vmstate(len = "bits", max = 200)]
    map: Bitmap,
    #[vmstate(until = 1, default = "9")]
    old: u8,
    #[vmstate(since = 2)]
    new: u16,
    #[vmstate(since = 2, until = 2)]
    between: u8,
    #[vmstate(check = "even")]
    even: u8,
    #[vmstate(subsection)]
    part: Option<Part>,
    #[vmstate(subsection, needed = "All::other_needed")]
    other: Option<Other>,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "all/part", version = 2, oldest = 1)]
struct Part {
    value: u8,
    #[vmstate(since = 2)]
    more: u8,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "all/other")]
struct Other {
    value: u16,
}

impl All {
    fn consistent(&self) -> Result<(), String> {
        if self.flag && self.byte == 0xff { Err("flag is set with byte 0xff".into()) } else { Ok(()) }
    }

    fn other_needed(&self) -> bool {
        self.byte != 0
    }
}

fn even(value: &u8) -> Result<(), String> {
    if value.is_multiple_of(2) { Ok(()) } else { Err(format!("{value} is odd")) }
}

fn all() -> All {
    let mut map = Bitmap::new(70);
    map.set(0, true);
    map.set(69, true);
    All {
        flag: true,
        byte: 7,
        signed: -2,
        raw: *b"hello",
        words: [[1, 2], [3, 4], [5, 6]],
        inner: Number { value: 1 },
        pair: [Number { value: 2 }, Number { value: 3 }],
        level: 100,
        bytes_len: 3,
        bytes: vec![1, 2, 3],
        count: 2,
        numbers: vec![sparse(&[None]), sparse(&[Some(1)])],
        names: vec![0x0102_0304_0506_0708, 2],
        queue: vec![Number { value: 4 }, Number { value: 5 }],
        bits: 70,
        map,
        old: 9,
        new: 0x1234,
        between: 0,
        even: 4,
        part: Some(Part { value: 1, more: 2 }),
        other: Some(Other { value: 3 }),
    }
}

#[test]
fn every_kind_of_field_has_its_bytes() {
    let mut expected = vec![1, 7];
    expected.extend([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe]);
    expected.extend(b"hello");
    expected.extend([0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6]);
    expected.extend([0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3]);
    expected.extend([0, 0, 0, 100]);
    expected.extend([0, 0, 0, 3, 1, 2, 3]);
    expected.extend([2, 0, 1, b'0', 0, 1, b'1', 0, 0, 0, 1]);
    expected.extend([1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 2]);
    expected.extend([1, 0, 0, 0, 4, 1, 0, 0, 0, 5, 0]);
    expected.extend([0, 70, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x20]);
    expected.extend([0x12, 0x34, 4]);
    expected.extend(b"\x05\x08all/part\0\0\0\x02\x01\x02");
    expected.extend(b"\x05\x09all/other\0\0\0\x01\0\x03");
    assert_eq!(to_bytes(&all()), expected);
    assert_eq!(from_bytes::<All>(&expected, 3), Ok(all()));
}

#[test]
fn subsections_are_written_only_when_needed() {
    let state = All { byte: 0, part: None, ..all() };
    let bytes = to_bytes(&state);
    assert!(bytes.ends_with(&[0x12, 0x34, 4]));
    assert_eq!(from_bytes::<All>(&bytes, 3), Ok(All { other: None, ..state }));
}

#[test]
fn subsection_has_its_own_version() {
    let mut bytes = to_bytes(&All { byte: 0, part: None, ..all() });
    bytes.extend(b"\x05\x08all/part\0\0\0\x01\x01");
    assert_eq!(from_bytes::<All>(&bytes, 3).unwrap().part, Some(Part { value: 1, more: 0 }));
}

#[test]
fn unknown_and_repeated_subsections_are_refused() {
    let bytes = to_bytes(&all());
    let mut unknown = bytes.clone();
    unknown.extend(b"\x05\x07all/xyz\0\0\0\x01");
    assert_eq!(from_bytes::<All>(&unknown, 3).unwrap_err().to_string(), "unknown subsection \"all/xyz\"");
    let mut repeated = bytes;
    repeated.extend(b"\x05\x08all/part\0\0\0\x02\x01\x02");
    let error = from_bytes::<All>(&repeated, 3).unwrap_err();
    assert_eq!(error.to_string(), "part: subsection \"all/part\" comes twice");
    // A struct without subsections refuses them too.
    let error = from_bytes::<Number>(b"\0\0\0\0\x05\x08number/x\0\0\0\x01", 1).unwrap_err();
    assert_eq!(error.problem, Problem::UnknownSubsection("number/x".into()));
}

#[test]
fn older_versions_are_read_with_defaults() {
    let state = All { part: None, other: None, ..all() };
    let mut bytes = to_bytes(&state);
    // Version 1 has `old` where version 3 has `new`, and neither `between`.
    let tail = bytes.len() - 3;
    bytes.splice(tail..tail + 2, [42]);
    let loaded = from_bytes::<All>(&bytes, 1).unwrap();
    assert_eq!((loaded.old, loaded.new, loaded.between, loaded.even), (42, 0, 0, 4));
}

#[test]
fn versions_outside_the_range_are_refused_with_both_numbers() {
    let bytes = to_bytes(&all());
    let error = from_bytes::<All>(&bytes, 4).unwrap_err();
    assert_eq!(error.to_string(), "version 4 of \"all\" is too new: 3 is the newest this build reads");
    let error = from_bytes::<All>(&bytes, 0).unwrap_err();
    assert_eq!(error.to_string(), "version 0 of \"all\" is too old: 1 is the oldest this build reads");
}

#[test]
fn bounds_and_checks_name_the_field() {
    let refusal = |change: fn(&mut All)| {
        let mut state = all();
        change(&mut state);
        from_bytes::<All>(&to_bytes(&state), 3).unwrap_err().to_string()
    };
    assert_eq!(refusal(|state| state.level = 101), "level: 101 is above 100");
    assert_eq!(refusal(|state| state.level = 0), "level: 0 is below 1");
    assert_eq!(refusal(|state| state.even = 5), "even: 5 is odd");
    assert_eq!(refusal(|state| state.byte = 0xff), "flag is set with byte 0xff");
    assert_eq!(
        refusal(|state| state.queue = vec![Number { value: 0 }; 4]),
        "queue: the list has more than 3 elements"
    );
}

#[test]
fn paths_go_down_to_the_element() {
    let mut bytes = to_bytes(&all());
    let marker = bytes.windows(4).position(|window| window == [1, b'1', 0, 0]).unwrap() + 1;
    bytes[marker] = b'2';
    let error = from_bytes::<All>(&bytes, 3).unwrap_err();
    assert_eq!(error.path, "numbers[1].items[0]");
}

#[test]
fn bools_and_spare_bits_are_strict() {
    let mut bytes = to_bytes(&all());
    bytes[0] = 2;
    assert_eq!(from_bytes::<All>(&bytes, 3).unwrap_err().to_string(), "flag: 0x02 is not a bool");
    assert_eq!(Bitmap::from_words(70, vec![0, 1 << 6]), None);
    assert_eq!(Bitmap::from_words(70, vec![0]), None);
    assert!(Bitmap::from_words(64, vec![u64::MAX]).unwrap().get(63));
}

#[test]
fn every_truncation_and_every_extra_byte_is_refused() {
    let bytes = to_bytes(&all());
    // The subsections are optional: without them the state is complete.
    let complete: Vec<usize> =
        (0..bytes.len()).filter(|length| from_bytes::<All>(&bytes[..*length], 3).is_ok()).collect();
    assert_eq!(complete, [bytes.len() - 33, bytes.len() - 17]);
    let mut longer = bytes.clone();
    longer.push(0);
    assert_eq!(from_bytes::<All>(&longer, 3).unwrap_err().problem, Problem::LeftOver { bytes: 1 });
}

#[test]
fn length_is_measured_once_the_bytes_decide_it() {
    // A section is followed by its footer, so the last subsection is known to be the last.
    let bytes = to_bytes(&all());
    let mut stream = bytes.clone();
    stream.extend([0x7e, 0, 0, 0, 1]);
    for length in 0..stream.len() {
        let measured = measure::<All>(&stream[..length], 3);
        if length > bytes.len() {
            assert_eq!(measured, Ok(bytes.len()));
        } else {
            assert!(matches!(measured.unwrap_err().problem, Problem::Truncated { .. }), "of {length} bytes");
        }
    }
}

/// The bytes that a description accounts for, subsections' headers included.
fn described_bytes(description: &serde_json::Value) -> u64 {
    let fields = description["fields"].as_array().unwrap();
    let plain: u64 = fields
        .iter()
        .map(|field| field["size"].as_u64().unwrap() * field["array_len"].as_u64().unwrap_or(1))
        .sum();
    let parts = description["subsections"].as_array().into_iter().flatten();
    plain
        + parts
            .map(|part| 6 + part["vmsd_name"].as_str().unwrap().len() as u64 + described_bytes(part))
            .sum::<u64>()
}

#[test]
fn description_accounts_for_every_byte() {
    let description = describe(&all());
    assert_eq!(described_bytes(&description), to_bytes(&all()).len() as u64);
    let field = |name: &str| -> Vec<_> {
        description["fields"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|field| field["name"] == name)
            .cloned()
            .collect()
    };
    assert_eq!(field("raw"), [json!({ "name": "raw", "type": "buffer", "size": 5 })]);
    assert_eq!(field("words"), [json!({ "name": "words", "type": "uint16", "size": 2, "array_len": 6 })]);
    assert_eq!(field("pair").len(), 1);
    assert_eq!(field("pair")[0]["array_len"], 2);
    // Sparse arrays with different holes are laid out differently, so each element has its own entry.
    assert_eq!(
        field("numbers").iter().map(|entry| entry["index"].as_u64().unwrap()).collect::<Vec<_>>(),
        [0, 1]
    );
    assert_eq!(field("queue").len(), 5);
    assert_eq!(field("map"), [json!({ "name": "map", "type": "bitmap", "size": 16 })]);
    let empty = All { bytes: vec![], ..all() };
    assert!(describe(&empty)["fields"].as_array().unwrap().iter().all(|field| field["name"] != "bytes"));
}

#[test]
fn schema_says_what_the_type_can_hold() {
    let schema_of_all = schema_json::<All>();
    let field = |name: &str| {
        schema_of_all["fields"]
            .as_array()
            .unwrap()
            .iter()
            .find(|field| field["name"] == name)
            .cloned()
            .unwrap()
    };
    assert_eq!(field("level"), json!({ "name": "level", "type": "uint32", "size": 4, "min": 1, "max": 100 }));
    assert_eq!(field("old"), json!({ "name": "old", "type": "uint8", "size": 1, "until": 1 }));
    assert_eq!(field("words"), json!({ "name": "words", "type": "uint16", "size": 2, "array_len": 6 }));
    assert_eq!(
        field("bytes"),
        json!({ "name": "bytes", "type": "uint8", "size": 1, "count": "bytes_len", "max": 64 })
    );
    assert_eq!(field("queue")["type"], "list-marker");
    assert_eq!(field("queue")["struct"]["vmsd_name"], "number");
    assert_eq!(field("numbers")["struct"]["fields"][1]["type"], "ptr-marker");
    assert_eq!(schema_of_all["subsections"][0]["vmsd_name"], "all/part");
    assert_eq!((&schema_of_all["version"], &schema_of_all["oldest"]), (&json!(3), &json!(1)));
}

#[test]
fn schema_hash_changes_with_any_change() {
    let schema = schema::<All>();
    let hash = schema.hash();
    assert_eq!(schema.clone().hash(), hash);
    let mut changed = schema.clone();
    changed.fields[7].max = Some(101);
    assert_ne!(changed.hash(), hash);
    let mut changed = schema.clone();
    changed.fields[7].name = "levels";
    assert_ne!(changed.hash(), hash);
    let mut changed = schema;
    changed.subsections[0].version = 3;
    assert_ne!(changed.hash(), hash);
}

/// A parent that says which version of the struct inside each of its versions holds.
#[derive(VmState, Debug, PartialEq)]
#[vmstate(name = "parent", version = 3, oldest = 1)]
struct Parent {
    #[vmstate(versions = [1, 1, 2])]
    part: Inner,
    last: u8,
}

#[derive(VmState, Debug, PartialEq)]
#[vmstate(name = "inner", version = 2, oldest = 1)]
struct Inner {
    first: u8,
    #[vmstate(since = 2, default = "77")]
    second: u8,
}

#[test]
fn version_of_a_nested_struct_is_the_parents_business() {
    let load = |bytes: &[u8], version| from_bytes::<Parent>(bytes, version).unwrap();
    assert_eq!(load(&[1, 2], 1), Parent { part: Inner { first: 1, second: 77 }, last: 2 });
    assert_eq!(load(&[1, 2], 2), Parent { part: Inner { first: 1, second: 77 }, last: 2 });
    assert_eq!(load(&[1, 2, 3], 3), Parent { part: Inner { first: 1, second: 2 }, last: 3 });
}

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

/// What one side was configured with.
struct Local {
    page_bytes: u32,
    slots: usize,
}

impl Local {
    fn page_bytes(&self) -> u32 {
        self.page_bytes
    }

    fn slots(&self) -> usize {
        self.slots
    }
}

#[derive(VmState, Debug, PartialEq)]
#[vmstate(name = "configured", context = "Local")]
struct Configured {
    #[vmstate(equal = "Local::page_bytes")]
    page_bytes: u32,
    #[vmstate(len_from = "Local::slots", max = 4)]
    slots: Slots<Number>,
}

/// Knows nothing of the context that the struct inside wants.
#[derive(VmState, Debug, PartialEq)]
#[vmstate(name = "outer")]
struct Outer {
    #[vmstate(list, max = 2)]
    parts: Vec<Configured>,
}

fn outer() -> Outer {
    let slots = [None, Some(Number { value: 1 })].into_iter().collect();
    Outer { parts: vec![Configured { page_bytes: 4096, slots }] }
}

#[test]
fn count_of_the_context_is_not_in_the_stream() {
    let bytes = to_bytes(&outer());
    assert_eq!(bytes, [1, 0, 0, 0x10, 0, b'0', b'1', 0, 0, 0, 1, 0]);
    let local = Local { page_bytes: 4096, slots: 2 };
    assert_eq!(from_bytes_with::<Outer, _>(&bytes, 1, &local), Ok(outer()));
    let followed = [&bytes[..], &[0x7e]].concat();
    assert_eq!(measure_with::<Outer, _>(&followed, 1, &local), Ok(bytes.len()));
    let fewer = Local { slots: 1, ..local };
    assert!(from_bytes_with::<Outer, _>(&bytes, 1, &fewer).is_err());
    let more = Local { slots: 5, ..local };
    let error = from_bytes_with::<Outer, _>(&bytes, 1, &more).unwrap_err();
    assert_eq!(error.to_string(), "parts[0].slots: 5 is above 4");
}

#[test]
fn value_of_the_other_side_must_be_ours() {
    let local = Local { page_bytes: 8192, slots: 2 };
    let error = from_bytes_with::<Outer, _>(&to_bytes(&outer()), 1, &local).unwrap_err();
    assert_eq!(error.to_string(), "parts[0].page_bytes: 4096 differs from this side's 8192");
}

#[test]
fn missing_context_is_an_error_that_says_which() {
    let bytes = to_bytes(&outer());
    let wanted = "parts[0]: loading \"configured\" needs the context vmstate::tests::Local";
    let error = from_bytes::<Outer>(&bytes, 1).unwrap_err();
    assert_eq!(error.to_string(), format!("{wanted}, and none was given"));
    let error = measure_with::<Outer, _>(&bytes, 1, &7_u8).unwrap_err();
    assert_eq!(error.to_string(), format!("{wanted}, but u8 was given"));
}

#[test]
fn schema_says_what_the_context_decides() {
    let fields = &schema_json::<Configured>()["fields"];
    assert_eq!(fields[0]["equal"], json!(true));
    assert_eq!(fields[1]["count_from_context"], json!(true));
}
