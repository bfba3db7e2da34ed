use super::{All, Number, Part, all};
use crate::{Problem, VmState, from_bytes, to_bytes};

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
