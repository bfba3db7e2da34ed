//! What a description says of every value it can hold: the schema of a type.
//!
//! Printed with the keys of the stream's trailer, plus what only a type knows (`oldest`, `count`, `max`, `since`, ...). Schemas of
//! released versions are kept, so that a changed description without a new version is seen.

use serde_json::{Value as Json, json};
use xxhash_rust::xxh3::Xxh3Default;

/// The schema of a struct that derives [`VmState`](crate::VmState).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schema {
    /// The description's name.
    pub name: &'static str,
    /// The version that is written.
    pub version: u32,
    /// The oldest version that is read.
    pub oldest: u32,
    /// In the order of the bytes.
    pub fields: Vec<FieldSchema>,
    /// Optional parts, which follow the fields.
    pub subsections: Vec<Schema>,
}

/// The schema of one field.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FieldSchema {
    /// The field's name.
    pub name: &'static str,
    /// `uint32`, `bool`, `buffer`, `bitmap`, `struct`, `ptr-marker` (a sparse array), `list-marker` (a list), ...
    pub kind: &'static str,
    /// Bytes of one element, if it is not a struct.
    pub size: Option<u64>,
    /// Elements, if the type fixes their number.
    pub array_len: Option<u64>,
    /// The field that holds the number of elements.
    pub count: Option<&'static str>,
    /// The number of elements is not in the stream: the context says it.
    pub count_from_context: bool,
    /// The value must be the one that the context says.
    pub equal: bool,
    /// The largest value, or the largest number of elements.
    pub max: Option<i128>,
    /// The smallest value.
    pub min: Option<i128>,
    /// The first version that has the field.
    pub since: Option<u32>,
    /// The last version that has the field.
    pub until: Option<u32>,
    /// The version of the struct inside, for each version that has the field; empty: always its newest.
    pub struct_versions: &'static [u32],
    /// The struct inside.
    pub structure: Option<Box<Schema>>,
}

impl FieldSchema {
    pub(crate) fn plain(&mut self, kind: &'static str, size: usize) {
        self.kind = kind;
        self.size = Some(size as u64);
    }

    pub(crate) fn structure(&mut self, schema: Schema) {
        self.kind = "struct";
        self.structure = Some(Box::new(schema));
    }

    fn to_json(&self) -> Json {
        let mut json = json!({ "name": self.name, "type": self.kind });
        let mut put = |key: &str, value: Option<Json>| {
            if let Some(value) = value {
                json[key] = value;
            }
        };
        put("size", self.size.map(Json::from));
        put("array_len", self.array_len.map(Json::from));
        put("count", self.count.map(Json::from));
        put("count_from_context", self.count_from_context.then_some(Json::Bool(true)));
        put("equal", self.equal.then_some(Json::Bool(true)));
        put("max", self.max.map(number));
        put("min", self.min.map(number));
        put("since", self.since.map(Json::from));
        put("until", self.until.map(Json::from));
        put("struct_versions", (!self.struct_versions.is_empty()).then(|| Json::from(self.struct_versions)));
        put("struct", self.structure.as_deref().map(Schema::to_json));
        json
    }
}

/// Every bound of a 64-bit field, signed or not, is a JSON number.
fn number(bound: i128) -> Json {
    u64::try_from(bound)
        .map(Json::from)
        .or_else(|_| i64::try_from(bound).map(Json::from))
        .unwrap_or(Json::Null)
}

impl Schema {
    /// The schema as JSON.
    pub fn to_json(&self) -> Json {
        json!({
            "vmsd_name": self.name,
            "version": self.version,
            "oldest": self.oldest,
            "fields": self.fields.iter().map(FieldSchema::to_json).collect::<Vec<_>>(),
            "subsections": self.subsections.iter().map(Schema::to_json).collect::<Vec<_>>(),
        })
    }

    /// A hash of all the schema says. Two builds with the same hash read each other's states; a live connection compares it
    /// instead of sending descriptions.
    pub fn hash(&self) -> u64 {
        let mut hasher = Xxh3Default::new();
        feed(&mut hasher, &self.to_json());
        hasher.digest()
    }
}

/// Feeds JSON to the hasher with the keys sorted, so that the hash depends on no map's order and no formatting.
fn feed(hasher: &mut Xxh3Default, json: &Json) {
    match json {
        Json::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(key, _)| *key);
            hasher.update(b"{");
            for (key, value) in entries {
                hasher.update(key.as_bytes());
                hasher.update(b"\0");
                feed(hasher, value);
            }
            hasher.update(b"}");
        }
        Json::Array(items) => {
            hasher.update(b"[");
            items.iter().for_each(|item| feed(hasher, item));
            hasher.update(b"]");
        }
        leaf => {
            hasher.update(leaf.to_string().as_bytes());
            hasher.update(b"\0");
        }
    }
}
