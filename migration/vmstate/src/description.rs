//! What the bytes of one saved value mean, in the shape of the stream's trailer.
//!
//! The number of entries depends on the value: a sparse array leaves one entry per slot and one per present element, a list one
//! per element, an empty array none. The sizes are those of the bytes in the stream.

use serde_json::{Value as Json, json};

use crate::VmState;
use crate::value::Value;

/// The entries of one struct, collected field by field in the order of the bytes.
#[derive(Debug, Default)]
pub struct Description {
    fields: Vec<Json>,
    subsections: Vec<Json>,
    size: usize,
}

impl Description {
    /// `{vmsd_name, version, fields}` and, if there are any, `subsections` of this state.
    pub fn of<T: VmState>(state: &T) -> Json {
        Self::sized(state).0
    }

    fn sized<T: VmState>(state: &T) -> (Json, usize) {
        let mut inner = Description::default();
        state.describe_fields(&mut inner);
        let mut json = json!({ "vmsd_name": T::NAME, "version": T::VERSION, "fields": inner.fields });
        if !inner.subsections.is_empty() {
            json["subsections"] = Json::Array(inner.subsections);
        }
        (json, inner.size)
    }

    /// One element of `size` bytes, or `count` equal ones back to back; none leave no entry.
    pub(crate) fn plain(&mut self, name: &str, kind: &str, size: usize, count: usize) {
        if count == 0 {
            return;
        }
        let mut entry = json!({ "name": name, "type": kind, "size": size });
        if count > 1 {
            entry["array_len"] = json!(count);
        }
        self.fields.push(entry);
        self.size += size * count;
    }

    /// A nested struct.
    pub(crate) fn structure<T: VmState>(&mut self, name: &str, state: &T) {
        let (json, size) = Self::sized(state);
        self.fields.push(json!({ "name": name, "type": "struct", "size": size, "struct": json }));
        self.size += size;
    }

    /// A run of elements: one entry if they are laid out alike, otherwise one entry per element with its index.
    pub(crate) fn run<T: Value>(&mut self, run: &[T], name: &str) {
        let mut elements = Description::default();
        for value in run {
            value.describe(name, &mut elements);
        }
        self.size += elements.size;
        let count = elements.fields.len();
        if count > 1 && elements.fields.iter().all(|entry| *entry == elements.fields[0]) {
            elements.fields.truncate(1);
            elements.fields[0]["array_len"] = json!(count);
        } else if count > 1 {
            for (index, entry) in elements.fields.iter_mut().enumerate() {
                entry["index"] = json!(index);
            }
        }
        self.fields.append(&mut elements.fields);
    }

    /// A subsection: its header and its state.
    pub(crate) fn subsection<T: VmState>(&mut self, state: &T) {
        let (json, size) = Self::sized(state);
        self.subsections.push(json);
        self.size += crate::subsection::header_bytes::<T>() + size;
    }
}
