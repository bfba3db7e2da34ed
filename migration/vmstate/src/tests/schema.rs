use serde_json::json;

use super::{All, Number};
use crate::{VmState, schema, schema_json};

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

#[derive(VmState)]
#[vmstate(name = "lists")]
struct Lists {
    #[vmstate(list, max = 2)]
    words: Vec<[u16; 3]>,
    #[vmstate(list, max = 2)]
    pairs: Vec<[Number; 2]>,
}

#[test]
fn schema_of_a_list_says_what_its_elements_are() {
    let fields = &schema_json::<Lists>()["fields"];
    assert_eq!(fields[0]["element"], json!({ "type": "uint16", "size": 2, "array_len": 3 }));
    let pairs = &fields[1]["element"];
    assert_eq!((&pairs["array_len"], &pairs["struct"]["vmsd_name"]), (&json!(2), &json!("number")));
}
