//! Which streams load where, as two schemas tell.

use serde_json::{Value as Json, json};
use vmstate::VmState;

use crate::inspect::{Comparison, build_schema, compare};

/// A section named `s` with these keys and fields.
fn schema(version: u32, oldest: u32, fields: Json) -> Json {
    json!({ "devices": [{ "name": "s", "vmsd_name": "s", "version": version, "oldest": oldest, "fields": fields,
                          "subsections": [] }] })
}

fn both(old: &Json, new: &Json) -> Comparison {
    let there = compare(old, new).unwrap();
    let back = compare(new, old).unwrap();
    let count = |comparison: &Comparison| (comparison.old_in_new.len(), comparison.new_in_old.len());
    let (forwards, backwards) = count(&back);
    assert_eq!(count(&there), (backwards, forwards), "seen from both sides: {there:?} {back:?}");
    there
}

fn plain(name: &str) -> Json {
    json!({ "name": name, "type": "uint32", "size": 4 })
}

#[test]
fn this_build_loads_its_own_streams() {
    let schema = build_schema();
    assert_eq!(both(&schema, &schema), Comparison::default());
    let names: Vec<_> =
        schema["devices"].as_array().unwrap().iter().map(|device| device["name"].as_str().unwrap()).collect();
    for name in ["ferry", "integrity", "nvme", "cpu", "pci"] {
        assert!(names.contains(&name), "{names:?}");
    }
}

/// The same device in two releases, as the derive describes them.
mod releases {
    use super::*;

    #[derive(VmState)]
    #[vmstate(name = "s", version = 1)]
    pub struct One {
        a: u32,
        #[vmstate(max = 9)]
        b: u8,
    }

    #[derive(VmState)]
    #[vmstate(name = "s", version = 2, oldest = 1)]
    pub struct Two {
        a: u32,
        #[vmstate(since = 2, default = "1")]
        added: u64,
        #[vmstate(max = 9)]
        b: u8,
        #[vmstate(subsection)]
        part: Option<Part>,
    }

    #[derive(VmState)]
    #[vmstate(name = "s/part")]
    pub struct Part {
        c: u8,
    }
}

#[test]
fn a_field_of_a_new_version_is_compatible_one_way() {
    let one = vmstate::schema_json::<releases::One>();
    let two = vmstate::schema_json::<releases::Two>();
    let comparison = both(&one, &two);
    assert_eq!(comparison.old_in_new, Vec::<String>::new());
    assert_eq!(comparison.new_in_old, ["s: version 2 is written, 1 is the newest that is read"]);
    let expected =
        ["s: version: 1 -> 2", "s.added: only in the new schema", "s.s/part: only in the new schema"];
    assert_eq!(comparison.differences, expected);
    let text = comparison.to_string();
    assert!(text.contains("streams of the old schema load in the new one: yes\n"), "{text}");
    assert!(text.contains("streams of the new schema load in the old one: no\n  s: version 2"), "{text}");
    assert_eq!(comparison.to_json()["new_in_old"]["loads"], false);

    // The version says that it can be read, but not how.
    let mut without = two.clone();
    without["fields"][1].as_object_mut().unwrap().remove("since");
    let reasons = both(&one, &without).old_in_new;
    assert_eq!(reasons, ["s.added: it is read before b, but not written there"]);
    // The stream may hold a part that nobody knows.
    let mut same = two.clone();
    same["subsections"] = json!([]);
    assert_eq!(both(&two, &same).old_in_new, ["s: a stream that has the subsection s/part is refused"]);
    assert_eq!(both(&same, &two).old_in_new, Vec::<String>::new());
}

#[test]
fn what_changes_the_bytes_without_a_version_is_found() {
    let old = schema(1, 1, json!([plain("a"), plain("b")]));
    let cases = [
        (
            json!([plain("a"), { "name": "b", "type": "uint64", "size": 8 }]),
            "s.b: its type is uint32 where it is written, uint64 where it is read",
        ),
        (
            json!([plain("a"), { "name": "b", "type": "int32", "size": 4 }]),
            "s.b: its type is uint32 where it is written, int32 where it is read",
        ),
        (json!([plain("b"), plain("a")]), "s.b: it is read before a, but not written there"),
        (json!([plain("a")]), "s.b: it is written, but not read"),
        (json!([plain("a"), plain("b"), plain("c")]), "s.c: it is read, but not written"),
        (json!([plain("b")]), "s.a: it is written before b, but not read there"),
        (
            json!([plain("a"), { "name": "b", "type": "uint32", "size": 4, "array_len": 2 }]),
            "s.b: its array_len is none where it is written, 2 where it is read",
        ),
        (
            json!([plain("a"), { "name": "b", "type": "uint32", "size": 4, "max": 8 }]),
            "s.b: values above 8 may be written, and are refused",
        ),
        (
            json!([plain("a"), { "name": "b", "type": "uint32", "size": 4, "min": 1 }]),
            "s.b: values below 1 may be written, and are refused",
        ),
        (
            json!([plain("a"), { "name": "b", "type": "uint32", "size": 4, "something": 1 }]),
            "s.b: its something is none where it is written, 1 where it is read",
        ),
        (
            json!([plain("a"), { "name": "b", "type": "struct", "struct": { "fields": [] } }]),
            "s.b: its type is uint32 where it is written, struct where it is read",
        ),
    ];
    for (fields, reason) in cases {
        let comparison = both(&old, &schema(1, 1, fields));
        assert!(comparison.old_in_new.iter().any(|told| told == reason), "{reason} is not in {comparison}");
        assert!(!comparison.differences.is_empty(), "{reason}");
    }
}

#[test]
fn what_does_not_change_the_bytes_is_compatible_and_told() {
    let old = schema(1, 1, json!([plain("a"), { "name": "b", "type": "uint8", "size": 1, "max": 8 }]));
    let cases = [
        (
            json!([plain("other"), { "name": "b", "type": "uint8", "size": 1, "max": 8 }]),
            "s.a: only in the old schema",
        ),
        (json!([plain("a"), { "name": "b", "type": "uint8", "size": 1, "max": 9 }]), "s.b: max: 8 -> 9"),
        (json!([plain("a"), { "name": "b", "type": "uint8", "size": 1 }]), "s.b: max: 8 -> none"),
    ];
    for (fields, difference) in cases {
        let comparison = both(&old, &schema(1, 1, fields));
        assert_eq!(comparison.old_in_new, Vec::<String>::new());
        assert_eq!(comparison.differences.first().map(String::as_str), Some(difference));
    }
    let wide = json!({ "name": "b", "type": "uint8", "size": 1, "max": 255 });
    let bare = json!({ "name": "b", "type": "uint8", "size": 1 });
    assert_eq!(
        both(&schema(1, 1, json!([bare])), &schema(1, 1, json!([wide]))).old_in_new,
        Vec::<String>::new()
    );
}

#[test]
fn counts_are_fields_not_names() {
    let array = |count: &str| json!({ "name": "list", "type": "uint8", "size": 1, "count": count, "max": 4 });
    let old = schema(1, 1, json!([plain("n"), plain("m"), array("n")]));
    let renamed = schema(1, 1, json!([plain("number"), plain("m"), array("number")]));
    assert_eq!(both(&old, &renamed).old_in_new, Vec::<String>::new());
    let other = schema(1, 1, json!([plain("n"), plain("m"), array("m")]));
    let reason = "s.list: the number of elements is written as n, but read from m";
    assert_eq!(both(&old, &other).old_in_new, [reason]);
}

#[test]
fn structs_inside_are_read_as_the_version_that_the_field_says() {
    let inner = |version: u32, fields: Json| json!({ "vmsd_name": "i", "version": version, "oldest": 1, "fields": fields });
    let outer = |version: u32, versions: Json, inner: Json| {
        schema(
            version,
            1,
            json!([{ "name": "f", "type": "struct", "struct_versions": versions, "struct": inner }]),
        )
    };
    let old = outer(1, json!([1]), inner(1, json!([plain("x")])));
    let added = json!({ "name": "y", "type": "uint32", "size": 4, "since": 2 });
    let new_inner = inner(2, json!([plain("x"), added]));
    assert_eq!(both(&old, &outer(2, json!([1, 2]), new_inner.clone())).old_in_new, Vec::<String>::new());
    let wrong = both(&old, &outer(2, json!([2, 2]), new_inner.clone()));
    assert_eq!(wrong.old_in_new, ["s.f.y: it is read, but not written"]);
    // Without a new version outside, nobody knows which of them is inside.
    let same = both(&old, &outer(1, json!([2]), new_inner));
    assert_eq!(same.old_in_new, ["s.f.y: it is read, but not written"]);
    assert_eq!(same.new_in_old, ["s.f.y: it is written, but not read"]);
}

#[test]
fn versions_that_are_no_longer_read_are_told() {
    let comparison = both(&schema(1, 1, json!([])), &schema(3, 2, json!([])));
    assert_eq!(comparison.old_in_new, ["s: version 1 is written, 2 is the oldest that is read"]);
    assert_eq!(comparison.new_in_old, ["s: version 3 is written, 1 is the newest that is read"]);
}

#[test]
fn sections_that_only_one_side_has_are_told() {
    let none = json!({ "devices": [] });
    let one = schema(1, 1, json!([]));
    let comparison = both(&none, &one);
    assert_eq!(comparison.old_in_new, Vec::<String>::new());
    assert_eq!(comparison.new_in_old, ["s: the old schema has no such section"]);
    assert_eq!(comparison.differences, ["s: only in the new schema"]);
}

#[test]
fn what_is_no_schema_is_refused() {
    for bad in [json!(1), json!([]), json!({ "devices": [{ "name": "x" }] })] {
        let error = format!("{:#}", compare(&bad, &build_schema()).unwrap_err());
        assert!(error.starts_with("the old schema: "), "{error}");
    }
}

/// A file's description has the sizes that its bytes have, a build's what they may be.
#[test]
fn a_file_is_not_compared_with_a_build() {
    let file =
        json!({ "devices": [{ "name": "s", "instance_id": 0, "version": 1, "fields": [plain("n")] }] });
    let build = schema(1, 1, json!([plain("n")]));
    for (old, new) in [(&file, &build), (&build, &file)] {
        let error = compare(old, new).unwrap_err().to_string();
        assert!(error.contains("the bytes of one file"), "{error}");
    }
    assert_eq!(both(&file, &file), Comparison::default());
}

#[test]
fn numbers_from_outside_lists_and_levels_are_compared() {
    let one = |field: Json| schema(1, 1, json!([plain("n"), field]));
    let list = |extra: Json| {
        let mut field = json!({ "name": "list", "type": "uint16", "size": 2, "max": 4 });
        extra.as_object().unwrap().iter().for_each(|(key, value)| field[key] = value.clone());
        one(field)
    };
    let counted = list(json!({ "count": "n" }));
    let outside = list(json!({ "count_from_context": true }));
    let expected = ["s.list: the number of elements is written as n, but read from the context"];
    assert_eq!(both(&counted, &outside).old_in_new, expected);
    let free = one(json!({ "name": "v", "type": "uint8", "size": 1 }));
    let equal = one(json!({ "name": "v", "type": "uint8", "size": 1, "equal": true }));
    let comparison = both(&free, &equal);
    assert_eq!(
        comparison.old_in_new,
        ["s.v: values other than the reader's own may be written, and are refused"]
    );
    assert_eq!(comparison.new_in_old, Vec::<String>::new());
    let rows = |most: u32| list(json!({ "count": "n", "each": { "array_len": 3, "max": most } }));
    assert_eq!(both(&rows(5), &rows(5)), Comparison::default());
    assert_eq!(
        both(&rows(5), &rows(4)).old_in_new,
        ["s.list[each]: values above 4 may be written, and are refused"]
    );
    assert_eq!(both(&rows(5), &counted).old_in_new, ["s.list: it has its each only where it is written"]);
    let elements = |kind: &str| list(json!({ "element": { "type": kind, "size": 2 } }));
    let comparison = both(&elements("uint16"), &elements("int16"));
    assert_eq!(comparison.differences, ["s.list[element]: type: uint16 -> int16"]);
    assert!(
        comparison.old_in_new[0].starts_with("s.list[element]: its type is uint16 where"),
        "{comparison}"
    );
    let levels = |depth: u32| {
        let mut schema = schema(1, 1, json!([plain("n")]));
        schema["devices"][0]["depth"] = json!(depth);
        schema
    };
    let comparison = both(&levels(4), &levels(3));
    assert_eq!(comparison.old_in_new, ["s: 4 levels may be written, and more than 3 are refused"]);
    assert_eq!(comparison.new_in_old, Vec::<String>::new());
}
