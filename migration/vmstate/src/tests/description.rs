use serde_json::json;

use super::{All, all, sparse};
use crate::{describe, to_bytes};

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

/// The bytes that a description accounts for, subsections' headers included.
pub(super) fn described_bytes(description: &serde_json::Value) -> u64 {
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
