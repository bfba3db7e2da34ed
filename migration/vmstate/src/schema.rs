//! What a description says of every value it can hold: the schema of a type.
//!
//! Printed with the keys of the stream's trailer, plus what only a type knows (`oldest`, `count`, `max`, `since`, ...). Schemas of
//! released versions are kept, so that a changed description without a new version is seen.

use std::any::TypeId;
use std::fmt;
use std::hash::Hasher as _;

use serde_json::{Value as Json, json};
use twox_hash::xxhash3_64::Hasher;

use crate::VmState;

/// The schema of a struct that derives [`VmState`]. Displays as indented JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schema {
    /// The description's name.
    pub name: &'static str,
    /// The version that is written.
    pub version: u32,
    /// The oldest version that is read.
    pub oldest: u32,
    /// Levels that a struct which contains itself may have.
    pub depth: Option<u32>,
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
    /// Elements, if the description fixes their number.
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
    /// The struct inside, by name, where it is one that the field is a part of.
    pub recursion: Option<&'static str>,
    /// The elements of a list that are not single structs.
    pub element: Option<Box<FieldSchema>>,
    /// The length of each of the collections that are the elements: `array_len`, `count`, `count_from_context`, `max`.
    pub each: Option<Box<FieldSchema>>,
}

/// The structs that a schema is a part of, from the inside out.
#[derive(Debug)]
pub struct Outer<'a> {
    structure: TypeId,
    outer: Option<&'a Outer<'a>>,
}

impl<'a> Outer<'a> {
    /// `T`, which is a part of `outer`.
    pub fn new<T: VmState>(outer: Option<&'a Outer<'a>>) -> Self {
        Outer { structure: TypeId::of::<T>(), outer }
    }

    fn has<T: VmState>(&self) -> bool {
        self.structure == TypeId::of::<T>() || self.outer.is_some_and(Outer::has::<T>)
    }
}

impl FieldSchema {
    pub(crate) fn plain(&mut self, kind: &'static str, size: usize) {
        self.kind = kind;
        self.size = Some(size as u64);
    }

    /// A struct: unfolded, unless that would never end.
    pub(crate) fn structure<T: VmState>(&mut self, outer: &Outer<'_>) {
        self.kind = "struct";
        if outer.has::<T>() {
            self.recursion = Some(T::NAME);
        } else {
            self.structure = Some(Box::new(T::schema_within(Some(outer))));
        }
    }

    /// `count` of what has been filled in so far.
    pub(crate) fn repeat(&mut self, count: usize) {
        self.array_len = Some(self.array_len.unwrap_or(1).saturating_mul(count as u64));
    }

    fn to_json(&self) -> Json {
        let mut json = json!({});
        let mut put = |key: &str, value: Option<Json>| {
            if let Some(value) = value {
                json[key] = value;
            }
        };
        let name = |name: &'static str| (!name.is_empty()).then(|| Json::from(name));
        let inner = |field: &Option<Box<FieldSchema>>| field.as_deref().map(FieldSchema::to_json);
        put("name", name(self.name));
        put("type", name(self.kind));
        put("size", self.size.map(Json::from));
        put("array_len", self.array_len.map(Json::from));
        put("count", self.count.map(Json::from));
        put("count_from_context", self.count_from_context.then_some(Json::Bool(true)));
        put("each", inner(&self.each));
        put("equal", self.equal.then_some(Json::Bool(true)));
        put("max", self.max.map(number));
        put("min", self.min.map(number));
        put("since", self.since.map(Json::from));
        put("until", self.until.map(Json::from));
        put("struct_versions", (!self.struct_versions.is_empty()).then(|| Json::from(self.struct_versions)));
        put("struct", self.structure.as_deref().map(Schema::to_json));
        put("recursion", self.recursion.map(Json::from));
        put("element", inner(&self.element));
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
        let mut json = json!({
            "vmsd_name": self.name,
            "version": self.version,
            "oldest": self.oldest,
            "fields": self.fields.iter().map(FieldSchema::to_json).collect::<Vec<_>>(),
            "subsections": self.subsections.iter().map(Schema::to_json).collect::<Vec<_>>(),
        });
        if let Some(depth) = self.depth {
            json["depth"] = depth.into();
        }
        json
    }

    /// A hash of all the schema says. Two builds with the same hash read each other's states; a live connection compares it
    /// instead of sending descriptions.
    pub fn hash(&self) -> u64 {
        let mut hasher = Hasher::new();
        feed(&mut hasher, &self.to_json());
        hasher.finish()
    }
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.to_json())
    }
}

/// Feeds JSON to the hasher with the keys sorted, so that the hash depends on no map's order and no formatting.
fn feed(hasher: &mut Hasher, json: &Json) {
    match json {
        Json::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(key, _)| *key);
            hasher.write(b"{");
            for (key, value) in entries {
                hasher.write(key.as_bytes());
                hasher.write(b"\0");
                feed(hasher, value);
            }
            hasher.write(b"}");
        }
        Json::Array(items) => {
            hasher.write(b"[");
            items.iter().for_each(|item| feed(hasher, item));
            hasher.write(b"]");
        }
        leaf => {
            hasher.write(leaf.to_string().as_bytes());
            hasher.write(b"\0");
        }
    }
}
