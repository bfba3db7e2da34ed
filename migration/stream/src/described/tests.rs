//! States of ours and descriptions of QEMU's, read back; and bytes that are not what is described.

use proptest::prelude::*;
use serde_json::{Value as Json, json};
use vmstate::{Bitmap, Slots, VmState};

use super::*;
use crate::Description;

#[derive(VmState)]
#[vmstate(name = "controller", version = 3)]
struct Controller {
    enabled: bool,
    kelvin: i16,
    identifier: [u8; 4],
    levels: [u32; 3],
    map_bits: u16,
    #[vmstate(len = "map_bits", max = 128)]
    map: Bitmap,
    queue_count: u16,
    #[vmstate(len = "queue_count", max = 8)]
    queues: Slots<Queue>,
    #[vmstate(list, max = 8)]
    events: Vec<u16>,
    #[vmstate(list, max = 8)]
    nothing: Vec<u16>,
    #[vmstate(list, max = 8)]
    pairs: Vec<[Queue; 2]>,
    #[vmstate(list, max = 8)]
    voids: Vec<[u16; 0]>,
    pair: [Queue; 2],
    #[vmstate(subsection)]
    buffers: Option<Buffers>,
}

#[derive(VmState, Clone)]
#[vmstate(name = "queue")]
struct Queue {
    base: u64,
    size: u8,
    #[vmstate(subsection)]
    extra: Option<Extra>,
}

#[derive(VmState, Clone)]
#[vmstate(name = "queue/extra", version = 2)]
struct Extra {
    depth: u8,
}

#[derive(VmState)]
#[vmstate(name = "controller/buffers", version = 4)]
struct Buffers {
    address: u64,
}

fn queue(base: u64, extra: Option<u8>) -> Queue {
    Queue { base, size: 7, extra: extra.map(|depth| Extra { depth }) }
}

fn controller() -> Controller {
    let mut queues = Slots::empty(5);
    queues.put(1, queue(0x1000, None));
    queues.put(4, queue(0x2000, Some(9)));
    let mut map = Bitmap::new(70);
    [0, 63, 64, 69].into_iter().for_each(|bit| map.set(bit, true));
    Controller {
        enabled: true,
        kelvin: -3,
        identifier: *b"abcd",
        levels: [1, 2, u32::MAX],
        map_bits: 0,
        map,
        queue_count: 0,
        queues,
        events: vec![5, 6],
        nothing: vec![],
        pairs: vec![[queue(3, None), queue(4, Some(1))], [queue(5, None), queue(6, None)]],
        voids: vec![[], []],
        pair: [queue(1, None), queue(2, Some(3))],
        buffers: Some(Buffers { address: 0x5000 }),
    }
}

/// A value with everything in it, on one line.
fn show(value: &Value<'_>) -> Result<String, Error> {
    let list = |items: Vec<Result<String, Error>>| -> Result<String, Error> {
        Ok(format!("[{}]", items.into_iter().collect::<Result<Vec<_>, _>>()?.join(" ")))
    };
    Ok(match value {
        Value::Bool(value) => value.to_string(),
        Value::Unsigned(value) => value.to_string(),
        Value::Signed(value) => format!("{value:+}"),
        Value::Bytes(bytes) => format!("{bytes:02x?}"),
        Value::Bitmap(words) => format!("bits {:?}", set_bits(words).collect::<Vec<_>>()),
        Value::Struct(inner) => show_state(inner)?,
        Value::Array(array) | Value::List(array) => {
            list((0..array.count()).map(|index| show(&array.get(index)?)).collect())?
        }
        Value::Elements(elements) => list(elements.iter().map(show).collect())?,
        Value::Slots(slots) => {
            list(slots.iter().map(|slot| slot.as_ref().map_or(Ok("-".into()), show)).collect())?
        }
    })
}

fn show_state(state: &Described<'_>) -> Result<String, Error> {
    let mut parts = Vec::new();
    for field in state.fields()? {
        parts.push(format!("{}={}", field.name, show(&field.value)?));
    }
    for part in state.subsections()? {
        parts.push(format!("{} v{}={}", part.name(), part.version().unwrap(), show_state(&part)?));
    }
    Ok(format!("{{{}}}", parts.join(" ")))
}

fn read(description: &Json, bytes: &[u8]) -> Result<String, Error> {
    show_state(&Described::new(compact(description).root(), bytes, 100)?)
}

fn compact(description: &Json) -> Description {
    Description::parse(description.to_string().as_bytes()).unwrap()
}

#[test]
fn every_kind_of_field_is_read_back() {
    let bytes = vmstate::to_bytes(&controller());
    let expected = "{enabled=true kelvin=-3 identifier=[61, 62, 63, 64] levels=[1 2 4294967295] map_bits=70 \
                    map=bits [0, 63, 64, 69] queue_count=5 \
                    queues=[- {base=4096 size=7} - - {base=8192 size=7 queue/extra v2={depth=9}}] \
                    events=[5 6] nothing=[] \
                    pairs=[[{base=3 size=7} {base=4 size=7 queue/extra v2={depth=1}}] [{base=5 size=7} {base=6 size=7}]] \
                    voids=[[] []] \
                    pair=[{base=1 size=7} {base=2 size=7 queue/extra v2={depth=3}}] \
                    controller/buffers v4={address=20480}}";
    assert_eq!(read(&vmstate::describe(&controller()), &bytes).unwrap(), expected);
}

#[test]
fn offsets_are_those_of_the_bytes() {
    let description = compact(&vmstate::describe(&controller()));
    let bytes = vmstate::to_bytes(&controller());
    let state = Described::new(description.root(), &bytes, 100).unwrap();
    let fields = state.fields().unwrap();
    let offsets: Vec<_> = fields.iter().map(|field| (field.name, field.offset - 100)).take(6).collect();
    let expected =
        [("enabled", 0), ("kelvin", 1), ("identifier", 3), ("levels", 7), ("map_bits", 19), ("map", 21)];
    assert_eq!(offsets, expected);
    let buffers = state.subsections().unwrap()[0];
    assert_eq!(buffers.offset() - 100, bytes.len() as u64 - 8);
    let Value::Array(levels) = &fields[3].value else { panic!("{:?}", fields[3]) };
    assert_eq!((levels.count(), levels.element_bytes(2)), (3, [0xff; 4].as_slice()));
    assert_eq!(levels.get(3).unwrap_err().to_string(), "at byte 119: there is no element 3 of 3");
}

#[test]
fn types_of_other_writers_are_read() {
    let description = json!({ "vmsd_name": "foreign", "version": 1, "fields": [
        { "name": "a", "type": "int32 equal", "size": 4 },
        { "name": "b", "type": "timer", "size": 8 },
        { "name": "null", "type": "uint64", "size": 1 },
        { "name": "tmp", "type": "tmp", "size": 1, "vmsd_name": "tmp", "version": 0,
          "fields": [{ "name": "x", "type": "uint8", "size": 1 }] },
        { "name": "empty", "type": "qtailq", "size": 1 },
        { "name": "queue", "type": "qtailq", "size": 11, "vmsd_name": "element", "version": 1,
          "fields": [{ "name": "y", "type": "uint32", "size": 4 }] },
        { "name": "odd", "type": "qtailq", "size": 3, "vmsd_name": "element", "version": 1,
          "fields": [{ "name": "y", "type": "uint32", "size": 4 }] },
        { "name": "state", "type": "msix state", "size": 2 },
        { "name": "none", "type": "uint8", "size": 1, "array_len": 0 },
    ] });
    let bytes = b"\xff\xff\xff\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x30\x05\x00\x01\x00\x00\x00\x01\x01\x00\x00\x00\x02\x00\x01\x00\x00\xaa\xbb";
    let expected = "{a=-2 b=-1 null=[30] tmp={x=5} empty=[] queue=[{y=1} {y=2}] odd=[01, 00, 00] state=[aa, bb] none=[]}";
    assert_eq!(read(&description, bytes).unwrap(), expected);
}

/// Each element would take the memory of many bytes, and measuring each anew would take for ever.
#[test]
fn lists_of_elements_of_nothing_are_bytes() {
    let mut bytes = vec![1; 1 << 20];
    bytes.push(0);
    let entry = json!({ "name": "q", "type": "qtailq", "size": bytes.len(), "fields": [] });
    let description = compact(&json!({ "vmsd_name": "x", "fields": [entry] }));
    let state = Described::new(description.root(), &bytes, 0).unwrap();
    assert!(matches!(state.fields().unwrap()[0].value, Value::Bytes(it) if it.len() == bytes.len()));

    let element = json!([{ "name": "id", "type": "uint32", "size": 4 }]);
    let bytes: Vec<u8> = [1, 0, 0, 0, 7].repeat(100_000).into_iter().chain([0]).collect();
    let entry = json!({ "name": "q", "type": "qtailq", "size": bytes.len(), "fields": element });
    let description = compact(&json!({ "vmsd_name": "x", "fields": [entry] }));
    let state = Described::new(description.root(), &bytes, 0).unwrap();
    assert!(matches!(&state.fields().unwrap()[0].value, Value::List(all) if all.count() == 100_000));
}

#[test]
fn what_does_not_fit_is_refused_with_its_place() {
    let one = |entry: Json| json!({ "vmsd_name": "x", "version": 1, "fields": [entry] });
    let refused = |description: &Json, bytes: &[u8]| read(description, bytes).unwrap_err().to_string();
    let bool_ = one(json!({ "name": "b", "type": "bool", "size": 1 }));
    assert_eq!(refused(&bool_, &[2]), "at byte 100: 0x02 is not a bool");
    assert_eq!(refused(&bool_, &[0, 1]), "at byte 100: 1 bytes of \"x\" are described, but there are 2");
    let nothing = one(json!({ "name": "n", "type": "struct", "size": 0, "array_len": 1_u64 << 60,
                              "struct": { "vmsd_name": "y", "version": 1, "fields": [] } }));
    assert_eq!(refused(&nothing, &[]), "at byte 100: n has 1152921504606846976 elements without a byte");
    let inner = one(json!({ "name": "s", "type": "struct", "size": 2,
                            "struct": { "vmsd_name": "y", "version": 1, "fields": [
                                { "name": "z", "type": "uint8", "size": 1 }] } }));
    assert_eq!(refused(&inner, &[0, 0]), "at byte 100: 1 bytes of \"y\" are described, but there are 2");
    let marker = json!({ "name": "s", "type": "ptr-marker", "size": 1 });
    assert_eq!(refused(&one(marker.clone()), &[7]), "at byte 100: s[0] is marked 0x07");
    assert_eq!(
        refused(&one(marker.clone()), b"1"),
        "at byte 100: s[0] is marked present, but described as empty"
    );
    let present = json!({ "vmsd_name": "x", "version": 1,
                          "fields": [marker, { "name": "s", "type": "uint8", "size": 1 }] });
    assert_eq!(refused(&present, b"0\0"), "at byte 100: s[0] is marked empty, but described as present");
    let list = one(json!({ "name": "l", "type": "list-marker", "size": 1 }));
    assert_eq!(refused(&list, &[1]), "at byte 100: l[0] is marked 0x01, unlike its description");
    let part = json!({ "vmsd_name": "x", "version": 1, "fields": [], "subsections": [
        { "vmsd_name": "x/y", "version": 1, "fields": [] }] });
    assert_eq!(read(&part, b"\x05\x03x/y\0\0\0\x01").unwrap(), "{x/y v1={}}");
    let error = refused(&part, b"\x05\x03x/z\0\0\0\x01");
    assert_eq!(error, "at byte 100: subsection \"x/y\" v1 does not begin here");
    let long = one(json!({ "name": "n".repeat(256), "type": "uint8", "size": 1 }));
    assert_eq!(refused(&long, &[0]), "at byte 100: a name has 256 bytes");
}

#[test]
fn structs_in_structs_have_an_end() {
    let mut description = json!({ "vmsd_name": "x", "version": 1, "fields": [] });
    for _ in 0..40 {
        let field = json!({ "name": "s", "type": "struct", "size": 0, "struct": description });
        description = json!({ "vmsd_name": "x", "version": 1, "fields": [field] });
    }
    let error = read(&description, &[]).unwrap_err().to_string();
    assert_eq!(error, "at byte 100: there are more than 32 structs and lists in each other");
}

#[test]
fn changed_bytes_are_read_or_refused() {
    let (description, bytes) = (vmstate::describe(&controller()), vmstate::to_bytes(&controller()));
    let whole = read(&description, &bytes).unwrap();
    let mut refused = 0;
    for at in 0..bytes.len() {
        assert!(read(&description, &bytes[..at]).is_err(), "cut off at {at}");
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            match read(&description, &changed) {
                Ok(read) => assert_ne!(read, whole, "bit {bit} of byte {at}"),
                Err(Error::Unfit { offset, .. }) => {
                    assert!((100..100 + bytes.len() as u64).contains(&offset), "{offset}");
                    refused += 1;
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
    assert!(refused > 100, "markers and heads of subsections are looked at: {refused}");
}

proptest! {
    #[test]
    fn any_description_is_read_or_refused(
        entries in prop::collection::vec((0..4_usize, 0..8_usize, 0..9_u64, 0..4_u64, 0..3_u64), 0..12),
        bytes in prop::collection::vec(0..0x32_u8, 0..80),
    ) {
        const NAMES: [&str; 4] = ["a", "a", "b", "c"];
        const KINDS: [&str; 8] =
            ["uint8", "bool", "struct", "ptr-marker", "list-marker", "qtailq", "bitmap", "int64"];
        let entry = |(name, kind, size, count, index): (usize, usize, u64, u64, u64)| {
            let mut entry = json!({ "name": NAMES[name], "type": KINDS[kind], "size": size });
            if count > 1 { entry["array_len"] = json!(count); }
            if index < 2 { entry["index"] = json!(index); }
            if kind == 2 { entry["struct"] = json!({ "fields": [{ "name": "z", "type": "uint8", "size": size }] }); }
            if kind == 5 { entry["fields"] = json!([{ "name": "z", "type": "uint8", "size": 1 }]); }
            entry
        };
        let fields: Vec<_> = entries.into_iter().map(entry).collect();
        let description = json!({ "fields": fields });
        let needed = trailer::state_bytes(compact(&description).root()).unwrap() as usize;
        let mut exact = bytes.clone();
        exact.resize(needed, 0);
        let _ = read(&description, &exact);
        prop_assert!(bytes.len() == needed || read(&description, &bytes).is_err());
    }
}

/// A list in a list in a list: a description can go on so for as long as its text allows.
fn lists_in_lists(depth: usize) -> (Json, Vec<u8>) {
    let mark = |level: usize| json!({ "name": format!("l{level}"), "type": "list-marker", "size": 1 });
    let inner = json!({ "name": "n", "type": "uint8", "size": 1 });
    let entries: Vec<_> = (0..depth).map(mark).chain([inner]).chain((0..depth).rev().map(mark)).collect();
    let bytes = [vec![1; depth], vec![7], vec![0; depth]].concat();
    (json!({ "vmsd_name": "x", "version": 1, "fields": entries }), bytes)
}

#[test]
fn lists_in_each_other_are_followed_as_far_as_structs() {
    let shown = |depth| {
        let (description, bytes) = lists_in_lists(depth);
        read(&description, &bytes)
    };
    assert_eq!(shown(3).unwrap(), "{l0=[[[7]]]}");
    shown(DEPTH_MAX as usize - 1).unwrap();
    let error = shown(DEPTH_MAX as usize + 1).unwrap_err().to_string();
    assert_eq!(error, "at byte 132: there are more than 32 structs and lists in each other");
    assert_eq!(shown(20_000).unwrap_err().to_string(), error);
}

/// Were each element measured by itself, this would take hours.
#[test]
fn elements_are_measured_together_however_much_their_description_says() {
    let hollow = vec![json!({ "name": "h", "type": "buffer", "size": 0 }); 30_000];
    for kind in ["qtailq", "other"] {
        let entry = json!({ "name": "q", "type": kind, "size": 1, "array_len": 1_000_000, "fields": hollow });
        let description = json!({ "vmsd_name": "x", "version": 1, "fields": [entry] });
        let (description, bytes) = (compact(&description), vec![0; 1_000_000]);
        let state = Described::new(description.root(), &bytes, 0).unwrap();
        let fields = state.fields().unwrap();
        let Value::Array(array) = &fields[0].value else { panic!("{fields:?}") };
        let is_byte = |index| matches!(array.get(index), Ok(Value::Bytes([0])));
        assert!((0..array.count()).all(is_byte) && array.count() == 1_000_000);
    }
}
